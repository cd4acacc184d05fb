"""How an agent is trained: one frozen record, and two named ones."""

import dataclasses
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from mara_fast.config import DecodingConfig
from mara_fast.options import (
    check,
    check_choices,
    is_int,
    is_number,
    known_options,
    make_floats,
    plain,
    several,
)
from mara_train.replay import ReplayConfig
from mara_train.sac import SacConfig
from mara_train.token_rewards import TokenRewardConfig

SECTIONS = {
    "decoding": DecodingConfig,
    "token_rewards": TokenRewardConfig,
    "sac": SacConfig,
    "replay": ReplayConfig,
}
"""Fields that are records themselves, given as mappings in YAML."""

_DEFAULT_SAC = SacConfig(
    actor_learning_rate=1e-3,
    critic_learning_rate=1e-3,
    alpha_learning_rate=1e-2,
    gamma=0.0,
    target_interval=1,
    initial_alpha=0.05,
    target_entropy=0.8 * math.log(2),
)
_DEFAULT_TOKEN_REWARDS = TokenRewardConfig(
    kl_weight=0.15,
    kl_of="outcome",
    policy="cascade",
    reference_temperature=1.0,
    reference_over_set=True,
    postback="all",
    postback_gamma=1.0,
)


@dataclass(frozen=True, kw_only=True)
class MaraConfig:
    """Options of a training run.

    The defaults are the best found so far; :meth:`official` has the authors'. What made the
    difference: every transition gets the episode's reward, centred on its batch's mean, and nothing
    is bootstrapped (γ = 0); log α learns fast towards an entropy that is high at first, so that no
    answer is given up before it was tried, and low in the end, since decoding leaves nothing to
    chance; training and decoding share the fallback.
    """

    output_dir: str = "mara-output"
    """Folder of checkpoints, logs and the trained agent."""
    num_episodes: int = 20_000
    """Episodes collected in all."""
    episodes_per_step: int = 64
    """Episodes collected between two rounds of gradient steps."""
    updates_per_episode: float = 1.0
    """Gradient steps per episode, once learning has started."""
    batch_size: int = 256
    """Transitions of a gradient step."""
    learning_starts: int = 2048
    """Transitions in the replay before the first gradient step."""
    learning_rate_schedule: Literal["constant", "linear"] = "linear"
    """``linear``: actor and critic learn ever more slowly, down to 2 % of their rates."""
    final_target_entropy: float | None = 0.05 * math.log(2)
    """The target entropy goes towards this, in nats and in a straight line over the run; None: it
    stays what ``sac`` says."""
    max_batch_size: int = 64
    """Episodes in flight: slots of the engine."""
    num_collectors: int = 0
    """Processes that collect, by Ray, with an engine each (and a GPU each, where there are any);
    0: this process collects."""
    seed: int = 0
    """Seeds the agent, the order of the prompts, the rollouts and the batches."""
    inner_size: int = 1024
    """Width of a new agent's first layer, and of the critic's."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """Options of the episodes and of the agent that comes out."""
    token_rewards: TokenRewardConfig = _DEFAULT_TOKEN_REWARDS
    """How transitions are rewarded."""
    sac: SacConfig = _DEFAULT_SAC
    """The learner."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Where transitions are kept."""
    reward_weights: tuple[float, ...] | None = None
    """One per reward function; None: 1 each. A cost has a negative one."""
    reward_scaling: Literal["none", "std"] = "std"
    """``std``: each reward is divided by its standard deviation over the first step's episodes."""
    reward_baseline: Literal["none", "batch_mean", "greedy"] = "batch_mean"
    """What is taken off the final reward: nothing, the mean of the step's episodes, or the reward
    of the base model's greedy answer to the same prompt."""
    reward_offset: float = 0.0
    """Taken off the final reward too. The authors' ``reward_baseline``."""
    reward_scale: float = 1.0
    """Multiplies what is left of the final reward. The authors' ``baseline_multiplier``."""
    logging_steps: int = 10
    """Steps between two lines of metrics."""
    eval_steps: int | None = None
    """Steps between two evaluations; None: at the end only, if there are prompts for it."""
    save_steps: int | None = 100
    """Steps between two checkpoints; None: at the end only."""
    save_total_limit: int | None = 2
    """Checkpoints kept; None: all."""
    completions_per_log: int = 4
    """Sample completions shown, and written, with every evaluation and log line of the run."""
    report_to: tuple[str, ...] = ()
    """Trackers of accelerate: tensorboard, wandb, trackio, ..."""
    run_name: str | None = None
    """For the trackers; None: the output folder's name."""

    @classmethod
    def official(cls, **options: Any) -> Self:
        """The authors' recipe: 21,000 episodes, ten updates each, batches of 1024 transitions."""
        recipe = {
            "num_episodes": 21_000,
            "episodes_per_step": 7,
            "updates_per_episode": 10.0,
            "batch_size": 1024,
            "learning_starts": 65_536,
            "seed": 2024,
            "decoding": DecodingConfig.paper(max_new_tokens=512, prompt_format="official"),
            "token_rewards": TokenRewardConfig(),
            "sac": SacConfig(),
            "replay": ReplayConfig(dtype="fp32"),
            "learning_rate_schedule": "constant",
            "final_target_entropy": None,
            "reward_scaling": "none",
            "reward_baseline": "none",
            "save_steps": 500,
        }
        # In two steps: a section given in part keeps the recipe's other values.
        return cls.from_dict(recipe).replace(**options)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """A config from plain values (YAML, JSON, keywords); unknown names are an error.

        Sections may be given in part: ``{"sac": {"gamma": 0.9}}`` keeps the default's other values.
        """
        return cls().replace(**known_options(cls, options))

    def replace(self, **options: Any) -> Self:
        """This config with some options changed; sections may be given in part."""
        options = known_options(type(self), options)
        for name in SECTIONS.keys() & options.keys():
            if isinstance(options[name], Mapping):
                options[name] = _in_part(name, getattr(self, name), options[name])
        return dataclasses.replace(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_dict` takes them."""
        values = dataclasses.asdict(self) | {"decoding": self.decoding.to_dict()}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return -(-self.num_episodes // self.episodes_per_step)

    def __post_init__(self) -> None:
        for field_ in dataclasses.fields(self):
            object.__setattr__(self, field_.name, plain(getattr(self, field_.name)))
        check_choices(self)
        for name in (
            "num_episodes",
            "episodes_per_step",
            "batch_size",
            "max_batch_size",
            "logging_steps",
        ):
            _check_count(name, getattr(self, name), minimum=1)
        for name in ("eval_steps", "save_steps", "save_total_limit"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), minimum=1, otherwise=" or None")
        for name in ("learning_starts", "completions_per_log"):
            _check_count(name, getattr(self, name), minimum=0)
        check(
            "num_collectors",
            self.num_collectors,
            is_int,
            "an integer from 0 to 1024",
            minimum=0,
            maximum=1024,
        )
        check("seed", self.seed, is_int, "an integer in [0, 2**63)", minimum=0, below=2**63)
        check(
            "updates_per_episode", self.updates_per_episode, is_number, "a number >= 0", minimum=0
        )
        if self.final_target_entropy is not None:
            check("final_target_entropy", self.final_target_entropy, is_number, "nats or None")
        check("reward_offset", self.reward_offset, is_number, "a finite number")
        check("reward_scale", self.reward_scale, is_number, "a finite number")
        if not is_int(self.inner_size) or self.inner_size < 4 or self.inner_size % 4:
            raise ValueError(
                f"inner_size={self.inner_size!r} is not allowed; allowed: multiples of 4"
            )
        for name, kind in SECTIONS.items():
            if isinstance(getattr(self, name), Mapping):
                own = type(self).__dataclass_fields__[name]
                whole = own.default if own.default is not dataclasses.MISSING else kind()
                object.__setattr__(self, name, _in_part(name, whole, getattr(self, name)))
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not allowed; allowed: a {kind.__name__} "
                    "or a mapping of its options"
                )
        for name in ("learning_starts", "batch_size"):
            if getattr(self, name) > self.replay.capacity:
                raise ValueError(
                    f"{name}={getattr(self, name)} exceeds replay.capacity={self.replay.capacity}: "
                    "learning would never start"
                )
        for name, least in (("max_new_tokens", 1), ("top_k", 2)):
            value = getattr(self.decoding, name)
            if value < least and not (name == "top_k" and value == 0):
                raise ValueError(
                    f"decoding.{name}={value} leaves the agent nothing to decide; allowed: at "
                    f"least {least}"
                )
        if isinstance(self.output_dir, os.PathLike):
            object.__setattr__(self, "output_dir", os.fspath(self.output_dir))
        for name in ("output_dir", "run_name"):
            value = getattr(self, name)
            if not _is_text(value) and not (name == "run_name" and value is None):
                raise ValueError(f"{name}={value!r} is not allowed; allowed: a non-empty text")
        if self.reward_weights is not None:
            weights = tuple(map(plain, several(self.reward_weights, numbers.Real)))
            for weight in weights:
                check("reward_weights", weight, is_number, "a list of finite numbers")
            if weights and not any(weights):
                raise ValueError(
                    f"reward_weights={list(weights)} is not allowed; allowed: one that is not 0"
                )
            object.__setattr__(self, "reward_weights", weights)
        names = () if self.report_to is None else several(self.report_to, str)
        if not all(map(_is_text, names)):
            raise ValueError(
                f"report_to={self.report_to!r} is not allowed; allowed: a list of names"
            )
        object.__setattr__(self, "report_to", names)
        make_floats(self)


def _check_count(name: str, value: Any, *, minimum: int, otherwise: str = "") -> None:
    # Beyond any count, and short of what torch's integers hold.
    allowed = f"an integer >= {minimum}{otherwise}, below 2**50"
    check(name, value, is_int, allowed, minimum=minimum, below=2**50)


def _in_part(name: str, section: Any, options: Mapping[str, Any]) -> Any:
    """A section with some of its options changed."""
    given = {key: plain(value) for key, value in options.items()}
    try:
        return dataclasses.replace(section, **known_options(type(section), given))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
