"""Tests of the experiments that users run on their own data.

    python -m pytest tests/test_experiments.py
"""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import experiments
from conftest import ONE_STAGE, PROJECT, run_script, words, write_checkpoint
from images.pyramid import open_pyramids
from system import machine
from unet import ProgressiveUNet

EXPERIMENTS = PROJECT / "benchmarks/experiments.py"


def test_the_fine_tuning_curve_compares_both_starts_on_the_same_images(trained_run, shared_root, tmp_path):
    out = tmp_path / "curve"
    done = run_script(EXPERIMENTS, "finetune", trained_run[0] / "best_stage_4.pth", "--data_root", shared_root,
                      "--counts", "2,4", "--seeds", "1", "--steps", "2", "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(out / "finetune.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["images"], row["start"]) for row in rows] == [("0", "from the checkpoint")] + [
        (count, start) for count in "24" for start in ("from scratch", "from the checkpoint")]
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)
    assert Image.open(out / "finetune.png").size[0] > 600
    assert "3 test images" in done.stdout
    again = run_script(EXPERIMENTS, "finetune", trained_run[0] / "best_stage_4.pth", "--data_root", shared_root,
                       "--out", out)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize(("options", "message"), [
    (("--counts", "2,400"), "has 6 training images"), (("--counts", "9,4"), "rising whole numbers"),
    (("--seeds", "0"), "whole number of at least 1")])
def test_what_the_curve_cannot_be_measured_with_is_refused(options, message, trained_run, shared_root, tmp_path,
                                                           capsys):
    assert experiments.main(words("finetune", trained_run[0] / "best_stage_4.pth", "--data_root", shared_root, "--out",
                                  tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_checkpoint_of_an_early_stage_is_refused(shared_root, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "a.pth", ProgressiveUNet(base_channels=4))
    assert experiments.main(words("finetune", path, "--data_root", shared_root, "--out", tmp_path / "out")) == 2
    assert "its stage is 1" in capsys.readouterr().err


def test_fine_tuning_keeps_freed_memory(trained_run, shared_root, tmp_path, monkeypatch, capsys):
    kept = []

    def interrupted(*args):
        assert kept == ["here"]
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "keep_freed_memory", lambda: kept.append("here"))
    monkeypatch.setattr(experiments, "train_and_score", interrupted)
    assert experiments.main(["finetune", str(trained_run[0] / "best_stage_4.pth"), "--data_root", str(shared_root),
                             "--counts", "2", "--out", str(tmp_path), "--device", "cpu"]) == 130


def test_a_subset_holds_the_images_asked_for(shared_root):
    everything = open_pyramids(shared_root, wanted=("train",))["train"]
    some = everything.subset([4, 1])
    assert some.names == [everything.names[4], everything.names[1]]
    assert np.array_equal(some.batch(64, np.array([0]))[0], everything.batch(64, np.array([4]))[0])


# ---- bfloat16 against float32


def precision_rows(differences: dict[int, dict[str, float]]) -> list[dict]:
    """Rows of precision.csv with these differences: seed -> image -> difference, beside a float32 Dice of 0.5."""
    return [{"seed": seed, "image": image, "dice_bfloat16": 0.5 + value, "dice_float32": 0.5, "difference": value}
            for seed, by_image in differences.items() for image, value in by_image.items()]


def test_difference_of_precisions_is_that_of_made_up_rows():
    summary = experiments.precision_summary(precision_rows({0: {"a": 0.02, "b": -0.01}, 1: {"a": 0.04, "b": -0.03}}))
    assert (summary["images"], summary["seeds"]) == (2, 2)
    assert summary["dice"] == {"bfloat16": pytest.approx(0.505), "float32": 0.5}
    # Means over seeds are 0.03 and -0.02; of four draws out of two images one has the first alone, one the second.
    assert [summary["difference"][key] for key in ("difference", "low", "high")] == pytest.approx([0.005, -0.02, 0.03])
    pairs = summary["difference_of_pairs"]
    assert pairs["difference"] == pytest.approx(0.005)
    assert -0.03 <= pairs["low"] < -0.02 < 0.03 < pairs["high"] <= 0.04
    assert summary["difference_of_seeds"] == pytest.approx([0.005, 0.005])
    assert not summary["within_margin"], "the mean does, its interval does not"
    assert "+0.0050 (95 % interval -0.0200 to +0.0300) over 2 images, which does not lie within 0.01" in \
        experiments.precision_sentence(summary)


@pytest.mark.parametrize(("value", "within"), [(0.009, True), (-0.009, True), (0.011, False), (-0.011, False)])
def test_a_constant_difference_has_an_interval_of_no_width(value, within):
    summary = experiments.precision_summary(precision_rows({s: dict.fromkeys("abc", value) for s in range(3)}))
    assert summary["difference"]["low"] == pytest.approx(value) == summary["difference"]["high"]
    assert summary["within_margin"] is within


def test_both_precisions_are_trained_and_scored(shared_root, tmp_path):
    out = tmp_path / "precision"
    done = run_script(EXPERIMENTS, "precision", "--data_root", shared_root, "--preset", "quick", *ONE_STAGE,
                      "--seeds", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    with open(out / "precision.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["image"]) for row in rows] == [("0", f"test_{i}") for i in range(3)]
    for row in rows:
        found = float(row["dice_bfloat16"]) - float(row["dice_float32"])
        assert float(row["difference"]) == pytest.approx(found, abs=1e-6)
    summary = json.loads((out / "precision.json").read_text())
    found = np.mean([float(row["difference"]) for row in rows])
    assert summary["difference"]["difference"] == pytest.approx(found, abs=1e-6)
    assert [len(seconds) for seconds in summary["seconds"].values()] == [1, 1]
    assert summary["settings"]["base_channels"] == 4, "an option beats the preset, as in training"
    assert summary["settings"]["lr"] == 2e-3
    for precision in ("bfloat16", "float32"):
        config = json.loads((out / f"seed_0_{precision}/config.json").read_text())
        assert config["resolved"]["precision"] == precision
        assert f"seed 0, {precision}" in done.stdout
    assert done.stdout.count("12 source images in all") == 1, "the report on the data is not repeated"


def test_finished_trainings_are_in_the_table_when_interrupted(shared_root, tmp_path, capsys, monkeypatch):
    asked = []

    def train(settings):
        asked.append((settings.seed, settings.precision, settings.lr))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return [{"image": name, "dice": 0.25 * len(asked)} for name in "ab"], 1.0
    monkeypatch.setattr(experiments, "train_as_asked", train)
    command = ["precision", "--data_root", str(shared_root), "--lr", "0.5", "--seeds", "2", "--out", str(tmp_path)]
    assert experiments.main(command) == 130
    assert "finished trainings are in the table" in capsys.readouterr().err
    assert asked == [(0, "bfloat16", 0.5), (0, "float32", 0.5), (1, "bfloat16", 0.5), (1, "float32", 0.5)]
    assert (tmp_path / "precision.csv").read_text().splitlines() == [
        "seed,image,dice_bfloat16,dice_float32,difference", "0,a,0.25,0.5,-0.25", "0,b,0.25,0.5,-0.25", "1,a,0.75,,",
        "1,b,0.75,,"]
    assert experiments.main(command) == 2
    assert "precision.csv: exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (("--seed", "3"), "--seed is decided by the experiment"), (("--resume=a",), "--resume is decided"),
    (("--lr", "fast"), "is not a number"), (("--speed", "3"), "unrecognized arguments: --speed 3"),
    (("--data_root", "nowhere"), "nowhere")])
def test_what_precision_cannot_be_measured_with_is_refused(options, message, tmp_path, capsys):
    assert experiments.main(["precision", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()
    assert experiments.main(["finetune", "a.pth", "--data_root", "data", "--out", "a", "--speed", "3"]) == 2
    assert "unrecognized arguments: --speed 3" in capsys.readouterr().err
