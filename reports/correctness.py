"""The chapter on correctness: what every property came to, on which kinds of input, how large errors are, and counterexamples."""

from __future__ import annotations

from collections import Counter

from . import evidence, plots, text
from .blocks import NO_ROW, Block, Cell, Column, Failure, Heading, Names, Notes, Plot, Plots, Table, Words
from .evidence import VERDICTS, Counterexamples, Json

BOUND = (
    "B is the bound of a row in the norm: twice the error of plain torch in the same precision on the same input, plus the running "
    "error bound of the float64 oracle, plus what storing the answer costs. u is the roundoff of the working precision. A row with "
    "a score so near a threshold that rounding decides (a kink) has no unique gradient: the bound is widened by the jump, or where "
    "that would be over a tenth of the gradient or of its terms the row is left out and counted; over a quarter of the rows fails."
)
SHOWN_FAILURES = 3
"""So many failures are shown whole; of more, only the titles until they are asked for."""

NOTHING_HERE = "·"


def chapter(verify: Json, names: Names) -> list[Block]:
    """All blocks of it but the heading."""
    rows = verify["properties"]
    if not rows:
        return [Words("verify.json has no properties: nothing was checked.", "missing")]
    blocks: list[Block] = [
        Words(
            f"Target: {evidence.target_name(verify)}. A cell is the worst row of all: how much of the error that is allowed it "
            "has. exact means that no error is allowed, and there is none. rows counts those that were compared in all dtypes, "
            "left out the share of those that were not since they lie at a kink."
        )
    ]
    if not evidence.holds(verify) and not verify["failures"] and all(row["verdict"] != "fail" for row in rows):
        blocks.append(Words("The file says that not everything held, but names no failure.", "fail"))
    groups = evidence.by_op(rows)
    blocks += [_properties(op, of) for op, of in groups.items()]
    blocks += [explained(rows), _figures(rows)]
    blocks += _facets(verify["facets"], list(dict.fromkeys(row["property"] for row in rows)))
    blocks += _errors(verify["distributions"], names)
    blocks += _failures(verify)
    return blocks


# --- properties ------------------------------------------------------------------------------------------------------


def _properties(op: str, rows: list[Json]) -> Table:
    dtypes = evidence.dtypes_of(rows)
    found = {(row["property"], row["dtype"]): row for row in rows}
    notes = Notes()
    made = []
    for name in dict.fromkeys(row["property"] for row in rows):
        of = [row for row in rows if row["property"] == name]
        compared, left_out = sum(row["cases"] for row in of), sum(row["left_out"] for row in of)
        cells = [Cell(name, tip=of[0]["sentence"])]
        cells += [property_cell(found.get((name, dtype)), notes) for dtype in dtypes]
        cells.append(Cell(text.count(compared), tone="" if compared else "muted"))
        cells.append(Cell(text.share(left_out, left_out + compared), tone="" if left_out else "muted"))
        made.append(cells)
    counts = Counter(row["verdict"] for row in rows)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    columns = [Column("property", False), *(Column(dtype, False) for dtype in dtypes), Column("rows"), Column("left out")]
    return Table(f"{op}: {said}", columns, made, notes.listed(), kind="checks")


def property_cell(row: Json | None, notes: Notes) -> Cell:
    """The verdict of one property: the worst share of its bound, FAILS, or a dash with the reason among the notes."""
    if row is None:
        return Cell(text.NOTHING, marks=notes.mark(NO_ROW), tone="muted")
    if row["verdict"] == "not run":
        return Cell(text.NOTHING, marks=notes.mark(row["reason"] or "the file gives no reason"), tone="muted")
    used = row["worst_ratio"]
    if row["verdict"] == "fail":
        # what has facets has a counterexample, which says more
        marks = () if row["failing_facets"] else notes.mark(row["reason"] or "the file gives no reason")
        return Cell("✗ FAILS", marks=marks, tone="fail")
    if row["worst_error"] == 0 and row["bound"] == 0:
        return Cell("exact", tone="pass")
    return Cell(text.NOTHING if used is None else text.percent(used), bar=used or None, tone="pass")


def explained(rows: list[Json]) -> Table:
    """What each property says, and where its bound is from."""
    columns = [Column(head, False) for head in ("property", "what it says", "bound of the error", "of")]
    ops: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        ops.setdefault((row["property"], row["sentence"], row["derivation"]), []).append(row["op"])
    made = [
        [Cell(name), Cell(sentence), Cell(derivation), Cell(", ".join(dict.fromkeys(of)), tone="muted")]
        for (name, sentence, derivation), of in ops.items()
    ]
    title = "What each property says, and how its bound is derived"
    return Table(title, columns, made, [("", BOUND)], folded=True, kind="prose")


def _figures(rows: list[Json]) -> Table:
    heads = ("operator", "property", "dtype", "rows", "left out", "worst error", "its bound", "share", "family of inputs")
    columns = [Column(head, head in heads[3:8]) for head in heads]
    made = []
    for row in rows:
        if row["verdict"] == "not run":
            continue
        failed = row["verdict"] == "fail"
        # JSON has no infinity: an error that fails and is no number is not finite
        error = "∞" if failed and row["worst_error"] is None else text.error(row["worst_error"])
        share = text.percent(row["worst_ratio"])
        made.append(
            [
                Cell(row["op"]),
                Cell(row["property"]),
                Cell(row["dtype"]),
                Cell(text.count(row["cases"])),
                Cell(text.count(row["left_out"])),
                Cell(error),
                Cell(text.error(row["bound"])),
                Cell(f"✗ {share}" if failed else share, tone="fail" if failed else ""),
                Cell(row["worst_family"] or text.NOTHING),
            ]
        )
    return Table("The figures of the worst rows", columns, made, folded=True)


# --- kinds of input --------------------------------------------------------------------------------------------------


def failing(rows: list[Json]) -> dict[str, dict[str, list[str]]]:
    """Facet -> property that fails there -> the dtypes in which it does."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        of = found.setdefault(row["facet"], {})
        for name in row["failed"]:
            of.setdefault(name, []).append(row["dtype"])
    return found


def _facets(rows: list[Json], order: list[str]) -> list[Block]:
    if not rows:
        return []
    blocks: list[Block] = [Heading("Kinds of input", 3)]
    ran = list(dict.fromkeys(row["facet"] for row in rows if row["verdict"] != "not run"))
    broken = list(dict.fromkeys(row["facet"] for row in rows if row["failed"]))
    said = "A facet is a kind of input that differs from plain input in one thing, so that a failure says what it hangs on."
    if not broken:
        blocks.append(Words(f"Nothing fails on any of {text.several(len(ran), 'facet')}. {said}", "pass"))
    else:
        blocks.append(Words(f"Something fails on {len(broken)} of {text.several(len(ran), 'facet')}. {said}", "fail"))
    for op, of in evidence.by_op(rows).items():
        if any(row["failed"] for row in of):
            blocks.append(_matrix(op, of, order))
    return [*blocks, _listed(rows)]


def _matrix(op: str, rows: list[Json], order: list[str]) -> Table:
    found, dtypes = failing(rows), evidence.dtypes_of(rows)
    names = list(dict.fromkeys(name for of in found.values() for name in of))
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    made = []
    for facet, of in found.items():
        if all(row["verdict"] == "not run" for row in rows if row["facet"] == facet):
            continue
        cells = [Cell(facet)]
        for name in names:
            some = of.get(name, [])
            sub = "" if len(some) == len(dtypes) else "\n".join(some)
            cells.append(Cell("✗", sub, tone="fail") if some else Cell(NOTHING_HERE, tone="muted"))
        made.append(cells)
    notes = [("", f"✗ in all of {', '.join(dtypes)}, or in those that are named below it.")]
    return Table(f"{op}: what fails where", [Column("facet", False), *(Column(name, False) for name in names)], made, notes)


def _listed(rows: list[Json]) -> Table:
    ops = list(evidence.by_op(rows))
    made, notes = [], Notes()
    for facet, sentence in {row["facet"]: row["sentence"] for row in rows}.items():
        cells = [Cell(facet), Cell(sentence)]
        for op in ops:
            of = [row for row in rows if (row["op"], row["facet"]) == (op, facet)]
            ran, reasons = sum(row["rows"] for row in of), dict.fromkeys(row["reason"] for row in of if row["reason"])
            marks = tuple(mark for reason in reasons for mark in notes.mark(reason))
            cells.append(Cell(text.count(ran) if ran else text.NOTHING, marks=marks, tone="" if ran else "muted"))
        made.append(cells)
    columns = [Column("facet", False), Column("what it is", False), *(Column("rows", sub=op) for op in ops)]
    return Table("What the facets are", columns, made, notes.listed(), folded=True, kind="prose")


# --- how large errors are --------------------------------------------------------------------------------------------

_QUANTITIES = {"variants": "all launches"}


def quantity_name(quantity: str) -> str:
    return _QUANTITIES.get(quantity, quantity)


def _errors(rows: list[Json], names: Names) -> list[Block]:
    if not rows:
        return []
    blocks: list[Block] = [
        Heading("Errors in ulps", 3),
        Words(
            "The error of a row in the norm, in units of the last place of the dtype: of ours, and of plain torch in the same "
            "working precision on the same input. A gradient whose terms all but cancel has few right digits in any arithmetic, so "
            "that its error in ulps has no bound: there plain torch is the measure. all launches holds the values and gradients of "
            "every launch configuration that was looked at."
        ),
    ]
    made = []
    groups = evidence.by_op(rows)
    for op, of in groups.items():
        dtypes = evidence.dtypes_of(of)
        panels = {dtype: {quantity_name(row["quantity"]): row for row in of if row["dtype"] == dtype} for dtype in dtypes}
        for dtype, panel in panels.items():
            svg = plots.ulps(op, {dtype: panel}, panels)
            made.append(Plot(f"Errors of {op} in ulps, {dtype}", svg, "", None))
        whole = plots.ulps(op, panels, panels)
        title = f"Errors of {op} in ulps, {text.listed(dtypes)}"
        made.append(Plot(title, whole, "", names("errors", op), on_page=False))
    blocks.append(Plots(made))
    return [*blocks, *(_ulps(op, of) for op, of in groups.items())]


def _ulps(op: str, rows: list[Json]) -> Table:
    figures = ("p50", "p99.9", "max")
    columns = [Column("dtype and quantity", False), Column("rows")]
    columns += [Column(figure, ours=ours, sub=whose) for ours, whose in ((True, "ours"), (False, "plain")) for figure in figures]
    order = evidence.dtypes_of(rows)
    made = []
    for row in sorted(rows, key=lambda row: order.index(row["dtype"])):
        cells = [Cell(f"{row['dtype']} {quantity_name(row['quantity'])}"), Cell(text.count(row["rows"]))]
        cells += [Cell(text.ulps(row[whose][figure])) for whose in ("ours", "plain") for figure in figures]
        made.append(cells)
    return Table(f"{op}: errors in ulps", columns, made)


# --- failures --------------------------------------------------------------------------------------------------------


def _failures(verify: Json) -> list[Block]:
    found = [failure_block(one) for one in evidence.counterexamples(verify)]
    told = {(one["op"], one["property"], one["dtype"]) for one in verify["failures"]}
    for row in verify["properties"]:
        if row["verdict"] == "fail" and (row["op"], row["property"], row["dtype"]) not in told:
            title = f"{row['op']}: {row['property']}, {row['dtype']}"
            found.append(Failure(title, row["reason"] or "the file gives no reason", ""))
    if not found:
        return []
    if len(found) > SHOWN_FAILURES:
        found = [Failure(one.title, one.message, one.code, folded=True) for one in found]
    said = (
        "The shortest counterexample to each property that fails, with code that reproduces it; the other dtypes are in the JSON."
    )
    return [Heading("Counterexamples", 3), Words(said), *found]


def failure_block(one: Counterexamples, folded: bool = False) -> Failure:
    """A counterexample as a block."""
    failure = one.failure
    error = "∞" if failure["error"] is None else text.error(failure["error"])
    title = (
        f"{failure['op']}: {failure['property']}, {', '.join(one.dtypes)}: error {error}, bound {text.error(failure['bound'])}, "
        f"{failure['facet']}, family {failure['family']}"
    )
    return Failure(title, failure["message"], failure["reproducer"], folded)
