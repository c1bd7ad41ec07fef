"""What a checkpoint contains, how it is saved and how it is loaded.

A checkpoint is a dictionary of plain types and tensors; it loads with `weights_only=True` and carries its recipe:

    format          1
    model_args      arguments of `unet.build_model`
    stage, alpha    where the network stood
    model           state dict of the parts that live at that stage, image mean and standard deviation included
    resting         state dict of all other parts in last.pth, so that a resumed run grows into the same weights; else
                    empty
    targets         what the output channels are: ['mask'], one a class, or ['mask', 'boundary'], the last the boundary
    sizing          'resize': the whole image becomes 256x256, logits go back to the original size; 'tile': native scale
    usual           name -> [low, high] over the training images (see familiarity.py)
    threshold       probability from which a pixel is foreground
    epoch           epochs finished within the stage
    score           validation Dice of these weights (None for a network that was not validated)
    best_scores     stage -> best validation Dice so far
    plan            epochs of each stage, rate, schedule and fade (see schedule.TrainingPlan)
    optimizer       state dict of AdamW
    scaler          state dict of the gradient scaler, empty unless float16
    averaged        in last.pth of a run with averaging: 'model', state dict of the averaged weights, and 'steps'; else
                    None
    random_states   'cpu' and, where present, 'cuda'
    config          settings of the run that made it
"""

import contextlib
import os
import pickle
import struct
import tempfile
from pathlib import Path

import torch

from unet import LAST_STAGE, build_model

FORMAT = 1
# What torch.load was seen to raise for files that are something else or cut off.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
              AttributeError, struct.error)
FIELDS = ("format", "model_args", "stage", "alpha", "model", "resting", "targets", "sizing", "usual", "threshold",
          "epoch", "score", "best_scores", "plan", "optimizer", "scaler", "averaged", "random_states", "config")


def untrained_checkpoint(model, **fields) -> dict:
    """Return what a checkpoint of a network holds that no training made: recipe and weights, and None besides.

    Args:
        fields: instead of a binary mask as the only target, sizing 'resize' and a threshold of 0.5.
    """
    return dict.fromkeys(FIELDS) | {
        "format": FORMAT, "model_args": model.model_args, "stage": model.stage, "alpha": model.alpha,
        "model": model.live_state(), "targets": ["mask"], "usual": {}, "sizing": "resize", "threshold": 0.5} | fields


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that the file is either whole or not there: to a temporary file, then renamed."""
    assert set(checkpoint) == set(FIELDS), set(checkpoint) ^ set(FIELDS)
    check_plain(checkpoint, "checkpoint")
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def check_plain(value, name: str) -> None:
    """Raise ValueError unless `value` is made of plain types and tensors alone, which is what loads safely."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{name}[{i}]")
    elif type(value) not in (type(None), bool, int, float, str, torch.Tensor):
        raise ValueError(f"{name} is {value!r} of type {type(value).__name__}; checkpoints hold None, bool, int, "
                         f"float, str, lists, tuples, dictionaries and tensors. Convert it, e.g. with float() or str()")


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint into CPU memory; raises ValueError if the file is missing, damaged or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Checkpoints are OUTPUT_DIR/NAME/best_stage_4.pth and its neighbours")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{path}: no checkpoint that can be read ({type(error).__name__}). Is it cut off, or of "
                         f"another program?") from None
    if isinstance(checkpoint, dict):
        for field, value in (("targets", ["mask"]), ("usual", {})):  # younger than the first files of this format
            checkpoint.setdefault(field, value)
    missing = [f for f in FIELDS if f not in checkpoint] if isinstance(checkpoint, dict) else ["everything"]
    if missing:
        raise ValueError(f"{path}: not a checkpoint of this project (missing: {', '.join(missing)}). Bare state dicts "
                         f"go through model.transfer_weights")
    if checkpoint["format"] != FORMAT:
        raise ValueError(f"{path}: checkpoint format {checkpoint['format']!r}, this version reads {FORMAT}. Use the "
                         f"version of the project that wrote it")
    return checkpoint


def load_resumable(path: Path, model_args: dict) -> dict:
    """Read a last.pth of a network that `model_args` describes; raises ValueError for any other file."""
    saved = load_checkpoint(path)
    if saved["stage"] < LAST_STAGE and not saved["resting"]:
        raise ValueError(f"{path}: it holds the parts of stage {saved['stage']} alone, so a run cannot go on from "
                         f"it as it was. Resume from last.pth, or start another run with --init_from")
    if saved["model_args"] != model_args:
        raise ValueError(f"{path}: it holds {saved['model_args']}, the trainer's network is {model_args}. Build it "
                         f"with unet.build_model")
    return saved


def load_model(path: Path):
    """Make the network of a checkpoint, with its weights and at its stage, on the CPU and in eval mode."""
    return model_of(load_checkpoint(path), path)


def model_of(checkpoint: dict, path: Path):
    """Do what `load_model` does with a checkpoint that was read from `path`."""
    model = build_model(checkpoint["model_args"])
    model.set_stage(checkpoint["stage"], checkpoint["alpha"])
    load_weights(model, checkpoint["model"], path)
    return model.eval()


def load_weights(model, state: dict, path: Path) -> None:
    """Load a state dict that must fit the model at its current stage exactly."""
    _, new, left_out = model.transfer_weights(state)
    if new or left_out:
        raise ValueError(f"{path}: its weights do not fit the network they say they are for (missing {new[:3]}, left "
                         f"over {left_out[:3]}). The file is damaged or was edited")


@contextlib.contextmanager
def atomic_write(path: Path):
    """Open a temporary neighbour of `path` for writing; on leaving without an error it takes the place of `path`."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
