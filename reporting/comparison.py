"""One page that compares runs: settings, curves, paired differences on the test images, and where these lie."""

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np

from reporting.charts import Chart, Curve
from reporting.panels import Panels, predicted
from reporting.report import settings_of, write_page
from reporting.runs import Run, read_run
from reporting.text import number, score
from scoring.cases import Case
from scoring.scores import compare
from system.text import duration

DIFFERING = 6  # images that are shown
# Settings that name a run, or the machine at that moment, and say nothing of how it was made; `resolved` has device and
# precision, the first table the epochs. The names of classes come with the data.
OF_NO_INTEREST = ("experiment_name", "output_dir", "overwrite", "save_every", "save_minutes", "keep", "num_workers",
                  "cache_images", "device", "precision", "resolved.num_workers", "resolved.images_kept",
                  "resolved.class_names", "environment.cpu_count", "environment.torch_threads",
                  "environment.git_commit")


def write_comparison(folders: list[Path], out: Path) -> None:
    """Write a page that compares runs, the first with each of the others.

    Raises UserError for a folder that is none of a run, OSError for a disk that takes nothing.
    """
    runs = [read_run(folder) for folder in folders]
    names = display_names(runs)
    found = [differences(run, runs[0], name, names[0]) for run, name in list(zip(runs, names, strict=True))[1:]]
    write_page(out, "comparison.html", {
        "names": names, "overview": [overview(run, name) for run, name in zip(runs, names, strict=True)],
        "settings": differing_settings(runs), "curves": comparison_charts(runs, names),
        "differences": found, "sentences": sentences(found), "panels": differing_panels(runs, names),
        "missing": [f"{name}: {line}" for run, name in zip(runs, names, strict=True) for line in run.missing],
        "command": f"python report_runs.py {shlex.join(str(run.path) for run in runs)} --out {shlex.quote(str(out))}"})


def display_names(runs: list[Run]) -> list[str]:
    """Return the names of the folders; their paths where two have one name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def overview(run: Run, name: str) -> dict:
    """Return what the first table says of a run."""
    dice = run.scores.get("dice")
    return {"name": name, "parameters": f"{run.parameters / 1e6:.2f} M" if run.parameters else "–",
            "epochs": ", ".join(f"{row['epochs']} at {row['side']}" for row in run.stages()),
            "time": duration(60 * float(run.minutes()[-1])), "operations": float(run.operations()[-1]),
            "valid": run.stages()[-1]["dice"], "finished": run.finished,
            "test": f"{score(dice['mean'])} ({score(dice['low'])} to {score(dice['high'])})" if dice else "not scored"}


def sentences(compared: list[dict]) -> list[str]:
    """Return what the page says, in a sentence a run that is compared with the first (see `differences`)."""
    result = []
    for found in compared:
        name, first = found["name"], found["first"]
        if not found["rows"]:
            result.append(f"{name} and {first} cannot be compared on the test images: {found['why']}.")
            continue
        dice = found["rows"]["dice"]
        interval = f"{dice['low']:+.3f} to {dice['high']:+.3f}"
        if dice["low"] <= 0 <= dice["high"]:
            result.append(f"On the test images {name} and {first} do not differ by more than chance: the difference "
                          f"of their Dice is {dice['difference']:+.3f} (95 % interval {interval}).")
        else:
            way = "ahead of" if dice["difference"] > 0 else "behind"
            result.append(f"On the test images {name} is {way} {first}: the difference of their Dice is "
                          f"{dice['difference']:+.3f} (95 % interval {interval}).")
    return result


def differing_settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return (name, value of each run) of the settings that are not alike in all."""
    settings = [dict(settings_of(run.config)) for run in runs]
    names = [name for name in dict.fromkeys(name for of_one in settings for name in of_one)
             if name not in OF_NO_INTEREST and not name.startswith("resolved.epochs")]
    again = {f"resolved.{within}{name}" for name in names for within in ("", "model_args.")}
    rows = [(name, [of_one.get(name, "–") for of_one in settings]) for name in names if name not in again]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def comparison_charts(runs: list[Run], names: list[str]) -> list[Chart]:
    """Return Dice at 256 pixels of the validation images over epochs, operations and minutes."""
    axes: list[tuple[str, str, Callable[[Run], np.ndarray]]] = [
        ("epochs", "epochs", lambda run: np.arange(1, len(run.rows) + 1)),
        ("operations", "tera-operations (estimated)", Run.operations), ("minutes", "minutes of training", Run.minutes)]
    charts = []
    for title, unit, x_of in axes:
        curves = [Curve(name, x_of(run).tolist(), [row["dice"] for row in run.rows])
                  for run, name in zip(runs, names, strict=True)]
        end = min(curve.x[-1] for curve in curves)
        reached = ", ".join(f"{curve.label} {score(curve.y[max(int(np.searchsorted(curve.x, end, 'right')) - 1, 0)])}"
                            for curve in curves)
        charts.append(Chart(f"Dice over {title}", f"Where the shortest run ends, at {number(end)} {unit}: {reached}.",
                            unit, curves, y_range=(0, 1), counts=title == "epochs"))
    return charts


def differences(run: Run, first: Run, name: str, first_name: str) -> dict:
    """Return the paired differences of the test scores, the run minus the first one; `rows` is empty where there are
    none, and `why` says why."""
    result = {"name": name, "first": first_name, "rows": {}, "why": "", "images": 0}
    if not run.test_rows or not first.test_rows:
        return result | {"why": f"{name if not run.test_rows else first_name} has no test scores"}
    own, other = ({row["image"]: row for row in rows} for rows in (run.test_rows, first.test_rows))
    both = [image for image in own if image in other]
    if len(both) < max(len(own), len(other)):
        return result | {"why": f"they have {len(both)} of {len(own)} and {len(other)} test images in common"}
    rows = compare([own[image] for image in both], [other[image] for image in both])
    return result | {"rows": rows, "images": len(both)}


def differing_panels(runs: list[Run], names: list[str]) -> list[dict]:
    """Return the test images that every run kept and on which their Dice differ most, with the prediction of each."""
    kept = [{case.name: case for case in run.test_cases} for run in runs]
    common = [name for name in kept[0] if all(name in of_one and _alike(of_one[name], kept[0][name])
                                              for of_one in kept[1:])]
    gaps = {name: max(of_one[name].dice for of_one in kept) - min(of_one[name].dice for of_one in kept)
            for name in common}
    result = []
    for name in sorted(common, key=lambda name: -gaps[name])[:DIFFERING]:
        for channel in range(len(kept[0][name].masks)):
            predictions = [predicted(of_one[name], run.threshold, title, channel)
                           for of_one, run, title in zip(kept, runs, names, strict=True)]
            result.append({"gap": gaps[name], "panels": Panels.of_case(kept[0][name], predictions, channel,
                                                                       runs[0].class_names)})
    return result


def _alike(case: Case, other: Case) -> bool:
    return case.masks.shape == other.masks.shape and bool((case.masks == other.masks).all())
