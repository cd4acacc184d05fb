"""What an episode is worth: rewards of its text, scaled, weighted and summed.

    total = Σ_r weight_r / scale_r * reward_r         a reward without an opinion (NaN) counts 0

Shapes: N episodes, R rewards.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mara_fast.outputs import Generation
from mara_fast.rewards import Rewards
from mara_train.prompts import columns_of


class Objective:
    """Scores generations.

    Args:
        rewards: the reward functions and their weights.
    """

    def __init__(self, rewards: Rewards) -> None:
        self.rewards = rewards
        self.scales = [1.0] * len(rewards.names)
        """Divide the rewards; 1 until :meth:`fit_scales`."""

    @property
    def weights(self) -> Sequence[float]:
        """One per reward."""
        return self.rewards.weights

    def score(
        self, rows: Sequence[Mapping[str, Any]], generations: Sequence[Generation]
    ) -> dict[str, Tensor]:
        """Rewards by name, float [N], of the answers to the prompts of the rows."""
        columns: dict[str, Any] = columns_of(rows)
        scores = self.rewards.score(
            [row["prompt"] for row in rows],
            [generation.text for generation in generations],
            **columns,
        )
        return scores.by_name

    def total(self, table: Tensor) -> Tensor:
        """Sums of rewards [R, N]; float64 [N]."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        scales = torch.tensor(self.scales, dtype=torch.float64)
        return ((weights / scales)[:, None] * table).nansum(0)

    def fit_scales(self, table: Tensor) -> None:
        """Scales are the standard deviations of rewards [R, N] from now on; 1 for one that has
        none."""
        self.scales = []
        for values in table:
            known = values[~values.isnan()]
            spread = float(known.std(correction=0)) if len(known) else 0.0
            self.scales.append(spread if spread > 0 else 1.0)
