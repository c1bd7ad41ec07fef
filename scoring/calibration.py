"""Whether probabilities mean what they say, and what another threshold would give."""

from collections.abc import Iterable

import numpy as np
import torch

from scoring.measures import pixel_metrics

BINS = 20  # of equal width in [0, 1]
THRESHOLDS = tuple(i / 20 for i in range(1, 20))
OF_THRESHOLDS = ("dice", "precision", "recall")


def reliability_counts(probability: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Count pixels by their probability.

    Args:
        probability: floating point in [0, 1], of any shape.
        mask: bool of that shape.
    Returns:
        (3, BINS) float64: pixels of each bin, the sum of their probabilities, and how many are foreground. Counts of
        several images may be added.

    >>> counts = reliability_counts(np.array([0.0, 0.01, 0.97, 1.0]), np.array([False, True, True, True]))
    >>> counts[:, [0, -1]].tolist()
    [[2.0, 2.0], [0.01, 1.97], [1.0, 2.0]]
    """
    values = probability.ravel().astype(np.float64)
    bins = np.minimum((values * BINS).astype(int), BINS - 1)
    return np.stack([np.bincount(bins, weights, BINS) for weights in (None, values, mask.ravel().astype(float))])


def expected_calibration_error(counts: np.ndarray) -> float:
    """Return the expected calibration error (Naeini et al. 2015, AAAI) of `reliability_counts`, in [0, 1].

    It is the mean over pixels of the distance between the probability and the share of foreground in its bin.

    >>> round(expected_calibration_error(np.array([[2.0, 2.0], [0.2, 1.8], [0.0, 1.0]])), 3)
    0.25
    """
    pixels, probabilities, foreground = counts
    return float(np.abs(probabilities - foreground).sum() / max(pixels.sum(), 1))


def threshold_scores(probability: torch.Tensor, mask: torch.Tensor,
                     thresholds: Iterable[float] = THRESHOLDS) -> dict[str, np.ndarray]:
    """Score a prediction at several thresholds.

    Args:
        probability: (N, C, H, W) in [0, 1].
        mask: (N, C, H, W) bool.
    Returns:
        OF_THRESHOLDS -> (T,) means over images, then over classes (see `scoring.measures.pixel_metrics`).
    """
    scores = [pixel_metrics(probability >= threshold, mask) for threshold in thresholds]
    return {name: np.array([float(of_one[name].mean()) for of_one in scores]) for name in OF_THRESHOLDS}
