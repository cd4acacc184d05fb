"""The command ``mara-fast inspect``."""

import functools
import tempfile
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mara_fast import cli
from mara_fast.commands import clear_errors
from mara_fast.flags import (
    check_dial_flags,
    chosen_agent,
    config_in_force,
    given_options,
    stdin_prompt,
    with_decoding_flags,
)

if TYPE_CHECKING:
    from mara_fast.engine import Engine
    from mara_fast.inspection.results import TracedResult

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)

_ENGINE_FLAGS = ("dtype", "device", "max_batch_size")
_MOST = 8
"""Counterfactuals of a prompt, if no number is given."""
_NUM_TOKENS = 24
"""Of a counterfactual, if no number is given."""


@app.command(
    epilog="""[bold]Examples[/bold]

    mara-fast inspect "How do I bake bread?"                       in the terminal

    mara-fast inspect "How do I bake bread?" --html bread.html     a page for the browser

    mara-fast generate -i prompts.jsonl -o results.jsonl --trace

    mara-fast inspect -i results.jsonl --id 3 --html results.html
"""
)
@clear_errors()
@with_decoding_flags
def inspect(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt. Without it and without -i: standard input.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Hub id or path; default: tiny, or with --input the one that made it.",
            rich_help_panel="Model",
        ),
    ] = None,
    input_path: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="JSONL of results of generate --trace, not a prompt."),
    ] = None,
    ids: Annotated[
        list[str] | None, typer.Option("--id", help="Of --input only this; repeatable.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page for the browser, and print nothing.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a page that is there.")] = False,
    counterfactuals: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Positions continued without the agent, at most; default: 8, with --input 0, as "
            "it needs the model.",
        ),
    ] = None,
    counterfactual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each, at most; default: 24.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON records.")] = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Show how each token was chosen: candidates, probabilities, verdicts."""
    if input_path is not None and prompt is not None:
        raise ValueError("give a prompt or --input, not both")
    if ids and input_path is None:
        raise ValueError("--id needs --input")
    agent = chosen_agent(flags.pop("agent"), no_agent=flags.pop("no_agent"))
    if counterfactual_tokens is not None and not (
        counterfactuals or (counterfactuals is None and input_path is None)
    ):
        raise ValueError("--counterfactual-tokens needs --counterfactuals of 1 or more")
    _check_page(html, input_path, overwrite=overwrite)
    options = {name: flags.pop(name) for name in _ENGINE_FLAGS}
    preset, config_path = flags.pop("preset"), flags.pop("config_path")
    given = given_options(config_path, preset, flags)
    check_dial_flags(given, agent)
    from mara_fast.inspection.results import TracedResult, read_results, read_settings

    if input_path is not None:
        if given or preset is not None or agent is not None:
            raise ValueError("--input holds results: agent and decoding options have no effect")
        if not counterfactuals:
            _check_no_engine(model, options)
        note = functools.partial(typer.echo, err=True)
        results = read_results(input_path, ids or (), note=note)
        settings = read_settings(input_path)
        most = counterfactuals or 0
        if most:
            engine = _engine(model or _recorded_model(settings, input_path), False, options)
    else:
        prompt = stdin_prompt() if prompt is None else prompt
        engine = _engine(model or "tiny", agent, options)
        config = config_in_force(engine, preset, given | {"trace": True})
        [generation] = engine.generate([prompt], config)
        results = [TracedResult(id=0, generation=generation)]
        # The engine knows which agent a model brings along; only tiny does.
        settings = {"model": model or "tiny", "agent": engine.agent and (agent or "tiny")}
        most = _MOST if counterfactuals is None else counterfactuals
    if most:
        results = _continued(results, engine, counterfactual_tokens or _NUM_TOKENS, most)
    _output(results, settings, html=html, as_json=as_json, has_ids=input_path is not None)
    if input_path is None and results[0].generation.error is not None:
        raise ValueError(results[0].generation.error)


def _check_page(html: Path | None, input_path: Path | None, *, overwrite: bool) -> None:
    if html is None:
        if overwrite:
            raise ValueError("--overwrite needs --html")
        return
    if html.is_dir():
        raise ValueError(f"--html {html} is a folder; name a file in it")
    if input_path is not None and html.exists() and html.samefile(input_path):
        raise ValueError(f"--input and --html are the same file: {html}")
    if html.exists() and not overwrite:
        raise ValueError(f"{html} exists; name another file, or give --overwrite")
    _check_writable(html)


def _check_writable(path: Path) -> None:
    """Raises a ValueError where no file can be made: decoding takes longer than to try."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        if path.exists():
            path.open("ab").close()
        else:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise ValueError(f"--html {path} cannot be written: {error}") from error


def _check_no_engine(model: str | None, options: dict[str, Any]) -> None:
    """Raises a ValueError for settings of an engine that nobody needs."""
    flags = signature(cli.generate).parameters
    given = {"model": model} | {
        name: value for name, value in options.items() if value != flags[name].default
    }
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if names:
        raise ValueError(
            f"{', '.join(names)} without effect: with --input a model is needed only for "
            "--counterfactuals"
        )


def _recorded_model(settings: dict[str, Any], input_path: Path) -> str:
    """The model that a file says it was made by: another would continue what it never said."""
    model = settings.get("model")
    if not isinstance(model, str):
        raise ValueError(f"{input_path}: the model that made these is not recorded: give --model")
    return model


def _engine(model: str, agent: Any, options: dict[str, Any]) -> "Engine":
    from mara_fast.data_parallel import EngineOptions

    return cli.load_engine(
        EngineOptions(model=model, agent=agent, **options), tensor_parallel=False
    )


def _continued(
    results: "list[TracedResult]", engine: "Engine", num_tokens: int, most: int
) -> "list[TracedResult]":
    from mara_fast.inspection.counterfactual import with_counterfactuals
    from mara_fast.inspection.results import TracedResult

    generations = with_counterfactuals(
        [result.generation for result in results],
        engine,
        num_tokens=num_tokens,
        most=most,
        ids=[result.id for result in results],
    )
    return [
        TracedResult(id=result.id, generation=generation)
        for result, generation in zip(results, generations, strict=True)
    ]


def _output(
    results: "list[TracedResult]",
    settings: dict[str, Any],
    *,
    html: Path | None,
    as_json: bool,
    has_ids: bool,
) -> None:
    from mara_fast.inspection.page import html_page
    from mara_fast.jsonl import json_line

    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html_page(
            [result.generation for result in results],
            ids=[result.id for result in results] if has_ids else None,
            settings={name: settings.get(name) for name in ("model", "agent")} if settings else {},
            path=html,
        )
        typer.echo(f"{html}: {len(results)} results, {html.stat().st_size:,} bytes", err=True)
    if as_json:
        for result in results:
            name = {"id": result.id} if has_ids else {}
            typer.echo(json_line(name | result.generation.to_dict()))
    elif html is None:
        from rich.console import Console

        from mara_fast.inspection.terminal import print_generation

        console = Console(highlight=False)
        for result in results:
            title = f"{result.id}  {_line(result.generation.prompt)}" if has_ids else None
            print_generation(result.generation, console, title=title)


def _line(prompt: Any) -> str:
    """A prompt on the line of a heading."""
    from mara_fast.prompts import is_chat

    text = str(prompt[-1]["content"] if is_chat(prompt) else prompt)
    return text if len(text) <= 60 else text[:59] + "…"


if __name__ == "__main__":
    app()
