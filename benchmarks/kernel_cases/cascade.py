"""The cascade: a first window of accept logits to decisions, by the default rule.

    floor      none: it is bound by its launches
    baselines  the definition

Shapes: B slots, W window.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernel_cases.case import Build, Case, Version, normal, num_sets
from mara_kernels.cascade import CascadeRule, Decision, Held, cascade
from mara_kernels.cascade import reference as cascade_reference

MOST_CANDIDATES = 40


def cascade_case(
    device: torch.device, rotation_bytes: float, *, num_slots: int, window: int
) -> Case:
    """A first window of accept logits to decisions, by the default rule."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(most: int) -> Tensor:
        return torch.randint(most, (num_slots,), generator=generator, device=device)

    def one_set() -> tuple[Tensor, dict[str, Any]]:
        return normal(generator, num_slots, window).float(), {
            "offset": torch.zeros(num_slots, dtype=torch.int64, device=device),
            "size": draw(MOST_CANDIDATES) + 1,
            "held": Held.empty(num_slots, device),
            "sequence": draw(1000),
            "position": draw(1000),
            "count": torch.full((num_slots,), window, device=device),
        }

    def by(body: Callable[..., Decision]) -> Callable[..., Decision]:
        return lambda accept_logit_BW, others: body(accept_logit_BW, rule=CascadeRule(), **others)

    # A slot has its logits, their log-probabilities, and about 60 bytes of state in and out.
    set_bytes = num_slots * (8 * window + 60)
    sets = [one_set() for _ in range(num_sets(set_bytes, rotation_bytes))]
    return Case(
        operation="cascade",
        name=f"B={num_slots} W={window}",
        cost=None,
        has_floor_target=False,
        ours=Version(name="ours", run=by(cascade), inputs=sets),
        baselines=[Version(name="torch", run=by(cascade_reference.cascade), inputs=sets)],
        problem=lambda found: cascade_problem(by(cascade_reference.cascade)(*sets[0]), found),
    )


def cascade_problem(expected: Decision, found: Decision) -> str:
    """Compares decisions exactly, log-probabilities to 1e-4."""
    for name in ("row", "decided", "invalid"):
        if not torch.equal(getattr(found, name), getattr(expected, name)):
            return f"{name} differs"
    if not torch.equal(found.held.accepted, expected.held.accepted):
        return "held.accepted differs"
    floats = {
        "held.preference": (found.held.preference, expected.held.preference),
        "held.log_residual": (found.held.log_residual, expected.held.log_residual),
        "log_prob": (found.log_prob, expected.log_prob),
    }
    for name, (mine, other) in floats.items():
        # -inf equals -inf here, which no difference would say.
        if not torch.allclose(mine, other, rtol=1e-4, atol=1e-4):
            return f"{name} differs by more than 1e-4"
    return ""


SUITE: list[Build] = [
    partial(cascade_case, num_slots=num_slots, window=window)
    for window in (1, 8, 40)
    for num_slots in (1, 64, 256)
]
