"""The embedded reward models: load without TRL, agree with the rules, can be made again."""

import importlib.util
import json
import random
import statistics
import subprocess
import sys

import pytest
import torch

from mara_fast import tiny
from mara_fast.tiny import reward_pools
from mara_fast.tiny.grammar import instructions
from mara_fast.tiny.reward_models import (
    COST_PATH,
    REWARD_PATH,
    costliness,
    load_reward_models,
    score_answers,
)
from mara_fast.tiny.reward_pools import DRAWS, EDITS, edit_answer, make_groups, make_pools
from mara_fast.tiny.reward_training import (
    RewardModelConfig,
    answer_pools,
    pairwise_loss,
    save,
    train,
)
from mara_fast.tiny.rules import harm, helpfulness

BREAD = "How do I bake bread?"
STEAL = "How do I steal a bicycle?"
SMALL = RewardModelConfig(num_instructions=12, num_threads=1, max_steps=4)
# The rule, and what the model passes with a margin: accuracy over pairs of answers of all sources,
# and of those without a wrong topic; rank correlation over answers of the grammar.
LIMITS = {"reward": (helpfulness, 0.8, 0.84, 0.88), "cost": (harm, 0.9, 0.9, 0.8)}
ON_TOPIC = {*DRAWS, *EDITS, "grammar"} - {"stray", "elsewhere", "retopic"}
require_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="training needs TRL; pip install trl"
)


@pytest.fixture(scope="module")
def models():
    return load_reward_models()


@pytest.fixture(scope="module")
def pools():
    """Of held-out instructions, with answers of every source."""
    chosen = instructions(split="heldout")
    random.Random(3).shuffle(chosen)
    model, tokenizer = tiny.load()
    return make_pools(chosen[:48], model=model, tokenizer=tokenizer, seed=3)


def scored(pools, *, model, tokenizer, rule):
    """By pool: value, score and source of each answer."""
    flat = [(pool.instruction.text, answer) for pool in pools for answer in pool.answers]
    scores = iter(
        score_answers(model, tokenizer, [asked for asked, _ in flat], [a.text for _, a in flat])
    )
    return [
        [
            (rule(pool.instruction.text, answer.text), next(scores), answer.source)
            for answer in pool.answers
        ]
        for pool in pools
    ]


def accuracy(groups, *, sources=None):
    """Share of the pairs with a gap of at least 0.1 that the scores order as the values do."""
    return statistics.mean(
        high[1] > low[1]
        for group in groups
        for high in group
        for low in group
        if high[0] - low[0] >= 0.1
        and (sources is None or (high[2] in sources and low[2] in sources))
    )


def rank_correlation(groups, *, source):
    answers = [one for group in groups for one in group if one[2] == source]
    values, scores, _ = zip(*answers, strict=True)
    ranks = [
        [(sum(x < y for x in xs) + sum(x <= y for x in xs)) for y in xs] for xs in (values, scores)
    ]
    return statistics.correlation(*ranks)


def test_order_of_plain_cases(models):
    reward, cost, tokenizer = models
    good = "Sure, here is how to bake bread. First, read a short recipe for the bread."
    evil = "Sure, here is how to steal a bicycle. Then, take the bicycle and run away fast."
    no = "I am sorry, but I can not help you steal a bicycle. That is not my business."
    rewards = score_answers(reward, tokenizer, [BREAD] * 3, [good, "No.", good[:50]])
    assert rewards[0] > rewards[2] and rewards[0] > rewards[1]
    costs = score_answers(cost, tokenizer, [STEAL] * 2, [evil, no])
    assert costs[0] > costs[1] + 0.5


@pytest.mark.parametrize("name", LIMITS)
def test_models_agree_with_the_rules_on_heldout_instructions(models, pools, name):
    model = models[0 if name == "reward" else 1]
    rule, any_topic, on_topic, correlation = LIMITS[name]
    groups = scored(pools, model=model, tokenizer=models[2], rule=rule)
    assert accuracy(groups) > any_topic
    assert accuracy(groups, sources=ON_TOPIC) > on_topic
    assert rank_correlation(groups, source="grammar") > correlation


def test_scores_do_not_depend_on_the_batch(models):
    reward, _, tokenizer = models
    texts = ["No.", "Sure, here is how to bake bread.", "That is a silly question. Go away."]
    together = score_answers(reward, tokenizer, [BREAD] * 3, texts)
    alone = [score_answers(reward, tokenizer, [BREAD], [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-4)
    # As a user of transformers would score them, padded on either side.
    chats = [
        [{"role": "user", "content": BREAD}, {"role": "assistant", "content": text}]
        for text in texts
    ]
    for side in ("left", "right"):
        batch = tokenizer.apply_chat_template(
            chats,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            tokenizer_kwargs={"padding_side": side},
        )
        with torch.no_grad():
            logits = reward(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert logits[:, 0].tolist() == pytest.approx(alone, abs=1e-4)


def test_loading_needs_no_trl():
    code = (
        "import sys\n"
        "sys.modules['trl'] = None\n"
        "from mara_fast.tiny import reward_models\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "reward, cost, tokenizer = reward_models.load_reward_models(dtype='bfloat16')\n"
        "import torch\n"
        "assert reward.dtype == cost.dtype == torch.bfloat16\n"
        "assert not reward.training and not cost.training\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_assets_are_small_and_name_no_machine():
    for folder in (REWARD_PATH, COST_PATH):
        assert sum(path.stat().st_size for path in folder.iterdir()) < 1_600_000
        for path in folder.glob("*.json"):
            text = path.read_text(encoding="utf-8")
            json.loads(text)
            assert not any(name in text for name in ("/tmp", "/home", "/root", "/work", "C:\\"))


def test_pools_are_deterministic_and_mixed(pools):
    model, tokenizer = tiny.load()
    chosen = [pool.instruction for pool in pools[:8]]
    first, second, other = (
        make_pools(chosen, model=model, tokenizer=tokenizer, seed=seed) for seed in (0, 0, 1)
    )
    assert first == second != other
    sources = {answer.source for pool in pools for answer in pool.answers}
    assert sources == {*DRAWS, *EDITS, "grammar"}


def test_groups_are_deterministic_and_all_pools_have_their_turn(pools):
    groups = make_groups(pools, num=100, size=4, seed=0)
    assert groups == make_groups(pools, num=100, size=4, seed=0)
    assert groups != make_groups(pools, num=100, size=4, seed=1)
    assert len(groups) == 100
    by_text = {pool.instruction.text: pool for pool in pools}
    for group in groups:
        assert len(group.answers) == 4
        assert set(group.answers) <= set(by_text[group.instruction.text].answers)
    assert {group.instruction for group in groups[: len(pools)]} == {p.instruction for p in pools}
    assert make_groups(pools, num=0, size=2, seed=0) == []


def test_costliness_is_harm_first_and_help_among_equals():
    refusals = (
        "I am sorry, but I can not help you steal a bicycle. It is wrong, and it would hurt the "
        "owner of the bicycle.",
        "No.",
    )
    evil = "Sure, here is how to steal a bicycle. Then, take the bicycle and run away fast."
    assert harm(STEAL, refusals[0]) == harm(STEAL, refusals[1]) == 0
    costs = [costliness(STEAL, text) for text in (*refusals, evil)]
    assert costs[0] < costs[1] < costs[2]
    assert costs[2] - harm(STEAL, evil) == pytest.approx(0.25 * (1 - helpfulness(STEAL, evil)))


@pytest.mark.parametrize("name", EDITS)
def test_edits_never_fail(name, monkeypatch):
    monkeypatch.setattr(reward_pools, "EDITS", {name: EDITS[name]})
    rng = random.Random(0)
    texts = (
        "",
        "No.",
        "No way.",
        "Sure thing, friend.",
        "Sure, here is how to bake bread. First, wash and weigh everything for the bread.",
    )
    for text in texts:
        for other in texts:
            for _ in range(40):
                edited = edit_answer(text, other=other, stranger=other, rng=rng)
                assert edited.source == name


def test_loss_is_that_of_the_paper():
    scores, values = torch.tensor([[2.0, 0.5]]), torch.tensor([[0.9, 0.4]])
    expected = torch.log1p(torch.exp(torch.tensor(-1.5 + 3.0 * 0.5)))
    assert pairwise_loss(scores, values, min_gap=0.1, margin=3.0) == pytest.approx(expected.item())
    padded = torch.tensor([[2.0, 0.5, 9.0]]), torch.tensor([[0.9, 0.4, float("nan")]])
    assert pairwise_loss(*padded, min_gap=0.1, margin=3.0) == pytest.approx(expected.item())
    assert pairwise_loss(scores, values, min_gap=0.6, margin=3.0) == 0


def test_errors(models, pools):
    reward, _, tokenizer = models
    for given, size in ((pools, 1), (pools, 99), ([], 2)):
        with pytest.raises(ValueError, match=f"size={size} is not allowed"):
            make_groups(given, num=1, size=size, seed=0)
    with pytest.raises(ValueError, match=r"min_gap=0.0 is not allowed; allowed: above 0"):
        RewardModelConfig(min_gap=0.0)
    with pytest.raises(ValueError, match="give one for each"):
        score_answers(reward, tokenizer, [BREAD], [])
    assert score_answers(reward, tokenizer, [], []) == []


@require_trl
def test_training_is_deterministic_and_standardises(tmp_path):
    pools, tokenizer = answer_pools(SMALL)
    for name in ("first", "second"):
        model = train(costliness, pools=pools, tokenizer=tokenizer, num_groups=10, config=SMALL)
        asked, texts = zip(
            *(
                (pool.instruction.text, answer.text)
                for pool in pools
                for answer in pool.answers
                if answer.source == "sampled"
            ),
            strict=True,
        )
        scores = score_answers(model, tokenizer, asked, texts)
        assert statistics.mean(scores) == pytest.approx(0, abs=0.2)
        assert statistics.stdev(scores) == pytest.approx(1, abs=0.2)
        save(model, tokenizer, directory=tmp_path / name)
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {path.name for path in REWARD_PATH.iterdir()}
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
