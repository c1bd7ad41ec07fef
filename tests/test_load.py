"""The short form of `python tests/load.py`: a few hundred images, a few hundred steps; and that it notices what grows.

    python -m pytest tests/test_load.py
"""

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("memory and open files are read from /proc", allow_module_level=True)

from images.splits import list_splits
from tests import load
from tests.load import Figure, Moment, Watched, figures_of_check, figures_of_training, train_long, watched, write_images


def broken(figures: list[Figure]) -> list[str]:
    return [figure.what for figure in figures if not figure.holds]


def test_a_data_set_of_many_images_is_checked(capsys):
    assert broken(load.check_images(300)) == []
    said = capsys.readouterr().out
    assert "300 source images in all" in said
    assert "leakage: 0 of 30 pictures of valid are in train" in said


def test_the_images_are_as_many_as_asked_for_and_no_two_alike(tmp_path):
    splits = list_splits(write_images(tmp_path / "data", 100))
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 80, "valid": 10, "test": 10}
    pairs = [pair for of_split in splits.values() for pair in of_split]
    assert len({pair.image.read_bytes() for pair in pairs}) == 100
    assert len({pair.mask.stat().st_ino for pair in splits["train"]}) == load.SHAPES


def test_a_training_of_many_steps(tmp_path):
    seen: list[Moment] = []
    found = train_long(tmp_path, 20, seen.append, moments=4)
    assert seen == found
    assert [moment.epochs for moment in found] == [5, 10, 15, 20]
    figures = {figure.what: figure for figure in figures_of_training(found)}
    for what in ("growth of memory since then", "growth of open files since then"):
        assert figures[what].holds, figures[what]
    assert (tmp_path / "run/logs").is_dir()
    assert (tmp_path / "run/final_model.pth").is_file()


def test_a_process_is_watched_from_outside():
    """Its terminal, its memory, its exit code."""
    done = watched("-c", "import sys, time; from tqdm import tqdm\n"
                         "for _ in tqdm(range(100), mininterval=0): x = b'1' * 150_000_000 if _ == 50 else 0\n"
                         "print('hello'); time.sleep(0.2); sys.exit(3)")
    assert (done.code, done.printed) == (3, "hello\n")
    assert "100%|" in done.on_terminal
    assert 150_000_000 < done.peak < 300_000_000
    assert 0 < done.processor_seconds < 10


def test_what_a_check_may_take():
    def figures(seconds=80.0, megabytes=1400.0, bar="100%|#|"):
        return broken(figures_of_check(10_000, Watched(0, 200.0, seconds, int(megabytes * load.MB), "", 10 * bar)))

    assert figures() == []
    assert figures(seconds=1000.0) == ["processor time"]
    assert figures(megabytes=4000.0) == ["largest memory"]
    assert figures(bar="") == ["times a progress bar was drawn"]


def test_what_a_training_may_take():
    def figures(memory=0.0, files=0, seconds=1.0):
        marks = range(100, 1100, 100)
        return broken(figures_of_training([
            Moment(k, int((400 + memory * k) * load.MB), 20 + files * (k // 300), k + (seconds - 1) * max(0, k - 900))
            for k in marks]))

    assert figures() == []
    assert figures(memory=0.05) == ["growth of memory since then"]
    assert figures(files=1) == ["growth of open files since then"]
    assert figures(seconds=5.0) == ["processor time of an epoch at the end"]


@pytest.mark.parametrize(("value", "code"), [(1.0, 0), (3.0, 1)])
def test_the_exit_code_says_whether_all_bounds_hold(value, code, monkeypatch, capsys):
    monkeypatch.setattr(load, "run_steps", lambda steps, hours: [Figure("memory", value, "MB", at_most=2)])
    assert load.main(["steps"]) == code
    assert ("does not hold" in capsys.readouterr().out) == bool(code)
