"""The picture of a run: which curves it has, and what happens where there is nothing to draw."""

import builtins
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from mara_train.plots import PLOT_NAME, plot_run
from mara_train.report import METRICS_NAME

STEPS = range(1, 6)


def metrics(folder: Path, *, with_eval: bool = True, **changes: Any) -> None:
    lines = []
    for step in STEPS:
        line = {
            "step": step,
            "num_episodes": 64 * step,
            "reward": step / 2,
            "kl": 0.1 * step,
            "accept/rank0_frac": 0.9 - 0.1 * step,
            "accept/first_three_frac": 0.95,
            "accept/all_rejected_frac": 0.01 * step,
        }
        # Learning begins later.
        if step > 2:
            line["entropy"] = 0.7 / step
        if with_eval and step % 2 == 0:
            line |= {"eval/preference_vs_greedy": 0.1, "eval/preference_vs_sampled": 0.2}
            line["eval/reward"] = 1.0
        lines.append(json.dumps(line | changes))
    (folder / METRICS_NAME).write_text("\n".join(lines) + "\n")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, tuple]]:
    """Points of each curve, by panel and label."""
    figure = pytest.importorskip("matplotlib.figure")
    found: dict[str, dict[str, tuple]] = {}
    savefig = figure.Figure.savefig

    def save(self: Any, *args: Any, **options: Any) -> None:
        for axes in self.axes:
            assert axes.get_xlabel() == "episodes"
            found[axes.get_title()] = {
                line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
                for line in axes.lines
            }
        savefig(self, *args, **options)

    monkeypatch.setattr(figure.Figure, "savefig", save)
    return found


def test_the_curves(tmp_path: Path, drawn: dict[str, dict[str, tuple]]) -> None:
    metrics(tmp_path)
    path = plot_run(str(tmp_path))
    assert path == tmp_path / PLOT_NAME
    assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == [METRICS_NAME, PLOT_NAME]
    episodes = [64 * step for step in STEPS]
    assert drawn["reward"]["mean"] == (episodes, [step / 2 for step in STEPS])
    assert drawn["reward"]["held-out prompts"] == ([128, 256], [1.0, 1.0])
    [(where, kl)] = drawn["KL to the base model, nats"].values()
    assert where == episodes and kl == [0.1 * step for step in STEPS]
    [(where, _)] = drawn["entropy of accept or reject, nats"].values()
    assert where == episodes[2:]
    ranks = drawn["share of decided positions"]
    assert ranks["rank 0"][1] == [0.9 - 0.1 * step for step in STEPS]
    assert ranks["first three ranks"][1] == [0.95] * 5
    assert ranks["all rejected"][1] == [0.01 * step for step in STEPS]
    assert drawn["held-out preference rate"] == {
        "over greedy base": ([128, 256], [0.1, 0.1]),
        "over sampled base": ([128, 256], [0.2, 0.2]),
    }


def test_only_what_was_measured(tmp_path: Path, drawn: dict[str, dict[str, tuple]]) -> None:
    metrics(tmp_path, with_eval=False, kl=math.nan)
    assert plot_run(tmp_path) is not None
    assert "held-out preference rate" not in drawn and list(drawn["reward"]) == ["mean"]
    assert drawn["KL to the base model, nats"] == {}


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "num_episodes": 2}\n', '{"step": 1'])
def test_nothing_to_draw(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    pytest.importorskip("matplotlib")
    caplog.set_level(logging.INFO, "mara_train")
    if content is not None:
        (tmp_path / METRICS_NAME).write_text(content)
    assert plot_run(tmp_path) is None
    assert caplog.messages == [f"no plot of {tmp_path}: it has no metrics yet"]
    assert not (tmp_path / PLOT_NAME).exists()


def test_without_matplotlib(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **options)

    metrics(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    assert plot_run(tmp_path) is None
    assert caplog.messages == [f"no plot of {tmp_path}: it needs matplotlib (mara-fast[train])"]
    assert not (tmp_path / PLOT_NAME).exists()
