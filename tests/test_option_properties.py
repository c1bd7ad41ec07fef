"""Properties of the command lines: no option, value or word ends in a traceback, or writes what was not asked for.

    python -m pytest tests/test_option_properties.py
    EXAMPLES=20 python -m pytest tests/test_option_properties.py   # 20 times as many examples, other ones each time
"""

import contextlib
import io
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import evaluate_papsmear
import predict_papsmear
import prepare_data
import train_papsmear
from benchmarks import experiments
from images import splits
from images.files import save_png
from system import devices
from tests.test_file_properties import ANY_TEXT, in_new_folder, steers
from tests.test_properties import examples
from training import settings

# What a shell can hand over; a NUL ends an argument.
TEXT = ANY_TEXT.map(lambda text: text.replace("\0", ""))
VALUES = ("", " ", "-", "--", "-1", "0", "-0", "1", "4", "8", "0.5", "1e-3", "1e400", "nan", "inf", "-inf", "1_0",
          "0x10", "\uff11\uff12", "\u00b2", "9" * 400, "9" * 5000, "true", "no", "mask,boundary", "32:4,64:2", "32:0",
          "27,5,7,61", "1,2,3,4", "70,15,15", "0,0,100", "5,10", "2/3", "cpu", "cuda", "cuda:0", "cuda:x", "mps", "gpu",
          "auto", "float16", "direct,grown", "a=--lr 1", "a=\"", "%s", "%(prog)s", "{}", "\x1b[31m", "\u202e", "a\nb",
          "\udcff", ".", "..", "/", "x" * 300, "x" * 5000, "^[^_]+", "(", "(?P<a>b)|c", "--help", "-h")
LARGE = ("1000000000", "1e300")
NOT_LARGE = ("--base_channels", "--out_channels", "--seeds")  # which would take all memory
# Values with which a training could begin, beside the choices of an option.
GOOD = {
    "--epochs_per_stage": ["3", "0,0,0,1", "1,2"], "--batch_sizes": ["32:4", "256:999999999"],
    "--lr": ["1e308", "5e-324"], "--budget": ["1", "39", "5e-324"], "--shares": ["0,0,0,1", "0.0,0,0,0.001"],
    "--targets": ["mask,boundary"], "--group_regex": [".", "", "(x)?", "_"], "--max_value": ["255"],
    "--mask_suffix": ["", "_mask"], "--overfit": ["1000"], "--out_channels": ["2"], "--num_workers": ["1000000000"],
    "--accumulate": ["1000000000"], "--average": ["0.999999"], "--keep": ["0"], "--save_minutes": ["1e308"],
    "--old_lr_scale": ["0", "1e308"], "--seed": ["1000000000"], "--experiment_name": ["x" * 255, "..."],
    "--output_dir": ["", "a/b", "\udcff"], "--cache_images": ["false", "true"]}


@st.composite
def arguments(draw, parser, *first: str):
    """Draw words for a parser: own options with values good and bad, in any order, and text that it does not know."""
    actions = [action for action in parser._actions if action.option_strings]
    words = list(first)
    for _ in range(draw(st.integers(0, 5))):
        action = draw(st.sampled_from(actions))
        own = [str(value) for value in (*(action.choices or ()), action.default) if value is not None]
        large = () if set(action.option_strings) & set(NOT_LARGE) else LARGE
        value = draw(st.one_of(st.sampled_from([*own, *VALUES, *large]), TEXT))
        name = draw(st.sampled_from(action.option_strings))
        words += draw(st.sampled_from([[name], [name, value], [name, value], [f"{name}={value}"], [value]]))
    return words


@st.composite
def good_arguments(draw):
    """Draw options of a training with values that they take, which may contradict each other."""
    actions = [action for action in TRAINING._actions if action.option_strings[0] in GOOD or action.choices]
    words = []
    for action in draw(st.lists(st.sampled_from(actions), max_size=6, unique_by=lambda action: action.dest)):
        values = [*map(str, action.choices or ()), *GOOD.get(action.option_strings[0], ())]
        words += [action.option_strings[0], draw(st.sampled_from(values))]
    return words


def parsers_of(parser) -> dict:
    """Return the parsers of a command's commands by their names."""
    return next(action.choices for action in parser._actions if isinstance(action.choices, dict))


PREPARATIONS, EXPERIMENTS = parsers_of(prepare_data.build_parser()), parsers_of(experiments.build_parser())
TRAINING = settings.build_parser()


@pytest.fixture
def full(monkeypatch, tmp_path):
    """Return a folder with an image; leave no bundled sample, and let no example change how the others compute."""
    monkeypatch.setattr(splits, "BUNDLED_SAMPLE", tmp_path / "no_sample")
    monkeypatch.setattr(devices, "compute_reproducibly", lambda: None)
    monkeypatch.setattr(devices, "set_up_process", lambda *_: None)
    (tmp_path / "full").mkdir()
    save_png(tmp_path / "full/a.png", np.zeros((8, 8), np.uint8))
    return tmp_path / "full"


def refuse(main, argv: list[str], *codes: int) -> None:
    """See that a command says what is wrong without a traceback, writes nothing, and ends with 2 or one of `codes`."""
    said = io.StringIO()
    with in_new_folder() as folder, contextlib.chdir(folder), contextlib.redirect_stderr(said), \
            contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code
        assert os.listdir() == []
        if code == 0 and 0 not in codes:
            assert {"--help", "-h"} & {word.split("=")[0] for text in argv for word in text.replace('"', " ").split()}
            return
        assert code in (2, *codes)
        assert said.getvalue().startswith("error: ") or code in codes
        assert not any(steers(c) for c in said.getvalue() if c not in "\n\r\t" and not "\ud800" <= c <= "\udfff")


@given(arguments(TRAINING))
@examples(100)
def test_no_options_end_training_in_a_traceback(full, words):
    refuse(train_papsmear.main, [*words, "--data_root", "absent"])


@given(good_arguments())
@examples(12)
def test_a_dry_run_of_any_options_writes_nothing(full, shared_root, words):
    kept = ("--data_root", str(shared_root), "--dry_run", "--device", "cpu")
    refuse(train_papsmear.main, ["--base_channels", "2", *words, *kept], 0)


@given(st.data(), st.booleans())
@examples(100)
def test_no_options_end_prediction_in_a_traceback(full, data, there):
    first = ("a.pth", str(full / "a.png"), "--out", "out") if there else ()
    refuse(predict_papsmear.main, data.draw(arguments(predict_papsmear.build_parser(), *first)))


@given(st.data(), st.booleans())
@examples(100)
def test_no_options_end_evaluation_in_a_traceback(full, data, there):
    words = data.draw(arguments(evaluate_papsmear.build_parser(), *(["a.pth"] if there else [])))
    refuse(evaluate_papsmear.main, [*words, "--data_root", "absent"])


@given(st.data(), st.sampled_from(sorted(PREPARATIONS)))
@examples(150)
def test_no_options_end_preparation_in_a_traceback(full, data, command):
    needed = {"monuseg": ["--train_dir", "a", "--test_dir", "b"], "herlev": ["--src", "a"],
              "drawn": ["--format", "coco", "--images", "a", "--annotations", "b"]}.get(command, [])
    out = ["--out", str(full)] if command == "sample" else ["absent"] if command in ("check", "split") else []
    words = data.draw(arguments(PREPARATIONS[command], *needed, *(["--out", "new"] if needed else [])))
    refuse(prepare_data.main, [command, *words, *out])


@given(st.data(), st.sampled_from(sorted(EXPERIMENTS)))
@examples(100)
def test_no_options_end_an_experiment_in_a_traceback(full, data, name):
    words = data.draw(arguments(EXPERIMENTS[name], *(["a.pth"] if name == "finetune" else []), "--out", "out"))
    others = data.draw(arguments(TRAINING)) if name != "finetune" else []
    refuse(experiments.main, [name, *words, *others, "--data_root", "absent"])


@given(st.lists(TEXT | st.sampled_from(VALUES), max_size=5))
@examples(50)
def test_no_words_end_a_command_in_a_traceback(full, words):
    for main in (predict_papsmear.main, evaluate_papsmear.main, prepare_data.main, experiments.main):
        refuse(main, words)
    refuse(train_papsmear.main, [*words, "--data_root", "absent"])


ABSENT = ("--data_root", "absent")
# Command lines that ended in a traceback once, or left something behind.
FOUND = {
    "resume": (train_papsmear, "--resume", "", *ABSENT),
    "device": (train_papsmear, "--device", "cpu:x", *ABSENT),
    "repetition": (train_papsmear, "--group_regex", "a{9999999999}", *ABSENT),
    "depth": (train_papsmear, "--group_regex", "(" * 3000 + ")" * 3000, *ABSENT),
    "budget": (train_papsmear, "--budget", "1e308", *ABSENT),
    "study": (experiments, "growth", "--out", "out", "--budget", "1e308", *ABSENT),
    "shares": (train_papsmear, "--budget", "1", "--shares", f"1,1,1,{'9' * 400}", *ABSENT),
    "width": (train_papsmear, "--base_channels", "1000000", *ABSENT),
    "batch": (train_papsmear, "--batch_sizes", f"256:{'9' * 400}", "--base_channels", "2", "--dry_run", "--data_root"),
    "no images": (predict_papsmear, "--out", "out", "a.pth", "--", "--"),
    "no value": (prepare_data, "herlev", "--src", "absent", "--out=--"),
    "folders above": (prepare_data, "herlev", "--src", "absent", "--out", "a/b/c")}
FOUND |= {f"device {name}": (train_papsmear, "--device", name, *ABSENT)
          for name in ("cpu:", "cpu:1", "cpu:-1", "cuda:", "mps:x", "auto:0", ":", ":0")}
FOUND |= {f"pattern {i}": (script, *words, "--group_regex", pattern, *rest) for script, words, rest in (
    (train_papsmear, (), ABSENT), (prepare_data, ("check",), ("absent",))) for i, pattern in enumerate(
    ("(?u)(?a)", f"a{{{'9' * 5000}}}", "(?L)a", "[", "(?<=a+)b"))}
FOUND |= {f"number {words[0]} {len(words[1])}": (train_papsmear, *words, *ABSENT) for digits in (10, 400, 5000)
          for words in (("--epochs_per_stage", "9" * digits), ("--budget", "9" * digits),
                        ("--max_minutes", "9" * digits), ("--base_channels", "9" * digits),
                        ("--out_channels", "9" * digits), ("--batch_sizes", f"32:{'9' * digits}"),
                        ("--shares", f"1,1,1,{'9' * digits}", "--budget", "1"))}
FOUND |= {f"value {word}": (train_papsmear, word, *ABSENT) for word in ("--seed=--", "--mask_suffix=--", "--model=--",
                                                                     "--progressive=--", "--resume=--", "--resume=")}
FOUND |= {"NUL": (predict_papsmear, "a\0.pth", "b", "--out", "c\0"), "link to nowhere": (
    prepare_data, "herlev", "--src", "absent", "--out", "/proc/self/exe/a"),
    "long name": (prepare_data, "herlev", "--src", "absent", "--out", f"a/{'x' * 300}/b"),
    "classes and boundary": (train_papsmear, "--out_channels", "1024", "--targets", "mask,boundary", *ABSENT)}


@pytest.mark.parametrize("name", FOUND)
def test_command_lines_that_were_found_are_refused(name, full, shared_root):
    script, *argv = FOUND[name]
    refuse(script.main, argv + [str(shared_root)] * (argv[-1] == "--data_root"))
