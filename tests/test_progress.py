"""Tests of what is said while a training runs: the bar on a terminal, the time left, the time before it begins."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading

import pytest
import torch

import train_papsmear
from conftest import ONE_STAGE, PROJECT, TINY, make_trainer, run_script
from progressive_trainer import ProgressiveTrainer
from system.text import duration
from training import duration as estimates
from training import run_bar
from training.duration import expected_seconds
from training.run_bar import RunBar
from training.schedule import WORK
from unet import ProgressiveUNet

FAST = {"OMP_NUM_THREADS": "1"}


def on_terminal(*arguments) -> tuple[str, str]:
    """Run `python ARGUMENTS` with a terminal of 100 columns for its errors; return what it printed and showed there."""
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 100))
    said: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(here, 65536):
                said.append(part)
        except OSError:  # so Linux says that it is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=PROJECT, stdout=subprocess.PIPE,
                               stderr=there, text=True, env=os.environ | FAST)
    os.close(there)
    printed, _ = process.communicate(timeout=300)
    reader.join()
    os.close(here)
    assert process.returncode == 0, printed
    return printed, b"".join(said).decode()


def test_a_terminal_shows_one_bar_over_the_run_and_a_file_none(shared_root, tmp_path):
    printed, shown = on_terminal("train_papsmear.py", "--data_root", shared_root, "--output_dir", tmp_path,
                                 "--experiment_name", "a", *TINY[:2], "--epochs_per_stage", "2,1,1,1", *TINY[4:])
    bars = [line for line in re.split(r"[\r\n]", shown) if line.startswith("stage ")]
    assert all(len(line) <= 100 for line in bars)
    shares = [int(re.search(r"(\d+)%", line)[1]) for line in bars]
    assert shares == sorted(shares), "one bar that only goes on, not one for each epoch"
    assert shares[-1] == 100
    assert any(re.match(r"stage 4 \(256\) epoch 1/1 .* left, dice 0\.\d+, valid \d\.\d+", line) for line in bars), bars
    after_first = 100 * WORK[1] // (2 * WORK[1] + WORK[2] + WORK[3] + WORK[4])
    ends = [share for line, share in zip(bars, shares, strict=True) if "stage 1 (32) epoch 1/2" in line]
    assert ends[-1] in (after_first, after_first + 1), "operations, not epochs, of which it is a fifth"
    assert "validate" not in shown
    lines = [line for line in printed.splitlines() if line.startswith("stage ")]
    assert len(lines) == 5
    assert all(re.search(r"images/s  about \d+ s left$", line) for line in lines[1:-1])
    assert lines[-1].endswith("images/s")
    assert "\r" not in printed


def test_no_terminal_no_bar(shared_root, tmp_path):
    done = run_script("train_papsmear.py", "--data_root", shared_root, "--output_dir", tmp_path, *ONE_STAGE,
                      environment=FAST)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\r" not in done.stdout
    assert "%|" not in done.stdout


class Run:
    """What a bar asks of a trainer, with one number for the clock."""

    time_limit = None

    def __init__(self, root):
        self.trainer, _ = make_trainer(root, epochs_per_stage=[10, 0, 0, 5])
        self.model, self.plan = self.trainer.model, self.trainer.plan


def test_the_time_left_follows_the_operations(shared_root, monkeypatch):
    clock, said = [100.0], []
    monkeypatch.setattr(run_bar.time, "monotonic", lambda: clock[0])
    run = Run(shared_root)
    whole = 10 * WORK[1] + 5 * WORK[4]
    with RunBar(run, said.append) as bar:
        bar.enter(0)
        assert bar.left() is None
        assert bar.left_in_words() == ""
        clock[0] += 20
        bar.advance(2.0, dict)
        assert bar.left() == pytest.approx((whole - 2 * WORK[1]) * 20 / (2 * WORK[1]))
        assert said == []
        clock[0] += 20
        bar.advance(4.0, dict)
        bar.advance(4.5, dict)
        assert len(said) == 1, "once, after half a minute"
        assert re.fullmatch(r"about \d+ min left, by the speed of the first steps", said[0])
        clock[0] += 60
        bar.advance(10.0, dict)
        run.model.set_stage(4)
        bar.enter(0)
        assert bar.left() == pytest.approx(5 * WORK[4] * 100 / (10 * WORK[1])), "as the run so far"
        clock[0] += 50
        bar.advance(1.0, dict)
        assert bar.left() == pytest.approx(4 * 50), "as this stage so far"
        bar.advance(5.0, dict)
        assert bar.left_in_words() == ""


def test_with_a_time_limit_what_is_left_of_it(shared_root):
    run = Run(shared_root)
    run.time_limit = type("Limit", (), {"left": 90.0})
    with RunBar(run) as bar:
        bar.enter(0)
        assert bar.left_in_words() == "about 90 s left"


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (119, "119 s"), (121, "2 min"), (7199, "120 min"),
                                                (7201, "2.0 hours"), (36_001, "10 hours")])
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_the_estimate_counts_operations_and_changes_nothing(shared_root, monkeypatch):
    trainer, loaders = make_trainer(shared_root, epochs_per_stage=[3, 0, 2, 1])
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    state, pristine = torch.get_rng_state(), trainer.model.training
    assert expected_seconds(trainer, loaders) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training == pristine
    assert all(p.grad is None for p in trainer.model.parameters())
    monkeypatch.setattr(estimates, "_seconds_per_image", lambda *_: 0.5)
    an_epoch = 6 + 3 / 3  # images that are trained on, and a third of those that are validated
    work = 3 * WORK[1] + 2 * WORK[3] + WORK[4]
    assert expected_seconds(trainer, loaders) == pytest.approx(0.5 * an_epoch * work / WORK[1])
    trainer.set_stage(3)
    trainer.course.finished_epochs, trainer.course.begun = 1, True
    assert expected_seconds(trainer, loaders) == pytest.approx(0.5 * an_epoch * (WORK[3] + WORK[4]) / WORK[3])


def test_a_step_on_small_images_stands_for_one_on_large_ones(monkeypatch):
    """The clock goes on by a second for each million pixels that the network sees."""
    clock, seen = [0.0], []

    def forward(batch, network):
        seen.append(tuple(batch["image"].shape))
        clock[0] += batch["image"].numel() / 1e6
        return None, None, torch.zeros((), requires_grad=True)

    monkeypatch.setattr(estimates.time, "monotonic", lambda: clock[0])
    trainer = ProgressiveTrainer(ProgressiveUNet(base_channels=2), "cpu")
    monkeypatch.setattr(trainer, "forward", forward)
    for stage, side in ((1, 32), (4, 256)):
        trainer.model.set_stage(stage)
        assert estimates._seconds_per_image(trainer, trainer.model, 8) == pytest.approx(side ** 2 / 1e6)
    assert set(seen) == {(4, 1, 32, 32), (4, 1, 64, 64)}


def test_a_training_says_first_how_long_it_takes(shared_root, tmp_path, capsys, monkeypatch):
    command = ["--data_root", str(shared_root), "--output_dir", str(tmp_path), "--dry_run", "--device", "cpu",
               "--base_channels", "32"]
    monkeypatch.setattr(estimates, "_seconds_per_image", lambda trainer, *_: trainer.model.base_channels / 64)
    assert train_papsmear.main(command) == 0
    said = capsys.readouterr().out
    seconds = 50 * 7 * sum(WORK.values()) / WORK[1] / 2  # more than half an hour
    assert f"time: {duration(seconds)} to {duration(2 * seconds)} on this machine" in said
    quick = 7 * (30 * WORK[1] + 18 * WORK[2] + 30 * WORK[3] + 15 * WORK[4]) / WORK[1] / 4
    assert f"--preset quick takes {duration(quick)} to {duration(2 * quick)}: 16 channels" in said
    for options in (["--preset", "quick"], ["--epochs_per_stage", "1"], ["--max_minutes", "5", "--base_channels", "2"]):
        assert train_papsmear.main(command + options) == 0
        said = capsys.readouterr().out
        assert "--preset quick takes" not in said
        assert ("on this machine, as busy" in said) == ("--max_minutes" not in options)


def fit_interrupted(trainer, loaders, method: str, monkeypatch, number: int = 1) -> None:
    """Train until the `number`-th call of a trainer's method, which ends as by Ctrl-C."""
    calls, original = [], getattr(trainer, method)

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(loaders, say=lambda line: None)


@pytest.mark.parametrize("method", ["forward", "validate_epoch"])
def test_an_interruption_before_anything_is_saved_leaves_no_folder(method, shared_root, tmp_path, monkeypatch):
    output = tmp_path / "outputs" / "runs" / "a"
    trainer, loaders = make_trainer(shared_root, output)
    fit_interrupted(trainer, loaders, method, monkeypatch)
    assert list(tmp_path.iterdir()) == []
    again, loaders = make_trainer(shared_root, output, epochs_per_stage=[1, 0, 0, 1])
    again.fit(loaders, say=lambda line: None)
    assert (output / "config.json").is_file()
    assert (output / "final_model.pth").is_file()


def test_the_same_trainer_begins_again_after_an_interruption(shared_root, tmp_path, monkeypatch):
    trainer, loaders = make_trainer(shared_root, tmp_path / "a", epochs_per_stage=[1, 0, 0, 1])
    fit_interrupted(trainer, loaders, "forward", monkeypatch)
    trainer.fit(loaders, say=lambda line: None)
    assert (tmp_path / "a/config.json").is_file()


def test_what_was_there_before_stays_at_an_interruption(shared_root, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").write_text("mine")
    trainer, loaders = make_trainer(shared_root, tmp_path / "a")
    fit_interrupted(trainer, loaders, "forward", monkeypatch)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes.txt"]


def test_what_was_saved_stays_at_an_interruption(shared_root, tmp_path, monkeypatch):
    trainer, loaders = make_trainer(shared_root, tmp_path / "a")
    fit_interrupted(trainer, loaders, "validate_epoch", monkeypatch, 2)
    assert (tmp_path / "a/last.pth").is_file()
    resumed, _ = make_trainer(shared_root)
    resumed.resume(tmp_path / "a/last.pth")
    assert resumed.finished_epochs == 1


def test_a_run_that_is_refused_for_lack_of_time_leaves_no_folder(shared_root, tmp_path, capsys):
    assert train_papsmear.main(["--data_root", str(shared_root), "--output_dir", str(tmp_path / "outputs"),
                                "--max_minutes", "0.01", "--base_channels", "2", "--device", "cpu"]) == 2
    assert "pay for no epoch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["train_papsmear.open_data", "training.time_limit.seconds_of_pass"])
def test_ctrl_c_of_a_command_before_the_first_step(place, shared_root, tmp_path):
    """Sent by the command to itself where the data are read, or where the speed of the stages is measured."""
    module, _, name = place.rpartition(".")
    code = (f"import os, signal, sys, train_papsmear, {module} as module\noriginal, sent = module.{name}, []\n"
            f"def interrupted(*arguments):\n"
            f"    if not sent:\n        sent.append(os.kill(os.getpid(), signal.SIGINT))\n"
            f"    return original(*arguments)\n"
            f"module.{name} = interrupted\nsys.exit(train_papsmear.main(sys.argv[1:]))")
    done = run_script("-c", code, "--data_root", shared_root, "--output_dir", tmp_path / "outputs", "--device", "cpu",
                      "--experiment_name", "a", "--base_channels", "2", "--max_minutes", "9", environment=FAST)
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert ("nothing was saved yet, and nothing is left of it" in done.stderr) == ("seconds_of_pass" in place)
