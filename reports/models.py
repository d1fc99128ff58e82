"""The chapter on models: a training run that routes in several ways, and CoLT5-attention as published beside patched."""

from __future__ import annotations

from collections.abc import Sequence

from . import text
from .blocks import Block, Cell, Column, Heading, Table, Words
from .evidence import Json


def chapter(training: Json | None, colt5: Sequence[Json]) -> list[Block]:
    """What was seen in models; nothing where there is no file."""
    if training is None and not colt5:
        return []
    blocks: list[Block] = [Heading("In models", anchor="models")]
    blocks += [] if training is None else _training(training)
    for one in colt5:
        blocks += _colt5(one)
    return blocks


def _spread(values: list[float], digits: int) -> Cell:
    mean = sum(values) / len(values)
    return Cell(f"{mean:.{digits}f}", f"{min(values):.{digits}f}–{max(values):.{digits}f}")


def _training(data: Json) -> list[Block]:
    settings = data["settings"]
    step = text.count(settings["batch"] * settings["context"])
    said = (
        f"A byte encoder with a context of {text.count(settings['context'])} restores bytes of source code that were replaced; its "
        f"large branch sees one byte in {settings['share']}. {text.count(data['parameters'])} parameters, "
        f"{text.count(settings['steps'])} steps of {step} bytes, the same weights and batches "
        f"for every method of a seed ({data['command']}; {data['device']['name']}, {data['date'][:10]})."
    )
    columns = [Column("routing", False), Column("bits a byte", sub="mean, range of seeds"), Column("seeds"), Column("tokens/s")]
    made = []
    for method in data["methods"]:
        if method["runs"]:
            losses = [run["validation"][-1]["loss"] for run in method["runs"]]
            speed = sum(run["tokens_per_second"] for run in method["runs"]) / len(losses)
            made.append([Cell(method["says"]), _spread(losses, 4), Cell(str(len(losses))), Cell(text.count(round(speed)))])
    blocks: list[Block] = [Words(said), Table("Validation loss at the end", columns, made)]
    return blocks if data["complete"] else [*blocks, Words("The run was cut short.", "missing")]


def _colt5(data: Json) -> list[Block]:
    same = data["same"]
    held = sum(one["ok"] for one in same)
    said = (
        f"CoLT5-attention {data['package_version']} patched with coordroute.patch_colt5(), against itself as published: "
        f"{held} of {text.several(len(same), 'comparison')} of outputs and gradients within their limit ({data['device']['name']}, "
        f"{data['date'][:10]}; batch {data['sizes']['batch']}, length {text.count(data['sizes']['length'])})."
    )
    columns = [Column("training step of", False), Column("published with", False), Column("published ms"), Column("patched ms")]
    columns.append(Column("speed-up", sub="95 % interval"))
    made = []
    for row in data["speed"]:
        low, high = row["speedup_ci"]
        times = [Cell(text.figure(row[who]["median_us"] / 1000)) for who in ("published", "patched")]
        made.append(
            [Cell(row["what"]), Cell(row["published_path"]), *times, Cell(f"{row['speedup']:.2f}×", f"{low:.2f}–{high:.2f}")]
        )
    return [
        Words(said, "pass" if held == len(same) else "fail"),
        Table(f"A training step of the modules of CoLT5-attention {data['package_version']}", columns, made),
    ]
