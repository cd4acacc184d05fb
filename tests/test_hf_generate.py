"""``model.generate(custom_generate=...)``: transformers' interface in front of the engine."""

import copy
import warnings
from functools import cache
from typing import Any

import pytest
import torch

import speaker
from exactness import random_agent
from mara_fast import DecodingConfig, Engine, custom_generate
from naming import stable_id
from speaker import EOS, PAD

TEXTS = ("Hi", "How do I bake bread?", "Tell me a story.")


@cache
def engine() -> Engine:
    return Engine(speaker.model(), speaker.agent(), speaker.tokenizer())


def batch() -> dict[str, torch.Tensor]:
    """Three prompts, left-padded, with their mask."""
    return dict(speaker.tokenizer()(list(TEXTS), return_tensors="pt", padding=True))


def decode(**options: Any) -> Any:
    options = {**batch(), "max_new_tokens": 8, "custom_generate": custom_generate, **options}
    if "engine" not in options and "agent" not in options:
        options["engine"] = engine()
    return speaker.model().generate(**options)


def wanted(max_new_tokens: int = 8, **options: Any) -> list[list[int]]:
    """New tokens of the engine itself."""
    results = engine().generate(
        list(TEXTS), prompt_format="raw", max_new_tokens=max_new_tokens, **options
    )
    return [result.token_ids for result in results]


def padded(rows: list[list[int]], pad: int = PAD) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def test_equals_the_engine() -> None:
    ids = batch()["input_ids"]
    assert (ids[0, :3] == PAD).all()
    for options in ({"engine": engine()}, {"agent": speaker.agent()}):
        sequences = decode(**options)
        assert sequences.dtype == torch.int64
        assert torch.equal(sequences[:, : ids.shape[1]], ids)
        assert torch.equal(sequences[:, ids.shape[1] :], padded(wanted()))


def test_an_agent_by_its_folder(tmp_path: Any) -> None:
    speaker.agent().save_pretrained(tmp_path)
    assert torch.equal(decode(agent=str(tmp_path)), decode())


def test_without_an_agent_it_is_greedy_search() -> None:
    theirs = speaker.model().generate(**batch(), max_new_tokens=8, do_sample=False)
    assert torch.equal(decode(agent=None), theirs)
    assert not torch.equal(decode(), theirs)


def test_padding_is_left_out_wherever_it_is() -> None:
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    new = decode()[:, ids.shape[1] :]
    more = torch.full((3, 2), PAD)
    none = torch.zeros(3, 2, dtype=torch.int64)
    for wider, its_mask in (
        (torch.cat((more, ids), 1), torch.cat((none, mask), 1)),
        (torch.cat((ids, more), 1), torch.cat((mask, none), 1)),
    ):
        sequences = decode(input_ids=wider, attention_mask=its_mask)
        assert torch.equal(sequences[:, : wider.shape[1]], wider)
        assert torch.equal(sequences[:, wider.shape[1] :], new)
    # A mask of booleans, and one that hides a token of the prompt.
    assert torch.equal(decode(attention_mask=mask.bool())[:, ids.shape[1] :], new)
    hidden = mask.clone()
    hidden[2, -1] = 0
    [shorter] = engine().generate([ids[2, :-1].tolist()], max_new_tokens=8)
    assert decode(attention_mask=hidden)[2, ids.shape[1] :].tolist() == shorter.token_ids


def test_a_mask_that_hides_everything() -> None:
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        decode(attention_mask=torch.zeros_like(batch()["input_ids"]))


def test_one_row_without_a_mask() -> None:
    [ids] = speaker.tokenizer()(["Hi"], return_tensors="pt")["input_ids"]
    sequences = speaker.model().generate(
        ids[None], custom_generate=custom_generate, engine=engine(), max_new_tokens=8
    )
    assert sequences[0].tolist() == ids.tolist() + wanted()[0]


def test_eos_and_pad() -> None:
    rows = wanted()
    eos = rows[1][2]
    rows = wanted(eos_token_id=eos)
    assert len(rows[1]) == 3 < max(map(len, rows))
    width = batch()["input_ids"].shape[1]
    assert torch.equal(decode(eos_token_id=eos)[:, width:], padded(rows))
    assert torch.equal(decode(eos_token_id=[eos, EOS])[:, width:], padded(rows))
    assert torch.equal(decode(eos_token_id=eos, pad_token_id=77)[:, width:], padded(rows, 77))


def test_pad_defaults_to_eos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaker.model().generation_config, "pad_token_id", None)
    eos = wanted()[1][2]
    width = batch()["input_ids"].shape[1]
    assert torch.equal(
        decode(eos_token_id=[eos])[:, width:], padded(wanted(eos_token_id=eos), pad=eos)
    )


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
def test_lengths() -> None:
    width = batch()["input_ids"].shape[1]
    assert torch.equal(
        decode(max_new_tokens=None, max_length=width + 5)[:, width:], padded(wanted(5))
    )
    assert decode(max_new_tokens=1).shape[1] == width + 1
    eos = wanted()[1][2]
    least = wanted(eos_token_id=eos, min_new_tokens=6)
    assert least != wanted(eos_token_id=eos)
    for options in ({"min_new_tokens": 6}, {"min_length": width + 6}):
        assert torch.equal(decode(eos_token_id=eos, **options)[:, width:], padded(least))
    with pytest.raises(ValueError, match="min_new_tokens=9 exceeds max_new_tokens=8"):
        decode(min_new_tokens=9)
    with pytest.raises(ValueError, match="positions, the limit is 512"):
        decode(max_new_tokens=600)


def test_a_config_decides_all_but_the_length_and_eos() -> None:
    config = DecodingConfig(
        top_k=3, fallback="first", threshold=0.8, max_new_tokens=99, max_fallback_rate=None
    )
    new = decode(config=config)[:, batch()["input_ids"].shape[1] :]
    assert torch.equal(new, padded(wanted(top_k=3, fallback="first", threshold=0.8)))
    assert not torch.equal(new, padded(wanted()))
    with pytest.raises(ValueError, match="config must be a DecodingConfig, got dict"):
        decode(config={"top_k": 3})


def test_sampling_defaults_of_transformers_are_not_ours() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sequences = decode(do_sample=True, temperature=0.3, top_k=2, top_p=0.5, min_p=0.1)
    assert torch.equal(sequences, decode())


def test_a_call_without_generate() -> None:
    inputs = batch()
    sequences = custom_generate(
        speaker.model(),
        inputs["input_ids"],
        engine=engine(),
        config=DecodingConfig(max_new_tokens=8),
        attention_mask=inputs["attention_mask"],
    )
    assert torch.equal(sequences, decode())
    empty = custom_generate(speaker.model(), torch.zeros(0, 4, dtype=torch.int64), engine=engine())
    assert empty.shape == (0, 4)


def test_return_dict() -> None:
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    output = decode(return_dict_in_generate=True)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert torch.equal(output.sequences, decode())
    assert list(output.keys()) == ["sequences"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2 is not supported"),
        ({"num_beams": 3, "num_return_sequences": 3}, "num_beams=3 is not supported"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 is not supported"),
        *(
            ({f"output_{name}": True, "return_dict_in_generate": True}, f"output_{name}=True is")
            for name in ("scores", "logits", "attentions", "hidden_states")
        ),
        ({"agent": 3}, "agent must be a MaraAgent"),
        ({"agent": speaker.agent, "engine": None}, "agent must be a MaraAgent"),
        ({"agnet": 3}, "model_kwargs.*not used by the model.*agnet"),
    ],
    ids=stable_id,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(**options)


def test_embeddings_as_input_are_refused() -> None:
    inputs = batch()
    embeds = speaker.model().get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds is not supported"):
        speaker.model().generate(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            custom_generate=custom_generate,
            engine=engine(),
            max_new_tokens=2,
        )


def test_an_engine_of_its_own() -> None:
    with pytest.raises(ValueError, match="must be made for this model, and has its own agent"):
        decode(engine=engine(), agent=speaker.agent())
    other = Engine(speaker.build("llama", seed=12, vocab_size=speaker.VOCAB_SIZE), False)
    with pytest.raises(ValueError, match="engine= must be made for this model"):
        decode(engine=other)


class Nothing:
    """A logits processor and a stopping criterion of the user's."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        ({"repetition_penalty": 1.2}, "logits_processor .*: RepetitionPenaltyLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"bad_words_ids": [[5]]}, "NoBadWordsLogitsProcessor"),
        ({"prefix_allowed_tokens_fn": lambda i, x: [3]}, "PrefixConstrainedLogitsProcessor"),
        ({"logits_processor": [Nothing()]}, "logits_processor has no effect .*: Nothing"),
        ({"stopping_criteria": [Nothing()]}, "stopping_criteria has no effect .*: Nothing"),
        ({"max_time": 60.0}, "stopping_criteria .*: MaxTimeCriteria"),
    ],
    ids=stable_id,
)
def test_what_has_no_effect_warns(options: dict[str, Any], ignored: str) -> None:
    with pytest.warns(UserWarning, match=f"{ignored}$"):
        sequences = decode(**options)
    assert torch.equal(sequences, decode())


def test_nothing_warns_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(min_new_tokens=2, eos_token_id=[3])


def test_alarms_are_warnings() -> None:
    """Once for all rows: none of them is long enough by itself."""
    agent = random_agent(speaker.model().config.hidden_size, accept_bias=-30.0)
    strict = Engine(speaker.model(), agent, speaker.tokenizer())
    options = {"engine": strict, "max_new_tokens": 9, "eos_token_id": [], "pad_token_id": PAD}
    with pytest.warns(UserWarning, match=r"rejected every candidate at 100\.0% of") as caught:
        decode(**options)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(**options, config=DecodingConfig(max_fallback_rate=None, max_repetition=None))


def test_nan_logits_raise() -> None:
    model = copy.deepcopy(speaker.model())
    model.get_input_embeddings().weight[9] = torch.nan
    with pytest.raises(RuntimeError, match=r"prompt 1: .* NaN or infinite at position 2"):
        model.generate(
            torch.tensor([[3, 4], [3, 9]]),
            attention_mask=torch.ones(2, 2, dtype=torch.int64),
            custom_generate=custom_generate,
            agent=speaker.agent(),
            max_new_tokens=3,
        )
