"""Tests of the data set: loaders, splits, leakage, and what is wrong with files."""

import multiprocessing
import re
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import train_papsmear
from conftest import TINY, copy_pair, disc, move_pair, run_script, write_data_set
from images.dealing import write_splits
from images.files import save_png
from images.pyramid import open_pyramids
from images.report import check_dataset
from images.splits import DatasetError, leaked, list_splits
from pap_smear_dataset import PapSmearDataset, create_progressive_dataloaders
from system.errors import UserError


def test_target_size_reaches_workers_that_live_on(shared_root):
    dataset = PapSmearDataset(shared_root, "train", target_size=64)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=True)
    assert {batch["image"].shape[-1] for batch in loader} == {64}
    dataset.update_target_size(32)
    assert {batch["image"].shape[-1] for batch in loader} == {32}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_without_cache_and_with_workers_the_batches_are_the_same(shared_root, num_workers):
    def batches(**kwargs):
        train, valid, _ = create_progressive_dataloaders(shared_root, {64: 4}, **kwargs)[64]
        train.set_epoch(2)
        return [*train, *train, *valid]
    kept, decoded = batches(), batches(cache_images=False, num_workers=num_workers)
    assert len(kept) == 5
    for a, b in zip(kept, decoded, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["mask"], b["mask"])
        assert a["name"] == b["name"]


def test_loader_size_changes_at_the_next_pass_and_one_resolution_has_workers(shared_root):
    loaders = create_progressive_dataloaders(shared_root, {32: 2, 64: 2}, cache_images=False, num_workers=1)
    train = loaders[32][0]
    shapes = []
    for batch in train:
        train.dataset.update_target_size(64)
        shapes.append(batch["image"].shape[-1])
    assert set(shapes) == {32}
    assert {batch["image"].shape[-1] for batch in train} == {64}
    assert train._workers is not None
    next(iter(loaders[128][0]))
    assert train._workers is None


def test_written_splits_have_no_leakage(tmp_path):
    root = write_data_set(tmp_path / "data", counts=(20, 6, 6))
    for i in range(20):
        copy_pair(root, "train", f"train_{i}", f"flipped_train_{i}")
    move_pair(root, "train", "train_3", "test", "mirrored_train_3")
    assert check_dataset(root).warnings
    path, odd = write_splits(root, seed=1)
    report = check_dataset(root)
    assert report.leakage["source images"] == {"valid": (0, 5), "test": (0, 5)}
    assert not report.warnings
    splits = list_splits(root)
    left = 21 - sum(pair.is_copy for pair in splits["train"])
    assert left > 5
    assert [words.split(",")[0] for words in odd] == [f"{left} copies are left out"]
    assert not any(pair.is_copy for split in ("valid", "test") for pair in splits[split])
    assert {p.source for p in splits["train"] if p.is_copy} <= {p.source for p in splits["train"] if not p.is_copy}
    assert leaked(splits, "test") == (0, 5)
    with pytest.raises(ValueError, match="never overwritten"):
        write_splits(root)
    table = path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + table.replace("/", "\\").replace("\n", "\r\n").encode())  # a spreadsheet's
    assert list_splits(root) == splits
    path.write_text("path,split\ntrain/images/train_0.png,training\nnowhere.png,test\n")
    with pytest.raises(DatasetError, match="'training'") as caught:
        list_splits(root)
    assert len(caught.value.problems) == 2
    path.write_bytes("path,split\nträin,test".encode("utf-16"))
    with pytest.raises(DatasetError, match="splits.csv: cannot be read"):
        list_splits(root)


def test_split_of_few_groups_and_of_names_that_occur_twice(tmp_path):
    root = write_data_set(tmp_path / "data", counts=(1, 1, 1))
    write_splits(root)
    assert [len(pairs) for pairs in list_splits(root).values()] == [1, 1, 1]
    (root / "splits.csv").unlink()
    with pytest.raises(ValueError, match=r"2 group\(s\)"):
        write_splits(root, "^.")
    move_pair(root, "train", "train_0", "test", "valid_0")
    with pytest.raises(DatasetError, match="another picture than"):
        write_splits(root)


def test_groups_of_unequal_size_meet_their_shares_in_images(tmp_path):
    """40 images, of which train_1 and train_10..19 are one group, and of train_0 a copy alone is left, which counts."""
    root = write_data_set(tmp_path / "data", counts=(20, 10, 10))
    copy_pair(root, "train", "train_0", "flipped_train_0")
    for kind in ("images", "masks"):
        (root / "train" / kind / "train_0.png").unlink()
    write_splits(root, r"^\w+?_\d")
    splits = list_splits(root)
    assert [len(splits[split]) for split in splits] == [28, 6, 6]
    assert [pair.name for pairs in splits.values() for pair in pairs if pair.is_copy] == ["flipped_train_0"]
    assert leaked(splits, "valid", r"^\w+?_\d") == (0, 6)


def test_remedy_against_leakage_can_be_pasted(data_root, tmp_path):
    move_pair(data_root, "train", "train_0", "test", "rotated_-90_train_0")
    (data_root / "train/images/notes.webp").write_text("x")
    report = check_dataset(data_root, group_regex=r"^(\w+_\d+)$")
    assert "train/images: 1 file(s) of no type that is read, e.g. notes.webp" in str(report)
    command = re.search(r"python (prepare_data\.py .*)", str(report)).group(1)
    done = run_script(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert not check_dataset(data_root).leakage["source images"]["test"][0]


def break_data_set(root: Path, fault: str) -> list[str]:
    """Break a data set in one way; return words that its message must hold."""
    images, masks = root / "train/images", root / "train/masks"
    one = masks / "train_1.png"
    if fault == "image without mask":
        one.unlink()
        return ["train_1.png: no mask", "remove the image"]
    if fault == "mask without image":
        (images / "train_1.png").unlink()
        return ["train_1.png: no image"]
    if fault == "size mismatch":
        save_png(one, np.zeros((32, 64), np.uint8))
        return ["64x64", "32x64"]
    if fault == "unreadable image":
        (images / "train_1.png").write_bytes(b"no picture")
        return ["train_1.png: not a readable image"]
    if fault == "cut off image":
        content = (images / "train_1.png").read_bytes()
        (images / "train_1.png").write_bytes(content[:len(content) // 2])
        return ["train_1.png: damaged or cut off"]
    if fault == "labels in the mask":
        save_png(one, disc().astype(np.uint8) + disc(64, 9))
        return ["train_1.png: label values {0, 1, 2}", "--out_channels 2"]
    if fault == "photograph as mask":
        save_png(one, (np.arange(4096).reshape(64, 64) // 16).astype(np.uint8))
        return ["train_1.png: ", "grey", "Is it an image"]
    if fault == "two images of one name":
        Image.open(images / "train_1.png").save(images / "train_1.jpg")
        return ["train_1.png: same name as train_1.jpg"]
    if fault == "missing folder":
        shutil.rmtree(root / "test")
        return ["test/images: no such folder", "Expected: DATA_ROOT/train|valid|test"]
    if fault == "empty split":
        shutil.rmtree(root / "valid/images")
        shutil.rmtree(root / "valid/masks")
        (root / "valid/images").mkdir()
        (root / "valid/masks").mkdir()
        return ["valid: no image"]
    if fault == "colour mask":
        save_png(one, np.stack([disc() * np.uint8(255)] + [disc() * np.uint8(0)] * 2, -1))
        return ["train_1.png: a colour-coded mask"]
    assert fault == "several at once"
    save_png(root / "valid/masks/valid_0.png", disc().astype(np.uint8) * 7)
    save_png(root / "test/masks/test_2.png", np.zeros((9, 9), np.uint8))
    save_png(one, disc().astype(np.uint8) * 7)
    (images / "train_2.png").write_bytes(b"nor this")
    (masks / "train_2.png").write_bytes(b"nor that")
    (images / "train_3.png").unlink()
    return ["6 problems", "valid_0.png", "test_2.png", "train_1.png", "images/train_2.png", "masks/train_2.png",
            "train_3.png: no image"]


FAULTS = ["image without mask", "mask without image", "size mismatch", "unreadable image", "cut off image",
          "labels in the mask", "photograph as mask", "two images of one name", "missing folder", "empty split",
          "colour mask", "several at once"]


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_data_sets_are_refused_in_one_message(data_root, tmp_path, capsys, fault):
    words = break_data_set(data_root, fault)
    code = train_papsmear.main(["--data_root", str(data_root), "--output_dir", str(tmp_path / "out"), *TINY])
    message = capsys.readouterr().err
    assert code == 2
    assert message.count("error:") == 1
    assert "Traceback" not in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_the_dataset_script_reports_and_refuses(shared_root):
    done = run_script("pap_smear_dataset.py", shared_root)
    assert done.returncode == 0
    assert "0 of 3 source images of valid" in done.stdout
    assert run_script("pap_smear_dataset.py", "nowhere").returncode == 2


def test_sample_generator_refuses_a_full_folder(tmp_path):
    command = ["prepare_data.py", "sample", "--out", tmp_path, "--train", 1, "--valid", 1, "--test", 1]
    assert run_script(*command).returncode == 0
    again = run_script(*command)
    assert again.returncode == 2
    assert "nothing is overwritten" in again.stderr
    assert len(list(tmp_path.rglob("*.png"))) == 6


def test_copies_sources_and_leakage(data_root):
    copy_pair(data_root, "train", "train_0", "flipped_train_0")
    copy_pair(data_root, "train", "train_0", "rotated_120_mirrored_train_0")
    move_pair(data_root, "train", "train_0", "test", "rotated_90_train_0")
    move_pair(data_root, "valid", "valid_1", "train", "mirrored_valid_1")
    report = check_dataset(data_root)
    assert report.counts["train"] == {"images": 9, "originals": 6, "groups": 7, "empty_masks": 0,
                                      "foreground": [pytest.approx(0.09, abs=0.06)], "instances": 0}
    assert report.leakage["source images"] == {"valid": (1, 3), "test": (1, 4)}
    assert report.leakage["pictures"] == {"valid": (1, 3), "test": (1, 4)}, "which these copies are, pixel by pixel"
    assert "1 of 3 source images of valid" in str(report)
    assert len(report.warnings) == 3
    names = [pair.name for pair in list_splits(data_root, use_augmented=False)["train"]]
    assert names == ["mirrored_valid_1", *(f"train_{i}" for i in range(6))], "a copy stands for what is not there"
    grouped = check_dataset(data_root, group_regex=r"^(\w+?)_")
    assert grouped.leakage["groups"] == {"valid": (1, 1), "test": (1, 2)}
    with pytest.raises(ValueError, match="must match every source name"):
        check_dataset(data_root, group_regex=r"^\d+")


def test_no_image_is_lost_but_a_last_batch_of_one(shared_root):
    train = create_progressive_dataloaders(shared_root, {32: 5})[32][0]
    assert [len(b["name"]) for b in train] == [5], "6 = 5 + 1, and batch normalisation cannot use the one"
    assert len(train) == 1
    train, valid, _ = create_progressive_dataloaders(shared_root, {32: 2})[32]
    assert [len(b["name"]) for b in valid] == [2, 1]
    train = create_progressive_dataloaders(shared_root, {32: 100})[32][0]
    assert [len(b["name"]) for b in train] == [6]
    orders = [[n for b in train for n in b["name"]] for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_loaders_left_in_the_middle_of_a_pass_end_their_workers_at_once(shared_root):
    """In a circle of references they would wait ten seconds for them, at some later moment."""
    loaders = create_progressive_dataloaders(shared_root, {32: 2}, cache_images=False, num_workers=2)
    before = set(multiprocessing.active_children())
    next(iter(loaders[32][0]))
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    start = time.monotonic()
    del loaders
    assert not workers & set(multiprocessing.active_children())
    assert time.monotonic() - start < 4


def test_images_that_all_lie_in_train_are_dealt(tmp_path):
    """The folders of valid and test may be missing altogether."""
    root = write_data_set(tmp_path / "data", counts=(20, 1, 1))
    for split in ("valid", "test"):
        shutil.rmtree(root / split)
    with pytest.raises(DatasetError, match="valid/images: no such folder"):
        list_splits(root)
    write_splits(root)
    assert [len(pairs) for pairs in list_splits(root).values()] == [14, 3, 3]
    check_dataset(root)


def test_a_pyramid_of_no_image_is_not_the_bundled_sample(shared_root):
    pyramid = open_pyramids(shared_root)["train"].subset([])
    assert len(PapSmearDataset(split="train", pyramid=pyramid)) == 0


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 0.5}, {"seed": None}, {"augment_probability": 2},
                                   {"augment_strength": -1}])
def test_settings_out_of_range_are_refused_before_anything_is_read(wrong, tmp_path):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}; it must"):
        PapSmearDataset(tmp_path / "nowhere", "train", 64, **wrong)
