"""The thin routing module: the front door of both operators, and ``Router``, which puts them into a model.

For one row of scores s, a budget k and a temperature eps, both operators weigh every entry with

    lam_i = min(1, exp((s_i + a) / eps)),   the scalar a such that sum(lam) = k

``soft_topk`` solves for a exactly; ``coordinate_descent`` takes the published number of steps towards it. Everything that
a caller can get wrong is checked here, on the host, without waiting for the device; the kernels see rows.

Sources: Wright, "Coordinate Descent Algorithms" (arXiv:1502.04759); Qian et al., "Multi-Vector Retrieval as Sparse Alignment"
(arXiv:2211.01267); Ainslie et al., "CoLT5" (arXiv:2303.09752); the published implementation CoLT5-attention 0.9.0.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .autotune import store  # noqa: F401 (with it the launches ask the configuration files)
from .kernels import derivatives, ops

# what serves torch.func goes into a compiled graph as it is: Dynamo would look inside, and knows no forward-mode rule
torch.compiler.allow_in_graph(list(derivatives.FUNCTIONS))

__all__ = ["Routed", "Router", "coordinate_descent", "soft_topk"]

Number = int | float
Impl = Literal["auto", "triton", "torch"]


def soft_topk(
    scores: Tensor,
    k: Number | Tensor,
    *,
    eps: Number | Tensor = 0.1,
    dim: int = -1,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The exact entropy-regularised top-k: weights in [0, 1] along ``dim`` that sum to ``k``.

    Solves ``argmax s.lam + eps * H(lam)  s.t.  0 <= lam <= 1, sum(lam) = k`` for each row on its own, with
    ``H(lam) = -sum lam (log lam - 1)``, and differentiates the solution implicitly with respect to scores, k and eps: to any order,
    in reverse and forward mode, also under ``torch.func``.

    Args:
        scores: any shape with at least one dimension, float16, bfloat16, float32 or float64. Computed in float32 (float64
            for float64), also under autocast. A score of +inf gets weight 1, one of -inf counts as masked; finfo.min, which models
            mask with too, is a valid entry that gets weight where k is more than the others can take.
        k: how many entries to take from a row, fractions allowed: a number >= 0, or a tensor broadcastable to the shape of
            ``scores`` without ``dim``. Where k is at least the number of valid entries, each of them gets weight 1. A tensor's
            values are clamped to [0, valid entries] on the device.
        eps: temperature, in units of the scores: a number > 0, or a tensor like ``k``. A tensor's value that is not
            finite or not > 0 gives a NaN row.
        dim: the dimension that holds the entries of a row.
        mask: bool, broadcastable to the shape of ``scores``, True = valid. Masked entries get weight 0 and gradient 0.
        impl: "triton", "torch", or "auto": Triton on a GPU, torch elsewhere. What is asked for by name never falls back.

    Returns:
        Weights of the shape, dtype and device of ``scores``. A row with NaN in a valid entry, or with a NaN k, is all NaN.

    Raises:
        TypeError: scores, k, eps or mask of a type or dtype that is not listed above.
        ValueError: a number out of range, shapes that do not broadcast, devices that differ, an unknown ``impl``.
        IndexError: ``scores`` has no dimension ``dim``.
        RuntimeError: ``impl="triton"`` where Triton is not installed.
    """
    dim = _check_scores(scores, dim)
    k_rows = _per_row("k", k, scores, dim, zero_allowed=True)
    eps_rows = _per_row("eps", eps, scores, dim, zero_allowed=False)
    rows, mask_rows = _to_rows(scores, mask, dim)
    lam = ops.soft_topk_rows(rows, k_rows, eps_rows, mask_rows, _backend(impl, scores.device))
    return _from_rows(lam, scores.shape, dim)


def coordinate_descent(
    scores: Tensor,
    k: Number | Tensor,
    *,
    n_iters: int,
    eps: Number = 0.1,
    eps_init: Number | None = None,
    eps_decay: Number = 1.0,
    dim: int = -1,
    mask: Tensor | None = None,
    checkpoint_segments: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``n_iters`` steps of coordinate descent towards ``soft_topk``, exactly as published in CoLT5-attention 0.9.0.

    With ``eps_0 = max(eps_init or eps, eps)``, ``eps_{t+1} = max(eps_t * eps_decay, eps)``, ``a_0 = 0``, ``b_0 = -s``:

        a_{t+1} = eps_t (log k - logsumexp((s + b_t) / eps_t));   b_{t+1} = -relu(s + a_{t+1})
        lam     = exp((s + a_T + b_T) / eps_T)

    The weights of a row sum to less than k until the steps have converged; ``soft_topk`` is the limit. There are first-order
    gradients only, in reverse mode: RuntimeError says so where a second order or forward-mode AD is asked for.

    Args:
        scores: as for ``soft_topk``.
        k: as for ``soft_topk``; a number above the number of valid entries is taken as it is, as published.
        n_iters: T, the number of steps, >= 1.
        eps: final temperature, in units of the scores, a number > 0.
        eps_init: temperature of the first step, a number > 0; None means ``eps``. The larger of the two is taken.
        eps_decay: factor from step to step, a number > 0.
        dim: the dimension that holds the entries of a row.
        mask: bool, broadcastable to the shape of ``scores``, True = valid.
        checkpoint_segments: how many scalars a row are kept for the backward, 1..n_iters; the rest is recomputed. The
            gradient is the same for each. None takes what was tuned.
        impl: as for ``soft_topk``.

    Returns:
        Weights of the shape, dtype and device of ``scores``, differentiable with respect to scores and k.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as for ``soft_topk``; also ``n_iters`` below 1 and
            ``checkpoint_segments`` outside 1..n_iters.
    """
    dim = _check_scores(scores, dim)
    n_iters = _check_int("n_iters", n_iters, 1)
    if checkpoint_segments is not None:
        checkpoint_segments = _check_int("checkpoint_segments", checkpoint_segments, 1, n_iters, "n_iters")
    eps = _computable("eps", _check_number("eps", eps, zero_allowed=False), scores)
    if eps_init is not None:
        eps_init = _computable("eps_init", _check_number("eps_init", eps_init, zero_allowed=False), scores)
    eps_init = eps if eps_init is None else max(eps_init, eps)
    eps_decay = _check_number("eps_decay", eps_decay, zero_allowed=False)
    k_rows = _per_row("k", k, scores, dim, zero_allowed=True)
    rows, mask_rows = _to_rows(scores, mask, dim)
    lam = ops.coordinate_descent_rows(
        rows,
        k_rows,
        mask_rows,
        n_iters,
        eps,
        eps_init,
        eps_decay,
        checkpoint_segments,
        _backend(impl, scores.device),
    )
    return _from_rows(lam, scores.shape, dim)


@torch.compiler.assume_constant_result
def _backend(impl: str, device: torch.device) -> str:
    if impl == "auto":
        return ops.default_impl(device)
    ops.require_impl(impl, device)
    return impl


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_scores(scores: Any, dim: Any) -> int:
    """``dim`` counted from the front."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores is a {type(scores).__name__}; allowed is a torch.Tensor")
    if scores.dtype not in _DTYPES:
        raise TypeError(
            f"scores has dtype {scores.dtype} and shape {_shape(scores)}; allowed are float16, bfloat16, float32 and float64"
        )
    ndim = scores.dim()
    if ndim == 0:
        raise ValueError("scores has shape (); allowed are tensors with at least one dimension")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim is {dim!r}; allowed is an integer")
    if not -ndim <= dim < ndim:
        raise IndexError(f"dim is {dim}, but scores has shape {_shape(scores)}; allowed is {-ndim}..{ndim - 1}")
    return dim % ndim


_SYMBOLIC = (torch.SymInt, torch.SymFloat)
"""What numbers that depend on a length are in torch.export."""


def _check_number(name: str, value: Any, *, zero_allowed: bool, or_tensor: str = "") -> float:
    number = value
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real, *_SYMBOLIC)):
            what = f"a tensor of shape {_shape(value)}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"{name} is {what}; allowed is {_finite(zero_allowed)}{or_tensor}")
        number = torch.sym_float(value) if isinstance(value, _SYMBOLIC) else float(value)
    # no math.isfinite: k may be symbolic while torch.compile traces
    if not 0 <= number < math.inf or (number == 0 and not zero_allowed):
        raise ValueError(f"{name} is {value}; allowed is {_finite(zero_allowed)}{or_tensor}")
    return number


def _finite(zero_allowed: bool) -> str:
    return f"a finite number {'>= 0' if zero_allowed else '> 0'}"


def _computable(name: str, number: float, scores: Tensor) -> float:
    """``number``, checked to be one in the type that the kernels compute in: 1e-50 would be 0 there, and 1e300 infinite."""
    if 1e-37 < number < 1e38:
        return number  # in every one of them: the common case, and asking torch for the limits takes time
    info = torch.finfo(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    if number > info.max or 0 < number < info.tiny:
        raise ValueError(
            f"{name} is {number}; {str(scores.dtype).removeprefix('torch.')} scores are computed in {info.dtype}, so allowed is"
            f" {info.tiny:.3g}..{info.max:.3g}"
        )
    return number


def _check_int(name: str, value: Any, low: int, high: int | None = None, high_name: str = "") -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; allowed is {_integer(low, high, high_name)}")
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} is {value!r}; allowed is {_integer(low, high, high_name)}") from None
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {value}; allowed is {_integer(low, high, high_name)}")
    return value


def _integer(low: int, high: int | None, high_name: str) -> str:
    return f"an integer >= {low}" if high is None else f"an integer in {low}..{high} ({high_name})"


def _per_row(name: str, value: Any, scores: Tensor, dim: int, *, zero_allowed: bool) -> float | Tensor:
    """A number as it is; a tensor as one value a row [R], in the dtype that the kernels compute in."""
    if not isinstance(value, Tensor):
        number = _check_number(name, value, zero_allowed=zero_allowed, or_tensor=", or a tensor with one value a row")
        return _computable(name, number, scores)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} {_kind(value)}, scores has shape {_shape(scores)}; allowed are real numbers")
    if value.device != scores.device:
        raise _other_device(name, value, "scores", scores, remedy=name)
    lead = _without(scores.shape, dim)
    if not _broadcasts(value.shape, lead):
        raise ValueError(
            f"{name} has shape {_shape(value)}, scores has shape {_shape(scores)}; allowed is what broadcasts to one value"
            f" a row, {tuple(lead)}"
        )
    value = value.to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    return value.expand(lead).reshape(_product(lead))


def _to_rows(scores: Tensor, mask: Any, dim: int) -> tuple[Tensor, Tensor | None]:
    """scores and mask as [R, n]: views where the strides allow it."""
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask is a {type(mask).__name__}; allowed is a bool tensor (True = valid) or None")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask {_kind(mask)}, scores has shape {_shape(scores)}; allowed is bool (True = valid): mask.bool()")
        if mask.device != scores.device:
            raise _other_device("mask", mask, "scores", scores, remedy="mask")
        if not _broadcasts(mask.shape, scores.shape):
            raise ValueError(
                f"mask has shape {_shape(mask)}, scores has shape {_shape(scores)}; allowed is a mask that broadcasts to scores"
            )
        mask = mask.expand(scores.shape)
    if scores.dim() == 2 and dim == 1:
        return scores, mask
    shape = (_product(_without(scores.shape, dim)), scores.shape[dim])
    rows = scores.movedim(dim, -1).reshape(shape)
    return rows, None if mask is None else mask.movedim(dim, -1).reshape(shape)


def _from_rows(lam: Tensor, shape: torch.Size, dim: int) -> Tensor:
    if len(shape) == 2 and dim == 1:
        return lam
    return lam.reshape((*_without(shape, dim), shape[dim])).movedim(-1, dim)


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    offset = len(target) - len(shape)
    return all(shape[i] == 1 or shape[i] == target[offset + i] for i in range(len(shape)))


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product = product * size
    return product


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"has dtype {value.dtype} and shape {_shape(value)}"
    return f"is a {type(value).__name__}"


def _other_device(name: str, tensor: Tensor, other_name: str, other: Tensor, remedy: str = "") -> ValueError:
    return ValueError(
        f"{name} (shape {_shape(tensor)}) is on {tensor.device}, {other_name} (shape {_shape(other)}) on {other.device};"
        f" allowed is one device{remedy and f': {remedy}.to({str(other.device)!r})'}"
    )


class Routed(NamedTuple):
    """What ``Router`` returns, for x of shape [b, n, d] and m routed tokens.

    With several routes, or ``keep_one_route_dim=True``, each has a dimension r behind b.
    """

    indices: Tensor | None
    """[b, (r,) m] int64, the routed positions, best score first (block by block in block-wise routing); None where the
    whole sequence passed through."""
    scores: Tensor
    """[b, (r,) m] in the dtype of x, the gates: 1 with a straight-through gradient, or the solver's weights; 0 where masked."""
    routed_tokens: Tensor
    """[b, (r,) m, d], the tokens at ``indices``."""
    routed_mask: Tensor | None
    """[b, (r,) m] bool, the mask at ``indices``; None without a mask."""


class Router(nn.Module):
    """Picks ``num_tokens`` tokens of a sequence by a learned score, with a gate that carries the gradient.

    The score of a token is its inner product with a routing token. A differentiable top-k over the scores gives the gates;
    the tokens themselves are chosen by score, the lower position first among equal ones. The features are those of
    CoLT5-attention's ``CoordinateDescentRouter``; with ``solver="coordinate_descent"`` so are the gates.

    Args:
        dim: width d of the tokens.
        num_routes: r, routes that choose on their own.
        solver: "exact" (``soft_topk``) or "coordinate_descent".
        eps: temperature of the solver, in units of the scores, > 0.
        n_iters, eps_init, eps_decay, checkpoint_segments: of ``coordinate_descent``; "exact" has no use for them.
        fetch_k_ratio: the solver's budget is ``num_tokens * fetch_k_ratio``, >= 1: a few more than are taken learn from it.
        straight_through: gates are 1 in value, and pass the gradient of the solver's weights.
        learned_routing_tokens: own the routing tokens, as the parameter ``routing_token`` [r, d]. With False there is no
            parameter, and each call must bring ``routing_tokens``.
        cosine_sim_routing: score by cosine similarity, in place of the inner product.
        cosine_sim_scale: what the cosine similarity is multiplied with, > 0.
        route_block_size: None, or a length w: the sequence is cut into blocks of w, and each is routed on its own with an
            even share of ``num_tokens``. The last block may be shorter and gets its share of what it has.
        impl: as for ``soft_topk``.

    Raises:
        TypeError, ValueError: an argument out of range, named with what is allowed.

    Example:
        >>> router = Router(512)
        >>> routed = router(x, num_tokens=64, mask=mask)
        >>> update = feed_forward(routed.routed_tokens) * routed.scores[..., None]
        >>> out = x + router.route_back(torch.zeros_like(x), update, routed.indices)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_routes: int = 1,
        solver: Literal["exact", "coordinate_descent"] = "exact",
        eps: float = 0.03,
        n_iters: int = 20,
        eps_init: float | None = 4.0,
        eps_decay: float = 0.7,
        fetch_k_ratio: float = 9 / 8,
        straight_through: bool = True,
        learned_routing_tokens: bool = True,
        cosine_sim_routing: bool = False,
        cosine_sim_scale: float = 8.0,
        route_block_size: int | None = None,
        checkpoint_segments: int | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if solver not in ("exact", "coordinate_descent"):
            raise ValueError(f"solver is {solver!r}; allowed are 'exact' and 'coordinate_descent'")
        if impl not in ("auto", *ops.IMPLS):
            raise ValueError(f"impl is {impl!r}; allowed are 'auto', 'triton' and 'torch'")
        self.dim = _check_int("dim", dim, 1)
        self.num_routes = _check_int("num_routes", num_routes, 1)
        self.solver = solver
        self.eps = _check_number("eps", eps, zero_allowed=False)
        self.n_iters = _check_int("n_iters", n_iters, 1)
        self.eps_init = None if eps_init is None else _check_number("eps_init", eps_init, zero_allowed=False)
        self.eps_decay = _check_number("eps_decay", eps_decay, zero_allowed=False)
        self.fetch_k_ratio = _check_number("fetch_k_ratio", fetch_k_ratio, zero_allowed=False)
        if self.fetch_k_ratio < 1:
            raise ValueError(f"fetch_k_ratio is {fetch_k_ratio}; allowed is a finite number >= 1")
        self.straight_through = straight_through
        self.cosine_sim_routing = cosine_sim_routing
        self.cosine_sim_scale = _check_number("cosine_sim_scale", cosine_sim_scale, zero_allowed=False)
        self.route_block_size = None if route_block_size is None else _check_int("route_block_size", route_block_size, 1)
        self.checkpoint_segments = None
        if checkpoint_segments is not None:
            self.checkpoint_segments = _check_int("checkpoint_segments", checkpoint_segments, 1, self.n_iters, "n_iters")
        self.impl: Impl = impl
        self.routing_token: nn.Parameter | None
        if learned_routing_tokens:
            self.routing_token = nn.Parameter(torch.randn(self.num_routes, self.dim))
        else:
            self.register_parameter("routing_token", None)

    def extra_repr(self) -> str:
        """The arguments that made this router, in one line: those that say how it routes, and others where they are set."""
        shown: dict[str, Any] = {"dim": self.dim, "num_routes": self.num_routes, "solver": self.solver, "eps": self.eps}
        if self.solver == "coordinate_descent":
            shown |= {"n_iters": self.n_iters, "eps_init": self.eps_init, "eps_decay": self.eps_decay}
            if self.checkpoint_segments is not None:
                shown["checkpoint_segments"] = self.checkpoint_segments
        shown |= {"fetch_k_ratio": self.fetch_k_ratio, "straight_through": self.straight_through}
        if self.routing_token is None:
            shown["learned_routing_tokens"] = False
        if self.cosine_sim_routing:
            shown |= {"cosine_sim_routing": True, "cosine_sim_scale": self.cosine_sim_scale}
        if self.route_block_size is not None:
            shown["route_block_size"] = self.route_block_size
        return ", ".join(f"{name}={value!r}" for name, value in (shown | {"impl": self.impl}).items())

    def forward(
        self,
        x: Tensor,
        *,
        num_tokens: int,
        mask: Tensor | None = None,
        random_route: bool = False,
        routing_tokens: Tensor | None = None,
        keep_one_route_dim: bool = False,
    ) -> Routed:
        """Routes ``num_tokens`` tokens of each sequence.

        Args:
            x: tokens [b, n, d], floating.
            num_tokens: m, how many tokens each route takes, >= 1. A sequence of at most m tokens passes through whole, with
                gates of 1 (0 where masked) that carry no gradient.
                In block-wise routing every block gives at least one, so m is at least the number of blocks.
            mask: bool [b, n], True = valid. Masked tokens are taken only where too few are valid, with score 0.
            random_route: the negative control: tokens are drawn uniformly among the valid ones, all gates are 1 (0 where
                masked) and carry no gradient.
            routing_tokens: [b, d] or [b, r, d], used in place of the module's own.
            keep_one_route_dim: keep the dimension r where there is one route only.

        Returns:
            ``Routed(indices, scores, routed_tokens, routed_mask)``.

        Raises:
            TypeError, ValueError: an argument of a shape, dtype, range or device that is not listed above.
        """
        num_tokens = self._check_input(x, num_tokens, mask)
        tokens = self._routing_tokens(x, routing_tokens)
        keep_route = keep_one_route_dim or self.num_routes > 1
        n = x.shape[1]
        if n <= num_tokens:
            return self._pass_through(x, mask, keep_route)

        similarity = self._similarity(x, tokens)  # [b, r, n]
        valid = None if mask is None else mask[:, None, :].expand(similarity.shape)
        if self.route_block_size is None or n <= self.route_block_size:
            gates, indices = self._route(similarity, valid, num_tokens, random_route)
        else:
            gates, indices = self._route_blocks(similarity, valid, num_tokens, self.route_block_size, random_route)

        if self.straight_through:
            gates = gates + (1 - gates).detach()
        routed_mask = None
        if valid is not None:
            routed_mask = valid.gather(-1, indices)
            gates = gates.masked_fill(~routed_mask, 0)
        expanded = x[:, None].expand(-1, self.num_routes, -1, -1)
        routed = expanded.gather(2, indices[..., None].expand(-1, -1, -1, self.dim))
        gates = gates.to(x.dtype)
        if keep_route:
            return Routed(indices, gates, routed, routed_mask)
        return Routed(indices[:, 0], gates[:, 0], routed[:, 0], None if routed_mask is None else routed_mask[:, 0])

    def route_back(self, src: Tensor, routed_tokens: Tensor, indices: Tensor | None) -> Tensor:
        """A copy of ``src`` with ``routed_tokens`` at ``indices``; differentiable in both.

        Args:
            src: [b, n, d], or [b, r, n, d] where the routed tokens have a dimension of routes.
            routed_tokens: [b, m, d] or [b, r, m, d].
            indices: [b, m] or [b, r, m], as ``forward`` returned them. None: the whole sequence had passed through, and the
                routed tokens are the result.

        Raises:
            ValueError: shapes that do not fit each other, devices that differ.
        """
        for name, tensor in (("routed_tokens", routed_tokens), ("indices", indices)):
            if tensor is not None and tensor.device != src.device:
                raise _other_device(name, tensor, "src", src)
        if indices is None:
            if routed_tokens.shape != src.shape:
                raise ValueError(
                    f"routed_tokens has shape {_shape(routed_tokens)}, src has shape {_shape(src)}; without indices they must"
                    " be equal, since the whole sequence passed through"
                )
            return routed_tokens
        if routed_tokens.shape[:-1] != indices.shape:
            raise ValueError(
                f"routed_tokens has shape {_shape(routed_tokens)}, indices has shape {_shape(indices)}; allowed are routed"
                f" tokens of shape {(*indices.shape, '...')}"
            )
        lead_fits = src.dim() == routed_tokens.dim() and src.shape[:-2] == routed_tokens.shape[:-2]
        if not lead_fits or src.shape[-1] != routed_tokens.shape[-1]:
            raise ValueError(
                f"src has shape {_shape(src)}, routed_tokens has shape {_shape(routed_tokens)}; all but the second last size"
                " must be equal (with several routes, give src one sequence for each route)"
            )
        return src.scatter(-2, indices[..., None].expand(routed_tokens.shape), routed_tokens.to(src.dtype))

    def _check_input(self, x: Any, num_tokens: Any, mask: Any) -> int:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x {_kind(x)}; allowed is a floating-point tensor [batch, length, {self.dim}]")
        if x.dim() != 3 or x.shape[-1] != self.dim:
            own = "" if self.routing_token is None else f", the router's routing_token has shape {_shape(self.routing_token)}"
            raise ValueError(f"x has shape {_shape(x)}{own}; allowed is (batch, length, {self.dim})")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(
                    f"mask {_kind(mask)}, x has shape {_shape(x)}; allowed is a bool tensor (True = valid) of shape {_shape(x)[:2]}"
                )
            if mask.shape != x.shape[:2]:
                raise ValueError(
                    f"mask has shape {_shape(mask)}, x has shape {_shape(x)}; allowed is a mask of shape {_shape(x)[:2]}"
                )
            if mask.device != x.device:
                raise _other_device("mask", mask, "x", x)
        try:
            return _check_int("num_tokens", num_tokens, 1)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}; x has shape {_shape(x)}") from None

    def _routing_tokens(self, x: Tensor, given: Tensor | None) -> Tensor:
        """[r, d], or [b, r, d] where they were given."""
        if given is None:
            if self.routing_token is None:
                raise ValueError(
                    "routing_tokens is None, but this Router was made with learned_routing_tokens=False; allowed is a tensor"
                    f" of shape {self._allowed_tokens(x)}"
                )
            if self.routing_token.device != x.device:
                raise _other_device("the router's routing_token", self.routing_token, "x", x, remedy="router")
            return self.routing_token
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise TypeError(
                f"routing_tokens {_kind(given)}, x has shape {_shape(x)}; allowed is a floating-point tensor of shape"
                f" {self._allowed_tokens(x)}"
            )
        tokens = given[:, None] if given.dim() == 2 and self.num_routes == 1 else given
        if tokens.shape != (x.shape[0], self.num_routes, self.dim):
            raise ValueError(
                f"routing_tokens has shape {_shape(given)}, x has shape {_shape(x)}; allowed is {self._allowed_tokens(x)}"
            )
        if given.device != x.device:
            raise _other_device("routing_tokens", given, "x", x)
        return tokens

    def _allowed_tokens(self, x: Tensor) -> str:
        batch = x.shape[0]
        either = f"({batch}, {self.dim}) or " if self.num_routes == 1 else ""
        return f"{either}({batch}, {self.num_routes}, {self.dim})"

    def _pass_through(self, x: Tensor, mask: Tensor | None, keep_route: bool) -> Routed:
        if keep_route:
            x = x[:, None].repeat(1, self.num_routes, 1, 1)
            mask = None if mask is None else mask[:, None].repeat(1, self.num_routes, 1)
        return Routed(None, x.new_ones(x.shape[:-1]) if mask is None else mask.to(x.dtype), x, mask)

    def _similarity(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Scores [b, r, n] in the wider dtype of both, also under autocast: ranks are lost in half precision."""
        dtype = torch.promote_types(x.dtype, tokens.dtype)
        with torch.autocast(device_type=x.device.type, enabled=False):
            x, tokens = x.to(dtype), tokens.to(dtype)
            if not self.cosine_sim_routing:
                return tokens @ x.mT
            return (functional.normalize(tokens, dim=-1) @ functional.normalize(x, dim=-1).mT) * self.cosine_sim_scale

    def _solve(self, similarity: Tensor, k: float | Tensor, valid: Tensor | None) -> Tensor:
        if self.solver == "exact":
            return soft_topk(similarity, k, eps=self.eps, mask=valid, impl=self.impl)
        return coordinate_descent(
            similarity,
            k,
            n_iters=self.n_iters,
            eps=self.eps,
            eps_init=self.eps_init,
            eps_decay=self.eps_decay,
            mask=valid,
            checkpoint_segments=self.checkpoint_segments,
            impl=self.impl,
        )

    def _weights(self, similarity: Tensor, k: float | Tensor, valid: Tensor | None, random_route: bool) -> Tensor:
        if random_route:
            return torch.ones_like(similarity, requires_grad=False)
        return self._solve(similarity, k, valid)

    def _route(self, similarity: Tensor, valid: Tensor | None, num_tokens: int, random_route: bool) -> tuple[Tensor, Tensor]:
        """Gates and indices, both [b, r, num_tokens]."""
        k = min(num_tokens * self.fetch_k_ratio, similarity.shape[-1])
        weights = self._weights(similarity, k, valid, random_route)
        indices = _ranked(similarity, valid, random_route)[..., :num_tokens]
        return weights.gather(-1, indices), indices

    def _route_blocks(
        self, similarity: Tensor, valid: Tensor | None, num_tokens: int, width: int, random_route: bool
    ) -> tuple[Tensor, Tensor]:
        """Gates and indices, both [b, r, max(num_tokens, number of blocks)]."""
        b, r, n = similarity.shape
        num_full, tail = n // width, n % width  # not divmod: n may be symbolic
        num_blocks = num_full + (tail > 0)
        num_tokens = max(num_tokens, num_blocks)
        device = similarity.device

        # an even share for each block, in proportion to its length and at least one
        of_tail = max(1, num_tokens * tail // n) if tail else 0
        each, extra = (num_tokens - of_tail) // num_full, (num_tokens - of_tail) % num_full
        block = torch.arange(num_blocks, device=device)
        share = torch.where(block < num_full, each + (block < extra).long(), of_tail)  # [num_blocks]
        size = torch.where(block < num_full, width, tail)

        if tail:
            if valid is None:
                valid = torch.ones_like(similarity, dtype=torch.bool)
            similarity = functional.pad(similarity, (0, width - tail))
            valid = functional.pad(valid, (0, width - tail), value=False)
        similarity = similarity.reshape(b, r, num_blocks, width)
        valid = None if valid is None else valid.reshape(b, r, num_blocks, width)

        k: float | Tensor
        if tail or extra:
            k = torch.minimum(share * self.fetch_k_ratio, size.to(torch.float32))
        else:
            k = min(each * self.fetch_k_ratio, width)  # as published: a number is not clamped to the valid entries
        weights = self._weights(similarity, k, valid, random_route).flatten(2)
        ranked = (_ranked(similarity, valid, random_route) + (block * width)[:, None]).flatten(2)

        # the p-th routed token is number rank[p] of block owner[p]
        end = share.cumsum(0)
        position = torch.arange(num_tokens, device=device)
        owner = torch.searchsorted(end, position, right=True)
        rank = position - (end - share)[owner]
        indices = ranked[..., owner * width + rank]
        return weights.gather(-1, indices), indices


def _ranked(similarity: Tensor, valid: Tensor | None, random_route: bool) -> Tensor:
    """Positions by falling score, the lower one first among equals, masked ones last."""
    key = similarity.detach()
    if random_route:
        key = torch.rand(key.shape, device=key.device)
    if valid is not None:
        key = key.clamp(min=torch.finfo(key.dtype).min).masked_fill(~valid, -math.inf)
    return key.argsort(dim=-1, descending=True, stable=True)
