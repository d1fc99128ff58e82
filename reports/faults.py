"""Chapters on what looks at the verification itself, and beside it: mutants, false alarms, and compute-sanitizer."""

from __future__ import annotations

from collections import Counter

from . import text
from .blocks import Block, Cell, Column, Failure, Heading, Table, Words
from .evidence import MUTANT_VERDICTS, Json

# --- mutants ---------------------------------------------------------------------------------------------------------


def mutants(data: Json | None, alarms: Json | None) -> list[Block]:
    """The chapter on mutants and false alarms; nothing where there is neither file."""
    if data is None and alarms is None:
        return []
    blocks: list[Block] = [Heading("Mutants and false alarms", anchor="mutants")]
    blocks.append(
        Words(
            "How well the suite sees: a mutant is the package with one fault planted in it, and is killed where a check of the "
            "suite fails on it. A false alarm is a check that fails on the package without a fault."
        )
    )
    blocks += [] if data is None else _mutants(data)
    blocks += [] if alarms is None else _alarms(alarms)
    return blocks


def counted(data: Json) -> Counter[str]:
    """How many mutants came to which verdict."""
    return Counter(row["verdict"] for row in data["mutants"])


def unexplained(data: Json) -> list[Json]:
    """Mutants that survived, and are not known to be the same as the original."""
    return [row for row in data["mutants"] if row["verdict"] == "survived" and not row["explanation"].strip()]


def _mutants(data: Json) -> list[Block]:
    rows, counts, control = data["mutants"], counted(data), data["control"]
    ran = counts["killed"] + counts["survived"]
    said = f"{counts['killed']} of {text.several(ran, 'mutant')} killed, {counts['survived']} survived"
    said += f", {counts['not run']} not run there" if counts["not run"] else ""
    passes = control["verdict"] == "passes"
    said += f". On {data['device']}, {data['date'][:10]}, in {text.duration(data['seconds'])}; the package without a fault "
    said += f"{'passes' if passes else 'FAILS'} ({text.several(control['checks'], 'check')})."
    bad = unexplained(data)
    blocks: list[Block] = [Words(said, "fail" if bad or not passes else "pass" if ran else "missing")]
    blocks += [
        Failure(f"without a fault: {one['property']}, {one['check']}", one["counterexample"], "") for one in control["failures"]
    ]
    survived = [row for row in rows if row["verdict"] == "survived"]
    if survived:
        blocks.append(_survivors(survived))
    killers = Counter(row["property"] for row in rows if row["verdict"] == "killed")
    if killers:
        columns = [Column("property that failed first", False), Column("mutants killed")]
        made = [[Cell(name or text.NOTHING), Cell(text.count(number))] for name, number in _by_count(killers)]
        blocks.append(Table("What killed them", columns, made))
    blocks.append(_all_mutants(rows))
    return blocks


def _by_count(found: Counter[str]) -> list[tuple[str, int]]:
    return sorted(found.items(), key=lambda item: (-item[1], str(item[0])))


def _survivors(rows: list[Json]) -> Table:
    columns = [Column(head, False) for head in ("survived", "the fault", "where", "explanation")]
    made = []
    for row in sorted(rows, key=lambda row: bool(row["explanation"].strip())):
        why = row["explanation"].strip()
        made.append(
            [
                Cell(row["name"]),
                Cell(row["sentence"]),
                Cell(row["file"], row["op"]),
                Cell(why or "none: a check is missing", tone="" if why else "fail"),
            ]
        )
    return Table("Mutants that survived", columns, made, kind="prose")


def _all_mutants(rows: list[Json]) -> Table:
    columns = [Column(head, head == "seconds") for head in ("mutant", "the fault", "verdict", "counterexample", "seconds")]
    made = []
    for verdict in MUTANT_VERDICTS:
        for row in rows:
            if row["verdict"] != verdict:
                continue
            killed = verdict == "killed"
            made.append(
                [
                    Cell(row["name"], row["file"]),
                    Cell(row["sentence"], row["op"]),
                    Cell(f"killed by {row['property']}" if killed else verdict, tone="" if killed else "muted"),
                    Cell(_short(row["counterexample"] or text.NOTHING)),
                    Cell(text.figure(row["seconds"])),
                ]
            )
    return Table(f"All {text.several(len(rows), 'mutant')}", columns, made, folded=True, kind="prose")


def _short(words: str, most: int = 240) -> str:
    words = " ".join(words.split())
    return words if len(words) <= most else f"{words[: most - 1]}…"


def _alarms(data: Json) -> list[Block]:
    found = data["failures"]
    said = (
        f"{text.several(data['runs'], 'run')} without a fault, each with its own seed, {text.several(data['checks'], 'check')}: "
        f"{text.several(len(found), 'false alarm') if found else 'no false alarm'}. On {data['device']} ({data['place']}), "
        f"{data['date'][:10]}, in {text.duration(data['seconds'])}."
    )
    blocks: list[Block] = [Words(said, "fail" if found else "pass" if data["runs"] else "missing")]
    return blocks + [
        Failure(f"false alarm: {one['property']}, {one['check']}", one["counterexample"], "", folded=len(found) > 3)
        for one in found
    ]


# --- sanitizers ------------------------------------------------------------------------------------------------------

_LOOKS_FOR = {
    "memcheck": "accesses out of bounds or misaligned",
    "racecheck": "hazards in shared memory",
    "initcheck": "reads of memory that nobody has written",
    "synccheck": "barriers that not all threads reach",
}
_TONES = {"clean": "pass", "errors": "fail", "not finished": "strong"}


def sanitizers(data: Json | None) -> list[Block]:
    """The chapter on compute-sanitizer; nothing where there is no file."""
    if data is None:
        return []
    blocks: list[Block] = [Heading("Sanitizers", anchor="sanitizers")]
    version = data["versions"].get("compute-sanitizer") or "of unknown version"
    tools = data["tools"]
    clean = sum(tool["verdict"] == "clean" for tool in tools)
    said = (
        f"{clean} of {text.several(len(tools), 'tool')} clean: compute-sanitizer {version} over the launches, forward and "
        f"backward, of every configuration that serves the device, in {text.duration(data['seconds'])}. A tool is clean only "
        "where it also reported the fault that was planted for it, and where every launch ended."
    )
    if data["self_check"]:
        said = f"compute-sanitizer {version} was run on planted faults alone, on none of the kernels."
    tone = "missing" if data["self_check"] or not tools else "pass" if data["ok"] else "fail"
    blocks.append(Words(said, tone))
    columns = [Column("tool", False), Column("looks for", False), Column("planted fault", False), Column("launches")]
    columns += [Column("configurations"), Column("errors"), Column("verdict", False), Column("seconds")]
    notes, made = [], []
    for tool in tools:
        if tool["reason"]:
            notes.append(("", f"{tool['tool']}: {tool['reason']}"))
        seen = tool["sees_planted_fault"]
        made.append(
            [
                Cell(tool["tool"]),
                Cell(_LOOKS_FOR.get(tool["tool"], text.NOTHING)),
                Cell("seen" if seen else "not seen", tone="" if seen else "fail"),
                Cell(text.count(tool["launches"])),
                Cell(text.count(tool["configurations"])),
                Cell(text.count(tool["errors"]), tone="fail" if tool["errors"] else ""),
                Cell(tool["verdict"], tone=_TONES[tool["verdict"]]),
                Cell(text.figure(tool["seconds"])),
            ]
        )
    blocks.append(Table("", columns, made, notes))
    for tool in tools:
        for seen in tool["reports"]:
            title = f"{tool['tool']}: {seen['kernel'] or 'a kernel that is not named'}, {seen['group']}"
            blocks.append(Failure(title, "The report of the tool:", seen["text"], folded=True, language="text"))
    if any(tool["groups"] for tool in tools):
        blocks.append(_groups(tools))
    return blocks


def _groups(tools: list[Json]) -> Table:
    columns = [Column("tool", False), Column("launches of", False), Column("launches"), Column("configurations"), Column("errors")]
    columns += [Column("verdict", False), Column("seconds"), Column("reason", False)]
    made = [
        [
            Cell(tool["tool"]),
            Cell(group["group"]),
            Cell(f"{text.count(group['launches'])} of {text.count(group['planned'])}"),
            Cell(text.count(group["configurations"])),
            Cell(text.count(group["errors"])),
            Cell(group["verdict"]),
            Cell(text.figure(group["seconds"])),
            Cell(group["reason"] or text.NOTHING),
        ]
        for tool in tools
        for group in tool["groups"]
    ]
    return Table("Each tool on each group of launches", columns, made, folded=True)
