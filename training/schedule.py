"""The plan of a run: epochs of each stage and the learning rate of every step, as pure functions of the position.

Nothing here has a state, so a resumed run needs none, and the loop of `train_epoch` takes the same path as `fit`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from system.errors import UserError
from system.options import LARGEST

# Operations of an image at each stage, relative to one another (GFLOP, forward and backward, at 64 channels), and
# those of the classic U-Net at 256 pixels.
WORK = {1: 4.9, 2: 14.5, 3: 35.6, 4: 98.6}
WORK_BEFORE = {1: 40, 2: 80, 3: 120, 4: 185}  # of the wider network, whose runs and studies do not tell theirs
CLASSIC_WORK = 289

FLAT_SHARE = 0.4    # of the run's work, at the full rate, before the cosine
WARM_UP = 0.02      # of the run's epochs, for every part from its birth
OLD_LR_SCALE = 0.3  # of the rate, for parts that an earlier stage trained
FINAL_RATE = 0.01   # of the full rate, reached at the planned end and kept beyond
SCHEDULES = ("run", "stage")


def epochs_by_stage(epochs_per_stage: int | Sequence[int], stages: Sequence[int]) -> dict[int, int]:
    """Return stage -> epochs from one number for all stages, one a planned stage, or one for each of the four.

    A stage of 0 epochs is left out; the last has at least 1.
    """
    plain = getattr(epochs_per_stage, "tolist", lambda: epochs_per_stage)()  # of NumPy's numbers and arrays
    given = list(plain) if isinstance(plain, Sequence) else [plain] * len(stages)
    if len(given) == len(WORK) and len(stages) < len(WORK):
        given = [given[stage - 1] for stage in stages]
    whole = all(type(n) is int and 0 <= n <= LARGEST for n in given)
    if len(given) != len(stages) or not whole or given[-1] < 1:
        raise UserError(f"epochs_per_stage is {epochs_per_stage!r}; it takes one whole number of at least 1, or one "
                         f"for each of the stages {list(stages)}: 0 skips a stage, and the last has at least 1 "
                         f"(and at most {LARGEST})")
    return {stage: n for stage, n in zip(stages, given, strict=True) if n}


@dataclass(frozen=True)
class TrainingPlan:
    """What a run intends.

    Args:
        epochs: stage -> epochs, in the order of training.
        lr: full learning rate.
        schedule: 'run', one schedule over the whole run, or 'stage', one that restarts at each stage.
        old_lr_scale: factor on the rate of parts that an earlier stage of the run has trained.
    """

    epochs: dict[int, int]
    lr: float = 1e-3
    schedule: str = "run"
    old_lr_scale: float = OLD_LR_SCALE

    def __post_init__(self):
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"lr is {self.lr!r}; it must be a number above 0, e.g. 1e-3")
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}")
        if not (math.isfinite(self.old_lr_scale) and self.old_lr_scale >= 0):
            raise UserError(f"old_lr_scale is {self.old_lr_scale!r}; it must be a number of at least 0")

    def with_epochs(self, stage: int, epochs: int) -> "TrainingPlan":
        """Return the plan with another number of epochs at one stage."""
        return replace(self, epochs=dict(sorted((self.epochs | epochs_by_stage(epochs, [stage])).items())))

    def starting_at(self, stage: int) -> "TrainingPlan":
        """Return the plan without the stages below."""
        return replace(self, epochs={s: n for s, n in self.epochs.items() if s >= stage})

    def start_of(self, stage: int) -> int:
        """Return how many epochs are planned before a stage."""
        return sum(n for s, n in self.epochs.items() if s < stage)

    def work(self, stage: int, epochs: float) -> float:
        """Return what is done of the run after so many epochs of a stage, in the units of WORK times epochs."""
        return sum(WORK[s] * n for s, n in self.epochs.items() if s < stage) + WORK[stage] * epochs

    def rate(self, stage: int, epoch: int, step: int, steps: int, born: int) -> float:
        """Return the learning rate of one optimizer step for a part born at stage `born`.

        Flat for 40 % of the run's work, then a cosine down to 1 %. Work is counted in operations, so that many cheap
        epochs at the coarse stages do not use the rate up before the finest level is born. Every part warms up
        linearly over 2 % of the run's epochs from the start of the stage of its birth (or from the start of the run,
        if that stage comes before the plan; or from that of the next stage, if it is skipped). Parts that an earlier
        stage has trained go on more slowly: where all learn at the full rate, Dice falls in the first epochs after a
        growth (docs/experiments.md). What is not born yet has a rate of 0, and all has at a stage below the plan. With
        the schedule 'stage' each stage's epochs are in place of the run's work.
        """
        born = min((planned for planned in self.epochs if planned >= born), default=born)  # when the run meets it
        if born > stage:
            return 0.0
        total = sum(self.epochs.values())
        within = epoch + (step + 1) / steps
        position = self.start_of(stage) + within
        last = max(self.epochs)
        progress = self.work(stage, within) / self.work(last, self.epochs[last]) if self.schedule == "run" else \
            within / self.epochs[stage]
        falling = min(max((progress - FLAT_SHARE) / (1 - FLAT_SHARE), 0.0), 1.0)
        factor = FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * falling)) / 2
        age = position - self.start_of(born)
        warm = min(1.0, age / (WARM_UP * total))
        return self.lr * factor * warm * (self.old_lr_scale if born < stage else 1.0)
