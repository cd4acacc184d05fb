"""What looks wrong with an answer, or with a run, by its counts.

fallback rate  = positions where all were rejected / decided positions
repetition     = tokens that end a 4-gram which occurred before / tokens
divergence     = Σ (log policy - log language model) / tokens, nats per token;
                 with acceptance "sample" an estimate of KL(policy || language model)
"""

from mara_fast.config import DecodingConfig
from mara_fast.outputs import DecodingStats

_LEAST_DECIDED = 20
"""Decided positions below which a fallback rate says little."""


def alarms(stats: DecodingStats, config: DecodingConfig) -> tuple[str, ...]:
    """A text for every limit that is exceeded: what was measured, the limit, what to do.

    Args:
        stats: of one sequence, or of several added up.
        config: the decoding options; its ``max_fallback_rate``, ``max_repetition`` and
            ``kl_budget`` are the limits, and None switches one off.
    """
    found = (_over_rejection(stats, config), _repetition(stats, config), _drift(stats, config))
    return tuple(text for text in found if text is not None)


def _over_rejection(stats: DecodingStats, config: DecodingConfig) -> str | None:
    limit = config.max_fallback_rate
    if limit is None or stats.num_decided < _LEAST_DECIDED:
        return None
    rate = stats.num_all_rejected / stats.num_decided
    if rate <= limit:
        return None
    return (
        f"the agent rejected every candidate at {rate:.1%} of {stats.num_decided} decided "
        f"positions (max_fallback_rate={limit!r}), where the fallback {config.fallback!r} chose "
        f"the token: lower threshold={config.threshold!r}, raise top_k={config.top_k} or "
        f"top_p={config.top_p!r}, and check that the agent was trained for this model"
    )


def _repetition(stats: DecodingStats, config: DecodingConfig) -> str | None:
    limit = config.max_repetition
    if limit is None or not stats.num_tokens:
        return None
    share = stats.num_repeated / stats.num_tokens
    if share <= limit:
        return None
    return (
        f"{share:.1%} of {stats.num_tokens} tokens repeat four tokens of the same answer "
        f"(max_repetition={limit!r}): look at the texts; acceptance='sample', a larger top_p or a "
        "smaller max_new_tokens may help, or it is the language model's own habit"
    )


def _drift(stats: DecodingStats, config: DecodingConfig) -> str | None:
    budget = config.kl_budget
    if budget is None or not stats.num_tokens:
        return None
    drift = stats.kl_nats / stats.num_tokens
    if drift <= budget:
        return None
    return (
        f"to the policy the text is {drift:.3f} nats per token likelier than to the language model "
        f"(kl_budget={budget!r}, over {stats.num_tokens} tokens): lower "
        f"threshold={config.threshold!r}; with several agents, give one less weight "
        "(agent_weights)"
    )
