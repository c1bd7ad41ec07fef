"""The report on a data set: images, empty masks, foreground, and what is shared between train, valid and test."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from images.pyramid import ImagePyramid, open_pyramids
from images.resolutions import RESOLUTIONS
from images.splits import SPLITS, find_data_root, groups_of, leaked, other_files, write_splits

LOST_SHARE = 0.1  # of the masks of train, from which on it is said that a stage sees nothing of them


@dataclass
class DatasetReport:
    """What was counted in a data set; printing it shows a table and the warnings.

    Attributes:
        counts: split -> images, originals, empty masks, foreground (mean share of pixels, one a class).
        totals: 'source images' and, with a group expression, 'groups' -> how many there are.
        leakage: the same kinds -> split -> (in train, all).
        warnings: sentences, one a warning.
    """

    data_root: str
    counts: dict[str, dict]
    totals: dict[str, int]
    leakage: dict[str, dict[str, tuple[int, int]]]
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"data set {self.data_root}", "split   images  originals  empty masks  foreground"]
        for split, c in self.counts.items():
            share = ", ".join(f"{f:.1%}" for f in c["foreground"])
            lines.append(f"{split:<6}  {c['images']:>6}  {c['originals']:>9}  {c['empty_masks']:>11}  {share:>10}")
        lines += [f"{n} {kind} in all" for kind, n in self.totals.items()]
        for kind, by_split in self.leakage.items():
            lines += [f"leakage: {n} of {m} {kind} of {split} are in train" +
                      (" as originals or copies" if kind == "source images" else "")
                      for split, (n, m) in by_split.items()]
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings])


def check_dataset(data_root="data", group_regex: str | None = None, in_channels: int = 1, out_channels: int = 1,
                  use_augmented: bool = True, pyramids: dict[str, ImagePyramid] | None = None) -> DatasetReport:
    """Read every file of a data set and report images, empty masks, foreground and leakage.

    Args:
        group_regex: expression that finds the field of view or patient in a source name, e.g. '^\\d+'.
        pyramids: the splits as already decoded; otherwise the files are read.
    Raises:
        DatasetError (a UserError) that lists every problem.
    """
    data_root = find_data_root(data_root)
    if pyramids is None:
        pyramids = open_pyramids(data_root, in_channels, out_channels, use_augmented, cache_images=False)
    counts = {split: {"images": len(p), "originals": sum(not pair.is_copy for pair in p.pairs),
                      "empty_masks": int((p.foreground == 0).any(axis=1).sum()),
                      "foreground": p.foreground.mean(axis=0).tolist()} for split, p in pyramids.items()}
    pairs = {split: p.pairs for split, p in pyramids.items()}
    kinds = {"source images": None} | ({"groups": group_regex} if group_regex else {})
    everything = [pair for of_split in pairs.values() for pair in of_split]
    totals = {kind: len(groups_of(everything, regex)) for kind, regex in kinds.items()}
    leakage = {kind: {split: leaked(pairs, split, regex) for split in SPLITS[1:]} for kind, regex in kinds.items()}
    report = DatasetReport(str(data_root), counts, totals, leakage)
    for kind, by_split in leakage.items():
        shared = [f"{n} of {m} {kind} of {split}" for split, (n, m) in by_split.items() if n]
        if shared:
            report.warnings.append(f"{' and '.join(shared)} are in train as well, so these scores overstate what the "
                                   f"network does on new {kind}")
    if report.warnings:
        regex = f" --group_regex {shlex.quote(group_regex)}" if group_regex else ""
        report.warnings.append(f"for a split without leakage: python prepare_data.py split "
                               f"{shlex.quote(str(data_root))}{regex}")
    others = other_files(data_root)
    if others:
        report.warnings.append(f"{len(others)} files are of no type that is read, and left out, e.g. {others[0]}")
    train = pyramids["train"]
    for resolution, lost in zip(RESOLUTIONS, train.lost.sum(axis=0).tolist(), strict=False):
        if lost > LOST_SHARE * len(train):
            report.warnings.append(f"at {resolution}x{resolution} pixels {lost} of {len(train)} masks of train lose "
                                   f"all they show (nothing covers half of a pixel), so that stage teaches little. Cut "
                                   f"the images into tiles, or give that stage few epochs")
    for split, c in counts.items():
        if c["empty_masks"] == c["images"]:
            report.warnings.append(f"all {c['images']} masks of {split} are empty in some class")
    return report


def split_dataset(data_root: Path, group_regex: str | None = None, seed: int = 0, in_channels: int = 1,
                  out_channels: int = 1) -> tuple[Path, DatasetReport]:
    """Write `splits.csv` (see `write_splits`), check the data set, and return the file and the report.

    Where the check fails the new file is removed, so that the same command can be given again.
    """
    path = write_splits(data_root, group_regex, seed)
    try:
        return path, check_dataset(data_root, group_regex, in_channels, out_channels)
    except BaseException:
        path.unlink()
        raise
