"""Measure speed against a baseline, what growing saves, and how costs grow; images are made for it, none are needed.

    python benchmarks/speed.py
    python benchmarks/speed.py --quick --parts training,growth --out outputs/quick_benchmark

Every bar is a ratio of things that take turns within one run, the median over the rounds; an absolute figure says
something about the machine alone. Writes benchmark.json (every round), benchmark.md and, with the part `scaling`,
benchmark.png. The parts:

    training    ours against the baseline training (float32, plain loader, Adam, BCE) of the classic U-Net, and of the
                packages of requirements-bench.txt that are installed
    input       what our loader delivers against what the network takes
    growth      what stages cost, and what a run that grows costs against one at 256 pixels
    start       seconds to --help and to the first step
    prediction  tiles against the network alone; memory a megapixel
    scaling     costs against images, side, channels and processes
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file: modules are found from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from system.errors import UserError
from system.options import Parser, add_device, add_precision, command, whole

# Torch and all modules that need it are imported inside the functions: --help and wrong options answer at once.

PARTS = ("training", "input", "growth", "start", "prediction", "scaling")  # of `parts.MEASURES`
ROUNDS, QUICK_ROUNDS = 5, 3
IMAGES = 128  # synthetic ones on disk: a batch of stage 1, and the longest epoch of the part `scaling`
RESULTS = ("benchmark.json", "benchmark.md", "benchmark.png")


def part_list(text: str) -> tuple[str, ...]:
    """Check 'training,growth' and bring it into the order of `PARTS`."""
    names = text.split(",")
    if not set(names) <= set(PARTS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not some of {','.join(PARTS)}, joined by commas")
    return tuple(name for name in PARTS if name in names)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every option is checked by its type, before anything is loaded."""
    parser = Parser(prog="benchmarks/speed.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=part_list, default=PARTS, help=f"some of {','.join(PARTS)} (all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes, at the same width: 10 minutes")
    parser.add_argument("--rounds", type=whole(1), help=f"that count ({ROUNDS}; {QUICK_ROUNDS} with --quick)")
    parser.add_argument("--base_channels", type=whole(2), default=64, help="width of all networks (64)")
    add_device(parser.add_argument)
    add_precision(parser.add_argument, "of ours, the baseline is float32; ")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"), help="folder (outputs/benchmark)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    return parser


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
    from benchmarks.parts import MEASURES
    from benchmarks.workloads import Setting, write_fields
    from system.devices import choose_device, choose_precision, set_up_process
    from system.machine import processor
    from training.run_folder import environment

    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    set_up_process(device, precision)  # as train_papsmear.py does; the baseline runs in a separate process without it
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
            for measure in MEASURES[name](setting, record):
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
