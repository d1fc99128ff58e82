"""The report as a list of blocks: what was targeted, measured, tuned and verified on one device."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from . import correctness, faults, models, plots, text, tuning
from . import evidence as evidence_module
from .blocks import (
    NO_ROW,
    Block,
    Cell,
    Column,
    Document,
    Heading,
    Names,
    Notes,
    Plot,
    Plots,
    Table,
    Tile,
    Tiles,
    Words,
)
from .evidence import (
    COMMANDS,
    MET,
    MISSED,
    MORE_COMMANDS,
    NO_LIMIT,
    NOT_MEASURED,
    SOFTMAX,
    Evidence,
    Json,
    Panel,
    Point,
    Series,
    Shape,
)

# --- the whole -------------------------------------------------------------------------------------------------------


def build(evidence: Evidence) -> Document:
    """The report of some evidence."""
    names = Names()
    panels = evidence_module.panels(evidence.benchmark) if evidence.benchmark else []
    blocks: list[Block] = [Tiles(_tiles(evidence, panels)), *_files(evidence)]
    blocks += _targets(evidence)
    blocks += _benchmark(evidence.benchmark, panels, names)
    blocks += [Heading("Tuning", anchor="tuning")]
    if evidence.autotune is None:
        blocks.append(_missing("autotune", "no gain by tuning is reported"))
    else:
        blocks += tuning.chapter(evidence.autotune, names)
    blocks += tuning.quick(evidence.quick)
    blocks += tuning.upgrade(evidence.upgrades, evidence.autotune)
    blocks += tuning.landscape(evidence.exhaustive, names)
    blocks += tuning.transfer(evidence.between)
    blocks += tuning.replay(evidence.replay, names)
    blocks += _correctness(evidence, names)
    blocks += faults.mutants(evidence.mutants, evidence.false_alarms)
    blocks += faults.sanitizers(evidence.sanitize)
    blocks += models.chapter(evidence.training, evidence.colt5)
    blocks += _method(evidence)
    device = evidence.device
    kind = "CPU" if _is_cpu(evidence) else "GPU"
    units = "logical cores" if kind == "CPU" else "multiprocessors"
    capability = device["capability"] if kind == "CPU" else f"capability {device['capability']}"
    facts = [f"{device['sm_count']} {units}", capability, text.memory(device["memory_bytes"])]
    return Document(f"coordroute on {device['name']}", device["name"], " · ".join(facts), _verdict(evidence, panels), blocks)


def _is_cpu(evidence: Evidence) -> bool:
    """A GPU's capability has the form 9.0 or gfx942; a CPU's is a machine name."""
    return not re.fullmatch(r"\d+\.\d+|gfx\w+", evidence.device["capability"])


def _counts(verify: Json) -> Counter[str]:
    return Counter(row["verdict"] for row in verify["properties"])


def _verdict(evidence: Evidence, panels: list[Panel]) -> Words:
    """One sentence: did everything hold, what was tuned, how fast it is."""
    parts = []
    tone = "missing"
    if evidence.verify is None:
        parts.append("Whether the kernels are right was not checked here")
    else:
        counts = _counts(evidence.verify)
        ran = counts["pass"] + counts["fail"]
        whose = "" if evidence.verify["target"] == "coordroute" else f" of {evidence_module.target_name(evidence.verify)}"
        if not evidence_module.holds(evidence.verify):
            tone = "fail"
            failed = f"{counts['fail']} of {text.several(ran, 'property check')}{whose} failed"
            parts.append(failed if counts["fail"] else f"Verification{whose} did not succeed, by the word of its file")
        elif not ran:
            parts.append(f"No property{whose} was checked")
        else:
            tone = "pass"
            checks = f"All {ran} property checks" if ran != 1 else "The one property check"
            parts.append(f"{checks}{whose} held" + (f" ({counts['not run']} more were not run)" if counts["not run"] else ""))
    if evidence.autotune is None:
        parts.append("nothing is said of tuning")
    else:
        keys = evidence.autotune["keys"]
        tuned, gain = sum(map(evidence_module.is_tuned, keys)), evidence.autotune["geometric_mean_gain"]
        said = f"{text.several(tuned, 'key')} {'is' if tuned == 1 else 'are'} tuned"
        if gain is not None and tuned:
            said += f", {text.times(gain)} as fast as by default in the geometric mean"
            # the default itself may have become better since
            again = evidence.upgrades.get("upgrade")
            if again is not None and (since := again["geometric_mean_gain"]) is not None:
                said += f" ({text.times(since)} when they were proved anew)"
        parts.append(said)
    measured = [(panel, panel.ratios(Series("soft_topk", "coordroute"))) for panel in panels]
    panel, ratios = next(((p, r) for p, r in measured if r), (None, []))
    if evidence.benchmark is None:
        parts.append("nothing is said of speed")
    elif panel is None:
        parts.append("soft_topk was not measured beside torch.softmax")
    else:
        parts.append(f"soft_topk {panel.direction} in {panel.dtype} takes {text.span(ratios)} the time of torch.softmax")
    counts = Counter(map(evidence_module.became, evidence_module.targets(evidence.benchmark)))
    if counts[MET] + counts[MISSED]:
        parts.append(f"{counts[MET]} of {text.several(counts[MET] + counts[MISSED], 'target')} met")
    if evidence.mutants is not None:
        found = faults.counted(evidence.mutants)
        parts.append(f"{found['killed']} of {text.several(found['killed'] + found['survived'], 'mutant')} killed")
    if evidence.sanitize is not None and not evidence.sanitize["self_check"]:
        clean = sum(tool["verdict"] == "clean" for tool in evidence.sanitize["tools"])
        parts.append(f"{clean} of {text.several(len(evidence.sanitize['tools']), 'sanitizer')} clean")
        tone = tone if evidence.sanitize["ok"] else "fail"
    return Words("; ".join(parts) + ".", tone)


def _tiles(evidence: Evidence, panels: list[Panel]) -> list[Tile]:
    tiles = []
    if evidence.verify is None:
        tiles.append(Tile("verified", text.NOTHING, "verify.json is missing", "missing"))
    else:
        counts, rows = _counts(evidence.verify), evidence.verify["properties"]
        ran, cases = counts["pass"] + counts["fail"], sum(row["cases"] for row in rows)
        left_out = sum(row["left_out"] for row in rows)
        more = f"property checks held; {text.count(cases)} rows checked, {text.count(left_out)} left out"
        tone = ("pass" if ran else "missing") if evidence_module.holds(evidence.verify) else "fail"
        tiles.append(Tile("verified", f"{counts['pass']} of {ran}", more, tone))
    if evidence.autotune is None:
        tiles.append(Tile("tuned", text.NOTHING, "autotune.json is missing", "missing"))
    else:
        keys = evidence.autotune["keys"]
        tuned, gain = sum(map(evidence_module.is_tuned, keys)), evidence.autotune["geometric_mean_gain"]
        faster = sum(evidence_module.is_tuned(key) and not evidence_module.kept_default(key) for key in keys)
        more = f"geometric mean gain over the default; {faster} of {text.several(tuned, 'tuned key')} changed"
        tiles.append(Tile("tuned", text.times(gain), more, "" if tuned else "missing"))
    if evidence.benchmark is None:
        tiles.append(Tile("time", text.NOTHING, "benchmark.json is missing", "missing"))
    for op in ("soft_topk", "coordinate_descent"):
        seen = set()
        for panel in panels:
            ratios = panel.ratios(Series(op, "coordroute"))
            if not ratios or panel.direction in seen:  # the first dtype stands for the others
                continue
            seen.add(panel.direction)
            more = f"the time of torch.softmax, {panel.dtype}, {text.several(len(ratios), 'shape')}"
            tiles.append(Tile(f"{op} {panel.direction}", text.span(ratios), more))
    return tiles


def _missing(command: str, what: str) -> Words:
    return Words(f"{command}.json was not among the evidence: {what}. This makes it:", "missing", COMMANDS[command])


def _files(evidence: Evidence) -> list[Block]:
    files = evidence.files()
    versions = list(dict.fromkeys(name for data in files.values() for name in data["versions"]))
    columns = [Column("evidence", False), Column("date", False), Column("took"), *(Column(name, False) for name in versions)]
    columns.append(Column("driver", False))
    rows = []
    for command in (*COMMANDS, *evidence_module.MORE_OF_DEVICE):
        if command not in files:
            if command not in COMMANDS:
                continue
            rows.append(
                [Cell(f"{command}.json"), Cell("missing", tone="muted"), *[Cell(text.NOTHING, tone="muted")] * (len(versions) + 2)]
            )
            continue
        data = files[command]
        said = [Cell(data["versions"].get(name) or "none") for name in versions]
        date = data["date"].replace("T", " ").replace("+00:00", " UTC")
        rows.append(
            [Cell(f"{command}.json"), Cell(date), Cell(text.duration(data.get("seconds"))), *said, Cell(data["device"]["driver"])]
        )
    notes = []
    for name, more in (("mutants", evidence.mutants), ("false-alarms", evidence.false_alarms)):
        if more is not None:
            said = [Cell(more["versions"].get(one) or text.NOTHING) for one in versions]
            rows.append([Cell(f"{name}.json"), Cell(more["date"]), Cell(text.duration(more["seconds"])), *said, Cell(text.NOTHING)])
    # a tool that one file alone needs makes no difference
    made_with = [{data["versions"].get(name) for data in files.values()} - {None} for name in versions]
    if any(len(found) > 1 for found in made_with):
        notes.append(("", "The files were made with different versions: their figures are not of one and the same code."))
    return [Table("", columns, rows, notes)]


# --- targets ---------------------------------------------------------------------------------------------------------

_TONES = {MET: "pass", MISSED: "fail", NOT_MEASURED: "muted", NO_LIMIT: "muted"}
_SIGNS = {MET: "✓ ", MISSED: "✗ "}


def _targets(evidence: Evidence) -> list[Block]:
    """Nothing where the file is from before there were targets."""
    found = evidence_module.targets(evidence.benchmark)
    if evidence.benchmark is None or not found:
        return []
    counts = Counter(map(evidence_module.became, found))
    judged = counts[MET] + counts[MISSED]
    said = f"{counts[MET]} of {text.several(judged, 'target')} met, {counts[MISSED]} missed" if judged else "No target was judged"
    for word, sentence in ((NOT_MEASURED, "not measured"), (NO_LIMIT, "reported without a limit")):
        said += f", {counts[word]} {sentence}" if counts[word] else ""
    tone = "fail" if counts[MISSED] else "pass" if judged else "missing"
    blocks: list[Block] = [Heading("Targets", anchor="targets"), Words(f"{said}; each shape counts.", tone)]
    where = (
        "" if "H100" in evidence.device["name"] or _is_cpu(evidence) else " The targets were set for an H100, which this is not."
    )
    blocks.append(
        Words(
            "A figure is a ratio of two medians of this run, with the two times below it, or a count. float32 decides; the same "
            f"figure in bfloat16 stands beside it without a verdict.{where}"
        )
    )
    notes = Notes()
    rows = []
    for row in found:
        word = evidence_module.became(row)
        shape = text.NOTHING if row["rows"] is None else text.shape(row["rows"], row["n"])
        marks = notes.mark(row["reason"]) if row["reason"] and word == NOT_MEASURED else ()
        rows.append(
            [
                Cell(f"{row['id']} {row['work']}"),
                Cell(shape),
                Cell(row["target"]),
                Cell(
                    text.amount(row["figure"], row["unit"]),
                    _behind(row),
                    tone="muted" if row["figure"] is None else "strong",
                ),
                Cell(text.amount(row["bfloat16"], row["unit"]), tone="muted"),
                Cell(f"{_SIGNS.get(word, '')}{word}", marks=marks, tone=_TONES[word]),
            ]
        )
    listed = notes.listed()
    cpu = evidence.benchmark.get("cpu")
    if isinstance(cpu, dict):
        listed.append(("", f"The CPU is {cpu['device']['name']}, with {text.several(cpu['threads'], 'thread')}."))
    columns = [Column("work", False), Column("rows × n"), Column("target", False), Column("float32"), Column("bfloat16")]
    return [*blocks, Table("", [*columns, Column("verdict", False)], rows, listed, kind="goals")]


def _behind(row: Json) -> str:
    """What stands behind a target's figure: times, sweeps."""
    lines, detail = [], row["detail"]
    above, below = detail.get("numerator_us"), detail.get("denominator_us")
    if above is not None and below is not None:
        lines.append(f"{text.figure(above)} / {text.figure(below)} µs")
    if detail.get("sweeps"):
        lines.append(text.several(detail["sweeps"], "sweep"))
    if detail.get("floats_a_row") is not None and row["unit"] != "floats a row":
        lines.append(f"{text.figure(detail['floats_a_row'])} floats a row")
    return "\n".join(lines)


# --- benchmark -------------------------------------------------------------------------------------------------------


def _benchmark(benchmark: Json | None, panels: list[Panel], names: Names) -> list[Block]:
    blocks: list[Block] = [Heading("Speed", anchor="speed")]
    if benchmark is None:
        return [*blocks, _missing("benchmark", "no time is reported")]
    if not panels:
        return [*blocks, Words("benchmark.json has no results.", "missing")]
    how = plots.looks(evidence_module.all_series(benchmark))
    blocks.append(
        Words(
            "Each marker is a median time divided by the median of torch.softmax on the same shape, dtype and direction in the "
            "same run, on a logarithmic axis: left of the line is faster than torch.softmax. A horizontal bar is the 95 % interval "
            "of the median; where none is seen it is narrower than the marker. The grey band is torch.softmax's own interval. "
            "Backward is the backward alone."
        )
    )
    for dtype in dict.fromkeys(panel.dtype for panel in panels):
        of_dtype = [panel for panel in panels if panel.dtype == dtype]
        blocks.append(Heading(dtype, 3))
        made = []
        for panel in of_dtype:
            svg = plots.speed([panel], how, of_dtype)
            if svg is None:
                said = f"{dtype} {panel.direction} has no plot: nothing was measured that could be compared with torch.softmax."
                blocks.append(Words(said, "missing"))
            else:
                made.append(Plot(_speed_title([panel]), svg, _compared(panel), None))
        # a page sets them one below the other where it is narrow; a file has them side by side
        both = plots.speed(of_dtype, how, of_dtype)
        if both is not None:
            name = names("speed") if dtype == panels[0].dtype else names("speed", dtype)
            made.append(
                Plot(_speed_title(of_dtype), both, " ".join(plot.caption for plot in made if plot.caption), name, on_page=False)
            )
            blocks.append(Plots(made))
        blocks += [_times_table(panel) for panel in of_dtype]
    return blocks


def _speed_title(panels: list[Panel]) -> str:
    return f"Time relative to torch.softmax, {panels[0].dtype}, {text.listed([panel.direction for panel in panels])}"


def _compared(panel: Panel) -> str:
    """What ours are against others that compute the same, in words."""
    said = []
    for ours in panel.series:
        if not ours.ours:
            continue
        for other in panel.series:
            ratios = panel.against(other, ours) if other.op == ours.op and not other.ours else []
            if ratios:
                where = text.several(len(ratios), "shape")
                said.append(f"{other.label} takes {text.span(ratios)} the time of {ours.label} ({where})")
    return f"{panel.dtype} {panel.direction}: {'; '.join(said)}." if said else ""


def _times_table(panel: Panel) -> Table:
    notes = Notes()
    whole: list[tuple[str, str]] = []
    columns, shown = [Column("rows × n", False)], []
    for series in panel.series:
        points = {shape: panel.points.get((series, shape)) for shape in panel.shapes}
        if all(point is None or point.median_us is None for point in points.values()):
            whole.append(("", f"{series.label} has no column: {_why_none(points)}."))
            continue
        shown.append(series)
        columns.append(Column(series.label, ours=series.ours))
    rows = []
    for shape in panel.shapes:
        row = [Cell(text.shape(*shape))]
        row += [_time_cell(panel.points.get((series, shape)), series, notes) for series in shown]
        rows.append(row)
    title = f"{panel.dtype} {panel.direction}: median µs, and × torch.softmax"
    if shown and not panel.ratios(SOFTMAX):
        whole.append(("", "torch.softmax has no figure here, so that there are no ratios to it."))
    return Table(title, columns, rows, notes.listed() + whole)


def _why_none(points: dict[Shape, Point | None]) -> str:
    """The reasons for which an implementation has no figure at all, and where they hold unless that is everywhere."""
    reasons: dict[str, list[str]] = {}
    for shape, point in points.items():
        reasons.setdefault(NO_ROW if point is None else point.reason, []).append(text.shape(*shape))
    if len(reasons) == 1:
        return next(iter(reasons))
    return "; ".join(f"{reason} ({', '.join(shapes)})" for reason, shapes in reasons.items())


def _time_cell(point: Point | None, series: Series, notes: Notes) -> Cell:
    if point is None:
        return Cell(text.NOTHING, marks=notes.mark(NO_ROW), tone="muted")
    marks = notes.mark(point.reason) if point.reason else ()
    if point.median_us is None:
        return Cell(text.NOTHING, marks=marks, tone="muted")
    ci = point.ci_us
    tip = "" if ci is None else f"95 % interval {text.figure(ci[0])} to {text.figure(ci[1])} µs"
    sub = text.times(point.ratio) if point.ratio is not None else "no ratio"
    return Cell(text.figure(point.median_us), sub, marks, tip=tip, tone="strong" if series.ours else "")


# --- verify ----------------------------------------------------------------------------------------------------------


def _correctness(evidence: Evidence, names: Names) -> list[Block]:
    blocks: list[Block] = [Heading("Correctness", anchor="correctness")]
    if evidence.verify is None:
        return [*blocks, _missing("verify", "no property was checked")]
    blocks += correctness.chapter(evidence.verify, names)
    lacking = [name for name, data in _more(evidence).items() if data is None]
    if _is_cpu(evidence):
        lacking = [name for name in lacking if name != "sanitize"]
    if lacking:
        which = text.listed([f"{name}.json" for name in lacking])
        said = f"{which} {'was' if len(lacking) == 1 else 'were'} not among the evidence, which can do without. This makes it:"
        code = "\n".join(MORE_COMMANDS[name].replace("cuda", "cpu" if _is_cpu(evidence) else "cuda") for name in lacking)
        blocks.append(Words(said, code=code))
    return blocks


def _more(evidence: Evidence) -> dict[str, Json | None]:
    return {"sanitize": evidence.sanitize, "mutants": evidence.mutants, "false-alarms": evidence.false_alarms}


# --- method ----------------------------------------------------------------------------------------------------------


def _method(evidence: Evidence) -> list[Block]:
    blocks: list[Block] = [Heading("How it was measured", anchor="method")]
    rows: list[list[Cell]] = []

    def say(name: str, value: Any) -> None:
        rows.append([Cell(name), Cell(value if isinstance(value, str) else text.NOTHING if value is None else str(value))])

    if evidence.benchmark is not None:
        results = evidence.benchmark["results"]
        say("benchmark: method", evidence.benchmark["method"])
        for name, value in evidence.benchmark["settings"].items():
            say(f"benchmark: {name}", value)
        for line in _templates([row["method"] for row in results if row["method"]]):
            say("benchmark: one measurement", line)
        say("benchmark: samples", _range([row["samples"] for row in results if row["median_us"] is not None]))
    if evidence.autotune is not None:
        timings = [key["timing"] for key in evidence.autotune["keys"] if key["timing"] is not None]
        say("autotune: effort", evidence.autotune["effort"])
        say("autotune: file", evidence.autotune["file"])
        for name, what in (("groups", "groups of keys"), ("workers", "processes that compile and verify"), ("gpus", "GPUs")):
            if evidence.autotune.get(name) is not None:
                say(f"autotune: {what}", evidence.autotune[name])
        say("autotune: keys taken over from an interrupted run", evidence.autotune["resumed"])
        if evidence.autotune["resumed"] and evidence.autotune.get("seconds_before") is not None:
            say("autotune: how long that run took", text.duration(evidence.autotune["seconds_before"]))
        if evidence.autotune.get("launches") is not None:
            say("autotune: timed samples", text.count(evidence.autotune["launches"]))
        phases = evidence.autotune.get("phases") or {}
        for phase, spent in phases.items():
            say(f"autotune: {phase}", text.duration(spent))
        for kind, one in (evidence.autotune.get("requests") or {}).items():
            about = f" ({one['longest_about']})" if one["longest_about"] else ""
            cost = f"{text.duration(one['seconds'])} in all, the longest {text.duration(one['longest'])}{about}"
            say(f"autotune: {kind}, by all processes", f"{text.several(one['requests'], 'request')}, {cost}")
        lookup = evidence.autotune.get("lookup")
        if lookup is not None:
            say("autotune: a lookup that was made before", f"{text.count(lookup['lookup_ns'])} ns at the median")
            if lookup["import_ms"] is not None:
                say("autotune: what `import coordroute` adds to importing torch", f"{lookup['import_ms']:.1f} ms")
        for line in _templates([timing["method"] for timing in timings if timing["method"]]):
            say("autotune: one measurement", line)
        say("autotune: samples", _range([timing["samples"] for timing in timings]))
    if evidence.exhaustive is not None:
        say("exhaustive: method", evidence.exhaustive["method"])
        say("exhaustive: rounds", evidence.exhaustive["rounds"])
    if evidence.verify is not None:
        say("verify: target", f"{evidence.verify['target']} ({evidence.verify['target_version'] or 'of unknown version'})")
        say("verify: seed", evidence.verify["seed"])
        say("verify: rows drawn for each operator and dtype, beside those of each facet", evidence.verify["examples"])
    return [*blocks, Table("", [Column("setting", False), Column("value", False)], rows, kind="prose")]


def _range(values: list[int]) -> str:
    if not values:
        return text.NOTHING
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _templates(lines: list[str]) -> list[str]:
    """Sentences that differ in their whole numbers only, as one with the ranges: ``around 1 to 53 call(s)``."""
    number = re.compile(r"(?<![\d.])\d{1,15}(?![\d.])")
    groups: dict[str, list[list[int]]] = {}
    for line in lines:
        groups.setdefault(number.sub("\0", line), []).append([int(found) for found in number.findall(line)])
    made = []
    for template, found in groups.items():
        ranges = [_range(list(column)) for column in zip(*found, strict=True)]
        parts = template.split("\0")
        said = parts[0] + "".join(one + part for one, part in zip(ranges, parts[1:], strict=True)) if ranges else template
        made.append(f"{said} ({text.several(len(found), 'measurement')})")
    return made
