"""Trainings with equal operations, several arms and seeds: one process each, resumable, and the tables they leave.

A study is a folder: settings.json, trainings.csv (a row a training), images.csv (a row an image and training),
epochs.csv (a row an epoch) and runs/, where the run folders lie. The three tables are enough for the report.
"""

import csv
import json
import multiprocessing
import os
import shlex
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from system.errors import UserError
from training.schedule import CLASSIC_WORK, WORK
from training.settings import parse

# Torch and all modules that need it are imported inside the functions: wrong options answer at once.

# Name -> options of train_papsmear.py, which takes the budget besides.
ARMS = {
    "direct": "--progressive false",
    "grown": "",
    "late": "--shares 5,9,34,52",
    "unet": "--model unet",
}
KEYS = ("arm", "budget", "seed")
TABLES = {
    "trainings.csv": (*KEYS, "epochs", "operations", "images_seen", "seconds", "processor_seconds", "dice_256_valid",
                      "dice_256_test", "dice_valid", "dice_test", "aji_valid", "aji_test", "data"),
    "images.csv": (*KEYS, "split", "image", "dice_256", "dice", "aji"),
    "epochs.csv": (*KEYS, "stage", "epoch", "operations", "dice"),
}
SETTINGS, RUNS, RESULT = "settings.json", "runs", "result.json"
# Options that the study decides; those of the second line belong to an arm.
DECIDED = ("budget", "seed", "output_dir", "experiment_name", "resume", "overwrite", "dry_run", "overfit",
           "progressive", "model", "shares", "epochs_per_stage", "start_stage")


@dataclass(frozen=True)
class Training:
    """One training of a study.

    Args:
        out: folder of the study.
        options: of train_papsmear.py, those of the arm included.
    """

    out: str
    arm: str
    budget: float
    seed: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}_{self.budget:g}_{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.out, RUNS, self.name)

    @property
    def key(self) -> tuple[str, ...]:
        """Return what identifies the training in the tables, as text."""
        return self.arm, f"{self.budget:g}", str(self.seed)

    def settings(self):
        """Return the checked settings; a training that was cut off is not replaced but continued."""
        fixed = [] if any(word.startswith("--epochs_per_stage") for word in self.options) else ["--budget",
                                                                                               str(self.budget)]
        begun = (self.folder / "last.pth").exists()
        return parse([*self.options, *fixed, "--seed", str(self.seed), "--output_dir", str(self.folder.parent),
                      "--experiment_name", self.name, "--keep", "0", *([] if begun else ["--overwrite"])])


def planned(out: str, arms: dict[str, str], budget: float, seeds: range, options: list[str]) -> list[Training]:
    """Return the trainings of a study, all arms of one seed before the next seed.

    Raises:
        UserError: for options that the study decides, or that train_papsmear.py refuses.
    """
    given = {word.split("=")[0] for word in options}
    for name in DECIDED:
        if f"--{name}" in given:
            raise UserError(f"--{name} is decided by the study: by --arms or --arm, --budget, --seeds and --out. Leave "
                            f"it out")
    trainings = [Training(out, arm, budget, seed, (*options, *shlex.split(arms[arm]))) for seed in seeds
                 for arm in arms]
    for training in trainings:
        training.settings()
    return trainings


def check_settings(out: Path, arms: dict[str, str], options: list[str]) -> list[str]:
    """Write the settings of a study, or compare them with those it was begun with; other arms may join.

    Returns:
        The names of all its arms, those of before first.
    Raises:
        UserError: for other options, or other options of an arm: its rows would not compare.
    """
    from training.run_folder import RunFolder, environment

    path, kept = out / SETTINGS, {}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        differing = [arm for arm in arms if kept["arms"].get(arm, arms[arm]) != arms[arm]]
        if kept["options"] != options or differing:
            was, asked = (kept["options"], options) if kept["options"] != options else (
                {arm: kept["arms"][arm] for arm in differing}, {arm: arms[arm] for arm in differing})
            raise UserError(f"{path}: this study was begun with {was}, asked for is {asked}. Its trainings would not "
                            f"compare. Choose another --out, or another name for the arm")
    arms = kept.get("arms", {}) | arms
    RunFolder(out).write_json(SETTINGS, {"environment": environment()} | kept | {"options": options, "arms": arms})
    return list(arms)


def read_table(out: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of a table, as text; none if it is not there yet."""
    path = out / name
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_study(out: Path, trainings: list[Training], arms: list[str], jobs: int) -> None:
    """Run what is not finished, `jobs` at a time; each finished training is added to the tables at once.

    Args:
        arms: all of the study, in the order of the tables.
    Raises:
        UserError: if a training failed; the others are finished first.
    """
    from system.machine import cpu_count
    from training.run_folder import RunFolder

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // jobs)))  # of each process that is started
    tables = {name: read_table(out, name) for name in TABLES}
    finished = {tuple(row[key] for key in KEYS) for row in tables["trainings.csv"]}
    missing = [training for training in trainings if training.key not in finished]
    print(f"{len(trainings)} trainings, {len(missing)} to run, {jobs} at a time; logs: {out / RUNS}/NAME.log",
          flush=True)
    failed = []
    for training, code in run_in_processes(missing, jobs):
        if code:
            failed.append(training)
            print(f"{training.name} failed; see {training.folder}.log", flush=True)
            continue
        result = json.loads((training.folder / RESULT).read_text(encoding="utf-8"))
        for name, rows in tables.items():
            mine = dict(zip(KEYS, training.key, strict=True))
            rows += [mine | row for row in result[name]]
            rows.sort(key=lambda row: (float(row["budget"]), arms.index(row["arm"]), int(row["seed"])))
            RunFolder(out).write_csv(name, rows, TABLES[name])
        row = result["trainings.csv"][0]
        print(f"{training.name:<16} epochs {row['epochs']:<10} Dice at 256: valid {row['dice_256_valid']}, test "
              f"{row['dice_256_test']}; {float(row['processor_seconds']):.0f} s of processor time", flush=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} trainings failed: {', '.join(t.name for t in failed)}. The "
                        f"reason is at the end of {failed[0].folder}.log; the same command tries them again")


def run_in_processes(trainings: list[Training], jobs: int) -> Iterator[tuple[Training, int]]:
    """Run each training in a process of its own and yield it with its exit code when it ends."""
    context = multiprocessing.get_context("spawn")
    waiting, running = list(trainings), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                training = waiting.pop(0)
                process = context.Process(target=run_training, args=(training,))
                process.start()
                running[process.sentinel] = process, training
            for sentinel in wait(list(running)):
                process, training = running.pop(sentinel)
                process.join()
                yield training, process.exitcode
    finally:
        for process, _ in running.values():
            process.terminate()


def end_with_parent() -> None:
    """Let this process end when the one that started it ends, even if that was killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def run_training(training: Training) -> None:
    """Train, or go on; score the last weights; leave the rows of the tables in the run folder."""
    end_with_parent()
    training.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{training.folder}.log", "a", encoding="utf-8", buffering=1) as log, redirect_stdout(log), \
            redirect_stderr(log):
        try:
            train_and_score(training)
        except UserError as error:
            print(error)
            sys.exit(2)


def train_and_score(training: Training) -> None:
    """Train and write result.json: the rows of each table, without the keys."""
    from train_papsmear import prepare

    settings = training.settings()
    _, trainer, loaders = prepare(settings, training.folder)
    if (training.folder / "last.pth").exists():
        trainer.resume(training.folder / "last.pth")
    trainer.fit(loaders)
    work = WORK if settings.model == "pgunet" else {4: CLASSIC_WORK}
    epochs, done = [], 0
    for row in trainer.folder.rows():
        done += work[int(row["stage"])]
        epochs.append({"stage": int(row["stage"]), "epoch": int(row["epoch"]), "operations": done,
                       "dice": round(row["dice"], 5)})
    images = [{"split": split} | row for number, split in ((1, "valid"), (2, "test"))
              for row in score_images(trainer, settings, loaders[256][number].dataset, split)]
    names = dict.fromkeys((split, name) for split in ("valid", "test") for name in ("dice_256", "dice", "aji"))
    means = {f"{name}_{split}": mean_of(images, split, name) for split, name in names}
    data = "".join(part[:4] for part in trainer.config["data_fingerprint"].split())  # of train, valid and test
    row = {"epochs": ",".join(map(str, settings.epochs_per_stage)), "operations": done,
           "images_seen": len(epochs) * len(loaders[256][0].dataset), "data": data}
    row |= {name: round(sum(r[name] for r in trainer.folder.rows()), 1) for name in ("seconds", "processor_seconds")}
    trainer.folder.write_json(RESULT, {"trainings.csv": [row | means], "images.csv": images, "epochs.csv": epochs})


def score_images(trainer, settings, dataset, split: str) -> list[dict]:
    """Score the last weights on each image of a split: Dice at 256 pixels and at the original size, AJI.

    Where training sees tiles, these have a Dice at 256, and the whole images, in rows of their own, the other two. AJI
    is there where every image has an instance map.
    """
    import torch

    from images.targets import instance_file
    from inference import Predictor
    from scoring.measures import pixel_metrics
    from scoring.scores import score_pairs, scored_pairs

    predictor = Predictor(trainer.folder.file("final_model.pth"), str(trainer.device), trainer.precision)
    rows: dict[str, dict] = {}
    for i in range(len(dataset)):
        sample = dataset[i]
        found = torch.from_numpy(predictor.predict(sample["image"].permute(1, 2, 0).numpy())).permute(2, 0, 1)[None]
        pair = [tensor[:, :predictor.classes] for tensor in (found >= predictor.threshold, sample["mask"][None] >= 0.5)]
        rows[sample["name"]] = {"dice_256": round(float(pixel_metrics(*pair)["dice"].mean()), 5)}
    pairs = scored_pairs(Path(settings.data_root), split, settings.use_augmented)
    instances = all(instance_file(pair) is not None for pair in pairs)
    for score in score_pairs(predictor, pairs, instances):
        rows.setdefault(score["image"], {}).update(
            {name: round(score[name], 5) for name in ("dice", "aji") if name in score})
    return [{"image": name} | row for name, row in rows.items()]


def mean_of(images: list[dict], split: str, name: str) -> float | str:
    """Return the mean of a score over the images of a split that have it, '' if none has."""
    values = [row[name] for row in images if row["split"] == split and name in row]
    return round(sum(values) / len(values), 5) if values else ""
