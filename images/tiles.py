"""How overlapping tiles cover a large image, and what each of their pixels counts."""

import numpy as np

from images.resolutions import RESOLUTIONS

STEP = 2 ** len(RESOLUTIONS)  # tiles begin at multiples of it, where the poolings of the whole image begin
BLEND = 2 * STEP              # pixels over which one tile gives way to the next


def plan_axis(length: int, tile: int, margin: int) -> tuple[list[int], list[np.ndarray]]:
    """Cover an axis with overlapping tiles.

    Args:
        length: pixels, a multiple of STEP.
        margin: pixels at each inner side of a tile that get no weight.
    Returns:
        (offsets, weights): where the tiles begin, all multiples of STEP, and what each of their pixels counts, float32;
        at every pixel of the axis the weights add up to 1.

    >>> offsets, weights = plan_axis(144, 112, 24)
    >>> offsets, [int((tile > 0).argmax()) for tile in weights], [int((tile > 0).sum()) for tile in weights]
    ([0, 32], [0, 24], [88, 88])
    """
    if length <= tile:
        return [0], [np.ones(length, np.float32)]
    stride = (tile - 2 * margin - BLEND) // STEP * STEP
    offsets = [*range(0, length - tile, stride), length - tile]
    total = np.zeros(length)
    weights = []
    for offset in offsets:
        place = np.arange(tile) + 0.5
        left = np.clip((place - margin) / BLEND, 0, 1) if offset > 0 else 1.0
        right = np.clip((tile - margin - place) / BLEND, 0, 1) if offset + tile < length else 1.0
        weights.append(np.minimum(left, right) * np.ones(tile))
        total[offset:offset + tile] += weights[-1]
    return offsets, [(tile_weights / total[offset:offset + tile]).astype(np.float32)
                     for offset, tile_weights in zip(offsets, weights, strict=True)]
