"""A whole evaluation on the tiny model: by hand, resumed, judged in every way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import mara_fast
from mara_fast import Engine, tiny
from mara_fast.evaluation import answers as answers_module
from mara_fast.evaluation.evaluate import Evaluation, evaluate
from mara_fast.evaluation.preference import outcomes

LIMIT = 6
DECODING = {"max_new_tokens": 12}


def length(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """Longer is better."""
    return [float(len(text)) for text in completions]


def vowels(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
    """A cost; no opinion on texts that are short."""
    return [float(sum(map(text.count, "aeiou"))) if len(text) > 4 else None for text in completions]


def spec(**changes: Any) -> dict[str, Any]:
    return {
        "name": "trial",
        "systems": {
            "base": {},
            "mara": {"agent": "tiny/agent"},
            "best": {"best_of": 3, "decoding": {"seed": 4}},
            "aligner": {"corrects": "base", "template": "{question} {answer} {question}"},
        },
        "datasets": {"held-out": "tiny"},
        "comparisons": ["mara vs base", "best vs base", "aligner vs base"],
        "judge": {"rewards": [length, vowels], "weights": [1, -1], "names": ["long", "dry"]},
        "decoding": DECODING,
    } | changes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluate(spec(), folder, limit=LIMIT), folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_the_engine_s(found: tuple[Evaluation, Path]) -> None:
    evaluation, folder = found
    asked = lines(folder / "answers/base/held-out.jsonl")
    prompts = [line["prompt"] for line in sorted(asked, key=lambda line: line["id"])]
    model, tokenizer = tiny.load()
    plain = Engine(model, False, tokenizer)
    aligned = Engine(model, str(tiny.AGENT_PATH), tokenizer)
    wanted = {
        "base": [one.text for one in plain.generate(prompts, **DECODING)],
        "mara": [one.text for one in aligned.generate(prompts, **DECODING)],
    }
    for name, texts in wanted.items():
        samples = evaluation.answers[name]["held-out"].samples
        assert [list(one) for one in samples] == [[text] for text in texts]
    # Three samples to each prompt, with draws of their own.
    best = evaluation.answers["best"]["held-out"].samples
    ids = [line["id"] for line in lines(folder / "answers/best/held-out.jsonl")]
    assert sorted(ids) == sorted(f"{p}#{s}" for p in range(LIMIT) for s in range(3))
    keyed = plain.generate(
        [prompts[1]] * 3, acceptance="sample", seed=4, sequence_ids=[3, 4, 5], **DECODING
    )
    assert list(best[1]) == [one.text for one in keyed]
    # The corrected answer and the question, in the template's places.
    asked = lines(folder / "answers/aligner/held-out.jsonl")
    by_id = {line["id"]: line["prompt"] for line in asked}
    for place, (prompt, text) in enumerate(zip(prompts, wanted["base"], strict=True)):
        assert by_id[place] == f"{prompt} {text} {prompt}"


def test_rates_are_those_of_the_scores(found: tuple[Evaluation, Path]) -> None:
    """From the files alone: best-of-N takes the highest sum, a pair is won by every reward."""
    evaluation, folder = found
    given: dict[str, list[dict[str, float]]] = {}
    for system in ("base", "mara", "best", "aligner"):
        by_prompt: dict[str, list[dict[str, float]]] = {}
        scored = {line["id"]: line for line in lines(folder / f"scores/{system}/held-out.jsonl")}
        for key, line in scored.items():
            prompt, text = line["prompt"]
            scores = line["scores"]
            assert scores["length"] == len(text)
            assert scores["vowels"] == vowels([prompt], [text])[0]
            by_prompt.setdefault(key.partition("#")[0], []).append(scores)
        given[system] = [
            max(by_prompt[str(place)], key=lambda s: s["length"] - (s["vowels"] or 0))
            for place in range(LIMIT)
        ]
    for one in evaluation.comparisons:
        won = lost = 0
        for mine, theirs in zip(given[one.ours], given[one.theirs], strict=True):
            longer = mine["length"] - theirs["length"]
            judged = mine["vowels"] is not None and theirs["vowels"] is not None
            drier = theirs["vowels"] - mine["vowels"] if judged else longer
            won += longer > 0 and drier > 0
            lost += longer < 0 and drier < 0
        assert (one.preference.num_won, one.preference.num_lost) == (won, lost)
        assert one.preference.rate == (won - lost) / LIMIT
        assert sum((one.preference.num_won, one.preference.num_tied, lost)) == LIMIT
        assert set(one.by_reward) == {"long", "dry"}


def test_the_report(found: tuple[Evaluation, Path]) -> None:
    evaluation, folder = found
    plain = json.loads((folder / "report.json").read_text())
    assert plain["num_prompts"]["held-out"]["unique"] == LIMIT
    assert [one["ours"] for one in plain["comparisons"]] == ["mara", "best", "aligner"]
    text = (folder / "report.md").read_text()
    for heading in ("Preference rate", "By reward", "Systems", "Accepted ranks"):
        assert f"## {heading}" in text
    rate = evaluation.comparisons[0].preference.rate
    assert f"| mara vs base | {100 * rate:+.1f} (" in text
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "http" not in page and "<script" not in page


def test_everything_is_repeatable(found: tuple[Evaluation, Path], tmp_path: Path) -> None:
    again = evaluate(spec(), tmp_path, limit=LIMIT)
    assert again.comparisons == found[0].comparisons
    assert (tmp_path / "report.md").read_text() == (found[1] / "report.md").read_text()


def test_nothing_is_done_twice(
    found: tuple[Evaluation, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all answers and scores there, no model decodes and no reward is asked."""
    before = {p: p.read_bytes() for p in found[1].rglob("*.jsonl")}
    monkeypatch.setattr(Engine, "as_completed", lambda *a, **k: iter(()))
    judge = spec()["judge"] | {"rewards": [named(length), named(vowels)]}
    again = evaluate(spec(judge=judge), found[1], limit=LIMIT)
    assert again.comparisons == found[0].comparisons
    assert {p: p.read_bytes() for p in found[1].rglob("*.jsonl")} == before


def named(function: Any) -> Any:
    """Another function of the same name, which must not be called."""

    def refuses(**_: Any) -> None:
        pytest.fail("asked again")

    refuses.__name__ = function.__name__
    return refuses


def test_other_settings_are_refused(found: tuple[Evaluation, Path]) -> None:
    before = {p: p.read_bytes() for p in found[1].rglob("*.jsonl")}
    with pytest.raises(ValueError, match="max_new_tokens was 12, is 13"):
        evaluate(spec(decoding={"max_new_tokens": 13}), found[1], limit=LIMIT)
    other = spec()["judge"] | {"max_length": 9}
    with pytest.raises(ValueError, match="max_length was None, is 9"):
        evaluate(spec(judge=other), found[1], limit=LIMIT)
    assert {p: p.read_bytes() for p in found[1].rglob("*.jsonl")} == before


def test_a_sum_and_a_verdict(tmp_path: Path) -> None:
    systems = {"base": {}, "mara": {"agent": "tiny/agent"}}
    small = {"systems": systems, "comparisons": ["mara vs base"]}
    total = evaluate(
        spec(**small, judge={"rewards": [length, length], "weights": [2, -1], "rule": "sum"}),
        tmp_path / "sum",
        limit=LIMIT,
    )
    [one] = total.comparisons
    assert one.preference == one.by_reward["length"]
    assert one.by_reward["length_2"].rate == -one.preference.rate

    asked = []

    def verdict(prompts: list[Any], ours: list[str], theirs: list[str]) -> list[Any]:
        asked.append(len(prompts))
        return [3, None, -0.5, 0, True, 1][: len(prompts)]

    judge = {"verdict": verdict, "rule": "verdict"}
    said = evaluate(spec(**small, judge=judge), tmp_path / "said", limit=LIMIT)
    [one] = said.comparisons
    assert (one.preference.num_won, one.preference.num_tied, one.preference.num_lost) == (3, 2, 1)
    assert not one.by_reward
    evaluate(spec(**small, judge=judge), tmp_path / "said", limit=LIMIT)
    assert asked == [LIMIT]
    judge["verdict"] = lambda prompts, ours, theirs: [1]
    with pytest.raises(ValueError, match="gave 1 values for 6 pairs"):
        evaluate(spec(**small, judge=judge), tmp_path / "bad", limit=LIMIT)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"datasets": {"a": "nowhere.json"}}, FileNotFoundError, "no file at nowhere.json"),
        ({"systems": {"base": {"model": "./none"}, "mara": {}}}, FileNotFoundError, "base.model"),
        ({"systems": {"base": {}, "mara": {"agent": "./none"}}}, OSError, "none"),
        ({"decoding": {"top_p": 3}}, ValueError, "top_p=3"),
        ({"judge": {"rewards": ["nothing:here"]}}, ValueError, "nothing:here"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers_module, "load_model", lambda *a, **k: pytest.fail("loaded"))
    values = spec(comparisons=["mara vs base"]) | changes
    with pytest.raises(error, match=message):
        evaluate(values, tmp_path / "out", limit=LIMIT)
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on(found: tuple[Evaluation, Path], tmp_path: Path) -> None:
    """Killed amid the answers: what it has stays, byte by byte, and the rest is the same."""
    module = Path(__file__).stem
    code = (
        f"import {module} as t; from mara_fast.evaluation.evaluate import evaluate; "
        f"evaluate(t.spec(), {str(tmp_path)!r}, limit={LIMIT})"
    )
    root = Path(__file__).parents[2]
    places = (root, root / "kernels", root / "train", root / "tests", Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    path = tmp_path / "answers/best/held-out.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = path.read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    again = evaluate(spec(), tmp_path, limit=LIMIT)
    assert path.read_bytes().startswith(whole)
    assert again.comparisons == found[0].comparisons


def test_from_the_package() -> None:
    assert mara_fast.evaluate is evaluate
    assert outcomes is not None
