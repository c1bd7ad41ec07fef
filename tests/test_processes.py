"""Tests of several processes: two on the CPU compute what one does.

    python -m pytest tests/test_processes.py
"""

import gc
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from checkpoints import load_checkpoint
from conftest import TIMING, TINY, read_rows, run_script, write_data_set
from pap_smear_dataset import create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer
from system import options
from system.devices import choose_device
from system.errors import NonFiniteLossError, UserError
from system.processes import all_gather, all_reduce_sum, is_main_process, shard, unshard
from training.optimization import age_batchnorms, young_batchnorms
from training.parallel import GlobalBatchNorm2d, synchronised
from unet import STAGE_RESOLUTIONS, ProgressiveUNet

LIMIT = 240  # seconds after which processes that wait for each other are given up


class Recorder(ProgressiveTrainer):
    """Keep the loss of every batch, of training and validation alike, as the mean over the images of all processes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def forward(self, batch, network):
        logits, mask, loss = super().forward(batch, network)
        sums, images = all_reduce_sum(loss.item() * len(mask), len(mask))
        self.losses.append(sums / images)
        return logits, mask, loss


def trainer_of(dtype=torch.float64, epochs=1, device="cpu", **kwargs) -> Recorder:
    torch.manual_seed(0)
    return Recorder(ProgressiveUNet(base_channels=2).to(dtype), device=device, precision="float32",
                    epochs_per_stage=epochs, **kwargs)


def loaders_of(root: Path, batch: int, device="cpu") -> dict:
    return create_progressive_dataloaders(root, dict.fromkeys(STAGE_RESOLUTIONS.values(), batch), device=device)


def train(trainer: Recorder, loaders: dict, epochs: dict[int, int]) -> dict:
    """Train so many epochs of each stage; return what must not depend on the number of processes."""
    rows = []
    for stage, count in epochs.items():
        trainer.set_stage(stage)
        for epoch in range(trainer.finished_epochs, count):
            train_loader, valid_loader, _ = loaders[STAGE_RESOLUTIONS[stage]]
            both = trainer.train_epoch(train_loader, epoch), trainer.validate_epoch(valid_loader, epoch)
            trainer.record(*both)
            rows += [{name: value for name, value in metrics.items() if name not in TIMING}
                     for metrics in both]
    live = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    return {"losses": trainer.losses, "rows": rows, "state": trainer.evaluated_model.state_dict(), "live": live}


def scenarios(root: Path, folder: Path) -> dict[str, dict]:
    """Run every training that is compared, in whatever number of processes; 8 images in batches of 3 are 3, 3 and 2.

    The 51 steps of `growth` have one in their middle. The first process saves
    `interrupted` in `folder`.
    """
    results = {
        "growth": train(trainer_of(epochs=[8, 9, 1, 1]), loaders_of(root, 3), {1: 8, 2: 9}),
        "accumulated": train(trainer_of(epochs=[2, 2, 1, 1], accumulate=2, average=0.9), loaders_of(root, 3),
                             {1: 2, 2: 2, 3: 1}),
        "batches of one": train(trainer_of(), loaders_of(root, 1), {1: 1, 2: 1}),
        "float32": train(trainer_of(torch.float32, 2), loaders_of(root, 3), {1: 2}),
        "bfloat16": train(low_precision(), loaders_of(root, 3), {1: 1}),
    }
    train(trainer_of(epochs=2, output_dir=folder), loaders_of(root, 3), {1: 1})
    return results


def low_precision() -> Recorder:
    trainer = trainer_of(torch.float32)
    trainer.precision = "bfloat16"
    return trainer


def continued(root: Path, folder: Path) -> dict:
    """Resume what `scenarios` saved: the second epoch of stage 1, then stage 2."""
    trainer = trainer_of(epochs=2)
    trainer.resume(folder / "last.pth")
    return train(trainer, loaders_of(root, 3), {1: 2, 2: 1})


def refusal(root: Path) -> str:
    """Return what is said of a batch in which one image of the last process is not a number."""
    loaders = loaders_of(root, 4)
    batch = next(iter(loaders[32][0]))
    if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
        batch["image"][0, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteLossError) as caught:
        trainer_of().train_epoch([batch], 0)
    return str(caught.value)


def in_a_process(rank: int, processes: int, out: Path, work, *args) -> None:
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and work is first_steps_on_cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{out}.meeting", rank=rank, world_size=processes)
    torch.save(work(*args), f"{out}.{rank}")
    dist.destroy_process_group()


def in_processes(processes: int, out: Path, work, *args) -> list:
    """Call `work` in so many processes and return what each returned."""
    context = multiprocessing.spawn(in_a_process, (processes, out, work, *args), processes, join=False)
    give_up = time.monotonic() + LIMIT
    while not context.join(timeout=5):
        if time.monotonic() > give_up:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{processes} processes were not done after {LIMIT} s")
    return [torch.load(f"{out}.{rank}", weights_only=False) for rank in range(processes)]


def everything(root: Path, own: Path, other: Path) -> dict:
    """Do all that is tested inside a group, so that the processes are started once."""
    return scenarios(root, own) | {"continued": continued(root, other), "refusal": refusal(root),
                                   "wrappers left": wrappers_left(root), "all may learn": all_may_learn(root),
                                   "shards": (list(shard(range(5))), unshard(shard(range(5))),
                                              all_gather(is_main_process())),
                                   "statistics": normalised(shard(numbers())),
                                   "devices": [refused_device(name) for name in ("mps", "cuda:0")]}


def wrappers_left(root: Path) -> int:
    """Train with `fit` and count the wrappers that are still there; one that outlives its group may end the process."""
    model = ProgressiveUNet(base_channels=2)
    model.set_stage(4)
    trainer = ProgressiveTrainer(model, "cpu", 1, precision="float32")
    trainer.fit(loaders_of(root, 4), say=lambda line: None)
    return sum(type(thing) is DistributedDataParallel and thing.module is model for thing in gc.get_objects())


def all_may_learn(root: Path) -> bool:
    """Train at stage 1, leave the group, and tell whether parts that are born later can learn in another loop."""
    trainer = trainer_of(torch.float32)
    trainer.train_epoch(loaders_of(root, 4)[32][0], 0)
    trainer.leave_group()
    return all(p.requires_grad for p in trainer.model.parameters())


def refused_device(name: str) -> str:
    with pytest.raises(ValueError, match="processes") as caught:
        synchronised(torch.nn.Sequential(), torch.device(name))
    return str(caught.value)


def numbers() -> torch.Tensor:
    return torch.randn(5, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 2


def normalised(x: torch.Tensor) -> dict:
    """Normalise twelve batches, the last with gradients of known kind, all images being in `x`."""
    layer = synchronised(torch.nn.Sequential(torch.nn.BatchNorm2d(3)).double(), torch.device("cpu"))
    layer.live_parts = lambda: ["0"]
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
    young = young_batchnorms(layer)
    for k in range(12):
        age_batchnorms(young)
        inputs = (x + k).requires_grad_()
        y = layer(inputs)
    (y ** 3).sum().backward()
    gradients = [layer[0].weight.grad, layer[0].bias.grad]
    if dist.is_initialized():
        for gradient in gradients:
            dist.all_reduce(gradient)
    return {"y": y.detach(), "of_x": inputs.grad, "of_weight": gradients[0], "of_bias": gradients[1],
            "state": layer.state_dict()}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict, list[dict], Path]:
    """Return what one process computed, what each of two did, and the folder above their run folders."""
    folder = tmp_path_factory.mktemp("processes")
    root = write_data_set(folder / "data", (8, 3, 3))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = scenarios(root, folder / "run_of_one")
    together = in_processes(2, folder / "out", everything, root, folder / "run_of_two", folder / "run_of_one")
    alone |= {"continued": continued(root, folder / "run_of_two"), "refusal": refusal(root),
              "statistics": normalised(numbers())}
    torch.set_num_threads(threads)
    return alone, together, folder


def deviation(a: dict, b: dict, first: int | None = None) -> float:
    """Return the largest difference of two loss curves, of all measures, and of all weights and statistics."""
    differences = [abs(x - y) for x, y in zip(a["losses"][:first], b["losses"][:first], strict=True)]
    if first is None:
        for own, other in zip(a["rows"], b["rows"], strict=True):
            assert own.keys() == other.keys()
            differences += [abs(own[name] - other[name]) for name in own]
        assert list(a["state"]) == list(b["state"])
        differences += [float((a["state"][k].double() - b["state"][k].double()).abs().max()) for k in a["state"]]
    return max(differences)


@pytest.mark.parametrize("name", ["growth", "accumulated", "batches of one", "continued"])
def test_two_processes_compute_what_one_does(results, name):
    """Losses, measures, weights and running statistics, over growth, uneven and empty shares and a resume."""
    alone, together, _ = results
    for own in together:
        assert deviation(alone[name], own[name]) < 1e-9
    assert len(alone["growth"]["losses"]) == 51 + 17, "51 steps of training, 17 batches of validation"


def test_fit_lets_the_wrapper_go_before_its_group(results):
    _, together, _ = results
    assert [one["wrappers left"] for one in together] == [0, 0]
    assert all(one["all may learn"] for one in together)


def test_first_steps_in_float32_agree(results):
    alone, together, _ = results
    assert deviation(alone["float32"], together[0]["float32"], first=5) < 1e-4
    assert deviation(alone["bfloat16"], together[0]["bfloat16"], first=3) < 0.05
    states = [own["float32"]["state"] for own in together]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), "to the last bit in all processes"


def test_parameters_outside_the_graph_ask_for_no_gradient(results):
    alone, together, _ = results
    live = set(together[0]["growth"]["live"])  # at stage 2
    assert "encoder.64.from_image.weight" in live
    assert not any(name.startswith(("encoder.64.from_finer", "encoder.128", "heads.128")) for name in live)
    assert len(alone["growth"]["live"]) == len(list(ProgressiveUNet(base_channels=2).parameters())), "one: untouched"


def test_batch_normalisation_of_parts_is_that_of_the_whole(results):
    alone, together, _ = results
    whole, parts = alone["statistics"], [own["statistics"] for own in together]
    for key in ("y", "of_x"):
        joined = torch.stack([parts[i % 2][key][i // 2] for i in range(5)])
        assert torch.allclose(joined, whole[key], rtol=0, atol=1e-12)
    for part in parts:
        for key in ("of_weight", "of_bias"):
            assert torch.allclose(part[key], whole[key], rtol=1e-12)
        assert all(torch.allclose(part["state"][key], whole["state"][key], rtol=1e-12) for key in whole["state"])


def test_lists_are_shared_and_put_together_again(results):
    _, together, _ = results
    assert together[0]["shards"] == ([0, 2, 4], [0, 1, 2, 3, 4], [True, False])
    assert together[1]["shards"] == ([1, 3], [0, 1, 2, 3, 4], [True, False])
    assert shard([1, 2]) == [1, 2]
    assert unshard([1, 2]) == [1, 2]
    assert all_reduce_sum(3) == [3]


def test_one_bad_image_stops_all_processes_with_one_message(results):
    alone, together, _ = results
    assert together[0]["refusal"] == together[1]["refusal"]
    for name in ("stage 1, epoch 1, batch 1", *(f"train_{i}" for i in range(8))):
        assert (name in alone["refusal"]) == (name in together[0]["refusal"]), "the images of the whole batch"


def test_processes_that_cannot_work_together_refuse_in_all_of_them(results):
    _, together, _ = results
    for own in together:
        mps, shared_cuda = own["devices"]
        assert "device is 'mps'" in mps
        assert "2 processes share cuda:0; each needs a CUDA device of its own" in shared_cuda


@pytest.mark.parametrize(("rank", "device"), [("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")])
def test_each_process_takes_a_device_of_its_own(rank, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(choose_device("auto")) == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(choose_device("auto")) == str(choose_device("cuda")) == device
    assert str(choose_device("cuda:1")) == "cuda:1"
    assert str(choose_device("cpu")) == "cpu"


def test_one_process_writes_and_the_files_do_not_depend_on_their_number(results):
    _, _, folder = results
    files = [sorted(p.name for p in (folder / run).iterdir()) for run in ("run_of_one", "run_of_two")]
    assert files[0] == files[1]
    rows = [read_rows(folder / run / "metrics.csv") for run in ("run_of_one", "run_of_two")]
    assert [len(table) for table in rows] == [1, 1], "one epoch, written once"
    one, two = (load_checkpoint(folder / run / "last.pth") for run in ("run_of_one", "run_of_two"))
    assert list(one["model"]) == list(two["model"])
    assert list(one["unborn"]) == list(two["unborn"])


def test_a_single_process_keeps_its_network_as_it_is():
    model = ProgressiveUNet(base_channels=2)
    trainer = ProgressiveTrainer(model, device="cpu")
    assert trainer.model is model
    assert not any(isinstance(m, GlobalBatchNorm2d | torch.nn.SyncBatchNorm) for m in model.modules())
    with trainer.parallel.batch(last=True) as network:
        assert network is model


def torchrun(*arguments, processes: int = 2):
    return run_script("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *arguments)


@pytest.fixture(scope="module")
def run_of_two(shared_root, tmp_path_factory):
    """Return the folder of a run through all stages by two processes and what they printed."""
    output = tmp_path_factory.mktemp("torchrun")
    done = torchrun("train_papsmear.py", "--data_root", shared_root, "--output_dir", output, "--experiment_name",
                    "two", *TINY)
    assert done.returncode == 0, done.stderr
    return output / "two", done.stdout


def test_torchrun_trains_through_all_stages(run_of_two, trained_run):
    folder, printed = run_of_two
    alone, printed_alone = trained_run
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in alone.iterdir())
    for line in ("data set", "stage 4 (256x256) epoch 1/1", "test split, 3 images", "look at"):
        assert printed.count(line) == printed_alone.count(line) == 1
    assert json.loads((folder / "config.json").read_text())["resolved"]["processes"] == 2
    one, two = (read_rows(run / "metrics.csv") for run in (alone, folder))
    assert len(two) == 4
    for own, other in zip(one, two, strict=True):
        for name in set(own) - TIMING:
            assert float(other[name]) == pytest.approx(float(own[name]), rel=0.02, abs=0.02), name


def test_what_two_processes_refuse_is_said_once(run_of_two, shared_root):
    folder, _ = run_of_two
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    done = torchrun("train_papsmear.py", "--data_root", shared_root, "--output_dir", folder.parent,
                    "--experiment_name", folder.name, *TINY)
    assert done.returncode != 0
    assert done.stderr.count("this run folder exists already") == 1
    assert "exitcode  : 2" in done.stderr
    assert "Traceback" not in done.stderr.split("error:")[0]
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_torchrun_evaluates_and_predicts_as_one_process_does(trained_run, shared_root, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    checkpoint = trained_run[0] / "best_stage_4.pth"
    options_ = ("--data_root", shared_root, "--instances", "--all_scales")
    one = run_script("evaluate_papsmear.py", checkpoint, *options_, "--out", tmp_path / "one")
    two = torchrun("evaluate_papsmear.py", checkpoint, *options_, "--out", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "one/scores.csv").read_bytes() == (tmp_path / "two/scores.csv").read_bytes()
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["scores"] == summaries[1]["scores"]
    dice = [[scale["dice"] for scale in summary["scales"].values()] for summary in summaries]
    assert dice[0] == dice[1]
    assert len(two.stdout.splitlines()) == len(one.stdout.splitlines()), "printed once"

    images = shared_root / "test/images"
    one = run_script("predict_papsmear.py", checkpoint, images, "--out", tmp_path / "whole")
    two = torchrun("predict_papsmear.py", checkpoint, images, "--out", tmp_path / "shared")
    assert one.returncode == two.returncode == 0, two.stderr
    shared = [row for i in (1, 2) for row in read_rows(tmp_path / f"shared/nuclei_{i}_of_2.csv")]
    assert sorted(shared, key=lambda row: (row["image"], int(row["label"]))) == read_rows(tmp_path / "whole/nuclei.csv")
    for path in (tmp_path / "whole").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "shared" / path.name).read_bytes()


def test_an_error_of_a_later_process_alone_is_said_too(monkeypatch, capsys):
    @options.command()
    def main(argv=None):
        raise UserError("no such file")

    waited = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(options.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main() == 2
        assert capsys.readouterr().err == "error: no such file\n"
        assert waited == [options.PATIENCE] * int(rank), "torchrun has ended it by then, if the first failed too"


def first_steps_on_cuda(root: Path) -> dict:
    """Train two epochs on CUDA, a device for each process."""
    device = f"cuda:{dist.get_rank() if dist.is_initialized() else 0}"
    result = train(trainer_of(torch.float32, 2, device), loaders_of(root, 3, device), {1: 2, 2: 1})
    return result | {"state": {key: tensor.cpu() for key, tensor in result["state"].items()}}


@pytest.mark.parametrize("processes", [1, 2])
def test_cuda_computes_what_one_process_does(processes, tmp_path):
    """Under nccl, with torch's SyncBatchNorm."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"fewer than {processes} CUDA devices on this machine")
    root = write_data_set(tmp_path / "data", (8, 3, 3))
    alone = first_steps_on_cuda(root)
    for own in in_processes(processes, tmp_path / "out", first_steps_on_cuda, root):
        assert deviation(alone, own, first=5) < 1e-4
        assert list(alone["state"]) == list(own["state"])
