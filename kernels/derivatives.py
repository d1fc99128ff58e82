"""Derivatives beyond the first backward: of any order, in both modes, and under torch.func's transforms.

``soft_topk`` solves sum_i lam_i = k with lam_i = min(1, exp((s_i - tau)/eps)). Let U be the unsaturated entries with mass,
W = sum_U lam, E[x] = sum_U lam x / W and z = (s - tau)/eps = log lam on U. Implicit differentiation of the sum gives, for
tangents s', k', eps',

    lam' = lam z',   z' = (s' - E[s'])/eps + k'/W - (z - E[z]) eps'/eps

and for a gradient g of lam the backward, which is the kernels' work,

    ds = lam (g - E[g])/eps,   dk = E[g],   deps = -sum_U z ds

With gradients v, c, w of ds, dk, deps and u = v - w z, the backward is differentiated by the same backward at another gradient h:

    dg = lam q,   q = (u - E[u])/eps + c/W,   h = (g - E[g]) (q - w/eps)
    (ds, dk, deps) = backward(h),   and deps loses  sum_U lam (u - E[u]) (g - E[g]) / eps²

All of it is made of torch operations on a differentiable lam and of operators that can be differentiated in this way again, so
that every order is exact. An entry at the threshold itself has no second derivative; it counts as saturated, as in the kernels.

``coordinate_descent`` has first-order gradients in reverse mode only, and says so.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C import _are_functorch_transforms_active
except ImportError:
    # a torch that cannot be asked: the functions below serve with and without transforms

    def _are_functorch_transforms_active() -> bool:
        return True


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work, for which torch.library registers no rule."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def soft_topk(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The registered operator, differentiable in every way; lam [R, n] and the threshold [R, 2]."""
    return SoftTopk.apply(*arguments) if transformed() else torch.ops.coordroute.soft_topk(*arguments)


def soft_topk_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The registered backward, itself differentiable in every way; ds [R, n], dk [R], and deps [R] (empty for a number)."""
    return SoftTopkBackward.apply(*arguments) if transformed() else torch.ops.coordroute.soft_topk_backward(*arguments)


def coordinate_descent(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The registered operator, also under transforms; lam [R, n] and the states."""
    return CoordinateDescent.apply(*arguments) if transformed() else torch.ops.coordroute.coordinate_descent(*arguments)


def coordinate_descent_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The registered backward, also under transforms; ds [R, n] and dk [R] (empty for a number)."""
    operator = CoordinateDescentBackward.apply if transformed() else torch.ops.coordroute.coordinate_descent_backward
    return operator(*arguments)


# --- soft_topk: formulas ---------------------------------------------------------------------------------------------


class _Solution(NamedTuple):
    """What the formulas need of a solved row, in the compute type; all differentiable in scores, k and eps."""

    scores: Tensor  # [R, n]
    lam: Tensor  # [R, n], 0 outside of U
    inside: Tensor  # [R, n] bool: U; all of a NaN row, so that it stays one
    mass: Tensor  # [R, 1], W; 1 where U is empty
    eps: Tensor | float  # [R, 1], or a number

    def mean(self, x: Tensor) -> Tensor:
        """E[x], [R, 1]."""
        return (self.lam * x).sum(-1, keepdim=True) / self.mass

    def centred(self, x: Tensor) -> Tensor:
        return torch.where(self.inside, x - self.mean(x), 0.0)

    def only_inside(self, x: Tensor) -> Tensor:
        """x in the compute type; 0 outside of U, where it may be anything."""
        return torch.where(self.inside, x.to(self.lam.dtype), 0.0)

    def log_lam(self) -> Tensor:
        """z, [R, n]."""
        return torch.where(self.inside, self.lam, 1.0).log()


def _solution(
    scores: Tensor,
    threshold: Tensor,
    k: Tensor | None,
    k_value: float,
    eps: Tensor | None,
    eps_value: float,
    mask: Tensor | None,
    impl: str,
) -> _Solution:
    scores = scores.to(threshold.dtype)
    lam = soft_topk(scores, k, k_value, eps, eps_value, mask, impl)[0]
    hi, lo = threshold.detach()[:, :1], threshold.detach()[:, 1:]
    inside = (((scores.detach() - hi) - lo < 0) & (lam.detach() > 0)) | hi.isnan()
    lam = torch.where(inside, lam, 0.0)
    mass = lam.sum(-1, keepdim=True)
    mass = torch.where(mass == 0, 1.0, mass)
    return _Solution(scores, lam, inside, mass, eps_value if eps is None else eps[:, None])


def _soft_topk_double_backward(
    v: Tensor | None,
    c: Tensor | None,
    w: Tensor | None,
    grad: Tensor,
    scores: Tensor,
    threshold: Tensor,
    k: Tensor | None,
    k_value: float,
    eps: Tensor | None,
    eps_value: float,
    mask: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of grad, scores, k and eps (empty for a number), given those of ds [R, n], dk [R] and deps [R] (None: zero)."""
    row = _solution(scores, threshold, k, k_value, eps, eps_value, mask, impl)
    u = torch.zeros_like(row.lam) if v is None else row.only_inside(v)
    of_deps = None if eps is None or w is None else w[:, None]
    if of_deps is not None:
        u = u - of_deps * row.log_lam()
    u, g = row.centred(u), row.centred(row.only_inside(grad))
    q = u / row.eps
    if c is not None:
        q = q + c[:, None] / row.mass
    h = g * (q if of_deps is None else q - of_deps / row.eps)
    dscores, dk, deps = soft_topk_backward(
        torch.where(row.inside, h, 0.0), row.scores, threshold, k, k_value, eps, eps_value, mask, impl
    )
    if eps is not None:
        deps = deps - (row.lam * u * g).sum(-1) / eps.square()
    return (row.lam * q).to(grad.dtype), dscores.to(scores.dtype), dk, deps


def _log_tangent(row: _Solution, scores: Tensor | None, k: Tensor | None, eps: Tensor | None) -> Tensor:
    """z' on U, for tangents of scores, k and eps (None: zero)."""
    z = torch.zeros_like(row.lam)
    if scores is not None:
        z = z + row.centred(row.only_inside(scores)) / row.eps
    if k is not None:
        z = z + torch.where(row.inside, k[:, None] / row.mass, 0.0)
    if eps is not None:
        z = z - row.centred(row.log_lam()) * (eps[:, None] / row.eps)
    return z


def _soft_topk_backward_tangent(
    row: _Solution, grad: Tensor, grad_tangent: Tensor | None, scores: Tensor | None, k: Tensor | None, eps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangents of ds, dk and deps."""
    z = _log_tangent(row, scores, k, eps)
    g = row.centred(row.only_inside(grad))
    moved = torch.zeros_like(g) if grad_tangent is None else row.only_inside(grad_tangent)
    ds = row.lam * g / row.eps
    mean = row.mean(moved + z * g)
    ds_tangent = row.lam * (z * g + torch.where(row.inside, moved - mean, 0.0)) / row.eps
    if eps is not None:
        ds_tangent = ds_tangent - ds * (eps[:, None] / row.eps)
    deps_tangent = -(z * ds + row.log_lam() * ds_tangent).sum(-1)
    return ds_tangent, mean.squeeze(-1), deps_tangent


# --- autograd --------------------------------------------------------------------------------------------------------


def _by_rows(function: Any, batch: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """``function`` over a batch: rows are independent, so that [batch, R, …] is served as [batch · R, …]."""
    rows = arguments[0].movedim(in_dims[0], 0).shape[1] if in_dims[0] is not None else arguments[0].shape[0]
    flat = []
    for argument, dim in zip(arguments, in_dims, strict=True):
        if isinstance(argument, Tensor):
            whole = argument.movedim(dim, 0) if dim is not None else argument.expand(batch, *argument.shape)
            argument = whole.reshape(batch * rows, *whole.shape[2:])
        flat.append(argument)
    outputs, dims = [], []
    for output in function(*flat):
        of_rows = output.shape[0] == batch * rows  # the empty one, for a k or an eps that is a number, is not
        outputs.append(output.reshape(batch, rows, *output.shape[1:]) if of_rows else output)
        dims.append(0 if of_rows else None)
    return tuple(outputs), tuple(dims)


def _primals(ctx: Any) -> list[Any]:
    """What was saved, without the tangents of this level of forward mode.

    torch runs a ``jvp`` with forward mode off at every level, so that one inside another would silently lose derivatives. With
    it on, and without this level's own tangents, the outer levels see the computation.
    """
    return [None if saved is None else forward_ad.unpack_dual(saved).primal for saved in ctx.saved_tensors]


class SoftTopk(torch.autograd.Function):
    """``soft_topk``: what torch.library registers of it, and a form that torch.func and forward-mode AD can transform."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.coordroute.soft_topk(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        scores, k, k_value, eps, eps_value, mask, impl = inputs
        ctx.mark_non_differentiable(output[1])
        saved = (scores, output[1], k, eps, mask)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.others = (k_value, eps_value, impl)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 7
        scores, threshold, k, eps, mask = ctx.saved_tensors
        k_value, eps_value, impl = ctx.others
        dscores, dk, deps = soft_topk_backward(grad, scores, threshold, k, k_value, eps, eps_value, mask, impl)
        return dscores, None if k is None else dk, None, None if eps is None else deps, None, None, None

    @staticmethod
    def jvp(ctx: Any, scores_tangent: Any, k_tangent: Any, _: Any, eps_tangent: Any, *rest: Any) -> tuple[Tensor, None]:
        k_value, eps_value, impl = ctx.others
        with forward_ad._set_fwd_grad_enabled(True):
            scores, threshold, k, eps, mask = _primals(ctx)
            row = _solution(scores, threshold, k, k_value, eps, eps_value, mask, impl)
            tangent = row.lam * _log_tangent(row, scores_tangent, k_tangent, eps_tangent)
            return tangent.to(scores.dtype), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _by_rows(soft_topk, info.batch_size, in_dims, arguments)


class SoftTopkBackward(torch.autograd.Function):
    """Its backward, likewise."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.coordroute.soft_topk_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        grad, scores, threshold, k, k_value, eps, eps_value, mask, impl = inputs
        saved = (grad, scores, threshold, k, eps, mask)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.others = (k_value, eps_value, impl)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, c: Tensor | None, w: Tensor | None) -> tuple[Any, ...]:
        if v is None and c is None and w is None:
            return (None,) * 9
        grad, scores, threshold, k, eps, mask = ctx.saved_tensors
        k_value, eps_value, impl = ctx.others
        dgrad, dscores, dk, deps = _soft_topk_double_backward(
            v, c, w, grad, scores, threshold, k, k_value, eps, eps_value, mask, impl
        )
        return dgrad, dscores, None, None if k is None else dk, None, None if eps is None else deps, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, grad_tangent: Any, scores_tangent: Any, _: Any, k_tangent: Any, __: Any, eps_tangent: Any, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        k_value, eps_value, impl = ctx.others
        with forward_ad._set_fwd_grad_enabled(True):
            grad, scores, threshold, k, eps, mask = _primals(ctx)
            row = _solution(scores, threshold, k, k_value, eps, eps_value, mask, impl)
            ds, dk, deps = _soft_topk_backward_tangent(row, grad, grad_tangent, scores_tangent, k_tangent, eps_tangent)
            return ds.to(scores.dtype), dk, dk.new_empty(0) if eps is None else deps

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _by_rows(soft_topk_backward, info.batch_size, in_dims, arguments)


def _first_order_only() -> NoReturn:
    raise RuntimeError(
        "coordroute.coordinate_descent has first-order gradients only, in reverse mode; its backward cannot be differentiated"
        " again, nor is there forward-mode AD. coordroute.soft_topk has derivatives of every order in both modes"
    )


class CoordinateDescent(torch.autograd.Function):
    """``coordinate_descent``, likewise."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.coordroute.coordinate_descent(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        scores, k, k_value, mask, *schedule, _, clamp_k, impl = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(scores, output[1], k, mask)
        ctx.k_value, ctx.schedule = k_value, (*schedule, clamp_k, impl)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 11
        scores, states, k, mask = ctx.saved_tensors
        dscores, dk = coordinate_descent_backward(grad, scores, states, k, ctx.k_value, mask, *ctx.schedule)
        return dscores, None if k is None else dk, *((None,) * 9)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _first_order_only()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _by_rows(coordinate_descent, info.batch_size, in_dims, arguments)


class CoordinateDescentBackward(torch.autograd.Function):
    """Its backward, which cannot be differentiated."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.coordroute.coordinate_descent_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _first_order_only()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _first_order_only()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _by_rows(coordinate_descent_backward, info.batch_size, in_dims, arguments)


FUNCTIONS = (SoftTopk, SoftTopkBackward, CoordinateDescent, CoordinateDescentBackward)
"""Each is registered with torch.library under the same name in lower case (ops.py)."""
