"""Rewards that are named by a text: a model's path or hub id, or ``module:function``."""

import importlib.util
import os
import pkgutil
from collections.abc import Sequence
from typing import Any

from mara_fast.loading import looks_like_path


def load_rewards(specs: Sequence[str]) -> list[Any]:
    """What :class:`mara_fast.rewards.Rewards` takes: functions are imported, the rest stays.

    Raises:
        ValueError: no such module or function, or something that cannot be called.
    """
    rewards: list[Any] = []
    for spec in specs:
        if os.path.exists(spec) and not spec.endswith(".py"):
            rewards.append(spec)
            continue
        if ":" not in spec:
            if spec.endswith(".py") or _is_module(spec):
                module = spec.removesuffix(".py").replace(os.sep, ".")
                raise ValueError(f"reward {spec!r} names no function; expected {module}:function")
            if looks_like_path(spec):
                raise FileNotFoundError(f"reward {spec!r}: there is no such folder")
            rewards.append(spec)
            continue
        try:
            function = pkgutil.resolve_name(spec)
        # It is somebody else's code: whatever is wrong with it is said.
        except Exception as error:
            what = str(error)
            if not isinstance(error, ImportError | AttributeError | ValueError):
                what = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"reward {spec!r} cannot be imported: {what}; expected module:function"
            ) from error
        if not callable(function):
            raise ValueError(f"reward {spec!r} is a {type(function).__name__}, not a function")
        rewards.append(function)
    return rewards


def _is_module(name: str) -> bool:
    return name.isidentifier() and importlib.util.find_spec(name) is not None
