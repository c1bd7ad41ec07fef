"""Give the cytoplasm to the nuclei: each of its pixels belongs to the nearest nucleus.

Where cells overlap nobody can tell whose a pixel is; the nearest nucleus is a rule that a reader can check.
"""

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

from images.bands import even_spans, windows

REACH = 256   # pixels; cytoplasm farther than this from every nucleus belongs to none
BLOCK = 1024  # side in pixels of what is looked at together


def cytoplasm_areas(label_bands: Iterable[np.ndarray], cytoplasm_bands: Iterable[np.ndarray], height: int, width: int,
                    count: int) -> np.ndarray:
    """Return the pixels of cytoplasm of each nucleus, by label, (count,) int64, 0 for the background.

    Args:
        label_bands: consecutive rows (rows, width) of the label map.
        cytoplasm_bands: likewise of the mask of the cytoplasm, bool; pixels of a nucleus are none of it.
        count: one more than the largest label.
    """
    spans = even_spans(height, BLOCK)
    reaching = [(max(start - REACH, 0), min(stop + REACH, height)) for start, stop in spans]
    result = np.zeros(count, np.int64)
    for (start, stop), (first, _), labels, cytoplasm in zip(spans, reaching, windows(label_bands, reaching),
                                                            windows(cytoplasm_bands, spans), strict=True):
        for left, right in even_spans(width, BLOCK):
            begin = max(left - REACH, 0)
            near = labels[:, begin:right + REACH]
            y, x = np.nonzero(cytoplasm[:, left:right] & (labels[start - first:stop - first, left:right] == 0))
            if not len(y) or not near.any():
                continue
            distance, (row, column) = ndimage.distance_transform_edt(near == 0, return_indices=True)
            place = y + start - first, x + left - begin
            owner = near[row[place], column[place]].astype(np.int64)
            result += np.bincount(owner[distance[place] <= REACH], minlength=count)
    return result
