"""Errors that a user can mend, and the codes with which command lines end."""

import errno
from collections.abc import Collection
from pathlib import Path


class UserError(ValueError):
    """Something that a user can mend; the message names the file or option, the value found, the rule and the remedy.

    A command line prints it as one line and ends with code 2. Any other exception is a fault of ours and keeps its
    traceback.
    """


class DiskError(UserError):
    """The disk refused what a command wanted to save; a command line ends with code 3."""


class NonFiniteLossError(FloatingPointError):
    """The loss became infinite or not a number; the message says where. A command line ends with code 1."""


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})  # a disk that takes nothing more
DISK_ENDS = FULL | {errno.EIO}  # with which any command line ends with code 3

# What the operating system refuses and a user can mend: rights, space, quotas, damaged disks, paths that are no folder.
DISK_ERRORS = frozenset({
    errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EPIPE}) | FULL

# In errors of torch's allocator, of CUDA, and of cuDNN, cuBLAS and their kin.
NO_MEMORY = ("allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


def check_continued(then: dict, now: dict, place: Path, remedy: str, may_differ: Collection[str] = ()) -> None:
    """Raise UserError with the first setting that differs from those of the work that --continue goes on with.

    A setting that is younger than that work, so that it lacks it, was off then.

    Args:
        place: where `then` was found.
        remedy: what to do but going on with the options of then.
        may_differ: names of settings that are not compared.
    """
    for name in {**then, **now}:
        younger = name not in then and not now[name]
        if name not in may_differ and not younger and then.get(name) != now.get(name):
            raise UserError(f"--continue: {name} was {then.get(name)!r} in {place}, and is now {now.get(name)!r}. Go "
                            f"on with the options of then, {remedy}")


def lacks_memory(error: BaseException) -> bool:
    """Tell whether an error is a lack of memory: Python's, NumPy's, or one of torch and the libraries of CUDA."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" \
        or isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def is_for_user(error: BaseException) -> bool:
    """Tell whether an error is one for the user: a UserError, or a refusal of the operating system (DISK_ERRORS)."""
    return isinstance(error, UserError) or isinstance(error, OSError) and error.errno in DISK_ERRORS
