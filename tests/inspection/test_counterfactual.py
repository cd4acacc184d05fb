"""Counterfactuals: what a plain engine says behind the same tokens."""

import dataclasses
from typing import Any

import pytest

import speaker
from mara_fast import Engine, Generation
from mara_fast.inspection import with_counterfactuals
from mara_fast.inspection.counterfactual import changed_positions
from speaker import OPTIONS, PROMPTS


def test_they_equal_a_plain_engines_answer(spoken: list[Generation]) -> None:
    plain = speaker.engine(aligned=False)
    num_found = 0
    for result in spoken:
        assert result.counterfactuals is not None
        positions = [item.position for item in result.counterfactuals]
        assert positions == changed_positions(result)[:3]
        for item in result.counterfactuals:
            prefix = result.prompt_token_ids + result.token_ids[: item.position]
            [wanted] = plain.generate([prefix], max_new_tokens=6)
            assert item.token_ids == wanted.token_ids
            assert item.finish_reason == wanted.finish_reason
            assert result.trace is not None
            token = result.trace[item.position]
            assert token.rank and item.token_ids[0] == token.candidates[0].token_id
            num_found += 1
    assert num_found >= 3


def test_their_text_goes_on_from_the_text_before(spoken: list[Generation]) -> None:
    tokenizer = speaker.tokenizer()
    for result in spoken:
        for item in result.counterfactuals or ():
            before = "".join(
                str(token.text)
                for token in (result.trace or ())[: item.position]
                if not token.is_special
            )
            ids = result.token_ids[: item.position] + item.token_ids
            assert before + str(item.text) == tokenizer.decode(ids, skip_special_tokens=True)


def test_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = speaker.engine()
    results = engine.generate(list(PROMPTS[:4]), trace=True, **OPTIONS)
    batches: list[list[Any]] = []
    generate = Engine.generate

    def counted(self: Engine, prompts: Any, *args: Any, **options: Any) -> list[Generation]:
        batches.append(prompts)
        return generate(self, prompts, *args, **options)

    monkeypatch.setattr(Engine, "generate", counted)
    found = with_counterfactuals(results, engine, num_tokens=2, most=1)
    assert len(batches) == 1
    assert sum(len(item.counterfactuals or ()) for item in found) == len(batches[0]) > 1
    assert with_counterfactuals(results, engine, most=0)[0].counterfactuals == ()
    assert len(batches) == 1


def test_what_ends_a_sequence_ends_them() -> None:
    engine = speaker.engine()
    [result] = engine.generate(PROMPTS[1], trace=True, **OPTIONS)
    [free] = with_counterfactuals([result], engine, num_tokens=6, most=1)
    assert free.counterfactuals
    second = free.counterfactuals[0].token_ids[1]
    options = dict(result.options or {}) | {"eos_token_id": [second]}
    ended = with_counterfactuals(
        [dataclasses.replace(result, options=options), result], engine, num_tokens=6, most=1
    )
    first, other = (item.counterfactuals for item in ended)
    assert first and first[0].finish_reason == "eos" and len(first[0].token_ids) == 2
    assert other == free.counterfactuals


def test_without_room_there_is_none() -> None:
    engine = Engine(speaker.model(), speaker.agent(), speaker.tokenizer(), max_length=40)
    [result] = engine.generate([list(range(3, 31))], trace=True, max_new_tokens=12)
    changed = changed_positions(result)
    [found] = with_counterfactuals([result], engine, num_tokens=8, most=40)
    assert found.counterfactuals is not None
    assert [item.position for item in found.counterfactuals] == [p for p in changed if p <= 4]


def test_refused() -> None:
    engine = speaker.engine()
    results = engine.generate("Hi", **OPTIONS)
    with pytest.raises(ValueError, match="has no trace: decode with trace=True"):
        with_counterfactuals(results, engine)
    refused: tuple[tuple[Any, Any, dict[str, Any], str], ...] = (
        ([], engine, {"num_tokens": 0}, "num_tokens=0 is not allowed"),
        ([], engine, {"most": -1}, "most=-1 is not allowed"),
        ([], engine, {"most": "3"}, "most='3' is not allowed"),
        (results[0], engine, {}, r"got one Generation: give \[generation\]"),
        (engine, results, {}, "must be a sequence of Generations, got Engine"),
        (["Hi"], engine, {}, r"must be a sequence of Generations, \[0\] is str"),
        (results, "tiny", {}, "engine must be an Engine, got str"),
        (results, engine, {"ids": ["a", "b"]}, "is not one id for each of 1 generations"),
    )
    for generations, its_engine, options, message in refused:
        with pytest.raises(ValueError, match=message):
            with_counterfactuals(generations, its_engine, **options)


def test_another_model_continues_nothing(spoken: list[Generation]) -> None:
    """It would write what the model that decided these would never have said."""
    for other, message in (
        (Engine("tiny", False), r"token \d+ at position \d+ adds .* there, and .* here"),
        (Engine(speaker.build("llama", vocab_size=9), False, False), "here there are 9"),
    ):
        with pytest.raises(ValueError, match=f"result 'x' was made by another model.*{message}"):
            with_counterfactuals(spoken[:1], other, ids=["x"])


def test_one_plain_engine_for_all(
    spoken: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    build = Engine.__init__
    monkeypatch.setattr(
        Engine, "__init__", lambda self, *args, **kw: made.append(build(self, *args, **kw))
    )
    ends = [{"eos_token_id": [token_id]} for token_id in (300, 301)]
    several = [dataclasses.replace(spoken[0], options=options) for options in ends]
    with_counterfactuals(several, speaker.engine(), num_tokens=2, most=1)
    assert len(made) == 1
