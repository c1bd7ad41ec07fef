"""Tests of training: the plan, the trainer, and what a loader may give to it."""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from checkpoints import load_checkpoint, save_checkpoint
from conftest import draw_pair, make_trainer, metric_rows, write_data_set
from images.files import save_png
from images.recipe import MASK_AND_BOUNDARY, DataRecipe
from images.report import check_dataset
from pap_smear_dataset import PapSmearDataset, create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer
from scoring.measures import pixel_metrics, soft_dice
from system.errors import NonFiniteLossError, UserError
from training.averaging import AveragedNetwork
from training.batches import finest_masks, measured_statistics
from training.dealing import deal
from training.memory import training_memory
from training.run_folder import COLUMNS, RunFolder
from training.schedule import WORK, TrainingPlan, epochs_by_stage
from unet import STAGE_RESOLUTIONS, ProgressiveUNet


def test_one_rate_for_the_whole_run():
    plan = TrainingPlan({1: 10, 2: 10, 3: 10, 4: 20}, lr=1.0)
    assert plan.rate(2, 5, 0, 10, born=2) == 1.0
    assert plan.rate(4, 19, 9, 10, born=4) == pytest.approx(0.01)
    assert plan.rate(4, 90, 0, 10, born=4) == pytest.approx(0.01)
    assert plan.rate(1, 0, 4, 10, born=1) == pytest.approx(0.5), "half of a warm-up of 2 % of 50 epochs"
    assert plan.rate(2, 0, 1, 10, born=2) == pytest.approx(0.2), "a new part warms up"
    assert plan.rate(2, 0, 1, 10, born=1) == 0.3, "an old one goes on, more slowly"
    work = 10 * 4.9 + 10 * 14.5 + 10 * 35.6 + 5 * 98.6, 10 * 4.9 + 10 * 14.5 + 10 * 35.6 + 20 * 98.6
    falling = (work[0] / work[1] - 0.4) / 0.6
    assert plan.rate(4, 4, 9, 10, born=4) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * falling)) / 2)
    slow = TrainingPlan({1: 10, 2: 10, 3: 10, 4: 20}, lr=1.0, old_lr_scale=0.1)
    assert [slow.rate(2, 5, 0, 10, born) for born in (1, 2)] == pytest.approx([0.1, 1.0])
    assert TrainingPlan({1: 10, 2: 10}, lr=1.0, schedule="stage").rate(2, 1, 9, 10, born=2) == 1.0


def test_cheap_epochs_do_not_use_the_rate_up():
    plan = TrainingPlan({1: 36, 2: 28, 3: 18, 4: 18}, lr=1.0)
    assert plan.rate(2, 26, 9, 10, born=2) == 1.0, "63 % of the epochs, 39 % of the work"
    assert plan.rate(4, 0, 0, 10, born=1) > 0.6 * plan.old_lr_scale


def test_epochs_per_stage():
    assert epochs_by_stage(5, [3, 4]) == {3: 5, 4: 5}
    assert epochs_by_stage([1, 2, 3, 4], [3, 4]) == {3: 3, 4: 4}
    assert epochs_by_stage([7, 8], [3, 4]) == {3: 7, 4: 8}
    assert epochs_by_stage([2, 0, 0, 1], [1, 2, 3, 4]) == {1: 2, 4: 1}, "0 skips a stage"
    assert epochs_by_stage(np.array([7, 8]), [3, 4]) == {3: 7, 4: 8}
    for wrong in ([1, 2, 3], [1, 0], [-1, 1], -1, 0, None, 2.5, "ten", np.array([1.5, 2]), [None, 1]):
        with pytest.raises(ValueError, match="epochs_per_stage"):
            epochs_by_stage(wrong, [3, 4])


def test_a_budget_is_dealt_in_whole_epochs_from_coarse_to_fine():
    assert deal(10, (27, 5, 7, 61)) == (54, 4, 2, 6), "266 of 986 pay 54.3 at 4.9; what is left over goes on"
    assert deal(10, (0, 0, 0, 1)) == (0, 0, 0, 10)
    assert deal(2.5, (27, 5, 7, 61)) == (14, 3, 1, 1)
    assert deal(10, (27, 5, 7, 61), first=3) == (2, 9), "7 and 61 of 68"
    assert deal(153.6 / 98.6, (4.9, 14.5, 35.6, 98.6)) == (1, 1, 1, 1), "what is paid for exactly"
    for budget in (1.7, 3, 4, 10, 39, 77.7):
        for shares in ((27, 5, 7, 61), (5, 9, 34, 52), *([(1, 1, 1, 1)] if budget >= 4 else [])):
            done = sum(n * work for n, work in zip(deal(budget, shares), WORK.values(), strict=True))
            assert budget * 98.6 - 4.9 < done <= budget * 98.6, "no epoch more would have been paid"
    with pytest.raises(UserError, match="leaves no epoch at 256 pixels"):
        deal(0.9)


def test_a_stage_that_is_skipped_grows_two_levels_at_once(shared_root, tmp_path):
    trainer, loaders = make_trainer(shared_root, tmp_path / "run", epochs_per_stage=[2, 0, 0, 1])
    trainer.fit(loaders)
    assert [row["stage"] for row in metric_rows(tmp_path / "run")] == ["1", "1", "4"]
    plan = TrainingPlan({1: 50, 4: 50}, lr=1.0, old_lr_scale=0.5)
    assert plan.rate(4, 0, 0, 10, born=2) == plan.rate(4, 0, 0, 10, born=4), "new at stage 4, not old"
    even = TrainingPlan({1: 50, 4: 50}, lr=1.0, old_lr_scale=1.0)
    assert plan.rate(4, 0, 0, 10, born=1) == 0.5 * even.rate(4, 0, 0, 10, born=1)
    fine = TrainingPlan({4: 10}, lr=1.0, old_lr_scale=0.5)
    assert fine.rate(4, 2, 0, 10, born=1) == fine.rate(4, 2, 0, 10, born=4), "direct training: no earlier stage"


def test_unborn_parts_have_no_optimizer_state_and_born_ones_go_on_learning(shared_root):
    trainer, loaders = make_trainer(shared_root)
    trainer.train_epoch(loaders[32][0], 0)
    unborn, reader = trainer.model.encoder["32"].from_finer.weight, trainer.model.encoder["32"].from_image.weight
    trainer.train_epoch(loaders[32][0], 1)
    assert unborn not in trainer.optimizer.state
    assert not unborn.any()
    trainer.set_stage(2)
    before = reader.clone()
    trainer.train_epoch(loaders[64][0], 0)
    assert unborn.any()
    assert not torch.equal(reader, before), "the level sees the image for ever"
    steps = {group["part"]: trainer.optimizer.state[group["params"][0]]["step"].item()
             for group in trainer.optimizer.param_groups if group["params"][0] in trainer.optimizer.state}
    assert steps["encoder.32.from_finer"] == steps["decoder.64"] == 3, "bias correction counts from birth"
    assert steps["encoder.32.from_image"] == steps["decoder.32"] == 9
    assert all((g["weight_decay"] == 0) == (g["params"][0].ndim <= 1) for g in trainer.optimizer.param_groups)


def test_batchnorm_statistics_are_a_plain_mean_at_first(shared_root):
    trainer, loaders = make_trainer(shared_root)
    layer, seen = trainer.model.encoder["32"].norm, []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().mean(dim=(0, 2, 3))))
    for epoch in range(3):
        trainer.train_epoch(loaders[32][0], epoch)
    assert len(seen) == 9
    assert torch.allclose(layer.running_mean, torch.stack(seen).mean(0), atol=1e-5)


def test_accumulated_gradients_make_one_step(shared_root):
    trainer, _ = make_trainer(shared_root, accumulate=4)
    loader = create_progressive_dataloaders(shared_root, {32: 1})[32][0]
    trainer.train_epoch(loader, 0)  # 6 batches of one: steps of 4 and 2
    weight = trainer.model.encoder["32"].refine[0].weight
    assert trainer.optimizer.state[weight]["step"].item() == 2


def test_images_of_a_short_last_group_weigh_as_the_others(shared_root):
    """Batches of 4 and 2 images accumulated into one step are one batch of 6, but for its normalisation."""
    def gradients(sizes: list[int]) -> list[torch.Tensor]:
        trainer, loaders = make_trainer(shared_root, accumulate=2)
        trainer.model.eval()
        trainer.model.set_image_statistics([0.5], [0.2])
        whole = loaders[32][0].chosen(np.arange(6), 32)
        for start, size in zip((0, sizes[0]), sizes, strict=False):
            part = {key: value[start:start + size] for key, value in whole.items()}
            trainer.steps.add(trainer.forward(part, trainer.model)[2], size)
        found = []
        trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: found.extend(
            p.grad.clone() for p in trainer.model.parameters() if p.grad is not None))
        trainer.steps.take(trainer.steps.prepare())
        return found

    whole, parts = gradients([6]), gradients([4, 2])
    assert max((a - b).abs().max() / (a.abs().max() + 1e-6) for a, b in zip(whole, parts, strict=True)) < 1e-4


def test_norm_of_the_gradients_is_logged_and_clipped(shared_root):
    free, loaders = make_trainer(shared_root)
    norm = free.train_epoch(loaders[32][0], 0)["gradient_norm"]
    assert norm > 0
    clipped, loaders = make_trainer(shared_root, clip_norm=norm / 100)
    seen = []
    clipped.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(torch.stack(
        [p.grad.norm() for p in clipped.model.parameters() if p.grad is not None]).norm().item()))
    metrics = clipped.train_epoch(loaders[32][0], 0)
    assert max(seen) <= norm / 100 * 1.001
    assert metrics["gradient_norm"] > norm / 10, "before clipping"
    assert (metrics["skipped_steps"], metrics["loss_scale"]) == (0, 1)


def test_gradients_of_a_refused_batch_do_not_enter_the_next_step(shared_root):
    """With accumulation: the first batch of a step was good, the second is refused, the next epoch begins anew."""
    def weights(refused: bool) -> list[torch.Tensor]:
        trainer, loaders = make_trainer(shared_root, accumulate=2, recipe=DataRecipe(mean=(0.5,), std=(0.2,)))
        batches = list(loaders[32][0])
        if refused:
            start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
            with pytest.raises(NonFiniteLossError):
                trainer.train_epoch([batches[0], batches[1] | {"image": batches[1]["image"] * math.nan}], 0)
            trainer.model.load_state_dict(start)
        trainer.train_epoch(batches, 0)
        return [p.detach() for p in trainer.model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(False), weights(True), strict=True))


def test_a_split_smaller_than_a_batch_trains_even_with_one_image(tmp_path):
    root = write_data_set(tmp_path / "data", counts=(1, 1, 1))
    trainer, loaders = make_trainer(root)
    assert math.isfinite(trainer.train_epoch(loaders[32][0], 0)["loss"])


def test_compiled_steps_give_the_losses_of_plain_ones(shared_root, monkeypatch):
    graphs = []

    def traced_alone(graph, inputs):  # not translated to C++, which takes a minute
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=traced_alone))

    def losses(**more) -> list[float]:
        trainer, loaders = make_trainer(shared_root, epochs_per_stage=5, **more)  # of 3 batches
        found = []
        for stage, resolution in ((1, 32), (2, 64)):
            trainer.set_stage(stage)
            found += [trainer.train_epoch(loaders[resolution][0], epoch)["loss"] for epoch in range(5)]
        return found

    assert losses(compile=True) == pytest.approx(losses(), abs=1e-4)
    assert len(graphs) == 2, "once a stage, after the first 10 batches"


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no_compiler_of_this_name")
    with pytest.raises(ValueError, match="'no_compiler_of_this_name' is not found"):
        ProgressiveTrainer(ProgressiveUNet(base_channels=2), "cpu", compile=True)


def test_averaged_weights_do_not_drag_the_untrained_start_of_new_parts(shared_root):
    trainer, loaders = make_trainer(shared_root, average=0.999)
    for _ in range(2):
        trainer.train_epoch(loaders[32][0], 0)
    trainer.set_stage(2)
    start = trainer.model.decoder["64"].conv[0][0].weight.clone()
    for epoch in range(3):
        trainer.train_epoch(loaders[64][0], epoch)
    now, mean = (m.decoder["64"].conv[0][0].weight for m in (trainer.model, trainer.evaluated_model))
    assert (mean - now).norm() < 0.7 * (now - start).norm()
    norm, own = (m.decoder["64"].conv[0][1] for m in (trainer.model, trainer.evaluated_model))
    assert torch.equal(norm.running_var, own.running_var)


def test_averages_of_older_parts_live_through_a_growth():
    model = ProgressiveUNet(base_channels=2)
    averaged = AveragedNetwork(model, 0.25)
    old, new = (lambda network, part=part: network.get_submodule(part).conv[0][0].weight
                for part in ("decoder.32", "decoder.64"))
    torch.nn.init.zeros_(old(averaged.network))
    torch.nn.init.ones_(old(model))
    for _ in range(2):
        averaged.update()
    assert old(averaged.network).mean().item() == pytest.approx(1 - 0.1 * 2 / 11), "decays 1/10, 2/11"
    model.set_stage(2)
    averaged.network.set_stage(2)
    start = new(averaged.network).detach().clone()
    for part in (old, new):
        torch.nn.init.zeros_(part(model))
    averaged.update()
    assert old(averaged.network).mean().item() == pytest.approx((1 - 0.1 * 2 / 11) * 0.25), "goes on"
    assert torch.allclose(new(averaged.network), start * 0.1), "a new part begins: 1/10"
    other = AveragedNetwork(ProgressiveUNet(base_channels=2), 0.25)
    other.load(averaged.state())
    assert other.updates == {1: 3, 2: 1, 3: 0, 4: 0}


def test_averages_that_began_anew_at_each_stage_are_refused(shared_root, tmp_path):
    trainer, loaders = make_trainer(shared_root, tmp_path / "run", average=0.9, epochs_per_stage=[1, 0, 0, 1])
    trainer.record(trainer.train_epoch(loaders[32][0], 0), trainer.validate_epoch(loaders[32][1], 0))
    checkpoint = load_checkpoint(tmp_path / "run/last.pth")
    del checkpoint["averaged"]["updates"]
    save_checkpoint(tmp_path / "old.pth", checkpoint)
    with pytest.raises(ValueError, match="averaged weights were begun anew at each stage"):
        make_trainer(shared_root, average=0.9)[0].resume(tmp_path / "old.pth")


def test_image_statistics_are_taken_once_whatever_ran_before(shared_root):
    trainer, loaders = make_trainer(shared_root)
    trainer.model(torch.rand(2, 1, 32, 32))  # a forward pass in train mode, as in a notebook
    trainer.train_epoch(loaders[32][0], 0)
    expected = loaders[32][0].recipe.mean
    assert trainer.model.image_mean.item() == pytest.approx(expected[0], abs=1e-6)


def test_a_plain_loader_gets_new_augmentation_each_epoch(shared_root):
    dataset = PapSmearDataset(shared_root, "train", target_size=32, augment_probability=1.0)
    trainer, _ = make_trainer(shared_root)
    loader = DataLoader(dataset, batch_size=6)
    trainer.train_epoch(loader, 0)
    first = next(iter(loader))["image"]
    trainer.train_epoch(loader, 1)
    assert not torch.equal(first, next(iter(loader))["image"])


def test_going_back_before_training_keeps_the_plan(shared_root):
    trainer, _ = make_trainer(shared_root)
    trainer.set_stage(4)
    assert trainer.plan.epochs == {4: 1}
    trainer.set_stage(1)
    assert trainer.plan.epochs == {1: 2, 2: 1, 3: 1, 4: 1}
    trainer.set_stage(1, epochs=7)
    assert trainer.plan.epochs[1] == 7


def test_settings_of_other_types_are_converted_or_refused_at_once(shared_root, tmp_path):
    trainer, loaders = make_trainer(shared_root, tmp_path / "a", lr=np.float64(1e-3), epochs_per_stage=np.int64(1))
    trainer.record(trainer.train_epoch(loaders[32][0], 0), trainer.validate_epoch(loaders[32][1], 0))
    assert load_checkpoint(tmp_path / "a/last.pth")["plan"]["lr"] == 1e-3
    trainer.set_stage(np.int64(2))
    trainer.record(trainer.train_epoch(loaders[64][0], 0), trainer.validate_epoch(loaders[64][1], 0))
    assert load_checkpoint(tmp_path / "a/last.pth")["stage"] == 2
    with pytest.raises(ValueError, match=r"config\['root'\]"):
        make_trainer(shared_root, config={"root": Path("x")})


def test_validation_enlarges_logits_to_256(shared_root):
    trainer, loaders = make_trainer(shared_root)
    trainer.train_epoch(loaders[32][0], 0)
    metrics = trainer.validate_epoch(loaders[32][1], 0)
    valid = loaders[32][1].dataset.pyramid
    with torch.no_grad():
        logits = trainer.model.eval()(valid.batch(32, np.arange(3))[0].float() / 255)
    enlarged = torch.nn.functional.interpolate(logits, (256, 256), mode="bilinear") >= 0
    expected = pixel_metrics(enlarged, valid.batch(256, np.arange(3))[1] >= 127.5)["dice"].mean().item()
    assert metrics["dice"] == pytest.approx(expected)


def test_expected_memory_grows_with_batch_and_stage():
    model = ProgressiveUNet(base_channels=4)
    needed = []
    for stage in STAGE_RESOLUTIONS:
        model.set_stage(stage)
        needed.append(training_memory(model, 4, "float32"))
    assert needed == sorted(needed)
    activations = training_memory(model, 8, "float32") - needed[-1]
    # The finest level alone keeps the input of both convolutions, normalisations and rectifiers of two DoubleConvs.
    assert activations > 4 * 4 * 256 * 256 * 4 * 6
    assert not any(int(m.num_batches_tracked) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_a_failed_save_leaves_the_old_file(trained_run, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(trained_run[0] / "best_stage_1.pth")
    path = tmp_path / "best.pth"
    save_checkpoint(path, checkpoint)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="hold None, bool"):
        save_checkpoint(path, checkpoint | {"config": Path("x")})

    def fill_the_disk(content, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, checkpoint)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("content", "words"), [(b"", "can be read"), (b"hello", "can be read"), (None, "no such")])
def test_what_is_no_checkpoint_is_refused(tmp_path, content, words):
    path = tmp_path / "x.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_checkpoint(path)


# ---- what a loader gives


def plain_batches(channels: int = 1, side: int = 32, count: int = 3, images: int = 4) -> list[dict]:
    """Batches of dark discs as a loader of one's own makes them, without a recipe."""
    rng = np.random.default_rng(0)
    pairs = [[draw_pair(rng, side) for _ in range(images)] for _ in range(count)]
    images, masks = (torch.from_numpy(np.array([[pair[k] for pair in batch] for batch in pairs])) for k in (0, 1))
    return [{"image": image[:, None].expand(-1, channels, -1, -1).float() / 255, "mask": mask[:, None].float()}
            for image, mask in zip(images, masks, strict=True)]


def test_statistics_of_a_loader_without_a_recipe_are_measured_and_said(tmp_path, capsys):
    """The network normalises as if the data had carried them, and prediction from its checkpoint agrees."""
    batches = plain_batches(channels=3)
    torch.manual_seed(0)
    trainer = ProgressiveTrainer(ProgressiveUNet(3, 1, base_channels=4), "cpu", 1, precision="float32",
                                 output_dir=tmp_path / "run")
    train = trainer.train_epoch(batches, 0)
    pixels = torch.cat([batch["image"] for batch in batches]).double()
    assert trainer.model.image_mean.tolist() == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-6)
    assert trainer.model.image_std.tolist() == pytest.approx(
        pixels.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-6)
    said = capsys.readouterr().out
    assert "computed from one pass" in said
    assert f"mean {trainer.recipe.mean[0]:.4f}" in said
    trainer.record(train, trainer.validate_epoch(batches, 0))
    recipe = load_checkpoint(tmp_path / "run/best_stage_1.pth")["data"]
    assert recipe == trainer.recipe == DataRecipe(in_channels=3, mean=recipe.mean, std=recipe.std)
    trainer.train_epoch(batches, 1)
    assert "computed" not in capsys.readouterr().out, "once"


def test_fit_takes_batches_without_names(tmp_path):
    batches = {side: (plain_batches(side=side, count=1), plain_batches(side=side, count=1)) for side in (128, 256)}
    model = ProgressiveUNet(base_channels=2)
    model.set_stage(3)
    trainer = ProgressiveTrainer(model, "cpu", 1, output_dir=tmp_path / "run")
    trainer.fit(batches, say=lambda line: None)
    assert [row["stage"] for row in metric_rows(tmp_path / "run")] == ["3", "4"]
    assert (tmp_path / "run/predictions_stage_4.png").exists()


def test_a_recipe_given_to_the_trainer_is_used(capsys):
    recipe = DataRecipe(targets=MASK_AND_BOUNDARY, mean=(0.5,), std=(0.25,), training_ranges={"brightness": (0.4, 0.6)})
    trainer = ProgressiveTrainer(ProgressiveUNet(1, 2, base_channels=4), "cpu", 1, recipe=recipe)
    batches = [batch | {"mask": batch["mask"].repeat(1, 2, 1, 1)} for batch in plain_batches()]
    trainer.train_epoch(batches, 0)
    assert (trainer.model.image_mean.item(), trainer.model.image_std.item()) == (0.5, 0.25)
    assert trainer.recipe == recipe
    assert capsys.readouterr().out == ""


def test_a_recipe_without_statistics_takes_those_of_the_loader(shared_root, capsys):
    trainer, loaders = make_trainer(shared_root, recipe=DataRecipe())
    trainer.train_epoch(loaders[32][0], 0)
    assert trainer.recipe.mean == pytest.approx(loaders[32][0].recipe.mean, abs=1e-6)
    assert trainer.recipe.training_ranges == loaders[32][0].recipe.training_ranges
    assert capsys.readouterr().out == ""


def test_statistics_that_a_network_brings_along_stay(shared_root):
    trainer, loaders = make_trainer(shared_root)
    trainer.model.set_image_statistics([0.25], [0.5])
    trainer.train_epoch(loaders[32][0], 0)
    assert trainer.recipe.mean == (0.25,)
    assert trainer.recipe.std == (0.5,)
    assert trainer.recipe.training_ranges == loaders[32][0].recipe.training_ranges


def changed(**values) -> list[dict]:
    return [plain_batches()[0] | values]


@pytest.mark.parametrize(("loader", "words"), [
    ([], "no batch"), (iter(plain_batches()), "without a length"),
    ([(torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 32, 32))], "the batch is a tuple; a loader yields dictionaries"),
    ([{"image": torch.zeros(2, 1, 32, 32)}], "keys image; a loader yields"),
    (changed(image=torch.full((4, 1, 32, 32), 200.0)), "image of the batch holds values 200 to 200.*Divide 8 bit by"),
    (changed(mask=torch.full((4, 1, 32, 32), 255.0)), "mask of the batch holds values 255 to 255"),
    (changed(image=torch.full((4, 1, 32, 32), -0.5)), "image of the batch holds values -0.5 to -0.5"),
    (changed(image=torch.zeros(4, 1, 32, 32, dtype=torch.uint8)), r"uint8; .*\.float\(\)\.div\(255\)"),
    (changed(image=np.zeros((4, 1, 32, 32))), "image of the batch is ndarray"),
    (changed(image=torch.zeros(4, 3, 32, 32)), r"takes \(N, 1, 32, 32\). Build it with in_channels"),
    (changed(mask=torch.zeros(4, 2, 32, 32)), r"takes \(N, 1, 32, 32\). Build it with out_channels"),
    (changed(mask=torch.zeros(4, 32, 32)), r"shape \(4, 32, 32\)"),
    (plain_batches(side=64), "64x64 pixels; stage 1 learns from 32x32"),
    (changed(mask=torch.zeros(3, 1, 32, 32)), "4 images and 3 masks"),
], ids=lambda value: value[:20] if isinstance(value, str) else "")
def test_what_is_no_batch_for_the_network_is_refused(loader, words, tmp_path):
    """At training and at validation alike, before a weight or a file has changed."""
    trainer = ProgressiveTrainer(ProgressiveUNet(base_channels=2), "cpu", 1, output_dir=tmp_path / "run",
                                 recipe=DataRecipe(mean=(0.5,), std=(0.2,)))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for one_pass in (trainer.train_epoch, trainer.validate_epoch):
        with pytest.raises(UserError, match=words):
            one_pass(loader, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert not (tmp_path / "run").exists()


def test_data_of_another_kind_than_before_are_refused(shared_root):
    trainer, loaders = make_trainer(shared_root)
    trainer.train_epoch(loaders[32][0], 0)
    rims = create_progressive_dataloaders(shared_root, targets=MASK_AND_BOUNDARY)[32][0]
    with pytest.raises(UserError, match=r"the loader: targets is \('mask', 'boundary'\), but \('mask',\) in the trai"):
        trainer.train_epoch(rims, 1)
    two_classes = make_trainer(shared_root, recipe=DataRecipe(targets=MASK_AND_BOUNDARY))[0]
    with pytest.raises(UserError, match="the loader: targets is"):
        two_classes.validate_epoch(loaders[32][1], 0)
    with pytest.raises(UserError, match="out_channels of the network is 1, but the data have 2"):
        make_trainer(shared_root)[0].train_epoch(rims, 0)


def test_only_record_selects_and_writes(shared_root, tmp_path):
    """Scoring another split in between, the test set say, decides nothing."""
    trainer, loaders = make_trainer(shared_root, tmp_path / "run")
    with pytest.raises(UserError, match="no epoch to record"):
        trainer.record({}, {})
    train = trainer.train_epoch(loaders[32][0], 0)
    on_test = trainer.validate_epoch(loaders[32][2], 0)
    valid = trainer.validate_epoch(loaders[32][1], 0)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "config.json"]
    assert trainer.best_scores == {}
    assert on_test["dice"] != valid["dice"]
    trainer.record(train, valid)
    assert trainer.best_scores == {1: valid["dice"]}
    assert load_checkpoint(tmp_path / "run/best_stage_1.pth")["score"] == valid["dice"]
    assert (tmp_path / "run/config.json").exists(), "the settings, as after fit"
    with pytest.raises(UserError, match="recorded already"):
        trainer.record(train, valid)
    assert [float(row["dice"]) for row in metric_rows(tmp_path / "run")] == [pytest.approx(valid["dice"])]


# ---- the data recipe


def test_a_recipe_is_made_when_data_are_read_and_carried(shared_root):
    loaders = create_progressive_dataloaders(shared_root, in_channels=3)
    train, valid, _ = loaders[64]
    assert train.recipe is train.dataset.recipe is loaders[256][0].recipe
    assert train.recipe != valid.recipe, "each split has its own statistics"
    train.recipe.check_agreement(valid.recipe, "train", "valid")
    pixels = train.dataset.pyramid.batch(256, np.arange(6))[0].double() / 255
    assert train.recipe.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-4)
    assert DataLoader(train.dataset).dataset.recipe is train.recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        train.recipe.sizing = "tile"


@pytest.mark.parametrize(("values", "words"), [
    ({"sizing": "stretch"}, "sizing is 'stretch'; it must be one of 'resize' and 'tile'"),
    ({"targets": ("rim",)}, "targets is"), ({"mean": (0.5,)}, "each must have one number a channel"),
    ({"in_channels": 3, "mean": (0.5,), "std": (0.2,)}, "here 3")])
def test_recipes_that_make_no_sense_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        DataRecipe(**values)


# ---- nuclei that are small


def small_discs(root: Path) -> Path:
    """Write images of 256x256 with discs of 6 pixels, each over a pixel of 64x64 and a third of one of 32x32."""
    write_data_set(root, counts=(4, 2, 2), side=256)
    rows, columns = np.mgrid[:256, :256] + 0.5
    mask = np.hypot(rows % 16 - 2, columns % 16 - 2) <= 3
    mask[:, 64:] = False
    for path in root.glob("*/images/*.png"):
        save_png(path, np.where(mask, 60, 190).astype(np.uint8))
        save_png(path.parent.parent / "masks" / path.name, mask)
    return root


def test_a_network_that_finds_nothing_scores_nothing_where_nuclei_are_small(tmp_path):
    """At 32 pixels no mask covers half of a pixel; an empty prediction is still wrong, and is said to be."""
    root = small_discs(tmp_path / "data")
    trainer, loaders = make_trainer(root, tmp_path / "run")
    mask = next(iter(loaders[32][1]))["mask"]
    assert mask.max() < 0.5
    assert mask.sum() > 0
    train = trainer.train_epoch(loaders[32][0], 0)
    with torch.no_grad():
        trainer.model.heads["32"].linear.weight.zero_()
        trainer.model.heads["32"].linear.bias.fill_(-20)
    valid = trainer.validate_epoch(loaders[32][1], 0)
    assert (valid["dice"], valid["foreground"], valid["empty_masks"]) == (0, 0, 0)
    assert valid["soft_dice"] < 0.2
    trainer.record(train, valid)
    assert trainer.best_scores == {1: 0}
    report = str(check_dataset(root))
    assert "nuclei are about 0.7 pixels wide at 32x32, too few to learn from. Train with --start_stage 3" in report


def test_soft_dice_needs_no_threshold():
    """Of area fractions below one half everywhere, which a cut would empty."""
    fraction = torch.zeros(1, 1, 32, 32)
    fraction[..., :16] = 0.4
    assert soft_dice(fraction, fraction).item() == pytest.approx(1)
    assert soft_dice(torch.zeros_like(fraction), fraction).item() == pytest.approx(1 / (0.16 * 512 + 1))
    assert soft_dice(torch.zeros_like(fraction), torch.zeros_like(fraction)).item() == 1


def test_a_run_from_before_a_column_was_there_goes_on(tmp_path):
    columns = [name for name in COLUMNS if name != "processor_seconds"]
    (tmp_path / "metrics.csv").write_text(f"{','.join(columns)}\n{','.join('1' for _ in columns)}\n")
    folder = RunFolder(tmp_path)
    folder.go_on([], 1, 1, 1)
    folder.log_epoch(dict.fromkeys(COLUMNS, 2))
    folder.close()
    first, second = folder.rows()
    assert math.isnan(first["processor_seconds"])
    assert (first["loss"], second["processor_seconds"]) == (1, 2)


def test_masks_of_augmented_images_and_of_nameless_ones_have_no_finer_ones(shared_root):
    loaders = create_progressive_dataloaders(shared_root, dict.fromkeys((32, 64, 128, 256), 2))
    trained, validated = (next(iter(loader)) for loader in loaders[32][:2])
    assert finest_masks(loaders[32][0], trained, trained["mask"]) is None
    assert finest_masks(loaders[32][1], validated, validated["mask"]).shape[-1] == 256
    nameless = {name: validated[name] for name in ("image", "mask")}
    assert finest_masks(loaders[32][1], nameless, validated["mask"]) is None


def test_a_stage_without_a_plan_is_not_trained_at_rate_0(shared_root):
    trainer, loaders = make_trainer(shared_root, epochs_per_stage=(0, 1, 1, 1))
    with pytest.raises(UserError, match=r"stage 1 is not planned: epochs are \{2: 1, 3: 1, 4: 1\}"):
        trainer.train_epoch(loaders[32][0], 0)
    with pytest.raises(UserError, match="epochs_per_stage is"):
        trainer.set_stage(2, epochs=0)
    trainer.set_stage(3)
    trainer.train_epoch(loaders[128][0], 0)
    trainer.set_stage(1, epochs=2)
    assert trainer.plan.epochs == {1: 2, 2: 1, 3: 1, 4: 1}
    assert trainer.train_epoch(loaders[32][0], 0)["lr"] > 0


def test_fit_without_a_loader_of_a_stage_is_refused(shared_root, tmp_path):
    trainer, loaders = make_trainer(shared_root, tmp_path / "run")
    with pytest.raises(UserError, match=r"training goes through \[32, 64, 128, 256\] pixels. Give .* for 32, 128 too"):
        trainer.fit({64: loaders[64], 256: loaders[256]})
    assert not (tmp_path / "run").exists()


def test_a_channel_that_is_constant_has_a_deviation_of_1(shared_root):
    loader = [{"image": torch.stack([torch.rand(2, 32, 32), torch.full((2, 32, 32), 0.25)], 1),
               "mask": torch.zeros(2, 1, 32, 32)}]
    mean, std = measured_statistics(loader, ProgressiveUNet(in_channels=2, base_channels=2))
    assert (mean[1], std[1]) == (0.25, 1.0)
    assert 0.2 < std[0] < 0.4
