"""The files of a study of growing: settings, and tables with a row a training, an image and training, or an epoch."""

import json
import math
from pathlib import Path

from system.errors import UserError
from system.tables import number_in, read_table
from system.text import shown
from training.schedule import WORK, WORK_BEFORE

SETTINGS = "settings.json"  # beside the tables
KEYS = ("arm", "budget", "seed")
MINUTES = "min"  # ends a budget that is a time
TRAININGS, IMAGES, EPOCHS = TABLES = ("trainings.csv", "images.csv", "epochs.csv")
COLUMNS = {
    TRAININGS: (*KEYS, "epochs", "operations", "images_seen", "seconds", "processor_seconds", "dice_256_valid",
                "dice_256_test", "dice_valid", "dice_test", "aji_valid", "aji_test", "data"),
    IMAGES: (*KEYS, "split", "image", "group", "dice_256", "dice", "aji"),
    # Seconds are those of training from its start, without validation.
    EPOCHS: (*KEYS, "stage", "epoch", "operations", "seconds", "processor_seconds", "dice"),
}
NUMBERS = {column for columns in COLUMNS.values() for column in columns} - {
    "arm", "epochs", "data", "split", "image", "group"}
# Cells that are never empty.
NEEDED = {TRAININGS: KEYS, IMAGES: KEYS, EPOCHS: (*KEYS, "stage", "epoch", "operations", "dice")}


def study_table(out: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of a table, as text; none if it is not there yet. A column that it lacks is ''.

    Raises UserError for a cell that holds no number where one belongs.
    """
    rows = [dict.fromkeys(COLUMNS[name], "") | row for row in read_table(out / name)]
    for line, row in enumerate(rows, start=2):
        for column, text in row.items():
            number = text.removesuffix(MINUTES) if column == "budget" else text
            if column in NUMBERS and (text or column in NEEDED[name]) and not math.isfinite(number_in(number)):
                raise UserError(f"{out / name}, line {line}: {column} is {shown(text)[:40]!r}; it must be a number. "
                                f"Correct or remove the line: its training runs again then")
    return rows


def study_settings(out: Path) -> dict:
    """Return what settings.json of a study holds; nothing where it is not there.

    Raises UserError for a damaged one.
    """
    path = out / SETTINGS
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        work_of(kept)
        return kept | {name: dict(kept[name]) for name in ("common", "arms") if name in kept}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}), so it is not known with which options the trainings were "
                        f"made. Get it from a copy, or choose another --out") from None


def work_of(settings: dict) -> dict[int, float]:
    """Return the operations of an image at each stage with which a study counts."""
    return dict(zip(WORK, map(float, settings["work"]), strict=True)) if "work" in settings else WORK_BEFORE


def budget_order(budget: str) -> tuple[bool, float]:
    """Return by what budgets are sorted: operations first, then minutes."""
    return budget.endswith(MINUTES), float(budget.removesuffix(MINUTES))


def key_of(row: dict[str, str]) -> dict[str, str]:
    """Return what identifies the training of a row."""
    return {key: row[key] for key in KEYS}


def put_rows(out: Path, key: dict[str, str], result: dict[str, list[dict]], arms: list[str]) -> None:
    """Put the rows of a training into all tables, in the place of those that it may have there.

    The table of trainings, which says what is finished, comes last.

    Args:
        key: of the training, as `key_of` returns it.
        result: table -> rows, without the key.
        arms: of the study, in the order of the tables.
    """
    from training.run_folder import RunFolder

    for name in reversed(TABLES):
        others = [row for row in study_table(out, name) if key_of(row) != key]
        rows = others + [key | row for row in result[name]]
        rows.sort(key=lambda row: (budget_order(row["budget"]), arms.index(row["arm"]), int(row["seed"])))
        RunFolder(out).write_csv(name, rows, COLUMNS[name])
