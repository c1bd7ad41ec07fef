"""Measure what a choice brings, on any data set.

    python benchmarks/experiments.py finetune outputs/NAME/best_stage_4.pth --data_root data_mine --out outputs/curve
    python benchmarks/experiments.py precision --data_root data --preset quick --seeds 5 --out outputs/precision
    python benchmarks/experiments.py growth --data_root data --base_channels 16 --seeds 3 --out outputs/growth
    python benchmarks/experiments.py growth --out outputs/growth --report

growth: arms with equal operations, several seeds: direct (at 256 pixels from the start), grown (27, 5, 7, 61 % of the
operations at stages 1 to 4), late (grown, 5, 9, 34, 52 %, the default of train_papsmear.py), unet (the classic one,
direct), image_once (direct, the image read at the finest level alone), usual (the classic U-Net with the settings of
the script that is used most). --minutes gives equal time instead. Takes the options of train_papsmear.py but those that
the study decides; --arm NAME="OPTIONS" adds an arm. The last weights are scored. Each training is a process of its own.
After a kill the same command goes on; more seeds, arms or another --budget join what is there. Writes trainings.csv,
images.csv, epochs.csv, growth.md (means, paired differences to the first arm with intervals, operations and minutes to
equal Dice, Dice before and after each growth), growth.png, settings.json and runs/. --report writes the text and the
picture anew from the tables.

finetune: test Dice against the number of training images, started from the checkpoint and from scratch, with all else
equal but the learning rate: the same images, number of steps and schedule at 256 pixels, the last weights scored. The
checkpoint as it is stands beside them, with 0 images. Writes finetune.csv (one row a training) and finetune.png.

precision: the same training in bfloat16 and in float32, in turn, for each seed; the test Dice of both, image by image,
and whether their difference lies within 0.01 of zero. Takes the options of train_papsmear.py but those on precision,
seed and run folder. Writes precision.csv (one row an image and seed), precision.json and a run folder a training.
"""

import argparse
import contextlib
import io
import math
import re
import sys
import time
from pathlib import Path

if not __package__:  # run as a file: modules are found from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import growth
from benchmarks.growth_arms import ARMS
from benchmarks.growth_tables import MINUTES, TABLES
from system.errors import UserError
from system.locks import LOCK, held_lock
from system.options import LARGEST, Parser, add_device, command, folder_name, number, whole

# Torch and all modules that need it are imported inside the functions: --help and wrong options answer at once.

STARTS = ("from scratch", "from the checkpoint")
TABLE, PICTURE = "finetune.csv", "finetune.png"
PRECISIONS = ("bfloat16", "float32")
PRECISION_TABLE, PRECISION_SUMMARY = "precision.csv", "precision.json"
MARGIN = 0.01  # of Dice, within which two precisions count as equal
DECIDED = ("precision", "seed", "output_dir", "experiment_name", "resume", "overwrite", "dry_run")


def count_list(text: str) -> tuple[int, ...]:
    """Read rising numbers joined by commas: '5,10,20'."""
    counts = tuple(map(int, text.split(","))) if re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text) else ()
    if not counts or sorted(set(counts)) != list(counts):
        raise argparse.ArgumentTypeError(f"{text!r} is not rising whole numbers of at least 1 joined by commas, e.g. "
                                         f"5,10,20")
    return counts


def arm_list(text: str) -> tuple[str, ...]:
    """Read names of arms joined by commas: 'direct,grown'."""
    names = tuple(text.split(","))
    if len(set(names)) < len(names) or not set(names) <= set(ARMS):
        raise argparse.ArgumentTypeError(f"{text!r} is not some of {','.join(ARMS)}, each once; --arm "
                                         f"NAME=\"OPTIONS\" adds another")
    return names


def own_arm(text: str) -> tuple[str, str]:
    """Read 'NAME=OPTIONS'."""
    name, equals, options = text.partition("=")
    if not equals or name in ARMS:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=OPTIONS with a name of your own, e.g. clipped=\"--clip_"
                                         f"norm 1\"")
    return folder_name(name), options


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every option is checked by its type, before anything is loaded."""
    parser = Parser(prog="benchmarks/experiments.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    experiments = parser.add_subparsers(dest="experiment", required=True)
    finetune = experiments.add_parser("finetune", allow_abbrev=False)
    finetune.add_argument("checkpoint", help="of stage 4; its network, classes and targets are used")
    finetune.add_argument("--data_root", required=True, help="folder with train|valid|test / images|masks")
    finetune.add_argument("--counts", type=count_list, default=(5, 10, 20), help="training images, in turn (5,10,20)")
    finetune.add_argument("--seeds", type=whole(1), default=3, help="trainings at each count, with other images (3)")
    finetune.add_argument("--steps", type=whole(1), default=150, help="of the optimizer, at least, a training (150)")
    finetune.add_argument("--batch_size", type=whole(1), default=8)
    finetune.add_argument("--lr", type=number(0, above=True), default=1e-3, help="full rate from scratch (1e-3)")
    finetune.add_argument("--finetune_lr", type=number(0, above=True), default=3e-4,
                          help="full rate from the checkpoint (3e-4)")
    finetune.add_argument("--out", required=True, help="folder for the results")
    add_device(finetune.add_argument)
    study = experiments.add_parser("growth", allow_abbrev=False, usage="%(prog)s [-h] --out OUT [--arms ARMS] [--arm "
                                   "NAME=OPTIONS] [--seeds SEEDS] [--first_seed SEED] [--budget N | --minutes M] "
                                   "[--jobs JOBS] [--report] [options of train_papsmear.py]", epilog="All options of "
                                   "train_papsmear.py are taken, but --"
                                   f"{', --'.join((*growth.DECIDED, *growth.OF_ARMS))}.")
    study.add_argument("--out", required=True, help="folder of the study; one that is there goes on")
    study.add_argument("--arms", type=arm_list, default=("direct", "late"),
                       help=f"some of {','.join(ARMS)}; all are compared with the first (direct,late)")
    study.add_argument("--arm", type=own_arm, action="append", metavar='NAME="OPTIONS"',
                       help="another arm, with these options of train_papsmear.py")
    study.add_argument("--seeds", type=whole(1), default=3, help="trainings of each arm (3)")
    study.add_argument("--first_seed", type=whole(0), default=0, help="seeds count from it (0)")
    length = study.add_mutually_exclusive_group()
    length.add_argument("--budget", type=number(0, LARGEST, above=True), default=10.0,
                        help="operations of each training, in epochs at 256 pixels (10)")
    length.add_argument("--minutes", type=number(0, LARGEST, above=True),
                        help="instead: of each training, which measures and deals them by itself")
    study.add_argument("--jobs", type=whole(1, 64), default=1, help="trainings at a time, which share the cores (1)")
    study.add_argument("--report", action="store_true", help="write growth.md and growth.png anew, without a training")
    precision = experiments.add_parser("precision", allow_abbrev=False, usage="%(prog)s [-h] [--seeds SEEDS] --out OUT "
                                       "[options of train_papsmear.py]", epilog="All options of train_papsmear.py are "
                                       f"taken, but --{', --'.join(DECIDED)}.")
    precision.add_argument("--seeds", type=whole(1), default=5, help="trainings in each precision (5)")
    precision.add_argument("--out", required=True, help="folder for the results")
    return parser


def results_folder(out: str, *names: str):
    """Return the folder for results; raises UserError if one of these is in it already."""
    from training.run_folder import RunFolder

    folder = RunFolder(Path(out))
    for name in names:
        if (folder.path / name).exists():
            raise UserError(f"{folder.path / name}: exists already, and nothing is overwritten unasked. Choose "
                             f"another --out")
    return folder


def study_growing(args: argparse.Namespace, options: list[str]) -> None:
    """Run the trainings of a study that are missing, unless --report is given; write and print the report."""
    from benchmarks.growth_report import PICTURE, REPORT, write_report

    out = Path(args.out)
    if not args.report:
        names = [name for name, _ in args.arm or ()]
        if len(set(names)) < len(names):
            raise UserError(f"--arm {max(names, key=names.count)} is given twice. Give each arm a name of its own")
        arms = {name: ARMS[name] for name in args.arms} | dict(args.arm or ())
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        budget = f"{args.minutes:g}{MINUTES}" if args.minutes else f"{args.budget:g}"
        trainings = growth.planned(out, arms, budget, seeds, options)
        with held_lock(out / LOCK, "this study", "choose another --out"):
            growth.run_study(out, trainings, growth.check_settings(out, trainings, options), args.jobs)
    elif options:
        raise UserError(f"--report reads the tables in --out alone and takes no {options[0]}. Leave it out")
    print(write_report(out))
    print(f"look at {out}/: {REPORT}, {PICTURE}, {', '.join(TABLES)}")


def measure_finetuning(args: argparse.Namespace) -> None:
    """Train at every count, seed and start; print, save and draw the test Dice."""
    import numpy as np

    from benchmarks.pictures import curves_over_counts
    from checkpoints import load_checkpoint
    from images.pyramid import open_pyramids
    from inference import Predictor
    from scoring.scores import score_pairs, scored_pairs, summarise
    from system.devices import choose_device, set_up_process

    set_up_process(choose_device(args.device), "auto")
    checkpoint = load_checkpoint(Path(args.checkpoint))
    if checkpoint["stage"] != 4:
        raise UserError(f"{args.checkpoint}: its stage is {checkpoint['stage']}; the curve is measured at stage 4. "
                         f"Take a best_stage_4.pth")
    folder = results_folder(args.out, TABLE)
    recipe = checkpoint["data"]
    train = open_pyramids(args.data_root, recipe.in_channels, recipe.classes, use_augmented=False, cache_images=False,
                          wanted=("train",), targets=recipe.targets)["train"]
    if max(args.counts) > len(train):
        raise UserError(f"--counts {max(args.counts)}: {args.data_root} has {len(train)} training images that are no "
                         f"copies. Ask for fewer")
    pairs = scored_pairs(Path(args.data_root), "test", use_augmented=False)
    trainings = len(args.counts) * args.seeds * len(STARTS)
    print(f"{trainings} trainings of about {args.steps} steps; {len(pairs)} test images")
    untouched = summarise(score_pairs(Predictor(args.checkpoint, args.device), pairs))["dice"]
    rows = [{"images": 0, "seed": 0, "start": STARTS[1], "dice": untouched["mean"], "std": untouched["std"],
             "seconds": 0}]
    print(f"   0 images, the checkpoint as it is      test Dice {untouched['mean']:.4f}")
    for count in args.counts:
        for seed in range(args.seeds):
            chosen = np.random.default_rng(seed).permutation(len(train))[:count]  # larger counts contain the smaller
            few = train.subset(chosen)
            for start in STARTS:
                row = {"images": count, "seed": seed, "start": start}
                rows.append(row | train_and_score(args, checkpoint, start, few, pairs, seed))
                print("{images:>4} images, seed {seed}, {start:<19}  test Dice {dice:.4f}  {seconds:.0f} s"
                      .format(**rows[-1]), flush=True)
                folder.write_csv(TABLE, rows, tuple(rows[0]))
    curves_over_counts(rows, folder.file(PICTURE))
    print(f"look at {folder.path}/: {PICTURE}, {TABLE}")


def train_and_score(args: argparse.Namespace, checkpoint: dict, start: str, train, pairs: list, seed: int) -> dict:
    """Train on a pyramid of few images and return mean and standard deviation of the test Dice, and the seconds."""
    import tempfile

    import torch

    from inference import Predictor
    from pap_smear_dataset import create_progressive_dataloaders
    from progressive_trainer import ProgressiveTrainer
    from scoring.scores import score_pairs, summarise
    from unet import build_model

    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = build_model(checkpoint["model_args"])
    model.set_stage(4)
    if start == STARTS[1]:
        model.transfer_weights(checkpoint["model"])
    batch_size, first = min(args.batch_size, len(train)), train.subset([0])
    with tempfile.TemporaryDirectory() as folder:
        trainer = ProgressiveTrainer(
            model, args.device, math.ceil(args.steps * batch_size / len(train)),
            args.lr if start == STARTS[0] else args.finetune_lr, seed=seed, output_dir=Path(folder) / "run", keep=0)
        loaders = create_progressive_dataloaders(
            batch_sizes={256: batch_size}, seed=seed, device=trainer.device,
            pyramids={"train": train, "valid": first, "test": first})
        trainer.fit(loaders, say=lambda line: None)
        scores = summarise(score_pairs(Predictor(trainer.folder.file("final_model.pth"), args.device), pairs))
    return {"dice": scores["dice"]["mean"], "std": scores["dice"]["std"], "seconds": time.perf_counter() - begin}


def measure_precision(args: argparse.Namespace, options: list[str]) -> None:
    """Train with these options of train_papsmear.py in both precisions for each seed; print and save the test Dice."""
    from training.settings import parse

    growth.refuse_decided(options, DECIDED, "the experiment: both precisions are trained for each of --seeds, in "
                                            "folders of --out")
    runs = [(seed, precision, parse([*options, "--seed", str(seed), "--precision", precision, "--output_dir", args.out,
                                     "--experiment_name", f"seed_{seed}_{precision}"]))
            for seed in range(args.seeds) for precision in PRECISIONS]
    folder = results_folder(args.out, PRECISION_TABLE, *(settings.experiment_name for *_, settings in runs))
    columns = ("seed", "image", *(f"dice_{precision}" for precision in PRECISIONS), "difference")
    rows, seconds = [], {precision: [] for precision in PRECISIONS}
    print(f"{len(runs)} trainings, {' and '.join(PRECISIONS)} in turn")
    for seed, precision, settings in runs:
        # What is said of the data is the same each time.
        with contextlib.redirect_stdout(io.StringIO()) if rows else contextlib.nullcontext():
            scores, took = train_as_asked(settings)
        seconds[precision].append(took)
        if precision == PRECISIONS[0]:
            rows += [{"seed": seed, "image": score["image"]} for score in scores]
        for row, score in zip(rows[-len(scores):], scores, strict=True):
            row[f"dice_{precision}"] = score["dice"]
            if precision == PRECISIONS[-1]:
                row["difference"] = row[columns[2]] - row[columns[3]]
        mean = sum(score["dice"] for score in scores) / len(scores)
        print(f"seed {seed}, {precision:<8}  test Dice {mean:.4f}  {took:.0f} s", flush=True)
        folder.write_csv(PRECISION_TABLE, rows, columns)
        if precision == PRECISIONS[-1]:
            summary = precision_summary(rows)
            kept = {name: value for name, value in vars(settings).items() if name not in DECIDED}
            folder.write_config(summary | {"seconds": seconds, "settings": kept}, PRECISION_SUMMARY)
    print(precision_sentence(summary))
    print(f"look at {folder.path}/: {PRECISION_SUMMARY}, {PRECISION_TABLE}; tensorboard --logdir {folder.path}")


def train_as_asked(settings: argparse.Namespace) -> tuple[list[dict], float]:
    """Train as train_papsmear.py would; return the rows of the test images for the best of stage 4, and the seconds."""
    from inference import Predictor
    from scoring.scores import score_pairs, scored_pairs
    from train_papsmear import prepare

    _, trainer, loaders = prepare(settings, Path(settings.output_dir) / settings.experiment_name)
    begin = time.perf_counter()
    trainer.fit(loaders, say=lambda line: None)
    took = time.perf_counter() - begin
    predictor = Predictor(trainer.folder.file("best_stage_4.pth"), str(trainer.device), trainer.precision)
    return score_pairs(predictor, scored_pairs(settings.data_root, "test", settings.use_augmented)), took


def precision_summary(rows: list[dict]) -> dict:
    """Return the difference in test Dice, bfloat16 minus float32, and its bootstrap intervals.

    Args:
        rows: of precision.csv, complete: every seed has every image in both precisions.
    Returns:
        images, seeds, dice (mean of each precision), difference (over images, of each the mean over seeds first),
        difference_of_pairs (over all pairs of image and seed; they count as independent, which makes its interval too
        narrow), difference_of_seeds (mean of each seed), margin, within_margin (whether the whole interval of
        `difference` is). A difference is what `scoring.scores.compare` returns: it resamples images, not seeds, so how
        much single trainings differ is seen in difference_of_seeds.
    """
    from scoring.scores import compare

    def mean(key: str, **chosen) -> float:
        values = [row[key] for row in rows if all(row[name] == value for name, value in chosen.items())]
        return sum(values) / len(values)

    images, seeds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("image", "seed"))
    keys = [f"dice_{precision}" for precision in PRECISIONS]
    difference = compare(*([{"image": image, "dice": mean(key, image=image)} for image in images] for key in keys))
    of_pairs = compare(*([{"image": row["image"], "dice": row[key]} for row in rows] for key in keys))
    difference, of_pairs = difference["dice"], of_pairs["dice"]
    return {"images": len(images), "seeds": len(seeds),
            "dice": {precision: mean(key) for precision, key in zip(PRECISIONS, keys, strict=True)},
            "difference": difference, "difference_of_pairs": of_pairs,
            "difference_of_seeds": [mean("difference", seed=seed) for seed in seeds],
            "margin": MARGIN, "within_margin": difference["low"] >= -MARGIN and difference["high"] <= MARGIN}


def precision_sentence(summary: dict) -> str:
    """Return what a summary says, in words."""
    text = "{difference:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
    each = ", ".join(f"{value:+.4f}" for value in summary["difference_of_seeds"])
    return (f"test Dice, {' minus '.join(PRECISIONS)}: {text.format(**summary['difference'])} over {summary['images']} "
            f"images, which {'lies' if summary['within_margin'] else 'does not lie'} within {MARGIN} of zero\n"
            f"over all pairs of image and seed: {text.format(**summary['difference_of_pairs'])}; each seed: {each}")


@command(interrupted="finished trainings are in the table")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    if args.experiment == "growth":
        study_growing(args, others)
    elif args.experiment == "precision":
        measure_precision(args, others)
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    else:
        measure_finetuning(args)


if __name__ == "__main__":
    sys.exit(main())
