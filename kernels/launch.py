"""What every Triton launch of this package needs: argument forms, compute types, the device guard."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton.language as tl

from .config import LaunchConfig

VARIANTS = ("resident", "tiled")


def compute_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """The type a kernel computes in, for torch and for Triton: float64 for float64 scores, else float32."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def row_value_args(value: torch.Tensor | float, like: torch.Tensor) -> tuple[torch.Tensor, float, int]:
    """Pointer, number and stride of a per-row value; the pointer of a number is never read."""
    if isinstance(value, torch.Tensor):
        return value, 0.0, value.stride(0)
    return like, float(value), 0


def positive(value: float, dtype: torch.dtype) -> float:
    """A number > 0 as one that is still > 0, and finite, in the compute type (1e-50 is 0 in float32)."""
    info = torch.finfo(dtype)
    return min(max(value, info.tiny), info.max)


def mask_args(mask: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Pointer and row stride of a mask; the pointer of no mask is never read."""
    if mask is None:
        return like, 0
    return mask.view(torch.uint8), mask.stride(0)


def check_config(op: str, config: LaunchConfig, n_cols: int) -> None:
    """Raises ValueError where a configuration cannot launch rows of ``n_cols`` scores."""
    if config.variant not in VARIANTS:
        raise ValueError(f"{op}: variant is {config.variant!r}; a Triton launch needs one of {VARIANTS}")
    sizes = {"block": config.block}
    if config.variant == "resident":
        sizes["rows_per_program"] = config.rows_per_program
    for name, size in sizes.items():
        if size < 1 or size & (size - 1):
            raise ValueError(f"{op}: {name} is {size}; a power of two is needed")
    if config.variant == "resident" and config.block < n_cols:
        raise ValueError(f"{op}: block is {config.block}, but a resident row of {n_cols} scores needs a block of at least {n_cols}")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` current for a launch where it is a GPU that is not."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()
