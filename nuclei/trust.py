"""Tell from a network's own answers to an image how far it can be trusted: they agree where it is sure.

The network answers at each scale of its decoder and, with flips and turns or several checkpoints, in several ways. A
number near 1 says that all answers are alike, a low one that they are not; it is no probability of being right.
"""

import numpy as np
import torch


class Agreement:
    """Add up how much pairs of answers agree, part of an image after part.

    Agreement is 2 sum(p q) / (sum(p^2) + sum(q^2)), the soft Dice of Milletari et al. 2016 of two probability maps: 1
    for equal ones, 0 for those that share nothing.
    """

    def __init__(self):
        self._sums: dict[str, dict[int, np.ndarray]] = {}  # kind -> which answer of it -> sums (2, K)

    def add(self, kind: str, number: int, one: torch.Tensor, other: torch.Tensor) -> None:
        """Add a part of an image.

        Args:
            kind: of answers; all kinds count alike, however many answers of it there are.
            number: which answer of its kind.
            one, other: (N, K, H, W) probabilities in [0, 1].
        """
        both, squares = (one * other).sum((0, 2, 3)), (one.square() + other.square()).sum((0, 2, 3))
        sums = torch.stack([2 * both, squares]).double().cpu().numpy()
        of_kind = self._sums.setdefault(kind, {})
        of_kind[number] = of_kind.get(number, 0) + sums

    def trust(self) -> float | None:
        """Return the mean agreement in [0, 1] over answers and classes, then over kinds; None without two answers."""
        if not self._sums:
            return None
        kinds = []
        for answers in self._sums.values():
            both, squares = np.stack(list(answers.values()), axis=1)
            kinds.append(np.divide(both, squares, out=np.ones_like(both), where=squares > 0).mean())
        return float(np.clip(np.mean(kinds), 0, 1))
