"""Tests of what a machine may lack, room on the disk and memory, and of data at the lower limits.

    python -m pytest tests/test_limits.py
"""

import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate_papsmear
import train_papsmear
from checkpoints import load_checkpoint
from conftest import TINY, lively_model, make_trainer, metric_rows, write_checkpoint, write_data_set
from images.files import save_png
from images.resolutions import MOST_CHANNELS
from inference import Predictor
from pap_smear_dataset import create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer
from system import devices
from system.errors import UserError, lacks_memory
from training import memory, space
from training.loss import multi_scale_loss
from training.space import free_space, run_space
from unet import ProgressiveUNet, UNet


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
    assert train(data_root, tmp_path, "--epochs_per_stage", "0,0,0,1") == 0
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    assert train_papsmear.main(["--resume", str(tmp_path / "run"), "--epochs_per_stage", "0,0,0,2"]) == 2
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

HUGE = 10 ** 15  # numbers, 4 PB


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
            torch.empty(HUGE)
        if len(batches) == 2:
            loss.register_hook(lambda _: torch.empty(HUGE))
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


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)")])
def test_a_lack_of_memory_is_known_whoever_says_so(error):
    assert lacks_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("CUDNN_STATUS_EXECUTION_FAILED"), ValueError("out of memory"),
                                   OSError("out of memory"), RuntimeError("size mismatch")])
def test_other_errors_are_no_lack_of_memory(error):
    assert not lacks_memory(error)


def test_a_network_that_does_not_fit_onto_its_device_is_explained(tmp_path, monkeypatch):
    path, model = write_checkpoint(tmp_path / "a.pth", lively_model()), ProgressiveUNet(base_channels=4)
    size = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6
    said = rf"out of memory: the weights of the network, {size:.0f} MB, do not fit onto cpu .* fewer --base_channels"
    with monkeypatch.context() as patch:
        patch.setattr(ProgressiveUNet, "to", lambda *_, **__: torch.empty(HUGE))
        with pytest.raises(UserError, match=said):
            ProgressiveTrainer(model, "cpu")
        with pytest.raises(UserError, match="out of memory: the weights"):
            Predictor(path, "cpu")
        patch.setattr(ProgressiveUNet, "to", lambda *_, **__: torch.ones(2) @ torch.ones(3))
        with pytest.raises(RuntimeError, match="size"):
            ProgressiveTrainer(model, "cpu")
    monkeypatch.setattr(ProgressiveUNet, "__deepcopy__", lambda *_: torch.empty(HUGE), raising=False)
    with pytest.raises(UserError, match=said):
        ProgressiveTrainer(model, "cpu", average=0.5)  # which holds the weights twice


def test_a_command_that_lacks_memory_says_so_in_one_line(data_root, tmp_path, monkeypatch, capsys):
    path = write_checkpoint(tmp_path / "a.pth", lively_model())
    monkeypatch.setattr(Predictor, "predict", lambda *_: torch.empty(HUGE))
    assert evaluate_papsmear.main([str(path), "--data_root", str(data_root), "--device", "cpu"]) == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: out of memory (")
    assert "tiles" in error
    monkeypatch.setattr(Predictor, "predict", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        evaluate_papsmear.main([str(path), "--data_root", str(data_root), "--device", "cpu"])


def test_a_checkpoint_that_lacks_memory_is_not_called_damaged(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "a.pth", lively_model())
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(HUGE))
    with pytest.raises(RuntimeError, match="memory"):
        load_checkpoint(path)


def test_a_network_larger_than_the_memory_is_refused_before_it_is_made(data_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda: 10 ** 6)
    assert train(data_root, tmp_path, "--base_channels", "64", "--dry_run") == 2
    weights = 4 * sum(p.numel() for p in fake_network(64).parameters())
    assert f"error: --base_channels 64: its weights, gradients and AdamW take {4 * weights / 1e9:.1f} GB, and 0.0 GB " \
           f"of memory are free" in capsys.readouterr().err
    memory.refuse_lack_of_memory(fake_network(1).model_args, torch.device("cuda"))


def fake_network(width: int) -> ProgressiveUNet:
    with torch.device("meta"):
        return ProgressiveUNet(base_channels=width)


def test_a_batch_larger_than_the_memory_is_refused_before_the_run_begins(data_root, tmp_path, monkeypatch):
    trainer, loaders = make_trainer(data_root, tmp_path / "run")
    batch = min(loaders[256][0].batch_size, len(loaders[256][0].dataset))
    monkeypatch.setattr(memory, "free_memory", lambda: 4 * batch * 2 * 256 ** 2)
    memory.refuse_large_batches(trainer, loaders)
    memory.refuse_large_batches(trainer, {256: ([{}],)})
    monkeypatch.setattr(memory, "free_memory", lambda: 4 * batch * 2 * 256 ** 2 - 1)
    with pytest.raises(UserError, match=rf"out of memory at stage 4 \(256x256\) with a batch of {batch} images"):
        trainer.fit(loaders)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [ProgressiveUNet(3, 2, 2), UNet(1, 1, 2)])
def test_memory_is_estimated_without_taking_it_as_it_would_be_taken(model, precision):
    model.set_stage(4)
    state = {tensor.data_ptr() for tensor in model.state_dict().values()}
    kept = {}
    image = torch.zeros(2, model.in_channels, 256, 256)

    def keep(tensor):
        if tensor.data_ptr() not in state:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            devices.autocast(torch.device("cpu"), precision):
        multi_scale_loss(model.eval()(image, return_all_scales=True), torch.zeros(2, model.out_channels, 256, 256))
    assert memory._kept_for_backward(model, 2, precision) == sum(storage.nbytes() for storage in kept.values())


def test_memory_of_many_classes_is_estimated_without_taking_it():
    model = ProgressiveUNet(1, MOST_CHANNELS, 1)
    model.set_stage(4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert memory.training_memory(model, 8, "float32") > 8 * 3 * MOST_CHANNELS * 256 ** 2 * 4
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_CHANNELS * 256 ** 2 * 4


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
