"""What decoding returns: text, tokens, statistics and the optional trace."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import os

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
    text: str | None = None
    """The token by itself, for reading; None without a tokenizer."""
    is_special: bool = False
    """No part of the text; ``text`` is its name."""


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    """How one token was chosen; ``candidates`` only with ``trace=True``."""

    token_id: int
    rank: int
    """Probability rank of the token in its candidate set, 0 = most probable. Of a ``plain`` token
    0 of 1, drawn or not: nobody decided among candidates, and none are kept."""
    num_candidates: int
    logprob: float
    accept_prob: float | None
    """None for a forced position or without an agent."""
    verdict: Literal["forced", "accepted", "fallback", "plain"]
    """``forced``: the set had one candidate. ``plain``: decoded without an agent."""
    num_examined: int
    """Candidates the sequential cascade asks the agent about; 0 if forced or plain."""
    policy_logprob: float | None = None
    """Natural log of the probability that the cascade with sampled acceptance emits this token
    here, also where acceptance is greedy: accepted after all before it were rejected (Eq. 6), and
    for a fallback, or the last tried where that is the fallback, also that all are rejected. Of an
    accepted token under another fallback than ``"last"`` it leaves out that the token might have
    been the fallback: nobody asks about the rest. None: nobody was asked, or the strategy is not
    ``"first"``."""
    reference_logprob: float | None = None
    """Natural log of the language model's probability of the token, renormalised over the candidate
    set; None: nobody was asked."""
    candidates: tuple[CandidateTrace, ...] = ()
    text: str | None = None
    """What it adds to the text, which may be nothing; only with ``trace=True`` and a tokenizer."""
    is_special: bool = False
    """It adds nothing to the text; ``text`` is its name."""


@dataclass(frozen=True, kw_only=True)
class Counterfactual:
    """What the language model alone would have said instead of a token and all that followed."""

    position: int
    """Index of that token among those produced."""
    token_ids: list[int]
    """Decoded greedily behind the prompt and the tokens before ``position``."""
    text: str | None
    """What they add to the text before; None without a tokenizer."""
    finish_reason: FinishReason


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
    kl_nats: float = 0.0
    """Sum of log policy - log language model over the decided tokens, both over the candidate set
    (:attr:`TokenTrace.policy_logprob`, ``reference_logprob``): for ``acceptance="sample"`` an
    estimate, from one sample, of the divergence KL(policy || LM). 0 unless the strategy is
    ``"first"``."""
    num_repeated: int = 0
    """Tokens that end four tokens which occurred before in the same answer."""

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
            kl_nats=math.fsum(
                t.policy_logprob - t.reference_logprob
                for t in decided
                if t.policy_logprob is not None and t.reference_logprob is not None
            ),
            num_repeated=_num_repeated([t.token_id for t in tokens]),
        )


def _num_repeated(ids: Sequence[int], length: int = 4) -> int:
    """Places at which an n-gram of so many tokens ends that has ended before."""
    grams = [tuple(ids[end - length : end]) for end in range(length, len(ids) + 1)]
    return len(grams) - len(set(grams))


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
    """``tokens`` with every candidate and texts, if asked for by ``trace=True``."""
    options: dict[str, Any] | None = field(default=None, repr=False)
    """The decoding options, kept with a trace."""
    counterfactuals: tuple[Counterfactual, ...] | None = field(default=None, repr=False)
    """None until asked for, see :func:`mara_fast.inspection.with_counterfactuals`."""
    error: str | None = None
    """Why, if ``finish_reason`` is ``"error"``; the tokens are those before it."""
    alarms: tuple[str, ...] = ()
    """What looks wrong with it, and what to do, see :mod:`mara_fast.alarms`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the tokens only a trace, see mara_fast.inspection.record."""
        record = {
            "prompt": self.prompt,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stats": dataclasses.asdict(self.stats),
        }
        if self.trace is not None:
            from mara_fast.inspection.record import trace_record

            record |= trace_record(self)
        if self.error is not None:
            record["error"] = self.error
        if self.alarms:
            record["alarms"] = list(self.alarms)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Generation":
        """What :meth:`to_dict` wrote; without a trace ``tokens`` is empty.

        Raises:
            ValueError: not such a record, naming the field, what it is and what is allowed; or of
                a version that is not known here.
        """
        from mara_fast.inspection.record import read_generation

        return read_generation(record)

    def to_html(self, path: "str | os.PathLike[str] | None" = None) -> str:
        """A page by itself that shows how each token was chosen.

        Args:
            path: also write it there.

        Raises:
            ValueError: there is no trace.
        """
        from mara_fast.inspection.page import html_page

        return html_page([self], path=path)

    def _repr_html_(self) -> str | None:
        from mara_fast.inspection.page import frame

        return None if self.trace is None else frame(self.to_html())


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
