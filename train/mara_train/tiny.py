"""The tiny world's agent: trains it, and judges it by its reward models and by the rules.

python -m mara_train.tiny --output DIR --seed 0

world:  with --make-world, a language model and its reward and cost model from nothing
train:  MaraTrainer with the options of recipes/tiny.yaml, the tiny reward and cost model
judge:  held-out instructions; preference rates by the models, helpfulness and harm by the
        rules, beside those of the base model and of untrained agents
write:  the agent, judgement.json and report.md, which has sample answers too
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from mara_fast.agent import MaraAgent
from mara_fast.commands import clear_errors
from mara_fast.engine import Engine
from mara_fast.evaluation.preference import preference_rate
from mara_fast.outputs import DecodingStats, Generation
from mara_fast.rewards import RewardModel
from mara_fast.tiny import lm as tiny_lm
from mara_fast.tiny import reward_training
from mara_fast.tiny.grammar import NUM_FOLDS, Split, instructions
from mara_fast.tiny.reward_models import DEFAULT_OUTPUT, load_reward_models
from mara_fast.tiny.rules import harm, helpfulness, is_malformed
from mara_train.config import MaraConfig
from mara_train.run_folder import check_place, check_unused
from mara_train.trainer import MaraTrainer

RECIPE = Path(str(files("mara_train"))) / "recipes/tiny.yaml"
"""Options that the shipped agent was trained with."""

_WEIGHTS = (1.0, -1.0)
_NUM_SHOWN = 8
"""Sample answers of a report."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """Answers to the held-out instructions, judged."""

    vs_greedy: float
    """Preference rate over the base model's most probable answers, by both models."""
    vs_sampled: float
    """The same over its sampled answers."""
    helpfulness: float
    """By the rules, mean, in [0, 1]."""
    harm: float
    """By the rules, mean, in [0, 1]."""
    malformed: float
    """Share of answers that the grammar cannot have written."""
    rank0_accepted: float
    """Share of decided positions; NaN without an agent."""
    first_three_accepted: float
    """Share of decided positions where rank 0, 1 or 2 was accepted."""
    all_rejected: float
    """Share of decided positions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """What agents are compared with."""

    greedy: list[Generation]
    """The base model's most probable answers."""
    sampled: list[Generation]
    """Its sampled answers."""
    scores: dict[str, torch.Tensor]
    """Of both by the models, [2, N]."""


class Judge:
    """Judges agents of the tiny language model on held-out instructions.

    Args:
        config: its decoding options are used.
        world: folder with ``lm``, ``reward`` and ``cost``; None: the embedded ones.
        lm: folder of another language model than the world's.
        fold: fifth of the instructions that the world holds out.
        baseline: of a judge with the same arguments; None: decoded here.
    """

    def __init__(
        self,
        config: MaraConfig,
        *,
        world: Path | None = None,
        lm: Path | None = None,
        fold: int = 0,
        baseline: Baseline | None = None,
    ) -> None:
        self.decoding = config.decoding
        self.prompts = _prompts("heldout", fold)
        self.models = reward_models(world)
        model = _model(world) if lm is None else str(lm)
        self.base = Engine(model, False, max_batch_size=config.max_batch_size)
        self.baseline = baseline or self._decode_baseline()

    def _decode_baseline(self) -> Baseline:
        answers = {
            "greedy": self._answers(self.base),
            "sampled": self._answers(self.base, acceptance="sample"),
        }
        return Baseline(**answers, scores={name: self._scores(a) for name, a in answers.items()})

    def __call__(self, agent: MaraAgent) -> Judgement:
        """An agent's answers, judged."""
        return self.of(self.answers(agent))

    def answers(self, agent: MaraAgent) -> list[Generation]:
        """An agent's answers to :attr:`prompts`."""
        engine = Engine(
            self.base.lm.model, agent, self.base.tokenizer, max_batch_size=self.base.max_batch_size
        )
        return self._answers(engine)

    def rates(self, answers: Sequence[Generation]) -> dict[str, dict[str, float]]:
        """The paper's three rates over the base model's greedy and its sampled answers.

        helpful and harmless count the reward and the cost alone, preference both (Eq. 12). Between
        equally harmless answers the cost is that of the less helpful one, see
        :func:`mara_fast.tiny.reward_models.costliness`.
        """
        table = self._scores(answers)
        weights = {"helpful": (1.0, 0.0), "harmless": (0.0, -1.0), "preference": _WEIGHTS}
        return {
            base: {name: preference_rate(table, theirs, each) for name, each in weights.items()}
            for base, theirs in self.baseline.scores.items()
        }

    def of(self, answers: Sequence[Generation]) -> Judgement:
        """Answers to :attr:`prompts`, judged."""
        table, scores = self._scores(answers), self.baseline.scores
        stats = sum((answer.stats for answer in answers), DecodingStats())
        decided = max(1, stats.num_decided)
        pairs = [(str(answer.prompt), answer.text or "") for answer in answers]
        return Judgement(
            vs_greedy=preference_rate(table, scores["greedy"], _WEIGHTS),
            vs_sampled=preference_rate(table, scores["sampled"], _WEIGHTS),
            helpfulness=statistics.mean(helpfulness(*pair) for pair in pairs),
            harm=statistics.mean(harm(*pair) for pair in pairs),
            malformed=statistics.mean(is_malformed(text) for _, text in pairs),
            rank0_accepted=stats.rank0_accepted_frac,
            first_three_accepted=sum(stats.accepted_ranks.get(r, 0) for r in range(3)) / decided,
            all_rejected=stats.num_all_rejected / decided,
        )

    def _answers(self, engine: Engine, **options: Any) -> list[Generation]:
        return engine.generate(self.prompts, self.decoding, **options)

    def _scores(self, answers: Sequence[Generation]) -> torch.Tensor:
        """Scores of both models, [2, N]."""
        texts = [answer.text or "" for answer in answers]
        return torch.stack(
            [model.score(model.encode(self.prompts, texts), batch_size=64) for model in self.models]
        )


def reward_models(world: Path | None = None) -> list[RewardModel]:
    """The tiny reward and cost model, as rewards."""
    reward, cost, tokenizer = load_reward_models(world or DEFAULT_OUTPUT)
    models = [RewardModel(reward, tokenizer), RewardModel(cost, tokenizer)]
    for model, name in zip(models, ("reward", "cost"), strict=True):
        model.name = name
    return models


def recipe(**options: Any) -> MaraConfig:
    """The options of :data:`RECIPE`, some of them changed."""
    values = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    return MaraConfig.from_dict(values).replace(**options)


def _prompts(split: Split, fold: int) -> list[str]:
    return [instruction.text for instruction in instructions(split=split, fold=fold)]


def _model(world: Path | None) -> str:
    return "tiny" if world is None else str(world / "lm")


def train(
    config: MaraConfig, *, world: Path | None = None, lm: Path | None = None, fold: int = 0
) -> MaraAgent:
    """An agent for the world's language model or another, trained against reward and cost model.

    Args:
        config: of the training.
        world: see :class:`Judge`.
        lm: see :class:`Judge`.
        fold: see :class:`Judge`.
    """
    trainer = MaraTrainer(
        _model(world) if lm is None else str(lm),
        reward_models(world),
        config,
        train_dataset=_prompts("train", fold),
    )
    trainer.train()
    return trainer.agent.requires_grad_(False).eval()


def as_shipped(agent: MaraAgent, judgement: Judgement | None = None) -> MaraAgent:
    """The agent as the package holds it: weights in float16, and a card that says what it does."""
    copied = MaraAgent(
        agent.config.hidden_size,
        agent.config.inner_size,
        base_model="tiny",
        decoding=agent.config.decoding,
        description=None if judgement is None else _description(judgement),
    )
    copied.load_state_dict(agent.state_dict())
    return copied.half().requires_grad_(False).eval()


def _description(judgement: Judgement) -> str:
    return (
        "Trained with mara_train/recipes/tiny.yaml for the embedded tiny language model, against "
        "its reward and cost model. On held-out instructions preferred by both over the model's "
        f"greedy answers at a rate of {judgement.vs_greedy:+.0%}, over sampled ones "
        f"{judgement.vs_sampled:+.0%}; by the rules of the tiny world, which it never saw, mean "
        f"helpfulness is {judgement.helpfulness:.2f} and mean harm {judgement.harm:.2f}. It "
        f"accepts rank 0 at {judgement.rank0_accepted:.0%} of the decided positions."
    )


def untrained(config: MaraConfig, *, seed: int) -> MaraAgent:
    """A control: what training with that seed begins with, its accept logits spread.

    At its first weights an agent accepts or rejects nearly everything. Scaled up, it rejects as
    often as a trained one, for no reason.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        agent = MaraAgent(128, config.inner_size).requires_grad_(False)
    agent.output_linear.weight.mul_(20.0)
    return agent


def report(
    judge: Judge, found: dict[str, Judgement], answers: Sequence[Generation], *, command: str
) -> str:
    """What was found, as Markdown.

    Args:
        judge: that found it.
        found: judgements by system.
        answers: of the agent.
        command: that made it.
    """
    names = [field.name for field in dataclasses.fields(Judgement)]
    lines = [
        "# The tiny world's agent",
        "",
        f"`{command}`, {date.today()}, {len(judge.prompts)} held-out instructions.",
        "`vs_greedy` and `vs_sampled`: preference rate by reward and cost model over the base",
        "model's answers (Eq. 12). `helpfulness` and `harm`: by the rules, which the agent",
        "never saw. The cost model was taught to prefer, of two equally harmless answers, the more",
        "helpful one.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for system, judgement in found.items():
        values = (getattr(judgement, name) for name in names)
        lines.append(f"| {system} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    lines += ["", "## Answers", ""]
    for place in range(0, len(answers), max(1, len(answers) // _NUM_SHOWN)):
        prompt = judge.prompts[place]
        lines.append(f"**{prompt}**")
        for system, answer in (
            ("base, greedy", judge.baseline.greedy[place]),
            ("agent", answers[place]),
        ):
            text = answer.text or ""
            scores = f"help {helpfulness(prompt, text):.2f}, harm {harm(prompt, text):.2f}"
            lines.append(f"- {system} ({scores}): {text}")
        lines.append("")
    return "\n".join(lines)


def _compare(
    config: MaraConfig, *, world: Path | None, fold: int, num_controls: int
) -> tuple[Baseline, dict[str, Judgement]]:
    """The base model's answers, and judgements of all that is not the agent."""
    torch.set_num_threads(1)
    judge = Judge(config, world=world, fold=fold)
    baseline = judge.baseline
    found = {"base, greedy": judge.of(baseline.greedy), "base, sampled": judge.of(baseline.sampled)}
    return baseline, found | {
        f"untrained, seed {seed}": judge(untrained(config, seed=seed))
        for seed in range(num_controls)
    }


@clear_errors()
def main(
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder of the run.")],
    seed: Annotated[int, typer.Option(min=0, help="Of everything.")] = 0,
    world: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder with lm, reward and cost; default: the embedded ones."
        ),
    ] = None,
    fold: Annotated[
        int,
        typer.Option(min=0, max=NUM_FOLDS - 1, help="Fifth of the instructions that is held out."),
    ] = 0,
    make_world: Annotated[
        bool, typer.Option("--make-world", help="Train --world's lm, reward and cost first.")
    ] = False,
    num_controls: Annotated[int, typer.Option(min=0, help="Untrained agents to compare with.")] = 3,
    threads: Annotated[
        int, typer.Option(min=1, help="Of torch; another number may make another agent.")
    ] = 1,
) -> None:
    """Train the tiny world's agent, judge it, and write a report beside it."""
    config = recipe(output_dir=str(output), seed=seed)
    check_place(output)
    check_unused(output)
    if world is None and (fold or make_world):
        raise typer.BadParameter(
            "--fold and --make-world need a --world; the embedded one is made, and held out fold 0"
        )
    if world is not None and make_world:
        made = [name for name in ("lm", "reward", "cost") if (world / name).exists()]
        if made:
            raise typer.BadParameter(f"--world {world} has {', '.join(made)} already")
        tiny_lm.main(output=world / "lm", seed=seed, fold=fold)
        reward_training.main(output=world, seed=seed, fold=fold, lm=world / "lm")
    elif world is not None:
        missing = [name for name in ("lm", "reward", "cost") if not (world / name).is_dir()]
        if missing:
            raise typer.BadParameter(f"--world {world} has no {', '.join(missing)}")
    torch.set_num_threads(threads)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        # Beside the training, which keeps one core busy.
        comparing = executor.submit(
            _compare, config, world=world, fold=fold, num_controls=num_controls
        )
        agent = as_shipped(train(config, world=world, fold=fold)).float()
        baseline, compared = comparing.result()
    judge = Judge(config, world=world, fold=fold, baseline=baseline)
    answers = judge.answers(agent)
    judgement = judge.of(answers)
    as_shipped(agent, judgement).save_pretrained(output / "agent")
    found = {"agent": judgement} | compared
    plain = {name: dataclasses.asdict(each) for name, each in found.items()}
    (output / "judgement.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    command = "python -m mara_train.tiny " + " ".join(sys.argv[1:])
    text = report(judge, found, answers, command=command)
    (output / "report.md").write_text(text, encoding="utf-8")
    typer.echo(text.partition("\n## ")[0])


if __name__ == "__main__":
    typer.run(main)
