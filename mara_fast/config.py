"""How a position is truncated, decided and stopped: one frozen record."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from mara_fast.options import check, is_int, is_number, known_options, plain, several
from mara_kernels.cascade import (
    ACCEPTANCES,
    FALLBACKS,
    ORDERS,
    STRATEGIES,
    Acceptance,
    CascadeRule,
    Fallback,
    Order,
    Strategy,
)

PromptFormat = Literal["auto", "chat", "raw", "official"]
PROMPT_FORMATS: tuple[str, ...] = get_args(PromptFormat)
AgentCombination = Literal["logit", "product", "min"]
AGENT_COMBINATIONS: tuple[str, ...] = get_args(AgentCombination)
_LIMITS = ("max_fallback_rate", "max_repetition", "kl_budget")
_NUMBERS = (
    "max_new_tokens",
    "min_new_tokens",
    "top_k",
    "top_p",
    "temperature",
    "threshold",
    "window",
    "seed",
    *_LIMITS,
)


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """Decoding options. The output is a pure function of the prompt, this record and the agent.

    Args:
        max_new_tokens: tokens produced at most; EOS counts.
        min_new_tokens: EOS has no probability before this many tokens.
        top_k: tokens kept by probability, ties included; 0 keeps all. Paper: 40.
        top_p: mass kept of the renormalised top-k, in [0, 1]. Paper: 0.95.
        temperature: divides the logits before truncation, in [1e-6, 1e6]. With a greedy agent it
            moves only which tokens top-p keeps. The authors divide by 0.8 after it, which changes
            no token.
        acceptance: ``"greedy"`` accepts iff the accept probability exceeds ``threshold``;
            ``"sample"`` draws. Without an agent ``"sample"`` samples from the candidate set and
            ``"greedy"`` takes the most probable token.
        threshold: accept probability that splits accept from reject, in (0, 1). It moves the
            accept logit by -logit(threshold), which also a draw of ``"sample"`` is made from; an
            accept probability in a trace is the agent's own, before that.
        strategy: ``"first"`` accepted candidate, of ``"max_prob"`` accept probability, or
            ``"random"`` among the accepted.
        fallback: if all are rejected: the ``"last"`` tried (paper), the ``"first"`` (authors'
            evaluation) or the one of ``"max_prob"`` accept probability.
        order: ``"descending"`` probability, ``"reverse"``, or ``"top_last"`` (rank 1, 2, ..., 0).
        window: candidates scored in one forward, or ``"auto"``. Never changes a token.
        seed: of every draw, 0 <= seed < 2**64. A draw is keyed by (seed, sequence, position, rank).
        eos_token_id: ids that end a sequence; None: those of the model's generation config; an
            empty list: none.
        stop_strings: texts that end a sequence; the text is cut before the first of them.
        ignore_eos: go on after EOS.
        prompt_format: how text becomes ids. ``"chat"``: chat template, one BOS. ``"raw"``: the text
            as it is, with special tokens. ``"official"``: chat template, tokenised again with
            special tokens, as the released agents were trained (double BOS). ``"auto"``: chat if
            the tokenizer has a template, else raw.
        trace: keep every candidate, log-probability, accept probability and verdict.
        agent_weights: of several agents, one each in their order, finite and >= 0, not all 0; an
            agent of weight 0 is not asked. None: 1 each. Without effect where one agent decides.
        agent_combination: how accept logits d of several agents become one, with weights w:
            ``"logit"``: the mean Σ w d / Σ w; ``"product"``: the accept probabilities multiplied,
            Π σ(d)^w; ``"min"``: the strictest agent of weight above 0, the weights otherwise
            without effect.
        max_fallback_rate: share of the decided positions at which all candidates may be rejected,
            in [0, 1], before :mod:`mara_fast.alarms` speaks up; None: never.
        max_repetition: share of the tokens that may repeat what was said before, in [0, 1], before
            it does; None: never.
        kl_budget: nats per token by which a text may be likelier to the policy than to the language
            model before it does, >= 0; None: never. With acceptance ``"sample"`` an estimate of
            their divergence. It is known for the strategy ``"first"`` only.

    Raises:
        ValueError: naming the option, what was given and what is allowed.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    top_k: int = 40
    top_p: float = 0.95
    temperature: float = 1.0
    acceptance: Acceptance = "greedy"
    threshold: float = 0.5
    strategy: Strategy = "first"
    fallback: Fallback = "last"
    order: Order = "descending"
    window: int | Literal["auto"] = "auto"
    seed: int = 0
    eos_token_id: int | tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    prompt_format: PromptFormat = "auto"
    trace: bool = False
    agent_weights: tuple[float, ...] | None = None
    agent_combination: AgentCombination = "logit"
    max_fallback_rate: float | None = 0.2
    max_repetition: float | None = 0.5
    kl_budget: float | None = None

    @classmethod
    def paper(cls, **options: Any) -> Self:
        """The paper's decoding: when all are rejected the last candidate is taken; one BOS."""
        return cls.from_dict({"fallback": "last", "prompt_format": "chat"} | options)

    @classmethod
    def official(cls, **options: Any) -> Self:
        """The authors' evaluation: when all are rejected rank 0 is taken; double BOS."""
        return cls.from_dict({"fallback": "first", "prompt_format": "official"} | options)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """A config from plain values (JSON, YAML, keywords); unknown names are an error."""
        return cls(**known_options(cls, options))

    def replace(self, **options: Any) -> Self:
        """This config with some options changed; unknown names are an error."""
        return dataclasses.replace(self, **known_options(type(self), options))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_dict` takes them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def without_limits(self) -> Self:
        """This config without alarms, on which no token and no step depends."""
        return dataclasses.replace(
            self, max_fallback_rate=None, max_repetition=None, kl_budget=None
        )

    def token_options(self) -> dict[str, Any]:
        """Plain values of the options that a token may depend on."""
        options = self.to_dict()
        return {k: v for k, v in options.items() if k not in ("window", *_LIMITS)}

    @property
    def cascade_rule(self) -> CascadeRule:
        """The part that decides among candidates."""
        return CascadeRule(
            acceptance=self.acceptance,
            threshold=self.threshold,
            strategy=self.strategy,
            fallback=self.fallback,
            order=self.order,
            seed=self.seed,
        )

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("max_new_tokens", "min_new_tokens", "top_k"):
            check(name, getattr(self, name), is_int, "an integer >= 0", minimum=0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}"
            )
        check("top_p", self.top_p, is_number, "a number in [0, 1]", minimum=0, maximum=1)
        # Beyond these, scaled logits leave the range of float32.
        check(
            "temperature",
            self.temperature,
            is_number,
            "a number in [1e-6, 1e6]",
            minimum=1e-6,
            maximum=1e6,
        )
        check("threshold", self.threshold, is_number, "a number in (0, 1)", above=0, below=1)
        check("seed", self.seed, is_int, "an integer in [0, 2**64)", minimum=0, below=2**64)
        if self.window != "auto":
            check("window", self.window, is_int, 'an integer >= 1 or "auto"', minimum=1)
        for name, allowed in (
            ("acceptance", ACCEPTANCES),
            ("strategy", STRATEGIES),
            ("fallback", FALLBACKS),
            ("order", ORDERS),
            ("prompt_format", PROMPT_FORMATS),
            ("agent_combination", AGENT_COMBINATIONS),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(allowed)}")
        for name in ("ignore_eos", "trace"):
            check(name, getattr(self, name), lambda value: isinstance(value, bool), "a bool")

        stop_strings = several(self.stop_strings, str)
        if not all(isinstance(text, str) and text for text in stop_strings):
            raise ValueError(
                f"stop_strings={self.stop_strings!r} is not allowed; allowed: non-empty texts"
            )
        object.__setattr__(self, "stop_strings", stop_strings)
        if self.eos_token_id is not None:
            ids = tuple(map(plain, several(self.eos_token_id, numbers.Integral)))
            if not all(is_int(token_id) and 0 <= token_id < 2**63 for token_id in ids):
                raise ValueError(
                    f"eos_token_id={self.eos_token_id!r} is not allowed; allowed: integers >= 0"
                )
            object.__setattr__(self, "eos_token_id", ids)
        if self.agent_weights is not None:
            weights = tuple(map(plain, several(self.agent_weights, numbers.Real)))
            # A set has no order.
            is_set = isinstance(self.agent_weights, Set)
            are_allowed = all(is_number(w) and w >= 0 for w in weights) and any(weights)
            if is_set or not are_allowed:
                raise ValueError(
                    f"agent_weights={self.agent_weights!r} is not allowed; allowed: finite numbers "
                    ">= 0, one per agent in their order, not all 0"
                )
            object.__setattr__(self, "agent_weights", tuple(map(float, weights)))
        self._check_limits()

    def _check_limits(self) -> None:
        for name, allowed, most in (
            ("max_fallback_rate", "a number in [0, 1] or None", 1.0),
            ("max_repetition", "a number in [0, 1] or None", 1.0),
            ("kl_budget", "a number >= 0 or None", math.inf),
        ):
            value = getattr(self, name)
            if value is not None:
                check(name, value, is_number, allowed, minimum=0, maximum=most)
        if self.kl_budget is not None and self.strategy != "first":
            raise ValueError(
                f"kl_budget={self.kl_budget!r} cannot be measured with strategy="
                f"{self.strategy!r}; allowed: strategy='first', or kl_budget=None"
            )
