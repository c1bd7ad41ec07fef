"""What a run folder holds, read for a page: whatever is missing or damaged is left out."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from checkpoints import RULES
from scoring.cases import Case, load_cases
from system.errors import UserError
from system.tables import number_in, read_table
from training.run_folder import RunFolder
from training.schedule import CLASSIC_WORK, WORK, WORK_BEFORE
from unet import STAGE_RESOLUTIONS, build_model, count_parameters

LEAKAGE = re.compile(r"leakage: (\d+) of (\d+) (.+?) of (\w+) are in train")


@dataclass
class Survey:
    """The validation images at the end of a stage (see training/survey.py)."""

    cases: list[Case]
    tables: dict[str, np.ndarray]

    @property
    def stage(self) -> int:
        """Return the stage of the weights."""
        return int(self.tables["stage"])

    @property
    def epoch(self) -> int:
        """Return the epoch of the weights within their stage."""
        return int(self.tables["epoch"])

    @property
    def threshold(self) -> float:
        """Return the probability from which a pixel is foreground."""
        return float(self.tables["threshold"])


@dataclass
class Run:
    """One run.

    Attributes:
        config: config.json.
        rows: of metrics.csv, as numbers.
        surveys: stage -> what was seen at its end.
        test_rows: of test_scores.csv; names and groups as text, all else as numbers.
        test_scores: test_scores.json.
        test_cases: images of test with their predictions.
        missing: sentences on what could not be read.
    """

    path: Path
    config: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    surveys: dict[int, Survey] = field(default_factory=dict)
    test_rows: list[dict] = field(default_factory=list)
    test_scores: dict = field(default_factory=dict)
    test_cases: list[Case] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return self.path.absolute().name

    @property
    def model_args(self) -> dict:
        """Return the arguments of the network, {} where the run does not tell."""
        return self.config.get("resolved", {}).get("model_args", {})

    @property
    def class_names(self) -> list[str]:
        """Return what the classes are called, [] where the run does not tell."""
        return list(self.config.get("resolved", {}).get("class_names", ()))

    @property
    def parameters(self) -> int:
        """Return how many numbers the network has; 0 where the run does not tell, or had the network of before."""
        known = self.is_classic or self.work == WORK
        return count_parameters(build_model(self.model_args)) if self.model_args and known else 0

    @property
    def is_classic(self) -> bool:
        """Tell whether the network is the classic U-Net."""
        return self.model_args.get("model") == "unet"

    @property
    def work(self) -> dict[int, float]:
        """Return the operations of an image at each stage (see training/schedule.py)."""
        told = self.config.get("resolved", {}).get("work")
        return dict(zip(WORK, told, strict=True)) if told else WORK_BEFORE

    @property
    def finished(self) -> bool:
        """Tell whether all planned epochs are there."""
        planned = self.config.get("resolved", {}).get("epochs", {})
        last = max(planned, default=None)
        return (self.path / "final_model.pth").is_file() or bool(last and self.rows) and \
            int(self.rows[-1]["stage"]) == int(last) and self.rows[-1]["epoch"] >= planned[last]

    @property
    def scores(self) -> dict:
        """Return the summary of the test scores of the best weights, {} where there is none."""
        return next(iter(self.test_scores.values()), {})

    @property
    def scored_weights(self) -> str:
        """Return the file of the weights that the test scores are of, with their epoch where it is known."""
        name = next(iter(self.test_scores), "")
        survey = self.surveys.get(int(name[-1]) if name[-1:].isdigit() else 0)
        return f"{name}.pth" + (f" (epoch {survey.epoch} of stage {survey.stage})" if survey else "")

    @property
    def threshold(self) -> float:
        """Return the probability from which a pixel is foreground."""
        return float(self.config.get("resolved", {}).get("threshold", 0.5))

    @property
    def data_report(self) -> list[str]:
        """Return the lines of the report on the data."""
        return list(map(str, self.config.get("data_report") or ()))

    def images_of(self, split: str) -> int:
        """Return how many images a split has; 0 where the run does not tell."""
        found = [re.match(rf"{split}\s+(\d+)", line) for line in self.data_report]
        return next((int(match[1]) for match in found if match), 0)

    def leakage(self) -> list[tuple[int, int, str, str]]:
        """Return what of valid and test is in train: (in train, all, kind, split)."""
        found = filter(None, (LEAKAGE.match(line) for line in self.data_report))
        return [(int(match[1]), int(match[2]), match[3], match[4]) for match in found]

    def stages(self) -> list[dict]:
        """Return a row a stage: resolution, epochs, the best epoch with its Dice, that of the lowest validation loss,
        seconds, images a second."""
        result = []
        for stage in sorted({int(row["stage"]) for row in self.rows}):
            rows = [row for row in self.rows if row["stage"] == stage]
            best, lowest = max(rows, key=lambda row: row["dice"]), min(rows, key=lambda row: row["loss"])
            result.append({"stage": stage, "side": STAGE_RESOLUTIONS[stage], "epochs": len(rows),
                           "best_epoch": int(best["epoch"]), "lowest_loss_epoch": int(lowest["epoch"]),
                           "dice": best["dice"], "first": rows[0]["dice"],
                           "seconds": float(np.nansum([row["seconds"] for row in rows])),
                           "speed": float(np.nanmean([row["images_per_second"] for row in rows]))})
        return result

    def growths(self) -> list[tuple[int, int]]:
        """Return (epochs of the run before, resolution) of every stage that began, the first included."""
        return [(i, STAGE_RESOLUTIONS[int(row["stage"])]) for i, row in enumerate(self.rows)
                if i == 0 or row["stage"] != self.rows[i - 1]["stage"]]

    def minutes(self) -> np.ndarray:
        """Return (epochs,) the minutes of training so far at the end of every epoch."""
        return np.nancumsum([row["seconds"] for row in self.rows]) / 60

    def operations(self) -> np.ndarray:
        """Return (epochs,) an estimate of the operations of training so far, in 10^12.

        Those of an image are known for 64 channels (training/schedule.py) and grow about as the square of the width.
        """
        scale = (self.model_args.get("base_channels", 64) / 64) ** 2 / 1000
        work = dict.fromkeys(WORK, CLASSIC_WORK) if self.is_classic else self.work
        return np.nancumsum([work[int(row["stage"])] * scale * row["seconds"] * row["images_per_second"]
                             for row in self.rows])


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises UserError where it is none.
    """
    run = Run(Path(path))
    if not (run.path / "metrics.csv").is_file():
        raise UserError(f"{path}: no metrics.csv in it, so it is no run folder, or no epoch was finished. Name a "
                        f"folder that train_papsmear.py wrote, e.g. outputs/NAME")
    run.rows = RunFolder(run.path).rows()
    if not run.rows:
        raise UserError(f"{path}: its metrics.csv has no row that names stage and epoch: no epoch was finished, or "
                        f"its header was lost. Go on with --resume {path}, which writes it anew")
    run.config = _json(run, "config.json", _is_config)
    run.test_scores = _json(run, "test_scores.json", _are_scores)
    rows = [{name: value if name in ("image", "group") else number_in(value) for name, value in row.items()}
            for row in read_table(run.path / "test_scores.csv")]
    run.test_rows = [row for row in rows if "image" in row and math.isfinite(row.get("dice", math.nan))]
    if len(run.test_rows) < len(rows):
        run.missing.append(f"test_scores.csv: {len(rows) - len(run.test_rows)} of {len(rows)} rows have no image or no "
                           f"Dice, and are left out.")
    if rows and len(rows) < run.scores.get("images", 0):
        run.missing.append(f"test_scores.csv has {len(rows)} of {run.scores['images']} rows.")
    if left_out := sum(1 for _ in read_table(run.path / "metrics.csv")) - len(run.rows):
        run.missing.append(f"metrics.csv: rows that name no stage or no epoch are left out, {left_out} in all.")
    for stage in STAGE_RESOLUTIONS:
        if found := _cases(run, f"validation_stage_{stage}.npz"):
            run.surveys[stage] = Survey(*found)
    if found := _cases(run, "test_cases.npz"):
        run.test_cases = found[0]
    return run


def _json(run: Run, name: str, holds: Callable[[dict], bool]) -> dict:
    path = run.path / name
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        run.missing.append(f"{name} cannot be read ({error}).")
        return {}
    if isinstance(found, dict) and (not found or holds(found)):
        return found
    run.missing.append(f"{name} is left out: it does not hold what a training writes. Was it edited?")
    return {}


def _is_config(found: dict) -> bool:
    """Tell whether what the page reads of a config.json is of the right types; all of it may be missing."""
    resolved = found.get("resolved", {})
    if not isinstance(resolved, dict) or not isinstance(found.get("data_report") or [], list):
        return False
    args, epochs, threshold = resolved.get("model_args", {}), resolved.get("epochs", {}), resolved.get("threshold", 0.5)
    work = resolved.get("work", [1] * len(WORK))
    return isinstance(resolved.get("class_names", []), list) and isinstance(work, list) and len(work) == len(WORK) \
        and all(type(n) in (int, float) and n > 0 for n in work) \
        and (args == {} or RULES["model_args"][0](args)) and RULES["threshold"][0](threshold) \
        and isinstance(epochs, dict) and all(stage in ("1", "2", "3", "4") and type(n) is int
                                             for stage, n in epochs.items())


def _are_scores(found: dict) -> bool:
    """Tell whether a test_scores.json holds, by name of the weights, measures with their figures."""
    def measured(value) -> bool:
        return not isinstance(value, dict) or all(type(value.get(key)) in (int, float)
                                                  for key in ("mean", "std", "low", "high"))
    return all(isinstance(scores, dict) and type(scores.get("images")) is int and isinstance(scores.get("dice"), dict)
               and all(map(measured, scores.values())) for scores in found.values())


def _cases(run: Run, name: str):
    path = run.path / name
    try:
        return load_cases(path) if path.is_file() else None
    except (OSError, ValueError) as error:
        run.missing.append(f"{name} cannot be read, and its images are left out ({error}).")
        return None
