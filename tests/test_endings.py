"""How a sequence ends: EOS, length, stop strings, and all of them at once."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import speaker
from mara_fast import DecodingConfig, Engine
from mara_fast.collect import stop_position
from speaker import EOS, OPTIONS, PROMPTS, VOCAB_SIZE, alone, same


def follows(tokens: list[int]) -> Iterator[int]:
    """Positions where a token appears for the first time."""
    seen: set[int] = set()
    for position, token in enumerate(tokens):
        if token not in seen:
            yield position
        seen.add(token)


def test_eos_ends_and_is_kept() -> None:
    tokens = alone("Hi").token_ids
    for position in list(follows(tokens))[::3]:
        for eos in (tokens[position], [tokens[position]], (tokens[position], VOCAB_SIZE + 7)):
            [result] = speaker.engine().generate("Hi", eos_token_id=eos, **OPTIONS)
            assert result.token_ids == tokens[: position + 1]
            assert result.finish_reason == "eos"
    [result] = speaker.engine().generate("Hi", eos_token_id=tokens[-1], **OPTIONS)
    assert result.finish_reason == "eos"


def test_the_first_of_several_eos() -> None:
    tokens = alone("Hi").token_ids
    [result] = speaker.engine().generate("Hi", eos_token_id=[tokens[9], tokens[2]], **OPTIONS)
    assert result.token_ids == tokens[:3]


def test_ignore_eos() -> None:
    tokens = alone("Hi").token_ids
    options: dict[str, Any] = {"eos_token_id": tokens[2], **OPTIONS}
    [result] = speaker.engine().generate("Hi", ignore_eos=True, **options)
    assert result.token_ids == tokens and result.finish_reason == "length"


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_min_new_tokens_takes_eos_away(aligned: bool, ignore_eos: bool) -> None:
    engine = speaker.engine(aligned=aligned)
    [free] = engine.generate("Hi", eos_token_id=(), **OPTIONS)
    eos = free.token_ids[2]
    options: dict[str, Any] = {"eos_token_id": eos, "ignore_eos": ignore_eos, **OPTIONS}
    for least in (2, 3, 12):
        [result] = engine.generate("Hi", min_new_tokens=least, trace=True, **options)
        assert eos not in result.token_ids[:least]
        if least == 2:
            assert result.token_ids[:3] == free.token_ids[:3]
        assert len(result.token_ids) >= least
        for token in result.trace[:least]:
            assert eos not in [candidate.token_id for candidate in token.candidates]


def test_an_eos_outside_the_vocabulary_never_comes() -> None:
    [result] = speaker.engine().generate("Hi", eos_token_id=VOCAB_SIZE + 7, **OPTIONS)
    assert result.token_ids == alone("Hi").token_ids


def test_min_new_tokens_with_an_eos_outside_the_vocabulary() -> None:
    [result] = speaker.engine().generate(
        "Hi", eos_token_id=VOCAB_SIZE + 7, min_new_tokens=3, **OPTIONS
    )
    assert result.token_ids == alone("Hi").token_ids


def test_eos_of_the_config_then_the_model_then_the_tokenizer() -> None:
    model = copy.deepcopy(speaker.model())
    engine = Engine(model, False, speaker.tokenizer())
    model.generation_config.eos_token_id = [5, 6]
    model.config.eos_token_id = 7
    assert engine.eos_ids(DecodingConfig(eos_token_id=4)) == (4,)
    assert engine.eos_ids(DecodingConfig(eos_token_id=())) == ()
    assert engine.eos_ids(DecodingConfig()) == (5, 6)
    model.generation_config.eos_token_id = None
    assert engine.eos_ids(DecodingConfig()) == (7,)
    model.config.eos_token_id = None
    assert engine.eos_ids(DecodingConfig()) == (EOS,)
    engine.tokenizer = None
    assert engine.eos_ids(DecodingConfig()) == ()


# Stop strings


def text_of(prompt: str) -> str:
    text = alone(prompt, 16).text
    assert text is not None
    return text


def stops_of(text: str) -> Iterator[str]:
    """Parts of a text of every length, none with half a character in it."""
    for length in (1, 2, 3, 5):
        for start in range(0, len(text) - length + 1, 4):
            part = text[start : start + length]
            if "\N{REPLACEMENT CHARACTER}" not in part:
                yield part


def test_stop_strings_within_and_across_tokens() -> None:
    num_stops = num_across = 0
    decode = speaker.tokenizer().decode
    stops = [(p, s) for p in (PROMPTS[0], PROMPTS[3], PROMPTS[7]) for s in stops_of(text_of(p))]
    for prompt, stop in stops:
        whole = alone(prompt, 16)
        [result] = speaker.engine().generate(prompt, max_new_tokens=16, stop_strings=stop)
        assert result.finish_reason == "stop"
        assert result.text == text_of(prompt)[: text_of(prompt).find(stop)]
        count = len(result.token_ids)
        assert result.tokens == whole.tokens[:count]
        assert stop in decode(result.token_ids) and stop not in decode(result.token_ids[:-1])
        assert result.stats.num_tokens == count
        num_stops += 1
        num_across += all(stop not in decode([token]) for token in result.token_ids)
        events = list(speaker.engine().stream(prompt, max_new_tokens=16, stop_strings=stop))
        assert "".join(event.text for event in events) == result.text
        assert events[-1].generation is not None and same(events[-1].generation, result)
    assert num_stops > 10 and num_across > 3


def test_the_first_of_several_stop_strings() -> None:
    text = alone("Hi", 24).text or ""
    stops = [part for part in stops_of(text) if len(part) == 2]
    wanted = min(text.find(stop) for stop in stops[1:])
    [result] = speaker.engine().generate("Hi", max_new_tokens=24, stop_strings=stops[:0:-1])
    assert result.text == text[:wanted]


def test_two_stop_strings_in_one_token() -> None:
    """The text is cut before the one that begins first, however they are listed."""
    decode = speaker.tokenizer().decode
    found = 0
    for prompt in PROMPTS:
        ids = alone(prompt, 24).token_ids
        for position, token in enumerate(ids):
            before, text = decode(ids[:position]), decode([token])
            if len(text) < 2 or decode(ids[: position + 1]) != before + text:
                continue
            first, second = text[0], text[1:]
            if first in before or second in before:
                continue
            found += 1
            for stops in ([first, second], [second, first]):
                [result] = speaker.engine().generate(prompt, max_new_tokens=24, stop_strings=stops)
                assert result.text == before
                assert result.token_ids == ids[: position + 1]
            break
    assert found


def test_a_stop_string_in_the_prompt_or_never_written() -> None:
    for stop in ("assistant: ", "never written"):
        [result] = speaker.engine().generate("Hi", stop_strings=stop, **OPTIONS)
        assert same(result, alone("Hi"))


def test_stop_string_and_eos_and_length_at_once() -> None:
    """The stop string counts first: its text is cut, whatever else ends there."""
    whole = alone("Hi", 24)
    decode = speaker.tokenizer().decode
    position = next(
        p
        for p in follows(whole.token_ids)
        if p > 1 and "\N{REPLACEMENT CHARACTER}" not in decode(whole.token_ids[p : p + 1])
    )
    last = whole.token_ids[position]
    stop = decode([last])
    before = decode(whole.token_ids[:position])
    assert whole.text is not None and whole.text.find(stop) == len(before)
    [result] = speaker.engine().generate(
        "Hi", max_new_tokens=position + 1, eos_token_id=last, stop_strings=stop
    )
    assert result.finish_reason == "stop"
    assert result.token_ids == whole.token_ids[: position + 1]
    assert result.text == before
    # A token before it: EOS comes first, and the stop string never.
    [result] = speaker.engine().generate(
        "Hi", eos_token_id=whole.token_ids[position - 1], stop_strings=stop
    )
    assert result.finish_reason == "eos"


def test_a_special_token_is_no_text_to_stop_at() -> None:
    tokens = alone("Hi").token_ids
    tokenizer = copy.deepcopy(speaker.tokenizer())
    special = tokenizer.convert_ids_to_tokens(tokens[3])
    tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    engine = Engine(speaker.model(), speaker.agent(), tokenizer)
    [result] = engine.generate([alone("Hi").prompt_token_ids], stop_strings=special, **OPTIONS)
    assert result.token_ids == tokens and special not in (result.text or "")


def test_stop_strings_stop_only_their_sequence() -> None:
    stop = next(part for part in stops_of(alone("Hi").text or "") if len(part) == 2)
    results = speaker.engine().generate(list(PROMPTS), stop_strings=stop, **OPTIONS)
    for result, prompt in zip(results, PROMPTS, strict=True):
        text = alone(prompt).text or ""
        assert result.text == (text.split(stop)[0] if stop in text else text)
        assert result.finish_reason == ("stop" if stop in text else "length")
    assert {result.finish_reason for result in results} == {"stop", "length"}


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="stop_strings need a tokenizer; this engine has none"):
        speaker.engine(with_text=False).generate([[3]], stop_strings="x")


class BytesTokenizer:
    """A token is a byte, or special; the first space is dropped, as SentencePiece does."""

    def __init__(self) -> None:
        self.most = 0

    def decode(self, ids: list[int], **_: Any) -> str:
        self.most = max(self.most, len(ids))
        text = bytes(i for i in ids if i < 256).decode(errors="replace")
        return text.removeprefix(" ")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_stop_strings_are_found_in_the_end_of_a_text(data: st.DataObject) -> None:
    """As in the whole text, decoded anew with every token."""
    text = data.draw(st.text(alphabet=" aé\N{GRINNING FACE}", max_size=80), "text")
    stops = data.draw(st.lists(st.text(alphabet=" aé", min_size=1, max_size=4), min_size=1))
    ids = list(text.encode())
    for place in data.draw(st.lists(st.integers(0, len(ids)), max_size=3), "special tokens"):
        ids[place:place] = [256] * 20
    tokenizer = BytesTokenizer()
    found = next(
        (n for n in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stops)),
        None,
    )
    start, new = 0, data.draw(st.integers(1, 4), "new tokens a turn")
    stopped = None
    while start < len(ids) and stopped is None:
        now = ids[: start + new]
        stopped = stop_position(now, start=start, stop_strings=stops, tokenizer=tokenizer)
        start = len(now)
    assert stopped == found


def test_a_long_text_is_not_decoded_over_and_over() -> None:
    tokenizer = BytesTokenizer()
    ids = [97] * 2000
    for start in range(1000, 2000):
        now = ids[: start + 1]
        assert stop_position(now, start=start, stop_strings=["b"], tokenizer=tokenizer) is None
    assert tokenizer.most < 40
