"""How many rows a step forwards: what rows cost here, against how often they help.

    seconds(slots, shape)   of a step, measured once per device and model: see step_costs
    steps(shape)            per token, of a cascade of the paper's profile
    shape                   = argmin  seconds(slots, shape) * steps(shape)

Tried are windows of equal width for every slot, and budgets of rows that are handed out by what
they are worth (:mod:`row_budget`). Up to some number of rows a step costs the same; beyond it a row
has to earn its keep. The shape changes no token beyond rounding, only how soon they come.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mara_fast.row_budget import StepShape, survival

FORCED_FRAC = 1 / 3
"""Positions with a single candidate, as in the paper's models."""
MEAN_SET_SIZE = 10
"""Candidates of a decided position."""
WINDOWS = (1, 2, 3, 4, 5, 6, 8, MEAN_SET_SIZE)
"""A wider one saves no step of a profile of this set size."""

WIDEST_OF_BUDGET = 8
"""Rows of one slot where a budget is handed out: attention is as wide in every slot."""

_TOO_SLOW = 1.25
"""So many times the best found: wider windows are not tried."""
_LEAST_GAIN = 0.99
"""Of the best found: what more rows have to get below. Less is noise, and would be kept."""


class Use(NamedTuple):
    """What a token of the paper's profile takes, on average."""

    num_steps: float
    num_rows: float
    """Forwarded with a candidate in them; padding is not counted."""


def use_of(window: int, *, examines_all: bool, least_worth: float = 0.0) -> Use:
    """Steps and rows of a token, a third of them forced.

    Args:
        window: the most candidates per step.
        examines_all: the whole set is scored whatever is accepted.
        least_worth: candidates less likely to be asked for wait for the next step.
    """
    left = survival(examines_all=examines_all)

    def asks_for(tried: int) -> float:
        return left[min(tried, len(left) - 1)]

    steps = rows = 0.0
    offset = 0
    while offset < MEAN_SET_SIZE:
        wanted = min(window, MEAN_SET_SIZE - offset)
        worth = [asks_for(offset + row) / asks_for(offset) for row in range(wanted)]
        count = max(1, sum(value >= least_worth for value in worth))
        steps += asks_for(offset)
        rows += asks_for(offset) * count
        offset += count
    decided = 1 - FORCED_FRAC
    return Use(FORCED_FRAC + decided * steps, FORCED_FRAC + decided * rows)


def steady_window(num_slots: int, *, examines_all: bool, on_cpu: bool) -> int:
    """A window that depends on nothing measured, for runs that must be repeated bit for bit."""
    if examines_all:
        return 16 if on_cpu else max(1, min(40, 160 // num_slots))
    if on_cpu:
        return 3 if num_slots == 1 else 1
    for most_slots, window in ((8, 8), (32, 4), (64, 3), (100, 2)):
        if num_slots <= most_slots:
            return window
    return 1


class StepCosts:
    """Seconds of steps, by slots and shape, each measured when it is first asked for.

    Args:
        measure: seconds of a step of so many slots and this shape.
        known: what was measured before.
    """

    def __init__(
        self,
        measure: Callable[[int, StepShape], float],
        known: dict[tuple[int, StepShape], float] | None = None,
    ) -> None:
        self._measure = measure
        self.known = dict(known or {})

    def of(self, num_slots: int, shape: StepShape) -> float:
        """Seconds of a step."""
        if (num_slots, shape) not in self.known:
            self.known[num_slots, shape] = self._measure(num_slots, shape)
        return self.known[num_slots, shape]

    def best_shape(
        self,
        num_slots: int,
        *,
        examines_all: bool,
        leaves_out: bool = False,
        can_pack: bool = False,
    ) -> StepShape:
        """The shape with the fewest seconds per token; of equals the one of fewest rows.

        Args:
            num_slots: that decode; costs are those of the next power of two.
            examines_all: the whole set is scored whatever is accepted.
            leaves_out: a step forwards no rows beyond the sets, where slots can be packed; without
                packing that holds for a single slot.
            can_pack: slots need not have equally many rows.
        """
        bucket = 1 << (num_slots - 1).bit_length()
        best_window, least = 1, math.inf
        tried: dict[int, float] = {}
        for window in WINDOWS:
            shape = StepShape.uniform(bucket, window)
            use = use_of(window, examines_all=examines_all)
            cost = tried[shape.num_rows] = self.of(bucket, shape)
            if leaves_out and bucket == 1:
                # A forced token is a step of one row.
                seconds = FORCED_FRAC * tried[1] + (use.num_steps - FORCED_FRAC) * cost
            else:
                if leaves_out and can_pack:
                    num_rows = math.ceil(bucket * use.num_rows / use.num_steps)
                    cost = _between(tried, num_rows) or cost
                seconds = use.num_steps * cost
            if seconds < _LEAST_GAIN * least:
                best_window, least = window, seconds
            elif seconds > _TOO_SLOW * least:
                break
        uniform = StepShape.uniform(num_slots, best_window)
        if not can_pack or bucket == 1:
            return uniform
        budget = self._best_budget(bucket, tried, less_than=least, examines_all=examines_all)
        if budget is None:
            return uniform
        rows = math.ceil(budget.num_rows * num_slots / bucket)
        return StepShape(window=budget.window, num_rows=rows)

    def _best_budget(
        self, num_slots: int, tried: dict[int, float], *, less_than: float, examines_all: bool
    ) -> StepShape | None:
        """The budget with the fewest seconds per token, if they are fewer than those given.

        A packed step costs about what one of equal windows and as many rows does: only the budget
        that is best by that is measured itself.
        """
        found, steps_of = None, {}
        least = less_than = _LEAST_GAIN * less_than
        for shape, steps in _budgets(num_slots, examines_all=examines_all):
            cost = _between(tried, shape.num_rows)
            if cost is not None and cost * steps < least:
                found, least = shape, cost * steps
                steps_of[shape] = steps
        if found is None or self.of(num_slots, found) * steps_of[found] >= less_than:
            return None
        return found


def _budgets(num_slots: int, *, examines_all: bool) -> Iterator[tuple[StepShape, float]]:
    """Budgets that suffice on average for all candidates above some worth, and steps per token."""
    left = survival(examines_all=examines_all)
    for least_worth in sorted({right / first for first in left for right in left if right < first}):
        use = use_of(WIDEST_OF_BUDGET, examines_all=examines_all, least_worth=least_worth)
        num_rows = math.ceil(num_slots * use.num_rows / use.num_steps)
        if num_slots < num_rows < num_slots * WIDEST_OF_BUDGET:
            yield StepShape(window=WIDEST_OF_BUDGET, num_rows=num_rows), use.num_steps


def _between(known: dict[int, float], rows: int) -> float | None:
    """On a line between the two known; None outside of them."""
    below = max((n for n in known if n <= rows), default=None)
    above = min((n for n in known if n >= rows), default=None)
    if below is None or above is None:
        return None
    share = (rows - below) / max(above - below, 1)
    return known[below] + share * (known[above] - known[below])
