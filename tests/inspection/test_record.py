"""The schema of a trace: texts of tokens, plain values, and back."""

import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

import speaker
from mara_fast import Generation
from mara_fast.inspection.record import TRACE_VERSION
from mara_fast.inspection.terminal import print_generation
from mara_fast.token_text import TokenNames, decode_text, text_pieces
from speaker import OPTIONS, PROMPTS


def record_of(generation: Generation) -> dict[str, Any]:
    """As another program reads it: JSON has neither NaN nor infinities."""
    return json.loads(json.dumps(generation.to_dict(), allow_nan=False))


def traced(prompt: str = PROMPTS[1], **options: Any) -> Generation:
    [result] = speaker.engine().generate(prompt, trace=True, **(OPTIONS | options))
    return result


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 8, "fallback": "first", "threshold": 0.8}, {"ignore_eos": True, "seed": 2}],
    ids=str,
)
def test_pieces_add_up_to_the_text(options: dict[str, Any]) -> None:
    options = {"acceptance": "sample", "max_new_tokens": 40, "trace": True} | options
    for result in speaker.engine().generate(list(PROMPTS), **options):
        assert result.trace is not None
        texts = [token.text for token in result.trace if not token.is_special]
        assert "".join(map(str, texts)) == result.text
        for token in result.trace:
            assert token.is_special == (token.token_id in (speaker.BOS, speaker.EOS, speaker.PAD))
            assert token.candidates[token.rank].is_special == token.is_special
            assert all(candidate.text for candidate in token.candidates)


def test_pieces_of_a_text_that_was_stopped() -> None:
    whole = traced(max_new_tokens=30)
    stop = str(whole.text)[10:12]
    result = traced(max_new_tokens=30, stop_strings=[stop])
    assert result.finish_reason == "stop" and result.trace is not None
    pieces = "".join(str(token.text) for token in result.trace if not token.is_special)
    assert pieces.startswith(f"{result.text}{stop}")


def test_a_character_comes_with_the_token_that_completes_it() -> None:
    tokenizer = speaker.tokenizer()
    ids = tokenizer("a🎉b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    pieces = text_pieces(ids, lambda some: decode_text(tokenizer, some))
    assert pieces == ["a", "", "", "", "🎉", "b"]
    assert text_pieces(ids[:3], lambda some: decode_text(tokenizer, some)) == ["a", "", "\ufffd"]
    assert text_pieces([], lambda some: decode_text(tokenizer, some)) == []


def test_pieces_of_a_tokenizer_that_drops_the_first_space() -> None:
    words = {0: " hello", 1: " world", 2: ""}

    def decode(ids: Any) -> str:
        return "".join(words[token_id] for token_id in ids).removeprefix(" ")

    assert text_pieces([0, 1], decode) == ["hello", " world"]
    # Behind a token without a text the space is dropped again, were it decoded from there.
    assert text_pieces([0, 2, 1, 2], decode) == ["hello", "", " world", ""]


def test_names_of_tokens() -> None:
    tokenizer = speaker.tokenizer()
    names = TokenNames(tokenizer)
    assert names[speaker.EOS] == "</s>" and names.is_special(speaker.EOS)
    [space] = tokenizer(" ", add_special_tokens=False)["input_ids"]
    assert names[space] == " " and not names.is_special(space)
    parts = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert [names[token_id] for token_id in parts] == ["\\xc3", "\\xa9"]


def test_round_trip(spoken: list[Generation]) -> None:
    for result in spoken:
        record = record_of(result)
        assert record["trace_version"] == TRACE_VERSION == 1
        assert len(record["trace"]) == len(record["token_ids"])
        assert record["options"]["trace"] is True
        again = Generation.from_dict(record)
        assert again == result
        assert again.to_dict() == result.to_dict()
        assert Generation.from_dict(record | {"id": 3, "of_the_future": {}}) == result


def test_round_trip_without_a_trace() -> None:
    [result] = speaker.engine().generate("Hi", **OPTIONS)
    record = record_of(result)
    assert not record.keys() & {"trace", "trace_version", "options", "counterfactuals"}
    again = Generation.from_dict(record)
    assert again.trace is None and again.tokens == () and again.text == result.text
    assert again.stats == result.stats and again.token_ids == result.token_ids
    assert record_of(again) == record


def test_round_trip_without_a_tokenizer() -> None:
    engine = speaker.engine(with_text=False)
    [result] = engine.generate([[3, 4]], trace=True, max_new_tokens=3)
    assert result.trace is not None and all(token.text is None for token in result.trace)
    assert Generation.from_dict(record_of(result)) == result


def test_what_json_cannot_say() -> None:
    result = traced()
    assert result.trace is not None
    first = result.trace[0]
    impossible = dataclasses.replace(first.candidates[-1], logprob=-math.inf)
    first = dataclasses.replace(first, candidates=(*first.candidates[:-1], impossible))
    result = dataclasses.replace(result, trace=(first, *result.trace[1:]))
    record = record_of(result)
    assert record["trace"][0]["candidates"][-1]["logprob"] is None
    assert Generation.from_dict(record) == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trace_version": 2}, "trace_version is 2, expected 1; it was written by a newer mara"),
        ({"trace_version": None}, "trace_version is None, expected 1; decode again"),
        ({"trace_version": 0}, "trace_version is 0, expected 1; decode again"),
        ({"trace_version": True}, "trace_version is True, expected 1"),
        ({"trace_version": "1"}, "trace_version is '1', expected 1"),
        ({"trace": []}, "trace and token_ids are not of the same tokens"),
        ({"trace": 3}, "not a result of mara-fast"),
        ({"trace": [{}]}, "not a result of mara-fast"),
        ({"stats": None}, "not a result of mara-fast: stats is None; allowed: an object"),
        ({"counterfactuals": [{}]}, r"counterfactuals\[0\] is \[\]; allowed: .* with 'position'"),
        ({"text": 5}, "text is 5; allowed: a text, or null"),
        ({"prompt": None}, "prompt is None; allowed: a text, a chat or a list of token ids"),
        ({"options": "x"}, "options is 'x'; allowed: an object, or null"),
        ({"alarms": [None]}, r"alarms\[0\] is None; allowed: a text"),
        ({"finish_reason": "end"}, "finish_reason is 'end'; allowed: eos, length, stop, error"),
        ({"token_ids": [-1]}, r"token_ids\[0\] is -1; allowed: an integer in \[0, 2\*\*63\)"),
    ],
    ids=str,
)
def test_records_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generation.from_dict(record_of(traced()) | change)


@pytest.mark.parametrize(
    ("place", "value", "allowed"),
    [
        (("stats", "accepted_ranks"), [], "an object of counts by integer"),
        (("stats", "accepted_ranks"), {"x": 1}, "an object of counts by integer"),
        (("stats", "num_tokens"), 10**400, "an integer in [0, 2**63)"),
        (("trace", 0, "logprob"), 1000000, "a number <= 0"),
        (("trace", 0, "accept_prob"), -1, "a number in [0, 1], or null"),
        (("trace", 0, "accept_prob"), math.nan, "a number in [0, 1], or null"),
        (("trace", 0, "accept_prob"), None, "a number where verdict is 'accepted'"),
        (("trace", 0, "verdict"), "taken", "forced, accepted, fallback, plain"),
        (("trace", 0, "rank"), 99, "below num_candidates="),
        (("trace", 0, "candidates", 0, "logprob"), "-1", "a number <= 0"),
        (("trace", 0, "candidates", 0, "is_special"), 1, "true or false"),
        (("trace", 0, "candidates", 0, "accepted"), None, "null where accept_prob is"),
        (("counterfactuals", 0, "position"), [], "an integer in [0, 2**63)"),
        (("counterfactuals", 0, "position"), 12, "below the number of tokens, 12"),
    ],
    ids=str,
)
def test_values_refused(
    spoken: list[Generation], place: tuple[Any, ...], value: Any, allowed: str
) -> None:
    """The field, what it is, what is allowed."""
    record = record_of(spoken[0])
    *path, last = place
    parent = record
    for key in path:
        parent = parent[key]
    parent[last] = value
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    with pytest.raises(ValueError, match=re.escape(name.removeprefix("."))) as caught:
        Generation.from_dict(record)
    assert f"; allowed: {allowed}" in str(caught.value)


_WRONG = (None, True, -1, 0, 7, 10**30, 1.5, -2.5, math.nan, -math.inf, "", "x", "3", [], [None])
_WRONG += ([3], {}, {"x": {}}, [{"role": 1, "content": None}], ["\ud83c"])  # type: ignore[assignment]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value within; of long lists the first two."""
    keys = list(value)[:60] if isinstance(value, dict) else range(min(2, len(value)))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def test_any_value_may_be_wrong(spoken: list[Generation]) -> None:
    """It is refused as a record is, or can be shown."""
    record = record_of(spoken[2])
    record["alarms"], record["error"] = ["look"], None
    num_refused = num_shown = 0
    console = Console(file=io.StringIO(), width=100)
    for parent, key in list(places(record)):
        kept = parent[key]
        for wrong in _WRONG:
            parent[key] = wrong
            try:
                found = Generation.from_dict(record)
            except ValueError as error:
                assert len(str(error)) < 300
                num_refused += 1
            else:
                print_generation(found, console)
                found.to_html().encode()
                num_shown += 1
        parent[key] = kept
    assert num_refused > 1000 and num_shown > 100


def test_no_records_refused() -> None:
    for value in ([], "x", None):
        with pytest.raises(ValueError, match="a result must be an object, got"):
            Generation.from_dict(value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="it has no 'prompt'"):
        Generation.from_dict({})
