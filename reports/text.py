"""How figures are written: three significant digits, never more than was measured, and a dash where there is nothing."""

from __future__ import annotations

import math

NOTHING = "–"
NARROW_SPACE = "\u202f"


def figure(value: float | None, digits: int = 3) -> str:
    """A figure with three significant digits, or all digits before the point where there are more."""
    if value is None:
        return NOTHING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.001:
        return f"{value:.{digits - 1}e}"
    # the rounded value decides: 9.999 is 10.0 and not 10.00
    decimals = max(0, digits - 1 - math.floor(math.log10(float(f"{size:.{digits}g}"))))
    return f"{value:,.{decimals}f}".replace(",", NARROW_SPACE) if size >= 9999.5 else f"{value:.{decimals}f}"


def times(value: float | None) -> str:
    """A ratio: ``1.73×``."""
    return NOTHING if value is None else f"{figure(value)}×"


def amount(value: float | None, unit: str) -> str:
    """A figure with its unit: ``1.73×``, ``2.00 floats a row``."""
    return NOTHING if value is None else times(value) if unit == "×" else f"{figure(value)} {unit}"


def span(values: list[float]) -> str:
    """The range of some ratios with two significant digits: ``0.08–1.3×``; the tables have three."""
    if not values:
        return NOTHING
    low, high = figure(min(values), 2), figure(max(values), 2)
    return f"{low}×" if low == high else f"{low}–{high}×"


def error(value: float | None) -> str:
    """An error or a bound with two significant digits."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return figure(value)
    return "0" if value == 0 else f"{value:.1e}" if abs(value) < 0.001 or abs(value) >= 1000 else f"{value:.2g}"


def ulps(value: float | None) -> str:
    """An error in ulps with two significant digits: ``0.15``, ``111``, ``4.9e+06``."""
    large = value is not None and math.isfinite(value) and abs(value) >= 9999.5
    return f"{value:.1e}" if large else figure(value, 2)


def percent(value: float | None) -> str:
    """A share: ``34 %``; a small one is not rounded to nothing and one over the whole not to it."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return figure(value)
    if value >= 9.995:
        return f"{error(value)}×"
    if 0 < value < 0.005:
        return "< 1 %"
    if 0.995 <= value < 1 or 1 < value < 1.005:
        return "< 100 %" if value < 1 else "> 100 %"
    return f"{100 * value:.0f} %"


def fine(value: float) -> str:
    """A share with two significant digits: ``1.2 %``, ``0.035 %``."""
    return f"{figure(100 * value, 2)} %"


def share(part: int, whole: int) -> str:
    """A small share with two significant digits: ``0.031 %``; a dash for none."""
    if not part or not whole:
        return NOTHING
    return f"{figure(100 * part / whole, 2)} %"


def count(value: int | float | None) -> str:
    """A whole number with thin spaces between thousands."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return figure(value)
    return f"{value:,}".replace(",", NARROW_SPACE)


def several(number: int | float, singular: str, plural: str | None = None) -> str:
    """``1 key``, ``2 keys``, ``2.50 sweeps``."""
    return f"{count(number)} {singular if number == 1 else plural or singular + 's'}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if not math.isfinite(seconds):
        return figure(seconds)
    return f"{figure(seconds)} s" if seconds < 300 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def memory(size: int | float) -> str:
    if isinstance(size, float) and not math.isfinite(size):
        return figure(size)
    return f"{size / 2**30:.1f} GiB" if size > 0 else "memory unknown"


def shape(rows: int, n: int) -> str:
    return f"{rows}×{n}"


def listed(parts: list[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def letters(index: int) -> str:
    """The mark of footnote ``index``: a, b, …, z, aa, ab, …"""
    mark = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        mark = chr(ord("a") + rest) + mark
    return mark
