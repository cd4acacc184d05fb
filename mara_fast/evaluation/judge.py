"""Who says which answer is better: rewards and a rule, or a verdict on pairs."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from mara_fast.options import check, is_int, is_number, plain, several, text_of_path

Rule = Literal["all", "sum", "verdict"]


@dataclass(frozen=True, kw_only=True)
class JudgeSpec:
    """Who says which answer is better.

    rule "all"      won where every reward is better, lost where every one is worse, else tied
    rule "sum"      the sign of the difference of Σ weight · reward
    rule "verdict"  what ``verdict`` says

    A reward that has no opinion on one of two answers abstains from the pair.
    """

    rewards: tuple[Any, ...] = ()
    """Hub ids or paths of reward models, ``module:function``, or callables."""
    weights: tuple[float, ...] = ()
    """One to each reward, negative for costs; all 1 if none are given."""
    names: tuple[str, ...] = ()
    """What being better by each reward is called; the rewards' own names if none are given."""
    rule: Rule = "all"
    verdict: Any = None
    """``module:function`` or a callable ``f(prompts, ours, theirs) -> list``: positive where ours
    is better, negative where theirs is, 0 or None where neither: an LLM as judge, a human."""
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"
    max_length: int | None = None
    """Tokens of a text that models read at most."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("rewards", "weights", "names"):
            kind, value = str if name != "weights" else float, getattr(self, name)
            object.__setattr__(self, name, () if value is None else several(value, kind))
        object.__setattr__(self, "rewards", tuple(map(text_of_path, self.rewards)))
        object.__setattr__(self, "weights", tuple(map(plain, self.weights)))
        for index, reward in enumerate(self.rewards):
            # A RewardModel is no callable, but scores.
            if not (isinstance(reward, str) or callable(reward) or hasattr(reward, "score")):
                raise ValueError(
                    f"judge.rewards[{index}]={reward!r} is not allowed; allowed: a hub id, a path, "
                    "module:function, a loaded model, or a callable"
                )
        for name in self.names:
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"judge.names: {name!r} is not allowed; allowed: texts")
        if not (self.verdict is None or isinstance(self.verdict, str) or callable(self.verdict)):
            raise ValueError(
                f"judge.verdict={self.verdict!r} is not allowed; allowed: module:function, or a "
                "callable"
            )
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * len(self.rewards))
        for weight in self.weights:
            check("judge.weights", weight, is_number, "finite numbers")
        for name in ("weights", "names"):
            values = getattr(self, name)
            if values and len(values) != len(self.rewards):
                raise ValueError(
                    f"judge.{name}={list(values)!r} are {len(values)} for {len(self.rewards)} "
                    "rewards; one to each is expected"
                )
        if self.rewards and not any(self.weights):
            raise ValueError(
                f"judge.weights={list(self.weights)!r} are not allowed: no reward would count"
            )
        if self.rule not in get_args(Rule):
            raise ValueError(
                f"judge.rule={self.rule!r} is not known; allowed: {', '.join(get_args(Rule))}"
            )
        if (self.rule == "verdict") != (self.verdict is not None):
            raise ValueError("judge.rule 'verdict' and judge.verdict go together")
        if not self.rewards and self.verdict is None:
            raise ValueError("judge.rewards is empty: at least one reward, or a verdict, is needed")
        check("judge.batch_size", self.batch_size, is_int, "an integer >= 1", minimum=1)
        if self.max_length is not None:
            check("judge.max_length", self.max_length, is_int, "an integer >= 1", minimum=1)
