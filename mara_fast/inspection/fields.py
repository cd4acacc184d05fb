"""Plain values as the dataclass they are a record of, every one checked against its field.

    int       an integer in [0, 2**63)          float     a finite number
    X | None  X, or null                        Literal   one of its values
    list[X], tuple[X, ...], dict[int, int], another dataclass: likewise, all the way down

A reader is made once for each type: a file of traces has millions of values.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cache
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from mara_fast.options import is_int, is_number

Reader = Callable[[Any], Any]

_BOUNDS = {
    # A sum of rounded numbers may be slightly above 0.
    "logprob": (-math.inf, 1e-3, "a number <= 0"),
    "accept_prob": (0.0, 1.0, "a number in [0, 1]"),
    "seconds": (0.0, math.inf, "a number >= 0"),
}
"""Of numbers by the name of their field."""
_MOST = 2**63


class Misfit(ValueError):
    """A value that its field does not allow.

    Args:
        value: what was given.
        allowed: in words.
        place: of the value within the record.
    """

    def __init__(self, value: Any, allowed: str, place: str = "") -> None:
        text = repr(value)
        shown = text if len(text) <= 60 else f"{text[:59]}…"
        super().__init__(f"{place.lstrip('.')} is {shown}; allowed: {allowed}")
        self.value, self.allowed, self.place = value, allowed, place

    def within(self, place: str) -> "Misfit":
        """The same, seen from outside."""
        return Misfit(self.value, self.allowed, place + self.place)


@cache
def reader_of(record: type) -> Reader:
    """What makes this dataclass of a mapping; keys that are no fields are ignored.

    Its reader raises a :class:`Misfit` that names the field, what it is and what is allowed.
    """
    hints = get_type_hints(record)
    readers = [
        (item.name, reader(hints[item.name], item.name), _is_required(item))
        for item in dataclasses.fields(record)
    ]

    def read(values: Any) -> Any:
        if not isinstance(values, Mapping):
            raise Misfit(values, "an object")
        found = {}
        for name, read_field, required in readers:
            if name in values:
                try:
                    found[name] = read_field(values[name])
                except Misfit as misfit:
                    raise misfit.within(f".{name}") from None
            elif required:
                raise Misfit(sorted(map(str, values)), f"an object with {name!r}")
        return record(**found)

    return read


def reader(hint: Any, name: str) -> Reader:
    """What reads a value of this annotation, in a field of this name."""
    kinds, origin = get_args(hint), get_origin(hint)
    if NoneType in kinds:
        [kind] = [kind for kind in kinds if kind is not NoneType]
        return _optional(reader(kind, name))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return reader_of(hint)
    if origin is Literal:
        return _one_of(lambda value: isinstance(value, str) and value in kinds, ", ".join(kinds))
    if origin in (list, tuple):
        return _several(origin, reader(kinds[0], name))
    if hint == dict[int, int]:
        return _histogram
    if origin is dict:
        return _one_of(lambda value: isinstance(value, Mapping), "an object")
    if hint is float:
        return _logprob if name == "logprob" else _number(name)
    return {int: _integer, str: _text, bool: _bool}[hint]


def _is_required(item: Any) -> bool:
    return item.default is item.default_factory is dataclasses.MISSING


def _one_of(is_allowed: Callable[[Any], bool], allowed: str) -> Reader:
    def read(value: Any) -> Any:
        if not is_allowed(value):
            raise Misfit(value, allowed)
        return value

    return read


_integer = _one_of(lambda value: is_int(value) and 0 <= value < _MOST, "an integer in [0, 2**63)")
_text = _one_of(lambda value: isinstance(value, str), "a text")
_bool = _one_of(lambda value: isinstance(value, bool), "true or false")


def _number(name: str) -> Reader:
    low, high, allowed = _BOUNDS.get(name, (-math.inf, math.inf, "a finite number"))

    def read(value: Any) -> float:
        if not is_number(value) or not low <= value <= high:
            raise Misfit(value, allowed)
        return float(value)

    return read


_finite_logprob = _number("logprob")


def _logprob(value: Any) -> float:
    # JSON has no infinity.
    return -math.inf if value is None or value == -math.inf else _finite_logprob(value)


def _optional(read: Reader) -> Reader:
    def read_or_none(value: Any) -> Any:
        try:
            return None if value is None else read(value)
        except Misfit as misfit:
            if misfit.place:
                raise
            raise Misfit(value, f"{misfit.allowed}, or null") from None

    return read_or_none


def _several(kind: Callable[[list], Any], read: Reader) -> Reader:
    def read_all(values: Any) -> Any:
        if not isinstance(values, list | tuple):
            raise Misfit(values, "a list")
        found: list[Any] = []
        try:
            for value in values:
                found.append(read(value))
        except Misfit as misfit:
            raise misfit.within(f"[{len(found)}]") from None
        return kind(found)

    return read_all


def _histogram(values: Any) -> dict[int, int]:
    if not isinstance(values, Mapping):
        _refuse_histogram(values)
    found = {}
    for key, count in values.items():
        digits = str(key)
        if not digits.isascii() or not digits.isdecimal() or len(digits) > 18:
            _refuse_histogram(values)
        try:
            found[int(digits)] = _integer(count)
        except Misfit as misfit:
            raise misfit.within(f".{digits}") from None
    return found


def _refuse_histogram(values: Any) -> NoReturn:
    raise Misfit(values, "an object of counts by integer")
