"""Properties that hold for any mask, image size, network and plan, checked on examples that are drawn at random.

    python -m pytest tests/test_properties.py
    EXAMPLES=20 python -m pytest tests/test_properties.py   # 20 times as many, other ones each time
"""

import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import lively_model, noisy_image, write_checkpoint
from images.bands import even_spans, windows
from images.tiles import BLEND, STEP, plan_axis
from inference import Predictor, tile_margin
from scoring.measures import (
    INSTANCE_METRICS,
    PIXEL_METRICS,
    boundary_f1,
    instance_metrics,
    pixel_metrics,
    soft_dice,
)
from system.errors import UserError
from training.dealing import deal
from training.schedule import FINAL_RATE, FLAT_SHARE, SCHEDULES, WARM_UP, WORK, TrainingPlan
from training.time_limit import TimeLimit
from unet import ProgressiveUNet
from unet_parts import mean2x2, upsample2x

TIMES = int(os.environ.get("EXAMPLES", 1))


def examples(count: int) -> settings:
    """Return the profile of all properties: the same examples in every run, unless EXAMPLES asks for more."""
    return settings(max_examples=count * TIMES, derandomize=TIMES == 1, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))


# ---- measures

NEAR = {"rel": 1e-9, "abs": 1e-12}  # float64 against fractions
TURNS = [lambda a: a[::-1], lambda a: a[:, ::-1], np.rot90, lambda a: np.rot90(a, 2), np.transpose]


@st.composite
def map_pairs(draw, most: int = 4):
    """Draw two label maps of one size from 1x1 on: of nothing in common, or the second with some pixels changed."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    first, other = (draw(arrays(np.int32, shape, elements=st.integers(0, most))) for _ in range(2))
    if draw(st.booleans()):
        changed = draw(arrays(bool, shape, elements=st.booleans(), fill=st.just(False)))
        other = np.where(changed, other, first)
    return first, other


def pixels_of(mask: np.ndarray) -> set[tuple[int, int]]:
    return {(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]}


def nuclei_of(labels: np.ndarray) -> list[set[tuple[int, int]]]:
    return [pixels_of(labels == k) for k in sorted(set(labels.flat) - {0})]


def plain_pixel_metrics(found: set, drawn: set, area: int) -> dict:
    if not found and not drawn:
        return dict.fromkeys(PIXEL_METRICS, 1)
    both = len(found & drawn)
    return {"dice": Fraction(2 * both, len(found) + len(drawn)), "iou": Fraction(both, len(found | drawn)),
            "precision": Fraction(both, len(found)) if found else 0,
            "recall": Fraction(both, len(drawn)) if drawn else 0, "accuracy": 1 - Fraction(len(found ^ drawn), area)}


def plain_instance_metrics(found: list[set], drawn: list[set]) -> dict:
    """Write down what the docstring says, nucleus by nucleus, in whole numbers."""
    if not found and not drawn:
        return dict.fromkeys(INSTANCE_METRICS, 1)
    shared, union, taken, matches = 0, 0, set(), []
    for nucleus in drawn:
        ious = [Fraction(len(nucleus & other), len(nucleus | other)) for other in found]
        matches += [iou for iou in ious if iou > Fraction(1, 2)]
        if max(ious, default=0) == 0:
            union += len(nucleus)
            continue
        best = ious.index(max(ious))
        shared, union = shared + len(nucleus & found[best]), union + len(nucleus | found[best])
        taken.add(best)
    union += sum(len(other) for i, other in enumerate(found) if i not in taken)
    dq = Fraction(2 * len(matches), len(found) + len(drawn))
    sq = sum(matches) / len(matches) if matches else 0
    return {"aji": Fraction(shared, union), "pq": dq * sq, "dq": dq, "sq": sq, "f1": dq}


def plain_boundary_f1(found: np.ndarray, drawn: np.ndarray, tolerance: float) -> float:
    outlines = []
    for labels in (found, drawn):
        framed = np.pad(labels, 1)
        outlines.append({(y, x) for y, x in pixels_of(labels) if any(
            framed[y + 1 + dy, x + 1 + dx] != labels[y, x] for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)))})
    if not all(outlines):
        return float(not any(outlines))
    shares = [sum(any((y - v) ** 2 + (x - u) ** 2 <= tolerance ** 2 for v, u in other) for y, x in outline)
              / len(outline) for outline, other in (outlines, outlines[::-1])]
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def pixel_measures(found: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    tensors = (torch.from_numpy(np.ascontiguousarray(mask > 0))[None, None] for mask in (found, drawn))
    return {name: float(value) for name, value in pixel_metrics(*tensors).items()}


@given(map_pairs())
@examples(200)
def test_measures_of_pixels_are_what_sets_of_pixels_say(pair):
    found, drawn = pair
    measures = pixel_measures(found, drawn)
    assert measures == pytest.approx(
        {k: float(v) for k, v in plain_pixel_metrics(pixels_of(found), pixels_of(drawn), found.size).items()}, **NEAR)
    assert all(0 <= value <= 1 for value in measures.values())
    other_way = pixel_measures(drawn, found)
    assert other_way == measures | {"precision": measures["recall"], "recall": measures["precision"]}
    assert pixel_measures(found, found) == dict.fromkeys(PIXEL_METRICS, 1)
    for turn in TURNS:
        assert pixel_measures(turn(found), turn(drawn)) == measures


@given(st.lists(map_pairs(1), min_size=1, max_size=4), st.data())
@examples(30)
def test_measures_of_a_batch_are_those_of_each_image_and_class(pairs, data):
    height, width = (min(pair[0].shape[axis] for pair in pairs) for axis in (0, 1))
    planes = [np.stack([pair[i][:height, :width] > 0 for pair in pairs]) for i in (0, 1)]
    classes = data.draw(st.sampled_from([c for c in (1, 2, 4) if len(pairs) % c == 0]))
    batch = [torch.from_numpy(plane.reshape(-1, classes, height, width)) for plane in planes]
    for name, values in pixel_metrics(*batch).items():
        assert values.shape == (len(pairs) // classes, classes)
        assert values.flatten().tolist() == [pixel_measures(found, drawn)[name]
                                             for found, drawn in zip(*planes, strict=True)]


@given(map_pairs(), st.permutations(range(1, 5)), st.lists(st.integers(1, 1000), min_size=4, max_size=4, unique=True))
@examples(200)
def test_measures_of_nuclei_are_what_sets_of_pixels_say(pair, order, numbers):
    found, drawn = pair
    measures = instance_metrics(found, drawn)
    plain = plain_instance_metrics(nuclei_of(found), nuclei_of(drawn))
    assert measures == pytest.approx({name: float(value) for name, value in plain.items()}, **NEAR)
    assert all(0 <= value <= 1 for value in measures.values())
    for turn in TURNS:
        assert instance_metrics(turn(found), turn(drawn)) == pytest.approx(measures, **NEAR)
    of_pairs = {name: measures[name] for name in ("pq", "dq", "sq", "f1")}  # which know no order of the two
    assert instance_metrics(drawn, found) | {"aji": 0} == pytest.approx(of_pairs | {"aji": 0}, **NEAR)
    shuffled, rising = np.array([0, *order]), np.array([0, *sorted(numbers)])
    assert instance_metrics(rising[found], shuffled[drawn]) == pytest.approx(measures, **NEAR)
    # Of predictions with equal IoU the AJI takes the one of the lowest label, so that it alone may change.
    assert instance_metrics(shuffled[found], drawn) | {"aji": 0} == pytest.approx(of_pairs | {"aji": 0}, **NEAR)
    assert instance_metrics(found, found) == dict.fromkeys(INSTANCE_METRICS, 1)
    assert instance_metrics(found, np.zeros_like(found)) == dict.fromkeys(INSTANCE_METRICS, float(not found.any()))


@given(map_pairs(2), st.sampled_from([0, 1, 1.5, 2, 3]))
@examples(100)
def test_boundary_f1_is_what_distances_between_pixels_say(pair, tolerance):
    score = boundary_f1(*pair, tolerance)
    assert score == pytest.approx(plain_boundary_f1(*pair, tolerance), **NEAR)
    assert boundary_f1(*pair[::-1], tolerance) == pytest.approx(score, **NEAR)
    assert 0 <= score <= boundary_f1(*pair, tolerance + 1) <= 1
    assert boundary_f1(pair[0], pair[0], tolerance) == 1
    for turn in TURNS:
        assert boundary_f1(turn(pair[0]), turn(pair[1]), tolerance) == pytest.approx(score, **NEAR)


@given(map_pairs(8))
@examples(50)
def test_soft_dice_is_what_its_sums_say(pair):
    first, second = (torch.from_numpy(values / 8)[None, None] for values in pair)
    a, b = ((values / 8).ravel().tolist() for values in pair)
    score = float(soft_dice(first, second))
    assert score == pytest.approx((2 * sum(map(math.prod, zip(a, b, strict=True))) + 1)
                                  / (sum(x * x for x in a) + sum(x * x for x in b) + 1))
    assert float(soft_dice(second, first)) == score
    assert 0 <= score <= 1
    assert float(soft_dice(first, first)) == 1
    assert a == b or score < 1


# ---- bands and tiles


@st.composite
def bands_and_spans(draw, length: int = 40):
    """Draw where bands of a length are cut, some of no rows, and windows that never begin or end further up."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=8)))
    starts = sorted(draw(st.lists(st.integers(0, length - 1), max_size=8)))
    stops = sorted(draw(st.integers(start + 1, length)) for start in starts)
    return length, [0, *cuts, length], list(zip(starts, stops, strict=True))


@given(bands_and_spans())
@examples(150)
def test_windows_hold_the_rows_of_their_spans(drawn):
    length, cuts, spans = drawn
    rows = np.arange(2 * length).reshape(length, 2)
    bands = [rows[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    found = list(windows(iter(bands), spans))
    assert len(found) == len(spans)
    assert all(np.array_equal(window, rows[a:b]) for window, (a, b) in zip(found, spans, strict=True))


@given(st.integers(0, 500), st.integers(1, 600), st.data())
@examples(100)
def test_even_spans_cover_every_row_once_and_in_order(length, rows, data):
    spans = even_spans(length, rows)
    assert [row for a, b in spans for row in range(a, b)] == list(range(length))
    assert all(b - a == rows for a, b in spans[:-1])
    assert all(1 <= b - a <= rows for a, b in spans)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=6))), length]
    bands = (np.arange(a, b) for a, b in zip(cuts, cuts[1:], strict=False))
    assert [part.tolist() for part in windows(bands, spans)] == [list(range(a, b)) for a, b in spans]


@given(st.integers(1, 200), st.integers(0, 60), st.integers(0, 20))
@examples(200)
def test_tiles_of_any_axis_weigh_one_at_each_pixel(steps, margin, more):
    length = steps * STEP
    tile = -(-(2 * margin + BLEND + STEP) // STEP) * STEP + more * STEP  # the smallest that a Predictor takes, and more
    offsets, weights = plan_axis(length, tile, margin)
    total = np.zeros(length)
    for offset, weight in zip(offsets, weights, strict=True):
        assert offset % STEP == 0
        assert len(weight) == min(tile, length)
        assert offset == 0 or not weight[:margin].any()
        assert offset + len(weight) == length or not weight[len(weight) - margin:].any()
        assert (weight >= 0).all()
        total[offset:offset + len(weight)] += weight
    assert offsets == sorted(set(offsets))
    assert np.abs(total - 1).max() < 1e-6


@pytest.fixture(scope="module")
def tile_checkpoints(tmp_path_factory) -> dict[int, tuple[Path, int]]:
    """Return checkpoints of native scale at stages 1 and 2, which need the smallest tiles, and how small these are."""
    folder, models = tmp_path_factory.mktemp("tile"), [lively_model(stage, out_channels=2) for stage in (1, 2)]
    return {model.stage: (write_checkpoint(folder / f"{model.stage}.pth", model, "tile"),
                          -(-(2 * tile_margin(model) + BLEND + STEP) // STEP) * STEP) for model in models}


SIDES = st.one_of(st.integers(1, 60), st.integers(250, 620))


@given(st.sampled_from([1, 2]), SIDES, SIDES, st.integers(0, 8), st.integers(1, 3), st.lists(st.integers(1, 300)))
@examples(25)
def test_tiles_of_any_size_give_what_one_tile_gives(tile_checkpoints, stage, height, width, more, batch_size, rows):
    path, smallest = tile_checkpoints[stage]
    image = noisy_image(height, width, seed=height)
    predictor, single = (Predictor(path, "cpu", "float32", tile, batch_size) for tile in (smallest + more * STEP, 1024))
    tiled, whole = predictor.predict(image), single.predict(image)
    assert tiled.shape == (height, width, 2)
    assert np.abs(tiled - whole).max() < 1e-4
    cuts = [0, *(cut for cut in np.cumsum(rows) if cut < height), height]
    bands = (image[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
    assert np.array_equal(np.concatenate(list(predictor.predict_bands(bands, height, width))), tiled)


# ---- growth


def trained_up_to(stage: int, in_channels: int, out_channels: int, base_channels: int, seed: int) -> ProgressiveUNet:
    """Return a network whose weights and statistics are away from their start up to a stage, and new beyond."""
    torch.manual_seed(seed)
    model = ProgressiveUNet(in_channels, out_channels, base_channels).double()
    model.set_image_statistics([0.4] * in_channels, [0.2] * in_channels)
    model.set_stage(stage)
    with torch.no_grad():
        live = model.live_state()
        for name, parameter in model.named_parameters():
            if name in live:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for _ in range(3):
            model(torch.rand(2, in_channels, 32, 32, dtype=torch.float64))
    return model


@given(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4),
       st.integers(1, 4), st.booleans(), st.integers(0, 99))
@examples(40)
def test_growth_of_any_network_preserves_its_function(stage, in_channels, out_channels, base_channels, rows, columns,
                                                      training, seed):
    model = trained_up_to(stage, in_channels, out_channels, base_channels, seed).train(training)
    multiple = 2 ** (stage + 1)
    x = torch.rand(2, in_channels, rows * multiple, columns * multiple, dtype=torch.float64)
    with torch.no_grad():
        before = model(mean2x2(x), return_all_scales=True)
        model.set_stage(stage + 1)
        after = model(x, return_all_scales=True)
    assert after[-1].shape == (2, out_channels, *x.shape[2:])
    for was, now in zip([*before, upsample2x(before[-1])], after, strict=True):
        assert (was - now).abs().max() <= 1e-8 * (1 + was.abs().max()), "round-off of float64"


# ---- the plan of a training


@st.composite
def plans(draw):
    """Draw a plan, and where a run stands in it: stage, epoch, step, steps an epoch, and the birth of a part."""
    stages = sorted(draw(st.sets(st.sampled_from(sorted(WORK)), min_size=1)))
    epochs = {stage: draw(st.integers(1, 60)) for stage in stages}
    plan = TrainingPlan(epochs, draw(st.floats(1e-6, 10)), draw(st.sampled_from(SCHEDULES)), draw(st.floats(0.01, 1)))
    steps, stage = draw(st.integers(1, 50)), draw(st.sampled_from(stages))
    return plan, stage, draw(st.integers(0, epochs[stage] - 1)), draw(st.integers(0, steps - 1)), steps, \
        draw(st.integers(1, stage))


@given(plans())
@examples(300)
def test_the_rate_is_positive_bounded_and_falls_slowly(drawn):
    plan, stage, epoch, step, steps, born = drawn
    rate = plan.rate(stage, epoch, step, steps, born)
    met = min(s for s in plan.epochs if s >= born)
    full = plan.lr * (plan.old_lr_scale if met < stage else 1)
    total, age = sum(plan.epochs.values()), plan.start_of(stage) + epoch + (step + 1) / steps - plan.start_of(met)
    assert 0 < rate <= full * (1 + 1e-12)
    work = plan.work(stage, epoch + (step + 1) / steps) / plan.work(max(plan.epochs), plan.epochs[max(plan.epochs)])
    progress = work if plan.schedule == "run" else (epoch + (step + 1) / steps) / plan.epochs[stage]
    warm = age >= WARM_UP * total
    if warm and progress <= FLAT_SHARE:
        assert rate == pytest.approx(full), "flat, after the warm-up and before the cosine"
    if warm:
        assert rate >= full * FINAL_RATE * (1 - 1e-9)
    # The next step of the stage: no faster than the warm-up rises, no faster than the cosine falls.
    after = plan.rate(stage, epoch + (step + 1) // steps, (step + 1) % steps, steps, born)
    share = (WORK[stage] / plan.work(max(plan.epochs), plan.epochs[max(plan.epochs)]) if plan.schedule == "run" else
             1 / plan.epochs[stage]) / steps
    assert after - rate <= full * (0 if warm else 1 / (WARM_UP * total * steps)) + 1e-9 * full
    assert rate - after <= full * share * math.pi / 2 / (1 - FLAT_SHARE) + 1e-9 * full
    last = max(plan.epochs)
    ends = [plan.rate(last, e, s, steps, last) for e, s in ((plan.epochs[last] - 1, steps - 1), (10 ** 6, 0))]
    if plan.epochs[last] >= WARM_UP * total:
        assert ends == pytest.approx([plan.lr * FINAL_RATE] * 2), "and there it stays"
    assert plan.rate(stage, epoch, step, steps, born) == rate


@given(plans(), st.integers(2, 4))
@examples(100)
def test_what_is_not_born_yet_has_no_rate(drawn, born):
    plan, stage, epoch, step, steps, _ = drawn
    assume(born > stage)
    assert plan.rate(stage, epoch, step, steps, born) == 0
    assert plan.rate(stage, 10 ** 6, step, steps, born) == 0, "beyond the planned end too"


@given(st.floats(0.01, 1e4), st.lists(st.floats(0, 100), min_size=4, max_size=4), st.integers(1, 4))
@examples(300)
def test_a_deal_takes_no_more_than_its_budget_and_leaves_no_epoch(budget, shares, first):
    wanted = dict(zip(range(1, 5), shares, strict=True))
    try:
        epochs = dict(zip(range(first, 5), deal(budget, shares, first), strict=True))
    except UserError:
        paid = sum(wanted[s] for s in range(first, 5))
        share = wanted[4] / paid if paid else 0
        assert budget * share < 1 + 1e-6, "the share of the last stage pays for no epoch"
        return
    left = budget * WORK[4] - sum(WORK[stage] * n for stage, n in epochs.items())
    slack = 1e-6 * WORK[4]
    assert left >= -slack
    assert all(n >= 0 for n in epochs.values())
    assert epochs[4] >= 1
    for stage, n in epochs.items():
        assert left <= WORK[stage] + slack or not wanted[stage], "what is left pays for no epoch"
        assert wanted[stage] or not n


@given(st.lists(st.integers(0, 500), min_size=4, max_size=4).filter(lambda epochs: epochs[3]))
@examples(150)
def test_shares_of_whole_epochs_give_these_epochs(epochs):
    work = [n * WORK[stage] for stage, n in enumerate(epochs, start=1)]
    assert deal(sum(work) / WORK[4], work) == tuple(epochs)


@given(st.floats(0.1, 1000), st.lists(st.floats(0.001, 500), min_size=4, max_size=4),
       st.lists(st.floats(0.1, 100), min_size=4, max_size=4), st.integers(1, 4), st.integers(0, 50))
@examples(150)
def test_minutes_are_dealt_to_no_more_epochs_than_they_pay(minutes, costs, shares, stage, finished):
    limit = TimeLimit(minutes, shares)
    limit.costs = dict(enumerate(costs, start=1))
    left = max(60 * minutes - limit.reserve, 0)
    more = limit.deal(stage, finished)
    more[stage] -= finished
    assert more.keys() == set(range(stage, 5))
    assert all(n >= 0 for n in more.values())
    assert more[4] or stage == 4, "it ends with a network of the last stage"
    taken = sum(n * limit.costs[s] for s, n in more.items())
    assert taken <= left * (1 + 1e-6) or more == dict.fromkeys(more, 0) | {4: 1}
