"""The decoder in float32: the tokens, counts and verdicts of the sequential cascade, every window.

The cascade is the one by definition of ``tests/oracle.py``: a whole forward for every candidate. A
prompt is compared up to its first decision that rounding could flip.
"""

from typing import Any

import torch

from benchmarks.gpu.finding import Finding
from benchmarks.gpu.options import Options
from benchmarks.gpu.subject import Subject, tiny_subject
from exactness import check_exact, random_agent
from mara_fast import Engine
from mara_fast.bench.model import random_llama

RULES: tuple[dict[str, Any], ...] = (
    {},
    {"acceptance": "sample", "strategy": "max_prob", "fallback": "first", "top_k": 8},
)


def run(options: Options) -> Finding:
    """Compares, and says of each model and rule what differed first."""
    device, finding = options.device, Finding()
    num_prompts, num_tokens = (2, 5) if options.small else (6, 24)
    subjects = [tiny_subject(device=device, num_prompts=num_prompts)]
    if not options.small:
        subjects.append(large_subject(device, num_prompts))
    for subject in subjects:
        compared = check(subject, finding, num_tokens=num_tokens, small=options.small)
        finding.notes.append(f"{subject.name}: {compared} tokens are those of the cascade")
    return finding


def large_subject(device: torch.device, num_prompts: int) -> Subject:
    """A random model of 54M parameters. Its agent's accept logits are spread by 1.5: were it tuned
    to a profile, as elsewhere, they would be so large that float32 rounds more than a decision may
    be off."""
    model = random_llama(device=device)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(model.config.vocab_size, (num_prompts, 32), generator=generator)
    agent = random_agent(model.config.hidden_size).to(device)
    return Subject(name="50m", model=model, agent=agent, prompts=prompts.tolist())


def check(subject: Subject, finding: Finding, *, num_tokens: int, small: bool) -> int:
    """Tokens of one model that were compared; what differs becomes a problem."""
    memo: dict = {}
    compared = 0
    for slots in (2,) if small else (1, len(subject.prompts)):
        engine = Engine(subject.model, subject.agent, False, max_batch_size=slots, prefill_chunk=16)
        for rule in RULES:
            for window in (1, 3) if small else (1, 3, 8, 40, "auto"):
                try:
                    found = check_exact(
                        engine,
                        subject.prompts,
                        memo=memo,
                        window=window,
                        max_new_tokens=num_tokens,
                        ignore_eos=True,
                        **rule,
                    )
                except AssertionError as error:
                    what = str(error).strip().partition("\n")[0]
                    finding.problems.append(
                        f"{subject.name}, {slots} slots, window {window}, {rule}: {what}"
                    )
                    continue
                compared += sum(len(one.token_ids) for one in found)
    return compared
