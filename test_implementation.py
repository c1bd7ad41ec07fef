"""Tests of every component on values known by construction.

    python -m pytest test_implementation.py
    python test_implementation.py
"""

import csv
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import FIELDS, load_model
from conftest import (
    PROJECT,
    at_growth,
    disc,
    draw_pair,
    make_trainer,
    metric_rows,
    run_script,
    tensors_equal,
    write_checkpoint,
    write_data_set,
)
from images.augmentation import augment, sample_numbers
from images.files import load_image
from images.masks import load_mask
from images.pyramid import ImagePyramid
from images.recipe import DataRecipe
from images.splits import list_splits
from inference import Predictor
from pap_smear_dataset import PapSmearDataset, create_progressive_dataloaders
from preparation.sample import make_field
from progressive_trainer import ProgressiveTrainer
from scoring.measures import pixel_metrics
from scoring.scores import score_otsu, score_pairs, scored_pairs, summarise
from system.errors import NonFiniteLossError
from training.loss import bce_dice_loss, multi_scale_loss
from training.means import MeanOverImages
from unet import STAGE_RESOLUTIONS, ProgressiveUNet, UNet, build_model
from unet_parts import mean2x2, upsample2x

# ---- network


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_growth_preserves_the_function(in_channels, stage, size, training):
    """With trained weights and two classes, also where batch normalisation takes the statistics of the batch."""
    model = at_growth(stage, in_channels).train(training)
    x = torch.rand(2, in_channels, *size)
    with torch.no_grad():
        before = upsample2x(model(mean2x2(x)))
        model.set_stage(stage + 1)
        assert before.std() > 0.05
        assert (model(x) - before).abs().max() < 5e-6, "round-off of float32"
        torch.nn.init.normal_(model.encoder[str(model.resolution // 2)].from_finer.weight, std=0.1)
        assert (model(x) - before).abs().max() > 1e-3, "the new level counts, so the equality above says something"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_growth_preserves_the_function_in_bfloat16(stage):
    model = at_growth(stage, 3)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = upsample2x(model(mean2x2(x)))
        model.set_stage(stage + 1)
        assert (model(x) - before).abs().max() < 0.02 * before.abs().max(), "some units of 2^-8"


def test_what_a_growth_adds_starts_at_zero():
    model = ProgressiveUNet(base_channels=2)
    assert all(not model.encoder[str(r)].from_finer.weight.any() for r in (32, 64, 128))
    assert model.encoder["16"][1][0].weight.any()
    assert all(not model.heads[str(r)].linear.weight.any() for r in (64, 128, 256))
    assert model.heads["32"].linear.weight.any()


def test_stages_change_no_weight_and_what_is_new_is_as_designed():
    model = ProgressiveUNet(base_channels=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    live = {}
    for stage in (1, 2, 3, 4, 2, 4, 1):
        model.set_stage(stage)
        live[stage] = set(model.live_parts())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for stage, r in list(STAGE_RESOLUTIONS.items())[1:]:
        assert live[stage] - live[stage - 1] == {
            f"encoder.{r}.from_image", f"encoder.{r}.norm", f"encoder.{r}.refine", f"encoder.{r // 2}.from_finer",
            f"decoder.{r}", f"heads.{r}"}
        assert not live[stage - 1] - live[stage], "what is born lives for ever"


def test_only_live_parts_learn():
    model = ProgressiveUNet(base_channels=2)
    model.set_stage(3)
    model(torch.rand(2, 1, 32, 32), return_all_scales=True)[-1].sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters()
                             if name.startswith(tuple(f"{part}." for part in model.live_parts()))}


@pytest.mark.parametrize("model", [ProgressiveUNet(3, 2, 2), UNet(3, 2, 2)], ids=["pgunet", "unet"])
def test_every_network_keeps_the_contract(model, tmp_path):
    for stage in range(model.stage, 5):
        model.set_stage(stage)
        x = torch.rand(1, 3, 32, 48)
        scales = model(x, return_all_scales=True)
        assert scales[-1].shape == (1, 2, 32, 48)
        assert torch.allclose(model.eval()(x), model(x, return_all_scales=True)[-1])
        model.train()
    assert model(x).dtype == torch.float32
    rebuilt = build_model(model.model_args)
    rebuilt.set_stage(4)
    assert rebuilt.transfer_weights(model.live_state())[1:] == ([], [])
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        model(torch.rand(1, 1, 32, 32))


def test_all_scales_of_stage_4():
    model = ProgressiveUNet(base_channels=2)
    model.set_stage(4)
    assert [s.shape[-1] for s in model(torch.rand(2, 1, 256, 256), return_all_scales=True)] == [32, 64, 128, 256]


# ---- loss and metrics


def test_loss_values_worked_out_by_hand():
    target = torch.zeros(1, 1, 4, 4)
    target[..., :2] = 1  # 8 of 16 pixels
    # probability 1/2 everywhere: cross entropy ln 2; Dice (2 * 4 + 1) / (8 + 8 + 1)
    expected = math.log(2) + 1 - 9 / 17
    assert bce_dice_loss(torch.zeros(1, 1, 4, 4), target).item() == pytest.approx(expected, abs=1e-6)
    coarse = torch.zeros(1, 1, 2, 2)  # area fractions 1, 0: 2 of 4; Dice (2 * 1 + 1) / (2 + 2 + 1)
    both = multi_scale_loss([coarse, torch.zeros(1, 1, 4, 4)], target).item()
    assert both == pytest.approx(expected + 0.5 * (math.log(2) + 1 - 3 / 5), abs=1e-6)
    perfect = multi_scale_loss([40 * (target * 2 - 1)], target).item()
    assert perfect == pytest.approx(0, abs=1e-6)


def test_metrics_of_drawn_rectangles():
    mask, found = torch.zeros(2, 1, 2, 10, 10, dtype=torch.bool).unbind(0)
    mask = mask.expand(1, 2, 10, 10).clone()
    found = mask.clone()
    mask[0, 0, :5] = True            # 50 pixels
    found[0, 0, 3:7] = True          # 40 pixels, 20 in common
    values = {k: v[0, 0].item() for k, v in pixel_metrics(found, mask).items()}
    assert values == pytest.approx({"dice": 40 / 90, "iou": 20 / 70, "precision": 0.5, "recall": 0.4, "accuracy": 0.5})
    assert all(v[0, 1] == 1 for v in pixel_metrics(found, mask).values()), "both empty is 1"
    found[0, 1, 0, 0] = True
    one_empty = {k: v[0, 1].item() for k, v in pixel_metrics(found, mask).items()}
    assert one_empty == pytest.approx({"dice": 0, "iou": 0, "precision": 0, "recall": 0, "accuracy": 0.99})


def test_means_are_over_images_not_batches():
    means = MeanOverImages()
    means.add({"dice": torch.tensor([[1.0], [1.0], [1.0]])})
    means.add({"dice": torch.tensor([[0.0]])})
    assert means.means()["dice"] == 0.75
    assert means.images == 4


# ---- images and masks


def test_masks_that_are_accepted(tmp_path):
    drawn = disc()
    level = drawn.astype(np.uint8)
    for name, picture in {"255.png": Image.fromarray(level * 255), "one.png": Image.fromarray(level),
                          "bool.png": Image.fromarray(drawn), "rgb.png": Image.fromarray(level * 255).convert("RGB"),
                          "16.png": Image.fromarray(level.astype(np.uint16) * 65535),
                          "16low.tif": Image.fromarray(level.astype(np.uint16) * 255),
                          "empty.png": Image.fromarray(level * 0), "full.png": Image.fromarray(level * 0 + 255),
                          "lossy.jpg": Image.fromarray(level * 255).convert("RGB")}.items():
        picture.save(tmp_path / name)
        expected = {"empty.png": drawn & False, "full.png": drawn | True}.get(name, drawn)
        found = load_mask(tmp_path / name)
        assert found.shape == (64, 64, 1)
        assert found.dtype == bool
        assert (found[..., 0] != expected).mean() < (0.01 if name.endswith("jpg") else 1e-9), name
    large = Image.fromarray(disc(256, 80).astype(np.uint8) * 255)
    large.resize((64, 64), Image.Resampling.BOX).save(tmp_path / "smooth.png")
    assert (load_mask(tmp_path / "smooth.png")[..., 0] != disc(64, 20)).mean() < 0.005


# ---- augmentation


def test_augmentation_moves_image_and_mask_alike():
    rng = np.random.default_rng(0)
    picture = torch.from_numpy(np.stack([draw_pair(rng)[1] for _ in range(12)]))[:, None].float()
    numbers = sample_numbers(0, 64, 0, np.arange(12))
    numbers[:, 4] = 0.99  # no change of light, so that image and mask stay comparable
    image, mask = augment(picture, picture, numbers, 0.9)
    assert torch.equal(image, mask)
    assert (image != picture).flatten(1).any(1).sum() >= 11
    assert (mask.sum((1, 2, 3)) / picture.sum((1, 2, 3))).sub(1).abs().max() < 0.35, "nothing is lost"
    unchanged = augment(picture, picture, numbers, 0.0)
    assert torch.equal(unchanged[0], picture)


# ---- data set


def test_samples_keep_the_contract(shared_root):
    dataset = PapSmearDataset(data_root=shared_root, split="train", target_size=256, use_augmented=True,
                              augment_probability=0.3)
    sample = dataset[0]
    assert sample["image"].shape == sample["mask"].shape == (1, 256, 256)
    assert sample["image"].dtype == sample["mask"].dtype == torch.float32
    assert set(sample["mask"].unique().tolist()) <= {0.0, 1.0}
    assert 0 <= sample["image"].min() <= sample["image"].max() <= 1
    assert sample["name"] == "train_0"
    dataset.update_target_size(128)
    assert dataset[-1]["image"].shape == (1, 128, 128)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    with pytest.raises(ValueError, match="32, 64, 128, 256"):
        dataset.update_target_size(100)


def test_loaders_share_one_decoded_copy(shared_root):
    loaders = create_progressive_dataloaders(shared_root)
    assert len({id(row[0].dataset.pyramid) for row in loaders.values()}) == 1
    assert [row[0].batch_size for row in loaders.values()] == [64, 32, 16, 8]
    with pytest.raises(ValueError, match="batch_sizes"):
        create_progressive_dataloaders(shared_root, {48: 2})


# ---- schedule


# ---- trainer


def test_fit_loop_and_resumed_run_reach_the_same_weights(shared_root, tmp_path):
    options = {"average": 0.8, "accumulate": 2, "epochs_per_stage": [1, 3, 1, 1]}
    trainer, loaders = make_trainer(shared_root, tmp_path / "fit", **options)
    trainer.fit(loaders, say=lambda line: None)

    loop, loaders = make_trainer(shared_root, tmp_path / "loop", **options)
    finished = 0
    for stage, resolution in STAGE_RESOLUTIONS.items():
        loop.set_stage(stage)
        for epoch in range(loop.plan.epochs[stage]):
            loop.record(loop.train_epoch(loaders[resolution][0], epoch),
                        loop.validate_epoch(loaders[resolution][1], epoch))
            finished += 1
            if finished == 2:
                shutil.copytree(tmp_path / "loop", tmp_path / "cut")
    assert tensors_equal(trainer.model, loop.model)

    # Cut in stage 2, as if the process had died after logging one more epoch; another seed for what is unborn.
    last_row = (tmp_path / "loop/metrics.csv").read_text().splitlines()[-1]
    with open(tmp_path / "cut/metrics.csv", "a") as file:
        file.write(last_row + "\n")
    resumed, loaders = make_trainer(shared_root, tmp_path / "cut", seed=5, **options)
    resumed.resume(tmp_path / "cut/last.pth")
    resumed.fit(loaders, say=lambda line: None)
    assert tensors_equal(trainer.model, resumed.model)
    assert tensors_equal(trainer.evaluated_model, resumed.evaluated_model)
    assert metric_rows(tmp_path / "fit") == metric_rows(tmp_path / "loop") == metric_rows(tmp_path / "cut")
    assert len(metric_rows(tmp_path / "fit")) == 6
    with pytest.raises(ValueError, match="run folder exists already"):
        make_trainer(shared_root, tmp_path / "fit")[0].fit(loaders)
    with pytest.raises(ValueError, match="Resume from last.pth"):
        resumed.resume(tmp_path / "fit/best_stage_2.pth")


def test_the_loop_writes_nothing_without_a_folder(shared_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, loaders = make_trainer(shared_root)
    train = trainer.train_epoch(loaders[32][0], 0)
    valid = trainer.validate_epoch(loaders[32][1], 0)
    assert list(tmp_path.iterdir()) == []
    assert {"loss", "soft_dice", "dice", "iou", "accuracy", "precision", "recall"} <= set(train) & set(valid)
    assert {"empty_masks", "foreground"} <= set(valid)
    assert torch.allclose(trainer.model.image_mean, torch.tensor(
        loaders[32][0].recipe.mean, dtype=torch.float32))


def test_non_finite_loss_stops_with_the_place(shared_root):
    trainer, loaders = make_trainer(shared_root)
    trainer.train_epoch(loaders[32][0], 0)
    batches = [dict(batch) for batch in loaders[32][0]]
    batches[1]["image"] = batches[1]["image"] * math.nan
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train_epoch(batches, 1)
    assert "stage 1, epoch 2, batch 2" in str(caught.value)
    assert all(name in str(caught.value) for name in batches[1]["name"])
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    with torch.no_grad():
        trainer.model.heads["32"].linear.bias.fill_(math.inf)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match="as loss at stage 1"):
        trainer.train_epoch(loaders[32][0], 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items()), \
        "neither weights nor running statistics"
    with pytest.raises(NonFiniteLossError, match="as validation loss at stage 1"):
        trainer.validate_epoch(loaders[32][1], 1)


# ---- checkpoints and scores


def test_a_checkpoint_is_plain_and_whole(trained_run):
    folder, _ = trained_run
    for stage, r in STAGE_RESOLUTIONS.items():
        checkpoint = torch.load(folder / f"best_stage_{stage}.pth", weights_only=True)
        assert set(checkpoint) == set(FIELDS)
        assert (checkpoint["stage"], checkpoint["data"]["sizing"]) == (stage, "resize")
        assert checkpoint["data"]["mean"] == tuple(checkpoint["model"]["image_mean"].tolist())
        assert f"decoder.{r}.conv.0.0.weight" in checkpoint["model"]
        names = checkpoint["model"]
        assert not any(f".{2 * r}." in name or name.startswith(("module.", "_orig_mod.")) for name in names)
        model = load_model(folder / f"best_stage_{stage}.pth")
        assert model.stage == stage
        assert not model.training
        assert torch.equal(model.state_dict()["image_mean"], checkpoint["model"]["image_mean"])


class KnownLogits(torch.nn.Module):
    """Find what is darker than half: right on drawn discs; with a large shift find nothing."""

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.shift = shift

    def forward(self, x, return_all_scales=False, scale=None):
        logits = 20 * (0.5 - self.shift - x)
        return [logits] if return_all_scales else logits


def test_scores_are_at_the_original_size(tmp_path):
    root = write_data_set(tmp_path / "data", counts=(1, 1, 3), side=100)
    pairs = scored_pairs(root, "test")
    model = ProgressiveUNet(base_channels=1)
    model.set_stage(4)
    predictor = Predictor(write_checkpoint(tmp_path / "a.pth", model), "cpu", "float32")
    predictor.models = [KnownLogits()]
    rows = score_pairs(predictor, pairs)
    assert [(row["height"], row["width"]) for row in rows] == [(100, 100)] * 3
    assert min(row["dice"] for row in rows) > 0.97
    assert min(row["boundary_f1"] for row in rows) == 1
    assert summarise(rows)["dice"]["mean"] == pytest.approx(np.mean([row["dice"] for row in rows]))
    assert min(row["dice"] for row in score_otsu(pairs, 1)) > 0.99, "Otsu solves discs"
    predictor.models = [KnownLogits(shift=99)]
    silent = score_pairs(predictor, pairs)[0]
    assert (silent["dice"], silent["foreground"]) == (0, 0)
    assert silent["highest"] < 1e-6


# ---- command line


def test_a_run_leaves_the_documented_tree(trained_run, shared_root):
    folder, printed = trained_run
    assert {p.name for p in folder.iterdir()} == {
        ".lock", "previous.pth",
        "config.json", "logs", "metrics.csv", "best_stage_1.pth", "best_stage_2.pth", "best_stage_3.pth",
        "best_stage_4.pth", "final_model.pth", "last.pth", "training_curves.png", "predictions_stage_1.png",
        "predictions_stage_2.png", "predictions_stage_3.png", "predictions_stage_4.png", "test_scores.csv",
        "test_scores.json", "report.html", "test_cases.npz", "validation_stage_1.npz", "validation_stage_2.npz",
        "validation_stage_3.npz", "validation_stage_4.npz"}
    config = json.loads((folder / "config.json").read_text())
    assert config["base_channels"] == 4
    assert config["resolved"]["precision"] in ("float32", "bfloat16")
    assert config["resolved"]["batch_sizes"] == {"32": 4, "64": 4, "128": 4, "256": 4}
    assert config["environment"]["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [row["stage"] for row in metric_rows(folder)] == ["1", "2", "3", "4"]
    with open(folder / "test_scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = json.loads((folder / "test_scores.json").read_text())
    assert len(rows) == 3
    assert scores["best_stage_4"]["dice"]["mean"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]))
    assert f"test Dice {scores['best_stage_4']['dice']['mean']:.4f}" in printed
    assert "Otsu threshold" in printed
    assert printed.count("epoch 1/1") == 4
    for name in ("training_curves.png", "predictions_stage_4.png"):
        assert load_image(folder / name, 3).std() > 10
    assert {path.parent.name for path in (folder / "logs").glob("*/events*")} == {
        "train", "valid", "growths", "scores"}
    again = score_pairs(Predictor(folder / "best_stage_4.pth", "cpu"), scored_pairs(shared_root, "test"))
    assert again[0]["dice"] == pytest.approx(float(rows[0]["dice"]), abs=1e-6)


# ---- what the design and the README promise


def test_the_blocks_of_the_design_run(shared_root, monkeypatch, tmp_path):
    """The public lines as written, with smaller channels, one epoch and the device that is there."""
    shutil.copytree(shared_root, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    model = ProgressiveUNet(in_channels=1, out_channels=1, base_channels=2)
    trainer = ProgressiveTrainer(model=model, device="cuda" if torch.cuda.is_available() else "cpu")
    dataloaders = create_progressive_dataloaders(data_root="data", batch_sizes={32: 64, 64: 32, 128: 16, 256: 8})
    for stage in [1, 2, 3, 4]:
        resolution = [32, 64, 128, 256][stage - 1]
        train_loader, valid_loader, _ = dataloaders[resolution]
        trainer.set_stage(stage)
        for epoch in range(1):
            train_metrics = trainer.train_epoch(train_loader, epoch)
            val_metrics = trainer.validate_epoch(valid_loader, epoch)
        assert {"loss", "dice", "iou", "accuracy"} <= set(train_metrics) & set(val_metrics)
    dataset = PapSmearDataset(data_root="data", split="train", target_size=256, use_augmented=True,
                              augment_probability=0.3)
    sample = dataset[0]
    dataset.update_target_size(128)
    model.set_stage(4)
    outputs = model(sample["image"][None].to(trainer.device), return_all_scales=True)
    assert [o.shape[-1] for o in outputs] == [32, 64, 128, 256]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_sample_data_is_what_the_generator_makes():
    splits = list_splits(PROJECT / "data")
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 64, "valid": 16, "test": 16}
    assert sum(p.stat().st_size for p in (PROJECT / "data").rglob("*") if p.is_file()) < 5e6
    image, mask = make_field(np.random.default_rng([0, 1, 3]))
    pair = splits["valid"][3]
    assert np.abs(load_image(pair.image, 1)[..., 0].astype(int) - image).mean() < 0.5
    assert (load_mask(pair.mask)[..., 0] != mask).mean() < 0.001
    pyramid = ImagePyramid(splits["test"], DataRecipe())
    assert pyramid.read_all() == []
    assert summarise(score_otsu(pyramid.pairs, 1))["dice"]["mean"] < 0.5, "thresholding must not solve it"


def test_example_runs(tmp_path):
    done = run_script("example_usage.py")
    assert done.returncode == 0, done.stderr
    assert "stage 4: train loss" in done.stdout


def test_metric_docstring_example_holds():
    import doctest

    from scoring import measures as metrics
    result = doctest.testmod(metrics)
    assert result.attempted >= 3
    assert result.failed == 0


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
