"""Tests of what the machine and the shell give: exit codes, help, devices, files that are whole."""

import math
from pathlib import Path

import pytest
import torch

from conftest import run_script
from progressive_trainer import ProgressiveTrainer
from system.devices import choose_device, choose_precision
from system.errors import NonFiniteLossError, UserError
from system.options import command
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
    (UserError("seed is x"), 2, "error: seed is x\n"), (OSError(28, "full"), 2, "error: [Errno 28] full\n"),
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


def test_a_name_that_the_console_cannot_show_ends_no_command(tmp_path):
    code = ("from system.options import command\n"
            "@command()\n"
            "def main(argv=None):\n"
            "    print('Zelle_\\u4e2d.png')\n"
            "raise SystemExit(main())\n")
    done = run_script("-c", code, environment={"PYTHONIOENCODING": "cp1252"})
    assert (done.returncode, done.stdout.strip()) == (0, r"Zelle_\u4e2d.png")
