"""Parameter groups of a network's parts, statistics of young batch normalisation, and averaged weights."""

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


def moving_average(decay: float):
    """Return the update of an exponential moving average for `torch.optim.swa_utils.AveragedModel`.

    The decay of the n-th update is min(decay, (1 + n) / (10 + n)), so that a young average follows quickly.
    """
    @torch.no_grad()
    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor | int) -> None:
        n = int(updates)
        for mean, value in zip(averaged, current, strict=True):
            mean.lerp_(value, 1 - min(decay, (1 + n) / (10 + n)))
    return update


def young_batchnorms(model: nn.Module) -> list[list]:
    """Return [layer, batches seen] of the live batch normalisations that are younger than 10 batches."""
    layers = [m for part in model.live_parts() for m in model.get_submodule(part).modules()
              if isinstance(m, _BatchNorm)]
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
