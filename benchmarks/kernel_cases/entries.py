"""Entries of the tables of launch configurations in mara_kernels/configs.py, and calls they serve.

Half precision only: float32 is there for parity, not for speed.

Shapes: B slots, W new rows, M packed rows, V vocabulary, N states, H hidden.
"""

import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

from kernel_cases.attention import AttentionShape, attention_case
from kernel_cases.case import Build
from kernel_cases.score import score_case
from kernel_cases.truncate import truncate_case
from mara_kernels import configs, production

Config = configs.TruncateConfig | configs.ScoreConfig | configs.AttentionConfig

# By the name of a field, or a part of it; the first that fits.
_RANGES = (
    ("finish_block", 1, 64),
    ("block", 16, 256),
    ("stages", 1, 6),
    ("select_warps", 1, 32),
    ("", 1, 16),
)
_HEADS = {64: (32, 8, 64), 128: (32, 8, 128), 256: (16, 8, 256)}
"""Query heads, key heads, head size: of Llama 3.2 1B, Llama 3.1 8B, Gemma 2 9B."""
_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A configuration of a table, and what it is launched for."""

    operation: str
    name: str
    config: Config
    calls: tuple[production.Case, ...]
    """On the meta device: they launch every kernel of it."""
    builds: tuple[Build, ...]
    """Cases to time: the smallest and largest sizes that it serves."""


def entries_of(architecture: str, operation: str) -> list[Entry]:
    """Every entry of an operation that has a table."""
    return {"truncate": _truncate, "score": _score, "attention": _attention}[operation](
        architecture
    )


OPERATIONS = ("truncate", "score", "attention")
"""Those with a table."""


def using(operation: str, config: Config) -> AbstractContextManager[Any]:
    """Every launch of the operation takes this configuration."""
    name = f"mara_kernels.{operation}.kernel.{operation}_config"
    return mock.patch(name, lambda *_: config)


def neighbours(config: Config) -> list[Config]:
    """Those that differ in one field: a half or the double; of stages one less or more."""
    found: list[Config] = []
    for name, value in config._asdict().items():
        if isinstance(value, str):
            continue
        low, high = next(ends for part, *ends in _RANGES if part in name)
        steps = (value - 1, value + 1) if "stages" in name else (value // 2, value * 2)
        found += [config._replace(**{name: step}) for step in steps if low <= step <= high]
    return found


def _truncate(architecture: str) -> list[Entry]:
    sizes = (1, 128256), (64, 128256), (256, 128256), (64, 262144)
    return [
        Entry(
            operation="truncate",
            name="truncate",
            config=configs.TRUNCATE[architecture],
            calls=tuple(production.truncate_case(64, vocab) for vocab in (128256, 262144)),
            builds=tuple(partial(truncate_case, num_rows=b, vocab_size=v) for b, v in sizes),
        )
    ]


def _score(architecture: str) -> list[Entry]:
    entries = []
    for fewest, most, config in _bounded(configs.SCORE_HALF[architecture]):
        largest = most or 4096
        sizes = (fewest, 4096), (largest, 4096), (largest, 2048)
        entries.append(
            Entry(
                operation="score",
                name=f"score, N {_span(fewest, most)}",
                config=config,
                calls=tuple(production.score_case(n, h) for n, h in sizes[1:]),
                builds=tuple(partial(score_case, num_states=n, hidden_size=h) for n, h in sizes),
            )
        )
    return entries


def _attention(architecture: str) -> list[Entry]:
    entries = []
    for head_size, table in configs.ATTENTION_HALF[architecture].items():
        heads = _HEADS[head_size]
        group = heads[0] // heads[1]
        for fewest, most, config in _bounded(table):
            if most is None:
                # All candidates at once, and a chunk of a prefill.
                calls = [(40, "siblings", 1), (40, "siblings", 8), (512, "chain", 1)]
            else:
                rows = -(-fewest // group), most // group
                calls = [(w, "siblings", b) for w in rows for b in (1, 32)]
            # In parts and in one: two kernels.
            kernels = itertools.product(dict.fromkeys((w, kind) for w, kind, _ in calls), (1, 4))
            entries.append(
                Entry(
                    operation="attention",
                    name=f"attention, head size {head_size}, M {_span(fewest, most)}",
                    config=config,
                    calls=tuple(
                        production.attention_case(heads, kind, w, num_splits=splits)
                        for (w, kind), splits in kernels
                    ),
                    builds=tuple(_attention_build(heads, *call) for call in calls),
                )
            )
    return entries


def _attention_build(
    heads: tuple[int, int, int], num_rows: int, kind: Any, num_slots: int
) -> Build:
    num_heads, num_kv_heads, head_size = heads
    shape = AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        length=_LENGTH,
        num_rows=num_rows,
        num_slots=num_slots,
        kind=kind,
    )
    return partial(attention_case, shape=shape)


def _bounded(table: dict[int | None, Any]) -> Iterable[tuple[int, int | None, Any]]:
    """The smallest and the largest size of each entry; None: no end."""
    fewest = 1
    for most, config in table.items():
        yield fewest, most, config
        fewest = (most or 0) + 1


def _span(fewest: int, most: int | None) -> str:
    return f"{fewest}-{most}" if most else f"{fewest}+"
