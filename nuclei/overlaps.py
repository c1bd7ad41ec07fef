"""What two label maps have in common: which nuclei overlap, and by how many pixels."""

from dataclasses import dataclass

import numpy as np
from skimage.metrics import contingency_table


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
    if not either.any():
        return Overlaps(*np.zeros((5, 0), np.int64))
    table = contingency_table(*(_small_labels(labels[either]) for labels in (found, drawn))).tocoo()
    counts = table.data.astype(np.int64)
    areas = [np.bincount(labels, counts).astype(np.int64)[1:] for labels in (table.row, table.col)]
    both = (table.row > 0) & (table.col > 0)
    positions = [np.cumsum(area > 0)[labels[both] - 1] - 1
                 for area, labels in zip(areas, (table.row, table.col), strict=True)]
    return Overlaps(*(area[area > 0] for area in areas), *positions, counts[both])


def _small_labels(labels: np.ndarray) -> np.ndarray:
    """Return labels (N,) in the same order that are no larger than the number of pixels.

    The table has a row for each number up to the largest label, so that a label of 2**31 would fill the memory.
    """
    if labels.max() <= labels.size:
        return labels.astype(np.int32)
    distinct, position = np.unique(labels, return_inverse=True)
    return position + (distinct[0] > 0)  # 0 stays the background
