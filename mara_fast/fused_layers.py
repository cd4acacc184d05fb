"""A model's norms and rotations, a launch each instead of about ten, while the engine runs it.

Which of its modules and functions may be exchanged is found out on the model itself: those that
are equal, to the bit, to a definition in :mod:`mara_kernels.layers`. Anything else runs as it is.
"""

import copy
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_exchanges: dict[tuple[Any, str], Exchange] = {}


class _ThisThread(threading.local):
    current: "FusedLayers | None" = None
    """Of the forward that runs."""


_this_thread = _ThisThread()


class FusedLayers:
    """What can be exchanged of a model. It is as long as this lives: a compiler in another thread
    could not bear that it changes with every forward.

    Args:
        body: on the device and in the dtype that it decodes in.
    """

    def __init__(self, body: nn.Module) -> None:
        with torch.inference_mode():
            self._rules = _norms(body)
            self._dtype, self._files = next(body.parameters()).dtype, _rotations(body)
        owners: dict[tuple[Any, str], Callable[[Exchange, Callable], Callable]] = {}
        for kind in dict.fromkeys(map(type, self._rules)):
            owner = next(base for base in kind.__mro__ if "forward" in vars(base))
            owners[owner, "forward"] = _make_norm
        for file in self._files:
            owners[file, _ROTATE] = _make_rotation
        with _lock:
            for key, make in owners.items():
                if key not in _exchanges:
                    _exchanges[key] = Exchange(*key, make)
        mine = [_exchanges[key] for key in owners]
        for exchange in mine:
            exchange.install()
        weakref.finalize(self, _uninstall, mine)
        self.names = tuple(f"{owner.__name__}.{name}" for owner, name in owners)
        """What is exchanged, for people."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, this thread's forwards of the model run them fused."""
        before, _this_thread.current = _this_thread.current, self
        try:
            yield
        finally:
            _this_thread.current = before

    def rule_of(self, module: nn.Module) -> NormRule | None:
        """Of a norm of this model that is one of ours; None: of any other."""
        return self._rules.get(module)

    def turns(self, file: Any, dtype: torch.dtype) -> bool:
        """Whether a modeling file's rotation is ours, in a dtype."""
        return file in self._files and dtype == self._dtype


def _uninstall(exchanges: list[Exchange]) -> None:
    for exchange in exchanges:
        exchange.uninstall()


def _current() -> FusedLayers | None:
    """None where a compiler looks: it fuses by itself."""
    return None if torch.compiler.is_compiling() else _this_thread.current


def _make_norm(exchange: Exchange, before: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, *states: Any, **options: Any) -> Tensor:
        current = _current()
        if current is not None and len(states) == 1 and not options:
            [x], rule = states, current.rule_of(self)
            weight = self.weight
            if rule is not None and weight.dtype == x.dtype and weight.shape == x.shape[-1:]:
                return rms_norm(x, weight, eps=_eps_of(self), rule=rule)
        return before(self, *states, **options)

    return forward


def _make_rotation(exchange: Exchange, before: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*inputs: Any, **options: Any) -> Any:
        current = _current()
        if current is None or options or not _is_plain(*inputs):
            return before(*inputs, **options)
        if not current.turns(exchange.owner, inputs[0].dtype):
            return before(*inputs)
        return rotate(*inputs)

    return apply


def _is_plain(*inputs: Any) -> bool:
    """Whole heads, by angles of every position in the same precision."""
    if len(inputs) != 4 or not all(isinstance(one, Tensor) for one in inputs):
        return False
    query, key, cos, sin = inputs
    return (
        query.ndim == key.ndim == 4
        and cos.ndim == 3
        and query.shape[0] == key.shape[0]
        and query.shape[2:] == key.shape[2:] == cos.shape[1:]
        and cos.shape == sin.shape
        and cos.shape[0] in (1, query.shape[0])
        and query.dtype == key.dtype == cos.dtype == sin.dtype
    )


def _norms(body: nn.Module) -> dict[nn.Module, NormRule]:
    """Modules that are norms of ours. Each for itself: their classes may do more."""
    found = {}
    for module in body.modules():
        if type(module).__name__.endswith("Norm") and not isinstance(module, nn.LayerNorm):
            rule = _rule_of(module)
            if rule is not None:
                found[module] = rule
    return found


def _rule_of(module: nn.Module) -> NormRule | None:
    """The definition that a module is equal to, whatever its factors are."""
    weight = module._parameters.get("weight")
    is_simple = not list(module.children()) and "forward" not in vars(module)
    if weight is None or weight.ndim != 1 or not is_simple:
        return None
    try:
        # Factors that differ from each other and from one: its own may all be that, yet.
        probe = copy.copy(module)
        factors = _ramp(weight.shape, weight)
        probe._parameters = module._parameters | {"weight": nn.Parameter(factors)}
        x = _ramp((3, weight.shape[0]), weight)
        wanted = probe.forward(x)
        for rule in _RULES:
            if _is_equal(wanted, reference.rms_norm(x, factors, eps=_eps_of(module), rule=rule)):
                return rule
    # Whatever it is that a foreign module wants, it is no norm of ours.
    except Exception as error:
        _logger.debug("%s is left as it is: %s", type(module).__name__, error)
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
        except Exception as error:
            _logger.debug("%s of %s is left as it is: %s", _ROTATE, name, error)
    return found


def _ramp(size: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers of both signs, none like another nearby."""
    count = torch.arange(1, 1 + torch.Size(size).numel(), device=like.device)
    return (3 * torch.sin(count * 1.7)).reshape(size).to(like.dtype)


def _is_equal(found: Any, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.dtype == expected.dtype and found.equal(expected)
