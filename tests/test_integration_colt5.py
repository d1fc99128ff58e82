"""CoLT5-attention on our operators: the real package, patched and as published, and its router converted."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import coordroute
import pytest
import torch
from coordroute import patch_colt5
from coordroute.integrations import colt5, colt5_check
from coordroute.kernels import ops
from torch import Tensor, nn

published = pytest.importorskip("colt5_attention")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("coor_descent", "triton_coor_descent", "topk")
SCHEDULE: dict[str, Any] = {"n_iters": 20, "eps": 0.1, "eps_init": 4.0, "eps_decay": 0.7}
EXACT_SCHEDULE: dict[str, Any] = {"n_iters": 20, "eps": 0.125, "eps_init": 4.0, "eps_decay": 0.5}
"""Every eps of it is a float32. Triton hands numbers over as such, also where the published kernel computes in float64."""
HAS_TOPK = hasattr(published, "topk")
VERSION = tuple(map(int, importlib.metadata.version("CoLT5-attention").split(".")))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    colt5._undo()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the scores that our operator gets to see."""
    seen: list[tuple[int, ...]] = []
    operator = ops.coordinate_descent_rows

    def recorded(scores: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(tuple(scores.shape))
        return operator(scores, *rest, **options)

    monkeypatch.setattr(ops, "coordinate_descent_rows", recorded)
    return seen


def held() -> dict[str, Any]:
    """What the modules of the package hold under the names that are replaced."""
    found = {}
    for module in [name for name in sys.modules if name.split(".")[0] == "colt5_attention"]:
        for name in NAMES:
            value = vars(sys.modules[module]).get(name)
            if callable(value):
                found[f"{module}.{name}"] = value
    return found


def leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def norm_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


# --- the patch -------------------------------------------------------------------------------------------------------


def test_everything_is_replaced_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("colt5_attention.triton_coor_descent")
    user = ModuleType("a_users_module")
    vars(user)["mine"] = published.coor_descent
    monkeypatch.setitem(sys.modules, user.__name__, user)
    before = held()
    assert len(before) >= 5

    patch = patch_colt5()
    after = held()
    assert after.keys() == before.keys()
    assert all(value is not before[where] for where, value in after.items())
    assert user.mine is published.coor_descent is not before["colt5_attention.coor_descent"]
    text = str(patch)
    assert importlib.metadata.version("CoLT5-attention") in text.splitlines()[0] and text == repr(patch)
    for where in (*before, "a_users_module.mine", "CoordinateDescentRouter().coor_descent"):
        assert any(where in line and "→ coordroute.coordinate_descent" in line for line in text.splitlines())
    assert patch_colt5().replaced == patch.replaced and held() == after, "again: nothing changes"

    late = ModuleType("imported_meanwhile")
    vars(late)["coor_descent"] = published.coor_descent
    monkeypatch.setitem(sys.modules, late.__name__, late)
    patch.undo()
    assert held() == before and user.mine is late.coor_descent is before["colt5_attention.coor_descent"]
    assert not hasattr(published.CoordinateDescentRouter, "coor_descent")
    patch.undo()
    assert held() == before


def test_a_context_restores_what_it_found() -> None:
    before = held()
    with patch_colt5():
        assert held() != before
        with patch_colt5():
            pass
        assert held() != before, "the outer one still holds"
    assert held() == before
    with pytest.raises(KeyError), patch_colt5():
        raise KeyError
    assert held() == before


@pytest.mark.parametrize("use_triton", (False, True))
def test_models_that_exist_and_models_made_meanwhile(use_triton: bool, calls: list[tuple[int, ...]]) -> None:
    options: dict[str, Any] = {"use_triton": use_triton, "straight_through": False}
    old = published.CoordinateDescentRouter(8, **options).to(DEVICE)
    x = rows(2, 24, 8, dtype=torch.float32)
    with patch_colt5():
        new = published.CoordinateDescentRouter(8, **options).to(DEVICE)
        copies = [copy.deepcopy(new), pickle.loads(pickle.dumps(new))]
        for count, router in enumerate((old, new, *copies), start=1):
            router(x, num_tokens=5)
            assert len(calls) == count
    for router in (old, new, *copies):
        router(x, num_tokens=5)
        kept = router.coor_descent.func if use_triton else router.coor_descent
        assert kept is held()[f"colt5_attention.{kept.__name__}.{kept.__name__}"]
    assert len(calls) == 4, "and afterwards none of them is ours"


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"CoLT5-attention is not installed here.*pip install CoLT5-attention"):
        patch_colt5()


@pytest.mark.parametrize("version", ("0.8.1", "0.11.3", "1.0", "0.11.2rc1"))
def test_a_version_that_is_not_known(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    before = held()
    with pytest.raises(RuntimeError, match=f"of version {version}; known are 0.9.0 to 0.11.2. Nothing was patched"):
        patch_colt5()
    assert held() == before


@pytest.mark.parametrize("function", (None, lambda scores, k: scores))
def test_a_package_without_the_names_expected(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["colt5_attention.coor_descent"], "coor_descent", function)
    with pytest.raises(RuntimeError, match=r"colt5_attention\.coor_descent\.coor_descent .*s, n_iters, k.*Nothing was patched"):
        patch_colt5()


# --- the functions ---------------------------------------------------------------------------------------------------


def both(function: Any, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients, as published and patched. ``function`` looks up what it calls."""
    outcomes = []
    for patched in (False, True):
        if patched:
            patch_colt5()
        leaves = [leaf(value) for value in inputs]
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        loss = sum((part * torch.linspace(-1, 1, part.shape[-1], device=DEVICE)).sum() for part in out if part.is_floating_point())
        outcomes.append([*out, *torch.autograd.grad(loss, leaves)])
    colt5._undo()
    return outcomes[0], outcomes[1]


@pytest.mark.parametrize("k", ("number", "one for all", "one a row", "integer", "beyond the valid", "of a batch"))
@pytest.mark.parametrize("masked", (False, True))
def test_coor_descent(k: str, masked: bool) -> None:
    mask = (rows(3, 11) > -1) if masked else None
    s = rows(3, 11)
    budgets = {
        "number": 2.25,
        "one for all": torch.tensor([2.25], dtype=torch.float64),
        "one a row": torch.tensor([1.5, 2.5, 4.0], dtype=torch.float64),
        "integer": torch.tensor([3]),
        "beyond the valid": torch.tensor([13.0, 9.5, 11.0], dtype=torch.float64),
        "of a batch": torch.tensor([[1.5, 2.5, 4.0], [3.0, 2.0, 1.0]], dtype=torch.float64),
    }
    budget = budgets[k].to(DEVICE) if isinstance(budgets[k], Tensor) else budgets[k]
    differentiable = isinstance(budget, Tensor) and budget.is_floating_point()

    def function(s: Tensor, *rest: Tensor) -> Tensor:
        return sys.modules["colt5_attention.coor_descent"].coor_descent(s, k=rest[0] if rest else budget, mask=mask, **SCHEDULE)

    wanted, found = both(function, s, *([budget] if differentiable else []))
    for one, other in zip(wanted, found, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        # the published code has log k of an integer in float32
        torch.testing.assert_close(
            other, one, **({"rtol": 1e-5, "atol": 1e-6} if k == "integer" else {"rtol": 1e-9, "atol": 1e-11})
        )
    if k == "beyond the valid":
        clamped = coordroute.coordinate_descent(s, budget, mask=mask, **SCHEDULE)
        assert not masked or not torch.allclose(clamped, found[0]), "a k that is clamped gives another result"
    else:
        assert bool(wanted[1].any()), "there is a gradient to compare"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("k", (2.25, torch.tensor([2.25]), torch.tensor([2])))
def test_the_result_has_the_published_dtype(dtype: torch.dtype, k: Any) -> None:
    k = k.to(DEVICE) if isinstance(k, Tensor) else k
    wanted, found = both(lambda s: published.coor_descent(s, k=k, **SCHEDULE), rows(3, 11, dtype=dtype))
    assert [part.dtype for part in found] == [part.dtype for part in wanted]
    torch.testing.assert_close(found[0].float(), wanted[0].float(), rtol=0, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.skipif(DEVICE == "cpu", reason="autocast of the published functions is about CUDA")
@pytest.mark.parametrize("name", ("coor_descent", "triton_coor_descent"))
def test_the_result_has_the_published_dtype_under_autocast(name: str) -> None:
    def function(s: Tensor, name: str = name) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return getattr(importlib.import_module(f"colt5_attention.{name}"), name)(s, k=2.25, **SCHEDULE)

    s = rows(4, 64, dtype=torch.float32)
    wanted, found = both(function, s)
    assert [part.dtype for part in found] == [part.dtype for part in wanted]
    # the published kernel takes the logarithm of k in bfloat16, which Triton 3.6 does not compile; its result would be that of an
    # exp under the same autocast as in coor_descent
    wanted, _ = both(lambda s: function(s, "coor_descent"), s.bfloat16())
    with patch_colt5():
        leaves = leaf(s.bfloat16())
        out = function(leaves)
        grad = torch.autograd.grad(out.sum(), leaves)[0]
    assert [out.dtype, grad.dtype] == [part.dtype for part in wanted] and bool(out.isfinite().all())


@pytest.mark.skipif(DEVICE == "cpu", reason="the published kernel needs a GPU")
@pytest.mark.parametrize("k", (2.25, torch.full((6,), 2.25), torch.linspace(1, 6, 6)))
def test_triton_coor_descent(k: Any) -> None:
    """At a power of two and with one segment, where every version is right.

    A tensor k has one value a row: of one for all 0.11.2 makes an expanded tensor, and its kernel reads behind the only element.
    """
    module = importlib.import_module("colt5_attention.triton_coor_descent")
    k = k.to(DEVICE) if isinstance(k, Tensor) else k
    wanted, found = both(lambda s: module.triton_coor_descent(s, k=k, **SCHEDULE), rows(6, 64, dtype=torch.float32))
    for one, other in zip(wanted, found, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert norm_error(other, one) < 1e-4


@pytest.mark.skipif(not HAS_TOPK, reason="this version has no topk")
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("fused", (False, True))
def test_topk(masked: bool, fused: bool, calls: list[tuple[int, ...]]) -> None:
    mask = (rows(3, 40) > -1) if masked else None
    # with SCHEDULE the published kernel is off by what float32 loses of eps: 1e-8 of a value, 1e-6 of a gradient
    schedule = EXACT_SCHEDULE if fused else SCHEDULE
    wanted, found = both(lambda x: published.topk(x, 7, mask=mask, fused=fused, **schedule), rows(3, 40))
    assert len(wanted) == 5 and len(calls) == 1
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)
    with patch_colt5():
        x = rows(3, 40)
        result = published.topk(x, 7, non_differentiable=True)
        assert type(result).__name__ == "TopkReturn" and torch.equal(result.values, x.topk(7).values)
        with pytest.raises(ValueError, match="k is 0"):
            published.topk(x, 0)


# --- models ----------------------------------------------------------------------------------------------------------


def transformer_block(straight_through: bool) -> tuple[nn.Module, dict[str, Any]]:
    block = published.ConditionalRoutedTransformerBlock(
        32,
        num_heavy_attn_tokens_q=12,
        num_heavy_attn_tokens_kv=16,
        num_heavy_ff_tokens=12,
        num_routed_kv=2,
        light_dim_head=8,
        light_heads=2,
        light_window_size=16,
        heavy_dim_head=8,
        heavy_heads=4,
        router_straight_through=straight_through,
        router_kwargs={"eps": 1.0},
    )
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, 50:] = False
    return block, {"mask": mask}


def autoregressive_attention(straight_through: bool) -> tuple[nn.Module, dict[str, Any]]:
    attention = published.ConditionalRoutedAutoregressiveAttention(
        32,
        num_heavy_tokens_q=8,
        num_heavy_tokens_kv=20,  # more than the first window may see
        num_routed_kv=2,
        light_dim_head=8,
        light_heads=2,
        light_window_size=16,
        heavy_window_size=16,
        heavy_dim_head=8,
        heavy_heads=4,
        router_straight_through=straight_through,
        router_kwargs={"eps": 1.0},
        multiply_queries_by_score=True,
    )
    return attention, {}


@pytest.mark.parametrize("straight_through", (False, True))
@pytest.mark.parametrize("made", (transformer_block, autoregressive_attention))
def test_models(made: Any, straight_through: bool, calls: list[tuple[int, ...]]) -> None:
    """In float64 nearly to the last bit. In float32 the error is at most twice that of the published code, and a few roundings."""
    model, options = made(straight_through)
    model = model.to(DEVICE)
    options = {name: value.to(DEVICE) for name, value in options.items()}
    x = rows(2, 64, 32, dtype=torch.float32)
    parameters = [name for name, _ in model.named_parameters()]

    def outcome(dtype: torch.dtype) -> dict[str, Tensor]:
        one = copy.deepcopy(model).to(dtype)
        y = leaf(x.to(dtype))
        out = one(y, **options)
        grads = torch.autograd.grad(out.square().sum(), [y, *one.parameters()], allow_unused=True)
        return {"out": out.detach(), **{k: v for k, v in zip(["x", *parameters], grads, strict=True) if v is not None}}

    exact, theirs = outcome(torch.float64), outcome(torch.float32)
    assert not calls
    with patch_colt5():
        wide, ours = outcome(torch.float64), outcome(torch.float32)
    assert calls
    tokens = [name for name in exact if name.endswith("routing_token")]
    assert tokens and all(bool(exact[name].any()) for name in tokens)
    # 0.9.0 to 0.10.0 hand k over as a float32 tensor, of which they take log k in float32
    limit = 1e-12 if VERSION >= (0, 10, 5) else 4 * torch.finfo(torch.float32).eps
    for name, value in exact.items():
        assert norm_error(wide[name], value) <= limit, name
        rounding = 8 * torch.finfo(torch.float32).eps
        assert norm_error(ours[name], value) <= 2 * norm_error(theirs[name], value) + rounding, name


@pytest.mark.parametrize("use_triton", (False, True))
def test_a_patched_router_compiles(use_triton: bool) -> None:
    """In one graph, that of the moment: a compiled router is patched, restored, and given another function like one that is not."""
    torch._dynamo.reset()
    router = published.CoordinateDescentRouter(8, straight_through=False, eps=0.5, use_triton=use_triton).to(DEVICE)
    x = rows(2, 24, 8, dtype=torch.float32)
    graphs: list[Any] = []
    compiled = torch.compile(router, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)

    def ours() -> bool:
        found, wanted = compiled(x, num_tokens=5), router(x, num_tokens=5)
        torch.testing.assert_close(found.scores, wanted.scores)
        assert torch.equal(found.indices, wanted.indices)
        return any("coordroute" in str(node.target) for node in graphs[-1].graph.nodes)

    with patch_colt5():
        assert ours()
    if not (use_triton and DEVICE == "cuda"):  # the published kernel is nothing that a graph could hold
        assert not ours()
    router.coor_descent = lambda s, **options: s.sigmoid()
    with patch_colt5():
        assert not ours()
    torch._dynamo.reset()


# --- a router --------------------------------------------------------------------------------------------------------

ROUTERS: dict[str, dict[str, Any]] = {
    "published settings": {},
    "straight through": {"straight_through": True},
    "routes": {"num_routing_tokens": 3},
    "settings": {"n_iters": 7, "fetch_k_ratio": 1.5, "eps": 0.2, "eps_init": 2.0, "eps_decay": 0.5},
}
if "cosine_sim_routing" in published.CoordinateDescentRouter.__init__.__code__.co_varnames:
    ROUTERS["cosine"] = {"cosine_sim_routing": True, "cosine_sim_scale": 4}


def soften(router: nn.Module) -> None:
    """Scores so close together that no weight reaches 1; among those that do, the published router chooses arbitrarily."""
    router.routing_token.data.mul_(0.1)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("name", ROUTERS)
def test_a_converted_router_routes_the_same(name: str, masked: bool) -> None:
    theirs = published.CoordinateDescentRouter(8, **{"eps": 1.0, "straight_through": False, **ROUTERS[name]}).double().to(DEVICE)
    soften(theirs)
    batch = 2 if theirs.num_routing_tokens == 1 else 1  # with several routes the published router mixes up sequences
    ours = colt5.to_router(theirs)
    assert isinstance(ours, coordroute.Router) and ours.routing_token.data_ptr() != theirs.routing_token.data_ptr()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    mask = None
    if masked:
        mask = torch.ones(batch, 64, dtype=torch.bool, device=DEVICE)
        mask[-1, ::3] = False
    x = rows(batch, 64, 8)
    outcomes = []
    for router in (theirs, ours):
        y = leaf(x)
        routed = router(y, num_tokens=12, mask=mask)
        gates = torch.zeros(*routed.scores.shape[:-1], 64, dtype=torch.float64, device=DEVICE)
        gates = gates.scatter(-1, routed.indices, routed.scores)  # the order of tokens is not part of the comparison
        tokens = routed.routed_tokens * torch.arange(8.0, device=DEVICE)
        loss = (gates * torch.linspace(-1, 1, 64, device=DEVICE)).sum() + tokens.square().sum()
        grads = torch.autograd.grad(loss, [y, router.routing_token])
        outcomes.append([routed.indices.sort().values, gates.detach(), *grads])
    for one, other in zip(*outcomes, strict=True):
        # log k in float32, as above
        torch.testing.assert_close(
            other, one, rtol=1e-9 if VERSION >= (0, 10, 5) else 1e-5, atol=1e-10 if VERSION >= (0, 10, 5) else 1e-6
        )
    assert bool(outcomes[0][3].any())


def test_a_converted_router_takes_the_place_of_the_old_one() -> None:
    block, options = transformer_block(False)
    block, options = block.double().to(DEVICE), {name: value.to(DEVICE) for name, value in options.items()}
    attention = block.conditional_attn
    for router in (block.conditional_ff.router, attention.q_router, attention.kv_router):
        soften(router)
    # the attention of 0.9.0 and 0.10.0 cannot take the mask of routed tokens
    x, options = rows(1, 64, 32), {"mask": options["mask"][1:]} if VERSION >= (0, 10, 5) else {}
    wanted = block(x, **options)
    state = block.state_dict()
    block.conditional_ff.router = colt5.to_router(block.conditional_ff.router)
    attention.q_router, attention.kv_router = colt5.to_router(attention.q_router), colt5.to_router(attention.kv_router)
    block.load_state_dict(state)
    torch.testing.assert_close(block(x, **options), wanted, rtol=1e-6, atol=1e-8)


def test_tokens_are_those_at_the_indices() -> None:
    """Which they are not in the published router, with several routes and sequences, or with blocks."""
    x = rows(4, 64, 8)
    theirs = published.CoordinateDescentRouter(8, num_routing_tokens=2, straight_through=False).double().to(DEVICE)
    soften(theirs)
    routed, converted = theirs(x, num_tokens=12), colt5.to_router(theirs)(x, num_tokens=12)
    assert torch.equal(routed.indices.sort().values, converted.indices.sort().values)
    for source, result in (
        ((torch.arange(4, device=DEVICE) // 2)[:, None, None], routed),
        (torch.arange(4, device=DEVICE)[:, None, None], converted),
    ):
        assert torch.equal(result.routed_tokens, x[source, result.indices])
    blocks = published.CoordinateDescentRouter(8, route_block_size=16).double().to(DEVICE)
    converted = colt5.to_router(blocks)(x, num_tokens=12)
    assert torch.equal(converted.routed_tokens, x[torch.arange(4, device=DEVICE)[:, None], converted.indices])
    if DEVICE == "cpu":  # on a GPU the index would end the process
        with pytest.raises(IndexError):
            blocks(x, num_tokens=12)


def test_a_router_with_routing_tokens_of_others() -> None:
    theirs = published.CoordinateDescentRouter(8, learned_routing_tokens=True, straight_through=False).double().to(DEVICE)
    with pytest.raises(ValueError, match="dim is None, the router's routing_token is None"):
        colt5.to_router(theirs)
    ours = colt5.to_router(theirs, dim=8, solver="exact").eval()
    assert ours.routing_token is None and ours.solver == "exact" and not ours.training
    x, given = rows(2, 24, 8), rows(2, 8)
    first, second = theirs(x, num_tokens=5, routing_tokens=given), ours(x, num_tokens=5, routing_tokens=given)
    assert torch.equal(first.indices.sort().values, second.indices.sort().values)


def test_what_is_no_router() -> None:
    with pytest.raises(TypeError, match=r"router is a Linear without routing_token.*CoordinateDescentRouter"):
        colt5.to_router(nn.Linear(2, 2))
    token = nn.Parameter(torch.zeros(1, 8))
    fake = SimpleNamespace(routing_token=token, **dict.fromkeys(("num_routing_tokens", "n_iters", "fetch_k_ratio"), 1), eps=1.0,
                           eps_init=None, eps_decay=1.0, straight_through=True, route_block_size=None)  # fmt: skip
    with pytest.raises(ValueError, match=r"dim is 9, the router's routing_token has shape \(1, 8\)"):
        colt5.to_router(fake, dim=9)


# --- the comparison --------------------------------------------------------------------------------------------------


def test_the_comparison_runs_and_sees_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    file = tmp_path / "made" / "check.json"
    assert colt5_check.main(["--device", "cpu", "--seconds", "0", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["ok"] and result["package_version"] == importlib.metadata.version("CoLT5-attention")
    names = {row["what"] for row in result["speed"]}
    assert names == {"ConditionalRoutedTransformerBlock", "ConditionalRoutedAutoregressiveAttention"} | (
        {"topk"} if HAS_TOPK else set()
    )
    for row in result["speed"]:
        low, high = row["speedup_ci"]
        assert 0 < low <= row["speedup"] <= high and row["patched"]["samples"] == 3
    assert all(row["error"] <= row["limit"] for row in result["same"]) and {"device", "versions", "date"} <= result.keys()
    page = capsys.readouterr().out
    assert page.count("  ok ") == len(result["same"]) and "DIFFERS" not in page

    operator = ops.coordinate_descent_rows
    monkeypatch.setattr(ops, "coordinate_descent_rows", lambda *a, **options: operator(*a, **options) * 1.0001)
    assert not any(row["ok"] for row in colt5_check._operators_agree(colt5_check.SMALL, torch.device("cpu")))


def test_the_comparison_without_a_gpu_or_a_package(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert colt5_check.main(["--device", "cuda:99"]) == 2
    assert "device is 'cuda:99', but" in capsys.readouterr().err
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    assert colt5_check.main(["--device", "cpu"]) == 2
    assert "of version 0.1; known are" in capsys.readouterr().err
