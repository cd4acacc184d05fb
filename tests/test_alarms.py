"""What is measured of a policy's probabilities and repetitions, and the alarms they raise."""

import dataclasses
import itertools
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mara_fast.cli
import speaker
from architectures import ARCHITECTURES, random_prompt
from exactness import random_agent
from mara_fast import DecodingConfig, DecodingStats, Engine, Generation, TokenTrace
from mara_fast.alarms import alarms
from mara_fast.cli import app
from oracle import emission_probs, plain_forward, ranks_tried
from tape import TapeCapture

QUIET = {"max_fallback_rate": None, "max_repetition": None, "kl_budget": None}


@cache
def model() -> Any:
    return ARCHITECTURES["llama"]()


@cache
def memo() -> dict:
    """Forwards of the oracle."""
    return {}


def engine_of(*, accept_bias: float = 0.0, **options: Any) -> Engine:
    agent = random_agent(48, accept_bias=accept_bias)
    return Engine(model(), agent, **{"max_batch_size": 2, "prefill_chunk": 5} | options)


def prompts() -> list[list[int]]:
    return [random_prompt(model(), length, seed=length) for length in (9, 2, 5)]


def accept_logits(engine: Engine, result: Generation, position: int) -> list[float]:
    """d of every candidate at a position by a plain forward each, in order of probability."""
    assert result.trace is not None and engine.agent is not None
    prefix = (*result.prompt_token_ids, *result.token_ids[:position])
    candidates = result.trace[position].candidates
    states = [plain_forward(model(), (*prefix, c.token_id), memo())[1] for c in candidates]
    return engine.agent.accept_logit(torch.stack(states)).tolist()


def tried(token: TokenTrace, order: str) -> int:
    return ranks_tried(token.num_candidates, order).index(token.rank)


# The probability that the sampled cascade emits a token

SMALL: dict[str, Any] = {"top_k": 6, "top_p": 1.0, "max_new_tokens": 8, "trace": True}
POLICIES: list[dict[str, Any]] = [
    {"acceptance": acceptance, "order": order, "window": window, "threshold": threshold}
    for acceptance, order, window, threshold in (
        ("greedy", "descending", 1, 0.5),
        ("greedy", "reverse", 4, 0.9),
        ("greedy", "top_last", 6, 0.95),
        ("sample", "descending", 3, 0.5),
        ("sample", "descending", 2, 0.9),
        ("sample", "reverse", 1, 0.8),
        ("sample", "top_last", 40, 0.95),
    )
]


@pytest.mark.parametrize("fallback", ["last", "first", "max_prob"])
@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_policy_logprob_by_enumeration(options: dict[str, Any], fallback: str) -> None:
    """All patterns of verdicts, weighted, lead to the token with this probability."""
    engine = engine_of()
    results = engine.generate(prompts(), fallback=fallback, seed=3, **SMALL, **options)
    seen = set()
    for result in results:
        kl = 0.0
        for position, token in enumerate(result.tokens):
            if token.verdict == "forced":
                assert token.policy_logprob is token.reference_logprob is None
                continue
            by_rank = accept_logits(engine, result, position)
            in_order = [by_rank[rank] for rank in ranks_tried(len(by_rank), options["order"])]
            place, last = tried(token, options["order"]), token.num_candidates - 1
            emitted = emission_probs(in_order, threshold=options["threshold"], fallback=fallback)
            wanted = emitted[place]
            may_be_fallback = {
                "last": False,
                "first": place == 0,
                "max_prob": in_order[place] == max(in_order),
            }[fallback]
            if token.verdict == "accepted" and may_be_fallback:
                # What becomes of the others is not asked.
                bar = math.log(options["threshold"] / (1 - options["threshold"]))
                wanted -= math.prod(1 / (1 + math.exp(d - bar)) for d in in_order)
            assert token.policy_logprob == pytest.approx(math.log(wanted), abs=2e-4)
            assert result.trace is not None
            probs = [math.exp(c.logprob) for c in result.trace[position].candidates]
            reference = math.log(probs[token.rank] / sum(probs))
            assert token.reference_logprob == pytest.approx(reference, abs=1e-4)
            kl += math.log(wanted) - reference
            seen.add((token.verdict, place == last))
        assert result.stats.kl_nats == pytest.approx(kl, abs=1e-3) and kl != 0
    verdicts = {verdict for verdict, _ in seen}
    assert verdicts == {"accepted", "fallback"} or options["threshold"] == 0.5


def test_the_last_of_a_set_is_emitted_either_way() -> None:
    """Accepted last, or fallen back to: if all before it are rejected."""
    engine = engine_of()
    verdicts = set()
    for seed in range(6):
        options: dict[str, Any] = {"seed": seed, "acceptance": "sample", "threshold": 0.9}
        for result in engine.generate(prompts(), window=4, **options, **SMALL):
            for position, token in enumerate(result.tokens):
                if token.verdict == "forced" or token.rank < token.num_candidates - 1:
                    continue
                verdicts.add(token.verdict)
                before = accept_logits(engine, result, position)[:-1]
                wanted = -sum(math.log1p(math.exp(d - math.log(9))) for d in before)
                assert token.policy_logprob == pytest.approx(wanted, abs=2e-4)
    assert verdicts == {"accepted", "fallback"}


def test_probabilities_of_a_position_sum_to_one() -> None:
    """The enumeration itself, and the tokens of many draws against it."""
    logits = [0.3, -1.2, 2.0, 0.0]
    for threshold, fallback in itertools.product((0.2, 0.5, 0.9), ("last", "first", "max_prob")):
        probs = emission_probs(logits, threshold=threshold, fallback=fallback)
        assert sum(probs) == pytest.approx(1)
    engine = engine_of(max_batch_size=32)
    options: dict[str, Any] = SMALL | {"max_new_tokens": 1, "acceptance": "sample"}
    num_draws = 400
    results = engine.generate([prompts()[0]] * num_draws, threshold=0.7, **options)
    by_rank = accept_logits(engine, results[0], 0)
    wanted = emission_probs(by_rank, threshold=0.7, fallback="last")
    for rank, prob in enumerate(wanted):
        found = sum(result.tokens[0].rank == rank for result in results) / num_draws
        assert abs(found - prob) < 4 * math.sqrt(prob * (1 - prob) / num_draws) + 1e-9


@pytest.mark.parametrize("strategy", ["max_prob", "random"])
def test_other_strategies_have_no_such_probability(strategy: str) -> None:
    for result in engine_of().generate(prompts(), strategy=strategy, **SMALL):
        assert {token.policy_logprob for token in result.tokens} == {None}
        assert any(token.reference_logprob is not None for token in result.tokens)
        assert result.stats.kl_nats == 0


def test_plain_decoding_has_none() -> None:
    [result] = Engine(model(), False).generate(prompts()[:1], max_new_tokens=5)
    assert {(t.policy_logprob, t.reference_logprob) for t in result.tokens} == {(None, None)}
    assert result.stats.kl_nats == 0 and result.alarms == ()


def test_steps_on_a_device_and_streams_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"acceptance": "sample", "threshold": 0.8, "max_new_tokens": 8}
    wanted = engine_of().generate(prompts(), window=1, **options)
    engine = engine_of()
    events = list(engine.stream(prompts()[:1], **options))
    tokens = [event.token for event in events if event.token is not None]
    found = [[token.policy_logprob for token in tokens]]
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: False)
    taped = engine_of()
    taped._capture = TapeCapture()
    results = taped.generate(prompts(), window=3, **options)
    assert taped._capture.num_replayed > 5
    found += [[token.policy_logprob for token in result.tokens] for result in results]
    for got, result in zip(found, [wanted[0], *wanted], strict=True):
        assert got == pytest.approx([t.policy_logprob for t in result.tokens], abs=1e-4)


# Counts


def stats_of(ids: list[int], **fields: Any) -> DecodingStats:
    """Of tokens accepted at rank 0."""
    tokens = [
        TokenTrace(
            token_id=token_id,
            rank=0,
            num_candidates=2,
            logprob=-1.0,
            accept_prob=0.9,
            verdict="accepted",
            num_examined=1,
            **fields,
        )
        for token_id in ids
    ]
    return DecodingStats.of(tokens, num_forwards=1, seconds=1.0)


@pytest.mark.parametrize(
    ("ids", "num_repeated"),
    [
        ([], 0),
        ([1, 1, 1], 0),
        ([1, 1, 1, 1], 0),
        ([1, 1, 1, 1, 1], 1),
        ([1] * 9, 5),
        ([1, 2, 3, 1, 2, 3], 0),
        ([1, 2, 3, 4, 1, 2, 3, 5], 0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5], 3),
        ([1, 2, 3, 4, 4, 3, 2, 1], 0),
        ([1, 2] * 5, 5),
    ],
    ids=str,
)
def test_repetitions(ids: list[int], num_repeated: int) -> None:
    assert stats_of(ids).num_repeated == num_repeated
    by_definition = sum(
        any(ids[end - 4 : end] == ids[before - 4 : before] for before in range(4, end))
        for end in range(4, len(ids) + 1)
    )
    assert num_repeated == by_definition


def test_what_is_measured_adds_up() -> None:
    one = stats_of([1] * 9, policy_logprob=-0.5, reference_logprob=-2.0)
    other = stats_of([1, 2] * 5, policy_logprob=-3.0, reference_logprob=-1.0)
    assert (one.kl_nats, other.kl_nats) == (13.5, -20.0)
    total = one + other + DecodingStats()
    assert (total.kl_nats, total.num_repeated) == (-6.5, 10)
    # An answer is not searched for what another said.
    assert stats_of([1] * 18).num_repeated == 14 != (one + one).num_repeated
    assert stats_of([1] * 3, policy_logprob=-1.0).kl_nats == 0


# Alarms


def some(**counts: Any) -> DecodingStats:
    return DecodingStats(**{"num_tokens": 200, "num_decided": 100} | counts)


def only(name: str, limit: float | None, **options: Any) -> DecodingConfig:
    return DecodingConfig(**QUIET | {name: limit} | options)


@pytest.mark.parametrize(
    ("stats", "limit", "is_raised"),
    [
        (some(num_all_rejected=21), 0.2, True),
        (some(num_all_rejected=20), 0.2, False),
        (some(num_all_rejected=20), 0.199, True),
        (some(num_all_rejected=100), None, False),
        (some(num_all_rejected=100), 1, False),
        (some(num_all_rejected=1), 0, True),
        (some(num_all_rejected=0), 0, False),
        (some(num_decided=20, num_all_rejected=20), 0.2, True),
        (some(num_decided=19, num_all_rejected=19), 0.2, False),
        (some(num_decided=0), 0, False),
    ],
)
def test_fallback_rate(stats: DecodingStats, limit: float | None, is_raised: bool) -> None:
    found = alarms(stats, only("max_fallback_rate", limit))
    assert len(found) == is_raised


@pytest.mark.parametrize(
    ("stats", "limit", "is_raised"),
    [
        (some(num_repeated=101), 0.5, True),
        (some(num_repeated=100), 0.5, False),
        (some(num_repeated=100), 0.499, True),
        (some(num_repeated=200), None, False),
        (some(num_tokens=8, num_decided=0, num_repeated=5), 0.5, True),
        (DecodingStats(), 0, False),
    ],
)
def test_repetition_share(stats: DecodingStats, limit: float | None, is_raised: bool) -> None:
    assert len(alarms(stats, only("max_repetition", limit))) == is_raised


@pytest.mark.parametrize(
    ("stats", "limit", "is_raised"),
    [
        (some(kl_nats=60.1), 0.3, True),
        (some(kl_nats=59.9), 0.3, False),
        (some(kl_nats=0.1), 0, True),
        (some(kl_nats=-5.0), 0, False),
        (some(kl_nats=1e9), None, False),
        (DecodingStats(), 0, False),
    ],
)
def test_kl_budget(stats: DecodingStats, limit: float | None, is_raised: bool) -> None:
    assert len(alarms(stats, only("kl_budget", limit))) == is_raised


def test_what_alarms_say() -> None:
    """What was measured, the limit, what to do."""
    stats = some(num_all_rejected=37, num_repeated=151, kl_nats=250.0)
    config = DecodingConfig(kl_budget=1.2, threshold=0.7, top_k=9, top_p=0.8, fallback="first")
    rejected, repeated, drifted = alarms(stats, config)
    for text, parts in (
        (
            rejected,
            (
                "37.0% of 100 decided",
                "max_fallback_rate=0.2",
                "fallback 'first'",
                "threshold=0.7",
                "top_k=9",
                "top_p=0.8",
            ),
        ),
        (repeated, ("75.5% of 200 tokens", "max_repetition=0.5", "look at the texts")),
        (drifted, ("1.250 nats per token", "kl_budget=1.2", "200 tokens", "lower threshold=0.7")),
    ):
        assert all(part in text for part in parts), text
        assert "\n" not in text
    assert "; with several agents, give one less weight (agent_weights)" in drifted
    assert alarms(some(), DecodingConfig(kl_budget=0.0)) == ()
    # Numbers as they were given: not all of them are round.
    exact = DecodingConfig(threshold=0.99999999, top_p=0.12345678, max_fallback_rate=0.12345678)
    [rejected] = alarms(some(num_all_rejected=37), exact)
    for number in ("threshold=0.99999999", "top_p=0.12345678", "max_fallback_rate=0.12345678"):
        assert number in rejected


def test_over_rejection_is_seen() -> None:
    """An agent that accepts nothing; one that accepts everything."""
    options: dict[str, Any] = {"max_new_tokens": 32, "top_k": 8, "eos_token_id": []}
    for bias, is_raised in ((-30.0, True), (30.0, False)):
        for result in engine_of(accept_bias=bias).generate(prompts(), **options):
            raised = [text for text in result.alarms if "rejected every candidate" in text]
            assert len(raised) == is_raised
            assert result.to_dict().get("alarms", []) == list(result.alarms)
            assert ("alarms" in result.to_dict()) == bool(result.alarms)
            json.dumps(result.to_dict())
        quiet = engine_of(accept_bias=bias).generate(prompts(), **options, **QUIET)
        assert all(result.alarms == () for result in quiet)


def test_a_limit_changes_no_token_and_no_decoder() -> None:
    engine = engine_of(accept_bias=-30.0)
    first = engine.generate(prompts(), max_new_tokens=24)
    decoder = engine._idle
    second = engine.generate(prompts(), max_new_tokens=24, max_fallback_rate=None, kl_budget=5)
    assert engine._idle is decoder is not None
    assert [r.tokens for r in first] == [r.tokens for r in second]
    assert [r.alarms for r in first] != [r.alarms for r in second]


# The command


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The command's engine: one whose agent rejects everything."""
    agent = random_agent(speaker.model().config.hidden_size, accept_bias=-30.0)
    engine = Engine(speaker.model(), agent, speaker.tokenizer())
    monkeypatch.setattr(mara_fast.cli, "load_engine", lambda *args, **options: engine)
    return engine


def run(*arguments: str | Path) -> list[str]:
    """Lines of standard error."""
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return [line for line in result.stderr.splitlines() if "prompt/s" not in line]


def test_a_run_says_it_once(strict: Engine, tmp_path: Path) -> None:
    """After the summary, of all answers together: none of them is long enough by itself."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hi", "Ho", "He")))
    tokens = ("--max-new-tokens", "8", "--max-repetition", "1", "--ignore-eos")
    results = strict.generate(["Hi", "Ho", "He"], max_new_tokens=8, ignore_eos=True)
    total = sum((result.stats for result in results), DecodingStats())
    assert total.num_decided >= 20 > max(result.stats.num_decided for result in results)
    assert all("rejected" not in text for result in results for text in result.alarms)

    [alarm] = [line for line in run("-i", path, *tokens) if "alarm" in line]
    text = f"alarm: the agent rejected every candidate at 100.0% of {total.num_decided} decided"
    assert alarm.startswith(text)
    out = tmp_path / "out.jsonl"
    lines = run("-i", path, "-o", out, *tokens)
    assert f"{out}: 3 results" in lines[-2] and lines[-1] == alarm
    assert run("-i", path, *tokens, "--max-fallback-rate", "1") == []
    assert run("-i", path, *tokens, "--stats")[1:] == [alarm]


def test_one_prompt_says_it_after_its_text(strict: Engine) -> None:
    tokens = ("--max-new-tokens", "30", "--ignore-eos", "--max-repetition", "1")
    [alarm] = run("Hi", *tokens)
    assert alarm.startswith("alarm: the agent rejected every candidate")
    assert run("Hi", *tokens, "--stats")[1:] == [alarm]
    assert run("Hi", *tokens, "--max-fallback-rate", "1") == []
    [budget] = run("Hi", *tokens, "--max-fallback-rate", "1", "--kl-budget", "0")
    assert "nats per token likelier" in budget


def test_empty_answers_are_quiet() -> None:
    [result] = engine_of().generate(prompts()[:1], max_new_tokens=0)
    assert result.alarms == () and dataclasses.asdict(result.stats)["kl_nats"] == 0
