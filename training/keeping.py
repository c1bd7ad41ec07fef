"""What a run saves so that it can go on, and how it stops when it is asked to."""

import signal
import time
from collections.abc import Callable

from checkpoints import save_checkpoint
from system.processes import all_reduce_sum
from system.signals import StoppedBySignal
from training.position import EpochPosition
from training.run_folder import RunFolder
from training.snapshots import resumable, snapshot


class Keeper:
    """Save a run at the end of an epoch and, every few minutes, in its middle; stop it, saved, at a signal.

    Args:
        folder: of the run; None where nothing is written, as in all processes but the first.
        save_every: epochs between two stage_X_epoch_Y.pth.
        save_minutes: between two last.pth within an epoch; 0 saves at the end of epochs alone.
    Attributes:
        asked_to_stop: returns the number of a signal that came, 0 for none (see system/signals.py).
    """

    def __init__(self, folder: RunFolder | None, save_every: int, save_minutes: float):
        self.folder, self.save_every, self.save_minutes = folder, save_every, save_minutes
        self.asked_to_stop: Callable[[], int] = lambda: 0
        self._saved_at = time.monotonic()

    def save_epoch(self, trainer, score: float, best: bool) -> None:
        """Save what an epoch with this validation Dice gives: the best of its stage, the one of its turn, the last."""
        if not self.folder:
            return
        stage, finished = trainer.model.stage, trainer.finished_epochs
        names = [f"best_stage_{stage}.pth"] * best
        names += [f"stage_{stage}_epoch_{finished}.pth"] * (finished % self.save_every == 0 and self.folder.keep > 0)
        for name in names:
            save_checkpoint(self.folder.file(name), snapshot(trainer, score))
        # Last, so that an interruption in between repeats the epoch instead of losing its best weights.
        self._save_last(trainer, score)
        self.folder.prune()

    def between_steps(self, trainer, position: EpochPosition) -> None:
        """Save last.pth if it is time, and stop, saved, if one of the processes was asked to."""
        due = bool(self.folder and self.save_minutes and time.monotonic() - self._saved_at >= 60 * self.save_minutes)
        asked, due = all_reduce_sum(self.asked_to_stop() > 0, due)
        if asked or due:
            self._save_last(trainer, None, position.state())
        if asked:
            self._stop()

    def between_epochs(self) -> None:
        """Stop if one of the processes was asked to."""
        if all_reduce_sum(self.asked_to_stop() > 0)[0]:
            self._stop()

    def _save_last(self, trainer, score: float | None, position: dict | None = None) -> None:
        if self.folder:
            self.folder.save_last(resumable(trainer, score, position))
        self._saved_at = time.monotonic()

    def _stop(self) -> None:
        if self.folder:
            self.folder.close()
        raise StoppedBySignal(self.asked_to_stop() or signal.SIGTERM)
