"""Deal the images of a data set to train, valid and test, whole groups at a time, and write splits.csv."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from images.pairs import Pair, originals
from images.splits import SHARES, SPLITS, SPLITS_FILE, DatasetError, groups_of, read_folders
from system.atomic import atomic_write
from system.errors import DISK_ENDS, UserError
from system.text import guarded

FEW_GROUPS = 5  # of valid or test, below which their scores depend on chance


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


def split_by_group(data_root: Path, group_regex: str | None = None, seed: int = 0, shares: Sequence[float] = SHARES,
                   mask_suffix: str = "") -> tuple[dict[str, list[Pair]], list[str]]:
    """Deal all images into train, valid and test with `deal_groups`: no group is in two of them.

    Copies go to train only; of an image of which there are only copies, one stands for it in valid and test. An image
    that lies in two folders is taken once.

    Args:
        shares: of the images, for train, valid and test.
        mask_suffix: see `images.splits.list_splits`.
    Returns:
        The pairs of each split; and what is odd about it: images that are left out, and splits of few groups.
    """
    folders, problems = read_folders(Path(data_root), SPLITS, all_needed=False, mask_suffix=mask_suffix)
    by_name: dict[str, Pair] = {}
    for pair in (pair for pairs in folders.values() for pair in pairs):
        first = by_name.setdefault(pair.name, pair)
        if first is not pair and first.image.read_bytes() != pair.image.read_bytes():
            problems.append(f"{pair.image}: another picture than {first.image}, of the same name; names must be unique "
                            f"across train, valid and test. Rename one with its mask")
    if problems:
        raise DatasetError(data_root, problems)
    groups = groups_of(list(by_name.values()), group_regex)
    part_of = deal_groups({key: len(originals(pairs)) for key, pairs in groups.items()}, shares, seed)
    dealt: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    left_out = []
    for key, pairs in groups.items():
        split = SPLITS[part_of[key]]
        taken = pairs if split == "train" else originals(pairs)
        dealt[split] += taken
        left_out += [pair for pair in pairs if pair not in taken]
    odd = few_groups({split: sum(part == i for part in part_of.values()) for i, split in enumerate(SPLITS)})
    if left_out:
        odd.append(f"{len(left_out)} copies are left out, as they show images of valid and test, e.g. "
                   f"{left_out[0].image}")
    return dealt, odd


def few_groups(groups: Mapping[str, int]) -> list[str]:
    """Return a sentence for valid and for test if they have few of these groups (split -> number)."""
    return [f"{split} has {groups[split]} group(s) alone (patients, fields of view or images), so that its scores "
            f"depend on chance. Take a larger share, or add images"
            for split in SPLITS[1:] if groups[split] < FEW_GROUPS]


def write_splits(data_root: Path, group_regex: str | None = None, seed: int = 0, shares: Sequence[float] = SHARES,
                 mask_suffix: str = "") -> tuple[Path, list[str]]:
    """Write `splits.csv` from `split_by_group`, and return its path and what is odd; an existing one stays as it is."""
    data_root = Path(data_root)
    path = data_root / SPLITS_FILE
    if path.exists():
        raise UserError(f"{path}: exists already. Move or delete it first; it is never overwritten")
    dealt, odd = split_by_group(data_root, group_regex, seed, shares, mask_suffix)
    rows = [(guarded(pair.image.relative_to(data_root).as_posix()), split) for split in SPLITS for pair in dealt[split]]
    try:
        with atomic_write(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
            csv.writer(text).writerows([("path", "split"), *sorted(rows)])
            text.detach()
    except OSError as error:
        if error.errno in DISK_ENDS:
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}). Copy the data set to a folder of "
                         f"yours") from None
    return path, odd
