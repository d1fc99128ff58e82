"""What ``train_bytes.py`` saw, for people: a table, sentences that the numbers bear out, and a plot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Json = dict[str, Any]

# Wong's palette (Nature Methods 8, 441), told apart by colour-blind people; a line style each as well
LOOKS: dict[str, Any] = {
    "exact": ("exact", "#0072b2", "-"),
    "published": ("coordinate descent", "#d55e00", "--"),
    "hard": ("hard top-k", "#117733", "-."),
    "random": ("random", "#6e7782", ":"),
    "soft": ("exact, soft gates", "#aa4499", (0, (6, 2))),
}
PAIRS = (
    ("exact", "hard"),
    ("published", "hard"),
    ("soft", "hard"),
    ("exact", "random"),
    ("published", "random"),
    ("hard", "random"),
    ("exact", "published"),
)


def show(evidence: Json) -> None:
    """Prints the table and the sentences."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
    settings = evidence["settings"]
    console.print(
        f"{evidence['device']['name']}, {evidence['date'][:10]}: {evidence['parameters']:,} parameters, context"
        f" {settings['context']:,}, {settings['steps']:,} steps of {settings['batch'] * settings['context']:,} bytes,"
        f" {evidence.get('objective', 'changed')} bytes are restored" + ("" if evidence["complete"] else "; cut short")
    )
    table = Table(box=box.SIMPLE)
    for title in ("routing", "loss, bits per byte", "of changed bytes", "changed among routed", "tokens/s"):
        table.add_column(title, justify="left" if title == "routing" else "right")
    for method in evidence["methods"]:
        if method["runs"]:
            last = [run["validation"][-1] for run in method["runs"]]
            table.add_row(
                method["says"],
                _spread([point["loss"] for point in last]),
                _spread([point["loss_of_changed"] for point in last]),
                f"{_mean([point['routed_are_changed']['feed-forward'] for point in last]):.0%}",
                f"{_mean([run['tokens_per_second'] for run in method['runs']]):,.0f}",
            )
    console.print(table)
    for sentence in sentences(evidence):
        console.print(sentence)


def sentences(evidence: Json) -> list[str]:
    """Pairs of methods, compared seed by seed: weights at the start and batches were the same."""
    losses = {
        method["name"]: {run["seed"]: run["validation"][-1]["loss"] for run in method["runs"]} for method in evidence["methods"]
    }
    told = []
    for one, other in PAIRS:
        seeds = sorted(losses.get(one, {}).keys() & losses.get(other, {}).keys())
        if seeds:
            less = [losses[other][seed] - losses[one][seed] for seed in seeds]
            mean, wins, where = _mean(less), sum(value > 0 for value in less), "below" if _mean(less) > 0 else "above"
            told.append(
                f"{LOOKS[one][0]} ends {abs(mean):.4f} bits a byte {where} {LOOKS[other][0]} on average, and below it with"
                f" {wins} of {len(seeds)} seeds ({min(less):+.4f} to {max(less):+.4f} bits less)"
            )
    return told


def plot(evidence: Json, path: Path) -> None:
    """Two panels over the training steps: validation loss, and what the feed-forward's router picks. SVG or PNG.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not any(method["runs"] for method in evidence["methods"]):
        raise ValueError("evidence has no runs; allowed is what train_bytes.py wrote after one at least")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.hashsalt": "coordroute", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        loss, share = figure.subplots(1, 2)
        for method in evidence["methods"]:
            if not method["runs"]:
                continue
            label, color, style = LOOKS[method["name"]]
            runs = [run["validation"] for run in method["runs"]]
            steps = [point["step"] for point in runs[0]]
            for axes, read in (
                (loss, lambda point: point["loss"]),
                (share, lambda point: 100 * point["routed_are_changed"]["feed-forward"]),
            ):
                values = [[read(point) for point in run] for run in runs]
                columns = list(zip(*values, strict=True))
                axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.18, linewidth=0)
                axes.plot(steps, list(map(_mean, columns)), style, color=color, linewidth=1.8, label=label)
        # the first steps fall so far that nothing else could be told apart
        drawn = [point["loss"] for method in evidence["methods"] for run in method["runs"] for point in run["validation"][1:]]
        low, high = min(drawn), max(drawn)
        loss.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        loss.set(xlabel="training step", ylabel="validation loss (bits per byte)")
        share.set(xlabel="training step", ylabel="changed bytes among those routed\nto the heavy feed-forward (%)")
        share.set_ylim(bottom=0)
        share.axhline(100 / evidence["settings"]["share"], color="#59636f", linewidth=0.8)
        share.annotate(
            "by chance",
            (1.0, 100 / evidence["settings"]["share"]),
            xycoords=("axes fraction", "data"),
            va="bottom",
            ha="right",
            color="#59636f",
        )
        for axes in (loss, share):
            axes.grid(color="#d0d7df", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.set_xlim(left=0)
        seeds = max(len(method["runs"]) for method in evidence["methods"])
        figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        figure.supxlabel(
            f"mean and range of {seeds} seeds; {evidence['device']['name']}, {evidence['date'][:10]}", fontsize=9, color="#59636f"
        )
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _spread(values: list[float]) -> str:
    return f"{_mean(values):.4f} ({min(values):.4f}–{max(values):.4f})"


def _mean(values: Any) -> float:
    return sum(values) / len(values)
