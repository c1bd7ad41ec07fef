"""Several processes that train one network or share a list of images; a process on its own notices nothing of it.

    torchrun --nproc_per_node=2 train_papsmear.py --data_root data
    torchrun --nproc_per_node=2 evaluate_papsmear.py outputs/NAME/best_stage_4.pth --data_root data
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from system.notebooks import kernel

Part = TypeVar("Part", bound=Any)  # a list, or an array


def active() -> bool:
    """Tell whether this process belongs to a group, which may be one of a single process."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, 0 for one on its own."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if active() else 1


def is_main_process() -> bool:
    """Tell whether this is the process that prints and writes."""
    return rank() == 0


def local_rank() -> int:
    """Return the number of this process on its machine, if torchrun says it, else among all."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def local_world_size() -> int:
    """Return how many processes share this machine, if torchrun says it, else how many there are."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started for the time of a block.

    What the others print to stdout in the block is dropped. The group is gloo on CPUs, and nccl beside it for tensors
    on CUDA. After an error it is left as it is: the process ends, and torchrun ends the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if is_main_process() else nowhere):
        yield
    dist.destroy_process_group()


def shard(items: Part) -> Part:
    """Return this process's part of a list or array: every N-th item; parts differ by one item at most."""
    return items[rank()::world_size()] if active() else items


def all_gather(value) -> list:
    """Return the values (anything that can be pickled) of all processes, in their order, to each of them."""
    if not active():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def unshard(part: list) -> list:
    """Put together again, in all processes, a list of which `shard` has given each a part."""
    parts = all_gather(list(part))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def all_reduce_sum(*values: float) -> list[float]:
    """Return each number summed over all processes, in float64; what is not finite in one is not finite in the sum."""
    if not active():
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=exchange_device())
    dist.all_reduce(sums)
    return sums.tolist()


def exchange_device() -> torch.device:
    """Return where tensors lie that processes exchange: on the CPU, unless the group is of nccl alone."""
    return torch.device("cpu" if "cpu:" in str(dist.get_backend_config()) else "cuda")


def progress(items: Iterable | None, title: str, total: float | None = None, **look) -> tqdm:
    """Return a bar over the items, which the first process alone shows, and none where there is nobody to see it.

    It is seen in a terminal and in a notebook.

    Args:
        items: None for a bar that is told how far it is.
        total: how many there are, where they do not tell.
        look: further arguments of tqdm.
    """
    hidden = True if not is_main_process() else False if kernel() else None  # None: where the output is no terminal
    return tqdm(items, title, total, **({"leave": False, "disable": hidden} | look))
