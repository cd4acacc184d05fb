"""What decoding returns: text, tokens, statistics and the optional trace."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["eos", "length", "stop", "error"]


@dataclass(frozen=True, kw_only=True)
class CandidateTrace:
    """One candidate of a position."""

    token_id: int
    logprob: float
    """Natural log of its full-vocabulary probability."""
    accept_prob: float | None
    """sigmoid(accept logit); None if the cascade stopped before it, or nobody was asked."""
    accepted: bool | None
    """The verdict; None if not asked."""


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    """How one token was chosen; ``candidates`` only with ``trace=True``."""

    token_id: int
    rank: int
    """Probability rank of the token in its candidate set, 0 = most probable."""
    num_candidates: int
    logprob: float
    accept_prob: float | None
    """None for a forced position or without an agent."""
    verdict: Literal["forced", "accepted", "fallback", "plain"]
    """``forced``: the set had one candidate. ``plain``: decoded without an agent."""
    num_examined: int
    """Candidates the sequential cascade asks the agent about; 0 if forced or plain."""
    candidates: tuple[CandidateTrace, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DecodingStats:
    """Counts of one sequence, or of several when added."""

    num_tokens: int = 0
    num_decided: int = 0
    """Positions where the agent was asked."""
    num_forced: int = 0
    """Positions with a single candidate, emitted unasked."""
    num_examined: int = 0
    """Candidates the sequential cascade asks about; independent of the window."""
    num_all_rejected: int = 0
    """Decided positions whose token is the fallback."""
    candidate_counts: dict[int, int] = field(default_factory=dict)
    """Histogram of set sizes over decided positions."""
    accepted_ranks: dict[int, int] = field(default_factory=dict)
    """Histogram of the ranks accepted, fallbacks not counted."""
    num_forwards: int = 0
    """Forwards of the language model this sequence took part in, prefill included."""
    seconds: float = 0.0
    """From the first forward to the last token."""

    @property
    def forwards_per_token(self) -> float:
        """Forwards of the language model per produced token; NaN without tokens."""
        return self.num_forwards / self.num_tokens if self.num_tokens else math.nan

    @property
    def tokens_per_s(self) -> float:
        """Tokens of this sequence per second of its own life; NaN without tokens."""
        return self.num_tokens / self.seconds if self.num_tokens and self.seconds else math.nan

    @property
    def rank0_accepted_frac(self) -> float:
        """Share of decided positions where rank 0 was accepted; NaN without decided positions."""
        return self.accepted_ranks.get(0, 0) / self.num_decided if self.num_decided else math.nan

    def __add__(self, other: "DecodingStats") -> "DecodingStats":
        """Sums, histograms merged; ``seconds`` add up although sequences may run side by side."""
        if not isinstance(other, DecodingStats):
            return NotImplemented
        summed: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, dict):
                summed[item.name] = dict(sorted((Counter(mine) + Counter(theirs)).items()))
            else:
                summed[item.name] = mine + theirs
        return DecodingStats(**summed)

    @classmethod
    def of(
        cls, tokens: Sequence[TokenTrace], *, num_forwards: int, seconds: float
    ) -> "DecodingStats":
        """Counts over the tokens of one sequence."""
        decided = [t for t in tokens if t.verdict in ("accepted", "fallback")]
        accepted = [t.rank for t in decided if t.verdict == "accepted"]
        return cls(
            num_tokens=len(tokens),
            num_decided=len(decided),
            num_forced=sum(t.verdict == "forced" for t in tokens),
            num_examined=sum(t.num_examined for t in decided),
            num_all_rejected=len(decided) - len(accepted),
            candidate_counts=dict(sorted(Counter(t.num_candidates for t in decided).items())),
            accepted_ranks=dict(sorted(Counter(accepted).items())),
            num_forwards=num_forwards,
            seconds=seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One decoded sequence."""

    prompt: Any
    """As it was given: a text, a chat or token ids."""
    prompt_token_ids: list[int]
    text: str | None
    """Decoded without special tokens; None without a tokenizer."""
    token_ids: list[int]
    """Tokens produced, the EOS included."""
    finish_reason: FinishReason
    stats: DecodingStats
    tokens: tuple[TokenTrace, ...] = field(repr=False)
    """How each token was chosen."""
    trace: tuple[TokenTrace, ...] | None = field(default=None, repr=False)
    """``tokens`` with every candidate, if asked for by ``trace=True``."""
    error: str | None = None
    """Why, if ``finish_reason`` is ``"error"``; the tokens are those before it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the per-token records."""
        record = {
            "prompt": self.prompt,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stats": dataclasses.asdict(self.stats),
        }
        if self.trace is not None:
            record["trace"] = [dataclasses.asdict(token) for token in self.trace]
        if self.error is not None:
            record["error"] = self.error
        return record


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """A token as it is streamed. Tokens are final when they appear."""

    text: str
    """New text since the last event; empty while a character is incomplete."""
    token: TokenTrace | None
    """None if the sequence ends without another token."""
    finish_reason: FinishReason | None = None
    """On the last event of the stream."""
    generation: Generation | None = field(default=None, repr=False)
    """On the last event: the whole result."""
