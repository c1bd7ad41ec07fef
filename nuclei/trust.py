"""Tell from a network's own answers to an image how far it can be trusted: they agree where it is sure.

The network answers at each scale of its decoder and, with flips and turns or several checkpoints, in several ways. A
number near 1 says that all answers give the predicted mask, and clearly; a low one that they waver or differ. Compared
on Herlev, agreement of the scales alone went less with Dice (docs/experiments.md).
"""

import numpy as np
import torch


class Agreement:
    """Add up how much answers agree with the predicted mask, part of an image after part.

    Agreement is 2 sum(p m) / (sum(p) + sum(m)) of probabilities p and the mask m, the Dice of the mask that is to be
    expected if each probability is right: 1 for probabilities of 0 and 1 that are the mask, 0 for those that miss it.
    """

    def __init__(self):
        self._sums: dict[str, dict[int, np.ndarray]] = {}  # kind -> which answer of it -> sums (3, K)

    def add(self, kind: str, number: int, probability: torch.Tensor, mask: torch.Tensor) -> None:
        """Add a part of an image.

        Args:
            kind: of answers; all kinds count alike, however many answers of it there are.
            number: which answer of its kind.
            probability: (N, K, H, W) floating point in [0, 1].
            mask: (N, K, H, W) bool, the same for all answers.
        """
        probability, drawn = probability.float(), mask.float()
        sums = torch.stack([part.sum((0, 2, 3)) for part in (probability * drawn, probability, drawn)])
        of_kind = self._sums.setdefault(kind, {})
        of_kind[number] = of_kind.get(number, 0) + sums.double().cpu().numpy()

    def trust(self) -> float | None:
        """Return the mean agreement in [0, 1] over answers and classes, then over kinds.

        A class that is nowhere in the mask does not count; None if none is.
        """
        kinds = []
        for answers in self._sums.values():
            both, probability, mask = np.stack(list(answers.values()), axis=1)
            there = mask > 0
            if there.any():
                kinds.append((2 * both[there] / (probability + mask)[there]).mean())
        return float(np.mean(kinds)) if kinds else None
