"""Load the program with much: a data set of very many images, a training of very many steps.

    python tests/load.py images --count 100000
    python tests/load.py steps --steps 20000 --hours 24

What was measured stands beside its bound; the exit code is 1 if one is exceeded. For Linux: memory and open files are
read from /proc.
"""

import argparse
import gc
import itertools
import math
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

MB = 2 ** 20
SIDE = 32        # pixels of an image
SHAPES = 64      # different masks of a split; its other masks are links to these
GROUP = 20       # images of a patient
BATCHES = 10     # of an epoch
SAVE_MINUTES = 0.005  # so that last.pth is saved in the middle of every second epoch too

# Bounds: twice what was measured for 100000 images and 20000 steps (docs/reliability.md).
START_SECONDS, SECONDS_AN_IMAGE = 15, 0.008
SECONDS_A_PAIR = 5e-7    # of an image of train and one of another split, whose pixels are compared
START_MB, MB_AN_IMAGE = 1200, 0.026
BAR_FROM = 2000          # images, from which on one waits so long that one wants to see a progress bar
GROWTH_MB, GROWTH_KB_AN_EPOCH = 8, 4  # the rows of metrics.csv are kept, and saved with each last.pth
SLOWER, SLOWER_AN_EPOCH = 1.5, 5e-4   # times what the first epochs took


@dataclass(frozen=True)
class Figure:
    """What was measured, and the least or most that it may be; without either it is only told."""

    what: str
    value: float
    unit: str = ""
    at_most: float = math.inf
    at_least: float = -math.inf

    @property
    def holds(self) -> bool:
        return self.at_least <= self.value <= self.at_most

    def __str__(self) -> str:
        bound = f"at most {self.at_most:,.4g}" if self.at_most < math.inf else \
            f"at least {self.at_least:,.4g}" if self.at_least > -math.inf else ""
        verdict = "" if self.holds else "  does not hold"
        return f"{self.what:<40}{self.value:>10,.4g} {self.unit:<4}{bound}{verdict}".rstrip()


# ---- many images


def write_images(root: Path, count: int) -> Path:
    """Write a data set of `count` small images, no two alike, of patients of 20 images each: 8 of 10 are for train."""
    import numpy as np
    from PIL import Image

    from images.files import save_png

    rows, columns = np.mgrid[:SIDE, :SIDE]
    rng, number = np.random.default_rng(0), 0
    for split, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
        images, masks = root / split / "images", root / split / "masks"
        images.mkdir(parents=True)
        masks.mkdir()
        centres, radii = rng.uniform(0.3, 0.7, (SHAPES, 2)) * SIDE, rng.uniform(0.1, 0.25, SHAPES) * SIDE
        discs = [np.hypot(rows - y, columns - x) <= r for (y, x), r in zip(centres, radii, strict=True)]
        first = {}
        for i in range(max(1, round(share * count))):
            name = f"patient{split[:2]}{i // GROUP:05d}_{number:06d}.png"
            disc, number = discs[i % SHAPES], number + 1
            image = np.where(disc, 60, 190) + rng.normal(0, 30, (SIDE, SIDE))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(images / name, compress_level=1)
            if i < SHAPES:
                first[i] = masks / name
                save_png(first[i], disc)
            else:
                link_or_copy(first[i % SHAPES], masks / name)
    return root


def link_or_copy(path: Path, other: Path) -> None:
    """Let a file have a second name, or a copy where a file has one name only."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copy(path, other)


class Watched(NamedTuple):
    """What a process did: exit code, seconds, those of processors, largest resident memory in bytes, what it said."""

    code: int
    seconds: float
    processor_seconds: float
    peak: int
    printed: str
    on_terminal: str


def watched(*arguments) -> Watched:
    """Run `python ARGUMENTS` with a terminal for its errors, and watch it."""
    from system.machine import fields

    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 100))
    said: list[bytes] = []
    reader = threading.Thread(target=read_terminal, args=(here, said))
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=PROJECT, stdout=printed, stderr=there)
        os.close(there)
        reader.start()
        peak = 0
        while process.poll() is None:
            # Not ru_maxrss, which is no less than what this process had when it started the other one.
            peak = max(peak, int(fields(f"/proc/{process.pid}/status").get("VmHWM", "0").split()[0]) * 1024)
            time.sleep(0.02)
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        reader.join()
        os.close(here)
        printed.seek(0)
        return Watched(process.returncode, seconds, sum(after[:2]) - sum(before[:2]), peak, printed.read().decode(),
                       b"".join(said).decode(errors="replace"))


def read_terminal(file: int, said: list[bytes]) -> None:
    """Collect what is written to a terminal until its other end is closed."""
    try:
        while part := os.read(file, 65536):
            said.append(part)
    except OSError:  # so Linux says that it is closed
        pass


def check_images(count: int) -> list[Figure]:
    """Check a data set of `count` images in a process of its own; return what it took.

    Raises SystemExit with what the process said if it found a fault.
    """
    with tempfile.TemporaryDirectory() as place:
        begin = time.perf_counter()
        root = write_images(Path(place) / "data", count)
        print(f"{count} images with masks were written in {time.perf_counter() - begin:.0f} s", flush=True)
        done = watched("prepare_data.py", "check", root, "--group_regex", "^[^_]+")
    if done.code:
        raise SystemExit(f"the check ended with code {done.code}:\n{done.on_terminal}")
    print(done.printed)
    return figures_of_check(count, done)


def figures_of_check(count: int, done: Watched) -> list[Figure]:
    """Return the figures of a process that has checked `count` images."""
    pairs = 0.8 * 0.2 * count ** 2
    return [
        Figure("from the command to its end", done.seconds, "s"),
        Figure("processor time", done.processor_seconds, "s",
               START_SECONDS + SECONDS_AN_IMAGE * count + SECONDS_A_PAIR * pairs),
        Figure("processor time an image", 1000 * done.processor_seconds / count, "ms"),
        Figure("largest memory", done.peak / MB, "MB", START_MB + MB_AN_IMAGE * count),
        Figure("times a progress bar was drawn", len(re.findall(r"\d%\|", done.on_terminal)),
               at_least=10 if count >= BAR_FROM else 0)]


# ---- many steps


class Moment(NamedTuple):
    """What a training takes at one moment: epochs done, memory in bytes, open files, seconds of processors so far."""

    epochs: int
    memory: int
    files: int
    processor_seconds: float


def moment(epochs: int) -> Moment:
    """Measure this process now."""
    from system.machine import fields

    gc.collect()
    memory = int(fields("/proc/self/status")["RssAnon"].split()[0]) * 1024  # without files of libraries
    return Moment(epochs, memory, len(os.listdir("/proc/self/fd")), time.process_time())


def train_long(folder: Path, epochs: int, see: Callable[[Moment], object] = print, moments: int = 10) -> list[Moment]:
    """Train a tiny network in this process for many epochs of ten steps at the first stage, then one at the last.

    As `train_papsmear.py` does, with validation, averages, saving and logs.

    Returns:
        What it took at so many moments, equal numbers of epochs apart.
    """
    from conftest import make_trainer, write_data_set

    root = write_data_set(folder / "data", (2 * BATCHES, 4, 4), SIDE)
    trainer, loaders = make_trainer(root, folder / "run", epochs_per_stage=[epochs, 0, 0, 1], average=0.9,
                                    save_minutes=SAVE_MINUTES)
    due, found = {max(1, round(epochs * k / moments)) for k in range(1, moments + 1)}, []

    def look(_line: str) -> None:
        if trainer.model.stage == 1 and trainer.finished_epochs in due:
            due.discard(trainer.finished_epochs)
            found.append(moment(trainer.finished_epochs))
            see(found[-1])

    trainer.fit(loaders, say=look)
    return found


def figures_of_training(found: list[Moment]) -> list[Figure]:
    """Return what a training took at its end against a tenth of it, which is the warm-up."""
    first, last = found[0], found[-1]
    epochs = last.epochs - first.epochs
    costs = [(b.processor_seconds - a.processor_seconds) / (b.epochs - a.epochs) for a, b in itertools.pairwise(found)]
    return [
        Figure("memory after the warm-up", first.memory / MB, "MB"),
        Figure("growth of memory since then", (last.memory - first.memory) / MB, "MB",
               GROWTH_MB + GROWTH_KB_AN_EPOCH * epochs / 1024),
        Figure("open files after the warm-up", first.files),
        Figure("growth of open files since then", last.files - first.files, at_most=0),
        Figure("processor time of an epoch at first", 1000 * costs[0], "ms"),
        Figure("processor time of an epoch at the end", 1000 * costs[-1], "ms",
               (SLOWER + SLOWER_AN_EPOCH * epochs) * 1000 * costs[0])]


def run_steps(steps: int, hours: float) -> list[Figure]:
    """Train so many steps, and say to which pace they correspond in so many hours."""
    epochs = max(10, steps // BATCHES)
    print(f"{epochs * BATCHES} steps in {epochs} epochs; in {hours:g} hours as many would be a step every "
          f"{3600 * hours / (epochs * BATCHES):.3g} s, an epoch every {3600 * hours / epochs:.3g} s\n"
          f"epochs   memory  open files  processor time", flush=True)
    with tempfile.TemporaryDirectory() as place:
        return figures_of_training(train_long(Path(place), epochs, lambda m: print(
            f"{m.epochs:>6} {m.memory / MB:>5.0f} MB {m.files:>11} {m.processor_seconds:>13.0f} s", flush=True)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    images = commands.add_parser("images", help="check a data set of many images")
    images.add_argument("--count", type=int, default=100_000, help="images (100000)")
    steps = commands.add_parser("steps", help="train a tiny network for many steps")
    steps.add_argument("--steps", type=int, default=20_000, help="of the optimizer (20000)")
    steps.add_argument("--hours", type=float, default=24, help="of the run that they stand for (24)")
    args = parser.parse_args(argv)
    figures = check_images(args.count) if args.command == "images" else run_steps(args.steps, args.hours)
    print("\n".join(map(str, figures)))
    return int(not all(figure.holds for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
