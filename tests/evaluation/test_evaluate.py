"""A whole evaluation on the tiny model: by hand, resumed, judged in every way."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import mara_fast.evaluation
from mara_fast import Engine, MaraAgent, tiny
from mara_fast.evaluation import answers as answers_module
from mara_fast.evaluation.evaluate import Evaluation, _ends, evaluate
from mara_fast.evaluation.preference import outcomes
from mara_fast.evaluation.scores import best_of
from mara_fast.evaluation.spec import EvalSpec
from mara_fast.loading import load_model
from mara_fast.rewards import RewardModel, Rewards

REWARD_PATH = tiny.AGENT_PATH.parent / "reward"
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
            prompt, text, _ = line["prompt"]
            scores = line["scores"]
            assert scores["length"] == len(text)
            assert scores["vowels"] == vowels([prompt], [text])[0]
            by_prompt.setdefault(key.partition("#")[0], []).append(scores)
        given[system] = []
        for place in range(LIMIT):
            samples = by_prompt[str(place)]
            # A reward that lacks an opinion on a sample has none on which is best.
            judged = all(scores["vowels"] is not None for scores in samples)
            totals = [s["length"] - (s["vowels"] if judged else 0) for s in samples]
            given[system].append(samples[totals.index(max(totals))])
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
    rows = plain["num_prompts"]["held-out"]["rows"]
    assert plain["num_prompts"]["held-out"] == {"evaluated": LIMIT, "unique": rows, "rows": rows}
    judge = plain["judge"]
    assert (judge["rewards"], judge["weights"], judge["rule"]) == (["long", "dry"], [1, -1], "all")
    assert judge["settings"]["rewards"][0].startswith(f"{__name__}:length sha256:")
    assert (plain["decoding"], plain["limit"]) == (DECODING, LIMIT)
    assert set(plain["systems"]["base"]["held-out"]["mean_scores"]) == {"long", "dry"}
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
    one, other = (
        (folder / "report.md").read_text().replace(evaluation.made["date"], "today")
        for evaluation, folder in (found, (again, tmp_path))
    )
    assert one == other


def test_nothing_is_done_twice(
    found: tuple[Evaluation, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all answers and scores there, no model is loaded and no reward is asked."""
    before = {p: p.read_bytes() for p in found[1].rglob("*.jsonl")}
    monkeypatch.setattr(answers_module, "load_model", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr(Rewards, "score", lambda *a, **k: pytest.fail("asked again"))
    again = evaluate(spec(), found[1], limit=LIMIT)
    assert again.comparisons == found[0].comparisons
    assert {p: p.read_bytes() for p in found[1].rglob("*.jsonl")} == before


def test_models_are_loaded_once_and_for_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(source: str, **options: Any) -> Any:
        loaded.append(source)
        return load_model(source, **options)

    monkeypatch.setattr(answers_module, "load_model", load)
    # Equal texts, but not one object, as of a YAML file.
    path = "".join([str(tiny.LM_PATH)])
    systems = {"base": {"model": str(tiny.LM_PATH)}, "other": {"model": Path(path)}}
    values = spec(systems=systems, comparisons=["other vs base"], judge={"rewards": "tiny/reward"})
    first = evaluate(values, tmp_path, limit=2)
    assert loaded == [str(tiny.LM_PATH)]
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    assert evaluate(values, tmp_path, limit=2).comparisons == first.comparisons
    assert loaded == [str(tiny.LM_PATH)]
    # Named as the reward names itself, once it is loaded.
    assert set(lines(tmp_path / "scores/base/held-out.jsonl")[0]["scores"]) == {"reward"}
    assert first.reward_names == ("reward",)
    for option, message in (
        ({"max_length": 9}, "max_length was None, is 9"),
        ({"dtype": "float64"}, "dtype was 'torch.float32', is 'torch.float64'"),
    ):
        values["judge"] = {"rewards": "tiny/reward"} | option
        with pytest.raises(ValueError, match=message):
            evaluate(values, tmp_path, limit=2)


def test_models_agents_and_rewards_that_are_loaded(tmp_path: Path) -> None:
    """Each is known by its weights: the same objects, loaded anew, go on; others do not."""
    model, _ = tiny.load()
    rewards = [AutoModelForSequenceClassification.from_pretrained(REWARD_PATH), length]

    def values(agents: list[Any]) -> dict[str, Any]:
        systems = {"base": {"model": model}, "mara": {"model": model, "agent": agents}}
        return spec(systems=systems, comparisons=["mara vs base"], judge={"rewards": rewards})

    agent = MaraAgent.from_pretrained(tiny.AGENT_PATH)
    found = evaluate(values([agent, MaraAgent(128, 16)]), tmp_path / "two", limit=2)
    assert found.reward_names == ("reward", "length")
    evaluate(values([agent]), tmp_path / "one", limit=2)
    evaluate(values([MaraAgent.from_pretrained(tiny.AGENT_PATH)]), tmp_path / "one", limit=2)
    with pytest.raises(ValueError, match=r"agent was \['MaraAgent sha256:.*, is \['MaraAgent sha"):
        evaluate(values([MaraAgent(128, 16)]), tmp_path / "one", limit=2)


def named_length() -> Any:
    """Another function of the same name."""

    def length(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    return length


def test_other_settings_are_refused(found: tuple[Evaluation, Path]) -> None:
    before = {p: p.read_bytes() for p in found[1].rglob("*.jsonl")}
    with pytest.raises(ValueError, match="max_new_tokens was 12, is 13"):
        evaluate(spec(decoding={"max_new_tokens": 13}), found[1], limit=LIMIT)
    other = spec()["judge"] | {"rewards": [named_length(), vowels]}
    with pytest.raises(ValueError, match=r"rewards was \['.*:length sha256:.*, is \['.*length sha"):
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


async def thoughtful(prompts: list[Any], ours: list[str], theirs: list[str]) -> list[Any]:
    return [1] * len(prompts)


def broken(prompts: list[Any], ours: list[str], theirs: list[str]) -> list[Any]:
    raise KeyError("score")


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        (lambda p, a, b: [1], "judge.verdict <lambda> returned 1 values for 6"),
        (lambda p, a, b: 1, "judge.verdict <lambda> returned int, expected a list"),
        (lambda p, a, b: ["x"] * len(p), "judge.verdict <lambda> returned 'x' for sample 0"),
        (lambda p, a: [1], "judge.verdict <lambda> cannot be called with three lists"),
        (3, "judge.verdict=3 is not allowed"),
        ("tiny/reward", "is not a function; a model gives no verdict"),
        (broken, "score"),
        (thoughtful, None),
        (lambda p, a, b: np.ones(len(p)), None),
        (lambda p, a, b: torch.ones(len(p)), None),
    ],
)
def test_verdicts_of_every_form(verdict: Any, message: str | None, tmp_path: Path) -> None:
    systems = {"base": {}, "mara": {"agent": "tiny/agent"}}
    judge = {"verdict": verdict, "rule": "verdict"}
    values = spec(systems=systems, comparisons=["mara vs base"], judge=judge)
    values["decoding"] = {"max_new_tokens": 1}
    if message is None:
        [one] = evaluate(values, tmp_path, limit=LIMIT).comparisons
        assert one.preference.num_won == LIMIT
        return
    with pytest.raises((ValueError, KeyError), match=message) as caught:
        evaluate(values, tmp_path, limit=LIMIT)
    if verdict is broken:
        assert "judge.verdict broken" in caught.value.__notes__[0]


def test_who_has_no_opinion_abstains(tmp_path: Path) -> None:
    """Of a pair or of the samples; where no reward has one, the pair is tied."""

    def silent(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    systems = {"base": {}, "mara": {"agent": "tiny/agent"}}
    judge = {"rewards": [silent], "rule": "sum"}
    values = spec(systems=systems, comparisons=["mara vs base"], judge=judge)
    values["decoding"] = {"max_new_tokens": np.int64(3), "eos_token_id": np.array([2])}
    [one] = evaluate(values, tmp_path, limit=3).comparisons
    assert (one.preference.num_tied, one.by_reward["silent"].num_tied) == (3, 3)

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    plain = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert plain["systems"]["base"]["held-out"]["mean_scores"] == {"silent": None}
    assert plain["decoding"] == {"max_new_tokens": 3, "eos_token_id": [2]}
    assert "| base, held-out | - |" in (tmp_path / "report.md").read_text()

    nan = math.nan
    checked = EvalSpec.from_dict(spec(judge={"rewards": [length, vowels], "rule": "sum"}))
    ours = torch.tensor([[1.0, 1.0, 2.0], [nan, 5.0, -1.0]], dtype=torch.float64)
    theirs = torch.tensor([[2.0, 2.0, 1.0], [-9.0, nan, 1.0]], dtype=torch.float64)
    assert _ends(ours, theirs, checked).tolist() == [-1, -1, -1]
    scores = torch.tensor([[[1.0, 2.0, 0.0]], [[9.0, nan, 0.0]]], dtype=torch.float64)
    assert best_of(scores, (1.0, 1.0)).tolist() == [1]


def test_an_agent_that_is_trained_anew_is_another(tmp_path: Path) -> None:
    place = tmp_path / "agent"
    shutil.copytree(tiny.AGENT_PATH, place)
    systems = {"base": {}, "mara": {"agent": place}}
    values = spec(systems=systems, comparisons=["mara vs base"], judge={"rewards": [length]})
    evaluate(values, tmp_path / "out", limit=1)
    agent = MaraAgent.from_pretrained(place)
    with torch.no_grad():
        agent.output_linear.bias += 1
    agent.save_pretrained(place)
    with pytest.raises(ValueError, match="agent was 'agent sha256:"):
        evaluate(values, tmp_path / "out", limit=1)
    # The same command but for --overwrite goes on with a run that was stopped early.
    files = [p for p in (tmp_path / "out").rglob("*.jsonl")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "as_completed", lambda *a, **k: stopped())
        with pytest.raises(KeyboardInterrupt):
            evaluate(values, tmp_path / "out", limit=1, overwrite=True)
    assert len(files) == 4 and not any(p.read_bytes() for p in files)
    evaluate(values, tmp_path / "out", limit=1)


def stopped() -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"datasets": {"a": "nowhere.json"}}, FileNotFoundError, "no file at nowhere.json"),
        (
            {"systems": {"base": {"model": "./none"}, "mara": {}}},
            FileNotFoundError,
            r"systems\.base: model './none'",
        ),
        (
            {"systems": {"base": {}, "mara": {"agent": "./none"}}},
            FileNotFoundError,
            r"systems\.mara: agent './none' is neither a folder nor on the hub",
        ),
        (
            {"systems": {"base": {}, "mara": {"agent": MaraAgent(8, 8)}}},
            ValueError,
            "systems.mara: the agent judges states of size 8, but tiny has hidden size 128",
        ),
        (
            {
                "systems": {"base": {}, "mara": {"agent": "tiny/agent"}},
                "decoding": {"agent_weights": [1, 2]},
            },
            ValueError,
            "2 weights for 1 agent",
        ),
        ({"judge": {"rewards": [__file__]}}, ValueError, "names no function"),
        ({"judge": {"rewards": [str(tiny.AGENT_PATH.parent)]}}, ValueError, "not the folder of a"),
        ({"judge": {"rewards": ["./none"]}}, FileNotFoundError, "no such folder"),
        ({"judge": {"rewards": ["org/none"]}}, OSError, "reward 'org/none': "),
        (
            {"judge": {"rewards": ["tiny/reward"], "device": "gpu"}},
            ValueError,
            "judge: device='gpu",
        ),
        (
            {"judge": {"rewards": ["tiny/reward"], "dtype": "int8"}},
            ValueError,
            "judge: dtype='int8",
        ),
        (
            {"judge": {"rewards": [lambda prompts: 1]}},
            ValueError,
            "reward function <lambda> cannot",
        ),
        ({"engine": {"dtype": "int8"}}, ValueError, "engine: dtype='int8'"),
        ({"engine": {"max_batch_size": 0}}, ValueError, "engine.max_batch_size=0"),
        ({"decoding": {"max_new_tokens": 10**6}}, ValueError, r"tiny, instruction 0: prompt 0 has"),
        (
            {"paper": {"mara vs base": {"held-out": {"longer": 3}}}},
            ValueError,
            "names 'longer', which is not judged by; allowed: preference, long, dry",
        ),
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


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (
            {"prompt": "\ud800"},
            {},
            r"data set mine, .*record 1: prompt 'x' holds half.*\(systems.base\)",
        ),
        ({"prompt": "a " * 5000}, {}, "record 1: prompt 'x' has .* tokens"),
        ({"prompt": [5, 6]}, {}, "record 1: prompt 'x' is token ids; rewards read texts and chats"),
        (
            {"prompt": [{"role": "system", "content": "a"}]},
            {"base": {}, "mara": {"corrects": "base"}},
            "record 1: prompt 'x'.*has no question of a user",
        ),
        ({"prompt": "b", "id": "0"}, {}, r"record 1 has id '0', .*record 0 has 0; ids must differ"),
        ({"prompt": "b", "progress": 1}, {}, "has a column 'progress', which reward functions"),
        ({"prompt": "b", "completions": 1}, {}, "has a column 'completions', which reward"),
    ],
)
def test_prompts_are_checked_before_any_work(
    row: dict[str, Any],
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers_module, "load_model", lambda *a, **k: pytest.fail("loaded"))
    columns = {name: 1 for name in row if name not in ("prompt", "id")}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a"} | columns, {"id": "x"} | row]))
    values = spec(
        datasets={"mine": str(path)},
        systems=changes or {"base": {}, "mara": {}},
        comparisons=["mara vs base"],
    )
    with pytest.raises(ValueError, match=message):
        evaluate(values, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output, work in (("file", None), ("file/below", None), ("out", "file")):
        with pytest.raises(ValueError, match=r"is not allowed as a folder: .*file is a file"):
            evaluate(spec(), tmp_path / output, work=work and tmp_path / work, limit=1)
    with pytest.raises(ValueError, match=r"paths=.* has no effect"):
        evaluate(EvalSpec.from_dict(spec()), tmp_path / "out", paths={"a": "b"}, limit=1)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("answers", {"stats": 3}),
        ("scores", {"scores": {"a": "x"}}),
    ],
)
def test_damaged_lines_are_named(kind: str, line: dict[str, Any], tmp_path: Path) -> None:
    values = spec(systems={"base": {}, "mara": {}}, comparisons=["mara vs base"])
    evaluate(values, tmp_path, limit=1)
    path = tmp_path / kind / "base/held-out.jsonl"
    [before] = lines(path)
    path.write_text(json.dumps(before | line | {"prompt": before["prompt"]}) + "\n")
    with pytest.raises(ValueError, match=r"base/held-out\.jsonl, line 1 is damaged"):
        evaluate(values, tmp_path, limit=1)


def test_a_killed_run_goes_on(found: tuple[Evaluation, Path], tmp_path: Path) -> None:
    """Killed amid the answers: what it has stays, byte by byte, and the rest is the same."""
    code = (
        f"import {__name__} as t; from mara_fast.evaluation.evaluate import evaluate; "
        f"evaluate(t.spec(), {str(tmp_path)!r}, limit={LIMIT})"
    )
    root = Path(__file__).parents[2]
    places = (root, root / "kernels", root / "train", root / "tests")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    path = tmp_path / "answers/best/held-out.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = path.read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    again = evaluate(spec(), tmp_path, limit=LIMIT)
    assert path.read_bytes().startswith(whole)
    assert again.comparisons == found[0].comparisons


def test_from_the_package() -> None:
    assert mara_fast.evaluate is evaluate
    assert mara_fast.evaluation.outcomes is outcomes
