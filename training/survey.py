"""What the best weights of a stage make of the validation images: pictures, calibration, and scores over thresholds."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from checkpoints import load_checkpoint, model_of
from images.resolutions import FINEST
from scoring.calibration import BINS, OF_THRESHOLDS, THRESHOLDS, reliability_counts, threshold_scores
from scoring.cases import Case, extremes, spread, to_bytes
from training.means import PassMeasures

SURVEYED = 512  # images at most, at equal distances; more would say the same of a stage
EXAMPLES = 8    # the same at every stage
SHOWN = 6       # those that differ most


@dataclass
class StageSurvey:
    """What was found.

    Attributes:
        stage, epoch, score: of the weights: best_stage_X.pth, and its Dice over all validation images.
        examples: the same images at every stage, of different groups.
        shown: the worst, the middle and the best images of this stage.
        tables: what a report needs besides, by name (see `survey_stage`).
    """

    stage: int
    epoch: int
    score: float
    examples: list[Case]
    shown: list[Case]
    tables: dict[str, np.ndarray]

    @property
    def title(self) -> str:
        """Return which weights these pictures are of, in words."""
        return (f"best_stage_{self.stage}.pth: stage {self.stage}, epoch {self.epoch}, "
                f"Dice {self.score:.3f} over all validation images")


@torch.inference_mode()
def survey_stage(trainer, loader) -> StageSurvey:
    """Predict validation images, of several processes in the first alone, with best_stage_X.pth of a trainer's stage.

    `tables` gets `stage`, `epoch`, `score`, `threshold`, `images` (how many there are), `all_dice` (of those that were
    surveyed), `reliability` (see scoring/calibration.py), `thresholds`, and at each of them `at_dice`, `at_precision`
    and `at_recall`; all at 256 pixels.

    Args:
        trainer: a ProgressiveTrainer with a folder.
        loader: of the validation images.
    """
    stage = trainer.model.stage
    path = trainer.folder.file(f"best_stage_{stage}.pth")
    saved = load_checkpoint(path)
    network = model_of(saved, path).to(trainer.device, memory_format=torch.channels_last).eval()
    count, groups, names, batch_of = _access(trainer, loader)
    surveyed = np.unique(np.linspace(0, count - 1, min(count, SURVEYED)).round().astype(int))
    measures = PassMeasures(trainer.threshold, trainer.scored_classes(loader))

    def predict(indices: np.ndarray):
        batch = batch_of(indices)
        logits, mask, _ = trainer.forward(batch, network)
        finest = batch["finest_mask"].to(mask.device)
        logits = F.interpolate(logits, finest.shape[-2:], mode="bilinear", align_corners=False)
        return batch, logits[:, :measures.classes], finest[:, :measures.classes] >= 0.5

    reliability, dice = np.zeros((3, BINS)), []
    sums = {name: np.zeros(len(THRESHOLDS)) for name in OF_THRESHOLDS}
    for indices in np.array_split(surveyed, -(-len(surveyed) // 8)):
        _, logits, mask = predict(indices)
        probability = logits.sigmoid()
        dice += measures.compare(logits, mask.float())["dice"].mean(dim=1).tolist()
        reliability += reliability_counts(probability.cpu().numpy(), mask.cpu().numpy())
        for name, values in threshold_scores(probability, mask).items():
            sums[name] += values * len(indices)

    def cases(chosen: list[int]) -> list[Case]:
        found = []
        for i in chosen:
            batch, logits, mask = predict(surveyed[[i]])
            image, probability = (to_bytes(tensor[0].float().cpu().numpy())
                                  for tensor in (batch["finest_image"], logits.sigmoid()))
            found.append(Case(names[surveyed[i]], image.transpose(1, 2, 0), mask[0].cpu().numpy(), probability,
                              dice[i]))
        return found

    of_groups = [groups[i] for i in surveyed]
    score = float(saved["score"])
    tables = {"stage": stage, "epoch": saved["epoch"], "score": score, "threshold": trainer.threshold,
              "images": count, "all_dice": dice, "reliability": reliability, "thresholds": THRESHOLDS} | {
        f"at_{name}": values / len(surveyed) for name, values in sums.items()}
    return StageSurvey(stage, saved["epoch"], score, cases(spread(of_groups, EXAMPLES)),
                       cases(extremes(dice, of_groups, SHOWN)), {k: np.array(v) for k, v in tables.items()})


def _access(trainer, loader) -> tuple[int, list[str], list[str], Callable[[np.ndarray], dict]]:
    """Return how many images there are, their groups and names, and what gives some of them as a batch, with
    `finest_image` and `finest_mask` at 256 pixels besides."""
    if hasattr(loader, "chosen"):
        dataset = loader.dataset
        regex = None if trainer.config.get("overfit") else trainer.config.get("group_regex")

        def batch_of(indices: np.ndarray) -> dict:
            finest = loader.chosen(indices, FINEST)
            batch = loader.chosen(indices, dataset.target_size) if dataset.target_size != FINEST else finest
            return batch | {"finest_image": finest["image"], "finest_mask": finest["mask"]}
        return len(dataset), dataset.groups(regex), dataset.names, batch_of
    batches, images = [], 0
    for batch in loader:  # one of torch, which cannot be asked for an image
        batches.append(batch)
        images += len(batch["image"])
        if images >= SURVEYED:
            break
    image, mask = (torch.cat([batch[key].float() for batch in batches]) for key in ("image", "mask"))
    names = [str(name) for batch in batches for name in batch.get("name", ())]
    names = names if len(names) == images else [f"image {i + 1}" for i in range(images)]

    def some(indices: np.ndarray) -> dict:
        return {"image": image[indices], "mask": mask[indices], "finest_mask": mask[indices],
                "finest_image": image[indices]}
    return images, names, names, some
