"""How many candidates per slot and forward: what a row costs here, against how often it helps.

    seconds(rows)     of a forward of the language model, measured once per device and model
    forwards(window)  per token, of a cascade of the paper's profile
    window            = argmin  seconds(slots * window) * forwards(window)

A single slot on a CPU forwards no more rows than its set has: one where the token is forced.

Up to some number of rows a forward costs the same; beyond it a row has to earn its keep. The window
changes no token beyond rounding, only how soon they come.
"""

import json
import logging
import math
import os
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mara_fast.attention import TreeContext
from mara_fast.cache import SlotCache
from mara_fast.language_model import FrozenLM
from mara_fast.step_graphs import Capture
from mara_fast.tensor_parallel import told_by_first
from mara_kernels.attention import NewRows, siblings

WINDOWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40)

FORCED_FRAC = 1 / 3
"""Positions with a single candidate, as in the paper's models."""
ACCEPTED_FRACS = (0.70, 0.17, 0.08)
"""Of the decided positions: where rank 0, 1, 2 is accepted (paper, Figure 3: 66 to 75 %, more than
95 % within three). The rest is examined to the end."""
MEAN_SET_SIZE = 10
"""Candidates of a decided position."""

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
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
    """Seconds of a forward by its rows, on one device.

    Args:
        rows: measured numbers of rows, rising.
        seconds: of a forward of so many; made to rise, as a forward of fewer rows can be padded.
    """

    def __init__(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        if len(rows) != len(seconds) or len(rows) < 2 or list(rows) != sorted(set(rows)):
            raise ValueError(f"expected two rising numbers of rows or more, got {list(rows)}")
        self.rows = list(rows)
        self.seconds = [min(seconds[place:]) for place in range(len(seconds))]

    def of(self, rows: int) -> float:
        """Seconds of a forward of so many rows, between the measured ones on a line."""
        place = min(max(1, bisect_left(self.rows, rows)), len(self.rows) - 1)
        (low, high), (first, last) = (
            self.rows[place - 1 : place + 1],
            self.seconds[place - 1 : place + 1],
        )
        return first + (last - first) * (rows - low) / (high - low)

    def best_window(self, num_slots: int, *, examines_all: bool, leaves_out: bool = False) -> int:
        """The window with the fewest seconds per token; of equals the smallest.

        Args:
            num_slots: that decode.
            examines_all: the whole set is scored whatever is accepted.
            leaves_out: a single slot forwards no rows beyond its set.
        """

        def seconds_per_token(window: int) -> float:
            forced = 1 if leaves_out and num_slots == 1 else num_slots * window
            decided = self.of(num_slots * window)
            decided *= forwards_per_decided(window, examines_all=examines_all)
            return FORCED_FRAC * self.of(forced) + (1 - FORCED_FRAC) * decided

        return min(WINDOWS, key=seconds_per_token)


def measured_costs(lm: FrozenLM, capture: Capture | None) -> StepCosts:
    """The costs of this model on its device: as found in an earlier run, or measured now.

    They are kept in ``$XDG_CACHE_HOME/mara_fast/step_costs.json`` (``~/.cache/...``), by device,
    model and versions.

    Args:
        lm: the language model.
        capture: how its steps are captured; None: they run eagerly.
    """
    key, path = _key(lm, capture), _cache_path()
    known = _read(path)
    seconds = known.get(key)
    if not isinstance(seconds, list) or len(seconds) != len(_ROWS):
        seconds = _measure(lm, capture)
        _write(path, key, seconds)
    # Processes that share a model must choose alike.
    return StepCosts(_ROWS, told_by_first(seconds))


@torch.inference_mode()
def _measure(lm: FrozenLM, capture: Capture | None) -> list[float]:
    device = lm.device
    cache = SlotCache(num_slots=1, max_length=_CONTEXT, scratch=_ROWS[-1])
    length = torch.full((1,), _CONTEXT, device=device)
    cache.select(slice(0, 1), base=_CONTEXT)

    def call_of(num_rows: int) -> Callable[[], None]:
        ids = torch.zeros(1, num_rows, dtype=torch.int64, device=device)
        rows = NewRows(lengths=length, tree=siblings(num_rows, device), base=_CONTEXT)
        positions = (length - 1)[:, None].expand_as(ids)

        def forward() -> None:
            context = TreeContext(rows=rows)
            lm.hidden_states(ids, positions=positions, cache=cache, context=context)

        # Loads and compiles what a capture needs.
        forward()
        if capture is None:
            return forward
        try:
            return capture(forward)
        except RuntimeError:
            return forward

    found = []
    # The most memory first.
    for num_rows in reversed(_ROWS):
        call = call_of(num_rows)
        found.append(statistics.median(_seconds(call, device) for _ in range(_ROUNDS)))
    return found[::-1]


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


def _read(path: Path) -> dict[str, object]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, key: str, seconds: list[float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(_read(path) | {key: seconds}, indent=1), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        _logger.info("the measured step costs could not be kept: %s", error)
