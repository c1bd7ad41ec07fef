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
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import experiments, growth, growth_arms, growth_report, growth_tables
from benchmarks.pictures import dice_over_operations
from conftest import PROJECT, TIMING, run_script
from images.files import load_image, save_png
from progressive_trainer import ProgressiveTrainer
from training.run_folder import RunFolder
from training.schedule import WORK
from unet import ProgressiveUNet

SMALL = ("--base_channels", "2", "--batch_sizes", "32:4,64:4,128:4,256:4")


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def study(shared_root, tmp_path_factory):
    """Return the folder of a study of two arms and one seed, and what it printed."""
    out = tmp_path_factory.mktemp("study") / "growth"
    done = run_script("benchmarks/experiments.py", "growth", "--data_root", shared_root, "--out", out, "--seeds", 1,
                      "--first_seed", 7, "--budget", 2.5, "--arms", "direct,grown", "--jobs", 2, *SMALL)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_both_arms_get_equal_operations_and_their_last_weights_are_scored(study):
    out, printed = study
    trainings = rows_of(out / "trainings.csv")
    assert [row["arm"] for row in trainings] == ["direct", "grown"], "in the order asked for, not as they end"
    assert {(row["arm"], row["seed"], row["epochs"], row["operations"]) for row in trainings} == {
        ("direct", "7", "2", "197.2"), ("grown", "7", "14,3,1,1", "246.3")}
    assert {row["images_seen"] for row in trainings} == {"12", "114"}
    images = rows_of(out / "images.csv")
    assert len(images) == 2 * 6
    for row in trainings:
        mine = [i for i in images if i["arm"] == row["arm"]]
        assert [i["group"] for i in mine] == [i["image"] for i in mine], "nothing tells patients"
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
    assert [stage for stage, _ in grown] == ["1"] * 14 + ["2"] * 3 + ["3", "4"]
    assert [float(done) for _, done in grown] == pytest.approx(
        [4.9 * n for n in range(1, 15)] + [83.1, 97.6, 112.1, 147.7, 246.3])
    assert "| **grown** | 14, 3, 1, 1 | 1 | 246 | 114 |" in printed
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
    assert experiments.main(command) == 2
    assert "KeyboardInterrupt" in (out / "runs/grown_2.5_7.log").read_text()
    assert rows_of(out / "runs/grown_2.5_7/metrics.csv")[-1]["epoch"] == "2"
    assert not (out / "trainings.csv").exists()
    monkeypatch.setattr(sys, "argv", ["experiments.py", "asked for more seeds"])
    assert experiments.main(command) == 0
    assert len(done) == 19, "17 epochs were left"

    def comparable(rows: list[dict]) -> list[dict]:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in rows if row["arm"] == "grown"]
    for name in growth_tables.TABLES:
        assert comparable(rows_of(out / name)) == comparable(rows_of(study[0] / name)), "as without the interruption"
    assert experiments.main(command) == 0
    assert "1 trainings, 0 to run" in capsys.readouterr().out
    assert len(done) == 19
    assert experiments.main([*command, "--lr", "0.5"]) == 2
    assert "this study was begun with lr 0.001, asked for is 0.5" in capsys.readouterr().err
    assert experiments.main([*command, "--num_workers", "0"]) == 0, "what changes no number may differ"
    settings = json.loads((out / "settings.json").read_text())
    for kept in (settings["common"], *settings["arms"].values()):
        del kept["max_value"]
    (out / "settings.json").write_text(json.dumps(settings | {"work": [1, 2, 3, 4]}))
    assert experiments.main(command) == 2
    assert "begun with a network of other operations" in capsys.readouterr().err
    (out / "settings.json").write_text(json.dumps(settings))
    assert experiments.main(command) == 0, "an option that is younger than the study had its default"


def test_what_was_begun_otherwise_is_not_continued(study, shared_root, data_root, tmp_path, in_this_process, capsys):
    """Run folders without the tables that belonged to them, and other images under the same options."""
    out = tmp_path / "growth"
    shutil.copytree(study[0] / "runs", out / "runs")
    common = ["--out", str(out), "--arms", "direct", "--seeds", "1", "--first_seed", "7", "--budget", "2.5", *SMALL]
    assert experiments.main(["growth", "--data_root", str(shared_root), *common, "--lr", "0.5"]) == 2
    assert "begun with lr 0.001, asked for is 0.5" in (out / "runs/direct_2.5_7.log").read_text()
    image = data_root / "test/images/test_0.png"
    save_png(image, 255 - load_image(image, 1)[..., 0])
    assert experiments.main(["growth", "--data_root", str(data_root), *common]) == 2
    assert "begun with data_fingerprint" in (out / "runs/direct_2.5_7.log").read_text()
    shutil.rmtree(out / "runs")
    shutil.copy(study[0] / "trainings.csv", out)
    assert experiments.main(["growth", "--data_root", str(data_root), *common, "--first_seed", "8"]) == 2
    assert "that of the finished trainings" in (out / "runs/direct_2.5_8.log").read_text()
    capsys.readouterr()


def test_a_kill_between_two_tables_loses_and_doubles_nothing(study, tmp_path, monkeypatch):
    shutil.copytree(study[0], tmp_path, dirs_exist_ok=True)
    before = {name: rows_of(tmp_path / name) for name in growth_tables.TABLES}
    training = growth.Training(tmp_path, "grown", "2.5", 7, ())
    result = json.loads((training.folder / growth.RESULT).read_text())
    write, written = RunFolder.write_csv, []

    def write_once(self, name, rows, columns):
        if written:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, rows, columns)
    (tmp_path / "trainings.csv").unlink()
    monkeypatch.setattr(RunFolder, "write_csv", write_once)
    with pytest.raises(KeyboardInterrupt):
        growth_tables.put_rows(tmp_path, training.key, result, ["direct", "grown"])
    assert not (tmp_path / "trainings.csv").exists(), "nothing counts as finished"
    monkeypatch.setattr(RunFolder, "write_csv", write)
    for arm in ("grown", "direct", "grown"):
        training = growth.Training(tmp_path, arm, "2.5", 7, ())
        growth_tables.put_rows(tmp_path, training.key, json.loads((training.folder / growth.RESULT).read_text()),
                        ["direct", "grown"])
    assert {name: rows_of(tmp_path / name) for name in growth_tables.TABLES} == before


def test_a_crash_is_in_the_log_of_its_training(tmp_path, monkeypatch):
    def crash(training):
        raise ZeroDivisionError("what broke")
    monkeypatch.setattr(growth, "complete", crash)
    training = growth.Training(tmp_path, "direct", "1", 0, ())
    with pytest.raises(SystemExit):
        growth.run_training(training)
    log = training.folder.with_name(f"{training.name}.log").read_text()
    assert "ZeroDivisionError: what broke" in log


def test_a_training_that_fails_is_named_and_the_others_finish(shared_root, tmp_path, in_this_process, capsys):
    bad = f"--init_from {tmp_path / 'nothing.pth'}"
    command = ["growth", "--data_root", str(shared_root), "--out", str(tmp_path / "o"), "--arms", "unet", "--arm"]
    rest = ["--seeds", "1", "--budget", "3", *SMALL]
    assert experiments.main([*command, f"bad={bad}", *rest]) == 2
    assert "1 of 2 trainings failed: bad_3_0" in capsys.readouterr().err
    assert "nothing.pth: no such file" in (tmp_path / "o/runs/bad_3_0.log").read_text()
    training, = rows_of(tmp_path / "o/trainings.csv")
    assert (training["arm"], training["epochs"], training["operations"]) == ("unet", "1", "289")
    assert experiments.main([*command, "good=--lr 0.1", *rest]) == 0
    assert experiments.main([*command, "good=--lr 0.2", *rest]) == 2, "an arm cannot become another"
    assert "arm good was begun with lr 0.1, asked for is 0.2" in capsys.readouterr().err
    path = tmp_path / "o/settings.json"
    settings = json.loads(path.read_text())
    for kept in (settings["common"], *settings["arms"].values()):
        kept["shares"] = [1, 2, 3, 4]  # the default of another version
    settings["arms"]["unet"]["old_lr_scale"] = 0.1
    path.write_text(json.dumps(settings))
    of_unet = ["growth", "--data_root", str(shared_root), "--out", str(tmp_path / "o"), "--arms", "unet"]
    assert experiments.main([*of_unet, *rest]) == 0, "no arm here reads them"
    capsys.readouterr()
    assert experiments.main([*of_unet, "--arm", "good=--lr 0.1", *rest]) == 2, "this one grows"
    assert "arm good was begun with shares [1, 2, 3, 4]" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (("--arms", "direct,frozen"), "is not some of direct,grown,late,unet"), (("--arm", "fast"), "is not NAME=OPTIONS"),
    (("--arm", "a/b=--lr 1"), "folder name"), (("--seed", "3"), "--seed is decided by the study"),
    (("--progressive=false",), "--progressive is decided"), (("--budget", "0.1"), "pays for no epoch"),
    (("--arms", "grown", "--budget", "0.9"), "leaves no epoch"),
    (("--arm", "a=--seed 3"), "--seed is decided by the study, not by arm a"),
    (("--arm", "a=--in_channels 3"), "compared on the same images"), (("--arm", "a=--lr '1"), "Close every quote"),
    (("--arm", "a=--lr 1", "--arm", "a=--lr 2"), "--arm a is given twice"), (("--data_root", "nowhere"), "nowhere"),
    (("--lr", "fast"), "is not a number"), (("--report",), "no trainings.csv with a finished training"),
    (("--report", "--lr", "1"), "takes no --lr"),
    (("--max_minutes", "3"), "--max_minutes is decided by the study")])
def test_what_a_study_cannot_be_is_refused_before_anything_is_written(options, message, tmp_path, capsys):
    assert experiments.main(["growth", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def scores_by_hand(shift: float, seeds: int = 4) -> dict[str, dict]:
    """Return seed -> image -> score: images differ much, seeds a little."""
    return {str(s): {("test", str(i)): 0.5 + 0.04 * i + 0.001 * s + shift for i in range(10)} for s in range(seeds)}


def test_arms_are_compared_by_image_and_seed():
    found = growth_report.compare_arms(scores_by_hand(0.02), scores_by_hand(0), {})
    assert found["difference"] == pytest.approx(0.02)
    assert (found["low"], found["high"]) == (pytest.approx(0.02), pytest.approx(0.02)), "no pair differs from another"
    assert (found["seeds"], found["images"], found["groups"]) == (4, 10, 10)
    assert found["p_seeds"] == pytest.approx(2 / 2 ** 4)
    assert found["p_groups"] == pytest.approx(2 / 2 ** 10)
    one = {s: {("test", "0"): 0.5 + d} for s, d in (("0", -0.1), ("1", 0.1))}
    found = growth_report.compare_arms(one, {s: {("test", "0"): 0.5} for s in one}, {})
    assert found["high"] == pytest.approx(0.1 * 2 ** 0.5), "two seeds are spread by more than they show"
    other = scores_by_hand(0)
    for image in other["0"]:
        other["0"][image] += 0.2  # one seed of four is as much behind as the others would have to be ahead
    found = growth_report.compare_arms(scores_by_hand(0.02), other, {})
    assert found["difference"] == pytest.approx(0.02 - 0.05)
    assert found["low"] < -0.1 < 0.01 < found["high"], "the interval knows that seeds differ"
    assert growth_report.compare_arms({"0": {}}, {"1": {}}, {}) is None
    assert growth_report.compare_arms(scores_by_hand(0, 2), scores_by_hand(0), {})["seeds"] == 2


def test_images_of_one_patient_are_drawn_together():
    """Differences of 0.1 in one patient's three images and -0.1 and 0 in one image each of two others."""
    one = {"0": dict(zip("abcde", (0.6, 0.6, 0.6, 0.4, 0.5), strict=True))}
    other = {"0": dict.fromkeys("abcde", 0.5)}
    patients = dict.fromkeys("abc", "first") | {"d": "second"}
    found = growth_report.compare_arms(one, other, patients)
    assert (found["images"], found["groups"]) == (5, 3)
    # Deviations from the mean of 0.04, summed over a patient: 0.18, -0.14, -0.04. All three draws of one patient, once
    # in 27 each, are beyond the bounds of 95 %.
    farther = (3 / 2) ** 0.5
    assert found["high"] == pytest.approx(0.04 + farther * 3 * 0.18 / 5)
    assert found["low"] == pytest.approx(0.04 - farther * 3 * 0.14 / 5)
    assert found["p_groups"] == 1, "of 0.1, -0.1 and 0, the means of the patients"
    alone = growth_report.compare_arms(one, other, {})
    assert alone["high"] - alone["low"] < found["high"] - found["low"], "five images that tell no patient"


def test_what_falls_at_a_growth_stands_beside_the_noise():
    curves = [[(1, 40, 0.2), (1, 80, 0.5), (1, 120, 0.4), (3, 240, 0.45)]]
    within, growths = growth_report.changes(curves)
    assert within == pytest.approx([0.3, -0.1])
    assert growths == {(1, 3): [(0.4, 0.45)]}
    assert growth_report.changes([[(4, 185, 0.5)]]) == ([], {})


def test_the_image_is_read_at_the_finest_level_alone():
    model = ProgressiveUNet(base_channels=2)
    model.start_whole()
    model.set_stage(4)
    growth_arms.read_image_once(model)
    model.encoder["256"].from_image.weight.data.zero_()
    image = torch.rand(1, 1, 32, 32)
    assert torch.equal(model.eval()(image), model(1 - image)), "no other level sees it"
    model(image).sum().backward()
    assert model.encoder["32"].from_image.weight.grad is None, "so AdamW leaves it at zero"
    assert model.encoder["256"].from_image.weight.grad is not None


def write_study(out, curves: dict[tuple[str, str, str], list[tuple[int, int, float]]]) -> None:
    """Write the tables of a study whose last Dice is that of each of two images."""
    tables = {name: [] for name in growth_tables.TABLES}
    for (arm, budget, seed), curve in curves.items():
        key = dict(zip(growth_tables.KEYS, (arm, budget, seed), strict=True))
        tables["trainings.csv"].append(key | {
            "epochs": "1,1", "operations": curve[-1][1], "images_seen": 8, "processor_seconds": 3, "data": "a"})
        tables["images.csv"] += [key | {"split": "test", "image": i, "dice_256": curve[-1][2]} for i in (1, 2)]
        tables["epochs.csv"] += [key | {"stage": stage, "epoch": 1, "operations": done, "dice": dice}
                                 for stage, done, dice in curve]
    for row in tables["epochs.csv"]:
        row["processor_seconds"] = 6 * row["operations"]
    for name, rows in tables.items():
        RunFolder(out).write_csv(name, rows, growth_tables.COLUMNS[name])
    RunFolder(out).write_json("settings.json", {"arms": {"direct": {}, "grown": {}, "late": {}}})


def test_the_report_by_hand(tmp_path):
    """Two budgets; seeds of unequal number and length; no training of the first arm at the small budget."""
    write_study(tmp_path, {
        ("grown", "5", "0"): [(1, 40, 0.3), (4, 225, 0.1)],
        ("grown", "10", "0"): [(1, 40, 0.85), (1, 80, 0.7), (4, 265, 0.9)],
        ("grown", "10", "1"): [(1, 40, 0.75), (4, 225, 0.86)],
        ("direct", "10", "0"): [(4, 185, 0.5), (4, 370, 0.8)],
        ("direct", "10", "1"): [(4, 185, 0.6), (4, 370, 0.82)],
        ("direct", "10", "2"): [(4, 185, 0.6), (4, 370, 0.81)]})
    small, large = growth_report.write_report(tmp_path).split("## Operations of ")[1:]
    assert small.startswith("5 epochs")
    assert "Nothing is compared: no training of **direct**" in small
    assert "| **direct** | 1, 1 | 3 | 370 | 8 | 3 | 0.8100 ± 0.0100 (0.8000, 0.8200, 0.8100) |" in large
    assert "| grown minus direct | Dice at 256 | +0.0700 | " in large, "0.1 and 0.04, of the two seeds that both have"
    assert "| grown | 72%, 61% |" in large, "265 and 225 of 370: 0.85 was touched once, at 40, and lost again"
    assert "| direct | not reached" not in large, "what each seed is measured by is its own last Dice"
    assert "| grown | 32 to 256 | 0.700 to 0.900, 0.750 to 0.860 | +0.155 | +0.110 | 0.000 | -0.150 | 1.000 |" in large
    assert "**late**" not in small + large
    assert "| direct | 3 | 37.0 (37.0 to 37.0) | not reached | not reached |" in large
    assert "| grown | 2 | 24.5 (22.5 to 26.5) | 24.5 (22.5 to 26.5) | not reached (26.5 to 26.5; 1 of 2 not) |" in large
    assert Image.open(tmp_path / "growth.png").size[0] > 1200, "a panel a budget"


def test_every_arm_has_a_line_of_its_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    dice_over_operations({"a": {f"arm_{i}": [[(1, 5, 0.5), (4, 104, 0.7)]] for i in range(14)}}, WORK.values(),
                         tmp_path / "a.png")
    lines = [line for line in drawn[0].axes[0].lines if line.get_label().startswith("arm_")]
    assert len({(to_rgba(line.get_color()), line.get_linestyle()) for line in lines}) == len(lines) == 14


def test_many_budgets_have_panels_in_rows(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    dice_over_operations({f"budget {i}": {"direct": [[(4, 99, 0.5)]]} for i in range(5)}, WORK.values(),
                         tmp_path / "a.png")
    assert [axis.get_title() for axis in drawn[0].axes] == [f"budget {i}" for i in range(5)]
    width, height = drawn[0].get_size_inches()
    assert width < 1.2 * height, "not one long row"


def test_a_study_of_equal_time_stands_after_those_of_operations(tmp_path):
    write_study(tmp_path, {("direct", "2min", "0"): [(4, 185, 0.5)], ("direct", "10", "0"): [(4, 185, 0.5)],
                           ("grown", "2min", "0"): [(1, 40, 0.4), (4, 225, 0.6)]})
    titles = [line for line in growth_report.write_report(tmp_path).splitlines() if line.startswith("## ")]
    assert titles == ["## Operations of 10 epochs at 256 pixels", "## 2 minutes each"]


def test_trainings_of_equal_time(shared_root, tmp_path, in_this_process, capsys):
    command = ["growth", "--data_root", str(shared_root), "--out", str(tmp_path / "o"), "--seeds", "1", "--minutes",
               "0.25", *SMALL]
    assert experiments.main([*command, "--arms", "grown"]) == 0
    training, = rows_of(tmp_path / "o/trainings.csv")
    stages = [row["stage"] for row in rows_of(tmp_path / "o/epochs.csv")]
    assert training["budget"] == "0.25min"
    assert training["epochs"] == ",".join(str(stages.count(stage)) for stage in "1234")
    assert 1 < float(training["seconds"]) < 15
    config = json.loads((tmp_path / "o/runs/grown_0.25min_0/config.json").read_text())
    assert "epochs_per_stage" not in config, "the time decided"
    assert experiments.main([*command, "--arms", "usual"]) == 2
    assert "arm usual takes --budget alone" in capsys.readouterr().err


def test_the_classic_network_as_people_run_it(shared_root, tmp_path, in_this_process, monkeypatch):
    command = ["growth", "--data_root", str(shared_root), "--out", str(tmp_path / "o"), "--seeds", "1", "--budget",
               "6", "--arms", "usual", *SMALL]
    validate, steps = ProgressiveTrainer.validate_epoch, []

    def validate_then_end(self, *arguments):
        if len(steps) == 1:
            raise KeyboardInterrupt
        steps.append(self)
        return validate(self, *arguments)
    monkeypatch.setattr(ProgressiveTrainer, "validate_epoch", validate_then_end)
    assert experiments.main(command) == 2, "cut off in the second epoch"
    run = tmp_path / "o/runs/usual_6_0"
    saved = torch.load(run / growth_arms.STATE, weights_only=True)
    group, = saved["optimizer"]["param_groups"]
    assert (group["lr"], group["momentum"], len(saved["rows"])) == (1e-5, 0.999, 1)
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {6}, "an image a step"
    monkeypatch.setattr(ProgressiveTrainer, "validate_epoch", validate)
    assert experiments.main(command) == 0
    training, = rows_of(tmp_path / "o/trainings.csv")
    assert (training["epochs"], training["operations"], training["images_seen"]) == ("2", "578", "12")
    first = rows_of(tmp_path / "o/epochs.csv")[0]
    assert float(first["seconds"]) == pytest.approx(saved["rows"][0]["seconds"], abs=0.06), "it went on"


def test_a_fall_at_a_growth_is_weighed_against_the_changes_within_stages(tmp_path):
    write_study(tmp_path, {("grown", "10", str(seed)): [(1, 40, 0.5), (1, 80, 0.6 + seed / 100), (4, 265, 0.4)]
                           for seed in (0, 1)})
    assert "| -0.210 | 0.007 | +0.100 | 0.167 |" in growth_report.write_report(tmp_path), "2 below 2: 1 order in 6"


def test_a_report_says_in_what_the_code_differed(tmp_path):
    write_study(tmp_path, {("grown", "10", "0"): [(1, 40, 0.5), (4, 265, 0.6)]})
    assert "differed" not in growth_report.write_report(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"change": "the rate was\nhalved"}))
    assert "The code differed from the project's:** the rate was halved." in growth_report.write_report(tmp_path)


def test_a_report_refuses_trainings_of_different_data(study, tmp_path, capsys):
    for name in growth_tables.TABLES:
        shutil.copy(study[0] / name, tmp_path)
    assert experiments.main(["growth", "--out", str(tmp_path), "--report"]) == 0, "the tables are enough"
    rows = (tmp_path / "trainings.csv").read_text().splitlines()
    (tmp_path / "trainings.csv").write_text("\n".join([*rows, rows[1].rpartition(",")[0] + ",00000000"]) + "\n")
    assert experiments.main(["growth", "--out", str(tmp_path), "--report"]) == 2
    assert "different data" in capsys.readouterr().err
    (tmp_path / "trainings.csv").write_text("\n".join([*rows, "direct,1,zero," + rows[1].split(",", 3)[3]]) + "\n")
    (tmp_path / "settings.json").write_text("{")
    for words in ("it must be a number. Correct or remove the line", "settings.json: cannot be read"):
        assert experiments.main(["growth", "--out", str(tmp_path), "--report"]) == 2
        assert words in capsys.readouterr().err
        (tmp_path / "trainings.csv").write_text("\n".join(rows) + "\n")


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
