"""The spec of an evaluation: what is allowed, and what is said of what is not."""

from pathlib import Path
from typing import Any

import pytest

from mara_fast import DecodingConfig
from mara_fast.evaluation.spec import EvalSpec, SystemSpec
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
        ({"sytems": {}}, "unknown option 'sytems'"),
        ({"systems": {"a": {"modle": "x"}}}, r"systems\.a: unknown option 'modle'; did you mean"),
        ({"systems": {"a/b": {}}}, "'a/b' is no name for a system"),
        ({"systems": {"..": {}}}, "is no name for a system"),
        ({"systems": {"a": 3}}, r"systems\.a must be a mapping"),
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
