"""The registered operators as torch sees them: schemas, fakes, autograd, and torch.compile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import coordroute
import pytest
import torch
from coordroute.kernels import ops
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPL = ops.default_impl(torch.device(DEVICE))
OPERATORS = ("soft_topk", "coordinate_descent")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def call(op: str, scores: Tensor, k: Any, **options: Any) -> Tensor:
    if op == "soft_topk":
        return coordroute.soft_topk(scores, k, **{"eps": 0.3, **options})
    return coordroute.coordinate_descent(scores, k, n_iters=6, eps=0.3, eps_init=2.0, eps_decay=0.5, **options)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).to(DEVICE)


def leaf(values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.as_tensor(values, dtype=dtype, device=DEVICE).clone().requires_grad_()


# --- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("with_tensors", (False, True))
@pytest.mark.parametrize("name", ("soft_topk", "soft_topk_backward", "coordinate_descent", "coordinate_descent_backward"))
def test_opcheck(name: str, with_tensors: bool, dtype: torch.dtype) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    s, g = rows(3, 12).to(dtype), rows(3, 12).to(dtype)
    k = leaf([1.5, 2.5, 99.0], compute) if with_tensors else None
    eps = leaf([0.1, 0.2, 0.3], compute) if with_tensors else None
    mask = (rows(3, 12) > -1) if with_tensors else None
    schedule = (6, 0.3, 2.0, 0.5)
    if name.startswith("soft_topk"):
        arguments: tuple[Any, ...] = (s.requires_grad_(), k, 2.5, eps, 0.1, mask, IMPL)
        if name.endswith("backward"):
            threshold = torch.ops.coordroute.soft_topk(*arguments)[1].detach()
            arguments = (g.requires_grad_(), s, threshold, k, 2.5, eps, 0.1, mask, IMPL)
    else:
        arguments = (s.requires_grad_(), k, 2.5, mask, *schedule, 4, True, IMPL)
        if name.endswith("backward"):
            states = torch.ops.coordroute.coordinate_descent(*arguments)[1].detach()
            arguments = (g, s.detach(), states, None if k is None else k.detach(), 2.5, mask, *schedule, True, IMPL)
    operator = getattr(torch.ops.coordroute, name).default
    assert torch.library.opcheck(operator, arguments, test_utils=CHECKS) == dict.fromkeys(CHECKS, "SUCCESS")


def test_the_state_of_the_solver_is_not_differentiable() -> None:
    """It has no gradient formula, and says so."""
    s = rows(2, 12).requires_grad_()
    lam, threshold = torch.ops.coordroute.soft_topk(s, None, 2.5, None, 0.1, None, IMPL)
    assert lam.requires_grad and not threshold.requires_grad
    lam, states = torch.ops.coordroute.coordinate_descent(s, None, 2.5, None, 6, 0.3, 2.0, 0.5, 4, True, IMPL)
    assert lam.requires_grad and not states.requires_grad


@pytest.mark.parametrize("op", OPERATORS)
def test_only_the_gradients_that_are_asked_for(op: str) -> None:
    s, k = rows(3, 12), leaf([1.5, 2.5, 3.5])
    (dk,) = torch.autograd.grad(call(op, s, k), k, torch.ones(3, 12, device=DEVICE))
    assert dk.shape == (3,) and bool(dk.any())
    assert not call(op, s, k.detach()).requires_grad
    with torch.no_grad():
        assert not call(op, s, k).requires_grad


def test_require_impl() -> None:
    with pytest.raises(ValueError, match="impl is 'tritron'; allowed are 'auto', 'triton' and 'torch'"):
        ops.require_impl("tritron", torch.device(DEVICE))
    ops.require_impl("torch", torch.device(DEVICE))
    assert ops.default_impl(torch.device("cpu")) == "torch"


# --- torch.compile ---------------------------------------------------------------------------------------------------


def outcome(function: Any, scores: Tensor, k: Tensor, g: Tensor, **options: Any) -> list[Tensor]:
    """The value and the gradients."""
    s, k = leaf(scores, scores.dtype), leaf(k, k.dtype)
    lam = function(s, k, **options)
    return [lam, *torch.autograd.grad(lam, [s, k], g)]


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("dim", (-1, 0))
@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_is_eager(op: str, dim: int, masked: bool) -> None:
    s, g = rows(5, 12), rows(5, 12)
    k = torch.rand(12 if dim == 0 else 5, device=DEVICE) + 1.0
    mask = (rows(5, 12) > -1) if masked else None

    def function(s: Tensor, k: Tensor) -> Tensor:
        return 2 * call(op, s.sin(), k, dim=dim, mask=mask)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for first, second in zip(outcome(function, s, k, g), outcome(compiled, s, k, g), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_with_numbers(op: str) -> None:
    """k and eps as numbers, another one each time."""
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    s = rows(3, 12)
    for k in (2, 2.5, 3.75):
        assert torch.equal(compiled(op, s, k), call(op, s, k))


@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_with_a_budget_that_depends_on_the_length(op: str) -> None:
    """A new length is a new number k, and no reason to compile anew."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(s: Tensor, k: Tensor) -> Tensor:
        return call(op, s, s.shape[-1] // 4) + k[:, None] * call(op, s, s.shape[-1] * 9 / 64)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in (24, 40, 33, 64, 7):
        s, k, g = rows(3, n), torch.ones(3, device=DEVICE), rows(3, n)
        for first, second in zip(outcome(function, s, k, g), outcome(compiled, s, k, g), strict=True):
            assert torch.equal(first, second)
    assert counter.frame_count <= 2, "once for the first length, and once for any"


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("strict", (False, True))
def test_exported_with_a_budget_that_depends_on_the_length(op: str, strict: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, s: Tensor) -> Tensor:
            return call(op, s, s.shape[-1] // 4)

    lengths = {"s": {1: torch.export.Dim("n", min=8, max=4096)}}
    program = torch.export.export(Module(), (rows(3, 24),), dynamic_shapes=lengths, strict=strict).module()
    for n in (24, 33):
        s = rows(3, n)
        assert torch.equal(program(s), call(op, s, n // 4))


def test_compiled_with_a_temperature_in_a_tensor() -> None:
    s, eps, g = rows(3, 12), torch.tensor([0.1, 0.2, 0.4], device=DEVICE), rows(3, 12)

    def function(s: Tensor, eps: Tensor) -> Tensor:
        return coordroute.soft_topk(s, 2.5, eps=eps)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for first, second in zip(outcome(function, s, eps, g), outcome(compiled, s, eps, g), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_new_length_does_not_compile_anew(op: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda s, k: call(op, s, k), fullgraph=True, backend=counter)
    for n, r in ((12, 3), (13, 4), (14, 5), (33, 6), (64, 7), (7, 2)):
        s, k, g = rows(r, n), torch.full((r,), 2.5, device=DEVICE), rows(r, n)
        for first, second in zip(outcome(lambda s, k: call(op, s, k), s, k, g), outcome(compiled, s, k, g), strict=True):
            assert torch.equal(first, second)
    assert counter.frame_count <= 2, "once for the first length, and once for any"


@pytest.mark.parametrize("op", OPERATORS)
def test_dynamic_from_the_start_compiles_once(op: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda s: call(op, s, 2.5), fullgraph=True, dynamic=True, backend=counter)
    for n in (12, 13, 40, 64):
        s = rows(3, n)
        assert torch.equal(compiled(s), call(op, s, 2.5))
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", OPERATORS)
def test_errors_are_the_same_when_compiled(op: str) -> None:
    compiled = torch.compile(lambda s, k: call(op, s, k), backend="aot_eager")
    with pytest.raises(ValueError, match="k has shape"):
        compiled(rows(3, 12), torch.ones(5, device=DEVICE))


ROUTERS: dict[str, dict[str, Any]] = {
    "exact": {},
    "coordinate descent": {"solver": "coordinate_descent", "n_iters": 6},
    "routes": {"num_routes": 2, "cosine_sim_routing": True},
    "blocks": {"route_block_size": 8},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_compiled_router_is_the_eager_one(name: str) -> None:
    router = coordroute.Router(8, eps=0.5, straight_through=False, **{"fetch_k_ratio": 1.5, **ROUTERS[name]}).to(DEVICE)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for n in (24, 27):
        x, mask = rows(2, n, 8), rows(2, n) > -1
        results = []
        for module in (router, compiled):
            y = x.clone().requires_grad_()
            routed = module(y, num_tokens=6, mask=mask)
            out = y + 0
            if routed.indices.dim() == 2:
                update = routed.routed_tokens.tanh() * routed.scores[..., None]
                out = out + router.route_back(torch.zeros_like(y), update, routed.indices)
            loss = out.square().sum() + routed.scores.sum()
            results.append([*routed, *torch.autograd.grad(loss, [y, router.routing_token])])
        for first, second in zip(*results, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cpu" and shutil.which("g++") is None, reason="Inductor needs a C++ compiler for the CPU")
def test_inductor() -> None:
    def function(s: Tensor, k: Tensor) -> Tensor:
        return call("soft_topk", 2 * s, k) + call("coordinate_descent", s + 1, k)

    s, k, g = rows(3, 12), torch.tensor([1.5, 2.5, 3.5], device=DEVICE), rows(3, 12)
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    for first, second in zip(outcome(function, s, k, g), outcome(compiled, s, k, g), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
