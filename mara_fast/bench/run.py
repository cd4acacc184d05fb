"""A run of the benchmark: models and prompts, the systems in turn, the report.

Fairness: one model, one agent, the same prompts, the same number of tokens, the end of sequences
ignored, the same threads for all. Figures are medians of rounds in which all systems
run in turn. Loading, construction and a first run of each system are outside the clock. The Aligner
decodes an answer and then its correction; only the correction's tokens count, as only it is used.
"""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from mara_fast.agent import MaraAgent
from mara_fast.bench import report, targets
from mara_fast.bench.facts import facts_of
from mara_fast.bench.measure import in_turn, roofline, time_by_part
from mara_fast.bench.model import SHAPES, calibrate, random_llama
from mara_fast.bench.systems import CASCADE, OURS, STATIC, SYSTEMS, Subject, systems_of
from mara_fast.config import DecodingConfig
from mara_fast.engine import Engine
from mara_fast.jsonl import PromptRecord, read_prompts
from mara_fast.language_model import FrozenLM
from mara_fast.loading import (
    choose_device,
    choose_dtype,
    load_agent,
    load_model,
    load_tokenizer,
    named,
)
from mara_fast.outputs import DecodingStats
from mara_fast.prompts import encode_prompts

_ALIGNER = "aligner-7b"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured; see the options of ``mara-fast bench``."""

    model: str = "50m"
    agent: str | None = None
    aligner: str | None = None
    dataset_path: str | None = None
    batch_sizes: str = "1,16"
    input_len: int = 64
    output_len: int = 48
    num_prompts: int | None = None
    prompts_per_slot: int = 8
    """Answers end at different steps: with a prompt per slot most slots would soon be empty."""
    num_serial_prompts: int = 2
    num_iters: int = 5
    dtype: str = "auto"
    device: str = "auto"
    forced: float = 0.33
    rank0: float = 0.7
    systems: str | None = None
    compile: bool = False
    cuda_graph: bool = True
    threads: int | None = None
    seed: int = 0

    @property
    def sizes(self) -> list[int]:
        """The batch sizes."""
        return _numbers("batch_sizes", self.batch_sizes)

    def count(self, batch_size: int) -> int:
        """Prompts for a batch size."""
        return self.num_prompts or self.prompts_per_slot * batch_size

    @property
    def names(self) -> tuple[str, ...]:
        """The systems; by default all that the device has."""
        if self.systems is None:
            on_gpu = choose_device(self.device).type == "cuda"
            return tuple(name for name in SYSTEMS if on_gpu or name != STATIC)
        return tuple(SYSTEMS[i - 1] for i in _numbers("systems", self.systems, most=len(SYSTEMS)))

    def __post_init__(self) -> None:
        if self.model in SHAPES and self.agent is not None:
            raise ValueError(f"--agent goes with a real model, and {self.model} is a random shape")
        if self.model not in SHAPES and self.agent is None:
            raise ValueError(
                f"model={self.model!r} is no shape ({', '.join(SHAPES)}); a real model needs an "
                "--agent"
            )
        if self.model in SHAPES and self.aligner is not None and self.aligner not in SHAPES:
            raise ValueError(
                f"aligner={self.aligner!r} is not known; allowed beside a random model: "
                f"{', '.join(SHAPES)}"
            )
        if self.model in SHAPES and self.dataset_path is not None:
            raise ValueError(
                f"--dataset-path goes with a real model, and {self.model} is a random shape"
            )
        if OURS not in self.names:
            raise ValueError(
                f"systems={self.systems!r} leaves {OURS} (1) out, which all ratios need"
            )
        _ = self.sizes
        choose_dtype(self.dtype, choose_device(self.device))


def run(
    config: BenchConfig,
    *,
    show_targets: bool = False,
    output: Path | None = None,
    paper: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures, prints and writes.

    Args:
        config: what is measured.
        show_targets: judge the targets of the device.
        output: JSON file; a plot goes beside it, where matplotlib is installed.
        paper: tokens per second that a paper prints, by system; shown beside what is measured.
        notes: printed below.

    Raises:
        ValueError: an output that cannot be written, or too few prompts.
        FileNotFoundError: no such file of prompts.
    """
    if output is not None:
        # Found before the run, not after it.
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"output_json={str(output)!r}: {output.parent} is no folder"
            ) from error
        if not os.access(output.parent, os.W_OK | os.X_OK):
            raise ValueError(f"output_json={str(output)!r}: {output.parent} cannot be written to")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    records = _records(config)
    subject, description = _subject(config)
    device = subject.model.device
    encoded = _encoded(records, subject.model, config)
    found: dict[str, Any] = {
        **facts_of(device, subject.model.dtype, "transformers"),
        "model": description,
        "options": config.__dict__,
        "batches": [],
    }
    if paper:
        found["paper"] = dict(paper)
    console.print(f"{description}\n{found['hardware']}, {found['date']}", highlight=False)
    for size in config.sizes:
        count = config.count(size)
        prompts = encoded[:count] or _prompts(
            subject.model, config.input_len, count, seed=config.seed + 1
        )
        batch = _measure(subject, prompts, size, config)
        found["batches"].append(batch)
        report.print_batch(console, batch, paper or {})
        # Whatever becomes of the next one.
        _write(found, output)
    if show_targets:
        found["targets"] = targets.judge(found["batches"], device=device.type)
        report.print_targets(console, found["targets"])
    for note in notes:
        console.print(note, highlight=False, style="dim")
    _write(found, output)
    if output is not None:
        try:
            report.plot(found, output.with_suffix(".png"))
        except ImportError:
            console.print("no plot: it needs matplotlib (mara-fast[train])")
    return found


def _write(found: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _measure(
    subject: Subject, prompts: list[list[int]], size: int, config: BenchConfig
) -> dict[str, Any]:
    names = config.names
    systems = systems_of(subject, prompts, batch_size=size, names=names)
    if CASCADE in names:
        few = prompts[: config.num_serial_prompts]
        systems |= systems_of(subject, few, batch_size=1, names=(CASCADE,))
    device = subject.model.device
    total = len(systems) * (config.num_iters + 1)
    with tqdm(total=total, unit="run", desc=f"batch {size}", leave=False) as bar:
        rates, tokens = in_turn(
            systems, rounds=config.num_iters, device=device, progress=lambda: bar.update(1)
        )
    options = subject.engine_options | {"compile": False}
    engine = Engine(subject.model, subject.agent, False, max_batch_size=size, **options)
    decoding = DecodingConfig(max_new_tokens=subject.num_tokens, ignore_eos=True)
    stats = sum((one.stats for one in engine.generate(prompts, decoding)), DecodingStats())
    # Parts of a graph cannot be told apart.
    options["cuda_graph"] = False
    eager = Engine(subject.model, subject.agent, False, max_batch_size=size, **options)
    context = statistics.mean(map(len, prompts)) + config.output_len / 2
    return report.batch_report(
        size,
        rates=rates,
        tokens=tokens,
        stats=stats,
        limits=roofline(subject.model, context=context, batch_size=size),
        parts=time_by_part(lambda: eager.generate(prompts, decoding), device),
    )


def _subject(config: BenchConfig) -> tuple[Subject, str]:
    device = choose_device(config.device)
    kind = choose_dtype(config.dtype, device)
    if config.model in SHAPES:
        kind = torch.bfloat16 if kind == "auto" else kind
        model: PreTrainedModel = _random(config.model, config.seed, kind, device)
        prompts = _prompts(model, config.input_len, 8, seed=config.seed + 1)
        agent = calibrate(model, prompts, forced=config.forced, rank0=config.rank0).to(device)
        description = f"random {config.model}"
    else:
        if config.aligner is not None and config.aligner not in SHAPES:
            # Before a model is loaded, which may take minutes.
            with named("aligner", config.aligner):
                AutoConfig.from_pretrained(config.aligner)
        model = load_model(config.model, dtype=config.dtype, device=config.device)
        loaded = load_agent(config.agent, model=model, lm=FrozenLM(model))
        assert isinstance(loaded, MaraAgent)
        agent, description = loaded, config.model
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    is_small = num_weights < 1e9
    shape = config.aligner or (None if is_small else _ALIGNER)
    description += f", {num_weights / 1e6:.0f}M parameters; the Aligner's second model is "
    if shape is None:
        aligner, second = model, "the same model"
    elif shape in SHAPES:
        aligner = _random(shape, config.seed + 2, model.dtype, device)
        second = f"a random {shape}"
    else:
        aligner = load_model(shape, dtype=config.dtype, device=config.device)
        second = shape
    description += second
    graphs: bool | str = "auto" if config.cuda_graph else False
    return (
        Subject(
            model=model,
            agent=agent,
            aligner=aligner,
            num_tokens=config.output_len,
            engine_options={"cuda_graph": graphs, "compile": config.compile},
        ),
        description,
    )


def _random(shape: str, seed: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    return random_llama(seed=seed, dtype=dtype, device=device, **SHAPES[shape])


def _prompts(model: PreTrainedModel, length: int, count: int, *, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


def _records(config: BenchConfig) -> list[PromptRecord]:
    """The prompts of the file, if one was given and has as many as are needed."""
    if config.dataset_path is None:
        return []
    records, needed = read_prompts(Path(config.dataset_path)), max(map(config.count, config.sizes))
    if len(records) < needed:
        raise ValueError(
            f"dataset_path={config.dataset_path!r} has {len(records)} prompts, and {needed} are "
            "needed; give fewer by num_prompts"
        )
    return records[:needed]


def _encoded(
    records: list[PromptRecord], model: PreTrainedModel, config: BenchConfig
) -> list[list[int]]:
    if not records:
        return []
    pairs = encode_prompts(
        [record.prompt for record in records],
        tokenizer=load_tokenizer(config.model),
        prompt_format=DecodingConfig().prompt_format,
        vocab_size=model.config.get_text_config().vocab_size,
    )
    return [ids for _, ids in pairs]


def _numbers(name: str, text: str, most: int | None = None) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name}={text!r} is not allowed; allowed: integers >= 1, as 1,16")
    numbers = [int(part) for part in parts]
    if most is not None and max(numbers) > most:
        raise ValueError(f"{name}={text!r} is not allowed; allowed: from 1 to {most}")
    return numbers
