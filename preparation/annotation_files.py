"""Read the files in which programs keep what people draw around nuclei: ImageScope XML, GeoJSON and COCO JSON.

Readers return regions in the order of the file (see `preparation.annotations`). ImageScope's vertices are taken as they
are. QuPath and COCO put (0, 0) at the corner of the first pixel, so half a pixel is subtracted from theirs: a square
drawn from (10, 10) to (20, 20) is then rows and columns 10..19.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path
from xml.parsers import expat

import numpy as np

from images.files import MAX_PIXELS
from images.listing import name_of
from preparation.annotations import Annotation, Region, choose, ellipse
from system.errors import UserError

FREEHAND, RECTANGLE, ELLIPSE = "0", "1", "2"  # Type of a region of ImageScope
HEAD = 65536  # bytes in which JSON must have begun


class AnnotationError(UserError):
    """A file of annotations that cannot be read; the message names it."""


def read_imagescope(path: Path, classes: Collection[str] = ()) -> Annotation:
    """Read an Aperio ImageScope XML; `choose` says which of its layers are nuclei.

    Rectangles and ellipses are drawn from two corners of their box; arrows, rulers and negative regions are no nuclei.
    Raises AnnotationError for a file with a DOCTYPE or entity declaration (it could read other files or fill the
    memory), for XML that is not well formed and for XML of another program.
    """
    reader = _ImageScopeReader(path)
    parser = reader.parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = reader.declaration
    try:
        with open(path, "rb") as file:
            parser.ParseFile(file)
    except AnnotationError:
        raise
    except (expat.ExpatError, LookupError, ValueError) as error:  # the last two for encodings that it does not know
        raise AnnotationError(f"{path}: no XML that can be read ({error}). Export it again from ImageScope") from None
    return choose(reader.annotation, classes)


class _ImageScopeReader:
    """Collect regions while the parser walks through Annotations/Annotation/Regions/Region/Vertices/Vertex."""

    def __init__(self, path: Path):
        self.path, self.annotation = path, Annotation()
        self.parser = None
        self.layer, self.layer_name, self.kind_of_region = 0, "", ""
        self.region: Region | None = None
        self.outline: list[tuple[float, float]] | None = None

    def declaration(self, *_) -> None:
        raise AnnotationError(f"{self.path}: line {self.parser.CurrentLineNumber} has a DOCTYPE or entity declaration; "
                              f"ImageScope writes none, and they are not read. Export the file again from ImageScope")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if self.outline is None:  # the first element
            if tag != "Annotations":
                raise AnnotationError(f"{self.path}: its root is <{tag}>; an ImageScope file begins with "
                                      f"<Annotations>. Export the annotation from ImageScope as XML")
            self.outline = []
            self._read_scale(attributes.get("MicronsPerPixel", "0"))
        elif tag == "Annotation":
            self.layer += 1
            self.layer_name = attributes.get("Name", "").strip()
        elif tag == "Attribute" and self.region is None and not self.layer_name:  # of a layer, in place of a name
            name, value = attributes.get("Name", "").strip(), attributes.get("Value", "").strip()
            self.layer_name = value if name == "Description" else name
        elif tag == "Region":
            self._start_region(attributes)
        elif tag == "Vertex":
            self.outline.append((self._number(attributes, "Y"), self._number(attributes, "X")))

    def _read_scale(self, text: str) -> None:
        """Take the size of a pixel; 0 stands for unknown, and what is no number counts as that, with a note."""
        try:
            size = float(text)
        except ValueError:
            size = math.nan
        if size > 0 and math.isfinite(size):
            self.annotation.microns_per_pixel = size
        elif size != 0:
            self.annotation.notes.append(f"MicronsPerPixel is {text!r}, no number above 0; taken as unknown")

    def _start_region(self, attributes: dict[str, str]) -> None:
        self.outline = []
        name = attributes.get("Id", "without Id")
        if self.layer > 1:
            name += f" of layer {self.layer}"
        self.kind_of_region = attributes.get("Type", "0")
        # Vertices are still to come.
        self.region = Region(name, [[self.outline]], kind=self.layer_name,
                             why_not="negative region" if attributes.get("NegativeROA") == "1" else "")
        self.annotation.regions.append(self.region)

    def end(self, tag: str) -> None:
        """Finish a region whose vertices are known."""
        if tag != "Region" or self.region is None:
            return
        if self.kind_of_region == ELLIPSE and len(self.outline) > 1:
            box = np.array(self.outline)
            self.outline[:] = ellipse(box.min(axis=0), box.max(axis=0))
        elif self.kind_of_region == RECTANGLE and len(self.outline) == 2:
            (top, left), (bottom, right) = self.outline
            self.outline[:] = [(top, left), (top, right), (bottom, right), (bottom, left)]
        elif self.kind_of_region not in (FREEHAND, RECTANGLE, ELLIPSE) and len(self.outline) < 3:
            self.region.why_not = "arrow, ruler or pin"
        self.region = None

    def _number(self, attributes: dict[str, str], key: str) -> float:
        try:
            value = float(attributes[key])
        except (KeyError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise AnnotationError(f"{self.path}: line {self.parser.CurrentLineNumber} has {key}="
                                  f"{attributes.get(key)!r}; a finite number is needed. Export the file again from "
                                  f"ImageScope")
        return value


def read_geojson(path: Path, classes: Collection[str] = ()) -> Annotation:
    """Read GeoJSON as QuPath exports it: a FeatureCollection, a list of features or a single one.

    Polygon and MultiPolygon, with holes; of a QuPath cell the nucleus is taken, and one without is no nucleus. Tiles
    and cores of a tissue array are none either, and of classes `choose` decides. Other geometries have no area and are
    left out with a note. Raises AnnotationError for anything else.
    """
    content = _read_json(path)
    if isinstance(content, dict):
        content = content.get("features") if content.get("type") == "FeatureCollection" else [content]
    if not isinstance(content, list) or not all(isinstance(f, dict) and f.get("type") == "Feature" for f in content):
        raise AnnotationError(f"{path}: no GeoJSON features found; a FeatureCollection or a list of features is "
                              f"needed. Export it from QuPath with 'Export objects as GeoJSON'")
    found, cells = Annotation(), 0
    for number, feature in enumerate(content, 1):
        cells += bool(feature.get("nucleusGeometry"))
        geometry = feature.get("nucleusGeometry") or feature.get("geometry")
        geometry = geometry if isinstance(geometry, dict) else {}
        kind, coordinates = geometry.get("type"), geometry.get("coordinates")
        if kind not in ("Polygon", "MultiPolygon"):
            found.notes.append(f"region {number} left out: a {kind or 'feature without geometry'} has no area")
            continue
        polygons = coordinates if kind == "MultiPolygon" else [coordinates]
        try:
            rings = [[_ring(ring) for ring in rings] for rings in polygons]
        except (TypeError, ValueError, LookupError, OverflowError):
            raise AnnotationError(f"{path}: feature {number} has {kind} coordinates that are no lists of finite (x, y) "
                             f"pairs. Export it again") from None
        found.regions.append(Region(str(number), rings, kind=_class_of(feature), why_not=_object_of(feature)))
    if cells:
        found.notes.append(f"{cells} cells with a nucleus of their own; the nucleus is taken, not the cell")
    return choose(found, classes)


def _class_of(feature: dict) -> str:
    """Return the class of a QuPath object, '' for none; older versions write its name alone."""
    properties = feature.get("properties")
    found = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(found, dict):
        names = found.get("names")
        found = found.get("name") or (": ".join(map(str, names)) if isinstance(names, list) else "")
    return found.strip() if isinstance(found, str) else ""


def _object_of(feature: dict) -> str:
    """Return what a QuPath object is, if it is no nucleus: a tile, a core, a cell of which no nucleus was found."""
    properties = feature.get("properties")
    kind = str(properties.get("objectType", properties.get("object_type", ""))).lower() \
        if isinstance(properties, dict) else ""
    if kind == "cell" and not feature.get("nucleusGeometry"):
        return "cell without a nucleus"
    return {"tile": "tile", "tma_core": "core of a tissue array", "root": "whole image"}.get(kind, "")


def read_coco(path: Path, classes: Collection[str] = ()) -> dict[str, Annotation]:
    """Read COCO JSON as CVAT exports it: polygons and run lengths, plain or compressed. `choose` says which categories
    are nuclei; a region of many (iscrowd) is none.

    Returns:
        The annotation of each image, by the stem of its file name.
    Raises AnnotationError for JSON of another kind, for two images with one stem and for run lengths that do not fit.
    """
    content = _read_json(path)
    if not isinstance(content, dict) or not all(_dictionaries(content.get(k)) for k in ("images", "annotations")):
        raise AnnotationError(f"{path}: no COCO annotation; the lists 'images' and 'annotations' are needed. "
                              f"Export it from CVAT as 'COCO 1.0'")
    by_id, by_stem = {}, {}
    names = {str(c.get("id")): str(c.get("name")) for c in content["categories"]} \
        if _dictionaries(content.get("categories")) else {}
    for image in content["images"]:
        stem = name_of(str(image.get("file_name", "")).replace("\\", "/"))
        if not stem or stem in by_stem:
            raise AnnotationError(f"{path}: image {image.get('id')!r} has file_name {image.get('file_name')!r}; every "
                                  f"image needs a name whose stem occurs once. Rename it and export again")
        size = (image.get("height"), image.get("width"))
        by_stem[stem] = by_id[str(image.get("id"))] = Annotation(
            size=size if all(isinstance(side, int) and side > 0 for side in size) else None)
    for number, entry in enumerate(content["annotations"], 1):
        name = str(entry.get("id", number))
        if str(entry.get("image_id")) not in by_id:
            raise AnnotationError(f"{path}: annotation {name} is for image {entry.get('image_id')!r}, which the file "
                                  f"does not list. Export it again")
        annotation, segmentation = by_id[str(entry["image_id"])], entry.get("segmentation")
        if not segmentation:
            annotation.notes.append(f"region {name} left out: it has no outline (a box alone?)")
            continue
        try:
            region = _coco_region(name, segmentation, annotation)
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            raise AnnotationError(f"{path}: annotation {name} has a segmentation that cannot be read ({error}); lists "
                             f"x, y, x, y ... or run lengths are needed. Export it again") from None
        category = entry.get("category_id")
        region.kind = "" if category is None else names.get(str(category), str(category))
        region.why_not = "crowd (iscrowd)" if entry.get("iscrowd") else ""
        annotation.regions.append(region)
    return {stem: choose(annotation, classes) for stem, annotation in by_stem.items()}


def decode_run_lengths(counts: list[int] | str, size: tuple[int, int]) -> np.ndarray:
    """Decode COCO run lengths into (H, W) bool: runs of 0 and 1 in turn, beginning with 0, down the columns.

    Args:
        counts: the runs, or their compressed text (pycocotools: 5 bits a character from '0' on, the sixth says that
            the number goes on; from the fourth number on, differences to the last but one).
    Raises AnnotationError, before memory is taken, for more than MAX_PIXELS and where the runs do not add up to the
    image.
    """
    # Not pycocotools 2.0.11: of runs that are too few it fills up with uninitialised memory, and large sizes crash it.
    height, width = map(_whole, size)
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"run lengths for {height}x{width} pixels; each side must be at least 1, and at most "
                         f"{MAX_PIXELS:.3g} pixels are decoded")
    runs = _decompress(counts) if isinstance(counts, str) else list(map(_whole, counts))
    if min(runs, default=0) < 0:
        raise ValueError(f"a run length of {min(runs)}")
    if sum(runs) != height * width:
        raise ValueError(f"run lengths of {sum(runs)} pixels for {height}x{width} = {height * width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _whole(value) -> int:
    if int(value) != value:
        raise ValueError(f"{value!r} where a whole number is needed")
    return int(value)


def _decompress(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {character!r} in compressed run lengths")
        if shift > 60:
            raise ValueError("a number of more than 64 bits in compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # the sign of the last group is that of the number
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("compressed run lengths that end within a number")
    return runs


def _coco_region(name: str, segmentation, annotation: Annotation) -> Region:
    if isinstance(segmentation, dict):
        size = tuple(map(_whole, segmentation["size"]))
        if annotation.size and size != annotation.size:
            raise ValueError(f"run lengths for {size}, image of {annotation.size}")
        inside = decode_run_lengths(segmentation["counts"], size)
        annotation.size = inside.shape
        return Region(name, pixels=np.flatnonzero(inside))
    if not isinstance(segmentation[0], list):  # one outline without the list around it
        segmentation = [segmentation]
    return Region(name, [[_ring(np.asarray(outline, float).reshape(-1, 2))] for outline in segmentation])


def _ring(points) -> np.ndarray:
    """Turn (x, y) pairs, with (0, 0) at the corner of the first pixel, into (N, 2) float64 of (row, column)."""
    ring = np.array([[float(point[1]), float(point[0])] for point in points]).reshape(-1, 2) - 0.5
    if not np.isfinite(ring).all():
        raise ValueError("coordinates that are not finite")
    return ring


def _read_json(path: Path):
    try:
        with open(path, "rb") as file:
            begin = file.read(HEAD).lstrip(b"\xef\xbb\xbf \t\r\n\0")
            if begin[:1] not in (b"{", b"[", b"\xff", b"\xfe"):  # the last two begin UTF-16
                raise ValueError(f"it begins with {begin[:12]!r}" if begin else f"{HEAD} bytes of nothing")
            file.seek(0)
            return json.loads(file.read())
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}). Check its permissions") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise AnnotationError(f"{path}: no JSON that can be read ({error or 'out of memory'}). Export it "
                              f"again") from None


def _dictionaries(entries) -> bool:
    return isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
