"""The spec of an evaluation: what is allowed, and what is said of what is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mara_fast import DecodingConfig
from mara_fast.evaluation.datasets import DatasetSpec
from mara_fast.evaluation.spec import EvalSpec
from mara_fast.evaluation.system import SystemSpec
from mara_fast.options import from_yaml
from mara_fast.tiny import AGENT_PATH


def spec(**changes: Any) -> dict[str, Any]:
    """Plain values of a spec; a change to None leaves one out."""
    values: dict[str, Any] = {
        "paths": {"llama": "org/llama", "prompts": "some/prompts.jsonl"},
        "systems": {"base": {"model": "llama"}, "mara": {"agent": "tiny/agent"}},
        "datasets": {"one": "tiny", "two": {"path": "prompts"}},
        "comparisons": ["mara vs base"],
        "judge": {"rewards": ["tiny/reward", "m:f"], "weights": [1, -1]},
    } | changes
    return {name: value for name, value in values.items() if value is not None}


def test_paths_stand_for_names() -> None:
    found = EvalSpec.from_dict(spec(), paths={"llama": "/weights/llama"})
    assert found.systems["base"].model == "/weights/llama"
    assert found.systems["base"].agent is False
    assert found.systems["mara"].model == "tiny"
    assert found.systems["mara"].agent == str(AGENT_PATH)
    assert [one.path for one in found.datasets.values()] == ["tiny", "some/prompts.jsonl"]
    assert found.judge.rewards == (str(AGENT_PATH.parent / "reward"), "m:f")
    assert found.judge.weights == (1, -1)
    assert found.comparisons == (("mara", "base"),)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(
        "systems: {base: {}, mara: {agent: tiny/agent, decoding: {threshold: 0.3}}}\n"
        "datasets: {held-out: tiny}\n"
        "comparisons: [[mara, base]]\n"
        "judge: {rewards: tiny/reward}\n"
    )
    found = EvalSpec.read(path)
    assert found.systems["mara"].decoding == {"threshold": 0.3}
    assert found.judge.weights == (1.0,)
    with pytest.raises(FileNotFoundError, match="no file at"):
        EvalSpec.read(tmp_path / "none.yaml")
    path.write_text("systems: [1")
    with pytest.raises(ValueError, match=r"spec\.yaml: "):
        EvalSpec.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": None}, "the spec lacks systems"),
        ({"sytems": {}}, "unknown option 'sytems'; allowed: paths, name, systems"),
        ({"systems": {"a": {"modle": "x"}}}, r"systems\.a: unknown option 'modle'; did you mean"),
        ({"systems": {"a/b": {}}}, "'a/b' is no name for a system"),
        ({"systems": {"..": {}}}, "is no name for a system"),
        ({"systems": {"a": 3}}, r"systems\.a must be a mapping"),
        ({"systems": {"a vs b": {}}}, "it has a space at an end, or ' vs '"),
        ({"systems": {"base ": {}}}, "it has a space at an end"),
        ({"systems": {"base": {"model": 3}}}, r"systems\.base: model=3 is not allowed"),
        ({"systems": {"base": {"agent": 3}}}, r"systems\.base: agent=3 is not allowed"),
        ({"systems": {"base": {"agent": True}}}, "agent=True is not allowed"),
        ({"systems": {"base": {"agent": []}}}, r"agent=\[\] is not allowed"),
        ({"systems": {"base": {"agent": ["a", 3]}}}, "agent=.*3. is not allowed"),
        ({"systems": {"base": {"best_of": 10**6}}}, "best_of=1000000 .* from 1 to 10000"),
        (
            {"systems": {"base": {"best_of": 2, "decoding": {"acceptance": "greedy"}}}},
            "all answers to a prompt would be the same",
        ),
        ({"systems": {"base": {"corrects": 3}}}, "corrects=3 is not allowed; allowed: a text"),
        ({"systems": {"base": {"template": 3}}}, "template=3 is not allowed; allowed: a text"),
        ({"systems": {"base": {"preset": "best"}}}, r"systems\.base: preset='best'"),
        ({"systems": {"base": {"best_of": 0}}}, "best_of=0 is not allowed"),
        ({"systems": {"base": {"decoding": {"topk": 3}}}}, "unknown option 'topk'"),
        ({"systems": {"base": {"template": "{question}"}}}, "lacks {answer}"),
        (
            {"systems": {"mara": {}, "base": {"corrects": "base"}}},
            r"systems\.base\.corrects='base'",
        ),
        ({"comparisons": ["mara vs bse"]}, "names 'bse', which is no system; there are base, mara"),
        ({"comparisons": ["mara, base"]}, "expected 'one vs another'"),
        ({"comparisons": ["base vs base"]}, "has one system only"),
        ({"datasets": {"a": {}}}, "has a path, or a hub id"),
        ({"datasets": {"a": {"path": "x", "hub": "y"}}}, "has a path, or a hub id"),
        ({"datasets": {"a": {"path": 3}}}, r"datasets\.a: path=3 is not allowed; allowed: a text"),
        ({"datasets": {"a": {"hub": 3}}}, "hub=3 is not allowed"),
        ({"datasets": {"a": {"hub": "x", "split": None}}}, "split=None is not allowed"),
        ({"judge": {"rewards": None}}, r"judge\.rewards is empty"),
        ({"judge": {"rewards": ["a", 3]}}, r"judge\.rewards\[1\]=3 is not allowed"),
        ({"judge": {"rewards": ["a"], "names": [3]}}, "judge.names: 3 is not allowed"),
        ({"judge": {"rewards": ["a", "b"], "weights": [0, 0]}}, "no reward would count"),
        ({"judge": {"rewards": ["a"], "max_length": 0}}, "judge.max_length=0 is not allowed"),
        ({"judge": {"rewards": ["a"], "batch_size": "8"}}, "judge.batch_size='8'"),
        ({"judge": {"verdict": 3, "rule": "verdict"}}, "judge.verdict=3 is not allowed"),
        ({"judge": {"rewards": []}}, "the spec lacks|judge.rewards is empty"),
        ({"judge": {"rewards": ["a"], "weights": [1, 2]}}, "2 for 1 rewards"),
        ({"judge": {"rewards": ["a"], "weights": ["x"]}}, "judge.weights='x'"),
        ({"judge": {"rewards": ["a"], "rule": "best"}}, "judge.rule='best' is not known"),
        ({"judge": {"rewards": ["a"], "rule": "verdict"}}, "go together"),
        ({"engine": {"batch": 3}}, "engine has the unknown option 'batch'"),
        ({"paper": {"mara vs bse": {"one": 3}}}, "paper names 'mara vs bse'"),
        ({"paper": {"mara vs base": {"three": 3}}}, "paper names 'three'"),
    ],
)
def test_bad_specs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalSpec.from_dict(spec(**changes))


def test_an_unknown_path_is_named() -> None:
    with pytest.raises(ValueError, match="no path named lama; it has llama, prompts"):
        EvalSpec.from_dict(spec(), paths={"lama": "x"})


def test_options_in_force() -> None:
    own = DecodingConfig(top_k=7)
    assert SystemSpec().config({"max_new_tokens": 9}, own) == own.replace(max_new_tokens=9)
    official = SystemSpec(preset="official", decoding={"seed": 3}).config({"seed": 1}, own)
    assert official == DecodingConfig.official(seed=3)
    assert SystemSpec(best_of=4).config({}, own).acceptance == "sample"
    assert SystemSpec(corrects="base").config({}, own).prompt_format == "raw"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"systems": {"base": {"template": "{question}{answer}"}, "mara": {}}},
            "template=.* no ef",
        ),
        ({"datasets": {"a": {"path": "tiny", "split": "train"}}}, "split='train' has no effect"),
        ({"datasets": {"a": {"path": "tiny", "column": "q"}}}, "column='q' has no effect"),
        ({"datasets": {"a": {"path": "tiny", "name": "q"}}}, "name='q' has no effect"),
    ],
)
def test_what_has_no_effect_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        EvalSpec.from_dict(spec(**changes))


def test_numbers_of_numpy_and_paths() -> None:
    systems = {"base": {"best_of": np.int64(3)}, "mara": {"agent": AGENT_PATH}}
    datasets = {"one": {"path": Path("rows.json"), "sample": np.int32(3)}}
    judge = {"rewards": [AGENT_PATH.parent / "reward", "m:f"], "weights": np.array([1, -2])}
    judge |= {"max_length": np.int64(9), "batch_size": np.int64(2)}
    paper = {"mara vs base": {"one": np.float32(3)}}
    found = EvalSpec.from_dict(
        spec(systems=systems, datasets=datasets, judge=judge, paper=paper, paths=None)
    )
    assert found.systems["base"].best_of == 3 and found.systems["mara"].agent == str(AGENT_PATH)
    assert found.datasets["one"] == DatasetSpec(path="rows.json", sample=3)
    assert found.judge.weights == (1, -2)
    assert found.judge.rewards[0] == str(AGENT_PATH.parent / "reward")
    assert type(found.judge.max_length) is type(found.judge.batch_size) is int
    assert json.dumps(found.paper) == '{"mara vs base": {"one": {"preference": 3.0}}}'


def test_keys_are_merged_as_yaml_says() -> None:
    text = "one: &base {a: 1, b: 2}\ntwo: {<<: *base, b: 3}\nthree: {<<: *base, <: 4}"
    two = {"a": 1, "b": 3}
    assert from_yaml(text) == {
        "one": {"a": 1, "b": 2},
        "two": two,
        "three": {"a": 1, "b": 2, "<": 4},
    }
    assert from_yaml("x: {b: &b {<<: {a: 1}, a: 2}, <<: *b}") == {"x": {"b": {"a": 2}, "a": 2}}
    for twice in ("{a: 1, b: 2, a: 3}", "x: &x {a: 1}\ny: {<<: *x, b: 1, b: 2}"):
        with pytest.raises(ValueError, match="is given twice"):
            from_yaml(twice)
