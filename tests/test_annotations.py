"""Tests of what reads drawn annotations, and of the rasteriser, on shapes known by construction.

    python -m pytest tests/test_annotations.py
"""

import json
import re

import numpy as np
import pytest
from PIL import Image

import prepare_data
from conftest import PROJECT, imagescope, square
from images.files import ImageFileError, save_instances
from images.masks import load_instances
from preparation.annotation_files import AnnotationError, decode_run_lengths, read_coco, read_geojson, read_imagescope
from preparation.annotations import Region, rasterise
from preparation.drawn import read_label_image

SHARED = PROJECT.parent / "shared" / "data"


# ---- outlines to instance maps


def test_a_square_has_the_pixels_that_it_should():
    labels, notes = rasterise([Region("1", [[np.array(square(10, 20))[:, ::-1]]])], (64, 80))
    assert notes == []
    assert labels.sum() == 100
    assert labels[10:20, 20:30].all()
    assert labels.dtype == np.int32


@pytest.mark.parametrize("kind", ["geojson", "coco", "imagescope"])
def test_where_each_program_puts_the_origin(kind, tmp_path):
    """From (10, 10) to (20, 20): rows and columns 10..19 where the origin is a pixel's corner, 10..20 in ImageScope."""
    drawn, path = [(10, 10), (20, 10), (20, 20), (10, 20)], tmp_path / "a"
    if kind == "geojson":
        path.write_text(json.dumps({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [drawn]}}))
        regions = read_geojson(path).regions
    elif kind == "coco":
        path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [
            {"image_id": 1, "segmentation": [[c for point in drawn for c in point]]}]}))
        regions = read_coco(path)["a"].regions
    else:
        path.write_text(imagescope([drawn]))
        regions = read_imagescope(path).regions
    last = 20 if kind == "imagescope" else 19
    expected = np.zeros((30, 30), int)
    expected[10:last + 1, 10:last + 1] = 1
    assert np.array_equal(rasterise(regions, (30, 30))[0], expected)


def test_where_regions_overlap_the_earlier_wins():
    first, second = (np.array(square(*corner))[:, ::-1] for corner in ((10, 10), (15, 15)))
    labels, _ = rasterise([Region("1", [[first]]), Region("2", [[second]])], (40, 40))
    assert (labels == 1).sum() == 100
    assert (labels == 2).sum() == 100 - 25


def test_regions_without_pixels_are_named_and_get_no_label():
    outlines = [square(5, 5)[:2], square(100, 0), square(6, 6, 3), square(5, 5), square(30, 30)]
    order = [3, 0, 1, 2, 4]
    regions = [Region(str(i), [[np.array(outlines[i], float)[:, ::-1]]]) for i in order]
    labels, notes = rasterise(regions, (50, 50))
    assert labels.max() == 2
    assert labels[35, 35] == 2
    assert [note.split(":")[0] for note in notes] == [f"region {i} left out" for i in (0, 1, 2)]
    for part, note in zip(("2 vertices", "outside the image of 50x50", "under earlier regions"), notes, strict=True):
        assert part in note


def test_a_region_over_the_edge_is_cut_off():
    labels, notes = rasterise([Region("1", [[np.array(square(-5, -5))[:, ::-1]]])], (20, 20))
    assert labels.sum() == 25
    assert notes == []


def test_imagescope_is_read(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(imagescope([square(1, 2), square(3, 4)]))
    found = read_imagescope(path)
    assert found.microns_per_pixel == 0.25
    assert [tuple(found.regions[0].polygons[0][0][0]), len(found.regions)] == [(1.0, 2.0), 2]
    path.write_text(imagescope([square(1, 2)], attributes="").replace('NegativeROA="0"', 'NegativeROA="1"'))
    found = read_imagescope(path)
    assert found.microns_per_pixel is None
    assert found.regions == []
    assert "negative" in found.notes[0]


@pytest.mark.parametrize(("text", "message"), [
    ('<!DOCTYPE a [<!ENTITY b "c">]><Annotations/>', "DOCTYPE or entity declaration"),
    ('<!DOCTYPE a SYSTEM "file:///etc/hostname"><Annotations/>', "DOCTYPE or entity declaration"),
    ("<Annotations>&b;</Annotations>", "no XML that can be read"),
    ("<svg/>", "its root is <svg>"), ("nothing", "no XML that can be read"), ("", "no XML that can be read"),
    (imagescope([[("a", 1), (2, 3), (4, 5)]]), "X='a'"), (imagescope([[("nan", 1)]]), "X='nan'"),
    (imagescope([[(1, 1)]]).replace("Y=", "Z="), "Y=None"),
    ("<Annotations><Vertices>" + imagescope([])[5:], "no XML that can be read")])
def test_other_xml_is_refused(text, message, tmp_path):
    path = tmp_path / "bad.xml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_imagescope(path)
    assert "bad.xml" in str(caught.value)


def test_geojson_with_holes_multipolygons_and_cells(tmp_path):
    ring, hole = ([list(p) for p in (*c, c[0])] for c in (square(0, 0, corner=True), square(3, 3, 4, corner=True)))
    other = [list(p) for p in square(20, 20, 5, corner=True)]
    features = [{"type": "Feature", "geometry": geometry} for geometry in (
        {"type": "Polygon", "coordinates": [ring, hole]}, {"type": "MultiPolygon", "coordinates": [[ring], [other]]},
        {"type": "Point", "coordinates": [1, 2]})]
    features.append({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
                     "nucleusGeometry": {"type": "Polygon", "coordinates": [square(30, 30, 3, corner=True)]}})
    path = tmp_path / "a.geojson"
    for content in (features, {"type": "FeatureCollection", "features": features}):
        path.write_text(json.dumps(content))
        found = read_geojson(path)
        labels, notes = rasterise(found.regions, (40, 40))
        assert notes == []
        assert np.bincount(labels.ravel())[1:].tolist() == [100 - 16, 25 + 16, 9]
        assert labels[4, 4] == 2, "the hole of the first belongs to the second"
        assert found.notes == ["region 3 left out: a Point has no area",
                               "1 cells with a nucleus of their own; the nucleus is taken, not the cell"]
    for content in ({"a": 1}, 3, [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[1, 2]]}}],
                    [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[1, float("nan")]]]}}]):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="a.geojson"):
            read_geojson(path)


def test_run_lengths_plain_and_compressed():
    mask = np.zeros((5, 4), bool)
    mask[1:3, 1:3] = True
    # down the columns: 6 zeros, 2 ones, 3 zeros, 2 ones, 7 zeros
    assert (decode_run_lengths([6, 2, 3, 2, 7], (5, 4)) == mask).all()
    # from the fourth number on differences to the last but one: 6 2 3 (2-2) (7-3); each below 16 is one character
    assert (decode_run_lengths("".join(chr(48 + n) for n in (6, 2, 3, 0, 4)), (5, 4)) == mask).all()
    # 100 = 0b00011_00100: the low five bits with the mark for more, then 3; and a negative difference, -1 = 0b11111
    text = chr(48 + 4 + 32) + chr(48 + 3) + "".join(chr(48 + n) for n in (3, 5, 31))
    assert np.flatnonzero(decode_run_lengths(text, (10, 11)).T).tolist() == [100, 101, 102, 108, 109]
    assert (decode_run_lengths([6.0, 2, 3, 2, 7], (5.0, 4)) == mask).all(), "as some programs write whole numbers"


@pytest.mark.parametrize(("counts", "size", "message"), [
    ([6, 2], (5, 4), "8 pixels for 5x4 = 20"), ([6, 2, 3, 2, 70], (5, 4), "83 pixels"), ([], (5, 4), "0 pixels"),
    ("", (5, 4), "0 pixels"), ([-6, 26], (5, 4), "a run length of -6"), ([1, "a"], (5, 4), "'a'"),
    ([6.5, 2, 3, 2, 6.5], (5, 4), "6.5 where a whole number"), ([float("inf")], (5, 4), "infinity"),
    ("0~0", (5, 4), "character '~'"), ("6\x00", (5, 4), "character"), ("62304d", (5, 4), "end within a number"),
    ("o" * 100_000, (5, 4), "more than 64 bits"), ([10 ** 12], (5, 4), "1000000000000 pixels"),
    ([10 ** 12], (10 ** 6, 10 ** 6), "1000000x1000000 pixels"), ("62304", (10 ** 6, 10 ** 6), "at most 5e+08"),
    ([2 ** 32 - 1, 1], (2 ** 16, 2 ** 16), "at most 5e+08"), ([20], (-5, -4), "at least 1"),
    ([], (0, 0), "at least 1")])
def test_run_lengths_that_do_not_fit_are_one_error(counts, size, message, tmp_path):
    """As pycocotools 2.0.11 gives uninitialised memory for some of these, and a segmentation fault for others."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [
        {"id": 7, "image_id": 1, "segmentation": {"counts": counts, "size": size}}]}))
    with pytest.raises(AnnotationError, match=re.escape(message)) as caught:
        read_coco(path)
    assert str(caught.value).startswith(f"{path}: annotation 7 has a segmentation that cannot be read")


def test_coco_is_read(tmp_path):
    path = tmp_path / "instances.json"
    content = {"images": [{"id": 1, "file_name": "set/a.png", "height": 40, "width": 30}],
               "annotations": [
                   {"id": 7, "image_id": 1, "segmentation": [[c for p in square(2, 3, corner=True) for c in p]]},
                   {"id": 8, "image_id": 1, "segmentation": {"counts": [1199, 1], "size": [40, 30]}},
                   {"id": 9, "image_id": 1, "segmentation": []}]}
    path.write_text(json.dumps(content))
    found = read_coco(path)["a"]
    labels, _ = rasterise(found.regions, found.size)
    assert (labels[2:12, 3:13] == 1).all()
    assert labels[39, 29] == 2
    assert "region 9 left out" in found.notes[0]
    for change, message in ((lambda c: c["annotations"][1]["segmentation"].update(size=[30, 40]), "annotation 8"),
                            (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]), "annotation 7"),
                            (lambda c: c["annotations"][0].update(image_id=[2]), "does not list"),
                            (lambda c: c["images"].append({"id": 2, "file_name": "a.jpg"}), "stem occurs once"),
                            (lambda c: c.pop("images"), "no COCO annotation")):
        broken = json.loads(json.dumps(content))
        change(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            read_coco(path)


# ---- instance maps as files


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_instance_maps_of_every_type_are_read(dtype, tmp_path):
    labels = (np.arange(600).reshape(20, 30) % 200).astype(dtype)
    Image.fromarray(labels).save(tmp_path / "a.tif")
    assert (load_instances(tmp_path / "a.tif") == labels).all()


def test_instance_maps_keep_palette_indices_and_refuse_the_rest(tmp_path):
    indexed = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8)).convert("P")
    indexed.putpalette([v for i in range(4) for v in (255 - i, i, 7)])
    indexed.save(tmp_path / "p.png")
    assert load_instances(tmp_path / "p.png").tolist() == [[0, 1], [2, 3]]
    save_instances(tmp_path / "a.png", np.array([[0, 65535]], np.int32))
    assert load_instances(tmp_path / "a.png").tolist() == [[0, 65535]]
    many = save_instances(tmp_path / "b.png", np.array([[0, 65536]], np.int32))
    assert many.suffix == ".tif", "more nuclei than 16 bit can number"
    assert load_instances(many).tolist() == [[0, 65536]]
    plane = Image.fromarray(np.zeros((4, 4), np.uint8))
    plane.save(tmp_path / "stack.tif", save_all=True, append_images=[plane])
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "half.tif")
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "nan.tif")
    Image.fromarray(np.full((2, 2), -1, np.int32)).save(tmp_path / "negative.tif")
    for name, message in (("stack.tif", "stack of 2"), ("colour.png", "one channel"), ("half.tif", "e.g. 0.5"),
                          ("nan.tif", "not whole"), ("negative.tif", "-1..-1")):
        with pytest.raises(ImageFileError, match=message):
            load_instances(tmp_path / name)


def test_categories_of_coco_are_named(tmp_path):
    entry = {"image_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9]]}
    content = {"images": [{"id": 1, "file_name": "a.png"}],
               "categories": [{"id": 5, "name": "nucleus"}, {"id": 7, "name": "artefact"}],
               "annotations": [{**entry, "category_id": 5}, {**entry, "category_id": 6}, {**entry, "category_id": 7},
                               {**entry, "category_id": 5, "iscrowd": 1}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = read_coco(tmp_path / "a.json")["a"]
    assert [region.kind for region in found.regions] == ["nucleus", "6"]
    assert found.notes == ["taken as nuclei: 1 of class 6, 1 of class nucleus; left out: 1 crowd (iscrowd), 1 of class "
                           "artefact"]
    chosen = read_coco(tmp_path / "a.json", ["artefact"])["a"]
    assert [region.kind for region in chosen.regions] == ["artefact"], "what was asked for by name"


def geojson_of(*objects) -> list[dict]:
    """Return features: (class, object type) and, for a cell, whether it has a nucleus."""
    ring = [list(point) for point in square(5, 5, corner=True)]
    polygon = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
    return [{"type": "Feature", "geometry": polygon, "nucleusGeometry": polygon if nucleus else None,
             "properties": {"objectType": kind} | ({"classification": {"name": name}} if name else {})}
            for name, kind, nucleus in objects]


def test_of_what_qupath_exports_the_nuclei_are_taken(tmp_path):
    (tmp_path / "a.geojson").write_text(json.dumps(geojson_of(
        ("Tumor", "annotation", False), ("", "detection", False), ("Ignore*", "annotation", False),
        ("Region*", "annotation", False), ("", "tile", False), ("Tumor", "cell", False), ("Tumor", "cell", True),
        ("Ambiguous", "annotation", False), ("", "tma_core", False))))
    found = read_geojson(tmp_path / "a.geojson")
    assert [region.name for region in found.regions] == ["1", "2", "7"]
    assert found.notes[-1] == (
        "taken as nuclei: 2 of class Tumor, 1 without a class; left out: 1 cell without a nucleus, 1 core of a tissue "
        "array, 1 of class Ambiguous, 1 of class Ignore*, 1 of class Region*, 1 tile")
    chosen = read_geojson(tmp_path / "a.geojson", ["Tumor", "Ambiguous"])
    assert [region.name for region in chosen.regions] == ["1", "7", "8"]


def test_a_class_that_is_nowhere_drawn_is_refused(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "drawn").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / f"images/a{i}.png")
        (tmp_path / f"drawn/a{i}.geojson").write_text(json.dumps(geojson_of(("Tumor", "annotation", False))))
    command = ["drawn", "--format", "geojson", "--images", str(tmp_path / "images"), "--annotations",
               str(tmp_path / "drawn"), "--out", str(tmp_path / "out"), "--classes"]
    assert prepare_data.main([*command, "Tumour"]) == 2
    assert "--classes Tumour: no region of that class or layer is in " in (said := capsys.readouterr().err)
    assert said.rstrip().endswith("There is: Tumor")
    assert not (tmp_path / "out").exists()
    assert prepare_data.main([*command, "Tumor"]) == 0
    assert prepare_data.main([*command[:1], "--format", "label-tiff", *command[3:], "Tumor"]) == 2


def test_shapes_and_layers_of_imagescope(tmp_path):
    corners = '<Vertex X="10" Y="10"/><Vertex X="40" Y="30"/>'
    regions = "".join(f'<Region Id="{i}" Type="{kind}"><Attributes><Attribute Name="of a region"/></Attributes>'
                      f'<Vertices>{corners}</Vertices></Region>' for i, kind in enumerate((2, 1, 3, 0), 1))
    layers = (f'<Annotation Id="1"><Attributes><Attribute Name="Epithelial" Id="0" Value=""/></Attributes><Regions>'
              f'{regions}</Regions></Annotation><Annotation Id="2" Name="Ambiguous"><Regions>{regions}</Regions>'
              f'</Annotation><Annotation Id="3"><Attributes><Attribute Name="Description" Id="0" Value="Immune"/>'
              f'</Attributes><Regions>{regions}</Regions></Annotation>')
    (tmp_path / "a.xml").write_text(f"<Annotations>{layers}</Annotations>")
    found = read_imagescope(tmp_path / "a.xml")
    assert found.notes == ["taken as nuclei: 3 of class Epithelial, 3 of class Immune; left out: 3 arrow, ruler or "
                           "pin, 3 of class Ambiguous"]
    round_one, box, line = found.regions[:3]
    drawn = rasterise([round_one], (60, 60))[0]
    rows, columns = np.indices((60, 60))
    distance = ((columns - 25) / 15) ** 2 + ((rows - 20) / 10) ** 2
    assert drawn[distance < 0.999].all()
    assert not drawn[distance > 1.001].any(), "471 pixels, as far as those on the line count"
    assert rasterise([box], (60, 60))[0].sum() == 31 * 21
    assert "2 vertices" in rasterise([line], (60, 60))[1][0]


def test_a_jpeg_among_label_images_is_a_mask(tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[5:25, 5:25] = mask[35:60, 30:50] = 255
    Image.fromarray(mask).save(tmp_path / "a.jpg", quality=50)
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    labels, notes = read_label_image(tmp_path / "a.jpg", tmp_path / "image.png")
    assert labels.max() == 2, "not a nucleus for each grey level"
    assert "a mask, not labels: each connected piece" in notes[0]


@pytest.mark.parametrize("text", ['<?xml version="1.0" encoding="foo"?><Annotations/>',
                                  '<?xml version="1.0" encoding="gb2312"?><Annotations/>'])
def test_xml_in_an_unknown_encoding_is_named(text, tmp_path):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.xml: no XML that can be read .*Export it again"):
        read_imagescope(tmp_path / "a.xml")


@pytest.mark.parametrize(("scale", "known", "notes"), [("0.25", 0.25, 0), ("0", None, 0), ("0,25", None, 1),
                                                       ("", None, 1)])
def test_a_scale_that_is_no_number_is_unknown(scale, known, notes, tmp_path):
    (tmp_path / "a.xml").write_text(f'<Annotations MicronsPerPixel="{scale}"/>')
    found = read_imagescope(tmp_path / "a.xml")
    assert (found.microns_per_pixel, len(found.notes)) == (known, notes)


def test_coordinates_of_any_size_are_cut_off(tmp_path):
    far = Region("1", [[np.array([(-1e19, -1e19), (-1e19, 1e19), (1e19, 1e19), (1e19, -1e19)])]])
    assert (rasterise([far], (8, 8))[0] == 1).all()
    for coordinates in ([[{"x": 1}]], [[[10 ** 400, 1], [2, 2], [3, 1]]]):
        (tmp_path / "a.geojson").write_text(json.dumps({"type": "Feature", "geometry": {
            "type": "Polygon", "coordinates": coordinates}}))
        with pytest.raises(ValueError, match="no lists of finite"):
            read_geojson(tmp_path / "a.geojson")


@pytest.mark.skipif(not SHARED.exists(), reason="the real images (../shared/data) are not on this machine")
def test_real_monuseg_regions_have_the_pixels_of_the_rasteriser():
    path = next(iter(sorted(SHARED.glob("monuseg/MoNuSegTestData/*.xml"))))
    annotation = read_imagescope(path)
    labels, notes = rasterise(annotation.regions, (1000, 1000))
    assert len(annotation.regions) - len(notes) == labels.max() > 100
    assert 0.05 < (labels > 0).mean() < 0.6
