"""Which files make up train, valid and test, and which of them show the same cell.

A data root holds `train|valid|test` / `images|masks`; image and mask share the stem. `flipped_*`, `mirrored_*` and
`rotated_X_*` are copies of the image whose name follows the prefix. A `splits.csv` in the root (columns `path`,
relative to the root, and `split`) overrides the folders; images that it does not list are left out.
"""

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from images.files import IMAGE_SUFFIXES, has_suffix
from images.recipe import SIZINGS
from system.errors import UserError

SPLITS = ("train", "valid", "test")
SPLITS_FILE = "splits.csv"
SHARES = (0.70, 0.15, 0.15)
COPY_PREFIX = re.compile(r"^(?:flipped_|mirrored_|rotated_-?\d+(?:\.\d+)?_)+")
BUNDLED_SAMPLE = Path(__file__).resolve().parents[1] / "data"
TREE = "DATA_ROOT/train|valid|test/images|masks/NAME.png (or jpg, jpeg, tif, tiff, bmp)"


class DatasetError(UserError):
    """A data set that cannot be trained on; the message lists every problem."""

    def __init__(self, data_root: Path, problems: list[str]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        shown = "".join(f"\n  - {problem}" for problem in problems[:50])
        more = f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else ""
        super().__init__(f"{data_root}: {count} found in the data set:{shown}{more}")


@dataclass(frozen=True)
class Pair:
    """One image with its mask."""

    image: Path
    mask: Path

    @property
    def name(self) -> str:
        return self.image.stem

    @property
    def source(self) -> str:
        """Name of the image that this one is, or is a copy of."""
        return COPY_PREFIX.sub("", self.name)

    @property
    def is_copy(self) -> bool:
        return self.source != self.name


def find_data_root(data_root: Path | str) -> Path:
    """Return the folder to read: as given, or for the name 'data', where there is none, the project's bundled sample.

    What writes into a data set takes the path as given instead.
    """
    path = Path(data_root)
    return BUNDLED_SAMPLE if path == Path("data") and not os.path.lexists(path) else path


def list_splits(data_root: Path, use_augmented: bool = True, wanted: Iterable[str] = SPLITS) -> dict[str, list[Pair]]:
    """Return the pairs of the wanted splits, sorted by name, from the folders or from `splits.csv`.

    Args:
        use_augmented: False leaves out the copies with a prefix.
    Raises:
        DatasetError: with every missing folder, unpaired file and name that occurs twice.
    """
    splits, problems = find_splits(data_root, use_augmented, wanted)
    if problems:
        raise DatasetError(find_data_root(data_root), problems)
    return splits


def find_splits(data_root: Path, use_augmented: bool = True,
                wanted: Iterable[str] = SPLITS) -> tuple[dict[str, list[Pair]], list[str]]:
    """Return what `list_splits` does and the problems, so that files that do pair can be read all the same."""
    data_root = find_data_root(data_root)
    table = data_root / SPLITS_FILE
    listed = table.is_file()
    folders, problems = _read_folders(data_root, SPLITS if listed else wanted, all_needed=not listed)
    splits = _apply_splits_file(table, folders, problems) if table.is_file() else folders
    splits = {split: sorted(splits[split], key=lambda pair: pair.name) for split in wanted}
    for split, pairs in splits.items():
        if not use_augmented and pairs:
            splits[split] = [pair for pair in pairs if not pair.is_copy]
            if not splits[split]:
                problems.append(f"{split}: all {len(pairs)} images are augmented copies (flipped_*, mirrored_*, "
                                f"rotated_X_*). Pass --use_augmented true, or add originals")
        elif not pairs and not problems:
            problems.append(f"{split}: no image. " + (f"Check {table}" if table.is_file() else f"Expected: {TREE}"))
    return splits, problems


def sizing_of(data_root: Path) -> str:
    """Return how images of this data set become 256x256: 'tile', they are, or 'resize', unless dataset.json says.

    Raises DatasetError for a dataset.json that says something else.
    """
    path = find_data_root(data_root) / "dataset.json"
    if not path.is_file():
        return "resize"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        found = description["sizing"] if isinstance(description, dict) else description
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(data_root, [f"{path}: cannot be read ({error!r}). Prepare the data set again, or remove the "
                                       f"file to have every image resized to 256x256"]) from None
    if found not in SIZINGS:
        raise DatasetError(data_root, [f"{path}: sizing is {found!r}; it must be one of {', '.join(SIZINGS)}"])
    return found


def group_names(names: Iterable[str], group_regex: str | None) -> dict[str, str]:
    """Return the group of every name: itself, or what `group_regex` finds in it (its group 1 if it has one).

    Raises UserError when the expression is invalid or finds nothing in some name.
    """
    if not group_regex:
        return {name: name for name in names}
    try:
        pattern = re.compile(group_regex)
    except re.error as error:
        raise UserError(f"--group_regex {group_regex!r} is no regular expression ({error})") from None
    found = {name: pattern.search(name) for name in names}
    missed = [name for name, match in found.items() if not match or match.group(pattern.groups and 1) is None]
    if missed:
        raise UserError(f"--group_regex {group_regex!r} finds nothing in {len(missed)} names, e.g. {missed[0]!r}; it "
                         f"must match every source name. Widen it, e.g. '^\\d+' for leading digits, '^[^_]+' for all "
                         f"before the first underscore")
    return {name: match.group(pattern.groups and 1) for name, match in found.items()}


def groups_of(pairs: list[Pair], group_regex: str | None) -> dict[str, list[Pair]]:
    """Collect pairs by the group of their source image (see `group_names`)."""
    group_of = group_names((pair.source for pair in pairs), group_regex)
    groups = defaultdict(list)
    for pair in pairs:
        groups[group_of[pair.source]].append(pair)
    return dict(groups)


def leaked(splits: dict[str, list[Pair]], split: str, group_regex: str | None = None) -> tuple[int, int]:
    """Count the groups of `split` of which any image, original or copy, is in train: (in train, all)."""
    train = groups_of(splits["train"], group_regex)
    groups = groups_of(splits[split], group_regex)
    return sum(key in train for key in groups), len(groups)


def deal_groups(contents: Mapping[str, int | Sequence[int]], shares: Sequence[float], seed: int) -> dict[str, int]:
    """Deal groups into parts so that shares are met in images, of each class, as well as whole groups permit.

    Larger groups go first, equal ones in random order, each to the part where it lowers the squared distance from the
    expected counts, relative to them, most. No part stays empty.

    Args:
        contents: how many images a group holds, or how many of each class; at least one in all.
        shares: of the parts, with sum 1.
    Returns:
        The number of the part of every group.
    Raises:
        UserError: for fewer groups than parts.
    """
    if len(contents) < len(shares):
        raise UserError(f"{len(contents)} group(s) (patients, fields of view) found; {len(shares)} parts need at "
                         f"least one each. Add images, or group otherwise")
    keys = sorted(contents)
    np.random.default_rng(seed).shuffle(keys)
    keys.sort(key=lambda key: -np.sum(contents[key]))
    counts = np.array([contents[key] for key in keys], float).reshape(len(keys), -1)
    expected = np.outer(shares, counts.sum(axis=0))
    held, used = np.zeros_like(expected), np.zeros(len(shares), bool)
    dealt = {}
    for i, key in enumerate(keys):
        change = ((held + counts[i] - expected) ** 2 - (held - expected) ** 2) / np.maximum(expected, 1e-9)
        cost = change.sum(axis=1)
        if len(keys) - i <= (~used).sum():
            cost[used] = np.inf
        part = int(cost.argmin())
        held[part] += counts[i]
        used[part] = True
        dealt[key] = part
    return dealt


def split_by_group(data_root: Path, group_regex: str | None = None, seed: int = 0) -> dict[str, list[Pair]]:
    """Deal all originals into 70 % train, 15 % valid and 15 % test with `deal_groups`: no group is in two of them.

    Copies go to train only, and only those of train's own groups and of groups without an original. An image that lies
    in two folders is taken once.
    """
    folders, problems = _read_folders(Path(data_root), SPLITS, all_needed=False)
    by_name: dict[str, Pair] = {}
    for pair in (pair for pairs in folders.values() for pair in pairs):
        first = by_name.setdefault(pair.name, pair)
        if first is not pair and first.image.read_bytes() != pair.image.read_bytes():
            problems.append(f"{pair.image}: another picture than {first.image}, of the same name; names must be unique "
                            f"across train, valid and test. Rename one with its mask")
    if problems:
        raise DatasetError(data_root, problems)
    groups = groups_of(list(by_name.values()), group_regex)
    originals = {key: sum(not pair.is_copy for pair in pairs) for key, pairs in groups.items()}
    part_of = deal_groups({key: count for key, count in originals.items() if count}, SHARES, seed)
    dealt: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for key, pairs in groups.items():
        split = SPLITS[part_of.get(key, 0)]  # copies without their original serve in train alone
        dealt[split] += [pair for pair in pairs if split == "train" or not pair.is_copy]
    return dealt


def write_splits(data_root: Path, group_regex: str | None = None, seed: int = 0) -> Path:
    """Write `splits.csv` from `split_by_group`; an existing one is never overwritten."""
    data_root = Path(data_root)
    path = data_root / SPLITS_FILE
    if path.exists():
        raise UserError(f"{path}: exists already. Move or delete it first; it is never overwritten")
    dealt = split_by_group(data_root, group_regex, seed)
    rows = [(pair.image.relative_to(data_root).as_posix(), split) for split in SPLITS for pair in dealt[split]]
    try:
        with open(path, "x", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "split"), *sorted(rows)])
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}). Copy the data set to a folder of "
                         f"yours") from None
    return path


def _read_folders(data_root: Path, wanted: Iterable[str],
                  all_needed: bool = True) -> tuple[dict[str, list[Pair]], list[str]]:
    """Return the pairs of these folders, whatever `splits.csv` says, and the problems.

    Args:
        all_needed: False takes a missing folder for an empty one, unless all of them are missing.
    """
    if not data_root.is_dir():
        found = "a file, not a folder" if data_root.exists() else "no such folder"
        raise DatasetError(data_root, [f"{found}. Name a folder laid out as {TREE}"])
    problems: list[str] = []
    wanted = list(wanted)
    there = [split for split in wanted if (data_root / split).is_dir()]
    read = wanted if all_needed or not there else there
    return {split: _pair_folder(data_root / split, problems) if split in read else [] for split in wanted}, problems


def other_files(data_root: Path) -> list[Path]:
    """Return the files in the images and masks folders that are of no type that is read."""
    folders = [data_root / split / kind for split in SPLITS for kind in ("images", "masks")]
    return [path for folder in folders for path in sorted(folder.glob("*"))
            if path.suffix.lower() not in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()]


def _pair_folder(folder: Path, problems: list[str]) -> list[Pair]:
    """Pair images and masks of one split by stem; what does not pair goes into `problems`."""
    found = {}
    for kind in ("images", "masks"):
        if not (folder / kind).is_dir():
            problems.append(f"{folder / kind}: no such folder. Expected: {TREE}")
            continue
        by_stem = found[kind] = {}
        try:
            paths = sorted((folder / kind).iterdir())
        except OSError as error:
            problems.append(f"{folder / kind}: cannot be listed ({error.strerror}). Check its permissions")
            continue
        for path in paths:
            if not has_suffix(path):
                continue
            if path.stem in by_stem:
                problems.append(f"{path}: same name as {by_stem[path.stem].name}; a stem may occur once in a folder. "
                                f"Remove or rename one")
            by_stem[path.stem] = path
    if len(found) < 2:
        return []
    images, masks = found["images"], found["masks"]
    problems += [f"{images[stem]}: no mask of that name. Add {folder / 'masks' / stem}.png or remove the image"
                 for stem in images if stem not in masks]
    problems += [f"{masks[stem]}: no image of that name. Add {folder / 'images' / stem}.png or remove the mask"
                 for stem in masks if stem not in images]
    return [Pair(images[stem], masks[stem]) for stem in images if stem in masks]


def _apply_splits_file(table: Path, folders: dict[str, list[Pair]], problems: list[str]) -> dict[str, list[Pair]]:
    """Deal the pairs of all folders as the table says; every wrong line goes into `problems`."""
    by_path = {pair.image.relative_to(table.parent).as_posix(): pair for pairs in folders.values() for pair in pairs}
    splits: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    remedy = "Write it with python prepare_data.py split DATA_ROOT, or save it as CSV UTF-8 with commas"
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark in front
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        problems.append(f"{table}: cannot be read ({error}). {remedy}")
        return splits
    columns = list(rows[0]) if rows else []
    if not {"path", "split"} <= set(columns):
        problems.append(f"{table}: columns {columns} found; 'path' and 'split' are needed. {remedy}")
        return splits
    seen = set()
    for number, row in enumerate(rows, start=2):
        path, split, line = (row["path"] or "").replace("\\", "/"), row["split"], f"{table}, line {number}"
        if split not in SPLITS:
            problems.append(f"{line}: split is {split!r}; it must be one of {', '.join(SPLITS)}")
        elif path not in by_path:
            problems.append(f"{line}: {path} is no image with a mask in this data set. Correct or remove the line")
        elif by_path[path].name in seen:
            problems.append(f"{line}: a second image named {by_path[path].name}; names must be unique. Rename one")
        else:
            seen.add(by_path[path].name)
            splits[split].append(by_path[path])
    return splits
