"""Small data sets with masks known by construction, and one tiny trained run for all tests."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoints import save_checkpoint, untrained_checkpoint
from images.files import save_png
from images.recipe import MASK, DataRecipe

PROJECT = Path(__file__).parent
TINY = ["--base_channels", "4", "--epochs_per_stage", "1", "--batch_sizes", "32:4,64:4,128:4,256:4"]


def draw_pair(rng: np.random.Generator, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Draw a dark disc on a bright noisy ground: image (side, side) uint8 and mask bool."""
    rows, columns = np.mgrid[:side, :side]
    centre, radius = rng.uniform(0.3, 0.7, 2) * side, rng.uniform(0.1, 0.25) * side
    mask = np.hypot(rows - centre[0], columns - centre[1]) <= radius
    image = np.where(mask, 60, 190) + rng.normal(0, 12, (side, side))
    return np.clip(image, 0, 255).astype(np.uint8), mask


def write_data_set(root: Path, counts=(6, 3, 3), side: int = 64) -> Path:
    """Write train, valid and test with so many drawn discs each."""
    for number, (split, count) in enumerate(zip(("train", "valid", "test"), counts, strict=True)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            image, mask = draw_pair(np.random.default_rng([number, i]), side)
            save_png(root / split / "images" / f"{split}_{i}.png", image)
            save_png(root / split / "masks" / f"{split}_{i}.png", mask)
    return root


def write_checkpoint(path: Path, model, sizing: str = "resize", targets=MASK, ranges: dict | None = None) -> Path:
    """Save a network as a checkpoint that no training made."""
    recipe = DataRecipe(sizing, targets, model.in_channels, model.out_channels - ("boundary" in targets),
                        training_ranges=ranges or {})
    save_checkpoint(path, untrained_checkpoint(model, data=recipe))
    return path


def run_script(*arguments, cwd=PROJECT) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` as a user would."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300)


def square(top: float, left: float, side: int = 10, corner: bool = False) -> list[tuple[float, float]]:
    """Return (x, y) of a square of side x side pixels; (0, 0) is the centre of the first pixel, or its corner."""
    bottom, right = top + side - 1 + corner, left + side - 1 + corner
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def imagescope(regions, attributes='MicronsPerPixel="0.25"') -> str:
    drawn = "".join(
        f'<Region Id="{i}" NegativeROA="0"><Vertices>'
        + "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in outline) + "</Vertices></Region>"
        for i, outline in enumerate(regions, 1))
    return f'<Annotations {attributes}><Annotation Id="1"><Regions>{drawn}</Regions></Annotation></Annotations>'


@pytest.fixture
def data_root(tmp_path) -> Path:
    """Return a fresh, correct data set that a test may break."""
    return write_data_set(tmp_path / "data")


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory) -> Path:
    """Return a correct data set that no test changes."""
    return write_data_set(tmp_path_factory.mktemp("shared") / "data")


@pytest.fixture(scope="session")
def trained_run(shared_root, tmp_path_factory) -> tuple[Path, str]:
    """Return the folder of a run through all four stages, made by the command line, and what it printed."""
    output = tmp_path_factory.mktemp("outputs")
    done = run_script("train_papsmear.py", "--data_root", shared_root, "--output_dir", output, "--experiment_name",
                      "tiny", *TINY)
    assert done.returncode == 0, done.stderr
    return output / "tiny", done.stdout
