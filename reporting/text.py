"""Numbers in words."""

import math
from collections.abc import Sequence

LABELS = {"dice": "Dice", "iou": "IoU", "boundary_f1": "boundary F1", "aji": "AJI", "pq": "PQ", "dq": "DQ", "sq": "SQ",
          "f1": "F1"}


def class_name(channel: int, names: Sequence[str] = ()) -> str:
    """Return what a class is called, counted from 0; `names` may be empty.

    >>> class_name(1, ("nucleus", "cytoplasm")), class_name(1)
    ('cytoplasm', 'class 2')
    """
    return names[channel] if channel < len(names) else f"class {channel + 1}"


def label(name: str, names: Sequence[str] = ()) -> str:
    """Return the name of a measure as one writes it; `names` are those of the classes, where they are known.

    >>> label("dice"), label("dice_2"), label("dice_2", ("nucleus", "cytoplasm")), label("recall"), label("dice_x")
    ('Dice', 'Dice of class 2', 'Dice of cytoplasm', 'recall', 'dice_x')
    """
    channel = name.removeprefix("dice_")
    if channel != name and channel.isdecimal():
        return f"Dice of {class_name(int(channel) - 1, names)}"
    return LABELS.get(name, name)


def score(value: float) -> str:
    """Return a measure in [0, 1] with three digits.

    >>> score(0.95449), score(float("nan"))
    ('0.954', '–')
    """
    return f"{value:.3f}" if math.isfinite(value) else "–"


def probability(value: float) -> str:
    """Return a probability, such as that of a test, with four digits; what is smaller is not called nothing.

    >>> probability(0.04217), probability(0.00001)
    ('0.0422', '< 0.0001')
    """
    return f"{value:.4f}" if not value < 0.0001 else "< 0.0001"


def number(value: float) -> str:
    """Return a number with three significant digits and no exponent where it can be read without.

    >>> number(0.00123), number(12345.6), number(2e-5), number(12.0)
    ('0.00123', '12346', '2e-05', '12')
    """
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
