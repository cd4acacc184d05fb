"""The command ``mara-fast eval``; ``python -m mara_fast.evaluation.cli`` without installation."""

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


@app.command(
    "eval",
    epilog="""[bold]Examples[/bold]

    mara-fast eval benchmarks/paper/table1.yaml --dry-run         Check files, models and prompts

    mara-fast eval benchmarks/paper/table1.yaml -o table1 --path "Llama 3.1-8B=/weights/llama"

    mara-fast eval benchmarks/paper/table1.yaml -o trial --limit 20     20 prompts of each data set
""",
)
def evaluate(
    spec_path: Annotated[
        Path, typer.Argument(metavar="SPEC", help="YAML of systems, data sets and a judge.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of answers, scores and the report."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work", help="Folder of answers and scores, shared with other specs; else the output."
        ),
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option("--path", metavar="NAME=PLACE", help="Where a name of the spec's paths is."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each data set, for trials.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and check what can be.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Forget the answers and scores that are there.")
    ] = False,
) -> None:
    """Compare systems: answers, scores, preference rates and a report. Resumes by itself."""
    with clear_errors():
        from rich.console import Console

        from mara_fast.evaluation import report
        from mara_fast.evaluation.datasets import counts
        from mara_fast.evaluation.evaluate import evaluate
        from mara_fast.evaluation.plan import make_plan
        from mara_fast.evaluation.spec import EvalSpec

        paths = {}
        for text in path or ():
            name, equals, place = text.partition("=")
            if not (name and equals and place):
                raise ValueError(f"--path {text!r} is not allowed; expected name=place")
            paths[name] = place
        spec = EvalSpec.read(spec_path, paths=paths)
        console = Console()
        if dry_run:
            folders = [folder for folder in (output, work) if folder is not None]
            for dataset in make_plan(spec, limit=limit, folders=folders).datasets:
                numbers = len(dataset.records), dataset.num_unique, dataset.num_rows
                typer.echo(f"{dataset.name}: {counts(*numbers)}")
            for name, system in spec.systems.items():
                typer.echo(
                    f"{name}: {system.model}" + (f", agent {system.agent}" * bool(system.agent))
                )
            return
        if output is None:
            raise ValueError("--output is missing: a folder for answers, scores and the report")
        try:
            found = evaluate(spec, output, limit=limit, overwrite=overwrite, work=work)
        except KeyboardInterrupt:
            typer.echo(
                f"interrupted: what is there is in {work or output}; the same command"
                f"{' without --overwrite' * overwrite} goes on",
                err=True,
            )
            raise typer.Exit(130) from None
        for table in report.tables(found):
            console.print(report.for_terminal(table))
        typer.echo(f"{output / 'report.md'}, {output / 'report.html'}, {output / 'report.json'}")


if __name__ == "__main__":
    app()
