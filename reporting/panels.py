"""Images with their predictions, as the templates show them: photographs once, and over them what differs."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from reporting.pictures import error_map, grey, outline_path, photo, pixel_errors
from reporting.runs import Survey
from reporting.text import class_name, score
from scoring.cases import Case
from system.text import shown
from unet import STAGE_RESOLUTIONS


@dataclass
class Prediction:
    """What weights made of an image.

    Attributes:
        title: which weights.
        dice: of the whole image; of several classes that of this one, in the part that is shown.
        probability, errors: data URIs.
        path: outlines, the `d` of an SVG path.
        missed, extra: pixels.
    """

    title: str
    dice: float
    probability: str
    errors: str
    path: str
    missed: int
    extra: int


@dataclass
class Panels:
    """An image with one class of its mask.

    Attributes:
        key: of the photograph within a page.
        width, height: in pixels.
        photo: data URI.
        path: what was drawn, the `d` of an SVG path.
        of_classes: what its Dice is the mean of, in words; empty where there is one class.
    """

    name: str
    key: str
    width: int
    height: int
    photo: str
    path: str
    predictions: list[Prediction]
    of_classes: str = ""

    @classmethod
    def of_case(cls, case: Case, predictions: list[Prediction], channel: int = 0,
                names: Sequence[str] = ()) -> "Panels":
        """Return the panels of one class of an image; `names` are those of the classes, where they are known."""
        uri, several = photo(case.image), len(case.masks) > 1
        name = shown(case.name) + (f", {class_name(channel, names)}" if several else "")
        key = hashlib.blake2b(f"{name} {uri}".encode(), digest_size=6).hexdigest()
        height, width = case.image.shape[:2]
        return cls(name, f"photo-{key}", width, height, uri, outline_path(case.masks[channel]), predictions,
                   f"mean of the classes {score(case.dice)}" if several else "")

    @property
    def last(self) -> Prediction:
        """Return the latest prediction."""
        return self.predictions[-1]


def example_panels(surveys: dict[int, Survey], names: Sequence[str] = ()) -> list[Panels]:
    """Return the examples of the validation images, each (and each of its classes) with a prediction a stage."""
    if not surveys:
        return []
    result = []
    for i, case in enumerate(surveys[max(surveys)].cases):
        same = {stage: survey.cases[i] for stage, survey in surveys.items()
                if i < len(survey.cases) and survey.cases[i].name == case.name}
        for channel in range(len(case.masks)):
            side = {stage: f"{STAGE_RESOLUTIONS[stage]}×{STAGE_RESOLUTIONS[stage]}" for stage in same}
            result.append(Panels.of_case(case, [
                predicted(found, surveys[stage].threshold, f"stage {stage}, {side[stage]}", channel)
                for stage, found in same.items()], channel, names))
    return result


def case_panels(cases: Sequence[Case], threshold: float, names: Sequence[str] = ()) -> list[Panels]:
    """Return images, and each of their classes, with their predictions."""
    return [Panels.of_case(case, [predicted(case, threshold, "probability", channel)], channel, names)
            for case in cases for channel in range(len(case.masks))]


def predicted(case: Case, threshold: float, title: str, channel: int = 0) -> Prediction:
    """Return what weights made of one class of an image."""
    found = case.found(threshold)[channel]
    return Prediction(title, case.dice_of(channel, threshold), grey(case.probability[channel]),
                      error_map(case.masks[channel], found), outline_path(found),
                      *pixel_errors(case, threshold, channel))
