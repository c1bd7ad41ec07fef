"""Deal the operations, or the time, of a run to its stages, in whole epochs."""

from collections.abc import Sequence

from system.errors import UserError
from system.options import LARGEST
from training.schedule import WORK

# Of the operations of a run, in per cent, dealt to stages 1 to 4: ahead of direct training on three data sets
# (docs/results.md). Where the object shows at 32 pixels, as a cell of Herlev does, 27, 5, 7, 61 is ahead of it.
SHARES: tuple[float, ...] = (5, 9, 34, 52)


def deal(budget: float, shares: Sequence[float] = SHARES, first: int = 1) -> tuple[int, ...]:
    """Deal operations to stages: return the epochs of each stage from `first` on, 0 where the share pays for none.

    Whole epochs are dealt from coarse to fine. What they leave of a share goes to the next finer stage, and what is
    left at the end to the finest stage that it pays an epoch of.

    Args:
        budget: in epochs at 256 pixels, whose operations the run has at most.
        shares: of the budget, for stages 1 to 4, in any unit; of stages below `first` they are left out.
    Raises:
        UserError: for a number that is negative or above LARGEST, and if nothing is left for an epoch at 256 pixels.
    """
    check_numbers("budget", budget, shares)
    wanted = {stage: share for stage, share in zip(WORK, shares, strict=True) if stage >= first}
    epochs = deal_work(budget * WORK[max(WORK)], wanted, WORK)
    if not epochs[max(epochs)]:
        dealt = f" with shares {', '.join(f'{share:g}' for share in shares)}" if len(epochs) > 1 else ""
        raise UserError(f"a budget of {budget:g}{dealt} leaves no epoch at 256 pixels. Take a larger budget"
                        + (", or a larger last share" if dealt else ""))
    return tuple(epochs.values())


def check_numbers(name: str, whole: float, shares: Sequence[float]) -> None:
    """Raise UserError unless what is dealt and its shares can be computed with: from 0 to LARGEST.

    Args:
        name: of what is dealt.
    """
    for value in (whole, *shares):
        if not 0 <= value <= LARGEST:
            raise UserError(f"{name} is {whole!r} and shares {', '.join(map(repr, shares))}; each must be a number "
                            f"from 0 to {LARGEST:g}")


def deal_work(whole: float, wanted: dict[int, float], costs: dict[int, float]) -> dict[int, int]:
    """Deal work to stages as `deal` does, in any unit: return stage -> epochs, perhaps none of the last.

    Args:
        whole: what there is, in the unit of the costs.
        wanted: stage -> its share of it, in another unit, from coarse to fine.
        costs: stage -> what an epoch takes.
    """
    total = sum(wanted.values()) or 1.0
    epochs, left = dict.fromkeys(wanted, 0), 0.0
    for stage, share in wanted.items():
        left += whole * share / total
        epochs[stage] = int(left / costs[stage] + 1e-9)  # a share of exactly two epochs is two epochs
        left -= epochs[stage] * costs[stage]
    for stage, share in reversed(wanted.items()):
        more = int(left / costs[stage] + 1e-9) if share else 0
        epochs[stage] += more
        left -= more * costs[stage]
    return epochs
