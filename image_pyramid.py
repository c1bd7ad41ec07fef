"""The decoded pairs of a split at all four resolutions, kept in memory or decoded when asked for.

The 256 pixel image is made once; each coarser one is the exact 2x2 mean of the finer one, rounded to 8 bit, image and
mask alike. That is why growth preserves the function on real data too.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from distributed import local_world_size
from familiarity import describe, usual_ranges
from images import ImageFileError, load_image, resize
from splits import DatasetError, Pair, find_splits, sizing_of
from targets import MASK, load_target, target_channels
from unet import STAGE_RESOLUTIONS

FINEST = max(STAGE_RESOLUTIONS.values())
CACHE_SHARE = 0.25  # of the memory that is free, all processes of a machine together


class ImagePyramid:
    """All images and masks of one split, as uint8, with what was counted while they were read.

    Args:
        classes: of the masks.
        sizing: 'resize' brings every image to 256x256; 'tile' takes tiles at native scale, which have that size.
        targets: ('mask',) or ('mask', 'boundary') (see targets.py).

    Attributes:
        pairs, names: the files, in the order of the indices.
        sizes: (N, 2) original height and width in pixels.
        image_mean, image_std: (C,) on the scale [0, 1], over all pixels at 256.
        usual: name -> [low, high] of what describes the images (see familiarity.py), at 256.
        fingerprint: hash of all names and pixels at 256, in hexadecimal.
        target_channels: channels of the masks, one a class and one more for the boundary.
        foreground: (N, classes) share of each mask's original pixels that belong to the class.
    """

    def __init__(self, pairs: list[Pair], in_channels: int, classes: int, sizing: str = "resize",
                 targets: tuple[str, ...] = MASK):
        self.sizing, self.targets = sizing, targets
        self.pairs, self.names = pairs, [pair.name for pair in pairs]
        self.in_channels, self.classes = in_channels, classes
        self.target_channels = target_channels(classes, targets)
        self.sizes = np.zeros((len(pairs), 2), dtype=int)
        self.foreground = np.zeros((len(pairs), classes))
        self._levels: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def cached(self) -> bool:
        """Tell whether the decoded images are kept in memory."""
        return bool(self._levels)

    @property
    def cache_bytes(self) -> int:
        """Return the memory that all four levels take."""
        return sum(len(self) * (self.in_channels + self.target_channels) * r * r for r in STAGE_RESOLUTIONS.values())

    def subset(self, indices: Iterable[int]) -> "ImagePyramid":
        """Return these images alone, decoded anew and kept in memory."""
        own = ImagePyramid([self.pairs[i] for i in indices], self.in_channels, self.classes, self.sizing, self.targets)
        own.read_all(cache=True)
        return own

    def read_all(self, cache: bool) -> list[str]:
        """Decode every file once, check it, count, and keep it if asked to; return the problems found."""
        digest = hashlib.blake2b(digest_size=16)
        kept = [torch.empty(len(self), c, FINEST, FINEST, dtype=torch.uint8)
                for c in (self.in_channels, self.target_channels)] if cache else None
        sums = np.zeros((2, self.in_channels))
        problems, descriptions = [], []
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # Pillow decodes outside the interpreter lock
            for i, found in enumerate(pool.map(self._describe_pair, self.pairs)):
                if isinstance(found, list):
                    problems += found
                    continue
                image, mask, self.sizes[i], self.foreground[i], description = found
                descriptions.append(description)
                digest.update(os.fsencode(self.names[i]) + image.tobytes() + mask.tobytes())
                value = image.reshape(self.in_channels, -1) / np.float32(255)
                sums += value.mean(axis=1), np.square(value).mean(axis=1)
                if cache:
                    kept[0][i], kept[1][i] = torch.from_numpy(image), torch.from_numpy(mask)
        mean, square = sums / max(len(self) - len(problems), 1)
        self.image_mean, self.image_std = mean, np.sqrt(np.maximum(square - mean ** 2, 0))
        self.fingerprint, self.usual = digest.hexdigest(), usual_ranges(descriptions)
        if cache and not problems:
            self._levels[FINEST] = tuple(kept)
        return problems

    def batch(self, resolution: int, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (N, C, R, R) and mask area fractions (N, K, R, R), both uint8 in 0..255."""
        if self.cached:
            while (coarsest := min(self._levels)) > resolution:  # made when first needed
                self._levels[coarsest // 2] = tuple(halve(level) for level in self._levels[coarsest])
            return tuple(level[torch.as_tensor(indices)] for level in self._levels[resolution])
        if not len(indices):  # the part of a process in a small batch
            return tuple(torch.empty(0, c, resolution, resolution, dtype=torch.uint8)
                         for c in (self.in_channels, self.target_channels))
        found = [self._decode_pair(self.pairs[i])[:2] for i in indices]
        levels = tuple(torch.from_numpy(np.stack(arrays)) for arrays in zip(*found, strict=True))
        while levels[0].shape[-1] > resolution:
            levels = tuple(halve(level) for level in levels)
        return levels

    def _decode_pair(self, pair: Pair):
        """Return image (C, 256, 256) and mask (K, 256, 256) uint8, original size, foreground share."""
        found = self._try_pair(pair)
        if isinstance(found, list):
            raise ImageFileError("; ".join(found))
        return found

    def _try_pair(self, pair: Pair):
        """Decode a pair as `_decode_pair` does, or return the problems with both files as a list of sentences."""
        problems, arrays = [], []
        for read in (lambda: load_image(pair.image, self.in_channels),
                     lambda: load_target(pair, self.classes, self.targets)):
            try:
                arrays.append(read())
            except ImageFileError as error:
                problems.append(str(error))
        if problems:
            return problems
        image, mask = arrays
        if image.shape[:2] != mask.shape[:2]:
            return [f"{pair.image}: {image.shape[0]}x{image.shape[1]} pixels, but its mask {pair.mask} has "
                    f"{mask.shape[0]}x{mask.shape[1]}; both must have one size. Export the mask again at the image's "
                    f"size"]
        if self.sizing == "tile" and image.shape[:2] != (FINEST, FINEST):
            return [f"{pair.image}: {image.shape[0]}x{image.shape[1]} pixels; dataset.json says that this data set is "
                    f"one of tiles, which have {FINEST}x{FINEST}. Prepare it again, or remove dataset.json to have "
                    f"every image resized"]
        image256, mask256 = (resize(a, FINEST).transpose(2, 0, 1).copy() for a in (image, mask.astype(np.uint8) * 255))
        return image256, mask256, mask.shape[:2], mask[..., :self.classes].mean(axis=(0, 1))

    def _describe_pair(self, pair: Pair):
        """Return what `_try_pair` does, with the description of the image at 256 at the end."""
        found = self._try_pair(pair)
        if isinstance(found, list):
            return found
        image, mask, *_ = found
        return *found, describe(image.transpose(1, 2, 0), mask[0] >= 128)


def open_pyramids(data_root: Path, in_channels: int = 1, out_channels: int = 1, use_augmented: bool = True,
                  cache_images: bool | None = None, wanted: tuple[str, ...] = ("train", "valid", "test"),
                  targets: tuple[str, ...] = MASK) -> dict[str, ImagePyramid]:
    """Read and check the wanted splits.

    Args:
        in_channels: 1 for luminance, 3 for RGB.
        out_channels: 1 for binary masks, K for label images 0..K.
        targets: ('mask',) or ('mask', 'boundary') (see targets.py).
        cache_images: keep what was decoded; None does so when it fits into a quarter of the free memory.
    Raises:
        DatasetError: one error that lists every problem of all these splits.
    """
    splits, problems = find_splits(data_root, use_augmented, wanted)
    sizing = sizing_of(data_root)
    pyramids = {split: ImagePyramid(pairs, in_channels, out_channels, sizing, targets)
                for split, pairs in splits.items()}
    if cache_images is None:
        needed = local_world_size() * sum(p.cache_bytes for p in pyramids.values())
        cache_images = needed < CACHE_SHARE * free_memory()
    for pyramid in pyramids.values():
        problems += pyramid.read_all(cache_images)
    if problems:
        raise DatasetError(data_root, problems)
    return pyramids


def halve(level: torch.Tensor) -> torch.Tensor:
    """Return the exact 2x2 means of (N, C, 2H, 2W) uint8 as (N, C, H, W) uint8, halves rounded up."""
    n, c, height, width = level.shape
    out = torch.empty(n, c, height // 2, width // 2, dtype=torch.uint8)
    for i in range(0, n, 64):  # in slices, so that the sums stay small
        blocks = level[i:i + 64].reshape(-1, c, height // 2, 2, width // 2, 2)
        out[i:i + 64] = (blocks.sum(dim=(3, 5), dtype=torch.int16) + 2) // 4
    return out


def free_memory() -> int:
    """Return the bytes of memory that can be had without swapping (half of all where that is not told)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, ValueError, OSError):  # Windows
            return 4 * 2 ** 30
