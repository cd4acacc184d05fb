"""How sure a preference rate is: an interval by the bootstrap, and the sign test."""

import numpy as np

_NUM_RESAMPLES = 10_000
_LEVEL = 0.95


def bootstrap_interval(
    num_won: int, num_tied: int, num_lost: int, *, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of (won - lost) / all, over resamples of the prompts (percentiles).

    A resample of prompts has multinomial counts, so these are drawn. Where all pairs end in one
    way so do all resamples, and the interval has width 0.
    """
    num_all = num_won + num_tied + num_lost
    shares = np.array([num_won, num_tied, num_lost]) / num_all
    counts = np.random.default_rng(seed).multinomial(num_all, shares, size=_NUM_RESAMPLES)
    rates = (counts[:, 0] - counts[:, 2]) / num_all
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(rates, [tail, 1 - tail])
    return float(low), float(high)


def sign_test(num_won: int, num_lost: int) -> float:
    """Two-sided p of as uneven a split of the pairs that are not tied, were both equally likely."""
    num_pairs = num_won + num_lost
    # Exact: integers of any size, each from the one before.
    ways = tail = 1
    for k in range(min(num_won, num_lost)):
        ways = ways * (num_pairs - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**num_pairs)
