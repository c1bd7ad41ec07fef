"""What a training saves, and how it goes on from that."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from checkpoints import FORMAT, load_resumable, load_weights
from system.devices import random_states, set_random_states
from system.errors import UserError
from training.optimization import load_optimizer


def snapshot(trainer, score: float | None) -> dict:
    """Return what checkpoints.py describes; the weights are those that are evaluated.

    Args:
        trainer: a ProgressiveTrainer.
        score: validation Dice of the weights, if they were validated.
    """
    return {"format": FORMAT, "model_args": trainer.model.model_args, "stage": trainer.model.stage,
            "model": trainer.evaluated_model.live_state(), "unborn": {}, "data": trainer.recipe,
            "threshold": trainer.threshold, "score": score, **trainer.course.state(), "position": None, "history": [],
            "time_limit": trainer.time_limit.state() if trainer.time_limit else None,
            "optimizer": trainer.optimizer.state_dict(), "scaler": trainer.scaler.state_dict(), "averaged": None,
            "random_states": random_states(trainer.device), "config": trainer.config, "card": ""}


def resumable(trainer, score: float | None, position: dict | None = None) -> dict:
    """Return a `snapshot` from which `restore` goes on: every part as it was trained, and the averages beside it.

    Args:
        position: within the epoch that is under way, as `training.position.EpochPosition.state` returns it.
    """
    return snapshot(trainer, score) | {
        "model": trainer.model.live_state(), "unborn": trainer.model.unborn_state(), "position": position,
        "history": trainer.folder.history if trainer.folder else [],
        "averaged": trainer.averaged.state() if trainer.averaged else None}


@contextlib.contextmanager
def _of_this_network(path: Path, what: str) -> Iterator[None]:
    """Say of what a file holds that it is not of the network that it names."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{path}: its {what} cannot be of this network ({type(error).__name__}: {first}). Resume from "
                        f"another file of the run, e.g. previous.pth, or start anew with --init_from {path}") from None


def restore(trainer, path: Path) -> dict:
    """Bring a trainer to where a last.pth was written: weights, optimizer, course, time, random states.

    Returns:
        The checkpoint.
    Raises:
        UserError: for a file of another network and for one that is not a last.pth.
    """
    saved = load_resumable(path, trainer.model.model_args)
    for network in {trainer.model, trainer.evaluated_model}:
        network.set_stage(saved["stage"])
    load_weights(trainer.model, saved["model"], path)
    trainer.model.transfer_weights(saved["unborn"])
    with _of_this_network(path, "averaged weights"):
        if trainer.averaged:
            trainer.averaged.load(saved["averaged"] or trainer.averaged.state() | {"model": trainer.model.state_dict()})
    with _of_this_network(path, "optimizer"):
        load_optimizer(trainer.optimizer, saved["optimizer"])
    with _of_this_network(path, "scaler"):
        if saved["scaler"] and trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict(saved["scaler"])
    trainer.course.load(saved)
    if trainer.time_limit and saved["time_limit"]:
        trainer.time_limit.resume(saved["time_limit"])
    trainer.recipe = saved["data"]
    set_random_states(saved["random_states"], trainer.device)
    return saved
