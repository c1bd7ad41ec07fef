"""Errors that a user can mend, and the codes with which command lines end."""

import errno


class UserError(ValueError):
    """Something that a user can mend; the message names the file or option, the value found, the rule and the remedy.

    A command line prints it as one line and ends with code 2. Any other exception is a fault of ours and keeps its
    traceback.
    """


class DiskError(UserError):
    """The disk refused what a training wanted to save; a command line ends with code 3."""


class NonFiniteLossError(FloatingPointError):
    """The loss became infinite or not a number; the message says where. A command line ends with code 1."""


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})  # a disk that takes nothing more

# What the operating system refuses and a user can mend: rights, space, quotas, damaged disks, paths that are no folder.
DISK_ERRORS = frozenset({
    errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE,
    errno.ESTALE, errno.EPIPE}) | FULL


def lacks_memory(error: BaseException) -> bool:
    """Tell whether an error is a lack of memory: Python's, NumPy's, or one of torch, on the CPU or a GPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" \
        or isinstance(error, RuntimeError) and "allocate memory" in str(error)


def is_for_user(error: BaseException) -> bool:
    """Tell whether an error is one for the user: a UserError, or a refusal of the operating system (DISK_ERRORS)."""
    return isinstance(error, UserError) or isinstance(error, OSError) and error.errno in DISK_ERRORS
