"""Where an epoch stands in its middle: what last.pth holds then, and how a run goes on with the very next batch."""

import time
from collections.abc import Iterator

import torch

from system.devices import random_states, set_random_states
from system.errors import UserError
from system.processes import all_gather, rank, world_size
from training.batches import Loader
from training.means import PassMeasures
from training.steps import OptimizerSteps


class EpochPosition:
    """Count the batches of one epoch, and go on from where an earlier process was cut off.

    Args:
        loader: of the epoch.
        measures, steps: what is added up over the epoch.
        device: whose random states are kept.
        saved: what `state` returned in the process that was cut off; None for an epoch that begins.
    Attributes:
        done: batches that are done; the weights know of no further one.
    Raises:
        UserError: for a loader of another number of batches than before.
    """

    def __init__(self, loader: Loader, measures: PassMeasures, steps: OptimizerSteps, device: torch.device,
                 saved: dict | None = None):
        self._loader, self._measures, self._steps, self._device = loader, measures, steps, device
        self._start, self._busy = time.perf_counter(), time.process_time()
        self.done = 0
        self._begun_with = random_states(device)
        if saved:
            self._go_on(saved)

    def _go_on(self, saved: dict) -> None:
        if saved["batches"] != len(self._loader):
            raise UserError(f"the run was cut off after batch {saved['done']} of {saved['batches']}, but the loader "
                            f"has {len(self._loader)} batches. Resume with the data and the batch sizes that it had")
        self.done, self._begun_with = saved["done"], saved["begun_with"]
        self._start -= saved["seconds"]
        self._busy -= saved["processor_seconds"]
        parts = saved["sums"]
        if len(parts) == world_size():
            self._measures.load(parts[rank()])
        elif rank() == 0:  # as many processes as before are not there; the sum over all is what counts
            for part in parts:
                self._measures.load(part)
        self._steps.load(saved["steps"])

    def __len__(self) -> int:
        """Return how many batches are to come."""
        return len(self._loader) - self.done

    def __iter__(self) -> Iterator[dict]:
        """Yield the batches that are to come, with random states as if all had been yielded."""
        if not self.done:
            yield from self._loader
            return
        if hasattr(self._loader, "starting_at"):
            yield from self._loader.starting_at(self.done)
            return
        now = random_states(self._device)
        set_random_states(self._begun_with, self._device)  # with which a plain loader shuffled
        for i, batch in enumerate(self._loader):
            if i == self.done - 1:
                set_random_states(now, self._device)
            if i >= self.done:
                yield batch

    @property
    def seconds(self) -> float:
        """Return the seconds of the epoch so far, those before a cut included."""
        return time.perf_counter() - self._start

    @property
    def processor_seconds(self) -> float:
        """Return the processor time of the epoch so far, of all threads of this process."""
        return time.process_time() - self._busy

    def state(self) -> dict:
        """Return what a later process goes on from, as plain types and tensors; all processes call it together."""
        return {"batches": len(self._loader), "done": self.done, "begun_with": self._begun_with,
                "sums": all_gather(self._measures.state()), "steps": self._steps.state(), "seconds": self.seconds,
                "processor_seconds": self.processor_seconds}
