"""Training speed on this machine: episodes and gradient steps, against the authors' scheme.

    python benchmarks/training_speed.py --output benchmarks/results/training_speed_cpu.json
    python benchmarks/training_speed.py --device cuda --model llama-3.1-8b --new-tokens 16

Fairness: one random language model, one agent, the same prompts of one length, the same number of
tokens, EOS ignored, the same device and threads. The authors' recipe on both sides (their rewards
of transitions, batches of 1024, ten gradient steps per episode), only that ours has all prompts in
flight between two rounds of gradient steps; beside it our own recipe, which takes fewer and smaller
steps, so that its updates are not compared with theirs. States are kept in float32 everywhere.
Reward models are left out everywhere: an episode's final reward is a constant. All systems are
warmed up, then measured in turn, several rounds; figures are medians with the range of the rounds.
Loading and filling the buffers are outside the clock.

    collect     episodes/h without learning
    draw        ms to draw a batch from a filled buffer
    update      ms of a gradient step, its draw included
    training    episodes/h that follow from the medians of both: they take turns, in one process
"""

import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from authors_training import Critic, Learner, Transition, explore
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaForCausalLM
from transformers.utils import logging

from mara_fast import Engine, MaraAgent
from mara_fast.bench.facts import facts_of
from mara_fast.bench.measure import synchronise
from mara_fast.bench.model import SHAPES, calibrate, random_llama
from mara_train.config import MaraConfig
from mara_train.replay import Replay, ReplayConfig
from mara_train.rollout import Rollout
from mara_train.sac import Sac, SacConfig
from mara_train.token_rewards import with_final_reward

AUTHORS, OURS_OFFICIAL, OURS = "authors' scheme", "ours, their recipe", "ours, our recipe"
_EPISODE_LENGTH = 100
"""Transitions of the episodes that the buffers are filled with."""


@dataclass(frozen=True, kw_only=True)
class System:
    """What is measured, and what it counts for."""

    collect: Callable[[], int]
    """Returns the number of transitions."""
    num_episodes: int
    """Of one call of ``collect``."""
    draw: Callable[[], Any]
    update: Callable[[int], Any]
    """So many gradient steps."""
    batch_size: int
    updates_per_episode: float


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all systems share."""

    model: LlamaForCausalLM
    agent: MaraAgent
    prompts: list[list[int]]
    num_tokens: int
    states: torch.Tensor
    """[transitions, H] of the buffers."""


def our_system(setting: Setting, config: MaraConfig) -> System:
    """The engine with all prompts in flight, the replay and the learner of the trainer."""
    decoding = config.decoding.replace(
        max_new_tokens=setting.num_tokens, ignore_eos=True, prompt_format="auto"
    )
    engine = Engine(setting.model, setting.agent, max_batch_size=len(setting.prompts))
    rollout = Rollout(engine, decoding, config.token_rewards, dtype=torch.float32)
    num, hidden_size = setting.states.shape

    device = setting.model.device

    def replay_of(capacity: int) -> Replay:
        return Replay(ReplayConfig(dtype="fp32", capacity=capacity), hidden_size, device=device)

    def collect() -> int:
        kept = replay_of(len(setting.prompts) * setting.num_tokens * config.decoding.top_k)
        for episode in rollout.episodes(setting.prompts, range(len(setting.prompts))):
            chain = episode.chain
            rewards = with_final_reward(
                chain.token_rewards, chain.positions, 1.0, config.token_rewards
            )
            kept.add(chain.states, chain.actions, rewards)
        return len(kept)

    filled = replay_of(num)
    for part in setting.states.split(_EPISODE_LENGTH):
        filled.add(part, torch.rand(len(part)) < 0.5, torch.randn(len(part)))
    sac = Sac(MaraAgent(hidden_size, config.inner_size), config.sac, device=device)
    generator = torch.Generator().manual_seed(0)

    def update(times: int) -> None:
        for _ in range(times):
            sac.update(filled.sample(config.batch_size, generator))

    return System(
        collect=collect,
        num_episodes=len(setting.prompts),
        draw=lambda: filled.sample(config.batch_size, generator),
        update=update,
        batch_size=config.batch_size,
        updates_per_episode=config.updates_per_episode,
    )


def authors_system(setting: Setting, *, num_episodes: int) -> System:
    """Episodes one by one, a buffer of Python lists, and a learner on batches of it."""
    recipe = MaraConfig.official()
    hidden_size = setting.states.shape[1]
    device = setting.model.device
    critic, target = (Critic(hidden_size, recipe.inner_size).to(device) for _ in range(2))
    target.load_state_dict(critic.state_dict())
    agent = MaraAgent(hidden_size, recipe.inner_size).to(device)
    learner = Learner(agent, critic, target, SacConfig())
    rows = setting.states.tolist()
    learner.buffer = [
        Transition(
            state,
            place % 2,
            float(place % 7),
            rows[(place + 1) % len(rows)],
            place % _EPISODE_LENGTH == _EPISODE_LENGTH - 1,
        )
        for place, state in enumerate(rows)
    ]

    prompts = setting.prompts[:num_episodes]

    def collect() -> int:
        kept: list[Transition] = []
        for prompt in prompts:
            kept += explore(
                setting.model,
                setting.agent,
                prompt,
                max_new_tokens=setting.num_tokens,
                final_reward=1.0,
            )[0]
        return len(kept)

    return System(
        collect=collect,
        num_episodes=len(prompts),
        draw=lambda: learner.draw(recipe.batch_size),
        update=lambda times: learner.update(recipe.batch_size, times=times),
        batch_size=recipe.batch_size,
        updates_per_episode=recipe.updates_per_episode,
    )


def measure(
    systems: dict[str, System], *, rounds: int, num_updates: int, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Seconds by system and part, one figure for each round."""
    seconds = {
        name: {part: list[float]() for part in ("collect", "draw", "update")} for name in systems
    }
    for system in systems.values():
        system.collect()
        system.draw()
        # More than a learner takes eagerly before it captures its step.
        system.update(5)
    work = range(rounds * len(systems))
    for number in track(work, description="rounds", console=Console(stderr=True)):
        name = list(systems)[number % len(systems)]
        system = systems[name]

        def now() -> float:
            synchronise(device)
            return time.perf_counter()

        started = now()
        system.collect()
        collected = now()
        for _ in range(num_updates):
            system.draw()
        drawn = now()
        system.update(num_updates)
        updated = now()
        for part, took in (
            ("collect", (collected - started) / system.num_episodes),
            ("draw", (drawn - collected) / num_updates),
            ("update", (updated - drawn) / num_updates),
        ):
            seconds[name][part].append(took)
    return seconds


def report_of(
    systems: dict[str, System], seconds: dict[str, dict[str, list[float]]]
) -> dict[str, Any]:
    """Medians, ranges and ratios to the authors' scheme."""
    found: dict[str, Any] = {"systems": {}, "ratios": {}}
    for name, system in systems.items():
        median = {part: statistics.median(values) for part, values in seconds[name].items()}
        episode = median["collect"] + system.updates_per_episode * median["update"]
        found["systems"][name] = {
            "batch_size": system.batch_size,
            "updates_per_episode": system.updates_per_episode,
            "transitions_per_episode": system.collect() / system.num_episodes,
            "collected_episodes_per_h": 3600 / median["collect"],
            "collected_episodes_per_h_range": [
                3600 / pick(seconds[name]["collect"]) for pick in (max, min)
            ],
            "draw_ms": 1e3 * median["draw"],
            "update_ms": 1e3 * median["update"],
            "update_ms_range": [1e3 * pick(seconds[name]["update"]) for pick in (min, max)],
            "trained_episodes_per_h": 3600 / episode,
        }
    base = found["systems"][AUTHORS]
    for name in systems:
        if name != AUTHORS:
            one = found["systems"][name]
            found["ratios"][name] = {
                "collected episodes/h": one["collected_episodes_per_h"]
                / base["collected_episodes_per_h"],
                "trained episodes/h": one["trained_episodes_per_h"]
                / base["trained_episodes_per_h"],
            }
            if one["batch_size"] == base["batch_size"]:
                found["ratios"][name] |= {
                    "draws/s": base["draw_ms"] / one["draw_ms"],
                    "updates/s": base["update_ms"] / one["update_ms"],
                }
    return found


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Shape of the language model, before the next two.")
    ] = None,
    hidden_size: Annotated[int, typer.Option(min=64, help="H, a multiple of 64.")] = 512,
    num_layers: Annotated[int, typer.Option(min=1)] = 4,
    num_prompts: Annotated[
        int, typer.Option(min=8, help="Our episodes of a round, in flight.")
    ] = 64,
    authors_episodes: Annotated[int, typer.Option(min=1, help="Theirs of a round.")] = 2,
    prompt_length: Annotated[int, typer.Option(min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Per episode.")] = 32,
    transitions: Annotated[int, typer.Option(min=1024, help="In the buffers.")] = 10_000,
    updates: Annotated[int, typer.Option(min=1, help="Per round.")] = 10,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure and print; ratios are of one run."""
    if model is not None and model not in SHAPES:
        raise typer.BadParameter(f"model={model!r} is no shape; allowed: {', '.join(SHAPES)}")
    if hidden_size % 64:
        raise typer.BadParameter(f"hidden-size={hidden_size} is not a multiple of 64")
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    # Their scheme draws from it.
    random.seed(0)
    console = Console()
    place = torch.device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": num_layers}
    if model is not None:
        sizes = SHAPES[model]
    lm = random_llama(dtype=dtype, device=place, **sizes)
    vocab_size = lm.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    size = (num_prompts, prompt_length)
    prompts = torch.randint(vocab_size, size, generator=generator).tolist()
    setting = Setting(
        model=lm,
        agent=calibrate(lm, prompts[:8], forced=0.33).to(place),
        prompts=prompts,
        num_tokens=new_tokens,
        states=torch.randn(transitions, lm.config.hidden_size, generator=generator),
    )
    num_parameters = sum(parameter.numel() for parameter in lm.parameters())
    report: dict[str, Any] = {
        **facts_of(place, dtype, "transformers"),
        "model": f"random Llama, {num_parameters / 1e6:.1f}M parameters, "
        f"{lm.config.num_hidden_layers} layers, hidden {lm.config.hidden_size}, vocabulary "
        f"{vocab_size}",
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "in_flight": num_prompts,
    }
    console.print(f"{report['model']}\n{report['hardware']}, {report['date']}")
    systems = {
        AUTHORS: authors_system(setting, num_episodes=authors_episodes),
        OURS_OFFICIAL: our_system(setting, MaraConfig.official(episodes_per_step=num_prompts)),
        OURS: our_system(setting, MaraConfig()),
    }
    seconds = measure(systems, rounds=rounds, num_updates=updates, device=place)
    report |= report_of(systems, seconds)
    _print(console, report)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


def _print(console: Console, report: dict[str, Any]) -> None:
    table = Table()
    for title in (
        "system",
        "collect, episodes/h",
        "draw, ms",
        "update, ms",
        "training, episodes/h",
    ):
        table.add_column(title, justify="left" if title == "system" else "right")
    for name, one in report["systems"].items():
        table.add_row(
            f"{name} ({one['updates_per_episode']:g} x {one['batch_size']})",
            f"{one['collected_episodes_per_h']:,.0f}",
            f"{one['draw_ms']:.2f}",
            f"{one['update_ms']:.1f}",
            f"{one['trained_episodes_per_h']:,.0f}",
        )
    console.print(table)
    for name, ratios in report["ratios"].items():
        console.print(
            f"{name} / {AUTHORS}: " + ", ".join(f"{k} {v:.1f}" for k, v in ratios.items())
        )


if __name__ == "__main__":
    typer.run(main)
