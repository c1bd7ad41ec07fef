"""What only a GPU shows, in about five minutes; everything is skipped where torch finds none.

    python -m pytest tests/test_cuda.py -s

With `-s` it prints the card, and images a second and memory of training in each precision. Elsewhere, and run by
`python -m pytest -k cuda` or `-k gpu` as well:

    test_compatibility.py        --deterministic gives the same weights twice; checkpoints of one device and precision
                                 load in another; batches are augmented as on the CPU; compiled steps give the losses
                                 of plain ones
    tests/test_processes.py      several processes, a card for each
    tests/test_without_gpu.py    devices, types, compilation and the scaler of float16, without a GPU
"""

import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from checkpoints import load_checkpoint
from conftest import PROJECT, lively_model, noisy_image, run_script, tensors_equal, write_checkpoint, write_data_set
from inference import Predictor
from pap_smear_dataset import create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer
from system.devices import choose_precision, compute_reproducibly, set_up_process
from system.errors import UserError
from system.signals import StoppedBySignal
from training.memory import training_memory
from unet import STAGE_RESOLUTIONS, ProgressiveUNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine")

CUDA = torch.device("cuda")
PRECISIONS = ("float32", "bfloat16", "float16")
SIDES = tuple(STAGE_RESOLUTIONS.values())
IMAGES, BATCH = 64, 8  # of what is measured


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("cuda") / "data", (12, 5, 1))


@pytest.fixture(autouse=True)
def exact_float32():
    """Compute in float32 what is called so, as the command lines do; torch rounds the inputs of convolutions (TF32)."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_up_process(CUDA, "float32")
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.empty_cache()


def trainer_of(precision: str, epochs=1, output=None, channels: int = 4, **options) -> ProgressiveTrainer:
    torch.manual_seed(0)
    return ProgressiveTrainer(ProgressiveUNet(base_channels=channels), CUDA, epochs, precision=precision,
                              output_dir=output, **options)


def loaders_of(root: Path, batch: int) -> dict:
    return create_progressive_dataloaders(root, dict.fromkeys(SIDES, batch), device=CUDA)


# ---- training


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_falls_and_the_run_is_gone_on_from(precision, root, tmp_path):
    """At the first stage, then through all others; the scale of float16 is saved and taken up again."""
    trainer, loaders = trainer_of(precision, [15, 1, 1, 1], tmp_path / "run", lr=3e-3), loaders_of(root, 4)
    losses = []
    for epoch in range(15):
        train, valid = trainer.train_epoch(loaders[32][0], epoch), trainer.validate_epoch(loaders[32][1], epoch)
        trainer.record(train, valid)
        losses.append(train["loss"])
    assert losses[-1] < 0.8 * losses[0]
    trainer.fit(loaders, say=lambda line: None)
    saved = load_checkpoint(tmp_path / "run/last.pth")
    assert saved["stage"] == 4
    assert bool(saved["scaler"]) == (precision == "float16")
    resumed = trainer_of(precision, output=tmp_path / "run")
    resumed.resume(tmp_path / "run/last.pth")
    assert next(resumed.model.parameters()).device.type == "cuda"
    assert tensors_equal(resumed.model, trainer.model)
    assert resumed.scaler.get_scale() == trainer.scaler.get_scale()
    assert all(p.device.type == "cuda" for state in resumed.optimizer.state.values() for p in state.values())


def cut_and_whole(root: str, folder: str, precision: str) -> None:
    """Train whole, and cut off after every step, computing reproducibly; print as JSON how both ended."""
    compute_reproducibly()
    set_up_process(CUDA, precision)
    ended = {}
    for name in ("whole", "cut"):
        stops = 0
        while name not in ended:
            trainer = trainer_of(precision, [2, 1, 0, 1], Path(folder) / name, average=0.9, accumulate=2)
            if stops:
                trainer.resume(Path(folder) / name / "last.pth")
            trainer.keeper.asked_to_stop = lambda cut=name == "cut": 15 * cut
            try:
                trainer.fit(loaders_of(Path(root), 2), say=lambda line: None)
                ended[name] = trainer
            except StoppedBySignal:
                stops += 1
    states = [trainer.model.state_dict() | {f"averaged {key}": tensor for key, tensor in
                                            trainer.evaluated_model.state_dict().items()} for trainer in ended.values()]
    print(json.dumps({"different": [key for key in states[0] if not torch.equal(states[0][key], states[1][key])],
                      "stops": stops, "scales": [trainer.scaler.get_scale() for trainer in ended.values()]}))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_that_is_cut_off_at_every_step_ends_as_one_that_is_not(precision, root, tmp_path):
    """To the last bit, as with --deterministic, which a process must ask for before it computes anything."""
    done = run_script("-c", "import sys; from tests.test_cuda import cut_and_whole; cut_and_whole(*sys.argv[1:])", root,
                      tmp_path, precision)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout.splitlines()[-1])
    assert ended["different"] == []
    assert ended["stops"] >= 8
    assert ended["scales"][0] == ended["scales"][1]
    assert (ended["scales"][0] > 1) == (precision == "float16")


def test_a_lack_of_memory_is_explained_and_changes_nothing(root):
    """Of the whole card half a gigabyte is left to this process; afterwards the same batch is trained on."""
    trainer, loader = trainer_of("float32", channels=64), loaders_of(root, 6)[256][0]
    trainer.set_stage(4)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items() if "image_" not in name}
    torch.cuda.empty_cache()
    all_memory = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2 ** 29) / all_memory)
    try:
        with pytest.raises(UserError, match="out of memory at stage 4 ") as error:
            trainer.train_epoch(loader, 0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "--batch_sizes 256:3 and add up as many as before with --accumulate 2" in str(error.value)
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in before.items())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert np.isfinite(trainer.train_epoch(loader, 0)["loss"])


# ---- what comes to the GPU, and what comes back


def test_batches_that_are_moved_while_others_are_computed_are_whole(root):
    """The copies are from pinned memory and not waited for; the pinned memory of one batch is used by the next ones."""
    here = [batch["image"] for batch in create_progressive_dataloaders(root, {256: 1})[256][1]]
    for _ in range(10):
        there = [batch["image"] for batch in loaders_of(root, 1)[256][1]]
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


def test_a_plain_loader_with_pinned_memory_is_trained_on_as_one_without(root):
    found = []
    for pinned in (False, True):
        dataset = loaders_of(root, 4)[32][1].dataset
        loader = DataLoader(dataset, 2, pin_memory=pinned)
        assert next(iter(loader))["image"].is_pinned() is pinned
        trainer = trainer_of("float32", recipe=dataset.recipe)
        found.append([trainer.train_epoch(loader, 0)["loss"], trainer.validate_epoch(loader, 0)["loss"]])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("sizing", ["resize", "tile"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("float16", 0.02), ("bfloat16", 0.1)])
def test_a_prediction_is_that_of_the_cpu(precision, tolerance, sizing, tmp_path):
    """Four tiles at once with sizing 'tile'; probabilities differ by rounding."""
    path = write_checkpoint(tmp_path / "a.pth", lively_model(seed=2), sizing)
    image = noisy_image(400, 520)
    expected = Predictor(path, "cpu", "float32", tile=320).predict(image)
    found = Predictor(path, "cuda", precision, tile=320).predict(image)
    assert expected.std() > 0.03
    assert np.abs(found - expected).max() < tolerance


# ---- figures


def test_figures_of_this_card(tmp_path):
    """Print images a second at stage 4 with 64 channels; what is of low precision must take less memory."""
    card = torch.cuda.get_device_properties(CUDA)
    print(f"\n{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2 ** 30:.0f} GiB; torch "
          f"{torch.__version__}; auto is {choose_precision('auto', CUDA)}; stage 4, 64 channels, batches of {BATCH}")
    root, peaks = write_data_set(tmp_path / "data", (IMAGES, 1, 1)), {}
    for precision in PRECISIONS:
        trainer, loader = trainer_of(precision, 3, channels=64), loaders_of(root, BATCH)[256][0]
        trainer.set_stage(4)
        estimate = training_memory(trainer.model, BATCH, precision)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            speeds = [trainer.train_epoch(loader, epoch)["images_per_second"] for epoch in range(3)]
        except UserError as error:  # a small card
            print(f"{precision:<9} {error}")
            continue
        peaks[precision] = torch.cuda.max_memory_allocated()
        print(f"{precision:<9}{max(speeds[1:]):7.1f} images/s, {peaks[precision] / 2 ** 30:5.2f} GiB at most "
              f"(--dry_run says {estimate / 2 ** 30:.2f})", flush=True)
    assert all(peaks[low] < peaks["float32"] for low in PRECISIONS[1:] if {low, "float32"} <= set(peaks))


if __name__ == "__main__":
    sys.exit(pytest.main([str(PROJECT / "tests/test_cuda.py"), "-s"]))
