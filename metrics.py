"""Measures of a segmentation: pure functions, each the only definition of its number.

The rule for empty masks: with nothing drawn and nothing predicted every measure is 1; with one of the two empty,
Dice, IoU, precision and recall are 0. Means are taken over images first, then over classes.
"""

import torch

PIXEL_METRICS = ("dice", "iou", "precision", "recall", "accuracy")


def pixel_metrics(prediction: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compare binary predictions with binary masks, per image and class.

    Args:
        prediction: (N, C, H, W) bool.
        mask: (N, C, H, W) bool.
    Returns:
        `dice`, `iou`, `precision`, `recall`, `accuracy`: (N, C) float64 in [0, 1] each, on the CPU.

    >>> drawn = torch.zeros(1, 1, 2, 2, dtype=torch.bool); drawn[..., 0] = True
    >>> found = torch.zeros(1, 1, 2, 2, dtype=torch.bool); found[..., 0, 0] = True
    >>> {name: round(float(value), 3) for name, value in pixel_metrics(found, drawn).items()}
    {'dice': 0.667, 'iou': 0.5, 'precision': 1.0, 'recall': 0.5, 'accuracy': 0.75}
    """
    if prediction.shape != mask.shape or prediction.dtype != torch.bool or mask.dtype != torch.bool:
        raise ValueError(f"prediction is {tuple(prediction.shape)} {prediction.dtype} and mask {tuple(mask.shape)} "
                         f"{mask.dtype}; both must be bool and of one shape (N, C, H, W)")
    both = (prediction & mask).sum(dim=(2, 3)).cpu().double()
    found = prediction.sum(dim=(2, 3)).cpu().double()
    drawn = mask.sum(dim=(2, 3)).cpu().double()
    area = mask.shape[2] * mask.shape[3]
    empty = (found == 0) & (drawn == 0)

    def ratio(part, whole):
        return torch.where(empty, 1.0, part / whole.clamp_min(1))

    return {
        "dice": ratio(2 * both, found + drawn),
        "iou": ratio(both, found + drawn - both),
        "precision": ratio(both, found),
        "recall": ratio(both, drawn),
        "accuracy": (area - found - drawn + 2 * both) / area,
    }


class MeanOverImages:
    """Collect per-image numbers and give their mean: no mean of batch means anywhere."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self.images = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add one batch: name -> (N, C) or (N,) tensor, one row an image."""
        self.images += len(next(iter(values.values())))
        for name, value in values.items():
            total = value.cpu().double().sum(dim=0).mean()  # over classes last
            self._sums[name] = self._sums.get(name, 0.0) + total

    def means(self) -> dict[str, float]:
        """Return name -> mean over all images (and classes)."""
        return {name: float(total) / self.images for name, total in self._sums.items()}
