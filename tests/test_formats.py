"""Tests of what prediction writes for QuPath, Fiji and napari.

    python -m pytest tests/test_formats.py
"""

import json
import sys

import numpy as np
import pytest
import tifffile
from scipy import ndimage

import predict_papsmear
from conftest import labelled, lively_model, noisy_image, read_rows, write_checkpoint
from images import bands as image_bands
from images.files import save_png
from images.masks import load_instances
from nuclei.formats import MEASUREMENTS
from nuclei.tracing import traced
from preparation.annotation_files import read_geojson
from preparation.annotations import Region, rasterise

ALL = "png,geojson,label-tiff,ome-tiff,imagej-rois"


def area(polygons) -> float:
    """Return the area of polygons, holes taken off, by the shoelace formula."""
    return sum(float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
               for polygon in polygons for y, x in (ring.T for ring in polygon))


# ---- tracing


def test_a_pixel_is_traced_along_its_edges():
    ((label, ((outline,),)),) = traced([labelled((3, 4), (1, 2, 2, 3))])
    assert label == 1
    assert outline.tolist() == [[1, 2], [1, 3], [2, 3], [2, 2]], "clockwise on the screen, from the first corner"


def test_parts_that_touch_at_a_corner_and_holes():
    drawn = np.array([[1, 1, 1, 0, 0],
                      [1, 0, 1, 0, 0],
                      [1, 1, 1, 0, 0],
                      [0, 0, 0, 1, 1],
                      [0, 0, 0, 1, 0]])
    ((_, polygons),) = traced([drawn])
    assert sorted(len(polygon) for polygon in polygons) == [1, 2], "the ring has a hole"
    assert area(polygons) == drawn.sum() == 11
    ring, = (polygon for polygon in polygons if len(polygon) == 2)
    assert sorted(ring[1].tolist()) == [[1, 1], [1, 2], [2, 1], [2, 2]]
    around = np.ones((3, 5), int)
    around[1, 1] = around[1, 3] = 0
    ((_, ((_, *holes),)),) = traced([around])
    assert len(holes) == 2


@pytest.mark.parametrize("seed", range(40))
def test_traced_nuclei_drawn_again_are_the_label_map(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    if seed % 2:
        found = ndimage.label(rng.random((height, width)) > rng.random(), np.ones((3, 3)))[0]
    else:
        found = ndimage.label(ndimage.gaussian_filter(rng.normal(size=(height, width)), 1.5) > 0)[0]
    bands = [band for band in np.split(found.astype(np.uint32), np.sort(rng.integers(0, height, 3))) if len(band)]
    nuclei = dict(traced(bands))
    assert set(nuclei) == set(np.unique(found)) - {0}
    for label, polygons in nuclei.items():
        assert area(polygons) == (found == label).sum()
        drawn, _ = rasterise([Region("", [[ring - 0.5 for ring in polygon] for polygon in polygons])], found.shape)
        assert np.array_equal(drawn > 0, found == label)


# ---- files


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """One image predicted into all formats, as a whole and from file to file: checkpoint, folder of both."""
    pytest.importorskip("roifile")
    place = tmp_path_factory.mktemp("formats")
    save_png(place / "a.png", noisy_image(300, 260, seed=3))
    checkpoint = str(write_checkpoint(place / "t.pth", lively_model(1), "tile"))
    command = [checkpoint, str(place / "a.png"), "--min_area", "5", "--min_probability", "0", "--pixel_size",
               "0.5", "--device", "cpu", "--precision", "float32", "--threshold", "0.52", "--format", ALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_bands, "TILE", 128)
        assert predict_papsmear.main([*command, "--out", str(place / "whole")]) == 0
        assert predict_papsmear.main([*command, "--out", str(place / "bands"), "--stream_above", "0"]) == 0
    return command, place


@pytest.mark.parametrize("how", ["whole", "bands"])
def test_what_qupath_reads_comes_back_as_the_label_map(how, predicted):
    folder = predicted[1] / how
    drawn = load_instances(predicted[1] / "whole/a_instances.png")
    content = json.loads((folder / "a_nuclei.geojson").read_text())
    rows = {row["label"]: row for row in read_rows(folder / "nuclei.csv")}
    assert len(content["features"]) == len(rows) == drawn.max() > 5
    for feature in content["features"]:
        kind = feature["properties"]
        assert (kind["objectType"], kind["classification"]["name"]) == ("detection", "Nucleus")
        row, numbers = rows[kind["name"]], kind["measurements"]
        assert numbers["Area px^2"] == int(row["area"])
        assert numbers["Area um^2"] == pytest.approx(int(row["area"]) * 0.25)
        for name, title in MEASUREMENTS.items():
            assert numbers.get(title) == (float(row[name]) if row.get(name) else None), title
        polygons = feature["geometry"]["coordinates"]
        for ring in polygons[0] if feature["geometry"]["type"] == "MultiPolygon" else polygons:
            assert ring[0] == ring[-1]
    found = read_geojson(folder / "a_nuclei.geojson")
    assert not found.notes
    names = [int(feature["properties"]["name"]) for feature in content["features"]]
    again, notes = rasterise(found.regions, drawn.shape)
    assert not notes
    assert np.array_equal(np.array([0, *names])[again], drawn)


@pytest.mark.parametrize("how", ["whole", "bands"])
def test_label_images_carry_the_pixel_size(how, predicted):
    drawn = load_instances(predicted[1] / "whole/a_instances.png")
    with tifffile.TiffFile(predicted[1] / how / "a_labels.tif") as file:
        page = file.pages[0]
        assert np.array_equal(page.asarray(), drawn)
        assert page.dtype == np.uint16
        numerator, denominator = page.tags["XResolution"].value
        assert numerator / denominator == pytest.approx(1e4 / 0.5), "pixels in a centimetre"
        assert page.tags["ResolutionUnit"].value == 3
        assert not page.is_tiled, "ImageJ opens no tiles"
        assert file.imagej_metadata == {"ImageJ": "1.53k", "unit": "um"}, "else ImageJ counts in centimetres"
    with tifffile.TiffFile(predicted[1] / how / "a_labels.ome.tif") as file:
        assert np.array_equal(file.series[0].asarray(), drawn)
        assert file.is_ome
        assert 'PhysicalSizeX="0.5"' in file.ome_metadata
        assert 'PhysicalSizeXUnit="µm"' in file.ome_metadata


@pytest.mark.parametrize("how", ["whole", "bands"])
def test_regions_of_imagej_are_the_outlines(how, predicted):
    roifile = pytest.importorskip("roifile")
    drawn = load_instances(predicted[1] / "whole/a_instances.png")
    outlines = {f"{label:06d}-{part}": polygon[0] for label, polygons in traced([drawn])
                for part, polygon in enumerate(polygons, 1)}
    regions = roifile.roiread(predicted[1] / how / "a_rois.zip")
    assert {region.name for region in regions} == set(outlines)
    for region in regions:
        assert np.array_equal(region.coordinates()[:, ::-1], outlines[region.name])


def test_only_what_was_asked_for_stays(predicted, tmp_path, capsys):
    command, _ = predicted
    out = tmp_path / "out"
    assert predict_papsmear.main([*command[:-1], "geojson", "--out", str(out), "--probability"]) == 0
    assert "look at " + str(out) + "/: NAME_nuclei.geojson, images.csv" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"a_nuclei.geojson", "nuclei.csv", "images.csv", "settings.json"}
    assert predict_papsmear.main([*command[:-1], "png,geojson", "--out", str(out), "--continue", "--probability"]) == 2
    assert "formats was ['geojson']" in capsys.readouterr().err
    assert predict_papsmear.main([*command[:-1], "geojson", "--out", str(out), "--continue", "--probability"]) == 0
    assert "1 are finished, 0 are left" in capsys.readouterr().out
    assert predict_papsmear.main([*command[:-1], "label-tiff", "--out", str(out), "--overwrite"]) == 0
    assert {p.name for p in out.iterdir()} == {"a_labels.tif", "nuclei.csv", "images.csv", "settings.json"}


def test_of_a_streamed_image_too(predicted, tmp_path):
    command, place = predicted
    out = tmp_path / "out"
    streamed = [*command[:-1], "geojson", "--out", str(out), "--stream_above", "0", "--probability"]
    assert predict_papsmear.main(streamed) == 0
    assert {p.name for p in out.iterdir()} == {"a_nuclei.geojson", "nuclei.csv", "images.csv", "settings.json"}
    features, others = (json.loads((folder / "a_nuclei.geojson").read_text())["features"]
                        for folder in (out, place / "whole"))
    by_name = {feature["properties"]["name"]: feature for feature in others}
    assert features == [by_name[feature["properties"]["name"]] for feature in features]
    assert len(features) == len(others)


def test_an_image_without_nuclei(predicted, tmp_path):
    command, _ = predicted
    out = tmp_path / "out"
    assert predict_papsmear.main([*command, "--threshold", "0.99999", "--out", str(out)]) == 0
    assert json.loads((out / "a_nuclei.geojson").read_text()) == {"type": "FeatureCollection", "features": []}
    assert tifffile.imread(out / "a_labels.tif").max() == 0


def test_wrong_formats_and_missing_packages_are_refused(predicted, tmp_path, capsys, monkeypatch):
    command, _ = predicted
    assert predict_papsmear.main([*command[:-1], "png,svg", "--out", str(tmp_path / "o")]) == 2
    assert "'svg' is not one of png, geojson, label-tiff, ome-tiff, imagej-rois" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "roifile", None)
    assert predict_papsmear.main([*command, "--out", str(tmp_path / "o")]) == 2
    assert not (tmp_path / "o").exists()
    assert "needs the package roifile, which is not installed. pip install -r" in capsys.readouterr().err
