"""Tests of what the network is taught: the rims of nuclei beside their mask, from the files to the separated nuclei.

    python -m pytest tests/test_targets.py
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_papsmear
import predict_papsmear
import train_papsmear
from checkpoints import load_checkpoint, save_checkpoint
from conftest import TINY, words, write_checkpoint, write_data_set
from images.augmentation import MAX_STAIN, augment, sample_numbers
from images.files import save_instances, save_png
from images.pairs import Pair
from images.pyramid import open_pyramids
from images.recipe import MASK_AND_BOUNDARY, DataRecipe
from images.targets import load_target, rims
from inference import Predictor
from pap_smear_dataset import PapSmearDataset, create_progressive_dataloaders
from system.errors import UserError
from training.means import PassMeasures
from unet import ProgressiveUNet


def two_touching_squares(side: int = 40) -> np.ndarray:
    """Draw two nuclei of 10 rows and columns side by side."""
    labels = np.zeros((side, side), np.int32)
    labels[10:20, 10:20], labels[10:20, 20:30] = 1, 2
    return labels


def test_rims_are_two_pixels_wide_and_run_between_touching_nuclei():
    labels = two_touching_squares()
    rim = rims(labels, 2)
    expected = labels > 0
    expected[12:18, 12:18] = expected[12:18, 22:28] = False
    assert np.array_equal(rim, expected)
    assert not rims(np.zeros((8, 8), int), 2).any()


def test_the_edge_of_the_image_is_no_rim():
    labels = np.zeros((20, 20), np.int32)
    labels[0:10, 0:10] = 1
    rim = rims(labels, 2)
    assert not rim[:8, :8].any(), "the nucleus goes on beyond the image"
    assert rim[8:10, :10].all()
    assert rim[:10, 8:10].all()


def test_instances_make_the_rim_where_there_are_any_and_the_mask_else(tmp_path):
    labels = two_touching_squares()
    for kind in ("images", "masks", "instances"):
        (tmp_path / kind).mkdir()
    pair = Pair(tmp_path / "images/a.png", tmp_path / "masks/a.png")
    save_png(pair.mask, labels > 0)
    apart, together = (15, 20), (15, 15)
    target = load_target(pair, 1, MASK_AND_BOUNDARY)
    assert target.shape == (40, 40, 2)
    assert np.array_equal(target[..., 0], labels > 0)
    assert not target[(*apart, 1)], "one part of the mask is one nucleus"
    save_instances(tmp_path / "instances/a.png", labels)
    target = load_target(pair, 1, MASK_AND_BOUNDARY)
    assert target[(*apart, 1)]
    assert not target[(*together, 1)]
    assert load_target(pair, 1).shape == (40, 40, 1)


def test_rims_are_as_wide_at_256_whatever_the_size_of_the_file(tmp_path):
    shares = []
    for side in (256, 1024):
        root = write_data_set(tmp_path / str(side), (1, 1, 1), side)
        pyramid = open_pyramids(root, targets=MASK_AND_BOUNDARY)["train"]
        _, target = pyramid.batch(256, np.arange(1))
        assert target.shape == (1, 2, 256, 256)
        assert pyramid.foreground.shape == (1, 1), "the rim is no class"
        shares.append(float(target[0, 1].float().mean() / target[0, 0].float().mean()))
    assert shares[0] == pytest.approx(shares[1], rel=0.1)


def test_a_sample_has_the_rim_as_its_last_channel(data_root):
    dataset = PapSmearDataset(data_root, "train", 64, targets=MASK_AND_BOUNDARY)
    mask = dataset[0]["mask"]
    assert mask.shape == (2, 64, 64)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert mask[1].sum() > 0
    assert (mask[1] <= mask[0]).all(), "a rim lies inside its nucleus"


def test_only_classes_are_scored(data_root, tmp_path):
    """A network that finds every rim and no nucleus has Dice 0."""
    loader = create_progressive_dataloaders(data_root, targets=MASK_AND_BOUNDARY, augment_probability=0)[32][0]
    logits = torch.stack([torch.full((1, 32, 32), -9.0), torch.full((1, 32, 32), 9.0)], dim=1)
    mask = next(iter(loader))["mask"][:1]
    values = PassMeasures(0.5, loader.recipe.classes).compare(logits, mask)
    assert values["dice"].shape == (1, 1)
    assert values["dice"].item() == 0


def test_the_boundary_of_a_checkpoint_parts_nuclei_that_touch(tmp_path):
    model = ProgressiveUNet(out_channels=2, base_channels=4)
    path = write_checkpoint(tmp_path / "a.pth", model, targets=MASK_AND_BOUNDARY)
    predictor = Predictor(path, "cpu")
    assert (predictor.classes, predictor.recipe.target_channels) == (1, 2)
    labels = np.zeros((40, 40), np.int32)
    labels[10:22, 5:18], labels[10:22, 18:31] = 1, 2  # a bar without a waist: its shape tells nothing
    probability = np.stack([labels > 0, rims(labels, 2)], axis=-1).astype(np.float32)
    nuclei = predictor.nuclei(probability)
    assert nuclei.max() == 2
    assert np.array_equal(nuclei > 0, labels > 0), "rims are part of their nuclei"
    assert (nuclei == nuclei[12, 10])[10:22, 5:17].all()
    predictor.recipe = replace(predictor.recipe, targets=("mask",))
    assert predictor.nuclei(probability).max() == 1


def test_a_checkpoint_of_an_older_format_is_refused_with_a_reason(tmp_path):
    path = write_checkpoint(tmp_path / "a.pth", ProgressiveUNet(base_channels=4))
    stored = torch.load(path, weights_only=True)
    recipe = stored.pop("data")
    for older in ({"format": 1, "sizing": "resize", "targets": ["mask"], "usual": {}}, {"format": 2, "data": recipe}):
        torch.save(stored | older, tmp_path / "old.pth")
        with pytest.raises(UserError, match=rf"checkpoint format {older['format']}; this version reads 3, because"):
            load_checkpoint(tmp_path / "old.pth")
    torch.save(stored | {"data": recipe | {"colours": 3}}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd.pth: its data recipe has .*colours"):
        load_checkpoint(tmp_path / "odd.pth")
    with pytest.raises(AssertionError):
        save_checkpoint(tmp_path / "new.pth", stored | {"data": DataRecipe(), "extra": 1})


def test_training_evaluation_and_prediction_with_a_boundary(shared_root, tmp_path, capsys):
    assert train_papsmear.main(words("--data_root", shared_root, "--output_dir", tmp_path, "--experiment_name",
                      "rims", *TINY, "--targets", "mask,boundary")) == 0, capsys.readouterr().err
    path = tmp_path / "rims/best_stage_4.pth"
    checkpoint = load_checkpoint(path)
    assert checkpoint["data"].targets == ("mask", "boundary")
    assert checkpoint["model_args"]["out_channels"] == 2
    assert checkpoint["data"].training_ranges["brightness"][0] < checkpoint["data"].training_ranges["brightness"][1]
    assert evaluate_papsmear.main(words(path, "--data_root", shared_root, "--instances")) == 0, capsys.readouterr().err
    assert "dice_1" not in capsys.readouterr().out, "one class"
    assert predict_papsmear.main(words(path, shared_root / "test/images", "--out", tmp_path / "out",
                      "--probability")) == 0, capsys.readouterr().err
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"test_0_mask.png", "test_0_probability.png", "test_0_instances.png"} <= names
    assert train_papsmear.main(words("--resume", tmp_path / "rims")) == 0, capsys.readouterr().err


def test_resuming_a_run_that_knew_fewer_options(trained_run, tmp_path, capsys):
    path = shutil.copytree(trained_run[0], tmp_path / "old") / "last.pth"
    checkpoint = load_checkpoint(path)
    del checkpoint["config"]["targets"]
    save_checkpoint(path, checkpoint)
    assert train_papsmear.main(words("--resume", tmp_path / "old")) == 0, capsys.readouterr().err


def test_an_unknown_target_is_refused(capsys):
    assert train_papsmear.main(words("--targets", "edges")) == 2
    assert "'edges' is neither mask nor mask,boundary" in capsys.readouterr().err


def test_stain_augmentation_scales_optical_density_and_keeps_white_white():
    image = torch.full((64, 3, 4, 4), 0.5)
    image[:, :, 0] = 1.0
    numbers = sample_numbers(0, 32, 0, np.arange(64))
    numbers[:, :12] = 1.0  # nothing but the stain
    changed, _ = augment(image, torch.zeros(64, 1, 4, 4), numbers, 0.5)
    applied = numbers[:, 12] < 0.5
    assert 16 < applied.sum() < 48
    assert torch.equal(changed[~applied], image[~applied])
    assert (changed[:, :, 0] == 1).all()
    density = torch.log(changed[applied][:, :, 1]) / np.log(0.5)
    assert ((density >= 1 - MAX_STAIN - 1e-6) & (density <= 1 + MAX_STAIN + 1e-6)).all()
    assert (density.std(dim=1) > 0).any(), "each channel has its own"
    grey, _ = augment(image[:, :1], torch.zeros(64, 1, 4, 4), numbers, 0.5)
    assert torch.equal(grey, image[:, :1]), "luminance has no stain"


def test_strength_is_a_factor_on_what_augmentation_does():
    image = torch.full((64, 3, 4, 4), 0.5)
    numbers = sample_numbers(0, 32, 0, np.arange(64))
    numbers[:, :12] = 1.0  # nothing but the stain
    once, twice, none = (augment(image, image, numbers, 0.5, strength)[0] for strength in (1.0, 2.0, 0.0))
    assert torch.equal(none, image)
    assert torch.allclose(torch.log(twice / 0.5), 2 * torch.log(once / 0.5), atol=1e-5), "of the optical density"
    numbers[:, :5], numbers[:, 12] = 0.0, 1.0  # all but the stain
    picture = torch.rand(64, 1, 32, 32)
    flipped, _ = augment(picture, picture, numbers, 0.5, 0.0)
    assert torch.allclose(flipped.flatten(1).sort().values, picture.flatten(1).sort().values, atol=1e-5), "turned alone"


def test_an_instance_map_of_another_size_is_named(data_root):
    (data_root / "train/instances").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(data_root / "train/instances/train_0.png")
    with pytest.raises(ValueError, match=r"instances/train_0.png: 8x8 pixels, but the mask"):
        open_pyramids(data_root, targets=MASK_AND_BOUNDARY)
