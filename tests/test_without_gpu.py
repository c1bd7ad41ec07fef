"""What can be checked of code for a GPU where there is none: devices, shapes, types, compilation, float16.

    python -m pytest tests/test_without_gpu.py

What needs a GPU is in tests/test_cuda.py.
"""

import contextlib
import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import progressive_trainer
from conftest import make_trainer, roughly_trained, tensors_equal
from images.augmentation import augment, sample_numbers
from system.devices import autocast
from system.signals import StoppedBySignal
from training.loss import multi_scale_loss
from unet import STAGE_RESOLUTIONS, ProgressiveUNet, UNet
from unet_parts import ToLogits, upsample2x

STAGES = tuple(STAGE_RESOLUTIONS)
NETWORKS = [(ProgressiveUNet, stage) for stage in STAGES] + [(UNet, STAGES[-1])]
IDS = [f"{kind.name} at stage {stage}" for kind, stage in NETWORKS]


class MadeBy(TorchDispatchMode):
    """Note which operations make tensors on which device: 'cuda:0' -> their names."""

    def __init__(self):
        super().__init__()
        self.operations: dict[str, set[str]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.operations.setdefault(tensor.device.type, set()).add(str(function))
        return made


@pytest.fixture(params=["cuda", "meta"])
def place(request, monkeypatch):
    """Return a device on which nothing is computed: CUDA by torch's fake tensors, or 'meta'.

    Without a GPU no torch takes a backward pass on the first, and none has autocast, which is off here, on the second.
    """
    if request.param == "meta":
        monkeypatch.setattr(torch, "autocast", lambda device, enabled: contextlib.nullcontext())
        yield "meta"
        return
    with FakeTensorMode():
        try:
            with torch.device("cuda"):
                ToLogits(1, 1)
        except RuntimeError as error:
            pytest.skip(f"this torch starts CUDA for a fake tensor too ({str(error).splitlines()[0]})")
        yield "cuda"


@pytest.mark.parametrize(("kind", "stage"), NETWORKS, ids=IDS)
def test_all_that_a_step_makes_is_on_the_device_of_the_input(kind, stage, place):
    """Operations on tensors of two devices are refused by torch; a tensor made anew on the CPU is found here."""
    with torch.device(place):
        model = kind(in_channels=3, out_channels=2, base_channels=4)
    model.set_stage(stage)
    image, mask = (torch.empty(2, channels, 96, 64, device=place) for channels in (3, 2))
    with MadeBy() as made:
        scales = model(image, return_all_scales=True)
        loss = multi_scale_loss(scales, mask)
        model.eval()(image)
    assert set(made.operations) == {place}
    sides = [(96 // 2 ** k, 64 // 2 ** k) for k in reversed(range(len(model.scales)))]
    assert [tuple(logits.shape) for logits in scales] == [(2, 2, *side) for side in sides]
    if place == "cuda" and not torch.cuda.is_available():
        return
    with MadeBy() as made:
        loss.backward()
    assert set(made.operations) == {place}
    assert "aten.convolution_backward.default" in made.operations[place], "all of it was seen"
    live = {id(p) for part in model.live_parts() for p in model.get_submodule(part).parameters()}
    assert {id(p) for p in model.parameters() if p.grad is not None} == live
    assert all(p.grad.shape == p.shape and p.grad.device == p.device for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_stay_on_their_device_while_they_are_augmented(channels):
    """What is random is drawn on the CPU, so that it is the same for all devices; nothing comes back from the other."""
    image, mask = torch.empty(8, channels, 64, 64, device="meta"), torch.empty(8, 1, 64, 64, device="meta")
    numbers = sample_numbers(0, 64, 0, range(8))
    with MadeBy() as made:
        both = augment(image, mask, numbers, probability=0.7)
    assert [tensor.device.type for tensor in both] == ["meta", "meta"]
    assert [tensor.shape for tensor in both] == [image.shape, mask.shape]
    assert {"aten.grid_sampler_2d.default", "aten.flip.default"} <= made.operations["meta"]
    assert not any("grid" in name or "flip" in name for name in made.operations["cpu"])


# ---- compilation


class Counting:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def lively(kind):
    """A network with weights, heads and statistics away from their start, in training."""
    torch.manual_seed(0)
    return (roughly_trained(1) if kind is ProgressiveUNet else UNet(base_channels=2)).train()


def step(model, network, image: torch.Tensor):
    """Return what a forward and backward pass through `network`, which is the model or compiled from it, gives."""
    scales = network(image, return_all_scales=True)
    multi_scale_loss(scales, image.round()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [logits.detach() for logits in scales], gradients, dict(model.named_buffers())


@pytest.mark.parametrize(("kind", "stages"), [(ProgressiveUNet, STAGES), (UNet, STAGES[-1:])], ids=["pgunet", "unet"])
def test_the_network_is_one_graph_at_every_stage(kind, stages):
    """`fullgraph` refuses a break. Logits, gradients and statistics are those without, to the last bit."""
    plain, backend = lively(kind), Counting()
    model = copy.deepcopy(plain)
    network = torch.compile(model, backend=backend, fullgraph=True)
    for number, stage in enumerate(stages, start=1):
        plain.set_stage(stage)
        model.set_stage(stage)
        for seed in range(2):
            image = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(step(model, network, image), step(plain, plain, image), rtol=0, atol=0)
        assert backend.graphs == number, "one a stage, which serves the second step too"


def test_the_backward_pass_is_traced_too():
    """As on a GPU, where both passes are compiled; sums in another order differ by rounding."""
    plain = lively(ProgressiveUNet)
    plain.set_stage(2)
    model, image = copy.deepcopy(plain), torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    network = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(model, network, image), step(plain, plain, image), rtol=1e-4, atol=1e-5)


# ---- types


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [ProgressiveUNet, UNet], ids=["pgunet", "unet"])
def test_heads_and_sums_of_logits_are_float32(kind, precision, training):
    """Bit for bit: features of low precision, then products, enlargements and sums as in float32."""
    model, met = lively(kind).train(training), []
    model.set_stage(4)
    for head in (module for module in model.modules() if isinstance(module, ToLogits)):
        head.register_forward_hook(lambda head, features, logits: met.append((head.linear, features[0], logits)))
    with torch.set_grad_enabled(training), autocast(torch.device("cpu"), precision):
        scales = model(torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(0)), return_all_scales=True)
    assert len(met) == len(scales) == len(model.scales)
    for k, ((linear, features, residual), logits) in enumerate(zip(met, scales, strict=True)):
        assert features.dtype == getattr(torch, precision), "the precision was low before the head"
        assert residual.dtype == logits.dtype == torch.float32
        expected = F.linear(features.float().permute(0, 2, 3, 1), linear.weight, linear.bias).permute(0, 3, 1, 2)
        assert torch.equal(residual, expected)
        assert torch.equal(logits, upsample2x(scales[k - 1]) + expected if k else expected)


@pytest.fixture
def float16_on_the_cpu(monkeypatch):
    """Let a trainer take float16 on the CPU, which it refuses otherwise, with the scaler that CUDA needs."""
    monkeypatch.setattr(progressive_trainer, "choose_precision", lambda name, device: "float16")


def test_float16_skips_the_steps_that_overflow_and_goes_on(float16_on_the_cpu, data_root):
    trainer, loaders = make_trainer(data_root)
    assert trainer.scaler.is_enabled()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0 ** 100})
    metrics = trainer.train_epoch(loaders[32][0], 0)
    assert metrics["skipped_steps"] == len(loaders[32][0]) == 3
    assert metrics["loss_scale"] == 2.0 ** 97
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0 ** 10})
    losses = [trainer.train_epoch(loaders[32][0], epoch)["loss"] for epoch in range(1, 4)]
    assert losses[-1] < losses[0]


def test_float16_goes_on_with_the_scale_that_it_had(float16_on_the_cpu, data_root, tmp_path):
    """Cut off after each of three steps, of which the second doubles the scale: all is equal to the last bit."""
    def trained(name: str, cut: bool) -> tuple:
        cuts = 0
        while True:
            trainer, loaders = make_trainer(data_root, tmp_path / name)
            trainer.scaler = trainer.steps.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10, growth_interval=2)
            if cuts:
                trainer.resume(tmp_path / name / "last.pth")
                assert trainer.scaler.get_scale() == 2.0 ** (10 + cuts // 2)
            trainer.keeper.asked_to_stop = lambda: 15 * cut
            try:
                return trainer, trainer.train_epoch(loaders[32][0], 0), cuts
            except StoppedBySignal:
                cuts += 1

    whole, metrics, _ = trained("whole", cut=False)
    trainer, metrics_of_cut, cuts = trained("cut", cut=True)
    assert cuts == 2
    assert metrics["loss_scale"] == metrics_of_cut["loss_scale"] == 2.0 ** 11
    assert metrics["gradient_norm"] == metrics_of_cut["gradient_norm"]
    assert tensors_equal(trainer.model, whole.model)
