"""The sequential cascade by definition: one candidate, one whole forward at a time.

Truth for every exactness test. It shares no code with the engine (torch, transformers and NumPy
only), keeps no cache, and looks at one candidate after the other (arXiv 2505.19743, section 3):

    logits(prefix) -> candidates = top_p(top_k(log_softmax(logits))), most probable first
    one candidate: emitted unasked
    else for each candidate in the order tried:
        d = accept_logits(state of the candidate in prefix + candidate)
        accept iff d > logit(threshold)               greedy
               iff u < sigmoid(d - logit(threshold))  sampled, u from Philox
    strategy picks among the accepted, fallback among all when none was accepted

Shapes: V vocabulary, H hidden, n candidates of a position. States are taken after the final norm.

Rounding can flip a decision that is nearly a tie. `margin` says how near the nearest one was, so
that a test which compares two computations of the same model can leave such cases out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# states [N, H] -> accept logits d [N], float32.
AcceptLogits = Callable[[torch.Tensor], torch.Tensor]
# Last logits [V] and last state [H] of a prefix, for `memo`.
Memo = dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """The candidate set of one position, most probable first, ties by lower id."""

    # Token ids, n of them.
    ids: tuple[int, ...]
    # Full-vocabulary log-probs of `ids` (after temperature and masking).
    logprobs: tuple[float, ...]
    # Distance of the set and its order from a flip.
    margin: float


@dataclass(frozen=True, kw_only=True)
class OracleStep:
    """How one token was chosen."""

    token_id: int
    # Candidates of the position, n.
    set_size: int
    # Probability rank of the token, 0 = most probable.
    rank: int
    # Index of the token in the order tried.
    tried: int
    # False: fallback. None: forced, nobody was asked.
    accepted: bool | None
    # Candidates asked, 0 when forced.
    examined: int
    # All n token ids in order of probability, and their log-probs.
    candidates: tuple[int, ...]
    logprobs: tuple[float, ...]
    # d of the examined candidates, in the order tried.
    accept_logits: tuple[float, ...]
    # Smallest distance of any decision at this position from a flip.
    margin: float


@dataclass(frozen=True, kw_only=True)
class OracleRun:
    """What the sequential cascade produced."""

    token_ids: tuple[int, ...]
    # "eos", "length", or "error" (log-probs not finite at position len(token_ids)).
    finish_reason: str
    # One per token.
    steps: tuple[OracleStep, ...]

    @property
    def margin(self) -> float:
        """Smallest margin of all steps; infinite without steps."""
        return min((step.margin for step in self.steps), default=math.inf)

    @property
    def error_position(self) -> int | None:
        """Index of the token that could not be chosen, or None."""
        return len(self.token_ids) if self.finish_reason == "error" else None


def sequential_cascade(
    model: Any,
    accept_logits: AcceptLogits,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    top_k: int | None = 40,
    top_p: float = 0.95,
    temperature: float = 1.0,
    acceptance: str = "greedy",
    threshold: float = 0.5,
    strategy: str = "first",
    fallback: str = "last",
    order: str = "descending",
    seed: int = 0,
    sequence: int = 0,
    eos_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    memo: Memo | None = None,
) -> OracleRun:
    """The tokens of the cascade, with how each was chosen.

    Args:
        model: causal LM of transformers (or a stand-in called the same way), eval mode.
        accept_logits: states [N, H] -> d [N]; called with N = 1.
        prompt_ids: at least one token id.
        min_new_tokens: EOS ids have log-prob -inf until so many tokens were produced.
        strategy: "first" accepted in the order tried; "max_prob", largest d; "random", largest
            second Philox word. The last two ask all n candidates. Ties: first tried.
        fallback: "last" or "first" of the order tried, or "max_prob", largest d.
        order: "descending", "reverse" (ascending probability), "top_last" (ranks 1, 2, ..., 0).
        seed, sequence: with position and rank, the Philox counter of `uniform_words`.
        ignore_eos: an EOS is a token like others (`min_new_tokens` still masks it).
        memo: forwards already done, by prefix; shared between runs of the same model only.
    Raises: ValueError for an unknown choice.
    """
    _require("acceptance", acceptance, ("greedy", "sample"))
    _require("strategy", strategy, ("first", "max_prob", "random"))
    _require("fallback", fallback, ("last", "first", "max_prob"))
    prompt = tuple(int(token_id) for token_id in prompt_ids)
    bar = _logit(threshold)
    token_ids: list[int] = []
    steps: list[OracleStep] = []
    logits: torch.Tensor | None = None

    def finish(reason: str) -> OracleRun:
        return OracleRun(token_ids=tuple(token_ids), finish_reason=reason, steps=tuple(steps))

    while len(token_ids) < max_new_tokens:
        prefix = prompt + tuple(token_ids)
        position = len(token_ids)
        if logits is None:
            logits, _ = plain_forward(model, prefix, memo)
        candidates = truncate(
            logits,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            masked_ids=eos_token_ids if position < min_new_tokens else (),
        )
        if candidates is None:
            return finish("error")
        size = len(candidates.ids)
        margin = candidates.margin
        ranks = ranks_tried(size, order)
        after: list[torch.Tensor] = []
        accept: list[float] = []
        accepted: list[int] = []
        words: list[tuple[int, int]] = []
        for index, rank in enumerate(ranks if size > 1 else ()):
            next_logits, state = plain_forward(model, (*prefix, candidates.ids[rank]), memo)
            after.append(next_logits)
            accept.append(float(accept_logits(state[None]).float()[0]))
            words.append(uniform_words(seed, sequence, position, rank))
            verdict, distance = _verdict(accept[-1], bar, acceptance, words[-1][0])
            margin = min(margin, distance)
            if verdict:
                accepted.append(index)
                if strategy == "first":
                    break

        if size == 1:
            tried = 0
        elif accepted and strategy == "random":
            tried = max(accepted, key=lambda index: words[index][1])
        elif (strategy if accepted else fallback) == "max_prob":
            contenders = accepted or range(size)
            tried = max(contenders, key=lambda index: _or_lowest(accept[index]))
            margin = min(margin, _gap_to_next([accept[index] for index in contenders]))
        elif accepted:
            tried = accepted[0]
        else:
            tried = size - 1 if fallback == "last" else 0

        rank = ranks[tried]
        token_ids.append(candidates.ids[rank])
        # The accepted candidate's forward is the next prefix's.
        logits = after[tried] if size > 1 else None
        steps.append(
            OracleStep(
                token_id=token_ids[-1],
                set_size=size,
                rank=rank,
                tried=tried,
                accepted=None if size == 1 else bool(accepted),
                examined=len(accept),
                candidates=candidates.ids,
                logprobs=candidates.logprobs,
                accept_logits=tuple(accept),
                margin=margin,
            )
        )
        if token_ids[-1] in eos_token_ids and not ignore_eos:
            return finish("eos")
    return finish("length")


def greedy_plain(
    model: Any,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    eos_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    memo: Memo | None = None,
) -> list[int]:
    """Token ids of plain greedy decoding: argmax of the float32 logits, ties to the lower id.

    Ends early where logits are not a number. (`sequential_cascade(..., top_k=1)` gives the same
    tokens together with margins.)
    """
    token_ids: list[int] = []
    while len(token_ids) < max_new_tokens:
        logits, _ = plain_forward(model, (*map(int, prompt_ids), *token_ids), memo)
        if len(token_ids) < min_new_tokens:
            logits = _masked(logits, eos_token_ids)
        if bool(logits.isnan().any()):
            break
        token_ids.append(int(logits.argmax()))
        if token_ids[-1] in eos_token_ids and not ignore_eos:
            break
    return token_ids


def truncate(
    logits: torch.Tensor,
    *,
    top_k: int | None = 40,
    top_p: float = 0.95,
    temperature: float = 1.0,
    masked_ids: Sequence[int] = (),
) -> Truncation | None:
    """The candidate set of one row of logits [V], or None when log-probs are not a number.

    top-k keeps everything >= the k-th log-prob (ties inclusive; None, 0 or k >= V: everything).
    top-p, over what is left renormalised, keeps a token iff the mass from it to the tail, itself
    included, is > 1 - p; the most probable one always. All in float32, as transformers does it.
    """
    scores = _masked(logits, masked_ids) / temperature
    logprobs = torch.log_softmax(scores, dim=-1)
    if bool(logprobs.isnan().any()):
        return None
    kept, margin = _top_k(scores, logprobs, top_k)
    # A stable sort of ascending ids: equal log-probs stay in order of id.
    ordered, permutation = torch.sort(logprobs[kept], descending=True, stable=True)
    ids = kept[permutation]

    probs = torch.softmax(ordered, dim=-1)
    tail = probs.flip(0).cumsum(0).flip(0)
    cut = torch.tensor(1.0 - top_p, dtype=torch.float32)
    size = max(1, int((tail > cut).sum()))
    if cut == 0.0:
        # Only underflow can remove a token; a mass near the smallest float could go either way.
        unsure = (tail[1:] < 1e-30) & ordered[1:].isfinite()
        distances = torch.where(unsure, 0.0, math.inf)
    else:
        distances = (tail[1:] - cut).abs()
    margin = min(margin, *distances.tolist(), _order_gap(scores[ids], ordered, size))
    return Truncation(
        ids=tuple(ids[:size].tolist()), logprobs=tuple(ordered[:size].tolist()), margin=margin
    )


@torch.no_grad()
def plain_forward(
    model: Any, prefix: tuple[int, ...], memo: Memo | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last logits [V], float32 on the CPU, and last state [H] of one forward over the prefix."""
    if memo is not None and prefix in memo:
        return memo[prefix]
    input_ids = torch.tensor([prefix], device=getattr(model, "device", "cpu"))
    output = model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
    states = output.hidden_states[-1]
    if states.ndim != 3:
        # Gemma3n carries several streams between layers and merges them after the last.
        states = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    # The state stays where the agent is, which is asked about it.
    result = output.logits[0, -1].float().cpu(), states[0, -1]
    if memo is not None:
        memo[prefix] = result
    return result


def ranks_tried(size: int, order: str) -> list[int]:
    """Probability ranks 0 ... size - 1 in the order in which they are tried."""
    _require("order", order, ("descending", "reverse", "top_last"))
    ranks = list(range(size))
    if order == "reverse":
        return ranks[::-1]
    return ranks[1:] + ranks[:1] if order == "top_last" else ranks


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words: Philox4x32-10 (Salmon et al. 2011) of 4 counter and 2 key words."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = (np.uint64(word) for word in counter)
    k0, k1 = (np.uint64(word) for word in key)
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
        k0 = (k0 + np.uint64(0x9E3779B9)) & low
        k1 = (k1 + np.uint64(0xBB67AE85)) & low
    return int(c0), int(c1), int(c2), int(c3)


def uniform_words(seed: int, sequence: int, position: int, rank: int) -> tuple[int, int]:
    """Two 24-bit integers for a candidate: its acceptance draw (times 2**-24) and its lot.

    They depend on what is decided (seed, sequence, output position, probability rank) and on
    nothing of how it is computed.
    """
    counter = (rank, position, sequence & 0xFFFFFFFF, sequence >> 32)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return words[0] >> 8, words[1] >> 8


def accept_mlp(weights: dict[str, torch.Tensor]) -> AcceptLogits:
    """The accept model as a function: LayerNorm, two hidden layers with ReLU, z_accept - z_reject.

    Args:
        weights: `ln.*`, `linear1.*`, `linear2.*`, `output_linear.*`, row 1 of the last = accept.
    """
    linear = torch.nn.functional.linear

    def accept_logits(states: torch.Tensor) -> torch.Tensor:
        x = states.float()
        x = torch.nn.functional.layer_norm(
            x, x.shape[-1:], weights["ln.weight"], weights["ln.bias"], 1e-5
        )
        for layer in ("linear1", "linear2"):
            x = torch.relu(linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"]))
        z = linear(x, weights["output_linear.weight"], weights["output_linear.bias"])
        return z[:, 1] - z[:, 0]

    return accept_logits


def combined(
    agents: Sequence[AcceptLogits], weights: Sequence[float] | None, combination: str
) -> AcceptLogits:
    """Several agents as one, in float64.

    Args:
        weights: one per agent, None: 1 each; those of weight 0 are left out.
        combination: "logit": mean of d by weight; "product": logit of the product of sigmoid(d)^w;
            "min": smallest d.
    """
    _require("combination", combination, ("logit", "product", "min"))
    weighted = list(zip(agents, weights or [1.0] * len(agents), strict=True))
    weighted = [(agent, weight) for agent, weight in weighted if weight]

    def accept_logits(states: torch.Tensor) -> torch.Tensor:
        d = torch.stack([agent(states).double() for agent, _ in weighted])
        w = torch.tensor([[weight] for _, weight in weighted], dtype=d.dtype, device=d.device)
        if combination == "min":
            return d.min(0).values.float()
        if combination == "logit":
            return ((w * d).sum(0) / w.sum()).float()
        p = (torch.sigmoid(d) ** w).prod(0)
        return (p.log() - (1 - p).log()).float()

    return accept_logits


def emission_probs(accept: Sequence[float], *, threshold: float, fallback: str) -> list[float]:
    """Probability that the sampled cascade of strategy "first" emits each candidate.

    By going through every pattern of verdicts there is.

    Args:
        accept: d of all candidates, in the order tried.
    """
    _require("fallback", fallback, ("last", "first", "max_prob"))
    bar = math.log(threshold / (1 - threshold))
    probs = [1 / (1 + math.exp(bar - d)) for d in accept]
    emitted = [0.0] * len(accept)
    for verdicts in itertools.product((True, False), repeat=len(accept)):
        if any(verdicts):
            tried = verdicts.index(True)
        elif fallback == "max_prob":
            tried = max(range(len(accept)), key=accept.__getitem__)
        else:
            tried = 0 if fallback == "first" else len(accept) - 1
        weight = 1.0
        for prob, verdict in zip(probs, verdicts, strict=True):
            weight *= prob if verdict else 1 - prob
        emitted[tried] += weight
    return emitted


def _masked(logits: torch.Tensor, masked_ids: Sequence[int]) -> torch.Tensor:
    """A float32 copy of logits [V] with -inf at `masked_ids`."""
    scores = logits.detach().float().clone()
    scores[list(masked_ids)] = -math.inf
    return scores


def _top_k(
    scores: torch.Tensor, logprobs: torch.Tensor, top_k: int | None
) -> tuple[torch.Tensor, float]:
    """Ids that survive top-k, ascending, and the log-prob gap at the cut."""
    if not top_k or top_k >= len(logprobs):
        return torch.arange(len(logprobs)), math.inf
    kth = logprobs.topk(top_k).values[-1]
    keep = logprobs >= kth
    tied = scores[logprobs == kth]
    if kth.isfinite() and int(keep.sum()) > top_k and bool((tied != tied[0]).any()):
        # Different logits whose log-probs happen to round to the same number.
        return keep.nonzero()[:, 0], 0.0
    dropped = logprobs[~keep]
    margin = float(kth - dropped.max()) if len(dropped) else math.inf
    return keep.nonzero()[:, 0], margin


def _order_gap(scores: torch.Tensor, logprobs: torch.Tensor, size: int) -> float:
    """Smallest log-prob gap of neighbours among the first `size` and the one that follows.

    Exactly equal scores are no risk: the lower id comes first. Log-probs that only rounded to
    the same number are one.
    """
    neighbours = slice(0, min(size, len(logprobs) - 1))
    gaps = (logprobs[:-1] - logprobs[1:])[neighbours]
    differ = (scores[:-1] != scores[1:])[neighbours]
    return min(gaps[differ].tolist(), default=math.inf)


def _verdict(accept: float, bar: float, acceptance: str, word: int) -> tuple[bool, float]:
    """Whether a candidate with accept logit `accept` is taken, and how near that was."""
    if math.isnan(accept):
        return False, 0.0
    if acceptance == "greedy":
        return accept > bar, abs(accept - bar)
    draw = word * 2.0**-24
    prob = float(torch.sigmoid(torch.tensor(accept, dtype=torch.float32) - bar))
    return draw < prob, abs(draw - prob)


def _logit(threshold: float) -> float:
    """log(t / (1 - t)) rounded to float32; -inf at 0, inf at 1."""
    if threshold in (0.0, 1.0):
        return math.copysign(math.inf, threshold - 0.5)
    return float(np.float32(math.log(threshold / (1.0 - threshold))))


def _or_lowest(accept: float) -> float:
    return -math.inf if math.isnan(accept) else accept


def _gap_to_next(accept: Sequence[float]) -> float:
    """Largest value minus the next smaller one; equal values are no risk (first tried wins)."""
    distinct = sorted({_or_lowest(value) for value in accept}, reverse=True)
    return distinct[0] - distinct[1] if len(distinct) > 1 else math.inf


def _require(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
