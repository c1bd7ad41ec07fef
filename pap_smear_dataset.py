"""The data set, its check, and the loaders for all four resolutions.

    python pap_smear_dataset.py data  # check and report, as prepare_data.py check does
    python pap_smear_dataset.py data_mine --write_splits --group_regex '^[^_]+'  # as prepare_data.py split does
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from images.augmentation import MAX_STRENGTH, augment, sample_numbers
from images.files import ImageFileError
from images.pyramid import ImagePyramid, open_pyramids
from images.recipe import MASK, DataRecipe
from images.report import check_dataset, split_dataset
from images.resolutions import DEFAULT_BATCH_SIZES, FINEST, RESOLUTIONS
from images.splits import SPLITS, groups_of_each
from system.errors import UserError
from system.notebooks import Described
from system.options import Parser, command, regex, whole
from system.processes import shard
from system.signals import leave_signals_to_the_parent


class PapSmearDataset(Described, Dataset):
    """Images and masks of one split, resized to the current target size.

    Args:
        data_root: folder with train|valid|test / images|masks (see images/splits.py).
        split: 'train', 'valid' or 'test'; only 'train' augments.
        target_size: 32, 64, 128 or 256.
        use_augmented: take the copies with a prefix (flipped_*, ...) too.
        augment_probability: chance of each random transform, 0..1; what they do to a sample follows from (seed,
            target size, epoch, index), so call `set_epoch` before each pass of a loop of your own.
        in_channels: 1 (luminance) or 3 (RGB).
        out_channels: mask channels.
        cache_images: decode once, and keep the images in memory or, if they are many, in memory-mapped files; None
            does so where there is space (see images/cache.py).
        pyramid: the split as already decoded; data_root, channels, use_augmented, cache_images and targets are then
            not used.
        targets: ('mask',), or ('mask', 'boundary') for one mask channel more: the rims of the nuclei.
        augment_strength: factor on the amounts of the random transforms, 0..3.
        max_value, mask_suffix: see `images.pyramid.open_pyramids`; not used with a pyramid.
    Raises:
        DatasetError (a UserError) that lists every problem found in the files.
    """

    def __init__(self, data_root="data", split: str = "train", target_size: int = 256, use_augmented: bool = True,
                 augment_probability: float = 0.5, in_channels: int = 1, out_channels: int = 1,
                 cache_images: bool | None = None, seed: int = 0, pyramid: ImagePyramid | None = None,
                 targets: tuple[str, ...] = MASK, augment_strength: float = 1.0, max_value: int = 0,
                 mask_suffix: str = ""):
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        if not 0 <= augment_probability <= 1:
            raise UserError(f"augment_probability is {augment_probability!r}; it must lie in [0, 1]")
        if not 0 <= augment_strength <= MAX_STRENGTH:
            raise UserError(f"augment_strength is {augment_strength!r}; it must lie in [0, {MAX_STRENGTH:g}]")
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise UserError(f"seed is {seed!r}; it must be a whole number of at least 0")
        self.split, self.seed, self.augment_strength = split, int(seed), augment_strength
        self.augment_probability = augment_probability if split == "train" else 0.0
        # In shared memory, so that workers that live on see a change.
        self._size_and_epoch = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.update_target_size(target_size)
        self.pyramid = pyramid if pyramid is not None else open_pyramids(
            data_root, in_channels, out_channels, use_augmented, cache_images,
                                                (split,), targets, max_value, mask_suffix)[split]

    @property
    def recipe(self) -> DataRecipe:
        """Return what a network must know of these images."""
        return self.pyramid.recipe

    @property
    def target_size(self) -> int:
        """Return the side in pixels of the samples."""
        return int(self._size_and_epoch[0])

    @property
    def epoch(self) -> int:
        """Return the epoch that decides the augmentation."""
        return int(self._size_and_epoch[1])

    def update_target_size(self, target_size: int) -> None:
        """Change the side of all samples from now on; a loader follows at its next `iter`."""
        if target_size not in RESOLUTIONS:
            raise UserError(f"target_size is {target_size!r}; it must be one of {RESOLUTIONS}")
        self._size_and_epoch[0] = target_size

    @property
    def names(self) -> list[str]:
        """Return the names of the samples."""
        return self.pyramid.names

    def groups(self, group_regex: str | None = None) -> list[str]:
        """Return the group of every sample (see `images.splits.groups_of`)."""
        return groups_of_each(self.pyramid.pairs, group_regex)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of this epoch."""
        self._size_and_epoch[1] = epoch

    def __len__(self) -> int:
        return len(self.pyramid)

    def __getitem__(self, index: int) -> dict:
        """Return `image` (C, S, S) float32 in [0, 1], `mask` (K, S, S) float32 of 0 and 1, and `name`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        # Called by DataLoader for a whole batch: the size is read once, so that no batch mixes sizes.
        if max(indices) >= len(self) or min(indices) < -len(self):
            raise IndexError(f"index {indices} is outside the {len(self)} images of {self.split}")
        batch = self.finished(self.raw_batch(self.target_size, np.asarray(indices) % len(self)), self.epoch)
        return [{"image": image, "mask": (mask >= 0.5).float(), "name": name}
                for image, mask, name in zip(batch["image"], batch["mask"], batch["name"], strict=True)]

    def raw_batch(self, resolution: int, indices: np.ndarray) -> dict:
        """Return images and masks of these samples as stored: uint8, not augmented."""
        image, mask = self.pyramid.batch(resolution, indices)
        return {"image": image, "mask": mask, "indices": indices}

    def finished(self, raw: dict, epoch: int, device: torch.device | str = "cpu") -> dict:
        """Move a raw batch to the device, scale it to [0, 1] and augment it there."""
        image, mask = (_to_device(raw[key], device).float().div_(255) for key in ("image", "mask"))
        if self.augment_probability > 0:
            numbers = sample_numbers(self.seed, image.shape[-1], epoch, raw["indices"])
            image, mask = augment(image, mask, numbers, self.augment_probability, self.augment_strength)
        return {"image": image, "mask": mask, "name": [self.pyramid.names[i] for i in raw["indices"]]}

    def finest_masks(self, names: list[str]) -> torch.Tensor | None:
        """Return the area fractions (N, K, 256, 256) float32 in [0, 1] of the masks with these names.

        None of images that are augmented, which none of these masks fits.
        """
        if self.augment_probability:
            return None
        if not hasattr(self, "_index"):
            self._index = {name: i for i, name in enumerate(self.pyramid.names)}
        indices = np.array([self._index[name] for name in names], dtype=np.int64)
        return self.pyramid.batch(FINEST, indices)[1].float().div_(255)

    def show(self, index: int):
        """Return a matplotlib figure of `self[index]`: image, outlines, each channel of the mask."""
        from scoring.figures import sample_figure

        sample = self[index]
        return sample_figure(sample["image"].numpy(), sample["mask"].numpy(), sample["name"], self.recipe.channel_names)

    def described(self) -> dict[str, str]:
        """Return split, images, size, channels and augmentation."""
        chance = self.augment_probability
        return {"split": self.split, "images": str(len(self)), "size": f"{self.target_size}x{self.target_size}",
                **self.recipe.described(), "augmented": f"with probability {chance:g}" if chance else "no",
                "decoded images": self.pyramid.kept, "folder": str(self.pyramid.pairs[0].image.parent)}


def _to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class _RawBatches(Dataset):
    """What worker processes serve: a request (resolution, indices) in, a raw batch of NumPy arrays out.

    Tensors would travel as file descriptors through a socket in the temporary folder, whose path must be short, and
    shared memory, of which a container may have little. Where either fails, torch waits for the batch for ever.
    """

    def __init__(self, dataset: PapSmearDataset):
        self.dataset = dataset

    def __getitem__(self, request: tuple[int, np.ndarray]) -> dict:
        try:
            return {key: np.asarray(value) for key, value in self.dataset.raw_batch(*request).items()}
        except UserError as error:  # torch would add the traceback of the worker
            return {"error": str(error)}


def _as_it_is(raw: dict) -> dict:
    return raw


def _as_tensors(raw: dict) -> dict:
    return raw | {key: torch.from_numpy(raw[key]) for key in ("image", "mask")}


class ProgressiveLoader(Described):
    """Yield batches `image` (N, C, S, S), `mask` (N, K, S, S) float32 in [0, 1] and `name` (list of N).

    A train loader shuffles and augments; the order is a function of (seed, resolution, epoch). Each pass is the next
    epoch unless `set_epoch` says which. No image is dropped, except that batch normalisation cannot use a last
    training batch of one. Of several processes (see system/processes.py) each gets its part of every batch,
    which may be empty. Workers make sense while files are decoded at every step; they stay for the next epoch
    of a train loader and leave when a loader of another resolution starts.
    """

    def __init__(self, dataset: PapSmearDataset, batch_size: int, num_workers: int = 0,
                 device: torch.device | str = "cpu", siblings: WeakSet | None = None):
        self.dataset, self.batch_size, self.num_workers, self.device = dataset, batch_size, num_workers, device
        self.training = dataset.split == "train"
        self.epoch = 0
        self._requests: list[tuple[int, np.ndarray]] = []
        self._workers: DataLoader | None = None
        # Weakly, as in a circle loaders would be collected some time later, when workers no longer hear that they end.
        self._siblings = siblings if siblings is not None else WeakSet()
        self._siblings.add(self)

    @property
    def recipe(self) -> DataRecipe:
        """Return what a network must know of the images of this split."""
        return self.dataset.recipe

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not (self.training and rest == 1 and full))

    def __iter__(self) -> Iterator[dict]:
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[dict]:
        """Yield the batches of a pass from number `first` on, without decoding those before it."""
        resolution, epoch = self.dataset.target_size, self.epoch
        self.epoch += 1
        order = np.arange(len(self.dataset))
        if self.training:
            np.random.default_rng([self.dataset.seed, resolution, epoch, 1]).shuffle(order)
        self._requests[:] = [(resolution, shard(order[i * self.batch_size:(i + 1) * self.batch_size]))
                             for i in range(first, len(self))]
        for raw in self._raw_batches():
            yield self.dataset.finished(raw, epoch, self.device)

    def described(self) -> dict[str, str]:
        """Return split, images, size and batches."""
        dataset = self.dataset
        return {"split": dataset.split, "images": str(len(dataset)),
                "size": f"{dataset.target_size}x{dataset.target_size}",
                "batches": f"{len(self)} of {self.batch_size}", "on": str(self.device)}

    def chosen(self, indices: np.ndarray, resolution: int) -> dict:
        """Return these images of the split at a resolution as one batch, in whichever process."""
        return self.dataset.finished(self.dataset.raw_batch(resolution, indices), self.epoch, self.device)

    def _raw_batches(self):
        for sibling in self._siblings:
            if sibling.dataset.target_size != self.dataset.target_size:
                sibling._workers = None
        if self.num_workers == 0:
            return (self.dataset.raw_batch(*request) for request in list(self._requests))
        if self._workers is None or not self.training:
            self._workers = DataLoader(_RawBatches(self.dataset), batch_size=None, sampler=self._requests,
                                       collate_fn=_as_it_is, num_workers=self.num_workers,
                                       persistent_workers=self.training, worker_init_fn=leave_signals_to_the_parent)
        return map(_as_tensors, self._answers(self._workers))

    @staticmethod
    def _answers(workers: DataLoader) -> Iterator[dict]:
        """Yield what workers send; what they refuse becomes an error of this process."""
        for answer in workers:
            if "error" in answer:
                raise ImageFileError(answer["error"])
            yield answer


def create_progressive_dataloaders(data_root="data", batch_sizes: dict[int, int] | None = None, in_channels: int = 1,
                                   out_channels: int = 1, use_augmented: bool = True, augment_probability: float = 0.5,
                                   num_workers: int = 0, cache_images: bool | None = None, seed: int = 0,
                                   device: torch.device | str = "cpu",
                                   pyramids: dict[str, ImagePyramid] | None = None,
                                   targets: tuple[str, ...] = MASK, augment_strength: float = 1.0,
                                   max_value: int = 0, mask_suffix: str = "",
                                   ) -> dict[int, tuple[ProgressiveLoader, ProgressiveLoader, ProgressiveLoader]]:
    """Make the train, valid and test loader of every resolution; all twelve share one decoded copy of the data.

    Args:
        batch_sizes: resolution -> images a batch; what is missing is 64, 32, 16 and 8 for 32, 64, 128 and 256.
        num_workers: processes that decode; none are started when images are cached.
        device: where batches are scaled, augmented and delivered.
        pyramids: the splits as already decoded (`images.pyramid.open_pyramids`); the arguments on files are then
            not used. For the others see PapSmearDataset.
    Returns:
        {32: (train, valid, test), 64: ..., 128: ..., 256: ...}
    Raises:
        DatasetError (a UserError) that lists every problem of all three splits.
    """
    sizes = DEFAULT_BATCH_SIZES | (batch_sizes or {})
    for resolution, size in sizes.items():
        if resolution not in RESOLUTIONS or not isinstance(size, int) or size < 1:
            raise UserError(f"batch_sizes has {resolution!r}: {size!r}; keys are {RESOLUTIONS}, values whole numbers "
                             f"of at least 1")
    if pyramids is None:
        pyramids = open_pyramids(data_root, in_channels, out_channels, use_augmented, cache_images, targets=targets,
                                 max_value=max_value, mask_suffix=mask_suffix)
    siblings: WeakSet[ProgressiveLoader] = WeakSet()

    def loader(split: str, resolution: int) -> ProgressiveLoader:
        dataset = PapSmearDataset(split=split, target_size=resolution, augment_probability=augment_probability,
                                  seed=seed, pyramid=pyramids[split], augment_strength=augment_strength)
        workers = 0 if pyramids[split].cached else num_workers
        return ProgressiveLoader(dataset, sizes[resolution], workers, device, siblings)

    return {r: (loader("train", r), loader("valid", r), loader("test", r)) for r in RESOLUTIONS}


@command(interrupted="nothing was written")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="pap_smear_dataset.py", description="Check a data set, or write a split without leakage.",
                    allow_abbrev=False)
    parser.add_argument("data_root", type=Path, metavar="DATA_ROOT")
    parser.add_argument("--group_regex", type=regex, metavar="REGEX",
                        help="finds the patient, slide or field of view in an image's name, e.g. '^[^_]+'")
    parser.add_argument("--write_splits", action="store_true", help="write splits.csv, as prepare_data.py split does")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the split (0)")
    parser.add_argument("--in_channels", type=int, choices=(1, 3), default=1, help="1 luminance, 3 RGB (1)")
    parser.add_argument("--out_channels", type=whole(1), default=1, help="classes of the masks (1)")
    args = parser.parse_args(argv)
    root, channels = args.data_root, (args.in_channels, args.out_channels)
    if args.write_splits:
        path, report = split_dataset(root, args.group_regex, args.seed, *channels)
        print(f"wrote {path}\n{report}")
    else:
        print(check_dataset(root, args.group_regex, *channels))


if __name__ == "__main__":
    sys.exit(main())
