"""What a loader gives to training: its first batch is checked, and the recipe of its data is taken or made."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch

from images.recipe import DataRecipe
from images.resolutions import FINEST
from system.errors import UserError
from system.processes import all_reduce_sum, is_main_process
from training.loss import refuse_non_finite
from unet import STAGE_RESOLUTIONS


class Loader(Protocol):
    """Batches as dictionaries, and how many there are: a ProgressiveLoader, a DataLoader, a list."""

    def __iter__(self) -> Iterator[dict]: ...

    def __len__(self) -> int: ...


CONTRACT = "a loader yields dictionaries with `image` (N, C, S, S) and `mask` (N, K, S, S), both floating point in " \
           "[0, 1], and `name` (see pap_smear_dataset.ProgressiveLoader)"


def check_loader(loader: Loader) -> None:
    """Raise UserError for a loader without a batch, or without a length."""
    if not hasattr(loader, "__len__"):
        raise UserError(f"the loader is a {type(loader).__name__} without a length; steps an epoch come from it. Pass "
                        f"a list of batches or a DataLoader")
    if not len(loader):
        raise UserError("the loader has no batch; there is nothing to train on or to validate. Check its data set and "
                        "drop_last")


def check_batch(batch: dict, model) -> None:
    """Raise UserError unless a batch is what the network at its stage learns from; the message says what to change.

    Args:
        batch: what the loader yielded; it may hold no image, as the part of a process in a small batch.
        model: has `in_channels`, `out_channels` and `stage`.
    """
    if not isinstance(batch, dict) or not {"image", "mask"} <= set(batch):
        found = f"keys {', '.join(map(str, batch))}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise UserError(f"the batch is {found}; {CONTRACT}")
    side = STAGE_RESOLUTIONS[model.stage]
    for key, channels in (("image", model.in_channels), ("mask", model.out_channels)):
        tensor = batch[key]
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise UserError(f"{key} of the batch is {found}; {CONTRACT}. Convert it, e.g. with .float().div(255) from "
                            f"8 bit")
        if tensor.ndim != 4 or tensor.shape[1] != channels:
            raise UserError(f"{key} of the batch has shape {tuple(tensor.shape)}; this network takes (N, {channels}, "
                            f"{side}, {side}). Build it with {'in' if key == 'image' else 'out'}_channels as the data "
                            f"have them")
        if tuple(tensor.shape[2:]) != (side, side):
            raise UserError(f"{key} of the batch has {tensor.shape[2]}x{tensor.shape[3]} pixels; stage {model.stage} "
                            f"learns from {side}x{side}. Take the loader of that resolution, or set_stage to the stage "
                            f"of these images")
        if tensor.numel() and (tensor.min() < 0 or tensor.max() > 1):
            raise UserError(f"{key} of the batch holds values {tensor.min():g} to {tensor.max():g}; they must lie in "
                            f"[0, 1]. Divide 8 bit by 255")
    if len(batch["image"]) != len(batch["mask"]):
        raise UserError(f"the batch has {len(batch['image'])} images and {len(batch['mask'])} masks; each image needs "
                        f"its mask")


def carried_recipe(loader: Loader) -> DataRecipe | None:
    """Return the recipe that a loader, or the data set in a plain DataLoader, carries; None where there is none."""
    for carrier in (loader, getattr(loader, "dataset", None)):
        if isinstance(recipe := getattr(carrier, "recipe", None), DataRecipe):
            return recipe
    return None


def agreed_recipe(loader: Loader, known: DataRecipe | None) -> DataRecipe | None:
    """Return the recipe that a loader carries, if any; raises UserError where it is not of the known kind of data."""
    carried = carried_recipe(loader)
    if carried is not None and known is not None:
        carried.check_agreement(known, "the loader", "the training so far")
    return carried


def finest_masks(loader: Loader, batch: dict, mask: torch.Tensor) -> torch.Tensor | None:
    """Return the masks of a batch at 256 pixels, on the device of `mask` (N, K, S, S).

    None where `mask` is as fine, for a data set that has no finer ones, and for images whose names a loader leaves out.
    """
    finest = getattr(getattr(loader, "dataset", None), "finest_masks", None)
    if finest is None or mask.shape[-1] == FINEST or "name" not in batch:
        return None
    masks = finest(batch["name"])
    return None if masks is None else masks.to(mask.device)


def recipe_for(model, loader: Loader, known: DataRecipe | None) -> DataRecipe:
    """Return the recipe with which a network is trained on a loader: the known, else the carried, else a new one.

    A loader that carries none is taken to give masks alone and whole images. Statistics that neither recipe nor network
    has are computed from one pass over the loader, every batch of which is checked, and what was found is printed.

    Args:
        model: has `in_channels`, `out_channels`, `stage` and `has_image_statistics`.
        known: of the training so far, or as given to the trainer.
    Raises:
        UserError: for data of another kind than those before, or than the network is built for.
    """
    carried = agreed_recipe(loader, known)
    recipe = known or carried or DataRecipe(in_channels=model.in_channels, classes=model.out_channels)
    if not recipe.mean and carried is not None:
        recipe = replace(recipe, mean=carried.mean, std=carried.std, training_ranges=carried.training_ranges)
    for name, found in (("in_channels", recipe.in_channels), ("out_channels", recipe.target_channels)):
        if found != getattr(model, name):
            raise UserError(f"{name} of the network is {getattr(model, name)}, but the data have {found}. Build it "
                            f"with {name}={found}")
    if recipe.mean or model.has_image_statistics:
        return recipe
    mean, std = measured_statistics(loader, model)
    if is_main_process():
        shown = [", ".join(f"{value:.4f}" for value in values) for values in (mean, std)]
        print(f"the loader carries no data recipe: mean {shown[0]} and standard deviation {shown[1]} of its images "
              f"were computed from one pass over it. To give them: ProgressiveTrainer(..., recipe=images.recipe."
              f"DataRecipe(in_channels=..., classes=..., mean=(...), std=(...)))")
    return replace(recipe, mean=mean, std=std)


def measured_statistics(loader: Loader, model) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the images of a loader, a number a channel, over all processes.

    Raises NonFiniteLossError for the first batch with a value that is not finite.
    """
    sums, pixels = torch.zeros(2, model.in_channels, dtype=torch.float64), 0
    for i, batch in enumerate(loader):
        check_batch(batch, model)
        refuse_non_finite(batch["image"].sum(), f"sum of the images, batch {i + 1} of the loader", batch.get("name"))
        image = batch["image"].detach().cpu().double()
        sums += torch.stack([image.sum(dim=(0, 2, 3)), image.square().sum(dim=(0, 2, 3))])
        pixels += image.shape[0] * image.shape[2] * image.shape[3]
    pixels, *flat = all_reduce_sum(pixels, *sums.flatten().tolist())
    mean, square = torch.tensor(flat, dtype=torch.float64).view(2, -1) / pixels
    std = (square - mean ** 2).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())  # a channel may be constant
