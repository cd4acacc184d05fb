"""What models, agents and functions are by their contents: results of one are not another's.

folder          its name, and sha256 over its weights (of large files samples), configs, tokenizer
loaded model    its class, and sha256 over its config and weights
function        module:qualname, and sha256 over its source and what is bound to it
hub id          the id alone: which commit it stands for is not known before it is loaded
"""

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mara_fast.loading import TINY
from mara_fast.rewards.reward_model import RewardModel
from mara_fast.tiny import LM_PATH

_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".py")
"""Of the files of a folder that an answer or a score may depend on."""
_NUM_BLOCKS, _BLOCK = 64, 2**20
"""Of a file that is larger than all of them together."""
_PLAIN = (type(None), bool, int, float, str)
_LEFT_OUT = ("_name_or_path", "transformers_version")
"""Of a config."""


class Fingerprints:
    """Fingerprints of an evaluation's sources; weights are read once."""

    def __init__(self) -> None:
        # With the source, so that no other object gets its id.
        self._found: dict[Any, tuple[Any, str]] = {}

    def of(self, source: Any) -> Any:
        """Of a model, agent, reward or verdict, or of a list of them; False of none."""
        if source is None or source is False:
            return False
        if isinstance(source, list | tuple):
            return [self.of(one) for one in source]
        key = source if isinstance(source, str) else id(source)
        if key not in self._found:
            self._found[key] = source, _fingerprint(source)
        return self._found[key][1]


def _fingerprint(source: Any) -> str:
    if isinstance(source, str):
        folder = LM_PATH if source == TINY else Path(os.path.abspath(source))
        if not folder.is_dir():
            return source
        return f"{TINY if source == TINY else folder.name} sha256:{_folder(folder)}"
    if isinstance(source, RewardModel):
        parts = [_module(source.model), repr(source.family), source.text.max_length]
        return f"{source.name} sha256:{_sha256(parts)}"
    if isinstance(source, nn.Module):
        return f"{type(source).__name__} sha256:{_module(source)}"
    return f"{_qualified(source)} sha256:{_sha256(_parts(source, set()))}"


def _folder(folder: Path) -> str:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _SUFFIXES:
            found[path.name] = _file(path)
    return _sha256(found)


def _file(path: Path) -> str:
    """Of a large file its size and blocks all over it: training again changes every one."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _NUM_BLOCKS * _BLOCK:
            digest.update(file.read())
        else:
            for number in range(_NUM_BLOCKS):
                file.seek(number * (size - _BLOCK) // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _module(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name in ("config", "generation_config"):
        config: Any = getattr(module, name, None)
        values = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", {})
        kept = {k: v for k, v in values.items() if k not in _LEFT_OUT}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"\n{name} ".encode())
        _add(digest, tensor)
    return digest.hexdigest()[:16]


def _add(digest: Any, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        digest.update(repr(tensor).encode())
        return
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _parts(value: Any, seen: set[int]) -> Any:
    """Plain values that tell a function, or what is bound to it, from another."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, nn.Module):
        return _module(value)
    if isinstance(value, Tensor):
        digest = hashlib.sha256()
        _add(digest, value)
        return digest.hexdigest()
    # A function may be bound to itself.
    if id(value) in seen:
        return _qualified(value)
    seen = seen | {id(value)}
    if isinstance(value, list | tuple):
        return [_parts(one, seen) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _parts(one, seen) for key, one in value.items()}
    if isinstance(value, functools.partial):
        return [_parts(one, seen) for one in (value.func, value.args, value.keywords)]
    if inspect.ismethod(value):
        return [_parts(value.__func__, seen), _parts(value.__self__, seen)]
    if inspect.isfunction(value):
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        bound = [value.__defaults__, value.__kwdefaults__, _kept(cells, _content)]
        return [_qualified(value), _source(value), *(_parts(one, seen) for one in bound)]
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        return _qualified(value)
    own = _kept(getattr(value, "__dict__", {}), lambda one: one)
    return [_qualified(value), _source(type(value)), _parts(own, seen)]


def _kept(values: Mapping[str, Any], content: Callable[[Any], Any]) -> dict[str, Any]:
    """What a function or object holds, but for lists and the like: it may note things in them."""
    kinds = (*_PLAIN, tuple, functools.partial, nn.Module)
    found = {name: content(value) for name, value in values.items()}
    return {n: v for n, v in found.items() if isinstance(v, kinds) or inspect.isroutine(v)}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    # Not given a value yet.
    except ValueError:
        return None


def _source(value: Any) -> Any:
    try:
        text = inspect.getsource(value)
    except (OSError, TypeError):
        text = None
    code = getattr(value, "__code__", None)
    # Several lambdas may share a line. Else not the code: it depends on Python's version.
    if code is None or (text is not None and code.co_name != "<lambda>"):
        return text
    constants = [one for one in code.co_consts if isinstance(one, _PLAIN)]
    return [text, code.co_code.hex(), list(code.co_names), constants]


def _qualified(value: Any) -> str:
    while isinstance(value, functools.partial):
        value = value.func
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def _sha256(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
