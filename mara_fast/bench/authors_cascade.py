"""The cascade as the MARA authors run it, written anew: the baseline to beat.

One prompt at a time, one forward of the language model per examined candidate, each with logits
over the whole vocabulary; the candidate set by transformers' top-k and top-p warpers (a sort of the
vocabulary) and a second full sort for the order. The KV cache is kept, as theirs is; where theirs
hands a new cache to every candidate, which transformers 5 made wrong silently, this one takes the
rejected candidate's row off again, which is cheaper.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class SerialModel:
    """One sequence, forwarded a few tokens at a time over its KV cache.

    Args:
        model: language model.
        top_k, top_p: of the candidate sets.
    """

    def __init__(self, model: PreTrainedModel, *, top_k: int, top_p: float) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.num_forwards = 0
        self._warpers = (TopKLogitsWarper(top_k), TopPLogitsWarper(top_p))

    def forward(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits [1, V] and state [1, H] behind these tokens."""
        self.num_forwards += 1
        output = self.model(
            input_ids=torch.tensor([ids], device=self.model.device),
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=True,
        )
        return output.logits[:, -1], output.hidden_states[-1][:, -1]

    def take_back(self) -> None:
        """Forgets the last token."""
        self.cache.crop(-1)

    def candidates(self, logprob: Tensor) -> list[int]:
        """The candidate set of log-probabilities [1, V], in order."""
        for warper in self._warpers:
            logprob = warper(None, logprob)
        ordered, ids = logprob.sort(dim=-1, descending=True)
        return ids[0, : int(ordered.isfinite().sum())].tolist()


@torch.inference_mode()
def authors_cascade(
    model: PreTrainedModel,
    accept_logit: Callable[[Tensor], Tensor],
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    top_k: int = 40,
    top_p: float = 0.95,
) -> tuple[list[int], int]:
    """Token ids (EOS ignored, the last candidate if all are rejected) and forwards used."""
    serial = SerialModel(model, top_k=top_k, top_p=top_p)
    logits, _ = serial.forward(prompt_ids)
    produced: list[int] = []
    while len(produced) < max_new_tokens:
        candidates = serial.candidates(torch.log_softmax(logits.float(), dim=-1))
        for tried, candidate in enumerate(candidates):
            logits, state = serial.forward([candidate])
            is_last = tried == len(candidates) - 1
            if is_last or float(accept_logit(state)[0]) > 0:
                produced.append(candidate)
                break
            serial.take_back()
    return produced, serial.num_forwards
