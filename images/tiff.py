"""What Pillow reads wrongly of a TIFF, or not at all, is read by tifffile: deep, signed and floating-point pixels.

Without the package imagecodecs tifffile knows no LZW and few other compressions; then Pillow reads what it can.
"""

import logging
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile

from system.errors import UserError

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is said once, by an error

SUFFIXES = (".tif", ".tiff")
PLAIN = (0, 1, 2)  # photometric interpretations: grey from white, grey from black, RGB
JPEG_COMPRESSIONS = (6, 7, 33007, 34892)
CODEC_MISSING = "imagecodecs"  # in what tifffile says
# What was seen to be raised at damaged files.
READER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, struct.error)


class ImageFileError(UserError):
    """A file that cannot serve as image or mask."""


def read_deep(path: Path, file: BinaryIO | None = None, alone: bool = False) -> np.ndarray | None:
    """Return the stored pixels of a TIFF, (H, W) or (H, W, 3), not turned; None for what Pillow reads well.

    That is all but pixels of more than 8 bit, signed ones and floating point, grey or RGB, and uncompressed ones that
    are to be turned by a quarter, of which Pillow 13 mixes up the rows. Alpha is dropped.

    Args:
        path: for messages, and to be read.
        file: an open one, to be read instead.
        alone: whether Pillow cannot read the file at all.
    Raises:
        ImageFileError: for parts that were never written, whatever the depth, and for complex numbers.
        READER_ERRORS: for what is damaged.
    """
    if file:
        file.seek(0)
    with tifffile.TiffFile(file or path) as opened:
        page = opened.pages[0]
        _refuse_missing_parts(path, page)
        turned = page.compression == 1 and page.tags.valueof(274, 1) in (5, 6, 7, 8)
        if not turned and (page.photometric not in PLAIN or page.bitspersample <= 8 and page.sampleformat == 1):
            return None
        if turned and (page.photometric not in PLAIN or page.bitspersample < 8):
            raise ImageFileError(f"{path}: an uncompressed TIFF of {page.bitspersample} bit and kind "
                                 f"{getattr(page.photometric, 'name', page.photometric)}, to be turned by a quarter, "
                                 f"which is not read. Save it upright, as PNG")
        try:
            raw = page.asarray()
        except ValueError as error:
            if CODEC_MISSING not in str(error):
                raise
            swapped = opened.byteorder == ">" and (page.sampleformat, page.bitspersample) != (1, 16)
            if alone or swapped:  # Pillow takes the bytes of some of these in the wrong order
                raise ImageFileError(f"{path}: a TIFF of {page.dtype}, compressed by "
                                     f"{getattr(page.compression, 'name', page.compression)}, which is read with the "
                                     f"package imagecodecs alone. Say pip install imagecodecs, or save the image "
                                     f"without compression") from None
            return None
        planes_first = page.planarconfig == 2 and raw.ndim == 3
    if raw.dtype.kind not in "iuf":
        raise ImageFileError(f"{path}: values of {raw.dtype}; whole numbers and floating point are read. Save the "
                             f"part that you want by itself")
    if planes_first:
        raw = np.moveaxis(raw, 0, -1)
    if raw.ndim == 3:
        raw = raw[..., 0] if raw.shape[2] < 3 else raw[..., :3]
    return raw.astype(raw.dtype.newbyteorder("="))


def _refuse_missing_parts(path: Path, page: tifffile.TiffPage) -> None:
    """Refuse a page of which strips or tiles have no bytes: the reader would take other bytes of the file for them."""
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    missing = sum(not offset or not count for offset, count in parts)
    if missing:
        kind = "tiles" if page.is_tiled else "strips"
        raise ImageFileError(f"{path}: {missing} of {len(parts)} {kind} were never written, so what they show is "
                             f"unknown. Export it again with all of them, or cut out the region that is there")


def inverts_when_shown(tags) -> bool:
    """Tell whether stored values are not meant as they are shown: 0 is white, but ImageJ measures what is stored.

    tifffile too says of an array of True and False that 0 is white, and stores True as 1.

    Args:
        tags: of a page, number -> value.
    """
    by_imagej = str(tags.get(270, "")).startswith("ImageJ=")
    of_booleans = str(tags.get(305, "")).startswith("tifffile") and np.max(tags.get(258, 1)) == 1
    return tags.get(262) == 0 and (by_imagej or of_booleans)


def is_lossy(tags) -> bool:
    """Tell whether pixels are compressed as JPEG, which changes values."""
    return tags.get(259) in JPEG_COMPRESSIONS
