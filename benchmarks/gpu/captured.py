"""The decode step captured into a graph, and eagerly: the same state, to the bit, after some steps.

Both run the same kernels on the same shapes, so that nothing may differ. On a CPU, where there are
no graphs, the tape of ``tests/tape.py`` stands for one: it repeats a step's operators on the
tensors that they had. It says nothing of CUDA.
"""

from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.finding import Finding
from benchmarks.gpu.options import Options
from benchmarks.gpu.subject import Subject, random_subject
from mara_fast import DecodingConfig, Engine
from mara_fast.decoder import Decoder
from mara_fast.memory import Pool
from mara_fast.slot_state import SlotState
from tape import TapeCapture

RULES: tuple[dict[str, Any], ...] = (
    {"window": 1},
    {"window": 3},
    {"window": "auto"},
    {"window": 4, "acceptance": "sample", "strategy": "random", "fallback": "max_prob"},
)


def run(options: Options) -> Finding:
    """Compares decoders that replay with decoders that do not."""
    finding = Finding()
    dtypes = (torch.float32,) if options.small else (torch.float32, torch.bfloat16)
    shape = "nano" if options.small else "50m"
    slots, num_steps = (2, 6) if options.small else (8, 24)
    for dtype in dtypes:
        subject = random_subject(
            shape, device=options.device, dtype=dtype, num_prompts=slots, length=16
        )
        # The step that a GPU takes, wherever it runs.
        with mock.patch("mara_fast.engine._host_reads", lambda device: False):
            for rule in RULES[1:2] if options.small else RULES:
                problem = compare(subject, rule, num_steps=num_steps)
                if problem:
                    finding.problems.append(f"{dtype}, {rule}: {problem}")
    if options.device.type != "cuda":
        finding.notes.append("a tape of operators stood for the graph")
    return finding


def compare(subject: Subject, rule: dict[str, Any], *, num_steps: int) -> str:
    """What differs between captured and eager steps; empty if nothing does."""
    captured, eager = (start(subject, rule, num_steps=num_steps) for _ in range(2))
    assert captured.graphs is not None
    num_slots = len(subject.prompts)
    with torch.inference_mode():
        for _ in range(num_steps):
            captured.graphs.step(num_slots, most=num_slots)
            eager.step(num_slots)
    if captured.graphs.failure is not None:
        return f"it cannot be captured: {captured.graphs.failure}"
    return difference(captured.state, eager.state)


def start(subject: Subject, rule: dict[str, Any], *, num_steps: int) -> Decoder:
    """A decoder of its own, its prompts read."""
    num_slots, length = len(subject.prompts), len(subject.prompts[0])
    # A step emits two tokens at most: no slot comes to its end.
    config = DecodingConfig(max_new_tokens=2 * num_steps + 2, ignore_eos=True, **rule)
    engine = Engine(subject.model, subject.agent, False, max_batch_size=num_slots)
    if subject.model.device.type != "cuda":
        engine._capture = TapeCapture()
    pool = Pool(members=[], num_slots=num_slots, max_length=length + config.max_new_tokens)
    decoder = engine.take_decoder(config, pool, longest_prompt=length)
    device = subject.model.device
    with torch.inference_mode():
        for slot in range(num_slots):
            decoder.state.reset(slot, sequence=slot)
        whole = torch.full((num_slots,), length, device=device)
        ids = torch.tensor(subject.prompts, device=device)
        decoder.prefill(slice(0, num_slots), ids, whole, whole > 0)
    return decoder


def difference(captured: SlotState, eager: SlotState) -> str:
    """The first field in which two states differ, and where; empty if they are equal."""
    for name, expected in eager.tensors().items():
        found = captured.tensors()[name]
        # A bit is a bit: NaN equals NaN here.
        same = (found == expected) | ((found != found) & (expected != expected))
        if not same.all():
            place = (~same).nonzero()[0].tolist()
            index = tuple(place)
            return (
                f"{name}{place}: {found[index].item()} captured, {expected[index].item()} eagerly"
            )
    return ""
