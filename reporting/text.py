"""Numbers in words."""

import math

LABELS = {"dice": "Dice", "iou": "IoU", "boundary_f1": "boundary F1", "aji": "AJI", "pq": "PQ", "dq": "DQ", "sq": "SQ",
          "f1": "F1"}


def label(name: str) -> str:
    """Return the name of a measure as one writes it.

    >>> label("dice"), label("dice_2"), label("recall")
    ('Dice', 'Dice of class 2', 'recall')
    """
    if name.startswith("dice_"):
        return f"Dice of class {name.removeprefix('dice_')}"
    return LABELS.get(name, name)


def score(value: float) -> str:
    """Return a measure in [0, 1] with three digits.

    >>> score(0.95449), score(float("nan"))
    ('0.954', '–')
    """
    return f"{value:.3f}" if math.isfinite(value) else "–"


def number(value: float) -> str:
    """Return a number with three significant digits and no exponent where it can be read without.

    >>> number(0.00123), number(12345.6), number(2e-5), number(12.0)
    ('0.00123', '12346', '2e-05', '12')
    """
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def of(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> of(1, "epoch"), of(12, "epoch")
    ('1 epoch', '12 epochs')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"
