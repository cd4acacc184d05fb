"""How many rows a step forwards: what rows cost here, against how often they help.

    seconds(slots, shape)   of a step of the language model, measured once per device and model
    steps(shape)            per token, of a cascade of the paper's profile
    shape                   = argmin  seconds(slots, shape) * steps(shape)

Tried are windows of equal width for every slot, and budgets of rows that are handed out by what
they are worth (:mod:`row_budget`). Up to some number of rows a step costs the same; beyond it a row
has to earn its keep. The shape changes no token beyond rounding, only how soon they come.
"""

import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import mara_fast
from mara_fast.attention import TreeContext
from mara_fast.cache import SlotCache
from mara_fast.language_model import FrozenLM
from mara_fast.row_budget import Packing, StepShape, hand_out, survival
from mara_fast.step_graphs import Capture
from mara_fast.tensor_parallel import told_by_first
from mara_kernels import dispatch
from mara_kernels.attention import NewRows, chain, siblings

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
_CONTEXT = 64
"""Positions before the rows that are measured."""
_ROUNDS = 3

_logger = logging.getLogger(__name__)


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


class MeasuredCosts(StepCosts):
    """The costs of a model on its device, kept from run to run.

    They are in ``$XDG_CACHE_HOME/mara_fast/step_costs.json`` (``~/.cache/...``), by device, model,
    kernels and versions. Steps that are to be compiled are measured as they are: compiling takes a
    minute per shape, and which shape is best is known before.

    Args:
        lm: the language model.
        capture: how its steps are captured; None: they run eagerly.
        with_head: a step ends with next-token logits of every slot, wanted or not.
    """

    def __init__(self, lm: FrozenLM, capture: Capture | None, *, with_head: bool) -> None:
        self._key = _key(lm, capture, with_head)

        def of_all(value: Any) -> Any:
            # Processes that share a model must choose alike.
            return told_by_first(value) if lm.is_sharded else value

        super().__init__(
            lambda *place: of_all(_measure(lm, capture, with_head, *place)),
            of_all(_read(self._key)),
        )

    def of(self, num_slots: int, shape: StepShape) -> float:
        """Seconds of a step; what is new is kept for other runs."""
        is_new = (num_slots, shape) not in self.known
        seconds = super().of(num_slots, shape)
        if is_new:
            _write(self._key, self.known)
        return seconds


@torch.inference_mode()
def _measure(
    lm: FrozenLM, capture: Capture | None, with_head: bool, num_slots: int, shape: StepShape
) -> float:
    device, window = lm.device, shape.window
    cache = SlotCache(
        num_slots=num_slots, max_length=_CONTEXT, scratch=window, kinds=lm.row_kinds
    )
    cache.select(slice(0, num_slots), base=_CONTEXT)
    length = torch.full((num_slots,), _CONTEXT, device=device)
    ids = torch.zeros(num_slots, window, dtype=torch.int64, device=device)
    # The last that a model of as many positions has; which one costs nothing.
    positions = (length - 1)[:, None].expand_as(ids)
    # Allocates the cache, which a captured step must find in place.
    first = TreeContext(rows=NewRows(lengths=length, tree=chain(1, device), base=_CONTEXT))
    lm.hidden_states(ids[:, :1], positions=positions[:, :1], cache=cache, context=first)
    rows = NewRows(lengths=length, tree=siblings(window, device), base=_CONTEXT)
    is_packed = shape != StepShape.uniform(num_slots, window)
    # Whose rows they are makes no difference.
    offset = torch.zeros_like(length)
    left = torch.tensor(survival(examines_all=False), device=device)

    def forward() -> None:
        packing, new_ids, new_positions = None, ids, positions
        if is_packed:
            count = hand_out(offset, offset + MEAN_SET_SIZE, shape, left)
            packing = Packing.of(count, shape)
            new_ids = ids[packing.slot, packing.column][None]
            new_positions = positions[packing.slot, packing.column][None]
        cache.select(slice(0, num_slots), base=_CONTEXT, packing=packing)
        context = TreeContext(rows=rows, packing=packing)
        hidden = lm.hidden_states(
            new_ids, positions=new_positions, cache=cache, context=context, compiled=False
        )
        if with_head:
            lm.logits(hidden.flatten(0, 1)[:num_slots])

    try:
        # Loads and compiles what a capture needs.
        forward()
    except torch.OutOfMemoryError:
        return math.inf
    call: Callable[[], None] = forward
    if capture is not None:
        try:
            call = capture(forward)
        except RuntimeError as error:
            _logger.info("%s slots of %s are measured eagerly: %s", num_slots, shape, error)
    return statistics.median(_seconds(call, device) for _ in range(_ROUNDS))


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _key(lm: FrozenLM, capture: Capture | None, with_head: bool) -> str:
    device = lm.device
    place = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    config = lm.config
    num_bytes = sum(parameter.nbytes for parameter in lm.model.parameters())
    sizes = (config.hidden_size, config.num_hidden_layers, lm.vocab_size, lm.row_bytes, num_bytes)
    how = f"{'captured' if capture else 'eager'} {lm.attention}" + (
        " with head" if with_head else ""
    )
    kernels = os.environ.get(dispatch.VARIABLE, "")
    versions = " ".join(f"{m.__name__} {m.__version__}" for m in (mara_fast, torch, transformers))
    return f"{place} | {versions} {kernels} | {lm.name} {sizes} {lm.model.dtype} | {how}"


def _cache_path() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mara_fast/step_costs.json"


def _read_all() -> dict[str, dict[str, float]]:
    try:
        found = json.loads(_cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(key: str) -> dict[tuple[int, StepShape], float]:
    known = {}
    try:
        for place, seconds in _read_all().get(key, {}).items():
            num_slots, window, num_rows = map(int, place.split())
            if not 0 < seconds < math.inf:
                return {}
            known[num_slots, StepShape(window=window, num_rows=num_rows)] = seconds
    # Somebody else's, or damaged: measured anew.
    except (AttributeError, TypeError, ValueError):
        return {}
    return known


def _write(key: str, known: dict[tuple[int, StepShape], float]) -> None:
    path = _cache_path()
    # Slots, the most rows of one, rows of all.
    plain = {
        f"{slots} {shape.window} {shape.num_rows}": seconds
        for (slots, shape), seconds in known.items()
        if math.isfinite(seconds)
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(_read_all() | {key: plain}, indent=1), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        _logger.info("the measured step costs could not be kept: %s", error)
