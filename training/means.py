"""Means over the images of an epoch, of all processes together: no mean of batch means anywhere."""

import torch

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

    def add_up(self) -> None:
        """Take over, once and at the end, what all other processes collected; each of them added some batch."""
        self.images, *sums = all_reduce_sum(self.images, *self._sums.values())
        self._sums = dict(zip(self._sums, sums, strict=True))

    def means(self) -> dict[str, float]:
        """Return name -> mean over all images (and classes)."""
        return {name: float(value) / self.images for name, value in self._sums.items()}
