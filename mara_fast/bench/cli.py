"""The command ``mara-fast bench``."""

from pathlib import Path
from typing import Annotated

import typer

from mara_fast.commands import clear_errors

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)


def _from_file(context: typer.Context, path: Path | None) -> Path | None:
    """The file's options become the command's defaults."""
    if path is not None:
        from mara_fast.bench.spec import BenchSpec

        with clear_errors():
            context.obj = BenchSpec.read(path)
        context.default_map = dict(context.obj.options)
    return path


@app.command(
    epilog="""[bold]Examples[/bold]

    mara-fast bench --targets

    mara-fast bench --model llama-3.1-8b --batch-sizes 1,16,64 --output-json bench.json
"""
)
@clear_errors()
def bench(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            is_eager=True,
            callback=_from_file,
            help="YAML file of these options, which those given here go before; "
            "see benchmarks/paper/speed.yaml.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Shape of a random model (50m, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, "
            "mistral-7b), or hub id or path of a real one, which needs an --agent.",
        ),
    ] = "50m",
    agent: Annotated[
        str | None, typer.Option("--agent", "-a", help="Of a real model: folder or hub id.")
    ] = None,
    aligner: Annotated[
        str | None,
        typer.Option(
            help="Shape of the Aligner's second model, or of a real model's a hub id or path; "
            "without it aligner-7b for models of 1B and more, else the model itself."
        ),
    ] = None,
    dataset_path: Annotated[
        str | None,
        typer.Option(help="JSON or JSONL of prompts, of a real model; without it random tokens."),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,16",
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a random prompt.")] = 64,
    output_len: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 48,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="For each batch size; without it --prompts-per-slot.")
    ] = None,
    prompts_per_slot: Annotated[
        int, typer.Option(min=1, help="Prompts of a batch size, by slot.")
    ] = 8,
    num_serial_prompts: Annotated[
        int, typer.Option(min=1, help="Of them for the authors' cascade, which takes its time.")
    ] = 2,
    num_iters: Annotated[
        int, typer.Option(min=1, help="Measured rounds, all systems in turn.")
    ] = 5,
    dtype: Annotated[str, typer.Option(help="auto: float32 on a CPU, bfloat16 on a GPU.")] = "auto",
    device: Annotated[str, typer.Option(help="auto: a GPU if there is one.")] = "auto",
    forced: Annotated[
        float, typer.Option(min=0, max=1, help="Positions with one candidate, of a random model.")
    ] = 0.33,
    rank0: Annotated[
        float, typer.Option(min=0, max=1, help="Rank 0 accepted, of a random model.")
    ] = 0.7,
    systems: Annotated[
        str | None, typer.Option(help="Comma-separated numbers of systems; see --list-systems.")
    ] = None,
    list_systems: Annotated[bool, typer.Option(help="Show the systems and leave.")] = False,
    compile: Annotated[bool, typer.Option(help="Compile our engine's steps.")] = False,
    cuda_graph: Annotated[bool, typer.Option(help="Replay our engine's steps as graphs.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch, on a CPU.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and prompts.")] = 0,
    targets: Annotated[bool, typer.Option(help="Say which targets are met.")] = False,
    output_json: Annotated[
        Path | None, typer.Option(dir_okay=False, help="JSON; a PNG is written beside it.")
    ] = None,
) -> None:
    """Measure decoding: ours, transformers, the authors' cascade and the Aligner, in one run."""
    from mara_fast.bench.run import BenchConfig, run
    from mara_fast.bench.spec import BenchSpec
    from mara_fast.bench.systems import SYSTEMS

    if list_systems:
        for number, name in enumerate(SYSTEMS, start=1):
            typer.echo(f"{number}  {name}")
        return
    spec = context.obj or BenchSpec()
    run(
        BenchConfig(
            model=model,
            agent=agent,
            aligner=aligner,
            dataset_path=dataset_path,
            batch_sizes=batch_sizes,
            input_len=input_len,
            output_len=output_len,
            num_prompts=num_prompts,
            prompts_per_slot=prompts_per_slot,
            num_serial_prompts=num_serial_prompts,
            num_iters=num_iters,
            dtype=dtype,
            device=device,
            forced=forced,
            rank0=rank0,
            systems=systems,
            compile=compile,
            cuda_graph=cuda_graph,
            threads=threads,
            seed=seed,
        ),
        show_targets=targets,
        output=output_json,
        paper=spec.paper,
        notes=spec.notes,
    )


if __name__ == "__main__":
    app()
