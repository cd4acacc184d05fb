"""The model card written beside an agent's weights."""

from typing import TYPE_CHECKING

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from mara_fast.agent import AgentConfig

_CARD = """\
---
library_name: mara_fast
tags:
- mara
- alignment
- decoding
{base_model_entry}---

# MARA agent

{description}

A token-level accept/reject model ([MARA](https://arxiv.org/abs/2505.19743)): a perceptron
{hidden_size} -> {inner_size} -> {quarter_size} -> 2 on the last hidden state of a frozen language
model. The language model's candidates are tried in order of probability; the first accepted one is
the next token.

| | |
|---|---|
| base model | {base_model} |
| hidden size | {hidden_size} |
| parameters | {num_parameters:,} |
| decoding defaults | {decoding} |

```python
import mara_fast

agent = mara_fast.MaraAgent.from_pretrained("path/or/hub-id")
mara_fast.generate("How do I stay safe online?", model="{example_model}", agent=agent)
```
"""


def model_card(config: "AgentConfig") -> str:
    """The card as Markdown with YAML front matter."""
    hidden, inner, quarter = config.hidden_size, config.inner_size, config.inner_size // 4
    num_parameters = 2 * hidden + (hidden + 1) * inner + (inner + 1) * quarter + (quarter + 1) * 2
    decoding = ", ".join(f"`{name}={value!r}`" for name, value in config.decoding.items())
    return _CARD.format(
        base_model_entry=_base_model_entry(config.base_model),
        description=config.description or "An agent that aligns a frozen language model.",
        base_model=config.base_model or "not recorded",
        example_model=config.base_model or "path/or/hub-id-of-its-base-model",
        hidden_size=hidden,
        inner_size=inner,
        quarter_size=quarter,
        num_parameters=num_parameters,
        decoding=decoding or "the package's defaults",
    )


def is_hub_id(name: str) -> bool:
    """Has the form of a name on the Hugging Face Hub, unlike most paths."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _base_model_entry(base_model: str | None) -> str:
    """The line of the front matter; the Hub refuses a card with a path in it."""
    return f"base_model: {base_model}\n" if base_model and is_hub_id(base_model) else ""
