"""Compare the ratio of nucleus to cytoplasm, cell by cell, with that of the drawn masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from images.masks import load_mask
from images.pairs import Pair
from images.targets import drawn_nuclei
from nuclei.cells import cytoplasm_areas
from nuclei.overlaps import overlaps
from scoring.measures import MATCH_IOU
from system.atomic import atomic_write
from system.processes import progress, shard, unshard
from system.text import cell

RATIO_COLUMNS = ("image", "drawn_nucleus", "drawn_cytoplasm", "drawn_ratio", "predicted_nucleus", "predicted_cytoplasm",
                 "predicted_ratio")
LIMITS = 1.96  # standard deviations, between which 95 % of a normal distribution lie


def score_ratios(predictor, pairs: Sequence[Pair]) -> list[dict]:
    """Return RATIO_COLUMNS of every drawn cell: areas in pixels, nucleus / cytoplasm without its nucleus.

    A predicted nucleus is that of a cell if their IoU is above 0.5. What is predicted, and the ratio, is None where no
    nucleus matches; a ratio is None without cytoplasm. Several processes share the images, and each returns all cells.
    """
    rows = []
    for pair in progress(shard(pairs), "cells"):
        channels = predictor.predict(pair.image)
        mask = load_mask(pair.mask, predictor.classes)
        drawn = drawn_nuclei(pair, mask[..., 0])
        rows.append(cell_ratios(cell(pair.name), drawn, mask[..., 1], predictor.nuclei(channels),
                                channels[..., 1] >= predictor.threshold))
    return [row for image in unshard(rows) for row in image]


def cell_ratios(name: str, drawn: np.ndarray, drawn_cytoplasm: np.ndarray, found: np.ndarray,
                found_cytoplasm: np.ndarray) -> list[dict]:
    """Return the rows of one image from label maps of nuclei (H, W) and masks of cytoplasm (H, W) bool."""
    table = overlaps(found, drawn)
    matched = table.ious > MATCH_IOU
    partner = dict(zip(table.drawn[matched].tolist(), table.found[matched].tolist(), strict=True))
    cytoplasm = []
    for nuclei, mask in ((drawn, drawn_cytoplasm), (found, found_cytoplasm)):
        labels, dense = np.unique(np.append(nuclei, 0), return_inverse=True)  # numbers may be large; 0 is the first
        dense = dense[:-1].reshape(nuclei.shape)
        cytoplasm.append(cytoplasm_areas([dense], [mask], *mask.shape, len(labels))[1:])
    rows = []
    for i, area in enumerate(table.drawn_areas.tolist()):
        row = {"image": name} | _areas("drawn", area, int(cytoplasm[0][i]))
        j = partner.get(i)
        rows.append(row | _areas("predicted", *((None, None) if j is None else
                                                (int(table.found_areas[j]), int(cytoplasm[1][j])))))
    return rows


def _areas(whose: str, nucleus: int | None, cytoplasm: int | None) -> dict:
    ratio = round(nucleus / cytoplasm, 4) if nucleus and cytoplasm else None
    return {f"{whose}_nucleus": nucleus, f"{whose}_cytoplasm": cytoplasm, f"{whose}_ratio": ratio}


def compare_ratios(rows: list[dict]) -> dict:
    """Return how predicted ratios agree with drawn ones, over the cells that have both.

    Ratios of cells spread over orders of magnitude, so agreement is that of their logarithms (Bland and Altman 1999,
    section 3.1): `factor` is the geometric mean of predicted / drawn, and between `low` and `high` it lies for 95 % of
    cells. `pearson` is the correlation of the logarithms, `spearman` that of the ranks. All are
    None below 3 cells, and the correlations where ratios do not vary.
    """
    drawn, predicted = _both(rows)
    result: dict = {"cells": len(rows), "compared": len(drawn),
                    "not_found": sum(row["predicted_nucleus"] is None for row in rows)}
    if len(drawn) < 3:
        return result | dict.fromkeys(("factor", "low", "high", "pearson", "spearman"))
    difference = np.log(predicted / drawn)
    mean, spread = difference.mean(), LIMITS * difference.std(ddof=1)
    varied = np.ptp(drawn) > 0 and np.ptp(predicted) > 0
    return result | {
        "factor": float(np.exp(mean)), "low": float(np.exp(mean - spread)), "high": float(np.exp(mean + spread)),
        "pearson": float(np.corrcoef(np.log(drawn), np.log(predicted))[0, 1]) if varied else None,
        "spearman": float(stats.spearmanr(drawn, predicted).statistic) if varied else None}


def _both(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return drawn and predicted ratios (N,) of the cells that have both."""
    pairs = [(row["drawn_ratio"], row["predicted_ratio"]) for row in rows if row["drawn_ratio"] and
             row["predicted_ratio"]]
    drawn, predicted = np.array(pairs, float).reshape(-1, 2).T
    return drawn, predicted


def draw_ratios(rows: list[dict], agreement: dict, path: Path) -> None:
    """Draw predicted against drawn ratios, and their quotient over their geometric mean (Bland-Altman)."""
    drawn, predicted = _both(rows)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(drawn, predicted, ".", alpha=0.6)
    ends = [min(drawn.min(), predicted.min()), max(drawn.max(), predicted.max())]
    left.plot(ends, ends, color="grey", linewidth=0.8)
    left.set(xlabel="drawn nucleus / cytoplasm", ylabel="predicted nucleus / cytoplasm",
             title=f"{len(drawn)} cells, Spearman {agreement['spearman'] or 0:.2f}")
    right.loglog(np.sqrt(drawn * predicted), predicted / drawn, ".", alpha=0.6)
    for name, style in (("factor", "-"), ("low", "--"), ("high", "--")):
        right.axhline(agreement[name], color="C1", linestyle=style)
        right.annotate(f"{agreement[name]:.2f}", (1, agreement[name]), xycoords=("axes fraction", "data"),
                       ha="right", va="bottom", color="C1")
    right.set(xlabel="geometric mean of both", ylabel="predicted / drawn", title="Bland-Altman: mean and 95 % limits")
    for formatted in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        formatted("{x:g}")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    with atomic_write(path, sync=False) as file:
        figure.savefig(file, format="png", dpi=90)
