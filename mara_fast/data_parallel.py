"""Many prompts over several GPUs: an engine in every process, fed by Ray Data.

    prompts -> blocks -> whichever engine is free -> results, as they are done

Draws are keyed by the sequence, so the answers are those of one process. A process that dies is
started again by Ray, and its block with it.
"""

import dataclasses
import importlib.util
import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from mara_fast.config import DecodingConfig
from mara_fast.engine import encode_that_fit, options_in_force
from mara_fast.language_model import max_positions
from mara_fast.loading import (
    TINY,
    choose_device,
    choose_dtype,
    load_agent,
    load_tokenizer,
    named,
)
from mara_fast.outputs import Generation

_BATCHES_PER_BLOCK = 4
"""Slots of an engine are refilled from its block; at its end they run empty."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What every process builds its engine from, see :class:`mara_fast.Engine`."""

    model: str
    agent: str | tuple[str, ...] | bool | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_batch_size: int = 16


class ParallelEngine:
    """Engines in processes of their own, asked like one :class:`mara_fast.Engine`.

    Args:
        options: of the engines.
        num_workers: engines; each has a GPU to itself where there are any.

    Raises:
        ImportError: Ray is not installed.
        ValueError: a number of workers that is not allowed, or an agent that does not fit.
    """

    def __init__(self, options: EngineOptions, *, num_workers: int) -> None:
        if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 1:
            raise ValueError(
                f"num_workers={num_workers!r} is not allowed; allowed: an integer >= 1"
            )
        for module in ("ray", "pyarrow"):
            if importlib.util.find_spec(module) is None:
                raise ImportError(
                    f"several engines need {module}: pip install 'mara-fast[distributed]'"
                )
        from transformers import AutoConfig

        from mara_fast import tiny

        self.options, self.num_workers = options, num_workers
        path = tiny.LM_PATH if options.model == TINY else options.model
        with named("model", path):
            self._text_config = AutoConfig.from_pretrained(path).get_text_config()
        self._tokenizer = load_tokenizer(options.model)
        # What an engine would refuse is refused here, before any is made.
        shape = SimpleNamespace(
            hidden_size=self._text_config.hidden_size,
            name=options.model,
            device=torch.device("cpu"),
        )
        self.agent = load_agent(options.agent, model=options.model, lm=shape)  # type: ignore[arg-type]
        kind = choose_dtype(options.dtype, choose_device(options.device))
        self.dtype: torch.dtype = self._text_config.dtype if kind == "auto" else kind
        """Of the language model's weights."""

    def config(self, config: DecodingConfig | None = None, **options: Any) -> DecodingConfig:
        """See :meth:`mara_fast.Engine.config`."""
        return options_in_force(self.agent, config, options)

    def as_completed(
        self,
        prompts: Sequence[Any],
        config: DecodingConfig | None = None,
        *,
        sequence_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """See :meth:`mara_fast.Engine.as_completed`.

        Args:
            prompts: texts, chats or token-id lists.
            config: decoding options; None: the agent's defaults.
            sequence_ids: keys of the draws, one per prompt; None: 0, 1, 2, ...

        Raises:
            ValueError: what is wrong with a prompt, before any work; more engines than GPUs.
        """
        config = self.config(config)
        encode_that_fit(
            prompts,
            config,
            tokenizer=self._tokenizer,
            vocab_size=self._text_config.vocab_size,
            max_length=max_positions(self._text_config),
        )
        return self._as_completed(
            prompts, config, range(len(prompts)) if sequence_ids is None else sequence_ids
        )

    def _as_completed(
        self, prompts: Sequence[Any], config: DecodingConfig, sequence_ids: Sequence[int]
    ) -> Iterator[tuple[int, Generation]]:
        import ray

        if not prompts:
            return
        owns_ray = not ray.is_initialized()
        # Its core warns of what is as it should be.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        if owns_ray:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            # As bytes: Ray Data would make columns of chats and of token ids.
            rows = [
                {"index": index, "item": pickle.dumps(item)}
                for index, item in enumerate(zip(prompts, sequence_ids, strict=True))
            ]
            for row in self._results(ray, rows, config).iter_rows():
                yield int(row["index"]), pickle.loads(row["item"])
        finally:
            if owns_ray:
                ray.shutdown()

    def _results(self, ray: Any, rows: list[dict[str, Any]], config: DecodingConfig) -> Any:
        import ray.data

        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        if num_gpus and self.num_workers > num_gpus:
            raise ValueError(f"{self.num_workers} engines need a GPU each; there are {num_gpus}")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        size = min(
            self.options.max_batch_size * _BATCHES_PER_BLOCK, -(-len(rows) // self.num_workers)
        )
        return ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size)).map_batches(
            _Worker,
            fn_constructor_kwargs={"options": self.options, "config": config},
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=self.num_workers),
            num_cpus=0 if num_gpus else 1,
            num_gpus=1 if num_gpus else 0,
        )


class _Worker:
    """An engine in a process of Ray."""

    def __init__(self, *, options: EngineOptions, config: DecodingConfig) -> None:
        from transformers.utils import logging as transformers_logging

        from mara_fast.engine import Engine

        transformers_logging.disable_progress_bar()
        self.engine = Engine(**dataclasses.asdict(options))
        self.config = config

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The results of a block."""
        items = [pickle.loads(item) for item in batch["item"]]
        results = self.engine.generate(
            [prompt for prompt, _ in items],
            self.config,
            sequence_ids=[sequence for _, sequence in items],
        )
        return {"index": batch["index"], "item": [pickle.dumps(result) for result in results]}
