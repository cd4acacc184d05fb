"""``mara-fast inspect``: a prompt or a file, shown, written or as JSON."""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import mara_fast
import mara_fast.cli
import speaker
from mara_fast import Engine, Generation
from mara_fast.cli import app as main
from mara_fast.data_parallel import EngineOptions
from mara_fast.inspection.cli import app
from mara_fast.jsonl import json_line
from naming import stable_id

TOKENS = ("--max-new-tokens", "12")
OK, FAILED = 0, 2


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)


def fails(*arguments: str | Path, stdin: str | None = None) -> str:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == FAILED, (result.output, result.exception)
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("mara-fast: ")
    return result.stderr


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[EngineOptions]:
    """What engines were asked for; all get one that is loaded already."""
    asked: list[EngineOptions] = []

    def load(options: EngineOptions, **others: Any) -> mara_fast.Engine:
        asked.append(options)
        return speaker.engine(aligned=options.agent is not False)

    monkeypatch.setattr(mara_fast.cli, "load_engine", load)
    return asked


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong must be said before a model is loaded."""

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mara_fast.cli, "load_engine", load)


def results_file(path: Path, *results: Generation) -> Path:
    lines = [json_line({"id": f"p{i}"} | result.to_dict()) for i, result in enumerate(results)]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_prompt(engines: list[EngineOptions]) -> None:
    result = run(*TOKENS, speaker.PROMPTS[1])
    assert result.exit_code == OK, result.output
    assert "12 tokens, " in result.stdout and "without the agent" in result.stdout
    assert engines == [EngineOptions(model="tiny")]
    assert run(*TOKENS, stdin="Hi").exit_code == OK
    assert run(*TOKENS, "Hi", "--no-agent", "--dtype", "float32").exit_code == OK
    assert engines[-1] == EngineOptions(model="tiny", agent=False, dtype="float32")


@pytest.mark.usefixtures("engines")
def test_a_prompt_as_json() -> None:
    result = run(
        *TOKENS,
        "Hi",
        "--json",
        "--top-k",
        "6",
        "--counterfactuals",
        2,
        "--counterfactual-tokens",
        3,
    )
    [record] = lines(result.stdout)
    [wanted] = speaker.engine().generate("Hi", trace=True, max_new_tokens=12, top_k=6)
    generation = Generation.from_dict(record)
    assert generation.token_ids == wanted.token_ids
    assert generation.counterfactuals is not None and len(generation.counterfactuals) <= 2
    assert all(len(item.token_ids) <= 3 for item in generation.counterfactuals)


@pytest.mark.usefixtures("engines")
def test_a_page(tmp_path: Path) -> None:
    page = tmp_path / "folder" / "page.html"
    result = run(*TOKENS, "Hi", "--html", page)
    assert result.exit_code == OK and result.stdout == ""
    assert f"{page}: 1 results, " in result.stderr
    before = page.read_text()
    assert before.startswith("<!doctype html>") and '["model","tiny"]' in before
    assert "exists; name another file, or give --overwrite" in fails("Hi", "--html", page)
    assert page.read_text() == before
    assert run(*TOKENS, "Hello", "--html", page, "--overwrite", "--json").exit_code == OK
    assert page.read_text() != before


def test_a_file(
    spoken: list[Generation],
    engines: list[EngineOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = results_file(tmp_path / "results.jsonl", *spoken)
    result = run("-i", path, "--json")
    assert [Generation.from_dict(record) for record in lines(result.stdout)] == spoken
    [record] = lines(run("-i", path, "--id", "p2", "--json").stdout)
    assert record["id"] == "p2" and engines == []
    shown = run("-i", path, "--id", "p0", "--id", "p1")
    assert shown.exit_code == OK and "p0" in shown.stdout and "p1" in shown.stdout
    # The model that made them continues them.
    Path(f"{path}.settings.json").write_text(json.dumps({"model": "org/model", "agent": "tiny"}))
    more = run("-i", path, "--counterfactuals", 1, "--json")
    assert engines == [EngineOptions(model="org/model", agent=False)]
    for record in lines(more.stdout):
        assert len(record["counterfactuals"]) <= 1
    # What another model says is not their continuation.
    monkeypatch.setattr(mara_fast.cli, "load_engine", lambda *a, **o: Engine("tiny", False))
    assert "result 'p0' was made by another model" in fails("-i", path, "--counterfactuals", 1)
    page = tmp_path / "page.html"
    assert run("-i", path, "--html", page).exit_code == OK
    assert '["model","org/model"]' in page.read_text() and '"id":"p3"' in page.read_text()


@pytest.mark.usefixtures("engines")
def test_what_generate_writes_can_be_read(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hi"}\n{"prompt": "Hello", "id": "other"}\n')
    path = tmp_path / "results.jsonl"
    arguments = ["generate", "-i", str(prompts), "-o", str(path), "--trace", *TOKENS]
    assert CliRunner().invoke(main, arguments).exit_code == OK
    result = run("-i", path, "--id", "0", "--json")
    assert lines(result.stdout)[0]["prompt"] == "Hi"


@pytest.mark.usefixtures("unloadable")
def test_files_refused(spoken: list[Generation], tmp_path: Path) -> None:
    [untraced] = speaker.engine().generate("Hi", max_new_tokens=2)
    path = results_file(tmp_path / "plain.jsonl", untraced)
    more = ("--counterfactuals", "2")
    unknown = results_file(tmp_path / "unknown.jsonl", *spoken)
    assert "the model that made these is not recorded: give --model" in fails("-i", unknown, *more)
    assert f"{path}, line 1 has no trace: decode with --trace" in fails("-i", path, *more)
    path = results_file(tmp_path / "results.jsonl", *spoken)
    assert "has no result with id 'p9'; its ids: p0, p1, p2, p3" in fails("-i", path, "--id", "p9")
    assert "are the same file" in fails("-i", path, "--html", path, "--overwrite")
    for text, message in (
        ("", "holds no results"),
        ("x\n", "line 1 is not valid JSON"),
        ("[1]\n", "a result must be an object"),
        ('{"prompt": "Hi"}\n', "line 1: not a result of mara-fast: it has no 'text'"),
        (json.dumps(spoken[0].to_dict() | {"trace_version": 9}), "update this one"),
        (json.dumps(spoken[0].to_dict() | {"text": 5}), "line 1: not a result of mara-fast: text"),
    ):
        path.write_text(text)
        assert message in fails("-i", path, *more)
    assert "no file at" in fails("-i", tmp_path / "nothing.jsonl")
    path = results_file(tmp_path / "results.jsonl", *spoken)
    Path(f"{path}.settings.json").write_text("{")
    assert "settings.json is not valid" in fails("-i", path, *more)


@pytest.mark.parametrize("cut", [1, 20, 4000])
def test_a_last_line_that_a_stop_cut_off(
    spoken: list[Generation], tmp_path: Path, cut: int
) -> None:
    """It is left out, with a note; elsewhere and with an end a line has to be one."""
    prompt = dataclasses.replace(spoken[0], prompt="日本語")
    path = results_file(tmp_path / "results.jsonl", spoken[1], prompt)
    whole = path.read_bytes()
    path.write_bytes(whole[: -1 - cut])
    result = run("-i", path, "--json")
    assert result.exit_code == OK and result.stderr == (
        f"{path}, line 2 was cut off, as by a stop: it is left out\n"
    )
    assert [record["id"] for record in lines(result.stdout)] == ["p0"]
    # Cut within a character.
    within = whole.index("本".encode()) + 1
    path.write_bytes(whole[:within])
    assert len(lines(run("-i", path, "--json").stdout)) == 1
    path.write_bytes(whole[:within] + b"\n")
    assert "is not UTF-8 text" in fails("-i", path)
    path.write_bytes(whole[: -1 - cut] + b"\n")
    assert "line 2 is not valid JSON" in fails("-i", path)
    path.write_bytes(whole[:-1])
    assert len(lines(run("-i", path, "--json").stdout)) == 2


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Hi", "-i", "x"], "give a prompt or --input, not both"),
        (["Hi", "--id", "x"], "--id needs --input"),
        (["Hi", "--overwrite"], "--overwrite needs --html"),
        (["Hi", "--html", "."], "is a folder"),
        (["Hi", "-a", "x", "--no-agent"], "give --agent or --no-agent, not both"),
        (["Hi", "--top-p", "2"], "top_p=2.0 is not allowed"),
        (["Hi", "--window", "0"], "window=0 is not allowed"),
        (["Hi", "-c", "nothing.yaml"], "nothing.yaml"),
        (["-i", "x", "--top-k", "3"], "agent and decoding options have no effect"),
        (["-i", "x", "--preset", "paper"], "agent and decoding options have no effect"),
        (["-i", "x", "--no-agent"], "agent and decoding options have no effect"),
        (["-i", "x", "-m", "no/such"], "--model without effect: with --input a model is needed"),
        (["-i", "x", "--device", "cuda:7", "--dtype", "float32"], "--dtype, --device without eff"),
        (["-i", "x", "--max-batch-size", "3"], "--max-batch-size without effect"),
        (["-i", "x", "--counterfactual-tokens", "3"], "needs --counterfactuals of 1 or more"),
        (
            ["Hi", "--counterfactuals", "0", "--counterfactual-tokens", "3"],
            "--counterfactual-tokens needs --counterfactuals of 1 or more",
        ),
        (["Hi", "--html", f"{__file__}/page.html"], "test_cli.py is not a folder"),
        (["Hi", "--html", f"{__file__}/more/page.html"], "test_cli.py is not a folder"),
        (["Hi", "--html", "/proc/page.html"], "--html /proc/page.html cannot be written: "),
        ([], "standard input is empty: no prompt"),
    ],
    ids=stable_id,
)
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(*arguments, stdin="")
    assert list(tmp_path.iterdir()) == []


def test_the_flags_of_generate_are_its_flags() -> None:
    shared = set(inspect.signature(mara_fast.cli.generate).parameters) - {
        "num_gpus",
        "tensor_parallel",
        "output_path",
        "trace",
        "stats",
    }
    [command] = app.registered_commands
    assert command.callback is not None
    assert shared <= set(inspect.signature(command.callback).parameters)


def test_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, mara_fast.inspection.cli; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
