"""The decoded pairs of a split at all four resolutions, kept (see images/cache.py) or decoded when asked for.

The 256 pixel image is made once; each coarser one is the exact 2x2 mean of the finer one, rounded to 8 bit, image and
mask alike. That is why growth preserves the function on real data too.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from images.cache import FILES_REACH_NEW_PROCESSES, ImageCache, halve, open_caches
from images.duplicates import Appearance, appearance
from images.familiarity import describe, ranges_over
from images.files import TURNED, ImageFileError, load_and_tell, opened, orientation, resize
from images.masks import how_it_is_read
from images.pairs import Pair
from images.recipe import MASK, DataRecipe
from images.resolutions import FINEST, RESOLUTIONS
from images.splits import DatasetError, description_of, find_data_root, find_splits
from images.targets import instance_file, load_target, odd_instances
from system.machine import cpu_count
from system.processes import progress

AHEAD = 4 * cpu_count()  # pairs that are decoded before they are counted


class ImagePyramid:
    """All images and masks of one split, as uint8, with what was counted while they were read.

    Args:
        pairs: the files, in the order of the indices.
        recipe: what is to be read: sizing, targets, channels and classes; its statistics come from the images.

    Attributes:
        names: of the pairs.
        recipe: the same with mean, standard deviation and ranges of all images at 256, once they were read.
        fingerprint: hash of all names and pixels at 256, in hexadecimal.
        facts: what was counted in each pair, in the order of the indices.
    """

    def __init__(self, pairs: list[Pair], recipe: DataRecipe):
        self.pairs, self.names, self.recipe = pairs, [pair.name for pair in pairs], recipe
        self.facts: list[PairFacts] = []
        self._cache: ImageCache | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getstate__(self) -> dict:
        drop = self._cache and self._cache.folder and not FILES_REACH_NEW_PROCESSES
        return self.__dict__ | {"_cache": None} if drop else self.__dict__  # decoded, the images are the same

    @property
    def channels(self) -> tuple[int, int]:
        """Return the channels of image and mask."""
        return self.recipe.in_channels, self.recipe.target_channels

    @property
    def foreground(self) -> np.ndarray:
        """Return (N, classes) the share of each mask's original pixels that belong to the class."""
        return np.array([facts.foreground for facts in self.facts]).reshape(len(self.facts), self.recipe.classes)

    @property
    def cached(self) -> bool:
        """Tell whether the decoded images are kept, in memory or in files."""
        return self._cache is not None

    @property
    def kept(self) -> str:
        """Say where the decoded images are."""
        if self._cache is None:
            return "decoded at every step"
        return f"in memory-mapped files in {self._cache.folder}" if self._cache.folder else "in memory"

    def subset(self, indices: Iterable[int]) -> "ImagePyramid":
        """Return these images alone, decoded anew and kept in memory; statistics are theirs, and problems not told."""
        chosen = ImagePyramid([self.pairs[i] for i in indices], self.recipe)
        chosen.read_all(ImageCache(len(chosen), chosen.channels))
        return chosen

    def read_all(self, cache: ImageCache | None = None) -> list[str]:
        """Decode every file once, check it, count, and keep it if there is a cache; return the problems found."""
        self.facts.clear()
        digest = hashlib.blake2b(digest_size=16)
        channels = self.recipe.in_channels
        sums = np.zeros((2, channels))
        problems = []
        with ThreadPoolExecutor(max_workers=cpu_count()) as pool:  # Pillow decodes outside the interpreter lock
            described = _in_order(pool, self._describe_pair, self.pairs)
            for i, found in enumerate(progress(described, "reading images", len(self.pairs))):
                if isinstance(found, list):
                    problems += found
                    continue
                image, mask, facts = found
                self.facts.append(facts)
                digest.update(os.fsencode(self.names[i]) + image.tobytes() + mask.tobytes())
                value = image.reshape(channels, -1) / np.float32(255)
                sums += value.mean(axis=1), np.square(value).mean(axis=1)
                if cache:
                    cache.write(i, image, mask)
        mean, square = sums / max(len(self) - len(problems), 1)
        std = np.sqrt(np.maximum(square - mean ** 2, 0))
        std[std == 0] = 1.0  # images of one shade
        self.recipe = replace(self.recipe, mean=tuple(mean.tolist()), std=tuple(std.tolist()),
                              training_ranges=ranges_over([facts.description for facts in self.facts]))
        self.fingerprint = digest.hexdigest()
        if not problems:
            self._cache = cache
        return problems

    def batch(self, resolution: int, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (N, C, R, R) and mask area fractions (N, K, R, R), both uint8 in 0..255."""
        if self._cache is not None:
            return self._cache.read(resolution, indices)
        if not len(indices):  # the part of a process in a small batch
            return tuple(torch.empty(0, c, resolution, resolution, dtype=torch.uint8) for c in self.channels)
        found = [self._decode_again(i) for i in indices]
        levels = tuple(torch.from_numpy(np.stack(arrays)) for arrays in zip(*found, strict=True))
        while levels[0].shape[-1] > resolution:
            levels = tuple(halve(level) for level in levels)
        return levels

    def _decode_again(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image (C, 256, 256) and mask (K, 256, 256) uint8 of a pair that was read before.

        Raises ImageFileError for a file that has become another one since.
        """
        pair = self.pairs[index]
        if index < len(self.facts) and stamp(pair) != self.facts[index].stamp:
            raise ImageFileError(f"{pair.image}: it or its mask {pair.mask} was changed after the data set had been "
                                 f"read, so this run would train on two data sets. Start it again")
        found = self._try_pair(pair)
        if isinstance(found, list):
            raise ImageFileError("; ".join(found))
        return found[:2]

    def _try_pair(self, pair: Pair):
        """Return image (C, 256, 256) and mask (K, 256, 256) uint8, the original mask (H, W, K) bool, and words on the
        image; or the problems with both files as a list of sentences."""
        problems, arrays = [], []
        for read in (lambda: read_image(pair, self.recipe),
                     lambda: load_target(pair, self.recipe.classes, self.recipe.targets)):
            try:
                arrays.append(read())
            except ImageFileError as error:
                problems.append(str(error))
        if problems:
            return problems
        (image, words), mask = arrays
        if image.shape[:2] != mask.shape[:2]:
            remedy = "Is one of them turned by EXIF? Then save both upright" if image.shape[:2] == mask.shape[1::-1] \
                else "Export the mask again at the image's size"
            return [f"{pair.image}: {image.shape[0]}x{image.shape[1]} pixels, but its mask {pair.mask} has "
                    f"{mask.shape[0]}x{mask.shape[1]}; both must have one size. {remedy}"]
        if self.recipe.sizing == "tile" and image.shape[:2] != (FINEST, FINEST):
            return [f"{pair.image}: {image.shape[0]}x{image.shape[1]} pixels; dataset.json says that this data set is "
                    f"one of tiles, which have {FINEST}x{FINEST}. Prepare it again, or remove dataset.json to have "
                    f"every image resized"]
        image256, mask256 = (resize(a, FINEST).transpose(2, 0, 1).copy() for a in (image, mask.astype(np.uint8) * 255))
        return image256, mask256, mask[..., :self.recipe.classes], words

    def _describe_pair(self, pair: Pair):
        """Return image and mask at 256 pixels, and the facts; or the problems."""
        found = self._try_pair(pair)
        if isinstance(found, list):
            return found
        image, mask, whole, words_on_image = found
        inside, grey = mask[0] >= 128, image.mean(axis=0)
        some = 0 < inside.sum() < inside.size
        words_on_mask = how_it_is_read(pair.mask) if self.recipe.classes == 1 else ""
        size = whole.shape[:2]
        return image, mask, PairFacts(
            description=describe(image.transpose(1, 2, 0), inside, size if self.recipe.sizing == "resize" else None),
            size=size, foreground=whole.mean(axis=(0, 1)), lost=_lost(mask[:self.recipe.classes]),
            appearance=appearance(image), darker=some and grey[inside].mean() < grey[~inside].mean(),
            areas=np.bincount(ndimage.label(inside, np.ones((3, 3)))[0].ravel())[1:], stamp=stamp(pair),
            readings=[(f"{kind} {words}", path) for kind, words, path in (
                ("mask(s)", words_on_mask, pair.mask), ("image(s)", words_on_image, pair.image),
                ("instance map(s)", odd_instances(pair, whole[..., 0]), instance_file(pair))) if words])


class PairFacts(NamedTuple):
    """What is counted in a pair while it is read.

    Attributes:
        description: of the image, see images/familiarity.py.
        size: height and width in the files.
        foreground: (classes,) share of the mask's original pixels that belong to the class.
        lost: whether the mask shows something at 256 pixels and nothing of it at 32, 64, 128.
        appearance: what the image looks like, see images/duplicates.py.
        darker: whether the image is darker in the mask of the first class than beside it.
        areas: pixels at 256 of the connected parts of that mask.
        stamp: of both files, as `stamp` returns it.
        readings: what is not read as one may expect, in words, with its file.
    """

    description: dict
    size: tuple[int, int]
    foreground: np.ndarray
    lost: list[bool]
    appearance: Appearance
    darker: bool
    areas: np.ndarray
    stamp: tuple
    readings: list[tuple[str, Path]]


def stamp(pair: Pair) -> tuple:
    """Return what changes when the image or the mask of a pair is replaced: sizes and times of both files."""
    return tuple((found.st_size, found.st_mtime_ns) for found in (pair.image.stat(), pair.mask.stat()))


def read_image(pair: Pair, recipe: DataRecipe) -> tuple[np.ndarray, str]:
    """Read an image as `images.files.load_image` does, and say what a user may not expect of that, '' for nothing."""
    image, turned, words = load_and_tell(pair.image, recipe.in_channels, max_value=recipe.max_value)
    if turned:
        with opened(pair.mask) as mask:
            if orientation(mask) == 1:
                words = (f"{TURNED}, whose masks are not turned; where a mask was drawn on the picture as it is "
                         f"stored, it does not fit")
    return image, words


def _lost(mask: np.ndarray) -> list[bool]:
    """Tell at which coarser resolutions, 32 first, nothing of a mask (K, 256, 256) uint8 covers half of a pixel."""
    level, shown = torch.from_numpy(mask)[None], []
    for _ in RESOLUTIONS:
        shown.append(bool((level >= 128).any()))
        level = halve(level)
    return [shown[0] and not there for there in reversed(shown[1:])]


def open_pyramids(data_root: Path, in_channels: int = 1, out_channels: int = 1, use_augmented: bool = True,
                  cache_images: bool | None = None, wanted: tuple[str, ...] = ("train", "valid", "test"),
                  targets: tuple[str, ...] = MASK, max_value: int = 0,
                  mask_suffix: str = "") -> dict[str, ImagePyramid]:
    """Read and check the wanted splits.

    Args:
        in_channels: 1 for luminance, 3 for RGB.
        out_channels: 1 for binary masks, K for label images 0..K.
        targets: ('mask',) or ('mask', 'boundary') (see targets.py).
        cache_images: keep what was decoded, in memory if that takes less than a quarter of what is free, else in
            memory-mapped files; None does the same, but decodes at every step where there is no space for them.
        max_value: what is white in images of more than 8 bit (see images/recipe.py); 0 for what dataset.json says.
        mask_suffix: what the names of masks have behind those of their images, e.g. '_mask'.
    Raises:
        DatasetError: one error that lists every problem of all these splits.
        UserError: if cache_images is True and there is no space.
    """
    data_root = find_data_root(data_root)
    splits, problems = find_splits(data_root, use_augmented, wanted, mask_suffix)
    sizing, microns, names, white = description_of(data_root)
    recipe = DataRecipe(sizing, targets, in_channels, out_channels, max_value=max_value or white,
                        microns_per_pixel=microns, class_names=names if len(names) == out_channels else ())
    pyramids = {split: ImagePyramid(pairs, recipe) for split, pairs in splits.items()}
    # With problems nothing is kept, so that they are reported, whether there is space or not.
    caches = open_caches([(len(p), p.channels) for p in pyramids.values()],
                         False if problems else cache_images)
    for pyramid, cache in zip(pyramids.values(), caches, strict=True):
        problems += pyramid.read_all(cache)
    if problems:
        raise DatasetError(data_root, problems)
    return pyramids


def _in_order(pool: ThreadPoolExecutor, function: Callable, items: list) -> Iterator:
    """Yield function(item) in the order of the items, with few results waiting: all at once could fill the memory."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
