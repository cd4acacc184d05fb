"""Inside each token: why it was chosen, and what else was."""

from mara_fast.inspection.counterfactual import with_counterfactuals
from mara_fast.inspection.page import html_page

__all__ = ["html_page", "with_counterfactuals"]
