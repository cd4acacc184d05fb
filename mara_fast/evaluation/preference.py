"""Preference rate between two sets of answers to the same prompts (MARA Eq. 12).

    a pair is won   where every reward is better, lost where every one is worse, else tied
    rate            = (won - lost) / (won + tied + lost)

Of a reward and a cost model that is: higher reward and lower cost. The paper does not say when a
pair is won; its tables fit this. A reward that has no opinion (NaN) on one of the two answers
abstains from the pair; a pair from which all abstain is tied.

Shapes: N prompts, R rewards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def preference_rate(ours: Tensor, theirs: Tensor, weights: Sequence[float]) -> float:
    """The rate of ours over theirs, in [-1, 1]; arguments as those of :func:`outcomes`."""
    return float(outcomes(ours, theirs, weights).double().mean())


def outcomes(ours: Tensor, theirs: Tensor, weights: Sequence[float]) -> Tensor:
    """How each pair ends: 1 won, 0 tied, -1 lost.

    Args:
        ours, theirs: float [R, N], rewards before their weights; NaN is no opinion.
        weights: R numbers whose signs say which way is better; a weight of 0 leaves one out.

    Returns:
        int64 [N]

    Raises:
        ValueError: no prompts, or shapes that do not go together.
    """
    if ours.shape != theirs.shape or ours.ndim != 2 or len(weights) != len(ours):
        raise ValueError(
            f"ours is {tuple(ours.shape)}, theirs {tuple(theirs.shape)}, with {len(weights)} "
            "weights; expected [rewards, prompts] twice and one weight to each reward"
        )
    if not ours.shape[1]:
        raise ValueError("there are no prompts to compare the answers of")
    sign = torch.tensor([float((w > 0) - (w < 0)) for w in weights], dtype=ours.dtype).to(
        ours.device
    )
    difference = ((ours - theirs) * sign[:, None])[sign != 0]  # [R counted, N]
    abstains = difference.isnan()
    is_judged = ~abstains.all(0)
    won = ((difference > 0) | abstains).all(0) & is_judged
    lost = ((difference < 0) | abstains).all(0) & is_judged
    return won.long() - lost.long()
