"""The page as a file: what is in it, and what must not be."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import speaker
from mara_fast import Generation
from mara_fast.inspection import html_page
from mara_fast.inspection.unseen import is_unseen


class Elements(HTMLParser):
    """The elements of a page: tags with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def data_of(text: str) -> dict[str, Any]:
    return json.loads(Elements(text).scripts[0])


def test_it_holds_what_the_trace_holds(spoken: list[Generation]) -> None:
    text = html_page(spoken, ids=["a", 1, "c", "d"], settings={"model": "some/model"})
    results = data_of(text)["results"]
    assert [result["id"] for result in results] == ["a", "1", "c", "d"]
    for result, generation in zip(results, spoken, strict=True):
        assert generation.trace is not None
        assert result["prompt"] == generation.prompt
        assert ["model", "some/model"] in result["options"]
        assert ["max_new_tokens", "12"] in result["options"]
        assert [t["text"] for t in result["tokens"]] == [t.text for t in generation.trace]
        for shown, token in zip(result["tokens"], generation.trace, strict=True):
            assert (shown["rank"], shown["verdict"]) == (token.rank, token.verdict)
            assert len(shown["candidates"]) == len(token.candidates)
            if token.accept_prob is None:
                assert shown["accept_prob"] is None
            else:
                assert shown["accept_prob"] == pytest.approx(token.accept_prob, rel=1e-4)
        assert len(result["counterfactuals"]) == len(generation.counterfactuals or ())


def test_it_loads_nothing(spoken: list[Generation]) -> None:
    text = html_page(spoken)
    elements = Elements(text)
    tags = {tag for tag, _ in elements.tags}
    assert not tags & {"link", "img", "iframe", "base", "object", "form"}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in elements.tags)
    assert not re.search(r"https?://|@import|url\(", text)
    [policy] = [str(a["content"]) for t, a in elements.tags if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_texts_do_not_leave_their_element(hostile: Generation) -> None:
    text = html_page([hostile], ids=["</script><b>"], settings={"model": "<i>"})
    text.encode()
    usual = Elements(html_page([speaker_result()]))
    found = Elements(text)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in usual.tags]
    [result] = data_of(text)["results"]
    assert [token["text"] for token in result["tokens"]] == [t.text for t in hostile.tokens]
    assert "harmed = 1</script>" not in text


def speaker_result() -> Generation:
    [result] = speaker.engine().generate("Hi", trace=True, max_new_tokens=2)
    return result


def test_to_html(tmp_path: Path) -> None:
    result = speaker_result()
    text = result.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text == result.to_html()
    inside = result._repr_html_()
    assert inside is not None
    [(tag, attributes)] = Elements(inside).tags
    assert tag == "iframe" and attributes["srcdoc"] == text
    assert attributes["sandbox"] == "allow-scripts"


def test_without_a_trace() -> None:
    [result] = speaker.engine().generate("Hi", max_new_tokens=2)
    with pytest.raises(ValueError, match="decode with trace=True"):
        result.to_html()
    assert result._repr_html_() is None
    with pytest.raises(ValueError, match="there is no generation to show"):
        html_page([])
    results = [speaker_result()] * 2
    with pytest.raises(ValueError, match=r"ids=\['a'\] is not one id for each of 2 generations"):
        html_page(results, ids=["a"])
    with pytest.raises(ValueError, match=r"got one Generation: give \[generation\]"):
        html_page(results[0])  # type: ignore[arg-type]


def test_what_is_nearly_certain_is_not_certain(spoken: list[Generation]) -> None:
    """A candidate that was rejected is not shown at 100.0%."""
    assert spoken[0].trace is not None
    first = spoken[0].trace[0]
    for value, shown in ((1 - 1e-9, 0.99999), (1.0, 1.0), (1e-9, 1e-9), (0.0, 0.0), (0.5, 0.5)):
        token = dataclasses.replace(first, accept_prob=value, logprob=-0.0 if value == 1 else -1e-9)
        result = dataclasses.replace(spoken[0], trace=(token,), counterfactuals=None)
        [found] = data_of(html_page([result]))["results"][0]["tokens"]
        assert found["accept_prob"] == shown and found["prob"] == (1.0 if value == 1 else 0.99999)
    token = dataclasses.replace(first, logprob=-1e4)
    [found] = data_of(html_page([dataclasses.replace(result, trace=(token,))]))["results"]
    assert found["tokens"][0]["prob"] > 0


def test_one_rule_for_what_cannot_be_seen() -> None:
    assert [c for c in "a \u200dé🎉\ufe0f中‍" if is_unseen(c)] == []
    unseen = (
        "\x00\n\x7f\xa0\xad\u034f\u115f\u1160\u202e\u2028\u2800\u3164\ufeff\uffa0\ud83c\U000e0041"
    )
    assert "".join(filter(is_unseen, unseen)) == unseen
    assert r"\u{e0020}-\u{e007f}" in data_of(speaker_result().to_html())["unseen"]


def test_without_texts_and_without_tokens() -> None:
    engine = speaker.engine(with_text=False)
    [result] = engine.generate([[3, 4]], trace=True, max_new_tokens=3)
    [shown] = data_of(result.to_html())["results"]
    assert shown["prompt"] == [3, 4] and shown["tokens"][0]["text"] is None
    [empty] = engine.generate([[3, 4]], trace=True, max_new_tokens=0)
    assert data_of(empty.to_html())["results"][0]["tokens"] == []
