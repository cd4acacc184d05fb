"""Makes the agent of the tiny world: `python -m mara_fast.tiny.calibrate --seed 0`.

    agent = random MaraAgent;  d = accept logit = scale * (its own logit) + shift
    scale: standard deviation of d over examined candidates = spread
    shift: bisection until rank 0 is accepted at the target share of decided positions

It is untrained and aligns nothing: it demonstrates the mechanics (rejections, ranks, fallbacks)
at an acceptance like that of a trained agent.
"""

import math
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from tqdm.auto import tqdm

from mara_fast.agent import MaraAgent
from mara_fast.engine import Engine
from mara_fast.outputs import DecodingStats, Generation
from mara_fast.tiny import AGENT_PATH, load
from mara_fast.tiny.grammar import instructions

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_DESCRIPTION = """\
**Untrained.** Random weights, calibrated to accept rank 0 at about {percent} % of the decided
positions of the embedded tiny language model. It aligns nothing and only demonstrates the
mechanics: candidates, rejections, fallbacks.\
"""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How the agent is made; the defaults are those of the embedded one."""

    seed: int = 0
    """Seeds the weights and the choice of instructions."""
    target: float = 0.7
    """Share of decided positions where rank 0 is accepted; trained agents accept about as often."""
    spread: float = 2.0
    """Standard deviation of the accept logit over examined candidates."""
    num_instructions: int = 64
    """Held-out instructions that are answered to measure the share."""
    num_bisections: int = 12
    """Each halves the interval of the shift, of 8 * `spread` at first."""
    max_new_tokens: int = 64
    """Tokens of an answer at most."""


def calibrate(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", *, config: CalibrationConfig
) -> tuple[MaraAgent, DecodingStats]:
    """A random agent of the wanted spread and acceptance, and the statistics it was judged by.

    Its weights are representable in float16.
    """
    chosen = instructions(split="heldout")
    random.Random(config.seed).shuffle(chosen)
    prompts = [instruction.text for instruction in chosen[: config.num_instructions]]
    agent = _random_agent(model.config.hidden_size, config=config)
    engine = Engine(model, agent, tokenizer, max_batch_size=config.num_instructions)

    def answer(**options: Any) -> list[Generation]:
        return engine.generate(prompts, max_new_tokens=config.max_new_tokens, **options)

    # This strategy asks about every candidate, whatever the agent says of the others.
    logits = _accept_logits(answer(strategy="max_prob", trace=True))
    scale = config.spread / statistics.stdev(logits)
    agent.output_linear.weight.mul_(scale)
    agent.half().float()

    centre = -scale * statistics.mean(logits)
    low, high = centre - 4 * config.spread, centre + 4 * config.spread
    for _ in tqdm(range(config.num_bisections), desc="calibration", unit="run"):
        middle = (low + high) / 2
        agent.output_linear.bias.copy_(torch.tensor([-middle / 2, middle / 2]).half())
        stats = sum((result.stats for result in answer()), DecodingStats())
        if stats.rank0_accepted_frac < config.target:
            low = middle
        else:
            high = middle
    return agent, stats


def _random_agent(hidden_size: int, *, config: CalibrationConfig) -> MaraAgent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        agent = MaraAgent(
            hidden_size,
            base_model="tiny",
            description=_DESCRIPTION.format(percent=round(100 * config.target)),
        )
    agent.requires_grad_(False).eval()
    agent.output_linear.bias.zero_()
    return agent


def _accept_logits(results: list[Generation]) -> list[float]:
    probs = [
        candidate.accept_prob
        for result in results
        for token in result.trace or ()
        for candidate in token.candidates
        if candidate.accept_prob is not None
    ]
    return [math.log(prob / (1 - prob)) for prob in probs]


def main(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = AGENT_PATH,
    seed: Annotated[int, typer.Option(help="Seeds the weights.")] = 0,
) -> None:
    """Make an untrained agent for the tiny LM and write it as one folder."""
    agent, stats = calibrate(*load(), config=CalibrationConfig(seed=seed))
    agent.half().save_pretrained(output)
    tqdm.write(
        f"rank 0 accepted at {stats.rank0_accepted_frac:.1%} of {stats.num_decided} decided "
        f"positions, all rejected at {stats.num_all_rejected / stats.num_decided:.1%}"
    )


if __name__ == "__main__":
    typer.run(main)
