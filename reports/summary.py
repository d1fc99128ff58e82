"""The short tables of a README: both operators beside others, float32, and the targets, from benchmark.json and verify.json alone.

    python -m coordroute.reports.summary README.md reports/<device>

writes them between the two marker lines of the file.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from . import evidence, text
from .evidence import MET, MISSED, NOT_MEASURED, Evidence, Panel, Series
from .markdown import escape

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
DTYPE = "float32"
OURS = ("soft_topk", "coordinate_descent")
"""Our operators that have a column; one with other settings, which is measured for a target, has none."""


def _cell(panels: dict[str, Panel], series: Series, shape: tuple[int, int]) -> str:
    """``forward / backward`` in microseconds."""
    figures = []
    for direction in ("forward", "backward"):
        point = panels[direction].points.get((series, shape)) if direction in panels else None
        figures.append(text.figure(point.median_us if point is not None else None))
    return " / ".join(figures)


def summary(folder: Path) -> str:
    """The tables as Markdown, with a sentence that says where it is from.

    Args:
        folder: with benchmark.json and verify.json.

    Raises:
        ValueError: a file is missing or not what its name says.
    """
    found = evidence.load(folder)
    if found.benchmark is None or found.verify is None:
        missing = "benchmark.json" if found.benchmark is None else "verify.json"
        raise ValueError(f"{folder} has no {missing}; a summary needs benchmark.json and verify.json")
    panels = {panel.direction: panel for panel in evidence.panels(found.benchmark) if panel.dtype == DTYPE}
    if "forward" not in panels:
        raise ValueError(f"{folder / 'benchmark.json'} has no {DTYPE} forward; a summary needs it")
    forward = panels["forward"]
    series = [one for one in forward.series if any(_measured(forward, one, shape) for shape in forward.shapes)]
    series = [one for one in series if not one.ours or one.op in OURS]
    head = ["rows × n", *(escape(one.label) for one in series)]
    lines = [f"| {' | '.join(head)} |", f"| :-- |{' --: |' * len(series)}"]
    for shape in forward.shapes:
        cells = [text.shape(*shape)]
        for one in series:
            cell = _cell(panels, one, shape)
            cells.append(f"**{cell}**" if one.ours else cell)
        lines.append(f"| {' | '.join(cells)} |")
    rows = found.verify["properties"]
    ran = [row for row in rows if row["verdict"] in ("pass", "fail")]
    passed = sum(row["verdict"] == "pass" for row in ran)
    versions = found.benchmark["versions"]
    said = (
        f"{escape(found.device['name'])}, {DTYPE}, device time in µs, forward / backward; {found.benchmark['date'][:10]}, torch "
        f"{escape(versions['torch'] or 'none')}, triton {escape(versions['triton'] or 'none')}. {passed} of {len(ran)} property "
        f"checks held on {text.count(sum(row['cases'] for row in rows))} rows ({found.verify['date'][:10]})."
    )
    return "\n\n".join([said, "\n".join(lines), *_targets(found)])


def _targets(found: Evidence) -> list[str]:
    """A sentence and a table with a line for each target; nothing where the file is from before there were targets."""
    rows = evidence.targets(found.benchmark)
    if not rows:
        return []
    counts = Counter(map(evidence.became, rows))
    groups: dict[str, list[evidence.Json]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    lines = ["| target | measured | |", "| :-- | :-- | :-- |"]
    for name, group in groups.items():
        shapes = ", ".join(text.shape(row["rows"], row["n"]) for row in group if row["rows"] is not None)
        work = " at ".join(part for part in (group[0]["work"], shapes) if part)
        cells = [escape(f"{name} {work}: {group[0]['target']}"), escape(_amounts(group)), _outcome(group)]
        lines.append(f"| {' | '.join(cells)} |")
    others = counts.total() - counts[MET] - counts[MISSED]
    said = f"{counts[MET]} of {text.several(counts[MET] + counts[MISSED], 'target')} met, each shape counted"
    said += f"; {others} not measured or without a limit." if others else "."
    return [said, "\n".join(lines)]


def _amounts(group: list[evidence.Json]) -> str:
    """The figures at a target's shapes: ``0.97×, 1.02×``, with the sweeps where they were counted."""
    said = []
    for row in group:
        sweeps = row["detail"].get("sweeps")
        said.append(text.amount(row["figure"], row["unit"]) + (f" ({text.several(sweeps, 'sweep')})" if sweeps else ""))
    return ", ".join(said) if any(row["figure"] is not None for row in group) else text.NOTHING


def _outcome(group: list[evidence.Json]) -> str:
    """A word for a target at all of its shapes; where they differ, a word and the shapes for each that is not met."""
    words = [evidence.became(row) for row in group]
    if len(set(words)) == 1:
        return f"**{words[0]}**" if words[0] == MISSED else words[0]
    said = []
    for word in (MISSED, NOT_MEASURED):
        where = [text.shape(row["rows"], row["n"]) for row, one in zip(group, words, strict=True) if one == word]
        said += [f"{f'**{word}**' if word == MISSED else word} at {', '.join(where)}"] if where else []
    return "; ".join(said)


def _measured(panel: Panel, series: Series, shape: tuple[int, int]) -> bool:
    point = panel.points.get((series, shape))
    return point is not None and point.median_us is not None


def updated(readme: str, folder: Path) -> str:
    """``readme`` with the table between its marker lines.

    Raises:
        ValueError: the marker lines are missing; and as :func:`summary`.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the file has no lines {BEGIN!r} and {END!r} between which to write")
    return f"{before}{BEGIN}\n{summary(folder)}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Rewrites a file in place; see the module."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m coordroute.reports.summary FILE.md FOLDER, such as: README.md reports/my-gpu\n")
        return 2
    path, folder = Path(arguments[0]), Path(arguments[1])
    try:
        path.write_text(updated(path.read_text(encoding="utf-8"), folder), encoding="utf-8", newline="\n")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"coordroute.reports.summary: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
