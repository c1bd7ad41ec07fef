"""How long a training will take on this machine, before it begins: a step that is timed, and the operations planned."""

import copy
import time

import torch

from system.devices import random_states, set_random_states
from system.text import duration
from training.dealing import deal
from training.schedule import WORK
from training.settings import PRESETS
from unet import STAGE_RESOLUTIONS, build_model

LONG = 1800        # seconds of a training from which on the quick preset is named
TIMED = 4          # images of a step that is timed on a CPU; elsewhere a batch is
TIMED_SIDE = 64    # pixels of their side, at most, on a CPU
REPEATED, ENOUGH = 5, 2.0  # such steps, of which the fastest counts, and seconds that they may take
UNSURE = 2         # times the estimate: optimizer, data and pictures are not in a step, and 1.4 to 2 times was needed
VALIDATING = 1 / 3  # operations of an image that is validated, of those of one that is trained on


def expected_seconds(trainer, dataloaders: dict[int, tuple]) -> float:
    """Estimate the seconds that the rest of a training will take: one forward and backward pass on blank images tells
    the speed, and the operations of the other stages are in proportion (see WORK).

    Nothing of the trainer is changed. What decoding, saving and scoring of the test split take is not in it.

    Args:
        trainer: a ProgressiveTrainer.
        dataloaders: resolution -> (train, valid, ...) loaders with data sets.
    """
    states = random_states(trainer.device)
    stage = trainer.course.next_stage(trainer.model.stage)
    if stage is None:
        return 0.0
    network = copy.deepcopy(trainer.model).train()
    network.set_stage(stage)
    batch = dataloaders[STAGE_RESOLUTIONS[stage]][0].batch_size
    an_image = _seconds_per_image(trainer, network, batch)
    set_random_states(states, trainer.device)
    total = 0.0
    for later, epochs in trainer.plan.epochs.items():
        if later >= stage:
            train, valid = (len(loader.dataset) for loader in dataloaders[STAGE_RESOLUTIONS[later]][:2])
            done = trainer.finished_epochs if later == trainer.model.stage else 0
            total += max(epochs - done, 0) * (train + VALIDATING * valid) * WORK[later] / WORK[stage]
    return total * an_image


def expected_duration(trainer, dataloaders: dict[int, tuple], with_quick: bool) -> str:
    """Return what to say of the time that a training will take.

    Args:
        with_quick: name the quick preset, with its time, where the training is LONG.
    """
    seconds = expected_seconds(trainer, dataloaders)
    said = (f"time: {_in_words(seconds)} on this machine, as busy as it is now (a step was timed; the first epochs "
            f"will tell more)")
    if with_quick and seconds > LONG:
        quick = expected_seconds(_quick_trainer(trainer), dataloaders)
        said += (f"\n      --preset quick takes {_in_words(quick)}: {PRESETS['quick']['base_channels']} channels and "
                 f"fewer epochs; --max_minutes 30 ends in time")
    return said


def _in_words(seconds: float) -> str:
    """Return the range in which a training of these estimated seconds ends."""
    return f"{duration(seconds)} to {duration(UNSURE * seconds)}"


def _quick_trainer(trainer):
    """Return a trainer for the same images as --preset quick makes it."""
    states, quick = random_states(trainer.device), PRESETS["quick"]
    model = build_model(trainer.model.model_args | {"model": "pgunet", "base_channels": quick["base_channels"]})
    made = type(trainer)(model, trainer.device, deal(quick["budget"]), precision=trainer.precision)
    set_random_states(states, trainer.device)
    return made


def _seconds_per_image(trainer, network, batch: int) -> float:
    """Time a step on images at the resolution of the network's stage, or smaller ones and their share of pixels."""
    side = network.resolution
    if trainer.device.type == "cpu":
        batch, side = min(batch, TIMED), min(side, TIMED_SIDE)
    image = torch.zeros(batch, network.in_channels, side, side)
    mask = torch.zeros(batch, network.out_channels, side, side)
    times: list[float] = []
    while len(times) < 2 or len(times) < REPEATED and sum(times) < ENOUGH:
        begin = time.monotonic()
        trainer.forward({"image": image, "mask": mask}, network)[2].backward()
        network.zero_grad(set_to_none=True)
        if trainer.device.type != "cpu":
            getattr(torch, trainer.device.type).synchronize()
        times.append(time.monotonic() - begin)
    return min(times) / batch * (network.resolution / side) ** 2
