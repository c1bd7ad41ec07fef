"""Pictures of a run: training curves and predictions beside what was drawn by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

from nuclei.outlines import boundary
from scoring.cases import Case
from system.atomic import atomic_write
from system.figures import ShownFigure
from system.text import shown

DRAWN, FOUND = "deepskyblue", "darkorange"  # told apart by colour-blind readers too; the second is dashed
THIN = 0.9  # points, so that a nucleus of six pixels is still seen within its outline
WIDTH, ROW, TITLE, ABOVE = 11, 2.9, 0.3, 0.25  # inches: of a picture; a row of it, its title, the words above a row
GAP = 40  # between two panels of a row, as part of their width


def training_curves(rows: list[dict], path: Path) -> None:
    """Save the figure of `curves_figure`."""
    with atomic_write(path, sync=False) as file:
        curves_figure(rows).savefig(file, format="png", dpi=110)


def curves_figure(rows: list[dict]) -> ShownFigure:
    """Draw Dice, loss and learning rate of every epoch, with the stages marked; Dice at 256 pixels first.

    Args:
        rows: rows of metrics.csv as name -> number.
    """
    figure = ShownFigure(figsize=(11, 7))
    axes = figure.subplots(2, 2, sharex=True)
    figure.subplots_adjust(0.05, 0.07, 0.985, 0.93, wspace=0.16, hspace=0.22)
    dice, loss, parts, rate = axes.flat
    x = np.arange(1, len(rows) + 1)

    def curve(axis, key, label, **style):
        axis.plot(x, [row[key] for row in rows], label=label, marker="." if len(rows) < 60 else None, **style)

    curve(dice, "dice", "valid, at 256 pixels", color="C2", linewidth=2.2)
    curve(dice, "train_soft_dice", "train, soft, stage resolution", color="C0", linestyle="--")
    curve(dice, "soft_dice", "valid, soft, stage resolution", color="C1", linestyle="--")
    curve(loss, "train_loss", "train", color="C0")
    curve(loss, "loss", "valid", color="C1")
    for key, color in (("precision", "C3"), ("recall", "C4"), ("iou", "C5")):
        curve(parts, key, f"valid {key}", color=color)
    curve(rate, "lr", "learning rate", color="C6")
    titles = ("Dice", "Loss (summed over scales)", "Validation, at 256 pixels", "Learning rate")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, pad=20)
        axis.grid(alpha=0.3)
        axis.margins(y=0.1)
        for i, row in enumerate(rows):
            if i == 0 or row["stage"] != rows[i - 1]["stage"]:
                axis.axvline(i + 0.5, color="grey", linewidth=0.8, linestyle=":")
                axis.annotate(f"{row['resolution']:.0f}", (i + 0.5, 1), xycoords=("data", "axes fraction"),
                              xytext=(0, 2 + 8 * (1 - row["stage"] % 2)), textcoords="offset points", ha="center",
                              color="dimgrey", fontsize=8)  # in turn low and high: a stage may be a few epochs short
        axis.legend(fontsize=8)
    for axis in (dice, parts):
        axis.set_ylim(0, 1.02)
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))  # of all four, which share it
    for axis in axes[1]:
        axis.set_xlabel("epoch of the run (dotted: a stage begins, with its resolution)")
    return figure


def predictions(cases: Sequence[Case], path: Path, threshold: float = 0.5, title: str = "") -> None:
    """Draw image, mask, prediction and outlines of some images, one a row (and class).

    A row is one picture in one pair of axes: with four pairs of axes a row matplotlib took twice as long. A tall image
    stands in a square, so that there is room for the words above it.

    Args:
        threshold: probability from which a pixel is outlined.
        title: of the picture: which weights it shows.
    """
    rows = [(case, k) for case in cases for k in range(len(case.masks))]
    inches = ROW * len(rows) + TITLE * bool(title)
    figure = Figure(figsize=(WIDTH, inches))
    axes = figure.subplots(len(rows), squeeze=False, subplot_kw={"xticks": [], "yticks": [], "frame_on": False})
    figure.subplots_adjust(0.02, 0.01, 0.995, 1 - (ABOVE + TITLE * bool(title)) / inches, hspace=0.12)
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.3 * TITLE / inches, parse_math=False)
    for axis, (case, k) in zip(axes[:, 0], rows, strict=True):
        image, drawn, found = case.image, case.masks[k], case.found(threshold)[k]
        height, width = drawn.shape
        cell = max(height, width)
        left, step = (cell - width) // 2, cell + max(width // GAP, 1)
        panels = np.full((height, 3 * step + cell, 3), 255, np.uint8)
        for i, panel in enumerate((image, 255 * drawn[..., None], case.probability[k][..., None], image)):
            panels[:, i * step + left:i * step + left + width] = panel
        axis.imshow(panels)
        outline(axis, drawn, DRAWN, "solid", right=3 * step + left)
        outline(axis, found, FOUND, (0, (4, 2)), right=3 * step + left)
        name = shown(case.name)
        axis.set_ylabel(name if len(name) < 32 else f"{name[:29]}...", fontsize=7, parse_math=False)
        for i, words in enumerate(("image", "mask" + (f", class {k + 1}" if len(case.masks) > 1 else ""),
                                   "predicted probability",
                                   f"blue: mask, orange: found, Dice {case.dice_of(k, threshold):.3f}")):
            axis.annotate(words, (i * step + left + width / 2, 1), xycoords=("data", "axes fraction"),
                          xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)
    with atomic_write(path, sync=False) as file:
        figure.savefig(file, format="png", dpi=130)


def outline(axis, mask: np.ndarray, color: str, style, right: int = 0) -> None:
    """Draw the border of a bool mask (H, W) along its pixel edges, so many pixels to the right; nothing for an empty
    mask."""
    if mask.any():
        # Padded, so that a region which touches the image's edge is closed there.
        smooth = ndimage.gaussian_filter(np.pad(mask, 1).astype(float), 0.5)
        limits = axis.get_xlim(), axis.get_ylim()
        axis.contour(np.arange(-1, mask.shape[1] + 1) + right, np.arange(-1, mask.shape[0] + 1), smooth, levels=[0.5],
                     colors=[color], linewidths=THIN, linestyles=[style])
        axis.set(xlim=limits[0], ylim=limits[1])


def examples_picture(cases: Sequence[Case], threshold: float = 0.5, columns: int = 4) -> np.ndarray:
    """Return cases of one size, some columns a row, as (H, W, 3) uint8: outlines of the first class, and below them its
    probability."""
    tiles = []
    for case in cases:
        above = np.broadcast_to(case.image, (*case.image.shape[:2], 3)).copy()
        for mask, color in ((case.masks[0], DRAWN), (case.found(threshold)[0], FOUND)):
            above[boundary(mask)] = (np.array(to_rgb(color)) * 255).astype(np.uint8)
        tiles.append(np.concatenate([above, np.repeat(case.probability[0][..., None], 3, axis=2)]))
    columns = min(columns, len(tiles))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], axis=1) for i in range(0, len(tiles), columns)])
