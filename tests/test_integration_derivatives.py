"""Derivatives of every order of ``soft_topk``, in both modes and under torch.func. ``coordinate_descent`` has the first only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import coordroute
import pytest
import torch
from coordroute.kernels import ops
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def leaf(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(values, dtype=dtype, device=DEVICE).clone().requires_grad_()


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def problem(tensors: bool, impl: str, n: int = 6) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """``soft_topk`` as a function of its inputs, and inputs: one row has nothing unsaturated, another one valid entry."""
    s = leaf(rows(4, n))
    if not tensors:
        return lambda s: coordroute.soft_topk(s, 2.25, eps=0.4, impl=impl), [s]
    mask = torch.ones(4, n, dtype=torch.bool, device=DEVICE)
    mask[1, 2] = mask[2, 1:] = False
    inputs = [s, leaf([2.5, 1.25, 0.5, n + 1.0]), leaf([0.3, 0.5, 1.0, 0.2])]
    return lambda s, k, eps: coordroute.soft_topk(s, k, eps=eps, mask=mask, impl=impl), inputs


# --- the second order and the third ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", (False, True))
def test_against_finite_differences(tensors: bool) -> None:
    function, inputs = problem(tensors, "torch")
    assert gradcheck(function, inputs, check_forward_ad=True, check_backward_ad=False)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=tensors)

    def first_order(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)

    assert gradgradcheck(first_order, inputs, fast_mode=True), "the third order"


def test_the_triton_kernels_against_finite_differences() -> None:
    pytest.importorskip("triton")
    inputs = [leaf(rows(1, 4)), leaf([1.5]), leaf([0.5])]
    assert gradgradcheck(lambda s, k, eps: coordroute.soft_topk(s, k, eps=eps, impl="triton"), inputs, fast_mode=True)


def second_order(s: Tensor, g: Tensor, v: Tensor, k: Any, impl: str = "auto", **options: Any) -> list[Tensor]:
    """The gradients, and those of (gradient of the scores) · v with respect to g and the scores."""
    s, g = leaf(s.detach(), s.dtype), leaf(g.detach(), g.dtype)
    (ds,) = torch.autograd.grad(coordroute.soft_topk(s, k, impl=impl, **options), s, g, create_graph=True)
    return [ds.detach(), *torch.autograd.grad(ds, [g, s], v)]


def test_rows_of_every_kind() -> None:
    """Masked and infinite scores count for nothing or are at 1; rows with nothing to learn have zeros; NaN stays in its row."""
    inf, n = math.inf, 7
    s, g, v = rows(7, n), rows(7, n), rows(7, n)
    s[1, 2], s[1, 4] = -inf, inf
    g[1, 2] = g[1, 4] = inf  # of entries without a part
    s[2, 3] = math.nan
    mask = torch.ones(7, n, dtype=torch.bool, device=DEVICE)
    mask[3, 1:3] = False
    mask[4] = False
    k = torch.tensor([2.5, 2.5, 2.5, 2.5, 2.5, 0.0, n + 1.0], dtype=torch.float64, device=DEVICE)
    found = second_order(s, g, v, k, eps=0.3, mask=mask)
    for part in found:
        assert bool(part[2].isnan().all()) and bool(part[[0, 1, 3, 4, 5, 6]].isfinite().all())
        assert not part[[4, 5, 6]].any(), "all masked, nothing to take, everything taken"
        assert bool(part[[0, 1, 3]].any(dim=1).all())
    plain = second_order(s[:1], g[:1], v[:1], 2.5, eps=0.3)
    reduced = {
        0: (plain, list(range(n))),
        1: (second_order(s[1:2, [0, 1, 3, 5, 6]], g[1:2, [0, 1, 3, 5, 6]], v[1:2, [0, 1, 3, 5, 6]], 1.5, eps=0.3), [0, 1, 3, 5, 6]),
        3: (second_order(s[3:4, [0, 3, 4, 5, 6]], g[3:4, [0, 3, 4, 5, 6]], v[3:4, [0, 3, 4, 5, 6]], 2.5, eps=0.3), [0, 3, 4, 5, 6]),
    }
    for row, (wanted, columns) in reduced.items():
        for part, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(part[row, columns], want[0], rtol=1e-9, atol=1e-12)
            assert torch.count_nonzero(part[row]) == torch.count_nonzero(want[0]), "the others have nothing"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_lower_precision(dtype: torch.dtype) -> None:
    s, g, v = rows(3, 9, dtype=dtype), rows(3, 9, dtype=dtype), rows(3, 9, dtype=dtype)
    found = second_order(s, g, v, 2.5, eps=0.3)
    wanted = second_order(s.double(), g.double(), v.double(), 2.5, eps=0.3)
    for part, want in zip(found, wanted, strict=True):
        assert part.dtype == dtype
        # a sum over a row of up to 9 products; bfloat16 is rounded once, at the end
        bound = 64 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps * (dtype != torch.float32)
        assert (part.double() - want).norm() <= bound * want.norm()


def test_the_first_order_is_bitwise_the_same_with_a_graph() -> None:
    function, inputs = problem(True, "auto")
    lam = function(*inputs)
    g = torch.randn_like(lam)
    plain = torch.autograd.grad(lam, inputs, g, retain_graph=True)
    for first, second in zip(plain, torch.autograd.grad(lam, inputs, g, create_graph=True), strict=True):
        assert torch.equal(first, second) and not first.requires_grad and second.requires_grad


def test_a_gradient_penalty_trains() -> None:
    """The loss holds the gradient itself; the parameter's gradient is that of finite differences."""
    w = leaf(rows(5, 1))
    x = rows(3, 8, 5)

    def loss(w: Tensor) -> Tensor:
        y = x.clone().requires_grad_()
        lam = coordroute.soft_topk((y @ w).squeeze(-1), 2.5, eps=0.5)
        (dy,) = torch.autograd.grad((lam * y.sum(-1)).sum(), y, create_graph=True)
        return dy.square().sum()

    assert gradcheck(loss, (w,))


# --- torch.func, forward mode, torch.compile -------------------------------------------------------------------------


def scalar(s: Tensor) -> Tensor:
    return coordroute.soft_topk(s, 2.25, eps=0.4).square().sum()


def test_hessians_agree_however_they_are_made() -> None:
    s = rows(2, 6)
    wanted = torch.autograd.functional.hessian(scalar, s)
    assert bool(wanted.any())
    for made in (hessian(scalar), jacrev(jacrev(scalar)), jacfwd(jacfwd(scalar)), jacrev(jacfwd(scalar))):
        torch.testing.assert_close(made(s), wanted, rtol=1e-10, atol=1e-12)
    by_hand = torch.stack(
        [grad(lambda s, i=i: grad(scalar)(s).flatten()[i])(s) for i in range(12)]  # type: ignore[misc]
    ).reshape(2, 6, 2, 6)
    torch.testing.assert_close(by_hand, wanted, rtol=1e-10, atol=1e-12)


def test_jacobians_and_products() -> None:
    function, inputs = problem(True, "auto")
    inputs = [value.detach() for value in inputs]
    wanted = torch.autograd.functional.jacobian(function, tuple(inputs))
    for made in (jacrev(function, argnums=(0, 1, 2)), jacfwd(function, argnums=(0, 1, 2))):
        for found, want in zip(made(*inputs), wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    tangents = [torch.randn_like(value) for value in inputs]
    product = sum((jacobian * t).flatten(2).sum(-1) for jacobian, t in zip(wanted, tangents, strict=True))
    value, found = jvp(function, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(found, product, rtol=1e-10, atol=1e-12)
    assert torch.equal(value, function(*inputs))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(value, t) for value, t in zip(inputs, tangents, strict=True)]
        assert torch.equal(forward_ad.unpack_dual(function(*duals)).tangent, found)


OPTIONS: dict[str, Callable[..., Tensor]] = {
    "soft_topk": lambda s, k, mask=None: coordroute.soft_topk(s, k, eps=0.3, mask=mask),
    "coordinate_descent": lambda s, k, mask=None: coordroute.coordinate_descent(s, k, n_iters=6, eps=0.3, eps_init=2.0, mask=mask),
}


@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.parametrize("in_dims", ((0, 0, 0), (1, None, None), (None, 0, None), (None, None, 1)))
def test_vmap_is_a_batch(op: str, in_dims: tuple[int | None, ...]) -> None:
    """In value and gradient, whichever inputs are batched."""
    function = OPTIONS[op]
    shapes = ((3, 9), (3,), (3, 9))
    sizes = [shape if dim is None else (*shape[:dim], 5, *shape[dim:]) for shape, dim in zip(shapes, in_dims, strict=True)]
    s, k, mask = rows(*sizes[0]), rows(*sizes[1]).abs() + 1, rows(*sizes[2]) > -1
    picked = [[x if dim is None else x.select(dim, i) for x, dim in zip((s, k, mask), in_dims, strict=True)] for i in range(5)]
    one_by_one = torch.stack([function(*part) for part in picked])
    assert torch.equal(vmap(function, in_dims=in_dims)(s, k, mask), one_by_one)

    def loss(s: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return (function(s, k, mask) * torch.arange(9.0, device=DEVICE)).sum()

    found = vmap(grad(loss, argnums=(0, 1)), in_dims=in_dims)(s, k, mask)
    for i, part in enumerate(picked):
        x, y = leaf(part[0]), leaf(part[1])
        wanted = torch.autograd.grad(loss(x, y, part[2]), [x, y])
        for one, want in zip(found, wanted, strict=True):
            assert torch.equal(one[i], want)


def test_compiled_transforms_are_the_eager_ones() -> None:
    torch._dynamo.reset()
    s = rows(3, 6)
    for made in (grad(scalar), vmap(grad(scalar)), grad(lambda s: grad(scalar)(s).square().sum())):
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(s), made(s), rtol=1e-12, atol=1e-14)
    torch._dynamo.reset()


# --- coordinate_descent says what it has not -------------------------------------------------------------------------


def descent(s: Tensor) -> Tensor:
    return OPTIONS["coordinate_descent"](s, 2.5).square().sum()


def graph_of_a_graph(s: Tensor) -> Any:
    s = s.clone().requires_grad_()
    (ds,) = torch.autograd.grad(descent(s), s, create_graph=True)
    return torch.autograd.grad(ds.square().sum(), s)


def dual_numbers(s: Tensor) -> Any:
    with forward_ad.dual_level():
        return descent(forward_ad.make_dual(s, torch.ones_like(s)))


@pytest.mark.parametrize(
    "how",
    (
        graph_of_a_graph,
        lambda s: grad(lambda s: grad(descent)(s).sum())(s),
        lambda s: jacrev(jacrev(descent))(s),
        lambda s: hessian(descent)(s),
        lambda s: jvp(descent, (s,), (s,)),
        lambda s: jacfwd(descent)(s),
        dual_numbers,
    ),
)
def test_coordinate_descent_has_first_order_gradients_only(how: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for way in ("plain", "registered"):
        if way == "registered":
            monkeypatch.setattr(ops, "_plain", lambda *tensors: False)
        with pytest.raises(RuntimeError, match=r"coordroute\.coordinate_descent has first-order gradients only, in reverse mode"):
            how(rows(2, 6))


def test_the_first_order_of_coordinate_descent_under_torch_func() -> None:
    s = leaf(rows(3, 6))
    assert torch.equal(grad(descent)(s.detach()), torch.autograd.grad(descent(s), s)[0])
    jacobian = jacrev(lambda s: OPTIONS["coordinate_descent"](s, 2.5))(s.detach())
    wanted = torch.autograd.functional.jacobian(lambda s: OPTIONS["coordinate_descent"](s, 2.5), s.detach())
    assert torch.equal(jacobian, wanted) and bool(wanted.any())
