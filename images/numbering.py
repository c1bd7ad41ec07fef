"""Whether the numbers of an instance map stand for nuclei, each for one."""

import numpy as np
from scipy import ndimage

SIMILAR = 0.1   # of the largest piece of a number: a second one of this size is no stray pixel
MANY_SHARED = 3  # numbers that several pieces share, and
MANY_PIECES = 4  # pieces beyond one a number, from which on it is no chance: a nucleus may be cut in two by another


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
    touching, enclosed, at_edge = _meeting(pieces, count)
    thin = np.bincount(pieces[is_flat(labels)], minlength=count + 1) == 0
    between = np.flatnonzero(thin & touching)
    if len(between) > max(count / 2, names):
        return (f"{names} numbers in {count} pieces, most of them thin and at the edge of another, e.g. number "
                f"{number[between[0]]}, as from smoothing, JPEG or resizing (labels are resized by the nearest "
                f"neighbour)", True)
    areas = np.bincount(pieces.ravel(), minlength=count + 1)
    order = np.lexsort((-areas[1:], number[1:])) + 1  # by number, the largest piece first
    largest = order[np.append(True, number[order[1:]] != number[order[:-1]])]
    inner = largest[enclosed[largest] & ~thin[largest]]
    if len(inner) >= names / 2:
        return f"{len(inner)} of {names} numbers, e.g. {number[inner[0]]}, lie within another, as of classes", True
    size = np.zeros(number.max() + 1, np.int64)
    size[number[largest]] = areas[largest]
    # A nucleus at the edge of the image may come in twice.
    whole = np.flatnonzero((np.arange(count + 1) > 0) & (areas >= SIMILAR * size[number]) & ~at_edge)
    shared, of_each = np.unique(number[whole], return_counts=True)
    surplus, shared = len(whole) - len(shared), shared[of_each > 1]
    if not len(shared):
        return "", False
    many = len(shared) >= MANY_SHARED or surplus >= MANY_PIECES
    return (f"{len(shared)} of {names} numbers, e.g. {shared[0]}, stand for several separate pieces",
            many and (len(shared) > names / 2 or surplus > len(whole) / 2))


def _meeting(pieces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tell of each of the pieces 0..count whether it touches another, lies within one other, and is at the edge."""
    met = []
    for one, other in ((pieces[1:], pieces[:-1]), (pieces[:, 1:], pieces[:, :-1])):
        differ = one != other
        met += [one[differ] * (count + 1) + other[differ], other[differ] * (count + 1) + one[differ]]
    pairs = np.sort(np.concatenate(met))  # np.unique takes minutes for millions
    piece, neighbour = np.divmod(pairs[np.append(True, pairs[1:] != pairs[:-1])[:len(pairs)]], count + 1)
    touching = np.bincount(piece[neighbour > 0], minlength=count + 1) > 0
    at_edge = np.zeros(count + 1, bool)
    for side in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        at_edge[side] = True
    enclosed = touching & (np.bincount(piece, minlength=count + 1) == 1) & ~at_edge
    touching[0] = enclosed[0] = False
    return touching, enclosed, at_edge
