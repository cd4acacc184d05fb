"""The command: what its help says works, and what it says of what does not."""

import importlib
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mara_fast.evaluation.cli import app
from mara_fast.evaluation.spec import EvalSpec

ROOT = Path(__file__).parents[2]
SPEC = """
systems: {base: {}, mara: {agent: tiny/agent}}
datasets: {held-out: tiny}
comparisons: [mara vs base]
judge: {rewards: tiny/reward}
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "spec.yaml").write_text(SPEC)
    return str(tmp_path / "spec.yaml")


def test_the_examples_of_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = typer.main.get_command(app)
    assert command.epilog is not None
    lines = [line.strip() for line in command.epilog.splitlines() if "mara-fast eval" in line]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.partition("  ")[0])
        assert words[:2] == ["mara-fast", "eval"]
        given = command.make_context("eval", words[2:]).params
        assert given["dry_run"] or given["output"]
        paths = dict(text.split("=") for text in given["path"] or ())
        EvalSpec.read(Path(given["spec_path"]), paths=paths)


def test_a_dry_run(spec: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [spec, "--dry-run", "--limit", "3"])
    assert result.exit_code == 0, result.output
    assert "held-out: 3 of 672 unique prompts (672 rows)" in result.stdout
    (tmp_path / "file").write_text("")
    for options in (["-o", str(tmp_path / "file")], ["--work", str(tmp_path / "file")]):
        result = CliRunner().invoke(app, [spec, "--dry-run", *options])
        assert result.exit_code == 2 and "is a file" in result.stderr
    result = CliRunner().invoke(app, [spec])
    assert result.exit_code == 2 and "--output is missing" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "out"], "is in out; the same command goes on"),
        (["-o", "out", "--work", "there"], "is in there; the same command goes on"),
        (["-o", "out", "--overwrite"], "is in out; the same command without --overwrite goes on"),
    ],
)
def test_what_an_interrupted_run_says(
    options: list[str], message: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    # The package has a function of this module's name.
    module = importlib.import_module("mara_fast.evaluation.evaluate")
    monkeypatch.setattr(module, "answer_all", stopped)
    result = CliRunner().invoke(app, [spec, *options])
    assert result.exit_code == 130 and message in result.stderr
