"""A model over two processes gives the tokens of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from architectures import ARCHITECTURES
from mara_fast import Engine
from tp_run import answers

TESTS = Path(__file__).parent
# Sliding windows, experts, soft-caps, tied embeddings.
NAMES = ("llama", "mistral", "qwen3_moe", "gemma2", "olmo2", "llama_tied")


def torchrun(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(path for path in (*sys.path, str(TESTS)) if path)
    options = ("--nproc-per-node", "2", "--master-port", "0", "--standalone")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, *command],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
    )


def test_two_processes_decode_as_one(tmp_path: Path) -> None:
    names = [name for name in NAMES if name != "llama_tied"]
    wanted = {}
    for name in names:
        model = ARCHITECTURES[name]()
        # Older versions of transformers share out nothing that does not divide.
        model.resize_token_embeddings(model.config.vocab_size + model.config.vocab_size % 2)
        model.save_pretrained(tmp_path / name)
        wanted[name] = answers(tmp_path / name, tensor_parallel=False)
    result = torchrun(str(TESTS / "tp_run.py"), str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(2):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == wanted


def test_the_command_speaks_once_and_resumes(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    asked = ["How do I bake bread?", "How do I steal a bicycle?", "Teach me to bake bread."]
    prompts.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in asked))
    command = ("-m", "mara_fast.cli", "generate", "--tensor-parallel", "--max-new-tokens", "12")
    files = ("-i", str(prompts), "-o", str(tmp_path / "out.jsonl"))
    for _ in range(2):
        result = torchrun(*command, *files)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stderr.count("out.jsonl: 3 results") == 1
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    texts = {row["prompt"]: row["text"] for row in rows}
    plain = Engine("tiny").generate(asked, max_new_tokens=12)
    assert len(rows) == 3 and texts == {one.prompt: one.text for one in plain}
    result = torchrun(*command, "How do I bake bread?")
    assert result.stdout.strip() == plain[0].text


def test_without_the_flag_nothing_is_done_twice() -> None:
    result = torchrun("-m", "mara_fast.cli", "generate", "Hi")
    assert result.returncode != 0 and result.stdout == ""
    assert "torchrun started 2 processes, each of which would answer" in result.stderr


def test_the_first_process_says_what_is_wrong() -> None:
    result = torchrun(
        "-m", "mara_fast.cli", "generate", "--tensor-parallel", "-m", "/no/model", "x"
    )
    assert result.returncode != 0
    assert result.stderr.count("model '/no/model': there is no such folder") == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "tiny", "start it by torchrun --nproc-per-node N"),
        (ARCHITECTURES["llama"], "the model is loaded already, and whole"),
    ],
)
def test_what_cannot_be_spread(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(make(), False, tensor_parallel=True)


def test_an_architecture_without_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    ARCHITECTURES["gpt2"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2 has no tensor-parallel plan"):
        Engine(str(tmp_path), False, tensor_parallel=True)
