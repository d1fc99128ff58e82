"""The operators as torch.library sees them: schemas, fakes, autograd, and the choice of backend.

Each direction of each operator is one opaque registered operator, so that torch.compile traces through without a graph break.
Which kernel runs and how it is launched is decided on the host inside the operator, behind that boundary.

Schemas take rows: scores [R, n] with stride(1) == 1, ``k`` and ``eps`` either a number or a tensor [R] in the compute type
(float32; float64 for float64 scores), ``mask`` bool [R, n] or None, ``impl`` "triton" or "torch".
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

from . import config as _config
from . import cpu

IMPLS = ("triton", "torch")

_LIB = torch.library.Library("coordroute", "DEF")
_LIB.define(
    "soft_topk(Tensor scores, Tensor? k, float k_value, Tensor? eps, float eps_value, Tensor? mask, str impl) -> (Tensor, Tensor)"
)
_LIB.define(
    "soft_topk_backward(Tensor grad, Tensor scores, Tensor threshold, Tensor? eps, float eps_value, Tensor? mask, str impl)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "coordinate_descent(Tensor scores, Tensor? k, float k_value, Tensor? mask, int n_iters, float eps, float eps_init,"
    " float eps_decay, int segments, str impl) -> (Tensor, Tensor)"
)
_LIB.define(
    "coordinate_descent_backward(Tensor grad, Tensor scores, Tensor states, Tensor? k, float k_value, Tensor? mask,"
    " int n_iters, float eps, float eps_init, float eps_decay, str impl) -> (Tensor, Tensor)"
)


@functools.cache
def triton_available() -> bool:
    """Whether Triton is installed (there is none for macOS and Windows)."""
    return importlib.util.find_spec("triton") is not None


def default_impl(device: torch.device) -> str:
    """The backend that ``impl="auto"`` means: Triton on a GPU, torch elsewhere."""
    return "triton" if device.type == "cuda" and triton_available() else "torch"


def require_impl(impl: str, device: torch.device) -> None:
    """Raises where a backend that was asked for by name cannot run on ``device``.

    Raises:
        ValueError: the name is unknown, or the tensors are where this backend cannot run.
        RuntimeError: Triton is not installed.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; allowed are 'auto', 'triton' and 'torch'")
    if impl == "torch":
        return
    if not triton_available():
        raise RuntimeError(
            "impl='triton' was asked for, but Triton is not installed here (it exists for Linux: pip install triton);"
            " impl='torch' runs everywhere"
        )
    if device.type != "cuda" and not (device.type == "cpu" and _interpreting()):
        raise ValueError(
            f"impl='triton' was asked for, but the scores are on {device}; Triton kernels need a GPU, or the environment"
            " variable TRITON_INTERPRET=1 to be interpreted on the CPU; impl='torch' runs everywhere"
        )


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _resolve(op: str, direction: str, scores: torch.Tensor, impl: str) -> _config.LaunchConfig:
    rows, n = scores.shape
    if impl == "torch" and scores.device.type == "cpu":
        return _config.resolve(op, direction, scores.dtype, rows, n, scores.device)
    if scores.device.type == "cuda" and impl == "triton":
        return _config.resolve(op, direction, scores.dtype, rows, n, scores.device)
    # nothing is tuned for the torch backend on a GPU, nor for the interpreter
    key = _config.make_key(op, direction, scores.dtype, rows, n)
    return _config.heuristic(key, "cpu" if impl == "torch" else "triton")


def _value(tensor: torch.Tensor | None, number: float) -> torch.Tensor | float:
    return number if tensor is None else tensor


def _compute_dtype(scores: torch.Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _unit_columns(x: torch.Tensor) -> torch.Tensor:
    """x itself where its columns are adjacent, else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _soft_topk(
    scores: torch.Tensor,
    k: torch.Tensor | None,
    k_value: float,
    eps: torch.Tensor | None,
    eps_value: float,
    mask: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    config = _resolve("soft_topk", "forward", scores, impl)
    if impl == "triton":
        from .soft_topk import soft_topk_forward as forward
    else:
        forward = cpu.soft_topk_forward
    mask = None if mask is None else _unit_columns(mask)
    return forward(_unit_columns(scores), _value(k, k_value), _value(eps, eps_value), mask, config)


def _soft_topk_backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    eps: torch.Tensor | None,
    eps_value: float,
    mask: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config = _resolve("soft_topk", "backward", scores, impl)
    if impl == "triton":
        from .soft_topk import soft_topk_backward as backward
    else:
        backward = cpu.soft_topk_backward
    mask = None if mask is None else _unit_columns(mask)
    grad, scores = _unit_columns(grad), _unit_columns(scores)
    dscores, dk, deps = backward(grad, scores, threshold, _value(eps, eps_value), mask, config)
    return dscores, dk, deps if eps is not None else deps.new_empty(0)


def _coordinate_descent(
    scores: torch.Tensor,
    k: torch.Tensor | None,
    k_value: float,
    mask: torch.Tensor | None,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    segments: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    config = _resolve("coordinate_descent", "forward", scores, impl)
    if impl == "triton":
        from .coordinate_descent import coordinate_descent_forward as forward
    else:
        forward = cpu.coordinate_descent_forward
    mask = None if mask is None else _unit_columns(mask)
    return forward(
        _unit_columns(scores),
        _value(k, k_value),
        mask,
        n_iters,
        eps,
        eps_init,
        eps_decay,
        k is not None,
        segments,
        config,
    )


def _coordinate_descent_backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    states: torch.Tensor,
    k: torch.Tensor | None,
    k_value: float,
    mask: torch.Tensor | None,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    config = _resolve("coordinate_descent", "backward", scores, impl)
    if impl == "triton":
        from .coordinate_descent import coordinate_descent_backward as backward
    else:
        backward = cpu.coordinate_descent_backward
    mask = None if mask is None else _unit_columns(mask)
    return backward(
        _unit_columns(grad),
        _unit_columns(scores),
        states,
        _value(k, k_value),
        mask,
        n_iters,
        eps,
        eps_init,
        eps_decay,
        k is not None,
        config,
    )


def _soft_topk_fake(
    scores: torch.Tensor, k: Any, k_value: float, eps: Any, eps_value: float, mask: Any, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n = scores.shape
    return scores.new_empty((rows, n)), scores.new_empty((rows, 2), dtype=_compute_dtype(scores))


def _soft_topk_backward_fake(
    grad: torch.Tensor, scores: torch.Tensor, threshold: Any, eps: Any, eps_value: float, mask: Any, impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, n = scores.shape
    dtype = _compute_dtype(scores)
    deps = scores.new_empty((rows if eps is not None else 0,), dtype=dtype)
    return scores.new_empty((rows, n)), scores.new_empty((rows,), dtype=dtype), deps


def _coordinate_descent_fake(
    scores: torch.Tensor,
    k: Any,
    k_value: float,
    mask: Any,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    segments: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n = scores.shape
    return scores.new_empty((rows, n)), scores.new_empty((rows, segments), dtype=_compute_dtype(scores))


def _coordinate_descent_backward_fake(
    grad: torch.Tensor, scores: torch.Tensor, states: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n = scores.shape
    return scores.new_empty((rows, n)), scores.new_empty((rows,), dtype=_compute_dtype(scores))


def _soft_topk_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, k, _, eps, eps_value, mask, impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(scores, output[1], eps, mask)
    ctx.eps_value, ctx.impl, ctx.k_is_tensor = eps_value, impl, k is not None
    ctx.set_materialize_grads(False)


def _soft_topk_autograd(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    scores, threshold, eps, mask = ctx.saved_tensors
    dscores, dk, deps = torch.ops.coordroute.soft_topk_backward(grad, scores, threshold, eps, ctx.eps_value, mask, ctx.impl)
    return dscores, dk if ctx.k_is_tensor else None, None, deps if eps is not None else None, None, None, None


def _coordinate_descent_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, k, k_value, mask, *schedule, _, impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(scores, output[1], k, mask)
    ctx.k_value, ctx.schedule, ctx.impl = k_value, schedule, impl
    ctx.set_materialize_grads(False)


def _coordinate_descent_autograd(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    scores, states, k, mask = ctx.saved_tensors
    dscores, dk = torch.ops.coordroute.coordinate_descent_backward(
        grad, scores, states, k, ctx.k_value, mask, *ctx.schedule, ctx.impl
    )
    return dscores, dk if k is not None else None, *((None,) * 8)


def _no_second_order(name: str) -> Any:
    def raise_error(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(f"coordroute.{name} has first-order gradients only; its backward cannot be differentiated again")

    return raise_error


def _register(name: str, kernel: Any, fake: Any, backward: Any, setup_context: Any = lambda ctx, inputs, output: None) -> None:
    _LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"coordroute::{name}", fake, lib=_LIB)
    torch.library.register_autograd(f"coordroute::{name}", backward, setup_context=setup_context, lib=_LIB)


_register("soft_topk", _soft_topk, _soft_topk_fake, _soft_topk_autograd, _soft_topk_setup)
_register("soft_topk_backward", _soft_topk_backward, _soft_topk_backward_fake, _no_second_order("soft_topk"))
_register(
    "coordinate_descent",
    _coordinate_descent,
    _coordinate_descent_fake,
    _coordinate_descent_autograd,
    _coordinate_descent_setup,
)
_register(
    "coordinate_descent_backward",
    _coordinate_descent_backward,
    _coordinate_descent_backward_fake,
    _no_second_order("coordinate_descent"),
)


def _split(value: torch.Tensor | float) -> tuple[torch.Tensor | None, float]:
    return (value, 0.0) if isinstance(value, torch.Tensor) else (None, float(value))


def soft_topk_rows(
    scores: torch.Tensor, k: torch.Tensor | float, eps: torch.Tensor | float, mask: torch.Tensor | None, impl: str
) -> torch.Tensor:
    """lam [R, n] of the exact solver; differentiable in scores, k and eps."""
    lam, _ = torch.ops.coordroute.soft_topk(scores, *_split(k), *_split(eps), mask, impl)
    return lam


def coordinate_descent_rows(
    scores: torch.Tensor,
    k: torch.Tensor | float,
    mask: torch.Tensor | None,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    checkpoint_segments: int | None,
    impl: str,
) -> torch.Tensor:
    """lam [R, n] after ``n_iters`` iterations; differentiable in scores and k.

    ``checkpoint_segments=None`` takes the tuned share; inside torch.compile, where shapes may be symbolic, it is one segment
    an iteration. The gradient is bitwise the same for every number of segments.
    """
    if checkpoint_segments is None:
        if torch.compiler.is_compiling():
            checkpoint_segments = n_iters
        else:
            checkpoint_segments = _config.scale_segments(_resolve("coordinate_descent", "forward", scores, impl), n_iters)
    lam, _ = torch.ops.coordroute.coordinate_descent(
        scores, *_split(k), mask, n_iters, eps, eps_init, eps_decay, checkpoint_segments, impl
    )
    return lam
