"""Measure what correcting predictions brings, and whether it pays to correct the least trusted first.

    python benchmarks/correction.py --data_root data_herlev --in_channels 3 --out outputs/correction

Someone who corrects is simulated: a network is trained on a few drawn images and predicts others. Of these, so many
predictions as --counts says are replaced by the drawn masks, in the order of trust or in a random one; the network is
trained further on all of them, and scored on the test images. Writes correction.csv and correction.png.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: modules are found from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from system.errors import UserError
from system.options import Parser, command, number, regex, whole

# Torch and all modules that need it are imported inside the functions: --help and wrong options answer at once.

ORDERS = ("least trusted first", "at random")
TABLE, PICTURE = "correction.csv", "correction.png"
BATCH = 8
EPOCHS = 12, 8, 6, 6  # of the first network, at each stage


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = Parser(prog="benchmarks/correction.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True, help="folder with train|valid|test / images|masks, one class")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--start", type=whole(2), default=30, help="drawn images that the network begins with (30)")
    parser.add_argument("--images", type=whole(2), default=20, help="images that are predicted and corrected (20)")
    parser.add_argument("--steps", type=whole(1), default=40, help="of the optimizer after a correction (40)")
    parser.add_argument("--seeds", type=whole(1), default=3, help="times that all is done, with other images (3)")
    parser.add_argument("--base_channels", type=whole(1), default=8)
    parser.add_argument("--in_channels", type=int, choices=(1, 3), default=1)
    parser.add_argument("--lr", type=number(0, above=True), default=3e-4, help="full rate after a correction (3e-4)")
    parser.add_argument("--group_regex", type=regex, help="finds the group in a name; none is on both sides")
    return parser


def counts_of(images: int) -> list[int]:
    """Return how many images are corrected in turn: none, a quarter, a half, all."""
    return sorted({0, images // 4, images // 2, images})


def measure(args: argparse.Namespace) -> None:
    """Correct in both orders, for every seed; print, save and draw the test Dice."""
    from scoring.scores import scored_pairs
    from system.devices import choose_device, set_up_process
    from training.run_folder import RunFolder

    folder = RunFolder(Path(args.out))
    if (folder.path / TABLE).exists():
        raise UserError(f"{folder.path / TABLE}: exists already, and nothing is overwritten unasked. Choose another "
                        f"--out")
    set_up_process(choose_device("cpu"), "float32")
    train, test = (scored_pairs(Path(args.data_root), split, use_augmented=False) for split in ("train", "test"))
    rows: list[dict] = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as place:
            for row in one_seed(args, *choose(args, train, seed), test, seed, Path(place)):
                rows.append(row)
                print("seed {seed}, {corrected:>3} corrected, {order:<19}  test Dice {dice:.4f}".format(**row),
                      flush=True)
                folder.write_csv(TABLE, rows, tuple(rows[0]))
    draw(rows, folder.file(PICTURE))
    print(f"look at {folder.path}/: {PICTURE}, {TABLE}")


def choose(args: argparse.Namespace, train: list, seed: int) -> tuple[list, list]:
    """Return the images to start with and those to correct: whole groups in a random order, dealt until there are
    enough of either."""
    import numpy as np

    from images.splits import groups_of

    groups = list(groups_of(train, args.group_regex).values())
    parts: tuple[list, list] = ([], [])
    for k in np.random.default_rng(seed).permutation(len(groups)):
        if wanting := [part for part, size in zip(parts, (args.start, args.images), strict=True) if len(part) < size]:
            wanting[0].extend(groups[k])
    begin, pool = parts[0][:args.start], parts[1][:args.images]
    if len(pool) < args.images:
        raise UserError(f"--start {args.start} and --images {args.images}: {args.data_root} has {len(train)} training "
                        f"images in {len(groups)} groups, which are too few. Ask for fewer")
    return begin, pool


def one_seed(args: argparse.Namespace, begin: list, pool: list, test: list, seed: int, place: Path):
    """Train the first network, then yield a row for each order and number of corrections."""
    import numpy as np

    from images.masks import load_mask
    from inference import Predictor
    from nuclei.trust import Agreement

    drawn = {pair: load_mask(pair.mask)[..., 0] for pair in (*begin, *pool)}
    first = train_on(args, {pair: drawn[pair] for pair in begin}, seed, place / "first")
    predictor, trust, predicted = Predictor(first, "cpu", "float32"), {}, {}
    for pair in pool:
        agreement = Agreement()
        predicted[pair] = predictor.predict(pair.image, agreement)[..., 0] >= predictor.threshold
        trust[pair] = agreement.trust()
    orders = dict(zip(ORDERS, (sorted(pool, key=lambda pair: trust[pair]),
                               [pool[k] for k in np.random.default_rng([seed, 1]).permutation(len(pool))]),
                      strict=True))
    for count in counts_of(args.images):
        dice = None
        for order, pairs in orders.items():
            if dice is None or 0 < count < args.images:  # none and all are the same in any order
                corrected = set(pairs[:count])
                masks = drawn | {pair: predicted[pair] for pair in pool if pair not in corrected}
                last = train_on(args, masks, seed, place / f"{order}_{count}", first)
                dice = test_dice(last, test)
            yield {"seed": seed, "corrected": count, "order": order, "dice": round(dice, 4)}


def train_on(args: argparse.Namespace, masks: dict, seed: int, place: Path, first: Path | None = None) -> Path:
    """Train on images with these masks, in all stages or, from a checkpoint, at the last; return the last weights."""
    import torch

    from checkpoints import load_model, save_checkpoint, untrained_checkpoint
    from images.files import load_image, save_png
    from images.pyramid import open_pyramids
    from pap_smear_dataset import create_progressive_dataloaders
    from progressive_trainer import ProgressiveTrainer
    from unet import ProgressiveUNet

    for kind in ("images", "masks"):
        (place / "train" / kind).mkdir(parents=True)
    for pair, mask in masks.items():
        save_png(place / "train/images" / f"{pair.name}.png", load_image(pair.image, args.in_channels).squeeze())
        save_png(place / "train/masks" / f"{pair.name}.png", mask)
    torch.manual_seed(seed)
    train = open_pyramids(place, args.in_channels, 1, cache_images=True, wanted=("train",))["train"]
    model = ProgressiveUNet(args.in_channels, 1, args.base_channels)
    epochs = list(EPOCHS)
    if first:
        epochs = [0, 0, 0, math.ceil(args.steps * BATCH / len(masks))]
        model.set_stage(4)
        model.transfer_weights(load_model(first).state_dict())
    trainer = ProgressiveTrainer(model, "cpu", epochs, args.lr if first else 3e-3, seed=seed, precision="float32")
    one = train.subset([0])
    trainer.fit(create_progressive_dataloaders(batch_sizes=dict.fromkeys((32, 64, 128, 256), BATCH), seed=seed,
                                               device=trainer.device,
                                               pyramids={"train": train, "valid": one, "test": one}),
                say=lambda line: None)
    last = place / "last.pth"
    save_checkpoint(last, untrained_checkpoint(model, data=trainer.recipe))
    return last


def test_dice(checkpoint: Path, pairs: list) -> float:
    """Return the mean Dice over the test images at their size."""
    from inference import Predictor
    from scoring.scores import score_pairs

    rows = score_pairs(Predictor(checkpoint, "cpu", "float32"), pairs)
    return sum(row["dice"] for row in rows) / len(rows)


def draw(rows: list[dict], path: Path) -> None:
    """Draw the test Dice over the corrected images: a thin line a seed, a thick one their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    counts = sorted({row["corrected"] for row in rows})
    for color, order in zip(("C0", "C1"), ORDERS, strict=True):
        curves = [[next(row["dice"] for row in rows if (row["seed"], row["order"], row["corrected"]) ==
                        (seed, order, count)) for count in counts] for seed in sorted({row["seed"] for row in rows})]
        for curve in curves:
            axis.plot(counts, curve, color=color, linewidth=0.7, alpha=0.4)
        axis.plot(counts, [sum(values) / len(values) for values in zip(*curves, strict=True)], marker="o", color=color,
                  label=order)
    axis.set(xlabel=f"corrected of {max(counts)} predicted images", ylabel="test Dice",
             title=f"mean of {len({row['seed'] for row in rows})} seeds (thin: each)")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


@command(interrupted="finished trainings are in the table")
def main(argv: list[str] | None = None) -> None:
    measure(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
