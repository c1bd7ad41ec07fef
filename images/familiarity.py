"""Tell whether an image looks like those that a network was trained on: brightness, contrast, colour, size of nuclei.

A network answers for any image, and badly for one of another stain, exposure or magnification. So the range of a few
plain numbers over the training images goes into the checkpoint, and an image far outside of it is named.
"""

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

COLOURS = ("red", "green", "blue")
PERCENTILES = (1, 99)  # of the training images, between which their range lies
SMALLEST = 10          # pixels; smaller specks of a mask are no nuclei

# How far beyond the range of training a number must lie to be named, as a share of the width of that range, and at
# least so much: levels on the scale [0, 1], areas and sides in powers of two. With the nuclei as they are drawn, at
# most 3 % of Pap smear cells and MoNuSeg images are named against training images of their own kind.
MARGIN = 0.25
LEAST_MARGIN = {"level": 0.05, "area": 1.0, "side": 0.5}


def describe(image: np.ndarray, mask: np.ndarray, size: tuple[int, int] | None = None) -> dict[str, float]:
    """Describe an image by the numbers that are compared.

    Args:
        image: (H, W, C) uint8, grey or RGB, at the scale that the network sees.
        mask: (H, W) bool, the nuclei drawn or predicted on it.
        size: height and width before the image was brought to that scale, if it was.
    Returns:
        name -> value: brightness (mean) and contrast (standard deviation) on the scale [0, 1], of each colour if there
        are three; red and blue against green; the median area in pixels of the connected parts of the mask, which is
        missing where there are none; and, with a size, the side of the square of as many pixels.
    """
    side = {"side": float(np.sqrt(size[0] * size[1]))} if size else {}
    return side | describe_parts(image.reshape(-1, image.shape[2]), part_areas(mask))


def part_areas(mask: np.ndarray) -> np.ndarray:
    """Return the areas in pixels of the connected parts of a mask (H, W) bool, specks left out."""
    areas = np.bincount(ndimage.label(mask)[0].ravel())[1:]
    return areas[areas >= SMALLEST]


def describe_parts(pixels: np.ndarray, areas: np.ndarray) -> dict[str, float]:
    """Describe an image by its pixels (N, C) uint8, or a sample of them, and the areas of its parts; see `describe`."""
    values = pixels / np.float32(255)
    names = [f" of {colour}" for colour in COLOURS] if pixels.shape[1] == 3 else [""]
    means, spreads = values.mean(axis=0), values.std(axis=0)
    found = {f"brightness{name}": float(mean) for name, mean in zip(names, means, strict=True)}
    found |= {f"contrast{name}": float(spread) for name, spread in zip(names, spreads, strict=True)}
    if pixels.shape[1] == 3:
        found |= {"red minus green": float(means[0] - means[1]), "blue minus green": float(means[2] - means[1])}
    return found | ({"area of nuclei": float(np.median(areas))} if len(areas) else {})


def ranges_over(descriptions: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return name -> (low, high) over the descriptions of the training images."""
    names = dict.fromkeys(name for description in descriptions for name in description)
    return {name: tuple(np.percentile([d[name] for d in descriptions if name in d], PERCENTILES).tolist())
            for name in names}


def strangest(description: dict[str, float], ranges: Mapping[str, tuple[float, float]]) -> str | None:
    """Say by which number an image lies farthest outside the ranges of training; None if it lies in or near them.

    A side comes first: of an image that is resized from another one all nuclei have another size.

    >>> strangest({"brightness": 0.1}, {"brightness": (0.5, 0.6)})
    'brightness 0.10, in training 0.50 to 0.60'
    """
    excess = {}
    for name in description.keys() & ranges.keys():
        kind = name.split()[0] if name.split()[0] in LEAST_MARGIN else "level"
        low, value, high = (v if kind == "level" else np.log2(v)
                            for v in (ranges[name][0], description[name], ranges[name][1]))
        margin = max(MARGIN * (high - low), LEAST_MARGIN[kind])
        excess[name] = max(low - value, value - high) / margin
    name = "side" if excess.get("side", 0) > 1 else max(sorted(excess), key=excess.get, default=None)
    if name is None or excess[name] <= 1:
        return None
    digits = 0 if name.split()[0] in LEAST_MARGIN else 2
    low, value, high = (f"{v:.{digits}f}" for v in (ranges[name][0], description[name], ranges[name][1]))
    training = f"in training {low}" + (f" to {high}" if high != low else "")
    if name != "side":
        return f"{name} {value}, {training}"
    remedy = "Cut it into parts of that size" if description[name] > ranges[name][1] else "Pad it to that size"
    return f"{value} pixels a side, {training}, so all that it shows is resized to another scale. {remedy}, or train " \
        f"on tiles"
