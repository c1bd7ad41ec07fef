"""The folder of a prediction: pictures and tables that survive a kill, and that know which images are finished.

An image is finished when its row stands in images.csv. Pictures are written beside their places and renamed, then the
nuclei get their rows in nuclei.csv, then the image gets its row; whatever a killed process left of an image without a
row is taken away by the next one. Earlier results of an image stay until its new ones are whole.
"""

import contextlib
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from nuclei.measurement import CELL_COLUMNS, COLUMNS, MICROMETRE_COLUMNS
from system.atomic import atomic_write
from system.errors import UserError, check_continued
from system.locks import LOCK, held_lock
from system.tables import append_rows, columns_of, number_in, read_table, write_table
from system.text import cell, shown

IMAGE_COLUMNS = ("image", "height", "width", "nuclei", "cut_by_border", "foreground", "mean_area")
IMAGE_MICROMETRE_COLUMNS = ("mean_area_um2", "nuclei_per_mm2")
LAST_COLUMNS = ("highest_probability", "trust", "flags", "unlike_training", "seconds", "bytes", "modified",
                "finished", "run")
MAY_DIFFER = ("checkpoint", "device", "precision")  # between a prediction and the one that goes on with it
# A table into which rows are put in the place of others is written anew. Where that took longer than SHORT seconds, it
# waits, and what is finished with it, for PATIENCE times as long.
SHORT, PATIENCE = 0.02, 20
FIRST_LOOKS = 5  # images that are named for a look
OTHER_FILES = ("overlay.png", "nuclei.geojson", "labels.tif", "labels.ome.tif", "rois.zip")
UNFINISHED = ".unfinished"
CORRECTED = 2  # seconds after an image was finished, from which on a change is none of the prediction's own
PART = re.compile(r"images(_\d+_of_(?P<parts>\d+))?\.csv")
LEFT = re.compile(rf"(?P<picture>.+){UNFINISHED}|\.(?P<file>.+?)({UNFINISHED})?\.\w{{8}}\.tmp",
                  re.DOTALL)  # by a killed process


class ImageResults:
    """What a prediction writes for one image: pictures, and rows for the tables.

    Attributes:
        name: of the image, as the tables have it.
        nuclei: rows of nuclei.csv (see `nuclei.measurement`).
        row: with IMAGE_COLUMNS and LAST_COLUMNS.
        labels: gives the label map in consecutive rows (rows, W), each time it is called.
    """

    def __init__(self, folder: Path, path: Path, classes: int):
        self.folder, self.stem, self.classes, self.name = folder, path.stem, classes, cell(path.name)
        self.nuclei: Iterable[dict] = ()
        self.row: dict = {}
        self.labels: Callable[[], Iterable[np.ndarray]] = tuple
        self._files: dict[Path, Path] = {}

    def file(self, kind: str, suffix: str = ".png") -> Path:
        """Return where to write a picture, e.g. of the kind 'mask_2'; it gets its name when all are written."""
        path = self.folder / f"{self.stem}_{kind}{suffix}"
        self._files[path] = unfinished(path)
        return self._files[path]

    def drop(self, kind: str, suffix: str) -> None:
        """Remove a picture that others were made from and that was not asked for, if it was written."""
        if written := self._files.pop(self.folder / f"{self.stem}_{kind}{suffix}", None):
            written.unlink()

    def rename(self) -> None:
        """Give the pictures their names, and remove those of other kinds that an earlier prediction left."""
        for path, written in self._files.items():
            os.replace(written, path)
        for path in picture_files(self.folder, self.stem, self.classes):
            if path not in self._files:
                path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what was written."""
        for written in self._files.values():
            written.unlink(missing_ok=True)


class ResultsFolder:
    """Write predictions into a folder, image by image; a context, which holds the lock and closes the tables.

    Args:
        path: the folder; it is made by `begin`.
        part: (i, n), of several processes that share the images; each has tables of its own.
        classes: of the checkpoint.
        settings: plain data that the results depend on, and MAY_DIFFER.
        scaled: whether the tables have micrometres.
        cells: whether the nuclei have cytoplasm.
    """

    def __init__(self, path: Path, part: tuple[int, int], classes: int, settings: dict, scaled: bool,
                 cells: bool = False):
        end = "" if part[1] == 1 else f"_{part[0]}_of_{part[1]}"
        self.path, self.classes, self.settings = Path(path), classes, settings
        self.nuclei, self.images = (self.path / f"{name}{end}.csv" for name in ("nuclei", "images"))
        self._settings_file, self._lock_file = self.path / f"settings{end}.json", self.path / f"{LOCK}{end}"
        micrometres = MICROMETRE_COLUMNS if scaled else (), IMAGE_MICROMETRE_COLUMNS if scaled else ()
        self._columns = {self.nuclei: COLUMNS + (CELL_COLUMNS if cells else ()) + micrometres[0],
                         self.images: IMAGE_COLUMNS + micrometres[1] + LAST_COLUMNS}
        self._lock = contextlib.ExitStack()
        self._run = ""
        self._names: dict[Path, set[str]] = {}  # table -> images that have rows in it
        self._waiting: list[ImageResults] = []
        self._committed = self._took = 0.0

    def begin(self, paths: list[Path], overwrite: bool = False, go_on: bool = False,
              endings: Iterable[str] = ()) -> list[Path]:
        """Check and lock the folder, tidy up after a killed process, and return the images that are to be predicted.

        Args:
            paths: the images of this process.
            overwrite: replace their results.
            go_on: leave out those that the last prediction into this folder has finished.
            endings: of files that a finished image must have, e.g. 'overlay.png'; files of other formats are removed,
                but not if they were changed after the last prediction.
        Raises:
            UserError: for results that are there unasked, or made with other settings than those to go on with.
        """
        runs = self._earlier_runs()
        self._refuse_other_tables()
        if go_on:
            self._check_settings(runs)
            self._check_columns()
        elif overwrite:
            self._refuse_corrected(paths, endings)
        else:
            self._refuse_existing(paths)
        self._lock.enter_context(held_lock(self._lock_file, "this folder", "choose another --out"))
        self._run = list(runs)[-1] if go_on else now()
        measured = Counter(row["image"] for row in read_table(self.nuclei))
        recorded = {row["image"]: row if row.get("nuclei") == str(measured[row["image"]]) else {}
                    for row in read_table(self.images)}  # an image whose nuclei were lost is not finished
        if not go_on:
            with atomic_write(self._settings_file) as file:
                file.write(json.dumps({"runs": runs | {self._run: self.settings}}, indent=2).encode() + b"\n")
        self._tidy(paths, set(recorded))
        return [path for path in paths
                if not ({"run": self._run} | file_columns(path)).items() <= recorded.get(cell(path.name), {}).items()
                or not all((self.path / f"{path.stem}_{ending}").exists() for ending in endings)]

    @contextlib.contextmanager
    def image(self, path: Path) -> Iterator[ImageResults]:
        """Give what one image's results are written to; if all goes well, they take the place of its earlier ones."""
        results, there = ImageResults(self.path, path, self.classes), file_columns(path)
        try:
            yield results
        except BaseException:
            results.discard()
            raise
        results.row |= {"image": results.name, "finished": now(), "run": self._run} | there
        self._waiting.append(results)
        if time.monotonic() - self._committed >= PATIENCE * self._took:
            self.commit()

    def commit(self) -> None:
        """Let everything that is finished take its place."""
        done, begin = self._waiting, time.monotonic()
        if not done:
            return
        for results in done:
            results.rename()
        new = {results.name for results in done}
        replaced = any(new & names for names in self._names.values())
        self._put(self.nuclei, new, (row for results in done for row in results.nuclei))
        self._put(self.images, new, (results.row for results in done))
        self._waiting, self._committed = [], time.monotonic()
        took = self._committed - begin
        self._took = took if replaced and took > SHORT else 0.0

    def least_trusted(self) -> list[str]:
        """Return FIRST_LOOKS images of this prediction with their trust, the lowest first; none of so few images."""
        rows = [row for row in read_table(self.images)
                if row.get("run") == self._run and math.isfinite(number_in(row.get("trust", "")))]
        rows.sort(key=lambda row: number_in(row["trust"]))
        return [f"{row['image']} {row['trust']}" for row in rows[:FIRST_LOOKS]] if len(rows) > FIRST_LOOKS else []

    def __enter__(self) -> "ResultsFolder":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if not kind or issubclass(kind, KeyboardInterrupt):
                self.commit()
        finally:
            for results in self._waiting:
                results.discard()
            if self._run and not self.images.exists() and not self.nuclei.exists():  # nothing is finished
                self._settings_file.unlink(missing_ok=True)
            self._lock.close()

    def _put(self, table: Path, new: set[str], rows: Iterable[dict]) -> None:
        """Append rows, or put them in the place of those that these images have."""
        columns, there = self._columns[table], self._names[table]
        if there & new:
            kept = (row for row in read_table(table) if row["image"] not in new)
            write_table(table, columns, (row for part in (kept, rows) for row in part), sync=False)
        else:
            append_rows(table, columns, rows)
        there |= new

    def _earlier_runs(self) -> dict[str, dict]:
        """Return the settings of the predictions into this folder by the time when they began, the last one last."""
        if not self._settings_file.exists():
            return {}
        try:
            runs = dict(json.loads(self._settings_file.read_text(encoding="utf-8"))["runs"])
            return {time: dict(settings) for time, settings in runs.items()}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self._settings_file}: cannot be read ({error}). Remove it and pass --overwrite, or "
                            f"choose another --out") from None

    def _check_settings(self, runs: dict[str, dict]) -> None:
        if not runs:
            raise UserError(f"--continue: {self.path} holds no {self._settings_file.name}, so no prediction was begun "
                            f"there. Leave --continue out, or correct --out")
        last = list(runs.values())[-1]
        check_continued(last, self.settings, self.path, "replace everything with --overwrite, or choose another --out",
                        MAY_DIFFER)

    def _check_columns(self) -> None:
        """Raise UserError for a table that has other columns than it would get now, as one of another version has."""
        for table, columns in self._columns.items():
            there = columns_of(table)
            if there and there != list(columns):
                other = [f"{words} {', '.join(names)}" for words, names in (
                    ("lacks", [name for name in columns if name not in there]),
                    ("has", [name for name in there if name not in columns])) if names]
                raise UserError(f"--continue: {table} {' and '.join(other) or 'has its columns in another order'}, so "
                                f"another version wrote it. Replace everything with --overwrite, or choose another "
                                f"--out")

    def _refuse_other_tables(self) -> None:
        """Raise UserError for a table that no prediction wrote, or whose first line is damaged: what it holds would be
        lost."""
        for table, columns in self._columns.items():
            there = columns_of(table)
            if there and tuple(there[:2]) != columns[:2] or "\0" in "".join(there):
                raise UserError(f"{table}: its first line is {shown(','.join(there))[:80]!r}, so it is no table of a "
                                f"prediction, or it is damaged. Move it away, or choose another --out")

    def _refuse_existing(self, paths: list[Path]) -> None:
        there = [file for path in paths for file in picture_files(self.path, path.stem, self.classes) if file.exists()]
        if there := there + [table for table in (self.nuclei, self.images) if table.exists()]:
            raise UserError(f"{there[0]}: exists already, and nothing is overwritten unasked. Choose another --out, go "
                            f"on with an interrupted prediction by --continue, or replace the results of these images "
                            f"by --overwrite")

    def _refuse_corrected(self, paths: list[Path], endings: Iterable[str]) -> None:
        """Raise UserError for pictures and outlines that were changed since, and would be removed and not replaced."""
        finished: dict[str, str] = {}
        for row in (row for table in self._image_tables() for row in read_table(table) if row.get("finished")):
            finished[row["image"]] = max(row["finished"], finished.get(row["image"], ""))
        for path in paths:
            if cell(path.name) not in finished:
                continue
            replaced = {self.path / f"{path.stem}_{ending}" for ending in endings}
            if OTHER_FILES[0] in endings:
                replaced |= set(picture_files(self.path, path.stem, self.classes)[:-len(OTHER_FILES)])
            limit = datetime.fromisoformat(finished[cell(path.name)]).timestamp() + CORRECTED
            for file in picture_files(self.path, path.stem, self.classes):
                if file not in replaced and file.exists() and file.stat().st_mtime > limit:
                    raise UserError(f"{file}: changed after the prediction that wrote it, as by a correction. "
                                    f"--overwrite would remove it, as --format does not name its kind. Move it away, "
                                    f"or choose another --out")

    def other_parts(self) -> list[str]:
        """Return the tables of earlier predictions that shared the images otherwise; what they say may be outdated."""
        ours = PART.fullmatch(self.images.name)["parts"]
        return [table.name for table in self._image_tables() if PART.fullmatch(table.name)["parts"] != ours]

    def _image_tables(self) -> list[Path]:
        """Return the tables of images that predictions have written here, those of all processes."""
        return sorted(file for file in self.path.glob("images*.csv") if PART.fullmatch(file.name))

    def _tidy(self, paths: list[Path], recorded: set[str]) -> None:
        """Take away what a killed process left: unfinished pictures, and rows of images that it did not finish.

        Args:
            recorded: the images in images.csv.
        """
        ours = {file.name for path in paths for file in picture_files(self.path, path.stem, self.classes)}
        ours |= {file.name for file in (*self._columns, self._settings_file)}
        for file in self.path.iterdir():
            if (match := LEFT.fullmatch(file.name)) and (match["picture"] or match["file"]) in ours:
                file.unlink()
        for table, columns in self._columns.items():
            names = recorded if table == self.images else {row.get("image", "") for row in read_table(table)}
            # A table from before images.csv was written has rows of finished images alone.
            kept = names & recorded if self.images.exists() else names
            if table.exists() and (names != kept or columns_of(table) != list(columns)):
                rows = (row for row in read_table(table) if row["image"] in kept)
                write_table(table, columns, ({name: row.get(name, "") for name in columns} for row in rows), sync=False)
            self._names[table] = kept


def now() -> str:
    """Return the time as the tables have it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def file_columns(path: Path) -> dict[str, str]:
    """Return what tells the file of an image from another of its name, as images.csv has it; nothing of none."""
    try:
        found = path.stat()
    except OSError:  # which reading the image names
        return {}
    modified = datetime.fromtimestamp(found.st_mtime, UTC)
    return {"bytes": str(found.st_size), "modified": modified.isoformat(timespec="microseconds")}


def image_row(prediction, size: tuple[int, int], pixel_size: float | None) -> dict:
    """Return what images.csv says of a `nuclei.streaming.Prediction`: IMAGE_COLUMNS and most of LAST_COLUMNS.

    Args:
        size: height and width of the image.
        pixel_size: micrometres, if they are known; then IMAGE_MICROMETRE_COLUMNS follow.
    """
    areas, cut = prediction.measures["area"], int(prediction.measures["cut_by_border"].sum())
    mean = float(areas.mean()) if len(areas) else 0.0
    none = "all left out" if prediction.foreground else "none found"
    flags = [none] * (not prediction.nuclei) + ["nuclei cut by border"] * bool(cut)
    row = {"height": size[0], "width": size[1], "nuclei": prediction.nuclei, "cut_by_border": cut,
           "foreground": round(prediction.foreground, 6), "mean_area": round(mean, 2),
           "highest_probability": round(prediction.highest, 4),
           "trust": "" if prediction.trust is None else round(prediction.trust, 3), "flags": "; ".join(flags),
           "unlike_training": prediction.strange or ""}
    if pixel_size:
        row |= {"mean_area_um2": round(mean * pixel_size ** 2, 4),
                "nuclei_per_mm2": round(prediction.nuclei / (size[0] * size[1] * pixel_size ** 2) * 1e6, 2)}
    return row


def unfinished(path: Path) -> Path:
    """Return where a picture is written before it gets its name."""
    return path.with_name(f"{path.name}{UNFINISHED}")


def class_endings(classes: int) -> list[str]:
    """Return what file names say of the class: nothing for a single one."""
    return [""] if classes == 1 else [f"_{k + 1}" for k in range(classes)]


def picture_files(folder: Path, stem: str, classes: int) -> list[Path]:
    """Return the pictures that a prediction of an image may make."""
    kinds = [f"{kind}{ending}" for kind in ("mask", "probability") for ending in class_endings(classes)]
    return [folder / f"{stem}_{kind}{suffix}" for kind in (*kinds, "instances") for suffix in (".png", ".tif")] \
        + [folder / f"{stem}_{name}" for name in OTHER_FILES]
