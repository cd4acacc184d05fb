"""Options of a run: presets, sections given in part, plain values there and back, mistakes."""

import dataclasses
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mara_fast import DecodingConfig
from mara_fast.options import from_yaml
from mara_train import MaraConfig, ReplayConfig, SacConfig, TokenRewardConfig
from mara_train.config import SECTIONS


def test_the_authors_recipe() -> None:
    config = MaraConfig.official()
    assert config.sac == SacConfig() and config.token_rewards == TokenRewardConfig()
    assert config.replay == ReplayConfig(dtype="fp32")
    assert config.decoding.fallback == "last" and config.decoding.max_new_tokens == 512
    assert config.decoding.prompt_format == "official"
    assert config.num_steps == 3000
    assert config.num_steps * config.episodes_per_step * config.updates_per_episode == 210_000
    assert MaraConfig() != config


@pytest.mark.parametrize("base", [MaraConfig(), MaraConfig.official()])
def test_a_section_in_part_keeps_the_rest(base: MaraConfig) -> None:
    changed = base.replace(sac={"gamma": 0.5}, decoding={"top_k": 3}, seed=9)
    assert changed.sac == dataclasses.replace(base.sac, gamma=0.5)
    assert changed.decoding == base.decoding.replace(top_k=3)
    assert changed == dataclasses.replace(base, sac=changed.sac, decoding=changed.decoding, seed=9)
    # A whole record replaces all of it.
    assert base.replace(sac=SacConfig(gamma=0.5)).sac == SacConfig(gamma=0.5)


def test_presets_with_options() -> None:
    """Parts of sections change the preset's own, not the other preset's."""
    official = MaraConfig.official(sac={"gamma": 0.5}, replay={"capacity": 70_000})
    assert official.sac == SacConfig(gamma=0.5)
    assert official.replay == ReplayConfig(dtype="fp32", capacity=70_000)
    ours = MaraConfig.from_dict({"sac": {"gamma": 0.5}})
    assert ours.sac == dataclasses.replace(MaraConfig().sac, gamma=0.5) != SacConfig(gamma=0.5)


@pytest.mark.parametrize(
    "config",
    [
        MaraConfig(),
        MaraConfig.official(),
        MaraConfig(
            reward_weights=(2, -1.5),
            report_to=("tensorboard",),
            decoding=DecodingConfig(stop_strings=("a", "b"), eos_token_id=(1, 2)),
            sac=SacConfig(actor_learning_rate=1e-5),
            run_name="Grüße",
            eval_steps=3,
        ),
    ],
)
def test_there_and_back(config: MaraConfig) -> None:
    plain = config.to_dict()
    assert MaraConfig.from_dict(plain) == config
    assert MaraConfig.from_dict(json.loads(json.dumps(plain))) == config
    assert json.loads(json.dumps(plain)) == plain
    assert MaraConfig.from_dict(from_yaml(yaml.safe_dump(plain))) == config


def test_values_of_yaml_and_numpy() -> None:
    config = MaraConfig.from_dict(
        {
            "num_episodes": np.int64(5),
            "reward_scale": np.float32(0.5),
            "reward_weights": np.array([2, -1.0]),
            "sac": {"gamma": np.float32(0.5), "target_interval": np.int32(3)},
            "report_to": None,
        }
    )
    json.dumps(config.to_dict())
    assert config.reward_weights == (2.0, -1.0) and config.report_to == ()
    assert type(config.num_episodes) is int and type(config.sac.gamma) is float
    assert MaraConfig(reward_weights=[1, -1]).reward_weights == (1, -1)
    assert MaraConfig(reward_weights=2).reward_weights == (2,)
    assert MaraConfig(report_to="wandb").report_to == ("wandb",)
    assert MaraConfig(report_to=["wandb", "trackio"]).report_to == ("wandb", "trackio")
    assert MaraConfig(output_dir=Path("a") / "b").output_dir == "a/b"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_way_to_write_a_number(value: float) -> None:
    """PyYAML alone takes 1e-3 for a text."""
    for text in (repr(value), f"{value:e}", f"{value:.0e}", f"{value:E}"):
        assert from_yaml(f"a: {text}") == {"a": float(text)}
    for text in ("1e-3", "+1E5", ".5e-2", "1.e3"):
        assert from_yaml(text) == float(text)
    assert from_yaml("[e3, 1e, 1e3x, '1e3', 12]") == ["e3", "1e", "1e3x", "1e3", 12]


@pytest.mark.parametrize(
    ("episodes", "per_step", "steps"), [(1, 1, 1), (10, 3, 4), (9, 3, 3), (2, 64, 1)]
)
def test_steps(episodes: int, per_step: int, steps: int) -> None:
    assert MaraConfig(num_episodes=episodes, episodes_per_step=per_step).num_steps == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_episode": 5}, "unknown option 'num_episode'; did you mean 'num_episodes'?"),
        ({"sac": {"gama": 1}}, "sac: unknown option 'gama'; did you mean 'gamma'?"),
        ({"sac": {"gamma": 2}}, "sac: gamma=2 is not allowed; allowed: a number in [0, 1]"),
        ({"decoding": {"top_p": 2}}, "decoding: top_p=2 is not allowed"),
        ({"replay": {"dtype": "int8"}}, "replay: dtype='int8' is not known"),
        ({"token_rewards": {"postback": 1}}, "token_rewards: postback=1 is not known"),
        ({"sac": None}, "sac=None is not allowed; allowed: a SacConfig or a mapping"),
        ({"replay": SacConfig()}, "is not allowed; allowed: a ReplayConfig or a mapping"),
        ({"num_episodes": 0}, "num_episodes=0 is not allowed; allowed: an integer >= 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 is not allowed"),
        ({"logging_steps": True}, "logging_steps=True is not allowed"),
        ({"save_steps": 0}, "save_steps=0 is not allowed; allowed: an integer >= 1 or None"),
        ({"seed": -1}, "seed=-1 is not allowed"),
        ({"updates_per_episode": math.inf}, "updates_per_episode=inf is not allowed"),
        ({"inner_size": 10}, "inner_size=10 is not allowed; allowed: multiples of 4"),
        ({"reward_scaling": "max"}, "reward_scaling='max' is not known; allowed: none, std"),
        ({"reward_baseline": ["x"]}, "reward_baseline=['x'] is not known"),
        ({"final_target_entropy": "low"}, "allowed: nats or None"),
        ({"reward_offset": "1"}, "reward_offset='1' is not allowed"),
        ({"reward_weights": ["1"]}, "reward_weights='1' is not allowed; allowed: a list of finite"),
        ({"reward_weights": "1,-1"}, "reward_weights='1,-1' is not allowed"),
        ({"reward_weights": [math.nan]}, "reward_weights=nan is not allowed"),
        ({"report_to": [3]}, "report_to=[3] is not allowed; allowed: a list of names"),
        ({"output_dir": ""}, "output_dir='' is not allowed; allowed: a non-empty text"),
        ({"output_dir": None}, "output_dir=None is not allowed"),
        ({"run_name": 3}, "run_name=3 is not allowed"),
        (
            {"replay": {"capacity": 100}},
            "learning_starts=2048 exceeds replay.capacity=100: learning would never start",
        ),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MaraConfig.from_dict(options)


@pytest.mark.parametrize("kind", [MaraConfig, *(k for k in SECTIONS.values())])
def test_every_option_is_explained(kind: type) -> None:
    """A sentence below each field, or in the docstring's list."""
    source = Path(inspect.getfile(kind)).read_text()
    for field in dataclasses.fields(kind):
        below = re.search(rf'^    {field.name}: .*\n    """.+', source, re.MULTILINE)
        assert below or f"        {field.name}: " in source, field.name
