"""Tests of the installed versions, of devices and precisions, and that our code calls nothing deprecated.

    python -m pytest test_compatibility.py
    python test_compatibility.py
"""

import ast
import doctest
import functools
import graphlib
import importlib
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from checkpoints import load_checkpoint, load_model
from conftest import PROJECT, TINY, roughly_trained, run_script
from pap_smear_dataset import create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer
from system import machine
from system.devices import autocast, bfloat16_pays, choose_device, choose_precision
from unet import ProgressiveUNet
from unet_parts import upsample2x

LOWEST = {"numpy": "2.2.1", "matplotlib": "3.10.5", "scikit-image": "0.24.0", "scipy": "1.13.1", "torch": "2.5.1",
          "torchvision": "0.20.1"}
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA on this machine")


def requirements() -> list[Requirement]:
    lines = (PROJECT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_installed_versions_are_in_range(requirement):
    installed = metadata.version(requirement.name)
    assert requirement.specifier.contains(installed, prereleases=True), f"{requirement}, but {installed} is installed"


def test_ranges_begin_where_promised():
    ranges = {r.name: str(r.specifier) for r in requirements()}
    assert all(f">={low}" in ranges[name] for name, low in LOWEST.items())
    assert all("<" in spec for spec in ranges.values())


def test_python_is_new_enough():
    assert sys.version_info >= (3, 11)


def test_our_code_calls_nothing_deprecated(shared_root, tmp_path):
    """Whole runs in which every deprecation warning is an error, if our modules, torch or numpy are to blame."""
    ours = "|".join([*(p.stem for p in PROJECT.glob("*.py")), *(p.parent.name for p in PROJECT.glob("*/__init__.py"))])
    code = (
        "import sys, warnings, train_papsmear\n"
        "for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):\n"
        f"    warnings.filterwarnings('error', category=kind, module=r'({ours}|torch|numpy)\\b')\n"
        # TensorBoard and what it brings are not ours to mend.
        "    warnings.filterwarnings('ignore', category=kind, module=r'torch\\.utils\\.tensorboard')\n"
        "sys.exit(train_papsmear.main(sys.argv[1:]))\n")
    done = run_script("-c", code, "--data_root", shared_root, "--output_dir", tmp_path, "--experiment_name", "strict",
                      *TINY, "--average", "0.9")
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "strict/best_stage_4.pth"
    for script, options in (("predict_papsmear", (shared_root / "test/images", "--out", tmp_path / "predicted")),
                            ("evaluate_papsmear", ("--data_root", shared_root, "--instances"))):
        done = run_script("-c", code.replace("train_papsmear", script), checkpoint, *options)
        assert done.returncode == 0, done.stderr


def train_briefly(root, output, device, precision):
    torch.manual_seed(0)
    trainer = ProgressiveTrainer(ProgressiveUNet(base_channels=4), device=device, precision=precision,
                                 epochs_per_stage=[1, 0, 0, 1], output_dir=output)
    trainer.fit(create_progressive_dataloaders(root, dict.fromkeys((32, 64, 128, 256), 3), device=trainer.device),
                say=lambda line: None)
    return trainer


PLACES = [("cpu", "float32"), ("cpu", "bfloat16"), pytest.param(("cuda", "bfloat16"), marks=NEEDS_CUDA),
          pytest.param(("cuda", "float16"), marks=NEEDS_CUDA)]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_checkpoint_of_one_precision_or_device_loads_in_another(place, shared_root, tmp_path):
    train_briefly(shared_root, tmp_path / "a", *place)
    path = tmp_path / "a/best_stage_4.pth"
    assert all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.int64)
               for t in load_checkpoint(path)["model"].values())
    model = load_model(path)
    x = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        reference = model(x).sigmoid()
        for device, precision in (("cpu", "bfloat16"), ("cuda", "float16")):
            if device == "cuda" and not torch.cuda.is_available():
                continue
            with autocast(torch.device(device), precision):
                logits = model.to(device)(x.to(device))
            assert logits.dtype == torch.float32, "heads and sums of logits are float32 in every precision"
            assert (logits.sigmoid().cpu() - reference).abs().max() < 0.05
    resumed = ProgressiveTrainer(ProgressiveUNet(base_channels=4), device="cpu", precision="float32")
    resumed.resume(tmp_path / "a/last.pth")
    assert resumed.model.stage == 4


@NEEDS_CUDA
def test_cuda_is_reproducible_when_asked(shared_root, tmp_path):
    for name in "ab":
        done = run_script("train_papsmear.py", "--data_root", shared_root, "--output_dir", tmp_path,
                          "--experiment_name", name, *TINY, "--device", "cuda", "--deterministic")
        assert done.returncode == 0, done.stderr
    a, b = (load_checkpoint(tmp_path / name / "last.pth")["model"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


@NEEDS_CUDA
def test_batches_are_augmented_on_the_gpu_as_on_the_cpu(shared_root):
    here, there = (next(iter(create_progressive_dataloaders(shared_root, device=device)[64][0]))
                   for device in ("cpu", "cuda"))
    assert there["image"].device.type == "cuda"
    assert here["name"] == there["name"]
    for key in ("image", "mask"):
        assert (here[key] - there[key].cpu()).abs().max() < 1e-4


@NEEDS_CUDA
def test_compiled_steps_on_the_gpu_give_the_losses_of_plain_ones(shared_root):
    """Compiled code serves from the tenth batch on, when the statistics have their last momentum: 3 of 12 here."""
    losses, compiled_batches = {}, []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = ProgressiveTrainer(ProgressiveUNet(base_channels=4), "cuda", 6, precision="float32", compile=compiled)
        if compiled:
            trainer.parallel._compiled.register_forward_pre_hook(lambda *_: compiled_batches.append(1))
        loader = create_progressive_dataloaders(shared_root, {32: 3}, device="cuda")[32][0]
        losses[compiled] = [trainer.train_epoch(loader, epoch)["loss"] for epoch in range(6)]
    assert len(compiled_batches) == 3
    assert losses[True] == pytest.approx(losses[False], abs=1e-3)


def test_bfloat16_agrees_with_float32_at_every_scale():
    """Wrong results of bfloat16 kernels have been reported for some processors; ours are checked."""
    model = roughly_trained(1)
    model.set_stage(4)
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last)
    with torch.inference_mode():
        exact = model(x, return_all_scales=True)
        with autocast(torch.device("cpu"), "bfloat16"):
            rounded = model(x, return_all_scales=True)
    for k, (a, b) in enumerate(zip(exact, rounded, strict=True)):
        coarser = upsample2x(exact[k - 1]) if k else torch.zeros_like(a)
        residual = (a - coarser).abs().max()
        assert residual > 0.05, "this level adds something, so its decoder is seen"
        assert (a - b).abs().max() < 0.05 * a.abs().max() + 0.02


@pytest.mark.parametrize(("vendor", "flags", "pays"), [
    ("AuthenticAMD", "avx512f avx512_bf16", True), ("GenuineIntel", "avx512f avx512_bf16", False),
    ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", True), ("AuthenticAMD", "avx2", False)])
def test_bfloat16_is_chosen_where_it_pays(vendor, flags, pays, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n\n")
    opened = functools.partial(open, tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "open", lambda path, **kwargs: opened(**kwargs), raising=False)
    assert bfloat16_pays(torch.device("cpu")) is pays
    assert choose_precision("auto", torch.device("cpu")) == ("bfloat16" if pays else "float32")


def test_auto_takes_the_best_device_there_is():
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == best
    assert choose_precision("auto", torch.device("mps")) == "float32"


def test_a_system_that_tells_nothing_is_no_error(monkeypatch, tmp_path):
    assert machine.fields(str(tmp_path / "absent")) == {}
    monkeypatch.setattr(machine, "fields", lambda path: {})
    assert machine.processor()
    assert machine.free_memory() > 0
    assert machine.peak_memory() > 2 ** 20
    assert not machine.processor_has_bfloat16()


# The stations, each a module of the root or a folder: one imports from lines above its own and from itself alone.
LAYERS = (
    ("system",), ("images",), ("preparation",), ("unet_parts",), ("unet",), ("checkpoints",), ("nuclei",),
    ("scoring",), ("inference",), ("training",), ("reporting",), ("exporting",), ("pap_smear_dataset",),
    ("progressive_trainer",),
    ("train_papsmear", "evaluate_papsmear", "predict_papsmear", "prepare_data", "export_model", "report_runs",
     "example_usage"),
    ("benchmarks", "demo"))


def imported_modules(path: Path) -> set[str]:
    """Return the full names of what a file imports anywhere in it: modules, and what is taken from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


WITH_EXAMPLES = [path for path in sorted(PROJECT.rglob("*.py")) if not {".venv", "tests"} & set(
    path.relative_to(PROJECT).parts) and not path.name.startswith("test_") and ">>> " in path.read_text()]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_examples_of_docstrings_hold(path):
    name = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed


def test_modules_import_one_way():
    """From the machine to the command lines, without a circle; what is in a folder has one name, given by its file."""
    paths = [p for p in PROJECT.rglob("*.py") if not {".venv", "tests", "docs"} & set(p.relative_to(PROJECT).parts)
             and not p.name.startswith(("test_", "conftest", "__init__"))]
    modules = {".".join(p.relative_to(PROJECT).with_suffix("").parts): p for p in paths}
    level = {station: i for i, layer in enumerate(LAYERS) for station in layer}
    assert {name.split(".")[0] for name in modules} == set(level)
    imports = {name: imported_modules(path) & set(modules) for name, path in modules.items()}
    for name, path in modules.items():
        station = name.split(".")[0]
        of_tests = {other for other in imported_modules(path) if other.split(".")[0] in ("tests", "conftest")}
        of_leaves = {other for other in imports[name] if other.startswith(("preparation.", "benchmarks."))}
        assert not of_tests, f"{name} imports {of_tests}"
        assert not of_leaves or station in ("preparation", "prepare_data", "benchmarks"), f"{name} imports {of_leaves}"
    for name, others in imports.items():
        station = name.split(".")[0]
        wrong = {other for other in others if other.split(".")[0] != station
                 and level[other.split(".")[0]] >= level[station]}
        assert not wrong, f"{name} imports {wrong}"
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError
    for folder in {path.parent for path in paths} - {PROJECT} | {PROJECT / "tests"}:
        (sentence,) = ast.parse((folder / "__init__.py").read_text()).body
        assert isinstance(sentence.value, ast.Constant), f"{folder}: one sentence, no names"
    assert len(list(PROJECT.glob("*.py"))) <= 16


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
