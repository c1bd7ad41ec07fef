"""An exponential moving average of the weights of a network that grows."""

import copy

import torch

from unet import LAST_STAGE, Network


class AveragedNetwork:
    """A copy of a network whose weights follow those of the original slowly, each part from its own birth.

    The decay of a part's n-th update is min(decay, (1 + n) / (10 + n)): a young part follows quickly, so that its
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

    @torch.no_grad()
    def update(self, model: Network) -> None:
        """Follow the network after a step."""
        parts = model.parts()
        for stage in (stage for stage in self.updates if stage <= model.stage):
            born = [part for part in parts if parts[part] == stage]
            n, self.updates[stage] = self.updates[stage], self.updates[stage] + 1
            means, values = ([p for part in born for p in network.get_submodule(part).parameters()]
                             for network in (self.network, model))
            if means:
                torch._foreach_lerp_(means, values, 1 - min(self.decay, (1 + n) / (10 + n)))
        for mean, value in zip(self.network.buffers(), model.buffers(), strict=True):
            mean.copy_(value)

    def state(self) -> dict:
        """Return what `load` takes, as plain types and tensors."""
        return {"model": self.network.state_dict(), "updates": dict(self.updates)}

    def load(self, state: dict) -> None:
        """Continue from a state."""
        self.network.load_state_dict(state["model"])
        self.updates = dict(state["updates"])
