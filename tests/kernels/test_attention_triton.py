"""Candidate attention in Triton, and over flash-attn's interface, against float64."""

import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import mara_kernels.attention.kernel as kernel
from mara_kernels.attention import (
    NewRows,
    Tree,
    candidate_attention,
    chain,
    siblings,
    tree,
    visibility,
)
from mara_kernels.attention.flash import attention_flash
from mara_kernels.attention.reference import candidate_attention as attention_torch
from trees import small_trees
from triton_bodies import HALF_DTYPES, HAS_GPU

FLOOR = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Case:
    """Random inputs; cache rows that nothing may read hold NaN."""

    def __init__(
        self,
        shape: Tree,
        lengths: list[int],
        *,
        heads: tuple[int, int] = (4, 2),
        head_size: int = 16,
        value_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        with_sinks: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        num_heads, num_kv_heads = heads
        num_rows, base = shape.depths.shape[0], max(lengths) + 5
        value_size = value_size or head_size

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        # As the language model has them: rows before heads, and a cache longer than needed.
        self.query = randn(len(lengths), num_rows, num_heads, head_size).transpose(1, 2)
        self.key = randn(len(lengths), num_kv_heads, base + num_rows + 3, head_size)
        self.value = randn(len(lengths), num_kv_heads, base + num_rows + 3, value_size)
        for slot, length in enumerate(lengths):
            for buffer in (self.key, self.value):
                buffer[slot, :, length:base] = torch.nan
                buffer[slot, :, base + num_rows :] = torch.nan
        self.sinks = randn(num_heads).to(device) if with_sinks else None
        self.query, self.key, self.value = (
            tensor.to(device) for tensor in (self.query, self.key, self.value)
        )
        shape = Tree(
            kind=shape.kind,
            ancestors=shape.ancestors.to(device),
            depths=shape.depths.to(device),
            bits=None if shape.bits is None else shape.bits.to(device),
        )
        self.rows = NewRows(lengths=torch.tensor(lengths, device=device), tree=shape, base=base)

    def expected(self, dtype: torch.dtype | None, **options: Any) -> torch.Tensor:
        """By torch in this precision, over rows with no NaN in them."""
        rows = self.rows
        visible = visibility(
            rows.lengths,
            rows.tree.ancestors,
            rows.tree.depths,
            base=rows.base,
            sliding_window=options.pop("sliding_window", None),
        )
        end = rows.base + rows.tree.depths.shape[0]
        key, value = (buffer[:, :, :end].nan_to_num() for buffer in (self.key, self.value))
        tensors = [tensor.to(dtype or tensor.dtype) for tensor in (self.query, key, value)]
        sinks = None if self.sinks is None else self.sinks.to(dtype or self.sinks.dtype)
        return attention_torch(*tensors, visible, sinks=sinks, **options)

    def check(self, found: torch.Tensor, **options: Any) -> None:
        exact = self.expected(torch.float64, **options)
        plain = self.expected(None, **options)
        error, plain_error = ((a.double() - exact).abs().max() for a in (found, plain))
        assert found.dtype == self.query.dtype and found.shape == exact.shape
        assert error < max(2 * plain_error, FLOOR[found.dtype])


@pytest.fixture
def run(device: torch.device, architecture: str, run_twice: Callable) -> Callable:
    """Runs and checks the Triton body."""

    def run(case: Case, *, num_splits: int | None, **options: Any) -> None:
        options = {"scale": 0.3, "softcap": None, "sliding_window": None} | options
        body = partial(
            kernel.attention_triton,
            case.query,
            case.key,
            case.value,
            case.rows,
            sinks=case.sinks,
            architecture=architecture,
            num_processors=4,
            num_splits=num_splits,
            **options,
        )
        case.check(run_twice(body), **options)

    return run


CPU = torch.device("cpu")


@pytest.mark.parametrize("sliding_window", [None, 1, 2, 4])
def test_all_small_trees(sliding_window: int | None, device: torch.device, run: Callable) -> None:
    for shape in [one for num_rows in (1, 2, 3) for one in small_trees(num_rows)]:
        case = Case(shape, [0, 3], heads=(2, 1), device=device)
        run(case, num_splits=1, sliding_window=sliding_window)
    for shape in small_trees(4)[::5]:
        run(Case(shape, [3], heads=(2, 1), device=device), num_splits=2, softcap=1.5)


@pytest.mark.parametrize("kind", [siblings, chain])
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_windows_and_chunks(
    kind: Callable,
    sliding_window: int | None,
    softcap: float | None,
    with_sinks: bool,
    device: torch.device,
    run: Callable,
) -> None:
    case = Case(kind(5, CPU), [0, 3, 40], with_sinks=with_sinks, device=device)
    # Sinks are added in one place without splits, in another with.
    for num_splits in (1, 3) if with_sinks else (2,):
        run(case, num_splits=num_splits, sliding_window=sliding_window, softcap=softcap)


def test_every_number_of_splits(device: torch.device, run: Callable) -> None:
    """Even where most have no key at all."""
    for kind in (siblings, chain):
        case = Case(kind(3, CPU), [0, 1, 100], heads=(2, 2), device=device, with_sinks=True)
        for num_splits in (1, 2, 3, 5, 16, None):
            run(case, num_splits=num_splits)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_head_sizes(
    head_size: int, dtype: torch.dtype, device: torch.device, run: Callable
) -> None:
    options = {"head_size": head_size, "dtype": dtype, "device": device}
    run(Case(siblings(9, CPU), [130, 33], heads=(7, 1), **options), num_splits=2)
    run(Case(chain(20, CPU), [40], heads=(8, 2), **options), num_splits=1, sliding_window=30)


@pytest.mark.parametrize("sizes", [(12, 5), (24, 16), (7, 7), (64, 128)])
def test_keys_and_values_of_different_size(
    sizes: tuple[int, int], device: torch.device, run: Callable
) -> None:
    case = Case(siblings(3, CPU), [9, 70], head_size=sizes[0], value_size=sizes[1], device=device)
    run(case, num_splits=2)


def test_many_rows(device: torch.device, run: Callable) -> None:
    """More than one tile, more siblings than bits, a tree that uses them all."""
    dtype = HALF_DTYPES[0]
    run(Case(siblings(70, CPU), [33, 7], heads=(4, 1), dtype=dtype, device=device), num_splits=2)
    run(Case(chain(150, CPU), [33, 0], heads=(3, 1), dtype=dtype, device=device), num_splits=1)
    ancestors = torch.eye(64, dtype=torch.bool)
    ancestors[:, 0] = True
    ancestors[63, 31] = ancestors[63, 62] = True
    depths = torch.tensor([0] + [1] * 62 + [2])
    shape = tree(ancestors, depths)
    run(Case(shape, [20, 0], heads=(1, 1), dtype=dtype, device=device), num_splits=2)


def test_a_sibling_that_is_nan_stays_alone(device: torch.device, architecture: str) -> None:
    case = Case(siblings(4, CPU), [6, 40], device=device)
    end = case.rows.base
    clean = partial(
        kernel.attention_triton,
        case.query,
        case.key,
        case.value,
        case.rows,
        scale=0.3,
        sliding_window=None,
        softcap=None,
        sinks=None,
        architecture=architecture,
        num_processors=4,
        num_splits=2,
    )
    before = clean()
    for tensor in (case.key[:, :, end + 2], case.value[:, :, end + 2], case.query[:, :, 2]):
        tensor.fill_(torch.nan)
    after = clean()
    others = [0, 1, 3]
    assert torch.equal(after[:, :, others], before[:, :, others])
    assert after[:, :, 2].isnan().all()


def test_dispatch_reaches_the_body(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARA_KERNELS", "attention=triton")
    called = []
    body = kernel.attention_triton
    monkeypatch.setattr(
        kernel, "attention_triton", lambda *a, **k: called.append(1) or body(*a, **k)
    )

    def attend(case: Case) -> None:
        found = candidate_attention(
            case.query, case.key.nan_to_num(), case.value.nan_to_num(), case.rows, scale=0.3
        )
        case.check(found, scale=0.3)

    attend(Case(siblings(3, CPU), [4, 9], device=device))
    assert len(called) == 1
    # What it does not cover goes to torch: doubles, large heads, large trees.
    wide = tree(torch.eye(65, dtype=torch.bool), torch.zeros(65, dtype=torch.int64))
    attend(Case(siblings(3, CPU), [4], head_size=272, device=device))
    attend(Case(wide, [4], device=device))
    assert len(called) == 1


def test_bad_shapes_are_refused() -> None:
    case = Case(siblings(3, CPU), [4, 9])
    with pytest.raises(ValueError, match="at least 14 \\+ 3 positions"):
        candidate_attention(case.query, case.key[:, :, :16], case.value, case.rows, scale=1.0)
    with pytest.raises(ValueError, match="heads that are a multiple"):
        candidate_attention(case.query[:, :3], case.key, case.value, case.rows, scale=1.0)
    with pytest.raises(ValueError, match=r"ancestors must be bool \[W, W\]"):
        tree(torch.eye(3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64))


def test_one_operator_under_compile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph without breaks, whatever the body inside."""
    monkeypatch.setenv("MARA_KERNELS", "attention=triton")
    case = Case(siblings(3, CPU), [4, 9], device=device)
    key, value = case.key.nan_to_num(), case.value.nan_to_num()

    def attend(query: torch.Tensor) -> torch.Tensor:
        return candidate_attention(query * 2, key, value, case.rows, scale=0.15) + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.query), attend(case.query))


# --- flash-attn ------------------------------------------------------------------------------


def fake_flash_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    return_softmax_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What flash-attn's documentation says of these arguments, in float64: windows count from the
    query's position, which is aligned to the end of the keys; nothing seen gives an lse of inf."""
    assert q.shape[1] == 1 and not causal and return_softmax_lse
    assert cache_seqlens.dtype == torch.int32
    group = q.shape[2] // k_cache.shape[2]
    key, value = (x.double().repeat_interleave(group, dim=2) for x in (k_cache, v_cache))
    score = torch.einsum("bqhd,bshd->bhqs", q.double(), key.nan_to_num()) * softmax_scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    position = torch.arange(key.shape[1])
    length = cache_seqlens[:, None].long()
    seen = position < length
    if window_size[0] >= 0:
        seen &= position >= length - 1 - window_size[0]
    score = score.masked_fill(~seen[:, None, None], -torch.inf)
    lse = score.logsumexp(-1)
    prob = (score - lse[..., None]).exp().nan_to_num()
    output = torch.einsum("bhqs,bshd->bqhd", prob, value.nan_to_num())
    return output.to(q.dtype), lse.masked_fill(lse == -torch.inf, torch.inf).float()


@pytest.mark.parametrize("sliding_window", [None, 1, 2, 3, 50])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_flash_attention_folds_the_window_into_heads(
    sliding_window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("flash_attn")
    module.flash_attn_with_kvcache = fake_flash_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    case = Case(siblings(5, CPU), [0, 1, 3, 70], heads=(6, 2), dtype=torch.float16)
    options = {"scale": 0.3, "sliding_window": sliding_window, "softcap": softcap}
    found = attention_flash(case.query, case.key, case.value, case.rows, **options)
    case.check(found, **options)


def test_flash_attention_is_used_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    calls = []
    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.flash_attn_with_kvcache = (  # type: ignore[attr-defined]
        lambda *a, **k: calls.append(1) or fake_flash_attention(*a, **k)
    )
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setenv("MARA_KERNELS", "attention=flash")
    if HAS_GPU:
        pytest.skip("the stand-in runs on a CPU")
    for kind, times in ((siblings, 1), (chain, 1)):
        case = Case(kind(3, CPU), [4, 9], dtype=torch.float16)
        found = candidate_attention(case.query, case.key, case.value, case.rows, scale=0.3)
        case.check(found, scale=0.3)
        assert len(calls) == times
