"""What machine this is: the facts a configuration file and a bug report need.

Nothing here runs at import, and :func:`identity` is cheap enough for the first lookup on a device; :func:`describe`
adds what only people and files want (memory, driver).
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Identity(NamedTuple):
    """What decides whether a configuration file is for a device.

    Attributes:
        name: the model name, as the driver or the operating system gives it.
        sm_count: multiprocessors (compute units) of a GPU, logical cores of a CPU.
        capability: ``"9.0"`` for NVIDIA, ``"gfx942"`` for AMD, the machine name such as ``"x86_64"`` for a CPU.
    """

    name: str
    sm_count: int
    capability: str


def usable_cores() -> int:
    """The cores that this process may use, where the system says so; else those that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_device() -> torch.device:
    """The device that commands use when none is named: the current GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def as_device(device: torch.device | str | None) -> torch.device:
    """``device`` as a torch.device with an index, checked to be here.

    Raises:
        ValueError: the string names no device, or this machine has no such device.
    """
    if device is None:
        return default_device()
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}; 'cpu', 'cuda' or 'cuda:<index>' is needed") from error
    if parsed.type == "cpu":
        return torch.device("cpu")
    if parsed.type != "cuda":
        raise ValueError(f"device is {device!r}; 'cpu', 'cuda' or 'cuda:<index>' is needed")
    if not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch sees no GPU here; 'cpu' is available")
    index = torch.cuda.current_device() if parsed.index is None else parsed.index
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"device is {device!r}, but this machine has {count} GPU(s); allowed is cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def backend(device: torch.device) -> str:
    """The kernels that serve a device: ``"triton"`` or ``"cpu"``."""
    return "triton" if device.type == "cuda" else "cpu"


def architecture(capability: str) -> str:
    """What two devices share when configurations may be lent between them: backend and major architecture."""
    if re.fullmatch(r"\d+\.\d+", capability):
        return f"cuda {capability.split('.')[0]}"
    if capability.startswith("gfx"):
        return f"hip {capability[:5]}"
    return f"cpu {capability}"


@functools.lru_cache(maxsize=1)
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            label, _, value = line.partition(":")
            if label.strip() in ("model name", "Model", "cpu model") and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    if sys.platform == "darwin":
        try:
            done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5)
            if done.returncode == 0 and done.stdout.strip():
                return done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return " ".join((platform.processor() or f"{platform.machine()} CPU").split())


def identity(device: torch.device) -> Identity:
    """The identity of a device. Asks the driver for a GPU; runs no program for a CPU on Linux."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gcn = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        capability = gcn.split(":")[0] if gcn else f"{properties.major}.{properties.minor}"
        return Identity(properties.name, properties.multi_processor_count, capability)
    return Identity(_cpu_name(), os.cpu_count() or 1, platform.machine() or "unknown")


def alike(device: torch.device) -> tuple[str, ...]:
    """The visible GPUs of the same model as this one, itself first."""
    name = torch.cuda.get_device_name(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    others = [i for i in range(torch.cuda.device_count()) if i != index and torch.cuda.get_device_name(i) == name]
    return tuple(f"cuda:{i}" for i in (index, *others))


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return 0


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{platform.system()} {platform.release()}"
    if torch.version.hip:
        return str(torch.version.hip)
    try:
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found.group(1)
    except OSError:
        pass
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError):
        pass
    return "unknown"


def describe(device: torch.device | str | None = None) -> dict[str, Any]:
    """The facts of a device as they stand in files: name, sm_count, capability, memory_bytes, driver.

    For a CPU ``sm_count`` is the number of logical cores, ``capability`` the machine name and ``driver`` the system.
    """
    device = as_device(device)
    name, sm_count, capability = identity(device)
    return {
        "name": name,
        "sm_count": sm_count,
        "capability": capability,
        "memory_bytes": _memory_bytes(device),
        "driver": _driver(device),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """The versions that matter to a measurement; None where something is not installed."""
    return {
        "coordroute": _version("coordroute"),
        "torch": str(torch.__version__),
        "triton": _version("triton") or _version("triton-windows") or _version("pytorch-triton-rocm"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or (f"hip {torch.version.hip}" if torch.version.hip else None),
    }


def device_slug(name: str) -> str:
    """The name of a device's file, without .json: ``"NVIDIA H100 80GB HBM3"`` → ``"nvidia-h100-80gb-hbm3"``."""
    plain = re.sub(r"\((?:r|tm|c)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"
