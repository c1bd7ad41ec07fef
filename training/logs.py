"""The logs of a run for TensorBoard: one chart a measure over the whole run, one curve for train and one for valid.

    logs/train    loss, soft Dice and pixel measures of training, rate, seconds, images a second; graph of the network
    logs/valid    the same measures of validation; the same example images at the end of every stage
    logs/growths  when the network grew, as text
    logs/scores   settings with the scores that came of them

The step is the epoch of the run. Where a run goes on after a kill, TensorBoard forgets what lies behind that point.
"""

import contextlib
import copy
import io
import warnings
from pathlib import Path

import torch

from scoring.cases import Case
from scoring.measures import PIXEL_METRICS
from scoring.pictures import examples_picture

FOLDERS = ("train", "valid", "growths", "scores")
OF_PASSES = ("loss", "soft_dice", *PIXEL_METRICS)
OF_SPEED = ("seconds", "processor_seconds", "images_per_second")
TRACED_SIDE = 64  # pixels of the image with which the graph is traced
GROWTH = "stage {stage:.0f}, {resolution:.0f}x{resolution:.0f} pixels: from epoch {first} of the run on"


def tag_of(name: str) -> str:
    """Return the name of a chart: those of one group stand together."""
    if name in OF_PASSES:
        return f"{'measures' if name in PIXEL_METRICS[1:] else 'main'}/{name}"
    return f"{'speed' if name in OF_SPEED else 'steps' if name != 'foreground' else 'measures'}/{name}"


class Logs:
    """Write the logs; a folder is made by the first thing that is written into it.

    Args:
        path: logs/ of the run folder.
        purge_step: the first epoch of the run that an earlier process may have logged and this one trains again.
    """

    def __init__(self, path: Path, purge_step: int | None = None):
        self.path, self._purge_step = Path(path), purge_step
        self._writers: dict = {}

    def add_epoch(self, row: dict, train: dict | None = None) -> None:
        """Add one epoch.

        Args:
            row: of metrics.csv.
            train: what `train_epoch` returned; without it what the row has of it.
        """
        step = int(row["run_epoch"])
        of_train = {name: value for name, value in (train or {}).items() if name in OF_PASSES} | {
            name: row[f"train_{name}"] for name in ("loss", "soft_dice")}
        of_valid = {name: row[name] for name in (*OF_PASSES, "foreground")}
        rest = {name: row[name] for name in ("lr", "gradient_norm", "skipped_steps", "loss_scale", *OF_SPEED)}
        for split, values in (("train", of_train | rest), ("valid", of_valid)):
            for name, value in values.items():
                self._writer(split).add_scalar(tag_of(name), value, step)
        for writer in self._writers.values():
            writer.flush()

    def add_growths(self, rows: list[dict]) -> None:
        """Add when each stage began, in the place of what was added before.

        Args:
            rows: of metrics.csv so far, as numbers.
        """
        lines = [GROWTH.format(first=i + 1, **row) for i, row in enumerate(rows)
                 if i == 0 or row["stage"] != rows[i - 1]["stage"]]
        self._anew("growths").add_text("growths", "\n\n".join(lines), 0)
        self._close("growths")

    def add_examples(self, cases: list[Case], threshold: float, step: int) -> None:
        """Add a picture of the example images with their outlines, over their probabilities."""
        self._writer("valid").add_image("examples", examples_picture(cases, threshold), step, dataformats="HWC")

    def add_graph(self, network: torch.nn.Module) -> None:
        """Add the graph of a network as it stands; it is copied, and stays as it is."""
        still = copy.deepcopy(network).cpu().float().eval()
        image = torch.zeros(1, still.in_channels, TRACED_SIDE, TRACED_SIDE)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # of tracing, and of what it skips
            warnings.simplefilter("ignore")
            # Traced twice, names of modules differ, which the check of `add_graph` itself takes for another graph.
            self._writer("train").add_graph(torch.jit.trace(still, image, check_trace=False), image)

    def add_scores(self, settings: dict, scores: dict[str, float]) -> None:
        """Add the settings of the run with what came of them, in the place of earlier ones."""
        from torch.utils.tensorboard.summary import hparams

        plain = {name: value if isinstance(value, bool | int | float | str) else str(value)
                 for name, value in settings.items() if value is not None}
        writer = self._anew("scores")
        for summary in hparams(plain, scores):
            writer.file_writer.add_summary(summary)
        for name, value in scores.items():
            writer.add_scalar(name, value, 0)
        self._close("scores")

    def close(self) -> None:
        """Finish all files."""
        for name in list(self._writers):
            self._close(name)

    def _writer(self, name: str):
        if name not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # half a second, and only runs that write need it
            self._writers[name] = SummaryWriter(self.path / name, purge_step=self._purge_step)
        return self._writers[name]

    def _anew(self, name: str):
        """Return the writer of a folder, from which TensorBoard's files were removed."""
        self._close(name)
        remove_events(self.path / name)
        return self._writer(name)

    def _close(self, name: str) -> None:
        if name in self._writers:
            self._writers.pop(name).close()


def remove_events(folder: Path) -> None:
    """Remove the files of TensorBoard from a folder, and the folder if nothing else lies in it."""
    if folder.is_dir():
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def clear_logs(path: Path) -> None:
    """Remove the logs of a run, and nothing else."""
    for folder in (*(path / name for name in FOLDERS), path):
        remove_events(folder)
