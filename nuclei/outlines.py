"""The outlines of nuclei, as pixels and drawn onto their image."""

import numpy as np

OUTLINE = (20, 230, 60)  # seen on grey smears and on pink and blue stains alike


def boundary(labels: np.ndarray) -> np.ndarray:
    """Return the pixels (H, W) bool of nuclei that have a neighbour of another label above, below, left or right.

    What lies outside the image is background, so a mask without a boundary is an empty mask.
    """
    # find_boundaries(..., connectivity=1, mode="inner") of scikit-image marks the same pixels of the padded map, in 2
    # to 13 times the time.
    framed = np.pad(labels, 1)
    inner = framed[1:-1, 1:-1]
    neighbours = (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:])
    return (inner != 0) & np.logical_or.reduce([inner != neighbour for neighbour in neighbours])


def overlay(image: np.ndarray, nuclei: np.ndarray) -> np.ndarray:
    """Draw the outlines of a label map (H, W) onto an image (H, W, 3) uint8 and return the copy."""
    drawn = image.copy()
    drawn[boundary(nuclei)] = OUTLINE
    return drawn
