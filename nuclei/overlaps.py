"""What two label maps have in common: which nuclei overlap, and by how many pixels."""

from dataclasses import dataclass

import numpy as np


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
