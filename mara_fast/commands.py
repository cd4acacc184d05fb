"""Commands that other packages add to ``mara-fast``, and how all of them fail.

    entry point in the group mara_fast.commands:
        name = a typer.Typer app of one command, whose module loads nothing heavy

They are looked up when the command line names one, or asks for help.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, distributions
from typing import Any

import typer
from typer.core import TyperGroup

GROUP = "mara_fast.commands"
COMPANIONS = {
    "bench": "mara_fast.bench.cli",
    "eval": "mara_fast.evaluation.cli",
    "inspect": "mara_fast.inspection.cli",
    "train": "mara_train.cli",
}
"""Commands of our own distribution, and the modules that run without an installation."""


class Commands(TyperGroup):
    """The commands of an app, then the ones that are installed beside it."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names; a command that cannot be loaded says why in its place."""
        own = super().list_commands(ctx)
        return [*own, *sorted((_found().keys() | COMPANIONS.keys()) - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, or None."""
        own = super().get_command(ctx, cmd_name)
        return _added(cmd_name) if own is None else own


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a user got wrong is a line and exit status 2, not a traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        # The first two are RuntimeErrors; after the third nobody listens.
        raise
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        # An error of a user's function has a note that says so; any other kind is our mistake.
        if not notes and not isinstance(error, ValueError | OSError | RuntimeError | ImportError):
            raise
        text = f"{type(error).__name__}: {error}" if notes else str(error)
        typer.secho("\n  ".join((f"mara-fast: {text}", *notes)), fg="red", err=True)
        raise typer.Exit(2) from error


def _found() -> dict[str, EntryPoint]:
    # Not entry_points(): of two records of a distribution it sees the first only, and in a source
    # tree that is whatever an earlier build left there.
    found: dict[str, EntryPoint] = {}
    for distribution in distributions():
        for entry in distribution.entry_points.select(group=GROUP):
            found.setdefault(entry.name, entry)
    return found


def _added(name: str) -> Any:
    entry = _found().get(name)
    if entry is None:
        if name not in COMPANIONS:
            return None
        return _unavailable(
            name,
            f"{name} is not installed: install mara-fast anew, or run python -m {COMPANIONS[name]}",
        )
    try:
        app = entry.load()
        if not isinstance(app, typer.Typer):
            raise TypeError(f"expected a typer.Typer, got {type(app).__name__}")
        command = typer.main.get_command(app)
    # It is somebody else's code: whatever is wrong with it, the other commands go on.
    except Exception as error:
        return _unavailable(
            name, f"{name} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}"
        )
    command.name = name
    return command


def _unavailable(name: str, reason: str) -> Any:
    """A command that says, whatever it is given, why there is none."""
    app = typer.Typer(add_completion=False)

    @app.command(
        name,
        help=f"{reason}.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def unavailable(ctx: typer.Context) -> None:
        typer.secho(f"mara-fast: {reason}", fg="red", err=True)
        raise typer.Exit(2)

    return typer.main.get_command(app)
