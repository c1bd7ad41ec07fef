"""Make synthetic Pap smear fields with nucleus masks, so that the first command works without any download.

Light passes through the slide, so everything multiplies the transmitted light: cytoplasm that overlaps is darker, and
two thin layers may be as dark as a pale nucleus. Debris and neutrophils are as dark as nuclei and no target.
"""

from pathlib import Path

import numpy as np
from scipy import ndimage

from images.files import save_png
from preparation.data_sets import new_folder

SIDE = 256


def smooth_noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Return (256, 256) noise of mean 0 and standard deviation 1 with structures of about `sigma` pixels."""
    noise = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def blob(rng: np.random.Generator, centre: np.ndarray, radius: float, elongation: float,
         roughness: float) -> np.ndarray:
    """Return the signed distance (256, 256), in pixels and negative inside, to an irregular oval.

    Args:
        centre: (row, column).
        elongation: long over short axis, at least 1.
        roughness: standard deviation of the outline relative to the radius.
    """
    rows, columns = np.mgrid[:SIDE, :SIDE]
    turn = rng.uniform(0, np.pi)
    y, x = rows - centre[0], columns - centre[1]
    along, across = np.cos(turn) * x + np.sin(turn) * y, -np.sin(turn) * x + np.cos(turn) * y
    along, across = along / np.sqrt(elongation), across * np.sqrt(elongation)
    angle, distance = np.arctan2(across, along), np.hypot(across, along)
    outline = np.ones_like(angle)
    for k in range(2, 9):  # Fourier terms of the outline, the higher the smaller
        outline += roughness / k * rng.standard_normal() * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    return distance - radius * outline


def inside(distance: np.ndarray, softness: float) -> np.ndarray:
    """Turn signed distance into coverage 0..1 with an edge of about `softness` pixels."""
    return 1 / (1 + np.exp(np.clip(distance / softness, -30, 30)))


def draw_cell(rng: np.random.Generator, light: np.ndarray, mask: np.ndarray, stain: float, taken: list) -> None:
    """Add one cell: cytoplasm that lets light through, in it a darker nucleus, which also goes into the mask."""
    centre = rng.uniform(10, SIDE - 10, 2)
    radius = rng.uniform(26, 62)
    density = rng.uniform(0.07, 0.24) * stain
    texture = 1 + 0.20 * smooth_noise(rng, 5) + 0.12 * smooth_noise(rng, 1.5)
    distance = blob(rng, centre, radius, rng.uniform(1, 1.8), 0.16)
    rim = np.exp(-(distance / 3) ** 2) * rng.uniform(0, 0.05)  # folded edges are darker
    light *= np.exp(-(inside(distance, rng.uniform(1, 3)) * density * texture + rim))

    nucleus_radius = rng.uniform(5, 9) if rng.random() < 0.6 else rng.uniform(9, 18)
    spot = centre + rng.normal(0, radius * 0.15, 2)
    if any(np.hypot(*(spot - other)) < nucleus_radius + size + 2 for other, size in taken):
        return  # a cell whose nucleus lies outside the plane of focus
    taken.append((spot, nucleus_radius))
    distance = blob(rng, spot, nucleus_radius, rng.uniform(1, 1.5), 0.10)
    chromatin = 1 + 0.22 * smooth_noise(rng, 1.3) + 0.10 * smooth_noise(rng, 3)
    membrane = np.exp(-((distance + 1) / 1.2) ** 2) * rng.uniform(0, 0.25)
    light *= np.exp(-inside(distance, 0.7) * rng.uniform(0.35, 0.95) * stain * (chromatin + membrane))
    mask |= distance < 0


def draw_neutrophil(rng: np.random.Generator, light: np.ndarray) -> None:
    """Add a neutrophil: two to four small dark lobes in a faint cell. No target."""
    centre = rng.uniform(0, SIDE, 2)
    light *= np.exp(-inside(blob(rng, centre, rng.uniform(8, 11), 1.1, 0.08), 1.0) * 0.12)
    heading = rng.uniform(0, 2 * np.pi)
    for i in range(rng.integers(2, 5)):
        lobe = centre + 3.8 * np.array([np.sin(heading + 2 * i), np.cos(heading + 2 * i)])
        light *= np.exp(-inside(blob(rng, lobe, rng.uniform(2.2, 3.6), 1.3, 0.1), 0.6) * rng.uniform(0.6, 1.0))


def draw_debris(rng: np.random.Generator, light: np.ndarray) -> None:
    """Add a dark crumb, an elongated streak or a pale smear of mucus. No target."""
    kind, centre = rng.random(), rng.uniform(0, SIDE, 2)
    if kind < 0.5:
        distance, density = blob(rng, centre, rng.uniform(1.5, 5), rng.uniform(1, 2.5), 0.45), rng.uniform(0.4, 1.2)
    elif kind < 0.75:
        distance, density = blob(rng, centre, rng.uniform(5, 10), rng.uniform(8, 20), 0.2), rng.uniform(0.2, 0.6)
    else:
        distance, density = blob(rng, centre, rng.uniform(12, 30), rng.uniform(1.5, 4), 0.5), rng.uniform(0.10, 0.30)
    light *= np.exp(-inside(distance, rng.uniform(0.5, 1.5)) * density * (1 + 0.3 * smooth_noise(rng, 1.5)))


def make_field(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Make one field of view: image (256, 256) uint8 and nucleus mask (256, 256) bool."""
    light, mask = np.full((SIDE, SIDE), 1.0), np.zeros((SIDE, SIDE), bool)
    stain, taken = rng.uniform(0.75, 1.25), []
    for _ in range(rng.integers(5, 13)):
        draw_cell(rng, light, mask, stain, taken)
    for _ in range(rng.poisson(4)):
        draw_neutrophil(rng, light)
    for _ in range(rng.poisson(6)):
        draw_debris(rng, light)
    rows, columns = np.mgrid[-1:1:SIDE * 1j, -1:1:SIDE * 1j]
    tilt = rng.normal(0, 0.10, 2)
    lamp = 1 + tilt[0] * rows + tilt[1] * columns - rng.uniform(0, 0.18) * (rows ** 2 + columns ** 2)
    light *= rng.uniform(0.74, 0.90) * lamp * (1 + 0.015 * smooth_noise(rng, 30))
    light = ndimage.gaussian_filter(light, rng.uniform(0.6, 1.5))  # never quite in focus
    light += rng.normal(0, 0.008, light.shape) * np.sqrt(np.maximum(light, 0.05))  # photons arrive at random
    return np.round(255 * np.clip(light, 0, 1)).astype(np.uint8), mask


def make_sample(out: Path, counts: dict[str, int], seed: int) -> int:
    """Write so many images of every split; return their size in bytes. Raises UserError when `out` is not empty."""
    size = 0
    with new_folder(out) as root:
        for number, (split, count) in enumerate(counts.items()):
            for kind in ("images", "masks"):
                (root / split / kind).mkdir(parents=True)
            for i in range(count):
                image, mask = make_field(np.random.default_rng([seed, number, i]))
                for kind, array in (("images", image), ("masks", mask)):
                    path = root / split / kind / f"{split}_{i:03d}.png"
                    save_png(path, array)
                    size += path.stat().st_size
    return size
