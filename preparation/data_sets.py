"""Write a data set in the layout that training reads, from images with instance maps or masks.

    OUT/dataset.json                                what it is: sizing, source, micrometres per pixel
    OUT/manifest.csv                                one row a written image, with its origin
    OUT/train|valid|test/images|masks|instances     PNG; masks 0/255, instances 16 bit with labels 1..n
    OUT/whole/valid|test/images|masks|instances     the whole images of valid and test, where the rest is tiles
    OUT/contact_sheet.png, OUT/report.md            to look at, to read

The same input gives the same bytes.
"""

import contextlib
import csv
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from images.files import load_image, save_instances, save_png
from images.listing import IMAGE_SUFFIXES, list_folder
from images.masks import load_instances
from images.resolutions import FINEST
from images.splits import MANIFEST, SPLITS, grouped
from system.atomic import folder_made
from system.errors import DISK_ENDS, UserError
from system.text import guarded, shown

FORMAT = 1
COLUMNS = ("tile", "split", "source", "group", "row", "column", "height", "width", "nuclei")
SHEET_TILES = 24
OUTLINES = np.array([[255, 225, 25], [60, 220, 75], [70, 240, 240], [255, 255, 255]], np.uint8)  # unlike the stains


@dataclass(frozen=True)
class Source:
    """One image that goes into a data set.

    Attributes:
        name: stem of what is written from it.
        origin: the file it comes from, relative to the folder given.
        group: what must not be in two splits: patient, field of view.
    """

    name: str
    origin: str
    group: str
    split: str


@dataclass
class Count:
    """What one split holds."""

    sources: int = 0
    groups: set = field(default_factory=set)
    written: int = 0
    nuclei: int = 0
    pixels: int = 0
    foreground: int = 0


class PreparedData:
    """Write one data set into a folder, and remember what was written.

    Args:
        root: an empty folder.
        description: where the data come from, for dataset.json.
        sizing: 'tile' (native scale) or 'resize' (the whole image becomes 256x256 in training).
    """

    def __init__(self, root: Path, description: str, sizing: str):
        self.root, self.description, self.sizing = root, description, sizing
        self.rows: list[dict] = []
        self.counts = {split: Count() for split in SPLITS}
        self.notes: list[str] = []

    def note(self, name: str, *sentences: str) -> None:
        """Remember what a user should know about a file."""
        self.notes += [f"{name}: {sentence}" for sentence in sentences]

    def add(self, source: Source, image: np.ndarray, labels: np.ndarray, overlap: int = 0) -> None:
        """Write an image (H, W, C) uint8 with its instance map (H, W) of labels 1..n.

        With sizing 'tile' it is cut up, and of valid and test the whole is kept beside the tiles.
        """
        self._count(source, int(labels.max(initial=0)))
        if self.sizing == "resize":
            self.write(source, source.split, source.name, image, labels > 0, labels)
            return
        if source.split != "train":
            self.write(source, f"whole/{source.split}", source.name, image, labels > 0, labels)
        if min(labels.shape) < FINEST:
            self.note(source.origin, f"{labels.shape[0]}x{labels.shape[1]} pixels; tiles have {FINEST}, so it is "
                                     f"padded by reflection at the right or bottom, nuclei and all")
        for row in tile_offsets(labels.shape[0], overlap):
            for column in tile_offsets(labels.shape[1], overlap):
                name = f"{source.name}_{row:05d}_{column:05d}"
                cut = np.s_[row:row + FINEST, column:column + FINEST]
                self.write(source, source.split, name, *cut_tile(image[cut], labels[cut]), (row, column),
                           labels[cut].shape, len(np.unique(labels[cut][labels[cut] > 0])))

    def add_mask(self, source: Source, image: np.ndarray, mask: np.ndarray, nuclei: int) -> None:
        """Write an image (H, W, C) uint8 with a mask (H, W), bool or the classes 0..K as uint8, and no instances."""
        self._count(source, nuclei)
        self.write(source, source.split, source.name, image, mask, None, nuclei=nuclei)

    def write(self, source: Source, folder: str, name: str, image: np.ndarray, mask: np.ndarray,
              labels: np.ndarray | None, offset: tuple[int, int] = (0, 0), covered: tuple[int, int] | None = None,
              nuclei: int | None = None) -> None:
        """Write one image with its masks and its row of the manifest.

        Args:
            folder: below the root; 'train', 'whole/test' ...
            offset: row and column of its first pixel in the source.
            covered: height and width of what it shows of the source; the rest is padding, which is not counted.
            nuclei: how many there are, if it is not the highest label.
        """
        nuclei = int(labels.max(initial=0)) if nuclei is None else nuclei
        for kind in ("images", "masks") if labels is None else ("images", "masks", "instances"):
            (self.root / folder / kind).mkdir(parents=True, exist_ok=True)
        save_png(self.root / folder / "images" / f"{name}.png", image, smallest=False)
        save_png(self.root / folder / "masks" / f"{name}.png", mask, smallest=False)
        if labels is not None:
            save_instances(self.root / folder / "instances" / f"{name}.png", labels)
        height, width = covered or image.shape[:2]
        self.rows.append(dict(zip(COLUMNS, (name, folder, source.origin, source.group, *offset, height, width, nuclei),
                                  strict=True)))
        if folder == source.split:
            count = self.counts[folder]
            count.written += 1
            count.pixels += height * width
            count.foreground += int(np.count_nonzero(mask[:height, :width]))

    def _count(self, source: Source, nuclei: int) -> None:
        count = self.counts[source.split]
        count.sources += 1
        count.groups.add(source.group)
        count.nuclei += nuclei

    def finish(self, microns_per_pixel: float | None = None, extra: str = "", classes: tuple[str, ...] = (),
               max_value: int = 0) -> str:
        """Write manifest, description, contact sheet and report; return the report.

        Args:
            extra: text that goes between the table and the notes.
            classes: names of the values 1, 2, ... of masks with several classes.
            max_value: what was white in the source images, which are written with 8 bit; 0 for that of their type.
        """
        description = {"format": FORMAT, "sizing": self.sizing, "source": self.description,
                       "microns_per_pixel": microns_per_pixel} | ({"classes": list(classes)} if classes else {}) \
            | ({"max_value": max_value} if max_value else {})
        (self.root / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        with open(self.root / MANIFEST, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row in sorted(self.rows, key=lambda row: (row["split"], row["tile"])):
                writer.writerow(row | {key: guarded(row[key]) for key in ("tile", "source", "group")})
        self.draw_contact_sheet()
        notes = "".join(f"\n- {note}" for note in grouped(self.notes))
        report = self.table() + (f"\n{extra}\n" if extra else "") + (f"\nTo know:\n{notes}\n" if notes else "")
        (self.root / "report.md").write_text(report, encoding="utf-8", errors="backslashreplace")
        return report

    def table(self) -> str:
        """Return what was made as a table, one row a split."""
        written = "tiles" if self.sizing == "tile" else "written"
        rows = [(split, c.sources, len(c.groups), c.written, c.nuclei,
                 f"{c.foreground / c.pixels:.1%}" if c.pixels else "-") for split, c in self.counts.items()]
        return format_table(("split", "images", "groups", written, "nuclei", "foreground"), rows)

    def draw_contact_sheet(self) -> None:
        """Draw tiles from all splits, evenly spaced, with the outline of every instance."""
        from matplotlib.figure import Figure  # half a second, and --help does without

        chosen = []
        for split in SPLITS:
            rows = sorted((row for row in self.rows if row["split"] == split), key=lambda row: row["tile"])
            picks = np.linspace(0, len(rows) - 1, min(SHEET_TILES // len(SPLITS), len(rows))).round().astype(int)
            chosen += [rows[i] for i in picks]
        lines = -(-len(chosen) // 6)
        figure = Figure(figsize=(18, 3.2 * lines), layout="constrained")
        for axis in figure.subplots(lines, 6, squeeze=False).flat:
            axis.set_axis_off()
        for axis, row in zip(figure.axes, chosen, strict=False):
            axis.imshow(outlined(*self._read(row)))
            name = row["tile"] if len(row["tile"]) < 40 else f"{row['tile'][:18]}...{row['tile'][-18:]}"
            axis.set_title(f"{row['split']}, nuclei: {row['nuclei']}\n{shown(name)}", fontsize=8, parse_math=False)
        figure.savefig(self.root / "contact_sheet.png", dpi=100, metadata={"Software": None})

    def _read(self, row: dict) -> tuple[np.ndarray, np.ndarray]:
        folder, name = self.root / row["split"], f"{row['tile']}.png"
        labels = folder / "instances" / name
        return (load_image(folder / "images" / name, 3),
                load_instances(labels if labels.exists() else folder / "masks" / name))


@contextlib.contextmanager
def new_folder(out: Path, *sources: Path):
    """Give a temporary folder that becomes `out` if all goes well, and vanishes if not.

    Raises UserError when `out` holds anything, at the end too, or lies within a source.
    """
    out = Path(os.path.realpath(out))  # '.' has a parent then, and an empty folder may be a link to elsewhere
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; nothing is overwritten. Choose another --out or remove it")
    for source in sources:
        if out.is_relative_to(os.path.realpath(source)):
            raise UserError(f"{out}: lies within {source}; the source is never written to. Choose an --out elsewhere")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folder_made(out.parent))
            temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        except OSError as error:
            if error.errno in DISK_ENDS:
                raise
            raise UserError(f"{out}: cannot be made ({error.strerror}). Choose an --out that you may write "
                            f"to") from None
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        made = temporary / "made"  # below, so that it has the permissions of any new folder
        made.mkdir()
        try:
            yield made
        except OSError as error:  # those of an open file name none
            error.filename = error.filename or str(out)
            raise
        try:
            if out.exists():
                out.rmdir()
            made.rename(out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise UserError(f"{out}: another process wrote it meanwhile. Look at what is there, or choose another "
                            f"--out") from None


def tile_offsets(length: int, overlap: int = 0) -> list[int]:
    """Return where tiles begin along a side of `length` pixels: all is covered, the last is shifted inwards."""
    if not 0 <= overlap < FINEST:
        raise UserError(f"--overlap is {overlap}; it must be 0 to {FINEST - 1} pixels")
    last = max(length - FINEST, 0)
    return [*range(0, last, FINEST - overlap), last]


def cut_tile(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image (256, 256, C), mask and instance map, with labels 1..n, of a tile.

    A smaller one is padded by reflection, the nuclei too: what is seen of them in the mirror is taught as nuclei.
    """
    missing = [(0, FINEST - side) for side in labels.shape]
    if np.any(missing):
        from skimage.measure import label

        image, labels = np.pad(image, [*missing, (0, 0)], mode="reflect"), np.pad(labels, missing, mode="reflect")
        labels = label(labels, connectivity=2)  # each image in the mirror is a nucleus of its own
    found, labels = np.unique(np.append(0, labels), return_inverse=True)
    labels = labels[1:].reshape(FINEST, FINEST).astype(np.int32)
    return image, labels > 0, labels


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Return the image files of a folder by stem; raises UserError if a stem occurs twice or there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: a file, where a folder of images is needed. Pass the folder it lies in"
                        if folder.exists() else f"{folder}: no folder of that name. Check the path")
    listing = list_folder(folder)
    for path, first in listing.twins:
        raise UserError(f"{path}: same name as {first.name}; a stem may occur once. Remove or rename one")
    if not listing.files:
        raise UserError(f"{folder}: no image found ({', '.join(IMAGE_SUFFIXES)}). Check the path")
    return listing.files


def outlined(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Paint the inner border of every instance onto a copy of the image (H, W, 3) uint8, in several colours."""
    from skimage.segmentation import find_boundaries
    image = image.copy()
    border = find_boundaries(labels, mode="inner")
    image[border] = OUTLINES[labels[border] % len(OUTLINES)]
    return image


def format_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Return a Markdown table with aligned columns; all but the first are numbers."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w)
                                 for i, (c, w) in enumerate(zip(row, widths, strict=True))) + " |\n"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|\n"
    return line(cells[0]) + rule + "".join(line(row) for row in cells[1:])

