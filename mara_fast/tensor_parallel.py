"""One model on several GPUs, by transformers' plans: every process of torchrun runs the engine.

process r holds a part of every layer; hidden states and logits are whole in all of them
all processes decide the same, from the same states: those of process 0
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


_HEAD_START_S = 3.0


def check_processes() -> int:
    """Number of this process; a ValueError unless torchrun started it, or something alike."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise ValueError(
            f"tensor_parallel=True needs processes that know of each other ({', '.join(missing)} "
            "not set): start it by torchrun --nproc-per-node N"
        )
    return int(os.environ["RANK"])


@contextmanager
def silenced() -> Iterator[None]:
    """Of processes that do the same, one speaks; the others are heard only by what they return."""
    kept = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        except BaseException:
            # torchrun stops all when one fails: the first has to say why before that.
            time.sleep(_HEAD_START_S)
            raise
        finally:
            sys.stdout, sys.stderr = kept


def check_alone() -> None:
    """Raises a ValueError if torchrun started several processes: all would do all the work."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, each of which would answer "
            "everything: give --tensor-parallel, or leave torchrun out"
        )


def is_first() -> bool:
    """This process is the one that writes: number 0 of those that share a model, or alone."""
    import torch

    return not _is_initialized() or torch.distributed.get_rank() == 0


def load_sharded(path: str | os.PathLike[str], *, dtype: Any) -> "PreTrainedModel":
    """This process' part of a causal LM, on its own GPU or on the CPU.

    Args:
        path: hub id or path.
        dtype: as transformers takes it.

    Raises:
        ValueError: not started by torchrun, or the architecture has no plan.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_processes()
    config = AutoConfig.from_pretrained(path).get_text_config()
    if not getattr(config, "base_model_tp_plan", None):
        raise ValueError(f"{config.model_type} has no tensor-parallel plan in transformers")
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **_plan()).eval()


def is_sharded(parameters: "Iterable[Tensor]") -> bool:
    """Some of them are parts of tensors that several processes hold."""
    if not _is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in parameters)


def of_first(tensor: "Tensor") -> "Tensor":
    """What process 0 has. Sums over processes may round differently; one decision must not."""
    import torch

    tensor = tensor.contiguous()
    torch.distributed.broadcast(tensor, src=0)
    return tensor


def least_of_all(value: int) -> int:
    """The smallest that a process has, in all."""
    import torch

    if not _is_initialized():
        return value
    found = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return min(found)


def told_by_first(value: Any) -> Any:
    """A Python value of process 0, in all."""
    import torch

    if not _is_initialized():
        return value
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def _is_initialized() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _plan() -> dict[str, Any]:
    """Keyword arguments of from_pretrained, which changed its ways (5.18)."""
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):
        return {"tp_plan": "auto"}
