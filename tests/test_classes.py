"""Tests of the scores class by class, and of what masks allow at most.

    python -m pytest tests/test_classes.py
"""

import csv

import numpy as np
import pytest

from benchmarks import classes
from conftest import read_rows, words
from images.files import save_png


@pytest.fixture
def cells(tmp_path):
    """A data set of four cells of two classes: the masks of class round lose their one pixel to a smooth outline."""
    with open(tmp_path / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("tile", "split", "source", "group"))
        for i, (split, kind) in enumerate((("train", "half"), ("valid", "half"), ("test", "round"), ("test", "half"))):
            mask = np.zeros((60, 40), np.uint8)
            if kind == "half":
                mask[30:] = 255
            else:
                mask[7, 9] = 255
            for folder, pixels in (("images", mask), ("masks", mask)):
                (tmp_path / split / folder).mkdir(parents=True, exist_ok=True)
                save_png(tmp_path / split / folder / f"{i}.png", pixels)
            writer.writerow((i, split, f"{kind}/{i}.BMP", i))
    return tmp_path


def write_scores(path, **dice):
    path.write_text("image,group,dice\n" + "".join(f"{name[1:]},g,{value}\n" for name, value in dice.items()))
    return path


@pytest.mark.parametrize("draw", [lambda mask: mask[:, 20:], lambda mask: mask[:, :0]])
def test_a_straight_edge_on_the_grid_and_an_empty_mask_are_redrawn_as_they_are(draw):
    mask = np.zeros((60, 40), bool)
    draw(mask)[:] = True
    assert classes.ceilings(mask, 20) == {"smooth": 1, "grid": 1}


def test_what_is_smaller_than_the_grid_is_lost():
    mask = np.zeros((80, 80), bool)
    mask[40:, :] = True
    mask[10, 10] = True
    found = classes.ceilings(mask, 20)
    assert found["smooth"] == found["grid"] == pytest.approx(2 * 3200 / (3201 + 3200))


def test_each_class_and_fold_has_its_mean(cells, capsys):
    one, two = (write_scores(cells / "1.csv", _0=0.5, _2=0.25), write_scores(cells / "2.csv", _1=0.75))
    assert classes.main(words("--data_root", cells, "--scores", one, two, "--apart", "round", "--grid", "20", "--out",
                              cells / "out")) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert (cells / "out/classes.md").read_text() in said
    for line in ("| half | 2 | 0.6250 ± 0.1250 | 1.0000 ± 0.0000 | 1.0000 ± 0.0000 |",
                 "| round | 1 | 0.2500 ± 0.0000 | 0.0000 ± 0.0000 | 0.0000 ± 0.0000 |",
                 "| **all** | 3 | 0.5000 ± 0.2041 |", "| **without round** | 2 | 0.6250 ± 0.1250 |",
                 "| 1 | 2 | 0.3750 ± 0.1250 |", "| 2 | 1 | 0.7500 ± 0.0000 |"):
        assert line in said
    assert [(row["image"], row["class"], row["fold"]) for row in read_rows(cells / "out/classes.csv")] == [
        ("0", "half", "1"), ("1", "half", "2"), ("2", "round", "1")]
    assert classes.main(words("--data_root", cells, "--out", cells / "out")) == 2
    assert "nothing is overwritten unasked" in capsys.readouterr().err


def test_without_scores_the_masks_of_all_splits_are_measured(cells, capsys):
    assert classes.main(words("--data_root", cells, "--out", cells / "out")) == 0
    assert "| half | 3 |  | 1.0000" in capsys.readouterr().out


def test_scores_that_do_not_fit_are_refused(cells, capsys):
    first, again, strange = (write_scores(cells / "1.csv", _0=0.5), write_scores(cells / "2.csv", _0=0.75),
                             write_scores(cells / "3.csv", _9=0.75))
    empty, odd = cells / "4.csv", write_scores(cells / "5.csv", _0="")
    empty.write_text("image,f1\n0,1\n")
    for options, message in ((("--scores", first, again), f"0 is scored in {first} too"),
                             (("--scores", strange), "9: scored, but not in the data set"),
                             (("--scores", odd), "0 has a Dice of ''; it must be a number"),
                             (("--scores", empty), "no table of scores with the columns image and dice"),
                             (("--apart", "square"), "--apart square: no such class among half, round")):
        assert classes.main(words("--data_root", cells, *options, "--out", cells / "out")) == 2
        assert message in capsys.readouterr().err
    (cells / "manifest.csv").unlink()
    assert classes.main(words("--data_root", cells, "--out", cells / "out")) == 2
    assert "its class is not known" in capsys.readouterr().err
    assert not (cells / "out").exists()
