"""One epoch of training: batches become steps, and a batch that fails leaves the network as it was."""

import contextlib
import math

import torch

from system.errors import NonFiniteLossError
from system.processes import progress
from training.batches import Loader
from training.loss import refuse_non_finite
from training.means import PassMeasures
from training.memory import memory_explained
from training.optimization import BatchNormStatistics, age_batchnorms, young_batchnorms
from training.position import EpochPosition


class TrainingEpoch:
    """Train on every batch of a loader once, or on those that are left of an epoch that was cut off.

    Args:
        trainer: a ProgressiveTrainer.
        loader: see `ProgressiveTrainer.train_epoch`.
        epoch: within the stage, from 0.
        classes: channels that are scored.
        saved: where the epoch was cut off, as `EpochPosition.state` returned it; None at its beginning.
    """

    def __init__(self, trainer, loader: Loader, epoch: int, classes: int, saved: dict | None):
        self.trainer, self.epoch = trainer, epoch
        self.measures = PassMeasures(trainer.threshold, classes)
        self.position = EpochPosition(loader, self.measures, trainer.steps, trainer.device, saved)
        self.batches = len(loader)
        self._young, self._statistics = young_batchnorms(trainer.model), BatchNormStatistics(trainer.model)

    def run(self, begin) -> dict[str, float]:
        """Train, and return what `ProgressiveTrainer.train_epoch` does.

        Args:
            begin: called with the first batch before it is trained on.
        """
        trainer, position, first = self.trainer, self.position, self.position.done
        run_bar = trainer.bar  # of `fit`; a loop of one's own has a bar for each epoch
        bar = None if run_bar else progress(position, f"stage {trainer.model.stage} epoch {self.epoch + 1}")
        with contextlib.nullcontext(position) if bar is None else bar as batches:
            for i, batch in enumerate(batches, start=first):
                if i == first:
                    begin(batch)
                if i % trainer.accumulate == 0:
                    self._set_rates(i // trainer.accumulate)
                    self._statistics.keep()
                last = (i + 1) % trainer.accumulate == 0 or i + 1 == self.batches
                with self._statistics.restored_after_errors(), \
                        memory_explained(trainer.model.stage, len(batch["image"])):
                    logits, mask, loss = self._train_batch(batch, i, last)
                self.measures.add(logits.detach(), mask, loss.detach())
                position.done = i + 1
                if last and position.done < self.batches:
                    trainer.keeper.between_steps(trainer, position)
                if run_bar:
                    run_bar.advance(self.epoch + position.done / self.batches, self.measures.so_far)
                elif bar is not None and not bar.disable:
                    so_far = self.measures.so_far()
                    bar.set_postfix(loss=f"{so_far['loss']:.3f}", dice=f"{so_far['dice']:.3f}", refresh=False)
        metrics, seconds = self.measures.result(), position.seconds
        return metrics | trainer.steps.summary() | {
            "lr": max(group["lr"] for group in trainer.optimizer.param_groups), "seconds": seconds,
            "processor_seconds": position.processor_seconds, "images_per_second": self.measures.images / seconds}

    def _set_rates(self, step: int) -> None:
        """Set the rate of every part for one optimizer step."""
        plan, stage = self.trainer.plan, self.trainer.model.stage
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = plan.rate(stage, self.epoch, step, math.ceil(self.batches / self.trainer.accumulate),
                                    group["born"])

    def _train_batch(self, batch: dict, i: int, last: bool):
        """Add the gradients of batch `i` and, if it is the last one of a step, take the step.

        Returns:
            The finest logits, the mask on the device, and the loss.
        """
        trainer = self.trainer
        try:
            self._refuse_non_finite(batch["image"].sum(), "sum of the images", i, batch)
            with trainer.parallel.batch(last, age_batchnorms(self._young)) as network:
                logits, mask, loss = trainer.forward(batch, network)
                self._refuse_non_finite(loss, "loss", i, batch)
                trainer.steps.add(loss, len(mask))
            if last:
                norm = trainer.steps.prepare()
                if not trainer.scaler.is_enabled():  # float16 skips a step that overflows
                    self._refuse_non_finite(norm, "norm of the gradients", i, batch)
                trainer.take_step(norm)
        except BaseException as error:
            trainer.steps.forget()
            if isinstance(error, NonFiniteLossError) and trainer.folder:
                trainer.folder.save_refused(batch)
            raise
        return logits, mask, loss

    def _refuse_non_finite(self, value: torch.Tensor, what: str, i: int, batch: dict) -> None:
        refuse_non_finite(value, f"{what} at stage {self.trainer.model.stage}, epoch {self.epoch + 1}, batch {i + 1}",
                          batch.get("name"))
