"""The short table of a README: both operators beside others, float32, from benchmark.json and verify.json alone.

    python -m coordroute.reports.summary README.md reports/<device>

writes it between the two marker lines of the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import evidence, text
from .evidence import Panel, Series
from .markdown import escape

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
DTYPE = "float32"


def _cell(panels: dict[str, Panel], series: Series, shape: tuple[int, int]) -> str:
    """``forward / backward`` in microseconds."""
    figures = []
    for direction in ("forward", "backward"):
        point = panels[direction].points.get((series, shape)) if direction in panels else None
        figures.append(text.figure(point.median_us if point is not None else None))
    return " / ".join(figures)


def summary(folder: Path) -> str:
    """The table as Markdown, with a sentence that says where it is from.

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
    return f"{said}\n\n" + "\n".join(lines)


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
