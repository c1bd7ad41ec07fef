"""Train the stages of a plan one after the other, as `ProgressiveTrainer.fit` does, and show what each has learnt."""

from reporting.report import refresh_report
from system.devices import random_states, set_random_states
from training.batches import Loader
from training.console import epoch_lines
from training.run_bar import RunBar
from training.run_folder import said_and_passed_over
from training.survey import survey_stage
from training.time_limit import deal_time
from unet import STAGE_RESOLUTIONS


def train_stages(trainer, dataloaders: dict[int, tuple], bar: RunBar) -> None:
    """Train the planned stages that are not finished.

    Args:
        trainer: a ProgressiveTrainer.
        dataloaders: as for `ProgressiveTrainer.fit`.
        bar: says a line an epoch.
    """
    course, limit = trainer.course, trainer.time_limit
    stage = course.next_stage(trainer.model.stage)
    while stage is not None:
        trainer.set_stage(stage)
        train_loader, valid_loader = dataloaders[STAGE_RESOLUTIONS[stage]][:2]
        bar.enter(trainer.finished_epochs)
        if limit:
            limit.begin_stage()
        while course.left(stage) > 0:
            epoch = trainer.finished_epochs
            train = trainer.train_epoch(train_loader, epoch)
            valid = trainer.validate_epoch(valid_loader, epoch)
            trainer.record(train, valid)
            bar.validated(valid["dice"])
            for line in epoch_lines(stage, epoch, trainer.plan.epochs[stage], train, valid, bar.left_in_words()):
                bar.say(line)
            if limit:
                limit.end_epoch(stage)
                deal_time(trainer)
            if course.left(stage) > 0 or course.next_stage(stage + 1):
                trainer.keeper.between_epochs()
        if trainer.folder:
            show_stage(trainer, valid_loader)
        stage = course.next_stage(stage + 1)


def show_stage(trainer, loader: Loader) -> None:
    """Write pictures and report of the stage that has ended; what comes after is as if nothing had been drawn.

    Args:
        trainer: a ProgressiveTrainer that has a folder.
        loader: of the validation images at this stage.
    """
    states, folder, stage = random_states(trainer.device), trainer.folder, trainer.model.stage
    with said_and_passed_over(f"predictions_stage_{stage}.png"):
        folder.show_stage(survey_stage(trainer, loader), trainer.course.run_epoch(stage))
    refresh_report(folder.path)
    set_random_states(states, trainer.device)
