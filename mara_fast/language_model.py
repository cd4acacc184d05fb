"""A frozen Hugging Face causal LM as two functions: rows to hidden states, states to logits.

No model code is re-implemented. The body runs with our cache and our attention function, its tail
(norms behind the body, soft-caps, logit scales) runs as it stands on the chosen states. Whether
this is right for an architecture is tested on the model itself at construction.

Shapes: B slots, T rows per slot, H hidden, V vocabulary.
"""

import copy
import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mara_fast.attention import (
    ATTENTION_NAME,
    CONTEXT_KEYWORD,
    TreeContext,
    register_attention,
)
from mara_fast.cache import RowKind, SlotCache
from mara_fast.fused_layers import FusedLayers
from mara_fast.linear_layers import fast_linear
from mara_fast.self_check import Checked, check_path
from mara_fast.tensor_parallel import is_sharded, of_first
from mara_kernels import dispatch

AttentionPath = Literal["auto", "candidate", "stock"]
ATTENTION_PATHS = ("auto", "candidate", "stock")

_MOST_GRAPHS = 256
"""Compiled shapes of all engines of a process together."""
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_COUPLED_ROPES = {"dynamic", "longrope"}

_logger = logging.getLogger(__name__)


class UnsupportedModelError(ValueError):
    """The architecture cannot be decoded exactly; the message says why."""


class FrozenLM:
    """A causal LM, decoded without being changed.

    Args:
        model: a loaded causal LM; put in eval mode.
        attention: ``"candidate"``: our attention function. ``"stock"``: the model's own sdpa or
            eager attention over explicit masks, slower. ``"auto"``: the first, where it is exact.
        compile: backend of ``torch.compile`` for the body's decode steps, which become one graph
            per shape; None: they run as they are.

    Raises:
        UnsupportedModelError: naming the architecture and the reason.
    """

    # Which attention runs is an entry of the model's config, which several engines may share.
    _one_forward = threading.Lock()

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: AttentionPath = "auto",
        compile: str | None = None,
    ) -> None:
        if attention not in ATTENTION_PATHS:
            raise ValueError(
                f"attention={attention!r} is not known; allowed: {', '.join(ATTENTION_PATHS)}"
            )
        self.model = model.eval()
        self.name = type(model).__name__
        self.config = model.config.get_text_config()
        self.is_sharded = is_sharded(model.parameters())
        self._body_name, self.body = self._find_body()
        self._head = self._headless_copy()
        self._injected: TreeContext | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.row_kinds: tuple[RowKind, ...] = ()
        """Of the keys and values of every layer, as measured."""
        self.row_bytes = 0
        """Keys and values of one position in all layers, as measured."""
        # Four dimensions: transformers takes the mask as it is, builds none and reads none.
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self._step_body: Any = self.body
        self._is_full = False
        self.can_pack = False
        """New rows of several slots may come as one sequence."""
        self._refuse_by_config()
        register_attention()
        self.fused: FusedLayers | None = None
        """Its layers that run as kernels of ours where they are called one by one."""
        if dispatch.choose("layers", self.device).name == "triton" and not self.is_sharded:
            self.fused = FusedLayers(self.body)
        self.attention = self._choose_attention(attention)
        if compile is not None:
            self._step_body = torch.compile(
                self.body, fullgraph=True, dynamic=False, backend=compile
            )

    @property
    def is_compiled(self) -> bool:
        """Decode steps are."""
        return self._step_body is not self.body

    @property
    def device(self) -> torch.device:
        """Where the rows go in."""
        return self.model.get_input_embeddings().weight.device

    @property
    def hidden_size(self) -> int:
        """H"""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """V, as the embedding has it."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def max_positions(self) -> int | None:
        """Positions the model was made for, if it says so."""
        return max_positions(self.config)

    def hidden_states(
        self,
        ids_BT: Tensor,
        *,
        positions: Tensor,
        cache: SlotCache,
        context: TreeContext,
        compiled: bool = True,
    ) -> Tensor:
        """Last hidden states, after the final norm, of new rows of the cache's selected slots.

        Args:
            ids_BT: int64 [B, T]; [1, R] of packed rows, as the positions and the states.
            positions: int64 [B, T].
            cache: slots, base and packing selected; the rows' keys and values are left at the base.
            context: the rows' place in their slots.
            compiled: decode steps run compiled, where this was asked for; False: as they are.

        Returns:
            [B, T, H]; [1, R, H] of packed rows.
        """
        extra: dict[str, Any] = {}
        if self.attention == "candidate":
            mask: Any = self._no_mask
            if not self._hooks:
                extra[CONTEXT_KEYWORD] = context
        else:
            mask = self._explicit_masks(context)
        inputs = {
            "input_ids": ids_BT,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
            **extra,
        }
        with self._our_attention(context):
            if compiled and self.is_compiled and context.rows.tree.kind == "siblings":
                hidden = self._compiled_step(inputs)
            else:
                with self._linear_layers(), self._fused_layers():
                    hidden = self.body(**inputs).last_hidden_state
        return of_first(hidden) if self.is_sharded else hidden

    def _compiled_step(self, inputs: dict[str, Any]) -> Tensor:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if self._is_full:
            with torch.compiler.set_stance("eager_on_recompile"):
                return self._step_body(**inputs).last_hidden_state
        try:
            # A graph for every number of slots and window, and a head room for several engines.
            with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
                return self._step_body(**inputs).last_hidden_state
        except FailOnRecompileLimitHit:
            self._is_full = True
            _logger.warning(
                "%s: %d shapes of steps are compiled, and no more will be: others run as they are",
                self.name,
                _MOST_GRAPHS,
            )
            return self.body(**inputs).last_hidden_state
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise UnsupportedModelError(
                f"{self.name} cannot be compiled: {reason}; use compile=False"
            ) from error

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Next-token logits [N, V] of hidden states, by the model's own tail."""
        with self._linear_layers():
            return self._head(inputs_embeds=hidden_NH[:, None], use_cache=False).logits[:, 0]

    def _linear_layers(self) -> AbstractContextManager[None]:
        return fast_linear() if self.device.type == "cpu" else nullcontext()

    def _fused_layers(self) -> AbstractContextManager[None]:
        return nullcontext() if self.fused is None else self.fused()

    @contextmanager
    def _our_attention(self, context: TreeContext) -> Iterator[None]:
        if self.attention != "candidate":
            yield
            return
        config = self.body.config
        with self._one_forward:
            previous = config._attn_implementation
            config._attn_implementation = ATTENTION_NAME
            self._injected = context if self._hooks else None
            try:
                yield
            finally:
                config._attn_implementation = previous
                self._injected = None

    def _find_body(self) -> tuple[str, PreTrainedModel]:
        # base_model_prefix is wrong for some models; the body is the one child of its kind.
        bodies = [
            (name, child)
            for name, child in self.model.named_children()
            if isinstance(child, PreTrainedModel)
        ]
        if len(bodies) != 1 or self.model.get_output_embeddings() is None:
            raise UnsupportedModelError(
                f"{self.name} is not supported: expected a causal LM made of one body and a head, "
                f"found the children {[name for name, _ in self.model.named_children()]}"
            )
        return bodies[0]

    def _headless_copy(self) -> nn.Module:
        head = copy.copy(self.model)
        head._modules = dict(self.model._modules)
        head._modules[self._body_name] = _PassThrough()
        # accelerate binds these to the original model: the copy would run its body after all.
        for name in ("forward", "_old_forward", "_hf_hook"):
            head.__dict__.pop(name, None)
        return head

    def _refuse_by_config(self) -> None:
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"{self.name} is not supported: it has an encoder")
        layer_types = set(getattr(self.config, "layer_types", None) or ())
        if layer_types - _LAYER_TYPES:
            raise UnsupportedModelError(
                f"{self.name} is not supported: its layers of type "
                f"{', '.join(sorted(layer_types - _LAYER_TYPES))} keep a state that cannot be "
                "shared by candidates; supported are full_attention and sliding_attention"
            )
        for rope in _rope_parameters(self.config):
            kind = rope.get("rope_type", rope.get("type"))
            bounded = kind == "longrope" and self.max_positions is not None
            if kind in _COUPLED_ROPES and not bounded:
                raise UnsupportedModelError(
                    f"{self.name} is not supported: its {kind} rope depends on the longest "
                    "sequence of the batch, so a sequence would not be independent of the others"
                )

    def _explicit_masks(self, context: TreeContext) -> Any:
        def mask(sliding_window: int | None) -> Tensor:
            rows = context.rows
            visible = rows.visible(sliding_window)
            if visible is None:
                num_slots, num_rows = rows.lengths.shape[0], rows.tree.depths.shape[0]
                size = (num_slots, num_rows, rows.base + num_rows)
                visible = torch.ones(size, dtype=torch.bool, device=rows.lengths.device)
            visible = visible[:, None]
            if self.model.config._attn_implementation == "sdpa":
                return visible
            dtype = self.model.dtype
            zero = torch.zeros((), dtype=dtype, device=visible.device)
            return torch.where(visible, zero, torch.finfo(dtype).min)

        window = getattr(self.config, "sliding_window", None)
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types and "sliding_attention" in layer_types:
            return {"full_attention": mask(None), "sliding_attention": mask(window)}
        return mask(None if layer_types else window)

    def _choose_attention(self, attention: AttentionPath) -> str:
        """The first path that passes the self-check; raises with every path's reason."""
        reasons = []
        for path, inject in (("candidate", False), ("candidate", True), ("stock", False)):
            if attention not in ("auto", path):
                continue
            self.attention = path
            if inject:
                self._inject_context()
            try:
                self.row_kinds, self.row_bytes, self.can_pack = self._check()
            # Whatever a foreign model raises under our cache and mask: this path is not for it.
            except Exception as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                reasons.append(f"{path}{' (injected)' if inject else ''}: {reason[0]}")
                for hook in self._hooks:
                    hook.remove()
                self._hooks = []
                continue
            return path
        raise UnsupportedModelError(
            f"{self.name} is not supported: it does not decode exactly through slots. "
            + "; ".join(reasons)
        )

    def _check(self) -> Checked:
        """The self-check; with layers as they are, should those of ours not pass it."""
        try:
            return check_path(self)
        except Exception as error:
            if self.fused is None:
                raise
            reason, fused = str(error).strip().partition("\n")[0], self.fused
            self.fused = None
            try:
                checked = check_path(self)
            except Exception:
                # They are not the reason.
                self.fused = fused
                raise
            _logger.warning("%s: %s run as they are: %s", self.name, ", ".join(fused.names), reason)
            return checked

    def _inject_context(self) -> None:
        """For layers that do not pass keywords on: hands the context to the attention modules."""
        lm = weakref.ref(self)

        def add_context(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            owner = lm()
            if owner is None or owner._injected is None:
                return None
            return args, kwargs | {CONTEXT_KEYWORD: owner._injected}

        for module in self.body.modules():
            if "Attention" in type(module).__name__ and hasattr(module, "layer_idx"):
                hook = module.register_forward_pre_hook(add_context, with_kwargs=True)
                self._hooks.append(hook)


class _PassThrough(nn.Module):
    """Stands for the body in the head's copy of the model."""

    @property
    def decoder(self) -> "_PassThrough":
        """OPT's head calls the decoder of its body."""
        return self

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> "_BodyOutput":
        return _BodyOutput(last_hidden_state=inputs_embeds)


class _BodyOutput(BaseModelOutput):
    """A body's output; whatever else a head asks of it (router logits, ...) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def max_positions(config: Any) -> int | None:
    """Positions that a text config says its model was made for; None: it says nothing."""
    ropes = _rope_parameters(config)
    originals = [
        rope["original_max_position_embeddings"]
        for rope in ropes
        if rope.get("rope_type") == "longrope" and "original_max_position_embeddings" in rope
    ]
    limit = getattr(config, "max_position_embeddings", None)
    # Past its original context longrope changes the factors of every row in the batch.
    return min([*originals, limit]) if originals and limit else limit


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rope settings of a config; models with several kinds of layers have one each."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
