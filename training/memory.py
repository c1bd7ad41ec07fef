"""Say how much memory a stage will need in training, and refuse what cannot fit before memory is taken."""

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

from system.devices import autocast
from system.errors import UserError, lacks_memory
from system.machine import free_memory
from system.processes import world_size
from training.loss import multi_scale_loss
from unet import STAGE_RESOLUTIONS, build_model

COPIES = 4  # weights, gradients, and the two moments of AdamW


def training_memory(model, batch_size: int, precision: str) -> int:
    """Estimate the bytes that training takes at the model's current stage.

    What autograd keeps is counted on one and on two blank images and continued to the batch (copies of the weights in
    low precision do not grow with it); weights, gradients and the two moments of AdamW are added. Work space of the
    convolutions and the Python process are not in it.
    """
    one, two = (_kept_for_backward(model, n, precision) for n in (1, 2))
    live = sum(tensor.nbytes for tensor in model.live_state().values())
    return one + (batch_size - 1) * (two - one) + COPIES * live


@contextlib.contextmanager
def memory_explained(stage: int, images: int) -> Iterator[None]:
    """Turn the lack of memory in a block into a UserError that names stage, batch and the options that take less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        kept = f". What the stages before have learnt is kept by --init_from RUN_FOLDER/best_stage_{stage - 1}.pth " \
               f"--start_stage {stage}" if stage > 1 else ""
        raise UserError(f"{_too_much(stage, images)}{kept}") from None


def _too_much(stage: int, images: int) -> str:
    side, less = STAGE_RESOLUTIONS[stage], max(1, images // 2)
    return (f"out of memory at stage {stage} ({side}x{side}) with a batch of {images} images. Take smaller batches "
            f"with --batch_sizes {side}:{less} and add up as many as before with --accumulate {-(-images // less)}, or "
            f"take fewer --base_channels; --dry_run says what each stage needs")


def refuse_large_batches(trainer, dataloaders: dict[int, tuple]) -> None:
    """Raise UserError if a batch of a planned stage is larger than the memory that is free, before one is made.

    Its images and masks alone are counted, far less than training takes, so that nothing that fits is refused.
    """
    channels, free = trainer.model.in_channels + trainer.model.out_channels, free_memory()
    for stage in trainer.plan.epochs:
        side = STAGE_RESOLUTIONS[stage]
        loader = dataloaders.get(side, (None,))[0]
        size, data = getattr(loader, "batch_size", None), getattr(loader, "dataset", None)
        if size and hasattr(data, "__len__"):  # other loaders do not tell
            images = -(-min(size, len(data)) // world_size())
            if 4 * images * channels * side ** 2 > free:
                raise UserError(_too_much(stage, images))


def refuse_lack_of_memory(model_args: dict, device: torch.device) -> None:
    """Raise UserError if the weights of a network, with what trains them, are larger than the memory that is free.

    Nothing is taken for it. On a GPU the weights alone pass through this memory.

    Args:
        model_args: see `unet.build_model`.
    """
    with torch.device("meta"):
        weights = sum(parameter.nbytes for parameter in build_model(model_args).parameters())
    needed, free = weights * (COPIES if device.type == "cpu" else 1), free_memory()
    if needed > free:
        what = "its weights, gradients and AdamW take" if device.type == "cpu" else "its weights take"
        raise UserError(f"--base_channels {model_args['base_channels']}: {what} {needed / 1e9:.1f} GB, and "
                        f"{free / 1e9:.1f} GB of memory are free. Take fewer --base_channels")


def _kept_for_backward(model, batch_size: int, precision: str) -> int:
    """Count the bytes that one forward pass keeps for the backward pass, parameters and statistics not included.

    It is run on tensors that have sizes and no content, so that it takes no memory and little time.
    """
    device = next(model.parameters()).device
    kept: dict[int, torch.UntypedStorage] = {}
    side, was_training = STAGE_RESOLUTIONS[model.stage], model.training
    model.eval()  # so that no running statistic changes
    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        of_model = {tensor.untyped_storage()._cdata for tensor in state.values()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in of_model:
                kept[storage._cdata] = storage  # held, so that no address is used twice
            return tensor

        image = torch.zeros(batch_size, model.in_channels, side, side, device=device)
        target = torch.zeros(batch_size, model.out_channels, side, side, device=device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(device, precision):
            multi_scale_loss(functional_call(model, state, (image,), {"return_all_scales": True}), target)
    model.train(was_training)
    return sum(storage.nbytes() for storage in kept.values())
