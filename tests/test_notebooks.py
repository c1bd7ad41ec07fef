"""Tests of what a notebook shows: words and tables, figures, a curve that follows a training, the example as cells."""

import copy
import html
import io
import pickle

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from conftest import PROJECT, lively_model, make_trainer, run_script, write_checkpoint, write_data_set
from images.files import load_image, save_png
from images.recipe import MASK_AND_BOUNDARY
from inference import Predictor
from pap_smear_dataset import PapSmearDataset, create_progressive_dataloaders
from scoring.figures import LONGEST, prediction_figure, reduced
from system import notebooks
from system.notebooks import LiveFigure, html_table
from unet import STAGE_RESOLUTIONS, ProgressiveUNet, UNet, count_parameters

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")


@pytest.fixture(autouse=True)
def no_figure_of_pyplot():
    yield
    assert plt.get_fignums() == []


def panels_of(figure) -> list:
    return [axis for axis in figure.axes if axis.images]


def test_each_object_says_in_a_line_what_it_is(shared_root, tmp_path):
    trainer, loaders = make_trainer(shared_root, tmp_path / "run")
    dataset = PapSmearDataset(shared_root, "train", 64, augment_probability=0.25)
    path = write_checkpoint(tmp_path / "a.pth", lively_model(in_channels=3), sizing="tile")
    for thing, found in (
            (dataset, ("PapSmearDataset(", "split train", "images 6", "64x64", "probability 0.25", "grey")),
            (loaders[128][1], ("ProgressiveLoader(", "split valid", "images 3", "128x128", "batches 2 of 2")),
            (trainer, ("ProgressiveTrainer(", "cpu", "0 of 2", "2 at stage 1", str(tmp_path / "run"), "none yet")),
            (Predictor(path), ("Predictor(", str(path), "stage 4", "RGB", "tile"))):
        line = repr(thing)
        assert "\n" not in line
        assert all(words in line for words in found), line
        table = thing._repr_html_()
        assert all(html.escape(words.rpartition("(")[0] or words.split()[-1]) in table for words in found), table
    assert not (tmp_path / "run").exists(), "to print is not to write"


def test_a_network_is_a_table_of_stages():
    model = ProgressiveUNet(base_channels=4)
    model.set_stage(2)
    rows = model.stage_table()
    assert [(row[0], row[1], row[4]) for row in rows] == [
        ("1", "32x32", "yes"), ("2", "64x64", "yes"), ("3", "128x128", "not yet"), ("4", "256x256", "not yet")]
    assert [row[2] for row in rows] == ["12 at 16x16, 8, 8", "6, 6", "5, 4", "4, 4"]
    assert sum(int(row[3].replace(",", "")) for row in rows) == count_parameters(model)
    live = sum(p.numel() for part in model.live_parts() for p in model.get_submodule(part).parameters())
    first, second = repr(model).splitlines()
    assert f"parameters in use {live:,} of {count_parameters(model):,}" in first
    assert second == "  its layers: for name, part in model.named_children(): print(name, part)"
    printed = io.StringIO()
    exec(second.partition(": ")[2], {"model": model, "print": lambda *words: print(*words, file=printed)})
    assert "Conv2d" in printed.getvalue()
    assert "<th" in model._repr_html_()
    assert model._repr_html_().count("<tr>") == 5
    assert [row[0] for row in UNet(base_channels=4).stage_table()] == ["4"]
    assert "ProgressiveUNet(" in repr(torch.nn.Sequential(model)), "within another module too"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(twin) == repr(model)


def test_names_of_files_are_escaped(tmp_path):
    evil = "<img src=x onerror=alert(1)>\x1b[31m"
    assert "<img" not in html_table(evil, [(evil, evil)], (evil, evil))
    assert "&lt;img" in html_table(evil, [(evil, evil)])
    path = write_checkpoint(tmp_path / "<b>$x$\x1b.pth", lively_model())
    predictor = Predictor(path)
    assert "<b>$" not in predictor._repr_html_()
    assert "&lt;b&gt;$x$\\x1b.pth" in predictor._repr_html_()
    assert "\x1b" not in repr(predictor)
    image = tmp_path / "<b>$_^$.png"
    save_png(image, np.full((40, 50), 99, np.uint8))
    figure = predictor.show(image)
    assert figure._repr_png_()[1:4] == b"PNG", "no formula of TeX is read in a name"


def test_printing_decodes_no_image(shared_root, monkeypatch):
    dataset = PapSmearDataset(shared_root, cache_images=False)
    loaders = create_progressive_dataloaders(shared_root, cache_images=False)

    def decoded(*_):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(type(dataset.pyramid), "batch", decoded)
    for thing in (dataset, *loaders[32]):
        assert repr(thing)
        assert thing._repr_html_()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_data_set_shows_a_sample(channels, shared_root):
    dataset = PapSmearDataset(shared_root, "valid", 128, in_channels=channels)
    figure = dataset.show(1)
    image, outlined, mask = panels_of(figure)
    expected = dataset[1]["image"].numpy()
    assert np.allclose(np.asarray(image.images[0].get_array()), expected.transpose(1, 2, 0).squeeze())
    assert np.array_equal(np.asarray(mask.images[0].get_array()), dataset[1]["mask"][0].numpy())
    assert outlined.collections, "the outline"
    assert mask.get_title() == f"mask: {dataset[1]['mask'].mean():.1%}"
    assert figure.get_suptitle() == "valid_1, 128x128"
    assert figure._repr_png_()[1:4] == b"PNG"
    figure.savefig(io.BytesIO(), format="svg")


def test_several_classes_and_rims_have_a_panel_each(tmp_path):
    root = write_data_set(tmp_path / "data", (2, 2, 2))
    for path in root.rglob("masks/*.png"):
        labels = np.zeros((64, 64), np.uint8)
        labels[8:40, 8:40], labels[16:24, 16:24] = 1, 2
        save_png(path, labels)
    figure = PapSmearDataset(root, "test", 64, out_channels=2).show(0)
    assert [axis.get_title() for axis in panels_of(figure)] == [
        "image", "outlines", "class 1: 23.4%", "class 2: 1.6%"]  # 32 * 32 - 8 * 8 and 8 * 8 of 64 * 64
    rims = PapSmearDataset(write_data_set(tmp_path / "one"), "test", 64, targets=MASK_AND_BOUNDARY).show(0)
    assert [axis.get_title().split(":")[0] for axis in panels_of(rims)] == ["image", "outlines", "mask", "boundary"]


@pytest.mark.parametrize(("channels", "classes", "sizing", "height", "width"), [
    (1, 1, "resize", 70, 90), (3, 2, "tile", 70, 90), (3, 1, "tile", 60, 1100)])
def test_a_predictor_shows_an_image(channels, classes, sizing, height, width, tmp_path):
    predictor = Predictor(write_checkpoint(tmp_path / "a.pth", lively_model(4, channels, classes), sizing), "cpu")
    image = tmp_path / "smear.png"
    save_png(image, np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8))
    figure = predictor.show(image)
    shown = panels_of(figure)
    count = predictor.nuclei(predictor.predict(image)).max()
    assert [axis.get_title() for axis in shown] == ["image", f"{count} nucle{'us' if count == 1 else 'i'}"] + (
        ["probability: mask"] if classes == 1 else ["probability: class 1", "probability: class 2"])
    assert figure.get_suptitle() == f"smear.png, {height}x{width}"
    assert max(shown[0].images[0].get_array().shape) <= LONGEST
    if width <= LONGEST:
        found = predictor.predict(image)[..., 0]
        assert np.abs(np.asarray(shown[2].images[0].get_array()) / 255 - found).max() <= 0.5 / 255 + 1e-6
        assert np.allclose(np.asarray(shown[0].images[0].get_array()),
                           load_image(image, channels).squeeze() / 255)
    assert "image, 70x90" in predictor.show(np.zeros((70, 90), np.uint8)).get_suptitle()


def test_large_images_are_reduced_to_means():
    pixels = np.arange(4 * 2050, dtype=np.uint8).reshape(4, 2050, 1)
    small = reduced(pixels)
    assert small.shape == (1, 683, 1)
    assert small[0, 1, 0] == int(pixels[:3, 3:6].mean())
    assert reduced(pixels[:, :LONGEST]) is not None
    assert reduced(np.ones((1, 3000, 3), np.uint8)).shape == (1, 1000, 3)


@pytest.mark.parametrize(("height", "width"), [(1, 3000), (2049, 1500), (700, 1025)])
def test_outlines_of_large_images_are_where_the_nuclei_are(height, width):
    labels = np.zeros((height, width), np.int32)
    labels[:, width // 2:] = 1
    figure = prediction_figure(np.zeros((height, width, 1), np.uint8), np.zeros((height, width, 1), np.float32), labels,
                               "a", ["mask"])
    drawn = np.asarray(panels_of(figure)[1].images[0].get_array())
    middle = drawn[len(drawn) // 2, :, 1] > 0.5
    assert abs(middle.argmax() / drawn.shape[1] - 0.5) < 0.01
    assert panels_of(figure)[1].get_title() == "1 nucleus"


def test_curves_with_and_without_a_folder(shared_root, tmp_path):
    drawn = []
    for output in (None, tmp_path / "run"):
        trainer, loaders = make_trainer(shared_root, output, epochs_per_stage=[2, 0, 0, 1])
        trainer.fit(loaders, say=lambda line: None)
        figure = trainer.curves()
        lines = figure.axes[0].lines
        assert len(lines[0].get_xdata()) == 3
        drawn.append([line.get_ydata() for line in lines[:2]])
        assert figure._repr_png_()[1:4] == b"PNG"
    assert np.allclose(drawn[0], drawn[1], atol=1e-6), "metrics.csv holds seven digits"
    resumed, _ = make_trainer(shared_root, epochs_per_stage=[2, 0, 0, 1])
    resumed.resume(tmp_path / "run/last.pth")
    assert np.array_equal([line.get_ydata() for line in resumed.curves().axes[0].lines[:2]], drawn[1])


class Shell:
    """What a kernel's shell has and is asked for."""

    kernel, execution_count = object(), 1


def test_a_live_figure_takes_a_tenth_of_the_time(monkeypatch):
    clock, shown, drawings = [0.0], [], []

    class Handle:
        def update(self, figure):
            clock[0] += 2
            shown.append(("again", figure))

    def display(figure, display_id):
        clock[0] += 2
        shown.append(("new", figure))
        return Handle()

    def figure():
        drawings.append(clock[0])
        return len(drawings)

    live = LiveFigure()
    live.draw(figure)
    assert drawings == [], "no kernel, no figure"
    pytest.importorskip("IPython")
    shell = Shell()
    monkeypatch.setattr(notebooks, "kernel", lambda: shell)
    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(notebooks.time, "monotonic", lambda: clock[0])
    for now in (0, 3, 21.9, 22.1, 30):  # drawn from 0 to 2, so the next may come at 22
        clock[0] = now
        live.draw(figure)
    assert drawings == [0, 22.1]
    live.draw(figure, last=True)
    shell.execution_count = 2
    live.draw(figure)
    assert [kind for kind, _ in shown] == ["new", "again", "again", "new"]


def test_no_kernel_in_a_script_or_an_interactive_terminal():
    assert notebooks.kernel() is None
    code = ("import sys\nfrom system.notebooks import kernel\nassert 'IPython' not in sys.modules\n"
            "import IPython\nfrom IPython.terminal.interactiveshell import TerminalInteractiveShell\n"
            "assert kernel() is None\nTerminalInteractiveShell.instance()\nassert kernel() is None\nprint('fine')")
    assert run_script("-c", code).stdout.endswith("fine\n")


def test_training_and_prediction_need_nothing_of_notebooks():
    code = ("import sys\nfor name in ('IPython', 'jupytext', 'nbclient', 'ipykernel', 'ipywidgets'):\n"
            "    sys.modules[name] = None\nimport train_papsmear, progressive_trainer, inference, pap_smear_dataset\n"
            "from unet import ProgressiveUNet\nprint(progressive_trainer.ProgressiveTrainer(ProgressiveUNet("
            "base_channels=2), 'cpu'))")
    done = run_script("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr


def run_cells(cells, folder, first: str = ""):
    """Run cells of Python in a kernel that stands in the project; return the notebook with its outputs."""
    start = f"import os, sys\nsys.path.insert(0, {str(PROJECT)!r})\nos.chdir({str(folder)!r})\n{first}"
    notebook = jupytext.reads("# %%\n" + "\n# %%\n".join([start, *cells]), "py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbclient.NotebookClient(notebook, timeout=300).execute()


def outputs(notebook, kind: str) -> list[str]:
    """Return all outputs of a notebook of this MIME type; 'stdout' and 'stderr' for streams."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    if kind.startswith("std"):
        return [output["text"] for output in found if output.output_type == "stream" and output.name == kind]
    return [output["data"][kind] for output in found if kind in output.get("data", {})]


def test_training_in_a_notebook_shows_a_bar_and_one_curve_that_follows(shared_root, tmp_path):
    cells = ["from conftest import make_trainer\n"
             f"trainer, loaders = make_trainer({str(shared_root)!r}, epochs_per_stage=[2, 0, 0, 1])\n"
             "from system.notebooks import LiveFigure\ndrawn = []\n"
             "trainer._live.draw = lambda *a, **k: (drawn.append(1), LiveFigure.draw(trainer._live, *a, **k))\n"
             "trainer.fit(loaders)",
             "print('drawn', len(drawn))\ntrainer",
             "loaders[32][0].dataset.show(0)",
             "trainer.model"]
    notebook = run_cells(cells, tmp_path)
    training = notebook.cells[1].outputs
    assert sum("image/png" in output.get("data", {}) for output in training) == 1, "one figure, drawn anew"
    assert "drawn 4" in "".join(outputs(notebook, "stdout"))
    bars = "".join(outputs(notebook, "stderr")) + "".join(outputs(notebook, "text/plain"))
    assert "stage 4 (256) epoch 1/1" in bars
    assert [cell.outputs[-1]["data"].keys() & {"text/html", "image/png"} for cell in notebook.cells[2:]] == [
        {"text/html"}, {"image/png"}, {"text/html"}]


def test_the_example_is_a_script_and_a_notebook(tmp_path):
    text = (PROJECT / "example_usage.py").read_text()
    example = jupytext.reads(text, "py:percent")
    assert {cell.cell_type for cell in example.cells} == {"code", "markdown"}
    notebook = run_cells([cell.source for cell in example.cells if cell.cell_type == "code"], PROJECT,
                         f"import tempfile\ntempfile.tempdir = {str(tmp_path)!r}")
    assert "stage 4: train loss" in "".join(outputs(notebook, "stdout"))
    assert len(outputs(notebook, "image/png")) == 3, "a sample, the curves, a prediction"
    assert len(outputs(notebook, "text/html")) == 2, "the tables of network and trainer"
    assert not [text for text in outputs(notebook, "text/plain") if " at 0x" in text]
    (run,) = tmp_path.glob("*/run")
    assert {f"best_stage_{stage}.pth" for stage in STAGE_RESOLUTIONS} <= {path.name for path in run.iterdir()}
