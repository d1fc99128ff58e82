"""The reduced verification suite that every mutant has to pass, or rather is not to.

    python suite.py cpu|interpreter|gpu [seed]        (with the package to be judged on PYTHONPATH)

A place of sight has one list of checks, the same for every mutant that is seen there. Most are ``verify.examine`` on a fixed case
with one way to launch the kernels: several rows a program, one row in several warps, tiles that are re-read, rows that programs
share, and the public path with its autograd and its registered operators. Some are our own, for what that function cannot see.

The seed changes the numbers only, never a shape, a dtype or a constant of a launch, so that nothing is compiled anew for it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from coordroute import router
from coordroute.autotune import proof
from coordroute.kernels import cpu
from coordroute.kernels.config import LaunchConfig, next_power_of_2
from coordroute.reference import families, oracles, properties, verify
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode

Target = Callable[..., torch.Tensor]
OPS = ("soft_topk", "coordinate_descent")
PLACES = ("cpu", "interpreter", "gpu")

GUARD = 4096
"""Elements of the bands around an output: a tile that is stored without a mask ends inside."""


class Check(NamedTuple):
    """One step of a suite.

    Attributes:
        label: what is checked, and how it is launched.
        op: the operator.
        run: seed -> what is wrong, as (property, counterexample); nothing where all is well.
    """

    label: str
    op: str
    run: Callable[[int], list[tuple[str, str]]]


# --- outputs between bands of NaN ------------------------------------------------------------------------------------

STALE_BITS = 0x3F800000
"""What stands in the words of an earlier launch: the sum 1."""


def _stale(size: tuple[int, ...], dtype: torch.dtype, device: Any) -> torch.Tensor:
    """Integers as an earlier launch may have left them; fresh memory is often 0, as if it had been cleared.

    Words [rows, ring, slots, programs] of ``rows.exchange`` have the number of an exchange that this launch makes too.
    """
    if dtype != torch.int64 or len(size) != 4:
        return torch.ones(size, dtype=dtype, device=device)
    number = torch.arange(size[1], dtype=dtype, device=device)
    number[0] = size[1]
    return (number << 32 | STALE_BITS)[None, :, None, None].repeat(size[0], 1, *size[2:])


class Guarded:
    """torch for a module of kernels, whose ``empty`` returns NaN between two bands of NaN, or stale words where it is integers.

    ``new_empty`` of a tensor does so too, once it is :meth:`installed`.
    """

    def __init__(self) -> None:
        self.bands: list[torch.Tensor] = []
        self.on = True

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype, device: Any = None) -> torch.Tensor:
        size = tuple(shape[0]) if isinstance(shape[0], tuple) else shape
        count = int(np.prod(size))
        if not self.on:
            return torch.empty(size, dtype=dtype, device=device)
        if not dtype.is_floating_point:
            return _stale(size, dtype, device)
        memory = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
        self.bands += [memory[:GUARD], memory[GUARD + count :]]
        return memory[GUARD : GUARD + count].view(size)

    def installed(self) -> None:
        plain = torch.Tensor.new_empty

        def new_empty(like: torch.Tensor, *shape: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
            # Triton's interpreter allocates for itself, on a device that it names
            if options:
                return plain(like, *shape, dtype=dtype, **options)
            return self.empty(*shape, dtype=dtype or like.dtype, device=like.device)

        torch.Tensor.new_empty = new_empty  # type: ignore[method-assign, assignment]

    def broken(self) -> bool:
        """Whether anything was written into a band since the last call."""
        bands, self.bands = self.bands, []
        kinds = {band.dtype for band in bands}
        return not all(bool(torch.cat([band for band in bands if band.dtype == kind]).isnan().all()) for kind in kinds)


_guarded = Guarded()


def guard(place: str) -> None:
    """Every output that the kernels allocate is poisoned from now on."""
    if place == "cpu":
        cpu.torch = _guarded  # type: ignore[attr-defined]
    else:
        _guarded.installed()


# --- ways to call an operator ----------------------------------------------------------------------------------------


class _StrangeGradient(torch.autograd.Function):
    """Nothing to the values; a gradient in padded rows, with NaN where an entry is masked and between the rows."""

    @staticmethod
    def forward(ctx: Any, lam: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        ctx.mask = mask
        return lam.view_as(lam)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        rows, n = grad.shape
        out = grad.new_full((rows, n + 5), torch.nan)[:, :n]
        out.copy_(grad if ctx.mask is None else grad.masked_fill(~ctx.mask, torch.nan))
        return out, None


def _every_other(value: Any) -> Any:
    """A tensor [R] as every other element of a longer one."""
    return torch.stack((value, torch.full_like(value, torch.nan)), dim=1)[:, 0] if isinstance(value, torch.Tensor) else value


def awkward(target: Target) -> Target:
    """The same operator; k, eps, the mask and the gradient lie in memory as the scores do not."""

    def call(scores: torch.Tensor, k: Any, *, eps: Any, mask: torch.Tensor | None = None, **schedule: Any) -> torch.Tensor:
        if mask is not None:
            schedule["mask"] = families.laid_out(mask, "padded rows" if scores.is_contiguous() else "contiguous")
        lam = target(scores, _every_other(k), eps=_every_other(eps), **schedule)
        return _StrangeGradient.apply(lam, mask)

    return call


def public(op: str, impl: str) -> Target:
    """The operator as people call it."""
    function = getattr(router, op)
    return lambda scores, k, **rest: function(scores, k, impl=impl, **rest)


def any_dim(op: str, impl: str) -> Target:
    """The public operator along the middle of three dimensions, k along the two others."""
    function = getattr(router, op)

    def call(scores: torch.Tensor, k: Any, *, eps: Any, mask: torch.Tensor | None = None, **schedule: Any) -> torch.Tensor:
        rows, n = scores.shape
        second = 2 if rows % 2 == 0 else 1

        def lead(value: Any) -> Any:
            return value.reshape(rows // second, second) if isinstance(value, torch.Tensor) else value

        def middle(matrix: torch.Tensor) -> torch.Tensor:
            return matrix.reshape(rows // second, second, n).movedim(-1, 1)

        if mask is not None:
            schedule["mask"] = middle(mask)
        lam = function(middle(scores), lead(k), eps=lead(eps), dim=1, impl=impl, **schedule)
        return lam.movedim(1, -1).reshape(rows, n)

    return call


class _Recorder(TorchDispatchMode):
    """Does nothing, but that a call inside goes by the registered operators; notes which, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "coordroute":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def registered(op: str, impl: str) -> Target:
    """The operator as torch.library has it, which is what compiled models call."""
    function = public(op, impl)

    def call(scores: torch.Tensor, k: Any, **rest: Any) -> torch.Tensor:
        with _Recorder() as recorder:
            lam = function(scores, k, **rest)
        if not recorder.seen:
            raise RuntimeError("no registered operator was called")
        return lam

    return call


def launched(op: str, backend: str, config: LaunchConfig) -> Target:
    """The raw kernels, both directions with this configuration; a resident row gets the block that it needs."""

    def call(scores: torch.Tensor, k: Any, **rest: Any) -> torch.Tensor:
        return proof.operator(op, backend, fitted := _fitted(config, scores.shape[1]), fitted)(scores, k, **rest)

    return call


def _fitted(config: LaunchConfig, n: int) -> LaunchConfig:
    if config.variant != "resident":
        return config
    return LaunchConfig("resident", next_power_of_2(n), *_tail(config))


def _tail(config: LaunchConfig) -> tuple[int, int, int, int | None]:
    return config.rows_per_program, config.num_warps, config.num_stages, config.checkpoint_segments


# checkpoint_segments counts at 20 iterations: 20 saves every state, 1 none but the last, and 8 is scaled to some in between
FOUR_ROWS = LaunchConfig("resident", 0, 4, 1, 1, 8)
ONE_ROW = LaunchConfig("resident", 0, 1, 1, 1, 20)
FOUR_WARPS = LaunchConfig("resident", 0, 1, 4, 1, 1)


def _tiled(block: int) -> LaunchConfig:
    return LaunchConfig("tiled", block, 1, 1, 1, 8)


def _split(block: int, programs: int, segments: int) -> LaunchConfig:
    return LaunchConfig("split", block, 1, 1, 1, segments, programs_per_row=programs)


# --- checks ----------------------------------------------------------------------------------------------------------

REGULAR = ("normal", "ties", "cauchy", "bimodal gap", "k = n - 1", "fractional k", "offset", "uniform")
WIDE = ("cauchy", "bimodal gap", "offset", "huge scale", "tiny scale", "constant")

ANNEALED: dict[str, Any] = {"n_iters": 8, "eps": 0.05, "eps_init": 1.0, "eps_decay": 0.5}
"""Three iterations at the final eps, five before."""
UNFINISHED: dict[str, Any] = {"n_iters": 5, "eps": 0.03, "eps_init": 0.8, "eps_decay": 0.7}
"""The final eps is never reached."""
CONSTANT: dict[str, Any] = {"n_iters": 4, "eps": 0.1, "eps_init": 0.02}
"""One eps throughout, for eps_init is below it."""
COLD: dict[str, Any] = {"n_iters": 60, "eps": 1e-3, "eps_init": 4e-3, "eps_decay": 0.5}
"""The threshold goes a long way at one eps, with k = 1 beyond what an exponential over eps can span."""
SLOW: dict[str, Any] = {"n_iters": 60, "eps": 0.05, "eps_init": 0.2, "eps_decay": 0.5}
"""A long tail, through which some rows hand on their gradient; others go too far in it for one exponential."""
QUIET: dict[str, Any] = {"n_iters": 9, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.5}
"""No entry is clamped at first."""


def _case(op: str, n: int, names: tuple[str, ...], schedule: dict[str, Any] | None = None, **more: Any) -> verify.Case:
    settings: dict[str, Any] = {"op": op, "n": n, "rows": tuple((name, i) for i, name in enumerate(names)), **more}
    if op == "coordinate_descent":
        settings |= schedule or ANNEALED
        settings.pop("tensor_eps", None)
    return verify.Case(**settings)


def _seeded(case: verify.Case, seed: int) -> verify.Case:
    rows = tuple((name, at + 1000 * seed) for name, at in case.rows)
    return replace(case, rows=rows)


SPARING = (
    "values",
    "grad scores",
    "grad k",
    "grad eps",
    "box",
    "budget",
    "replays bitwise",
    "inputs untouched",
    "permutation",
    "masked tail",
)
"""The properties that are measured where a launch takes seconds, in the interpreter."""


def _examined(label: str, target: Target, case: verify.Case, device: str, only: tuple[str, ...] = properties.ALWAYS) -> Check:
    """A case in the eyes of ``verify.examine``, and nothing written beside an output."""

    def run(seed: int) -> list[tuple[str, str]]:
        seeded = _seeded(case, seed)
        found = verify.examine(target, seeded, device, only=only)
        wrong = [(one.name, f"{one.to_text()}; {seeded}") for one in found if not one.holds]
        if _guarded.broken():
            wrong.append(("guard bands", f"a launch wrote beside its output; {seeded}"))
        return wrong

    return Check(label, case.op, run)


def _rows(seed: int, rows: int, n: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng([seed, rows, n])
    scores, grad = (torch.from_numpy(rng.standard_normal((rows, n))).to(device, dtype) for _ in range(2))
    return scores, grad


def _segments_agree(config: LaunchConfig, backend: str, device: str, rows: int, n: int, schedule: dict[str, Any]) -> Check:
    """The gradient of coordinate descent is bitwise the same for every number of saved states."""
    kernels = proof.raw("coordinate_descent", backend)
    n_iters, eps, decay = schedule["n_iters"], schedule["eps"], schedule.get("eps_decay", 1.0)
    first = max(schedule.get("eps_init") or eps, eps)

    def run(seed: int) -> list[tuple[str, str]]:
        scores, grad = _rows(seed, rows, n, device)
        # rows as wide as this have thresholds that no one exponential reaches
        scores[0] *= 30.0
        k = torch.full((rows,), 0.2 * n, device=device)
        found = []
        for segments in (1, 3, n_iters):
            lam, states = kernels.forward(scores, k, None, n_iters, eps, first, decay, True, segments, _fitted(config, n))
            ds, dk = kernels.backward(grad, scores, states, k, None, n_iters, eps, first, decay, True, _fitted(config, n))
            found.append((lam, ds, dk))
        for name, values in zip(("lam", "ds", "dk"), zip(*found, strict=True), strict=True):
            if any(not torch.equal(values[0], other) for other in values[1:]):
                return [
                    ("any number of segments", f"{name} differs between 1, 3 and {n_iters} segments; seed {seed}, {rows} x {n}")
                ]
        return []

    return Check(f"segments, {config.variant}, {n_iters} iterations", "coordinate_descent", run)


def _ends_of_the_type(config: LaunchConfig, device: str) -> Check:
    """The largest and the smallest number in one row of soft_topk: half of each of the largest, nothing of the others;
    and +inf before them."""
    kernels = proof.raw("soft_topk", "triton")

    def run(seed: int) -> list[tuple[str, str]]:
        n, largest = 20, torch.finfo(torch.float32).max
        above = torch.from_numpy(np.random.default_rng(seed).permutation(n) < n // 2).to(device)
        first = torch.ones(1, device=device)
        scores = torch.cat([torch.inf * first, torch.where(above, largest, -largest)])[None]
        lam, threshold = kernels.forward(scores, 1 + n / 4, 0.03, None, _fitted(config, n + 1))
        wanted = torch.cat([first, torch.where(above, 0.5, 0.0)])[None]
        # half an ulp of the exponential and half of the product with it, and as much again
        if not torch.allclose(lam, wanted, rtol=2.0**-22, atol=0.0) or not torch.isfinite(threshold).all():
            return [("ends of the type", f"lam is {lam.tolist()} at the threshold {threshold.tolist()}; seed {seed}")]
        return []

    return Check("ends of the type", "soft_topk", run)


def _fakes_agree(op: str, impl: str, device: str) -> Check:
    """What torch.compile is told of an operator's outputs is what they are."""
    function = public(op, impl)

    def run(seed: int) -> list[tuple[str, str]]:
        recorder = _Recorder()
        for dtype in (torch.bfloat16, torch.float64):
            scores, grad = _rows(seed, 3, 12, device, dtype)
            scores.requires_grad_()
            k = torch.full((3,), 2.5, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            temperatures = (0.1, 0.1 * torch.ones_like(k)) if op == "soft_topk" else (0.1,)
            schedule = {} if op == "soft_topk" else {"n_iters": 3, "eps_init": 0.4, "eps_decay": 0.5, "checkpoint_segments": 2}
            for eps in temperatures:
                with recorder:
                    function(scores, k, eps=eps, **schedule).backward(grad)
        for called, arguments in recorder.seen:
            _guarded.on = False  # a view into a band is no output that a fake could foretell
            try:
                torch.library.opcheck(called, arguments, test_utils="test_faketensor")
            except Exception as raised:
                kinds = [str(one.dtype) if isinstance(one, torch.Tensor) else repr(one) for one in arguments]
                return [("fakes", f"{called} of {', '.join(kinds)}: {' '.join(str(raised.__cause__ or raised).split())[:300]}")]
            finally:
                _guarded.on = True
        wanted = {op, f"{op}_backward"}
        missing = wanted - {called.name().partition("::")[2].partition(".")[0] for called, _ in recorder.seen}
        return [("fakes", f"never called: {missing}")] if missing else []

    return Check("fakes", op, run)


def _edges(op: str, impl: str, device: str, rows: int, n: int) -> Check:
    """Where the answer is known to the bit: no budget, a budget for all or more, more infinite scores than budget."""
    function = public(op, impl)

    def run(seed: int) -> list[tuple[str, str]]:
        wrong = []
        for name in ("k = 0", "all masked", "k = n", "k > n", "k below the infinite"):
            scores, grad = _rows(seed, rows, n, device)
            k = torch.full((rows,), 0.2 * n, device=device)
            ones = torch.zeros_like(scores)
            if name == "k = 0":
                k.zero_()
            elif op == "coordinate_descent" and name != "all masked":
                continue  # elsewhere it is what so many iterations make of it
            elif name == "k below the infinite":
                scores[:, 2:7], k[:] = torch.inf, 3.0
                ones[:, 2:7] = 1.0
            elif name != "all masked":
                k[:] = n if name == "k = n" else n + 2
                ones[:] = 1.0
            schedule: dict[str, Any] = ANNEALED if op == "coordinate_descent" else {"eps": 0.1 * torch.ones_like(k)}
            given = [scores, k] + [value for value in schedule.values() if isinstance(value, torch.Tensor)]
            for one in given:
                one.requires_grad_()
            mask = torch.zeros_like(scores, dtype=torch.bool) if name == "all masked" else None
            lam = function(scores, k, mask=mask, **schedule)
            gradients = torch.autograd.grad(lam, given, grad)
            if not torch.equal(lam.detach(), ones):
                wrong.append(("exact at the edges", f"{name}: lam is not exactly 0 and 1; seed {seed}, {rows} x {n}"))
            elif any(bool((gradient != 0).any()) for gradient in gradients):
                wrong.append(("exact at the edges", f"{name}: a gradient is not 0; seed {seed}, {rows} x {n}"))
        return wrong

    return Check("edges", op, run)


def _twice_differentiable(impl: str, device: str) -> Check:
    """Second derivatives and forward mode of soft_topk, by differences in float64, away from kinks."""
    function = public("soft_topk", impl)

    def run(seed: int) -> list[tuple[str, str]]:
        rng = np.random.default_rng(seed)
        eps, k = np.full(2, 0.7), np.array([1.3, 2.6])
        for _ in range(100):
            s = rng.standard_normal((2, 5))
            threshold = oracles.soft_topk_truth(s, k, eps, np.ones(s.shape, bool), np.ones(s.shape), 0.0).threshold
            if np.abs(s - threshold[:, None]).min() > 0.05:
                break
        leaves = tuple(torch.from_numpy(value).to(device).requires_grad_() for value in (s, k, eps))

        def weights(*values: torch.Tensor) -> torch.Tensor:
            return function(values[0], values[1], eps=values[2])

        _guarded.on = False  # forward mode does not take a view into a band for an output
        try:
            torch.autograd.gradcheck(weights, leaves, check_forward_ad=True, fast_mode=True)
            torch.autograd.gradgradcheck(weights, leaves, check_fwd_over_rev=True, fast_mode=True)
        except GradcheckError as error:
            return [("derivatives", f"{' '.join(str(error).split())[:300]}; seed {seed}")]
        finally:
            _guarded.on = True
        return []

    return Check("second derivatives", "soft_topk", run)


def _far_apart(op: str) -> Check:
    """Rows so far apart in memory that the distance is beyond 32 bits: the bits of rows that lie close.

    Both distances are multiples of 16, so that one compiled kernel runs on both: another may add in another order.
    """
    stride, rows, n = 1_200_000_000, 3, 100

    def run(seed: int) -> list[tuple[str, str]]:
        scores, grad = _rows(seed, rows, n, "cuda", torch.bfloat16)
        close = torch.empty((rows, 112), device="cuda", dtype=torch.bfloat16)[:, :n]
        close.copy_(scores)
        memory = torch.empty((rows - 1) * stride + n, device="cuda", dtype=torch.bfloat16)
        far = memory.as_strided((rows, n), (stride, 1))
        far.copy_(scores)
        kernels = proof.raw(op, "triton")
        config, k = _fitted(ONE_ROW, n), 14.0
        found = []
        for given in (close, far):
            if op == "soft_topk":
                lam, saved = kernels.forward(given, k, 0.1, None, config)
                ds, dk, _ = kernels.backward(grad, given, saved, 0.1, None, config)
            else:
                lam, saved = kernels.forward(given, k, None, 4, 0.1, 0.4, 0.5, False, 4, config)
                ds, dk = kernels.backward(grad, given, saved, k, None, 4, 0.1, 0.4, 0.5, False, config)
            found.append((lam, ds, dk))
        same = all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        del memory, far, given  # what is not let go stays with this process
        torch.cuda.empty_cache()
        return (
            []
            if same
            else [("more than 2^31 elements", f"rows {stride} elements apart differ from rows side by side; seed {seed}")]
        )

    return Check("rows far apart", op, run)


def _warps_keep_together(op: str, config: LaunchConfig) -> Check:
    """All warps of a program have seen an exchange before it begins the next one; what comes of it else is a rare hang."""

    def run(seed: int) -> list[tuple[str, str]]:
        import triton
        from coordroute.kernels import aot

        _guarded.on = False  # what is allocated to note a launch holds nothing
        try:
            forward, *_ = aot.launches(op, "float32", 16, 4096, True, config, config)
        finally:
            _guarded.on = True
        ptx = forward.compile(triton.runtime.driver.active.get_current_target()).asm["ptx"]
        hasty = aot.hasty_exchanges(ptx)
        return [("warps keep together", f"{hasty} words are published while a warp may still wait; {config}")] if hasty else []

    return Check("warps keep together", op, run)


def _kernels(
    op: str, device: str, configs: dict[str, tuple[LaunchConfig, ...]], cases: dict[str, verify.Case], only: tuple[str, ...]
) -> Iterator[Check]:
    """Every named case with every configuration that is named with it; with an awkward memory layout every other time."""
    turn = 0
    for name, case in cases.items():
        for config in configs[name]:
            target = launched(op, "triton", config)
            turn += 1
            label = f"{name}, {config.variant}" + (f" {config.rows_per_program} rows" if config.rows_per_program > 1 else "")
            yield _examined(label, awkward(target) if turn % 2 else target, case, device, only)


def _gpu(op: str) -> Iterator[Check]:
    everything = tuple(families.FAMILIES)
    split, shared_tiles, tiled = _split(64, 2, 8), _split(16, 3, 1), _tiled(64)
    cases = {
        "every family": _case(op, 100, everything, layout="padded rows", tensor_eps=True),
        "no mask": _case(op, 128, REGULAR, UNFINISHED, eps=0.05, tensor_k=False),
        "wide": _case(op, 200, WIDE, QUIET, eps=0.03, tensor_eps=True),
        "quiet": _case(op, 128, REGULAR, QUIET, eps=0.5, tensor_k=False),
        "constant eps": _case(op, 90, REGULAR, CONSTANT, eps=1.0),
        "cold": _case(op, 1000, ("k = 1", "normal", "cauchy", "holes"), COLD, eps=1e-3, tensor_eps=True),
        "bfloat16": _case(op, 100, (*REGULAR, "holes"), dtype="bfloat16", layout="padded rows", tensor_eps=True),
        "float64": _case(op, 100, (*REGULAR, "holes"), dtype="float64", layout="padded rows", tensor_k=False),
    }
    configs: dict[str, tuple[LaunchConfig, ...]] = {
        "every family": (FOUR_ROWS, shared_tiles, split, tiled, ONE_ROW, FOUR_WARPS),
        "no mask": (ONE_ROW, split, tiled, FOUR_WARPS),
        "wide": (FOUR_ROWS, shared_tiles, tiled),
        "quiet": (ONE_ROW,),
        "constant eps": (FOUR_ROWS,),
        "cold": (ONE_ROW, split),
        "bfloat16": (ONE_ROW,),
        "float64": (split, FOUR_ROWS),
    }
    yield from _kernels(op, "cuda", configs, cases, properties.ALWAYS)
    yield _far_apart(op)
    if op == "soft_topk":
        yield _ends_of_the_type(ONE_ROW, "cuda")
    yield _warps_keep_together(op, LaunchConfig("split", 1024, 1, 4, 1, 8, programs_per_row=4))
    if op == "coordinate_descent":
        tails = _case(op, 100, ("offset", "k = n - 1", "huge scale", "holes"), SLOW)
        yield from _kernels(op, "cuda", {"tails": (FOUR_ROWS,)}, {"tails": tails}, properties.ALWAYS)
        for config in (FOUR_ROWS, tiled, split):
            yield _segments_agree(config, "triton", "cuda", 5, 100, ANNEALED)
        yield _segments_agree(FOUR_ROWS, "triton", "cuda", 5, 100, SLOW)
    yield from _front(op, "triton", "cuda", 100)


def _interpreter(op: str) -> Iterator[Check]:
    # float16, for the interpreter truncates to bfloat16 where hardware rounds
    exact = op == "soft_topk"
    cases = {
        "several families": _case(op, 20, ("normal", "holes", "k >= n", "NaN", "infinite"), layout="padded rows", tensor_eps=True),
        "no mask": _case(op, 28, ("normal", "ties"), UNFINISHED, eps=0.5, tensor_k=False, layout="padded rows"),
        "tiles": _case(op, 20, ("holes", "infinite", "NaN"), CONSTANT, eps=0.1, tensor_eps=True, layout="padded rows"),
        "wide": _case(op, 32, ("cauchy", "offset", "huge scale", "normal"), QUIET, eps=0.03, tensor_eps=True),
        "quiet": _case(op, 28, ("normal", "uniform"), QUIET, eps=0.2),
        "cold": _case(op, 20, ("k = 1", "uniform"), COLD, eps=1e-3),
        "float16": _case(op, 20, ("normal", "holes"), UNFINISHED, dtype="float16", tensor_eps=True, layout="padded rows"),
        "float64": _case(op, 20, ("normal", "holes"), UNFINISHED, dtype="float64", tensor_k=False),
        "shared": _case(
            op, 20, ("normal",), {"n_iters": 3, "eps": 0.1, "eps_init": 0.3, "eps_decay": 0.4}, eps=0.5, tensor_eps=True
        ),
    }
    configs: dict[str, tuple[LaunchConfig, ...]] = {
        "several families": (FOUR_ROWS,),
        "no mask": (ONE_ROW,),
        "tiles": (_tiled(8),),
        "wide": (FOUR_ROWS, _tiled(16)) if exact else (FOUR_ROWS,),
        "quiet": (ONE_ROW,),
        "cold": (FOUR_ROWS,),
        "float16": (ONE_ROW,),
        "float64": (FOUR_ROWS,),
        "shared": (_split(16, 2, 8),),
    }
    yield from _kernels(op, "cpu", configs, cases, SPARING)
    if exact:
        yield _ends_of_the_type(ONE_ROW, "cpu")
    else:
        yield _segments_agree(FOUR_ROWS, "triton", "cpu", 2, 16, ANNEALED)
    transposed = _case(op, 17, ("normal", "k >= n"), CONSTANT, layout="transposed", tensor_eps=True)
    yield _examined("transposed, public", public(op, "triton"), transposed, "cpu", SPARING)
    yield _edges(op, "triton", "cpu", 3, 17)


def _cpu(op: str) -> Iterator[Check]:
    everything = tuple(families.FAMILIES)
    few_rows, one_block = LaunchConfig("eager", 0, 3, 0, 0, 20), LaunchConfig("eager", 0, 1000, 0, 0, 8)
    cases = {
        "every family": (_case(op, 100, everything, layout="padded rows", tensor_eps=True), few_rows),
        "no mask": (_case(op, 128, REGULAR, UNFINISHED, eps=0.05, tensor_k=False), one_block),
        "wide": (_case(op, 200, (*WIDE, "NaN"), QUIET, eps=0.03, tensor_eps=True), few_rows),
        "masked": (_case(op, 200, ("holes", "ragged mask", "k = 0", "k >= n", "infinite"), CONSTANT, eps=1e-3), one_block),
        "short": (_case(op, 5, everything, layout="strided"), few_rows),
        "cold": (_case(op, 1000, ("k = 1", "normal", "cauchy", "holes"), COLD, eps=1e-3), few_rows),
        "many rows": (_case(op, 100, ("normal", "uniform") * 24, UNFINISHED, eps=0.03), one_block),
        "bfloat16": (_case(op, 100, (*REGULAR, "holes"), dtype="bfloat16", tensor_eps=True), few_rows),
        "float64": (_case(op, 100, everything, dtype="float64", tensor_eps=True), one_block),
        "long": (_case(op, 8200, ("normal", "holes"), UNFINISHED, eps=0.05, tensor_eps=True), one_block),
    }
    for turn, (name, (case, config)) in enumerate(cases.items()):
        target = launched(op, "cpu", config)
        yield _examined(f"{name}, {config.rows_per_program} rows", target if turn % 2 else awkward(target), case, "cpu")
    if op == "coordinate_descent":
        yield _segments_agree(few_rows, "cpu", "cpu", 5, 100, ANNEALED)
    yield from _front(op, "torch", "cpu", 100)


def _front(op: str, impl: str, device: str, n: int) -> Iterator[Check]:
    """The public path: strides, dimensions, autograd and registration."""
    names = ("normal", "holes", "k >= n", "infinite", "ties", "NaN")
    for name, target, schedule, more in (
        ("public", public(op, impl), ANNEALED, {"layout": "transposed", "tensor_eps": True}),
        ("public, awkward", awkward(public(op, impl)), CONSTANT, {"layout": "strided", "tensor_eps": True}),
        ("public, any dimension", any_dim(op, impl), ANNEALED, {"tensor_eps": True}),
        ("public, numbers", public(op, impl), CONSTANT, {"tensor_k": False}),
        ("public, half precision", public(op, impl), ANNEALED, {"dtype": "bfloat16", "tensor_eps": True}),
        ("registered", registered(op, impl), ANNEALED, {"layout": "padded rows", "tensor_eps": True}),
        ("registered, numbers", registered(op, impl), CONSTANT, {"tensor_k": False}),
    ):
        used = names if more.get("tensor_k", True) else names[:1]
        yield _examined(name, target, _case(op, n, used, schedule, eps=0.1, **more), device)
    yield _edges(op, impl, device, 24, n)
    if op == "soft_topk":
        yield _twice_differentiable(impl, device)
    yield _fakes_agree(op, impl, device)


def checks(place: str, ops_wanted: tuple[str, ...] = OPS) -> list[Check]:
    """The suite of a place, in order: the operators in turn."""
    make = {"cpu": _cpu, "interpreter": _interpreter, "gpu": _gpu}[place]
    lists = [list(make(op)) for op in ops_wanted]
    return [column[i] for i in range(max(map(len, lists))) for column in lists if i < len(column)]


def quiet() -> None:
    """numpy, which is what the interpreter computes with, tells of every inf - inf that a select throws away."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def main() -> int:
    place, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    quiet()
    guard(place)
    failed = 0
    for check in checks(place):
        wrong = check.run(seed)
        failed += bool(wrong)
        print(json.dumps({"op": check.op, "check": check.label, "wrong": wrong}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
