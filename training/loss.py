"""The loss: binary cross entropy plus soft Dice at every scale of the network."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from system.errors import NonFiniteLossError
from system.processes import all_gather, all_reduce_sum
from unet_parts import mean2x2


def bce_dice_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Add binary cross entropy and soft Dice loss, in float32, or in float64 for logits of that type.

    Args:
        logits: (N, C, H, W), any floating type.
        target: (N, C, H, W) in [0, 1]; fractions are allowed (area fractions of coarse scales).
    Returns:
        Scalar. Dice is taken per image and channel, then averaged (Milletari et al. 2016, arXiv 1606.04797,
        with plain sums in the denominator); the 1 added above and below makes an empty mask harmless.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    target = target.to(logits.dtype)
    bce = F.binary_cross_entropy_with_logits(logits, target)
    probability = logits.sigmoid()
    overlap = (probability * target).sum(dim=(2, 3))
    size = probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3))
    return bce + (1 - (2 * overlap + 1) / (size + 1)).mean()


def multi_scale_loss(scales: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Sum `bce_dice_loss` over all scales with weights 1, 1/2, 1/4 ... from the finest.

    Args:
        scales: logits from coarse to fine, each twice the side of the one before.
        target: (N, C, H, W) in [0, 1] at the finest scale; coarser targets are its area fractions (2x2 means).
    """
    loss = torch.zeros((), device=target.device)
    for k, logits in enumerate(reversed(scales)):
        loss = loss + 0.5 ** k * bce_dice_loss(logits, target)
        if k + 1 < len(scales):
            target = mean2x2(target)
    return loss


def refuse_non_finite(value: torch.Tensor, what: str, names: Sequence[str] | None) -> None:
    """Raise NonFiniteLossError, in all processes, unless the value is finite in each of them.

    Args:
        value: scalar, on any device.
        what: what it is and where it was met.
        names: this process's images of the batch, if the loader names them.
    """
    everywhere, = all_reduce_sum(value.item())
    if not math.isfinite(everywhere):
        local = ["(not named by the loader)"] if names is None else list(names)
        everyone = [name for part in all_gather(local) for name in part]
        raise NonFiniteLossError(f"{everywhere} found as {what}; its images: {', '.join(everyone)}. No weight was "
                                 f"changed by it, and what finished epochs have saved is whole. Try a lower --lr or "
                                 f"--precision float32, and look at these images")
