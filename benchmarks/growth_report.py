"""What a study of growing says: tables and statistics from its CSV files alone, without a training."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.stats import mannwhitneyu, median_abs_deviation

from benchmarks.growth_tables import (
    EPOCHS,
    IMAGES,
    MINUTES,
    TRAININGS,
    budget_order,
    study_settings,
    study_table,
    work_of,
)
from benchmarks.pictures import dice_over_operations
from images.resolutions import RESOLUTIONS
from scoring.scores import CONFIDENCE, RESAMPLES, wilcoxon_p
from system.atomic import atomic_write
from system.errors import UserError
from training.schedule import CLASSIC_WORK

GOALS = (0.80, 0.85, 0.88)  # of validation Dice, to which minutes are counted
REPORT, PICTURE = "growth.md", "growth.png"
SCORES = {"dice_256": "Dice at 256", "dice": "Dice at original size", "aji": "AJI"}


class Study:
    """The tables of one folder as numbers.

    Raises:
        UserError: if there is no finished training, or if they are of different data.
    """

    def __init__(self, out: Path):
        trainings = study_table(out, TRAININGS)
        if not trainings:
            raise UserError(f"{out}: no {TRAININGS} with a finished training in it. Run the study first, without "
                            f"--report")
        data = sorted({row["data"] for row in trainings})
        if len(data) > 1:
            raise UserError(f"{out / TRAININGS}: its trainings are of different data (fingerprints "
                            f"{', '.join(data)}), so they do not compare. Keep the rows of one, or start anew")
        self.trainings = trainings
        self.images, self.epochs = study_table(out, IMAGES), study_table(out, EPOCHS)
        settings = study_settings(out)
        self.work, kept = work_of(settings), settings.get("arms", ())
        self.change = " ".join(str(settings.get("change", "")).split())
        there = dict.fromkeys(row["arm"] for row in trainings)
        self.arms = [arm for arm in dict.fromkeys([*kept, *there]) if arm in there]
        self.budgets = sorted({row["budget"] for row in trainings}, key=budget_order)

    def scores(self, arm: str, budget: str, score: str) -> dict[str, dict[tuple, float]]:
        """Return seed -> (split, image) -> score, of all images that have it."""
        found: dict[str, dict[tuple, float]] = {}
        for row in rows_of(self.images, arm, budget):
            if row[score]:
                found.setdefault(row["seed"], {})[row["split"], row["image"]] = float(row[score])
        return found

    def groups(self) -> dict[tuple, str]:
        """Return (split, image) -> its patient or field of view; without those of older tables, which tell none."""
        return {(row["split"], row["image"]): row["group"] for row in self.images if row["group"]}

    def times(self, arm: str, budget: str) -> dict[str, list[tuple[float, float]]]:
        """Return seed -> (minutes of processor time so far, validation Dice) of each epoch; without those not timed."""
        found: dict[str, list] = {}
        for row in rows_of(self.epochs, arm, budget):
            if row["processor_seconds"]:
                found.setdefault(row["seed"], []).append((float(row["processor_seconds"]) / 60, float(row["dice"])))
        return found

    def curves(self, arm: str, budget: str) -> dict[str, list[tuple[int, float, float]]]:
        """Return seed -> (stage, operations so far, validation Dice) of each epoch."""
        found: dict[str, list] = {}
        for row in rows_of(self.epochs, arm, budget):
            found.setdefault(row["seed"], []).append(
                (int(row["stage"]), float(row["operations"]), float(row["dice"])))
        return found


def write_report(out: Path) -> str:
    """Write growth.md and growth.png into a study's folder and return the text."""
    study = Study(out)
    parts = ["# Growing against direct training\n",
             "Scores are of the last weights, means over the images of valid and test, then over seeds, ± the standard "
             "deviation over seeds. Operations count epochs times "
             f"{', '.join(f'{n:g}' for n in study.work.values())} for stages 1 to 4, of the classic U-Net times "
             f"{CLASSIC_WORK}. Times are those of training, without validation."]
    if study.change:
        parts.append(f"\n**The code differed from the project's:** {study.change}.")
    for budget in study.budgets:
        parts += [f"\n## {title_of(budget)}\n", *arm_table(study, budget), *comparison_table(study, budget),
                  *effort_table(study, budget), *time_table(study, budget), *growth_table(study, budget)]
    text = "\n".join(parts) + "\n"
    with atomic_write(out / REPORT) as file:
        file.write(text.encode())
    dice_over_operations({title_of(budget): {arm: list(curves.values()) for arm in study.arms
                                   if (curves := study.curves(arm, budget))} for budget in study.budgets},
                         study.work.values(), out / PICTURE)
    return text


def title_of(budget: str) -> str:
    """Return what a budget is, in words."""
    minutes = budget.removesuffix(MINUTES)
    return f"Operations of {budget} epochs at 256 pixels" if minutes == budget else f"{minutes} minutes each"


def rows_of(table: list[dict], arm: str, budget: str) -> list[dict]:
    """Return the rows of an arm at a budget."""
    return [row for row in table if row["arm"] == arm and row["budget"] == budget]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def arm_table(study: Study, budget: str) -> list[str]:
    """Return one line an arm: what it did, what it cost and what it reached."""
    shown = [score for score in SCORES if any(row[score] for row in study.images)]
    lines = []
    for arm in study.arms:
        trainings = rows_of(study.trainings, arm, budget)
        if not trainings:
            continue
        cells = [f"**{arm}**", trainings[0]["epochs"].replace(",", ", "), str(len(trainings))]
        cells += [f"{np.median([float(row[name]) for row in trainings]):.0f}"
                  for name in ("operations", "images_seen", "processor_seconds")]
        for score in shown:
            means = [float(np.mean(list(of_seed.values()))) for of_seed in study.scores(arm, budget, score).values()]
            spread = f" ± {np.std(means, ddof=1):.4f}" if len(means) > 1 else ""
            cells.append(f"{np.mean(means):.4f}{spread} ({', '.join(f'{mean:.4f}' for mean in means)})")
        lines.append(cells)
    return table(("arm", "epochs a stage", "seeds", "operations", "images seen", "processor s",
                  *(SCORES[score] for score in shown)), lines)


def comparison_table(study: Study, budget: str) -> list[str]:
    """Return the differences of all arms to the first, paired by image and seed."""
    reference, groups, lines = study.arms[0], study.groups(), []
    if not rows_of(study.trainings, reference, budget):
        return [f"\nNothing is compared: no training of **{reference}** at this budget is finished."]
    for arm in study.arms[1:]:
        for score, title in SCORES.items():
            found = compare_arms(study.scores(arm, budget, score), study.scores(reference, budget, score), groups)
            if found:
                p_seeds = f"{found['p_seeds']:.3f}" if found["seeds"] > 1 else ""
                p_groups = "< 0.0001" if found["p_groups"] < 1e-4 else f"{found['p_groups']:.4f}"
                lines.append([f"{arm} minus {reference}", title, f"{found['difference']:+.4f}",
                              f"{found['low']:+.4f} to {found['high']:+.4f}", str(found["seeds"]), str(found["images"]),
                              str(found["groups"]), p_seeds, p_groups])
    if not lines:
        return []
    return ["\nPaired by image and seed. The 95 % interval is a bootstrap over groups of images and seeds together (of "
            "one seed: over groups alone). A group is what lies in one patient or field of view, or an image where the "
            "data tell neither. With few seeds the interval is still too narrow. p-values are of Wilcoxon's signed "
            "rank test, over the means of seeds (with n seeds none is below 2 / 2^n) and over the means of groups.\n",
            *table(("", "score", "difference", "95 % interval", "seeds", "images", "groups", "p over seeds",
                    "p over groups"), lines)]


def compare_arms(one: dict[str, dict], other: dict[str, dict], group_of: dict, seed: int = 0) -> dict | None:
    """Compare two arms on the seeds and images that both have; None without any.

    Args:
        one, other: seed -> image -> score.
        group_of: image -> its group; an image without one is a group.
        seed: of the bootstrap.
    Returns:
        difference (one minus other), low, high, seeds, images, groups, p_seeds, p_groups.
    """
    seeds = [s for s in one if s in other]
    both = [scores[s] for s in seeds for scores in (one, other)]
    images = [i for i in both[0] if all(i in of_seed for of_seed in both)] if both else []
    if not images:
        return None
    differences = np.array([[one[s][i] - other[s][i] for i in images] for s in seeds])
    _, groups = np.unique([str(group_of.get(image, image)) for image in images], return_inverse=True)
    low, high = crossed_interval(differences, groups, seed)
    of_groups = np.bincount(groups, differences.mean(axis=0)) / np.bincount(groups)
    return {"difference": float(differences.mean()), "low": low, "high": high, "seeds": len(seeds),
            "images": len(images), "groups": len(of_groups), "p_seeds": wilcoxon_p(differences.mean(axis=1)),
            "p_groups": wilcoxon_p(of_groups)}


def crossed_interval(differences: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the bounds of the bootstrap interval of a mean over seeds and images.

    Seeds and groups of images are drawn with replacement, independently (Efron 1979, for two crossed factors). What is
    drawn of n is spread by sqrt(n / (n - 1)), as the deviation of a sample is smaller than that of what it was drawn
    from. A group counts by the sum of its deviations from the mean, so that the spread is one of a linear statistic.

    Args:
        differences: (seeds, images).
        groups: (images,) the number of the group of each, from 0.
        seed: of the drawing.
    """
    rng, mean = np.random.default_rng(seed), differences.mean()
    deviations = np.stack([np.bincount(groups, row - mean) for row in differences])
    deviations *= deviations.shape[1] / differences.shape[1]  # so that their mean is that of all images
    of_seeds, of_groups = (spread_draws(rng, n) for n in deviations.shape)
    means = mean + ((of_seeds @ deviations) * of_groups).sum(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def spread_draws(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return (RESAMPLES, n) weights of n things drawn n times with replacement, spread about 1 / n as said above."""
    drawn = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    return 1 / n + (drawn - 1 / n) * np.sqrt(n / max(n - 1, 1))


def effort_table(study: Study, budget: str) -> list[str]:
    """Return with how much of the first arm's operations each arm reached that arm's last validation Dice."""
    ends = {seed: curve[-1] for seed, curve in study.curves(study.arms[0], budget).items()}
    lines = []
    for arm in study.arms[1:]:
        each = []
        for seed, curve in study.curves(arm, budget).items():
            if seed in ends:
                _, whole, goal = ends[seed]
                done = cost_to([epoch[1:] for epoch in curve], goal)
                each.append("not reached" if done is None else f"{done / whole:.0%}")
        if each:
            lines.append([arm, ", ".join(each)])
    if not lines:
        return []
    return [f"\nOperations from which on validation Dice stayed at the last one of **{study.arms[0]}** with the same "
            f"seed or above, as share of its operations, each seed:\n", *table(("arm", "operations"), lines)]


def time_table(study: Study, budget: str) -> list[str]:
    """Return after how many minutes of processor time the Dice of each arm stayed at some goals."""
    lines = []
    for arm in study.arms:
        seeds = study.times(arm, budget)
        cells = [reached_by([cost_to(curve, goal) for curve in seeds.values()]) for goal in GOALS]
        if any(cells):
            lines.append([arm, str(len(seeds)), *cells])
    if not lines:
        return []
    return ["\nMinutes of processor time in training after which validation Dice stayed at a goal or above: median "
            "over seeds (lowest to highest). A seed that does not reach it counts as the longest.\n",
            *table(("arm", "seeds timed", *(f"Dice {goal:.2f}" for goal in GOALS)), lines)]


def reached_by(costs: list[float | None]) -> str:
    """Return median and range of what was needed to reach a goal, None where it was not; '' without a training."""
    if not costs:
        return ""
    there = [cost for cost in costs if cost is not None]
    median = np.median([math.inf if cost is None else cost for cost in costs])
    missed = f"{len(costs) - len(there)} of {len(costs)} not" if len(there) < len(costs) else ""
    reached = f"{min(there):.1f} to {max(there):.1f}" if there else ""
    middle = "not reached" if math.isinf(median) else f"{median:.1f}"
    return f"{middle} ({'; '.join(filter(None, (reached, missed)))})" if there else middle


def cost_to(curve: list[tuple[float, float]], goal: float) -> float | None:
    """Return the cost from which on Dice stays at a goal or above; None if it is below at the end.

    Args:
        curve: (cost so far, Dice) of each epoch.
    """
    found = None
    for done, dice in reversed(curve):
        if dice < goal:
            break
        found = done
    return found


def growth_table(study: Study, budget: str) -> list[str]:
    """Return validation Dice before and after each growth, beside the changes from epoch to epoch."""
    lines = []
    for arm in study.arms:
        within, growths = changes(list(study.curves(arm, budget).values()))
        noise = f"{median_abs_deviation(within, scale='normal'):.3f}" if within else ""
        for (before, after), pairs in growths.items():
            steps = [b - a for a, b in pairs]
            p = f"{mannwhitneyu(steps, within, alternative='less').pvalue:.3f}" if within else ""
            lines.append([arm, f"{RESOLUTIONS[before - 1]} to {RESOLUTIONS[after - 1]}",
                          ", ".join(f"{a:.3f} to {b:.3f}" for a, b in pairs), f"{np.mean(steps):+.3f}",
                          f"{min(steps):+.3f}", noise, f"{min(within):+.3f}" if within else "", p])
    if not lines:
        return []
    return ["\nValidation Dice at 256 pixels in the last epoch before and the first epoch after a growth, each seed. "
            "Beside it the changes from one epoch to the next within the stages: their deviation (1.4826 times the "
            "median absolute deviation, which single dips do not move) and the lowest. p is that of changes at this "
            "growth being lower than those within the stages (Mann and Whitney's test, one-sided).\n",
            *table(("arm", "growth", "Dice before and after", "mean change", "lowest", "within stages: deviation",
                    "within stages: lowest", "p of lower"), lines)]


def changes(curves: list[list[tuple[int, float, float]]]) -> tuple[list[float], dict[tuple[int, int], list]]:
    """Return the changes of Dice from epoch to epoch within stages, and (from, to) -> Dice before and after."""
    within: list[float] = []
    growths: dict[tuple[int, int], list] = {}
    for curve in curves:
        for (stage, _, dice), (next_stage, _, next_dice) in pairwise(curve):
            if stage == next_stage:
                within.append(next_dice - dice)
            else:
                growths.setdefault((stage, next_stage), []).append((dice, next_dice))
    return within, growths
