"""Launches Triton kernels, and spares a launch that was seen before most of the host's work.

``kernel[grid](…)`` binds, specialises and stringifies every argument on each call. Here the binary that a launch ran is
remembered under all that it depends on, and the next launch of the kind runs it as Triton would, but that tensors are given as
addresses: Triton would ask the driver about each (``getPointer`` in its backends' driver.py of 3.6, ``extractPointer`` in their
driver.c of 3.7).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from itertools import repeat
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

KNOWN = ("3.6", "3.7")
"""Releases of Triton whose caches and whose way to run a binary are known to be as they are used here."""

_known = ".".join(triton.__version__.split(".")[:2]) in KNOWN
if _known:
    from triton.runtime.jit import JITCallable
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
"""By all that a binary depends on."""


@functools.cache
def hash_in_order(module: ModuleType) -> None:
    """Has Triton hash the functions of a module of this package, and of those that it imports from, callees before callers.

    Triton ends the hash of a function with the global constants that it and its callees use, and asks a callee for them before it
    hashes it: a callee that has not been hashed before has none (``DependenciesFinder._update_hash`` in triton/runtime/jit.py, of
    3.6 and 3.7). So the key of a binary in Triton's cache would depend on what a process has launched first, and what one process
    compiled others would compile again. Of releases that are not KNOWN nothing is asked.
    """
    if not _known:
        return
    package = __name__.rpartition(".")[0]
    for function in list(vars(module).values()):
        if not isinstance(function, JITCallable):
            continue
        home = sys.modules.get(function.fn.__module__, module)
        if home is not module and home.__name__.startswith(package + "."):
            hash_in_order(home)
        _ = function.cache_key


class Prepared:
    """What launches have in common that differ in their tensors and fractions alone.

    Args:
        kernel: a ``@triton.jit`` function. Its parameters are pointers, then fractions, then whole numbers, then constexprs.
        grid: one to three sizes.
        numbers: the whole numbers, in order.
        device: the index of the GPU that is current during a launch; None for the one that is.
        constants: all constexprs, and the options of the launch (num_warps, num_stages, launch_cooperative_grid, …).
    """

    __slots__ = ("aligned", "constants", "device", "grid", "kernel", "numbers", "sizes")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], device: int | None = None, **constants: Any
    ) -> None:
        self.kernel, self.grid, self.numbers, self.device, self.constants = kernel, grid, numbers, device, constants
        if isinstance(kernel, JITFunction) and kernel.fn.__module__ in sys.modules:
            hash_in_order(sys.modules[kernel.fn.__module__])
        self.sizes = (*grid, 1, 1)[:3]
        self.aligned: dict[int, _Binary] = {}
        """By device, what ran where each pointer was a multiple of 16, if that and its dtype are all that Triton asks of one."""


def launch(prepared: Prepared, pointers: tuple[torch.Tensor | None, ...], fractions: tuple[float, ...] = ()) -> None:
    """``kernel[grid](*pointers, *fractions, *numbers, **constants)``, for less host time from the second launch of a kind on.

    The kind of a launch is: kernel and device; what Triton's own specialisation makes of each argument (dtype and alignment of
    a pointer, type of a number, whether an integer is 1 or a multiple of 16); constants and options. The ordinary path serves
    whatever is not known to be the same in every respect: the first of a kind, launch hooks, debugging, a cleared cache, a
    changed global, a tensor that is not on a GPU, an unknown release of Triton, and the interpreter.

    Args:
        prepared: the launch but for what follows. The same object again spares the host most.
        pointers: tensors, or None for one that is never read; for each the same dtype, or None, whenever ``prepared`` is launched.
        fractions: floats, for parameters that are annotated as such, so that no value of theirs makes another binary.
    """
    kernel = prepared.kernel
    if not _known or type(kernel) is not JITFunction:
        kernel[prepared.grid](*pointers, *fractions, *prepared.numbers, **prepared.constants)
        return
    active = driver.active
    device = active.get_current_device()
    if prepared.device is not None and prepared.device != device:
        with torch.cuda.device(prepared.device):
            launch(prepared, pointers, fractions)
        return
    cache = kernel.device_caches[device][0]
    # an address that is given as a number is not looked up in the driver, one by one
    addresses: list[int | None] = []
    aligned = reachable = True
    for pointer in pointers:
        if pointer is None:
            addresses.append(None)
            continue
        address = pointer.data_ptr()
        aligned = aligned and not address % 16
        reachable = reachable and pointer.is_cuda
        addresses.append(address)
    binary = prepared.aligned.get(device) if aligned else None
    if binary is None:
        binary = _binaries.get(_kind(prepared, pointers, fractions, device))
        if binary is not None and aligned:
            _keep(prepared, device, binary)
    if (
        binary is not None
        and reachable
        and binary.cache is cache
        and cache.get(binary.cache_key) is binary.compiled
        and _undisturbed(kernel, binary.globals)
    ):
        stream = active.get_current_stream(device)
        # three times None: there are no hooks, and nothing to tell them
        binary.run(
            *prepared.sizes, stream, binary.function, binary.metadata, None, None, None,
            *addresses, *fractions, *prepared.numbers, *binary.constants,
        )  # fmt: skip
        return
    compiled = kernel[prepared.grid](*pointers, *fractions, *prepared.numbers, **prepared.constants)
    if isinstance(compiled, CompiledKernel):
        _remember(prepared, pointers, fractions, compiled, device, aligned)


def _kind(
    prepared: Prepared, pointers: tuple[torch.Tensor | None, ...], fractions: tuple[float, ...], device: int
) -> tuple[Any, ...]:
    kernel, constants = prepared.kernel, prepared.constants
    arguments = (*pointers, *fractions, *prepared.numbers)
    kinds = map(_specialize, repeat(kernel.device_caches[device][3]), arguments, _NO, _YES, _YES)
    return (id(kernel), device, *kinds, *constants, *constants.values())


def _keep(prepared: Prepared, device: int, binary: _Binary) -> None:
    """Remembers the binary of pointers that are all aligned, if the dtype and that are all that Triton asks of a pointer."""
    backend = prepared.kernel.device_caches[device][3]
    if type(backend).get_tensor_specialization is BaseBackend.get_tensor_specialization:
        prepared.aligned[device] = binary


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
    prepared: Prepared,
    pointers: tuple[torch.Tensor | None, ...],
    fractions: tuple[float, ...],
    compiled: CompiledKernel,
    device: int,
    aligned: bool,
) -> None:
    kernel, constants = prepared.kernel, prepared.constants
    n_args = len(pointers) + len(fractions) + len(prepared.numbers)
    parameters = kernel.params
    ordered = all(parameter.is_constexpr == (i >= n_args) for i, parameter in enumerate(parameters))
    if not ordered or any(parameter.name not in constants for parameter in parameters[n_args:]):
        raise TypeError(
            f"{kernel.__name__} was launched with {n_args} positional arguments and {sorted(constants)}; needed are all"
            " parameters that are no constexpr, in order, and each constexpr, which come last, by its name"
        )
    cache = kernel.device_caches[device][0]
    cache_key = next((name for name, found in cache.items() if found is compiled), None)
    if cache_key is None:
        return
    tail = tuple(constants[parameter.name] for parameter in parameters[n_args:])
    used = tuple((namespace, name, namespace.get(name)) for (name, _), (_, namespace) in kernel.used_global_vals.items())
    binary = _Binary(kernel, compiled, cache, cache_key, compiled.run, compiled.function, compiled.packed_metadata, tail, used)
    _binaries[_kind(prepared, pointers, fractions, device)] = binary
    if aligned:
        _keep(prepared, device, binary)
