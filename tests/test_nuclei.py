"""Tests of the label maps: nuclei separated, joined across blocks, measured and outlined.

    python -m pytest tests/test_nuclei.py
"""

import warnings

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import label, regionprops_table
from skimage.segmentation import find_boundaries

from conftest import disc, labelled, random_nuclei
from nuclei import cells, shapes
from nuclei.blocks import BlockSeparation
from nuclei.measurement import DIGITS, NucleusSums, measure_nuclei, rounded_measures
from nuclei.outlines import OUTLINE, boundary, overlay
from nuclei.separation import separate_nuclei
from nuclei.single import keep_cell
from scoring.measures import instance_metrics

# ---- separation


def disc_at(height: int, width: int, row: float, column: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.hypot(rows - row, columns - column) <= radius


def two_discs(distance: float, radius: float = 20.0) -> np.ndarray:
    return disc_at(100, 140, 50, 50, radius) | disc_at(100, 140, 50, 50 + distance, radius)


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


def test_an_infinite_depth_separates_nothing():
    discs = two_discs(30)
    assert separate_nuclei(discs, depth=1).max() == 2
    assert np.array_equal(separate_nuclei(discs, depth=np.inf), discs >= 0.5)


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


def test_a_nucleus_of_low_mean_probability_is_left_out():
    probability = np.full((60, 60), 0.1)
    probability[5:25, 5:25] = 0.7    # faint
    probability[30:50, 30:50] = 0.8
    assert separate_nuclei(probability)[40, 40] == 1
    assert separate_nuclei(probability).max() == 1
    assert separate_nuclei(probability, min_probability=0.65).max() == 2
    assert separate_nuclei(probability, min_probability=0.85).max() == 0
    assert separate_nuclei(probability, threshold=0.3).max() == 2, "the default is the middle of threshold and 1"
    half = probability.copy()
    half[30:50, 30:40] = 0.5         # its mean counts, not its parts: 0.65
    assert separate_nuclei(half).max() == 0
    with pytest.raises(ValueError, match=r"the third in \[0, 1\]"):
        separate_nuclei(probability, min_probability=1.5)


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


# ---- one cell an image


@pytest.mark.parametrize(("kept", "others"), [
    ((0.9, 50, 70, 18), [(0.9, 8, 10, 12), (0.9, 90, 130, 14)]),  # probability, row, column, radius
    ((0.9, 15, 35, 15), [(0.6, 60, 110, 17)]),  # a larger object of which the network is less sure loses
])
def test_the_object_of_the_largest_sum_of_probabilities_is_kept(kept, others):
    drawn = [value * disc_at(100, 150, *place) for value, *place in (kept, *others)]
    # The rims of objects are soft: their probabilities below the threshold belong to them.
    soft = ndimage.gaussian_filter(np.max(drawn, axis=0), 2).astype(np.float32)
    alone = ndimage.gaussian_filter(drawn[0], 2)
    found = keep_cell(soft[..., None], 0.5)[..., 0]
    assert np.array_equal(found >= 0.5, alone >= 0.5)
    assert np.abs(found - alone).max() < 0.1, "no rim of the others stays"
    assert found.dtype == np.float32


def test_one_object_or_none_stays_as_it_is():
    for probability in (np.full((20, 30), 0.4), np.full((20, 30), 0.7), 0.8 * disc_at(20, 30, 2, 2, 4)):
        assert np.array_equal(keep_cell(probability[..., None], 0.5)[..., 0], probability)


def test_the_cytoplasm_of_a_single_cell_is_that_around_its_nucleus():
    """A nucleus that divides its cytoplasm, and a neighbour of less nucleus and more cytoplasm."""
    cells = np.zeros((60, 120, 2))
    cells[20:40, 10:40, 1] = cells[10:50, 60:110, 1] = 0.8
    cells[15:45, 20:30, 0] = 0.9
    cells[20:30, 80:90, 0] = 0.9
    cells[..., 1] *= cells[..., 0] == 0
    expected = cells.copy()
    expected[:, 50:] = 0
    assert label(expected[..., 1] > 0).max() == 2, "on both sides of the nucleus"
    assert np.array_equal(keep_cell(cells, 0.5, has_cytoplasm=True), expected)
    without = cells * [0, 1]
    assert np.array_equal(keep_cell(without, 0.5, has_cytoplasm=True), without), "no nucleus tells which"
    assert np.array_equal(keep_cell(cells, 0.5)[:, :50, 1], np.zeros((60, 50))), "classes by themselves"


# ---- blocks


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


# ---- measurement


def measured(nuclei, probability, pixels, cuts=(), cytoplasm=None) -> dict[str, np.ndarray]:
    """Measure nuclei in bands that end at these rows."""
    sums, bounds = NucleusSums(), [0, *cuts, len(nuclei)]
    spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    for rows in spans:
        sums.add(nuclei[rows], probability[rows], pixels[rows], rows.start)
    return measure_nuclei(sums, lambda: (nuclei[rows] for rows in spans), *nuclei.shape,
                          None if cytoplasm is None else lambda: (cytoplasm[rows] for rows in spans))


def of_one(mask) -> dict[str, float]:
    """Measure one nucleus, a bool mask."""
    found = measured(mask.astype(np.int32), mask.astype(np.float32), np.zeros((*mask.shape, 3), np.uint8))
    return {name: float(value) for name, (value,) in found.items()}


THEIRS = {"label": "label", "centroid_row": "centroid-0", "centroid_column": "centroid-1", "area": "area",
          "eccentricity": "eccentricity", "mean_probability": "intensity_mean-3", "perimeter": "perimeter",
          "solidity": "solidity", "major_axis": "axis_major_length", "minor_axis": "axis_minor_length",
          "mean_red": "intensity_mean-0", "mean_green": "intensity_mean-1", "mean_blue": "intensity_mean-2"}


@pytest.mark.parametrize("kind", ["discs", "noise"])
def test_measures_are_those_of_scikit_image_however_the_image_is_divided(kind, monkeypatch):
    rng = np.random.default_rng(0)
    if kind == "discs":
        nuclei = np.unique(random_nuclei(rng, 300, 90, 12), return_inverse=True)[1].reshape(300, 300)
    else:  # with holes, necks and parts that touch at corners
        nuclei = ndimage.label(ndimage.gaussian_filter(rng.normal(size=(300, 300)), 2) > 0.05, np.ones((3, 3)))[0]
        nuclei[0, 0] = nuclei[299, 290:] = nuclei[298, 290:] = 0
    nuclei[0, 0], nuclei[299, 290:] = nuclei.max() + 1, nuclei.max() + 2  # a pixel and a line
    probability = rng.random(nuclei.shape).astype(np.float32)
    pixels = rng.integers(0, 256, (*nuclei.shape, 3)).astype(np.uint8)
    whole = measured(nuclei, probability, pixels)
    monkeypatch.setattr(shapes, "ROWS", 37)
    parts = measured(nuclei, probability, pixels, (70, 71, 140, 210, 280))
    assert tuple(whole) == tuple(DIGITS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no convex hull of a pixel
        expected = regionprops_table(nuclei, np.dstack([pixels.astype(float), probability]), (
            "label", "centroid", "area", "eccentricity", "perimeter", "solidity", "axis_major_length",
            "axis_minor_length", "intensity_mean"))
    for ours, theirs in THEIRS.items():
        assert np.abs(whole[ours] - expected[theirs]).max() < 1e-6, ours
    for name, values in whole.items():
        assert np.allclose(values, parts[name], rtol=1e-14, equal_nan=True), name
    edge = np.unique(np.concatenate([nuclei[0], nuclei[-1], nuclei[:, 0], nuclei[:, -1]]))
    assert np.array_equal(whole["cut_by_border"] == 1, np.isin(whole["label"], edge))
    final = np.arange(nuclei.max() + 1) // 2  # 1 to the background, 2 and 3 together ...
    provisional, joined = NucleusSums(), NucleusSums()
    provisional.add(nuclei, probability, pixels)
    joined.add(final[nuclei], probability, pixels)
    for ours, direct in zip(provisional.joined(final).measures().values(), joined.measures().values(), strict=True):
        assert np.allclose(ours, direct, rtol=1e-12)
    assert all(len(values) == 0 for values in NucleusSums().measures().values())


def test_a_disc_is_round_and_whole():
    found = of_one(disc(64, 20))
    assert found["area"] == pytest.approx(np.pi * 400, rel=0.01)
    assert found["perimeter"] == pytest.approx(2 * np.pi * 20, rel=0.06), "along the centres of its outermost pixels"
    assert found["circularity"] == pytest.approx(4 * np.pi * found["area"] / found["perimeter"] ** 2)
    assert 0.93 < found["circularity"] < 0.95, "pixels make the outline longer than that of the circle"
    assert of_one(disc(64, 5))["circularity"] == 1.0, "no more, though 80 pixels have a perimeter below that of a disc"
    assert found["solidity"] == pytest.approx(1, abs=0.03)
    assert found["major_axis"] == pytest.approx(40, abs=0.2)
    assert found["minor_axis"] == pytest.approx(40, abs=0.2)
    assert found["cut_by_border"] == 0


def test_a_square_at_the_border_is_flagged():
    for top, left, cut in ((0, 5, 1), (5, 0, 1), (10, 5, 1), (5, 10, 1), (1, 1, 0), (9, 9, 0)):
        mask = np.zeros((20, 20), bool)
        mask[top:top + 10, left:left + 10] = True
        found = of_one(mask)
        assert found["cut_by_border"] == cut, (top, left)
        assert (found["area"], found["perimeter"], found["solidity"]) == (100, 36, 1), "36 steps between 100 centres"
        assert found["circularity"] == pytest.approx(4 * np.pi * 100 / 36 ** 2)
        assert found["major_axis"] == found["minor_axis"] == pytest.approx(4 * (99 / 12) ** 0.5)


def test_a_rotated_ellipse_has_its_axes():
    y, x = np.mgrid[:120, :120] - 59.5
    angle = np.radians(30)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    found = of_one((along / 40) ** 2 + (across / 16) ** 2 <= 1)
    assert found["major_axis"] == pytest.approx(80, abs=0.5)
    assert found["minor_axis"] == pytest.approx(32, abs=0.5)
    assert found["eccentricity"] == pytest.approx((1 - 0.4 ** 2) ** 0.5, abs=0.002)
    assert found["perimeter"] == pytest.approx(184.6, rel=0.05), "Ramanujan's formula"
    assert found["circularity"] == pytest.approx(4 * np.pi * found["area"] / found["perimeter"] ** 2)


def test_a_pixel_has_no_circularity():
    mask = np.zeros((5, 5), bool)
    mask[2, 2] = True
    found = of_one(mask)
    assert (found["perimeter"], found["solidity"], found["major_axis"]) == (0, 1, 0)
    assert np.isnan(found["circularity"])
    (row,) = rounded_measures({name: np.array([value]) for name, value in found.items()}, None)
    assert row["circularity"] is None


# ---- cells


def test_cytoplasm_belongs_to_the_nearest_nucleus(monkeypatch):
    """Two nuclei in one field of cytoplasm, and some that is too far from both."""
    nuclei = labelled((40, 100), (10, 30, 10, 20), (10, 30, 40, 50))
    cytoplasm = np.zeros(nuclei.shape, bool)
    cytoplasm[10:30, :60] = True  # the nuclei themselves too, which do not count
    cytoplasm[10:30, 90:] = True
    monkeypatch.setattr(cells, "REACH", 20)
    areas = cells.cytoplasm_areas([nuclei], [cytoplasm], *nuclei.shape, 3)
    assert areas.tolist() == [0, 20 * (10 + 10), 20 * (10 + 10)], "columns 20 to 29 and 30 to 39 lie between them"
    found = measured(nuclei, nuclei > 0, np.zeros((40, 100, 3), np.uint8), cytoplasm=cytoplasm)
    assert found["nucleus_to_cytoplasm"].tolist() == [200 / 400, 200 / 400]
    alone = measured(nuclei, nuclei > 0, np.zeros((40, 100, 3), np.uint8), cytoplasm=np.zeros_like(cytoplasm))
    assert alone["cytoplasm_area"].tolist() == [0, 0]
    assert np.isnan(alone["nucleus_to_cytoplasm"]).all()


def test_cytoplasm_in_blocks_is_that_of_the_whole(monkeypatch):
    rng = np.random.default_rng(2)
    nuclei = np.unique(random_nuclei(rng, 400, 25, 9), return_inverse=True)[1].reshape(400, 400)
    cytoplasm = rng.random(nuclei.shape) > 0.3
    monkeypatch.setattr(cells, "REACH", 40)
    whole = cells.cytoplasm_areas([nuclei], [cytoplasm], 400, 400, nuclei.max() + 1)
    monkeypatch.setattr(cells, "BLOCK", 70)
    cuts = [slice(y, y + 90) for y in range(0, 400, 90)]
    parts = cells.cytoplasm_areas([nuclei[rows] for rows in cuts], [cytoplasm[rows] for rows in cuts], 400, 400,
                                  nuclei.max() + 1)
    assert whole.sum() > 30_000
    assert np.array_equal(whole, parts)


# ---- outlines


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, bool])
def test_boundary_is_that_of_scikit_image(dtype):
    """The library counts nothing beyond the image's edge, where for ours the background begins."""
    nuclei = (random_nuclei(np.random.default_rng(0), 120, 30, 9) // 7).astype(dtype)
    framed = np.pad(nuclei, 1)
    assert boundary(nuclei)[0].any()
    assert np.array_equal(boundary(nuclei), find_boundaries(framed, connectivity=1, mode="inner")[1:-1, 1:-1])


def test_an_overlay_carries_the_labels_of_nuclei_that_they_do_not_hide():
    nuclei = np.zeros((100, 200), np.int32)
    nuclei[:, :100][disc(100, 20)] = 7
    nuclei[:, 100:][disc(100, 5)] = 8
    image = np.full((100, 200, 3), 90, np.uint8)
    drawn = overlay(image, nuclei)
    assert (image == 90).all(), "a copy"
    edge = boundary(nuclei)
    assert (drawn[edge] == OUTLINE).all()
    changed = (drawn != image).any(axis=2) & ~edge
    rows, columns = np.nonzero(changed)
    assert abs(rows.mean() - 50) < 3
    assert abs(columns.mean() - 50) < 3
    assert drawn[changed].max() > 200, "light digits"
    assert drawn[changed].min() < 50, "with a dark edge"
    another = np.where(nuclei == 7, 1, nuclei)
    assert (overlay(image, another) != drawn).any(), "another number"
    assert np.array_equal(overlay(image, np.zeros_like(nuclei)), image)
