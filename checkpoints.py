"""What a checkpoint contains, how it is saved and how it is loaded.

A checkpoint is a dictionary of plain types and tensors; it loads with `weights_only=True` and carries its recipe:

    format          3
    model_args      arguments of `unet.build_model`
    stage           where the network stood
    model           state dict of the parts that live at that stage, image mean and standard deviation included
    unborn          state dict of all other parts in last.pth, so that a resumed run grows into the same weights; else
                    empty
    data            the data recipe (see images/recipe.py); a DataRecipe once it is loaded, its fields in the file
    threshold       probability from which a pixel is foreground
    epoch           epochs finished within the stage
    score           validation Dice of these weights, in last.pth of the averaged ones if there are any (None: not
                    validated)
    best_scores     stage -> best validation Dice so far
    plan            epochs of each stage, rate and schedule (see training.schedule.TrainingPlan)
    position        in last.pth, where it was saved in the middle of an epoch (see training/position.py); else None
    history         in last.pth, the rows of metrics.csv; else an empty list
    time_limit      of a run that has one: 'elapsed', seconds so far, and 'spent', stage -> seconds; else None
    optimizer       state dict of AdamW
    scaler          state dict of the gradient scaler, empty unless float16
    averaged        in last.pth of a run with averaging: 'model', state dict of the averaged weights, and 'updates',
                    stage -> updates of the parts born there; else None
    random_states   'cpu' and, where present, 'cuda'
    config          settings of the run that made it
    card            of an archive (see exporting/archive.py), the model card in Markdown; else empty
"""

import dataclasses
import errno
import math
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

from images.recipe import DataRecipe, recipe_from_plain
from images.resolutions import MOST_CHANNELS, WIDEST
from system.archives import verify_archive
from system.atomic import atomic_write
from system.errors import NonFiniteLossError, UserError, lacks_memory
from system.options import LARGEST
from unet import LAST_STAGE, MODELS, build_model

FORMAT = 3
# What torch.load was seen to raise for files that are something else or cut off.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
              AttributeError, struct.error)
FIELDS = ("format", "model_args", "stage", "model", "unborn", "data", "threshold", "epoch", "score",
          "best_scores", "plan", "position", "history", "time_limit", "optimizer", "scaler", "averaged",
          "random_states", "config", "card")
YOUNG: dict = {"time_limit": None, "position": None, "history": [], "card": ""}  # fields that older files lack


def _whole(value, low: int, high: float = math.inf) -> bool:
    return type(value) is int and low <= value <= high


def _number(value, low: float, high: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _tensors(value) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        and not tensor.is_complex() for name, tensor in value.items())


def _weights(value) -> bool:
    return _tensors(value) and not any((tensor < 0).any() for name, tensor in value.items()
                                       if name.endswith(("running_var", "image_std")))


def _random_states(value) -> bool:
    if not _tensors(value) or "cpu" not in value or any(state.dtype != torch.uint8 for state in value.values()):
        return False
    try:
        torch.Generator().set_state(value["cpu"])
    except RuntimeError:  # of another length, or no state of this generator
        return False
    return True


def _history(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict) and all(isinstance(text, str) for item in row.items() for text in item)
        and is_epoch_row(row) for row in value)


def is_epoch_row(row: dict[str, str]) -> bool:
    """Tell whether a row of metrics.csv names its stage and epoch."""
    return bool(re.fullmatch("[1-4]", row.get("stage", "")) and re.fullmatch("[0-9]{1,9}", row.get("epoch", "")))


def _model_args(value) -> bool:
    return isinstance(value, dict) and set(value) == {"model", "in_channels", "out_channels", "base_channels"} and \
        isinstance(value["model"], str) and value["model"] in MODELS and _whole(value["in_channels"], 1, 64) and \
        _whole(value["out_channels"], 1, MOST_CHANNELS) and _whole(value["base_channels"], 1, WIDEST)


def _by_stage(value, holds: Callable = lambda n: _number(n, 0)) -> bool:
    return isinstance(value, dict) and all(_whole(stage, 1, LAST_STAGE) and holds(n) for stage, n in value.items())


def _plan(value) -> bool:
    return isinstance(value, dict) and set(value) == {"epochs", "lr", "schedule", "old_lr_scale"} and \
        _by_stage(value["epochs"], lambda n: _whole(n, 0, LARGEST)) and any(value["epochs"].values()) and \
        _number(value["lr"], 0) and _number(value["old_lr_scale"], 0) and isinstance(value["schedule"], str)


def _position(value) -> bool:
    return isinstance(value, dict) and {"batches", "done", "begun_with", "sums", "steps", "seconds",
                                        "processor_seconds"} <= set(value) and \
        _whole(value["batches"], 1) and _whole(value["done"], 0, value["batches"]) and \
        _random_states(value["begun_with"]) and isinstance(value["steps"], dict) and \
        isinstance(value["sums"], list) and all(isinstance(part, dict) for part in value["sums"]) and \
        _number(value["seconds"], 0) and _number(value["processor_seconds"], 0)


# Field -> what it must be, and that in words. None stands in all but the first ones for what is not there.
RULES = {
    "model_args": (_model_args, f"the arguments of unet.build_model, at most {WIDEST} base channels"),
    "stage": (lambda v: _whole(v, 1, LAST_STAGE), f"a whole number from 1 to {LAST_STAGE}"),
    "model": (_weights, "tensors by name, dense and real, of which no variance is below 0"),
    "threshold": (lambda v: _number(v, 0, 1) and 0 < v < 1, "a number between 0 and 1"),
    "unborn": (_tensors, "tensors by name"),
    "epoch": (lambda v: _whole(v, 0, LARGEST), f"a whole number from 0 to {LARGEST}"),
    "score": (lambda v: _number(v, 0, 1), "a number from 0 to 1"),
    "best_scores": (lambda v: _by_stage(v, lambda dice: _number(dice, 0, 1)), "a Dice from 0 to 1 by stage"),
    "plan": (_plan, f"epochs by stage, at most {LARGEST}, lr, schedule and old_lr_scale"),
    "position": (_position, "where an epoch stands, as training/position.py writes it"),
    "history": (_history, "the rows of metrics.csv as text, each with its stage and epoch"),
    "time_limit": (lambda v: isinstance(v, dict) and {"elapsed", "spent"} <= set(v) and _number(v["elapsed"], 0)
                   and _by_stage(v["spent"]), "'elapsed' and, by stage, 'spent'"),
    "optimizer": (lambda v: isinstance(v, dict), "a dictionary"),
    "scaler": (lambda v: isinstance(v, dict), "a dictionary"),
    "averaged": (lambda v: isinstance(v, dict) and _tensors(v.get("model")) and _by_stage(v.get("updates", {})),
                 "a dictionary with 'model' and, by stage, 'updates'"),
    "random_states": (_random_states, "states of torch's random generators, that of 'cpu' among them"),
    "config": (lambda v: isinstance(v, dict), "a dictionary"),
    "card": (lambda v: isinstance(v, str), "text"),
}
NEEDED = ("model_args", "stage", "model", "threshold")
OF_RUNS = ("unborn", "epoch", "best_scores", "plan", "history", "random_states")  # that a run needs to go on


def untrained_checkpoint(model, **fields) -> dict:
    """Return what a checkpoint of a network holds that no training made: recipe and weights, and None besides.

    Args:
        fields: instead of a recipe of masks alone, sizing 'resize' and no statistics, and a threshold of 0.5.
    """
    recipe = DataRecipe(in_channels=model.in_channels, classes=model.out_channels)
    return dict.fromkeys(FIELDS) | {
        "format": FORMAT, "model_args": model.model_args, "stage": model.stage, "card": "",
        "model": model.live_state(), "data": recipe, "threshold": 0.5} | fields


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that the file is either whole or not there: to a temporary file, then renamed.

    Raises:
        NonFiniteLossError: for a tensor that is not finite; nothing is written.
        OSError: for a full disk.
    """
    assert set(checkpoint) == set(FIELDS), set(checkpoint) ^ set(FIELDS)
    stored = checkpoint | {"data": dataclasses.asdict(checkpoint["data"])}
    check_plain(stored, "checkpoint")
    if bad := non_finite(stored):
        raise NonFiniteLossError(f"{bad} holds numbers that are infinite or none, so {path.name} is not written, and "
                                 f"what was saved before stays. Try a lower --lr or --precision float32")
    try:
        with atomic_write(path) as file:
            torch.save(stored, file)
    except RuntimeError as error:  # torch's own writer, where the disk refuses
        raise OSError(errno.EIO, f"cannot be written ({str(error).splitlines()[0]})", str(path)) from None


def non_finite(value, name: str = "checkpoint") -> str:
    """Return the name of the first tensor that is not finite, '' if there is none."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        if found := non_finite(item, f"{name}[{key!r}]"):
            return found
    bad = isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all()
    return name if bad else ""


def check_plain(value, name: str) -> None:
    """Raise UserError unless `value` is made of plain types and tensors alone, which is what loads safely."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            check_plain(key, f"a key of {name}")
            check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{name}[{i}]")
    elif type(value) not in (type(None), bool, int, float, str, torch.Tensor):
        raise UserError(f"{name} is {value!r} of type {type(value).__name__}; checkpoints hold None, bool, int, "
                         f"float, str, lists, tuples, dictionaries and tensors. Convert it, e.g. with float() or str()")


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint into CPU memory; raises UserError if the file is missing, damaged or of another kind."""
    path = Path(path)
    if path.parts[:1] == ("hf:",):  # Path has made one slash of two
        raise UserError(f"{path}: an address, and a file is read here. Download it first: python export_model.py "
                        f"hf://{'/'.join(path.parts[1:])} --format archive --out model.pth")
    if path.is_dir():
        there = ", ".join(sorted(file.name for file in path.glob("*.pth")))
        raise UserError(f"{path}: a folder, where a checkpoint is needed"
                        + (f". Name one of the files in it: {there}" if there else ", and no .pth lies in it"))
    if not path.is_file():
        raise UserError(f"{path}: no such file. Checkpoints are OUTPUT_DIR/NAME/best_stage_4.pth and its neighbours")
    verify_archive(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if lacks_memory(error):
            raise
        raise UserError(f"{path}: no checkpoint that can be read ({type(error).__name__}). Is it cut off, or of "
                         f"another program?") from None
    found = checkpoint if isinstance(checkpoint, dict) else {}
    if found.get("format") != FORMAT and "model_args" in found:
        raise UserError(f"{path}: checkpoint format {found.get('format')!r}; this version reads {FORMAT}, because its "
                        f"network is another one, with fewer channels at coarse levels. Predict and resume with the "
                        f"version of the project that wrote the file, or train again")
    missing = [f for f in FIELDS if f not in YOUNG | found]
    if missing:
        raise UserError(f"{path}: not a checkpoint of this project (missing: {', '.join(missing)}). Bare state dicts "
                        f"go through model.transfer_weights")
    found = YOUNG | found
    for name, (holds, rule) in RULES.items():
        if (found[name] is not None or name in NEEDED) and not holds(found[name]):
            raise UserError(f"{path}: {name} is {shortened(found[name])}; it must be {rule}. The file was edited or is "
                            f"of another program")
    try:
        recipe = recipe_from_plain(found["data"])
    except (UserError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: {error}. Use the version of the project that wrote it") from None
    args = found["model_args"]
    if (recipe.in_channels, recipe.target_channels) != (args["in_channels"], args["out_channels"]):
        raise UserError(f"{path}: its network has {args['in_channels']} channels in and {args['out_channels']} out, "
                        f"its data recipe {recipe.in_channels} and {recipe.target_channels}. The file was edited")
    return found | {"data": recipe}


def shortened(value) -> str:
    """Return a value as text of one line that can be read."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:77]}..."


def load_resumable(path: Path, model_args: dict) -> dict:
    """Read a last.pth of a network that `model_args` describes; raises UserError for any other file."""
    saved = load_checkpoint(path)
    if not saved["optimizer"]:
        raise UserError(f"{path}: it holds no optimizer, as files that are made to hand on do, so no run goes on from "
                        f"it. Start another with --init_from {path}")
    if lacking := [name for name in OF_RUNS if saved[name] is None]:
        raise UserError(f"{path}: it holds no {', '.join(lacking)}, so no run goes on from it. Resume from another "
                        f"file of the run, e.g. previous.pth, or start another with --init_from {path}")
    alone = saved["stage"] < LAST_STAGE and not saved["unborn"]
    if alone or saved["epoch"] and not saved["history"] and not saved["position"]:  # best_, final_ and stage_ files
        raise UserError(f"{path}: it holds the weights of stage {saved['stage']} alone, so a run cannot go on from it "
                        f"as it was. Resume from last.pth, or start another run with --init_from")
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
    with torch.device("meta"):  # without memory, which a file may ask for that has other weights
        plan = build_model(checkpoint["model_args"])
        plan.set_stage(checkpoint["stage"])
    planned, found = ({name: (tensor.shape, tensor.is_floating_point()) for name, tensor in state.items()}
                      for state in (plan.live_state(), checkpoint["model"]))
    if found != planned:
        wrong = sorted(name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name))
        raise UserError(f"{path}: its weights do not fit the network they say they are for ({', '.join(wrong[:3])}). "
                        f"The file is damaged or was edited")
    if bad := non_finite(checkpoint["model"], "model"):
        raise UserError(f"{path}: {bad} holds numbers that are infinite or none, so the network would answer none. "
                        f"Take another checkpoint of the run")
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
