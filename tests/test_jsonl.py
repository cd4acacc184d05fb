"""Files of prompts and of results: nothing lost, nothing twice, nothing mixed up."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mara_fast import DecodingStats, Generation
from mara_fast.jsonl import PromptRecord, ResultFile, json_line, read_prompts

CHAT = [{"role": "user", "content": "Hi"}]
SETTINGS = {"model": "tiny", "top_k": 40, "stop_strings": ("a",), "eos_token_id": None}


def written(path: Path, *lines: Any) -> Path:
    """A JSONL file of values; texts are lines as they are."""
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
        encoding="utf-8",
    )
    return path


def records(*prompts: Any) -> list[PromptRecord]:
    return [PromptRecord(index, prompt, index) for index, prompt in enumerate(prompts)]


def generation(prompt: Any, text: str = "Ho") -> Generation:
    return Generation(
        prompt=prompt,
        prompt_token_ids=[3],
        text=text,
        token_ids=[4],
        finish_reason="length",
        stats=DecodingStats(num_tokens=1, candidate_counts={2: 1}),
        tokens=(),
    )


# Reading prompts


def test_keys_and_ids(tmp_path: Path) -> None:
    path = written(
        tmp_path / "in.jsonl",
        {"prompt": "a"},
        {"instruction": "b", "id": "x", "output": "ignored"},
        "",
        {"messages": CHAT, "id": 7},
        {"prompt": [3, 4], "id": "7"},
        "   ",
        {"prompt": CHAT},
        {"prompt": ""},
    )
    assert read_prompts(path) == [
        PromptRecord(0, "a", 0),
        PromptRecord("x", "b", 1),
        PromptRecord(7, CHAT, 2),
        PromptRecord("7", [3, 4], 3),
        PromptRecord(4, CHAT, 4),
        PromptRecord(5, "", 5),
    ]


def test_json_lists_and_files_from_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    wanted = [PromptRecord(0, "é\u2028🎉", 0), PromptRecord("b", "x\r\ny", 1)]
    values = [{"prompt": "é\u2028🎉"}, {"prompt": "x\r\ny", "id": "b"}]
    lines = "\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    for text in (
        json.dumps(values, indent=2),
        "\n \t" + json.dumps(values),
        lines,
        lines + "\n\n",
        lines.replace("\n", "\r\n"),
        "\ufeff" + lines,
        "\ufeff" + json.dumps(values),
    ):
        path.write_bytes(text.encode())
        assert read_prompts(path) == wanted


@pytest.mark.parametrize("text", ["", "\n\n", "[]", " [ ] ", "\ufeff"])
def test_no_prompts(tmp_path: Path, text: str) -> None:
    (tmp_path / "in.jsonl").write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / "in.jsonl") == []


def test_a_pipe_is_read(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"prompt": "a"}\n')
    os.close(writing)
    assert read_prompts(Path(f"/dev/fd/{reading}")) == records("a")
    os.close(reading)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("{'prompt': 'a'}", "line 2 is not valid JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "line 2 is not valid JSON: Extra data"),
        ("9" * 5000, "line 2 is not valid JSON"),
        ("NaN", "line 2 is a float, expected an object"),
        ('"a"', "line 2 is a str, expected an object"),
        ("[1]", "line 2 is a list, expected an object"),
        ("null", "line 2 is a NoneType, expected an object"),
        ("{}", "line 2 has no prompt; expected one of the keys prompt, messages, instruction"),
        ({"text": "a"}, "line 2 has no prompt"),
        ({"prompt": "a", "messages": CHAT}, "line 2 has prompt and messages; expected one of"),
        ({"prompt": None}, "line 2: prompt must be a text, a chat .* got null"),
        ({"prompt": 5}, "line 2: prompt must be .* got 5"),
        ({"prompt": CHAT[0]}, "line 2: prompt must be .* got .*role"),
        ({"messages": ["a", "b"]}, "line 2: messages must be a text, a chat"),
        ({"messages": [{"role": "user"}]}, "line 2: messages must be"),
        ({"instruction": [3, "a"]}, "line 2: instruction must be"),
        ({"instruction": [True]}, "line 2: instruction must be"),
        ({"prompt": "a", "id": None}, "line 2: id must be a text or an integer, got None"),
        ({"prompt": "a", "id": 1.5}, "line 2: id must be a text or an integer, got 1.5"),
        ({"prompt": "a", "id": True}, "line 2: id must be a text or an integer, got True"),
        ({"prompt": "a", "id": [1]}, "line 2: id must be a text or an integer"),
        ({"prompt": "a", "id": 0}, "line 2: id 0 was given before, .*line 1"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    path = written(tmp_path / "in.jsonl", {"prompt": "first"}, line, {"prompt": "last"})
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_ids_given_and_ids_counted_may_not_meet(tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl", {"prompt": "a", "id": 1}, {"prompt": "b"})
    with pytest.raises(ValueError, match=r"line 2: id 1 was given before, .*line 1"):
        read_prompts(path)
    path.write_text('[{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}]')
    with pytest.raises(ValueError, match=r"record 1: id 'x' was given before, .*record 0"):
        read_prompts(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_prompts(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_prompts(tmp_path)
    (tmp_path / "binary").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_prompts(tmp_path / "binary")
    (tmp_path / "list").write_text('[{"prompt": "a"},')
    with pytest.raises(ValueError, match="list is not valid JSON"):
        read_prompts(tmp_path / "list")


# Writing results


def result_file(path: Path, *prompts: Any, **options: Any) -> ResultFile:
    return ResultFile(path, records=records(*prompts), **({"settings": SETTINGS} | options))


def test_results_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "out.jsonl"
    with result_file(path, "a", "é\n🎉") as results:
        assert results.done == set()
        results.write(1, generation("é\n🎉"))
        # In the file at once, not when it is closed.
        assert len(path.read_text(encoding="utf-8").splitlines()) == 1
        results.write(0, generation("a"))
        assert results.done == {0, 1}
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines[2] == "" and "🎉" in lines[0]
    assert [json.loads(line)["id"] for line in lines[:2]] == [1, 0]
    assert json.loads(lines[0]) == {"id": 1} | json.loads(json.dumps(generation("é\n🎉").to_dict()))


def test_half_a_surrogate_pair_is_still_json(tmp_path: Path) -> None:
    record = {"id": "\ud83c", "text": "\udcff é 🎉 \\ud83c"}
    assert json.loads(json_line(record)) == record
    assert "é 🎉" in json_line(record)
    path = tmp_path / "out.jsonl"
    prompts = [PromptRecord("\ud83c", "a", 0)]
    for _ in range(2):
        with ResultFile(path, records=prompts, settings={}) as results:
            if not results.done:
                results.write("\ud83c", generation("a"))
    assert results.done == {"\ud83c"}


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path, prompts = tmp_path / "out.jsonl", ("a", "b", CHAT, [3, 4])
    for index, prompt in enumerate(prompts):
        with result_file(path, *prompts) as results:
            assert results.done == set(range(index))
            results.write(index, generation(prompt))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_ids_of_both_kinds(tmp_path: Path) -> None:
    prompts = [PromptRecord(1, "a", 0), PromptRecord("1", "b", 1)]
    with ResultFile(tmp_path / "out", records=prompts, settings={}) as results:
        results.write("1", generation("b"))
    with ResultFile(tmp_path / "out", records=prompts, settings={}) as results:
        assert results.done == {"1"}


def test_every_cut_is_survived(tmp_path: Path) -> None:
    """Whatever the byte at which a process was killed: whole lines stay, the rest is redone."""
    path = tmp_path / "out.jsonl"
    with result_file(path, "a", "b") as results:
        results.write(0, generation("a", "é"))
        results.write(1, generation("b", "🎉"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in {*range(0, len(whole), 7), first - 1, first, len(whole) - 1, len(whole)}:
        path.write_bytes(whole[:cut])
        with result_file(path, "a", "b") as results:
            assert results.done == {i for i, end in enumerate((first, len(whole))) if cut >= end}
            for index, text in ((0, "é"), (1, "🎉")):
                if index not in results.done:
                    results.write(index, generation("ab"[index], text))
        assert path.read_bytes() == whole


def test_overwrite(tmp_path: Path) -> None:
    path = written(tmp_path / "out.jsonl", "not a result")
    with pytest.raises(ValueError, match=r"line 1 is not a result.*overwrite this one"):
        result_file(path, "a")
    assert path.read_text() == "not a result\n"
    with result_file(path, "a", overwrite=True) as results:
        assert results.done == set() and path.read_bytes() == b""
        results.write(0, generation("a"))
    with result_file(path, "z", settings={"model": "other"}, overwrite=True) as results:
        assert results.done == set()
    with result_file(path, "z", settings={"model": "other"}):
        pass


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not a result of this command"),
        ("", "line 1 is not a result"),
        ("[]", "line 1 is not a result"),
        ("5", "line 1 is not a result"),
        ({"prompt": "a"}, "line 1 is not a result"),
        # A file of prompts, for instance the input.
        ({"id": 0, "prompt": "a"}, "line 1 is not a result"),
        ({"id": [0], "prompt": "a", "finish_reason": "eos"}, "line 1 is not a result"),
        ({"id": 5, "prompt": "a", "finish_reason": "eos"}, "line 1 has id 5, which is not in the"),
        ({"id": "0", "prompt": "a", "finish_reason": "eos"}, "line 1 has id '0', which is not"),
        ({"id": 0, "prompt": "b", "finish_reason": "eos"}, "line 1 has id 0 with another prompt"),
    ],
)
def test_files_of_another_run(tmp_path: Path, line: Any, message: str) -> None:
    path = written(tmp_path / "out.jsonl", line)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        result_file(path, "a")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with result_file(path, "a", "b"):
        pass
    # Nothing in it: nothing to mix up.
    with result_file(path, "a", "b", settings=SETTINGS | {"top_k": 3}) as results:
        results.write(0, generation("a"))
    for settings, changed in (
        (SETTINGS, "top_k was 3, is 40"),
        (SETTINGS | {"top_k": 3, "model": "x"}, "model was 'tiny', is 'x'"),
        (SETTINGS | {"top_k": 3, "new": 1}, "new was None, is 1"),
        ({"top_k": 3}, "model was 'tiny', is None"),
    ):
        with pytest.raises(ValueError, match=changed):
            result_file(path, "a", "b", settings=settings)
    # The refusal changed nothing, and a list is as good as a tuple.
    with result_file(path, "a", "b", settings=SETTINGS | {"top_k": 3, "stop_strings": ["a"]}):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.settings.json"}


def test_settings_are_replaced_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    with result_file(path, "a") as results:
        results.write(0, generation("a"))
    before = results.settings_path.read_bytes()

    def stopped(self: Path, text: str, **options: Any) -> int:
        with self.open("w") as file:
            file.write(text[:9])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_text", stopped)
        result_file(path, "a")
    assert results.settings_path.read_bytes() == before
    with result_file(path, "a") as results:
        assert results.done == {0}

    results.settings_path.write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is not valid"):
        result_file(path, "a")


def test_two_processes_may_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with result_file(path, "a") as results:
        results.write(0, generation("a"))
        for overwrite in (False, True):
            with pytest.raises(RuntimeError, match="another process is writing"):
                result_file(path, "a", overwrite=overwrite)
    with result_file(path, "a") as results:
        assert results.done == {0}


def test_the_file_is_closed_after_a_refusal(tmp_path: Path) -> None:
    path = written(tmp_path / "out.jsonl", "not a result")
    for _ in range(2):
        with pytest.raises(ValueError, match="not a result"):
            result_file(path, "a")
    with pytest.raises(IsADirectoryError):
        result_file(tmp_path, "a")
