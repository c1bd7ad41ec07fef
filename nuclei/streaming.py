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

from images.bands import BandStore, ImageRows, even_spans, windows, write_tiff
from images.familiarity import describe_parts, part_areas, strangest
from images.files import to_image
from nuclei.blocks import BLOCK, BlockSeparation
from nuclei.measurement import NucleusSums, measure_nuclei
from nuclei.trust import Agreement
from system.processes import progress

OVERVIEW_SIDE = 4000       # pixels of the longer side at most
SAMPLE_PIXELS = 1_000_000  # tell enough of an image's brightness and colours


@dataclass(frozen=True)
class Prediction:
    """What is known of an image once its files are written.

    Attributes:
        nuclei: how many there are.
        foreground: share of pixels of the first class.
        highest: the highest probability of any class.
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
    provisional, top, count, highest, areas = NucleusSums(), 0, 0, 0.0, []
    with ExitStack() as stack:
        label_bands, cytoplasm_bands, *others = (stack.enter_context(BandStore(instances.parent))
                                                 for _ in (instances, instances, *masks, *probabilities))
        mask_bands, deep_bands = others[:len(masks)], others[len(masks):]
        bar = stack.enter_context(progress(None, rows.path.name, rows.height, unit=" rows"))

        def predicted():
            for band in predictor.predict_bands(view.pixels(), rows.height, rows.width, agreement):
                done = len(band)
                between_bands()
                yield band
                del band
                bar.update(done)

        for labels, probability in blocks.bands(predicted()):
            provisional.add(labels, probability[..., 0], view.take(len(labels)), top)
            label_bands.append(labels)
            foreground = probability[..., :predictor.classes] >= predictor.threshold
            for k, store in enumerate(mask_bands):
                store.append(foreground[..., k].astype(np.uint8) * 255)
            if predictor.has_cytoplasm:
                cytoplasm_bands.append(foreground[..., 1])
            count += int(foreground[..., 0].sum())
            areas += [part_areas(foreground[:, left:right, 0]) for left, right in even_spans(rows.width, BLOCK)]
            for k, store in enumerate(deep_bands):
                store.append(np.round(probability[..., k] * 65535).astype(np.uint16))
            highest = max(highest, float(probability[..., :predictor.classes].max()))
            top += len(labels)
            del labels, probability, foreground  # before the next rows are predicted
        final = blocks.final_labels()
        size = rows.height, rows.width
        write_tiff(instances, (final[band] for band in label_bands), *size, np.uint32)
        for paths, stores, dtype in ((masks, mask_bands, np.uint8), (probabilities, deep_bands, np.uint16)):
            for path, store in zip(paths, stores, strict=True):
                write_tiff(path, store, *size, dtype)
        measures = measure_nuclei(provisional.joined(final), lambda: (final[band] for band in label_bands), *size,
                                  (lambda: cytoplasm_bands) if predictor.has_cytoplasm else None)
        overview_labels = np.concatenate([final[part] for part in view.overview_labels(label_bands)])
    strange = strangest(describe_parts(view.sample(), np.concatenate(areas)), predictor.recipe.training_ranges)
    prediction = Prediction(int(final.max()), count / (rows.height * rows.width), highest, strange,
                            agreement.trust(), measures)
    return prediction, view.overview(), overview_labels


class _View:
    """Hand on an image's pixels; keep a reduced picture, a sample, and the rows whose nuclei are not yet measured."""

    def __init__(self, rows: ImageRows, channels: int):
        self.rows, self.channels = rows, channels
        self.reduction = -(-max(rows.height, rows.width) // OVERVIEW_SIDE)
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

    def overview_labels(self, bands):
        """Yield the labels (rows, w) at the top left corners of the overview's pixels, band after band."""
        top = 0
        for band in bands:
            yield band[-top % self.reduction::self.reduction, ::self.reduction]
            top += len(band)
