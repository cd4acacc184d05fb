"""What the miniature of the paper's experiments is made of, each trained once in a folder.

    <folder>/<upstream>/lm                 a language model; the embedded one is not trained here
    <folder>/<upstream>/agent-...          agents: by ratio of reward to cost, by train prompts
    <folder>/<upstream>/{rloo,dpo,aligner}-...    baselines, by train prompts

What is there already is left as it is, so that a stopped run goes on with what is missing. Reward
and cost model are the embedded ones; nothing that is trained here sees a held-out instruction.
"""

import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from baselines import TRAININGS as BASELINES
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from train_data import Prompts, train_instructions

from mara_fast.tiny import LM_PATH, lm
from mara_train import MaraTrainer
from mara_train.tiny import recipe, reward_models

EMBEDDED = "Llama-S"
UPSTREAMS: dict[str, lm.TinyConfig | None] = {
    EMBEDDED: None,
    "Llama-XS": lm.TinyConfig(
        seed=2, hidden_size=96, intermediate_size=288, num_dialogues=14_000, num_threads=1
    ),
    "Mistral-S": lm.TinyConfig(seed=1, architecture="mistral", num_dialogues=16_000, num_threads=1),
}
"""Language models by name: two sizes of one family, and another family."""
RATIOS = ("1:1", "1:0", "0:1", "2:1")
PROMPTS: tuple[Prompts, ...] = ("mixed", "benign", "harmful")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One thing that is trained for a language model."""

    upstream: str
    kind: str
    """``lm``, ``agent`` or a baseline."""
    prompts: Prompts = "mixed"
    """Train instructions that it sees; of an LM all."""
    ratio: str = "1:1"
    """Weights of reward and cost, of an agent."""

    @property
    def name(self) -> str:
        """Of its folder in the upstream's."""
        if self.kind == "lm":
            return "lm"
        ratio = f"-{self.ratio.replace(':', 'to')}" if self.kind == "agent" else ""
        return f"{self.kind}-{self.prompts}{ratio}"

    def folder(self, world: Path) -> Path:
        """Where it ends up."""
        return world / self.upstream / self.name

    def result(self, world: Path) -> str:
        """The path that an engine loads."""
        if self.kind == "lm" and UPSTREAMS[self.upstream] is None:
            return str(LM_PATH)
        folder = self.folder(world)
        return str(folder / "agent" if self.kind == "agent" else folder)

    def is_done(self, world: Path) -> bool:
        """It is there, whole."""
        return Path(self.result(world), "config.json").is_file()


def trainings() -> list[Training]:
    """Everything that the tables need; language models first, then the longest."""
    found = [Training(upstream=name, kind="lm") for name in UPSTREAMS]
    for name in UPSTREAMS:
        found.append(Training(upstream=name, kind="agent"))
        found += [Training(upstream=name, kind=kind) for kind in BASELINES]
    for ratio in RATIOS[1:]:
        found.append(Training(upstream=EMBEDDED, kind="agent", ratio=ratio))
    for prompts in PROMPTS[1:]:
        found.append(Training(upstream=EMBEDDED, kind="agent", prompts=prompts))
        found += [Training(upstream=EMBEDDED, kind=k, prompts=prompts) for k in BASELINES]
    return found


def train_all(world: Path, *, seed: int, num_processes: int = os.cpu_count() or 1) -> None:
    """Trains what is missing, several at a time; each has a log beside its folder.

    Raises:
        RuntimeError: another run trains in this folder.
    """
    world.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(world / ".lock", timeout=0):
            _train_missing(world, seed=seed, num_processes=num_processes)
    except Timeout as error:
        raise RuntimeError(f"another run trains in {world}: wait for it, or stop it") from error


def _train_missing(world: Path, *, seed: int, num_processes: int) -> None:
    missing = [one for one in trainings() if not one.is_done(world)]
    done = len(trainings()) - len(missing)
    with (
        ProcessPoolExecutor(
            num_processes, mp_context=get_context("spawn"), initializer=_end_with_parent
        ) as executor,
        tqdm(total=len(trainings()), initial=done, desc="trainings") as bar,
    ):
        running: dict[Future[None], Training] = {}
        while missing or running:
            for one in _ready(missing, world)[: num_processes - len(running)]:
                missing.remove(one)
                running[executor.submit(train, one, world, seed=seed)] = one
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                one = running.pop(future)
                bar.set_postfix_str(f"{one.upstream} {one.name}")
                future.result()
                bar.update()


def _end_with_parent() -> None:
    """A worker whose parent was killed would train on, and a second run beside it."""
    parent = parent_process()
    assert parent is not None

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def _ready(missing: Iterable[Training], world: Path) -> list[Training]:
    """Those whose language model is there."""
    return [
        one
        for one in missing
        if one.kind == "lm" or Training(upstream=one.upstream, kind="lm").is_done(world)
    ]


def train(training: Training, world: Path, *, seed: int) -> None:
    """Trains one; nothing is at its place before it is whole."""
    torch.set_num_threads(1)
    folder = training.folder(world)
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with (
        folder.with_name(f"{folder.name}.log").open("w", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        _train(training, world, partial, seed=seed)
    partial.rename(folder)


def _train(training: Training, world: Path, folder: Path, *, seed: int) -> None:
    sizes = UPSTREAMS[training.upstream]
    if training.kind == "lm":
        assert sizes is not None
        lm.save(*lm.train(sizes), directory=folder)
        return
    upstream = Path(Training(upstream=training.upstream, kind="lm").result(world))
    if training.kind != "agent":
        BASELINES[training.kind](upstream, folder, prompts=training.prompts, seed=seed)
        return
    reward, cost = map(float, training.ratio.split(":"))
    config = recipe(output_dir=str(folder), seed=seed, reward_weights=[reward, -cost])
    asked = train_instructions(training.prompts)
    MaraTrainer(str(upstream), reward_models(), config, train_dataset=asked).train()
