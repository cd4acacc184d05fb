"""Reader of the optional golden vectors: outputs of the MARA authors' code on tiny models.

They are found in the folder named by the environment variable MARA_FAST_GOLDEN, else in
`../shared/data/golden` beside the repository; every test that needs them is skipped without.
Models, actors, recorded decode runs, traces of whole candidate sets, and truncation cases.
"""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

_REPOSITORY = Path(__file__).resolve().parents[1]
# Why a test is skipped.
MISSING = "no golden vectors (set MARA_FAST_GOLDEN to their folder)"


def golden_folder() -> Path | None:
    """The folder of golden vectors, or None when there is none."""
    named = os.environ.get("MARA_FAST_GOLDEN")
    folder = Path(named) if named else _REPOSITORY.parent / "shared" / "data" / "golden"
    return folder if folder.is_dir() else None


def model_names() -> list[str]:
    """Models with a folder of weights, for example ["llama_a"]; empty without golden vectors."""
    folder = golden_folder()
    if folder is None:
        return []
    return sorted(path.parent.name for path in folder.glob("models/*/config.json"))


def model_path(name: str) -> Path:
    """Folder of a golden model: config, weights, tokenizer."""
    return _require_folder() / "models" / name


@cache
def load_model(name: str) -> Any:
    """A golden model as float32 `PreTrainedModel` in eval mode (one shared instance)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path(name), dtype=torch.float32).eval()


def eos_token_ids(name: str) -> tuple[int, ...]:
    """Ids that end a run, from the model's generation_config.json."""
    ids = json.loads((model_path(name) / "generation_config.json").read_text())["eos_token_id"]
    return tuple(ids) if isinstance(ids, list) else (ids,)


def actor_path(name: str) -> Path:
    """File of a model's actor, as the authors' code saves it (variant "mid")."""
    return _require_folder() / "actors" / _actors()[name]["file"]


def actor_variants(name: str) -> list[str]:
    """Names of the variants of a model's actor; they differ in the last bias only."""
    return list(_actors()[name]["variants"])


def actor_weights(name: str, variant: str = "mid") -> dict[str, torch.Tensor]:
    """State dict of an actor: keys ln.*, linear1.*, linear2.*, output_linear.*; float32."""
    weights = torch.load(actor_path(name), map_location="cpu", weights_only=True)
    bias = _actors()[name]["variants"][variant]["output_linear_bias"]
    return {**weights, "output_linear.bias": torch.tensor(bias, dtype=torch.float32)}


@cache
def input_ids(name: str) -> dict[str, list[int]]:
    """Prompt name -> token ids from which the recorded runs of a model started."""
    return json.loads((_require_folder() / "decode" / f"{name}.inputs.json").read_text())


@cache
def runs(name: str) -> list[dict[str, Any]]:
    """Recorded decode runs: run, method, prompt, ids; a cascade also actor, args, steps, ..."""
    return [json.loads(line) for line in _lines(f"decode/{name}.runs.jsonl.gz")]


def is_cascade(run: dict[str, Any]) -> bool:
    """False for a plain greedy run (no actor, arguments or steps)."""
    return run["method"] != "get_raw_output"


def decoding_options(run: dict[str, Any]) -> dict[str, Any]:
    """A recorded cascade run's arguments as keywords of the decoding configuration.

    Returns: max_new_tokens, top_k, top_p, strategy, fallback, order. Temperature has no part in
    it: the authors divide by it after truncation, which changes no token. `accept_sign` covers
    what is left of the arguments.

    The authors' default index counts in the order tried (0 = first, -1 = last), with two
    exceptions seen in the records: max_prob falls back to the first tried whatever the index,
    the reverse order to the last tried (the most probable), though its index is 0.
    """
    args = run["args"]
    strategy = {"top1": "first", "max_prob": "max_prob"}[args["proxy_strategy"]]
    fallback = {0: "first", -1: "last"}[args["default_action_idx"]]
    order = {"v0": "descending", "v1": "top_last"}[args["state_transition"]]
    if strategy == "max_prob":
        fallback = "first"
    if args["reverse_choice"]:
        order = "reverse"
        fallback = "last"
    return {
        "max_new_tokens": args["max_new_token"],
        "top_k": args["topk"],
        "top_p": args["topp"],
        "strategy": strategy,
        "fallback": fallback,
        "order": order,
    }


def accept_sign(run: dict[str, Any]) -> float:
    """Factor of the accept logit: -1 where the run took action 0 for "accept", else 1."""
    return 1.0 if run["args"]["accept_action"] == 1 else -1.0


def asks_all(run: dict[str, Any]) -> bool:
    """True where the authors' method scored all candidates, whatever the strategy."""
    return run["method"] == "get_proxy_output"


@cache
def trace(name: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Traced prompts of a model, and the tensors they name (`hidden` of a position: [n, H])."""
    from safetensors.torch import load_file

    records = json.loads("".join(_lines(f"trace/{name}.json.gz")))
    return records, load_file(_require_folder() / "trace" / f"{name}.safetensors")


@cache
def truncation() -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Rows of logits [64, 256], and cases: row, topk, topp, n, cand, logp, set_defined, ..."""
    from safetensors.torch import load_file

    (logits,) = load_file(_require_folder() / "truncation" / "logits.safetensors").values()
    return logits, json.loads("".join(_lines("truncation/cases.json.gz")))["cases"]


def _actors() -> dict[str, Any]:
    return json.loads((_require_folder() / "actors" / "actors.json").read_text())


def _lines(path: str) -> list[str]:
    with gzip.open(_require_folder() / path, "rt", encoding="utf-8") as file:
        return file.readlines()


def _require_folder() -> Path:
    folder = golden_folder()
    if folder is None:
        raise FileNotFoundError(MISSING)
    return folder
