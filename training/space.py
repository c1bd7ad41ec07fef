"""Say how much room on the disk a run will take, and refuse to begin where there is less."""

import shutil
from pathlib import Path

from system.errors import UserError
from system.machine import nearest_existing

OTHERS = 25_000_000  # bytes of tables, logs, pictures and report; 9 to 12 million were seen


def run_space(trainer) -> int:
    """Estimate the bytes that a run writes from where it stands: its checkpoints, and OTHERS.

    Each holds weights and the two moments of AdamW, at most those of the whole network; of last.pth there are two and,
    while it is written, a third, which hold averaged weights besides.
    """
    weights = sum(tensor.nbytes for tensor in trainer.model.state_dict().values())
    one, last = 3 * weights, (4 if trainer.averaged else 3) * weights
    if trainer.folder and trainer.folder.claimed:  # what is there is replaced
        return one + 2 * last + OTHERS
    every, keep = trainer.keeper.save_every, trainer.folder.keep if trainer.folder else 0
    kept = min(keep, sum(epochs // every for epochs in trainer.plan.epochs.values()))
    return (len(trainer.plan.epochs) + kept + 1) * one + 3 * last + OTHERS


def free_space(folder: Path) -> int:
    """Return the bytes that are free on the disk that a folder, which may be absent, is or would be on."""
    return shutil.disk_usage(nearest_existing(folder)).free


def refuse_lack_of_space(trainer) -> None:
    """Raise UserError if a trainer's run would not fit onto the disk."""
    if not trainer.folder:
        return
    needed, free = run_space(trainer), free_space(trainer.folder.path)
    if free < needed:
        raise UserError(f"{trainer.folder.path}: about {needed / 1e6:.0f} MB are needed for checkpoints and logs, and "
                        f"{free / 1e6:.0f} MB are free. Make room, choose another --output_dir, or keep fewer "
                        f"checkpoints with --keep 0")
