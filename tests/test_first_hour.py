"""Tests of what somebody meets who comes with images of their own: layouts, options, checkpoints given in another way.

    python -m pytest tests/test_first_hour.py
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_papsmear
import predict_papsmear
import prepare_data
import train_papsmear
from checkpoints import load_checkpoint, save_checkpoint, untrained_checkpoint
from conftest import ONE_STAGE, lively_model, read_rows, write_checkpoint, write_data_set
from images.files import ImageFileError, load_image, save_png
from images.pyramid import open_pyramids
from images.report import check_dataset
from images.splits import DatasetError, grouped, list_splits
from pap_smear_dataset import create_progressive_dataloaders
from preparation.drawn import import_drawn
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
    command = ["--data_root", str(shared_root), "--output_dir", str(tmp_path), "--experiment_name", "a",
               *ONE_STAGE[2:], "--init_from", str(start)]
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


def grow_discs(root, side: int, radius: float):
    """Write a data set whose images of this side show nine discs of this radius."""
    rows, columns = np.mgrid[:side, :side]
    step = side / 3
    inside = np.hypot((rows % step) - step / 2, (columns % step) - step / 2) <= radius
    write_data_set(root, (3, 1, 1))
    for i, path in enumerate(sorted(root.rglob("*/*/*.png"))):
        noise = np.random.default_rng(i).integers(0, 20, inside.shape)
        save_png(path, (np.where(inside, 60, 190) + noise).astype(np.uint8) if path.parent.name == "images" else inside)
    return root


@pytest.mark.parametrize(("side", "radius", "sizing", "width", "advice"), [
    (512, 5, "resize", 5, "In tiles they would be 2.0 times as wide: prepare the data set with --sizing tile. "
     "Otherwise train with --start_stage 3"),
    (256, 5, "tile", 10, "pixels wide at 32x32, too few to learn from. Train with --start_stage 2"),
    (256, 3, "resize", 6, "Train with --start_stage 3"), (256, 20, "tile", 40, None), (256, 20, "resize", 40, None)])
def test_the_check_tells_tiles_from_resizing(side, radius, sizing, width, advice, tmp_path):
    root = grow_discs(tmp_path / "data", side, radius)
    (root / "dataset.json").write_text(json.dumps({"sizing": sizing}))
    report = check_dataset(root)
    assert report.width == pytest.approx(width, rel=0.12)
    assert f"nuclei of train are about {report.width:.0f} pixels wide at 256x256" in str(report)
    found = [w for w in report.warnings if w.startswith("nuclei are about")]
    assert len(found) == bool(advice)
    assert not advice or advice in found[0]


def test_large_nuclei_in_tiles_are_to_be_resized(tmp_path):
    root = write_data_set(tmp_path / "data", (3, 1, 1), 256)
    (root / "dataset.json").write_text('{"sizing": "tile"}')
    for path in sorted(root.rglob("masks/*.png")):
        mask = np.zeros((256, 256), bool)
        mask[40:200, 40:200] = True
        save_png(path, mask)
    assert "so few are seen whole. Prepare the data set with --sizing resize" in str(check_dataset(root))


def test_an_image_at_another_scale_is_said(tmp_path, capsys):
    """Trained on fields of 512 pixels, given one of 2048x1536: resized, its nuclei are 3.5 times as small."""
    root = grow_discs(tmp_path / "data", 512, 30)
    ranges = open_pyramids(root)["train"].recipe.training_ranges
    assert ranges["side"] == (512, 512)
    darker = {"brightness": (0.9, 0.95)}  # of every image; the side is said all the same
    checkpoint = write_checkpoint(tmp_path / "a.pth", lively_model(), ranges={"side": ranges["side"]} | darker)
    for height, width, strange in ((1536, 2048, True), (512, 512, False), (600, 620, False), (200, 200, True)):
        save_png(tmp_path / "a.png", np.full((height, width), 99, np.uint8))
        assert predict_papsmear.main([str(checkpoint), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"),
                                      "--overwrite"]) == 0
        said = capsys.readouterr().out
        remedy = "Pad it to that size" if width < 512 else "Cut it into parts of that size"
        sentence = (f"UNLIKE THE TRAINING IMAGES: {np.sqrt(height * width):.0f} pixels a side, in training 512, so all "
                    f"that it shows is resized to another scale. {remedy}, or train on tiles")
        assert (sentence in said) == strange


def test_pixel_sizes_travel_from_the_data_set_into_the_checkpoint(tmp_path):
    root = write_data_set(tmp_path / "data", (3, 1, 1), 256)
    (root / "dataset.json").write_text('{"sizing": "tile", "microns_per_pixel": 0.25}')
    recipe = open_pyramids(root, max_value=4095)["train"].recipe
    assert (recipe.microns_per_pixel, recipe.max_value) == (0.25, 4095)
    checkpoint = untrained_checkpoint(lively_model(), data=recipe)
    save_checkpoint(tmp_path / "a.pth", checkpoint)
    assert load_checkpoint(tmp_path / "a.pth")["data"] == recipe
    stored = torch.load(tmp_path / "a.pth", weights_only=True)
    for name in ("max_value", "microns_per_pixel"):
        del stored["data"][name]
    torch.save(stored, tmp_path / "old.pth")
    assert load_checkpoint(tmp_path / "old.pth")["data"].max_value == 0, "as older files have it"


def test_white_of_12_bit(tmp_path, capsys):
    """Read with --max_value 4095, 12 bit in 16 bit files give what 8 bit files of the same picture give."""
    eight, twelve = (write_data_set(tmp_path / name) for name in ("eight", "twelve"))
    for path in sorted(twelve.rglob("images/*.png")):
        save_png(path, np.round(load_image(path, 1)[..., 0] * (4095 / 255)).astype(np.uint16))
    image = next(iter(sorted(twelve.rglob("images/*.png"))))
    assert np.array_equal(load_image(image, 1, max_value=4095), load_image(eight / image.relative_to(twelve), 1))
    with pytest.raises(ImageFileError, match="values .*found, but --max_value 1023 says what is white"):
        load_image(image, 1, max_value=1023)
    assert prepare_data.main(["check", str(twelve)]) == 0
    assert "for 12 bit pass --max_value 4095" in capsys.readouterr().out
    assert prepare_data.main(["check", str(twelve), "--max_value", "4095"]) == 0
    assert "warning" not in capsys.readouterr().out
    drawn = ("label-tiff", twelve / "train/images", twelve / "train/masks")
    assert "files, e.g. train_0.png, train_1.png, train_2.png: an image of 16 bit without a value above a tenth" in \
        import_drawn(*drawn, tmp_path / "dark")
    # A data set that is made of them has 8 bit, and tells the network what is white in the files that it will predict.
    assert "a value above" not in import_drawn(*drawn, tmp_path / "made", max_value=4095)
    assert open_pyramids(tmp_path / "made")["train"].recipe.max_value == 4095
    assert open_pyramids(tmp_path / "made", max_value=1023)["train"].recipe.max_value == 1023
    command = ["--output_dir", str(tmp_path), *ONE_STAGE]
    for name, options in (("eight", []), ("twelve", ["--max_value", "4095"])):
        assert train_papsmear.main([*command, "--data_root", str(tmp_path / name), "--experiment_name", f"run_{name}",
                                    *options]) == 0
    rows = [read_rows(tmp_path / f"run_{name}/test_scores.csv") for name in ("eight", "twelve")]
    assert rows[0] == rows[1]
    checkpoint = tmp_path / "run_eight/best_stage_4.pth"
    for run, folder, options in (("run_twelve", "a", []), ("run_eight", "b", ["--max_value", "4095"])):
        assert predict_papsmear.main([str(tmp_path / run / "best_stage_4.pth"), str(image), "--out",
                                      str(tmp_path / folder), *options]) == 0
    assert predict_papsmear.main([str(checkpoint), str(eight / image.relative_to(twelve)), "--out",
                                  str(tmp_path / "c")]) == 0
    assert len({(tmp_path / folder / f"{image.stem}_mask.png").read_bytes() for folder in "abc"}) == 1


def test_a_start_from_a_checkpoint_of_another_sizing_is_doubted(shared_root, tmp_path, capsys):
    start = write_checkpoint(tmp_path / "a.pth", lively_model(), "tile")
    assert train_papsmear.main(["--data_root", str(shared_root), "--dry_run", "--init_from", str(start)]) == 0
    assert f"warning: {start} was trained on a data set of sizing 'tile'" in capsys.readouterr().out


def test_a_start_from_a_checkpoint_of_other_images_is_doubted(shared_root, tmp_path, capsys):
    command = ["--data_root", str(shared_root), "--dry_run", "--init_from"]
    for white, ranges, words in ((0, (0.6, 0.7), ""), (0, (0.1, 0.2), "brightness 0."),
                                 (4095, (0.6, 0.7), "white is")):
        start = write_checkpoint(tmp_path / f"{white}.pth", lively_model(), max_value=white,
                                 ranges={"brightness": ranges})
        assert train_papsmear.main([*command, str(start)]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"warning: {start}")]
        assert len(said) == bool(words)
        assert words in "".join(said)


def test_a_comparison_has_a_folder_of_its_own(shared_root, tmp_path, capsys):
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        write_checkpoint(tmp_path / run / "best_stage_4.pth", lively_model(seed=len(run)))
    first, other = (str(tmp_path / run / "best_stage_4.pth") for run in ("one", "two"))
    for arguments in ([first], [first, "--compare", other], [other]):
        assert evaluate_papsmear.main([*arguments, "--data_root", str(shared_root)]) == 0
    assert (tmp_path / "one/best_stage_4_test/scores.csv").is_file()
    assert (tmp_path / "one/best_stage_4_test_against_two_best_stage_4/scores_compared.csv").is_file()
    assert evaluate_papsmear.main([first, "--data_root", str(shared_root)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_image_replaced_while_it_is_decoded_at_every_step_ends_the_run(data_root):
    loaders = create_progressive_dataloaders(data_root, {32: 2}, cache_images=False)
    train = loaders[32][0]
    assert len(list(train)) == 3
    path = data_root / "train/images/train_3.png"
    save_png(path, load_image(path, 1)[::-1])
    with pytest.raises(ImageFileError, match=r"train_3.png: it or its mask .* was changed after the data set had been "
                                             r"read"):
        list(train)


@pytest.mark.parametrize("text", ["70,30", "70,15,16", "100,0,0", "a,b,c", "-10,60,50"])
def test_shares_that_are_none(text, one_folder, capsys):
    assert prepare_data.main(["split", str(one_folder), f"--shares={text}"]) == 2
    assert "is not three numbers above 0 with sum 100" in capsys.readouterr().err


def test_a_split_says_groups_and_what_it_leaves_out(one_folder, capsys):
    for kind in ("images", "masks"):
        for i in range(6):
            shutil.copy(one_folder / kind / f"train_{i}.png", one_folder / kind / f"train_{i}_flipped.png")
    assert prepare_data.main(["split", str(one_folder), "--shares", "50,25,25"]) == 0
    said = capsys.readouterr().out
    counts = {line.split()[0]: list(map(int, line.split()[1:4])) for line in said.splitlines()
              if line.startswith(("train ", "valid ", "test "))}
    assert {split: n[2] for split, n in counts.items()} == {"train": 6, "valid": 3, "test": 3}
    left = 18 - sum(n[0] for n in counts.values())
    assert left > 0
    assert f"warning: {left} copies are left out, as they show images of valid and test" in said
    assert "warning: valid has 3 group(s) alone" in said
