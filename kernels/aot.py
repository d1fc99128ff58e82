"""Compiles every kernel variant ahead of time, with no GPU, and reports what the compiler says of it.

    python -m coordroute.kernels.aot cuda 90 32
    python -m coordroute.kernels.aot hip gfx942 64

prints a JSON list: kernel, variant, dtype, constants and options of the launch, registers a thread and spilled bytes a thread
(NVIDIA, read by cuobjdump from the binary; null where the vendor's tools are not there), shared memory, the size of the binary,
and for NVIDIA what ``lopsided_sums``, ``hasty_exchanges`` and ``layouts`` say.

What is compiled is what the operators launch, noted from their own calls on tensors that hold nothing: forward, backward, and
the recomputation of coordinate descent's states, with a mask and tensors k and eps, at the heuristic's configurations. Every
target gets float32, bfloat16 and float64 at a resident length, and the forwards of a row so short that a thread has one entry;
float32 and float64 at a row that programs share; float32 where the forward re-reads rows in tiles. sm_90 gets float16 at the
resident length too, float32 at MORE lengths, some of them no multiple of 16, and at the resident one without a mask, and
soft_topk's forward at LAUNCHES. Nothing is taken from Triton's cache.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import coordinate_descent, soft_topk
from .config import DIRECTIONS, OPS, TUNED_N_ITERS, LaunchConfig, heuristic, make_key
from .launch import compute_dtypes
from .launcher import Prepared
from .rows import LANES_FIRST

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}

PROCESSORS = 132
"""Multiprocessors of the GPU that launches are derived for, an H100's: they bound the programs that share a row."""


RESIDENT, SPLIT, TILED = (1024, 8192), (4, 131072), (1024, 131072)
"""Rows and length of which the heuristic's forward is so."""
SHORT = (4, 32)
"""Of which threads have one entry: sums meet other threads at once, without a sum of the thread's own before."""
MORE = ((4096, 64), (4096, 200), (4096, 201), (1024, 8190), (1024, 32768))
LAUNCHES = tuple(
    (n, LaunchConfig("resident", *sizes, 1))
    for n, sizes in ((256, (256, 4, 1)), (8192, (8192, 1, 8)), (1024, (1024, 1, 32)), (100, (128, 1, 1)))
)
"""Rows that share a warp, a row in 8 warps, one entry a thread in 32 warps, and loads of one entry by a warp."""


class Launch(NamedTuple):
    """A binary that a launch needs.

    Attributes:
        kernel: its name, that of the operator and of the function.
        function: the ``@triton.jit`` function.
        config: the configuration of the launch.
        dtype: of the scores.
        n: the length of the rows.
        arguments: what is passed for the parameters that are no constexpr, in order; tensors hold nothing.
        constants: the constexprs.
        options: what Triton compiles with.
    """

    kernel: str
    function: Any
    config: LaunchConfig
    dtype: str
    n: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """What Triton would make of the launch: types, and which pointers and numbers are multiples of 16."""
        constants, multiples = dict(self.constants), {}
        signature = {parameter.name: "constexpr" for parameter in self.function.params}
        for i, (parameter, value) in enumerate(zip(self.function.params, self.arguments, strict=False)):
            name = parameter.name
            if value is None:
                constants[name] = None
                continue
            pointer = isinstance(value, torch.Tensor)
            signature[name] = _TYPES[value.dtype] if pointer else parameter.annotation_type or "i32"
            whole = signature[name] == "i32" and not parameter.do_not_specialize
            if pointer or (whole and value % 16 == 0):
                multiples[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.function, signature, constants, multiples)

    def compile(self, target: GPUTarget) -> Any:
        return triton.compile(self.source(), target=target, options=self.options)


class Noted(NamedTuple):
    """A launch that was noted, not done: ``function[grid](*arguments, **passed)``."""

    function: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    passed: dict[str, Any]


@contextmanager
def noted(processors: int = PROCESSORS) -> Iterator[list[Noted]]:
    """Inside, launches are noted, not done, as on a GPU of so many multiprocessors. Tensors may be on torch's meta device."""
    found: list[Noted] = []

    def note(prepared: Prepared, pointers: tuple[Any, ...], fractions: tuple[float, ...]) -> None:
        arguments = (*pointers, *fractions, *prepared.numbers)
        found.append(Noted(prepared.kernel, prepared.grid, arguments, prepared.constants))

    with ExitStack() as stack:
        for module in (soft_topk, coordinate_descent):
            stack.enter_context(mock.patch.object(module, "launch", note))
            stack.enter_context(mock.patch.object(module, "cooperative", lambda device: True))
            stack.enter_context(mock.patch.object(module, "processors", lambda device: processors))
        yield found


def launches(op: str, dtype: str, rows: int, n: int, full: bool, forward: LaunchConfig, backward: LaunchConfig) -> list[Launch]:
    """The launches of a forward and a backward.

    ``full`` asks for what makes a kernel largest, a mask and tensors k and eps; else there is no mask, and they are numbers. The
    coordinate descent recomputes its states in the backward.
    """
    scores = torch.empty((rows, n), dtype=getattr(torch, dtype), device="meta")
    value: torch.Tensor | float = torch.empty(rows, dtype=compute_dtypes(scores.dtype)[0], device="meta") if full else 1.0
    mask = torch.empty((rows, n), dtype=torch.bool, device="meta") if full else None
    found = []
    for direction, config in (("forward", forward), ("backward", backward)):
        with noted() as made:
            if op == "soft_topk" and direction == "forward":
                _, threshold = soft_topk.soft_topk_forward(scores, value, value, mask, config)
            elif op == "soft_topk":
                soft_topk.soft_topk_backward(scores, scores, threshold, value, mask, config)
            elif direction == "forward":
                _, states = coordinate_descent.coordinate_descent_forward(
                    scores, value, mask, TUNED_N_ITERS, 0.1, 4.0, 0.7, full, 1, config
                )
            else:
                coordinate_descent.coordinate_descent_backward(
                    scores, scores, states, value, mask, TUNED_N_ITERS, 0.1, 4.0, 0.7, full, config
                )
        for function, _, arguments, passed in made:
            constants = {name: passed[name] for name in passed if name in function.arg_names}
            options = {name: passed[name] for name in passed if name not in function.arg_names}
            found.append(Launch(op + function.__name__, function, config, dtype, n, arguments, constants, options))
    return found


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
_ZERO, _ONE = r"(?:0f0{8}|0d0{16})", r"(?:0f3F800000|0d3FF0{13})"
_INDICATOR = re.compile(rf"selp\.\w+\s.*, (?:{_ZERO}, {_ONE}|{_ONE}, {_ZERO}),|set\.[\w.]+\.f32\.\w+\s")


def lopsided_sums(ptx: str) -> int:
    """Multiply-adds with an operand from another thread, in PTX: fused already, or for ptxas to fuse.

    A sum across threads is exchanged pairwise. If one side of it is a product that is fused with the addition, each of the two
    threads rounds the other's product and not its own, and they go on with different sums (see rows.py). A product by an
    indicator, which is 0 or 1, is exact fused or not, and so not counted.
    """
    foreign: set[str] = set()
    products: set[str] = set()
    indicators: set[str] = set()
    found = 0
    for line in map(str.strip, ptx.splitlines()):
        operation, registers = re.split(r"\s", line, maxsplit=1)[0], _REGISTER.findall(line)
        if not registers:
            continue
        target, *sources = registers
        if operation.startswith("shfl"):
            foreign.add(target)
        elif operation.startswith("mov.b"):
            # values of 64 bits come in halves, and two of 32 bits may go as one
            halves = len(_REGISTER.findall(line.split("}")[0])) if "{" in line.split(",")[0] else 1
            targets, sources = registers[:halves], registers[halves:]
            foreign.update(targets if foreign & set(sources) else ())
            products.update(targets if products & set(sources) else ())
            indicators.update(targets if sources and indicators >= set(sources) else ())
        elif operation.startswith(("cvt.u64", "shl.b64", "or.b64")):
            foreign.update((target,) if foreign & set(sources) else ())
        elif _INDICATOR.match(line):
            indicators.add(target)
        elif operation.startswith("mul.f"):
            products.update(() if indicators & set(sources) else (target,))
        elif operation.startswith("fma"):
            found += bool(foreign & set(sources)) and not indicators & set(sources[:2])
        elif operation.startswith(("add.f", "sub.f")):
            found += bool(foreign & set(sources)) and bool(products & set(sources))
    return found


_POLL, _PUBLISH, _BARRIER = (re.compile(word) for word in (r"\bld\.volatile\.global", r"\batom\.\S*exch", r"\bbar(?:rier)?\.sync"))


def hasty_exchanges(ptx: str) -> int:
    """Words that are published after a wait for other programs without a barrier between, in PTX in the order of its text.

    Each warp of a program waits for itself. Without a barrier one warp may publish while another still waits for words of the
    exchange before, which other programs then may overwrite: it would wait for ever (see ``rows.exchange``).
    """
    found, waited = 0, False
    for line in ptx.splitlines():
        if _POLL.search(line):
            waited = True
        elif _BARRIER.search(line):
            waited = False
        elif _PUBLISH.search(line):
            found += waited
    return found


_LAYOUT = re.compile(r"(#\w+) = #ttg.blocked<{sizePerThread = \[(.*?)\], threadsPerWarp = \[(.*?)\]")
_SCORES = re.compile(r"tt.load .*tensor<(?:\d+x){4}!tt.ptr<(?:f|bf)\d+>, (#\w+)>")


def layouts(ttgir: str) -> list[dict[str, list[int]]]:
    """How threads lie on the tiles of scores that are loaded: columns a thread and threads of a warp, [REPS, ROWS, LANES, VEC]."""
    axes = (2, 1, 0, 3) if LANES_FIRST.value else (0, 1, 2, 3)
    known = {name: (columns.split(","), threads.split(",")) for name, columns, threads in _LAYOUT.findall(ttgir)}
    return [
        {
            "columns": [int(known[name][0][axis]) for axis in axes],
            "threads": [int(known[name][1][axis]) for axis in axes],
        }
        for name in sorted(set(_SCORES.findall(ttgir)))
    ]


def _report(found: Launch, target: GPUTarget) -> dict[str, Any]:
    compiled = found.compile(target)
    nvidia = target.backend == "cuda"
    binary = compiled.asm["cubin" if nvidia else "hsaco"]
    registers, spilled = _resources(binary) if nvidia else (None, None)
    return {
        "kernel": found.kernel,
        "variant": found.config.variant,
        "dtype": found.dtype,
        "n": found.n,
        **{name: value for name, value in found.constants.items() if isinstance(value, int)},
        **found.options,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "binary_bytes": len(binary),
        "lopsided_sums": lopsided_sums(compiled.asm["ptx"]) if nvidia else None,
        "hasty_exchanges": hasty_exchanges(compiled.asm["ptx"]) if nvidia else None,
        "layouts": layouts(compiled.asm["ttgir"]) if nvidia else None,
    }


def _all_launches(thorough: bool) -> Iterator[Launch]:
    """What the module's docstring lists; some of it more than once."""
    shapes = {
        "bfloat16": (RESIDENT, SHORT),
        "float32": (RESIDENT, SPLIT, TILED, SHORT, *(MORE if thorough else ())),
        "float64": (RESIDENT, SPLIT, SHORT),
    }
    if thorough:
        shapes["float16"] = (RESIDENT,)
    for dtype in shapes:
        for op in OPS:
            for rows, n in shapes[dtype]:
                configs = [heuristic(make_key(op, way, getattr(torch, dtype), rows, n), "triton") for way in DIRECTIONS]
                forward, *backward = launches(op, dtype, rows, n, True, *configs)
                yield forward
                if (rows, n) != SHORT:
                    yield from backward
                if thorough and dtype == "float32" and (rows, n) == RESIDENT:
                    yield from launches(op, dtype, rows, n, False, *configs)
    for n, config in LAUNCHES if thorough else ():
        yield launches("soft_topk", "float32", 1024, n, True, config, config)[0]


def compile_all(target: GPUTarget) -> list[dict[str, Any]]:
    """Compiles every variant for ``target``, each binary once."""
    found: dict[tuple[str, str], Launch] = {}
    for one in _all_launches((target.backend, target.arch) == ("cuda", 90)):
        found.setdefault((one.source().hash(), str(one.options)), one)
    return [_report(one, target) for one in found.values()]


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
