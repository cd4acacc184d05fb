"""Figures as a table, as JSON and as plots."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mara_fast.bench import targets
from mara_fast.bench.systems import (
    ALIGNER,
    CASCADE,
    OUR_ALIGNER,
    OUR_PLAIN,
    OURS,
    STATIC,
    TRANSFORMERS,
)
from mara_fast.outputs import DecodingStats

_RATIOS = (
    (targets.PLAIN, OURS, OUR_PLAIN),
    (targets.SERIAL, OURS, CASCADE),
    (targets.TRANSFORMERS, OURS, TRANSFORMERS),
    (targets.ALIGNER, OURS, OUR_ALIGNER),
    (targets.ALIGNER_TRANSFORMERS, OURS, ALIGNER),
    ("authors' cascade / Aligner, transformers", CASCADE, ALIGNER),
    ("plain, ours / plain, transformers", OUR_PLAIN, TRANSFORMERS),
    ("plain, ours / plain, transformers static + compile", OUR_PLAIN, STATIC),
)
_SAME_TOKENS = ((OURS, CASCADE), (OUR_PLAIN, TRANSFORMERS))
"""Systems that decode the same; the second one may have fewer prompts."""


def profile(stats: DecodingStats) -> dict[str, float]:
    """What the speed of a cascade depends on."""
    decided = max(1, stats.num_decided)
    within_three = sum(count for rank, count in stats.accepted_ranks.items() if rank < 3)
    return {
        "forced_frac": stats.num_forced / stats.num_tokens,
        "rank0_accepted_frac": stats.rank0_accepted_frac,
        "accepted_within_three_frac": within_three / decided,
        "all_rejected_frac": stats.num_all_rejected / decided,
        "mean_set_size": sum(n * c for n, c in stats.candidate_counts.items()) / decided,
        "candidates_per_token": (stats.num_examined + stats.num_forced) / stats.num_tokens,
        "forwards_per_token": stats.forwards_per_token,
    }


def batch_report(
    batch_size: int,
    *,
    rates: dict[str, list[float]],
    tokens: dict[str, list[list[int]]],
    stats: DecodingStats,
    limits: dict[str, float],
    parts: dict[str, float],
) -> dict[str, Any]:
    """The figures of one batch size. A ratio is the median of those of every round: what else
    happens on the machine meets the systems of a round alike.

    Args:
        batch_size: prompts at once.
        rates: tokens per second by system and round.
        tokens: by system and prompt.
        stats: of our aligned answers.
        limits: see :func:`mara_fast.bench.measure.roofline`.
        parts: see :func:`mara_fast.bench.measure.time_by_part`.
    """
    median = {name: statistics.median(found) for name, found in rates.items()}
    measured = profile(stats)
    ratios = {
        name: statistics.median(
            one / other for one, other in zip(rates[first], rates[second], strict=True)
        )
        for name, first, second in _RATIOS
        if first in rates and second in rates
    }
    if targets.PLAIN in ratios:
        ratios[targets.LIMIT] = 1 / measured["candidates_per_token"]
    if OUR_PLAIN in median:
        ratios[targets.ROOFLINE] = median[OUR_PLAIN] / limits["plain_tokens_per_s"]
    same = {
        f"{first} = {second}": _equal_frac(tokens[first], tokens[second])
        for first, second in _SAME_TOKENS
        if first in tokens and second in tokens
    }
    return {
        "batch_size": batch_size,
        "profile": measured,
        "tokens_per_s": {
            name: {"median": median[name], "min": min(found), "max": max(found), "rounds": found}
            for name, found in rates.items()
        },
        "ratios": ratios,
        "equal_answers_frac": same,
        "roofline": limits,
        "time_by_part": parts,
    }


def _equal_frac(first: list[list[int]], second: list[list[int]]) -> float:
    return statistics.mean(a == b for a, b in zip(first, second, strict=False))


def print_batch(console: Console, batch: dict[str, Any], paper: Mapping[str, float]) -> None:
    """Prints the figures of one batch size, those of a paper beside them."""
    table = Table(title=f"batch {batch['batch_size']}", title_justify="left")
    for title in ("system", "tokens/s", "range", *(["paper"] if paper else [])):
        table.add_column(title, justify="left" if title == "system" else "right")
    for name, rate in batch["tokens_per_s"].items():
        cells = [name, f"{rate['median']:.1f}", f"{rate['min']:.1f} - {rate['max']:.1f}"]
        if paper:
            cells.append(f"{paper[name]:g}" if name in paper else "")
        table.add_row(*cells)
    console.print(table)
    for title, values in (
        ("profile", batch["profile"]),
        ("ratios", batch["ratios"]),
        ("equal answers", batch["equal_answers_frac"]),
        ("time by part", batch["time_by_part"]),
    ):
        text = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        console.print(f"{title}: {text}", highlight=False)
    printed = [
        f"{name} {paper[first] / paper[second]:.2f}"
        for name, first, second in _RATIOS
        if first in paper and second in paper
    ]
    if printed:
        console.print(f"the paper's ratios: {', '.join(printed)}", highlight=False)


def print_targets(console: Console, judged: list[dict[str, Any]]) -> None:
    """Prints every target as met or not."""
    table = Table(title="targets", title_justify="left")
    for title in ("ratio", "batch", "wanted", "measured", ""):
        table.add_column(title, justify="left" if title in ("ratio", "") else "right")
    for one in judged:
        measured = "-" if one["measured"] is None else f"{one['measured']:.2f}"
        verdict = {True: "met", False: "NOT met", None: "not measured"}[one["met"]]
        table.add_row(one["name"], str(one["batch_size"]), f"{one['wanted']:g}", measured, verdict)
    console.print(table)


def plot(report: dict[str, Any], path: Path) -> None:
    """Tokens per second over the batch, ratios, and the parts of a step, as PNG.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    batches = report["batches"]
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    sizes = [batch["batch_size"] for batch in batches]
    for name in batches[0]["tokens_per_s"]:
        values = [batch["tokens_per_s"][name]["median"] for batch in batches]
        left.plot(sizes, values, marker="o", label=name)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set(title="tokens per second", xlabel="batch")
    left.legend(fontsize="x-small")
    names = [name for name, *_ in _RATIOS if name in batches[0]["ratios"]]
    for number, batch in enumerate(batches):
        places = [place + 0.8 * number / len(batches) for place in range(len(names))]
        values = [batch["ratios"][name] for name in names]
        middle.barh(places, values, height=0.75 / len(batches), label=f"batch {sizes[number]}")
    middle.set_yticks(range(len(names)), names, fontsize="x-small")
    middle.axvline(1, color="black", linewidth=0.8)
    middle.set(title="ratios")
    middle.legend(fontsize="x-small")
    bottom = [0.0] * len(batches)
    for part in batches[0]["time_by_part"]:
        values = [batch["time_by_part"][part] for batch in batches]
        right.bar([str(size) for size in sizes], values, bottom=bottom, label=part)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    right.set(title="time of a MARA run by part", xlabel="batch", ylim=(0, 1))
    right.legend(fontsize="x-small", loc="lower right")
    figure.suptitle(f"{report['model']}; {report['hardware']}; {report['date']}", fontsize="small")
    figure.savefig(path, dpi=120)
