"""Properties of what is read and written, for any content: text, tables, pictures, checkpoints, measures, splits.

    python -m pytest tests/test_file_properties.py
    EXAMPLES=20 python -m pytest tests/test_file_properties.py   # 20 times as many examples, other ones each time
"""

import contextlib
import csv
import io
import os
import random
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.measure import regionprops_table

from checkpoints import load_checkpoint, load_model, save_checkpoint, untrained_checkpoint
from conftest import tensors_equal
from images import bands
from images.bands import BandStore, ImageRows, write_tiff
from images.dealing import deal_groups, split_by_group, write_splits
from images.files import image_size, load_image, save_instances, save_png
from images.listing import composed
from images.masks import load_instances, load_mask
from images.pairs import Pair, source_name
from images.recipe import SIZINGS, TARGETS, DataRecipe
from images.splits import SPLITS, leaked, list_splits
from nuclei.measurement import NucleusSums
from nuclei.results import LEFT, UNFINISHED
from preparation.drawn import BESIDE_INSTANCES
from system.errors import UserError
from system.tables import append_rows, columns_of, read_table, write_table
from system.text import PlainStream, cell, guarded, shown, unguarded
from tests.test_properties import examples
from unet import ProgressiveUNet

ODD = "=+-@'\",; \t\r\n\0\x1b\x7f\x85\u2028\u202e\u2066\ufeff\u0301"
# What a file name can hold: any text, and bytes that are no UTF-8.
ANY_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(ODD),
                             st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)), max_size=12)
SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@contextlib.contextmanager
def in_new_folder():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# ---- text and tables


def steers(character: str) -> bool:
    """Tell whether a character may move the cursor, end the line or turn the direction of writing."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in (
        "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@given(ANY_TEXT)
@examples(500)
def test_text_is_made_safe_and_given_back(text):
    assert unguarded(guarded(text)) == text
    assert not any(map(steers, shown(text)))
    assert shown(text) == text or any(map(steers, text))
    assert shown(shown(text)) == shown(text)
    assert shown(text).encode().decode() == shown(text), "it is UTF-8"
    assert not cell(text).startswith(("=", "+", "-", "@"))
    assert unguarded(cell(text)) == shown(text)
    stream = PlainStream(io.StringIO())
    assert stream.write(text) == len(text)
    assert not any(steers(c) for c in stream.getvalue() if c not in "\n\r\t" and unicodedata.category(c) != "Cs")


COLUMNS = ("image", "note", "number")
ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, ANY_TEXT.map(cell))), max_size=4)


@given(ROWS, ROWS, ROWS, st.integers(0, 400))
@examples(100)
def test_tables_give_back_their_rows_and_lose_but_the_one_that_is_torn(first, second, third, cut):
    with in_new_folder() as folder:
        table = folder / "a.csv"
        for rows in (first, second):
            append_rows(table, COLUMNS, [row | {"other": "x"} for row in rows])
        assert list(read_table(table)) == first + second
        assert columns_of(table) == list(COLUMNS)
        with open(table, newline="", encoding="utf-8") as file:
            assert list(csv.DictReader(file)) == first + second, "for others too"
        table.write_bytes(whole := table.read_bytes()[:cut])
        kept = (first + second)[:max(whole.count(b"\n") - 1, 0)]
        assert list(read_table(table)) == kept
        append_rows(table, COLUMNS, third)
        assert list(read_table(table)) == kept + third
        write_table(table, COLUMNS, second, sync=False)
        assert list(read_table(table)) == second
        with pytest.raises(ZeroDivisionError):
            write_table(table, COLUMNS, ({"image": 1 // n} for n in (1, 0)), sync=False)
        assert list(read_table(table)) == second
        assert os.listdir(folder) == ["a.csv"]


# ---- pictures


@given(SHAPES.flatmap(lambda s: st.sampled_from([s, (*s, 1), (*s, 3)])).flatmap(lambda s: arrays(np.uint8, s)),
       st.booleans())
@examples(60)
def test_pictures_are_read_as_they_were_saved(image, smallest):
    with in_new_folder() as folder:
        save_png(folder / "a.png", image, smallest)
        image = image.reshape(*image.shape[:2], -1)
        assert image_size(folder / "a.png") == image.shape[:2]
        assert np.array_equal(load_image(folder / "a.png", image.shape[2]), image)
        if image.shape[2] == 1:
            assert np.array_equal(load_image(folder / "a.png", 3), np.repeat(image, 3, axis=2))
            save_png(folder / "b.png", image[..., 0] * np.uint16(257), smallest)
            assert np.array_equal(load_image(folder / "b.png", 1), image), "of 16 bit, as 8"


@given(st.integers(1, 5), st.data())
@examples(60)
def test_masks_are_read_as_they_were_saved(classes, data):
    labels = data.draw(arrays(np.uint8, SHAPES, elements=st.integers(0, classes)))
    with in_new_folder() as folder:
        save_png(folder / "a.png", labels > 0)
        save_png(folder / "b.png", (labels > 0).astype(np.uint8))
        for name in "ab":
            assert np.array_equal(load_mask(folder / f"{name}.png"), labels[..., None] > 0)
        save_png(folder / "c.png", labels)
        assert np.array_equal(load_mask(folder / "c.png", classes), labels[..., None] == range(1, classes + 1))


LABELS = st.one_of(st.integers(0, 2 ** 31 - 1), st.sampled_from([0, 1, 255, 256, 32768, 65535, 65536, 2 ** 31 - 1]))


@given(st.one_of(arrays(np.int64, SHAPES, elements=LABELS), arrays(np.int64, SHAPES, elements=st.integers(0, 65536))),
       st.sampled_from([np.int32, np.uint32, np.int64]))
@examples(100)
def test_instances_are_read_as_they_were_saved(labels, dtype):
    with in_new_folder() as folder:
        path = save_instances(folder / "a.png", labels.astype(dtype))
        assert os.listdir(folder) == [path.name] == ["a.tif" if labels.max() > 65535 else "a.png"]
        found = load_instances(path)
        assert found.dtype == np.int32
        assert np.array_equal(found, labels)


@given(st.sampled_from([np.uint8, np.uint16, np.uint32]), st.integers(1, 40), st.integers(1, 40),
       st.lists(st.integers(0, 40), max_size=5), st.integers(0, 2 ** 31 - 1))
@examples(40)
def test_bands_on_disk_become_the_whole_image(dtype, height, width, cuts, seed):
    image = np.random.default_rng(seed).integers(0, min(np.iinfo(dtype).max, 2 ** 31 - 1), (height, width), dtype)
    cuts = [0, *sorted(cut for cut in cuts if cut < height), height]
    with in_new_folder() as folder, BandStore(folder) as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "TILE", 16)
        for a, b in zip(cuts, cuts[1:], strict=False):
            store.append(image[a:b])
        for _ in range(2):
            assert np.array_equal(np.concatenate(list(store)), image)
        write_tiff(folder / "a.tif", store, height, width, dtype)
        assert np.array_equal(load_instances(folder / "a.tif"), image)


@given(st.integers(1, 70), st.integers(1, 40), st.sampled_from([1, 3]), st.sampled_from([1, 3]), st.booleans(),
       st.one_of(st.none(), st.integers(1, 80)), st.sampled_from([None, "zlib"]), st.integers(1, 2000))
@examples(100)
def test_rows_of_a_tiff_are_those_of_the_image(height, width, planes, channels, deep, strip, compression, together):
    image = np.random.default_rng(height).integers(0, 255, (height, width, planes), np.uint8)
    image = (image[..., 0] if planes == 1 else image) * (np.uint16(257) if deep else np.uint8(1))
    with in_new_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "BAND_PIXELS", together)
        parts = {"rowsperstrip": strip} if strip else {"tile": (16, 32)}
        tifffile.imwrite(folder / "a.tif", image, photometric="rgb" if planes == 3 else "minisblack",
                         compression=compression, metadata=None, **parts)
        rows = ImageRows(folder / "a.tif", channels)
        assert (rows.height, rows.width) == (height, width)
        assert np.array_equal(np.concatenate(list(rows)), load_image(folder / "a.tif", channels))
        assert np.array_equal(load_image(folder / "a.tif", planes), (image / (257 if deep else 1)).reshape(
            height, width, planes))


# ---- checkpoints

NUMBERS = st.floats(-1e6, 1e6)
PLAIN = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), ANY_TEXT),
                     lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ANY_TEXT, inner, max_size=3)),
                     max_leaves=8)


@st.composite
def recipes(draw):
    channels = draw(st.sampled_from([1, 3]))
    known = draw(st.booleans())
    return DataRecipe(
        draw(st.sampled_from(SIZINGS)), draw(st.sampled_from(TARGETS)), channels, draw(st.integers(1, 3)),
        tuple(draw(st.lists(NUMBERS, min_size=channels, max_size=channels))) if known else (),
        tuple(draw(st.lists(st.floats(1e-6, 1e6), min_size=channels, max_size=channels))) if known else (),
        draw(st.dictionaries(ANY_TEXT, st.tuples(NUMBERS, NUMBERS).map(sorted).map(tuple), max_size=3)),
        draw(st.integers(0, 2 ** 32 - 1)), draw(st.one_of(st.just(0.0), st.floats(1e-6, 1e6))))


@given(recipes(), st.integers(1, 2), st.integers(1, 4),
       st.floats(0, 1, exclude_min=True, exclude_max=True), st.dictionaries(ANY_TEXT, PLAIN, max_size=4))
@examples(25)
def test_a_checkpoint_gives_back_what_was_saved(recipe, width, stage, threshold, config):
    model = ProgressiveUNet(recipe.in_channels, recipe.target_channels, width)
    model.set_stage(stage)
    saved = untrained_checkpoint(model, data=recipe, threshold=threshold, config=config)
    with in_new_folder() as folder:
        save_checkpoint(folder / "a.pth", saved)
        loaded, again = load_checkpoint(folder / "a.pth"), load_model(folder / "a.pth")
    assert {key: value for key, value in loaded.items() if key not in ("model", "history")} \
        == {key: value for key, value in saved.items() if key not in ("model", "history")}
    assert (again.stage, again.training) == (stage, False)
    again.transfer_weights(model.unborn_state())
    assert tensors_equal(again, model)


# ---- measures of nuclei


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-9) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=tolerance)


@given(arrays(np.int32, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.integers(0, 5)),
       st.lists(st.integers(1, 50), min_size=5, max_size=5, unique=True), st.integers(1, 16),
       st.lists(st.integers(0, 400), max_size=5), st.sampled_from([0, 1, 100_000]), st.integers(0, 99))
@examples(100)
def test_nuclei_in_bands_measure_what_they_do_in_the_whole(pattern, numbers, times, cuts, top, seed):
    labels = np.array([0, *numbers])[np.kron(pattern, np.ones((times, 1), np.int32))]  # up to 320 rows
    probability = np.random.default_rng(seed).random(labels.shape, np.float32)
    pixels = np.zeros((*labels.shape, 3), np.uint8)
    whole, parts, final = NucleusSums(), NucleusSums(), NucleusSums()
    whole.add(labels, probability, pixels, top)
    cuts = [0, *sorted(cut for cut in cuts if cut < len(labels)), len(labels)]
    for a, b in zip(cuts, cuts[1:], strict=False):
        parts.add(labels[a:b], probability[a:b], pixels[a:b], top + a)
    for name, values in whole.measures().items():
        exact = np.array_equal(parts.measures()[name], values)
        assert exact or name == "mean_probability" and close(parts.measures()[name], values)
    measures, there = whole.measures(), np.unique(labels[labels > 0])
    assert np.array_equal(measures["label"], there)
    if len(there):
        expected = regionprops_table(labels, probability, ("label", "area", "centroid", "eccentricity",
                                                           "mean_intensity"))
        assert np.array_equal(measures["area"], expected["area"])
        assert close(measures["centroid_row"], expected["centroid-0"] + top)
        assert close(measures["centroid_column"], expected["centroid-1"])
        assert close(measures["eccentricity"], expected["eccentricity"], 1e-6)
        assert close(measures["mean_probability"], expected["mean_intensity"], 1e-5)
    # Provisional labels of one nucleus are joined, and those of none are left out.
    merged = np.array([0, 1, 1, 2, 0, 3])
    provisional, joined = NucleusSums(), merged[pattern]
    blank = np.zeros((*pattern.shape, 3), np.uint8)
    provisional.add(pattern, np.ones(pattern.shape), blank)
    final.add(joined, np.ones(joined.shape), blank)
    for name, values in provisional.joined(merged).measures().items():
        assert np.array_equal(values, final.measures()[name])


# ---- splits

NAMES = st.text("abcXYZ019äé =+-@'\",;.\u0301\u4e2d_", min_size=1, max_size=6)


@given(st.dictionaries(NAMES, st.lists(st.integers(0, 9), min_size=2, max_size=2).filter(any), min_size=3),
       st.lists(st.floats(0.01, 1), min_size=1, max_size=3), st.integers(0, 99), st.randoms(use_true_random=False))
@examples(150)
def test_groups_are_dealt_alike_in_any_order_and_no_part_is_empty(contents, shares, seed, shuffler):
    shares = [share / sum(shares) for share in shares]
    dealt = deal_groups(contents, shares, seed)
    assert dealt.keys() == contents.keys()
    assert set(dealt.values()) == set(range(len(shares)))
    keys = list(contents)
    shuffler.shuffle(keys)
    assert deal_groups({key: contents[key] for key in keys}, shares, seed) == dealt
    numbers = {key: sum(counts) for key, counts in contents.items()}
    assert deal_groups(numbers, shares, seed) == deal_groups({key: [n] for key, n in numbers.items()}, shares, seed)


@given(st.integers(3, 40), st.integers(1, 30), st.integers(0, 99))
@examples(40)
def test_groups_of_one_size_are_dealt_as_the_shares_say(groups, size, seed):
    """Each part has less than a group more or less than its share, but where one would stay empty without it."""
    dealt = Counter(deal_groups(dict.fromkeys(map(str, range(groups)), size), (0.7, 0.15, 0.15), seed).values())
    wrong = [abs(dealt[part] - share * groups) for part, share in enumerate((0.7, 0.15, 0.15))]
    assert max(wrong) < 1 or 0.15 * groups < 1 and dealt[1] == dealt[2] == 1


@st.composite
def folders(draw):
    """Draw the stems of images with their split, copies among them: `GROUP~NUMBER`, perhaps with a prefix."""
    text = st.text("aXé0=+@'\" ,\\\t\r\n", min_size=1, max_size=3)
    groups = draw(st.lists(text, min_size=3, max_size=8, unique=True))
    stems = {f"{group}~{i}" for group in groups for i in range(draw(st.integers(1, 3)))}
    copies = draw(st.lists(st.sampled_from(sorted(stems)), max_size=4))
    stems |= {f"{draw(st.sampled_from(['flipped_', 'rotated_90_', 'mirrored_flipped_']))}{stem}" for stem in copies}
    stems -= set(draw(st.lists(st.sampled_from(sorted(stems)), max_size=2)))
    assume(len({stem.split("~")[0] for stem in map(source_name, stems)}) >= 3)
    return {stem: draw(st.sampled_from(SPLITS)) for stem in sorted(stems)}


def write_empty_files(root: Path, stems: dict[str, str], shuffled: random.Random, end: str = "") -> None:
    """Write files of no content, in any order; with an ending of masks all into one folder."""
    files = [(stem, split, kind) for stem, split in stems.items() for kind in ("images", "masks")]
    shuffled.shuffle(files)
    for stem, split, kind in files:
        folder = root if end else root / split / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}{end if kind == 'masks' else ''}.png").touch()


@given(folders(), st.sampled_from([None, "^[^~]+"]), st.integers(0, 9), st.randoms(use_true_random=False))
@examples(40)
def test_no_group_is_in_two_splits_whatever_the_folders(stems, group_regex, seed, shuffled):
    with contextlib.ExitStack() as stack:
        roots = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        for split in SPLITS:
            write_empty_files(roots[0], {f"{split}~0": split}, shuffled)  # so that no folder is missing
        everything = stems | {f"{split}~0": split for split in SPLITS}
        write_empty_files(roots[0], stems, shuffled)
        write_empty_files(roots[1], everything, shuffled, "_mask")
        dealt, _ = split_by_group(roots[0], group_regex, seed)
        names = {split: sorted(pair.name for pair in pairs) for split, pairs in dealt.items()}
        groups = {split: {source_name(name).split("~")[0] if group_regex else source_name(name) for name in found}
                  for split, found in names.items()}
        assert all(groups.values())
        assert sum(map(len, groups.values())) == len(set().union(*groups.values()))
        counts = Counter(name for found in names.values() for name in found)
        assert set(counts.values()) == {1}
        assert {source_name(name) for name in counts} == {source_name(name) for name in everything}
        for name in everything.keys() - counts.keys():  # a copy, whose image is where no copies are
            assert name != source_name(name)
            assert source_name(name) not in {source_name(other) for other in names["train"]}
        # One folder, masks beside images, files made in another order: the same deal, and the table gives it back.
        sources = {split: {source_name(name) for name in found} for split, found in names.items()}
        for root, end in zip(roots, ("", "_mask"), strict=True):
            write_splits(root, group_regex, seed, mask_suffix=end)
            listed = list_splits(root, mask_suffix=end)
            found = {split: [pair.name for pair in pairs] for split, pairs in listed.items()}
            assert found == names or end  # where there are only copies, the first stands for them, here or there
            assert {split: set(map(source_name, some)) for split, some in found.items()} == sources
            assert [leaked(listed, split, group_regex)[0] for split in SPLITS[1:]] == [0, 0]


# What the name of a file can hold on Linux, all that a table or a regular expression may take for something else.
STEMS = st.text(st.sampled_from("aé\u0301_'\"=+@,;\\ \t\r\n\x0b\x1c\x85\u2028\ufeff\udce4"), min_size=1, max_size=4)


@pytest.mark.parametrize("name", ["a\\b", "\\", "\\\\", "a\\", "images\\a"])
def test_a_backslash_in_a_name_comes_back_from_the_table(tmp_path, name):
    write_empty_files(tmp_path, dict.fromkeys((name, "c", "d"), "train"), random.Random(0), "_mask")
    write_splits(tmp_path, mask_suffix="_mask")
    assert {pair.name for pairs in list_splits(tmp_path, mask_suffix="_mask").values() for pair in pairs} \
        == {name, "c", "d"}


def test_a_table_written_on_windows_is_read(tmp_path):
    write_empty_files(tmp_path, dict(zip(("a\\b", "c", "d"), SPLITS, strict=True)), random.Random(0))
    (tmp_path / "splits.csv").write_text("path,split\ntrain\\images\\a\\b.png,test\nvalid\\images\\c.png,train\n"
                                         "test/images/d.png,valid\n")
    with pytest.raises(UserError, match="line 2: train/images/a/b.png is no image"):
        list_splits(tmp_path)  # no Windows holds a\\b
    (tmp_path / "splits.csv").write_text("path,split\ntrain/images/a\\b.png,test\nvalid\\images\\c.png,train\n"
                                         "test/images/d.png,valid\n")
    assert [[pair.name for pair in pairs] for pairs in list_splits(tmp_path).values()] == [["c"], ["d"], ["a\\b"]]


@given(st.lists(STEMS, min_size=3, max_size=6, unique_by=composed), st.booleans())
@examples(60)
def test_any_names_come_back_from_the_table(stems, beside):
    assume(len({source_name(composed(stem)) for stem in stems}) >= 3)
    with in_new_folder() as folder:
        end = "~m" if beside else ""
        write_empty_files(folder, dict.fromkeys(stems, "train"), random.Random(0), end)
        for split in SPLITS[1:]:
            write_empty_files(folder, {f"{split}~": split}, random.Random(0), end)
        write_splits(folder, mask_suffix=end)
        assert {pair.name for pairs in list_splits(folder, mask_suffix=end).values() for pair in pairs} \
            == {composed(stem) for stem in stems} | {"valid~", "test~"}


PREFIXES = ("flipped_", "mirrored_", "rotated_90_", "rotated_-15.5_", "mirrored_flipped_")


@given(ANY_TEXT.filter(lambda name: name and source_name(name) == name), st.sampled_from(PREFIXES))
@examples(300)
def test_a_copy_of_any_name_is_known(name, prefix):
    end = "_" + prefix[:-1]
    for copy in (prefix + name, name + end):
        assert source_name(copy) == name
    pairs = {split: [Pair(Path(f"{stem}.png"), Path("m.png"))] for split, stem in
             (("train", f"{prefix}{name}"), ("test", name))}
    assert "/" in name or leaked(pairs, "test") == (1, 1)


@given(ANY_TEXT.filter(bool))
@examples(100)
def test_what_predictions_write_is_known_by_any_name(name):
    assert BESIDE_INSTANCES.fullmatch(f"{name}_mask_2")[1] == name
    assert LEFT.fullmatch(f"{name}_mask.png{UNFINISHED}")["picture"] == f"{name}_mask.png"
    assert LEFT.fullmatch(f".{name}_mask.png.12345678.tmp")["file"] == f"{name}_mask.png"
