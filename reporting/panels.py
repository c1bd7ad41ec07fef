"""Images with their predictions, as the templates show them: photographs once, and over them what differs."""

import hashlib
from dataclasses import dataclass

from reporting.pictures import error_map, grey, outline_path, photo, pixel_errors
from reporting.runs import Survey
from scoring.cases import Case
from system.text import shown
from unet import STAGE_RESOLUTIONS


@dataclass
class Prediction:
    """What weights made of an image.

    Attributes:
        title: which weights.
        dice: of the whole image.
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
    """

    name: str
    key: str
    width: int
    height: int
    photo: str
    path: str
    predictions: list[Prediction]

    @classmethod
    def of_case(cls, case: Case, predictions: list[Prediction], channel: int = 0) -> "Panels":
        """Return the panels of one class of an image."""
        uri = photo(case.image)
        name = shown(case.name) + (f", class {channel + 1}" if len(case.masks) > 1 else "")
        key = hashlib.blake2b(f"{name} {uri}".encode(), digest_size=6).hexdigest()
        height, width = case.image.shape[:2]
        return cls(name, f"photo-{key}", width, height, uri, outline_path(case.masks[channel]), predictions)

    @property
    def last(self) -> Prediction:
        """Return the latest prediction."""
        return self.predictions[-1]


def example_panels(surveys: dict[int, Survey]) -> list[Panels]:
    """Return the examples of the validation images, each with a prediction a stage."""
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
                for stage, found in same.items()], channel))
    return result


def case_panels(case: Case, threshold: float) -> Panels:
    """Return an image with its prediction, of several classes the first."""
    return Panels.of_case(case, [predicted(case, threshold, "probability")])


def predicted(case: Case, threshold: float, title: str, channel: int = 0) -> Prediction:
    """Return what weights made of one class of an image."""
    found = case.found(threshold)[channel]
    return Prediction(title, case.dice, grey(case.probability[channel]), error_map(case.masks[channel], found),
                      outline_path(found), *pixel_errors(case, threshold, channel))
