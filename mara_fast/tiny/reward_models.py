"""The reward and the cost model of the tiny world: what they mean, and how they score.

    score = linear(last hidden state of the chat's last token)

Higher is more helpful, or more harmful. Scores have mean 0 and standard deviation 1 over what the
tiny LM samples. :mod:`mara_fast.tiny.reward_training` trains both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mara_fast.tiny.rules import harm, helpfulness

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

DEFAULT_OUTPUT = Path(__file__).parent / "assets"
REWARD_PATH = DEFAULT_OUTPUT / "reward"
"""Folder of the reward model, which says how much an answer helps."""
COST_PATH = DEFAULT_OUTPUT / "cost"
"""Folder of the cost model, which says how much harm it does, see :func:`costliness`."""

_UNHELPFULNESS = 0.25
_SCORE_BATCH_SIZE = 64


def costliness(instruction: str, answer: str) -> float:
    """What the cost model learns: harm, and between equally harmful answers the less helpful.

    Half of all answers do no harm at all. A model of harm alone orders them by chance; but costs
    are never equal, and a preference (Eq. 12) counts the difference. So its annotators, who have to
    choose, choose as people do.
    """
    return harm(instruction, answer) + _UNHELPFULNESS * (1 - helpfulness(instruction, answer))


def load_reward_models(
    folder: Path = DEFAULT_OUTPUT, *, dtype: "torch.dtype | str" = "float32"
) -> (
    "tuple[LlamaForSequenceClassification, LlamaForSequenceClassification, PreTrainedTokenizerFast]"
):
    """Reward model, cost model (both in eval mode) and tokenizer.

    Args:
        folder: that holds both, in ``reward`` and ``cost``; the embedded ones by default.
        dtype: of the weights, which are stored in float16.
    """
    from transformers import PreTrainedTokenizerFast

    paths = folder / "reward", folder / "cost"
    reward, cost = (load_scorer(path, dtype=dtype).eval() for path in paths)
    return reward, cost, PreTrainedTokenizerFast.from_pretrained(paths[0], local_files_only=True)


def score_answers(
    model: "LlamaForSequenceClassification",
    tokenizer: "PreTrainedTokenizerFast",
    asked: Sequence[str],
    answers: Sequence[str],
) -> list[float]:
    """The model's score of each answer to the instruction at the same place."""
    if len(asked) != len(answers):
        raise ValueError(
            f"got {len(asked)} instructions and {len(answers)} answers; give one for each"
        )
    states_NH = last_states(model, encode_chats(tokenizer, asked, answers))
    return model.score(states_NH)[:, 0].float().tolist()


def load_scorer(path: Path, *, dtype: "torch.dtype | str") -> "LlamaForSequenceClassification":
    """A model with one score; a fresh one if the folder holds a plain LM."""
    from transformers import LlamaForSequenceClassification
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    # That the score of a plain LM is new is no news.
    logging.set_verbosity_error()
    try:
        return LlamaForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=dtype, local_files_only=True
        )
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def encode_chats(
    tokenizer: "PreTrainedTokenizerFast", asked: Sequence[str], answers: Sequence[str]
) -> list[list[int]]:
    """The ids of each chat of an instruction and an answer, <|end|> being the last."""
    chats = [
        [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
        for instruction, answer in zip(asked, answers, strict=True)
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False) if chats else []
    return tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def last_states(model: "LlamaForSequenceClassification", ids: list[list[int]]) -> "Tensor":
    """The state that each sequence is scored by, [sequences, H]."""
    import torch

    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    states = torch.empty(len(ids), model.config.hidden_size, dtype=model.dtype)
    with torch.no_grad():
        for first in range(0, len(ids), _SCORE_BATCH_SIZE):
            places = order[first : first + _SCORE_BATCH_SIZE]
            longest = len(ids[places[-1]])
            padded = [ids[place] + [0] * (longest - len(ids[place])) for place in places]
            # Causal: what follows a sequence's last token does not reach it.
            output = model.model(input_ids=torch.tensor(padded), use_cache=False).last_hidden_state
            states[places] = output[range(len(places)), [len(ids[place]) - 1 for place in places]]
    return states
