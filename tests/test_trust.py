"""Tests of the trust in a prediction: agreement between scales and views, from which images to look at first follow.

    python -m pytest tests/test_trust.py
"""

import json

import numpy as np
import pytest
import torch

import evaluate_papsmear
import predict_papsmear
from conftest import lively_model, noisy_image, read_rows, write_checkpoint
from images.files import save_png
from inference import Predictor
from nuclei.trust import Agreement
from scoring.scores import trust_in_dice
from unet import UNet


def test_agreement_of_drawn_answers():
    halves = torch.zeros(2, 1, 1, 4, 4)
    halves[0, ..., :2], halves[1, ..., 2:] = 1, 1
    left, right = halves
    for probability, mask, expected in ((left, left, 1.0), (left, right, 0.0), (left / 2, left, 2 / 3),
                                        (left + right / 2, left, 0.8)):
        agreement = Agreement()
        agreement.add("scales", 0, probability, mask > 0)
        assert agreement.trust() == pytest.approx(expected)
    parts, whole = Agreement(), Agreement()
    for rows in (slice(0, 1), slice(1, 4)):
        parts.add("views", 0, left[..., rows, :] / 2, left[..., rows, :] > 0)
    whole.add("views", 0, left / 2, left > 0)
    assert parts.trust() == whole.trust()
    for number in range(2):
        whole.add("views", number + 1, left / 2, left > 0)
    whole.add("scales", 0, left, left > 0)
    assert whole.trust() == pytest.approx((2 / 3 + 1) / 2), "kinds count alike, however many answers each has"
    assert Agreement().trust() is None
    nothing = Agreement()
    nothing.add("views", 0, left / 4, left > 1)
    assert nothing.trust() is None, "where nothing is found, there is nothing to trust"
    nothing.add("views", 0, torch.cat([left / 4, left], dim=1)[:, 1:], left > 0)
    assert nothing.trust() == pytest.approx(2 * 8 / (2 + 8 + 8))


def trust_of(path, model, image, sizing="resize", **options) -> float | None:
    agreement = Agreement()
    predictor = Predictor(write_checkpoint(path, model, sizing), "cpu", "float32", **options)
    told = predictor.predict(image, agreement)
    assert np.array_equal(told, predictor.predict(image)), "to ask for trust changes nothing"
    return agreement.trust()


@pytest.mark.parametrize("sizing", ["resize", "tile"])
def test_trust_of_networks(sizing, tmp_path):
    image = noisy_image(90, 70)
    alone = trust_of(tmp_path / "b.pth", lively_model(), image, sizing)
    assert 0 < alone < 1
    turned = trust_of(tmp_path / "b.pth", lively_model(), image, sizing, augment=True)
    assert 0 < turned < 1
    assert turned != alone
    for model in (lively_model(1), lively_model(kind=UNet)):  # of one scale
        assert 0 < trust_of(tmp_path / "c.pth", model, image, sizing) < 1


def test_what_to_look_at_first(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(7):
        save_png(tmp_path / f"in/{i}.png", noisy_image(64, 64, seed=i))
    command = [str(write_checkpoint(tmp_path / "a.pth", lively_model())), str(tmp_path / "in"), "--device", "cpu"]
    assert predict_papsmear.main([*command, "--out", str(tmp_path / "out")]) == 0
    rows = sorted(read_rows(tmp_path / "out/images.csv"), key=lambda row: float(row["trust"]))
    named = ", ".join(f"{row['image']} {row['trust']}" for row in rows[:5])
    assert f"look at these first, in which the network agrees least with itself: {named}\n" in capsys.readouterr().out
    assert all(0 < float(row["trust"]) < 1 for row in rows)
    (tmp_path / "in/6.png").unlink()
    (tmp_path / "in/5.png").unlink()
    assert predict_papsmear.main([*command, "--out", str(tmp_path / "few")]) == 0
    assert "look at these first" not in capsys.readouterr().out, "five can be looked at all"


def test_trust_and_dice(shared_root, tmp_path, capsys):
    rows = [{"trust": trust, "dice": dice} for trust, dice in ((0.1, 0.2), (0.5, 0.6), (0.6, 0.5), (0.9, 0.8))]
    assert trust_in_dice(rows) == pytest.approx(0.8)
    assert trust_in_dice(rows[:2]) is None
    assert trust_in_dice([row | {"trust": 1} for row in rows]) is None
    checkpoint, out = write_checkpoint(tmp_path / "a.pth", lively_model()), tmp_path / "out"
    assert evaluate_papsmear.main([str(checkpoint), "--data_root", str(shared_root), "--out", str(out), "--device",
                                   "cpu", "--split", "train"]) == 0
    found = json.loads((out / "summary.json").read_text())["trust_spearman"]
    rows = [{name: float(row[name]) for name in ("trust", "dice")} for row in read_rows(out / "scores.csv")]
    assert found == trust_in_dice(rows)
    assert found is None or f"Spearman's correlation {found:.2f}" in capsys.readouterr().out
