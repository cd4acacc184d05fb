"""Norms and rotations in Triton against float64, and to the bit against the torch body."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch

import mara_kernels.layers.kernel as kernel
import mara_kernels.layers.reference as reference
from mara_kernels.layers import NormRule, rms_norm, rotate
from triton_bodies import HALF_DTYPES

DTYPES = [torch.float32, *HALF_DTYPES]
RULES = [
    NormRule(adds_one=adds_one, rounds_first=rounds_first)
    for adds_one, rounds_first in itertools.product((False, True), repeat=2)
]


def close_to(found: torch.Tensor, torch_body: torch.Tensor, exact: torch.Tensor) -> None:
    """At most twice as far from the exact result as the torch body, and a rounding."""
    assert found.dtype == torch_body.dtype and found.shape == torch_body.shape
    scale = exact.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    worst, mine = (float(((x.double() - exact) / scale).abs().max()) for x in (torch_body, found))
    assert mine <= 2 * worst + torch.finfo(found.dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("hidden_size", [1, 80, 2049, 4096])
def test_norm_against_float64(
    dtype: torch.dtype, rule: NormRule, hidden_size: int, device: torch.device, run_twice: Callable
) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 1e-4, 30.0, 0.0])[:, None]
    x = (scale * torch.randn(4, hidden_size, generator=generator)).to(device, dtype)
    weight = (1 + 0.3 * torch.randn(hidden_size, generator=generator)).to(device, dtype)
    found = run_twice(partial(kernel.rms_norm, x, weight, eps=1e-6, rule=rule))
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    exact = exact * (weight.double() + rule.adds_one)
    close_to(found, reference.rms_norm(x, weight, eps=1e-6, rule=rule), exact)
    assert not found[3].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_state_spoils_its_own_row(bad: float, device: torch.device) -> None:
    x = torch.randn(3, 2, 65, device=device)
    x[1, 0, 64] = bad
    weight = torch.ones(65, device=device)
    rule = NormRule(adds_one=False, rounds_first=True)
    found = kernel.rms_norm(x, weight, eps=1e-5, rule=rule)
    wanted = reference.rms_norm(x, weight, eps=1e-5, rule=rule)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert found.isfinite().flatten(0, 1).all(-1).tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size"), [(1, 1, 2), (7, 1, 80), (32, 8, 128), (40, 40, 64)]
)
@pytest.mark.parametrize("angles_of_each", [True, False])
def test_rotation_against_float64(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    angles_of_each: bool,
    device: torch.device,
    run_twice: Callable,
) -> None:
    generator = torch.Generator().manual_seed(head_size)
    num_slots, num_rows = 2, 3

    def states(heads: int) -> torch.Tensor:
        size = num_slots, num_rows, heads, head_size
        return torch.randn(size, generator=generator).to(device, dtype).transpose(1, 2)

    query, key = states(num_heads), states(num_kv_heads)
    size = (num_slots if angles_of_each else 1), num_rows, head_size
    angle = 50 * torch.randn(size, generator=generator)
    cos, sin = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
    found = run_twice(partial(kernel.rotate, query, key, cos, sin))
    wanted = reference.rotate(query, key, cos, sin)
    exact = reference.rotate(*(t.double() for t in (query, key, cos, sin)))
    for mine, other, truth in zip(found, wanted, exact, strict=True):
        close_to(mine, other, truth)
        # As the projections leave them: the attention reads them in place.
        assert mine.transpose(1, 2).is_contiguous()
        if dtype != torch.float32:
            # A product is rounded before it is added, so that nothing can differ.
            assert torch.equal(mine, other)


def test_dispatch_reaches_the_bodies(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARA_KERNELS", "layers=triton")
    called = []
    for name in ("rms_norm", "rotate"):
        body = getattr(kernel, name)
        monkeypatch.setattr(
            kernel, name, lambda *a, n=name, b=body, **k: called.append(n) or b(*a, **k)
        )
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    rule = NormRule(adds_one=True, rounds_first=False)
    torch.testing.assert_close(
        rms_norm(x, weight, eps=1e-5, rule=rule),
        reference.rms_norm(x, weight, eps=1e-5, rule=rule),
    )
    query, angles = torch.randn(2, 3, 4, 16, device=device), torch.randn(2, 4, 16, device=device)
    rotate(query, query, angles, angles)
    assert called == ["rms_norm", "rotate"]
    # What the bodies do not cover: gradients, other dtypes, angles of half a head, nothing at all.
    rms_norm(x.requires_grad_(), weight, eps=1e-5, rule=rule).sum().backward()
    assert x.grad is not None
    rms_norm(x.detach().double(), weight.double(), eps=1e-5, rule=rule)
    rms_norm(x.detach()[:0], weight, eps=1e-5, rule=rule)
    rotate(query.double(), query.double(), angles, angles)
    rotate(query[:0], query[:0], angles[:0], angles[:0])
    rotate(query, query, angles.clone().requires_grad_(), angles)[0].sum().backward()
    # Keys of one position for all, as torch understands them, and of another length.
    rotate(query, query[:, :, :1], angles, angles)
    with pytest.raises(RuntimeError, match="size of tensor"):
        rotate(query, query[:, :, :3], angles, angles)
    assert len(called) == 2
    with pytest.raises(ValueError, match=r"weight must be \(16,\), got"):
        rms_norm(x, weight[:8], eps=1e-5, rule=rule)
