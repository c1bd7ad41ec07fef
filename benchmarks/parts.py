"""The parts of the speed benchmark: each measures, and yields its figures with the bars that they should reach.

Each takes the `benchmarks.workloads.Setting` and a record for benchmark.json, into which it puts what was measured in
every round.
"""

import functools
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.timing import (
    Measure,
    alternate,
    call_in_processes,
    matrix_product,
    median,
    median_ratio,
    power,
    run_python,
    separate_process,
    training_operations,
)
from benchmarks.workloads import (
    BATCH,
    Setting,
    baseline_networks,
    baseline_trainings,
    loadings,
    missing_networks,
    our_training,
    scaled_costs,
    tiled_prediction,
)
from images.resolutions import DEFAULT_BATCH_SIZES
from training.dealing import SHARES, deal
from training.schedule import WORK
from training.settings import PRESETS
from unet import STAGE_RESOLUTIONS, ProgressiveUNet

STAGES = tuple(STAGE_RESOLUTIONS)
LOADED = {"cached": 64, "decoding": 16, "baseline": 16}  # images of a pass over each loader
BASELINE = "baseline training (float32, plain loader, Adam, BCE)"
FIRST_STEP = ("import os, sys, train_papsmear; from torch.optim.optimizer import register_optimizer_step_post_hook; "
              "register_optimizer_step_post_hook(lambda *_: os._exit(0)); "
              "sys.exit(f'no step was taken, but the command ended with {train_papsmear.main(sys.argv[1:])}')")
IMPORT_OF_TORCH = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"


def training(setting: Setting, record: dict) -> Iterator:
    """Compare training at 256 pixels: ours, the classic U-Net in our loop, and the baseline training of all others."""
    missing = missing_networks(setting.base_channels)
    record["not_timed"] = missing
    for name, reason in missing.items():
        print(f"  {name}: not timed ({reason})")
    precisions = dict.fromkeys((setting.precision, "bfloat16", "float32"))
    products = {p: matrix_product(setting.device, p) for p in precisions}
    with separate_process(baseline_trainings, setting) as baseline:
        rounds = record["rounds"] = alternate(
            {"ours": our_training(setting), "classic U-Net in our loop": our_training(setting, network="unet")}
            | {f"{name}, {BASELINE}": work for name, work in baseline.items()}
            | {f"matrix products in {p}": work for p, (work, _) in products.items()}, setting.rounds)
    ours, classic = rounds["ours"], rounds[f"classic U-Net, {BASELINE}"]
    for name in [name for name in rounds if not name.startswith("matrix")]:
        yield Measure(name, BATCH / median(rounds[name]), "images/s")
    yield Measure("ours against the classic U-Net, baseline training", median_ratio(classic, ours), "x", bar=5)
    yield Measure("classic U-Net in our loop against its baseline training (precision, format, loader)",
                  median_ratio(classic, rounds["classic U-Net in our loop"]), "x")
    yield Measure("ours against the classic U-Net in our loop (the network)",
                  median_ratio(rounds["classic U-Net in our loop"], ours), "x")
    networks = baseline_networks(setting.base_channels)
    for name in [name for name in networks if name != "classic U-Net"]:
        yield Measure(f"ours against {name}, baseline training", median_ratio(rounds[f"{name}, {BASELINE}"], ours), "x")

    model = ProgressiveUNet(base_channels=setting.base_channels)
    model.set_stage(4)
    operations = training_operations(model, (1, 1, 256, 256))
    yield Measure("operations an image, ours", operations / 1e9, "GFLOP")
    for name, make in networks.items():
        yield Measure(f"operations an image, {name}", training_operations(make(), (2, 1, 256, 256)) / 1e9, "GFLOP")
    for p, (_, of_products) in products.items():
        seconds = median(rounds[f"matrix products in {p}"])
        yield Measure(f"matrix products in {p}", of_products / 1e9 / seconds, "GFLOP/s")
    low, full = "matrix products in bfloat16", "matrix products in float32"
    yield Measure("bfloat16 products against float32 ones, on which the bar of 5x depends",
                  median_ratio(rounds[full], rounds[low]), "x")
    for p, (_, of_products) in products.items():
        share = median_ratio(rounds[f"matrix products in {p}"], ours) * BATCH * operations / of_products
        yield Measure(f"ours, in {setting.precision}, against matrix products in {p}", share, "%",
                      bar=0.75 if p == setting.precision == "bfloat16" else None)


@functools.cache
def stage_rounds(setting: Setting) -> dict[str, list[float]]:
    """Return the rounds that the parts `input` and `growth` share: the stages' trainings, loaders, matrix products."""
    products, _ = matrix_product(setting.device, setting.precision)
    return alternate({f"training, stage {stage}": our_training(setting, stage) for stage in STAGES}
                     | loadings(setting, LOADED["cached"], LOADED["decoding"]) | {"matrix products": products},
                     setting.rounds)


def batch_size(stage: int) -> int:
    """Return the default batch size of a stage."""
    return DEFAULT_BATCH_SIZES[STAGE_RESOLUTIONS[stage]]


def loading(setting: Setting, record: dict) -> Iterator:
    """Compare what loaders deliver with what the network takes in training, at every stage."""
    rounds = stage_rounds(setting)
    record["rounds"] = {name: rounds[name] for name in rounds if name != "matrix products"}
    names = {"cached": "our loader", "decoding": "our loader without a cache",
             "baseline": "plain torch loader, decoding"}
    for stage in STAGES:
        network = rounds[f"training, stage {stage}"]
        for kind, name in names.items():
            loader = rounds[f"{kind}, stage {stage}"]
            yield Measure(f"stage {stage}: {name}", LOADED[kind] / median(loader), "images/s")
            yield Measure(f"stage {stage}: {name} against the network",
                          median_ratio(network, loader) * LOADED[kind] / batch_size(stage), "x",
                          bar=20 if kind == "cached" else None)


def cost_of(epochs: Sequence[int], cost: dict[int, float]) -> float:
    """Return what epochs of the stages 1..4 cost.

    Args:
        cost: stage -> cost of an epoch.

    >>> cost_of([10, 10, 10, 10], {1: 1, 2: 2, 3: 3, 4: 4})
    100
    """
    return sum(n * cost[stage] for stage, n in zip(STAGES, epochs, strict=True))


def growth_ratio(cost: dict[int, float]) -> float:
    """Return what equal epochs at all stages cost, as a share of as many at stage 4.

    >>> growth_ratio({1: 1, 2: 2, 3: 3, 4: 4})
    0.625
    """
    return cost_of([1, 1, 1, 1], cost) / (4 * cost[4])


def growth(setting: Setting, record: dict) -> Iterator:
    """Say what an image costs at each stage, and what growing saves against training at stage 4 alone."""
    rounds = stage_rounds(setting)
    trainings = {stage: rounds[f"training, stage {stage}"] for stage in STAGES}
    record["rounds"] = {name: rounds[name] for name in rounds if name.startswith(("training", "matrix"))}
    _, of_products = matrix_product(setting.device, setting.precision)
    model, operations = ProgressiveUNet(base_channels=setting.base_channels), {}
    for stage, side in STAGE_RESOLUTIONS.items():
        model.set_stage(stage)
        operations[stage] = training_operations(model, (1, 1, side, side))
        images = batch_size(stage)
        yield Measure(f"stage {stage}", images / median(trainings[stage]), "images/s")
        yield Measure(f"stage {stage}: operations an image", operations[stage] / 1e9, "GFLOP")
        share = median_ratio(rounds["matrix products"], trainings[stage]) * images * operations[stage] / of_products
        yield Measure(f"stage {stage}: against matrix products in {setting.precision}", share, "%")

    seconds = [{stage: trainings[stage][i] / batch_size(stage) for stage in STAGES} for i in range(setting.rounds)]
    by_operations = growth_ratio(operations)
    by_time = median([growth_ratio(cost) for cost in seconds])
    yield Measure("equal epochs at all stages against as many at stage 4, by operations", by_operations, "%")
    yield Measure("the same by wall-clock", by_time, "%")
    yield Measure("the second over the first", by_time / by_operations, "x", bar=1.1, at_most=True)
    for name, preset in PRESETS.items():
        epochs = deal(preset["budget"], preset.get("shares", SHARES))
        direct = cost_of(epochs, WORK) / WORK[4]  # epochs with as many operations
        yield Measure(f"--preset {name} ({','.join(map(str, epochs))}) against direct training with as many "
                      f"operations, by wall-clock",
                      median([cost_of(epochs, cost) / (direct * cost[4]) for cost in seconds]), "%")


def start(setting: Setting, record: dict) -> Iterator:
    """Time train_papsmear.py to its help and to the first step of the optimizer on the bundled sample."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("--data_root", "data", "--base_channels", setting.base_channels, "--device", setting.device,
                   "--precision", setting.precision, "--output_dir", folder, "--experiment_name", "first_step",
                   "--overwrite")
        rounds = record["rounds"] = alternate({
            "help": lambda: run_python("train_papsmear.py", "--help")[0],
            "import of torch": lambda: float(run_python("-c", IMPORT_OF_TORCH)[1]),
            "first step": lambda: run_python("-c", FIRST_STEP, *options)[0]}, setting.rounds)
    yield Measure("train_papsmear.py --help", median(rounds["help"]), "s", bar=0.5, at_most=True)
    yield Measure("import of torch", median(rounds["import of torch"]), "s")
    yield Measure("command to first step, import of torch included", median(rounds["first step"]), "s")
    without = [a - b for a, b in zip(rounds["first step"], rounds["import of torch"], strict=True)]
    yield Measure("command to first step, import of torch excluded", median(without), "s", bar=8, at_most=True)


def prediction(setting: Setting, record: dict) -> Iterator:
    """Compare tiled prediction with the network alone, and weigh it at several sizes of the image."""
    height, width = (1024, 1536) if setting.quick else (1536, 1536)
    with separate_process(tiled_prediction, setting, height, width) as contenders:
        rounds = record["rounds"] = alternate(contenders, setting.rounds)
    yield Measure(f"prediction of {height}x{width} pixels", height * width / 1e6 / median(rounds["prediction"]),
                  "megapixels/s")
    yield Measure("prediction against the network alone on its tiles",
                  median_ratio(rounds["forward"], rounds["prediction"]), "%", bar=0.9)
    sides = (1024, 1536) if setting.quick else (1024, 2048, 3072)
    peaks = [call_in_processes("benchmarks.workloads.memory_of_prediction", side, setting.base_channels,
                               str(setting.device), setting.precision) for side in sides]
    record["peak_memory"] = dict(zip(map(str, sides), peaks, strict=True))
    for side, peak in zip(sides, peaks, strict=True):
        yield Measure(f"peak memory of predicting {side}x{side} pixels", peak / 2 ** 20, "MiB")
    slope, constant = np.polyfit([side ** 2 / 1e6 for side in sides], [peak / 2 ** 20 for peak in peaks], 1)
    yield Measure("memory a megapixel of image", float(slope), "MiB")
    yield Measure("memory besides", float(constant), "MiB")


def scaling(setting: Setting, record: dict) -> Iterator:
    """Measure costs at several sizes and fit a power of the size to each."""
    record["rounds"], record["series"] = {}, []
    for cost, size, contenders, rounds, warm_up in scaled_costs(setting):
        found = alternate(contenders, rounds, warm_up)
        seconds = [median(costs) for costs in found.values()]
        record["rounds"][f"{cost}, against {size}"] = {str(n): costs for n, costs in found.items()}
        series = {"cost": cost, "size": size, "sizes": list(found), "seconds": seconds,
                  "power": power(list(found), seconds)}
        record["series"].append(series)
        for n, middle in zip(found, seconds, strict=True):
            print(f"  {cost}, {size} {n}: {middle:.3g} s")
        yield Measure(f"{cost}, against {size}", series["power"], "(power)")


MEASURES = {"training": training, "input": loading, "growth": growth, "start": start, "prediction": prediction,
            "scaling": scaling}
