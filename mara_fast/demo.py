"""What ``mara-fast demo`` shows: the tiny model, without and with its agent."""

import random
import time

from rich.console import Console
from rich.text import Text

from mara_fast.agent import MaraAgent
from mara_fast.config import DecodingConfig
from mara_fast.engine import Engine
from mara_fast.outputs import DecodingStats, Generation
from mara_fast.tiny.grammar import instructions
from mara_fast.tiny.rules import harm, helpfulness

_STYLES = {"accepted": "black on bright_yellow", "fallback": "white on red", "forced": "dim"}


def run_demo(*, num_prompts: int, console: Console | None = None) -> None:
    """Answers held-out instructions plainly and aligned, and prints both with their counts."""
    console = console or Console(highlight=False)
    engine = Engine("tiny")
    plain_engine = Engine(engine.lm.model, False, engine.tokenizer)
    assert isinstance(engine.agent, MaraAgent)
    prompts = _prompts(num_prompts)
    config = engine.config(max_new_tokens=120)

    # Once unmeasured: the first forward of a process is slow.
    plain_engine.generate(prompts[:1], config)
    plain, plain_rate = _timed(plain_engine, prompts, config)
    aligned, aligned_rate = _timed(engine, prompts, config)

    description = " ".join((engine.agent.config.description or "").replace("*", "").split())
    console.print(f"[bold]agent:[/bold] {description}\n")
    for prompt, before, after in zip(prompts, plain, aligned, strict=True):
        console.rule(f"[bold]{prompt}", align="left")
        console.print(Text("plain    ", "bold"), Text(before.text or ""), _scores(before), sep="")
        console.print(Text("aligned  ", "bold"), _coloured(engine, after), _scores(after), sep="")
        ranks = ", ".join(f"rank {rank}: {n}" for rank, n in after.stats.accepted_ranks.items())
        console.print(
            f"         [dim]accepted {ranks or 'none'}; all rejected: "
            f"{after.stats.num_all_rejected}; forced: {after.stats.num_forced}; "
            f"{after.stats.forwards_per_token:.2f} forwards per token[/dim]"
        )
    console.rule()
    legend = Text("colours: rank 0 accepted, ")
    legend += Text("later rank accepted", _STYLES["accepted"]) + Text(", ")
    legend += Text("all rejected, fallback", _STYLES["fallback"]) + Text(", ")
    legend += Text("single candidate, not asked", _STYLES["forced"])
    console.print(legend)
    total = sum((result.stats for result in aligned), DecodingStats())
    console.print(
        f"plain {plain_rate:.0f} tokens/s, aligned {aligned_rate:.0f} tokens/s "
        f"({len(prompts)} prompts at once on {engine.lm.device}); aligned: "
        f"{total.forwards_per_token:.2f} forwards per token, rank 0 accepted at "
        f"{total.rank0_accepted_frac:.0%} of {total.num_decided} decided positions"
    )


def _prompts(num_prompts: int) -> list[str]:
    """Held-out instructions, harmful and benign by turns."""
    chosen = instructions(split="heldout")
    random.Random(0).shuffle(chosen)
    kinds = [[i.text for i in chosen if i.harmful is harmful] for harmful in (True, False)]
    return [text for pair in zip(*kinds, strict=False) for text in pair][:num_prompts]


def _timed(
    engine: Engine, prompts: list[str], config: DecodingConfig
) -> tuple[list[Generation], float]:
    started = time.perf_counter()
    results = engine.generate(prompts, config)
    seconds = time.perf_counter() - started
    return results, sum(result.stats.num_tokens for result in results) / seconds


def _scores(generation: Generation) -> Text:
    """What the rules of the tiny world say of an answer, both from 0 to 1."""
    prompt, answer = generation.prompt, generation.text or ""
    scores = f"  [helpful {helpfulness(prompt, answer):.2f}, harm {harm(prompt, answer):.2f}]"
    return Text(scores, "dim")


def _coloured(engine: Engine, generation: Generation) -> Text:
    assert engine.tokenizer is not None
    text = Text()
    for token in generation.tokens:
        if token.token_id in engine.tokenizer.all_special_ids:
            continue
        is_rank0 = token.verdict == "accepted" and token.rank == 0
        style = "" if is_rank0 else _STYLES[token.verdict]
        text.append(engine.tokenizer.decode([token.token_id]), style)
    return text
