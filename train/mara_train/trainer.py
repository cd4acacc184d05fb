"""Trains an agent against reward functions (MARA section 3.3).

    per step:
        episodes = rollouts of the next prompts, accepted by chance
        R        = weighted, scaled rewards of their texts, less the baseline
        replay  += transitions with their token rewards and R
        updates  * SAC on batches of the replay
    every so often: log, evaluate, checkpoint

All that chance decides is keyed by the seed and counts, so that a run resumed from a checkpoint
equals the one that was never interrupted.
"""

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mara_fast.agent import MaraAgent, decoding_options
from mara_fast.config import DecodingConfig
from mara_fast.engine import Engine
from mara_fast.rewards import Rewards
from mara_fast.window import steady_window
from mara_train import checkpoint
from mara_train.collector import Collector, LocalCollector
from mara_train.config import MaraConfig
from mara_train.evaluation import Evaluation, rollout_metrics
from mara_train.objective import Objective
from mara_train.plots import plot_run
from mara_train.prompts import PromptSet, columns_of
from mara_train.ray_collector import RayCollector
from mara_train.replay import DTYPES, Replay
from mara_train.report import Report
from mara_train.rollout import Rollout
from mara_train.run_folder import (
    AGENT_NAME,
    check_continues,
    check_place,
    check_unused,
    fingerprint,
    locked,
)
from mara_train.sac import METRICS, Sac
from mara_train.token_rewards import with_final_reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from mara_fast.loading import ModelLike

logger = logging.getLogger(__name__)

_LARGEST = 1e8
"""Losses and values beyond this have exploded."""
_LEAST_RATE = 0.02
"""Of the learning rates, at the end of a linear schedule."""
# Decoding options that are a matter of the run, and not of the agent that comes out.
_RUN_OPTIONS = frozenset({"max_new_tokens", "min_new_tokens", "seed", "window", "trace"})


class TrainingDivergedError(RuntimeError):
    """Losses or values are NaN, infinite or absurdly large."""


class MaraTrainer:
    """Trains a :class:`MaraAgent` for a frozen language model.

    Args:
        model: hub id, path, loaded model, or ``"tiny"``.
        reward_funcs: what :class:`mara_fast.rewards.Rewards` takes.
        args: options; None: the defaults.
        agent: trained further, in place; None: a new one.
        train_dataset: rows with a ``prompt``, see :class:`PromptSet`; or a list of prompts.
        eval_dataset: the same, for evaluation; None: no evaluation.
        processing_class: tokenizer of the model; None: the one at its path.
        reward_processing_classes: one tokenizer or None to each reward.
        callbacks: of transformers; they see a ``TrainerState`` and may stop the run.
        collector: collects the episodes; None: this process does.

    Raises:
        ValueError: what is wrong with the options, the data or the rewards, before any work.
    """

    def __init__(
        self,
        model: "ModelLike",
        reward_funcs: Any,
        args: MaraConfig | None = None,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        agent: MaraAgent | None = None,
        processing_class: "PreTrainedTokenizerBase | None" = None,
        reward_processing_classes: Sequence[Any] | None = None,
        callbacks: "Sequence[TrainerCallback]" = (),
        collector: Collector | None = None,
    ) -> None:
        from transformers import TrainerControl, TrainerState

        args = args or MaraConfig()
        if not isinstance(args, MaraConfig):
            raise ValueError(f"args must be a MaraConfig, got {type(args).__name__}")
        self.args, self.folder = args, Path(args.output_dir)
        self.decoding = _repeatable(args)
        check_place(self.folder)
        if agent is not None and not isinstance(agent, MaraAgent):
            raise ValueError(f"agent must be a MaraAgent or None, got {type(agent).__name__}")
        self.callbacks = _callbacks(callbacks)
        self.train_prompts = PromptSet(train_dataset)
        self.eval_prompts = None
        if eval_dataset is not None:
            self.eval_prompts = PromptSet(eval_dataset, name="eval_dataset")
        if args.eval_steps is not None and self.eval_prompts is None:
            raise ValueError("eval_steps is given, and no eval_dataset")
        self.rewards = Rewards(
            reward_funcs, args.reward_weights, processing_classes=reward_processing_classes
        )
        self.base = Engine(model, False, processing_class, max_batch_size=args.max_batch_size)
        if self.base.tokenizer is None:
            raise ValueError(f"{model!r} brings no tokenizer: give it as processing_class")
        for prompts in filter(None, (self.train_prompts, self.eval_prompts)):
            try:
                self.base.check_prompts([row["prompt"] for row in prompts.rows], args.decoding)
            except ValueError as error:
                raise ValueError(f"{prompts.name}: {error}") from error
            self.rewards.check_columns(columns_of(prompts.rows[:1]))
        self.agent = self._agent(agent, model)
        self.engine = Engine(
            self.base.lm.model, self.agent, self.base.tokenizer, max_batch_size=args.max_batch_size
        )
        self.objective = Objective(self.rewards)
        self._evaluation: Evaluation | None = None
        if self.eval_prompts is not None:
            self._evaluation = Evaluation(
                self.eval_prompts.rows,
                base=self.base,
                objective=self.objective,
                decoding=self.decoding,
            )
        lm = self.base.lm
        self.replay = Replay(
            args.replay, lm.hidden_size, device=lm.device, folder=self.folder / "replay"
        )
        logger.info(
            "replay: %s transitions, %.2f GB", args.replay.capacity, self.replay.num_bytes / 1e9
        )
        # The critic's first weights are a matter of the seed, too.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            self.sac = Sac(self.agent, args.sac, device=lm.device)
        dtype = DTYPES[args.replay.dtype]
        self.collector = collector or self._collector(model, processing_class, dtype)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.step, self.num_episodes = 0, 0
        self._saved_at: Path | None = None
        self.state, self.control = TrainerState(), TrainerControl()

    def train(
        self, resume_from_checkpoint: bool | str | os.PathLike | None = None
    ) -> dict[str, float]:
        """Trains to the end; the agent is then in ``output_dir`` too.

        Args:
            resume_from_checkpoint: True: the newest of ``output_dir``; or the path of one.

        Returns:
            The last metrics, those of the final evaluation among them.

        Raises:
            FileNotFoundError: there is no checkpoint to resume from.
            FileExistsError: ``output_dir`` holds checkpoints or an agent, and none is resumed.
            BlockingIOError: another run is writing to ``output_dir``.
            TrainingDivergedError: naming what exploded; the last checkpoint stays.
        """
        if not isinstance(resume_from_checkpoint, bool | str | os.PathLike | None):
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} is not allowed; allowed: a "
                "bool or the path of a checkpoint"
            )
        with locked(self.folder):
            if resume_from_checkpoint:
                self.load_checkpoint(checkpoint.find(self.folder, resume_from_checkpoint))
            elif not self._saved_at:
                check_unused(self.folder)
            return self._train()

    def _train(self) -> dict[str, float]:
        report = Report(
            self.folder,
            resumed_at=self.step,
            trackers=self.args.report_to,
            run_name=self.args.run_name or self.folder.name,
            config=self.args.to_dict(),
        )
        self.state.max_steps, self.state.global_step = self.args.num_steps, self.step
        metrics: dict[str, float] = {}
        try:
            self._notify("on_train_begin")
            with tqdm(
                total=self.args.num_episodes, initial=self.num_episodes, unit="episode", desc="MARA"
            ) as bar:
                while self.step < self.args.num_steps and not self.control.should_training_stop:
                    metrics = self._train_step(report, bar)
            if self.step == self.args.num_steps and self.args.save_steps is None:
                self.save_checkpoint()
            self.save_model(self.folder / AGENT_NAME)
            if not self.sac.num_steps:
                logger.warning(
                    "the agent has learned nothing: no gradient step was taken (%s transitions, "
                    "learning_starts=%s, updates_per_episode=%s)",
                    len(self.replay),
                    self.args.learning_starts,
                    self.args.updates_per_episode,
                )
            self._notify("on_train_end")
        finally:
            self.collector.close()
            report.close()
            plot_run(self.folder)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Metrics of the agent on the evaluation prompts, decoded as it will be used.

        ``eval/preference_vs_greedy`` and ``eval/preference_vs_sampled`` compare with the base
        model's own answers, see :func:`preference_rate`.

        Raises:
            ValueError: the trainer was made without an ``eval_dataset``.
        """
        if self._evaluation is None:
            raise ValueError("there is no eval_dataset to evaluate on")
        return self._evaluation(self.engine, num_samples=0)[0]

    def save_model(self, folder: str | os.PathLike) -> None:
        """Writes the agent as it is now."""
        self.agent.save_pretrained(folder)

    # --- a step --------------------------------------------------------------------------------

    def _train_step(self, report: Report, bar: Any) -> dict[str, float]:
        started = time.perf_counter()
        args = self.args
        self._notify("on_step_begin")
        num_episodes, metrics = self._collect()
        metrics |= self._learn(num_episodes)
        self.step += 1
        bar.update(num_episodes)
        seconds = time.perf_counter() - started
        metrics |= {"step_time_s": seconds, "episodes_per_s": num_episodes / seconds}

        self.state.global_step = self.step
        self._notify("on_step_end")
        is_last = self.step == args.num_steps
        if self._evaluation is not None and self._is_due(args.eval_steps, is_last):
            evaluation, samples = self._evaluation(
                self.engine, num_samples=args.completions_per_log
            )
            metrics |= evaluation
            report.completions(self.step, samples, title="held-out prompts")
            self._notify("on_evaluate", metrics=evaluation)
        if self._is_due(args.logging_steps, is_last) or any(n.startswith("eval/") for n in metrics):
            bar.write(report.metrics(self.step, metrics))
            self.state.log_history.append({"step": self.step} | metrics)
            self._notify("on_log", logs=metrics)
        if (args.save_steps and self._is_due(args.save_steps, is_last)) or self.control.should_save:
            self.save_checkpoint()
            self._notify("on_save")
        return metrics

    def _notify(self, event: str, **facts: Any) -> None:
        """Calls the callbacks; what they return is the control from then on."""
        for callback in self.callbacks:
            result = getattr(callback, event)(
                self.args,
                self.state,
                self.control,
                model=self.agent,
                processing_class=self.base.tokenizer,
                **facts,
            )
            self.control = self.control if result is None else result

    def _is_due(self, interval: int | None, is_last: bool) -> bool:
        return is_last or (interval is not None and self.step % interval == 0)

    def _collect(self) -> tuple[int, dict[str, float]]:
        """Puts the step's episodes into the replay; how many were asked for, and metrics."""
        args, first = self.args, self.num_episodes
        count = min(args.episodes_per_step, args.num_episodes - first)
        rows = self.train_prompts.take(first, count, seed=args.seed)
        prompts = [row["prompt"] for row in rows]
        self.collector.update(self.agent)
        episodes = self.collector.collect(prompts, list(range(first, first + count)))
        whole = [i for i, e in enumerate(episodes) if e.generation.finish_reason != "error"]
        if not whole:
            raise TrainingDivergedError(
                f"every episode of step {self.step + 1} failed: {episodes[0].generation.error}"
            )
        rows = [rows[i] for i in whole]
        episodes = [episodes[i] for i in whole]
        by_name = self.objective.score(rows, [episode.generation for episode in episodes])
        table = torch.stack(list(by_name.values()))
        if first == 0 and args.reward_scaling == "std":
            self.objective.fit_scales(table)
        total = self.objective.total(table)
        final = args.reward_scale * (total - self._baseline(rows, total) - args.reward_offset)
        for episode, reward in zip(episodes, final.tolist(), strict=True):
            chain = episode.chain
            rewards = with_final_reward(
                chain.token_rewards, chain.positions, reward, args.token_rewards
            )
            self.replay.add(chain.states, chain.actions, rewards)
        self.num_episodes += count
        metrics = rollout_metrics(episodes, by_name, total) | {
            "num_episodes": self.num_episodes,
            "replay_transitions": len(self.replay),
        }
        if len(episodes) < count:
            metrics["failed_episodes"] = count - len(episodes)
        return count, metrics

    def _learn(self, num_episodes: int) -> dict[str, float]:
        """The step's gradient steps."""
        args = self.args
        if len(self.replay) < max(1, args.learning_starts):
            return {}
        before = self.num_episodes - num_episodes
        num_updates = math.floor(self.num_episodes * args.updates_per_episode) - math.floor(
            before * args.updates_per_episode
        )
        done = self.step / args.num_steps
        if args.learning_rate_schedule == "linear":
            self.sac.scale_learning_rates(max(_LEAST_RATE, 1 - done))
        if args.final_target_entropy is not None:
            first, last = args.sac.target_entropy, args.final_target_entropy
            self.sac.target_entropy.fill_(first + (last - first) * done)
        found = [
            self.sac.update(self.replay.sample(args.batch_size, self.generator))
            for _ in range(num_updates)
        ]
        if not found:
            return {}
        means = torch.stack(found).mean(0).tolist()
        metrics = {f"sac/{name}": mean for name, mean in zip(METRICS, means, strict=True)}
        bad = {n: v for n, v in metrics.items() if not abs(v) < _LARGEST}
        if bad:
            kept = self._saved_at or "none was written yet"
            raise TrainingDivergedError(
                f"step {self.step + 1} diverged after {self.sac.num_steps} gradient steps: "
                + ", ".join(f"{name} = {value}" for name, value in bad.items())
                + ". Lower the learning rates or the rewards' scale "
                f"(reward_scaling={args.reward_scaling!r}). Last good checkpoint: {kept}"
            )
        metrics["entropy"] = metrics.pop("sac/entropy")
        return metrics

    def _baseline(self, rows: Sequence[Mapping[str, Any]], total: Tensor) -> Tensor | float:
        if self.args.reward_baseline == "none":
            return 0.0
        if self.args.reward_baseline == "batch_mean":
            return total.mean()
        prompts = [row["prompt"] for row in rows]
        by_name = self.objective.score(rows, self.base.generate(prompts, self.args.decoding))
        return self.objective.total(torch.stack(list(by_name.values())))

    # --- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(self) -> Path:
        """Writes ``checkpoint-N`` into the run's folder."""

        def fill(folder: Path) -> None:
            self.agent.save_pretrained(folder / "agent")
            learner = self.sac.state_dict() | {"generator": self.generator.get_state()}
            torch.save(learner, folder / "learner.pt")
            torch.save(self.replay.state_dict(), folder / "replay.pt")
            state = {
                "step": self.step,
                "num_episodes": self.num_episodes,
                "reward_scales": self.objective.scales,
                "log_history": self.state.log_history,
                "config": self.args.to_dict(),
            } | self._facts()
            text = json.dumps(state, indent=1) + "\n"
            (folder / checkpoint.STATE_NAME).write_text(text, encoding="utf-8")

        self._saved_at = checkpoint.write(
            self.folder, self.step, fill, keep=self.args.save_total_limit
        )
        return self._saved_at

    def load_checkpoint(self, path: Path) -> None:
        """Goes on where a checkpoint was written.

        Raises:
            ValueError: it is of a run with other options, prompts or rewards.
        """
        state = checkpoint.read_state(path)
        check_continues(path, state, self.args, self._facts())
        learner = checkpoint.load(path / "learner.pt")
        self.generator.set_state(learner.pop("generator"))
        self.sac.load_state_dict(learner)
        self.agent.refresh_scoring()
        self.replay.load_state_dict(checkpoint.load(path / "replay.pt"))
        self.step, self.num_episodes = state["step"], state["num_episodes"]
        self.objective.scales = state["reward_scales"]
        self.state.log_history = state["log_history"]
        self._saved_at = path

    def _facts(self) -> dict[str, Any]:
        """What a resumed run must share, beside its options."""
        return {
            "rewards": self.rewards.names,
            "train_dataset": fingerprint(self.train_prompts.rows),
        }

    def _collector(self, model: Any, tokenizer: Any, dtype: torch.dtype) -> Collector:
        args = self.args
        if not args.num_collectors:
            return LocalCollector(
                Rollout(self.engine, self.decoding, args.token_rewards, dtype=dtype)
            )
        return RayCollector(
            model,
            self.agent,
            self.decoding,
            args.token_rewards,
            dtype=dtype,
            num_workers=args.num_collectors,
            num_gpus=float(torch.cuda.is_available()),
            max_batch_size=args.max_batch_size,
            tokenizer=tokenizer,
        )

    def _agent(self, agent: MaraAgent | None, model: Any) -> MaraAgent:
        """The agent to train: the one given, or a new one of the run's seed."""
        hidden_size = self.base.lm.hidden_size
        if agent is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.args.seed)
                agent = MaraAgent(hidden_size, self.args.inner_size)
        elif agent.config.hidden_size != hidden_size:
            raise ValueError(
                f"the agent judges states of {agent.config.hidden_size}, the model's have "
                f"{hidden_size}"
            )
        described: dict[str, Any] = {
            "decoding": {
                name: value
                for name, value in decoding_options(self.args.decoding).items()
                if name not in _RUN_OPTIONS
            },
            "base_model": model if isinstance(model, str) else agent.config.base_model,
        }
        agent.config = dataclasses.replace(agent.config, **described)
        return agent


def _repeatable(args: MaraConfig) -> DecodingConfig:
    """The decoding options, with a window that a resumed run has too."""
    if args.decoding.window != "auto":
        return args.decoding
    window = steady_window(
        args.max_batch_size,
        examines_all=args.decoding.strategy != "first",
        on_cpu=not torch.cuda.is_available(),
    )
    return args.decoding.replace(window=window)


def _callbacks(callbacks: Any) -> tuple[Any, ...]:
    from transformers import TrainerCallback

    found = tuple(callbacks) if isinstance(callbacks, Sequence) else (callbacks,)
    for callback in found:
        if not isinstance(callback, TrainerCallback):
            what = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            kind = "the class" if isinstance(callback, type) else "a"
            raise ValueError(f"callbacks must be TrainerCallback objects, got {kind} {what}")
    return found
