"""CoLT5-attention (0.9.0 to 0.11.2) on our operators: one call patches the installed package, another converts a router of it.

    import coordroute

    print(coordroute.patch_colt5())  # models that exist already, and those made later; .undo(), or as a context manager

What is replaced: ``coor_descent``, ``triton_coor_descent`` and ``topk``, wherever a module holds them, and what a
``CoordinateDescentRouter`` keeps of them. Values and gradients are those of the published eager ``coor_descent``, up to rounding,
with these differences:

- Half-precision scores are computed in float32 and rounded once; the result has the dtype that the published code returns.
- The published Triton kernel has wrong gradients at lengths that are no power of two in 0.9.0 to 0.10.5 (it writes behind the
  row; ``coordroute verify --op coordroute.reference.others:colt5_kernel`` shows it). Ours are right there.
- ``checkpoint_segments`` is taken and has no effect: ours keeps one scalar an iteration and row at most, where the published
  kernel keeps a row a segment.
- There is no second order: the published eager code can be differentiated twice, ours raises (``coordroute.soft_topk`` can be).
- What is out of range (a negative k, eps <= 0, a mask that is not bool) raises ValueError or TypeError.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType, TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import router as front
from ..kernels import ops

__all__ = ["Patch", "Replacement", "patch_colt5", "to_router"]

PACKAGE, DISTRIBUTION = "colt5_attention", "CoLT5-attention"
OLDEST, NEWEST = (0, 9, 0), (0, 11, 2)

_EXPECTED = {
    "coor_descent": ("s", "n_iters", "k", "eps", "eps_init", "eps_decay", "mask"),
    "triton_coor_descent": ("s", "n_iters", "k", "eps", "eps_init", "eps_decay", "mask", "checkpoint_segments"),
    "topk": ("x", "k", "coor_descent_k_ratio", "n_iters", "eps", "eps_init", "eps_decay", "mask", "fused"),
}
"""The functions that are replaced, each in the module of its name, and the parameters that they are called with."""

_OURS = {
    "coor_descent": "coordroute.coordinate_descent",
    "triton_coor_descent": "coordroute.coordinate_descent",
    "topk": "coordroute.coordinate_descent, then torch.topk",
}


class Replacement(NamedTuple):
    """One attribute that was replaced."""

    where: str
    """``module.attribute``."""
    by: str
    """What does its work now."""


class Patch:
    """What ``patch_colt5`` did: print it, undo it, or use it as a context manager.

    Leaving the context restores what was there on entering: a package that had been patched before stays patched.

    Attributes:
        version: of the package.
        replaced: what was replaced; the same for every call while the package is patched.
    """

    def __init__(self, version: str, replaced: tuple[Replacement, ...], was_patched: bool) -> None:
        self.version, self.replaced, self._was_patched = version, replaced, was_patched

    def undo(self) -> None:
        """Puts back every original, also in models that were made meanwhile; nothing happens the second time."""
        _undo()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._was_patched:
            self.undo()

    def __str__(self) -> str:
        width = max(len(replacement.where) for replacement in self.replaced)
        lines = [f"  {replacement.where:{width}} → {replacement.by}" for replacement in self.replaced]
        return "\n".join([f"{DISTRIBUTION} {self.version} uses coordroute:", *lines])

    __repr__ = __str__


class _Active(NamedTuple):
    version: str
    replaced: tuple[Replacement, ...]
    originals: dict[str, Any]
    substitutes: dict[str, Any]
    router: Any


_active: _Active | None = None


def patch_colt5() -> Patch:
    """Makes the installed CoLT5-attention use our operators, in models that exist and in those made later.

    Calling it again changes nothing. A model that is pickled meanwhile refers to the originals, and loads without coordroute.

    Returns:
        What was replaced, printable, with ``undo()``; also a context manager.

    Raises:
        ImportError: CoLT5-attention is not installed.
        RuntimeError: its version is not among those known (0.9.0 to 0.11.2), or it lacks a function that is to be replaced.
    """
    global _active
    if _active is not None:
        return Patch(_active.version, _active.replaced, was_patched=True)
    version = _known_version()
    originals = _originals(version)
    substitutes = _substitutes(originals)
    router = importlib.import_module(f"{PACKAGE}.transformer_block").CoordinateDescentRouter
    replaced = [Replacement(where, _OURS[name]) for where, name in _exchange(originals, substitutes)]
    for name, value in _router_attributes(originals, substitutes).items():
        setattr(router, name, value)
    replaced.append(Replacement(f"{router.__module__}.{router.__qualname__}().coor_descent", _OURS["coor_descent"]))
    _active = _Active(version, tuple(sorted(set(replaced))), originals, substitutes, router)
    return Patch(version, _active.replaced, was_patched=False)


def _undo() -> None:
    global _active
    if _active is None:
        return
    _exchange(_active.substitutes, _active.originals)
    for name in _router_attributes(_active.originals, _active.substitutes):
        delattr(_active.router, name)
    _active = None


def _exchange(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str]]:
    """Sets every attribute of a module that is one of ``old`` to that of ``new`` with the same name; says where, and which."""
    names = {id(function): name for name, function in old.items()}
    done = []
    for where, module in list(sys.modules.items()):
        for attribute, value in list(vars(module).items()) if isinstance(module, ModuleType) else ():
            if id(value) in names:
                setattr(module, attribute, new[names[id(value)]])
                done.append((f"{where}.{attribute}", names[id(value)]))
    return done


def _known_version() -> str:
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if not version or importlib.util.find_spec(PACKAGE) is None:
        raise ImportError(f"{DISTRIBUTION} is not installed here, so there is nothing to patch: pip install {DISTRIBUTION}")
    parts = version.split(".")
    known = all(part.isdecimal() for part in parts) and OLDEST <= tuple(map(int, parts)) <= NEWEST
    if not known:
        low, high = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise RuntimeError(f"{DISTRIBUTION} is of version {version}; known are {low} to {high}. Nothing was patched")
    return version


def _originals(version: str) -> dict[str, Any]:
    """The functions to replace, by name. ``topk`` came with 0.10; without Triton ``triton_coor_descent`` cannot be imported."""
    importlib.import_module(PACKAGE)
    found = {}
    for name, parameters in _EXPECTED.items():
        if name == "triton_coor_descent" and not ops.triton_available():
            continue
        if name == "topk" and importlib.util.find_spec(f"{PACKAGE}.topk") is None:
            continue
        # not getattr: the package has a function of the same name in the place of its module
        function = getattr(importlib.import_module(f"{PACKAGE}.{name}"), name, None)
        if not callable(function) or tuple(inspect.signature(function).parameters)[: len(parameters)] != parameters:
            what = "is not there" if function is None else f"takes {inspect.signature(function)}"
            raise RuntimeError(
                f"{PACKAGE}.{name}.{name} {what}, which is not that of {DISTRIBUTION} {version} ({', '.join(parameters)}, …)."
                " Nothing was patched"
            )
        found[name] = function
    return found


def _router_attributes(originals: dict[str, Any], substitutes: dict[str, Any]) -> dict[str, Any]:
    """Attributes for the class ``CoordinateDescentRouter``, each instance of which keeps the function of when it was made.

    An instance holds the original, and shows ours: those that exist are patched too, and those made meanwhile are restored. Its
    pickled state holds ours, since pickle wants a function to be what a module has under its name.
    """
    names = [name for name in ("coor_descent", "triton_coor_descent") if name in originals]

    def swapped(held: Any, old: dict[str, Any], new: dict[str, Any]) -> Any:
        if isinstance(held, partial):
            function = swapped(held.func, old, new)
            return held if function is held.func else partial(function, *held.args, **held.keywords)
        for name in names:
            if held is old[name]:
                return new[name]
        return held

    def show(router: Any) -> Any:
        return swapped(router._coordroute_vars["coor_descent"], originals, substitutes)

    def keep(router: Any, value: Any) -> None:
        router.__dict__["coor_descent"] = swapped(value, substitutes, originals)

    def get_state(router: Any) -> dict[str, Any]:
        return {**router.__dict__, "coor_descent": show(router)}

    def set_state(router: Any, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(router, state)
        keep(router, state["coor_descent"])

    return {
        "coor_descent": property(show, keep),
        # the dict of an instance under another name: in router.__dict__["coor_descent"] Dynamo of torch 2.11 looks the name up on
        # the class, where it finds the property above, and never ends; a property that is a builtin it evaluates
        "_coordroute_vars": property(vars),
        "__getstate__": get_state,
        "__setstate__": set_state,
    }


# --- the functions ---------------------------------------------------------------------------------------------------


def _substitutes(originals: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Ours, with the signatures of the originals."""
    # from 0.10.16 on autocast is off for CUDA within each of the originals; functools.wraps leaves this mark
    casts = not hasattr(originals["coor_descent"], "__wrapped__")

    def coor_descent(
        s: Tensor,
        *,
        n_iters: int,
        k: float | Tensor,
        eps: float = 1e-1,
        eps_init: float | None = None,
        eps_decay: float = 1.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``coordroute.coordinate_descent`` as CoLT5-attention calls it; a k that is a tensor is not clamped, as published."""
        dtype = _published_dtype(s, k, casts)
        if isinstance(k, Tensor) and k.shape != s.shape[:-1]:
            lead = torch.broadcast_shapes(k.shape, s.shape[:-1])
            s = s.expand(*lead, s.shape[-1])
        return _unclamped(s.to(dtype), k, mask, n_iters, eps, eps_init, eps_decay)

    def triton_coor_descent(
        s: Tensor,
        *,
        n_iters: int,
        k: float | Tensor,
        eps: float = 1e-1,
        eps_init: float | None = None,
        eps_decay: float = 1.0,
        mask: Tensor | None = None,
        checkpoint_segments: int = 1,
    ) -> Tensor:
        """``coor_descent`` above; on a GPU k may also have one value for each row, or for each last row of a batch."""
        if s.is_cuda and isinstance(k, Tensor):
            if k.numel() == 1:
                k = k.reshape(())
            elif k.shape != s.shape[:-1]:
                rows = s.shape[:-1].numel()
                k = k.reshape(-1).repeat(rows // k.numel()).reshape(s.shape[:-1])
            k = k.to(s.dtype)
        return coor_descent(s, n_iters=n_iters, k=k, eps=eps, eps_init=eps_init, eps_decay=eps_decay, mask=mask)

    def topk(
        x: Tensor,
        k: int,
        coor_descent_k_ratio: float = 9 / 8,
        n_iters: int = 20,
        eps: float = 1e-1,
        eps_init: float | None = None,
        eps_decay: float = 1.0,
        mask: Tensor | None = None,
        fused: bool = False,
        non_differentiable: bool = False,
    ) -> Any:
        """The published differentiable top-k over ``coor_descent``; ``fused`` makes no difference, ours always is.

        As published, ``mask`` acts on the weights only: a masked entry that is among the k highest is returned.
        """
        result = importlib.import_module(f"{PACKAGE}.topk").TopkReturn
        if non_differentiable:
            return result(*torch.topk(x, k=k, dim=-1), None, None)
        if not (k > 0 and coor_descent_k_ratio >= 1):
            raise ValueError(f"k is {k}, coor_descent_k_ratio is {coor_descent_k_ratio}; allowed are k > 0 and a ratio >= 1")
        budget = min(k * coor_descent_k_ratio, x.shape[-1])
        weights = coor_descent(x, n_iters=n_iters, k=budget, eps=eps, eps_init=eps_init, eps_decay=eps_decay, mask=mask)
        gates = weights + (1 - weights).detach()
        values, indices = torch.topk(x * gates, k, dim=-1)
        return result(values, indices, weights.gather(-1, indices), gates.gather(-1, indices))

    made: dict[str, Callable[..., Any]] = {
        "coor_descent": coor_descent,
        "triton_coor_descent": triton_coor_descent,
        "topk": topk,
    }
    for name, original in originals.items():
        # pickle refers to a function by these two
        made[name].__module__, made[name].__qualname__ = original.__module__, original.__qualname__
    return {name: made[name] for name in originals}


def _published_dtype(s: Tensor, k: float | Tensor, casts: bool) -> torch.dtype:
    """The dtype of the published result: that of s + a, where a holds log k; float32 where autocast sees its exp."""
    if casts and s.is_cuda and s.dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        return torch.float32
    if isinstance(k, Tensor):
        return torch.promote_types(s.dtype, k.dtype if k.is_floating_point() else torch.get_default_dtype())
    return s.dtype


def _unclamped(
    s: Tensor, k: float | Tensor, mask: Tensor | None, n_iters: int, eps: float, eps_init: float | None, eps_decay: float
) -> Tensor:
    """``coordroute.coordinate_descent`` along the last dimension, which clamps a k that is a tensor; this does not."""
    if not isinstance(k, Tensor):
        return front.coordinate_descent(s, k, n_iters=n_iters, eps=eps, eps_init=eps_init, eps_decay=eps_decay, mask=mask)
    dim = front._check_scores(s, -1)
    n_iters = front._check_int("n_iters", n_iters, 1)
    numbers = {"eps": eps, "eps_init": eps if eps_init is None else eps_init, "eps_decay": eps_decay}
    eps, eps_init, eps_decay = (front._check_number(name, value, zero_allowed=False) for name, value in numbers.items())
    k_rows = front._per_row("k", k, s, dim, zero_allowed=True)
    rows, mask_rows = front._to_rows(s, mask, dim)
    impl = front._backend("auto", s.device)
    schedule = (n_iters, eps, max(eps_init, eps), eps_decay)
    lam = ops.coordinate_descent_rows(rows, k_rows, mask_rows, *schedule, None, impl, clamp_k=False)
    return front._from_rows(lam, s.shape, dim)


# --- a router --------------------------------------------------------------------------------------------------------


def to_router(
    router: Any, *, solver: Literal["exact", "coordinate_descent"] = "coordinate_descent", dim: int | None = None
) -> front.Router:
    """A ``coordroute.Router`` with the settings and a copy of the weights of a CoLT5-attention ``CoordinateDescentRouter``.

    It can take the place of the old one in a model; the names in a state dict are the same. It routes the same tokens with the
    same gates, except that

    - tokens are chosen by score, in that order, where the published router chooses by weight: among weights that have reached
      1, it picks arbitrarily;
    - a sequence of just ``num_tokens`` passes through, as in 0.10.16 to 0.11.2 (in 0.9.0 to 0.10.10 it is routed, in another
      order), and the gates of one that does are 0 where masked;
    - blocks that do not divide the sequence leave no tail unrouted, and ``num_tokens`` is met, where the published router drops
      the tail and rounds up for each block;
    - the mask of the routed tokens is returned, which 0.9.0 and 0.10.0 do not (and their attention cannot take it: there, a
      converted router serves inputs without a mask);
    - ``routed_tokens`` of the published router are not those at ``indices`` where there are several routes and sequences (of
      sequence i it takes those of i // routes), nor with ``route_block_size`` (it mostly fails, with an IndexError). Ours are.

    Args:
        router: a ``CoordinateDescentRouter`` of CoLT5-attention 0.9.0 to 0.11.2.
        solver: "coordinate_descent" for the published iteration, or "exact" for its limit.
        dim: width of the tokens, needed where the router has no routing token of its own (its ``learned_routing_tokens=True``).

    Raises:
        TypeError: ``router`` is something else.
        ValueError: ``dim`` is missing, or is not that of the routing token.
    """
    needed = ("routing_token", "num_routing_tokens", "n_iters", "eps", "eps_init", "eps_decay", "fetch_k_ratio", "straight_through")
    missing = [name for name in needed if not hasattr(router, name)]
    if missing:
        raise TypeError(
            f"router is a {type(router).__name__} without {', '.join(missing)}; allowed is a CoordinateDescentRouter of"
            f" {DISTRIBUTION}"
        )
    token = router.routing_token
    width = dim if token is None else token.shape[-1]
    if width is None or dim not in (None, width):
        raise ValueError(
            f"dim is {dim}, the router's routing_token {'is None' if token is None else f'has shape {tuple(token.shape)}'};"
            " allowed is the width of its tokens, which only a router with a routing token knows"
        )
    made = front.Router(
        width,
        num_routes=router.num_routing_tokens,
        solver=solver,
        eps=router.eps,
        n_iters=router.n_iters,
        eps_init=router.eps_init,
        eps_decay=router.eps_decay,
        fetch_k_ratio=router.fetch_k_ratio,
        straight_through=router.straight_through,
        learned_routing_tokens=token is not None,
        cosine_sim_routing=getattr(router, "cosine_sim_routing", False),
        cosine_sim_scale=getattr(router, "cosine_sim_scale", 8.0),
        route_block_size=router.route_block_size,
    )
    if token is not None:
        made.to(token.device, token.dtype).requires_grad_(token.requires_grad)
        made.load_state_dict(router.state_dict())
    return made.train(router.training)
