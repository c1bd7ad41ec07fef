"""Signals that ask a process to stop: noted at first, obeyed when what is under way is done."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class StoppedBySignal(KeyboardInterrupt):
    """A process stopped because it was asked to, with what it did saved.

    Attributes:
        code: with which a command line ends: 128 and the number of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Give a function that returns the number of the signal that came, 0 for none. A second one stops at once.

    In a thread other than the main one signals are as they are otherwise, and so are signals that the process was
    started to ignore: SIGHUP by `nohup`, SIGINT by a script that starts it in the background.
    """
    came = [0]

    def note(number: int, _frame) -> None:
        if came[0]:
            raise StoppedBySignal(number)
        came[0] = number

    with _handled(note, NAMES):
        yield lambda: came[0]


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise StoppedBySignal, as Ctrl-C raises KeyboardInterrupt, so that all is tidied up."""
    def stop(number: int, _frame) -> None:
        raise StoppedBySignal(number)

    with _handled(stop, NAMES[1:]):
        yield


@contextlib.contextmanager
def _handled(handler: Callable, names: Sequence[str]) -> Iterator[None]:
    """Handle these signals so for a while; ignored ones stay ignored, and outside the main thread nothing changes."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def stop_if_asked(asked: Callable[[], int]) -> None:
    """Raise StoppedBySignal if a signal has come (see `noted_signals`)."""
    if number := asked():
        raise StoppedBySignal(number)


def leave_signals_to_the_parent(_worker: int = 0) -> None:
    """Ignore what a terminal sends to all processes at once; for processes that decode for another one."""
    for name in ("SIGINT", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
