"""Tests of what the machine and the shell give: exit codes, help, devices, files that are whole."""

import errno
import math
import os
from pathlib import Path

import pytest
import torch

from conftest import run_script
from progressive_trainer import ProgressiveTrainer
from system import machine, processes
from system.atomic import atomic_write, folder_made
from system.devices import choose_device, choose_precision, set_up_process
from system.errors import NonFiniteLossError, UserError
from system.machine import nearest_existing
from system.options import command
from system.tables import as_known, read_table, write_table
from training.run_folder import RunFolder
from unet import ProgressiveUNet


def test_device_and_precision_errors():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="Use 'cpu', or 'auto'"):
            ProgressiveTrainer(ProgressiveUNet(base_channels=2), device="cuda")
    with pytest.raises(ValueError, match="float16"):
        choose_precision("float16", torch.device("cpu"))
    with pytest.raises(ValueError, match="must be one of"):
        choose_device("gpu")
    for wrong in ({"lr": 0.0}, {"lr": math.nan}, {"accumulate": 0}, {"average": 1.0}, {"epochs_per_stage": 0},
                  {"schedule": "step"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ProgressiveTrainer(ProgressiveUNet(base_channels=2), device="cpu", **wrong)


@pytest.mark.parametrize(("error", "code", "said"), [
    (UserError("seed is x"), 2, "error: seed is x\n"), (OSError(13, "mine"), 2, "error: [Errno 13] mine\n"),
    (NonFiniteLossError("nan found"), 1, "error: nan found\n"),
    (KeyboardInterrupt(), 130, "\ninterrupted; nothing was written\n")])
def test_what_goes_wrong_becomes_an_exit_code(error, code, said, capsys):
    @command(interrupted="nothing was written")
    def main(argv):
        raise error
    assert main([]) == code
    assert capsys.readouterr().err == said
    assert [command()(lambda argv, value=value: value)() for value in (None, 1)] == [0, 1]
    for fault in (lambda argv: 1 / 0, lambda argv: list(zip([1], [], strict=True)),
                  lambda argv: Path("no/such/file").read_text()):
        with pytest.raises((ZeroDivisionError, ValueError, FileNotFoundError)):  # faults of ours keep their traceback
            command()(fault)()


def test_help_needs_no_torch():
    code = "import sys, train_papsmear; train_papsmear.parse(['--lr', '1']); print('torch' in sys.modules)"
    assert run_script("-c", code).stdout.strip() == "False"
    assert run_script("train_papsmear.py", "--help").returncode == 0


def test_memory_and_cpus_are_those_of_the_container(tmp_path, monkeypatch):
    everything, cpus = machine.free_memory(), machine.cpu_count()
    assert cpus == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpus >= 1
    monkeypatch.setattr(machine, "CGROUP", str(tmp_path))
    for name, text in (("memory.max", "3000000"), ("memory.current", "1000000"), ("cpu.max", "100000 100000")):
        (tmp_path / name).write_text(text + "\n")
    assert machine.free_memory() == 2_000_000
    assert machine.cpu_count() == 1
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.free_memory() > 0.5 * everything
    assert machine.cpu_count() == cpus


def test_a_name_that_the_console_cannot_show_ends_no_command(tmp_path):
    code = ("from system.options import command\n"
            "@command()\n"
            "def main(argv=None):\n"
            "    print('Zelle_\\u4e2d.png')\n"
            "raise SystemExit(main())\n")
    done = run_script("-c", code, environment={"PYTHONIOENCODING": "cp1252"})
    assert (done.returncode, done.stdout.strip()) == (0, r"Zelle_\u4e2d.png")


def test_float32_on_cuda_is_no_tf32_in_a_command():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        set_up_process(torch.device("cuda"), "bfloat16")
        assert torch.backends.cudnn.allow_tf32
        set_up_process(torch.device("cuda"), "float32")
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("backend", "device"), [
    ("cuda:nccl", "cuda"), ("cpu:gloo,cuda:gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu")])
def test_numbers_are_exchanged_where_the_group_can(backend, device, monkeypatch):
    """A group of nccl alone knows no tensor on the CPU."""
    monkeypatch.setattr(processes.dist, "get_backend_config", lambda: backend)
    assert processes.exchange_device().type == device


def test_the_nearest_folder_of_any_path_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for odd in ("x" * 300, "a\0", "loop", "a/" * 3000):
        assert nearest_existing(tmp_path / odd / "b") == tmp_path
    assert nearest_existing(tmp_path / "file/b") == tmp_path / "file"
    assert nearest_existing(Path("a/b")).samefile(tmp_path)
    assert nearest_existing(Path()) == Path()


def test_what_was_made_for_nothing_goes_and_all_else_stays(tmp_path):
    (tmp_path / "there").mkdir()
    for made in ("there", "there/a/b"):
        with pytest.raises(ZeroDivisionError), folder_made(tmp_path / made):
            assert 1 / (not (tmp_path / made).is_dir())
        assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with pytest.raises(ZeroDivisionError), folder_made(tmp_path / "there/a/b"):
        raise ZeroDivisionError((tmp_path / "there/a/mine").touch())
    assert sorted(tmp_path.rglob("*")) == [tmp_path / name for name in ("there", "there/a", "there/a/mine")]
    with pytest.raises(OSError, match="long"), folder_made(tmp_path / f"new/{'x' * 300}"):
        pass
    assert not (tmp_path / "new").exists()


def test_tables_hold_the_digits_that_are_known(tmp_path):
    RunFolder(tmp_path).write_csv("a.csv", [{"dice": 0.7955182072829131, "n": 12345678901}], ("dice", "n"))
    assert list(read_table(tmp_path / "a.csv")) == [{"dice": "0.7955182", "n": "12345678901"}]
    assert math.isnan(as_known(math.nan))
    write_table(tmp_path / "b.csv", ("x",), [{"x": 1 / 3}])
    assert next(read_table(tmp_path / "b.csv")) == {"x": str(1 / 3)}, "whoever writes it rounds"


def test_threads_of_a_busy_machine_wait_for_a_short_time_alone(monkeypatch):
    for load, given, expected in ((0.1, {}, None), (1.2, {}, "3000"), (1.2, {"GOMP_SPINCOUNT": "7"}, "7"),
                                  (1.2, {"OMP_WAIT_POLICY": "ACTIVE"}, None)):
        environment = dict(given)
        monkeypatch.setattr(machine.os, "environ", environment)
        monkeypatch.setattr(machine.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        machine.share_cores()
        assert environment.get("GOMP_SPINCOUNT") == expected
    monkeypatch.delattr(machine.os, "getloadavg")
    machine.share_cores()  # as on Windows


def test_commands_decide_before_torch_is_loaded():
    """OpenMP reads its settings when it is loaded."""
    script = ("import os, sys; os.environ.pop('OMP_WAIT_POLICY', 0); os.environ.pop('GOMP_SPINCOUNT', 0)\n"
              "os.getloadavg = lambda: (2.0, 0, 0); from system.options import command\n"
              "assert 'torch' not in sys.modules\n"
              "command()(lambda argv: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules))()")
    done = run_script("-c", script)
    assert done.stdout.split() == ["3000", "False"], done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_a_disk_that_takes_nothing_ends_any_command_with_code_3(number, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    @command(interrupted="nothing was written")
    def main(argv=None):
        with atomic_write(tmp_path / "page.html") as file:
            file.write(b"a")

    monkeypatch.setattr(os, "fsync", refuse)
    assert main([]) == 3
    assert capsys.readouterr().err == (f"error: {tmp_path / 'page.html'}: {os.strerror(number)}; nothing was written. "
                                       f"Make room, mend the disk or write elsewhere\n")
    assert not list(tmp_path.iterdir())
