"""A process of torchrun: ``tp_run.py FOLDER``. Decodes with every model in it, and writes."""

import json
import os
import sys
from pathlib import Path

import torch

from exactness import random_agent
from mara_fast import Engine

PROMPTS = [[5, 17, 40, 8, 9], [60], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]]
OPTIONS = (
    {"max_new_tokens": 12, "window": 3},
    {"max_new_tokens": 12, "acceptance": "sample", "seed": 5, "window": 1},
)


def answers(path: Path, *, tensor_parallel: bool) -> list[list[int]]:
    engine = Engine(
        str(path),
        random_agent(48),
        False,
        max_batch_size=2,
        prefill_chunk=4,
        tensor_parallel=tensor_parallel,
    )
    return [
        result.token_ids
        for options in OPTIONS
        for result in engine.generate(PROMPTS, ignore_eos=True, **options)
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {
        path.name: answers(path, tensor_parallel=True)
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
