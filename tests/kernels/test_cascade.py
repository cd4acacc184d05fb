"""The cascade against a plain loop, in windows of every width; Philox against NumPy."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

import oracle
from mara_kernels.cascade import (
    ACCEPTANCES,
    FALLBACKS,
    ORDERS,
    STRATEGIES,
    CascadeRule,
    Held,
    acceptance_uniforms,
    cascade,
    philox_words,
    rank_of_tried,
)


def decide_in_windows(
    d_by_rank: list[float],
    rule: CascadeRule,
    window: int,
    sequence: int,
    position: int,
    counts: Sequence[int] | None = None,
) -> tuple[int, bool, int]:
    """Index tried, verdict and windows used for one position, in windows of so many candidates."""
    size = len(d_by_rank)
    held = Held.empty(1, "cpu")
    best, offset = -1, 0
    for used in itertools.count(1):
        tried = torch.arange(offset, offset + window)
        count = window if counts is None else counts[used % len(counts)]
        rank = rank_of_tried(tried, torch.tensor(size), rule.order)
        # Rows past the set hold garbage.
        d = [
            d_by_rank[int(r)] if int(t) < min(size, offset + count) else math.nan
            for t, r in zip(tried, rank, strict=True)
        ]
        decision = cascade(
            torch.tensor([d]),
            offset=torch.tensor([offset]),
            size=torch.tensor([size]),
            held=held,
            rule=rule,
            sequence=torch.tensor([sequence]),
            position=torch.tensor([position]),
            count=None if counts is None else torch.tensor([count]),
        )
        assert not decision.invalid
        held = decision.held
        if decision.row >= 0:
            best = offset + int(decision.row)
        if decision.decided:
            return best, bool(held.accepted), used
        offset += count


def decide_by_loop(
    d_by_rank: list[float], rule: CascadeRule, sequence: int, position: int
) -> tuple[int, bool]:
    """The same by the words of the definition."""
    size = len(d_by_rank)
    ranks = oracle.ranks_tried(size, rule.order)
    accepted, keys = [], []
    for rank in ranks:
        words = oracle.uniform_words(rule.seed, sequence, position, rank)
        d = torch.tensor(d_by_rank[rank])
        if rule.acceptance == "greedy":
            accepted.append(bool(d > rule.threshold_logit))
        else:
            draw = torch.tensor(words[0] * 2.0**-24)
            accepted.append(bool(draw < torch.sigmoid(d - rule.threshold_logit)))
        keys.append(words[1])
    tried_accepted = [i for i in range(size) if accepted[i]]
    by_d = lambda i: d_by_rank[ranks[i]]  # noqa: E731
    if size == 1:
        return 0, True
    if tried_accepted:
        pick = {"first": min, "max_prob": lambda t: max(t, key=by_d)}.get(rule.strategy)
        if pick is None:
            return max(tried_accepted, key=lambda i: keys[i]), True
        return pick(tried_accepted), True
    everyone = range(size)
    last_first = {"last": size - 1, "first": 0, "max_prob": max(everyone, key=by_d)}
    return last_first[rule.fallback], False


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_rule_in_every_window(
    acceptance: str, strategy: str, fallback: str, order: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(12):
        size = int(torch.randint(1, 9, (), generator=generator))
        mean = -3.0 if case % 2 else 0.0
        d = (2 * torch.randn(size, generator=generator) + mean).round(decimals=case % 3).tolist()
        rule = CascadeRule(
            acceptance=acceptance,
            strategy=strategy,
            fallback=fallback,
            order=order,
            threshold=(0.5, 0.3)[case % 2],
            seed=2**63 + case,
        )
        expected = decide_by_loop(d, rule, sequence=2**40 + case, position=case)
        for window in (1, 2, 3, 8, 40):
            *decision, used = decide_in_windows(d, rule, window, 2**40 + case, case)
            assert tuple(decision) == expected
            examined = expected[0] + 1 if strategy == "first" and expected[1] else size
            assert used == -(-examined // window)
        for counts in ((1,), (0, 3, 1), (4, 2), (2, 0)):
            *decision, _ = decide_in_windows(d, rule, 4, 2**40 + case, case, counts)
            assert tuple(decision) == expected


def test_acceptance_is_strict() -> None:
    """d = 0 is not above probability one half."""
    best, accepted, _ = decide_in_windows([0.0, 0.0, 1e-30], CascadeRule(), 1, 0, 0)
    assert (best, accepted) == (2, True)


def test_idle_slots_decide_nothing() -> None:
    zeros = torch.zeros(2, dtype=torch.int64)
    decision = cascade(
        torch.full((2, 3), 5.0),
        offset=torch.tensor([0, 4]),
        size=torch.tensor([0, 4]),
        held=Held.empty(2, "cpu"),
        rule=CascadeRule(),
        sequence=zeros,
        position=zeros,
    )
    assert decision.row.tolist() == [-1, -1] and not decision.decided.any()


@pytest.mark.parametrize(
    ("d", "size", "invalid"),
    [
        ([math.nan, 1.0, 1.0], 3, True),
        ([-1.0, math.nan, 1.0], 3, True),
        ([1.0, math.nan, math.nan], 3, False),
        ([-1.0, -1.0, math.nan], 2, False),
        ([math.nan, 0.0, 0.0], 1, False),
    ],
)
def test_nan_is_invalid_only_where_it_is_asked(d: list[float], size: int, invalid: bool) -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    decision = cascade(
        torch.tensor([d]),
        offset=zero,
        size=torch.tensor([size]),
        held=Held.empty(1, "cpu"),
        rule=CascadeRule(),
        sequence=zero,
        position=zero,
    )
    assert bool(decision.invalid) == invalid


def test_selection_distribution() -> None:
    """Eq. 6, in one window and in two: log-probabilities, and the residual of rejecting all."""
    d = torch.tensor([[1.5, -40.0, 0.3, 60.0, -2.0]])
    accept = torch.sigmoid(d[0].double())
    reject = torch.sigmoid(-d[0].double())
    expected = [accept[k] * reject[:k].prod() for k in range(5)]
    zero = torch.zeros(1, dtype=torch.int64)
    common = {
        "size": torch.tensor([5]),
        "rule": CascadeRule(strategy="max_prob"),
        "sequence": zero,
        "position": zero,
    }
    whole = cascade(d, offset=zero, held=Held.empty(1, "cpu"), **common)
    first = cascade(d[:, :2], offset=zero, held=Held.empty(1, "cpu"), **common)
    second = cascade(d[:, 2:], offset=zero + 2, held=first.held, **common)
    for log_prob in (whole.log_prob, torch.cat((first.log_prob, second.log_prob), dim=1)):
        torch.testing.assert_close(
            log_prob[0].double(), torch.stack(expected).log(), atol=1e-5, rtol=1e-6
        )
    for decision in (whole, second):
        residual = decision.held.log_residual.double()
        torch.testing.assert_close(residual[0], reject.log().sum(), atol=1e-5, rtol=1e-6)


def test_philox_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        draw = lambda bits: int(torch.randint(2**bits, (), generator=generator))  # noqa: E731
        seed = draw(62) * 4 + draw(2)
        sequence, position, rank = draw(62), draw(31), draw(10)
        words = philox_words(
            seed, torch.tensor(sequence), torch.tensor(position), torch.tensor(rank)
        )
        counter = (rank, position, sequence & 0xFFFFFFFF, sequence >> 32)
        key = (seed & 0xFFFFFFFF, seed >> 32)
        assert tuple(words.tolist()) == oracle.philox4x32(counter, key)


def test_uniforms_look_uniform() -> None:
    draws, keys = acceptance_uniforms(
        3, torch.arange(400)[:, None], torch.arange(50), torch.tensor(7)
    )
    for u in (draws, keys):
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.005
    correlation = torch.corrcoef(torch.stack((draws.flatten(), keys.flatten())))[0, 1]
    assert abs(correlation) < 0.03
