"""The folder of one run: config.json, metrics.csv, TensorBoard logs, checkpoints and pictures.

It is created by the first write, so a run that is refused leaves nothing behind.
"""

import contextlib
import errno
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from checkpoints import is_epoch_row, save_checkpoint
from scoring.cases import Case, save_cases
from scoring.measures import PIXEL_METRICS
from scoring.pictures import predictions, training_curves
from system.atomic import atomic_write, clear_left, left_by_kill
from system.errors import UserError
from system.locks import LOCK, take_lock
from system.machine import nearest_existing
from system.tables import append_rows, as_known, number_in, read_table, write_table
from training.logs import Logs, clear_logs
from training.survey import StageSurvey

# Losses and soft Dice are at the resolution of the stage, the other measures at 256 pixels.
MEASURES = ("loss", "soft_dice", *PIXEL_METRICS)
OF_STEPS = ("lr", "gradient_norm", "skipped_steps", "loss_scale", "seconds", "processor_seconds",
            "images_per_second")
COLUMNS = ("stage", "resolution", "epoch", "run_epoch", "train_loss", "train_soft_dice", *MEASURES, "foreground",
           "empty_masks", *OF_STEPS)
OF_EPOCHS = r"stage_[1-4]_epoch_\d+\.pth"
NAMES = (rf"config\.json|metrics\.csv|best_stage_[1-4]\.pth|final_model\.pth|last\.pth|previous\.pth|{OF_EPOCHS}|"
         r"training_curves\.png|predictions_stage_[1-4]\.png|test_scores\.(csv|json)|refused_batch\.npz|"
         r"validation_stage_[1-4]\.npz|test_cases\.npz|report\.html")
RUN_FILES = re.compile(rf"{NAMES}|{left_by_kill(NAMES).pattern}")
PACKAGES = ("torch", "torchvision", "numpy", "scikit-image", "scipy", "matplotlib", "tensorboard", "pillow", "tqdm")


class RunFolder:
    """Write one run's records.

    Args:
        path: the folder.
        keep: how many stage_X_epoch_Y.pth stay; the oldest go first.
        overwrite: whether `claim` may remove what an earlier run wrote here.
    """

    def __init__(self, path: Path, keep: int = 3, overwrite: bool = False):
        self.path, self.keep, self.overwrite = Path(path), keep, overwrite
        self.claimed = False
        self.history: list[dict[str, str]] = []  # the rows of metrics.csv, as text
        self._made: list[Path] = []  # folders that `claim` made, the deepest first
        self._logs: Logs | None = None
        self._purge_step: int | None = None  # TensorBoard forgets events of an interrupted run from here on

    def check(self) -> None:
        """Raise UserError if the folder cannot be used, or holds a run that was not asked to be replaced."""
        above = nearest_existing(self.path)
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"{self.path}: {above} is {'not writable' if above.is_dir() else 'a file, not a folder'}. "
                             f"Choose another --output_dir or --experiment_name")
        try:
            odd = "is a link to nowhere" if os.lstat(self.path) and not self.path.exists() else ""
        except FileNotFoundError:
            odd = ""
        except (OSError, ValueError) as error:  # a name that is too long, or with a NUL
            odd = f"cannot be made ({getattr(error, 'strerror', None) or error})"
        if odd:
            raise UserError(f"{self.path}: {odd}. Choose another --output_dir or --experiment_name")
        if not self.overwrite and self.path.is_dir() and any(RUN_FILES.fullmatch(p.name) for p in self.path.iterdir()):
            raise UserError(f"{self.path}: this run folder exists already. Choose another --experiment_name, continue "
                             f"it with --resume {self.path}, or replace it with --overwrite (in Python: another "
                             f"output_dir, resume() or overwrite=True)")

    def claim(self) -> None:
        """Check the folder and clear it, once, before the first write of a run that does not continue another."""
        if not self.claimed:
            self.check()
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.lock()
            if not self.overwrite:
                self.check()  # another process may have written a whole run since
            self._clear()
            self.claimed = True

    def lock(self) -> None:
        """Keep other processes from writing into the folder, until this one ends, however it ends.

        Raises UserError if another one does so already.
        """
        self._lock = take_lock(self.path / LOCK, "this run folder", "choose another --experiment_name")

    def withdraw(self) -> bool:
        """Leave nothing of a run that was cut off before it had saved anything; tell whether it was so."""
        if not self.claimed or any(self.path.glob("*.pth")):
            return False
        self.close()
        self._clear()
        self._lock.release()
        (self.path / LOCK).unlink(missing_ok=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # somebody put something there
                folder.rmdir()
        self.claimed = False
        return True

    def file(self, name: str) -> Path:
        """Return the path of a file in the folder, which is made if it is missing, but not a second time."""
        if self.claimed and not self.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the run folder was removed while the run was writing into it",
                                    str(self.path))
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path / name

    def save_last(self, checkpoint: dict) -> None:
        """Write last.pth; the one before stays as previous.pth, for the case that the disk damages the new one."""
        path = self.file("last.pth")
        if path.exists():
            before = path.with_name("previous.pth")
            before.unlink(missing_ok=True)
            try:
                os.link(path, before)
            except OSError:  # no hard links here
                os.replace(path, before)
        save_checkpoint(path, checkpoint)

    def save_refused(self, batch: dict) -> None:
        """Write refused_batch.npz: image, mask and names of a batch that made numbers overflow, to look at."""
        with contextlib.suppress(OSError), atomic_write(self.file("refused_batch.npz")) as file:
            np.savez_compressed(file, image=batch["image"].cpu().numpy(), mask=batch["mask"].cpu().numpy(),
                                names=np.array([str(name) for name in batch.get("name", ())]))

    def write_config(self, config: dict, name: str = "config.json") -> None:
        """Save the settings with package versions, git commit and machine, as config.json unless told otherwise.

        Args:
            config: plain data.
        """
        self.write_json(name, config | {"environment": environment()})

    def write_json(self, name: str, content: dict) -> None:
        """Save plain data as readable JSON."""
        with atomic_write(self.file(name)) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")

    def log_epoch(self, row: dict, train: dict | None = None) -> None:
        """Append one epoch to metrics.csv and TensorBoard.

        Args:
            row: a number for each of COLUMNS.
            train: what `train_epoch` returned, for TensorBoard.
        """
        self.history.append({name: repr(as_known(row[name])) for name in COLUMNS})
        append_rows(self.file("metrics.csv"), COLUMNS, self.history[-1:])
        with said_and_passed_over("the logs for TensorBoard"):
            self.logs().add_epoch(row, train)
            if row["epoch"] == 1:
                self.logs().add_growths(self.rows())

    def rows(self) -> list[dict]:
        """Return metrics.csv as numbers; NaN where a run that went on has rows from before a column was there."""
        return numbers(self.history or read_metrics(self.path / "metrics.csv"))

    def go_on(self, history: list[dict], stage: int, epoch: int, run_epoch: int) -> None:
        """Make metrics.csv what it was after `epoch` finished epochs of `stage`, the `run_epoch`-th of the run.

        Args:
            history: its rows as the checkpoint has them; empty for an older one, where the file itself is read.
        """
        self.claimed, self._purge_step = True, run_epoch + 1
        clear_left(self.path, NAMES)
        self.history = [dict(row) for row in history] or [
            row for row in read_metrics(self.path / "metrics.csv")
            if (int(row["stage"]), int(row["epoch"])) <= (stage, epoch)]
        if self.history:
            self.write_csv("metrics.csv", self.history)
        else:
            (self.path / "metrics.csv").unlink(missing_ok=True)

    def write_csv(self, name: str, rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> None:
        """Save rows as a CSV of these columns."""
        write_table(self.file(name), columns, ({key: as_known(value) for key, value in row.items()} for row in rows))

    def draw_curves(self) -> None:
        """Draw training_curves.png from metrics.csv."""
        with said_and_passed_over("training_curves.png"):
            training_curves(self.rows(), self.file("training_curves.png"))

    def show_stage(self, survey: StageSurvey, run_epoch: int) -> None:
        """Write what was found at the end of a stage: predictions_stage_X.png, validation_stage_X.npz, and examples for
        TensorBoard."""
        name = f"predictions_stage_{survey.stage}.png"
        threshold = float(survey.tables["threshold"])
        with said_and_passed_over(name):
            predictions(survey.shown, self.file(name), threshold, survey.title)
        with said_and_passed_over(f"validation_stage_{survey.stage}.npz"):
            save_cases(self.file(f"validation_stage_{survey.stage}.npz"), survey.examples, **survey.tables)
        with said_and_passed_over("the logs for TensorBoard"):
            self.logs().add_examples(survey.examples, threshold, run_epoch)

    def show_test(self, cases: list[Case]) -> None:
        """Write test_cases.npz: images of the test split with their predictions."""
        with said_and_passed_over("test_cases.npz"):
            save_cases(self.file("test_cases.npz"), cases)

    def log_scores(self, settings: dict, scores: dict[str, float]) -> None:
        """Write the settings with what came of them for TensorBoard."""
        with said_and_passed_over("the logs for TensorBoard"):
            self.logs().add_scores(settings, scores)

    def log_graph(self, network: torch.nn.Module) -> None:
        """Write the graph of the network for TensorBoard."""
        with said_and_passed_over("the logs for TensorBoard"):
            self.logs().add_graph(network)

    def prune(self) -> None:
        """Remove the oldest stage_X_epoch_Y.pth beyond the number to keep."""
        saved = sorted((path for path in self.path.iterdir() if re.fullmatch(OF_EPOCHS, path.name)),
                       key=lambda p: [int(n) for n in re.findall(r"\d+", p.stem)])
        for path in saved[:max(len(saved) - self.keep, 0)]:
            path.unlink()

    def logs(self) -> Logs:
        """Return the logs, opened when first needed."""
        if self._logs is None:
            self._logs = Logs(self.file("logs"), self._purge_step)
        return self._logs

    def close(self) -> None:
        """Finish the logs."""
        if self._logs is not None:
            with said_and_passed_over("the logs for TensorBoard"):
                self._logs.close()
            self._logs = None

    def _clear(self) -> None:
        """Remove what an earlier run wrote here, and nothing else that lies in the folder."""
        for path in self.path.iterdir():
            if path.is_file() and RUN_FILES.fullmatch(path.name):
                path.unlink()
        clear_logs(self.path / "logs")


def read_metrics(path: Path) -> list[dict]:
    """Return the whole rows of a metrics.csv as text, [] where there is none; a torn end is left out."""
    return [row for row in read_table(path) if is_epoch_row(row)]


def numbers(rows: list[dict[str, str]]) -> list[dict[str, float]]:
    """Return rows of metrics.csv, which are text, as numbers; NaN for a column that older ones lack, and for words."""
    return [{name: number_in(row.get(name, "")) for name in COLUMNS} for row in rows]


@contextlib.contextmanager
def said_and_passed_over(what: str) -> Iterator[None]:
    """Let no training end because of what can be done without: say what the disk refused."""
    try:
        yield
    except (OSError, UserError) as error:
        print(f"warning: {what} cannot be written ({getattr(error, 'strerror', None) or error}); the training goes on")


def environment() -> dict:
    """Return versions, git commit, threads and machine, for config.json."""
    try:
        commit = subprocess.run(["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty",
                                 "--abbrev=40", "--exclude=*"], capture_output=True, text=True, timeout=10)
        git = commit.stdout.strip() if commit.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        git = None
    return {"packages": {name: version_of(name) for name in PACKAGES}, "python": platform.python_version(),
            "git_commit": git, "machine": platform.machine(), "system": platform.system(),
            "cpu_count": os.cpu_count(), "torch_threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def version_of(package: str) -> str | None:
    """Return the version of a package; None where it is there under another name, as tb-nightly is."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
