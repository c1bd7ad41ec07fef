"""Parameter groups of a network's parts, and statistics of batch normalisation."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BATCHNORM_MOMENTUM, BATCHNORM_CUMULATIVE = 0.1, 10


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two groups a part: convolution weights with decay; biases and batch normalisation without."""
    groups = []
    for part, born in model.parts().items():
        parameters = list(model.get_submodule(part).parameters())
        for decay, chosen in ((weight_decay, [p for p in parameters if p.ndim > 1]),
                              (0.0, [p for p in parameters if p.ndim <= 1])):
            groups.append({"params": chosen, "weight_decay": decay, "part": part, "born": born})
    return [group for group in groups if group["params"]]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Go on with the state of an optimizer of the same parameters.

    Raises ValueError, KeyError, TypeError, IndexError or AttributeError where it is not of these; torch itself looks at
    how many there are alone, and fails in the first step.
    """
    for own, other in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        numbers = (other["weight_decay"], other["eps"], *other["betas"])
        if not all(map(math.isfinite, numbers)) or (other["part"], other["born"]) != (own["part"], own["born"]):
            raise ValueError(f"the group of {own['part']} is one of {other['part']!r}, with {numbers}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, state in saved["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != parameters[i].shape:
                raise ValueError(f"{name} of parameter {i} is {tuple(state[name].shape)}, "
                                 f"not {tuple(parameters[i].shape)}")
        if not state["step"].isfinite():
            raise ValueError(f"step of parameter {i} is {state['step']}")
    optimizer.load_state_dict(saved)


def live_batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch normalisations of the parts that live at the network's stage."""
    return [m for part in model.live_parts() for m in model.get_submodule(part).modules() if isinstance(m, _BatchNorm)]


def young_batchnorms(model: nn.Module) -> list[list]:
    """Return [layer, batches seen] of the live batch normalisations that are younger than 10 batches."""
    layers = live_batchnorms(model)
    return [[m, int(m.num_batches_tracked)] for m in layers if int(m.num_batches_tracked) < BATCHNORM_CUMULATIVE]


def age_batchnorms(young: list[list]) -> bool:
    """Make running statistics a plain mean over a layer's first 10 batches, then an average with momentum 0.1.

    Returns whether the momentum of all has reached its last value.
    """
    for entry in young:
        layer, age = entry
        layer.momentum = max(BATCHNORM_MOMENTUM, 1 / (age + 1))
        entry[1] += 1
    return all(age >= BATCHNORM_CUMULATIVE for _, age in young)


class BatchNormStatistics:
    """Keep the running statistics of the live batch normalisations, and put them back after a refused batch."""

    def __init__(self, model: nn.Module):
        buffers = [buffer for layer in live_batchnorms(model) for buffer in layer.buffers()]
        of_one_type = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers}]
        # Kept and live tensors of one type, which are copied by one call: on a GPU calls cost more than the copies.
        self._pairs = [([b.clone() for b in some], some) for some in of_one_type]

    def keep(self) -> None:
        """Remember the statistics as they are."""
        with torch.no_grad():
            for kept, live in self._pairs:
                torch._foreach_copy_(kept, live)

    @contextlib.contextmanager
    def restored_after_errors(self) -> Iterator[None]:
        """Put back what was kept if a block ends with an error."""
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for kept, live in self._pairs:
                    torch._foreach_copy_(live, kept)
            raise
