"""Tables in CSV that grow row by row and that a killed process leaves readable."""

import csv
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path

from system.atomic import atomic_write

DIGITS = 7  # that numbers of 32 bit have
READ_AS = "utf-8-sig"  # spreadsheets put a mark before UTF-8


def as_known(value):
    """Return a floating point number with the DIGITS that are known of it, and anything else as it is.

    >>> as_known(0.7955182072829131), as_known(1234567.8), as_known(12345678), as_known("a")
    (0.7955182, 1234568.0, 12345678, 'a')
    """
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """Yield the whole rows of a table as text, in their order; none where there is no table.

    A last row that was cut off by a kill, rows of another length than the header, and what is no CSV are left out. A
    row is a line, as no cell of ours holds a line break; a quotation mark too many costs its row alone.
    """
    if not path.exists():
        return
    with open(path, newline="", encoding=READ_AS, errors="backslashreplace") as file:
        rows = (cells for line in file if line.endswith("\n") and "\0" not in line and (cells := _cells(line)))
        columns = next(rows, [])
        for cells in rows:
            if len(cells) == len(columns):
                yield dict(zip(columns, cells, strict=True))


def number_in(text: str) -> float:
    """Return the number that a cell of a table holds; NaN where it is empty or holds something else.

    >>> [number_in(text) for text in ("0.5", "1e3", "", "abc")]
    [0.5, 1000.0, nan, nan]
    """
    try:
        return float(text)
    except ValueError:
        return math.nan


def columns_of(path: Path) -> list[str]:
    """Return the names of a table's columns; none where there is no table, or no header."""
    return _cells(_first_line(path)) if path.exists() else []


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Append rows and hand them to the operating system; a new table gets its header, a torn last row is cut off.

    What of a row is in none of the columns is left out.
    """
    if path.exists():
        _cut_torn_end(path)
    with open(path, "a", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict], sync: bool = True) -> None:
    """Write a table anew; it is whole or as it was before.

    Args:
        sync: wait until the disk has it (see `system.atomic.atomic_write`).
    Raises:
        ValueError: for a row with something that is in none of the columns.
    """
    with atomic_write(path, sync) as file:
        text = TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="", write_through=True)
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        text.detach()


def _cells(line: str) -> list[str]:
    """Return the cells of a line; none where it is empty or one of them is longer than any of ours."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _first_line(path: Path) -> str:
    with open(path, newline="", encoding=READ_AS, errors="backslashreplace") as file:
        return file.readline()


def _cut_torn_end(path: Path) -> None:
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - 4096)
            file.seek(begin)
            if line_end := file.read(end - begin).rfind(b"\n") + 1:
                end = begin + line_end
                break
            end = begin
        file.truncate(end)
