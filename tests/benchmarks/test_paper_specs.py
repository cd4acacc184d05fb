"""The paper's tables as specs: what is copied is what it prints, and its misprints are those."""

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from mara_fast.bench.run import BenchConfig
from mara_fast.bench.spec import BenchSpec
from mara_fast.evaluation.spec import PREFERENCE, EvalSpec

FOLDER = Path(__file__).parents[2] / "benchmarks/paper"
NUM_PROMPTS = {
    "SafeRLHF": 199,
    "BeaverTails": 700,
    "HarmfulQA": 488,
    "HH-RLHF": 200,
    "Ultra-Feedback": 200,
}
AVERAGES = {
    "table1": {" vs ": (26.28, 25.88, 33.64)},
    "table2": {
        " RLHF": (20.82, 16.21, 18.91),
        " DPO": (9.41, 15.20, 13.15),
        " Aligner": (5.60, 4.37, -1.76),
    },
    "table3": {" vs ": (13.82, 13.91, 17.87)},
}


def spec(name: str) -> EvalSpec:
    return EvalSpec.read(FOLDER / f"{name}.yaml")


def printed(name: str) -> Iterator[tuple[str, str, str, float]]:
    """(comparison, data set, kind, percent) of every rate."""
    for pair, by_dataset in spec(name).paper.items():
        for dataset, rates in by_dataset.items():
            for kind, rate in rates.items():
                yield pair, dataset, kind, rate


TABLES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "speed")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_spec_reads(path: Path) -> None:
    found = EvalSpec.read(path)
    assert found.comparisons and found.notes
    if found.paper:
        assert set(found.paper) == {" vs ".join(pair) for pair in found.comparisons}
        assert all(set(rates) == set(found.datasets) for rates in found.paper.values())


@pytest.mark.parametrize("name", AVERAGES)
def test_the_paper_s_averages(name: str) -> None:
    for part, wanted in AVERAGES[name].items():
        for dataset, average in zip(("SafeRLHF", "BeaverTails", "HarmfulQA"), wanted, strict=True):
            rates = [rate for pair, d, _, rate in printed(name) if d == dataset and part in pair]
            assert statistics.fmean(rates) == pytest.approx(average, abs=0.011)


def test_rates_count_unique_prompts() -> None:
    """All but the misprints that Table 5's notes name are multiples of one prompt."""
    names = ("table1", "table2", "table3", "table4-hh-rlhf", "table4-ultra-feedback", "table5")
    odd = []
    for pair, dataset, kind, rate in itertools.chain(*map(printed, names)):
        num = NUM_PROMPTS[dataset]
        nearest = round(rate / 100 * num) / num * 100
        if abs(nearest - rate) > 0.0101:
            odd.append((pair.partition(" vs ")[0], dataset, kind, rate))
    assert sorted(odd) == [
        ("Mistral-7B-v0.1 1 to 1", "SafeRLHF", "helpful", -37.49),
        ("Mistral-7B-v0.1 2 to 1", "BeaverTails", "harmless", 37.21),
        ("Mistral-7B-v0.1 2 to 1", "SafeRLHF", "harmless", 28.69),
        ("Mistral-7B-v0.3 2 to 1", "SafeRLHF", "helpful", -17.39),
    ]


def test_the_rule_of_a_win_fits_table_5() -> None:
    far = []
    for pair, by_dataset in spec("table5").paper.items():
        for dataset, rates in by_dataset.items():
            middle = (rates["helpful"] + rates["harmless"]) / 2
            prompts = abs(rates[PREFERENCE] - middle) / 100 * NUM_PROMPTS[dataset]
            if prompts > 1.6:
                far.append((pair.partition(" vs ")[0], dataset))
    assert far == [("Mistral-7B-v0.1 2 to 1", "SafeRLHF"), ("Mistral-7B-v0.2 0 to 1", "SafeRLHF")]


def test_the_speed_claim() -> None:
    found = BenchSpec.read(FOLDER / "speed.yaml")
    assert sorted(found.paper.values()) == [20.63, 31.41]
    config = BenchConfig(**found.options)
    assert config.sizes == [1] and config.num_serial_prompts == config.count(1)
