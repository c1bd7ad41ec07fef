"""Train a network that grows: one optimizer, one schedule, one set of weights.

    trainer = ProgressiveTrainer(model, device="auto", epochs_per_stage=50, output_dir="outputs/my_run")
    trainer.fit(create_progressive_dataloaders("data"))

or, with the same weights for the same seed, the loop that `fit` runs: `set_stage`, `train_epoch`, `validate_epoch`,
`record`. Without `record` nothing is selected. Pictures and final_model.pth are written by `fit` alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from checkpoints import check_plain, save_checkpoint
from images.recipe import DataRecipe
from reporting.report import refresh_report
from system.devices import autocast, choose_device, choose_precision, fitting, random_states, set_random_states
from system.errors import UserError
from system.notebooks import Described, LiveFigure
from system.processes import is_main_process, progress, world_size
from training.averaging import AveragedNetwork
from training.batches import Loader, agreed_recipe, check_batch, check_loader, finest_masks, recipe_for
from training.course import Course
from training.epoch import TrainingEpoch
from training.keeping import Keeper
from training.loss import multi_scale_loss, refuse_non_finite
from training.means import PassMeasures
from training.memory import memory_explained, refuse_large_batches
from training.optimization import parameter_groups
from training.parallel import ParallelSteps, synchronised
from training.run_bar import RunBar
from training.run_folder import COLUMNS, OF_STEPS, RunFolder, numbers, said_and_passed_over
from training.schedule import OLD_LR_SCALE, WORK, TrainingPlan, epochs_by_stage
from training.snapshots import restore, snapshot
from training.space import refuse_lack_of_space
from training.stages import train_stages
from training.steps import OptimizerSteps
from training.survey import survey_stage
from training.time_limit import TimeLimit, rehearse
from unet import LAST_STAGE, STAGE_RESOLUTIONS, Network


class ProgressiveTrainer(Described):
    """Train, validate, save and resume.

    Args:
        model: ProgressiveUNet or UNet. Stages below the one at which it stands now are not planned.
        device: 'auto' (cuda, else mps, else cpu) or one of them.
        epochs_per_stage: one number, or one a stage.
        lr: full learning rate of AdamW.
        precision: 'auto' (bfloat16 where it pays, else float32), 'bfloat16', 'float16' (CUDA alone) or 'float32'.
        seed: of torch's generators.
        output_dir: run folder; without it nothing is written.
        accumulate: batches that make one step, every image of which counts alike.
        save_every: epochs between two stage_X_epoch_Y.pth.
        keep: how many of them stay.
        schedule, old_lr_scale: see training.schedule.TrainingPlan.
        weight_decay: of convolution weights; never on batch normalisation and biases.
        clip_norm: largest norm of the gradients, above which they are scaled down; 0 is off.
        average: decay of an exponential moving average of the weights, which is then validated and saved (see
            training/averaging.py); 0 is off.
        threshold: probability from which a pixel is foreground.
        recipe: the data recipe (see images/recipe.py), for a loader that does not carry it. Without both it is made
            from one pass over the first loader that is trained on.
        compile: run training steps through `torch.compile`, once a stage and size of batch; not in
            the first 10 batches of a part, whose statistics count otherwise.
        time_limit: decides in place of `epochs_per_stage` how long `fit` trains (see training/time_limit.py).
        overwrite: whether a run that lies in `output_dir` may be replaced.
        config: settings to keep in checkpoints and config.json (plain types).
        save_minutes: between two last.pth within an epoch, which `resume` goes on from with the next batch; 0 saves
            at the end of epochs alone.
    Raises:
        UserError: for a device or precision that is not there and settings out of range.
    """

    def __init__(self, model: Network, device="auto", epochs_per_stage: int | Sequence[int] = 50, lr: float = 1e-3,
                 precision: str = "auto", seed: int = 0, output_dir=None, *, accumulate: int = 1, save_every: int = 10,
                 keep: int = 3, schedule: str = "run", old_lr_scale: float = OLD_LR_SCALE,
                 weight_decay: float = 1e-2, clip_norm: float = 0.0, average: float = 0.0, threshold: float = 0.5,
                 recipe: DataRecipe | None = None, compile: bool = False, time_limit: TimeLimit | None = None,
                 overwrite: bool = False, config: dict | None = None, save_minutes: float = 10.0):
        lr, old_lr_scale, weight_decay, average, threshold = map(
            float, (lr, old_lr_scale, weight_decay, average, threshold))  # NumPy's do not load safely
        for name, value, low in (("accumulate", accumulate, 1), ("save_every", save_every, 1), ("keep", keep, 0)):
            if not isinstance(value, int) or value < low:
                raise UserError(f"{name} is {value!r}; it must be a whole number of at least {low}")
        if not 0 <= average < 1 or not 0 < threshold < 1:
            raise UserError(f"average is {average!r} and threshold {threshold!r}; they must lie in [0, 1) and (0, 1)")
        for name, amount in (("weight_decay", weight_decay), ("clip_norm", clip_norm), ("save_minutes", save_minutes)):
            if not 0 <= amount < math.inf:
                raise UserError(f"{name} is {amount!r}; it must be a number of at least 0")
        check_plain(config or {}, "config")
        stages = range(model.stage, LAST_STAGE + 1)
        self.course = Course(TrainingPlan(epochs_by_stage(epochs_per_stage, stages), lr, schedule, old_lr_scale))
        self.time_limit = time_limit
        self.device = choose_device(str(device))
        self.precision = choose_precision(precision, self.device)
        torch.manual_seed(seed)
        with fitting(model, self.device):
            model.to(self.device).to(memory_format=torch.channels_last)
            self.model = synchronised(model, self.device)
            self.averaged = AveragedNetwork(self.model, average) if average else None
        self.parallel = ParallelSteps(self.model, compile)
        self.accumulate = accumulate
        self.threshold, self.config = threshold, config or {}
        self.optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr,
                                           fused=self.device.type in ("cpu", "cuda"))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        self.steps = OptimizerSteps(self.model, self.optimizer, self.scaler, clip_norm)
        self.folder = RunFolder(output_dir, keep, overwrite) if output_dir and is_main_process() else None
        self.recipe = recipe           # of the data that train it; its statistics are those of the network
        self.keeper = Keeper(self.folder, save_every, save_minutes)
        self._position: dict | None = None  # in the epoch in which a resumed run was cut off
        self._config_written = False
        self.bar: RunBar | None = None  # while `fit` runs
        self._rows: list[dict[str, float]] = []  # of metrics.csv, where there is no folder that has them
        self._live = LiveFigure()

    @property
    def plan(self) -> TrainingPlan:
        """Return the plan of the run."""
        return self.course.plan

    @property
    def finished_epochs(self) -> int:
        """Return how many epochs of the current stage are finished."""
        return self.course.finished_epochs

    @property
    def best_scores(self) -> dict[int, float]:
        """Return stage -> best validation Dice so far."""
        return self.course.best_scores

    @property
    def evaluated_model(self) -> Network:
        """Return the network that is validated and saved: the averaged one if averaging is on."""
        return self.averaged.network if self.averaged else self.model

    def set_stage(self, stage: int, epochs: int | None = None) -> None:
        """Grow (or shrink) to a stage; nothing happens if it is the current one.

        Args:
            epochs: planned epochs of this stage, where they differ from those given at construction.
        """
        new = stage != self.model.stage
        if new:
            for network in {self.model, self.evaluated_model}:
                network.set_stage(stage)
            self._position = None
        self.course.enter(self.model.stage, new, epochs)

    def train_epoch(self, loader: Loader, epoch: int) -> dict[str, float]:
        """Train on every batch of a loader once.

        Args:
            loader: yields `image` (N, C, S, S) float in [0, 1], `mask` (N, K, S, S) in [0, 1] and, for messages
                and the masks of 256 pixels in validation, `name`; S is the resolution of the stage. It carries the
                recipe of its data (see images/recipe.py).
            epoch: within the stage, from 0; decides order, augmentation and learning rate.
        Returns:
            'loss', 'soft_dice' and the pixel metrics, all at the stage's resolution, as means over images; 'lr',
            'gradient_norm', 'skipped_steps' and 'loss_scale' (float16), 'seconds', 'processor_seconds' (of all threads
            of this process), 'images_per_second'.
        Raises:
            UserError: for a loader whose first batch is something else; what is wrong and what to change.
            NonFiniteLossError: with stage, epoch, batch and file names; the batch changes no weight and no statistic.
        """
        if self.model.stage not in self.plan.epochs:
            raise UserError(f"stage {self.model.stage} is not planned: epochs are {self.plan.epochs}, so its rate "
                            f"would be 0. Begin with set_stage({min(self.plan.epochs)}), or plan it: "
                            f"set_stage({self.model.stage}, epochs=...)")
        recipe = self._begin_epoch(loader, epoch)
        saved = self._position if epoch == self.finished_epochs else None
        training = TrainingEpoch(self, loader, epoch, recipe.classes, saved)
        self._position = None
        metrics = training.run(lambda batch: self._begin_steps(batch, recipe))
        self.course.finished_epochs = epoch + 1
        return metrics

    @torch.inference_mode()
    def validate_epoch(self, loader: Loader, epoch: int) -> dict[str, float]:
        """Measure on every batch of a loader; nothing is changed, selected or written by it.

        Returns:
            'loss' and 'soft_dice' at the stage's resolution; the pixel metrics at 256 pixels, of the enlarged logits,
            so that they compare across stages (at the stage's where a loader augments or has no `PapSmearDataset`);
            'foreground' (share predicted), 'empty_masks' (how many).
        """
        check_loader(loader)
        network = self.evaluated_model.eval()
        measures = PassMeasures(self.threshold, self.scored_classes(loader))
        for i, batch in enumerate(loader if self.bar else progress(loader, "validate")):
            if i == 0:
                check_batch(batch, self.model)
            with memory_explained(self.model.stage, len(batch["image"])):
                logits, mask, loss = self.forward(batch, network)
            refuse_non_finite(loss, f"validation loss at stage {self.model.stage}, epoch {epoch + 1}, batch {i + 1}",
                              batch.get("name"))
            measures.add_validation(logits, mask, loss, finest_masks(loader, batch, mask))
        return measures.result() | {"empty_masks": measures.empty_masks()}

    def _begin_epoch(self, loader: Loader, epoch: int) -> DataRecipe:
        """Tell the loader its epoch and return the recipe of its data."""
        check_loader(loader)
        recipe = recipe_for(self.model, loader, self.recipe)
        for target in (loader, getattr(loader, "dataset", None)):  # a plain DataLoader has no epochs, our data set has
            if set_epoch := getattr(target, "set_epoch", None):
                set_epoch(epoch)
        self.model.train()
        self.steps.begin()
        return recipe

    def _begin_steps(self, batch: dict, recipe: DataRecipe) -> None:
        """Check the first batch; then claim the output folder and give the network its image statistics, once."""
        check_batch(batch, self.model)
        self._claim_folder()
        if not self.model.has_image_statistics:
            for network in {self.model, self.evaluated_model}:
                network.set_image_statistics(recipe.mean, recipe.std)
        mean, std = (tuple(buffer.tolist()) for buffer in (self.model.image_mean, self.model.image_std))
        self.recipe = dataclasses.replace(recipe, mean=mean, std=std)

    def _claim_folder(self) -> None:
        """Take possession of the output folder, once, and write the settings into it."""
        if self.folder and not self._config_written:
            self.folder.claim()
            self.folder.write_config(self.config | {"resolved": self.resolved | self.config.get("resolved", {})})
            self._config_written = True

    def scored_classes(self, loader: Loader) -> int:
        """Return how many channels are classes; the rims of nuclei, the last, are not scored."""
        recipe = agreed_recipe(loader, self.recipe) or self.recipe
        return recipe.classes if recipe else self.model.out_channels

    def fit(self, dataloaders: dict[int, tuple], say: Callable[[str], None] = print) -> None:
        """Run all planned stages that are not finished, saying one line an epoch.

        Args:
            dataloaders: resolution -> (train, valid, ...), as `create_progressive_dataloaders` makes them.
        Raises:
            UserError: where disk or memory has no room for the run, before anything is written.
        """
        planned = [STAGE_RESOLUTIONS[stage] for stage in self.plan.epochs]
        if missing := [side for side in planned if side not in dataloaders]:
            raise UserError(f"dataloaders holds {list(dataloaders)}, but training goes through {planned} pixels. Give "
                            f"(train, valid) for {', '.join(map(str, missing))} too, or build the trainer with a "
                            f"network at a later stage")
        refuse_lack_of_space(self)
        refuse_large_batches(self, dataloaders)
        try:
            self._claim_folder()
            if self.time_limit and not self.course.ended(self.model.stage):
                rehearse(self, dataloaders, say)
                self.keeper.between_epochs()
            with RunBar(self, say if is_main_process() else lambda line: None) as self.bar:
                train_stages(self, dataloaders, self.bar)
            self._live.draw(self.curves, last=True)
        except (KeyboardInterrupt, UserError):
            if self.folder and self.folder.withdraw():
                self._config_written = False
            raise
        finally:
            self.bar = None
        self.leave_group()
        if self.folder:
            save_checkpoint(self.folder.file("final_model.pth"), snapshot(self, None))
            self.folder.draw_curves()
            self.folder.log_graph(self.evaluated_model)
            self.folder.close()

    def leave_group(self) -> None:
        """Let go what belongs to a group of processes; to be called before the group ends. Training may go on after."""
        self.parallel.release()

    @property
    def resolved(self) -> dict:
        """Return what was chosen or derived, as plain types."""
        return {"model_args": self.model.model_args, "device": str(self.device), "precision": self.precision,
                "epochs": {str(stage): n for stage, n in self.plan.epochs.items()}, "lr": self.plan.lr,
                "work": list(WORK.values()),
                "accumulate": self.accumulate, "threshold": self.threshold, "processes": world_size()}

    @property
    def position_in_words(self) -> str:
        """Return how far a resumed run is in its epoch, '' at the beginning of one."""
        return f", and batch {self._position['done']} of {self._position['batches']} of the next" if self._position \
            else ""

    def resume(self, path) -> None:
        """Continue from a last.pth: weights, optimizer, plan, scores, random states and position.

        A file that was saved in the middle of an epoch is gone on from with the next batch of that epoch.

        Raises UserError for a file of another network and for one that is not a last.pth.
        """
        if self.folder:
            self.folder.lock()
        saved = restore(self, path)
        self._position = saved["position"]
        self._rows = numbers(saved["history"])
        if self.folder:
            stage = self.model.stage
            self.folder.go_on(saved["history"], stage, self.finished_epochs, self.course.run_epoch(stage))

    def take_step(self, norm: torch.Tensor) -> None:
        """Take the step that `steps.prepare` made ready, and let course and averages follow."""
        self.steps.take(norm)
        self.course.step()
        if self.averaged:
            self.averaged.update()

    def forward(self, batch: dict, network: nn.Module):
        """Return the finest logits, the mask on the device, and the loss over all scales, which is 0 without images."""
        image = batch["image"].to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        mask = batch["mask"].to(self.device, non_blocking=True)
        with autocast(self.device, self.precision):
            scales = network(image, return_all_scales=True)
        # The backward pass is common to all processes, also to one that has no image in a batch.
        loss = multi_scale_loss(scales, mask) if len(mask) else sum(logits.sum() for logits in scales)
        return scales[-1], mask, loss

    def record(self, train: dict[str, float], valid: dict[str, float]) -> None:
        """Keep the best Dice and, with an output folder, write row and checkpoints of the epoch trained last.

        Args:
            train, valid: what `train_epoch` and `validate_epoch` returned.
        """
        stage, finished = self.model.stage, self.finished_epochs
        best, score = self.course.record(stage, valid), valid["dice"]
        values = {f"train_{name}": train[name] for name in ("loss", "soft_dice")} | valid
        values |= {name: train[name] for name in OF_STEPS}
        values |= {"stage": stage, "resolution": STAGE_RESOLUTIONS[stage], "epoch": finished,
                   "run_epoch": self.course.run_epoch(stage)}
        if self.folder:
            self.folder.log_epoch(values, train)
            self.keeper.save_epoch(self, score, best)
        else:
            self._rows.append({name: float(values[name]) for name in COLUMNS})
        if is_main_process():
            self._live.draw(self.curves)

    def curves(self):
        """Return a matplotlib figure of loss, Dice and learning rate of the epochs that were recorded."""
        from scoring.pictures import curves_figure

        return curves_figure(self.folder.rows() if self.folder else self._rows)

    def described(self) -> dict[str, str]:
        """Return network, device, plan and how far the run is."""
        return {"network": type(self.model).__name__, "device": f"{self.device}, {self.precision}",
                **self.course.described(self.model.stage),
                "writes": str(self.folder.path) if self.folder else "nothing"}

    def show_stage(self, loader: Loader) -> None:
        """Write pictures and report of the stage that has ended, with an output folder, as `fit` does by itself.

        What comes after is as if nothing had been drawn.

        Args:
            loader: of the validation images at this stage.
        """
        if not self.folder:
            return
        states = random_states(self.device)
        with said_and_passed_over(f"predictions_stage_{self.model.stage}.png"):
            self.folder.show_stage(survey_stage(self, loader), self.course.run_epoch(self.model.stage))
        refresh_report(self.folder.path)
        set_random_states(states, self.device)
