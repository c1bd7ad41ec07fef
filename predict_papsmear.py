"""Segment images with a trained checkpoint, from the shell.

    python predict_papsmear.py outputs/NAME/best_stage_4.pth smear.png --out predicted
    python predict_papsmear.py outputs/NAME/best_stage_4.pth slides/ --out predicted --probability --pixel_size 0.25
    python predict_papsmear.py fold_1.pth,fold_2.pth slides/ --out predicted --augment --shard 1/4

For NAME.png the folder gets NAME_mask.png (0/255; with several classes NAME_mask_1.png, ...), NAME_instances.png (16
bit, 0 for background), NAME_overlay.png (outlines of the nuclei) and rows in nuclei.csv; all nuclei are those of the
first class. A file that cannot be predicted is listed at the end, and the exit code is then 1.

With a checkpoint of native scale (sizing 'tile'), images of more than --stream_above pixels never lie in memory whole:
the results are tiled TIFF files, NAME_mask.tif and NAME_instances.tif (32 bit), and NAME_overlay.png is reduced.
"""

import argparse
import csv
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from system.errors import UserError
from system.options import Parser, checkpoint_list, command, number, results_folder, whole

# Torch and all modules that need it are imported inside the functions: --help and wrong options answer at once.


def shard(text: str) -> tuple[int, int]:
    """Read 'i/n' with i from 1 to n."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with i from 1 to n, e.g. 1/4")
    return int(index), int(count)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every option is checked by its type, before anything is loaded."""
    parser = Parser(prog="predict_papsmear.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=checkpoint_list,
                        help="a checkpoint, or several joined by commas, which are averaged")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--out", required=True, type=results_folder, help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace results of these images that are there")
    parser.add_argument("--probability", action="store_true", help="NAME_probability.png too (16 bit, 65535 is 1)")
    parser.add_argument("--threshold", type=number(0, 1, above=True, below=True), help="that of the checkpoint")
    parser.add_argument("--min_area", type=whole(0), default=30, help="pixels of the smallest nucleus (30)")
    parser.add_argument("--pixel_size", type=number(0, above=True),
                        help="micrometres a pixel, for nuclei.csv; of the first level of slides (what their file says)")
    parser.add_argument("--augment", action="store_true", help="average over the eight flips and quarter turns")
    parser.add_argument("--scale", type=int, help="stop at this decoder level, e.g. 128 to skip the finest")
    parser.add_argument("--tile", type=whole(1), default=1024, help="pixels, for checkpoints of native scale (1024)")
    parser.add_argument("--max_value", type=whole(1),
                        help="white in images of more than 8 bit, e.g. 4095 for 12 bit (that of the checkpoint)")
    parser.add_argument("--max_pixels", type=number(1), default=5e8, help="larger images are not decoded (5e8)")
    parser.add_argument("--stream_above", type=number(0), default=1.6e7,
                        help="pixels from which on images of native scale are predicted from file to file (1.6e7)")
    parser.add_argument("--shard", type=shard, help="i/n: every n-th image from the i-th on (torchrun sets it)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (auto)")
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    return parser


def predict(args: argparse.Namespace) -> int:
    """Predict all images of this process; return the exit code."""
    from images.listing import place
    from inference import Predictor
    from system.devices import set_up_process

    index, count, device = shard_and_device(args)
    all_paths = list_images(args.images)
    paths = all_paths[index - 1::count]
    predictor = Predictor(args.checkpoint, device, args.precision, args.tile, augment=args.augment,
                          scale=args.scale)
    set_up_process(predictor.device, predictor.precision)
    predictor.threshold = args.threshold or predictor.threshold
    predictor.max_value = args.max_value or predictor.max_value
    folder = Path(args.out)
    if any(place(path).parent == folder.resolve() for path in all_paths):
        raise UserError(f"--out {folder}: images are read from this folder, and the results would be taken for images "
                        f"the next time. Choose another --out")
    table = folder / ("nuclei.csv" if count == 1 else f"nuclei_{index}_of_{count}.csv")
    existing = [p for path in paths for p in output_files(folder, path, predictor.classes) if p.exists()]
    if not args.overwrite and (existing or table.exists()):
        raise UserError(f"{existing[0] if existing else table}: exists already, and nothing is overwritten unasked. "
                        f"Choose another --out, or pass --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{','.join(args.checkpoint)}: {predictor}")
    part = f", part {index} of {count}" if count > 1 else ""
    print(f"{len(paths)} images{part}; foreground from probability {predictor.threshold:g}")
    if words := scale_warning(predictor, args.pixel_size):
        print(f"warning: {words}")

    failed, black = predict_all(predictor, paths, table, args)
    if black:
        print(f"warning: {len(black)} of {len(paths)} images came out all black; the highest probability in them is "
              f"{max(black):.3f}. Lower --threshold, or train on images like these")
    if len(failed) < len(paths):
        print(f"look at {folder}/: NAME_overlay.png, {table.name}")
    for problem in failed:
        print(f"error: {problem}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(paths)} files failed", file=sys.stderr)
    return 1 if failed else 0


def predict_all(predictor, paths: list[Path], table: Path, args: argparse.Namespace) -> tuple[list[str], list[float]]:
    """Predict images one after the other; rows of earlier results stay in the table, unless an image has new ones.

    Returns:
        What went wrong, a line for each image that failed, and the highest probability of each that came out black.
    """
    from images.listing import shown
    from images.slides import is_slide
    from nuclei.measurement import COLUMNS, MICROMETRE_COLUMNS

    failed, black = [], []
    scaled = args.pixel_size or any(map(is_slide, paths))
    earlier = rows_by_image(table)
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS + (MICROMETRE_COLUMNS if scaled else ()), extrasaction="ignore")
        writer.writeheader()
        names = {shown(path.name) for path in paths}
        writer.writerows(row for name, rows in earlier.items() if name not in names for row in rows)
        for path in paths:
            times = {p: p.stat().st_mtime_ns for p in output_files(table.parent, path, predictor.classes) if p.exists()}
            try:
                rows, highest = predict_one(predictor, path, table.parent, args)
            except (UserError, OSError, MemoryError, RuntimeError) as error:  # torch runs out of memory with the last
                first_line = (str(error).splitlines() or ["out of memory"])[0]
                failed.append(first_line if str(path) in first_line else f"{path}: {first_line}")
                print(f"{path.name}: failed")
                writer.writerows(earlier.get(shown(path.name), []))
                continue
            writer.writerows(rows)
            for stale in (p for p, time_then in times.items() if p.stat().st_mtime_ns == time_then):
                stale.unlink()  # a file of another kind, or a probability that was not asked for now
            if highest < predictor.threshold:
                black.append(highest)
    if len(failed) == len(paths) > 0 and not earlier:
        table.unlink()  # it has no row
    return failed, black


def rows_by_image(table: Path) -> dict[str, list[dict]]:
    """Return the rows of an earlier nuclei.csv by image, in their order; nothing where there is none."""
    rows: dict[str, list[dict]] = {}
    if table.exists():
        with open(table, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.setdefault(row.get("image", ""), []).append(row)
    return rows


def predict_one(predictor, path: Path, folder: Path, args: argparse.Namespace) -> tuple[Iterator[dict], float]:
    """Predict one image, write its files, print its line; return its rows of nuclei.csv and its highest probability."""
    from images.bands import ImageRows
    from images.files import image_size
    from images.listing import shown
    from images.slides import is_slide
    from nuclei.measurement import nucleus_rows

    start, pixel_size = time.perf_counter(), args.pixel_size
    if is_slide(path):
        rows = slide_rows(predictor, path, args)
        height, width, pixel_size = rows.height, rows.width, rows.microns_per_pixel
        prediction = predict_streamed(predictor, rows, folder, args)
    else:
        height, width = image_size(path, args.max_pixels)
        if predictor.recipe.sizing == "tile" and height * width > args.stream_above:
            rows = ImageRows(path, 3, args.max_pixels, predictor.max_value)
            if not rows.in_parts:
                print(f"{path.name}: not a TIFF that can be read in parts; all its pixels are held in memory")
            prediction = predict_streamed(predictor, rows, folder, args)
        else:
            prediction = predict_in_memory(predictor, path, folder, args)
    black = prediction.highest < predictor.threshold
    print(f"{path.name}: {height}x{width}, {prediction.nuclei} nuclei, {prediction.foreground:.1%} foreground, "
          f"{time.perf_counter() - start:.1f} s"
          + (f"; ALL BLACK, highest probability {prediction.highest:.3f}" if black else "")
          + (f"; UNLIKE THE TRAINING IMAGES: {prediction.strange}" if prediction.strange else ""), flush=True)
    return nucleus_rows(shown(path.name), prediction.sums.measures(), pixel_size), prediction.highest


def slide_rows(predictor, path: Path, args: argparse.Namespace):
    """Open a slide at the level whose pixels are nearest to those of training, and say which that is."""
    from images.files import ImageFileError
    from images.slides import SlideRows

    if predictor.recipe.sizing != "tile":
        raise ImageFileError(f"{path}: a slide, but this checkpoint brings each image to 256x256 as a whole. Train on "
                             f"tiles for slides, or cut out regions like the training images")
    wanted = predictor.recipe.microns_per_pixel
    rows = SlideRows(path, 3, args.max_pixels, wanted, args.pixel_size or 0.0)
    print(f"{path.name}: {rows.scale_in_words(wanted)}")
    return rows


def scale_warning(predictor, pixel_size: float | None) -> str:
    """Return in words that pixels have another size than in training, '' if they do not or it is not known."""
    from images.slides import differ, in_words

    wanted = predictor.recipe.microns_per_pixel
    if not pixel_size or predictor.recipe.sizing != "tile" or not differ(pixel_size, wanted):
        return ""
    return (f"--pixel_size is {pixel_size:g} micrometres, in training it was {wanted:g}, so that in images nuclei are "
            f"{in_words(pixel_size / wanted)} as the network knows them. Bring them to {wanted:g} first")


def predict_in_memory(predictor, path: Path, folder: Path, args: argparse.Namespace):
    """Predict one image as a whole and write its files; return a `nuclei.streaming.Prediction`."""
    import numpy as np

    from images.files import load_image, save_instances, save_png, to_image
    from nuclei.measurement import NucleusSums
    from nuclei.outlines import overlay
    from nuclei.streaming import Prediction

    image = load_image(path, 3, int(args.max_pixels), predictor.max_value)
    pixels = to_image(image, predictor.in_channels)
    probability = predictor.predict(pixels)
    nuclei = predictor.nuclei(probability, args.min_area)
    mask = probability[..., :predictor.classes] >= predictor.threshold
    for k, ending in enumerate(class_endings(predictor.classes)):
        save_png(folder / f"{path.stem}_mask{ending}.png", mask[..., k])
        if args.probability:
            save_png(folder / f"{path.stem}_probability{ending}.png",
                     np.round(probability[..., k] * 65535).astype(np.uint16))
    save_instances(folder / f"{path.stem}_instances.png", nuclei)
    save_png(folder / f"{path.stem}_overlay.png", overlay(image, nuclei))
    sums = NucleusSums()
    sums.add(nuclei, probability[..., 0])
    return Prediction(int(nuclei.max()), float(mask[..., 0].mean()), float(probability[..., :predictor.classes].max()),
                      predictor.unlike_training(pixels, probability), sums)


def predict_streamed(predictor, rows, folder: Path, args: argparse.Namespace):
    """Predict one image, an `ImageRows` or `SlideRows`, from file to files; return a `nuclei.streaming.Prediction`."""
    from images.files import save_png
    from nuclei.outlines import overlay
    from nuclei.streaming import stream_prediction
    from system.atomic import finished_files

    path = rows.path
    with finished_files() as unfinished:
        def place(kind: str) -> list[Path]:
            return [unfinished(folder / f"{path.stem}_{kind}{ending}.tif")
                    for ending in class_endings(predictor.classes)]

        prediction, overview, labels = stream_prediction(
            predictor, rows, args.min_area, unfinished(folder / f"{path.stem}_instances.tif"), place("mask"),
            place("probability") if args.probability else [])
        save_png(unfinished(folder / f"{path.stem}_overlay.png"), overlay(overview, labels))
    return prediction


def class_endings(classes: int) -> list[str]:
    """Return what file names say of the class: nothing for a single one."""
    return [""] if classes == 1 else [f"_{k + 1}" for k in range(classes)]


def list_images(given: list[str]) -> list[Path]:
    """Return the files, and the images of the folders in order of their names.

    Raises UserError for what is not there and for two images whose results would have one name.
    """
    from images.listing import IMAGE_SUFFIXES, left_out, list_folder
    from images.slides import SLIDE_SUFFIXES

    paths = []
    for path in map(Path, given):
        if path.is_dir():
            listing = list_folder(path, IMAGE_SUFFIXES + SLIDE_SUFFIXES)
            if not listing.files:
                raise UserError(f"{path}: no image in this folder; {', '.join(IMAGE_SUFFIXES)} are read")
            paths += sorted([*listing.files.values(), *(twin for twin, _ in listing.twins)])
            if words := left_out(listing):
                print(f"not read in {path}: {words}")
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    paths = list(dict.fromkeys(paths))
    stem, count = Counter(path.stem for path in paths).most_common(1)[0]
    if count > 1:
        twins = [str(path) for path in paths if path.stem == stem]
        raise UserError(f"{' and '.join(twins[:2])}: both would be written as {stem}_mask.png. Predict them into two "
                        f"folders, or rename one")
    return paths


def output_files(folder: Path, path: Path, classes: int) -> list[Path]:
    """Return the files that a prediction of an image may make."""
    kinds = [f"{kind}{ending}" for kind in ("mask", "probability") for ending in class_endings(classes)]
    return [folder / f"{path.stem}_{kind}{suffix}" for kind in (*kinds, "instances") for suffix in (".png", ".tif")] \
        + [folder / f"{path.stem}_overlay.png"]


def shard_and_device(args: argparse.Namespace) -> tuple[int, int, str]:
    """Return i, n and the device: as given, else from the variables of torchrun, else everything in one process."""
    (index, count), device = args.shard or (1, 1), args.device
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if not args.shard and processes > 1:
        import torch

        index, count = int(os.environ["RANK"]) + 1, processes
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return index, count, device


@command(interrupted="finished images are written")
def main(argv: list[str] | None = None) -> int:
    return predict(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
