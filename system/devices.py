"""Choose device and precision, and keep the states of the random generators."""

import contextlib
import os
from collections.abc import Iterator

import torch

from system import machine
from system.errors import UserError, lacks_memory
from system.options import PRECISIONS
from system.processes import local_rank, local_world_size

DEVICES = ("auto", "cuda", "mps", "cpu")


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of that name; 'auto' takes cuda, else mps, else cpu.

    Of several processes on a machine each takes a CUDA device of its own for 'auto' and 'cuda'.

    Raises UserError for a device that is unknown or not present.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if name == "cuda" and present["cuda"] and local_world_size() > 1:
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    kind, colon, index = name.partition(":")
    if kind not in present:
        raise UserError(f"device is {name!r}; it must be one of {', '.join(DEVICES)}")
    if not present[kind]:
        raise UserError(f"device is {name!r}, but this machine or this build of torch {torch.__version__} has no "
                         f"{kind.upper()}. Use 'cpu', or 'auto' to take the best device present")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if colon and index not in map(str, range(count)):
        are = f"is 1 {kind.upper()} device" if count == 1 else f"are {count} {kind.upper()} devices"
        raise UserError(f"device is {name!r}, but there {are}, numbered from 0")
    return torch.device(name)


@contextlib.contextmanager
def fitting(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Turn the lack of memory in a block that brings a network to a device into a UserError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        raise UserError(f"out of memory: the weights of the network, {size / 1e6:.0f} MB, do not fit onto {device} "
                        f"beside what is there. End other programs that use it, choose another --device, or take a "
                        f"network of fewer --base_channels") from None


def bfloat16_pays(device: torch.device) -> bool:
    """Tell whether bfloat16 is in hardware and at least as fast as float32: on CUDA from compute capability 8.0."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and machine.processor_has_bfloat16()


def choose_precision(name: str, device: torch.device) -> str:
    """Return 'bfloat16', 'float16' or 'float32'; 'auto' takes bfloat16 where it pays, else float32.

    Raises UserError for an unknown name and for float16 anywhere but on CUDA.
    """
    if name not in PRECISIONS:
        raise UserError(f"precision is {name!r}; it must be one of {', '.join(PRECISIONS)}")
    if name == "auto":
        return "bfloat16" if bfloat16_pays(device) else "float32"
    if name == "float16" and device.type != "cuda":
        raise UserError(f"precision is 'float16' on {device.type}; it is for CUDA alone. Use 'auto'")
    if name != "float32" and device.type == "mps":
        raise UserError(f"precision is {name!r} on mps; use 'float32' or 'auto'")
    return name


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a network is run: mixed precision, or nothing for float32."""
    return torch.autocast(device.type, dtype=getattr(torch, precision) if precision != "float32" else None,
                          enabled=precision != "float32")


def set_up_process(device: torch.device, precision: str) -> None:
    """Set what holds for the whole process and what only a command line may decide.

    On a CPU the C library keeps freed memory (see machine.py). On CUDA float32 is made what its name says: by itself
    torch rounds the inputs of convolutions to 10 bits there (TF32).
    """
    if device.type == "cpu":
        machine.keep_freed_memory()
    if precision == "float32":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def compute_reproducibly() -> None:
    """Make torch compute the same to the last bit in every run, on CUDA too, before anything is computed there."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's generators, as a checkpoint holds them."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set torch's generators as they were when `random_states` was asked."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
