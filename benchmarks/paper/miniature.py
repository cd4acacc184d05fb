"""The paper's tables and figures on the miniature world, run for real: ``make paper``.

    train      language models of two families, agents, and the baselines          (world.py)
    evaluate   one spec per table, the paper's systems and comparisons by its rule
    draw       Figure 3's accepted ranks; helpful against harmless, by training and by dials
    write      paper_miniature.md, .html and .json

Everything is seeded and resumable: the same command goes on with what is missing. How large models
do is not to be read off it; whether the claims hold where all can be checked, is.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from aligner import TINY_ALIGNER_TEMPLATE
from world import EMBEDDED, PROMPTS, RATIOS, UPSTREAMS, Training, train_all

from mara_fast.commands import clear_errors
from mara_fast.evaluation import EvalSpec, Evaluation, evaluate
from mara_fast.evaluation.report import Figure, markdown, page, profile
from mara_fast.outputs import DecodingStats

NAME = "paper_miniature"
TITLE = "The paper's experiments on the miniature world"
DATASETS = {"Mixed": "tiny", "Benign": "tiny/benign", "Harmful": "tiny/harmful"}
"""Held-out instructions: stand for SafeRLHF, and for sets with a lean."""
NUM_PROMPTS = 120
"""Of each data set."""
TRANSFERS = (EMBEDDED, "Mistral-S")
"""Language models of one hidden size, as an agent's first layer asks for."""
GRID = [(k, p) for k in (5, 10, 40) for p in (0.8, 0.9, 0.95)]
THRESHOLDS = (0.2, 0.35, 0.5, 0.65, 0.8)
MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weight of the agent that was trained on the reward alone; the rest is the other's."""
BEST_OF = 10


class Tables:
    """The specs of a world.

    Args:
        world: folder of what is trained.
        sample: prompts of each data set.
    """

    def __init__(self, world: Path, *, sample: int) -> None:
        self._world, self._sample = world, sample

    def all(self) -> dict[str, EvalSpec]:
        """By the name of the file that the paper's own figures are in."""
        return {
            "table1": self._spec("Table 1: MARA on several language models", self._table1()),
            "table2": self._spec(
                "Table 2: against RLHF, DPO, Aligner and best-of-N", self._table2()
            ),
            "table3": self._spec("Table 3: agents on other language models", self._table3()),
            "table4": self._spec("Table 4: other train prompts", self._table4()),
            "table5": self._spec("Table 5: ratio of reward to cost in training", self._table5()),
            "figure3": self._spec("Figure 3: ranks of accepted candidates", self._figure3()),
            "dials": self._spec("Dials: no training, only decoding", self._dials()),
        }

    def _spec(self, name: str, part: tuple[dict[str, Any], list[str]]) -> EvalSpec:
        systems, comparisons = part
        needed = {name for pair in comparisons for name in pair.split(" vs ")}
        needed |= {systems[name]["corrects"] for name in needed if "corrects" in systems[name]}
        return EvalSpec.from_dict(
            {
                "name": name,
                "systems": {name: one for name, one in systems.items() if name in needed},
                "datasets": {
                    name: {"path": path, "sample": self._sample} for name, path in DATASETS.items()
                },
                "comparisons": comparisons,
                "judge": {
                    "rewards": ["tiny/reward", "tiny/cost"],
                    "weights": [1, -1],
                    "names": ["helpful", "harmless"],
                    "batch_size": 64,
                },
                "decoding": {"max_new_tokens": 96},
                "engine": {"max_batch_size": 64},
            }
        )

    def _result(self, upstream: str, kind: str, **options: Any) -> str:
        return Training(upstream=upstream, kind=kind, **options).result(self._world)

    def _base(self, upstream: str) -> dict[str, Any]:
        return {upstream: {"model": self._result(upstream, "lm")}}

    def _aligned(self, upstream: str, name: str = "MARA", **options: Any) -> dict[str, Any]:
        model, agent = self._result(upstream, "lm"), self._result(upstream, "agent", **options)
        return {f"{upstream} + {name}": {"model": model, "agent": agent}}

    def _others(self, upstream: str, prompts: str = "mixed", suffix: str = "") -> dict[str, Any]:
        """RLHF, DPO and Aligner."""
        return {
            f"{upstream} RLHF{suffix}": {"model": self._result(upstream, "rloo", prompts=prompts)},
            f"{upstream} DPO{suffix}": {"model": self._result(upstream, "dpo", prompts=prompts)},
            f"{upstream} + Aligner{suffix}": {
                "model": self._result(upstream, "aligner", prompts=prompts),
                "corrects": upstream,
                "template": TINY_ALIGNER_TEMPLATE,
            },
        }

    def _table1(self) -> tuple[dict[str, Any], list[str]]:
        systems: dict[str, Any] = {}
        for name in UPSTREAMS:
            systems |= self._base(name) | self._aligned(name)
        return systems, [f"{name} + MARA vs {name}" for name in UPSTREAMS]

    def _table2(self) -> tuple[dict[str, Any], list[str]]:
        systems, comparisons = self._table1()[0], []
        for name in UPSTREAMS:
            others = self._others(name)
            systems |= others
            comparisons += [f"{name} + MARA vs {other}" for other in others]
        best = f"{EMBEDDED} best of {BEST_OF}"
        systems[best] = {"model": self._result(EMBEDDED, "lm"), "best_of": BEST_OF}
        return systems, [*comparisons, f"{EMBEDDED} + MARA vs {best}"]

    def _table3(self) -> tuple[dict[str, Any], list[str]]:
        systems: dict[str, Any] = {}
        comparisons = []
        for source in TRANSFERS:
            for target in TRANSFERS:
                name = f"{target} + {source} agent"
                agent = self._result(source, "agent")
                systems |= self._base(target)
                systems[name] = {"model": self._result(target, "lm"), "agent": agent}
                comparisons.append(f"{name} vs {target}")
        return systems, comparisons

    def _table4(self) -> tuple[dict[str, Any], list[str]]:
        systems = self._base(EMBEDDED)
        comparisons = []
        for prompts in PROMPTS[1:]:
            ours = self._aligned(EMBEDDED, f"MARA ({prompts})", prompts=prompts)
            others = self._others(EMBEDDED, prompts, f" ({prompts})")
            systems |= ours | others
            comparisons += [f"{next(iter(ours))} vs {name}" for name in (EMBEDDED, *others)]
        return systems, comparisons

    def _table5(self) -> tuple[dict[str, Any], list[str]]:
        systems = self._base(EMBEDDED)
        for ratio in RATIOS:
            name = "MARA" if ratio == RATIOS[0] else f"MARA {ratio.replace(':', ' to ')}"
            systems |= self._aligned(EMBEDDED, name, ratio=ratio)
        return systems, [f"{name} vs {EMBEDDED}" for name in systems if name != EMBEDDED]

    def _figure3(self) -> tuple[dict[str, Any], list[str]]:
        systems = self._base(EMBEDDED)
        [aligned] = self._aligned(EMBEDDED).values()
        for top_k, top_p in GRID:
            options = {"top_k": top_k, "top_p": top_p}
            systems[f"top-k {top_k} top-p {top_p}"] = aligned | {"decoding": options}
        return systems, [f"{name} vs {EMBEDDED}" for name in systems if name != EMBEDDED]

    def _dials(self) -> tuple[dict[str, Any], list[str]]:
        systems = self._base(EMBEDDED)
        [aligned] = self._aligned(EMBEDDED).values()
        for threshold in THRESHOLDS:
            systems[f"threshold {threshold}"] = aligned | {"decoding": {"threshold": threshold}}
        pair = [self._result(EMBEDDED, "agent", ratio=ratio) for ratio in ("1:0", "0:1")]
        for weight in MIXTURES:
            options = {"agent_weights": [weight, 1 - weight], "agent_combination": "logit"}
            systems[f"{weight:.0%} reward agent"] = aligned | {
                "agent": pair,
                "decoding": options,
            }
        return systems, [f"{name} vs {EMBEDDED}" for name in systems if name != EMBEDDED]


def figures(found: Mapping[str, Evaluation]) -> list[Figure]:
    """Accepted ranks over the grid, and the frontiers."""
    return [_ranks(found["figure3"]), _frontier(found["table5"], found["dials"])]


def _ranks(evaluation: Evaluation) -> Figure:
    figure, axes = _axes(8.5, 3.6)
    for top_k, top_p in GRID:
        by_dataset = evaluation.answers[f"top-k {top_k} top-p {top_p}"]
        stats = sum((one.stats for one in by_dataset.values()), DecodingStats())
        shares = [profile(stats)[f"of_accepted_rank{rank}"] or 0.0 for rank in range(5)]
        style = {5: ":", 10: "--", 40: "-"}[top_k]
        color = {0.8: "#2f6fb7", 0.9: "#b4561a", 0.95: "#7a7f87"}[top_p]
        label = f"top-k {top_k}, top-p {top_p}"
        axes.plot(range(5), [100 * one for one in shares], style, color=color, label=label)
    axes.set(xlabel="probability rank", ylabel="% of acceptances", xticks=range(5), yscale="log")
    axes.legend(frameon=False, fontsize=8, ncols=3)
    return Figure(
        title="Accepted ranks",
        caption="Of all acceptances, by the candidate's probability rank, over a grid of top-k and "
        "top-p (the paper's Figure 3).",
        svg=_svg(figure, "Accepted ranks"),
    )


def _frontier(trained: Evaluation, dials: Evaluation) -> Figure:
    figure, axes = _axes(8.5, 4.4)
    lines = {
        "ratio of reward to cost in training": (trained, "o", "#b4561a", None, 6, True),
        "threshold of one agent": (dials, "s", "#2f6fb7", "threshold", 6, False),
        "mixture of two agents": (dials, "D", "#7a7f87", "agent", -6, False),
    }
    for label, (evaluation, marker, color, part, side, above) in lines.items():
        points = [
            (one.ours, *(100 * one.by_reward[name].rate for name in ("harmless", "helpful")))
            for one in evaluation.comparisons
            if one.dataset == "Mixed" and (part is None or part in one.ours)
        ]
        xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
        # Ratios have no order; dials are turned from one value to the next.
        style = "-" if part else "none"
        axes.plot(xs, ys, linestyle=style, marker=marker, color=color, label=label)
        for number, (name, x, y) in enumerate(points):
            short = name.replace(f"{EMBEDDED} + MARA", "").replace(" to ", ":").strip() or "1:1"
            short = short.removeprefix("threshold ").removesuffix(" reward agent")
            axes.annotate(
                short,
                (x, y),
                # Points of one agent lie on one another.
                xytext=(side, 5 if above or number % 2 else -11),
                ha="left" if side > 0 else "right",
                textcoords="offset points",
                fontsize=7,
            )
    axes.set(xlabel="harmless, % over the LM's answers", ylabel="helpful, %")
    axes.legend(frameon=False, fontsize=8)
    return Figure(
        title="Helpful against harmless",
        caption="Rates over the language model's own answers to the mixed prompts: agents trained "
        "for a ratio of reward to cost (the paper's Table 5), and what decoding alone reaches by a "
        "threshold, or by a mixture of the agents of 1:0 and 0:1 (labels: weight of the first).",
        svg=_svg(figure, "Helpful against harmless"),
    )


_INK = "#010203"
"""Becomes the page's own colour."""


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure: Any, label: str) -> str:
    import matplotlib as mpl

    for text in figure.findobj(mpl.text.Text):
        text.set_color(_INK)
    for axes in figure.axes:
        axes.tick_params(colors=_INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(_INK)
    file = io.StringIO()
    # The same bytes from the same figures: no date, no random ids.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue().partition("<svg")[2].replace(_INK, "currentColor")
    # Two figures are in one page: only names that something refers to stay.
    named = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in named else "", svg)
    return f'<svg role="img" aria-label="{label}"{svg}'


def write(found: Sequence[Evaluation], drawn: Sequence[Figure], output: Path) -> None:
    """The report in three forms."""
    output.mkdir(parents=True, exist_ok=True)
    plain = {"title": TITLE, "tables": [one.to_dict() for one in found]}
    for path, text in (
        (output / f"{NAME}.json", json.dumps(plain, indent=1, ensure_ascii=False) + "\n"),
        (output / f"{NAME}.md", markdown(*found, title=TITLE)),
        (output / f"{NAME}.html", page(*found, title=TITLE, figures=drawn)),
    ):
        path.write_text(text, encoding="utf-8")


@clear_errors()
def main(
    output: Annotated[Path, typer.Option(help="Folder of the report.")],
    folder: Annotated[Path, typer.Option(help="What is trained and answered; gone on from.")],
    seed: Annotated[int, typer.Option(min=0, help="Of all trainings but the LMs'.")] = 0,
    sample: Annotated[int, typer.Option(min=1, help="Prompts of a data set.")] = NUM_PROMPTS,
) -> None:
    """Train what is missing, evaluate all tables, write the report."""
    world = folder / f"world-{seed}"
    train_all(world, seed=seed)
    found = {}
    for name, spec in Tables(world, sample=sample).all().items():
        work = folder / f"answers-{seed}-{sample}"
        found[name] = evaluate(spec, folder / "reports" / name, work=work)
    write(list(found.values()), figures(found), output)
    typer.echo(f"{output / NAME}.md, .html, .json")


if __name__ == "__main__":
    typer.run(main)
