"""Which image belongs to which mask, and which images are copies of one another.

Image and mask share the stem, or the mask's has a suffix more. `flipped_*`, `mirrored_*` and `rotated_X_*` are copies
of the image whose name follows the prefix, `*_flipped` and so on of the one before it.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from images.listing import composed, has_suffix, list_folder, name_of

KINDS = ("images", "masks", "instances")  # folders of a split; the last may be missing
# What people call the folders of images and masks.
LIKELY_NAMES = (("images", "imgs", "image", "img", "pictures"),
                ("masks", "labels", "mask", "label", "gt", "ground_truth", "groundtruth", "annotations"))
COPY = r"(?:flipped|mirrored|rotated_-?\d+(?:\.\d+)?)"
COPY_MARK = re.compile(rf"^(?:{COPY}_)+(?=.)|(?<=.)(?:_{COPY})+\Z", re.DOTALL)  # a name may hold a line end
TREE = "DATA_ROOT/train|valid|test/images|masks/NAME.png (or jpg, jpeg, tif, tiff, bmp)"


@dataclass(frozen=True)
class Pair:
    """One image with its mask.

    Attributes:
        origin, group: the image that it was cut from and that one's patient, if a manifest tells them.
    """

    image: Path
    mask: Path
    origin: str = ""
    group: str = ""

    @property
    def name(self) -> str:
        return name_of(self.image)

    @property
    def source(self) -> str:
        """Name of the image that this one is, was cut from, or is a copy of."""
        return self.origin or source_name(self.name)

    @property
    def is_copy(self) -> bool:
        return source_name(self.name) != self.name


def source_name(name: str) -> str:
    """Return the name of the image that one of this name is, or is a copy of: flipped_7 and 7_flipped are 7."""
    return COPY_MARK.sub("", name)


def originals(pairs: Iterable[Pair]) -> list[Pair]:
    """Leave out the copies; of an image of which there are only copies, the first stands for it."""
    pairs = list(pairs)
    stay = originals_among([pair.name for pair in pairs], [pair.source for pair in pairs])
    return [pair for pair, stays in zip(pairs, stay, strict=True) if stays]


def originals_among(names: Sequence[str], sources: Sequence[str]) -> list[bool]:
    """Tell of each image whether it is an original, or the first copy of one that is not there.

    Args:
        sources: what each image is, was cut from, or is a copy of.
    """
    copies = [source_name(name) != name for name in names]
    there = {source for source, copy in zip(sources, copies, strict=True) if not copy}
    stay = []
    for source, copy in zip(sources, copies, strict=True):
        stay.append(not copy or source not in there)
        if copy:
            there.add(source)
    return stay


def what_is_there(data_root: Path) -> str:
    """Return what a folder without train, valid and test holds, and what to do about it."""
    listing = list_folder(data_root)
    names = {path.name.lower(): path.name for path in listing.folders}
    images, masks = (next((names[name] for name in known if name in names), None) for known in LIKELY_NAMES)
    if (images, masks) == KINDS[:2]:
        return (f"images and masks lie in it without train, valid and test. Deal them with python prepare_data.py "
                f"split {shlex.quote(str(data_root))}")
    if images and masks:
        return (f"its folders are {images} and {masks}; expected are images and masks. Rename them, then deal the "
                f"images with python prepare_data.py split {shlex.quote(str(data_root))}")
    if suffix := common_suffix(listing.files, listing.files):
        return (f"images and masks lie in it side by side, masks with {suffix} behind the name. Deal them with python "
                f"prepare_data.py split {shlex.quote(str(data_root))} --mask_suffix {shlex.quote(suffix)}, and pass "
                f"the same to each command")
    found = ", ".join([path.name for path in listing.folders][:5]) or "none"
    files = f", and {len(listing.files)} image files, e.g. {next(iter(listing.files.values())).name}" if \
        listing.files else ""
    return (f"no folder train, valid or test; its folders are: {found}{files}. Expected: {TREE}; or folders images and "
            f"masks, which python prepare_data.py split deals")


def pair_folder(folder: Path, problems: list[str], mask_suffix: str = "") -> list[Pair]:
    """Pair images and masks of one split by stem; what does not pair goes into `problems`.

    Args:
        mask_suffix: what the stem of a mask has behind that of its image. With it, both may lie in `images`, or in the
            folder of the split itself.
    """
    places = dict.fromkeys(KINDS[:2], folder) if mask_suffix and not (folder / KINDS[0]).is_dir() else \
        {kind: folder / kind for kind in KINDS[:2]}
    if mask_suffix and not places["masks"].is_dir():
        places["masks"] = places["images"]
    found = {kind: listed for kind, place in places.items() if (listed := _files_of(place, problems)) is not None}
    if len(found) < 2:
        return []
    images, masks = found["images"], found["masks"]
    if mask_suffix:
        end = composed(mask_suffix)
        if places["images"] == places["masks"]:
            images = {stem: path for stem, path in images.items() if not stem.endswith(end)}
            masks = {stem: path for stem, path in masks.items() if stem.endswith(end)}
        problems += [f"{path}: --mask_suffix {mask_suffix} says how names of masks end, and this one does not. Rename "
                     f"or remove it" for stem, path in masks.items() if not stem.endswith(end)]
        masks = {stem.removesuffix(end): path for stem, path in masks.items() if stem.endswith(end)}
    alone = {stem: path for stem, path in images.items() if stem not in masks}
    without = {stem: path for stem, path in masks.items() if stem not in images}
    suffix = "" if mask_suffix else common_suffix(alone, without)
    if suffix:
        name = next(stem for stem in alone if stem + suffix in without)
        problems.append(f"{places['masks']}: names of masks end in {suffix}, e.g. {without[name + suffix].name} for "
                        f"{alone[name].name}. Pass --mask_suffix {shlex.quote(suffix)}, or rename them")
    else:
        problems += [f"{path}: no mask of that name. Add {folder / 'masks' / (stem + mask_suffix)}.png or remove the "
                     f"image" for stem, path in alone.items()]
        problems += [f"{path}: no image of that name. Add {folder / 'images' / stem}.png or remove the mask"
                     for stem, path in without.items()]
    return [Pair(images[stem], masks[stem]) for stem in images if stem in masks]


def common_suffix(images: Iterable[str], masks: Iterable[str]) -> str:
    """Return what most of these masks have behind the names of these images, '' if it is nothing.

    >>> common_suffix(["a", "b"], ["a_mask", "b_mask"])
    '_mask'
    """
    names, masks = set(images), list(masks)
    ends = Counter(mask[i:] for mask in masks for i in range(1, len(mask)) if mask[:i] in names)
    suffix, count = ends.most_common(1)[0] if ends else ("", 0)
    return suffix if 2 * count >= len(masks) and re.search(r"[^\W\d_]", suffix) else ""


def _files_of(folder: Path, problems: list[str]) -> dict[str, Path] | None:
    """Return the images of a folder by stem; None, and a problem, for one that cannot be listed."""
    if not folder.is_dir():
        problems.append(f"{folder}: no such folder. Expected: {TREE}")
        return None
    try:
        listing = list_folder(folder)
    except OSError as error:
        problems.append(f"{folder}: cannot be listed ({error.strerror}). Check its permissions")
        return None
    problems += [f"{path}: its name is that of an image, but it is a {'folder' if path.is_dir() else 'pipe or device'}"
                 f". Move it elsewhere" for path in (*listing.folders, *listing.others) if has_suffix(path)]
    problems += [f"{path}: same name as {first.name}; a stem may occur once in a folder. Remove or rename one"
                 for path, first in listing.twins]
    return listing.files
