"""Text to train on that every machine with Python and torch has: their own source. Used by ``train_bytes.py``."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VALIDATION = 16
"""One file in so many is kept for validation."""

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor"}


class Text(NamedTuple):
    """Source files as bytes, each with a zero byte behind it."""

    train: Tensor
    """uint8 [train bytes]"""
    validation: Tensor
    """uint8 [validation bytes]"""
    facts: dict[str, str | int]
    """What the text is: folders, files, bytes of both parts, a checksum."""


def installed_source() -> dict[str, Path]:
    """The standard library of this interpreter and the installed torch, by name."""
    return {"standard library": Path(sysconfig.get_paths()["stdlib"]), "torch": Path(torch.__file__).parent}


def read(folders: dict[str, Path]) -> Text:
    """All ``.py`` files below the folders, tests left out, split by a hash of their path: the same files give the same split.

    Raises:
        ValueError: a folder with no ``.py`` file, or too few files for both parts.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    checksum = hashlib.sha256()
    for name, folder in folders.items():
        found = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
        found = [path for path in found if not _LEFT_OUT & set(path.parts)]
        if not found:
            raise ValueError(f"folders has {name!r}: {str(folder)!r}, in which there is no .py file; allowed are folders of source")
        for path in found:
            content = (folder / path).read_bytes() + b"\0"
            checksum.update(content)
            digest = hashlib.sha256(f"{name}/{path.as_posix()}".encode()).digest()
            parts[int.from_bytes(digest[:4], "big") % VALIDATION == 0].append(content)
    if not all(parts):
        raise ValueError(f"folders has {len(parts[0]) + len(parts[1])} files, too few to keep one in {VALIDATION} for validation")
    train, validation = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    facts: dict[str, str | int] = {
        "folders": " + ".join(folders),
        "train_files": len(parts[0]),
        "train_bytes": len(train),
        "validation_files": len(parts[1]),
        "validation_bytes": len(validation),
        "sha256": checksum.hexdigest(),
    }
    return Text(train, validation, facts)
