"""Write nuclei for other programs: GeoJSON for QuPath, label images for Fiji and napari, regions for Fiji.

In GeoJSON (0, 0) is the corner of the image and the centre of its first pixel lies at (0.5, 0.5), as in QuPath; the
outlines run along the edges of pixels, so an area is the number of pixels.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from images.bands import write_tiff
from nuclei.measurement import rounded_measures
from nuclei.outlines import OUTLINE
from nuclei.tracing import Polygon, traced
from system.errors import UserError

CLASS_NAME = "Nucleus"
MEASUREMENTS = {
    "area": "Area px^2", "eccentricity": "Eccentricity", "mean_probability": "Mean probability",
    "perimeter": "Perimeter px", "circularity": "Circularity", "solidity": "Solidity", "major_axis": "Major axis px",
    "minor_axis": "Minor axis px", "cut_by_border": "Cut by border", "mean_red": "Mean red", "mean_green": "Mean green",
    "mean_blue": "Mean blue", "cytoplasm_area": "Cytoplasm area px^2",
    "nucleus_to_cytoplasm": "Nucleus/cytoplasm ratio", "area_um2": "Area um^2", "perimeter_um": "Perimeter um",
    "major_axis_um": "Major axis um", "minor_axis_um": "Minor axis um"}


def check_packages(formats: Iterable[str]) -> None:
    """Raise UserError where a format needs a package that is not installed."""
    if "imagej-rois" in formats:
        try:
            import roifile  # noqa: F401
        except ImportError:
            raise UserError("--format imagej-rois needs the package roifile, which is not installed. pip install -r "
                            "requirements-export.txt") from None


def write_formats(result, formats: tuple[str, ...], size: tuple[int, int], measures: dict[str, np.ndarray],
                  pixel_size: float | None) -> None:
    """Write the nuclei of an image in all formats but png, and drop the label image where png is not one of them.

    Args:
        result: a `nuclei.results.ImageResults` that has its labels.
        formats: names out of those of `predict_papsmear.py --format`.
        size: height and width.
        measures: of the nuclei (see `nuclei.measurement.measure_nuclei`).
        pixel_size: micrometres, if they are known.
    """
    if "geojson" in formats:
        with open(result.file("nuclei", ".geojson"), "w", encoding="utf-8") as file:
            file.writelines(geojson(traced(result.labels()), measures, pixel_size))
    dtype = np.uint32 if len(measures["label"]) > 65535 else np.uint16
    for name, suffix in (("label-tiff", ".tif"), ("ome-tiff", ".ome.tif")):
        if name in formats:
            write_tiff(result.file("labels", suffix), (band.astype(dtype) for band in result.labels()), *size,
                       dtype, pixel_size or 0.0, ome=name == "ome-tiff", imagej=name == "label-tiff")
    if "imagej-rois" in formats:
        write_rois(result.file("rois", ".zip"), traced(result.labels()))
    if "png" not in formats:
        result.drop("instances", ".tif")  # of a streamed image; of others there is none


def geojson(nuclei: Iterable[tuple[int, list[Polygon]]], measures: dict[str, np.ndarray],
            pixel_size: float | None) -> Iterator[str]:
    """Yield the text of a FeatureCollection, a feature a nucleus, as QuPath reads it; figures as in nuclei.csv."""
    rows = {row["label"]: row for row in rounded_measures(measures, pixel_size)}
    yield '{"type": "FeatureCollection", "features": ['
    for i, (label, polygons) in enumerate(nuclei):
        row = rows[label]
        numbers = {title: row[name] for name, title in MEASUREMENTS.items() if row.get(name) is not None}
        parts = [[*map(_closed, polygon)] for polygon in polygons]
        feature = {
            "type": "Feature",
            "geometry": {"type": "MultiPolygon", "coordinates": parts} if len(parts) > 1 else
            {"type": "Polygon", "coordinates": parts[0]},
            "properties": {"objectType": "detection", "name": str(label),
                           "classification": {"name": CLASS_NAME, "color": list(OUTLINE)}, "measurements": numbers}}
        yield ("," if i else "") + "\n" + json.dumps(feature)
    yield "\n]}\n"


def _closed(ring: np.ndarray) -> list[list[int]]:
    """Return a ring as (x, y) with the first corner once more at the end, as GeoJSON wants it."""
    return np.vstack([ring, ring[:1]])[:, ::-1].tolist()


def write_rois(path: Path, nuclei: Iterable[tuple[int, list[Polygon]]]) -> None:
    """Write the outlines as regions of ImageJ, one a nucleus, or one a part that touches at a corner; without holes."""
    import roifile

    regions = [roifile.ImagejRoi.frompoints(polygon[0][:, ::-1].astype(np.float32), name=f"{label:06d}-{part}")
               for label, polygons in nuclei for part, polygon in enumerate(polygons, 1)]
    roifile.roiwrite(path, regions, mode="w")
