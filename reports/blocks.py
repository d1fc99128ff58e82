"""What a page is made of: headings, words, tables, plots, failures. page.py makes HTML of them and markdown.py Markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from . import text


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        main: what it says.
        sub: more lines, smaller.
        marks: letters of the table's notes.
        bar: a share of a budget, drawn as a bar below ``main``; above 1 the budget is exceeded.
        tone: "", "pass", "fail", "muted" or "strong".
        tip: more for those who point at it; never the only place where something is said.
    """

    main: str
    sub: str = ""
    marks: tuple[str, ...] = ()
    bar: float | None = None
    tone: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Column:
    """A column: its head, whether it holds numbers, whether it is ours, and a second line of the head."""

    head: str
    number: bool = True
    ours: bool = False
    sub: str = ""


@dataclass
class Table:
    """A table; the first cell of a row names it.

    Attributes:
        notes: (letter, text); a note without a letter is of the whole table.
        folded: it is shown when it is asked for.
        kind: "" (figures), "checks" (figures with small bars), "facets" (columns that are not narrow, after sentences), "prose"
            (sentences, which are wrapped) or "goals" (figures, and sentences in the third column).
    """

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[tuple[str, str]] = field(default_factory=list)
    folded: bool = False
    kind: str = ""


@dataclass(frozen=True)
class Heading:
    words: str
    level: int = 2
    anchor: str = ""


@dataclass(frozen=True)
class Words:
    """A paragraph. ``tone`` is "", "pass", "fail" or "missing"; ``code`` is a command that follows it."""

    words: str
    tone: str = ""
    code: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        title: what it shows.
        svg: the <svg> element.
        caption: what there is to say of it; may be empty.
        file: the name of its file without .svg; None for one that only the page has.
        on_page: whether the page has it; Markdown has those with a file.
    """

    title: str
    svg: str
    caption: str
    file: str | None
    on_page: bool = True


@dataclass(frozen=True)
class Plots:
    """Plots that stand side by side where there is room."""

    plots: list[Plot]


@dataclass(frozen=True)
class Tile:
    """A figure at a glance."""

    name: str
    value: str
    more: str
    tone: str = ""


@dataclass(frozen=True)
class Tiles:
    tiles: list[Tile]


@dataclass(frozen=True)
class Failure:
    """What does not hold: where, what was found, and code that shows it; ``folded``, all but the title when it is asked for."""

    title: str
    message: str
    code: str
    folded: bool = False
    language: str = "python"


Block = Heading | Words | Plots | Tiles | Table | Failure


@dataclass(frozen=True)
class Document:
    """A whole page.

    Attributes:
        title: of the window, and of Markdown.
        heading: of the page, below the name of the project.
        subtitle: a line of facts below it.
        verdict: the page in a sentence.
        blocks: the rest.
    """

    title: str
    heading: str
    subtitle: str
    verdict: Words
    blocks: list[Block]

    def files(self) -> dict[str, str]:
        """Name without .svg -> <svg> element, for the plots that are files."""
        shown = [plot for block in self.blocks if isinstance(block, Plots) for plot in block.plots]
        return {plot.file: plot.svg for plot in shown if plot.file is not None}


NO_ROW = "the file has no row for it"


class Notes:
    """Footnotes of a table: the same text has the same letter."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def mark(self, words: str) -> tuple[str, ...]:
        return (self.found.setdefault(words, text.letters(len(self.found))),)

    def listed(self) -> list[tuple[str, str]]:
        return [(letter, words) for words, letter in self.found.items()]


def slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "unnamed"


class Names:
    """File names from what a file says: harmless, and each only once."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def __call__(self, *parts: str) -> str:
        stem = name = "-".join(slug(part) for part in parts)[:80]
        number = 2
        while name in self.taken:
            name, number = f"{stem}-{number}", number + 1
        self.taken.add(name)
        return name
