"""Tests of trainings that end in time.

    python -m pytest tests/test_time_limit.py
"""

import copy

import pytest
import torch

from checkpoints import load_checkpoint
from conftest import TINY, make_trainer, metric_rows, run_script, tensors_equal
from images.resolutions import RESOLUTIONS
from progressive_trainer import ProgressiveTrainer
from system.errors import UserError
from training import time_limit
from training.schedule import FINAL_RATE
from training.time_limit import FirstBatches, TimeLimit, rehearse
from unet import ProgressiveUNet


class Clock:
    """A clock that tests set."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time_limit.time, "monotonic", lambda: self.now)


class PretendedTrainer:
    """Takes seconds of a clock for each batch of a stage, and half as many for each of validation."""

    def __init__(self, clock: Clock, seconds: dict[int, float]):
        self.clock, self.seconds = clock, seconds

    def set_stage(self, stage: int) -> None:
        self.stage = stage

    def train_epoch(self, loader, epoch: int) -> None:
        self.clock.now += self.seconds[self.stage] * sum(1 for _ in loader)

    def validate_epoch(self, loader, epoch: int) -> None:
        self.clock.now += self.seconds[self.stage] / 2 * sum(1 for _ in loader)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def rehearsed(clock: Clock, minutes: float, shares=(25, 25, 25, 25)) -> TimeLimit:
    """Return a limit that knows its costs: an epoch takes 5, 10, 20 and 40 seconds; 32.5 went by to learn that."""
    limit = TimeLimit(minutes, shares)
    loaders = dict.fromkeys(RESOLUTIONS, (range(8), range(4)))
    limit.measure(PretendedTrainer(clock, {1: 0.5, 2: 1, 3: 2, 4: 4}), loaders, (1, 2, 3, 4))
    return limit


def test_the_first_batches_of_a_loader_are_a_loader():
    class Loader(list):
        dataset = "its data set"
    few = FirstBatches(Loader([1, 2, 3]), 2)
    assert (list(few), len(few), few.dataset) == ([1, 2], 2, "its data set")
    assert list(FirstBatches([1], 2)) == [1]
    with pytest.raises(AttributeError):
        _ = few.batches


def test_costs_are_those_of_whole_passes(clock):
    limit = rehearsed(clock, 10)
    assert limit.costs == pytest.approx({1: 5, 2: 10, 3: 20, 4: 40}), "8 batches of training, 4 of validation"
    assert clock.now == pytest.approx((1 + 3 + 3 / 2) * (0.5 + 1 + 2 + 4)), "of few batches"
    assert limit.reserve == time_limit.ENDING, "no test split was given"
    tested = TimeLimit(10)
    pretended = PretendedTrainer(clock, {4: 4})
    tested.measure(pretended, {256: (range(8), range(4), range(100))}, [4])
    assert tested.reserve == time_limit.ENDING, "nor is a loader without a data set one"


def test_minutes_are_dealt_by_shares_of_time(clock):
    limit = rehearsed(clock, 20)
    left = (20 * 60 - clock.now - limit.reserve - 3 * limit.showing) * (1 - time_limit.KEPT_BACK)
    dealt = limit.deal(1, 0)
    assert dealt == {1: 55, 2: 27, 3: 14, 4: 7}, "a quarter each of 1109 seconds, all in all"
    assert left - 40 < sum(limit.costs[s] * n for s, n in dealt.items()) <= left
    assert limit.too_little(dealt) == ""
    assert "20 minutes: an epoch takes 5, 10, 20, 40 s at stages 1 to 4; 55, 27, 14, 7 epochs" in limit.sentence(dealt)
    assert rehearsed(clock, 20, (0, 0, 50, 50)).deal(1, 0) == {1: 0, 2: 0, 3: 27, 4: 14}


def test_a_machine_that_gets_slower_gets_fewer_epochs(clock):
    limit = rehearsed(clock, 20)
    for _ in range(10):
        clock.now += 10
        limit.end_epoch(1)
    assert limit.costs == pytest.approx({1: 10, 2: 20, 3: 40, 4: 80}), "what is to come is taken to be slower too"
    dealt = limit.deal(1, 10)
    assert dealt == {1: 27, 2: 14, 3: 8, 4: 3}, "half as many, of 277 seconds each"
    clock.now += 300
    limit.end_epoch(1)
    assert limit.costs[4] == pytest.approx(80), "one epoch that something held up is no slow machine"
    assert limit.deal(1, 11)[1] == 11, "but its stage has had its time"


def test_what_a_stage_takes_is_seen_in_its_own_epochs(clock):
    limit = rehearsed(clock, 60)
    for stage, seconds in ((1, 10), (2, 10)):
        for _ in range(6):
            clock.now += seconds
            limit.end_epoch(stage)
    assert limit.costs == pytest.approx({1: 7.5, 2: 10, 3: 30, 4: 60}), "stage 1 was twice as slow, stage 2 as expected"


def test_the_pictures_of_a_stage_are_not_taken_for_an_epoch_of_the_next(clock):
    limit = rehearsed(clock, 20)
    limit.begin_stage()
    for _ in range(55):
        clock.now += 5
        limit.end_epoch(1)
    before = limit.deal(1, 55)
    clock.now += 30  # seconds for pictures and report
    limit.begin_stage()
    clock.now += 10
    limit.end_epoch(2)
    assert limit.costs == pytest.approx({1: 5, 2: 10, 3: 20, 4: 40})
    assert limit.state()["spent"] == {1: 275, 2: 10}
    after = limit.deal(2, 1)
    assert (before[2], after[2]) == (28, 26), "a third of what is left, without 2 times 30 seconds for what comes"
    assert after[4] == 6, "or 7 without them"


def test_it_ends_with_a_network_of_the_last_stage(clock):
    limit = rehearsed(clock, 5)
    clock.now += 265
    limit.end_epoch(2)
    assert limit.deal(2, 1) == {2: 1, 3: 0, 4: 1}, "a little late"
    assert limit.deal(4, 1) == {4: 1}, "and then no more"
    short = rehearsed(clock, 1.82, (30, 30, 30, 10))
    assert short.deal(1, 0) == {1: 0, 2: 1, 3: 0, 4: 1}, "its share pays for none, the whole does"
    assert short.too_little(short.deal(1, 0)) == ""
    none = rehearsed(clock, 1)
    assert "1 minutes pay for no epoch at 256 pixels: one takes 40 s here" in none.too_little(none.deal(1, 0))


def test_what_went_by_before_counts(clock):
    clock.now = 100.0
    assert TimeLimit(1, begun=70.0).elapsed == 30
    assert TimeLimit(1).elapsed == 0


def test_time_goes_on_after_an_interruption(clock):
    limit = rehearsed(clock, 20)
    clock.now += 100
    limit.end_epoch(1)
    state = limit.state()
    assert state == {"elapsed": pytest.approx(100 + 41.25), "spent": {1: 100}}
    later = rehearsed(clock, 20)
    later.resume(state)
    assert later.elapsed == pytest.approx(141.25 + 41.25)
    left = (1200 - 182.5 - later.reserve) * (1 - time_limit.KEPT_BACK)
    assert later.deal(1, 1)[1] == 1 + int(((left + 100) / 4 - 100) / 5), "a quarter, less what was spent"


@pytest.fixture
def slow_epochs(clock, monkeypatch) -> Clock:
    """Let a batch of training take 1, 2, 4 and 8 seconds of the clock at the four stages."""
    train_epoch = ProgressiveTrainer.train_epoch

    def train_slowly(self, loader, epoch):
        clock.now += 2 ** (self.model.stage - 1) * len(loader)
        return train_epoch(self, loader, epoch)
    monkeypatch.setattr(ProgressiveTrainer, "train_epoch", train_slowly)
    return clock


def test_a_run_ends_in_time_with_the_rate_at_its_end(shared_root, tmp_path, slow_epochs):
    said = []
    trainer, loaders = make_trainer(shared_root, tmp_path / "run", time_limit=TimeLimit(2.6, (10, 0, 30, 60)))
    start = slow_epochs.now
    trainer.fit(loaders, say=said.append)
    assert said[0].startswith("2.6 minutes: an epoch takes 3, 6, 12, 24 s")
    rows = metric_rows(tmp_path / "run")
    assert [(row["stage"], row["epoch"], row["run_epoch"]) for row in rows[-2:]] == [("4", "1", "6"), ("4", "2", "7")]
    assert 156 - 24 - 10 < slow_epochs.now - start <= 156
    assert trainer.plan.rate(4, 1, 2, 3, born=4) == pytest.approx(trainer.plan.lr * FINAL_RATE)
    saved = load_checkpoint(tmp_path / "run/last.pth")
    assert 0 < saved["time_limit"]["elapsed"] <= 156
    finished, loaders = make_trainer(shared_root, tmp_path / "run", time_limit=TimeLimit(2.6))
    finished.resume(tmp_path / "run/last.pth")
    finished.fit(loaders, say=said.append)
    assert len(metric_rows(tmp_path / "run")) == len(rows), "the time before the interruption counts"


def test_the_speed_is_measured_on_a_copy(shared_root):
    trainer, loaders = make_trainer(shared_root, time_limit=TimeLimit(1000))
    before, state = copy.deepcopy(trainer.model), torch.get_rng_state()
    rehearse(trainer, loaders, say=lambda line: None)
    assert tensors_equal(trainer.model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.stage == 1
    assert trainer.plan.epochs[4] > 100


def test_statistics_of_plain_loaders_are_those_of_all_batches(tmp_path, capsys):
    """They were printed of the few batches that are timed."""
    plain = {side: [{"image": torch.full((2, 1, side, side), i / 10), "mask": torch.zeros(2, 1, side, side)}
                    for i in range(9)] for side in RESOLUTIONS}
    trainer = ProgressiveTrainer(ProgressiveUNet(1, 1, base_channels=4), "cpu", time_limit=TimeLimit(1000))
    rehearse(trainer, {side: (batches, batches) for side, batches in plain.items()}, say=lambda line: None)
    assert capsys.readouterr().out.count("the loader carries no data recipe: mean 0.4000 and") == 1
    assert trainer.recipe.mean == pytest.approx([0.4])


def test_too_little_time_is_refused_before_anything_is_trained(shared_root, tmp_path):
    done = run_script("train_papsmear.py", "--data_root", shared_root, "--output_dir", tmp_path, *TINY[:2],
                      "--max_minutes", "0.01")
    assert done.returncode == 2
    assert "0.01 minutes pay for no epoch at 256 pixels" in done.stderr
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(("options", "message"), [
    (("--max_minutes", "5", "--budget", "3"), "--budget and --max_minutes both say how long"),
    (("--max_minutes", "5", "--epochs_per_stage", "3"), "--max_minutes and --epochs_per_stage both say how long"),
    (("--max_minutes", "0"), "is not a number above 0")])
def test_what_contradicts_a_time_limit_is_refused(options, message):
    from training.settings import parse
    with pytest.raises((UserError, SystemExit)) as error:
        parse([*options])
    if isinstance(error.value, UserError):
        assert message in str(error.value)
