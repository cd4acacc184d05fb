"""Checks of options, where they enter: the option, what was given, what is allowed."""

import dataclasses
import difflib
import math
import numbers
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints


def known_options(record: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if all are fields of the dataclass; else a ValueError naming the closest."""
    names = [field.name for field in dataclasses.fields(record)]
    if not isinstance(options, Mapping):
        raise ValueError(f"options must be a mapping of names to values, got {options!r}")
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"unknown option {name!r}{hint} Allowed: {', '.join(names)}")
    return dict(options)


def from_yaml(text: str) -> Any:
    """The value of a YAML text, in which 1e-3 is a number as in YAML 1.2, not a text as in 1.1.

    Raises:
        ValueError: not valid YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's, with other floats, and every key of a mapping once."""

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            assert node is not None
            # Here keys are those of the text: later on `<<` adds what they override.
            names = [(key.tag, key.value) for key, _ in node.value]
            for tag, name in names:
                if names.count((tag, name)) > 1:
                    raise ValueError(f"{name} is given twice")
            return node

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            super().flatten_mapping(node)
            # The last of a key holds. PyYAML 6.0.4 takes the first where a name is one character
            # and the mapping, itself with a merge in it, is merged again.
            last = {
                (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key): (key, value)
                for key, value in node.value
            }
            node.value = list(last.values())

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def is_int(value: object) -> bool:
    """An integer that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A number that is no bool, and finite as a float."""
    if isinstance(value, int):
        return is_int(value) and abs(value) < 10**300
    return isinstance(value, float) and math.isfinite(value)


def plain(value: Any) -> Any:
    """numpy's numbers as Python's, which JSON knows; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def text_of_path(value: Any) -> Any:
    """Paths as texts, also in a list; anything else as it is."""
    if isinstance(value, list | tuple):
        return [text_of_path(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def several(value: Any, one: type) -> tuple:
    """One value or several as a tuple; what is neither as a tuple of itself, to be refused."""
    if isinstance(value, one | str | bytes | Mapping) or not isinstance(value, Iterable):
        return (value,)
    return tuple(value)


def check(
    name: str,
    value: Any,
    is_kind: Any,
    allowed: str,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raises a ValueError unless the value is of its kind and within its bounds."""
    if not is_kind(value) or not (minimum <= value <= maximum and above < value < below):
        raise ValueError(f"{name}={value!r} is not allowed; allowed: {allowed}")


def make_floats(record: Any) -> None:
    """Gives the fields annotated as floats floats: integers have a range of their own."""
    for name, hint in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if float in (hint, *get_args(hint)) and is_int(value) and is_number(value):
            object.__setattr__(record, name, float(value))


def check_choices(record: Any) -> None:
    """Raises a ValueError unless every field annotated as a Literal or bool has such a value."""
    for name, hint in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(
                f"{name}={value!r} is not known; allowed: {', '.join(map(str, get_args(hint)))}"
            )
        if hint is bool:
            check(name, value, lambda value: isinstance(value, bool), "a bool")
