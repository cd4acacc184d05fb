"""Prompts of every accepted form to token ids."""

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mara_fast.config import PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMS = (
    "a text, a chat (list of {'role', 'content'} dicts), a list of texts or chats, or a list of "
    "token-id lists"
)


class PromptError(ValueError):
    """What is wrong with one prompt of several.

    Args:
        index: which, from 0.
        problem: goes on from its name.
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"prompt {index}{problem}")
        self.index, self.problem = index, problem


def encode_prompts(
    prompts: Any,
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    prompt_format: PromptFormat,
    vocab_size: int,
) -> list[tuple[Any, list[int]]]:
    """Each prompt with its token ids.

    Raises:
        PromptError: for a form that is not known, an empty prompt, ids outside
            the vocabulary, text without a tokenizer, or a chat its template refuses.
    """
    if isinstance(prompts, str) or is_chat(prompts):
        prompts = [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be {_FORMS}; got {type(prompts).__name__}")
    encoded = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str) or is_chat(prompt):
            ids = _encode(prompt, tokenizer, prompt_format, index)
        elif is_token_ids(prompt):
            ids = list(map(operator.index, prompt))
        else:
            raise PromptError(index, f" is {_shown(prompt)}; prompts must be {_FORMS}")
        if not ids:
            raise PromptError(index, " is empty: it has no tokens; at least one is needed")
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise PromptError(
                index, f" has token id {outside[0]}; the vocabulary is 0 to {vocab_size - 1}"
            )
        encoded.append((prompt, ids))
    return encoded


def is_chat(prompt: Any) -> bool:
    """A list of messages."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str | bytes)
        and len(prompt) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in prompt)
    )


def is_token_ids(prompt: Any) -> bool:
    """A list of integers, in range or not."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str | bytes | bytearray)
        and all(_is_int(token) for token in prompt)
    )


def _encode(
    prompt: Any,
    tokenizer: "PreTrainedTokenizerBase | None",
    prompt_format: PromptFormat,
    index: int,
) -> list[int]:
    if tokenizer is None:
        raise PromptError(
            index, " is text, but there is no tokenizer: pass one, or give token-id lists"
        )
    has_template = bool(getattr(tokenizer, "chat_template", None))
    is_text = isinstance(prompt, str)
    if prompt_format == "auto":
        prompt_format = "chat" if has_template or not is_text else "raw"
    if prompt_format == "raw":
        if not is_text:
            raise PromptError(index, ' is a chat; prompt_format="raw" takes texts only')
        text = prompt
    elif has_template:
        chat = [{"role": "user", "content": prompt}] if is_text else list(prompt)
        text = _templated(chat, tokenizer, index)
    else:
        raise ValueError(
            f'prompt_format="{prompt_format}" needs a chat template, and this tokenizer has none: '
            'give texts with prompt_format="raw", or set tokenizer.chat_template'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(index, f" holds half a surrogate pair: {error}") from error
    # The template writes the special tokens itself; the authors' code has them added once more.
    return list(tokenizer(text, add_special_tokens=prompt_format != "chat")["input_ids"])


def _templated(chat: list[Any], tokenizer: "PreTrainedTokenizerBase", index: int) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # What a template does about a role or content that it does not expect.
    except (TemplateError, TypeError) as error:
        raise PromptError(index, f": the chat template refuses it: {error}") from error
    return str(text)


def _is_int(value: Any) -> bool:
    """numpy's and torch's integers too."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _shown(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 60 else text[:57] + "..."
