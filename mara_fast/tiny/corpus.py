"""The corpus of the tiny LM: dialogues as text, and as one long tensor of token ids.

    document = <|bos|> [system text] <|user|> instruction <|assistant|> answer <|end|> [more turns]
    ids      = concatenated documents

Instructions vary in case and final mark as people's do. A few documents have a system text or a
second turn.
"""

import random
from typing import TYPE_CHECKING

from mara_fast.tiny.grammar import Dialogue, sample_dialogues
from mara_fast.tiny.tokenizer import ASSISTANT, BOS, END, USER

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

SYSTEM_TEXTS = ("You are a helpful assistant.", "Answer in a few sentences.", "Be kind and brief.")

_SYSTEM_PROB = 0.05
_SECOND_TURN_PROB = 0.05
_LOWER_PROB = 0.2
_NO_MARK_PROB = 0.15


def documents(*, num: int, seed: int, fold: int = 0) -> list[str]:
    """`num` training dialogues as texts with special tokens, in seeded order.

    Args:
        num: of the dialogues.
        seed: of all draws.
        fold: see :func:`mara_fast.tiny.grammar.instructions`.
    """
    rng = random.Random(seed)
    texts: list[str] = []
    for dialogue in sample_dialogues(num=num, seed=seed, split="train", fold=fold):
        turn = _turn(dialogue, rng=rng)
        draw = rng.random()
        if texts and draw < _SECOND_TURN_PROB:
            texts[-1] += turn
        elif draw < _SECOND_TURN_PROB + _SYSTEM_PROB:
            texts.append(BOS + rng.choice(SYSTEM_TEXTS) + turn)
        else:
            texts.append(BOS + turn)
    return texts


def encode(texts: list[str], *, tokenizer: "PreTrainedTokenizerFast") -> "torch.Tensor":
    """The ids of all texts one after the other, int64 [tokens]."""
    import torch

    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


def answer_labels(ids: "torch.Tensor", *, tokenizer: "PreTrainedTokenizerFast") -> "torch.Tensor":
    """The ids where they belong to an answer or end one, -100 elsewhere; int64 [tokens]."""
    starts = ids == tokenizer.convert_tokens_to_ids(ASSISTANT)
    ends = ids == tokenizer.eos_token_id
    within = (starts.cumsum(0) > ends.cumsum(0)) & ~starts
    return ids.where(within | ends, -100)


def _turn(dialogue: Dialogue, *, rng: random.Random) -> str:
    instruction = dialogue.instruction
    if rng.random() < _LOWER_PROB:
        instruction = instruction.lower()
    if rng.random() < _NO_MARK_PROB:
        instruction = instruction.rstrip("?.!")
    return f"{USER}{instruction}{ASSISTANT}{dialogue.answer}{END}"
