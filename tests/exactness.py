"""Comparison of the engine with the sequential cascade, token by token and count by count."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from mara_fast import Engine, Generation, MaraAgent
from mara_fast.mixture import AgentMixture
from mara_fast.row_budget import StepShape
from mara_fast.window import StepCosts
from oracle import AcceptLogits, OracleRun, combined, sequential_cascade

# Rounding moves states by about 1e-6; a decision closer to a flip than this may go either way.
RISKY = 2e-5


def random_agent(hidden_size: int, *, seed: int = 0, accept_bias: float = 0.8) -> MaraAgent:
    """An agent with spread accept logits that accepts more often than not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        agent = MaraAgent(hidden_size, inner_size=64).requires_grad_(False)
        agent.linear1.weight.mul_(3)
        agent.linear2.weight.mul_(3)
        agent.output_linear.weight.mul_(4)
        states = torch.randn(512, hidden_size)
        d = agent.accept_logit(states)
        agent.output_linear.weight.div_(d.std() / 1.5)
        d = agent.accept_logit(states)
        agent.output_linear.bias[1] += accept_bias - d.mean()
    return agent


class FixedBudget(StepCosts):
    """As many rows per slot however many decode: ``engine._costs`` for an automatic window."""

    def __init__(self, window: int, rows_per_slot: float) -> None:
        super().__init__(lambda *_: math.nan)
        self.window, self.rows_per_slot = window, rows_per_slot

    def best_shape(self, num_slots: int, **_: bool) -> StepShape:
        """Nothing is measured."""
        rows = min(num_slots * self.window, max(num_slots, int(self.rows_per_slot * num_slots)))
        return StepShape(window=self.window, num_rows=rows)


class NothingToCompare(AssertionError):
    """A comparison that could not have failed."""


def check_exact(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    memo: dict | None = None,
    sequence_ids: Sequence[int] | None = None,
    window: int | str = "auto",
    **options: Any,
) -> list[Generation]:
    """Decodes and compares every prompt with the oracle; returns the engine's results.

    A run is compared up to its first risky decision. At least one token of all must remain.
    """
    accept_logits = accept_logits_of(engine, **options)
    results = engine.generate(
        [list(prompt) for prompt in prompts],
        window=window,
        sequence_ids=sequence_ids,
        **options,
    )
    keys = range(len(prompts)) if sequence_ids is None else sequence_ids
    eos = engine.eos_ids(engine.config(eos_token_id=options.get("eos_token_id")))
    compared = 0
    for prompt, result, sequence in zip(prompts, results, keys, strict=True):
        oracle_options = {
            name: value for name, value in options.items() if name not in _NOT_THE_ORACLES
        }
        expected = sequential_cascade(
            engine.lm.model,
            accept_logits,
            prompt,
            sequence=sequence,
            eos_token_ids=eos,
            memo=memo,
            **oracle_options,
        )
        width = None if window == "auto" else window
        compared += _compare(result, expected, len(prompt), width, engine.prefill_chunk)
    if not compared and options["max_new_tokens"]:
        raise NothingToCompare("every run begins with a risky decision")
    return results


_NOT_THE_ORACLES = ("eos_token_id", "trace", "agent_weights", "agent_combination")


def accept_logits_of(
    engine: Engine,
    *,
    agent_weights: Sequence[float] | None = None,
    agent_combination: str = "logit",
    **others: Any,
) -> AcceptLogits:
    """What the oracle asks: the engine's agent, or its agents combined by definition."""
    if not isinstance(engine.agent, AgentMixture):
        return engine.agent.accept_logit
    agents = [agent.accept_logit for agent in engine.agent.agents]
    return combined(agents, agent_weights, agent_combination)


def _compare(
    result: Generation, expected: OracleRun, prompt_length: int, window: int | None, chunk: int
) -> int:
    """Compares one run; returns how many tokens were compared."""
    safe = len(expected.steps)
    for index, step in enumerate(expected.steps):
        if step.margin < RISKY:
            safe = index
            break
    assert tuple(result.token_ids[:safe]) == expected.token_ids[:safe]
    for token, step in zip(result.tokens[:safe], expected.steps[:safe], strict=True):
        assert token.num_candidates == step.set_size
        assert token.rank == step.rank
        assert token.num_examined == step.examined
        verdict = {None: "forced", True: "accepted", False: "fallback"}[step.accepted]
        assert token.verdict == verdict
        assert math.isclose(token.logprob, step.logprobs[step.rank], abs_tol=1e-3)
        if step.accepted is not None:
            accept_prob = 1 / (1 + math.exp(-step.accept_logits[step.tried]))
            assert math.isclose(token.accept_prob, accept_prob, abs_tol=1e-3)
    if safe < len(expected.steps):
        return safe

    assert result.token_ids == list(expected.token_ids)
    assert result.finish_reason == expected.finish_reason
    stats, decided = result.stats, [s for s in expected.steps if s.accepted is not None]
    assert stats.num_tokens == len(expected.steps)
    assert stats.num_decided == len(decided)
    assert stats.num_forced == len(expected.steps) - len(decided)
    assert stats.num_examined == sum(s.examined for s in decided)
    assert stats.num_all_rejected == sum(not s.accepted for s in decided)
    assert stats.candidate_counts == Counter(s.set_size for s in decided)
    assert stats.accepted_ranks == Counter(s.rank for s in decided if s.accepted)
    # As a batch empties an automatic window widens.
    if window is not None and expected.finish_reason != "error" and expected.steps:
        forwards = -(-prompt_length // chunk) + sum(
            math.ceil(max(s.examined, 1) / window) for s in expected.steps
        )
        # A forced token is emitted when its set is known; nobody needs its state at the end.
        forwards -= expected.steps[-1].accepted is None
        assert stats.num_forwards == forwards
    return safe
