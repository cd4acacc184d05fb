"""A decoding method for ``model.generate(custom_generate=...)`` of transformers."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mara_fast.alarms import alarms
from mara_fast.config import DecodingConfig
from mara_fast.engine import Engine
from mara_fast.loading import AgentLike
from mara_fast.outputs import DecodingStats

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

# Either done here by other means, or a sampling default, which MARA's own truncation replaces.
_EXPECTED = (
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "MaxLengthCriteria",
    "EosTokenCriteria",
)


def custom_generate(
    model: "PreTrainedModel",
    input_ids: Tensor,
    generation_config: "GenerationConfig | None" = None,
    agent: AgentLike = None,
    config: DecodingConfig | None = None,
    engine: Engine | None = None,
    **kwargs: Any,
) -> Any:
    """Aligned decoding behind transformers' own interface.

        model.generate(**inputs, custom_generate=mara_fast.custom_generate, agent=agent)

    Lengths, EOS and PAD ids come from the generation config. Truncation comes from ``config``, or
    the agent's defaults: the sampling defaults of transformers are not MARA's. Logits processors
    (a repetition penalty, for instance) and stopping criteria have no effect, with a warning; nor
    has a ``streamer``, which transformers keeps to itself.

    What :mod:`mara_fast.alarms` says of all rows together is a warning.

    Args:
        model: the model ``generate`` was called on.
        input_ids: int64 [B, L], left-padded.
        generation_config: as prepared by ``generate``.
        agent: an agent, a folder or hub id, or a list of these; None: plain greedy decoding.
        config: decoding options other than lengths and EOS.
        engine: an engine made for this model, which saves its construction in every call.
        kwargs: model keywords; of these only ``attention_mask`` is used, to leave out padding.

    Returns:
        int64 [B, L + new], right-padded; with ``return_dict_in_generate`` a
        ``GenerateDecoderOnlyOutput`` with ``sequences``.

    Raises:
        ValueError: beams, several return sequences, embeddings as input, scores or logits asked
            for.
        RuntimeError: NaN or infinite logits, naming prompt and position.
    """
    if generation_config is None:
        generation_config = model.generation_config
    for name, plain in (("num_beams", 1), ("num_return_sequences", 1)):
        value = getattr(generation_config, name, None)
        if value not in (None, plain):
            raise ValueError(f"{name}={value} is not supported with custom_generate of mara_fast")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, None):
            raise ValueError(f"{name}=True is not supported with custom_generate of mara_fast")
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds is not supported with custom_generate of mara_fast")
    for kind in ("logits_processor", "stopping_criteria"):
        ignored = {type(item).__name__ for item in kwargs.get(kind) or ()} - {*_EXPECTED}
        if ignored:
            warnings.warn(
                f"{kind} has no effect with custom_generate of mara_fast: "
                + ", ".join(sorted(ignored)),
                stacklevel=2,
            )
    if engine is None:
        engine = Engine(model, agent if agent is not None else False, False)
    elif engine.lm.model is not model or agent is not None:
        raise ValueError("engine= must be made for this model, and has its own agent")

    width = input_ids.shape[1]
    options: dict[str, Any] = {}
    if generation_config.max_length is not None:
        options["max_new_tokens"] = max(0, generation_config.max_length - width)
    elif generation_config.max_new_tokens is not None:
        options["max_new_tokens"] = generation_config.max_new_tokens
    if generation_config.eos_token_id is not None:
        options["eos_token_id"] = generation_config.eos_token_id
    min_new_tokens = generation_config.min_new_tokens or (generation_config.min_length or 0) - width
    if min_new_tokens > 0:
        options["min_new_tokens"] = min_new_tokens

    mask = kwargs.get("attention_mask")
    keep = torch.ones_like(input_ids) if mask is None else mask
    prompts = [row[kept.bool()].tolist() for row, kept in zip(input_ids, keep, strict=True)]
    config = engine.config(config, **options)
    generations = engine.generate(prompts, config)
    for index, generation in enumerate(generations):
        if generation.error is not None:
            raise RuntimeError(f"prompt {index}: {generation.error}")
    total = sum((generation.stats for generation in generations), DecodingStats())
    for text in alarms(total, config):
        warnings.warn(text, stacklevel=2)

    pad = generation_config.pad_token_id
    if pad is None:
        eos = engine.eos_ids(config)
        pad = eos[0] if eos else 0
    elif isinstance(pad, list):
        pad = pad[0]
    longest = max((len(generation.token_ids) for generation in generations), default=0)
    new = torch.full((len(generations), longest), pad, dtype=torch.int64, device=input_ids.device)
    for row, generation in zip(new, generations, strict=True):
        row[: len(generation.token_ids)] = torch.tensor(generation.token_ids)
    sequences = torch.cat((input_ids, new), dim=1)
    if generation_config.return_dict_in_generate:
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences)
    return sequences
