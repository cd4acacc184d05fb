"""What the figures should be, and whether they are."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Batch = dict[str, Any]
"""The figures of a batch size, see :func:`mara_fast.bench.report.batch_report`."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A ratio that should be reached on a kind of device."""

    name: str
    device: str
    """``cpu`` or ``cuda``."""
    batch_size: int
    wanted: float
    value: Callable[[Batch], float | None]
    """The measured ratio; None: it was not measured."""


def _ratio(name: str) -> Callable[[Batch], float | None]:
    return lambda batch: batch["ratios"].get(name)


def _of_limit(name: str, limit: str) -> Callable[[Batch], float | None]:
    def value(batch: Batch) -> float | None:
        ratios = batch["ratios"]
        return ratios[name] / ratios[limit] if name in ratios and limit in ratios else None

    return value


PLAIN = "MARA / plain, ours"
LIMIT = "1 / candidates per token"
SERIAL = "MARA / authors' cascade"
ALIGNER = "MARA / Aligner, same engine"
ALIGNER_TRANSFORMERS = "MARA / Aligner, transformers"
TRANSFORMERS = "MARA / plain, transformers"
ROOFLINE = "plain, ours / roofline"

TARGETS = (
    Target(name=PLAIN, device="cpu", batch_size=1, wanted=0.8, value=_ratio(PLAIN)),
    Target(
        name=f"{PLAIN}, of its limit {LIMIT}",
        device="cpu",
        batch_size=16,
        wanted=0.95,
        value=_of_limit(PLAIN, LIMIT),
    ),
    Target(name=SERIAL, device="cpu", batch_size=1, wanted=1.25, value=_ratio(SERIAL)),
    Target(name=SERIAL, device="cpu", batch_size=16, wanted=6.0, value=_ratio(SERIAL)),
    Target(name=ALIGNER, device="cpu", batch_size=1, wanted=1.6, value=_ratio(ALIGNER)),
    *(
        Target(name=PLAIN, device="cuda", batch_size=size, wanted=wanted, value=_ratio(PLAIN))
        for size, wanted in ((1, 0.97), (16, 0.97), (32, 0.95), (64, 0.90))
    ),
    Target(name=ROOFLINE, device="cuda", batch_size=1, wanted=0.8, value=_ratio(ROOFLINE)),
    Target(name=SERIAL, device="cuda", batch_size=64, wanted=150.0, value=_ratio(SERIAL)),
    Target(name=TRANSFORMERS, device="cuda", batch_size=1, wanted=2.5, value=_ratio(TRANSFORMERS)),
    Target(name=ALIGNER, device="cuda", batch_size=1, wanted=1.85, value=_ratio(ALIGNER)),
    Target(name=ALIGNER, device="cuda", batch_size=64, wanted=2.8, value=_ratio(ALIGNER)),
)
"""design: the ratios that this project aims at; those of a GPU are for an 8B model."""


def judge(batches: Iterable[Batch], *, device: str) -> list[dict[str, Any]]:
    """Every target of the device: its name, batch size, what is wanted, was measured, and is met
    (None where it was not measured)."""
    by_size = {batch["batch_size"]: batch for batch in batches}
    judged = []
    for target in TARGETS:
        if target.device != device:
            continue
        batch = by_size.get(target.batch_size)
        value = None if batch is None else target.value(batch)
        judged.append(
            {
                "name": target.name,
                "batch_size": target.batch_size,
                "wanted": target.wanted,
                "measured": value,
                "met": None if value is None else value >= target.wanted,
            }
        )
    return judged
