"""Rows of a step: equally many for every slot, or a budget handed out by worth.

Each shape decodes the same prompts with the same random model and an agent of the paper's profile.
Steps per token are counted: they are what a device pays for below its ridge, and no other load on
the machine changes them. Tokens per second are medians of rounds in which all shapes run in turn.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mara_fast import DecodingConfig, Engine
from mara_fast.bench.facts import facts_of
from mara_fast.bench.measure import in_turn
from mara_fast.bench.model import SHAPES, calibrate, random_llama
from mara_fast.bench.systems import Decode
from mara_fast.decoder import Decoder
from mara_fast.row_budget import StepShape
from mara_fast.window import WIDEST_OF_BUDGET

PLAIN, AUTO = "plain", "auto"
WINDOWS = (1, 2, 3, 4, 8)
ROWS_PER_SLOT = (1.25, 1.5, 2, 3)
INPUT_LEN = 64


class ShapedEngine(Engine):
    """An engine whose steps have so many rows per slot."""

    window = 1
    rows_per_slot = 1.0

    def step_shape(self, config: DecodingConfig, num_slots: int) -> StepShape:
        """Nothing is measured."""
        num_rows = math.ceil(self.rows_per_slot * num_slots)
        return StepShape(window=self.window, num_rows=num_rows)


def engines_of(args: argparse.Namespace, batch_size: int) -> tuple[dict[str, Engine], list]:
    """By name, and the prompts that all decode."""
    device = torch.device(args.device)
    model = random_llama(dtype=_dtype(device), device=device, **SHAPES[args.model])
    generator = torch.Generator().manual_seed(1)
    size = (args.prompts_per_slot * batch_size, INPUT_LEN)
    prompts = torch.randint(model.config.vocab_size, size, generator=generator).tolist()
    agent = calibrate(model, prompts[:8], forced=0.33).to(device)

    def shaped(window: int, rows_per_slot: float) -> Engine:
        engine = ShapedEngine(model, agent, False, max_batch_size=batch_size)
        engine.window, engine.rows_per_slot = window, rows_per_slot
        return engine

    engines = {PLAIN: Engine(model, False, False, max_batch_size=batch_size)}
    engines |= {f"window {window}": shaped(window, window) for window in WINDOWS}
    engines |= {f"{rows} per slot": shaped(WIDEST_OF_BUDGET, rows) for rows in ROWS_PER_SLOT}
    engines[AUTO] = Engine(model, agent, False, max_batch_size=batch_size)
    return engines, prompts


def count_steps(decode: Decode) -> int:
    """Steps of a run."""
    with mock.patch.object(
        Decoder, "run_step", autospec=True, side_effect=Decoder.run_step
    ) as run_step:
        decode()
    return run_step.call_count


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="50m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--prompts-per-slot", type=int, default=2)
    parser.add_argument("--output-len", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=0, help="timed; 0: steps are counted only")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    config = DecodingConfig(max_new_tokens=args.output_len, ignore_eos=True)
    console = Console()
    found: dict[str, Any] = {
        **facts_of(device, _dtype(device), "transformers"),
        "model": f"random {args.model}",
        "batches": [],
    }
    for batch_size in args.batch_sizes:
        engines, prompts = engines_of(args, batch_size)

        def decode(engine: Engine, prompts: list = prompts) -> list[list[int]]:
            return [one.token_ids for one in engine.generate(prompts, config)]

        systems: dict[str, Decode] = {
            name: lambda engine=engine: decode(engine)  # type: ignore[misc]
            for name, engine in engines.items()
        }
        with tqdm(total=len(systems) * (args.rounds + 2), unit="run", leave=False) as bar:
            rates, tokens = in_turn(
                systems, rounds=args.rounds, device=device, progress=lambda: bar.update(1)
            )
            steps = {}
            for name, system in systems.items():
                steps[name] = count_steps(system)
                bar.update(1)
        table = Table(
            "system", "rows", "most of a slot", "steps per token", title=f"batch {batch_size}"
        )
        if args.rounds:
            table.add_column("tokens/s")
        rows = {}
        for name, engine in engines.items():
            shape = engine.step_shape(config, batch_size)
            # Slots go on side by side.
            share = steps[name] * batch_size / (len(prompts) * args.output_len)
            rows[name] = {
                "window": shape.window,
                "num_rows": shape.num_rows,
                "steps_per_token": share,
                "tokens_per_second": statistics.median(rates[name]) if args.rounds else None,
            }
            cells = [name, str(shape.num_rows), str(shape.window), f"{share:.2f}"]
            table.add_row(
                *cells, *([f"{statistics.median(rates[name]):.1f}"] if args.rounds else [])
            )
        aligned = [tokens[name] for name in systems if name != PLAIN]
        equal = statistics.fmean(
            mine == other for run in aligned for mine, other in zip(run, aligned[0], strict=True)
        )
        console.print(table)
        console.print(f"answers equal to those of window 1: {equal:.1%}")
        found["batches"].append({"batch_size": batch_size, "equal": equal, "systems": rows})
    if args.output_json is not None:
        args.output_json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
