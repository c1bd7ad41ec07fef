"""Measures of a segmentation: pure functions, each the only definition of its number.

The rule for empty masks: with nothing drawn and nothing predicted every measure is 1; with one of the two empty,
Dice, IoU, precision and recall are 0, and so are all instance measures and the boundary F1. Means are taken over
images first, then over classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from system.processes import total

PIXEL_METRICS = ("dice", "iou", "precision", "recall", "accuracy")
INSTANCE_METRICS = ("aji", "pq", "dq", "sq", "f1")
MATCH_IOU = 0.5  # two nuclei match above it; no nucleus can have two partners then
BOUNDARY_TOLERANCE = 2.0  # pixels


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
    counts = [pixels.sum(dim=(2, 3)) for pixels in (prediction & mask, prediction, mask)]
    both, found, drawn = torch.stack(counts).cpu().double()  # one transfer
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


@dataclass(frozen=True)
class Overlaps:
    """What two label maps share: areas of all nuclei and the pairs of nuclei that overlap.

    Attributes:
        found_areas, drawn_areas: (F,) and (D,) int64 pixels, in ascending order of the labels.
        found, drawn: (P,) positions in those arrays of the two nuclei of each overlapping pair.
        shared: (P,) int64 pixels that the pair has in common, at least 1.
    """

    found_areas: np.ndarray
    drawn_areas: np.ndarray
    found: np.ndarray
    drawn: np.ndarray
    shared: np.ndarray

    @property
    def unions(self) -> np.ndarray:
        """Return the pixels (P,) that belong to either nucleus of each pair."""
        return self.found_areas[self.found] + self.drawn_areas[self.drawn] - self.shared

    @property
    def ious(self) -> np.ndarray:
        """Return intersection over union (P,) float64 of each pair."""
        return self.shared / self.unions


def overlaps(found: np.ndarray, drawn: np.ndarray) -> Overlaps:
    """Count areas and overlaps of two label maps in one pass.

    Args:
        found, drawn: (H, W) integers of at least 0, 0 for background; labels need not be consecutive, and a label is
            one nucleus even where its pixels do not hang together.
    Raises:
        ValueError: for other shapes, types and negative labels.
    """
    for title, labels in (("found", found), ("drawn", drawn)):
        if labels.ndim != 2 or labels.dtype.kind not in "iub" or labels.shape != found.shape:
            raise ValueError(f"{title} is {labels.shape} {labels.dtype}; both label maps must be whole numbers of one "
                             f"shape (H, W)")
        if labels.size and labels.min() < 0:
            raise ValueError(f"{title} holds the label {labels.min()}; labels are at least 0, 0 for background")
    either = (found != 0) | (drawn != 0)
    found_labels, found_at = np.unique(np.append(found[either], 0).astype(np.int64), return_inverse=True)
    drawn_labels, drawn_at = np.unique(np.append(drawn[either], 0).astype(np.int64), return_inverse=True)
    # The 0 appended stands for the background, so that position 0 is the background in both.
    pairs, counts = np.unique((found_at * len(drawn_labels) + drawn_at)[:-1], return_counts=True)
    first, second = np.divmod(pairs, len(drawn_labels))
    areas = [np.bincount(at, counts, len(labels)).astype(np.int64)[1:]
             for at, labels in ((first, found_labels), (second, drawn_labels))]
    both = (first > 0) & (second > 0)
    return Overlaps(*areas, first[both] - 1, second[both] - 1, counts[both])


def instance_metrics(found: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """Compare predicted nuclei with drawn ones.

    `aji` is the Aggregated Jaccard Index as in Kumar et al. 2017 (IEEE TMI 36:1550): every drawn nucleus takes the
    predicted one of highest IoU (the lowest label of several), which more than one may take; one that overlaps nothing
    adds its area to the union, and so does every prediction that nobody took. It is not AJI+, which pairs one to one.
    `dq`, `sq` and `pq = dq * sq` are detection, segmentation and panoptic quality of Kirillov et al. 2019 (CVPR),
    matched at IoU > 0.5 within this one image. `f1` at IoU 0.5 is by its definition, 2 TP / (2 TP + FP + FN), the same
    number as `dq`; both names are in use.

    Where other programs differ: StarDist matches at an IoU of exactly 0.5 too, the AJI of cellseg-metrics takes the
    predictions of largest intersection (all of several), and both score two empty maps 0.

    Args:
        found, drawn: (H, W) integers, 0 for background (see `overlaps`).
    Returns:
        INSTANCE_METRICS as floats in [0, 1]; all 1 with no nucleus in either map, all 0 with none in one of them.

    >>> drawn = np.array([[1, 1, 1, 0, 2, 2]]); found = np.array([[5, 5, 0, 0, 0, 0]])
    >>> {name: round(value, 3) for name, value in instance_metrics(found, drawn).items()}
    {'aji': 0.4, 'pq': 0.444, 'dq': 0.667, 'sq': 0.667, 'f1': 0.667}
    """
    table = overlaps(found, drawn)
    if not len(table.found_areas) + len(table.drawn_areas):
        return dict.fromkeys(INSTANCE_METRICS, 1.0)
    ious = table.ious
    matched = ious[ious > MATCH_IOU]
    dq = 2 * len(matched) / (len(table.found_areas) + len(table.drawn_areas))
    sq = float(matched.mean()) if len(matched) else 0.0
    return {"aji": _aggregated_jaccard(table, ious), "pq": dq * sq, "dq": dq, "sq": sq, "f1": dq}


def _aggregated_jaccard(table: Overlaps, ious: np.ndarray) -> float:
    order = np.lexsort((table.found, -ious, table.drawn))  # by drawn nucleus, best first
    taking, first = np.unique(table.drawn[order], return_index=True)
    best = order[first]
    lonely = np.delete(table.drawn_areas, taking).sum()
    unused = np.delete(table.found_areas, np.unique(table.found[best])).sum()
    return float(table.shared[best].sum() / (table.unions[best].sum() + lonely + unused))


def boundary_f1(found: np.ndarray, drawn: np.ndarray, tolerance: float = BOUNDARY_TOLERANCE) -> float:
    """Compare outlines: the boundary F1 of Csurka et al. 2013 (BMVC).

    Precision is the share of predicted boundary pixels that lie within `tolerance` pixels (Euclidean) of a drawn one,
    recall the reverse, and the score their harmonic mean.

    Args:
        found, drawn: (H, W) bool masks, or label maps, where touching nuclei have a boundary too.
    Returns:
        a float in [0, 1]; 1 with both empty, 0 with one empty.
    """
    if found.shape != drawn.shape or found.ndim != 2:
        raise ValueError(f"found is {found.shape} and drawn {drawn.shape}; both must have one shape (H, W)")
    outlines = [boundary(labels) for labels in (found, drawn)]
    empty = [not outline.any() for outline in outlines]
    if any(empty):
        return float(all(empty))
    shares = [float((ndimage.distance_transform_edt(~other)[own] <= tolerance).mean())
              for own, other in (outlines, outlines[::-1])]
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def boundary(labels: np.ndarray) -> np.ndarray:
    """Return the pixels (H, W) bool of nuclei that have a neighbour of another label above, below, left or right.

    What lies outside the image is background, so a mask without a boundary is an empty mask.
    """
    framed = np.pad(labels, 1)
    inner = framed[1:-1, 1:-1]
    neighbours = (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:])
    return (inner != 0) & np.logical_or.reduce([inner != neighbour for neighbour in neighbours])


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
        self.images, *sums = total(self.images, *self._sums.values())
        self._sums = dict(zip(self._sums, sums, strict=True))

    def means(self) -> dict[str, float]:
        """Return name -> mean over all images (and classes)."""
        return {name: float(value) / self.images for name, value in self._sums.items()}
