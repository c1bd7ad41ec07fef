"""Figures of one image, to look at from Python: what a data set holds and what a network finds."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from nuclei.outlines import OUTLINE, boundary
from scoring.pictures import DRAWN, FOUND, outline
from system.figures import ShownFigure
from system.text import shown

LONGEST = 1024    # pixels of the longer side that a figure shows; what is larger is reduced
PANEL = 3.4       # inches
COLUMNS = 4       # panels beside each other
THIN = 400        # pixels of an image whose outlines are one pixel wide; those of larger ones are wider
COLOURS = (DRAWN, FOUND, "limegreen", "violet", "gold")  # of the classes


def sample_figure(image: np.ndarray, mask: np.ndarray, name: str, channels: Sequence[str]) -> ShownFigure:
    """Draw an image, with the outlines of its mask, and each channel of the mask.

    Args:
        image: (C, H, W) in [0, 1], grey or RGB.
        mask: (K, H, W) in [0, 1].
        channels: K words, what the channels are.
    """
    shares = [f"{channel}: {(plane >= 0.5).mean():.1%}" for channel, plane in zip(channels, mask, strict=True)]
    figure, axes = panels(name, image.shape[-2:], ["image", "outlines", *shares])
    for axis in axes[:2]:
        picture(axis, image)
    for number, plane in enumerate(mask):
        axes[2 + number].imshow(plane, cmap="gray", vmin=0, vmax=1)
        if channels[number] != "boundary":  # which follows the outlines of the others
            outline(axes[1], plane >= 0.5, COLOURS[number % len(COLOURS)], "solid")
            axes[2 + number].title.set_backgroundcolor(COLOURS[number % len(COLOURS)])
    return figure


def prediction_figure(image: np.ndarray, probability: np.ndarray, nuclei: np.ndarray, name: str,
                      channels: Sequence[str]) -> ShownFigure:
    """Draw an image, with the outlines of its nuclei, and each channel of the probabilities.

    Args:
        image: (H, W, C) uint8, grey or RGB.
        probability: (H, W, K) float32 in [0, 1].
        nuclei: (H, W) int32, 0 for background.
        channels: K words, what the channels are.
    """
    count, (step_y, step_x) = int(nuclei.max()), steps(nuclei.shape)
    small, planes = (reduced(pixels) for pixels in (image, np.round(probability * 255).astype(np.uint8)))
    edges = boundary(nuclei[step_y // 2::step_y, step_x // 2::step_x][:len(small), :small.shape[1]])
    figure, axes = panels(name, image.shape[:2], [
        "image", f"{count} nucle{'us' if count == 1 else 'i'}", *(f"probability: {channel}" for channel in channels)])
    outlined = np.broadcast_to(small, (*small.shape[:2], 3)).copy()
    outlined[ndimage.maximum_filter(edges, max(1, round(max(edges.shape) / THIN)))] = OUTLINE
    for axis, pixels in zip(axes[:2], (small, outlined), strict=True):
        picture(axis, pixels.transpose(2, 0, 1) / 255)
    for axis, plane in zip(axes[2:], np.moveaxis(planes, -1, 0), strict=False):
        axis.imshow(plane, cmap="gray", vmin=0, vmax=255)
    return figure


def panels(name: str, shape: Sequence[int], titles: Sequence[str]) -> tuple[ShownFigure, list]:
    """Return a figure of panels without ticks, each with its title, for an image of a name and of (H, W) pixels."""
    height, width = shape
    columns = min(len(titles), COLUMNS)
    rows = -(-len(titles) // columns)
    tall = PANEL * min(max(height / width, 0.3), 2.0)
    figure = ShownFigure(figsize=(PANEL * columns, (tall + 0.35) * rows + 0.3), layout="constrained")
    figure.suptitle(f"{shown(name)}, {height}x{width}", fontsize=10, parse_math=False)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, words in zip(axes, titles, strict=False):
        axis.set_title(words, fontsize=9)
    return figure, axes


def picture(axis, image: np.ndarray) -> None:
    """Show an image (C, H, W) in [0, 1], grey or RGB."""
    axis.imshow(image.transpose(1, 2, 0) if len(image) == 3 else image[0], cmap="gray", vmin=0, vmax=1)


def reduced(pixels: np.ndarray) -> np.ndarray:
    """Return (H, W, C) uint8 with no more than LONGEST pixels along its longer side: means of squares of pixels."""
    step_y, step_x = steps(pixels.shape[:2])
    height, width = pixels.shape[0] // step_y, pixels.shape[1] // step_x
    cut = pixels[:height * step_y, :width * step_x]
    return cut.reshape(height, step_y, width, step_x, -1).mean(axis=(1, 3)).astype(np.uint8)


def steps(shape: Sequence[int]) -> tuple[int, int]:
    """Return how many rows and columns of an image of (H, W) pixels become one, so that LONGEST are left at most."""
    step = -(-max(shape) // LONGEST)
    return min(step, shape[0]), min(step, shape[1])
