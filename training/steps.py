"""Steps of the optimizer: gradients of one or several batches become the mean over their images, then a step."""

import math

import torch
from torch import nn

from system.processes import all_reduce_sum, world_size


class OptimizerSteps:
    """Add gradients batch by batch, weigh every image alike, and step.

    Args:
        optimizer: of the parameters of `model`.
        scaler: of the loss, for float16; one that is not enabled changes nothing.
        clip_norm: largest norm of all gradients together, above which they are scaled down; 0 leaves them.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                 clip_norm: float = 0.0):
        self.model, self.optimizer, self.scaler, self.clip_norm = model, optimizer, scaler, clip_norm
        self.begin()

    def begin(self) -> None:
        """Forget gradients of a batch that was refused or a step that was cut off, and what was counted."""
        self.forget()
        self._norms, self._skipped = [], 0

    def forget(self) -> None:
        """Forget the gradients of a step that is not taken."""
        self.optimizer.zero_grad(set_to_none=True)
        self._images = 0

    def state(self) -> dict:
        """Return what was counted since `begin`, as plain types and tensors; between two steps."""
        return {"norms": torch.stack(self._norms).cpu() if self._norms else torch.zeros(0), "skipped": self._skipped}

    def load(self, state: dict) -> None:
        """Go on counting from a state."""
        self._norms = list(state["norms"].to(next(self.model.parameters()).device).unbind())
        self._skipped = state["skipped"]

    def add(self, loss: torch.Tensor, images: int) -> None:
        """Add the gradients of a batch: `loss` is the mean over its images, those of this process."""
        self.scaler.scale(loss * images).backward()
        self._images += images

    def prepare(self) -> torch.Tensor:
        """Make the gradients the mean over all images added, of all processes, and return their norm before clipping.

        With float16 it may be infinite: `take` then skips the step.
        """
        images, = all_reduce_sum(self._images)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        factor = world_size() / images  # torch has averaged the gradients of the processes
        norm = torch.stack(torch._foreach_norm(gradients)).norm() * factor
        if self.clip_norm:
            factor = factor * (self.clip_norm / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, factor)
        return norm.detach()

    def take(self, norm: torch.Tensor) -> None:
        """Step by what `prepare` made ready; float16 skips a step that overflows."""
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < scale
        self._skipped += skipped
        self._norms += [] if skipped else [norm]
        self.forget()

    def summary(self) -> dict[str, float]:
        """Return of the steps since `begin`: mean `gradient_norm` before clipping, `skipped_steps` and `loss_scale`."""
        norm = float(torch.stack(self._norms).mean()) if self._norms else math.nan
        return {"gradient_norm": norm, "skipped_steps": self._skipped, "loss_scale": self.scaler.get_scale()}
