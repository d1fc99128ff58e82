"""A page as HTML that needs nothing but itself: styles and plots are inside, and there is no script."""

from __future__ import annotations

from html import escape

from . import plots
from .blocks import Block, Cell, Column, Document, Failure, Heading, Plot, Plots, Table, Tiles, Words

STYLE = """\
:root{--ink:#1f2329;--muted:#59636f;--line:#d0d7df;--faint:#eceff3;--lane:#f3f5f8;--paper:#fff;--link:#0a5a94;
--pass:#1a7f4b;--fail:#b3261e;--warn:#8a6100;--passbg:#eaf6ef;--failbg:#fdeeed;--warnbg:#fdf6e3;--ours:#eaf3fa}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e6edf3;--muted:#9aa6b2;--line:#343d47;--faint:#232b33;--lane:#1b222a;
--paper:#11161c;--link:#7cc0f5;--pass:#56c98b;--fail:#ff8a80;--warn:#e3b341;--passbg:#12271d;--failbg:#331a19;--warnbg:#2b2413;
--ours:#162533}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:1140px;padding:28px 24px 64px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
h1{font-size:30px;line-height:1.2;margin:2px 0 4px;overflow-wrap:anywhere}
h2{font-size:22px;margin:52px 0 8px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:17px;margin:28px 0 8px}
h4{font-size:14px;margin:24px 0 6px;font-weight:600}
p{margin:8px 0;max-width:80ch;overflow-wrap:anywhere}
.brand{margin:0;color:var(--muted);font-weight:600;letter-spacing:.02em}
.facts{margin:0;color:var(--muted)}
.verdict{margin:18px 0 14px;padding:12px 16px;max-width:none;font-size:17px;border-left:5px solid var(--line);
background:var(--lane);border-radius:0 6px 6px 0}
.verdict.pass{border-color:var(--pass);background:var(--passbg)}
.verdict.fail{border-color:var(--fail);background:var(--failbg)}
.verdict.missing{border-color:var(--warn);background:var(--warnbg)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px}
a{color:var(--link)}
.words,figcaption,.notes{color:var(--muted)}
p.missing,p.fail{padding:8px 12px;border-left:4px solid var(--warn);background:var(--warnbg);max-width:none}
p.pass{padding:8px 12px;border-left:4px solid var(--pass);background:var(--passbg);max-width:none}
p.fail{border-color:var(--fail);background:var(--failbg)}
.tiles{display:grid;grid-template-columns:repeat(3,1fr);gap:12px;margin:20px 0}
.tile{border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.tile dt{font-size:13px;color:var(--muted)}
.tile dd{margin:0;font-size:13px;color:var(--muted);line-height:1.4}
.tile dd b{display:block;font-size:25px;line-height:1.3;color:var(--ink);font-weight:650;font-variant-numeric:tabular-nums;
white-space:nowrap}
.tile.pass b{color:var(--pass)}.tile.fail b{color:var(--fail)}.tile.missing b{color:var(--warn)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px;margin:14px 0;align-items:start}
figure{margin:0;border:1px solid var(--line);border-radius:8px;padding:8px 8px 10px;max-width:720px;break-inside:avoid}
figure svg{display:block;width:100%;height:auto}
figcaption{font-size:13px;line-height:1.4;padding:6px 6px 0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:6px 0}
table{border-collapse:collapse;font-size:13px;line-height:1.35;font-variant-numeric:tabular-nums}
th,td{padding:5px 9px 5px 7px;text-align:left;vertical-align:top;border-bottom:1px solid var(--faint)}
thead th{vertical-align:bottom;border-bottom:1px solid var(--line);color:var(--muted);font-weight:600;min-width:64px}
tbody th{font-weight:400;white-space:nowrap;position:sticky;left:0;background:var(--paper);padding-left:0}
thead th:first-child{padding-left:0;white-space:nowrap}
tbody th small{white-space:normal;max-width:26em}
td b,th b{font-weight:400;white-space:nowrap}
td small,th small{display:block;color:var(--muted);font-size:12px}
td:last-child:not(.number){min-width:9em}
td:last-child:not(.number) b{white-space:normal}
.number{text-align:right}
.ours{background:var(--ours)}
.strong b{font-weight:650}
.muted,.muted b{color:var(--muted)}
.facets td{min-width:10.5em}.facets td b{white-space:normal}
.facets thead small{font-weight:400}
.facets tbody th{white-space:normal;min-width:11em}
.checks .bar{min-width:70px}.checks thead small{font-weight:400}
.prose td:not(.number){min-width:15em;max-width:44em}
.prose th b,.prose td:not(.number) b{white-space:normal;overflow-wrap:anywhere}
.prose tbody th{white-space:normal;min-width:9em;max-width:16em}
.goals td:nth-child(3){min-width:14em}.goals td:nth-child(3) b{white-space:normal}
td.pass b{color:var(--pass)}td.fail b{color:var(--fail);font-weight:650}
td.fail{background:var(--failbg)}
.bar{display:block;height:5px;margin:3px 0;min-width:88px;max-width:170px;border-radius:3px;background:var(--faint);overflow:hidden}
.bar i{display:block;height:100%;background:var(--pass)}
.fail .bar i{background:var(--fail)}
sup{font-size:10px;line-height:0;font-weight:400;color:var(--muted);margin-left:1px}
.notes{list-style:none;margin:4px 0 16px;padding:0;font-size:12.5px;max-width:100ch;overflow-wrap:anywhere}
.failure{border:1px solid var(--fail);border-left-width:5px;border-radius:6px;padding:2px 16px 10px;margin:16px 0}
.failure h4,.failure summary{color:var(--fail);margin-top:10px;overflow-wrap:anywhere}
pre{background:var(--lane);border:1px solid var(--line);border-radius:6px;padding:10px 12px;overflow-x:auto;
font-size:12.5px;line-height:1.45}
code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
details{margin:10px 0}
summary{cursor:pointer;font-size:14px;font-weight:600}
@media (max-width:600px){body{padding:18px 14px 48px}h1{font-size:24px}.verdict{font-size:16px}
.tiles{grid-template-columns:repeat(2,1fr);gap:8px}.tile{padding:8px 10px}.tile dd b{font-size:19px}
figure{padding:6px 2px 8px}th,td{padding-right:9px}
.goals tbody th{max-width:9.5em}.goals tbody th b{white-space:normal;overflow-wrap:anywhere}}
@media print{body{max-width:none;padding:0;font-size:11pt}nav{display:none}.scroll{overflow:visible}tbody th{position:static}
table{font-size:8.5pt}td small,th small{font-size:8pt}tr,.tile,.failure{break-inside:avoid}h2,h3,h4{break-after:avoid}
.plots{grid-template-columns:1fr 1fr}details::details-content{content-visibility:visible;block-size:auto}
pre{white-space:pre-wrap;overflow-wrap:anywhere}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""

NAVIGATION = (
    ("targets", "Targets"),
    ("speed", "Speed"),
    ("tuning", "Tuning"),
    ("landscape", "Landscape"),
    ("replay", "Search"),
    ("correctness", "Correctness"),
    ("mutants", "Mutants"),
    ("sanitizers", "Sanitizers"),
    ("properties", "Properties"),
    ("facets", "Kinds of input"),
    ("counterexamples", "Counterexamples"),
    ("method", "Method"),
)


def render(document: Document) -> str:
    """The whole page."""
    anchors = {block.anchor for block in document.blocks if isinstance(block, Heading)}
    links = "".join(f'<a href="#{anchor}">{words}</a>' for anchor, words in NAVIGATION if anchor in anchors)
    body = "\n".join(_block(block) for block in document.blocks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(document.title)}</title>
<style>
{STYLE}
{plots.STYLE}
</style>
</head>
<body>
<header>
<p class="brand">coordroute</p>
<h1>{escape(document.heading)}</h1>
<p class="facts">{escape(document.subtitle)}</p>
<p class="verdict {document.verdict.tone}">{escape(document.verdict.words)}</p>
<nav>{links}</nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _block(block: Block) -> str:
    match block:
        case Heading():
            anchor = f' id="{escape(block.anchor)}"' if block.anchor else ""
            return f"<h{block.level}{anchor}>{escape(block.words)}</h{block.level}>"
        case Words():
            code = f"<pre><code>{escape(block.code)}</code></pre>" if block.code else ""
            return f'<p class="{block.tone or "words"}">{escape(block.words)}</p>{code}'
        case Tiles():
            tiles = "".join(
                f'<div class="tile {tile.tone}"><dt>{escape(tile.name)}</dt>'
                f"<dd><b>{escape(tile.value)}</b> {escape(tile.more)}</dd></div>"
                for tile in block.tiles
            )
            return f'<dl class="tiles">{tiles}</dl>'
        case Plots():
            return _plots([plot for plot in block.plots if plot.on_page])
        case Table():
            return _table(block)
        case Failure():
            code = f"<pre><code>{escape(block.code)}</code></pre>" if block.code else ""
            words = f"<p>{escape(block.message)}</p>{code}"
            if block.folded:
                return f'<details class="failure"><summary>✗ {escape(block.title)}</summary>{words}</details>'
            return f'<section class="failure"><h4>✗ {escape(block.title)}</h4>{words}</section>'


def _plots(shown: list[Plot]) -> str:
    def caption(plot: Plot) -> str:
        return f"<figcaption>{escape(plot.caption)}</figcaption>\n" if plot.caption else ""

    figures = "\n".join(f"<figure>\n{plot.svg}{caption(plot)}</figure>" for plot in shown)
    return f'<div class="plots">\n{figures}\n</div>' if shown else ""


def _table(table: Table) -> str:
    def kind(number: bool, ours: bool, tone: str = "") -> str:
        names = [name for name, on in (("number", number), ("ours", ours), (tone, bool(tone))) if on]
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(f'<th scope="col"{kind(c.number, c.ours)}>{_head(c)}</th>' for c in table.columns)
    lines = []
    for row in table.rows:
        cells = []
        for i, (cell, column) in enumerate(zip(row, table.columns, strict=True)):
            tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
            tip = f' title="{escape(cell.tip)}"' if cell.tip else ""
            cells.append(f"<{tag}{scope}{kind(column.number, column.ours, cell.tone)}{tip}>{_cell(cell)}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    inner = (
        f"<table{kind(False, False, table.kind)}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody>\n</table>"
    )
    inner = f'<div class="scroll">{inner}</div>'
    notes = "".join(f"<li>{f'<sup>{letter}</sup> ' if letter else ''}{escape(words)}</li>" for letter, words in table.notes)
    inner += f'<ul class="notes">{notes}</ul>' if notes else ""
    if table.folded:
        return f"<details><summary>{escape(table.title)}</summary>{inner}</details>"
    return (f"<h4>{escape(table.title)}</h4>" if table.title else "") + inner


def _head(column: Column) -> str:
    return escape(column.head) + (f"<small>{escape(column.sub)}</small>" if column.sub else "")


def _cell(cell: Cell) -> str:
    marks = f"<sup>{', '.join(cell.marks)}</sup>" if cell.marks else ""
    bar = ""
    if cell.bar is not None:
        share = 100.0 if cell.bar != cell.bar else min(100.0, max(0.0, 100 * cell.bar))
        bar = f'<span class="bar"><i style="width:{share:.1f}%"></i></span>'
    sub = "".join(f"<small>{escape(line)}</small>" for line in cell.sub.splitlines())
    return f"<b>{escape(cell.main)}{marks}</b>{bar}{sub}"
