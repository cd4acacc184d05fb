"""The agent as a file: saved, loaded, shared, converted, and whatever else is in its place."""

import copy
import dataclasses
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import mara_fast.agent
import speaker
from exactness import random_agent
from mara_fast import DecodingConfig, Engine, MaraAgent
from mara_fast.card import model_card

HIDDEN, INNER = 12, 8
DESCRIBED = {
    "base_model": "org/model",
    "decoding": {"top_k": 7, "fallback": "first", "stop_strings": ["\n\n"]},
    "description": "Is {kind}.",
}
NAN, INFINITY = float("nan"), float("inf")


def small_agent(**described: Any) -> MaraAgent:
    torch.manual_seed(3)
    return MaraAgent(HIDDEN, INNER, **described).requires_grad_(False)


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(0))


def saved(tmp_path: Path, change: Callable[[dict], object] | None = None) -> Path:
    """An official checkpoint, after a change of its state dict."""
    state = dict(small_agent().state_dict())
    if change is not None:
        change(state)
    torch.save(state, tmp_path / "actor.pth")
    return tmp_path / "actor.pth"


# The model


def test_layers_and_names_are_the_authors() -> None:
    with torch.device("meta"):
        agent = MaraAgent(4096)
    assert sum(parameter.numel() for parameter in agent.parameters()) == 4_466_434
    assert list(agent.state_dict()) == [
        f"{layer}.{kind}"
        for layer in ("ln", "linear1", "linear2", "output_linear")
        for kind in ("weight", "bias")
    ]
    assert agent.linear2.weight.shape == (256, 1024)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0)])
def test_accept_logit_is_accept_minus_reject(shape: tuple[int, ...]) -> None:
    agent, x = small_agent(), states(*shape)
    d = agent.accept_logit(x)
    assert d.dtype == torch.float32 and d.shape == shape
    both = agent(x)
    assert both.shape == (*shape, 2)
    torch.testing.assert_close(d, both[..., 1] - both[..., 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_of_another_dtype(dtype: torch.dtype) -> None:
    agent, x = small_agent(), states(5)
    torch.testing.assert_close(
        agent.accept_logit(x.to(dtype)), agent.accept_logit(x.to(dtype).float())
    )
    half = small_agent().to(dtype)
    d = half.accept_logit(x)
    assert d.dtype == torch.float32
    torch.testing.assert_close(d, agent.accept_logit(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 is not allowed; allowed: an integer >= 1"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"hidden_size": 8.0}, "hidden_size=8.0"),
        ({"hidden_size": "8"}, "hidden_size='8'"),
        ({"inner_size": -4}, "inner_size=-4"),
        ({"inner_size": 6}, "inner_size=6 is not allowed; allowed: multiples of 4"),
        ({"base_model": 5}, "base_model=5 is not allowed; allowed: a text or None"),
        ({"description": ["x"]}, "description="),
        ({"decoding": None}, "must be a mapping"),
        ({"decoding": {"topk": 3}}, "did you mean 'top_k'"),
        ({"decoding": {"top_k": -3}}, "top_k=-3"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaraAgent(**({"hidden_size": HIDDEN, "inner_size": INNER} | options))


# Saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    agent = small_agent(**DESCRIBED).to(dtype)
    agent.save_pretrained(tmp_path / "new" / "folder")
    same = MaraAgent.from_pretrained(tmp_path / "new" / "folder", dtype=dtype)
    assert same.config == agent.config
    assert same.decoding == DecodingConfig(top_k=7, fallback="first", stop_strings="\n\n")
    for name, tensor in agent.state_dict().items():
        assert same.state_dict()[name].dtype == dtype
        assert torch.equal(same.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in same.parameters())
    assert not same.training

    loaded = MaraAgent.from_pretrained(str(tmp_path / "new" / "folder"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.linear1.weight, agent.linear1.weight.float())


def test_saved_again_over_the_old(tmp_path: Path) -> None:
    small_agent().save_pretrained(tmp_path)
    other = random_agent(HIDDEN, seed=5)
    other.save_pretrained(tmp_path)
    assert MaraAgent.from_pretrained(tmp_path).config.inner_size == 64
    again = MaraAgent.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    torch.testing.assert_close(
        MaraAgent.from_pretrained(tmp_path).accept_logit(states(9)), other.accept_logit(states(9))
    )


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_judge_the_same(copied: Callable[[MaraAgent], MaraAgent]) -> None:
    agent = small_agent(**DESCRIBED)
    same = copied(agent)
    assert same.config == agent.config
    assert torch.equal(same.accept_logit(states(9)), agent.accept_logit(states(9)))


def test_a_deep_copy_is_another_agent() -> None:
    agent = small_agent()
    other = copy.deepcopy(agent)
    other.output_linear.bias[1] += 1
    torch.testing.assert_close(other.accept_logit(states(4)), agent.accept_logit(states(4)) + 1)


def test_model_card(tmp_path: Path) -> None:
    agent = small_agent(**DESCRIBED)
    agent.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "mara_fast",
        "tags": ["mara", "alignment", "decoding"],
        "base_model": "org/model",
    }
    num_parameters = sum(parameter.numel() for parameter in agent.parameters())
    for text in (
        "Is {kind}.",
        f"| parameters | {num_parameters:,} |",
        f"| hidden size | {HIDDEN} |",
        f"{HIDDEN} -> {INNER} -> {INNER // 4} -> 2",
        "`top_k=7`, `fallback='first'`",
        'model="org/model"',
    ):
        assert text in body
    compile(body.split("```python")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize("base_model", [None, "/models/seven", "./here", "a\nb: c", "a b"])
def test_model_card_names_only_hub_ids(base_model: str | None) -> None:
    card = model_card(small_agent(base_model=base_model).config)
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert front.keys() == {"library_name", "tags"}
    assert (base_model or "not recorded") in card


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: (d / "config.json").unlink(), FileNotFoundError, "it has no config.json"),
        (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "no model.safetensors"),
        (lambda d: (d / "config.json").write_text("{"), ValueError, "config.json is not valid"),
        (lambda d: (d / "config.json").write_bytes(b"\xff"), ValueError, "is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[1]"), ValueError, "lacks hidden_size"),
        (lambda d: (d / "config.json").write_text("{}"), ValueError, "lacks hidden_size"),
        (lambda d: edit(d, hidden_size="12"), ValueError, "config.json: hidden_size='12'"),
        (lambda d: edit(d, hidden_size=None), ValueError, "hidden_size=None"),
        (lambda d: edit(d, hidden_size=13), ValueError, "has shape .* for hidden_size=13"),
        (lambda d: edit(d, inner_size=12), ValueError, "has shape .* inner_size=12"),
        (lambda d: edit(d, decoding=None), ValueError, "must be a mapping"),
        (lambda d: edit(d, decoding={"window": 0}), ValueError, "config.json: window=0"),
        (lambda d: cut(d / "model.safetensors", 20), ValueError, "not a safetensors file"),
        (lambda d: cut(d / "model.safetensors", 0), ValueError, "not a safetensors file"),
        (lambda d: cut(d / "model.safetensors", -1), ValueError, "not a safetensors file"),
    ],
)
def test_broken_folders(
    tmp_path: Path, change: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    small_agent().save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(error, match=message) as caught:
        MaraAgent.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def edit(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def test_config_of_a_later_version_is_read(tmp_path: Path) -> None:
    small_agent().save_pretrained(tmp_path)
    edit(tmp_path, invented_later=1)
    assert MaraAgent.from_pretrained(tmp_path).config == small_agent().config


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_weights_that_are_not_numbers(tmp_path: Path, value: float) -> None:
    agent = small_agent()
    agent.linear2.bias[0] = value
    agent.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"linear2\.bias holds NaN or infinite"):
        MaraAgent.from_pretrained(tmp_path)


def test_weights_too_large_for_the_dtype(tmp_path: Path) -> None:
    agent = small_agent()
    agent.linear2.bias[0] = 1e6
    agent.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"infinite values as torch\.float16"):
        MaraAgent.from_pretrained(tmp_path, dtype=torch.float16)
    assert MaraAgent.from_pretrained(tmp_path, dtype=torch.bfloat16).linear2.bias.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", torch.int8, None, torch.float8_e4m3fn])
def test_dtypes_refused(tmp_path: Path, dtype: Any) -> None:
    small_agent().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"dtype=.*allowed: torch\.float32"):
        MaraAgent.from_pretrained(tmp_path, dtype=dtype)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "not a name", "~", ""])
def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="agent folder"):
        MaraAgent.from_pretrained(name)


def test_a_checkpoint_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a file.*MaraAgent\.from_official"):
        MaraAgent.from_pretrained(saved(tmp_path))


# The hub


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = small_agent(**DESCRIBED)
    agent.save_pretrained(tmp_path)
    asked = []

    def download(repo_id: str, name: str, **options: Any) -> str:
        asked.append((repo_id, name, options["revision"], options["token"]))
        return str(tmp_path / name)

    monkeypatch.setattr(mara_fast.agent, "hf_hub_download", download)
    same = MaraAgent.from_pretrained("org/agent", revision="v2", token="secret")
    assert asked == [
        ("org/agent", "config.json", "v2", "secret"),
        ("org/agent", "model.safetensors", "v2", "secret"),
    ]
    assert same.config == agent.config
    assert torch.equal(same.accept_logit(states(3)), agent.accept_logit(states(3)))


@pytest.mark.parametrize("revision", [None, "draft"])
def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
            calls.append(("create_repo", (repo_id, private, exist_ok)))
            return SimpleNamespace(repo_id="user/" + repo_id)

        def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
            calls.append(("create_branch", (repo_id, branch, exist_ok)))

        def upload_folder(self, *, folder_path: str, **options: Any) -> Any:
            calls.append(("upload_folder", options))
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(mara_fast.agent, "HfApi", Hub)
    agent = small_agent(**DESCRIBED)
    url = agent.push_to_hub(
        "mine", private=True, token="secret", revision=revision, commit_message="First"
    )
    assert url == "https://hub/commit"
    branch = [] if revision is None else [("create_branch", ("user/mine", revision, True))]
    assert calls == [
        ("token", "secret"),
        ("create_repo", ("mine", True, True)),
        *branch,
        (
            "upload_folder",
            {"repo_id": "user/mine", "revision": revision, "commit_message": "First"},
        ),
    ]
    assert {path.name for path in (tmp_path / "uploaded").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert MaraAgent.from_pretrained(tmp_path / "uploaded").config == agent.config


# The authors' checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_official_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    path = saved(tmp_path, lambda state: state.update({k: v.to(dtype) for k, v in state.items()}))
    agent = MaraAgent.from_official(path, base_model="org/model")
    assert (agent.config.hidden_size, agent.config.inner_size) == (HIDDEN, INNER)
    assert agent.config.base_model == "org/model"
    assert agent.decoding == DecodingConfig.official()
    assert {parameter.dtype for parameter in agent.parameters()} == {torch.float32}
    for name, tensor in small_agent().state_dict().items():
        assert torch.equal(agent.state_dict()[name], tensor.to(dtype).float())
    paper = MaraAgent.from_official(path, decoding=DecodingConfig.paper(top_k=3))
    assert paper.decoding == DecodingConfig.paper(top_k=3)


def test_official_checkpoint_of_one_storage_can_be_saved(tmp_path: Path) -> None:
    def share(state: dict[str, torch.Tensor]) -> None:
        flat = torch.arange(HIDDEN).float()
        state |= {"ln.bias": flat, "linear1.bias": flat[2 : 2 + INNER]}

    agent = MaraAgent.from_official(saved(tmp_path, share))
    agent.save_pretrained(tmp_path / "agent")
    same = MaraAgent.from_pretrained(tmp_path / "agent")
    assert same.ln.bias.tolist() == list(range(HIDDEN))
    assert same.linear1.bias.tolist() == list(range(2, 2 + INNER))


def fill(name: str, value: Any) -> Callable[[dict], object]:
    """Replaces a tensor by what a function makes of it."""
    return lambda state: state.update({name: value(state[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("linear2.bias"), r"missing keys \['linear2.bias'\], extra keys none"),
        (lambda s: s.pop("linear1.weight"), "no 2-D linear1.weight; its keys: ln.weight"),
        (lambda s: s.clear(), "its keys: none"),
        (lambda s: s.update(extra=torch.zeros(1)), r"missing keys none, extra keys \['extra'\]"),
        (lambda s: s.update({7: torch.zeros(1)}), r"extra keys \['7'\]"),
        (fill("ln.weight", lambda t: t * NAN), "ln.weight holds NaN or infinite"),
        (fill("linear2.weight", lambda t: t / 0), "linear2.weight holds NaN or infinite"),
        (fill("ln.bias", lambda t: (t + 1).double() * 1e300), "ln.bias holds NaN or infinite"),
        (fill("linear2.weight", lambda t: t[:1]), r"shape \(1, 8\), expected \(2, 8\)"),
        (fill("linear2.weight", lambda t: t.T), r"shape \(8, 2\), expected \(2, 8\)"),
        (fill("linear1.bias", lambda t: 5), "linear1.bias has shape int"),
        (fill("linear1.bias", lambda t: "x"), "linear1.bias has shape str"),
        (fill("linear1.bias", lambda t: t.long()), r"is a torch\.int64 tensor"),
        (fill("linear1.bias", lambda t: t.to(torch.complex64)), r"is a torch\.complex64 tensor"),
        (fill("linear1.bias", lambda t: t.to(torch.float8_e5m2)), r"is a torch\.float8"),
        (fill("linear1.weight", lambda t: t.to_sparse()), r"torch\.sparse_coo"),
        (fill("linear1.weight", lambda t: t.to("meta")), r"torch\.strided, meta"),
        (fill("linear1.weight", lambda t: t[:0]), "inner_size=0"),
        (fill("linear1.weight", lambda t: t[:6]), "inner_size=6"),
        (fill("linear1.weight", lambda t: t[None]), "no 2-D linear1.weight"),
    ],
)
def test_official_checkpoints_refused(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MaraAgent.from_official(saved(tmp_path, change))


@pytest.mark.parametrize("content", [[1, 2], 5, None, "text", torch.zeros(3), {"state": {}}])
def test_official_checkpoint_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "actor.pth")
    with pytest.raises(ValueError, match=r"actor\.pth (holds a|is not an official actor)"):
        MaraAgent.from_official(tmp_path / "actor.pth")


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, call: Callable, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call, self.args


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, legacy: bool, inside: bool) -> None:
    marker = tmp_path / "marker"
    for call, args in (
        (Path.touch, (marker,)),
        (exec, (f"open({str(marker)!r}, 'w')",)),
        (shutil.copy, (__file__, marker)),
    ):
        hostile: Any = Hostile(call, *args)
        if inside:
            hostile = dict(small_agent().state_dict()) | {"linear1.bias": hostile}
        torch.save(hostile, tmp_path / "actor.pth", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match="files that hold code are never executed"):
            MaraAgent.from_official(tmp_path / "actor.pth")
        assert not marker.exists()
        # The trap works: a plain load springs it.
        torch.load(tmp_path / "actor.pth", weights_only=False)
        assert marker.exists()
        marker.unlink()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(small_agent(), tmp_path / "actor.pth")
    with pytest.raises(ValueError, match="not a plain state dict"):
        MaraAgent.from_official(tmp_path / "actor.pth")


# torch wonders about the pickle protocols in them.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("legacy", [False, True])
def test_broken_checkpoints_never_crash(tmp_path: Path, legacy: bool) -> None:
    torch.save(
        small_agent().state_dict(),
        tmp_path / "actor.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    whole = (tmp_path / "actor.pth").read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(150):
        broken = bytearray(whole)
        if rng.random() < 0.3:
            broken = broken[: rng.randrange(len(whole))]
        else:
            for _ in range(rng.choice((1, 2, 8))):
                broken[rng.randrange(rng.choice((300, len(whole))))] = rng.randrange(256)
        (tmp_path / "actor.pth").write_bytes(broken)
        try:
            MaraAgent.from_official(tmp_path / "actor.pth")
        except ValueError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("name", ["nothing.pth", "."])
def test_no_such_checkpoint(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no file at"):
        MaraAgent.from_official(tmp_path / name)


# In an engine


def test_agents_an_engine_refuses(tmp_path: Path) -> None:
    for agent in (5, True, {}, speaker.model(), [speaker.agent(), 5]):
        with pytest.raises(ValueError, match=r"agent(\[1\])? must be a MaraAgent, a folder"):
            Engine(speaker.model(), agent)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"size 12, but LlamaForCausalLM .* size 48.*org/model"):
        Engine(speaker.model(), small_agent(**DESCRIBED))
    broken = copy.deepcopy(speaker.agent())
    broken.ln.bias[3] = NAN
    with pytest.raises(ValueError, match=r"the agent's ln\.bias holds NaN"):
        Engine(speaker.model(), broken)
    with pytest.raises(FileNotFoundError, match="not an agent folder"):
        Engine(speaker.model(), tmp_path)  # type: ignore[arg-type]


def test_an_agent_folder_decodes_with_its_own_options(tmp_path: Path) -> None:
    agent = copy.deepcopy(speaker.agent())
    agent.config = dataclasses.replace(agent.config, decoding={"top_k": 3, "max_new_tokens": 9})
    agent.save_pretrained(tmp_path)
    engine = Engine(speaker.model(), str(tmp_path), speaker.tokenizer())
    assert engine.config() == DecodingConfig(top_k=3, max_new_tokens=9)
    assert engine.config(top_k=5) == DecodingConfig(top_k=5, max_new_tokens=9)
    assert engine.config(DecodingConfig(top_p=0.5)) == DecodingConfig(top_p=0.5)
    [result] = engine.generate("Hello")
    assert len(result.token_ids) == 9
    assert max(token.num_candidates for token in result.tokens) == 3


def test_an_agent_in_half_precision_decodes() -> None:
    agent = copy.deepcopy(speaker.agent()).bfloat16()
    [result] = Engine(speaker.model(), agent).generate([[3, 4, 5]], max_new_tokens=8)
    assert len(result.token_ids) == 8 and result.error is None
