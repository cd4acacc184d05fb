"""Tokens as they are decided: events, streamers, threads, and a progress bar."""

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import mara_fast
import speaker
from mara_fast import Engine, Generation
from mara_fast.collect import decode_text
from speaker import OPTIONS, PROMPTS, alone, same

# as_completed and stream


def test_as_completed() -> None:
    eos = [alone("Hi").token_ids[1]]
    prompts = [PROMPTS[1], "Hi", PROMPTS[7], PROMPTS[3]]
    done = list(speaker.engine().as_completed(prompts, eos_token_id=eos, **OPTIONS))
    assert sorted(index for index, _ in done) == [0, 1, 2, 3]
    wanted = speaker.engine().generate(prompts, eos_token_id=eos, **OPTIONS)
    assert all(same(result, wanted[index]) for index, result in done)
    lengths = [len(result.token_ids) for _, result in done]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    keyed = speaker.engine().as_completed(["Hi"], acceptance="sample", sequence_ids=[5], **OPTIONS)
    [wanted] = speaker.engine().generate("Hi", acceptance="sample", sequence_ids=[5], **OPTIONS)
    assert same(next(keyed)[1], wanted)


def test_text_is_only_added_to() -> None:
    """Some tokenizers are told to clean up: a space before a quote would vanish later on."""
    tokenizer = copy.deepcopy(speaker.tokenizer())
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    text = "the 'same , do n't . "
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) != text
    assert decode_text(tokenizer, ids) == text
    for count in range(len(ids)):
        assert text.startswith(decode_text(tokenizer, ids[:count]))


@pytest.mark.parametrize("prompt", PROMPTS[1::2])
def test_stream(prompt: str) -> None:
    events = list(speaker.engine().stream(prompt, max_new_tokens=24))
    *before, last = events
    result = alone(prompt, 24)
    assert last.generation is not None and same(last.generation, result)
    assert last.finish_reason == result.finish_reason
    assert all(event.generation is event.finish_reason is None for event in before)
    assert [event.token for event in events] == list(result.tokens)
    assert "".join(event.text for event in events) == result.text
    assert not any(event.text.endswith("\N{REPLACEMENT CHARACTER}") for event in before)


def test_a_stream_is_not_held_back() -> None:
    """Tokens come as they are decided: a forward or two for each, not all at the end."""
    engine = speaker.engine(aligned=False)
    stream = engine.stream([[3, 4, 5]], max_new_tokens=20)
    with counted_forwards(engine) as count:
        for index in range(5):
            next(stream)
            assert len(count) <= index + 2


@contextmanager
def counted_forwards(engine: Engine) -> Iterator[list[int]]:
    rows: list[int] = []
    handle = engine.lm.body.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield rows
    finally:
        handle.remove()


def test_a_stream_left_alone() -> None:
    engine = Engine(speaker.model(), speaker.agent(), speaker.tokenizer())
    for count in (1, 5):
        stream = engine.stream("Tell me a story.", **OPTIONS)
        assert [next(stream).token for _ in range(count)]
        stream.close()
        assert engine._idle is None or engine._idle.num_slots == 1
    assert same(engine.generate("Hi", **OPTIONS)[0], alone("Hi"))


def test_streams_of_one_engine_interleaved() -> None:
    engine = speaker.engine()
    streams = {prompt: engine.stream(prompt, **OPTIONS) for prompt in PROMPTS}
    results: dict[str, Generation] = {}
    while streams:
        for prompt, stream in list(streams.items()):
            event = next(stream)
            if event.generation is not None:
                results[prompt] = event.generation
                del streams[prompt]
        # Something else in between.
        assert engine.generate([[3]], max_new_tokens=1)[0].token_ids
    assert results.keys() == set(PROMPTS)
    assert all(same(result, alone(prompt)) for prompt, result in results.items())


def test_stream_without_a_tokenizer() -> None:
    events = list(speaker.engine(with_text=False).stream([[3, 4]], **OPTIONS))
    assert [event.text for event in events] == [""] * len(events)
    assert events[-1].generation is not None and events[-1].generation.text is None


def test_stream_takes_one_prompt() -> None:
    with pytest.raises(ValueError, match="stream takes one prompt, got 2"):
        speaker.engine().stream(["Hi", "Ho"])
    assert list(speaker.engine().stream(["Hi"], max_new_tokens=1))


def test_threads() -> None:
    """Four threads, two engines, one model."""
    model = copy.deepcopy(speaker.model())
    engines = [Engine(model, speaker.agent(), speaker.tokenizer()) for _ in range(2)]
    failures: list[object] = []

    def ask(start: int) -> None:
        engine = engines[start % 2]
        try:
            for prompt in (PROMPTS[start:] + PROMPTS[:start])[:4]:
                if not same(engine.generate(prompt, **OPTIONS)[0], alone(prompt)):
                    failures.append(prompt)
        except Exception as error:
            failures.append(error)

    for prompt in PROMPTS:
        alone(prompt)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert model.config._attn_implementation == speaker.model().config._attn_implementation


def state_of(model: Any) -> tuple:
    return model.config._attn_implementation, set(model.__dict__), model.config.to_dict()


def test_the_model_is_left_as_it_was() -> None:
    model = copy.deepcopy(speaker.model())
    ids = torch.tensor([alone("Hi").prompt_token_ids])
    with torch.no_grad():
        logits = model(ids).logits
    before = state_of(model)
    engine = Engine(model, speaker.agent(), speaker.tokenizer())
    stream = engine.stream("Hi", **OPTIONS)
    next(stream)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    list(stream)
    assert state_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


# Streamers of transformers, and progress


def test_what_is_no_streamer() -> None:
    with pytest.raises(
        ValueError, match="streamer=5 is not allowed; allowed: a transformers strea"
    ):
        speaker.engine().generate("Hi", streamer=5)  # type: ignore[arg-type]


def test_text_streamer(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextStreamer

    streamer = TextStreamer(speaker.tokenizer(), skip_prompt=True, skip_special_tokens=True)
    [result] = speaker.engine().generate("Hi", streamer=streamer, **OPTIONS)
    assert capsys.readouterr().out == f"{result.text}\n"
    assert same(result, alone("Hi"))


def test_text_iterator_streamer_across_threads() -> None:
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(
        speaker.tokenizer(), skip_prompt=True, skip_special_tokens=True, timeout=60
    )
    options = {"streamer": streamer, **OPTIONS}
    thread = threading.Thread(target=speaker.engine().generate, args=("Hi",), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == alone("Hi").text


class Recorder:
    """A streamer that writes down what it gets, and may refuse a token."""

    def __init__(self, refused: int | None = None) -> None:
        self.calls: list[Any] = []
        self.refused = refused

    def put(self, value: torch.Tensor) -> None:
        if len(self.calls) == self.refused:
            raise KeyError("refused")
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


def test_a_streamer_gets_what_transformers_gives_it() -> None:
    result, recorder = alone("Hi"), Recorder()
    mara_fast.generate("Hi", engine=speaker.engine(), streamer=recorder, **OPTIONS)  # type: ignore[arg-type]
    assert recorder.calls == [
        [result.prompt_token_ids],
        *([token] for token in result.token_ids),
        "end",
    ]
    plain, theirs = Recorder(), Recorder()
    prompt = torch.tensor([result.prompt_token_ids])
    speaker.engine(aligned=False).generate("Hi", streamer=plain, **OPTIONS)  # type: ignore[arg-type]
    speaker.model().generate(prompt, max_new_tokens=12, do_sample=False, streamer=theirs)
    assert plain.calls == theirs.calls


def test_a_streamer_that_fails_is_ended() -> None:
    recorder = Recorder(refused=3)
    with pytest.raises(KeyError, match="refused"):
        speaker.engine().generate("Hi", streamer=recorder, **OPTIONS)  # type: ignore[arg-type]
    assert recorder.calls[-1] == "end"
    assert same(speaker.engine().generate("Hi", **OPTIONS)[0], alone("Hi"))


@pytest.mark.parametrize("prompts", [[], ["Hi", "Ho"]])
def test_a_streamer_takes_one_prompt(prompts: list[str]) -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match=f"a streamer takes one prompt, got {len(prompts)}"):
        speaker.engine().generate(prompts, streamer=recorder)  # type: ignore[arg-type]
    assert recorder.calls == []


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    speaker.engine().generate(list(PROMPTS), **OPTIONS)
    assert capsys.readouterr() == ("", "")
    results = speaker.engine().generate(list(PROMPTS), progress=True, **OPTIONS)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" in shown.err
    assert f"tokens={sum(len(r.token_ids) for r in results)}" in shown.err


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_streams_hold_back_every_beginning_of_a_stop_string(count: int) -> None:
    """Stop strings that end within a token, longer than the text so far."""
    engine = speaker.engine()
    [whole] = engine.generate("Tell me a story.", **OPTIONS)
    for start in range(0, len(whole.text) - count, 3):
        stop = whole.text[start : start + count]
        options = OPTIONS | {"stop_strings": [stop]}
        [result] = engine.generate("Tell me a story.", **options)
        events = list(engine.stream("Tell me a story.", **options))
        assert "".join(event.text for event in events) == result.text
        assert result.text == whole.text[: whole.text.find(stop)]
