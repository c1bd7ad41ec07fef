"""Nuclei as people draw them, and the one rasteriser that turns them into instance maps.

Coordinates are (row, column) in pixels of the image, and the centre of the first pixel is (0, 0), as `skimage.draw` has
it. The files are read by `preparation.annotation_files`.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from skimage.draw import polygon

from system.errors import UserError

# Names of classes that are drawn to be left out. QuPath ends those that it ignores with a star.
NO_NUCLEI = re.compile(r"\*$|ignore|art[ei]fact|ambiguous|uncertain|unsure|background|exclude|debris|\broi\b|region|"
                       r"tissue", re.IGNORECASE)


@dataclass
class Region:
    """One thing as drawn, which may be a nucleus.

    Attributes:
        name: number or id in the file, for messages.
        polygons: each an outline (N, 2) float64 of (row, column), followed by its holes; the region is their union.
        pixels: sorted indices into the flattened image, where the file holds pixels and not outlines.
        kind: class, layer or category, '' for none.
        why_not: what it is, if it is no nucleus whatever its class: 'tile', 'arrow'.
    """

    name: str
    polygons: list[list[np.ndarray]] = field(default_factory=list)
    pixels: np.ndarray | None = None
    kind: str = ""
    why_not: str = ""


@dataclass(eq=False)
class Annotation:
    """What was drawn on one image.

    Attributes:
        size: (height, width) of the image if the file tells it.
        notes: what a user should know, one sentence each.
        taken, left: what was drawn -> how many, of that which is a nucleus and of that which is not (see `choose`).
    """

    regions: list[Region] = field(default_factory=list)
    microns_per_pixel: float | None = None
    size: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)
    taken: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)


def choose(found: Annotation, classes: Collection[str] = ()) -> Annotation:
    """Leave the nuclei among the regions of an annotation, count what was drawn, and note it if it is of several kinds.

    Args:
        classes: those that are nuclei; without any, all are whose name does not say otherwise.
    """
    chosen = []
    for region in found.regions:
        named = f"of class {region.kind}" if region.kind else "without a class"
        nucleus = region.kind in classes if classes else not NO_NUCLEI.search(region.kind)
        if nucleus and not region.why_not:
            chosen.append(region)
            found.taken[named] += 1
        else:
            found.left[region.why_not or named] += 1
    found.regions = chosen
    if found.left or len(found.taken) > 1:
        found.notes.append(kinds_in_words(found.taken, found.left))
    return found


def check_classes(classes: Collection[str], read: Iterable[Annotation], place: Path) -> None:
    """Raise UserError for a class that was asked for and is nowhere drawn, which would be a mistyped one."""
    read = list(read)
    there = {kind for found in read for kind in (*found.taken, *found.left)}
    missing = [name for name in classes if f"of class {name}" not in there]
    if missing and read:
        known = ", ".join(sorted(kind.removeprefix("of class ") for kind in there)) or "nothing"
        raise UserError(f"--classes {','.join(missing)}: no region of that class or layer is in {place}. There is: "
                        f"{known}")


def kinds_in_words(taken: Counter[str], left: Counter[str]) -> str:
    """Return what was taken as nuclei and what was left out, each with its count."""
    return "; ".join(f"{what}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
                     for what, kinds in (("taken as nuclei", taken), ("left out", left)) if kinds)


def ellipse(corner: tuple[float, float], opposite: tuple[float, float], points: int = 720) -> list[tuple[float, float]]:
    """Return the outline of the ellipse that fills a box, as (row, column)."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    centre, half = np.add(corner, opposite) / 2, np.subtract(opposite, corner) / 2
    return [tuple(centre + half * (np.sin(angle), np.cos(angle))) for angle in angles]


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
