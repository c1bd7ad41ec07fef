"""Files that are either whole or not there: written beside their place, then renamed."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def left_by_kill(names: str) -> re.Pattern:
    """Return the pattern of what `atomic_write` leaves where its process is killed, of files that `names` matches."""
    return re.compile(rf"\.({names})\.\w{{8}}\.tmp")


def clear_left(folder: Path, names: str) -> None:
    """Remove what `left_by_kill` finds in a folder."""
    left = left_by_kill(names)
    for path in folder.iterdir():
        if left.fullmatch(path.name):
            path.unlink()


@contextlib.contextmanager
def folder_made(folder: Path) -> Iterator[None]:
    """Make a folder, and those above it, for a block; after an error those that were made and are empty are gone."""
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):  # not made yet, or with something in it, which stays
                place.rmdir()
        raise


@contextlib.contextmanager
def atomic_write(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing; on leaving without an error it takes the place of `path`.

    A link of that name is replaced, and what it points to stays as it is. What the disk refuses is an OSError that
    names `path`.

    Args:
        sync: wait until the disk has it, so that it survives a power cut; for one of many small files that takes long.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            error.filename, error.filename2 = str(path), None
        raise
