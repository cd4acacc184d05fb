"""What a run measures: of the episodes it collects, and of the agent on held-out prompts."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mara_fast.config import DecodingConfig
from mara_fast.engine import Engine
from mara_fast.evaluation.preference import preference_rate
from mara_fast.outputs import DecodingStats, Generation
from mara_train.objective import Objective
from mara_train.rollout import Episode


def rollout_metrics(
    episodes: Sequence[Episode], by_name: Mapping[str, Tensor], total: Tensor
) -> dict[str, float]:
    """Of a step's episodes.

    Args:
        episodes: that were collected.
        by_name: rewards by name, float [N]; NaN is no opinion.
        total: float [N], their scaled and weighted sums.
    """
    stats = sum((episode.generation.stats for episode in episodes), DecodingStats())
    kl = torch.cat([episode.chain.kl[episode.chain.actions] for episode in episodes])
    ended = [episode.generation.finish_reason != "length" for episode in episodes]
    decided = max(1, stats.num_decided)
    return {
        "reward": float(total.mean()),
        "reward_std": float(total.std(correction=0)),
        **_means("rewards", by_name),
        "kl": float(kl.mean()) if len(kl) else 0.0,
        "completions/mean_length": stats.num_tokens / len(episodes),
        "completions/clipped_frac": 1 - statistics.mean(ended),
        "accept/rank0_frac": stats.accepted_ranks.get(0, 0) / decided,
        "accept/first_three_frac": sum(stats.accepted_ranks.get(r, 0) for r in range(3)) / decided,
        "accept/all_rejected_frac": stats.num_all_rejected / decided,
        "accept/examined_per_decision": stats.num_examined / decided,
    }


class Evaluation:
    """Decodes held-out prompts as the agent will be used, and compares with the base model.

    Args:
        rows: with a ``prompt`` each; the other columns are the rewards' own.
        base: engine without an agent; its answers are made and scored once.
        objective: what scores the answers.
        decoding: options.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        base: Engine,
        objective: Objective,
        decoding: DecodingConfig,
    ) -> None:
        self.rows, self.base, self.objective, self.decoding = rows, base, objective, decoding
        self._base_tables: dict[str, Tensor] = {}

    def __call__(
        self, engine: Engine, *, num_samples: int
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of an aligned engine, and that many of its answers with their rewards."""
        ours = self._answers(engine)
        by_name = self.objective.score(self.rows, ours)
        table = torch.stack(list(by_name.values()))
        stats = sum((generation.stats for generation in ours), DecodingStats())
        decided = max(1, stats.num_decided)
        metrics = {
            "eval/reward": float(self.objective.total(table).mean()),
            **_means("eval/rewards", by_name),
            **{
                f"eval/preference_vs_{name}": preference_rate(
                    table, self._base_table(acceptance), self.objective.weights
                )
                for name, acceptance in (("greedy", "greedy"), ("sampled", "sample"))
            },
            "eval/mean_length": stats.num_tokens / len(ours),
            "eval/rank0_frac": stats.accepted_ranks.get(0, 0) / decided,
            "eval/all_rejected_frac": stats.num_all_rejected / decided,
        }
        shown = range(min(num_samples, len(self.rows)))
        samples = [
            {"prompt": str(self.rows[i]["prompt"]), "completion": ours[i].text}
            | {name: float(values[i]) for name, values in by_name.items()}
            for i in shown
        ]
        return metrics, samples

    def _answers(self, engine: Engine, **options: Any) -> list[Generation]:
        return engine.generate([row["prompt"] for row in self.rows], self.decoding, **options)

    def _base_table(self, acceptance: str) -> Tensor:
        """Rewards [R, N] of the base model's answers; made once."""
        if acceptance not in self._base_tables:
            answers = self._answers(self.base, acceptance=acceptance)
            by_name = self.objective.score(self.rows, answers)
            self._base_tables[acceptance] = torch.stack(list(by_name.values()))
        return self._base_tables[acceptance]


def _means(prefix: str, by_name: Mapping[str, Tensor]) -> dict[str, float]:
    return {f"{prefix}/{name}/mean": float(values.nanmean()) for name, values in by_name.items()}
