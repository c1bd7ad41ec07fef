"""The course of a run: what is planned, how far it is, and the best score of each stage."""

import dataclasses
import math
from collections.abc import Sequence

from images.resolutions import RESOLUTIONS
from system.errors import UserError
from training.schedule import TrainingPlan, epochs_by_stage


class Course:
    """Where a run stands in its plan.

    Args:
        plan: of all stages that may be trained.
    """

    def __init__(self, plan: TrainingPlan):
        self._whole = self.plan = plan  # the second without the stages that were left out at the start
        self.finished_epochs = 0        # of the current stage
        self.best_scores: dict[int, float] = {}
        self.begun = False             # a step was taken
        self._recorded: tuple[int, int] | None = None  # stage and epoch

    def enter(self, stage: int, new: bool, epochs: int | None = None) -> None:
        """Come to a stage.

        Args:
            new: whether the run was at another one.
            epochs: planned for it, where they differ from the plan.
        """
        if new:
            self.finished_epochs = 0
        whole = self._whole
        if epochs is not None or stage not in whole.epochs:
            whole = whole.with_epochs(stage, next(iter(whole.epochs.values())) if epochs is None else epochs)
        self._whole = whole
        # What lies below the first stage that is trained is no part of the run.
        self.plan = whole.starting_at(min(stage, *self.plan.epochs) if self.begun else stage)

    def step(self) -> None:
        """Note that the optimizer has stepped: what is planned from here on was begun."""
        self.begun = True

    def next_stage(self, stage: int) -> int | None:
        """Return the first planned stage from `stage` on; None if there is none."""
        return min((planned for planned in self._whole.epochs if planned >= stage), default=None)

    def left(self, stage: int) -> int:
        """Return how many epochs of the current stage are to come."""
        return self.plan.epochs.get(stage, 0) - self.finished_epochs

    def ended(self, stage: int) -> bool:
        """Tell whether nothing is to come of a run that was begun."""
        return self.begun and self.left(stage) <= 0 and self.next_stage(stage + 1) is None

    def replan(self, epochs: dict[int, int]) -> None:
        """Change the epochs of some stages; those of 0 are left out."""
        changed = {s: n for s, n in sorted((self._whole.epochs | epochs).items()) if n}
        self._whole = dataclasses.replace(self._whole, epochs=changed)
        self.plan = self._whole.starting_at(min(self.plan.epochs)) if self.begun else self._whole

    def change_last_stage(self, epochs_per_stage: int | Sequence[int], stage: int) -> None:
        """Let the last stage of a run take more epochs, or fewer; the schedule is drawn anew over the whole plan.

        Args:
            epochs_per_stage: of the whole plan (see `training.schedule.epochs_by_stage`).
            stage: where the run stands.
        Raises:
            UserError: if another stage would change, or the last one has trained for longer already.
        """
        now, epochs = self.plan.epochs, epochs_by_stage(epochs_per_stage, list(self.plan.epochs))
        last = max(now)
        if epochs | {last: 0} != now | {last: 0}:
            raise UserError(f"epochs_per_stage is {epochs_per_stage!r}; of a run that goes on the last stage alone may "
                            f"change, and this one has {', '.join(f'{n} at stage {s}' for s, n in now.items())}")
        if stage == last and epochs[last] < self.finished_epochs:
            raise UserError(f"epochs_per_stage is {epochs_per_stage!r}, but stage {last} has trained for "
                            f"{self.finished_epochs} epochs already. Give at least as many")
        self.replan(epochs)

    def record(self, stage: int, valid: dict[str, float]) -> bool:
        """Count the epoch that was trained last as recorded; return whether its Dice is the best of the stage.

        Raises:
            UserError: if it is recorded already, or there is none.
        """
        if not self.finished_epochs or self._recorded == (stage, self.finished_epochs):
            raise UserError("there is no epoch to record, or it is recorded already; call train_epoch and "
                            "validate_epoch before each record")
        self._recorded = stage, self.finished_epochs
        best = valid["dice"] > self.best_scores.get(stage, -math.inf)
        if best:
            self.best_scores[stage] = valid["dice"]
        return best

    def described(self, stage: int) -> dict[str, str]:
        """Return stage, epochs and best scores in words."""
        epochs, best, side = self.plan.epochs, self.best_scores, RESOLUTIONS[stage - 1]
        return {"stage": f"{stage} ({side}x{side})",
                "epochs": f"{self.finished_epochs} of {epochs.get(stage, 0)}, planned "
                          + ", ".join(f"{n} at stage {s}" for s, n in epochs.items()),
                "best validation dice": ", ".join(f"{dice:.3f} at stage {s}" for s, dice in best.items()) or "none yet"}

    def run_epoch(self, stage: int) -> int:
        """Return the number of the epoch that was trained last, counted over the planned run."""
        return self.plan.start_of(stage) + self.finished_epochs

    def state(self) -> dict:
        """Return what a checkpoint holds of it, as plain types."""
        return {"epoch": self.finished_epochs, "best_scores": dict(self.best_scores),
                "plan": dataclasses.asdict(self.plan)}

    def load(self, saved: dict) -> None:
        """Go on from the fields of a checkpoint."""
        self._whole = self.plan = TrainingPlan(**saved["plan"])
        self.best_scores, self.finished_epochs, self.begun = dict(saved["best_scores"]), saved["epoch"], True
