"""Tests of two classes that make cells: their names, and the ratio of nucleus to cytoplasm against the drawn one.

    python -m pytest tests/test_ratio.py
"""

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

import evaluate_papsmear
import train_papsmear
from checkpoints import load_checkpoint
from conftest import TINY, labelled, lively_model, read_rows, write_checkpoint
from images.files import save_png
from scoring.ratio import RATIO_COLUMNS, cell_ratios, compare_ratios, draw_ratios


def write_cells(root, names=("nucleus", "cytoplasm")):
    """Write cells of 40x40 pixels around nuclei of 20x20, so that the ratio is 400 / 1200."""
    for split, count in (("train", 6), ("valid", 3), ("test", 3)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((64, 64), np.uint8)
            mask[10:50, 5 + i:45 + i], mask[20:40, 15 + i:35 + i] = 2, 1
            Image.fromarray(mask).save(root / split / "masks" / f"{split}{i}.png")
            save_png(root / split / "images" / f"{split}{i}.png", np.array([230, 60, 150], np.uint8)[mask])
    (root / "dataset.json").write_text(json.dumps({"sizing": "resize", "classes": list(names)} if names else
                                                  {"sizing": "resize"}))
    return root


def test_ratios_of_drawn_boxes():
    drawn = labelled((60, 100), (20, 30, 10, 20), (20, 30, 60, 70), (50, 55, 90, 95))
    found = labelled((60, 100), (20, 30, 10, 18), (0, 5, 0, 5))  # of the first 80 of 100 pixels; the others not
    cytoplasm = np.zeros(drawn.shape, bool)
    cytoplasm[10:40, :30] = cytoplasm[10:40, 50:80] = True
    rows = cell_ratios("a.png", drawn, cytoplasm, found, cytoplasm)
    assert [tuple(row) for row in rows] == [RATIO_COLUMNS] * 3
    assert [(row["drawn_nucleus"], row["drawn_cytoplasm"]) for row in rows] == [(100, 800), (100, 800), (25, 0)]
    assert [row["drawn_ratio"] for row in rows] == [0.125, 0.125, None]
    assert [row["predicted_nucleus"] for row in rows] == [80, None, None]
    alone = cell_ratios("a.png", drawn, cytoplasm, np.where(found == 1, 1, 0), cytoplasm & (np.arange(100) < 40))
    assert (alone[0]["predicted_cytoplasm"], alone[0]["predicted_ratio"]) == (820, round(80 / 820, 4))


def test_agreement_of_ratios_that_are_known(tmp_path):
    rows = [{"drawn_ratio": ratio, "predicted_ratio": 2 * ratio, "predicted_nucleus": 5} for ratio in (0.01, 0.1, 1, 5)]
    rows += [{"drawn_ratio": 1.0, "predicted_ratio": None, "predicted_nucleus": None}]
    found = compare_ratios(rows)
    assert (found["cells"], found["compared"], found["not_found"]) == (5, 4, 1)
    assert [found[name] for name in ("factor", "low", "high", "pearson", "spearman")] == pytest.approx([2, 2, 2, 1, 1])
    spread = compare_ratios([row | {"predicted_ratio": row["drawn_ratio"] * factor}
                             for row, factor in zip(rows, (0.5, 2, 0.5, 2), strict=False)])
    assert spread["factor"] == pytest.approx(1)
    assert spread["high"] == pytest.approx(np.exp(1.96 * np.log(2) * (4 / 3) ** 0.5))
    assert spread["low"] == pytest.approx(1 / spread["high"])
    assert compare_ratios(rows[:2])["factor"] is None, "two cells have no spread worth the name"
    draw_ratios(rows, found, tmp_path / "r.png")
    with Image.open(tmp_path / "r.png") as image:
        assert min(image.size) > 300


def test_names_of_classes_go_from_the_data_into_the_checkpoint_and_the_ratio_comes_out(tmp_path, capsys):
    root = write_cells(tmp_path / "data")
    assert train_papsmear.main(["--data_root", str(root), "--in_channels", "3", "--out_channels", "2", "--output_dir",
                                str(tmp_path), "--experiment_name", "run", *TINY, "--lr", "0.01",
                                "--epochs_per_stage", "14,6,1,1", "--device", "cpu"]) == 0
    checkpoint = tmp_path / "run/best_stage_4.pth"
    assert load_checkpoint(checkpoint)["data"].class_names == ("nucleus", "cytoplasm")
    out = tmp_path / "scores"
    command = [str(checkpoint), "--data_root", str(root), "--split", "train", "--ratio", "--device", "cpu"]
    capsys.readouterr()
    assert evaluate_papsmear.main([*command, "--out", str(out)]) == 0
    said, rows = capsys.readouterr().out, read_rows(out / "ratios.csv")
    assert {row["drawn_ratio"] for row in rows} == {str(round(400 / 1200, 4))}
    found = json.loads((out / "summary.json").read_text())["ratio"]
    assert f"of {found['compared']} of 6 drawn cells ({found['not_found']} nuclei not found)" in said
    assert found["compared"] == 6, "shown colours of their own, nuclei and cytoplasm are found"
    assert found["factor"] == pytest.approx(1, abs=0.35)
    assert (out / "ratios.png").exists()


def test_a_ratio_needs_both_classes_by_name(tmp_path, capsys):
    root = write_cells(tmp_path / "data", names=())
    checkpoint = write_checkpoint(tmp_path / "a.pth", lively_model(in_channels=3, out_channels=2))
    assert evaluate_papsmear.main([str(checkpoint), "--data_root", str(root), "--ratio", "--device", "cpu"]) == 2
    assert "has no names of classes; nucleus and cytoplasm are needed" in capsys.readouterr().err
    (root / "dataset.json").write_text('{"sizing": "resize", "classes": "nucleus"}')
    assert evaluate_papsmear.main([str(checkpoint), "--data_root", str(root), "--device", "cpu"]) == 2
    assert "classes is 'nucleus'; it must be a list of the names" in capsys.readouterr().err


def test_large_numbers_of_nuclei_take_no_memory():
    drawn, cytoplasm = labelled((20, 20), (2, 5, 2, 5), (12, 15, 5, 15)), np.ones((20, 20), bool)
    large = np.where(drawn == 2, 2_000_000_000, drawn)
    tracemalloc.start()
    rows = cell_ratios("a.png", large, cytoplasm, large, cytoplasm)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == cell_ratios("a.png", drawn, cytoplasm, drawn, cytoplasm)
    assert peak < 2 ** 24
