"""Collectors in processes of their own, by Ray: one engine each, on one machine or many.

    prompts -> shards, in a queue
    a worker that is free takes a shard, with the newest weights
    a worker that dies is replaced, and its shard goes back into the queue

Draws are keyed by the sequence: a shard collected again gives the same episodes, so that none is
lost or doubled whatever dies when.
"""

import logging
import os
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from mara_fast.agent import MaraAgent
from mara_fast.config import DecodingConfig
from mara_train.rollout import Chain, Episode, Rollout
from mara_train.token_rewards import TokenRewardConfig

logger = logging.getLogger(__name__)

_SHARDS_PER_WORKER = 2
"""Shards of a call to a worker: the last to finish then waits for less."""
_MOST_DEATHS = 3
"""Of workers on the same shard, before it is given up."""


class CollectorError(RuntimeError):
    """Workers keep dying."""


class RayCollector:
    """Collects episodes in Ray actors.

    Args:
        model: hub id, path, ``"tiny"``, or a loaded model, which every worker is sent.
        agent: its sizes; its weights come with every step.
        decoding, rewards, dtype: as of :class:`Rollout`.
        num_workers: engines.
        num_gpus: GPUs of a worker; 0: they run on the CPU.
        max_batch_size: slots of an engine.
        tokenizer: None: the one at the model's path.

    Raises:
        ImportError: Ray is not installed.
        ValueError: numbers that are not allowed.
    """

    def __init__(
        self,
        model: Any,
        agent: MaraAgent,
        decoding: DecodingConfig,
        rewards: TokenRewardConfig,
        *,
        dtype: torch.dtype,
        num_workers: int,
        num_gpus: float = 0,
        max_batch_size: int = 64,
        tokenizer: Any = None,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(
                "collecting in other processes needs Ray: pip install 'mara-fast[distributed]'"
            ) from error
        if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 1:
            raise ValueError(
                f"num_workers={num_workers!r} is not allowed; allowed: an integer >= 1"
            )
        self._ray = ray
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        self._setup = ray.put(
            {
                "model": model,
                "tokenizer": tokenizer,
                "sizes": (agent.config.hidden_size, agent.config.inner_size),
                "decoding": decoding,
                "rewards": rewards,
                "dtype": dtype,
                "max_batch_size": max_batch_size,
            }
        )
        self._actor_class = ray.remote(num_gpus=num_gpus)(_Worker)
        self._workers = [self._new_worker() for _ in range(num_workers)]
        self._weights: Any = None
        self.update(agent)

    def update(self, agent: MaraAgent) -> None:
        """See :class:`mara_train.collector.Collector`."""
        state = {name: tensor.detach().cpu() for name, tensor in agent.state_dict().items()}
        self._weights = self._ray.put(state)

    def collect(self, prompts: Sequence[Any], sequence_ids: Sequence[int]) -> list[Episode]:
        """See :class:`mara_train.collector.Collector`.

        Raises:
            CollectorError: workers died again and again on the same prompts.
        """
        num_shards = min(len(prompts), _SHARDS_PER_WORKER * len(self._workers))
        waiting = deque(range(num_shards))
        deaths = [0] * num_shards
        found: dict[int, Episode] = {}
        running: dict[Any, tuple[int, int]] = {}
        idle = deque(range(len(self._workers)))
        while waiting or running:
            while waiting and idle:
                shard, worker = waiting.popleft(), idle.popleft()
                part = slice(shard, None, num_shards)
                result = self._workers[worker].collect.remote(
                    self._weights, list(prompts[part]), list(sequence_ids[part])
                )
                running[result] = shard, worker
            done, _ = self._ray.wait(list(running), num_returns=1)
            shard, worker = running.pop(done[0])
            try:
                episodes = self._ray.get(done[0])
            except self._ray.exceptions.RayActorError as error:
                deaths[shard] += 1
                logger.warning("collector %d died and is replaced: %s", worker, error)
                if deaths[shard] >= _MOST_DEATHS:
                    raise CollectorError(
                        f"{_MOST_DEATHS} workers died collecting {len(prompts[shard::num_shards])} "
                        f"prompts, the first of which is {prompts[shard]!r}"
                    ) from error
                self._workers[worker] = self._new_worker()
                waiting.append(shard)
            else:
                found |= {episode.sequence: episode for episode in episodes}
            idle.append(worker)
        return [found[sequence] for sequence in sequence_ids]

    def process_ids(self) -> list[int]:
        """Of the workers, in order."""
        return self._ray.get([worker.process_id.remote() for worker in self._workers])

    def close(self) -> None:
        """Ends the workers, and Ray if it was started here."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers = []
        if self._owns_ray:
            self._ray.shutdown()

    def _new_worker(self) -> Any:
        return self._actor_class.remote(self._setup)


class _Worker:
    """One engine; lives in a process of Ray's."""

    def __init__(self, setup: dict[str, Any]) -> None:
        from mara_fast.engine import Engine

        # Workers share the machine's cores.
        torch.set_num_threads(1)
        agent = MaraAgent(*setup["sizes"]).requires_grad_(False)
        self.engine = Engine(
            setup["model"], agent, setup["tokenizer"], max_batch_size=setup["max_batch_size"]
        )
        self.rollout = Rollout(
            self.engine, setup["decoding"], setup["rewards"], dtype=setup["dtype"]
        )

    def collect(
        self, weights: dict[str, torch.Tensor], prompts: list[Any], sequence_ids: list[int]
    ) -> list[Episode]:
        agent = self.engine.agent
        assert isinstance(agent, MaraAgent)
        agent.load_state_dict(weights)
        # Inference tensors cannot be pickled; copies made here can.
        return [
            Episode(
                sequence=episode.sequence,
                chain=Chain(*(tensor.cpu().clone() for tensor in episode.chain)),
                generation=episode.generation,
            )
            for episode in self.rollout.episodes(prompts, sequence_ids)
        ]

    def process_id(self) -> int:
        return os.getpid()
