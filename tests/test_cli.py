"""The command line: what it prints, where, with which exit status, and after every interruption."""

import copy
import dataclasses
import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

import mara_fast
import mara_fast.answering
import mara_fast.cli
import speaker
from mara_fast import DecodingConfig, Generation, MaraAgent
from mara_fast.cli import app
from mara_fast.data_parallel import EngineOptions
from mara_fast.flags import stdin_prompt
from naming import stable_id

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TOKENS = ("--max-new-tokens", "12")
OK, FAILED, INTERRUPTED = 0, 2, 130


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)


def fails(*arguments: str | Path, stdin: str | None = None) -> str:
    """The one line of complaint of a command that must fail cleanly."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == FAILED, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("mara-fast: ") and "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the language model and the agent."""
    return speaker.save(tmp_path_factory.mktemp("speaker"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes an engine that is loaded already, whatever model is named."""

    def engine(options: EngineOptions, **others: Any) -> mara_fast.Engine:
        aligned = options.agent is not False
        return speaker.engine(max_batch_size=options.max_batch_size, aligned=aligned)

    monkeypatch.setattr(mara_fast.cli, "load_engine", engine)


def answer(prompt: Any, **options: Any) -> Generation:
    [result] = speaker.engine().generate(prompt, **({"max_new_tokens": 12} | options))
    return result


def prompts_file(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# One prompt


def test_a_prompt(folders: tuple[Path, Path]) -> None:
    lm, agent = folders
    result = run("generate", "-m", lm, "-a", agent, *TOKENS, "Hi")
    assert result.exit_code == OK
    assert result.stdout_bytes.decode() == f"{answer('Hi').text}\n"
    assert result.stderr == ""
    plain = run("generate", "-m", lm, "--no-agent", *TOKENS, "Hi", "--dtype", "float32")
    unaligned = speaker.engine(aligned=False).generate("Hi", max_new_tokens=12)[0].text
    assert plain.stdout_bytes.decode() == f"{unaligned}\n" != result.stdout_bytes.decode()
    # Without an agent of its own a model decodes plainly.
    assert run("generate", "-m", lm, *TOKENS, "Hi").stdout == plain.stdout


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("stdin", "prompt"),
    [("Hi", "Hi"), ("Hi\n", "Hi"), ("Hi\r\n", "Hi"), (" a\nb \n", " a\nb "), ("Grüße 🎉", None)],
)
def test_standard_input(stdin: str, prompt: str | None) -> None:
    result = run("generate", *TOKENS, stdin=stdin)
    assert result.exit_code == OK
    assert result.stdout_bytes.decode() == f"{answer(prompt or stdin).text}\n"


def test_no_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for nothing in ("", "\n", "\r\n\n"):
        assert "standard input is empty: no prompt" in fails("generate", stdin=nothing)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdin in (Terminal("Hi"), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(ValueError, match="no prompt: give one as an argument, by standard in"):
            stdin_prompt()


@pytest.mark.usefixtures("loaded")
def test_json_and_stats() -> None:
    result = run("generate", *TOKENS, "--json", "--stats", "--trace", "Hi")
    assert result.exit_code == OK
    [record] = lines(result.stdout)
    wanted = json.loads(json.dumps(answer("Hi", trace=True).to_dict()))
    record["stats"]["seconds"] = wanted["stats"]["seconds"] = 0
    assert record == wanted
    assert len(record["trace"]) == 12
    assert re.fullmatch(
        r"12 tokens, \d\.\d\d forwards per token, rank 0 accepted \d+%, "
        r"all rejected \d+% of decided positions\n",
        result.stderr,
    )
    assert run("generate", "--max-new-tokens", "0", "--stats", "Hi").stderr == "no new tokens\n"
    assert "12 tokens" in run("generate", *TOKENS, "--stats", "--no-agent", "Hi").stderr


@pytest.mark.usefixtures("loaded")
def test_an_empty_prompt_is_a_prompt() -> None:
    assert run("generate", *TOKENS, "").stdout_bytes.decode() == f"{answer('').text}\n"


# Options


FLAGS: dict[str, tuple[list[str], Any]] = {
    "max_new_tokens": (["--max-new-tokens", "7"], 7),
    "min_new_tokens": (["--min-new-tokens", "5"], 5),
    "top_k": (["--top-k", "0"], 0),
    "top_p": (["--top-p", "0.5"], 0.5),
    "temperature": (["--temperature", "0.7"], 0.7),
    "acceptance": (["--acceptance", "sample"], "sample"),
    "threshold": (["--threshold", "0.25"], 0.25),
    "strategy": (["--strategy", "max_prob"], "max_prob"),
    "fallback": (["--fallback", "max_prob"], "max_prob"),
    "order": (["--order", "top_last"], "top_last"),
    "window": (["--window", "12"], 12),
    "seed": (["--seed", "18446744073709551615"], 2**64 - 1),
    "stop_strings": (["--stop", "a", "--stop", "b c"], ("a", "b c")),
    "ignore_eos": (["--ignore-eos"], True),
    "prompt_format": (["--prompt-format", "raw"], "raw"),
    "trace": (["--trace", "--json"], True),
    "agent_weights": (["--agent-weight", "2.5"], (2.5,)),
    "agent_combination": (["--agent-combination", "product"], "product"),
    "max_fallback_rate": (["--max-fallback-rate", "0.75"], 0.75),
    "max_repetition": (["--max-repetition", "1"], 1),
    "kl_budget": (["--kl-budget", "0.5"], 0.5),
}


@pytest.fixture
def configs(loaded: None, monkeypatch: pytest.MonkeyPatch) -> list[DecodingConfig]:
    """Every config that a prompt would have been answered with."""
    found: list[DecodingConfig] = []
    monkeypatch.setattr(
        mara_fast.answering, "answer", lambda engine, config, *rest, **kwargs: found.append(config)
    )
    return found


def test_every_option_has_its_flag(configs: list[DecodingConfig]) -> None:
    names = {field.name for field in dataclasses.fields(DecodingConfig)} - {"eos_token_id"}
    assert names == FLAGS.keys()
    for name, (flags, value) in FLAGS.items():
        assert run("generate", "Hi", *flags).exit_code == OK
        assert configs.pop() == DecodingConfig(**{name: value})
    # It has no meaning with the strategy above.
    together = {name: given for name, given in FLAGS.items() if name != "kl_budget"}
    flags = [flag for flags, _ in together.values() for flag in flags]
    assert run("generate", "Hi", *flags).exit_code == OK
    assert configs.pop() == DecodingConfig(**{name: value for name, (_, value) in together.items()})
    assert run("generate", "Hi", "--window", "auto").exit_code == OK
    assert configs.pop() == DecodingConfig()


def test_presets_files_and_flags(configs: list[DecodingConfig], tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("top_k: 7\nmax-new-tokens: 9\nstop: [x]\neos_token_id: [3, 4]\nwindow: auto\n")
    from_file = {"top_k": 7, "max_new_tokens": 9, "stop_strings": "x", "eos_token_id": (3, 4)}
    for arguments, wanted in (
        ([], DecodingConfig()),
        (["--preset", "paper"], DecodingConfig.paper()),
        (["--preset", "official"], DecodingConfig.official()),
        (["--preset", "official", "--fallback", "last"], DecodingConfig.official(fallback="last")),
        (["-c", str(path)], DecodingConfig(**from_file)),
        (["-c", str(path), "--top-k", "3"], DecodingConfig(**(from_file | {"top_k": 3}))),
        (
            ["-c", str(path), "--preset", "official"],
            DecodingConfig.official(**from_file),
        ),
    ):
        result = run("generate", "Hi", *arguments)
        assert result.exit_code == OK, result.output
        assert configs.pop() == wanted


def test_an_agents_own_options(folders: tuple[Path, Path], tmp_path: Path) -> None:
    agent = copy.deepcopy(speaker.agent())
    agent.config = dataclasses.replace(agent.config, decoding={"max_new_tokens": 300, "top_k": 5})
    agent.save_pretrained(tmp_path)
    more = ("generate", "-m", folders[0], "-a", tmp_path, "--json", "--stop", "e", "Hi")
    [record] = lines(run(*more, "--min-new-tokens", "299").stdout)
    assert record["finish_reason"] == "stop"
    assert "=301 exceeds max_new_tokens=300" in fails(*more, "--min-new-tokens", "301")
    agent.config = dataclasses.replace(agent.config, decoding={"max_new_tokens": 3, "top_k": 5})
    agent.save_pretrained(tmp_path)
    result = run("generate", "-m", folders[0], "-a", tmp_path, "--json", "Hi")
    assert result.exit_code == OK
    assert lines(result.stdout)[0]["token_ids"] == (
        answer("Hi", max_new_tokens=3, top_k=5).token_ids
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "2"], "top_p=2.0 is not allowed; allowed: a number in [0, 1]"),
        (["--top-p", "nan"], "top_p=nan is not allowed"),
        (["--top-k", "-1"], "top_k=-1 is not allowed"),
        (["--temperature", "0"], "temperature=0.0 is not allowed"),
        (["--window", "0"], "window=0 is not allowed"),
        (["--window", "-3"], "window='-3' is not allowed; allowed: an integer >= 1 or \"auto\""),
        (["--window", "²"], "window='²' is not allowed"),
        (["--window", "wide"], "window='wide' is not allowed"),
        (["--seed", "-1"], "seed=-1 is not allowed"),
        (["--order", "up"], "order='up' is not known; allowed: descending, reverse, top_last"),
        (["--stop", ""], "stop_strings=['']"),
        (["--min-new-tokens", "9", *TOKENS[:1], "8"], "min_new_tokens=9 exceeds max_new_tokens=8"),
        (["--preset", "paper", "--min-new-tokens", "999"], "exceeds max_new_tokens=256"),
        (["-o", "out"], "--output needs --input"),
        (["-i", "in"], "give a prompt or --input, not both"),
        (["-a", "x", "--no-agent"], "give --agent or --no-agent, not both"),
        (["--overwrite"], "--overwrite needs --output"),
        (["--trace"], "--trace needs --json or --input"),
        (["-c", "nothing.yaml"], "nothing.yaml"),
        (["-m", "/no/such/model"], "/no/such/model"),
        (["-m", "no/model", "--dtype", "int8"], "dtype='int8' is not known"),
        (["-m", "no/model", "--device", "abacus"], "device='abacus' is not known"),
        (["--max-batch-size", "0"], "max_batch_size=0 is not allowed"),
    ],
    ids=stable_id,
)
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails("generate", "Hi", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"top_k: [", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"", "must hold option: value lines"),
        (b"- top_k", "must hold option: value lines"),
        (b"topk: 3", "unknown option 'topk'; did you mean 'top_k'?"),
        (b"model: x", "unknown option 'model'"),
        (b"5: 3", "unknown option '5'"),
        (b"top_k: many", "top_k='many' is not allowed"),
        (b"ignore_eos: 1", "ignore_eos=1 is not allowed; allowed: a bool"),
        (b"stop_strings:", "stop_strings=None is not allowed"),
        (b"x: !!python/object/apply:os.system [touch marker]", "is not valid YAML"),
    ],
)
def test_option_files_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("options.yaml").write_bytes(content)
    assert message in fails("generate", "Hi", "--config", "options.yaml")
    assert message in fails("generate", "Hi", "-c", "options.yaml", "--preset", "paper")
    assert not Path("marker").exists()


def test_agents_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    lm, _ = folders
    MaraAgent(32, 8, base_model="org/model").save_pretrained(tmp_path / "agent")
    message = fails("generate", "-m", lm, "-a", tmp_path / "agent", "Hi")
    assert "judges states of size 32" in message and "(org/model)" in message
    assert "no agent folder at" in fails("generate", "-m", lm, "-a", tmp_path / "nothing", "Hi")


@pytest.mark.usefixtures("loaded")
def test_prompts_refused() -> None:
    message = fails("generate", "x" * 600)
    assert "tokens; with max_new_tokens=256 it needs" in message and "the limit is 512" in message
    # An argument that is not UTF-8, as the shell hands it over.
    assert "prompt 0 holds half a surrogate pair" in fails("generate", "\udcff")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-flag"],
        ["--top-k", "many"],
        ["--preset", "own"],
        ["one", "two"],
        ["--seed", "1.5"],
    ],
    ids=stable_id,
)
def test_usage_errors(arguments: list[str]) -> None:
    result = run("generate", *arguments)
    assert result.exit_code == FAILED
    assert "Usage:" in result.stderr and result.stdout == ""


def test_who_closes_the_pipe_is_not_told_off(
    loaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = prompts_file(tmp_path / "in.jsonl", {"prompt": "Hi"})

    def closed(*args: object, **kwargs: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(typer, "echo", closed)
    result = run("generate", "-i", path, *TOKENS)
    assert result.exit_code == 1 and result.stderr == ""


# Files


@pytest.mark.usefixtures("loaded")
def test_lines_to_standard_output(tmp_path: Path) -> None:
    path = prompts_file(
        tmp_path / "in.jsonl",
        {"prompt": "Hi"},
        {"messages": [{"role": "user", "content": "Hi"}], "id": "chat"},
        {"instruction": "Grüße", "id": "\ud83c"},
    )
    result = run("generate", "-i", path, *TOKENS, "--stats")
    assert result.exit_code == OK
    records = {record["id"]: record for record in lines(result.stdout)}
    assert records.keys() == {0, "chat", "\ud83c"}
    assert records[0]["token_ids"] == records["chat"]["token_ids"] == answer("Hi").token_ids
    assert records["\ud83c"]["text"] == answer("Grüße").text
    assert result.stderr.startswith("36 tokens, ")


@pytest.mark.usefixtures("loaded")
def test_a_file_and_the_same_again(tmp_path: Path) -> None:
    path = prompts_file(
        tmp_path / "in.jsonl", *({"prompt": f"Prompt {i}", "id": f"p{i}"} for i in range(6))
    )
    out = tmp_path / "folder" / "out.jsonl"
    first = run("generate", "-i", path, "-o", out, *TOKENS)
    assert first.exit_code == OK and first.stdout == ""
    assert f"{out}: 6 results; 72 tokens, " in first.stderr and "6/6" in first.stderr
    records = lines(out.read_text())
    assert sorted(record["id"] for record in records) == [f"p{i}" for i in range(6)]
    for record in records:
        assert record["text"] == answer(record["prompt"]).text
        assert record["finish_reason"] == "length" and record["stats"]["num_tokens"] == 12
    settings = json.loads(Path(f"{out}.settings.json").read_text())
    assert settings["dtype"] == "torch.float32" and settings["max_new_tokens"] == 12
    assert "window" not in settings

    before = out.read_bytes()
    # What changes no token may be changed.
    again = run("generate", "-i", path, "-o", out, *TOKENS, "--window", "2", "--max-batch-size", 1)
    assert again.exit_code == OK and "6 results; no new tokens" in again.stderr
    assert out.read_bytes() == before

    for changed, was in (
        (["--top-k", "3"], "top_k was 40, is 3"),
        (["--no-agent"], "agent was 'tiny', is None"),
        (["--model", "other"], "model was 'tiny', is 'other'"),
        (["--preset", "official"], "fallback was 'last', is 'first'"),
        (["--seed", "1"], "seed was 0, is 1"),
    ):
        result = run("generate", "-i", path, "-o", out, *TOKENS, *changed)
        assert result.exit_code == FAILED and was in result.stderr
        assert out.read_bytes() == before
    anew = run("generate", "-i", path, "-o", out, *TOKENS, "--top-k", "3", "--overwrite")
    assert anew.exit_code == OK
    assert {r["text"] for r in lines(out.read_text())} == {
        answer(f"Prompt {i}", top_k=3).text for i in range(6)
    }


@pytest.mark.usefixtures("loaded")
def test_more_prompts_later(tmp_path: Path) -> None:
    """The input may grow; it may not shrink, nor mean something else."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    arguments = ("generate", "-i", path, "-o", out, *TOKENS, "--acceptance", "sample")
    prompts_file(path, {"prompt": "a"}, {"prompt": "b"})
    assert run(*arguments).exit_code == OK
    prompts_file(path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"})
    assert run(*arguments).exit_code == OK
    found = {record["id"]: record["token_ids"] for record in lines(out.read_text())}
    engine = speaker.engine(max_batch_size=16)
    wanted = engine.generate(["a", "b", "a"], max_new_tokens=12, acceptance="sample")
    assert found == {i: result.token_ids for i, result in enumerate(wanted)}

    before = out.read_bytes()
    prompts_file(path, {"prompt": "a"}, {"prompt": "b"})
    assert "has id 2, which is not in the input" in fails(*arguments)
    prompts_file(path, {"prompt": "new"}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"})
    assert "with another prompt" in fails(*arguments)
    assert out.read_bytes() == before
    # What is wrong with a prompt is said of its line.
    prompts_file(path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "x" * 600})
    result = run(*arguments)
    assert result.exit_code == FAILED
    assert f"{path}, line 4: prompt 3 has" in " ".join(result.stderr.split())
    assert out.read_bytes() == before


@pytest.mark.usefixtures("loaded")
def test_no_prompts_no_results(tmp_path: Path) -> None:
    path = prompts_file(tmp_path / "in.jsonl")
    result = run("generate", "-i", path, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == OK and "0 results; no new tokens" in result.stderr
    assert run("generate", "-i", path).stdout == ""


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"prompt": "a"}, {"text": "b"}], "line 2 has no prompt"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], "line 2: id 1 was given before"),
        ([{"prompt": {"role": "user", "content": "a"}}], "line 1: prompt must be a text"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(
    tmp_path: Path, records: list[dict], message: str
) -> None:
    path = prompts_file(tmp_path / "in.jsonl", *records)
    for output in ([], ["-o", tmp_path / "out.jsonl"]):
        assert message in fails("generate", "-m", "/no/model", "-i", path, *output)
    assert "no file at" in fails("generate", "-m", "/no/model", "-i", tmp_path / "nothing")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_input_is_never_written(tmp_path: Path) -> None:
    path = prompts_file(tmp_path / "in.jsonl", {"prompt": "a", "id": 0})
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "hard.jsonl").hardlink_to(path)
    before = path.read_bytes()
    for output in ("in.jsonl", "link.jsonl", "hard.jsonl"):
        for more in ([], ["--overwrite"]):
            message = fails("generate", "-i", path, "-o", tmp_path / output, *more)
            assert "--input and --output are the same file" in message
    assert path.read_bytes() == before


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows nothing of token 9."""
    model = copy.deepcopy(speaker.model())
    model.get_input_embeddings().weight[9] = torch.nan
    engine = mara_fast.Engine(model, speaker.agent(), speaker.tokenizer())
    monkeypatch.setattr(mara_fast.cli, "load_engine", lambda *args, **options: engine)


@pytest.mark.usefixtures("poisoned")
def test_prompts_that_fail_fail_alone(tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts_file(path, {"prompt": [3, 4]}, {"prompt": [3, 9]}, {"prompt": [5, 6]})
    options = ("--max-new-tokens", "1")
    result = run("generate", "-i", path, "-o", out, *options)
    assert result.exit_code == FAILED
    assert f"1 prompts ended in an error; see error in {out}" in result.stderr
    to_stdout = run("generate", "-i", path, *options)
    assert to_stdout.exit_code == FAILED
    assert "1 prompts ended in an error" in to_stdout.stderr
    for text in (out.read_text(), to_stdout.stdout):
        found = {record["id"]: record for record in lines(text)}
        assert [found[i]["finish_reason"] for i in range(3)] == ["length", "error", "length"]
        assert "NaN or infinite at position 2" in found[1]["error"]


# Interruptions


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-m", "mara_fast.cli", *map(str, arguments)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Of a suite that runs in the background Ctrl-C is ignored, and by its children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stop_after(process: subprocess.Popen[str], path: Path, count: int, number: int) -> str:
    """Sends a signal when so many lines are in the file; what the process said on stderr."""
    end = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


def test_interrupted_killed_cut_off_and_finished(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    lm, agent = folders
    num_prompts = 9
    path = prompts_file(
        tmp_path / "in.jsonl", *({"prompt": f"Prompt {i}", "id": f"p{i}"} for i in range(9))
    )
    out = tmp_path / "out.jsonl"
    arguments: tuple[str | Path, ...] = ("generate", "-m", lm, "-a", agent, "-i", path)
    arguments += ("--acceptance", "sample", "--max-new-tokens", "40")

    process = start(*arguments, "-o", out, "--max-batch-size", "1")
    said = stop_after(process, out, 2, signal.SIGINT)
    num_first = len(lines(out.read_text()))
    assert process.returncode == INTERRUPTED
    assert not re.search("Traceback|[Ww]arn|Loading", said)
    assert f"interrupted: {num_first} of 9 results are in {out}" in said
    assert "the same command goes on from there" in said
    assert 2 <= num_first < num_prompts
    first = out.read_text()

    process = start(*arguments, "-o", out, "--max-batch-size", "1")
    stop_after(process, out, num_first + 1, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert out.read_text().startswith(first)
    # The kill may have come between two writes: the last line is cut off by hand as well.
    whole = [line for line in out.read_bytes().split(b"\n") if line.endswith(b"}")]
    num_second = len(whole)
    assert num_first + 1 <= num_second < num_prompts
    out.write_bytes(b"\n".join(whole)[:-40])

    result = run(*arguments, "-o", out)
    assert result.exit_code == OK, result.output
    assert f"{num_second - 1}/9" in result.stderr and "9 results" in result.stderr
    records = lines(out.read_text())
    assert sorted(record["id"] for record in records) == sorted(f"p{i}" for i in range(9))

    assert run(*arguments, "-o", tmp_path / "whole.jsonl").exit_code == OK
    for record, wanted in zip(
        sorted(records, key=lambda record: record["id"]),
        sorted(lines((tmp_path / "whole.jsonl").read_text()), key=lambda record: record["id"]),
        strict=True,
    ):
        # Which window was used depends on the batch size, and on it how sums are rounded.
        assert record["stats"]["kl_nats"] == pytest.approx(wanted["stats"]["kl_nats"], abs=1e-3)
        for name in ("seconds", "num_forwards", "kl_nats"):
            record["stats"][name] = wanted["stats"][name] = 0
        assert record == wanted


# convert, env and help


def checkpoint(path: Path, change: Callable[[dict], object] | None = None) -> Path:
    state = dict(speaker.agent().state_dict())
    if change is not None:
        change(state)
    torch.save(state, path)
    return path


def test_convert(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor, folder = checkpoint(tmp_path / "actor.pth"), tmp_path / "agent"
    result = run("convert", actor, folder, "--base-model", "org/model")
    assert result.exit_code == OK and result.stderr == ""
    num_parameters = sum(parameter.numel() for parameter in speaker.agent().parameters())
    assert result.stdout == (f"{folder}: agent for hidden size 48, {num_parameters:,} parameters\n")
    agent = MaraAgent.from_pretrained(folder)
    assert agent.config.base_model == "org/model"
    assert agent.decoding == DecodingConfig.official()
    answered = run("generate", "-m", folders[0], "-a", folder, *TOKENS, "--json", "Hi")
    official = answer("Hi", fallback="first", prompt_format="official")
    assert lines(answered.stdout)[0]["token_ids"] == official.token_ids

    assert "is not empty; give another folder or --overwrite" in fails("convert", actor, folder)
    again = run("convert", actor, folder, "--overwrite", "--preset", "paper")
    assert again.exit_code == OK
    assert MaraAgent.from_pretrained(folder).decoding == DecodingConfig.paper()
    (tmp_path / "empty").mkdir()
    assert run("convert", actor, tmp_path / "empty").exit_code == OK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("ln.bias"), "missing keys ['ln.bias'], extra keys none"),
        (lambda s: s.update(critic=torch.zeros(1)), "missing keys none, extra keys ['critic']"),
        (lambda s: s.update({"ln.bias": s["ln.bias"] / 0}), "ln.bias holds NaN or infinite values"),
        (lambda s: s.update({"ln.bias": s["ln.bias"][:5]}), "ln.bias has shape (5,), expected (48"),
    ],
)
def test_checkpoints_refused(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    actor = checkpoint(tmp_path / "actor.pth", change)
    said = fails("convert", actor, tmp_path / "agent")
    assert message in said and str(actor) in said
    assert not (tmp_path / "agent").exists()


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    marker, actor = tmp_path / "marker", tmp_path / "actor.pth"
    torch.save(dict(speaker.agent().state_dict()) | {"ln.bias": Hostile(marker)}, actor)
    said = fails("convert", actor, tmp_path / "agent")
    assert "files that hold code are never executed" in said
    assert not marker.exists() and not (tmp_path / "agent").exists()
    torch.load(actor, weights_only=False)
    assert marker.exists()


def test_nothing_to_convert(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not a checkpoint")
    assert "was refused" in fails("convert", tmp_path / "text.pth", tmp_path / "agent")
    assert "no file at" in fails("convert", tmp_path / "nothing.pth", tmp_path / "agent")
    actor = checkpoint(tmp_path / "actor.pth")
    fails("convert", actor, tmp_path / "text.pth")
    assert (tmp_path / "text.pth").read_text() == "not a checkpoint"


def test_env() -> None:
    result = run("env")
    assert result.exit_code == OK and result.stderr == ""
    found = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert found["mara-fast"] == mara_fast.__version__
    assert found["torch"].startswith(torch.__version__)
    assert {"python", "platform", "transformers", "truncate", "score", "cascade"} <= found.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name: str) -> None:
    command = COMMANDS[name]
    for flag in ("--help", "-h"):
        result = run(name, flag)
        assert result.exit_code == OK and "Usage:" in result.stdout
    assert command.help and command.help[0].isupper() and command.help.rstrip()[-1] in ".:t"
    for parameter in command.params:
        if parameter.name != "help":
            assert parameter.help, f"{name} {parameter.name} says nothing"
            assert parameter.help[-1] in ".:", f"{name} {parameter.name} is no sentence"
    examples = re.findall(r"mara-fast (\w+) ([^|\n]*?)(?:\s{3,}.*)?$", command.epilog or "", re.M)
    for example, arguments in examples:
        assert example == name
        # Raises for a flag that does not exist.
        command.make_context(name, shlex.split(arguments))
    assert examples or name not in ("generate", "convert")


def test_help_of_all() -> None:
    result = run("--help")
    assert result.exit_code == OK
    for name in COMMANDS:
        assert name in result.stdout
    assert "Usage:" in run().output
    assert run("no-such-command").exit_code == FAILED


@pytest.mark.slow
def test_the_command_as_a_process(folders: tuple[Path, Path]) -> None:
    """As a shell runs it: the answer on stdout, nothing else anywhere."""
    lm, agent = folders
    process = start("generate", "-m", lm, "-a", agent, *TOKENS, "Grüße 🎉")
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (OK, "")
    assert stdout == f"{answer('Grüße 🎉').text}\n".replace("\r\n", "\n").replace("\r", "\n")
    process = start("generate", "--help")
    assert "Examples" in process.communicate(timeout=60)[0] and process.returncode == OK
