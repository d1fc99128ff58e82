"""The contract at the edges (DESIGN.md, section 3), row by row, for both operators and every backend.

Without a GPU the Triton kernels run in Triton's interpreter, so rows are few and short.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import coordroute
import numpy as np
import pytest
import torch
from coordroute.kernels import config, cpu, ops
from coordroute.reference import oracles
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
T = 6
SCHEDULE: dict[str, Any] = {"n_iters": T, "eps": 0.1, "eps_init": 4.0, "eps_decay": 0.5}
OPERATORS = ("soft_topk", "coordinate_descent")

needs_triton = pytest.mark.skipif(not ops.triton_available(), reason="Triton is not installed on this platform")
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="it is about a GPU's memory or its streams")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> str:
    """The ``impl`` to ask for."""
    return request.param


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton), pytest.param("triton tiled", marks=needs_triton)])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ``impl`` to ask for; of Triton both variants of the kernels in turn, where a test is about what they compute."""
    if request.param == "triton tiled":
        tiled = config.LaunchConfig("tiled", 16, 1, 1, 1)
        monkeypatch.setattr(ops, "_resolve", lambda op, direction, scores, impl: tiled)
    return request.param.split()[0]


@pytest.fixture(params=OPERATORS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


def call(op: str, scores: Tensor, k: Any, **options: Any) -> Tensor:
    """The operator named ``op`` with this file's schedule."""
    if op == "soft_topk":
        return coordroute.soft_topk(scores, k, **{"eps": 0.1, **options})
    return coordroute.coordinate_descent(scores, k, **{**SCHEDULE, **options})


def numpy(x: Tensor) -> np.ndarray[Any, Any]:
    """A bool tensor as it is, another one in float64."""
    x = x.detach().cpu()
    return x.numpy() if x.dtype == torch.bool else x.double().numpy()


def truth(op: str, scores: Tensor, k: Any, mask: Tensor | None = None, g: Tensor | None = None) -> oracles.Truth:
    """The oracle's word on rows [R, n]."""
    k = numpy(k) if isinstance(k, Tensor) else k
    arguments = {"mask": None if mask is None else numpy(mask), "g": None if g is None else numpy(g)}
    if op == "soft_topk":
        return oracles.soft_topk_truth(numpy(scores), k, 0.1, **arguments)
    return oracles.coordinate_descent_truth(numpy(scores), k, **SCHEDULE, **arguments)


def grads(lam: Tensor, inputs: list[Tensor], g: Tensor | None = None) -> list[Tensor]:
    """The gradient of each input; every input must have one."""
    g = torch.randn_like(lam) if g is None else g
    return list(torch.autograd.grad(lam, inputs, g))


def near(value: Tensor, wanted: Any, atol: float = 2e-6) -> None:
    wanted = torch.as_tensor(wanted).detach().to(value)
    torch.testing.assert_close(value, wanted, rtol=0, atol=atol, equal_nan=True)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).to(DEVICE)


def leaf(value: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.as_tensor(value, dtype=dtype, device=DEVICE).clone().requires_grad_()


# --- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("excess", (0.0, 0.5, 100.0))
@pytest.mark.parametrize("as_tensor", (False, True))
def test_a_budget_of_all_valid_entries_or_more(op: str, variant: str, excess: float, as_tensor: bool) -> None:
    s = rows(3, 20).requires_grad_()
    mask = torch.ones(3, 20, dtype=torch.bool, device=DEVICE)
    mask[1, 5:9] = False
    mask[2, 1:] = False
    number = 20.0 + excess
    k = leaf([number] * 3) if as_tensor else number
    lam = call(op, s, k, mask=mask, impl=variant)
    if op == "soft_topk":
        assert torch.equal(lam, mask.float())
        for grad in grads(lam, [s, k] if as_tensor else [s]):
            assert not grad.any()
    else:
        # as published; a tensor is clamped to the valid entries, a number is not
        near(lam, truth(op, s, torch.minimum(k.detach(), mask.sum(-1)) if as_tensor else k, mask).lam)


@pytest.mark.parametrize("as_tensor", (False, True))
def test_a_budget_of_zero(op: str, variant: str, as_tensor: bool) -> None:
    s = rows(2, 20).requires_grad_()
    s.data[1, 3], s.data[1, 4] = INF, -INF
    k = leaf([0.0, 0.0]) if as_tensor else 0
    lam = call(op, s, k, impl=variant)
    assert not lam.any()
    for grad in grads(lam, [s, k] if as_tensor else [s]):
        assert not grad.any()


def test_a_budget_in_a_tensor_is_clamped(op: str, variant: str) -> None:
    s = rows(5, 20)
    mask = torch.ones(5, 20, dtype=torch.bool, device=DEVICE)
    mask[:, 15:] = False
    k = leaf([-3.0, -INF, 1e30, INF, 2.5])
    lam = call(op, s.requires_grad_(), k, mask=mask, impl=variant)
    assert not lam[:2].any()
    near(lam, truth(op, s, torch.tensor([0.0, 0.0, 15.0, 15.0, 2.5]), mask).lam)
    assert torch.equal(k.detach(), torch.tensor([-3.0, -INF, 1e30, INF, 2.5], device=DEVICE))
    ds, dk = grads(lam, [s, k])
    assert bool(ds.isfinite().all()) and not ds[:2].any()
    assert not dk[:4].any(), "the clamp has gradient 0"
    assert dk[4] != 0
    if op == "soft_topk":
        assert torch.equal(lam[2:4], mask[2:4].float()) and not ds[2:4].any()


def test_a_budget_of_nan_spoils_its_row_only(op: str, variant: str) -> None:
    s = rows(3, 20).requires_grad_()
    k = leaf([2.5, NAN, 2.5])
    lam = call(op, s, k, impl=variant)
    assert bool(lam[1].isnan().all())
    kept = [0, 2]
    near(lam[kept], truth(op, s[kept], 2.5).lam)
    for grad in grads(lam, [s, k]):
        assert bool(grad[1].isnan().all()) and bool(grad[kept].isfinite().all())


def test_a_temperature_in_a_tensor_spoils_its_row_only(variant: str) -> None:
    s = rows(6, 20).requires_grad_()
    eps = leaf([0.1, 0.0, -1.0, NAN, INF, 0.2])
    lam = coordroute.soft_topk(s, 2.5, eps=eps, impl=variant)
    assert bool(lam[1:5].isnan().all())
    near(lam[[0, 5]], oracles.soft_topk_numpy(numpy(s[[0, 5]]), 2.5, [0.1, 0.2])[0])
    ds, deps = grads(lam, [s, eps])
    for grad in (ds, deps):
        assert bool(grad[1:5].isnan().all()) and bool(grad[[0, 5]].isfinite().all())


@needs_gpu
@pytest.mark.parametrize("op", OPERATORS)
def test_nothing_waits_for_the_device(op: str) -> None:
    s, mask = rows(4, 40).requires_grad_(), torch.rand(4, 40, device=DEVICE) < 0.8
    k = leaf([-1.0, 2.0, 99.0, NAN])
    g = torch.randn(4, 40, device=DEVICE)
    call(op, s, k, mask=mask, impl="triton").backward(g)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(op, s, k, mask=mask, impl="triton").backward(g)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- what is refused, and how ----------------------------------------------------------------------------------------


def refuses(error: type[Exception], *parts: str, op: str, scores: Any = None, k: Any = 2.0, **options: Any) -> None:
    """The call raises ``error``, with each of ``parts`` in the message."""
    scores = torch.zeros(2, 5, device=DEVICE) if scores is None else scores
    with pytest.raises(error) as raised:
        call(op, scores, k, **options)
    for part in parts:
        assert part in str(raised.value), str(raised.value)


@pytest.mark.parametrize("k", (-1, -1e-9, NAN, INF, -INF))
def test_a_bad_budget(op: str, k: float) -> None:
    refuses(ValueError, f"k is {k}", "allowed is", ">= 0", op=op, k=k)


@pytest.mark.parametrize("value", (0, 0.0, -0.1, NAN, INF, -INF))
@pytest.mark.parametrize(
    ("op", "name"), [("soft_topk", "eps"), *(("coordinate_descent", name) for name in ("eps", "eps_init", "eps_decay"))]
)
def test_a_bad_temperature(op: str, name: str, value: float) -> None:
    refuses(ValueError, f"{name} is {value}", "allowed is", "> 0", op=op, **{name: value})


@pytest.mark.parametrize(("name", "value"), (("eps", 1e-50), ("eps", 1e39), ("k", 1e300)))
def test_a_number_that_the_compute_type_cannot_hold(op: str, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(str(value))}; float16 scores are computed in float32.*allowed"):
        call(op, rows(2, 5).half(), **{"k": 2.0, name: value})
    assert bool(call(op, rows(2, 5, dtype=torch.float64), **{"k": 2.0, name: value}).isfinite().all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_temperature_below_the_spacing_of_the_scores(variant: str, dtype: torch.dtype) -> None:
    """The threshold lies between two neighbouring floats, or is one of them."""
    s = rows(3, 6, dtype=dtype) * 2.0**20
    ties = torch.full((1, 6), 1e6, dtype=dtype, device=DEVICE)
    ties[:, 4:] = torch.nextafter(ties[:, 4:], torch.tensor([[INF, -INF]], dtype=dtype, device=DEVICE))
    scores = torch.cat([s, ties])
    for k in (0.5, 1.0, 2.5, 4.9, 5.0, 5.5):
        for eps in (1e-2, 1e-9, 1e-20):
            lam = coordroute.soft_topk(scores, k, eps=eps, impl=variant.split()[0])
            wanted, _ = oracles.soft_topk_numpy(numpy(scores), k, eps)
            near(lam, wanted, 4e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("n_iters", (0, -3))
def test_too_few_iterations(n_iters: int) -> None:
    refuses(ValueError, f"n_iters is {n_iters}", "allowed is", ">= 1", op="coordinate_descent", n_iters=n_iters)


@pytest.mark.parametrize("segments", (0, -1, T + 1))
def test_segments_outside_the_iterations(segments: int) -> None:
    what = f"checkpoint_segments is {segments}"
    refuses(ValueError, what, "allowed is", f"1..{T}", "n_iters", op="coordinate_descent", checkpoint_segments=segments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("k", "2"), ("k", True), ("k", 1j), ("k", None), ("eps", "0.1"), ("eps", True), ("eps", None)],
)
def test_numbers_that_are_none(op: str, name: str, value: Any) -> None:
    refuses(TypeError, f"{name} is {value!r}", "allowed is", op=op, **{name: value})


@pytest.mark.parametrize("value", (2.5, "3", True))
@pytest.mark.parametrize("name", ("n_iters", "checkpoint_segments"))
def test_counts_that_are_none(name: str, value: Any) -> None:
    refuses(TypeError, f"{name} is {value!r}", "allowed is an integer", op="coordinate_descent", **{name: value})


def test_a_temperature_of_coordinate_descent_is_a_number() -> None:
    refuses(TypeError, "eps is a tensor of shape (2,)", "allowed is", op="coordinate_descent", eps=torch.ones(2))


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8))
def test_scores_that_are_not_floating(op: str, dtype: torch.dtype) -> None:
    refuses(TypeError, str(dtype), "(2, 5)", "float32", op=op, scores=torch.zeros(2, 5, dtype=dtype, device=DEVICE))


def test_scores_that_are_no_rows(op: str) -> None:
    refuses(ValueError, "shape ()", "at least one dimension", op=op, scores=torch.zeros(()))
    refuses(TypeError, "list", "torch.Tensor", op=op, scores=[1.0, 2.0])


@pytest.mark.parametrize("dim", (2, -3))
def test_a_dimension_that_is_not_there(op: str, dim: int) -> None:
    refuses(IndexError, f"dim is {dim}", "(2, 5)", "-2..1", op=op, dim=dim)


@pytest.mark.parametrize("dim", (1.0, None, True))
def test_a_dimension_that_is_none(op: str, dim: Any) -> None:
    refuses(TypeError, f"dim is {dim!r}", "allowed is an integer", op=op, dim=dim)


@pytest.mark.parametrize("dtype", (torch.float32, torch.uint8, torch.int64))
def test_a_mask_that_is_not_bool(op: str, dtype: torch.dtype) -> None:
    mask = torch.ones(2, 5, dtype=dtype, device=DEVICE)
    refuses(TypeError, f"mask has dtype {dtype}", "bool", op=op, mask=mask)


def test_a_mask_that_is_no_tensor(op: str) -> None:
    refuses(TypeError, "mask is a list", "bool", op=op, mask=[True] * 5)


@pytest.mark.parametrize("shape", ((3, 5), (2, 4), (1, 2, 5), (2, 1, 5), (2,)))
def test_a_mask_that_does_not_broadcast(op: str, shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    refuses(ValueError, f"mask has shape {shape}", "(2, 5)", op=op, mask=mask)


@pytest.mark.parametrize("name", ("k", "eps"))
@pytest.mark.parametrize("shape", ((3,), (2, 5), (2, 1), (5,)))
def test_row_values_that_do_not_broadcast(name: str, shape: tuple[int, ...]) -> None:
    for op in OPERATORS if name == "k" else ("soft_topk",):
        refuses(ValueError, f"{name} has shape {shape}", "(2, 5)", "(2,)", op=op, **{name: torch.ones(shape, device=DEVICE)})


@pytest.mark.parametrize("dtype", (torch.complex64, torch.bool))
def test_row_values_that_are_not_real(op: str, dtype: torch.dtype) -> None:
    refuses(TypeError, f"k has dtype {dtype}", "(2,)", op=op, k=torch.ones(2, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize(
    ("op", "name"),
    [("soft_topk", "k"), ("soft_topk", "eps"), ("soft_topk", "mask"), ("coordinate_descent", "k"), ("coordinate_descent", "mask")],
)
def test_devices_that_differ(op: str, name: str) -> None:
    elsewhere = torch.ones((2, 5) if name == "mask" else (2,), dtype=torch.bool if name == "mask" else None, device="meta")
    refuses(ValueError, name, "meta", DEVICE, str(tuple(elsewhere.shape)), "(2, 5)", op=op, **{name: elsewhere})


@pytest.mark.parametrize("impl", ("cuda", "", None))
def test_an_unknown_backend(op: str, impl: Any) -> None:
    refuses(ValueError, f"impl is {impl!r}", "'auto', 'triton' and 'torch'", op=op, impl=impl)


def test_integers_and_their_like_are_numbers(op: str) -> None:
    s = rows(2, 20)
    assert torch.equal(call(op, s, np.float64(2)), call(op, s, 2))
    assert torch.equal(call(op, s, np.int64(2)), call(op, s, 2.0))
    assert torch.equal(call(op, s, torch.tensor([2, 2], device=DEVICE)), call(op, s, torch.tensor([2.0, 2.0], device=DEVICE)))


# --- rows that are unlike others -------------------------------------------------------------------------------------


def test_a_row_that_is_all_masked(op: str, variant: str) -> None:
    s = rows(4, 20)
    s[1] = NAN
    s[2] = INF
    mask = torch.zeros(4, 20, dtype=torch.bool, device=DEVICE)
    mask[3] = True
    k = leaf([2.0, 2.0, 0.0, 2.0])
    lam = call(op, s.requires_grad_(), k, mask=mask, impl=variant)
    assert not lam[:3].any()
    near(lam[3:], truth(op, s[3:], 2.0).lam)
    ds, dk = grads(lam, [s, k])
    assert not ds[:3].any() and not dk[:3].any()
    assert bool(ds[3].any()) and bool(dk[3] != 0)


def test_no_valid_entry_without_a_mask(op: str, variant: str) -> None:
    s = torch.full((2, 20), -INF, device=DEVICE).requires_grad_()
    k = leaf([2.0, 0.0])
    lam = call(op, s, k, impl=variant)
    assert not lam.any()
    for grad in grads(lam, [s, k]):
        assert not grad.any()


@pytest.mark.parametrize("where", (0, 39))
def test_nan_spoils_its_row_only(op: str, variant: str, where: int) -> None:
    clean = rows(4, 40)
    g = rows(4, 40)
    s = clean.clone()
    s[1, where] = NAN
    s.requires_grad_()
    k, clean_k = leaf([2.5] * 4), leaf([2.5] * 4)
    lam = call(op, s, k, impl=variant)
    clean.requires_grad_()
    wanted = call(op, clean, clean_k, impl=variant)
    assert bool(lam[1].isnan().all())
    others = [0, 2, 3]
    assert torch.equal(lam[others], wanted[others])
    for grad, clean_grad in zip(grads(lam, [s, k], g), grads(wanted, [clean, clean_k], g), strict=True):
        assert bool(grad[1].isnan().all())
        assert torch.equal(grad[others], clean_grad[others])


@pytest.mark.parametrize("k", (0, 5.0, 1e3))
def test_nan_spoils_its_row_whatever_the_budget(op: str, variant: str, k: float) -> None:
    s = rows(2, 5)
    s[0, 2] = NAN
    lam = call(op, s, k, impl=variant)
    assert bool(lam[0].isnan().all()) and bool(lam[1].isfinite().all())


@pytest.mark.parametrize("value", (NAN, INF, -INF, 1e38))
def test_what_is_masked_has_no_influence(op: str, variant: str, value: float) -> None:
    s, g = rows(3, 20), rows(3, 20)
    mask = torch.rand(3, 20, device=DEVICE) < 0.6
    odd = torch.where(mask, s, value).requires_grad_()
    # neither its score nor what comes back to it
    odd_g = torch.where(mask, g, NAN)
    s.requires_grad_()
    k, odd_k = leaf([2.5] * 3), leaf([2.5] * 3)
    lam, wanted = call(op, odd, odd_k, mask=mask, impl=variant), call(op, s, k, mask=mask, impl=variant)
    assert torch.equal(lam, wanted) and not lam[~mask].any()
    for grad, clean_grad in zip(grads(lam, [odd, odd_k], odd_g), grads(wanted, [s, k], g), strict=True):
        assert torch.equal(grad, clean_grad)
    assert not grads(call(op, odd, 2.5, mask=mask, impl=variant), [odd], odd_g)[0][~mask].any()


def test_a_gradient_of_nan_at_a_saturated_entry(variant: str) -> None:
    """Whatever a saturated entry gets back, it has no part in the gradient."""
    s = torch.tensor([[5.0, 0.1, 0.0, 0.2]], device=DEVICE).requires_grad_()
    lam = coordroute.soft_topk(s, 1.5, eps=0.1, impl=variant)
    assert lam[0, 0] == 1
    (ds,) = grads(lam, [s], torch.tensor([[NAN, 1.0, 2.0, 3.0]], device=DEVICE))
    assert ds[0, 0] == 0 and bool(ds.isfinite().all()) and bool(ds[0, 1:].all())


def test_infinite_scores(op: str, variant: str) -> None:
    s, g = rows(4, 20), rows(4, 20)
    s[0, 3], s[0, 7] = INF, -INF
    s[1, [1, 2, 4]] = INF  # as many as the budget
    s[2, :5] = INF  # more than the budget
    s[3] = INF
    s.requires_grad_()
    k = leaf([3.0] * 4)
    lam = call(op, s, k, impl=variant)
    plus, minus = s == INF, s == -INF
    assert bool((lam[plus] == 1).all()) and not lam[minus].any()
    wanted = truth(op, s, 3.0, g=g)
    near(lam, wanted.lam)
    ds, dk = grads(lam, [s, k], g)
    assert not ds[plus].any() and not ds[minus].any()
    near(ds, wanted.grad_scores, 1e-4)
    near(dk, wanted.grad_k, 1e-4)


def test_the_largest_numbers_keep_and_the_smallest_mask(op: str, variant: str) -> None:
    """A score of finfo.max is always taken and one of finfo.min never, side by side, though no number is their difference."""
    most = torch.finfo(torch.float32).max
    s, g = rows(4, 20), rows(4, 20)
    plus, minus = torch.zeros(4, 20, dtype=torch.bool), torch.zeros(4, 20, dtype=torch.bool)
    plus[0, 0], minus[0, 7] = True, True
    plus[1, 7], minus[1, 0] = True, True
    plus[2, [2, 5]], minus[2, 9:] = True, True
    plus[3, 0], minus[3, 1:12] = True, True
    plus, minus = plus.to(DEVICE), minus.to(DEVICE)
    ends = torch.where(plus, most, torch.where(minus, -most, s)).requires_grad_()
    k = leaf([3.0] * 4)
    lam = call(op, ends, k, impl=variant)
    assert bool((lam[plus] == 1).all()) and not lam[minus].any()
    # so far from the others it is the same how far, and the oracle adds up what is not too far
    wanted = truth(op, torch.where(plus, 1e3, torch.where(minus, -1e3, s)), 3.0, g=g)
    near(lam, wanted.lam)
    ds, dk = grads(lam, [ends, k], g)
    assert not ds[plus].any() and not ds[minus].any()
    near(ds, wanted.grad_scores, 1e-4)
    near(dk, wanted.grad_k, 1e-4)


def test_minus_infinity_is_a_mask(op: str, backend: str) -> None:
    s, g = rows(3, 20), rows(3, 20)
    mask = torch.rand(3, 20, device=DEVICE) < 0.6
    masked = s.clone().requires_grad_()
    low = torch.where(mask, s, -INF).requires_grad_()
    lam, wanted = call(op, low, 2.5, impl=backend), call(op, masked, 2.5, mask=mask, impl=backend)
    assert torch.equal(lam, wanted)
    assert torch.equal(grads(lam, [low], g)[0], grads(wanted, [masked], g)[0])


@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (0, 0), (0,), (2, 0, 3), (0, 3, 4), (2, 3, 0)))
def test_empty_tensors(op: str, variant: str, shape: tuple[int, ...]) -> None:
    for dim in range(len(shape)):
        lead = shape[:dim] + shape[dim + 1 :]
        s, k = rows(*shape).requires_grad_(), leaf(torch.full(lead, 2.0))
        inputs, options = [s, k], {}
        if op == "soft_topk":
            eps = leaf(torch.full(lead, 0.1))
            inputs, options = [*inputs, eps], {"eps": eps}
        mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
        lam = call(op, s, k, dim=dim, mask=mask, impl=variant, **options)
        assert lam.shape == s.shape and lam.dtype == s.dtype
        for value, grad in zip(inputs, grads(lam, inputs), strict=True):
            assert grad.shape == value.shape and not grad.any()
        assert call(op, s, 2.0, dim=dim, impl=variant).shape == shape


def test_one_entry(op: str, variant: str) -> None:
    s = torch.tensor([[3.0], [-2.0], [0.5]], device=DEVICE).requires_grad_()
    k = leaf([0.25, 1.0, 0.0])
    lam = call(op, s, k, impl=variant)
    near(lam, truth(op, s, k).lam)
    if op == "soft_topk":
        near(lam, [[0.25], [1.0], [0.0]], 1e-7)
    ds, dk = grads(lam, [s, k], torch.ones_like(lam))
    wanted = truth(op, s, k, g=torch.ones_like(lam))
    near(ds, wanted.grad_scores)
    near(dk, wanted.grad_k)
    near(call(op, s[0], 0.25, impl=variant), truth(op, s[:1], 0.25).lam[0])


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_the_dtype_that_comes_back(op: str, backend: str, dtype: torch.dtype) -> None:
    s, g = rows(3, 33).to(dtype), rows(3, 33).to(dtype)
    s.requires_grad_()
    k = leaf([2.5] * 3, dtype)
    lam = call(op, s, k, impl=backend)
    ds, dk = grads(lam, [s, k], g)
    assert lam.dtype == ds.dtype == dk.dtype == dtype and lam.device == s.device
    if dtype in (torch.float16, torch.bfloat16):
        # computed in float32: the very bits of a float32 call, rounded once
        exactly = dtype == torch.float16 or backend == "torch" or DEVICE == "cuda"
        wide, wide_k = leaf(s.detach()), leaf([2.5] * 3)
        wide_lam = call(op, wide, wide_k, impl=backend)
        wide_ds, wide_dk = grads(wide_lam, [wide, wide_k], g.float())
        assert torch.equal(dk, wide_dk.to(dtype))
        for narrow, wanted in ((lam, wide_lam), (ds, wide_ds)):
            # Triton's interpreter rounds to bfloat16 by dropping bits
            cut = (wanted.view(torch.int32) >> 16 << 16).view(torch.float32)
            assert torch.equal(narrow, wanted.to(dtype) if exactly else cut.to(dtype))


def test_float64_is_computed_in_float64(op: str, variant: str) -> None:
    s, g = rows(3, 33, dtype=torch.float64), rows(3, 33, dtype=torch.float64)
    mask = torch.rand(3, 33, device=DEVICE) < 0.7
    k = leaf([0.4, 2.5, 7.0], torch.float64)
    s.requires_grad_()
    lam = call(op, s, k, mask=mask, impl=variant)
    wanted = truth(op, s, k, mask, g)
    near(lam, wanted.lam, 1e-12)
    ds, dk = grads(lam, [s, k], g)
    near(ds, wanted.grad_scores, 1e-11)
    near(dk, wanted.grad_k, 1e-11)
    if op == "soft_topk":
        eps = leaf([0.1] * 3, torch.float64)
        near(grads(coordroute.soft_topk(s, k, eps=eps, mask=mask, impl=variant), [eps], g)[0], wanted.grad_eps, 1e-10)


def test_a_row_value_of_another_dtype_has_its_own_gradient(op: str, backend: str) -> None:
    s = rows(2, 20).requires_grad_()
    k = leaf([2.5, 3.5], torch.float64)
    (dk,) = grads(call(op, s, k, impl=backend), [k])
    assert dk.dtype == torch.float64 and bool(dk.all())


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", (0, 1, 2, -2))
def test_any_dimension(op: str, backend: str, dim: int) -> None:
    s, g = rows(2, 3, 5), rows(2, 3, 5)
    mask = torch.rand(2, 3, 5, device=DEVICE) < 0.8
    lead = [size for i, size in enumerate(s.shape) if i != dim % 3]
    k = leaf(torch.rand(lead) + 0.5)
    s.requires_grad_()
    lam = call(op, s, k, dim=dim, mask=mask, impl=backend)
    assert lam.shape == s.shape
    flat, flat_mask, flat_g = (x.detach().movedim(dim, -1).reshape(-1, s.shape[dim]).contiguous() for x in (s, mask, g))
    flat_k = leaf(k.detach().reshape(-1))
    flat.requires_grad_()
    wanted = call(op, flat, flat_k, mask=flat_mask, impl=backend)
    assert torch.equal(lam.movedim(dim, -1).reshape(flat.shape), wanted)
    near(wanted, truth(op, flat, flat_k.detach().clamp(max=flat_mask.sum(-1)), flat_mask).lam)
    ds, dk = grads(lam, [s, k], g)
    flat_ds, flat_dk = grads(wanted, [flat, flat_k], flat_g)
    assert torch.equal(ds.movedim(dim, -1).reshape(flat.shape), flat_ds) and torch.equal(dk.reshape(-1), flat_dk)


@pytest.mark.parametrize("layout", ("transposed", "every second", "padded rows", "offset", "reversed rows"))
def test_any_strides(op: str, backend: str, layout: str) -> None:
    def laid_out(x: Tensor) -> Tensor:
        """The same values; what lies between is NaN, or True."""
        filler = NAN if x.is_floating_point() else True
        r, n = x.shape
        if layout == "transposed":
            return x.t().contiguous().t()
        wide = torch.full((2 * r, 2 * n + 3), filler, dtype=x.dtype, device=x.device)
        view = {
            "every second": wide[:r, 0 : 2 * n : 2],
            "padded rows": wide[:r, :n],
            "offset": wide[1 : r + 1, 3 : n + 3],
            "reversed rows": wide[: 2 * r : 2, :n],
        }[layout]
        view.copy_(x)
        return view

    s, g, mask = rows(3, 20), rows(3, 20), torch.rand(3, 20, device=DEVICE) < 0.7
    k = torch.tensor([1.5, 2.5, 3.5], device=DEVICE)
    other = laid_out(s).requires_grad_()
    strided_k = torch.stack([k, k + 7], dim=-1)[:, 0].requires_grad_()
    s.requires_grad_()
    k.requires_grad_()
    lam, wanted = call(op, other, strided_k, mask=laid_out(mask), impl=backend), call(op, s, k, mask=mask, impl=backend)
    assert other.shape == s.shape and torch.equal(lam, wanted)
    for grad, contiguous in zip(grads(lam, [other, strided_k], laid_out(g)), grads(wanted, [s, k], g), strict=True):
        assert torch.equal(grad, contiguous)


def test_expanded_tensors(op: str, backend: str) -> None:
    s, k = rows(1, 20).requires_grad_(), leaf([2.5])
    mask = torch.rand(20, device=DEVICE) < 0.8
    lam = call(op, s.expand(3, 20), k, mask=mask, impl=backend)
    wanted = call(op, s.detach().repeat(3, 1), 2.5, mask=mask.repeat(3, 1), impl=backend)
    near(lam, wanted)
    g = rows(1, 20).expand(3, 20)
    ds, dk = grads(lam, [s, k], g)
    one, one_k = leaf(s.detach()), leaf([2.5])
    one_ds, one_dk = grads(call(op, one, one_k, mask=mask, impl=backend), [one, one_k], g[:1])
    torch.testing.assert_close(ds, 3 * one_ds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dk, 3 * one_dk, rtol=1e-5, atol=1e-5)
    # one score a row, and every entry the same memory
    constant = call(op, torch.ones(1, 1, device=DEVICE).expand(3, 20), 2.5, impl=backend)
    near(constant, truth(op, torch.ones(3, 20), 2.5).lam)
    # the gradient of a sum is expanded along both
    ones = torch.ones(3, 20, device=DEVICE)
    ds = [grads(call(op, s.expand(3, 20), 2.5, mask=mask, impl=backend), [s], g)[0] for g in (ones, ones[:1, :1].expand(3, 20))]
    assert torch.equal(*ds)


def test_row_values_broadcast(op: str, backend: str) -> None:
    s = rows(2, 3, 10)
    k = leaf([[1.5], [2.5]])
    lam = call(op, s, k, impl=backend)
    for i in range(2):
        near(lam[i], truth(op, s[i], float(k[i].detach())).lam)
    (dk,) = grads(lam, [k])
    assert dk.shape == k.shape
    scalar = leaf(2.5)
    (dk,) = grads(call(op, s, scalar, impl=backend), [scalar])
    assert dk.shape == ()


def test_rows_that_lie_beyond_two_to_the_31(op: str, variant: str) -> None:
    """Two rows 2**31 elements apart: 4 GiB of address space, of which a few pages are touched."""
    far, n = 2**31, 20
    try:
        memory = [torch.empty(far + n, dtype=torch.float16, device=DEVICE) for _ in range(2)]
        mask_memory = torch.empty(far + n, dtype=torch.bool, device=DEVICE)
    except (RuntimeError, MemoryError) as error:
        pytest.skip(f"this machine does not give 10 GiB of address space: {error}")
    s, g = (rows(2, n).half() for _ in range(2))
    mask = torch.rand(2, n, device=DEVICE) < 0.7
    far_s, far_g, far_mask = (x.as_strided((2, n), (far, 1)) for x in (*memory, mask_memory))
    for view, value in ((far_s, s), (far_g, g), (far_mask, mask)):
        view.copy_(value)
    far_s, s = far_s.requires_grad_(), s.requires_grad_()
    lam, wanted = call(op, far_s, 2.5, mask=far_mask, impl=variant), call(op, s, 2.5, mask=mask, impl=variant)
    assert torch.equal(lam, wanted)
    assert torch.equal(grads(lam, [far_s], far_g)[0], grads(wanted, [s], g)[0])


@needs_gpu
@pytest.mark.parametrize("op", OPERATORS)
def test_more_than_two_to_the_31_elements(op: str) -> None:
    n = 32768
    r = 2**31 // n + 3
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    s = torch.empty(r, n, dtype=torch.float16, device=DEVICE).normal_().requires_grad_()
    lam = call(op, s, 100.0, impl="triton")
    last = s.detach()[-4:].clone().requires_grad_()
    wanted = call(op, last, 100.0, impl="triton")
    torch.testing.assert_close(lam[-4:], wanted, rtol=2e-3, atol=1e-6)
    g = torch.empty_like(lam).normal_()
    (ds,) = torch.autograd.grad(lam, s, g)
    torch.testing.assert_close(ds[-4:], grads(wanted, [last], g[-4:])[0], rtol=1e-2, atol=1e-3)


def test_inputs_are_never_written_to(op: str, variant: str) -> None:
    s, g, k = rows(3, 20), rows(3, 20), torch.tensor([2.5, -1.0, 99.0], device=DEVICE)
    s[0, 2], s[1, 3] = NAN, INF
    mask = torch.rand(3, 20, device=DEVICE) < 0.7
    given = [s, g, k, mask]
    eps = torch.tensor([0.1, 0.2, -1.0], device=DEVICE)
    if op == "soft_topk":
        given.append(eps)
    before = [x.clone() for x in given]
    for x in (s, k):
        x.requires_grad_()
    lam = call(op, s, k, mask=mask, impl=variant, **({"eps": eps} if op == "soft_topk" else {}))
    kept = lam.detach().clone()
    grads(lam, [s, k], g)
    for x, copy in zip([*given, lam.detach()], [*before, kept], strict=True):
        torch.testing.assert_close(x.detach(), copy, rtol=0, atol=0, equal_nan=True)


def test_the_result_is_its_own_memory(op: str, backend: str) -> None:
    for s in (rows(2, 20), torch.full((2, 20), -INF, device=DEVICE)):
        first = call(op, s, 20.0, impl=backend)
        again = call(op, s, 20.0, impl=backend)
        kept = again.clone()
        first.fill_(NAN)
        assert torch.equal(again, kept) and not s.isnan().any()


# --- how it is called ------------------------------------------------------------------------------------------------


def test_the_same_call_twice_is_bitwise_the_same(op: str, variant: str) -> None:
    s, g, mask = rows(4, 40), rows(4, 40), torch.rand(4, 40, device=DEVICE) < 0.9
    results = []
    for _ in range(2):
        x, k = leaf(s), leaf([0.3, 2.5, 7.0, 12.0])
        lam = call(op, x, k, mask=mask, impl=variant)
        results.append([lam, *grads(lam, [x, k], g)])
        call(op, 3 * s, 1.0, impl=variant)  # something else in between
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16))
def test_autocast_does_not_cast_the_scores_down(op: str, backend: str, low: torch.dtype) -> None:
    s, g = rows(3, 20), rows(3, 20)
    results = []
    for enabled in (False, True):
        x, k = leaf(s), leaf([2.5] * 3)
        with torch.autocast(DEVICE, dtype=low, enabled=enabled):
            lam = call(op, x, k, impl=backend)
        assert lam.dtype == torch.float32
        results.append([lam, *grads(lam, [x, k], g)])
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_auto_is_one_of_both(op: str) -> None:
    s = rows(3, 20)
    by_name = "triton" if DEVICE == "cuda" and ops.triton_available() else "torch"
    assert torch.equal(call(op, s, 2.5), call(op, s, 2.5, impl=by_name))


@needs_triton
def test_a_backend_asked_for_by_name_never_falls_back(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module(f"coordroute.kernels.{op}")

    class Broken(Exception):
        pass

    def broken(*_: Any) -> Any:
        raise Broken

    s = rows(2, 20).requires_grad_()
    for direction in ("forward", "backward"):
        for mine, other, impl in ((module, cpu, "triton"), (cpu, module, "torch")):
            with monkeypatch.context() as patch:
                # the other backend is never touched …
                patch.setattr(other, f"{op}_{direction}", broken)
                grads(call(op, s, 2.5, impl=impl), [s])
            with monkeypatch.context() as patch:
                # … and what fails in this one is the caller's to see
                patch.setattr(mine, f"{op}_{direction}", broken)
                with pytest.raises(Broken):
                    grads(call(op, s, 2.5, impl=impl), [s])


def test_triton_by_name_without_triton(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "triton_available", lambda: False)
    refuses(RuntimeError, "impl='triton'", "not installed", "impl='torch'", op=op, impl="triton")
    near(call(op, rows(2, 20), 20.0).sum(-1).clamp(max=0), [0.0, 0.0])  # "auto" still runs


@needs_triton
def test_triton_by_name_where_it_cannot_run(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    refuses(ValueError, "impl='triton'", "cpu", "TRITON_INTERPRET", op=op, scores=torch.zeros(2, 5), impl="triton")
    refuses(ValueError, "impl='triton'", "meta", op=op, scores=torch.zeros(2, 5, device="meta"), impl="triton")


def python(code: str) -> str:
    """The output of a new interpreter."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_without_triton_the_package_imports_and_the_torch_backend_runs() -> None:
    # None in sys.modules is what a package that is not installed looks like, to import and to find_spec
    code = """
import sys
sys.modules["triton"] = None
import torch, coordroute
s = torch.randn(3, 20, requires_grad=True)
coordroute.soft_topk(s, 2.0).sum().backward()
coordroute.coordinate_descent(s, 2.0, n_iters=4).sum().backward()
router = coordroute.Router(8)
assert router(torch.randn(2, 16, 8), num_tokens=4).indices.shape == (2, 4)
assert not [name for name in sys.modules if name.startswith("triton.")], "Triton was imported"
try:
    coordroute.soft_topk(s, 2.0, impl="triton")
except RuntimeError as error:
    print(error)
"""
    assert "Triton is not installed" in python(code)


def test_import_is_lazy_and_touches_no_gpu() -> None:
    code = """
import sys, coordroute
print("torch" in sys.modules, "triton" in sys.modules)
from coordroute import Router, soft_topk
import torch
print(torch.cuda.is_initialized(), "coordroute.kernels.soft_topk" in sys.modules)
"""
    assert python(code).split() == ["False"] * 4


def test_meta_tensors_have_shapes(op: str) -> None:
    s = torch.empty(2, 3, 40, device="meta", dtype=torch.bfloat16)
    lam = call(op, s, 2.0, dim=1)
    assert lam.shape == s.shape and lam.dtype == s.dtype and lam.device == s.device


# --- gradients through the kernels -----------------------------------------------------------------------------------


S64 = torch.tensor(
    [[0.31, -0.52, 0.88, 0.05, -1.13, 0.47], [-0.21, 1.37, 0.66, -0.74, 0.02, 0.29]], dtype=torch.float64, device=DEVICE
)
MASK = torch.tensor([[True, True, False, True, True, True], [True, True, True, True, True, True]], device=DEVICE)
MARGIN = 1e-3
"""How far, at least, every score of a gradient check is from every threshold that it meets."""


def check(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], whole: bool) -> None:
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=not whole)


def whole_jacobian(request: pytest.FixtureRequest, *cases: str) -> bool:
    """Whether to compare every entry; where the interpreter is slow, a random projection of the Jacobian, but for ``cases``."""
    return request.node.callspec.params["variant"] == "torch" or DEVICE == "cuda" or request.node.callspec.id in cases


@pytest.mark.parametrize("masked", (False, True))
def test_gradcheck_of_soft_topk(request: pytest.FixtureRequest, variant: str, masked: bool) -> None:
    mask = MASK if masked else None
    k, eps = leaf([2.3, 1.7], torch.float64), leaf([0.3, 0.2], torch.float64)
    wanted, tau = oracles.soft_topk_numpy(numpy(S64), numpy(k), numpy(eps), None if mask is None else numpy(mask))
    assert (wanted == 1).any() and np.abs(numpy(S64) - tau[:, None]).min() > MARGIN

    def function(s: Tensor, k: Tensor, eps: Tensor) -> Tensor:
        return coordroute.soft_topk(s, k, eps=eps, mask=mask, impl=variant)

    check(function, (leaf(S64, torch.float64), k, eps), whole_jacobian(request, "triton-True"))


SCHEDULES: dict[str, dict[str, Any]] = {
    "constant eps": {"n_iters": 6, "eps": 0.3},
    "eps scaling": {"n_iters": 6, "eps": 0.2, "eps_init": 2.0, "eps_decay": 0.5},
    "never at its floor": {"n_iters": 5, "eps": 0.01, "eps_init": 1.0, "eps_decay": 0.8},
    "one iteration": {"n_iters": 1, "eps": 0.3},
}


@pytest.mark.parametrize(
    ("schedule", "segments", "masked"),
    [
        ("constant eps", 1, False),
        ("constant eps", 4, True),
        ("eps scaling", 2, True),
        ("eps scaling", 6, False),
        ("eps scaling", None, True),
        ("never at its floor", 2, True),
        ("one iteration", 1, True),
    ],
)
def test_gradcheck_of_coordinate_descent(
    request: pytest.FixtureRequest, variant: str, schedule: str, segments: int | None, masked: bool
) -> None:
    options = SCHEDULES[schedule]
    mask = MASK if masked else None
    k = leaf([2.3, 1.7], torch.float64)
    trace = oracles.coordinate_descent_numpy(numpy(S64), numpy(k), **options, mask=None if mask is None else numpy(mask))[1]
    assert np.abs(numpy(S64) + trace[:, :, None]).min() > MARGIN

    def function(s: Tensor, k: Tensor) -> Tensor:
        return coordroute.coordinate_descent(s, k, **options, mask=mask, checkpoint_segments=segments, impl=variant)

    check(function, (leaf(S64, torch.float64), k), whole_jacobian(request, "triton-eps scaling-2-True"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("schedule", ("constant eps", "eps scaling"))
def test_the_gradient_is_the_same_for_every_number_of_segments(variant: str, schedule: str, dtype: torch.dtype) -> None:
    options = {**SCHEDULES[schedule], "n_iters": 5}
    s, g = rows(3, 20, dtype=dtype), rows(3, 20, dtype=dtype)
    mask = torch.rand(3, 20, device=DEVICE) < 0.8
    results = []
    for segments in range(1, 6):
        x, k = leaf(s, dtype), leaf([1.5, 4.5, 7.0], dtype)
        lam = coordroute.coordinate_descent(x, k, **options, mask=mask, checkpoint_segments=segments, impl=variant)
        results.append([lam, *grads(lam, [x, k], g)])
    assert bool(results[0][1].any()) and bool(results[0][2].any())
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            assert torch.equal(first, other)
