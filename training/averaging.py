"""An exponential moving average of the weights of a network that grows."""

import copy

import torch

from unet import LAST_STAGE, Network


class AveragedNetwork:
    """A copy of a network whose weights follow those of the original slowly, each part from its own birth.

    The decay of a part's update n, from 0, is min(decay, (1 + n) / (10 + n)): a young part follows quickly, so that its
    untrained start is soon forgotten, and a growth leaves the averages of older parts as they are. Running statistics
    of batch normalisation are those of the original; averaged or computed anew they bring nothing
    (docs/experiments.md).

    Args:
        model: the network in training.
        decay: in (0, 1), e.g. 0.99.
    """

    def __init__(self, model: Network, decay: float):
        self.network = copy.deepcopy(model)
        self.decay = decay
        self.updates = dict.fromkeys(range(1, LAST_STAGE + 1), 0)  # stage -> updates of the parts born there
        self._model = model
        self._weights = {}  # stage -> means and values of the parts born there
        for stage in set(model.parts().values()):
            born = [part for part, birth in model.parts().items() if birth == stage]
            self._weights[stage] = [[p for part in born for p in network.get_submodule(part).parameters()]
                                    for network in (self.network, model)]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the network after a step."""
        for stage, (means, values) in self._weights.items():
            if stage <= self._model.stage:
                n = self.updates[stage]
                torch._foreach_lerp_(means, values, 1 - min(self.decay, (1 + n) / (10 + n)))
                self.updates[stage] = n + 1
        for mean, value in zip(self.network.buffers(), self._model.buffers(), strict=True):
            mean.copy_(value)

    def state(self) -> dict:
        """Return what `load` takes, as plain types and tensors."""
        return {"model": self.network.state_dict(), "updates": dict(self.updates)}

    def load(self, state: dict) -> None:
        """Continue from a state."""
        self.network.load_state_dict(state["model"])
        self.updates = dict(state["updates"])
