"""A tiny random model that speaks: byte-level tokenizer, chat template, agent.

Random weights write random bytes, so half-finished UTF-8 characters are the rule in its texts.
Everything is built once per process; what a test changes it must copy.
"""

import dataclasses
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from architectures import build
from exactness import random_agent
from mara_fast import Engine, Generation, MaraAgent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 320
BOS, EOS, PAD = 0, 1, 2

PROMPTS = (
    "Hi",
    "How do I bake bread, and for how long?",
    "Hi",
    "Grüße aus Köln 🎉🎉",
    "",
    "日本語のテキスト",
    " " * 30,
    "Tell me a story. " * 4,
)
OPTIONS: dict[str, Any] = {"max_new_tokens": 12}

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}"
    "{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

_CORPUS = (
    "user: How do I bake bread?\nassistant: Mix flour, water, salt and yeast; wait; bake.\n",
    "user: Wie geht es dir?\nassistant: Gut, danke. Und dir, schöner Tag?\n",
    "system: You are helpful.\nuser: Tell me a story.\nassistant: Once upon a time there was a",
)


@cache
def tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level BPE with BOS added to texts, and a chat template that writes the BOS itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@cache
def model() -> "PreTrainedModel":
    """A two-layer Llama over the tokenizer's vocabulary."""
    return build("llama", seed=11, vocab_size=VOCAB_SIZE)


@cache
def agent() -> MaraAgent:
    """An agent that accepts more often than not."""
    return random_agent(model().config.hidden_size)


@cache
def engine(*, max_batch_size: int = 4, aligned: bool = True, with_text: bool = True) -> Engine:
    """An engine of the three."""
    return Engine(
        model(),
        agent() if aligned else None,
        tokenizer() if with_text else None,
        max_batch_size=max_batch_size,
        prefill_chunk=16,
    )


def save(folder: Path) -> tuple[Path, Path]:
    """Folders of the model with its tokenizer, and of the agent."""
    model().save_pretrained(folder / "lm")
    tokenizer().save_pretrained(folder / "lm")
    agent().save_pretrained(folder / "agent")
    return folder / "lm", folder / "agent"


@cache
def alone(prompt: str, max_new_tokens: int = 12) -> Generation:
    """A prompt decoded by itself."""
    [result] = engine().generate(prompt, max_new_tokens=max_new_tokens)
    return result


def same(one: Generation, other: Generation) -> bool:
    """Equal in all that is promised; floats may differ by rounding, times by everything."""
    floats: dict[str, Any] = {
        "logprob": 0.0,
        "accept_prob": None,
        "policy_logprob": None,
        "reference_logprob": None,
    }
    return [dataclasses.replace(token, **floats) for token in one.tokens] == [
        dataclasses.replace(token, **floats) for token in other.tokens
    ] and (one.text, one.finish_reason, one.prompt_token_ids, one.error) == (
        other.text,
        other.finish_reason,
        other.prompt_token_ids,
        other.error,
    )
