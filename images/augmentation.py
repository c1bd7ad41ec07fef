"""Joint transforms of image and mask on whole batches.

Each sample's transform follows from one row of uniform numbers, and that row from (seed, resolution, epoch, index)
alone: neither the batch it falls into, nor the number of workers or processes, changes it.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

MAX_ANGLE = math.radians(15)
MAX_SCALE = 0.1        # relative
MAX_SHIFT = 0.06       # of the side
MAX_BRIGHTNESS = 0.1   # on the scale [0, 1]
MAX_CONTRAST = 0.2     # relative
MAX_STAIN = 0.25       # relative, of the optical density of a colour channel
MAX_STRENGTH = 3.0     # so that no scale and no power comes near 0
_NUMBERS = 12          # uniform numbers a sample: five decisions, seven amounts
_COLOUR_NUMBERS = 4    # one decision, three amounts


def sample_numbers(seed: int, resolution: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """Draw the (len(indices), 16) uniform numbers in [0, 1) that decide the transforms of these samples."""
    key = [seed, resolution, epoch]
    tables = ((key, _NUMBERS), ([*key, 2], _COLOUR_NUMBERS))
    return np.concatenate([_rows(table, columns, indices) for table, columns in tables], axis=1)


def _rows(key: list[int], columns: int, indices: np.ndarray) -> np.ndarray:
    """Return these rows of the endless table of uniform numbers that belongs to a key, without drawing the others."""
    generator = np.random.Generator(np.random.PCG64(key))  # one step of it makes one number
    rows, position = np.empty((len(indices), columns)), 0
    for row, index in zip(rows, np.asarray(indices).tolist(), strict=True):
        generator.bit_generator.advance(index * columns - position)  # back, too: it counts modulo 2^128
        generator.random(out=row)
        position = (index + 1) * columns
    return rows


def augment(image: torch.Tensor, mask: torch.Tensor, numbers: np.ndarray, probability: float,
            strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform a batch of images and masks alike.

    Six transforms, each applied to a sample with `probability` on its own: horizontal flip, vertical flip, one to
    three quarter turns, a small affine (15 degrees, 10 % scale, 6 % shift, mirrored at the border), and, of the image
    alone, brightness and contrast, and in colour the strength of the stain: the optical density of each channel is
    multiplied by up to 25 % more or less, so that white stays white.

    Args:
        image: (N, C, S, S) float in [0, 1]; square, as all batches are.
        mask: (N, K, S, S) float in [0, 1].
        numbers: (N, 16) from `sample_numbers`.
        probability: 0..1.
        strength: factor on every amount that is named above, 0..MAX_STRENGTH.
    Returns:
        image and mask of the same shapes and ranges, on the same device.
    """
    u = torch.as_tensor(numbers, dtype=torch.float32)
    flip_x, flip_y, turn, move, light = (u[:, :5] < probability).unbind(1)
    turns = torch.where(turn, 1 + (u[:, 5] * 3).long(), 0)
    image, mask = _flip_and_turn(image, mask, (turns + 4 * flip_x + 8 * flip_y).tolist())
    amounts = torch.cat([2 * u[:, 6:12] - 1, 2 * u[:, 13:16] - 1], dim=1) * strength
    image, mask = _affine(image, mask, move, amounts[:, :4])
    image = _brightness_contrast(image, light, amounts[:, 4:6])
    return (_stain(image, u[:, 12] < probability, amounts[:, 6:]) if image.shape[1] == 3 else image), mask


def _flip_and_turn(image, mask, kind):
    """Apply one of the eight exact symmetries of the square to each sample: quarter turns + 4 flip x + 8 flip y."""
    if not any(kind):
        return image, mask
    image, mask = image.clone(), mask.clone()
    for k in sorted(set(kind) - {0}):
        rows = torch.tensor([i for i, symmetry in enumerate(kind) if symmetry == k], device=image.device)
        axes = [axis for axis, on in ((3, k & 4), (2, k & 8)) if on]
        for batch in (image, mask):
            batch[rows] = torch.rot90(torch.flip(batch[rows], axes), k % 4, dims=(2, 3))
    return image, mask


def _affine(image, mask, applied, amounts):
    """Rotate, scale and shift by bilinear resampling the samples chosen; amounts (N, 4) are shares of the largest."""
    rows = applied.nonzero().flatten()
    if not len(rows):
        return image, mask
    amounts = amounts[rows]
    angle, scale = amounts[:, 0] * MAX_ANGLE, 1 + amounts[:, 1] * MAX_SCALE
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = 2 * MAX_SHIFT * amounts[:, 2:4]  # the grid spans [-1, 1]
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    rows = rows.to(image.device)
    channels = image.shape[1]
    both = torch.cat([image[rows], mask[rows]], dim=1)
    grid = F.affine_grid(theta.to(image), list(both.shape), align_corners=False)
    moved = F.grid_sample(both, grid, mode="bilinear", padding_mode="reflection", align_corners=False).clamp_(0, 1)
    image, mask = image.clone(), mask.clone()
    image[rows], mask[rows] = moved[:, :channels], moved[:, channels:]
    return image, mask


def _brightness_contrast(image, applied, amounts):
    """Add to the brightness and stretch the contrast about each image's mean."""
    amounts = torch.where(applied[:, None], amounts, 0.0).to(image)[:, :, None, None, None]
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    changed = (image - mean) * (1 + MAX_CONTRAST * amounts[:, 1]) + mean + MAX_BRIGHTNESS * amounts[:, 0]
    return torch.where(applied.to(image.device)[:, None, None, None], changed.clamp(0, 1), image)


def _stain(image, applied, amounts):
    """Raise each colour channel to a power near 1: by Lambert and Beer's law that scales its optical density."""
    power = 1 + torch.where(applied[:, None], MAX_STAIN * amounts, 0.0).to(image)[:, :, None, None]
    return image.pow(power)
