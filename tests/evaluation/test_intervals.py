"""Intervals and the sign test against what they are defined by."""

import itertools
import math
import time

import numpy as np
import pytest

from mara_fast.evaluation.intervals import bootstrap_interval, sign_test


def test_the_interval_is_that_of_resampled_prompts() -> None:
    ends = np.array([1] * 50 + [0] * 30 + [-1] * 20)
    generator = np.random.default_rng(1)
    rates = [generator.choice(ends, len(ends)).mean() for _ in range(20_000)]
    found = bootstrap_interval(50, 30, 20)
    assert found == pytest.approx(np.quantile(rates, [0.025, 0.975]), abs=0.011)
    assert found == bootstrap_interval(50, 30, 20)
    assert bootstrap_interval(7, 0, 0) == (1, 1)


def test_the_interval_covers_what_it_should() -> None:
    """The true rate lies in 95 % of the intervals, give or take."""
    generator = np.random.default_rng(0)
    shares = [0.5, 0.3, 0.2]
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(*map(int, generator.multinomial(200, shares)))
        covered += low <= 0.3 <= high
    assert 0.91 <= covered / 300 <= 0.985


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (3, 1), (5, 5), (2, 8)])
def test_the_sign_test_counts_all_outcomes(won: int, lost: int) -> None:
    total = won + lost
    uneven = abs(won - lost)
    outcomes = [sum(signs) for signs in itertools.product((-1, 1), repeat=total)]
    wanted = sum(abs(one) >= uneven for one in outcomes) / len(outcomes)
    assert sign_test(won, lost) == pytest.approx(wanted)


def test_the_sign_test_of_many_pairs() -> None:
    exact = 2 * sum(math.comb(301, k) for k in range(131)) / 2**301
    assert sign_test(171, 130) == sign_test(130, 171) == exact
    start = time.perf_counter()
    assert 0 < sign_test(10_100, 9_900) < 1
    # By math.comb for each it takes most of a minute.
    assert time.perf_counter() - start < 5
    assert 0 < sign_test(1200, 800) < 1e-15
    assert sign_test(1000, 1000) == 1
