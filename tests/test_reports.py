"""Tests of the pages about runs, of what they are made from, and of the logs for TensorBoard.

    python -m pytest tests/test_reports.py
"""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import report_runs
import train_papsmear
from checkpoints import load_checkpoint, model_of
from conftest import disc, make_trainer, read_rows, write_data_set
from images.files import load_image, save_png
from pap_smear_dataset import create_progressive_dataloaders
from reporting import report
from reporting.charts import Chart, Curve, histogram
from reporting.panels import case_panels, predicted
from reporting.pictures import error_map, outline_path
from reporting.report import report_context, settings_of, write_report
from reporting.runs import Run, read_run
from scoring.calibration import BINS, expected_calibration_error, reliability_counts, threshold_scores
from scoring.cases import LARGEST, Case, KeptCases, extremes, load_cases, save_cases, spread
from scoring.pictures import curves_figure, predictions
from scoring.scores import compare
from training import logs, time_limit
from training.run_folder import RunFolder, read_metrics
from training.time_limit import TimeLimit
from unet import ProgressiveUNet, UNet, count_parameters

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What tests ask of a page: every element with its attributes and the text in it."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self._open: list[tuple[str, dict, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open[-1][:2]}"

    def handle_starttag(self, tag, attributes):
        element = tag, dict(attributes), []
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for element in self._open:
            element[2].append(data)

    def all(self, *tags: str) -> list[tuple[dict, str]]:
        """Return attributes and text of all elements of these names."""
        return [(attributes, " ".join(" ".join(text).split())) for tag, attributes, text in self.elements
                if tag in tags]


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def case(name="a", dice=0.5, side=32, image=None) -> Case:
    mask = disc(side, side / 4)[None]
    return Case(name, np.full((side, side, 1), 200, np.uint8) if image is None else image, mask,
                mask.astype(np.uint8) * 255, dice)


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """Return a copy of a finished run that a test may change."""
    return Path(shutil.copytree(trained_run[0], tmp_path / "tiny"))


# ---- what pages are made from


def test_extremes_are_the_worst_the_middle_and_the_best_of_different_groups():
    scores = [0.9, 0.1, 0.5, 0.2, 0.8, 0.6, 0.4, 0.3]
    assert extremes(scores, list("abcdefgh"), 6) == [1, 3, 6, 2, 4, 0]
    assert extremes(scores, ["a", "b", "c", "b", "a", "d", "e", "f"], 6) == [1, 7, 6, 2, 5, 0], "one of b, one of a"
    assert sorted(extremes(scores, ["a"] * 8, 6)) == [0, 1, 2, 3, 4, 6], "where there is one group alone"
    assert extremes([0.5, 0.4], ["a", "b"], 6) == [1, 0]


def test_examples_are_spread_over_the_groups():
    assert spread([f"{i // 2}" for i in range(20)], 4) == [0, 6, 12, 18]
    assert spread(["a", "a", "a", "b"], 3) == [0, 1, 3], "one of each group, then others"
    assert spread(["a"], 8) == [0]


def test_the_worst_and_the_best_cases_are_kept_with_some_between():
    kept = KeptCases(100)
    for i in range(100):
        kept.add(case(str(i), dice=(i * 37 % 100) / 100), i)
    dice = {c.dice for c in kept.cases}
    assert {0.0, 0.01, 0.02, 0.03, 0.96, 0.97, 0.98, 0.99} <= dice
    assert {"0", "99"} <= {c.name for c in kept.cases}
    assert 24 <= len(kept.cases) <= 32


def test_cases_come_back_from_their_file(tmp_path):
    colour = np.random.default_rng(0).integers(100, 120, (32, 32, 3), np.uint8)
    both = [case("grey ä", 0.25), case("colour", 0.5, image=colour)]
    both[1].masks = np.stack([both[1].masks[0], ~both[1].masks[0]])
    both[1].probability = np.random.default_rng(1).integers(0, 256, (2, 32, 32), np.uint8)
    save_cases(tmp_path / "a.npz", both, numbers=np.arange(3))
    cases, tables = load_cases(tmp_path / "a.npz")
    assert [c.name for c in cases] == ["grey ä", "colour"]
    assert tables["numbers"].tolist() == [0, 1, 2]
    for before, after in zip(both, cases, strict=True):
        assert after.dice == before.dice
        assert np.array_equal(after.masks, before.masks)
        assert np.array_equal(after.probability, before.probability)
        assert np.abs(after.image.astype(int) - before.image).mean() < 5, "a photograph, as JPEG"
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match="not a file of images and predictions"):
        load_cases(tmp_path / "a.npz")


def test_of_several_classes_each_has_its_own_dice():
    one = case("cell", dice=0.75)
    both = replace(one, masks=np.stack([one.masks[0], one.masks[0]]), probability=np.concatenate([
        one.probability, np.where(np.arange(32) < 16, one.probability, 0)]))
    assert [prediction.dice for prediction in (predicted(both, 0.5, "now", k) for k in (0, 1))] == pytest.approx(
        [1, 2 / 3], abs=0.03), "of the second half is missed"
    nucleus, cytoplasm = case_panels([both], 0.5, ["nucleus", "cytoplasm"])
    assert (nucleus.name, cytoplasm.name) == ("cell, nucleus", "cell, cytoplasm")
    assert cytoplasm.of_classes == "mean of the classes 0.750"
    assert predicted(one, 0.5, "now").dice == 0.75, "of one class it is that of the whole image"
    assert case_panels([one], 0.5)[0].of_classes == ""


def test_of_a_large_image_the_part_with_most_outlines_is_kept():
    mask = np.zeros((1, 1000, 900), bool)
    mask[0, 700:710, 650:700] = True
    whole = Case("a", np.zeros((1000, 900, 3), np.uint8), mask, np.zeros((1, 1000, 900), np.uint8), 0.5)
    part = whole.part()
    assert part.image.shape == (LARGEST, LARGEST, 3)
    assert part.masks.sum() == mask.sum(), "all that is drawn"
    assert case().part().masks.shape == (1, 32, 32)


def test_calibration_of_known_probabilities():
    probability = np.repeat([0.225, 0.725], 1000)
    mask = np.arange(2000) % 1000 < np.repeat([225, 525], 1000)
    counts = reliability_counts(probability, mask)
    assert counts.shape == (3, BINS)
    assert counts[:, 4].round(6).tolist() == [1000, 225, 225]
    assert expected_calibration_error(counts) == pytest.approx(0.1), "half of the pixels are 0.2 from the truth"


def test_scores_over_thresholds_of_a_known_prediction():
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    probability = torch.full((1, 1, 4, 4), 0.1)
    probability[..., 0], probability[..., 2] = 0.9, 0.5
    scores = threshold_scores(probability, mask, (0.05, 0.4, 0.6, 0.95))
    assert scores["recall"].tolist() == [1, 0.5, 0.5, 0]
    assert scores["precision"].tolist() == [0.5, 0.5, 1, 0]
    assert scores["dice"][2] == pytest.approx(2 / 3)


def test_a_stage_is_shown_with_its_best_weights(shared_root, tmp_path):
    """The last weights of stage 1 are spoilt; those that are shown are the best."""
    trainer, loaders = make_trainer(shared_root, tmp_path / "run")
    trainer.record(trainer.train_epoch(loaders[32][0], 0), trainer.validate_epoch(loaders[32][1], 0))
    with torch.no_grad():
        trainer.model.heads["32"].linear.bias.fill_(-50)
    drawn = torch.random.get_rng_state()
    trainer.show_stage(loaders[32][1])
    trainer.folder.close()
    assert torch.equal(torch.random.get_rng_state(), drawn), "what comes after is as if nothing had been drawn"
    cases, tables = load_cases(tmp_path / "run/validation_stage_1.npz")
    best = load_checkpoint(tmp_path / "run/best_stage_1.pth")
    assert (tables["stage"], tables["epoch"], tables["score"]) == (1, best["epoch"], best["score"])
    assert float(tables["all_dice"].mean()) == pytest.approx(best["score"], abs=1e-4)
    network = model_of(best, tmp_path / "run/best_stage_1.pth").eval()
    batch = loaders[32][1].chosen(np.array([0]), 32)
    with torch.inference_mode():
        logits = torch.nn.functional.interpolate(network(batch["image"]), (256, 256), mode="bilinear")
    assert np.abs(cases[0].probability[0] / 255 - logits.sigmoid()[0, 0].numpy()).max() < 0.01


def test_the_same_examples_are_shown_at_every_stage(trained_run):
    run = read_run(trained_run[0])
    assert sorted(run.surveys) == [1, 2, 3, 4]
    names = [[c.name for c in survey.cases] for survey in run.surveys.values()]
    assert names == [["valid_0", "valid_1", "valid_2"]] * 4
    for survey in run.surveys.values():
        assert survey.cases[0].image.shape == (256, 256, 1), "at full resolution at every stage"
        assert survey.tables["reliability"][0].sum() == 3 * 256 ** 2
    scores = {row["stage"]: float(row["dice"]) for row in read_metrics(trained_run[0] / "metrics.csv")}
    assert float(run.surveys[2].tables["score"]) == pytest.approx(scores["2"])


# ---- parts of a page


def test_an_outline_follows_the_edges_of_pixels():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    assert sorted(re.findall(r"[hv]-?\d+", outline_path(mask))) in (["h-3", "h3", "v2"], ["h3", "v-2", "v2"],
                                                                  ["h-3", "v-2", "v2"], ["h-3", "h3", "v-2"])
    assert outline_path(mask).startswith("M")
    assert outline_path(np.zeros((4, 4), bool)) == ""
    assert error_map(mask, mask).startswith("data:image/png;base64,")


def test_a_chart_escapes_what_it_is_given_and_leaves_gaps():
    chart = Chart('<"title">', "words", "<x>", [Curve("a", [1, 2, 3, 4], [0.1, float("nan"), 0.3, 0.4])])
    drawn = str(chart.svg())
    assert "<x>" not in drawn
    assert "&lt;x&gt;" in drawn
    assert drawn.count("M") == 2, "a gap where a value is missing"
    assert "nan" not in drawn
    Page(drawn)
    assert str(Chart("t", "w", "x", [Curve("a", [1], [5])]).svg()).count("circle") == 1
    assert str(histogram([0.1, 0.11, 0.9, 1.0], "t", "w", "x").svg()).count("<rect") == 3


def test_epochs_on_an_axis_are_whole():
    """Of 14 epochs the usual ticks would be 2.5, 5, 7.5, ..."""
    curve = Curve("a", range(1, 15), [0.5] * 14)
    ticks = re.findall(r'text-anchor="middle">([\d.]+)<', str(Chart("t", "w", "x", [curve], counts=True).svg()))
    assert ticks == ["0", "4", "8", "12"]
    assert "2.5" in str(Chart("t", "w", "x", [curve]).svg())
    assert 'aria-label="Is it so? It is."' in str(Chart("Is it so?", "It is.", "x", [curve]).svg())


# ---- the page of a run


def check_page(page: Page, text: str) -> None:
    """Check what every page owes to keyboards, screen readers and machines without a network."""
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False)), "headings in order"
    assert all(attributes.get("alt") for attributes, _ in page.all("img"))
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden") for attributes, _ in page.all("svg"))
    assert all(attributes.get("scope") in ("col", "row") for attributes, _ in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(text for _, text in page.all("caption", "figcaption", "h1", "h2", "h3", "h4", "title"))
    for attributes, _ in page.all("div"):
        if "scroll" in attributes.get("class", ""):
            assert attributes["tabindex"] == "0"
            assert attributes["role"] == "region"
            assert attributes["aria-label"]
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert page.all("a")[0][0] == {"class": "skip", "href": "#main"}
    for _, attributes, _ in page.elements:
        for name in ("href", "src"):
            link = attributes.get(name, "data:")
            assert link.startswith("data:") or link[0] == "#" and link[1:] in ids, link
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", text)
    assert page.all("html")[0][0] == {"lang": "en"}


def test_the_report_of_a_run_says_what_its_files_say(trained_run):
    text = (trained_run[0] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    check_page(page, text)
    (_, lead), = [(a, t) for a, t in page.all("div") if a.get("class") == "lead"]
    scores = json.loads((trained_run[0] / "test_scores.json").read_text())["best_stage_4"]["dice"]
    root = json.loads((trained_run[0] / "config.json").read_text())["data_root"]
    assert f"on 6 grey images of the data set {root}" in lead
    assert f"On 3 test images it reaches a Dice of {scores['mean']:.3f} (95 % interval {scores['low']:.3f}" in lead
    assert [t for _, t in page.all("h2")] == ["Training", "The same validation images at every stage", "Test images",
                                             "Probabilities and the threshold", "Data", "Settings"]
    alts = [a["alt"] for a, _ in page.all("img")]
    for stage in range(1, 5):
        assert sum(f"valid_1 at stage {stage}," in alt for alt in alts) == 1
    assert sum(alt.startswith("Error map of test_") for alt in alts) == 3
    assert page.all("pre")[-1][1].startswith("python ")
    assert "train_papsmear.py --data_root" in page.all("pre")[-1][1]
    assert "3 images at their own size, with the weights of best_stage_4.pth (epoch 1 of stage 4)." in \
        [t for _, t in page.all("p")]
    assert "0 of 3 source images of test are in train." in [t for _, t in page.all("li")]
    assert any("The best threshold on validation is" in t for _, t in page.all("figcaption"))


@pytest.mark.parametrize(("losses", "dice", "words"), [
    ([5, 4, 3, 2], [1, 2, 4, 3], "may help: the validation loss was lowest in epoch 4 of 4 at 256 pixels."),
    ([2, 3, 4, 5], [1, 2, 3, 4], "may help: the best epoch was number 4 of 4 at 256 pixels."),
    ([3, 2, 4, 5], [1, 4, 3, 2], "unlikely to help much: the best epoch was number 2 of 4 at 256 pixels, and the "
                                 "validation loss was lowest in epoch 2.")])
def test_longer_training_is_advised_by_loss_and_dice(losses, dice, words):
    """Dice of a rate that fell to nothing stands still; the loss tells whether more was to be had."""
    run = Run(Path("a"), {"resolved": {"epochs": {"4": 4}}}, [
        {"stage": 4, "epoch": i + 1, "loss": losses[i], "dice": dice[i] / 10, "seconds": 1.0, "images_per_second": 1.0}
        for i in range(4)])
    assert report.sentences(run)[2] == f"Longer training {'is ' if 'unlikely' in words else ''}{words}"


def test_operations_are_those_of_the_network_that_a_run_had():
    rows = [{"stage": stage, "seconds": 10.0, "images_per_second": 100.0} for stage in (1, 4)]
    args = {"model": "pgunet", "in_channels": 1, "out_channels": 1, "base_channels": 64}
    now = {"model_args": args, "work": [4.9, 14.5, 35.6, 98.6]}
    for resolved, operations, parameters in (
            (now, [4.9, 103.5], count_parameters(ProgressiveUNet())), ({"model_args": args}, [40, 225], 0),
            ({"model_args": args | {"model": "unet"}}, [289, 578], count_parameters(UNet()))):
        run = Run(Path("a"), {"resolved": resolved}, rows)
        assert run.operations() == pytest.approx(operations)
        assert run.parameters == parameters


def test_a_report_warns_of_leakage(run):
    config = json.loads((run / "config.json").read_text())
    config["data_report"].append("leakage: 2 of 3 pictures of test are in train, by their pixels")
    (run / "config.json").write_text(json.dumps(config))
    page = page_of(write_report(run))
    notices = [t for a, t in page.all("div") if a.get("class") == "notice"]
    assert any(t.startswith("Leakage. 2 of 3 pictures of test are in train.") for t in notices)
    assert "2 of 3 pictures of test are in the training images too, so these scores say little" in \
        " ".join(t for _, t in page.all("p"))


def test_names_from_outside_are_text_in_a_page(run):
    cases, _ = load_cases(run / "test_cases.npz")
    cases[0].name = cases[1].name = "<script>alert('x')</script>\x1b"
    save_cases(run / "test_cases.npz", cases)
    text = write_report(run).read_text()
    check_page(Page(text), text)
    assert "&lt;script&gt;alert(" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("name", ["test_cases.npz", "validation_stage_4.npz", "config.json", "test_scores.json"])
def test_a_damaged_or_missing_file_costs_its_part_of_the_page_alone(name, run):
    (run / name).write_bytes(b"damaged")
    text = write_report(run).read_text()
    check_page(Page(text), text)
    assert f"{name} cannot be read" in text
    (run / name).unlink()
    text = write_report(run).read_text()
    check_page(Page(text), text)
    assert "cannot be read" not in text


@pytest.mark.parametrize(("name", "keys", "value"), [
    ("config.json", ["resolved"], [1]), ("config.json", ["resolved", "model_args"], 5),
    ("config.json", ["resolved", "model_args", "base_channels"], 100000), ("config.json", ["data_report"], 5),
    ("config.json", ["resolved", "epochs"], {"x": 1}), ("config.json", ["resolved", "threshold"], float("nan")),
    ("test_scores.json", ["best_stage_4"], 1), ("test_scores.json", ["best_stage_4", "dice"], {"mean": None}),
    ("test_scores.json", ["Otsu threshold"], 3)])
def test_fields_of_odd_types_cost_their_file_alone(name, keys, value, run):
    found = inner = json.loads((run / name).read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (run / name).write_text(json.dumps(found))
    assert f"{name} is left out" in write_report(run).read_text()


@pytest.mark.parametrize("name", ["metrics.csv", "test_scores.csv"])
@pytest.mark.parametrize("row", ["x" * 200_000 + "\n", "9{rest}", "{first},nan{rest}", "{first},abc{rest}"])
def test_odd_rows_of_a_table_end_no_page(row, name, run):
    table = run / name
    head, first, *others = table.read_text().splitlines()
    cells = first.split(",")
    odd = row.format(first=cells[0], rest="," + ",".join(cells[row.count("{first}") + 1:])).rstrip("\n") + "\n"
    table.write_text("\ufeff" + "\n".join([head, first, *others]) + "\n" + odd)
    text = write_report(run).read_text()
    check_page(Page(text), text)
    assert len(read_metrics(run / "metrics.csv")) >= 4


def test_a_network_that_is_sure_of_no_pixel_is_not_said_to_lean_to_a_side(run):
    survey = next(iter(read_run(run).surveys.values()))
    pixels = np.zeros(BINS)
    pixels[1] = 10_000
    survey.tables["reliability"] = np.stack([pixels, 0.1 * pixels, 0.05 * pixels])
    assert "no pixel says more than one half" in report.calibration_charts(survey)[0].words
    pixels[-1] = 10_000
    survey.tables["reliability"] = np.stack([pixels, 0.95 * pixels, 0.5 * pixels])
    assert "above one half the network is too sure of foreground" in report.calibration_charts(survey)[0].words


def test_tables_that_lost_rows_are_said(run):
    """Scores of some images would pass for those of all."""
    for name in ("metrics.csv", "test_scores.csv"):
        head, *rows = (run / name).read_text().splitlines()
        rows = [*rows, "9" + rows[-1][1:]] if name == "metrics.csv" else rows[:-1]
        (run / name).write_text("".join(f"{row}\n" for row in [head, *rows]))
    text = write_report(run).read_text()
    assert "test_scores.csv has 2 of 3 rows" in text
    assert "metrics.csv: rows that name no stage or no epoch are left out, 1 in all" in text


def test_tables_that_a_spreadsheet_saved_are_read(run):
    """Excel puts a byte order mark before a table in UTF-8, and ends lines by CR and LF."""
    before = read_run(run)
    for name in ("metrics.csv", "test_scores.csv"):
        path = run / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    after = read_run(run)
    assert (after.rows, after.test_rows, after.missing) == (before.rows, before.test_rows, [])


def test_a_report_that_cannot_be_written_ends_no_training(shared_root, tmp_path, capsys, monkeypatch):
    (tmp_path / "run/report.html").mkdir(parents=True)
    trainer, loaders = make_trainer(shared_root, tmp_path / "run", epochs_per_stage=[0, 0, 0, 1], overwrite=True)
    trainer.fit(loaders, say=lambda _: None)
    assert "warning: report.html cannot be written (IsADirectoryError" in capsys.readouterr().out
    monkeypatch.setattr(report, "report_context", lambda run: 1 / 0)
    report.refresh_report(tmp_path / "run")
    assert "(ZeroDivisionError: division by zero); python report_runs.py" in capsys.readouterr().out
    assert (tmp_path / "run/final_model.pth").is_file()


def test_a_report_is_there_after_the_first_stage(shared_root, tmp_path):
    """Of a run without config, data report and test, as Python may start it."""
    trainer, loaders = make_trainer(shared_root, tmp_path / "run")
    trainer.record(trainer.train_epoch(loaders[32][0], 0), trainer.validate_epoch(loaders[32][1], 0))
    trainer.show_stage(loaders[32][1])
    trainer.folder.close()
    text = (tmp_path / "run/report.html").read_text()
    check_page(Page(text), text)
    assert "(not finished)" in text
    assert "1 epoch so far" in text
    assert "the test images have not been scored" in text


def test_settings_are_flat():
    assert settings_of({"a": 1, "b": {"c": "x", "d": {"e": [1]}}, "command": "no", "f": None}) == [
        ("a", "1"), ("b.c", "x"), ("b.d.e", "[1]"), ("f", "null")]


def test_two_classes_and_a_run_in_colour_have_a_page(tmp_path):
    """Each class has its panels; a run of the classic network at one stage has no growth."""
    root = write_data_set(tmp_path / "data", (3, 3, 2))
    for path in root.rglob("masks/*.png"):
        mask = load_image(path, 1)[..., 0] > 0
        save_png(path, mask.astype(np.uint8) + (mask & (np.arange(64) < 32)))
    assert train_papsmear.main(["--data_root", str(root), "--output_dir", str(tmp_path), "--experiment_name", "run",
                                "--in_channels", "3", "--out_channels", "2", "--model", "unet", "--base_channels", "4",
                                "--epochs_per_stage", "1", "--device", "cpu"]) == 0
    text = (tmp_path / "run/report.html").read_text()
    page = Page(text)
    check_page(page, text)
    assert {"valid_0, class 1", "valid_0, class 2"} <= {t for _, t in page.all("h3")}
    assert sum(t.startswith("test_0, class 2: Dice ") and ", mean of the classes " in t for _, t in page.all("h4")) == 1
    assert "A classic U-Net" in text
    assert "was trained at 256 pixels on 3 colour images" in text


# ---- the command, and the comparison


def test_the_command_makes_a_report_anew(run, capsys):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert report_runs.main([str(run)]) == 0
    assert f"look at {run / 'report.html'}" in capsys.readouterr().out
    strip = re.compile(r"report_runs\.py .*?<|<title>.*?</title>")
    assert strip.sub("", (run / "report.html").read_text()) == strip.sub("", before)


def test_runs_are_compared(run, tmp_path, shared_root):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    rows, config = read_rows(run / "test_scores.csv"), json.loads((run / "config.json").read_text())
    for row in rows:
        row["dice"] = str(float(row["dice"]) / 2)
    RunFolder(other).write_csv("test_scores.csv", rows, tuple(rows[0]))
    (other / "config.json").write_text(json.dumps(config | {"lr": 0.125}))
    cases, _ = load_cases(other / "test_cases.npz")
    cases[1].dice = 0.0
    save_cases(other / "test_cases.npz", cases)
    out = tmp_path / "pages/comparison.html"
    assert report_runs.main([str(run), str(other), "--out", str(out)]) == 0
    text = out.read_text()
    page = Page(text)
    check_page(page, text)
    differing = [t for a, t in page.all("table") if "Settings that differ" in t]
    assert len(differing) == 1
    assert "lr 0.001 0.125" in differing[0]
    assert "base_channels" not in differing[0]
    found = compare(read_run(other).test_rows, read_run(run).test_rows)["dice"]
    assert f"other is behind tiny: the difference of their Dice is {found['difference']:+.3f}" in text
    assert f"Dice {found['difference']:+.3f} {found['low']:+.3f} to {found['high']:+.3f}" in \
        " ".join(t for _, t in page.all("tr"))
    pictures = [t for _, t in page.all("h3") if "Dice differs by" in t]
    assert pictures[0].startswith(cases[1].name), "where they differ most comes first"
    assert {"Dice over epochs", "Dice over operations", "Dice over minutes"} <= {t for _, t in page.all("h3")}


def test_runs_without_common_test_images_are_compared_by_their_curves(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "place/tiny"))
    (other / "test_scores.csv").unlink()
    (other / "test_scores.json").unlink()
    (other / "test_cases.npz").unlink()
    assert report_runs.main([str(run), str(other), "--out", str(tmp_path / "c.html")]) == 0
    text = (tmp_path / "c.html").read_text()
    check_page(Page(text), text)
    assert "has no test scores" in text
    assert "All settings are alike." in text
    assert str(other) in text, "two folders of one name are told apart by their paths"


def test_wrong_pages_are_refused_in_one_sentence(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "c.html").write_text("mine")
    for arguments, words in (
            ([tmp_path / "empty"], "no metrics.csv in it, so it is no run folder"),
            ([run, "--out", "a.html"], "the page of one run is report.html in its folder"),
            ([run, run], "a run is named twice"),
            ([run, tmp_path / "empty", "--out", "a.png"], "its ending is '.png'"),
            ([run, tmp_path / "empty", "--out", run / "report.html", "--overwrite"], "the page of the run in this"),
            ([run, tmp_path / "empty", "--out", tmp_path / "c.html"], "nothing is overwritten unasked")):
        assert report_runs.main(list(map(str, arguments))) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert (tmp_path / "c.html").read_text() == "mine"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [400, 1400])
def test_pages_fit_into_a_window(width, run, tmp_path):
    """Opened in a browser: nothing is wider than the window, and every picture is decoded."""
    other = Path(shutil.copytree(run, tmp_path / "a_rather_long_name_of_a_second_run_which_wraps"))
    assert report_runs.main([str(run), str(other), "--out", str(tmp_path / "c.html")]) == 0
    for path in (run / "report.html", tmp_path / "c.html"):
        found = measured(path, width, tmp_path)
        assert found["inner"] == width
        assert found["scroll"] <= width, f"{found['wide']} stick out"
        assert found["broken"] == 0
        assert found["height"] > 1000


def measured(path: Path, width: int, folder: Path) -> dict:
    """Return what a browser says of a page in a frame of this width."""
    page = path.read_text().replace("<details", "<details open").replace("&", "&amp;").replace('"', "&quot;")
    script = """
    const frame = document.querySelector("iframe");
    frame.onload = () => {
      const inside = frame.contentDocument, root = inside.documentElement;
      const wide = [...inside.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg, .skip")
        && e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName + "." + e.className);
      const broken = [...inside.images].filter(i => !i.complete || !i.naturalWidth).length;
      document.body.textContent = "FOUND" + JSON.stringify({inner: frame.contentWindow.innerWidth,
        scroll: root.scrollWidth, wide, broken, height: root.scrollHeight}) + "END";
    };"""
    frame = f'<!DOCTYPE html><body><iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>'
    (folder / "frame.html").write_text(f"{frame}<script>{script}</script></body>")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'u'}",
                           "--virtual-time-budget=10000", "--dump-dom", (folder / "frame.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    return json.loads(re.search(r"FOUND(.*?)END", done.stdout)[1])


# ---- TensorBoard


def read_logs(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    found.Reload()
    return found


def steps(found: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in found.Scalars(tag)]


def growths_of(run: Path) -> list[str]:
    (event,) = read_logs(run / "logs/growths").Tensors("growths/text_summary")
    return event.tensor_proto.string_val[0].decode().split("\n\n")


def test_one_chart_shows_the_whole_run(trained_run):
    train, valid, scores = (read_logs(trained_run[0] / "logs" / name) for name in ("train", "valid", "scores"))
    rows = read_metrics(trained_run[0] / "metrics.csv")
    for tag in ("main/dice", "main/loss", "main/soft_dice", "measures/iou"):
        assert steps(train, tag) == steps(valid, tag) == [1, 2, 3, 4], "one step an epoch of the run"
    assert [e.value for e in valid.Scalars("main/dice")] == pytest.approx([float(row["dice"]) for row in rows])
    assert [e.value for e in train.Scalars("main/loss")] == pytest.approx([float(row["train_loss"]) for row in rows])
    for tag in ("steps/lr", "speed/seconds", "speed/images_per_second"):
        assert steps(train, tag) == [1, 2, 3, 4]
    assert growths_of(trained_run[0])[1] == "stage 2, 64x64 pixels: from epoch 2 of the run on"
    assert [event.step for event in valid.Images("examples")] == [1, 2, 3, 4]
    assert len(train.Graph().node) > 100
    test = json.loads((trained_run[0] / "test_scores.json").read_text())["best_stage_4"]["dice"]["mean"]
    assert scores.Scalars("test/dice")[0].value == pytest.approx(test)
    assert {"_hparams_/session_start_info", "_hparams_/experiment"} <= set(scores.summary_metadata)


def test_a_resumed_run_logs_no_epoch_twice(shared_root, tmp_path):
    """Cut off after the second epoch was logged and before it was saved, so that it is trained and logged again."""
    epochs = [1, 1, 0, 1]
    trainer, loaders = make_trainer(shared_root, tmp_path / "run", epochs_per_stage=epochs)
    save, count = trainer.keeper.save_epoch, [0]

    def killed(*arguments):
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        save(*arguments)

    trainer.keeper.save_epoch = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loaders, say=lambda _: None)
    assert steps(read_logs(tmp_path / "run/logs/valid"), "main/dice") == [1, 2]
    again, loaders = make_trainer(shared_root, tmp_path / "run", epochs_per_stage=epochs)
    again.resume(tmp_path / "run/last.pth")
    again.fit(loaders, say=lambda _: None)
    for split in ("train", "valid"):
        found = read_logs(tmp_path / "run/logs" / split)
        assert steps(found, "main/dice") == [1, 2, 3]
    assert len(read_metrics(tmp_path / "run/metrics.csv")) == 3
    assert len(growths_of(tmp_path / "run")) == 3


def test_scores_are_logged_once_however_often_they_are_taken(tmp_path):
    for value in (0.25, 0.5):
        written = logs.Logs(tmp_path / "logs")
        written.add_scores({"lr": 0.1, "batch_sizes": {32: 4}, "preset": None}, {"test/dice": value})
        written.close()
    assert [event.value for event in read_logs(tmp_path / "logs/scores").Scalars("test/dice")] == [0.5]
    (tmp_path / "logs/scores/mine.txt").write_text("mine")
    logs.clear_logs(tmp_path / "logs")
    assert [path.name for path in (tmp_path / "logs").rglob("*") if path.is_file()] == ["mine.txt"]


def test_pictures_name_the_weights_they_show(shared_root, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("training.run_folder.predictions",
                        lambda cases, path, threshold, title: titles.append((len(cases), title)))
    root = write_data_set(tmp_path / "data", (3, 9, 1))
    trainer, _ = make_trainer(root, tmp_path / "run", epochs_per_stage=[0, 0, 0, 1])
    trainer.fit(create_progressive_dataloaders(root, {256: 3}), say=lambda _: None)
    assert titles == [(6, f"best_stage_4.pth: stage 4, epoch 1, Dice {trainer.best_scores[4]:.3f} over all validation "
                          f"images")]


def test_the_context_of_a_report_has_the_worst_and_the_best(trained_run):
    context = report_context(read_run(trained_run[0]))
    assert [len(context[name]) for name in ("worst", "best", "examples", "sentences")] == [2, 1, 3, 3]
    dice = [panels.last.dice for panels in (*context["worst"], *context["best"])]
    assert dice == sorted(dice)


def test_the_first_line_of_the_curves_is_dice_at_256_pixels(trained_run):
    figure = curves_figure(RunFolder(trained_run[0]).rows())
    assert all(tick == int(tick) for axis in figure.axes for tick in axis.get_xticks()), "epochs are whole"
    line = figure.axes[0].get_lines()[0]
    assert line.get_label() == "valid, at 256 pixels"
    assert line.get_ydata().tolist() == [row["dice"] for row in RunFolder(trained_run[0]).rows()]


@pytest.mark.parametrize("shape", [(90, 30), (30, 90), (64, 64), (200, 3)])
def test_words_above_a_row_of_predictions_have_room(shape, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    masks = np.zeros((2, *shape), bool)
    masks[0, 2:12, 1:3] = True
    predictions([Case("a", np.full((*shape, 1), 77, np.uint8), masks, np.full((2, *shape), 9, np.uint8), 1.0)],
                tmp_path / "p.png", title="weights")
    figure, = drawn
    figure.draw_without_rendering()
    first, second = figure.axes
    boxes = [text.get_window_extent() for text in (*first.texts, *second.texts, figure._suptitle)]
    assert len(boxes) == 9
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1) for box in boxes)
    picture = first.images[0].get_array()
    assert (picture == 77).all(axis=2).sum() == 2 * np.prod(shape), "the image and the image under its outlines"
    outlined = first.collections[0].get_paths()[0].get_extents()
    x = int(outlined.x0 + outlined.width / 2)
    assert (picture[2:12, x] == 77).all(), "outlines lie on the image"
    left = picture.shape[1] - 1 - np.argmax((picture[5, ::-1] == 77).all(axis=1)) - shape[1] + 1
    assert (outlined.x0, outlined.x1) == pytest.approx((left + 0.5, left + 2.5), abs=0.01), "at their place in it"


def test_time_is_kept_back_for_the_pictures_of_the_last_stage(shared_root, tmp_path):
    """Of a validation that is looked at twice; nothing else takes time after the last epoch where there is no test."""
    trainer, loaders = make_trainer(shared_root, tmp_path / "run")
    limit = TimeLimit(10)
    limit.measure(trainer, {256: loaders[256][:2]}, [4])
    assert time_limit.ENDING < limit.reserve < time_limit.ENDING + 2 * limit.costs[4]
