"""The plots, as SVG text. matplotlib draws them; it is an extra and is imported when the first plot is made.

A plot is drawn in CSS pixels on a canvas of fixed width, so that what is written is as large as the text around it. Its
colors are a few fixed values, one for each role, and :data:`STYLE` gives each of them its counterpart for dark mode. A file
on its own carries that style and a background; inside a page it takes both from the page.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from . import text
from .candidates import REGRET_GOALS, SHARE_GOAL, Landscape
from .evidence import SOFTMAX, Json, KeyGroup, Panel, Series, is_tuned, kept_default, usable

WIDTH = 480
LEFT, RIGHT = 86, 16
FONT = 11
SMALL = 10

INK, MUTED, GRID, LANE, PAPER = "#1f2329", "#59636f", "#d0d7df", "#f3f5f8", "#fefefe"
_DARK = {INK: "#e6edf3", MUTED: "#9aa6b2", GRID: "#3a434d", LANE: "#1b222a", PAPER: "#11161c"}


class Look(NamedTuple):
    """How a series is drawn: its color in light and dark mode, its marker and that one's size."""

    light: str
    dark: str
    marker: str
    size: float = 6.0


_KNOWN = {
    ("soft_topk", "coordroute"): Look("#0072b2", "#56b4f0", "o", 8.0),
    ("coordinate_descent", "coordroute"): Look("#d55e00", "#ff914d", "s", 7.5),
    ("copy", "copy"): Look("#6e7782", "#a3adb8", "|", 8.0),
    ("topk", "torch.topk"): Look("#aa4499", "#e08fd0", "^", 6.5),
    ("coordinate_descent", "eager published recurrence"): Look("#8a7000", "#d9b93b", "D", 5.5),
    ("coordinate_descent", "torch.compile of the published recurrence"): Look("#117734", "#5cc98b", "v", 6.5),
}
_FREE = (
    Look("#882256", "#ee7fb0", "P", 7.0),
    Look("#332289", "#ab9df2", "X", 7.0),
    Look("#1b8a7d", "#5fd3c4", "<", 6.5),
    Look("#b03a48", "#f28c98", ">", 6.5),
    Look("#7a4a1e", "#d9a06b", "p", 7.0),
    Look("#555b1e", "#bcc46a", "h", 7.0),
)
_SOFTMAX = Look(MUTED, _DARK[MUTED], "", 0.0)


def _style(selector: str = "") -> str:
    """CSS that gives every color its counterpart for dark mode."""
    pairs = dict(_DARK) | {look.light: look.dark for look in (*_KNOWN.values(), *_FREE)}
    rules = [
        f'{selector}[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in pairs.items()
        for what in ("fill", "stroke")
    ]
    return "@media screen and (prefers-color-scheme: dark){" + "".join(rules) + "}"


STYLE = _style()


def looks(series: list[Series]) -> dict[Series, Look]:
    """A look for every series of a file, the same in all of its plots."""
    others = [one for one in series if tuple(one) not in _KNOWN and one != SOFTMAX]
    found = {one: _FREE[i % len(_FREE)] for i, one in enumerate(others)}
    return {one: _SOFTMAX if one == SOFTMAX else _KNOWN.get((one.op, one.implementation)) or found[one] for one in series}


# --- drawing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _matplotlib() -> Iterator[Any]:
    """matplotlib with settings that are ours alone, whatever the user's are."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        message = "the plots of a report need the package matplotlib, which is not installed: pip install 'coordroute[tune]'"
        raise ModuleNotFoundError(message, name="matplotlib") from error
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "coordroute",
        "text.parse_math": False,
        "font.size": FONT,
        "axes.unicode_minus": False,
        "path.simplify": False,
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        # a name in a script that the font lacks: the browser has it
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield matplotlib


class _Canvas:
    """A figure in pixels, y downwards."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / 72, height / 72))  # 72 dpi: a point is a pixel
        self.figure.patch.set_visible(False)
        self.paper = self.axes(0, 0, width, height)
        self.paper.set(xlim=(0, width), ylim=(height, 0))
        self.paper.axis("off")

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        made = self.figure.add_axes((left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height))
        made.patch.set_visible(False)
        return made

    def write(self, x: float, y: float, words: str, **how: Any) -> None:
        self.paper.text(x, y, words, **{"color": INK, "fontsize": FONT, "va": "center", **how})

    def svg(self, title: str) -> str:
        file = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        self.figure.savefig(file, format="svg", metadata=nothing)
        return _clean(file.getvalue(), title, self.width, self.height)


_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def _clean(svg: str, title: str, width: float, height: float) -> str:
    """An <svg> element from a file of matplotlib's: no prolog, no comments, no ids but those that are used."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    # ids are hashes of what they name: two plots in one page may have the same, so each gets a prefix of its own
    used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
    own = hashlib.sha256(title.encode()).hexdigest()[:8]
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="p{own}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#p{own}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#p{own}-\1)", svg)
    svg = re.sub(r"font(-family)?: [^;\"]*?'?DejaVu Sans[^;\"]*", _fonts, svg)
    svg = re.sub(r"<g>\s*</g>\s*", "", svg)
    named = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">\n<title>{_escape(title)}</title>'
    )
    return re.sub(r"<svg[^>]*>", lambda found: named, svg, count=1).strip() + "\n"


def _fonts(found: re.Match[str]) -> str:
    """The reader's own sans-serif in place of matplotlib's; the size stays."""
    shorthand = re.match(r"font: (.*?px) ", found[0])
    return f"font: {shorthand[1]} {_FONTS}" if shorthand else f"font-family: {_FONTS}"


def _escape(words: str) -> str:
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def standalone(svg: str) -> str:
    """The text of a file for a plot: with a background and with its own dark mode, since no page gives it either."""
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    width, height = (found[1], found[2]) if found else ("100%", "100%")
    background = f'<style>{STYLE}</style>\n<rect width="{width}" height="{height}" rx="8" style="fill: {PAPER}"/>'
    svg = svg.replace("</title>", f"</title>\n{background}", 1)
    return svg.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)


@lru_cache(maxsize=4096)
def _measured(words: str, size: float, weight: str = "normal") -> float:
    """How wide matplotlib's own font makes it; a reader's font is hardly ever wider."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(words, FontProperties(size=size, weight=weight), False)[0])


def _short(words: str, most: int = 60) -> str:
    """One line that fits into a plot, whatever a file says."""
    words = " ".join(words.split())
    return words if len(words) <= most else f"{words[: most - 1]}…"


def _weight(label: str) -> str:
    return "bold" if label.startswith("coordroute ") else "normal"


def _legend(entries: list[tuple[str, Look | None]], width: float) -> list[list[tuple[float, str, Look | None]]]:
    """Lines of (x, label, look): as many entries a line as fit."""
    lines: list[list[tuple[float, str, Look | None]]] = []
    x = math.inf
    for label, look in entries:
        need = 18 + _measured(label, SMALL, _weight(label)) + 14
        if x + need - 14 > width:
            lines.append([])
            x = 0.0
        lines[-1].append((x, label, look))
        x += need
    return lines


def _marker(ax: Any, x: float, y: float, look: Look, **how: Any) -> None:
    ax.plot(
        [x],
        [y],
        marker=look.marker,
        markersize=look.size,
        color=look.light,
        markeredgewidth=2.0 if look.marker == "|" else 0.0,
        linestyle="none",
        clip_on=False,
        **how,
    )


_STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), tuple(1 + i / 10 for i in range(90)))
"""Where ticks may stand within a decade, the sparsest first."""


def _log_ticks(low: float, high: float) -> list[float]:
    """At least three round numbers inside the range, but few enough to be read."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in _STEPS:
        ticks = [float(f"{step * 10.0**exponent:.2g}") for exponent in exponents for step in steps]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 7)]


def _log_axis(ax: Any, low: float, high: float, unit: str) -> None:
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ticks = _log_ticks(low, high)
    ax.set_xticks(ticks, [f"{tick:g}{unit}" if tick < 1e4 else f"{tick / 1e3:g}k{unit}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.tick_params(axis="x", length=0, pad=5, labelsize=SMALL, labelcolor=MUTED)
    ax.grid(axis="x", color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _lanes(ax: Any, count: int) -> None:
    """One band a row, every second one tinted."""
    ax.set_ylim(count - 0.5, -0.5)
    ax.set_yticks([])
    for lane in range(0, count, 2):
        ax.axhspan(lane - 0.5, lane + 0.5, color=LANE, linewidth=0, zorder=-5)


def _remark(ax: Any, lane: int, words: str) -> None:
    """Words in the middle of a lane that has nothing to show."""
    ax.text(0.5, lane, words, transform=ax.get_yaxis_transform(), color=MUTED, fontsize=SMALL, ha="center", va="center")


# --- speed -----------------------------------------------------------------------------------------------------------


def _lane_height(series: int) -> float:
    return max(26.0, 6.5 * series + 8.0)


def _ratio_range(panels: list[Panel]) -> tuple[float, float]:
    """The range of an axis that all of these panels share, so that they can be compared by eye."""
    values = [1.0]
    for panel in panels:
        for point in panel.points.values():
            found = [point.ratio, *(point.ratio_ci or ())]
            values += [value for value in found if value is not None and usable(value)]
    low, high = min(values), max(values)
    room = max((high / low) ** 0.05, 1.12)
    return low / room, high * room


def _drawn(panel: Panel) -> list[Series]:
    """The series that have something to be drawn, but for torch.softmax: that one is the line at 1."""
    return [one for one in panel.series if one != SOFTMAX and any(map(usable, panel.ratios(one)))]


def _speed_axes(
    canvas: _Canvas,
    box: tuple[float, float, float, float],
    limits: tuple[float, float],
    panel: Panel,
    series: list[Series],
    how: dict[Series, Look],
) -> None:
    ax = canvas.axes(*box)
    _lanes(ax, len(panel.shapes))
    _log_axis(ax, *limits, "×")
    ax.axvline(1, color=MUTED, linewidth=1.3, zorder=1)
    step = 0.78 / max(len(series), 1)
    for lane, shape in enumerate(panel.shapes):
        base = panel.points.get((SOFTMAX, shape))
        if base is not None and base.ratio_ci is not None and all(map(usable, base.ratio_ci)):
            ax.fill_betweenx([lane - 0.5, lane + 0.5], *base.ratio_ci, color=MUTED, alpha=0.25, linewidth=0, zorder=0)
        here = [point for one in panel.series if (point := panel.points.get((one, shape))) is not None]
        if not any(usable(point.ratio) for point in here):
            measured = any(usable(point.median_us) for point in here)
            _remark(ax, lane, "torch.softmax not measured" if measured else "not measured")
        for position, one in enumerate(series):
            point = panel.points.get((one, shape))
            if point is None or not usable(point.ratio):
                continue
            y = lane + (position - (len(series) - 1) / 2) * step
            if point.ratio_ci is not None and all(map(usable, point.ratio_ci)):
                ax.plot(point.ratio_ci, [y, y], color=how[one].light, linewidth=1.6, solid_capstyle="butt", zorder=2)
            _marker(ax, point.ratio, y, how[one], zorder=4 if one.ours else 3)  # type: ignore[arg-type]


def _arrows(canvas: _Canvas, left: float, right: float, y: float) -> None:
    canvas.write(left, y, "← faster", color=MUTED, fontsize=SMALL, ha="left")
    canvas.write((left + right) / 2, y, "time ÷ torch.softmax", color=MUTED, fontsize=SMALL, ha="center")
    canvas.write(right, y, "slower →", color=MUTED, fontsize=SMALL, ha="right")


def _draw_legend(canvas: _Canvas, lines: list[list[tuple[float, str, Look | None]]], x: float, y: float) -> None:
    for position, line in enumerate(lines):
        at = y + 16 * position
        for offset, label, look in line:
            if look is None or not look.marker:
                canvas.paper.plot([x + offset + 6, x + offset + 6], [at - 6, at + 6], color=MUTED, linewidth=1.6)
            else:
                _marker(canvas.paper, x + offset + 6, at, look)
            canvas.write(x + offset + 17, at + 0.5, label, fontsize=SMALL, fontweight=_weight(label))


def speed(panels: list[Panel], how: dict[Series, Look], beside: list[Panel]) -> str | None:
    """Time relative to torch.softmax, one panel beside the other: panels of one dtype.

    Args:
        panels: what to show.
        how: the look of every series of the file.
        beside: all panels with which a reader may compare these: they get the same axis and the same height of a row.

    Returns:
        The <svg> element, or None where no panel has anything that can be compared with torch.softmax.
    """
    panels = [panel for panel in panels if _drawn(panel)]
    if not panels:
        return None
    with _matplotlib():
        series = [one for one in how if any(one in _drawn(panel) for panel in panels)]
        shapes = list(dict.fromkeys(shape for panel in panels for shape in panel.shapes))
        shapes.sort(key=lambda shape: (shape[1], shape[0]))
        panels = [Panel(p.dtype, p.direction, shapes, p.series, p.points) for p in panels]
        label = max(_measured(text.shape(*shape), FONT) for shape in shapes) + 18
        each = WIDTH - LEFT - RIGHT
        width = label + len(panels) * each + (len(panels) - 1) * 26 + RIGHT
        entries: list[tuple[str, Look | None]] = [(_short(one.label), how[one]) for one in series]
        lines = _legend([*entries, ("torch.softmax = 1×", None)], width - 24)
        top = 40 + 16 * len(lines) + 6
        height = _lane_height(max(len(_drawn(panel)) for panel in (*panels, *beside))) * len(shapes)
        limits = _ratio_range([*panels, *beside])
        canvas = _Canvas(width, top + height + 46)
        _draw_legend(canvas, lines, 14, 42)
        canvas.write(label - 10, top + height + 33, "rows × n", color=MUTED, fontsize=SMALL, ha="right")
        for lane, shape in enumerate(shapes):
            canvas.write(label - 10, top + height / len(shapes) * (lane + 0.5), text.shape(*shape), ha="right", fontsize=FONT)
        for position, panel in enumerate(panels):
            left = label + position * (each + 26)
            title = _short(f"{panel.direction}, {panel.dtype}", 40)
            canvas.write(14 if len(panels) == 1 else left, 18, title, fontweight="bold", fontsize=13)
            _speed_axes(canvas, (left, top, each, height), limits, panel, series, how)
            _arrows(canvas, left, left + each, top + height + 33)
        named = text.listed([panel.direction for panel in panels])
        return canvas.svg(f"Time relative to torch.softmax, {named}, {panels[0].dtype}, for each shape and implementation")


# --- autotune --------------------------------------------------------------------------------------------------------


def gains(group: KeyGroup) -> str | None:
    """Default and tuned time of every key of one operator and direction.

    Returns:
        The <svg> element, or None where no key was tuned.
    """
    tuned = [key for key in group.keys if is_tuned(key)]
    values = [key["timing"][name] for key in tuned for name in ("median_us", "default_us")]
    values += [end for key in tuned for end in key["timing"]["ci_us"] or ()]
    values = [value for value in values if usable(value)]
    if not values:
        return None
    look = _KNOWN.get((group.op, "coordroute"), _FREE[0])._replace(marker="o", size=8.0)
    with _matplotlib():
        names = [f"{_short(key['key']['dtype'], 16)}  {text.shape(key['key']['rows'], key['key']['n'])}" for key in group.keys]
        label = max(_measured(name, FONT) for name in names) + 26
        gain = 52.0
        top, lane = 66.0, 20.0
        height = lane * len(group.keys)
        canvas = _Canvas(max(WIDTH, label + 260 + gain), top + height + 34)
        right = canvas.width - gain - 6
        canvas.write(14, 18, _short(f"{group.op} {group.direction}", 40), fontweight="bold", fontsize=13)
        canvas.write(canvas.width - 12, top - 14, "gain", color=MUTED, fontsize=SMALL, ha="right")
        _gain_legend(canvas, look, 14, 42)
        ax = canvas.axes(label, top, right - label, height)
        _lanes(ax, len(group.keys))
        room = max((max(values) / min(values)) ** 0.05, 1.12)
        scale, unit = (1e3, " ms") if max(values) >= 2e4 else (1.0, " µs")
        _log_axis(ax, min(values) / room / scale, max(values) * room / scale, unit)
        for position, (key, name) in enumerate(zip(group.keys, names, strict=True)):
            y = top + lane * (position + 0.5)
            canvas.write(label - 12, y, name, ha="right", color=INK if is_tuned(key) else MUTED)
            said = text.times(key["gain"]) if is_tuned(key) else text.NOTHING
            plain = kept_default(key) or not is_tuned(key)
            canvas.write(
                canvas.width - 12, y, said, ha="right", color=MUTED if plain else INK, fontweight="normal" if plain else "bold"
            )
            if is_tuned(key):
                _dumbbell(ax, position, key, look, scale)
            else:
                _remark(ax, position, "not tuned")
        return canvas.svg(f"Default and tuned time of every key of {group.op} {group.direction}")


def _dumbbell(ax: Any, y: int, key: Json, look: Look, scale: float) -> None:
    default, median = key["timing"]["default_us"] / scale, key["timing"]["median_us"] / scale
    ci = None if key["timing"]["ci_us"] is None else [end / scale for end in key["timing"]["ci_us"]]
    color = MUTED if kept_default(key) else look.light
    if usable(default) and usable(median):
        ax.plot([default, median], [y, y], color=color, linewidth=3, alpha=0.35, solid_capstyle="butt", zorder=2)
    if ci is not None and all(map(usable, ci)):
        ax.plot(ci, [y, y], color=color, linewidth=1.4, solid_capstyle="butt", zorder=3)
    if usable(default) and not kept_default(key):
        _hollow(ax, default, y)
    if usable(median):
        _marker(ax, median, y, look._replace(light=color), zorder=5)


def _hollow(ax: Any, x: float, y: float) -> None:
    how = {"markeredgecolor": MUTED, "markerfacecolor": PAPER, "markeredgewidth": 1.5, "linestyle": "none", "clip_on": False}
    ax.plot([x], [y], marker="o", markersize=6.5, zorder=4, **how)


def _gain_legend(canvas: _Canvas, look: Look, x: float, y: float) -> None:
    for word, kind in (("default", "hollow"), ("tuned", "full"), ("default kept", "kept")):
        if kind == "hollow":
            _hollow(canvas.paper, x + 6, y)
        else:
            _marker(canvas.paper, x + 6, y, look if kind == "full" else look._replace(light=MUTED))
        canvas.write(x + 17, y + 0.5, word, fontsize=SMALL)
        x += 17 + _measured(word, SMALL) + 16


# --- configurations --------------------------------------------------------------------------------------------------

_Named = tuple[tuple[str, str, int | None], ...]
"""Fields with their letters, and the value that goes without saying."""

_FIRST: _Named = (("num_warps", "w", 0), ("rows_per_program", "r", 1), ("num_threads", "t", 0))
_BESIDE: _Named = (("programs_per_row", "p", 1), ("max_registers", "reg", 0), ("checkpoint_segments", "s", None))
_LETTERS = {
    "w": "warps",
    "r": "rows a program",
    "t": "threads",
    "b": "block",
    "p": "programs a row",
    "reg": "most registers a thread",
    "s": "segments",
}


def _letters(config: Json) -> list[tuple[str, str]]:
    """(letter, ``w8``): what a configuration has that is not the same for all of its variant."""
    parts = [(letter, config.get(name), unused) for name, letter, unused in _FIRST]
    if config.get("variant") in ("split", "tiled"):
        parts.append(("b", config.get("block"), 0))
    parts += [(letter, config.get(name), unused) for name, letter, unused in _BESIDE]
    return [(letter, f"{letter}{value}") for letter, value, unused in parts if value is not None and value != unused]


def short_configuration(config: Json) -> list[str]:
    """A launch configuration in one or two short lines: ``resident w8 r2`` and what there is beside warps and rows."""
    said = dict(_letters(config))
    first = " ".join([_short(str(config.get("variant", "")), 10), *(said.pop(one) for one in ("w", "r", "t") if one in said)])
    return [first, *([" ".join(said.values())] if said else [])]


_Lines = list[tuple[str, str]]
"""Lines of a cell with their colors."""


def _cell_lines(keys: list[Json], dtypes: int) -> _Lines:
    """What a shape's keys, one a dtype, were tuned to; the dtypes are named where not all came to the same."""
    groups: dict[tuple[str, ...], list[Json]] = {}
    for key in keys:
        groups.setdefault(tuple(short_configuration(key["config"])) if is_tuned(key) else ("not tuned",), []).append(key)
    lines: _Lines = []
    for words, alike in groups.items():
        if len(groups) > 1 or len(keys) < dtypes:
            lines.append((", ".join(_short(key["key"]["dtype"], 16) for key in alike), MUTED))
        plain = all(kept_default(key) or not is_tuned(key) for key in alike)
        lines += [(one, MUTED if plain else INK) for one in words]
    return lines


def configurations(group: KeyGroup) -> str | None:
    """The tuned configuration of every shape of one operator and direction, as a grid of n by rows.

    Returns:
        The <svg> element, or None where no key was tuned.
    """
    tuned = [key for key in group.keys if is_tuned(key)]
    if not tuned:
        return None
    dtypes = len({key["key"]["dtype"] for key in group.keys})
    rows, lengths = (sorted({key["key"][name] for key in group.keys}) for name in ("rows", "n"))
    shapes: dict[tuple[int, int], list[Json]] = {}
    for key in group.keys:
        shapes.setdefault((key["key"]["rows"], key["key"]["n"]), []).append(key)
    used = {letter for key in tuned for letter, _ in _letters(key["config"])}
    legend = ", ".join(f"{letter} {words}" for letter, words in _LETTERS.items() if letter in used)
    look = _KNOWN.get((group.op, "coordroute"), _FREE[0])
    with _matplotlib():
        cells = {shape: _cell_lines(keys, dtypes) for shape, keys in shapes.items()}
        each = max(60.0, max(_measured(words, SMALL) for lines in cells.values() for words, _ in lines) + 12)
        label = max(_measured(str(n), FONT) for n in lengths) + 34
        width = max(WIDTH, label + len(rows) * each + RIGHT, _measured(legend, SMALL) + 28)
        each = (width - label - RIGHT) / len(rows)
        line, top = 13.0, 92.0
        heights = [line * max(len(cells.get((one, n), [])) for one in rows) + 9 for n in lengths]
        canvas = _Canvas(width, top + sum(heights) + 14)
        canvas.write(14, 18, _short(f"{group.op} {group.direction}", 40), fontweight="bold", fontsize=13)
        canvas.write(14, 37, "tinted: faster than the default; grey: the default was kept", color=MUTED, fontsize=SMALL)
        canvas.write(14, 52, legend, color=MUTED, fontsize=SMALL)
        canvas.write(label - 12, top - 12, "n \\ rows", color=MUTED, fontsize=SMALL, ha="right")
        for column, one in enumerate(rows):
            canvas.write(label + each * (column + 0.5), top - 12, str(one), ha="center")
        y = top
        for n, height in zip(lengths, heights, strict=True):
            canvas.write(label - 12, y + height / 2, str(n), ha="right")
            for column, one in enumerate(rows):
                left = label + each * column
                changed = any(is_tuned(key) and not kept_default(key) for key in shapes.get((one, n), []))
                here = cells.get((one, n), [])
                color, alpha = (look.light, 0.16) if changed else (LANE, 1.0)
                if here:
                    edges = [left + 1, left + each - 1]
                    canvas.paper.fill_between(edges, y + 1, y + height - 1, color=color, alpha=alpha, linewidth=0)
                for position, (words, ink) in enumerate(here):
                    at = y + height / 2 + line * (position - (len(here) - 1) / 2)
                    canvas.write(left + each / 2, at, words, ha="center", fontsize=SMALL, color=ink)
            y += height
        return canvas.svg(f"Tuned configuration of every shape of {group.op} {group.direction}")


# --- the landscape ---------------------------------------------------------------------------------------------------

_CYCLE = (*(one for name, one in _KNOWN.items() if name[0] != "copy"), *_FREE)
"""Looks for what has no look of its own, in one panel."""


def _kind(config: Json) -> tuple[Any, ...]:
    """What a line of the landscape is of: a variant with its block, and rows a program or programs a row."""
    return config["variant"], config["block"], config["rows_per_program"], config["programs_per_row"]


def _kind_label(kind: tuple[Any, ...], variants: int) -> str:
    variant, block, rows, programs = kind
    said = f"{block} × {rows}" + (f" ÷ {programs}" if programs > 1 else "")
    return f"{_short(str(variant), 10)} {said}" if variants > 1 else said


def landscape(shown: list[Landscape]) -> str | None:
    """Median time against warps, a small panel for each key: two side by side.

    Returns:
        The <svg> element, or None where no key has a candidate that was timed and has warps.
    """
    shown = [one for one in shown if any(one.configs[i]["num_warps"] > 0 for i in one.timed)]
    if not shown:
        return None
    with _matplotlib():
        each, left, gap, height, top = 284.0, 52.0, 28.0, 150.0, 50.0
        columns = min(2, len(shown))
        width = max(WIDTH, columns * (left + each) + (columns - 1) * gap + RIGHT)
        each = (width - RIGHT - (columns - 1) * gap) / columns - left
        legends = []
        for one in shown:
            kinds = _kinds(one)
            variants = len({kind[0] for kind in kinds})
            entries: list[tuple[str, Look | None]] = [(_kind_label(kind, variants), look) for kind, look in kinds.items()]
            legends.append(_legend(entries, each + left - 14))
        # panels of a line of them begin at the same height
        room = [16.0 * max(map(len, legends[i : i + columns])) for i in range(0, len(shown), columns)]
        bands = [40.0 + one + height + 52.0 for one in room]
        canvas = _Canvas(width, top + sum(bands))
        canvas.write(14, 18, "Median time against warps", fontweight="bold", fontsize=13)
        x = 14.0
        for words, ring in (("the default", True), ("the best", False)):
            _ring(canvas.paper, x + 6, 38, default=ring)
            canvas.write(x + 18, 38.5, words, fontsize=SMALL)
            x += 18 + _measured(words, SMALL) + 16
        canvas.write(x, 38.5, "block × rows a program, ÷ programs a row", color=MUTED, fontsize=SMALL)
        for position, one in enumerate(shown):
            line, column = divmod(position, columns)
            at, y = column * (left + each + gap), top + sum(bands[:line])
            key = one.key
            canvas.write(at + 14, y + 14, _short(f"{key['op']} {key['direction']}", 40), fontweight="bold")
            where = f"{_short(key['dtype'], 16)} {text.shape(key['rows'], key['n'])}"
            canvas.write(at + 14, y + 29, where, color=MUTED, fontsize=SMALL)
            _draw_legend(canvas, legends[position], at + 14, y + 45)
            _landscape_axes(canvas, (at + left, y + 40 + room[line], each, height), one)
            canvas.write(at + left + each / 2, y + 40 + room[line] + height + 33, "warps", color=MUTED, fontsize=SMALL, ha="center")
            canvas.write(at + left - 8, y + 40 + room[line] + height + 15, "µs", color=MUTED, fontsize=SMALL, ha="right")
        return canvas.svg(f"Median time of every candidate against warps, {text.several(len(shown), 'key')}")


def _kinds(one: Landscape) -> dict[tuple[Any, ...], Look]:
    """The lines of a panel with their looks; where there are more than looks, the last ones look alike."""
    kinds = sorted({_kind(one.configs[i]) for i in one.timed if one.configs[i]["num_warps"] > 0})
    return {kind: _CYCLE[min(i, len(_CYCLE) - 1)]._replace(size=4.5) for i, kind in enumerate(kinds)}


def _ring(ax: Any, x: float, y: float, *, default: bool) -> None:
    """Around a marker: a square of the default, a circle of the best."""
    how = {"markeredgecolor": MUTED if default else INK, "markerfacecolor": "none", "linestyle": "none", "clip_on": False}
    marker, size = ("s", 14.0) if default else ("o", 10.0)
    ax.plot([x], [y], marker=marker, markersize=size, markeredgewidth=1.5, zorder=6, **how)


def _landscape_axes(canvas: _Canvas, box: tuple[float, float, float, float], one: Landscape) -> None:
    ax = canvas.axes(*box)
    points = [(one.configs[i]["num_warps"], float(one.times[i] or 0.0), i) for i in one.timed if one.configs[i]["num_warps"] > 0]
    times, warps = [time for _, time, _ in points], [warp for warp, _, _ in points]
    room = max((max(times) / min(times)) ** 0.1, 1.05)
    ax.set_yscale("log")
    ax.set_ylim(min(times) / room, max(times) * room)
    ticks = _log_ticks(min(times) / room, max(times) * room)
    _log_axis(ax, min(warps) / 1.35, max(warps) * 1.35, "")
    ax.set_xticks(sorted(set(warps)), [str(warp) for warp in sorted(set(warps))])
    ax.set_yticks(ticks, [text.figure(tick, 2) for tick in ticks])
    ax.set_yticks([], minor=True)
    ax.tick_params(axis="y", length=0, pad=5, labelsize=SMALL, labelcolor=MUTED)
    ax.grid(axis="y", color=GRID, linewidth=0.7)
    for kind, look in _kinds(one).items():
        of_kind = sorted((warp, time) for warp, time, i in points if _kind(one.configs[i]) == kind)
        fastest = {warp: time for warp, time in reversed(of_kind)}
        ax.plot(sorted(fastest), [fastest[warp] for warp in sorted(fastest)], color=look.light, linewidth=1.4, alpha=0.6, zorder=2)
        for warp, time in of_kind:
            _marker(ax, warp, time, look, zorder=3)
    for index, default in ((one.default, True), (one.best, False)):
        marked = next(((warp, time) for warp, time, i in points if i == index), None)
        if marked is not None:
            _ring(ax, *marked, default=default)


# --- the search, replayed --------------------------------------------------------------------------------------------

LEAST_REGRET = 0.001
"""What is less is drawn here: a logarithmic axis has no zero."""


def replayed(strategies: list[Json]) -> str | None:
    """Regret against the share of the launches of an exhaustive search: the median and p95 side by side.

    Returns:
        The <svg> element, or None where no strategy has a curve that can be drawn.
    """
    curves = {one["name"]: sorted(point for point in one["curve"] if usable(point[0])) for one in strategies}
    drawn = [one["name"] for one in strategies if curves[one["name"]]]
    if not drawn:
        return None
    look = {name: _CYCLE[min(i, len(_CYCLE) - 1)]._replace(size=5.0) for i, name in enumerate(drawn)}
    shares = [point[0] for name in drawn for point in curves[name]] + [SHARE_GOAL]
    regrets = [value for name in drawn for point in curves[name] for value in point[1:] if math.isfinite(value)]
    highest = max([*regrets, REGRET_GOALS["p95"]]) * 1.4
    with _matplotlib():
        each, left, gap, height = 268.0, 62.0, 24.0, 210.0
        width = 2 * (left + each) + gap + RIGHT
        lines = _legend([(_short(name), look[name]) for name in drawn], width - 28)
        top = 70.0 + 16 * len(lines)
        canvas = _Canvas(width, top + height + 46)
        canvas.write(14, 18, "Regret against the share of launches", fontweight="bold", fontsize=13)
        _draw_legend(canvas, lines, 14, 42)
        for position, (name, words) in enumerate((("median", "median regret"), ("p95", "95th percentile of the regret"))):
            at = position * (left + each + gap) + left
            canvas.write(at, top - 14, words, fontweight="bold")
            ax = canvas.axes(at, top, each, height)
            ax.set_yscale("log")
            ax.set_ylim(LEAST_REGRET / 1.3, highest)
            _log_axis(ax, min(shares) * 100 / 1.2, max(shares) * 100 * 1.2, " %")
            ticks = [tick for tick in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0) if tick < highest]
            ax.set_yticks(ticks, [("≤ " if tick == LEAST_REGRET else "") + f"{100 * tick:g} %" for tick in ticks])
            ax.set_yticks([], minor=True)
            ax.tick_params(axis="y", length=0, pad=5, labelsize=SMALL, labelcolor=MUTED)
            ax.grid(axis="y", color=GRID, linewidth=0.7)
            for draw, goal in ((ax.axhline, REGRET_GOALS[name]), (ax.axvline, 100 * SHARE_GOAL)):
                draw(goal, color=MUTED, linewidth=1.3, linestyle=(0, (4, 3)), zorder=1)
            # the first strategy is drawn last, so that it lies above the others
            for one in reversed(drawn):
                found = [(share * 100, max(p95 if position else median, LEAST_REGRET)) for share, median, p95 in curves[one]]
                found = [(share, value) for share, value in found if math.isfinite(value)]
                first = one == drawn[0]
                if found:
                    ax.plot(*zip(*found, strict=True), color=look[one].light, linewidth=2.4 if first else 1.4, zorder=3)
                for share, value in found:
                    _marker(ax, share, value, look[one], zorder=4)
            words = "share of the launches of an exhaustive search"
            canvas.write(at + each / 2, top + height + 33, words, color=MUTED, fontsize=SMALL, ha="center")
        return canvas.svg(f"Regret against the share of launches, {text.several(len(drawn), 'strategy', 'strategies')}")


# --- errors ----------------------------------------------------------------------------------------------------------

_POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LEAST = -24
"""The first bin of a histogram over powers of two: all that is smaller, and 0."""

Distributions = dict[str, Json]
"""Quantity -> what is said of its errors, of one dtype."""


def _shares(histogram: list[list[int]]) -> tuple[list[float], list[float]]:
    """Where the distribution function of a histogram over powers of two steps, as exponents, and to which share."""
    total = sum(count for _, count in histogram)
    ends, shares, below = [], [], 0
    for exponent, count in sorted(map(tuple, histogram)):
        below += count
        ends.append(float(exponent + 1))
        shares.append(below / total)
    return ends, shares


def _exponents(panels: dict[str, Distributions]) -> tuple[int, int]:
    found = [
        exponent
        for panel in panels.values()
        for row in panel.values()
        for whose in ("ours", "plain")
        for exponent, _ in row[whose]["histogram"]
        if exponent > _LEAST
    ]
    return (min(found, default=0) - 1, max(found, default=0) + 2)


def ulps(op: str, panels: dict[str, Distributions], beside: dict[str, Distributions]) -> str:
    """The distribution functions of the errors in ulps, ours against plain torch: dtypes side by side, quantities below each other.

    Args:
        op: whose.
        panels: dtype -> quantity -> a row of verify's distributions.
        beside: all with which a reader may compare these: they get the same axis and the same rows.

    Returns:
        The <svg> element.
    """
    look = _KNOWN.get((op, "coordroute"), _FREE[0])._replace(marker="o", size=6.0)
    with _matplotlib():
        names = list(dict.fromkeys(name for panel in beside.values() for name in panel))
        label = max(_measured(_short(name, 30), FONT) for name in names) + 52
        each, lane, gap, top = WIDTH - label - RIGHT, 74.0, 18.0, 68.0
        width = label + len(panels) * each + (len(panels) - 1) * 46 + RIGHT
        height = len(names) * (lane + gap) - gap
        canvas = _Canvas(width, top + height + 46)
        _ulps_legend(canvas, look, 14, 42)
        limits = _exponents(beside)
        for position, (dtype, panel) in enumerate(panels.items()):
            left = label + position * (each + 46)
            words = _short(f"{op}, {dtype}", 40)
            canvas.write(14 if len(panels) == 1 else left, 18, words, fontweight="bold", fontsize=13)
            for number, name in enumerate(names):
                y = top + number * (lane + gap)
                if position == 0:
                    canvas.write(label - 34, y + lane / 2, _short(name, 30), ha="right")
                _ulps_lane(canvas, _Box(left, y, each, lane, *limits), panel.get(name), look)
            ticks = _Box(left, top, each, height, *limits)
            for tick in ticks.ticks():
                canvas.write(ticks.x(tick), top + height + 14, _power(tick), color=MUTED, fontsize=SMALL, ha="center")
            canvas.write(left + each / 2, top + height + 32, "error in ulps, at most", color=MUTED, fontsize=SMALL, ha="center")
        return canvas.svg(f"Errors of {op} in ulps, ours and plain torch, {', '.join(panels)}")


class _Box(NamedTuple):
    """A lane in pixels: exponents of two from ``low`` to ``high`` along it, shares from 0 to 1 up it."""

    left: float
    top: float
    width: float
    height: float
    low: int
    high: int

    def x(self, exponent: float) -> float:
        return self.left + self.width * (min(max(exponent, self.low), self.high) - self.low) / (self.high - self.low)

    def y(self, share: float) -> float:
        return self.top + self.height * (1.0 - share)

    def ticks(self) -> list[int]:
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if (self.high - self.low) / step <= 7)
        return [tick for tick in range(-1500, 1500, step) if self.low <= tick <= self.high]


def _ulps_lane(canvas: _Canvas, box: _Box, row: Json | None, look: Look) -> None:
    """Drawn on the canvas itself: axes for each of so many lanes would take seconds."""
    paper = canvas.paper
    right, bottom = box.left + box.width, box.top + box.height
    paper.fill_between([box.left, right], bottom + 3, box.top - 5, color=LANE, linewidth=0, zorder=-5)
    for tick in box.ticks():
        paper.plot([box.x(tick)] * 2, [box.top - 5, bottom + 3], color=GRID, linewidth=0.7, zorder=-4)
    for share, words in ((0.0, "0"), (0.5, "½"), (1.0, "1")):
        paper.plot([box.left, right], [box.y(share)] * 2, color=GRID, linewidth=0.7, zorder=-4)
        canvas.write(box.left - 6, box.y(share), words, color=MUTED, fontsize=SMALL, ha="right")
    if row is None:
        canvas.write((box.left + right) / 2, box.y(0.5), "not measured", color=MUTED, fontsize=SMALL, ha="center")
        return
    for whose in ("ours", "plain"):
        _curve(canvas, box, row[whose], look if whose == "ours" else None)


def _curve(canvas: _Canvas, box: _Box, errors: Json, look: Look | None) -> None:
    ends, shares = _shares(errors["histogram"])
    if not ends:
        return
    # what is below the axis is where the curve begins
    begin = max((share for end, share in zip(ends, shares, strict=True) if end <= box.low), default=0.0)
    inside = [(end, share) for end, share in zip(ends, shares, strict=True) if end > box.low]
    x = [float(box.low), *(end for end, _ in inside), float(box.high)]
    y = [begin, *(share for _, share in inside), 1.0]
    how: dict[str, Any] = {"color": MUTED, "linewidth": 1.5, "linestyle": (0, (4, 2)), "zorder": 3}
    if look is not None:
        how = {"color": look.light, "linewidth": 2.2, "zorder": 2}
    canvas.paper.step([box.x(one) for one in x], [box.y(one) for one in y], where="post", solid_capstyle="butt", **how)
    if usable(errors["max"]):
        worst = box.x(math.log2(errors["max"]))
        if look is None:
            _hollow(canvas.paper, worst, box.y(1.0))
        else:
            _marker(canvas.paper, worst, box.y(1.0), look, zorder=5)


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else f"2{str(exponent).translate(_POWERS)}"


def _ulps_legend(canvas: _Canvas, look: Look, x: float, y: float) -> None:
    for word, ours, marker in (
        ("ours: share of rows", True, False),
        ("largest", True, True),
        ("plain torch", False, False),
        ("largest", False, True),
    ):
        if marker and ours:
            _marker(canvas.paper, x + 8, y, look)
        elif marker:
            _hollow(canvas.paper, x + 8, y)
        elif ours:
            canvas.paper.plot([x, x + 16], [y, y], color=look.light, linewidth=2.2)
        else:
            canvas.paper.plot([x, x + 16], [y, y], color=MUTED, linewidth=1.5, linestyle=(0, (4, 2)))
        canvas.write(x + 21, y + 0.5, word, fontsize=SMALL)
        x += 21 + _measured(word, SMALL) + 16
