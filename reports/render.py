"""Rendering: the JSON files of autotune, verify and benchmark in, one HTML page, Markdown tables and plots out."""

from __future__ import annotations

from pathlib import Path

from . import document, evidence, markdown, page, plots


def render(input: Path, output: Path) -> list[Path]:
    """Renders the evidence of one device.

    The result depends on the files alone: the same files give the same bytes. Nothing is fetched and nothing is measured;
    what a file does not say is said to be missing.

    Args:
        input: folder with at least one of autotune.json, verify.json and benchmark.json.
        output: folder to write to; it may be the same and is made where it does not exist.

    Returns:
        What was written: report.html, which needs no other file, report.md, and the plots to which that one refers, among them
        speed.svg where times were measured beside torch.softmax.

    Raises:
        ValueError: no such file in ``input``, one that is not what its name says, or files of different devices.
        ModuleNotFoundError: matplotlib is not installed and there is something to plot.
    """
    made = document.build(evidence.load(Path(input)))
    texts = {"report.html": page.render(made), "report.md": markdown.render(made)}
    texts |= {f"{name}.svg": plots.standalone(svg) for name, svg in made.files().items()}
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, words in texts.items():
        path = output / name
        path.write_text(words, encoding="utf-8", newline="\n")
        written.append(path)
    return written
