"""Tests of the network beyond its contract: cost, growth on real images."""

import math
import re

import numpy as np
import pytest
import torch

from conftest import at_growth, roughly_trained, write_checkpoint, write_data_set
from images.files import save_png
from images.masks import load_mask
from images.pyramid import open_pyramids
from inference import Predictor
from pap_smear_dataset import create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer
from scoring.scores import score_pairs, scored_pairs
from training.schedule import WORK
from unet import STAGE_RESOLUTIONS, ProgressiveUNet, UNet, count_parameters
from unet_parts import ConvBNReLU, EncoderLevel, mean2x2, upsample2x


def test_growth_on_images_differs_by_their_rounding_alone(shared_root):
    pyramid = open_pyramids(shared_root, wanted=("valid",))["valid"]
    everything = np.arange(len(pyramid))
    for stage in (1, 2, 3):
        model = at_growth(stage, 1)
        coarse, fine = (pyramid.batch(STAGE_RESOLUTIONS[s], everything)[0].float() / 255 for s in (stage, stage + 1))
        assert (coarse - mean2x2(fine)).abs().max() <= 0.5 / 255 + 1e-6
        with torch.no_grad():
            rounding = (model(coarse) - model(mean2x2(fine))).abs().max()
            before = upsample2x(model(coarse))
            model.set_stage(stage + 1)
            assert (model(fine) - before).abs().max() <= rounding + 1e-5


def test_folding_both_convolutions_of_a_level_changes_nothing():
    model = roughly_trained(3)
    model.set_stage(4)
    x = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        before = model(x)
        for level in [module for module in model.modules() if isinstance(module, EncoderLevel | ConvBNReLU)]:
            level.fold()
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
        assert (model(x) - before).abs().max() < 1e-4 * before.abs().max()


def test_direct_training_starts_with_usual_weights():
    torch.manual_seed(0)
    model = ProgressiveUNet(base_channels=2)
    model.start_whole()
    for r in (32, 64, 128):
        weight = model.encoder[str(r)].from_finer.weight
        bound = 1 / math.sqrt(weight[0].numel())  # of torch's initial values of a convolution
        assert 0.9 * bound < weight.abs().max() <= bound


def test_cost_and_size_are_those_of_the_design():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    with FakeTensorMode():  # shapes alone, nothing is computed
        model = ProgressiveUNet()
        for stage, expected in zip(STAGE_RESOLUTIONS, (4.9, 14.5, 35.6, 98.6), strict=True):
            model.set_stage(stage)
            with FlopCounterMode(display=False) as counter:
                model(torch.rand(1, 1, model.resolution, model.resolution)).sum().backward()
            assert counter.get_total_flops() / 1e9 == pytest.approx(expected, rel=0.01)
            assert WORK[stage] == expected
        assert count_parameters(model) == pytest.approx(2.15e6, rel=0.01)
        assert count_parameters(UNet()) == pytest.approx(31.0e6, rel=0.01)


def test_two_classes_train_and_are_scored(tmp_path):
    root = write_data_set(tmp_path / "data", counts=(4, 2, 2))
    for path in root.glob("*/masks/*.png"):
        drawn = load_mask(path)[..., 0]
        labels = drawn.astype(np.uint8)
        labels[:8] = 2
        save_png(path, labels)
    pyramids = open_pyramids(root, out_channels=2)
    loaders = create_progressive_dataloaders(pyramids=pyramids, batch_sizes={32: 2})
    trainer = ProgressiveTrainer(ProgressiveUNet(1, 2, 4), epochs_per_stage=1, device="cpu")
    metrics = trainer.train_epoch(loaders[32][0], 0)
    assert math.isfinite(metrics["loss"])
    trainer.set_stage(4)
    path = write_checkpoint(tmp_path / "two.pth", trainer.model)
    rows = score_pairs(Predictor(path, "cpu", "float32"), scored_pairs(root, "test"))
    assert rows[0]["dice"] == pytest.approx((rows[0]["dice_1"] + rows[0]["dice_2"]) / 2)


def test_features_keep_their_precision_under_autocast_on_cuda(monkeypatch):
    """Shapes and types alone, by torch's fake tensors: no CUDA is needed, and its autocast is switched on by hand."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    joined, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, dim: joined.append(cat(tensors, dim=dim)) or joined[-1])
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with FakeTensorMode():
        try:
            with torch.device("cuda"):
                model = ProgressiveUNet(base_channels=4)
        except RuntimeError as error:
            pytest.skip(f"this torch starts CUDA for a fake tensor too ({str(error).splitlines()[0]})")
        model.set_stage(4)
        torch.set_autocast_enabled("cuda", True)
        try:
            scales = model(torch.rand(1, 1, 64, 64, device="cuda"), return_all_scales=True)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert [tensor.dtype for tensor in joined] == [torch.bfloat16] * 4
    assert {logits.dtype for logits in scales} == {torch.float32}


def test_transfer_is_by_full_name_and_shape():
    source = roughly_trained(1, seed=1)
    source.set_stage(2)
    model = ProgressiveUNet(1, 1, base_channels=4)
    model.set_stage(3)
    carried, new, left_out = model.transfer_weights(source.live_state())
    assert sorted(carried) == sorted(source.live_state())
    assert left_out == []
    assert "heads.128.linear.weight" in new
    assert all(name.startswith(("encoder.128.", "encoder.64.from_finer.", "decoder.128.", "heads.128."))
               for name in new)
    assert all(torch.equal(model.state_dict()[k], source.state_dict()[k]) for k in carried)
    wider = ProgressiveUNet(1, 1, base_channels=8)
    carried, _, left_out = wider.transfer_weights(source.live_state())
    assert set(carried) == {k for k, v in source.live_state().items() if wider.state_dict()[k].shape == v.shape}
    assert "encoder.32.refine.0.weight" in left_out


def test_size_error_gives_the_remedy():
    model = ProgressiveUNet(base_channels=2).eval()
    model.set_stage(4)
    x = torch.rand(1, 1, 259, 263)
    with pytest.raises(ValueError, match="multiples of 16") as caught:
        model(x)
    pad = re.search(r"torch\.nn\.functional\.pad\(x, .*?mode='replicate'\)", str(caught.value)).group()
    assert model(eval(pad))[..., :259, :263].shape == (1, 1, 259, 263)
