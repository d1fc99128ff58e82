"""The tables of docs/verification.md: what the properties say and how their bounds are derived, and what the facets are.

    python -m coordroute.reference.page docs/verification.md

writes them between the marker lines of the file, from properties.py and cases.py; a test holds the page to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from .cases import KINDS
from .properties import PROPERTIES
from .verify import SENTENCES


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, (":--",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def properties_table() -> str:
    """Every property as a line of Markdown: its name, what it says, its bound, and the operators that it is for."""
    rows = (
        (one.name, one.sentence, one.bound, "all" if one.kinds == KINDS else ", ".join(f"`{kind}`" for kind in one.kinds))
        for one in PROPERTIES.values()
    )
    return _table(("property", "what it says", "bound of the error", "of"), rows)


def facets_table() -> str:
    """Every facet as a line of Markdown."""
    return _table(("facet", "what it is"), SENTENCES.items())


TABLES = {"properties": properties_table, "facets": facets_table}
"""What stands between ``<!-- name: begin -->`` and ``<!-- name: end -->``."""


def updated(page: str) -> str:
    """``page`` with today's tables between its marker lines.

    Raises:
        ValueError: a marker line is missing.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the file has no lines {begin!r} and {end!r} between which to write")
        page = f"{before}{begin}\n{table()}\n{end}{after}"
    return page


def main(arguments: list[str]) -> int:
    """Rewrites a file in place; see the module."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m coordroute.reference.page docs/verification.md\n")
        return 2
    path = Path(arguments[0])
    try:
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"coordroute.reference.page: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
