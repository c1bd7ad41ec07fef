"""Measure nuclei: area, centroid, eccentricity and mean probability, from one label map or from bands of it."""

from collections.abc import Iterator

import numpy as np

COLUMNS = ("image", "label", "centroid_row", "centroid_column", "area", "eccentricity", "mean_probability")
MICROMETRE_COLUMNS = ("centroid_row_um", "centroid_column_um", "area_um2")

ROWS = 128  # that are added at once: the coordinates of all foreground pixels take memory


class NucleusSums:
    """Add up what the measures of nuclei need; the result does not depend on how the image was divided.

    Sums of coordinates are whole numbers of 64 bit, so that they are exact.
    """

    def __init__(self):
        self._moments = np.zeros((6, 1), np.int64)  # pixels, rows, columns, rows^2, rows*columns, columns^2
        self._probability = np.zeros(1)

    def add(self, labels: np.ndarray, probability: np.ndarray, top: int = 0) -> None:
        """Add a band.

        Args:
            labels: (rows, W) whole numbers of at least 0, 0 for background.
            probability: (rows, W) floating point.
            top: the image's row in which the band begins.
        """
        for start in range(0, len(labels), ROWS):
            self._add(labels[start:start + ROWS], probability[start:start + ROWS], top + start)

    def _add(self, labels: np.ndarray, probability: np.ndarray, top: int) -> None:
        rows, columns = np.nonzero(labels)
        if not len(rows):
            return
        index = labels[rows, columns].astype(np.int64)
        low = index.min()
        index -= low
        terms = (None, rows, columns, rows * rows, rows * columns, columns * columns)
        n, r, c, rr, rc, cc = np.array([np.bincount(index, term) for term in terms]).astype(np.int64)
        sums = np.stack([n, r + top * n, c, rr + 2 * top * r + top * top * n, rc + top * c, cc])
        beyond = low + sums.shape[1] - self._moments.shape[1]
        if beyond > 0:
            self._moments = np.pad(self._moments, ((0, 0), (0, beyond)))
            self._probability = np.pad(self._probability, (0, beyond))
        self._moments[:, low:low + sums.shape[1]] += sums
        self._probability[low:low + sums.shape[1]] += np.bincount(index, probability[rows, columns])

    def joined(self, final: np.ndarray) -> "NucleusSums":
        """Return the sums of the nuclei that provisional labels p belong to: final[p], 0 for none."""
        result = NucleusSums()
        final = final[:self._moments.shape[1]].astype(np.int64)
        result._moments = np.zeros((6, final.max() + 1), np.int64)
        for joined, provisional in zip(result._moments, self._moments, strict=True):
            np.add.at(joined, final, provisional)
        result._probability = np.bincount(final, self._probability)
        return result

    def measures(self) -> dict[str, np.ndarray]:
        """Return label, centroid_row, centroid_column, area, eccentricity, mean_probability, one entry a nucleus.

        Centroids are in pixels from the centre of the top left one, areas in pixels. The eccentricity is that of the
        ellipse with the same second moments, as in scikit-image.
        """
        labels = np.flatnonzero(self._moments[0])
        labels = labels[labels > 0]
        n, r, c, rr, rc, cc = self._moments[:, labels]
        # The moments are taken about the whole pixel before the centroid, while everything is exact.
        y, x = r // np.maximum(n, 1), c // np.maximum(n, 1)
        rr, rc, cc = rr - 2 * y * r + y * y * n, rc - y * c - x * r + x * y * n, cc - 2 * x * c + x * x * n
        r, c = r - y * n, c - x * n
        rr, rc, cc = rr - r * r / n, rc - r * c / n, cc - c * c / n
        root = np.hypot((rr - cc) / 2, rc)
        longer = (rr + cc) / 2 + root  # eigenvalues are this and `2 * root` less
        eccentricity = np.sqrt(np.divide(2 * root, longer, out=np.zeros(len(n)), where=longer > 0).clip(0, 1))
        return {"label": labels, "centroid_row": y + r / n, "centroid_column": x + c / n, "area": n,
                "eccentricity": eccentricity, "mean_probability": self._probability[labels] / n}


def nucleus_rows(name: str, measures: dict, pixel_size: float | None) -> Iterator[dict]:
    """Turn the measures of nuclei (see `NucleusSums.measures`) into a dictionary with COLUMNS for each.

    With `pixel_size` (micrometres) MICROMETRE_COLUMNS follow.
    """
    for label, y, x, area, eccentricity, mean in zip(*measures.values(), strict=True):
        row = dict(zip(COLUMNS, (name, int(label), round(float(y), 2), round(float(x), 2), int(area),
                                 round(float(eccentricity), 4), round(float(mean), 4)), strict=True))
        if pixel_size:
            lengths = (y * pixel_size, x * pixel_size, area * pixel_size ** 2)
            row |= dict(zip(MICROMETRE_COLUMNS, (round(float(n), 4) for n in lengths), strict=True))
        yield row
