"""How many candidates per slot and forward: what rows cost here, against how often they help.

    seconds(slots, window)  of a forward of the language model, measured once per device and model
    forwards(window)        per token, of a cascade of the paper's profile
    window                  = argmin  seconds(slots, window) * forwards(window)

A single slot on a CPU forwards no more rows than its set has: one where the token is forced. Up to
some number of rows a forward costs the same; beyond it a row has to earn its keep. The window
changes no token beyond rounding, only how soon they come.
"""

import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mara_fast.attention import TreeContext
from mara_fast.cache import SlotCache
from mara_fast.language_model import FrozenLM
from mara_fast.step_graphs import Capture
from mara_fast.tensor_parallel import told_by_first
from mara_kernels.attention import NewRows, chain, siblings

WINDOWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40)

FORCED_FRAC = 1 / 3
"""Positions with a single candidate, as in the paper's models."""
ACCEPTED_FRACS = (0.70, 0.17, 0.08)
"""Of the decided positions: where rank 0, 1, 2 is accepted (paper, Figure 3: 66 to 75 %, more than
95 % within three). The rest is examined to the end."""
MEAN_SET_SIZE = 10
"""Candidates of a decided position."""

_TOO_SLOW = 1.25
"""So many times the best found: wider windows are not tried."""
_CONTEXT = 64
"""Positions before the rows that are measured."""
_ROUNDS = 3

_logger = logging.getLogger(__name__)


def forwards_per_decided(window: int, *, examines_all: bool) -> float:
    """Of a decided position, in a cascade of the paper's profile with that window.

    Args:
        window: candidates per forward.
        examines_all: the whole set is scored whatever is accepted.
    """
    whole = math.ceil(MEAN_SET_SIZE / window)
    if examines_all:
        return float(whole)
    found = sum(share * (rank // window + 1) for rank, share in enumerate(ACCEPTED_FRACS))
    return found + (1 - sum(ACCEPTED_FRACS)) * whole


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
    """Seconds of forwards, by slots and window, each measured when it is first asked for.

    Args:
        measure: seconds of a forward of so many slots and candidates per slot.
        known: what was measured before, by (slots, window).
    """

    def __init__(
        self,
        measure: Callable[[int, int], float],
        known: dict[tuple[int, int], float] | None = None,
    ) -> None:
        self._measure = measure
        self.known = dict(known or {})
        self.num_measured = 0

    def of(self, num_slots: int, window: int) -> float:
        """Seconds of a forward."""
        place = num_slots, window
        if place not in self.known:
            self.num_measured += 1
            # Processes that share a model must choose alike.
            self.known[place] = told_by_first(self._measure(*place))
        return self.known[place]

    def best_window(self, num_slots: int, *, examines_all: bool, leaves_out: bool = False) -> int:
        """The window with the fewest seconds per token; of equals the smallest.

        Args:
            num_slots: that decode; rounded up to a power of two.
            examines_all: the whole set is scored whatever is accepted.
            leaves_out: a single slot forwards no rows beyond its set.
        """
        num_slots = 1 << (num_slots - 1).bit_length()
        best, least = 1, math.inf
        for window in WINDOWS:
            forced = 1 if leaves_out and num_slots == 1 else window
            decided = forwards_per_decided(window, examines_all=examines_all)
            seconds = FORCED_FRAC * self.of(num_slots, forced)
            seconds += (1 - FORCED_FRAC) * decided * self.of(num_slots, window)
            if seconds < least:
                best, least = window, seconds
            elif seconds > _TOO_SLOW * least:
                break
        return best


class MeasuredCosts(StepCosts):
    """The costs of a model on its device, kept from run to run.

    They are in ``$XDG_CACHE_HOME/mara_fast/step_costs.json`` (``~/.cache/...``), by device, model
    and versions.

    Args:
        lm: the language model.
        capture: how its steps are captured; None: they run eagerly.
    """

    def __init__(self, lm: FrozenLM, capture: Capture | None) -> None:
        self._key = _key(lm, capture)
        super().__init__(lambda *place: _measure(lm, capture, *place), _read(self._key))

    def best_window(self, num_slots: int, *, examines_all: bool, leaves_out: bool = False) -> int:
        """See :meth:`StepCosts.best_window`."""
        before = self.num_measured
        best = super().best_window(num_slots, examines_all=examines_all, leaves_out=leaves_out)
        if self.num_measured > before:
            _write(self._key, self.known)
        return best


@torch.inference_mode()
def _measure(lm: FrozenLM, capture: Capture | None, num_slots: int, window: int) -> float:
    device = lm.device
    cache = SlotCache(num_slots=num_slots, max_length=_CONTEXT, scratch=window)
    cache.select(slice(0, num_slots), base=_CONTEXT)
    length = torch.full((num_slots,), _CONTEXT, device=device)
    ids = torch.zeros(num_slots, window, dtype=torch.int64, device=device)
    # Allocates the cache, which a compiled step must find in place.
    first = NewRows(lengths=length, tree=chain(1, device), base=_CONTEXT)
    lm.hidden_states(
        ids[:, :1], positions=length[:, None] - 1, cache=cache, context=TreeContext(rows=first)
    )
    rows = NewRows(lengths=length, tree=siblings(window, device), base=_CONTEXT)
    positions = (length - 1)[:, None].expand_as(ids)

    def forward() -> None:
        context = TreeContext(rows=rows)
        lm.hidden_states(ids, positions=positions, cache=cache, context=context)

    # Loads and compiles what a capture needs.
    forward()
    call: Callable[[], None] = forward
    if capture is not None:
        try:
            call = capture(forward)
        except RuntimeError:
            call = forward
    return statistics.median(_seconds(call, device) for _ in range(_ROUNDS))


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _key(lm: FrozenLM, capture: Capture | None) -> str:
    device = lm.device
    place = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    config = lm.config
    sizes = (config.hidden_size, config.num_hidden_layers, lm.vocab_size, lm.row_bytes)
    how = ("captured" if capture else "eager") + (" compiled" if lm.is_compiled else "")
    return f"{place} | torch {torch.__version__} | {lm.name} {sizes} {lm.model.dtype} | {how}"


def _cache_path() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mara_fast/step_costs.json"


def _read_all() -> dict[str, dict[str, float]]:
    try:
        found = json.loads(_cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(key: str) -> dict[tuple[int, int], float]:
    known = {}
    try:
        for place, seconds in _read_all().get(key, {}).items():
            num_slots, window = map(int, place.split("x"))
            known[num_slots, window] = float(seconds)
    # Somebody else's, or damaged: measured anew.
    except (AttributeError, TypeError, ValueError):
        return {}
    return known


def _write(key: str, known: dict[tuple[int, int], float]) -> None:
    path = _cache_path()
    plain = {f"{slots}x{window}": seconds for (slots, window), seconds in sorted(known.items())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(_read_all() | {key: plain}, indent=1), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        _logger.info("the measured step costs could not be kept: %s", error)
