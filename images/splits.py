"""Which files make up train, valid and test, and which of them show the same cell.

A data root holds `train|valid|test` / `images|masks` (see images/pairs.py). A `splits.csv` in the root (columns `path`,
relative to the root, and `split`) overrides the folders; images that it does not list are left out. A `manifest.csv`
tells from which image and patient each file was cut.
"""

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from images.listing import composed, left_out, list_folder, name_of
from images.pairs import KINDS, TREE, Pair, originals, pair_folder, source_name, what_is_there
from images.recipe import (
    MAX_VALUE_RULE,
    NAMES_RULE,
    PIXEL_SIZE_RULE,
    SIZINGS,
    are_class_names,
    is_max_value,
    is_pixel_size,
)
from system.errors import UserError
from system.text import compiled, shown, unguarded

SPLITS = ("train", "valid", "test")
SHARES = (0.70, 0.15, 0.15)  # of the images, for each of them
SPLITS_FILE = "splits.csv"
MANIFEST = "manifest.csv"  # of a prepared data set: from which image and patient every file comes
BUNDLED_SAMPLE = Path(__file__).resolve().parents[1] / "data"


class DatasetError(UserError):
    """A data set that cannot be trained on; the message lists every problem."""

    def __init__(self, data_root: Path, problems: list[str]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = grouped(problems)
        shown = "".join(f"\n  - {line}" for line in lines[:50])
        more = f"\n  ... and {len(lines) - 50} more" if len(lines) > 50 else ""
        super().__init__(f"{data_root}: {count} found in the data set:{shown}{more}")


def grouped(problems: list[str], alike: int = 4) -> list[str]:
    """Make one line of problems that say the same of several files: 'PATH: sentence', in which NAME may occur."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        path, colon, sentence = problem.partition(": ")
        name = re.escape(Path(path).stem)
        kinds.setdefault(colon + re.sub(rf"(?<!\w){name}(?!\w)", "NAME", sentence), []).append(problem)
    lines = []
    for kind, same in kinds.items():
        if len(same) < alike or not kind.startswith(": "):
            lines += same
        else:
            lines.append(f"{len(same)} files, e.g. {', '.join(p.partition(': ')[0] for p in same[:3])}{kind}")
    return lines


def find_data_root(data_root: Path | str) -> Path:
    """Return the folder to read: as given, or for the name 'data', where there is none, the project's bundled sample.

    What writes into a data set takes the path as given instead.
    """
    path = Path(data_root)
    return BUNDLED_SAMPLE if path == Path("data") and not os.path.lexists(path) else path


def list_splits(data_root: Path, use_augmented: bool = True, wanted: Iterable[str] = SPLITS,
                mask_suffix: str = "") -> dict[str, list[Pair]]:
    """Return the pairs of the wanted splits, sorted by name, from the folders or from `splits.csv`.

    Args:
        use_augmented: False leaves out the copies with a prefix.
        mask_suffix: what the names of masks have behind those of their images; they may lie in one folder then.
    Raises:
        DatasetError: with every missing folder, unpaired file and name that occurs twice.
    """
    splits, problems = find_splits(data_root, use_augmented, wanted, mask_suffix)
    if problems:
        raise DatasetError(find_data_root(data_root), problems)
    return splits


def find_splits(data_root: Path, use_augmented: bool = True, wanted: Iterable[str] = SPLITS,
                mask_suffix: str = "") -> tuple[dict[str, list[Pair]], list[str]]:
    """Return what `list_splits` does and the problems, so that files that do pair can be read all the same."""
    data_root = find_data_root(data_root)
    table = data_root / SPLITS_FILE
    listed = table.is_file()
    folders, problems = read_folders(data_root, SPLITS if listed else wanted, not listed, mask_suffix)
    splits = _apply_splits_file(table, folders, problems) if listed else folders
    if table.exists() and not listed:
        problems.append(f"{table}: a folder of that name; {SPLITS_FILE} is a table that says which images belong to "
                        f"train, valid and test. Rename the folder")
    splits = {split: sorted(splits[split], key=lambda pair: pair.name) for split in wanted}
    for split, pairs in splits.items():
        if not use_augmented:
            splits[split] = originals(pairs)
        if not pairs and not problems:
            problems.append(f"{split}: no image. " + (f"Check {table}" if listed else f"Expected: {TREE}"))
    return splits, problems


class Description(NamedTuple):
    """What dataset.json says: how images become 256x256, micrometres of a pixel (0: unknown), names of the classes.

    `max_value` is what was white in the images of more than 8 bit that these were made from (see images/recipe.py).
    """

    sizing: str = "resize"
    microns_per_pixel: float = 0.0
    class_names: tuple[str, ...] = ()
    max_value: int = 0


def description_of(data_root: Path) -> Description:
    """Return what dataset.json says of a data set.

    Sizing is 'resize' or, for images that are so already, 'tile'; without the file it is 'resize'.

    Raises DatasetError for a dataset.json that says something else.
    """
    path = find_data_root(data_root) / "dataset.json"
    if not path.is_file():
        return Description()
    remedy = "Prepare the data set again, or remove the file to have every image resized to 256x256"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(data_root, [f"{path}: cannot be read ({error}). {remedy}"]) from None
    known = description if isinstance(description, dict) else {}
    sizing, microns = known.get("sizing"), known.get("microns_per_pixel")
    if sizing not in SIZINGS:
        raise DatasetError(data_root, [f"{path}: sizing is {sizing!r}; it must be one of {', '.join(SIZINGS)}. "
                                       f"{remedy}"])
    if microns is not None and not is_pixel_size(microns):
        raise DatasetError(data_root, [f"{path}: microns_per_pixel is {shown(repr(microns))[:80]}; it must be "
                                       f"{PIXEL_SIZE_RULE}, or null where it is not known"])
    names = known.get("classes")
    if names is not None and not (type(names) is list and are_class_names(names)):
        raise DatasetError(data_root, [f"{path}: classes is {shown(repr(names))[:80]}; it must be a list of the names "
                                       f"of the classes, {NAMES_RULE}, or be left out"])
    white = known.get("max_value", 0)
    if not is_max_value(white):
        raise DatasetError(data_root, [f"{path}: max_value is {shown(repr(white))[:80]}; it must be {MAX_VALUE_RULE}, "
                                       f"or be left out"])
    return Description(sizing, float(microns or 0), tuple(names or ()), white)


def group_names(names: Iterable[str], group_regex: str | None) -> dict[str, str]:
    """Return the group of every name: itself, or what `group_regex` finds in it (its group 1 if it has one).

    Raises UserError when the expression is invalid or finds nothing in some name.
    """
    if not group_regex:
        return {name: name for name in names}
    pattern = compiled(group_regex)
    found = {name: pattern.search(name) for name in names}
    missed = [name for name, match in found.items() if not match or not match.group(pattern.groups and 1)]
    if missed:
        raise UserError(f"--group_regex {group_regex!r} finds nothing in {len(missed)} names, e.g. {missed[0]!r}; it "
                         f"must match every source name. Widen it, e.g. '^\\d+' for leading digits, '^[^_]+' for all "
                         f"before the first underscore")
    return {name: match.group(pattern.groups and 1) for name, match in found.items()}


def by_source(pairs: Iterable[Pair], group_regex: str | None = None) -> dict[str, list[Pair]]:
    """Collect pairs by their source image."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair.source].append(pair)
    return dict(groups)


def groups_of(pairs: Iterable[Pair], group_regex: str | None) -> dict[str, list[Pair]]:
    """Collect pairs by what must not be in two splits: what `group_regex` finds in the name of their source image (see
    `group_names`), else the group that a manifest tells, else the source image."""
    pairs = list(pairs)
    stems = {pair.source: name_of(pair.source) if pair.origin else pair.source for pair in pairs}
    found = group_names(stems.values(), group_regex) if group_regex else {}
    groups = defaultdict(list)
    for pair in pairs:
        groups[found.get(stems[pair.source]) or pair.group or pair.source].append(pair)
    return dict(groups)


def groups_of_each(pairs: list[Pair], group_regex: str | None) -> list[str]:
    """Return the group of each pair, as `groups_of` finds it."""
    group_of = {pair: group for group, found in groups_of(pairs, group_regex).items() for pair in found}
    return [group_of[pair] for pair in pairs]


def leaked(splits: dict[str, list[Pair]], split: str, group_regex: str | None = None,
           collect: Callable = groups_of, other: str = "train") -> tuple[int, int]:
    """Count the groups of `split` of which any image, original or copy, is in `other`: (in it, all).

    Args:
        collect: `groups_of` or `by_source`.
    """
    there, groups = (collect(splits[name], group_regex) for name in (other, split))
    return sum(key in there for key in groups), len(groups)


def read_folders(data_root: Path, wanted: Iterable[str], all_needed: bool = True,
                 mask_suffix: str = "") -> tuple[dict[str, list[Pair]], list[str]]:
    """Return the pairs of these folders, whatever `splits.csv` says, and the problems.

    Args:
        all_needed: False takes a missing folder for an empty one, unless all of them are missing.
        mask_suffix: as for `list_splits`.
    """
    if not data_root.is_dir():
        found = "a file, not a folder" if data_root.exists() else "no such folder"
        raise DatasetError(data_root, [f"{found}. Name a folder laid out as {TREE}"])
    problems: list[str] = []
    wanted = list(wanted)
    there = [split for split in wanted if (data_root / split).is_dir()]
    if not there and not any((data_root / split).is_dir() for split in SPLITS):
        in_one = mask_suffix and ((data_root / KINDS[0]).is_dir() or list_folder(data_root).files)
        if all_needed or not (in_one or all((data_root / kind).is_dir() for kind in KINDS[:2])):
            raise DatasetError(data_root, [what_is_there(data_root)])
        pairs = with_origins(pair_folder(data_root, problems, mask_suffix), data_root / MANIFEST)
        return {split: pairs if split == wanted[0] else [] for split in wanted}, problems  # not dealt yet
    read = wanted if all_needed or not there else there
    return {split: with_origins(pair_folder(data_root / split, problems, mask_suffix) if split in read else [],
                                data_root / MANIFEST) for split in wanted}, problems


def with_origins(pairs: list[Pair], manifest: Path) -> list[Pair]:
    """Return the pairs with what a manifest tells of where each comes from."""
    origins = _read_manifest(manifest)
    return [replace(pair, **(origins.get(pair.name) or origins.get(source_name(pair.name), {}))) for pair in pairs]


def _read_manifest(path: Path) -> dict[str, dict[str, str]]:
    """Return name -> origin and group of every image that a manifest lists; a table of another kind tells nothing.

    Raises DatasetError for a torn one: without the groups that were lost, one patient could be in train and in test.
    """
    names, lost = ("tile", "source", "group"), ""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file, strict=True)  # else a quotation mark too many takes the rows behind it
            rows, columns = list(reader), reader.fieldnames or ()
    except csv.Error as error:
        rows, columns, lost = [], names, str(error)
    except OSError:
        return {}
    if not set(names) <= set(columns):
        return {}
    if not rows:
        lost = lost or "it has lost all lines but its first"
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values() or "\0" in "".join(row.values()) or not all(row[key] for key in names):
            lost = lost or f"line {line} is cut off or damaged"
    if lost:
        raise DatasetError(path.parent, [f"{path}: {lost}, so the groups of images are not known. Prepare the data set "
                                         f"again, or remove the file to have each image as a group"])
    return {composed(unguarded(row["tile"])): {"origin": unguarded(row["source"]), "group": unguarded(row["group"])}
            for row in rows}


def passed_over(data_root: Path) -> list[str]:
    """Return in words what lies in the folders of a data set and is not read."""
    found = []
    for split in SPLITS:
        for kind in KINDS:
            folder = data_root / split / kind
            if folder.is_dir() and (words := left_out(list_folder(folder))):
                found.append(f"{folder}: {words}")
    return found


def _apply_splits_file(table: Path, folders: dict[str, list[Pair]], problems: list[str]) -> dict[str, list[Pair]]:
    """Deal the pairs of all folders as the table says; every wrong line goes into `problems`."""
    by_path = {composed(pair.image.relative_to(table.parent).as_posix()): pair
               for pairs in folders.values() for pair in pairs}
    splits: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    remedy = "Write it with python prepare_data.py split DATA_ROOT, or save it as CSV UTF-8 with commas"
    try:
        # Spreadsheets put a byte order mark in front; names of files are bytes, which need not be UTF-8.
        with open(table, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file, strict=True)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        problems.append(f"{table}: cannot be read ({error}). {remedy}")
        return splits
    if shown("".join(map(str, columns))) != "".join(map(str, columns)):
        problems.append(f"{table}: cannot be read (its first line is no UTF-8). {remedy}")
        return splits
    if not {"path", "split"} <= set(columns):
        problems.append(f"{table}: columns {columns} found; 'path' and 'split' are needed. {remedy}")
        return splits
    seen = set()
    for number, row in enumerate(rows, start=2):
        path = composed(unguarded(row["path"] or ""))
        if path not in by_path:  # written on Windows; elsewhere a name may hold a backslash
            path = path.replace("\\", "/")
        split, line = row["split"], f"{table}, line {number}"
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
