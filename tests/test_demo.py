"""Tests of the page on which a checkpoint is tried: what it finds, and the page itself in a real browser.

    python -m pytest tests/test_demo.py

What needs gradio or Chromium is skipped where it is not installed (pip install -r requirements-demo.txt).
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import predict_papsmear
from conftest import PROJECT, lively_model, noisy_image, write_checkpoint
from demo import __main__ as command
from demo.page import draw_areas, predict_image
from images import bands
from images.files import load_image, save_png
from inference import Predictor
from system.errors import UserError
from system.text import of
from tests.browser import CHROMIUM, Browser

GRADIO = importlib.util.find_spec("gradio")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "a.pth", lively_model(4, 1, 1, spread=50))


@pytest.fixture
def image(tmp_path) -> Path:
    save_png(tmp_path / "field.png", noisy_image(90, 70))
    return tmp_path / "field.png"


def prediction_of(checkpoint: Path, image: Path, out: Path, min_area: int = 30) -> Path:
    assert predict_papsmear.main([str(checkpoint), str(image), "--out", str(out), "--format", "png,geojson",
                                  "--threshold", "0.5", "--min_area", str(min_area), "--device", "cpu"]) == 0
    return out


def test_the_page_finds_what_the_command_finds(checkpoint, image, tmp_path):
    expected = prediction_of(checkpoint, image, tmp_path / "expected", min_area=5)
    found = predict_image(Predictor(checkpoint, "cpu"), image, tmp_path / "found", 0.5, 5)
    assert np.array_equal(load_image(found["mask"], 1), load_image(expected / "field_mask.png", 1))
    assert found["geojson"].read_text() == (expected / "field_nuclei.geojson").read_text()
    assert found["nuclei"].read_text() == (expected / "nuclei.csv").read_text()
    rows = (expected / "nuclei.csv").read_text().splitlines()
    assert len(found["areas"]) == len(rows) - 1 > 0
    assert found["summary"].startswith(f"field.png, 90x70: {of(len(rows) - 1, 'nucleus', 'nuclei')}, mean area ")
    few = predict_image(Predictor(checkpoint, "cpu"), image, tmp_path / "few", 0.5, 90 * 70 + 1)
    assert few["areas"] == []
    assert ": 0 nuclei, mean area " in few["summary"]
    assert "0 nuclei" in few["summary"]


def test_a_network_of_nucleus_and_cytoplasm_gives_both_on_the_page_too(image, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "cells.pth", lively_model(4, 1, 2, spread=50),
                                  class_names=("nucleus", "cytoplasm"))
    expected = prediction_of(checkpoint, image, tmp_path / "expected", min_area=5)
    found = predict_image(Predictor(checkpoint, "cpu"), image, tmp_path / "found", 0.5, 5)
    table = found["nuclei"].read_text()
    assert "nucleus_to_cytoplasm" in table
    assert table == (expected / "nuclei.csv").read_text()


def test_the_mask_of_a_large_image_is_one_that_a_browser_shows(image, tmp_path, monkeypatch):
    """Prediction writes it as TIFF, which browsers do not know."""
    checkpoint = write_checkpoint(tmp_path / "tiles.pth", lively_model(4, 1, 1, spread=50), "tile")
    expected = prediction_of(checkpoint, image, tmp_path / "expected", min_area=5)
    parser = predict_papsmear.build_parser()
    parser.set_defaults(stream_above=0)
    monkeypatch.setattr(predict_papsmear, "build_parser", lambda: parser)
    monkeypatch.setattr(bands, "OVERVIEW_SIDE", 40)
    found = predict_image(Predictor(checkpoint, "cpu"), image, tmp_path / "found", 0.5, 5)
    assert found["overlay"].exists()
    assert np.array_equal(load_image(found["mask"], 1), load_image(expected / "field_mask.png", 1)[::3, ::3])


def test_no_nuclei_are_drawn_too():
    for areas in ([], [40], [40] * 500):
        axes = draw_areas(areas).axes[0]
        bars = axes.patches
        assert axes.get_xlim()[0] < 1, "areas are drawn from 0 on, so that those of one nucleus have a scale"
        assert sum(bar.get_height() for bar in bars) == len(areas)


def test_a_file_that_is_no_image_is_refused(checkpoint, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match=r"a\.png"):
        predict_image(Predictor(checkpoint, "cpu"), tmp_path / "a.png", tmp_path / "out", 0.5, 30)


def test_wrong_requests(tmp_path, capsys):
    for argv, words in (([str(tmp_path / "none.pth")], "none.pth"), (["a.pth", "--port", "70000"], "at most 65535")):
        assert command.main(argv) == 2
        assert words in capsys.readouterr().err


def test_without_gradio_it_is_said_what_to_install(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command.main([str(checkpoint), "--device", "cpu"]) == 2
    assert "pip install -r requirements-demo.txt" in capsys.readouterr().err


@pytest.mark.skipif(not (GRADIO and CHROMIUM), reason="needs gradio and Chromium")
def test_an_image_is_dropped_in_a_browser(checkpoint, image, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    expected = prediction_of(checkpoint, image, tmp_path / "expected")
    server = subprocess.Popen([sys.executable, "-m", "demo", str(checkpoint), "--port", str(port), "--device", "cpu"],
                              cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env=os.environ | {"PYTHONUNBUFFERED": "1", "no_proxy": "127.0.0.1"})
    try:
        assert any(f"open http://127.0.0.1:{port}" in line for line in server.stdout)
        with Browser(tmp_path) as browser:
            browser.open(f"http://127.0.0.1:{port}")
            browser.wait_for("!!document.querySelector('#image input[type=file]')")
            browser.choose_file("#image input[type=file]", image)
            found = browser.wait_for("document.querySelector('#found textarea')?.value")
            links = browser.wait_for("(a => a.length == 3 && a)([...document.querySelectorAll('#downloads a')]"
                                     ".map(link => link.href))")
            shown = browser.wait_for("(n => n >= 2 && n)([...document.images].filter(i => i.naturalWidth == 70)"
                                     ".length)")
            browser.run("document.querySelector('#image button[aria-label=Clear]').click()")
            browser.wait_for("document.querySelector('#found textarea')?.value == ''")
            (tmp_path / "b.png").write_text("no image")
            browser.wait_for("!!document.querySelector('#image input[type=file]')")
            browser.choose_file("#image input[type=file]", tmp_path / "b.png")
            browser.wait_for("document.body.innerText.includes('b.png: ')")
    finally:
        server.terminate()
        server.wait()
    count = len((expected / "nuclei.csv").read_text().splitlines()) - 1
    assert shown == 2
    assert count
    assert found.startswith(f"field.png, 90x70: {of(count, 'nucleus', 'nuclei')}, ")
    assert not browser.errors
    assert {url for url in browser.requested if not url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:"))} \
        == set(), "nothing comes from elsewhere"
    assert any("field_nuclei.geojson" in link for link in links)
