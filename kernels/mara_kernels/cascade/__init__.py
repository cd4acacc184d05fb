"""Accept logits to a decision."""

from mara_kernels.cascade.api import cascade
from mara_kernels.cascade.philox import acceptance_uniforms, philox_words
from mara_kernels.cascade.reference import (
    ACCEPTANCES,
    FALLBACKS,
    ORDERS,
    STRATEGIES,
    Acceptance,
    CascadeRule,
    Decision,
    Fallback,
    Held,
    Order,
    Strategy,
    rank_of_tried,
)

__all__ = [
    "ACCEPTANCES",
    "FALLBACKS",
    "ORDERS",
    "STRATEGIES",
    "Acceptance",
    "CascadeRule",
    "Decision",
    "Fallback",
    "Held",
    "Order",
    "Strategy",
    "acceptance_uniforms",
    "cascade",
    "philox_words",
    "rank_of_tried",
]
