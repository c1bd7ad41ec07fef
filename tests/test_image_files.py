"""Tests of reading and writing images: arrays, layouts of TIFF, and bands of large images.

    python -m pytest tests/test_image_files.py
"""


import struct
import zlib
from functools import partial

import numpy as np
import pytest
import tifffile
from PIL import Image

from conftest import noisy_image
from images import bands as image_bands
from images.bands import BandStore, ImageRows, TiffLayout, even_spans, small_tiff, windows, write_tiff
from images.files import ImageFileError, image_size, load_image, save_png, to_image
from images.masks import load_instances, load_mask

# ---- images in memory and whole files


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
    (np.full((5, 5), 200.0), r"must lie in \[0, 1\]"), (np.full((5, 5), np.nan), "25 of 25 values are infinite"),
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


# ---- files in bands


def save_tiled(path, image, compression, side=64):
    """Write tiles of a compression that tifffile cannot write by itself: Pillow encodes each as a file of its own."""
    parts = []
    for top in range(0, image.shape[0], side):
        for left in range(0, image.shape[1], side):
            tile = np.zeros((side, side, *image.shape[2:]), np.uint8)
            piece = image[top:top + side, left:left + side]
            tile[:piece.shape[0], :piece.shape[1]] = piece
            Image.fromarray(tile).save(path, format="TIFF", compression=compression, strip_size=10 ** 6)
            with tifffile.TiffFile(path) as file:
                page = file.pages[0]
                tags = {tag.code: image_bands._raw_tag(file, tag) for tag in page.tags
                        if tag.code in image_bands.DECODING_TAGS}
                parts.append(path.read_bytes()[page.dataoffsets[0]:page.dataoffsets[0] + page.databytecounts[0]])
    tags |= {256: image_bands._numbers("<", [image.shape[1]]), 322: image_bands._numbers("<", [side]),
             323: image_bands._numbers("<", [side])}
    path.write_bytes(small_tiff(TiffLayout("<", tags, True, side, []), image.shape[0], parts))


def tiffs() -> dict:
    """Name -> how to write the file, an image of 301x203 pixels."""
    rgb = noisy_image(301, 203, 3)
    grey, deep = rgb[..., 0], rgb.astype(np.uint16) * 257 + np.arange(203, dtype=np.uint16)[:, None] % 99
    strips = {"strip_size": 203 * 40}
    ways = {
        "one_strip": lambda path: tifffile.imwrite(path, rgb, photometric="rgb"),
        "tiled_deflate": lambda path: tifffile.imwrite(path, rgb, photometric="rgb", tile=(64, 48), compression="zlib"),
        "tiled_planar": lambda path: tifffile.imwrite(path, rgb.transpose(2, 0, 1), photometric="rgb", tile=(64, 64),
                                                      planarconfig="separate"),
        "big_endian_16_bit": lambda path: tifffile.imwrite(path, deep[..., 0].astype(">u2"), byteorder=">",
                                                           tile=(64, 64), compression="zlib"),
        "rgb_16_bit": lambda path: tifffile.imwrite(path, deep, photometric="rgb", rowsperstrip=40, compression="zlib"),
        "bigtiff": lambda path: tifffile.imwrite(path, rgb, photometric="rgb", tile=(64, 64), bigtiff=True),
        "alpha": lambda path: Image.fromarray(np.dstack([rgb, grey])).save(path, compression="tiff_lzw", **strips),
        "palette": lambda path: Image.fromarray(rgb).quantize(99).save(path, compression="packbits", **strips)}
    for name in ("tiff_lzw", "jpeg", "tiff_adobe_deflate"):
        ways |= {f"strips_{name}": lambda path, name=name: Image.fromarray(rgb).save(path, compression=name, **strips),
                 f"grey_{name}": lambda path, name=name: Image.fromarray(grey).save(path, compression=name, **strips),
                 f"tiles_{name}": lambda path, name=name: save_tiled(path, rgb, name)}
    return ways


@pytest.mark.parametrize("way", tiffs())
def test_bands_of_a_tiff_are_the_pixels_of_the_whole(way, tmp_path, monkeypatch):
    monkeypatch.setattr(image_bands, "BAND_PIXELS", 9000)
    tiffs()[way](tmp_path / "a.tif")
    for channels in (1, 3):
        rows = ImageRows(tmp_path / "a.tif", channels)
        bands = list(rows)
        assert rows.in_parts
        assert (rows.height, rows.width) == (301, 203)
        assert max(map(len, bands)) <= 64, "one row of tiles or strips at a time"
        assert np.array_equal(np.concatenate(bands), load_image(tmp_path / "a.tif", channels))


def test_what_cannot_be_read_in_parts_is_read_whole(tmp_path):
    rgb = Image.fromarray(noisy_image(90, 60, 3))
    turned = Image.Exif()
    turned[0x0112] = 6
    rgb.save(tmp_path / "turned.tif", exif=turned, compression="tiff_lzw", strip_size=2000)
    rgb.save(tmp_path / "one.tif", compression="tiff_lzw", strip_size=10 ** 6)
    rgb.save(tmp_path / "photo.png")
    for name in ("turned.tif", "one.tif", "photo.png"):
        rows = ImageRows(tmp_path / name, 3)
        assert not rows.in_parts
        assert np.array_equal(np.concatenate(list(rows)), load_image(tmp_path / name, 3))
    assert (ImageRows(tmp_path / "turned.tif", 3).height, rows.height) == (60, 90)


def test_damaged_and_too_large_tiffs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_bands, "BAND_PIXELS", 9000)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noisy_image(300, 200, 3), photometric="rgb", tile=(64, 64), compression="zlib")
    with pytest.raises(ImageFileError, match="300x200 pixels.*--max_pixels"):
        ImageRows(path, 3, max_pixels=59_999)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        middle, end = file.pages[0].dataoffsets[8], file.pages[0].dataoffsets[-1]
    path.write_bytes(data[:end + 9])
    with pytest.raises(ImageFileError, match="a.tif: damaged or cut off"):
        list(ImageRows(path, 3))
    data[middle:middle + 40] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(ImageFileError, match="a.tif: damaged or cut off"):
        list(ImageRows(path, 3))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_bands_are_stored_and_written(dtype, tmp_path):
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (700, 1100), dtype=dtype)
    with BandStore(tmp_path) as store:
        for start, stop in even_spans(700, 150):
            store.append(array[start:stop])
        assert np.array_equal(np.concatenate(list(store)), array)
        write_tiff(tmp_path / "a.tif", store, 700, 1100, dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"], "the store leaves nothing"
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), array)
    assert Image.open(tmp_path / "a.tif").size == (1100, 700)


def test_windows_of_one_band():
    assert [list(part) for part in windows(iter([np.arange(5)]), [(0, 5)])] == [[0, 1, 2, 3, 4]]


def save_png16(path, pixels) -> None:
    """Write (H, W, 2), (H, W, 3) or (H, W, 4) as PNG of 16 bit, which Pillow cannot."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_png_of_16_bit_with_colours_or_transparency(channels, tmp_path):
    """Of such a file the upper 8 bit alone are read: what lies in the lower ones is refused, not read as black."""
    path = tmp_path / "a.png"
    pixels = np.full((20, 24, channels), 65535)
    pixels[5:15, 5:15, :3 - 2 * (channels == 2)] = 40000
    save_png16(path, pixels)
    assert np.array_equal(np.unique(load_image(path, 1)), [40000 >> 8, 255])
    assert load_image(path, 1, max_value=65535).max() == 255
    with pytest.raises(ImageFileError, match="--max_value 16383 says what is white"):
        load_image(path, 1, max_value=16383)
    with pytest.raises(ImageFileError, match="of which only the upper 8 bit"):
        load_instances(path)
    for largest in (1, 1023, 4095):
        save_png16(path, pixels // 65535 * largest)
        for read in (partial(load_image, channels=3), partial(load_image, channels=3, max_value=4095), load_mask):
            with pytest.raises(ImageFileError, match="Save it as TIFF, or with 8 bit"):
                read(path)
    save_png16(path, pixels // 65535 * 65535)
    assert load_mask(path).sum() == 20 * 24 - 100


def test_floating_point_below_1_is_none_of_a_camera(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20))
    with pytest.raises(ImageFileError, match="which lie in 0..1 already"):
        load_image(tmp_path / "a.tif", 1, max_value=4095)
    assert load_image(tmp_path / "a.tif", 1, max_value=1).max() == 255


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.int32, np.float32, np.float64])
def test_white_of_colours_of_every_type(dtype, tmp_path):
    rgb = np.random.default_rng(0).integers(0, 4096, (30, 40, 3)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb")
    assert np.array_equal(load_image(tmp_path / "a.tif", 3, max_value=4095), np.round(rgb * (255 / 4095)))
