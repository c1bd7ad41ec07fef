"""Tests of the training from the shell: options, presets, run folders, resuming."""

import shutil

import pytest
import torch

import train_papsmear
from checkpoints import load_checkpoint, load_model
from conftest import TINY, metric_rows
from images.augmentation import MAX_STRENGTH
from training import settings


@pytest.mark.parametrize(("options", "words"), [
    (["--batch_sizes", "32:64,64:x"], "RESOLUTION:BATCH"),
    (["--batch_sizes", "48:8"], "32, 64, 128, 256"),
    (["--batch_sizes", "32:0"], "at least 1"),
    (["--epochs_per_stage", "-3"], "whole number of at least 1"),
    (["--epochs_per_stage", "1,2"], "stages 1..4"),
    (["--epochs_per_stage", "1,2,3,0"], "the last at least 1"),
    (["--budget", "0"], "number above 0"), (["--budget", "0.5"], "leaves no epoch at 256"),
    (["--budget", "1.5", "--model", "unet"], "no epoch at 256 pixels; with --model unet one takes 2.93"),
    (["--budget", "9", "--epochs_per_stage", "2"], "both say how long to train"),
    (["--preset", "quick", "--shares", "1,1,1,1", "--epochs_per_stage", "2"], "both say how long to train"),
    (["--shares", "1,1,1,1"], "--shares deals a --budget"), (["--shares", "1,1,1"], "four numbers"),
    (["--budget", "9", "--shares", "1,1,1,0"], "the last above 0"),
    (["--progressive", "false", "--epochs_per_stage", "1,2,3,4"], "stage 4 alone"),
    (["--lr", "nan"], "number above 0"), (["--augment_strength", str(MAX_STRENGTH + 0.1)], "--augment_strength"),
    (["--lr", "0"], "number above 0"),
    (["--augment_probability", "1.5"], "at most 1"),
    (["--progressive", "perhaps"], "neither true nor false"),
    (["--in_channels", "2"], "choose from"),
    (["--device", "gpu"], "device is 'gpu'"),
    (["--experiment_name", "../x"], "folder name"),
    (["--start_stage", "5"], "choose from"),
    (["--progressive", "false", "--start_stage", "2"], "--start_stage"),
    (["--data_root", "no/such/folder"], "no such folder"),
    (["--init_from", "nowhere.pth"], "nowhere.pth: no such file"),
    (["--resume", "nowhere"], "no such file"),
    (["--resume", "nowhere", "--lr", "0.1"], "--lr cannot change at --resume"),
    (["--resume", "nowhere", "--seed", "0"], "--seed cannot change at --resume"),
    (["--group_regex", "["], "no regular expression"),
    (["--seed", "99999999999999999999"], "whole number"),
    (["--epoch", "3"], "unrecognized"),
] + ([] if torch.cuda.is_available() else [(["--device", "cuda"], "Use 'cpu', or 'auto'")]))
def test_wrong_options_are_refused(options, words, tmp_path, monkeypatch, capsys, shared_root):
    monkeypatch.chdir(tmp_path)
    base = [] if {"--resume", "--data_root"} & set(options) else ["--data_root", str(shared_root)]
    assert train_papsmear.main([*base, *options]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


def as_option(value) -> str:
    """Write a setting as the command line takes it."""
    if isinstance(value, dict):
        return ",".join(f"{key}:{number}" for key, number in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_defaults_are_those_documented_and_presets_yield_to_options():
    args = settings.parse([])
    documented = {"data_root": "data", "progressive": True, "epochs_per_stage": (50,), "lr": 1e-3,
                  "batch_sizes": {32: 64, 64: 32, 128: 16, 256: 8}, "output_dir": "outputs", "in_channels": 1,
                  "out_channels": 1, "model": "pgunet", "seed": 0, "init_from": None, "start_stage": 1,
                  "augment_probability": 0.5, "device": "auto", "num_workers": None, "use_augmented": True,
                  "accumulate": 1, "base_channels": 64, "precision": "auto", "resume": None, "overwrite": False,
                  "save_every": 10, "keep": 3, "dry_run": False, "preset": None, "deterministic": False}
    assert {key: getattr(args, key) for key in documented} == documented
    assert settings.parse(["--progressive"]).progressive is True
    assert settings.parse(["--progressive", "false"]).progressive is False
    quick = settings.parse(["--preset", "quick", "--lr", "0.5"])
    assert quick.lr == 0.5
    assert quick.base_channels == settings.PRESETS["quick"]["base_channels"] != 64
    assert settings.parse(["--preset", "quick", "--progressive", "false"]).epochs_per_stage == (30,)
    assert settings.parse(["--preset", "quick", "--model", "unet"]).epochs_per_stage == (10,), "30 x 98.6 / 289"
    assert settings.parse(["--preset", "quick", "--start_stage", "3"]).epochs_per_stage == (33, 18)
    by_hand = settings.parse(["--preset", "quick", "--epochs_per_stage", "3"])
    assert (by_hand.epochs_per_stage, by_hand.budget) == ((3,), None)
    assert set(settings.PRESET_RESULTS) == set(settings.PRESETS)
    shown = settings.build_parser().format_help()
    for name, (data_root, took, scored) in settings.PRESET_RESULTS.items():
        assert f"--data_root {data_root} --preset {name}\n      {took}; {scored}\n" in shown
    for name, preset in settings.PRESETS.items():  # their values are such as the options themselves take
        by_hand = [word for key, value in preset.items() for word in (f"--{key}", as_option(value))]
        found = vars(settings.parse(["--preset", name, "--experiment_name", "a"]))
        assert found.pop("by_hand") == ["experiment_name", "preset"]
        same = vars(settings.parse([*by_hand, "--experiment_name", "a"]))
        assert found == {key: value for key, value in same.items() if key != "by_hand"} | {"preset": name}


def test_an_existing_run_is_refused_and_overwriting_spares_what_is_not_ours(trained_run, shared_root, tmp_path, capsys):
    folder = tmp_path / "tiny"
    shutil.copytree(trained_run[0], folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "logs/labbook.txt").write_text("mine too")
    command = ["--data_root", str(shared_root), "--output_dir", str(tmp_path), "--experiment_name", "tiny", *TINY]
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert train_papsmear.main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert train_papsmear.main([*command, "--overwrite", "--progressive", "false"]) == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "logs/labbook.txt").read_text() == "mine too"
    assert not (folder / "best_stage_1.pth").exists()
    assert [row["stage"] for row in metric_rows(folder)] == ["4"]


def test_resuming_a_finished_run_from_the_command_line_changes_no_number(trained_run, tmp_path, capsys):
    folder = tmp_path / "tiny"
    shutil.copytree(trained_run[0], folder)
    assert train_papsmear.main(["--resume", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "resumed" in printed
    assert "epoch 1/1" not in printed
    assert "this run is finished, and nothing is written" in printed
    assert metric_rows(folder) == metric_rows(trained_run[0])


def test_resume_takes_the_file_too_and_says_what_to_do_without_one(trained_run, shared_root, tmp_path, capsys):
    folder = tmp_path / "tiny"
    shutil.copytree(trained_run[0], folder)
    assert train_papsmear.main(["--resume", str(folder / "last.pth"), "--dry_run"]) == 0
    (folder / "last.pth").unlink()
    (folder / "previous.pth").unlink()
    assert train_papsmear.main(["--resume", str(folder)]) == 2
    assert "nothing of that run was saved" in capsys.readouterr().err
    (tmp_path / "afile").write_text("")
    for options in (["--output_dir", str(tmp_path / "afile")],
                    ["--output_dir", str(tmp_path), "--experiment_name", "afile"]):
        assert train_papsmear.main(["--data_root", str(shared_root), *options]) == 2
        assert "a file, not a folder" in capsys.readouterr().err


def test_init_from_another_width_is_refused(trained_run, shared_root, tmp_path, capsys):
    assert train_papsmear.main(["--data_root", str(shared_root), "--output_dir", str(tmp_path), "--base_channels", "8",
                                "--init_from", str(trained_run[0] / "best_stage_2.pth")]) == 2
    assert "its network has base_channels 4, asked for is 8. Leave --base_channels out" in capsys.readouterr().err


def test_a_run_whose_data_were_moved_asks_where_they_are(trained_run, tmp_path, capsys):
    assert train_papsmear.main(["--resume", str(trained_run[0]), "--data_root", str(tmp_path / "gone")]) == 2
    assert f"{tmp_path / 'gone'}: the data set of this run is no longer there. Say with --data_root" in \
        capsys.readouterr().err


def test_a_stage_2_file_starts_stage_3_of_another_run(trained_run, shared_root, tmp_path, capsys):
    best = trained_run[0] / "best_stage_2.pth"
    assert train_papsmear.main([
        "--data_root", str(shared_root), "--output_dir", str(tmp_path), "--experiment_name", "grown", *TINY,
        "--init_from", str(best), "--start_stage", "3"]) == 0
    printed = capsys.readouterr().out
    assert f"carried: {len(load_checkpoint(best)['model'])} tensors" in printed
    assert "new: " in printed
    assert "decoder.128" in printed
    assert "left out: 0 tensors" in printed
    assert [row["stage"] for row in metric_rows(tmp_path / "grown")] == ["3", "4"]


def test_dry_run_writes_nothing(shared_root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_papsmear.main(["--data_root", str(shared_root), "--dry_run", *TINY]) == 0
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert printed.count("source images in all") == 1, "the report on the data is not said twice"
    assert all(words in printed for words in ("source images", '"base_channels": 4', "MiB", "nothing written"))


def test_classic_unet_and_overfit_run(shared_root, tmp_path, capsys):
    assert train_papsmear.main(["--data_root", str(shared_root), "--output_dir", str(tmp_path), "--experiment_name",
                                "classic", *TINY, "--model", "unet", "--overfit", "2", "--base_channels", "2"]) == 0
    assert load_model(tmp_path / "classic/best_stage_4.pth").name == "unet"
    assert "first 2 training images" in capsys.readouterr().out


def test_a_run_goes_on_in_another_precision(trained_run, tmp_path, capsys):
    """As a float16 run must on a CPU."""
    folder = shutil.copytree(trained_run[0], tmp_path / "tiny")
    assert train_papsmear.main(["--resume", str(folder), "--precision", "float32", "--dry_run"]) == 0
    assert "precision float32" in capsys.readouterr().out
