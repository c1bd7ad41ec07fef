"""Train the progressive U-Net (or a baseline) from the shell.

    python train_papsmear.py --data_root data --preset quick
    python train_papsmear.py --data_root data --progressive --epochs_per_stage 50 --experiment_name NAME
    python train_papsmear.py --data_root data --progressive false --epochs_per_stage 200
    python train_papsmear.py --resume outputs/NAME
    torchrun --nproc_per_node=2 train_papsmear.py --data_root data
"""

import argparse
import contextlib
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from images.resolutions import DEFAULT_BATCH_SIZES, RESOLUTIONS
from system.errors import DiskError, UserError, is_for_user
from system.options import command, is_first_of_launch
from training.settings import parse, run_settings

# Torch and all modules that need it are imported inside the functions: --help and wrong options answer at once.


def train(args: argparse.Namespace, begun: float | None = None) -> None:
    """Check the data, build network and trainer, train, and score the test split.

    Args:
        begun: when the command began, by `time.monotonic`, from which --max_minutes count.
    """
    from system.processes import is_main_process, process_group, world_size
    from system.signals import noted_signals
    from training.duration import expected_duration
    from training.run_folder import RunFolder
    from training.space import free_space, run_space
    from training.time_limit import rehearse

    with process_group():
        if args.resume:
            folder, last, args = resumed_settings(args)
        else:
            folder = Path(args.output_dir) / args.experiment_name
            if is_main_process():  # others may come when it has begun to write
                RunFolder(folder, overwrite=args.overwrite).check()
        model, trainer, loaders = prepare(args, folder, begun)
        if not args.resume and not args.max_minutes and world_size() == 1:
            print(expected_duration(trainer, loaders, with_quick=not args.preset))
        if args.dry_run:
            if args.max_minutes:
                rehearse(trainer, loaders)
            print(f"disk: about {run_space(trainer) / 1e6:.0f} MB in {folder}, {free_space(folder) / 1e6:.0f} MB free")
            print_memory(args, model, trainer)
            print("dry run: nothing was trained and nothing written")
            return
        if args.resume:
            trainer.resume(last)
            print(f"resumed {folder} after epoch {trainer.finished_epochs} of stage {model.stage}"
                  + trainer.position_in_words)
            if "epochs_per_stage" in args.by_hand:
                change_last_stage(trainer, args)
            if trainer.course.ended(model.stage) and (folder / "test_scores.json").exists():
                print(f"{folder}: this run is finished, and nothing is written. Look at its test_scores.csv, or start "
                      f"another with --init_from {folder}")
                return
        with way_on(folder), noted_signals() as trainer.keeper.asked_to_stop:
            trainer.fit(loaders)
            trainer.keeper.between_epochs()  # a signal that came after the last step
    if not is_first_of_launch():
        return
    scores = ""
    if not args.overfit:
        with way_on(folder):
            test(trainer, args)
        scores = "test_scores.csv, "
    print(f"look at {folder}/: report.html, training_curves.png, predictions_stage_4.png, {scores}best_stage_4.pth; "
          f"tensorboard --logdir {folder / 'logs'}")


def change_last_stage(trainer, args: argparse.Namespace) -> None:
    """Let the last stage of a resumed run take another number of epochs."""
    if args.max_minutes:
        raise UserError("--epochs_per_stage cannot change at --resume of a run that --max_minutes deals out")
    epochs = args.epochs_per_stage
    trainer.course.change_last_stage(epochs if len(epochs) > 1 else epochs[0], trainer.model.stage)
    print(f"epochs of stages {', '.join(map(str, trainer.plan.epochs))} from here on: "
          f"{', '.join(map(str, trainer.plan.epochs.values()))}; the learning rate follows the new plan")


@contextlib.contextmanager
def way_on(folder: Path) -> Iterator[None]:
    """Say at a signal, or when the disk refuses, how the run in this folder goes on."""
    try:
        yield
    except KeyboardInterrupt:
        begun = (folder / "last.pth").exists()
        if is_first_of_launch():
            print("\ninterrupted; " + (f"continue with --resume {folder}" if begun else
                                       "nothing was saved yet, and nothing is left of it"), file=sys.stderr)
        raise
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # which torch raises wherever the training is at that moment
            raise
        raise UserError(f"a process that decodes images has died ({str(error).splitlines()[0]}). Was it killed, or is "
                        f"the memory full? Continue with --resume {folder} --num_workers 0") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.is_dir():
            raise DiskError(f"{folder}: the run folder was removed while the run was writing into it, and nothing of "
                            f"the run is left. Start it again") from None
        if not is_for_user(error):
            raise
        saved = f"Make room or mend the disk, then continue with --resume {folder}" if (folder / "last.pth").exists() \
            else "Nothing was saved yet; start again where there is room"
        raise DiskError(f"{error.filename or folder}: {error.strerror or error}. What was saved last is whole. "
                        f"{saved}") from None


def resumed_settings(args: argparse.Namespace) -> tuple[Path, Path, argparse.Namespace]:
    """Return the run folder, the file to go on from, and the settings of the run, with what may be changed and was."""
    folder = Path(args.resume)
    folder = folder.parent if folder.name == "last.pth" else folder
    last, config = resumable_file(folder)
    if "precision" not in (config.get("resolved") or {}):
        raise UserError(f"{folder}: this run was started from Python, so its settings are there. Build the trainer as "
                        f"it was and call trainer.resume('{folder / 'last.pth'}')")
    config["precision"] = config["resolved"]["precision"]  # unless given: 'auto' could mean another one on this machine
    return folder, last, run_settings(config, args)


def resumable_file(folder: Path) -> tuple[Path, dict]:
    """Return last.pth of a run folder with its config or, where it is damaged or missing, the one before, and say so.

    Raises UserError where neither can be read.
    """
    from checkpoints import load_checkpoint

    last, previous = folder / "last.pth", folder / "previous.pth"
    if folder.is_dir() and not last.exists() and not previous.exists():
        raise UserError(f"{folder}: no last.pth in it, so nothing of that run was saved. Start it again with "
                        f"--overwrite")
    try:
        return last, load_checkpoint(last)["config"] or {}
    except UserError as error:
        if not previous.exists():
            raise
        config = load_checkpoint(previous)["config"] or {}
        print(f"warning: {error}\nwarning: going on from {previous}, which was saved before it")
        return previous, config


def prepare(args: argparse.Namespace, folder: Path, begun: float | None = None):
    """Open the data, print the report and what was chosen automatically; return model, trainer, loaders."""
    import torch

    from pap_smear_dataset import create_progressive_dataloaders
    from progressive_trainer import ProgressiveTrainer
    from system.devices import choose_device, choose_precision, compute_reproducibly, set_up_process
    from system.processes import world_size
    from training.start import name_other_images, new_model
    from training.time_limit import TimeLimit
    from unet import count_parameters

    # Reading the data counts as well, and loading torch before.
    time_limit = TimeLimit(args.max_minutes, args.shares, begun) if args.max_minutes else None
    if args.deterministic:
        compute_reproducibly()
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    set_up_process(device, precision)
    model, source = new_model(args)
    pyramids, fingerprint, report = open_data(args)
    if source:
        name_other_images(args, source, pyramids["train"].recipe)
    kept, workers = pyramids["train"].kept, decoding_workers(args, pyramids["train"])
    batch_sizes = DEFAULT_BATCH_SIZES | args.batch_sizes
    no_settings = ("resume", "dry_run", "overwrite", "by_hand") + ("epochs_per_stage",) * bool(time_limit)
    began = getattr(args, "command", None) or shlex.join(sys.argv)  # a resumed run has that of its beginning
    config = {key: value for key, value in vars(args).items() if key not in no_settings} | {
        "data_fingerprint": fingerprint, "data_report": report, "command": began, "resolved": {
            "device": str(device), "precision": precision, "num_workers": workers, "images_kept": kept,
            "batch_sizes": batch_sizes, "class_names": list(pyramids["train"].recipe.class_names)}}
    together = f" in each of {world_size()} processes" if world_size() > 1 else ""
    print(f"{args.model}, {count_parameters(model) / 1e6:.1f} M parameters; device {device}, precision {precision}, "
          f"{torch.get_num_threads()} threads{together}; images {kept}, {workers} workers; seed {args.seed}")
    if args.dry_run:
        print(json.dumps({key: value for key, value in config.items() if key != "data_report"}, indent=2))
    loaders = create_progressive_dataloaders(
        batch_sizes=batch_sizes, augment_probability=0.0 if args.overfit else args.augment_probability,
        num_workers=workers, seed=args.seed, device=device, pyramids=pyramids, augment_strength=args.augment_strength)
    epochs = args.epochs_per_stage
    trainer = ProgressiveTrainer(
        model, device=device, epochs_per_stage=epochs if len(epochs) > 1 else epochs[0], lr=args.lr,
        precision=args.precision, seed=args.seed, output_dir=folder, accumulate=args.accumulate,
        save_every=args.save_every, keep=args.keep, schedule=args.schedule,
        old_lr_scale=args.old_lr_scale, weight_decay=args.weight_decay, clip_norm=args.clip_norm,
        average=args.average, compile=args.compile, time_limit=time_limit,
        overwrite=args.overwrite, config=config, save_minutes=args.save_minutes)
    return model, trainer, loaders


def open_data(args: argparse.Namespace) -> tuple[dict, str, list[str]]:
    """Read the data set and print the report on it; return the pyramid of every split, the fingerprint of all, and the
    lines of the report."""
    from images.pyramid import open_pyramids
    from images.report import check_dataset
    from images.splits import find_data_root

    if args.resume and not find_data_root(args.data_root).exists():
        raise UserError(f"{args.data_root}: the data set of this run is no longer there. Say with --data_root where it "
                        f"is now")
    pyramids = open_pyramids(args.data_root, args.in_channels, args.out_channels, args.use_augmented, args.cache_images,
                             targets=args.targets, max_value=args.max_value, mask_suffix=args.mask_suffix)
    if args.overfit:
        few = pyramids["train"].subset(range(len(pyramids["train"]))[:args.overfit])
        pyramids = dict.fromkeys(pyramids, few)
        print(f"smoke run on the first {len(few)} training images, for training and validation alike")
    fingerprint, report = data_fingerprint(args, pyramids), ""
    if not args.overfit:
        report = str(check_dataset(args.data_root, args.group_regex, pyramids=pyramids))
        print(report)
    return pyramids, fingerprint, report.splitlines()


def decoding_workers(args: argparse.Namespace, pyramid) -> int:
    """Return how many processes decode: none with a cache, else as asked for, or up to four."""
    from system.machine import cpu_count

    if pyramid.cached:
        return 0
    return args.num_workers if args.num_workers is not None else min(4, cpu_count())


def data_fingerprint(args: argparse.Namespace, pyramids: dict) -> str:
    """Return the fingerprint of the data; a run that is resumed refuses other data than its own."""
    from system.processes import all_gather

    fingerprint = " ".join(pyramid.fingerprint for pyramid in pyramids.values())
    if len(set(all_gather(fingerprint))) > 1:
        raise UserError(f"{args.data_root}: the processes see different data. --data_root must hold the same files on "
                         f"every machine")
    if args.resume and fingerprint != args.data_fingerprint:
        raise UserError(f"{args.data_root}: the data set is not the one that {args.resume} was started with "
                         f"(fingerprint {fingerprint[:8]}..., then {args.data_fingerprint[:8]}...). Point --data_root "
                         f"at the same files, or start another run")
    return fingerprint


def print_memory(args: argparse.Namespace, model, trainer) -> None:
    """Print parameters and expected memory of every stage."""
    from system.processes import world_size
    from training.memory import training_memory

    sizes = DEFAULT_BATCH_SIZES | args.batch_sizes
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
    from reporting.report import refresh_report
    from scoring.cases import KeptCases
    from scoring.scores import score_otsu, score_pairs, score_table, scored_pairs, summarise

    pairs = scored_pairs(args.data_root, "test", args.use_augmented, args.mask_suffix)
    cases = KeptCases(len(pairs))
    predictor = Predictor(trainer.folder.file("best_stage_4.pth"), str(trainer.device), trainer.precision)
    rows = score_pairs(predictor, pairs, group_regex=args.group_regex, cases=cases)
    summaries = {"best_stage_4": summarise(rows),
                 "Otsu threshold": summarise(score_otsu(pairs, args.out_channels, args.max_value))}
    trainer.folder.write_csv("test_scores.csv", rows, tuple(rows[0]))
    trainer.folder.write_json("test_scores.json", summaries)
    trainer.folder.show_test(cases.cases)
    log_scores(trainer, args, summaries["best_stage_4"])
    refresh_report(trainer.folder.path)
    gain = summaries["best_stage_4"]["dice"]["mean"] - summaries["Otsu threshold"]["dice"]["mean"]
    print(f"\ntest split, {len(rows)} images at original size, mean ± standard deviation over images "
          f"({summaries['best_stage_4']['empty_masks']} empty masks)")
    print(score_table(summaries))
    print(f"test Dice {summaries['best_stage_4']['dice']['mean']:.4f}, {gain:+.4f} against Otsu's threshold")
    if not any(row["foreground"] for row in rows):
        print(f"warning: no foreground predicted in any image; the highest probability is "
              f"{max(row['highest'] for row in rows):.3f}. Train longer, or check the masks")


def log_scores(trainer, args: argparse.Namespace, summary: dict) -> None:
    """Write the settings and the final scores for TensorBoard."""
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "by_hand", "data_report")}
    trainer.folder.log_scores(settings, {f"test/{name}": summary[name]["mean"] for name in ("dice", "iou")}
                              | {f"valid/dice_stage_{stage}": dice for stage, dice in trainer.best_scores.items()})


@command()  # `train` says itself how to go on after Ctrl-C
def main(argv: list[str] | None = None) -> None:
    begun = time.monotonic()
    train(parse(argv, __doc__), begun)


if __name__ == "__main__":
    sys.exit(main())
