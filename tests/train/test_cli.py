"""``mara-fast train``: its options, its mistakes, a run, its interruption, and how it is found."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

import mara_fast.cli
import mara_train.trainer
from mara_fast import MaraAgent, commands
from mara_fast.rewards.named import load_rewards
from mara_fast.tiny.grammar import instructions
from mara_fast.tiny.rules import helpfulness
from mara_train import MaraConfig, cli
from mara_train.plots import PLOT_NAME
from mara_train.recipe import RECIPE_NAME, Recipe, load_rows, read_options
from mara_train.report import read_metrics
from mara_train.run_folder import fingerprint
from naming import stable_id

ROOT = Path(__file__).resolve().parents[2]
OK, FAILED, INTERRUPTED = 0, 2, 130
NEEDED = ("-m", "tiny", "-r", "rewards_of_a_test:helpful", "--train-data", "tiny")
SMALL = (
    "num_episodes=6",
    "episodes_per_step=2",
    "max_batch_size=2",
    "inner_size=8",
    "learning_starts=1",
    # A run that is prolonged has no end to head for.
    "learning_rate_schedule=constant",
    "final_target_entropy=null",
    "batch_size=4",
    "decoding.max_new_tokens=6",
    "replay.capacity=5000",
    "logging_steps=1",
    "save_steps=1",
)
REWARDS = """
from mara_fast.tiny.rules import helpfulness

NUMBER = 3


def helpful(prompts, completions, **columns):
    return [helpfulness(*pair) for pair in zip(prompts, completions)]


class Rules:
    @staticmethod
    def short(prompts, completions, **columns):
        return [-len(completion) for completion in completions]
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), prog_name="mara-fast train")


def fails(*arguments: str | Path) -> str:
    """The one line of complaint of a command that must fail cleanly."""
    result = run(*arguments)
    assert result.exit_code == FAILED, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("mara-fast: ") and "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which has a module of rewards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "rewards_of_a_test.py").write_text(REWARDS)
    yield tmp_path
    sys.modules.pop("rewards_of_a_test", None)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may get as far as loading a model."""

    def loaded(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mara_train.trainer, "MaraTrainer", loaded)


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """What would have been run."""
    found: list[Recipe] = []
    monkeypatch.setattr(cli, "_run", lambda recipe, folder, resume: found.append(recipe))
    return found


# --- options ---------------------------------------------------------------------------------


def test_flags_and_assignments(recipes: list[Recipe]) -> None:
    more = ("--eval-data", "e.jsonl", "-r", "org/reward", "-a", "agent", "-o", "out")
    assert run(*NEEDED, *more, "sac.gamma=5e-1", "reward_weights=[1, -1]").exit_code == OK
    [recipe] = recipes
    assert recipe == Recipe(
        model="tiny",
        rewards=("rewards_of_a_test:helpful", "org/reward"),
        train_dataset="tiny",
        eval_dataset="e.jsonl",
        agent="agent",
        config=MaraConfig(output_dir="out", reward_weights=(1, -1)).replace(sac={"gamma": 0.5}),
    )


def test_what_wins(recipes: list[Recipe]) -> None:
    Path("run.yaml").write_text(
        "model: a\nrewards: r\ntrain-dataset: t\nseed: 1\nnum-episodes: 10\n"
        "sac: {gamma: 0.1, tau: 1e-2}\ntoken-rewards:\n  kl-weight: 0.2\n"
    )
    assert run("-c", "run.yaml").exit_code == OK
    assert run("-c", "run.yaml", "sac.gamma=0.2", "seed=2", "sac.gamma=0.3").exit_code == OK
    assert run("-c", "run.yaml", "-m", "b", "model=c", "--preset", "official").exit_code == OK
    file, assigned, flags = recipes
    assert (file.model, file.rewards, file.train_dataset) == ("a", ("r",), "t")
    assert file.config == MaraConfig(seed=1, num_episodes=10).replace(
        sac={"gamma": 0.1, "tau": 0.01}, token_rewards={"kl_weight": 0.2}
    )
    assert assigned.config == file.config.replace(seed=2, sac={"gamma": 0.3})
    assert flags.model == "b"
    assert flags.config == MaraConfig.official(
        seed=1, num_episodes=10, sac={"gamma": 0.1, "tau": 0.01}, token_rewards={"kl_weight": 0.2}
    )


def test_a_preset_in_the_file(recipes: list[Recipe]) -> None:
    Path("run.yaml").write_text("preset: official\n")
    assert run(*NEEDED, "-c", "run.yaml").exit_code == OK
    assert run(*NEEDED, "-c", "run.yaml", "--preset", "default").exit_code == OK
    assert [recipe.config for recipe in recipes] == [MaraConfig.official(), MaraConfig()]


def test_a_recipe_there_and_back(folder: Path) -> None:
    options = {"model": "m", "rewards": ["a", "b"], "train_dataset": "t", "preset": "official"}
    recipe = Recipe.from_dict(options | {"sac": {"tau": 1e-7}, "run_name": "Grüße"})
    path = recipe.write(folder / "new")
    assert path == folder / "new" / RECIPE_NAME
    assert Recipe.from_dict(read_options(path, (), {})) == recipe


@pytest.mark.usefixtures("unloaded")
def test_nothing_of_the_users_is_overwritten(folder: Path) -> None:
    own = folder / "own"
    own.mkdir()
    text = "# mine\nmodel: tiny\nrewards: rewards_of_a_test:helpful\ntrain_dataset: tiny\n"
    (own / RECIPE_NAME).write_text(text + "output_dir: own\n")
    assert "own/run.yaml is there already and has other options" in fails("-c", own / RECIPE_NAME)
    assert (own / RECIPE_NAME).read_text().startswith("# mine")
    (folder / "out/agent").mkdir(parents=True)
    message = fails(*NEEDED, "-o", "out", "-a", "out/agent")
    assert "out holds an agent already (out/agent): give another output_dir" in message
    (folder / "file").write_text("")
    for place in ("file", "file/below"):
        assert "/file is no folder" in fails(*NEEDED, "-o", folder / place)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "missing: model (--model), rewards (--reward), train_dataset (--train-data)"),
        (NEEDED[2:], "missing: model (--model)"),
        (NEEDED[:4], "missing: train_dataset (--train-data)"),
        (("rewards=[]", *NEEDED[:2], *NEEDED[4:]), "missing: rewards (--reward)"),
        ((*NEEDED, "nonsense"), "'nonsense' is no option; expected key=value"),
        ((*NEEDED, "=3"), "'=3' is no option"),
        ((*NEEDED, ".x=3"), "'.x=3' is no option"),
        ((*NEEDED, "seed=1", "seed.x=3"), "'seed.x=3': seed has no options of its own"),
        ((*NEEDED, "seed=[1"), "the value of 'seed=[1' is not valid YAML"),
        ((*NEEDED, "num_episode=3"), "unknown option 'num_episode'; did you mean 'num_episodes'?"),
        (("train_data=x",), "unknown option 'train_data'; did you mean 'train_dataset'?"),
        ((*NEEDED, "gamma=0.5"), "unknown option 'gamma'; did you mean 'sac.gamma'?"),
        ((*NEEDED, "sac.gama=0.5"), "sac: unknown option 'gama'; did you mean 'gamma'?"),
        ((*NEEDED, "zzz=1"), "unknown option 'zzz'. Allowed: model, rewards, "),
        ((*NEEDED, "sac.gamma=2"), "sac: gamma=2 is not allowed; allowed: a number in [0, 1]"),
        ((*NEEDED, "seed="), "seed=None is not allowed"),
        ((*NEEDED, "preset=own"), "preset='own' is not known; allowed: default, official"),
        ((*NEEDED[2:], "model=5"), "model=5 is not allowed; allowed: names and paths"),
        ((*NEEDED, "-c", "no.yaml"), "no.yaml"),
        ((*NEEDED, "-o", ""), "output_dir='' is not allowed"),
        ((*NEEDED, "--resume"), "there is no checkpoint to resume from in mara-output"),
        ((*NEEDED, "--eval-data", "no.jsonl"), "eval_dataset: no file at no.jsonl; expected a JSO"),
        ((*NEEDED[:4], "--train-data", "."), "train_dataset: no file at ."),
        ((*NEEDED, "-r", "no.module:f"), "reward 'no.module:f' cannot be imported: No module"),
        ((*NEEDED, "-r", "rewards_of_a_test:no"), "cannot be imported: module 'rewards_of_a_test'"),
        ((*NEEDED, "-r", "a b:c"), "reward 'a b:c' cannot be imported"),
        ((*NEEDED, "-r", "rewards_of_a_test:NUMBER"), "'rewards_of_a_test:NUMBER' is a int, not a"),
        (
            (*NEEDED, "-r", "rewards_of_a_test"),
            "names no function; expected rewards_of_a_test:func",
        ),
        ((*NEEDED, "-r", "rewards_of_a_test.py"), "expected rewards_of_a_test:function"),
        ((*NEEDED, "-r", "/no/model"), "reward '/no/model': there is no such folder"),
        ((*NEEDED, "batch_size=2000000"), "batch_size=2000000 exceeds replay.capacity=1000000"),
        ((*NEEDED, "episodes_per_step=99999999999999999999"), "an integer >= 1, below 2**50"),
        ((*NEEDED, "num_collectors=5000"), "allowed: an integer from 0 to 1024"),
        ((*NEEDED, "decoding.top_k=1"), "decoding.top_k=1 leaves the agent nothing to decide"),
        ((*NEEDED, "decoding.max_new_tokens=0"), "leaves the agent nothing to decide"),
        ((*NEEDED, "reward_weights=[0]"), "allowed: one that is not 0"),
        ((*NEEDED, "-a", "/no/agent"), "no agent folder at /no/agent"),
        ((*NEEDED, "report_to=notebook"), "report_to: 'notebook' is not known"),
    ],
    ids=stable_id,
)
def test_mistakes(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in fails(*arguments)
    assert {path.name for path in folder.iterdir()} <= {"rewards_of_a_test.py", "__pycache__"}


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "run.yaml is not valid YAML"),
        ("", "run.yaml must hold option: value lines"),
        ("- model", "run.yaml must hold option: value lines"),
        ("5: 3", "unknown option '5'"),
        ("sac: 3", "sac=3 is not allowed; allowed: a SacConfig or a mapping"),
        ("rewards: {a: b}", "rewards=({'a': 'b'},) is not allowed"),
        ("rewards: [[a]]", "rewards=(['a'],) is not allowed"),
        ("model: [a]", "model=['a'] is not allowed"),
        ("x: !!python/object/apply:os.system [touch marker]", "run.yaml is not valid YAML"),
    ],
)
def test_files_refused(content: str, message: str) -> None:
    Path("run.yaml").write_text(content)
    full = {"-m": "model", "-r": "rewards", "--train-data": "train_dataset"}
    given = [
        text
        for flag, value in zip(NEEDED[::2], NEEDED[1::2], strict=True)
        if not content.startswith(full[flag])
        for text in (flag, value)
    ]
    assert message in fails(*given, "-c", "run.yaml")
    assert not Path("marker").exists()


@pytest.mark.parametrize("arguments", [("--no-such",), ("--preset", "own"), ("--resume=1",)])
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == FAILED
    assert "Error" in result.stderr and result.stdout == ""


# --- rewards and data ------------------------------------------------------------------------


def test_rewards() -> None:
    sys.path.append(os.getcwd())
    Path("a:b").mkdir()
    Path("folder").mkdir()
    specs = ("org/model", "./folder", "rewards_of_a_test:Rules.short", "a:b")
    model, path, function, strange = load_rewards(specs)
    assert (model, path, strange) == ("org/model", "./folder", "a:b")
    assert function(["x"], ["four"]) == [-4]


def test_data_of_a_file() -> None:
    chat = [{"role": "user", "content": "b"}]
    records: list[dict[str, Any]] = [
        {"prompt": "a", "id": "x", "answer": 1},
        {"messages": chat, "answer": 2},
        {"instruction": "c", "answer": None},
    ]
    path = Path("data.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert load_rows("data.jsonl", name="train_dataset") == [
        {"prompt": "a", "answer": 1},
        {"prompt": chat, "answer": 2},
        {"prompt": "c", "answer": None},
    ]


def test_data_of_the_tiny_world() -> None:
    train, heldout = (
        {row["prompt"] for row in load_rows("tiny", name=name)}
        for name in ("train_dataset", "eval_dataset")
    )
    assert train == {instruction.text for instruction in instructions(split="train")}
    assert heldout and not train & heldout


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "eval_dataset: data.jsonl holds no prompts"),
        ("{", "data.jsonl, line 1 is not valid JSON"),
        ('{"text": "a"}', "data.jsonl, line 1 has no prompt"),
        ('{"prompt": [3, 4]}', "the prompt of row 0 of eval_dataset is [3, 4]"),
        ('{"prompt": "a"}\n{"prompt": "b", "x": 1}', "row 1 of eval_dataset has the columns"),
        ('{"prompt": "a", "completions": 1}', "eval_dataset has the column 'completions'"),
    ],
)
def test_data_refused(content: str, message: str) -> None:
    Path("data.jsonl").write_text(content)
    assert message in fails(*NEEDED, "--eval-data", "data.jsonl")


# --- a run -----------------------------------------------------------------------------------


def test_a_run_and_its_continuation(folder: Path) -> None:
    Path("eval.jsonl").write_text('{"prompt": "How do I bake bread?"}\n')
    result = run(*NEEDED, *SMALL, "--eval-data", "eval.jsonl", "-o", "out")
    assert result.exit_code == OK, (result.output, result.exception)
    out = folder / "out"
    assert f"agent    {Path('out') / 'agent'}\nmetrics  {Path('out') / 'metrics.jsonl'}\n" in (
        result.stdout
    )
    assert (f"plot     {Path('out') / PLOT_NAME}" in result.stdout) == (out / PLOT_NAME).exists()
    lines = read_metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "eval/preference_vs_greedy" in lines[-1] and "entropy" in lines[-1]
    agent = MaraAgent.from_pretrained(out / "agent")
    assert agent.config.base_model == "tiny"

    # Another run does not overwrite it.
    message = fails(*NEEDED, *SMALL, "-o", "out")
    assert "out holds checkpoints of an earlier run: resume it (--resume), or give" in message

    # The recipe in the folder is all that is needed to go on.
    resumed = run("-c", out / RECIPE_NAME, "--resume", "num_episodes=8")
    assert resumed.exit_code == OK, resumed.output
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4]
    assert yaml.safe_load((out / RECIPE_NAME).read_text())["num_episodes"] == 8
    # What is refused leaves everything as it was.
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    Path("others.jsonl").write_text('{"prompt": "How do I bake bread?"}\n')
    for arguments, complaint in (
        (("seed=1",), "is of another run; what differs: seed (0 there, 1 here)"),
        (("sac.gamma=0.9",), "what differs: sac.gamma (0.0 there, 0.9 here)"),
        (("--train-data", "others.jsonl"), "what differs: train_dataset ("),
        (("-r", "rewards_of_a_test:harmful"), "a resumed run goes on with what it has"),
        (("-a", "out/agent"), "agent='out/agent' differs from None in out/run.yaml"),
        (
            ("learning_rate_schedule=linear", "num_episodes=9"),
            "can change only without schedules",
        ),
    ):
        other = run("-c", out / RECIPE_NAME, "--resume", *arguments)
        assert other.exit_code == FAILED and complaint in other.stderr, other.stderr
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    # An agent is trained further.
    again = run(*NEEDED, *SMALL[1:], "num_episodes=2", "-a", "out/agent", "-o", "again")
    assert again.exit_code == OK, again.output


def test_the_plot_is_named(folder: Path, recipes: list[Recipe]) -> None:
    for name in (PLOT_NAME, "metrics.jsonl"):
        Path(name).write_text("")
    result = run(*NEEDED, "-o", ".")
    assert result.stdout == f"metrics  metrics.jsonl\nplot     {PLOT_NAME}\n"


def test_what_the_trainer_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Trainer:
        def __init__(self, model: str, rewards: list, config: MaraConfig, **options: Any) -> None:
            given.update(model=model, rewards=rewards, config=config, **options)

        def load_checkpoint(self, path: Path) -> None:
            given["resumed"] = path

        def train(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(mara_train.trainer, "MaraTrainer", Trainer)
    result = run(*NEEDED, "-o", "out dir", "seed=4")
    # Nothing was saved, nothing can be resumed.
    assert result.exit_code == INTERRUPTED
    assert "interrupted: there is no checkpoint in out dir yet; the same command" in result.stderr
    [reward] = given["rewards"]
    asked, answer = "How do I bake bread?", "Here is a simple way to bake bread."
    assert reward([asked], [answer]) == [helpfulness(asked, answer)]
    assert given["config"] == MaraConfig(seed=4, output_dir="out dir")
    assert "resumed" not in given and given["agent"] is given["eval_dataset"] is None
    assert len(given["train_dataset"]) == len(instructions(split="train"))

    checkpoint = Path("out dir") / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    state = {
        "config": given["config"].to_dict(),
        "train_dataset": fingerprint(given["train_dataset"]),
    }
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    result = run("-c", Path("out dir") / RECIPE_NAME, "--resume")
    assert result.exit_code == INTERRUPTED and given["resumed"] == checkpoint
    command = f"mara-fast train --config 'out dir/{RECIPE_NAME}' --resume"
    assert f"the newest checkpoint is {checkpoint}; go on with\n  {command}" in result.stderr
    assert shlex.split(command)[3] == str(Path("out dir") / RECIPE_NAME)


def start(*arguments: str) -> subprocess.Popen[str]:
    """As a plain clone runs it, from another folder."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "train")))
    return subprocess.Popen(
        [sys.executable, "-m", "mara_train.cli", *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Of a suite that runs in the background Ctrl-C is ignored, and by its children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_interrupted_and_resumed_equals_uninterrupted(folder: Path) -> None:
    long = (*NEEDED, *SMALL, "num_episodes=200", "-o", "out")
    process = start(*long)
    end = time.monotonic() + 60
    while not (folder / "out" / "checkpoint-2").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == INTERRUPTED
    assert "Traceback" not in said
    [command] = re.findall(r"go on with\n  (.*)\n", said)
    program, _, arguments = command.partition(" --config ")
    assert program.endswith("mara_train.cli")
    # Whatever step it got to, four more are what the other run has, too.
    stopped_at = max(int(path.name[11:]) for path in (folder / "out").glob("checkpoint-*"))
    total = f"num_episodes={2 * (stopped_at + 3)}"
    resumed = run("--config", *shlex.split(arguments), total)
    assert resumed.exit_code == OK, resumed.output
    assert run(*NEEDED, *SMALL, total, "-o", "whole").exit_code == OK
    one, other = (folder / name / "agent" / "model.safetensors" for name in ("out", "whole"))
    assert one.read_bytes() == other.read_bytes()
    timed = {"step_time_s", "episodes_per_s"}
    with_times = [read_metrics(folder / name) for name in ("out", "whole")]
    [out, whole] = [
        [{n: v for n, v in line.items() if n not in timed} for line in lines]
        for lines in with_times
    ]
    assert out == whole and len(out) == stopped_at + 3


# --- how it is found -------------------------------------------------------------------------


def fast(*arguments: str) -> Result:
    return CliRunner().invoke(mara_fast.cli.app, list(arguments))


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the entry points that are installed."""

    def install(**values: str) -> None:
        points = [EntryPoint(name, value, commands.GROUP) for name, value in values.items()]
        points.append(EntryPoint("other", "no_such_module:app", "another.group"))
        found = [SimpleNamespace(entry_points=EntryPoints(points))]
        monkeypatch.setattr(commands, "distributions", lambda: found)

    return install


def test_the_entry_point_is_declared() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    found = project["entry-points"][commands.GROUP]
    assert found == {n: f"{module}:app" for n, module in commands.COMPANIONS.items()}
    assert {name: f"{module}:app" for name, module in commands.COMPANIONS.items()} == (
        project["entry-points"][commands.GROUP]
    )
    assert any(line.startswith("matplotlib") for line in project["optional-dependencies"]["train"])


def test_mara_fast_has_the_command(entries: Callable[..., None]) -> None:
    entries(train="mara_train.cli:app")
    listed = fast("--help")
    assert listed.exit_code == OK
    assert re.search(r"\btrain\b\s+Train an agent for a frozen", listed.stdout)
    for flag in ("--help", "-h"):
        result = fast("train", flag)
        assert result.exit_code == OK and "mara-fast train" not in result.stderr
        assert "--train-data" in result.stdout
    assert "missing: model" in fast("train").stderr


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-c", "run.yaml", "seed=1", "--resume")])
def test_not_installed(entries: Callable[..., None], arguments: tuple[str, ...]) -> None:
    entries()
    result = fast("train", *arguments)
    assert result.exit_code == FAILED and result.stdout == ""
    assert result.stderr == (
        "mara-fast: train is not installed: install mara-fast anew, or run python -m "
        "mara_train.cli\n"
    )
    listed = fast("--help")
    assert listed.exit_code == OK and "train is not installed" in listed.stdout
    assert fast("no-such-command").exit_code == FAILED


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module:app", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("mara_train.cli:no_such", "AttributeError: module 'mara_train.cli' has no attribute"),
        ("mara_train.cli:train", "TypeError: expected a typer.Typer, got function"),
        ("broken_command:app", "ZeroDivisionError: division by zero"),
    ],
)
def test_broken(entries: Callable[..., None], value: str, reason: str) -> None:
    sys.path.append(os.getcwd())
    Path("broken_command.py").write_text("1 / 0")
    entries(train=value)
    result = fast("train", "--help")
    assert result.exit_code == FAILED
    assert f"mara-fast: train ({value}) cannot be loaded: {reason}" in result.stderr
    assert fast("--help").exit_code == OK
    assert "generate" in fast("--help").stdout


def test_others_can_add_commands(entries: Callable[..., None]) -> None:
    sys.path.append(os.getcwd())
    Path("extra_commands.py").write_text(
        "import typer\napp = typer.Typer()\n"
        "@app.command()\ndef f(x: int) -> None:\n    'Doubles.'\n    typer.echo(2 * x)\n"
    )
    entries(double="extra_commands:app", env="extra_commands:app", train="mara_train.cli:app")
    assert "Doubles." in fast("--help").stdout
    assert fast("double", "4").stdout == "8\n"
    # Nobody replaces a command of ours.
    assert "torch" in fast("env").stdout


def test_what_an_old_build_left_does_not_hide_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = "Metadata-Version: 2.1\nName: mara-fast\nVersion: 0.1.0\n"
    for name, file, points in (
        (
            "tree/mara_fast.egg-info",
            "PKG-INFO",
            "[console_scripts]\nmara-fast = mara_fast.cli:main\n",
        ),
        ("site/mara_fast-0.1.0.dist-info", "METADATA", f"[{commands.GROUP}]\nnew = a:b\n"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / file).write_text(info)
        (folder / name / "entry_points.txt").write_text(points)
    monkeypatch.setattr(sys, "path", [str(folder / "tree"), str(folder / "site"), *sys.path])
    assert commands._found()["new"].value == "a:b"


def test_only_those_who_need_them_look_for_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked() -> None:
        raise AssertionError("looked for entry points")

    monkeypatch.setattr(commands, "distributions", looked)
    assert fast("generate", "--help").exit_code == OK
    assert fast("env").exit_code == OK


def test_help_loads_nothing_heavy() -> None:
    heavy = "('torch', 'transformers', 'matplotlib', 'triton', 'yaml')"
    code = f"import sys, mara_train.cli; print([m for m in {heavy} if m in sys.modules])"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert process.stdout == "[]\n", process.stderr


def test_help_teaches() -> None:
    command: Any = typer.main.get_command(cli.app)
    assert command.help and command.help[-1] == "."
    for parameter in command.params:
        if parameter.name != "help":
            assert parameter.help and parameter.help[-1] in ".:", parameter.name
    examples = re.findall(r"mara-fast train ([^|\n]*?)(?: {3,}.*)?$", command.epilog, re.M)
    assert len(examples) == 3
    for arguments in examples:
        # Raises for a flag that does not exist.
        command.make_context("train", shlex.split(arguments))
