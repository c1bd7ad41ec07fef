"""Score a split at the original image size, next to what a threshold alone would reach."""

import numpy as np
import torch
from skimage.filters import threshold_otsu
from torch.nn import functional as F

from devices import autocast
from image_pyramid import FINEST, ImagePyramid
from images import load_image, load_mask
from metrics import PIXEL_METRICS, pixel_metrics


def score_split(model, pyramid: ImagePyramid, device: torch.device, precision: str, threshold: float = 0.5,
                batch_size: int = 8) -> list[dict]:
    """Predict every image at 256x256, bring the logits back to its original size, compare with its mask there.

    Args:
        model: network at stage 4.
    Returns:
        One dictionary an image: `image`, `height`, `width`, the five pixel metrics as mean over classes, `empty`
        (whether a mask or one of its classes is empty), `foreground` (share of pixels predicted), `highest`
        (highest probability), and with several classes `dice_1`, `dice_2`, ...
    """
    model.eval()
    rows = []
    for start in range(0, len(pyramid), batch_size):
        indices = np.arange(start, min(start + batch_size, len(pyramid)))
        image = pyramid.batch(FINEST, indices)[0].to(device).float().div_(255)
        with torch.inference_mode(), autocast(device, precision):
            logits = model(image.contiguous(memory_format=torch.channels_last)).float().cpu()
        for i, own in zip(indices, logits, strict=True):
            size = tuple(int(n) for n in pyramid.sizes[i])
            probability = F.interpolate(own[None], size, mode="bilinear", align_corners=False,
                                        antialias=True).sigmoid()
            rows.append(_row(pyramid, i, probability >= threshold) | {"highest": float(probability.max())})
    return rows


def score_otsu(pyramid: ImagePyramid) -> list[dict]:
    """Score Otsu's threshold (Otsu 1979) on the luminance: what is darker is foreground, in every class."""
    rows = []
    for i in range(len(pyramid)):
        grey = load_image(pyramid.pairs[i].image, 1)[..., 0]
        dark = grey <= threshold_otsu(grey) if grey.min() < grey.max() else np.zeros(grey.shape, bool)
        rows.append(_row(pyramid, i, torch.from_numpy(dark).expand(1, pyramid.out_channels, *dark.shape)))
    return rows


def _row(pyramid: ImagePyramid, i: int, prediction: torch.Tensor) -> dict:
    mask = torch.from_numpy(load_mask(pyramid.pairs[i].mask, pyramid.out_channels)).permute(2, 0, 1)[None]
    scores = pixel_metrics(prediction, mask)
    row = {"image": pyramid.names[i], "height": mask.shape[2], "width": mask.shape[3]}
    row |= {name: float(value.mean()) for name, value in scores.items()}
    if pyramid.out_channels > 1:
        row |= {f"dice_{k + 1}": float(value) for k, value in enumerate(scores["dice"][0])}
    return row | {"empty": int(not mask.any(dim=(2, 3)).all()), "foreground": float(prediction.float().mean())}


def summarise(rows: list[dict]) -> dict:
    """Return mean and standard deviation (over images) of every metric, the images and the empty masks."""
    names = [name for name in rows[0] if name in PIXEL_METRICS or name.startswith("dice_")]
    return {"images": len(rows), "empty_masks": sum(row["empty"] for row in rows)} | {
        name: {"mean": float(np.mean([row[name] for row in rows])), "std": float(np.std([row[name] for row in rows]))}
        for name in names}


def score_table(summaries: dict[str, dict]) -> str:
    """Return summaries, one a line, as text: mean and standard deviation of each metric."""
    names = [name for name in next(iter(summaries.values())) if name not in ("images", "empty_masks")]
    width = max(map(len, summaries)) + 2
    lines = [" " * width + "".join(f"{name:>16}" for name in names)]
    for title, summary in summaries.items():
        cells = "".join(f"{summary[name]['mean']:>9.4f} ±{summary[name]['std']:.3f}" for name in names)
        lines.append(f"{title:<{width}}{cells}")
    return "\n".join(lines)

