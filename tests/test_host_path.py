"""The short way of a plain eager call past torch.library, and the launcher's way past Triton's binding of arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import coordroute
import pytest
import torch
from coordroute.autotune import hosttime
from coordroute.kernels import ops
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPL = ops.default_impl(torch.device(DEVICE))
OPERATORS = ("soft_topk", "coordinate_descent")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=OPERATORS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


def call(op: str, scores: Tensor, k: Any = 2.5, **options: Any) -> Tensor:
    if op == "soft_topk":
        return coordroute.soft_topk(scores, k, **{"eps": 0.3, **options})
    return coordroute.coordinate_descent(scores, k, n_iters=6, eps=0.3, eps_init=2.0, eps_decay=0.5, **options)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


class Refused(Exception):
    pass


def refuse(*arguments: Any) -> Any:
    raise Refused


def names(op: str) -> tuple[str, str]:
    return op, f"{op}_backward"


class Recorded:
    """A registered operator that says when it is called."""

    def __init__(self, operator: Any, seen: list[str], name: str) -> None:
        self.operator, self.seen, self.name = operator, seen, name

    def __call__(self, *arguments: Any) -> Any:
        self.seen.append(self.name)
        return self.operator(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operator, name)


@contextlib.contextmanager
def registered(op: str) -> Iterator[list[str]]:
    """Records which registered operators are called by name."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names(op):
            patch.setattr(torch.ops.coordroute, name, Recorded(getattr(torch.ops.coordroute, name), seen, name))
        yield seen


@contextlib.contextmanager
def only_registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_plain", lambda *tensors: False)
        yield


# --- the two ways agree ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("shape", ((5, 12), (2, 3, 7), (4, 1), (0, 3)))
@pytest.mark.parametrize("tensors", (False, True))
def test_both_ways_give_the_same_bits(op: str, dtype: torch.dtype, shape: tuple[int, ...], tensors: bool) -> None:
    base, g = rows(*shape, dtype=dtype), rows(*shape, dtype=dtype)
    k = torch.rand(shape[:-1], device=DEVICE) + 1 if tensors else 2.5
    options: dict[str, Any] = {"mask": rows(*shape) > -1} if tensors else {}
    if tensors and op == "soft_topk":
        options["eps"] = torch.rand(shape[:-1], device=DEVICE) + 0.1

    def outcome() -> list[Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in options.items() if value.is_floating_point()}
        s = base.clone().requires_grad_()
        budget = k.clone().requires_grad_() if isinstance(k, Tensor) else k
        lam = call(op, s, budget, **{**options, **leaves})
        inputs = [s, *([budget] if isinstance(budget, Tensor) else []), *leaves.values()]
        return [lam.detach(), *torch.autograd.grad(lam, inputs, g), call(op, base, k, **options)]

    with registered(op) as seen:
        short = outcome()
    assert not seen
    with registered(op) as seen, only_registered():
        long = outcome()
    assert seen == [*names(op), op]
    for first, second in zip(short, long, strict=True):
        assert torch.equal(first, second) and first.dtype == second.dtype and first.stride() == second.stride()


@pytest.mark.parametrize("how", ("transposed", "sliced", "expanded gradient", "a parameter", "autocast"))
def test_both_ways_take_any_strides(op: str, how: str) -> None:
    base = rows(6, 24)
    s = {"transposed": base.T, "sliced": base[1::2, 3:17], "a parameter": torch.nn.Parameter(base)}.get(how, base)
    results = []
    for way in (contextlib.nullcontext(), only_registered()):
        with way, torch.autocast(DEVICE, torch.bfloat16, enabled=how == "autocast"):
            x = s if how == "a parameter" else s.detach().requires_grad_()
            lam = call(op, x)
            assert lam.dtype == torch.float32
            g = torch.ones((), device=DEVICE).expand(lam.shape) if how == "expanded gradient" else lam.detach().cos()
            results.append([lam.detach(), *torch.autograd.grad(lam, x, g)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


# --- who goes the short way ------------------------------------------------------------------------------------------


def test_plain_calls_do_not_pay_for_torch_library(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names(op):
        monkeypatch.setattr(torch.ops.coordroute, name, refuse)
    s, k = rows(3, 12).requires_grad_(), torch.full((3,), 2.5, device=DEVICE, requires_grad=True)
    mask = rows(3, 12) > -1
    call(op, s, k, mask=mask).sum().backward()
    assert s.grad is not None and k.grad is not None
    with torch.no_grad():
        call(op, s, k)
    with torch.inference_mode():
        call(op, s, k)
        call(op, rows(3, 12))
    with torch.autocast(DEVICE, torch.bfloat16):
        call(op, s, k).sum().backward()


def test_a_call_without_gradients_makes_no_node(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_apply_soft_topk", "_apply_coordinate_descent"):
        monkeypatch.setattr(ops, name, refuse)
    s = rows(3, 12)
    assert not call(op, s).requires_grad
    with torch.no_grad():
        assert not call(op, s.requires_grad_()).requires_grad
    with pytest.raises(Refused):
        call(op, s)


class Seen(TorchDispatchMode):
    """The coordroute operators that a mode gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "coordroute":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A subclass; what becomes of it is for its own __torch_function__ to say."""


def test_modes_see_both_directions(op: str) -> None:
    with Seen() as mode:
        call(op, rows(3, 12).requires_grad_()).sum().backward()
    assert mode.names == list(names(op))
    lam = call(op, rows(3, 12).requires_grad_())
    with Seen() as mode:  # the forward was a plain one
        lam.sum().backward()
    assert mode.names == [names(op)[1]]
    with SeenFunctions() as functions:
        call(op, rows(3, 12))
    assert op in functions.names


def test_a_subclass_is_seen(op: str) -> None:
    with registered(op) as seen:
        lam = call(op, rows(3, 12).as_subclass(Labelled))
    assert set(seen) == {op} and type(lam) is Labelled


def test_values_that_are_not_as_they_stand(op: str) -> None:
    """A tensor that is negated lazily holds the opposite of its values."""
    z = torch.randn(3, 12, dtype=torch.complex64, device=DEVICE)
    lazy = z.conj().imag
    assert lazy.is_neg()
    with registered(op) as seen:
        lam = call(op, lazy)
    assert seen == [op] and torch.equal(lam, call(op, lazy.resolve_neg()))


def test_fake_tensors(op: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode(), registered(op) as seen:
        s = torch.empty(3, 12, device=DEVICE, requires_grad=True)
        lam = call(op, s)
        (ds,) = torch.autograd.grad(lam.sum(), s)
    assert seen == list(names(op)) and isinstance(lam, FakeTensor) and isinstance(ds, FakeTensor) and ds.shape == (3, 12)


def dual(function: Callable[[Tensor], Any], s: Tensor) -> Any:
    with forward_ad.dual_level():
        return function(s)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "vmap": lambda function, s: torch.vmap(function)(s),
    "func.grad": lambda function, s: torch.func.grad(lambda x: (function(x), x.sum())[1])(s),
    "functionalize": lambda function, s: torch.func.functionalize(function)(s),
    "make_fx": lambda function, s: make_fx(function)(s),
    "make_fx pre-dispatch": lambda function, s: make_fx(function, pre_dispatch=True)(s),
    "jit.trace": lambda function, s: torch.jit.trace(function, s, check_trace=False),
    "forward AD": dual,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_noticed(name: str) -> None:
    """Also where the tensor of the call is not one that they wrap."""
    other = rows(2, 12)
    answers = []

    def function(x: Tensor) -> Tensor:
        answers.extend((ops._plain(x), ops._plain(other)))
        return x + 0

    TRANSFORMS[name](function, rows(3, 12))
    assert answers and not any(answers)
    assert ops._plain(other), "and afterwards all is as before"


def test_a_traced_graph_holds_the_operator(op: str) -> None:
    def both(s: Tensor) -> Tensor:
        (ds,) = torch.autograd.grad(call(op, s).sum(), s)
        return ds

    s = rows(3, 12).requires_grad_()
    graph = make_fx(both)(s)
    targets = [str(node.target) for node in graph.graph.nodes]
    for name in names(op):
        assert f"coordroute.{name}.default" in targets
    assert torch.equal(graph(s), both(s))


def test_compiled_and_exported_graphs_hold_the_operator(op: str) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda s: call(op, s), fullgraph=True, backend=backend)
    s = rows(3, 12)
    assert torch.equal(compiled(s), call(op, s))
    assert any(f"coordroute.{op}" in str(node.target) for node in graphs[0].graph.nodes)

    class Module(torch.nn.Module):
        def forward(self, s: Tensor) -> Tensor:
            return call(op, s)

    for strict in (False, True):
        program = torch.export.export(Module(), (s,), strict=strict)
        assert any(f"coordroute.{op}" in str(node.target) for node in program.graph.nodes)
        assert torch.equal(program.module()(s), call(op, s))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_vmap_is_what_it_was(op: str) -> None:
    """Over the call, and over the backward of a plain one."""

    def outcome(function: Callable[[], Tensor]) -> Any:
        try:
            return function().detach()
        except RuntimeError as error:
            return str(error)

    s = rows(4, 3, 12)
    x, g = rows(3, 12).requires_grad_(), rows(4, 3, 12)

    def batched_backward() -> Tensor:
        return torch.autograd.grad(call(op, x), x, g, is_grads_batched=True)[0]

    for function in (lambda: torch.vmap(lambda s: call(op, s))(s), batched_backward):
        with only_registered():
            expected = outcome(function)
        found = outcome(function)
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


# --- autograd of the short way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(op: str, reentrant: bool) -> None:
    s, k = rows(3, 12).requires_grad_(), torch.full((3,), 2.5, device=DEVICE, requires_grad=True)

    def block(s: Tensor, k: Tensor) -> Tensor:
        return call(op, s.sin(), k).square()

    expected = torch.autograd.grad(block(s, k).sum(), [s, k])
    checkpoint(block, s, k, use_reentrant=reentrant).sum().backward()
    assert torch.equal(s.grad, expected[0]) and torch.equal(k.grad, expected[1])


def test_selective_checkpointing_sees_the_operator(op: str) -> None:
    seen = []

    def policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(str(func))
        return CheckpointPolicy.MUST_SAVE if "coordroute" in str(func) else CheckpointPolicy.PREFER_RECOMPUTE

    s = rows(3, 12).requires_grad_()
    expected = torch.autograd.grad(call(op, s.sin()).square().sum(), s)[0]
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    checkpoint(lambda s: call(op, s.sin()).square(), s, use_reentrant=False, context_fn=contexts).sum().backward()
    assert f"coordroute.{op}.default" in seen and torch.equal(s.grad, expected)


def test_hooks_of_saved_tensors(op: str) -> None:
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    s = rows(3, 12).requires_grad_()
    expected = torch.autograd.grad(call(op, s).square().sum(), s)[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lam = call(op, s)
    assert len(packed) == 2 and packed[0] == (3, 12) and packed[1][0] == 3
    assert torch.equal(torch.autograd.grad(lam, s, 2 * lam.detach())[0], expected)


def test_scores_written_to_before_the_backward(op: str) -> None:
    s = rows(3, 12).requires_grad_()
    x = s * 1
    lam = call(op, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lam.sum().backward()


def test_only_gradients_that_are_needed_are_returned(op: str) -> None:
    s, k = rows(3, 12).requires_grad_(), torch.full((3,), 2.5, device=DEVICE)
    for scores, budget, expected in ((s, k, (True, False)), (s.detach(), k.clone().requires_grad_(), (False, True))):
        lam = call(op, scores, budget)
        gradients = lam.grad_fn.apply(torch.ones_like(lam))
        assert tuple(gradient is not None for gradient in gradients[:2]) == expected
        assert not any(gradient is not None for gradient in gradients[2:])
    assert lam.grad_fn.apply(None) == (None,) * len(gradients)


@pytest.mark.parametrize("checkpoint_segments", (None, 3))
def test_the_configuration_is_resolved_once_a_direction(checkpoint_segments: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    resolve = ops._resolve
    monkeypatch.setattr(ops, "_resolve", lambda op, direction, *rest: (asked.append(direction), resolve(op, direction, *rest))[1])
    call("coordinate_descent", rows(3, 12).requires_grad_(), checkpoint_segments=checkpoint_segments).sum().backward()
    assert asked == ["forward", "backward"]


# --- host time -------------------------------------------------------------------------------------------------------


def test_host_time_is_of_a_gpu() -> None:
    if DEVICE == "cpu":
        assert hosttime.measure("cpu") is None
        return
    found = hosttime.measure(DEVICE)
    assert found is not None and found["bare_us"] > 0 and found["soft_topk_ratio"] > 0


def test_host_time_compares_round_by_round() -> None:
    functions = {"bare": lambda s: s * 1, "soft_topk": lambda s: s.sin().cos(), "coordinate_descent": lambda s: s.sin()}
    found = hosttime._compare(functions, torch.device("cpu"), lambda: None, samples=7)
    for name in ("soft_topk", "coordinate_descent"):
        low, high = found[f"{name}_ratio_ci"]
        assert low <= found[f"{name}_ratio"] <= high
    assert found["samples"] == 7
