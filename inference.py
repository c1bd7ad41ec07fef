"""Segment images of any size with a trained checkpoint.

    predictor = Predictor("outputs/my_run/best_stage_4.pth")      # a list of checkpoints is averaged
    probability = predictor.predict("smear.png")                  # (H, W, K) float32 in [0, 1]
    nuclei = predictor.nuclei(probability)                        # (H, W) int32, 0 for background

The checkpoint alone decides channels, stage, normalisation and sizing. With 'resize' the whole image becomes 256x256
and the logits go back to its size. With 'tile' the network sees the image at its own scale, large images in overlapping
tiles that give what the whole image would give.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from checkpoints import load_checkpoint, model_of
from images.bands import windows
from images.cache import halve
from images.familiarity import describe, strangest
from images.files import load_image, resize, to_image
from images.resolutions import FINEST
from images.tiles import BLEND, STEP, plan_axis
from nuclei.separation import middle_probability, separate_nuclei
from nuclei.single import keep_cell
from nuclei.trust import Agreement
from system.devices import autocast, choose_device, choose_precision, fitting
from system.errors import UserError
from system.notebooks import Described
from unet import LAST_STAGE
from unet_parts import upsample2x

# Pixels of the network's input, along an axis, over which a pixel acts on the logits: network -> stage -> pixels.
# Measured by switching on one pixel at every position relative to the poolings; a test measures them again.
REACH = {"pgunet": {1: 10, 2: 26, 3: 58, 4: 122}, "unet": {4: 107}}


class Predictor(Described):
    """Turn images into probabilities.

    Args:
        checkpoints: a path, or several of the same recipe (folds), whose probabilities are averaged.
        device, precision: as for training; 'auto' takes the best that is present.
        tile: side in pixels of the largest piece that is computed at once with sizing 'tile', a multiple of 16.
        batch_size: tiles at once; None takes 4 on CUDA and 1 elsewhere.
        augment: average over the eight flips and quarter turns.
        scale: resolution of the decoder level at which to stop, e.g. 128 to skip the finest; its logits are enlarged.
        single_cell: each image shows one cell, so keep one object of each class (see `nuclei.single`), which is one
            nucleus.
    Attributes:
        models: networks in eval mode, with batch normalisation folded into the convolutions: for prediction alone.
        recipe: the data recipe (see `images.recipe`) of the first checkpoint; the others agree with it in all but
            the statistics of their training images and micrometres per pixel.
        max_value: what is white in images of more than 8 bit, that of the recipe (see there) unless it is changed.
        min_probability: lowest mean probability of a nucleus; None takes the middle of the threshold and 1, and 0 with
            single_cell.
        stage, threshold, device, precision: what was found and chosen.
    Raises:
        UserError: for files that are no checkpoints or do not belong together, and for settings out of range.
    """

    def __init__(self, checkpoints, device: str = "auto", precision: str = "auto", tile: int = 1024,
                 batch_size: int | None = None, augment: bool = False, scale: int | None = None,
                 single_cell: bool = False):
        paths = [Path(path) for path in ([checkpoints] if isinstance(checkpoints, (str, Path)) else checkpoints)]
        if not paths:
            raise UserError("checkpoints is empty; give one path or a list of at least one")
        self.paths, self.device = paths, choose_device(str(device))
        self.precision = choose_precision(precision, self.device)
        found = [load_checkpoint(path) for path in paths]
        for path, checkpoint in zip(paths, found, strict=True):
            _check_agreement(checkpoint, found[0], path, paths[0])
        self.stage, self.threshold, self.recipe = found[0]["stage"], found[0]["threshold"], found[0]["data"]
        self.max_value, self.min_probability = self.recipe.max_value, None
        self.models = [model_of(checkpoint, path) for checkpoint, path in zip(found, paths, strict=True)]
        for model in self.models:
            with fitting(model, self.device):
                model.to(self.device, memory_format=torch.channels_last)
                model.fold()
        if scale is not None:
            self.models[0].checked_scale(scale)
        if single_cell and self.recipe.sizing == "tile":
            raise UserError(f"{paths[0]}: this network sees images at their own scale, where one holds many nuclei. "
                            f"Leave --single_cell out; it is for networks that see the whole image at 256x256")
        self.scale, self.augment, self.single_cell = scale, augment, single_cell
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise UserError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")
        self.batch_size = batch_size or (4 if self.device.type == "cuda" else 1)
        self.tile, self.margin = tile, max(tile_margin(model) for model in self.models)
        smallest = -(-(2 * self.margin + BLEND + STEP) // STEP) * STEP
        if self.recipe.sizing == "tile" and (tile % STEP or tile < smallest):
            raise UserError(f"tile is {tile!r}; at stage {self.stage} it must be a multiple of {STEP} and at least "
                             f"{smallest}, because {self.margin} pixels at each side have no weight")

    @property
    def classes(self) -> int:
        """Return how many output channels are masks; one more is the boundary of nuclei, if it is a target."""
        return self.recipe.classes

    @property
    def has_cytoplasm(self) -> bool:
        """Tell whether the classes are nucleus and cytoplasm, so that nuclei are measured with their cytoplasm."""
        return self.recipe.has_cytoplasm

    @property
    def in_channels(self) -> int:
        """Return the channels of the images: 1 for luminance, 3 for RGB."""
        return self.recipe.in_channels

    def __str__(self) -> str:
        count = f"{len(self.models)} checkpoints averaged, " if len(self.models) > 1 else ""
        sizing = f"native scale in tiles of {self.tile}" if self.recipe.sizing == "tile" else \
            f"resized to {FINEST}x{FINEST}"
        return (f"{count}stage {self.stage}, {'RGB' if self.in_channels == 3 else 'luminance'}, {sizing}; device "
                f"{self.device}, precision {self.precision}, {torch.get_num_threads()} threads"
                + (", flips and turns averaged" if self.augment else "")
                + (", one object an image" if self.single_cell else "")
                + (f", logits of scale {self.scale}" if self.scale else ""))

    def described(self) -> dict[str, str]:
        """Return checkpoints, network, channels, sizing, threshold and device."""
        return {"checkpoints": ", ".join(map(str, self.paths)), "network": type(self.models[0]).__name__,
                "stage": str(self.stage), **self.recipe.described(), "threshold": f"{self.threshold:g}",
                "objects": "one an image" if self.single_cell else "all",
                "device": f"{self.device}, {self.precision}"}

    def show(self, image, min_area: int = 30):
        """Return a matplotlib figure of an image, the outlines of the nuclei found in it, and the probabilities.

        Args:
            image: as for `predict`.
            min_area: in pixels, of the smallest nucleus.
        """
        from scoring.figures import prediction_figure

        pixels = self._pixels(image)
        probability = self.predict(pixels)
        name = Path(image).name if isinstance(image, (str, Path)) else "image"
        return prediction_figure(pixels, probability, self.nuclei(probability, min_area), name,
                                 self.recipe.channel_names)

    def predict(self, image, agreement: Agreement | None = None) -> np.ndarray:
        """Segment one image of any size.

        Args:
            image: a path, a Pillow image, or an array, grey or RGB, of bool, uint8, uint16 or floating point in [0, 1]
                (see `images.files.to_image`); it is brought to the channels of the checkpoint.
            agreement: is told how much the scales and views of the network agree (see `nuclei.trust`).
        Returns:
            (H, W, K) float32 probabilities in [0, 1] at the image's size: the classes, then the boundary of nuclei if
            the network was taught it. With `single_cell` they are 0 where the present threshold finds other objects.
        Raises:
            ImageFileError: a UserError that says what is wrong with the image.
        """
        pixels = self._pixels(image)
        if self.recipe.sizing == "tile":
            return np.concatenate(list(self.predict_bands([pixels], len(pixels), pixels.shape[1], agreement)))
        return self._predict_resized(pixels, agreement)

    def predict_bands(self, bands: Iterable[np.ndarray], height: int, width: int,
                      agreement: Agreement | None = None) -> Iterator[np.ndarray]:
        """Segment an image that comes in bands of rows, at its own scale, one row of tiles after the other.

        Held are a row of tiles of the image and of the probabilities, so that memory grows with the width alone.

        Args:
            bands: (rows, width, in_channels) uint8 of any number of rows, from top to bottom.
            height, width: of the whole image, in pixels.
            agreement: as for `predict`; what tiles share counts in each of them.
        Yields:
            (rows, width, K) float32 probabilities in [0, 1], finished ones, for each row of tiles.
        """
        padded_height = height + -height % STEP
        offsets, weights = plan_axis(padded_height, self.tile, self.margin)
        spans = [(y, min(y + len(row_weights), height)) for y, row_weights in zip(offsets, weights, strict=True)]
        total = np.zeros((len(weights[0]), width, self.recipe.target_channels), np.float32)
        source = windows(bands, spans)
        for y, row_weights, next_y in zip(offsets, weights, [*offsets[1:], padded_height], strict=True):
            self._add_row_of_tiles(total, next(source), row_weights, agreement)
            finished = next_y - y  # the next row of tiles gives no weight to what lies above it
            yield total[:min(finished, height - y)].clip(0, 1)
            total[:-finished], total[-finished:] = total[finished:], 0

    def nuclei(self, probability: np.ndarray, min_area: int = 30) -> np.ndarray:
        """Separate the nuclei of the first class in what `predict` returned (see `nuclei.separation.separate_nuclei`).

        Returns:
            (H, W) int32, numbered from 1 without gaps, 0 for background.
        """
        boundary = probability[..., -1] if "boundary" in self.recipe.targets else None
        whole = {"depth": math.inf} if self.single_cell else {}
        return separate_nuclei(probability[..., 0], self.threshold, boundary, min_area=min_area,
                               min_probability=self.lowest_probability, **whole)

    @property
    def lowest_probability(self) -> float:
        """Return the mean probability that a nucleus has at least."""
        if self.min_probability is not None:
            return self.min_probability
        return 0.0 if self.single_cell else middle_probability(self.threshold)

    def unlike_training(self, pixels: np.ndarray, probability: np.ndarray) -> str | None:
        """Say in what way an image lies far from those that the network was trained on, or return None.

        Args:
            pixels: (H, W, in_channels) uint8.
            probability: (H, W, K) float32, what `predict` made of it.
        """
        mask, size = probability[..., 0] >= self.threshold, None
        if self.recipe.sizing == "resize":
            size = pixels.shape[:2]
            pixels = resize(pixels, FINEST)
            mask = resize(mask[..., None].astype(np.uint8) * 255, FINEST)[..., 0] >= 128
        return strangest(describe(pixels, mask, size), self.recipe.training_ranges)

    def _pixels(self, image) -> np.ndarray:
        """Return what `predict` is given as (H, W, in_channels) uint8."""
        if isinstance(image, (str, Path)):
            return load_image(Path(image), self.in_channels, max_value=self.max_value)
        return to_image(image, self.in_channels, max_value=self.max_value)

    def _predict_resized(self, pixels: np.ndarray, agreement: Agreement | None) -> np.ndarray:
        height, width = pixels.shape[:2]
        small = torch.from_numpy(resize(pixels, FINEST).transpose(2, 0, 1).copy())[None]
        mean = self._mean_probability(small, lambda logits: F.interpolate(
            logits.cpu(), (height, width), mode="bilinear", align_corners=False, antialias=True), agreement)
        probability = mean[0].permute(1, 2, 0).contiguous().numpy()
        if self.single_cell:
            probability[..., :self.classes] = self._keep_cell(probability[..., :self.classes])
        return probability

    def _keep_cell(self, probability: np.ndarray) -> np.ndarray:
        return keep_cell(probability, self.threshold, self.has_cytoplasm)

    def _add_row_of_tiles(self, total: np.ndarray, pixels: np.ndarray, row_weights: np.ndarray,
                          agreement: Agreement | None) -> None:
        """Add the weighted probabilities of a row of tiles to `total` (rows, W, K).

        Args:
            pixels: (up to rows, W, C) uint8, short of `rows` at the lower end of the image.
            row_weights: (rows,) float32, what each row of the tiles counts.
        """
        height, width = len(row_weights), pixels.shape[1]
        padded = np.pad(pixels, ((0, height - len(pixels)), (0, -width % STEP), (0, 0)), mode="reflect")
        places = list(zip(*plan_axis(padded.shape[1], self.tile, self.margin), strict=True))
        for start in range(0, len(places), self.batch_size):
            chosen = places[start:start + self.batch_size]
            tiles = np.stack([padded[:, x:x + len(column_weights)] for x, column_weights in chosen])
            probability = self._mean_probability(torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous(),
                                                 agreement=agreement)
            for (x, column_weights), tile in zip(chosen, probability.permute(0, 2, 3, 1).numpy(), strict=True):
                inside = min(len(column_weights), width - x)
                weights = (row_weights[:, None] * column_weights)[..., None]
                total[:, x:x + inside] += (tile * weights)[:, :inside]

    @torch.inference_mode()
    def _mean_probability(self, image: torch.Tensor, finish: Callable = lambda logits: logits,
                          agreement: Agreement | None = None) -> torch.Tensor:
        """Return (N, K, ...) float32 probabilities on the CPU, averaged over checkpoints and views.

        Args:
            image: (N, C, H, W) uint8 at the scale of 256 pixels, sides multiples of 16.
            finish: what becomes of logits (N, K, H, W) before the sigmoid.
        """
        views = [(turns, flip) for flip in (False, True) for turns in range(4)] if self.augment else [(0, False)]
        total, answers = torch.zeros(()), []
        for turns, flip in views:
            seen = torch.rot90(image.flip(-1) if flip else image, turns, (-2, -1)).contiguous()
            for model in self.models:
                scales = [torch.rot90(scale, -turns, (-2, -1)) for scale in self._logits(model, seen, bool(agreement))]
                scales = [scale.flip(-1) for scale in scales] if flip else scales
                total = total + finish(scales[-1]).sigmoid()
                if agreement:
                    answers.append([scale[:, :self.classes].sigmoid().half() for scale in scales])  # of many views
        total = (total / (len(views) * len(self.models))).cpu()
        if not total.isfinite().all():
            raise UserError("the network answers with what is no number (NaN). Try --precision float32, and look at "
                            "the image")
        if agreement:
            self._compare(answers, agreement)
        return total

    def _compare(self, answers: list[list[torch.Tensor]], agreement: Agreement) -> None:
        """Compare the scales (N, K, H, W) of every view, from coarse to fine, with the mask that the finest give."""
        mean = torch.stack([scales[-1] for scales in answers]).float().mean(dim=0)
        if self.single_cell:  # and so one image
            mean = torch.from_numpy(self._keep_cell(mean[0].permute(1, 2, 0).cpu().numpy())).permute(2, 0, 1)[None]
        mask = mean.to(answers[0][-1].device) >= self.threshold
        for view, (*coarser, finest) in enumerate(answers):
            agreement.add("views", view, finest, mask)
            for number, scale in enumerate(coarser):
                agreement.add("scales", view * len(coarser) + number, scale, mask)

    def _logits(self, model, image: torch.Tensor, all_scales: bool) -> list[torch.Tensor]:
        """Return float32 logits (N, K, H, W): the image is halved down to the stage, its logits doubled.

        They are those of the finest scale, after those of the coarser ones if they are wanted.
        """
        side = image.shape[-1]
        for _ in range(LAST_STAGE - self.stage):
            image = halve(image)
        image = image.to(self.device).float().div_(255).contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.precision):
            scales = model(image, return_all_scales=True, scale=self.scale)
        return [_doubled(scale.float(), side) for scale in (scales if all_scales else scales[-1:])]


def _doubled(logits: torch.Tensor, width: int) -> torch.Tensor:
    """Return logits (N, K, H, W) doubled until they are so wide."""
    while logits.shape[-1] < width:
        logits = upsample2x(logits)
    return logits


def tile_margin(model) -> int:
    """Return the pixels at an inner side of a tile that do not see all that they would see in the whole image.

    Below the last stage the image is reduced for the network and its logits are enlarged again, which adds less than
    three of its pixels.
    """
    reduction = 2 ** (LAST_STAGE - model.stage)
    return (REACH[model.name][model.stage] + (3 if reduction > 1 else 0)) * reduction


def _check_agreement(checkpoint: dict, first: dict, path: Path, first_path: Path) -> None:
    """Raise UserError unless two checkpoints can be averaged: one stage, one threshold, one kind of data."""
    try:
        for name in ("stage", "threshold"):
            if checkpoint[name] != first[name]:
                raise UserError(f"{path}: {name} is {checkpoint[name]!r}, but {first[name]!r} in {first_path}; they "
                                f"must agree in it")
        checkpoint["data"].check_agreement(first["data"], str(path), str(first_path))
    except UserError as error:
        raise UserError(f"{error}. Checkpoints that are averaged need one stage, threshold and data recipe; predict "
                        f"with each on its own") from None
