"""Tests of images that are read, predicted, separated and written in bands.

    python -m pytest tests/test_large_images.py
"""

import doctest
import errno
import re
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage
from skimage.measure import regionprops_table

import predict_papsmear
from conftest import write_checkpoint
from images import bands as image_bands
from images.bands import BandStore, ImageRows, TiffLayout, even_spans, small_tiff, windows, write_tiff
from images.files import ImageFileError, load_image, load_instances, save_png
from inference import Predictor, plan_axis
from nuclei import blocks as block_separation
from nuclei import streaming
from nuclei.blocks import BlockSeparation
from nuclei.measurement import NucleusSums
from nuclei.outlines import OUTLINE, boundary
from nuclei.separation import separate_nuclei
from scoring.measures import instance_metrics
from system.atomic import finished_files
from tests.test_inference import lively_model, noisy_image, random_nuclei, read_rows

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


def test_unfinished_files_vanish(tmp_path):
    def write():
        with finished_files() as unfinished:
            unfinished(tmp_path / "a.tif").write_text("new")
            assert not (tmp_path / "a.tif").exists()
            unfinished(tmp_path / "b.tif").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert not list(tmp_path.iterdir())
    with finished_files() as unfinished:
        unfinished(tmp_path / "a.tif").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


# ---- prediction in bands


def test_bands_of_probabilities_are_those_of_the_whole_image(tmp_path):
    path = write_checkpoint(tmp_path / "a.pth", lively_model(2, in_channels=3, out_channels=2), "tile")
    predictor = Predictor(path, "cpu", "float32", tile=352)
    image = noisy_image(501, 390, 3)
    whole = predictor.predict(image)
    bands = list(predictor.predict_bands((image[y:y + 37] for y in range(0, 501, 37)), 501, 390))
    assert len(bands) == len(plan_axis(512, 352, predictor.margin)[0]) > 2
    assert np.array_equal(np.concatenate(bands), whole)


# ---- nuclei in blocks


def drawn_discs(rng, height, width, pixels_each=600) -> np.ndarray:
    """Draw discs at random, many of which touch: (H, W, 1) float32 with soft edges."""
    mask = np.zeros((height, width), bool)
    for _ in range(height * width // pixels_each):
        y, x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(6, 16)
        top, left = (max(int(v - radius), 0) for v in (y, x))
        rows, columns = np.ogrid[top:min(int(y + radius + 2), height), left:min(int(x + radius + 2), width)]
        mask[top:top + rows.shape[0], left:left + columns.shape[1]] |= np.hypot(rows - y, columns - x) <= radius
    return ndimage.gaussian_filter(mask.astype(np.float32), 1.5)[..., None]


def in_blocks(probability, block, min_area=30):
    """Return the label maps of the blocks and of the whole."""
    def separate(part):
        return separate_nuclei(part[..., 0], boundary=part[..., 1] if part.shape[2] > 1 else None, min_area=min_area)

    height, width = probability.shape[:2]
    blocks = BlockSeparation(separate, height, width, min_area, block)
    bands = list(blocks.bands(probability[y:y + 90] for y in range(0, height, 90)))
    assert np.array_equal(np.concatenate([band for _, band in bands]), probability)
    labels = blocks.final_labels()[np.concatenate([band for band, _ in bands])]
    assert labels.dtype == np.uint32
    assert set(np.unique(labels)) == {*range(labels.max() + 1)} - ({0} if labels.all() else set())
    return labels, separate(probability)


@pytest.mark.parametrize(("pixels_each", "min_area", "channels"), [(1500, 30, 1), (600, 30, 1), (600, 150, 2)])
def test_blocks_give_the_nuclei_of_the_whole_image(pixels_each, min_area, channels):
    rng = np.random.default_rng(pixels_each)
    probability = drawn_discs(rng, 730, 810, pixels_each)
    if channels == 2:
        line = np.abs(ndimage.gaussian_filter(rng.normal(0, 1, probability.shape), (3, 3, 0))) < 0.01
        probability = np.concatenate([probability, line.astype(np.float32)], axis=2)
    blocks, whole = in_blocks(probability, 200, min_area)
    assert whole.max() > 150
    assert np.array_equal(blocks, whole), instance_metrics(blocks, whole)


def test_a_nucleus_across_many_seams_has_one_label():
    probability = np.zeros((520, 600, 1), np.float32)
    rows, columns = np.mgrid[:520, :600]
    probability[np.abs(rows - columns * 0.8 - 10) < 5 + columns / 30] = 1  # through the corners, growing wider
    probability[480:500, 20:30] = 1
    blocks, whole = in_blocks(probability, 100)
    assert whole.max() == 2
    assert np.array_equal(blocks, whole)


def test_nothing_of_a_clump_is_lost():
    """Foreground without an end in sight of any block: the parts may differ from those of the whole, the pixels not."""
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(0, 1, (700, 700, 1)), (5, 5, 0))
    clump = (noise > -0.5 * noise.std()).astype(np.float32)
    blocks, whole = in_blocks(clump, 250)
    assert np.bincount(ndimage.label(clump)[0].ravel())[1:].max() > 100_000
    assert np.array_equal(blocks > 0, whole > 0)
    assert instance_metrics(blocks, whole)["aji"] > 0.999
    everything, _ = in_blocks(np.ones((600, 600, 1), np.float32), 250)
    assert everything.all()


@pytest.mark.parametrize(("min_area", "nuclei"), [(30, 2), (1000, 1)])
def test_disagreement_between_blocks_is_settled_by_overlap(min_area, nuclei):
    """One bar, columns 150 to 249; the left block parts it at 198, the right one not at all, and the seam is at 200.

    What the left block found from 198 on shares 52 of 100 columns with the right block's bar, so the two are one. The
    48 columns before it, 960 pixels, are a nucleus if they are large enough for one, else they join the bar.
    """
    answers = iter((198, 150))

    def separate(part):
        inside = part[..., 0] > 0.5
        first = np.flatnonzero(inside.any(axis=0))[0]  # the column 150 in this part
        return np.where(inside, 1 + (np.arange(part.shape[1]) >= first + next(answers) - 150), 0).astype(np.int32)

    bar = np.zeros((100, 400, 1), np.float32)
    bar[40:60, 150:250] = 1
    blocks = BlockSeparation(separate, 100, 400, min_area, block=200)
    ((labels, _),) = blocks.bands([bar])
    final = blocks.final_labels()[labels]
    assert np.array_equal(final > 0, bar[..., 0] > 0)
    assert final.max() == nuclei


# ---- measures


def test_measures_are_those_of_scikit_image_however_the_image_is_divided():
    rng = np.random.default_rng(0)
    nuclei = np.unique(random_nuclei(rng, 300, 90, 12), return_inverse=True)[1].reshape(300, 300)
    nuclei[0, 0], nuclei[299, 290:] = nuclei.max() + 1, nuclei.max() + 2  # a pixel and a line
    probability = rng.random(nuclei.shape).astype(np.float32)
    whole, parts = NucleusSums(), NucleusSums()
    whole.add(nuclei, probability)
    for top in range(0, 300, 70):
        parts.add(nuclei[top:top + 70], probability[top:top + 70], top)
    expected = regionprops_table(nuclei, probability, ("label", "centroid", "area", "eccentricity", "intensity_mean"))
    for ours, again, theirs in zip(whole.measures().values(), parts.measures().values(), expected.values(),
                                   strict=True):
        assert np.abs(ours - theirs).max() < 1e-6
        assert np.allclose(ours, again, rtol=1e-14)
    final = np.arange(nuclei.max() + 1) // 2  # 1 to the background, 2 and 3 together ...
    joined = NucleusSums()
    joined.add(final[nuclei], probability)
    for ours, direct in zip(whole.joined(final).measures().values(), joined.measures().values(), strict=True):
        assert np.allclose(ours, direct, rtol=1e-12)
    assert all(len(values) == 0 for values in NucleusSums().measures().values())


# ---- from file to files


@pytest.fixture
def small_parts(monkeypatch):
    """Divide small images as large ones are."""
    monkeypatch.setattr(image_bands, "BAND_PIXELS", 20_000)
    monkeypatch.setattr(image_bands, "TILE", 128)
    monkeypatch.setattr(block_separation.BlockSeparation.__init__, "__defaults__", (200,))
    monkeypatch.setattr(streaming, "OVERVIEW_SIDE", 300)


@pytest.mark.parametrize("targets", [("mask",), ("mask", "boundary")])
def test_files_of_a_large_image_are_those_of_the_whole(targets, small_parts, tmp_path, capsys):
    image = noisy_image(700, 610, 3)
    tifffile.imwrite(tmp_path / "slide.tif", image, photometric="rgb", tile=(64, 64), compression="zlib")
    model = lively_model(2, in_channels=3, out_channels=len(targets))
    checkpoint = str(write_checkpoint(tmp_path / "a.pth", model, "tile", targets, {"brightness of red": [0.9, 1.0]}))
    predictor = Predictor(checkpoint, "cpu", "float32", 512)
    threshold = f"{np.quantile(predictor.predict(image)[..., 0], 0.7):.4f}"
    command = [checkpoint, str(tmp_path / "slide.tif"), "--threshold", threshold, "--min_area", "20", "--probability",
               "--pixel_size", "0.5", "--device", "cpu", "--precision", "float32", "--tile", "512", "--out"]
    assert predict_papsmear.main([*command, str(tmp_path / "whole")]) == 0
    assert predict_papsmear.main([*command, str(tmp_path / "bands"), "--stream_above", "400000"]) == 0
    said = re.findall(r"^slide.tif: (.*), [\d.]+ s; UNLIKE THE TRAINING IMAGES: (.*)$", capsys.readouterr().out, re.M)
    assert len(said) == 2
    assert said[0] == said[1]
    whole, bands = tmp_path / "whole", tmp_path / "bands"
    assert {p.name for p in bands.iterdir()} == {"slide_mask.tif", "slide_probability.tif", "slide_instances.tif",
                                                 "slide_overlay.png", "nuclei.csv"}
    nuclei = load_instances(bands / "slide_instances.tif")
    assert nuclei.max() > 100
    assert np.array_equal(nuclei, load_instances(whole / "slide_instances.png"))
    for kind in ("mask", "probability"):
        own = tifffile.imread(bands / f"slide_{kind}.tif")
        assert np.array_equal(own, np.asarray(Image.open(whole / f"slide_{kind}.png")))
    assert read_rows(bands / "nuclei.csv") == read_rows(whole / "nuclei.csv")
    overview = load_image(bands / "slide_overlay.png", 3)
    assert overview.shape == (234, 204, 3), "reduced by 3"
    outlined = (overview == OUTLINE).all(axis=2)
    assert np.array_equal(outlined, boundary(nuclei[::3, ::3]))
    assert np.abs(overview[~outlined].mean() - image.mean()) < 5
    assert predict_papsmear.main([*command, str(tmp_path / "bands")]) == 2
    assert "nothing is overwritten unasked" in capsys.readouterr().err


def test_a_bad_large_file_is_one_error_and_leaves_nothing(small_parts, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    image = noisy_image(400, 320, 1)[..., 0]
    for name in "ab":
        tifffile.imwrite(folder / f"{name}.tif", image, tile=(64, 64), compression="zlib")
    (folder / "a.tif").write_bytes((folder / "a.tif").read_bytes()[:-3000])
    save_png(folder / "c.png", image)
    path = write_checkpoint(tmp_path / "a.pth", lively_model(1), "tile")
    command = [str(path), str(folder), "--stream_above", "0", "--threshold", "0.99999", "--device", "cpu", "--out"]
    assert predict_papsmear.main([*command, str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert re.search(r"^error: .*a.tif: damaged or cut off", said.err, re.M)
    assert "Traceback" not in said.err
    assert "2 of 3 images came out all black" in said.out
    assert "c.png: not a TIFF that can be read in parts" in said.out
    assert {p.name[0] for p in (tmp_path / "out").iterdir()} == {"b", "c", "n"}
    assert tifffile.imread(tmp_path / "out/c_mask.tif").shape == (400, 320)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streaming, "write_tiff", full)
    assert predict_papsmear.main([*command, str(tmp_path / "full")]) == 1
    assert "b.tif: [Errno 28] No space left" in capsys.readouterr().err
    assert list((tmp_path / "full").iterdir()) == [], "not even an empty table, which the next try would stumble over"


def test_memory_does_not_grow_with_the_height(small_parts, tmp_path):
    """The peak of everything that numpy and Python hold, for 1000 and 4000 rows of an image that is made on the way."""
    def peak(height: int) -> int:
        rng = np.random.default_rng(0)
        band = noisy_image(100, 400, 3)
        rows = SimpleNamespace(height=height, width=400, path=tmp_path / "slide.tif")
        Rows = type("Rows", (SimpleNamespace,), {"__iter__": lambda self: (band for _ in range(height // 100))})
        model = write_checkpoint(tmp_path / "a.pth", lively_model(1, in_channels=3), "tile")
        predictor = Predictor(model, "cpu", "float32", tile=512)
        predictor.nuclei = lambda probability, _: ndimage.label(rng.random(probability.shape[:2]) > 0.999)[0]
        tracemalloc.start()
        streaming.stream_prediction(predictor, Rows(**vars(rows)), 30, tmp_path / "i.tif", [tmp_path / "m.tif"],
                                    [tmp_path / "p.tif"])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1000)
    low, high = peak(1000), peak(4000)
    assert high < 1.25 * low, f"{low / 1e6:.1f} MB for 1000 rows, {high / 1e6:.1f} MB for 4000"


def test_docstring_examples_hold():
    result = doctest.testmod(image_bands)
    assert result.attempted >= 1
    assert result.failed == 0
    assert [list(part) for part in windows(iter([np.arange(5)]), [(0, 5)])] == [[0, 1, 2, 3, 4]]
