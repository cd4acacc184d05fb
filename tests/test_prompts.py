"""Prompts to token ids: every form that is taken, and every one that is not."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import speaker
from mara_fast.prompts import encode_prompts
from naming import stable_id
from speaker import BOS, VOCAB_SIZE

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
TEMPLATED = "<s>system: Be kind.\nuser: Hi\nassistant: "


def encode(prompts: Any, *, tokenizer: Any = "own", prompt_format: Any = "auto") -> list[list[int]]:
    if tokenizer == "own":
        tokenizer = speaker.tokenizer()
    encoded = encode_prompts(
        prompts, tokenizer=tokenizer, prompt_format=prompt_format, vocab_size=VOCAB_SIZE
    )
    return [ids for _, ids in encoded]


def ids_of(text: str) -> list[int]:
    """Ids of a text that writes its special tokens itself."""
    return speaker.tokenizer()(text, add_special_tokens=False)["input_ids"]


def without_template() -> Any:
    tokenizer = copy.deepcopy(speaker.tokenizer())
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize(
    ("prompt_format", "text"),
    [
        ("auto", "<s>user: Hi\nassistant: "),
        ("chat", "<s>user: Hi\nassistant: "),
        ("raw", "<s>Hi"),
        ("official", "<s><s>user: Hi\nassistant: "),
    ],
)
def test_formats_of_a_text(prompt_format: str, text: str) -> None:
    [ids] = encode("Hi", prompt_format=prompt_format)
    assert ids == ids_of(text)
    assert ids.count(BOS) == (2 if prompt_format == "official" else 1)


def test_formats_of_a_chat() -> None:
    assert encode(CHAT) == encode(CHAT, prompt_format="chat") == [ids_of(TEMPLATED)]
    assert encode(CHAT, prompt_format="official") == [[BOS, *ids_of(TEMPLATED)]]
    with pytest.raises(ValueError, match='prompt 0 is a chat; prompt_format="raw" takes texts'):
        encode(CHAT, prompt_format="raw")


def test_the_double_bos_is_what_the_authors_code_does() -> None:
    """It writes the template to text, and gives the text to the tokenizer as any other."""
    tokenizer = speaker.tokenizer()
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert encode(CHAT, prompt_format="official") == [tokenizer(text)["input_ids"]]
    assert encode(CHAT) == [
        tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    ]


def test_without_a_template() -> None:
    assert encode("Hi", tokenizer=without_template()) == [ids_of("<s>Hi")]
    for prompt, prompt_format in (("Hi", "chat"), ("Hi", "official"), (CHAT, "auto")):
        with pytest.raises(ValueError, match="needs a chat template, and this tokenizer has"):
            encode(prompt, tokenizer=without_template(), prompt_format=prompt_format)


def test_without_a_tokenizer() -> None:
    assert encode([[3, 4], (5,)], tokenizer=None) == [[3, 4], [5]]
    for prompts in ("Hi", CHAT, [[3], "Hi"]):
        with pytest.raises(ValueError, match="is text, but there is no tokenizer: pass one, or"):
            encode(prompts, tokenizer=None)


def test_one_or_many() -> None:
    ids = ids_of("<s>user: Hi\nassistant: ")
    chat = [{"role": "user", "content": "Hi"}]
    for one in ("Hi", ["Hi"], ("Hi",), chat, tuple(chat), [chat]):
        assert encode(one) == [ids]
    assert encode(["Hi", chat, ids]) == [ids, ids, ids]


def test_prompts_are_returned_as_given() -> None:
    prompts = ["Hi", CHAT, [3, 4]]
    encoded = encode_prompts(
        prompts, tokenizer=speaker.tokenizer(), prompt_format="auto", vocab_size=VOCAB_SIZE
    )
    assert [prompt for prompt, _ in encoded] == prompts
    assert encoded[1][0] is CHAT


@pytest.mark.parametrize("prompts", [[], ()])
def test_no_prompts(prompts: Any) -> None:
    assert encode(prompts) == []


@pytest.mark.parametrize(
    "ids",
    [
        [3, 4],
        (3, 4),
        range(3, 5),
        [np.int64(3), np.uint8(4)],
        list(np.array([3, 4])),
        list(torch.tensor([3, 4])),
    ],
)
def test_token_ids_of_any_integer_kind(ids: Any) -> None:
    [got] = encode([ids])
    assert got == [3, 4] and all(type(token) is int for token in got)


@pytest.mark.parametrize("text", ["\x00", "é", "🎉" * 50, "\u202e", "a\r\n\tb", "</s>", " "])
def test_any_unicode(text: str) -> None:
    for prompt_format in ("raw", "chat", "official"):
        [ids] = encode(text, prompt_format=prompt_format)
        decoded = speaker.tokenizer().decode(ids)
        assert text in decoded


@pytest.mark.parametrize(
    "prompts",
    [
        5,
        None,
        True,
        {"role": "user", "content": "Hi"},
        {"Hi"},
        (text for text in ["Hi"]),
        np.array([[3, 4]]),
        torch.tensor([[3, 4]]),
        object(),
    ],
    ids=stable_id,
)
def test_not_a_list(prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"^prompts must be a text, a chat .*; got \w+$"):
        encode(prompts)


def test_a_tokenizers_output_is_not_a_list() -> None:
    with pytest.raises(ValueError, match="got BatchEncoding"):
        encode(speaker.tokenizer()(["Hi"]))


@pytest.mark.parametrize(
    ("prompts", "index"),
    [
        ([None], 0),
        (["Hi", 5], 1),
        ([3, 4], 0),
        (b"Hi", 0),
        ([b"Hi"], 0),
        ([bytearray(b"Hi")], 0),
        ([[True, False]], 0),
        ([[3, True]], 0),
        ([[3.0]], 0),
        ([["Hi", "Ho"]], 0),
        ([[3, "Hi"]], 0),
        ([[3, None]], 0),
        ([[[3]]], 0),
        ([np.array([3, 4])], 0),
        ([torch.tensor([3, 4])], 0),
        ([[torch.tensor(3.7)]], 0),
        ([[np.float64(3)]], 0),
        ([{"role": "user"}], 0),
        ([{"content": "Hi"}], 0),
        ([{"role": "user", "content": "Hi"}, {"role": "user"}], 0),
        ([[{"role": "user", "content": "Hi"}], [{"text": "Hi"}]], 1),
        ([CHAT, {"role": "user", "content": "Hi"}], 1),
        (["Hi", [{"role": "user", "content": "Hi"}, "Ho"]], 1),
    ],
    ids=stable_id,
)
def test_not_a_prompt(prompts: Any, index: int) -> None:
    with pytest.raises(ValueError, match=rf"^prompt {index} is .*; prompts must be a text, a chat"):
        encode(prompts)


def test_a_long_prompt_is_not_printed_whole() -> None:
    with pytest.raises(ValueError) as caught:
        encode([[3, "x" * 10_000]])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[3], []], "prompt 1 is empty: it has no tokens"),
        ([[3, -1]], "prompt 0 has token id -1; the vocabulary is 0 to 319"),
        ([[VOCAB_SIZE]], "prompt 0 has token id 320"),
        ([[3], [10**30]], "prompt 1 has token id 1000000000000"),
        ("\ud800", "prompt 0 holds half a surrogate pair"),
        (["Hi", [{"role": "user", "content": "\udcff"}]], "prompt 1 holds half a surrogate pair"),
        ([{"role": "nobody", "content": "Hi"}], "chat template refuses it: unknown role nobody"),
        ([{"role": "user", "content": None}], "prompt 0: the chat template refuses it"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "prompt 0: the chat template refuses"),
        (["Hi", [{"role": 5, "content": "Hi"}]], "prompt 1: the chat template refuses it"),
    ],
    ids=stable_id,
)
def test_prompts_refused(prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(prompts)


def test_an_empty_text_is_empty_only_without_special_tokens() -> None:
    assert encode("", prompt_format="raw") == [[BOS]]
    tokenizer = copy.deepcopy(speaker.tokenizer())
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        encode("", tokenizer=tokenizer, prompt_format="raw")


def test_a_vocabulary_smaller_than_the_tokenizers() -> None:
    with pytest.raises(ValueError, match=r"prompt 0 has token id \d+; the vocabulary is 0 to 9"):
        encode_prompts("Hi", tokenizer=speaker.tokenizer(), prompt_format="raw", vocab_size=10)
