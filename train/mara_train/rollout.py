"""Rollouts: the engine decodes with a sampling agent, and every candidate examined is a transition.

    for each window the agent scored:                     all slots at once
        examined = candidates up to the accepted one
        keep their states, actions, token rewards
    an episode that ends takes its chain along

Shapes: B slots, W window, T transitions of an episode, H hidden, n examined candidates of a window.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mara_fast.config import DecodingConfig
from mara_fast.decoder import ScoredWindow
from mara_fast.engine import Engine
from mara_fast.outputs import Generation
from mara_train.token_rewards import (
    TokenRewardConfig,
    log_policy,
    log_reference,
    of_outcomes,
    penalty,
)


class Chain(NamedTuple):
    """Transitions of an episode, or a part of one, in order."""

    states: Tensor
    """[T, H], in the dtype they are kept in, on the language model's device."""
    actions: Tensor
    """bool [T], True = accept."""
    positions: Tensor
    """int64 [T], output position decided."""
    token_rewards: Tensor
    """float32 [T], -λ penalty."""
    kl: Tensor
    """float32 [T], log π - log π_ref."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """A finished sequence and its transitions."""

    sequence: int
    """Key of its draws."""
    chain: Chain
    generation: Generation


class ChainRecorder:
    """Observes a run of the engine and sorts what it sees by sequence.

    Args:
        decoding: the options of the run.
        rewards: how transitions are rewarded.
        dtype: states are kept in it.
    """

    def __init__(
        self, decoding: DecodingConfig, rewards: TokenRewardConfig, *, dtype: torch.dtype
    ) -> None:
        self.decoding, self.rewards, self.dtype = decoding, rewards, dtype
        self._parts: dict[int, list[Chain]] = defaultdict(list)

    def __call__(self, window: ScoredWindow) -> None:
        """Keeps the examined candidates of a window."""
        state, size = window.state, window.size
        column_W = torch.arange(window.rank.shape[1], device=size.device)
        tried_BW = state.offset[:, None] + column_W
        inside_BW = column_W < window.count[:, None]
        is_final_BW = tried_BW == size[:, None] - 1
        accepted_B = window.decided & state.held_accepted
        # The cascade asks up to the accepted candidate; of a set all rejected, about all.
        chosen_B = torch.where(accepted_B, state.held_tried, size - 1)
        examined_BW = inside_BW & (tried_BW <= chosen_B[:, None])
        # A forced token was emitted unasked; it passes here only to enter the cache.
        examined_BW &= size[:, None] > 1
        is_forced_BW = is_final_BW & (self.decoding.fallback == "last")
        action_BW = (accepted_B[:, None] & (tried_BW == state.held_tried[:, None])) | (
            (window.decided & ~accepted_B)[:, None] & is_forced_BW
        )
        log_policy_BW = log_policy(
            window.accept_logit,
            log_cascade_BW=window.log_prob,
            inside_BW=inside_BW,
            is_last_BW=is_forced_BW,
            config=self.rewards,
        )
        log_reference_BW = self._log_reference(window)
        penalty_BW = penalty(log_policy_BW, log_reference_BW, self.rewards)

        slot_n, column_n = examined_BW.nonzero(as_tuple=True)
        chain = Chain(
            states=window.hidden[slot_n, column_n].to(self.dtype),
            actions=action_BW[slot_n, column_n],
            positions=state.num_tokens[slot_n],
            token_rewards=-self.rewards.kl_weight * penalty_BW[slot_n, column_n],
            kl=(log_policy_BW - log_reference_BW)[slot_n, column_n],
        )
        counts = examined_BW.sum(1).tolist()
        parts = zip(*(tensor.split(counts) for tensor in chain), strict=True)
        for sequence, count, part in zip(state.sequence.tolist(), counts, parts, strict=True):
            if count:
                self._parts[sequence].append(Chain(*part))

    def take(self, sequence: int) -> Chain | None:
        """The transitions of a sequence, which are then forgotten; None: every token was forced."""
        parts = self._parts.pop(sequence, None)
        if parts is None:
            return None
        chain = Chain(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        if self.rewards.kl_of == "candidate":
            return chain
        rewards = of_outcomes(chain.token_rewards, chain.actions, chain.positions)
        return chain._replace(token_rewards=rewards)

    def _log_reference(self, window: ScoredWindow) -> Tensor:
        state, temperature = window.state, self.rewards.reference_temperature
        columns = torch.arange(state.candidate_logprobs.shape[1], device=window.size.device)
        outside_BC = columns >= window.size[:, None]
        scaled_BC = (state.candidate_logprobs / temperature).masked_fill(outside_BC, -torch.inf)
        emitted_BN = torch.arange(state.record.shape[1], device=window.size.device)
        emitted_BN = emitted_BN < state.num_tokens[:, None]
        return log_reference(
            state.candidate_logprobs.gather(1, window.rank),
            log_norm_B=scaled_BC.logsumexp(1),
            emitted_logprob_B=state.record_floats[..., 0].where(emitted_BN, 0.0).sum(1),
            num_emitted_B=state.num_tokens,
            config=self.rewards,
        )


class Rollout:
    """Collects episodes with the engine's own agent.

    Args:
        engine: with an agent.
        decoding: options of the episodes; candidates are accepted by chance whatever it says.
        rewards: how transitions are rewarded.
        dtype: of the states kept.
    """

    def __init__(
        self,
        engine: Engine,
        decoding: DecodingConfig,
        rewards: TokenRewardConfig,
        *,
        dtype: torch.dtype,
    ) -> None:
        if engine.agent is None:
            raise ValueError("rollouts need an engine with an agent")
        options: dict[str, Any] = {"acceptance": "sample", "trace": False}
        if rewards.needs_whole_set:
            # One window for any set, but for more ties than a buffer has room for.
            options["window"] = (decoding.top_k or engine.lm.vocab_size) + 24
        self.engine, self.rewards, self.dtype = engine, rewards, dtype
        self.decoding = decoding.replace(**options)

    def episodes(self, prompts: Sequence[Any], sequence_ids: Sequence[int]) -> Iterator[Episode]:
        """Episodes of the prompts as they end.

        Args:
            prompts: as :meth:`Engine.generate` takes several.
            sequence_ids: keys of the draws, all different.
        """
        recorder = ChainRecorder(self.decoding, self.rewards, dtype=self.dtype)
        empty = _empty_chain(self.engine, self.dtype)
        finished = self.engine.as_completed(
            prompts, self.decoding, sequence_ids=sequence_ids, observer=recorder
        )
        for index, generation in finished:
            chain = recorder.take(sequence_ids[index])
            yield Episode(sequence=sequence_ids[index], chain=chain or empty, generation=generation)


def _empty_chain(engine: Engine, dtype: torch.dtype) -> Chain:
    device = engine.lm.device
    return Chain(
        states=torch.empty(0, engine.lm.hidden_size, dtype=dtype, device=device),
        actions=torch.empty(0, dtype=torch.bool, device=device),
        positions=torch.empty(0, dtype=torch.int64, device=device),
        token_rewards=torch.empty(0, device=device),
        kl=torch.empty(0, device=device),
    )
