"""What a training saves, and how it goes on from that."""

from pathlib import Path

from checkpoints import FORMAT, load_resumable, load_weights
from system.devices import random_states, set_random_states


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
    if trainer.averaged:
        trainer.averaged.load(saved["averaged"] or trainer.averaged.state() | {"model": trainer.model.state_dict()})
    trainer.optimizer.load_state_dict(saved["optimizer"])
    if saved["scaler"] and trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(saved["scaler"])
    trainer.course.load(saved)
    if trainer.time_limit and saved["time_limit"]:
        trainer.time_limit.resume(saved["time_limit"])
    trainer.recipe = saved["data"]
    set_random_states(saved["random_states"], trainer.device)
    return saved
