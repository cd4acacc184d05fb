"""The rewards of a run: several functions and models, and their weighted sum.

    total_i = Σ_r weight_r · reward_r(prompt_i, completion_i)    over the r that have an opinion

As Eq. 8 of the paper with weights 1 and -1 for a reward and a cost model. Shapes: N samples.
"""

import math
import numbers
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mara_fast.loading import named
from mara_fast.rewards.functions import call_functions, check_signature, function_name
from mara_fast.rewards.reward_model import RewardModel
from mara_fast.rewards.samples import check_samples

_FORMS = (
    "a hub id or path, a PreTrainedModel, a RewardModel, or a callable "
    "f(prompts, completions, **columns)"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardScores:
    """Scores of N samples, on the CPU."""

    total: Tensor
    """Weighted sum over the rewards that have an opinion, float64 [N]."""
    by_name: dict[str, Tensor]
    """What each reward says before its weight, float64 [N]; NaN where it has no opinion."""


class Rewards:
    """Scores completions with any number of rewards.

    Args:
        funcs: one reward or a list of them: a hub id or path of a sequence-classification model of
            one label (families of published models are known by their names), a loaded model, a
            :class:`RewardModel`, or a sync or async callable as in TRL,
            ``f(prompts, completions, **columns) -> list[float | None]``; None is no opinion.
        weights: one to each reward; 1.0 each if None.
        processing_classes: one tokenizer or None to each reward; None is the one at the model's
            path, and the only one allowed for what has no tokenizer or brings its own.
        batch_size: texts in one forward of a model; it changes no score.
        device, dtype: of the models given by id or path, see :meth:`RewardModel.from_pretrained`.
        max_length: tokens of a text that models read at most; each family's own if None.

    Raises:
        ValueError: no reward, something that is none, another number of weights or processing
            classes, weights that are not finite, and what :class:`RewardModel` raises.
        OSError: nothing at a path or hub id.
    """

    def __init__(
        self,
        funcs: Any,
        weights: Sequence[float] | None = None,
        *,
        processing_classes: Sequence[Any] | None = None,
        batch_size: int = 8,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        max_length: int | None = None,
    ) -> None:
        funcs = list(funcs) if isinstance(funcs, list | tuple) else [funcs]
        for index, func in enumerate(funcs):
            if not _is_path(func) and not _is_model(func) and not callable(func):
                raise ValueError(f"funcs[{index}] is {func!r}, expected {_FORMS}")
        if not funcs:
            raise ValueError(f"funcs is empty, expected at least one reward: {_FORMS}")
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} is not allowed; allowed: an integer >= 1")
        self.weights = _checked_weights(weights, len(funcs))
        self.batch_size = batch_size
        tokenizers = [None] * len(funcs) if processing_classes is None else list(processing_classes)
        if len(tokenizers) != len(funcs):
            raise ValueError(
                f"got {len(tokenizers)} processing_classes for {len(funcs)} rewards; one or None "
                "to each is expected"
            )
        for func, tokenizer in zip(funcs, tokenizers, strict=True):
            by_itself = isinstance(func, RewardModel) or not (_is_path(func) or _is_model(func))
            if tokenizer is not None and by_itself:
                raise ValueError(f"the processing class of {func!r} must be None: it takes none")
        by_path = any(map(_is_path, funcs))
        for name, value in (("device", device), ("dtype", dtype)):
            if value != "auto" and not by_path:
                warnings.warn(
                    f"{name}={value!r} has no effect: no reward is given by hub id or path",
                    stacklevel=2,
                )
        self._rewards: dict[str, Any] = {}
        for func, tokenizer in zip(funcs, tokenizers, strict=True):
            if _is_path(func):
                with named("reward", func):
                    reward: Any = RewardModel.from_pretrained(
                        func, tokenizer, max_length=max_length, dtype=dtype, device=device
                    )
            elif _is_model(func) and not isinstance(func, RewardModel):
                reward = RewardModel(func, tokenizer, max_length=max_length)
            else:
                reward = func
            name = reward.name if isinstance(reward, RewardModel) else function_name(reward)
            self._rewards[_unused(name, self._rewards)] = reward

    @property
    def names(self) -> list[str]:
        """Names of the rewards: of the function, or the last part of the model's path; a number
        follows where a name is taken."""
        return list(self._rewards)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises a ValueError unless every function takes these columns; reads no data."""
        arguments = dict.fromkeys(("prompts", "completions", *columns))
        for name, reward in self._rewards.items():
            if not isinstance(reward, RewardModel):
                check_signature(reward, name, arguments)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        progress: bool = False,
        **columns: Sequence[Any],
    ) -> RewardScores:
        """Scores every completion. What is wrong with the arguments is said before any work.

        Args:
            prompts: N texts or chats (lists of role/content dicts).
            completions: N texts or chats.
            progress: a progress bar to each model.
            columns: lists of N values that the functions get, as further columns of a data set.

        Raises:
            ValueError: empty lists or lists of different lengths, a sample of another form, a
                function that does not take the columns or returns something else than N finite
                numbers or None, a model's score that is NaN or infinite, a sample that no reward
                has an opinion on.
        """
        num_samples = check_samples(prompts, completions)
        for name, column in columns.items():
            if isinstance(column, str | bytes) or not hasattr(column, "__len__"):
                raise ValueError(
                    f"column {name} must be a list of {num_samples} values, got {column!r}"
                )
            if len(column) != num_samples:
                raise ValueError(
                    f"column {name} has {len(column)} values for {num_samples} samples"
                )
        arguments = {"prompts": prompts, "completions": completions, **columns}
        models = {n: r for n, r in self._rewards.items() if isinstance(r, RewardModel)}
        functions = {n: r for n, r in self._rewards.items() if n not in models}
        for name, function in functions.items():
            check_signature(function, name, arguments)
        encoded: dict[str, Any] = {
            name: model.encode(prompts, completions) for name, model in models.items()
        }

        scores = call_functions(functions, arguments, num_samples)
        for name, model in models.items():
            scores[name] = model.score(encoded[name], batch_size=self.batch_size, progress=progress)
        by_name = {name: scores[name] for name in self._rewards}
        table = torch.stack(list(by_name.values()))  # [R, N]
        silent = table.isnan().all(dim=0).nonzero().flatten().tolist()
        if silent:
            raise ValueError(
                f"no reward has an opinion on sample {silent[0]} ({len(silent)} of {num_samples} "
                f"samples in all): every one of {', '.join(by_name)} returned None"
            )
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return RewardScores(total=(weights[:, None] * table).nansum(dim=0), by_name=by_name)


def _is_path(func: Any) -> bool:
    return isinstance(func, str | os.PathLike)


def _is_model(func: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(func, RewardModel | PreTrainedModel)


def _checked_weights(weights: Sequence[float] | None, num_rewards: int) -> tuple[float, ...]:
    values = [1.0] * num_rewards if weights is None else list(weights)
    if len(values) != num_rewards:
        raise ValueError(
            f"got {len(values)} weights for {num_rewards} rewards; one to each is expected"
        )
    for index, value in enumerate(values):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"weights[{index}]={value!r} is not allowed; allowed: finite numbers")
    return tuple(map(float, values))


def _unused(name: str, taken: dict[str, Any]) -> str:
    number, candidate = 2, name
    while candidate in taken:
        number, candidate = number + 1, f"{name}_{number}"
    return candidate
