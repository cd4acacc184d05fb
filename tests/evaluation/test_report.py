"""The report of an evaluation that is made up, with names that are markup."""

import html.parser
import io
import itertools
from typing import Any

import pytest
from rich.console import Console

from mara_fast.evaluation import report
from mara_fast.evaluation.answers import Answers
from mara_fast.evaluation.evaluate import Comparison, Evaluation, Rate
from mara_fast.evaluation.spec import EvalSpec
from mara_fast.outputs import DecodingStats


def length(prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    spec = EvalSpec.from_dict(
        {
            "name": "a *bold*\nname <b>",
            "systems": {"a": {}, "b": {}},
            "datasets": {"one": "tiny"},
            "comparisons": ["a vs b"],
            "judge": {"rewards": [length, length], "weights": [1, -1], "names": ["[/x]", "a|b"]},
            "notes": ["of two\nlines"],
        }
    )
    rate = Rate(num_won=2, num_tied=0, num_lost=0, rate=1.0, interval=(1.0, 1.0), p_value=0.5)
    names = ("[/x]", "a|b")
    answers = Answers(samples=(("",),) * 2, stats=DecodingStats(), num_failed=0, settings={})
    return Evaluation(
        spec=spec,
        reward_names=names,
        limit=2,
        num_prompts={"one": (2, 670, 672)},
        comparisons=(
            Comparison(
                ours="a",
                theirs="b",
                dataset="one",
                preference=rate,
                by_reward=dict.fromkeys(names, rate),
                paper={},
            ),
        ),
        answers={"a": {"one": answers}, "b": {"one": answers}},
        mean_scores={name: {"one": {"[/x]": 1.5, "a|b": None}} for name in ("a", "b")},
        judge_settings={},
        made={"date": "today", "hardware": "none", "versions": {}},
    )


class Read(html.parser.HTMLParser):
    """Headings in their order, and what scrolls."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.regions: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self.levels.append(int(tag[1]))
        if ("class", "wide") in attributes:
            self.regions.append(dict(attributes))


@pytest.mark.parametrize("title", [None, "several"])
def test_the_page_can_be_walked_through(evaluation: Evaluation, title: str | None) -> None:
    read = Read()
    read.feed(report.page(evaluation, title=title))
    assert read.levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(read.levels))
    for region in read.regions:
        assert region["tabindex"] == "0" and region["role"] == "region" and region["aria-label"]
    assert all(all(table.columns) for table in report.tables(evaluation))


def test_names_are_no_markup(evaluation: Evaluation) -> None:
    text = report.markdown(evaluation)
    assert text.startswith("# a \\*bold\\* name &lt;b>\n")
    assert "- of two lines\n" in text
    assert "| mean [/x] | mean a\\|b, lower is better |" in text
    console = Console(file=io.StringIO(), width=200)
    for table in report.tables(evaluation):
        console.print(report.for_terminal(table))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("[/x]") == 2


def test_what_was_evaluated_is_said(evaluation: Evaluation) -> None:
    text = report.markdown(evaluation)
    assert "one: 2 of 670 unique prompts (672 rows)" in text
    assert "ended in an error, which count as empty" in text
