"""Turn the MoNuSeg download into a data set of 256x256 tiles in colour, with masks and instance maps.

Either folder may be in the layout of the training data ("Tissue Images" and "Annotations") or in that of the test data
(image and XML side by side). Valid is split off the training images by patient. The data: Kumar et al., IEEE TMI 2017
and 2020.
"""

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np

from images.dealing import deal_groups, few_groups
from images.files import ImageFileError, load_image
from images.listing import has_suffix
from images.splits import SPLITS, DatasetError
from preparation.annotation_files import read_imagescope
from preparation.annotations import Annotation, check_classes, rasterise
from preparation.data_sets import PreparedData, Source, images_by_stem, new_folder
from system.errors import UserError
from system.processes import progress

PATIENT = r"^TCGA-\w+-\w+"  # the first three parts of a TCGA name
LAYOUTS = "'Tissue Images' with 'Annotations', or images and their XML files side by side"


def patient_of(name: str) -> str:
    """Return the first three parts of a TCGA name, which tell the patient: TCGA-A7-A13E-01Z-00-DX1 -> TCGA-A7-A13E."""
    return "-".join(name.split("-")[:3])


def patient_regex(*folders: Path) -> str | None:
    """Return the expression that finds the patient in a name, where every image of these downloads has a TCGA name."""
    names = [stem for folder in folders for stem in images_by_stem(find_folders(folder)[0])]
    return PATIENT if all(re.match(PATIENT, name) for name in names) else None


def find_folders(folder: Path) -> tuple[Path, Path]:
    """Return the folders of images and of XML files; `folder` may hold the download one level deeper."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Expected: {LAYOUTS}")
    below = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    found = [_layout(folder)] if _layout(folder) else [pair for place in below if (pair := _layout(place))]
    if len(found) != 1:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        several = ", several of them data sets" if found else ""
        raise UserError(f"{folder}: {names} found{several}; expected: {LAYOUTS}. Check the path")
    return found[0]


def _layout(folder: Path) -> tuple[Path, Path] | None:
    children = {p.name.lower(): p for p in folder.iterdir() if p.is_dir()}
    if {"tissue images", "annotations"} <= set(children):
        return children["tissue images"], children["annotations"]
    return (folder, folder) if any(has_suffix(p, (".xml",)) for p in folder.iterdir()) else None


def read_folder(folder: Path, notes: list[str], classes: Collection[str] = ()) -> list[tuple[Path, Annotation]]:
    """Pair the images of a download with what is drawn on them, sorted by name.

    Args:
        notes: takes a sentence for each image without XML and each XML without image; both are left out.
        classes: names of the layers that are nuclei; without any, all but those whose name says otherwise.
    Raises:
        DatasetError: with every XML that is refused.
    """
    image_folder, xml_folder = find_folders(folder)
    images = images_by_stem(image_folder)
    drawn = {p.stem: p for p in sorted(xml_folder.iterdir()) if has_suffix(p, (".xml",))}
    notes += [f"{images[stem].relative_to(folder)}: left out, as {stem}.xml is missing"
              for stem in images if stem not in drawn]
    notes += [f"{drawn[stem].relative_to(folder)}: left out, as its image is missing"
              for stem in drawn if stem not in images]
    pairs, problems = [], []
    for stem in images:
        if stem in drawn:
            try:
                pairs.append((images[stem], read_imagescope(drawn[stem], classes)))
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise DatasetError(folder, problems)
    if not pairs:
        raise UserError(f"{folder}: none of {len(images)} images has an XML file of its name. Expected: {LAYOUTS}")
    return pairs


def assign(train: list[str], test: list[str], valid_share: float, seed: int) -> dict[str, str]:
    """Return the split of every image name; valid is dealt from the training patients."""
    both = sorted(set(train) & set(test))
    if both:
        raise UserError(f"{len(both)} image(s) are in --train_dir and in --test_dir, e.g. {both[0]}; a test image "
                         f"must not be trained on. Remove them from one of the folders")
    dealt = deal_groups(Counter(map(patient_of, train)), (1 - valid_share, valid_share), seed)
    return {name: ("train", "valid")[dealt[patient_of(name)]] for name in train} | dict.fromkeys(test, "test")


def prepare(train_dir: Path, test_dir: Path, out: Path, overlap: int = 0, valid_share: float = 0.2,
            seed: int = 0, classes: Collection[str] = ()) -> str:
    """Write the data set and return the report; raises UserError for what cannot be used."""
    with new_folder(out, train_dir, test_dir) as root:
        data = PreparedData(root, "MoNuSeg 2018", "tile")
        folders = {"train": train_dir, "test": test_dir}
        pairs, problems = {}, []
        for part, folder in folders.items():
            try:
                pairs[part] = read_folder(folder, data.notes, classes)
            except DatasetError as error:
                problems += error.problems
        if problems:
            raise DatasetError(f"{train_dir}, {test_dir}", problems)
        check_classes(classes, [annotation for found in pairs.values() for _, annotation in found], train_dir)
        names = {part: [image.stem for image, _ in found] for part, found in pairs.items()}
        split_of = assign(names["train"], names["test"], valid_share, seed)
        shared = {patient_of(n) for n in names["train"]} & {patient_of(n) for n in names["test"]}
        for patient in sorted(shared):
            data.note(patient, "this patient is in training and in test data, so test scores are too good for it")
        data.notes += few_groups({split: len({patient_of(n) for n in split_of if split_of[n] == split})
                                  for split in SPLITS})
        everything = [(*pair, folders[part]) for part, found in pairs.items() for pair in found]
        for image, annotation, folder in progress(everything, "MoNuSeg", unit="image", leave=True):
            source = Source(image.stem, image.relative_to(folder).as_posix(), patient_of(image.stem),
                            split_of[image.stem])
            try:
                convert(data, source, image, annotation, overlap)
            except ImageFileError as error:
                problems.append(str(error))
        if problems:
            raise DatasetError(f"{train_dir}, {test_dir}", problems)
        sizes = [a.microns_per_pixel for found in pairs.values() for _, a in found if a.microns_per_pixel]
        return data.finish(float(np.median(sizes)) if sizes else None, extra=describe_sizes(sizes, len(split_of)))


def convert(data: PreparedData, source: Source, path: Path, annotation: Annotation, overlap: int) -> None:
    """Rasterise what is drawn on one image and write it."""
    image = load_image(path, 3)
    labels, left_out = rasterise(annotation.regions, image.shape[:2])
    data.note(source.origin, *annotation.notes, *left_out)
    if not labels.any():
        data.note(source.origin, "no nucleus is drawn on it; it is kept, with an empty mask")
    data.add(source, image, labels, overlap)


def describe_sizes(sizes: list[float], images: int) -> str:
    """Say what the XML files tell about the size of a pixel in micrometres."""
    if not sizes:
        return "No XML file gives MicronsPerPixel."
    return (f"MicronsPerPixel is given for {len(sizes)} of {images} images: {min(sizes):g} to {max(sizes):g}, median "
            f"{np.median(sizes):g}.")
