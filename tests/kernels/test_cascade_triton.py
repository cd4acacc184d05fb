"""The cascade in Triton against the torch body, and its log-probabilities against float64."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

import mara_kernels.cascade.kernel as kernel
import oracle
from mara_kernels.cascade import (
    ACCEPTANCES,
    FALLBACKS,
    ORDERS,
    STRATEGIES,
    CascadeRule,
    Decision,
    Held,
    cascade,
)
from mara_kernels.cascade.reference import cascade as cascade_torch

NUM_SLOTS = 7


def arguments(
    window: int, seed: int, device: torch.device, *, is_ragged: bool = False
) -> tuple[torch.Tensor, dict]:
    """Slots in every state: at the beginning and in the middle, forced, idle, past the end."""
    generator = torch.Generator().manual_seed(seed)
    d = 2 * torch.randn(NUM_SLOTS, window, generator=generator) - 1
    d[1] = -50.0
    d[2] = d[2].round()
    d[3, -1] = 80.0
    d[4] = 0.0
    if seed % 2:
        d[0, window // 2] = torch.nan
    size = torch.randint(0, 45, (NUM_SLOTS,), generator=generator)
    size[5], size[6] = 1, 0
    offset = torch.randint(0, 20, (NUM_SLOTS,), generator=generator)
    offset *= torch.rand(NUM_SLOTS, generator=generator) < 0.5
    held = Held(
        torch.rand(NUM_SLOTS, generator=generator) < 0.5,
        torch.randn(NUM_SLOTS, generator=generator),
        -torch.rand(NUM_SLOTS, generator=generator),
    )
    count = torch.full((NUM_SLOTS,), window)
    if is_ragged:
        count = torch.randint(-1, window + 2, (NUM_SLOTS,), generator=generator)
        d[torch.arange(window) >= count[:, None]] = torch.nan
    return d.to(device), {
        "count": count.to(device),
        "offset": offset.to(device),
        "size": size.to(device),
        "held": Held(*(tensor.to(device) for tensor in held)),
        "sequence": torch.arange(NUM_SLOTS, device=device) + 2**40 * (seed % 3),
        "position": 7 * torch.arange(NUM_SLOTS, device=device),
    }


def check_equal(found: Decision, expected: Decision) -> None:
    for name in ("row", "decided", "invalid"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.held.accepted, expected.held.accepted)
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6, equal_nan=True)
    close(found.held.preference, expected.held.preference)
    close(found.held.log_residual, expected.held.log_residual)
    close(found.log_prob, expected.log_prob)


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_rule_equals_torch(
    acceptance: str,
    strategy: str,
    fallback: str,
    order: str,
    device: torch.device,
    run_twice: Callable,
) -> None:
    # Every width with every choice but the order; where slots have rows of their own, NaN behind.
    for seed, window in enumerate((1, 8) if order == "descending" else (3, 40)):
        is_ragged = window in (3, 8)
        d, others = arguments(window, seed, device, is_ragged=is_ragged)
        rule = CascadeRule(
            acceptance=acceptance,
            strategy=strategy,
            fallback=fallback,
            order=order,
            threshold=(0.5, 0.3)[seed % 2],
            seed=2**63 + 12345678901 * seed,
        )
        body = partial(kernel.cascade_triton, d, rule=rule, **others)
        check_equal(run_twice(body), cascade_torch(d, rule=rule, **others))


def test_draws_are_those_of_philox(device: torch.device) -> None:
    """Bit by bit: of candidates whose accept probability is a draw of NumPy's, those are accepted
    whose probability is above it, and not those at it."""
    size, seed = 20, 2**64 - 2**33 - 5
    for sequence, position in itertools.product((0, 2**31, 2**62 + 3), (0, 2**31 - 1)):
        words = [oracle.uniform_words(seed, sequence, position, rank) for rank in range(size)]
        draws = torch.tensor([word[0] for word in words], dtype=torch.float64) * 2.0**-24
        for shift, expected in ((-4e-6, False), (4e-6, True)):
            # logit(p): the sigmoid rounds to about 1e-7, a draw has 24 bits.
            p = (draws + shift).clamp(1e-9, 1 - 1e-9)
            sure = ((draws + shift) > 1e-5) & ((draws + shift) < 1 - 1e-5)
            d = (p.log() - (-p).log1p()).float()
            for rank in range(size):
                if not sure[rank]:
                    continue
                decision = kernel.cascade_triton(
                    torch.cat((torch.full((rank,), -60.0), d[rank : rank + 1]))[None].to(device),
                    offset=torch.zeros(1, dtype=torch.int64, device=device),
                    size=torch.full((1,), rank + 2, device=device),
                    held=Held.empty(1, device),
                    rule=CascadeRule(acceptance="sample", seed=seed),
                    sequence=torch.full((1,), sequence, device=device),
                    position=torch.full((1,), position, device=device),
                    count=torch.full((1,), rank + 1, device=device),
                )
                assert bool(decision.held.accepted) == expected


def test_selection_distribution_in_float64(device: torch.device, run_twice: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 5.0, 40.0])[:, None]
    d = scale * torch.randn(4, 40, generator=generator)
    exact = d.double()
    rejected = torch.nn.functional.logsigmoid(-exact).cumsum(-1)
    before = torch.cat((torch.zeros(4, 1, dtype=torch.float64), rejected[:, :-1]), dim=-1)
    expected = torch.nn.functional.logsigmoid(exact) + before
    zero = torch.zeros(4, dtype=torch.int64, device=device)
    body = partial(
        kernel.cascade_triton,
        d.to(device),
        offset=zero,
        size=zero + 40,
        held=Held.empty(4, device),
        rule=CascadeRule(strategy="max_prob"),
        sequence=zero,
        position=zero,
        count=zero + 40,
    )
    found = run_twice(body)
    torch.testing.assert_close(found.log_prob.double().cpu(), expected, rtol=3e-6, atol=1e-7)
    residual = found.held.log_residual.double().cpu()
    torch.testing.assert_close(residual, rejected[:, -1], rtol=3e-6, atol=1e-7)
    # With the residual, the probabilities of all outcomes.
    mass = found.log_prob.double().exp().sum(-1).cpu() + residual.exp()
    torch.testing.assert_close(mass, torch.ones(4, dtype=torch.float64), rtol=0, atol=5e-6)


def test_certain_candidates_do_not_cancel(device: torch.device) -> None:
    """Eq. 6 behind a candidate accepted for sure: tiny, and neither zero nor NaN."""
    d = torch.tensor([[-2.0, math.inf, 1.0], [-2.0, 88.0, -math.inf]], device=device)
    zero = torch.zeros(2, dtype=torch.int64, device=device)
    others = {
        "offset": zero,
        "size": zero + 3,
        "held": Held.empty(2, device),
        "rule": CascadeRule(fallback="first"),
        "sequence": zero,
        "position": zero,
        "count": zero + 3,
    }
    check_equal(kernel.cascade_triton(d, **others), cascade_torch(d, **others))


def test_dispatch_reaches_the_body(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARA_KERNELS", "cascade=triton")
    called = []
    body = kernel.cascade_triton
    monkeypatch.setattr(kernel, "cascade_triton", lambda *a, **k: called.append(1) or body(*a, **k))
    rule = CascadeRule()
    for window, times in ((4, 1), (kernel.MAX_WINDOW + 1, 1)):
        d, others = arguments(window, 0, device)
        check_equal(cascade(d, rule=rule, **others), cascade_torch(d, rule=rule, **others))
        assert len(called) == times
