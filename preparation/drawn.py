"""Turn images and what was drawn on them in QuPath, Fiji, napari or CVAT into a data set, instances kept.

geojson and label-tiff: one file an image, with the image's stem (NAME.geojson or NAME.png.geojson; NAME.tif,
NAME_cp_masks.png, NAME_labels.tif). coco: one JSON for all. Groups (patients, slides) are found in the names by
--group_regex and go into one split each: 70 % of the images train, 15 % valid, 15 % test.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from images.dealing import deal_groups, few_groups
from images.files import TURNED, ImageFileError, image_size, load_and_tell
from images.listing import IMAGE_SUFFIXES, composed, has_suffix, name_of, place
from images.masks import load_drawn
from images.pairs import originals_among, source_name
from images.splits import SHARES, SPLITS, DatasetError, group_names, grouped
from preparation.annotation_files import read_coco, read_geojson
from preparation.annotations import Annotation, check_classes, rasterise
from preparation.data_sets import PreparedData, Source, images_by_stem, new_folder
from system.errors import UserError
from system.processes import progress

LABEL_ENDS = ("_instances", "_cp_masks", "_labels", "_label", "_masks", "_mask", "_nuclei")  # what programs add
OF_PREDICTION = re.compile(r"settings(_\d+_of_\d+)?\.json")  # lies beside the outlines that predict_papsmear.py writes
BESIDE_INSTANCES = re.compile(r"(.+)_(?:mask|probability|overlay)(?:_\d+)?", re.DOTALL)  # of predictions
MANY_CLASSES = 9  # numbers in an image, from which on they are hardly those of classes
SAME = 0.9  # of the label images: so many with the same few numbers look like classes
FRAME_SHARE = 0.5  # of an image; a nucleus that covers more is more likely a frame

Drawn = tuple[np.ndarray, list[str]]  # instance map (H, W) int32 with labels 1..n, and notes


def find_drawn(kind: str, images: dict[str, Path], annotations: Path,
               classes: Collection[str] = (), seen: list | None = None) -> dict[str, Callable[[], Drawn]]:
    """Return, for each image stem that something belongs to, how to read its instance map.

    Outlines are read at once, so that faults are found before anything is written; label images when they are needed.

    Args:
        seen: see `read_label_image`.
    Raises:
        DatasetError: with every file that cannot serve.
    """
    if not annotations.exists():
        raise UserError(f"{annotations}: no such file or folder. Check --annotations")
    if kind == "coco":
        found = read_coco(_only_json(annotations), classes)
        check_classes(classes, found.values(), annotations)
        return {stem: _drawer(images.get(stem), annotation) for stem, annotation in found.items()}
    drawn, problems, read = {}, [], []
    suffixes = (".geojson", ".json") if kind == "geojson" else IMAGE_SUFFIXES
    files = sorted(annotations.iterdir()) if annotations.is_dir() else [annotations]
    files = [p for p in files if has_suffix(p, suffixes)
             and not (OF_PREDICTION.fullmatch(p.name) and p.stem not in images)]
    image_files = {place(image) for image in images.values()}  # both may lie in one folder
    predicted = {p.stem.removesuffix("_instances") for p in files if p.stem.endswith("_instances")}
    for path in files:
        stem, beside = _stem_of_image(path, images), BESIDE_INSTANCES.fullmatch(path.stem)
        if place(path) in image_files or beside and beside[1] in predicted:
            continue
        if stem in drawn:
            problems.append(f"{path}: a second file for {stem}. Keep one")
            continue
        try:
            if kind == "geojson":
                read.append(read_geojson(path, classes))
                drawn[stem] = _drawer(images.get(stem), read[-1])
            else:
                drawn[stem] = partial(read_label_image, path, images.get(stem), seen)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise DatasetError(annotations, problems)
    check_classes(classes, read, annotations)
    return drawn


def _drawer(image: Path | None, annotation: Annotation) -> Callable[[], Drawn]:
    def draw() -> Drawn:
        shape = image_size(image)
        if annotation.size and tuple(annotation.size) != shape:
            raise ImageFileError(f"{image}: {shape[0]}x{shape[1]} pixels, but it was annotated at {annotation.size[0]}x"
                                 f"{annotation.size[1]}; both must agree. Use the images that were annotated")
        labels, left_out = rasterise(annotation.regions, shape)
        return labels, annotation.notes + left_out
    return draw


def _only_json(path: Path) -> Path:
    """Return the JSON file itself, or the only one in a folder or in its folder 'annotations'."""
    if path.is_file():
        return path
    found = []
    for folder in (path, path / "annotations"):
        if folder.is_dir() and not found:
            found = [p for p in sorted(folder.iterdir()) if has_suffix(p, (".json",))]
    if len(found) != 1:
        raise UserError(f"{path}: {len(found)} JSON files found; COCO is one file for all images. Pass it as "
                         f"--annotations")
    return found[0]


def _stem_of_image(path: Path, images: dict[str, Path]) -> str:
    """Return the stem of the image that an annotation file belongs to, or its own if there is none."""
    by_name, name = {composed(image.name): stem for stem, image in images.items()}, name_of(path)
    if name in images or name in by_name:
        return by_name.get(name, name)
    ends = [end for end in LABEL_ENDS if name.endswith(end)]
    return name.removesuffix(ends[0]) if ends else name


def read_label_image(path: Path, image: Path, seen: list | None = None) -> Drawn:
    """Read an instance map and number its nuclei 1..n; a mask is separated where its pieces do not touch.

    Args:
        seen: gets the numbers of an instance map as a tuple, the first MANY_CLASSES of them.
    """
    labels, is_mask, odd = load_drawn(path)
    shape = image_size(image)
    if labels.shape != shape:
        raise ImageFileError(f"{path}: {labels.shape[0]}x{labels.shape[1]} pixels, but {image} has {shape[0]}x"
                             f"{shape[1]}; both must have one size. Export the labels at the image's size")
    numbers = np.unique(labels[labels > 0])
    if seen is not None and not is_mask:
        seen.append(tuple(numbers[:MANY_CLASSES].tolist()))
    if is_mask or len(numbers) == 1:
        pieces, count = ndimage.label(labels, np.ones((3, 3)))
        return pieces.astype(np.int32), ["a mask, not labels: each connected piece is taken as one nucleus, also where "
                                         "several touch"] * (count > (not is_mask))
    return np.searchsorted(numbers, labels, side="right").astype(np.int32), [odd] * bool(odd)


def _same_numbers(seen: list[tuple[int, ...]]) -> list[str]:
    """Return in words that nearly all label images hold the same few numbers, of which there are several."""
    (numbers, count), = Counter(seen).most_common(1) or [((), 0)]
    if 1 < len(numbers) < MANY_CLASSES and count >= max(3, SAME * len(seen)):
        return [f"{count} of {len(seen)} label images hold the same numbers {', '.join(map(str, numbers))}. Are these "
                f"classes? An instance map has a number for each nucleus; write 255 for the nuclei and 0 for all else"]
    return []


def import_drawn(kind: str, image_dir: Path, annotations: Path, out: Path, group_regex: str | None = None,
                 sizing: str = "tile", overlap: int = 0, microns_per_pixel: float | None = None, seed: int = 0,
                 classes: Collection[str] = (), shares: Sequence[float] = SHARES, max_value: int = 0) -> str:
    """Write the data set and return the report; raises UserError for what cannot be used.

    Args:
        shares: of the images, for train, valid and test.
        max_value: what is white in images of more than 8 bit; 0 for the largest number of their type.
    """
    with new_folder(out, *(path for path in (image_dir, annotations) if path.is_dir())) as root:
        data = PreparedData(root, f"drawn annotations ({kind})", sizing)
        images = _images_alone(images_by_stem(image_dir), image_dir, annotations)
        drawn = find_drawn(kind, images, annotations, classes, seen := [])
        missing = [stem for stem in images if stem not in drawn]
        data.notes += [f"{images[stem].name}: left out, as {annotations} holds nothing of the name {stem}"
                       for stem in missing]
        data.notes += [f"{len(missing)} of {len(images)} images were left out so"] * (len(missing) > 1)
        data.notes += [f"{stem}: something is drawn for it, but the image is missing" for stem in drawn
                       if stem not in images]
        names = [stem for stem in images if stem in drawn]
        if not names:
            raise UserError(f"{annotations}: none of its names ({', '.join(sorted(drawn)[:3]) or 'nothing found'}) is "
                             f"that of an image in {image_dir} ({', '.join(list(images)[:3])}). Stems must be the same")
        assigned = assign(names, group_regex, seed, shares)
        data.notes += few_groups({split: len({group for group, part in assigned.values() if part == split})
                                  for split in SPLITS})
        problems = []
        for name, (group, split) in progress(assigned.items(), "images", unit="image", leave=True):
            source = Source(name, images[name].name, group, split)
            if not split:
                data.note(source.origin, "left out, as it is a copy of an image that is not trained on")
                continue
            try:
                convert(data, source, images[name], *drawn[name](), overlap, max_value)
            except ImageFileError as error:
                problems.append(str(error))
        if problems:
            raise DatasetError(image_dir, problems)
        data.notes += _same_numbers(seen)
        if not any(count.nuclei for count in data.counts.values()):
            raise UserError(f"{annotations}: no nucleus in it for any of {len(names)} images, so there is nothing to "
                            f"learn. Was the right layer exported, with outlines?"
                            + "".join(f"\n- {note}" for note in grouped(data.notes)[:5]))
        return data.finish(microns_per_pixel, max_value=max_value)


def assign(names: list[str], group_regex: str | None, seed: int,
           shares: Sequence[float] = SHARES) -> dict[str, tuple[str, str]]:
    """Return group and split of every image; '' for a copy (flipped_* ...) of an image that is not trained on.

    Where there are only copies of an image, the first stands for it.
    """
    group_of = group_names(sorted({source_name(name) for name in names}), group_regex)
    stay = dict(zip(names, originals_among(names, list(map(source_name, names))), strict=True))
    dealt = deal_groups(Counter(group_of[source_name(name)] for name in names if stay[name]), shares, seed)
    found = {}
    for name in names:
        group = group_of[source_name(name)]
        split = SPLITS[dealt[group]]
        found[name] = group, split if split == "train" or stay[name] else ""
    return found


def convert(data: PreparedData, source: Source, path: Path, labels: np.ndarray, notes: list[str],
            overlap: int, max_value: int) -> None:
    """Write one image with its instance map, and remember what is odd about it."""
    data.note(source.origin, *notes)
    areas = np.bincount(labels.reshape(-1))[1:]
    if not len(areas):
        data.note(source.origin, "no nucleus is drawn on it; it is kept, with an empty mask")
    elif areas.max() > FRAME_SHARE * labels.size:
        data.note(source.origin, "one region covers more than half of the image. Is it a frame around the nuclei, "
                                 "which hides all that come after it, or is the mask inverted?")
    image, turned, dark = load_and_tell(path, 3, max_value=max_value)
    if dark:
        data.note(source.origin, f"an image {dark}")
    if turned:
        data.note(source.origin, f"{TURNED}; what was drawn on the picture as it is stored does not fit. Look at the "
                                 f"contact sheet")
    data.add(source, image, labels, overlap)


def _images_alone(images: dict[str, Path], folder: Path, annotations: Path) -> dict[str, Path]:
    """Leave out label images that lie in the folder of the images, such as a_cp_masks.png beside a.png."""
    if not annotations.is_dir() or annotations.resolve() != folder.resolve():
        return images
    return {stem: path for stem, path in images.items()
            if not any(stem.endswith(end) and stem.removesuffix(end) in images for end in LABEL_ENDS)}
