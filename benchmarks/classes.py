"""Score a data set class by class, over the tests of several folds, beside what its masks allow at most.

    python benchmarks/classes.py --data_root data_folds --scores outputs/test_1/scores.csv --out outputs/classes

The class of an image is the folder that `source` names in manifest.csv. Beside the Dice of the scores stand two
ceilings, the Dice of each mask with itself redrawn: with a smooth outline (Gaussian filter of half a pixel of a grid
of 40x40, cut at half), and reduced to that grid and back. A network that draws smooth outlines cannot exceed the
first by much. Writes classes.csv, a row an image, and classes.md.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if not __package__:  # run as a file: modules are found from the project's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from system.atomic import atomic_write
from system.errors import UserError
from system.options import Parser, command, whole
from system.tables import number_in, read_table, write_table
from system.text import shown

if TYPE_CHECKING:
    import numpy as np

    from images.pairs import Pair

# Modules that need NumPy and torch are imported inside the functions: --help and wrong options answer at once.

TABLE, REPORT = "classes.csv", "classes.md"
COLUMNS = ("image", "class", "fold", "dice", "smooth", "grid")
SPREAD = 0.5  # standard deviation of the filter that smooths an outline, in pixels of the grid


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = Parser(prog="benchmarks/classes.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True, help="data set with a manifest.csv, masks of one class")
    parser.add_argument("--scores", nargs="*", default=[], metavar="CSV",
                        help="scores.csv of evaluate_papsmear.py, one a fold; an image is scored once (none)")
    parser.add_argument("--apart", nargs="*", default=[], metavar="CLASS",
                        help="classes that the last line of the table leaves out, e.g. those of coarse masks (none)")
    parser.add_argument("--grid", type=whole(2), default=40, help="pixels on a side of the grid of the ceilings (40)")
    parser.add_argument("--out", required=True, help="folder for the results")
    return parser


def measure(args: argparse.Namespace) -> None:
    """Score every image, or those that --scores holds; write and print the tables."""
    out = Path(args.out)
    for name in (TABLE, REPORT):
        if (out / name).exists():
            raise UserError(f"{out / name}: exists already, and nothing is overwritten unasked. Choose another --out")
    folds = read_scores([Path(path) for path in args.scores])
    rows = image_rows(pairs_of_classes(Path(args.data_root)), folds, args.grid)
    if unknown := sorted(set(args.apart) - {row["class"] for row in rows}):
        raise UserError(f"--apart {unknown[0]}: no such class among {', '.join(classes_of(rows))}. Correct the name")
    text = report(rows, args.apart, args.grid)
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / TABLE, COLUMNS, rows)
    with atomic_write(out / REPORT) as file:
        file.write(text.encode())
    print(text)
    print(f"look at {out}/: {REPORT}, {TABLE}")


def pairs_of_classes(data_root: Path) -> list["Pair"]:
    """Return the images of all splits with their masks; the origin of each names its class.

    Raises UserError if an image has no class.
    """
    from images.splits import find_data_root, list_splits

    pairs = [pair for split in list_splits(find_data_root(data_root), use_augmented=False).values() for pair in split]
    for pair in pairs:
        if not class_of(pair):
            raise UserError(f"{pair.image}: its class is not known, as {data_root / 'manifest.csv'} is not there or "
                            f"names no folder as its source. Prepare the data set with prepare_data.py")
    return pairs


def class_of(pair: "Pair") -> str:
    """Return the folder in which the image lay before it was prepared, '' if that is not known."""
    return PurePosixPath(pair.origin).parent.name


def read_scores(paths: Sequence[Path]) -> dict[str, tuple[int, float]]:
    """Return image -> (number of its fold from 1 on, Dice). Raises UserError if an image is scored twice."""
    found: dict[str, tuple[int, float]] = {}
    for fold, path in enumerate(paths, start=1):
        rows = list(read_table(path))
        if not rows or not {"image", "dice"} <= set(rows[0]):
            raise UserError(f"{path}: no table of scores with the columns image and dice. Give a scores.csv of "
                            f"evaluate_papsmear.py")
        for row in rows:
            if row["image"] in found:
                raise UserError(f"{path}: {row['image']} is scored in {paths[found[row['image']][0] - 1]} too. Each "
                                f"image counts once: give the scores of folds that share none")
            found[row["image"]] = fold, number_in(row["dice"])
            if math.isnan(found[row["image"]][1]):
                raise UserError(f"{path}: {row['image']} has a Dice of {shown(row['dice'])[:40]!r}; it must be a "
                                f"number. Evaluate again")
    return found


def image_rows(pairs: Iterable["Pair"], folds: dict[str, tuple[int, float]], grid: int) -> list[dict]:
    """Return a row an image that is scored (of all where nothing is): its class, fold, Dice and ceilings.

    Raises UserError for scores of images that are not in the data set.
    """
    from images.masks import load_mask

    rows, left = [], set(folds)
    for pair in pairs:
        if folds and pair.name not in folds:
            continue
        left.discard(pair.name)
        mask = load_mask(pair.mask)[..., 0]
        fold, dice = folds.get(pair.name, ("", ""))
        rows.append({"image": pair.name, "class": class_of(pair), "fold": fold, "dice": dice}
                    | {name: round(value, 5) for name, value in ceilings(mask, grid).items()})
    if left:
        raise UserError(f"{min(left)}: scored, but not in the data set (and {len(left) - 1} more). Give the "
                        f"--data_root that was scored")
    return sorted(rows, key=lambda row: (row["class"], row["image"]))


def ceilings(mask: "np.ndarray", grid: int) -> dict[str, float]:
    """Return the Dice of a mask with itself redrawn: `smooth`, with a smooth outline, and `grid`, on a coarse grid.

    Args:
        mask: (H, W) bool.
        grid: pixels on a side of the grid.
    """
    import numpy as np
    from scipy.ndimage import gaussian_filter
    from skimage.transform import resize

    pixels = mask.astype(np.float32)
    smooth = gaussian_filter(pixels, [SPREAD * side / grid for side in mask.shape]) >= 0.5
    coarse = resize(pixels, (grid, grid), order=1, anti_aliasing=True)
    return {"smooth": dice_of(mask, smooth), "grid": dice_of(mask, resize(coarse, mask.shape, order=1) >= 0.5)}


def dice_of(one: "np.ndarray", other: "np.ndarray") -> float:
    """Return the Dice of two masks, 1 if both are empty; see `scoring.measures.pixel_metrics`."""
    import torch

    from scoring.measures import pixel_metrics

    return float(pixel_metrics(*(torch.from_numpy(mask)[None, None] for mask in (one, other)))["dice"])


def classes_of(rows: Iterable[dict]) -> list[str]:
    """Return the classes of these rows, sorted."""
    return sorted({row["class"] for row in rows})


def report(rows: list[dict], apart: Sequence[str], grid: int) -> str:
    """Return the tables of classes and of folds in Markdown."""
    from benchmarks.growth_report import table

    parts = [(name, [row for row in rows if row["class"] == name]) for name in classes_of(rows)]
    parts.append(("**all**", rows))
    if apart:
        parts.append((f"**without {', '.join(apart)}**", [row for row in rows if row["class"] not in apart]))
    head = ("class", "images", "Dice", "with a smooth outline", f"on a grid of {grid}x{grid}")
    lines = ["# Class by class\n", "Means over images ± their standard deviation. Beside the Dice stand ceilings: the "
             "Dice of the masks with themselves redrawn.\n",
             *table(head, [(name, str(len(part)), *(mean(part, column) for column in ("dice", "smooth", "grid")))
                           for name, part in parts])]
    if len(folds := sorted({row["fold"] for row in rows} - {""})) > 1:
        lines += ["", *table(("fold", "images", "Dice"), [
            (str(fold), str(len(part)), mean(part, "dice"))
            for fold in folds for part in [[row for row in rows if row["fold"] == fold]]])]
    return "\n".join(lines) + "\n"


def mean(rows: Iterable[dict], column: str) -> str:
    """Return mean ± standard deviation of a column, '' where it is empty."""
    import numpy as np

    values = [row[column] for row in rows if row[column] != ""]
    return f"{np.mean(values):.4f} ± {np.std(values):.4f}" if values else ""


@command()
def main(argv: list[str] | None = None) -> None:
    measure(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
