"""Decoding speed on this machine: our engine, transformers, and the authors' cascade.

    python benchmarks/decode_speed.py --output benchmarks/results/decode_speed_cpu.json

Fairness: one random language model, one agent, the same prompts of one length, the same number of
tokens, EOS ignored, the same threads for all; every system decodes all prompts, so many at once as
the batch says (the cascade knows only one). Every system is warmed up, then all are run in turn,
several rounds; figures are medians with the range of the rounds. Loading and construction are
outside the clock. No ratio to the cascade is printed unless its tokens equal ours.

The language model is random: the scale of its head and the agent's last bias are set so that about
a third of the positions have a single candidate and rank 0 is accepted at about 70 % of the others,
as in the paper. The profile that came out is printed with the figures.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from authors_cascade import authors_cascade
from rich.console import Console
from rich.progress import track
from rich.table import Table
from run_facts import cpu_facts
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from mara_fast import DecodingConfig, DecodingStats, Engine, Generation, MaraAgent

VOCAB_SIZE = 32000
OURS, OUR_PLAIN = "MARA, this engine", "plain, this engine"
TRANSFORMERS, CASCADE = "plain, transformers generate", "MARA, authors' cascade, serial"


def make_model(*, hidden_size: int, num_layers: int, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama whose states vary with the text."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        intermediate_size=2 * hidden_size,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=4096,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def calibrate(model: LlamaForCausalLM, prompts: list[list[int]], *, forced: float) -> MaraAgent:
    """Scales the head to the wanted share of forced positions, and makes an agent that accepts
    rank 0 at about 70 % of the rest, both by what the engine measures."""
    head = model.lm_head.weight.clone()
    # Rows of unequal length: some states then have one clear successor, others many.
    head *= torch.exp(0.35 * torch.randn(VOCAB_SIZE, 1))
    agent = MaraAgent(model.config.hidden_size).requires_grad_(False)
    agent.output_linear.weight.mul_(30)
    agent.output_linear.bias[1] += 20
    engine = Engine(model, agent, max_batch_size=len(prompts))

    def decode(**options: Any) -> list[Generation]:
        return engine.generate(prompts, max_new_tokens=32, ignore_eos=True, window=1, **options)

    low, high = 0.5, 32.0
    for _ in range(10):
        scale = (low + high) / 2
        model.lm_head.weight.copy_(head * scale)
        stats = sum((result.stats for result in decode()), DecodingStats())
        share = stats.num_forced / stats.num_tokens
        if abs(share - forced) < 0.01:
            break
        low, high = (scale, high) if share < forced else (low, scale)

    # Which text is decoded depends on the bias, so approach it in a few steps.
    for _ in range(4):
        accept_probs = [
            token.candidates[0].accept_prob
            for result in decode(trace=True)
            for token in result.trace
            if token.verdict != "forced"
        ]
        accept_logits = torch.tensor(accept_probs, dtype=torch.float64).logit()
        agent.output_linear.bias[1] -= accept_logits.quantile(0.3).item()
    return agent


def systems_of(
    model: LlamaForCausalLM,
    agent: MaraAgent,
    prompts: list[list[int]],
    *,
    batch_size: int,
    num_tokens: int,
) -> dict[str, Callable[[], list[list[int]]]]:
    """The systems that decode all prompts, so many at once."""
    plain = Engine(model, False, max_batch_size=batch_size)
    aligned = Engine(model, agent, max_batch_size=batch_size)
    config = DecodingConfig(max_new_tokens=num_tokens, ignore_eos=True)

    def transformers_generate() -> list[list[int]]:
        produced: list[list[int]] = []
        for start in range(0, len(prompts), batch_size):
            inputs = torch.tensor(prompts[start : start + batch_size])
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                pad_token_id=0,
            )
            produced += output[:, inputs.shape[1] :].tolist()
        return produced

    def ids(results: list[Generation]) -> list[list[int]]:
        return [result.token_ids for result in results]

    return {
        OURS: lambda: ids(aligned.generate(prompts, config)),
        OUR_PLAIN: lambda: ids(plain.generate(prompts, config)),
        TRANSFORMERS: transformers_generate,
    }


def measure(
    systems: dict[str, Callable[[], list[list[int]]]], *, rounds: int, num_tokens: int
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """Tokens per second of every system in every round, all in turn, and its tokens."""
    tokens = {name: run() for name, run in systems.items()}
    rates: dict[str, list[float]] = {name: [] for name in systems}
    for _ in track(range(rounds), description="rounds", console=Console(stderr=True)):
        for name, run in systems.items():
            started = time.perf_counter()
            run()
            rates[name].append(num_tokens / (time.perf_counter() - started))
    return rates, tokens


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    hidden_size: Annotated[int, typer.Option()] = 512,
    num_layers: Annotated[int, typer.Option()] = 8,
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8",
    prompt_length: Annotated[int, typer.Option()] = 64,
    new_tokens: Annotated[int, typer.Option(help="Per prompt.")] = 48,
    forced: Annotated[float, typer.Option(help="Share of positions with one candidate.")] = 0.33,
    num_prompts: Annotated[int, typer.Option()] = 8,
    rounds: Annotated[int, typer.Option()] = 5,
    threads: Annotated[int, typer.Option()] = os.cpu_count() or 1,
) -> None:
    """Measure and print; ratios are of one run."""
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    console = Console()
    model = make_model(hidden_size=hidden_size, num_layers=num_layers)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    generator = torch.Generator().manual_seed(1)
    size = (num_prompts, prompt_length)
    prompts = torch.randint(VOCAB_SIZE, size, generator=generator).tolist()
    agent = calibrate(model, prompts, forced=forced)

    report: dict[str, Any] = {
        **cpu_facts(threads, "transformers"),
        "model": f"random Llama, {num_parameters / 1e6:.1f}M parameters, {num_layers} layers, "
        f"hidden {hidden_size}, vocabulary {VOCAB_SIZE}",
        "prompt_length": prompt_length,
        "num_prompts": num_prompts,
        "new_tokens": new_tokens,
        "batches": [],
    }
    console.print(f"{report['model']}\n{report['hardware']}, {report['date']}")
    sizes = [int(size) for size in batch_sizes.split(",")]
    systems: dict[str, Callable[[], list[list[int]]]] = {}
    for size in sizes:
        found = systems_of(model, agent, prompts, batch_size=size, num_tokens=new_tokens)
        systems |= {f"{name}, batch {size}": run for name, run in found.items()}
    systems[CASCADE] = lambda: [
        authors_cascade(model, agent.accept_logit, prompt, max_new_tokens=new_tokens)[0]
        for prompt in prompts
    ]
    rates, tokens = measure(systems, rounds=rounds, num_tokens=num_prompts * new_tokens)
    for size in sizes:
        engine = Engine(model, agent, max_batch_size=size)
        results = engine.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        stats = sum((result.stats for result in results), DecodingStats())
        batch = _batch_report(size, rates, tokens, stats)
        report["batches"].append(batch)
        _print_batch(console, batch)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


def _batch_report(
    batch_size: int,
    rates: dict[str, list[float]],
    tokens: dict[str, list[list[int]]],
    stats: DecodingStats,
) -> dict[str, Any]:
    names = {name: f"{name}, batch {batch_size}" for name in (OURS, OUR_PLAIN, TRANSFORMERS)}
    names[CASCADE] = CASCADE
    median = {name: statistics.median(rates[key]) for name, key in names.items()}
    examined = (stats.num_examined + stats.num_forced) / stats.num_tokens
    within_three = sum(n for rank, n in stats.accepted_ranks.items() if rank < 3)
    decided = max(1, stats.num_decided)
    batch: dict[str, Any] = {
        "batch_size": batch_size,
        "profile": {
            "forced_frac": stats.num_forced / stats.num_tokens,
            "rank0_accepted_frac": stats.rank0_accepted_frac,
            "accepted_within_three_frac": within_three / decided,
            "all_rejected_frac": stats.num_all_rejected / decided,
            "mean_set_size": sum(n * c for n, c in stats.candidate_counts.items()) / decided,
            "candidates_per_token": examined,
            "forwards_per_token": stats.forwards_per_token,
        },
        "tokens_per_s": {
            name: {"median": median[name], "min": min(rates[key]), "max": max(rates[key])}
            for name, key in names.items()
        },
        "ratios": {
            "MARA / our plain decoding": median[OURS] / median[OUR_PLAIN],
            "1 / candidates per token, its limit where rows cost": 1 / examined,
            "our plain / transformers generate": median[OUR_PLAIN] / median[TRANSFORMERS],
        },
    }
    if tokens[names[OURS]] == tokens[CASCADE]:
        batch["ratios"]["MARA / authors' cascade"] = median[OURS] / median[CASCADE]
    else:
        batch["differs"] = "tokens differ from the authors' cascade: no ratio"
    if tokens[names[OUR_PLAIN]] != tokens[names[TRANSFORMERS]]:
        batch["differs_plain"] = "plain tokens differ from transformers generate"
    return batch


def _print_batch(console: Console, batch: dict[str, Any]) -> None:
    table = Table(title=f"batch {batch['batch_size']}", title_justify="left")
    table.add_column("system")
    table.add_column("tokens/s", justify="right")
    table.add_column("range", justify="right")
    for name, rate in batch["tokens_per_s"].items():
        table.add_row(name, f"{rate['median']:.1f}", f"{rate['min']:.1f} - {rate['max']:.1f}")
    console.print(table)
    console.print(", ".join(f"{name} {value:.2f}" for name, value in batch["profile"].items()))
    for name, value in batch["ratios"].items():
        console.print(f"{name}: {value:.2f}")
    for key in ("differs", "differs_plain"):
        if key in batch:
            console.print(f"[red]{batch[key]}[/red]")


if __name__ == "__main__":
    typer.run(main)
