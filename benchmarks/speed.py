"""Measure speed against what is usual, what growing saves, and how costs grow; images are made for it, none are needed.

    python -m benchmarks.speed
    python -m benchmarks.speed --quick --parts training,growth --out outputs/quick_benchmark

Every bar is a ratio of things that take turns within one run, the median over the rounds; an absolute figure says
something about the machine alone. Writes benchmark.json (every round), benchmark.md and, with the part `scaling`,
benchmark.png. The parts:

    training    ours against the classic U-Net (and packages of requirements-bench.txt, if installed) as usually trained
    input       what our loader delivers against what the network takes
    growth      what stages cost, and what a run that grows costs against one at 256 pixels
    start       seconds to --help and to the first step
    prediction  tiles against the network alone; memory a megapixel
    scaling     costs against images, side, channels and processes
"""

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from system.errors import UserError
from system.options import Parser, command, whole
from training.settings import PRESETS

# Torch and all modules that need it are imported inside the functions: --help and wrong options answer at once.

RESULTS = ("benchmark.json", "benchmark.md", "benchmark.png")
STAGES = (1, 2, 3, 4)
ROUNDS, QUICK_ROUNDS = 5, 3
IMAGES = 128  # synthetic ones on disk: a batch of stage 1, and the longest epoch of the part `scaling`
LOADED = {"cached": 64, "decoding": 16, "usual": 16}  # images of a pass over each loader
FIRST_STEP = ("import os, sys, train_papsmear; from torch.optim.optimizer import register_optimizer_step_post_hook; "
              "register_optimizer_step_post_hook(lambda *_: os._exit(0)); "
              "sys.exit(f'no step was taken, but the command ended with {train_papsmear.main(sys.argv[1:])}')")
IMPORT_OF_TORCH = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"


def part_list(text: str) -> tuple[str, ...]:
    """Check 'training,growth' and bring it into the order of `PARTS`."""
    names = text.split(",")
    if not set(names) <= set(PARTS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not some of {','.join(PARTS)}, joined by commas")
    return tuple(name for name in PARTS if name in names)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every option is checked by its type, before anything is loaded."""
    parser = Parser(prog="benchmarks.speed", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=part_list, default=tuple(PARTS), help=f"some of {','.join(PARTS)} (all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes, at the same width: 10 minutes")
    parser.add_argument("--rounds", type=whole(1), help=f"that count ({ROUNDS}; {QUICK_ROUNDS} with --quick)")
    parser.add_argument("--base_channels", type=whole(2), default=64, help="width of all networks (64)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (auto)")
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
                        help="of ours; what is usual is float32 (auto)")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"), help="folder (outputs/benchmark)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    return parser


def training(setting, record: dict) -> Iterator:
    """Compare training at 256 pixels: ours, the classic U-Net as usual and in our loop, other packages as usual."""
    from benchmarks.timing import (
        Measure,
        alternate,
        matrix_product,
        median,
        median_ratio,
        own_process,
        training_operations,
    )
    from benchmarks.workloads import BATCH, missing_networks, our_training, usual_networks, usual_trainings
    from unet import ProgressiveUNet

    missing = missing_networks(setting.base_channels)
    record["not_timed"] = missing
    for name, reason in missing.items():
        print(f"  {name}: not timed ({reason})")
    precisions = dict.fromkeys((setting.precision, "bfloat16", "float32"))
    products = {p: matrix_product(setting.device, p) for p in precisions}
    with own_process(usual_trainings, setting) as usual:
        rounds = record["rounds"] = alternate(
            {"ours": our_training(setting), "classic U-Net in our loop": our_training(setting, network="unet")}
            | {f"{name} as usual": work for name, work in usual.items()}
            | {f"matrix products in {p}": work for p, (work, _) in products.items()}, setting.rounds)
    ours, classic = rounds["ours"], rounds["classic U-Net as usual"]
    for name in [name for name in rounds if not name.startswith("matrix")]:
        yield Measure(name, BATCH / median(rounds[name]), "images/s")
    yield Measure("ours against the classic U-Net as usual", median_ratio(classic, ours), "x", bar=5)
    yield Measure("classic U-Net in our loop against itself as usual (precision, format, loader)",
                  median_ratio(classic, rounds["classic U-Net in our loop"]), "x")
    yield Measure("ours against the classic U-Net in our loop (the network)",
                  median_ratio(rounds["classic U-Net in our loop"], ours), "x")
    networks = usual_networks(setting.base_channels)
    for name in [name for name in networks if name != "classic U-Net"]:
        yield Measure(f"ours against {name} as usual", median_ratio(rounds[f"{name} as usual"], ours), "x")

    model = ProgressiveUNet(base_channels=setting.base_channels)
    model.set_stage(4)
    operations = training_operations(model, (1, 1, 256, 256))
    yield Measure("operations an image, ours", operations / 1e9, "GFLOP")
    for name, make in networks.items():
        yield Measure(f"operations an image, {name}", training_operations(make(), (2, 1, 256, 256)) / 1e9, "GFLOP")
    for p, (_, own) in products.items():
        yield Measure(f"matrix products in {p}", own / 1e9 / median(rounds[f"matrix products in {p}"]), "GFLOP/s")
    for p, (_, own) in products.items():
        share = median_ratio(rounds[f"matrix products in {p}"], ours) * BATCH * operations / own
        yield Measure(f"ours, in {setting.precision}, against matrix products in {p}", share, "%",
                      bar=0.75 if p == setting.precision == "bfloat16" else None)


@functools.cache
def stage_rounds(setting) -> dict[str, list[float]]:
    """Return the rounds that the parts `input` and `growth` share: the stages' trainings, loaders, matrix products."""
    from benchmarks.timing import alternate, matrix_product
    from benchmarks.workloads import loadings, our_training

    products, _ = matrix_product(setting.device, setting.precision)
    return alternate({f"training, stage {stage}": our_training(setting, stage) for stage in STAGES}
                     | loadings(setting, LOADED["cached"], LOADED["decoding"]) | {"matrix products": products},
                     setting.rounds)


def batch_size(stage: int) -> int:
    """Return the default batch size of a stage."""
    from images.resolutions import DEFAULT_BATCH_SIZES
    from unet import STAGE_RESOLUTIONS

    return DEFAULT_BATCH_SIZES[STAGE_RESOLUTIONS[stage]]


def loading(setting, record: dict) -> Iterator:
    """Compare what loaders deliver with what the network takes in training, at every stage."""
    from benchmarks.timing import Measure, median, median_ratio

    rounds = stage_rounds(setting)
    record["rounds"] = {name: rounds[name] for name in rounds if name != "matrix products"}
    names = {"cached": "our loader", "decoding": "our loader without a cache", "usual": "torch's loader, decoding"}
    for stage in STAGES:
        network = rounds[f"training, stage {stage}"]
        for kind, name in names.items():
            own = rounds[f"{kind}, stage {stage}"]
            yield Measure(f"stage {stage}: {name}", LOADED[kind] / median(own), "images/s")
            yield Measure(f"stage {stage}: {name} against the network",
                          median_ratio(network, own) * LOADED[kind] / batch_size(stage), "x",
                          bar=20 if kind == "cached" else None)


def growth_ratio(epochs: Sequence[int], cost: dict[int, float]) -> float:
    """Return what a run that grows costs, as a share of as many epochs at stage 4.

    Args:
        epochs: of the stages 1..4.
        cost: stage -> cost of an image.

    >>> growth_ratio([10, 10, 10, 10], {1: 1, 2: 2, 3: 3, 4: 4})
    0.625
    """
    return sum(n * cost[stage] for stage, n in zip(STAGES, epochs, strict=True)) / (sum(epochs) * cost[4])


def growth(setting, record: dict) -> Iterator:
    """Say what an image costs at each stage, and what growing saves against training at stage 4 alone."""
    from benchmarks.timing import Measure, matrix_product, median, median_ratio, training_operations
    from unet import STAGE_RESOLUTIONS, ProgressiveUNet

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
    by_operations = growth_ratio([1] * 4, operations)
    by_time = median([growth_ratio([1] * 4, cost) for cost in seconds])
    yield Measure("equal epochs at all stages against as many at stage 4, by operations", by_operations, "%")
    yield Measure("the same by wall-clock", by_time, "%")
    yield Measure("the second over the first", by_time / by_operations, "x", bar=1.1, at_most=True)
    for name, preset in PRESETS.items():
        epochs = preset["epochs_per_stage"]
        yield Measure(f"epochs of --preset {name} ({','.join(map(str, epochs))}) against as many at stage 4, by "
                      f"wall-clock", median([growth_ratio(epochs, cost) for cost in seconds]), "%", bar=0.5,
                      at_most=True)
        yield Measure(f"epochs of --preset {name}, by operations", growth_ratio(epochs, operations), "%")


def start(setting, record: dict) -> Iterator:
    """Time train_papsmear.py to its help and to the first step of the optimizer on the bundled sample."""
    from benchmarks.timing import Measure, alternate, median, run_python

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


def prediction(setting, record: dict) -> Iterator:
    """Compare tiled prediction with the network alone, and weigh it at several sizes of the image."""
    import numpy as np

    from benchmarks.timing import Measure, alternate, call_in_processes, median, median_ratio, own_process
    from benchmarks.workloads import tiled_prediction

    height, width = (1024, 1536) if setting.quick else (1536, 1536)
    with own_process(tiled_prediction, setting, height, width) as contenders:
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


def scaling(setting, record: dict) -> Iterator:
    """Measure costs at several sizes and fit a power of the size to each."""
    from benchmarks.timing import Measure, alternate, median, power
    from benchmarks.workloads import scaled_costs

    record["rounds"], record["series"] = {}, []
    for cost, size, contenders, rounds, warm_up in scaled_costs(setting):
        found = alternate(contenders, rounds, warm_up)
        seconds = [median(own) for own in found.values()]
        record["rounds"][f"{cost}, against {size}"] = {str(n): own for n, own in found.items()}
        series = {"cost": cost, "size": size, "sizes": list(found), "seconds": seconds,
                  "power": power(list(found), seconds)}
        record["series"].append(series)
        for n, own in zip(found, seconds, strict=True):
            print(f"  {cost}, {size} {n}: {own:.3g} s")
        yield Measure(f"{cost}, against {size}", series["power"], "(power)")


PARTS = {"training": training, "input": loading, "growth": growth, "start": start, "prediction": prediction,
         "scaling": scaling}


def described(results: dict) -> str:
    """Return the results as Markdown: machine, one table of all figures, one of the sizes."""
    machine, settings = results["machine"], results["settings"]
    lines = ["# Benchmark", "",
             f"{machine['processor']}, {machine['cpu_count']} cores, {machine['torch_threads']} threads"
             + (f", {machine['cuda']}" if machine["cuda"] else "") + f"; torch {machine['packages']['torch']}; device "
             f"{settings['device']}, precision {settings['precision']}, {settings['base_channels']} channels; medians "
             f"of {settings['rounds']} rounds" + (", --quick" if settings["quick"] else "")
             + f"; load average at the start {machine['load_average']}.", "",
             "| part | figure | value | bar | |", "|---|---|---|---|---|"]
    for part, record in results["parts"].items():
        lines += [f"| {part} | {m['what']} | {m['shown']} | {m['limit']} | {m['verdict']} |"
                  for m in record["measures"]]
        lines += [f"| {part} | {name} | not timed | | {why} |" for name, why in record.get("not_timed", {}).items()]
    series = results["parts"].get("scaling", {}).get("series", [])
    if series:
        lines += ["", "| cost | against | seconds | power |", "|---|---|---|---|"]
        lines += [f"| {s['cost']} | {s['size']} | " + ", ".join(f"{n}: {t:.3g}" for n, t in zip(
            s["sizes"], s["seconds"], strict=True)) + f" | {s['power']:.2f} |" for s in series]
        lines += ["", "![Costs against sizes, both relative to the smallest](benchmark.png)"]
    return "\n".join(lines) + "\n"


def write_results(results: dict, folder: Path) -> None:
    """Write what has been measured so far."""
    from benchmarks.pictures import scaling_curves
    from system.atomic import atomic_write
    from training.run_folder import RunFolder

    RunFolder(folder).write_json("benchmark.json", results)
    with atomic_write(folder / "benchmark.md") as file:
        file.write(described(results).encode())
    if "scaling" in results["parts"]:
        scaling_curves(results["parts"]["scaling"]["series"], folder / "benchmark.png")


def prepared_folder(folder: Path, overwrite: bool) -> Path:
    """Make the folder of the results; raises UserError for results that are there and were not to be replaced."""
    existing = [folder / name for name in RESULTS if (folder / name).exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]}: exists already, and nothing is overwritten unasked. Choose another --out, or "
                         f"replace it with --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    for path in existing:
        path.unlink()
    return folder


def run(args: argparse.Namespace) -> None:
    """Measure every part, print its figures as they come, and write the results after each."""
    from benchmarks.workloads import Setting, write_fields
    from system.devices import choose_device, choose_precision
    from system.machine import processor
    from training.run_folder import environment

    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    folder = prepared_folder(args.out, args.overwrite)
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    results = {"machine": environment() | {"processor": processor(), "load_average": load},
               "settings": {"device": str(device), "precision": precision, "base_channels": args.base_channels,
                            "rounds": args.rounds, "quick": args.quick, "parts": list(args.parts)}, "parts": {}}
    print(f"{processor()}, {os.cpu_count()} cores; device {device}, precision {precision}, {args.base_channels} "
          f"channels, {args.rounds} rounds")
    if load is not None and load > 0.5:
        print(f"warning: other work is running on this machine (load average {load}); absolute figures are of no use, "
              f"and ratios are less certain")
    with tempfile.TemporaryDirectory() as root:
        setting = Setting(Path(root), args.base_channels, args.rounds, args.quick, device, precision)
        write_fields(setting.root, IMAGES)
        for name in args.parts:
            print(f"{name}:", flush=True)
            begin, record, measures = time.perf_counter(), {}, []
            for measure in PARTS[name](setting, record):
                print(f"  {measure}", flush=True)
                measures.append(dataclasses.asdict(measure) | {"holds": measure.holds, "shown": measure.shown(
                    measure.value), "limit": measure.limit, "verdict": measure.verdict})
            results["parts"][name] = {"seconds": time.perf_counter() - begin, "measures": measures} | record
            write_results(results, folder)
    verdicts = [m["holds"] for record in results["parts"].values() for m in record["measures"] if m["bar"] is not None]
    print(f"{sum(verdicts)} of {len(verdicts)} bars hold; look at {folder}/: "
          + ", ".join(name for name in RESULTS if (folder / name).exists()))


@command(interrupted="finished parts are in --out")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    run(args)


if __name__ == "__main__":
    sys.exit(main())
