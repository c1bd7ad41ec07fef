"""Segment an image from file to files with bounded memory, for images that are too large to hold.

The image is read in bands, predicted a row of tiles at a time and separated a row of blocks at a time. Labels, masks
and probabilities wait compressed in files without a name, until the numbers of the nuclei are known.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from images.bands import BandStore, ImageRows, even_spans, overview_step, thinned, windows, write_tiff
from images.familiarity import describe_parts, part_areas, strangest
from images.files import to_image
from nuclei.blocks import BLOCK, BlockSeparation
from nuclei.measurement import NucleusSums, measure_nuclei
from nuclei.trust import Agreement
from system.processes import progress

SAMPLE_PIXELS = 1_000_000  # tell enough of an image's brightness and colours


@dataclass(frozen=True)
class Prediction:
    """What is known of an image once its files are written.

    Attributes:
        nuclei: how many there are.
        foreground: share of pixels of the first class.
        highest: the highest probability of the first class.
        strange: what `Predictor.unlike_training` says.
        trust: how much the answers of the network agree (see `nuclei.trust`).
        measures: of the nuclei (see `nuclei.measurement.measure_nuclei`).
    """

    nuclei: int
    foreground: float
    highest: float
    strange: str | None
    trust: float | None
    measures: dict[str, np.ndarray]


def stream_prediction(predictor, rows: ImageRows, min_area: int, instances: Path, masks: list[Path],
                      probabilities: list[Path], between_bands: Callable[[], None] = lambda: None,
                      ) -> tuple[Prediction, np.ndarray, np.ndarray]:
    """Predict an image with sizing 'tile' and write TIFF files: 32 bit labels, 0/255 masks, 16 bit probabilities.

    Args:
        predictor: an `inference.Predictor`.
        rows: the image in RGB.
        instances, masks, probabilities: where to write; masks for each class or none, probabilities likewise. The
            intermediate files are made in the folder of `instances`.
        between_bands: called before each band, and may raise to stop.
    Returns:
        the prediction; the image reduced by a whole number so that no side exceeds OVERVIEW_SIDE, (h, w, 3) uint8; and
        the labels at the top left corner of each of these pixels, (h, w) uint32.
    Raises:
        ImageFileError: for damaged parts of the image.
        OSError: for a full disk.
    """
    view, agreement = _View(rows, predictor.in_channels), Agreement()
    blocks = BlockSeparation(lambda probability: predictor.nuclei(probability, min_area), rows.height, rows.width,
                             min_area)
    sums, top = NucleusSums(), 0
    with ExitStack() as stack:
        waiting = _Waiting(stack, predictor, instances, masks, probabilities)
        bar = stack.enter_context(progress(None, rows.path.name, rows.height, unit=" rows"))

        def predicted():
            for band in predictor.predict_bands(view.pixels(), rows.height, rows.width, agreement):
                done = len(band)
                between_bands()
                yield band
                del band
                bar.update(done)

        for labels, probability in blocks.bands(predicted()):
            sums.add(labels, probability[..., 0], view.take(len(labels)), top)
            waiting.append(labels, probability)
            top += len(labels)
            del labels, probability  # before the next rows are predicted
        final, size = blocks.final_labels(), (rows.height, rows.width)
        waiting.write(final, size)
        measures = measure_nuclei(sums.joined(final), lambda: (final[band] for band in waiting.labels), *size,
                                  (lambda: waiting.cytoplasm) if predictor.has_cytoplasm else None)
        overview_labels = np.concatenate([final[part] for part in thinned(waiting.labels, view.reduction)])
    strange = strangest(describe_parts(view.sample(), np.concatenate(waiting.areas)), predictor.recipe.training_ranges)
    prediction = Prediction(int(final.max()), waiting.foreground / (rows.height * rows.width), waiting.highest, strange,
                            agreement.trust(), measures)
    return prediction, view.overview(), overview_labels


class _Waiting:
    """What waits in files without a name until the numbers of the nuclei are known, and what is counted on the way.

    Attributes:
        labels: the provisional labels, band after band.
        cytoplasm: the mask of the second class, of a network of cells.
        foreground: pixels of the first class.
        highest: the highest probability of the first class.
        areas: what `images.familiarity.part_areas` says of each block.
    """

    def __init__(self, stack: ExitStack, predictor, instances: Path, masks: list[Path], probabilities: list[Path]):
        self._predictor, self._instances, self._masks, self._probabilities = predictor, instances, masks, probabilities
        self.labels, self.cytoplasm, *others = (stack.enter_context(BandStore(instances.parent))
                                                for _ in (instances, instances, *masks, *probabilities))
        self._mask_bands, self._deep_bands = others[:len(masks)], others[len(masks):]
        self.foreground, self.highest, self.areas = 0, 0.0, []

    def append(self, labels: np.ndarray, probability: np.ndarray) -> None:
        """Take labels (rows, W) and probabilities (rows, W, C)."""
        self.labels.append(labels)
        classes = probability[..., :self._predictor.classes]
        foreground = classes >= self._predictor.threshold
        for k, store in enumerate(self._mask_bands):
            store.append(foreground[..., k].astype(np.uint8) * 255)
        if self._predictor.has_cytoplasm:
            self.cytoplasm.append(foreground[..., 1])
        for k, store in enumerate(self._deep_bands):
            store.append(np.round(probability[..., k] * 65535).astype(np.uint16))
        self.foreground += int(foreground[..., 0].sum())
        self.highest = max(self.highest, float(classes[..., 0].max()))
        self.areas += [part_areas(foreground[:, left:right, 0]) for left, right in even_spans(labels.shape[1], BLOCK)]

    def write(self, final: np.ndarray, size: tuple[int, int]) -> None:
        """Write the files: labels by what `BlockSeparation.final_labels` says, masks, probabilities."""
        write_tiff(self._instances, (final[band] for band in self.labels), *size, np.uint32)
        for paths, stores, dtype in ((self._masks, self._mask_bands, np.uint8),
                                     (self._probabilities, self._deep_bands, np.uint16)):
            for path, store in zip(paths, stores, strict=True):
                write_tiff(path, store, *size, dtype)


class _View:
    """Hand on an image's pixels; keep a reduced picture, a sample, and the rows whose nuclei are not yet measured."""

    def __init__(self, rows: ImageRows, channels: int):
        self.rows, self.channels = rows, channels
        self.reduction = overview_step(rows.height, rows.width)
        self.step = int(np.ceil(np.sqrt(rows.height * rows.width / SAMPLE_PIXELS)))
        self._picture, self._sample, self._held = [], [], []

    def pixels(self):
        """Yield bands (rows, width, channels) uint8."""
        spans = even_spans(self.rows.height, max(1, 256 // self.reduction) * self.reduction)
        for (top, _), band in zip(spans, windows(self.rows, spans), strict=True):
            self._picture.append(np.asarray(Image.fromarray(band).reduce(self.reduction)))
            self._held.append(band)
            pixels = to_image(band, self.channels)
            self._sample.append(pixels[-top % self.step::self.step, ::self.step].reshape(-1, self.channels))
            yield pixels

    def take(self, count: int) -> np.ndarray:
        """Return the next rows (count, width, 3) uint8 of those that were handed on, and let go of them."""
        parts, left = [], count
        while left:
            parts.append(self._held[0][:left])
            self._held[0] = self._held[0][left:]
            left -= len(parts[-1])
            if not len(self._held[0]):
                del self._held[0]
        return np.concatenate(parts)

    def overview(self) -> np.ndarray:
        """Return the reduced picture (h, w, 3) uint8."""
        return np.concatenate(self._picture)

    def sample(self) -> np.ndarray:
        """Return pixels (N, channels) uint8 of a regular grid."""
        return np.concatenate(self._sample)
