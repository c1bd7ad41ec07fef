"""The network that a run of train_papsmear.py starts with: a new one, or one with the weights of --init_from."""

import argparse
from pathlib import Path

import torch

from checkpoints import load_checkpoint
from images.familiarity import strangest
from images.recipe import DataRecipe
from images.splits import description_of
from system.devices import choose_device
from system.errors import UserError
from training.memory import refuse_lack_of_memory
from training.settings import grows
from unet import Network, build_model


def new_model(args: argparse.Namespace) -> tuple[Network, DataRecipe | None]:
    """Build the network at its first stage, with the weights of --init_from if they were asked for.

    Returns:
        The network, and the recipe of the data that those weights come from; None without them.
    """
    source = load_checkpoint(Path(args.init_from)) if args.init_from and not args.resume else None
    if source:
        _adopt(args, source)
    torch.manual_seed(args.seed)
    recipe = DataRecipe(targets=args.targets, in_channels=args.in_channels, classes=args.out_channels)
    model_args = {"model": args.model, "in_channels": args.in_channels, "base_channels": args.base_channels,
                  "out_channels": recipe.target_channels}
    refuse_lack_of_memory(model_args, choose_device(args.device))
    model = build_model(model_args)
    if args.model == "pgunet" and not args.progressive:
        model.start_whole()
    model.set_stage(args.start_stage if grows(args) else 4)
    if source:
        _initialise(model, source, args.init_from)
    return model, source["data"] if source else None


def name_other_images(args: argparse.Namespace, source: DataRecipe, recipe: DataRecipe) -> None:
    """Warn where the images of a run are not like those that the weights of --init_from come from.

    Args:
        source, recipe: of the data of those weights, and of the run.
    """
    if source.max_value != recipe.max_value:
        scales = " ".join(f"{white or 'the largest number of their type'} {words}" for white, words in (
            (source.max_value, "for its images,"), (recipe.max_value, "here (--max_value)")))
        print(f"warning: {args.init_from}: white is {scales}, so its weights may know another brightness")
    middle = {name: (low + high) / 2 for name, (low, high) in recipe.training_ranges.items()}
    if other := strangest(middle, source.training_ranges):
        print(f"warning: {args.init_from} was trained on images unlike those of {args.data_root}: {other}")


def _adopt(args: argparse.Namespace, source: dict) -> None:
    """Take network and channels from the checkpoint of --init_from, where they were not given by hand.

    Raises:
        UserError: for what was given and contradicts the checkpoint, as few weights would fit.
    """
    recipe, model = source["data"], source["model_args"]
    sizing = description_of(args.data_root).sizing
    if sizing != recipe.sizing:
        print(f"warning: {args.init_from} was trained on a data set of sizing '{recipe.sizing}', {args.data_root} is "
              f"one of '{sizing}': its weights know nuclei at another size")
    there = {"model": model["model"], "base_channels": model["base_channels"], "in_channels": recipe.in_channels,
             "out_channels": recipe.classes, "targets": recipe.targets}
    for name, value in there.items():
        asked = getattr(args, name)
        if asked != value and name in args.by_hand:
            shown = (",".join(v) if isinstance(v, tuple) else v for v in (value, asked))
            raise UserError("--init_from {}: its network has {} {}, asked for is {}. Leave --{} out, or start without "
                            "--init_from".format(args.init_from, name, *shown, name))
        setattr(args, name, value)


def _initialise(model, source: dict, path: str) -> None:
    """Take over the weights of a checkpoint and say which parts came, which are new and which found no place."""
    carried, new, left_out = model.transfer_weights(source["model"])
    print(f"{path} (stage {source['stage']}) into stage {model.stage}:")
    for title, names in (("carried", carried), ("new", new), ("left out", left_out)):
        parts = dict.fromkeys(next((p for p in model.parts() if name.startswith(f"{p}.")), name) for name in names)
        print(f"  {title}: {len(names)} tensors" + (f" of {', '.join(parts)}" if parts else ""))
