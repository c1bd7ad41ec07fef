"""Deal the minutes that a training may take to its stages, by the speed that is measured."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from images.resolutions import RESOLUTIONS
from system.devices import random_states, set_random_states
from system.errors import UserError
from system.processes import all_gather, is_main_process
from training.batches import check_loader, recipe_for
from training.dealing import SHARES, check_numbers, deal_work
from training.survey import SURVEYED

KEPT_BACK = 0.03      # of the time that is left, for what no epoch has shown yet
REHEARSED = 3         # batches that are timed at each stage, after one that is not
RECENT = 5            # epochs whose time says what the next will take
SCORING_FACTOR = 3.0  # scoring an image of the test split against validating it, at least
SHOWING_FACTOR = 2.0  # looking at a validation image at the end of a stage against validating it
ENDING = 4.0          # seconds for pictures, report, the last checkpoint and the end of the process


class FirstBatches:
    """The first batches of a loader, as a loader."""

    def __init__(self, loader, count: int):
        self._loader, self._count = loader, min(count, len(loader))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict]:
        for _, batch in zip(range(self._count), self._loader, strict=False):
            yield batch

    def __getattr__(self, name: str):
        return getattr(self._loader, name)  # data set, recipe, epoch


class TimeLimit:
    """The time of a training.

    Epochs are dealt to the stages when their speed is known, and anew after each epoch, so that the last ends in time
    with the learning rate at its end.

    Args:
        minutes: above 0, at most LARGEST.
        shares: of the time, for stages 1 to 4, in any unit.
        begun: when it began, by `time.monotonic`; without it, at the making of this object.
    """

    def __init__(self, minutes: float, shares: Sequence[float] = SHARES, begun: float | None = None):
        check_numbers("minutes", minutes, shares)
        self.minutes = minutes
        self.shares = dict(zip(range(1, len(RESOLUTIONS) + 1), shares, strict=True))
        self.costs: dict[int, float] = {}     # stage -> seconds of an epoch: training, validation and saving
        self.reserve = ENDING                 # seconds for what comes after the last epoch
        self.showing = ENDING                 # seconds for the pictures and the report of a stage before the last
        self._expected: dict[int, float] = {}  # the costs as they were rehearsed
        self._took: dict[int, list[float]] = {}  # stage -> seconds of its epochs since then
        self._spent: dict[int, float] = {}     # stage -> seconds of all its epochs
        self._begun = time.monotonic() if begun is None else begun
        self._epoch_begun = self._begun

    @property
    def elapsed(self) -> float:
        """Return the seconds since the training began, those before it was resumed included."""
        return time.monotonic() - self._begun

    @property
    def left(self) -> float:
        """Return the seconds that are left to train in."""
        return max(60 * self.minutes - self.elapsed - self.reserve, 0.0)

    def resume(self, state: dict) -> None:
        """Count the time that a training took before it was cut off."""
        self._begun -= state["elapsed"]
        self._spent = dict(state["spent"])

    def measure(self, trainer, dataloaders: dict[int, tuple], stages: Sequence[int]) -> None:
        """Measure what an epoch costs at each stage.

        Args:
            trainer: one that may be spoiled.
            dataloaders: resolution -> (train, valid, perhaps test) loaders.
        """
        for stage in stages:
            train, valid, *test = dataloaders[RESOLUTIONS[stage - 1]]
            trainer.set_stage(stage)
            trainer.train_epoch(FirstBatches(train, 1), 0)
            training, validating = (seconds_of_pass(run, loader) for run, loader in (
                (trainer.train_epoch, train), (trainer.validate_epoch, valid)))
            self.costs[stage] = training + validating
        images = len(getattr(test[0], "dataset", ())) if test else 0
        if shown := len(getattr(valid, "dataset", ())):
            self.reserve += SHOWING_FACTOR * validating * min(1, SURVEYED / shown)
        self.reserve += SCORING_FACTOR * images * validating / len(getattr(valid, "dataset", valid))
        self._expected = dict(self.costs)
        self._epoch_begun = time.monotonic()

    def begin_stage(self) -> None:
        """Begin to time epochs after what is written at the end of a stage; learn from it what later ones take."""
        seconds = self._lap()
        if self._took:
            self.showing = seconds

    def end_epoch(self, stage: int) -> None:
        """Learn from an epoch that has just ended what the next ones will take."""
        seconds = self._lap()
        self._took.setdefault(stage, []).append(seconds)
        self._spent[stage] = self._spent.get(stage, 0.0) + seconds
        # Medians, as one epoch that something held up says little of the next.
        slower = median(took / self._expected[s] for s, epochs in self._took.items() for took in epochs[-RECENT:])
        self.costs = {s: cost * slower for s, cost in self._expected.items()}
        self.costs[stage] = median(self._took[stage][-RECENT:])

    def deal(self, stage: int, finished: int) -> dict[int, int]:
        """Return stage -> epochs of this and the later stages, those that are finished included.

        Args:
            stage: the current one, of those rehearsed.
            finished: its finished epochs.
        """
        costs = {s: cost for s, cost in self.costs.items() if s >= stage}
        last, total, spent = max(costs), sum(self.shares[s] for s in costs), self._spent.get(stage, 0.0)
        shown = sum(self.shares[s] > 0 for s in costs if s != last)  # the last stage is in the reserve
        left = max(self.left - self.showing * shown, 0.0) * (1 - KEPT_BACK)
        wanted = {s: self.shares[s] / total * (left + spent) for s in costs}
        wanted[stage] = max(wanted[stage] - spent, 0.0)
        more = deal_work(left, wanted, costs)
        if not more[last] and not (stage == last and finished):  # it ends with a network of the last stage
            del wanted[last]
            more = deal_work(max(left - costs[last], 0.0), wanted, costs) | {last: 1}
        return more | {stage: more[stage] + finished}

    def _lap(self) -> float:
        """Return the seconds since it was last asked, and count from here on."""
        seconds = time.monotonic() - self._epoch_begun
        self._epoch_begun += seconds
        return seconds

    def too_little(self, epochs: dict[int, int]) -> str:
        """Return what to say if the time does not pay for the epochs that were dealt first, else ''."""
        needed = sum(n * self.costs[s] for s, n in epochs.items() if s in self.costs) + self.elapsed + self.reserve
        needed += self.showing * (sum(n > 0 for n in epochs.values()) - 1)
        last = max(self.costs)
        return "" if needed <= 60 * self.minutes else (
            f"{self.minutes:g} minutes pay for no epoch at {RESOLUTIONS[last - 1]} pixels: one takes "
            f"{self.costs[last]:.0f} s here, the start and the test {self.elapsed + self.reserve:.0f} s. Take at least "
            f"{math.ceil(needed / 60 + 0.5)} minutes, or fewer --base_channels")

    def sentence(self, epochs: dict[int, int]) -> str:
        """Return what was measured and dealt, in words."""
        costs = ", ".join(f"{cost:.3g}" for cost in self.costs.values())
        return (f"{self.minutes:g} minutes: an epoch takes {costs} s at stages {min(self.costs)} to {max(self.costs)}; "
                f"{', '.join(str(epochs.get(s, 0)) for s in self.costs)} epochs fit. They are dealt anew after each")

    def state(self) -> dict:
        """Return what `resume` takes, as plain types."""
        return {"elapsed": self.elapsed, "spent": dict(self._spent)}


def seconds_of_pass(run, loader) -> float:
    """Return how long a pass over a loader would take, from its first batches."""
    few = FirstBatches(loader, REHEARSED)
    begin = time.monotonic()
    run(few, 0)
    return (time.monotonic() - begin) / len(few) * len(loader)


def rehearse(trainer, dataloaders: dict[int, tuple], say: Callable[[str], None] = print) -> None:
    """Deal the time limit of a trainer to its stages by their speed, measured on a copy; `fit` does so by itself.

    Args:
        trainer: a ProgressiveTrainer.
        dataloaders: as for `ProgressiveTrainer.fit`.
    Raises:
        UserError: if the time pays for no epoch of the last stage.
    """
    limit, states = trainer.time_limit, random_states(trainer.device)
    first = dataloaders[RESOLUTIONS[trainer.model.stage - 1]][0]
    check_loader(first)
    trainer.recipe = recipe_for(trainer.model, first, trainer.recipe)  # not from the few batches that are timed
    copied = type(trainer)(copy.deepcopy(trainer.model), trainer.device, 1, trainer.plan.lr, trainer.precision,
                           accumulate=trainer.accumulate, recipe=trainer.recipe,
                           average=trainer.averaged.decay if trainer.averaged else 0.0)
    limit.measure(copied, dataloaders, range(trainer.model.stage, len(RESOLUTIONS) + 1))
    copied.leave_group()
    set_random_states(states, trainer.device)
    deal_time(trainer)
    if not trainer.course.begun and (too_little := all_gather(limit.too_little(trainer.plan.epochs))[0]):
        raise UserError(too_little)
    if is_main_process():
        say(limit.sentence(trainer.plan.epochs))


def deal_time(trainer) -> None:
    """Plan the epochs that fit into the time limit of a trainer, alike in all processes."""
    dealt = trainer.time_limit.deal(trainer.model.stage, trainer.finished_epochs)
    trainer.course.replan(all_gather(dealt)[0])
