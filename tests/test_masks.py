"""Tests of what mask files mean, and of the TIFF files in which Pillow reads something else.

    python -m pytest tests/test_masks.py
"""

import itertools
import time

import numpy as np
import pytest
import tifffile
from PIL import Image

from conftest import draw_pair, write_data_set
from images.files import ImageFileError, image_size, load_image
from images.masks import load_drawn, load_instances, load_mask
from images.numbering import odd_numbers
from images.report import check_dataset
from images.splits import DatasetError

MASK = np.zeros((24, 32), np.uint8)
MASK[4:12, 6:20] = 255
LABELS = np.where(MASK > 0, 1, 0).astype(np.uint8)
LABELS[14:20, 6:20] = 2


def with_alpha(colour, alpha=MASK, hidden=None) -> Image.Image:
    """Return an RGBA image of one colour where alpha is above 0, and of another where it is not."""
    pixels = np.full((*alpha.shape, 4), (*colour, 0), np.uint8)
    if hidden is not None:
        pixels[alpha == 0, :3] = hidden
    pixels[..., 3] = alpha
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("colour", "hidden"), [
    ((255, 255, 255), None), ((0, 0, 0), None), ((255, 0, 0), None), ((0, 0, 0), (255, 255, 255)),
    ((255, 255, 255), (0, 0, 0)), ((200, 30, 30), (90, 90, 90))])
def test_transparency_is_the_mask_where_all_that_is_visible_has_one_colour(colour, hidden, tmp_path):
    with_alpha(colour, hidden=hidden).save(tmp_path / "a.png")
    if (colour, hidden) == ((255, 0, 0), None) or len(set(colour)) > 1:
        assert np.array_equal(load_mask(tmp_path / "a.png")[..., 0], MASK > 0)
        return
    assert np.array_equal(load_mask(tmp_path / "a.png")[..., 0], MASK > 0)
    with_alpha(colour, hidden=hidden).convert("LA").save(tmp_path / "b.png")
    assert np.array_equal(load_mask(tmp_path / "b.png")[..., 0], MASK > 0)


def test_transparency_that_says_nothing_or_another_thing(tmp_path):
    opaque = Image.merge("LA", (Image.fromarray(MASK), Image.new("L", MASK.shape[::-1], 255)))
    opaque.save(tmp_path / "a.png")
    assert np.array_equal(load_mask(tmp_path / "a.png")[..., 0], MASK > 0)
    half = Image.merge("LA", (Image.fromarray(MASK), Image.fromarray(np.uint8(255 * (np.arange(32) < 30))[None]
                                                                       .repeat(24, axis=0))))
    half.save(tmp_path / "b.png")
    with pytest.raises(ImageFileError, match="both its colours and its transparency vary"):
        load_mask(tmp_path / "b.png")
    labels = Image.merge("LA", (Image.fromarray(LABELS), Image.fromarray(np.uint8(255 * (LABELS > 0)))))
    labels.save(tmp_path / "c.png")
    assert np.array_equal(load_mask(tmp_path / "c.png", 2)[..., 1], LABELS == 2), "colours and transparency agree"
    assert np.array_equal(load_instances(tmp_path / "c.png"), LABELS)


@pytest.mark.parametrize("values", [(1, 255), (1, 2, 255), (20, 255), (3, 250)])
def test_a_few_values_are_labels_however_near_to_black(values, tmp_path):
    raw = np.zeros((24, 32), np.uint8)
    for k, value in enumerate(values):
        raw[4:10, 4 + 8 * k:10 + 8 * k] = value
    Image.fromarray(raw).save(tmp_path / "a.png")
    with pytest.raises(ImageFileError, match=rf"label values {{0, {values[0]}, "):
        load_mask(tmp_path / "a.png")


def test_what_jpeg_and_smooth_edges_make_is_no_label(tmp_path):
    Image.fromarray(MASK).save(tmp_path / "a.jpg", quality=40)
    assert (load_mask(tmp_path / "a.jpg")[..., 0] == (MASK > 0)).mean() > 0.98
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    assert np.array_equal(load_mask(tmp_path / "a.png"), load_mask(tmp_path / "a.jpg"))
    smooth = np.asarray(Image.fromarray(MASK).resize((64, 48), Image.Resampling.BILINEAR))
    Image.fromarray(smooth).save(tmp_path / "b.png")
    assert np.array_equal(load_mask(tmp_path / "b.png")[..., 0], smooth >= 127.5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_labels_and_masks_of_fiji_are_read_as_they_are_stored(dtype, compression, tmp_path):
    """An inverting lookup table shows 0 as white; ImageJ measures what is stored all the same."""
    full = np.iinfo(dtype).max
    options = {"photometric": "miniswhite", "compression": compression, "metadata": None}
    for name, values in (("labels", LABELS.astype(dtype)), ("mask", (MASK > 0).astype(dtype) * full)):
        tifffile.imwrite(tmp_path / f"{name}.tif", values, description="ImageJ=1.54f\nimages=1", **options)
        tifffile.imwrite(tmp_path / f"{name}_other.tif", values, **options)
    for name in ("labels", "labels_other"):
        assert np.array_equal(load_instances(tmp_path / f"{name}.tif"), LABELS)
        assert np.array_equal(load_mask(tmp_path / f"{name}.tif", 2)[..., 1], LABELS == 2)
    assert np.array_equal(load_mask(tmp_path / "mask.tif")[..., 0], MASK > 0)
    assert np.array_equal(load_mask(tmp_path / "mask_other.tif")[..., 0], MASK == 0), "as other programs show it"
    assert np.array_equal(load_image(tmp_path / "mask.tif", 1)[..., 0], 255 - MASK), "a picture is what it looks like"


def test_booleans_of_tifffile_are_read_as_they_were_meant(tmp_path):
    """tifffile says of them that 0 is white, and stores True as 1: shown, they are inverted."""
    tifffile.imwrite(tmp_path / "a.tif", MASK > 0)
    assert np.array_equal(load_mask(tmp_path / "a.tif")[..., 0], MASK > 0)
    Image.fromarray(MASK == 0).save(tmp_path / "b.tif")
    assert np.array_equal(load_mask(tmp_path / "b.tif")[..., 0], MASK == 0), "of another program as it is shown"


def nuclei_in_rows(count=12) -> np.ndarray:
    """Return (90, 120) uint8 with nuclei of 12x12 pixels numbered 1..count, of which the upper touch."""
    labels = np.zeros((90, 120), np.uint8)
    for i in range(count):
        row, column = divmod(i, 6)
        labels[5 + 30 * row:17 + 30 * row, 4 + (12 if row == 0 else 18) * column:][:, :12] = i + 1
    return labels


SOFT = Image.fromarray(((nuclei_in_rows() > 0) * 255).astype(np.uint8)).resize((200, 150), Image.Resampling.BICUBIC)
DRAWN_AS_MASKS = {
    "hard": (nuclei_in_rows() > 0).astype(np.uint8) * 255, "smooth": np.asarray(SOFT),
    "of 16 bit": np.asarray(SOFT).astype(np.uint16) * 257, "RGB": np.repeat(np.asarray(SOFT)[..., None], 3, axis=2),
    "of 200": (nuclei_in_rows() > 0).astype(np.uint8) * 200, "empty": np.zeros((9, 9), np.uint8)}


@pytest.mark.parametrize("name", DRAWN_AS_MASKS)
def test_a_mask_in_place_of_labels_is_cut_at_half(name, tmp_path):
    """Each grey value of a smooth edge was a nucleus of its own."""
    mask = DRAWN_AS_MASKS[name]
    Image.fromarray(mask).save(tmp_path / "a.png" if mask.ndim == 3 else tmp_path / "a.tif")
    labels, is_mask, odd = load_drawn(next(tmp_path.iterdir()))
    one = len(np.unique(mask)) == 2 and mask.max() != 255  # a number, whatever it is
    grey = mask if mask.ndim == 2 else mask[..., 0]
    assert is_mask == (not one and bool(mask.any()))
    assert not odd
    assert np.array_equal(labels, grey.astype(float) >= max(grey.max() / 2, 1))


def test_a_mask_that_went_through_jpeg_and_png_is_cut_at_half(tmp_path):
    mask = DRAWN_AS_MASKS["hard"]
    Image.fromarray(mask).save(tmp_path / "a.jpg", quality=60)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "a.png")))) > 40
    labels, is_mask, _ = load_drawn(tmp_path / "a.png")
    assert is_mask
    assert (labels != (mask > 0)).mean() < 0.01


def cells_of_classes() -> np.ndarray:
    """Return a nucleus (2) within its cytoplasm (1), once."""
    labels = np.zeros((60, 60), np.uint8)
    labels[5:50, 5:50], labels[20:30, 20:30] = 1, 2
    return labels


def with_fragment(labels: np.ndarray) -> np.ndarray:
    """Return a class map with a piece of class 1 more."""
    labels[53:58, 40:48] = 1
    return labels


NO_NUMBERS = {
    "classes": (np.where(nuclei_in_rows() % 2, 1, 2) * (nuclei_in_rows() > 0), "2 of 2 numbers, e.g. 1, stand for sev"),
    "128 and 255": (np.where(nuclei_in_rows() % 2, 128, 255) * (nuclei_in_rows() > 0), "2 of 2 numbers, e.g. 128"),
    "numbers that begin again": (np.where(nuclei_in_rows(18) > 9, nuclei_in_rows(18) - 9, nuclei_in_rows(18)),
                                 "9 of 9 numbers, e.g. 1, stand for several separate pieces"),
    "a class within another": (cells_of_classes(), "1 of 2 numbers, e.g. 2, lie within another, as of classes"),
    "the same with a fragment": (with_fragment(cells_of_classes()), "1 of 2 numbers, e.g. 2, lie within another"),
    "one class rare": (np.where(nuclei_in_rows() > 1, 1, nuclei_in_rows() * 2), "1 of 2 numbers, e.g. 1, stand for"),
    "labels made smaller": (np.asarray(Image.fromarray(nuclei_in_rows() * 10).resize((80, 60), Image.Resampling.BOX)),
                            "most of them thin and at the edge of another"),
    "a smooth mask of 180": (np.asarray(SOFT) / 255 * 180, "most of them thin and at the edge of another")}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_numbers_that_are_not_of_nuclei_are_refused(name, tmp_path):
    labels, words = NO_NUMBERS[name]
    Image.fromarray(np.asarray(labels).astype(np.uint16)).save(tmp_path / "a.tif")
    with pytest.raises(ImageFileError, match=words) as caught:
        load_drawn(tmp_path / "a.tif")
    assert "Number the nuclei, or write 255" in str(caught.value)


def confluent() -> np.ndarray:
    """Return cells of 9x9 pixels without a gap."""
    return np.kron(np.arange(1, 101, dtype=np.uint16).reshape(10, 10), np.ones((9, 9), np.uint16))


def two_of_large_numbers() -> np.ndarray:
    """Return a part of a label map in which two numbers are left that could be the white of a mask."""
    labels = np.zeros((40, 40), np.uint8)
    labels[5:15, 5:15], labels[5:15, 15:25] = 240, 255
    return labels


def small_nuclei(side: int, count: int, first: int = 1) -> np.ndarray:
    """Return nuclei of side x side pixels with consecutive numbers, one pixel apart."""
    labels = np.zeros((20 * (side + 1), 20 * (side + 1)), np.uint16)
    for i in range(count):
        row, column = (n * (side + 1) for n in divmod(i, 20))
        labels[row:row + side, column:column + side] = first + i
    return labels


def with_ignored() -> np.ndarray:
    """Return nuclei 1..40 and a region of the largest number, which some use for pixels to ignore."""
    labels = small_nuclei(5, 40)
    labels[60:80, 20:60] = 65535
    return labels


@pytest.mark.parametrize("labels", [
    nuclei_in_rows(), nuclei_in_rows()[::4, ::4], confluent(), two_of_large_numbers(), small_nuclei(1, 200),
    small_nuclei(2, 250), np.kron(np.arange(60000, 60100).reshape(10, 10), np.ones((6, 6))), with_ignored(),
    np.array([[0, 1, 1, 2, 2, 0]]), np.kron(np.arange(1, 101).reshape(10, 10), np.ones((2, 2)))])
def test_numbers_of_nuclei_are_taken_as_they_are(labels, tmp_path):
    deep = labels.max() > 255
    Image.fromarray(labels.astype(np.uint16 if deep else np.uint8)).save(tmp_path / "a.tif")
    found, is_mask, odd = load_drawn(tmp_path / "a.tif")
    assert np.array_equal(found, labels)
    assert not is_mask
    assert not odd


def test_nuclei_cut_in_two_are_no_classes(tmp_path):
    """As a tile has them in which one covers another, or whose edge cuts them."""
    labels = np.zeros((64, 64), np.uint8)
    labels[10:20, 10:50], labels[5:25, 25:30], labels[:6, :20], labels[:6, 34:64] = 1, 2, 3, 3
    Image.fromarray(labels).save(tmp_path / "a.png")
    assert load_drawn(tmp_path / "a.png")[1:] == (
        False, "1 of 3 numbers, e.g. 1, stand for several separate pieces; each number counts as one nucleus")
    Image.fromarray(np.where(labels == 1, labels, 0)).save(tmp_path / "a.png")
    found, is_mask, odd = load_drawn(tmp_path / "a.png")
    assert (found.max(), is_mask, odd) == (1, False, "")


def test_large_maps_are_looked_at_in_seconds():
    """numpy.unique took half a minute for the edges of one."""
    noise = np.random.default_rng(0).integers(0, 9, (1500, 1500))
    begun = time.perf_counter()
    assert odd_numbers(noise)[1]
    assert time.perf_counter() - begun < 20


def test_a_few_numbers_in_several_pieces_are_named(tmp_path):
    labels = nuclei_in_rows()
    labels[80:83, 80:83] = 4  # of 144 pixels 9: a stray one
    Image.fromarray(labels).save(tmp_path / "a.png")
    assert load_drawn(tmp_path / "a.png")[1:] == (False, "")
    labels[80:86, 80:86] = 4
    Image.fromarray(labels).save(tmp_path / "a.png")
    assert load_drawn(tmp_path / "a.png")[2] == ("1 of 12 numbers, e.g. 4, stand for several separate pieces; each "
                                                 "number counts as one nucleus")


def test_instance_maps_that_went_through_jpeg_are_refused(tmp_path):
    Image.fromarray(LABELS * 100).save(tmp_path / "a.jpg")
    with pytest.raises(ImageFileError, match="compressed as JPEG, which changes numbers"):
        load_instances(tmp_path / "a.jpg")


TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "f2", "f4", "f8")
CODECS = ((None, False), ("zlib", False), ("zlib", True))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", TYPES)
def test_labels_of_every_kind_of_tiff(order, dtype, tmp_path):
    labels = np.arange(48 * 40).reshape(48, 40) % 120
    for (compression, predictor), tile in itertools.product(CODECS, (None, (16, 16))):
        if predictor and dtype[0] == "f" or dtype == "u8" and predictor:
            continue
        tifffile.imwrite(tmp_path / "a.tif", labels.astype(dtype), byteorder=order, compression=compression,
                         predictor=predictor, tile=tile, photometric="minisblack", metadata=None)
        assert np.array_equal(load_instances(tmp_path / "a.tif"), labels), (compression, predictor, tile)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_colours_of_every_kind_of_tiff(order, dtype, tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (48, 40, 3))
    stored = {"u1": rgb, "u2": rgb * 257, "f4": rgb / 255}[dtype].astype(dtype)
    for (compression, predictor), tile, planar in itertools.product(CODECS, (None, (16, 16)), ("contig", "separate")):
        if predictor and dtype == "f4":
            continue
        tifffile.imwrite(tmp_path / "a.tif", stored if planar == "contig" else np.moveaxis(stored, -1, 0),
                         byteorder=order, compression=compression, predictor=predictor, tile=tile, planarconfig=planar,
                         photometric="rgb", metadata=None)
        assert np.array_equal(load_image(tmp_path / "a.tif", 3), rgb), (compression, predictor, tile, planar)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_tiff_is_turned_upright(orientation, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    columns_first = grey.T if orientation > 4 else grey
    upright = columns_first[::-1 if orientation in (3, 4, 7, 8) else 1, ::-1 if orientation in (2, 3, 6, 7) else 1]
    for values, compression in itertools.product((grey, grey.astype(np.uint16) * 257), (None, "zlib")):
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", metadata=None, compression=compression,
                         extratags=[(274, "H", 1, orientation, True)])
        assert np.array_equal(load_image(tmp_path / "a.tif", 1)[..., 0], upright), (values.dtype, compression)
        assert image_size(tmp_path / "a.tif") == upright.shape


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_tile_that_was_never_written_is_refused(compression, tmp_path):
    def tiles():
        for i in range(4):
            yield None if i == 2 else np.full((16, 16), 50, np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", tiles(), shape=(32, 32), dtype=np.uint8, tile=(16, 16),
                     photometric="minisblack", compression=compression)
    with pytest.raises(ImageFileError, match="1 of 4 tiles were never written"):
        load_image(tmp_path / "a.tif", 1)


def data_set_of(tmp_path, change) -> None:
    """Write a data set whose masks are changed."""
    tmp_path.mkdir(exist_ok=True)
    root = write_data_set(tmp_path / "data")
    for path in root.glob("*/masks/*.png"):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)
    return root


def test_the_report_doubts_masks_that_cannot_be_meant(tmp_path):
    inverted = check_dataset(data_set_of(tmp_path / "a", lambda mask: 255 - mask)).warnings
    assert any("of the pixels of train are foreground, which is much for nuclei" in w for w in inverted)
    assert any("in none of 12 images is what the mask marks darker than the rest" in w for w in inverted)
    with pytest.raises(DatasetError, match="its masks .6. are foreground from edge to edge"):
        check_dataset(data_set_of(tmp_path / "b", lambda mask: np.full_like(mask, 255)))

    def point(mask):
        small = np.zeros_like(mask)
        small[30, 30] = 255
        return small
    points = check_dataset(data_set_of(tmp_path / "c", point)).warnings
    assert any("no object in the masks of train has more than 12 pixels at 256x256" in w for w in points)
    assert check_dataset(data_set_of(tmp_path / "d", lambda mask: mask)).warnings == []


def test_the_report_says_how_masks_were_read(tmp_path):
    root = write_data_set(tmp_path / "data")
    _, mask = draw_pair(np.random.default_rng(0))
    (root / "train/masks/train_0.png").unlink()
    tifffile.imwrite(root / "train/masks/train_0.tif", np.uint8(255 * ~mask), photometric="miniswhite", metadata=None)
    with_alpha((9, 9, 9), np.uint8(255 * mask)).save(root / "train/masks/train_1.png")
    found = check_dataset(root).warnings
    assert [w.split(", e.g.")[0] for w in found] == [
        "1 mask(s) in which 0 is stored for white, read as it is shown: white is foreground",
        "1 mask(s) of one colour with varying transparency, read from the alpha channel: opaque is foreground"]


@pytest.mark.parametrize("colours", [((1, 0, 0), (2, 0, 0)), ((1, 0, 0), (0, 2, 0)), ((0, 0, 1), (0, 0, 1))])
@pytest.mark.parametrize("classes", [1, 2])
def test_small_numbers_in_one_channel_are_no_grey(colours, classes, tmp_path):
    mask = np.zeros((40, 40, 3), np.uint8)
    mask[5:20, 5:20], mask[22:35, 22:35] = colours
    Image.fromarray(mask).save(tmp_path / "a.png")
    with pytest.raises(ImageFileError, match="a colour-coded mask"):
        load_mask(tmp_path / "a.png", classes)
    Image.fromarray(np.repeat(mask.max(2, keepdims=True), 3, 2)).save(tmp_path / "grey.png")
    assert load_mask(tmp_path / "grey.png", 2).any(axis=2).sum() == 15 * 15 + 13 * 13
