"""Tests of what a machine may lack, room on the disk and memory, and of data at the lower limits.

    python -m pytest tests/test_limits.py
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_papsmear
from conftest import TINY, make_trainer, metric_rows, write_data_set
from images.files import save_png
from pap_smear_dataset import create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer
from system.errors import UserError
from training import space
from training.space import free_space, run_space
from unet import ProgressiveUNet


def train(root, tmp_path, *options: str) -> int:
    return train_papsmear.main(["--data_root", str(root), "--output_dir", str(tmp_path), "--experiment_name", "run",
                                "--device", "cpu", *TINY, *options])


# ---- room on the disk


@pytest.mark.parametrize(("average", "keep"), [("0", "0"), ("0.5", "2")])
def test_a_run_takes_no_more_room_than_was_said_and_not_much_less(average, keep, data_root, tmp_path, capsys):
    options = ["--average", average, "--keep", keep, "--save_every", "1", "--base_channels", "16"]
    assert train(data_root, tmp_path, *options, "--dry_run") == 0
    said = int(capsys.readouterr().out.partition("disk: about ")[2].split()[0]) * 1e6
    assert not (tmp_path / "run").exists()
    assert train(data_root, tmp_path, *options) == 0
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert written < said < 1.8 * written + space.OTHERS


def test_a_disk_without_room_refuses_a_run_before_anything_is_written(data_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    assert train(data_root, tmp_path) == 2
    said = capsys.readouterr().err
    assert "MB are needed for checkpoints and logs, and 3 MB are free. Make room" in said
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    assert train(data_root, tmp_path) == 0
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    assert train_papsmear.main(["--resume", str(tmp_path / "run"), "--epochs_per_stage", "1,1,1,2"]) == 2
    assert "are free" in capsys.readouterr().err


def test_a_run_that_goes_on_needs_room_for_what_it_replaces(data_root, tmp_path):
    trainer, loaders = make_trainer(data_root, tmp_path / "run")
    whole = run_space(trainer)
    trainer.fit(loaders)
    again, _ = make_trainer(data_root, tmp_path / "run")
    again.resume(tmp_path / "run/last.pth")
    assert space.OTHERS < run_space(again) < whole
    assert run_space(make_trainer(data_root)[0]) > space.OTHERS, "without a folder too"
    assert free_space(tmp_path / "not/there/yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


# ---- memory


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_names_stage_batch_and_what_takes_less(where, data_root, tmp_path):
    trainer, loaders = make_trainer(data_root, epochs_per_stage=1)
    trainer.set_stage(3)
    trainer.train_epoch(loaders[128][0], 0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    forward, batches = trainer.forward, []

    def greedy(batch, network):
        logits, mask, loss = forward(batch, network)
        batches.append(batch)
        if len(batches) == 2 and where == "forward":
            torch.empty(10 ** 15)  # 4 PB
        if len(batches) == 2:
            loss.register_hook(lambda _: torch.empty(10 ** 15))
        return logits, mask, loss

    trainer.forward = greedy
    trainer.accumulate = 2
    with pytest.raises(UserError, match="out of memory at stage 3 ") as error:
        trainer.train_epoch(loaders[128][0], 1)
    assert ("(128x128) with a batch of 2 images. Take smaller batches with --batch_sizes 128:1 and add up as many as "
            "before with --accumulate 2") in str(error.value)
    assert "--init_from RUN_FOLDER/best_stage_2.pth --start_stage 3" in str(error.value)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in trainer.model.parameters())


def test_other_errors_of_torch_stay_as_they_are(data_root):
    trainer, loaders = make_trainer(data_root)
    trainer.forward = lambda batch, network: torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="size"):
        trainer.train_epoch(loaders[32][0], 0)


# ---- a longer last stage


def test_the_last_stage_may_be_made_longer_at_resume(data_root, tmp_path, capsys):
    assert train(data_root, tmp_path) == 0
    resume = ["--resume", str(tmp_path / "run")]
    for epochs, words in (("2", "the last stage alone may change"), ("1,1,2,1", "the last stage alone may change"),
                          ("1,2", "one whole number")):
        assert train_papsmear.main([*resume, "--epochs_per_stage", epochs]) == 2
        assert words in capsys.readouterr().err
    assert train_papsmear.main(resume) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert train_papsmear.main([*resume, "--epochs_per_stage", "1,1,1,3"]) == 0
    assert "epochs of stages 1, 2, 3, 4 from here on: 1, 1, 1, 3" in capsys.readouterr().out
    rows = metric_rows(tmp_path / "run")
    assert [row["stage"] + row["epoch"] for row in rows] == ["11", "21", "31", "41", "42", "43"]
    rates = [float(row["lr"]) for row in rows]
    assert rates[-1] < rates[-2], "the schedule ends at the new end"
    assert rates[-2] > rates[-3], "and was begun at its place in the longer plan"
    assert train_papsmear.main(resume) == 0, "its own settings are the new ones"
    assert "this run is finished" in capsys.readouterr().out
    assert train_papsmear.main([*resume, "--epochs_per_stage", "1,1,1,2"]) == 2
    assert "has trained for 3 epochs already" in capsys.readouterr().err


def test_a_run_by_minutes_keeps_its_minutes(data_root):
    trainer, _ = make_trainer(data_root)
    with pytest.raises(UserError, match="cannot change at --resume of a run that --max_minutes deals out"):
        train_papsmear.change_last_stage(trainer, SimpleNamespace(max_minutes=5.0, epochs_per_stage=(9,)))


# ---- the least that data may be


@pytest.mark.parametrize("empty", [False, True])
def test_one_image_a_split_and_a_batch_of_one(empty, tmp_path):
    root = write_data_set(tmp_path / "data", counts=(1, 1, 1))
    if empty:
        for path in root.glob("*/masks/*.png"):
            save_png(path, np.zeros((64, 64), bool))
    trainer = ProgressiveTrainer(ProgressiveUNet(base_channels=2), "cpu", 1, precision="float32",
                                 output_dir=tmp_path / "run")
    trainer.fit(create_progressive_dataloaders(root, dict.fromkeys((32, 64, 128, 256), 1)), say=lambda _: None)
    rows = metric_rows(tmp_path / "run")
    assert len(rows) == 4
    assert all(0 <= float(row["dice"]) <= 1 and np.isfinite(float(row["train_loss"])) for row in rows)
    assert {row["empty_masks"] for row in rows} == {"1" if empty else "0"}
    assert (tmp_path / "run/predictions_stage_4.png").exists()
