"""Measure nuclei from one label map or from bands of it: place, size, shape, probability, colour and cytoplasm."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from nuclei.cells import cytoplasm_areas
from nuclei.shapes import nucleus_shapes

# The decimals that are known of each measure: a pixel more or less moves them by more.
DIGITS = {"label": 0, "centroid_row": 2, "centroid_column": 2, "area": 0, "eccentricity": 4, "mean_probability": 4,
          "perimeter": 2, "circularity": 3, "solidity": 3, "major_axis": 2, "minor_axis": 2, "cut_by_border": 0,
          "mean_red": 1, "mean_green": 1, "mean_blue": 1}
CELL_DIGITS = {"cytoplasm_area": 0, "nucleus_to_cytoplasm": 4}
COLUMNS = ("image", *DIGITS)
CELL_COLUMNS = tuple(CELL_DIGITS)
# With micrometres: the column, and how often the size of a pixel goes into it.
MICROMETRES = {"centroid_row_um": ("centroid_row", 1), "centroid_column_um": ("centroid_column", 1),
               "area_um2": ("area", 2), "perimeter_um": ("perimeter", 1), "major_axis_um": ("major_axis", 1),
               "minor_axis_um": ("minor_axis", 1)}
MICROMETRE_COLUMNS = tuple(MICROMETRES)

ROWS = 128  # that are added at once: the coordinates of all foreground pixels take memory


class NucleusSums:
    """Add up what the measures of nuclei need; the result does not depend on how the image was divided.

    Sums of coordinates are whole numbers of 64 bit, so that they are exact.
    """

    def __init__(self):
        self._moments = np.zeros((6, 1), np.int64)  # pixels, rows, columns, rows^2, rows*columns, columns^2
        self._probability = np.zeros(1)
        self._colours = np.zeros((3, 1), np.int64)

    def add(self, labels: np.ndarray, probability: np.ndarray, pixels: np.ndarray, top: int = 0) -> None:
        """Add a band.

        Args:
            labels: (rows, W) whole numbers of at least 0, 0 for background.
            probability: (rows, W) floating point.
            pixels: (rows, W, 3) uint8, the image in RGB.
            top: the image's row in which the band begins.
        """
        for start in range(0, len(labels), ROWS):
            rows = slice(start, start + ROWS)
            self._add(labels[rows], probability[rows], pixels[rows], top + start)

    def _add(self, labels: np.ndarray, probability: np.ndarray, pixels: np.ndarray, top: int) -> None:
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
            self._colours = np.pad(self._colours, ((0, 0), (0, beyond)))
        self._moments[:, low:low + sums.shape[1]] += sums
        self._probability[low:low + sums.shape[1]] += np.bincount(index, probability[rows, columns])
        for total, values in zip(self._colours, pixels[rows, columns].T, strict=True):
            total[low:low + sums.shape[1]] += np.bincount(index, values).astype(np.int64)

    def joined(self, final: np.ndarray) -> "NucleusSums":
        """Return the sums of the nuclei that provisional labels p belong to: final[p], 0 for none."""
        result = NucleusSums()
        final = final[:self._moments.shape[1]].astype(np.int64)
        result._moments, result._colours = (np.zeros((n, final.max() + 1), np.int64) for n in (6, 3))
        for all_joined, all_provisional in ((result._moments, self._moments), (result._colours, self._colours)):
            for joined, provisional in zip(all_joined, all_provisional, strict=True):
                np.add.at(joined, final, provisional)
        result._probability = np.bincount(final, self._probability)
        return result

    def measures(self) -> dict[str, np.ndarray]:
        """Return what sums tell of DIGITS, one entry a nucleus.

        Centroids are in pixels from the centre of the top left one, areas in pixels. Eccentricity and axes (pixels) are
        those of the ellipse with the same second moments, as in scikit-image; means of the colours lie in [0, 255].
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
        axes = (4 * np.sqrt((length / n).clip(0)) for length in (longer, longer - 2 * root))
        return {"label": labels, "centroid_row": y + r / n, "centroid_column": x + c / n, "area": n,
                "eccentricity": eccentricity, "mean_probability": self._probability[labels] / n} \
            | dict(zip(("major_axis", "minor_axis"), axes, strict=True)) \
            | dict(zip(("mean_red", "mean_green", "mean_blue"), self._colours[:, labels] / n, strict=True))


def measure_nuclei(sums: NucleusSums, labels: Callable[[], Iterable[np.ndarray]], height: int, width: int,
                   cytoplasm: Callable[[], Iterable[np.ndarray]] | None = None) -> dict[str, np.ndarray]:
    """Measure all nuclei of an image: DIGITS, and CELL_DIGITS if there is a class for the cytoplasm.

    Circularity is 4 pi area / perimeter^2 and at most 1, as in ImageJ: nothing is rounder than a disc, and what lies
    above comes from counting the few pixels of a small nucleus (a disc of radius 5 around a corner of pixels
    would have 1.03, of radius 20 it has 0.94, of radius 100 0.91: pixels make long outlines longer). It is not a number
    (NaN) where the perimeter is 0.
    Solidity is the area divided by that of the convex hull. `nucleus_to_cytoplasm` is the area of the nucleus divided
    by that of its cytoplasm, to which the nucleus does not belong (see `nuclei.cells`), NaN without any.

    Args:
        sums: of these nuclei.
        labels: gives the label map in consecutive rows (rows, width), each time it is called.
        cytoplasm: likewise the mask of the cytoplasm, bool.
    """
    result = sums.measures()
    areas = np.zeros(int(result["label"].max(initial=0)) + 1, np.int64)
    areas[result["label"]] = result["area"]
    shapes = {name: values[result["label"]] for name, values in
              nucleus_shapes(labels(), height, width, areas).items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        roundness = np.minimum(4 * np.pi * result["area"] / shapes["perimeter"] ** 2, 1)
    result |= {"perimeter": shapes["perimeter"], "solidity": result["area"] / shapes["convex_area"],
               "circularity": np.where(shapes["perimeter"] > 0, roundness, np.nan),
               "cut_by_border": shapes["cut_by_border"].astype(np.int64)}
    names = tuple(DIGITS)
    if cytoplasm:
        owned = cytoplasm_areas(labels(), cytoplasm(), height, width, len(areas))[result["label"]]
        result |= {"cytoplasm_area": owned,
                   "nucleus_to_cytoplasm": np.where(owned > 0, result["area"] / np.maximum(owned, 1), np.nan)}
        names += CELL_COLUMNS
    return {name: result[name] for name in names}


def rounded_measures(measures: dict[str, np.ndarray], pixel_size: float | None) -> Iterator[dict]:
    """Yield of each nucleus its measures (see `measure_nuclei`), rounded to what is known, None for NaN.

    With `pixel_size` (micrometres) MICROMETRE_COLUMNS follow.
    """
    digits = DIGITS | CELL_DIGITS
    for values in zip(*measures.values(), strict=True):
        exact = dict(zip(measures, map(float, values), strict=True))
        row: dict = {name: None if value != value else round(value, digits[name]) if digits[name] else int(value)
                     for name, value in exact.items()}
        if pixel_size:
            row |= {name: round(exact[source] * pixel_size ** power, 4)
                    for name, (source, power) in MICROMETRES.items()}
        yield row


def nucleus_rows(name: str, measures: dict[str, np.ndarray], pixel_size: float | None) -> Iterator[dict]:
    """Turn the measures of nuclei into rows of nuclei.csv (see `rounded_measures`); what is not known is empty."""
    for row in rounded_measures(measures, pixel_size):
        yield {"image": name} | row
