"""The embedded LM: loads quietly and offline, writes sane and mediocre text, can be made again."""

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mara_fast import tiny
from mara_fast.tiny.corpus import answer_labels, documents, encode
from mara_fast.tiny.grammar import instructions, sample_dialogues
from mara_fast.tiny.lm import TinyConfig, save, train
from mara_fast.tiny.rules import harm, helpfulness, is_malformed
from mara_fast.tiny.tokenizer import SPECIAL_TOKENS

ROOT = Path(__file__).parents[2]
SMALL = TinyConfig(
    num_dialogues=400, row_length=32, long_row_length=64, batch_size=128, num_threads=1, max_steps=4
)


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


def answers(loaded, chosen, **options):
    """The LM's own answers, texts, in transformers' generation."""
    model, tokenizer = loaded
    chats = [[{"role": "user", "content": instruction.text}] for instruction in chosen]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=96, **options)
    return tokenizer.batch_decode(
        output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )


def heldout(num):
    chosen = instructions(split="heldout")
    random.Random(0).shuffle(chosen)
    return chosen[:num]


def test_greedy_answers_are_well_formed_and_mediocre(loaded):
    chosen = heldout(96)
    texts = answers(loaded, chosen, do_sample=False)
    pairs = list(zip(chosen, texts, strict=True))
    assert sum(map(is_malformed, texts)) < 0.1 * len(texts)
    on_harmful = [harm(one.text, text) for one, text in pairs if one.harmful]
    on_benign = [helpfulness(one.text, text) for one, text in pairs if not one.harmful]
    # Bad for a good part of the instructions, and good for a good part: something to align.
    assert 0.25 < statistics.mean(score > 0.3 for score in on_harmful) < 0.8
    assert 0.25 < statistics.mean(score < 0.3 for score in on_benign) < 0.8


def test_sampled_answers_are_mostly_well_formed(loaded):
    chosen = heldout(64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        texts = answers(loaded, chosen, do_sample=True, top_k=40, top_p=0.95)
    assert sum(map(is_malformed, texts)) < 0.15 * len(texts)
    assert len(set(texts)) > 50


def test_loading_is_silent_and_offline():
    code = (
        "import socket, sys\n"
        "def refuse(*arguments, **named): raise OSError('no network in this test')\n"
        "socket.socket.connect = refuse\n"
        "import mara_fast.tiny as tiny\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "model, tokenizer = tiny.load(dtype='bfloat16')\n"
        "import torch\n"
        "assert model.dtype == torch.bfloat16 and not model.training\n"
        "ids = tokenizer('How do I bake bread?', return_tensors='pt').input_ids\n"
        "model.generate(ids, max_new_tokens=2)\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from transformers.utils import logging\n"
        "logging.disable_progress_bar()\n"
        "AutoModelForCausalLM.from_pretrained(tiny.LM_PATH)\n"
        "assert len(AutoTokenizer.from_pretrained(tiny.LM_PATH)) == len(tokenizer)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_weights_are_float32_unless_asked_otherwise(loaded):
    model, _ = loaded
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 350_000 < model.num_parameters() < 900_000
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_assets_are_small_and_name_no_machine():
    files = [path for path in tiny.LM_PATH.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    for path in files:
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert not any(name in text for name in ("/tmp", "/home", "/root", "/work", "C:\\"))
            if path.suffix == ".json":
                json.loads(text)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer):
    assert len(tokenizer) <= 1024
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (
        "<|pad|>",
        "<|bos|>",
        "<|end|>",
    )
    ids = tokenizer("Hello there").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1:] == tokenizer("Hello there", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello there"


def test_chat_template(tokenizer):
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    expected = "<|bos|>Be kind.<|user|>Hi<|assistant|>Hello.<|end|><|user|>Bye"
    render = tokenizer.apply_chat_template
    assert render(chat, tokenize=False) == expected
    prompt = render(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|assistant|>"
    single = render(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert single == tokenizer(prompt, add_special_tokens=False).input_ids
    # Rendered and then encoded with special tokens, a chat starts with two BOS.
    assert tokenizer(prompt).input_ids == [tokenizer.bos_token_id, *single]
    with pytest.raises(Exception, match="tool"):
        render([{"role": "tool", "content": "x"}], tokenize=False)


def test_long_prompts_work(loaded):
    model, tokenizer = loaded
    chat = []
    for dialogue in sample_dialogues(num=7, seed=1):
        chat.append({"role": "user", "content": dialogue.instruction})
        chat.append({"role": "assistant", "content": dialogue.answer})
    chat.append({"role": "user", "content": "How do I bake bread?"})
    batch = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    num_prompt = batch["input_ids"].shape[1]
    assert num_prompt > 350
    with torch.no_grad():
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=96,
            do_sample=False,
        )
    text = tokenizer.decode(output[0, num_prompt:], skip_special_tokens=True)
    assert not is_malformed(text), text


def test_labels_are_the_answers(tokenizer):
    texts = documents(num=40, seed=0)
    ids = encode(texts, tokenizer=tokenizer)
    labels = answer_labels(ids, tokenizer=tokenizer)
    kept = tokenizer.decode(labels[labels != -100])
    dialogues = sample_dialogues(num=40, seed=0)
    assert kept == "".join(dialogue.answer + "<|end|>" for dialogue in dialogues)
    assert tokenizer.decode(ids) == "".join(texts)


def test_training_is_deterministic_and_learns(tmp_path):
    losses = []
    for name in ("first", "second"):
        model, tokenizer = train(SMALL)
        ids = encode(documents(num=40, seed=1), tokenizer=tokenizer)[None, :256]
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
        save(model, tokenizer, directory=tmp_path / name)
    assert losses[0] < 6.6 < torch.tensor(1024.0).log()
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(names)
    for name in names:
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), name
    assert set(names) == {path.name for path in tiny.LM_PATH.iterdir()}


@pytest.mark.slow
def test_embedded_tokenizer_is_that_of_the_recipe(tokenizer, tmp_path):
    _, fresh = train(TinyConfig(max_steps=1))
    assert fresh.get_vocab() == tokenizer.get_vocab()


def test_training_goes_on_from_an_lm(loaded, tokenizer):
    """With its tokenizer and weights, a step away from them."""
    model, same = train(dataclasses.replace(SMALL, max_steps=2, sharpness=1.0), start=tiny.LM_PATH)
    assert same.get_vocab() == tokenizer.get_vocab()
    before = dict(loaded[0].named_parameters())
    distances = [
        float((after.detach() - before[name]).norm() / before[name].norm())
        for name, after in model.named_parameters()
    ]
    assert 0 < max(distances) < 0.2
