"""What steps of a language model cost on its device: measured once, and kept.

    seconds(slots, shape)   of a forward of so many slots and rows, and the head behind it

In ``$XDG_CACHE_HOME/mara_fast/step_costs.json``, by device, model, kernels and versions.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import mara_fast
from mara_fast.attention import TreeContext
from mara_fast.cache import SlotCache
from mara_fast.language_model import FrozenLM
from mara_fast.row_budget import Packing, StepShape, hand_out, survival
from mara_fast.step_graphs import Capture
from mara_fast.tensor_parallel import told_by_first
from mara_fast.window import MEAN_SET_SIZE, StepCosts
from mara_kernels import dispatch
from mara_kernels.attention import NewRows, chain, siblings

_CONTEXT = 64
"""Positions before the rows that are measured."""
_ROUNDS = 5

_logger = logging.getLogger(__name__)


class MeasuredCosts(StepCosts):
    """The costs of a model on its device, kept from run to run.

    They are in ``$XDG_CACHE_HOME/mara_fast/step_costs.json`` (``~/.cache/...``), by device, model,
    kernels and versions. Steps that are to be compiled are measured as they are: compiling takes a
    minute per shape, and which shape is best is known before.

    Args:
        lm: the language model.
        capture: how its steps are captured; None: they run eagerly.
    """

    def __init__(self, lm: FrozenLM, capture: Capture | None) -> None:
        self._key = _key(lm, capture)

        def of_all(value: Any) -> Any:
            # Processes that share a model must choose alike.
            return told_by_first(value) if lm.is_sharded else value

        super().__init__(
            lambda *place: of_all(_measure(lm, capture, *place)),
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
def _measure(lm: FrozenLM, capture: Capture | None, num_slots: int, shape: StepShape) -> float:
    device, window = lm.device, shape.window
    cache = SlotCache(num_slots=num_slots, max_length=_CONTEXT, scratch=window, kinds=lm.row_kinds)
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
        # On a CPU a step that decides nothing has none; for it stands what else a step costs.
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
    # The fastest: what else happens on the machine only ever adds.
    return min(_seconds(call, device) for _ in range(_ROUNDS))


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
    num_bytes = sum(parameter.nbytes for parameter in lm.model.parameters())
    sizes = (config.hidden_size, config.num_hidden_layers, lm.vocab_size, lm.row_bytes, num_bytes)
    how = f"{'captured' if capture else 'eager'} {lm.attention}, forward and head"
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
