"""Nuclei as people draw them, and the one rasteriser that turns them into instance maps.

Coordinates are (row, column) in pixels of the image, and the centre of the first pixel is (0, 0), as `skimage.draw` has
it. The files are read by `preparation.annotation_files`.
"""

from dataclasses import dataclass, field

import numpy as np
from skimage.draw import polygon


@dataclass
class Region:
    """One nucleus as drawn.

    Attributes:
        name: number or id in the file, for messages.
        polygons: each an outline (N, 2) float64 of (row, column), followed by its holes; the region is their union.
        pixels: sorted indices into the flattened image, where the file holds pixels and not outlines.
    """

    name: str
    polygons: list[list[np.ndarray]] = field(default_factory=list)
    pixels: np.ndarray | None = None


@dataclass(eq=False)
class Annotation:
    """What was drawn on one image.

    Attributes:
        size: (height, width) of the image if the file tells it.
        notes: what a user should know, one sentence each.
    """

    regions: list[Region] = field(default_factory=list)
    microns_per_pixel: float | None = None
    size: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)


def rasterise(regions: list[Region], shape: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """Draw regions into an instance map (H, W) int32 with labels 1..n in their order, 0 for background.

    A pixel belongs to a region if its centre does, by `skimage.draw.polygon` (edges included); where regions overlap,
    the earlier one wins. What lies beyond the image is cut off. Regions that leave no pixel get no label.

    Returns:
        The map, and a sentence for each region left out.
    """
    labels = np.zeros(shape, np.int32)
    flat = labels.reshape(-1)
    count, notes = 0, []
    for region in regions:
        pixels = _pixels(region, shape)
        free = pixels[flat[pixels] == 0]
        if len(free):
            count += 1
            flat[free] = count
        else:
            reason = "it lies wholly under earlier regions" if len(pixels) else _why_empty(region, shape)
            notes.append(f"region {region.name} left out: {reason}")
    return labels, notes


def _pixels(region: Region, shape: tuple[int, int]) -> np.ndarray:
    """Return the sorted flat indices of a region's pixels within the image."""
    if region.pixels is not None:
        return region.pixels
    inside = np.zeros(0, np.intp)
    for outline, *holes in (rings for rings in region.polygons if rings):
        part = _inside(outline, shape)
        for hole in holes:
            part = np.setdiff1d(part, _inside(hole, shape), assume_unique=True)
        inside = np.union1d(inside, part)
    return inside


def _inside(ring, shape: tuple[int, int]) -> np.ndarray:
    ring = np.asarray(ring, float).reshape(-1, 2).clip(-1e9, 1e9)  # what lies farther out is cut off anyway
    if _vertices(ring) < 3:
        return np.zeros(0, np.intp)
    rows, columns = polygon(ring[:, 0], ring[:, 1], shape)
    return np.ravel_multi_index((rows, columns), shape)


def _vertices(ring) -> int:
    """Count the vertices of an outline; the first one repeated at the end counts once."""
    return len(ring) - (len(ring) > 1 and np.array_equal(ring[0], ring[-1]))


def _why_empty(region: Region, shape: tuple[int, int]) -> str:
    outlines = [rings[0] for rings in region.polygons if rings]
    most = max((_vertices(outline) for outline in outlines), default=0)
    if region.pixels is None and most < 3:
        return f"{most} vertices; a region has at least 3"
    corners = np.concatenate([np.asarray(o, float).reshape(-1, 2) for o in outlines]) if outlines else np.zeros((1, 2))
    (top, left), (bottom, right) = corners.min(axis=0), corners.max(axis=0)
    if bottom < 0 or right < 0 or top > shape[0] - 1 or left > shape[1] - 1:
        return (f"rows {top:g}..{bottom:g}, columns {left:g}..{right:g} are outside the image of "
                f"{shape[0]}x{shape[1]} pixels")
    return "it covers no pixel"
