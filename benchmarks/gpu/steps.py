"""Decoding in the steady state: plain against MARA, every batch and window; the GPU's idle time.

As many prompts as slots, none of which ends: tokens per second of the engine's own turns (a step,
the snapshot for the host, the look at the one before), after the turns in which prompts are read
and graphs are made. What filling and emptying a batch costs is in ``mara-fast bench``, beside the
other systems.

    tokens/s          of all turns that are timed; spread: of the turns, 20th to 80th percentile
    MARA / plain      the automatic window, the same batch
    plain / roofline  see mara_fast.bench.measure
    idle share        of the turns profiled afterwards, with the automatic window

Compiled, each shape takes a minute or more at first: batches of one, and no other windows.
"""

import dataclasses
import itertools
import statistics
import time
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.finding import Figure, Finding, spread_of
from benchmarks.gpu.idle import profile_of, record
from benchmarks.gpu.options import Options
from benchmarks.gpu.subject import Subject, random_subject
from mara_fast import DecodingConfig, Engine
from mara_fast.bench.measure import roofline, synchronise
from mara_fast.decoder import Decoder
from mara_fast.run import Request, Run
from mara_fast.window import WINDOWS

BATCHES = (1, 64, 16, 256, 32, 4, 128, 8, 2)
"""In order of value: time may be short."""
PROFILED = (1, 16, 64, 256)
PLAIN, AUTO = "plain", "auto"
WARM_TURNS = 6
"""Two read prompts, one runs eagerly, one is captured, at most."""
_TOO_SLOW = 0.7
"""Of the best tokens per second: wider windows are not tried."""
WANTED_OF_PLAIN = {1: 0.97, 16: 0.97, 32: 0.95, 64: 0.90}
WANTED_OF_ROOFLINE = 0.8
"""The project's targets, for an 8B."""


class WatchedEngine(Engine):
    """An engine whose decoder can be looked at while it runs."""

    decoder: Decoder

    def take_decoder(self, *args: Any, **options: Any) -> Decoder:
        """As the engine does."""
        self.decoder = super().take_decoder(*args, **options)
        return self.decoder


class Engines(NamedTuple):
    """With the agent, and without; each serves every batch size."""

    aligned: WatchedEngine
    plain: WatchedEngine

    @classmethod
    def of(cls, subject: Subject, max_batch_size: int, compile: bool | str) -> "Engines":
        """Of one model."""
        return cls(
            *(
                WatchedEngine(
                    subject.model, agent, False, max_batch_size=max_batch_size, compile=compile
                )
                for agent in (subject.agent, False)
            )
        )

    def for_window(self, window: int | str) -> WatchedEngine:
        """The one that decodes so."""
        return self.plain if window == PLAIN else self.aligned


class Turns(NamedTuple):
    """What some turns of a run took and gave."""

    tokens_per_s: float
    spread: float
    step_ms: float


def run(options: Options) -> Finding:
    """Measures every batch; keeps what is found after each."""
    batches, num_turns = ((1, 2), 4) if options.small else (BATCHES, 24)
    windows: tuple[int | str, ...] = (PLAIN, AUTO, *WINDOWS)
    compiler: bool | str = False
    if options.compile:
        batches, windows = (1,), (PLAIN, AUTO)
        compiler = "aot_eager" if options.small else True
    shape = "nano" if options.small else options.model
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    length = 8 if options.small else 64
    subject = random_subject(
        shape, device=options.device, dtype=dtype, num_prompts=max(batches), length=length
    )
    if options.label:
        subject = dataclasses.replace(subject, name=f"{shape} {options.label}")
    finding = Finding(details={"model": subject.name, "batches": []})
    started = time.perf_counter()
    engines = Engines.of(subject, max(batches), compiler)
    if engines.aligned.lm.attention != "candidate":
        attention = engines.aligned.lm.attention
        finding.problems.append(f"{shape} decodes by {attention} attention, not by ours")
    for batch_size in batches:
        try:
            row = measure_batch(subject, engines, finding, batch_size, num_turns, windows)
        except torch.OutOfMemoryError as error:
            finding.notes.append(f"batch {batch_size} does not fit: {str(error).partition('.')[0]}")
            continue
        finding.details["batches"].append(row)
        finding.notes.append(summary(subject.name, row))
        options.keep(finding)
    if options.compile:
        seconds = time.perf_counter() - started
        finding.notes.append(f"{seconds:.0f} s with what compiling took, twice")
    # Last: a profiler may leave a trace in the graphs that are captured after it.
    if options.device.type == "cuda":
        for batch_size in (size for size in PROFILED if size in batches):
            add_profile(subject, engines, finding, batch_size, num_turns)
            options.keep(finding)
    else:
        finding.notes.append("no idle share: it is a GPU's")
    return finding


def measure_batch(
    subject: Subject,
    engines: Engines,
    finding: Finding,
    batch_size: int,
    num_turns: int,
    windows: tuple[int | str, ...],
) -> dict[str, Any]:
    """Plain decoding and every window, fixed ones until they get slow."""
    systems: dict[str, Turns] = {}
    for window in windows:
        name = str(window)
        systems[name] = time_turns(engines, subject, window, batch_size, num_turns)
        best = max(turns.tokens_per_s for turns in systems.values())
        if isinstance(window, int) and systems[name].tokens_per_s < _TOO_SLOW * best:
            break
    plain, auto = systems[PLAIN], systems[AUTO]
    context = len(subject.prompts[0]) + WARM_TURNS + num_turns / 2
    limit = roofline(subject.model, context=context, batch_size=batch_size)
    of_limit = plain.tokens_per_s / limit["plain_tokens_per_s"]
    where = f"{subject.name} B={batch_size}"
    spread = auto.spread + plain.spread
    for name, figure in {
        "plain": Figure(plain.tokens_per_s, "tokens/s", plain.spread),
        "MARA": Figure(auto.tokens_per_s, "tokens/s", auto.spread),
        "MARA / plain": Figure(auto.tokens_per_s / plain.tokens_per_s, "x", spread),
        "plain / roofline": Figure(of_limit, "x", plain.spread),
    }.items():
        finding.figures[f"{where} {name}"] = figure
    return {
        "batch_size": batch_size,
        "roofline": limit,
        "plain_of_roofline": of_limit,
        "systems": {name: turns._asdict() for name, turns in systems.items()},
    }


def begin(
    engine: WatchedEngine, subject: Subject, window: int | str, batch_size: int, num_turns: int
) -> Any:
    """The turns of a run, of which those that warm up are done."""
    prompts = subject.prompts[:batch_size]
    config = DecodingConfig(
        # A turn emits two tokens of a slot at most: none comes to its end.
        max_new_tokens=2 * (WARM_TURNS + num_turns) + 2,
        ignore_eos=True,
        window=AUTO if window == PLAIN else window,
    )
    requests = [
        Request(index=index, prompt=ids, token_ids=ids, sequence=index)
        for index, ids in enumerate(prompts)
    ]
    turns = Run(engine, config, requests).steps()
    for _ in range(WARM_TURNS):
        next(turns)
    failure = engine.decoder.graphs and engine.decoder.graphs.failure
    if failure:
        raise RuntimeError(f"the step cannot be captured: {failure}")
    return turns


def time_turns(
    engines: Engines, subject: Subject, window: int | str, batch_size: int, num_turns: int
) -> Turns:
    """Tokens per second of some turns in which all slots decode."""
    device, engine = subject.model.device, engines.for_window(window)
    turns = begin(engine, subject, window, batch_size, num_turns)
    tokens = engine.decoder.state.num_tokens
    synchronise(device)
    before, marks = int(tokens.sum()), [time.perf_counter()]
    for _ in range(num_turns):
        next(turns)
        marks.append(time.perf_counter())
    synchronise(device)
    seconds = time.perf_counter() - marks[0]
    produced = int(tokens.sum()) - before
    turns.close()
    # The next one's memory is planned without this one's.
    del engine.decoder
    each = [after - start for start, after in itertools.pairwise(marks)]
    p20, _, _, p80 = statistics.quantiles(each, n=5, method="inclusive")
    middle = statistics.median(each)
    return Turns(produced / seconds, spread_of(p20, middle, p80), 1e3 * seconds / num_turns)


def add_profile(
    subject: Subject, engines: Engines, finding: Finding, batch_size: int, num_turns: int
) -> None:
    """The idle share and the parts of turns with the automatic window."""
    turns = begin(engines.aligned, subject, AUTO, batch_size, num_turns)

    def some() -> None:
        for _ in range(num_turns):
            next(turns)

    profile = profile_of(record(some))
    turns.close()
    del engines.aligned.decoder
    where = f"{subject.name} B={batch_size}"
    finding.figures[f"{where} GPU idle"] = Figure(profile.idle_share, "share", 0.1)
    finding.details.setdefault("profiles", {})[batch_size] = profile._asdict()
    parts = ", ".join(
        f"{part} {share:.1%}"
        for part, share in sorted(profile.parts.items(), key=lambda item: -item[1])
    )
    finding.notes.append(f"{where}: the GPU is idle {profile.idle_share:.1%}; busy with {parts}")


def summary(name: str, row: dict[str, Any]) -> str:
    """A batch in a line, with the targets of an 8B."""
    systems, size = row["systems"], row["batch_size"]
    rates = {key: turns["tokens_per_s"] for key, turns in systems.items()}
    of_plain = rates[AUTO] / rates[PLAIN]
    text = (
        f"{name} B={size}: plain {rates[PLAIN]:.1f} tokens/s ({row['plain_of_roofline']:.2f} of "
        f"the roofline), MARA {rates[AUTO]:.1f} ({of_plain:.2f} of plain"
    )
    if name == "llama-3.1-8b" and size in WANTED_OF_PLAIN:
        wanted = WANTED_OF_PLAIN[size]
        text += f", wanted {wanted:.2f}: {'met' if of_plain >= wanted else 'NOT met'}"
    windows = ", ".join(f"{key} {rate:.1f}" for key, rate in rates.items() if key.isdigit())
    return f"{text}); windows {windows}" if windows else f"{text})"
