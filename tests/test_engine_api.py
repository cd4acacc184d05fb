"""The engine as its users meet it: every way to ask, every way to ask wrongly."""

import copy
import io
import json
import pickle
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import mara_fast
import speaker
from mara_fast import DecodingConfig, DecodingStats, Engine
from mara_kernels.truncate import truncate
from naming import stable_id
from speaker import OPTIONS, PROMPTS, VOCAB_SIZE, alone, same


def test_a_result() -> None:
    [result] = speaker.engine().generate("Hi", **OPTIONS)
    tokenizer = speaker.tokenizer()
    assert result.prompt == "Hi"
    assert tokenizer.decode(result.prompt_token_ids) == "<s>user: Hi\nassistant: "
    assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert [token.token_id for token in result.tokens] == result.token_ids
    assert len(result.token_ids) == 12 and result.finish_reason == "length"
    assert result.error is None and result.trace is None
    assert result.stats.num_tokens == 12 and result.stats.seconds > 0
    record = json.loads(json.dumps(result.to_dict()))
    assert record.keys() == {"prompt", "text", "token_ids", "finish_reason", "stats"}
    assert pickle.loads(pickle.dumps(result)) == copy.deepcopy(result) == result


@pytest.mark.parametrize("max_batch_size", [1, 3, 16])
def test_a_prompt_does_not_feel_the_others(max_batch_size: int) -> None:
    engine = speaker.engine(max_batch_size=max_batch_size)
    for prompts in (PROMPTS[::-1], PROMPTS + PROMPTS)[: 1 + (max_batch_size == 3)]:
        results = engine.generate(list(prompts), **OPTIONS)
        assert [result.prompt for result in results] == list(prompts)
        assert all(same(r, alone(p)) for r, p in zip(results, prompts, strict=True))


def test_a_hundred_prompts_in_one_slot() -> None:
    prompts = [[3 + i % 50, 4 + i % 7] * (1 + i % 3) for i in range(100)]
    one, many = (
        speaker.engine(max_batch_size=size).generate(prompts, max_new_tokens=2) for size in (1, 16)
    )
    assert len(one) == 100
    assert all(same(a, b) for a, b in zip(one, many, strict=True))
    assert [result.prompt for result in one] == prompts


def test_forms_may_be_mixed() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    results = speaker.engine().generate(["Hi", chat, alone("Hi").prompt_token_ids], **OPTIONS)
    assert all(same(result, alone("Hi")) for result in results)
    assert results[1].prompt is chat


def test_no_prompts() -> None:
    engine = speaker.engine()
    assert engine.generate([]) == [] == list(engine.as_completed([]))
    assert engine.generate([], max_new_tokens=0) == []
    with pytest.raises(ValueError, match="stream takes one prompt, got 0"):
        engine.stream([])


def test_no_tokens() -> None:
    for result in speaker.engine().generate(["Hi", "Ho"], max_new_tokens=0, trace=True):
        assert (result.text, result.token_ids, result.finish_reason) == ("", [], "length")
        assert result.stats == DecodingStats() and result.trace == ()
        assert result.prompt_token_ids
    [event] = speaker.engine().stream("Hi", max_new_tokens=0)
    assert event.token is None and event.text == "" and event.finish_reason == "length"
    assert speaker.engine(with_text=False).generate([[3]], max_new_tokens=0)[0].text is None


def test_one_token() -> None:
    results = speaker.engine().generate(list(PROMPTS), max_new_tokens=1)
    for result, prompt in zip(results, PROMPTS, strict=True):
        assert result.token_ids == alone(prompt).token_ids[:1]
        assert result.finish_reason == "length"


def test_longer_is_a_continuation() -> None:
    for length in (1, 5, 11):
        [result] = speaker.engine().generate(PROMPTS[1], max_new_tokens=length)
        assert result.tokens == alone(PROMPTS[1]).tokens[:length]


def test_ids_in_ids_out_without_a_tokenizer() -> None:
    ids = alone("Hi").prompt_token_ids
    [result] = speaker.engine(with_text=False).generate([ids], **OPTIONS)
    assert result.token_ids == alone("Hi").token_ids and result.text is None


@pytest.mark.parametrize("options", [{"top_k": 10**30}, {"top_k": 0}, {"top_k": VOCAB_SIZE}])
def test_top_k_beyond_the_vocabulary(options: dict[str, int]) -> None:
    [result] = speaker.engine().generate("Hi", max_new_tokens=4, top_p=1.0, **options)
    [whole] = speaker.engine().generate("Hi", max_new_tokens=4, top_p=1.0, top_k=VOCAB_SIZE)
    assert result.tokens == whole.tokens
    assert max(token.num_candidates for token in result.tokens) > 64


def test_nothing_is_decoded_before_everything_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = speaker.engine()
    monkeypatch.setattr(engine.lm, "hidden_states", None)
    monkeypatch.setattr(engine, "lm", engine.lm)
    for ask in (engine.generate, engine.as_completed, engine.stream):
        with pytest.raises(ValueError, match="did you mean 'max_new_tokens'"):
            ask("Hi", max_tokens=3)
        with pytest.raises(ValueError, match="config must be a DecodingConfig, got dict"):
            ask("Hi", {"max_new_tokens": 3})
        with pytest.raises(ValueError, match="prompt 1 is 5"):
            ask(["Hi", 5])
        with pytest.raises(ValueError, match="top_p=2 is not allowed"):
            ask("Hi", top_p=2)


@pytest.mark.parametrize("max_length", [None, 40])
def test_a_prompt_longer_than_the_limit(max_length: int | None) -> None:
    engine = Engine(speaker.model(), False, max_length=max_length)
    limit = max_length or 512
    [result] = engine.generate([[3] * (limit - 5)], max_new_tokens=5, eos_token_id=())
    assert len(result.token_ids) == 5
    with pytest.raises(
        ValueError,
        match=rf"prompt 1 has {limit - 4} tokens; with max_new_tokens=5 it needs {limit + 1} "
        rf"positions, the limit is {limit}: shorten it or lower max_new_tokens",
    ):
        engine.generate([[3], [3] * (limit - 4)], max_new_tokens=5)
    with pytest.raises(ValueError, match="it needs 1000"):
        engine.generate([[3]], max_new_tokens=10**30)


def test_an_engine_grows_with_its_prompts() -> None:
    engine = Engine(speaker.model(), speaker.agent(), max_batch_size=2, prefill_chunk=16)
    fresh = speaker.engine(with_text=False)
    for length in (1, 60, 65, 20, 200, 1):
        prompts = [[3 + i % 80 for i in range(length)], [7] * (1 + length // 2)]
        got = engine.generate(prompts, max_new_tokens=4)
        wanted = [fresh.generate([prompt], max_new_tokens=4)[0] for prompt in prompts]
        assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
    assert engine._idle is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size=0 is not allowed; allowed: an integer >= 1"),
        ({"max_batch_size": True}, "max_batch_size=True"),
        ({"max_batch_size": 2.0}, r"max_batch_size=2\.0"),
        ({"max_batch_size": None}, "max_batch_size=None"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": "9"}, "max_length='9'"),
        ({"max_length": 513}, "max_length=513 exceeds the model's 512 positions"),
        ({"attention": "flash"}, "attention='flash' is not known; allowed: auto, candidate"),
    ],
)
def test_engine_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(speaker.model(), **options)


@pytest.mark.parametrize("model", [None, 5, speaker, type, ["tiny"]], ids=stable_id)
def test_what_is_not_a_model(model: Any) -> None:
    with pytest.raises(ValueError, match="model must be a hub id, a path, a PreTrainedModel or"):
        Engine(model)


def test_what_is_not_a_causal_lm() -> None:
    with pytest.raises(ValueError, match="LlamaModel is not supported: expected a causal LM"):
        Engine(speaker.model().model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' is not known; allowed"),
        ({"dtype": "float61"}, "dtype='float61' is not known"),
        ({"dtype": None}, "dtype=None is not known"),
        ({"device": "gpu"}, "device='gpu' is not known; allowed"),
        ({"device": None}, "device=None is not known"),
        ({"device": 1.5}, r"device=1\.5 is not known"),
    ],
)
def test_loading_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine("no/model", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda() -> None:
    with pytest.raises(ValueError, match="device='cuda', but torch sees no CUDA device"):
        Engine("no/model", device="cuda")


@pytest.mark.parametrize("path", ["/no/such/folder", "no/model", ""])
def test_no_model_there(path: str) -> None:
    with pytest.raises(OSError):
        Engine(path)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"device": "cpu"}])
def test_a_loaded_model_stays_as_it_is(options: dict[str, str]) -> None:
    [name] = options
    with pytest.warns(UserWarning, match=rf"{name}=.* has no effect: the model is loaded already"):
        engine = Engine(speaker.model(), **options)
    assert engine.lm.model is speaker.model()
    assert engine.lm.model.dtype == torch.float32


# Plain decoding


def test_plain_decoding_is_transformers_greedy_search() -> None:
    engine = speaker.engine(aligned=False)
    for prompt, result in zip(PROMPTS, engine.generate(list(PROMPTS), **OPTIONS), strict=True):
        ids = torch.tensor([alone(prompt).prompt_token_ids])
        wanted = speaker.model().generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)
        assert result.token_ids == wanted[0, ids.shape[1] :].tolist()
        assert {token.verdict for token in result.tokens} == {"plain"}
        assert result.stats.num_decided == result.stats.num_forced == 0
        assert all(token.accept_prob is None for token in result.tokens)


def test_no_agent_by_none_or_by_false() -> None:
    wanted = speaker.engine(aligned=False).generate([[3, 4]], **OPTIONS)[0].token_ids
    for agent in (None, False):
        engine = Engine(speaker.model(), agent)
        assert engine.agent is None
        assert engine.generate([[3, 4]], **OPTIONS)[0].token_ids == wanted
        [result] = mara_fast.generate([[3, 4]], speaker.model(), agent, **OPTIONS)
        assert result.token_ids == wanted
    assert wanted != speaker.engine().generate([[3, 4]], **OPTIONS)[0].token_ids


def test_plain_sampling_follows_the_truncated_distribution() -> None:
    engine = speaker.engine(aligned=False, max_batch_size=16)
    prompt, num_samples = [3, 4, 6], 600
    results = engine.generate(
        [prompt] * num_samples, max_new_tokens=1, acceptance="sample", top_k=5, top_p=1.0
    )
    with torch.no_grad():
        logits = speaker.model()(torch.tensor([prompt])).logits[:, -1]
    candidates = truncate(logits, top_k=5, top_p=1.0)
    probs = torch.softmax(candidates.logprobs[0, : candidates.size], dim=-1)
    drawn = torch.tensor([result.token_ids[0] for result in results])
    counts = torch.stack([(drawn == token).sum() for token in candidates.ids[0, : len(probs)]])
    assert counts.sum() == num_samples
    chi_square = ((counts - num_samples * probs) ** 2 / (num_samples * probs)).sum()
    # One in 10,000 beyond 23.5 with four degrees of freedom; the draws are fixed by the seed.
    assert chi_square < 23.5
    assert (counts > 0).sum() >= 3


def test_draws_are_keyed_by_seed_and_sequence() -> None:
    for aligned in (True, False):
        engine = speaker.engine(aligned=aligned)
        config = DecodingConfig(acceptance="sample", max_new_tokens=8)
        first = engine.generate(["Hi"] * 3, config)
        assert all(
            same(a, b) for a, b in zip(first, engine.generate(["Hi"] * 3, config), strict=True)
        )
        assert len({tuple(result.token_ids) for result in first}) == 3
        # Any subset in any order, with the keys of the whole, draws as the whole does.
        again = engine.generate(["Hi"] * 2, config, sequence_ids=[2, 0])
        assert same(again[0], first[2]) and same(again[1], first[0])
        assert same(engine.generate("Hi", config, sequence_ids=[np.int64(1)])[0], first[1])
        assert not same(engine.generate("Hi", config, seed=1)[0], first[0])
        assert not same(engine.generate("Hi", config, sequence_ids=[2**63 - 1])[0], first[0])


@pytest.mark.parametrize(
    ("sequence_ids", "message"),
    [
        ([1, 2], "2 sequence_ids for 1 prompts"),
        ([], "0 sequence_ids for 1 prompts"),
        ([-1], "sequence_ids must be integers in"),
        ([2**63], "sequence_ids must be integers in"),
    ],
)
def test_sequence_ids_refused(sequence_ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speaker.engine().generate("Hi", sequence_ids=sequence_ids, max_new_tokens=1)


@pytest.mark.parametrize("sequence_ids", [[0.5], ["1"], [None], [True], 5], ids=stable_id)
def test_sequence_ids_that_are_not_integers(sequence_ids: Any) -> None:
    with pytest.raises(ValueError, match="sequence_ids must be integers in"):
        speaker.engine().generate("Hi", sequence_ids=sequence_ids, max_new_tokens=1)


# When the model fails


@cache
def poisoned() -> Engine:
    """An engine whose model knows nothing of token 9."""
    model = copy.deepcopy(speaker.model())
    model.get_input_embeddings().weight[9] = torch.nan
    return Engine(model, speaker.agent(), speaker.tokenizer(), max_batch_size=2)


def test_nan_logits_end_their_sequence_only() -> None:
    prompts = [[3, 4], [3, 9, 4], [5, 6], [9], [7]]
    results = poisoned().generate(prompts, max_new_tokens=3, top_k=3, eos_token_id=())
    wanted = speaker.engine().generate(prompts, max_new_tokens=3, top_k=3, eos_token_id=())
    for index, (result, expected) in enumerate(zip(results, wanted, strict=True)):
        if index in (1, 3):
            assert result.finish_reason == "error"
            assert result.error == (
                "the language model's logits are NaN or infinite at position "
                f"{len(prompts[index])} (output token 0)"
            )
            assert result.token_ids == [] and result.text == ""
            assert result.to_dict()["error"] == result.error
        elif 9 not in {c for token in expected.token_ids for c in [token]}:
            assert same(result, expected)
    # And nothing of it is left behind.
    again = poisoned().generate([[3, 4], [5, 6]], max_new_tokens=3, top_k=3, eos_token_id=())
    assert same(again[0], results[0]) and same(again[1], results[2])


@pytest.mark.parametrize("host_reads", [True, False])
@pytest.mark.parametrize("chunk", [3, 512])
def test_nan_stays_with_its_prompt(
    chunk: int, host_reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever prompts move meanwhile, those that wait and the next run's included."""
    model, rng = poisoned().lm.model, random.Random(chunk)

    def prompt(length: int, *, is_bad: bool) -> list[int]:
        ids = [rng.randrange(10, VOCAB_SIZE) for _ in range(length)]
        if is_bad:
            ids[rng.randrange(length)] = 9
        return ids

    options = {"max_new_tokens": 4, "top_k": 5, "eos_token_id": (3, 4, 5, 6, 7), "window": 1}
    alone = Engine(model, speaker.agent(), False, max_batch_size=1)
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: host_reads)
    for max_batch_size in (2, 3, 4, 6):
        engine = Engine(
            model, speaker.agent(), False, max_batch_size=max_batch_size, prefill_chunk=chunk
        )
        for bad_share in (0.4, 0.4, 0.0):
            bad = [rng.random() < bad_share for _ in range(3 * max_batch_size)]
            prompts = [prompt(rng.choice((1, 2, 4, 8, 20)), is_bad=one) for one in bad]
            results = engine.generate(prompts, **options)
            for ids, is_bad, result in zip(prompts, bad, results, strict=True):
                if not is_bad:
                    assert same(result, alone.generate([ids], **options)[0])


def test_nan_logits_in_a_stream() -> None:
    *_, last = poisoned().stream([[3, 9]])
    assert last.finish_reason == "error" and last.token is None
    assert last.generation is not None and last.generation.error is not None


# The package's functions


def test_package_functions_with_an_engine() -> None:
    engine = speaker.engine()
    assert same(mara_fast.generate("Hi", engine=engine, **OPTIONS)[0], alone("Hi"))
    assert [e.text for e in mara_fast.stream("Hi", engine=engine, **OPTIONS)] == [
        e.text for e in engine.stream("Hi", **OPTIONS)
    ]
    for given in ({"model": speaker.model()}, {"agent": False}, {"tokenizer": speaker.tokenizer()}):
        with pytest.raises(ValueError, match="engine= has its model, agent and tokenizer"):
            mara_fast.generate("Hi", engine=engine, **given)
    with pytest.raises(ValueError, match="engine must be an Engine, got LlamaForCausalLM"):
        mara_fast.generate("Hi", engine=speaker.model())
    with pytest.raises(ValueError, match="unknown option 'max_batch_size'"):
        mara_fast.generate("Hi", engine=engine, max_batch_size=3)


def test_package_functions_without_an_engine() -> None:
    model, agent, tokenizer = speaker.model(), speaker.agent(), speaker.tokenizer()
    [result] = mara_fast.generate("Hi", model, agent, tokenizer=tokenizer, **OPTIONS)
    assert same(result, alone("Hi"))
    config = DecodingConfig(top_k=3, max_new_tokens=5)
    [result] = mara_fast.generate("Hi", model, agent, tokenizer=tokenizer, config=config, top_k=4)
    assert same(result, speaker.engine().generate("Hi", top_k=4, max_new_tokens=5)[0])
    *_, last = mara_fast.stream("Hi", model, agent, tokenizer=tokenizer, **OPTIONS)
    assert last.generation is not None and same(last.generation, alone("Hi"))


def test_names_are_imported_on_first_use() -> None:
    assert set(mara_fast.__all__) <= set(dir(mara_fast))
    for name in mara_fast.__all__:
        assert getattr(mara_fast, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mara_fast.nothing


def test_environment_is_text() -> None:
    from mara_fast.environment import environment

    found = environment()
    assert {"mara-fast", "python", "torch", "transformers", "truncate", "attention"} <= set(found)
    stream = io.StringIO()
    for name, value in found.items():
        print(name, value, file=stream)
        assert value and "\n" not in value
