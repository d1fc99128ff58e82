"""Chapters on the autotuner: what it chose, how all candidates lie, and what its search finds of that."""

from __future__ import annotations

import statistics
from collections import Counter

from . import evidence as evidence_module
from . import plots, text
from .blocks import Block, Cell, Column, Heading, Names, Plot, Plots, Table, Words
from .candidates import NEAR, QUICK_GOAL, TRANSFER_GOAL, UPGRADE_GOAL, Goal, Landscape, fewer, goals, landscapes, quantile, spread
from .evidence import Json, KeyGroup

# --- what was chosen -------------------------------------------------------------------------------------------------

_STATUS = {
    "timed": "timed, and nothing was found against it",
    "slower": "right, but not among the fastest of the screening",
    "slower between": "faster than the default at its key, and slower by more between this key and the next",
    "wrong": "failed the check against float64",
    "spills": "spills registers",
    "does not compile": "does not compile",
    "crashes": "crashed",
    "hangs": "did not end",
    "out of time": "no time was left to verify it",
}


def chapter(autotune: Json, names: Names) -> list[Block]:
    """What was tuned: gains, configurations, and what became of the candidates; without a heading."""
    blocks: list[Block] = []
    groups = evidence_module.key_groups(autotune)
    if not groups:
        blocks.append(Words("No key was finished.", "missing"))
    else:
        blocks.append(
            Words(
                "A key is one operator, direction, dtype and bucket of shapes. What is taken was verified before the race that is "
                "told here; another than the default is taken only where the paired 95 % interval of its time over the default's "
                "lies below 1. The thin bar is the 95 % interval of the tuned median."
            )
        )
    made = []
    for group in groups:
        svg = plots.gains(group)
        if svg is not None:
            gains = [key["gain"] for key in group.keys if evidence_module.is_tuned(key) and key["gain"] is not None]
            kept = sum(map(evidence_module.kept_default, group.keys))
            caption = (
                f"{group.op} {group.direction}: gains of {text.span(gains)}; the default was kept in {kept} of {len(group.keys)}."
            )
            title = f"Default and tuned time, {group.op} {group.direction}"
            made.append(Plot(title, svg, caption, names("gain", group.op, group.direction)))
    if made:
        blocks.append(Plots(made))
    blocks += _distinct(autotune)
    made = []
    for group in groups:
        svg = plots.configurations(group)
        if svg is not None:
            title = f"Tuned configuration by shape, {group.op} {group.direction}"
            made.append(Plot(title, svg, "", names("configurations", group.op, group.direction)))
    if made:
        blocks.append(Plots(made))
    blocks += [_keys_table(group) for group in groups]
    blocks += _discarded(autotune)
    return blocks


_UNITS = (
    ("block", "block {}", 0),
    ("rows_per_program", "{} rows", None),
    ("num_warps", "{} warps", 0),
    ("num_stages", "{} stages", 0),
    ("checkpoint_segments", "{} segments", None),
    ("num_threads", "{} threads", 0),
    ("programs_per_row", "{} programs a row", 1),
    ("max_registers", "at most {} registers", 0),
)


def configuration(config: Json) -> str:
    """A launch configuration in a line: ``resident, block 8192, 1 row, 8 warps, 1 stage, 20 segments``."""
    parts = [str(config["variant"])] if "variant" in config else []
    for name, form, unused in _UNITS:
        value = config.get(name)
        if value is None or (unused is not None and value == unused):
            continue
        part = form.format(value)
        parts.append(part.removesuffix("s") if value == 1 else part)
    known = {"variant", *(name for name, _, _ in _UNITS)}
    parts += [f"{name} {value}" for name, value in config.items() if name not in known]
    return ", ".join(parts) or "empty"


def _distinct(autotune: Json) -> list[Block]:
    """How many configurations there are, which is what has to be compiled and trusted."""
    found = evidence_module.configurations(autotune)
    if not found:
        return []
    columns = [Column("operator", False), Column("tuned keys"), Column("distinct configurations")]
    columns += [Column("distinct", sub="whatever the length"), Column("the most frequent", False), Column("its keys")]
    rows = []
    for op, configs in found.items():
        row = [Cell(op), Cell(text.count(sum(one["keys"] for one in configs))), Cell(text.count(len(configs)), tone="strong")]
        row += [Cell(text.count(len({evidence_module.form(one["config"]) for one in configs})), tone="strong")]
        rows.append([*row, Cell(configuration(configs[0]["config"])), Cell(text.count(configs[0]["keys"]))])
    note = (
        "Whatever the length: a resident row's block is its length, and its warps are counted by the scores a thread; one warp "
        "that has several short rows counts as one that has a row of as many scores in all; of rows that are shared, the programs "
        "a row are left out."
    )
    return [Table("Distinct configurations", columns, rows, [("", note)]), *_fewer(autotune)]


def _fewer(autotune: Json) -> list[Block]:
    """What it would cost to have fewer of them; nothing where the file does not say what was timed."""
    columns = [Column("operator", False), Column("configurations", sub="whatever the length")]
    columns += [Column("slower", sub="median key"), Column("slower", sub="p95"), Column("slower", sub="worst")]
    rows = []
    for op in dict.fromkeys(key["key"]["op"] for key in autotune["keys"]):
        for one in fewer([key for key in autotune["keys"] if key["key"]["op"] == op]):
            rows.append([Cell(op), Cell(text.count(one.forms)), *(Cell(text.fine(cost)) for cost in one[1:])])
    if not rows:
        return []
    note = (
        "Than the fastest candidate of each key, by the medians of the search. The configurations are chosen one after the other "
        "by what each saves, among all that were timed."
    )
    return [Table("What fewer configurations would cost", columns, rows, [("", note)])]


def _keys_table(group: KeyGroup) -> Table:
    columns = [Column("key", False), Column("default µs"), Column("tuned µs"), Column("95 % interval"), Column("gain")]
    columns += [Column("configuration", False), Column("candidates", False)]
    rows = []
    for key in group.keys:
        row = [Cell(f"{key['key']['dtype']} {text.shape(key['key']['rows'], key['key']['n'])}")]
        if evidence_module.is_tuned(key):
            timing, kept = key["timing"], evidence_module.kept_default(key)
            ci = timing["ci_us"]
            interval = text.NOTHING if ci is None else f"{text.figure(ci[0])} – {text.figure(ci[1])}"
            row += [Cell(text.figure(timing["default_us"])), Cell(text.figure(timing["median_us"])), Cell(interval, tone="muted")]
            row.append(Cell(text.times(key["gain"]), tone="muted" if kept else "strong"))
            row.append(Cell(configuration(key["config"]) + (" (default)" if kept else "")))
        else:
            row += [Cell(text.NOTHING, tone="muted")] * 4 + [
                Cell("not tuned: the default was not proved or not timed", tone="muted")
            ]
        counts = Counter(candidate["status"] for candidate in key["candidates"])
        row.append(Cell(", ".join(f"{number}\u00a0{status}" for status, number in _by_status(counts)) or "none"))
        rows.append(row)
    return Table(f"{group.op} {group.direction}: {text.several(len(rows), 'key')}", columns, rows, folded=True)


def _by_status(counts: Counter[str]) -> list[tuple[str, int]]:
    order = list(_STATUS)
    return sorted(counts.items(), key=lambda item: (order.index(item[0]) if item[0] in order else len(order), item[0]))


REASONS = 3
"""How many reasons of a status are quoted; the others are counted."""


def _discarded(autotune: Json) -> list[Block]:
    candidates = [candidate for key in autotune["keys"] for candidate in key["candidates"]]
    counts = Counter(candidate["status"] for candidate in candidates)
    # the counts that the file gives for what has no candidates, such as keys for which no time was left
    others = {status: number for status, number in autotune["dropped"].items() if status not in counts}
    blocks: list[Block] = []
    if counts:
        columns = [Column("candidates", False), Column("count"), Column("meaning", False), Column("reasons given", False)]
        rows = []
        for status, number in _by_status(counts):
            reasons = Counter(" ".join(c["reason"].split()) for c in candidates if c["status"] == status and c["reason"].strip())
            common = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
            said = [f"{times}× {reason}" for reason, times in common[:REASONS]]
            if len(common) > REASONS:
                said.append(f"and {text.several(len(common) - REASONS, 'other reason')}")
            tone = "" if status in ("timed", "slower") else "strong"
            rows.append(
                [
                    Cell(status, tone=tone),
                    Cell(text.count(number)),
                    Cell(_STATUS.get(status, "")),
                    Cell("; ".join(said) or text.NOTHING),
                ]
            )
        blocks.append(Table("What became of the candidates", columns, rows, kind="prose"))
    for status, number in sorted(others.items()):
        what, _, why = status.partition(": ")
        left_out = f"{text.several(number, 'key')} left out, to which the default stays: {why}."
        blocks.append(Words(left_out if what == "keys left out" else f"{status}: {text.count(number)}.", "missing"))
    return blocks


# --- the landscape ---------------------------------------------------------------------------------------------------

PLOTTED = 6
"""How many keys get a panel; the table has all."""


def landscape(exhaustive: Json | None, names: Names) -> list[Block]:
    """Every candidate of some keys, timed; nothing where there is no file."""
    if exhaustive is None:
        return []
    blocks: list[Block] = [Heading("The landscape", anchor="landscape")]
    found = landscapes(exhaustive)
    if not found:
        return [*blocks, Words("exhaustive.json has no keys.", "missing")]
    over = [one.over_best for one in found if one.over_best is not None]
    said = (
        f"Every candidate of {text.several(len(found), 'key')} was timed, in {text.several(exhaustive['rounds'], 'round')}. The "
        "best is that of the least median, which chance flatters: among many near ties some candidate had luck."
    )
    if over:
        said += (
            f" The default takes {text.span(over)} the time of the best, {text.times(statistics.median(over))} in the median key; "
            f"in {sum(ratio <= NEAR for ratio in over)} of {text.several(len(over), 'key')} it lies within "
            f"{text.percent(NEAR - 1)} of it."
        )
    blocks.append(Words(said))
    shown = spread(found, PLOTTED)
    svg = plots.landscape(shown)
    if svg is not None:
        caption = (
            "Median time of each candidate that was timed; a line joins the fastest at each number of warps. Colors are of one "
            f"panel each. {text.listed([_key(one.key) for one in shown])}."
        )
        blocks.append(Plots([Plot("Median time against warps, by block and rows", svg, caption, names("landscape"))]))
    return [*blocks, _landscape_table(found)]


def _key(key: Json) -> str:
    return f"{key['op']} {key['direction']} {key['dtype']} {text.shape(key['rows'], key['n'])}"


def _landscape_table(found: list[Landscape]) -> Table:
    columns = [Column("key", False), Column("candidates"), Column("timed"), Column("dropped", False), Column("best µs")]
    columns += [Column("default ÷ best"), Column("within 5 %", sub="of the best"), Column("best", False)]
    rows = []
    for one in found:
        timed, near = len(one.timed), len(one.near)
        dropped = ", ".join(f"{number}\u00a0{status}" for status, number in _by_status(one.dropped))
        best = "nothing was timed"
        if one.best is not None:
            best = configuration(one.configs[one.best]) + (" (default)" if one.best == one.default else "")
        rows.append(
            [
                Cell(f"{one.key['op']} {one.key['direction']}", f"{one.key['dtype']} {text.shape(one.key['rows'], one.key['n'])}"),
                Cell(text.count(len(one.configs))),
                Cell(text.count(timed)),
                Cell(dropped or "none", tone="" if dropped else "muted"),
                Cell(text.figure(one.best_us)),
                Cell(text.times(one.over_best), tone="muted" if one.over_best in (None, 1.0) else "strong"),
                Cell(text.percent(near / timed) if timed else text.NOTHING),
                Cell(best, tone="" if timed else "muted"),
            ]
        )
    notes = [("", "The share within 5 % is of the candidates that were timed.")]
    return Table(f"All candidates of {text.several(len(rows), 'key')}", columns, rows, notes)


# --- between the keys, and after an upgrade --------------------------------------------------------------------------


def transfer(between: Json | None) -> list[Block]:
    """What serves at shapes that no key has, beside the best that could; nothing where there is no file."""
    if between is None:
        return []
    every = landscapes(between)
    found = [
        (one, one.best, one.serves, ratio)
        for one in every
        if one.best is not None and one.serves is not None and (ratio := one.serving_over_best) is not None
    ]
    blocks: list[Block] = [Heading("Between the keys", anchor="between")]
    if not found:
        return [*blocks, Words("between.json has no key whose serving configuration was timed.", "missing")]
    ratios = [ratio for *_, ratio in found]
    p95 = quantile(ratios, 0.95)
    said = (
        f"Every candidate of {text.several(len(found), 'shape')} that no key has was timed, in "
        f"{text.several(between['rounds'], 'round')}. What serves such a call takes {text.times(statistics.median(ratios))} the "
        f"time of the best at the median, {text.times(p95)} at p95 (at most {text.times(TRANSFER_GOAL)} is the goal: "
        f"{'met' if p95 <= TRANSFER_GOAL else 'missed'}), {text.times(max(ratios))} at worst."
    )
    if lacking := len(every) - len(found):
        said += f" What serves {text.several(lacking, 'more shape')} was not among the candidates."
    if left_out := between.get("left_out"):
        said += f" No time was left for {text.several(left_out, 'shape')}."
    blocks.append(Words(said, "pass" if p95 <= TRANSFER_GOAL else "fail"))
    columns = [Column("shape", False), Column("best µs"), Column("serves ÷ best"), Column("default ÷ best")]
    columns += [Column("serves", False), Column("best", False)]
    rows = []
    for one, best, serves, ratio in found:
        same = ratio == 1
        rows.append(
            [
                Cell(f"{one.key['op']} {one.key['direction']}", f"{one.key['dtype']} {text.shape(one.key['rows'], one.key['n'])}"),
                Cell(text.figure(one.best_us)),
                Cell(text.times(ratio), tone="muted" if same else "strong"),
                Cell(text.times(one.over_best), tone="muted"),
                Cell(configuration(one.configs[serves])),
                Cell("the same" if same else configuration(one.configs[best]), tone="muted" if same else ""),
            ]
        )
    return [*blocks, Table(f"What serves {text.several(len(rows), 'shape')} between the keys", columns, rows)]


def _gpus(search: Json) -> int:
    return max(search.get("gpus") or 1, 1)


def _gpu_seconds(search: Json) -> float | None:
    """What a search took on one GPU, with the interrupted run that it went on with; None where nobody noted that one's time."""
    before = search.get("seconds_before")
    if before is None and search["resumed"]:
        return None
    return float((search["seconds"] + (before or 0.0)) * _gpus(search))


def upgrade(files: dict[str, Json], autotune: Json | None) -> list[Block]:
    """What proving and timing anew cost after a change of versions or kernels; nothing where there is no file.

    Args:
        files: by the name without .json.
        autotune: the search that they are compared with.
    """
    if not files:
        return []
    said = [_upgraded(f"{name}.json", data, autotune) for name, data in files.items()]
    return [Heading("After an upgrade", anchor="upgrade"), *said]


def _upgraded(name: str, data: Json, autotune: Json | None) -> Words:
    keys, again = text.several(len(data["keys"]), "key"), data.get("reverified")
    causes = data.get("outdated")
    if causes:
        said = " and ".join(f"{number} with another {cause}" for cause, number in causes.items())
        said = f"{name}: of {keys} {said} had been proved. "
    else:
        said = f"{name}: {keys} had been proved with another kernel or other versions. "
    said += (
        f"In {text.duration(data['seconds'])} what they had chosen was proved anew and timed against the default"
        + (f", without a search in {text.several(again, 'group')} of {data['groups']}" if again is not None else "")
        + "."
    )
    if (gain := data["geometric_mean_gain"]) is not None:
        own = [key for key in data["keys"] if evidence_module.is_tuned(key) and not evidence_module.kept_default(key)]
        said += f" {text.several(len(own), 'key')} kept a choice of their own"
        said += f", and the gain over that day's default is {text.times(gain)}."
    if autotune is None or autotune["effort"] != data["effort"]:
        return Words(said)
    took, searched = _gpu_seconds(data), _gpu_seconds(autotune)
    if took is None or searched is None:
        return Words(
            f"{said} What share that is of a search cannot be said: how long the interrupted run before took was not noted."
        )
    share = took / searched
    met = share <= UPGRADE_GOAL
    said += (
        f" That is {text.percent(share)} of the time on a GPU that the search of autotune.json took; at most "
        f"{text.percent(UPGRADE_GOAL)} is the goal: {'met' if met else 'missed'}."
    )
    return Words(said, "pass" if met else "fail")


def quick(data: Json | None) -> list[Block]:
    """What a quick search takes; nothing where there is no file."""
    if data is None:
        return []
    took, gpus = _gpu_seconds(data), _gpus(data)
    said = f"A search of effort quick tuned and proved {text.several(len(data['keys']), 'key')} in "
    if took is None:
        said += f"{text.duration(data['seconds'])}, and in the time of an interrupted run before, which was not noted."
        return [Heading("A quick search", anchor="quick"), Words(said)]
    met = took <= QUICK_GOAL
    said += text.duration(took / gpus)
    if gpus > 1:
        said += f" on {gpus} GPUs"
    said += f"; at most {text.duration(QUICK_GOAL)} on one is the goal: {'met' if met else 'missed'}."
    return [Heading("A quick search", anchor="quick"), Words(said, "pass" if met else "fail")]


# --- the search, replayed --------------------------------------------------------------------------------------------


def replay(data: Json | None, names: Names) -> list[Block]:
    """Searches replayed on the timings of all candidates; nothing where there is no file."""
    if data is None:
        return []
    blocks: list[Block] = [Heading("The search, replayed", anchor="replay")]
    strategies = data["strategies"]
    if not strategies:
        return [*blocks, Words("replay.json has no strategies.", "missing")]
    blocks.append(
        Words(
            f"Searches that draw their samples from {data['source']}, each with {text.several(data['seeds'], 'seed')} for every "
            "key. The regret is by how much what was chosen is slower than the best of all candidates, over keys and seeds. The "
            f"launches are the timed ones as a share of those of an exhaustive search ({data['full_launches']}). A key is stable "
            "where every seed came to the same choice."
        )
    )
    blocks.append(_verdict(strategies[0]))
    columns = [
        Column("strategy", False),
        Column("regret", sub="median"),
        Column("regret", sub="p95"),
        Column("regret", sub="worst"),
    ]
    columns += [Column("launches", sub="median"), Column("launches", sub="worst"), Column("stable keys")]
    columns += [Column("what it does", False)]
    rows = []
    for i, one in enumerate(strategies):
        figures = [*(one["regret"][name] for name in ("median", "p95", "worst")), one["share"]["median"], one["share"]["worst"]]
        tone = "" if i else "strong"
        cells = [Cell(text.fine(figure), tone=tone) for figure in figures]
        rows.append([Cell(one["name"], tone=tone), *cells, Cell(text.percent(one["stable"]), tone=tone), Cell(one["text"])])
    blocks.append(Table("", columns, rows, kind="prose"))
    svg = plots.replayed(strategies)
    if svg is not None:
        caption = (
            "Regret against the share of the launches of an exhaustive search; further left and further down is better. The dashed "
            "lines are the goals."
        )
        blocks.append(Plots([Plot("Regret against the share of launches", svg, caption, names("replay"))]))
    return blocks


def _verdict(strategy: Json) -> Words:
    """Whether the goals hold for a strategy, goal by goal."""
    found = goals(strategy)
    if not found:
        return Words(f"Of {strategy['name']} no key was replayed, so that nothing is said of the goals.", "missing")
    met = sum(goal.met for goal in found)
    where = text.several(len(strategy["keys"]), "key")
    said = [f"{strategy['name']}: {met} of {text.several(len(found), 'goal')} met, over {where}.", *map(_goal, found)]
    return Words(" ".join(said), "pass" if met == len(found) else "fail")


def _goal(goal: Goal) -> str:
    """``Worst regret: missed, 6.1 % where at most 5 % is the goal.``"""
    name, more = goal.name[0].upper() + goal.name[1:], f"; {goal.more}" if goal.more else ""
    bound = f"at {'least' if goal.at_least else 'most'} {text.percent(goal.limit)} is the goal"
    return f"{name}: {'met' if goal.met else 'missed'}, {text.fine(goal.figure)} where {bound}{more}."
