"""Score a trained checkpoint on a split at the original image size, from the shell.

    python evaluate_papsmear.py outputs/NAME/best_stage_4.pth --data_root data --split test
    python evaluate_papsmear.py outputs/NAME/best_stage_4.pth --data_root data_monuseg --split test --instances
    python evaluate_papsmear.py outputs/A/best_stage_4.pth --data_root data --compare outputs/B/best_stage_4.pth
    python evaluate_papsmear.py outputs/NAME/best_stage_4.pth --data_root data --all_scales
    python evaluate_papsmear.py outputs/herlev_cells/best_stage_4.pth --data_root data_herlev_cells --ratio
    torchrun --nproc_per_node=2 evaluate_papsmear.py outputs/NAME/best_stage_4.pth --data_root data

Writes scores.csv (one row an image), summary.json and cases.png (the worst and the best images) into --out, by default
a folder beside the checkpoint. After a kill the same command with --continue goes on with the images that are left.
"""

import argparse
import contextlib
import re
import sys
import time
from pathlib import Path

from reporting.text import probability
from system.errors import UserError
from system.options import (
    Parser,
    add_device,
    add_precision,
    add_views,
    checkpoint_list,
    command,
    flag,
    name_ending,
    regex,
    results_folder,
    whole,
)

# Torch and all modules that need it are imported inside the functions: --help and wrong options answer at once.

SHOWN_CASES = 3  # worst ones and best ones each
SCORES, COMPARED = "scores.csv", "scores_compared.csv"
RATIOS, RATIO_PICTURE = "ratios.csv", "ratios.png"
RESULT_FILES = (SCORES, COMPARED, "summary.json", "cases.png", RATIOS, RATIO_PICTURE)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every option is checked by its type, before anything is loaded."""
    parser = Parser(prog="evaluate_papsmear.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=checkpoint_list,
                        help="a checkpoint, a run folder, or several joined by commas, which are averaged")
    parser.add_argument("--data_root", default="data", help="folder with train|valid|test / images|masks (data)")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test", help="what is scored (test)")
    parser.add_argument("--use_augmented", default=True, type=flag, nargs="?", const=True, metavar="true|false",
                        help="score flipped_*, mirrored_*, rotated_X_* too, as after training (true)")
    parser.add_argument("--group_regex", type=regex, metavar="REGEX",
                        help="finds the patient or field of view in a name; intervals and tests resample groups, not "
                             "images (what manifest.csv tells)")
    parser.add_argument("--mask_suffix", type=name_ending, default="", metavar="END",
                        help="what names of masks add to those of images, e.g. _mask (none)")
    parser.add_argument("--max_value", type=whole(1),
                        help="white in images of more than 8 bit, e.g. 4095 for 12 bit (that of the checkpoint)")
    parser.add_argument("--instances", action="store_true", help="compare nucleus by nucleus too: AJI, PQ, DQ, SQ, F1")
    parser.add_argument("--all_scales", action="store_true", help="Dice and milliseconds at each scale of the decoder")
    parser.add_argument("--ratio", action="store_true",
                        help="compare the ratio of nucleus to cytoplasm cell by cell with the drawn one (ratios.csv, "
                             "ratios.png); for a network of both classes")
    parser.add_argument("--compare", metavar="OTHER", type=checkpoint_list,
                        help="a second checkpoint, scored on the same images and tested")
    add_views(parser.add_argument)
    parser.add_argument("--tile", type=whole(1), default=1024, help="pixels, for checkpoints of native scale (1024)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the bootstrap (0)")
    parser.add_argument("--out", type=results_folder,
                        help="folder for the results (CHECKPOINT_SPLIT beside the checkpoint; with --compare "
                             "CHECKPOINT_SPLIT_against_OTHER)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--continue", action="store_true", dest="go_on",
                          help="go on with an interrupted evaluation: leave out the images that are scored")
    existing.add_argument("--overwrite", action="store_true",
                          help="replace results that are there, when the new ones are whole")
    add_device(parser.add_argument)
    add_precision(parser.add_argument)
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Score, print and save; the processes that torchrun started share the images, and the first prints and saves."""
    from images.splits import description_of
    from scoring.scores import scored_pairs
    from scoring.unfinished import UnfinishedScores
    from system.atomic import clear_left
    from system.locks import LOCK, held_lock
    from system.processes import all_gather, is_main_process

    folder = Path(args.out) if args.out else default_folder(args)
    predictor = open_predictor(args, args.checkpoint)
    other = open_predictor(args, args.compare) if args.compare else None
    if other and other.classes != predictor.classes:
        raise UserError(f"{joined(args.compare)}: {other.classes} classes, but {joined(args.checkpoint)} has "
                        f"{predictor.classes}; only checkpoints for the same masks can be compared")
    if args.ratio and not predictor.has_cytoplasm:
        names = ", ".join(predictor.recipe.class_names)
        has = f"the classes {names}" if names else "no names of classes"
        raise UserError(f"--ratio: {joined(args.checkpoint)} has {has}; nucleus and cytoplasm are needed. Train on a "
                        f"data set whose dataset.json says \"classes\": [\"nucleus\", \"cytoplasm\"], as that of "
                        f"prepare_data.py herlev --target both does")
    settings = settings_of(args)
    kept = [UnfinishedScores(folder / name, settings) for name in (SCORES, COMPARED)]
    refuse_existing(args, folder, any(scores.exist() for scores in kept))
    pairs = scored_pairs(args.data_root, args.split, args.use_augmented, args.mask_suffix)
    sizing = description_of(args.data_root).sizing
    if sizing != predictor.recipe.sizing:
        print(f"warning: the network was trained with sizing '{predictor.recipe.sizing}', but {args.data_root} is a "
              f"data set of '{sizing}': it sees nuclei at another size than it knows, so this score says little")
    lock = held_lock(folder / LOCK, "this folder", "choose another --out") if is_main_process() \
        else contextlib.nullcontext()
    with lock:  # makes the folder, before an hour of scoring that could not be written
        if args.go_on:
            print(f"{sum(scores.read() for scores in kept)} images are scored already")
        else:
            for scores in kept:
                scores.remove()
        if is_main_process():
            clear_left(folder, "|".join(map(re.escape, RESULT_FILES)))
        all_gather(None)  # before a process keeps what another one would read, or remove
        score(args, folder, predictor, other, pairs, kept)
        for scores in kept:
            scores.remove()


def score(args: argparse.Namespace, folder: Path, predictor, other, pairs: list, kept: list) -> None:
    """Score the pairs, print the measures, and write the results into the folder.

    Args:
        other: the Predictor to compare with, or None.
        kept: the `UnfinishedScores` of both.
    """
    from images.splits import SPLITS_FILE, find_data_root
    from images.targets import instance_file
    from scoring.ratio import compare_ratios, score_ratios
    from scoring.scores import compare, score_pairs, summarise, trust_in_dice
    from system.processes import is_main_process

    table = find_data_root(args.data_root) / SPLITS_FILE
    print(f"{len(pairs)} images of the split {args.split} at original size, e.g. {pairs[0].image}"
          + (f" ({table} says which)" if table.is_file() else ""))
    if args.instances:
        without = sum(instance_file(pair) is None for pair in pairs)
        print(f"drawn nuclei of {len(pairs) - without} images from their instance maps, of {without} as the connected "
              f"parts of the mask")
    rows = score_pairs(predictor, pairs, args.instances, args.group_regex, kept[0])
    groups = len({row["group"] for row in rows})
    if groups < len(rows):
        print(f"{groups} groups of images, e.g. {rows[0]['group']}: intervals and tests resample groups")
    summary = {"checkpoint": joined(args.checkpoint), "sha256": kept[0].settings["sha256"][:len(args.checkpoint)],
               "split": args.split, "augment": args.augment, "single_cell": args.single_cell,
               "images": str(pairs[0].image.parent), "seed": args.seed, "scores": summarise(rows, args.seed)}
    print_scores(summary["scores"])
    lost = [row["image"] for row in rows if row["dice"] > 0 and row.get("nuclei_found") == 0 < row["nuclei_drawn"]]
    if lost:
        print(f"warning: in {len(lost)} of {len(rows)} images, e.g. {lost[0]}, all nuclei were left out as too small "
              f"or too faint, so AJI and PQ are 0 there: a nucleus has a mean probability of at least "
              f"{predictor.lowest_probability:g}, the middle of threshold and 1. Train longer")
    summary["trust_spearman"] = trust_in_dice(rows)
    if summary["trust_spearman"] is not None:
        print(f"trust in an image and its Dice: Spearman's correlation {summary['trust_spearman']:.2f}")
    others = score_pairs(other, pairs, args.instances, args.group_regex, kept[1]) if other else []
    if others:
        summary |= {"compared_with": joined(args.compare), "other_scores": summarise(others, args.seed),
                    "comparison": compare(rows, others, args.seed)}
        print_comparison(args, summary)
    if args.all_scales:
        summary["scales"] = score_scales(predictor, pairs)
    cells = score_ratios(predictor, pairs) if args.ratio else []
    if args.ratio:
        summary["ratio"] = compare_ratios(cells)
        print_ratios(summary["ratio"])
    if is_main_process():
        write_results(folder, predictor, pairs, {SCORES: rows, COMPARED: others, RATIOS: cells}, summary)


def write_results(folder: Path, predictor, pairs: list, tables: dict[str, list[dict]], summary: dict) -> None:
    """Write the tables, the summary and the picture, each in the place of an earlier one when it is whole."""
    from scoring.ratio import draw_ratios
    from training.run_folder import RunFolder

    results = RunFolder(folder)
    for name, rows in tables.items():
        if rows:
            results.write_csv(name, rows, tuple(rows[0]))
        else:
            (folder / name).unlink(missing_ok=True)
    results.write_json("summary.json", summary)
    if summary.get("ratio", {}).get("factor"):
        draw_ratios(tables[RATIOS], summary["ratio"], results.file(RATIO_PICTURE))
    else:
        (folder / RATIO_PICTURE).unlink(missing_ok=True)
    draw_cases(predictor, pairs, tables[SCORES], results.file("cases.png"))
    print(f"look at {folder}/: {', '.join(name for name in RESULT_FILES if (folder / name).exists())}")


def settings_of(args: argparse.Namespace) -> dict:
    """Return what the scores of an image depend on, for --continue."""
    from system.archives import digest_of

    return {"sha256": [digest_of(Path(path)) for path in (*args.checkpoint, *(args.compare or ()))]} | {
        name: getattr(args, name) for name in ("data_root", "split", "use_augmented", "mask_suffix", "max_value",
                                               "instances", "augment", "single_cell", "tile")}


def refuse_existing(args: argparse.Namespace, folder: Path, interrupted: bool) -> None:
    """Raise UserError if results are there unasked, or if there is nothing to go on with."""
    existing = [folder / name for name in RESULT_FILES if (folder / name).exists()]
    if args.go_on and not interrupted:
        raise UserError(f"--continue: no evaluation was interrupted in {folder}"
                        + (", it is finished. Look at its summary.json" if existing else ". Leave --continue out"))
    if interrupted and not args.go_on and not args.overwrite:
        raise UserError(f"{folder}: an evaluation was interrupted here. Go on with --continue, or start anew with "
                        f"--overwrite")
    if existing and not args.go_on and not args.overwrite:
        raise UserError(f"{existing[0]}: exists already, and nothing is overwritten unasked. Choose another --out, or "
                        f"pass --overwrite")


def default_folder(args: argparse.Namespace) -> Path:
    """Return CHECKPOINT_SPLIT beside the checkpoint; with --compare the other's run and name follow."""
    first = Path(args.checkpoint[0])
    name = f"{first.stem}_{args.split}"
    if args.compare:
        other = Path(args.compare[0])
        run = "" if other.parent == first.parent else f"{other.absolute().parent.name}_"
        name += f"_against_{run}{other.stem}"
    return first.with_name(name)


def joined(checkpoints: list[str]) -> str:
    """Return the paths as the command line has them."""
    return ",".join(checkpoints)


def open_predictor(args: argparse.Namespace, checkpoints: list[str]):
    """Return the Predictor of a checkpoint, or of several joined by commas, and print what it is."""
    from inference import Predictor
    from system.devices import set_up_process

    predictor = Predictor(checkpoints, args.device, args.precision, args.tile, augment=args.augment,
                          single_cell=args.single_cell)
    set_up_process(predictor.device, predictor.precision)
    predictor.max_value = args.max_value or predictor.max_value
    print(f"{joined(checkpoints)}: {predictor}")
    return predictor


def print_scores(scores: dict) -> None:
    """Print every measure with its spread and interval, one a line."""
    print(f"\n{'':<14}{'mean':>9}{'std':>9}   95 % interval of the mean ({scores['images']} images, "
          f"{scores['empty_masks']} empty masks)")
    for name, value in scores.items():
        if isinstance(value, dict):
            print(f"{name:<14}{value['mean']:>9.4f}{value['std']:>9.4f}   {value['low']:.4f} ... {value['high']:.4f}")


def print_ratios(agreement: dict) -> None:
    """Print how predicted ratios of nucleus to cytoplasm agree with drawn ones."""
    print(f"\nnucleus / cytoplasm of {agreement['compared']} of {agreement['cells']} drawn cells "
          f"({agreement['not_found']} nuclei not found)", end="")
    if agreement["factor"] is None:
        print(": too few to compare")
    else:
        print(f": predicted is {agreement['factor']:.2f} times drawn, for 95 % of cells {agreement['low']:.2f} to "
              f"{agreement['high']:.2f} times")
        if agreement["spearman"] is not None:
            print(f"correlation {agreement['pearson']:.3f} of the logarithms, {agreement['spearman']:.3f} of the ranks")


def print_comparison(args: argparse.Namespace, summary: dict) -> None:
    """Print the means of both checkpoints and their difference, one measure a line."""
    print(f"\n{joined(args.checkpoint)} minus {joined(args.compare)}, paired over images")
    print(f"{'':<14}{'first':>9}{'second':>9}{'difference':>12}   95 % interval         p bootstrap  p Wilcoxon")
    for name, value in summary["comparison"].items():
        print(f"{name:<14}{summary['scores'][name]['mean']:>9.4f}{summary['other_scores'][name]['mean']:>9.4f}"
              f"{value['difference']:>+12.4f}   {value['low']:+.4f} ... {value['high']:+.4f}"
              f"{probability(value['p_bootstrap']):>13}{probability(value['p_wilcoxon']):>12}")


def score_scales(predictor, pairs: list) -> dict:
    """Score the logits of every scale, enlarged; return scale -> Dice and milliseconds an image, and print them.

    The time is that of `predict` with the image in memory, as median over at most 20 images after one for warming up.
    """
    import numpy as np

    from images.files import load_image
    from scoring.scores import score_pairs
    from system.processes import all_gather, is_main_process

    result = {}
    images = [load_image(pair.image, predictor.in_channels, max_value=predictor.max_value)
              for pair in pairs[:20]] if is_main_process() else []
    print("\nscale       Dice   ms an image")
    for scale in predictor.models[0].scales:
        predictor.scale = scale
        dice = float(np.mean([row["dice"] for row in score_pairs(predictor, pairs)]))
        seconds = []
        for image in [*images[:1], *images]:
            start = time.perf_counter()
            predictor.predict(image)
            seconds.append(time.perf_counter() - start)
        # Processes other than the first measure nothing and wait here, so that they do not slow it down.
        milliseconds, *_ = all_gather(1000 * float(np.median(seconds[1:])) if is_main_process() else None)
        result[scale] = {"dice": dice, "milliseconds": milliseconds}
        print(f"{scale:>5}{dice:>11.4f}{milliseconds:>14.1f}")
    predictor.scale = None
    return result


def draw_cases(predictor, pairs: list, rows: list[dict], path: Path) -> None:
    """Draw the images of lowest and of highest Dice, the worst on top."""
    from scoring.pictures import predictions
    from scoring.scores import scored_case

    order = sorted(range(len(rows)), key=lambda i: rows[i]["dice"])
    shown = order if len(order) <= 2 * SHOWN_CASES else order[:SHOWN_CASES] + order[-SHOWN_CASES:]
    predictions([scored_case(predictor, pairs[i]) for i in shown], path, predictor.threshold)


@command(interrupted="the same command with --continue goes on with the images that are left")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from system.processes import process_group

    with process_group():
        evaluate(args)


if __name__ == "__main__":
    sys.exit(main())
