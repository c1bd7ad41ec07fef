"""Tests of the study that compares growing with direct training at equal operations.

    python -m pytest tests/test_growth_study.py
"""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from benchmarks import experiments, growth, growth_report
from conftest import PROJECT, TIMING, run_script
from progressive_trainer import ProgressiveTrainer

SMALL = ("--base_channels", "2", "--batch_sizes", "32:4,64:4,128:4,256:4")


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def study(shared_root, tmp_path_factory):
    """Return the folder of a study of two arms and one seed, and what it printed."""
    out = tmp_path_factory.mktemp("study") / "growth"
    done = run_script("benchmarks/experiments.py", "growth", "--data_root", shared_root, "--out", out, "--seeds", 1,
                      "--first_seed", 7, "--budget", 2.5, "--jobs", 2, *SMALL)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_both_arms_get_equal_operations_and_their_last_weights_are_scored(study):
    out, printed = study
    trainings = rows_of(out / "trainings.csv")
    assert [row["arm"] for row in trainings] == ["direct", "grown"], "in the order asked for, not as they end"
    assert {(row["arm"], row["seed"], row["epochs"], row["operations"]) for row in trainings} == {
        ("direct", "7", "2", "370"), ("grown", "7", "3,0,1,1", "425")}
    assert {row["images_seen"] for row in trainings} == {"12", "30"}
    images = rows_of(out / "images.csv")
    assert len(images) == 2 * 6
    for row in trainings:
        mine = [i for i in images if i["arm"] == row["arm"]]
        assert [i["image"] for i in mine] == [f"{split}_{i}" for split in ("valid", "test") for i in range(3)]
        for split in ("valid", "test"):
            scores = [float(i["dice"]) for i in mine if i["split"] == split]
            assert float(row[f"dice_{split}"]) == pytest.approx(sum(scores) / 3, abs=1e-4)
        run = out / "runs" / f"{row['arm']}_2.5_7"
        last = rows_of(run / "metrics.csv")[-1]
        assert float(row["dice_256_valid"]) == pytest.approx(float(last["dice"]), abs=0.02), "but for folded weights"
        assert float(row["processor_seconds"]) > 0
        assert json.loads((run / "config.json").read_text())["seed"] == 7
    grown = [(e["stage"], e["operations"]) for e in rows_of(out / "epochs.csv") if e["arm"] == "grown"]
    assert grown == [("1", "40"), ("1", "80"), ("1", "120"), ("3", "240"), ("4", "425")]
    assert "| **grown** | 3, 0, 1, 1 | 1 | 425 | 30 |" in printed
    assert (out / "growth.md").read_text() in printed
    assert Image.open(out / "growth.png").size[0] > 600


@pytest.fixture
def in_this_process(monkeypatch):
    """Train here instead of in processes of their own, on as many threads as those had."""
    def run(trainings, jobs):
        for training in trainings:
            try:
                growth.run_training(training)
                yield training, 0
            except SystemExit as end:
                yield training, end.code
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(growth, "run_in_processes", run)
    yield
    torch.set_num_threads(threads)


def test_a_study_goes_on_where_it_was_cut_off(study, shared_root, tmp_path, in_this_process, capsys, monkeypatch):
    out = tmp_path / "growth"
    command = ["growth", "--data_root", str(shared_root), "--out", str(out), "--arms", "grown", "--seeds", "1",
               "--first_seed", "7", "--budget", "2.5", *SMALL]
    record, done = ProgressiveTrainer.record, []

    def record_twice(self, *metrics):
        record(self, *metrics)
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(ProgressiveTrainer, "record", record_twice)
    assert experiments.main(command) == 130
    assert rows_of(out / "runs/grown_2.5_7/metrics.csv")[-1]["epoch"] == "2"
    assert not (out / "trainings.csv").exists()
    assert experiments.main(command) == 0
    assert len(done) == 5, "three epochs were left"

    def comparable(rows: list[dict]) -> list[dict]:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in rows if row["arm"] == "grown"]
    for name in growth.TABLES:
        assert comparable(rows_of(out / name)) == comparable(rows_of(study[0] / name)), "as without the interruption"
    assert experiments.main(command) == 0
    assert "1 trainings, 0 to run" in capsys.readouterr().out
    assert len(done) == 5
    assert experiments.main([*command, "--lr", "0.5"]) == 2
    assert "this study was begun with" in capsys.readouterr().err


def test_a_training_that_fails_is_named_and_the_others_finish(shared_root, tmp_path, in_this_process, capsys):
    bad = f"--init_from {tmp_path / 'nothing.pth'}"
    command = ["growth", "--data_root", str(shared_root), "--out", str(tmp_path / "o"), "--arms", "unet", "--arm"]
    rest = ["--seeds", "1", "--budget", "1.6", *SMALL]
    assert experiments.main([*command, f"bad={bad}", *rest]) == 2
    assert "1 of 2 trainings failed: bad_1.6_0" in capsys.readouterr().err
    assert "nothing.pth: no such file" in (tmp_path / "o/runs/bad_1.6_0.log").read_text()
    training, = rows_of(tmp_path / "o/trainings.csv")
    assert (training["arm"], training["epochs"], training["operations"]) == ("unet", "1", "289")
    assert experiments.main([*command, "bad=--lr 0.1", *rest]) == 2, "an arm cannot become another"
    assert "another name for the arm" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (("--arms", "direct,frozen"), "is not some of direct,grown,late,unet"), (("--arm", "fast"), "is not NAME=OPTIONS"),
    (("--arm", "a/b=--lr 1"), "folder name"), (("--seed", "3"), "--seed is decided by the study"),
    (("--progressive=false",), "--progressive is decided"), (("--budget", "0.1"), "leaves no epoch"),
    (("--lr", "fast"), "is not a number"), (("--report",), "no trainings.csv with a finished training"),
    (("--report", "--lr", "1"), "takes no --lr")])
def test_what_a_study_cannot_be_is_refused_before_anything_is_written(options, message, tmp_path, capsys):
    assert experiments.main(["growth", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def scores_by_hand(shift: float, seeds: int = 4) -> dict[str, dict]:
    """Return seed -> image -> score: images differ much, seeds a little."""
    return {str(s): {("test", str(i)): 0.5 + 0.04 * i + 0.001 * s + shift for i in range(10)} for s in range(seeds)}


def test_arms_are_compared_by_image_and_seed():
    found = growth_report.compare_arms(scores_by_hand(0.02), scores_by_hand(0))
    assert found["difference"] == pytest.approx(0.02)
    assert (found["low"], found["high"]) == (pytest.approx(0.02), pytest.approx(0.02)), "no pair differs from another"
    assert (found["seeds"], found["images"]) == (4, 10)
    assert found["p_seeds"] == pytest.approx(2 / 2 ** 4)
    assert found["p_images"] == pytest.approx(2 / 2 ** 10)
    other = scores_by_hand(0)
    for image in other["0"]:
        other["0"][image] += 0.2  # one seed of four is as much behind as the others would have to be ahead
    found = growth_report.compare_arms(scores_by_hand(0.02), other)
    assert found["difference"] == pytest.approx(0.02 - 0.05)
    assert found["low"] < -0.1 < 0.01 < found["high"], "the interval knows that seeds differ"
    assert growth_report.compare_arms({"0": {}}, {"1": {}}) is None
    assert growth_report.compare_arms(scores_by_hand(0, 2), scores_by_hand(0))["seeds"] == 2


def test_what_falls_at_a_growth_stands_beside_the_noise():
    curves = [[(1, 40, 0.2), (1, 80, 0.5), (1, 120, 0.4), (3, 240, 0.45)]]
    within, growths = growth_report.changes(curves)
    assert within == pytest.approx([0.3, -0.1])
    assert growths == {(1, 3): [(0.4, 0.45)]}
    assert growth_report.changes([[(4, 185, 0.5)]]) == ([], {})


def test_a_report_refuses_trainings_of_different_data(study, tmp_path, capsys):
    for name in growth.TABLES:
        shutil.copy(study[0] / name, tmp_path)
    assert experiments.main(["growth", "--out", str(tmp_path), "--report"]) == 0, "the tables are enough"
    rows = (tmp_path / "trainings.csv").read_text().splitlines()
    (tmp_path / "trainings.csv").write_text("\n".join([*rows, rows[1].rpartition(",")[0] + ",00000000"]) + "\n")
    assert experiments.main(["growth", "--out", str(tmp_path), "--report"]) == 2
    assert "different data" in capsys.readouterr().err


COMMAND = """
import multiprocessing, time
from benchmarks import growth

def train():
    growth.end_with_parent()
    print("watching", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=train).start()
    time.sleep(60)
"""


def test_trainings_end_with_the_command_that_was_killed(tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    with subprocess.Popen([sys.executable, tmp_path / "command.py"], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(PROJECT)}) as command:
        assert command.stdout.readline() == "watching\n"
        command.kill()
        assert command.communicate(timeout=30)[0] == "", "the pipe ends when nobody holds it any more"
