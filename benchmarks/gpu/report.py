"""The report of a run: JSON for the next one to compare with, and a table for people."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu.finding import LESS_IS_BETTER, Figure
from benchmarks.gpu.stage import Outcome

LEAST_NOISE = 0.05
"""Two runs of the same code differ by so much, however steady each of them is."""


class Comparison(NamedTuple):
    """A figure, now and in the last run on the same kind of device."""

    name: str
    unit: str
    last: float | None
    now: float
    ratio: float | None
    """now / last."""
    verdict: str
    """``worse`` or ``better`` beyond the noise of both runs; else empty."""


def file_stem(machine: Mapping[str, Any]) -> str:
    """Of the files of a run: one for each kind of device."""
    if machine["device"] == "cpu":
        return "gpu_rehearsal"
    return "gpu_" + re.sub(r"[^a-z0-9]+", "_", machine["name"].lower()).strip("_")


def document(
    machine: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    last: Mapping[str, Any] | None,
    *,
    command: str,
    seconds: float,
) -> dict[str, Any]:
    """All there is, for JSON: of stages that did not run now, what the last report has."""
    head = dict(machine["facts"]) | {"command": command, "seconds": round(seconds, 1)}
    rest = {name: machine[name] for name in machine if name not in ("facts", "sanitizer")}
    origin = {name: head[name] for name in ("date", "commit")}
    kept = kept_stages(outcomes, last)
    figures = {
        name: figure for stage in kept for name, figure in stage["finding"]["figures"].items()
    }
    figures |= {name: figure._asdict() for name, figure in figures_of(outcomes).items()}
    return head | {
        "machine": rest,
        "figures": figures,
        "stages": [outcome.to_dict() | origin for outcome in outcomes] + kept,
    }


def kept_stages(
    outcomes: Iterable[Outcome], last: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Those of the last report that did not run now, each with its date and commit."""
    if last is None:
        return []
    ran = {outcome.name for outcome in outcomes if outcome.status != "left out"}
    # Those of a report that kept none have its date and commit.
    origin = {name: last[name] for name in ("date", "commit")}
    return [
        origin | stage
        for stage in last["stages"]
        if stage["name"] not in ran and stage["status"] != "left out"
    ]


def figures_of(outcomes: Iterable[Outcome]) -> dict[str, Figure]:
    """Of all stages, those that failed too: what they measured before stands."""
    return {
        name: figure for outcome in outcomes for name, figure in outcome.finding.figures.items()
    }


def compare(now: Mapping[str, Figure], last: Mapping[str, Any] | None) -> list[Comparison]:
    """Every figure of this run with that of the last, if it had it.

    Args:
        now: figures by name.
        last: a document of :func:`document`; None: there is none.
    """
    known = {name: Figure(**one) for name, one in (last or {}).get("figures", {}).items()}
    return [_compared(name, figure, known.get(name)) for name, figure in now.items()]


def _compared(name: str, now: Figure, last: Figure | None) -> Comparison:
    if last is None or last.unit != now.unit or not last.value:
        return Comparison(name, now.unit, None, now.value, None, "")
    ratio = now.value / last.value
    noise = max(LEAST_NOISE, now.spread + last.spread)
    verdict = ""
    if abs(ratio - 1) > noise:
        verdict = "worse" if (ratio > 1) == (now.unit in LESS_IS_BETTER) else "better"
    return Comparison(name, now.unit, last.value, now.value, ratio, verdict)


def stage_line(outcome: Outcome) -> str:
    """What became of a stage."""
    line = f"{outcome.name:20} {outcome.status:10} {outcome.seconds:6.1f} s"
    return f"{line}  {outcome.reason}".rstrip()


def table(
    document: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    comparisons: Sequence[Comparison],
    last: Mapping[str, Any] | None,
) -> str:
    """The whole report as text."""
    parts = [f"{document['hardware']}, {document['date']}, commit {document['commit']}"]
    parts += ["", *map(stage_line, outcomes)]
    for outcome in outcomes:
        lines = [*outcome.finding.problems, *outcome.finding.notes]
        if lines:
            parts += ["", outcome.name, *(f"  {line}" for line in lines)]
    kept = kept_stages(outcomes, last)
    if kept:
        parts += ["", "did not run now, kept in the JSON:"]
        parts += [
            f"  {one['name']:20} {one['status']:10} {one['date']}, commit {one['commit']}"
            for one in kept
        ]
    if comparisons:
        parts += ["", *_figures(comparisons, last)]
    worse = [one.name for one in comparisons if one.verdict == "worse"]
    if worse:
        parts += ["", f"worse than the last run, beyond noise: {len(worse)}"]
        parts += [f"  {name}" for name in worse]
    return "\n".join(parts) + "\n"


def _figures(comparisons: Sequence[Comparison], last: Mapping[str, Any] | None) -> Iterable[str]:
    width = max(len(one.name) for one in comparisons)
    yield f"{'figure':{width}} {'unit':>8} {'last':>12} {'now':>12} {'ratio':>6}"
    for one in comparisons:
        before = "" if one.last is None else f"{one.last:.4g}"
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        line = f"{one.name:{width}} {one.unit:>8} {before:>12} {one.now:>12.4g} {ratio:>6}"
        yield f"{line}  {one.verdict}".rstrip()
    if last is not None:
        yield f"last: {last['date']}, commit {last['commit']}"
