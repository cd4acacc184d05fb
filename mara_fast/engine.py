"""The engine: a model, an agent and a tokenizer, and the ways to ask them for answers."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import torch

from mara_fast.agent import MaraAgent
from mara_fast.cache import SlotCache
from mara_fast.config import DecodingConfig
from mara_fast.decoder import Decoder, ScoredWindow
from mara_fast.language_model import AttentionPath, FrozenLM
from mara_fast.loading import AgentLike, ModelLike, load_agent, load_model, load_tokenizer
from mara_fast.memory import Pool, free_memory, plan_pools
from mara_fast.mixture import AgentMixture, check_dials, dialed
from mara_fast.options import check, is_number
from mara_fast.outputs import DecodingStats, Generation, TokenEvent
from mara_fast.prompts import PromptError, encode_prompts
from mara_fast.row_budget import StepShape
from mara_fast.run import Request, Run
from mara_fast.step_costs import MeasuredCosts
from mara_fast.step_graphs import Capture, CudaCapture
from mara_fast.streaming import stream_events, stream_to
from mara_fast.tensor_parallel import least_of_all
from mara_fast.window import StepCosts
from mara_kernels import dispatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


class Engine:
    """Decodes prompts with a frozen language model and, if given, an agent.

    The output of a prompt does not depend on the others, on ``max_batch_size``, ``prefill_chunk``
    or ``window``.

    Args:
        model: hub id, path, loaded model, or ``"tiny"``.
        agent: :class:`MaraAgent`, folder or hub id; or a list of these, which decide together as
            ``agent_weights`` and ``agent_combination`` of each call say. None: the agent a model
            brings along (``"tiny"`` does), else plain decoding. False: plain decoding.
        tokenizer: None: the one at the model's path, if any. False: none. Without one prompts are
            token ids, and results have no text.
        max_batch_size: sequences decoded at once.
        max_length: most positions (prompt and answer) of a sequence; None: what the model allows.
        prefill_chunk: most prompt tokens per slot read in one forward.
        dtype: of a model loaded here; ``"auto"``: float32 on a CPU, else the checkpoint's.
        device: of a model loaded here; ``"auto"``: cuda if there is one.
        memory_utilization: share of the free memory that keys and values may take. Prompts that do
            not fit together are decoded in turns, the short ones first.
        attention: ``"auto"``, or one of the paths of :class:`FrozenLM` to force it.
        cuda_graph: replay the decode step as CUDA graphs; ``"auto"``: where there is CUDA. A step
            that cannot be captured runs eagerly, and a warning says why.
        compile: compile the language model's decode steps with ``torch.compile``, each shape into
            one graph; takes a minute or more per shape at first. True: by inductor; or the name of
            another backend. Rounding may differ from that of the uncompiled model.
        tensor_parallel: the model is spread over the processes of torchrun, each of which makes
            this engine and asks it for the same; all get the same answers.

    Raises:
        ValueError: options that are not allowed, an agent that does not fit the model or has NaN
            weights, an architecture that cannot be decoded exactly.
    """

    def __init__(
        self,
        model: "ModelLike",
        agent: AgentLike = None,
        tokenizer: "PreTrainedTokenizerBase | Literal[False] | None" = None,
        *,
        max_batch_size: int = 16,
        max_length: int | None = None,
        prefill_chunk: int = 512,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        memory_utilization: float = 0.9,
        attention: AttentionPath = "auto",
        cuda_graph: bool | Literal["auto"] = "auto",
        compile: bool | str = False,
        tensor_parallel: bool = False,
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("prefill_chunk", prefill_chunk),
            ("max_length", 1 if max_length is None else max_length),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; allowed: an integer >= 1")
        check(
            "memory_utilization",
            memory_utilization,
            is_number,
            "a number above 0, at most 1",
            above=0,
            maximum=1,
        )
        if not isinstance(cuda_graph, bool) and cuda_graph != "auto":
            raise ValueError(
                f"cuda_graph={cuda_graph!r} is not allowed; allowed: True, False, 'auto'"
            )
        if not isinstance(compile, bool):
            import torch._dynamo as dynamo

            if compile not in dynamo.list_backends(exclude_tags=()):
                known = ", ".join(dynamo.list_backends())
                raise ValueError(
                    f"compile={compile!r} is not allowed; allowed: True, False, {known}"
                )
        if not isinstance(tensor_parallel, bool):
            raise ValueError(
                f"tensor_parallel={tensor_parallel!r} is not allowed; allowed: True, False"
            )
        if not (tokenizer is None or tokenizer is False or hasattr(tokenizer, "decode")):
            raise ValueError(
                f"tokenizer must be a tokenizer, None or False, got {type(tokenizer).__name__}"
            )
        # A large model takes minutes to load: what is wrong everywhere is said before.
        dispatch.check()
        loaded = load_model(model, dtype=dtype, device=device, tensor_parallel=tensor_parallel)
        dispatch.check(loaded.device)
        if tokenizer is None:
            tokenizer = load_tokenizer(model)
        self.tokenizer = tokenizer or None
        backend = ("inductor" if compile is True else compile) or None
        self.lm = FrozenLM(loaded, attention=attention, compile=backend)
        self.agent = load_agent(agent, model=model, lm=self.lm)
        self.max_batch_size, self.prefill_chunk = max_batch_size, prefill_chunk
        self.memory_utilization = memory_utilization
        limit = self.lm.max_positions
        if max_length is not None and limit is not None and max_length > limit:
            raise ValueError(f"max_length={max_length} exceeds the model's {limit} positions")
        self.max_length = max_length if max_length is not None else limit
        self._capture = _capture(cuda_graph, self.lm.device)
        self._costs: StepCosts | None = None
        self._idle: Decoder | None = None
        self._idle_lock = threading.Lock()

    def config(self, config: DecodingConfig | None = None, **options: Any) -> DecodingConfig:
        """The options in force: those given, over ``config``, else the agent's own, else ours."""
        return options_in_force(self.agent, config, options)

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's weights."""
        return self.lm.model.dtype

    def generate(
        self,
        prompts: Any,
        config: DecodingConfig | None = None,
        *,
        streamer: "BaseStreamer | None" = None,
        progress: bool = False,
        sequence_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Decodes all prompts; results in their order.

        Args:
            prompts: a text, a chat (list of role/content dicts), a list of either, or a list of
                token-id lists.
            config: decoding options; None: the agent's defaults.
            streamer: a transformers streamer, for a single prompt.
            progress: show a progress bar.
            sequence_ids: keys of the draws, one per prompt; None: 0, 1, 2, ...
            options: override fields of the config.

        Raises:
            ValueError: before any work, naming the prompt or option at fault.
        """
        from tqdm.auto import tqdm

        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(
                f"streamer={streamer!r} is not allowed; allowed: a transformers streamer, which "
                "has put() and end(), or None"
            )
        run = self._start(prompts, config, sequence_ids, options, keeps_tokens=streamer is not None)
        results: list[Generation | None] = [None] * len(run.requests)
        if streamer is not None:
            if len(results) != 1:
                raise ValueError(f"a streamer takes one prompt, got {len(results)}")
            return [stream_to(run, streamer)]
        with tqdm(total=len(results), unit="prompt", disable=not progress) as bar:
            total = DecodingStats()
            for index, generation in run:
                results[index] = generation
                total += generation.stats
                bar.update()
                bar.set_postfix(tokens=total.num_tokens, refresh=False)
        return [generation for generation in results if generation is not None]

    def as_completed(
        self,
        prompts: Any,
        config: DecodingConfig | None = None,
        *,
        sequence_ids: Sequence[int] | None = None,
        observer: Callable[[ScoredWindow], None] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Generation]]:
        """Like :meth:`generate`, but yields (index, generation) as soon as each is done.

        Args:
            observer: is shown every window that the agent scored, before it is committed; windows
                of a sequence come in order, with its key in ``state.sequence``.
        """
        return iter(self._start(prompts, config, sequence_ids, options, observer=observer))

    def stream(
        self, prompt: Any, config: DecodingConfig | None = None, **options: Any
    ) -> Iterator[TokenEvent]:
        """Decodes one prompt, token by token. The texts of the events add up to the result's."""
        run = self._start(prompt, config, None, options, keeps_tokens=True)
        if len(run.requests) != 1:
            raise ValueError(f"stream takes one prompt, got {len(run.requests)}")
        return stream_events(run)

    def _start(
        self,
        prompts: Any,
        config: DecodingConfig | None,
        sequence_ids: Sequence[int] | None,
        options: dict[str, Any],
        *,
        keeps_tokens: bool = False,
        observer: Callable[[ScoredWindow], None] | None = None,
    ) -> Run:
        config = self.config(config, **options)
        encoded = self._encode(prompts, config)
        if sequence_ids is None:
            sequence_ids = range(len(encoded))
        if not isinstance(sequence_ids, Sequence) or not all(
            isinstance(sequence, Integral)
            and not isinstance(sequence, bool)
            and 0 <= sequence < 2**63
            for sequence in sequence_ids
        ):
            raise ValueError(f"sequence_ids must be integers in [0, 2**63), got {sequence_ids!r}")
        if len(sequence_ids) != len(encoded):
            raise ValueError(f"{len(sequence_ids)} sequence_ids for {len(encoded)} prompts")
        requests = [
            Request(index=index, prompt=prompt, token_ids=ids, sequence=int(sequence))
            for index, ((prompt, ids), sequence) in enumerate(
                zip(encoded, sequence_ids, strict=True)
            )
        ]
        return Run(self, config, requests, keeps_tokens=keeps_tokens, observer=observer)

    def check_prompts(self, prompts: Any, config: DecodingConfig | None = None) -> None:
        """Raises what decoding these prompts with these options would, without decoding."""
        self._encode(prompts, self.config(config))

    def _encode(self, prompts: Any, config: DecodingConfig) -> list[tuple[Any, list[int]]]:
        return encode_that_fit(
            prompts,
            config,
            tokenizer=self.tokenizer,
            vocab_size=self.lm.vocab_size,
            max_length=self.max_length,
        )

    def eos_ids(self, config: DecodingConfig) -> tuple[int, ...]:
        """The ids that end a sequence: the config's, else the model's, else the tokenizer's."""
        for ids in (
            config.eos_token_id,
            getattr(self.lm.model.generation_config, "eos_token_id", None),
            self.lm.config.eos_token_id,
            getattr(self.tokenizer, "eos_token_id", None),
        ):
            if ids is not None:
                return (ids,) if isinstance(ids, int) else tuple(ids)
        return ()

    def step_shape(self, config: DecodingConfig, num_slots: int) -> StepShape:
        """Rows of a step, when so many slots decode."""
        if self.agent is None:
            return StepShape.uniform(num_slots, 1)
        if config.window != "auto":
            # No set is larger than the vocabulary.
            return StepShape.uniform(num_slots, min(config.window, self.lm.vocab_size))
        host_reads = self._host_reads()
        if self._costs is None:
            self._costs = MeasuredCosts(self.lm, self._capture)
        return self._costs.best_shape(
            num_slots,
            examines_all=config.strategy != "first",
            leaves_out=host_reads,
            can_pack=self.lm.can_pack,
        )

    def _host_reads(self) -> bool:
        # Compiled steps have static shapes.
        return not self.lm.is_compiled and _host_reads(self.lm.device)

    def _shapes(self, config: DecodingConfig, num_slots: int) -> tuple[StepShape, ...]:
        """By slots that decode, less one: as a batch empties there is room for more rows."""
        return tuple(self.step_shape(config, size) for size in range(1, num_slots + 1))

    def pools(self, config: DecodingConfig, lengths: Sequence[int]) -> list[Pool]:
        """How prompts share the memory for keys and values.

        Args:
            config: decoding options.
            lengths: tokens of each prompt.

        Raises:
            ValueError: one needs more than there is, with the numbers.
        """
        # The idle decoder's memory is used again, or given back.
        with self._idle_lock:
            idle = 0 if self._idle is None else self._idle.cache.num_bytes
        budget = int(self.memory_utilization * (free_memory(self.lm.device) + idle))
        if self.lm.is_sharded:
            # Every process holds a part of each key: all plan the same pools.
            budget = least_of_all(budget)
        return plan_pools(
            [length + config.max_new_tokens for length in lengths],
            max_slots=self.max_batch_size,
            scratch=self._scratch(config, min(self.max_batch_size, len(lengths)), max(lengths)),
            row_bytes=self.lm.row_bytes,
            budget=budget,
            prompt_lengths=lengths,
        )

    def _scratch(self, config: DecodingConfig, num_slots: int, longest_prompt: int) -> int:
        widest = max(shape.window for shape in self._shapes(config, num_slots))
        return max(widest, min(self.prefill_chunk, longest_prompt))

    def take_decoder(
        self,
        config: DecodingConfig,
        pool: Pool,
        *,
        longest_prompt: int,
        observer: Callable[[ScoredWindow], None] | None = None,
    ) -> Decoder:
        """A decoder that no other run is using, idle and large enough.

        Args:
            config: decoding options.
            pool: its slots.
            longest_prompt: tokens of the longest.
            observer: is shown every window that the agent scored.
        """
        scratch = self._scratch(config, pool.num_slots, longest_prompt)
        config, agent = config.without_limits(), dialed(self.agent, config)
        with self._idle_lock:
            decoder, self._idle = self._idle, None
        cache = None if decoder is None else decoder.cache
        # Reading ahead is worth no new cache, nor its graphs.
        if (
            cache is None
            or cache.num_slots < pool.num_slots
            or cache.max_length < pool.max_length
            or cache.scratch < scratch
        ):
            # The old one's memory is free before the new one is allocated.
            decoder = cache = None
            cache = SlotCache(
                num_slots=pool.num_slots + pool.num_ahead,
                max_length=pool.max_length,
                scratch=scratch,
                kinds=self.lm.row_kinds,
            )
        host_reads = self._host_reads()
        fits = decoder is not None and (
            (decoder.config, decoder.host_reads) == (config, host_reads)
            and decoder.agent == agent
            and len(decoder.shapes) >= pool.num_slots
        )
        if decoder is None or not fits:
            decoder = Decoder(
                self.lm,
                agent,
                config,
                num_slots=cache.num_slots,
                shapes=self._shapes(config, min(cache.num_slots, self.max_batch_size)),
                eos_ids=self.eos_ids(config),
                host_reads=host_reads,
                cache=cache,
                capture=self._capture,
            )
        decoder.start(observer)
        return decoder

    def return_decoder(self, decoder: Decoder) -> None:
        """Keeps a decoder, all of whose slots are idle, for the next run; one is enough."""
        with self._idle_lock:
            self._idle = decoder


def options_in_force(
    agent: MaraAgent | AgentMixture | None,
    config: DecodingConfig | None,
    options: Mapping[str, Any],
) -> DecodingConfig:
    """The options given, over ``config``, else the agent's own, else ours.

    Raises:
        ValueError: options that are not allowed, or weights of another number of agents.
    """
    if config is None:
        config = agent.decoding if agent is not None else DecodingConfig()
    elif not isinstance(config, DecodingConfig):
        raise ValueError(f"config must be a DecodingConfig, got {type(config).__name__}")
    config = config.replace(**options)
    check_dials(agent, config)
    return config


def encode_that_fit(
    prompts: Any,
    config: DecodingConfig,
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    vocab_size: int,
    max_length: int | None,
) -> list[tuple[Any, list[int]]]:
    """Every prompt and its token ids.

    Raises:
        ValueError: a prompt that is none or too long, or options that need a tokenizer.
    """
    if config.stop_strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer; this engine has none")
    encoded = encode_prompts(
        prompts, tokenizer=tokenizer, prompt_format=config.prompt_format, vocab_size=vocab_size
    )
    for index, (_, ids) in enumerate(encoded):
        needed = len(ids) + config.max_new_tokens
        if max_length is not None and needed > max_length:
            raise PromptError(
                index,
                f" has {len(ids)} tokens; with max_new_tokens={config.max_new_tokens} it needs "
                f"{needed} positions, the limit is {max_length}: shorten it or lower "
                "max_new_tokens",
            )
    return encoded


def _capture(wanted: bool | str, device: torch.device) -> Capture | None:
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device, the model is on {device}")
    return CudaCapture(device)


def _host_reads(device: torch.device) -> bool:
    """Reading a tensor costs nothing where it is computed."""
    return device.type == "cpu"
