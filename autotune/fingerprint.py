"""The hash that ties a proof to the kernel source it was made with.

A configuration was verified for one text of one kernel. The hash covers the file of the kernel and, transitively,
every module of ``kernels/`` that this file imports; not ``config.py``, which holds the types and the heuristic, nor
``launcher.py``, which runs what was compiled: there is no arithmetic in them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "kernels"

SOURCES = {
    ("soft_topk", "triton"): "soft_topk.py",
    ("coordinate_descent", "triton"): "coordinate_descent.py",
    ("soft_topk", "cpu"): "cpu.py",
    ("coordinate_descent", "cpu"): "cpu.py",
}

_NO_ARITHMETIC = {"config.py", "launcher.py", "__init__.py"}


def _imported(tree: ast.Module, folder: Path) -> set[str]:
    """The files of ``folder`` that a module imports relatively (``from . import x``, ``from .x import y``)."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names.update([node.module.split(".")[0]] if node.module else [alias.name for alias in node.names])
    return {f"{name}.py" for name in names if (folder / f"{name}.py").is_file()} - _NO_ARITHMETIC


def source_files(op: str, backend: str, folder: Path = KERNELS) -> list[Path]:
    """The source files that decide what ``op`` computes on ``backend``, sorted by name."""
    pending, seen = {SOURCES[op, backend]}, set()
    while pending:
        name = pending.pop()
        seen.add(name)
        pending |= _imported(ast.parse((folder / name).read_bytes()), folder) - seen
    return [folder / name for name in sorted(seen)]


@functools.lru_cache(maxsize=64)
def kernel_sha256(op: str, backend: str, folder: Path = KERNELS) -> str:
    """SHA-256 over name and text (line ends as \\n) of the kernel's source files; ``""`` where they cannot be read.

    Read once a process: the kernels that run are the ones that were imported.
    """
    digest = hashlib.sha256()
    try:
        for path in source_files(op, backend, folder):
            digest.update(path.name.encode() + b"\0")
            digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    except (OSError, SyntaxError, ValueError):
        return ""
    return digest.hexdigest()
