"""What the command lines share: exit codes, the parser, and the types of options that check themselves.

Nothing here imports torch, so --help and wrong options answer at once.
"""

import argparse
import difflib
import functools
import io
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from system.errors import DISK_ENDS, DiskError, NonFiniteLossError, UserError, is_for_user, lacks_memory
from system.machine import share_cores
from system.signals import terminated_as_interrupted
from system.text import compiled, plain_output

# Seconds that other processes leave to the first one for saying the same error. As soon as it has ended, torchrun ends
# the others, so only what went wrong in them alone is said late.
PATIENCE = 10
PRECISIONS = ("auto", "bfloat16", "float16", "float32")
LARGEST = 10 ** 9  # number that an option takes, where nothing else bounds it, so that all can be computed with


def is_first_of_launch() -> bool:
    """Tell, before a process group is joined, whether this process is alone or the first that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ.get("RANK", "0") == "0"


def command(interrupted: str = "") -> Callable:
    """Return a decorator for `main(argv=None)` that turns what goes wrong into a line on stderr and an exit code.

    The code is what `main` returns, 0 for None; 2 for what a user can mend (see `system.errors.is_for_user`); 1 for a
    training whose numbers overflow; 3 where the disk ended it (see `system.errors.DISK_ENDS`); 130 for Ctrl-C, 143 and
    129 for the signals TERM and HUP. All else is a fault of ours and keeps its traceback. What goes wrong in all
    processes of torchrun is said by the first. What is printed meanwhile cannot steer the terminal.

    Args:
        interrupted: what to say at Ctrl-C, if anything: what became of the results.
    """
    def decorate(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):  # a file name that the console cannot show ends no run
                    stream.reconfigure(errors="backslashreplace")
            share_cores()
            with plain_output(), terminated_as_interrupted():
                return _exit_code(main, argv, interrupted)
        return run
    return decorate


def _exit_code(main: Callable[[list[str] | None], int | None], argv: list[str] | None, interrupted: str) -> int:
    try:
        return main(argv) or 0
    except (UserError, OSError, NonFiniteLossError) as error:
        overflow = isinstance(error, NonFiniteLossError)
        if not overflow and not is_for_user(error):
            raise
        if not is_first_of_launch():
            time.sleep(PATIENCE)
        if isinstance(error, OSError) and error.errno in DISK_ENDS:
            error = DiskError(f"{error.filename or 'the disk'}: {error.strerror}; "
                              f"{interrupted or 'what is whole stays'}. Make room, mend the disk or write elsewhere")
        print(f"error: {error}", file=sys.stderr)
        return 1 if overflow else 3 if isinstance(error, DiskError) else 2
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        first = str(error).partition("\n")[0]
        print(f"error: out of memory{f' ({first})' if first else ''}. End other programs, or take smaller images, "
              f"batches or tiles, or fewer channels", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if interrupted and is_first_of_launch():
            print(f"\ninterrupted; {interrupted}", file=sys.stderr)
        return getattr(error, "code", 130)


def flag(text: str) -> bool:
    """Read true or false."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def whole(low: int, high: int = LARGEST):
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


def folder_name(text: str) -> str:
    """Check the name of a folder."""
    if not re.fullmatch(r"[\w.\-+=]+", text) or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder name of letters, digits and _ - + = .")
    return text


def name_ending(text: str) -> str:
    """Check what stands at the end of a file's name, before its suffix."""
    if "/" in text or "\\" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no ending of a name, e.g. _mask for a_mask.png beside a.png")
    return text


def results_folder(text: str) -> str:
    """Check the folder that results go to: it may be absent, but not be a file."""
    if os.path.lexists(text) and not os.path.isdir(text):  # a link to nowhere, too
        raise argparse.ArgumentTypeError(f"{text!r} is a file; results go to a folder. Name another")
    return text


def run_folder(text: str) -> str:
    """Check the folder of a run that is gone on with, which must have a name."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder. Name the run folder, e.g. outputs/NAME")
    return text


def regex(text: str) -> str:
    """Check a regular expression."""
    try:
        compiled(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def checkpoint_path(text: str) -> str:
    """Return the path of a checkpoint; of a run folder, the best of its last stage."""
    if not Path(text).is_dir():
        return text
    best = sorted(Path(text).glob("best_stage_[1-4].pth"))
    if not best:
        raise argparse.ArgumentTypeError(f"{text!r} is a folder without best_stage_X.pth; a checkpoint is such a file, "
                                         f"or the run folder that it lies in")
    return str(best[-1])


def checkpoint_list(text: str) -> list[str]:
    """Return the paths of one checkpoint, or of several joined by commas; a name with a comma that is there is one."""
    return [checkpoint_path(path) for path in ([text] if Path(text).exists() else text.split(","))]


def add_device(add: Callable) -> None:
    """Add --device; `add` is add_argument of a parser, or one like it."""
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu; auto takes the first of cuda, mps and cpu that is "
                                         "there (auto)")


def add_precision(add: Callable, of: str = "") -> None:
    """Add --precision, `of` a network among others."""
    add("--precision", choices=PRECISIONS, default="auto",
        help=f"{of}auto takes bfloat16 where it is at least as fast, else float32 (auto)")


def add_views(add: Callable) -> None:
    """Add what a prediction makes of the answers of the network: --augment and --single_cell."""
    add("--augment", action="store_true", help="average over the eight flips and quarter turns")
    add("--single_cell", action="store_true", help="each image shows one cell: keep one nucleus, that of the largest "
                                                   "sum of probabilities, and one object of each other class")


class Parser(argparse.ArgumentParser):
    """Raise what is wrong as UserError, so that every refusal of a command line looks the same."""

    def parse_known_args(self, args=None, namespace=None):
        """Refuse words that argparse or the operating system would stumble over, then do what argparse does.

        By itself argparse takes `--` away where it stands for a value, and leaves a list of nothing in its place.
        """
        words = list(sys.argv[1:] if args is None else args)
        options = words[:words.index("--")] if "--" in words else words
        for word in options:
            name, _, value = word.partition("=")
            if name.startswith("-") and value == "--":
                self.error(f"argument {name}: '--' is no value; a file or folder of that name is ./--")
        if words.count("--") > 1:
            self.error("'--' is given twice; the first ends the options, and a file of that name is ./--")
        if wrong := next((word for word in words if "\0" in word), ""):
            self.error(f"{wrong!r} holds a NUL, which no name and no path can")
        return super().parse_known_args(words, namespace)

    def error(self, message: str):
        meant = ""
        if message.startswith("unrecognized arguments:"):
            wrong = next((word.split("=")[0] for word in message.split() if word.startswith("--")), "")
            near = difflib.get_close_matches(wrong, self.options(), 1, 0.7)
            meant = f". Did you mean {near[0]}?" if near else ""
        raise UserError(f"{message}{meant} (--help lists all options)")

    def options(self) -> list[str]:
        """Return all options, those of commands of this command too."""
        found = [name for name in self._option_string_actions if name.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [name for parser in action.choices.values() for name in parser.options()]
        return found
