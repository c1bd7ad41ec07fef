"""Measure shapes for which sums of coordinates do not suffice: perimeter, convex area, and what the image's edge cuts.

The numbers are those of scikit-image's `regionprops`, a test compares them. Here they come from bands of rows, for all
nuclei at once, and do not depend on how the image was divided.
"""

from collections.abc import Iterable

import numpy as np

from images.bands import even_spans, windows
from nuclei.outlines import boundary

ROWS = 256  # that are looked at together
REACH = 2   # rows above and below that a step of an outline depends on
# A pixel of an outline counts 1, a neighbour of that outline 2 beside it and 10 at a corner; what a step is worth by
# the sum (Benkrid, Crookes and Benkrid 2000), as in `skimage.measure.perimeter`.
SIDES, CORNERS = ((-1, 0), (1, 0), (0, -1), (0, 1)), ((-1, -1), (-1, 1), (1, -1), (1, 1))
STEPS = {1.0: (5, 7, 15, 17, 25, 27), 2 ** 0.5: (21, 33), (1 + 2 ** 0.5) / 2: (13, 23)}
NEAR_ZERO = 1e-9


def nucleus_shapes(bands: Iterable[np.ndarray], height: int, width: int, areas: np.ndarray) -> dict[str, np.ndarray]:
    """Measure the shapes of all nuclei.

    Memory grows with the width, the number of nuclei, and the rows of those that are not yet whole.

    Args:
        bands: consecutive rows (rows, width) of the label map, whole numbers of at least 0.
        height, width: of the image in pixels.
        areas: (labels,) pixels of each label, 0 for the background and for labels that do not occur.
    Returns:
        by label, (labels,) each: `perimeter` in pixels, along the centres of the outline's pixels; `convex_area`, the
        pixels whose centres lie in the smallest convex polygon around the nucleus; `cut_by_border`, bool: whether a
        pixel lies at the image's edge.
    """
    kinds = np.zeros((len(areas), 1 + len(STEPS)), np.int64)
    convex, cut = np.zeros(len(areas), np.int64), np.zeros(len(areas), bool)
    growing = np.zeros((4, 0), np.int64)
    spans = even_spans(height, ROWS)
    reaching = [(max(start - REACH, 0), min(stop + REACH, height)) for start, stop in spans]
    for (start, stop), (first, _), near in zip(spans, reaching, windows(bands, reaching), strict=True):
        labels = near[start - first:stop - first]
        kinds += _steps(near, start - first, stop - first, len(areas))
        for edge in (labels[:, 0], labels[:, -1], *([labels[0]] * (start == 0)), *([labels[-1]] * (stop == height))):
            cut[edge] = True
        extents = np.concatenate([growing, _runs(labels, start)], axis=1)
        counted = np.bincount(extents[0], extents[3] - extents[2] + 1, len(areas)).astype(np.int64)
        whole = (counted == areas)[extents[0]]
        names, pixels = _convex_areas(extents[:, whole])
        convex[names], growing = pixels, extents[:, ~whole]
    cut[0] = False
    return {"perimeter": kinds[:, 1:] @ np.array([*STEPS]), "convex_area": convex, "cut_by_border": cut}


def _steps(near: np.ndarray, top: int, bottom: int, count: int) -> np.ndarray:
    """Count the steps (count, 1 + kinds) of the outlines in the rows from `top` to `bottom`, by label and kind."""
    kind_of = np.zeros(64, np.int64)
    for kind, sums in enumerate(STEPS.values(), start=1):
        kind_of[list(sums)] = kind
    outlines = np.pad(np.where(boundary(near), near, 0), 1).astype(np.int64)
    y, x = np.nonzero(outlines[top + 1:bottom + 1])
    y += top + 1
    label = outlines[y, x]
    sums = np.ones(len(y), np.int64)
    for worth, neighbours in ((2, SIDES), (10, CORNERS)):
        for down, right in neighbours:
            sums += worth * (outlines[y + down, x + right] == label)
    width = 1 + len(STEPS)
    return np.bincount(label * width + kind_of[sums], minlength=count * width).reshape(count, width)


def _runs(labels: np.ndarray, top: int) -> np.ndarray:
    """Return label, row, first and last column (4, R) int64 of every run of pixels of a nucleus in a row."""
    framed = np.pad(labels, ((0, 0), (1, 1)))
    changes = framed[:, 1:] != framed[:, :-1]
    inside = labels > 0
    rows, begins = np.nonzero(inside & changes[:, :-1])
    _, ends = np.nonzero(inside & changes[:, 1:])
    return np.stack([labels[rows, begins].astype(np.int64), rows + top, begins, ends])


def _convex_areas(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (N,) and the pixels (N,) of their convex hulls from all runs (4, R) of these nuclei.

    The hull is that of the middles of the four sides of each pixel, and a pixel on it belongs to it, as in
    `skimage.morphology.convex_hull_image`. Coordinates are doubled, so that they are whole numbers.
    """
    if not runs.shape[1]:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    label, row, begin, end = runs
    names, number = np.unique(label, return_inverse=True)
    first, last = np.full(len(names), np.iinfo(np.int64).max), np.full(len(names), -1)
    np.minimum.at(first, number, row)
    np.maximum.at(last, number, row)
    rows = last - first + 1
    before = np.cumsum(2 * rows + 2) - (2 * rows + 2)  # where the doubled rows of each nucleus begin on one axis
    place = before[number] + 2 * (row - first[number]) + 1
    left = _lower_envelope(place, 2 * begin, number)
    right = _lower_envelope(place, -2 * end, number)
    of = np.repeat(np.arange(len(names)), rows)
    middle = before[of] + 1 + 2 * (np.arange(len(of)) - (np.cumsum(rows) - rows)[of])
    low, high = np.interp(middle, *left) / 2, -np.interp(middle, *right) / 2
    inside = np.floor(high + NEAR_ZERO) - np.ceil(low - NEAR_ZERO) + 1
    return names, np.bincount(of, inside).astype(np.int64)


def _lower_envelope(place: np.ndarray, value: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners (x, y) of the convex lower envelopes of the sides of pixels, nucleus after nucleus.

    Args:
        place, value: (R,) doubled coordinates of pixels' centres along and across the axis.
        number: (R,) of the nucleus; places of different ones do not meet.
    """
    x, y = np.concatenate([place, place - 1, place + 1]), np.concatenate([value - 1, value, value])
    of = np.concatenate([number] * 3)
    order = np.lexsort((y, x))
    x, y, of = x[order], y[order], of[order]
    lowest = np.append(True, x[1:] != x[:-1])
    x, y, of = x[lowest], y[lowest], of[lowest]
    while len(x) > 2:
        # A point on or above the line between its neighbours is no corner, whichever of them is one.
        ahead, behind = (x[1:-1] - x[:-2]) * (y[2:] - y[1:-1]), (x[2:] - x[1:-1]) * (y[1:-1] - y[:-2])
        corner = np.ones(len(x), bool)
        corner[1:-1] = (ahead > behind) | (of[:-2] != of[2:])
        if corner.all():
            break
        x, y, of = x[corner], y[corner], of[corner]
    return x, y
