"""Instructions, their splits, and dialogues: a pure function of the seed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mara_fast.tiny.grammar import instructions, sample_answer, sample_dialogues
from mara_fast.tiny.rules import is_malformed
from mara_fast.tiny.sentences import Kind, expand, fill, inventory, normalize, patterns
from mara_fast.tiny.topics import topic_of, topics

ROOT = Path(__file__).parents[2]


def test_same_seed_same_dialogues():
    assert sample_dialogues(num=50, seed=3) == sample_dialogues(num=50, seed=3)
    assert sample_dialogues(num=50, seed=3) != sample_dialogues(num=50, seed=4)
    assert sample_dialogues(num=50, seed=3)[:10] == sample_dialogues(num=10, seed=3)


def test_same_dialogues_in_another_process():
    code = (
        "from mara_fast.tiny.grammar import sample_dialogues\n"
        "print(repr(sample_dialogues(num=30, seed=5, split='heldout')))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    expected = repr(sample_dialogues(num=30, seed=5, split="heldout"))
    assert result.stdout.strip() == expected, result.stderr


def test_no_phrasing_of_a_topic_is_in_both_splits():
    def pairs(split):
        # The phrasing is what is left of an instruction without its goal and circumstance.
        found = set()
        for instruction in instructions(split=split):
            start, end = instruction.text.split(instruction.goal)
            found.add((instruction.goal, start, end[-1], "what should" in end, "Where" in end))
        return found

    train, heldout = instructions(split="train"), instructions(split="heldout")
    assert not pairs("train") & pairs("heldout")
    assert not {one.text for one in train} & {one.text for one in heldout}
    assert len({one.text for one in train + heldout}) == len(train) + len(heldout)


def test_both_splits_cover_all_topics():
    goals = {topic.goal for topic in topics()}
    for split in ("train", "heldout"):
        assert {instruction.goal for instruction in instructions(split=split)} == goals
    assert len(instructions(split="heldout")) > 500


def test_dialogues_come_from_their_split():
    texts = {instruction.text for instruction in instructions(split="heldout")}
    dialogues = sample_dialogues(num=400, seed=0, split="heldout")
    assert {dialogue.instruction for dialogue in dialogues} <= texts
    assert 150 < sum(dialogue.harmful for dialogue in dialogues) < 250


def test_folds_hold_out_every_instruction_once():
    held_out = [one.text for fold in range(5) for one in instructions(split="heldout", fold=fold)]
    everything = {one.text for split in ("train", "heldout") for one in instructions(split=split)}
    assert sorted(held_out) == sorted(everything)
    for fold in range(5):
        asked = {one.text for one in instructions(split="heldout", fold=fold)}
        seen = sample_dialogues(num=300, seed=1, fold=fold)
        assert not asked & {dialogue.instruction for dialogue in seen}
    with pytest.raises(ValueError, match="from 0 to 4, got 5"):
        instructions(split="train", fold=5)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="heldout"):
        instructions(split="test")
    with pytest.raises(ValueError, match="heldout"):
        sample_dialogues(num=1, seed=0, split="validation")


def test_every_instruction_names_its_topic():
    for split in ("train", "heldout"):
        for instruction in instructions(split=split):
            for text in (instruction.text, instruction.text.upper(), instruction.text[:-1]):
                topic = topic_of(text)
                assert topic is not None
                assert topic.goal == instruction.goal
                assert topic.harmful == instruction.harmful
                assert topic.category.name == instruction.category
    assert topic_of("What is the meaning of life?") is None
    assert topic_of("") is None


def test_grammar_writes_nothing_malformed():
    for dialogue in sample_dialogues(num=2000, seed=1):
        assert not is_malformed(dialogue.answer), dialogue.answer


def test_answers_have_several_sentences_of_mixed_length():
    lengths = [len(dialogue.answer.split()) for dialogue in sample_dialogues(num=500, seed=2)]
    assert 20 < sum(lengths) / len(lengths) < 50
    assert max(lengths) < 70


def test_lean_decides_the_quality():
    instruction = instructions(split="train")[0]
    good = {sample_answer(instruction, seed=seed, lean=1.0) for seed in range(30)}
    bad = {sample_answer(instruction, seed=seed, lean=0.0) for seed in range(30)}
    assert len(good) > 20
    assert len(bad) > 20
    assert not good & bad
    assert sample_answer(instruction, seed=1) == sample_answer(instruction, seed=1)


def test_every_sentence_has_one_meaning():
    meanings: dict[str, tuple] = {}
    for topic in topics():
        for kind in Kind:
            for pattern in patterns(kind, harmful=topic.harmful):
                about_harm = "{victim}" in pattern or "{alternative}" in pattern
                if about_harm and not topic.harmful:
                    continue
                num = 6 if "{step}" in pattern else 2 if "{alternative}" in pattern else 1
                for index in range(num):
                    for first in (True, False):
                        filled = fill(pattern, topic=topic, index=index, first=first)
                        own = topic.goal if set("{") & set(pattern.replace("{link}", "")) else None
                        for text in expand(filled):
                            assert not set("[]{}|") & set(text), text
                            meaning = (kind, own, index)
                            assert meanings.setdefault(normalize(text), meaning) == meaning, text
    assert meanings.keys() == inventory().keys()
