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
    top_k_warper, top_p_warper = TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)
    cache = DynamicCache(config=model.config)

    def forward(ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        output = model(
            input_ids=torch.tensor([ids]),
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        return output.logits[:, -1], output.hidden_states[-1][:, -1]

    logits, _ = forward(prompt_ids)
    num_forwards, produced = 1, list[int]()
    while len(produced) < max_new_tokens:
        scores = torch.log_softmax(logits.float(), dim=-1)
        scores = top_p_warper(None, top_k_warper(None, scores))
        ordered, ids = scores.sort(dim=-1, descending=True)
        candidates = ids[0, : int(ordered.isfinite().sum())].tolist()
        for tried, candidate in enumerate(candidates):
            logits, state = forward([candidate])
            num_forwards += 1
            is_last = tried == len(candidates) - 1
            if is_last or float(accept_logit(state)[0]) > 0:
                produced.append(candidate)
                break
            cache.crop(-1)
    return produced, num_forwards
