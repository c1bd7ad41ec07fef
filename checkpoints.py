"""What a checkpoint contains, how it is saved and how it is loaded.

A checkpoint is a dictionary of plain types and tensors; it loads with `weights_only=True` and carries its recipe:

    format          2
    model_args      arguments of `unet.build_model`
    stage           where the network stood
    model           state dict of the parts that live at that stage, image mean and standard deviation included
    unborn          state dict of all other parts in last.pth, so that a resumed run grows into the same weights; else
                    empty
    data            the data recipe (see images/recipe.py); a DataRecipe once it is loaded, its fields in the file
    threshold       probability from which a pixel is foreground
    epoch           epochs finished within the stage
    score           validation Dice of these weights (None for a network that was not validated)
    best_scores     stage -> best validation Dice so far
    plan            epochs of each stage, rate and schedule (see training.schedule.TrainingPlan)
    time_limit      of a run that has one: 'elapsed', seconds so far, and 'spent', stage -> seconds; else None
    optimizer       state dict of AdamW
    scaler          state dict of the gradient scaler, empty unless float16
    averaged        in last.pth of a run with averaging: 'model', state dict of the averaged weights, and 'updates',
                    stage -> updates of the parts born there; else None
    random_states   'cpu' and, where present, 'cuda'
    config          settings of the run that made it
"""

import dataclasses
import pickle
import struct
from pathlib import Path

import torch

from images.recipe import DataRecipe, recipe_from_plain
from system.atomic import atomic_write
from system.errors import UserError
from unet import LAST_STAGE, build_model

FORMAT = 2
# What torch.load was seen to raise for files that are something else or cut off.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
              AttributeError, struct.error)
FIELDS = ("format", "model_args", "stage", "model", "unborn", "data", "threshold", "epoch", "score",
          "best_scores", "plan", "time_limit", "optimizer", "scaler", "averaged", "random_states", "config")

YOUNG = {"time_limit": None}  # fields that older files of the format lack


def untrained_checkpoint(model, **fields) -> dict:
    """Return what a checkpoint of a network holds that no training made: recipe and weights, and None besides.

    Args:
        fields: instead of a recipe of masks alone, sizing 'resize' and no statistics, and a threshold of 0.5.
    """
    recipe = DataRecipe(in_channels=model.in_channels, classes=model.out_channels)
    return dict.fromkeys(FIELDS) | {
        "format": FORMAT, "model_args": model.model_args, "stage": model.stage,
        "model": model.live_state(), "data": recipe, "threshold": 0.5} | fields


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that the file is either whole or not there: to a temporary file, then renamed."""
    assert set(checkpoint) == set(FIELDS), set(checkpoint) ^ set(FIELDS)
    stored = checkpoint | {"data": dataclasses.asdict(checkpoint["data"])}
    check_plain(stored, "checkpoint")
    with atomic_write(path) as file:
        torch.save(stored, file)


def check_plain(value, name: str) -> None:
    """Raise UserError unless `value` is made of plain types and tensors alone, which is what loads safely."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{name}[{i}]")
    elif type(value) not in (type(None), bool, int, float, str, torch.Tensor):
        raise UserError(f"{name} is {value!r} of type {type(value).__name__}; checkpoints hold None, bool, int, "
                         f"float, str, lists, tuples, dictionaries and tensors. Convert it, e.g. with float() or str()")


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint into CPU memory; raises UserError if the file is missing, damaged or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Checkpoints are OUTPUT_DIR/NAME/best_stage_4.pth and its neighbours")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"{path}: no checkpoint that can be read ({type(error).__name__}). Is it cut off, or of "
                         f"another program?") from None
    found = checkpoint if isinstance(checkpoint, dict) else {}
    if found.get("format") != FORMAT and "model_args" in found:
        raise UserError(f"{path}: checkpoint format {found.get('format')!r}; this version reads {FORMAT}, because its "
                        f"network is another one: every level sees the image. Predict and resume with the version of "
                        f"the project that wrote the file, or train again")
    missing = [f for f in FIELDS if f not in YOUNG | found]
    if missing:
        raise UserError(f"{path}: not a checkpoint of this project (missing: {', '.join(missing)}). Bare state dicts "
                        f"go through model.transfer_weights")
    try:
        return YOUNG | found | {"data": recipe_from_plain(found["data"])}
    except UserError as error:
        raise UserError(f"{path}: {error}. Use the version of the project that wrote it") from None


def load_resumable(path: Path, model_args: dict) -> dict:
    """Read a last.pth of a network that `model_args` describes; raises UserError for any other file."""
    saved = load_checkpoint(path)
    if saved["stage"] < LAST_STAGE and not saved["unborn"]:
        raise UserError(f"{path}: it holds the parts of stage {saved['stage']} alone, so a run cannot go on from "
                         f"it as it was. Resume from last.pth, or start another run with --init_from")
    if saved["model_args"] != model_args:
        raise UserError(f"{path}: it holds {saved['model_args']}, the trainer's network is {model_args}. Build it "
                         f"with unet.build_model")
    if saved["averaged"] and "updates" not in saved["averaged"]:
        raise UserError(f"{path}: its averaged weights were begun anew at each stage, as in versions before this one. "
                        f"Resume with the version that wrote it, or train again")
    return saved


def load_model(path: Path):
    """Make the network of a checkpoint, with its weights and at its stage, on the CPU and in eval mode."""
    return model_of(load_checkpoint(path), path)


def model_of(checkpoint: dict, path: Path):
    """Do what `load_model` does with a checkpoint that was read from `path`."""
    model = build_model(checkpoint["model_args"])
    model.set_stage(checkpoint["stage"])
    load_weights(model, checkpoint["model"], path)
    return model.eval()


def load_weights(model, state: dict, path: Path) -> None:
    """Load a state dict that must fit the model at its current stage exactly."""
    _, new, left_out = model.transfer_weights(state)
    if new or left_out:
        raise UserError(f"{path}: its weights do not fit the network they say they are for (missing {new[:3]}, left "
                         f"over {left_out[:3]}). The file is damaged or was edited")
