"""An evaluation as Markdown and as a page: tables of texts first, then either form.

A table has a title, columns and rows; a cell is a text, or a rate with its interval, which the
page draws too.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from mara_fast.evaluation.datasets import counts
from mara_fast.evaluation.spec import PREFERENCE
from mara_fast.outputs import DecodingStats

if TYPE_CHECKING:
    import rich.table

    from mara_fast.evaluation.evaluate import Evaluation, Rate

_NUM_RANKS = 5
"""Of the paper's Figure 3."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A preference rate to be drawn; all in [-1, 1]."""

    rate: float
    interval: tuple[float, float]
    paper: float | None = None

    def __str__(self) -> str:
        low, high = self.interval
        text = f"{_signed(self.rate)} ({_signed(low)} to {_signed(high)})"
        return text if self.paper is None else f"{text}; paper {_signed(self.paper)}"


Cell = str | Bar


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a report."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def profile(stats: DecodingStats) -> dict[str, float | None]:
    """What the agent did: shares of the decided positions, of the acceptances by rank, and what
    decoding took; None where nothing was asked."""
    decided, accepted = stats.num_decided, sum(stats.accepted_ranks.values())

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    return {
        "rank0_accepted": share(stats.accepted_ranks.get(0, 0), decided),
        "first_three_accepted": share(
            sum(stats.accepted_ranks.get(rank, 0) for rank in range(3)), decided
        ),
        "all_rejected": share(stats.num_all_rejected, decided),
        "forced": share(stats.num_forced, stats.num_tokens),
        "forwards_per_token": share(stats.num_forwards, stats.num_tokens),
    } | {
        f"of_accepted_rank{rank}": share(stats.accepted_ranks.get(rank, 0), accepted)
        for rank in range(_NUM_RANKS)
    }


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture of a page."""

    title: str
    caption: str
    svg: str
    """Drawn in ``currentColor`` on no ground, for light and dark."""


def markdown(*evaluations: "Evaluation", title: str | None = None) -> str:
    """The report as Markdown; of several evaluations under a title."""
    lines = [] if title is None else [f"# {_inline(title)}", ""]
    level = "#" if title is None else "##"
    for evaluation in evaluations:
        lines += [f"{level} {_inline(evaluation.spec.name)}", "", _made(evaluation), ""]
        for table in tables(evaluation):
            lines += [f"{level}# {table.title}", "", table.caption, ""]
            lines += [_line(table.columns), _line(["---", *["---:"] * (len(table.columns) - 1)])]
            lines += [_line([str(cell) for cell in row]) for row in table.rows]
            lines.append("")
        if evaluation.spec.notes:
            notes = (f"- {_one_line(note)}" for note in evaluation.spec.notes)
            lines += [f"{level}# Notes", "", *notes, ""]
    return "\n".join(lines)


def page(
    *evaluations: "Evaluation", title: str | None = None, figures: Sequence[Figure] = ()
) -> str:
    """The report as a page that needs nothing else, light or dark as the reader's system is."""
    name = evaluations[0].spec.name if title is None else title
    parts = [f"<h1>{_escaped(name)}</h1>"]
    for figure in figures:
        parts.append(
            f"<figure>{figure.svg}<figcaption><b>{_escaped(figure.title)}.</b> "
            f"{_escaped(figure.caption)}</figcaption></figure>"
        )
    for evaluation in evaluations:
        head = "" if title is None else f"<h2>{_escaped(evaluation.spec.name)}</h2>"
        parts.append(f"{head}<p>{_escaped(_made(evaluation))}</p>")
        # No level is left out: with a title there is one between it and the tables.
        level = "h2" if title is None else "h3"
        parts += [_section(table, level) for table in tables(evaluation)]
        if evaluation.spec.notes:
            notes = "".join(f"<li>{_escaped(note)}</li>" for note in evaluation.spec.notes)
            parts.append(f"<section><{level}>Notes</{level}><ul>{notes}</ul></section>")
    style = files("mara_fast.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(name)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _section(table: Table, level: str) -> str:
    head = "".join(f"<th scope=col>{_escaped(name)}</th>" for name in table.columns)
    body = "".join(
        f"<tr><th scope=row>{_drawn(row[0])}</th>"
        + "".join(f"<td>{_drawn(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    return (
        f"<section><{level}>{_escaped(table.title)}</{level}><p>{_escaped(table.caption)}</p>"
        # Who has no mouse scrolls what is focused.
        f'<div class=wide tabindex=0 role=region aria-label="{_escaped(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        "</div></section>"
    )


def for_terminal(table: Table) -> "rich.table.Table":
    """A table as rich prints it."""
    from rich.table import Table as RichTable
    from rich.text import Text

    # Not texts: rich reads names in brackets as markup.
    shown = RichTable(title=Text(table.title), title_justify="left", caption=None)
    for index, name in enumerate(table.columns):
        shown.add_column(Text(name), justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*(Text(str(cell)) for cell in row))
    return shown


def tables(evaluation: "Evaluation") -> list[Table]:
    """What both forms show."""
    found = [_preferences(evaluation), _details(evaluation), _systems(evaluation)]
    ranks = _ranks(evaluation)
    return found + ([ranks] if ranks.rows else [])


def _preferences(evaluation: "Evaluation") -> Table:
    datasets = list(evaluation.spec.datasets)
    rows: list[tuple[Cell, ...]] = []
    for pair in dict.fromkeys(one.pair for one in evaluation.comparisons):
        by_dataset = {one.dataset: one for one in evaluation.comparisons if one.pair == pair}
        rows.append(
            (
                pair,
                *(
                    _bar(by_dataset[d].preference, by_dataset[d].paper.get(PREFERENCE))
                    for d in datasets
                ),
            )
        )
    rule = {
        "all": "won where every reward is better, lost where every one is worse, else tied",
        "sum": "won where the weighted sum of the rewards is higher",
        "verdict": "won where the judge says so",
    }[evaluation.spec.judge.rule]
    return Table(
        title="Preference rate",
        caption="(won - lost) / all pairs in %, with its 95 % interval by the bootstrap; a pair "
        f"is {rule}.",
        columns=(
            "comparison",
            *(f"{name} (n = {evaluation.num_prompts[name][0]})" for name in datasets),
        ),
        rows=tuple(rows),
    )


def _details(evaluation: "Evaluation") -> Table:
    labels = list(dict.fromkeys(name for one in evaluation.comparisons for name in one.by_reward))
    rows = tuple(
        (
            f"{one.pair}, {one.dataset}",
            *(str(_bar(one.by_reward[label], one.paper.get(label))) for label in labels),
            f"{one.preference.num_won} / {one.preference.num_tied} / {one.preference.num_lost}",
            f"{one.preference.p_value:.2g}",
        )
        for one in evaluation.comparisons
    )
    return Table(
        title="By reward",
        caption="The same rate by each reward alone; the pairs behind the preference rate, and p "
        "of the two-sided sign test on them.",
        columns=("comparison, data set", *labels, "won / tied / lost", "p"),
        rows=rows,
    )


def _systems(evaluation: "Evaluation") -> Table:
    names = evaluation.reward_names
    rows = []
    for system, by_dataset in evaluation.answers.items():
        for dataset, answers in by_dataset.items():
            scores = evaluation.mean_scores[system][dataset]
            found = profile(answers.stats)
            rows.append(
                (
                    f"{system}, {dataset}",
                    *(_number(scores.get(name), "+.3f") for name in names),
                    *(
                        _number(found[name], ".1%")
                        for name in ("rank0_accepted", "first_three_accepted", "all_rejected")
                    ),
                    _number(found["forwards_per_token"], ".2f"),
                    str(answers.num_failed),
                )
            )
    # Scores are shown as they are, costs too.
    rewards = [
        f"mean {name}" + (", lower is better" if weight < 0 else "")
        for name, weight in zip(names, evaluation.spec.judge.weights, strict=True)
    ]
    return Table(
        title="Systems",
        caption="Mean scores of the answers given; of the positions where the agent decides, how "
        "often it accepts rank 0, one of the first three, and none; forwards of the language model "
        "per token; answers that ended in an error, which count as empty.",
        columns=(
            "system, data set",
            *rewards,
            "rank 0",
            "first three",
            "none",
            "forwards",
            "errors",
        ),
        rows=tuple(rows),
    )


def _ranks(evaluation: "Evaluation") -> Table:
    rows = []
    for system, by_dataset in evaluation.answers.items():
        stats = sum((answers.stats for answers in by_dataset.values()), DecodingStats())
        if stats.num_decided:
            found = profile(stats)
            shares = (
                _number(found[f"of_accepted_rank{rank}"], ".1%") for rank in range(_NUM_RANKS)
            )
            rows.append((system, *shares))
    return Table(
        title="Accepted ranks",
        caption="Of all acceptances, by the candidate's probability rank (the paper's Figure 3).",
        columns=("system", *(f"rank {rank}" for rank in range(_NUM_RANKS))),
        rows=tuple(rows),
    )


def _made(evaluation: "Evaluation") -> str:
    made = evaluation.made
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    prompts = "; ".join(
        f"{name}: {counts(*numbers)}" for name, numbers in evaluation.num_prompts.items()
    )
    return f"{made['date']}, {made['hardware']}, {versions}. {prompts}."


def _bar(rate: "Rate", paper: float | None = None) -> Bar:
    return Bar(rate=rate.rate, interval=rate.interval, paper=paper)


def _signed(rate: float) -> str:
    return f"{100 * rate:+.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")


def _inline(text: str) -> str:
    """A name in Markdown: on one line, and none of it markup."""
    return re.sub(r"([\\`*_\[\]#])", r"\\\1", _one_line(text))


def _escaped(text: str) -> str:
    return html.escape(text)


def _drawn(cell: Cell) -> str:
    if isinstance(cell, str):
        return _escaped(cell)
    # From -100 % at the left to +100 % at the right, zero in the middle.
    places = {"zero": 50.0, "rate": 50 + 50 * cell.rate}
    low, high = (50 + 50 * end for end in cell.interval)
    start, width = min(places.values()), abs(places["rate"] - 50)
    marks = [
        f'<i class=fill style="left:{start:.2f}%;width:{width:.2f}%"></i>',
        '<i class=zero style="left:50%"></i>',
        f'<i class=interval style="left:{low:.2f}%;width:{high - low:.2f}%"></i>',
    ]
    if cell.paper is not None:
        marks.append(f'<i class=paper style="left:{50 + 50 * cell.paper:.2f}%"></i>')
    kind = "loss" if cell.rate < 0 else "win"
    return (
        f"<span class=rate>{_escaped(str(cell))}</span>"
        f'<span class="bar {kind}" aria-hidden=true>{"".join(marks)}</span>'
    )
