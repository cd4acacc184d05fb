"""Truncation in Triton against a float64 definition and the torch body."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import mara_kernels.truncate.kernel as kernel
from mara_kernels.configs import truncate_config
from mara_kernels.truncate import CandidateSet, greedy, truncate
from mara_kernels.truncate.reference import greedy as greedy_torch
from mara_kernels.truncate.reference import truncate as truncate_torch

# Probabilities closer to a cut than this may round to either side of it.
NEAR = 1e-6


def rows(kind: str, vocab_size: int) -> torch.Tensor:
    """Three rows of logits."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 3 * torch.randn(3, vocab_size, generator=generator)
    match kind:
        case "ties":
            return logits.round()
        case "signed zeros":
            return torch.where(logits > 0, 0.0, -0.0)
        case "mostly -inf":
            keep = torch.rand(3, vocab_size, generator=generator) < 0.05
            keep[:, vocab_size // 2] = True
            return logits.masked_fill(~keep, -torch.inf)
        case "peaked":
            logits[:, vocab_size - 1] = 60.0
        case "ascending":
            return logits.sort(dim=-1).values
        case "descending":
            return logits.sort(dim=-1, descending=True).values
        case "far from zero":
            return logits - 4000.0
        case "equal":
            return torch.full_like(logits, -7.25)
        case "two levels":
            return torch.where(logits > 6.0, 5.0, -1.0)
    return logits


RULES = ((40, 0.95, 1.0), (1, 1.0, 1e-6), (8, 0.5, 1.3), (64, 1.0, 1.0))
"""top_k, top_p, temperature"""
KINDS = (
    "normal",
    "ties",
    "signed zeros",
    "mostly -inf",
    "peaked",
    "ascending",
    "descending",
    "far from zero",
    "equal",
    "two levels",
)


def definition(
    logits: torch.Tensor, *, top_k: int, top_p: float, temperature: float, capacity: int
) -> tuple[CandidateSet, torch.Tensor]:
    """The rule in float64 for each row, ties judged in float32 as the definition has them; and how
    far the mass that decides the size is from the cut."""
    vocab_size = logits.shape[1]
    ids = torch.zeros(len(logits), capacity, dtype=torch.int64)
    logprobs = torch.full((len(logits), capacity), -torch.inf, dtype=torch.float64)
    sizes, margins = [], []
    for row, values in enumerate((logits.float() / temperature).double()):
        logprob = values - values.logsumexp(0)
        order = sorted(range(vocab_size), key=lambda i: (-float(values[i]), i))
        kth = values[order[top_k - 1]]
        kept = [i for i in order if values[i] >= kth and values[i] > -torch.inf]
        overflows = top_k < len(kept) and len(kept) >= capacity < vocab_size
        overflows |= len(kept) == capacity < vocab_size and values[order[capacity - 1]] == kth
        prob = torch.softmax(values[kept], dim=0)
        tail = prob.flip(0).cumsum(0).flip(0)
        size = max(1, int((tail > 1 - top_p).sum()))
        margins.append(float((tail - (1 - top_p)).abs().min()))
        sizes.append(capacity + 1 if overflows else size)
        if not overflows:
            ids[row, :size] = torch.tensor(kept[:size])
            logprobs[row, :size] = logprob[kept[:size]]
    return CandidateSet(ids, logprobs, torch.tensor(sizes)), torch.tensor(margins)


def check(found: CandidateSet, logits: torch.Tensor, **options: Any) -> None:
    expected, margin = definition(logits.cpu(), **options)
    found = CandidateSet(*(tensor.cpu() for tensor in found))
    capacity = options["capacity"]
    for row in range(len(logits)):
        size = int(found.size[row])
        if size != expected.size[row]:
            # Exactly equal masses may fall to either side of the cut.
            assert margin[row] < NEAR and max(size, int(expected.size[row])) <= capacity
        if size > capacity:
            continue
        shared = min(size, int(expected.size[row]))
        assert found.ids[row, :shared].tolist() == expected.ids[row, :shared].tolist()
        error = (found.logprobs[row, :shared] - expected.logprobs[row, :shared]).abs().max()
        assert error < 2e-6 + 1e-7 * logits[row][logits[row].isfinite()].abs().max()
        assert (found.ids[row, size:] == 0).all()
        assert (found.logprobs[row, size:] == -torch.inf).all()


@pytest.mark.parametrize(
    ("vocab_size", "kind"),
    [(size, kind) for size in (65, 5000) for kind in KINDS]
    + [(size, "ties") for size in (1, 63, 64, 2048, 2049)]
    + [(64, "equal"), (64, "mostly -inf")],
)
def test_against_the_definition(
    kind: str, vocab_size: int, device: torch.device, architecture: str, run_twice: Callable
) -> None:
    logits = rows(kind, vocab_size).to(device)
    for top_k, top_p, temperature in RULES[::2] if vocab_size == 5000 else RULES:
        options = {
            "top_k": min(top_k, vocab_size),
            "top_p": top_p,
            "temperature": temperature,
            "capacity": min(64, vocab_size),
        }
        body = partial(kernel.truncate_triton, logits, architecture=architecture, **options)
        check(run_twice(body), logits, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab_size", [50257, 128256])
def test_large_vocabularies_equal_torch(
    dtype: torch.dtype,
    vocab_size: int,
    device: torch.device,
    architecture: str,
    run_twice: Callable,
) -> None:
    logits = (3 * torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[1, 7::1000] = 15.0
    logits = logits.to(device)
    options = {"top_k": 40, "top_p": 0.95, "temperature": 0.8, "capacity": 128}
    found = run_twice(lambda: kernel.truncate_triton(logits, architecture=architecture, **options))
    expected = truncate_torch(logits, **options)
    assert torch.equal(found.size, expected.size)
    fits = expected.size <= 128
    assert torch.equal(found.ids[fits], expected.ids[fits])
    exact = torch.log_softmax(logits.double() / 0.8, dim=-1).gather(1, expected.ids)
    inside = torch.arange(128, device=device) < expected.size[:, None]
    errors = [(body.logprobs - exact)[fits][inside[fits]].abs().max() for body in (found, expected)]
    assert errors[0] < max(2 * errors[1], 2e-6)


def test_nothing_depends_on_the_split(
    device: torch.device, architecture: str, monkeypatch: pytest.MonkeyPatch, run_twice: Callable
) -> None:
    logits = rows("ties", 9000).to(device)
    options = {"top_k": 40, "top_p": 0.95, "temperature": 0.8, "capacity": 64}
    found = []
    for tiles in (1, 2, 3, 5, 8):
        config = truncate_config(architecture)._replace(tiles=tiles)
        monkeypatch.setattr(kernel, "truncate_config", lambda _, config=config: config)
        found.append(
            run_twice(lambda: kernel.truncate_triton(logits, architecture=architecture, **options))
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_rows_are_independent_and_strides_do_not_matter(
    device: torch.device, architecture: str
) -> None:
    logits = rows("normal", 4000).to(device)
    options = {
        "top_k": 40,
        "top_p": 0.95,
        "temperature": 1.0,
        "capacity": 64,
        "architecture": architecture,
    }
    together = kernel.truncate_triton(logits, **options)
    spread = torch.full((3, 8000), 50.0, device=device)
    spread[:, ::2] = logits
    wide = torch.full((3, 4007), 50.0, device=device)
    wide[:, 3:4003] = logits
    for strided in (spread[:, ::2], wide[:, 3:4003]):
        found = kernel.truncate_triton(strided, **options)
        assert all(torch.equal(a, b) for a, b in zip(together, found, strict=True))
    for row in range(3):
        alone = kernel.truncate_triton(logits[row : row + 1], **options)
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))
    assert len(kernel.truncate_triton(logits[:0], **options).ids) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_distribution_have_size_zero(
    bad: float, device: torch.device, architecture: str
) -> None:
    logits = rows("normal", 5000).to(device)
    logits[1, 2077] = bad
    if bad == -torch.inf:
        logits[1] = bad
    found = kernel.truncate_triton(
        logits, top_k=40, top_p=0.95, temperature=1.0, capacity=64, architecture=architecture
    )
    assert found.size[1] == 0 and (found.size[[0, 2]] > 0).all()
    assert (found.ids[1] == 0).all() and (found.logprobs[1] == -torch.inf).all()


@pytest.mark.parametrize("capacity", [41, 64, 100, 128])
def test_ties_that_find_no_column_are_reported(
    capacity: int, device: torch.device, architecture: str
) -> None:
    """Against the torch body, ties from just fitting to far too many."""
    logits = rows("normal", 3000) / 10
    logits[0, 5::60] = 9.0
    logits[1, 5::30] = 9.0
    logits[2, 5::2] = 9.0
    options = {"top_k": 40, "top_p": 1.0, "temperature": 1.0, "capacity": capacity}
    found = kernel.truncate_triton(logits.to(device), architecture=architecture, **options)
    expected = truncate_torch(logits, **options)
    assert found.size.tolist() == expected.size.tolist()
    assert found.size[2] == capacity + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 33, 2048, 2049, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_greedy(
    kind: str,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    architecture: str,
    run_twice: Callable,
) -> None:
    """The first of the largest, and its log-probability in float64."""
    logits = rows(kind, vocab_size).to(device, dtype)
    found = run_twice(partial(kernel.greedy_triton, logits, architecture=architecture))
    exact = torch.log_softmax(logits.double(), dim=-1)
    ids = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
    assert torch.equal(found.ids, ids) and (found.size == 1).all()
    torch.testing.assert_close(found.logprobs.double(), exact.gather(1, ids), rtol=2e-6, atol=2e-6)
    definition = greedy_torch(logits)
    assert torch.equal(definition.ids, ids) and torch.equal(definition.size, found.size)
    torch.testing.assert_close(found.logprobs, definition.logprobs, rtol=2e-6, atol=2e-6)


def test_greedy_rows_without_a_distribution(device: torch.device, architecture: str) -> None:
    """Strided ones, too, and one of a kind in every place of the vocabulary."""
    logits = rows("normal", 5000).to(device)
    wide = torch.full((6, 5007), torch.nan, device=device)
    wide[:, :5000] = logits.repeat(2, 1)
    strided = wide[:, :5000]
    strided[1, 4999], strided[2, 0], strided[4], strided[5, 2500] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        torch.nan,
    )
    for found in (
        kernel.greedy_triton(strided, architecture=architecture),
        greedy_torch(strided),
        kernel.greedy_triton(strided.t().contiguous().t(), architecture=architecture),
    ):
        assert found.size.tolist() == [1, 0, 0, 1, 0, 0]
        assert found.ids[:, 0].tolist()[1:3] == [0, 0]
        assert (found.logprobs[[1, 2, 4, 5]] == -torch.inf).all()
        assert found.ids[[0, 3], 0].tolist() == [int(strided[0].argmax())] * 2
    none = kernel.greedy_triton(strided[:0], architecture=architecture)
    assert none.ids.shape == (0, 1)


def test_greedy_is_dispatched(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARA_KERNELS", "truncate=triton")
    called = []
    body = kernel.greedy_triton
    monkeypatch.setattr(kernel, "greedy_triton", lambda *a, **k: called.append(1) or body(*a, **k))
    logits = rows("normal", 300).to(device)
    assert torch.equal(greedy(logits).ids, greedy_torch(logits).ids) and called == [1]
    # What the body does not cover.
    assert torch.equal(greedy(logits.double()).ids, greedy(logits).ids) and called == [1, 1]
    for bad in (logits[0], logits.long(), logits[:, :0]):
        with pytest.raises(ValueError, match=r"logits must be a floating \[B, V\] tensor"):
            greedy(bad)


def test_dispatch_reaches_the_body(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARA_KERNELS", "truncate=triton")
    called = []
    body = kernel.truncate_triton
    monkeypatch.setattr(
        kernel, "truncate_triton", lambda *a, **k: called.append(1) or body(*a, **k)
    )
    logits = rows("normal", 3000).to(device)
    truncate(logits, top_k=40, top_p=0.95)
    assert len(called) == 1
    # What it does not cover goes to torch: doubles, and more columns than it has.
    truncate(logits.double(), top_k=40, top_p=0.95)
    truncate(logits, top_k=200, top_p=0.95, capacity=300)
    assert len(called) == 1


def test_what_needs_a_gradient_has_one(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setenv("MARA_KERNELS", "truncate=triton")
    logits = rows("normal", 300).to(device).requires_grad_(True)
    truncate(logits, top_k=5, top_p=1.0).logprobs[:, 0].sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0
