"""Make a data set that can be trained on, check it, or split it without leakage.

    python prepare_data.py monuseg --train_dir "MoNuSeg 2018 Training Data" --test_dir MoNuSegTestData \\
        --out data_monuseg
    python prepare_data.py herlev --src herlev --out data_herlev --folds 5
    python prepare_data.py drawn --format geojson --images slides --annotations exports --out data_mine
    python prepare_data.py sample --out my_sample --train 200 --valid 40 --test 40
    python prepare_data.py check data_mine --group_regex '^[^_]+'
    python prepare_data.py split data_mine --group_regex '^[^_]+'

`python prepare_data.py COMMAND --help` explains each command. Nothing is ever overwritten.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from images.recipe import SIZINGS
from images.resolutions import FINEST, MOST_CHANNELS
from images.splits import SHARES
from preparation.choices import DRAWN_FORMATS, HERLEV_TARGETS, SAMPLE_COUNTS
from system.errors import UserError
from system.options import Parser, command, name_ending, number, regex, whole

# All modules that need numpy are imported inside the functions: --help and wrong options answer at once.

def class_list(text: str) -> tuple[str, ...]:
    """Read names joined by commas."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not names joined by commas, e.g. Nucleus,Mitosis")
    return names


def split_shares(text: str) -> tuple[float, ...]:
    """Read per cent of train, valid and test, with sum 100."""
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?){2}", text) or not 99.9 < sum(map(float, text.split(","))) < 100.1 \
            or not all(map(float, text.split(","))):
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers above 0 with sum 100, for train, valid and "
                                         f"test, e.g. 70,15,15")
    return tuple(float(share) / 100 for share in text.split(","))


COLOUR = ("--in_channels", 3)  # of the images of MoNuSeg and Herlev, and of those that something is drawn on
SHARED_OPTIONS = {
    "--out": {"type": Path, "required": True, "help": "folder to make; must be new or empty"},
    "--seed": {"type": whole(0), "default": 0, "help": "of what is random: the split, or the pictures of a sample (0)"},
    "--overlap": {"type": whole(0, FINEST - 1), "default": 0, "help": "pixels that neighbouring tiles share (0)"},
    "--group_regex": {"type": regex, "metavar": "REGEX",
                      "help": "finds the patient, slide or field of view in an image's name, e.g. '^[^_]+' for all "
                              "before the first underscore; images of one group belong into one split"},
    "--in_channels": {"type": int, "choices": (1, 3), "default": 1, "help": "1 luminance, 3 RGB (1)"},
    "--shares": {"type": split_shares, "default": SHARES, "metavar": "70,15,15",
                 "help": "per cent of the images for train, valid and test (70,15,15)"},
    "--max_value": {"type": whole(0), "default": 0,
                    "help": "white in images of more than 8 bit, e.g. 4095 for 12 bit (0: that of their type)"},
    "--mask_suffix": {"type": name_ending, "default": "", "metavar": "END",
                      "help": "what names of masks add to those of images, e.g. _mask (none)"},
    "--classes": {"type": class_list, "default": (), "metavar": "A,B",
                  "help": "classes, layers or categories that are nuclei (all but those whose name says otherwise, "
                          "such as Ignore*)"},
    "--out_channels": {"type": whole(1, MOST_CHANNELS - 1), "default": 1,
                       "help": "classes; above 1 masks are label images 0..K (1)"},
}

MONUSEG = """Cut the MoNuSeg download into tiles of 256x256 in colour, with masks and instance maps.

Either folder may be in the layout of the training data ("Tissue Images" and "Annotations") or in that of the test data
(image and XML side by side). Valid is split off the training images by patient; valid and test also keep their whole
images, in OUT/whole."""

HERLEV = """Turn the Herlev download into a data set of single cells with masks of nucleus, cytoplasm or both.

The source holds seven class folders with NAME.BMP and its mask NAME-d.bmp. Cells of one field of view (the number
before the first '-') go into one split; every class is split 70/15/15."""

DRAWN = """Turn images and what was drawn on them in QuPath, Fiji, napari or CVAT into a data set, instances kept.

geojson (QuPath) and label-tiff (Fiji, napari, Cellpose): one file an image, with the image's stem (NAME.geojson or
NAME.png.geojson; NAME.tif, NAME_cp_masks.png, NAME_labels.tif). coco (CVAT): one JSON for all. Groups (patients,
slides) are found in the names by --group_regex and go into one split each."""

SAMPLE = "Draw synthetic Pap smear fields with masks of the nuclei, such as the bundled sample."

CHECK = "Read every file of a data set and report images, empty masks, foreground, and what train shares with the rest."

SPLIT = """Write splits.csv into a data set and check it: every group (or image) in one split, copies in train alone.

--shares says how many per cent of the images go to train, valid and test, whatever folder they lie in. Training and
evaluation then follow splits.csv."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every option is checked by its type, before anything is read or written."""
    parser = Parser(prog="prepare_data.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(name: str, run: Callable, description: str, shared: tuple[str, ...] = ()) -> Callable:
        """Add a command with its shared options; return the function that adds further ones to it."""
        one = commands.add_parser(name, help=description.split("\n")[0], description=description, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        one.set_defaults(run=run)
        for option in shared:
            one.add_argument(option, **SHARED_OPTIONS[option])
        return one.add_argument

    option = add("monuseg", prepare_monuseg, MONUSEG, ("--out", "--overlap", "--seed", "--classes"))
    option("--train_dir", type=Path, required=True, help="unpacked training data")
    option("--test_dir", type=Path, required=True, help="unpacked test data")
    option("--valid_share", type=number(0, 1, above=True, below=True), default=0.2, help="of training images (0.2)")

    option = add("herlev", prepare_herlev, HERLEV, ("--out", "--seed"))
    option("--src", type=Path, required=True, help="folder with the seven class folders")
    option("--target", choices=tuple(HERLEV_TARGETS), default="nucleus",
           help="what the masks mark; both: 1 nucleus, 2 cytoplasm (nucleus)")
    option("--folds", type=whole(0), default=0, help="also write so many splits for cross-validation, 3 or more (0)")

    option = add("drawn", import_drawn, DRAWN, ("--out", "--group_regex", "--shares", "--overlap", "--seed",
                                               "--classes", "--max_value"))
    option("--format", choices=DRAWN_FORMATS, required=True)
    option("--images", type=Path, required=True, help="folder of images")
    option("--annotations", type=Path, required=True, help="folder of one file an image, or COCO JSON")
    option("--sizing", choices=SIZINGS, default="tile",
           help="tile: cut into 256x256 at native scale (default); resize: keep images whole, as training brings each "
                "to 256x256 (single cells)")
    option("--microns_per_pixel", type=number(0, above=True), help="size of a pixel, if known")

    option = add("sample", make_sample, SAMPLE, ("--out", "--seed"))
    for split, count in SAMPLE_COUNTS.items():
        option(f"--{split}", type=whole(1), default=count, help=f"{split} images ({count})")

    option = add("check", check, CHECK, ("--group_regex", "--in_channels", "--out_channels", "--max_value",
                                         "--mask_suffix"))
    option("data_root", type=Path, nargs="?", default=Path("data"), metavar="DATA_ROOT",
           help="folder with train|valid|test / images|masks (data)")

    option = add("split", split_data, SPLIT, ("--group_regex", "--shares", "--seed", "--in_channels", "--out_channels",
                                                "--max_value", "--mask_suffix"))
    option("data_root", type=Path, metavar="DATA_ROOT", help="folder with train|valid|test / images|masks")
    return parser


def prepare_monuseg(args: argparse.Namespace) -> None:
    """Make the data set and say how to check it by patient."""
    from preparation.monuseg import patient_regex, prepare

    report = prepare(args.train_dir, args.test_dir, args.out, args.overlap, args.valid_share, args.seed, args.classes)
    patients = patient_regex(args.train_dir, args.test_dir)
    say_what_to_do(report, args.out, *COLOUR, *(("--group_regex", patients) if patients else ()))


def prepare_herlev(args: argparse.Namespace) -> None:
    """Make the data set and say how to check it by field of view, and how to use folds."""
    from preparation.herlev import FIELD, prepare

    report = prepare(args.src, args.out, args.target, args.folds, args.seed)
    classes = max(HERLEV_TARGETS[args.target].values())
    several = ("--out_channels", classes) if classes > 1 else ()
    say_what_to_do(report, args.out, *COLOUR, "--group_regex", FIELD, *several)
    if args.folds:
        print(f"to cross-validate, train once with each fold; the first is taken by\n"
              f"{shell('cp', args.out / 'fold_1.csv', args.out / 'splits.csv')}")


def import_drawn(args: argparse.Namespace) -> None:
    """Make the data set and say how to check it by the groups asked for."""
    from preparation import drawn

    if args.classes and args.format == "label-tiff":
        raise UserError("--classes is for geojson and coco; label images have none. Leave it out")
    report = drawn.import_drawn(args.format, args.images, args.annotations, args.out, args.group_regex, args.sizing,
                                args.overlap, args.microns_per_pixel, args.seed, args.classes, args.shares,
                                args.max_value)
    say_what_to_do(report, args.out, *COLOUR, *(("--group_regex", args.group_regex) if args.group_regex else ()))


def say_what_to_do(report: str, out: Path, *options) -> None:
    """Print the report on a data set just made, what to look at, and the command that checks it."""
    print(f"{report}\nwrote {out}; look at {out / 'contact_sheet.png'}, then\n"
          f"{shell('python', 'prepare_data.py', 'check', out, *options)}")


def make_sample(args: argparse.Namespace) -> None:
    """Draw the sample and say how to check it."""
    from preparation import sample

    counts = {split: getattr(args, split) for split in SAMPLE_COUNTS}
    size = sample.make_sample(args.out, counts, args.seed)
    print(f"wrote {sum(counts.values())} images with masks to {args.out} ({size / 2 ** 20:.1f} MiB); next\n"
          f"{shell('python', 'prepare_data.py', 'check', args.out)}")


def check(args: argparse.Namespace) -> None:
    """Print the report on a data set."""
    from images.report import check_dataset

    print(check_dataset(args.data_root, args.group_regex, args.in_channels, args.out_channels,
                        max_value=args.max_value, mask_suffix=args.mask_suffix))


def split_data(args: argparse.Namespace) -> None:
    """Write the split and print the report on it."""
    from images.report import split_dataset

    path, report = split_dataset(args.data_root, args.group_regex, args.seed, args.in_channels, args.out_channels,
                                 args.shares, args.max_value, args.mask_suffix)
    print(f"wrote {path}\n{report}")


def shell(*words) -> str:
    """Return a command as it can be pasted into a shell."""
    return shlex.join(map(str, words))


@command(interrupted="nothing was written")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
