"""Compiles every kernel variant ahead of time, with no GPU, and reports what the compiler says of it.

    python -m coordroute.kernels.aot cuda 90 32
    python -m coordroute.kernels.aot hip gfx942 64

prints a JSON list: kernel, variant, dtype, launch sizes, registers a thread and spilled bytes a thread (NVIDIA, read by
cuobjdump from the binary; null where the vendor's tools are not there), shared memory and the size of the binary.
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
from .config import DTYPES, heuristic, make_key

_POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float64": "*fp64"}
_SCORE_POINTERS = ("scores_ptr", "lam_ptr", "grad_ptr", "dscores_ptr")
_LENGTHS = {"resident": 8192, "tiled": 131072}


def _variants() -> list[tuple[str, Any, str, dict[str, Any]]]:
    """(name, kernel, variant, constants) of every kernel there is."""
    iterate, backward = coordinate_descent._iterate, coordinate_descent._backward
    found: list[tuple[str, Any, str, dict[str, Any]]] = []
    for variant in ("resident", "tiled"):
        resident = variant == "resident"
        forward = soft_topk._forward_resident if resident else soft_topk._forward_tiled
        found.append(("soft_topk_forward", forward, variant, {}))
        gradient = soft_topk._backward_resident if resident else soft_topk._backward_tiled
        found.append(("soft_topk_backward", gradient, variant, {}))
        for recompute in (False, True):
            constants = {"RESIDENT": resident, "RECOMPUTE": recompute}
            found.append(("coordinate_descent_iterate", iterate, variant, constants))
        found.append(("coordinate_descent_backward", backward, variant, {"RESIDENT": resident}))
    return found


def compile_variant(kernel: Any, dtype: str, constants: dict[str, Any], num_warps: int, num_stages: int, target: GPUTarget) -> Any:
    """Compiles one kernel with its largest feature set (masks, tensor k and eps) for ``target``."""
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
        "TOLERANCE": 2.0**-44 if double else 2.0**-20,
        "MAX_SWEEPS": 4096 if double else 512,
        "T_BLOCK": 32,
        **constants,
    }
    source = ASTSource(kernel, signature, {name: values[name] for name in values if name in kernel.arg_names})
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})


def _resources(binary: bytes) -> tuple[int | None, int | None]:
    """Registers and spilled bytes a thread of a cubin, from cuobjdump; None where that cannot be read."""
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(binary)
        done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=False)
    registers = re.search(r"REG:(\d+)", done.stdout)
    stack = re.search(r"STACK:(\d+)", done.stdout)
    return (int(registers[1]) if registers else None), (int(stack[1]) if stack else None)


def compile_all(target: GPUTarget) -> list[dict[str, Any]]:
    """Compiles every variant in every dtype at the heuristic's sizes for ``target``."""
    import torch

    record = []
    for name, kernel, variant, constants in _variants():
        op = "soft_topk" if name.startswith("soft_topk") else "coordinate_descent"
        for dtype in DTYPES:
            n = _LENGTHS[variant]
            config = heuristic(make_key(op, "forward", getattr(torch, dtype), 1024, n), "triton")
            sizes = {"ROWS": config.rows_per_program, "BLOCK": config.block}
            compiled = compile_variant(kernel, dtype, {**sizes, **constants}, config.num_warps, config.num_stages, target)
            binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
            registers, spilled = _resources(binary) if target.backend == "cuda" else (None, None)
            record.append(
                {
                    "kernel": name,
                    "variant": variant,
                    "dtype": dtype,
                    **constants,
                    **sizes,
                    "num_warps": config.num_warps,
                    "num_stages": config.num_stages,
                    "registers": registers,
                    "spilled_bytes": spilled,
                    "shared_bytes": compiled.metadata.shared,
                    "binary_bytes": len(binary),
                }
            )
    return record


def main(arguments: list[str]) -> int:
    """Compiles for the target named as ``BACKEND ARCHITECTURE WARP_SIZE`` and prints the record."""
    if len(arguments) != 3:
        sys.stderr.write("usage: python -m coordroute.kernels.aot BACKEND ARCHITECTURE WARP_SIZE, such as: cuda 90 32\n")
        return 2
    backend, architecture, warp_size = arguments
    arch: int | str = int(architecture) if backend == "cuda" else architecture
    sys.stdout.write(json.dumps(compile_all(GPUTarget(backend, arch, int(warp_size)))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
