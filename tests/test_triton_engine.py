"""The engine on the Triton bodies: interpreted on small models, on a GPU where there is one."""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import golden
import mara_kernels.attention.kernel
import mara_kernels.bookkeeping.kernel
import mara_kernels.cascade.kernel
import mara_kernels.layers.kernel
import mara_kernels.score.kernel
import mara_kernels.truncate.kernel
from architectures import ARCHITECTURES, random_prompt
from exactness import FixedBudget, check_exact, random_agent
from mara_fast import Engine, MaraAgent
from oracle import OracleStep, sequential_cascade
from test_golden import make_agent
from triton_bodies import HALF_DTYPES, HAS_GPU

BODIES = {
    "truncate_triton": mara_kernels.truncate.kernel,
    "score_triton": mara_kernels.score.kernel,
    "cascade_triton": mara_kernels.cascade.kernel,
    "attention_triton": mara_kernels.attention.kernel,
    "propose": mara_kernels.bookkeeping.kernel,
    "settle": mara_kernels.bookkeeping.kernel,
    "rms_norm": mara_kernels.layers.kernel,
}
# Where nothing is read on the host.
DEVICE_BODIES = {
    "admit": mara_kernels.bookkeeping.kernel,
    "keep_rows": mara_kernels.bookkeeping.kernel,
}
OPTIONS = [
    {"window": 3},
    {
        "window": 4,
        "top_k": 8,
        "strategy": "max_prob",
        "acceptance": "sample",
        "fallback": "max_prob",
    },
    {"window": 3, "top_k": 8, "order": "reverse", "strategy": "random", "seed": 2**64 - 1},
]
PROMPT_LENGTHS = (7, 3) if not HAS_GPU else (40, 3, 17, 25)
NUM_TOKENS = 4 if not HAS_GPU else 32


def in_full(name: str, *options: dict[str, Any], quick: bool = True) -> list[Any]:
    """Parameters; the interpreter has no time for all of them."""
    marks = () if quick or HAS_GPU else pytest.mark.slow
    return [pytest.param(name, one, marks=marks) for one in options]


@functools.cache
def shared_agent() -> MaraAgent:
    """Made by the torch bodies: it scores many states."""
    return random_agent(48)


@pytest.fixture(autouse=True)
def triton_bodies(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """All, and each must have run."""
    shared_agent()
    monkeypatch.setenv("MARA_KERNELS", "triton")
    ran: set[str] = set()

    def counted(name: str, body: Callable) -> Callable:
        return lambda *args, **options: ran.add(name) or body(*args, **options)

    for name, module in (BODIES | DEVICE_BODIES).items():
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    yield ran
    assert set(BODIES) <= ran


def make_engine(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Engine:
    model = ARCHITECTURES[name]().to(device, dtype)
    agent = copy.deepcopy(shared_agent()).to(device)
    return Engine(model, agent, max_batch_size=2, prefill_chunk=5)


def prompts_for(engine: Engine) -> list[list[int]]:
    return [random_prompt(engine.lm.model, length, seed=length) for length in PROMPT_LENGTHS]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *in_full("llama", *OPTIONS),
        *in_full("gemma2", *OPTIONS[1:]),
        *in_full("gpt_oss", *OPTIONS[2:]),
        *in_full("mistral", *OPTIONS, quick=False),
        *in_full("gemma2", *OPTIONS[:1], quick=False),
        *in_full("gpt_oss", *OPTIONS[:2], quick=False),
        *in_full("deepseek_v3", *OPTIONS, quick=False),
    ],
)
def test_tokens_are_those_of_the_cascade(
    name: str,
    options: dict[str, Any],
    device: torch.device,
    triton_bodies: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step that a GPU runs, without host reads."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: False)
    engine = make_engine(name, device)
    check_exact(engine, prompts_for(engine), max_new_tokens=NUM_TOKENS, **options)
    assert set(DEVICE_BODIES) <= triton_bodies


@pytest.mark.parametrize(
    "options", [{"trace": True, "min_new_tokens": 3}, {"eos_token_id": tuple(range(0, 256, 5))}]
)
def test_traces_and_ends_are_those_of_the_torch_bodies(
    options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without host reads: what is recorded of every token, and why a sequence ended."""
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: False)
    results = []
    for bodies in ("triton", "torch"):
        monkeypatch.setenv("MARA_KERNELS", bodies)
        engine = make_engine("llama", device)
        engine._costs = FixedBudget(2, 1.5)
        prompts = [*prompts_for(engine), [9, 8, 7]]
        results.append(engine.generate(prompts, max_new_tokens=NUM_TOKENS + 2, **options))
    for mine, other in zip(*results, strict=True):
        assert (mine.token_ids, mine.finish_reason) == (other.token_ids, other.finish_reason)
        assert mine.stats.num_forwards == other.stats.num_forwards
        for found, expected in zip(
            mine.trace or mine.tokens, other.trace or other.tokens, strict=True
        ):
            assert close(dataclasses.asdict(found), dataclasses.asdict(expected))


def close(found: Any, expected: Any) -> bool:
    """Equal, but for the rounding of floats."""
    if isinstance(expected, dict):
        return all(close(found[name], value) for name, value in expected.items())
    if isinstance(expected, list | tuple):
        return all(close(a, b) for a, b in zip(found, expected, strict=True))
    if isinstance(expected, float):
        return found == pytest.approx(expected, abs=1e-4, nan_ok=True)
    return found == expected


def test_the_step_with_host_reads(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mara_fast.engine._host_reads", lambda device: True)
    engine = make_engine("mistral", device)
    check_exact(engine, prompts_for(engine), max_new_tokens=NUM_TOKENS, window=3)


def test_the_same_tokens_as_the_torch_bodies(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same counts, verdicts and log-probabilities."""
    engine = make_engine("qwen2", device)
    prompts, options = prompts_for(engine), {"max_new_tokens": NUM_TOKENS, "window": 3}
    found = engine.generate(prompts, **options)
    monkeypatch.setenv("MARA_KERNELS", "torch")
    # Another engine: graphs of this one would replay the Triton bodies.
    others = make_engine("qwen2", device).generate(prompts, **options)
    for mine, other in zip(found, others, strict=True):
        assert mine.token_ids == other.token_ids
        assert mine.stats.accepted_ranks == other.stats.accepted_ranks
        for token, expected in zip(mine.tokens, other.tokens, strict=True):
            assert token.verdict == expected.verdict and token.rank == expected.rank
            assert math.isclose(token.logprob, expected.logprob, abs_tol=1e-4)


@pytest.mark.skipif(golden.golden_folder() is None, reason=golden.MISSING)
@pytest.mark.parametrize("name", golden.model_names())
def test_recorded_runs(name: str, device: torch.device) -> None:
    """Outputs of the authors' code; in the interpreter the beginning of one."""
    runs = [run for run in golden.runs(name) if golden.is_cascade(run)]
    inputs, eos = golden.input_ids(name), golden.eos_token_ids(name)
    model = golden.load_model(name).to(device)
    for run in runs if HAS_GPU else runs[:1]:
        agent = make_agent(name, run["actor"], golden.accept_sign(run)).to(device)
        engine = Engine(model, agent)
        options = golden.decoding_options(run)
        if not HAS_GPU:
            options["max_new_tokens"] = 4
        [result] = engine.generate([inputs[run["prompt"]]], eos_token_id=eos, **options)
        assert result.token_ids == run["ids"][: options["max_new_tokens"]]


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"] if HAS_GPU else ["llama"])
def test_half_precision_diverges_at_near_ties_only(
    name: str, dtype: torch.dtype, device: torch.device, record_property: Any
) -> None:
    """From the cascade of plain forwards in the same precision, and only where a decision is
    closer than 1e-2 in probability."""
    engine = make_engine(name, device, dtype)
    compared = diverged = 0
    for prompt in prompts_for(engine):
        expected = sequential_cascade(
            engine.lm.model, engine.agent.accept_logit, prompt, max_new_tokens=NUM_TOKENS
        )
        [found] = engine.generate([prompt], max_new_tokens=NUM_TOKENS, window=3, ignore_eos=True)
        for token_id, step in zip(found.token_ids, expected.steps, strict=False):
            compared += 1
            if token_id != step.token_id:
                diverged += 1
                assert _margin(step) < 1e-2
                break
    assert compared
    record_property("divergences", f"{diverged} in {compared} tokens")
    print(f"{name} {dtype}: {diverged} divergences in {compared} tokens")


def _margin(step: OracleStep) -> float:
    """How near the nearest decision of a position was, in probability; a tie is at 0."""
    probs = [math.exp(logprob) for logprob in step.logprobs]
    gaps = [before - after for before, after in itertools.pairwise(probs)]
    accept = [abs(1 / (1 + math.exp(-d)) - 0.5) for d in step.accept_logits]
    return min([step.margin, *gaps, *accept])
