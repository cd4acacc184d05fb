"""What an evaluation is going to do: found out, and checked, before a model is loaded.

data sets      read
judge          its functions imported
systems        agents loaded, as they are small; of the models the config and the tokenizer
prompts        tokenised for every system
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mara_fast.agent import MaraAgent
from mara_fast.config import DecodingConfig
from mara_fast.engine import encode_that_fit
from mara_fast.evaluation.datasets import Dataset, load_dataset
from mara_fast.evaluation.fingerprint import Fingerprints
from mara_fast.evaluation.scores import Judge
from mara_fast.evaluation.spec import PREFERENCE, EvalSpec
from mara_fast.evaluation.system import SystemSpec
from mara_fast.language_model import max_positions
from mara_fast.loading import (
    TINY,
    choose_device,
    choose_dtype,
    load_tokenizer,
    looks_like_path,
    named,
)
from mara_fast.mixture import check_weights
from mara_fast.options import check, is_int
from mara_fast.prompts import PromptError
from mara_fast.tiny import LM_PATH


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done."""

    spec: EvalSpec
    datasets: tuple[Dataset, ...]
    judge: Judge
    configs: Mapping[str, DecodingConfig]
    """Decoding options in force, by system."""
    dtypes: Mapping[str, str]
    """Of the language models, by system."""
    fingerprints: Fingerprints

    def settings(self, name: str, corrects: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the answers of a system depend on.

        Args:
            name: of the system.
            corrects: the settings of the answers that it corrects.
        """
        system = self.spec.systems[name]
        return {
            "model": self.fingerprints.of(system.model),
            "agent": self.fingerprints.of(system.agent),
            "dtype": self.dtypes[name],
            "samples": system.best_of,
            "corrects": corrects,
            **self.configs[name].token_options(),
        }


def make_plan(spec: EvalSpec, *, limit: int | None = None, folders: Sequence[Path] = ()) -> Plan:
    """The plan of a spec.

    Args:
        spec: of the evaluation.
        limit: so many prompts of each data set; None: all.
        folders: to be written into.

    Raises:
        ValueError: naming what is wrong with the spec, or what it names, and where.
        OSError: no such file, folder or hub id.
    """
    for folder in folders:
        taken = next((one for one in (folder, *folder.parents) if one.exists()), None)
        if taken is not None and not taken.is_dir():
            raise ValueError(f"{folder} is not allowed as a folder: {taken} is a file")
    datasets = tuple(load_dataset(name, one, limit=limit) for name, one in spec.datasets.items())
    fingerprints = Fingerprints()
    judge = Judge(spec.judge, fingerprints)
    judge.check(datasets)
    _check_labels(spec, judge.names)
    engine = _Engine(spec.engine)
    configs, dtypes = {}, {}
    checked: set[Any] = set()
    for name, system in spec.systems.items():
        with _named(f"systems.{name}"):
            model = engine.model(system.model)
            agents = _agents(system)
            for agent in agents:
                model.check(agent)
            # As a mixture of agents has it.
            own = next((a.decoding for a in agents if a.config.decoding), DecodingConfig())
            config = configs[name] = system.config(spec.decoding, own)
            if agents:
                check_weights(config.agent_weights, len(agents))
        dtypes[name] = model.dtype
        # What the ids of a prompt, and their number, depend on.
        key = (
            id(model),
            config.prompt_format,
            config.max_new_tokens,
            bool(config.stop_strings),
            system.corrects is not None and system.template,
        )
        if key not in checked:
            checked.add(key)
            for dataset in datasets:
                _check_prompts(name, system, dataset, config, model)
    return Plan(
        spec=spec,
        datasets=datasets,
        judge=judge,
        configs=configs,
        dtypes=dtypes,
        fingerprints=fingerprints,
    )


class _Model:
    """What is known of a language model without its weights."""

    def __init__(self, source: Any, options: Mapping[str, Any]) -> None:
        from transformers import AutoConfig, PreTrainedModel

        if isinstance(source, PreTrainedModel):
            self.config: Any = source.config.get_text_config()
            self.dtype = str(source.dtype)
        elif not isinstance(source, str):
            raise ValueError(f"model is a {type(source).__name__}, expected a PreTrainedModel")
        else:
            if looks_like_path(source) and not os.path.isdir(source):
                raise FileNotFoundError(f"model {source!r}: there is no such folder")
            with named("model", source):
                config = AutoConfig.from_pretrained(LM_PATH if source == TINY else source)
            self.config = config.get_text_config()
            kind = choose_dtype(options.get("dtype", "auto"), _device(options))
            if kind == "auto":
                kind = torch.float32 if source == TINY else getattr(config, "dtype", None)
            self.dtype = str(kind or "auto")
        self.name = source if isinstance(source, str) else type(source).__name__
        self.tokenizer = load_tokenizer(source)
        self.max_length = max_positions(self.config)
        given = options.get("max_length")
        if given is not None:
            if self.max_length is not None and given > self.max_length:
                raise ValueError(
                    f"engine.max_length={given} exceeds the model's {self.max_length} positions"
                )
            self.max_length = given

    def check(self, agent: MaraAgent) -> None:
        """Raises a ValueError unless an agent judges states of this model's size."""
        size = getattr(self.config, "hidden_size", None)
        if size is not None and agent.config.hidden_size != size:
            raise ValueError(
                f"the agent judges states of size {agent.config.hidden_size}, but {self.name} has "
                f"hidden size {size}: it was trained for another model"
            )


class _Engine:
    """The models of a spec, each looked at once."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        for name in ("max_batch_size", "max_length", "prefill_chunk"):
            if options.get(name) is not None:
                check(f"engine.{name}", options[name], is_int, "an integer >= 1", minimum=1)
        with _named("engine"):
            choose_dtype(options.get("dtype", "auto"), _device(options))
        self._options = options
        self._models: dict[Any, _Model] = {}

    def model(self, source: Any) -> _Model:
        """What is known of a model."""
        key = source if isinstance(source, str) else id(source)
        if key not in self._models:
            self._models[key] = _Model(source, self._options)
        return self._models[key]


def _device(options: Mapping[str, Any]) -> torch.device:
    return choose_device(options.get("device", "auto"))


def _agents(system: SystemSpec) -> list[MaraAgent]:
    given = system.agent if isinstance(system.agent, list | tuple) else [system.agent]
    found = []
    for agent in given:
        if isinstance(agent, str):
            try:
                agent = MaraAgent.from_pretrained(agent)
            except OSError as error:
                # In a folder something is missing, and the error says what.
                what = "" if os.path.isdir(agent) else " is neither a folder nor on the hub"
                raise FileNotFoundError(f"agent {agent!r}{what}: {error}") from error
        if agent:
            found.append(agent)
    return found


def _check_prompts(
    name: str, system: SystemSpec, dataset: Dataset, config: DecodingConfig, model: _Model
) -> None:
    prompts = []
    for record in dataset.records:
        prompt = record.prompt
        if system.corrects is not None:
            try:
                # At least as long as this it is going to be.
                prompt = system.asked(prompt, "")
            except ValueError as error:
                raise ValueError(f"{dataset.place(record)}: {error} (systems.{name})") from error
        prompts.append(prompt)
    try:
        encode_that_fit(
            prompts,
            config,
            tokenizer=model.tokenizer,
            vocab_size=model.config.vocab_size,
            max_length=model.max_length,
        )
    except PromptError as error:
        place = dataset.place(dataset.records[error.index])
        raise ValueError(f"{place}{error.problem} (systems.{name})") from error
    except ValueError as error:
        raise ValueError(f"systems.{name}: {error}") from error


def _check_labels(spec: EvalSpec, names: Sequence[str]) -> None:
    """Raises a ValueError if the paper's rates are by what the judge does not judge by."""
    allowed = (PREFERENCE, *names)
    for pair, by_dataset in spec.paper.items():
        for dataset, rates in by_dataset.items():
            for label in rates:
                if label not in allowed:
                    raise ValueError(
                        f"paper.{pair}.{dataset} names {label!r}, which is not judged by; allowed: "
                        f"{', '.join(allowed)}"
                    )


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors say which part of the spec they are about."""
    try:
        yield
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{where}: {error}") from error
