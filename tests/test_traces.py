"""How each token was chosen: the trace, and the statistics."""

import dataclasses
import json
import math
from typing import Any

import pytest

import speaker
from mara_fast import DecodingConfig, DecodingStats, TokenTrace
from naming import stable_id
from speaker import OPTIONS, PROMPTS, same

TRACED: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 8, "fallback": "first", "threshold": 0.8},
    {"top_k": 8, "order": "reverse", "threshold": 0.8},
    {"top_k": 8, "order": "top_last", "strategy": "max_prob", "threshold": 0.9},
    {"top_k": 8, "strategy": "max_prob", "fallback": "max_prob", "threshold": 0.97},
    {"top_k": 8, "acceptance": "sample", "strategy": "random", "seed": 3},
    {"top_k": 8, "acceptance": "sample", "order": "top_last", "threshold": 0.8},
)


def tried_order(size: int, order: str) -> list[int]:
    """Ranks in the order they are tried."""
    ranks = list(range(size))
    return {"descending": ranks, "reverse": ranks[::-1], "top_last": ranks[1:] + ranks[:1]}[order]


@pytest.mark.parametrize("options", TRACED, ids=stable_id)
def test_trace(options: dict[str, Any]) -> None:
    results = speaker.engine().generate(list(PROMPTS[1:4]), trace=True, **OPTIONS, **options)
    config = DecodingConfig(**options)
    verdicts: set[str] = set()
    for result in results:
        assert result.trace is not None
        assert tuple(without_more(token) for token in result.trace) == result.tokens
        for token in result.trace:
            verdicts.add(token.verdict)
            check_trace(token, config)
        assert json.loads(json.dumps(result.to_dict()))["trace"][0]["candidates"]
    assert "accepted" in verdicts and (options == {} or "fallback" in verdicts)


def without_more(token: TokenTrace) -> TokenTrace:
    """What is recorded without a trace too."""
    return dataclasses.replace(token, candidates=(), text=None, is_special=False)


def check_trace(token: Any, config: DecodingConfig) -> None:
    candidates, rank = token.candidates, token.rank
    assert len(candidates) == token.num_candidates
    assert len({candidate.token_id for candidate in candidates}) == len(candidates)
    logprobs = [candidate.logprob for candidate in candidates]
    assert logprobs == sorted(logprobs, reverse=True) and logprobs[0] <= 0
    assert candidates[rank].token_id == token.token_id
    assert candidates[rank].logprob == token.logprob
    assert candidates[rank].accept_prob == token.accept_prob
    if token.verdict == "forced":
        assert len(candidates) == 1 and token.num_examined == 0
        assert candidates[0].accept_prob is candidates[0].accepted is None
        return
    order = tried_order(len(candidates), config.order)
    asked = [r for r in order if candidates[r].accept_prob is not None]
    assert asked == order[: token.num_examined]
    assert all((candidates[r].accepted is None) == (r not in asked) for r in order)
    assert all(0 <= candidates[r].accept_prob <= 1 for r in asked)
    if config.acceptance == "greedy":
        for r in asked:
            assert candidates[r].accepted == (candidates[r].accept_prob > config.threshold)
    accepted = [r for r in asked if candidates[r].accepted]
    if token.verdict == "accepted":
        assert rank in accepted
        if config.strategy == "first":
            assert asked[-1] == rank and accepted == [rank]
        elif config.strategy == "max_prob":
            assert token.accept_prob == max(candidates[r].accept_prob for r in accepted)
    else:
        assert token.verdict == "fallback" and not accepted
        assert token.num_examined == len(candidates)
        if config.fallback == "max_prob":
            assert token.accept_prob == max(candidates[r].accept_prob for r in asked)
        else:
            assert rank == order[-1 if config.fallback == "last" else 0]


@pytest.mark.parametrize("options", TRACED, ids=stable_id)
def test_trace_does_not_depend_on_the_window(options: dict[str, Any]) -> None:
    engine = speaker.engine()
    prompts = [PROMPTS[1], PROMPTS[3]]
    runs = [
        engine.generate(prompts, window=window, trace=True, max_new_tokens=6, **options)
        for window in (1, 3, 40)
    ]
    for run in runs[1:]:
        for result, first in zip(run, runs[0], strict=True):
            assert result.trace is not None and first.trace is not None
            assert same(result, first)
            for token, wanted in zip(result.trace, first.trace, strict=True):
                assert token.policy_logprob == pytest.approx(wanted.policy_logprob, abs=1e-4)
                for got, expected in zip(token.candidates, wanted.candidates, strict=True):
                    assert (got.token_id, got.accepted) == (expected.token_id, expected.accepted)
                    assert math.isclose(got.logprob, expected.logprob, abs_tol=1e-4)
                    assert got.accept_prob == pytest.approx(expected.accept_prob, abs=1e-4)
            # All but what the window is there to save.
            neutral = {"num_forwards": 0, "seconds": 0.0, "kl_nats": 0.0}
            assert math.isclose(result.stats.kl_nats, first.stats.kl_nats, abs_tol=1e-3)
            assert dataclasses.replace(result.stats, **neutral) == dataclasses.replace(
                first.stats, **neutral
            )


def test_a_wider_window_saves_forwards() -> None:
    options: dict[str, Any] = {"threshold": 0.9, "top_k": 8, **OPTIONS}
    narrow, wide = (
        speaker.engine().generate("Hi", window=window, **options)[0].stats for window in (1, 8)
    )
    assert wide.num_forwards < narrow.num_forwards
    assert narrow.num_forwards >= narrow.num_examined


def test_trace_of_plain_decoding() -> None:
    [result] = speaker.engine(aligned=False).generate("Hi", trace=True, **OPTIONS)
    assert result.trace is not None
    assert tuple(without_more(token) for token in result.trace) == result.tokens
    assert all(token.candidates == () for token in result.tokens)
    # Drawn or not, no rank is known.
    options: dict[str, Any] = {"acceptance": "sample", "seed": 3}
    [drawn] = speaker.engine(aligned=False).generate("Hi", trace=True, **OPTIONS, **options)
    assert {(t.rank, t.num_candidates) for t in (*result.tokens, *drawn.tokens)} == {(0, 1)}
    assert drawn.token_ids != result.token_ids


def test_trace_of_nothing() -> None:
    [result] = speaker.engine().generate("Hi", trace=True, max_new_tokens=0, top_k=7)
    assert result.trace == () and result.options is not None and result.options["top_k"] == 7


def test_stats_add() -> None:
    results = speaker.engine().generate(list(PROMPTS), **OPTIONS)
    total = sum((result.stats for result in results), DecodingStats())
    assert total.num_tokens == sum(len(result.token_ids) for result in results)
    tokens = [token for result in results for token in result.tokens]
    decided = [token for token in tokens if token.verdict != "forced"]
    assert total.num_decided == len(decided)
    assert total.num_forced == len(tokens) - len(decided)
    assert sum(total.candidate_counts.values()) == total.num_decided
    assert sum(total.accepted_ranks.values()) == total.num_decided - total.num_all_rejected
    assert list(total.candidate_counts) == sorted(total.candidate_counts)
    assert total.rank0_accepted_frac == pytest.approx(
        sum(t.verdict == "accepted" and t.rank == 0 for t in tokens) / len(decided)
    )
    assert total.seconds == pytest.approx(sum(result.stats.seconds for result in results))
    stats = results[0].stats
    assert stats + DecodingStats() == stats == DecodingStats() + stats
    assert total.forwards_per_token == total.num_forwards / total.num_tokens
    with pytest.raises(TypeError, match="unsupported operand"):
        stats + 1  # type: ignore[operator]


def test_stats_of_nothing() -> None:
    empty = DecodingStats()
    for value in (empty.forwards_per_token, empty.tokens_per_s, empty.rank0_accepted_frac):
        assert math.isnan(value)
