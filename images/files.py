"""Read and write image files: the only module that decodes one.

Images come as (H, W, C) uint8. Every refusal is an `ImageFileError` that names the file, what was found, the rule and
the remedy. What a mask means is in `images.masks`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from images import tiff
from images.tiff import READER_ERRORS, ImageFileError
from system.atomic import atomic_write
from system.errors import UserError

MAX_PIXELS = 500_000_000  # of an image, checked on its header before anything is decoded
DARK_16_BIT = 6554  # a tenth of the range
DARK = ("of 16 bit without a value above a tenth of the range, as of a camera of 12 bit, read almost black; for 12 bit "
        "pass --max_value 4095")
TURNED = "turned upright by EXIF"
DEEP = "deep"  # in the info of a picture that stands for pixels of a depth that Pillow does not know: these
UPPER_BITS = "upper bits alone"  # in the info of an image of which Pillow drops the lower 8 of 16 bit
DARK_UPPER_BITS = 17  # below this lie the upper 8 bit of 12


def image_size(path: Path, max_pixels: float = math.inf) -> tuple[int, int]:
    """Return (height, width) in pixels from the header alone; a stack, and more than `max_pixels`, are refused."""
    with opened(path, max_pixels) as image:
        turned = orientation(image) in (5, 6, 7, 8)
        # Pillow turns the size of a TIFF by itself, in newer versions.
        width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
        return (width, height) if turned else (height, width)


def load_image(path: Path, channels: int, max_pixels: int = MAX_PIXELS, max_value: int = 0) -> np.ndarray:
    """Read an image as (H, W, channels) uint8.

    Args:
        channels: 1 for luminance (ITU-R 601), 3 for RGB. Palettes are resolved and alpha is dropped. 16 bit is scaled
            by its type (65535 becomes 255), never by the values found; of a PNG with colours or transparency the upper
            8 bit are read, and one that has nothing there is refused. Floating point must lie in [0, 1].
        max_pixels: an image of more is refused before it is decoded.
        max_value: what becomes 255 instead of 65535 or 1.0; 8 bit stays as it is.
    """
    return load_and_tell(path, channels, max_pixels, max_value)[0]


def load_and_tell(path: Path, channels: int, max_pixels: float = MAX_PIXELS,
                  max_value: int = 0) -> tuple[np.ndarray, bool, str]:
    """Read as `load_image`; return also whether EXIF turned it, and in words why it comes out dark, '' if not."""
    with opened(path, max_pixels) as image:
        turned = orientation(image) != 1  # before it is loaded: a TIFF forgets it then
        raw = loaded(path, image)
        deep = image.mode.startswith("I") or raw.dtype == np.uint16
    dark = deep and raw.max() < DARK_16_BIT and not max_value
    return in_channels(path, raw, channels, max_value), turned, DARK if dark else ""


def decode_image(path: Path, file: BinaryIO, channels: int, max_value: int = 0) -> np.ndarray:
    """Read the image in an open file, e.g. one in memory, just as `load_image` reads `path`, the name in errors."""
    with _open(path, file) as image:
        return in_channels(path, loaded(path, image, file=file), channels, max_value)


def to_image(image: np.ndarray | Image.Image, channels: int, name: str = "the image",
             max_value: int = 0) -> np.ndarray:
    """Turn an image that is in memory into (H, W, channels) uint8, just as `load_image` turns a file.

    Args:
        image: (H, W), (H, W, 1) grey, (H, W, 2) grey with alpha, (H, W, 3) RGB or (H, W, 4) RGB with alpha, of bool,
            uint8, uint16 or floating point in [0, 1] (0..max_value, if that is given); or a Pillow image of any mode.
        name: what to call it in an error.
        max_value: as for `load_image`.
    Raises:
        ImageFileError: for other shapes and types.
    """
    if isinstance(image, Image.Image):
        return in_channels(name, _pixels(image), channels, max_value)
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
    return in_channels(name, raw, channels, max_value)


def save_png(path: Path, array: np.ndarray, smallest: bool = True) -> None:
    """Write (H, W), (H, W, 1) or (H, W, 3) uint8, or (H, W) uint16, as PNG; bool becomes 0/255.

    The file is whole or not there.

    Args:
        smallest: compress as well as can be; False takes a tenth of the time for files 1 to 25 % larger.
    """
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    with atomic_write(path, sync=False) as file:
        Image.fromarray(array).save(file, format="PNG", optimize=smallest, compress_level=4)


def instances_suffix(nuclei: np.ndarray) -> str:
    """Return .png for a label map, or .tif with labels above 65535, which 16 bit do not hold."""
    return ".tif" if nuclei.max(initial=0) > 65535 else ".png"


def save_instances(path: Path, nuclei: np.ndarray) -> Path:
    """Write a label map (H, W) as 16 bit PNG, or as 32 bit TIFF (see `instances_suffix`); return the path written.

    Args:
        path: the suffix .png becomes .tif where it must.
    """
    if instances_suffix(nuclei) == ".tif":
        path = Path(path).with_suffix(".tif") if Path(path).suffix == ".png" else Path(path)
        with atomic_write(path, sync=False) as file:
            Image.fromarray(nuclei.astype(np.int32)).save(file, format="TIFF")
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


def in_channels(name: Path | str, raw: np.ndarray, channels: int, max_value: int = 0) -> np.ndarray:
    """Turn (H, W) or (H, W, 3) pixels of any type that is read into (H, W, channels) uint8."""
    if channels not in (1, 3):
        raise UserError(f"channels is {channels!r}; images are read with 1 (luminance) or 3 (RGB)")
    if raw.dtype != np.uint8:
        raw = _to_8_bit(name, raw, max_value)
    image = Image.fromarray(raw)
    return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(*raw.shape[:2], channels)


def _open(path: Path, file: BinaryIO | None = None) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = None  # Pillow refuses beyond 1.8e8 pixels; `max_pixels` takes the place of that
    try:
        image = Image.open(file or path)
        image.info[UPPER_BITS] = image.format == "PNG" and not image.mode.startswith("I") and any(
            ";16" in str(tile[3]) for tile in image.tile)
        return image
    except UnidentifiedImageError:
        if path.suffix.lower() in tiff.SUFFIXES and (image := _deep_image(path, file)):
            return image
        raise ImageFileError(f"{path}: not a readable image ({path.stat().st_size} bytes); PNG, JPEG, TIFF and BMP are "
                             f"read. Export it again or remove it") from None
    except OSError as error:
        raise ImageFileError(f"{path}: cannot be opened ({error.strerror or error}). Check the file and its "
                             f"permissions" + (", or where its link points to" if path.is_symlink() else "")) from None
    except READER_ERRORS as error:
        raise ImageFileError(f"{path}: damaged or cut off ({error}). Export it again or remove it") from None


@contextlib.contextmanager
def opened(path: Path, max_pixels: float = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image whose header is checked; its pixels are still to be loaded."""
    with _open(path) as image:
        _check_header(path, image, max_pixels)
        yield image


def _deep_image(path: Path, file: BinaryIO | None) -> Image.Image | None:
    """Read a TIFF of a depth that Pillow does not know; None for what is no such TIFF."""
    try:
        raw = tiff.read_deep(path, file, alone=True)
    except ImageFileError:
        raise
    except READER_ERRORS:
        return None
    if raw is None or raw.size > 3 * MAX_PIXELS:
        return None
    if raw.ndim == 3:
        image = Image.new("RGB", raw.shape[1::-1])
        image.info[DEEP] = raw
        return image
    if raw.dtype.kind == "f":
        return Image.fromarray(raw.astype(np.float32))
    return Image.fromarray(raw.astype(np.int32)) if abs(raw.astype(float)).max() < 2 ** 31 else None


def _check_header(path: Path, image: Image.Image, max_pixels: float) -> None:
    """Refuse too many pixels, a stack of planes, of which the smaller pictures of a pyramid are none, and a film."""
    width, height = image.size
    frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "WEBP", "PNG") else 1
    if frames > 1:
        raise ImageFileError(f"{path}: an animated {image.format} of {frames} pictures; one is read. Save the one that "
                             f"you want by itself")
    planes = 1 + sum(size == image.size for size in _sizes_of_pages(image)[1:]) if image.format == "TIFF" else 1
    if planes > 1:
        raise ImageFileError(f"{path}: a stack of {planes} images of {height}x{width} pixels; one plane is read. Save "
                             f"the one that you want by itself")
    if width * height > max_pixels:
        raise ImageFileError(f"{path}: {height}x{width} pixels, {width * height:.3g} in all; at most "
                             f"{max_pixels:.3g} are decoded. Cut or reduce the image; predict_papsmear.py has "
                             f"--max_pixels")


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


def orientation(image: Image.Image) -> int:
    """Return the orientation by EXIF, 1 for upright; 1 too where these data are damaged, as the pixels may be good."""
    try:
        return image.getexif().get(0x0112, 1)
    except READER_ERRORS:
        return 1


def loaded(path: Path, image: Image.Image, palette: bool = True, file: BinaryIO | None = None,
            stored: Callable[[dict], bool] | None = None) -> np.ndarray:
    """Return the pixels of an image opened from `path`, or from `file`: (H, W) or (H, W, 3), bool or any number.

    Args:
        palette: turn palette images into their colours; False keeps the indices.
        stored: told the tags of a TIFF (number -> value) in which 0 is white, says whether values are taken as they are
            stored, not as they are shown.
    """
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if DEEP in image.info:
        return image.info[DEEP]
    try:
        raw = tiff.read_deep(path, file) if tags else None
        turned_round = raw is None and image.mode in ("1", "L")  # by Pillow, where 0 is white
        if raw is None:
            upper_bits = image.info.get(UPPER_BITS)
            image.load()
            raw = _pixels(image, palette)
            if upper_bits:
                raw = _from_upper_bits(path, raw, palette)
        elif orientation(image) != 1:
            raw = _turned(raw, orientation(image))
        if tags.get(262) == 0 and raw.ndim == 2 and raw.dtype.kind in "bu":
            as_shown = not (stored and stored(tags))
            raw = np.invert(raw) if as_shown != turned_round else raw
        return raw
    except ImageFileError:
        raise
    except READER_ERRORS as error:
        raise ImageFileError(f"{path}: damaged or cut off ({error}). Export it again or remove it") from None


def _from_upper_bits(path: Path, raw: np.ndarray, palette: bool) -> np.ndarray:
    """Return as uint16 what Pillow reads of a PNG of 16 bit with colours or transparency: the upper 8 bit of a value.

    Refused is what has nothing there, as a picture of a camera of 12 bit and a mask of 0 and 1, and what must be exact.
    """
    high = int(raw.max())
    if high < DARK_UPPER_BITS or not palette:
        raise ImageFileError(f"{path}: a PNG of 16 bit with colours or transparency, of which only the upper 8 bit can "
                             f"be read, and these hold 0..{high}. Save it as TIFF, or with 8 bit")
    return raw.astype(np.uint16) * 257


def _turned(raw: np.ndarray, way: int) -> np.ndarray:
    """Turn pixels (H, W) or (H, W, 3) of an orientation upright, as `upright` does."""
    if way in (5, 6, 7, 8):
        raw = raw.swapaxes(0, 1)
    return raw[::-1 if way in (3, 4, 7, 8) else 1, ::-1 if way in (2, 3, 6, 7) else 1]


def upright(image: Image.Image) -> Image.Image:
    """Turn a photograph as its EXIF data say."""
    return ImageOps.exif_transpose(image) if orientation(image) != 1 else image


def _pixels(image: Image.Image, palette: bool = True) -> np.ndarray:
    """Turn a photograph upright and reduce its mode to grey or RGB; see `loaded`."""
    image = upright(image)
    if image.mode == "P":
        image = image.convert("RGB") if palette else image
    elif image.mode == "LA":
        image = image.convert("L")
    elif image.mode not in ("1", "L", "RGB", "I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("RGB")
    return np.asarray(image)


def _to_8_bit(path: Path | str, raw: np.ndarray, max_value: int = 0) -> np.ndarray:
    """Scale by `max_value`, or by the type: bool, uint16 (also when held as int32), floating point in [0, 1]."""
    if raw.dtype == bool:
        return raw.astype(np.uint8) * 255
    low, high = raw.min(), raw.max()
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        raise ImageFileError(f"{path}: {np.count_nonzero(~np.isfinite(raw))} of {raw.size} values are infinite or no "
                             f"numbers (NaN). Write what these pixels are, e.g. 0")
    if max_value:
        if raw.dtype.kind == "f" and 0 < high <= 1 < max_value:
            raise ImageFileError(f"{path}: floating-point values up to {high:g} found, which lie in 0..1 already, but "
                                 f"--max_value {max_value} was given. Leave it out, or multiply by {max_value}")
        if not (low >= 0 and high <= max_value):
            raise ImageFileError(f"{path}: values {low:g}..{high:g} found, but --max_value {max_value} says what is "
                                 f"white; they must lie in 0..{max_value}. Pass the largest value that the camera "
                                 f"gives, or leave it out")
        return np.round(raw * (255 / max_value)).astype(np.uint8)
    if raw.dtype.kind == "f":
        if not (low >= 0 and high <= 1):
            raise ImageFileError(f"{path}: floating-point values {low:g}..{high:g} found; they must lie in [0, 1]. "
                                 f"Scale the image, pass what is white as --max_value, or save it with 8 or 16 bit")
        return np.round(raw * 255).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ImageFileError(f"{path}: values {low}..{high} found; whole numbers of 8 or 16 bit are read. "
                             f"Save the image with 16 bit")
    return np.round(raw / 257).astype(np.uint8)
