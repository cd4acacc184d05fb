"""The engine against the sequential cascade: exact tokens in float32, equal counts."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import mara_fast.decoder
from architectures import ARCHITECTURES, OTHER_ARCHITECTURES, random_prompt
from exactness import NothingToCompare, check_exact, random_agent
from mara_fast import Engine
from mara_fast.language_model import UnsupportedModelError
from mara_kernels.cascade import FALLBACKS, ORDERS, STRATEGIES
from mara_kernels.truncate import CandidateSet

PROPERTY_ARCHITECTURES = ("llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "gpt2")


@cache
def model_of(name: str, device: str = "cpu") -> Any:
    return (ARCHITECTURES | OTHER_ARCHITECTURES)[name]().to(device)


@cache
def engine_of(name: str, max_batch_size: int, prefill_chunk: int, device: str = "cpu") -> Engine:
    model = model_of(name, device)
    agent = random_agent(model.get_input_embeddings().weight.shape[1]).to(device)
    return Engine(model, agent, max_batch_size=max_batch_size, prefill_chunk=prefill_chunk)


@cache
def memo_of(name: str, device: str = "cpu") -> dict:
    """Forwards of the oracle, shared by the cases of a model."""
    return {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str) -> None:
    check_architecture(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_on_a_gpu(name: str) -> None:
    check_architecture(name, "cuda")


def check_architecture(name: str, device: str) -> None:
    """Unequal prompts over two slots with refill, prompts longer than chunks and windows."""
    model = model_of(name, device)
    engine = engine_of(name, 2, 7, device)
    assert engine.lm.attention == "candidate"
    prompts = [random_prompt(model, length, seed=length) for length in (16, 3, 9)]
    for options in (
        {"window": 1, "fallback": "first"},
        {"window": 4, "fallback": "last", "top_k": 8},
        {"window": 3, "strategy": "max_prob", "order": "top_last", "top_k": 5},
    ):
        check_exact(engine, prompts, memo=memo_of(name, device), max_new_tokens=10, **options)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_configuration(data: st.DataObject) -> None:
    """The result depends on prompt, options, seed and sequence, and on nothing else."""
    check_any_configuration(data)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_configuration_at_length(data: st.DataObject) -> None:
    check_any_configuration(data)


@pytest.mark.gpu
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_configuration_on_a_gpu(data: st.DataObject) -> None:
    check_any_configuration(data, "cuda")


def check_any_configuration(data: st.DataObject, device: str = "cpu") -> None:
    name = data.draw(st.sampled_from(PROPERTY_ARCHITECTURES), "architecture")
    num_slots = data.draw(st.integers(1, 4), "slots")
    model = model_of(name, device)
    engine = engine_of(name, num_slots, data.draw(st.sampled_from([1, 3, 64]), "chunk"), device)
    lengths = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=5), "lengths")
    prompts = [random_prompt(model, length, seed=index) for index, length in enumerate(lengths)]
    order = data.draw(st.permutations(range(len(prompts))), "order of arrival")
    options = {
        "window": data.draw(st.one_of(st.integers(1, 12), st.just("auto"), st.just(40)), "window"),
        "top_k": data.draw(st.sampled_from([1, 2, 5, 40, 0, 1000]), "top_k"),
        "top_p": data.draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]), "top_p"),
        "temperature": data.draw(st.sampled_from([1.0, 0.7, 1.5]), "temperature"),
        "acceptance": data.draw(st.sampled_from(["greedy", "sample"]), "acceptance"),
        "threshold": data.draw(st.sampled_from([0.5, 0.2, 0.9]), "threshold"),
        "strategy": data.draw(st.sampled_from(STRATEGIES), "strategy"),
        "fallback": data.draw(st.sampled_from(FALLBACKS), "fallback"),
        "order": data.draw(st.sampled_from(ORDERS), "tried in order"),
        "seed": data.draw(st.integers(0, 2**64 - 1), "seed"),
        "min_new_tokens": data.draw(st.integers(0, 3), "min_new_tokens"),
        "max_new_tokens": data.draw(st.integers(3, 8), "max_new_tokens"),
        "eos_token_id": data.draw(st.sampled_from([(1,), tuple(range(3, 60))]), "eos"),
        "ignore_eos": data.draw(st.booleans(), "ignore_eos"),
    }
    if options["top_k"] in (0, 1000) or options["top_p"] == 1.0:
        # Sets of hundreds: the oracle asks about each with a forward of its own.
        options["max_new_tokens"], options["min_new_tokens"] = 3, 0
        prompts, order = prompts[:2], [i for i in order if i < 2]
    try:
        check_exact(
            engine,
            [prompts[i] for i in order],
            sequence_ids=[2**40 + i for i in order],
            memo=memo_of(name, device),
            **options,
        )
    except NothingToCompare:
        # Among a whole vocabulary there may be a candidate at a tie in the first set of all.
        reject()


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_ARCHITECTURES)
def test_other_architecture(name: str) -> None:
    """Every other architecture is either exact or refused by name."""
    try:
        model = model_of(name)
    except Exception as error:
        pytest.skip(f"this transformers does not build it: {type(error).__name__}: {error}")
    agent = random_agent(model.get_input_embeddings().weight.shape[1])
    try:
        engine = Engine(model, agent, max_batch_size=2, prefill_chunk=7)
    except UnsupportedModelError as error:
        assert type(model).__name__ in str(error)
        return
    lengths = (16, 3, 9)
    if name == "phi3_longrope":
        # Past its original context the rows of a batch depend on each other: a hard limit.
        with pytest.raises(ValueError, match="limit is 20"):
            engine.generate([random_prompt(model, 16)], max_new_tokens=10)
        lengths = (10, 3, 9)
    prompts = [random_prompt(model, length, seed=length) for length in lengths]
    for window in (1, 4):
        check_exact(engine, prompts, memo=memo_of(name), max_new_tokens=10, window=window)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2"])
def test_stock_attention_is_exact_too(name: str) -> None:
    model = model_of(name)
    agent = random_agent(model.get_input_embeddings().weight.shape[1])
    engine = Engine(model, agent, max_batch_size=2, prefill_chunk=7, attention="stock")
    assert engine.lm.attention == "stock"
    prompts = [random_prompt(model, length, seed=length) for length in (16, 3, 9)]
    check_exact(engine, prompts, memo=memo_of(name), max_new_tokens=10, window=3)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mistral"])
def test_device_only_step_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step as it runs on a GPU: static shapes, nothing read on the host."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: False)
    model = model_of(name)
    engine = engine_of(name, 2, 7)
    prompts = [random_prompt(model, length, seed=length) for length in (16, 3, 9)]
    for options in (
        {"window": 1, "fallback": "first"},
        {"window": 5, "order": "reverse"},
        {"window": 3, "strategy": "random", "acceptance": "sample"},
    ):
        check_exact(engine, prompts, memo=memo_of(name), max_new_tokens=10, **options)


def test_ties_outgrow_the_candidate_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits equal: the whole vocabulary ties into the top 40, and is tried if need be."""
    model = ARCHITECTURES["llama"]()
    model.lm_head.weight.zero_()
    agent = random_agent(48, accept_bias=-30.0)
    memo: dict = {}
    for host_reads in (True, False):
        monkeypatch.setattr("mara_fast.engine._host_reads", lambda device, on=host_reads: on)
        engine = Engine(model, agent, max_batch_size=2)
        for options in ({}, {"order": "reverse"}, {"top_p": 0.0}):
            results = check_exact(
                engine, [[5, 6], [8]], memo=memo, max_new_tokens=1, window=16, **options
            )
            assert results[0].tokens[0].num_examined == (0 if options.get("top_p") == 0 else 244)


@pytest.mark.parametrize("host_reads", [True, False])
def test_only_sets_that_outgrow_the_buffer_are_made_with_more_columns(
    host_reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain sampling: after a prompt whose set ties with everything, the others keep to few."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: host_reads)
    model = ARCHITECTURES["llama"]()
    prompts = [random_prompt(model, length, seed=length) for length in (5, 8)]
    options = {"max_new_tokens": 8, "acceptance": "sample", "ignore_eos": True, "temperature": 1.3}
    engine = Engine(model, False, max_batch_size=2)
    alone = engine.generate(prompts, **options)
    capacities = []
    original = mara_fast.decoder.truncate

    def tied_once(logits: torch.Tensor, *, capacity: int, **rule: Any) -> CandidateSet:
        capacities.append(capacity)
        found = original(logits, capacity=capacity, **rule)
        # As if more had tied than there are columns; what the columns hold then is of no use.
        if len(capacities) == 3:
            return CandidateSet(
                torch.zeros_like(found.ids),
                torch.full_like(found.logprobs, -torch.inf),
                torch.full_like(found.size, capacity + 1),
            )
        return found

    monkeypatch.setattr(mara_fast.decoder, "truncate", tied_once)
    tied = engine.generate(prompts, **options)
    assert [result.token_ids for result in tied] == [result.token_ids for result in alone]
    assert capacities.count(128) == 1 and set(capacities) == {64, 128}
