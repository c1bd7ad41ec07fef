"""Check an archive before it is read: every byte by its checksums, and that it does not unpack to more than it is."""

import hashlib
import struct
import zipfile
from pathlib import Path

from system.errors import UserError

# What was seen to be raised for archives that are cut off, or of which a bit is another one.
UNREADABLE = (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, NotImplementedError, LookupError, struct.error,
              OverflowError)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_archive(path: Path) -> None:
    """Raise UserError unless a file is a zip archive, stored without compression, of which every checksum is right.

    Torch writes such archives, with the checksum of every tensor, and does not look at them when it reads.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            unpacked, there = sum(record.file_size for record in records), path.stat().st_size
            if unpacked > there or any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise UserError(f"{path}: an archive of {there} bytes that unpacks to {unpacked}; a checkpoint is not "
                                f"compressed. It is of another program, or meant to fill the memory")
            wrong = archive.testzip()
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{path}: no checkpoint that can be read ({type(error).__name__}). Is it cut off, or of "
                        f"another program?") from None
    if wrong:
        raise UserError(f"{path}: damaged: the checksum of its part {wrong} is wrong. Take another checkpoint of the "
                        f"run, or a copy of this one")
