"""Trace nuclei along the edges of their pixels, from one label map or from bands of it.

Coordinates are (row, column) of corners of pixels: (0, 0) is the corner of the image, the centre of the first pixel
(0.5, 0.5), as in QuPath and GeoJSON. A polygon holds the centres of its nucleus' pixels and no others, and its area is
their number.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from skimage.measure import points_in_poly

RIGHT, DOWN, LEFT, UP = range(4)  # on the screen; a nucleus lies to the right of one who walks along its edges
STEPS = {RIGHT: (0, 1), DOWN: (1, 0), LEFT: (0, -1), UP: (-1, 0)}

Polygon = list[np.ndarray]  # the outline, then the holes: (N, 2) whole numbers, the first corner not repeated


def traced(bands: Iterable[np.ndarray]) -> Iterator[tuple[int, list[Polygon]]]:
    """Yield the label and the polygons of every nucleus, as soon as it is whole.

    Parts that touch at a corner alone are polygons of their own. Memory grows with the nuclei that are not yet whole.

    Args:
        bands: consecutive rows (rows, W) of labels, 0 for background. The pixels of a nucleus touch, if only at
            corners.
    """
    open_edges: dict[int, list[np.ndarray]] = {}
    top, above = 0, None
    for band in bands:
        above = np.zeros(band.shape[1], band.dtype) if above is None else above
        _add_edges(open_edges, np.vstack([above, band]), top)
        above, top = band[-1].copy(), top + len(band)
        yield from _whole(open_edges, set(np.unique(above).tolist()))
    if above is not None:
        _add_edges(open_edges, np.vstack([above, np.zeros_like(above)]), top, last=True)
        yield from _whole(open_edges, set())


def rings(mask: np.ndarray) -> list[np.ndarray]:
    """Return the outlines and the holes of a mask (H, W) bool in one list, without telling which hole lies where."""
    open_edges: dict[int, list[np.ndarray]] = {}
    _add_edges(open_edges, np.pad(mask.astype(np.uint8), ((1, 1), (0, 0))), 0)
    return _rings(np.concatenate(open_edges[1])) if open_edges else []


def _whole(open_edges: dict[int, list[np.ndarray]], growing: set[int]) -> Iterator[tuple[int, list[Polygon]]]:
    for label in [label for label in open_edges if label not in growing]:
        yield label, _polygons(_rings(np.concatenate(open_edges.pop(label))))


def _add_edges(open_edges: dict[int, list[np.ndarray]], rows: np.ndarray, top: int, last: bool = False) -> None:
    """Add the edges between rows, of which the first lies above `top`, and within all rows but the first."""
    upper, lower = rows[:-1], rows[1:]
    y, x = np.nonzero(upper != lower)
    found = [(lower[y, x], y + top, x, RIGHT), (upper[y, x], y + top, x + 1, LEFT)]
    if not last:
        framed = np.pad(lower, ((0, 0), (1, 1)))
        before, after = framed[:, :-1], framed[:, 1:]
        y, x = np.nonzero(before != after)
        found += [(before[y, x], y + top, x, DOWN), (after[y, x], y + top + 1, x, UP)]
    labels = np.concatenate([part[0] for part in found]).astype(np.int64)
    edges = np.concatenate([np.stack([y, x, np.full(len(y), way)], axis=1) for _, y, x, way in found])
    order = np.argsort(labels, kind="stable")
    labels, edges = labels[order], edges[order]
    names, starts = np.unique(labels, return_index=True)
    if not len(names):
        return
    for name, part in zip(names.tolist(), np.split(edges, starts[1:]), strict=True):
        if name:
            open_edges.setdefault(name, []).append(part)


def _rings(edges: np.ndarray) -> list[np.ndarray]:
    """Join the edges (E, 3) of one nucleus, each the corner where it begins and its direction, to closed rings."""
    ways: dict[tuple[int, int], list[int]] = {}
    for y, x, way in edges.tolist():
        ways.setdefault((y, x), []).append(way)
    rings = []
    while ways:
        start = place = next(iter(ways))
        way, corners = ways[start][0], [start]
        while True:
            ways[place].remove(way)
            if not ways[place]:
                del ways[place]
            place = place[0] + STEPS[way][0], place[1] + STEPS[way][1]
            right = (way + 1) % 4
            if place == start and right not in ways.get(place, ()):
                break
            # Where two pixels touch at a corner, the turn to the right stays at the same pixel.
            turned = right if len(ways[place]) > 1 else ways[place][0]
            if turned != way:
                corners.append(place)
            way = turned
        ring = np.array(corners)
        # The walk may have begun in the middle of a straight line.
        before, after = ring[0] - ring[-1], ring[1] - ring[0]
        rings.append(ring[1:] if before[0] * after[1] == before[1] * after[0] else ring)
    return rings


def _polygons(rings: list[np.ndarray]) -> list[Polygon]:
    """Put each hole to the outline that it lies in."""
    outlines = [[ring] for ring in rings if _area(ring) > 0]
    for hole in (ring for ring in rings if _area(ring) < 0):
        # The pixel to the left of an edge of a hole is within it; of several outlines the smallest around it is its.
        step = np.sign(hole[1] - hole[0])
        inside = hole[0] + step / 2 + np.array([-step[1], step[0]]) / 2
        around = [part for part in outlines if len(outlines) == 1 or points_in_poly(inside[None], part[0])[0]]
        min(around, key=lambda part: _area(part[0])).append(hole)
    return outlines


def _area(ring: np.ndarray) -> float:
    """Return the area of a ring, negative for a hole."""
    y, x = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
