"""Whether the numbers of an instance map stand for nuclei, each for one."""

import numpy as np
from scipy import ndimage

SIMILAR = 0.1  # of the largest piece of a number: a second one of this size is no stray pixel


def is_flat(raw: np.ndarray) -> np.ndarray:
    """Tell of each pixel of (H, W) whether it and its eight neighbours have one value."""
    return ndimage.maximum_filter(raw, 3) == ndimage.minimum_filter(raw, 3)


def odd_numbers(labels: np.ndarray) -> tuple[str, bool]:
    """Return what is odd about the numbers of (H, W) int, 0 for background, '' for nothing; and whether most are.

    Odd are numbers that several separate pieces share and that lie one within another, as those of classes, and pieces
    that are but the edge of another, as smoothing, resizing and JPEG make them.
    """
    from skimage.measure import label  # takes a second, and training does without

    pieces, count = label(labels, connectivity=2, return_num=True)
    if not count:
        return "", False
    number = np.zeros(count + 1, np.int64)
    number[pieces] = labels
    names = len(np.unique(number[1:]))
    touching, enclosed = _meeting(pieces, count)
    thin = np.bincount(pieces[is_flat(labels)], minlength=count + 1) == 0
    between = np.flatnonzero(thin & touching)
    if len(between) > count / 2:
        return (f"{names} numbers in {count} pieces, most of them thin and at the edge of another, e.g. number "
                f"{number[between[0]]}, as smooth edges, resizing and JPEG make them", True)
    inner = np.flatnonzero(enclosed & ~thin)
    if len(inner) >= count / 2:
        return (f"{len(inner)} of {count} pieces, e.g. of number {number[inner[0]]}, lie within another, as of classes",
                True)
    shared = _shared(number, np.bincount(pieces.ravel(), minlength=count + 1))
    if len(shared):
        return (f"{len(shared)} of {names} numbers, e.g. {shared[0]}, stand for several separate pieces",
                len(shared) > names / 2)
    return "", False


def _meeting(pieces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tell of each of the pieces 0..count whether it touches another, and whether it lies within one other."""
    met = []
    for one, other in ((pieces[1:], pieces[:-1]), (pieces[:, 1:], pieces[:, :-1])):
        differ = one != other
        met += [one[differ] * (count + 1) + other[differ], other[differ] * (count + 1) + one[differ]]
    piece, neighbour = np.divmod(np.unique(np.concatenate(met)), count + 1)
    touching = np.bincount(piece[neighbour > 0], minlength=count + 1) > 0
    at_edge = np.isin(np.arange(count + 1), np.concatenate([pieces[[0, -1]].ravel(), pieces[:, [0, -1]].ravel()]))
    enclosed = touching & (np.bincount(piece, minlength=count + 1) == 1) & ~at_edge
    touching[0] = enclosed[0] = False
    return touching, enclosed


def _shared(number: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Return the numbers of which the second largest piece is no stray one.

    Args:
        number, areas: (pieces + 1,), of each piece; the first is the background.
    """
    order = np.lexsort((-areas[1:], number[1:])) + 1  # by number, the largest piece first
    number, areas = number[order], areas[order]
    new = np.append(True, number[1:] != number[:-1])
    second = np.flatnonzero(~new[1:] & new[:-1]) + 1
    return number[second[areas[second] >= SIMILAR * areas[second - 1]]]
