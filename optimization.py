"""What a part of a network means to its optimizer, and how young batch normalisation learns its statistics."""

from torch import nn

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


def young_batchnorms(model: nn.Module) -> list[list]:
    """Return [layer, batches seen] of the live batch normalisations that are younger than 10 batches."""
    layers = [m for part in model.live_parts() for m in model.get_submodule(part).modules()
              if isinstance(m, nn.BatchNorm2d)]
    return [[m, int(m.num_batches_tracked)] for m in layers if int(m.num_batches_tracked) < BATCHNORM_CUMULATIVE]


def age_batchnorms(young: list[list]) -> None:
    """Make running statistics a plain mean over a layer's first 10 batches, then an average with momentum 0.1."""
    for entry in young:
        layer, age = entry
        layer.momentum = max(BATCHNORM_MOMENTUM, 1 / (age + 1))
        entry[1] += 1
