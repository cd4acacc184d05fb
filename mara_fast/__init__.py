"""Exact, fast decode-time alignment of frozen LMs (MARA).

The names below are imported on first use, so that ``import mara_fast`` loads neither torch nor
transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mara_fast.agent import MaraAgent
    from mara_fast.api import generate, stream
    from mara_fast.config import DecodingConfig
    from mara_fast.engine import Engine
    from mara_fast.evaluation.evaluate import evaluate
    from mara_fast.hf_generate import custom_generate
    from mara_fast.outputs import DecodingStats, Generation, TokenEvent, TokenTrace

_HOME = {
    "DecodingConfig": "config",
    "DecodingStats": "outputs",
    "Engine": "engine",
    "Generation": "outputs",
    "MaraAgent": "agent",
    "TokenEvent": "outputs",
    "TokenTrace": "outputs",
    "custom_generate": "hf_generate",
    "evaluate": "evaluation.evaluate",
    "generate": "api",
    "stream": "api",
}

__all__ = [
    "DecodingConfig",
    "DecodingStats",
    "Engine",
    "Generation",
    "MaraAgent",
    "TokenEvent",
    "TokenTrace",
    "__version__",
    "custom_generate",
    "evaluate",
    "generate",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mara_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mara_fast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
