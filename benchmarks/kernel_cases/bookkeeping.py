"""The bookkeeping: what happens to the slots of a batch around the language model.

    propose    candidates to the rows of a step
    settle     a decision to the best candidate, and a token: every position is decided
    admit      a new candidate set
    keep       a new row of keys and values of each slot to its prefix

    floor      none: it is bound by its launches
    baselines  the definition

Shapes: B slots, W window, C columns of the candidate buffer, H hidden.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernel_cases.case import Build, Case, Version, normal, num_sets
from mara_kernels import dispatch
from mara_kernels.bookkeeping import FORCED, Scored, Slots, reference
from mara_kernels.cascade import CascadeRule, Decision, Held
from mara_kernels.truncate import CandidateSet

WINDOW, COLUMNS, HIDDEN_SIZE, NUM_TOKENS = 8, 64, 4096, 1 << 14
"""More tokens than one is timed for: a full record ends a sequence."""
LAYERS, HEADS, ROWS, HEAD_SIZE = 64, 8, 32, 128
"""Keys and values of an 8B, of few positions."""
MOST_BATCHES = 8
_RULE = CascadeRule()


def random_slots(generator: torch.Generator, num_slots: int) -> Slots:
    """Half way through sets of five candidates."""
    device = generator.device

    def ints(*size: int, value: int = 0) -> Tensor:
        return torch.full((num_slots, *size), value, device=device)

    def floats(*size: int) -> Tensor:
        return normal(generator, num_slots, *size).float()

    return Slots(
        length=ints(value=100),
        candidate_ids=torch.arange(COLUMNS, device=device).repeat(num_slots, 1),
        candidate_logprobs=floats(COLUMNS).log_softmax(-1),
        size=ints(value=5),
        offset=ints(value=2),
        held_accepted=ints() > 0,
        held_preference=floats(),
        log_residual=-floats().abs(),
        held_tried=ints(value=1),
        held_logit=floats(),
        held_logprob=-floats().abs(),
        hidden=normal(generator, num_slots, HIDDEN_SIZE),
        num_tokens=ints(),
        num_forwards=ints(),
        done=ints(),
        record=ints(NUM_TOKENS, 5),
        record_floats=torch.zeros(num_slots, NUM_TOKENS, 4, device=device),
    )


def scored_window(generator: torch.Generator, num_slots: int) -> tuple[Scored, Decision]:
    """Of whose second row every position is decided."""
    device = generator.device
    logit = normal(generator, num_slots, WINDOW).float()
    row = torch.ones(num_slots, dtype=torch.int64, device=device)
    scored = Scored(
        accept_logit=logit,
        hidden=normal(generator, num_slots * WINDOW, HIDDEN_SIZE),
        place=None,
        count=3 * row,
    )
    held = Held(row > 0, logit[:, 1].clone(), -logit[:, 0].abs())
    return scored, Decision(row, row > 0, row < 0, held, -logit.abs())


def proposing(body: Any, slots: Slots, inputs: None) -> list[Tensor]:
    """The rows of a step."""
    proposal = body.propose(slots, window=WINDOW, count=None, last_position=4095, order=_RULE.order)
    return list(vars(proposal).values())


def settling(body: Any, slots: Slots, inputs: tuple[Scored, Decision, Tensor]) -> list[Tensor]:
    """The batch, with a token more in every slot."""
    scored, decision, eos_ids = inputs
    chosen = body.settle(
        slots, scored, decision, order=_RULE.order, fallback_is_last=True, eos_ids=eos_ids
    )
    return [chosen, *vars(slots).values()]


def admitting(body: Any, slots: Slots, inputs: tuple[CandidateSet, Tensor, Tensor]) -> list[Tensor]:
    """The batch, with another set in every slot."""
    new, chosen, eos_ids = inputs
    body.admit(slots, new, chosen, verdict=FORCED, order=_RULE.order, eos_ids=eos_ids)
    return list(vars(slots).values())


def keeping(body: Any, rows: Tensor, inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The rows of all slots but the last, which is the trash."""
    row, destination = inputs
    body.keep_rows(rows, row, base=ROWS - 10, destination=destination, trash=ROWS - 1)
    return [rows[..., : ROWS - 1, :]]


Step = Callable[[Any, Any, Any], list[Tensor]]


def bookkeeping_case(
    device: torch.device, rotation_bytes: float, *, step: Step, num_slots: int
) -> Case:
    """One of the above on a batch."""
    generator = torch.Generator(device).manual_seed(0)
    eos_ids = torch.tensor([COLUMNS, COLUMNS + 1], device=device)
    yes = torch.ones(num_slots, dtype=torch.bool, device=device)

    def one_set() -> tuple[Any, Any]:
        if step is keeping:
            size = LAYERS, num_slots, HEADS, ROWS, HEAD_SIZE
            return normal(generator, *size), (yes.long(), 9 * yes.long())
        slots = random_slots(generator, num_slots)
        if step is settling:
            return slots, (*scored_window(generator, num_slots), eos_ids)
        if step is admitting:
            logprobs = normal(generator, num_slots, COLUMNS).float()
            sets = CandidateSet(slots.candidate_ids.flip(-1), logprobs, slots.size + 1)
            return slots, (sets, yes, eos_ids)
        return slots, None

    # What a slot reads and writes; batches with their records are large.
    set_bytes = num_slots * (2 * HIDDEN_SIZE * (WINDOW + 1) + 12 * COLUMNS)
    sets = [one_set() for _ in range(min(MOST_BATCHES, num_sets(set_bytes, rotation_bytes)))]
    before, inputs = copied(sets[0][0]), sets[0][1]

    def by(name: str, body: Any) -> Version:
        # What was timed has gone on: what is compared begins anew.
        return Version(
            name=name,
            run=partial(step, body),
            inputs=sets,
            read=lambda _: step(body, copied(before), inputs),
        )

    expected = step(reference, copied(before), inputs)
    return Case(
        operation="bookkeeping",
        name=f"{step.__name__} B={num_slots}",
        cost=None,
        has_floor_target=False,
        ours=by("ours", our_body(device)),
        baselines=[by("torch", reference)],
        problem=partial(bookkeeping_problem, expected),
    )


def our_body(device: torch.device) -> Any:
    """What the operations run on a device."""
    if dispatch.choose("bookkeeping", device).name != "triton":
        return reference
    from mara_kernels.bookkeeping import kernel

    return kernel


def bookkeeping_problem(expected: list[Tensor], found: list[Tensor]) -> str:
    """Compares integers and states exactly, other floats to 1e-4."""
    for index, (mine, other) in enumerate(zip(found, expected, strict=True)):
        if other.dtype == torch.float32:
            is_same = torch.allclose(mine, other, rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            is_same = torch.equal(mine, other)
        if not is_same:
            return f"tensor {index} differs"
    return ""


def copied(slots: Any) -> Any:
    """A copy of a batch."""
    if isinstance(slots, Tensor):
        return slots.clone()
    return dataclasses.replace(slots, **{name: t.clone() for name, t in vars(slots).items()})


SUITE: list[Build] = [
    partial(bookkeeping_case, step=step, num_slots=num_slots)
    for num_slots in (1, 16, 64, 256)
    for step in (proposing, settling, admitting, keeping)
]
