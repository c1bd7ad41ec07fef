"""Whole-slide images: read by openslide or tiffslide, whichever is installed, at the level that a network knows.

    rows = SlideRows("slide.svs", channels=3, wanted=0.25)   # micrometres a pixel in training
    for band in rows:                                        # (n, rows.width, 3) uint8, from top to bottom
        ...

Both are extras: `pip install -r requirements-wsi.txt`.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from images.bands import BAND_PIXELS, even_spans
from images.files import MAX_PIXELS, ImageFileError, to_image

SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif")
READERS = ("openslide", "tiffslide")  # the first one that reads a file is taken
ALIKE = 1.25  # times that pixel sizes may differ without a word


class SlideRows:
    """Read one level of a slide from top to bottom in bands of rows, as `images.bands.ImageRows` reads an image.

    Args:
        channels: 1 for luminance, 3 for RGB. What the scanner left out is white.
        max_pixels: a level of more is refused.
        wanted: micrometres a pixel in training; the level nearest to it is read. 0 takes the first level.
        pixel_size: micrometres a pixel of the first level, 0 for what the file says.
    Attributes:
        height, width: pixels of the level that is read.
        level, levels: its number, from 0, and how many there are.
        microns_per_pixel: of that level; 0 where it is not known.
        in_parts: True.
    Raises:
        ImageFileError: for a file that cannot be read, and where no reader is installed.
    """

    in_parts = True

    def __init__(self, path: Path, channels: int, max_pixels: float = MAX_PIXELS, wanted: float = 0.0,
                 pixel_size: float = 0.0):
        self.path, self.channels = Path(path), channels
        self._slide = open_slide(self.path)
        downsamples = [float(d) for d in self._slide.level_downsamples]
        size = pixel_size or microns_of(self._slide.properties)
        self.levels, self.level = len(downsamples), 0
        if size and wanted:
            self.level = min(range(self.levels), key=lambda i: abs(math.log(size * downsamples[i] / wanted)))
        self._downsample = downsamples[self.level]
        self.microns_per_pixel = size * self._downsample
        self.width, self.height = map(int, self._slide.level_dimensions[self.level])
        if self.height * self.width > max_pixels:
            raise ImageFileError(f"{path}: level {self.level} of the slide has {self.height}x{self.width} pixels, "
                                 f"{self.height * self.width:.3g} in all; at most {max_pixels:.3g} are decoded. Raise "
                                 f"--max_pixels, or cut out a region")

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield (rows, width, channels) uint8."""
        tile = int(self._slide.properties.get(f"{READERS[1]}.level[{self.level}].tile-height") or 256)
        rows = max(1, BAND_PIXELS // (self.width * tile)) * tile
        for top, bottom in even_spans(self.height, rows):
            yield to_image(self._read(top, bottom - top), self.channels, str(self.path))

    def _read(self, top: int, rows: int) -> np.ndarray:
        """Return rows of the level, (rows, width, 3) uint8."""
        first = math.ceil(top * self._downsample)  # places are given in pixels of the first level, and rounded down
        first += int(first / self._downsample) < top
        try:
            region = self._slide.read_region((0, first), self.level, (self.width, rows))
        except Exception as error:  # of one of two libraries and what they build on: anything may be damaged
            raise ImageFileError(f"{self.path}: rows {top} to {top + rows} of level {self.level} cannot be read "
                                 f"({str(error) or type(error).__name__}). Is the file cut off?") from None
        if region.mode == "RGBA":
            white = Image.new("RGBA", region.size, "white")
            region = Image.alpha_composite(white, region)
        return np.asarray(region.convert("RGB"))

    def scale_in_words(self, wanted: float) -> str:
        """Say which level is read, and what about its scale a user should know."""
        at, holes = f"level {self.level} of {self.levels}", self._holes()
        if not self.microns_per_pixel:
            return (f"{at}; its pixel size is not known, so the first level is taken. Pass --pixel_size if nuclei "
                    f"have another size than in training{holes}")
        at += f", {self.microns_per_pixel:.3g} micrometres a pixel"
        if not wanted:
            return f"{at}; that of the training images is not known, so the first level is taken{holes}"
        return f"{at}, in training {wanted:.3g}" + (
            f"; nuclei are {in_words(self.microns_per_pixel / wanted)} as in training"
            if differ(self.microns_per_pixel, wanted) else "") + holes

    def _holes(self) -> str:
        """Say how many tiles have no bytes, '' for none; openslide shows such places as white, tiffslide as black."""
        if not hasattr(self._slide, "ts_tifffile"):
            return ""
        counts = self._slide.ts_tifffile.series[0].levels[self.level].pages[0].databytecounts
        missing = sum(not count for count in counts)
        return f"; {missing} of {len(counts)} tiles were never scanned and count as black" if missing else ""


def differ(size: float, wanted: float) -> bool:
    """Tell whether two pixel sizes differ by so much that a network sees nuclei of another size than it knows."""
    return bool(size and wanted) and abs(math.log(size / wanted)) > math.log(ALIKE)


def in_words(ratio: float) -> str:
    """Return how large nuclei are whose pixels are so many times as large as in training."""
    return f"{max(ratio, 1 / ratio):.2g} times as {'small' if ratio > 1 else 'large'}"


def is_slide(path: Path) -> bool:
    """Tell whether a file is a whole-slide image, by its name."""
    return path.suffix.lower() in SLIDE_SUFFIXES


def open_slide(path: Path):
    """Return an openslide or tiffslide object; raises ImageFileError where neither is there or reads the file."""
    if not path.is_file():
        raise ImageFileError(f"{path}: no such file")
    problems, found = [], 0
    for name in READERS:
        with contextlib.suppress(ImportError):
            module = __import__(name)
            found += 1
            try:
                return (module.OpenSlide if name == "openslide" else module.TiffSlide)(str(path))
            except Exception as error:  # each library has errors of its own and of those below it
                problems.append(f"{name}: {str(error) or type(error).__name__}")
    if not found:
        raise ImageFileError(f"{path}: a slide, which openslide or tiffslide reads, and neither is installed. Say pip "
                             f"install -r requirements-wsi.txt")
    raise ImageFileError(f"{path}: no slide that can be read ({'; '.join(problems)}). Is it cut off? MRXS and some "
                         f"others need openslide: pip install openslide-python openslide-bin")


def microns_of(properties) -> float:
    """Return the micrometres of a pixel of the first level, 0 where a slide does not tell."""
    for name in READERS:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            size = float(properties[f"{name}.mpp-x"])
            if 0 < size < math.inf:
                return size
    return 0.0
