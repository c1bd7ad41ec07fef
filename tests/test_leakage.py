"""Tests of which files of a data set are seen, and of what its splits share.

    python -m pytest tests/test_leakage.py
"""

import csv
import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

import evaluate_papsmear
import predict_papsmear
from conftest import (
    ONE_STAGE,
    copy_pair,
    lively_model,
    move_pair,
    noisy_image,
    run_script,
    words,
    write_checkpoint,
    write_data_set,
)
from images import duplicates
from images.dealing import write_splits
from images.duplicates import SIDE, appearance, shared
from images.files import save_instances, save_png
from images.listing import list_folder
from images.masks import load_mask
from images.pairs import originals, source_name
from images.recipe import MASK_AND_BOUNDARY
from images.report import check_dataset
from images.splits import group_names, list_splits
from images.targets import instance_file, load_target
from system.errors import UserError


@pytest.mark.parametrize(("name", "source"), [
    ("102_rotated_30", "102"), ("19_flipped", "19"), ("flipped_19", "19"), ("rotated_-90_mirrored_a_b", "a_b"),
    ("flipped_7_rotated_90", "7"), ("a_rotated_30.5_flipped", "a"), ("flipped", "flipped"), ("_flipped", "_flipped"),
    ("unflipped_3", "unflipped_3"), ("3_flippedness", "3_flippedness"), ("a_rotated", "a_rotated")])
def test_copies_are_known_by_a_mark_before_or_after_their_name(name, source):
    assert source_name(name) == source


def test_an_image_of_which_there_are_only_copies_is_an_image(tmp_path):
    root = write_data_set(tmp_path / "data", counts=(9, 3, 3))
    for i in range(9):
        copy_pair(root, "train", f"train_{i}", f"train_{i}_flipped")
        copy_pair(root, "train", f"train_{i}", f"train_{i}_rotated_90")
        if i < 8:
            for kind in ("images", "masks"):
                (root / f"train/{kind}/train_{i}.png").unlink()
    pairs = list_splits(root)["train"]
    assert [pair.name for pair in originals(pairs)] == [f"train_{i}_flipped" for i in range(8)] + ["train_8"]
    write_splits(root)
    splits = list_splits(root)
    assert [len({pair.source for pair in splits[split]}) for split in splits] == [11, 2, 2], "of 15 images"
    assert all(len({pair.source for pair in splits[split]}) == len(splits[split]) for split in ("valid", "test"))
    assert check_dataset(root).leakage["pictures"] == {"valid": (0, 2), "test": (0, 2)}


def write_manifest(root, rows) -> None:
    with open(root / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([("tile", "split", "source", "group"), *rows])


def test_tiles_of_one_image_are_one_group_by_the_manifest(tmp_path):
    root = write_data_set(tmp_path / "data", counts=(12, 3, 3))
    names = [path.stem for split in ("train", "valid", "test") for path in sorted((root / split / "images").iterdir())]
    write_manifest(root, [(name, "train", f"slide_{i % 6}.tif", f"patient_{i % 3}") for i, name in enumerate(names)])
    report = check_dataset(root)
    assert report.totals == {"source images": 6, "groups": 3}
    assert report.leakage["source images"] == {"valid": (3, 3), "test": (3, 3)}
    assert report.leakage["groups"] == {"valid": (3, 3), "test": (3, 3)}
    write_splits(root)
    splits = list_splits(root)
    assert sorted(len(pairs) for pairs in splits.values()) == [6, 6, 6]
    assert len({(pair.group, split) for split, pairs in splits.items() for pair in pairs}) == 3
    assert check_dataset(root).leakage["groups"] == {"valid": (0, 1), "test": (0, 1)}
    whole = (root / "manifest.csv").read_bytes()
    first, second = whole.split(b"\n")[:2]
    line = r"line \d+ is cut off or damaged"
    for torn, said in ((whole[:-15], line), (whole + b"\0" * 30, line), (whole[:60] + b"\0" + whole[60:], line),
                       (first + b"\n", "it has lost all lines but its first"),
                       (whole.replace(second, b'"' + second), "unexpected end of data")):
        (root / "manifest.csv").write_bytes(torn)
        with pytest.raises(UserError, match=f"manifest.csv: {said}, so the groups of images are not known. Prepare"):
            list_splits(root)
    (root / "manifest.csv").write_bytes(whole[:whole[:-1].rindex(b"\n") + 1])
    assert "1 of 18 images are not in manifest.csv, e.g. " in str(check_dataset(root))
    image = root / "train/images" / f"{names[0]}.png"
    (root / "manifest.csv").write_bytes(whole)
    for folder in ("images", "masks"):
        shutil.copy(root / "train" / folder / image.name, root / "valid" / folder / f"flipped_{image.name}")
    (root / "splits.csv").rename(root / "splits.txt")
    assert check_dataset(root).leakage["groups"]["valid"] == (3, 3), "a copy is of the patient of its original"
    assert {pair.group for pair in list_splits(root)["valid"] if pair.is_copy} == {"patient_0"}
    for folder in ("images", "masks"):
        (root / "valid" / folder / f"flipped_{image.name}").unlink()
    (root / "splits.txt").rename(root / "splits.csv")
    (root / "manifest.csv").write_bytes(b"\xef\xbb\xbf" + whole)
    assert {pair.group for pair in list_splits(root)["train"]} <= {"patient_0", "patient_1", "patient_2"}
    (root / "manifest.csv").write_text("another,table\n1,2\n")
    assert "groups" not in check_dataset(root).totals, "a table of another kind tells nothing"


def grey(seed: int) -> np.ndarray:
    return noisy_image(256, 256, 1, seed).transpose(2, 0, 1)


def test_pictures_are_known_by_their_pixels():
    train = [appearance(grey(seed)) for seed in range(5)]
    turned = np.ascontiguousarray(np.rot90(grey(3), 1, (1, 2))[..., ::-1])
    brighter = np.clip(grey(2)[:, ::-1] * 0.9 + 12, 0, 255).astype(np.uint8)
    others = [appearance(image) for image in (grey(9), turned, brighter, np.full_like(grey(0), 200))]
    assert shared(train, others) == ({1: 3}, {2: 2})
    plain = appearance(np.full((3, 256, 256), 7, np.uint8))
    assert shared([plain], [plain]) == ({}, {}), "empty tiles are no copies of each other"
    assert shared([], others) == ({}, {})


def test_blocks_of_pictures_find_what_every_pair_does(monkeypatch):
    rng = np.random.default_rng(0)
    pictures = [appearance(rng.integers(0, 256, (1, 16, 16), np.uint8)) for _ in range(40)]
    train = [*pictures[:30], pictures[3], appearance(np.full((1, 16, 16), 9, np.uint8))]
    others = [*pictures[30:], appearance(np.zeros((1, 16, 16), np.uint8)), pictures[3], pictures[29]]
    monkeypatch.setattr(duplicates, "BLOCK", 5)
    monkeypatch.setattr(duplicates, "ROWS", 7)
    likeness, nearest = duplicates.most_alike(train, others)
    for j, other in enumerate(others):
        views = [view.ravel() for turns in range(4) for turned in [np.rot90(other.thumbnail, turns)]
                 for view in (turned, turned[:, ::-1])]
        pairs = [float(max(one.thumbnail.ravel() @ view for view in views)) for one in train]
        assert likeness[j] == pytest.approx(max(pairs), abs=1e-6)
        assert nearest[j] == int(np.argmax(pairs))
    assert nearest[-2:].tolist() == [3, 29], "of two that are equal the first"


def test_the_report_names_pictures_under_another_name(data_root):
    move_pair(data_root, "train", "train_0", "test", "another")
    path = data_root / "test/images/another.png"
    save_png(path, np.asarray(Image.open(path))[::-1])
    report = check_dataset(data_root)
    assert report.leakage["source images"]["test"] == (0, 4)
    assert report.leakage["pictures"] == {"valid": (0, 3), "test": (1, 4)}
    warning, = [w for w in report.warnings if "very picture" in w]
    assert warning == (f"1 images of test show the very picture of one in train, perhaps turned or flipped, e.g. "
                       f"{path} and {data_root}/train/images/train_0.png")


@pytest.mark.parametrize("suffix", [".tiff", ".TIF", ".bmp", ".PNG"])
def test_instance_maps_are_found_whatever_their_type(suffix, data_root):
    folder = data_root / "train/instances"
    folder.mkdir()
    pair = list_splits(data_root)["train"][0]
    assert instance_file(pair) is None
    labels = np.zeros((64, 64), np.int32)
    labels[20:40, 20:30], labels[20:40, 30:40] = 1, 2
    Image.fromarray(labels.astype(np.uint8)).save(folder / f"train_0{suffix}")
    assert instance_file(pair) == folder / f"train_0{suffix}"
    assert load_target(pair, 1, MASK_AND_BOUNDARY)[25:35, 29:31, 1].all(), "the rim between the two is there"
    assert "instance maps: 1 of 6 images of train, 0 of 3 images of valid" in str(check_dataset(data_root))
    save_instances(folder / "train_1.png", labels)
    assert instance_file(list_splits(data_root)["train"][1]) is not None, "the folder is listed anew"


def test_instance_maps_that_are_not_those_of_the_masks_are_named(data_root):
    folder = data_root / "train/instances"
    folder.mkdir()
    masks = sorted((data_root / "train/masks").iterdir())
    drawn = [load_mask(path)[..., 0] for path in masks[:5]]
    rows = np.arange(64)[:, None] // 2
    for path, labels in zip(masks[:5], (
            drawn[0] * 1, np.roll(drawn[1], 30, axis=1) * 1, drawn[2][:32] * 1, drawn[3] * (1 + rows % 2),
            drawn[4] * (1 + rows // 3)), strict=True):
        save_instances(folder / path.name, labels)
    found = [warning for warning in check_dataset(data_root).warnings if "instance map(s)" in warning]
    assert len(found) == 3
    for path, why, warning in zip(masks[1:4], (
            "1 instance map(s) whose nuclei are not those of the masks (IoU below 0.8)",
            "1 instance map(s) that cannot be read, or have another size",
            "1 instance map(s) whose numbers are not those of nuclei"), found, strict=True):
        assert warning.startswith(why)
        assert path.name in warning


def test_what_valid_and_test_share_is_named(data_root):
    assert not check_dataset(data_root).warnings
    for kind in ("images", "masks"):
        shutil.copy(data_root / f"valid/{kind}/valid_1.png", data_root / f"test/{kind}/other.png")
    found = check_dataset(data_root).warnings
    assert len(found) == 1
    assert found[0].startswith("1 images of test show, or nearly show, the picture of one in valid, e.g. ")
    assert "By valid the epoch is chosen" in found[0]
    for kind in ("images", "masks"):
        (data_root / f"test/{kind}/other.png").rename(data_root / f"test/{kind}/flipped_valid_1.png")
    assert [w.split(" as well")[0] for w in check_dataset(data_root).warnings] == [
        "1 of 4 groups or source images of test are in valid"]


def test_names_are_compared_in_one_unicode_form(data_root):
    image, mask = (data_root / f"train/{kind}/train_0.png" for kind in ("images", "masks"))
    image.rename(image.with_name(unicodedata.normalize("NFD", "Präparat.png")))
    mask.rename(mask.with_name(unicodedata.normalize("NFC", "Präparat.png")))
    pair = list_splits(data_root)["train"][0]
    assert pair.name == unicodedata.normalize("NFC", "Präparat")
    (data_root / "splits.csv").write_text(unicodedata.normalize("NFC", "path,split\ntrain/images/Präparat.png,train\n")
                                          + "train/images/train_1.png,valid\ntrain/images/train_2.png,test\n")
    assert list_splits(data_root)["train"] == [pair]


def test_what_is_passed_over_is_said(data_root, tmp_path, capsys):
    images = data_root / "test/images"
    (images / "deeper").mkdir()
    (images / "scan.webp").write_text("x")
    (images / ".hidden.webp").write_text("x")
    listing = list_folder(images)
    assert (len(listing.files), listing.others, listing.folders) == (3, [images / "scan.webp"], [images / "deeper"])
    said = "1 file(s) of no type that is read, e.g. scan.webp and 1 folder(s) in it, e.g. deeper"
    assert f"warning: not read in {images}: {said}" in str(check_dataset(data_root))
    checkpoint = write_checkpoint(tmp_path / "a.pth", lively_model())
    assert predict_papsmear.main([str(checkpoint), str(images), "--out", str(tmp_path / "out")]) == 0
    assert f"not read in {images}: {said}" in capsys.readouterr().out


def test_appearance_is_that_of_all_channels():
    rgb = noisy_image(256, 256, 3).transpose(2, 0, 1)
    other = rgb.copy()
    other[0, 0, 0] ^= 1
    equal, near = shared([appearance(rgb)], [appearance(other)])
    assert (equal, near) == ({}, {0: 0}), "one bit differs"
    thumbnail = appearance(rgb).thumbnail
    assert (thumbnail.shape, thumbnail.nbytes) == ((SIDE, SIDE), 1024), "one view, not all eight, for 100 000 images"
    assert np.linalg.norm(thumbnail) == pytest.approx(1)


@pytest.fixture
def odd_names(data_root):
    """Return a data set with an image whose name is no UTF-8, as a Windows zip unpacked on Linux has it."""
    for kind in ("images", "masks"):
        for split in ("train", "test"):
            path = data_root / split / kind / f"{split}_0.png"
            os.rename(path, os.fsencode(path.parent) + b"/zelle_\xe4.png" if split == "test" else
                      path.with_name("клетка.png"))
    return data_root


def test_a_name_that_is_no_utf8_is_carried_by_every_table(odd_names, tmp_path):
    write_splits(odd_names)
    assert sum(len(pairs) for pairs in list_splits(odd_names).values()) == 12, "its table finds every image again"
    (odd_names / "splits.csv").unlink()
    done = run_script("train_papsmear.py", "--data_root", odd_names, "--output_dir", tmp_path, "--experiment_name", "a",
                      *ONE_STAGE, environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "a/test_scores.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["test_1", "test_2", "zelle_\\udce4"]
    for folder in ("test", "train"):
        images = odd_names / folder / "images"
        done = run_script("predict_papsmear.py", tmp_path / "a/best_stage_4.pth", images, "--out",
                          tmp_path / folder, environment={"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / folder).glob("*_mask.png"))) == len(list(images.iterdir()))
    done = run_script("predict_papsmear.py", tmp_path / "a/best_stage_4.pth", odd_names / "test/images", "--out",
                      tmp_path / "test", "--overwrite", environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert evaluate_papsmear.main(words(tmp_path / "a/best_stage_4.pth", "--data_root", odd_names, "--out",
                                        tmp_path / "evaluated")) == 0


def test_a_data_set_is_made_of_such_names_too(odd_names, tmp_path):
    done = run_script("prepare_data.py", "drawn", "--format", "label-tiff", "--images", odd_names / "test/images",
                      "--annotations", odd_names / "test/masks", "--out", tmp_path / "out",
                      environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    report = check_dataset(tmp_path / "out")
    assert report.totals == {"source images": 3}, "the manifest is found again"
    assert report.leakage["source images"] == {"valid": (0, 1), "test": (0, 1)}


def test_an_expression_that_finds_nothing_in_a_name_deals_no_patient_twice(tmp_path):
    with pytest.raises(UserError, match="finds nothing in 2 names, e.g. 'anna_1'"):
        group_names(["anna_1", "anna_2", "7_1"], r"^\d*")
    assert group_names(["7_1", "7_2"], r"^\d*") == {"7_1": "7", "7_2": "7"}
