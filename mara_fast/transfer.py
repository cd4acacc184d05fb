"""Tensors on their way to the host, which goes on with other work meanwhile."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor as it is now, in order with the work queued on its device.

    Args:
        tensor: what is copied; may change afterwards.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._copy = tensor.to("cpu", copy=True)
            return
        # Only pinned memory can be written to while the host goes on.
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def is_ready(self) -> bool:
        """It has arrived."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The copy on the CPU, once it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


def to_device(values: list[int] | list[list[int]] | list[bool], device: torch.device) -> Tensor:
    """A tensor of these values on the device; the host does not wait for it."""
    tensor = torch.tensor(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
