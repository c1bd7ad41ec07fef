"""The settings of a training as a command line gives them: options, presets, and what contradicts what.

Options are parsed to their real types here and nowhere else. Nothing here imports torch, so that --help and wrong
options answer at once.
"""

import argparse
import re
from collections.abc import Callable
from datetime import datetime

from images.recipe import MASK, MASK_AND_BOUNDARY, TARGETS
from images.resolutions import DEFAULT_BATCH_SIZES, MOST_CHANNELS, RESOLUTIONS, WIDEST
from system.errors import UserError
from system.options import (
    LARGEST,
    Parser,
    add_device,
    add_precision,
    checkpoint_path,
    flag,
    folder_name,
    name_ending,
    number,
    regex,
    run_folder,
    whole,
)
from training.dealing import SHARES, deal
from training.schedule import CLASSIC_WORK, OLD_LR_SCALE, WORK

# An option given by hand beats a preset, a preset beats a default. A preset has a budget of operations instead of
# epochs, so that direct training and other shares take the same with it.
PRESETS = {
    "quick": {"budget": 30, "base_channels": 16, "lr": 2e-3, "batch_sizes": {32: 16, 64: 16, 128: 8, 256: 8},
              "old_lr_scale": 0.5},
    "herlev": {"in_channels": 3, "budget": 18.8, "shares": (27, 5, 7, 61), "base_channels": 16, "lr": 2e-3,
               "batch_sizes": {32: 8, 64: 8, 128: 8, 256: 8}, "group_regex": r"^\d+"},
    "monuseg": {"in_channels": 3, "targets": MASK_AND_BOUNDARY, "budget": 28.1, "base_channels": 32,
                "lr": 2e-3, "batch_sizes": {32: 8, 64: 8, 128: 8, 256: 8}, "augment_strength": 2.0,
                "old_lr_scale": 1.0, "average": 0.995, "group_regex": r"^TCGA-\w+-\w+"},
}
# Data set, time on a server CPU, and what a run with seed 0 scored (docs/results.md, docs/earlier_results.md).
PRESET_RESULTS = {
    "quick": ("data", "6 minutes on one core in float32", "Dice 0.963 on the 16 test images of the sample"),
    "herlev": ("data_herlev", "10 minutes on one core in bfloat16, 24 to 35 in float32",
               "Dice 0.907 over five folds, 0.912 with --single_cell in evaluation"),
    "monuseg": ("data_monuseg", "74 minutes on one core in bfloat16 for 931 tiles",
                "Dice 0.799 and AJI 0.603 on six images set apart"),
}
BOOLEAN = {"type": flag, "nargs": "?", "const": True, "metavar": "true|false"}
CHANGEABLE_AT_RESUME = ("data_root", "device", "precision", "num_workers", "cache_images", "compile", "save_every",
                        "keep", "save_minutes", "epochs_per_stage")


def epoch_list(text: str) -> tuple[int, ...]:
    """Read '50', for every stage, or one number a stage: '10,10,20,60'."""
    if not re.fullmatch(r"(\d{1,9},)*\d{1,9}", text) or not int(text.rpartition(",")[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number of at least 1, nor whole numbers joined "
                                         f"by commas, one a stage, the last at least 1, e.g. 10,10,20,60 (each below "
                                         f"{LARGEST})")
    return tuple(int(n) for n in text.split(","))


def share_list(text: str) -> tuple[float, ...]:
    """Read four numbers of at least 0 joined by commas: '5,9,34,52'."""
    if not re.fullmatch(r"\d{1,9}(\.\d+)?(,\d{1,9}(\.\d+)?){3}", text) or not float(text.rpartition(",")[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not four numbers of at least 0 joined by commas, for stages 1 "
                                         f"to 4, the last above 0, e.g. 5,9,34,52 (each below {LARGEST})")
    return tuple(map(float, text.split(",")))


def batch_table(text: str) -> dict[int, int]:
    """Read 'RESOLUTION:BATCH' joined by commas."""
    sizes = re.fullmatch(r"\d{1,9}:\d{1,9}(,\d{1,9}:\d{1,9})*", text) and [
        tuple(map(int, e.split(":"))) for e in text.split(",")]
    if not sizes or any(r not in RESOLUTIONS or n < 1 for r, n in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not RESOLUTION:BATCH joined by commas, with resolutions out of "
                                         f"32, 64, 128, 256 and batches of at least 1 (and below {LARGEST}), e.g. "
                                         f"32:64,64:32,128:16,256:8")
    if len(dict(sizes)) < len(sizes):
        raise argparse.ArgumentTypeError(f"{text!r} names a resolution twice")
    return dict(sizes)


def target_list(text: str) -> tuple[str, ...]:
    """Read 'mask' or 'mask,boundary'."""
    if tuple(text.split(",")) not in TARGETS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither mask nor mask,boundary")
    return tuple(text.split(","))


def build_parser(description: str = "", defaults: bool = True) -> argparse.ArgumentParser:
    """Return the parser; every option is read and checked by its type, before anything is loaded.

    Args:
        defaults: False leaves out what was not given by hand.
    """
    parser = Parser(prog="train_papsmear.py", description=description, allow_abbrev=False, epilog=presets_in_words(),
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for add_options, title in ((_add_data_options, "data"), (_add_network_options, "network"),
                               (_add_training_options, "training"), (_add_machine_options, "machine"),
                               (_add_output_options, "output")):
        group = parser.add_argument_group(title)

        def add(name: str, default=None, group=group, **kwargs) -> None:
            group.add_argument(name, default=default if defaults else argparse.SUPPRESS, **kwargs)

        add_options(add)
    return parser


def presets_in_words() -> str:
    """Return the command of each preset, how long it took and what it scored."""
    lines = ["without a preset: 64 channels and 50 epochs a stage, which takes hours on a CPU",
             "presets, on a server CPU (docs/results.md):"]
    for name, (data_root, took, scored) in PRESET_RESULTS.items():
        lines += [f"  python train_papsmear.py --data_root {data_root} --preset {name}", f"      {took}; {scored}"]
    return "\n".join(lines)


def _add_data_options(add: Callable) -> None:
    add("--data_root", default="data", help="folder with train|valid|test / images|masks (data)")
    add("--use_augmented", default=True, help="take flipped_*, mirrored_*, rotated_X_* (true)", **BOOLEAN)
    add("--augment_probability", type=number(0, 1), default=0.5, help="of each transform (0.5)")
    add("--augment_strength", type=number(0, 3), default=1.0, help="factor on their amounts (1)")
    add("--group_regex", type=regex, help="finds field of view or patient in a name, for the report, e.g. '^\\d+'")
    add("--in_channels", type=int, choices=(1, 3), default=1, help="1 luminance, 3 RGB (1)")
    add("--out_channels", type=whole(1, MOST_CHANNELS - 1), default=1,
        help="classes; above 1 masks are label images 0..K (1)")
    add("--max_value", type=whole(0), default=0,
        help="white in images of more than 8 bit, e.g. 4095 for 12 bit (0: that of their type)")
    add("--mask_suffix", type=name_ending, default="", metavar="END",
        help="what names of masks add to those of images, e.g. _mask (none)")
    add("--targets", type=target_list, default=MASK, metavar="mask[,boundary]",
        help="mask,boundary: learn the rims of nuclei too, which separates those that touch (mask)")
    add("--cache_images", default=None, **BOOLEAN, help="false: decode at every step, instead of once into memory or, "
        "if large, into memory-mapped files (true where there is space)")
    add("--num_workers", type=whole(0, 1024), help="decoding processes (0 with a cache, else up to 4)")
    add("--overfit", type=whole(0), default=0, metavar="N",
        help="smoke run: train and validate on the first N training images, not augmented")


def _add_network_options(add: Callable) -> None:
    add("--model", choices=("pgunet", "unet"), default="pgunet", help="unet: the classic one (pgunet)")
    add("--progressive", default=True, help="false: stage 4 from the start (true)", **BOOLEAN)
    add("--base_channels", type=whole(1, WIDEST), default=64, help="channels at 256 pixels (64)")
    add("--init_from", type=checkpoint_path, metavar="CHECKPOINT",
        help="start from its weights, or the best of a run folder; network, width, channels and targets are its own")
    add("--start_stage", type=int, choices=(1, 2, 3, 4), default=1, help="first stage trained (1)")


def _add_training_options(add: Callable) -> None:
    add("--preset", choices=sorted(PRESETS), help="a tried set of options: quick to begin with, the others for the "
        "data set of that name")
    add("--epochs_per_stage", type=epoch_list, default=(50,),
        help="50, or one a stage, 0 to skip it: 10,10,20,60 (50)")
    add("--budget", type=number(0, LARGEST, above=True), metavar="N",
        help="instead: stages share the operations of N epochs at 256 pixels; direct training and the classic U-Net "
             "take the same")
    add("--max_minutes", type=number(0, LARGEST, above=True), metavar="M",
        help="instead: end within M minutes, whatever the machine; the speed of each stage is measured first")
    add("--shares", type=share_list, default=SHARES, metavar="5,9,34,52",
        help="of budget or minutes, for stages 1 to 4, in per cent (5,9,34,52)")
    add("--batch_sizes", type=batch_table, default=DEFAULT_BATCH_SIZES,
        help="images a batch at each resolution (32:64,64:32,128:16,256:8)")
    add("--lr", type=number(0, above=True), default=1e-3, help="full learning rate (1e-3)")
    add("--schedule", choices=("run", "stage"), default="run", help="one for the run, or one a stage (run)")
    add("--old_lr_scale", type=number(0), default=OLD_LR_SCALE,
        help="factor on the rate of parts that an earlier stage trained (0.3)")
    add("--weight_decay", type=number(0), default=1e-2, help="of convolutions (0.01)")
    add("--clip_norm", type=number(0), default=0.0, help="largest norm of the gradients, e.g. 1 (0: off)")
    add("--average", type=number(0, 1, below=True), default=0.0, help="decay of averaged weights, e.g. 0.99 (0: off)")
    add("--accumulate", type=whole(1), default=1, help="batches a step (1)")


def _add_machine_options(add: Callable) -> None:
    add_device(add)
    add_precision(add)
    add("--compile", default=False, help="training steps by torch.compile, once a stage (false)", **BOOLEAN)
    add("--seed", type=whole(0), default=0, help="of weights, order and augmentation (0)")
    add("--deterministic", default=False, action="store_true", help="the same weights to the last bit on CUDA too")


def _add_output_options(add: Callable) -> None:
    add("--output_dir", default="outputs", help="folder of the run folders (outputs)")
    add("--experiment_name", type=folder_name, help="name of the run folder (date and time)")
    add("--save_every", type=whole(1), default=10, help="epochs between stage_X_epoch_Y.pth (10)")
    add("--save_minutes", type=number(0), default=10.0,
        help="between two last.pth within an epoch; 0 saves at the end of epochs alone (10)")
    add("--keep", type=whole(0), default=3, help="how many stage_X_epoch_Y.pth stay (3)")
    add("--resume", type=run_folder, metavar="RUN_FOLDER",
        help="continue a run with its own settings; --epochs_per_stage may change the last stage")
    add("--overwrite", default=False, action="store_true", help="replace what an earlier run of that name wrote")
    add("--dry_run", default=False, action="store_true",
        help="print settings, data report, disk space and memory, and stop")


def parse(argv: list[str] | None, description: str = "") -> argparse.Namespace:
    """Return checked settings; raises UserError for what is wrong in itself or contradicts another option.

    Of a run that is resumed only what was given by hand is known here: `resume`, `dry_run` and `by_hand`.
    """
    by_hand = vars(build_parser(description, defaults=False).parse_args(argv))
    defaults = vars(build_parser().parse_args([]))
    if "resume" in by_hand:
        refused = sorted(set(by_hand) - {"resume", "dry_run", *CHANGEABLE_AT_RESUME})
        if refused:
            raise UserError(f"--{refused[0]} cannot change at --resume; a run continues with its own settings, of "
                            f"which {', '.join(CHANGEABLE_AT_RESUME)} (of the last stage) alone may differ. Leave it "
                            f"out, or start another run with --init_from")
        changed = {key: by_hand[key] for key in CHANGEABLE_AT_RESUME if key in by_hand}
        return argparse.Namespace(**(defaults | by_hand), by_hand=changed)
    args = argparse.Namespace(**(defaults | PRESETS.get(by_hand.get("preset"), {}) | by_hand))
    args.by_hand = sorted(by_hand)
    _plan_epochs(args, by_hand)
    args.experiment_name = args.experiment_name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return args


def grows(args: argparse.Namespace) -> bool:
    """Tell whether the network of these settings grows, and is not trained at 256 pixels from the start."""
    return args.model == "pgunet" and args.progressive


def _plan_epochs(args: argparse.Namespace, by_hand: dict) -> None:
    """Check the stages that are trained against the epochs given by hand, or deal the budget to them."""
    if not grows(args) and args.start_stage != 1:
        raise UserError("--start_stage is for a network that grows; leave it out with --progressive false or "
                        "--model unet")
    first = args.start_stage if grows(args) else len(RESOLUTIONS)
    given = [name for name in ("epochs_per_stage", "max_minutes", "budget") if name in by_hand]
    if given == ["epochs_per_stage"] and "shares" in by_hand:
        given.append("shares")
    if len(given) > 1:
        raise UserError(f"--{given[1]} and --{given[0]} both say how long to train. Leave one of them out")
    if given and given != ["budget"]:
        args.budget = None
    if args.max_minutes:
        args.epochs_per_stage = (1,)  # until the speed of the stages is known
        return
    if args.budget:
        epoch = CLASSIC_WORK / WORK[max(WORK)] if args.model == "unet" else 1.0
        if not grows(args) and args.budget < epoch:
            raise UserError(f"--budget {args.budget:g} pays for no epoch at 256 pixels; with --model {args.model} one "
                            f"takes {epoch:.3g}. Take at least that")
        args.epochs_per_stage = deal(args.budget / epoch, args.shares, first)
        return
    if "shares" in by_hand:
        raise UserError("--shares deals a --budget or --max_minutes to the stages, and there is none. Give both, e.g. "
                        "--budget 10")
    trained = len(RESOLUTIONS) + 1 - first
    wrong = not grows(args) or len(args.epochs_per_stage) not in {len(RESOLUTIONS), trained}
    if len(args.epochs_per_stage) > 1 and wrong:
        rule = f"stages {first}..4 are trained, so give one number, or {trained} joined by commas" if trained > 1 else \
            "stage 4 alone is trained, so give one number"
        raise UserError(f"--epochs_per_stage {','.join(map(str, args.epochs_per_stage))}: {rule}")


def run_settings(config: dict, args: argparse.Namespace) -> argparse.Namespace:
    """Return the settings with which a run goes on: those of its checkpoint, with what `--resume` may change and did.

    Args:
        config: of a last.pth; options that are younger than the run have their defaults.
        args: what `parse` returned for --resume.
    """
    defaults = vars(build_parser().parse_args([]))
    fixed = {"resume": args.resume, "dry_run": args.dry_run, "overwrite": False, "by_hand": args.by_hand}
    return argparse.Namespace(**(defaults | config | args.by_hand | fixed))
