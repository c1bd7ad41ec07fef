"""Tests of networks for other programs, and of the file that is handed on.

    python -m pytest tests/test_export.py
"""

import json
from functools import lru_cache

import numpy as np
import pytest
import torch

import evaluate_papsmear
import export_model
import predict_papsmear
import train_papsmear
from checkpoints import FIELDS, load_checkpoint, load_model
from conftest import ONE_STAGE, lively_model, noisy_image, tensors_equal, write_checkpoint
from exporting import graphs
from images.files import save_png
from inference import Predictor
from system.archives import digest_of
from unet import ProgressiveUNet, UNet
from unet_parts import upsample2x

NETWORKS = {"grey": (4, 1, 1, ProgressiveUNet), "RGB, rims": (4, 3, 2, ProgressiveUNet),
            "stage 2": (2, 1, 3, ProgressiveUNet), "classic": (4, 3, 1, UNet)}
SIZES = ((1, 17, 18), (1, 33, 91), (3, 64, 80), (2, 100, 51), (1, 256, 256))


def export(path, kind, out, *options, code=0) -> None:
    assert export_model.main([str(path), "--format", kind, "--out", str(out), *options]) == code


def runner(kind, path):
    """Return what runs a written graph, by the packages that other programs would use, and its metadata."""
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path))
        return lambda x: session.run(["probability"], {"image": x.numpy()})[0], \
            session.get_modelmeta().custom_metadata_map
    extra = {graphs.METADATA: ""}
    if kind == "torchscript":
        program = torch.jit.load(path, _extra_files=extra)
    else:
        program = torch.export.load(path, extra_files=extra).module()
    return lambda x: program(x).detach().numpy(), json.loads(extra[graphs.METADATA])


@lru_cache
def checkpoint_of(name: str, folder):
    stage, in_channels, out_channels, kind = NETWORKS[name]
    targets = ("mask", "boundary") if "rims" in name else ("mask",)
    return write_checkpoint(folder / f"{name}.pth", lively_model(stage, in_channels, out_channels, kind), "tile",
                            targets, microns_per_pixel=0.25)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("kind", "name"), [("onnx", "RGB, rims"), ("onnx", "classic"), ("torch", "stage 2"),
                                            *(("torchscript", name) for name in NETWORKS)])
def test_a_written_graph_computes_what_the_network_does(kind, name, tmp_path):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    path, out = checkpoint_of(name, tmp_path), tmp_path / f"graph{export_model.ENDINGS[kind]}"
    export(path, kind, out)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, out.name}
    run, metadata = runner(kind, out)
    model = load_model(path)
    for n, height, width in SIZES:
        x = torch.rand(n, model.in_channels, height, width)
        multiple = 2 ** model.stage
        padded = torch.nn.functional.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        with torch.no_grad():
            expected = model(padded).sigmoid()[:, :, :height, :width].numpy()
        found = run(x)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < graphs.TOLERANCE
        assert expected.std() > 0.01, "not all alike"
    assert metadata["threshold"] == "0.5"
    assert (metadata["sizing"], metadata["microns_per_pixel"]) == ("tile", "0.25")
    assert int(metadata["in_channels"]) == model.in_channels
    assert len(metadata["channels"].split(", ")) == model.out_channels
    assert ("rim of nuclei" in metadata["channels"]) == ("rims" in name)
    assert metadata["sha256"] == digest_of(path)


@pytest.mark.parametrize("sizing", ["resize", "tile"])
def test_what_is_said_of_the_input_gives_the_probabilities_of_a_prediction(sizing, tmp_path):
    """Of a checkpoint of stage 2 an image of 256x256 goes in with 64x64 pixels."""
    model = lively_model(2)
    path = write_checkpoint(tmp_path / "a.pth", model, sizing)
    image = np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)
    small = image.reshape(64, 4, 64, 4).mean((1, 3))
    found = graphs.graph_of(load_checkpoint(path), path)(torch.tensor(small / 255, dtype=torch.float32)[None, None])
    enlarged = upsample2x(upsample2x(found.detach().logit())).sigmoid()[0, 0].numpy()
    predicted = Predictor(path, "cpu", "float32").predict(image)[..., 0]
    assert predicted.std() > 0.01, "not all alike"
    assert np.abs(enlarged - predicted).max() < 0.1 * predicted.std()
    said = graphs.metadata_of(load_checkpoint(path), path)["input"]
    assert {"resize": "brought to 64x64 pixels", "tile": "at its own scale, 4 times smaller in height"}[sizing] in said


def test_a_graph_that_differs_does_not_stay(tmp_path, monkeypatch):
    path = checkpoint_of("grey", tmp_path)
    monkeypatch.setattr(graphs, "_runner", lambda *_: lambda image: np.zeros_like(image))
    with pytest.raises(RuntimeError, match="from the network, which is more than 0.0001"):
        export_model.main([str(path), "--format", "torchscript", "--out", str(tmp_path / "a.pt")])
    assert {p.name for p in tmp_path.iterdir()} == {path.name}


def test_wrong_requests_are_refused(tmp_path, capsys):
    path = checkpoint_of("grey", tmp_path)
    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "link.pth").symlink_to("nowhere.pth")
    for kind, out, words in (("onnx", "a.pt", "ends in .onnx"), ("archive", ".", "a folder"),
                             ("archive", "there.pth", "nothing is overwritten unasked"),
                             ("archive", "link.pth", "nothing is overwritten unasked")):
        export(path, kind, tmp_path / out, code=2)
        assert words in capsys.readouterr().err
    export(path, "archive", path, "--overwrite", code=2)
    assert "the checkpoint itself" in capsys.readouterr().err
    assert (tmp_path / "there.pth").read_text() == "mine"
    assert (tmp_path / "link.pth").is_symlink()
    export(tmp_path / "none.pth", "card", tmp_path / "a.md", code=2)


def test_onnx_without_its_packages_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    export(checkpoint_of("grey", tmp_path), "onnx", tmp_path / "a.onnx", code=2)
    assert "ONNX needs the package onnx, which is not installed. pip install -r" in capsys.readouterr().err


# ---- the archive


def test_an_archive_is_taken_as_a_checkpoint_by_every_command(trained_run, shared_root, tmp_path, capsys):
    best, archive = trained_run[0] / "best_stage_4.pth", tmp_path / "handed.pth"
    export(best, "archive", archive, "--licence", "CC BY 4.0", "--title", "A | name")
    assert archive.stat().st_size < 0.5 * best.stat().st_size
    assert tensors_equal(load_model(archive), load_model(best))
    stored = load_checkpoint(archive)
    assert set(FIELDS) == set(stored)
    assert not any(stored[name] for name in ("optimizer", "random_states", "unborn", "history"))
    image = noisy_image(70, 90)
    assert np.array_equal(Predictor(archive, "cpu").predict(image), Predictor(best, "cpu").predict(image))
    save_png(tmp_path / "a.png", image)
    data = ["--data_root", str(shared_root)]
    assert predict_papsmear.main([str(archive), str(tmp_path / "a.png"), "--out", str(tmp_path / "p")]) == 0
    assert evaluate_papsmear.main([str(archive), *data, "--out", str(tmp_path / "e")]) == 0
    assert train_papsmear.main([*data, *ONE_STAGE, "--init_from", str(archive), "--output_dir", str(tmp_path),
                                "--experiment_name", "from_it"]) == 0
    export(archive, "torchscript", tmp_path / "a.pt")
    (tmp_path / "run").mkdir()
    archive.rename(tmp_path / "run/last.pth")
    capsys.readouterr()
    assert train_papsmear.main(["--resume", str(tmp_path / "run")]) == 2
    assert "holds no optimizer" in capsys.readouterr().err


def test_the_card_tells_what_the_file_is(trained_run, tmp_path):
    best = trained_run[0] / "best_stage_4.pth"
    export(best, "archive", tmp_path / "a.pth", "--licence", "CC BY 4.0", "--title", "Nuclei")
    export(tmp_path / "a.pth", "card", tmp_path / "a.md", "--licence", "another, which is not the one of the file")
    card = (tmp_path / "a.md").read_text()
    assert card.startswith("# Nuclei\n")
    scores = json.loads((trained_run[0] / "test_scores.json").read_text())["best_stage_4"]
    assert f"| Dice | {scores['dice']['mean']:.4f} |" in card
    for words in ("## Licence\n\nCC BY 4.0", digest_of(best), "leakage: 0 of 3 source images of test",
                  "no medical device", "| seed | 0 |", "grey images", "Command: `python ", "train_papsmear.py"):
        assert words in card
    export(trained_run[0] / "best_stage_3.pth", "card", tmp_path / "b.md")
    card = (tmp_path / "b.md").read_text()
    assert "No test scores lay beside" in card
    assert "Not stated" in card
