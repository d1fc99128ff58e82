"""What every Triton launch of this package needs: argument forms, compute types, tiles."""

import functools
import math
from typing import NamedTuple

import torch
import triton.language as tl

from .config import LaunchConfig

VARIANTS = ("resident", "split", "tiled")


def compute_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """The type a kernel computes in, for torch and for Triton: float64 for float64 scores, else float32."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def row_value_args(value: torch.Tensor | float) -> tuple[torch.Tensor | None, float, int]:
    """Pointer, number and stride of a per-row value."""
    if isinstance(value, float):
        return None, value, 0
    if isinstance(value, torch.Tensor):
        return value, 0.0, value.stride(0)
    return None, float(value), 0


_POSITIVE = {dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64)}


def positive(value: float, dtype: torch.dtype) -> float:
    """A number > 0 as one that is still > 0, and finite, in the compute type (1e-50 is 0 in float32)."""
    least, most = _POSITIVE[dtype]
    return value if least <= value <= most else min(max(value, least), most)


def mask_args(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """Pointer and row stride of a mask."""
    if mask is None:
        return None, 0
    return mask.view(torch.uint8), mask.stride(0)


def dtype_of(tensor: torch.Tensor | None) -> torch.dtype | None:
    """The dtype of a tensor that may be missing."""
    return None if tensor is None else tensor.dtype


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


class Tiles(NamedTuple):
    """How a launch lays rows over programs and threads; see rows.py.

    Attributes:
        rows: rows a program.
        programs: programs a row; one of the two is 1.
        chunk: columns a program.
        reps, lanes, vec: the tile of a program is [reps, rows, lanes, vec].
        held: a program's columns fit its tile.
        even: its columns are whole tiles, so that nothing lies outside.
        unit: what lengths and strides are multiples of that Triton does not find to be, or 1; see ``rows.multiple``.
    """

    rows: int
    programs: int
    chunk: int
    reps: int
    lanes: int
    vec: int
    held: bool
    even: bool
    unit: int


def tiles(config: LaunchConfig, n_rows: int, n_cols: int, itemsize: int, processors: int | None, strides: tuple[int, ...]) -> Tiles:
    """The tiles of a launch on scores [n_rows, n_cols] of so many bytes each, and ``strides`` of all that is read or written.

    ``processors`` says that programs that share a row wait for each other, so that all must run at the same time: then there are
    at most as many as that. Where it leaves a row less than two, one program re-reads it. None says that they do not.
    """
    programs = config.programs_per_row
    if processors is not None and programs > 1:
        programs = max(1, min(programs, processors // max(n_rows, 1)))
    # a thread has at least two columns, see rows.py
    block, rows, chunk = max(config.block, 2), 1, n_cols
    if config.variant == "resident":
        rows = config.rows_per_program
    if config.variant == "split":
        # a chunk begins where a load of 16 bytes may
        chunk = max(16, -(-n_cols // (programs * 16)) * 16)
        programs = max(1, -(-n_cols // chunk))
    else:
        programs = 1
    # as many neighbours as are aligned in rows that lie side by side; rows that lie otherwise have the same sums, to the bit
    threads = max(1, 32 * config.num_warps // rows)
    vec = min(math.gcd(16 // itemsize, n_cols), 8, block)
    if vec == 1 and block < 2 * threads:
        vec = 2
    lanes = min(threads, block // vec)
    reps = block // (lanes * vec)
    even = n_cols > 0 and n_cols == programs * chunk and chunk % block == 0
    # Triton tells multiples of 16 from all others, and no more
    sizes = (n_cols, *strides)
    unit = 1 if all(size % 16 == 0 for size in sizes) else math.gcd(vec, *sizes)
    return Tiles(rows, programs, chunk, reps, lanes, vec, chunk <= block, even, unit)


def processors(device: torch.device) -> int:
    """How many programs surely run at the same time: one a processor. There is no limit where programs are interpreted."""
    return _processors(device.index) if device.type == "cuda" else 1 << 20


@functools.cache
def _processors(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def compile_options(config: LaunchConfig) -> dict[str, int]:
    """The options of a configuration that Triton compiles with."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    # Triton knows no such limit on AMD, and takes no option that it does not know
    if config.max_registers and torch.version.hip is None:
        options["maxnreg"] = config.max_registers
    return options


def cooperative(device: torch.device) -> bool:
    """Whether programs can wait for each other: on a GPU, but not in Triton's interpreter, which runs one after another."""
    return device.type == "cuda"
