"""Score predictions at the original image size: the one definition for the table after training and for evaluation.

A row is a dictionary for one image: `image`, `group` (images of one group are not independent), `height`, `width`, the
pixel metrics and `boundary_f1` as means over classes, with several classes `dice_1`, `dice_2`, ..., `empty` (whether
the mask or one of its classes is empty), `foreground` (share of pixels predicted), for a network `highest` (its highest
probability), `trust` (see `nuclei.trust`) and, where nuclei are compared, the instance metrics with `nuclei_drawn` and
`nuclei_found`.
"""

from pathlib import Path

import numpy as np
import torch
from scipy import stats
from skimage.filters import threshold_otsu

from images.files import ImageFileError, load_image
from images.masks import load_mask
from images.pairs import Pair
from images.splits import MANIFEST, SPLITS_FILE, find_data_root, groups_of_each, list_splits, with_origins
from images.targets import drawn_nuclei
from nuclei.trust import Agreement
from scoring.cases import Case, KeptCases, to_bytes
from scoring.measures import INSTANCE_METRICS, PIXEL_METRICS, boundary_f1, instance_metrics, pixel_metrics
from scoring.unfinished import UnfinishedScores
from system.processes import progress, shard, unshard
from system.text import cell

MEASURES = (*PIXEL_METRICS, "boundary_f1", *INSTANCE_METRICS)
RESAMPLES = 10_000
CONFIDENCE = 0.95
BATCH_VALUES = 1_000_000  # drawn at once, so that memory does not grow with the number of images


def scored_pairs(data_root: Path, split: str, use_augmented: bool = True, mask_suffix: str = "") -> list[Pair]:
    """Return the pairs of a split that are scored: whole images where the data set keeps them beside its tiles.

    A data set of tiles has its valid and test images once more in `whole/SPLIT`; these are taken, because a score is
    one at the original size. A splits.csv in the data root overrides this, as it overrides the folders.
    """
    data_root = find_data_root(data_root)
    whole = data_root / "whole"
    if (whole / split).is_dir() and not (data_root / SPLITS_FILE).is_file():
        return with_origins(list_splits(whole, use_augmented, (split,), mask_suffix)[split], data_root / MANIFEST)
    return list_splits(data_root, use_augmented, (split,), mask_suffix)[split]


def score_pairs(predictor, pairs: list[Pair], instances: bool = False, group_regex: str | None = None,
                kept: UnfinishedScores | None = None, cases: KeptCases | None = None) -> list[dict]:
    """Predict every image and compare it with its mask at its own size; with `instances` nucleus by nucleus too.

    Several processes share the images, and each returns all rows.

    Args:
        group_regex: finds the group in a name (see `images.splits.groups_of`); without it the group is the one that a
            manifest tells, else the image that this one is a copy of.
        kept: has the rows of images that need no scoring, and takes those of the others.
        cases: takes the images that are scored, with their predictions.
    """
    rows = []
    for i, pair in enumerate(progress(shard(pairs), "scoring")):
        row = kept.row(pair.name) if kept else None
        if row is None:
            row, probability, mask = score_pair(predictor, pair, instances)
            if kept:
                kept.keep(pair.name, row)
            if cases:
                cases.add(_case(predictor, pair, row, probability, mask), i)
        rows.append(row)
    return with_groups(unshard(rows), pairs, group_regex)


def with_groups(rows: list[dict], pairs: list[Pair], group_regex: str | None = None) -> list[dict]:
    """Return the rows of these pairs with the group of each."""
    return [{"image": row["image"], "group": cell(group)} | row
            for row, group in zip(rows, groups_of_each(pairs, group_regex), strict=True)]


def score_pair(predictor, pair: Pair, instances: bool = False) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return the row of one image, its probabilities (H, W, K) float32 and its mask (H, W, K) bool, K the classes.

    Nuclei are those of the first class, separated by `Predictor.nuclei`.
    """
    agreement = Agreement()
    channels = predictor.predict(pair.image, agreement)
    probability = channels[..., :predictor.classes]
    mask = load_mask(pair.mask, predictor.classes)
    row = _row(pair, probability >= predictor.threshold, mask) | {"highest": float(probability.max())}
    if (trust := agreement.trust()) is not None:
        row["trust"] = trust
    if instances:
        found = predictor.nuclei(channels)
        drawn = drawn_nuclei(pair, mask[..., 0])
        row |= instance_metrics(found, drawn)
        row |= {"nuclei_drawn": len(np.unique(drawn[drawn > 0])), "nuclei_found": int(found.max())}
    return row, probability, mask


def scored_case(predictor, pair: Pair) -> Case:
    """Return an image with its mask and what is predicted."""
    return _case(predictor, pair, *score_pair(predictor, pair))


def _case(predictor, pair: Pair, row: dict, probability: np.ndarray, mask: np.ndarray) -> Case:
    image = load_image(pair.image, 3, max_value=predictor.max_value)
    return Case(row["image"], image, mask.transpose(2, 0, 1), to_bytes(probability.transpose(2, 0, 1)), row["dice"])


def score_otsu(pairs: list[Pair], classes: int, max_value: int = 0) -> list[dict]:
    """Score Otsu's threshold (Otsu 1979) on the luminance: what is darker is foreground, in every class."""
    rows = []
    for pair in pairs:
        grey = load_image(pair.image, 1, max_value=max_value)[..., 0]
        dark = grey <= threshold_otsu(grey) if grey.min() < grey.max() else np.zeros(grey.shape, bool)
        rows.append(_row(pair, np.repeat(dark[..., None], classes, axis=2), load_mask(pair.mask, classes)))
    return rows


def _row(pair: Pair, prediction: np.ndarray, mask: np.ndarray) -> dict:
    """Compare two (H, W, K) bool arrays."""
    if prediction.shape != mask.shape:
        raise ImageFileError(f"{pair.image}: {prediction.shape[0]}x{prediction.shape[1]} pixels, but its mask "
                             f"{pair.mask} has {mask.shape[0]}x{mask.shape[1]}; both must have one size. Export the "
                             f"mask again at the image's size")
    found, drawn = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (prediction, mask))
    scores = pixel_metrics(found, drawn)
    classes = range(mask.shape[2])
    row = {"image": cell(pair.name), "height": mask.shape[0], "width": mask.shape[1]}
    row |= {name: float(value.mean()) for name, value in scores.items()}
    row["boundary_f1"] = float(np.mean([boundary_f1(prediction[..., k], mask[..., k]) for k in classes]))
    if len(classes) > 1:
        row |= {f"dice_{k + 1}": float(scores["dice"][0, k]) for k in classes}
    return row | {"empty": int(not mask.any(axis=(0, 1)).all()), "foreground": float(prediction.mean())}


def summarise(rows: list[dict], seed: int = 0) -> dict:
    """Return the number of images and empty masks, and of every measure over images: mean, std, low, high.

    `low` and `high` bound the percentile bootstrap interval (Efron 1979) of the mean at 95 %, from 10000 resamples of
    the groups, each with all its images (of the images, where rows tell no groups); of a single group, of which nothing
    can be resampled, they are 0 and 1.
    """
    summary = {"images": len(rows), "empty_masks": sum(row["empty"] for row in rows)}
    groups = group_numbers(rows)
    for name in rows[0]:
        if name in MEASURES or name.startswith("dice_"):
            values = np.array([row[name] for row in rows])
            low, high, _ = bootstrap_mean(values, seed, groups) if groups.any() else (0.0, 1.0, None)
            summary[name] = {"mean": float(values.mean()), "std": float(values.std()), "low": low, "high": high}
    return summary


def trust_in_dice(rows: list[dict]) -> float | None:
    """Return Spearman's correlation of trust and Dice over images; None for fewer than 3, or if one does not vary."""
    values = np.array([(row["trust"], row["dice"]) for row in rows if "trust" in row]).reshape(-1, 2)
    return float(stats.spearmanr(*values.T).statistic) if len(values) > 2 and np.ptp(values, axis=0).all() else None


def compare(rows: list[dict], others: list[dict], seed: int = 0) -> dict:
    """Compare two lists of rows image by image: measure -> difference, low, high, p_bootstrap, p_wilcoxon.

    `difference` is the mean of the first minus the second; its interval is a paired bootstrap over groups as in
    `summarise`, `p_bootstrap` twice the share of resampled differences on the other side of 0, and `p_wilcoxon` that of
    Wilcoxon's signed rank test (scipy) over the means of the groups; it is 1 where none differs. `p_bootstrap` is at
    least 2 / RESAMPLES and, of n groups, 2 / 2^n, which is how often n differences of one sign come by chance. Of a
    single group both are 1 and the interval is -1 to 1, as nothing can be resampled.

    Raises:
        ValueError: if the rows are not of the same images in the same order.
    """
    if [row["image"] for row in rows] != [row["image"] for row in others]:
        raise ValueError(f"the rows are of different images ({len(rows)} and {len(others)}); a paired comparison needs "
                         f"the same ones in one order")
    result, groups = {}, group_numbers(rows)
    least_p = max(2 / RESAMPLES, 2.0 ** -int(groups.max()))
    for name in rows[0]:
        if (name in MEASURES or name.startswith("dice_")) and name in others[0]:
            values = np.array([a[name] - b[name] for a, b in zip(rows, others, strict=True)])
            low, high, means = bootstrap_mean(values, seed, groups) if groups.any() else (-1.0, 1.0, np.zeros(1))
            tail = min((means <= 0).mean(), (means >= 0).mean())
            result[name] = {"difference": float(values.mean()), "low": low, "high": high,
                            "p_bootstrap": float(min(1, max(2 * tail, least_p))),
                            "p_wilcoxon": wilcoxon_p(np.bincount(groups, values) / np.bincount(groups))}
    return result


def wilcoxon_p(differences: np.ndarray) -> float:
    """Return the p-value of Wilcoxon's signed rank test (scipy) that differences (N,) lie around 0; 1 if all are 0."""
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def group_numbers(rows: list[dict]) -> np.ndarray:
    """Return (N,) the number of the group of each row, from 0; each row is a group where they tell none."""
    if "group" not in rows[0]:
        return np.arange(len(rows))
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(row["group"], len(numbers)) for row in rows])


def bootstrap_mean(values: np.ndarray, seed: int, groups: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Return the bounds of the percentile bootstrap interval of the mean (scipy), and the resampled means.

    Args:
        values: (N,) floating point.
        groups: (N,) the number of the group of each, at least two; groups are resampled, and the mean is over all their
            values.
    Returns:
        low, high, means (RESAMPLES,).
    """
    counts, sums = np.bincount(groups), np.bincount(groups, values)

    def mean(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    # `random_state` is the one name that scipy 1.13 knows and later versions, which call it `rng`, still take.
    result = stats.bootstrap((sums, counts), mean, n_resamples=RESAMPLES, batch=max(1, BATCH_VALUES // len(sums)),
                             confidence_level=CONFIDENCE, method="percentile", paired=True,
                             random_state=np.random.default_rng(seed))
    return *map(float, result.confidence_interval), result.bootstrap_distribution


def score_table(summaries: dict[str, dict]) -> str:
    """Return summaries, one a line, as text: mean and standard deviation of each measure that all have."""
    first, *others = summaries.values()
    names = [name for name in first if name not in ("images", "empty_masks") and all(name in s for s in others)]
    width = max(map(len, summaries)) + 2
    lines = [" " * width + "".join(f"{name:>16}" for name in names)]
    for title, summary in summaries.items():
        cells = "".join(f"{summary[name]['mean']:>9.4f} ±{summary[name]['std']:.3f}" for name in names)
        lines.append(f"{title:<{width}}{cells}")
    return "\n".join(lines)
