"""Small data sets with masks known by construction, and one tiny trained run for all tests."""

import copy
import csv
import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy import ndimage

from checkpoints import save_checkpoint, untrained_checkpoint
from images.files import save_png
from images.recipe import MASK, DataRecipe
from pap_smear_dataset import create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer
from system.machine import cpu_count
from unet import STAGE_RESOLUTIONS, ProgressiveUNet
from unet_parts import ToLogits

PROJECT = Path(__file__).parent
TIMING = {"seconds", "processor_seconds", "images_per_second"}  # columns that differ from run to run
TINY = ["--base_channels", "4", "--epochs_per_stage", "1", "--batch_sizes", "32:4,64:4,128:4,256:4"]
ONE_STAGE = [*TINY, "--epochs_per_stage", "0,0,0,1"]  # where growing is not what is tested


def pytest_configure() -> None:
    """Ignore no signal: in the background of a script, or under `nohup`, whatever tests start would ignore it too."""
    for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_xdist_auto_num_workers(config) -> int:
    """Run the whole suite in a process for each core, up to 4; what is asked for by name in this process."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else min(4, cpu_count())


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


def write_checkpoint(path: Path, model, sizing: str = "resize", targets=MASK, ranges: dict | None = None,
                     **recipe) -> Path:
    """Save a network as a checkpoint that no training made."""
    data = DataRecipe(sizing, targets, model.in_channels, model.out_channels - ("boundary" in targets),
                      training_ranges=ranges or {}, **recipe)
    save_checkpoint(path, untrained_checkpoint(model, data=data))
    return path


def words(*arguments) -> list[str]:
    """Return the arguments of a command as its `main` takes them: in this process, where nothing is imported anew."""
    return list(map(str, arguments))


def run_script(*arguments, cwd=PROJECT, environment: dict | None = None) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` as a user would, with these environment variables besides."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env=os.environ | (environment or {}))


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


def tensors_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def roughly_trained(in_channels: int, out_channels: int = 1, seed: int = 0) -> ProgressiveUNet:
    """A network whose weights, heads and running statistics are all away from their start."""
    return copy.deepcopy(_roughly_trained(in_channels, out_channels, seed))


@functools.cache
def _roughly_trained(in_channels: int, out_channels: int, seed: int) -> ProgressiveUNet:
    torch.manual_seed(seed)
    model = ProgressiveUNet(in_channels, out_channels, base_channels=4)
    model.set_image_statistics([0.4] * in_channels, [0.2] * in_channels)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for stage in STAGE_RESOLUTIONS:
            model.set_stage(stage)
            for _ in range(3):
                model(torch.rand(2, in_channels, 32, 48))
    model.set_stage(1)
    return model.eval()


def at_growth(stage: int, in_channels: int) -> ProgressiveUNet:
    """A network of two classes with rough weights up to a stage, whose next level is as it was constructed."""
    model, fresh = roughly_trained(in_channels, out_channels=2), ProgressiveUNet(in_channels, 2, base_channels=4)
    model.set_stage(stage)
    model.transfer_weights({name: tensor for name, tensor in fresh.state_dict().items()
                            if name in model.unborn_state()})
    return model


def disc(side=64, radius=20):
    rows, columns = np.mgrid[:side, :side] - side / 2 + 0.5
    return np.hypot(rows, columns) <= radius


def copy_pair(root, split, name, new):
    for kind in ("images", "masks"):
        shutil.copy(root / split / kind / f"{name}.png", root / split / kind / f"{new}.png")


def move_pair(root, split, name, to, new):
    for kind in ("images", "masks"):
        shutil.copy(root / split / kind / f"{name}.png", root / to / kind / f"{new}.png")


def make_trainer(root, output=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = ProgressiveUNet(base_channels=2)
    trainer = ProgressiveTrainer(model, device="cpu", precision="float32", output_dir=output, seed=seed,
                                 **({"epochs_per_stage": [2, 1, 1, 1]} | kwargs))
    return trainer, create_progressive_dataloaders(root, dict.fromkeys((32, 64, 128, 256), 2))


def metric_rows(folder):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(folder / "metrics.csv")]


# ---- label maps, networks and images for prediction and scoring


def labelled(shape, *boxes) -> np.ndarray:
    """Draw boxes (top, bottom, left, right), numbered from 1."""
    labels = np.zeros(shape, np.int32)
    for k, (top, bottom, left, right) in enumerate(boxes, start=1):
        labels[top:bottom, left:right] = k
    return labels


def random_nuclei(rng: np.random.Generator, side: int, count: int, radius: float) -> np.ndarray:
    """Draw discs one over the other, so that some are cut and some vanish."""
    rows, columns = np.mgrid[:side, :side]
    labels = np.zeros((side, side), np.int32)
    for k in range(1, count + 1):
        row, column = rng.uniform(0, side, 2)
        labels[np.hypot(rows - row, columns - column) <= rng.uniform(0.5, 1.5) * radius] = 7 * k
    return labels


def lively_model(stage=4, in_channels=1, out_channels=1, kind=ProgressiveUNet, seed=0, spread=0.5):
    """A network without training whose probabilities vary over an image, about 0.5 or, of a larger spread, over all."""
    torch.manual_seed(seed)
    model = kind(in_channels, out_channels, base_channels=4)
    model.set_image_statistics([0.5] * in_channels, [0.2] * in_channels)
    model.set_stage(stage)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ToLogits):
                torch.nn.init.normal_(module.linear.weight, std=spread)
        model.train()
        for _ in range(20):  # running statistics as after training
            model(torch.rand(2, in_channels, 64, 64))
    return model.eval()


def noisy_image(height, width, channels=1, seed=0) -> np.ndarray:
    """Smooth structures and noise (H, W, C) uint8."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(0, 1, (height, width, channels)), (6, 6, 0))
    return np.clip(128 + 400 * smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


def read_rows(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_slide(path: Path, height=700, width=1100, mpp: float | None = 0.25):
    """Write an Aperio SVS of three levels, each the 2x2 means of the one above; return the levels as arrays."""
    levels = [noisy_image(height, width, 3)]
    for _ in range(2):
        image = Image.fromarray(levels[-1])
        levels.append(np.asarray(image.reduce(2).crop((0, 0, image.width // 2, image.height // 2))))
    about = f"Aperio Image Library v11.0.37\n{width}x{height} (256x256)" + (f"|AppMag = 40|MPP = {mpp}" if mpp else "")
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for i, level in enumerate(levels):
            file.write(level, tile=(256, 256), photometric="rgb", description=about if i == 0 else
                       f"Aperio Image Library v11.0.37\n{width}x{height} -> {level.shape[1]}x{level.shape[0]}",
                       metadata=None, compression="adobe_deflate",)
            if i == 0:  # the second picture of such a file is a thumbnail
                file.write(np.ascontiguousarray(level[::8, ::8]), photometric="rgb", description="Aperio thumbnail",
                           metadata=None, rowsperstrip=16)
    return levels
