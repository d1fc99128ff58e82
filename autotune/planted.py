"""Kernels with a fault, one for each tool of compute-sanitizer: a tool that does not see its own sees nothing.

They are launched by ``coordroute sanitize`` under the sanitizer, and by nothing else.
"""

import torch
import triton
import triton.language as tl

THREADS = 128


@triton.jit
def _planted_memcheck(x_ptr, y_ptr, N: tl.constexpr):
    """Copies x to y, which is one number too short."""
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _planted_initcheck(x_ptr, y_ptr, N: tl.constexpr):
    """Copies x, of which nobody has written anything."""
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _planted_racecheck(x_ptr, y_ptr, N: tl.constexpr):
    """Every thread writes its own number to one word of shared memory and reads it back."""
    at = tl.arange(0, N)
    word = tl.inline_asm_elementwise(
        """{
        .shared .align 4 .b32 word;
        st.volatile.shared.b32 [word], $1;
        ld.volatile.shared.b32 $0, [word];
        }""",
        "=r,r",
        [tl.load(x_ptr + at)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(y_ptr + at, word)


@triton.jit
def _planted_synccheck(x_ptr, y_ptr, N: tl.constexpr):
    """Half a warp waits at a barrier that the other threads pass by; x holds the threads' numbers."""
    at = tl.arange(0, N)
    word = tl.inline_asm_elementwise(
        """{
        .reg .pred some;
        setp.lt.s32 some, $1, 16;
        @some bar.sync 0;
        mov.b32 $0, $1;
        }""",
        "=r,r",
        [tl.load(x_ptr + at)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(y_ptr + at, word)


KERNELS = {
    "memcheck": _planted_memcheck,
    "racecheck": _planted_racecheck,
    "initcheck": _planted_initcheck,
    "synccheck": _planted_synccheck,
}


def launch(tool: str, device: torch.device) -> None:
    """Launches the fault that ``tool`` is there to find."""
    numbers = torch.arange(THREADS, dtype=torch.int32)
    x = torch.empty(THREADS, dtype=torch.int32, device=device)
    if tool != "initcheck":
        x.copy_(numbers)
    y = torch.zeros(THREADS - (tool == "memcheck"), dtype=torch.int32, device=device)
    KERNELS[tool][(1,)](x, y, N=THREADS, num_warps=THREADS // 32)
    torch.cuda.synchronize(device)
