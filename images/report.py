"""The report on a data set: images, empty masks, foreground, and what is shared between train, valid and test."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from images.dealing import write_splits
from images.duplicates import shared
from images.files import load_image
from images.listing import name_of
from images.pyramid import ImagePyramid, open_pyramids
from images.resolutions import FINEST, RESOLUTIONS
from images.splits import (
    MANIFEST,
    SHARES,
    SPLITS,
    DatasetError,
    by_source,
    find_data_root,
    groups_of,
    leaked,
    passed_over,
)
from images.targets import instance_file

HOW = {"source images": " as originals or copies", "pictures": ", by their pixels, turned or flipped ones too"}
FEW_PIXELS = 20    # of the largest object of a split, below which it is doubted that objects are nuclei
SOME_IMAGES = 5    # from which on it says something that nuclei are darker in none
FEW_WIDE = 2       # pixels across a nucleus at a stage, below which the stage learns little of it
SHADES = 1 / 255   # standard deviation up to which an image shows nothing, on the scale [0, 1]
MANY_WIDE = 128    # pixels across a nucleus in a tile, from which on few are seen whole
SHRUNK = 1.25      # times that images are larger than 256 pixels, from which on tiles would show more
COLOUR = 4         # grey levels between the channels, on average, from which on an image is in colour
LOST_SHARE = 0.1   # of the masks of train, from which on it is said that a stage sees nothing of them


@dataclass
class DatasetReport:
    """What was counted in a data set; printing it shows a table and the warnings.

    Attributes:
        counts: split -> images, originals, empty masks, foreground (mean share of pixels, one a class), instance maps.
        width: pixels at 256 across the nuclei of train, as the median over images of circles of their median area; 0
            without any.
        totals: 'source images' and, with a group expression or a manifest, 'groups' -> how many there are.
        leakage: the same kinds, and 'pictures', found by their pixels -> split -> (in train, all).
        warnings: sentences, one a warning.
    """

    data_root: str
    counts: dict[str, dict]
    totals: dict[str, int]
    leakage: dict[str, dict[str, tuple[int, int]]]
    width: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"data set {self.data_root}", "split   images  originals  groups  empty masks  foreground"]
        for split, c in self.counts.items():
            share = ", ".join(f"{f:.1%}" for f in c["foreground"])
            lines.append(f"{split:<6}  {c['images']:>6}  {c['originals']:>9}  {c['groups']:>6}  "
                         f"{c['empty_masks']:>11}  {share:>10}")
        if self.width:
            lines.append(f"nuclei of train are about {self.width:.0f} pixels wide at {FINEST}x{FINEST}, "
                         f"{self.width * RESOLUTIONS[0] / FINEST:.1f} at {RESOLUTIONS[0]}x{RESOLUTIONS[0]}")
        if any(c["instances"] for c in self.counts.values()):
            lines.append("instance maps: " + ", ".join(f"{c['instances']} of {c['images']} images of {split}"
                                                       for split, c in self.counts.items()))
        lines += [f"{n} {kind} in all" for kind, n in self.totals.items()]
        for kind, by_split in self.leakage.items():
            lines += [f"leakage: {n} of {m} {kind} of {split} are in train" + HOW.get(kind, "")
                      for split, (n, m) in by_split.items()]
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings])


def check_dataset(data_root="data", group_regex: str | None = None, in_channels: int = 1, out_channels: int = 1,
                  use_augmented: bool = True, pyramids: dict[str, ImagePyramid] | None = None, max_value: int = 0,
                  mask_suffix: str = "") -> DatasetReport:
    """Read every file of a data set and report images, empty masks, foreground and leakage.

    Args:
        group_regex: expression that finds the field of view or patient in a source name, e.g. '^\\d+'.
        pyramids: the splits as already decoded; otherwise the files are read.
        max_value, mask_suffix: see `images.pyramid.open_pyramids`.
    Raises:
        DatasetError (a UserError) that lists every problem.
    """
    data_root = find_data_root(data_root)
    if pyramids is None:
        pyramids = open_pyramids(data_root, in_channels, out_channels, use_augmented, cache_images=False,
                                 max_value=max_value, mask_suffix=mask_suffix)
    refuse_full_masks(data_root, pyramids)
    counts = {split: {"images": len(p), "originals": sum(not pair.is_copy for pair in p.pairs),
                      "groups": len(groups_of(p.pairs, group_regex)),
                      "empty_masks": int((p.foreground == 0).any(axis=1).sum()),
                      "foreground": p.foreground.mean(axis=0).tolist(),
                      "instances": sum(instance_file(pair) is not None for pair in p.pairs)}
              for split, p in pyramids.items()}
    pairs = {split: p.pairs for split, p in pyramids.items()}
    everything = [pair for of_split in pairs.values() for pair in of_split]
    kinds = {"source images": by_source}
    if group_regex or any(pair.group not in ("", pair.source, name_of(pair.source)) for pair in everything):
        kinds["groups"] = groups_of
    totals = {kind: len(collect(everything, group_regex)) for kind, collect in kinds.items()}
    leakage = {kind: {split: leaked(pairs, split, group_regex, collect) for split in SPLITS[1:]}
               for kind, collect in kinds.items()}
    report = DatasetReport(str(data_root), counts, totals, leakage, width_of_nuclei(pyramids["train"]))
    appearances = {split: [facts.appearance for facts in p.facts] for split, p in pyramids.items()}
    by_pixels = {split: shared(appearances["train"], appearances[split]) for split in SPLITS[1:]}
    leakage["pictures"] = {split: (len(equal) + len(near), counts[split]["images"])
                           for split, (equal, near) in by_pixels.items()}
    report.warnings += leakage_warnings(report, pyramids, by_pixels, group_regex)
    report.warnings += chosen_by_test(pyramids, group_regex)
    unlisted = [pair for pair in everything if not pair.origin]
    if len(unlisted) < len(everything) and unlisted:
        report.warnings.append(f"{len(unlisted)} of {len(everything)} images are not in {MANIFEST}, e.g. "
                               f"{unlisted[0].image}, so each counts as a patient of its own. Were they added, or has "
                               f"the table lost lines?")
    report.warnings += [f"not read in {words}" for words in passed_over(data_root)]
    report.warnings += size_warnings(pyramids["train"], report.width)
    report.warnings += mask_warnings(pyramids, counts)
    return report


def width_of_nuclei(train: ImagePyramid) -> float:
    """Return the pixels at 256 across the nuclei: the median over images of the circle of their median area."""
    areas = [float(np.median(facts.areas)) for facts in train.facts if len(facts.areas)]
    return 2 * math.sqrt(np.median(areas) / math.pi) if areas else 0.0


def size_warnings(train: ImagePyramid, width: float) -> list[str]:
    """Return what the width of the nuclei says about tiles, resizing and the first stage."""
    sizing, wide = train.recipe.sizing, {r: width * r / FINEST for r in RESOLUTIONS}
    if sizing == "tile" and width > MANY_WIDE:
        return [f"nuclei are about {width:.0f} pixels wide in tiles of {FINEST}, so few are seen whole. Prepare the "
                f"data set with --sizing resize"]
    if width and wide[RESOLUTIONS[0]] < FEW_WIDE:
        found = (f"nuclei are about {wide[RESOLUTIONS[0]]:.1f} pixels wide at {RESOLUTIONS[0]}x{RESOLUTIONS[0]}, too "
                 f"few to learn from")
        larger = float(np.median([math.sqrt(np.prod(facts.size)) for facts in train.facts])) / FINEST
        stage = next((s for s, r in enumerate(RESOLUTIONS, start=1) if wide[r] >= FEW_WIDE), len(RESOLUTIONS))
        if sizing == "resize" and larger > SHRUNK:
            return [f"{found}. In tiles they would be {larger:.1f} times as wide: prepare the data set with --sizing "
                    f"tile. Otherwise train with --start_stage {stage}"]
        return [f"{found}. Train with --start_stage {stage}"]
    found = []
    lost = np.sum([facts.lost for facts in train.facts], axis=0).tolist() if train.facts else []
    for resolution, count in zip(RESOLUTIONS, lost, strict=False):
        if count > LOST_SHARE * len(train):
            found.append(f"at {resolution}x{resolution} pixels {count} of {len(train)} masks of train lose all they "
                         f"show (nothing covers half of a pixel), so that stage teaches little. Cut the images into "
                         f"tiles, or give that stage few epochs")
    return found


def refuse_full_masks(data_root: Path, pyramids: dict[str, ImagePyramid]) -> None:
    """Raise DatasetError for a split whose masks are all foreground and nothing else."""
    full = [split for split, p in pyramids.items() if len(p) and (p.foreground == 1).all()]
    if full:
        raise DatasetError(data_root, [f"{split}: its masks ({len(pyramids[split])}) are foreground from edge to edge, "
                                       f"so there is nothing to learn. Are they inverted, or saved without their "
                                       f"transparency? Look at {pyramids[split].pairs[0].mask}" for split in full])


def leakage_warnings(report: DatasetReport, pyramids: dict[str, ImagePyramid], by_pixels: dict,
                     group_regex: str | None) -> list[str]:
    """Return what is shared between train and the other splits, and how to split otherwise."""
    found = []
    for kind, by_split in report.leakage.items():
        counts = [f"{n} of {m} {kind} of {split}" for split, (n, m) in by_split.items() if n]
        if counts:
            found.append(f"{' and '.join(counts)} are in train as well, so these scores overstate what the network "
                         f"does on new {kind}")
    if report.leakage["source images"] != report.leakage["pictures"]:
        for split, (equal, near) in by_pixels.items():
            for same, words in ((equal, "show the very picture"), (near, "nearly show the picture")):
                if same:
                    j, i = next(iter(same.items()))
                    found.append(f"{len(same)} images of {split} {words} of one in train, perhaps turned or flipped, "
                                 f"e.g. {pyramids[split].pairs[j].image} and {pyramids['train'].pairs[i].image}")
    if any(n for kind in report.totals for n, _ in report.leakage[kind].values()):
        regex = f" --group_regex {shlex.quote(group_regex)}" if group_regex else ""
        found.append(f"for a split without leakage: python prepare_data.py split "
                     f"{shlex.quote(report.data_root)}{regex}")
    return found


def chosen_by_test(pyramids: dict[str, ImagePyramid], group_regex: str | None) -> list[str]:
    """Return what of test is in valid as well, by which the epoch is chosen."""
    valid, test = pyramids["valid"], pyramids["test"]
    end = "By valid the epoch is chosen, so that test is not independent"
    same, groups = leaked({"valid": valid.pairs, "test": test.pairs}, "test", group_regex, other="valid")
    if same:
        return [f"{same} of {groups} groups or source images of test are in valid as well. {end}"]
    equal, near = shared(*([facts.appearance for facts in p.facts] for p in (valid, test)))
    if pictures := equal | near:
        j, i = next(iter(pictures.items()))
        return [f"{len(pictures)} images of test show, or nearly show, the picture of one in valid, e.g. "
                f"{test.pairs[j].image} and {valid.pairs[i].image}. {end}"]
    return []


def mask_warnings(pyramids: dict[str, ImagePyramid], counts: dict[str, dict]) -> list[str]:
    """Return what about the masks makes one doubt that they mean what they should."""
    train, found = pyramids["train"], []
    largest = {split: max((facts.areas.max(initial=0) for facts in p.facts), default=0)
               for split, p in pyramids.items()}
    for split, p in pyramids.items():
        if counts[split]["empty_masks"] == len(p):
            found.append(f"all masks of {split} ({len(p)}) are empty"
                         + (" in some class" if p.recipe.classes > 1 else ""))
        share = counts[split]["foreground"][0]
        if share > 0.5:
            found.append(f"{share:.0%} of the pixels of {split} are foreground, which is much for nuclei. Are the "
                         f"masks inverted?")
        if 0 < largest[split] < FEW_PIXELS:
            found.append(f"no object in the masks of {split} has more than {largest[split]} pixels at {FINEST}x"
                         f"{FINEST}. Are they points instead of nuclei? Otherwise cut the images into tiles")
    drawn = [facts for p in pyramids.values() for facts in p.facts if len(facts.areas)]
    if len(drawn) >= SOME_IMAGES and not any(facts.darker for facts in drawn):
        found.append(f"in none of {len(drawn)} images is what the mask marks darker than the rest, as stained nuclei "
                     f"are. Are the masks inverted?")
    plain = [pair.image for p in pyramids.values() for pair, facts in zip(p.pairs, p.facts, strict=True)
             if max(v for name, v in facts.description.items() if name.startswith("contrast")) < SHADES]
    if plain:
        found.append(f"{len(plain)} image(s) show nothing, but one shade all over, e.g. {plain[0]}")
    readings: dict[str, list[Path]] = {}
    for reading, path in (r for p in pyramids.values() for facts in p.facts for r in facts.readings):
        readings.setdefault(reading, []).append(path)
    if train.recipe.in_channels == 1 and len(train) and is_in_colour(train.pairs[0].image):
        found.append(f"the images are in colour, e.g. {train.pairs[0].image}; with --in_channels 1 their luminance "
                     f"alone is read. Pass --in_channels 3 to see their colours")
    return found + [f"{len(paths)} {reading}, e.g. {paths[0]}" for reading, paths in readings.items()]


def is_in_colour(path: Path) -> bool:
    """Tell whether the colours of an image differ from grey by more than a camera's or JPEG's noise."""
    pixels = load_image(path, 3).astype(int)
    return bool(np.ptp(pixels, axis=2).mean() > COLOUR)


def split_dataset(data_root: Path, group_regex: str | None = None, seed: int = 0, in_channels: int = 1,
                  out_channels: int = 1, shares: Sequence[float] = SHARES, max_value: int = 0,
                  mask_suffix: str = "") -> tuple[Path, DatasetReport]:
    """Write `splits.csv` (see `write_splits`), check the data set, and return the file and the report.

    Where the check fails the new file is removed, so that the same command can be given again.
    """
    path, odd = write_splits(data_root, group_regex, seed, shares, mask_suffix)
    try:
        report = check_dataset(data_root, group_regex, in_channels, out_channels, max_value=max_value,
                               mask_suffix=mask_suffix)
        report.warnings += odd
        return path, report
    except BaseException:
        path.unlink()
        raise
