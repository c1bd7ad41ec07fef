"""Turn the Herlev Pap smear download into a data set of single cells with nucleus or cytoplasm masks.

The source holds seven class folders with NAME.BMP and its mask NAME-d.bmp. The masks are read by colour, whatever the
order of their palette: Jantzen et al., Pap-smear Benchmark Data For Pattern Classification, 2005. Cells of one field of
view (the number before the first '-') go into one split; within that, every class is split 70/15/15.
"""

import csv
from collections import Counter
from pathlib import Path

import numpy as np

from images.dealing import deal_groups
from images.files import ImageFileError, image_size, load_image
from images.listing import has_suffix
from images.recipe import CELL
from images.splits import SHARES, SPLITS, DatasetError
from preparation.choices import HERLEV_TARGETS
from preparation.data_sets import PreparedData, Source, format_table, new_folder
from system.errors import UserError
from system.processes import progress

CLASSES = ("normal_superficiel", "normal_intermediate", "normal_columnar", "light_dysplastic", "moderate_dysplastic",
           "severe_dysplastic", "carcinoma_in_situ")
COLOURS = {(0, 0, 255): "nucleus", (0, 0, 128): "cytoplasm", (255, 0, 0): "background",
           (128, 128, 128): "undocumented region at the cell's border", (0, 0, 0): "black"}
MASK_END = "-d"
FIELD = r"^\d+"  # the field of view in a name


def field_of(name: str) -> str:
    """Return the field of view of a cell: 149143370-149143378-001 -> 149143370."""
    return name.split("-")[0]


def find_cells(src: Path, notes: list[str]) -> dict[str, tuple[Path, Path]]:
    """Return image and mask of every cell by name; the class is the name of the folder.

    Args:
        notes: takes a sentence for each class folder that is absent and each file that has no partner.
    Raises:
        UserError: where there is no class folder, or a name occurs twice.
    """
    folders = _class_folders(src)
    notes += [f"{name}: no such class folder" for name in CLASSES if name not in folders]
    cells: dict[str, tuple[Path, Path]] = {}
    for folder in folders.values():
        files = _files_by_stem(folder)
        for stem, path in files.items():
            origin = f"{folder.name}/{path.name}"
            if stem.endswith(MASK_END):
                if stem.removesuffix(MASK_END) not in files:
                    notes.append(f"{origin}: left out, as its image is missing")
            elif stem + MASK_END not in files:
                notes.append(f"{origin}: left out, as its mask {path.stem}{MASK_END}.bmp is missing")
            elif path.stem in cells:
                raise UserError(f"{path}: {cells[path.stem][0]} has the same name; names must be unique. Remove or "
                                 f"rename one, its mask alike")
            else:
                cells[path.stem] = path, files[stem + MASK_END]
    if not cells:
        raise UserError(f"{src}: no cell found; the class folders hold NAME.BMP and NAME{MASK_END}.bmp. Check --src")
    return dict(sorted(cells.items()))


def _files_by_stem(folder: Path) -> dict[str, Path]:
    """Return images and masks of a class folder by stem in small letters; raises UserError if one occurs twice."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if has_suffix(path, (".bmp", ".png")):
            first = files.setdefault(path.stem.lower(), path)
            if first is not path:
                raise UserError(f"{path}: same name as {first.name}; a stem may occur once in a folder. Remove one")
    return files


def _class_folders(src: Path) -> dict[str, Path]:
    """Return the class folders by name; `src` may hold them one level deeper."""
    if not src.is_dir():
        raise UserError(f"{src}: no such folder. Check --src")
    for place in (src, *sorted(p for p in src.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))):
        found = {p.name.lower(): p for p in sorted(place.iterdir()) if p.is_dir()}
        if any(name in found for name in CLASSES):
            return {name: found[name] for name in CLASSES if name in found}
    raise UserError(f"{src}: no class folder found; expected: {', '.join(CLASSES)}. Check --src")


def read_parts(path: Path) -> np.ndarray:
    """Read a colour-coded mask as (H, W) uint8 indices into COLOURS; raises ImageFileError that lists other colours."""
    colours = load_image(path, 3).astype(np.int32)
    codes = colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]
    known = np.array([r << 16 | g << 8 | b for r, g, b in COLOURS])
    matches = codes[..., None] == known
    if not matches.any(axis=-1).all():
        found, counts = np.unique(codes[~matches.any(axis=-1)], return_counts=True)
        shown = ", ".join(f"({c >> 16}, {c >> 8 & 255}, {c & 255}) on {n} pixels"
                          for c, n in list(zip(found, counts, strict=True))[:4])
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        meant = ", ".join(f"{colour} {name}" for colour, name in COLOURS.items())
        raise ImageFileError(f"{path}: unknown colours {shown}{more}; known are {meant}. Is it the original mask, not "
                             f"scaled and not a JPEG?")
    return matches.argmax(axis=-1).astype(np.uint8)


def read_cells(cells: dict[str, tuple[Path, Path]], src: Path) -> dict[str, np.ndarray]:
    """Read all masks; raises DatasetError with every one that cannot serve."""
    parts, problems = {}, []
    for name, (image, mask) in progress(cells.items(), "reading masks", unit="cell", leave=True):
        try:
            parts[name] = read_parts(mask)
            (height, width), (mask_height, mask_width) = image_size(image), parts[name].shape
            if (height, width) != (mask_height, mask_width):
                problems.append(f"{image}: {height}x{width} pixels, but its mask has {mask_height}x{mask_width}; "
                                f"both must have one size. Take both from the original download")
        except ImageFileError as error:
            problems.append(str(error))
    if problems:
        raise DatasetError(src, problems)
    return parts


def assign(classes: dict[str, str], shares: tuple[float, ...], seed: int) -> dict[str, int]:
    """Return the part of every cell; no field of view is in two parts, and each class meets its share.

    Args:
        classes: cell name -> class.
    """
    contents: dict[str, list[int]] = {}
    for name, kind in classes.items():
        contents.setdefault(field_of(name), [0] * len(CLASSES))[CLASSES.index(kind)] += 1
    dealt = deal_groups(contents, shares, seed)
    return {name: dealt[field_of(name)] for name in classes}


def write_folds(root: Path, classes: dict[str, str], split_of: dict[str, str], folds: int, seed: int) -> str:
    """Write fold_1.csv ... with the columns of splits.csv; fold k tests on part k and validates on the next.

    Returns a table of the cells of every fold.
    """
    part_of = assign(classes, (1 / folds,) * folds, seed)
    rows = []
    for k in range(folds):
        split = {k: "test", (k + 1) % folds: "valid"}
        dealt = {name: split.get(part, "train") for name, part in part_of.items()}
        with open(root / f"fold_{k + 1}.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([("path", "split"), *sorted(
                (f"{split_of[name]}/images/{name}.png", part) for name, part in dealt.items())])
        counts = Counter(dealt.values())
        rows.append((f"fold_{k + 1}.csv", *(counts[s] for s in SPLITS)))
    return format_table(("fold", *SPLITS), rows)


def prepare(src: Path, out: Path, target: str = "nucleus", folds: int = 0, seed: int = 0) -> str:
    """Write the data set and return the report; raises UserError for what cannot be used."""
    if folds and folds < 3:
        raise UserError(f"--folds is {folds}; at least 3 are needed, one part each for train, valid and test")
    with new_folder(out, src) as root:
        data = PreparedData(root, f"Herlev, target {target}", "resize")
        cells = find_cells(src, data.notes)
        parts = read_cells(cells, src)
        classes = {name: image.parent.name.lower() for name, (image, _) in cells.items()}
        split_of = {name: SPLITS[part] for name, part in assign(classes, SHARES, seed).items()}
        names = list(COLOURS.values())
        totals = np.zeros(len(COLOURS), int)
        value = np.array([HERLEV_TARGETS[target].get(name, 0) for name in names], np.uint8)
        for name, (image, _) in progress(cells.items(), "Herlev", unit="cell", leave=True):
            origin = image.relative_to(src).as_posix()
            mask = value[parts[name]]
            if not mask.any():
                data.note(origin, f"no {' or '.join(HERLEV_TARGETS[target])} in its mask; it is kept")
            totals += np.bincount(parts[name].reshape(-1), minlength=len(COLOURS))
            data.add_mask(Source(name, origin, field_of(name), split_of[name]), load_image(image, 3),
                          mask if target == "both" else mask > 0, int((parts[name] == names.index("nucleus")).any()))
        for name in names[3:]:
            data.note(name, f"{totals[names.index(name)] / totals.sum():.2%} of all pixels, taken as background")
        by_class = Counter((kind, split_of[name]) for name, kind in classes.items())
        extra = format_table(("class", *SPLITS), [(kind, *(by_class[kind, s] for s in SPLITS)) for kind in CLASSES])
        if folds:
            extra += "\n" + write_folds(root, classes, split_of, folds, seed)
            extra += "\nTo use a fold, copy its file to splits.csv in the data set; without that the folders hold."
        if target == "both":
            extra += "\nMasks hold 0 background, 1 nucleus, 2 cytoplasm: train with --out_channels 2."
        return data.finish(extra=extra, classes=CELL if target == "both" else ())
