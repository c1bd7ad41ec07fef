"""Tests of what comes after training: instance measures, prediction of any image, separation, evaluation.

    python -m pytest test_inference.py
    python test_inference.py
"""

import sys
import time

import numpy as np
import pytest
from skimage.metrics import contingency_table
from skimage.segmentation import find_boundaries

from metrics import INSTANCE_METRICS, boundary, boundary_f1, instance_metrics, overlaps

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


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
