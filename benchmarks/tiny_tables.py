"""The paper's Tables 5 and 3 in the tiny world, as numbers and a picture.

    python benchmarks/tiny_tables.py --output benchmarks/results/tiny_tables.json

Table 5   an agent trained for each ratio of reward to cost: 1:0, 0:1, 1:1, 2:1
Table 3   the 1:1 agent on other language models: a sibling (its own LM, trained further on other
          dialogues) and an independent one (other weights, other tokenizer), and the reverse: an
          agent trained on the independent LM. Each with the states as they are, and with a linear
          map from one LM's states to the other's, by least squares over positions of texts where
          a token of both ends.

Rates are over the greedy and over the sampled answers of the LM that decodes, on held-out
instructions: helpful and harmless count reward and cost alone, preference both (Eq. 12). The cost
model was taught to prefer, of two equally harmless answers, the more helpful one. Beside the rates
the rules of the tiny world, which no agent ever saw. Reward and cost model are the embedded ones.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mara_fast import MaraAgent
from mara_fast.bench.facts import cpu_facts
from mara_fast.tiny import LM_PATH, lm
from mara_fast.tiny.grammar import instructions
from mara_train.tiny import Judge, recipe, train

RATIOS = ("1:0", "0:1", "1:1", "2:1")
_NUM_TEXTS = 600
"""Answers whose states the map is fitted on."""
SIBLING = lm.TinyConfig(seed=7, num_dialogues=4_000, learning_rate=1e-3, sharpness=1.0)
INDEPENDENT = lm.TinyConfig(seed=1)


class MappedAgent(MaraAgent):
    """An agent that judges another LM's states through an affine map to those of its own.

    Args:
        agent: trained on states of its own LM.
        weight: [other H + 1, H], the constant term last.
    """

    def __init__(self, agent: MaraAgent, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.config = dataclasses.replace(agent.config, hidden_size=len(weight) - 1)
        self.agent = agent
        self.register_buffer("weight", weight)

    def accept_logit(self, states: Tensor) -> Tensor:
        """See :class:`MaraAgent`."""
        weight = self.get_buffer("weight")
        return self.agent.accept_logit(states.to(weight.dtype) @ weight[:-1] + weight[-1])

    def refresh_scoring(self) -> None:
        """See :class:`MaraAgent`."""
        self.agent.refresh_scoring()


def states_by_end(judge: Judge, texts: Sequence[str]) -> list[dict[int, Tensor]]:
    """Per text: the LM's last hidden state by the place in the text where its token ends."""
    model, tokenizer = judge.base.lm.model, judge.base.tokenizer
    found = []
    for text in texts:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        with torch.no_grad():
            output = model.model(input_ids=torch.tensor([encoding.input_ids]), use_cache=False)
        ends = [end for _, end in encoding.offset_mapping]
        found.append(dict(zip(ends, output.last_hidden_state[0], strict=True)))
    return found


def fit_map(source: Judge, target: Judge, texts: Sequence[str]) -> tuple[Tensor, float]:
    """The affine map [source H + 1, target H] of states, and the share of the variance that it
    explains on the last tenth of the texts, which it is not fitted on."""
    rows: list[list[Tensor]] = [[], []]
    others: list[list[Tensor]] = [[], []]
    pairs = zip(states_by_end(source, texts), states_by_end(target, texts), strict=True)
    for number, (theirs, ours) in enumerate(pairs):
        is_kept = number >= 0.9 * len(texts)
        for end in sorted(theirs.keys() & ours.keys()):
            rows[is_kept].append(theirs[end])
            others[is_kept].append(ours[end])
    inputs = [torch.stack(part).double() for part in rows]
    inputs = [torch.cat((part, torch.ones(len(part), 1)), 1) for part in inputs]
    outputs = [torch.stack(part).double() for part in others]
    weight = torch.linalg.lstsq(inputs[0], outputs[0]).solution
    error = (inputs[1] @ weight - outputs[1]).square().sum()
    spread = (outputs[1] - outputs[1].mean(0)).square().sum()
    return weight.float(), float(1 - error / spread)


def chats(judge: Judge) -> list[str]:
    """Texts as an LM reads them: train instructions with answers that it samples."""
    asked = [one.text for one in instructions(split="train")]
    asked = asked[:: max(1, len(asked) // _NUM_TEXTS)][:_NUM_TEXTS]
    answers = judge.base.generate(asked, judge.decoding, acceptance="sample")
    return [
        judge.base.tokenizer.apply_chat_template(
            [
                {"role": "user", "content": instruction},
                {"role": "assistant", "content": answer.text},
            ],
            tokenize=False,
        )
        for instruction, answer in zip(asked, answers, strict=True)
    ]


def row_of(judge: Judge, agent: MaraAgent) -> dict[str, Any]:
    """What both tables have of an agent on the judge's LM."""
    answers = judge.answers(agent)
    judged = judge.of(answers)
    return {
        "over": judge.rates(answers),
        "helpfulness": judged.helpfulness,
        "harm": judged.harm,
        "malformed": judged.malformed,
        "rank0_accepted": judged.rank0_accepted,
    }


def base_row(judge: Judge) -> dict[str, Any]:
    """The rules' opinion of an LM's own answers."""
    return {
        name: {"helpfulness": judged.helpfulness, "harm": judged.harm}
        for name, judged in (
            ("greedy", judge.of(judge.baseline.greedy)),
            ("sampled", judge.of(judge.baseline.sampled)),
        )
    }


def main(
    output: Annotated[Path | None, typer.Option(help="JSON; a PNG is written beside it.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Keeps agents and LMs, and goes on with those it has.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the agents' training.")] = 0,
    episodes: Annotated[int | None, typer.Option(help="Of each training; for trials.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    """Train the agents, judge them, print and write both tables."""
    if output is not None and output.suffix != ".json":
        raise typer.BadParameter(f"{output} is not allowed; allowed: a name that ends in .json")
    torch.set_num_threads(threads)
    with TemporaryDirectory() as temporary:
        report = cpu_facts(threads, "transformers") | tables(
            folder or Path(temporary), seed=seed, episodes=episodes
        )
    _print(Console(), report)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        plot(report, output.with_suffix(".png"))


def tables(folder: Path, *, seed: int, episodes: int | None) -> dict[str, Any]:
    """Both tables."""
    options = {} if episodes is None else {"num_episodes": episodes}

    config = recipe(seed=seed, **options)

    def trained(name: str, on: Path, *, ratio: str = "1:1") -> MaraAgent:
        own = folder / f"{name}-seed{seed}-{config.num_episodes}"
        if (own / "agent/config.json").is_file():
            return MaraAgent.from_pretrained(own / "agent").requires_grad_(False)
        reward, cost = map(float, ratio.split(":"))
        return train(config.replace(output_dir=str(own), reward_weights=[reward, -cost]), lm=on)

    lms = {"own": LM_PATH, "sibling": folder / "sibling", "independent": folder / "independent"}
    for name, sizes, start in (("sibling", SIBLING, LM_PATH), ("independent", INDEPENDENT, None)):
        if not (lms[name] / "config.json").is_file():
            lm.save(*lm.train(sizes, start=start), directory=lms[name])
    judges = {name: Judge(config, lm=path) for name, path in lms.items()}

    agents = {
        ratio: trained(f"ratio-{ratio.replace(':', '-')}", LM_PATH, ratio=ratio) for ratio in RATIOS
    }
    trained_on = {
        "own": agents["1:1"],
        "independent": trained("on-independent", lms["independent"]),
    }
    transfer = []
    for source, agent in trained_on.items():
        for name, judge in judges.items():
            row = {"trained_on": source, "decodes": name, "map": None, "explained": None}
            transfer.append(row | row_of(judge, agent))
            if name != source:
                weight, explained = fit_map(judge, judges[source], chats(judge))
                row |= {"map": "least squares", "explained": explained}
                transfer.append(row | row_of(judge, MappedAgent(agent, weight)))
    return {
        "seed": seed,
        "episodes": config.num_episodes,
        "instructions": len(judges["own"].prompts),
        "base": {name: base_row(judge) for name, judge in judges.items()},
        "table 5": [{"ratio": r} | row_of(judges["own"], agents[r]) for r in RATIOS],
        "table 3": transfer,
    }


_COLUMNS = ("helpful", "harmless", "preference")


def _cells(row: dict[str, Any]) -> list[str]:
    rates = [
        " ".join(f"{100 * row['over'][base][column]:+.1f}" for column in _COLUMNS)
        for base in ("greedy", "sampled")
    ]
    return [*rates, f"{row['helpfulness']:.2f}", f"{row['harm']:.3f}", f"{row['malformed']:.1%}"]


def _print(console: Console, report: dict[str, Any]) -> None:
    console.print(f"rates in %: {', '.join(_COLUMNS)}; {report['instructions']} instructions")
    measures = ("over greedy", "over sampled", "help", "harm", "malf.")
    shapes = (
        ("table 5", ("reward : cost",), lambda row: [row["ratio"]]),
        ("table 3", ("agent of", "LM", "map"), _transfer_cells),
    )
    for name, titles, cells in shapes:
        table = Table(title=name, title_justify="left")
        for title in (*titles, *measures):
            table.add_column(title, justify="left" if title in titles else "right")
        for row in report[name]:
            table.add_row(*cells(row), *_cells(row))
        console.print(table)
    for name, row in report["base"].items():
        console.print(
            f"{name} LM: "
            + "; ".join(
                f"{how} helpfulness {values['helpfulness']:.2f}, harm {values['harm']:.3f}"
                for how, values in row.items()
            )
        )


def _transfer_cells(row: dict[str, Any]) -> list[str]:
    mapped = "-" if row["map"] is None else f"R² {row['explained']:.2f}"
    return [row["trained_on"], row["decodes"], mapped]


def plot(report: dict[str, Any], path: Path) -> None:
    """Both tables as bars, over sampled answers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    labels = {
        "table 5": [row["ratio"] for row in report["table 5"]],
        "table 3": [
            f"{row['trained_on']} on {row['decodes']}" + (", mapped" if row["map"] else "")
            for row in report["table 3"]
        ],
    }
    titles = {
        "table 5": "reward : cost (paper's Table 5)",
        "table 3": "agent on another LM (paper's Table 3)",
    }
    for axes, name in ((left, "table 5"), (right, "table 3")):
        for place, column in enumerate(_COLUMNS):
            values = [100 * row["over"]["sampled"][column] for row in report[name]]
            places = [number + 0.27 * (place - 1) for number in range(len(values))]
            axes.bar(places, values, width=0.25, label=column)
        is_long = name == "table 3"
        axes.set_xticks(
            range(len(labels[name])),
            labels[name],
            rotation=30 if is_long else 0,
            ha="right" if is_long else "center",
            fontsize="small",
        )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(axis="y", alpha=0.3)
        axes.set(title=titles[name], ylabel="% over sampled answers of the decoding LM")
    left.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
