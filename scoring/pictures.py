"""Pictures of a run: training curves and predictions beside what was drawn by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage

from system.figures import ShownFigure
from system.text import shown

DRAWN, FOUND = "deepskyblue", "darkorange"  # told apart by colour-blind readers too; the second is dashed


def training_curves(rows: list[dict], path: Path) -> None:
    """Save the figure of `curves_figure`."""
    curves_figure(rows).savefig(path, dpi=110)


def curves_figure(rows: list[dict]) -> ShownFigure:
    """Draw loss, Dice and learning rate of every epoch, with the stages marked.

    Args:
        rows: rows of metrics.csv as name -> number.
    """
    figure = ShownFigure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    x = np.arange(1, len(rows) + 1)

    def curve(axis, key, label, **style):
        axis.plot(x, [row[key] for row in rows], label=label, marker="." if len(rows) < 60 else None, **style)

    curve(axes[0, 0], "train_loss", "train", color="C0")
    curve(axes[0, 0], "loss", "valid", color="C1")
    curve(axes[0, 1], "train_soft_dice", "train, soft, stage resolution", color="C0", linestyle="--")
    curve(axes[0, 1], "soft_dice", "valid, soft, stage resolution", color="C1", linestyle="--")
    curve(axes[0, 1], "dice", "valid, at 256 pixels", color="C2")
    for key, color in (("precision", "C3"), ("recall", "C4"), ("iou", "C5")):
        curve(axes[1, 0], key, f"valid {key}", color=color)
    curve(axes[1, 1], "lr", "learning rate", color="C6")
    titles = ("Loss (summed over scales)", "Dice", "Validation", "Learning rate")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.margins(y=0.1)
        for i, row in enumerate(rows):
            if i == 0 or row["stage"] != rows[i - 1]["stage"]:
                axis.axvline(i + 0.5, color="grey", linewidth=0.8, linestyle=":")
                axis.annotate(f"{row['resolution']:.0f}", (i + 0.5, 1), xycoords=("data", "axes fraction"),
                              xytext=(3, -11 - 9 * (1 - row["stage"] % 2)), textcoords="offset points",
                              color="grey", fontsize=8)  # in turn high and low: a stage may be a few epochs short
        axis.legend(fontsize=8)
    for axis in (axes[0, 1], axes[1, 0]):
        axis.set_ylim(0, 1.02)
    for axis in axes[1]:
        axis.set_xlabel("epoch of the run (dotted: a stage begins, with its resolution)")
    return figure


def predictions(images: Sequence[np.ndarray], masks: Sequence[np.ndarray], probabilities: Sequence[np.ndarray],
                names: list[str], dice: list[float], path: Path, threshold: float = 0.5) -> None:
    """Draw image, mask, prediction and outlines of some images, one a row (and class).

    Args:
        images: N times (C, H, W) in [0, 1], of any sizes.
        masks, probabilities: N times (K, H, W) in [0, 1].
        dice: (N,) per image.
        threshold: probability from which a pixel is outlined.
    """
    rows = [(i, k) for i in range(len(images)) for k in range(len(masks[i]))]
    figure = Figure(figsize=(11, 2.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for row, (i, k) in zip(axes, rows, strict=True):
        image = images[i].transpose(1, 2, 0) if len(images[i]) == 3 else images[i][0]
        drawn, found = masks[i][k] >= 0.5, probabilities[i][k] >= threshold
        row[0].imshow(image, cmap="gray", vmin=0, vmax=1)
        row[1].imshow(drawn, cmap="gray", vmin=0, vmax=1)
        row[2].imshow(probabilities[i][k], cmap="gray", vmin=0, vmax=1)
        row[3].imshow(image, cmap="gray", vmin=0, vmax=1)
        outline(row[3], drawn, DRAWN, "solid")
        outline(row[3], found, FOUND, (0, (3, 2)))
        name = shown(names[i])
        row[0].set_ylabel(name if len(name) < 32 else f"{name[:29]}...", fontsize=7,
                          parse_math=False)
        for axis, title in zip(row, ("image", "mask" + (f", channel {k + 1}" if len(masks[i]) > 1 else ""),
                                     "predicted probability", f"blue: mask, orange: prediction, Dice {dice[i]:.3f}"),
                               strict=True):
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=80)


def outline(axis, mask: np.ndarray, color: str, style) -> None:
    """Draw the border of a bool mask (H, W) along its pixel edges; nothing for an empty mask."""
    if mask.any():
        # Padded, so that a region which touches the image's edge is closed there.
        smooth = ndimage.gaussian_filter(np.pad(mask, 1).astype(float), 0.5)
        axis.contour(np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1), smooth, levels=[0.5],
                     colors=[color], linewidths=1.2, linestyles=[style])
        axis.set_xlim(-0.5, mask.shape[1] - 0.5)
        axis.set_ylim(mask.shape[0] - 0.5, -0.5)
