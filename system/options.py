"""What the command lines share: exit codes, the parser, and the types of options that check themselves.

Nothing here imports torch, so --help and wrong options answer at once.
"""

import argparse
import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

RESOLUTIONS = (32, 64, 128, 256)
# Seconds that other processes leave to the first one for saying the same error. As soon as it has ended, torchrun ends
# the others, so only what went wrong in them alone is said late.
PATIENCE = 10


def first_process() -> bool:
    """Tell whether this process is on its own or the first of those that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ.get("RANK", "0") == "0"


def command(interrupted: str = "") -> Callable:
    """Return a decorator for `main(argv=None)` that turns what goes wrong into a line on stderr and an exit code.

    The code is what `main` returns, 0 for None; 2 for what a user can mend (ValueError and OSError, a full disk too);
    1 for a training whose numbers overflow (FloatingPointError); 130 for Ctrl-C. All else is a fault of ours and keeps
    its traceback. What goes wrong in all processes of torchrun is said by the first.

    Args:
        interrupted: what to say at Ctrl-C, if anything: what became of the results.
    """
    def decorate(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                return main(argv) or 0
            except (ValueError, OSError, FloatingPointError) as error:
                if not first_process():
                    time.sleep(PATIENCE)
                print(f"error: {error}", file=sys.stderr)
                return 1 if isinstance(error, FloatingPointError) else 2
            except KeyboardInterrupt:
                if interrupted and first_process():
                    print(f"\ninterrupted; {interrupted}", file=sys.stderr)
                return 130
        return run
    return decorate


def flag(text: str) -> bool:
    """Read true or false."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def whole(low: int, high: int = 10 ** 9):
    """Return a reader of whole numbers from `low` to `high`."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,10}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low} (and at most {high})")
        return int(text)
    return parse


def number(low: float, high: float = math.inf, above: bool = False, below: bool = False):
    """Return a reader of finite numbers from `low` to `high`, the ends excluded where asked for."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or above and value == low or below and value == high:
            rule = f"above {low:g}" if above else f"of at least {low:g}"
            rule += "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {rule}")
        return value
    return parse


def epoch_list(text: str) -> str:
    """Check '50', or one number a stage: '10,10,20,60'."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number of at least 1, nor such numbers joined "
                                         f"by commas, one a stage, e.g. 10,10,20,60")
    return text


def count_list(text: str) -> str:
    """Check rising numbers joined by commas: '5,10,20'."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text) or sorted(set(map(int, text.split(",")))) != [
            int(n) for n in text.split(",")]:
        raise argparse.ArgumentTypeError(f"{text!r} is not rising whole numbers of at least 1 joined by commas, e.g. "
                                         f"5,10,20")
    return text


def batch_table(text: str) -> str:
    """Check 'RESOLUTION:BATCH' joined by commas."""
    sizes = re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text) and [entry.split(":") for entry in text.split(",")]
    if not sizes or any(int(r) not in RESOLUTIONS or int(n) < 1 for r, n in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not RESOLUTION:BATCH joined by commas, with resolutions out of "
                                         f"32, 64, 128, 256 and batches of at least 1, e.g. 32:64,64:32,128:16,256:8")
    if len({r for r, _ in sizes}) < len(sizes):
        raise argparse.ArgumentTypeError(f"{text!r} names a resolution twice")
    return text


def target_list(text: str) -> str:
    """Check 'mask' or 'mask,boundary'."""
    if text not in ("mask", "mask,boundary"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither mask nor mask,boundary")
    return text


def folder_name(text: str) -> str:
    """Check the name of a folder."""
    if not re.fullmatch(r"[\w.\-+=]+", text) or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder name of letters, digits and _ - + = .")
    return text


def results_folder(text: str) -> str:
    """Check the folder that results go to: it may be absent, but not be a file."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file; results go to a folder. Name another")
    return text


def regex(text: str) -> str:
    """Check a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is no regular expression ({error})") from None
    return text


def checkpoint_list(text: str) -> list[str]:
    """Return the paths of one checkpoint, or of several joined by commas; a file whose name has a comma is one."""
    return [text] if Path(text).is_file() else text.split(",")


class Parser(argparse.ArgumentParser):
    """Raise what is wrong as ValueError, so that every refusal of a command line looks the same."""

    def error(self, message: str):
        raise ValueError(f"{message} (--help lists all options)")
