"""Images with what was drawn and what was predicted, chosen to be looked at, in small files.

A file is an .npz of JPEG and PNG pictures (`image_0`, `masks_0`, `probability_0`, ...) beside the tables that whoever
wrote it adds. Large images are kept as the part in which most is drawn, so that two runs keep the same part.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from nuclei.outlines import boundary
from scoring.measures import pixel_metrics
from system.atomic import atomic_write

LARGEST = 384  # pixels of a side, above which a part is kept
QUALITY = 88   # of JPEG
SPREAD, EXTREME = 24, 4  # images of a test that are kept: at equal distances; worst ones, and as many best ones


@dataclass
class Case:
    """One image.

    Args:
        name: as tables have it.
        image: (H, W, C) uint8, C 1 or 3.
        masks: (K, H, W) bool, drawn.
        probability: (K, H, W) uint8, 255 for 1.
        dice: of the whole image, the mean of its classes.
    """

    name: str
    image: np.ndarray
    masks: np.ndarray
    probability: np.ndarray
    dice: float

    def found(self, threshold: float) -> np.ndarray:
        """Return the predicted masks (K, H, W) bool."""
        return self.probability >= round(threshold * 255)  # to within 1/510 of the threshold, see `to_bytes`

    def dice_of(self, channel: int, threshold: float) -> float:
        """Return Dice of one class: of the whole image where there is one class, else of the pixels that are here."""
        if len(self.masks) == 1:
            return self.dice
        found, drawn = (torch.from_numpy(masks[None, [channel]]) for masks in (self.found(threshold), self.masks))
        return float(pixel_metrics(found, drawn)["dice"])

    def part(self) -> "Case":
        """Return the part of at most LARGEST x LARGEST pixels with most outlines drawn; small images as they are."""
        height, width = self.masks.shape[1:]
        side = min(height, LARGEST), min(width, LARGEST)
        if side == (height, width):
            return self
        outlines = boundary(self.masks[0]).astype(np.float32)
        density = ndimage.uniform_filter(outlines, side, mode="constant")
        inside = density[side[0] // 2:height - (side[0] - 1) // 2, side[1] // 2:width - (side[1] - 1) // 2]
        top, left = np.unravel_index(inside.argmax(), inside.shape)
        rows, columns = slice(top, top + side[0]), slice(left, left + side[1])
        return Case(self.name, self.image[rows, columns], self.masks[:, rows, columns],
                    self.probability[:, rows, columns], self.dice)


def to_bytes(probability: np.ndarray) -> np.ndarray:
    """Return probabilities in [0, 1] as uint8, 255 for 1."""
    return (probability * 255).round().astype(np.uint8)


def extremes(scores: Sequence[float], groups: Sequence[str], count: int) -> list[int]:
    """Return the indices of the worst, the middle and the best scores, a third each, in the order of the scores.

    Of several of one group, such as a patient, the most extreme is taken as long as there are other groups.

    >>> extremes([0.1, 0.2, 0.5, 0.6, 0.9, 0.8], ["a", "a", "b", "c", "d", "d"], 3)
    [0, 2, 4]
    """
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    place = {i: n for n, i in enumerate(order)}
    middle = sorted(order, key=lambda i: abs(2 * place[i] - len(order) + 1))
    chosen: list[int] = []
    for candidates, number in ((order, count // 3), (order[::-1], count // 3), (middle, count - 2 * (count // 3))):
        chosen += _of_other_groups([i for i in candidates if i not in chosen], groups, number,
                                   {groups[i] for i in chosen})
    return sorted(chosen, key=place.__getitem__)


def spread(groups: Sequence[str], count: int) -> list[int]:
    """Return `count` indices at equal distances, of different groups as long as there are any.

    >>> spread(["a", "a", "b", "c", "d", "e"], 3), spread(["a", "a", "b", "b"], 3)
    ([0, 3, 5], [0, 1, 2])
    """
    first = {group: i for i, group in reversed(list(enumerate(groups)))}
    ones = sorted(first.values())
    if len(ones) < count:
        return sorted(_of_other_groups(list(range(len(groups))), groups, count, set()))
    return [ones[int(i)] for i in np.linspace(0, len(ones) - 1, count).round()]


def _of_other_groups(candidates: list[int], groups: Sequence[str], number: int, taken: set[str]) -> list[int]:
    """Return the first candidates of groups that are not taken yet and, where these are too few, the first others."""
    new, seen = [], set(taken)
    for i in candidates:
        if groups[i] not in seen:
            new.append(i)
            seen.add(groups[i])
    return (new + [i for i in candidates if i not in new])[:number]


class KeptCases:
    """Keep, of many images that come one by one, some at equal distances, the worst and the best.

    Args:
        count: how many will come.
    """

    def __init__(self, count: int):
        self._fixed = set(np.linspace(0, count - 1, min(count, SPREAD)).round().astype(int).tolist())
        self._kept: dict[int, Case] = {}

    def add(self, case: Case, index: int) -> None:
        """Add the image of this index."""
        self._kept[index] = case.part()
        order = sorted(self._kept, key=lambda i: self._kept[i].dice)
        kept = {*order[:EXTREME], *order[-EXTREME:]} | self._fixed
        self._kept = {i: case for i, case in self._kept.items() if i in kept}

    @property
    def cases(self) -> list[Case]:
        """Return what was kept, in the order of the indices."""
        return [self._kept[i] for i in sorted(self._kept)]


def save_cases(path: Path, cases: list[Case], **tables: np.ndarray) -> None:
    """Write cases, and arrays by name; the file is whole or not there."""
    arrays = {"names": np.array([case.name for case in cases], dtype=str),
              "dice": np.array([case.dice for case in cases])}
    for i, case in enumerate(cases):
        arrays[f"image_{i}"] = _packed(case.image, "JPEG")
        arrays[f"masks_{i}"] = _packed(_stacked(case.masks).astype(np.uint8) * 255, "PNG")
        arrays[f"probability_{i}"] = _packed(_stacked(case.probability), "PNG")
    with atomic_write(path, sync=False) as file:
        np.savez_compressed(file, **arrays, **tables)


def load_cases(path: Path) -> tuple[list[Case], dict[str, np.ndarray]]:
    """Return the cases and the tables of a file.

    Raises ValueError for a file that is missing, none, or cut off.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
        cases = []
        for i, (name, dice) in enumerate(zip(stored.pop("names").tolist(), stored.pop("dice").tolist(), strict=True)):
            image, masks, probability = (_unpacked(stored.pop(f"{kind}_{i}"))
                                         for kind in ("image", "masks", "probability"))
            height = image.shape[0]
            image = image if image.ndim == 3 else image[..., None]
            masks, probability = (a.reshape(-1, height, a.shape[1]) for a in (masks >= 128, probability))
            cases.append(Case(name, image, masks, probability, dice))
        return cases, stored
    except Exception as error:  # zipfile, zlib, Pillow and NumPy have errors of their own for what is no such file
        raise ValueError(f"{path}: not a file of images and predictions ({type(error).__name__}: {error})") from None


def _stacked(channels: np.ndarray) -> np.ndarray:
    return channels.reshape(-1, channels.shape[-1])  # (K, H, W) as one picture, one below the other


def _packed(pixels: np.ndarray, kind: str) -> np.ndarray:
    buffer = io.BytesIO()
    options = {"quality": QUALITY} if kind == "JPEG" else {"optimize": False}
    Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels).save(buffer, kind,
                                                                                                 **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _unpacked(stored: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(stored.tobytes())))
