"""Segment images with a trained checkpoint, from the shell.

    python predict_papsmear.py outputs/NAME/best_stage_4.pth smear.png --out predicted
    python predict_papsmear.py outputs/NAME/best_stage_4.pth slides/ --out predicted --probability --pixel_size 0.25
    python predict_papsmear.py fold_1.pth,fold_2.pth slides/ --out predicted --augment --shard 1/4

For NAME.png the folder gets NAME_mask.png (0/255; with several classes NAME_mask_1.png, ...), NAME_instances.png (16
bit, 0 for background), NAME_overlay.png (outlines of the nuclei), rows in nuclei.csv and, when it is finished, one in
images.csv; all nuclei are those of the first class. A file that cannot be predicted is listed at the end, and the exit
code is then 1. After a kill or a full disk the same command with --continue goes on with the images that are left.

With a checkpoint of native scale (sizing 'tile'), images of more than --stream_above pixels never lie in memory whole:
the results are tiled TIFF files, NAME_mask.tif and NAME_instances.tif (32 bit), and NAME_overlay.png is reduced.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from system.errors import FULL, DiskError, UserError, lacks_memory
from system.options import (
    Parser,
    add_device,
    add_precision,
    add_views,
    checkpoint_list,
    command,
    number,
    results_folder,
    whole,
)
from system.text import of

# Torch and all modules that need it are imported inside the functions: --help and wrong options answer at once.

FORMATS = {"png": "overlay.png", "geojson": "nuclei.geojson", "label-tiff": "labels.tif", "ome-tiff": "labels.ome.tif",
           "imagej-rois": "rois.zip"}  # with the ending of a file of each


def shard(text: str) -> tuple[int, int]:
    """Read 'i/n' with i from 1 to n."""
    index, _, count = text.partition("/")
    if not re.fullmatch(r"\d{1,9}/\d{1,9}", text) or not 1 <= int(index) <= int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with i from 1 to n, e.g. 1/4")
    return int(index), int(count)


def format_list(text: str) -> tuple[str, ...]:
    """Read names of formats joined by commas."""
    wrong = [name for name in text.split(",") if name not in FORMATS]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(FORMATS)}, joined by commas")
    return tuple(dict.fromkeys(text.split(",")))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every option is checked by its type, before anything is loaded."""
    parser = Parser(prog="predict_papsmear.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=checkpoint_list,
                        help="a checkpoint, a run folder, or several joined by commas, which are averaged")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--out", required=True, type=results_folder, help="folder for the results")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--continue", action="store_true", dest="go_on",
                          help="go on with an interrupted prediction: leave out the images that are finished")
    existing.add_argument("--overwrite", action="store_true",
                          help="replace results of these images that are there, each when its new ones are whole")
    parser.add_argument("--format", type=format_list, default=("png",), metavar="png,...", dest="formats",
                        help="png (mask, instances and overlay), geojson (QuPath), label-tiff and ome-tiff (Fiji, "
                             "napari, with the pixel size), imagej-rois (Fiji), joined by commas (png)")
    parser.add_argument("--probability", action="store_true", help="NAME_probability.png too (16 bit, 65535 is 1)")
    parser.add_argument("--threshold", type=number(0, 1, above=True, below=True), help="that of the checkpoint")
    parser.add_argument("--min_area", type=whole(0), default=30, help="pixels of the smallest nucleus (30)")
    parser.add_argument("--min_probability", type=number(0, 1),
                        help="lowest mean probability of a nucleus; 0 keeps faint ones (the middle of threshold and 1)")
    parser.add_argument("--pixel_size", type=number(0, above=True),
                        help="micrometres a pixel, for nuclei.csv; of the first level of slides (what their file says)")
    add_views(parser.add_argument)
    parser.add_argument("--scale", type=int, help="stop at this decoder level, e.g. 128 to skip the finest")
    parser.add_argument("--tile", type=whole(1), default=1024, help="pixels, for checkpoints of native scale (1024)")
    parser.add_argument("--max_value", type=whole(1),
                        help="white in images of more than 8 bit, e.g. 4095 for 12 bit (that of the checkpoint)")
    parser.add_argument("--max_pixels", type=number(1), default=5e8, help="larger images are not decoded (5e8)")
    parser.add_argument("--stream_above", type=number(0), default=1.6e7,
                        help="pixels from which on images of native scale are predicted from file to file (1.6e7)")
    parser.add_argument("--shard", type=shard, help="i/n: every n-th image from the i-th on (torchrun sets it)")
    add_device(parser.add_argument)
    add_precision(parser.add_argument)
    return parser


def predict(args: argparse.Namespace) -> int:
    """Predict all images of this process; return the exit code."""
    from images.listing import IMAGE_SUFFIXES, list_images, place
    from images.slides import SLIDE_SUFFIXES, is_slide
    from inference import Predictor
    from nuclei.formats import check_packages
    from nuclei.results import ResultsFolder
    from system.devices import set_up_process
    from system.signals import noted_signals

    check_packages(args.formats)
    index, count, device = shard_and_device(args)
    all_paths = list_images(args.images, IMAGE_SUFFIXES + SLIDE_SUFFIXES)
    paths = all_paths[index - 1::count]
    predictor = Predictor(args.checkpoint, device, args.precision, args.tile, augment=args.augment,
                          scale=args.scale, single_cell=args.single_cell)
    set_up_process(predictor.device, predictor.precision)
    predictor.threshold = args.threshold or predictor.threshold
    predictor.max_value = args.max_value or predictor.max_value
    predictor.min_probability = args.min_probability
    folder = Path(args.out)
    if any(place(path).parent == Path(os.path.realpath(folder)) for path in all_paths):
        raise UserError(f"--out {folder}: images are read from this folder, and the results would be taken for images "
                        f"the next time. Choose another --out")
    results = ResultsFolder(folder, (index, count), predictor.classes, settings_of(args, predictor),
                            bool(args.pixel_size or any(map(is_slide, all_paths))), predictor.has_cytoplasm)
    with noted_signals() as asked, results:
        left = results.begin(paths, args.overwrite, args.go_on, [FORMATS[name] for name in args.formats])
        print(f"{','.join(args.checkpoint)}: {predictor}")
        part = f", part {index} of {count}" if count > 1 else ""
        print(f"{len(paths)} images{part}; foreground from probability {predictor.threshold:g}"
              + (f"; {len(paths) - len(left)} are finished, {len(left)} are left" if args.go_on else ""))
        if words := scale_warning(predictor, args.pixel_size):
            print(f"warning: {words}")
        if others := results.other_parts():
            print(f"warning: {folder} holds {', '.join(others)} of an earlier prediction, which shared the images "
                  f"otherwise (--shard), so its rows may be outdated. Remove what you no longer need")
        failed, black = predict_all(predictor, left, results, args, asked)
    if black:
        print(f"warning: {len(black)} of {len(left)} images came out all black; the highest probability in them is "
              f"{max(black):.3f}. Lower --threshold, or train on images like these")
    if len(failed) < len(paths):
        print(f"look at {folder}/: {', '.join(f'NAME_{FORMATS[name]}' for name in args.formats)}, "
              f"{results.images.name}, {results.nuclei.name}")
        if first := results.least_trusted():
            print(f"look at these first, in which the network agrees least with itself: {', '.join(first)}")
    for problem in failed:
        print(f"error: {problem}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(paths)} files failed", file=sys.stderr)
    return 1 if failed else 0


def settings_of(args: argparse.Namespace, predictor) -> dict:
    """Return what the results depend on, for settings.json and --continue."""
    from system.archives import digest_of

    names = ("min_area", "min_probability", "pixel_size", "probability", "augment", "single_cell", "scale", "tile",
             "stream_above")
    return {"checkpoint": args.checkpoint, "sha256": [digest_of(Path(path)) for path in args.checkpoint],
            "threshold": predictor.threshold, "max_value": predictor.max_value, "device": str(predictor.device),
            "precision": predictor.precision, "formats": list(args.formats)} | {
        name: getattr(args, name) for name in names}


def predict_all(predictor, paths: list[Path], results, args: argparse.Namespace,
                asked: Callable[[], int]) -> tuple[list[str], list[float]]:
    """Predict images one after the other into a `ResultsFolder`.

    Args:
        asked: whether to stop (see `system.signals.noted_signals`), which is done before the next image, and before
            the next band of one that is predicted from file to file.
    Returns:
        What went wrong, a line for each image that failed, and the highest probability of each that came out black.
    """
    from system.signals import stop_if_asked

    failed, black = [], []
    for path in paths:
        try:
            with results.image(path) as result:
                highest = predict_one(predictor, path, result, args, lambda: stop_if_asked(asked))
        except (UserError, OSError, MemoryError, RuntimeError) as error:  # torch runs out of memory with the last
            refuse_lost_folder(error, results.path)
            first_line = f"out of memory; take a smaller --tile than {args.tile}, or cut the image into parts" \
                if lacks_memory(error) else str(error).splitlines()[0]
            failed.append(first_line if str(path) in first_line else f"{path}: {first_line}")
            print(f"{path.name}: failed")
            continue
        if highest < predictor.threshold:
            black.append(highest)
        stop_if_asked(asked)
    return failed, black


def refuse_lost_folder(error: BaseException, folder: Path) -> None:
    """Raise DiskError if an error is one of the folder of the results, into which no other image could be written."""
    if not folder.is_dir():
        raise DiskError(f"{folder}: it was removed, and with it what was written. Start the same command again without "
                        f"--continue") from None
    if isinstance(error, OSError) and error.errno in FULL:
        reason = error.strerror
    else:
        reason = "" if os.access(folder, os.W_OK) else "it is read-only"
    if reason:
        raise DiskError(f"{folder}: {reason}. Finished images are written. Make room or mend the disk, then go on with "
                        f"the same command and --continue") from None


def predict_one(predictor, path: Path, result, args: argparse.Namespace, between_bands: Callable[[], None]) -> float:
    """Predict one image, write its `ImageResults`, print its line; return its highest probability."""
    from images.bands import ImageRows
    from images.files import image_size
    from images.slides import is_slide
    from nuclei.formats import write_formats
    from nuclei.measurement import nucleus_rows
    from nuclei.results import image_row

    start, pixel_size = time.perf_counter(), args.pixel_size
    if is_slide(path):
        rows = slide_rows(predictor, path, args)
        height, width, pixel_size = rows.height, rows.width, rows.microns_per_pixel
        prediction = predict_streamed(predictor, rows, result, args, between_bands)
    else:
        height, width = image_size(path, args.max_pixels)
        if predictor.recipe.sizing == "tile" and height * width > args.stream_above:
            rows = ImageRows(path, 3, args.max_pixels, predictor.max_value)
            if not rows.in_parts:
                print(f"{path.name}: not a TIFF that can be read in parts; all its pixels are held in memory")
            prediction = predict_streamed(predictor, rows, result, args, between_bands)
        else:
            prediction = predict_in_memory(predictor, path, result, args)
    black, seconds = prediction.highest < predictor.threshold, time.perf_counter() - start
    write_formats(result, args.formats, (height, width), prediction.measures, pixel_size)
    result.nuclei = nucleus_rows(result.name, prediction.measures, pixel_size)
    result.row = image_row(prediction, (height, width), pixel_size) | {"seconds": round(seconds, 2)}
    print(f"{path.name}: {height}x{width}, {of(prediction.nuclei, 'nucleus', 'nuclei')}, "
          f"{prediction.foreground:.1%} foreground, "
          f"{seconds:.1f} s"
          + (f"; ALL BLACK, highest probability {prediction.highest:.3f}" if black else
             left_out_in_words(predictor, args) if not prediction.nuclei else "")
          + (f"; UNLIKE THE TRAINING IMAGES: {prediction.strange}" if prediction.strange else ""), flush=True)
    return prediction.highest


def left_out_in_words(predictor, args: argparse.Namespace) -> str:
    """Return why no nucleus stayed of what is foreground."""
    return (f"; all of it was left out, as a nucleus has at least {args.min_area} pixels (--min_area) and a mean "
            f"probability of {predictor.lowest_probability:g} (--min_probability)")


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


def predict_in_memory(predictor, path: Path, result, args: argparse.Namespace):
    """Predict one image as a whole and write its files; return a `nuclei.streaming.Prediction`."""
    import numpy as np

    from images.files import TURNED, instances_suffix, load_and_tell, save_instances, save_png, to_image
    from nuclei.measurement import NucleusSums, measure_nuclei
    from nuclei.outlines import overlay
    from nuclei.results import class_endings
    from nuclei.streaming import Prediction
    from nuclei.trust import Agreement

    image, turned, dark = load_and_tell(path, 3, int(args.max_pixels), predictor.max_value)
    if turned or dark:
        print(f"{path.name}: " + "; ".join([f"{TURNED}, and its results too"] * turned + [dark] * bool(dark)))
    pixels = to_image(image, predictor.in_channels)
    agreement = Agreement()
    probability = predictor.predict(pixels, agreement)
    nuclei = predictor.nuclei(probability, args.min_area)
    mask = probability[..., :predictor.classes] >= predictor.threshold
    if "png" in args.formats:
        for k, ending in enumerate(class_endings(predictor.classes)):
            save_png(result.file(f"mask{ending}"), mask[..., k])
            if args.probability:
                save_png(result.file(f"probability{ending}"), np.round(probability[..., k] * 65535).astype(np.uint16))
        save_instances(result.file("instances", instances_suffix(nuclei)), nuclei)
        save_png(result.file("overlay"), overlay(image, nuclei))
    result.labels = lambda: [nuclei]
    sums = NucleusSums()
    sums.add(nuclei, probability[..., 0], image)
    measures = measure_nuclei(sums, result.labels, len(nuclei), nuclei.shape[1],
                              (lambda: [mask[..., 1]]) if predictor.has_cytoplasm else None)
    return Prediction(int(nuclei.max()), float(mask[..., 0].mean()), float(probability[..., 0].max()),
                      predictor.unlike_training(pixels, probability), agreement.trust(), measures)


def predict_streamed(predictor, rows, result, args: argparse.Namespace, between_bands: Callable[[], None]):
    """Predict one image, an `ImageRows` or `SlideRows`, from file to files; return a `nuclei.streaming.Prediction`."""
    from images.bands import tiff_bands
    from images.files import save_png
    from nuclei.outlines import overlay
    from nuclei.results import class_endings
    from nuclei.streaming import stream_prediction

    pictures = "png" in args.formats

    def places(kind: str, wanted: bool) -> list[Path]:
        return [result.file(f"{kind}{ending}", ".tif") for ending in class_endings(predictor.classes) * wanted]

    instances = result.file("instances", ".tif")
    result.labels = lambda: tiff_bands(instances)
    prediction, overview, labels = stream_prediction(
        predictor, rows, args.min_area, instances, places("mask", pictures),
        places("probability", pictures and args.probability), between_bands)
    if pictures:
        save_png(result.file("overlay"), overlay(overview, labels))
    return prediction


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


@command(interrupted="finished images are written; the same command with --continue goes on")
def main(argv: list[str] | None = None) -> int:
    return predict(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
