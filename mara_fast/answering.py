"""The ways ``mara-fast generate`` answers: one prompt as it is decided, or many, into a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from tqdm import tqdm

from mara_fast.alarms import alarms
from mara_fast.config import DecodingConfig
from mara_fast.jsonl import NoFile, PromptRecord, ResultFile, json_line
from mara_fast.outputs import DecodingStats, Generation
from mara_fast.prompts import PromptError
from mara_fast.tensor_parallel import is_first, told_by_first

if TYPE_CHECKING:
    from mara_fast.data_parallel import ParallelEngine
    from mara_fast.engine import Engine

    AnyEngine = Engine | ParallelEngine


def answer(
    engine: "Engine", config: DecodingConfig, prompt: Any, *, as_json: bool, stats: bool
) -> None:
    """One prompt to standard output, as it is decided."""
    generation = None
    for event in engine.stream(prompt, config):
        generation = event.generation
        if not as_json:
            typer.echo(event.text, nl=False)
    assert generation is not None
    if as_json:
        typer.echo(json_line(generation.to_dict()))
    else:
        typer.echo()
    if stats:
        typer.echo(summary(generation.stats), err=True)
    _raise_alarms(generation.stats, config)
    if generation.error is not None:
        raise ValueError(generation.error)


def answer_lines(
    engine: "AnyEngine",
    config: DecodingConfig,
    records: list[PromptRecord],
    *,
    stats: bool,
) -> None:
    """Results to standard output, in order of completion."""
    total, failed = DecodingStats(), 0
    for index, generation in _started(engine, config, records):
        typer.echo(json_line({"id": records[index].id} | generation.to_dict()))
        total += generation.stats
        failed += generation.error is not None
    if stats:
        typer.echo(summary(total), err=True)
    _raise_alarms(total, config)
    if failed:
        raise ValueError(f"{failed} prompts ended in an error")


def answer_file(
    engine: "AnyEngine",
    config: DecodingConfig,
    records: list[PromptRecord],
    output_path: Path,
    settings: dict[str, Any],
    *,
    overwrite: bool,
) -> None:
    """Records to the output file."""
    with (
        ResultFile(output_path, records=records, settings=settings, overwrite=overwrite)
        if is_first()
        else NoFile()
    ) as results:
        results.done = told_by_first(results.done)
        todo = [record for record in records if record.id not in results.done]
        total, failed = DecodingStats(), 0
        with tqdm(total=len(records), initial=len(records) - len(todo), unit="prompt") as bar:
            try:
                for index, generation in _started(engine, config, todo):
                    results.write(todo[index].id, generation)
                    total += generation.stats
                    failed += generation.error is not None
                    bar.update()
                    bar.set_postfix(tokens=total.num_tokens, refresh=False)
            except KeyboardInterrupt:
                bar.close()
                typer.echo(
                    f"interrupted: {len(results.done)} of {len(records)} results are in "
                    f"{output_path}; the same command goes on from there",
                    err=True,
                )
                raise typer.Exit(130) from None
    typer.echo(f"{output_path}: {len(records)} results; {summary(total)}", err=True)
    _raise_alarms(total, config)
    if failed:
        raise ValueError(f"{failed} prompts ended in an error; see error in {output_path}")


def _started(
    engine: "AnyEngine", config: DecodingConfig, records: list[PromptRecord]
) -> Iterator[tuple[int, Generation]]:
    """The run over some records; what is wrong with a prompt is said of its record."""
    try:
        return engine.as_completed(
            [record.prompt for record in records],
            config,
            sequence_ids=[record.sequence for record in records],
        )
    except PromptError as error:
        record = records[error.index]
        raise ValueError(f"{record.where}: prompt {record.id!r}{error.problem}") from error


def _raise_alarms(stats: DecodingStats, config: DecodingConfig) -> None:
    """Says once what looks wrong with a whole run."""
    for text in alarms(stats, config):
        typer.echo(f"alarm: {text}", err=True)


def summary(stats: DecodingStats) -> str:
    if not stats.num_tokens:
        return "no new tokens"
    text = f"{stats.num_tokens} tokens, {stats.forwards_per_token:.2f} forwards per token"
    if stats.num_decided:
        text += (
            f", rank 0 accepted {stats.rank0_accepted_frac:.0%}, "
            f"all rejected {stats.num_all_rejected / stats.num_decided:.0%} of decided positions"
        )
    return text
