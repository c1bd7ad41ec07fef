"""Tests of a prediction that is killed, stopped, short of space or run twice: what is finished stays, and it goes on.

    python -m pytest tests/test_results.py
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import evaluate_papsmear
import predict_papsmear
from conftest import PROJECT, lively_model, noisy_image, read_rows, write_checkpoint
from images import bands, files
from images.files import save_png
from nuclei import results
from scoring import scores, unfinished
from system import tables
from system.tables import append_rows, columns_of, read_table

NAMES = ("a", "b", "c", "d", "e")
OF_TIME = ("seconds", "modified", "finished", "run")
# Do as a command does, but let the n-th call of a function send this process a signal before it does its work.
SIGNALLED = """
import os, sys
import nuclei.results
import {script}
nuclei.results.SHORT = 60.0  # a table is written at once, however slow the machine is
from {module} import {place}
count, work = 0, {place}.{name}
def signalled(*arguments, **options):
    global count
    count += 1
    if count == {n}:
        os.kill(os.getpid(), {number})
    return work(*arguments, **options)
{place}.{name} = signalled
sys.exit({script}.main(sys.argv[1:]))
"""


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        save_png(folder / f"{name}.png", noisy_image(64, 64, seed=i))
    return folder


@pytest.fixture
def command(images, tmp_path):
    """The arguments of a prediction in which every image has nuclei, but --out."""
    checkpoint = write_checkpoint(tmp_path / "c.pth", lively_model())
    return [str(checkpoint), str(images), "--min_area", "0", "--min_probability", "0", "--device", "cpu"]


def predict(command, out, *options, code: int = 0) -> None:
    assert predict_papsmear.main([*command, "--out", str(out), *options]) == code


def signalled(command, out, *options, n: int, number=signal.SIGKILL, module="nuclei", place="results",
              name="image_row") -> subprocess.CompletedProcess:
    """Predict in a process of its own that gets a signal at the n-th call of a function, of image_row: n-th image."""
    return run_signalled("predict_papsmear", [*command, "--out", str(out), *options], n, number, module, place, name)


def run_signalled(script, arguments, n, number, module, place, name) -> subprocess.CompletedProcess:
    code = SIGNALLED.format(script=script, module=module, place=place, name=name, n=n, number=int(number))
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=PROJECT, text=True, capture_output=True,
                          timeout=120)


def content(out) -> dict:
    """Return what a folder of results holds: rows of the tables but for times, and the bytes of the pictures."""
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".png", ".tif")}
    for name in ("nuclei.csv", "images.csv"):
        rows = [{key: value for key, value in row.items() if key not in OF_TIME} for row in read_rows(out / name)]
        found[name] = sorted(rows, key=lambda row: (row["image"], int(row.get("label", 0))))
    return found


# ---- kills


def test_a_killed_prediction_keeps_what_is_finished_and_goes_on(command, tmp_path):
    predict(command, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    out = tmp_path / "out"
    assert signalled(command, out, n=3).returncode == -signal.SIGKILL
    assert [row["image"] for row in read_rows(out / "images.csv")] == ["a.png", "b.png"]
    assert content(out)["nuclei.csv"] == [row for row in whole["nuclei.csv"] if row["image"] < "c"]
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("[ab]_*")}
    predict(command, out, "--continue")
    assert content(out) == whole
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("[ab]_*")} == kept, "not predicted again"


def test_a_kill_between_nuclei_and_their_image_leaves_no_row_twice(command, tmp_path):
    predict(command, tmp_path / "whole")
    out = tmp_path / "out"
    # Of the calls of append_rows the odd ones are for nuclei.csv, the even ones for images.csv.
    assert signalled(command, out, n=4, name="append_rows").returncode == -signal.SIGKILL
    assert {row["image"] for row in read_rows(out / "nuclei.csv")} == {"a.png", "b.png"}
    assert {row["image"] for row in read_rows(out / "images.csv")} == {"a.png"}
    predict(command, out, "--continue")
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("n", [1, 3])
def test_overwriting_replaces_an_image_when_its_new_results_are_whole(n, command, tmp_path):
    other = [*command, "--threshold", "0.6"]
    predict(command, tmp_path / "old")
    predict(other, tmp_path / "new")
    out = tmp_path / "out"
    predict(command, out)
    old, new = content(tmp_path / "old"), content(tmp_path / "new")
    assert old["nuclei.csv"] != new["nuclei.csv"]
    assert signalled(other, out, "--overwrite", n=n).returncode == -signal.SIGKILL
    killed, replaced = content(out), NAMES[:n - 1]
    for table in ("nuclei.csv", "images.csv"):
        assert killed[table] == [row for name in NAMES for row in (new if name in replaced else old)[table]
                                 if row["image"] == f"{name}.png"]
    for name in NAMES:
        picture = f"{name}_mask.png"
        assert killed[picture] == (new if name in replaced else old)[picture]
    predict(other, out, "--continue")
    assert content(out) == new, "those of before are predicted anew too"


def test_large_images_leave_nothing_half_written(command, images, tmp_path, monkeypatch):
    monkeypatch.setattr(bands, "OVERVIEW_SIDE", 40)
    whole, out = tmp_path / "whole", tmp_path / "out"
    checkpoint = str(write_checkpoint(tmp_path / "t.pth", lively_model(1), "tile"))
    streamed = [checkpoint, *command[1:], "--stream_above", "0"]
    predict(streamed, whole)
    done = signalled(streamed, out, n=2, module="nuclei", place="streaming", name="write_tiff")
    assert done.returncode == -signal.SIGKILL
    assert not list(out.glob("*.tif"))
    assert list(out.glob("*.unfinished"))
    (out / "mine.unfinished").write_text("mine")
    predict(streamed, out, "--continue")
    assert content(out).keys() == content(whole).keys()
    assert content(out)["nuclei.csv"] == content(whole)["nuclei.csv"]
    assert [path.name for path in out.glob("*unfinished*")] == ["mine.unfinished"]


# ---- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_image_and_says_how_to_go_on(number, code, command, tmp_path):
    out = tmp_path / "out"
    done = signalled(command, out, n=3, number=number)
    assert done.returncode == code
    assert done.stderr.strip() == "interrupted; finished images are written; the same command with --continue goes on"
    assert [row["image"] for row in read_rows(out / "images.csv")] == ["a.png", "b.png", "c.png"]
    predict(command, out, "--continue")
    assert len(read_rows(out / "images.csv")) == 5


def test_a_signal_stops_a_large_image_between_its_bands(command, tmp_path):
    checkpoint = str(write_checkpoint(tmp_path / "t.pth", lively_model(1), "tile"))
    out = tmp_path / "out"
    done = signalled([checkpoint, *command[1:], "--stream_above", "0"], out, n=1, number=signal.SIGTERM,
                     module="inference", place="Predictor", name="predict_bands")
    assert done.returncode == 143
    assert not (out / "images.csv").exists()
    assert not list(out.glob("*.unfinished"))


# ---- going on


def test_going_on_is_refused_with_other_settings_and_where_nothing_was_begun(command, tmp_path, capsys):
    out = tmp_path / "out"
    predict(command, out, "--continue", code=2)
    assert f"--continue: {out} holds no settings.json" in capsys.readouterr().err
    assert not out.exists()
    predict(command, out, "--threshold", "0.4")
    before = content(out)
    for options, words in ((("--threshold", "0.6"), "threshold was 0.4 in"), (("--augment",), "threshold was 0.4"),
                           (("--threshold", "0.4", "--augment"), "augment was False"),
                           (("--threshold", "0.4", "--pixel_size", "0.5"), "pixel_size was None"),
                           (("--threshold", "0.4", "--overwrite"), "not allowed with argument")):
        capsys.readouterr()
        predict(command, out, "--continue", *options, code=2)
        assert words in capsys.readouterr().err
    write_checkpoint(tmp_path / "c.pth", lively_model(seed=1))
    predict(command, out, "--threshold", "0.4", "--continue", code=2)
    assert "sha256 was" in capsys.readouterr().err
    assert content(out) == before
    (out / "settings.json").write_text("{")
    predict(command, out, "--threshold", "0.4", "--continue", code=2)
    assert "settings.json: cannot be read" in capsys.readouterr().err


def test_going_on_with_a_finished_prediction_does_nothing_but_new_images(command, images, tmp_path, capsys):
    out = tmp_path / "out"
    predict(command, out)
    before = content(out), (out / "images.csv").read_bytes()
    predict(command, out, "--continue", "--precision", "float32")
    assert "5 images; foreground from probability 0.5; 5 are finished, 0 are left" in capsys.readouterr().out
    assert (content(out), (out / "images.csv").read_bytes()) == before
    save_png(images / "f.png", noisy_image(64, 64, seed=9))
    (out / "b_overlay.png").unlink()
    predict(command, out, "--continue")
    assert "4 are finished, 2 are left" in capsys.readouterr().out
    assert [row["image"] for row in content(out)["images.csv"]] == [f"{name}.png" for name in (*NAMES, "f")]
    runs = json.loads((out / "settings.json").read_text())["runs"]
    assert len(runs) == 1
    assert {row["run"] for row in read_rows(out / "images.csv")} == set(runs)


def test_an_image_that_fails_is_tried_again_and_keeps_its_earlier_results(command, images, tmp_path, capsys):
    out = tmp_path / "out"
    predict(command, out)
    old, good = content(out), (images / "b.png").read_bytes()
    (images / "b.png").write_bytes(good[:40])
    predict(command, out, "--overwrite", "--threshold", "0.6", code=1)
    now = content(out)
    assert [row for row in now["nuclei.csv"] if row["image"] == "b.png"] == \
        [row for row in old["nuclei.csv"] if row["image"] == "b.png"]
    assert now["b_mask.png"] == old["b_mask.png"]
    assert now["a_mask.png"] != old["a_mask.png"]
    (images / "b.png").write_bytes(good)
    predict(command, out, "--continue", "--threshold", "0.6")
    predict(command, tmp_path / "new", "--threshold", "0.6")
    assert content(out) == content(tmp_path / "new")


def test_another_image_of_the_same_name_is_not_finished(command, images, tmp_path, capsys):
    out = tmp_path / "out"
    predict(command, out)
    save_png(images / "b.png", noisy_image(64, 64, seed=99))
    capsys.readouterr()
    predict(command, out, "--continue")
    assert f"{len(NAMES) - 1} are finished, 1 are left" in capsys.readouterr().out
    predict(command, tmp_path / "new")
    assert content(out) == content(tmp_path / "new")


@pytest.mark.parametrize("kind", ["nuclei.geojson", "instances.png", "mask.png"])
def test_corrected_outlines_are_not_removed_by_a_prediction_of_other_kinds(kind, command, tmp_path, capsys):
    out = tmp_path / "out"
    predict(command, out, "--format", "png,geojson")
    file = out / f"b_{kind}"
    later = file.stat().st_mtime + 60
    os.utime(file, (later, later))
    before = {path: path.read_bytes() for path in out.iterdir()}
    predict(command, out, "--overwrite", "--format", "ome-tiff", code=2)
    assert f"{file}: changed after the prediction that wrote it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    # Also after another image was predicted into the folder, and by one of several processes.
    predict([command[0], str(tmp_path / "in/a.png"), *command[2:]], out, "--overwrite", "--format", "png,geojson")
    predict(command, out, "--overwrite", "--format", "ome-tiff", code=2)
    predict(command, out, "--overwrite", "--format", "ome-tiff", "--shard", "2/3", code=2)
    predict(command, out, "--overwrite", "--format", "png,geojson")
    predict(command, out, "--overwrite", "--format", "ome-tiff")
    assert not file.exists(), "as the prediction wrote it"


def test_tables_of_other_parts_are_named(command, tmp_path, capsys):
    out = tmp_path / "out"
    predict(command, out, "--shard", "1/2")
    predict(command, out, "--shard", "2/2")
    assert "warning" not in capsys.readouterr().out
    predict(command, out, "--overwrite")
    assert f"warning: {out} holds images_1_of_2.csv, images_2_of_2.csv of an earlier" in capsys.readouterr().out
    predict(command, out, "--shard", "1/3", "--overwrite")
    assert "holds images.csv, images_1_of_2.csv, images_2_of_2.csv" in capsys.readouterr().out


def test_what_one_may_not_expect_of_an_image_is_said(command, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noisy_image(64, 48)[..., 0]).save(tmp_path / "turned.png", exif=exif)
    save_png(tmp_path / "deep.png", noisy_image(64, 64)[..., 0].astype(np.uint16) * 16)
    predict([command[0], str(tmp_path / "turned.png"), str(tmp_path / "deep.png"), *command[2:]], tmp_path / "out")
    said = capsys.readouterr().out
    assert "turned.png: turned upright by EXIF, and its results too\n" in said
    assert re.search("deep.png: of 16 bit without a value above a tenth .* pass --max_value 4095\n", said)
    predict([command[0], str(tmp_path / "deep.png"), *command[2:]], tmp_path / "out", "--max_value", "4095",
            "--overwrite")
    assert "deep.png: of 16 bit" not in capsys.readouterr().out


def test_two_predictions_into_one_folder(command, tmp_path, capsys):
    out = tmp_path / "out"
    code = f"from nuclei.results import ResultsFolder; r = ResultsFolder({str(out)!r}, (1, 1), 1, {{}}, False); " \
           f"r.begin([]); print('begun', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as other:
        assert other.stdout.readline() == "begun\n"
        for option in ("--overwrite", "--continue"):
            predict(command, out, option, code=2)
        other.kill()
    assert "another process is writing into this folder" in capsys.readouterr().err
    predict(command, out, "--overwrite")


def test_results_of_before_there_were_images_csv_are_replaced(command, tmp_path):
    predict(command, tmp_path / "new")
    out = tmp_path / "out"
    out.mkdir()
    (out / "nuclei.csv").write_text("image,label\na.png,1\nz.png,1\nz.png,2\n")
    predict(command, out, "--overwrite")
    rows = read_rows(out / "nuclei.csv")
    assert [row["label"] for row in rows if row["image"] == "z.png"] == ["1", "2"]
    assert [row for row in rows if row["image"] != "z.png"] == read_rows(tmp_path / "new/nuclei.csv")


def test_an_image_whose_nuclei_were_lost_is_predicted_again(command, tmp_path):
    out = tmp_path / "out"
    predict(command, out)
    whole, lines = content(out), (out / "nuclei.csv").read_bytes().splitlines(keepends=True)
    for left in (b"", lines[0], b"".join(lines)[:-5], b"".join(lines[:1] + lines[2:])):
        (out / "nuclei.csv").write_bytes(left)
        predict(command, out, "--continue")
        assert content(out) == whole


@pytest.mark.parametrize("option", ["--overwrite", "--continue"])
@pytest.mark.parametrize("name", ["nuclei.csv", "images.csv"])
def test_a_table_that_no_prediction_wrote_stays(name, option, command, tmp_path, capsys):
    out = tmp_path / "out"
    predict(command, out)
    right = (out / name).read_bytes()
    for first in (b"patient,stain\n1,2\n", b"image,stain\na.png,2\n", right.replace(b",", b",\0", 1),
                  right.partition(b"\n")[2]):
        (out / name).write_bytes(first)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        predict(command, out, option, code=2)
        assert f"{out / name}: its first line is" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_settings_that_are_none_are_refused(command, tmp_path, capsys):
    out = tmp_path / "out"
    predict(command, out)
    (out / "settings.json").write_text('{"runs": {"x": 5}}')
    predict(command, out, "--continue", code=2)
    assert "settings.json: cannot be read" in capsys.readouterr().err


def test_a_table_of_another_version_is_refused_by_continue(command, tmp_path, capsys):
    out = tmp_path / "out"
    predict(command, out)
    rows = read_rows(out / "nuclei.csv")
    columns = [name for name in rows[0] if name not in ("perimeter", "solidity")] + ["colour"]
    tables.write_table(out / "nuclei.csv", columns, ({name: row.get(name, "") for name in columns} for row in rows))
    before = (out / "nuclei.csv").read_bytes()
    predict(command, out, "--continue", code=2)
    said = capsys.readouterr().err
    assert f"--continue: {out / 'nuclei.csv'} lacks perimeter, solidity and has colour, so another version" in said
    assert said.count("\n") == 1
    assert (out / "nuclei.csv").read_bytes() == before
    predict(command, out, "--overwrite")
    assert read_rows(out / "nuclei.csv") == rows


def test_an_image_without_nuclei_is_flagged(command, tmp_path):
    predict(command, tmp_path / "out", "--threshold", "0.99999")
    assert {(row["flags"], row["cut_by_border"]) for row in read_rows(tmp_path / "out/images.csv")} == \
        {("none found", "0")}


# ---- disks


def test_a_full_disk_ends_it_with_what_is_finished(command, tmp_path, capsys, monkeypatch):
    out, written = tmp_path / "out", []

    def until_full(path, *arguments):
        written.append(path)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_instances(path, *arguments)

    save_instances = files.save_instances
    monkeypatch.setattr(files, "save_instances", until_full)
    predict(command, out, code=3)
    said = capsys.readouterr().err
    assert said == (f"error: {out}: No space left on device. Finished images are written. Make room or mend the disk, "
                    f"then go on with the same command and --continue\n")
    assert [row["image"] for row in read_rows(out / "images.csv")] == ["a.png", "b.png"]
    assert not list(out.glob("c_*"))
    monkeypatch.undo()
    predict(command, out, "--continue")
    predict(command, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_a_folder_that_is_removed_meanwhile_ends_it(command, tmp_path, capsys, monkeypatch):
    out, begun = tmp_path / "out", []

    def remove(*arguments):
        begun.append(1)
        if len(begun) == 3:
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        return image_row(*arguments)

    image_row = results.image_row
    monkeypatch.setattr(results, "image_row", remove)
    predict(command, out, code=3)
    assert f"{out}: it was removed, and with it what was written. Start the same command again without --continue" in \
        capsys.readouterr().err
    assert len(begun) == 3


def test_slow_tables_are_written_anew_seldom(command, tmp_path, monkeypatch):
    out, written = tmp_path / "out", []
    predict(command, out)
    predict([*command, "--threshold", "0.6"], tmp_path / "new")

    def slow(path, *arguments, **options):
        written.append(path.name)
        clock.append(clock[-1] + 100.0)
        tables.write_table(path, *arguments, **options)

    clock = [0.0]
    monkeypatch.setattr(results.time, "monotonic", lambda: clock[-1])
    monkeypatch.setattr(results, "write_table", slow)
    predict([*command, "--threshold", "0.6"], out, "--overwrite")
    assert written == ["nuclei.csv", "images.csv"] * 2, "after the first image and after the last"
    assert content(out) == content(tmp_path / "new")


# ---- evaluation


@pytest.fixture
def evaluation(tmp_path, shared_root):
    """The arguments of an evaluation, and a function that has it killed at the n-th image."""
    checkpoint, out = write_checkpoint(tmp_path / "c.pth", lively_model()), tmp_path / "e"
    arguments = [str(checkpoint), "--data_root", str(shared_root), "--split", "train", "--device", "cpu", "--instances"]

    def stopped(n: int, number=signal.SIGKILL, *options: str):
        return run_signalled("evaluate_papsmear", [*arguments, "--out", str(out), *options], n, number, "scoring",
                             "scores", "score_pair")

    return arguments, out, stopped


def evaluate(arguments, out, *options, code: int = 0) -> None:
    assert evaluate_papsmear.main([*arguments, "--out", str(out), *options]) == code


def test_rows_of_an_interrupted_evaluation_that_are_none_are_scored_anew(evaluation, tmp_path, capsys):
    arguments, out, stopped = evaluation
    evaluate(arguments, tmp_path / "whole")
    assert stopped(5).returncode == -signal.SIGKILL
    kept = out / "scores_unfinished_0.jsonl"
    first, second, third, fourth = map(json.loads, kept.read_text().splitlines())
    damaged = [first | {"settings": 5}, second | {"row": second["row"] | {"dice": float("nan")}},
               third | {"row": {"image": "a", "dice": 0.5}}, first | {"row": first["row"] | {"dice": "x"}},
               first | {"image": [1]}, fourth]
    kept.write_text("".join(json.dumps(entry) + "\n" for entry in [*damaged, fourth | {"image": "b"}]))
    (out / "scores_unfinished_mine.jsonl").write_text("mine")
    (out / ".scores.csv.1a2b3c_d.tmp").write_text("of a kill while it was written")
    (out / ".notes.csv.1a2b3c_d.tmp").write_text("mine")
    evaluate(arguments, out, "--continue")
    assert [path.name for path in out.glob(".*")] == [".notes.csv.1a2b3c_d.tmp"]
    assert "2 images are scored already" in capsys.readouterr().out
    assert (out / "scores.csv").read_bytes() == (tmp_path / "whole/scores.csv").read_bytes()
    assert (out / "scores_unfinished_mine.jsonl").read_text() == "mine"
    evaluate(arguments, out, "--overwrite")
    assert (out / "scores_unfinished_mine.jsonl").read_text() == "mine"


def test_a_killed_evaluation_goes_on_with_the_images_that_are_left(evaluation, tmp_path, capsys, monkeypatch):
    arguments, out, stopped = evaluation
    evaluate(arguments, tmp_path / "whole")
    assert stopped(4).returncode == -signal.SIGKILL
    assert not (out / "scores.csv").exists()
    for options, words in (((), "an evaluation was interrupted here"), (("--continue", "--augment"), "augment was"),
                           (("--continue", "--split", "test"), "split was 'train'")):
        evaluate(arguments, out, *options, code=2)
        assert words in capsys.readouterr().err
    with open(out / "scores_unfinished_0.jsonl", "a") as file:
        file.write('{"image": "torn')
    scored, score_pair = [], scores.score_pair
    monkeypatch.setattr(scores, "score_pair", lambda *given: scored.append(given[1].name) or score_pair(*given))
    evaluate(arguments, out, "--continue")
    assert "3 images are scored already" in capsys.readouterr().out
    assert len(scored) == 3 + 6, "of 6 images those that were left, and all for the picture"
    for name in ("scores.csv", "cases.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in out.iterdir()} == {"scores.csv", "summary.json", "cases.png"}
    evaluate(arguments, out, "--continue", code=2)
    assert "it is finished" in capsys.readouterr().err
    evaluate(arguments, tmp_path / "none", "--continue", code=2)
    assert "no evaluation was interrupted in" in capsys.readouterr().err


def test_earlier_scores_stay_until_the_new_ones_are_whole(evaluation):
    arguments, out, stopped = evaluation
    evaluate(arguments, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = stopped(3, signal.SIGTERM, "--overwrite", "--augment")
    assert done.returncode == 143
    assert done.stderr.strip().endswith("the same command with --continue goes on with the images that are left")
    assert {name: (out / name).read_bytes() for name in before} == before
    evaluate(arguments, out, "--continue", "--augment")
    assert (out / "scores.csv").read_bytes() != before["scores.csv"]


def test_scores_that_cannot_be_kept_end_it(evaluation, capsys, monkeypatch):
    arguments, out, _ = evaluation
    monkeypatch.setattr(unfinished.json, "dumps", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    evaluate(arguments, out, code=3)
    assert "scores_unfinished_0.jsonl: full. Make room" in capsys.readouterr().err


# ---- tables and names


def test_a_table_from_a_spreadsheet_or_with_an_endless_cell_is_read(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("\ufeffa,b\n1,2\n" + "x" * 200_000 + ",3\n4,5\n", encoding="utf-8")
    assert columns_of(path) == ["a", "b"]
    assert list(read_table(path)) == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}]
    path.write_text("x" * 200_000 + "\n")
    assert columns_of(path) == []


def test_a_quotation_mark_too_many_costs_its_row_alone(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('a,b\n"1,2\n3,"4\n5,"6"\n7,8\n')
    assert list(read_table(path)) == [{"a": "3", "b": "4\n"}, {"a": "5", "b": "6"}, {"a": "7", "b": "8"}]


def test_what_a_kill_leaves_of_a_table_is_cut_off(tmp_path):
    path = tmp_path / "t.csv"
    assert (list(read_table(path)), columns_of(path)) == ([], [])
    append_rows(path, ("a", "b"), [{"a": 1, "b": 2, "c": 3}, {"a": 3, "b": 4}])
    with pytest.raises(ValueError, match="'c'"):
        tables.write_table(path, ("a", "b"), [{"a": 1, "b": 2, "c": 3}])
    whole = path.read_bytes()
    assert whole == b"a,b\r\n1,2\r\n3,4\r\n"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        rows = [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}][:max(0, whole[:end].count(b"\n") - 1)]
        assert list(read_table(path)) == rows
        append_rows(path, ("a", "b"), [{"a": 5, "b": 6}])
        assert list(read_table(path)) == [*rows, {"a": "5", "b": "6"}]
    path.write_bytes(whole + b"\0" * 5000)
    assert len(list(read_table(path))) == 2
    append_rows(path, ("a", "b"), [{"a": 5, "b": 6}])
    assert path.read_bytes() == whole + b"5,6\r\n"


def test_names_steer_neither_a_terminal_nor_a_spreadsheet(command, images, tmp_path, capsys):
    for i, name in enumerate(("=HYPERLINK(1)", "@SUM(1)", "-1+1", "\x1b[31mred\x1b]0;title\x07", "'=1")):
        save_png(images / f"{name}.png", noisy_image(64, 64, seed=i))
    out = tmp_path / "out"
    predict(command, out)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert r"\x1b[31mred\x1b]0;title\x07.png: 64x64" in said.out
    for table in ("nuclei.csv", "images.csv"):
        names = {row["image"] for row in read_rows(out / table)}
        assert names == {f"{name}.png" for name in NAMES} | {"'=HYPERLINK(1).png", "'@SUM(1).png", "'-1+1.png",
                                                             r"\x1b[31mred\x1b]0;title\x07.png", "''=1.png"}
    predict(command, out, "--continue")
    assert "10 are finished" in capsys.readouterr().out
    (images / "\x1b[31mred\x1b]0;title\x07.png").write_bytes(b"no image")
    predict(command, out, "--overwrite", code=1)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert np.count_nonzero([line.startswith("error: ") for line in said.err.splitlines()]) == 1


def test_the_summary_of_an_image(command, tmp_path):
    out = tmp_path / "out"
    predict(command, out, "--pixel_size", "0.5")
    nuclei = read_rows(out / "nuclei.csv")
    for row in read_rows(out / "images.csv"):
        areas = [int(nucleus["area"]) for nucleus in nuclei if nucleus["image"] == row["image"]]
        assert (row["height"], row["width"], int(row["nuclei"])) == ("64", "64", len(areas))
        assert float(row["mean_area"]) == pytest.approx(np.mean(areas), abs=0.01)
        assert float(row["mean_area_um2"]) == pytest.approx(np.mean(areas) * 0.25, abs=0.01)
        assert float(row["nuclei_per_mm2"]) == pytest.approx(len(areas) / 0.032 ** 2, rel=1e-3)
        assert float(row["highest_probability"]) >= 0.5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(command, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir(mode=0o500)
    predict(command, out, code=2)
    assert str(out) in capsys.readouterr().err
