"""Tests of the loop of prediction, correction and training again, and of the experiment that measures it.

    python -m pytest tests/test_correction.py
"""

import numpy as np
import pytest
from PIL import Image

import predict_papsmear
import prepare_data
from benchmarks import correction
from conftest import lively_model, noisy_image, read_rows, words, write_checkpoint
from images.files import save_png
from images.masks import load_instances
from images.splits import list_splits


@pytest.mark.parametrize(("written", "kind"), [("png", "label-tiff"), ("label-tiff", "label-tiff"),
                                               ("png,geojson", "geojson")])
def test_predictions_come_back_as_labels_of_a_data_set(written, kind, tmp_path):
    """What was predicted, uncorrected, is what the data set holds, nucleus by nucleus."""
    (tmp_path / "in").mkdir()
    for i in range(6):
        save_png(tmp_path / f"in/{i}.png", noisy_image(80, 90, seed=i))
    checkpoint = write_checkpoint(tmp_path / "a.pth", lively_model())
    assert predict_papsmear.main(words(checkpoint, tmp_path / "in", "--out", tmp_path / "predicted", "--format",
                                       written, "--threshold", "0.55", "--min_area", "5", "--min_probability", "0",
                                       "--device", "cpu")) == 0
    assert not prepare_data.main(words("drawn", "--format", kind, "--images", tmp_path / "in", "--annotations",
                                       tmp_path / "predicted", "--out", tmp_path / "data", "--sizing", "resize"))
    pairs = [pair for split in list_splits(tmp_path / "data").values() for pair in split]
    assert len(pairs) == 6
    for pair in pairs:
        file = f"{pair.name}_labels.tif" if written == "label-tiff" else f"{pair.name}_instances.png"
        predicted = load_instances(tmp_path / "predicted" / file)
        prepared = load_instances(pair.image.parent.parent / "instances" / f"{pair.name}.png")
        assert predicted.max() == prepared.max() > 0
        joint = np.unique(np.stack([predicted.ravel(), prepared.ravel()]), axis=1)
        assert joint.shape[1] == predicted.max() + 1, "each nucleus is one nucleus"


def test_corrections_are_measured_in_both_orders(shared_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(correction, "EPOCHS", (1, 1, 1, 1))
    command = words("--data_root", shared_root, "--start", "3", "--images", "3", "--steps", "1", "--seeds", "1",
                    "--base_channels", "2", "--out", tmp_path / "out")
    assert correction.main(command) == 0, capsys.readouterr().err
    rows = read_rows(tmp_path / "out/correction.csv")
    assert [(row["corrected"], row["order"]) for row in rows] == [(str(count), order) for count in (0, 1, 3)
                                                                  for order in correction.ORDERS]
    assert rows[0]["dice"] == rows[1]["dice"], "nothing is corrected"
    assert rows[4]["dice"] == rows[5]["dice"], "all is"
    with Image.open(tmp_path / "out/correction.png") as image:
        assert min(image.size) > 300
    assert correction.main(command) == 2
    assert "nothing is overwritten unasked" in capsys.readouterr().err
    assert correction.main([*command[:-1], str(tmp_path / "b"), "--images", "30"]) == 2
    assert "which are too few. Ask for fewer" in capsys.readouterr().err
