"""Does a model decode through our cache and attention as it does by itself? Tried at construction.

Prefill in two chunks, then windows of candidates, in two slots of unequal length: states and logits
must equal those of plain forwards, and every layer must attend with the window it should.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mara_fast.attention import ATTENTION_NAME, TreeContext
from mara_fast.cache import RowKind, SlotCache
from mara_fast.row_budget import Packing, StepShape
from mara_kernels.attention import NewRows, Tree, chain, siblings

if TYPE_CHECKING:
    from mara_fast.language_model import FrozenLM

_logger = logging.getLogger(__name__)

_LENGTHS = (3, 5)
_BASE = 5
_HALF_TOLERANCE, _MOST_TOLERANCE = 5e-2, 0.25
"""Of half precision: where nothing more is asked, and whatever the model."""


class Checked(NamedTuple):
    """What the check found out on the way."""

    row_kinds: tuple[RowKind, ...]
    """Of the keys and values of every layer."""
    row_bytes: int
    """Keys and values of one position in all layers."""
    can_pack: bool
    """Rows of several slots may come as one sequence."""


@torch.inference_mode()
def check_path(lm: "FrozenLM") -> Checked:
    """Tries the attention path that the model is set to.

    Raises:
        RuntimeError: it is not exact; what a foreign model raises besides is left as it is.
    """
    _check_implementation(lm)
    device, vocab_size = lm.device, min(lm.vocab_size, lm.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (2, 6), generator=generator).to(device)
    cache = SlotCache(num_slots=2, max_length=8, scratch=3)
    windows_seen: dict[int, int | None] = {}

    def run(
        ids: Tensor,
        start: tuple[int, int],
        tree: Callable[[int, torch.device], Tree],
        base: int,
        packing: Packing | None = None,
    ) -> Tensor:
        shape = tree(ids.shape[1], device)
        length = torch.tensor(start, device=device)
        positions = length[:, None] + shape.depths
        if packing is not None:
            ids, positions = (rows[packing.slot, packing.column][None] for rows in (ids, positions))
        cache.select(slice(0, 2), base=base, packing=packing)
        context = TreeContext(
            rows=NewRows(lengths=length, tree=shape, base=base),
            packing=packing,
            windows_seen=windows_seen,
        )
        return lm.hidden_states(ids, positions=positions, cache=cache, context=context)

    run(ids[:, :2], (0, 0), chain, 0)
    row_bytes = cache.num_bytes // (cache.num_slots * (cache.trash + 1))
    run(ids[:, 2:5], (2, 2), chain, 2)
    # Slot 0 forgets its last two rows: the lengths now differ, and stale rows lie behind.
    window = torch.stack((ids[:, 5], ids[:, 0], ids[:, 5]), dim=1)
    hidden_BWH = run(window, _LENGTHS, siblings, _BASE)
    hidden = hidden_BWH[:, 2]
    logits = lm.logits(hidden)

    _check_windows(lm, windows_seen)
    for slot, length in enumerate(_LENGTHS):
        plain = torch.cat((ids[slot, :length], ids[slot, 5:]))[None]
        with _reference_attention(lm):
            expected = lm.body(input_ids=plain, use_cache=False).last_hidden_state[0, -1]
            expected_logits = lm.model(input_ids=plain, use_cache=False).logits[0, -1]
            worst = max(_error(hidden[slot], expected), _error(logits[slot], expected_logits))
            tolerance = _tolerance(lm, plain, expected, worst)
        _compare("hidden states", hidden[slot], expected, tolerance)
        _compare("logits", logits[slot], expected_logits, tolerance)

    def packs() -> bool:
        # A row of one slot and three of the other.
        count = torch.tensor([1, 3], device=device)
        packing = Packing.of(count, StepShape(window=3, num_rows=4))
        try:
            packed = run(window, _LENGTHS, siblings, _BASE, packing)
            in_slots = hidden_BWH[packing.slot, packing.column]
            _compare("packed rows", packed[0], in_slots, tolerance)
        # Whatever a foreign model makes of rows of another batch than its cache's.
        except Exception as error:
            _logger.info("%s takes no packed rows, its slots get equally many: %s", lm.name, error)
            return False
        return True

    return Checked(cache.kinds, row_bytes, lm.attention == "candidate" and packs())


def _check_implementation(lm: "FrozenLM") -> None:
    if lm.attention == "stock":
        own = lm.model.config._attn_implementation
        if own not in ("sdpa", "eager"):
            raise RuntimeError(f"its attention is {own!r}, not sdpa or eager")
        return
    previous = lm.model.config._attn_implementation
    try:
        lm.model.set_attn_implementation(ATTENTION_NAME)
        taken = lm.body.config._attn_implementation == ATTENTION_NAME
    finally:
        lm.model.config._attn_implementation = previous
        lm.body.config._attn_implementation = previous
    if not taken:
        raise RuntimeError("it does not take another attention function")


def _check_windows(lm: "FrozenLM", windows_seen: dict[int, int | None]) -> None:
    if lm.attention != "candidate":
        return
    if len(windows_seen) < lm.config.num_hidden_layers:
        raise RuntimeError(
            f"{len(windows_seen)} of {lm.config.num_hidden_layers} layers attend through it"
        )
    # A handful of tokens cannot show a window of thousands: compare with the config instead.
    window = getattr(lm.config, "sliding_window", None)
    layer_types = getattr(lm.config, "layer_types", None)
    for index, seen in windows_seen.items():
        expected = window
        if layer_types and layer_types[index] == "full_attention":
            expected = None
        if seen != expected:
            raise RuntimeError(
                f"layer {index} attends with sliding window {seen}, its config says {expected}"
            )


@contextmanager
def _reference_attention(lm: "FrozenLM") -> Iterator[None]:
    """eager where the model can: stock sdpa has dropped soft-caps silently."""
    config, previous = lm.body.config, lm.body.config._attn_implementation
    if lm.attention == "candidate":
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = previous


def _tolerance(lm: "FrozenLM", plain: Tensor, expected: Tensor, worst: float) -> float:
    """Of what a plain forward gives. A wrong mask or position is off by the size of the states;
    half precision rounds in another order, and how far that carries depends on the model: as far,
    at most, as one rounding of the embeddings does."""
    if expected.dtype == torch.float32:
        return 1e-3
    if worst <= _HALF_TOLERANCE:
        return _HALF_TOLERANCE
    embeddings = lm.model.get_input_embeddings()(plain)
    sign = 1 - 2 * (torch.arange(embeddings.shape[-1], device=plain.device) % 2)
    rounded = embeddings * (1 + torch.finfo(embeddings.dtype).eps * sign).to(embeddings.dtype)
    moved = lm.body(inputs_embeds=rounded, use_cache=False).last_hidden_state[0, -1]
    return min(_MOST_TOLERANCE, max(_HALF_TOLERANCE, _error(moved, expected)))


def _compare(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = _error(got, expected)
    if not error <= tolerance:
        raise RuntimeError(f"{what} differ from a plain forward by {error:.2g} of their size")


def _error(got: Tensor, expected: Tensor) -> float:
    """Mean difference, of the mean size."""
    finite = expected.isfinite()
    error = (got.float() - expected.float())[finite].abs().mean()
    scale = expected[finite].float().abs().mean().clamp(min=1e-6)
    return float(error / scale)
