"""Tests of images and masks: what is read, what is refused, how they are reduced and augmented."""


import numpy as np
import pytest
import torch
from PIL import Image

from conftest import disc
from images.augmentation import augment, sample_numbers
from images.cache import halve
from images.files import ImageFileError, image_size, load_image, resize, save_png
from images.masks import load_mask
from images.pyramid import open_pyramids
from unet_parts import mean2x2


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


def test_levels_are_exact_means(shared_root):
    pyramid = open_pyramids(shared_root, wanted=("test",))["test"]
    for r in (128, 64, 32):
        for coarse, fine in zip(pyramid.batch(r, np.arange(3)), pyramid.batch(2 * r, np.arange(3)), strict=True):
            assert (coarse.double() - mean2x2(fine.double())).abs().max() <= 0.5
    half = torch.tensor([[255, 255], [0, 0]], dtype=torch.uint8)[None, None]
    assert halve(half).item() / 255 >= 0.5, "half covered counts as covered"
