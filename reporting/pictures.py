"""Pictures as part of a page: data URIs, and outlines as paths that stay thin at any size."""

import base64
import io

import numpy as np
from PIL import Image
from scipy import ndimage

from nuclei.tracing import rings
from scoring.cases import QUALITY, Case

# Palette of an error map: neither, both, missed (drawn alone), extra (found alone).
ERRORS = ((18, 18, 24), (150, 150, 150), (0, 178, 255), (255, 140, 0))
MOST_PARTS = 300


def photo(image: np.ndarray) -> str:
    """Return an image (H, W, C) uint8, C 1 or 3, as a JPEG data URI."""
    return _uri(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), "JPEG", quality=QUALITY)


def grey(values: np.ndarray) -> str:
    """Return (H, W) uint8 as a PNG data URI."""
    return _uri(Image.fromarray(values), "PNG")


def error_map(drawn: np.ndarray, found: np.ndarray) -> str:
    """Return a picture of what two masks (H, W) bool share, and what one of them has alone, as a PNG data URI."""
    kinds = np.where(drawn, np.where(found, 1, 2), np.where(found, 3, 0)).astype(np.uint8)
    image = Image.frombytes("P", kinds.shape[::-1], kinds.tobytes())
    image.putpalette([value for colour in ERRORS for value in colour])
    return _uri(image, "PNG", bits=2)


def outline_path(mask: np.ndarray) -> str:
    """Return the outlines of a mask (H, W) bool along the edges of its pixels, as the `d` of an SVG path.

    Of a mask of more than MOST_PARTS parts, as an untrained network finds them, the largest are outlined.
    """
    parts, count = ndimage.label(mask)
    if count > MOST_PARTS:
        sizes = np.bincount(parts.ravel())
        mask = mask & (sizes[parts] >= np.sort(sizes[1:])[-MOST_PARTS])
    path = []
    for ring in rings(mask):
        (row, column), *rest = ring.tolist()
        path.append(f"M{column} {row}")
        for next_row, next_column in rest:
            path.append(f"h{next_column - column}" if next_row == row else f"v{next_row - row}")
            row, column = next_row, next_column
        path.append("z")
    return "".join(path)


def pixel_errors(case: Case, threshold: float, channel: int = 0) -> tuple[int, int]:
    """Return how many pixels were missed, and how many are extra."""
    drawn, found = case.masks[channel], case.found(threshold)[channel]
    return int((drawn & ~found).sum()), int((found & ~drawn).sum())


def _uri(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
