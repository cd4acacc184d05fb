"""What commands that know nothing of this package found, read from what they write and print."""

import re
from typing import Any

from benchmarks.gpu.finding import Figure, Finding, spread_of

_COUNT = re.compile(r"\b(\d+) (passed|failed|errors?)\b")
_VERDICT = re.compile(r"\b(PASSED|FAILED|ERROR)\b")
_BROKEN = re.compile(r"^(?:FAILED|ERROR) (.*)$|^.*\bFAILED (tests/\S+).*$", re.MULTILINE)


def pytest_run(values: None, log: str) -> Finding:
    """Of ``pytest -v``: how many passed, and what failed. Of one that was stopped, so far."""
    ends = [line for line in log.splitlines() if re.search(r" in [\d.]+s", line)]
    if ends:
        counts = {kind: int(number) for number, kind in _COUNT.findall(ends[-1])}
        num_passed = counts.get("passed", 0)
    else:
        num_passed = _VERDICT.findall(log).count("PASSED")
    broken = [" ".join(filter(None, groups)) for groups in _BROKEN.findall(log)]
    finding = Finding(problems=[one[:300] for one in dict.fromkeys(broken)])
    if ends and not num_passed and not broken:
        finding.problems.append(f"no test passed: {ends[-1].strip()}")
    finding.notes.append(f"{num_passed} tests passed" + ("" if ends else ", until it was stopped"))
    return finding


def memory_check(values: None, log: str) -> Finding:
    """Of compute-sanitizer over pytest."""
    for refusal in ("Device not supported", "not supported on this"):
        if refusal in log:
            return Finding(obstacle=f"the memory checker says: {refusal}")
    finding = pytest_run(None, log)
    found = re.findall(r"^=+ (Invalid .*|Program hit .*)$", log, re.MULTILINE)
    finding.problems += list(dict.fromkeys(found))[:20]
    return finding


def compilation(values: Any, log: str) -> Finding:
    """Of ``python -m mara_kernels.aot``, which fails on a spill or a stack by itself."""
    kernels = values["kernels"]
    largest = max(kernel["registers"] for kernel in kernels)
    return Finding(
        notes=[f"{len(kernels)} kernels compiled, up to {largest} registers"], details=values
    )


def kernel_speed(values: Any, log: str) -> Finding:
    """Of ``kernel_speed.py``: our microseconds, multiples of the floor, the best alternative."""
    finding = Finding(details=values)
    for row in values["rows"]:
        where = f"{row['operation']} {row['case']}"
        for fault in ("wrong", "failed"):
            if fault in row:
                finding.problems.append(f"{where}: {fault}: {row[fault]}")
        if "ours" not in row:
            continue
        ours = row["ours"]
        spread = spread_of(ours["p20"], ours["p50"], ours["p80"])
        finding.figures[where] = Figure(ours["p50"], "us", spread)
        if "within 1.5 x floor" in row["targets"]:
            finding.figures[f"{where}, of its floor"] = Figure(
                row["times_floor"], "x floor", spread
            )
        rivals = {name: one for name, one in row["baselines"].items() if "speed_up" in one}
        if rivals:
            name, rival = min(rivals.items(), key=lambda item: item[1]["speed_up"])
            of_rival = spread + spread_of(rival["p20"], rival["p50"], rival["p80"])
            figure = Figure(rival["speed_up"], "x", of_rival)
            finding.figures[f"{where}, over its fastest rival"] = figure
        for name, one in row["baselines"].items():
            if "wrong" in one:
                finding.notes.append(f"{where}: {name} is wrong: {one['wrong']}")
    finding.notes += values.get("summary", [])
    return finding


def configurations(values: Any, log: str) -> Finding:
    """Of ``kernel_configs.py``: which launch configurations are faster than the tables'."""
    finding = Finding(details=values, problems=list(values.get("problems", ())))
    better = [row for row in values["rows"] if row["best"] != row["shipped"]]
    num_tried = sum(len(row["tried"]) for row in values["rows"])
    finding.notes.append(
        f"{num_tried} configurations beside {len(values['rows'])} of the tables; "
        f"{len(better)} entries can be better"
    )
    for row in better:
        changes = ", ".join(
            f"{name} {row['shipped'][name]} -> {value}"
            for name, value in row["best"].items()
            if row["shipped"][name] != value
        )
        finding.notes.append(f"{row['entry']}: {row['ratio']:.2f} of the time with {changes}")
    finding.notes += [f"{name}: no time" for name in values.get("left_out", ())]
    return finding


def decoding(values: Any, log: str) -> Finding:
    """Of ``mara-fast bench``: tokens per second of every system, and the ratios."""
    finding = Finding(details=values)
    model = values["options"]["model"]
    for batch in values["batches"]:
        where = f"{model} B={batch['batch_size']} with refill"
        for name, rate in batch["tokens_per_s"].items():
            spread = spread_of(rate["min"], rate["median"], rate["max"])
            finding.figures[f"{where}, {name}"] = Figure(rate["median"], "tokens/s", spread)
        for name, ratio in batch["ratios"].items():
            finding.figures[f"{where}, {name}"] = Figure(ratio, "x", 0.05)
    for one in values.get("targets", ()):
        if one["met"] is not None:
            verdict = "met" if one["met"] else "NOT met"
            finding.notes.append(
                f"{one['name']}, batch {one['batch_size']}: {one['measured']:.2f}, wanted "
                f"{one['wanted']:g}: {verdict}"
            )
    return finding


def training(values: Any, log: str) -> Finding:
    """Of ``training_speed.py``: updates and episodes, ours and against the authors' scheme."""
    finding = Finding(details=values)
    for name, one in values["systems"].items():
        low, high = one["update_ms_range"]
        spread = spread_of(low, one["update_ms"], high)
        finding.figures[f"{name}, updates"] = Figure(1e3 / one["update_ms"], "/s", spread)
        low, high = one["collected_episodes_per_h_range"]
        rate = one["collected_episodes_per_h"]
        figure = Figure(rate, "/h", spread_of(low, rate, high))
        finding.figures[f"{name}, episodes collected"] = figure
        trained = Figure(one["trained_episodes_per_h"], "/h", figure.spread + spread)
        finding.figures[f"{name}, episodes trained"] = trained
    for name, ratios in values["ratios"].items():
        for what, ratio in ratios.items():
            finding.notes.append(f"{name} / authors' scheme, {what}: {ratio:.1f}")
    return finding
