"""Triton kernels that bring a process down."""

import triton
import triton.language as tl


@triton.jit
def illegal(pointer):
    tl.store(pointer + (1 << 42), 1.0)


@triton.jit
def endless(pointer):
    value = tl.load(pointer, volatile=True)
    while value == 0.0:
        value = tl.load(pointer, volatile=True)
    tl.store(pointer + 1, value)
