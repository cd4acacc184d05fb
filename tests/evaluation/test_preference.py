"""The preference rate against a count by hand of every pair."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mara_fast.evaluation.preference import preference_rate

opinion = st.sampled_from([-1.0, 0.0, 1.0, math.nan])


def by_hand(ours: list[list[float]], theirs: list[list[float]], weights: list[float]) -> float:
    score = 0
    for pair in range(len(ours[0])):
        verdicts = []
        for reward, weight in enumerate(weights):
            one, other = ours[reward][pair], theirs[reward][pair]
            if weight and not math.isnan(one) and not math.isnan(other):
                verdicts.append(math.copysign(1, weight) * (one - other))
        if verdicts and all(verdict > 0 for verdict in verdicts):
            score += 1
        if verdicts and all(verdict < 0 for verdict in verdicts):
            score -= 1
    return score / len(ours[0])


@given(st.data(), st.integers(1, 3), st.integers(1, 6))
def test_equals_the_count(data: st.DataObject, num_rewards: int, num_prompts: int) -> None:
    row = st.lists(opinion, min_size=num_prompts, max_size=num_prompts)
    table = st.lists(row, min_size=num_rewards, max_size=num_rewards)
    ours, theirs = data.draw(table), data.draw(table)
    weight = st.sampled_from([1.0, -2.0, 0.0])
    weights = data.draw(st.lists(weight, min_size=num_rewards, max_size=num_rewards))
    rates = [
        preference_rate(torch.tensor(a), torch.tensor(b), weights)
        for a, b in ((ours, theirs), (theirs, ours))
    ]
    assert rates[0] == by_hand(ours, theirs, weights) == -rates[1]


def test_a_reward_and_a_cost() -> None:
    # won, lost, tied (both higher), tied (equal reward), won by the only opinion, no opinion
    nan = math.nan
    ours = torch.tensor([[2.0, 0.0, 2.0, 1.0, 2.0, nan], [0.0, 2.0, 2.0, 0.0, nan, nan]])
    theirs = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert preference_rate(ours, theirs, (1.0, -1.0)) == 1 / 6
    assert preference_rate(ours, theirs, (1.0, 0.0)) == 2 / 6
    assert preference_rate(ours, theirs, (0.0, 0.0)) == 0


def test_refusals() -> None:
    table = torch.zeros(2, 3)
    for one, other, weights in (
        (table, torch.zeros(2, 1), (1, 1)),
        (table, table, (1,)),
        (table[0], table[0], (1, 1)),
    ):
        with pytest.raises(ValueError, match=r"expected \[rewards, prompts\] twice and one weight"):
            preference_rate(one, other, weights)
    with pytest.raises(ValueError, match="no prompts to compare"):
        preference_rate(torch.zeros(2, 0), torch.zeros(2, 0), (1, 1))
