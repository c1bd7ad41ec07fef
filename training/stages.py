"""Train the stages of a plan one after the other, as `ProgressiveTrainer.fit` does."""

from training.console import epoch_lines
from training.run_bar import RunBar
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
        trainer.show_stage(valid_loader)
        stage = course.next_stage(stage + 1)
