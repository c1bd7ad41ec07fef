"""Tests of what somebody meets who comes with images of their own: layouts, options, checkpoints given in another way.

    python -m pytest tests/test_first_hour.py
"""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import evaluate_papsmear
import predict_papsmear
import prepare_data
import train_papsmear
from checkpoints import load_checkpoint
from conftest import TINY, lively_model, write_checkpoint, write_data_set
from images.files import load_image, save_png
from images.report import check_dataset
from images.splits import DatasetError, grouped, list_splits
from training import run_folder


@pytest.fixture
def one_folder(tmp_path):
    """Return a folder with images and masks of 12 images, in no split."""
    root = write_data_set(tmp_path / "data")
    for split in ("train", "valid", "test"):
        shutil.copytree(root / split, tmp_path / "mine", dirs_exist_ok=True)
    return tmp_path / "mine"


def test_one_folder_of_images_and_masks_is_dealt(one_folder, capsys):
    assert prepare_data.main(["check", str(one_folder)]) == 2
    assert (f"images and masks lie in it without train, valid and test. Deal them with python prepare_data.py split "
            f"{one_folder}") in capsys.readouterr().err
    assert prepare_data.main(["split", str(one_folder)]) == 0
    assert "wrote " in capsys.readouterr().out
    assert [len(pairs) for pairs in list_splits(one_folder).values()] == [8, 2, 2]
    assert list_splits(one_folder)["test"][0].image.parent == one_folder / "images"


@pytest.mark.parametrize(("folders", "message"), [
    (("imgs", "Labels"), "its folders are imgs and Labels; expected are images and masks. Rename them"),
    (("photos", "outlines"), "its folders are: outlines, photos. Expected: DATA_ROOT/train|valid|test"),
    (("images",), "its folders are: images. Expected"), ((), "its folders are: none, and 1 image files, e.g. a.png")])
def test_a_layout_of_another_kind_is_described_as_it_is(folders, message, tmp_path, capsys):
    for name in folders:
        (tmp_path / name).mkdir()
    if not folders:
        (tmp_path / "a.png").write_text("x")
    assert prepare_data.main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n  - ") == 1, "one sentence, not one for each folder that is missing"


def test_the_same_sentence_for_many_files_is_one_line(data_root):
    for path in (data_root / "train/masks").iterdir():
        path.unlink()
    with pytest.raises(DatasetError) as error:
        list_splits(data_root)
    line, = str(error.value).splitlines()[1:]
    images = data_root / "train/images"
    assert line == (f"  - 6 files, e.g. {images}/train_0.png, {images}/train_1.png, {images}/train_2.png: no mask of "
                    f"that name. Add {data_root}/train/masks/NAME.png or remove the image")
    assert len(error.value.problems) == 6
    assert grouped([f"{name}.png: all of {name} is cut" for name in "abcd"]) == [
        "4 files, e.g. a.png, b.png, c.png: all of NAME is cut"], "the a of all is no name"
    few = ["a/x.png: no mask of x", "a/y.png: no mask of y", "another thing"]
    assert grouped(few) == few


@pytest.mark.parametrize(("main", "wrong", "meant"), [
    (train_papsmear.main, "--epoch_per_stage", "--epochs_per_stage"), (train_papsmear.main, "--leraning_rate", ""),
    (predict_papsmear.main, "--treshold", "--threshold"), (prepare_data.main, "--group_regx", "--group_regex")])
def test_a_mistyped_option_is_answered_with_the_one_that_was_meant(main, wrong, meant, capsys):
    arguments = {predict_papsmear.main: ["a.pth", "b.png", "--out", "c"], prepare_data.main: ["check"]}.get(main, [])
    assert main([*arguments, wrong, "3"]) == 2
    said = capsys.readouterr().err
    assert f"unrecognized arguments: {wrong}" in said
    assert (f"Did you mean {meant}?" in said) == bool(meant)


def test_a_run_folder_stands_for_its_best_checkpoint(trained_run, shared_root, tmp_path, capsys):
    run = shutil.copytree(trained_run[0], tmp_path / "run")
    assert predict_papsmear.main([str(run), str(shared_root / "test/images"), "--out", str(tmp_path / "out")]) == 0
    assert f"{run / 'best_stage_4.pth'}: stage 4" in capsys.readouterr().out
    assert evaluate_papsmear.main([str(run), "--data_root", str(shared_root)]) == 0
    assert (run / "best_stage_4_test/scores.csv").is_file()
    assert "3 images of the split test at original size" in capsys.readouterr().out
    assert predict_papsmear.main([str(shared_root), "a.png", "--out", str(tmp_path / "out")]) == 2
    assert "is a folder without best_stage_X.pth" in capsys.readouterr().err


def test_a_start_from_a_checkpoint_takes_its_channels_and_width(shared_root, tmp_path, capsys):
    start = write_checkpoint(tmp_path / "a.pth", lively_model(in_channels=3))
    command = ["--data_root", str(shared_root), "--output_dir", str(tmp_path), "--experiment_name", "a", *TINY[2:],
               "--init_from", str(start)]
    assert train_papsmear.main([*command, "--in_channels", "1"]) == 2
    assert "its network has in_channels 3, asked for is 1. Leave --in_channels out" in capsys.readouterr().err
    assert train_papsmear.main([*command, "--targets", "mask,boundary"]) == 2
    assert "its network has targets mask, asked for is mask,boundary" in capsys.readouterr().err
    assert train_papsmear.main(command) == 0
    assert load_checkpoint(tmp_path / "a/last.pth")["model_args"] == {
        "model": "pgunet", "in_channels": 3, "out_channels": 1, "base_channels": 4}
    assert json.loads((tmp_path / "a/config.json").read_text())["in_channels"] == 3


def test_a_package_of_another_name_ends_no_run(monkeypatch):
    monkeypatch.setattr(run_folder, "PACKAGES", ("torch", "no-such-package"))
    packages = run_folder.environment()["packages"]
    assert packages["no-such-package"] is None
    assert packages["torch"]


def test_the_report_says_what_is_odd_about_images(data_root):
    images = data_root / "train/images"
    for name, change in (("train_0", lambda grey: np.stack([grey, grey // 2, grey // 3], axis=2)),
                         ("train_1", lambda grey: grey.astype(np.uint16) * 16)):
        save_png(images / f"{name}.png", change(load_image(images / f"{name}.png", 1)[..., 0]))
    turned = Image.Exif()
    turned[0x0112] = 3
    picture = Image.open(images / "train_2.png")
    picture.save(images / "train_2.png", exif=turned)
    found = check_dataset(data_root).warnings
    assert [w.split(",")[0] for w in found] == [
        "the images are in colour", "1 image(s) of 16 bit without a value above a tenth of the range",
        "1 image(s) turned upright by EXIF"]
    assert not any("colour" in w for w in check_dataset(data_root, in_channels=3).warnings)


def test_a_score_at_another_scale_is_doubted(shared_root, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "a.pth", lively_model(), sizing="tile")
    assert evaluate_papsmear.main([str(checkpoint), "--data_root", str(shared_root)]) == 0
    assert "warning: the network was trained with sizing 'tile', but " in capsys.readouterr().out
