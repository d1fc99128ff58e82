"""The proof of an entry: a forward and a backward configuration, checked against the float64 oracle before the last race."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..kernels import config as kernel_config
from ..kernels.config import LaunchConfig
from .fingerprint import kernel_sha256, source_files

__all__ = ["Proved", "check", "kernel_sha256", "launched", "operator", "prove", "raw", "source_files"]


class Raw(NamedTuple):
    """The raw kernels of one operator: rows in, rows out, no autograd."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def raw(op: str, backend: str) -> Raw:
    """The raw kernels of ``op`` on ``backend`` (``"triton"`` or ``"cpu"``)."""
    module: ModuleType
    if backend == "cpu":
        from ..kernels import cpu as module
    elif op == "soft_topk":
        from ..kernels import soft_topk as module
    else:
        from ..kernels import coordinate_descent as module
    return Raw(getattr(module, f"{op}_forward"), getattr(module, f"{op}_backward"))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def operator(op: str, backend: str, forward: LaunchConfig, backward: LaunchConfig) -> Callable[..., torch.Tensor]:
    """A differentiable operator on rows, launched with the two configurations and no other.

    Its signature is that of the reference's oracles: ``(scores [R, n], k, *, eps, mask=None)`` for ``soft_topk`` and
    ``(scores, k, *, n_iters, eps, eps_init=None, eps_decay=1.0, mask=None)`` for ``coordinate_descent``; k (and eps of
    ``soft_topk``) a number or a tensor [R].
    """
    kernels = raw(op, backend)
    return _soft_topk(kernels, forward, backward) if op == "soft_topk" else _descent(kernels, forward, backward)


def _per_row(value: Any, scores: torch.Tensor) -> Any:
    """A number as it is; a tensor as one value for each row, in the compute dtype."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    return value.detach().to(scores.device, compute_dtype(scores.dtype)).reshape(-1).expand(scores.shape[0])


def _like(gradient: torch.Tensor, value: Any) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor):
        return None
    summed = gradient.sum() if value.numel() == 1 and gradient.numel() != 1 else gradient
    return summed.reshape(value.shape).to(value.device, value.dtype)


def _soft_topk(kernels: Raw, forward: LaunchConfig, backward: LaunchConfig) -> Callable[..., torch.Tensor]:
    class SoftTopk(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, scores: Any, k: Any, eps: Any, mask: Any) -> Any:
            lam, threshold = kernels.forward(scores, _per_row(k, scores), _per_row(eps, scores), mask, forward)
            ctx.save_for_backward(scores, threshold, mask)
            ctx.k, ctx.eps = k, eps
            return lam

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            scores, threshold, mask = ctx.saved_tensors
            eps = _per_row(ctx.eps, scores)
            dscores, dk, deps = kernels.backward(grad.contiguous(), scores, threshold, eps, mask, backward)
            return dscores, _like(dk, ctx.k), _like(deps, ctx.eps), None

    def soft_topk(scores: torch.Tensor, k: Any, *, eps: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
        return SoftTopk.apply(scores, k, eps, mask)

    return soft_topk


def _descent(kernels: Raw, forward: LaunchConfig, backward: LaunchConfig) -> Callable[..., torch.Tensor]:
    class CoordinateDescent(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, scores: Any, k: Any, mask: Any, n_iters: int, eps: float, first: float, decay: float) -> Any:
            schedule = (n_iters, eps, first, decay, isinstance(k, torch.Tensor))
            n_iters, eps, first, decay, clamp = schedule
            segments = kernel_config.scale_segments(forward, n_iters)
            rows_k = _per_row(k, scores)
            lam, states = kernels.forward(scores, rows_k, mask, n_iters, eps, first, decay, clamp, segments, forward)
            ctx.save_for_backward(scores, states, mask)
            ctx.k, ctx.schedule = k, schedule
            return lam

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            scores, states, mask = ctx.saved_tensors
            rows_k = _per_row(ctx.k, scores)
            dscores, dk = kernels.backward(grad.contiguous(), scores, states, rows_k, mask, *ctx.schedule, backward)
            return dscores, _like(dk, ctx.k), None, None, None, None, None

    def coordinate_descent(
        scores: torch.Tensor,
        k: Any,
        *,
        n_iters: int,
        eps: float,
        eps_init: float | None = None,
        eps_decay: float = 1.0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        first = max(eps_init or eps, eps)
        return CoordinateDescent.apply(scores, k, mask, n_iters, eps, first, eps_decay)

    return coordinate_descent


# --- what the compiler made ------------------------------------------------------------------------------------------


class Binary(NamedTuple):
    """What the compiler reports of the kernels that were launched.

    Attributes:
        sha256: over the compiled kernels, in the order of their hashes; None where there are none (CPU).
        registers: a thread, the most of any kernel.
        spills: registers spilled, the most of any kernel.
        shared: bytes of shared memory, the most of any kernel.
    """

    sha256: str | None
    registers: int | None
    spills: int | None
    shared: int | None


NO_BINARY = Binary(None, None, None, None)


@contextlib.contextmanager
def launched(device: torch.device) -> Iterator[Callable[[], Binary]]:
    """Records which compiled Triton kernels are launched inside; the function it yields says what they are."""
    handles: set[Any] = set()

    def enter(metadata: Any) -> None:
        handles.add(metadata.get()["function"])

    if device.type != "cuda":
        yield lambda: NO_BINARY
        return
    from triton import knobs

    knobs.runtime.launch_enter_hook.add(enter)
    try:
        yield lambda: _binary(handles, device)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)


def _binary(handles: set[Any], device: torch.device) -> Binary:
    from triton.runtime.jit import JITFunction

    package = kernel_config.__name__.rpartition(".")[0] + "."
    index = torch.cuda.current_device() if device.index is None else device.index
    kernels: dict[int, Any] = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith(package):
            continue
        for function in vars(module).values():
            if isinstance(function, JITFunction) and index in function.device_caches:
                for kernel in function.device_caches[index][0].values():
                    if getattr(kernel, "function", None) in handles:
                        kernels[id(kernel)] = kernel
    if not kernels:
        return NO_BINARY
    hashes = sorted(hashlib.sha256(kernel.kernel).hexdigest() for kernel in kernels.values())
    return Binary(
        hashlib.sha256("".join(hashes).encode()).hexdigest(),
        max(kernel.n_regs for kernel in kernels.values()),
        max(kernel.n_spills for kernel in kernels.values()),
        max(kernel.metadata.shared for kernel in kernels.values()),
    )


# --- the check -------------------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """The outcome of a check: the proof as it stands in a file, or None and the reason."""

    proof: dict[str, Any] | None
    reason: str


def check(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    forward: LaunchConfig,
    backward: LaunchConfig,
    binary_sha256: str | None,
    seed: int = 0,
    most: int | None = None,
) -> Checked:
    """Checks values and gradients of one pair of configurations against the float64 oracle.

    Args:
        op: ``"soft_topk"`` or ``"coordinate_descent"``.
        device: where it runs.
        dtype: of the scores.
        n: length of the rows.
        forward: configuration of the forward kernel.
        backward: configuration of the backward kernel.
        binary_sha256: of the compiled kernel that the proof is for; None on a CPU, where none is kept.
        seed: of the inputs.
        most: rows of a batch, at most; None is any.
    """
    from ..reference import verify

    backend = "triton" if device.type == "cuda" else "cpu"
    target = operator(op, backend, forward, backward)
    found = verify.check_candidate(target, op, device=device, dtype=dtype, n=n, seed=seed, most=most)
    if not found["ok"]:
        return Checked(None, str(found.get("reason") or "differs from the oracle"))
    names = ("cases", "families", "max_error", "bound", "replays_bitwise", "seed")
    proof = {"kernel_sha256": kernel_sha256(op, backend), "binary_sha256": binary_sha256}
    return Checked(proof | {name: found[name] for name in names}, "")


# --- a pair ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The settings at which a key is proved and timed: the published ones.

    k is 9/64 of n, and the temperatures of ``coordinate_descent`` go from 4 to 0.03 by 0.7 in 20 iterations.
    """

    n_iters: int = kernel_config.TUNED_N_ITERS
    eps: float = 0.03
    eps_init: float = 4.0
    eps_decay: float = 0.7

    def k(self, n: int) -> float:
        return max(1.0, 9 * n / 64)


PUBLISHED = Problem()


def run_forward(op: str, kernels: Raw, scores: torch.Tensor, config: LaunchConfig, problem: Problem = PUBLISHED) -> Any:
    """One raw forward at the published settings; returns (lam, saved)."""
    k = problem.k(scores.shape[-1])
    if op == "soft_topk":
        return kernels.forward(scores, k, problem.eps, None, config)
    schedule = (problem.n_iters, problem.eps, problem.eps_init, problem.eps_decay)
    segments = kernel_config.scale_segments(config, problem.n_iters)
    return kernels.forward(scores, k, None, *schedule, False, segments, config)


def run_backward(
    op: str,
    kernels: Raw,
    grad: torch.Tensor,
    scores: torch.Tensor,
    saved: torch.Tensor,
    config: LaunchConfig,
    problem: Problem = PUBLISHED,
) -> Any:
    """One raw backward at the published settings, with what the forward saved."""
    k = problem.k(scores.shape[-1])
    if op == "soft_topk":
        return kernels.backward(grad, scores, saved, problem.eps, None, config)
    schedule = (problem.n_iters, problem.eps, problem.eps_init, problem.eps_decay)
    return kernels.backward(grad, scores, saved, k, None, *schedule, False, config)


class Proved(NamedTuple):
    """What became of a pair of configurations that was checked.

    Attributes:
        status: "ok", "wrong", and from a worker also "crashes", "hangs" or "out of memory".
        reason: for a person; "" when it is ok.
        forward, backward: the proofs as they stand in a file; None unless it is ok.
    """

    status: str
    reason: str = ""
    forward: dict[str, Any] | None = None
    backward: dict[str, Any] | None = None


def most_rows(forward: LaunchConfig, rows: int) -> int | None:
    """How many rows a batch of the proof has at most, for a key of so many; None is any.

    Programs that share a row of a forward must all run at the same time, so that of more rows fewer would share each.
    """
    return rows if forward.variant == "split" else None


def prove(
    device: torch.device, op: str, dtype: str, rows: int, n: int, forward: LaunchConfig, backward: LaunchConfig, seed: int = 0
) -> Proved:
    """Checks values and gradients of a forward and a backward that are joined, and notes the binaries that they launch.

    Args:
        device: where it runs.
        op: the operator.
        dtype: of the scores.
        rows: of the key; the check has fewer where the scores would be large, and more where programs do not share rows.
        n: length of the rows.
        forward: configuration of the forward kernel.
        backward: configuration of the backward kernel.
        seed: of the inputs.
    """
    backend = "triton" if device.type == "cuda" else "cpu"
    kernels, binaries = raw(op, backend), []
    try:
        scores = torch.randn(max(1, min(rows, (1 << 22) // n)), n, device=device, dtype=torch.float32).to(getattr(torch, dtype))
        with launched(device) as binary:
            _, saved = run_forward(op, kernels, scores, forward)
            _await(device)
            binaries.append(binary().sha256)
        with launched(device) as binary:
            run_backward(op, kernels, torch.ones_like(scores), scores, saved, backward)
            _await(device)
            binaries.append(binary().sha256)
        checked = check(op, device, scores.dtype, n, forward, backward, None, seed, most_rows(forward, rows))
    except torch.OutOfMemoryError as error:
        return Proved("out of memory", one_line(error))
    except Exception as error:
        return Proved("wrong", f"the check raised {one_line(error)}")
    if checked.proof is None:
        return Proved("wrong", checked.reason)
    return Proved("ok", "", *(checked.proof | {"binary_sha256": sha} for sha in binaries))


def _await(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_line(error: BaseException, most: int = 200) -> str:
    """An exception in one line, for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:most]
