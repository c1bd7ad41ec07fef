"""Pictures of what was measured."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from system.text import of

IN_A_ROW = 2  # panels of a picture
DASHES = ("-", "--", ":", "-.")


def curves_over_counts(rows: list[dict], path: Path) -> None:
    """Draw test Dice against the number of training images, one line for each way to start.

    Args:
        rows: one a training, with `images` (0 for a checkpoint as it is), `start` and `dice`.
    """
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        if row["images"] == 0:
            axis.axhline(row["dice"], color="grey", linestyle=":", label="the checkpoint as it is")
    counts = sorted({row["images"] for row in rows} - {0})
    for k, start in enumerate(dict.fromkeys(row["start"] for row in rows)):
        scores = [[row["dice"] for row in rows if (row["images"], row["start"]) == (count, start)] for count in counts]
        axis.plot(counts, [np.mean(dice) for dice in scores], color=f"C{k}", label=f"{start} (mean)")
        axis.scatter([count for count, dice in zip(counts, scores, strict=True) for _ in dice], sum(scores, []),
                     color=f"C{k}", s=14, label="one training each")
    axis.set_xscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set_xlabel("training images")
    axis.set_ylabel("test Dice, mean over images")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def scaling_curves(series: list[dict], path: Path) -> None:
    """Draw how costs grow: cost against size, each relative to the first, on logarithmic axes, with the fitted powers.

    Args:
        series: `cost` and `size` (words), `sizes`, `seconds` (medians) and `power` (the fitted exponent).
    """
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    for k, one in enumerate(series):
        x, y = (np.array(one[key], float) / one[key][0] for key in ("sizes", "seconds"))
        axis.plot(x, y, color=f"C{k}", marker="osD^v"[k % 5],
                  label=f"{one['cost']}, against {one['size']} from {one['sizes'][0]:g}: power {one['power']:.2f}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("size, relative to the smallest")
    axis.set_ylabel("seconds, relative to the smallest")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def dice_over_operations(curves: dict[str, dict[str, list]], work: Iterable[float], path: Path) -> None:
    """Draw validation Dice over operations: a thin line a training, a thick one for the mean, dots where it grows.

    An arm has the same line in every panel: one of ten colours, dashed from the eleventh arm on. The mean is drawn
    where all trainings of an arm have the same epochs.

    Args:
        curves: title -> arm -> one curve a seed, of (stage, operations so far, Dice) an epoch.
        work: operations of an image at each stage.
    """
    factors = ", ".join(f"{n:g}" for n in work)
    columns = min(len(curves), IN_A_ROW)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(6.5 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in panels[len(curves):]:
        unused.remove()
    lines = {arm: {"color": f"C{k % 10}", "linestyle": DASHES[k // 10 % len(DASHES)]}
             for k, arm in enumerate(dict.fromkeys(arm for arms in curves.values() for arm in arms))}
    for axis, (title, arms) in zip(panels, curves.items(), strict=False):
        for arm, seeds in arms.items():
            line = lines[arm] | {"marker": "." if len(seeds[0]) == 1 else None}  # a point is no line
            last = np.mean([curve[-1][2] for curve in seeds])
            for curve in seeds:
                axis.plot([done for _, done, _ in curve], [dice for *_, dice in curve], alpha=0.3, linewidth=0.8,
                          **line)
            stages, operations = ([epoch[i] for epoch in seeds[0]] for i in (0, 1))
            if any([done for _, done, _ in curve] != operations for curve in seeds):
                axis.plot([], [], **line, label=f"{arm}, {of(len(seeds), 'seed')}: {last:.3f}")
                continue
            mean = np.mean([[dice for *_, dice in curve] for curve in seeds], axis=0)
            axis.plot(operations, mean, linewidth=2, **line, label=f"{arm}, {of(len(seeds), 'seed')}: {last:.3f}")
            grown = [i for i in range(1, len(stages)) if stages[i] != stages[i - 1]]
            axis.scatter([operations[i] for i in grown], mean[grown], color=lines[arm]["color"], zorder=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"operations (epochs times {factors}); dots: first epoch after a growth", fontsize=9)
        axis.set_ylabel("validation Dice at 256 pixels")
        # Early epochs near 0 would press together what is compared.
        axis.set_ylim(min(0.4, *(curve[-1][2] - 0.2 for seeds in arms.values() for curve in seeds)), 1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
