"""Measures of a segmentation: pure functions, each the only definition of its number.

The rule for empty masks: with nothing drawn and nothing predicted every measure is 1; with one of the two empty,
Dice, IoU, precision and recall are 0, and so are all instance measures and the boundary F1. Means are taken over
images first, then over classes.
"""

import numpy as np
import torch
from scipy import ndimage

from nuclei.outlines import boundary
from nuclei.overlaps import Overlaps, overlaps

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
    overlapped, first = np.unique(table.drawn[order], return_index=True)
    best = order[first]
    missed = np.delete(table.drawn_areas, overlapped).sum()
    unused = np.delete(table.found_areas, np.unique(table.found[best])).sum()
    return float(table.shared[best].sum() / (table.unions[best].sum() + missed + unused))


def soft_dice(probability: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """Compare probabilities with area fractions, per image and class, without a threshold.

    The soft Dice of Milletari et al. 2016 (arXiv 1606.04797), with squares in the denominator, so that only equal maps
    reach 1; the 1 added above and below makes two empty maps 1.

    Args:
        probability, fraction: (N, C, H, W) floating point in [0, 1].
    Returns:
        (N, C) in [0, 1], of the type of `probability`.

    >>> half = torch.full((1, 1, 8, 8), 0.5)
    >>> [round(float(soft_dice(p, half)), 3) for p in (half, torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))]
    [1.0, 0.802, 0.059]
    """
    overlap = (probability * fraction).sum(dim=(2, 3))
    size = probability.square().sum(dim=(2, 3)) + fraction.square().sum(dim=(2, 3))
    return (2 * overlap + 1) / (size + 1)


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
    shares = [float((ndimage.distance_transform_edt(~other)[outline] <= tolerance).mean())
              for outline, other in (outlines, outlines[::-1])]
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0
