"""Compiles every kernel variant ahead of time, with no GPU, and reports what the compiler says of it.

    python -m coordroute.kernels.aot cuda 90 32
    python -m coordroute.kernels.aot hip gfx942 64

prints a JSON list: kernel, variant, dtype, launch sizes, registers a thread and spilled bytes a thread (NVIDIA, read by
cuobjdump from the binary; null where the vendor's tools are not there), shared memory and the size of the binary.

What is compiled is what launches of the heuristic compile for aligned tensors whose length is a multiple of 16. sm_90 gets
every dtype at short, middling and the longest resident rows, and float32 at other lengths too (150 binaries, a minute of one
core); the other targets get float32, bfloat16 and float64 at one length a variant (30 binaries each, 15 s). Nothing is taken
from Triton's cache.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import coordinate_descent, soft_topk
from .config import DTYPES, LaunchConfig, heuristic, make_key

_POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float64": "*fp64"}
_SCORE_POINTERS = ("scores_ptr", "lam_ptr", "grad_ptr", "dscores_ptr")
_LENGTHS = (8192, 131072)
_THOROUGH_LENGTHS = (16, 64, 512, 8192, 16384, 131072)
_FEWER_DTYPES = ("bfloat16", "float32", "float64")


def _variants(variant: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, kernel, constants) of every kernel of a variant."""
    resident = variant == "resident"
    iterate, backward = coordinate_descent._iterate, coordinate_descent._backward
    return [
        ("soft_topk_forward", soft_topk._forward_resident if resident else soft_topk._forward_tiled, {}),
        ("soft_topk_backward", soft_topk._backward_resident if resident else soft_topk._backward_tiled, {}),
        ("coordinate_descent_iterate", iterate, {"RESIDENT": resident, "RECOMPUTE": False}),
        ("coordinate_descent_iterate", iterate, {"RESIDENT": resident, "RECOMPUTE": True}),
        ("coordinate_descent_backward", backward, {"RESIDENT": resident, "T_BLOCK": 1 if resident else 32}),
    ]


def compile_variant(
    kernel: Any, dtype: str, constants: dict[str, Any], num_warps: int, num_stages: int, target: GPUTarget, aligned: bool = True
) -> Any:
    """Compiles one kernel with its largest feature set (masks, tensor k and eps) for ``target``.

    ``aligned`` says that the length and the strides of rows are multiples of 16, which Triton finds out at a launch.
    """
    compute = "*fp64" if dtype == "float64" else "*fp32"
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name == "mask_ptr":
            signature[name] = "*u8"
        elif name in _SCORE_POINTERS:
            signature[name] = _POINTERS[dtype]
        elif name.endswith("_ptr"):
            signature[name] = compute
        else:
            signature[name] = parameter.annotation_type or "i32"
    double = dtype == "float64"
    values = {
        "K_IS_TENSOR": True,
        "EPS_IS_TENSOR": True,
        "HAS_MASK": True,
        "CLAMP_K": True,
        "COMPUTE": tl.float64 if double else tl.float32,
        "TOLERANCE": 2.0**-48 if double else 2.0**-20,
        "MAX_SWEEPS": 4096 if double else 512,
        **constants,
    }
    multiples = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or (aligned and name in ("n_cols", "scores_stride", "mask_stride", "grad_stride"))
    }
    source = ASTSource(kernel, signature, {name: values[name] for name in values if name in kernel.arg_names}, multiples)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})


def _resources(binary: bytes) -> tuple[int | None, int | None]:
    """Registers and spilled bytes a thread of a cubin, from cuobjdump; None where that cannot be read.

    ptxas spills to the stack frame of a thread, which cuobjdump prints as STACK (LOCAL is what a kernel declares itself). These
    kernels have no frame of their own, so every byte of it is a spill.
    """
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(binary)
        done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=False)
    found = {name: re.search(rf"{name}:(\d+)", done.stdout) for name in ("REG", "STACK", "LOCAL")}
    registers, stack, local = (int(match[1]) if match else None for match in found.values())
    return registers, None if stack is None or local is None else stack + local


_REGISTER = re.compile(r"%\w+")


def lopsided_sums(ptx: str) -> int:
    """Multiply-adds whose addend came from another thread, in PTX: fused already, or for ptxas to fuse.

    A sum across threads is exchanged pairwise. If one side of it is a product that is fused with the addition, each of the two
    threads rounds the other's product and not its own, and they go on with different sums (see ``soft_topk``).
    """
    foreign: set[str] = set()
    products: set[str] = set()
    found = 0
    for line in ptx.splitlines():
        operation, registers = line.strip().split(" ", 1)[0].split("\t")[0], _REGISTER.findall(line)
        if not registers:
            continue
        target, *sources = registers
        if operation.startswith("shfl"):
            foreign.add(target)
        elif operation.startswith("mov.b") and foreign & set(sources):
            foreign.add(target)  # a 64-bit value comes in halves
        elif operation.startswith("mul.f"):
            products.add(target)
        elif operation.startswith("fma"):
            found += bool(foreign & set(sources))
        elif operation.startswith(("add.f", "sub.f")):
            found += bool(foreign & set(sources)) and bool(products & set(sources))
    return found


ONE_ENTRY_A_THREAD = (LaunchConfig("resident", 32, 1, 1, 1), LaunchConfig("resident", 1024, 1, 32, 1))
"""Launches whose sums meet other threads at once, without a sum of the thread's own before."""


def launches(dtype: str, lengths: tuple[int, ...]) -> list[tuple[str, LaunchConfig]]:
    """(operator, configuration) that the heuristic launches for many rows of these lengths, each once; and one entry a thread."""
    import torch

    found = []
    for op in ("soft_topk", "coordinate_descent"):
        for n in lengths:
            launch = (op, heuristic(make_key(op, "forward", getattr(torch, dtype), 1024, n), "triton"))
            if launch not in found:
                found.append(launch)
        found += [(op, config) for config in ONE_ENTRY_A_THREAD]
    return found


def _report(
    name: str, kernel: Any, dtype: str, constants: dict[str, Any], config: LaunchConfig, target: GPUTarget, aligned: bool
) -> dict[str, Any]:
    sizes = {"ROWS": config.rows_per_program, "BLOCK": config.block}
    compiled = compile_variant(kernel, dtype, {**sizes, **constants}, config.num_warps, config.num_stages, target, aligned)
    binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    registers, spilled = _resources(binary) if target.backend == "cuda" else (None, None)
    return {
        "kernel": name,
        "variant": config.variant,
        "dtype": dtype,
        **constants,
        **sizes,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "aligned": aligned,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "binary_bytes": len(binary),
        "lopsided_sums": lopsided_sums(compiled.asm["ptx"]) if target.backend == "cuda" else None,
    }


def compile_all(target: GPUTarget) -> list[dict[str, Any]]:
    """Compiles every variant for ``target`` at the heuristic's sizes."""
    thorough = (target.backend, target.arch) == ("cuda", 90)
    record = []
    for dtype in DTYPES if thorough else _FEWER_DTYPES:
        for op, config in launches(dtype, _THOROUGH_LENGTHS if thorough else _LENGTHS):
            for name, kernel, constants in _variants(config.variant):
                for aligned in (True, False) if thorough and dtype == "float32" else (True,):
                    if name.startswith(op):
                        record.append(_report(name, kernel, dtype, constants, config, target, aligned))
    return record


def main(arguments: list[str]) -> int:
    """Compiles for the target named as ``BACKEND ARCHITECTURE WARP_SIZE`` and prints the record."""
    if len(arguments) != 3:
        sys.stderr.write("usage: python -m coordroute.kernels.aot BACKEND ARCHITECTURE WARP_SIZE, such as: cuda 90 32\n")
        return 2
    backend, architecture, warp_size = arguments
    arch: int | str = int(architecture) if backend == "cuda" else architecture
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        record = compile_all(GPUTarget(backend, arch, int(warp_size)))
    sys.stdout.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
