"""The page on which implementations stand side by side: property by property and facet by facet, from several files of verify."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from . import evidence, text
from .blocks import Block, Cell, Column, Document, Heading, Notes, Table, Words
from .correctness import explained, failing, failure_block
from .evidence import Json

NAME = "comparison"
"""Of the files, without .html and .md."""


@dataclass(frozen=True)
class Implementation:
    """One operator of one file.

    Attributes:
        label: whose it is, and of which version.
        op: what it computes.
        file: the name of the file.
        verify: its content.
        rows: its properties.
        facets: its facets.
    """

    label: str
    op: str
    file: str
    verify: Json
    rows: list[Json]
    facets: list[Json]

    @property
    def ours(self) -> bool:
        return bool(self.verify["target"] == "coordroute")

    def counts(self) -> Counter[str]:
        return Counter(row["verdict"] for row in self.rows)


def implementations(files: dict[str, Json]) -> list[Implementation]:
    """Every operator of every file, ours first; what has the same name is told apart by its file."""
    names = Counter(evidence.target_name(verify) for verify in files.values())
    found = []
    for file, verify in files.items():
        name = evidence.target_name(verify)
        label = name if names[name] == 1 else f"{name}, {file}"
        for op, rows in evidence.by_op(verify["properties"]).items():
            facets = [row for row in verify["facets"] if row["op"] == op]
            found.append(Implementation(label, op, file, verify, rows, facets))
    return sorted(found, key=lambda one: not one.ours)


def build(files: dict[str, Json]) -> Document:
    """The page.

    Args:
        files: file name -> what verify wrote.
    """
    shown = implementations(files)
    title = "Implementations side by side"
    devices = list(dict.fromkeys(verify["device"]["name"] for verify in files.values()))
    blocks: list[Block] = [_legend(shown, devices)]
    if shown:
        blocks += [Heading("Properties", anchor="properties"), *_properties(shown)]
        blocks += [Heading("Kinds of input", anchor="facets"), *_facets(shown)]
        blocks += _failures(shown)
    return Document(f"coordroute: {title.lower()}", title, f"verified on {text.listed(devices)}", _verdict(shown), blocks)


def _verdict(shown: list[Implementation]) -> Words:
    said, failed = [], False
    for one in shown:
        counts = one.counts()
        ran = counts["pass"] + counts["fail"]
        checks = text.several(ran, "property check")
        failed = failed or bool(counts["fail"])
        what = (
            f"{counts['fail']} of {checks} failed" if counts["fail"] else f"all of {checks} held" if ran else "nothing was checked"
        )
        said.append(f"{one.label} {one.op}: {what}")
    # that another's fails is what the page is for: no alarm
    return Words(f"{'; '.join(said) or 'Nothing was checked'}.", "" if failed else "pass")


def _legend(shown: list[Implementation], devices: list[str]) -> Table:
    columns = [Column(head, False) for head in ("implementation", "computes", "device", "date")]
    columns += [Column("rows"), Column("checks that held"), Column("evidence", False)]
    made = []
    for one in shown:
        verify, counts = one.verify, one.counts()
        versions = ", ".join(f"{name} {verify['versions'].get(name) or 'none'}" for name in ("torch", "triton"))
        made.append(
            [
                Cell(one.label, "" if one.ours else verify["target"], tone="strong" if one.ours else ""),
                Cell(one.op),
                Cell(verify["device"]["name"], versions),
                Cell(verify["date"][:10]),
                Cell(text.count(sum(row["rows"] for row in one.facets))),
                Cell(f"{counts['pass']} of {counts['pass'] + counts['fail']}", tone="fail" if counts["fail"] else ""),
                Cell(one.file),
            ]
        )
    notes = []
    if len({(one.verify["seed"], one.verify["examples"]) for one in shown}) > 1:
        notes.append(("", "The files were made with different seeds or numbers of examples: not all saw the same rows."))
    if len(devices) > 1:
        notes.append(("", "The files are of different devices."))
    if any(one.op == "relaxed_topk" for one in shown):
        notes.append(("", "A relaxed_topk maximises another objective than ours: it is judged by its own run in float64."))
    return Table("", columns, made, notes)


def _columns(first: str, shown: list[Implementation]) -> list[Column]:
    return [Column(first, False), *(Column(one.label, False, one.ours, one.op) for one in shown)]


# --- properties ------------------------------------------------------------------------------------------------------


def _properties(shown: list[Implementation]) -> list[Block]:
    names = _in_order([[row["property"] for row in one.rows] for one in shown])
    notes = Notes()
    made = []
    for name in names:
        cells = [Cell(name)]
        cells += [_cell([row for row in one.rows if row["property"] == name], notes) for one in shown]
        made.append(cells)
    said = (
        "A cell is the worst row in any dtype: how much of the error that is allowed it has. exact means that no error is allowed, "
        "and there is none. Where dtypes differ in their verdict each is named. A dash alone: the property is not one of such an "
        "operator."
    )
    everything = [row for one in shown for row in one.rows]
    return [Words(said), Table("", _columns("property", shown), made, notes.listed(), kind="checks"), explained(everything)]


def _in_order(lists: list[list[str]]) -> list[str]:
    """All names, in the order of the list that has most of them; what that one lacks comes last."""
    distinct = [list(dict.fromkeys(names)) for names in lists]
    return list(dict.fromkeys(name for names in sorted(distinct, key=len, reverse=True) for name in names))


def _share(row: Json) -> str:
    if row["verdict"] == "not run":
        return "not run"
    if row["verdict"] == "fail":
        return "✗"
    if row["worst_error"] == 0 and row["bound"] == 0:
        return "exact"
    return text.NOTHING if row["worst_ratio"] is None else text.percent(row["worst_ratio"])


def _cell(rows: list[Json], notes: Notes) -> Cell:
    if not rows:
        return Cell(text.NOTHING, tone="muted")
    ran = [row for row in rows if row["verdict"] != "not run"]
    if not ran:
        reasons = dict.fromkeys(row["reason"] or "the file gives no reason" for row in rows)
        return Cell(text.NOTHING, marks=tuple(mark for reason in reasons for mark in notes.mark(reason)), tone="muted")
    if any(row["verdict"] == "fail" for row in ran):
        whole = all(row["verdict"] == "fail" for row in ran)
        order = evidence.dtypes_of(ran)
        detail = [f"{row['dtype']} {_share(row)}" for row in sorted(ran, key=lambda row: order.index(row["dtype"]))]
        return Cell("✗ FAILS", "" if whole else "\n".join(detail), tone="fail")
    ratios = [row["worst_ratio"] for row in ran if row["worst_ratio"] is not None]
    if all(_share(row) == "exact" for row in ran):
        return Cell("exact", tone="pass")
    worst = max(ratios, default=None)
    return Cell(text.NOTHING if worst is None else text.percent(worst), bar=worst or None, tone="pass")


# --- kinds of input --------------------------------------------------------------------------------------------------


def _facets(shown: list[Implementation]) -> list[Block]:
    sentences = {row["facet"]: row["sentence"] for one in shown for row in one.facets}
    if not sentences:
        return [Words("The files have no facets.", "missing")]
    notes = Notes()
    order = _in_order([[row["facet"] for row in one.facets] for one in shown])
    made = [[Cell(facet, sentences[facet]), *(_facet_cell(facet, one, notes) for one in shown)] for facet in order]
    said = "On which kinds of input an implementation holds, or the properties that fail there, and in which dtypes if not in all."
    return [Words(said), Table("", _columns("facet", shown), made, notes.listed(), kind="facets")]


def _facet_cell(facet: str, one: Implementation, notes: Notes) -> Cell:
    rows = [row for row in one.facets if row["facet"] == facet]
    if not rows:
        return Cell(text.NOTHING, tone="muted")
    found = failing(rows)[facet]
    if found:
        every = evidence.dtypes_of(one.facets)
        lines = [name if len(dtypes) == len(every) else f"{name} ({', '.join(dtypes)})" for name, dtypes in found.items()]
        return Cell("✗ fails", "\n".join(lines), tone="fail")
    if all(row["verdict"] == "not run" for row in rows):
        reasons = dict.fromkeys(row["reason"] or "the file gives no reason" for row in rows)
        return Cell(text.NOTHING, marks=tuple(mark for reason in reasons for mark in notes.mark(reason)), tone="muted")
    return Cell("holds", tone="pass")


# --- failures --------------------------------------------------------------------------------------------------------


def _failures(shown: list[Implementation]) -> list[Block]:
    blocks: list[Block] = []
    for one in shown:
        found = [block for block in evidence.counterexamples(one.verify) if block.failure["op"] == one.op]
        if found:
            blocks.append(Heading(f"{one.label}, {one.op}", 3))
            blocks += [failure_block(counterexample, folded=True) for counterexample in found]
    if not blocks:
        return []
    said = "The shortest counterexample to each property that fails, with code that reproduces it where the package is installed."
    return [Heading("Counterexamples", anchor="counterexamples"), Words(said), *blocks]
