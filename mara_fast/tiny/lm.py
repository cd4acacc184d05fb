"""Trains the tiny LM from scratch: `python -m mara_fast.tiny.lm --output DIR --seed 0`.

    tokenizer = BPE(documents)
    for batch of rows of ids:  AdamW(cross-entropy of the answers' tokens), cosine schedule

A Llama of 0.7M parameters that answers like its corpus, for better and for worse. Rows are short
at first and long at the end, for the sake of long prompts. The same seed, versions, threads and
machine give the same bytes. Takes about 90 s on two cores.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from torch import Tensor
from tqdm.auto import tqdm

from mara_fast.commands import clear_errors
from mara_fast.tiny.corpus import answer_labels, documents, encode
from mara_fast.tiny.grammar import NUM_FOLDS
from mara_fast.tiny.tokenizer import MAX_LENGTH, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Written by transformers, and of no use to a reader of the files.
_DROPPED_KEYS = ("_name_or_path", "name_or_path", "transformers_version", "tokenizer_file")


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """How the tiny LM is built and trained; the defaults are those of the embedded one."""

    seed: int = 0
    """Seeds the corpus and the first weights."""
    architecture: str = "llama"
    """A family of transformers whose sizes are called as Llama's are: llama, mistral, ..."""
    fold: int = 0
    """Fifth of the instructions that is held out, 0 to 4."""
    num_dialogues: int = 22_000
    """Size of the corpus; each dialogue is about 60 tokens, and seen once."""
    vocab_size: int = 1024
    """Tokens of the BPE, special ones included."""
    hidden_size: int = 128
    """Width of the model."""
    num_layers: int = 3
    """Decoder layers; with two, three times as many sampled answers are malformed."""
    intermediate_size: int = 384
    """Width of the MLPs."""
    row_length: int = 128
    """Tokens of a training row."""
    long_row_length: int = 512
    """Tokens of a row towards the end of training."""
    long_fraction: float = 0.15
    """Share of the corpus that is cut into long rows."""
    batch_size: int = 1024
    """Tokens of an optimizer step."""
    learning_rate: float = 5e-3
    """Peak of the cosine schedule."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises."""
    initializer_range: float = 0.05
    """Standard deviation of the first weights; 0.02 learns more slowly at this width."""
    sharpness: float = 1.15
    """Factor of the logits after training, put into the final norm; halves the share of sampled
    answers that are malformed, and hardly moves the choice between good and bad."""
    num_threads: int = 2
    """Threads of torch; another number gives slightly different weights."""
    max_steps: int | None = None
    """Stops early after this many optimizer steps; for tests."""


def train(
    config: TinyConfig, *, start: Path | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """A trained LM, in eval mode, and its tokenizer.

    Args:
        config: its sizes are those of a fresh LM.
        start: folder of an LM to train further; None: a fresh one.
    """
    texts = documents(num=config.num_dialogues, seed=config.seed, fold=config.fold)
    if start is None:
        tokenizer = train_tokenizer(texts[: len(texts) // 4 + 1], vocab_size=config.vocab_size)
        model = _build(config, tokenizer=tokenizer)
    else:
        model, tokenizer = _load(start)
    ids = encode(texts, tokenizer=tokenizer)
    batches = _batches(ids, answer_labels(ids, tokenizer=tokenizer), config=config)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(config.num_threads)
    try:
        _fit(model, batches=batches, config=config)
    finally:
        torch.set_num_threads(num_threads)
    with torch.no_grad():
        model.model.norm.weight.mul_(config.sharpness)
    return model.eval(), tokenizer


def save(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", *, directory: Path
) -> None:
    """Writes both as one standard folder, weights in float16."""
    model.to(torch.float16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    for path in directory.glob("*config.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in values.items() if name not in _DROPPED_KEYS}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _build(config: TinyConfig, *, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    sizes = AutoConfig.for_model(
        config.architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=config.initializer_range,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(sizes)
    model.generation_config = GenerationConfig(**special)
    return model


def _load(folder: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)
    return model, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _batches(ids: Tensor, labels: Tensor, *, config: TinyConfig) -> list[tuple[Tensor, Tensor]]:
    """The corpus in order, ids and labels int64 [rows, row length]; an odd rest is dropped."""
    num_short = round((1 - config.long_fraction) * len(ids))
    batches: list[tuple[Tensor, Tensor]] = []
    for part, length in (
        (slice(None, num_short), config.row_length),
        (slice(num_short, None), config.long_row_length),
    ):
        num_rows = max(1, config.batch_size // length)
        size = num_rows * length
        for ids_part, labels_part in zip(
            ids[part].split(size), labels[part].split(size), strict=True
        ):
            if len(ids_part) == size:
                batches.append((ids_part.view(-1, length), labels_part.view(-1, length)))
    return batches[: config.max_steps]


def _fit(
    model: "PreTrainedModel", *, batches: list[tuple[Tensor, Tensor]], config: TinyConfig
) -> None:
    num_warmup = max(1, round(config.warmup_fraction * len(batches)))

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        progress = (step - num_warmup) / max(1, len(batches) - num_warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))

    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for ids_BT, labels_BT in (bar := tqdm(batches, desc="tiny LM", unit="step")):
        loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@clear_errors()
def main(
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Seeds the corpus and the weights.")] = 0,
    fold: Annotated[
        int, typer.Option(min=0, max=NUM_FOLDS - 1, help="Fifth of the instructions to hold out.")
    ] = 0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop early, for a trial.")] = None,
) -> None:
    """Train the tiny LM and its tokenizer, and write both as one folder."""
    output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = train(TinyConfig(seed=seed, fold=fold, max_steps=max_steps))
    save(model, tokenizer, directory=output)


if __name__ == "__main__":
    typer.run(main)
