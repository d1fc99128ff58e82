"""The truth: oracles, optimality certificates, input families, comparison rules, and the suite that applies them.

A test of one's own operator is ``@hypothesis.given(strategy("soft_topk", longest=300))`` over a function of one case that calls
``check(my_soft_topk, case)``.
"""

from .cases import Case, draw, strategy
from .properties import examine
from .verify import check, run

__all__ = ["Case", "check", "draw", "examine", "run", "strategy"]
