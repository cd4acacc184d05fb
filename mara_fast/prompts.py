"""Prompts of every accepted form to token ids."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mara_fast.config import PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMS = (
    "a text, a chat (list of {'role', 'content'} dicts), a list of texts or chats, or a list of "
    "token-id lists"
)


def encode_prompts(
    prompts: Any,
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    prompt_format: PromptFormat,
    vocab_size: int,
) -> list[tuple[Any, list[int]]]:
    """Each prompt with its token ids.

    Raises:
        ValueError: naming the prompt, for a form that is not known, an empty prompt, ids outside
            the vocabulary, or text without a tokenizer.
    """
    if isinstance(prompts, str) or _is_chat(prompts):
        prompts = [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be {_FORMS}; got {type(prompts).__name__}")
    encoded = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str) or _is_chat(prompt):
            ids = _encode(prompt, tokenizer, prompt_format, index)
        elif isinstance(prompt, Sequence) and all(_is_token_id(token) for token in prompt):
            ids = [int(token) for token in prompt]
        else:
            raise ValueError(f"prompt {index} is {_shown(prompt)}; prompts must be {_FORMS}")
        if not ids:
            raise ValueError(f"prompt {index} is empty: it has no tokens; at least one is needed")
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"prompt {index} has token id {outside[0]}; the vocabulary is 0 to {vocab_size - 1}"
            )
        encoded.append((prompt, ids))
    return encoded


def _encode(
    prompt: Any,
    tokenizer: "PreTrainedTokenizerBase | None",
    prompt_format: PromptFormat,
    index: int,
) -> list[int]:
    if tokenizer is None:
        raise ValueError(
            f"prompt {index} is text, but there is no tokenizer: pass one, or give token-id lists"
        )
    has_template = bool(getattr(tokenizer, "chat_template", None))
    is_text = isinstance(prompt, str)
    if prompt_format == "auto":
        prompt_format = "chat" if has_template or not is_text else "raw"
    if prompt_format == "raw":
        if not is_text:
            raise ValueError(f'prompt {index} is a chat; prompt_format="raw" takes texts only')
        return list(tokenizer(prompt)["input_ids"])
    if not has_template:
        raise ValueError(
            f'prompt_format="{prompt_format}" needs a chat template, and this tokenizer has none: '
            'give texts with prompt_format="raw", or set tokenizer.chat_template'
        )
    chat = [{"role": "user", "content": prompt}] if is_text else list(prompt)
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself; the authors' code has them added once more.
    return list(tokenizer(text, add_special_tokens=prompt_format == "official")["input_ids"])


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in prompt)
    )


def _is_token_id(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _shown(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 60 else text[:57] + "..."
