"""Tests of files that mean harm: code in checkpoints, and what unpacks, points or names itself elsewhere.

Annotation files with entities, and run lengths and images of absurd sizes, are in test_annotations.py and
test_bad_input.py; names that steer terminals and spreadsheets in test_results.py.

    python -m pytest tests/test_security.py
"""

import ast
import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import evaluate_papsmear
import predict_papsmear
import train_papsmear
from checkpoints import FIELDS, load_checkpoint, load_model
from conftest import TINY, lively_model, make_trainer, noisy_image, write_checkpoint
from images.files import save_png
from inference import Predictor
from system.errors import UserError


class Payload:
    """An object whose unpickling writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "the payload ran")


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "marker"


def with_payload(path: Path, marker: Path, field: str, old_format: bool = False) -> Path:
    """Write a checkpoint that is right in all but one field, which holds a payload."""
    stored = torch.load(write_checkpoint(path, lively_model()), weights_only=True)
    torch.save(stored | {field: Payload(marker)}, path, _use_new_zipfile_serialization=not old_format)
    return path


def runs_when_trusted(path: Path, marker: Path) -> bool:
    """Tell whether a loader that trusts the file runs its payload; the test of a refusal is worth nothing otherwise."""
    torch.load(path, weights_only=False)
    ran = marker.exists()
    marker.unlink(missing_ok=True)
    return ran


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("field", [*FIELDS, "an additional field"])
def test_a_payload_in_any_field_is_refused_and_does_not_run(field, old_format, tmp_path, marker):
    path = with_payload(tmp_path / "c.pth", marker, field, old_format)
    for load in (load_checkpoint, load_model, Predictor):
        with pytest.raises(UserError, match="c.pth: no checkpoint that can be read"):
            load(path)
        assert not marker.exists()
    assert runs_when_trusted(path, marker)


def test_no_command_runs_a_payload(tmp_path, marker, shared_root, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("last.pth", "previous.pth", "best_stage_4.pth"):
        with_payload(run / name, marker, "config")
    save_png(tmp_path / "a.png", noisy_image(64, 64))
    best, data = str(run / "best_stage_4.pth"), ["--data_root", str(shared_root)]
    good = str(write_checkpoint(tmp_path / "good.pth", lively_model()))
    for main, arguments in (
            (predict_papsmear.main, [best, str(tmp_path / "a.png"), "--out", str(tmp_path / "p")]),
            (predict_papsmear.main, [f"{good},{best}", str(tmp_path / "a.png"), "--out", str(tmp_path / "p")]),
            (evaluate_papsmear.main, [best, *data]), (evaluate_papsmear.main, [good, *data, "--compare", best]),
            (train_papsmear.main, [*data, *TINY, "--init_from", best, "--output_dir", str(tmp_path)]),
            (train_papsmear.main, ["--resume", str(run)])):
        assert main(arguments) == 2
        assert "no checkpoint that can be read" in capsys.readouterr().err
        assert not marker.exists()
    trainer, _ = make_trainer(shared_root)
    with pytest.raises(UserError, match="no checkpoint that can be read"):
        trainer.resume(run / "last.pth")
    assert not marker.exists()
    assert runs_when_trusted(run / "last.pth", marker)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_does_not_run(tmp_path, marker):
    for name, content in (("bare.pth", pickle.dumps(Payload(marker))), ("zipped.pth", zipped(Payload(marker)))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="no checkpoint that can be read"):
            load_checkpoint(tmp_path / name)
        assert not marker.exists()


def zipped(value) -> bytes:
    """Return a pickle in an archive such as torch writes, but for the tensors."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def test_records_that_climb_out_of_an_archive_write_nothing(tmp_path):
    path = write_checkpoint(tmp_path / "c.pth", lively_model())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../climbed", "elsewhere")
        archive.writestr("/tmp/climbed_absolutely", "elsewhere")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match="no checkpoint that can be read"):
        load_checkpoint(path)
    assert set(tmp_path.iterdir()) == before
    assert not (tmp_path.parent / "climbed").exists()
    assert not Path("/tmp/climbed_absolutely").exists()


def runs_code(call: ast.Call) -> bool:
    """Tell whether a call evaluates a text, loads a pickle without a guard, or starts a shell."""
    name = ast.unparse(call.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return name in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "pickle.Unpickler") \
        or name == "torch.load" and keywords.get("weights_only") != "True" \
        or "True" in (keywords.get("shell"), keywords.get("allow_pickle"))


def test_nothing_in_the_project_runs_what_it_reads():
    root = Path(__file__).parents[1]
    for line in ("eval(a)", "torch.load(a)", "subprocess.run(a, shell=True)", "np.load(a, allow_pickle=True)"):
        assert runs_code(ast.parse(line).body[0].value), line
    modules = [path for path in (*root.glob("*.py"), *root.glob("[a-z]*/*.py"))
               if path.parent.name != "tests" and not path.name.startswith("test_")]
    assert len(modules) > 50
    for path in modules:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not [ast.unparse(call) for call in calls if runs_code(call)], path
