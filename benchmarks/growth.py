"""Trainings with equal operations, several arms and seeds: one process each, resumable, and the tables they leave.

A study is a folder: settings.json, trainings.csv (a row a training), images.csv (a row an image and training),
epochs.csv (a row an epoch) and runs/, where the run folders lie. The three tables are enough for the report.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path

from benchmarks.growth_arms import IMAGE_ONCE, USUAL, read_image_once, train_as_usual
from benchmarks.growth_tables import (
    EPOCHS,
    IMAGES,
    KEYS,
    MINUTES,
    SETTINGS,
    TRAININGS,
    key_of,
    put_rows,
    study_settings,
    study_table,
    work_of,
)
from system.errors import UserError
from training.schedule import CLASSIC_WORK, WORK
from training.settings import grows, parse

# Torch, NumPy and all modules that need them are imported inside the functions: wrong options answer at once.

RUNS, RESULT = "runs", "result.json"
# Options that the study decides; that belong to an arm; that all arms must have alike, because they change the data.
DECIDED = ("budget", "max_minutes", "seed", "output_dir", "experiment_name", "resume", "overwrite", "dry_run",
           "overfit", "epochs_per_stage", "keep", "save_every")
OF_ARMS = ("progressive", "model", "shares", "start_stage")
OF_DATA = ("data_root", "in_channels", "out_channels", "targets", "use_augmented")
# Settings in which trainings may differ and yet be compared.
FREE = {*DECIDED, "data_root", "device", "num_workers", "cache_images", "preset", "by_hand", "command", "data_report",
        "resolved"}
OF_GROWING = {"shares", "old_lr_scale"}  # change nothing in an arm that does not grow


@dataclass(frozen=True)
class Training:
    """One training of a study.

    Args:
        out: folder of the study.
        budget: how long it trains: operations, in epochs at 256 pixels ('10'), or minutes ('5min').
        options: of train_papsmear.py, those of the arm included.
    """

    out: Path
    arm: str
    budget: str
    seed: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}_{self.budget}_{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / RUNS / self.name

    @property
    def key(self) -> dict[str, str]:
        """Return what identifies the training in the tables, as text."""
        return dict(zip(KEYS, (self.arm, self.budget, str(self.seed)), strict=True))

    def settings(self) -> argparse.Namespace:
        """Return the checked settings; a training that was cut off is not replaced but continued."""
        begun = (self.folder / "last.pth").exists()
        minutes = self.budget.removesuffix(MINUTES)
        length = ("--budget", self.budget) if minutes == self.budget else ("--max_minutes", minutes)
        return parse([*self.options, *length, "--seed", str(self.seed), "--output_dir",
                      str(self.folder.parent), "--experiment_name", self.name, "--keep", "0",
                      *([] if begun else ["--overwrite"])])


def planned(out: Path, arms: dict[str, str], budget: str, seeds: range, options: list[str]) -> list[Training]:
    """Return the trainings of a study, all arms of one seed before the next seed.

    Raises:
        UserError: for options that the study decides or train_papsmear.py refuses, and for a data set that is not one.
    """
    from images.splits import find_data_root, list_splits

    refuse_decided(options, (*DECIDED, *OF_ARMS), "the study: by --arms or --arm, --budget or --minutes, "
                                                  "--seeds and --out")
    if USUAL in arms and budget.endswith(MINUTES):
        raise UserError(f"arm {USUAL} takes --budget alone: its script has no time limit. Leave it out")
    own = {arm: arm_words(arm, text) for arm, text in arms.items()}
    trainings = [Training(out, arm, budget, seed, (*options, *own[arm])) for seed in seeds for arm in arms]
    for training in trainings:
        settings = training.settings()
    list_splits(find_data_root(settings.data_root), settings.use_augmented)
    return trainings


def refuse_decided(words: Sequence[str], names: Iterable[str], by: str) -> None:
    """Raise UserError if one of these options is among the words of a command."""
    given = {word.split("=")[0] for word in words}
    for name in names:
        if f"--{name}" in given:
            raise UserError(f"--{name} is decided by {by}. Leave it out")


def arm_words(arm: str, text: str) -> list[str]:
    """Return the options of an arm as words; a backslash stays one."""
    reader = shlex.shlex(text, posix=True)
    reader.whitespace_split, reader.escape, reader.commenters = True, "", ""
    try:
        words = list(reader)
    except ValueError as error:
        raise UserError(f"--arm {arm}={text}: {error}. Close every quote") from None
    refuse_decided(words, DECIDED, f"the study, not by arm {arm}")
    refuse_decided(words, OF_DATA, f"all arms together, not by arm {arm}: they are compared on the same images")
    return words


def comparable(settings: argparse.Namespace) -> dict:
    """Return the settings that trainings which are compared have alike within an arm, as JSON gives them back."""
    free = FREE if grows(settings) else FREE | OF_GROWING
    return json.loads(json.dumps({key: value for key, value in vars(settings).items() if key not in free}))


def first_difference(was: dict, now: dict) -> str | None:
    """Say in which setting two trainings differ, None if in none; options that are younger had their defaults."""
    was = comparable(parse([])) | was
    return next((f"was begun with {key} {was.get(key)}, asked for is {now[key]}" for key in now
                 if was.get(key) != now[key]), None)


def check_settings(out: Path, trainings: list[Training], options: list[str]) -> list[str]:
    """Write the settings of a study, or compare them with those of its finished trainings; other arms may join.

    Returns:
        The names of all its arms, those of before first.
    Raises:
        UserError: for other options, or other options of an arm: its rows would not compare.
    """
    from training.run_folder import RunFolder, environment

    path, rows = out / SETTINGS, study_table(out, TRAININGS)
    kept = study_settings(out) if rows else {}
    if kept and work_of(kept) != WORK:
        raise UserError(f"{path}: this study was begun with a network of other operations. Its trainings would not "
                        f"compare. Choose another --out")
    common = {key: value for key, value in comparable(parse(options)).items() if key not in OF_ARMS}
    arms = {training.arm: comparable(training.settings()) for training in trainings}
    pairs = [("this study", kept.get("common", common), common)]
    pairs += [(f"arm {arm}", kept.get("arms", {}).get(arm, arms[arm]), arms[arm]) for arm in arms]
    for name, was, now in pairs:
        if differing := first_difference(was, now):
            raise UserError(f"{path}: {name} {differing}. Its trainings would not compare. Choose another --out, or "
                            f"another name for the arm")
    arms = kept.get("arms", {}) | arms
    RunFolder(out).write_json(SETTINGS, {"environment": environment()} | kept | {
        "work": list(WORK.values()), "options": options, "common": common, "arms": arms})
    return list(dict.fromkeys([*arms, *(row["arm"] for row in rows)]))


def run_study(out: Path, trainings: list[Training], arms: list[str], jobs: int) -> None:
    """Run what is not finished, `jobs` at a time; each finished training is added to the tables at once.

    Args:
        arms: of the study, in the order of the tables.
    Raises:
        UserError: if a training failed; the others are finished first.
    """
    from system.machine import cpu_count

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // jobs)))  # of each process that is started
    finished = [key_of(row) for row in study_table(out, TRAININGS)]
    missing = [training for training in trainings if training.key not in finished]
    print(f"{len(trainings)} trainings, {len(missing)} to run, {jobs} at a time; logs: {out / RUNS}/NAME.log",
          flush=True)
    failed = []
    for training, code in run_in_processes(missing, jobs):
        if code:
            failed.append(training)
            print(f"{training.name} failed with exit code {code}; see {training.folder}.log", flush=True)
            continue
        result = json.loads((training.folder / RESULT).read_text(encoding="utf-8"))
        put_rows(out, training.key, result, arms)
        row = result[TRAININGS][0]
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
            complete(training)
        except UserError as error:
            print(error)
            sys.exit(2)
        except BaseException:  # also Ctrl-C: the log says why it ended
            traceback.print_exc()
            sys.exit(1)


def complete(training: Training) -> None:
    """Train what is left and write result.json: the rows of each table, without the keys."""
    from inference import Predictor
    from train_papsmear import prepare

    settings = training.settings()
    model, trainer, loaders = prepare(settings, training.folder)
    first = model.stage
    if training.arm == IMAGE_ONCE:
        read_image_once(model)
    # The first digits for train, valid and test each.
    data = "".join(part[:4] for part in trainer.config["data_fingerprint"].split())
    check_data(training, data)
    if (training.folder / "last.pth").exists():
        check_begun(training, trainer.config)
        trainer.resume(training.folder / "last.pth")
    if training.arm == USUAL:
        logged = train_as_usual(trainer, loaders[256], settings.epochs_per_stage[-1])
    else:
        trainer.fit(loaders)
        logged = trainer.folder.rows()
    work = WORK if settings.model == "pgunet" else {4: CLASSIC_WORK}
    operations = list(accumulate(work[int(row["stage"])] for row in logged))
    times = {name: list(accumulate(row[name] for row in logged)) for name in ("seconds", "processor_seconds")}
    epochs = [{"stage": int(row["stage"]), "epoch": int(row["epoch"]), "operations": operations[i],
               "dice": round(row["dice"], 5)} | {name: round(done[i], 1) for name, done in times.items()}
              for i, row in enumerate(logged)]
    predictor = Predictor(trainer.folder.file("final_model.pth"), str(trainer.device), trainer.precision)
    images = [{"split": split} | row for number, split in ((1, "valid"), (2, "test"))
              for row in score_images(predictor, settings, loaders[256][number].dataset, split)]
    stages = Counter(row["stage"] for row in epochs)
    row = {"epochs": ",".join(str(stages[stage]) for stage in WORK if stage >= first), "operations": operations[-1],
           "images_seen": len(epochs) * len(loaders[256][0].dataset), "data": data}
    row |= {name: round(done[-1], 1) for name, done in times.items()}
    row |= {f"{name}_{split}": mean_of(images, split, name) for name in ("dice_256", "dice", "aji")
            for split in ("valid", "test")}
    trainer.folder.write_json(RESULT, {TRAININGS: [row], IMAGES: images, EPOCHS: epochs})


def check_data(training: Training, data: str) -> None:
    """Raise UserError if the finished trainings of the study saw other data."""
    others = {row["data"] for row in study_table(training.out, TRAININGS)} - {data}
    if others:
        raise UserError(f"the data set has the fingerprint {data}, but that of the finished trainings in "
                        f"{training.out} is {', '.join(sorted(others))}; they would not compare. Give --data_root of "
                        f"the same files, or choose another --out")


def check_begun(training: Training, config: dict) -> None:
    """Raise UserError if the training was begun with other settings or data than it would go on with."""
    from checkpoints import load_checkpoint

    saved = load_checkpoint(training.folder / "last.pth")["config"]
    was, now = (comparable(argparse.Namespace(**settings)) for settings in (saved, config))
    if differing := first_difference(was, now):
        raise UserError(f"{training.folder}: this training {differing}. Remove the folder, or choose another --out")


def score_images(predictor, settings: argparse.Namespace, dataset, split: str) -> list[dict]:
    """Score a network on each image of a split: Dice at 256 pixels and at the original size, AJI; and tell its group.

    Where training sees tiles, these have a Dice at 256, and the whole images, in rows of their own, the other two. AJI
    is there where every image has an instance map.
    """
    import torch

    from images.targets import instance_file
    from scoring.measures import pixel_metrics
    from scoring.scores import score_pairs, scored_pairs
    from system.text import cell

    rows: dict[str, dict] = {}
    for i, group in enumerate(map(cell, dataset.groups(settings.group_regex))):
        sample = dataset[i]
        found = torch.from_numpy(predictor.predict(sample["image"].permute(1, 2, 0).numpy())).permute(2, 0, 1)[None]
        pair = [tensor[:, :predictor.classes] for tensor in (found >= predictor.threshold, sample["mask"][None] >= 0.5)]
        rows[sample["name"]] = {"group": group, "dice_256": round(float(pixel_metrics(*pair)["dice"].mean()), 5)}
    pairs = scored_pairs(Path(settings.data_root), split, settings.use_augmented)
    instances = all(instance_file(pair) is not None for pair in pairs)
    for score in score_pairs(predictor, pairs, instances, settings.group_regex):
        rows.setdefault(score["image"], {}).update({"group": score["group"]} | {
            name: round(score[name], 5) for name in ("dice", "aji") if name in score})
    return [{"image": name} | row for name, row in rows.items()]


def mean_of(images: list[dict], split: str, name: str) -> float | str:
    """Return the mean of a score over the images of a split that have it, '' if none has."""
    values = [row[name] for row in images if row["split"] == split and name in row]
    return round(sum(values) / len(values), 5) if values else ""
