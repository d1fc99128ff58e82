"""The targets: what the operators must reach on an H100 (and on two cores of a CPU), and whether a run of the benchmark did.

A target is a ratio of two contenders' times within one run, or a count. The list says which contenders at which shapes it
needs; :func:`evaluate` takes what was measured and gives one row for each target and shape. It measures nothing itself and
imports nothing but the standard library, so that it can be told any results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Shape = tuple[int, int]
Json = dict[str, Any]

DTYPE, BESIDE = "float32", "bfloat16"
"""The dtype that decides, and the one whose figure stands beside it without a verdict."""

AT_MOST, AT_LEAST = "at most", "at least"

CPU_THREADS = 2
"""The targets of a CPU are for this many cores."""

LEFT_OUT = "not measured in this run"

SETTINGS = "T=20"
LONG = "coordinate_descent T=50"
"""The operator's name for T = 50 with a constant eps; ``coordinate_descent`` alone is the published settings, T = 20."""


class Peer(NamedTuple):
    """One implementation of one operator, as rows of results name it; others' versions follow the name."""

    op: str
    implementation: str
    extra: bool = False

    def is_of(self, row: Mapping[str, Any]) -> bool:
        return row["op"] == self.op and (
            row["implementation"] == self.implementation or row["implementation"].startswith(f"{self.implementation} ")
        )

    @property
    def label(self) -> str:
        return f"{self.op} by {self.implementation}" if self.implementation == "coordroute" else self.implementation


SOFT_TOPK = Peer("soft_topk", "coordroute")
DESCENT = Peer("coordinate_descent", "coordroute")
DESCENT_50 = Peer(LONG, "coordroute")
SOFTMAX = Peer("softmax", "torch.softmax")
COPY = Peer("copy", "copy")
EAGER = Peer("coordinate_descent", "eager published recurrence")
COLT5 = Peer("coordinate_descent", "colt5-attention", extra=True)


@dataclass(frozen=True)
class Target:
    """One target, for some shapes.

    Attributes:
        id: its number in the list of targets, with a letter where that holds several.
        sentence: what is to be reached, for the reader: "at most 1.0× torch.softmax forward".
        subject: the operator that is judged.
        directions: what is timed; the times of several are added. () where nothing is.
        shapes: (rows, n) at which it is judged; () where there is no shape to it.
        numerator, denominator: whose times are divided; None for a target that is no ratio of rows of results.
        limit: what the figure must keep; None for a figure that is only reported.
        sense: ``AT_MOST`` or ``AT_LEAST``.
        kind: what it is measured by: "time"; "sweeps", a time over that of as many copies as sweeps were done; "memory",
            "growth" and "host" are the entries of ``Measured`` of these names.
        unit: of the figure.
        device: the kind of device that it is for: "cuda", "cpu" (measured on the host of a GPU, too), or "any".
    """

    id: str
    sentence: str
    subject: Peer
    directions: tuple[str, ...]
    shapes: tuple[Shape, ...]
    numerator: Peer | None
    denominator: Peer | None
    limit: float | None
    sense: str = AT_MOST
    kind: str = "time"
    unit: str = "×"
    device: str = "cuda"

    @property
    def work(self) -> str:
        settings = f" {SETTINGS}" if self.subject is DESCENT else ""
        return f"{self.subject.op}{settings} {' + '.join(self.directions)}".strip()


FORWARD, BACKWARD, BOTH = ("forward",), ("backward",), ("forward", "backward")
LARGE: tuple[Shape, ...] = ((1024, 8192), (4096, 2048), (1024, 16384), (65536, 256))
SMALL: tuple[Shape, ...] = ((8, 1024), (16, 4096), (32, 8192))
LONG_ROW: tuple[Shape, ...] = ((1, 1048576),)
FEW_ROWS: tuple[Shape, ...] = ((4, 131072),)
HUGE_ROW: tuple[Shape, ...] = ((1, 16777216),)
STANDARD: tuple[Shape, ...] = ((1024, 8192),)
CPU_SHAPE: tuple[Shape, ...] = ((32, 8192),)


def _softmax(number: str, directions: tuple[str, ...], shapes: tuple[Shape, ...], limit: float, said: str) -> Target:
    sentence = f"at most {said} torch.softmax {directions[0]}"
    return Target(number, sentence, SOFT_TOPK, directions, shapes, SOFT_TOPK, SOFTMAX, limit)


def _faster(number: str, directions: tuple[str, ...], shapes: tuple[Shape, ...], limit: float) -> Target:
    sentence = f"at least {limit:g}× faster than colt5-attention's kernel"
    return Target(number, sentence, DESCENT, directions, shapes, COLT5, DESCENT, limit, AT_LEAST)


def _longer(number: str, directions: tuple[str, ...], sentence: str, limit: float | None) -> Target:
    return Target(number, sentence, DESCENT_50, directions, STANDARD, DESCENT_50, DESCENT, limit)


def _cpu(number: str, subject: Peer, limit: float) -> Target:
    sentence = f"at least {limit:g}× faster than the eager published recurrence, T=20, on a CPU with {CPU_THREADS} cores"
    return Target(number, sentence, subject, BOTH, CPU_SHAPE, EAGER, subject, limit, AT_LEAST, device="cpu")


def _host(number: str, subject: Peer) -> Target:
    sentence = "host time of an eager call at most 1.5× that of a bare autograd.Function with one kernel each way"
    return Target(number, sentence, subject, BOTH, (), None, None, 1.5, kind="host")


KEEPS_NOTHING = "keeps nothing for the backward that grows with the scores, but the scores or the output"
KEEPS_LITTLE = "keeps at most T = 20 floats a row for the backward, beside the scores or the output"

TARGETS: tuple[Target, ...] = (
    _softmax("1", FORWARD, LARGE, 1.0, "1.0×"),
    _softmax("2", BACKWARD, LARGE, 0.55, "0.55×"),
    _softmax("3", FORWARD, SMALL, 2.0, "2×"),
    _softmax("4", FORWARD, LONG_ROW, 1 / 12, "1/12 of"),
    _softmax("5", FORWARD, FEW_ROWS, 0.6, "0.6×"),
    Target(
        "6",
        "at most the time of a copy for each sweep over the row",
        SOFT_TOPK,
        FORWARD,
        HUGE_ROW,
        SOFT_TOPK,
        COPY,
        1.0,
        kind="sweeps",
    ),
    _softmax("7", BACKWARD, LONG_ROW, 1 / 12, "1/12 of"),
    _faster("8a", FORWARD, STANDARD, 12.0),
    _faster("8b", BACKWARD, STANDARD, 25.0),
    _faster("9a", FORWARD, FEW_ROWS, 35.0),
    _faster("9b", BACKWARD, FEW_ROWS, 300.0),
    _longer("10a", FORWARD, "constant eps 0.1: no slower than T=20 with eps-scaling", 1.0),
    _longer("10b", BACKWARD, "constant eps 0.1: beside T=20 with eps-scaling, reported only", None),
    _cpu("11a", SOFT_TOPK, 20.0),
    _cpu("11b", DESCENT, 6.0),
    Target("12a", KEEPS_NOTHING, SOFT_TOPK, (), STANDARD, None, None, 0.0, kind="growth", unit="of the scores' size", device="any"),
    Target("12b", KEEPS_LITTLE, DESCENT, (), STANDARD, None, None, 20.0, kind="memory", unit="floats a row", device="any"),
    _host("13a", SOFT_TOPK),
    _host("13b", DESCENT),
)


# --- what they need --------------------------------------------------------------------------------------------------


def shapes_of(peer: Peer, device: str = "cuda") -> tuple[Shape, ...]:
    """The shapes at which a contender's time is needed on a kind of device."""
    found = (
        shape
        for target in TARGETS
        if target.device == device and peer in (target.numerator, target.denominator)
        for shape in target.shapes
    )
    return tuple(dict.fromkeys(found))


def counts_sweeps(op: str, direction: str, rows: int, n: int) -> bool:
    """Whether a target wants the sweeps of such a row of results."""
    return any(
        target.kind == "sweeps" and target.subject.op == op and direction in target.directions and (rows, n) in target.shapes
        for target in TARGETS
    )


# --- evaluation ------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What a run has to say to the targets.

    Attributes:
        device: the kind of device of ``results``: "cuda" or "cpu".
        results: the rows of the benchmark.
        cpu: rows measured on the CPU with ``CPU_THREADS`` threads, or the reason why there are none.
        memory: rows of what is kept for the backward: op, dtype, rows, n, floats_a_row, growth; or a reason.
        host: microseconds of one eager call: bare_us, soft_topk_us, coordinate_descent_us, and soft_topk_ratio and
            coordinate_descent_ratio to the bare one where they were taken in pairs; or a reason.
    """

    device: str
    results: Sequence[Json]
    cpu: Sequence[Json] | str = LEFT_OUT
    memory: Sequence[Json] | str = LEFT_OUT
    host: Mapping[str, Any] | str = LEFT_OUT


@dataclass
class _Figure:
    """A figure, or the reason for which there is none."""

    value: float | None = None
    reason: str = ""
    more: Json = field(default_factory=dict)


def _none(reason: str) -> _Figure:
    return _Figure(None, reason)


def evaluate(measured: Measured) -> list[Json]:
    """Every target at every one of its shapes.

    Returns:
        Rows {id, op, directions, rows, n, work, target, applies, figure, bfloat16, unit, limit, sense, met, reason, detail}:
        ``met`` is None, with the reason, where there is no figure or nothing to be met; ``bfloat16`` is the same figure of that
        dtype; ``applies`` is false for a target of another kind of device.
    """
    made = []
    for target in TARGETS:
        for shape in target.shapes or (None,):
            applies = target.device in (measured.device, "cpu", "any")
            figure = _figure(measured, target, shape, DTYPE)
            beside = _figure(measured, target, shape, BESIDE).value if target.kind != "host" else None
            met = None
            if figure.value is not None and target.limit is not None:
                met = figure.value <= target.limit if target.sense == AT_MOST else figure.value >= target.limit
            reason = figure.reason if figure.value is None else "" if met is not None else "no limit is set"
            made.append(
                {
                    "id": target.id,
                    "op": target.subject.op,
                    "directions": list(target.directions),
                    "rows": None if shape is None else shape[0],
                    "n": None if shape is None else shape[1],
                    "work": target.work,
                    "target": target.sentence,
                    "applies": applies,
                    "figure": _rounded(figure.value),
                    "bfloat16": _rounded(beside),
                    "unit": target.unit,
                    "limit": _rounded(target.limit),
                    "sense": target.sense,
                    "met": met,
                    "reason": reason,
                    "detail": figure.more,
                }
            )
    return made


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _figure(measured: Measured, target: Target, shape: Shape | None, dtype: str) -> _Figure:
    if target.device == "cuda" and measured.device != "cuda":
        return _none("it is for a GPU")
    if target.kind == "host":
        return _host_time(measured, target)
    if shape is None:
        raise ValueError(f"target {target.id} is of kind {target.kind!r} and has no shape")
    if target.kind in ("memory", "growth"):
        return _memory(measured, target, shape, dtype)
    if target.numerator is None or target.denominator is None:
        raise ValueError(f"target {target.id} is a ratio of times and does not say whose")
    if target.device == "cpu":
        if isinstance(measured.cpu, str):
            return _none(measured.cpu)
        results = measured.cpu
    else:
        results = measured.results
    above = _time(results, target.numerator, target.directions, shape, dtype)
    below = _time(results, target.denominator, target.directions, shape, dtype)
    for one in (above, below):
        if one.value is None:
            return one
    if above.value is None or below.value is None:  # for the type checker
        return _none("")
    more: Json = {"numerator_us": _rounded(above.value), "denominator_us": _rounded(below.value)}
    ratio = above.value / below.value
    if target.kind == "sweeps":
        sweeps = above.more.get("sweeps")
        if not sweeps:
            return _none(above.more.get("sweeps_reason") or "its sweeps were not counted")
        more["sweeps"] = sweeps
        ratio /= sweeps
    return _Figure(ratio, "", more)


def _time(results: Iterable[Json], peer: Peer, directions: tuple[str, ...], shape: Shape, dtype: str) -> _Figure:
    """The sum of a contender's times, with what else its last row says."""
    total, more = 0.0, {}
    for direction in directions:
        row = next(
            (
                row
                for row in results
                if peer.is_of(row) and (row["direction"], row["dtype"], row["rows"], row["n"]) == (direction, dtype, *shape)
            ),
            None,
        )
        if row is None:
            left_out = f"{peer.label} was not measured at {shape[0]}x{shape[1]} in this run"
            return _none(f"{left_out}; --peers measures it" if peer.extra else left_out)
        median = row["median_us"]
        if median is None:
            return _none(f"{peer.label}: {row['status'].removeprefix('skipped: ')}")
        if not math.isfinite(median) or median <= 0:
            return _none(f"{peer.label} has no time that could be compared")
        total, more = total + median, row
    return _Figure(total, "", more)


def _memory(measured: Measured, target: Target, shape: Shape, dtype: str) -> _Figure:
    if isinstance(measured.memory, str):
        return _none(measured.memory)
    for row in measured.memory:
        if (row["op"], row["dtype"], row["rows"], row["n"]) == (target.subject.op, dtype, *shape):
            if row["status"] != "ok":
                return _none(row["status"].removeprefix("skipped: "))
            value = row["growth" if target.kind == "growth" else "floats_a_row"]
            return _Figure(value, "", {"floats_a_row": row["floats_a_row"]})
    return _none(LEFT_OUT)


def _host_time(measured: Measured, target: Target) -> _Figure:
    if isinstance(measured.host, str):
        return _none(measured.host)
    bare, ours = measured.host.get("bare_us"), measured.host.get(f"{target.subject.op}_us")
    if not bare or ours is None:
        return _none("autotune/hosttime.py gave no figure for it")
    # sample by sample where that is given: it is steadier than the ratio of two medians
    ratio = measured.host.get(f"{target.subject.op}_ratio") or ours / bare
    return _Figure(ratio, "", {"numerator_us": _rounded(ours), "denominator_us": _rounded(bare)})
