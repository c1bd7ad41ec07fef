"""Measure what a choice brings, on data of your own.

    python experiments.py finetune outputs/NAME/best_stage_4.pth --data_root data_mine --out outputs/curve

finetune: test Dice against the number of training images, started from the checkpoint and from scratch, with all else
equal but the learning rate: the same images, number of steps and schedule at 256 pixels, the last weights scored. The
checkpoint as it is stands beside them, with 0 images. Writes finetune.csv (one row a training) and finetune.png.
"""

import argparse
import math
import sys
from pathlib import Path

from options import Parser, command, count_list, number, whole

# Torch and all modules that need it are imported inside the functions: --help and wrong options answer at once.

STARTS = ("from scratch", "from the checkpoint")
TABLE, PICTURE = "finetune.csv", "finetune.png"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every option is checked by its type, before anything is loaded."""
    parser = Parser(prog="experiments.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    finetune = parser.add_subparsers(dest="experiment", required=True).add_parser("finetune", allow_abbrev=False)
    finetune.add_argument("checkpoint", help="of stage 4; its network, classes and targets are used")
    finetune.add_argument("--data_root", required=True, help="folder with train|valid|test / images|masks")
    finetune.add_argument("--counts", type=count_list, default="5,10,20", help="training images, in turn (5,10,20)")
    finetune.add_argument("--seeds", type=whole(1), default=3, help="trainings at each count, with other images (3)")
    finetune.add_argument("--steps", type=whole(1), default=150, help="of the optimizer, at least, a training (150)")
    finetune.add_argument("--batch_size", type=whole(1), default=8)
    finetune.add_argument("--lr", type=number(0, above=True), default=1e-3, help="full rate from scratch (1e-3)")
    finetune.add_argument("--finetune_lr", type=number(0, above=True), default=3e-4,
                          help="full rate from the checkpoint (3e-4)")
    finetune.add_argument("--out", required=True, help="folder for the results")
    finetune.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (auto)")
    return parser


def measure_finetuning(args: argparse.Namespace) -> None:
    """Train at every count, seed and start; print, save and draw the test Dice."""
    import numpy as np

    from checkpoints import load_checkpoint
    from image_pyramid import open_pyramids
    from inference import Predictor
    from report import curves_over_counts
    from run_folder import RunFolder
    from scoring import score_pairs, scored_pairs, summarise
    from targets import mask_classes

    checkpoint = load_checkpoint(Path(args.checkpoint))
    if checkpoint["stage"] != 4:
        raise ValueError(f"{args.checkpoint}: its stage is {checkpoint['stage']}; the curve is measured at stage 4. "
                         f"Take a best_stage_4.pth")
    folder = RunFolder(Path(args.out))
    if (folder.path / TABLE).exists():
        raise ValueError(f"{folder.path / TABLE}: exists already, and nothing is overwritten unasked. Choose another "
                         f"--out")
    counts = [int(n) for n in args.counts.split(",")]
    targets = tuple(checkpoint["targets"])
    model_args = checkpoint["model_args"]
    classes = mask_classes(model_args["out_channels"], targets)
    train = open_pyramids(args.data_root, model_args["in_channels"], classes, use_augmented=False, cache_images=False,
                          wanted=("train",), targets=targets)["train"]
    if max(counts) > len(train):
        raise ValueError(f"--counts {args.counts}: {args.data_root} has {len(train)} training images that are no "
                         f"copies. Ask for fewer")
    pairs = scored_pairs(Path(args.data_root), "test", use_augmented=False)
    print(f"{len(counts) * args.seeds * len(STARTS)} trainings of about {args.steps} steps; {len(pairs)} test images")
    untouched = summarise(score_pairs(Predictor(args.checkpoint, args.device), pairs))["dice"]
    rows = [{"images": 0, "seed": 0, "start": STARTS[1], "dice": untouched["mean"], "std": untouched["std"],
             "seconds": 0}]
    print(f"   0 images, the checkpoint as it is      test Dice {untouched['mean']:.4f}")
    for count in counts:
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
    import time

    import torch

    from inference import Predictor
    from pap_smear_dataset import create_progressive_dataloaders
    from progressive_trainer import ProgressiveTrainer
    from scoring import score_pairs, summarise
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


@command(interrupted="finished trainings are in the table")
def main(argv: list[str] | None = None) -> None:
    measure_finetuning(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
