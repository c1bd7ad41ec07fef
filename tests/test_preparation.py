"""Tests of the way from a download, or from drawn annotations, to a data set, on shapes known by construction.

    python -m pytest tests/test_preparation.py
"""

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import PROJECT, run_script
from images.files import ImageFileError, load_image, load_instances, load_mask, save_instances, save_png
from images.pyramid import open_pyramids
from images.report import check_dataset
from images.splits import deal_groups, group_names, leaked, list_splits
from preparation.annotations import Region, decode_run_lengths, rasterise, read_coco, read_geojson, read_imagescope
from preparation.data_sets import COLUMNS, cut_tile, tile_offsets
from preparation.drawn import import_drawn
from preparation.drawn import main as import_main
from preparation.herlev import CLASSES, field_of
from preparation.herlev import main as herlev_main
from preparation.herlev import prepare as prepare_herlev
from preparation.monuseg import main as monuseg_main
from preparation.monuseg import prepare as prepare_monuseg

SHARED = PROJECT.parent / "shared" / "data"


def square(top: float, left: float, side: int = 10, corner: bool = False) -> list[tuple[float, float]]:
    """Return (x, y) of a square of side x side pixels; (0, 0) is the centre of the first pixel, or its corner."""
    bottom, right = top + side - 1 + corner, left + side - 1 + corner
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def imagescope(regions, attributes='MicronsPerPixel="0.25"') -> str:
    drawn = "".join(
        f'<Region Id="{i}" NegativeROA="0"><Vertices>'
        + "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in outline) + "</Vertices></Region>"
        for i, outline in enumerate(regions, 1))
    return f'<Annotations {attributes}><Annotation Id="1"><Regions>{drawn}</Regions></Annotation></Annotations>'


def save_tiff(path: Path, shape=(300, 280), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(90, 250, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compression="tiff_lzw")
    return path


def write_monuseg(root: Path, train: int = 5, test: int = 2) -> tuple[Path, Path]:
    """Write both official layouts, with spaces in the names; two images of one patient in train."""
    train_dir, test_dir = root / "MoNuSeg 2018 Training Data", root / "Test"
    for folder in (train_dir / "Tissue Images", train_dir / "Annotations", test_dir):
        folder.mkdir(parents=True)
    for i in range(train):
        name = f"TCGA-AA-{i // 2:04d}-0{i}Z"
        save_tiff(train_dir / "Tissue Images" / f"{name}.tif", seed=i)
        (train_dir / "Annotations" / f"{name}.xml").write_text(imagescope([square(10, 20), square(250, 250)]))
    for i in range(test):
        save_tiff(test_dir / f"TCGA-BB-{i:04d}-01Z.tif", seed=50 + i)
        (test_dir / f"TCGA-BB-{i:04d}-01Z.xml").write_text(imagescope([square(100, 100)]))
    return train_dir, test_dir


def write_herlev(root: Path, cells: int = 8) -> Path:
    """Write class folders of 60x48 cells, two in each field: cytoplasm columns 8..39, in it a nucleus of 10x12."""
    for kind, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(cells):
            parts = np.zeros((60, 48, 3), np.uint8)
            parts[:] = (255, 0, 0)
            parts[:, 8:40] = (0, 0, 128)
            parts[20:30, 14:26] = (0, 0, 255)
            parts[0, 0], parts[0, 1] = (128, 128, 128), (0, 0, 0)
            stem = root / name / f"{1000 + 10 * kind + i // 2}-{i}-001"
            image = np.random.default_rng([kind, i]).integers(0, 255, (60, 48, 3), dtype=np.uint8)
            Image.fromarray(image).save(f"{stem}.BMP")
            Image.fromarray(parts).quantize(8).save(f"{stem}-d.bmp")
    return root


def write_images(folder: Path, names="abcd", shape=(64, 80)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        save_png(folder / f"{name}.png", np.random.default_rng(i).integers(0, 255, (*shape, 3), dtype=np.uint8))
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def manifest(root: Path) -> list[dict]:
    with open(root / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def refused(main, arguments, capsys) -> str:
    """Return the message of a command that must end with exit code 2, and leave no traceback."""
    assert main([str(a) for a in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


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
    for wrong in ([6, 2], [-6, 26], "0~0", [1, "a"]):
        with pytest.raises(ValueError, match=r"."):
            decode_run_lengths(wrong, (5, 4))


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


# ---- tiles and groups


@pytest.mark.parametrize(("length", "overlap", "offsets"), [
    (256, 0, [0]), (1000, 0, [0, 256, 512, 744]), (512, 0, [0, 256]), (257, 0, [0, 1]), (100, 0, [0]),
    (512, 64, [0, 192, 256])])
def test_tiles_cover_everything(length, overlap, offsets):
    assert tile_offsets(length, overlap) == offsets


def test_a_small_tile_is_padded_with_its_nuclei_and_labels_count_from_one():
    image = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    labels = np.zeros((5, 4), np.int32)
    labels[1, 1], labels[3, 3] = 9, 4
    padded, mask, numbered = cut_tile(image, labels)
    assert padded.shape == (256, 256, 3)
    assert (padded[5] == padded[3]).all(), "reflection leaves out the edge itself"
    mirrored = np.pad(labels, [(0, 251), (0, 252)], mode="reflect") > 0  # taught as what it looks like
    assert (mask == mirrored).all()
    assert ((numbered > 0) == mirrored).all()
    assert len(np.unique(numbered)) == numbered.max() + 1
    assert numbered[1, 1] != numbered[1, 5], "what stands in the mirror is another nucleus"
    labels = np.zeros((256, 256), np.int32)
    labels[1, 1], labels[3, 3] = 9, 4
    numbered = cut_tile(np.zeros((256, 256, 3), np.uint8), labels)[2]
    assert (numbered[1, 1], numbered[3, 3], numbered.max()) == (2, 1, 2)


def test_groups_are_dealt_by_class_and_no_part_is_empty():
    contents = {f"{c}{i}": [2 * (c == 0), 2 * (c == 1)] for c in (0, 1) for i in range(20)}
    dealt = deal_groups(contents, (0.7, 0.15, 0.15), 0)
    counts = np.array([np.sum([contents[g] for g in contents if dealt[g] == part], axis=0) for part in range(3)])
    assert counts.tolist() == [[28, 28], [6, 6], [6, 6]]
    assert dealt != deal_groups(contents, (0.7, 0.15, 0.15), 1)
    assert sorted(deal_groups({"a": 90, "b": 1, "c": 1}, (0.7, 0.15, 0.15), 0).values()) == [0, 1, 2]
    with pytest.raises(ValueError, match="2 group"):
        deal_groups({"a": 1, "b": 1}, (0.7, 0.15, 0.15), 0)


# ---- MoNuSeg


def test_monuseg_round_trip(tmp_path):
    train_dir, test_dir = write_monuseg(tmp_path / "raw")
    before, out = digests(tmp_path / "raw"), tmp_path / "data"
    prepare_monuseg(train_dir, test_dir, out)
    assert digests(tmp_path / "raw") == before
    assert json.loads((out / "dataset.json").read_text()) == {
        "format": 1, "sizing": "tile", "source": "MoNuSeg 2018", "microns_per_pixel": 0.25}
    rows = manifest(out)
    assert tuple(rows[0]) == COLUMNS
    for row in rows:
        folder = out / row["split"]
        image = load_image(folder / "images" / f"{row['tile']}.png", 3)
        labels = load_instances(folder / "instances" / f"{row['tile']}.png")
        raw = load_image((test_dir if "BB" in row["source"] else train_dir) / row["source"], 3)
        top, left = int(row["row"]), int(row["column"])
        assert (image == raw[top:top + image.shape[0], left:left + image.shape[1]]).all()
        assert (load_mask(folder / "masks" / f"{row['tile']}.png")[..., 0] == (labels > 0)).all()
        assert labels.max() == int(row["nuclei"])
    whole = [row for row in rows if row["split"] == "whole/test"]
    assert [(r["height"], r["width"], r["nuclei"]) for r in whole] == [("300", "280", "1")] * 2
    assert sum(row["split"] == "test" for row in rows) == 2 * 4
    assert not (out / "whole/train").exists()
    assert {row["group"] for row in rows if row["split"] == "train"}.isdisjoint(
        row["group"] for row in rows if "valid" in row["split"])
    splits = list_splits(out)
    assert leaked(splits, "valid", r"^TCGA-\w+-\w+")[0] == 0
    check_dataset(out, r"^TCGA-\w+-\w+", in_channels=3)
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size[0] > 1000


def test_a_border_nucleus_is_in_every_tile_that_it_touches(tmp_path):
    train_dir, test_dir = write_monuseg(tmp_path / "raw")
    prepare_monuseg(train_dir, test_dir, tmp_path / "data")
    rows = {(r["row"], r["column"]): r for r in manifest(tmp_path / "data") if r["split"] == "train"}
    assert set(rows) == {("0", "0"), ("0", "24"), ("44", "0"), ("44", "24")}  # 300x280 pixels
    labels = load_instances(tmp_path / "data/train/instances" / f"{rows['44', '24']['tile']}.png")
    assert labels.sum() == 100, "rows 250..259 lie in the last tile as a whole"
    assert labels[206:216, 226:236].all()
    assert [rows[key]["nuclei"] for key in sorted(rows)] == ["2", "2", "1", "1"]


@pytest.mark.parametrize("which", ["monuseg", "herlev"])
def test_the_same_input_gives_the_same_bytes(which, tmp_path):
    source = write_monuseg(tmp_path / "raw") if which == "monuseg" else (write_herlev(tmp_path / "raw"),)
    prepare = prepare_monuseg if which == "monuseg" else prepare_herlev
    for name in "ab":
        prepare(*source, tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "raw"], "no temporary folder stays"


def test_monuseg_names_what_is_odd(tmp_path, capsys):
    train_dir, test_dir = write_monuseg(tmp_path / "raw")
    names = sorted(p.stem for p in (train_dir / "Annotations").iterdir())
    (train_dir / "Annotations" / f"{names[0]}.xml").unlink()
    (train_dir / "Annotations" / f"{names[1]}.xml").write_text(imagescope([]))
    (train_dir / "Annotations" / f"{names[2]}.xml").write_text(
        imagescope([square(0, 0), square(5, 5)[:2], square(900, 900)], attributes=""))
    (train_dir / "Annotations" / "stray.xml").write_text(imagescope([]))
    save_tiff(test_dir / "TCGA-AA-0002-09Z.tif", (100, 300))
    (test_dir / "TCGA-AA-0002-09Z.xml").write_text(imagescope([square(0, 0)]))
    nested = tmp_path / "nested"
    nested.mkdir()
    shutil.move(train_dir, nested)
    assert monuseg_main(["--train_dir", str(nested), "--test_dir", str(test_dir), "--out", str(tmp_path / "d")]) == 0
    said = capsys.readouterr().out
    for part in (f"{names[0]}.xml is missing", f"{names[1]}.tif: no nucleus is drawn", "region 2 left out: 2 vertices",
                 "region 3 left out: rows 900..909", "stray.xml: left out, as its image is missing",
                 "100x300 pixels; tiles have 256", "TCGA-AA-0002: this patient is in training and in test"):
        assert part in said
    assert said.startswith((tmp_path / "d/report.md").read_text())
    padded = [row for row in manifest(tmp_path / "d") if row["split"] == "test" and "09Z" in row["tile"]]
    assert {(row["height"], row["width"]) for row in padded} == {("100", "256")}
    mask = load_mask(tmp_path / "d/test/masks" / f"{padded[0]['tile']}.png")
    assert (mask[100:199] == mask[98::-1]).all()
    assert mask[100:].any()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_monuseg_refuses_with_every_fault_at_once(tmp_path, capsys):
    train_dir, test_dir = write_monuseg(tmp_path / "raw")
    command = ["--train_dir", train_dir, "--test_dir", test_dir, "--out", tmp_path / "d"]
    drawn = sorted((train_dir / "Annotations").iterdir())
    good = [path.read_text() for path in drawn]
    drawn[0].write_text("<!DOCTYPE a><Annotations/>")
    drawn[1].write_text("<svg/>")
    message = refused(monuseg_main, command, capsys)
    assert all(part in message for part in ("2 problems", drawn[0].name, drawn[1].name, "DOCTYPE", "<svg>"))
    assert not (tmp_path / "d").exists()
    for path, text in zip(drawn, good, strict=True):
        path.write_text(text)
    image = next((train_dir / "Tissue Images").iterdir())
    whole = image.read_bytes()
    image.write_bytes(whole[:3000])
    assert image.name in refused(monuseg_main, command, capsys)
    image.write_bytes(whole)
    for extra, part in ((["--overlap", 256], "--overlap: '256'"), (["--valid_share", 1], "--valid_share: '1'"),
                        (["--seed", -1], "--seed: '-1'"),
                        (["--test_dir", train_dir], "test image must not be trained on"),
                        (["--test_dir", tmp_path / "no"], "no such folder"),
                        (["--test_dir", tmp_path / "raw"], "several of them data sets"),
                        (["--test_dir", train_dir / "Tissue Images"], "'Tissue Images' with 'Annotations'"),
                        (["--out", test_dir / "d"], "never written to"),
                        (["--out", test_dir], "nothing is overwritten")):
        assert part in refused(monuseg_main, [*command, *extra], capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


# ---- Herlev


def test_herlev_round_trip(tmp_path):
    src = write_herlev(tmp_path / "raw")
    before = digests(src)
    prepare_herlev(src, tmp_path / "data", folds=4)
    assert digests(src) == before
    out = tmp_path / "data"
    splits = list_splits(out)
    assert sum(map(len, splits.values())) == 56
    assert leaked(splits, "valid", r"^\d+")[0] == leaked(splits, "test", r"^\d+")[0] == 0
    pair = splits["train"][0]
    assert load_mask(pair.mask).sum() == 120
    kind = next(row["source"] for row in manifest(out) if row["tile"] == pair.name)
    assert (load_image(pair.image, 3) == load_image(src / kind, 3)).all()
    check_dataset(out, r"^\d+", in_channels=3)
    assert json.loads((out / "dataset.json").read_text())["sizing"] == "resize"
    assert not (out / "whole").exists()
    tested = []
    for fold in range(1, 5):
        shutil.copy(out / f"fold_{fold}.csv", out / "splits.csv")
        splits = list_splits(out)
        assert sum(map(len, splits.values())) == 56
        assert leaked(splits, "test", r"^\d+")[0] == 0
        test = {p.name for p in splits["test"]}
        assert {int(field_of(name)) // 10 for name in test} == set(range(100, 107)), "every class is in every fold"
        tested += test
    assert len(tested) == len(set(tested)) == 56


@pytest.mark.parametrize(("target", "pixels"), [("nucleus", [120]), ("cytoplasm", [60 * 32 - 120]),
                                                ("both", [120, 60 * 32 - 120])])
def test_herlev_targets(target, pixels, tmp_path):
    prepare_herlev(write_herlev(tmp_path / "raw"), tmp_path / "data", target=target)
    mask = load_mask(list_splits(tmp_path / "data")["test"][0].mask, classes=len(pixels))
    assert mask.sum(axis=(0, 1)).tolist() == pixels
    pyramids = open_pyramids(tmp_path / "data", in_channels=3, out_channels=len(pixels))
    assert pyramids["train"].foreground.shape[1] == len(pixels)


def test_herlev_refuses_and_names(tmp_path, capsys):
    src = write_herlev(tmp_path / "raw")
    masks = sorted(src.rglob("*-d.bmp"))
    command = ["--src", src, "--out", tmp_path / "d"]
    kept = [path.read_bytes() for path in masks[:3]]
    for path, colour in zip(masks[:2], ((1, 2, 3), (9, 9, 9)), strict=True):
        Image.new("RGB", (48, 60), colour).save(path)
    Image.new("RGB", (10, 20), (255, 0, 0)).save(masks[2])
    message = refused(herlev_main, command, capsys)
    assert all(part in message for part in ("3 problems", "(1, 2, 3) on 2880 pixels", "(9, 9, 9)", "20x10"))
    assert "--folds is 2" in refused(herlev_main, [*command, "--folds", 2], capsys)
    assert "no class folder" in refused(herlev_main, ["--src", src / CLASSES[0], "--out", tmp_path / "d"], capsys)
    assert not (tmp_path / "d").exists()
    for path, content in zip(masks, kept, strict=False):
        path.write_bytes(content)
    masks[0].unlink()
    shutil.rmtree(src / CLASSES[1])
    assert herlev_main([str(a) for a in command]) == 0
    said = capsys.readouterr().out
    assert f"{CLASSES[1]}: no such class folder" in said
    assert f"its mask {masks[0].stem}.bmp is missing" in said


# ---- own annotations


def write_own(root: Path, kind: str) -> tuple[Path, Path]:
    """Write four images and two squares on each in the given format."""
    images, drawn = write_images(root / "images"), root / "drawn"
    drawn.mkdir()
    coco = {"images": [], "annotations": []}
    for i, name in enumerate("abcd"):
        squares = [square(5, 6, corner=True), square(40, 60, corner=True)]
        coco["images"].append({"id": i, "file_name": f"{name}.png", "height": 64, "width": 80})
        coco["annotations"] += [{"id": 2 * i + k, "image_id": i, "segmentation": [[c for p in s for c in p]]}
                                for k, s in enumerate(squares)]
        if kind == "geojson":
            (drawn / f"{name}.geojson").write_text(json.dumps([
                {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[list(p) for p in s]]}}
                for s in squares]))
        elif kind == "label-tiff":
            labels = np.zeros((64, 80), np.uint16)
            labels[5:15, 6:16], labels[40:50, 60:70] = 300, 700
            Image.fromarray(labels).save(drawn / f"{name}_cp_masks.tif")
    if kind == "coco":
        drawn = drawn / "instances_default.json"
        drawn.write_text(json.dumps(coco))
    return images, drawn


@pytest.mark.parametrize("sizing", ["tile", "resize"])
@pytest.mark.parametrize("kind", ["geojson", "label-tiff", "coco"])
def test_own_annotations_round_trip(kind, sizing, tmp_path):
    images, drawn = write_own(tmp_path, kind)
    report = import_drawn(kind, images, drawn, tmp_path / "data", sizing=sizing, microns_per_pixel=0.5)
    assert json.loads((tmp_path / "data/dataset.json").read_text())["microns_per_pixel"] == 0.5
    splits = list_splits(tmp_path / "data")
    check_dataset(tmp_path / "data", in_channels=3)
    assert (tmp_path / "data/whole/test").exists() == (sizing == "tile")
    for split, pairs in splits.items():
        for pair in pairs:
            labels = load_instances(tmp_path / "data" / split / "instances" / f"{pair.name}.png")
            assert labels.shape == ((256, 256) if sizing == "tile" else (64, 80))
            own = labels[:64, :80]
            assert np.bincount(own[own > 0]).max() == np.count_nonzero(own) / 2 == 100
            assert (labels[5:15, 6:16] == 1).all()
    assert ("padded by reflection" in report) == (sizing == "tile")
    import_drawn(kind, images, drawn, tmp_path / "again", sizing=sizing, microns_per_pixel=0.5)
    assert digests(tmp_path / "again") == digests(tmp_path / "data")


def test_own_annotations_by_group_and_what_does_not_fit(tmp_path, capsys):
    images, drawn = write_own(tmp_path, "label-tiff")
    write_images(images, ["d_2", "lonely"])
    mask = np.zeros((64, 80), np.uint8)
    mask[2:4, 2:4] = mask[9:12, 9:12] = 255
    save_png(drawn / "d_2.png", mask)
    save_png(drawn / "unknown.png", mask)
    command = ["--format", "label-tiff", "--images", images, "--annotations", drawn, "--out", tmp_path / "d",
               "--group_regex", "^[^_]+"]
    assert import_main([str(a) for a in command]) == 0
    said = capsys.readouterr().out
    assert "lonely.png: left out, as nothing is drawn for it" in said
    assert "unknown: something is drawn for it, but the image is missing" in said
    assert "each of its 2 pieces" in said
    of = {row["source"]: row["split"].removeprefix("whole/") for row in manifest(tmp_path / "d")}
    assert of["d.png"] == of["d_2.png"]
    command = [*command, "--out", tmp_path / "e"]
    assert "finds nothing" in refused(import_main, [*command, "--group_regex", "^x"], capsys)
    assert "no regular expression" in refused(import_main, [*command, "--group_regex", "("], capsys)
    save_png(drawn / "lonely.png", mask[:10])
    Image.new("RGB", (80, 64)).save(drawn / "d_2.png")
    message = refused(import_main, command, capsys)
    assert all(part in message for part in ("2 problems", "10x80", "one channel"))
    assert "annotations" in refused(import_main, [*command, "--annotations", tmp_path / "no"], capsys)
    assert "Stems must be the same" in refused(import_main, [*command, "--annotations", tmp_path / "d/train"], capsys)


def test_a_coco_file_for_images_of_another_size_is_refused(tmp_path, capsys):
    images, drawn = write_own(tmp_path, "coco")
    write_images(images, "b", (32, 40))
    command = ["--format", "coco", "--images", images, "--annotations", drawn.parent, "--out", tmp_path / "d"]
    assert "32x40 pixels, but it was annotated at 64x80" in refused(import_main, command, capsys)


def test_labels_beside_their_images(tmp_path):
    images, drawn = write_own(tmp_path, "label-tiff")
    for path in drawn.iterdir():
        shutil.move(path, images)
    import_drawn("label-tiff", images, images, tmp_path / "data")
    assert {row["source"] for row in manifest(tmp_path / "data")} == {f"{name}.png" for name in "abcd"}


def import_labels(images: Path, drawn: Path, out: Path, capsys, *options) -> tuple[str, list[dict]]:
    """Import label images by the command; return what it said and the manifest."""
    assert import_main(["--format", "label-tiff", "--images", str(images), "--annotations", str(drawn), "--out",
                        str(out), "--sizing", "resize", *options]) == 0
    return capsys.readouterr().out, manifest(out)


def test_a_mask_of_ones_is_parted_like_one_of_255(tmp_path, capsys):
    images, drawn = write_own(tmp_path, "label-tiff")
    mask = np.zeros((64, 80), np.uint8)
    mask[2:4, 2:4] = mask[9:12, 9:12] = 1
    Image.fromarray(mask).save(drawn / "a_cp_masks.tif")
    Image.fromarray(mask > 0).save(drawn / "b_cp_masks.tif")
    said, rows = import_labels(images, drawn, tmp_path / "d", capsys)
    assert {row["nuclei"] for row in rows} == {"2"}
    assert said.count("each of its 2 pieces") == 2


def test_predictions_can_be_imported_again(tmp_path, capsys):
    """Of what predict_papsmear.py writes, the instances are taken, in which nuclei that touch are apart."""
    images, drawn = write_own(tmp_path, "label-tiff")
    labels = np.zeros((64, 80), np.uint16)
    labels[5:15, 6:16], labels[5:15, 16:26] = 1, 2
    for path in list(drawn.iterdir()):
        path.unlink()
        for kind, array in (("instances", labels), ("mask", labels > 0), ("overlay", np.zeros((64, 80, 3), np.uint8))):
            save_png(drawn / f"{path.name[0]}_{kind}.png", array)
    said, rows = import_labels(images, drawn, tmp_path / "d", capsys)
    assert {row["nuclei"] for row in rows} == {"2"}
    assert "To know" not in said


def test_copies_stay_with_their_originals(tmp_path, capsys):
    names = [*"abcdefgh", *(f"flipped_{name}" for name in "abcdefgh"), "rotated_90_lonely"]
    images = write_images(tmp_path / "images", names)
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for name in names:
        save_png(drawn / f"{name}.png", np.eye(64, 80, dtype=bool))
    said, rows = import_labels(images, drawn, tmp_path / "d", capsys)
    split_of = {row["tile"]: row["split"] for row in rows}
    assert {split_of[name] for name in split_of if "_" in name} == {"train"}
    assert all(split_of[name.removeprefix("flipped_")] == "train" for name in split_of if "flipped_" in name)
    assert split_of["rotated_90_lonely"] == "train"
    assert said.count("copy of an image that is not trained on") == 8 - sum("flipped_" in name for name in split_of) > 0


def test_names_that_are_formulas_are_drawn_as_they_stand(tmp_path):
    images, drawn = write_own(tmp_path, "label-tiff")
    (images / "a.png").rename(images / "a$1_$2.png")
    (drawn / "a_cp_masks.tif").rename(drawn / "a$1_$2.tif")
    import_drawn("label-tiff", images, drawn, tmp_path / "d")
    assert (tmp_path / "d/contact_sheet.png").exists()


def test_the_folder_one_is_in_can_be_filled(tmp_path, monkeypatch):
    images, drawn = write_own(tmp_path, "label-tiff")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    import_drawn("label-tiff", images, drawn, Path("."))
    assert (tmp_path / "here/manifest.csv").exists()


def test_categories_of_coco_are_named(tmp_path):
    entry = {"image_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9]]}
    content = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 5, "name": "nucleus"}],
               "annotations": [{**entry, "category_id": 5}, {**entry, "category_id": 6}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    note, = read_coco(tmp_path / "a.json")["a"].notes
    assert "2 categories (6, nucleus)" in note


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


def test_hidden_files_and_twins(tmp_path, capsys):
    train_dir, test_dir = write_monuseg(tmp_path / "raw")
    nested = tmp_path / "nested"
    nested.mkdir()
    shutil.move(test_dir, nested)
    (nested / "._a.xml").write_text("")
    assert monuseg_main(["--train_dir", str(train_dir), "--test_dir", str(nested), "--out", str(tmp_path / "d")]) == 0
    images, drawn = write_own(tmp_path, "coco")
    (drawn.parent / "._x.json").write_text("")
    import_drawn("coco", images, drawn.parent, tmp_path / "e")
    src = write_herlev(tmp_path / "herlev")
    first = next(src.rglob("*-d.bmp"))
    save_png(first.with_suffix(".png"), np.zeros((3, 3), np.uint8))
    capsys.readouterr()
    assert "same name as" in refused(herlev_main, ["--src", src, "--out", tmp_path / "h"], capsys)


def test_a_group_that_may_be_absent_is_missed():
    with pytest.raises(ValueError, match="finds nothing in 1 names, e.g. 'c'"):
        group_names(["a", "c"], "(a)|c")


# ---- commands


@pytest.mark.parametrize("script", ["monuseg", "herlev", "drawn"])
def test_commands_end_with_one_line(script, tmp_path):
    options = {"monuseg": ["--train_dir", "no", "--test_dir", "no"], "herlev": ["--src", "no"],
               "drawn": ["--format", "coco", "--images", "no", "--annotations", "no"]}[script]
    done = run_script("-m", f"preparation.{script}", *options, "--out", tmp_path / "d")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not SHARED.exists(), reason="the real images (../shared/data) are not on this machine")
def test_real_monuseg_regions_have_the_pixels_of_the_rasteriser():
    path = next(iter(sorted(SHARED.glob("monuseg/MoNuSegTestData/*.xml"))))
    annotation = read_imagescope(path)
    labels, notes = rasterise(annotation.regions, (1000, 1000))
    assert len(annotation.regions) - len(notes) == labels.max() > 100
    assert 0.05 < (labels > 0).mean() < 0.6
