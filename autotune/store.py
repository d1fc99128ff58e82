"""The configuration files: where they lie, what makes one valid, which entry serves a call, and how one is written.

A lookup is a dictionary access in this process (:func:`lookup`). The files are read once, on the first call for a
device. They are searched in this order, and an entry of an earlier file wins:

1. the folder named by ``COORDROUTE_CONFIG_DIR``,
2. the user's cache folder (:func:`user_folder`),
3. the file that ships with the package for this device,
4. shipped files of devices of the same architecture, the most similar first,

and where none of them has an entry, the heuristic of ``kernels/config.py`` serves. Within 1 to 3 an entry for exactly
the call's bucket is preferred, then the nearest entry (:func:`nearest`).

A file that is corrupt, of another schema, of another device or stale is never used silently and never fatal: it is said
once, by one :class:`ConfigurationWarning`, with the command that mends it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..kernels import config as kernel_config
from ..kernels.config import Key, LaunchConfig
from . import device as devices
from .fingerprint import kernel_sha256

SCHEMA = 1

MENDING_COMMAND = "coordroute autotune"

SHIPPED = Path(__file__).resolve().parent / "configs"

LOCK_SECONDS = 60.0
"""How long a writer waits for another before it gives up with a TimeoutError."""

DEVICE_FIELDS = {"name": str, "sm_count": int, "capability": str, "memory_bytes": int, "driver": str}
PROOF_FIELDS: dict[str, type | tuple[type, ...]] = {
    "kernel_sha256": str,
    "binary_sha256": (str, type(None)),
    "cases": int,
    "families": list,
    "max_error": dict,
    "bound": (int, float, dict),
    "replays_bitwise": bool,
    "seed": int,
}
MAX_ERROR_FIELDS = ("value", "grad_scores", "grad_k")
TIMING_FIELDS: dict[str, type | tuple[type, ...]] = {
    "median_us": (int, float),
    "ci_us": list,
    "default_us": (int, float),
    "samples": int,
    "method": str,
}


class ConfigurationWarning(UserWarning):
    """A configuration file is missing or was not used. Never an error: the safe heuristic serves."""


class InvalidFile(ValueError):
    """A configuration file cannot be used; the message is the reason, for a person."""


# --- environment -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variable:
    """One environment variable: what it does, what it may be, and what holds without it."""

    name: str
    meaning: str
    allowed: str
    default: str


ENVIRONMENT: dict[str, Variable] = {
    variable.name: variable
    for variable in (
        Variable(
            "COORDROUTE_CONFIG_DIR",
            "Folder searched first for <device>.json; `coordroute autotune` writes there too.",
            "the path of a folder, which need not exist yet",
            "unset: the user's cache folder",
        ),
        Variable(
            "COORDROUTE_TUNED",
            "Whether tuned configurations are used at all; 0 reads no file and serves the heuristic everywhere.",
            "0 or 1",
            "1",
        ),
    )
}


def config_dir() -> Path | None:
    """The folder of ``COORDROUTE_CONFIG_DIR``, or None when it is not set.

    Raises:
        ValueError: the variable is empty or names something that is not a folder.
    """
    value = os.environ.get("COORDROUTE_CONFIG_DIR")
    if value is None:
        return None
    allowed = ENVIRONMENT["COORDROUTE_CONFIG_DIR"].allowed
    if not value.strip():
        raise ValueError(f"COORDROUTE_CONFIG_DIR is set but empty; allowed is {allowed}. Unset it to do without")
    folder = Path(value).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"COORDROUTE_CONFIG_DIR is {value!r}, which is not a folder; allowed is {allowed}")
    return folder


def tuned_allowed() -> bool:
    """Whether ``COORDROUTE_TUNED`` lets tuned configurations be used.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get("COORDROUTE_TUNED", "1")
    if value not in ("0", "1"):
        raise ValueError(f"COORDROUTE_TUNED is {value!r}; allowed is {ENVIRONMENT['COORDROUTE_TUNED'].allowed}")
    return value == "1"


def check_environment() -> list[dict[str, str | None]]:
    """The table of environment variables with today's values: name, value, meaning, allowed, default.

    Raises:
        ValueError: a variable has a value that is not allowed.
    """
    config_dir()
    tuned_allowed()
    return [asdict(variable) | {"value": os.environ.get(variable.name)} for variable in ENVIRONMENT.values()]


def user_folder() -> Path:
    """The user's own folder of configurations in the platform's cache folder (on Linux ``XDG_CACHE_HOME``)."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "coordroute" / "Cache"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification: a relative path is to be ignored
        return Path(xdg) / "coordroute"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "coordroute"
    return Path.home() / ".cache" / "coordroute"


def output_path(device: torch.device | str | None = None) -> Path:
    """Where `coordroute autotune` writes when it is not told: a place that :func:`lookup` searches."""
    folder = config_dir() or user_folder()
    return folder / f"{devices.device_slug(devices.identity(devices.as_device(device)).name)}.json"


# --- one file --------------------------------------------------------------------------------------------------------


def _of_type(value: Any, types: type | tuple[type, ...]) -> bool:
    allowed = types if isinstance(types, tuple) else (types,)
    return isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))


def _missing(data: Any, fields: dict[str, Any], where: str) -> str | None:
    """What is wrong with the fields of an object, or None."""
    if not isinstance(data, dict):
        return f"{where} is missing or no object"
    for name, types in fields.items():
        if name not in data:
            return f"{where} has no {name!r}"
        if not _of_type(data[name], types):
            return f"{where}.{name} is {data[name]!r}"
    return None


def parse_key(data: Any) -> Key:
    """A key from parsed JSON.

    Raises:
        InvalidFile: it is not one.
    """
    problem = _missing(data, {"op": str, "direction": str, "dtype": str, "rows": int, "n": int}, "key")
    if problem:
        raise InvalidFile(problem)
    key = Key(data["op"], data["direction"], data["dtype"], data["rows"], data["n"])
    allowed = (
        ("op", kernel_config.OPS),
        ("direction", kernel_config.DIRECTIONS),
        ("dtype", kernel_config.DTYPES),
    )
    for name, values in allowed:
        if getattr(key, name) not in values:
            raise InvalidFile(f"key.{name} is {getattr(key, name)!r}; allowed is one of {', '.join(values)}")
    if key.rows < 1 or key.n < 1:
        raise InvalidFile(f"key has rows={key.rows}, n={key.n}; both must be at least 1")
    return key


def check_proof(proof: Any, key: Key, backend: str) -> str | None:
    """Why the proof of an entry does not hold today, or None when it does."""
    if proof is None or proof == {}:
        return "it has no proof"
    problem = _missing(proof, PROOF_FIELDS, "proof")
    if problem:
        return f"its proof is incomplete ({problem})"
    if not all(_of_type(proof["max_error"].get(name), (int, float, type(None))) for name in MAX_ERROR_FIELDS):
        return f"its proof is incomplete (max_error needs {', '.join(MAX_ERROR_FIELDS)})"
    if proof["cases"] < 1 or not proof["replays_bitwise"]:
        return "its proof shows no verified case or a replay that differed"
    today = kernel_sha256(key.op, backend)
    if not today:
        return "today's kernel source cannot be read, so that its proof cannot be checked"
    if proof["kernel_sha256"] != today:
        return f"stale: the kernel source changed since ({proof['kernel_sha256'][:8]}, today {today[:8]})"
    return None


@dataclass
class ConfigFile:
    """One valid file.

    Attributes:
        path: where it was read from.
        device: its ``device`` object.
        versions: its ``versions`` object.
        entries: usable entries by key, as parsed JSON.
        configs: their launch configurations.
        rejected: reason → number of entries that are not used.
    """

    path: Path
    device: dict[str, Any]
    versions: dict[str, Any]
    entries: dict[Key, dict[str, Any]] = field(default_factory=dict)
    configs: dict[Key, LaunchConfig] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """The parsed file, checked for its outline: schema, device, versions, entries.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidFile: it cannot be read, is no JSON, or has another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InvalidFile(f"cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"corrupt: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise InvalidFile(f"corrupt: holds a {type(data).__name__}, not an object")
    schema = data.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise InvalidFile(f"has schema {schema!r}; this version reads schema {SCHEMA}")
    problem = _missing(data.get("device"), DEVICE_FIELDS, "device")
    if problem is None and not isinstance(data.get("versions"), dict):
        problem = "versions is missing or no object"
    if problem is None and not isinstance(data.get("entries"), list):
        problem = "entries is missing or no list"
    if problem:
        raise InvalidFile(f"corrupt: {problem}")
    return data


def read(path: Path) -> ConfigFile:
    """Reads and validates one file; entries that cannot be used are counted by reason in ``rejected``.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidFile: the file as a whole cannot be used.
    """
    data = read_json(path)
    found = ConfigFile(path, data["device"], data["versions"])
    architecture = devices.architecture(found.device["capability"])
    backend = "cpu" if architecture.startswith("cpu") else "triton"
    for entry in data["entries"]:
        try:
            key, launch = _usable(entry, backend)
        except InvalidFile as error:
            found.rejected[str(error)] = found.rejected.get(str(error), 0) + 1
            continue
        found.entries[key] = entry
        found.configs[key] = launch
    return found


BUILT_WITH = {"triton": ("triton", "driver"), "cpu": ("torch",)}
"""By backend, the versions that decide what becomes of a kernel's source: a proof and a time are of what they made of it."""


def stale(path: Path, backend: str) -> dict[Key, LaunchConfig]:
    """What a file chose for the keys whose proof is not of today's kernel; nothing where there is no such file."""
    return {key: launch for key, (launch, proof, _) in _chosen(path).items() if check_proof(proof, key, backend)}


class Outdated(NamedTuple):
    """What a file chose for a key that is to be proved and timed anew.

    Attributes:
        config: the choice.
        since: what has changed: "kernel" where the proof is not of today's or does not hold, else names of :data:`BUILT_WITH`.
    """

    config: LaunchConfig
    since: tuple[str, ...]


def outdated(path: Path, backend: str, device: dict[str, Any], versions: dict[str, Any]) -> dict[Key, Outdated]:
    """What a file chose for the keys that are to be proved and timed anew; nothing where there is no such file of this device.

    Those are the keys whose proof is not of today's kernel, and those that were proved with another Triton or driver (on a CPU
    with another torch). The latter serve meanwhile.

    Args:
        path: the file.
        backend: ``"triton"`` or ``"cpu"``.
        device: as :func:`coordroute.autotune.device.describe` gives it today.
        versions: as :func:`coordroute.autotune.device.versions` gives them today.
    """
    today, found = _made_with(device, versions), {}
    for key, (launch, proof, made) in _chosen(path, device).items():
        since = ["kernel"] if check_proof(proof, key, backend) else []
        since += [name for name in BUILT_WITH[backend] if made.get(name) != today.get(name)]
        if since:
            found[key] = Outdated(launch, tuple(since))
    return found


def chosen(path: Path, device: dict[str, Any]) -> dict[Key, LaunchConfig]:
    """What a file chose for its keys, whether or not their proofs hold; nothing where there is no such file of this device."""
    return {key: launch for key, (launch, *_) in _chosen(path, device).items()}


def _chosen(path: Path, device: dict[str, Any] | None = None) -> dict[Key, tuple[LaunchConfig, Any, dict[str, Any]]]:
    """By key the configuration of an entry, its proof, and the versions and the driver that it was made with.

    Nothing where the file is of another device than this; None is any.
    """
    found: dict[Key, tuple[LaunchConfig, Any, dict[str, Any]]] = {}
    try:
        data = read_json(path)
    except (OSError, InvalidFile):
        return found
    if device is not None and not _same(data["device"], device):
        return found
    for entry in data["entries"]:
        with contextlib.suppress(InvalidFile, KeyError, TypeError, ValueError):
            made = _made_with(data["device"], entry.get("versions", data["versions"]))
            found[parse_key(entry["key"])] = LaunchConfig.from_json(entry["config"]), entry.get("proof"), made
    return found


def _made_with(device: dict[str, Any], versions: dict[str, Any]) -> dict[str, Any]:
    """Versions and driver. Those of an entry that is older than its file name the driver too."""
    return {"driver": device["driver"]} | versions


def _usable(entry: Any, backend: str) -> tuple[Key, LaunchConfig]:
    if not isinstance(entry, dict):
        raise InvalidFile("it is no object")
    key = parse_key(entry.get("key"))
    try:
        launch = LaunchConfig.from_json(entry["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidFile(f"its config is not valid ({error})") from error
    variants = ("resident", "split", "tiled") if backend == "triton" else ("eager", "inductor")
    if launch.variant not in variants:
        raise InvalidFile(f"its variant is {launch.variant!r}; allowed is {' or '.join(variants)}")
    if backend == "triton" and not (_is_power_of_2(launch.block) and _is_power_of_2(launch.num_warps)):
        raise InvalidFile(f"its block {launch.block} and num_warps {launch.num_warps} must be powers of two")
    for name in ("rows_per_program", "programs_per_row"):
        if getattr(launch, name) < 1:
            raise InvalidFile(f"its {name} is 0; at least 1 is needed")
    if backend == "triton" and not kernel_config.fits(launch, key, key.n):
        raise InvalidFile(f"its block {launch.block} is shorter than its own rows of {key.n}")
    reason = check_proof(entry.get("proof"), key, backend)
    if reason:
        raise InvalidFile(reason)
    return key, launch


def _is_power_of_2(x: int) -> bool:
    return x >= 1 and x & (x - 1) == 0


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two ``device`` objects are of the same device."""
    return all(one[name] == other[name] for name in ("name", "capability"))


def check_device(found: ConfigFile, identity: devices.Identity) -> None:
    """Checks that a file is of this device.

    Raises:
        InvalidFile: it is of another one.
    """
    if not _same(found.device, {"name": identity.name, "capability": identity.capability}):
        raise InvalidFile(
            f"is of another device: {found.device['name']!r} ({found.device['capability']}), "
            f"this is {identity.name!r} ({identity.capability})"
        )


# --- lookup ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What became of one file of the search.

    Attributes:
        source: "environment folder", "user folder", "shipped" or "same architecture".
        path: the file.
        verdict: "used" (it may serve), "missing", "rejected", or "partly used" (some entries are rejected).
        reason: why, for a person; "" when there is nothing to say.
        entries: entries that may serve.
        rejected: reason → number of entries that may not.
    """

    source: str
    path: Path
    verdict: str
    reason: str
    entries: int
    rejected: dict[str, int]


@dataclass(frozen=True)
class Served:
    """Which entry serves a key: the file, the entry's own key, and whether that is the very bucket."""

    source: str
    file: ConfigFile
    key: Key
    exact: bool


def _distance(key: Key, candidate: Key) -> tuple[float, float, bool, int, int]:
    """Doublings of the block that a row fits, then of the rows; where one's rows fill their block and the other's do not, that is
    one more."""
    blocks = abs(math.log2(kernel_config.next_power_of_2(candidate.n) / kernel_config.next_power_of_2(key.n)))
    rows = abs(math.log2(candidate.rows / key.rows)) + (blocks == 0 and candidate.n != key.n)
    return blocks, rows, candidate.n != key.n, candidate.n, candidate.rows


MAX_DOUBLINGS = {"resident": 1.0, "split": 1.0, "tiled": 2.0, "eager": 2.0, "inductor": 2.0}
"""How far from its own length an entry may serve. A resident block computes on its padding too, so that a longer one
costs what it is longer; the heuristic, whose block always fits, is better from there on."""


def nearest(key: Key, configs: dict[Key, LaunchConfig]) -> Key | None:
    """The entry nearest to ``key``: same op, direction and dtype; by length first, then by rows (log distances).

    Left out are entries that cannot serve the key: a resident block shorter than the rows, more rows a program than
    there are rows on a GPU, programs that share rows of which there are far more, or that hold a part of a row of their own
    key in registers and cannot hold one of this, or a length further away than :data:`MAX_DOUBLINGS`.
    """

    def serves(candidate: Key) -> bool:
        launch = configs[candidate]
        if candidate[:3] != key[:3] or abs(math.log2(candidate.n / key.n)) > MAX_DOUBLINGS[launch.variant]:
            return False
        if launch.variant in ("eager", "inductor"):
            return True
        if launch.variant == "split":
            held, needed = launch.programs_per_row * launch.block, (candidate.n, key.n)
            if key.rows > 4 * candidate.rows or needed[0] <= held < needed[1]:
                return False
        return kernel_config.fits(launch, key, key.n) and launch.rows_per_program <= key.rows

    return min(filter(serves, configs), key=lambda candidate: _distance(key, candidate), default=None)


@dataclass
class _Table:
    """All that is known of one device: the files in order, and the answers so far (None is an answer too)."""

    identity: devices.Identity
    files: list[tuple[str, ConfigFile]]
    verdicts: list[Verdict]
    answers: dict[Key, LaunchConfig | None]

    def find(self, key: Key) -> Served | None:
        own = [(source, file) for source, file in self.files if source != SAME_ARCHITECTURE]
        lent = [(source, file) for source, file in self.files if source == SAME_ARCHITECTURE]
        for layer in (own, lent):
            for source, file in layer:
                if key in file.configs:
                    return Served(source, file, key, True)
            for source, file in layer:
                near = nearest(key, file.configs)
                if near is not None:
                    return Served(source, file, near, False)
        return None

    def answer(self, key: Key) -> LaunchConfig | None:
        served = self.find(key)
        launch = served.file.configs[served.key] if served else None
        self.answers[key] = launch
        return launch


SAME_ARCHITECTURE = "same architecture"

_tables: dict[torch.device, _Table] = {}
_answers: dict[torch.device, dict[Key, LaunchConfig | None]] = {}
_lock = threading.RLock()
_said: set[str] = set()


def _similarity(identity: devices.Identity) -> Callable[[ConfigFile], tuple[float, float, str]]:
    def distance(found: ConfigFile) -> tuple[float, float, str]:
        same_capability = found.device["capability"] == identity.capability
        ratio = max(found.device["sm_count"], 1) / max(identity.sm_count, 1)
        return (0.0 if same_capability else 1.0), abs(math.log2(ratio)), found.device["name"]

    return distance


def _try(source: str, path: Path, identity: devices.Identity | None) -> tuple[Verdict, ConfigFile | None]:
    try:
        found = read(path)
        if identity is not None:
            check_device(found, identity)
    except FileNotFoundError:
        return Verdict(source, path, "missing", "no such file", 0, {}), None
    except InvalidFile as error:
        return Verdict(source, path, "rejected", str(error), 0, {}), None
    if not found.rejected:
        return Verdict(source, path, "used", "", len(found.entries), {}), found
    total = len(found.entries) + sum(found.rejected.values())
    most = max(found.rejected, key=lambda reason: found.rejected[reason])
    reason = f"{sum(found.rejected.values())} of {total} entries are not used: {most}"
    if len(found.rejected) > 1:
        reason += f" (and {len(found.rejected) - 1} other reason(s))"
    verdict = "partly used" if found.entries else "rejected"
    return Verdict(source, path, verdict, reason, len(found.entries), dict(found.rejected)), found


def _load(device: torch.device) -> _Table:
    identity = devices.identity(device)
    name = f"{devices.device_slug(identity.name)}.json"
    folders = [("user folder", user_folder()), ("shipped", SHIPPED)]
    environment = config_dir()
    if environment is not None:
        folders.insert(0, ("environment folder", environment))
    files: list[tuple[str, ConfigFile]] = []
    verdicts: list[Verdict] = []
    if not tuned_allowed():
        return _Table(identity, files, verdicts, {})
    for source, folder in folders:
        verdict, found = _try(source, folder / name, identity)
        verdicts.append(verdict)
        if found is not None and found.entries:
            files.append((source, found))
    lent: list[ConfigFile] = []
    for path in sorted(SHIPPED.glob("*.json")) if SHIPPED.is_dir() else []:
        if path.name == name:
            continue
        verdict, found = _try(SAME_ARCHITECTURE, path, None)
        if found is None or devices.architecture(found.device["capability"]) != devices.architecture(identity.capability):
            continue
        verdicts.append(verdict)
        if found.entries:
            lent.append(found)
    files += [(SAME_ARCHITECTURE, found) for found in sorted(lent, key=_similarity(identity))]
    table = _Table(identity, files, verdicts, {})
    _say(table)
    return table


def _say(table: _Table) -> None:
    """One warning for each file that is not (wholly) used; where none is to blame and none is of this device, one."""
    own = [(source, file) for source, file in table.files if source != SAME_ARCHITECTURE]
    if table.files:
        source, file = table.files[0]
        whose = f" (of {file.device['name']!r})" if source == SAME_ARCHITECTURE else ""
        instead = f"{file.path}{whose} serves where it can"
    else:
        instead = "the safe heuristic serves"
    blamed = [verdict for verdict in table.verdicts if verdict.verdict in ("rejected", "partly used")]
    for verdict in blamed:
        rest = "the rest of it" if verdict.verdict == "partly used" and table.files[0][1].path == verdict.path else instead
        rest = rest if rest == instead else f"{rest} serves"
        _warn(str(verdict.path), f"configuration file {verdict.path}: {verdict.reason}. Until it is mended {rest}.")
    if not own and not blamed:
        _warn(
            f"device {table.identity.name}",
            f"no launch configurations are tuned for {table.identity.name!r}; {instead}.",
        )


def _warn(about: str, message: str) -> None:
    if about in _said:
        return
    _said.add(about)
    command = f"Run `{MENDING_COMMAND}` on this machine to tune and verify its own."
    warnings.warn(f"coordroute: {message} {command}", ConfigurationWarning, stacklevel=2)


def _table(device: torch.device) -> _Table:
    with _lock:
        table = _tables.get(device)
        if table is None:
            table = _load(device)
            _tables[device] = table
            _answers[device] = table.answers
        return table


def lookup(device: torch.device, key: Key) -> LaunchConfig | None:
    """The tuned configuration that serves ``key`` on ``device``, or None: then the heuristic does.

    A dictionary access, but for the first call for a device (which reads the files) and the first for a key (which
    looks for the nearest entry in memory).

    Raises:
        ValueError: on the first call for a device, when an environment variable has a value that is not allowed.
    """
    try:
        return _answers[device][key]
    except KeyError:
        return _table(device).answer(key)


# whoever can read the files has the launches ask them: the front door, and the commands that never import it
kernel_config.use_lookup(lookup)


def reload() -> None:
    """Forgets all that was read: the next lookup reads the files again. What was said is not said twice."""
    with _lock:
        _tables.clear()
        _answers.clear()


# --- explanation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Which configuration serves a call and why.

    Attributes:
        device: name of the device.
        key: the bucketed key of the call.
        rows, n: the call's own sizes.
        config: the configuration that serves.
        source: where it is from: "environment folder", "user folder", "shipped", "same architecture" or "heuristic".
        path: its file; None for the heuristic.
        entry: its entry as it stands in the file; None for the heuristic.
        exact: the entry is of the very bucket.
        why: one sentence for a person.
        files: every file of the search with its verdict, in the order of the search.
        heuristic: what the heuristic would give.
    """

    device: str
    key: Key
    rows: int
    n: int
    config: LaunchConfig
    source: str
    path: Path | None
    entry: dict[str, Any] | None
    exact: bool
    why: str
    files: list[Verdict]
    heuristic: LaunchConfig

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "call": {"rows": self.rows, "n": self.n},
            "key": self.key._asdict(),
            "config": self.config.to_json(),
            "source": self.source,
            "path": str(self.path) if self.path else None,
            "exact": self.exact,
            "why": self.why,
            "entry": self.entry,
            "heuristic": self.heuristic.to_json(),
            "files": [asdict(verdict) | {"path": str(verdict.path)} for verdict in self.files],
        }


def files(device: torch.device | str | None = None) -> list[Verdict]:
    """Every file that is searched for a device, in order, with its verdict. Reads the disk afresh, warns of nothing."""
    return _fresh_table(devices.as_device(device)).verdicts


def _fresh_table(device: torch.device) -> _Table:
    with warnings.catch_warnings(), _lock:
        warnings.simplefilter("ignore")
        said = set(_said)
        try:
            return _load(device)
        finally:
            _said.clear()
            _said.update(said)


def explain(device: torch.device | str | None, op: str, direction: str, dtype: torch.dtype | str, rows: int, n: int) -> Explanation:
    """Which configuration serves a call of ``op`` on ``[rows, n]`` scores of ``dtype``, and why. Reads the disk afresh.

    Raises:
        ValueError: an argument or an environment variable is not one that is allowed.
    """
    device = devices.as_device(device)
    name = str(dtype).removeprefix("torch.")
    for argument, value, allowed in (
        ("op", op, kernel_config.OPS),
        ("direction", direction, kernel_config.DIRECTIONS),
        ("dtype", name, kernel_config.DTYPES),
    ):
        if value not in allowed:
            raise ValueError(f"{argument} is {value!r}; allowed is one of {', '.join(allowed)}")
    if rows < 1 or n < 1:
        raise ValueError(f"the shape is {rows}x{n}; both sizes must be at least 1")
    key = kernel_config.make_key(op, direction, getattr(torch, name), rows, n)
    backend = devices.backend(device)
    fallback = kernel_config.heuristic(key, backend)
    table = _fresh_table(device)
    served = table.find(key)
    launch = served.file.configs[served.key] if served else None
    if launch is not None and backend == "triton" and not kernel_config.fits(launch, key, n):
        served = None
    return Explanation(
        device=table.identity.name,
        key=key,
        rows=rows,
        n=n,
        config=served.file.configs[served.key] if served else fallback,
        source=served.source if served else "heuristic",
        path=served.file.path if served else None,
        entry=served.file.entries[served.key] if served else None,
        exact=served.exact if served else False,
        why=_why(served, key) if served else _why_none(table, key),
        files=table.verdicts,
        heuristic=fallback,
    )


def _why(served: Served, key: Key) -> str:
    what = "the entry of this very bucket"
    if not served.exact:
        what = (
            f"the nearest entry, {served.key.rows}x{served.key.n}, since {key.rows}x{key.n} has none of its own "
            f"for {key.op} {key.direction} {key.dtype}"
        )
    if served.source == SAME_ARCHITECTURE:
        return f"{what}, lent by {served.file.device['name']!r}: no file of this device has one that fits"
    return what


def _why_none(table: _Table, key: Key) -> str:
    if not tuned_allowed():
        return "COORDROUTE_TUNED=0: no file is read and the heuristic serves everywhere"
    if not table.files:
        return f"no usable configuration file for this device; `{MENDING_COMMAND}` makes one"
    return f"no usable entry for {key.op} {key.direction} {key.dtype} is near enough to {key.rows}x{key.n}"


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds the writers' lock of a file (``.<name>.lock`` beside it); the system frees it if the holder dies.

    Raises:
        TimeoutError: another writer held it for longer than ``seconds``.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    while True:
        handle = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        if _try_lock(handle) and _is_still(lock_path, handle):
            break
        os.close(handle)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{lock_path} has been held by another process for {seconds:.0f} s")
        time.sleep(0.01)
    try:
        yield
    finally:
        if sys.platform != "win32":  # an open file cannot be removed there
            with contextlib.suppress(OSError):
                os.unlink(lock_path)
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_still(lock_path: Path, handle: int) -> bool:
    """Whether the locked file is the one that lies there: the holder before may have removed it in between."""
    if sys.platform == "win32":
        return True
    try:
        return os.stat(lock_path).st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old or the new one, whole, even if this process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def make_entry(key: Key, launch: LaunchConfig, timing: dict[str, Any], proof: dict[str, Any]) -> dict[str, Any]:
    """An entry as it stands in a file, checked to be one that a reader takes.

    Raises:
        InvalidFile: timing or proof is incomplete, or the configuration does not serve its own key.
    """
    entry = {"key": key._asdict(), "config": launch.to_json(), "timing": timing, "proof": proof}
    problem = _missing(timing, TIMING_FIELDS, "timing")
    if problem:
        raise InvalidFile(problem)
    _usable(entry, "triton" if launch.num_warps else "cpu")
    return entry


def save(
    path: Path,
    device: dict[str, Any],
    versions: dict[str, Any],
    entries: Iterable[dict[str, Any]],
    without: Iterable[Key] = (),
) -> dict[str, int]:
    """Merges entries into a file: a key that is there already is replaced, all others stay but those of ``without``.

    Atomic, and safe beside other writers and readers. Entries of the old file that could not be used any more are
    dropped. An old file that cannot be used as a whole (corrupt, another schema, another device) is kept beside the new
    one as ``<name>.old``.

    Args:
        path: the file.
        device: as :func:`coordroute.autotune.device.describe` gives it.
        versions: at least coordroute, torch and triton.
        entries: as :func:`make_entry` gives them.
        without: keys whose old entries are to go, which no proof could be made for any more.

    Returns:
        Counts: ``{"written", "kept", "dropped"}``.
    """
    problem = _missing(device, DEVICE_FIELDS, "device")
    if problem:
        raise InvalidFile(problem)
    new, gone = {parse_key(entry["key"]): entry for entry in entries}, frozenset(without)
    with locked(path):
        kept: dict[Key, dict[str, Any]] = {}
        dropped = 0
        if path.exists():
            try:
                old = read(path)
                check_device(old, devices.Identity(device["name"], device["sm_count"], device["capability"]))
            except InvalidFile:
                os.replace(path, path.with_name(f"{path.name}.old"))
            else:
                other = {key: entry for key, entry in old.entries.items() if key not in new}
                kept = {key: _dated(entry, old, device, versions) for key, entry in other.items() if key not in gone}
                dropped = sum(old.rejected.values()) + len(other) - len(kept)
        merged = kept | new
        data = {
            "schema": SCHEMA,
            "device": {name: device[name] for name in DEVICE_FIELDS},
            "versions": versions,
            "entries": [merged[key] for key in sorted(merged)],
        }
        write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return {"written": len(new), "kept": len(kept), "dropped": dropped}


def _dated(entry: dict[str, Any], old: ConfigFile, device: dict[str, Any], versions: dict[str, Any]) -> dict[str, Any]:
    """An entry that was made with other versions or another driver than the file now names says so itself."""
    made = _made_with(old.device, old.versions)
    return entry if "versions" in entry or made == _made_with(device, versions) else entry | {"versions": made}
