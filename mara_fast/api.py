"""The main job in one call: prompts in, aligned text out."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mara_fast.config import DecodingConfig
from mara_fast.engine import Engine
from mara_fast.loading import TINY, AgentLike, ModelLike
from mara_fast.outputs import Generation, TokenEvent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


def generate(
    prompts: Any,
    model: ModelLike = TINY,
    agent: AgentLike = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    config: DecodingConfig | None = None,
    engine: Engine | None = None,
    streamer: "BaseStreamer | None" = None,
    progress: bool = False,
    **options: Any,
) -> list[Generation]:
    """Decodes prompts with a frozen language model and an agent.

    Args:
        prompts: a text, a chat (list of role/content dicts), a list of either, or a list of
            token-id lists.
        model: hub id, path, loaded model, or ``"tiny"``, the embedded default.
        agent: an agent, a folder or hub id of one, or a list of these, which decide together.
            None: ``"tiny"`` brings its own, any other model decodes plainly. False: plain decoding.
        tokenizer: None: the one at the model's path.
        config: decoding options; None: the agent's defaults.
        engine: decode with it; model, agent and tokenizer are then its own.
        streamer: a transformers streamer, for a single prompt.
        progress: show a progress bar.
        options: override fields of :class:`DecodingConfig`.

    Returns:
        One :class:`Generation` per prompt, in their order.

    Raises:
        ValueError: before any work, naming what was given and what is allowed.
    """
    engine = _engine(model, agent, tokenizer, engine)
    return engine.generate(prompts, config, streamer=streamer, progress=progress, **options)


def stream(
    prompt: Any,
    model: ModelLike = TINY,
    agent: AgentLike = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    config: DecodingConfig | None = None,
    engine: Engine | None = None,
    **options: Any,
) -> Iterator[TokenEvent]:
    """Like :func:`generate` for one prompt, token by token; every token is final."""
    return _engine(model, agent, tokenizer, engine).stream(prompt, config, **options)


def _engine(model: Any, agent: Any, tokenizer: Any, engine: Engine | None) -> Engine:
    if engine is None:
        return Engine(model, agent, tokenizer)
    if not isinstance(engine, Engine):
        raise ValueError(f"engine must be an Engine, got {type(engine).__name__}")
    if (model, agent, tokenizer) != (TINY, None, None):
        raise ValueError("engine= has its model, agent and tokenizer: do not pass them as well")
    return engine
