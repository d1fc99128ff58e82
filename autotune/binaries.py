"""What the compiler makes of a candidate, without a launch: registers, spills, shared memory, and whether another is the same."""

from __future__ import annotations

import hashlib
import time
from typing import Any, NamedTuple

import torch

from ..kernels.config import Key, LaunchConfig
from .proof import one_line, raw, run_backward, run_forward

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


def _kernels(device: torch.device, key: Key, config: LaunchConfig) -> list[tuple[str, Any]]:
    """What the candidate launches: how, as text, and the compiled kernel."""
    from ..kernels.aot import noted

    scores = torch.empty((key.rows, key.n), dtype=getattr(torch, key.dtype), device="meta")
    kernels = raw(key.op, "triton")
    with torch.cuda.device(device), noted(torch.cuda.get_device_properties(device).multi_processor_count) as launches:
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
