"""A finished slot as a :class:`Generation`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mara_fast.alarms import alarms
from mara_fast.config import DecodingConfig
from mara_fast.outputs import (
    CandidateTrace,
    DecodingStats,
    FinishReason,
    Generation,
    TokenTrace,
)
from mara_fast.slot_state import Ended
from mara_fast.token_text import TokenNames, decode_text, text_pieces
from mara_kernels.bookkeeping import (
    ACCEPTED,
    BAD_ACCEPT,
    BAD_LOGITS,
    EOS,
    FALLBACK,
    FORCED,
    LENGTH,
    PLAIN,
)
from mara_kernels.cascade import acceptance_uniforms, rank_of_tried

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REASONS: dict[int, FinishReason] = {
    EOS: "eos",
    LENGTH: "length",
    BAD_LOGITS: "error",
    BAD_ACCEPT: "error",
}
_VERDICTS = {FORCED: "forced", ACCEPTED: "accepted", FALLBACK: "fallback", PLAIN: "plain"}


def collect(
    ended: Ended,
    *,
    prompt: Any,
    prompt_token_ids: list[int],
    stopped_after: int | None,
    config: DecodingConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    seconds: float,
) -> Generation:
    """The result of a slot.

    Args:
        ended: what the slot left.
        prompt, prompt_token_ids: as the request has them.
        stopped_after: tokens up to the end of a stop string; None if there was none.
        config: decoding options.
        tokenizer: makes the text; None: no text.
        seconds: since its first forward.
    """
    num_tokens = ended.num_tokens if stopped_after is None else stopped_after
    tokens = token_traces(
        ended.record[:num_tokens].tolist(),
        ended.record_floats[:num_tokens].tolist(),
        config=config,
    )
    ids = [token.token_id for token in tokens]
    reason: FinishReason = "stop" if stopped_after is not None else _REASONS[ended.done]
    text = None
    if tokenizer is not None:
        text = decode_text(tokenizer, ids)
        if reason == "stop":
            text = text[: min(i for s in config.stop_strings if (i := text.find(s)) >= 0)]
    error = None
    if reason == "error":
        what = (
            "the language model's logits are NaN or infinite"
            if ended.done == BAD_LOGITS
            else "the agent's accept logit is NaN"
        )
        position = len(prompt_token_ids) + num_tokens
        error = f"{what} at position {position} (output token {num_tokens})"
    stats = DecodingStats.of(tokens, num_forwards=ended.num_forwards, seconds=seconds)
    return Generation(
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        text=text,
        token_ids=ids,
        finish_reason=reason,
        stats=stats,
        tokens=tokens,
        trace=_trace(ended, tokens, config, tokenizer) if config.trace else None,
        options=config.to_dict() if config.trace else None,
        error=error,
        alarms=alarms(stats, config),
    )


def token_traces(
    records: list[list[int]], floats: list[list[float]], *, config: DecodingConfig
) -> tuple[TokenTrace, ...]:
    """How tokens were chosen.

    Args:
        records: rows of :attr:`SlotState.record`.
        floats: rows of :attr:`SlotState.record_floats`.
        config: decoding options.
    """
    traces = []
    for (token_id, size, rank, tried, verdict), (logprob, logit, policy, reference) in zip(
        records, floats, strict=True
    ):
        asked = verdict in (ACCEPTED, FALLBACK)
        # Of the other strategies Eq. 6 says nothing.
        has_policy = asked and config.strategy == "first"
        stops_early = verdict == ACCEPTED and config.strategy == "first"
        traces.append(
            TokenTrace(
                token_id=token_id,
                rank=rank,
                num_candidates=size,
                logprob=logprob,
                accept_prob=_sigmoid(logit) if asked else None,
                verdict=_VERDICTS[verdict],  # type: ignore[arg-type]
                num_examined=(tried + 1 if stops_early else size) if asked else 0,
                policy_logprob=policy if has_policy else None,
                reference_logprob=reference if asked else None,
            )
        )
    return tuple(traces)


_MARGIN = 16
"""Characters by which a text may differ at its beginning from the same tokens amid a longer one:
a leading space dropped, the rest of a character."""


def stop_position(
    ids: Sequence[int],
    *,
    start: int,
    stop_strings: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
) -> int | None:
    """Tokens up to the first that completes a stop string; None if none does.

    Args:
        ids: tokens emitted so far.
        start: so many of them are known to complete none.
    """
    if not _may_stop(ids, start, stop_strings, tokenizer):
        return None
    for count in range(start + 1, len(ids) + 1):
        text = decode_text(tokenizer, ids[:count])
        if any(stop in text for stop in stop_strings):
            return count
    return None


def _may_stop(
    ids: Sequence[int],
    start: int,
    stop_strings: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
) -> bool:
    """Whether the end of the text holds a stop string: a decision without decoding it all again."""
    needed = max(map(len, stop_strings)) + _MARGIN
    num_before = needed
    while True:
        first = max(0, start - num_before)
        if not first or len(decode_text(tokenizer, ids[first:start])) >= needed:
            break
        # Special tokens and parts of a character have no text of their own.
        num_before *= 2
    text = decode_text(tokenizer, ids[first:])
    return any(stop in text for stop in stop_strings)


def _trace(
    ended: Ended,
    tokens: Sequence[TokenTrace],
    config: DecodingConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> tuple[TokenTrace, ...]:
    traced = _with_candidates(ended, tokens, config)
    return traced if tokenizer is None else with_texts(traced, tokenizer)


def with_texts(
    tokens: Sequence[TokenTrace], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[TokenTrace, ...]:
    """The tokens of a sequence and their candidates, with the texts of a trace."""
    names = TokenNames(tokenizer)
    pieces = text_pieces(
        [token.token_id for token in tokens], lambda ids: decode_text(tokenizer, ids)
    )
    with_text: list[TokenTrace] = []
    last = 0
    for index, token in enumerate(tokens):
        special = names.is_special(token.token_id)
        if not special:
            last = index
        elif pieces[index]:
            # It ends a character that nothing completes.
            pieces[last] += pieces[index]
    for token, piece in zip(tokens, pieces, strict=True):
        special = names.is_special(token.token_id)
        candidates = tuple(
            dataclasses.replace(
                candidate,
                text=names[candidate.token_id],
                is_special=names.is_special(candidate.token_id),
            )
            for candidate in token.candidates
        )
        text = names[token.token_id] if special else piece
        with_text.append(
            dataclasses.replace(token, text=text, is_special=special, candidates=candidates)
        )
    return tuple(with_text)


def _with_candidates(
    ended: Ended, tokens: Sequence[TokenTrace], config: DecodingConfig
) -> tuple[TokenTrace, ...]:
    if not ended.trace_ids.shape[1]:
        return tuple(tokens)
    rule = config.cascade_rule
    traced = []
    for position, token in enumerate(tokens):
        size = token.num_candidates
        ids = ended.trace_ids[position, :size].tolist()
        logprobs = ended.trace_logprobs[position, :size].tolist()
        logits = ended.trace_logits[position, :size]
        tried = torch.arange(token.num_examined, device=logits.device)
        size_ = torch.tensor(size, device=logits.device)
        asked = set(rank_of_tried(tried, size_, rule.order).tolist())
        if rule.acceptance == "greedy":
            accepted = logits > rule.threshold_logit
        else:
            ranks = torch.arange(size, device=logits.device)
            at = torch.full_like(ranks, position)
            draw, _ = acceptance_uniforms(rule.seed, ended.sequence, at, ranks)
            accepted = draw < torch.sigmoid(logits - rule.threshold_logit)
        candidates = tuple(
            CandidateTrace(
                token_id=ids[rank],
                logprob=logprobs[rank],
                accept_prob=_sigmoid(float(logits[rank])) if rank in asked else None,
                accepted=bool(accepted[rank]) if rank in asked else None,
            )
            for rank in range(size)
        )
        traced.append(TokenTrace(**{**token.__dict__, "candidates": candidates}))
    return tuple(traced)


def _sigmoid(logit: float) -> float:
    # Either way without overflow, and without cancellation near 0.
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
