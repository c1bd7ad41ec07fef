"""What the benchmark times: trainings (ours and the baseline), loaders, predictions, and runs in several processes.

Each function makes contenders for `timing.alternate`: callables that do their work once and return the seconds. What
is run in a separate process for ours keeps freed memory on a CPU there, as the command lines do; the baseline does not.
"""

import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import call_in_processes, median, separate_process, timed
from checkpoints import save_checkpoint, untrained_checkpoint
from images.cache import ImageCache
from images.files import load_image, resize, save_png
from images.pyramid import ImagePyramid
from images.recipe import DataRecipe
from images.resolutions import DEFAULT_BATCH_SIZES
from images.splits import list_splits
from images.tiles import plan_axis
from inference import Predictor
from pap_smear_dataset import create_progressive_dataloaders
from preparation.sample import make_field
from progressive_trainer import ProgressiveTrainer
from system.devices import autocast, set_up_process
from system.machine import peak_memory
from system.processes import is_main_process, process_group
from training.loss import multi_scale_loss
from unet import LAST_STAGE, STAGE_RESOLUTIONS, ProgressiveUNet, UNet, build_model

BATCH = DEFAULT_BATCH_SIZES[STAGE_RESOLUTIONS[LAST_STAGE]]
FIELD = 512  # pixels a side of a synthetic image on disk, so that there is something to resize
OTHERS = {"segmentation-models-pytorch": "segmentation_models_pytorch", "monai": "monai"}


@dataclass(frozen=True)
class Setting:
    """What holds for a whole benchmark.

    Args:
        root: folder of the synthetic data set.
        device, precision: as resolved; the baseline is float32 all the same.
    """

    root: Path
    base_channels: int
    rounds: int
    quick: bool
    device: torch.device
    precision: str


def write_fields(root: Path, count: int) -> None:
    """Write a train split of `count` synthetic fields of 512x512 pixels, put together of 8 of a quarter that size."""
    rng = np.random.default_rng(0)
    fields = [make_field(rng) for _ in range(8)]
    for kind in ("images", "masks"):
        (root / "train" / kind).mkdir(parents=True)
    for i in range(count):
        four = [fields[k] for k in rng.integers(len(fields), size=4)]
        for part, kind in enumerate(("images", "masks")):
            whole = np.block([[four[0][part], four[1][part]], [four[2][part], four[3][part]]])
            save_png(root / "train" / kind / f"field_{i:04d}.png", whole, smallest=False)


def pyramid_of(root: Path, count: int, cached: bool = True) -> ImagePyramid:
    """Open the first images of the data set, decoded once and kept or decoded at every step."""
    pyramid = ImagePyramid(list_splits(root, wanted=("train",))["train"][:count], DataRecipe())
    pyramid.read_all(ImageCache(len(pyramid), pyramid.channels) if cached else None)
    return pyramid


def train_loaders(setting: Setting, pyramid: ImagePyramid, batch_sizes: dict | None = None) -> dict:
    """Return resolution -> our train loader, augmenting with the default probability."""
    loaders = create_progressive_dataloaders(batch_sizes=batch_sizes, device=setting.device,
                                             pyramids=dict.fromkeys(("train", "valid", "test"), pyramid))
    return {resolution: three[0] for resolution, three in loaders.items()}


def training_of(setting: Setting, stage: int = LAST_STAGE, network: str = "pgunet", images: int | None = None,
                base_channels: int | None = None) -> tuple[ProgressiveTrainer, Callable[[], float]]:
    """Return a trainer and an epoch of it at a stage, with the default batch size there.

    Args:
        images: of the epoch; None is one batch.
        base_channels: where it differs from that of the setting.
    """
    resolution = STAGE_RESOLUTIONS[stage]
    model = build_model({"model": network, "base_channels": base_channels or setting.base_channels})
    model.set_stage(stage)
    trainer = ProgressiveTrainer(model, str(setting.device), precision=setting.precision)
    pyramid = pyramid_of(setting.root, images or DEFAULT_BATCH_SIZES[resolution])
    loader, epochs = train_loaders(setting, pyramid)[resolution], itertools.count()
    return trainer, lambda: timed(lambda: trainer.train_epoch(loader, next(epochs)), setting.device)


def our_training(setting: Setting, *args, **kwargs) -> Callable[[], float]:
    """Return the epoch of `training_of`."""
    return training_of(setting, *args, **kwargs)[1]


class DecodedFields(Dataset):
    """Decode and resize at every step, and nothing else: what a short training script does."""

    def __init__(self, root: Path, side: int, count: int):
        self.images = sorted((root / "train/images").iterdir())[:count]
        self.side = side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        mask = image.parent.parent / "masks" / image.name
        image, mask = (torch.from_numpy(resize(load_image(path, 1), self.side)).permute(2, 0, 1).float().div(255)
                       for path in (image, mask))
        return image, (mask >= 0.5).float()


def baseline_loader(setting: Setting, side: int, count: int, batch_size: int) -> DataLoader:
    """Return a plain torch DataLoader over files, without workers."""
    return DataLoader(DecodedFields(setting.root, side, count), batch_size, shuffle=True)


def missing_networks(base_channels: int) -> dict[str, str]:
    """Return package -> why its network is not timed, for those that are not."""
    reasons = {name: "not installed; pip install -r requirements-bench.txt"
               for name, module in OTHERS.items() if importlib.util.find_spec(module) is None}
    if base_channels != 64 and "segmentation-models-pytorch" not in reasons:
        reasons["segmentation-models-pytorch"] = "its encoder has 64 channels at 256 pixels; pass --base_channels 64"
    return reasons


def baseline_networks(base_channels: int) -> dict[str, Callable[[], torch.nn.Module]]:
    """Return name -> what makes the network, for the classic U-Net and for those of other packages that are there."""
    def of_smp() -> torch.nn.Module:
        import segmentation_models_pytorch as smp

        # Encoder (VGG 13) and decoder have the channels of PGU-net+.
        return smp.Unet("vgg13_bn", encoder_depth=4, encoder_weights=None, decoder_channels=(256, 128, 64, 64),
                        in_channels=1, classes=1)

    def of_monai() -> torch.nn.Module:
        from monai.networks.nets import BasicUNet

        widths = tuple(factor * base_channels for factor in (1, 1, 2, 4, 8, 1))  # the proportions of the package
        return BasicUNet(spatial_dims=2, in_channels=1, out_channels=1, features=widths)

    others = {"segmentation-models-pytorch": of_smp, "monai": of_monai}
    left_out = missing_networks(base_channels)
    return {"classic U-Net": lambda: UNet(base_channels=base_channels)} | {
        name: make for name, make in others.items() if name not in left_out}


def baseline_trainings(setting: Setting) -> dict[str, Callable[[], float]]:
    """Return one training step of each of `baseline_networks` at 256 pixels, as short training scripts do it.

    float32, contiguous format, a plain loader that decodes, Adam, BCE; to be called in a separate process, where the C
    library gives freed memory back as it does by default.
    """
    def step(make: Callable[[], torch.nn.Module]) -> Callable[[], float]:
        model = make().to(setting.device).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        loader = baseline_loader(setting, STAGE_RESOLUTIONS[LAST_STAGE], BATCH, BATCH)

        def epoch() -> None:
            for image, mask in loader:
                optimizer.zero_grad()
                loss = F.binary_cross_entropy_with_logits(model(image.to(setting.device)), mask.to(setting.device))
                loss.backward()
                optimizer.step()
                loss.item()

        return lambda: timed(epoch, setting.device)

    return {name: step(make) for name, make in baseline_networks(setting.base_channels).items()}


def passes_over(loader, device: torch.device) -> Callable[[], float]:
    """Return one pass over a loader that does nothing with the batches."""
    def once() -> None:
        for _ in loader:
            pass

    return lambda: timed(once, device)


def loadings(setting: Setting, cached: int, decoded: int) -> dict[str, Callable[[], float]]:
    """Return 'LOADER, stage S' -> a pass over so many images: ours 'cached' and 'decoding', and the 'baseline'.

    Args:
        cached, decoded: images of a pass with the cache and without.
    """
    kept = train_loaders(setting, pyramid_of(setting.root, cached))
    read = train_loaders(setting, pyramid_of(setting.root, decoded, cached=False))
    found = {}
    for stage, resolution in STAGE_RESOLUTIONS.items():
        plain = baseline_loader(setting, resolution, decoded, DEFAULT_BATCH_SIZES[resolution])
        for name, loader in (("cached", kept[resolution]), ("decoding", read[resolution]), ("baseline", plain)):
            found[f"{name}, stage {stage}"] = passes_over(loader, setting.device)
    return found


def forward_and_backward(setting: Setting, side: int, base_channels: int, images: int = 2) -> Callable[[], float]:
    """Return a forward and backward pass of the whole network (stage 4) on images of any side, without a step."""
    torch.manual_seed(0)
    model = ProgressiveUNet(base_channels=base_channels).to(setting.device, memory_format=torch.channels_last)
    model.set_stage(LAST_STAGE)
    image = torch.rand(images, 1, side, side, device=setting.device).contiguous(memory_format=torch.channels_last)
    mask = (torch.rand(images, 1, side, side, device=setting.device) > 0.9).float()

    def both() -> None:
        with autocast(setting.device, setting.precision):
            scales = model(image, return_all_scales=True)
        multi_scale_loss(scales, mask).backward()
        model.zero_grad(set_to_none=True)

    return lambda: timed(both, setting.device)


def new_predictor(base_channels: int, device: str, precision: str) -> Predictor:
    """Return a predictor at native scale, in tiles of the default size, of a network that no training made."""
    torch.manual_seed(0)
    model = ProgressiveUNet(base_channels=base_channels)
    model.set_stage(LAST_STAGE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "untrained.pth"
        save_checkpoint(path, untrained_checkpoint(model, data=DataRecipe(sizing="tile")))
        return Predictor(path, device, precision)


def drawn_image(height: int, width: int) -> np.ndarray:
    """Return a grey image (H, W) uint8 of noise."""
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


def tile_batches(predictor: Predictor, height: int, width: int) -> list[int]:
    """Return how many tiles the predictor computes at once, time after time, for an image no smaller than a tile."""
    down, along = (len(plan_axis(side, predictor.tile, predictor.margin)[0]) for side in (height, width))
    return [min(predictor.batch_size, along - i) for i in range(0, along, predictor.batch_size)] * down


def tiled_prediction(setting: Setting, height: int, width: int) -> dict[str, Callable[[], float]]:
    """Return a prediction of an image larger than a tile, and its network alone on as many tiles ('forward')."""
    set_up_process(setting.device, setting.precision)
    predictor = new_predictor(setting.base_channels, str(setting.device), setting.precision)
    image, batches = drawn_image(height, width), tile_batches(predictor, height, width)
    inputs = {n: torch.rand(n, 1, predictor.tile, predictor.tile, device=setting.device).contiguous(
        memory_format=torch.channels_last) for n in batches}

    @torch.inference_mode()
    def forward() -> None:
        for n in batches:
            with autocast(setting.device, setting.precision):
                predictor.models[0](inputs[n])

    return {"prediction": lambda: timed(lambda: predictor.predict(image), setting.device),
            "forward": lambda: timed(forward, setting.device)}


def predictions_by_side(setting: Setting, sides: Sequence[int]) -> dict[int, Callable[[], float]]:
    """Return side -> the prediction of a square image."""
    set_up_process(setting.device, setting.precision)
    predictor = new_predictor(setting.base_channels, str(setting.device), setting.precision)

    def prediction(side: int) -> Callable[[], float]:
        image = drawn_image(side, side)
        return lambda: timed(lambda: predictor.predict(image), setting.device)

    return {side: prediction(side) for side in sides}


def memory_of_prediction(side: int, base_channels: int, device: str, precision: str) -> int:
    """Predict one square image and return the largest resident memory of this process in bytes."""
    set_up_process(torch.device(device), precision)
    new_predictor(base_channels, device, precision).predict(drawn_image(side, side))
    return peak_memory()


def training_in_processes(root: str, base_channels: int, precision: str, steps: int) -> list[float] | None:
    """Train at stage 4 on the CPU together with the other processes; return the seconds of each step but the first.

    Of several processes all but the first return None.
    """
    set_up_process(torch.device("cpu"), precision)
    with process_group():
        setting = Setting(Path(root), base_channels, steps, True, torch.device("cpu"), precision)
        trainer, epoch = training_of(setting)
        seconds = [epoch() for _ in range(1 + steps)]
        trainer.leave_group()
        return seconds[1:] if is_main_process() else None


def scaled_costs(setting: Setting) -> Iterator[tuple]:
    """Yield (cost, size, {size: contender}, rounds, warm-up rounds) of all that is measured at several sizes."""
    width, rounds = setting.base_channels, setting.rounds
    narrow, quarter = max(1, width // 8), max(1, width // 4)
    yield (f"an epoch of stage 4 at {narrow} channels", "images",
           {n: our_training(setting, images=n, base_channels=narrow)
            for n in ((8, 16, 32) if setting.quick else (16, 32, 64, 128))}, rounds, 1)
    yield (f"forward and backward of 2 images at {width} channels", "side",
           {side: forward_and_backward(setting, side, width) for side in (64, 128, 256, 512)}, rounds, 1)
    widths = sorted({max(1, width // k) for k in (8, 4, 2, 1)})
    yield ("forward and backward of 2 images of 256x256", "channels",
           {n: forward_and_backward(setting, 256, n) for n in widths}, rounds, 1)
    sides = (256, 512, 1024) if setting.quick else (256, 512, 1024, 2048)
    with separate_process(predictions_by_side, setting, sides) as contenders:
        yield f"prediction at {width} channels", "side", contenders, rounds, 1

    of_processes = quarter if setting.quick else width
    precision = setting.precision if setting.device.type == "cpu" else "auto"

    def training_by(processes: int) -> Callable[[], float]:
        threads = max(1, torch.get_num_threads() // processes)
        return lambda: median(call_in_processes(
            "benchmarks.workloads.training_in_processes", str(setting.root), of_processes, precision, 2,
            processes=processes, threads=threads))

    yield (f"a step of {BATCH} images on this CPU at {of_processes} channels", "processes",
           {n: training_by(n) for n in (1, 2)}, min(rounds, 3) if setting.quick else rounds, 0)
