"""Tests of the measures, of scores with their intervals and comparison, and of evaluation from the shell.

    python -m pytest tests/test_scoring.py
"""

import json
import math
import os
import time
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats

import evaluate_papsmear
import train_papsmear
from checkpoints import load_checkpoint
from conftest import (
    ONE_STAGE,
    draw_pair,
    labelled,
    lively_model,
    random_nuclei,
    read_rows,
    write_checkpoint,
    write_data_set,
)
from images.files import load_image, save_png
from images.masks import load_mask
from images.targets import drawn_nuclei
from inference import Predictor
from nuclei.outlines import boundary
from nuclei.overlaps import overlaps
from scoring import scores
from scoring.measures import INSTANCE_METRICS, boundary_f1, instance_metrics, pixel_metrics
from scoring.scores import compare, score_pairs, scored_pairs, summarise

# ---- nucleus by nucleus


def slow_instance_metrics(found: np.ndarray, drawn: np.ndarray) -> dict:
    """The same measures written down from the papers, nucleus by nucleus, with whole-image masks."""
    predicted = [found == k for k in np.unique(found) if k]
    truth = [drawn == k for k in np.unique(drawn) if k]
    if not predicted and not truth:
        return dict.fromkeys(INSTANCE_METRICS, 1.0)
    shared = total = 0
    used, matched = set(), []
    for mask in truth:
        ious = [(mask & p).sum() / (mask | p).sum() for p in predicted]
        best = int(np.argmax(ious)) if ious else None
        if best is None or ious[best] == 0:
            total += mask.sum()
            continue
        shared += (mask & predicted[best]).sum()
        total += (mask | predicted[best]).sum()
        used.add(best)
        matched += [iou for iou in ious if iou > 0.5]
    total += sum(p.sum() for j, p in enumerate(predicted) if j not in used)
    missed, wrong = len(truth) - len(matched), len(predicted) - len(matched)
    dq = len(matched) / (len(matched) + missed / 2 + wrong / 2)
    sq = sum(matched) / len(matched) if matched else 0.0
    return {"aji": shared / total, "pq": dq * sq, "dq": dq, "sq": sq, "f1": dq}


def test_instance_measures_of_drawn_rectangles():
    """Two drawn nuclei of 100 pixels; the second is found as two halves of 60 and 40, and one more is invented."""
    drawn = labelled((40, 40), (0, 10, 0, 10), (20, 30, 20, 30))
    found = labelled((40, 40), (0, 10, 2, 10), (20, 26, 20, 30), (26, 30, 20, 30), (0, 5, 30, 40))
    scores = instance_metrics(found, drawn)
    # First pair 80/100; second 60/100; the half of 40 and the invented 50 are left over.
    assert scores["aji"] == pytest.approx((80 + 60) / (100 + 100 + 40 + 50))
    assert scores["dq"] == scores["f1"] == pytest.approx(2 / (2 + 2 / 2 + 0 / 2))
    assert scores["sq"] == pytest.approx((0.8 + 0.6) / 2)
    assert scores["pq"] == pytest.approx(scores["dq"] * scores["sq"])
    # Half of a nucleus is no match: the IoU must be above 0.5.
    half = instance_metrics(labelled((40, 40), (0, 10, 0, 5)), labelled((40, 40), (0, 10, 0, 10)))
    assert half == {"aji": 0.5, "pq": 0, "dq": 0, "sq": 0, "f1": 0}


def test_one_prediction_over_two_nuclei_is_taken_twice():
    """The variant of Kumar et al. 2017: the area of a merged prediction counts once for each nucleus it covers."""
    drawn = labelled((10, 20), (0, 10, 0, 10), (0, 10, 10, 20))
    assert instance_metrics(np.ones_like(drawn), drawn)["aji"] == pytest.approx((100 + 100) / (200 + 200))


def test_a_nucleus_found_as_two_equal_halves():
    """No half is a match, as its IoU is 0.5 and not more, and the AJI takes one of them; other programs differ here."""
    drawn = labelled((10, 20), (0, 10, 0, 10))
    halves = labelled((10, 20), (0, 10, 0, 5), (0, 10, 5, 10))
    scores = instance_metrics(halves, drawn)
    assert scores == {"aji": pytest.approx(50 / (100 + 50)), "pq": 0, "dq": 0, "sq": 0, "f1": 0}


def test_disc_against_a_smaller_disc():
    rows, columns = np.mgrid[:200, :200]
    distance = np.hypot(rows - 100, columns - 100)
    scores = instance_metrics((distance <= 72).astype(int), (distance <= 80).astype(int))
    assert scores["aji"] == scores["pq"] == scores["sq"] == pytest.approx(72 ** 2 / 80 ** 2, abs=0.005)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, bool])
def test_rules_for_empty_maps(dtype):
    empty, one = np.zeros((8, 8), dtype), np.eye(8).astype(dtype)
    assert set(instance_metrics(empty, empty).values()) == {1.0}
    for pair in ((one, empty), (empty, one)):
        assert set(instance_metrics(*pair).values()) == {0.0}
        assert boundary_f1(*pair) == 0
    assert boundary_f1(empty, empty) == 1
    assert set(instance_metrics(one, one).values()) == {1.0}


@pytest.mark.parametrize("seed", range(6))
def test_instance_measures_match_an_independent_implementation(seed):
    rng = np.random.default_rng(seed)
    drawn = random_nuclei(rng, 90, 25, 8)
    found = np.roll(drawn, rng.integers(-4, 5, 2), (0, 1))
    found[found == rng.choice(found[found > 0])] = 0
    found[rng.integers(90):, rng.integers(90):] = random_nuclei(rng, 90, 15, 5)[:1, :1]
    found = np.where(rng.random(found.shape) < 0.03, 3, found)
    fast, slow = instance_metrics(found, drawn), slow_instance_metrics(found, drawn)
    assert set(fast) == set(INSTANCE_METRICS)
    assert all(abs(fast[name] - slow[name]) < 1e-9 for name in INSTANCE_METRICS), (fast, slow)


@pytest.mark.parametrize(("dtype", "largest"), [
    (np.uint8, 9), (np.int32, 9), (np.uint16, 65_535), (np.int32, 2 ** 31 - 1), (np.uint32, 2 ** 32 - 1),
    (np.int64, 2 ** 40)])
def test_overlaps_of_drawn_boxes(dtype, largest):
    """One box found over two drawn ones, another over nothing; the memory does not grow with the labels."""
    drawn = labelled((20, 30), (0, 10, 0, 10), (0, 10, 10, 20))
    found = np.zeros((20, 30), dtype)
    found[0:10, 4:14], found[15:20, 0:4] = 5, largest
    tracemalloc.start()
    table = overlaps(found, drawn)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert table.found_areas.tolist() == [100, 20]
    assert table.drawn_areas.tolist() == [100, 100]
    assert list(zip(table.found, table.drawn, table.shared, table.unions, strict=True)) == [(0, 0, 60, 140),
                                                                                           (0, 1, 40, 160)]
    assert all(values.dtype == np.int64 for values in (table.found_areas, table.drawn_areas, table.shared))
    inside = overlaps(np.where(found == 5, largest, largest - 1).astype(dtype), found == 5)  # no background is found
    assert inside.found_areas.tolist() == [500, 100]
    assert (inside.found.tolist(), inside.drawn.tolist(), inside.shared.tolist()) == ([1], [0], [100])


def test_overlaps_are_those_counted_pair_by_pair():
    rng = np.random.default_rng(0)
    found, drawn = random_nuclei(rng, 120, 30, 9), random_nuclei(rng, 120, 30, 9)
    table = overlaps(found, drawn)
    masks = [[labels == k for k in np.unique(labels) if k] for labels in (found, drawn)]
    counted = [(i, j, int((a & b).sum())) for i, a in enumerate(masks[0]) for j, b in enumerate(masks[1])]
    assert list(zip(table.found, table.drawn, table.shared, strict=True)) == [pair for pair in counted if pair[2]]
    assert table.found_areas.tolist() == [mask.sum() for mask in masks[0]]
    assert table.drawn_areas.tolist() == [mask.sum() for mask in masks[1]]
    assert all(len(values) == 0 for values in vars(overlaps(found[:0], drawn[:0])).values())


def test_boundary_f1_of_shifted_squares():
    """A square of side 40, found k pixels further right: its vertical sides are off by k, its others by nothing."""
    drawn = labelled((80, 80), (20, 60, 20, 60)).astype(bool)
    outline = 4 * 39
    assert boundary(drawn).sum() == outline
    assert boundary_f1(drawn, drawn, tolerance=0) == 1
    near, far = np.roll(drawn, 2, 1), np.roll(drawn, 5, 1)
    assert boundary_f1(near, drawn) == 1
    # Too far from the other outline are the whole outer side (40), of the horizontal sides what lies 3 and 4 columns
    # beyond the other corner (2 sides of 2), and of the inner side all but 3 rows at either end (40 - 6).
    assert boundary_f1(far, drawn) == pytest.approx(1 - (40 + 4 + 34) / outline)
    # Between touching nuclei label maps have a boundary that masks do not have.
    two = labelled((20, 20), (0, 20, 0, 10), (0, 20, 10, 20))
    assert boundary(two)[5, 9]
    assert not boundary(two > 0)[5, 9]


def test_instance_measures_of_a_full_slide_field_take_less_than_a_second():
    rows, columns = np.mgrid[:1000, :1000]
    drawn = np.where((rows % 23 < 20) & (columns % 23 < 19), (rows // 23) * 44 + columns // 23 + 1, 0)
    assert len(np.unique(drawn)) > 1900
    found = np.roll(drawn, (2, 3), (0, 1))
    start = time.process_time()
    instance_metrics(found, drawn)
    boundary_f1(found, drawn)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(("found", "words"), [
    (np.zeros((4, 4)), "whole numbers"), (np.zeros((4, 5), int), "one shape"), (np.full((4, 4), -1), "at least 0")])
def test_label_maps_that_are_refused(found, words):
    with pytest.raises(ValueError, match=words):
        instance_metrics(found, np.zeros((4, 4), int))


# ---- scores and their comparison


def scored(values: list[float]) -> list[dict]:
    return [{"image": str(i), "dice": value, "empty": 0} for i, value in enumerate(values)]


def test_interval_of_the_mean_is_that_of_theory():
    values = np.random.default_rng(0).normal(0.8, 0.05, 400)
    summary = summarise(scored(list(values)))["dice"]
    half = 1.96 * values.std() / 20
    assert summary["mean"] == pytest.approx(values.mean())
    assert summary["low"] == pytest.approx(values.mean() - half, abs=0.0005)
    assert summary["high"] == pytest.approx(values.mean() + half, abs=0.0005)
    assert summarise(scored(list(values)))["dice"] == summary, "the same seed gives the same interval"


def test_interval_is_the_percentile_bootstrap(monkeypatch):
    """The same random numbers in numpy give the same interval, however many are drawn at once."""
    values = np.random.default_rng(0).beta(8, 2, 43)
    draws = np.random.default_rng(5).integers(0, 43, (10_000, 43))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    for batch in (scores.BATCH_VALUES, 43 * 77):
        monkeypatch.setattr(scores, "BATCH_VALUES", batch)
        summary = summarise(scored(list(values)), seed=5)["dice"]
        assert [summary["low"], summary["high"]] == pytest.approx([low, high], abs=1e-12)


def test_one_image_alone():
    """A single image says nothing of how others would do, so that its interval is all that can be."""
    assert summarise(scored([0.7]))["dice"] == {"mean": 0.7, "std": 0, "low": 0, "high": 1}
    result = compare(scored([0.75]), scored([0.5]))["dice"]
    assert (result["difference"], result["low"], result["high"]) == (0.25, -1, 1)


def test_comparison_is_paired():
    """A constant lead is certain although the images differ far more than the two checkpoints."""
    values = np.random.default_rng(0).uniform(0.2, 0.9, 12)
    noise = np.random.default_rng(1).normal(0, 0.002, 12)
    result = compare(scored(list(values + 0.01 + noise)), scored(list(values)))["dice"]
    assert result["difference"] == pytest.approx(0.01 + noise.mean())
    assert 0 < result["low"] < result["difference"] < result["high"] < 0.02
    assert result["p_bootstrap"] < 0.001
    assert result["p_wilcoxon"] == pytest.approx(2 / 2 ** 12)  # of 2**12 signs, all plus or all minus
    same = compare(scored(list(values)), scored(list(values)))["dice"]
    assert (same["difference"], same["p_bootstrap"], same["p_wilcoxon"]) == (0, 1, 1)
    with pytest.raises(ValueError, match="different images"):
        compare(scored([1.0]), scored([1.0, 0.5]))


def test_groups_are_resampled_and_not_their_images():
    """Ten images of one patient that all score the same are worth one, not ten."""
    rng = np.random.default_rng(0)
    means = rng.normal(0.8, 0.05, 30)
    alone = scored(list(means))
    copied = [row | {"image": f"{i}_{k}", "group": str(i)} for i, row in enumerate(alone) for k in range(10)]
    wide, narrow = summarise(copied)["dice"], summarise([{**row, "group": row["image"]} for row in copied])["dice"]
    assert (wide["low"], wide["high"]) == pytest.approx([summarise(alone)["dice"][k] for k in ("low", "high")])
    assert (narrow["high"] - narrow["low"]) == pytest.approx((wide["high"] - wide["low"]) / np.sqrt(10), rel=0.1)
    unequal = scored([1.0, 1.0, 1.0, 0.0])
    for row, group in zip(unequal, "aaab", strict=True):
        row["group"] = group
    assert summarise(unequal)["dice"]["mean"] == 0.75, "the mean is over images all the same"
    others = [row | {"dice": row["dice"] - 0.01 * (i % 3)} for i, row in enumerate(copied)]
    result = compare(copied, others)["dice"]
    by_group = [np.mean([a["dice"] - b["dice"] for a, b in zip(copied, others, strict=True) if a["group"] == str(g)])
                for g in range(30)]
    assert result["p_wilcoxon"] == pytest.approx(stats.wilcoxon(by_group).pvalue)


def test_rows_know_their_group(tmp_path):
    root = write_data_set(tmp_path / "data", (2, 1, 4))
    with open(root / "manifest.csv", "w") as file:
        file.write("tile,split,source,group\n")
        file.writelines(f"test_{i},test,slide_{i}.tif,patient_{i // 2}\n" for i in range(4))
    predictor = Predictor(write_checkpoint(tmp_path / "a.pth", lively_model()))
    pairs = scored_pairs(root, "test")
    assert [row["group"] for row in score_pairs(predictor, pairs)] == ["patient_0"] * 2 + ["patient_1"] * 2
    assert [row["group"] for row in score_pairs(predictor, pairs, group_regex=r"\d")] == list("0123")
    os.renames(root / "test/images", root / "whole/test/images")
    os.renames(root / "test/masks", root / "whole/test/masks")
    assert [pair.group for pair in scored_pairs(root, "test")] == ["patient_0"] * 2 + ["patient_1"] * 2


# ---- evaluation


def tile_data_set(root):
    """What a converter of large images leaves: tiles, and beside them whole images with instance maps."""
    write_data_set(root, counts=(2, 1, 2))
    (root / "dataset.json").write_text('{"format": 1, "sizing": "tile", "source": "drawn", "microns_per_pixel": null}')
    for kind in ("images", "masks", "instances"):
        (root / "whole/test" / kind).mkdir(parents=True)
    nuclei = labelled((330, 350), (20, 40, 20, 40), (20, 40, 40, 60), (200, 230, 100, 130))
    save_png(root / "whole/test/images/large.png", np.where(nuclei > 0, 60, 190).astype(np.uint8))
    save_png(root / "whole/test/masks/large.png", nuclei > 0)
    save_png(root / "whole/test/instances/large.png", (nuclei * 1000).astype(np.uint16))
    return root


def test_tiles_train_and_whole_images_are_predicted_at_native_scale(tmp_path, capsys):
    """From a data set of tiles to a test score of a larger whole image; the checkpoint tells how it was trained."""
    root = write_data_set(tmp_path / "data", counts=(2, 1, 1), side=256)
    (root / "dataset.json").write_text('{"format": 1, "sizing": "tile", "source": "drawn", "microns_per_pixel": null}')
    for kind in ("images", "masks"):
        (root / "whole/test" / kind).mkdir(parents=True)
    image, mask = draw_pair(np.random.default_rng(5), 300)
    save_png(root / "whole/test/images/large.png", image)
    save_png(root / "whole/test/masks/large.png", mask)
    assert train_papsmear.main(["--data_root", str(root), "--output_dir", str(tmp_path), "--experiment_name", "tiles",
                                *ONE_STAGE]) == 0
    assert load_checkpoint(tmp_path / "tiles/best_stage_4.pth")["data"].sizing == "tile"
    assert Predictor(tmp_path / "tiles/best_stage_4.pth").predict(image).shape == (300, 300, 1)
    assert "large" in (tmp_path / "tiles/test_scores.csv").read_text()
    save_png(root / "train/images/train_0.png", image)
    save_png(root / "train/masks/train_0.png", mask)
    assert train_papsmear.main(["--data_root", str(root), "--output_dir", str(tmp_path), *ONE_STAGE]) == 2
    assert "300x300 pixels; dataset.json says" in capsys.readouterr().err


def test_whole_images_and_instance_maps_are_scored(tmp_path, capsys):
    root = tile_data_set(tmp_path / "data")
    (pair,) = scored_pairs(root, "test")
    assert pair.image == root / "whole/test/images/large.png"
    drawn = drawn_nuclei(pair, load_mask(pair.mask)[..., 0])
    assert sorted(np.unique(drawn)) == [0, 1000, 2000, 3000]
    path = write_checkpoint(tmp_path / "a.pth", lively_model(), "tile")
    assert evaluate_papsmear.main([str(path), "--data_root", str(root), "--instances", "--out", str(tmp_path / "e"),
                                   "--device", "cpu"]) == 0
    assert "drawn nuclei of 1 images from their instance maps, of 0" in capsys.readouterr().out
    scores = json.loads((tmp_path / "e/summary.json").read_text())["scores"]
    row = read_rows(tmp_path / "e/scores.csv")[0]
    assert row["nuclei_drawn"] == "3"
    assert float(row["aji"]) == pytest.approx(scores["aji"]["mean"])
    (root / "whole/test/instances/large.png").unlink()
    assert drawn_nuclei(pair, load_mask(pair.mask)[..., 0]).max() == 2, "without a map touching nuclei are one"
    (root / "splits.csv").write_text("path,split\ntest/images/test_0.png,test\n")
    assert scored_pairs(root, "test")[0].name == "test_0", "a splits.csv decides"


def test_nuclei_that_are_all_too_faint_are_named(tmp_path, capsys):
    """Else an AJI of 0 stands beside a good Dice, and nothing says why."""
    root = tile_data_set(tmp_path / "data")
    for spread, faint in ((0.02, True), (5.0, False)):
        path = write_checkpoint(tmp_path / "a.pth", lively_model(spread=spread), "tile")
        assert evaluate_papsmear.main([str(path), "--data_root", str(root), "--instances", "--out",
                                       str(tmp_path / str(spread)), "--device", "cpu"]) == 0
        assert (read_rows(tmp_path / f"{spread}/scores.csv")[0]["nuclei_found"] == "0") == faint
        assert ("warning: in 1 of 1 images, e.g. large, all nuclei were left out as too small or too faint" in
                capsys.readouterr().out) == faint


def test_evaluation_repeats_the_table_of_the_training(trained_run, shared_root, tmp_path, capsys):
    folder = trained_run[0]
    before = {p: p.stat().st_mtime_ns for p in shared_root.rglob("*")}
    options = [str(folder / "best_stage_4.pth"), "--data_root", str(shared_root), "--out", str(tmp_path / "e"),
               "--instances", "--all_scales", "--compare", str(folder / "best_stage_3.pth")]
    assert evaluate_papsmear.main(options) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "e/summary.json").read_text())
    trained = json.loads((folder / "test_scores.json").read_text())["best_stage_4"]
    assert summary["scores"]["dice"] == trained["dice"]
    assert set(summary["scales"]) == {"32", "64", "128", "256"}
    assert summary["scales"]["256"]["dice"] == pytest.approx(trained["dice"]["mean"])
    difference = summary["comparison"]["dice"]["difference"]
    assert difference == pytest.approx(trained["dice"]["mean"] - summary["other_scores"]["dice"]["mean"])
    assert "p Wilcoxon" in printed
    assert "of 3 as the connected parts of the mask" in printed
    for name in ("scores.csv", "scores_compared.csv"):
        assert len(read_rows(tmp_path / "e" / name)) == 3
    assert load_image(tmp_path / "e/cases.png", 3).std() > 10
    assert {p: p.stat().st_mtime_ns for p in shared_root.rglob("*")} == before
    assert evaluate_papsmear.main(options) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_dice_of_discs_matches_its_geometry():
    rows, columns = np.mgrid[:400, :400]
    a, b = (torch.from_numpy(np.hypot(rows - 200, columns - x) <= 80)[None, None] for x in (200, 280))
    overlap = 2 * 80 ** 2 * math.acos(0.5) - 80 / 2 * math.sqrt(4 * 80 ** 2 - 80 ** 2)  # lens of two equal circles
    assert pixel_metrics(a, b)["dice"].item() == pytest.approx(overlap / (math.pi * 80 ** 2), abs=0.005)


def test_one_group_tells_nothing():
    rows, others = ([{"image": str(i), "group": "a", "dice": 0.5 + shift, "empty": 0} for i in range(50)]
                    for shift in (0, 0.01))
    result = compare(rows, others)["dice"]
    assert (result["p_bootstrap"], result["p_wilcoxon"]) == (1.0, 1.0)
    assert (result["low"], result["high"]) == (-1, 1)
    assert (summarise(rows)["dice"]["low"], summarise(rows)["dice"]["high"]) == (0, 1)


@pytest.mark.parametrize("groups", [2, 3, 5])
def test_few_groups_of_one_sign_are_no_proof(groups):
    rows, others = ([{"image": str(i), "group": str(i % groups), "dice": 0.5 + shift + i / 1000} for i in range(30)]
                    for shift in (0.1, 0))
    assert compare(rows, others)["dice"]["p_bootstrap"] == 2 / 2 ** groups
