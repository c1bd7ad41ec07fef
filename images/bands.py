"""Large images as bands of rows: read in parts, kept on disk on the way, written as tiled TIFF.

    rows = ImageRows("slide.tif", channels=3)
    for band in rows:                            # (n, rows.width, 3) uint8, from top to bottom
        ...

A TIFF is read some rows of tiles, or strips, at a time. They become a small TIFF in memory that `images.files`
decodes, so that the pixels are those of `images.files.load_image`. Any other file is decoded whole.
"""

import io
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from images.files import MAX_PIXELS, ImageFileError, decode_image, image_size, load_image

BAND_PIXELS = 8_000_000  # read at once, as far as the strips or tiles of a file allow
TILE = 512               # side in pixels of the tiles that are written
STRIP = 64               # rows of the strips that are written for ImageJ
OVERVIEW_SIDE = 4000     # pixels of the longer side of a reduced picture at most

# The tags of a TIFF that say how its strips or tiles are decoded.
DECODING_TAGS = (258, 259, 262, 266, 277, 284, 292, 293, 317, 320, 322, 323, 332, 338, 339, 347, 529, 530, 531, 532)
WIDTH, LENGTH, STRIP_OFFSETS, ROWS_PER_STRIP, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES = 256, 257, 273, 278, 279, 324, 325
LONG, LONG8 = 4, 16
UNCOMPRESSED, OLD_JPEG = 1, 6


class ImageRows:
    """Read an image from top to bottom in bands of rows.

    A TIFF with orientation, of the old JPEG kind (6), with parts left out, or compressed as one strip is decoded whole,
    as are all other formats; everything else is read in parts.

    Args:
        path, channels, max_pixels, max_value: as for `images.files.load_image`, which defines the values too.
    Attributes:
        height, width: pixels.
        in_parts: whether parts are decoded one after the other.
    Raises:
        ImageFileError: for a file that cannot be opened or has too many pixels; while reading, for damaged parts.
    """

    def __init__(self, path: Path, channels: int, max_pixels: float = MAX_PIXELS, max_value: int = 0):
        self.path, self.channels, self.max_value = Path(path), channels, max_value
        self.height, self.width = image_size(self.path, max_pixels)
        self._layout = _tiff_layout(self.path)
        self.in_parts = self._layout is not None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield (rows, width, channels) uint8."""
        if self._layout is None:
            yield load_image(self.path, self.channels, self.height * self.width, self.max_value)
            return
        with open(self.path, "rb") as file:
            for rows, places in self._layout.bands:
                parts = []
                for offset, count in places:
                    file.seek(offset)
                    parts.append(file.read(count))
                    if len(parts[-1]) < count:
                        raise ImageFileError(f"{self.path}: damaged or cut off ({count} bytes expected at {offset}). "
                                             f"Export it again or remove it")
                yield decode_image(self.path, io.BytesIO(small_tiff(self._layout, rows, parts)), self.channels,
                                   self.max_value)


@dataclass(frozen=True)
class TiffLayout:
    """Where the parts of a TIFF lie and how they are decoded.

    Attributes:
        byteorder: '<' or '>'.
        tags: number -> (type, count, value as bytes), those of DECODING_TAGS and the width.
        tiled: tiles, else strips.
        part_rows: rows of a tile or strip.
        bands: (rows, [(offset, bytes) of every part]) from top to bottom; parts in the order of a TIFF.
    """

    byteorder: str
    tags: dict[int, tuple[int, int, bytes]]
    tiled: bool
    part_rows: int
    bands: list[tuple[int, list[tuple[int, int]]]]


def _tiff_layout(path: Path) -> TiffLayout | None:
    """Return the layout of a TIFF that can be read in parts, else None."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return None
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            order = file.byteorder
            tags = {tag.code: _raw_tag(file, tag) for tag in page.tags if tag.code in DECODING_TAGS}
            orientation = page.tags.valueof(274, 1)
            offsets, counts = list(page.dataoffsets), list(page.databytecounts)
            height, width, planes = page.imagelength, page.imagewidth, page.samplesperpixel
            chunky, compression, bits = page.planarconfig == 1, page.compression, page.bitspersample
            part_rows = page.tilelength if page.is_tiled else min(page.rowsperstrip or height, height)
            tiled, across = page.is_tiled, -(-width // page.tilewidth) if page.is_tiled else 1
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        return None  # Pillow may know it, and says what is wrong otherwise
    if compression == UNCOMPRESSED and chunky and not tiled and len(offsets) == 1:  # cut the one strip
        row_bytes = -(-width * planes * bits // 8)
        part_rows = max(1, BAND_PIXELS // width)
        starts = range(0, height, part_rows)
        offsets = [offsets[0] + y * row_bytes for y in starts]
        counts = [min(part_rows, height - y) * row_bytes for y in starts]
    down = -(-height // part_rows)
    layers = 1 if chunky else planes
    whole = compression == OLD_JPEG or orientation != 1 or down == 1
    if whole or len(offsets) != layers * down * across or len(counts) != len(offsets) or not all(offsets + counts):
        return None
    tags[WIDTH] = _numbers(order, [width])
    together = max(1, BAND_PIXELS // (width * part_rows))
    bands = []
    for first in range(0, down, together):
        chosen = [layer * down * across + i for layer in range(layers)
                  for i in range(first * across, min(first + together, down) * across)]
        bands.append((min(together * part_rows, height - first * part_rows), [(offsets[i], counts[i]) for i in chosen]))
    return TiffLayout(order, tags, tiled, part_rows, bands)


def _raw_tag(file: tifffile.TiffFile, tag: tifffile.TiffTag) -> tuple[int, int, bytes]:
    if int(tag.dtype) == LONG8:  # of BigTIFF; the small file is none
        return _numbers(file.byteorder, np.ravel(tag.value))
    file.filehandle.seek(tag.valueoffset)
    return int(tag.dtype), tag.count, file.filehandle.read(tag.valuebytecount)


def _numbers(order: str, values) -> tuple[int, int, bytes]:
    return LONG, len(values), struct.pack(f"{order}{len(values)}I", *map(int, values))


def small_tiff(layout: TiffLayout, rows: int, parts: list[bytes]) -> bytes:
    """Return a TIFF file of `rows` rows made of encoded tiles or strips."""
    order, place, places = layout.byteorder, 8, []
    for part in parts:
        places.append(place)
        place += len(part)
    tags = layout.tags | {
        LENGTH: _numbers(order, [rows]),
        TILE_OFFSETS if layout.tiled else STRIP_OFFSETS: _numbers(order, places),
        TILE_BYTES if layout.tiled else STRIP_BYTES: _numbers(order, [len(part) for part in parts])}
    if not layout.tiled:
        tags[ROWS_PER_STRIP] = _numbers(order, [min(layout.part_rows, rows)])
    place += place % 2
    beyond = place + 2 + 12 * len(tags) + 4
    entries, values = [struct.pack(f"{order}H", len(tags))], []
    for code, (kind, count, value) in sorted(tags.items()):
        if len(value) > 4:
            values.append(value + b"\0" * (len(value) % 2))
            value = struct.pack(f"{order}I", beyond)
            beyond += len(values[-1])
        entries.append(struct.pack(f"{order}HHI", code, kind, count) + value.ljust(4, b"\0"))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, place)
    filling = b"\0" * (sum(map(len, parts)) % 2)
    return b"".join([head, *parts, filling, *entries, b"\0" * 4, *values])


def windows(bands: Iterable[np.ndarray], spans: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Cut consecutive bands of rows anew.

    Args:
        bands: arrays that follow each other along their first axis.
        spans: (start, stop) rows of each window; neither falls from one window to the next. Windows may overlap.
    Yields:
        the rows of each window, perhaps a view. Only bands of which the window or a later one needs rows are held.

    >>> [window.tolist() for window in windows([np.arange(3), np.arange(3, 8)], [(0, 2), (1, 5), (4, 8)])]
    [[0, 1], [1, 2, 3, 4], [4, 5, 6, 7]]
    """
    source, held, first, end = iter(bands), [], 0, 0  # rows first..end are held
    for start, stop in spans:
        while held and first + len(held[0]) <= start:
            first += len(held.pop(0))
        while end < stop:
            held.append(next(source))
            end += len(held[-1])
            if end <= start:
                first += len(held.pop())
        parts, place = [], first
        for band in held:
            parts.append(band[max(start - place, 0):max(stop - place, 0)])
            place += len(band)
        parts = [part for part in parts if len(part)]
        yield parts[0] if len(parts) == 1 else np.concatenate(parts)
        del parts, band  # views keep bands that are done with


def even_spans(length: int, rows: int) -> list[tuple[int, int]]:
    """Divide `length` rows into spans of `rows`, the last of which may be shorter."""
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def overview_step(height: int, width: int) -> int:
    """Return by what whole number to reduce an image so that no side exceeds OVERVIEW_SIDE."""
    return -(-max(height, width) // OVERVIEW_SIDE)


def thinned(bands: Iterable[np.ndarray], step: int) -> Iterator[np.ndarray]:
    """Yield of consecutive bands (rows, width) the pixels of every `step`-th row and column, from the first on.

    >>> [band.tolist() for band in thinned([np.arange(6).reshape(3, 2), np.arange(6, 12).reshape(3, 2)], 2)]
    [[[0], [4]], [[8]]]
    """
    top = 0
    for band in bands:
        yield band[-top % step::step, ::step]
        top += len(band)


class BandStore:
    """Keep bands compressed in a file without a name, which vanishes with the process whatever happens to it."""

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._entries: list[tuple[int, tuple[int, ...], np.dtype]] = []

    def append(self, band: np.ndarray) -> None:
        """Add an array of any shape and type. An OSError says that the disk is full."""
        data = zlib.compress(np.ascontiguousarray(band).data, 1)
        self._file.write(data)
        self._entries.append((len(data), band.shape, band.dtype))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the arrays in the order in which they came; they can be read again and again."""
        self._file.seek(0)
        for count, shape, dtype in self._entries:
            yield np.frombuffer(zlib.decompress(self._file.read(count)), dtype).reshape(shape)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def tiff_bands(path: Path) -> Iterator[np.ndarray]:
    """Yield the rows of tiles of a file that `write_tiff` wrote, from top to bottom."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        height, width = page.shape
        rows, top = np.empty((min(TILE, height), width), page.dtype), 0
        for tile, (*_, y, x, _), shape in page.segments():
            if y != top:
                yield rows
                rows, top = np.empty((min(TILE, height - y), width), page.dtype), y
            rows[:, x:x + TILE] = tile.reshape(shape[1:3])[:len(rows), :width - x]
        yield rows


def write_tiff(path: Path, bands: Iterable[np.ndarray], height: int, width: int, dtype, pixel_size: float = 0.0,
               ome: bool = False, imagej: bool = False) -> None:
    """Write consecutive bands (rows, width) as TIFF: one channel, tiles of 512x512, deflate; BigTIFF beyond 4 GB.

    Args:
        pixel_size: micrometres, as the resolution of the file; 0 where it is not known.
        ome: describe it by OME-XML.
        imagej: write strips, as ImageJ opens no tiles, and its description, without which it counts in centimetres.
    """
    size = {"PhysicalSizeX": pixel_size, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": pixel_size,
            "PhysicalSizeYUnit": "µm"} if pixel_size else {}
    resolution = {"resolution": (1e4 / pixel_size,) * 2, "resolutionunit": "CENTIMETER"} if pixel_size else {}
    large = height * width * np.dtype(dtype).itemsize > 4_000_000_000

    def tiles():
        for rows in windows(bands, even_spans(height, TILE)):
            for left in range(0, width, TILE):
                yield rows[:, left:left + TILE]

    def strips():
        for rows in windows(bands, even_spans(height, STRIP)):
            yield zlib.compress(np.ascontiguousarray(rows, dtype).data)  # tifffile takes strips that are packed

    layout = {"rowsperstrip": STRIP, "description": "ImageJ=1.53k\n" + "unit=um\n" * bool(pixel_size)} if imagej else {
        "tile": (TILE, TILE)}
    with tifffile.TiffWriter(path, bigtiff=large, ome=ome) as file:
        file.write(strips() if imagej else tiles(), shape=(height, width), dtype=dtype, photometric="minisblack",
                   compression="adobe_deflate", metadata={"axes": "YX"} | size if ome else None, **layout, **resolution)
