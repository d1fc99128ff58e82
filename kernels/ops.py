"""The operators as torch.library sees them: schemas, fakes, autograd, and the choice of backend.

Each direction of each operator is one opaque registered operator, so that torch.compile traces through without a graph break.
Which kernel runs and how it is launched is decided on the host inside the operator, behind that boundary.

A plain eager call has no use for that boundary, which costs several times what a launch does: it calls the same kernels through
a hand-written autograd function, or directly where nothing needs a gradient (:func:`_plain`).

Schemas take rows: scores [R, n] with stride(1) == 1, ``k`` and ``eps`` either a number or a tensor [R] in the compute type
(float32; float64 for float64 scores), ``mask`` bool [R, n] or None, ``impl`` "triton" or "torch". A k that is a number is a
Scalar, which may be symbolic, for k often depends on the length. ``clamp_k``: whether a k that is a tensor is clamped to
[0, number of valid entries]; a number is taken as it is. The backward of ``soft_topk`` is handed k for what differentiates it
again (derivatives.py).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from . import config as _config
from . import cpu, derivatives

IMPLS = ("triton", "torch")

_LIB = torch.library.Library("coordroute", "DEF")
_LIB.define(
    "soft_topk(Tensor scores, Tensor? k, Scalar k_value, Tensor? eps, float eps_value, Tensor? mask, str impl) -> (Tensor, Tensor)"
)
_LIB.define(
    "soft_topk_backward(Tensor grad, Tensor scores, Tensor threshold, Tensor? k, Scalar k_value, Tensor? eps, float eps_value,"
    " Tensor? mask, str impl) -> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "coordinate_descent(Tensor scores, Tensor? k, Scalar k_value, Tensor? mask, int n_iters, float eps, float eps_init,"
    " float eps_decay, int segments, bool clamp_k, str impl) -> (Tensor, Tensor)"
)
_LIB.define(
    "coordinate_descent_backward(Tensor grad, Tensor scores, Tensor states, Tensor? k, Scalar k_value, Tensor? mask,"
    " int n_iters, float eps, float eps_init, float eps_decay, bool clamp_k, str impl) -> (Tensor, Tensor)"
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
    if scores.is_cuda if impl == "triton" else scores.is_cpu:
        return _config.resolve(op, direction, scores.dtype, rows, n, scores.device)
    # nothing is tuned for the torch backend on a GPU, nor for the interpreter
    key = _config.make_key(op, direction, scores.dtype, rows, n)
    return _config.heuristic(key, "cpu" if impl == "torch" else "triton")


@functools.cache
def _kernels(op: str, impl: str) -> ModuleType:
    """The module that holds the kernels of ``op``; Triton is imported no earlier than it is needed."""
    return cpu if impl == "torch" else importlib.import_module(f".{op}", __package__)


def _value(tensor: torch.Tensor | None, number: float) -> torch.Tensor | float:
    return number if tensor is None else tensor


def _compute_dtype(scores: torch.Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _unit_columns(x: torch.Tensor) -> torch.Tensor:
    """x itself where its columns are adjacent, else a copy."""
    return x if x.is_contiguous() or x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


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
    mask = None if mask is None else _unit_columns(mask)
    return _kernels("soft_topk", impl).soft_topk_forward(
        _unit_columns(scores), _value(k, k_value), _value(eps, eps_value), mask, config
    )


def _soft_topk_backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    k: torch.Tensor | None,
    k_value: float,
    eps: torch.Tensor | None,
    eps_value: float,
    mask: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    config = _resolve("soft_topk", "backward", scores, impl)
    mask = None if mask is None else _unit_columns(mask)
    grad, scores = _unit_columns(grad), _unit_columns(scores)
    return _kernels("soft_topk", impl).soft_topk_backward(grad, scores, threshold, _value(eps, eps_value), mask, config)


def _soft_topk_backward_registered(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A registered operator returns tensors: an empty one where eps is a number."""
    dscores, dk, deps = _soft_topk_backward(*arguments)
    return dscores, dk, dk.new_empty(0) if deps is None or arguments[5] is None else deps


def _coordinate_descent(
    scores: torch.Tensor,
    k: torch.Tensor | None,
    k_value: float,
    mask: torch.Tensor | None,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    segments: int | None,
    clamp_k: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    config = _resolve("coordinate_descent", "forward", scores, impl)
    if segments is None:
        segments = _config.scale_segments(config, n_iters)
    mask = None if mask is None else _unit_columns(mask)
    return _kernels("coordinate_descent", impl).coordinate_descent_forward(
        _unit_columns(scores),
        _value(k, k_value),
        mask,
        n_iters,
        eps,
        eps_init,
        eps_decay,
        clamp_k and k is not None,
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
    clamp_k: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    config = _resolve("coordinate_descent", "backward", scores, impl)
    mask = None if mask is None else _unit_columns(mask)
    return _kernels("coordinate_descent", impl).coordinate_descent_backward(
        _unit_columns(grad),
        _unit_columns(scores),
        states,
        _value(k, k_value),
        mask,
        n_iters,
        eps,
        eps_init,
        eps_decay,
        clamp_k and k is not None,
        config,
    )


def _coordinate_descent_backward_registered(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A registered operator returns tensors: an empty one where k is a number."""
    dscores, dk = _coordinate_descent_backward(*arguments)
    if dk is None or arguments[3] is None:
        dk = dscores.new_empty(0, dtype=_compute_dtype(arguments[1]))
    return dscores, dk


def _soft_topk_fake(
    scores: torch.Tensor, k: Any, k_value: float, eps: Any, eps_value: float, mask: Any, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n = scores.shape
    return scores.new_empty((rows, n)), scores.new_empty((rows, 2), dtype=_compute_dtype(scores))


def _soft_topk_backward_fake(
    grad: torch.Tensor,
    scores: torch.Tensor,
    threshold: Any,
    k: Any,
    k_value: float,
    eps: Any,
    eps_value: float,
    mask: Any,
    impl: str,
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
    clamp_k: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n = scores.shape
    return scores.new_empty((rows, n)), scores.new_empty((rows, segments), dtype=_compute_dtype(scores))


def _coordinate_descent_backward_fake(
    grad: torch.Tensor, scores: torch.Tensor, states: Any, k: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n = scores.shape
    return scores.new_empty((rows, n)), scores.new_empty((rows if k is not None else 0,), dtype=_compute_dtype(scores))


def _register(name: str, kernel: Any, fake: Any, function: type[torch.autograd.Function]) -> None:
    _LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"coordroute::{name}", fake, lib=_LIB)
    torch.library.register_autograd(f"coordroute::{name}", function.backward, setup_context=function.setup_context, lib=_LIB)


_register("soft_topk", _soft_topk, _soft_topk_fake, derivatives.SoftTopk)
_register("soft_topk_backward", _soft_topk_backward_registered, _soft_topk_backward_fake, derivatives.SoftTopkBackward)
_register("coordinate_descent", _coordinate_descent, _coordinate_descent_fake, derivatives.CoordinateDescent)
_register(
    "coordinate_descent_backward",
    _coordinate_descent_backward_registered,
    _coordinate_descent_backward_fake,
    derivatives.CoordinateDescentBackward,
)


# --- plain eager calls -----------------------------------------------------------------------------------------------


def _plain_keys() -> frozenset[int]:
    """The dispatch keys of a dense tensor on a CPU or a GPU that nothing wraps; an inference tensor lacks those of autograd."""
    found = []
    for backend in ("CPU", "CUDA"):
        dense, autograd, autocast = (getattr(torch._C.DispatchKey, name + backend) for name in ("", "Autograd", "Autocast"))
        inference = torch._C.DispatchKeySet(dense).add(autocast)
        found += [inference, inference.add(torch._C.DispatchKey.ADInplaceOrView).add(autograd)]
    return frozenset(keys.raw_repr() for keys in found)


try:
    from torch._C import (
        _are_functorch_transforms_active,
        _dispatch_keys,
        _is_tracing,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )

    _PLAIN_KEYS = _plain_keys()
    forward_ad._current_level  # noqa: B018
except (ImportError, AttributeError):
    # a torch that cannot be asked: every tensor has a key, so that all go through the registered operators
    _PLAIN_KEYS = frozenset()


def _plain(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing would see a call but autograd, so that kernels may be called without the dispatcher.

    Nothing traces or transforms: no compiler, jit.trace, functorch transform, mode or dual level of forward AD; and the tensors
    are no subclass and no wrapper, and hold their values as they stand (no lazy negation, no other layout).
    """
    if (
        torch.compiler.is_compiling()
        or not _PLAIN_KEYS
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _is_tracing()
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (torch.Tensor, torch.nn.Parameter) or _dispatch_keys(tensor).raw_repr() not in _PLAIN_KEYS
        ):
            return False
    return True


class _SoftTopk(torch.autograd.Function):
    """What the registered operator and its backward do, for a plain eager call.

    What has no gradient comes in one argument, for autograd looks at each: (k_value, eps_value, mask, impl).
    """

    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, k: torch.Tensor | None, eps: torch.Tensor | None, settings: tuple[Any, ...]
    ) -> torch.Tensor:
        k_value, eps_value, mask, impl = settings
        lam, threshold = _soft_topk(scores, k, k_value, eps, eps_value, mask, impl)
        ctx.save_for_backward(scores, threshold, k, eps, mask)
        ctx.others = k_value, eps_value, impl, id(scores)
        ctx.set_materialize_grads(False)
        return lam

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None, None
        scores, threshold, k, eps, mask = ctx.saved_tensors
        k_value, eps_value, impl, seen = ctx.others
        backward: Any = _soft_topk_backward if _first_order(grad, scores, seen) else derivatives.soft_topk_backward
        dscores, dk, deps = backward(grad, scores, threshold, k, k_value, eps, eps_value, mask, impl)
        needs_scores, needs_k, needs_eps, _ = ctx.needs_input_grad
        return dscores if needs_scores else None, dk if needs_k else None, deps if needs_eps else None, None


class _CoordinateDescent(torch.autograd.Function):
    """What the registered operator and its backward do, for a plain eager call.

    What has no gradient comes in one argument, for autograd looks at each: (k_value, mask, n_iters, eps, eps_init, eps_decay,
    segments, clamp_k, impl).
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, k: torch.Tensor | None, settings: tuple[Any, ...]) -> torch.Tensor:
        k_value, mask, n_iters, eps, eps_init, eps_decay, _, clamp_k, impl = settings
        lam, states = _coordinate_descent(scores, k, *settings)
        ctx.save_for_backward(scores, states, k, mask)
        ctx.others = k_value, (n_iters, eps, eps_init, eps_decay, clamp_k, impl), id(scores)
        ctx.set_materialize_grads(False)
        return lam

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None
        scores, states, k, mask = ctx.saved_tensors
        k_value, schedule, seen = ctx.others
        first_order = _first_order(grad, scores, seen)
        backward: Any = _coordinate_descent_backward if first_order else derivatives.coordinate_descent_backward
        dscores, dk = backward(grad, scores, states, k, k_value, mask, *schedule)
        needs_scores, needs_k, _ = ctx.needs_input_grad
        return dscores if needs_scores else None, dk if needs_k else None, None


# Function.apply looks for functorch's transforms and wrappers first: where a call is plain there are none
_apply_soft_topk: Any = super(torch.autograd.Function, _SoftTopk).apply
_apply_coordinate_descent: Any = super(torch.autograd.Function, _CoordinateDescent).apply


def _first_order(grad: torch.Tensor, scores: torch.Tensor, seen: int) -> bool:
    """Whether a backward may call the kernel itself; the registered operator is what can be differentiated again, or refuses.

    ``seen`` is the id of the scores that the forward found to be plain; hooks of saved tensors may have put others in their place.
    """
    return not torch.is_grad_enabled() and (_plain(grad) if id(scores) == seen else _plain(grad, scores))


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


# --- the operators on rows -------------------------------------------------------------------------------------------


def _split(value: torch.Tensor | float) -> tuple[torch.Tensor | None, float]:
    if isinstance(value, torch.Tensor):
        return value, 0.0
    return None, value if isinstance(value, (float, torch.SymFloat)) else float(value)


def soft_topk_rows(
    scores: torch.Tensor, k: torch.Tensor | float, eps: torch.Tensor | float, mask: torch.Tensor | None, impl: str
) -> torch.Tensor:
    """lam [R, n] of the exact solver; differentiable in scores, k and eps."""
    k_rows, k_value = _split(k)
    eps_rows, eps_value = _split(eps)
    if not _plain(scores, k_rows, eps_rows, mask):
        return derivatives.soft_topk(scores, k_rows, k_value, eps_rows, eps_value, mask, impl)[0]
    if _needs_grad(scores, k_rows, eps_rows):
        return _apply_soft_topk(scores, k_rows, eps_rows, (k_value, eps_value, mask, impl))
    return _soft_topk(scores, k_rows, k_value, eps_rows, eps_value, mask, impl)[0]


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
    clamp_k: bool = True,
) -> torch.Tensor:
    """lam [R, n] after ``n_iters`` iterations; differentiable in scores and k.

    ``checkpoint_segments=None`` takes the tuned share; inside torch.compile, where shapes may be symbolic, it is one segment
    an iteration. The gradient is bitwise the same for every number of segments. ``clamp_k=False`` takes a k that is a tensor as
    it is, as a number is, and as the published code does.
    """
    k_rows, k_value = _split(k)
    if not _plain(scores, k_rows, mask):
        if checkpoint_segments is None:
            if torch.compiler.is_compiling():
                checkpoint_segments = n_iters
            else:
                checkpoint_segments = _config.scale_segments(_resolve("coordinate_descent", "forward", scores, impl), n_iters)
        return derivatives.coordinate_descent(
            scores, k_rows, k_value, mask, n_iters, eps, eps_init, eps_decay, checkpoint_segments, clamp_k, impl
        )[0]
    # here None goes on to where the configuration is known
    settings = (k_value, mask, n_iters, eps, eps_init, eps_decay, checkpoint_segments, clamp_k, impl)
    if _needs_grad(scores, k_rows):
        return _apply_coordinate_descent(scores, k_rows, settings)
    return _coordinate_descent(scores, k_rows, *settings)[0]
