"""Separate the nuclei of an image that is too large to hold: block by block, joined across the seams, measured.

    blocks = BlockSeparation(lambda p: predictor.nuclei(p, min_area), height, width, min_area)
    for provisional, probability in blocks.bands(predictor.predict_bands(...)):
        ...                                      # (rows, W) uint32 each, to be kept
    final = blocks.final_labels()                # final[provisional] numbers the nuclei of the whole image

Each block is separated together with a halo, the pixels around it that tell how its nuclei go on, and what lies in the
block itself is kept. The outcome is the very label map of the whole image wherever the connected parts of the
foreground that reach into a block end within its halo: their nuclei depend on nothing else. In larger clumps two blocks
may disagree near a seam; no pixel of the foreground is lost then either.

Two nuclei of different blocks are one if they have more than half of their pixels in common, counted within half a halo
of the seam, where both blocks see what they need. A rest below the smallest area joins the nucleus that it shares most
with. Joins add up, so that a nucleus may cross any number of seams.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from images.bands import even_spans, windows
from nuclei.overlaps import overlaps

BLOCK = 1024       # side in pixels
HALO = 128         # pixels; nuclei of stained sections measure 20 to 60 at 40x, large ones of smears about 100
JOINING_IOU = 0.5  # above it a nucleus has at most one partner


@dataclass(frozen=True)
class _Zone:
    """A block and half its halo: provisional labels, 0 where a nucleus has no pixel in the block."""

    top: int
    left: int
    labels: np.ndarray


class BlockSeparation:
    """Separate nuclei in bands of rows.

    Args:
        separate: turns probabilities (h, w, K) float32 into a label map (h, w), e.g. `Predictor.nuclei`.
        height, width: of the image, in pixels.
        min_area: pixels of the smallest nucleus that `separate` leaves. The halo is at least as wide, up to three times
            HALO; beyond that, thin holes and nuclei near a seam may be judged by a part of them.
        block: side of a block in pixels.
    """

    def __init__(self, separate: Callable[[np.ndarray], np.ndarray], height: int, width: int, min_area: int,
                 block: int = BLOCK):
        self.separate, self.height, self.width, self.min_area = separate, height, width, min_area
        self.block, self.halo = block, min(max(HALO, min_area), 3 * HALO)
        self._count = 0
        self._areas, self._firsts = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
        self._pairs: list[np.ndarray] = []  # (4, P): two provisional labels, shared pixels, union

    def bands(self, probability: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Separate consecutive bands (rows, W, K) float32.

        Yields:
            (labels, probability) of each row of blocks: (rows, W) uint32, provisional, and (rows, W, K) float32.
        """
        spans = even_spans(self.height, self.block)
        reaching = [(max(start - self.halo, 0), min(stop + self.halo, self.height)) for start, stop in spans]
        source = windows(probability, reaching)
        above: list[_Zone] = []
        for (top, bottom), (start, _) in zip(spans, reaching, strict=True):
            rows = next(source)
            labels = np.zeros((bottom - top, self.width), np.uint32)
            zones: list[_Zone] = []
            for left, right in even_spans(self.width, self.block):
                zones.append(self._separate_block(labels, rows, start, top, left, right))
                for other in (*zones[-2:-1], *above):
                    self._compare(other, zones[-1])
            seam = max(bottom - self.halo // 2, 0)
            above = [_Zone(seam, zone.left, zone.labels[max(seam - zone.top, 0):].copy()) for zone in zones]
            rows = rows[top - start:bottom - start]
            yield labels, rows
            del labels, rows, zones  # before the next rows are predicted

    def final_labels(self) -> np.ndarray:
        """Join the nuclei of all blocks once every band has been read.

        Returns:
            (provisional labels + 1,) uint32: position p holds the final label of p, 0 stays 0; nuclei are numbered from
            1 in the order in which their first pixels come, row after row, as `separate_nuclei` numbers them.
        """
        areas, firsts = np.concatenate(self._areas), np.concatenate(self._firsts)
        one, other, shared, union = np.concatenate([np.zeros((4, 0), np.int64), *self._pairs], axis=1)
        joined = shared > JOINING_IOU * union
        group = self._groups(one[joined], other[joined])
        small = np.bincount(group, areas)[group] < self.min_area
        rests = np.concatenate([np.stack([a, b, shared])[:, small[a]] for a, b in ((one, other), (other, one))], axis=1)
        rests = rests[:, np.argsort(-rests[2], kind="stable")]
        chosen = rests[:, np.unique(rests[0], return_index=True)[1]]
        group = self._groups(np.append(one[joined], chosen[0]), np.append(other[joined], chosen[1]))
        first = np.full(group.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, group[1:], firsts[1:])
        number = np.zeros(len(first), np.uint32)
        present = np.unique(group[1:])
        number[present[np.argsort(first[present])]] = np.arange(1, len(present) + 1)
        return np.append(np.uint32(0), number[group[1:]])

    def _groups(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        size = self._count + 1
        return connected_components(coo_array((np.ones(len(one), bool), (one, other)), (size, size)),
                                    directed=False)[1]

    def _separate_block(self, labels: np.ndarray, rows: np.ndarray, start: int, top: int, left: int,
                        right: int) -> _Zone:
        """Separate one block, write its provisional labels into `labels` and return its zone.

        Args:
            labels: (bottom - top, W) uint32, from the row `top` on.
            rows: (n, W, K) probabilities from the row `start` on.
        """
        bottom, reach = top + len(labels), self.halo // 2
        near_left, near_right = max(left - self.halo, 0), min(right + self.halo, self.width)
        found = self.separate(np.ascontiguousarray(rows[:, near_left:near_right]))
        core = found[top - start:bottom - start, left - near_left:right - near_left]
        present = np.unique(core)
        present = present[present > 0]
        first = np.zeros(len(present), np.int64)
        places = np.flatnonzero(core)
        position = np.searchsorted(present, core.ravel()[places])
        first[position[::-1]] = places[::-1]  # of several values the last one stays: the first place
        y, x = np.divmod(first, right - left)
        self._firsts.append((top + y) * self.width + left + x)
        self._areas.append(np.bincount(position, minlength=len(present)))
        provisional = np.zeros(int(found.max()) + 1, np.uint32)
        provisional[present] = np.arange(self._count + 1, self._count + len(present) + 1)
        self._count += len(present)
        labels[:, left:right] = provisional[core]
        zone_top, zone_left = max(top - reach, start), max(left - reach, near_left)
        zone = found[zone_top - start:bottom + reach - start, zone_left - near_left:right + reach - near_left]
        return _Zone(zone_top, zone_left, provisional[zone])

    def _compare(self, one: _Zone, other: _Zone) -> None:
        """Note which nuclei of two zones overlap, and by how many pixels, where the zones do."""
        top, left = max(one.top, other.top), max(one.left, other.left)
        bottom, right = (min(a + n, b + m) for a, b, n, m in
                         zip((one.top, one.left), (other.top, other.left), one.labels.shape, other.labels.shape,
                             strict=True))
        if top >= bottom or left >= right:
            return
        parts = [zone.labels[top - zone.top:bottom - zone.top, left - zone.left:right - zone.left]
                 for zone in (one, other)]
        table = overlaps(*parts)
        numbers = [np.unique(part[part > 0]).astype(np.int64) for part in parts]
        self._pairs.append(np.stack([numbers[0][table.found], numbers[1][table.drawn], table.shared, table.unions]))
