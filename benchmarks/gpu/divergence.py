"""Half precision: where tokens leave the cascade's, and how near to a tie the decision was.

    reference   the cascade by definition in bf16 (tests/oracle.py), or window 1 of the same engine
    margin      of the first decision that differs, by the reference's own numbers:
                accept   |d - logit(threshold)|                   another verdict
                order    difference of two log-probs              another candidate at a rank
                cut      |tail mass - (1 - top_p)|, or the gap    a candidate in one set only
                         to the k-th log-prob, the smaller
    noise       how far plain bf16 forwards are from float32 ones on the same texts: the most that
                an accept logit, and a log-prob of a candidate, is off

A margin above its bound is a mistake and no rounding, and fails. The bound: our kernels may be off
by twice what torch's bf16 is (the rule for each of them), the reference by once, so three times the
noise; of an order, in which two numbers are off, twice that.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.finding import Figure, Finding
from benchmarks.gpu.options import Options
from benchmarks.gpu.subject import Subject, random_subject
from mara_fast import Engine, MaraAgent
from mara_fast.outputs import Generation, TokenTrace
from oracle import OracleRun, plain_forward, sequential_cascade

TOP_K, TOP_P = 40, 0.95
TIMES_NOISE = 3.0

AcceptLogit = Callable[[Tensor], Tensor]


class Decision(NamedTuple):
    """How a token was chosen."""

    token_id: int
    candidates: tuple[int, ...]
    """The set, most probable first."""
    accept_logits: tuple[float, ...]
    """Of the candidates asked about, from the first."""


class Noise(NamedTuple):
    """What rounding does to a plain forward."""

    accept_logit: float
    logprob: float

    def bound(self, kind: str) -> float:
        """The largest margin that rounding explains."""
        if kind == "accept":
            return TIMES_NOISE * self.accept_logit
        return TIMES_NOISE * self.logprob * (2 if kind == "order" else 1)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first token of a prompt that differs."""

    token: int
    kind: str
    margin: float


def run(options: Options) -> Finding:
    """Decodes in bf16, compares, and judges the margins."""
    small = options.small
    num_prompts, num_tokens = (2, 12) if small else (8, 32)
    shape = "nano" if small else "llama-3.2-1b"
    subject = random_subject(
        shape,
        device=options.device,
        dtype=torch.bfloat16,
        num_prompts=num_prompts,
        length=12 if small else 48,
    )
    finding = Finding(details={})
    expected = [cascade(subject, prompt, num_tokens) for prompt in subject.prompts]
    texts = [
        [*prompt, *run.token_ids] for prompt, run in zip(subject.prompts, expected, strict=True)
    ]
    noise = measure_noise(subject.model, subject.agent, texts)
    finding.notes.append(
        f"bf16 is off by up to {noise.accept_logit:.3g} in accept logits, {noise.logprob:.3g} in "
        "log-probs"
    )
    engine = Engine(subject.model, subject.agent, False, max_batch_size=num_prompts)
    by_window: dict[int | str, list[list[Decision]]] = {}
    for window in (1, 3) if small else (1, 3, 8, "auto"):
        found = engine.generate(
            subject.prompts, max_new_tokens=num_tokens, ignore_eos=True, trace=True, window=window
        )
        by_window[window] = [decisions_of(one) for one in found]
    reference = [decisions_of_oracle(one) for one in expected]
    for window, decisions in by_window.items():
        judge(subject, finding, noise, f"window {window} from the cascade", reference, decisions)
        if window != 1:
            name = f"window {window} from window 1"
            judge(subject, finding, noise, name, by_window[1], decisions)
    return finding


def judge(
    subject: Subject,
    finding: Finding,
    noise: Noise,
    name: str,
    reference: Sequence[Sequence[Decision]],
    found: Sequence[Sequence[Decision]],
) -> None:
    """Adds how many prompts diverge, when, and how far from a tie; a problem for each mistake."""
    divergences = []
    for index, (wanted, got) in enumerate(zip(reference, found, strict=True)):
        one = first_divergence(subject.model, subject.prompts[index], wanted, got)
        if one is None:
            continue
        divergences.append(one)
        if not one.margin <= noise.bound(one.kind):
            finding.problems.append(
                f"{name}: prompt {index} leaves at token {one.token} by {one.kind}, "
                f"{one.margin:.3g} from a tie; rounding explains {noise.bound(one.kind):.3g}"
            )
    share = len(divergences) / len(found)
    finding.figures[f"bf16 prompts that leave, {name}"] = Figure(share, "share", 1.0)
    text = f"{name}: {len(divergences)} of {len(found)} prompts leave"
    if divergences:
        middle = statistics.median(one.token for one in divergences)
        worst = {
            kind: max(one.margin for one in divergences if one.kind == kind)
            for kind in sorted({one.kind for one in divergences})
        }
        margins = ", ".join(f"{kind} {margin:.3g}" for kind, margin in worst.items())
        text += f", at token {middle:g} on the median; largest margins: {margins}"
    finding.notes.append(text)
    finding.details[name] = [vars(one) for one in divergences]


def first_divergence(
    model: PreTrainedModel,
    prompt: Sequence[int],
    reference: Sequence[Decision],
    found: Sequence[Decision],
) -> Divergence | None:
    """Of one prompt; None if all tokens are equal."""
    for token, (wanted, got) in enumerate(zip(reference, found, strict=True)):
        if wanted.token_id != got.token_id:
            before = tuple(one.token_id for one in reference[:token])
            logits, _ = plain_forward(model, (*prompt, *before))
            kind, margin = margin_of(wanted, got, torch.log_softmax(logits, dim=-1))
            return Divergence(token=token, kind=kind, margin=margin)
    return None


def margin_of(wanted: Decision, got: Decision, logprob_V: Tensor) -> tuple[str, float]:
    """The first decision of a position that differs, and how near the reference was to it."""
    for rank in range(max(len(wanted.candidates), len(got.candidates))):
        pair = [one.candidates[rank : rank + 1] for one in (wanted, got)]
        if not all(pair):
            (only,) = pair[0] or pair[1]
            return "cut", _cut_margin(only, logprob_V)
        (mine,), (other,) = pair
        if mine != other:
            return "order", abs(float(logprob_V[mine] - logprob_V[other]))
        # Nobody is asked about the only candidate of a set.
        asked = [one.accept_logits[rank : rank + 1] for one in (wanted, got)]
        if all(asked) and (asked[0][0] > 0) != (asked[1][0] > 0):
            return "accept", abs(asked[0][0])
    return "unexplained", float("inf")


def _cut_margin(token_id: int, logprob_V: Tensor) -> float:
    top_K = logprob_V.topk(min(TOP_K, len(logprob_V))).values
    prob_K = torch.softmax(top_K, dim=0)
    tail = prob_K[top_K <= logprob_V[token_id]].sum()
    by_mass = abs(float(tail) - (1 - TOP_P))
    return min(by_mass, abs(float(logprob_V[token_id] - top_K[-1])))


def cascade(subject: Subject, prompt: Sequence[int], num_tokens: int) -> OracleRun:
    """By definition, scored by the agent's layers as torch runs them."""
    return sequential_cascade(
        subject.model,
        plain_accept_logit(subject.agent),
        prompt,
        max_new_tokens=num_tokens,
        top_k=TOP_K,
        top_p=TOP_P,
        ignore_eos=True,
    )


def plain_accept_logit(agent: MaraAgent) -> AcceptLogit:
    """d of states, without our kernels."""
    return lambda states: agent(states).float().diff(dim=-1)[..., 0]


@torch.inference_mode()
def measure_noise(
    model: PreTrainedModel, agent: MaraAgent, texts: Sequence[Sequence[int]]
) -> Noise:
    """Of forwards over whole texts, the model as it is against itself in float32."""
    exact = copy.deepcopy(model).float()
    accept_logit = plain_accept_logit(agent)
    worst = Noise(0.0, 0.0)
    for text in texts:
        ids = torch.tensor([list(text)], device=model.device)
        found = []
        for one in (exact, model):
            output = one(input_ids=ids, use_cache=False, output_hidden_states=True)
            logprob_TV = torch.log_softmax(output.logits[0].float(), dim=-1)
            found.append((accept_logit(output.hidden_states[-1][0]), logprob_TV))
        (exact_d, exact_logprob), (d, logprob) = found
        # Of the candidates: what lies below is never compared.
        top = exact_logprob.topk(min(TOP_K, exact_logprob.shape[1])).indices
        off = (logprob.gather(1, top) - exact_logprob.gather(1, top)).abs().max()
        worst = Noise(
            max(worst.accept_logit, float((d - exact_d).abs().max())),
            max(worst.logprob, float(off)),
        )
    return worst


def decisions_of(generation: Generation) -> list[Decision]:
    """Of a traced answer."""
    return [_decision(token) for token in generation.trace or ()]


def _decision(token: TokenTrace) -> Decision:
    asked: list[float] = []
    for candidate in token.candidates:
        if candidate.accept_prob is None:
            break
        prob = torch.tensor(candidate.accept_prob, dtype=torch.float64)
        # A probability that rounds to 1 stands for a logit that is far from a tie.
        asked.append(float(prob.clamp(1e-15, 1 - 1e-15).logit()))
    ids = tuple(candidate.token_id for candidate in token.candidates)
    return Decision(token.token_id, ids, tuple(asked))


def decisions_of_oracle(run: OracleRun) -> list[Decision]:
    """Of the cascade by definition."""
    return [Decision(step.token_id, step.candidates, step.accept_logits) for step in run.steps]
