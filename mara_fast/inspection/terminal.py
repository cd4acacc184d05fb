"""How each token was chosen, in a terminal: the text, then where the agent changed it.

Colour is by accept probability. What it says is also written: a token that is not the language
model's first has a number behind it, which is that of its row below.
"""

import math

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mara_fast.answering import summary
from mara_fast.inspection.counterfactual import changed_positions
from mara_fast.inspection.unseen import is_unseen
from mara_fast.outputs import CandidateTrace, Counterfactual, Generation, TokenTrace

# The sixteen colours that every terminal has, in the shades its owner chose.
_STEPS = (
    (0.95, "black on bright_cyan", "95% and more"),
    (0.75, "black on cyan", "75 to 95%"),
    (0.5, "black on bright_yellow", "50 to 75%"),
    (0.25, "black on yellow", "25 to 50%"),
    (0.0, "bright_white on red", "less than 25%"),
)
_UNASKED = "dim"
_MOST_RANKS = 6
"""Candidates listed of a position; where all were rejected there are 40 and more."""


def print_generation(generation: Generation, console: Console, *, title: str | None = None) -> None:
    """Prints a generation.

    Args:
        generation: decoded with ``trace=True``.
        console: where to.
        title: above it.

    Raises:
        ValueError: it has no trace.
    """
    changed = changed_positions(generation)
    if title is not None:
        console.rule(Text(visible(title), "bold"), align="left")
    console.print(_coloured(generation, changed), soft_wrap=True)
    console.print()
    if _is_without_agent(generation):
        console.print(Text("Decoded without an agent.", "dim"))
    elif not console.no_color and console.is_terminal:
        console.print(_legend())
    console.print(Text(summary(generation.stats), "dim"), soft_wrap=True)
    for alarm in generation.alarms:
        console.print(Text(f"! {visible(alarm)}", "bold"), soft_wrap=True)
    if changed:
        console.print(Padding(_table(generation, changed), (1, 0, 0, 0)))


def visible(text: str) -> str:
    """The text on one line, with a sign for all that a terminal would obey, or not show."""
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    if character == "\n":
        return "↵"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return f"⟨U+{code:04X}⟩" if is_unseen(character) else character


def _coloured(generation: Generation, changed: list[int]) -> Text:
    text = Text()
    numbers = {position: number for number, position in enumerate(changed, start=1)}
    for position, token in enumerate(generation.trace or ()):
        shown = f"#{token.token_id} " if token.text is None else token.text
        word = shown.lstrip(" ")
        text.append(" " * (len(shown) - len(word)))
        number = numbers.get(position)
        style = _style(token) + (" bold underline" if number else "")
        text.append(visible(word).replace("↵", "↵\n"), style)
        if number:
            text.append(f"[{number}]", "bold")
    return text


def _style(token: TokenTrace) -> str:
    if token.accept_prob is None:
        return "" if token.verdict == "plain" else _UNASKED
    return next(style for least, style, _ in _STEPS if token.accept_prob >= least)


def _is_without_agent(generation: Generation) -> bool:
    trace = generation.trace or ()
    return bool(trace) and all(token.verdict == "plain" for token in trace)


def _legend() -> Text:
    text = Text("accept probability: ")
    for _, style, name in _STEPS:
        text.append(f" {name} ", style)
        text.append(" ")
    return text.append("not asked", _UNASKED)


def _table(generation: Generation, changed: list[int]) -> Table:
    others = {item.position: item for item in generation.counterfactuals or ()}
    table = Table(
        title="Where the language model's first was not taken",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("", justify="right", style="bold")
    table.add_column("token", justify="right")
    table.add_column("taken", overflow="fold")
    table.add_column("candidates: rank, LM, agent", overflow="fold")
    if others:
        table.add_column("without the agent, from here", overflow="fold", ratio=1)
    assert generation.trace is not None
    for number, position in enumerate(changed, start=1):
        token = generation.trace[position]
        row = [str(number), str(position + 1), _named(token.token_id, token.text), _ranks(token)]
        if others:
            row.append(_continuation(others.get(position)))
        table.add_row(*(Text(cell) for cell in row))
    return table


def _ranks(token: TokenTrace) -> str:
    """A line for each candidate that was asked about, and for the language model's first."""
    asked = [
        rank
        for rank, candidate in enumerate(token.candidates)
        if rank == 0 or candidate.accept_prob is not None
    ]
    shown = [rank for rank in asked if rank == token.rank or rank in asked[: _MOST_RANKS - 1]]
    lines = [_rank(rank, token.candidates[rank]) for rank in shown]
    if len(shown) < len(asked):
        lines.append(f"and {len(asked) - len(shown)} more")
    return "\n".join(lines)


def _rank(rank: int, candidate: CandidateTrace) -> str:
    verdict = {True: "✓", False: "✕", None: "–"}[candidate.accepted]
    agent = "" if candidate.accept_prob is None else f" {_percent(candidate.accept_prob)}"
    name = _named(candidate.token_id, candidate.text)
    return f"{rank} {_percent(math.exp(candidate.logprob))} {verdict}{agent} {name}"


def _percent(value: float) -> str:
    if 0 < value < 0.0005:
        return "< 0.1%"
    return "> 99.9%" if 0.9995 <= value < 1 else f"{value:.1%}"


def _named(token_id: int, text: str | None) -> str:
    if text is None:
        return f"#{token_id}"
    return visible(text).replace(" ", "␣") or "(part of a character)"


def _continuation(other: Counterfactual | None) -> str:
    if other is None:
        return ""
    text = " ".join(f"#{i}" for i in other.token_ids) if other.text is None else other.text
    end = {"length": " …", "eos": " (end)"}.get(other.finish_reason, "")
    return visible(text).lstrip(" ") + end
