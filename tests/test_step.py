"""Properties of the step itself: nothing read on the host, NaN contained, mutations noticed."""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mara_fast.cache
import mara_fast.decoder
import mara_kernels.attention.rows
from architectures import ARCHITECTURES, random_prompt
from exactness import FixedBudget, check_exact, random_agent
from host_reads import ForbidHostReads
from launches import Launches
from mara_fast import DecodingConfig, Engine, MaraAgent
from mara_fast.cache import SlotCache
from mara_fast.decoder import Decoder
from mara_fast.language_model import FrozenLM
from mara_fast.row_budget import StepShape
from mara_fast.self_check import Checked
from mara_kernels.attention import Tree
from mara_kernels.bookkeeping import Proposal

PROMPT_LENGTHS = (12, 3, 7)


def make_engine(name: str = "llama", **options: Any) -> Engine:
    model = ARCHITECTURES[name]()
    return Engine(model, random_agent(48), max_batch_size=2, prefill_chunk=5, **options)


def prompts_for(engine: Engine) -> list[list[int]]:
    return [random_prompt(engine.lm.model, length, seed=length) for length in PROMPT_LENGTHS]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral", "deepseek_v3"])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 3},
        {"window": 4, "strategy": "random", "acceptance": "sample", "trace": True},
        {"window": 1, "fallback": "first", "min_new_tokens": 4},
    ],
)
def test_step_reads_nothing_on_the_host(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: False)
    steps = 0

    def guarded(method: Callable) -> Callable:
        def call(self: Decoder, *args: Any) -> None:
            nonlocal steps
            steps += 1
            with ForbidHostReads():
                method(self, *args)

        return call

    engine = make_engine(name)
    engine.generate(prompts_for(engine), max_new_tokens=6, **options)  # allocates the cache
    monkeypatch.setattr(Decoder, "step", guarded(Decoder.step))
    monkeypatch.setattr(Decoder, "prefill", guarded(Decoder.prefill))
    engine.generate(prompts_for(engine), max_new_tokens=6, **options)
    assert steps > 6


OPERATIONS = {
    mara_fast.decoder: ("propose", "cascade", "settle", "admit", "truncate", "greedy"),
    mara_fast.cache: ("keep_rows",),
    FrozenLM: ("hidden_states", "logits"),
    MaraAgent: ("accept_logit",),
}
"""What a step is made of; on a GPU each but the language model is a few launches."""


@pytest.mark.parametrize("has_agent", [True, False])
def test_a_step_launches_nothing_between_its_operations(
    has_agent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the products of a language model a launch takes longer than its work."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: False)
    launches = Launches()
    for place, names in OPERATIONS.items():
        for name in names:
            monkeypatch.setattr(place, name, launches.hidden(getattr(place, name)))
    engine = make_engine() if has_agent else Engine(ARCHITECTURES["llama"](), False)
    steps = []

    def counted(self: Decoder, num_decoding: int, original: Callable = Decoder.step) -> None:
        # The first makes what lives as long as the decoder.
        mode = launches if steps else contextlib.nullcontext()
        steps.append(1)
        with mode:
            original(self, num_decoding)

    monkeypatch.setattr(Decoder, "step", counted)
    engine.generate(prompts_for(engine), max_new_tokens=6, window=3, ignore_eos=True)
    assert len(steps) > 3 and launches.found == []


def test_the_guard_notices_a_host_read() -> None:
    with pytest.raises(AssertionError, match="host"), ForbidHostReads():
        int(torch.ones(3).max())


def _length_off_by(delta: int) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        original = mara_kernels.attention.rows.visibility

        def visibility(lengths: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return original((lengths + delta).clamp(min=0), *args, **kwargs)

        monkeypatch.setattr(mara_kernels.attention.rows, "visibility", visibility)

    return mutate


def _window_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original = mara_kernels.attention.rows.visibility

    def visibility(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> torch.Tensor:
        wider = None if sliding_window is None else sliding_window + 1
        return original(*args, sliding_window=wider, **kwargs)

    monkeypatch.setattr(mara_kernels.attention.rows, "visibility", visibility)


def _position_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original = mara_fast.decoder.propose

    def propose(*args: Any, **options: Any) -> Proposal:
        proposal = original(*args, **options)
        return dataclasses.replace(proposal, positions=proposal.positions + 1)

    monkeypatch.setattr(mara_fast.decoder, "propose", propose)


def _siblings_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Decoder._siblings

    def siblings(self: Decoder, width: int) -> Tree:
        tree = original(self, width)
        return dataclasses.replace(tree, ancestors=torch.ones_like(tree.ancestors))

    monkeypatch.setattr(Decoder, "_siblings", siblings)


def _wrong_row_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SlotCache.commit_rows

    def commit_rows(
        self: SlotCache, slots: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
    ) -> None:
        original(self, slots, self.view.base + torch.zeros_like(source), destination)

    monkeypatch.setattr(SlotCache, "commit_rows", commit_rows)


def _nothing_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotCache, "commit_rows", lambda *args: None)


MUTATIONS = {
    "prefix one too long": _length_off_by(1),
    "prefix one too short": _length_off_by(-1),
    "window one too wide": _window_off_by_one,
    "position one too far": _position_off_by_one,
    "siblings see each other": _siblings_see_each_other,
    "wrong row committed": _wrong_row_committed,
    "nothing committed": _nothing_committed,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_exactness_suite_notices(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a mistake that an implementation of the step could make."""
    engine = make_engine("mistral")
    options = {"max_new_tokens": 10, "window": 4, "eos_token_id": 1, "ignore_eos": True}
    check_exact(engine, prompts_for(engine), **options)
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises(AssertionError):
        check_exact(engine, prompts_for(engine), **options)


def test_nan_ends_its_own_sequence_only() -> None:
    """A token whose embedding is NaN, in one prompt of many and among the others' candidates."""
    engine = make_engine()
    prompts = prompts_for(engine) * 2
    before = engine.generate(prompts, max_new_tokens=8, window=1, ignore_eos=True, trace=True)
    steps = [token for result in before for token in result.trace]
    asked = {c.token_id for step in steps for c in step.candidates if c.accepted is not None}
    asked |= {step.token_id for step in steps}.union(*prompts)
    # A candidate of theirs that nobody asked about: a wide window meets it all the same.
    seen = {c.token_id for step in steps for c in step.candidates[:3]}
    poison = min(seen - asked)
    engine.lm.model.get_input_embeddings().weight[poison] = torch.nan
    poisoned = [5, poison, 6]
    for window in (1, 3, 40):
        results = engine.generate(
            [prompts[0], poisoned, *prompts[1:]], max_new_tokens=8, window=window, ignore_eos=True
        )
        bad = results.pop(1)
        assert bad.finish_reason == "error" and bad.token_ids == []
        assert "position 3 " in bad.error and "logits are NaN" in bad.error
        assert [result.token_ids for result in results] == [r.token_ids for r in before]
        assert all(result.error is None for result in results)


@pytest.mark.parametrize("host_reads", [True, False])
def test_nan_stays_out_of_a_slot_that_another_takes(
    host_reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that has ended idles beside one whose token is NaN, and then takes a prompt."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: host_reads)
    model = ARCHITECTURES["llama"]()
    prompts = [random_prompt(model, 12), *(random_prompt(model, 3, seed=s) for s in range(30))]
    plain = Engine(model, False, max_batch_size=32)
    answers = [r.token_ids for r in plain.generate(prompts, max_new_tokens=6, ignore_eos=True)]
    long, *others = range(len(prompts))

    def met(*indices: int) -> set[int]:
        return set().union(*(prompts[i] + answers[i] for i in indices))

    # What ends the one, and what spoils the other, is met by nobody else.
    ended, spoilt, innocent = next(
        (a, x, c)
        for a, x, c in itertools.permutations(others, 3)
        if not {answers[a][0], answers[x][0]} & (met(long, c) | {*prompts[a], *prompts[x]})
        and answers[a][0] != answers[x][0]
    )
    engine = Engine(model, random_agent(48), max_batch_size=3)
    assert engine.lm.can_pack
    # Packed: fewer rows than slots times their most.
    engine._costs = FixedBudget(3, 1.5)
    model.get_input_embeddings().weight[answers[spoilt][0]] = torch.nan
    results = engine.generate(
        [prompts[i] for i in (long, ended, spoilt, innocent)],
        max_new_tokens=6,
        top_k=1,
        eos_token_id=answers[ended][0],
    )
    assert [r.finish_reason for r in results] == ["length", "eos", "error", "length"]
    assert [results[0].token_ids, results[3].token_ids] == [answers[long], answers[innocent]]


def test_nan_accept_logit_names_the_position() -> None:
    """Rank 0 of some set leads to a NaN state: the cascade asks about it and cannot go on."""
    engine = make_engine()
    prompt = prompts_for(engine)[0]
    (before,) = engine.generate([prompt], max_new_tokens=8, trace=True, ignore_eos=True)
    index = next(i for i, token in enumerate(before.trace) if token.verdict == "accepted" and i)
    poison = before.trace[index].candidates[0].token_id
    if poison in prompt or poison in before.token_ids[:index]:
        pytest.skip("the token was met before")
    engine.lm.model.get_input_embeddings().weight[poison] = torch.nan
    for window in (1, 5):
        (result,) = engine.generate([prompt], max_new_tokens=8, window=window, ignore_eos=True)
        assert result.finish_reason == "error"
        assert result.token_ids == before.token_ids[:index]
        assert f"at position {len(prompt) + index} (output token {index})" in result.error


def test_infinite_logits_are_an_error() -> None:
    engine = make_engine()
    engine.lm.model.lm_head.weight[7] = torch.inf
    (result,) = engine.generate([[5, 6]], max_new_tokens=4)
    assert result.finish_reason == "error" and "position 2 " in result.error


@pytest.mark.parametrize("host_reads", [True, False])
def test_eos_as_the_only_candidate(host_reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is emitted unasked, from the prefill alone, and the slot goes on to the next prompt."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: host_reads)
    engine = make_engine()
    for result in engine.generate(prompts_for(engine), top_k=1, eos_token_id=tuple(range(256))):
        assert result.finish_reason == "eos" and len(result.token_ids) == 1
        assert result.tokens[0].verdict == "forced"
        assert result.stats.num_forwards == -(-len(result.prompt) // 5)


@pytest.mark.parametrize("host_reads", [True, False])
def test_a_buffer_that_grows_changes_no_log_probability(
    host_reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the slots that are in the middle of a set when that of another outgrows it."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: host_reads)
    model = ARCHITECTURES["llama"]()
    weight = model.lm_head.weight
    tied = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))[:100]
    with torch.no_grad():
        weight[tied] = weight[tied[0]].clone()
    prompts = [random_prompt(model, 3 + k, seed=k) for k in range(6)]
    # Most are rejected: sets take many windows.
    agent = random_agent(48, accept_bias=-2.0)
    alone, together = (
        Engine(model, agent, max_batch_size=size, prefill_chunk=5).generate(
            prompts, max_new_tokens=6, top_k=8, top_p=1.0, window=3, ignore_eos=True
        )
        for size in (1, 4)
    )
    # A hundred tokens in a set that had room for 64.
    assert any(token.num_candidates > 64 for result in alone for token in result.tokens)
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.stats.kl_nats == pytest.approx(other.stats.kl_nats, abs=1e-3)
        for mine, its in zip(one.tokens, other.tokens, strict=True):
            assert mine.reference_logprob == pytest.approx(its.reference_logprob, abs=1e-3)


def test_slots_move_with_their_sequences() -> None:
    """Sequences of very unequal length: every free slot is refilled, and rows keep their own."""
    engine = make_engine("gemma2")
    prompts = [random_prompt(engine.lm.model, 1 + (5 * i) % 13, seed=i) for i in range(9)]
    eos = tuple(range(3, 120))
    check_exact(engine, prompts, max_new_tokens=6, window=2, eos_token_id=eos)


def test_the_model_is_left_as_it_was() -> None:
    model = ARCHITECTURES["llama"]()
    implementation = model.config._attn_implementation
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7]])
    logits = model(ids).logits
    Engine(model, random_agent(48)).generate([[5, 6, 7]], max_new_tokens=4)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, logits)
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "shape", [StepShape(window=3, num_rows=12), StepShape(window=4, num_rows=7)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"acceptance": "sample", "strategy": "random", "fallback": "max_prob", "trace": True},
        {"order": "reverse", "min_new_tokens": 3},
    ],
)
@pytest.mark.parametrize("has_agent", [True, False])
def test_all_tensors_are_where_the_model_is(
    has_agent: bool, options: dict[str, Any], shape: StepShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which has no values: one of the CPU cannot be mixed with it."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.where(torch.ones(2, dtype=torch.bool), torch.ones(2, device="meta"), torch.ones(2))
    monkeypatch.setattr("mara_fast.language_model.check_path", lambda lm: Checked((), 1, True))
    lm = FrozenLM(copy.deepcopy(ARCHITECTURES["llama"]()).to("meta"))
    agent = random_agent(48).to("meta") if has_agent else None
    decoder = Decoder(
        lm,
        agent,
        DecodingConfig(max_new_tokens=9, **options),
        cache=SlotCache(num_slots=4, max_length=32, scratch=8),
        num_slots=4,
        shapes=(shape,) * 4,
        eos_ids=(2,),
        host_reads=False,
    )
    ids = torch.full((4, 8), 5, device="meta")
    whole = ids[:, 0]
    with torch.inference_mode():
        decoder.prefill(slice(0, 4), ids, whole, whole > 0)
        decoder.step(4)
        decoder.move(3, 0)
        decoder.swap(1, 2)
        decoder.step(4)
    assert all(tensor.is_meta for tensor in decoder.state.tensors().values())
