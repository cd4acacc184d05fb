"""The command ``mara-fast``."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mara_fast.commands import Commands, clear_errors
from mara_fast.flags import (
    DECODING,
    MODEL,
    Preset,
    check_dial_flags,
    chosen_agent,
    config_in_force,
    given_options,
    stdin_prompt,
)

if TYPE_CHECKING:
    from mara_fast.data_parallel import EngineOptions
    from mara_fast.engine import Engine

app = typer.Typer(
    name="mara-fast",
    cls=Commands,
    help="Exact, fast decode-time alignment of frozen language models (MARA).",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)


_FILES = "Files"


@app.command(
    epilog="""[bold]Examples[/bold]

    mara-fast generate "How do I bake bread?"                      the embedded tiny model

    echo "How do I bake bread?" | mara-fast generate                prompt from standard input

    mara-fast generate -m org/model -a org/agent "Hello"            any causal LM, any agent

    mara-fast generate -m org/model -a org/kind -a org/terse --agent-weight 2 --agent-weight 1 "Hi"

    mara-fast generate -m org/model --no-agent "Hello"              plain decoding

    mara-fast generate -i prompts.jsonl -o answers.jsonl            many; run again to resume
"""
)
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt. Without it and without -i: standard input.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Hub id or path.", rich_help_panel=MODEL)
    ] = "tiny",
    agent: Annotated[
        list[str] | None,
        typer.Option(
            "--agent",
            "-a",
            help="Hub id or folder of a MARA agent; repeatable: they decide together.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    no_agent: Annotated[
        bool, typer.Option("--no-agent", help="Decode plainly.", rich_help_panel=MODEL)
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=MODEL)
    ] = "auto",
    max_batch_size: Annotated[
        int, typer.Option(help="Sequences decoded at once.", rich_help_panel=MODEL)
    ] = 16,
    num_gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --input: so many engines, one per GPU (without GPUs: processes), by Ray.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    tensor_parallel: Annotated[
        bool,
        typer.Option(
            "--tensor-parallel",
            help="The model over all processes: torchrun --nproc-per-node N -m mara_fast.cli ...",
            rich_help_panel=MODEL,
        ),
    ] = False,
    input_path: Annotated[
        Path | None,
        typer.Option(
            "--input",
            "-i",
            help="JSONL of objects with prompt, messages or instruction, and an optional id.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    output_path: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="JSONL of results, one line each as it is done. Ids already in it are skipped.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Empty the output first.", rich_help_panel=_FILES)
    ] = False,
    config_path: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="YAML with the options below by name (top_k: 20); flags win.",
            rich_help_panel=DECODING,
        ),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(help="The paper's, or the authors' code's.", rich_help_panel=DECODING),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer.", rich_help_panel=DECODING)
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="No end before so many.", rich_help_panel=DECODING)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Candidates by rank; 0: all.", rich_help_panel=DECODING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Candidates by mass.", rich_help_panel=DECODING)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits.", rich_help_panel=DECODING)
    ] = None,
    acceptance: Annotated[
        str | None, typer.Option(help="greedy or sample.", rich_help_panel=DECODING)
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Accept probability needed, in (0, 1).", rich_help_panel=DECODING),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="Among the accepted: first, max_prob, random.", rich_help_panel=DECODING),
    ] = None,
    fallback: Annotated[
        str | None,
        typer.Option(help="All rejected: last, first, max_prob.", rich_help_panel=DECODING),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(help="descending, reverse, top_last.", rich_help_panel=DECODING),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Candidates per forward: auto or a number.", rich_help_panel=DECODING),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Key of every draw.", rich_help_panel=DECODING)
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends an answer; repeatable.", rich_help_panel=DECODING),
    ] = None,
    ignore_eos: Annotated[
        bool | None,
        typer.Option("--ignore-eos", help="Go on after EOS.", rich_help_panel=DECODING),
    ] = None,
    prompt_format: Annotated[
        str | None, typer.Option(help="auto, chat, raw, official.", rich_help_panel=DECODING)
    ] = None,
    agent_weight: Annotated[
        list[float] | None,
        typer.Option(help="One per --agent, in order; 0: unasked.", rich_help_panel=DECODING),
    ] = None,
    agent_combination: Annotated[
        str | None,
        typer.Option(help="Of several agents: logit, product, min.", rich_help_panel=DECODING),
    ] = None,
    max_fallback_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of positions without an accepted candidate that raises an alarm; 1: none.",
            rich_help_panel=DECODING,
        ),
    ] = None,
    max_repetition: Annotated[
        float | None,
        typer.Option(
            help="Share of repeated tokens that raises an alarm; 1: none.",
            rich_help_panel=DECODING,
        ),
    ] = None,
    kl_budget: Annotated[
        float | None,
        typer.Option(
            help="Nats per token likelier than to the model that raise an alarm.",
            rich_help_panel=DECODING,
        ),
    ] = None,
    trace: Annotated[
        bool | None,
        typer.Option("--trace", help="Record every candidate in the JSON.", rich_help_panel=_FILES),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON record, not the text.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print statistics to stderr.")] = False,
) -> None:
    """Answer a prompt, or a file of prompts, with a language model and an agent."""
    flags = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "top_k": top_k,
        "top_p": top_p,
        "temperature": temperature,
        "acceptance": acceptance,
        "threshold": threshold,
        "strategy": strategy,
        "fallback": fallback,
        "order": order,
        "window": window,
        "seed": seed,
        "stop": stop,
        "ignore_eos": ignore_eos,
        "prompt_format": prompt_format,
        "agent_weight": agent_weight,
        "agent_combination": agent_combination,
        "max_fallback_rate": max_fallback_rate,
        "max_repetition": max_repetition,
        "kl_budget": kl_budget,
        "trace": trace,
    }
    with ExitStack() as stack, clear_errors():
        from mara_fast.tensor_parallel import check_alone, check_processes, silenced

        if num_gpus is not None and input_path is None:
            raise ValueError("--num-gpus needs --input; one prompt is for one engine")
        if num_gpus is not None and tensor_parallel:
            raise ValueError("give --num-gpus or --tensor-parallel, not both")
        if output_path is not None and input_path is None:
            raise ValueError("--output needs --input; a single answer goes to standard output")
        if overwrite and output_path is None:
            raise ValueError("--overwrite needs --output")
        if trace and input_path is None and not as_json:
            raise ValueError("--trace needs --json or --input")
        if input_path is not None and prompt is not None:
            raise ValueError("give a prompt or --input, not both")
        chosen = chosen_agent(agent, no_agent=no_agent)
        if input_path is None:
            prompt = stdin_prompt() if prompt is None else prompt
        if tensor_parallel:
            if check_processes():
                stack.enter_context(silenced())
        else:
            check_alone()
        given = given_options(config_path, preset, flags)
        check_dial_flags(given, chosen)
        if input_path is not None:
            from mara_fast.jsonl import read_prompts

            records = read_prompts(input_path)
            if output_path is not None and _same_file(input_path, output_path):
                raise ValueError(f"--input and --output are the same file: {input_path}")
        from mara_fast.answering import answer, answer_file, answer_lines
        from mara_fast.data_parallel import EngineOptions, ParallelEngine

        engine_options = EngineOptions(
            model=model,
            agent=chosen,
            dtype=dtype,
            device=device,
            max_batch_size=max_batch_size,
        )
        source: Any
        if num_gpus is None:
            source = load_engine(engine_options, tensor_parallel=tensor_parallel)
        else:
            source = ParallelEngine(engine_options, num_workers=num_gpus)
        config = config_in_force(source, preset, given)
        if input_path is None:
            answer(source, config, prompt, as_json=as_json, stats=stats)
        elif output_path is None:
            answer_lines(source, config, records, stats=stats)
        else:
            settings = {
                "model": model,
                "agent": None if source.agent is None else chosen or "tiny",
                "dtype": str(source.dtype),
            }
            settings |= config.token_options()
            answer_file(source, config, records, output_path, settings, overwrite=overwrite)


@app.command(
    epilog="""[bold]Example[/bold]

    mara-fast convert actor.pth my-agent --base-model mistralai/Mistral-7B-Instruct-v0.3
"""
)
def convert(
    actor: Annotated[Path, typer.Argument(help="The authors' actor .pth.")],
    directory: Annotated[Path, typer.Argument(help="Folder to write the agent to.")],
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the language model it was trained for.")
    ] = None,
    preset: Annotated[
        Preset, typer.Option(help="Decoding options stored as its defaults.")
    ] = Preset.official,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that is there.")] = False,
) -> None:
    """Turn the authors' checkpoint into a folder with safetensors, config and model card.

    Nothing in the checkpoint is executed.
    """
    with clear_errors():
        from mara_fast.agent import MaraAgent
        from mara_fast.config import DecodingConfig

        if directory.exists() and not overwrite and any(directory.iterdir()):
            raise ValueError(f"{directory} is not empty; give another folder or --overwrite")
        agent = MaraAgent.from_official(
            actor, decoding=getattr(DecodingConfig, preset.value)(), base_model=base_model
        )
        agent.save_pretrained(directory)
        num_parameters = sum(parameter.numel() for parameter in agent.parameters())
        typer.echo(
            f"{directory}: agent for hidden size {agent.config.hidden_size}, "
            f"{num_parameters:,} parameters"
        )


@app.command()
def env() -> None:
    """Show versions, devices and the kernels in use: paste it into a bug report."""
    from mara_fast.environment import environment

    for name, value in environment().items():
        typer.echo(f"{name:<14} {value}")


@app.command()
def demo(
    num_prompts: Annotated[int, typer.Option(help="Prompts to answer.", min=1, max=20)] = 3,
) -> None:
    """Answer prompts with the embedded tiny model, without and with its agent."""
    with clear_errors():
        from mara_fast.demo import run_demo

        run_demo(num_prompts=num_prompts)


def main() -> None:
    """Entry point of the console script."""
    app()


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def load_engine(options: "EngineOptions", *, tensor_parallel: bool) -> "Engine":
    from transformers.utils import logging

    from mara_fast.engine import Engine

    logging.disable_progress_bar()
    return Engine(**dataclasses.asdict(options), tensor_parallel=tensor_parallel)


if __name__ == "__main__":
    main()
