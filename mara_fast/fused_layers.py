"""A model's norms and rotations, a launch each instead of about ten, while the engine runs it.

Which of its classes and functions may be exchanged is found out on the model itself: those that
are equal, to the bit, to a definition in :mod:`mara_kernels.layers`. Anything else runs as it is.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mara_fast.exchange import Exchange
from mara_kernels.layers import NormRule, reference, rms_norm, rotate

_ROTATE = "apply_rotary_pos_emb"
_RULES = tuple(
    NormRule(adds_one=adds_one, rounds_first=rounds_first)
    for adds_one in (False, True)
    for rounds_first in (True, False)
)
_lock = threading.Lock()
_exchanges: dict[tuple[Any, str], Exchange] = {}
_rules: weakref.WeakKeyDictionary[nn.Module, NormRule] = weakref.WeakKeyDictionary()
"""Of every norm for itself: in float32, or where all factors are one, several rules are equal."""


class FusedLayers:
    """What can be exchanged of a model.

    Args:
        body: on the device and in the dtype that it decodes in.
    """

    def __init__(self, body: nn.Module) -> None:
        owners: dict[tuple[Any, str], Callable[[Exchange, Callable], Callable]] = {}
        with torch.inference_mode():
            for owner in _norms(body):
                owners[owner, "forward"] = _make_norm
            for owner in _rotations(body):
                owners[owner, _ROTATE] = _make_rotation
        with _lock:
            for key, make in owners.items():
                if key not in _exchanges:
                    _exchanges[key] = Exchange(*key, make)
        self._mine = [_exchanges[key] for key in owners]
        self.names = tuple(f"{owner.__name__}.{name}" for owner, name in owners)
        """What is exchanged, for people."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, this thread's forwards run them fused."""
        with ExitStack() as stack:
            for exchange in self._mine:
                stack.enter_context(exchange())
            yield


def _make_norm(exchange: Exchange, before: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor, *others: Any, **options: Any) -> Tensor:
        if not torch.compiler.is_compiling() and exchange.is_within and not (others or options):
            rule = _rules.get(self)
            if rule is not None and self.weight.dtype == hidden_states.dtype:
                return rms_norm(hidden_states, self.weight, eps=_eps_of(self), rule=rule)
        return before(self, hidden_states, *others, **options)

    return forward


def _make_rotation(exchange: Exchange, before: Callable[..., Any]) -> Callable[..., Any]:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling() and exchange.is_within and not (others or options):
            # Some turn a part of each head, or with angles of another precision.
            is_plain = q.ndim == 4 and cos.ndim == 3 and q.shape[-1] == cos.shape[-1]
            if is_plain and q.dtype == k.dtype == cos.dtype == sin.dtype:
                return rotate(q, k, cos, sin)
        return before(q, k, cos, sin, *others, **options)

    return apply


def _norms(body: nn.Module) -> set[type]:
    """Classes that have modules that are norms we have."""
    kinds = set()
    for module in body.modules():
        kind = type(module)
        if not kind.__name__.endswith("Norm") or isinstance(module, nn.LayerNorm):
            continue
        rule = _rule_of(module)
        if rule is None:
            _rules.pop(module, None)
        else:
            _rules[module] = rule
            kinds.add(kind)
    return {next(base for base in kind.__mro__ if "forward" in vars(base)) for kind in kinds}


def _rule_of(module: nn.Module) -> NormRule | None:
    """The definition that a module is equal to."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or list(module.children()):
        return None
    try:
        # Factors that differ from each other and from one.
        x = _ramp((3, weight.shape[0]), weight)
        wanted = module(x)
        for rule in _RULES:
            if _is_equal(wanted, reference.rms_norm(x, weight, eps=_eps_of(module), rule=rule)):
                return rule
    # Whatever it is that a foreign module wants, it is no norm of ours.
    except Exception:
        return None
    return None


def _eps_of(module: Any) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def _rotations(body: nn.Module) -> list[Any]:
    """Modeling files whose function is the rotation that we have."""
    found = []
    like = next(body.parameters())
    for name in dict.fromkeys(type(module).__module__ for module in body.modules()):
        function = getattr(sys.modules.get(name), _ROTATE, None)
        if function is None:
            continue
        query, key = _ramp((2, 4, 3, 8), like), _ramp((2, 2, 3, 8), like)
        angles = _ramp((2, 3, 8), like)
        try:
            wanted = function(query, key, angles.cos(), angles.sin())
            rotated = reference.rotate(query, key, angles.cos(), angles.sin())
            if all(_is_equal(a, b) for a, b in zip(wanted, rotated, strict=True)):
                found.append(sys.modules[name])
        # As above.
        except Exception:
            continue
    return found


def _ramp(size: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers of both signs, none like another nearby."""
    count = torch.arange(1, 1 + torch.Size(size).numel(), device=like.device)
    return (3 * torch.sin(count * 1.7)).reshape(size).to(like.dtype)


def _is_equal(found: Any, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.dtype == expected.dtype and found.equal(expected)
