"""Which images of two splits show the same picture, by their pixels: equal, turned or flipped, or nearly so."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from system.processes import progress

SIDE = 16           # pixels of a thumbnail
NEAR = 0.99        # correlation of two thumbnails from which on they count as one picture (docs/experiments.md)
BLOCK, ROWS = 64, 2048  # images of both sides that are compared at once, within the processor's memory
PLAIN = 2.0         # standard deviation of a thumbnail in grey levels, up to which it shows nothing


@dataclass(frozen=True)
class Appearance:
    """What an image looks like.

    Attributes:
        digest: the same for an image and all its quarter turns and flips, and for no other; b"" for a plain one.
        thumbnail: (SIDE, SIDE) float32, of mean 0 and length 1; zeros for a plain one.
    """

    digest: bytes
    thumbnail: np.ndarray


def appearance(image: np.ndarray) -> Appearance:
    """Describe an image (C, S, S) uint8 whose side is a multiple of SIDE."""
    channels, side, _ = image.shape
    step = side // SIDE
    sums = image.astype(np.int64).reshape(channels, SIDE, step, SIDE, step).sum(axis=(0, 2, 4))
    small = sums / (channels * step ** 2)
    if small.std() <= PLAIN:
        return Appearance(b"", np.zeros((SIDE, SIDE), np.float32))
    centred = small - small.mean()
    # One view stands for all eight: that of the smallest thumbnail in whole numbers, which rounding does not move.
    keys = [view.tobytes() for view in _views(sums)]
    digest = min(hashlib.blake2b(np.ascontiguousarray(view), digest_size=12).digest()
                 for view, key in zip(_views(image), keys, strict=True) if key == min(keys))
    return Appearance(digest, (centred / np.linalg.norm(centred)).astype(np.float32))


def shared(train: Sequence[Appearance], others: Sequence[Appearance]) -> tuple[dict[int, int], dict[int, int]]:
    """Return which of `others` is in train: index -> an index in train.

    Returns:
        Those that are equal, turned and flipped included, and those that are nearly so and not equal.
    """
    first: dict[bytes, int] = {}
    for i, one in enumerate(train):
        first.setdefault(one.digest, i)
    equal = {j: first[other.digest] for j, other in enumerate(others) if other.digest and other.digest in first}
    near = {}
    if len(train) and len(others):
        likeness, nearest = most_alike(train, others)
        near = {j: int(nearest[j]) for j in np.flatnonzero(likeness >= NEAR).tolist() if j not in equal}
    return equal, near


def most_alike(train: Sequence[Appearance], others: Sequence[Appearance]) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) the highest correlation of each of `others` with one in train, and (N,) the index of that one.

    Computed in blocks, as matrix products: of every pair alone 100 000 images took a quarter of an hour.
    """
    of_train = np.stack([one.thumbnail.ravel() for one in train])
    highest, nearest = np.full(len(others), -np.inf, np.float32), np.zeros(len(others), np.int64)
    for start in progress(range(0, len(others), BLOCK), "comparing pictures"):
        thumbnails = np.stack([other.thumbnail for other in others[start:start + BLOCK]])
        # All first views, then all second ones: the highest of eight is then taken over whole rows of numbers.
        views = np.concatenate(_views(thumbnails)).reshape(-1, SIDE * SIDE).T
        found, index = highest[start:start + BLOCK], nearest[start:start + BLOCK]
        for first in range(0, len(of_train), ROWS):
            alike = (of_train[first:first + ROWS] @ views).reshape(-1, 8, len(found)).max(axis=1)
            best = alike.argmax(axis=0)
            value = alike[best, np.arange(len(found))]
            better = value > found  # of equal ones the first stays
            found[better], index[better] = value[better], first + best[better]
    return highest, nearest


def _views(image: np.ndarray) -> list[np.ndarray]:
    """Return an image (..., S, S) in its four quarter turns, and these flipped."""
    turned = [np.rot90(image, k, (-2, -1)) for k in range(4)]
    return turned + [view[..., ::-1] for view in turned]
