"""The evidence: the JSON files of autotune, verify and benchmark, checked, and what can be derived from them.

Nothing here measures. What a file does not say stays None.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1

COMMANDS = {
    "verify": "coordroute verify --json DIR/verify.json",
    "autotune": "coordroute autotune --json DIR/autotune.json",
    "benchmark": "coordroute benchmark --peers --json DIR/benchmark.json",
}
"""What makes the file ``<command>.json``."""

VERDICTS = ("pass", "fail", "not run")

Json = dict[str, Any]

TEXT, NUMBER, WHOLE, ANYTHING = "a string", "a number", "a whole number", "anything"
MAYBE_TEXT, MAYBE_NUMBER, MAYBE_WHOLE = f"{TEXT} or null", f"{NUMBER} or null", f"{WHOLE} or null"
TRUTH, OBJECT, MAYBE_OBJECT, LIST = "true or false", "an object", "an object or null", "a list"
INTERVAL = "a list of two numbers or null"
MAYBE_TRUTH, OBJECT_OR_TEXT = f"{TRUTH} or null", f"{OBJECT} or {TEXT}"

_HEAD = {"device": OBJECT, "versions": OBJECT, "date": TEXT, "seconds": NUMBER}
_DEVICE = {"name": TEXT, "sm_count": WHOLE, "capability": TEXT, "memory_bytes": WHOLE, "driver": TEXT}
_KEY = {"op": TEXT, "direction": TEXT, "dtype": TEXT, "rows": WHOLE, "n": WHOLE}
_FIELDS: dict[str, dict[str, str]] = {
    "verify": {"seed": WHOLE, "examples": WHOLE, "target": TEXT, "ok": TRUTH, "properties": LIST, "failures": LIST},
    "autotune": {
        "effort": TEXT,
        "file": TEXT,
        "resumed": WHOLE,
        "keys": LIST,
        "dropped": OBJECT,
        "geometric_mean_gain": MAYBE_NUMBER,
    },
    "benchmark": {"method": TEXT, "settings": OBJECT, "results": LIST},
}
_RESULT = {
    **_KEY,
    "implementation": TEXT,
    "median_us": MAYBE_NUMBER,
    "ci_us": INTERVAL,
    "samples": WHOLE,
    "method": TEXT,
    "status": TEXT,
}
_TARGET = {
    "id": TEXT,
    "op": TEXT,
    "work": TEXT,
    "target": TEXT,
    "rows": MAYBE_WHOLE,
    "n": MAYBE_WHOLE,
    "applies": TRUTH,
    "figure": MAYBE_NUMBER,
    "bfloat16": MAYBE_NUMBER,
    "unit": TEXT,
    "met": MAYBE_TRUTH,
    "reason": TEXT,
    "detail": OBJECT,
}
_DETAIL = {"numerator_us": MAYBE_NUMBER, "denominator_us": MAYBE_NUMBER, "sweeps": MAYBE_WHOLE, "floats_a_row": MAYBE_NUMBER}
"""What a target's ``detail`` may hold."""

_PROPERTY = {
    "op": TEXT,
    "property": TEXT,
    "sentence": TEXT,
    "dtype": TEXT,
    "cases": WHOLE,
    "left_out": WHOLE,
    "worst_error": MAYBE_NUMBER,
    "bound": MAYBE_NUMBER,
    "worst_ratio": MAYBE_NUMBER,
    "worst_family": MAYBE_TEXT,
    "verdict": TEXT,
    "reason": TEXT,
}
_FAILURE = {
    "op": TEXT,
    "property": TEXT,
    "dtype": TEXT,
    "family": MAYBE_TEXT,
    "error": MAYBE_NUMBER,
    "bound": MAYBE_NUMBER,
    "message": TEXT,
    "reproducer": TEXT,
}
_TUNED = {"key": OBJECT, "config": MAYBE_OBJECT, "timing": MAYBE_OBJECT, "gain": MAYBE_NUMBER, "candidates": LIST}
_TIMING = {"median_us": NUMBER, "ci_us": INTERVAL, "default_us": NUMBER, "samples": WHOLE, "method": TEXT}
_CANDIDATE = {"status": TEXT, "reason": TEXT}


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What lay in the folder; None for a file that was not there. All files are of one device."""

    verify: Json | None
    autotune: Json | None
    benchmark: Json | None

    def files(self) -> dict[str, Json]:
        """Command -> content, for the files that were there."""
        found = {"verify": self.verify, "autotune": self.autotune, "benchmark": self.benchmark}
        return {command: data for command, data in found.items() if data is not None}

    @property
    def device(self) -> Json:
        device: Json = next(iter(self.files().values()))["device"]
        return device


def load(folder: Path) -> Evidence:
    """Reads and checks verify.json, autotune.json and benchmark.json of a folder; at least one must be there.

    Raises:
        ValueError: no file, one that is not what its name says, or files of different devices.
    """
    commands = ", ".join(f"`{command}`" for command in COMMANDS.values())
    needed = f"at least one of {', '.join(f'{name}.json' for name in COMMANDS)} is needed there; {commands} make them"
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}; {needed}")
    found = {command: _read(path, command) for command in COMMANDS if (path := folder / f"{command}.json").exists()}
    if not found:
        raise ValueError(f"{folder} has no evidence to render; {needed}")
    (first, one), *others = found.items()
    for command, data in others:
        for field in ("name", "sm_count", "capability"):
            mine, yours = one["device"][field], data["device"][field]
            if mine != yours:
                raise ValueError(
                    f"{folder / f'{first}.json'} is of the device with {field} {mine!r}, {folder / f'{command}.json'} of one "
                    f"with {field} {yours!r}; a report is of one device: put their files into folders of their own"
                )
    return Evidence(found.get("verify"), found.get("autotune"), found.get("benchmark"))


def _read(path: Path, command: str) -> Json:
    try:
        data = _harmless(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {_named(data)}; an object is needed")
    if data.get("schema") != SCHEMA or isinstance(data.get("schema"), bool):
        raise ValueError(f"{path} has schema {data.get('schema')!r}; this version reads schema {SCHEMA}")
    if data.get("command") != command:
        raise ValueError(f"{path} is of the command {data.get('command')!r}; a file of this name is of {command!r}")
    _fields(path, "", data, _HEAD | _FIELDS[command])
    _fields(path, "device", data["device"], _DEVICE)
    for name, value in data["versions"].items():
        _check(path, f"versions.{name}", value, MAYBE_TEXT)
    {"verify": _check_verify, "autotune": _check_autotune, "benchmark": _check_benchmark}[command](path, data)
    return data


_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Control characters, halves of a pair and non-characters: JSON can hold them, XML and files cannot."""


def _harmless(value: Any) -> Any:
    """The same JSON with a replacement character for every character that no page can hold."""
    if isinstance(value, str):
        return _UNFIT.sub("\ufffd", value)
    if isinstance(value, list):
        return [_harmless(one) for one in value]
    if isinstance(value, dict):
        return {_harmless(name): _harmless(one) for name, one in value.items()}
    return value


def _check_verify(path: Path, data: Json) -> None:
    for i, row in enumerate(data["properties"]):
        _fields(path, f"properties[{i}]", row, _PROPERTY)
        if row["verdict"] not in VERDICTS:
            allowed = ", ".join(VERDICTS)
            raise ValueError(f"{path}: properties[{i}].verdict is {row['verdict']!r}; allowed is one of {allowed}")
    _distinct(path, "properties", data["properties"], ("op", "property", "dtype"))
    for i, row in enumerate(data["failures"]):
        _fields(path, f"failures[{i}]", row, _FAILURE)


def _check_autotune(path: Path, data: Json) -> None:
    for status, number in data["dropped"].items():
        _check(path, f"dropped[{status!r}]", number, WHOLE)
    for i, key in enumerate(data["keys"]):
        _fields(path, f"keys[{i}]", key, _TUNED)
        _fields(path, f"keys[{i}].key", key["key"], _KEY)
        if key["timing"] is not None:
            _fields(path, f"keys[{i}].timing", key["timing"], _TIMING)
        for j, candidate in enumerate(key["candidates"]):
            _fields(path, f"keys[{i}].candidates[{j}]", candidate, _CANDIDATE)
    _distinct(path, "keys", [key["key"] for key in data["keys"]], tuple(_KEY))


def _check_benchmark(path: Path, data: Json) -> None:
    for i, row in enumerate(data["results"]):
        _fields(path, f"results[{i}]", row, _RESULT)
    _distinct(path, "results", data["results"], (*_KEY, "implementation"))
    # a file from before there were targets has none
    _check(path, "targets", data.get("targets", []), LIST)
    for i, row in enumerate(data.get("targets", [])):
        _fields(path, f"targets[{i}]", row, _TARGET)
        _fields(path, f"targets[{i}].detail", row["detail"], {name: _DETAIL[name] for name in _DETAIL if name in row["detail"]})
    _distinct(path, "targets", data.get("targets", []), ("id", "rows", "n"))
    _check(path, "cpu", data.get("cpu", ""), OBJECT_OR_TEXT)
    if isinstance(data.get("cpu"), dict):
        _fields(path, "cpu", data["cpu"], {"device": OBJECT, "threads": WHOLE})
        _fields(path, "cpu.device", data["cpu"]["device"], {"name": TEXT})


def _distinct(path: Path, where: str, rows: list[Json], names: tuple[str, ...]) -> None:
    seen: set[tuple[Any, ...]] = set()
    for i, row in enumerate(rows):
        name = tuple(row[one] for one in names)
        if name in seen:
            raise ValueError(f"{path}: {where}[{i}] is a second row for {' '.join(map(str, name))}")
        seen.add(name)


def _fields(path: Path, where: str, data: Any, fields: dict[str, str]) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{path}: {where} is {_named(data)}; an object is needed")
    for name, kind in fields.items():
        at = f"{where}.{name}" if where else name
        if name not in data:
            raise ValueError(f"{path} has no {at}; {kind} is needed there")
        _check(path, at, data[name], kind)


def _check(path: Path, at: str, value: Any, kind: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    number = whole or isinstance(value, float)
    fits = {
        TEXT: isinstance(value, str),
        NUMBER: number,
        WHOLE: whole,
        TRUTH: isinstance(value, bool),
        OBJECT: isinstance(value, dict),
        LIST: isinstance(value, list),
        MAYBE_TEXT: value is None or isinstance(value, str),
        MAYBE_NUMBER: value is None or number,
        MAYBE_WHOLE: value is None or whole,
        MAYBE_OBJECT: value is None or isinstance(value, dict),
        MAYBE_TRUTH: value is None or isinstance(value, bool),
        OBJECT_OR_TEXT: isinstance(value, dict | str),
        INTERVAL: value is None or _is_interval(value),
    }
    if not fits[kind]:
        raise ValueError(f"{path}: {at} is {_named(value)}; {kind} is needed")


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
    )


def _named(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__} ({text[:50]}…)"


# --- the benchmark ---------------------------------------------------------------------------------------------------


class Series(NamedTuple):
    """One implementation of one operator."""

    op: str
    implementation: str

    @property
    def ours(self) -> bool:
        return self.implementation == "coordroute"

    @property
    def label(self) -> str:
        """Ours by the operator, others by the implementation; one line."""
        return " ".join(f"coordroute {self.op}".split() if self.ours else self.implementation.split())


Shape = tuple[int, int]
SOFTMAX = Series("softmax", "torch.softmax")


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        median_us, ci_us: as in the file.
        ratio: the median over that of torch.softmax on the same shape, dtype and direction; None without either.
        ratio_ci: the interval over the median of torch.softmax. The latter's own interval is not in it.
        reason: why there is no figure; empty where there is one.
    """

    median_us: float | None
    ci_us: tuple[float, float] | None
    ratio: float | None
    ratio_ci: tuple[float, float] | None
    reason: str


@dataclass(frozen=True)
class Panel:
    """All that was measured of one dtype and direction. Shapes go from short rows to long ones."""

    dtype: str
    direction: str
    shapes: list[Shape]
    series: list[Series]
    points: dict[tuple[Series, Shape], Point]

    def ratios(self, series: Series) -> list[float]:
        """The ratios to torch.softmax that there are, in the order of the shapes."""
        points = (self.points.get((series, shape)) for shape in self.shapes)
        return [point.ratio for point in points if point is not None and point.ratio is not None]

    def against(self, other: Series, ours: Series) -> list[float]:
        """The time of ``other`` over that of ``ours`` at the shapes where both were measured."""
        found = []
        for shape in self.shapes:
            a, b = self.points.get((other, shape)), self.points.get((ours, shape))
            if a is not None and b is not None and usable(a.median_us) and usable(b.median_us):
                found.append(a.median_us / b.median_us)  # type: ignore[operator]
        return found


def usable(value: float | None) -> bool:
    """Whether a figure can stand on a logarithmic axis and below a fraction."""
    return value is not None and math.isfinite(value) and value > 0


def all_series(benchmark: Json) -> list[Series]:
    """Every implementation of the file: ours first, then the others in the order of the file."""
    found = list(dict.fromkeys(Series(row["op"], row["implementation"]) for row in benchmark["results"]))
    return sorted(found, key=lambda series: not series.ours)


def panels(benchmark: Json) -> list[Panel]:
    """One panel for each dtype and direction, in the order of the file."""
    order = all_series(benchmark)
    groups: dict[tuple[str, str], list[Json]] = {}
    for row in benchmark["results"]:
        groups.setdefault((row["dtype"], row["direction"]), []).append(row)
    dtypes = list(dict.fromkeys(dtype for dtype, _ in groups))
    made = []
    for (dtype, direction), rows in sorted(groups.items(), key=lambda item: dtypes.index(item[0][0])):
        base = {(r["rows"], r["n"]): r["median_us"] for r in rows if Series(r["op"], r["implementation"]) == SOFTMAX}
        points = {}
        for row in rows:
            shape = (row["rows"], row["n"])
            points[Series(row["op"], row["implementation"]), shape] = _point(row, base.get(shape))
        present = {series for series, _ in points}
        shapes = sorted({shape for _, shape in points}, key=lambda shape: (shape[1], shape[0]))
        made.append(Panel(dtype, direction, shapes, [series for series in order if series in present], points))
    return made


def _point(row: Json, base: float | None) -> Point:
    median = row["median_us"]
    ci = None if row["ci_us"] is None else (row["ci_us"][0], row["ci_us"][1])
    reason = ""
    if row["status"] != "ok":
        reason = row["status"].removeprefix("skipped:").strip() or "the file gives no reason"
    elif median is None:
        reason = "the file has no figure for it"
    if median is None or not usable(median) or base is None or not usable(base):
        return Point(median, ci, None, None, reason)
    return Point(median, ci, median / base, None if ci is None else (ci[0] / base, ci[1] / base), reason)


# --- the targets -----------------------------------------------------------------------------------------------------

MET, MISSED, NOT_MEASURED, NO_LIMIT = "met", "missed", "not measured", "no limit"


def targets(benchmark: Json | None) -> list[Json]:
    """The rows of the targets that are for such a device: one for each target and shape."""
    return [row for row in (benchmark or {}).get("targets", []) if row["applies"]]


def became(target: Json) -> str:
    """What became of a target, in a word or two."""
    if target["met"] is not None:
        return MET if target["met"] else MISSED
    return NOT_MEASURED if target["figure"] is None else NO_LIMIT


# --- the autotuner ---------------------------------------------------------------------------------------------------


class KeyGroup(NamedTuple):
    """The keys of one operator and direction, by dtype and then from short rows to long ones."""

    op: str
    direction: str
    keys: list[Json]


def key_groups(autotune: Json) -> list[KeyGroup]:
    dtypes = list(dict.fromkeys(key["key"]["dtype"] for key in autotune["keys"]))
    groups: dict[tuple[str, str], list[Json]] = {}
    for key in autotune["keys"]:
        groups.setdefault((key["key"]["op"], key["key"]["direction"]), []).append(key)
    ops = list(dict.fromkeys(op for op, _ in groups))

    def position(key: Json) -> tuple[int, int, int]:
        return dtypes.index(key["key"]["dtype"]), key["key"]["n"], key["key"]["rows"]

    ordered = sorted(groups.items(), key=lambda item: ops.index(item[0][0]))
    return [KeyGroup(op, direction, sorted(keys, key=position)) for (op, direction), keys in ordered]


def is_tuned(key: Json) -> bool:
    """Whether the key got an entry: a configuration with its timing."""
    return key["config"] is not None and key["timing"] is not None


def kept_default(key: Json) -> bool:
    """Whether the default stayed: nothing was surely faster."""
    return is_tuned(key) and key["gain"] == 1


# --- the verification ------------------------------------------------------------------------------------------------


def holds(verify: Json) -> bool:
    """Whether all that was checked held, by the file's word and by its rows."""
    return verify["ok"] and not verify["failures"] and all(row["verdict"] != "fail" for row in verify["properties"])
