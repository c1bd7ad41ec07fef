"""What the network is taught of an image: the mask of each class and, if asked for, the boundaries of the nuclei.

Nuclei that touch are one region in a mask. With the target `boundary` the network gets one output channel more, the
last one, for the rim of every nucleus; where the rims of two nuclei meet,
`nuclei.separation.separate_nuclei` divides them.
"""

from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.segmentation import find_boundaries

from images.files import ImageFileError
from images.listing import file_named
from images.masks import load_instances, load_mask
from images.numbering import odd_numbers
from images.pairs import KINDS, Pair
from images.recipe import MASK

ALIKE = 0.8  # IoU of a mask and its instance map, below which they do not show the same nuclei
RIM = 2 / 256  # width of the rim inside a nucleus, as a share of the image's longer side: 2 pixels at 256


def load_target(pair: Pair, classes: int, targets: tuple[str, ...] = MASK) -> np.ndarray:
    """Read what is to be learnt about one image: (H, W, K) bool, the classes first, the boundary last.

    Raises:
        ImageFileError: for a mask or an instance map that cannot serve.
    """
    mask = load_mask(pair.mask, classes)
    if "boundary" not in targets:
        return mask
    rim = rims(drawn_nuclei(pair, mask[..., 0]), max(1.0, max(mask.shape[:2]) * RIM))
    return np.concatenate([mask, rim[..., None]], axis=2)


def rims(nuclei: np.ndarray, width: float) -> np.ndarray:
    """Return the pixels (H, W) bool of nuclei that lie within `width` pixels of what is outside their nucleus.

    Args:
        nuclei: (H, W) label map, 0 for background. The image's edge is no outside: there a nucleus is cut, not ended.
        width: at least 1.
    """
    outlines = find_boundaries(nuclei, mode="inner")
    if not outlines.any():
        return outlines
    return (nuclei > 0) & (ndimage.distance_transform_edt(~outlines) <= width - 1)


def instance_file(pair: Pair) -> Path | None:
    """Return the instance map that lies in `instances` beside `images`, if there is one."""
    return file_named(pair.image.parent.parent / KINDS[2], pair.name)


def drawn_nuclei(pair: Pair, mask: np.ndarray) -> np.ndarray:
    """Return the drawn nuclei (H, W) as a label map: from the file, else the connected parts of the mask (H, W) bool.

    Pixels hang together over edges and corners.
    """
    path = instance_file(pair)
    if path is None:
        return ndimage.label(mask, structure=np.ones((3, 3)))[0]
    labels = load_instances(path)
    if labels.shape != mask.shape:
        raise ImageFileError(f"{path}: {labels.shape[0]}x{labels.shape[1]} pixels, but the mask {pair.mask} has "
                             f"{mask.shape[0]}x{mask.shape[1]}; both must have one size. Prepare the data set again")
    return labels


def odd_instances(pair: Pair, mask: np.ndarray) -> str:
    """Return what speaks against the instance map beside an image with this mask (H, W) bool, '' for nothing."""
    if instance_file(pair) is None:
        return ""
    try:
        labels = drawn_nuclei(pair, mask)
    except ImageFileError:
        return "that cannot be read, or have another size than their masks, which scores of nuclei refuse"
    either = np.count_nonzero((labels > 0) | mask)
    if either and np.count_nonzero((labels > 0) & mask) < ALIKE * either:
        return f"whose nuclei are not those of the masks (IoU below {ALIKE:g}); scores of nuclei count the instance map"
    return "whose numbers are not those of nuclei: most stand for several separate pieces, or lie between others" \
        if odd_numbers(labels)[1] else ""
