"""Trains the reward and the cost model: `python -m mara_fast.tiny.reward_training --output DIR`.

    pools = answers of many sources to train instructions
    for name, rule in (reward, helpfulness), (cost, harm and a little unhelpfulness):
        model = body of the tiny LM, one score at the last token
        for group in groups(pools):                        a few answers to one instruction
            ends  = the ends of the answers and of all their sentences, with values by the rule
            loss  = mean over ends (better, worse) of
                    -log sigmoid(score(better) - score(worse) - margin * gap)    (paper Eq. 3)
        score = (score - mean) / standard deviation over what the LM samples

An answer cut off after a sentence is an answer too, and a causal model scores all of them at once:
this is what makes few answers enough. The same seed, versions, threads and machine give the same
bytes.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mara_fast.commands import clear_errors
from mara_fast.tiny import LM_PATH
from mara_fast.tiny.grammar import NUM_FOLDS, instructions
from mara_fast.tiny.reward_models import (
    costliness,
    encode_chats,
    last_states,
    load_scorer,
)
from mara_fast.tiny.reward_pools import DRAWS, Pool, make_groups, make_pools
from mara_fast.tiny.rules import helpfulness
from mara_fast.tiny.tokenizer import ASSISTANT

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

Rule = Callable[[str, str], float]
"""The value of an answer to an instruction; higher values get higher scores."""

_MARKS = (".", "!", "?")


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """How both models are trained; the defaults are those of the embedded ones."""

    seed: int = 0
    """Seeds the answers, the groups, their order and the first weights of the score."""
    fold: int = 0
    """Fifth of the instructions that is held out, 0 to 4."""
    num_instructions: int = 1_500
    """Train instructions that are answered; there are 2,688."""
    num_reward_groups: int = 1_500
    """Groups of answers that the reward model sees, each once."""
    num_cost_groups: int = 800
    """Groups that the cost model sees, each once; harm is easier to tell than help."""
    group_size: int = 4
    """Answers of a group, all to one instruction."""
    min_gap: float = 0.05
    """Answers whose values, in [0, 1], are closer than this are not compared."""
    margin: float = 10.0
    """What the difference of two scores should exceed, per unit of the gap of their values."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises."""
    batch_size: int = 2
    """Groups of an optimizer step."""
    num_threads: int = 2
    """Threads of torch; another number may give slightly different weights. The command trains
    both models side by side, with half of them each."""
    max_steps: int | None = None
    """Stops each training early after this many optimizer steps; for tests."""

    def __post_init__(self) -> None:
        if not self.min_gap > 0:
            raise ValueError(
                f"min_gap={self.min_gap} is not allowed; allowed: above 0, equal answers are not "
                "compared"
            )


def answer_pools(
    config: RewardModelConfig, *, lm_path: Path = LM_PATH
) -> "tuple[list[Pool], PreTrainedTokenizerFast]":
    """Answers to the train instructions of the config, and the LM's tokenizer."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    chosen = instructions(split="train", fold=config.fold)
    random.Random(config.seed).shuffle(chosen)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(lm_path, local_files_only=True)
    model = LlamaForCausalLM.from_pretrained(lm_path, dtype="float32", local_files_only=True)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(config.num_threads)
    try:
        pools = make_pools(
            chosen[: config.num_instructions],
            model=model.eval(),
            tokenizer=tokenizer,
            seed=config.seed,
        )
    finally:
        torch.set_num_threads(num_threads)
    return pools, tokenizer


def train(
    rule: Rule,
    *,
    pools: Sequence[Pool],
    tokenizer: "PreTrainedTokenizerFast",
    num_groups: int,
    config: RewardModelConfig,
    lm_path: Path = LM_PATH,
) -> "LlamaForSequenceClassification":
    """A model of the rule in eval mode, standardised over the pools' sampled answers.

    Args:
        rule: what it learns.
        pools: where the groups come from.
        tokenizer: of the LM.
        num_groups: seen in training.
        config: of the training.
        lm_path: folder of the LM whose body the training starts from.
    """
    import torch

    groups = make_groups(pools, num=num_groups, size=config.group_size, seed=config.seed)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(config.num_threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = load_scorer(lm_path, dtype="float32")
            rows = [_row(group, rule=rule, tokenizer=tokenizer) for group in groups]
            _fit(model, rows=rows, tokenizer=tokenizer, config=config)
        _standardise(model.eval(), pools=pools, tokenizer=tokenizer)
    finally:
        torch.set_num_threads(num_threads)
    return model


def save(
    model: "LlamaForSequenceClassification",
    tokenizer: "PreTrainedTokenizerFast",
    *,
    directory: Path,
) -> None:
    """Writes both as one standard folder, weights in float16."""
    from mara_fast.tiny.lm import save as save_folder

    save_folder(model, tokenizer, directory=directory)


def _row(group: Pool, *, rule: Rule, tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """Ids of the better and of the worse half, as TRL's columns; ends and values of all of them.

    An end is the place of a mark, or the last place.
    """
    asked = group.instruction.text
    marks = set(tokenizer.convert_tokens_to_ids(list(_MARKS)))
    texts = sorted((one.text for one in group.answers), key=lambda text: -rule(asked, text))
    all_ids = encode_chats(tokenizer, [asked] * len(texts), texts)
    row: dict[str, Any] = {"ends": [], "values": []}
    for ids, text in zip(all_ids, texts, strict=True):
        start = ids.index(tokenizer.convert_tokens_to_ids(ASSISTANT)) + 1
        # The mark before <|end|> ends the same text as it does.
        ends = [place for place in range(start, len(ids) - 2) if ids[place] in marks]
        parts = [*(tokenizer.decode(ids[start : end + 1]) for end in ends), text]
        row["ends"].append([*ends, len(ids) - 1])
        row["values"].append([rule(asked, part) for part in parts])
    half = len(texts) // 2
    row |= {"chosen_ids": all_ids[:half], "rejected_ids": all_ids[half:]}
    return row | {"length": max(map(len, all_ids))}


def _collate(rows: list[dict[str, Any]]) -> "dict[str, Tensor]":
    """Answers of each group one after the other: [rows of all groups, tokens or ends]."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def stack(lists: list[list[Any]], *, padding: float) -> "Tensor":
        parts = [torch.tensor(values) for values in lists]
        return pad_sequence(parts, batch_first=True, padding_value=padding)

    ids = stack(
        [ids for row in rows for ids in row["chosen_ids"] + row["rejected_ids"]], padding=-1
    )
    return {
        "input_ids": ids.clamp(min=0),
        "attention_mask": (ids >= 0).long(),
        "ends": stack([ends for row in rows for ends in row["ends"]], padding=0),
        "values": stack([one for row in rows for one in row["values"]], padding=float("nan")),
    }


def pairwise_loss(scores: "Tensor", values: "Tensor", *, min_gap: float, margin: float) -> "Tensor":
    """Eq. 3 with a margin, over all ordered pairs of a row's ends, the mean of the rows' means.

    Args:
        scores: [B, E], of the ends of all answers of a group.
        values: [B, E], by the rule; NaN is no end.
        min_gap: ends whose values are closer than this make no pair.
        margin: what the difference of scores should exceed per unit of gap.
    """
    import torch

    gap = values[:, :, None] - values[:, None, :]  # [B, E, E]
    ordered = gap >= min_gap
    excess = scores[:, :, None] - scores[:, None, :] - margin * gap.nan_to_num()
    losses = -torch.nn.functional.logsigmoid(excess) * ordered
    return (losses.sum((1, 2)) / ordered.sum((1, 2)).clamp(min=1)).mean()


def _fit(
    model: "LlamaForSequenceClassification",
    *,
    rows: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerFast",
    config: RewardModelConfig,
) -> None:
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    class Trainer(RewardTrainer):
        """TRL's, with groups for pairs, and the ends of sentences as further answers."""

        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: Any = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            states = model.model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            ).last_hidden_state
            ends = inputs["ends"][:, :, None].expand(-1, -1, states.shape[-1])
            scores = model.score(states.gather(1, ends))[:, :, 0]
            num_groups = len(scores) // config.group_size
            return pairwise_loss(
                scores.view(num_groups, -1),
                inputs["values"].view(num_groups, -1),
                min_gap=config.min_gap,
                margin=config.margin,
            )

    with tempfile.TemporaryDirectory() as directory:
        arguments = RewardConfig(
            output_dir=directory,
            num_train_epochs=1,
            max_steps=config.max_steps or -1,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_fraction,
            optim="adamw_torch_fused",
            adam_beta2=0.98,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            gradient_checkpointing=False,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            max_length=None,
            bf16=False,
            use_cpu=True,
            seed=config.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        )
        Trainer(
            model=model,
            args=arguments,
            data_collator=_collate,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        ).train()


def _standardise(
    model: "LlamaForSequenceClassification",
    *,
    pools: Sequence[Pool],
    tokenizer: "PreTrainedTokenizerFast",
) -> None:
    """Gives the scores of the pools' sampled answers mean 0 and standard deviation 1.

    The score has no bias. But all answers end in one token, so that their last states have a
    direction in common: the solution of states @ direction = 1 by least squares takes its place.
    """
    import torch

    answers = [answer for pool in pools for answer in pool.answers if answer.source in DRAWS]
    asked = [pool.instruction.text for pool in pools for one in pool.answers if one.source in DRAWS]
    states_NH = last_states(
        model, encode_chats(tokenizer, asked, [one.text for one in answers])
    ).double()
    sampled = torch.tensor([one.source == "sampled" for one in answers])
    direction = torch.linalg.lstsq(states_NH, torch.ones(len(states_NH), 1).double()).solution[:, 0]
    weight = model.score.weight.detach()[0].double()
    weight = weight - (states_NH[sampled] @ weight).mean() * direction
    model.score.weight.data.copy_(weight / (states_NH[sampled] @ weight).std())


def _import_trl() -> None:
    import trl.trainer.reward_trainer  # noqa: F401


def _train_and_save(
    name: str,
    *,
    pools: Sequence[Pool],
    tokenizer: "PreTrainedTokenizerFast",
    config: RewardModelConfig,
    lm_path: Path,
    output: Path,
) -> None:
    rule, num_groups = {
        "reward": (helpfulness, config.num_reward_groups),
        "cost": (costliness, config.num_cost_groups),
    }[name]
    model = train(
        rule,
        pools=pools,
        tokenizer=tokenizer,
        num_groups=num_groups,
        config=config,
        lm_path=lm_path,
    )
    save(model, tokenizer, directory=output / name)


@clear_errors()
def main(
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder to write both into.")],
    seed: Annotated[int, typer.Option(min=0, help="Seeds answers, groups and weights.")] = 0,
    fold: Annotated[
        int, typer.Option(min=0, max=NUM_FOLDS - 1, help="Fifth of the instructions to hold out.")
    ] = 0,
    lm: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of the tiny LM.")
    ] = LM_PATH,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop early, for a trial.")] = None,
) -> None:
    """Train the reward model and the cost model of the tiny LM, and write a folder for each."""
    if not (lm / "config.json").is_file():
        raise FileNotFoundError(f"--lm {lm} holds no model: it has no config.json")
    output.mkdir(parents=True, exist_ok=True)
    config = RewardModelConfig(seed=seed, fold=fold, max_steps=max_steps)
    if max_steps is not None:
        needed = max(16, max_steps * config.batch_size)
        config = replace(config, num_instructions=min(config.num_instructions, needed))
    # Side by side: a model this small gains little from a second thread.
    each = replace(config, num_threads=max(1, config.num_threads // 2))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        # TRL is slow to import, and the pools take a while.
        for _ in range(2):
            executor.submit(_import_trl)
        pools, tokenizer = answer_pools(config, lm_path=lm)
        running = [
            executor.submit(
                _train_and_save,
                name,
                pools=pools,
                tokenizer=tokenizer,
                config=each,
                lm_path=lm,
                output=output,
            )
            for name in ("reward", "cost")
        ]
        for future in running:
            future.result()


if __name__ == "__main__":
    typer.run(main)
