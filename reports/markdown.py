"""A page as Markdown: the same blocks as in HTML, for a README or a review."""

from __future__ import annotations

import re

from .blocks import Cell, Document, Failure, Heading, Plots, Table, Tiles, Words
from .text import NARROW_SPACE


def escape(words: str) -> str:
    """Text that Markdown takes literally, in one line, also inside a table."""
    words = re.sub(r"[\s\x1c-\x1f\x85]+", _space, words).strip(" ")
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    words = re.sub(r"([\\`*\[\]|~$])", r"\\\1", words)
    words = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", words)
    # what would open a list or a heading
    words = re.sub(r"^(\d{1,9})([.)])(?=\s|$)", r"\1\\\2", words)
    return re.sub(r"^([-+#=]+)(?=\s|$)", r"\\\1", words)


def _space(found: re.Match[str]) -> str:
    """A plain space for any white space but the narrow one between thousands."""
    return found[0] if found[0] == NARROW_SPACE else " "


def fence(code: str, language: str) -> str:
    """A code block that nothing inside it can end."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{code}\n{ticks}"


def render(document: Document) -> str:
    """The whole page."""
    parts = [f"# {escape(document.title)}", escape(document.subtitle), f"**{escape(document.verdict.words)}**"]
    for block in document.blocks:
        match block:
            case Heading():
                parts.append(f"{'#' * block.level} {escape(block.words)}")
            case Words():
                parts.append(escape(block.words))
                if block.code:
                    parts.append(fence(block.code, "sh"))
            case Tiles():
                parts.append("\n".join(f"- {escape(t.name)}: **{escape(t.value)}** {escape(t.more)}" for t in block.tiles))
            case Plots():
                for plot in block.plots:
                    if plot.file is not None:
                        parts.append(f"![{escape(plot.title)}]({plot.file}.svg)")
                        parts += [escape(plot.caption)] if plot.caption else []
            case Table():
                parts += _table(block)
            case Failure():
                said = [escape(block.message), *([fence(block.code, block.language)] if block.code else [])]
                if block.folded:
                    parts += _folded(f"FAILED: {block.title}", said)
                else:
                    parts += [f"**FAILED: {escape(block.title)}**", *said]
    return "\n\n".join(parts) + "\n"


def _folded(title: str, parts: list[str]) -> list[str]:
    """What is shown when it is asked for. A title among tags is no Markdown: entities alone keep it literal."""
    words = re.sub(r"\s+", " ", title).strip()
    words = re.sub(r"[&<>\[\]()*_`~|$\\]", lambda found: f"&#{ord(found[0])};", words)
    return [f"<details><summary>{words}</summary>", *parts, "</details>"]


def _table(table: Table) -> list[str]:
    head = ["<br>".join(map(escape, filter(None, (column.head, column.sub)))) for column in table.columns]
    lines = [_line(head), _line(["--:" if column.number else ":--" for column in table.columns])]
    lines += [_line([_cell(cell) for cell in row]) for row in table.rows]
    parts = ["\n".join(lines)]
    notes = [f"<sup>{letter}</sup> {escape(words)}" if letter else escape(words) for letter, words in table.notes]
    parts += ["  \n".join(notes)] if notes else []
    if table.folded:
        return _folded(table.title, parts)
    return [f"**{escape(table.title)}**", *parts] if table.title else parts


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    words = escape(cell.main) or " "
    if cell.tone in ("strong", "fail"):
        words = f"**{words}**"
    marks = f"<sup>{', '.join(cell.marks)}</sup>" if cell.marks else ""
    return "<br>".join([f"{words}{marks}", *map(escape, cell.sub.splitlines())])
