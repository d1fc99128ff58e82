"""The evidence: the JSON files of a folder, checked, and what can be derived from them.

Nothing here measures. What a file does not say stays None.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1

COMMANDS = {
    "verify": "coordroute verify --json DIR/verify.json",
    "autotune": "coordroute autotune --json DIR/autotune.json",
    "benchmark": "coordroute benchmark --peers --json DIR/benchmark.json",
}
"""What makes the file ``<command>.json``."""

MORE_COMMANDS = {
    "sanitize": "coordroute sanitize --json DIR/sanitize.json",
    "mutants": "python tests/mutation/run.py --device cuda --json DIR/mutants.json",
    "false-alarms": "python tests/mutation/run.py --device cuda --false-alarms 1000 --json DIR/false-alarms.json",
}
"""Likewise for files that say how well the verification itself sees, and what else looked. The last two need the repository."""

UPGRADES = ("upgrade", "upgrade-driver", "upgrade-kernel")
"""Searches after a change of Triton or of all kernels, of the driver alone, and of the kernels of one operator."""

MADE_BY = {"exhaustive": "exhaust", "between": "exhaust", "quick": "autotune"} | dict.fromkeys(UPGRADES, "autotune")
"""The command of a file that is not named after it."""

MORE_OF_DEVICE = ("sanitize", "exhaustive", "between", "replay", *UPGRADES, "quick")
"""Files of commands that a report does not need, but which are of its device where they are there."""

OTHERS = "verify-*.json"
"""Further files of verify, of other implementations: they are compared on a page of their own."""

VERDICTS = ("pass", "fail", "not run")
MUTANT_VERDICTS = ("killed", "survived", "not run")
TOOL_VERDICTS = ("clean", "errors", "not finished")
TIMED = "timed"
"""The status of a candidate that is right and was timed; any other says why it was dropped."""

Json = dict[str, Any]

TEXT, NUMBER, WHOLE, ANYTHING = "a string", "a number", "a whole number", "anything"
MAYBE_TEXT, MAYBE_NUMBER, MAYBE_WHOLE = f"{TEXT} or null", f"{NUMBER} or null", f"{WHOLE} or null"
TRUTH, OBJECT, MAYBE_OBJECT, LIST = "true or false", "an object", "an object or null", "a list"
INTERVAL = "a list of two numbers or null"
TEXTS, BINS = "a list of strings", "a list of pairs of whole numbers"
MAYBE_TRUTH, OBJECT_OR_TEXT = f"{TRUTH} or null", f"{OBJECT} or {TEXT}"
NUMBERS, WHOLES, TRIPLES = "a list of numbers, at least one", "a list of whole numbers", "a list of lists of three numbers"
MAYBE_NUMBERS = f"{NUMBERS}, or null"

_HEAD = {"device": OBJECT, "versions": OBJECT, "date": TEXT, "seconds": NUMBER}
_DEVICE = {"name": TEXT, "sm_count": WHOLE, "capability": TEXT, "memory_bytes": WHOLE, "driver": TEXT}
_KEY = {"op": TEXT, "direction": TEXT, "dtype": TEXT, "rows": WHOLE, "n": WHOLE}
_FIELDS: dict[str, dict[str, str]] = {
    "verify": {
        "seed": WHOLE,
        "examples": WHOLE,
        "target": TEXT,
        "target_version": MAYBE_TEXT,
        "ok": TRUTH,
        "properties": LIST,
        "facets": LIST,
        "distributions": LIST,
        "failures": LIST,
    },
    "autotune": {
        "effort": TEXT,
        "file": TEXT,
        "resumed": WHOLE,
        "keys": LIST,
        "dropped": OBJECT,
        "geometric_mean_gain": MAYBE_NUMBER,
    },
    "benchmark": {"method": TEXT, "settings": OBJECT, "results": LIST},
    "sanitize": {"ok": TRUTH, "self_check": TRUTH, "tools": LIST},
    "exhaustive": {"rounds": WHOLE, "method": TEXT, "keys": LIST},
    "replay": {"source": TEXT, "seeds": WHOLE, "full_launches": TEXT, "strategies": LIST},
}
_FIELDS |= {"between": _FIELDS["exhaustive"], "quick": _FIELDS["autotune"]} | dict.fromkeys(UPGRADES, _FIELDS["autotune"])
_UNTIMED = ("exhaustive", "between", "replay")
"""Files that do not say how long they took."""

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
_DETAIL = {"numerator_us": MAYBE_NUMBER, "denominator_us": MAYBE_NUMBER, "sweeps": MAYBE_NUMBER, "floats_a_row": MAYBE_NUMBER}
"""What a target's ``detail`` may hold."""

_PROPERTY = {
    "op": TEXT,
    "property": TEXT,
    "sentence": TEXT,
    "derivation": TEXT,
    "dtype": TEXT,
    "cases": WHOLE,
    "left_out": WHOLE,
    "worst_error": MAYBE_NUMBER,
    "bound": MAYBE_NUMBER,
    "worst_ratio": MAYBE_NUMBER,
    "worst_family": MAYBE_TEXT,
    "failing_facets": TEXTS,
    "verdict": TEXT,
    "reason": TEXT,
}
_FACET = {
    "op": TEXT,
    "dtype": TEXT,
    "facet": TEXT,
    "sentence": TEXT,
    "rows": WHOLE,
    "failed": TEXTS,
    "verdict": TEXT,
    "reason": TEXT,
}
_DISTRIBUTION = {"op": TEXT, "dtype": TEXT, "quantity": TEXT, "rows": WHOLE, "ours": OBJECT, "plain": OBJECT}
_ULPS = {"p50": MAYBE_NUMBER, "p99.9": MAYBE_NUMBER, "max": MAYBE_NUMBER, "histogram": BINS}
_FAILURE = {
    "op": TEXT,
    "property": TEXT,
    "dtype": TEXT,
    "facet": TEXT,
    "family": MAYBE_TEXT,
    "error": MAYBE_NUMBER,
    "bound": MAYBE_NUMBER,
    "message": TEXT,
    "reproducer": TEXT,
}
_TUNED = {"key": OBJECT, "config": MAYBE_OBJECT, "timing": MAYBE_OBJECT, "gain": MAYBE_NUMBER, "candidates": LIST}
_TIMING = {"median_us": NUMBER, "ci_us": INTERVAL, "default_us": NUMBER, "samples": WHOLE, "method": TEXT}
_CANDIDATE = {"status": TEXT, "reason": TEXT}
_SEARCHED = {"groups": MAYBE_WHOLE, "workers": MAYBE_WHOLE, "gpus": MAYBE_WHOLE, "reverified": MAYBE_WHOLE, "kept": MAYBE_WHOLE}
_SEARCHED |= {"requests": MAYBE_OBJECT, "seconds_before": MAYBE_NUMBER, "outdated": MAYBE_OBJECT}
"""What autotune.json may say of the search; a file from before it did has none."""
_REQUESTS = {"requests": WHOLE, "seconds": NUMBER, "longest": NUMBER, "longest_about": TEXT}

_CONFIG = {
    "variant": TEXT,
    "block": WHOLE,
    "rows_per_program": WHOLE,
    "num_warps": WHOLE,
    "num_stages": WHOLE,
    "checkpoint_segments": MAYBE_WHOLE,
    "num_threads": WHOLE,
    "programs_per_row": WHOLE,
    "max_registers": WHOLE,
}
_EXHAUSTED = {"key": OBJECT, "default": WHOLE, "seeds": WHOLES, "candidates": LIST}
_TRIED = {
    "config": OBJECT,
    "status": TEXT,
    "samples": MAYBE_NUMBERS,
    "registers": MAYBE_WHOLE,
    "spills": MAYBE_WHOLE,
    "same_as": MAYBE_WHOLE,
}
_STRATEGY = {"name": TEXT, "text": TEXT, "keys": LIST, "regret": OBJECT, "share": OBJECT, "stable": NUMBER, "curve": TRIPLES}
_REGRET = {"median": NUMBER, "p95": NUMBER, "worst": NUMBER}
_SHARE = {"median": NUMBER, "worst": NUMBER}
_REPLAYED = {"key": OBJECT, "candidates": WHOLE, "regret": NUMBERS, "share": NUMBERS, "agreement": NUMBER}
_TOOL = {
    "tool": TEXT,
    "sees_planted_fault": TRUTH,
    "launches": WHOLE,
    "configurations": WHOLE,
    "errors": WHOLE,
    "verdict": TEXT,
    "reason": TEXT,
    "seconds": NUMBER,
    "groups": LIST,
    "reports": LIST,
}
_GROUP = {
    "group": TEXT,
    "launches": WHOLE,
    "planned": WHOLE,
    "configurations": WHOLE,
    "errors": WHOLE,
    "verdict": TEXT,
    "reason": TEXT,
    "seconds": NUMBER,
}
_SEEN = {"group": TEXT, "kernel": TEXT, "text": TEXT}

_MUTATION_HEAD = {"device": TEXT, "versions": OBJECT, "date": TEXT, "seconds": NUMBER}
_MUTANTS = {"control": OBJECT, "mutants": LIST}
_TRAINING = {
    "command": TEXT,
    "device": OBJECT,
    "date": TEXT,
    "settings": OBJECT,
    "parameters": WHOLE,
    "complete": TRUTH,
    "methods": LIST,
}
_COLT5 = {"package_version": TEXT, "device": OBJECT, "date": TEXT, "sizes": OBJECT, "same": LIST, "speed": LIST}
_CONTROL = {"verdict": TEXT, "checks": WHOLE, "failures": LIST}
_MUTANT = {
    "name": TEXT,
    "sentence": TEXT,
    "file": TEXT,
    "op": TEXT,
    "where": TEXTS,
    "verdict": TEXT,
    "property": MAYBE_TEXT,
    "counterexample": MAYBE_TEXT,
    "seconds": MAYBE_NUMBER,
    "explanation": TEXT,
}
_ALARMS = {"place": TEXT, "runs": WHOLE, "checks": WHOLE, "failures": LIST}
_ALARM = {"check": TEXT, "property": TEXT, "counterexample": TEXT}


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What lay in the folder; None for a file that was not there.

    Attributes:
        verify, autotune, benchmark, sanitize: files of commands, all of one device.
        mutants, false_alarms: of tests/mutation/run.py; they name their own device.
        training: of examples/train_bytes.py; colt5: of coordroute.integrations.colt5_check, each of another version.
        others: the further files of verify, by their names; of any device.
        exhaustive: every candidate of some keys, timed; replay: searches replayed on it.
        between: every candidate at shapes that no key has.
        quick: a search of the effort of that name, for its time. These four are of the same device as the commands' files.
        upgrades: searches that found their choices made, but with other versions or kernels, by the names of :data:`UPGRADES`; of
            the same device.
    """

    verify: Json | None = None
    autotune: Json | None = None
    benchmark: Json | None = None
    sanitize: Json | None = None
    mutants: Json | None = None
    false_alarms: Json | None = None
    training: Json | None = None
    colt5: tuple[Json, ...] = ()
    others: dict[str, Json] = field(default_factory=dict)
    exhaustive: Json | None = None
    replay: Json | None = None
    between: Json | None = None
    quick: Json | None = None
    upgrades: dict[str, Json] = field(default_factory=dict)

    def files(self) -> dict[str, Json]:
        """Name without .json -> content, for the files of commands that were there."""
        found = {"verify": self.verify, "autotune": self.autotune, "benchmark": self.benchmark, "sanitize": self.sanitize}
        found |= {
            "exhaustive": self.exhaustive,
            "replay": self.replay,
            "between": self.between,
            **self.upgrades,
            "quick": self.quick,
        }
        return {command: data for command, data in found.items() if data is not None}

    def reported(self) -> bool:
        """Whether there is what a report is of."""
        return any(command in COMMANDS for command in self.files())

    def compared(self) -> dict[str, Json]:
        """File name -> content, for the files of verify that are compared with each other; none where there is but verify.json."""
        if not self.others:
            return {}
        return ({} if self.verify is None else {"verify.json": self.verify}) | self.others

    @property
    def device(self) -> Json:
        device: Json = next(iter(self.files().values()))["device"]
        return device


def load(folder: Path) -> Evidence:
    """Reads and checks the evidence of a folder: verify.json, autotune.json, benchmark.json or verify-*.json, at least one of them,
    and sanitize.json, exhaustive.json, between.json, replay.json, upgrade.json, upgrade-driver.json, upgrade-kernel.json,
    quick.json, mutants.json, false-alarms.json, bytes.json, colt5.json and colt5-*.json.

    Raises:
        ValueError: no file, one that is not what its name says, or files of different devices.
    """
    commands = ", ".join(f"`{command}`" for command in COMMANDS.values())
    names = ", ".join(f"{name}.json" for name in COMMANDS)
    needed = f"at least one of {names} or {OTHERS} is needed there; {commands} make them"
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}; {needed}")
    of_device = (*COMMANDS, *MORE_OF_DEVICE)
    found = {command: read_file(path, command) for command in of_device if (path := folder / f"{command}.json").exists()}
    others = {path.name: read_file(path, "verify") for path in sorted(folder.glob(OTHERS), key=_natural)}
    if not others and not any(command in found for command in COMMANDS):
        raise ValueError(f"{folder} has no evidence to render; {needed}")
    for command, data in [*found.items()][1:]:
        first, one = next(iter(found.items()))
        for name in ("name", "sm_count", "capability"):
            mine, yours = one["device"][name], data["device"][name]
            if mine != yours:
                raise ValueError(
                    f"{folder / f'{first}.json'} is of the device with {name} {mine!r}, {folder / f'{command}.json'} of one "
                    f"with {name} {yours!r}; a report is of one device: put their files into folders of their own"
                )
    mutants, alarms = folder / "mutants.json", folder / "false-alarms.json"
    return Evidence(
        found.get("verify"),
        found.get("autotune"),
        found.get("benchmark"),
        found.get("sanitize"),
        _read_mutants(mutants) if mutants.exists() else None,
        _read_false_alarms(alarms) if alarms.exists() else None,
        _read_model(folder / "bytes.json", _TRAINING),
        tuple(
            model
            for path in sorted([folder / "colt5.json", *folder.glob("colt5-*.json")], key=_natural)
            if (model := _read_model(path, _COLT5)) is not None
        ),
        others,
        found.get("exhaustive"),
        found.get("replay"),
        found.get("between"),
        found.get("quick"),
        {name: found[name] for name in UPGRADES if name in found},
    )


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts 0.9 before 0.11."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


def _parse(path: Path) -> Json:
    try:
        data = _harmless(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {_named(data)}; an object is needed")
    return data


def read_file(path: Path, name: str) -> Json:
    data, command = _parse(path), MADE_BY.get(name, name)
    if data.get("schema") != SCHEMA or isinstance(data.get("schema"), bool):
        raise ValueError(f"{path} has schema {data.get('schema')!r}; this version reads schema {SCHEMA}")
    if data.get("command") != command:
        raise ValueError(f"{path} is of the command {data.get('command')!r}; a file of this name is of {command!r}")
    head = {field: kind for field, kind in _HEAD.items() if not (field == "seconds" and name in _UNTIMED)}
    _fields(path, "", data, head | _FIELDS[name])
    _fields(path, "device", data["device"], _DEVICE)
    _check_versions(path, data)
    checks = {"verify": _check_verify, "autotune": _check_autotune, "benchmark": _check_benchmark, "sanitize": _check_sanitize}
    checks |= {"exhaustive": _check_exhaustive, "replay": _check_replay, "between": _check_between}
    checks |= {"quick": _check_quick} | dict.fromkeys(UPGRADES, _check_autotune)
    checks[name](path, data)
    return data


def _check_versions(path: Path, data: Json) -> None:
    for name, value in data["versions"].items():
        _check(path, f"versions.{name}", value, MAYBE_TEXT)


def _read_model(path: Path, fields: Json) -> Json | None:
    if not path.exists():
        return None
    data = _parse(path)
    _fields(path, "", data, fields)
    _fields(path, "device", data["device"], _DEVICE)
    return data


def _read_mutants(path: Path) -> Json:
    data = _parse(path)
    _fields(path, "", data, _MUTATION_HEAD | _MUTANTS)
    _check_versions(path, data)
    _fields(path, "control", data["control"], _CONTROL)
    for i, row in enumerate(data["control"]["failures"]):
        _fields(path, f"control.failures[{i}]", row, _ALARM)
    for i, row in enumerate(data["mutants"]):
        _fields(path, f"mutants[{i}]", row, _MUTANT)
        _one_of(path, f"mutants[{i}].verdict", row["verdict"], MUTANT_VERDICTS)
    _distinct(path, "mutants", data["mutants"], ("name",))
    return data


def _read_false_alarms(path: Path) -> Json:
    data = _parse(path)
    _fields(path, "", data, _MUTATION_HEAD | _ALARMS)
    _check_versions(path, data)
    for i, row in enumerate(data["failures"]):
        _fields(path, f"failures[{i}]", row, _ALARM)
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
        _one_of(path, f"properties[{i}].verdict", row["verdict"], VERDICTS)
    _distinct(path, "properties", data["properties"], ("op", "property", "dtype"))
    for i, row in enumerate(data["facets"]):
        _fields(path, f"facets[{i}]", row, _FACET)
        _one_of(path, f"facets[{i}].verdict", row["verdict"], VERDICTS)
    _distinct(path, "facets", data["facets"], ("op", "facet", "dtype"))
    for i, row in enumerate(data["distributions"]):
        _fields(path, f"distributions[{i}]", row, _DISTRIBUTION)
        for whose in ("ours", "plain"):
            _fields(path, f"distributions[{i}].{whose}", row[whose], _ULPS)
    _distinct(path, "distributions", data["distributions"], ("op", "dtype", "quantity"))
    for i, row in enumerate(data["failures"]):
        _fields(path, f"failures[{i}]", row, _FAILURE)


def _check_sanitize(path: Path, data: Json) -> None:
    for i, tool in enumerate(data["tools"]):
        _fields(path, f"tools[{i}]", tool, _TOOL)
        _one_of(path, f"tools[{i}].verdict", tool["verdict"], TOOL_VERDICTS)
        for j, group in enumerate(tool["groups"]):
            _fields(path, f"tools[{i}].groups[{j}]", group, _GROUP)
        for j, seen in enumerate(tool["reports"]):
            _fields(path, f"tools[{i}].reports[{j}]", seen, _SEEN)
    _distinct(path, "tools", data["tools"], ("tool",))


def _check_autotune(path: Path, data: Json) -> None:
    for status, number in data["dropped"].items():
        _check(path, f"dropped[{status!r}]", number, WHOLE)
    for name, kind in _SEARCHED.items():
        _check(path, name, data.get(name), kind)
    for cause, number in (data.get("outdated") or {}).items():
        _check(path, f"outdated[{cause!r}]", number, WHOLE)
    for kind, one in (data.get("requests") or {}).items():
        _fields(path, f"requests[{kind!r}]", one, _REQUESTS)
    for i, key in enumerate(data["keys"]):
        _fields(path, f"keys[{i}]", key, _TUNED)
        _fields(path, f"keys[{i}].key", key["key"], _KEY)
        if key["timing"] is not None:
            _fields(path, f"keys[{i}].timing", key["timing"], _TIMING)
        for j, candidate in enumerate(key["candidates"]):
            _fields(path, f"keys[{i}].candidates[{j}]", candidate, _CANDIDATE)
    _distinct(path, "keys", [key["key"] for key in data["keys"]], tuple(_KEY))


def _check_quick(path: Path, data: Json) -> None:
    _check_autotune(path, data)
    _one_of(path, "effort", data["effort"], ("quick",))


def _check_exhaustive(path: Path, data: Json) -> None:
    for i, key in enumerate(data["keys"]):
        at = f"keys[{i}]"
        _fields(path, at, key, _EXHAUSTED)
        _fields(path, f"{at}.key", key["key"], _KEY)
        candidates = key["candidates"]
        _candidate(path, f"{at}.default", key["default"], candidates)
        for j, seed in enumerate(key["seeds"]):
            _candidate(path, f"{at}.seeds[{j}]", seed, candidates)
        for j, one in enumerate(candidates):
            _fields(path, f"{at}.candidates[{j}]", one, _TRIED)
            _fields(path, f"{at}.candidates[{j}].config", one["config"], _CONFIG)
        for j, one in enumerate(candidates):
            _check_time(path, f"{at}.candidates[{j}]", j, one, candidates)
    _distinct(path, "keys", [key["key"] for key in data["keys"]], tuple(_KEY))


def _check_between(path: Path, data: Json) -> None:
    _check_exhaustive(path, data)
    for i, key in enumerate(data["keys"]):
        _check(path, f"keys[{i}].serves", key.get("serves", "missing"), MAYBE_WHOLE)
        if key["serves"] is not None:
            _candidate(path, f"keys[{i}].serves", key["serves"], key["candidates"])


def _check_time(path: Path, at: str, position: int, one: Json, candidates: list[Json]) -> None:
    """A candidate has samples, or the time of one that has."""
    same = one["same_as"]
    if same is not None:
        _candidate(path, f"{at}.same_as", same, candidates)
        if same == position or candidates[same]["same_as"] is not None:
            raise ValueError(f"{path}: {at}.same_as is {same}; a candidate that is the same as no other is needed")
    if one["status"] == TIMED and (one["samples"] is None) == (same is None):
        raise ValueError(f"{path}: {at} is {TIMED}; either samples or same_as is needed")


def _candidate(path: Path, at: str, index: int, candidates: list[Json]) -> None:
    if not 0 <= index < len(candidates):
        raise ValueError(f"{path}: {at} is {index}; the index of one of {len(candidates)} candidates is needed")


def _check_replay(path: Path, data: Json) -> None:
    for i, strategy in enumerate(data["strategies"]):
        at = f"strategies[{i}]"
        _fields(path, at, strategy, _STRATEGY)
        _fields(path, f"{at}.regret", strategy["regret"], _REGRET)
        _fields(path, f"{at}.share", strategy["share"], _SHARE)
        for j, key in enumerate(strategy["keys"]):
            _fields(path, f"{at}.keys[{j}]", key, _REPLAYED)
            _fields(path, f"{at}.keys[{j}].key", key["key"], _KEY)
        _distinct(path, f"{at}.keys", [key["key"] for key in strategy["keys"]], tuple(_KEY))
    _distinct(path, "strategies", data["strategies"], ("name",))


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


def _one_of(path: Path, at: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{path}: {at} is {value!r}; allowed is one of {', '.join(allowed)}")


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
        TEXTS: isinstance(value, list) and all(isinstance(one, str) for one in value),
        BINS: isinstance(value, list) and all(map(_is_bin, value)),
        NUMBERS: bool(value) and _are_numbers(value),
        MAYBE_NUMBERS: value is None or (bool(value) and _are_numbers(value)),
        WHOLES: _are_numbers(value) and all(isinstance(one, int) for one in value),
        TRIPLES: isinstance(value, list) and all(_are_numbers(one) and len(one) == 3 for one in value),
    }
    if not fits[kind]:
        raise ValueError(f"{path}: {at} is {_named(value)}; {kind} is needed")


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)


def _is_interval(value: Any) -> bool:
    return _are_numbers(value) and len(value) == 2


def _is_bin(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2 and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    return pair and abs(value[0]) <= 1100 and 0 < value[1] < 2**63


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


def configurations(autotune: Json) -> dict[str, list[Json]]:
    """Operator -> its distinct configurations, the most frequent first, each with its number of keys: ``{"config", "keys"}``."""
    found: dict[str, list[Json]] = {}
    for key in filter(is_tuned, autotune["keys"]):
        of_op = found.setdefault(key["key"]["op"], [])
        same = next((one for one in of_op if one["config"] == key["config"]), None)
        if same is None:
            of_op.append({"config": key["config"], "keys": 1})
        else:
            same["keys"] += 1
    return {op: sorted(of_op, key=lambda one: -int(one["keys"])) for op, of_op in found.items()}


Form = tuple[tuple[str, Any], ...]


def form(config: Json) -> Form:
    """A configuration without what follows from the length of the row: configurations of one form are one choice.

    A resident row's block is its length. Of its scores a warp has so many that a row needs several, or so many that one warp has
    several rows: how many follows from the length in both cases, but not how many rows several warps share. How many programs
    share a row is its length by what each of them has of it.
    """
    found = dict(config)
    if config["variant"] == "resident":
        found["num_warps"] = config["rows_per_program"] * config["block"] / max(config["num_warps"], 1)
        found["block"] = None
        if config["num_warps"] <= 1 or config["rows_per_program"] == 1:
            found["rows_per_program"] = None
    elif config["variant"] == "split":
        found["programs_per_row"] = None
    return tuple(sorted(found.items()))


# --- the verification ------------------------------------------------------------------------------------------------


def holds(verify: Json) -> bool:
    """Whether all that was checked held, by the file's word and by its rows."""
    return verify["ok"] and not verify["failures"] and all(row["verdict"] != "fail" for row in verify["properties"])


def target_name(verify: Json) -> str:
    """Whose operators these are, with the version: ``coordroute 0.1.0``, ``entmax 1.3 (entmax_budget)``."""
    target, version = verify["target"], verify["target_version"]
    if target == "coordroute":
        return version or target
    return f"{version} ({target.rpartition(':')[2]})" if version else target


def by_op(rows: list[Json]) -> dict[str, list[Json]]:
    """Operator -> its rows, in the order of the file."""
    found: dict[str, list[Json]] = {}
    for row in rows:
        found.setdefault(row["op"], []).append(row)
    return found


def dtypes_of(rows: list[Json]) -> list[str]:
    """The dtypes of some rows, widest known ones first."""
    known = ("float64", "float32", "bfloat16", "float16")
    found = list(dict.fromkeys(row["dtype"] for row in rows))
    return sorted(found, key=lambda dtype: known.index(dtype) if dtype in known else len(known))


class Counterexamples(NamedTuple):
    """The failures of one property of one operator: the shortest to reproduce, and the dtypes of all."""

    failure: Json
    dtypes: list[str]


def counterexamples(verify: Json) -> list[Counterexamples]:
    """One for each operator and property that fails with a counterexample."""
    groups: dict[tuple[str, str], list[Json]] = {}
    for failure in verify["failures"]:
        groups.setdefault((failure["op"], failure["property"]), []).append(failure)
    return [
        Counterexamples(min(group, key=lambda one: (not one["reproducer"], len(one["reproducer"]))), dtypes_of(group))
        for group in groups.values()
    ]
