"""Tests of prepare_data.py as it is called from a shell.

    python -m pytest tests/test_prepare_data.py
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from conftest import PROJECT, run_script, write_data_set
from images.dealing import write_splits
from images.files import load_image, save_png
from images.masks import load_mask
from images.pyramid import open_pyramids
from images.splits import BUNDLED_SAMPLE, DatasetError, find_data_root, list_splits
from preparation.choices import HERLEV_TARGETS
from preparation.herlev import CLASSES, COLOURS
from scoring.scores import scored_pairs

COMMANDS = ("monuseg", "herlev", "drawn", "sample", "check", "split")
HEAVY = {"numpy", "scipy", "skimage", "PIL", "matplotlib", "torch"}
WRONG = {"monuseg": ["--train_dir", "no", "--test_dir", "no"], "herlev": ["--src", "no"],
         "drawn": ["--format", "coco", "--images", "no", "--annotations", "no"]}


def shown_command(said: str) -> list[str]:
    """Return the command that checks the new data set, as a shell reads what was printed."""
    return shlex.split(re.search(r"^python (prepare_data\.py check .*)$", said, re.M).group(1))


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_needs_no_numpy(arguments):
    code = ("import sys, prepare_data\ntry:\n    prepare_data.main(sys.argv[1:])\nexcept SystemExit as end:\n"
            f"    print(end.code, sorted({HEAVY} & set(sys.modules)))")
    said = run_script("-c", code, *arguments).stdout
    assert said.endswith("0 []\n")
    assert all(name in said for name in (COMMANDS if arguments == ["--help"] else ["usage: prepare_data.py"]))


def test_the_commands_of_the_docstring_are_understood():
    lines = re.findall(r"^    python (prepare_data\.py .*)", prepare_data.__doc__.replace("\\\n", ""), re.M)
    parsed = [prepare_data.build_parser().parse_args(shlex.split(line)[1:]) for line in lines]
    assert [line.split()[1] for line in lines] == list(COMMANDS)
    assert parsed[0].out == parsed[0].out.with_name("data_monuseg")


def test_options_of_one_name_mean_the_same(capsys):
    helps = {}
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            prepare_data.main([name, "--help"])
        text = capsys.readouterr().out.split("options:")[1]
        for option, said in re.findall(r"^  (--\w+)(.*?)(?=^  -|\Z)", text, re.M | re.S):
            helps.setdefault(option, set()).add(" ".join(said.split()))
    assert {"--out", "--seed", "--overlap", "--group_regex", "--in_channels", "--out_channels"} <= set(helps)
    assert {option for option, said in helps.items() if len(said) > 1} == set()


@pytest.mark.parametrize("name", sorted(WRONG))
def test_refusals_are_one_line(name, tmp_path):
    done = run_script("prepare_data.py", name, *WRONG[name], "--out", tmp_path / "d")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "required: COMMAND"), (["monu"], "invalid choice: 'monu'"), (["herlev", "--out", "d"], "required: --src"),
    (["herlev", "--src", "a", "--out", "d", "--target", "cell"], "invalid choice: 'cell'"),
    (["sample", "--out", "d", "--train", "0"], "--train: '0' is not a whole number of at least 1"),
    (["sample", "--out", "d", "--seed", "x"], "--seed: 'x'"), (["check", "--out_channels", "0"], "--out_channels: '0'"),
    (["check", "--in_channels", "2"], "invalid choice: 2"), (["check", "--group_regex", "("], "no regular expression"),
    (["split"], "required: DATA_ROOT")])
def test_options_are_refused_before_anything_is_read(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare_data.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert list(tmp_path.iterdir()) == []


def write_cells(root: Path) -> Path:
    """Write three cells of a class, in fields of their own, as Herlev has them."""
    colours = np.array(list(COLOURS), np.uint8)
    (root / CLASSES[0]).mkdir(parents=True)
    for i in range(3):
        parts = np.repeat(np.arange(3), 16).reshape(3, 16).repeat(12, axis=0)
        for name, array in ((f"{i}-{i}-001.png", colours[2 - parts]), (f"{i}-{i}-001-d.png", colours[parts])):
            save_png(root / CLASSES[0] / name, array)
    return root


@pytest.mark.parametrize("target", sorted(HERLEV_TARGETS))
def test_the_command_shown_at_the_end_checks_what_was_made(target, tmp_path, capsys):
    """Whatever the name of the folder, and with the channels that the masks have."""
    out = tmp_path / "it's data"
    assert prepare_data.main(["herlev", "--src", str(write_cells(tmp_path / "raw")), "--out", str(out), "--target",
                              target, "--folds", "3"]) == 0
    said = capsys.readouterr().out
    assert f"look at {out / 'contact_sheet.png'}" in said
    done = run_script(*shown_command(said))
    assert done.returncode == 0, done.stderr
    assert "0 of 1 groups of test" in done.stdout
    copied = re.search(r"^cp (.*)$", said, re.M).group(1)
    assert shlex.split(copied) == [str(out / "fold_1.csv"), str(out / "splits.csv")]


def test_the_bundled_sample_is_what_the_command_makes(tmp_path):
    """Small counts: an image depends on seed, split and number alone."""
    done = run_script("prepare_data.py", "sample", "--out", tmp_path / "s", "--train", 2, "--valid", 1, "--test", 1)
    assert done.returncode == 0, done.stderr
    made = sorted(p.relative_to(tmp_path / "s") for p in (tmp_path / "s").rglob("*.png"))
    assert len(made) == 8
    for name in made:  # an exponential rounded otherwise by another numpy may change a grey value
        read = load_mask if "masks" in name.parts else lambda path: load_image(path, 1)
        new, bundled = (read(root / name).astype(int) for root in (tmp_path / "s", PROJECT / "data"))
        assert np.abs(new - bundled).mean() < (0.001 if "masks" in name.parts else 0.5)
    assert "python prepare_data.py sample --out DIR --seed 0" in (PROJECT / "data/README.md").read_text()
    assert run_script(*shown_command(done.stdout)).returncode == 0


def test_split_then_check_from_another_folder(tmp_path):
    write_data_set(tmp_path / "mine", counts=(8, 3, 3))
    for kind in ("images", "masks"):  # a copy of a training image in test
        (tmp_path / f"mine/test/{kind}/flipped_train_0.png").write_bytes(
            (tmp_path / f"mine/train/{kind}/train_0.png").read_bytes())
    script = PROJECT / "prepare_data.py"
    done = run_script(script, "check", "mine", cwd=tmp_path)
    assert "1 of 4 source images of test are in train as well" in done.stdout
    remedy = shlex.split(re.search(r"python prepare_data\.py (split .*)", done.stdout).group(1))
    done = run_script(script, *remedy, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote mine/splits.csv\ndata set mine\n")
    assert "in train as well" not in done.stdout
    assert "warning: valid has 2 group(s) alone" in done.stdout
    again = run_script(script, *remedy, cwd=tmp_path)
    assert again.returncode == 2
    assert "never overwritten" in again.stderr


def test_a_split_that_fails_its_check_is_not_kept(tmp_path, capsys):
    root = write_data_set(tmp_path / "data")
    for path in root.glob("*/masks/*.png"):
        labels = load_mask(path)[..., 0].astype(np.uint8)
        labels[:3] = 2
        save_png(path, labels)
    assert prepare_data.main(["split", str(root)]) == 2
    assert "--out_channels 2" in capsys.readouterr().err
    assert not (root / "splits.csv").exists()
    assert prepare_data.main(["split", str(root), "--out_channels", "2"]) == 0


# ---- the bundled sample, from any folder


def test_the_name_data_means_the_bundled_sample_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_data_root("data") == BUNDLED_SAMPLE == PROJECT / "data"
    assert find_data_root("other") == Path("other")
    assert len(list_splits("data")["train"]) == 64
    assert scored_pairs("data", "test")[0].image.is_relative_to(BUNDLED_SAMPLE)
    assert len(open_pyramids("data", cache_images=False, wanted=("test",))["test"]) == 16
    with pytest.raises(DatasetError, match="no such folder"):
        write_splits("data")
    (tmp_path / "data").symlink_to("nowhere")
    assert find_data_root("data") == Path("data"), "a link that leads nowhere is a mistake to be told"
    (tmp_path / "data").unlink()
    write_data_set(tmp_path / "data")
    assert find_data_root("data") == Path("data")
    assert len(list_splits("data")["train"]) == 6


def test_training_and_checking_find_the_sample_from_an_empty_folder(tmp_path):
    for arguments in (["prepare_data.py", "check"], ["pap_smear_dataset.py", "data"],
                      ["train_papsmear.py", "--dry_run", "--base_channels", "2"]):
        done = run_script(PROJECT / arguments[0], *arguments[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"data set {BUNDLED_SAMPLE}\n")
    assert list(tmp_path.iterdir()) == []
