"""Say how much memory a stage will need in training."""

import contextlib
from collections.abc import Iterator

import torch

from system.devices import autocast
from system.errors import UserError, lacks_memory
from training.loss import multi_scale_loss
from unet import STAGE_RESOLUTIONS


def training_memory(model, batch_size: int, precision: str) -> int:
    """Estimate the bytes that training takes at the model's current stage.

    What autograd keeps is counted on one and on two blank images and continued to the batch (copies of the weights in
    low precision do not grow with it); weights, gradients and the two moments of AdamW are added. Work space of the
    convolutions and the Python process are not in it.
    """
    one, two = (_kept_for_backward(model, n, precision) for n in (1, 2))
    live = sum(tensor.nbytes for tensor in model.live_state().values())
    return one + (batch_size - 1) * (two - one) + 4 * live


@contextlib.contextmanager
def memory_explained(stage: int, images: int) -> Iterator[None]:
    """Turn the lack of memory in a block into a UserError that names stage, batch and the options that take less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        side, less = STAGE_RESOLUTIONS[stage], max(1, images // 2)
        kept = f". What the stages before have learnt is kept by --init_from RUN_FOLDER/best_stage_{stage - 1}.pth " \
               f"--start_stage {stage}" if stage > 1 else ""
        raise UserError(
            f"out of memory at stage {stage} ({side}x{side}) with a batch of {images} images. Take smaller batches "
            f"with --batch_sizes {side}:{less} and add up as many as before with --accumulate {-(-images // less)}, or "
            f"take fewer --base_channels; --dry_run says what each stage needs{kept}") from None


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
