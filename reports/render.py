"""Rendering: JSON files in; HTML pages, the same as Markdown, and plots out."""

from __future__ import annotations

from pathlib import Path

from . import comparison, document, evidence, markdown, page, plots


def render(input: Path, output: Path) -> list[Path]:
    """Renders the evidence of one device, and a comparison of implementations that were verified.

    The result depends on the files alone: the same files give the same bytes. Nothing is fetched and nothing is measured;
    what a file does not say is said to be missing.

    Args:
        input: folder with at least one of autotune.json, verify.json, benchmark.json and verify-*.json. The last, of other
            implementations, are compared with each other and with verify.json. sanitize.json, exhaustive.json, replay.json,
            mutants.json and false-alarms.json may lie beside them.
        output: folder to write to; it may be the same and is made where it does not exist.

    Returns:
        What was written: report.html, which needs no other file, report.md, and the plots to which that one refers, among them
        speed.svg where times were measured beside torch.softmax; where there is a verify-*.json also comparison.html and .md, and
        no report where there is nothing else.

    Raises:
        ValueError: no such file in ``input``, one that is not what its name says, or files of different devices.
        ModuleNotFoundError: matplotlib is not installed and there is something to plot.
    """
    found = evidence.load(Path(input))
    made = {"report": document.build(found)} if found.reported() else {}
    if found.compared():
        made[comparison.NAME] = comparison.build(found.compared())
    texts: dict[str, str] = {}
    for name, one in made.items():
        texts |= {f"{name}.html": page.render(one), f"{name}.md": markdown.render(one)}
        texts |= {f"{plot}.svg": plots.standalone(svg) for plot, svg in one.files().items()}
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, words in texts.items():
        path = output / name
        path.write_text(words, encoding="utf-8", newline="\n")
        written.append(path)
    return written
