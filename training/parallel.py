"""Steps of several processes that train one network: batch normalisation and gradients are those of the whole batch.

Every process holds the whole network and its own part of each batch, so N processes compute what one would. In Python
the same happens wherever `torch.distributed` is initialised when a trainer is made.
"""

import contextlib
import gc
import os
import shutil
import socket
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from system.errors import UserError
from system.processes import active, all_gather, world_size
from unet import Network

# What torch.compile calls on a CPU, unless CXX names another.
COMPILER = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")


def synchronised(model: Network, device: torch.device) -> Network:
    """Let the batch normalisations of a network that is on `device` see the batches of all processes.

    Names, parameters and statistics stay the same objects, so checkpoints do not depend on the number of processes.
    Without a group nothing is changed.

    Raises:
        UserError: in all processes, where two of them have one CUDA device or the device is neither CUDA nor a CPU.
    """
    if not active():
        return model
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is '{device}'; several processes need cuda or cpu. Pass --device cpu, or start one "
                         f"process")
    places = all_gather((socket.gethostname(), str(device)))
    if device.type == "cuda":
        if len(set(places)) < len(places):
            raise UserError(f"{len(places)} processes share {', '.join(sorted({place for _, place in places}))}; each "
                             f"needs a CUDA device of its own. Start fewer with --nproc_per_node, leave --device at "
                             f"auto, or pass --device cpu")
        torch.cuda.set_device(device if device.index is not None else torch.cuda.current_device())
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d  # unlike a new module, it keeps whatever refers to it
    return model


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Normalise over the batches of all processes: what `nn.SyncBatchNorm` does, for CPUs, which that one refuses.

    A process may have no image in a batch. In eval mode, and without a group, it is plain batch normalisation.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and active()):
            return super().forward(x)
        y, mean, variance, count = _NormaliseTogether.apply(x, self.weight, self.bias, self.eps)
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return y


class _NormaliseTogether(torch.autograd.Function):
    """Batch normalisation with one collective operation forward and one backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        """Return normalised (N, C, H, W), then mean (C,), biased variance (C,) and count of the pixels of all."""
        channels = len(weight)
        local = torch.zeros(2 * channels + 1, dtype=torch.float64)
        if len(x):
            local[:-1] = torch.cat(torch.batch_norm_update_stats(x.to(weight.dtype), None, None, 0.0))
            local[-1] = x.numel() // channels
        gathered = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(gathered, local)
        means, variances, counts = torch.stack(gathered).split([channels, channels, 1], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(dim=0) / count
        variance = (counts * (variances + (means - mean) ** 2)).sum(dim=0) / count
        mean, variance = mean.to(weight.dtype), variance.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.count = eps, count.item()
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        """Return the gradients of x, and of weight and bias the part of this process, which are summed later on."""
        x, weight, mean, variance = ctx.saved_tensors
        if len(x):
            direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True] * 3)
        else:  # torch divides by the size of the batch
            direct, of_weight, of_bias = torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
        sums = torch.stack([of_weight, of_bias]).double()
        dist.all_reduce(sums)
        through_std, through_mean = (sums / ctx.count).to(weight.dtype)[:, :, None, None]
        mean, scale = mean[:, None, None], torch.rsqrt(variance + ctx.eps)[:, None, None]
        factor = weight[:, None, None] * scale
        # What x changes through the mean and the standard deviation of its channel.
        of_x = (direct - factor * through_mean).addcmul_(x - mean, -factor * scale * through_std)
        return of_x.to(x.dtype), of_weight, of_bias, None


class ParallelSteps:
    """Run a growing network so that the gradients of a step are averaged over all processes.

    Args:
        model: has `live_parts()`; it was through `synchronised`.
        compile: whether `torch.compile` makes the steady steps (see `batch`).
    Raises:
        UserError: for `compile` with several processes, on MPS, or on a CPU without a C++ compiler.
    """

    def __init__(self, model: nn.Module, compile: bool = False):
        if compile and active():
            raise UserError("compile is True in several processes; that was not tried. Leave it out, or start one "
                             "process")
        device, compiler = next(model.parameters()).device.type, os.environ.get("CXX", COMPILER)
        if compile and device == "mps":
            raise UserError("compile is True on mps; it is for cuda and cpu. Leave it out")
        if compile and device == "cpu" and not shutil.which(compiler):
            raise UserError(f"compile is True, but {compiler!r} is not found; on a CPU torch.compile needs a C++ "
                             f"compiler. Install it, name another by CXX, or leave it out")
        self.model = model
        self._compiled = torch.compile(model) if compile else None
        self._wrapper: DistributedDataParallel | None = None
        self._live: list[str] = []

    @contextlib.contextmanager
    def batch(self, last: bool, steady: bool = True) -> Iterator[nn.Module]:
        """Yield the network for forward and backward pass of one batch; gradients are averaged at a step's last.

        Args:
            steady: whether nothing changes from batch to batch that compiled code would be made for.
        """
        if not active():
            yield self._compiled if self._compiled is not None and steady else self.model
            return
        self._wrap()
        with contextlib.nullcontext() if last else self._wrapper.no_sync():
            yield self._wrapper

    def release(self) -> None:
        """Let the wrapper go; the next batch makes another.

        It must be gone before the group is: left to the end of Python, one run in ten of two processes was aborted.
        """
        if self._wrapper is not None:
            self._wrapper, self._live = None, []
            self.model.requires_grad_(True)  # also of parts that are born later, in another loop
            gc.collect()  # it is part of a circle

    def _wrap(self) -> None:
        """Wrap the network anew if other parts live than at the last step: after a growth."""
        live = self.model.live_parts()
        if self._wrapper is not None and live == self._live:
            return
        self._wrapper = None  # its buffers go before new ones come
        self.model.requires_grad_(False)
        for part in live:
            self.model.get_submodule(part).requires_grad_(True)
        self._wrapper = DistributedDataParallel(self.model, find_unused_parameters=False)
        self._live = live
