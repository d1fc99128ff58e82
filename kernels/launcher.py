"""Launches Triton kernels, and spares a launch that was seen before most of the host's work.

``kernel[grid](…)`` binds, specialises and stringifies every argument on each call. Here the binary that a launch ran is
remembered under all that it depends on, and the next launch of the kind runs it as Triton would.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

KNOWN = ("3.6", "3.7")
"""Releases of Triton whose caches and whose way to run a binary are known to be as they are used here."""

_known = ".".join(triton.__version__.split(".")[:2]) in KNOWN
if _known:
    from triton.runtime.jit import native_specialize_impl as _specialize
_NO, _YES = repeat(False), repeat(True)


class _Binary(NamedTuple):
    """A compiled kernel, the place where Triton keeps it, and what a launch needs beside the arguments of the call."""

    kernel: JITFunction  # which keeps the id in the key its own
    compiled: CompiledKernel
    cache: dict[str, Any]
    cache_key: str
    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[Any, ...]
    globals: tuple[tuple[dict[str, Any], str, Any], ...]  # what the kernel's source refers to: where, name, object


_binaries: dict[tuple[Any, ...], _Binary] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` for less host time from the second launch of a kind on.

    The kind of a launch is: kernel and device; what Triton's own specialisation makes of each argument (dtype and alignment of
    a pointer, type of a number, whether an integer is 1 or a multiple of 16); constants and options. The ordinary path serves
    whatever is not known to be the same in every respect: the first of a kind, launch hooks, debugging, a cleared cache, a
    changed global, an unknown release of Triton, and the interpreter.

    Args:
        kernel: a ``@triton.jit`` function, its constexprs last.
        grid: one to three sizes.
        args: the arguments of all parameters that are no constexpr, in order. None, for a pointer that is never read, is cheapest.
        constants: all constexprs, and the options of the launch (num_warps, num_stages, launch_cooperative_grid, …).
    """
    if not _known or type(kernel) is not JITFunction:
        kernel[grid](*args, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    cache, _, _, backend, _ = kernel.device_caches[device]
    kinds = map(_specialize, repeat(backend), args, _NO, _YES, _YES)
    key = (id(kernel), device, *kinds, *constants, *constants.values())
    binary = _binaries.get(key)
    if (
        binary is not None
        and binary.cache is cache
        and cache.get(binary.cache_key) is binary.compiled
        and _undisturbed(kernel, binary.globals)
    ):
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        # three times None: there are no hooks, and nothing to tell them
        binary.run(x, y, z, stream, binary.function, binary.metadata, None, None, None, *args, *binary.constants)
        return
    compiled = kernel[grid](*args, **constants)
    if isinstance(compiled, CompiledKernel):
        _remember(key, kernel, compiled, cache, len(args), constants)


def _undisturbed(kernel: JITFunction, used: tuple[tuple[dict[str, Any], str, Any], ...]) -> bool:
    """Whether the ordinary path would do nothing but to run the binary."""
    runtime = knobs.runtime
    if (
        getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or kernel.pre_run_hooks
        or runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None)
    ):
        return False
    for namespace, name, value in used:  # noqa: SIM110 (this is on the path of every launch)
        if namespace.get(name) is not value:
            return False
    return True


def _remember(
    key: tuple[Any, ...],
    kernel: JITFunction,
    compiled: CompiledKernel,
    cache: dict[str, Any],
    n_args: int,
    constants: dict[str, Any],
) -> None:
    parameters = kernel.params
    ordered = all(parameter.is_constexpr == (i >= n_args) for i, parameter in enumerate(parameters))
    if not ordered or any(parameter.name not in constants for parameter in parameters[n_args:]):
        raise TypeError(
            f"{kernel.__name__} was launched with {n_args} positional arguments and {sorted(constants)}; needed are all"
            " parameters that are no constexpr, in order, and each constexpr, which come last, by its name"
        )
    cache_key = next((name for name, found in cache.items() if found is compiled), None)
    if cache_key is not None:
        tail = tuple(constants[parameter.name] for parameter in parameters[n_args:])
        used = tuple((namespace, name, namespace.get(name)) for (name, _), (_, namespace) in kernel.used_global_vals.items())
        _binaries[key] = _Binary(
            kernel, compiled, cache, cache_key, compiled.run, compiled.function, compiled.packed_metadata, tail, used
        )
