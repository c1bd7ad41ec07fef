"""What the values in a mask or an instance map mean: masks as bool (H, W, C), instance maps as int32 (H, W)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from images import tiff
from images.files import ImageFileError, loaded, opened, upright
from images.numbering import is_flat, odd_numbers

MAX_GREY_SHARE = 0.20  # of a mask's pixels; real JPEG masks have up to 0.07 between 64 and 191
FEW_VALUES = 32        # up to which the values of a mask are looked at one by one: JPEG and smooth edges make more
NEAR = 8               # how far values of one colour may lie apart
APART = 32             # how far JPEG moves the channels of a grey pixel apart
MASK_RULE = "a mask holds 0/255, 0/1 or boolean values"


def load_mask(path: Path, classes: int = 1) -> np.ndarray:
    """Read a mask as (H, W, classes) bool.

    With one class the file holds 0/255, 0/65535, 0/1 or boolean values; anti-aliased or JPEG grey is cut at half.
    With more classes it is a label image: 0 is background and pixels of value k belong to channel k - 1.
    Where all that is visible has one colour and transparency varies, the mask is the alpha channel. A TIFF in which 0
    is white is read as it is shown, unless ImageJ wrote it, tifffile wrote it from booleans, or it holds labels: then
    as it is stored.
    This is where a mask becomes {0, 1}.
    """
    raw = _values(path, classes == 1, tiff.inverts_when_shown if classes == 1 else _always)
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
    values are whole. Values are taken as they are stored, whatever colour they are shown in.
    """
    if is_lossy(path):
        raise ImageFileError(f"{path}: compressed as JPEG, which changes numbers near edges; an instance map needs "
                             f"them as they were. Save the labels as PNG or TIFF")
    raw = _values(path, palette=False, stored=_always)
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


def load_drawn(path: Path) -> tuple[np.ndarray, bool, str]:
    """Read an instance map, or a mask in its place, and tell which it is.

    A mask is what `load_mask` reads, if its numbers are not those of nuclei or no number but its largest fills an area.

    Returns:
        (H, W) int32, of 0 and 1 for a mask and for what holds one number alone; whether it is a mask for certain, which
        one number is if it is 255 or 65535; and what is odd about the numbers, '' for nothing.
    Raises:
        ImageFileError: also for numbers of classes and for values between numbers, which are no nuclei.
    """
    try:
        mask = load_mask(path)[..., 0].astype(np.int32)
    except ImageFileError:
        if is_lossy(path):
            raise
        mask = None
    try:
        labels = load_instances(path)
    except ImageFileError:
        if mask is None:
            raise
        return mask, True, ""
    numbers = np.unique(labels[labels > 0])
    if len(numbers) < 2:
        one = (labels > 0).astype(np.int32) if mask is None else mask
        return one, numbers.max(initial=0) in (255, 65535), ""
    filling = np.unique(labels[is_flat(labels) & (labels > 0)])
    if mask is not None and filling.tolist() == [numbers[-1]]:
        return mask, True, ""
    odd, most = odd_numbers(labels)
    if most and mask is not None:
        return mask, True, ""
    if most:
        raise ImageFileError(f"{path}: {odd}; an instance map has a whole number for each nucleus and nothing between. "
                             f"Number the nuclei, or write 255 for them and 0 for all else")
    return labels, False, f"{odd}; each number counts as one nucleus" if odd else ""


def is_lossy(path: Path) -> bool:
    """Tell whether the values of a file went through JPEG, so that a value near another may have been that other."""
    with opened(path) as image:
        return image.format in ("JPEG", "MPO") or image.format == "TIFF" and tiff.is_lossy(image.tag_v2)


def how_it_is_read(path: Path) -> str:
    """Return what a user may not expect of how a binary mask is read, '' if there is nothing."""
    with opened(path) as image:
        if image.format == "TIFF" and image.tag_v2.get(262) == 0:
            return ("in which 0 is stored for white, read as ImageJ and tifffile mean it: as it is stored"
                    if tiff.inverts_when_shown(image.tag_v2) else
                    "in which 0 is stored for white, read as it is shown: white is foreground")
        alpha = _alpha(image)
        if alpha is not None and _meaning_of_alpha(path, loaded(path, image), alpha) is not None:
            return "of one colour with varying transparency, read from the alpha channel: opaque is foreground"
    return ""


def _always(tags) -> bool:
    """Say of a TIFF in which 0 is white that stored values count."""
    return True


def _values(path: Path, palette: bool, stored: Callable[[dict], bool]) -> np.ndarray:
    """Return what a file says at each pixel: its colours, or its transparency where that is the mask."""
    with opened(path) as image:
        raw = loaded(path, image, palette, stored=stored)
        alpha = _alpha(image)
    meaning = None if alpha is None else _meaning_of_alpha(path, raw, alpha)
    return raw if meaning is None else meaning


def _alpha(image: Image.Image) -> np.ndarray | None:
    """Return the alpha channel (H, W) uint8 of an image that has one, with all degrees of transparency; else None."""
    if image.mode not in ("LA", "PA", "La", "RGBA", "RGBa") and "transparency" not in image.info:
        return None
    alpha = np.asarray(upright(image).convert("RGBA").getchannel("A"))
    return alpha if alpha.min() < alpha.max() else None


def _meaning_of_alpha(path: Path, raw: np.ndarray, alpha: np.ndarray) -> np.ndarray | None:
    """Return the alpha channel if it is the mask, or None if the colours are.

    Colours are where all that is transparent is 0 and nothing else is, so that alpha says the same.
    """
    colours = raw.reshape(*alpha.shape, -1).astype(float)
    visible = alpha > 0
    if not colours[~visible].any() and colours[visible].any(axis=-1).all():
        return None
    shown = colours[visible]
    if np.ptp(shown, axis=0).max() <= NEAR:
        return alpha
    raise ImageFileError(f"{path}: both its colours and its transparency vary, so it is not known which is the mask; "
                         f"{MASK_RULE}. Save it without an alpha channel")


def _grey_of_mask(path: Path, raw: np.ndarray) -> np.ndarray:
    """Reduce an RGB mask to one plane; its three channels must agree, but for what JPEG changes."""
    spread = int((raw.max(axis=2).astype(int) - raw.min(axis=2)).max())
    if spread > (APART if raw.max() > 2 * APART else 0):  # small numbers are labels, in one channel or more
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
    # Labels and instance numbers make flat areas of other values than two; edges, smoothed or from JPEG, do not. JPEG
    # makes some near the two, and many values.
    values = np.unique(raw)
    low = 0 if len(values) <= FEW_VALUES and not is_lossy(path) else 0.1 * full
    labels = np.unique(raw[is_flat(raw) & (raw > low) & (raw < 0.9 * full)])
    if high < 0.75 * full or len(labels):
        classes = f", or pass --out_channels {high} if its values 1..{high} are classes" if high <= 8 else ""
        ignored = f". If {full} marks pixels to ignore, decide for each whether it is 0 or 255" if high == full else ""
        raise ImageFileError(f"{path}: label values {_listed(values)} found; {MASK_RULE}. If every object has its own "
                             f"number, write 255 where it is above 0{classes}{ignored}")
    grey = float(((raw > 0.25 * full) & (raw < 0.75 * full)).mean())
    if grey > MAX_GREY_SHARE:
        raise ImageFileError(f"{path}: {grey:.0%} of the pixels are grey (between a quarter and three quarters of "
                             f"{full}); at most {MAX_GREY_SHARE:.0%} may be, and {MASK_RULE}. Is it an image, not a "
                             f"mask? Otherwise threshold it yourself")
    return raw >= full / 2


def _listed(values: np.ndarray) -> str:
    shown = ", ".join(f"{v:g}" for v in values[:6])
    return f"{{{shown}{', ...' if len(values) > 6 else ''}}}"
