"""Read and write images and masks: the only module that decodes an image file.

Images come as uint8, masks as bool, both (H, W, C); instance maps as int32 (H, W). Every refusal is an
`ImageFileError` that names the file, what was found, the rule and the remedy.
"""

import logging
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from system.errors import UserError

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is said once, by an error

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

MAX_PIXELS = 500_000_000  # of an image, checked on its header before anything is decoded
MAX_GREY_SHARE = 0.20  # of a mask's pixels; real JPEG masks have up to 0.07 between 64 and 191
READER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error)  # at damaged files
MASK_RULE = "a mask holds 0/255, 0/1 or boolean values"


class ImageFileError(UserError):
    """A file that cannot serve as image or mask."""


def has_suffix(path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> bool:
    """Tell whether a name ends so, in small letters or large; hidden files, such as macOS leaves, count as no file."""
    return path.suffix.lower() in suffixes and not path.name.startswith(".")


def image_size(path: Path, max_pixels: float = math.inf) -> tuple[int, int]:
    """Return (height, width) in pixels from the header alone; a stack, and more than `max_pixels`, are refused."""
    with _open(path) as image:
        _check_header(path, image, max_pixels)
        turned = _orientation(image) in (5, 6, 7, 8)
        # Pillow turns the size of a TIFF by itself, in newer versions.
        width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
        return (width, height) if turned else (height, width)


def load_image(path: Path, channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image as (H, W, channels) uint8.

    Args:
        channels: 1 for luminance (ITU-R 601), 3 for RGB. Palettes are resolved and alpha is dropped. 16 bit is scaled
            by its type (65535 becomes 255), never by the values found; floating point must lie in [0, 1].
        max_pixels: an image of more is refused before it is decoded.
    """
    return _in_channels(path, _decode(path, max_pixels), channels)


def decode_image(path: Path, file: BinaryIO, channels: int) -> np.ndarray:
    """Read the image in an open file, e.g. one in memory, just as `load_image` reads `path`, the name in errors."""
    with _open(path, file) as image:
        return _in_channels(path, _loaded(path, image, file=file), channels)


def to_image(image: np.ndarray | Image.Image, channels: int, name: str = "the image") -> np.ndarray:
    """Turn an image that is in memory into (H, W, channels) uint8, just as `load_image` turns a file.

    Args:
        image: (H, W), (H, W, 1) grey, (H, W, 2) grey with alpha, (H, W, 3) RGB or (H, W, 4) RGB with alpha, of bool,
            uint8, uint16 or floating point in [0, 1]; or a Pillow image of any mode.
        name: what to call it in an error.
    Raises:
        ImageFileError: for other shapes and types.
    """
    if isinstance(image, Image.Image):
        return _in_channels(name, _pixels(image), channels)
    raw = np.asarray(image)
    if raw.dtype.kind not in "buf" or raw.dtype.kind == "u" and raw.dtype.itemsize > 2:
        raise ImageFileError(f"{name}: an array of {raw.dtype}; bool, uint8, uint16 and floating point in [0, 1] are "
                             f"read. Convert it, e.g. with .astype(np.uint8) if it holds 0..255")
    if raw.ndim == 3 and raw.shape[2] in (1, 2):
        raw = raw[..., 0]
    if raw.ndim == 3 and raw.shape[2] == 4:
        raw = raw[..., :3]
    if raw.ndim not in (2, 3) or raw.ndim == 3 and raw.shape[2] != 3 or not raw.size:
        raise ImageFileError(f"{name}: an array of shape {np.shape(image)}; grey is (H, W), colour (H, W, 3), and both "
                             f"sides are at least 1. From (C, H, W) use .transpose(1, 2, 0)")
    return _in_channels(name, raw, channels)


def load_mask(path: Path, classes: int = 1) -> np.ndarray:
    """Read a mask as (H, W, classes) bool.

    With one class the file holds 0/255, 0/1 or boolean values; anti-aliased or JPEG grey is cut at half. With more
    classes it is a label image: 0 is background and pixels of value k belong to channel k - 1.
    This is where a mask becomes {0, 1}.
    """
    raw = _decode(path, palette=classes == 1)
    if raw.ndim == 3:
        raw = _grey_of_mask(path, raw)
    if classes == 1:
        return _binary(path, raw)[..., None]
    values = np.unique(raw)
    if raw.dtype.kind == "f" or values.min() < 0 or values.max() > classes:
        raise ImageFileError(f"{path}: label values {_listed(values)} found; with {classes} classes a mask holds whole "
                             f"numbers 0..{classes}, 0 for background. Renumber the labels, or pass --out_channels 1 "
                             f"for a 0/255 mask")
    return np.stack([raw == k for k in range(1, classes + 1)], axis=-1)


def load_instances(path: Path) -> np.ndarray:
    """Read an instance map as (H, W) int32: 0 is background, every nucleus has a whole number of its own.

    Takes what Fiji, napari, StarDist and Cellpose write: 8, 16 or 32 bit, palettes by index, and floating point if all
    values are whole.
    """
    raw = _decode(path, palette=False)
    if raw.ndim == 3:
        raise ImageFileError(f"{path}: a colour image; an instance map has one channel, 0 for background and a whole "
                             f"number for each nucleus. Save the labels themselves, not a picture of them")
    if raw.dtype.kind == "f" and not np.array_equal(raw, np.round(raw)):  # not a number differs from itself
        raise ImageFileError(f"{path}: values that are not whole, e.g. {raw[raw != np.round(raw)][0]:g}; an instance "
                             f"map holds whole numbers, 0 for background. Is it a probability map? Save the labels")
    if raw.min() < 0 or raw.max() >= 2 ** 31:
        raise ImageFileError(f"{path}: labels {raw.min():g}..{raw.max():g} found; 0 is background and nuclei count "
                             f"from 1. Renumber the labels")
    return raw.astype(np.int32)


def save_png(path: Path, array: np.ndarray, smallest: bool = True) -> None:
    """Write (H, W), (H, W, 1) or (H, W, 3) uint8, or (H, W) uint16, as PNG; bool becomes 0/255.

    Args:
        smallest: compress as well as can be; False takes a tenth of the time for files 1 to 25 % larger.
    """
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    Image.fromarray(array).save(path, format="PNG", optimize=smallest, compress_level=4)


def save_instances(path: Path, nuclei: np.ndarray) -> Path:
    """Write a label map (H, W) as 16 bit PNG, or, with labels above 65535, as 32 bit TIFF; return the path written."""
    if nuclei.size and nuclei.max() > 65535:
        path = Path(path).with_suffix(".tif")
        Image.fromarray(nuclei.astype(np.int32)).save(path)
    else:
        save_png(path, nuclei.astype(np.uint16), smallest=False)
    return path


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """Bring (H, W, C) uint8 to (side, side, C): area means where it shrinks, bilinear where it grows.

    For a mask in 0/255 the result is its area fraction on that scale.
    """
    height, width, channels = image.shape
    if (height, width) == (side, side):
        return image

    def along(plane: Image.Image, size: tuple[int, int], shrinks: bool) -> Image.Image:
        return plane.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR)

    planes = []
    for c in range(channels):
        plane = along(Image.fromarray(np.ascontiguousarray(image[..., c])), (side, height), width > side)
        planes.append(np.asarray(along(plane, (side, side), height > side)))
    return np.stack(planes, axis=-1)


def _in_channels(name: Path | str, raw: np.ndarray, channels: int) -> np.ndarray:
    """Turn (H, W) or (H, W, 3) pixels of any type that is read into (H, W, channels) uint8."""
    if channels not in (1, 3):
        raise UserError(f"channels is {channels!r}; images are read with 1 (luminance) or 3 (RGB)")
    if raw.dtype != np.uint8:
        raw = _to_8_bit(name, raw)
    image = Image.fromarray(raw)
    return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(*raw.shape[:2], channels)


def _open(path: Path, file: BinaryIO | None = None) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = None  # Pillow refuses beyond 1.8e8 pixels; `max_pixels` takes the place of that
    try:
        return Image.open(file or path)
    except UnidentifiedImageError:
        image = _unusual_tiff(path) if not file and path.suffix.lower() in (".tif", ".tiff") else None
        if image:
            return image
        raise ImageFileError(f"{path}: not a readable image ({path.stat().st_size} bytes); PNG, JPEG, TIFF and BMP are "
                             f"read. Export it again or remove it") from None
    except OSError as error:
        raise ImageFileError(f"{path}: cannot be opened ({error}). Check the file and its permissions") from None
    except READER_ERRORS as error:
        raise ImageFileError(f"{path}: damaged or cut off ({error}). Export it again or remove it") from None


def _decode(path: Path, max_pixels: int = MAX_PIXELS, palette: bool = True) -> np.ndarray:
    """Return the pixels of the first frame: (H, W) or (H, W, 3), bool, uint8, uint16, int32 or float32.

    Args:
        max_pixels: an image of more is refused before it is decoded.
        palette: turn palette images into their colours; False keeps the indices.
    """
    with _open(path) as image:
        _check_header(path, image, max_pixels)
        return _loaded(path, image, palette)


def _unusual_tiff(path: Path) -> Image.Image | None:
    """Read a grey TIFF of 64 bit, or of 32 bit in an order of bytes that Pillow does not know; None for all else."""
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            raw = page.asarray() if len(page.shape) == 2 and page.size <= MAX_PIXELS else np.zeros(0)
    except READER_ERRORS:  # no TIFF at all, too
        return None
    if raw.ndim != 2 or not raw.size or raw.dtype.kind not in "iuf":
        return None
    if raw.dtype.kind == "f":
        return Image.fromarray(raw.astype(np.float32))
    return Image.fromarray(raw.astype(np.int32)) if abs(raw).max() < 2 ** 31 else None


def _check_header(path: Path, image: Image.Image, max_pixels: float) -> None:
    """Refuse too many pixels, and a stack of planes; the smaller pictures of a pyramid are none."""
    width, height = image.size
    planes = 1 + sum(size == image.size for size in _sizes_of_pages(image)[1:]) if image.format == "TIFF" else 1
    if planes > 1:
        raise ImageFileError(f"{path}: a stack of {planes} images of {height}x{width} pixels; one plane is read. Save "
                             f"the one that you want by itself")
    if width * height > max_pixels:
        raise ImageFileError(f"{path}: {height}x{width} pixels, {width * height:.3g} in all; at most "
                             f"{max_pixels:.3g} are decoded. Cut or reduce the image, or raise --max_pixels if the "
                             f"memory is there")


def _sizes_of_pages(image: Image.Image) -> list[tuple[int, int]]:
    """Return the size of every page of a TIFF, up to the first one that is damaged."""
    sizes = [image.size]
    try:
        for page in range(1, image.n_frames):
            image.seek(page)
            sizes.append(image.size)
    except (*READER_ERRORS, EOFError):
        pass  # the first page may be good all the same
    if len(sizes) > 1:
        image.seek(0)
    return sizes


def _orientation(image: Image.Image) -> int:
    """Return the orientation by EXIF, 1 for upright; 1 too where these data are damaged, as the pixels may be good."""
    try:
        return image.getexif().get(0x0112, 1)
    except READER_ERRORS:
        return 1


def _loaded(path: Path, image: Image.Image, palette: bool = True, file: BinaryIO | None = None) -> np.ndarray:
    """Return the pixels of an image opened from `path`, or from `file`; see `_decode`."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    deep = max(tags.get(258, (8,))) > 8
    try:
        if deep and tags.get(284) == 2 and tags.get(259, 1) == 1:  # uncompressed planes, which Pillow reads wrongly
            if file:
                file.seek(0)
            return np.moveaxis(tifffile.imread(file or path, key=0), 0, -1)[..., :3]
        image.load()
        raw = _pixels(image, palette)
        inverted = tags.get(262) == 0 and image.mode.startswith("I;16")  # 0 is white, which Pillow knows for 8 bit only
        return 65535 - raw if inverted else raw
    except READER_ERRORS as error:
        raise ImageFileError(f"{path}: damaged or cut off ({error}). Export it again or remove it") from None


def _pixels(image: Image.Image, palette: bool = True) -> np.ndarray:
    """Turn a photograph upright and reduce its mode to grey or RGB; see `_decode`."""
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "P":
        image = image.convert("RGB") if palette else image
    elif image.mode == "LA":
        image = image.convert("L")
    elif image.mode not in ("1", "L", "RGB", "I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("RGB")
    return np.asarray(image)


def _to_8_bit(path: Path | str, raw: np.ndarray) -> np.ndarray:
    """Scale by the type: bool, uint16 (also when held as int32) or floating point in [0, 1] to uint8."""
    if raw.dtype == bool:
        return raw.astype(np.uint8) * 255
    low, high = raw.min(), raw.max()
    if raw.dtype.kind == "f":
        if not (low >= 0 and high <= 1):
            raise ImageFileError(f"{path}: floating-point values {low:g}..{high:g} found; they must lie in [0, 1]. "
                                 f"Scale the image or save it with 8 or 16 bit")
        return np.round(raw * 255).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ImageFileError(f"{path}: values {low}..{high} found; whole numbers of 8 or 16 bit are read. "
                             f"Save the image with 16 bit")
    return np.round(raw / 257).astype(np.uint8)


def _grey_of_mask(path: Path, raw: np.ndarray) -> np.ndarray:
    """Reduce an RGB mask to one plane; its three channels must agree, as they do in a grey file saved as RGB."""
    spread = int((raw.max(axis=2).astype(int) - raw.min(axis=2)).max())
    if spread > 32:
        colours = np.unique(raw.reshape(-1, 3), axis=0)
        example = tuple(int(v) for v in colours[-1])
        raise ImageFileError(f"{path}: a colour-coded mask ({len(colours)} colours, e.g. {example}); {MASK_RULE}. "
                             f"Write the colour of your target as 255 and all else as 0")
    return raw[..., 1]


def _binary(path: Path, raw: np.ndarray) -> np.ndarray:
    """Cut a grey plane at half, or say why it is no binary mask."""
    if raw.dtype == bool:
        return raw
    high = raw.max()
    if raw.min() < 0 or raw.dtype.kind == "f":
        raise ImageFileError(f"{path}: {raw.dtype} values {raw.min():g}..{high:g} found; {MASK_RULE}. "
                             f"Save it as 8 bit PNG with 0 and 255")
    if high <= 1:
        return raw > 0
    full = 255 if high <= 255 else 65535
    # Labels and instance numbers make flat areas of middling values; edges, smoothed or from JPEG, do not.
    flat = ndimage.maximum_filter(raw, 3) == ndimage.minimum_filter(raw, 3)
    labels = np.unique(raw[flat & (raw > 0.1 * full) & (raw < 0.9 * full)])
    if high < 0.75 * full or len(labels):
        values = np.unique(raw)
        classes = f", or pass --out_channels {high} if its values 1..{high} are classes" if high <= 8 else ""
        raise ImageFileError(f"{path}: label values {_listed(values)} found; {MASK_RULE}. If every object has its own "
                             f"number, write 255 where it is above 0{classes}")
    grey = float(((raw > 0.25 * full) & (raw < 0.75 * full)).mean())
    if grey > MAX_GREY_SHARE:
        raise ImageFileError(f"{path}: {grey:.0%} of the pixels are grey (between a quarter and three quarters of "
                             f"{full}); at most {MAX_GREY_SHARE:.0%} may be, and {MASK_RULE}. Is it an image, not a "
                             f"mask? Otherwise threshold it yourself")
    return raw >= full / 2


def _listed(values: np.ndarray) -> str:
    shown = ", ".join(f"{v:g}" for v in values[:6])
    return f"{{{shown}{', ...' if len(values) > 6 else ''}}}"
