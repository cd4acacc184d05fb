"""The command ``mara-fast train``; ``python -m mara_train.cli`` where nothing is installed."""

import os
import shlex
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mara_fast.commands import clear_errors

if TYPE_CHECKING:
    from mara_train.recipe import Recipe

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)


class Preset(StrEnum):
    """Named training options."""

    default = "default"
    official = "official"


@app.command(
    epilog="""[bold]Examples[/bold]

    mara-fast train -m tiny --train-data tiny --eval-data tiny -r my_rewards:helpful

    mara-fast train -c run.yaml sac.gamma=0.9 num_episodes=5000     a file, some options changed

    mara-fast train -c mara-output/run.yaml --resume                from the newest checkpoint
"""
)
def train(
    ctx: typer.Context,
    assignments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Options of the run, values in YAML: num_episodes=5000 sac.gamma=0.9.",
        ),
    ] = None,
    config_path: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="YAML with model, agent, rewards, train_dataset, eval_dataset and the options of "
            "MaraConfig by name; KEY=VALUE and flags win.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub id or path, or tiny.")
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option("--agent", "-a", help="Agent to train further; without it a new one."),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            "-r",
            help="Hub id or path of a reward model, or module:function; repeatable.",
        ),
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(
            help="JSONL of objects with prompt, messages or instruction; or tiny, the "
            "instructions of the tiny world.",
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="The same, of held-out prompts to evaluate on.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the run.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the folder.")
    ] = False,
    preset: Annotated[
        Preset | None, typer.Option(help="Our options, or the authors' code's.")
    ] = None,
) -> None:
    """Train an agent for a frozen language model against reward models or functions."""
    flags = {
        "model": model,
        "agent": agent,
        "rewards": reward or None,
        "train_dataset": train_data,
        "eval_dataset": eval_data,
        "output_dir": output,
        "preset": preset.value if preset else None,
    }
    with clear_errors():
        from mara_train.recipe import Recipe, read_options

        # As Ctrl-C: what is there is kept, and the way to go on is said.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        recipe = Recipe.from_dict(read_options(config_path, assignments or (), flags))
        folder = Path(recipe.config.output_dir)
        try:
            _run(recipe, folder, resume=resume)
        except KeyboardInterrupt:
            typer.echo(f"interrupted: {_how_to_go_on(ctx, folder)}", err=True)
            raise typer.Exit(130) from None
        _say_where(folder)


def _run(recipe: "Recipe", folder: Path, *, resume: bool) -> None:
    """Everything that can be wrong is looked at before the language model is loaded."""
    from mara_fast.rewards.named import load_rewards
    from mara_train import checkpoint
    from mara_train.prompts import PromptSet
    from mara_train.recipe import load_rows
    from mara_train.report import check_trackers
    from mara_train.run_folder import (
        check_continues,
        check_place,
        check_unused,
        fingerprint,
        locked,
    )

    check_place(folder)
    newest = checkpoint.find(folder, True) if resume else None
    if newest is None:
        check_unused(folder)
    recipe.check_beside(folder, resume=resume)
    check_trackers(recipe.config.report_to)
    data = {
        name: load_rows(spec, name=name)
        for name in ("train_dataset", "eval_dataset")
        if (spec := getattr(recipe, name)) is not None
    }
    prompts = {name: PromptSet(rows, name=name) for name, rows in data.items()}
    if newest is not None:
        facts = {"train_dataset": fingerprint(prompts["train_dataset"].rows)}
        check_continues(newest, checkpoint.read_state(newest), recipe.config, facts)
    # A console script does not look for modules in the current folder by itself.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    rewards = load_rewards(recipe.rewards)

    from transformers.utils import logging

    from mara_fast.agent import MaraAgent
    from mara_train.trainer import MaraTrainer

    agent = None if recipe.agent is None else MaraAgent.from_pretrained(recipe.agent)
    logging.disable_progress_bar()
    trainer = MaraTrainer(
        recipe.model,
        rewards,
        recipe.config,
        agent=agent,
        train_dataset=data["train_dataset"],
        eval_dataset=data.get("eval_dataset"),
    )
    if newest is not None:
        trainer.load_checkpoint(newest)
    with locked(folder):
        recipe.write(folder)
    trainer.train()


def _how_to_go_on(ctx: typer.Context, folder: Path) -> str:
    from mara_train import checkpoint
    from mara_train.recipe import RECIPE_NAME

    found = checkpoint.checkpoints(folder)
    if not found:
        return f"there is no checkpoint in {folder} yet; the same command starts anew"
    command = f"{ctx.command_path} --config {shlex.quote(str(folder / RECIPE_NAME))} --resume"
    return f"the newest checkpoint is {found[-1]}; go on with\n  {command}"


def _say_where(folder: Path) -> None:
    from mara_train.plots import PLOT_NAME
    from mara_train.report import METRICS_NAME

    for name, path in (("agent", "agent"), ("metrics", METRICS_NAME), ("plot", PLOT_NAME)):
        if (folder / path).exists():
            typer.echo(f"{name:<8} {folder / path}")


if __name__ == "__main__":
    app()
