"""Measuring: rounds of all systems in turn, where the time goes, what the device can do."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

import mara_fast.decoder
from mara_fast.agent import MaraAgent
from mara_fast.bench.systems import Decode
from mara_fast.cache import SlotCache
from mara_fast.language_model import FrozenLM
from mara_fast.memory import free_memory

_ROOFLINE = {"cuda": (2**32, 8192), "cpu": (2**28, 1024)}
"""Bytes read and side of the square multiplied, by device. A GPU's are large enough that waiting
for it takes no share of the time, and many times what its caches hold."""


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    systems: dict[str, Decode], *, rounds: int, device: torch.device, progress: Callable[[], object]
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """Tokens per second of every system in every round, and its tokens.

    Every system runs once before the clock. A round runs all of them, so that what else happens on
    the machine meets all alike.

    Args:
        systems: by name.
        rounds: measured.
        device: waited for.
        progress: called after every run.
    """
    tokens = {}
    for name, run in systems.items():
        tokens[name] = run()
        progress()
    rates: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, run in systems.items():
            synchronise(device)
            started = time.perf_counter()
            run()
            synchronise(device)
            num_tokens = sum(map(len, tokens[name]))
            rates[name].append(num_tokens / (time.perf_counter() - started))
            progress()
    return rates, tokens


PARTS: dict[str, list[tuple[Any, str]]] = {
    "LM forward": [(FrozenLM, "hidden_states")],
    "LM head": [(FrozenLM, "logits")],
    "score": [(MaraAgent, "accept_logit")],
    "cascade": [(mara_fast.decoder, "cascade")],
    "truncate": [(mara_fast.decoder, "truncate"), (mara_fast.decoder, "greedy")],
    "bookkeeping": [(mara_fast.decoder, name) for name in ("propose", "settle", "admit")],
    "commit": [(SlotCache, name) for name in ("commit", "commit_rows", "keep_rows")],
}
"""Functions by the part of the step that they are."""


def time_by_part(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Share of a run's seconds by part; "rest" is all else. The device is waited for at every
    part, so a run takes longer than usual and nothing overlaps."""
    seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def clock(part: str) -> Iterator[None]:
        synchronise(device)
        started = time.perf_counter()
        yield
        synchronise(device)
        seconds[part] += time.perf_counter() - started

    def timed(part: str, function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            with clock(part):
                return function(*args, **options)

        return call

    places = [(part, owner, name) for part, found in PARTS.items() for owner, name in found]
    patches = [
        mock.patch.object(owner, name, timed(part, getattr(owner, name)))
        for part, owner, name in places
    ]
    for patch in patches:
        patch.start()
    try:
        synchronise(device)
        started = time.perf_counter()
        run()
        synchronise(device)
        total = time.perf_counter() - started
    finally:
        for patch in patches:
            patch.stop()
    shares = {part: spent / total for part, spent in seconds.items()}
    return shares | {"rest": max(0.0, 1 - sum(shares.values()))}


def roofline(model: PreTrainedModel, *, context: float, batch_size: int) -> dict[str, float]:
    """What the device does at best, and the tokens per second of plain decoding that allows.

    A decode step reads every weight but the embeddings' once, and the keys and values of every
    sequence; it multiplies every weight with every sequence. The slower of the two is the limit.

    Args:
        model: decoded with.
        context: mean positions of a sequence while it decodes.
        batch_size: sequences at once.
    """
    device, dtype = model.device, model.dtype
    num_bytes, size = _ROOFLINE.get(device.type, _ROOFLINE["cpu"])
    # A copy takes as much again; models and caches stay where they are.
    num_bytes = min(num_bytes, free_memory(device) // 4)
    bytes_per_s = _bandwidth(num_bytes, dtype, device)
    # Random: multiplying ones takes less power, for which a GPU's clock rises.
    square = torch.rand(size, size, dtype=dtype, device=device)
    flop_per_s = 2 * size**3 / _fastest(lambda: square @ square, device)

    config = model.config.get_text_config()
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    if head is not embeddings:
        num_weights -= embeddings.numel()
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * dtype.itemsize
    read = num_weights * dtype.itemsize + batch_size * context * row
    seconds = max(read / bytes_per_s, 2 * num_weights * batch_size / flop_per_s)
    return {
        "bytes_per_s": bytes_per_s,
        "flop_per_s": flop_per_s,
        "plain_tokens_per_s": batch_size / seconds,
    }


def _bandwidth(num_bytes: int, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes per second, of reading; on a GPU of a copy, where that is faster."""
    # Ones: memory that was never written to is not read either.
    values = torch.ones(num_bytes // dtype.itemsize, dtype=dtype, device=device)
    read = num_bytes / _fastest(lambda: values.sum(), device)
    if device.type != "cuda":
        return read
    target = torch.empty_like(values)
    return max(read, 2 * num_bytes / _fastest(lambda: target.copy_(values), device))


def _fastest(call: Callable[[], Any], device: torch.device, rounds: int = 10) -> float:
    """Seconds of a call: the median of several, after a first that is not counted."""
    times = []
    for number in range(rounds + 1):
        synchronise(device)
        started = time.perf_counter()
        call()
        synchronise(device)
        if number:
            times.append(time.perf_counter() - started)
    return statistics.median(times)
