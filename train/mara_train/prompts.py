"""The prompts of a run: rows of a data set, in an order that depends on the seed alone."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mara_fast.prompts import is_chat

_TAKEN = {"prompts", "completions", "progress"}
"""Arguments of the scoring of rewards, beside which the columns are given."""


class PromptSet:
    """Prompts and the columns beside them.

    Args:
        rows: a data set or list of rows with a ``prompt`` (a text, or a chat as a list of
            role/content dicts) and any further columns, which reward functions are given; or a
            list of prompts.
        name: of the argument, for errors.

    Raises:
        ValueError: no rows, a row without a prompt or with other columns than the first, or a
            column that no reward function could be given.
    """

    def __init__(self, rows: Iterable[Any], *, name: str = "train_dataset") -> None:
        if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
            raise ValueError(f"{name} must be a data set or a list of rows, got {rows!r}")
        self.name = name
        self.rows = [row if isinstance(row, Mapping) else {"prompt": row} for row in rows]
        self._order: tuple[str, list[int]] = "", []
        """Name and order of the pass that was asked for last."""
        if not self.rows:
            raise ValueError(f"{name} has no rows")
        columns = set(self.rows[0])
        if columns & _TAKEN:
            raise ValueError(
                f"{name} has the column {min(columns & _TAKEN)!r}; rename it: reward functions "
                "have an argument of that name"
            )
        for index, row in enumerate(self.rows):
            prompt = row.get("prompt")
            if prompt is None or prompt == "" or prompt == []:
                raise ValueError(f"row {index} of {name} has no prompt: {dict(row)!r}")
            if not isinstance(prompt, str) and not is_chat(prompt):
                raise ValueError(
                    f"the prompt of row {index} of {name} is {prompt!r}; expected a text or a list "
                    "of role/content dicts"
                )
            if set(row) != columns:
                raise ValueError(
                    f"row {index} of {name} has the columns {_listed(row)}, the first "
                    f"{_listed(columns)}"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, start: int, count: int, *, seed: int) -> list[Mapping[str, Any]]:
        """``count`` rows from the ``start``-th on, of endless passes in an order of their own."""
        chosen: list[Mapping[str, Any]] = []
        while count > 0:
            epoch, offset = divmod(start, len(self.rows))
            part = self._order_of(f"{seed}/{epoch}")[offset : offset + count]
            chosen += [self.rows[index] for index in part]
            start, count = start + len(part), count - len(part)
        return chosen

    def _order_of(self, name: str) -> list[int]:
        """The order of a pass, shuffled once: a pass takes many calls."""
        if self._order[0] != name:
            order = list(range(len(self.rows)))
            random.Random(name).shuffle(order)
            self._order = name, order
        return self._order[1]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows' columns but for the prompt."""
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


def _listed(columns: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, columns)))
