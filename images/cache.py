"""The decoded images of a split at all resolutions: in memory, or in memory-mapped files where they are too many.

Either way they are decoded once and lie there once: workers of a loader, forked or not, read the same pages. The files
are in the folder for temporary files (TMPDIR, else /var/tmp), have no name there that could be left behind, and are
gone when the process ends, however it ends.
"""

import math
import mmap
import os
import shutil
import tempfile
from multiprocessing import reduction

import numpy as np
import torch

from images.resolutions import RESOLUTIONS
from system.errors import UserError
from system.machine import free_memory
from system.processes import local_world_size

CACHE_SHARE = 0.25  # of the memory that is free, all processes of a machine together
DISK_SHARE = 0.9    # of the space that is free in the folder of the files, likewise
# Windows hands no open file to a process that it starts.
FILES_REACH_NEW_PROCESSES = hasattr(reduction, "DupFd")


class ImageCache:
    """Images and masks of one split at all four resolutions, as uint8, to be filled from those at 256.

    Args:
        images: how many.
        channels: (C, K) of image and mask.
        folder: where the memory-mapped files lie, one a resolution for the images and one for the masks; None keeps
            everything in memory.
    Raises:
        OSError: if the folder cannot take the files.
    """

    def __init__(self, images: int, channels: tuple[int, int], folder: str | None = None):
        self.images, self.channels, self.folder = images, channels, folder
        self._files = {key: _reserved(folder, math.prod(shape)) for key, shape in self._shapes().items()} \
            if folder else {}
        self._arrays = self._open_arrays()

    def write(self, index: int, image: np.ndarray, mask: np.ndarray) -> None:
        """Store an image (C, 256, 256) and its mask (K, 256, 256), both uint8, and their 2x2 means below."""
        for kind, array in enumerate((image, mask)):
            level = torch.from_numpy(array)[None]
            for resolution in sorted(RESOLUTIONS, reverse=True):
                level = halve(level) if level.shape[-1] > resolution else level
                self._arrays[resolution, kind][index] = level[0]

    def read(self, resolution: int, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of images (N, C, R, R) and masks (N, K, R, R), both uint8."""
        rows = torch.as_tensor(indices)
        return self._arrays[resolution, 0][rows], self._arrays[resolution, 1][rows]

    def _shapes(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """Return (resolution, 0 for images and 1 for masks) -> shape."""
        return {(r, kind): (self.images, c, r, r) for r in RESOLUTIONS
                for kind, c in enumerate(self.channels)}

    def _open_arrays(self) -> dict[tuple[int, int], torch.Tensor]:
        return {key: _mapped(self._files[key], shape) if self._files else torch.empty(shape, dtype=torch.uint8)
                for key, shape in self._shapes().items()}

    def __getstate__(self) -> dict:
        # A worker that is started afresh, not forked, gets the open files and maps them; tensors torch shares itself.
        if not self._files:
            return self.__dict__
        return self.__dict__ | {"_arrays": None, "_files": {key: reduction.DupFd(file.fileno())
                                                            for key, file in self._files.items()}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        if self._files:
            self._files = {key: os.fdopen(number.detach(), "r+b", 0) for key, number in self._files.items()}
            self._arrays = self._open_arrays()


def open_caches(splits: list[tuple[int, tuple[int, int]]], wanted: bool | None) -> list[ImageCache | None]:
    """Return a cache for each split, which the images are still to be written to, or None to decode at every step.

    They are in memory if all of them together take less than CACHE_SHARE of what is free, and else in files.

    Args:
        splits: number of images, and channels of image and mask, of each split.
        wanted: False for no cache. Where the folder for temporary files has too little space, True is an error, and
            with None the reason for decoding is printed.
    Raises:
        UserError: if there is too little space for a cache that was asked for.
    """
    if wanted is False:
        return [None] * len(splits)
    needed = sum(cache_bytes(*split) for split in splits)
    memory = free_memory()
    if local_world_size() * needed < CACHE_SHARE * memory:
        return [ImageCache(*split) for split in splits]
    folder = folder_for_files()
    free = shutil.disk_usage(folder).free  # less by what other processes of this machine have reserved already
    found = f"{amount(free)} free, of which {DISK_SHARE:.0%} may be taken"
    if needed <= DISK_SHARE * free:
        try:
            return [ImageCache(*split, folder) for split in splits]
        except OSError as error:  # a quota, say
            found = f"{error.strerror or error}"
    problem = f"{folder}: {found}; the decoded images need {amount(needed)} there, being too large for memory " \
              f"({amount(memory)} free, of which {CACHE_SHARE:.0%} may be taken)"
    remedy = "Set TMPDIR to a folder with more space"
    if wanted:
        raise UserError(f"{problem}. {remedy}, or decode at every step with --cache_images false (in Python: "
                         f"cache_images=False)")
    print(f"{problem}. So they are decoded at every step, which is slow. {remedy}")
    return [None] * len(splits)


def folder_for_files() -> str:
    """Return TMPDIR, else /var/tmp where there is one: on many systems /tmp is itself in memory."""
    folder = tempfile.gettempdir()
    in_memory = folder == "/tmp" and "TMPDIR" not in os.environ
    return "/var/tmp" if in_memory and os.access("/var/tmp", os.W_OK) else folder


def cache_bytes(images: int, channels: tuple[int, int]) -> int:
    """Return the bytes that all four levels take."""
    return sum(images * sum(channels) * r * r for r in RESOLUTIONS)


def amount(count: int) -> str:
    """Return a number of bytes as text."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def halve(level: torch.Tensor) -> torch.Tensor:
    """Return the exact 2x2 means of (N, C, 2H, 2W) uint8 as (N, C, H, W) uint8, halves rounded up."""
    n, c, height, width = level.shape
    out = torch.empty(n, c, height // 2, width // 2, dtype=torch.uint8)
    for i in range(0, n, 64):  # in slices, so that the sums stay small
        blocks = level[i:i + 64].reshape(-1, c, height // 2, 2, width // 2, 2).to(torch.int16)
        rows = blocks[:, :, :, 0] + blocks[:, :, :, 1]
        out[i:i + 64] = (rows[..., 0] + rows[..., 1] + 2) >> 2  # five times as fast as `sum` over the two axes
    return out


def _reserved(folder: str, size: int):
    """Return an open file of so many bytes that nobody else sees and that vanishes with the last who has it open."""
    file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it stays open as long as the cache)
    file.truncate(max(size, 1))  # an empty file cannot be mapped
    if hasattr(os, "posix_fallocate"):  # else a disk that fills up later would end the process without a word
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
    return file


def _mapped(file, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the uint8 tensor of this shape whose memory is the file."""
    return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)[:math.prod(shape)].view(shape)
