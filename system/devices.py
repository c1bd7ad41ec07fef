"""Choose device and precision, keep random states, and say what a stage will need of memory."""

import os

import torch

from system.machine import processor_has_bfloat16
from system.processes import local_rank, local_world_size
from training.loss import multi_scale_loss
from unet import STAGE_RESOLUTIONS

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "bfloat16", "float16", "float32")


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of that name; 'auto' takes cuda, else mps, else cpu.

    Of several processes on a machine each takes a CUDA device of its own for 'auto' and 'cuda'.

    Raises ValueError for a device that is unknown or not present.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if name == "cuda" and present["cuda"] and local_world_size() > 1:
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    kind = name.split(":")[0]
    if kind not in present:
        raise ValueError(f"device is {name!r}; it must be one of {', '.join(DEVICES)}")
    if not present[kind]:
        raise ValueError(f"device is {name!r}, but this machine or this build of torch {torch.__version__} has no "
                         f"{kind.upper()}. Use 'cpu', or 'auto' to take the best device present")
    if kind == "cuda" and ":" in name and name.removeprefix("cuda:") not in map(str, range(torch.cuda.device_count())):
        raise ValueError(f"device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return torch.device(name)


def bfloat16_pays(device: torch.device) -> bool:
    """Tell whether bfloat16 is in hardware and at least as fast as float32: on CUDA from compute capability 8.0."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and processor_has_bfloat16()


def choose_precision(name: str, device: torch.device) -> str:
    """Return 'bfloat16', 'float16' or 'float32'; 'auto' takes bfloat16 where it pays, else float32.

    Raises ValueError for an unknown name and for float16 anywhere but on CUDA.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision is {name!r}; it must be one of {', '.join(PRECISIONS)}")
    if name == "auto":
        return "bfloat16" if bfloat16_pays(device) else "float32"
    if name == "float16" and device.type != "cuda":
        raise ValueError(f"precision is 'float16' on {device.type}; it is for CUDA alone. Use 'auto'")
    if name != "float32" and device.type == "mps":
        raise ValueError(f"precision is {name!r} on mps; use 'float32' or 'auto'")
    return name


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a network is run: mixed precision, or nothing for float32."""
    return torch.autocast(device.type, dtype=getattr(torch, precision) if precision != "float32" else None,
                          enabled=precision != "float32")


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


def training_memory(model, batch_size: int, precision: str) -> int:
    """Estimate the bytes that training takes at the model's current stage.

    What autograd keeps is counted on one and on two blank images and continued to the batch (copies of the weights in
    low precision do not grow with it); weights, gradients and the two moments of AdamW are added. Work space of the
    convolutions and the Python process are not in it.
    """
    one, two = (_kept_for_backward(model, n, precision) for n in (1, 2))
    live = sum(tensor.nbytes for tensor in model.live_state().values())
    return one + (batch_size - 1) * (two - one) + 4 * live


def _kept_for_backward(model, batch_size: int, precision: str) -> int:
    """Count the bytes that one forward pass keeps for the backward pass, parameters not included."""
    device = next(model.parameters()).device
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    side = STAGE_RESOLUTIONS[model.stage]
    image = torch.zeros(batch_size, model.in_channels, side, side, device=device)
    target = torch.zeros(batch_size, model.out_channels, side, side, device=device)
    was_training = model.training
    model.eval()  # so that no running statistic changes
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(device, precision):
        multi_scale_loss(model(image, return_all_scales=True), target)
    model.train(was_training)
    return sum(storage.nbytes() for storage in kept.values())
