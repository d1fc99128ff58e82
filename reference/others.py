"""Other packages' operators, called as the suite calls one: what ``coordroute verify --op`` is pointed at to judge them.

    coordroute verify --op coordroute.reference.others:colt5_kernel --kind coordinate_descent
    coordroute verify --op coordroute.reference.others:entmax_budget --kind relaxed_topk

They are also the model of an adapter for an operator of one's own: a function with the documented signature, a few lines long.
The packages (CoLT5-attention, entmax) are imported when one is called; coordroute does not depend on them.
"""

from __future__ import annotations

import torch

DISTRIBUTIONS = {"colt5_kernel": "colt5-attention", "colt5_eager": "colt5-attention", "entmax_budget": "entmax"}
"""Function -> the distribution that it stands for, whose version verify puts into its evidence."""


def colt5_kernel(
    scores: torch.Tensor,
    k: torch.Tensor | float,
    *,
    n_iters: int,
    eps: float,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: torch.Tensor | None = None,
    checkpoint_segments: int = 1,
) -> torch.Tensor:
    """CoLT5-attention's Triton kernel, on a GPU."""
    from colt5_attention.triton_coor_descent import triton_coor_descent

    return triton_coor_descent(
        scores, n_iters=n_iters, k=k, eps=eps, eps_init=eps_init, eps_decay=eps_decay, mask=mask,
        checkpoint_segments=checkpoint_segments,
    )  # fmt: skip


def colt5_eager(
    scores: torch.Tensor,
    k: torch.Tensor | float,
    *,
    n_iters: int,
    eps: float,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """CoLT5-attention's eager code, on any device."""
    from colt5_attention import coor_descent

    return coor_descent(scores, n_iters=n_iters, k=k, eps=eps, eps_init=eps_init, eps_decay=eps_decay, mask=mask)


def entmax_budget(scores: torch.Tensor, k: torch.Tensor | float) -> torch.Tensor:
    """entmax's budget_bisect, argmax s·lam - |lam|²/2: weights in [0, 1] that sum to k. It takes no mask."""
    from entmax import budget_bisect

    return budget_bisect(scores, budget=k[:, None] if isinstance(k, torch.Tensor) else k, dim=-1)
