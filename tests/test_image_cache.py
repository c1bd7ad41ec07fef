"""Tests of the decoded images: in memory, in memory-mapped files or decoded at every step, they are the same.

    python -m pytest tests/test_image_cache.py
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import train_papsmear
from checkpoints import load_checkpoint
from conftest import PROJECT, TINY, run_script
from images import cache as image_cache
from images import pyramid as image_pyramid
from images.cache import ImageCache, folder_for_files, halve
from images.pyramid import open_pyramids
from images.resolutions import RESOLUTIONS
from pap_smear_dataset import PapSmearDataset, create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer

IN_FILES = "images in memory-mapped files in "


@pytest.fixture
def little_memory(tmp_path, monkeypatch) -> Path:
    """Let nothing fit into memory; return the folder that the files go to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(image_cache, "CACHE_SHARE", 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def batches(loaders: dict) -> list[dict]:
    """Two training epochs and the validation split at every resolution."""
    return [batch for train, valid, _ in loaders.values() for loader in (train, train, valid) for batch in loader]


def same(some: list[dict], others: list[dict]) -> bool:
    return all(a["name"] == b["name"] and torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])
               for a, b in zip(some, others, strict=True))


def test_the_three_ways_give_the_same_batches(shared_root, little_memory):
    options = {"data_root": shared_root, "batch_sizes": dict.fromkeys(RESOLUTIONS, 4), "in_channels": 3}
    in_files = create_progressive_dataloaders(**options)
    assert in_files[32][0].dataset.pyramid.kept == f"in memory-mapped files in {little_memory}"
    found = batches(in_files)
    assert len(found) == 4 * (2 + 2 + 1)
    image_cache.CACHE_SHARE = 1.0  # the fixture puts it back
    in_memory = create_progressive_dataloaders(**options)
    assert in_memory[32][0].dataset.pyramid.kept == "in memory"
    assert same(found, batches(in_memory))
    for workers in (0, 2):  # which persist over the two epochs of a resolution
        decoded = create_progressive_dataloaders(**options, cache_images=False, num_workers=workers)
        assert decoded[32][0].dataset.pyramid.kept == "decoded at every step"
        assert same(found, batches(decoded))


DECODE_IN_WORKERS = """
import sys
from pap_smear_dataset import create_progressive_dataloaders
train, valid, _ = create_progressive_dataloaders(sys.argv[1], cache_images=False, num_workers=2)[32]
print(sum(len(batch["name"]) for loader in (train, train, valid) for batch in loader))
"""


def test_workers_answer_whatever_the_temporary_folder_is_called(shared_root, tmp_path):
    """A socket in this folder would have a path of more than 107 bytes, which no system takes."""
    long = tmp_path / ("a" * 90)
    long.mkdir()
    done = subprocess.run([sys.executable, "-c", DECODE_IN_WORKERS, shared_root], cwd=PROJECT, capture_output=True,
                          text=True, timeout=60, env=os.environ | {"TMPDIR": str(long)})
    assert (done.stdout, done.stderr) == ("15\n", "")


def test_persistent_workers_read_the_files(shared_root, little_memory, monkeypatch):
    dataset = PapSmearDataset(shared_root, "train", target_size=64)
    assert dataset.pyramid.kept.startswith("in memory-mapped files")
    monkeypatch.setattr(tempfile, "tempdir", None)  # torch sends tensors through a socket whose path must be short
    alone = [dataset[i] for i in range(len(dataset))]
    dataset.pyramid.pairs = [None] * len(dataset)  # whoever decodes now, fails
    loader = DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=True)
    for _ in range(2):
        found = torch.cat([batch["image"] for batch in loader])
        assert torch.equal(found, torch.stack([sample["image"] for sample in alone]))


def paint(cache: ImageCache, value: int) -> None:
    image, mask = (np.full((c, 256, 256), value, np.uint8) for c in cache.channels)
    cache.write(1, image, mask)


def paint_elsewhere(cache: ImageCache, value: int) -> None:
    torch.set_num_threads(1)  # as in a loader's worker: in a forked process OpenMP waits for threads that are not there
    paint(cache, value)


@pytest.mark.parametrize("start", multiprocessing.get_all_start_methods())
@pytest.mark.skipif(not image_cache.FILES_REACH_NEW_PROCESSES, reason="open files go to no other process")
def test_processes_see_one_mapping(start, tmp_path):
    cache = ImageCache(3, (3, 1), str(tmp_path))
    paint(cache, 1)
    process = multiprocessing.get_context(start).Process(target=paint_elsewhere, args=(cache, 200))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    for resolution in RESOLUTIONS:
        image, mask = cache.read(resolution, np.array([1]))
        assert image.shape == (1, 3, resolution, resolution)
        assert torch.all(image == 200)
        assert torch.all(mask == 200)
        assert not cache.read(resolution, np.array([0]))[0].any()


def test_where_files_cannot_be_handed_over_a_new_process_decodes(shared_root, little_memory, monkeypatch):
    pyramid = open_pyramids(shared_root, wanted=("test",))["test"]
    monkeypatch.setattr(image_pyramid, "FILES_REACH_NEW_PROCESSES", False)
    other = object.__new__(image_pyramid.ImagePyramid)
    other.__dict__ |= pyramid.__getstate__()
    assert not other.cached
    assert pyramid.cached
    for a, b in zip(other.batch(64, np.arange(3)), pyramid.batch(64, np.arange(3)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("folder", [None, "files"])
def test_levels_are_the_means_of_what_is_written(folder, tmp_path):
    (tmp_path / "files").mkdir()
    cache = ImageCache(2, (3, 2), folder and str(tmp_path / folder))
    rng = np.random.default_rng(0)
    image, mask = (rng.integers(0, 256, (2, c, 256, 256), dtype=np.uint8) for c in (3, 2))
    for i in (1, 0):
        cache.write(i, image[i], mask[i])
    levels = [torch.from_numpy(a) for a in (image, mask)]
    for resolution in (256, 128, 64, 32):
        for level, found in zip(levels, cache.read(resolution, np.array([0, 1])), strict=True):
            assert torch.equal(found, level)
        levels = [halve(level) for level in levels]
    assert [a.shape for a in cache.read(64, np.array([], dtype=int))] == [(0, 3, 64, 64), (0, 2, 64, 64)]
    assert ImageCache(0, (1, 1), folder and str(tmp_path / folder)).read(32, np.array([], dtype=int))[0].shape[0] == 0


def test_halves_of_a_mean_are_rounded_up():
    level = torch.tensor([[0, 1, 255, 255], [0, 1, 255, 254]], dtype=torch.uint8)[None, None]
    assert halve(level).flatten().tolist() == [1, 255]  # means 0.5 and 254.75


def test_nothing_is_left_of_the_files_when_a_process_breaks_off(shared_root, tmp_path):
    code = ("import os, sys, tempfile; from images import cache as image_cache, pyramid as image_pyramid\n"
            "image_cache.CACHE_SHARE, tempfile.tempdir = 0.0, sys.argv[2]\n"
            "print(image_pyramid.open_pyramids(sys.argv[1])['train'].kept, flush=True)\n"
            "os._exit(3)\n")  # without any tidying up, as when it is killed
    done = run_script("-c", code, shared_root, tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stdout.strip() == f"in memory-mapped files in {tmp_path}"
    assert list(tmp_path.iterdir()) == []


def full_disk(monkeypatch, by: str) -> None:
    """Let the space run out: as the disk tells beforehand, or when it is to be taken."""
    def refuse(folder, size):
        raise OSError(28, "No space left on device")
    if by == "told":
        monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000))
    else:
        monkeypatch.setattr(image_cache, "_reserved", refuse)


@pytest.mark.parametrize(("by", "found"), [("told", "2.0 MB free, of which 90% may be taken"),
                                           ("refused", "No space left on device")])
def test_too_little_space_is_an_error_or_said(by, found, shared_root, little_memory, monkeypatch, capsys):
    full_disk(monkeypatch, by)
    assert open_pyramids(shared_root)["train"].kept == "decoded at every step"
    said = capsys.readouterr().out
    # 12 images of one channel with masks: 12 * 2 * (256^2 + 128^2 + 64^2 + 32^2) bytes
    assert f"{little_memory}: {found}; the decoded images need 2.1 MB there" in said
    assert "Set TMPDIR" in said
    assert len(said.splitlines()) == 1
    assert train_papsmear.main(["--data_root", str(shared_root), "--cache_images", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert found in error
    assert "Set TMPDIR to a folder with more space, or decode at every step with --cache_images false" in error
    assert len(error.splitlines()) == 1


def test_the_way_that_was_chosen_is_said(shared_root, little_memory, capsys):
    command = ["--data_root", str(shared_root), "--dry_run", "--base_channels", "4"]
    for share, options, said in ((0.0, [], f"in memory-mapped files in {little_memory}"), (1.0, [], "in memory"),
                                 (1.0, ["--cache_images", "false"], "decoded at every step")):
        image_cache.CACHE_SHARE = share  # the fixture puts it back
        assert train_papsmear.main([*command, *options]) == 0
        printed = capsys.readouterr().out
        assert f"; images {said}, " in printed
        assert f'"images_kept": {json.dumps(said)}' in printed


def test_a_run_goes_on_with_another_way(trained_run, shared_root, little_memory, monkeypatch, capsys):
    """Decoded at every step and cut in stage 3, continued with mapped files; the reference kept all in memory."""
    train_epoch, seen = ProgressiveTrainer.train_epoch, []

    def interrupted(self, loader, epoch):
        seen.append(epoch)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return train_epoch(self, loader, epoch)
    monkeypatch.setattr(ProgressiveTrainer, "train_epoch", interrupted)
    output = little_memory.parent
    assert train_papsmear.main(["--data_root", str(shared_root), "--output_dir", str(output), "--experiment_name",
                                "cut", *TINY, "--cache_images", "false", "--num_workers", "0"]) == 130
    saved = load_checkpoint(output / "cut/last.pth")
    assert saved["config"]["resolved"]["images_kept"] == "decoded at every step"
    assert train_papsmear.main(["--resume", str(output / "cut"), "--cache_images", "true"]) == 0
    assert f"{IN_FILES}{little_memory}" in capsys.readouterr().out
    config = json.loads((output / "cut/config.json").read_text())
    assert config["resolved"]["images_kept"] == f"in memory-mapped files in {little_memory}"
    reference, found = (load_checkpoint(folder / "final_model.pth")["model"]
                        for folder in (trained_run[0], output / "cut"))
    assert all(torch.equal(reference[name], found[name]) for name in reference)
    shutil.rmtree(output / "cut")


def test_files_are_not_kept_in_memory_by_default(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: path == "/var/tmp")
    assert folder_for_files() == "/var/tmp"
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert folder_for_files() == "/tmp", "asked for"
