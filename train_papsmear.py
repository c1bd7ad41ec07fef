"""Train the progressive U-Net (or a baseline) from the shell.

    python train_papsmear.py --data_root data --preset quick
    python train_papsmear.py --data_root data --progressive --epochs_per_stage 50 --experiment_name NAME
    python train_papsmear.py --data_root data --progressive false --epochs_per_stage 200
    python train_papsmear.py --resume outputs/NAME
    torchrun --nproc_per_node=2 train_papsmear.py --data_root data
"""

import argparse
import json
import math
import sys
from datetime import datetime
from pathlib import Path

from system.options import (
    RESOLUTIONS,
    Parser,
    batch_table,
    command,
    epoch_list,
    first_process,
    flag,
    folder_name,
    number,
    regex,
    target_list,
    whole,
)

# Torch and all modules that need it are imported inside the functions: --help and wrong options answer at once.

# An option given by hand beats a preset, a preset beats a default. Presets deal about 57, 8, 5 and 30 % of the epochs
# to the stages: less than half the operations of as many epochs at 256 pixels, and as much of them at 256 as that
# allows.
PRESETS = {
    # The bundled sample in all four stages: 1.3 minutes on 2 cores of a server CPU in bfloat16, test Dice 0.96.
    "quick": {"epochs_per_stage": "44,6,4,24", "base_channels": 16, "lr": 2e-3,
              "batch_sizes": "32:16,64:16,128:8,256:8"},
    # Figures, times and machine of these two are in the README.
    "herlev": {"in_channels": 3, "epochs_per_stage": "20,2,2,10", "base_channels": 32,
               "batch_sizes": "32:16,64:16,128:8,256:8", "group_regex": r"^\d+"},
    "monuseg": {"in_channels": 3, "targets": "mask,boundary", "epochs_per_stage": "100,16,8,52", "base_channels": 32,
                "batch_sizes": "32:32,64:32,128:16,256:8", "augment_strength": 2.0, "average": 0.995,
                "group_regex": r"^TCGA-\w+-\w+"},
}
CHANGEABLE_AT_RESUME = ("data_root", "device", "num_workers", "cache_images", "compile")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every option is checked by its type, before anything is loaded."""
    parser = Parser(prog="train_papsmear.py", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    boolean = {"type": flag, "nargs": "?", "const": True, "metavar": "true|false"}

    data = parser.add_argument_group("data")
    data.add_argument("--data_root", default="data", help="folder with train|valid|test / images|masks (data)")
    data.add_argument("--use_augmented", default=True, help="take flipped_*, mirrored_*, rotated_X_* (true)", **boolean)
    data.add_argument("--augment_probability", type=number(0, 1), default=0.5, help="of each transform (0.5)")
    data.add_argument("--augment_strength", type=number(0, 3), default=1.0, help="factor on their amounts (1)")
    data.add_argument("--group_regex", type=regex, help="finds field of view or patient in a name, e.g. '^\\d+'")
    data.add_argument("--in_channels", type=int, choices=(1, 3), default=1, help="1 luminance, 3 RGB (1)")
    data.add_argument("--out_channels", type=whole(1), default=1, help="independent classes; above 1 masks are label "
                                                                        "images 0..K (1)")
    data.add_argument("--targets", type=target_list, default="mask", metavar="mask[,boundary]",
                      help="mask,boundary: learn the rims of nuclei too, which separates those that touch (mask)")
    data.add_argument("--cache_images", default=None, **boolean, help="false: decode at every step, instead of once "
                      "into memory or, if large, into memory-mapped files (true where there is space)")
    data.add_argument("--num_workers", type=whole(0), help="decoding processes (0 with a cache, else up to 4)")
    data.add_argument("--overfit", type=whole(0), default=0, metavar="N",
                      help="smoke run: train and validate on the first N training images, not augmented")

    network = parser.add_argument_group("network")
    network.add_argument("--model", choices=("pgunet", "unet"), default="pgunet", help="unet: the classic one (pgunet)")
    network.add_argument("--progressive", default=True, help="false: stage 4 from the start (true)", **boolean)
    network.add_argument("--base_channels", type=whole(1), default=64, help="channels at 256 pixels (64)")
    network.add_argument("--init_from", metavar="CHECKPOINT", help="start from its weights")
    network.add_argument("--start_stage", type=int, choices=(1, 2, 3, 4), default=1, help="first stage trained (1)")

    training = parser.add_argument_group("training")
    training.add_argument("--preset", choices=sorted(PRESETS), help="a tried set of options, for the data set named")
    training.add_argument("--epochs_per_stage", type=epoch_list, default="50", help="50, or one a stage: 10,10,20,60")
    training.add_argument("--batch_sizes", type=batch_table, default="32:64,64:32,128:16,256:8")
    training.add_argument("--lr", type=number(0, above=True), default=1e-3, help="full learning rate (1e-3)")
    training.add_argument("--schedule", choices=("run", "stage"), default="run", help="one for the run, or one a stage")
    training.add_argument("--fade_epochs", type=number(0), default=0.0, help="length of the fade at a growth (0)")
    training.add_argument("--old_lr_scale", type=number(0), default=1.0, help="factor on the rate of older parts (1)")
    training.add_argument("--weight_decay", type=number(0), default=1e-2, help="of convolutions (0.01)")
    training.add_argument("--average", type=number(0, 1, below=True), default=0.0,
                          help="decay of averaged weights, e.g. 0.99 (0: off)")
    training.add_argument("--accumulate", type=whole(1), default=1, help="batches a step (1)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (auto)")
    machine.add_argument("--precision", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    machine.add_argument("--compile", default=False, help="training steps by torch.compile, once a stage (false)",
                         **boolean)
    machine.add_argument("--seed", type=whole(0), default=0)
    machine.add_argument("--deterministic", action="store_true", help="the same weights to the last bit on CUDA too")

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="outputs")
    output.add_argument("--experiment_name", type=folder_name, help="name of the run folder (date and time)")
    output.add_argument("--save_every", type=whole(1), default=10, help="epochs between stage_X_epoch_Y.pth (10)")
    output.add_argument("--keep", type=whole(0), default=3, help="how many of them stay (3)")
    output.add_argument("--resume", metavar="RUN_FOLDER", help="continue a run with its own settings")
    output.add_argument("--overwrite", action="store_true", help="replace what an earlier run of that name wrote")
    output.add_argument("--dry_run", action="store_true", help="print settings, data report and memory, and stop")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return checked settings; raises ValueError for what is wrong in itself or contradicts another option."""
    parser = build_parser()
    args = parser.parse_args(argv)
    # What is there already, argparse does not fill with defaults; so what has changed was given by hand.
    absent = object()
    by_hand = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), absent))))
    by_hand = {key: value for key, value in by_hand.items() if value is not absent}
    if args.resume:
        refused = sorted(set(by_hand) - {"resume", "dry_run", *CHANGEABLE_AT_RESUME})
        if refused:
            raise ValueError(f"--{refused[0]} cannot change at --resume; a run continues with its own settings, of "
                             f"which {', '.join(CHANGEABLE_AT_RESUME)} alone may differ. Leave it out, or start "
                             f"another run with --init_from")
        args.by_hand = {key: by_hand[key] for key in CHANGEABLE_AT_RESUME if key in by_hand}
        return args
    args = argparse.Namespace(**(vars(args) | PRESETS.get(args.preset, {}) | by_hand))
    grows = args.model == "pgunet" and args.progressive
    if not grows and args.start_stage != 1:
        raise ValueError("--start_stage is for a network that grows; leave it out with --progressive false or "
                         "--model unet")
    if not grows and "epochs_per_stage" not in by_hand:
        args.epochs_per_stage = args.epochs_per_stage.split(",")[-1]  # of a preset, its stage 4
    first = args.start_stage if grows else 4
    numbers = args.epochs_per_stage.count(",") + 1
    if numbers > 1 and (not grows or numbers not in {4, 5 - first}):
        rule = f"stages {first}..4 are trained, so give one number, or {5 - first} joined by commas" if first < 4 else \
            "stage 4 alone is trained, so give one number"
        raise ValueError(f"--epochs_per_stage {args.epochs_per_stage}: {rule}")
    args.experiment_name = args.experiment_name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return args


def train(args: argparse.Namespace) -> None:
    """Check the data, build network and trainer, train, and score the test split."""
    from system.processes import joined, leads
    from training.run_folder import RunFolder

    with joined():
        if args.resume:
            folder, args = resumed_settings(args)
        else:
            folder = Path(args.output_dir) / args.experiment_name
            if leads():  # others may come when it has begun to write
                RunFolder(folder, overwrite=args.overwrite).check()
        model, trainer, loaders = prepare(args, folder)
        if args.dry_run:
            print_memory(args, model, trainer)
            print("dry run: nothing was trained and nothing written")
            return
        if args.resume:
            trainer.resume(folder / "last.pth")
            print(f"resumed {folder} after epoch {trainer.finished_epochs} of stage {model.stage}")
        fit(trainer, loaders, folder)
    if not first_process():
        return
    scores = ""
    if not args.overfit:
        test(trainer, args)
        scores = "test_scores.csv, "
    print(f"look at {folder}/: training_curves.png, predictions_stage_4.png, {scores}best_stage_4.pth; "
          f"tensorboard --logdir {folder / 'logs'}")


def fit(trainer, loaders: dict, folder: Path) -> None:
    """Train; at Ctrl-C say how to go on."""
    try:
        trainer.fit(loaders)
    except KeyboardInterrupt:
        begun = (folder / "last.pth").exists()
        if first_process():
            print("\ninterrupted; " + (f"continue with --resume {folder}" if begun else
                                       "no epoch was finished, start again with --overwrite"), file=sys.stderr)
        raise


def resumed_settings(args: argparse.Namespace) -> tuple[Path, argparse.Namespace]:
    """Return the run folder and the settings of the run to continue, with what may be changed and was."""
    from checkpoints import load_checkpoint

    folder = Path(args.resume)
    folder = folder.parent if folder.name == "last.pth" else folder
    if folder.is_dir() and not (folder / "last.pth").exists():
        raise ValueError(f"{folder}: no last.pth in it, so no epoch of that run was finished. Start it again with "
                         f"--overwrite")
    config = load_checkpoint(folder / "last.pth")["config"]
    if "resolved" not in config:
        raise ValueError(f"{folder}: this run was started from Python, so its settings are there. Build the trainer as "
                         f"it was and call trainer.resume('{folder / 'last.pth'}')")
    config["precision"] = config["resolved"]["precision"]  # 'auto' could mean another one on this machine
    fixed = {"resume": args.resume, "dry_run": args.dry_run, "overwrite": False}
    defaults = vars(build_parser().parse_args([]))  # of options that are younger than the run
    return folder, argparse.Namespace(**(defaults | config | args.by_hand | fixed))


def prepare(args: argparse.Namespace, folder: Path):
    """Open the data, print the report and what was chosen automatically; return model, trainer, loaders."""
    import os

    import torch

    from images.pyramid import open_pyramids
    from images.targets import target_channels
    from pap_smear_dataset import check_dataset, create_progressive_dataloaders
    from progressive_trainer import ProgressiveTrainer
    from system.devices import choose_device, choose_precision, compute_reproducibly
    from system.processes import world_size
    from unet import build_model, count_parameters

    if args.deterministic:
        compute_reproducibly()
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)

    torch.manual_seed(args.seed)
    targets = tuple(args.targets.split(","))
    model = build_model({"model": args.model, "in_channels": args.in_channels, "base_channels": args.base_channels,
                         "out_channels": target_channels(args.out_channels, targets)})
    model.set_stage(args.start_stage if args.model == "pgunet" and args.progressive else 4)
    initialise(model, args)

    pyramids = open_pyramids(args.data_root, args.in_channels, args.out_channels, args.use_augmented, args.cache_images,
                             targets=targets)
    if args.overfit:
        pyramids = dict.fromkeys(pyramids, pyramids["train"].subset(range(len(pyramids["train"]))[:args.overfit]))
    fingerprint = data_fingerprint(args, pyramids)
    workers = args.num_workers if args.num_workers is not None else min(4, os.cpu_count() or 1)
    workers = 0 if pyramids["train"].cached else workers
    unsaved = ("resume", "dry_run", "overwrite", "resolved")
    config = {key: value for key, value in vars(args).items() if key not in unsaved}
    batch_sizes = resolved_batch_sizes(args)
    config |= {"data_fingerprint": fingerprint, "resolved": {
        "device": str(device), "precision": precision, "num_workers": workers, "images_kept": pyramids["train"].kept,
        "batch_sizes": ",".join(f"{r}:{n}" for r, n in batch_sizes.items())}}

    report = check_dataset(args.data_root, args.group_regex, pyramids=pyramids) if not args.overfit else \
        f"smoke run on the first {len(pyramids['train'])} training images, for training and validation alike"
    print(report)
    together = f" in each of {world_size()} processes" if world_size() > 1 else ""
    print(f"{args.model}, {count_parameters(model) / 1e6:.1f} M parameters; device {device}, precision {precision}, "
          f"{torch.get_num_threads()} threads{together}; images {pyramids['train'].kept}, "
          f"{workers} workers; seed {args.seed}")
    if args.dry_run:
        print(json.dumps(config, indent=2))
    loaders = create_progressive_dataloaders(
        batch_sizes=batch_sizes, augment_probability=0.0 if args.overfit else args.augment_probability,
        num_workers=workers, seed=args.seed, device=device, pyramids=pyramids, augment_strength=args.augment_strength)
    epochs = [int(n) for n in args.epochs_per_stage.split(",")]
    trainer = ProgressiveTrainer(
        model, device=device, epochs_per_stage=epochs if len(epochs) > 1 else epochs[0], lr=args.lr,
        precision=args.precision, seed=args.seed, output_dir=folder, accumulate=args.accumulate,
        save_every=args.save_every, keep=args.keep, schedule=args.schedule, fade_epochs=args.fade_epochs,
        old_lr_scale=args.old_lr_scale, weight_decay=args.weight_decay, average=args.average, compile=args.compile,
        overwrite=args.overwrite, config=config)
    return model, trainer, loaders


def data_fingerprint(args: argparse.Namespace, pyramids: dict) -> str:
    """Return the fingerprint of the data; a run that is resumed refuses other data than its own."""
    from system.processes import gathered

    fingerprint = " ".join(pyramid.fingerprint for pyramid in pyramids.values())
    if len(set(gathered(fingerprint))) > 1:
        raise ValueError(f"{args.data_root}: the processes see different data. --data_root must hold the same files on "
                         f"every machine")
    if args.resume and fingerprint != args.data_fingerprint:
        raise ValueError(f"{args.data_root}: the data set is not the one that {args.resume} was started with "
                         f"(fingerprint {fingerprint[:8]}..., then {args.data_fingerprint[:8]}...). Point --data_root "
                         f"at the same files, or start another run")
    return fingerprint


def resolved_batch_sizes(args: argparse.Namespace) -> dict[int, int]:
    """Return resolution -> batch for all four resolutions."""
    from pap_smear_dataset import DEFAULT_BATCH_SIZES

    return DEFAULT_BATCH_SIZES | dict(tuple(map(int, entry.split(":"))) for entry in args.batch_sizes.split(","))


def initialise(model, args: argparse.Namespace) -> None:
    """Take over the weights of --init_from and say which parts came, which are new and which found no place."""
    from checkpoints import load_checkpoint

    if not args.init_from or args.resume:
        return
    source = load_checkpoint(Path(args.init_from))
    for key in ("model", "base_channels"):
        if source["model_args"][key] != model.model_args[key]:
            there, here = source["model_args"][key], model.model_args[key]
            raise ValueError(f"--init_from {args.init_from}: its network has {key} {there}, asked for is {here}, so no "
                             f"weight would fit. Pass --{key} {there}")
    if args.fade_epochs and source["stage"] == model.stage - 1:
        model.set_stage(model.stage, 0.0)
    carried, new, left_out = model.transfer_weights(source["model"])
    print(f"{args.init_from} (stage {source['stage']}) into stage {model.stage}:")
    for title, names in (("carried", carried), ("new", new), ("left out", left_out)):
        parts = dict.fromkeys(next((p for p in model.parts() if name.startswith(f"{p}.")), name) for name in names)
        print(f"  {title}: {len(names)} tensors" + (f" of {', '.join(parts)}" if parts else ""))


def print_memory(args: argparse.Namespace, model, trainer) -> None:
    """Print parameters and expected memory of every stage."""
    from system.devices import training_memory
    from system.processes import world_size

    sizes = resolved_batch_sizes(args)
    print("stage  resolution  batch  epochs  parameters  memory in training")
    for stage, epochs in trainer.plan.epochs.items():
        model.set_stage(stage)
        resolution = RESOLUTIONS[stage - 1]
        live = sum(p.numel() for part in model.live_parts() for p in model.get_submodule(part).parameters())
        needed = training_memory(model, math.ceil(sizes[resolution] / world_size()), trainer.precision)
        print(f"{stage:>5}  {resolution:>10}  {sizes[resolution]:>5}  {epochs:>6}  {live / 1e6:>8.2f} M  "
              f"{needed / 2 ** 20:>12.0f} MiB")
    print("(of one process: tensors kept for the backward pass, weights, gradients and AdamW; the peak is higher: 1.3 "
          "times that, plus 1.2 GiB and the images, were measured on a CPU)")


def test(trainer, args: argparse.Namespace) -> None:
    """Score the test split with the best stage-4 model at original size, beside Otsu's threshold; print and save."""
    from inference import Predictor
    from scoring.scores import score_otsu, score_pairs, score_table, scored_pairs, summarise

    pairs = scored_pairs(args.data_root, "test", args.use_augmented)
    predictor = Predictor(trainer.folder.file("best_stage_4.pth"), str(trainer.device), trainer.precision)
    rows = score_pairs(predictor, pairs)
    summaries = {"best_stage_4": summarise(rows), "Otsu threshold": summarise(score_otsu(pairs, args.out_channels))}
    trainer.folder.write_csv("test_scores.csv", rows, tuple(rows[0]))
    trainer.folder.write_json("test_scores.json", summaries)
    gain = summaries["best_stage_4"]["dice"]["mean"] - summaries["Otsu threshold"]["dice"]["mean"]
    print(f"\ntest split, {len(rows)} images at original size, mean ± standard deviation over images "
          f"({summaries['best_stage_4']['empty_masks']} empty masks)")
    print(score_table(summaries))
    print(f"test Dice {summaries['best_stage_4']['dice']['mean']:.4f}, {gain:+.4f} against Otsu's threshold")
    if not any(row["foreground"] for row in rows):
        print(f"warning: no foreground predicted in any image; the highest probability is "
              f"{max(row['highest'] for row in rows):.3f}. Train longer, or check the masks")


@command()  # `train` says itself how to go on after Ctrl-C
def main(argv: list[str] | None = None) -> None:
    train(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
