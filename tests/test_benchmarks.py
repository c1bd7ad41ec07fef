"""Tests of the benchmark: its arithmetic on values known by construction, and that it runs. None looks at a time.

    python -m pytest tests/test_benchmarks.py
"""

import contextlib
import json
import math

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import parts, speed, timing, workloads
from benchmarks.parts import BASELINE, cost_of, growth_ratio
from benchmarks.timing import (
    Measure,
    alternate,
    call_in_processes,
    matrix_product,
    median,
    median_ratio,
    power,
    separate_process,
    training_operations,
)
from benchmarks.workloads import (
    BATCH,
    Setting,
    baseline_trainings,
    new_predictor,
    tile_batches,
    tiled_prediction,
    write_fields,
)
from conftest import PROJECT, run_script, words
from system import machine
from system.machine import peak_memory
from training.dealing import SHARES, deal
from training.schedule import WORK
from training.settings import PRESETS
from unet import ProgressiveUNet, UNet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    """Return tiny settings with their data set of eight images."""
    root = tmp_path_factory.mktemp("fields")
    write_fields(root, BATCH)
    return Setting(root, base_channels=2, rounds=1, quick=True, device=CPU, precision="float32")


def test_operations_of_a_convolution_are_those_counted_by_hand():
    """Forward, and backward for the weights; the second layer also backward for its input."""
    one = 2 * 9 * 3 * 5 * 16 * 24  # multiplications and additions: 3x3, 3 to 5 channels, at every pixel
    two = 2 * 9 * 5 * 7 * 16 * 24
    first, second = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Conv2d(5, 7, 3, padding=1, bias=False)
    assert training_operations(first, (1, 3, 16, 24)) == 2 * one
    assert training_operations(first, (4, 3, 16, 24)) == 2 * one, "an image"
    assert training_operations(nn.Sequential(first, second), (2, 3, 16, 24)) == 2 * one + 3 * two
    assert all(p.grad is None for p in first.parameters())


def test_operations_of_our_network_grow_as_the_readme_says():
    model, counted = ProgressiveUNet(base_channels=8), []
    for stage, side in ((1, 32), (2, 64), (3, 128), (4, 256)):
        model.set_stage(stage)
        counted.append(training_operations(model, (1, 1, side, side)) * 64 / 1e9)  # as at 64 channels: squared
    assert counted == pytest.approx(list(WORK.values()), rel=0.03)


def test_operations_of_a_matrix_product():
    work, operations = matrix_product(CPU, "float32", side=8)
    assert operations == 10 * 2 * 8 ** 3
    assert work() > 0


def test_contenders_take_turns_and_the_warm_up_does_not_count():
    turns = []

    def contender(name: str):
        def work() -> float:
            turns.append(name)
            return float(len(turns))
        return work

    rounds = alternate({"a": contender("a"), "b": contender("b")}, rounds=2)
    assert "".join(turns) == "ababab"
    assert rounds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert alternate({"a": contender("a")}, rounds=1, warm_up=0) == {"a": [7.0]}


def test_medians_and_ratios_within_a_round():
    assert median([5, 1, 3]) == 3
    assert median([1, 2, 3, 10]) == 2.5
    # The machine was ten times as slow in the second round; within each, the ratio is the same.
    assert median_ratio([6, 60, 6], [2, 20, 2]) == 3
    assert median_ratio([1, 9, 4], [1, 3, 2]) == 2


@pytest.mark.parametrize("exponent", [-1, 0.5, 2])
def test_the_power_of_a_power_law(exponent):
    sizes = [1, 2, 4, 16]
    assert power(sizes, [3 * n ** exponent for n in sizes]) == pytest.approx(exponent)


def test_what_growing_saves_by_hand():
    assert growth_ratio(WORK) == pytest.approx(153.6 / 394.4)
    assert cost_of([4, 6, 10, 16], WORK) == pytest.approx(4 * 4.9 + 6 * 14.5 + 10 * 35.6 + 16 * 98.6)


def test_what_the_loader_and_growing_bring_follows_from_the_rounds(setting, monkeypatch):
    costs = {1: 64.0, 2: 64.0, 3: 48.0, 4: 32.0}  # seconds a batch of 64, 32, 16, 8: 1, 2, 3 and 4 an image
    rounds = {f"training, stage {stage}": [cost] for stage, cost in costs.items()} | {"matrix products": [1.0]}
    rounds |= {f"{kind}, stage {stage}": [2.0] for kind in parts.LOADED for stage in costs}
    monkeypatch.setattr(parts, "stage_rounds", lambda setting: rounds)
    record = {}
    found = {m.what: m for m in parts.loading(setting, record)}
    assert "matrix products" not in record["rounds"]
    assert found["stage 3: our loader"].value == 32  # 64 images in 2 s
    assert found["stage 3: our loader against the network"].value == 3 * 32
    assert found["stage 1: our loader without a cache against the network"].value == 8
    assert [m.verdict for m in found.values() if m.bar] == ["holds"] * 4
    found = {m.what: m for m in parts.growth(setting, {})}
    assert found["stage 2"].value == 0.5
    assert found["the same by wall-clock"].value == 10 / 16
    ratio = found["the second over the first"]
    assert ratio.value == pytest.approx(0.625 / found[
        "equal epochs at all stages against as many at stage 4, by operations"].value)
    quick = next(m for m in found.values() if m.what.startswith("--preset quick (30,18,30,15) against direct"))
    operations = 30 * 4.9 + 18 * 14.5 + 30 * 35.6 + 15 * 98.6
    assert quick.value == pytest.approx((30 * 1 + 18 * 2 + 30 * 3 + 15 * 4) / (operations / 98.6 * 4))


def fake_rounds(costs: dict):
    """Return what stands in for `alternate`: two rounds, of which the second is twice as slow for all alike."""
    return lambda contenders, rounds, warm_up=1: {name: [costs[name], 2 * costs[name]] for name in contenders}


def test_training_is_compared_within_each_round(setting, monkeypatch):
    costs = {"ours": 2.0, "classic U-Net in our loop": 4.0, f"classic U-Net, {BASELINE}": 12.0,
             "matrix products in float32": 1.0, "matrix products in bfloat16": 0.5}
    monkeypatch.setattr(parts, "alternate", fake_rounds(costs))
    monkeypatch.setattr(parts, "separate_process", lambda *args: contextlib.nullcontext({"classic U-Net": None}))
    monkeypatch.setattr(parts, "baseline_networks", lambda base_channels: {"classic U-Net": lambda: UNet(1, 1, 2)})
    monkeypatch.setattr(parts, "missing_networks", lambda base_channels: {"monai": "why"})
    record = {}
    found = {m.what: m for m in parts.training(setting, record)}
    assert record["not_timed"] == {"monai": "why"}
    assert found["ours"].value == BATCH / 3
    assert found["ours against the classic U-Net, baseline training"].value == 6
    assert found["ours against the classic U-Net, baseline training"].verdict == "holds"
    assert found["ours against the classic U-Net in our loop (the network)"].value == 2
    assert found["bfloat16 products against float32 ones, on which the bar of 5x depends"].value == 2
    in_float32, in_bfloat16 = (found[f"ours, in float32, against matrix products in {p}"] for p in
                               ("float32", "bfloat16"))
    done, possible = found["operations an image, ours"].value * 1e9 * BATCH / 2, 10 * 2 * 2048 ** 3
    assert in_float32.value == pytest.approx(done / possible)
    assert in_bfloat16.value == pytest.approx(done / possible / 2)
    assert (in_float32.bar, in_bfloat16.bar) == (None, None), "float32 is not measured by what bfloat16 can"


def test_the_start_is_told_without_the_import_of_torch(setting, monkeypatch):
    monkeypatch.setattr(parts, "alternate", fake_rounds({"help": 0.1, "import of torch": 2.0, "first step": 6.0}))
    found = {m.what: m.value for m in parts.start(setting, {})}
    assert found["command to first step, import of torch excluded"] == 6
    assert found["train_papsmear.py --help"] == pytest.approx(0.15)


def test_the_first_step_ends_the_command(shared_root, tmp_path):
    options = ("--data_root", shared_root, "--base_channels", "2", "--output_dir", tmp_path, "--experiment_name", "a")
    printed = timing.run_python("-u", "-c", parts.FIRST_STEP, *options)[1]
    assert "leakage:" in printed
    assert "epoch 1/" not in printed
    with pytest.raises(ChildProcessError, match="no step was taken, but the command ended with 2"):
        timing.run_python("-c", parts.FIRST_STEP, *options, "--lr", "0")


def test_memory_a_megapixel_is_a_slope(setting, monkeypatch):
    monkeypatch.setattr(parts, "alternate", fake_rounds({"prediction": 10.0, "forward": 9.5}))
    monkeypatch.setattr(parts, "separate_process", lambda *args: contextlib.nullcontext(dict.fromkeys(
        ("prediction", "forward"))))
    monkeypatch.setattr(parts, "call_in_processes", lambda function, side, *args: (
        500 + 20 * side ** 2 / 1e6) * 2 ** 20)
    found = {m.what: m for m in parts.prediction(setting, {})}
    assert found["memory a megapixel of image"].value == pytest.approx(20)
    assert found["memory besides"].value == pytest.approx(500)
    assert found["prediction against the network alone on its tiles"].value == pytest.approx(0.95)


def test_processes_train_together(setting):
    seconds = call_in_processes("benchmarks.workloads.training_in_processes", str(setting.root), 2, "float32", 2,
                                processes=2, threads=1)
    assert len(seconds) == 2


def test_bars_from_below_and_from_above():
    assert Measure("a", 5, "x", bar=5).verdict == "holds"
    assert Measure("a", 4.9, "x", bar=5).verdict == "falls short"
    assert Measure("a", 1.2, "x", bar=1.1, at_most=True).verdict == "falls short"
    assert Measure("a", 1.1, "x", bar=1.1, at_most=True).verdict == "holds"
    assert Measure("a", 1, "x").holds is None
    assert str(Measure("share", 0.7349, "%", bar=0.75)) == "share: 73.5 %   (bar at least 75.0 %: falls short)"


def test_a_separate_process_does_the_baseline_trainings(setting):
    with separate_process(baseline_trainings, setting) as contenders:
        assert next(iter(contenders)) == "classic U-Net"
        assert contenders["classic U-Net"]() > 0


def of_no_use() -> dict:
    raise SystemExit(3)


def test_the_end_of_a_process_is_noticed():
    with pytest.raises(ChildProcessError, match="of_no_use has ended with code 3"), separate_process(of_no_use):
        pass


def test_loaders_deliver_every_image(setting):
    for loader in (workloads.train_loaders(setting, workloads.pyramid_of(setting.root, 4))[64],
                   workloads.train_loaders(setting, workloads.pyramid_of(setting.root, 4, cached=False))[64]):
        batch, = loader
        assert batch["image"].shape == batch["mask"].shape == (4, 1, 64, 64)
    batch, = workloads.baseline_loader(setting, 64, 4, 32)
    assert batch[0].shape == batch[1].shape == (4, 1, 64, 64)
    assert 0 < batch[0].min() < batch[0].max() <= 1
    assert set(batch[1].unique().tolist()) == {0, 1}
    work = workloads.loadings(setting, cached=4, decoded=4)
    assert len(work) == 3 * 4
    assert all(one_pass() > 0 for one_pass in work.values())


def test_the_network_alone_gets_the_tiles_of_the_prediction(setting, monkeypatch):
    predictor = new_predictor(2, "cpu", "float32")
    shapes = []
    forward = ProgressiveUNet.forward

    def noting(self, x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(ProgressiveUNet, "forward", noting)
    work = tiled_prediction(setting, 1024, 1040)
    for name in ("prediction", "forward"):
        work[name]()
    assert shapes == [(1, 1, 1024, 1024)] * 4
    assert tile_batches(predictor, 1536, 1536) == [1] * 4
    predictor.batch_size = 4
    assert tile_batches(predictor, 1536, 4096) == [4, 2] * 2


def test_memory_is_that_of_the_process_alone():
    held = bytearray(300 * 2 ** 20)  # what this process holds is not counted in the one it starts
    assert peak_memory() > len(held)
    assert call_in_processes("system.machine.peak_memory") < 1.1 * peak_memory() - len(held)


def test_a_failure_in_another_process_is_said():
    with pytest.raises(ChildProcessError, match="no_such_function"):
        call_in_processes("timing.no_such_function")


def test_the_command_writes_its_three_files_and_replaces_none_unasked(tmp_path, monkeypatch, capsys):
    def few(setting):
        yield ("forward and backward", "side",
               {side: workloads.forward_and_backward(setting, side, 2) for side in (16, 32)}, 1, 0)

    monkeypatch.setattr(parts, "scaled_costs", few)
    monkeypatch.setattr(speed, "IMAGES", 64)
    monkeypatch.setattr(parts, "LOADED", {"cached": 8, "decoding": 2, "baseline": 2})
    kept = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: kept.append("here"))
    out = tmp_path / "out"
    options = ["--device", "cpu", "--parts", "scaling,growth", "--quick", "--rounds", "1", "--base_channels", "2",
               "--out", str(out)]
    assert speed.main(options) == 0
    assert kept == ["here"]
    printed = capsys.readouterr().out
    assert "look at" in printed
    assert printed.index("growth:") < printed.index("scaling:")
    results = json.loads((out / "benchmark.json").read_text())
    assert list(results["parts"]) == ["growth", "scaling"]
    assert results["settings"]["rounds"] == 1
    assert results["machine"]["processor"]
    rounds = results["parts"]["growth"]["rounds"]
    assert set(rounds) == {"matrix products"} | {f"training, stage {stage}" for stage in (1, 2, 3, 4)}
    assert all(len(costs) == 1 for costs in rounds.values())
    measures = {m["what"]: m for m in results["parts"]["growth"]["measures"]}
    by_operations = measures["equal epochs at all stages against as many at stage 4, by operations"]["value"]
    assert by_operations == pytest.approx(0.385, abs=0.01)
    for name, preset in PRESETS.items():
        epochs = ",".join(map(str, deal(preset["budget"], preset.get("shares", SHARES))))
        measure = measures[f"--preset {name} ({epochs}) against direct training with as many operations, by wall-clock"]
        assert 0 < measure["value"] < 1
    series, = results["parts"]["scaling"]["series"]
    assert series["sizes"] == [16, 32]
    assert math.isfinite(series["power"])
    table = (out / "benchmark.md").read_text()
    assert table.count("\n| growth |") == len(measures)
    assert "![Costs against sizes" in table
    assert Image.open(out / "benchmark.png").size[0] > 600

    assert speed.main(options) == 2
    assert "exists already" in capsys.readouterr().err
    assert (out / "benchmark.md").read_text() == table


@pytest.mark.parametrize(("options", "message"), [
    (("--parts", "training,speed"), "is not some of training,input,growth,start,prediction,scaling"),
    (("--rounds", "0"), "whole number of at least 1"), (("--device", "abacus"), "device is 'abacus'"),
    (("--precision", "float16", "--device", "cpu"), "it is for CUDA alone")])
def test_wrong_options_are_refused_before_anything_is_written(options, message, tmp_path, capsys):
    assert speed.main(words("--out", tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_parts_are_those_of_the_command():
    assert tuple(parts.MEASURES) == speed.PARTS


@pytest.mark.parametrize("name", ["speed", "experiments"])
def test_commands_run_as_files_and_as_modules(name, tmp_path):
    as_file = run_script(PROJECT / f"benchmarks/{name}.py", "--help", cwd=tmp_path)
    as_module = run_script("-m", f"benchmarks.{name}", "--help")
    assert as_file.stdout == as_module.stdout
    assert as_file.stdout.startswith(f"usage: benchmarks/{name}.py ")
    # Were the folder still on the path beside the root, `timing` and `benchmarks.timing` would be two modules.
    code = (f"import sys, runpy, importlib.util; sys.path[0] = {str(PROJECT / 'benchmarks')!r}; "
            f"runpy.run_path({str(PROJECT / f'benchmarks/{name}.py')!r}); "
            f"print(sys.path[0], importlib.util.find_spec('timing'), 'torch' in sys.modules)")
    assert run_script("-c", code, cwd=tmp_path).stdout.split() == [str(PROJECT), "None", "False"]


def test_ours_keeps_freed_memory_and_the_baseline_does_not(setting, monkeypatch):
    kept = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: kept.append("here"))
    baseline_trainings(setting)
    new_predictor(2, "cpu", "float32")
    workloads.our_training(setting)
    assert kept == [], "the command has called it for the trainings of its process"
    for make, arguments in ((tiled_prediction, (setting, 1024, 1024)), (workloads.predictions_by_side, (setting, [64])),
                            (workloads.memory_of_prediction, (64, 2, "cpu", "float32")),
                            (workloads.training_in_processes, (str(setting.root), 2, "float32", 1))):
        make(*arguments)
        assert kept == ["here"], make.__name__
        kept.clear()
