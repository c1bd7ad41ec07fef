"""The tables of a study of growing, as CSV: a row a training, a row an image and training, a row an epoch."""

import csv
from pathlib import Path

KEYS = ("arm", "budget", "seed")
MINUTES = "min"  # ends a budget that is a time
TRAININGS, IMAGES, EPOCHS = TABLES = ("trainings.csv", "images.csv", "epochs.csv")
COLUMNS = {
    TRAININGS: (*KEYS, "epochs", "operations", "images_seen", "seconds", "processor_seconds", "dice_256_valid",
                "dice_256_test", "dice_valid", "dice_test", "aji_valid", "aji_test", "data"),
    IMAGES: (*KEYS, "split", "image", "dice_256", "dice", "aji"),
    # Seconds are those of training from its start, without validation.
    EPOCHS: (*KEYS, "stage", "epoch", "operations", "seconds", "processor_seconds", "dice"),
}


def read_table(out: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of a table, as text; none if it is not there yet. What a row lacks is ''."""
    path = out / name
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [dict.fromkeys(COLUMNS[name], "") | row for row in csv.DictReader(file)]


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
        others = [row for row in read_table(out, name) if key_of(row) != key]
        rows = others + [key | row for row in result[name]]
        rows.sort(key=lambda row: (budget_order(row["budget"]), arms.index(row["arm"]), int(row["seed"])))
        RunFolder(out).write_csv(name, rows, COLUMNS[name])
