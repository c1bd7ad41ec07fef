"""What is measured in a pass over a loader: means over images, of all processes together, never of batch means."""

import math

import torch
from torch.nn import functional as F

from scoring.measures import pixel_metrics, soft_dice
from system.processes import all_reduce_sum


class MeanOverImages:
    """Collect per-image numbers and give their mean: no mean of batch means anywhere."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self.images = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add one batch: name -> (N, C) or (N,) tensor, one row an image."""
        self.images += len(next(iter(values.values())))
        for name, value in values.items():
            summed = value.cpu().double().sum(dim=0).mean()  # over classes last
            self._sums[name] = self._sums.get(name, 0.0) + summed

    def state(self) -> dict:
        """Return what `load` takes, as plain types."""
        return {"images": self.images, "sums": {name: float(value) for name, value in self._sums.items()}}

    def load(self, state: dict) -> None:
        """Add what was collected before."""
        self.images += state["images"]
        self._sums = {name: self._sums.get(name, 0.0) + torch.tensor(value, dtype=torch.float64)
                      for name, value in state["sums"].items()}

    def add_up(self) -> None:
        """Take over, once and at the end, what all other processes collected; each of them added some batch."""
        self.images, *sums = all_reduce_sum(self.images, *self._sums.values())
        self._sums = dict(zip(self._sums, sums, strict=True))

    def means(self) -> dict[str, float]:
        """Return name -> mean over all images (and classes)."""
        return {name: float(value) / self.images for name, value in self._sums.items()}


class PassMeasures:
    """Measure the batches of one pass over a loader, per image.

    Args:
        threshold: probability from which a pixel is foreground.
        classes: channels that are scored; what comes after them, the rims of nuclei, is no class.
    """

    def __init__(self, threshold: float, classes: int):
        self.threshold, self.classes = threshold, classes
        self.logit = math.log(threshold / (1 - threshold))
        self._means, self._empty_masks = MeanOverImages(), 0

    @property
    def images(self) -> int:
        """Return how many images were measured, after `result` in all processes together."""
        return self._means.images

    def foreground(self, logits: torch.Tensor) -> torch.Tensor:
        """Return where logits (N, K, H, W) find foreground: (N, classes, H, W) bool."""
        return logits[:, :self.classes] >= self.logit

    def compare(self, logits: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the pixel metrics (N, classes) of logits and mask (N, K, H, W), which counts from 0.5 on."""
        return pixel_metrics(self.foreground(logits), mask[:, :self.classes] >= 0.5)

    def add(self, logits: torch.Tensor, mask: torch.Tensor, loss: torch.Tensor) -> None:
        """Add a training batch at the stage's resolution: its loss, a scalar, and the soft Dice.

        Args:
            mask: (N, K, H, W) area fractions in [0, 1]. They are not cut at one half: where nuclei are small, nothing
                would be left of them at a coarse stage, and a network that finds nothing would be right.
        """
        values = {"loss": loss.expand(len(mask)), "soft_dice": self._soft_dice(logits, mask)}
        self._means.add(values | self.compare(logits, mask))

    def add_validation(self, logits: torch.Tensor, mask: torch.Tensor, loss: torch.Tensor,
                       finest: torch.Tensor | None) -> None:
        """Add a validation batch: loss and soft Dice at the stage's resolution, all else at 256 pixels.

        Args:
            finest: the masks at 256 pixels, with which the enlarged logits are compared; None where `mask` is as fine
                as it gets.
        """
        soft_dice = self._soft_dice(logits, mask)
        if finest is not None:
            logits = F.interpolate(logits, finest.shape[-2:], mode="bilinear", align_corners=False)
            mask = finest
        self._means.add(self.compare(logits, mask) | {
            "loss": loss.expand(len(mask)), "soft_dice": soft_dice,
            "foreground": self.foreground(logits).float().mean(dim=(2, 3))})
        drawn = mask[:, :self.classes] >= 0.5
        self._empty_masks += int((~drawn.flatten(2).any(dim=2)).any(dim=1).sum())

    def _soft_dice(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return soft_dice(logits[:, :self.classes].sigmoid(), mask[:, :self.classes])

    def state(self) -> dict:
        """Return the sums over the images of this process, as plain types."""
        return self._means.state()

    def load(self, state: dict) -> None:
        """Add the sums that `state` returned before."""
        self._means.load(state)

    def so_far(self) -> dict[str, float]:
        """Return the means over the images of this process."""
        return self._means.means()

    def result(self) -> dict[str, float]:
        """Return, once and at the end, the means over the images of all processes."""
        self._means.add_up()
        return self._means.means()

    def empty_masks(self) -> int:
        """Return how many masks of all processes are empty, or one of their classes is."""
        return int(*all_reduce_sum(self._empty_masks))
