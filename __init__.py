"""coordroute: a fast, tuned and verified differentiable top-k for routing tokens.

    from coordroute import Router, soft_topk, coordinate_descent, patch_colt5

Names are imported on first use: ``import coordroute`` alone imports neither torch nor Triton and touches no GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Routed", "Router", "__version__", "coordinate_descent", "patch_colt5", "soft_topk"]

if TYPE_CHECKING:
    from .integrations.colt5 import patch_colt5
    from .router import Routed, Router, coordinate_descent, soft_topk

_LAZY = {
    "Routed": ".router",
    "Router": ".router",
    "coordinate_descent": ".router",
    "patch_colt5": ".integrations.colt5",
    "soft_topk": ".router",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module 'coordroute' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
