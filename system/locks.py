"""Locks on folders that one process at a time may write into; a process that has died holds none."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from system.atomic import folder_made
from system.errors import UserError

LOCK = ".lock"  # in the folder that is locked
_LOCKS: dict[Path, FileLock] = {}  # of this process, which may take one of its own twice


@contextlib.contextmanager
def held_lock(file: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold a lock (see `take_lock`) for the time of a block, after which the file is gone.

    So is its folder after an error, if it was made for it and nothing is in it (see `system.atomic.folder_made`).
    """
    with folder_made(file.parent):
        lock = take_lock(file, what, remedy)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            lock.release()


def take_lock(file: Path, what: str, remedy: str) -> FileLock:
    """Keep other processes from taking this lock file, until it is released or this process ends, however it ends.

    Args:
        file: made if it is missing, as is its folder.
        what: is locked, in words, for messages.
        remedy: what to do if another process holds it.
    Raises:
        UserError: if another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = _LOCKS.setdefault(file.parent.resolve() / file.name, FileLock(file))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{file.parent}: another process is writing into {what}. Wait until it has ended, or "
                        f"{remedy}") from None
    except OSError as error:  # some network drives have no locks
        print(f"warning: {file.parent}: cannot be locked ({error}), so nothing keeps a second process from writing "
              f"into it")
    return lock
