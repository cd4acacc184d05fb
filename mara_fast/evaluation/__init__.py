"""Preference rates of systems, by the paper's rule."""

from mara_fast.evaluation.evaluate import Evaluation, evaluate
from mara_fast.evaluation.preference import outcomes, preference_rate
from mara_fast.evaluation.spec import EvalSpec

__all__ = ["EvalSpec", "Evaluation", "evaluate", "outcomes", "preference_rate"]
