"""The bookkeeping in Triton against the torch body, and its log-probabilities against float64."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mara_kernels.bookkeeping.kernel as kernel
import mara_kernels.bookkeeping.reference as reference
from mara_kernels import bookkeeping
from mara_kernels.bookkeeping import BAD_LOGITS, FORCED, LENGTH, PLAIN, RUNNING, Scored, Slots
from mara_kernels.cascade import ORDERS, CascadeRule, Held
from mara_kernels.cascade.reference import cascade
from mara_kernels.truncate import CandidateSet

NUM_SLOTS, NUM_TOKENS, VOCAB_SIZE = 12, 4, 40


def random_slots(
    seed: int, *, columns: int = 7, hidden_size: int = 37, dtype: torch.dtype = torch.float32
) -> Slots:
    """Slots in every state: idle, forced, at the beginning and in the middle of a set, with a set
    that outgrew the buffer, with room for one more token."""
    generator = torch.Generator().manual_seed(seed)

    def ints(high: int, *size: int) -> torch.Tensor:
        return torch.randint(high, size, generator=generator)

    def floats(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    b, c = NUM_SLOTS, columns
    size = ints(c + 1, b)
    size[0], size[1], size[2], size[3] = 0, min(1, c), c, c + 1
    offset = ints(c, b) * (floats(b) > 0)
    offset = torch.where(offset < size, offset, 0)
    ids = floats(b, max(c, VOCAB_SIZE)).argsort(-1)[:, :c]
    logprobs = torch.log_softmax(floats(b, c), dim=-1).sort(-1, descending=True).values
    behind = torch.arange(c) >= size[:, None]
    num_tokens = ints(NUM_TOKENS, b)
    num_tokens[4] = NUM_TOKENS - 1
    return Slots(
        length=ints(50, b),
        candidate_ids=ids.masked_fill(behind, 0),
        candidate_logprobs=logprobs.masked_fill(behind, -torch.inf),
        size=size,
        offset=offset,
        held_accepted=floats(b) > 0,
        held_preference=floats(b),
        log_residual=-floats(b).abs(),
        held_tried=(offset - 1).clamp(min=0),
        held_logit=floats(b),
        held_logprob=-floats(b).abs(),
        hidden=floats(b, hidden_size).to(dtype),
        num_tokens=num_tokens,
        num_forwards=ints(9, b),
        done=torch.zeros(b, dtype=torch.int64),
        record=ints(99, b, NUM_TOKENS, 5),
        record_floats=floats(b, NUM_TOKENS, 4),
    )


def on(device: torch.device, value: Any) -> Any:
    """A copy of a record of tensors there."""
    if isinstance(value, torch.Tensor):
        return value.clone().to(device)
    if isinstance(value, tuple):
        return type(value)(*(on(device, one) for one in value))
    if hasattr(value, "__dict__"):
        return type(value)(**{name: on(device, one) for name, one in vars(value).items()})
    return copy.copy(value)


def check_equal(found: Slots, expected: Slots) -> None:
    for name, wanted in vars(expected).items():
        got = getattr(found, name).cpu()
        if wanted.dtype == torch.float32 and name != "hidden":
            torch.testing.assert_close(
                got, wanted, rtol=1e-6, atol=2e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(got, wanted), name


def compare(
    operation: Callable[[Any, Slots], Any], slots: Slots, device: torch.device, run_twice: Callable
) -> tuple[Any, Slots]:
    """What the operation of each body returns and leaves is equal; returns the definition's."""
    expected = on(torch.device("cpu"), slots)
    wanted = operation(reference, expected)
    left: list[Slots] = []

    def body() -> list[torch.Tensor]:
        mine = on(device, slots)
        returned = operation(kernel, mine)
        left.append(mine)
        tensors = [] if returned is None else [returned]
        if hasattr(returned, "__dict__"):
            tensors = list(vars(returned).values())
        return [*tensors, *vars(mine).values()]

    found = run_twice(body)
    check_equal(left[0], expected)
    if wanted is not None:
        tensors = list(vars(wanted).values()) if hasattr(wanted, "__dict__") else [wanted]
        for got, one in zip(found, tensors, strict=False):
            assert torch.equal(got.cpu(), one)
    return wanted, expected


# --- propose ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("window", [1, 3, 8])
def test_propose(order: Any, window: int, device: torch.device, run_twice: Callable) -> None:
    for seed, is_given in itertools.product(range(2), (False, True)):
        slots = random_slots(seed)
        count = torch.randint(window + 1, (NUM_SLOTS,)) if is_given else None

        def operation(body: Any, slots: Slots, count: torch.Tensor | None = count) -> Any:
            given = None if count is None else count.to(slots.size.device)
            return body.propose(slots, window=window, count=given, last_position=30, order=order)

        proposal, left = compare(operation, slots, device, run_twice)
        check_equal(left, slots)
        assert proposal.size[3] == 0 < slots.size[3]
        assert proposal.positions.max() == 30


# --- settle ----------------------------------------------------------------------------------


def decided_window(slots: Slots, rule: CascadeRule, window: int, seed: int, *, packed: bool) -> Any:
    """A window of random accept logits, NaN among them, and what the cascade says of it."""
    generator = torch.Generator().manual_seed(100 + seed)
    d = torch.randn(NUM_SLOTS, window, generator=generator) - 0.5
    d[5] = -9.0
    if seed % 2:
        d[6, window // 2] = torch.nan
    size = bookkeeping.pending(slots)
    count = (size - slots.offset).clamp(0, window)
    place, num_rows = None, NUM_SLOTS * window
    if packed:
        count = torch.minimum(count, torch.randint(1, window + 1, count.shape, generator=generator))
        start = count.cumsum(0) - count
        column = torch.arange(window)
        num_rows = int(count.sum())
        place = start[:, None] + torch.where(column < count[:, None], column, 0)
        place = place.clamp(max=num_rows - 1)
    hidden = torch.randn(num_rows, slots.hidden.shape[1], generator=generator)
    scored = Scored(accept_logit=d, hidden=hidden.to(slots.hidden.dtype), place=place, count=count)
    decision = cascade(
        d,
        offset=slots.offset,
        size=size,
        held=Held(slots.held_accepted, slots.held_preference, slots.log_residual),
        rule=rule,
        sequence=torch.arange(NUM_SLOTS),
        position=slots.num_tokens,
        count=count,
    )
    return scored, decision


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fallback", ["last", "first", "max_prob"])
@pytest.mark.parametrize("packed", [False, True])
def test_settle(
    order: Any, fallback: Any, packed: bool, device: torch.device, run_twice: Callable
) -> None:
    met = set()
    for seed, (window, eos) in enumerate(
        itertools.product((1, 4, 9), ((), (3,), (*range(5000, 7000), *range(0, VOCAB_SIZE, 3))))
    ):
        slots = random_slots(seed)
        rule = CascadeRule(order=order, fallback=fallback)
        window_and_decision = decided_window(slots, rule, window, seed, packed=packed)
        eos_ids = torch.tensor(eos, dtype=torch.int64)

        def operation(
            body: Any, slots: Slots, inputs: Any = window_and_decision, eos: Any = eos_ids
        ) -> Any:
            device = slots.size.device
            scored, decision = on(device, inputs[0]), on(device, inputs[1])
            return body.settle(
                slots,
                scored,
                decision,
                order=order,
                fallback_is_last=fallback == "last",
                eos_ids=on(device, eos),
            )

        chosen, left = compare(operation, slots, device, run_twice)
        met |= set(left.done.tolist()) | set(left.record[..., 4].flatten().tolist())
        assert not (chosen & (left.done != RUNNING)).any()
    # Ends of every kind, and both verdicts.
    assert {0, 1, 2, 4} <= met


@pytest.mark.parametrize(
    ("columns", "hidden_size", "dtype"),
    [
        (1, 1, torch.float32),
        (64, 2049, torch.float32),
        (1500, 4100, torch.float16),
        (2048, 96, torch.bfloat16),
    ],
)
def test_settle_of_all_sizes(
    columns: int, hidden_size: int, dtype: torch.dtype, device: torch.device, run_twice: Callable
) -> None:
    """More columns and longer states than one block."""
    rule = CascadeRule()
    slots = random_slots(7, columns=columns, hidden_size=hidden_size, dtype=dtype)
    inputs = decided_window(slots, rule, 3, 7, packed=False)

    def operation(body: Any, slots: Slots) -> Any:
        device = slots.size.device
        return body.settle(
            slots,
            on(device, inputs[0]),
            on(device, inputs[1]),
            order="descending",
            fallback_is_last=True,
            eos_ids=torch.tensor([5], device=device),
        )

    compare(operation, slots, device, run_twice)


def test_logprobs_in_float64(device: torch.device) -> None:
    """Of the policy and of the set, from the smallest to certain."""
    slots = random_slots(3, columns=64)
    slots.size[:], slots.offset[:], slots.num_tokens[:] = 64, 60, 0
    scale = torch.logspace(-3, 1.7, NUM_SLOTS)[:, None]
    slots.candidate_logprobs = torch.log_softmax(
        scale * torch.randn(NUM_SLOTS, 64, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    slots.log_residual = -torch.logspace(-6, 1.9, NUM_SLOTS)
    slots.held_logprob = slots.log_residual.flip(0).clone()
    scored, decision = decided_window(slots, CascadeRule(), 4, 0, packed=False)
    # Nobody is better than what is held, and the set ends.
    decision = decision._replace(
        row=torch.full_like(decision.row, -1),
        decided=torch.ones_like(decision.decided),
        invalid=torch.zeros_like(decision.invalid),
        held=Held(
            torch.zeros(NUM_SLOTS, dtype=torch.bool), slots.held_preference, slots.log_residual
        ),
    )
    mine = on(device, slots)
    kernel.settle(
        mine,
        on(device, scored),
        on(device, decision),
        order="descending",
        fallback_is_last=True,
        eos_ids=torch.zeros(0, dtype=torch.int64, device=device),
    )
    found = mine.record_floats[:, 0].double().cpu()
    exact = torch.logaddexp(slots.held_logprob.double(), slots.log_residual.double())
    torch.testing.assert_close(found[:, 2], exact, rtol=1e-6, atol=1e-6)
    rows = slots.candidate_logprobs.double()
    exact = rows[torch.arange(NUM_SLOTS), slots.held_tried] - rows.logsumexp(-1)
    torch.testing.assert_close(found[:, 3], exact, rtol=1e-6, atol=1e-6)


def test_a_certain_end_is_no_nan(device: torch.device) -> None:
    """log 0 + log 0."""
    slots = random_slots(0)
    slots.size[:], slots.offset[:] = 5, 4
    slots.held_logprob[:] = slots.log_residual[:] = -torch.inf
    scored, decision = decided_window(slots, CascadeRule(), 1, 0, packed=False)
    held = decision.held._replace(log_residual=slots.log_residual)
    decision = decision._replace(row=torch.full_like(decision.row, -1), held=held)
    mine, num_before = on(device, slots), slots.num_tokens
    kernel.settle(
        mine,
        on(device, scored),
        on(device, decision),
        order="descending",
        fallback_is_last=True,
        eos_ids=torch.zeros(0, dtype=torch.int64, device=device),
    )
    emitted = mine.num_tokens.cpu() > num_before
    assert emitted.any()
    policy = mine.record_floats.cpu()[torch.arange(NUM_SLOTS), num_before, 2][emitted]
    assert (policy == -torch.inf).all()


# --- admit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("columns", "new_columns"), [(7, 7), (7, 3), (1500, 64), (1, 1)])
def test_admit(
    order: Any, columns: int, new_columns: int, device: torch.device, run_twice: Callable
) -> None:
    met = set()
    for seed, (verdict, eos) in enumerate(
        itertools.product((FORCED, PLAIN), ((), (*range(20, 3000), 0, 5, 9, 11)))
    ):
        slots = random_slots(seed, columns=columns)
        slots.held_tried[:] = 3
        generator = torch.Generator().manual_seed(seed)
        size = torch.randint(new_columns + 2, (NUM_SLOTS,), generator=generator)
        size[4], size[7], size[8], size[9] = 1, 0, new_columns + 1, 1
        chosen = torch.rand(NUM_SLOTS, generator=generator) < 0.8
        chosen[[4, 7, 8, 9]] = True
        new = CandidateSet(
            torch.randint(12, (NUM_SLOTS, new_columns), generator=generator),
            torch.randn(NUM_SLOTS, new_columns, generator=generator),
            size,
        )

        def operation(
            body: Any,
            slots: Slots,
            new: Any = new,
            chosen: Any = chosen,
            verdict: int = verdict,
            eos: Any = eos,
        ) -> None:
            device = slots.size.device
            body.admit(
                slots,
                on(device, new),
                chosen.to(device),
                verdict=verdict,
                order=order,
                eos_ids=torch.tensor(eos, dtype=torch.int64, device=device),
            )

        _, left = compare(operation, slots, device, run_twice)
        assert left.size[8] == columns + 1
        met |= set(left.done.tolist())
    assert {RUNNING, LENGTH, BAD_LOGITS} <= met


# --- keep_rows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_heads", "head_size", "dtype"),
    [(1, 1, torch.float32), (3, 80, torch.float16), (40, 64, torch.bfloat16), (2, 2048, None)],
)
def test_keep_rows(
    num_heads: int, head_size: int, dtype: torch.dtype | None, device: torch.device
) -> None:
    """In a range of the slots; what no row is moved to stays."""
    generator = torch.Generator().manual_seed(0)
    base, trash = 9, 13
    size = 2, NUM_SLOTS + 2, num_heads, trash + 1, head_size
    rows = torch.randn(size, generator=generator).to(dtype or torch.float32)
    row = torch.randint(-1, 4, (NUM_SLOTS,), generator=generator)
    # Onto itself, too.
    destination = torch.randint(base + 1, (NUM_SLOTS,), generator=generator)
    expected, found = rows.clone(), rows.clone().to(device)
    reference.keep_rows(expected[:, 1:-1], row, base=base, destination=destination, trash=trash)
    kernel.keep_rows(
        found[:, 1:-1],
        row.to(device),
        base=base,
        destination=destination.to(device),
        trash=trash,
    )
    found = found.cpu()
    assert torch.equal(found[:, :, :, :trash], expected[:, :, :, :trash])
    assert not torch.equal(found, rows)
    for slot in (0, NUM_SLOTS + 1):
        assert torch.equal(found[:, slot], rows[:, slot])


# --- dispatch --------------------------------------------------------------------------------


def test_dispatch_reaches_the_bodies(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARA_KERNELS", "bookkeeping=triton")
    called = []
    for name in ("propose", "settle", "admit", "keep_rows"):
        body = getattr(kernel, name)
        monkeypatch.setattr(
            kernel, name, lambda *a, n=name, b=body, **k: called.append(n) or b(*a, **k)
        )
    slots = random_slots(0)
    scored, decision = decided_window(slots, CascadeRule(), 2, 0, packed=False)
    mine = on(device, slots)
    bookkeeping.propose(mine, window=2, last_position=9, order="descending")
    chosen = bookkeeping.settle(
        mine,
        on(device, scored),
        on(device, decision),
        rule=CascadeRule(),
        eos_ids=torch.tensor([1], device=device),
    )
    new = on(
        device,
        CandidateSet(
            torch.ones(NUM_SLOTS, 2, dtype=torch.int64),
            torch.zeros(NUM_SLOTS, 2),
            torch.ones(NUM_SLOTS, dtype=torch.int64),
        ),
    )
    how: dict[str, Any] = {
        "verdict": FORCED,
        "order": "descending",
        "eos_ids": torch.tensor([1], device=device),
    }
    bookkeeping.admit(mine, new, chosen, **how)
    rows = torch.zeros(1, NUM_SLOTS, 1, 4, 2, device=device)
    zero = torch.zeros(NUM_SLOTS, dtype=torch.int64, device=device)
    bookkeeping.keep_rows(rows, zero, base=1, destination=zero, trash=3)
    assert called == ["propose", "settle", "admit", "keep_rows"]
    # Sets of some slots are for the definition.
    index = chosen.nonzero()[:, 0]
    some = CandidateSet(*(tensor[index] for tensor in new))
    bookkeeping.admit(mine, some, chosen, index=index, **how)
    assert len(called) == 4 and math.isfinite(float(mine.size.sum()))


def test_bad_input_is_named_before_anything_is_written() -> None:
    """A kernel would read whatever lies where it is told to."""
    slots = random_slots(0)
    before = on(torch.device("cpu"), slots)
    scored, decision = decided_window(slots, CascadeRule(), 2, 0, packed=False)
    yes = torch.ones(NUM_SLOTS, dtype=torch.bool)
    wide = CandidateSet(torch.ones(NUM_SLOTS, 8, dtype=torch.int64), torch.zeros(NUM_SLOTS, 8), yes)
    how: dict[str, Any] = {"order": "descending", "eos_ids": torch.tensor([1])}
    with pytest.raises(ValueError, match=r"count must be torch\.int64 of"):
        bookkeeping.propose(slots, window=2, count=yes, last_position=9, order="descending")
    short = decision._replace(row=decision.row[:3])
    with pytest.raises(ValueError, match=r"decision\.row must be torch\.int64 of"):
        bookkeeping.settle(slots, scored, short, rule=CascadeRule(), eos_ids=how["eos_ids"])
    with pytest.raises(ValueError, match=r"chosen must be torch\.bool of"):
        bookkeeping.admit(slots, wide, yes[:2], verdict=FORCED, **how)
    with pytest.raises(ValueError, match=r"new\.ids has 8 columns; allowed: .*, 7"):
        bookkeeping.admit(slots, wide, yes, verdict=FORCED, **how)
    rows, row = torch.zeros(1, NUM_SLOTS, 1, 4, 2), torch.zeros(NUM_SLOTS, dtype=torch.int64)
    for bad, destination, message in (
        (rows[0], row, "rows must be"),
        (rows.transpose(-1, -2), row, "last stride of 1"),
        (rows, row[:1], "destination must be"),
    ):
        with pytest.raises(ValueError, match=message):
            bookkeeping.keep_rows(bad, row, base=1, destination=destination, trash=3)
    check_equal(slots, before)
