"""The page of one run, report.html: one file that needs no network, made anew from what the run folder holds."""

import json
import shlex
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reporting.charts import Chart, Curve, histogram
from reporting.panels import case_panels, example_panels
from reporting.runs import Run, read_run
from reporting.text import label, number, probability, score
from scoring.calibration import BINS, expected_calibration_error
from scoring.measures import PIXEL_METRICS
from system.atomic import atomic_write
from system.text import duration, of

if TYPE_CHECKING:
    import jinja2

REPORT = "report.html"
SHOWN_CASES = 4  # worst ones and best ones each
FEW_PIXELS = 20  # in a bin of the reliability diagram, below which it says nothing
STILL_FALLING = 0.9  # of a stage, from which on its best epoch or its lowest loss says that more may help


def refresh_report(folder: Path) -> None:
    """Write report.html anew while a run is under way; what goes wrong is said and ends no training."""
    try:
        write_report(folder)
    except Exception as error:  # a fault in a page must not cost hours of training
        print(f"warning: {REPORT} cannot be written ({type(error).__name__}: {error}); python report_runs.py {folder} "
              f"tries again")


def write_report(folder: Path) -> Path:
    """Write report.html of a run folder, and return its path.

    Raises UserError for a folder that is none of a run, OSError for a disk that takes nothing.
    """
    path = Path(folder) / REPORT
    write_page(path, "report.html", report_context(read_run(folder)))
    return path


def write_page(path: Path, template: str, context: dict) -> None:
    """Fill a template of this folder and write the page; it is whole or as it was before."""
    page = templates().get_template(template).render(context)
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "backslashreplace"))


@cache
def templates() -> "jinja2.Environment":
    """Return the templates of this folder, which are compiled once a process."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
                                     autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": number, "score": score, "duration": duration, "label": label,
                            "probability": probability}
    return environment


def report_context(run: Run) -> dict:
    """Return what the template report.html shows."""
    last = run.surveys[max(run.surveys)] if run.surveys else None
    worst = sorted(run.test_cases, key=lambda case: case.dice)
    best = worst[::-1][:min(SHOWN_CASES, len(worst) // 2)]
    return {
        "run": run, "last": last, "command": f"python report_runs.py {shlex.quote(str(run.path))}",
        "sentences": sentences(run), "leaks": [leak for leak in run.leakage() if leak[0]],
        "curves": training_charts(run), "stages": run.stages(),
        "examples": example_panels(run.surveys, run.class_names),
        "worst": case_panels(worst[:min(SHOWN_CASES, -(-len(worst) // 2))], run.threshold, run.class_names),
        "best": case_panels(best, run.threshold, run.class_names),
        "measures": test_table(run), "histogram": dice_histogram(run),
        "calibration": calibration_charts(last) if last else [],
        "settings": settings_of(run.config), "warnings": [line.removeprefix("warning: ") for line in run.data_report
                                                          if line.startswith("warning: ")]}


def sentences(run: Run) -> list[str]:
    """Return three sentences: what was trained, how good it is, and what that is worth."""
    return [_what(run), _how_good(run), _what_next(run)]


def _what(run: Run) -> str:
    args, config, stages = run.model_args, run.config, run.stages()
    kind = "classic U-Net" if args.get("model") == "unet" else "progressive U-Net"
    size = f" of {run.parameters / 1e6:.1f} million parameters" if run.parameters else ""
    colour = {1: "grey ", 3: "colour "}.get(args.get("in_channels"), "")
    images = f" on {of(run.images_of('train'), f'{colour}image')}" if run.images_of("train") else ""
    data = f" of the data set {config['data_root']}" if images and "data_root" in config else ""
    sides = [f"{row['side']}" for row in stages]
    how = f"grew over {len(sides)} stages, from {sides[0]} to {sides[-1]} pixels," if len(sides) > 1 else \
        f"was trained at {sides[0]} pixels"
    seconds = sum(row["seconds"] for row in stages)
    place = str(config.get("resolved", {}).get("device", "")).partition(":")[0]
    device = f" on a {({'cuda': 'GPU', 'mps': 'GPU'}).get(place, place.upper())}" if place else ""
    so_far = "" if run.finished else " so far"
    return (f"A {kind}{size} {how}{images}{data}: {of(len(run.rows), 'epoch')}{so_far}, "
            f"{duration(seconds)} of training{device}.")


def _how_good(run: Run) -> str:
    if not run.scores:
        best = run.stages()[-1]
        return (f"On the validation images its Dice at 256 pixels is {score(best['dice'])} so far; the test images "
                f"have not been scored.")
    dice = run.scores["dice"]
    values = [row["dice"] for row in run.test_rows] or [dice["mean"]]
    otsu = run.test_scores.get("Otsu threshold", {}).get("dice", {}).get("mean")
    return (f"On {of(run.scores['images'], 'test image')} it reaches a Dice of {score(dice['mean'])} (95 % interval "
            f"{score(dice['low'])} to {score(dice['high'])}; worst image {score(min(values))}, best "
            f"{score(max(values))})" + ("." if otsu is None else f", where Otsu's threshold reaches {score(otsu)}."))


def _what_next(run: Run) -> str:
    leaks = [leak for leak in run.leakage() if leak[0] and leak[3] == "test"]
    if leaks:
        number_in, total, kind, _ = max(leaks, key=lambda leak: leak[0] / leak[1])
        return (f"{number_in} of {total} {kind} of test are in the training images too, so these scores say little of "
                f"new images.")
    if not run.finished:
        return "The training is under way or was cut off; this page shows it as it was at the end of its last stage."
    stage = run.stages()[-1]
    where = f"of {stage['epochs']} at {stage['side']} pixels"
    late = STILL_FALLING * stage["epochs"]
    if stage["lowest_loss_epoch"] >= late:
        return (f"Longer training may help: the validation loss was lowest in epoch {stage['lowest_loss_epoch']} "
                f"{where}.")
    best = f"the best epoch was number {stage['best_epoch']} {where}"
    if stage["best_epoch"] >= late:
        return f"Longer training may help: {best}."
    return (f"Longer training is unlikely to help much: {best}, and the validation loss was lowest in epoch "
            f"{stage['lowest_loss_epoch']}.")


def training_charts(run: Run) -> list[Chart]:
    """Return Dice at 256 pixels, loss, precision and recall over the epochs of the run."""
    x = list(range(1, len(run.rows) + 1))
    growths = [(before + 0.5, f"{side} px") for before, side in run.growths()]
    x_range = (0.5, len(x) + 0.5)

    def values(name: str) -> list[float]:
        return [row[name] for row in run.rows]

    steps = ", ".join(f"{score(row['dice'])} at best at {row['side']} pixels" for row in run.stages())
    dice = Chart("Dice of the validation images, at 256 pixels", f"Stage by stage: {steps}. Soft Dice counts "
                 f"probabilities instead of pixels, so it is lower as long as the network is unsure.",
                 "epoch of the run",
                 [Curve("validation, at 256 pixels", x, values("dice")),
                  Curve("training, soft Dice at the size of the stage", x, values("train_soft_dice"))],
                 growths, x_range, (0, 1), counts=True)
    loss = Chart("Loss, summed over scales", f"From {values('loss')[0]:.2f} to {values('loss')[-1]:.2f} on the "
                 f"validation images. It steps up at a growth, where a scale is added.", "epoch of the run",
                 [Curve("validation", x, values("loss")), Curve("training", x, values("train_loss"))], growths, x_range,
                 counts=True)
    parts = Chart("Precision and recall of the validation images", f"At the end precision is "
                  f"{score(values('precision')[-1])} and recall {score(values('recall')[-1])}.", "epoch of the run",
                  [Curve(name, x, values(name)) for name in ("precision", "recall")], growths, x_range, (0, 1),
                  counts=True)
    return [dice, loss, parts]


def test_table(run: Run) -> list[dict]:
    """Return a row a measure of the test images: mean, deviation, interval, and the mean of Otsu's threshold."""
    otsu = run.test_scores.get("Otsu threshold", {})
    return [{"name": label(name, run.class_names), "otsu": otsu.get(name, {}).get("mean"), **value}
            for name, value in run.scores.items() if isinstance(value, dict)]


def dice_histogram(run: Run) -> Chart | None:
    """Return the histogram of Dice over test images, None where they were not scored."""
    values = [row["dice"] for row in run.test_rows]
    if not values:
        return None
    return histogram(values, "Dice of the test images", f"Half of the {len(values)} images lie above "
                     f"{score(float(np.median(values)))}; the worst has {score(min(values))}.",
                     "Dice (bar: number of images)")


def calibration_charts(survey) -> list[Chart]:
    """Return the reliability diagram, and precision, recall and Dice over the threshold."""
    pixels, probabilities, foreground = survey.tables["reliability"]
    enough = pixels >= FEW_PIXELS
    x, y = probabilities[enough] / pixels[enough], foreground[enough] / pixels[enough]
    error = expected_calibration_error(survey.tables["reliability"])
    excess = (x - y)[x > 0.5]
    side = "no pixel says more than one half" if not len(excess) else "above one half the network is " + (
        "too sure of foreground" if excess.mean() > 0 else "not sure enough of foreground")
    reliability = Chart(
        "Is a probability what it says?", f"Of the pixels with a given probability, the share that is foreground. The "
        f"expected calibration error is {error:.3f}; {side}.",
        "predicted probability", [Curve("share of foreground", x.tolist(), y.tolist())], x_range=(0, 1),
        y_range=(0, 1), diagonal=True, note=f"On the dotted line they agree. Expected calibration error {error:.3f} "
        f"({BINS} bins). Bins of fewer than {FEW_PIXELS} pixels are left out.")
    thresholds = survey.tables["thresholds"].tolist()
    at = {name: survey.tables[f"at_{name}"].tolist() for name in PIXEL_METRICS if f"at_{name}" in survey.tables}
    best = int(np.argmax(at["dice"]))
    used = int(np.abs(survey.tables["thresholds"] - survey.threshold).argmin())
    sentence = (f"The best threshold on validation is {thresholds[best]:g}, with a Dice of {score(at['dice'][best])}; "
                f"at {thresholds[used]:g}, which is used, it is {score(at['dice'][used])}.")
    over = Chart("Dice, precision and recall over the threshold", sentence, "threshold",
                 [Curve(label(name), thresholds, values) for name, values in at.items()], [(thresholds[best], "best")],
                 (0, 1), (0, 1), note=sentence)
    return [reliability, over]


def settings_of(config: dict) -> list[tuple[str, str]]:
    """Return the settings as (name, value), those within others as `resolved.device`."""
    left_out = ("data_report", "command")
    rows: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, dict) and value and name not in left_out:
            rows += [(f"{name}.{key}", found) for key, found in settings_of(value)]
        elif name not in left_out:
            rows.append((name, value if isinstance(value, str) else json.dumps(value)))
    return rows
