"""A training that is cut off, whatever does it: signals, kills, damaged files, full disks, numbers that are none.

    python -m pytest tests/test_survival.py
"""

import csv
import errno
import functools
import importlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import predict_papsmear
import train_papsmear
from checkpoints import load_checkpoint, load_model, save_checkpoint, untrained_checkpoint
from conftest import (
    ONE_STAGE,
    PROJECT,
    TINY,
    lively_model,
    make_trainer,
    metric_rows,
    roughly_trained,
    tensors_equal,
    words,
    write_checkpoint,
    write_data_set,
)
from images.files import ImageFileError
from images.recipe import DataRecipe
from pap_smear_dataset import create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer
from system.errors import NonFiniteLossError, UserError
from system.signals import StoppedBySignal, noted_signals, terminated_as_interrupted
from tests import kill
from tests.kill import differences, killed_run
from training.run_folder import RunFolder
from unet import build_model


def stop_after(count: int):
    """Return what asks to stop once it was asked so many times."""
    asked = iter(range(count))
    return lambda: 0 if next(asked, None) is not None else signal.SIGTERM


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("survival") / "data", (7, 3, 3))


@pytest.mark.parametrize(("options", "plain"), [({"average": 0.9, "accumulate": 2}, False), ({}, True)],
                         ids=["our loader, averaged, accumulated", "plain loader"])
def test_a_run_that_is_stopped_at_every_step_ends_as_one_that_is_not(options, plain, root, tmp_path):
    """Weights, averages and every column but those of time are equal to the last bit."""
    def trainer_of(name):
        trainer, loaders = make_trainer(root, tmp_path / name, epochs_per_stage=[2, 1, 0, 1], **options)
        if plain:  # shuffled by the generator of torch
            loaders = {r: (DataLoader(loaders[r][0].dataset, 2, shuffle=True), *loaders[r][1:]) for r in loaders}
        return trainer, loaders

    whole, loaders = trainer_of("whole")
    whole.fit(loaders, say=lambda _: None)
    codes, within = set(), 0
    while True:
        trainer, loaders = trainer_of("cut")
        if codes:
            trainer.resume(tmp_path / "cut/last.pth")
        trainer.keeper.asked_to_stop = stop_after(0)
        try:
            trainer.fit(loaders, say=lambda _: None)
            break
        except StoppedBySignal as error:
            codes.add(error.code)
            if position := load_checkpoint(tmp_path / "cut/last.pth")["position"]:
                within += position["done"] > 0
    assert codes == {143}
    assert within >= 2, "in the middle of epochs too"
    assert tensors_equal(whole.model, trainer.model)
    assert tensors_equal(whole.evaluated_model, trainer.evaluated_model)
    assert metric_rows(tmp_path / "whole") == metric_rows(tmp_path / "cut")


def test_last_is_saved_within_an_epoch_when_it_is_time(root, tmp_path):
    trainer, loaders = make_trainer(root, tmp_path / "run", save_minutes=1e-6)
    seen = []
    save = trainer.folder.save_last
    trainer.folder.save_last = lambda checkpoint: (seen.append(checkpoint["position"]), save(checkpoint))
    trainer.train_epoch(loaders[32][0], 0)
    assert [position["done"] for position in seen] == [1, 2], "and at the end of the epoch by `record`"
    rare, loaders = make_trainer(root, tmp_path / "rare", save_minutes=0)
    rare.train_epoch(loaders[32][0], 0)
    assert not (tmp_path / "rare/last.pth").exists()


def test_another_number_of_batches_is_refused(root, tmp_path):
    trainer, loaders = make_trainer(root, tmp_path / "run")
    trainer.keeper.asked_to_stop = stop_after(1)
    with pytest.raises(StoppedBySignal):
        trainer.fit(loaders)
    again, _ = make_trainer(root, tmp_path / "run")
    again.resume(tmp_path / "run/last.pth")
    with pytest.raises(UserError, match="cut off after batch 2 of 3, but the loader has 4 batches"):
        again.train_epoch(DataLoader(loaders[32][0].dataset, 2), 0)
    assert again.position_in_words == ", and batch 2 of 3 of the next", "the right data go on from there"
    again.train_epoch(loaders[32][0], 0)
    assert again.position_in_words == ""


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_weights_for_use_are_not_resumed_from(average, root, tmp_path):
    options = {"epochs_per_stage": [0, 0, 0, 2], "average": average}
    trainer, loaders = make_trainer(root, tmp_path / "run", **options)
    trainer.fit(loaders, say=lambda _: None)
    for name in ("best_stage_4.pth", "final_model.pth"):
        with pytest.raises(UserError, match="it holds the weights of stage 4 alone.*Resume from last.pth"):
            make_trainer(root, **options)[0].resume(tmp_path / "run" / name)
    make_trainer(root, **options)[0].resume(tmp_path / "run/last.pth")


@pytest.mark.parametrize("config", [{np.int64(1): 2}, {"a": {Path("x"): 2}}, {"a": os.terminal_size((1, 2))},
                                    {"a": defaultdict(int)}], ids=["NumPy key", "path as key", "tuple", "dictionary"])
def test_settings_that_could_not_be_loaded_are_refused_before_they_are_saved(config):
    with pytest.raises(UserError, match="checkpoints hold None, bool, int"):
        ProgressiveTrainer(lively_model(), "cpu", config=config)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_noted_and_the_second_stops_at_once(number):
    before = signal.getsignal(number)
    with noted_signals() as came:
        assert came() == 0
        os.kill(os.getpid(), number)
        assert came() == number
        with pytest.raises(StoppedBySignal) as caught:
            signal.raise_signal(number)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("handled", [noted_signals, terminated_as_interrupted])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(handled):
    """As SIGHUP is under nohup: closing the terminal ends no training there."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_a_training_saved_and_says_how_to_go_on(root, tmp_path):
    """With a process that decodes, which gets the signals of a terminal as well."""
    number = signal.SIGTERM
    process = subprocess.Popen(
        [sys.executable, "train_papsmear.py", "--data_root", root, "--output_dir", tmp_path, "--experiment_name", "run",
         *TINY[:2], "--epochs_per_stage", "1,1,1,2000", "--batch_sizes", "32:2,64:2,128:2,256:2", "--cache_images",
         "false", "--num_workers", "1"],
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begin = time.monotonic()
    while not (tmp_path / "run/best_stage_4.pth").exists() and time.monotonic() - begin < 120:
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert f"interrupted; continue with --resume {tmp_path / 'run'}" in said
    assert "Traceback" not in said
    assert load_checkpoint(tmp_path / "run/last.pth")["stage"] == 4


@pytest.mark.parametrize("place", ["progressive_trainer.ProgressiveTrainer.record", "train_papsmear.test"])
def test_a_signal_after_the_last_step_ends_the_command_too(place, root, tmp_path, monkeypatch, capsys):
    module, *names, name = place.split(".")
    owner = functools.reduce(getattr, names, importlib.import_module(module))
    obey = getattr(owner, name)

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return obey(*arguments)
    monkeypatch.setattr(owner, name, signalled)
    run = tmp_path / "run"
    assert train_papsmear.main(words("--data_root", root, "--output_dir", tmp_path, "--experiment_name", "run",
                                     *TINY[:2], "--epochs_per_stage", "0,0,0,1")) == 143
    assert f"interrupted; continue with --resume {run}" in capsys.readouterr().err
    assert (run / "final_model.pth").exists()
    assert not (run / "test_scores.json").exists()
    monkeypatch.setattr(owner, name, obey)
    assert train_papsmear.main(["--resume", str(run)]) == 0
    assert (run / "test_scores.json").exists(), "what was left is done"


def test_a_training_that_is_killed(root, tmp_path, monkeypatch):
    """The short form of `python tests/kill.py`."""
    monkeypatch.setattr(kill, "RECIPE", [*TINY[:2], "--epochs_per_stage", "1,0,0,1", "--batch_sizes", "32:2,256:2",
                                         "--average", "0.9", "--save_minutes", "0.002"])
    begin = time.monotonic()
    killed_run(root, tmp_path / "whole", 0, 0, 0)
    took = time.monotonic() - begin
    for part in (0.9, 0.5, 0.3):  # another run may be faster, and end before it is killed
        folder = tmp_path / f"cut_{part}"
        if killed_run(root, folder, 1, part * took, seed=1):
            break
    else:
        pytest.fail("no run was killed")
    assert differences(folder, tmp_path / "whole") == []


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    """A bit of a tensor, of the description, of the directory: refused, or it changes nothing that is read."""
    path = write_checkpoint(tmp_path / "a.pth", lively_model())
    right, content = load_model(path), path.read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(150):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        (tmp_path / "b.pth").write_bytes(
            content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:])
        try:
            found = load_model(tmp_path / "b.pth")
        except UserError:
            refused += 1
            continue
        assert tensors_equal(right, found)
    assert refused > 75


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 50_000_000)
    with pytest.raises(UserError, match="unpacks to 50000000; a checkpoint is not compressed"):
        load_checkpoint(tmp_path / "a.pth")


EDITS = {
    "base_channels": ({"model_args": {"base_channels": 100_000}}, "model_args is {.*; it must be the arguments of"),
    "narrower": ({"model_args": {"base_channels": 2}}, "its weights do not fit the network they say they are for"),
    "a further argument": ({"model_args": {"depth": 3}}, "it must be the arguments of unet.build_model"),
    "targets of a number": ({"data": {"targets": 5}}, "Use the version of the project that wrote it"),
    "no targets": ({"data": {"targets": ()}}, "targets is"),
    "threshold": ({"threshold": 7}, "threshold is 7; it must be a number between 0 and 1"),
    "threshold of none": ({"threshold": float("nan")}, "threshold is nan"),
    "stage": ({"stage": 5}, "stage is 5; it must be a whole number from 1 to 4"),
    "standard deviation of 0": ({"data": {"mean": (0.5,), "std": (0.0,)}}, "std is .*; it must be finite numbers"),
    "channels": ({"data": {"in_channels": 3}}, "its network has 1 channels in and 1 out, its data recipe 3 and 1"),
    "ranges": ({"data": {"training_ranges": {"area": (1,)}}}, "training_ranges is .*; it must be the lowest and"),
    "ranges, reversed": ({"data": {"training_ranges": {"area": (2, 1)}}}, "training_ranges is .*; it must be the low"),
    "white": ({"data": {"max_value": 2 ** 70}}, "max_value is .*; it must be a whole number from 0 to"),
    "size of a pixel": ({"data": {"microns_per_pixel": 1e300}}, "microns_per_pixel is .*; it must be 0, or a number"),
    "name of a class": ({"data": {"class_names": "a"}}, "class_names is 'a'; it must be a list"),
    "name of two lines": ({"data": {"class_names": ("a\nb",)}}, "class_names is .*; it must be a name a class, here 1"),
    "epoch": ({"epoch": 10 ** 30}, "epoch is 1.*; it must be a whole number from 0 to"),
    "no epoch": ({"plan": {"epochs": {4: 0}, "lr": 1.0, "schedule": "run", "old_lr_scale": 1.0}}, "plan is .*; it"),
    "row of an endless epoch": ({"history": [{"stage": "1", "epoch": "9" * 5000}]}, "history is .*; it must be"),
    "plan": ({"plan": {"epochs": {}}}, "plan is .*; it must be epochs by stage"),
    "rate": ({"plan": {"epochs": {4: 1}, "lr": "x", "schedule": "run", "old_lr_scale": 1.0}}, "plan is .*; it must be"),
    "model": ({"model": {"a": 3}}, "model is .*; it must be tensors by name"),
    "kind of network": ({"model_args": {"model": []}}, "model_args is {.*; it must be the arguments of"),
    "sparse tensor": ({"model": {"a": torch.zeros(1).to_sparse()}}, "model is .*; it must be tensors by name, dense"),
    "variance": ({"model": {"a.running_var": -torch.ones(1)}}, "of which no variance is below 0"),
    "random states": ({"random_states": {"cpu": torch.zeros(5056, dtype=torch.uint8)}}, "random_states is .*; it must"),
    "row of nothing": ({"history": [{}]}, "history is .*; it must be the rows of metrics.csv"),
    "row of numbers": ({"history": [{"stage": 1, "epoch": 1}]}, "history is .*; it must be the rows of metrics.csv"),
    "config": ({"config": [1]}, r"config is \[1\]; it must be a dictionary"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_checkpoint_is_refused_by_field_and_rule(kind, tmp_path):
    changes, message = EDITS[kind]
    path = write_checkpoint(tmp_path / "a.pth", lively_model())
    stored = torch.load(path, weights_only=True)
    for name, change in changes.items():
        whole = name in ("plan", "model", "config", "random_states") or not isinstance(change, dict)
        stored[name] = change if whole else stored[name] | change
    torch.save(stored, path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("keys", "value", "said"), [
    (["optimizer", "param_groups"], [], "its optimizer cannot be of this network"),
    (["optimizer", "param_groups", 0, "born"], 3, "its optimizer cannot be of this network"),
    (["optimizer", "param_groups", 0, "weight_decay"], "x", "its optimizer cannot be of this network"),
    (["optimizer", "state"], 5, "its optimizer cannot be of this network"),
    (["optimizer", "state", 0, "exp_avg"], torch.zeros(3), r"exp_avg of parameter 0 is \(3,\)"),
    (["optimizer", "state", 0], {}, "its optimizer cannot be of this network"),
    (["optimizer", "state", 1000], {"exp_avg": torch.zeros(1)}, "its optimizer cannot be of this network"),
    (["position"], {"done": 1}, "position is .*; it must be where an epoch stands"),
    (["time_limit"], {"elapsed": 1.0, "spent": {"a": 1}}, "time_limit is .*; it must be 'elapsed' and, by stage"),
    (["averaged"], {"model": {}, "updates": {1: "x"}}, "averaged is .*; it must be a dictionary with 'model'"),
    (["averaged"], {"model": {"a": torch.zeros(1)}, "updates": {}}, "its averaged weights cannot be of this network"),
])
def test_what_a_run_goes_on_with_is_of_its_network(keys, value, said, trained_run, tmp_path):
    path = tmp_path / "last.pth"
    stored = inner = torch.load(trained_run[0] / "last.pth", weights_only=True)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    torch.save(stored, path)
    trainer = ProgressiveTrainer(build_model(stored["model_args"]), "cpu", average=0.9 if keys == ["averaged"] else 0.0)
    with pytest.raises(UserError, match=said) as caught:
        trainer.resume(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_last_is_replaced_by_the_one_before(root, trained_run, tmp_path, capsys):
    folder = shutil.copytree(trained_run[0], tmp_path / "run")
    content = bytearray((folder / "last.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "last.pth").write_bytes(content)
    (folder / "test_scores.json").unlink()
    (folder / "metrics.csv").write_bytes((folder / "metrics.csv").read_bytes()[:200] + b"\0\0")
    assert train_papsmear.main(["--resume", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "last.pth: damaged: the checksum of its part" in said
    assert said.count(f"going on from {folder / 'previous.pth'}") == 1
    assert metric_rows(folder) == metric_rows(trained_run[0]), "and the torn table is whole again"
    assert tensors_equal(load_model(folder / "final_model.pth"), load_model(trained_run[0] / "final_model.pth"))


def test_a_rate_that_overflows_saves_nothing_that_is_not_finite(root, tmp_path, capsys):
    code = train_papsmear.main(["--data_root", str(root), "--output_dir", str(tmp_path), "--experiment_name", "run",
                                *TINY, "--lr", "1e30", "--precision", "float32"])
    assert code == 1
    assert "Try a lower --lr" in capsys.readouterr().err
    for path in (tmp_path / "run").glob("*.pth"):
        state = load_checkpoint(path)["model"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_after_a_refused_batch_everything_is_as_at_the_last_step(root, tmp_path):
    trainer, loaders = make_trainer(root, tmp_path / "run", accumulate=2)
    batches = list(loaders[32][0])
    trainer.train_epoch(batches_of(batches[:2], loaders), 0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    moments = [p.clone() for state in trainer.optimizer.state.values() for p in state.values()]
    bad = {**batches[1], "image": torch.full_like(batches[1]["image"], float("nan"))}
    with pytest.raises(NonFiniteLossError, match="batch 2"):
        trainer.train_epoch(batches_of([batches[0], bad], loaders), 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(
        moments, [p for state in trainer.optimizer.state.values() for p in state.values()], strict=True))
    assert all(p.grad is None for p in trainer.model.parameters())
    saved = np.load(tmp_path / "run/refused_batch.npz")
    assert np.isnan(saved["image"]).all()
    assert list(saved["names"]) == bad["name"]


def test_a_gradient_that_is_none_changes_nothing(root):
    trainer, loaders = make_trainer(root)
    trainer.train_epoch(loaders[32][0], 0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    handle = weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteLossError, match="norm of the gradients at stage 1, epoch 2, batch 1"):
        trainer.train_epoch(loaders[32][0], 1)
    handle.remove()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


class batches_of(list):
    """Batches as a loader that carries the recipe of another one."""

    def __init__(self, batches, loaders):
        super().__init__(batches)
        self.recipe = loaders[32][0].recipe


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path):
    model = roughly_trained(1)
    path = tmp_path / "a.pth"
    save_checkpoint(path, untrained_checkpoint(model, data=DataRecipe()))
    before = path.read_bytes()
    next(buffer for name, buffer in model.named_buffers() if "running_var" in name).fill_(float("inf"))
    with pytest.raises(NonFiniteLossError, match="running_var.* holds numbers that are infinite or none"):
        save_checkpoint(path, untrained_checkpoint(model, data=DataRecipe()))
    assert path.read_bytes() == before


def test_two_processes_in_one_run_folder(root, trained_run, tmp_path, capsys):
    folder = shutil.copytree(trained_run[0], tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", "import sys; from training.run_folder import RunFolder; "
                               "RunFolder(sys.argv[1]).lock(); print('locked', flush=True); sys.stdin.read()", folder],
                              cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    for arguments in (["--resume", folder], ["--data_root", root, "--output_dir", tmp_path, "--experiment_name", "run",
                                             "--overwrite", *TINY]):
        assert train_papsmear.main(list(map(str, arguments))) == 2
        assert "another process is writing into this run folder" in capsys.readouterr().err
    assert metric_rows(folder) == metric_rows(trained_run[0])
    holder.kill()
    holder.wait()
    RunFolder(folder).lock()  # a dead process leaves no lock


def test_files_of_a_user_stay(tmp_path):
    mine = ["stage_1_epoch_2_good.pth", "stage_final_epoch_best.pth", ".my.pth.old.tmp", "notes.txt"]
    for name in (*mine, "stage_1_epoch_2.pth", "stage_1_epoch_4.pth", "last.pth", ".last.pth.a1b2c3d4.tmp"):
        (tmp_path / name).write_bytes(b"x")
    RunFolder(tmp_path, keep=1).prune()
    assert sorted(path.name for path in tmp_path.glob("stage_1_*")) == ["stage_1_epoch_2_good.pth",
                                                                        "stage_1_epoch_4.pth"]
    RunFolder(tmp_path, overwrite=True).claim()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, ".lock"])


def test_a_full_disk_ends_with_code_3_and_what_to_do(root, tmp_path, monkeypatch, capsys):
    """At the second save of last.pth the disk is full; then there is room again, and the run goes on."""
    arguments = ["--data_root", str(root), "--output_dir", str(tmp_path), "--experiment_name", "run", *TINY,
                 "--epochs_per_stage", "0,0,0,2"]
    save, count = torch.save, [0]

    def full(content, file):
        count[0] += 1
        if count[0] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    assert train_papsmear.main(arguments) == 3
    said = capsys.readouterr().err
    assert "No space left on device. What was saved last is whole. Make room or mend the disk, then continue" in said
    monkeypatch.undo()
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert train_papsmear.main(["--resume", str(tmp_path / "run")]) == 0


def test_logs_and_pictures_that_cannot_be_written_end_no_training(root, tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunFolder, "logs", refused)
    monkeypatch.setattr("training.run_folder.training_curves", refused)
    trainer, loaders = make_trainer(root, tmp_path / "run")
    trainer.fit(loaders, say=lambda _: None)
    said = capsys.readouterr().out
    assert "warning: the logs for TensorBoard cannot be written (No space left on device); the training goes" in said
    assert "warning: training_curves.png cannot be written" in said
    assert (tmp_path / "run/final_model.pth").is_file()


def test_a_folder_that_is_removed_is_not_made_anew(root, tmp_path):
    trainer, loaders = make_trainer(root, tmp_path / "run")
    train = trainer.train_epoch(loaders[32][0], 0)
    valid = trainer.validate_epoch(loaders[32][1], 0)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="the run folder was removed while the run was writing into it"):
        trainer.record(train, valid)
    assert not (tmp_path / "run").exists()


def test_a_command_whose_folder_is_removed_says_so(root, tmp_path, monkeypatch, capsys):
    def removed_first(trainer, *arguments):
        shutil.rmtree(trainer.folder.path)
        record(trainer, *arguments)

    record = ProgressiveTrainer.record
    monkeypatch.setattr(ProgressiveTrainer, "record", removed_first)
    assert train_papsmear.main(["--data_root", str(root), "--output_dir", str(tmp_path), "--experiment_name", "run",
                                *ONE_STAGE]) == 3
    assert capsys.readouterr().err.endswith(f"{tmp_path / 'run'}: the run folder was removed while the run was writing "
                                            "into it, and nothing of the run is left. Start it again\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["cut", "nothing", "no header", "zeros"])
def test_a_torn_table_is_whole_again_after_a_resume(damage, root, tmp_path):
    trainer, loaders = make_trainer(root, tmp_path / "run")
    for epoch in range(2):
        trainer.record(trainer.train_epoch(loaders[32][0], epoch), trainer.validate_epoch(loaders[32][1], epoch))
    path = tmp_path / "run/metrics.csv"
    whole = path.read_text()
    path.write_text({"cut": whole[:-40], "nothing": "", "no header": whole.partition("\n")[2],
                     "zeros": whole[:-40] + "\0" * 40}[damage])
    again, _ = make_trainer(root, tmp_path / "run")
    again.resume(tmp_path / "run/last.pth")
    assert list(csv.DictReader(io.StringIO(path.read_text()))) == list(csv.DictReader(io.StringIO(whole)))


def test_a_network_that_answers_none_is_an_error(root, tmp_path, capsys):
    model = lively_model()
    checkpoint = untrained_checkpoint(model, data=DataRecipe(mean=(0.5,), std=(1e-30,)))
    save_checkpoint(tmp_path / "a.pth", checkpoint)
    stored = torch.load(tmp_path / "a.pth", weights_only=True)
    stored["model"] = {name: tensor * float("nan") if name.endswith("bias") else tensor
                       for name, tensor in stored["model"].items()}
    torch.save(stored, tmp_path / "a.pth")
    assert predict_papsmear.main([str(tmp_path / "a.pth"), str(root / "test/images"), "--out", str(tmp_path / "o")]) > 0
    assert "holds numbers that are infinite or none" in capsys.readouterr().err


def test_settings_of_the_run_are_kept_in_json(root, tmp_path):
    trainer, loaders = make_trainer(root, tmp_path / "run", config={"a": 1})
    trainer.train_epoch(loaders[32][0], 0)
    assert json.loads((tmp_path / "run/config.json").read_text())["a"] == 1


def test_a_damaged_image_in_a_worker_is_one_sentence(root, tmp_path):
    place = shutil.copytree(root, tmp_path / "data")
    loader = create_progressive_dataloaders(place, {32: 1}, cache_images=False, num_workers=1)[32][0]
    (place / "train/images/train_3.png").write_bytes(b"damaged")
    with pytest.raises(ImageFileError, match="train_3.png") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)


def test_a_worker_that_is_killed_ends_the_training_in_one_sentence(root, tmp_path, monkeypatch, capsys):
    train = ProgressiveTrainer.train_epoch

    def killing(trainer, loader, epoch):
        if trainer.model.stage == 2:
            next(iter(loader))
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(1)
        return train(trainer, loader, epoch)

    monkeypatch.setattr(ProgressiveTrainer, "train_epoch", killing)
    assert train_papsmear.main(["--data_root", str(root), "--output_dir", str(tmp_path), "--experiment_name", "run",
                                "--cache_images", "false", "--num_workers", "1", *TINY]) == 2
    said = capsys.readouterr().err
    assert "a process that decodes images has died (DataLoader worker" in said
    assert f"Continue with --resume {tmp_path / 'run'} --num_workers 0" in said
    assert said.count("\n") == 1
