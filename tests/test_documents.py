"""Tests of the documents: links, pictures, commands and options of README, docs and module docstrings.

    python -m pytest tests/test_documents.py
    python -m tests.test_documents                  # writes docs/configuration.md anew from the parsers
"""

import argparse
import ast
import contextlib
import functools
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import PROJECT, lively_model, write_checkpoint, write_data_set, write_slide
from images.files import save_png
from preparation.herlev import prepare as prepare_herlev
from tests.test_preparation import write_drawn, write_herlev, write_images, write_monuseg
from training import settings

PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
# Commands that no test runs, and why; their options are read by their parsers all the same.
TOO_LONG = {
    r"python train_papsmear\.py (?!--resume|.*--dry_run)": "trains at full size",
    r"(python|bash) benchmarks/|python -m benchmarks\.": "measures for minutes",
    r"torchrun|OMP_NUM_THREADS=8 torchrun": "starts several processes; tests/test_processes.py does",
    r"python -m pytest|python tests/|python test_|python -m tests|bash tests/|make test|\.venv/bin/":
        "runs tests and checks",
    r"make train|pip ": "installs packages",
    r"python (prepare_data\.py |-m preparation\.)sample": "draws hundreds of fields",
    r"python example_usage\.py": "trains; test_implementation.py runs it",
    r"jupytext ": "makes a file beside the script; tests/test_notebooks.py runs the notebook",
    r"python export_model\.py .*--format onnx": "takes 10 s; tests/test_export.py does",
    r"python -m demo": "serves a page until Ctrl-C; tests/test_demo.py opens it",
    r"python export_model\.py (.*--push_to_hub|hf://)|hf auth": "needs the Hub; tests/test_hub.py has its own",
    r"python docs/draw_growth\.py": "would draw the picture of this very folder anew"}
SHORTER = {"range(50)": "range(1)", "out_channels=1)": "out_channels=1, base_channels=2)",
           "epochs_per_stage=50": "epochs_per_stage=1"}  # so that blocks of Python run in seconds
# Of torchrun, TensorBoard, argparse, tests/kill.py and pap_smear_dataset.py.
OTHERS_OPTIONS = {"--nproc_per_node", "--kills", "--logdir", "--help", "--write_splits"}


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


@functools.cache
def commands() -> list[str]:
    """Return every shell command of the pages and of our docstrings once, lines joined that end in a backslash."""
    lines = [line for page in PAGES for block in blocks(page.read_text(), "sh")
             for line in block.replace("\\\n", " ").splitlines()]
    for path in sorted(PROJECT.rglob("*.py")):
        if ".venv" not in str(path.relative_to(PROJECT)):
            docstring = (ast.get_docstring(ast.parse(path.read_text()), clean=False) or "").replace("\\\n", " ")
            lines += re.findall(r"^ {4}((?:python|torchrun|bash) .*)", docstring, re.M)
    return list(dict.fromkeys(line.split("  #")[0].strip() for line in lines if line.strip()))


def reason_not_to_run(command: str) -> str | None:
    return next((reason for pattern, reason in TOO_LONG.items() if re.match(pattern, command)), None)


def python_call(command: str) -> tuple[str, list[str]] | None:
    """Return the name of our module that a command calls, and its arguments; None for other programs."""
    words = shlex.split(command)
    while words and (words[0] in ("python", "torchrun", "-m") or re.match(r"\w+=|--nproc_per_node", words[0])):
        words = words[1:]
    name = words[0].removesuffix(".py").replace("/", ".") if words else ""
    exists = (PROJECT / f"{name.replace('.', '/')}.py").is_file()
    return (name, words[1:]) if exists and not name.startswith("test") else None


def shown_default(action: argparse.Action) -> tuple[str, str]:
    """Return default and help of an option; a default that the help names in brackets at its end is named once."""
    words = (action.help or "").replace("%%", "%")
    named = re.search(r"\s*\(([^()]*)\)$", words)
    with contextlib.suppress(argparse.ArgumentTypeError, TypeError, ValueError):
        if named and (action.type or type(action.default))(named[1]) == action.default:
            return f"`{named[1]}`", words[:named.start()]
    fixed = "required" if action.required else "off" if isinstance(action, argparse._StoreTrueAction) else ""
    return fixed or (f"`{as_typed(action.default)}`" if action.default is not None else ""), words


def options_table(parser: argparse.ArgumentParser) -> str:
    """Return a Markdown table of every argument of a parser: name, values, default, help."""
    rows = ["| argument | default | |", "|---|---|---|"]
    for action in (a for a in parser._actions if not isinstance(a, argparse._HelpAction)):
        values = ", ".join(map(str, action.choices or ()))
        name = ", ".join(f"`{n}`" for n in action.option_strings) or f"`{action.dest}`"
        default, words = shown_default(action)
        cells = name, default, "; ".join(part for part in (words, values and f"one of {values}") if part)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def script_tables(name: str) -> str:
    """Return the section of a script: its table, or one for each of its subcommands."""
    parser = importlib.import_module(name.replace("/", ".")).build_parser()
    commands = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    tables = [f"### {key}\n\n{options_table(own)}" for key, own in commands[0].items()] if commands else \
        [options_table(parser)]
    title = f"python -m {name.removesuffix('/__main__')}" if name.endswith("__main__") else f"{name}.py"
    return "\n".join([f"## {title}\n", *tables])


def configuration_page() -> str:
    """Return docs/configuration.md."""
    presets = [f"- `{name}`: " + ", ".join(f"`--{key} {as_typed(value)}`" for key, value in preset.items())
               + f". On `{settings.PRESET_RESULTS[name][0]}`: {'; '.join(settings.PRESET_RESULTS[name][1:])}"
               for name, preset in settings.PRESETS.items()]
    rest = [script_tables(name) for name in (
        "predict_papsmear", "evaluate_papsmear", "export_model", "report_runs", "demo/__main__", "prepare_data",
        "benchmarks/classes", "benchmarks/correction", "benchmarks/experiments", "benchmarks/speed")]
    return "\n".join([
        "# Every option\n\nThis page lists every option of every command, as `python -m tests.test_documents` reads "
        "them from the parsers.\n\nWrong values are refused before anything is read or written, with exit code 2.\n",
        "## train_papsmear.py\n", options_table(settings.build_parser()),
        "### Presets\n\nAn option given by hand beats a preset; a preset beats a default. Times are of a "
        "server CPU, scores of one run ([Results](results.md), [Earlier results](earlier_results.md)).\n",
        *presets, "", *rest])


def as_typed(value) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}:{n}" for key, n in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_configuration_is_what_the_parsers_say():
    assert (PROJECT / "docs/configuration.md").read_text() == configuration_page(), "python -m tests.test_documents"


def slugs(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)", text, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        found |= {f"{slug}-{found[slug]}": 0} if found[slug] else {}
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), target
            assert not anchor or anchor in slugs(prose(path)), target
    for name in re.findall(r"`([\w/]+\.(?:py|txt|md|sh))`", text):
        assert (PROJECT / name).exists() or (page.parent / name).exists(), name


def test_no_picture_is_forgotten_and_the_readme_is_short():
    everything = "".join(page.read_text() for page in PAGES)
    assert [p.name for p in (PROJECT / "docs").glob("*.png") if f"{p.name})" not in everything] == []
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 250


def test_options_named_in_text_exist():
    known = set(re.findall(r"--\w+", (PROJECT / "docs/configuration.md").read_text())) | OTHERS_OPTIONS
    for page in PAGES:
        inline = " ".join(re.findall(r"`([^`\n]*(?:\n[^`\n]*)?)`", prose(page)))
        assert set(re.findall(r"(?<![\w-])--\w\w+", inline)) - known == set(), page.name


@pytest.mark.parametrize("command", [c for c in commands() if reason_not_to_run(c)])
def test_options_of_long_commands_are_read(command):
    call = python_call(command)
    if not call or call[0] in ("example_usage", "docs.draw_growth"):
        return
    name, arguments = call
    if name == "train_papsmear":
        settings.parse(arguments)
    elif {"precision", "growth"} & set(arguments):
        settings.parse(importlib.import_module(name).build_parser().parse_known_args(arguments)[1])
    else:
        importlib.import_module(name).build_parser().parse_args(arguments)


def test_the_list_of_long_commands_is_up_to_date():
    assert [pattern for pattern in TOO_LONG if not any(re.match(pattern, c) for c in commands())] == []


@pytest.fixture(scope="session")
def workplace(trained_run, tmp_path_factory) -> Path:
    """Return a folder with whatever the commands name: runs, data sets, downloads, images, annotations."""
    place = tmp_path_factory.mktemp("documents")
    for name in ("my_run", "other", "NAME", "A", "B", "monuseg", "herlev", "fold_1"):
        shutil.copytree(trained_run[0], place / "outputs" / name)
    for name in ("fold_1.pth", "fold_2.pth", "model.pth", "outputs/model.pth"):
        shutil.copy(trained_run[0] / "best_stage_4.pth", place / name)
    for name in ("data", "my_data", "data_monuseg", "data_monuseg_overlap", "data_herlev", "data_mine"):
        write_data_set(place / name)
    prepare_herlev(write_herlev(place / "herlev"), place / "data_herlev_folds", folds=5)
    train, test = write_monuseg(place)
    for path, name in ((train, "TRAIN"), (test, "MoNuSegTestData"), (test, "TEST")):
        shutil.copytree(path, place / name)
    for kind, images, drawn in (("geojson", "slides", "exports"), ("label-tiff", "fields", "labels"),
                                ("coco", "images", "instances_default.json"), ("label-tiff", "my_images", "my_masks")):
        source = write_drawn(place / f"own_{images}", kind)
        shutil.move(source[0], place / images)
        shutil.move(source[1], place / drawn)
    write_images(place / "data_monuseg/whole/test/images", ["whole"])
    save_png(write_images(place / "data_monuseg/whole/test/masks", []) / "whole.png", np.eye(80, dtype=bool)[:64])
    shutil.copytree(place / "exports", place / "predicted_to_correct")
    prepare_herlev(place / "herlev", place / "data_herlev_cells", target="both")
    (place / "outputs/herlev_cells").mkdir()
    write_checkpoint(place / "outputs/herlev_cells/best_stage_4.pth", lively_model(in_channels=3, out_channels=2),
                     class_names=("nucleus", "cytoplasm"))
    (place / "outputs/tiles").mkdir()
    write_checkpoint(place / "outputs/tiles/best_stage_4.pth", lively_model(), "tile")
    write_slide(place / "slide.svs", 300, 400)
    for name in ("smear.png", "smear.tif", "slide.tif"):
        shutil.copy(place / "MoNuSegTestData/TCGA-BB-0000-01Z.tif", place / name)
    return place


@pytest.fixture
def here(workplace, tmp_path, monkeypatch) -> Path:
    """Go to a fresh copy of the workplace."""
    place = tmp_path / "here"
    shutil.copytree(workplace, place)
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("command", [c for c in commands() if not reason_not_to_run(c)])
def test_commands_run(command, here):
    """Word for word, where the results that earlier commands of the page left are not there yet."""
    for folder, result in re.findall(r"--(out|experiment_name) (\S+)", command):
        path = here / ("outputs" if folder == "experiment_name" else "") / result
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    call = python_call(command)
    if call:
        assert importlib.import_module(call[0]).main(call[1]) == 0
    else:
        subprocess.run(["bash", "-c", command], check=True, timeout=60)


PYTHON = [(page.name, block) for page in PAGES for block in blocks(page.read_text(), "python")]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_blocks_of_python_run(page, block, here):
    for long, short in SHORTER.items():
        block = block.replace(long, short)
    exec(compile(block, page, "exec"), {"input_image": torch.rand(1, 1, 256, 256)})


if __name__ == "__main__":
    (PROJECT / "docs/configuration.md").write_text(configuration_page())
