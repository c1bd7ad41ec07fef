"""Tests of every component on values known by construction.

    python -m pytest test_implementation.py
    python test_implementation.py
"""

import csv
import dataclasses
import functools
import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import train_papsmear
from checkpoints import FIELDS, load_checkpoint, load_model, save_checkpoint
from conftest import PROJECT, TINY, draw_pair, run_script, write_checkpoint, write_data_set
from images.augmentation import MAX_STRENGTH, augment, sample_numbers
from images.cache import halve
from images.files import ImageFileError, image_size, load_image, load_mask, resize, save_png
from images.pyramid import ImagePyramid, open_pyramids
from images.recipe import DataRecipe
from images.report import check_dataset
from images.splits import DatasetError, leaked, list_splits, write_splits
from inference import Predictor
from pap_smear_dataset import PapSmearDataset, create_progressive_dataloaders
from preparation.sample import make_field
from progressive_trainer import ProgressiveTrainer
from scoring.measures import pixel_metrics
from scoring.scores import score_otsu, score_pairs, scored_pairs, summarise
from system.devices import choose_device, choose_precision
from system.errors import NonFiniteLossError, UserError
from system.options import command
from training import settings
from training.loss import bce_dice_loss, multi_scale_loss
from training.means import MeanOverImages
from training.memory import training_memory
from training.schedule import TrainingPlan, epochs_by_stage
from unet import STAGE_RESOLUTIONS, ProgressiveUNet, UNet, build_model, count_parameters
from unet_parts import mean2x2, upsample2x


def tensors_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def roughly_trained(in_channels: int, out_channels: int = 1, seed: int = 0) -> ProgressiveUNet:
    """A network whose weights, heads and running statistics are all away from their start."""
    torch.manual_seed(seed)
    model = ProgressiveUNet(in_channels, out_channels, base_channels=4)
    model.set_image_statistics([0.4] * in_channels, [0.2] * in_channels)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for stage in STAGE_RESOLUTIONS:
            model.set_stage(stage)
            for _ in range(3):
                model(torch.rand(2, in_channels, 32, 48))
    model.set_stage(1)
    return model.eval()


# ---- network


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_growth_preserves_the_function(in_channels, stage, size):
    model = roughly_trained(in_channels, out_channels=2)
    model.set_stage(stage)
    x = torch.rand(2, in_channels, *size)
    with torch.no_grad():
        before = upsample2x(model(mean2x2(x)))
        model.set_stage(stage + 1, alpha=0.0)
        new_head = model.heads[str(model.resolution)].conv
        torch.nn.init.zeros_(new_head.weight)
        torch.nn.init.zeros_(new_head.bias)
        assert before.std() > 0.01
        assert (model(x) - before).abs().max() < 1e-5
        model.set_stage(stage + 1, alpha=1.0)
        assert (model(x) - before).abs().max() > 1e-4, "alpha changes nothing, so alpha 0 proves nothing"


def test_growth_on_images_differs_by_their_rounding_alone(shared_root):
    pyramid = open_pyramids(shared_root, wanted=("valid",))["valid"]
    model = roughly_trained(1)
    everything = np.arange(len(pyramid))
    for stage in (1, 2, 3):
        coarse, fine = (pyramid.batch(STAGE_RESOLUTIONS[s], everything)[0].float() / 255 for s in (stage, stage + 1))
        assert (coarse - mean2x2(fine)).abs().max() <= 0.5 / 255 + 1e-6
        model.set_stage(stage)
        with torch.no_grad():
            rounding = (model(coarse) - model(mean2x2(fine))).abs().max()
            before = upsample2x(model(coarse))
            model.set_stage(stage + 1, alpha=0.0)
            model.heads[str(model.resolution)].conv.weight.zero_()
            model.heads[str(model.resolution)].conv.bias.zero_()
            assert (model(fine) - before).abs().max() <= rounding + 1e-5


def test_new_heads_start_at_zero():
    model = ProgressiveUNet(base_channels=2)
    assert all(not model.heads[str(r)].conv.weight.any() for r in (64, 128, 256))
    assert model.heads["32"].conv.weight.any()


def test_stages_change_no_weight_and_what_is_new_is_as_designed():
    model = ProgressiveUNet(base_channels=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    live = {}
    for stage in (1, 2, 3, 4, 2, 4, 1):
        model.set_stage(stage)
        live[stage] = set(model.live_parts())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for stage, r in list(STAGE_RESOLUTIONS.items())[1:]:
        assert live[stage] - live[stage - 1] == {f"encoder.{r}.from_image", f"encoder.{r}.refine",
                                                 f"encoder.{r // 2}.from_finer", f"decoder.{r}", f"heads.{r}"}
        assert live[stage - 1] - live[stage] == {f"encoder.{r // 2}.from_image"}


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


def test_size_error_gives_the_remedy():
    model = ProgressiveUNet(base_channels=2).eval()
    model.set_stage(4)
    x = torch.rand(1, 1, 259, 263)
    with pytest.raises(ValueError, match="multiples of 16") as caught:
        model(x)
    pad = re.search(r"torch\.nn\.functional\.pad\(x, .*?mode='replicate'\)", str(caught.value)).group()
    assert model(eval(pad))[..., :259, :263].shape == (1, 1, 259, 263)


def test_cost_and_size_are_those_of_the_design():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    with FakeTensorMode():  # shapes alone, nothing is computed
        model = ProgressiveUNet()
        for stage, expected in zip(STAGE_RESOLUTIONS, (40, 80, 120, 185), strict=True):
            model.set_stage(stage)
            with FlopCounterMode(display=False) as counter:
                model(torch.rand(1, 1, model.resolution, model.resolution)).sum().backward()
            assert counter.get_total_flops() / 1e9 == pytest.approx(expected, rel=0.01)
        assert count_parameters(UNet()) == pytest.approx(31.0e6, rel=0.01)


def test_transfer_is_by_full_name_and_shape():
    source = roughly_trained(1, seed=1)
    source.set_stage(2)
    model = ProgressiveUNet(1, 1, base_channels=4)
    model.set_stage(3)
    carried, new, left_out = model.transfer_weights(source.live_state())
    assert sorted(carried) == sorted(source.live_state())
    assert left_out == []
    assert "heads.128.conv.weight" in new
    assert all(name.startswith(("encoder.128.", "encoder.64.from_finer.", "decoder.128.", "heads.128."))
               for name in new)
    assert all(torch.equal(model.state_dict()[k], source.state_dict()[k]) for k in carried)
    wider = ProgressiveUNet(1, 1, base_channels=8)
    carried, _, left_out = wider.transfer_weights(source.live_state())
    assert set(carried) == {k for k, v in source.live_state().items() if wider.state_dict()[k].shape == v.shape}
    assert "encoder.32.refine.0.weight" in left_out


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


def test_dice_of_discs_matches_its_geometry():
    rows, columns = np.mgrid[:400, :400]
    a, b = (torch.from_numpy(np.hypot(rows - 200, columns - x) <= 80)[None, None] for x in (200, 280))
    overlap = 2 * 80 ** 2 * math.acos(0.5) - 80 / 2 * math.sqrt(4 * 80 ** 2 - 80 ** 2)  # lens of two equal circles
    assert pixel_metrics(a, b)["dice"].item() == pytest.approx(overlap / (math.pi * 80 ** 2), abs=0.005)


def test_means_are_over_images_not_batches():
    means = MeanOverImages()
    means.add({"dice": torch.tensor([[1.0], [1.0], [1.0]])})
    means.add({"dice": torch.tensor([[0.0]])})
    assert means.means()["dice"] == 0.75
    assert means.images == 4


# ---- images and masks


def test_images_of_all_modes_read_alike(tmp_path):
    grey = (np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    picture = Image.fromarray(grey)
    picture.save(tmp_path / "l.png")
    picture.convert("RGB").save(tmp_path / "rgb.bmp")
    picture.convert("RGBA").save(tmp_path / "rgba.png")
    picture.convert("LA").save(tmp_path / "la.png")
    picture.convert("P").save(tmp_path / "p.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.tif")
    picture.save(tmp_path / "lzw.tif", compression="tiff_lzw")
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "f.tif")
    for path in sorted(tmp_path.iterdir()):
        assert np.array_equal(load_image(path, 1)[..., 0], grey), path.name
        assert np.array_equal(load_image(path, 3), np.repeat(grey[..., None], 3, 2)), path.name
        assert image_size(path) == (8, 8)
    dim = (grey.astype(np.uint16) // 8)
    Image.fromarray(dim).save(tmp_path / "dim.png")
    assert load_image(tmp_path / "dim.png", 1).max() == 0, "16 bit is scaled by its type, not by its values"


def test_turned_photographs_are_read_upright(tmp_path):
    image = Image.fromarray(np.zeros((4, 10), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg", 1).shape == (10, 4, 1)
    assert image_size(tmp_path / "a.jpg") == (10, 4)


def disc(side=64, radius=20):
    rows, columns = np.mgrid[:side, :side] - side / 2 + 0.5
    return np.hypot(rows, columns) <= radius


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


@pytest.mark.parametrize(("array", "words"), [
    (disc().astype(np.uint8) + disc(64, 10), "label values {0, 1, 2}"),
    (disc().astype(np.uint8) * 2, "label values {0, 2}"),
    (disc().astype(np.uint8) * 128, "label values {0, 128}"),
    (disc().astype(np.uint8) * 128 + disc(64, 10) * np.uint8(127), "label values {0, 128, 255}"),
    (np.arange(64 * 64).reshape(64, 64).astype(np.uint16), "label values {0, 1, 2, 3, 4, 5, ...}"),
    (disc().astype(np.uint8) * 20, "label values {0, 20}"),
    (disc().astype(np.uint16) * 4095, "label values {0, 4095}"),
    (np.kron(np.arange(144).reshape(12, 12), np.ones((6, 6))).astype(np.uint8), "own number"),
    (np.kron(np.arange(256).reshape(16, 16), np.ones((6, 6))).astype(np.uint8), "own number"),
    ((np.arange(64 * 64).reshape(64, 64) // 16).astype(np.uint8), "grey"),
    (np.stack([disc() * np.uint8(255), disc() * np.uint8(0), disc() * np.uint8(0)], -1), "colour-coded"),
    (np.full((8, 8), 0.5, np.float32), "float32"),
])
def test_masks_that_are_refused(tmp_path, array, words):
    path = tmp_path / ("mask.tif" if array.dtype.kind == "f" else "mask.png")
    Image.fromarray(array).save(path)
    with pytest.raises(ImageFileError) as caught:
        load_mask(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_label_images_become_classes(tmp_path):
    save_png(tmp_path / "m.png", disc(64, 20).astype(np.uint8) + disc(64, 10))
    classes = load_mask(tmp_path / "m.png", classes=2)
    assert np.array_equal(classes[..., 1], disc(64, 10))
    assert np.array_equal(classes[..., 0], disc(64, 20) & ~disc(64, 10))
    coloured = Image.fromarray(disc(64, 20).astype(np.uint8) + disc(64, 10))
    coloured.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759)
    coloured.save(tmp_path / "palette.png")
    assert np.array_equal(load_mask(tmp_path / "palette.png", classes=2), classes)
    save_png(tmp_path / "m.png", disc().astype(np.uint8) * 3)
    with pytest.raises(ImageFileError, match="0..2"):
        load_mask(tmp_path / "m.png", classes=2)


def test_resizing_down_is_the_area_mean():
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 1), dtype=np.uint8)
    blocks = image.reshape(256, 2, 256, 2).astype(float).mean(axis=(1, 3))
    assert np.abs(resize(image, 256)[..., 0] - blocks).max() <= 1
    assert resize(image[:100, :300], 256).shape == (256, 256, 1)


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


def test_augmentation_depends_on_the_sample_alone():
    picture = torch.rand(8, 1, 32, 32)
    numbers = sample_numbers(3, 32, 5, np.arange(8))
    whole = augment(picture, picture, numbers, 0.7)[0]
    assert np.array_equal(sample_numbers(3, 32, 5, np.array([6])), numbers[6:7])
    for i in (0, 6):
        alone = augment(picture[i:i + 1], picture[i:i + 1], numbers[i:i + 1], 0.7)[0]
        assert torch.allclose(alone[0], whole[i], atol=1e-6)
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert not np.array_equal(sample_numbers(3, 32, 6, np.arange(8)), numbers)


def test_numbers_of_far_samples_are_those_of_the_whole_table():
    indices = np.array([99_999, 5, 5, 70_000, 0])
    table = [np.random.default_rng(key).random((100_000, columns)) for key, columns in (([3, 64, 7], 12),
                                                                                       ([3, 64, 7, 2], 4))]
    assert np.array_equal(sample_numbers(3, 64, 7, indices), np.concatenate(table, axis=1)[indices])
    assert sample_numbers(3, 64, 7, indices[:0]).shape == (0, 16), "a process may have no image of a small batch"


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


def test_target_size_reaches_workers_that_live_on(shared_root):
    dataset = PapSmearDataset(shared_root, "train", target_size=64)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=True)
    assert {batch["image"].shape[-1] for batch in loader} == {64}
    dataset.update_target_size(32)
    assert {batch["image"].shape[-1] for batch in loader} == {32}


def test_levels_are_exact_means(shared_root):
    pyramid = open_pyramids(shared_root, wanted=("test",))["test"]
    for r in (128, 64, 32):
        for coarse, fine in zip(pyramid.batch(r, np.arange(3)), pyramid.batch(2 * r, np.arange(3)), strict=True):
            assert (coarse.double() - mean2x2(fine.double())).abs().max() <= 0.5
    half = torch.tensor([[255, 255], [0, 0]], dtype=torch.uint8)[None, None]
    assert halve(half).item() / 255 >= 0.5, "half covered counts as covered"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_without_cache_and_with_workers_the_batches_are_the_same(shared_root, num_workers):
    def batches(**kwargs):
        train, valid, _ = create_progressive_dataloaders(shared_root, {64: 4}, **kwargs)[64]
        train.set_epoch(2)
        return [*train, *train, *valid]
    kept, decoded = batches(), batches(cache_images=False, num_workers=num_workers)
    assert len(kept) == 5
    for a, b in zip(kept, decoded, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["mask"], b["mask"])
        assert a["name"] == b["name"]


def test_loader_size_changes_at_the_next_pass_and_one_resolution_has_workers(shared_root):
    loaders = create_progressive_dataloaders(shared_root, {32: 2, 64: 2}, cache_images=False, num_workers=1)
    train = loaders[32][0]
    shapes = []
    for batch in train:
        train.dataset.update_target_size(64)
        shapes.append(batch["image"].shape[-1])
    assert set(shapes) == {32}
    assert {batch["image"].shape[-1] for batch in train} == {64}
    assert train._workers is not None
    next(iter(loaders[128][0]))
    assert train._workers is None


def test_loaders_share_one_decoded_copy(shared_root):
    loaders = create_progressive_dataloaders(shared_root)
    assert len({id(row[0].dataset.pyramid) for row in loaders.values()}) == 1
    assert [row[0].batch_size for row in loaders.values()] == [64, 32, 16, 8]
    with pytest.raises(ValueError, match="batch_sizes"):
        create_progressive_dataloaders(shared_root, {48: 2})


def test_no_image_is_lost_but_a_last_batch_of_one(shared_root):
    train = create_progressive_dataloaders(shared_root, {32: 5})[32][0]
    assert [len(b["name"]) for b in train] == [5], "6 = 5 + 1, and batch normalisation cannot use the one"
    assert len(train) == 1
    train, valid, _ = create_progressive_dataloaders(shared_root, {32: 2})[32]
    assert [len(b["name"]) for b in valid] == [2, 1]
    train = create_progressive_dataloaders(shared_root, {32: 100})[32][0]
    assert [len(b["name"]) for b in train] == [6]
    orders = [[n for b in train for n in b["name"]] for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def copy_pair(root, split, name, new):
    for kind in ("images", "masks"):
        shutil.copy(root / split / kind / f"{name}.png", root / split / kind / f"{new}.png")


def move_pair(root, split, name, to, new):
    for kind in ("images", "masks"):
        shutil.copy(root / split / kind / f"{name}.png", root / to / kind / f"{new}.png")


def test_copies_sources_and_leakage(data_root):
    copy_pair(data_root, "train", "train_0", "flipped_train_0")
    copy_pair(data_root, "train", "train_0", "rotated_120_mirrored_train_0")
    move_pair(data_root, "train", "train_0", "test", "rotated_90_train_0")
    move_pair(data_root, "valid", "valid_1", "train", "mirrored_valid_1")
    report = check_dataset(data_root)
    assert report.counts["train"] == {"images": 9, "originals": 6, "empty_masks": 0,
                                      "foreground": [pytest.approx(0.09, abs=0.06)]}
    assert report.leakage["source images"] == {"valid": (1, 3), "test": (1, 4)}
    assert "1 of 3 source images of valid" in str(report)
    assert len(report.warnings) == 2
    assert len(list_splits(data_root, use_augmented=False)["train"]) == 6
    grouped = check_dataset(data_root, group_regex=r"^(\w+?)_")
    assert grouped.leakage["groups"] == {"valid": (1, 1), "test": (1, 2)}
    with pytest.raises(ValueError, match="must match every source name"):
        check_dataset(data_root, group_regex=r"^\d+")


def test_written_splits_have_no_leakage(tmp_path):
    root = write_data_set(tmp_path / "data", counts=(20, 6, 6))
    for i in range(20):
        copy_pair(root, "train", f"train_{i}", f"flipped_train_{i}")
    move_pair(root, "train", "train_3", "test", "mirrored_train_3")
    assert check_dataset(root).warnings
    path = write_splits(root, seed=1)
    report = check_dataset(root)
    assert report.leakage["source images"] == {"valid": (0, 5), "test": (0, 5)}
    assert not report.warnings
    splits = list_splits(root)
    assert not any(pair.is_copy for split in ("valid", "test") for pair in splits[split])
    assert {p.source for p in splits["train"] if p.is_copy} <= {p.source for p in splits["train"] if not p.is_copy}
    assert leaked(splits, "test") == (0, 5)
    with pytest.raises(ValueError, match="never overwritten"):
        write_splits(root)
    table = path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + table.replace("/", "\\").replace("\n", "\r\n").encode())  # a spreadsheet's
    assert list_splits(root) == splits
    path.write_text("path,split\ntrain/images/train_0.png,training\nnowhere.png,test\n")
    with pytest.raises(DatasetError, match="'training'") as caught:
        list_splits(root)
    assert len(caught.value.problems) == 2
    path.write_bytes("path,split\nträin,test".encode("utf-16"))
    with pytest.raises(DatasetError, match="splits.csv: cannot be read"):
        list_splits(root)


def test_split_of_few_groups_and_of_names_that_occur_twice(tmp_path):
    root = write_data_set(tmp_path / "data", counts=(1, 1, 1))
    write_splits(root)
    assert [len(pairs) for pairs in list_splits(root).values()] == [1, 1, 1]
    (root / "splits.csv").unlink()
    with pytest.raises(ValueError, match=r"2 group\(s\)"):
        write_splits(root, "^.")
    move_pair(root, "train", "train_0", "test", "valid_0")
    with pytest.raises(DatasetError, match="another picture than"):
        write_splits(root)


def test_groups_of_unequal_size_meet_their_shares_in_images(tmp_path):
    """40 images, of which train_1 and train_10..19 are one group, and of train_0 nothing but a copy is left."""
    root = write_data_set(tmp_path / "data", counts=(20, 10, 10))
    copy_pair(root, "train", "train_0", "flipped_train_0")
    for kind in ("images", "masks"):
        (root / "train" / kind / "train_0.png").unlink()
    write_splits(root, r"^\w+?_\d")
    splits = list_splits(root)
    assert [sum(not pair.is_copy for pair in splits[split]) for split in splits] == [27, 6, 6]
    assert [pair.name for pair in splits["train"] if pair.is_copy] == ["flipped_train_0"]
    assert leaked(splits, "valid", r"^\w+?_\d") == (0, 6)


def test_remedy_against_leakage_can_be_pasted(data_root, tmp_path):
    move_pair(data_root, "train", "train_0", "test", "rotated_-90_train_0")
    (data_root / "train/images/notes.webp").write_text("x")
    report = check_dataset(data_root, group_regex=r"^(\w+_\d+)$")
    assert "1 files are of no type" in str(report)
    command = re.search(r"python (pap_smear_dataset\.py .*)", str(report)).group(1)
    done = run_script(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert not check_dataset(data_root).leakage["source images"]["test"][0]


def break_data_set(root: Path, fault: str) -> list[str]:
    """Break a data set in one way; return words that its message must hold."""
    images, masks = root / "train/images", root / "train/masks"
    one = masks / "train_1.png"
    if fault == "image without mask":
        one.unlink()
        return ["train_1.png: no mask", "remove the image"]
    if fault == "mask without image":
        (images / "train_1.png").unlink()
        return ["train_1.png: no image"]
    if fault == "size mismatch":
        save_png(one, np.zeros((32, 64), np.uint8))
        return ["64x64", "32x64"]
    if fault == "unreadable image":
        (images / "train_1.png").write_bytes(b"no picture")
        return ["train_1.png: not a readable image"]
    if fault == "cut off image":
        content = (images / "train_1.png").read_bytes()
        (images / "train_1.png").write_bytes(content[:len(content) // 2])
        return ["train_1.png: damaged or cut off"]
    if fault == "labels in the mask":
        save_png(one, disc().astype(np.uint8) + disc(64, 9))
        return ["train_1.png: label values {0, 1, 2}", "--out_channels 2"]
    if fault == "photograph as mask":
        save_png(one, (np.arange(4096).reshape(64, 64) // 16).astype(np.uint8))
        return ["train_1.png: ", "grey", "Is it an image"]
    if fault == "two images of one name":
        Image.open(images / "train_1.png").save(images / "train_1.jpg")
        return ["train_1.png: same name as train_1.jpg"]
    if fault == "missing folder":
        shutil.rmtree(root / "test")
        return ["test/images: no such folder", "Expected: DATA_ROOT/train|valid|test"]
    if fault == "empty split":
        shutil.rmtree(root / "valid/images")
        shutil.rmtree(root / "valid/masks")
        (root / "valid/images").mkdir()
        (root / "valid/masks").mkdir()
        return ["valid: no image"]
    if fault == "colour mask":
        save_png(one, np.stack([disc() * np.uint8(255)] + [disc() * np.uint8(0)] * 2, -1))
        return ["train_1.png: a colour-coded mask"]
    assert fault == "several at once"
    save_png(root / "valid/masks/valid_0.png", disc().astype(np.uint8) * 7)
    save_png(root / "test/masks/test_2.png", np.zeros((9, 9), np.uint8))
    save_png(one, disc().astype(np.uint8) * 7)
    (images / "train_2.png").write_bytes(b"nor this")
    (masks / "train_2.png").write_bytes(b"nor that")
    (images / "train_3.png").unlink()
    return ["6 problems", "valid_0.png", "test_2.png", "train_1.png", "images/train_2.png", "masks/train_2.png",
            "train_3.png: no image"]


FAULTS = ["image without mask", "mask without image", "size mismatch", "unreadable image", "cut off image",
          "labels in the mask", "photograph as mask", "two images of one name", "missing folder", "empty split",
          "colour mask", "several at once"]


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_data_sets_are_refused_in_one_message(data_root, tmp_path, capsys, fault):
    words = break_data_set(data_root, fault)
    code = train_papsmear.main(["--data_root", str(data_root), "--output_dir", str(tmp_path / "out"), *TINY])
    message = capsys.readouterr().err
    assert code == 2
    assert message.count("error:") == 1
    assert "Traceback" not in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_two_classes_train_and_are_scored(tmp_path):
    root = write_data_set(tmp_path / "data", counts=(4, 2, 2))
    for path in root.glob("*/masks/*.png"):
        drawn = load_mask(path)[..., 0]
        labels = drawn.astype(np.uint8)
        labels[:8] = 2
        save_png(path, labels)
    pyramids = open_pyramids(root, out_channels=2)
    loaders = create_progressive_dataloaders(pyramids=pyramids, batch_sizes={32: 2})
    trainer = ProgressiveTrainer(ProgressiveUNet(1, 2, 4), epochs_per_stage=1, device="cpu")
    metrics = trainer.train_epoch(loaders[32][0], 0)
    assert math.isfinite(metrics["loss"])
    trainer.set_stage(4)
    path = write_checkpoint(tmp_path / "two.pth", trainer.model)
    rows = score_pairs(Predictor(path, "cpu", "float32"), scored_pairs(root, "test"))
    assert rows[0]["dice"] == pytest.approx((rows[0]["dice_1"] + rows[0]["dice_2"]) / 2)


# ---- schedule


def test_alpha_rises_in_optimizer_steps_and_is_done_in_time():
    plan = TrainingPlan({1: 3, 2: 3, 3: 1}, fade_epochs=1.0)
    alphas = [plan.alpha(2, e, s, 4) for e in range(3) for s in range(4)]
    assert alphas[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert alphas[4:] == [1.0] * 8
    long = TrainingPlan({1: 3, 2: 3}, fade_epochs=99)
    assert [long.alpha(2, e, s, 4) == 1 for e in range(3) for s in range(4)] == [False] * 8 + [True] * 4
    assert [plan.alpha(3, 0, s, 6) == 1 for s in range(6)] == [False] * 3 + [True] * 3
    assert TrainingPlan({1: 1, 2: 5}).alpha(2, 0, 0, 10) == 1.0


def test_one_rate_for_the_whole_run():
    plan = TrainingPlan({1: 10, 2: 10, 3: 10, 4: 20}, lr=1.0)
    assert plan.rate(2, 5, 0, 10, born=1) == 1.0
    assert plan.rate(4, 19, 9, 10, born=1) == pytest.approx(0.01)
    assert plan.rate(4, 90, 0, 10, born=1) == pytest.approx(0.01)
    assert plan.rate(1, 0, 4, 10, born=1) == pytest.approx(0.5), "half of a warm-up of 2 % of 50 epochs"
    assert plan.rate(2, 0, 1, 10, born=2) == pytest.approx(0.2), "a new part warms up"
    assert plan.rate(2, 0, 1, 10, born=1) == 1.0, "an old one goes on"
    work = 10 * 40 + 10 * 80 + 10 * 120 + 5 * 185, 10 * 40 + 10 * 80 + 10 * 120 + 20 * 185
    falling = (work[0] / work[1] - 0.4) / 0.6
    assert plan.rate(4, 4, 9, 10, born=1) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * falling)) / 2)
    slow = TrainingPlan({1: 10, 2: 10, 3: 10, 4: 20}, lr=1.0, old_lr_scale=0.1)
    assert [slow.rate(2, 5, 0, 10, born) for born in (1, 2)] == pytest.approx([0.1, 1.0])
    assert TrainingPlan({1: 10, 2: 10}, lr=1.0, schedule="stage").rate(2, 1, 9, 10, born=1) == 1.0


def test_cheap_epochs_do_not_use_the_rate_up():
    plan = TrainingPlan({1: 36, 2: 28, 3: 18, 4: 18}, lr=1.0)
    assert plan.rate(2, 26, 9, 10, born=1) == 1.0, "63 % of the epochs, 39 % of the work"
    assert plan.rate(4, 0, 0, 10, born=1) > 0.6


def test_a_run_begun_when_epochs_counted_alike_goes_on_as_planned(shared_root, tmp_path):
    trainer, loaders = make_trainer(shared_root, tmp_path)
    trainer.train_epoch(loaders[32][0], 0)
    trainer.record(trainer.train_epoch(loaders[32][0], 0), trainer.validate_epoch(loaders[32][1], 0))
    saved = load_checkpoint(tmp_path / "last.pth")
    assert saved["plan"].pop("counted_by") == "work"
    save_checkpoint(tmp_path / "last.pth", saved)
    trainer.resume(tmp_path / "last.pth")
    plan = dataclasses.replace(trainer.plan, epochs={1: 10, 2: 10, 3: 10, 4: 20}, lr=1.0)
    assert plan.rate(4, 4, 9, 10, born=1) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 2)) / 2)


def test_epochs_per_stage():
    assert epochs_by_stage(5, [3, 4]) == {3: 5, 4: 5}
    assert epochs_by_stage([1, 2, 3, 4], [3, 4]) == {3: 3, 4: 4}
    assert epochs_by_stage([7, 8], [3, 4]) == {3: 7, 4: 8}
    for wrong in ([1, 2, 3], [0, 1], -1, 0):
        with pytest.raises(ValueError, match="epochs_per_stage"):
            epochs_by_stage(wrong, [3, 4])


# ---- trainer


def make_trainer(root, output=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = ProgressiveUNet(base_channels=2)
    trainer = ProgressiveTrainer(model, device="cpu", precision="float32", output_dir=output, seed=seed,
                                 **({"epochs_per_stage": [2, 1, 1, 1]} | kwargs))
    return trainer, create_progressive_dataloaders(root, dict.fromkeys((32, 64, 128, 256), 2))


def metric_rows(folder):
    timing = ("seconds", "images_per_second")
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in timing} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("average", "fade_epochs"), [(0.0, 1.0), (0.8, 0.0)])
def test_fit_loop_and_resumed_run_reach_the_same_weights(shared_root, tmp_path, average, fade_epochs):
    options = {"average": average, "fade_epochs": fade_epochs, "accumulate": 2, "epochs_per_stage": [1, 3, 1, 1]}
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
            if finished == 2:  # inside the fade, if there is one
                assert (loop.model.alpha < 1) == (fade_epochs > 0)
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
    assert {"loss", "dice", "iou", "accuracy", "precision", "recall"} <= set(train) & set(valid)
    assert {"dice_256", "empty_masks", "foreground"} <= set(valid)
    assert torch.allclose(trainer.model.image_mean, torch.tensor(
        loaders[32][0].recipe.mean, dtype=torch.float32))


def test_unborn_and_retired_parts_have_no_optimizer_state(shared_root):
    trainer, loaders = make_trainer(shared_root)
    trainer.train_epoch(loaders[32][0], 0)
    unborn = trainer.model.decoder["64"].conv[0][0].weight
    before = unborn.clone()
    trainer.train_epoch(loaders[32][0], 1)
    assert unborn not in trainer.optimizer.state
    assert torch.equal(unborn, before)
    trainer.set_stage(2)
    retired = trainer.model.encoder["32"].from_image[0].weight
    before = retired.clone()
    trainer.train_epoch(loaders[64][0], 0)
    assert torch.equal(retired, before), "no decay either"
    steps = {group["part"]: trainer.optimizer.state[group["params"][0]]["step"].item()
             for group in trainer.optimizer.param_groups if group["params"][0] in trainer.optimizer.state}
    assert steps["decoder.64"] == 3, "bias correction counts from birth"
    assert steps["decoder.32"] == 9
    assert all((g["weight_decay"] == 0) == (g["params"][0].ndim <= 1) for g in trainer.optimizer.param_groups)


def test_fade_begins_only_one_stage_above_a_trained_network(shared_root):
    trainer, loaders = make_trainer(shared_root, fade_epochs=1.0, epochs_per_stage=3)
    trainer.set_stage(2)
    assert trainer.model.alpha == 1, "nothing to preserve in a network that was never trained"
    trainer.set_stage(1)
    trainer.train_epoch(loaders[32][0], 0)
    trainer.set_stage(2)
    assert trainer.model.alpha == 0
    trainer.set_stage(2)
    assert trainer.model.alpha == 0
    train = trainer.train_epoch(loaders[64][0], 0)
    assert 0 < trainer.model.alpha < 1
    trainer.record(train, trainer.validate_epoch(loaders[64][1], 0))
    assert 2 not in trainer.best_scores, "a network that still fades is no best one"
    trainer.record(trainer.train_epoch(loaders[64][0], 1), trainer.validate_epoch(loaders[64][1], 1))
    assert trainer.model.alpha == 1
    assert 2 in trainer.best_scores


def test_batchnorm_statistics_are_a_plain_mean_at_first(shared_root):
    trainer, loaders = make_trainer(shared_root)
    layer, seen = trainer.model.encoder["32"].from_image[1], []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().mean(dim=(0, 2, 3))))
    for epoch in range(3):
        trainer.train_epoch(loaders[32][0], epoch)
    assert len(seen) == 9
    assert torch.allclose(layer.running_mean, torch.stack(seen).mean(0), atol=1e-5)


def test_accumulated_gradients_make_one_step(shared_root):
    trainer, _ = make_trainer(shared_root, accumulate=4)
    loader = create_progressive_dataloaders(shared_root, {32: 1})[32][0]
    trainer.train_epoch(loader, 0)  # 6 batches of one: steps of 4 and 2
    weight = trainer.model.encoder["32"].refine[0].weight
    assert trainer.optimizer.state[weight]["step"].item() == 2


def test_a_split_smaller_than_a_batch_trains_even_with_one_image(tmp_path):
    root = write_data_set(tmp_path / "data", counts=(1, 1, 1))
    trainer, loaders = make_trainer(root)
    assert math.isfinite(trainer.train_epoch(loaders[32][0], 0)["loss"])


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
        trainer.model.heads["32"].conv.bias.fill_(math.inf)
    with pytest.raises(NonFiniteLossError, match="as loss at stage 1"):
        trainer.train_epoch(loaders[32][0], 1)
    with pytest.raises(NonFiniteLossError, match="as validation loss at stage 1"):
        trainer.validate_epoch(loaders[32][1], 1)


def test_compiled_steps_give_the_losses_of_plain_ones(shared_root, monkeypatch):
    graphs = []

    def traced_alone(graph, inputs):  # not translated to C++, which takes a minute
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=traced_alone))

    def losses(**more) -> list[float]:
        trainer, loaders = make_trainer(shared_root, fade_epochs=0.5, epochs_per_stage=5, **more)  # of 3 batches
        found = []
        for stage, resolution in ((1, 32), (2, 64)):
            trainer.set_stage(stage)
            found += [trainer.train_epoch(loaders[resolution][0], epoch)["loss"] for epoch in range(5)]
        return found

    assert losses(compile=True) == pytest.approx(losses(), abs=1e-4)
    assert len(graphs) == 2, "once a stage, after the first 10 batches and the fade"


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no_compiler_of_this_name")
    with pytest.raises(ValueError, match="'no_compiler_of_this_name' is not found"):
        ProgressiveTrainer(ProgressiveUNet(base_channels=2), "cpu", compile=True)


def test_averaged_weights_do_not_drag_the_untrained_start_of_new_parts(shared_root):
    trainer, loaders = make_trainer(shared_root, average=0.999)
    for _ in range(2):
        trainer.train_epoch(loaders[32][0], 0)
    trainer.set_stage(2)
    start = trainer.model.decoder["64"].conv[0][0].weight.clone()
    for epoch in range(3):
        trainer.train_epoch(loaders[64][0], epoch)
    now, mean = (m.decoder["64"].conv[0][0].weight for m in (trainer.model, trainer.evaluated_model))
    assert (mean - now).norm() < 0.7 * (now - start).norm()
    norm, own = (m.decoder["64"].conv[0][1] for m in (trainer.model, trainer.evaluated_model))
    assert torch.equal(norm.running_var, own.running_var)


def test_image_statistics_are_taken_once_whatever_ran_before(shared_root):
    trainer, loaders = make_trainer(shared_root)
    trainer.model(torch.rand(2, 1, 32, 32))  # a forward pass in train mode, as in a notebook
    trainer.train_epoch(loaders[32][0], 0)
    expected = loaders[32][0].recipe.mean
    assert trainer.model.image_mean.item() == pytest.approx(expected[0], abs=1e-6)


def test_a_plain_loader_gets_new_augmentation_each_epoch(shared_root):
    dataset = PapSmearDataset(shared_root, "train", target_size=32, augment_probability=1.0)
    trainer, _ = make_trainer(shared_root)
    loader = DataLoader(dataset, batch_size=6)
    trainer.train_epoch(loader, 0)
    first = next(iter(loader))["image"]
    trainer.train_epoch(loader, 1)
    assert not torch.equal(first, next(iter(loader))["image"])


def test_going_back_before_training_keeps_the_plan(shared_root):
    trainer, _ = make_trainer(shared_root)
    trainer.set_stage(4)
    assert trainer.plan.epochs == {4: 1}
    trainer.set_stage(1)
    assert trainer.plan.epochs == {1: 2, 2: 1, 3: 1, 4: 1}
    trainer.set_stage(1, epochs=7)
    assert trainer.plan.epochs[1] == 7


def test_settings_of_other_types_are_converted_or_refused_at_once(shared_root, tmp_path):
    trainer, loaders = make_trainer(shared_root, tmp_path / "a", lr=np.float64(1e-3), epochs_per_stage=np.int64(1))
    trainer.record(trainer.train_epoch(loaders[32][0], 0), trainer.validate_epoch(loaders[32][1], 0))
    assert load_checkpoint(tmp_path / "a/last.pth")["plan"]["lr"] == 1e-3
    with pytest.raises(ValueError, match=r"config\['root'\]"):
        make_trainer(shared_root, config={"root": Path("x")})


def test_validation_enlarges_logits_to_256(shared_root):
    trainer, loaders = make_trainer(shared_root)
    trainer.train_epoch(loaders[32][0], 0)
    metrics = trainer.validate_epoch(loaders[32][1], 0)
    valid = loaders[32][1].dataset.pyramid
    with torch.no_grad():
        logits = trainer.model.eval()(valid.batch(32, np.arange(3))[0].float() / 255)
    enlarged = torch.nn.functional.interpolate(logits, (256, 256), mode="bilinear") >= 0
    expected = pixel_metrics(enlarged, valid.batch(256, np.arange(3))[1] >= 127.5)["dice"].mean().item()
    assert metrics["dice_256"] == pytest.approx(expected)


def test_device_and_precision_errors():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="Use 'cpu', or 'auto'"):
            ProgressiveTrainer(ProgressiveUNet(base_channels=2), device="cuda")
    with pytest.raises(ValueError, match="float16"):
        choose_precision("float16", torch.device("cpu"))
    with pytest.raises(ValueError, match="must be one of"):
        choose_device("gpu")
    for wrong in ({"lr": 0.0}, {"lr": math.nan}, {"accumulate": 0}, {"average": 1.0}, {"epochs_per_stage": 0},
                  {"schedule": "step"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ProgressiveTrainer(ProgressiveUNet(base_channels=2), device="cpu", **wrong)


def test_expected_memory_grows_with_batch_and_stage():
    model = ProgressiveUNet(base_channels=4)
    needed = []
    for stage in STAGE_RESOLUTIONS:
        model.set_stage(stage)
        needed.append(training_memory(model, 4, "float32"))
    assert needed == sorted(needed)
    activations = training_memory(model, 8, "float32") - needed[-1]
    # The finest level alone keeps the input of both convolutions, normalisations and rectifiers of two DoubleConvs.
    assert activations > 4 * 4 * 256 * 256 * 4 * 6
    assert not model.trained


# ---- checkpoints and scores


def test_a_checkpoint_is_plain_and_whole(trained_run):
    folder, _ = trained_run
    for stage, r in STAGE_RESOLUTIONS.items():
        checkpoint = torch.load(folder / f"best_stage_{stage}.pth", weights_only=True)
        assert set(checkpoint) == set(FIELDS)
        assert (checkpoint["stage"], checkpoint["alpha"], checkpoint["data"]["sizing"]) == (stage, 1.0, "resize")
        assert checkpoint["data"]["mean"] == tuple(checkpoint["model"]["image_mean"].tolist())
        assert f"decoder.{r}.conv.0.0.weight" in checkpoint["model"]
        names = checkpoint["model"]
        assert not any(f".{2 * r}." in name or name.startswith(("module.", "_orig_mod.")) for name in names)
        model = load_model(folder / f"best_stage_{stage}.pth")
        assert model.stage == stage
        assert not model.training
        assert torch.equal(model.state_dict()["image_mean"], checkpoint["model"]["image_mean"])


def test_a_failed_save_leaves_the_old_file(trained_run, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(trained_run[0] / "best_stage_1.pth")
    path = tmp_path / "best.pth"
    save_checkpoint(path, checkpoint)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="hold None, bool"):
        save_checkpoint(path, checkpoint | {"config": Path("x")})

    def fill_the_disk(content, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, checkpoint)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("content", "words"), [(b"", "can be read"), (b"hello", "can be read"), (None, "no such")])
def test_what_is_no_checkpoint_is_refused(tmp_path, content, words):
    path = tmp_path / "x.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_checkpoint(path)


class KnownLogits(torch.nn.Module):
    """Find what is darker than half: right on drawn discs; with a large shift find nothing."""

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return 20 * (0.5 - self.shift - x)


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


@pytest.mark.parametrize(("options", "words"), [
    (["--batch_sizes", "32:64,64:x"], "RESOLUTION:BATCH"),
    (["--batch_sizes", "48:8"], "32, 64, 128, 256"),
    (["--batch_sizes", "32:0"], "at least 1"),
    (["--epochs_per_stage", "-3"], "whole number of at least 1"),
    (["--epochs_per_stage", "1,2"], "stages 1..4"),
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
    assert settings.parse(["--preset", "quick", "--progressive", "false"]).epochs_per_stage == (24,)
    for name, preset in settings.PRESETS.items():  # their values are such as the options themselves take
        by_hand = [word for key, value in preset.items() for word in (f"--{key}", as_option(value))]
        found = vars(settings.parse(["--preset", name, "--experiment_name", "a"]))
        assert found == vars(settings.parse([*by_hand, "--experiment_name", "a"])) | {"preset": name}


@pytest.mark.parametrize(("error", "code", "said"), [
    (UserError("seed is x"), 2, "error: seed is x\n"), (OSError(28, "full"), 2, "error: [Errno 28] full\n"),
    (NonFiniteLossError("nan found"), 1, "error: nan found\n"),
    (KeyboardInterrupt(), 130, "\ninterrupted; nothing was written\n")])
def test_what_goes_wrong_becomes_an_exit_code(error, code, said, capsys):
    @command(interrupted="nothing was written")
    def main(argv):
        raise error
    assert main([]) == code
    assert capsys.readouterr().err == said
    assert [command()(lambda argv, value=value: value)() for value in (None, 1)] == [0, 1]
    for fault in (lambda argv: 1 / 0, lambda argv: list(zip([1], [], strict=True)),
                  lambda argv: Path("no/such/file").read_text()):
        with pytest.raises((ZeroDivisionError, ValueError, FileNotFoundError)):  # faults of ours keep their traceback
            command()(fault)()


def test_help_needs_no_torch():
    code = "import sys, train_papsmear; train_papsmear.parse(['--lr', '1']); print('torch' in sys.modules)"
    assert run_script("-c", code).stdout.strip() == "False"
    assert run_script("train_papsmear.py", "--help").returncode == 0


def test_a_run_leaves_the_documented_tree(trained_run, shared_root):
    folder, printed = trained_run
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "logs", "metrics.csv", "best_stage_1.pth", "best_stage_2.pth", "best_stage_3.pth",
        "best_stage_4.pth", "final_model.pth", "last.pth", "training_curves.png", "predictions_stage_1.png",
        "predictions_stage_2.png", "predictions_stage_3.png", "predictions_stage_4.png", "test_scores.csv",
        "test_scores.json"}
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
    assert list((folder / "logs").glob("events*"))
    again = score_pairs(Predictor(folder / "best_stage_4.pth", "cpu"), scored_pairs(shared_root, "test"))
    assert again[0]["dice"] == pytest.approx(float(rows[0]["dice"]), abs=1e-6)


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
    assert metric_rows(folder) == metric_rows(trained_run[0])


def test_resume_takes_the_file_too_and_says_what_to_do_without_one(trained_run, shared_root, tmp_path, capsys):
    folder = tmp_path / "tiny"
    shutil.copytree(trained_run[0], folder)
    assert train_papsmear.main(["--resume", str(folder / "last.pth"), "--dry_run"]) == 0
    (folder / "last.pth").unlink()
    assert train_papsmear.main(["--resume", str(folder)]) == 2
    assert "no epoch of that run was finished" in capsys.readouterr().err
    (tmp_path / "afile").write_text("")
    for options in (["--output_dir", str(tmp_path / "afile")],
                    ["--output_dir", str(tmp_path), "--experiment_name", "afile"]):
        assert train_papsmear.main(["--data_root", str(shared_root), *options]) == 2
        assert "a file, not a folder" in capsys.readouterr().err


def test_init_from_another_width_is_refused(trained_run, shared_root, tmp_path, capsys):
    assert train_papsmear.main(["--data_root", str(shared_root), "--output_dir", str(tmp_path), "--base_channels", "8",
                                "--init_from", str(trained_run[0] / "best_stage_2.pth")]) == 2
    assert "Pass --base_channels 4" in capsys.readouterr().err


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
    assert all(words in printed for words in ("source images", '"base_channels": 4', "MiB", "nothing written"))


def test_classic_unet_and_overfit_run(shared_root, tmp_path, capsys):
    assert train_papsmear.main(["--data_root", str(shared_root), "--output_dir", str(tmp_path), "--experiment_name",
                                "classic", *TINY, "--model", "unet", "--overfit", "2", "--base_channels", "2"]) == 0
    assert load_model(tmp_path / "classic/best_stage_4.pth").name == "unet"
    assert "first 2 training images" in capsys.readouterr().out


def test_the_dataset_script_reports_and_refuses(shared_root):
    done = run_script("pap_smear_dataset.py", shared_root)
    assert done.returncode == 0
    assert "0 of 3 source images of valid" in done.stdout
    assert run_script("pap_smear_dataset.py", "nowhere").returncode == 2


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


def test_sample_generator_refuses_a_full_folder(tmp_path):
    command = ["-m", "preparation.sample", "--out", tmp_path, "--train", 1, "--valid", 1, "--test", 1]
    assert run_script(*command).returncode == 0
    again = run_script(*command)
    assert again.returncode == 2
    assert "nothing is overwritten" in again.stderr
    assert len(list(tmp_path.rglob("*.png"))) == 6


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
