"""Scores of an evaluation that is under way, kept image by image so that a killed one can go on."""

import json
import math
import re
from collections import Counter
from pathlib import Path

from system.errors import DiskError, check_continued
from system.processes import is_main_process, rank


class UnfinishedScores:
    """Rows of scores by image (see scoring/scores.py), in a file for each process, beside the table they will become.

    Args:
        table: the CSV that the rows will become, e.g. scores.csv.
        settings: plain data that the scores depend on.
    """

    def __init__(self, table: Path, settings: dict):
        self._folder, self._files, self.settings = table.parent, f"{table.stem}_unfinished_*.jsonl", settings
        self._rows: dict[str, dict] = {}

    def exist(self) -> bool:
        """Tell whether an evaluation was interrupted here."""
        return bool(self._kept())

    def read(self) -> int:
        """Read what an interrupted evaluation scored; return how many images that are.

        Raises UserError if it had other settings.
        """
        for path in self._kept():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    settings, name, row = dict(entry["settings"]), entry["image"], dict(entry["row"])
                    whole = isinstance(name, str) and isinstance(row["image"], str) and 0 <= row["dice"] <= 1
                except (ValueError, KeyError, TypeError, RecursionError):  # cut off by the kill
                    continue
                if not whole or any(isinstance(value, float) and not math.isfinite(value) for value in row.values()):
                    continue
                check_continued(settings, self.settings, path, "or start anew with --overwrite")
                self._rows[name] = row
        kinds = Counter(map(tuple, self._rows.values()))  # names of the measures; those of a damaged row are others
        self._rows = {name: row for name, row in self._rows.items() if tuple(row) == kinds.most_common(1)[0][0]}
        return len(self._rows)

    def row(self, image: str) -> dict | None:
        """Return the scores of an image, if they have been read."""
        return self._rows.get(image)

    def keep(self, image: str, row: dict) -> None:
        """Keep the scores of an image. Raises DiskError where that cannot be written."""
        path = self._folder / self._files.replace("*", str(rank()))
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"image": image, "row": row, "settings": self.settings}) + "\n")
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}. Make room or mend the disk, then go on with the same command "
                            f"and --continue") from None

    def remove(self) -> None:
        """Remove what all processes kept; the first one does it."""
        if is_main_process():
            for path in self._kept():
                path.unlink()

    def _kept(self) -> list[Path]:
        """Return the files of all processes; one that a user gave a like name is none of them."""
        written = re.compile(re.escape(self._files).replace(r"\*", r"\d+"))
        return sorted(path for path in self._folder.glob(self._files) if written.fullmatch(path.name))
