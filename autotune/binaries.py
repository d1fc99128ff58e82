"""What the compiler makes of a candidate, without a launch: registers, spills, shared memory, and whether another is the same."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..kernels import config as kernel_config
from ..kernels.config import Key, LaunchConfig
from . import space
from .proof import PUBLISHED, compute_dtype, one_line, raw, run_backward, run_forward

if TYPE_CHECKING:
    from ..kernels.aot import Noted

SPILLING = "spills"
FAILING = "does not compile"
OK = "ok"


class Compiled(NamedTuple):
    """What became of a candidate in the compiler.

    Attributes:
        status: "ok", "does not compile" or "spills"; from a worker also "crashes" or "hangs".
        reason: for a person; "" when it is ok.
        registers: a thread, the most of any kernel; None where nothing was compiled.
        spills: bytes or registers spilled a thread, as Triton counts them, the most of any kernel.
        shared: bytes of shared memory a program, the most of any kernel.
        occupancy: warps that a multiprocessor holds at a time by registers and shared memory, as a share of its most.
        identity: the same for two candidates whose launches are the same to the bit; "" where that is not known.
        seconds: what compiling took.
    """

    status: str
    reason: str = ""
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    occupancy: float | None = None
    identity: str = ""
    seconds: float = 0.0


def compiled(device: torch.device, key: Key, config: LaunchConfig, is_default: bool) -> Compiled:
    """Compiles what a candidate launches when it is timed; the binary is in Triton's cache afterwards.

    Nothing runs on the GPU. A candidate that spills registers is dropped, unless it is the default or its registers are
    capped: there a few spills may be the price of more programs side by side. One whose program does not fit a
    multiprocessor does not compile, as Triton has it. On a CPU nothing is compiled ahead.

    Args:
        device: the GPU to compile for, which must be there.
        key: what the candidate is for.
        config: the candidate.
        is_default: whether it is what serves where nothing is tuned.
    """
    if device.type != "cuda":
        return Compiled(OK)
    begin = time.perf_counter()
    try:
        kernels = _kernels(device, key, config)
    except Exception as error:
        return Compiled(FAILING, one_line(error), seconds=round(time.perf_counter() - begin, 3))
    registers = max(kernel.n_regs for _, kernel in kernels)
    spills = max(kernel.n_spills for _, kernel in kernels)
    shared = max(kernel.metadata.shared for _, kernel in kernels)
    parts = "\n".join(f"{launch} {hashlib.sha256(kernel.kernel).hexdigest()}" for launch, kernel in kernels)
    found = Compiled(
        OK,
        "",
        registers,
        spills,
        shared,
        round(min(_occupancy(device, kernel) for _, kernel in kernels), 4),
        hashlib.sha256(parts.encode()).hexdigest(),
        round(time.perf_counter() - begin, 3),
    )
    if spills and not is_default and not config.max_registers:
        return found._replace(status=SPILLING, reason=f"{spills} spilled at {registers} registers")
    return found


def prepare(
    device: torch.device, op: str, dtype: str, n: int, direction: str, config: LaunchConfig, form: int, most: int | None = None
) -> int:
    """Compiles what a proof launches of one direction in one form, so that it finds it in Triton's cache. Nothing runs on the GPU.

    Args:
        device: what is compiled for.
        op, dtype, n, direction: of the key.
        config: the configuration of that direction.
        form: which of the :data:`FORMS` of the direction.
        most: rows of a batch, at most; None is any.

    Returns:
        How many launches were compiled; 0 on a CPU.
    """
    if device.type != "cuda":
        return 0
    with torch.cuda.device(device):
        found = proof_launches(op, dtype, n, direction, config, _processors(device), most)[form]
        for function, grid, arguments, passed in found:
            function.warmup(*arguments, grid=grid, **passed)
    return len(found)


FORMS = {"forward": 3, "backward": 2}
"""In how many forms a proof launches each direction: plain; masked, with k (and eps) as tensors; and so at another length."""


def proof_launches(
    op: str, dtype: str, n: int, direction: str, config: LaunchConfig, processors: int, most: int | None = None
) -> list[list[Noted]]:
    """What a proof (``reference.cases.proof_cases`` and its properties) launches of a direction in each form, on tensors that
    hold nothing. The other direction's configuration has no part in it.
    """
    from ..kernels.aot import noted
    from ..reference.cases import proof_cases

    kernels, exact, is_backward = raw(op, "triton"), op == "soft_topk", direction == "backward"
    cases = proof_cases(op, dtype, n, 0, most)
    plain, full = cases[0], next(case for case in cases if case.tensor_k)
    # rows, length, whether masked and with k (and eps) as tensors
    forms = [(len(plain.rows), plain.n, False), (len(full.rows), full.n, True), (len(full.rows), full.n + 3, True)]
    found: list[list[Noted]] = []
    for rows, length, masked in forms[: FORMS[direction]]:
        forward = config
        if is_backward:
            key = kernel_config.make_key(op, "forward", getattr(torch, dtype), rows, length)
            forward = space.with_segments(kernel_config.heuristic(key, "triton"), config.checkpoint_segments)
        scores = torch.empty((rows, length), dtype=getattr(torch, dtype), device="meta")
        per_row = torch.empty(rows, dtype=compute_dtype(scores.dtype), device="meta")
        mask = torch.empty((rows, length), dtype=torch.bool, device="meta") if masked else None
        k: Any = per_row if masked else 1.0
        schedule = (PUBLISHED.n_iters, PUBLISHED.eps, PUBLISHED.eps_init, PUBLISHED.eps_decay, masked)
        with noted(processors) as launches:
            if exact:
                _, saved = kernels.forward(scores, k, k, mask, forward)
            else:
                segments = kernel_config.scale_segments(forward, PUBLISHED.n_iters)
                _, saved = kernels.forward(scores, k, mask, *schedule, segments, forward)
            if is_backward:
                launches.clear()
                if exact:
                    kernels.backward(scores, scores, saved, k, mask, config)
                else:
                    kernels.backward(scores, scores, saved, k, mask, *schedule, config)
            found.append(list(launches))
    return found


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _kernels(device: torch.device, key: Key, config: LaunchConfig) -> list[tuple[str, Any]]:
    """What the candidate launches: how, as text, and the compiled kernel."""
    from ..kernels.aot import noted

    scores = torch.empty((key.rows, key.n), dtype=getattr(torch, key.dtype), device="meta")
    kernels = raw(key.op, "triton")
    with torch.cuda.device(device), noted(_processors(device)) as launches:
        _, saved = run_forward(key.op, kernels, scores, config)
        if key.direction == "backward":
            launches.clear()
            run_backward(key.op, kernels, scores, scores, saved, config)
        found = []
        for function, grid, arguments, passed in launches:
            kernel = function.warmup(*arguments, grid=grid, **passed)
            kernel._init_handles()  # which asks the driver for registers and spills
            numbers = [argument for argument in arguments if not isinstance(argument, torch.Tensor)]
            found.append((f"{grid} {numbers} {kernel.metadata.num_warps}", kernel))
    return found


def _occupancy(device: torch.device, kernel: Any) -> float:
    """Warps that fit a multiprocessor as a share of its most: registers are given out to a warp in units of 256."""
    properties = torch.cuda.get_device_properties(device)
    most = properties.max_threads_per_multi_processor // 32
    warps = kernel.metadata.num_warps
    by_registers = getattr(properties, "regs_per_multiprocessor", 65536) // (-(-kernel.n_regs * 32 // 256) * 256 * warps)
    by_shared = most
    if kernel.metadata.shared:
        by_shared = properties.shared_memory_per_multiprocessor // kernel.metadata.shared
    return min(by_registers, by_shared, most // warps) * warps / most
