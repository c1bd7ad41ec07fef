"""The data recipe: what a network must know of its data, as one frozen object.

It is made when a data set is read and carried by loaders, trainer, checkpoint and Predictor. Nothing here imports
numpy or torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from system.errors import UserError

SIZINGS = ("resize", "tile")
MASK, MASK_AND_BOUNDARY = ("mask",), ("mask", "boundary")
TARGETS = (MASK, MASK_AND_BOUNDARY)
CELL = ("nucleus", "cytoplasm")  # names of two classes that make cells
YOUNG = {"max_value", "microns_per_pixel", "class_names"}  # fields that older checkpoints lack
LARGEST_VALUE = 2 ** 32 - 1  # of a pixel in the files that are read
MAX_VALUE_RULE = f"a whole number from 0 to {LARGEST_VALUE}"
COARSEST = 1e6  # micrometres a pixel, beyond which the squares of it say nothing
PIXEL_SIZE_RULE = f"0, or a number from {1 / COARSEST:g} to {COARSEST:g}"
NAMES_RULE = "all different, without line breaks and other characters that cannot be printed"


@dataclass(frozen=True)
class DataRecipe:
    """What a network must know of its data.

    Attributes:
        sizing: 'resize': the whole image becomes 256x256, logits go back to the original size; 'tile': native scale.
        targets: what the channels of a mask are: ('mask',), one channel a class, or ('mask', 'boundary'), one more, the
            last, for the rims of nuclei (see targets.py).
        in_channels: of the images, 1 for luminance or 3 for RGB.
        classes: of the masks; 1 for a binary mask.
        mean, std: of the images that were read, a number a channel on the scale [0, 1]; empty until they are known. A
            network, and its checkpoint, has those of its training images.
        training_ranges: name -> (low, high) of what describes the training images (see familiarity.py).
        max_value: what is white in images of more than 8 bit and of floating point, e.g. 4095 for a camera of 12 bit;
            0 for the largest number of their type, or 1.0.
        microns_per_pixel: of the images as they are in their files; 0 where it is not known.
        class_names: of the classes in their order; empty where the data set does not tell.
    """

    sizing: str = "resize"
    targets: tuple[str, ...] = MASK
    in_channels: int = 1
    classes: int = 1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    training_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    max_value: int = 0
    microns_per_pixel: float = 0.0
    class_names: tuple[str, ...] = ()

    def __post_init__(self):
        for name, known in (("sizing", SIZINGS), ("targets", TARGETS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of "
                                f"{' and '.join(map(repr, known))}")
        for name, holds, rule in (
                ("in_channels", type(self.in_channels) is int and self.in_channels > 0, "a whole number of at least 1"),
                ("classes", type(self.classes) is int and self.classes > 0, "a whole number of at least 1"),
                ("max_value", is_max_value(self.max_value), MAX_VALUE_RULE),
                ("microns_per_pixel", is_pixel_size(self.microns_per_pixel), PIXEL_SIZE_RULE),
                ("class_names", not self.class_names or len(self.class_names) == self.classes
                 and are_class_names(self.class_names), f"a name a class, here {self.classes}, {NAMES_RULE}"),
                ("mean", all(map(_finite, self.mean)), "finite numbers"),
                ("std", all(_finite(value) and value > 0 for value in self.std), "finite numbers above 0"),
                ("training_ranges", all(len(bounds) == 2 and all(map(_finite, bounds)) and bounds[0] <= bounds[1]
                                        for bounds in self.training_ranges.values()),
                 "the lowest and the highest number by name")):
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {rule}")
        if not len(self.mean) == len(self.std) or self.mean and len(self.mean) != self.in_channels:
            raise UserError(f"mean is {self.mean} and std {self.std}; each must have one number a channel, here "
                            f"{self.in_channels}")

    @property
    def target_channels(self) -> int:
        """Return how many channels a mask has: one a class, and one for the boundary if it is a target."""
        return self.classes + ("boundary" in self.targets)

    @property
    def channel_names(self) -> list[str]:
        """Return what each channel of a mask is, in a word."""
        numbered = [f"class {k + 1}" for k in range(self.classes)] if self.classes > 1 else ["mask"]
        classes = list(self.class_names) or numbered
        return classes + ["boundary"] * ("boundary" in self.targets)

    def described(self) -> dict[str, str]:
        """Return what the channels and the sizing are, in words."""
        return {"image": "RGB" if self.in_channels == 3 else "grey", "mask": ", ".join(self.channel_names),
                "sizing": self.sizing}

    @property
    def has_cytoplasm(self) -> bool:
        """Tell whether the classes are nucleus and cytoplasm, the nucleus first."""
        return self.class_names == CELL

    def check_agreement(self, other: "DataRecipe", this: str, that: str) -> None:
        """Raise UserError with the first field in which two recipes for one network differ.

        Mean, standard deviation and ranges may differ: each network has those of its own training images.

        Args:
            this, that: what the two belong to, for the message.
        """
        for name in ("sizing", "targets", "in_channels", "classes", "max_value"):
            if getattr(self, name) != getattr(other, name):
                raise UserError(f"{this}: {name} is {getattr(self, name)!r}, but {getattr(other, name)!r} in {that}; "
                                f"they must agree in it")
        if self.class_names and other.class_names and self.class_names != other.class_names:
            raise UserError(f"{this}: its classes are {', '.join(self.class_names)}, those of {that} "
                            f"{', '.join(other.class_names)}; they must be the same in the same order")


def is_max_value(value) -> bool:
    """Tell whether a value can be what is white in images of more than 8 bit, or 0 for the largest of their type."""
    return type(value) is int and 0 <= value <= LARGEST_VALUE


def is_pixel_size(value) -> bool:
    """Tell whether a value can be the micrometres of a pixel, or 0 where they are not known."""
    return _finite(value) and (value == 0 or 1 / COARSEST <= value <= COARSEST)


def are_class_names(value) -> bool:
    """Tell whether these are names of classes that can be told apart and printed."""
    return isinstance(value, list | tuple) and len(set(map(str, value))) == len(value) and \
        all(type(name) is str and name and name.isprintable() for name in value)


def _finite(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def recipe_from_plain(stored: Mapping) -> DataRecipe:
    """Return the recipe of a dictionary that `dataclasses.asdict` made; raises UserError for any other content."""
    names = {f.name for f in fields(DataRecipe)}
    if not isinstance(stored, Mapping) or not names - YOUNG <= set(stored) <= names:
        found = ", ".join(map(str, stored)) if isinstance(stored, Mapping) else repr(stored)
        raise UserError(f"its data recipe has {found}; expected: {', '.join(sorted(names))}")
    lists = {name: stored.get(name, ()) for name in ("targets", "mean", "std", "class_names")}
    for name, value in lists.items():
        if not isinstance(value, list | tuple):
            raise UserError(f"{name} is {value!r}; it must be a list")
    ranges = {name: tuple(bounds) for name, bounds in stored["training_ranges"].items()}
    return DataRecipe(**stored | {name: tuple(value) for name, value in lists.items()} | {"training_ranges": ranges})
