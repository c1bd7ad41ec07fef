"""Tests of prediction from the shell: files, shards, refusals, and large images from file to files.

    python -m pytest tests/test_prediction.py
"""

import errno
import json
import re
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy import ndimage

import evaluate_papsmear
import predict_papsmear
import train_papsmear
from conftest import TINY, draw_pair, lively_model, noisy_image, read_rows, run_script, write_checkpoint
from images import bands as image_bands
from images.files import load_image, save_png
from images.listing import list_images
from images.masks import load_instances
from inference import Predictor
from nuclei import blocks as block_separation
from nuclei import cells, streaming
from nuclei.outlines import OUTLINE, boundary
from progressive_trainer import ProgressiveTrainer
from scoring.scores import score_pairs, scored_pairs
from system import machine
from unet import ProgressiveUNet
from unet_parts import ToLogits

TABLES = ("nuclei.csv", "images.csv", "settings.json")

# ---- files and tables


def test_the_files_of_a_prediction(trained_run, tmp_path, capsys):
    image, mask = draw_pair(np.random.default_rng(5), 90)
    save_png(tmp_path / "cell.png", image)
    checkpoint = str(trained_run[0] / "best_stage_4.pth")
    probability = Predictor(checkpoint).predict(image)[..., 0]
    threshold = f"{np.quantile(probability, 0.8):.4f}"  # so that there is foreground after so short a training
    command = [checkpoint, str(tmp_path / "cell.png"), "--out", str(tmp_path / "out"), "--probability",
               "--pixel_size", "0.5", "--threshold", threshold, "--min_area", "5", "--min_probability", "0"]
    assert predict_papsmear.main(command) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"cell_mask.png", "cell_probability.png", "cell_instances.png",
                                               "cell_overlay.png", *TABLES}
    written = np.asarray(Image.open(out / "cell_mask.png"))
    assert set(np.unique(written)) == {0, 255}
    assert np.array_equal(written == 255, probability >= float(threshold))
    deep = np.asarray(Image.open(out / "cell_probability.png"))
    assert deep.dtype == np.uint16
    assert np.abs(deep / 65535 - probability).max() < 1e-4
    nuclei = load_instances(out / "cell_instances.png")
    rows = read_rows(out / "nuclei.csv")
    assert len(rows) == nuclei.max() > 0
    for row in rows:
        nucleus = nuclei == int(row["label"])
        assert int(row["area"]) == nucleus.sum()
        assert float(row["area_um2"]) == pytest.approx(nucleus.sum() * 0.25)
        assert float(row["centroid_row"]) == pytest.approx(np.nonzero(nucleus)[0].mean(), abs=0.01)
        assert float(row["centroid_column_um"]) == pytest.approx(np.nonzero(nucleus)[1].mean() * 0.5, abs=0.01)
        assert float(row["mean_probability"]) == pytest.approx(probability[nucleus].mean(), abs=1e-3)
    assert np.array_equal((load_image(out / "cell_overlay.png", 3) == OUTLINE).all(axis=2),
                          boundary(nuclei))
    assert predict_papsmear.main(command) == 2
    assert "nothing is overwritten unasked" in capsys.readouterr().err
    assert predict_papsmear.main([*command, "--overwrite"]) == 0


def test_one_bad_file_does_not_stop_a_folder_and_black_is_said(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    save_png(folder / "a.png", noisy_image(40, 50))
    (folder / "b.png").write_bytes(b"no image")
    save_png(folder / "c.png", np.zeros((70, 70), np.uint8))
    (folder / "notes.txt").write_text("left alone")
    path = write_checkpoint(tmp_path / "a.pth", lively_model())
    command = [str(path), str(folder), "--out", str(tmp_path / "out"), "--threshold", "0.9999", "--max_pixels", "3000"]
    assert predict_papsmear.main(command) == 1
    said = capsys.readouterr()
    assert "2 of 3 files failed" in said.err
    assert "b.png: not a readable image" in said.err
    assert "c.png: 70x70 pixels" in said.err
    assert "Traceback" not in said.err
    highest = Predictor(path).predict(folder / "a.png").max()
    assert f"ALL BLACK, highest probability {highest:.3f}" in said.out
    assert "1 of 3 images came out all black" in said.out
    assert (tmp_path / "out/a_mask.png").exists()


@pytest.mark.parametrize("how", [[], ["--stream_above", "0"]])
def test_a_mask_of_nuclei_that_is_black_is_said_though_the_other_class_is_there(how, tmp_path, capsys):
    """The second class is found everywhere, the first nowhere."""
    model = lively_model(out_channels=2)
    for part in model.modules():
        if isinstance(part, ToLogits):
            part.linear.weight.data.zero_()
            part.linear.bias.data = torch.tensor([-9.0, 9.0])
    checkpoint = write_checkpoint(tmp_path / "a.pth", model, "tile")
    save_png(tmp_path / "a.png", noisy_image(64, 64))
    assert predict_papsmear.main([str(checkpoint), str(tmp_path / "a.png"), "--out", str(tmp_path / "o"), *how]) == 0
    said = capsys.readouterr().out
    assert "0 nuclei, 0.0% foreground" in said
    assert "ALL BLACK, highest probability 0.000" in said


def test_results_of_other_images_stay(tmp_path, capsys):
    for name in "ab":
        save_png(tmp_path / f"{name}.png", noisy_image(64, 64))
    save_png(tmp_path / "._a.png", noisy_image(9, 9))
    (tmp_path / "c.png").write_bytes(b"no image")
    path, out = write_checkpoint(tmp_path / "a.pth", lively_model(), sizing="tile"), tmp_path / "out"

    def predict(*given: str, code: int = 0) -> list[str]:
        command = [str(path), *(str(tmp_path / name) for name in given), "--out", str(out), "--overwrite",
                   "--min_area", "0", "--min_probability", "0"]
        assert predict_papsmear.main(command) == code
        return [row["image"] for row in read_rows(out / "nuclei.csv")] if (out / "nuclei.csv").exists() else []

    assert predict("c.png", code=1) == []
    assert "look at" not in capsys.readouterr().out
    both = predict("a.png", "b.png")
    assert set(both) == {"a.png", "b.png"}
    assert sorted(predict("a.png")) == both
    (out / "a_mask.tif").write_bytes(b"of an earlier, streamed prediction")
    (out / "a.png").write_bytes(b"no result")
    assert sorted(predict("a.png", "c.png", code=1)) == both
    assert not (out / "a_mask.tif").exists()
    assert (out / "a.png").exists()
    assert predict_papsmear.main([str(path), str(out / "a_mask.png"), "--out", str(out), "--overwrite"]) == 2
    assert "Choose another --out" in capsys.readouterr().err
    assert [p.name for p in list_images([str(tmp_path)])] == ["a.png", "b.png", "c.png"]


def test_faint_nuclei_are_left_out_unless_asked_for_and_it_is_said(tmp_path, capsys):
    save_png(tmp_path / "a.png", noisy_image(64, 64))
    path = write_checkpoint(tmp_path / "a.pth", lively_model(), sizing="tile")
    for lowest, words in (([], "; all of it was left out, as a nucleus has at least 0 pixels (--min_area) and a mean "
                               "probability of 0.75 (--min_probability)"), (["--min_probability", "0"], " s\n")):
        command = [str(path), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--overwrite", "--min_area", "0"]
        assert predict_papsmear.main([*command, *lowest]) == 0
        said = re.escape(words.removeprefix(" s"))
        assert re.search(rf"^a.png: .* foreground, [\d.]+ s{said}", capsys.readouterr().out, re.M)
        assert bool(load_instances(tmp_path / "out/a_instances.png").max()) == bool(lowest)
        assert ("all left out" in read_rows(tmp_path / "out/images.csv")[0]["flags"]) == (not lowest)
    assert predict_papsmear.main([*command, "--continue"]) == 2
    assert predict_papsmear.main([*command, "--min_probability", "1.5"]) == 2
    assert "--min_probability" in capsys.readouterr().err


def test_of_a_single_cell_one_nucleus_is_predicted_and_scored(tmp_path, shared_root, capsys):
    path = write_checkpoint(tmp_path / "a.pth", lively_model())
    save_png(tmp_path / "a.png", noisy_image(150, 200))
    command = [str(path), str(tmp_path / "a.png"), "--out"]
    for name, options in (("every", ["--min_probability", "0"]), ("single", ["--single_cell"])):
        assert predict_papsmear.main([*command, str(tmp_path / name), *options]) == 0
    assert len(read_rows(tmp_path / "every/nuclei.csv")) > 1
    row, = read_rows(tmp_path / "single/nuclei.csv")
    assert float(row["mean_probability"]) < 0.75, "unsure as it is: it is all there is"
    mask = np.asarray(Image.open(tmp_path / "single/a_mask.png")) == 255
    nuclei = load_instances(tmp_path / "single/a_instances.png")
    assert mask.sum() <= int(row["area"]) == (nuclei == 1).sum(), "small holes are filled"
    assert np.array_equal(nuclei >= mask, np.ones_like(mask))
    assert predict_papsmear.main([*command, str(tmp_path / "single"), "--single_cell", "--min_probability", "1",
                                  "--overwrite"]) == 0
    assert "a mean probability of 1 (--min_probability)" in capsys.readouterr().out
    again = [*command, str(tmp_path / "every"), "--min_probability", "0", "--continue"]
    settings = tmp_path / "every/settings.json"
    settings.write_text(re.sub(r'"single_cell": false,\s*', "", settings.read_text()))
    assert '"single_cell"' not in settings.read_text()
    assert predict_papsmear.main(again) == 0, "an option that is younger than the results was off"
    assert predict_papsmear.main([*again, "--single_cell"]) == 2
    assert "single_cell was " in capsys.readouterr().err
    assert evaluate_papsmear.main([str(path), "--data_root", str(shared_root), "--single_cell", "--instances",
                                   "--out", str(tmp_path / "scores")]) == 0
    assert capsys.readouterr().out.count("one object an image") == 1
    pair = scored_pairs(shared_root, "test")[0]
    every, single = (score_pairs(Predictor(path, single_cell=one), [pair])[0]["dice"] for one in (False, True))
    row = read_rows(tmp_path / "scores/scores.csv")[0]
    assert float(row["dice"]) == pytest.approx(single) != pytest.approx(every)
    assert row["nuclei_found"] == "1"
    assert json.loads((tmp_path / "scores/summary.json").read_text())["single_cell"] is True


def test_shards_share_the_list(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abcde":
        save_png(folder / f"{name}.png", noisy_image(40, 50))
    path = write_checkpoint(tmp_path / "a.pth", lively_model(out_channels=2))
    command = [str(path), str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert predict_papsmear.main([*command, "--shard", "1/2"]) == 0
    assert {p.name[0] for p in (tmp_path / "out").glob("*_mask_2.png")} == set("ace")
    for variable, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):  # as torchrun sets them
        monkeypatch.setenv(variable, value)
    assert predict_papsmear.main(command) == 0, capsys.readouterr().err
    assert {p.name[0] for p in (tmp_path / "out").glob("*_mask_1.png")} == set("abcde")
    assert {p.name for p in (tmp_path / "out").glob("*.csv")} == {
        f"{table}_{part}_of_2.csv" for table in ("nuclei", "images") for part in (1, 2)}


# ---- options


@pytest.mark.parametrize("main", [predict_papsmear.main, evaluate_papsmear.main])
def test_results_go_to_no_file(main, tmp_path, capsys):
    (tmp_path / "f").write_text("")
    assert main(["a.pth", *(["a.png"] if main is predict_papsmear.main else []), "--out", str(tmp_path / "f")]) == 2
    assert "is a file; results go to a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "words"), [
    (["none.pth", "IMAGE"], "none.pth: no such file"), (["CHECKPOINT", "nowhere"], "nowhere: no such file or folder"),
    (["CHECKPOINT", "EMPTY"], "no image in this folder"), (["CHECKPOINT", "IMAGE", "--shard", "3/2"], "not i/n"),
    (["CHECKPOINT", "IMAGE", "--threshold", "1"], "below 1"),
    (["CHECKPOINT", "IMAGE", "--scale", "100"], "scale is 100"),
    (["CHECKPOINT", "TWIN", "--out", "TWIN"], "Choose another --out"),
    (["CHECKPOINT", "IMAGE", "TWIN"], "both would be written as a_mask.png")])
def test_wrong_prediction_options_are_refused(options, words, tmp_path, capsys):
    save_png(tmp_path / "a.png", noisy_image(30, 30))
    (tmp_path / "empty").mkdir()
    (tmp_path / "twin").mkdir()
    save_png(tmp_path / "twin/a.png", noisy_image(30, 30))
    places = {"CHECKPOINT": str(write_checkpoint(tmp_path / "c.pth", lively_model())), "IMAGE": str(tmp_path / "a.png"),
              "EMPTY": str(tmp_path / "empty"), "TWIN": str(tmp_path / "twin")}
    images, _, others = " ".join(options).partition(" --")
    others = f"--{others}".split() if others else []
    assert predict_papsmear.main([places.get(o, o) for o in
                                  [*images.split(), "--out", str(tmp_path / "out"), *others]]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["predict_papsmear", "evaluate_papsmear"])
def test_help_needs_no_torch(script):
    code = f"import sys, {script} as s; s.build_parser().format_help(); print('torch' in sys.modules)"
    assert run_script("-c", code).stdout.strip() == "False"
    assert run_script(f"{script}.py", "--help").returncode == 0


def test_command_lines_keep_freed_memory_and_constructors_do_not(shared_root, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: calls.append("kept"))
    path = str(write_checkpoint(tmp_path / "a.pth", lively_model()))
    Predictor(path, "cpu")
    ProgressiveTrainer(ProgressiveUNet(base_channels=2), device="cpu", epochs_per_stage=1)
    assert calls == []
    data, device = ["--data_root", str(shared_root)], ["--device", "cpu"]
    assert predict_papsmear.main([path, str(shared_root / "test/images"), "--out", str(tmp_path / "p"), *device]) == 0
    assert calls == ["kept"]
    assert evaluate_papsmear.main([path, *data, *device]) == 0
    assert calls == ["kept"] * 2
    assert train_papsmear.main([*data, *device, *TINY, "--output_dir", str(tmp_path), "--dry_run"]) == 0
    assert calls == ["kept"] * 3


# ---- large images, from file to files


@pytest.fixture
def small_parts(monkeypatch):
    """Divide small images as large ones are."""
    monkeypatch.setattr(image_bands, "BAND_PIXELS", 20_000)
    monkeypatch.setattr(image_bands, "TILE", 128)
    monkeypatch.setattr(block_separation.BlockSeparation.__init__, "__defaults__", (200,))
    monkeypatch.setattr(image_bands, "OVERVIEW_SIDE", 300)


def test_cells_of_a_large_image_are_those_of_the_whole(small_parts, tmp_path, monkeypatch):
    """Two classes of these names give nuclei.csv the cytoplasm of each nucleus, in bands as in one piece."""
    monkeypatch.setattr(cells, "BLOCK", 150)
    image = noisy_image(600, 510, 3)
    tifffile.imwrite(tmp_path / "slide.tif", image, photometric="rgb", tile=(64, 64), compression="zlib")
    checkpoint = str(write_checkpoint(tmp_path / "a.pth", lively_model(2, in_channels=3, out_channels=2), "tile",
                                      class_names=("nucleus", "cytoplasm")))
    probability = Predictor(checkpoint, "cpu", "float32", 512).predict(image)
    threshold = f"{np.quantile(probability, 0.7):.4f}"
    command = [checkpoint, str(tmp_path / "slide.tif"), "--threshold", threshold, "--min_area", "20",
               "--min_probability", "0", "--format", "geojson,label-tiff", "--device", "cpu", "--precision",
               "float32", "--tile", "512", "--out"]
    assert predict_papsmear.main([*command, str(tmp_path / "whole")]) == 0
    assert predict_papsmear.main([*command, str(tmp_path / "bands"), "--stream_above", "0"]) == 0
    rows = read_rows(tmp_path / "bands/nuclei.csv")
    assert rows == read_rows(tmp_path / "whole/nuclei.csv")
    for name in ("slide_nuclei.geojson", "images.csv"):
        assert (tmp_path / "bands" / name).exists()
    mask, labels = probability >= float(threshold), load_instances(tmp_path / "bands/slide_labels.tif")
    areas = [int(row["cytoplasm_area"]) for row in rows]
    assert 0 < sum(areas) <= (mask[..., 1] & (labels == 0)).sum()
    for row, area in zip(rows, areas, strict=True):
        assert row["nucleus_to_cytoplasm"] == (str(round(int(row["area"]) / area, 4)) if area else "")
    of_images = [{key: value for key, value in row.items() if key not in ("seconds", "finished", "run")}
                 for place in ("whole", "bands") for row in read_rows(tmp_path / place / "images.csv")]
    assert of_images[0] == of_images[1]
    assert int(of_images[0]["cut_by_border"]) == sum(row["cut_by_border"] == "1" for row in rows) > 0
    assert of_images[0]["flags"] == "nuclei cut by border"


@pytest.mark.parametrize("targets", [("mask",), ("mask", "boundary")])
def test_files_of_a_large_image_are_those_of_the_whole(targets, small_parts, tmp_path, capsys):
    image = noisy_image(700, 610, 3)
    tifffile.imwrite(tmp_path / "slide.tif", image, photometric="rgb", tile=(64, 64), compression="zlib")
    model = lively_model(2, in_channels=3, out_channels=len(targets))
    checkpoint = str(write_checkpoint(tmp_path / "a.pth", model, "tile", targets, {"brightness of red": [0.9, 1.0]}))
    predictor = Predictor(checkpoint, "cpu", "float32", 512)
    threshold = f"{np.quantile(predictor.predict(image)[..., 0], 0.7):.4f}"
    command = [checkpoint, str(tmp_path / "slide.tif"), "--threshold", threshold, "--min_area", "20",
               "--min_probability", "0", "--probability", "--pixel_size", "0.5", "--device", "cpu", "--precision",
               "float32", "--tile", "512", "--out"]
    assert predict_papsmear.main([*command, str(tmp_path / "whole")]) == 0
    assert predict_papsmear.main([*command, str(tmp_path / "bands"), "--stream_above", "400000"]) == 0
    said = re.findall(r"^slide.tif: (.*), [\d.]+ s; UNLIKE THE TRAINING IMAGES: (.*)$", capsys.readouterr().out, re.M)
    assert len(said) == 2
    assert said[0] == said[1]
    whole, bands = tmp_path / "whole", tmp_path / "bands"
    assert {p.name for p in bands.iterdir()} == {"slide_mask.tif", "slide_probability.tif", "slide_instances.tif",
                                                 "slide_overlay.png", *TABLES}
    nuclei = load_instances(bands / "slide_instances.tif")
    assert nuclei.max() > 100
    assert np.array_equal(nuclei, load_instances(whole / "slide_instances.png"))
    for kind in ("mask", "probability"):
        written = tifffile.imread(bands / f"slide_{kind}.tif")
        assert np.array_equal(written, np.asarray(Image.open(whole / f"slide_{kind}.png")))
    assert read_rows(bands / "nuclei.csv") == read_rows(whole / "nuclei.csv")
    overview = load_image(bands / "slide_overlay.png", 3)
    assert overview.shape == (234, 204, 3), "reduced by 3"
    outlined = (overview == OUTLINE).all(axis=2)
    assert np.array_equal(outlined, boundary(nuclei[::3, ::3]))
    assert np.abs(overview[~outlined].mean() - image.mean()) < 5
    assert predict_papsmear.main([*command, str(tmp_path / "bands")]) == 2
    assert "nothing is overwritten unasked" in capsys.readouterr().err


def test_a_bad_large_file_is_one_error_and_leaves_nothing(small_parts, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    image = noisy_image(400, 320, 1)[..., 0]
    for name in "ab":
        tifffile.imwrite(folder / f"{name}.tif", image, tile=(64, 64), compression="zlib")
    (folder / "a.tif").write_bytes((folder / "a.tif").read_bytes()[:-3000])
    save_png(folder / "c.png", image)
    path = write_checkpoint(tmp_path / "a.pth", lively_model(1), "tile")
    command = [str(path), str(folder), "--stream_above", "0", "--threshold", "0.99999", "--device", "cpu", "--out"]
    assert predict_papsmear.main([*command, str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert re.search(r"^error: .*a.tif: damaged or cut off", said.err, re.M)
    assert "Traceback" not in said.err
    assert "2 of 3 images came out all black" in said.out
    assert "c.png: not a TIFF that can be read in parts" in said.out
    assert {p.name[0] for p in (tmp_path / "out").iterdir() if p.name not in TABLES} == {"b", "c"}
    assert tifffile.imread(tmp_path / "out/c_mask.tif").shape == (400, 320)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streaming, "write_tiff", full)
    assert predict_papsmear.main([*command, str(tmp_path / "full")]) == 3
    assert "full: No space left on device. Finished images are written" in capsys.readouterr().err
    assert list((tmp_path / "full").iterdir()) == [], "not even an empty table, which the next try would stumble over"


def test_memory_does_not_grow_with_the_height(small_parts, tmp_path):
    """The peak of everything that numpy and Python hold, for 1000 and 4000 rows of an image that is made on the way."""
    def peak(height: int) -> int:
        rng = np.random.default_rng(0)
        band = noisy_image(100, 400, 3)
        rows = SimpleNamespace(height=height, width=400, path=tmp_path / "slide.tif")
        Rows = type("Rows", (SimpleNamespace,), {"__iter__": lambda self: (band for _ in range(height // 100))})
        model = write_checkpoint(tmp_path / "a.pth", lively_model(1, in_channels=3), "tile")
        predictor = Predictor(model, "cpu", "float32", tile=512)
        predictor.nuclei = lambda probability, _: ndimage.label(rng.random(probability.shape[:2]) > 0.999)[0]
        tracemalloc.start()
        streaming.stream_prediction(predictor, Rows(**vars(rows)), 30, tmp_path / "i.tif", [tmp_path / "m.tif"],
                                    [tmp_path / "p.tif"])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1000)
    low, high = peak(1000), peak(4000)
    assert high < 1.25 * low, f"{low / 1e6:.1f} MB for 1000 rows, {high / 1e6:.1f} MB for 4000"
