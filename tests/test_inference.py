"""Tests of what comes after training: instance measures, prediction of any image, separation, evaluation.

    python -m pytest tests/test_inference.py
"""

import csv
import doctest
import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy import ndimage
from skimage.metrics import contingency_table
from skimage.segmentation import find_boundaries

import evaluate_papsmear
import inference
import predict_papsmear
import train_papsmear
from checkpoints import load_checkpoint, save_checkpoint
from conftest import PROJECT, TINY, draw_pair, run_script, write_checkpoint, write_data_set
from images.bands import ImageRows
from images.familiarity import describe, ranges_over
from images.files import ImageFileError, image_size, load_image, load_instances, load_mask, resize, save_png, to_image
from images.resolutions import FINEST
from images.targets import drawn_nuclei
from inference import REACH, STEP, Predictor, plan_axis, tile_margin
from nuclei.outlines import OUTLINE, boundary
from nuclei.overlaps import overlaps
from nuclei.separation import separate_nuclei
from scoring.measures import INSTANCE_METRICS, boundary_f1, instance_metrics
from scoring.scores import compare, scored_pairs, summarise
from unet import MODELS, ProgressiveUNet, UNet
from unet_parts import ToLogits

# ---- instance measures


def labelled(shape, *boxes) -> np.ndarray:
    """Draw boxes (top, bottom, left, right), numbered from 1."""
    labels = np.zeros(shape, np.int32)
    for k, (top, bottom, left, right) in enumerate(boxes, start=1):
        labels[top:bottom, left:right] = k
    return labels


def random_nuclei(rng: np.random.Generator, side: int, count: int, radius: float) -> np.ndarray:
    """Draw discs one over the other, so that some are cut and some vanish."""
    rows, columns = np.mgrid[:side, :side]
    labels = np.zeros((side, side), np.int32)
    for k in range(1, count + 1):
        row, column = rng.uniform(0, side, 2)
        labels[np.hypot(rows - row, columns - column) <= rng.uniform(0.5, 1.5) * radius] = 7 * k
    return labels


def slow_instance_metrics(found: np.ndarray, drawn: np.ndarray) -> dict:
    """The same measures written down from the papers, nucleus by nucleus, with whole-image masks."""
    predicted = [found == k for k in np.unique(found) if k]
    truth = [drawn == k for k in np.unique(drawn) if k]
    if not predicted and not truth:
        return dict.fromkeys(INSTANCE_METRICS, 1.0)
    shared = total = 0
    used, matched = set(), []
    for mask in truth:
        ious = [(mask & p).sum() / (mask | p).sum() for p in predicted]
        best = int(np.argmax(ious)) if ious else None
        if best is None or ious[best] == 0:
            total += mask.sum()
            continue
        shared += (mask & predicted[best]).sum()
        total += (mask | predicted[best]).sum()
        used.add(best)
        matched += [iou for iou in ious if iou > 0.5]
    total += sum(p.sum() for j, p in enumerate(predicted) if j not in used)
    missed, wrong = len(truth) - len(matched), len(predicted) - len(matched)
    dq = len(matched) / (len(matched) + missed / 2 + wrong / 2)
    sq = sum(matched) / len(matched) if matched else 0.0
    return {"aji": shared / total, "pq": dq * sq, "dq": dq, "sq": sq, "f1": dq}


def test_instance_measures_of_drawn_rectangles():
    """Two drawn nuclei of 100 pixels; the second is found as two halves of 60 and 40, and one more is invented."""
    drawn = labelled((40, 40), (0, 10, 0, 10), (20, 30, 20, 30))
    found = labelled((40, 40), (0, 10, 2, 10), (20, 26, 20, 30), (26, 30, 20, 30), (0, 5, 30, 40))
    scores = instance_metrics(found, drawn)
    # First pair 80/100; second 60/100; the half of 40 and the invented 50 are left over.
    assert scores["aji"] == pytest.approx((80 + 60) / (100 + 100 + 40 + 50))
    assert scores["dq"] == scores["f1"] == pytest.approx(2 / (2 + 2 / 2 + 0 / 2))
    assert scores["sq"] == pytest.approx((0.8 + 0.6) / 2)
    assert scores["pq"] == pytest.approx(scores["dq"] * scores["sq"])
    # Half of a nucleus is no match: the IoU must be above 0.5.
    half = instance_metrics(labelled((40, 40), (0, 10, 0, 5)), labelled((40, 40), (0, 10, 0, 10)))
    assert half == {"aji": 0.5, "pq": 0, "dq": 0, "sq": 0, "f1": 0}


def test_one_prediction_over_two_nuclei_is_taken_twice():
    """The variant of Kumar et al. 2017: the area of a merged prediction counts once for each nucleus it covers."""
    drawn = labelled((10, 20), (0, 10, 0, 10), (0, 10, 10, 20))
    assert instance_metrics(np.ones_like(drawn), drawn)["aji"] == pytest.approx((100 + 100) / (200 + 200))


def test_a_nucleus_found_as_two_equal_halves():
    """No half is a match, as its IoU is 0.5 and not more, and the AJI takes one of them; other programs differ here."""
    drawn = labelled((10, 20), (0, 10, 0, 10))
    halves = labelled((10, 20), (0, 10, 0, 5), (0, 10, 5, 10))
    scores = instance_metrics(halves, drawn)
    assert scores == {"aji": pytest.approx(50 / (100 + 50)), "pq": 0, "dq": 0, "sq": 0, "f1": 0}


def test_disc_against_a_smaller_disc():
    rows, columns = np.mgrid[:200, :200]
    distance = np.hypot(rows - 100, columns - 100)
    scores = instance_metrics((distance <= 72).astype(int), (distance <= 80).astype(int))
    assert scores["aji"] == scores["pq"] == scores["sq"] == pytest.approx(72 ** 2 / 80 ** 2, abs=0.005)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, bool])
def test_rules_for_empty_maps(dtype):
    empty, one = np.zeros((8, 8), dtype), np.eye(8).astype(dtype)
    assert set(instance_metrics(empty, empty).values()) == {1.0}
    for pair in ((one, empty), (empty, one)):
        assert set(instance_metrics(*pair).values()) == {0.0}
        assert boundary_f1(*pair) == 0
    assert boundary_f1(empty, empty) == 1
    assert set(instance_metrics(one, one).values()) == {1.0}


@pytest.mark.parametrize("seed", range(6))
def test_instance_measures_match_an_independent_implementation(seed):
    rng = np.random.default_rng(seed)
    drawn = random_nuclei(rng, 90, 25, 8)
    found = np.roll(drawn, rng.integers(-4, 5, 2), (0, 1))
    found[found == rng.choice(found[found > 0])] = 0
    found[rng.integers(90):, rng.integers(90):] = random_nuclei(rng, 90, 15, 5)[:1, :1]
    found = np.where(rng.random(found.shape) < 0.03, 3, found)
    fast, slow = instance_metrics(found, drawn), slow_instance_metrics(found, drawn)
    assert set(fast) == set(INSTANCE_METRICS)
    assert all(abs(fast[name] - slow[name]) < 1e-9 for name in INSTANCE_METRICS), (fast, slow)


def test_overlaps_and_boundaries_are_those_of_scikit_image():
    rng = np.random.default_rng(0)
    found, drawn = random_nuclei(rng, 120, 30, 9) // 7, random_nuclei(rng, 120, 30, 9) // 7
    table = overlaps(found, drawn)
    expected = contingency_table(found, drawn).toarray()
    ids = [np.flatnonzero(np.bincount(m.ravel()))[1:] for m in (found, drawn)]
    ours = np.zeros((len(ids[0]), len(ids[1])))
    ours[table.found, table.drawn] = table.shared
    assert np.array_equal(ours, expected[np.ix_(*ids)])
    assert np.array_equal(table.found_areas, expected[ids[0]].sum(axis=1))
    assert np.array_equal(boundary(np.pad(drawn, 1))[1:-1, 1:-1],
                          find_boundaries(np.pad(drawn, 1), connectivity=1, mode="inner")[1:-1, 1:-1])


def test_boundary_f1_of_shifted_squares():
    """A square of side 40, found k pixels further right: its vertical sides are off by k, its others by nothing."""
    drawn = labelled((80, 80), (20, 60, 20, 60)).astype(bool)
    outline = 4 * 39
    assert boundary(drawn).sum() == outline
    assert boundary_f1(drawn, drawn, tolerance=0) == 1
    near, far = np.roll(drawn, 2, 1), np.roll(drawn, 5, 1)
    assert boundary_f1(near, drawn) == 1
    # Too far from the other outline are the whole outer side (40), of the horizontal sides what lies 3 and 4 columns
    # beyond the other corner (2 sides of 2), and of the inner side all but 3 rows at either end (40 - 6).
    assert boundary_f1(far, drawn) == pytest.approx(1 - (40 + 4 + 34) / outline)
    # Between touching nuclei label maps have a boundary that masks do not have.
    two = labelled((20, 20), (0, 20, 0, 10), (0, 20, 10, 20))
    assert boundary(two)[5, 9]
    assert not boundary(two > 0)[5, 9]


def test_instance_measures_of_a_full_slide_field_take_less_than_a_second():
    rows, columns = np.mgrid[:1000, :1000]
    drawn = np.where((rows % 23 < 20) & (columns % 23 < 19), (rows // 23) * 44 + columns // 23 + 1, 0)
    assert len(np.unique(drawn)) > 1900
    found = np.roll(drawn, (2, 3), (0, 1))
    start = time.process_time()
    instance_metrics(found, drawn)
    boundary_f1(found, drawn)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(("found", "words"), [
    (np.zeros((4, 4)), "whole numbers"), (np.zeros((4, 5), int), "one shape"), (np.full((4, 4), -1), "at least 0")])
def test_label_maps_that_are_refused(found, words):
    with pytest.raises(ValueError, match=words):
        instance_metrics(found, np.zeros((4, 4), int))


# ---- images in memory


def test_arrays_and_files_become_the_same_pixels(tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    deep = rng.integers(0, 65536, (9, 7), dtype=np.uint16)
    for array in (rgb, rgb[..., 0], deep):
        save_png(tmp_path / "a.png", array)
        for channels in (1, 3):
            assert np.array_equal(to_image(array, channels), load_image(tmp_path / "a.png", channels))
    alpha = np.dstack([rgb, rgb[..., :1]])
    assert np.array_equal(to_image(alpha, 3), rgb)
    assert np.array_equal(to_image(alpha[..., :2], 1), rgb[..., :1])
    assert np.array_equal(to_image(rgb[..., :1] / 255, 1), rgb[..., :1])
    assert np.array_equal(to_image(rgb[..., 0] > 99, 1)[..., 0], (rgb[..., 0] > 99) * 255)
    palette = Image.fromarray(rgb).quantize(200)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(to_image(palette, 3), load_image(tmp_path / "p.png", 3)), "a palette's indices are no grey"


@pytest.mark.parametrize(("array", "words"), [
    (np.zeros((3, 20, 20), np.uint8), "transpose"), (np.zeros((5, 5), np.int64), "astype"),
    (np.full((5, 5), 200.0), r"must lie in \[0, 1\]"), (np.full((5, 5), np.nan), r"must lie in \[0, 1\]"),
    (np.zeros((0, 5), np.uint8), "at least 1"), (np.zeros(5, np.uint8), r"\(H, W\)")])
def test_arrays_that_are_refused(array, words):
    with pytest.raises(ImageFileError, match=words):
        to_image(array, 1)


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    path = tmp_path / "large.png"
    save_png(path, np.zeros((100, 100), np.uint8))
    path.write_bytes(path.read_bytes()[:60])  # the header alone
    with pytest.raises(ImageFileError, match="100x100 pixels.*--max_pixels"):
        load_image(path, 1, max_pixels=9999)
    with pytest.raises(ImageFileError, match="cut off"):
        load_image(path, 1, max_pixels=10000)


@pytest.mark.parametrize("options", [{"planarconfig": "separate", "rowsperstrip": 7}, {"planarconfig": "contig"},
                                     {"planarconfig": "separate", "tile": (16, 16)}])
def test_colour_of_16_bit_is_read_in_every_layout(options, tmp_path):
    rgb = np.random.default_rng(0).integers(0, 65536, (40, 50, 3), dtype=np.uint16)
    planes = rgb.transpose(2, 0, 1) if options["planarconfig"] == "separate" else rgb
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", **options)
    found = load_image(tmp_path / "a.tif", 3)
    assert np.abs(found - rgb / 257).max() <= 1  # Pillow rounds down
    assert np.array_equal(np.concatenate(list(ImageRows(tmp_path / "a.tif", 3))), found)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_white_may_be_zero(kind, tmp_path):
    grey = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (40, 50), dtype=kind)
    for photometric in ("minisblack", "miniswhite"):
        tifffile.imwrite(tmp_path / f"{photometric}.tif", grey, photometric=photometric)
    black, white = (load_image(tmp_path / f"{p}.tif", 1).astype(int) for p in ("minisblack", "miniswhite"))
    assert np.array_equal(black, 255 - white)


def test_a_stack_is_refused_and_a_pyramid_is_not(tmp_path):
    for name, sides in (("stack.tif", (64, 64, 64)), ("pyramid.tif", (64, 32, 16))):
        with tifffile.TiffWriter(tmp_path / name) as file:
            for k, side in enumerate(sides):
                file.write(np.full((side, side), 10 + k, np.uint8), photometric="minisblack")
    assert (load_image(tmp_path / "pyramid.tif", 1) == 10).all()
    for read in (load_image, lambda path, channels: image_size(path), ImageRows):
        with pytest.raises(ImageFileError, match="a stack of 3 images of 64x64 pixels"):
            read(tmp_path / "stack.tif", 1)


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.float64, np.float16, ">u4"])
def test_instance_maps_of_unusual_types_are_read(kind, tmp_path):
    labels = np.zeros((20, 30), np.int32)
    labels[3:6, 4:9], labels[10:12, 1:3] = 1, 700
    tifffile.imwrite(tmp_path / "a.tif", labels.astype(kind))
    assert np.array_equal(load_instances(tmp_path / "a.tif"), labels)
    tifffile.imwrite(tmp_path / "b.tif", labels.astype(np.int64) << 40)
    with pytest.raises(ImageFileError, match="not a readable image"):
        load_instances(tmp_path / "b.tif")


def test_damaged_exif_does_not_hide_good_pixels(tmp_path):
    grey = noisy_image(20, 30)[..., 0]
    Image.fromarray(grey).save(tmp_path / "a.png", exif=b"Exif\0\0garbagegarbage")
    assert image_size(tmp_path / "a.png") == (20, 30)
    assert np.array_equal(load_image(tmp_path / "a.png", 1)[..., 0], grey)


# ---- prediction


def lively_model(stage=4, in_channels=1, out_channels=1, kind=ProgressiveUNet, seed=0):
    """A network without training whose probabilities vary over an image."""
    torch.manual_seed(seed)
    model = kind(in_channels, out_channels, base_channels=4)
    model.set_image_statistics([0.5] * in_channels, [0.2] * in_channels)
    model.set_stage(stage)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ToLogits):
                torch.nn.init.normal_(module.conv.weight, std=0.5)
        model.train()
        for _ in range(20):  # running statistics as after training
            model(torch.rand(2, in_channels, 64, 64))
    return model.eval()


def noisy_image(height, width, channels=1, seed=0) -> np.ndarray:
    """Smooth structures and noise (H, W, C) uint8."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(0, 1, (height, width, channels)), (6, 6, 0))
    return np.clip(128 + 400 * smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


def measured_reach(model) -> int:
    """Switch on one pixel of a black image where the network can only add, and see how far off the logits answer."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1 / p[0].numel() if p.ndim > 1 else 0)  # nothing is rectified away, and black stays exactly 0
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1)
    model = model.double().eval()
    period = 2 ** model.stage
    side = (2 * REACH[model.name][model.stage] // period + 4) * period
    farthest = 0
    for place in range(side // 2, side // 2 + period):  # everywhere relative to the poolings
        x = torch.zeros(1, 1, side, side, dtype=torch.float64)
        x[..., place, place] = 1
        with torch.inference_mode():
            answer = (model(x)[0, 0] != 0).any(dim=1).nonzero().flatten()
        assert answer[0] > 0
        assert answer[-1] < side - 1
        farthest = max(farthest, place - int(answer[0]), int(answer[-1]) - place)
    return farthest


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in REACH for stage in REACH[name]])
def test_the_reach_of_a_network_is_what_its_constant_says(name, stage):
    model = MODELS[name](base_channels=1)
    model.set_stage(stage)
    assert measured_reach(model) == REACH[name][stage]


@pytest.mark.parametrize("length", [16, 320, 336, 512, 1008, 4096])
def test_tiles_cover_an_axis_once(length):
    offsets, weights = plan_axis(length, tile=320, margin=122)
    total = np.zeros(length)
    for offset, own in zip(offsets, weights, strict=True):
        assert offset % STEP == 0
        assert offset + len(own) <= length
        assert not own[:122].any() or offset == 0
        assert not own[-122:].any() or offset + len(own) == length
        total[offset:offset + len(own)] += own
    assert np.abs(total - 1).max() < 1e-6
    assert len(offsets) == (1 if length <= 320 else len(set(offsets)))


@pytest.mark.parametrize(("stage", "kind", "scale", "tile", "size"), [
    (4, ProgressiveUNet, None, 304, (470, 357)), (4, ProgressiveUNet, 128, 304, (200, 391)),
    (4, UNet, None, 272, (333, 290)), (3, ProgressiveUNet, None, 304, (350, 421)),
    (2, ProgressiveUNet, 32, 288, (301, 399))])
def test_tiles_equal_the_whole_image(stage, kind, scale, tile, size, tmp_path):
    model = lively_model(stage, in_channels=3, out_channels=2, kind=kind)
    path = write_checkpoint(tmp_path / "a.pth", model, "tile")
    image = noisy_image(*size, 3)
    whole, tiled = (Predictor(path, "cpu", "float32", tile=side, batch_size=3, scale=scale).predict(image)
                    for side in (1024, tile))
    assert whole.shape == tiled.shape == (*size, 2)
    assert whole.dtype == np.float32
    assert whole.std() > 0.02, "a network that says the same everywhere proves nothing"
    assert np.abs(whole - tiled).max() < 1e-4, "1e-3 is promised; float32 does better"


def test_tiles_equal_the_whole_image_with_trained_weights(trained_run, tmp_path):
    checkpoint = load_checkpoint(trained_run[0] / "best_stage_4.pth")
    save_checkpoint(tmp_path / "tile.pth", checkpoint | {"data": replace(checkpoint["data"], sizing="tile")})
    image = np.vstack([draw_pair(np.random.default_rng(i), 360)[0] for i in range(2)])[:450]
    whole, tiled = (Predictor(tmp_path / "tile.pth", "cpu", "float32", tile=side).predict(image)
                    for side in (1024, 304))
    assert np.abs(whole - tiled).max() < 1e-4


def test_a_margin_short_of_the_reach_would_be_seen(tmp_path, monkeypatch):
    """The test above can fail: with hardly a margin its seams are far beyond what is promised."""
    path = write_checkpoint(tmp_path / "a.pth", lively_model(), "tile")
    image = noisy_image(400, 400)
    whole = Predictor(path, "cpu", "float32").predict(image)
    monkeypatch.setitem(REACH["pgunet"], 4, 8)
    assert np.abs(Predictor(path, "cpu", "float32", tile=304).predict(image) - whole).max() > 1e-3


@pytest.mark.parametrize("sizing", ["resize", "tile"])
@pytest.mark.parametrize("size", [(1, 1), (5, 40), (63, 65), (256, 256), (300, 17)])
def test_every_size_and_mode_is_segmented(sizing, size, tmp_path):
    path = write_checkpoint(tmp_path / "a.pth", lively_model(in_channels=3), sizing)
    predictor = Predictor(path, "cpu", "float32")
    grey = noisy_image(*size)[..., 0]
    save_png(tmp_path / "grey.png", grey)
    expected = predictor.predict(tmp_path / "grey.png")
    assert expected.shape == (*size, 1)
    assert expected.min() >= 0
    assert expected.max() <= 1
    for same in (str(tmp_path / "grey.png"), grey, grey.astype(np.uint16) * 257, grey / 255,
                 np.dstack([grey] * 3), Image.fromarray(grey)):
        assert np.array_equal(predictor.predict(same), expected)


def test_resizing_is_what_training_validates(tmp_path):
    """A 256x256 image passes unchanged; a large one as its area means, its logits enlarged again."""
    model = lively_model()
    predictor = Predictor(write_checkpoint(tmp_path / "a.pth", model), "cpu", "float32")
    image = noisy_image(512, 384)
    small = torch.from_numpy(resize(image, FINEST).transpose(2, 0, 1) / np.float32(255))[None]
    with torch.inference_mode():
        logits = torch.nn.functional.interpolate(model(small), (512, 384), mode="bilinear", antialias=True)
    assert np.abs(predictor.predict(image)[..., 0] - logits.sigmoid()[0, 0].numpy()).max() < 1e-6


@pytest.mark.parametrize("sizing", ["resize", "tile"])
def test_folds_and_views_are_averaged(sizing, tmp_path):
    paths = [write_checkpoint(tmp_path / f"{seed}.pth", lively_model(seed=seed), sizing) for seed in (1, 2)]
    image = noisy_image(*((256, 256) if sizing == "resize" else (96, 128)))
    single = [Predictor(path, "cpu", "float32").predict(image) for path in paths]
    both = Predictor(paths, "cpu", "float32").predict(image)
    assert np.abs(both - np.mean(single, axis=0)).max() < 1e-6
    assert np.abs(single[0] - single[1]).max() > 0.01
    # An average over all views turns with the image.
    augmenting = Predictor(paths[0], "cpu", "float32", augment=True)
    turned = augmenting.predict(np.rot90(image)[:, ::-1])
    straight = augmenting.predict(image)
    assert np.abs(np.rot90(straight)[:, ::-1] - turned).max() < 1e-5
    assert np.abs(straight - single[0]).max() > 1e-3


def test_predictor_refuses(tmp_path):
    grey = write_checkpoint(tmp_path / "grey.pth", lively_model())
    rgb = write_checkpoint(tmp_path / "rgb.pth", lively_model(in_channels=3))
    tile = write_checkpoint(tmp_path / "tile.pth", lively_model(), "tile")
    odd = torch.load(grey, weights_only=True)
    torch.save(odd | {"data": odd["data"] | {"sizing": "stretch"}}, tmp_path / "odd.pth")
    for arguments, words in [(([grey, rgb],), "must agree"), (([],), "empty"),
                             ((tmp_path / "odd.pth",), "sizing is 'stretch'"),
                             ((tmp_path / "none.pth",), "no such file")]:
        with pytest.raises(ValueError, match=words):
            Predictor(*arguments)
    for tile_side in (200, 1000):
        with pytest.raises(ValueError, match="multiple of 16 and at least 304"):
            Predictor(tile, tile=tile_side)
    with pytest.raises(ValueError, match="logits at 32, 64, 128, 256"):
        Predictor(grey, scale=100)
    assert tile_margin(lively_model(2)) == (26 + 3) * 4
    assert "stage 4, luminance, native scale in tiles of 1024" in str(Predictor(tile, "cpu"))


def stained(purple: float, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw nine dark discs on a ground that is green-poor by `purple`: image (128, 128, 3) uint8 and mask bool."""
    rows, columns = np.mgrid[:128, :128]
    mask = np.hypot(rows % 42 - 21, columns % 42 - 21) <= radius
    image = np.where(mask[..., None], 0.3, np.array([0.8, 0.8 - purple, 0.8]))
    return np.round(255 * image).astype(np.uint8), mask


def test_what_is_unlike_the_training_images_is_said(tmp_path):
    ranges = ranges_over([describe(*stained(purple, radius)) for purple in (0.2, 0.3) for radius in (7, 9)])
    assert ranges["area of nuclei"][0] == pytest.approx(149, abs=3), "149 pixels in a disc of radius 7"
    path = write_checkpoint(tmp_path / "a.pth", lively_model(in_channels=3), ranges=ranges)
    predictor = Predictor(path, "cpu")

    def verdict(image, mask):
        predictor.recipe = replace(predictor.recipe, sizing="tile")  # at the scale of these numbers
        return predictor.unlike_training(image, mask[..., None].astype(np.float32))

    assert verdict(*stained(0.25, 8)) is None
    assert "blue minus green" in verdict(*stained(0.0, 8)), "another stain of the same brightness of red and blue"
    image, mask = stained(0.25, 8)
    assert "area of nuclei 12" in verdict(image, stained(0.25, 20)[1]), "discs of radius 20 have 1257 pixels"
    assert "brightness" in verdict(image // 8, mask)
    assert verdict(image, np.zeros_like(mask)) is None, "no nucleus has no size"
    predictor.recipe = replace(predictor.recipe, training_ranges={})
    assert verdict(image // 8, mask) is None, "a checkpoint from before says nothing"


def test_nuclei_are_compared_at_the_scale_of_the_network(tmp_path):
    image, mask = stained(0.25, 8)
    large = resize(mask[..., None].astype(np.uint8) * 255, 256)[..., 0] > 127
    ranges = ranges_over([describe(resize(image, 256), large)])
    predictor = Predictor(write_checkpoint(tmp_path / "a.pth", lively_model(in_channels=3), ranges=ranges), "cpu")
    twice = np.kron(image, np.ones((2, 2, 1), np.uint8)), np.kron(mask, np.ones((2, 2), bool))
    for pixels, nuclei in ((image, mask), twice):
        assert predictor.unlike_training(pixels, nuclei[..., None].astype(np.float32)) is None


# ---- separation


def two_discs(distance: float, radius: float = 20.0) -> np.ndarray:
    rows, columns = np.mgrid[:100, :140]
    return np.minimum(np.hypot(rows - 50, columns - 50), np.hypot(rows - 50, columns - 50 - distance)) <= radius


def test_touching_discs_are_separated_where_they_touch():
    probability = two_discs(34).astype(np.float32)
    assert ndimage.label(probability)[1] == 1
    nuclei = separate_nuclei(probability)
    assert nuclei.dtype == np.int32
    assert nuclei.max() == 2
    assert np.array_equal(nuclei > 0, probability > 0.5), "nothing of the foreground is lost"
    assert nuclei[50, 60] != nuclei[50, 74]
    areas = np.bincount(nuclei.ravel())[1:]
    assert abs(areas[0] - areas[1]) < 40
    assert separate_nuclei(two_discs(8).astype(float)).max() == 1, "a slightly long nucleus stays whole"


def test_a_boundary_channel_separates_what_its_shape_does_not():
    probability = np.zeros((40, 80))
    probability[10:30, 10:70] = 1
    line = np.zeros((40, 80))
    line[:, 39:41] = 1
    assert separate_nuclei(probability).max() == 1
    nuclei = separate_nuclei(probability, boundary=line)
    assert nuclei.max() == 2
    assert np.array_equal(nuclei > 0, probability > 0)
    assert nuclei[20, 38] != nuclei[20, 41]


def test_small_and_thin_nuclei_and_holes():
    probability = np.zeros((60, 60, 1))
    probability[2:4, 2:50] = 0.9     # thin, 96 pixels
    probability[10:14, 10:14] = 0.9  # small, 16 pixels
    probability[30:50, 30:50] = 0.9
    probability[38:41, 38:41] = 0.1  # a hole
    nuclei = separate_nuclei(probability)
    assert sorted(np.bincount(nuclei.ravel())[1:]) == [96, 400]
    assert separate_nuclei(probability, min_area=10).max() == 3
    assert separate_nuclei(probability, threshold=0.95).max() == 0
    with pytest.raises(ValueError, match="the first two must lie"):
        separate_nuclei(probability, threshold=1.5)
    with pytest.raises(ValueError, match="one channel"):
        separate_nuclei(np.zeros((5, 5, 2)))


def test_separation_of_a_drawn_field_recovers_its_nuclei():
    rng = np.random.default_rng(1)
    drawn = np.zeros((300, 300), np.int32)
    rows, columns = np.mgrid[:300, :300]
    for k in range(1, 200):
        disc = np.hypot(rows - rng.uniform(0, 300), columns - rng.uniform(0, 300)) <= rng.uniform(9, 14)
        if (disc & (drawn > 0)).sum() < 0.08 * disc.sum():
            drawn[disc & (drawn == 0)] = k
    joined = ndimage.label(drawn > 0)[0]
    separated = separate_nuclei((drawn > 0).astype(np.float32))
    assert instance_metrics(separated, drawn)["aji"] > 0.85
    assert instance_metrics(joined, drawn)["aji"] < 0.6


# ---- scores and their comparison


def read_rows(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scored(values: list[float]) -> list[dict]:
    return [{"image": str(i), "dice": value, "empty": 0} for i, value in enumerate(values)]


def test_interval_of_the_mean_is_that_of_theory():
    values = np.random.default_rng(0).normal(0.8, 0.05, 400)
    summary = summarise(scored(list(values)))["dice"]
    half = 1.96 * values.std() / 20
    assert summary["mean"] == pytest.approx(values.mean())
    assert summary["low"] == pytest.approx(values.mean() - half, abs=0.0005)
    assert summary["high"] == pytest.approx(values.mean() + half, abs=0.0005)
    assert summarise(scored(list(values)))["dice"] == summary, "the same seed gives the same interval"


def test_comparison_is_paired():
    """A constant lead is certain although the images differ far more than the two checkpoints."""
    values = np.random.default_rng(0).uniform(0.2, 0.9, 12)
    noise = np.random.default_rng(1).normal(0, 0.002, 12)
    result = compare(scored(list(values + 0.01 + noise)), scored(list(values)))["dice"]
    assert result["difference"] == pytest.approx(0.01 + noise.mean())
    assert 0 < result["low"] < result["difference"] < result["high"] < 0.02
    assert result["p_bootstrap"] < 0.001
    assert result["p_wilcoxon"] == pytest.approx(2 / 2 ** 12)  # of 2**12 signs, all plus or all minus
    same = compare(scored(list(values)), scored(list(values)))["dice"]
    assert (same["difference"], same["p_bootstrap"], same["p_wilcoxon"]) == (0, 1, 1)
    with pytest.raises(ValueError, match="different images"):
        compare(scored([1.0]), scored([1.0, 0.5]))


def tile_data_set(root):
    """What a converter of large images leaves: tiles, and beside them whole images with instance maps."""
    write_data_set(root, counts=(2, 1, 2))
    (root / "dataset.json").write_text('{"format": 1, "sizing": "tile", "source": "drawn", "microns_per_pixel": null}')
    for kind in ("images", "masks", "instances"):
        (root / "whole/test" / kind).mkdir(parents=True)
    nuclei = labelled((330, 350), (20, 40, 20, 40), (20, 40, 40, 60), (200, 230, 100, 130))
    save_png(root / "whole/test/images/large.png", np.where(nuclei > 0, 60, 190).astype(np.uint8))
    save_png(root / "whole/test/masks/large.png", nuclei > 0)
    save_png(root / "whole/test/instances/large.png", (nuclei * 1000).astype(np.uint16))
    return root


def test_tiles_train_and_whole_images_are_predicted_at_native_scale(tmp_path, capsys):
    """From a data set of tiles to a test score of a larger whole image; the checkpoint tells how it was trained."""
    root = write_data_set(tmp_path / "data", counts=(2, 1, 1), side=256)
    (root / "dataset.json").write_text('{"format": 1, "sizing": "tile", "source": "drawn", "microns_per_pixel": null}')
    for kind in ("images", "masks"):
        (root / "whole/test" / kind).mkdir(parents=True)
    image, mask = draw_pair(np.random.default_rng(5), 300)
    save_png(root / "whole/test/images/large.png", image)
    save_png(root / "whole/test/masks/large.png", mask)
    assert train_papsmear.main(["--data_root", str(root), "--output_dir", str(tmp_path), "--experiment_name", "tiles",
                                *TINY]) == 0
    assert load_checkpoint(tmp_path / "tiles/best_stage_4.pth")["data"].sizing == "tile"
    assert Predictor(tmp_path / "tiles/best_stage_4.pth").predict(image).shape == (300, 300, 1)
    assert "large" in (tmp_path / "tiles/test_scores.csv").read_text()
    save_png(root / "train/images/train_0.png", image)
    save_png(root / "train/masks/train_0.png", mask)
    assert train_papsmear.main(["--data_root", str(root), "--output_dir", str(tmp_path), *TINY]) == 2
    assert "300x300 pixels; dataset.json says" in capsys.readouterr().err


def test_whole_images_and_instance_maps_are_scored(tmp_path, capsys):
    root = tile_data_set(tmp_path / "data")
    (pair,) = scored_pairs(root, "test")
    assert pair.image == root / "whole/test/images/large.png"
    drawn = drawn_nuclei(pair, load_mask(pair.mask)[..., 0])
    assert sorted(np.unique(drawn)) == [0, 1000, 2000, 3000]
    path = write_checkpoint(tmp_path / "a.pth", lively_model(), "tile")
    assert evaluate_papsmear.main([str(path), "--data_root", str(root), "--instances", "--out", str(tmp_path / "e"),
                                   "--device", "cpu"]) == 0
    assert "drawn nuclei of 1 images from their instance maps, of 0" in capsys.readouterr().out
    scores = json.loads((tmp_path / "e/summary.json").read_text())["scores"]
    row = read_rows(tmp_path / "e/scores.csv")[0]
    assert row["nuclei_drawn"] == "3"
    assert float(row["aji"]) == scores["aji"]["mean"]
    (root / "whole/test/instances/large.png").unlink()
    assert drawn_nuclei(pair, load_mask(pair.mask)[..., 0]).max() == 2, "without a map touching nuclei are one"
    (root / "splits.csv").write_text("path,split\ntest/images/test_0.png,test\n")
    assert scored_pairs(root, "test")[0].name == "test_0", "a splits.csv decides"


def test_evaluation_repeats_the_table_of_the_training(trained_run, shared_root, tmp_path, capsys):
    folder = trained_run[0]
    before = {p: p.stat().st_mtime_ns for p in shared_root.rglob("*")}
    options = [str(folder / "best_stage_4.pth"), "--data_root", str(shared_root), "--out", str(tmp_path / "e"),
               "--instances", "--all_scales", "--compare", str(folder / "best_stage_3.pth")]
    assert evaluate_papsmear.main(options) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "e/summary.json").read_text())
    trained = json.loads((folder / "test_scores.json").read_text())["best_stage_4"]
    assert summary["scores"]["dice"] == trained["dice"]
    assert set(summary["scales"]) == {"32", "64", "128", "256"}
    assert summary["scales"]["256"]["dice"] == pytest.approx(trained["dice"]["mean"])
    difference = summary["comparison"]["dice"]["difference"]
    assert difference == pytest.approx(trained["dice"]["mean"] - summary["other_scores"]["dice"]["mean"])
    assert "p Wilcoxon" in printed
    assert "of 3 as the connected parts of the mask" in printed
    for name in ("scores.csv", "scores_compared.csv"):
        assert len(read_rows(tmp_path / "e" / name)) == 3
    assert load_image(tmp_path / "e/cases.png", 3).std() > 10
    assert {p: p.stat().st_mtime_ns for p in shared_root.rglob("*")} == before
    assert evaluate_papsmear.main(options) == 2
    assert "--overwrite" in capsys.readouterr().err


# ---- prediction from the shell


def test_the_files_of_a_prediction(trained_run, tmp_path, capsys):
    image, mask = draw_pair(np.random.default_rng(5), 90)
    save_png(tmp_path / "cell.png", image)
    checkpoint = str(trained_run[0] / "best_stage_4.pth")
    probability = Predictor(checkpoint).predict(image)[..., 0]
    threshold = f"{np.quantile(probability, 0.8):.4f}"  # so that there is foreground after so short a training
    command = [checkpoint, str(tmp_path / "cell.png"), "--out", str(tmp_path / "out"), "--probability",
               "--pixel_size", "0.5", "--threshold", threshold, "--min_area", "5"]
    assert predict_papsmear.main(command) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"cell_mask.png", "cell_probability.png", "cell_instances.png",
                                               "cell_overlay.png", "nuclei.csv"}
    written = np.asarray(Image.open(out / "cell_mask.png"))
    assert set(np.unique(written)) == {0, 255}
    assert np.array_equal(written == 255, probability >= float(threshold))
    deep = np.asarray(Image.open(out / "cell_probability.png"))
    assert deep.dtype == np.uint16
    assert np.abs(deep / 65535 - probability).max() < 1e-4
    nuclei = load_instances(out / "cell_instances.png")
    rows = read_rows(out / "nuclei.csv")
    assert len(rows) == nuclei.max() > 0
    for row in rows:
        own = nuclei == int(row["label"])
        assert int(row["area"]) == own.sum()
        assert float(row["area_um2"]) == pytest.approx(own.sum() * 0.25)
        assert float(row["centroid_row"]) == pytest.approx(np.nonzero(own)[0].mean(), abs=0.01)
        assert float(row["centroid_column_um"]) == pytest.approx(np.nonzero(own)[1].mean() * 0.5, abs=0.01)
        assert float(row["mean_probability"]) == pytest.approx(probability[own].mean(), abs=1e-3)
    assert np.array_equal((load_image(out / "cell_overlay.png", 3) == OUTLINE).all(axis=2),
                          boundary(nuclei))
    assert predict_papsmear.main(command) == 2
    assert "nothing is overwritten unasked" in capsys.readouterr().err
    assert predict_papsmear.main([*command, "--overwrite"]) == 0


def test_one_bad_file_does_not_stop_a_folder_and_black_is_said(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    save_png(folder / "a.png", noisy_image(40, 50))
    (folder / "b.png").write_bytes(b"no image")
    save_png(folder / "c.png", np.zeros((70, 70), np.uint8))
    (folder / "notes.txt").write_text("left alone")
    path = write_checkpoint(tmp_path / "a.pth", lively_model())
    command = [str(path), str(folder), "--out", str(tmp_path / "out"), "--threshold", "0.9999", "--max_pixels", "3000"]
    assert predict_papsmear.main(command) == 1
    said = capsys.readouterr()
    assert "2 of 3 files failed" in said.err
    assert "b.png: not a readable image" in said.err
    assert "c.png: 70x70 pixels" in said.err
    assert "Traceback" not in said.err
    highest = Predictor(path).predict(folder / "a.png").max()
    assert f"ALL BLACK, highest probability {highest:.3f}" in said.out
    assert "1 of 3 images came out all black" in said.out
    assert (tmp_path / "out/a_mask.png").exists()


def test_results_of_other_images_stay(tmp_path, capsys):
    for name in "ab":
        save_png(tmp_path / f"{name}.png", noisy_image(64, 64))
    save_png(tmp_path / "._a.png", noisy_image(9, 9))
    (tmp_path / "c.png").write_bytes(b"no image")
    path, out = write_checkpoint(tmp_path / "a.pth", lively_model(), sizing="tile"), tmp_path / "out"

    def predict(*given: str, code: int = 0) -> list[str]:
        command = [str(path), *(str(tmp_path / name) for name in given), "--out", str(out), "--overwrite",
                   "--min_area", "0"]
        assert predict_papsmear.main(command) == code
        return [row["image"] for row in read_rows(out / "nuclei.csv")] if (out / "nuclei.csv").exists() else []

    assert predict("c.png", code=1) == []
    assert "look at" not in capsys.readouterr().out
    both = predict("a.png", "b.png")
    assert set(both) == {"a.png", "b.png"}
    assert sorted(predict("a.png")) == both
    (out / "a_mask.tif").write_bytes(b"of an earlier, streamed prediction")
    (out / "a.png").write_bytes(b"no result")
    assert sorted(predict("a.png", "c.png", code=1)) == both
    assert not (out / "a_mask.tif").exists()
    assert (out / "a.png").exists()
    assert predict_papsmear.main([str(path), str(out / "a_mask.png"), "--out", str(out), "--overwrite"]) == 2
    assert "Choose another --out" in capsys.readouterr().err
    assert [p.name for p in predict_papsmear.list_images([str(tmp_path)])] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("main", [predict_papsmear.main, evaluate_papsmear.main])
def test_results_go_to_no_file(main, tmp_path, capsys):
    (tmp_path / "f").write_text("")
    assert main(["a.pth", *(["a.png"] if main is predict_papsmear.main else []), "--out", str(tmp_path / "f")]) == 2
    assert "is a file; results go to a folder" in capsys.readouterr().err


def test_shards_share_the_list(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abcde":
        save_png(folder / f"{name}.png", noisy_image(40, 50))
    path = write_checkpoint(tmp_path / "a.pth", lively_model(out_channels=2))
    command = [str(path), str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert predict_papsmear.main([*command, "--shard", "1/2"]) == 0
    assert {p.name[0] for p in (tmp_path / "out").glob("*_mask_2.png")} == set("ace")
    for variable, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):  # as torchrun sets them
        monkeypatch.setenv(variable, value)
    assert predict_papsmear.main(command) == 0, capsys.readouterr().err
    assert {p.name[0] for p in (tmp_path / "out").glob("*_mask_1.png")} == set("abcde")
    assert {p.name for p in (tmp_path / "out").glob("*.csv")} == {"nuclei_1_of_2.csv", "nuclei_2_of_2.csv"}


@pytest.mark.parametrize(("options", "words"), [
    (["none.pth", "IMAGE"], "none.pth: no such file"), (["CHECKPOINT", "nowhere"], "nowhere: no such file or folder"),
    (["CHECKPOINT", "EMPTY"], "no image in this folder"), (["CHECKPOINT", "IMAGE", "--shard", "3/2"], "not i/n"),
    (["CHECKPOINT", "IMAGE", "--threshold", "1"], "below 1"),
    (["CHECKPOINT", "IMAGE", "--scale", "100"], "scale is 100"),
    (["CHECKPOINT", "TWIN", "--out", "TWIN"], "Choose another --out"),
    (["CHECKPOINT", "IMAGE", "TWIN"], "both would be written as a_mask.png")])
def test_wrong_prediction_options_are_refused(options, words, tmp_path, capsys):
    save_png(tmp_path / "a.png", noisy_image(30, 30))
    (tmp_path / "empty").mkdir()
    (tmp_path / "twin").mkdir()
    save_png(tmp_path / "twin/a.png", noisy_image(30, 30))
    places = {"CHECKPOINT": str(write_checkpoint(tmp_path / "c.pth", lively_model())), "IMAGE": str(tmp_path / "a.png"),
              "EMPTY": str(tmp_path / "empty"), "TWIN": str(tmp_path / "twin")}
    images, _, others = " ".join(options).partition(" --")
    others = f"--{others}".split() if others else []
    assert predict_papsmear.main([places.get(o, o) for o in
                                  [*images.split(), "--out", str(tmp_path / "out"), *others]]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["predict_papsmear", "evaluate_papsmear"])
def test_help_needs_no_torch(script):
    code = f"import sys, {script} as s; s.build_parser().format_help(); print('torch' in sys.modules)"
    assert run_script("-c", code).stdout.strip() == "False"
    assert run_script(f"{script}.py", "--help").returncode == 0


@pytest.mark.parametrize("module", [predict_papsmear, evaluate_papsmear], ids=lambda module: module.__name__)
def test_readme_names_options_that_exist(module):
    known = set(re.findall(r"--\w+", module.build_parser().format_help()))
    lines = re.findall(rf"python {module.__name__}\.py.*", (PROJECT / "README.md").read_text() + module.__doc__)
    assert len(lines) >= 4
    assert all(set(re.findall(r"--\w+", line)) <= known for line in lines)


def test_docstring_examples_hold():
    result = doctest.testmod(inference)
    assert result.attempted >= 2
    assert result.failed == 0
