"""The curves of a run as one picture, drawn from its metrics."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mara_train.report import METRICS_NAME, read_metrics

logger = logging.getLogger(__name__)

PLOT_NAME = "training.png"

_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("reward", {"reward": "mean", "eval/reward": "held-out prompts"}),
    ("KL to the base model, nats", {"kl": ""}),
    ("entropy of accept or reject, nats", {"entropy": ""}),
    (
        "share of decided positions",
        {
            "accept/rank0_frac": "rank 0",
            "accept/first_three_frac": "first three ranks",
            "accept/all_rejected_frac": "all rejected",
        },
    ),
    (
        "held-out preference rate",
        {
            "eval/preference_vs_greedy": "over greedy base",
            "eval/preference_vs_sampled": "over sampled base",
        },
    ),
)
"""Titles, and names of metrics with their labels."""
_NUM_COLUMNS = 3


def plot_run(folder: str | os.PathLike) -> Path | None:
    """Draws reward, KL, entropy, accepted ranks and preference over episodes.

    Args:
        folder: of the run, with its ``metrics.jsonl``; the picture is written beside it.

    Returns:
        The picture; None, after a warning, without matplotlib or before the first metrics.
    """
    folder = Path(folder)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no plot of %s: it needs matplotlib (mara-fast[train])", folder)
        return None
    lines = read_metrics(folder) if (folder / METRICS_NAME).is_file() else []
    known = set().union(*lines)
    panels = [(title, names) for title, names in _PANELS if known & names.keys()]
    if not panels:
        logger.info("no plot of %s: it has no metrics yet", folder)
        return None
    num_rows = -(-len(panels) // _NUM_COLUMNS)
    figure = Figure(figsize=(4.4 * _NUM_COLUMNS, 3.2 * num_rows), layout="constrained")
    for place, (title, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, _NUM_COLUMNS, place)
        _draw(axes, title, names, lines)
    path, beside = folder / PLOT_NAME, folder / f".{PLOT_NAME}"
    figure.savefig(beside, dpi=120, format="png")
    os.replace(beside, path)
    return path


def _draw(axes: Any, title: str, names: dict[str, str], lines: Sequence[dict[str, float]]) -> None:
    axes.set(title=title, xlabel="episodes")
    axes.grid(alpha=0.3)
    for name, label in names.items():
        points = [(line["num_episodes"], line[name]) for line in lines if name in line]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            # A point without a neighbour would not be seen as a line.
            is_sparse = name.startswith("eval/") or len(points) < 3
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if is_sparse else None)
    if title.startswith("share"):
        axes.set_ylim(0, 1)
    if any(names.values()) and axes.lines:
        axes.legend(fontsize="small")
