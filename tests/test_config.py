"""Decoding options: what is taken, what is refused, and what survives a round trip."""

import copy
import dataclasses
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from mara_fast import DecodingConfig
from mara_kernels.cascade import CascadeRule

HUGE = 10**400
NAN, INFINITY = float("nan"), float("inf")

REFUSED: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (-1, 5.0, "5", True, None, [5], NAN, torch.tensor(5), np.array([5])),
    "min_new_tokens": (-1, 0.5, False, None, 257),
    "top_k": (-1, 1.5, "40", True, None),
    "top_p": (-0.1, 1.1, NAN, INFINITY, HUGE, "0.9", True, None, [0.9]),
    "temperature": (0, 0.0, -1, 1e-7, 1e-320, 1e7, NAN, INFINITY, HUGE, "1", False, None),
    "acceptance": ("Greedy", "", None, 1, ["greedy"], np.array(["greedy", "sample"])),
    "threshold": (0, 1, -0.5, 1.5, NAN, HUGE, True, None, "0.5"),
    "strategy": ("last", None, 0),
    "fallback": ("random", None, b"last"),
    "order": ("ascending", None, ()),
    "window": (0, -1, 2.0, "4", "Auto", None, True),
    "seed": (-1, 2**64, 1.0, "0", True, None),
    "eos_token_id": (-1, 2**63, 1.0, "2", "", True, [1, -1], [1, "a"], [True], [[1]], {1: 2}),
    "stop_strings": ("", ["a", ""], [b"a"], b"a", 5, [5], None, [None], {"a": 1}),
    "ignore_eos": (1, 0, "yes", None, np.True_),
    "prompt_format": ("Chat", None, True),
    "trace": (1, "true", None),
    "agent_weights": (
        (),
        0,
        (0.0, 0.0),
        (1, -1),
        (1, NAN),
        (1, INFINITY),
        (HUGE, 1),
        True,
        (1, True),
        "1",
        ["1", "2"],
        {1: 2},
        [[1]],
    ),
    "agent_combination": ("mean", "Logit", None, 1),
    "max_fallback_rate": (-0.1, 1.1, NAN, INFINITY, "0.2", True, [0.2]),
    "max_repetition": (-0.1, 1.1, NAN, INFINITY, "0.2", False, [0.2]),
    "kl_budget": (-0.1, NAN, INFINITY, "1", True, [1]),
}

TAKEN: dict[str, tuple[tuple[Any, Any], ...]] = {
    "max_new_tokens": ((0, 0), (10**9, 10**9), (np.int64(7), 7), (np.uint8(7), 7)),
    "min_new_tokens": ((256, 256),),
    "top_k": ((0, 0), (HUGE, HUGE), (np.int32(3), 3)),
    "top_p": ((0, 0.0), (1, 1.0), (np.float32(0.5), 0.5), (np.float64(0.9), 0.9)),
    "temperature": ((1e-6, 1e-6), (2, 2.0), (np.float16(0.5), 0.5)),
    "threshold": ((1e-9, 1e-9), (np.float64(0.9), 0.9)),
    "window": (("auto", "auto"), (1, 1), (np.int64(40), 40)),
    "seed": ((0, 0), (2**64 - 1, 2**64 - 1), (np.uint64(2**64 - 1), 2**64 - 1)),
    "eos_token_id": (
        (None, None),
        (3, (3,)),
        (np.int64(3), (3,)),
        ([3, 4], (3, 4)),
        ((), ()),
        (np.array([3, 4]), (3, 4)),
        ({5: 0}.keys(), (5,)),
    ),
    "stop_strings": (
        ("ab", ("ab",)),
        (["a", "b"], ("a", "b")),
        ((), ()),
        ("é🎉", ("é🎉",)),
        ((text for text in ("a", "b")), ("a", "b")),
    ),
    "agent_weights": (
        (None, None),
        (2, (2.0,)),
        ([1, 0], (1.0, 0.0)),
        (np.array([0.5, 2.0]), (0.5, 2.0)),
        ((1e-300, 1e300), (1e-300, 1e300)),
    ),
    "max_fallback_rate": ((None, None), (0, 0.0), (1, 1.0), (np.float64(0.5), 0.5)),
    "max_repetition": ((None, None), (0.25, 0.25)),
    "kl_budget": ((None, None), (0, 0.0), (5, 5.0), (1e9, 1e9)),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in REFUSED.items() for value in values],
    ids=lambda value: str(value)[:20],
)
def test_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}.*(allowed|exceeds)") as caught:
        DecodingConfig(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [(name, value, kept) for name, pairs in TAKEN.items() for value, kept in pairs],
    ids=lambda value: str(value)[:20],
)
def test_taken_as_plain_values(name: str, value: Any, kept: Any) -> None:
    config = DecodingConfig(**{name: value})
    got = getattr(config, name)
    assert got == kept
    assert type(got) is type(kept) or isinstance(kept, float)
    # int() refuses to print what it takes ages to print.
    if kept is not HUGE:
        assert DecodingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_option_is_attacked() -> None:
    assert REFUSED.keys() == {field.name for field in dataclasses.fields(DecodingConfig)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 4}, r"unknown option 'topk'; did you mean 'top_k'\? Allowed: max_new_tokens"),
        ({"max_tokens": 4}, "did you mean 'max_new_tokens'"),
        ({"zzz": 4}, r"unknown option 'zzz'\. Allowed"),
        ({5: 4}, r"unknown option 5\."),
        (None, "must be a mapping"),
        ([("top_k", 4)], "must be a mapping"),
        ("top_k=4", "must be a mapping"),
    ],
)
def test_unknown_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodingConfig.from_dict(options)


def test_replace_checks_again() -> None:
    config = DecodingConfig(max_new_tokens=8, min_new_tokens=4)
    assert config.replace(top_k=3) == DecodingConfig(max_new_tokens=8, min_new_tokens=4, top_k=3)
    assert config.replace() == config
    with pytest.raises(ValueError, match="did you mean 'seed'"):
        config.replace(seeds=1)
    with pytest.raises(ValueError, match="min_new_tokens=4 exceeds max_new_tokens=3"):
        config.replace(max_new_tokens=3)


def test_a_budget_that_cannot_be_measured_is_refused() -> None:
    for strategy in ("max_prob", "random"):
        with pytest.raises(ValueError, match=f"kl_budget=1 cannot be .*'{strategy}'; allowed"):
            DecodingConfig(kl_budget=1, strategy=strategy)  # type: ignore[arg-type]


def test_what_no_token_depends_on() -> None:
    config = DecodingConfig(
        window=3, max_fallback_rate=0.5, max_repetition=0.1, kl_budget=2, seed=4, agent_weights=(1,)
    )
    limits = {"max_fallback_rate": None, "max_repetition": None, "kl_budget": None}
    assert config.without_limits() == config.replace(**limits) != config
    assert config.token_options().keys() == config.to_dict().keys() - {"window", *limits}
    assert config.token_options()["agent_weights"] == [1.0]


def test_presets() -> None:
    assert DecodingConfig() == DecodingConfig.paper(prompt_format="auto")
    paper, official = DecodingConfig.paper(), DecodingConfig.official()
    assert (paper.fallback, paper.prompt_format) == ("last", "chat")
    assert (official.fallback, official.prompt_format) == ("first", "official")
    assert (paper.top_k, paper.top_p, paper.threshold) == (40, 0.95, 0.5)
    assert DecodingConfig.official(fallback="last", top_k=5).fallback == "last"
    for preset in (DecodingConfig.paper, DecodingConfig.official):
        with pytest.raises(ValueError, match="did you mean 'top_k'"):
            preset(topk=5)


def test_record_is_frozen_hashable_and_copied_whole() -> None:
    config = DecodingConfig(eos_token_id=[1, 2], stop_strings=["x"], window=3, seed=2**64 - 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        DecodingConfig(40)  # type: ignore[misc]
    for same in (
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        DecodingConfig.from_dict(config.to_dict()),
    ):
        assert same == config
        assert hash(same) == hash(config)


def test_one_value_and_a_list_of_it_are_the_same() -> None:
    assert DecodingConfig(eos_token_id=3) == DecodingConfig(eos_token_id=[3])
    assert DecodingConfig(stop_strings="x") == DecodingConfig(stop_strings=["x"])


def test_cascade_rule_carries_every_option_it_has() -> None:
    config = DecodingConfig(
        acceptance="sample",
        threshold=0.25,
        strategy="random",
        fallback="max_prob",
        order="top_last",
        seed=7,
    )
    for field in dataclasses.fields(CascadeRule):
        assert getattr(config.cascade_rule, field.name) == getattr(config, field.name)
