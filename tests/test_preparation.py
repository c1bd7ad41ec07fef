"""Tests of the way from a download, or from drawn annotations, to a data set, on shapes known by construction.

    python -m pytest tests/test_preparation.py
"""

import csv
import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_data
from conftest import imagescope, read_rows, square
from images.dealing import deal_groups
from images.files import load_image, save_png
from images.masks import load_instances, load_mask
from images.pyramid import open_pyramids
from images.report import check_dataset
from images.splits import group_names, leaked, list_splits
from preparation.data_sets import COLUMNS, cut_tile, new_folder, tile_offsets
from preparation.drawn import assign, import_drawn
from preparation.herlev import CLASSES, field_of
from preparation.herlev import prepare as prepare_herlev
from preparation.monuseg import prepare as prepare_monuseg
from system.errors import UserError


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


def prepare(*arguments) -> int:
    """Run prepare_data.py in this process; return its exit code."""
    return prepare_data.main([str(a) for a in arguments])


def refused(arguments, capsys) -> str:
    """Return the message of a command that must end with exit code 2, and leave no traceback."""
    assert prepare(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


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


def test_a_folder_that_another_process_fills_meanwhile_stays(tmp_path):
    out = tmp_path / "data"
    out.mkdir()

    def prepare():
        with new_folder(out) as made:
            (made / "mine").write_text("1")
            (out / "other").write_text("2")

    with pytest.raises(UserError, match="another process wrote it meanwhile"):
        prepare()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["data", "data/other"]


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
    convert = prepare_monuseg if which == "monuseg" else prepare_herlev
    for name in "ab":
        convert(*source, tmp_path / name)
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
    assert prepare("monuseg", "--train_dir", nested, "--test_dir", test_dir, "--out", tmp_path / "d") == 0
    said = capsys.readouterr().out
    for part in (f"{names[0]}.xml is missing", f"{names[1]}.tif: no nucleus is drawn", "region 2 left out: 2 vertices",
                 "region 3 left out: rows 900..909", "stray.xml: left out, as its image is missing",
                 "100x300 pixels; tiles have 256", "TCGA-AA-0002: this patient is in training and in test"):
        assert part in said
    assert "valid has 1 group(s) alone" in said
    assert said.startswith((tmp_path / "d/report.md").read_text())
    assert said.endswith(f"python prepare_data.py check {tmp_path / 'd'} --in_channels 3 --group_regex "
                         "'^TCGA-\\w+-\\w+'\n")
    padded = [row for row in manifest(tmp_path / "d") if row["split"] == "test" and "09Z" in row["tile"]]
    assert {(row["height"], row["width"]) for row in padded} == {("100", "256")}
    mask = load_mask(tmp_path / "d/test/masks" / f"{padded[0]['tile']}.png")
    assert (mask[100:199] == mask[98::-1]).all()
    assert mask[100:].any()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_monuseg_refuses_with_every_fault_at_once(tmp_path, capsys):
    train_dir, test_dir = write_monuseg(tmp_path / "raw")
    command = ["monuseg", "--train_dir", train_dir, "--test_dir", test_dir, "--out", tmp_path / "d"]
    drawn = sorted((train_dir / "Annotations").iterdir())
    good = [path.read_text() for path in drawn]
    drawn[0].write_text("<!DOCTYPE a><Annotations/>")
    drawn[1].write_text("<svg/>")
    message = refused(command, capsys)
    assert all(part in message for part in ("2 problems", drawn[0].name, drawn[1].name, "DOCTYPE", "<svg>"))
    assert not (tmp_path / "d").exists()
    for path, text in zip(drawn, good, strict=True):
        path.write_text(text)
    image = next((train_dir / "Tissue Images").iterdir())
    whole = image.read_bytes()
    image.write_bytes(whole[:3000])
    assert image.name in refused(command, capsys)
    image.write_bytes(whole)
    for extra, part in ((["--overlap", 256], "--overlap: '256'"), (["--valid_share", 1], "--valid_share: '1'"),
                        (["--seed", -1], "--seed: '-1'"),
                        (["--test_dir", train_dir], "test image must not be trained on"),
                        (["--test_dir", tmp_path / "no"], "no such folder"),
                        (["--test_dir", tmp_path / "raw"], "several of them data sets"),
                        (["--test_dir", train_dir / "Tissue Images"], "'Tissue Images' with 'Annotations'"),
                        (["--out", test_dir / "d"], "never written to"),
                        (["--out", test_dir], "nothing is overwritten")):
        assert part in refused([*command, *extra], capsys)
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
    names = ("nucleus", "cytoplasm") if target == "both" else ()
    assert pyramids["train"].recipe.class_names == names
    assert json.loads((tmp_path / "data/dataset.json").read_text()).get("classes", []) == list(names)


def test_herlev_refuses_and_names(tmp_path, capsys):
    src = write_herlev(tmp_path / "raw")
    masks = sorted(src.rglob("*-d.bmp"))
    command = ["herlev", "--src", src, "--out", tmp_path / "d"]
    kept = [path.read_bytes() for path in masks[:3]]
    for path, colour in zip(masks[:2], ((1, 2, 3), (9, 9, 9)), strict=True):
        Image.new("RGB", (48, 60), colour).save(path)
    Image.new("RGB", (10, 20), (255, 0, 0)).save(masks[2])
    message = refused(command, capsys)
    assert all(part in message for part in ("3 problems", "(1, 2, 3) on 2880 pixels", "(9, 9, 9)", "20x10"))
    assert "--folds is 2" in refused([*command, "--folds", 2], capsys)
    assert "no class folder" in refused(["herlev", "--src", src / CLASSES[0], "--out", tmp_path / "d"], capsys)
    assert not (tmp_path / "d").exists()
    for path, content in zip(masks, kept, strict=False):
        path.write_bytes(content)
    masks[0].unlink()
    shutil.rmtree(src / CLASSES[1])
    assert prepare(*command) == 0
    said = capsys.readouterr().out
    assert f"{CLASSES[1]}: no such class folder" in said
    assert f"its mask {masks[0].stem}.bmp is missing" in said


# ---- drawn annotations


def write_drawn(root: Path, kind: str) -> tuple[Path, Path]:
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
def test_drawn_annotations_round_trip(kind, sizing, tmp_path):
    images, drawn = write_drawn(tmp_path, kind)
    report = import_drawn(kind, images, drawn, tmp_path / "data", sizing=sizing, microns_per_pixel=0.5)
    assert json.loads((tmp_path / "data/dataset.json").read_text())["microns_per_pixel"] == 0.5
    splits = list_splits(tmp_path / "data")
    check_dataset(tmp_path / "data", in_channels=3)
    assert (tmp_path / "data/whole/test").exists() == (sizing == "tile")
    for split, pairs in splits.items():
        for pair in pairs:
            labels = load_instances(tmp_path / "data" / split / "instances" / f"{pair.name}.png")
            assert labels.shape == ((256, 256) if sizing == "tile" else (64, 80))
            nuclei = labels[:64, :80]
            assert np.bincount(nuclei[nuclei > 0]).max() == np.count_nonzero(nuclei) / 2 == 100
            assert (labels[5:15, 6:16] == 1).all()
    assert ("padded by reflection" in report) == (sizing == "tile")
    import_drawn(kind, images, drawn, tmp_path / "again", sizing=sizing, microns_per_pixel=0.5)
    assert digests(tmp_path / "again") == digests(tmp_path / "data")


def test_drawn_annotations_by_group_and_what_does_not_fit(tmp_path, capsys):
    images, drawn = write_drawn(tmp_path, "label-tiff")
    write_images(images, ["d_2", "lonely"])
    mask = np.zeros((64, 80), np.uint8)
    mask[2:4, 2:4] = mask[9:12, 9:12] = 255
    save_png(drawn / "d_2.png", mask)
    save_png(drawn / "unknown.png", mask)
    command = ["drawn", "--format", "label-tiff", "--images", images, "--annotations", drawn, "--out", tmp_path / "d",
               "--group_regex", "^[^_]+"]
    assert prepare(*command) == 0
    said = capsys.readouterr().out
    assert re.search(r"lonely.png: left out, as \S+ holds nothing of the name lonely$", said, re.M)
    assert "unknown: something is drawn for it, but the image is missing" in said
    assert "each connected piece" in said
    of = {row["source"]: row["split"].removeprefix("whole/") for row in manifest(tmp_path / "d")}
    assert of["d.png"] == of["d_2.png"]
    command = [*command, "--out", tmp_path / "e"]
    assert "finds nothing" in refused([*command, "--group_regex", "^x"], capsys)
    assert "no regular expression" in refused([*command, "--group_regex", "("], capsys)
    save_png(drawn / "lonely.png", mask[:10])
    Image.fromarray(np.arange(64 * 80 * 3, dtype=np.uint8).reshape(64, 80, 3)).save(drawn / "d_2.png")
    message = refused(command, capsys)
    assert all(part in message for part in ("2 problems", "10x80", "one channel"))
    assert "annotations" in refused([*command, "--annotations", tmp_path / "no"], capsys)
    assert "a file, where a folder of images is needed" in refused([*command, "--images", images / "a.png"], capsys)
    assert "Stems must be the same" in refused([*command, "--annotations", tmp_path / "d/train"], capsys)


def test_a_coco_file_for_images_of_another_size_is_refused(tmp_path, capsys):
    images, drawn = write_drawn(tmp_path, "coco")
    write_images(images, "b", (32, 40))
    command = ["drawn", "--format", "coco", "--images", images, "--annotations", drawn.parent, "--out", tmp_path / "d"]
    assert "32x40 pixels, but it was annotated at 64x80" in refused(command, capsys)


def test_the_same_few_numbers_in_every_image_are_doubted(tmp_path, capsys):
    """Nucleus and cytoplasm that are cut by the edge: each number is one piece, and none lies within the other."""
    images, drawn = write_drawn(tmp_path, "label-tiff")
    cell = np.zeros((64, 80), np.uint8)
    cell[:40, :40], cell[:20, :20] = 1, 2
    for i, path in enumerate(sorted(drawn.iterdir())):
        Image.fromarray(np.roll(cell, i, axis=1)).save(path)
    said, _ = import_labels(images, drawn, tmp_path / "d", capsys)
    assert "4 of 4 label images hold the same numbers 1, 2. Are these classes?" in said
    Image.fromarray(cell * 3).save(path)
    said, _ = import_labels(images, drawn, tmp_path / "e", capsys)
    assert "Are these classes?" not in said


def test_where_nothing_is_drawn_there_is_no_data_set(tmp_path, capsys):
    images, drawn = write_drawn(tmp_path, "coco")
    content = json.loads(drawn.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    drawn.write_text(json.dumps(content))
    message = refused(["drawn", "--format", "coco", "--images", images, "--annotations", drawn, "--out",
                       tmp_path / "d"], capsys)
    assert "no nucleus in it for any of 4 images" in message
    assert "a.png: region 0 left out: it has no outline (a box alone?)" in message
    assert not (tmp_path / "d").exists()


def test_labels_beside_their_images(tmp_path):
    images, drawn = write_drawn(tmp_path, "label-tiff")
    for path in drawn.iterdir():
        shutil.move(path, images)
    import_drawn("label-tiff", images, images, tmp_path / "data")
    assert {row["source"] for row in manifest(tmp_path / "data")} == {f"{name}.png" for name in "abcd"}


def import_labels(images: Path, drawn: Path, out: Path, capsys, *options) -> tuple[str, list[dict]]:
    """Import label images by the command; return what it said and the manifest."""
    assert prepare("drawn", "--format", "label-tiff", "--images", images, "--annotations", drawn, "--out", out,
                   "--sizing", "resize", *options) == 0
    return capsys.readouterr().out, manifest(out)


def test_a_mask_of_ones_is_parted_like_one_of_255(tmp_path, capsys):
    images, drawn = write_drawn(tmp_path, "label-tiff")
    mask = np.zeros((64, 80), np.uint8)
    mask[2:4, 2:4] = mask[9:12, 9:12] = 1
    Image.fromarray(mask).save(drawn / "a_cp_masks.tif")
    Image.fromarray(mask > 0).save(drawn / "b_cp_masks.tif")
    said, rows = import_labels(images, drawn, tmp_path / "d", capsys)
    assert {row["nuclei"] for row in rows} == {"2"}
    assert said.count("each connected piece") == 2


def test_predictions_can_be_imported_again(tmp_path, capsys):
    """Of what predict_papsmear.py writes, the instances are taken, in which nuclei that touch are apart."""
    images, drawn = write_drawn(tmp_path, "label-tiff")
    labels = np.zeros((64, 80), np.uint16)
    labels[5:15, 6:16], labels[5:15, 16:26] = 1, 2
    for path in list(drawn.iterdir()):
        path.unlink()
        for kind, array in (("instances", labels), ("mask", labels > 0), ("overlay", np.zeros((64, 80, 3), np.uint8))):
            save_png(drawn / f"{path.name[0]}_{kind}.png", array)
    said, rows = import_labels(images, drawn, tmp_path / "d", capsys)
    assert {row["nuclei"] for row in rows} == {"2"}
    assert "left out" not in said


def test_copies_stay_with_their_originals(tmp_path, capsys):
    names = [*"abcdefgh", *(f"flipped_{name}" for name in "abcdefgh"), "rotated_90_lonely"]
    images = write_images(tmp_path / "images", names)
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for name in names:
        save_png(drawn / f"{name}.png", np.eye(64, 80, dtype=bool))
    said, rows = import_labels(images, drawn, tmp_path / "d", capsys)
    split_of = {row["tile"]: row["split"] for row in rows}
    assert {split_of[name] for name in split_of if "flipped_" in name} == {"train"}
    assert all(split_of[name.removeprefix("flipped_")] == "train" for name in split_of if "flipped_" in name)
    assert "rotated_90_lonely" in split_of, "it stands for the image that is not there"
    assert said.count("copy of an image that is not trained on") == 8 - sum("flipped_" in name for name in split_of) > 0


def test_images_of_which_there_are_only_copies_are_dealt_like_any_other():
    """Of 77 sources 68 existed only as copies; the split came out as 133, 1, 1."""
    names = [f"{i}_{end}" for i in range(20) for end in ("flipped", "rotated_90")] + ["30", "31", "32"]
    assigned = assign(names, None, 0)
    count = Counter(split for _, split in assigned.values())
    assert set(count) == {"train", "valid", "test", ""}
    assert len({group for group, split in assigned.values() if split == "valid"}) >= 3
    for name, (group, split) in assigned.items():
        assert group == name.split("_")[0]
        assert split in (assigned[f"{group}_flipped"][1], "") if int(group) < 20 else split
    assert count[""] == sum(assigned[f"{i}_flipped"][1] != "train" for i in range(20)), "the second copy of each"
    halves = Counter(split for _, split in assign(list(map(str, range(40))), None, 0, (0.5, 0.25, 0.25)).values())
    assert halves == {"train": 20, "valid": 10, "test": 10}


def test_layers_of_monuseg_are_chosen_by_name(tmp_path, capsys):
    train_dir, test_dir = write_monuseg(tmp_path / "raw")
    for path in (*train_dir.rglob("*.xml"), *test_dir.rglob("*.xml")):
        path.write_text(path.read_text().replace('<Annotation Id="1">', '<Annotation Id="1" Name="Nuclei">').replace(
            "</Annotations>", '<Annotation Id="2" Name="Vessels"><Regions><Region Id="1" NegativeROA="0"><Vertices>'
            + "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in square(150, 150)) + "</Vertices></Region></Regions>"
            "</Annotation></Annotations>"))
    command = ["monuseg", "--train_dir", str(train_dir), "--test_dir", str(test_dir)]
    assert prepare_data.main([*command, "--out", str(tmp_path / "a")]) == 0
    assert "taken as nuclei: 1 of class Nuclei, 1 of class Vessels" in capsys.readouterr().out
    assert prepare_data.main([*command, "--out", str(tmp_path / "b"), "--classes", "Nuclei"]) == 0
    assert "left out: 1 of class Vessels" in capsys.readouterr().out
    counts = [sum(int(row["nuclei"]) for row in read_rows(tmp_path / name / "manifest.csv")
                  if row["split"].startswith("whole/test")) for name in "ab"]
    assert counts[0] == 2 * counts[1] > 0
    assert prepare_data.main([*command, "--out", str(tmp_path / "c"), "--classes", "nuclei"]) == 2
    assert "There is: Nuclei, Vessels" in capsys.readouterr().err


def test_names_that_are_formulas_are_drawn_as_they_stand(tmp_path):
    images, drawn = write_drawn(tmp_path, "label-tiff")
    (images / "a.png").rename(images / "a$1_$2.png")
    (drawn / "a_cp_masks.tif").rename(drawn / "a$1_$2.tif")
    import_drawn("label-tiff", images, drawn, tmp_path / "d")
    assert (tmp_path / "d/contact_sheet.png").exists()


def test_the_folder_one_is_in_can_be_filled(tmp_path, monkeypatch):
    images, drawn = write_drawn(tmp_path, "label-tiff")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    import_drawn("label-tiff", images, drawn, Path("."))
    assert (tmp_path / "here/manifest.csv").exists()


def test_hidden_files_and_twins(tmp_path, capsys):
    train_dir, test_dir = write_monuseg(tmp_path / "raw")
    nested = tmp_path / "nested"
    nested.mkdir()
    shutil.move(test_dir, nested)
    (nested / "._a.xml").write_text("")
    assert prepare("monuseg", "--train_dir", train_dir, "--test_dir", nested, "--out", tmp_path / "d") == 0
    images, drawn = write_drawn(tmp_path, "coco")
    (drawn.parent / "._x.json").write_text("")
    import_drawn("coco", images, drawn.parent, tmp_path / "e")
    src = write_herlev(tmp_path / "herlev")
    first = next(src.rglob("*-d.bmp"))
    save_png(first.with_suffix(".png"), np.zeros((3, 3), np.uint8))
    capsys.readouterr()
    assert "same name as" in refused(["herlev", "--src", src, "--out", tmp_path / "h"], capsys)


def test_a_group_that_may_be_absent_is_missed():
    with pytest.raises(ValueError, match="finds nothing in 1 names, e.g. 'c'"):
        group_names(["a", "c"], "(a)|c")
