"""One bar over a whole run, and the time that is left, both counted in operations, as epochs differ."""

import math
import time
from collections.abc import Callable

from system.processes import progress
from system.text import duration
from unet import STAGE_RESOLUTIONS

FIRST_WORD = 30.0  # seconds of training after which the time left is said where no bar is seen
ENOUGH = 5.0       # seconds at a stage after which its own speed counts

LOOK = {"bar_format": "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}", "total": 1.0}


class RunBar:
    """Show how far a run is, with its stage, its Dice and the time left; nothing where there is nobody to see it.

    Args:
        trainer: a ProgressiveTrainer, whose plan says what there is to do.
        say: called once with the time left, after half a minute, where the bar is not seen.
    """

    def __init__(self, trainer, say: Callable[[str], None] = print):
        self._trainer, self._say, self._said = trainer, say, False
        self._bar = progress(None, "", **LOOK)
        self._begun = self._here = (time.monotonic(), None)  # times, with the work done, of the run and of this stage
        self._stage, self._work = 0, 0.0
        self._dice = ""

    def __enter__(self) -> "RunBar":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    @property
    def seen(self) -> bool:
        """Tell whether there is a terminal or a notebook that shows the bar."""
        return not self._bar.disable

    def enter(self, epoch: float) -> None:
        """Come to a stage, of which so many epochs are done."""
        self._stage = self._trainer.model.stage
        self._work = self._trainer.plan.work(self._stage, epoch)
        self._here = (time.monotonic(), self._work)
        self._begun = self._begun if self._begun[1] is not None else self._here
        self._show(epoch)

    def advance(self, epoch: float, measures: Callable[[], dict[str, float]]) -> None:
        """Go on.

        Args:
            epoch: finished epochs of this stage, with the part of the one that is under way.
            measures: gives its measures so far; called where they are shown.
        """
        self._work = self._trainer.plan.work(self._stage, epoch)
        if self.seen:
            self._show(epoch, f"dice {measures()['dice']:.3f}")
        elif not self._said and time.monotonic() - self._begun[0] >= FIRST_WORD:
            self._said = True
            if words := self.left_in_words():
                self._say(f"{words}, by the speed of the first steps")

    def validated(self, dice: float) -> None:
        """Show the validation Dice of the last epoch from now on."""
        self._dice = f", valid {dice:.3f}"

    def say(self, line: str) -> None:
        """Say a line above the bar."""
        with self._bar.external_write_mode():
            self._say(line)

    def left(self) -> float | None:
        """Return the seconds that the rest of the training will take; None before the first step.

        The operations that are left go on at the speed of this stage so far, or of the run where it has just begun.
        With a time limit they are what is left of it.
        """
        if limit := self._trainer.time_limit:
            return limit.left
        now = time.monotonic()
        here = now - self._here[0] >= ENOUGH and self._work > self._here[1]
        begin, before = self._here if here else self._begun
        if before is None or self._work <= before:
            return None
        return (self._whole - self._work) * (now - begin) / (self._work - before)

    def left_in_words(self) -> str:
        """Return what to say of the time left, '' where nothing is known or left."""
        left = self.left()
        return f"about {duration(left)} left" if left and self._work < self._whole else ""

    @property
    def _whole(self) -> float:
        last = max(self._trainer.plan.epochs)
        return self._trainer.plan.work(last, self._trainer.plan.epochs[last])

    def _show(self, epoch: float, measures: str = "") -> None:
        side, epochs = STAGE_RESOLUTIONS[self._stage], self._trainer.plan.epochs[self._stage]
        self._bar.set_description_str(f"stage {self._stage} ({side}) epoch {max(math.ceil(epoch), 1)}/{epochs}",
                                      refresh=False)
        left = self.left_in_words().removeprefix("about ")
        self._bar.set_postfix_str(", ".join(filter(None, (left, measures))) + self._dice, refresh=False)
        self._bar.update(min(self._work / self._whole, 1.0) - self._bar.n)
