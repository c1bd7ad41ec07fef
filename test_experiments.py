"""Tests of the experiments that users run on their own data.

    python -m pytest test_experiments.py
    python test_experiments.py
"""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import run_script, write_checkpoint
from image_pyramid import open_pyramids
from unet import ProgressiveUNet


def test_the_fine_tuning_curve_compares_both_starts_on_the_same_images(trained_run, shared_root, tmp_path):
    out = tmp_path / "curve"
    done = run_script("experiments.py", "finetune", trained_run[0] / "best_stage_4.pth", "--data_root", shared_root,
                      "--counts", "2,4", "--seeds", "1", "--steps", "2", "--out", out)
    assert done.returncode == 0, done.stderr
    with open(out / "finetune.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["images"], row["start"]) for row in rows] == [("0", "from the checkpoint")] + [
        (count, start) for count in "24" for start in ("from scratch", "from the checkpoint")]
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)
    assert Image.open(out / "finetune.png").size[0] > 600
    assert "3 test images" in done.stdout
    again = run_script("experiments.py", "finetune", trained_run[0] / "best_stage_4.pth", "--data_root", shared_root,
                       "--out", out)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize(("options", "message"), [
    (("--counts", "2,400"), "has 6 training images"), (("--counts", "9,4"), "rising whole numbers"),
    (("--seeds", "0"), "whole number of at least 1")])
def test_what_the_curve_cannot_be_measured_with_is_refused(options, message, trained_run, shared_root, tmp_path):
    done = run_script("experiments.py", "finetune", trained_run[0] / "best_stage_4.pth", "--data_root", shared_root,
                      "--out", tmp_path / "out", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_checkpoint_of_an_early_stage_is_refused(shared_root, tmp_path):
    path = write_checkpoint(tmp_path / "a.pth", ProgressiveUNet(base_channels=4))
    done = run_script("experiments.py", "finetune", path, "--data_root", shared_root, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "its stage is 1" in done.stderr


def test_a_subset_holds_the_images_asked_for(shared_root):
    everything = open_pyramids(shared_root, wanted=("train",))["train"]
    some = everything.subset([4, 1])
    assert some.names == [everything.names[4], everything.names[1]]
    assert np.array_equal(some.batch(64, np.array([0]))[0], everything.batch(64, np.array([4]))[0])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
