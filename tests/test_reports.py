"""Reports. All evidence here is SYNTHETIC: figures from a formula, of a device that does not exist, in the files' own format."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from coordroute.autotune import targets
from coordroute.reports import candidates, comparison, evidence, markdown, plots, summary, text, tuning
from coordroute.reports.render import render

DEVICE = {
    "name": "SYNTHETIC GPU (no such device)",
    "sm_count": 132,
    "capability": "9.0",
    "memory_bytes": 85_000_000_000,
    "driver": "000.00",
}
VERSIONS = {"coordroute": "0.1.0", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.1", "cuda": "12.9"}
SHAPES = ((1024, 8192), (4096, 2048), (65536, 256), (32, 8192), (8, 1024), (4, 131072), (1, 1048576))
COMPILED = ((1024, 8192), (4, 131072))
TUNED_SHAPES = ((1024, 8192), (1024, 2048), (4096, 256), (64, 32768), (4, 131072))
DTYPES = ("float16", "bfloat16", "float32", "float64")
PLOTTED = ("bfloat16", "float32")
FACETS = {"plain": "normal scores", "masks": "rows with holes", "long rows": "very long ones"}
PROPERTIES = ("runs", "values", "grad scores", "grad k", "budget", "stationarity", "replays bitwise", "inputs untouched", "scale")

# (op, implementation, forward and backward relative to softmax, floor in µs, dtypes)
CONTENDERS = (
    ("copy", "copy", 0.6, None, 1.7, 2),
    ("softmax", "torch.softmax", 1.0, 1.0, 4.5, 2),
    ("topk", "torch.topk", 6.0, None, 20.0, 1),
    ("soft_topk", "coordroute", 1.2, 0.5, 3.0, 2),
    ("coordinate_descent", "coordroute", 1.5, 1.2, 10.0, 2),
    ("coordinate_descent", "eager published recurrence", 90.0, 60.0, 400.0, 1),
    ("coordinate_descent", "torch.compile of the published recurrence", 12.0, 8.0, 70.0, 1),
    ("coordinate_descent", "colt5-attention 0.9.0", 13.0, 25.0, 55.0, 1),
    ("budget_sparsemax", "entmax budget_bisect 1.3", 40.0, 5.0, 250.0, 1),
    ("soft_topk", "a new one", 3.0, 2.0, 20.0, 1),
)


def head(command):
    return {
        "schema": 1,
        "command": command,
        "device": dict(DEVICE),
        "versions": dict(VERSIONS),
        "date": "2025-01-02T03:04:05+00:00",
    }


def synthetic_benchmark(shapes=SHAPES):
    rng = random.Random(0)
    results = []
    for rows, n in shapes:
        for d, dtype in enumerate(("float32", "bfloat16")):
            for direction in ("forward", "backward"):
                for op, implementation, forward, backward, floor, dtypes in CONTENDERS:
                    factor = forward if direction == "forward" else backward
                    if factor is None or d >= dtypes:
                        continue
                    row = {"op": op, "implementation": implementation, "direction": direction, "dtype": dtype, "rows": rows, "n": n}
                    row |= {"k": 9 * n / 64, "n_iters": 20, "median_us": None, "ci_us": None, "samples": 0, "method": ""}
                    if implementation.startswith("colt5") and n > 131072:
                        row["status"] = "skipped: RuntimeError: n = 1048576 is more than a program holds"
                    elif implementation.startswith("torch.compile") and (rows, n) not in COMPILED:
                        row["status"] = "skipped: measured only at 1024x8192, 4x131072, since each shape is compiled"
                    else:
                        base = 4.0 + rows * n * 5e-6 / (d + 1) + (n / 6000 if rows < 132 else 0) * (implementation != "coordroute")
                        median = round((floor + factor * base) * rng.uniform(0.85, 1.15), 4)
                        wide = rng.uniform(0.002, 0.05)
                        row |= {"median_us": median, "ci_us": [round(median * (1 - wide), 4), round(median * (1 + wide), 4)]}
                        method = f"CUDA graphs of {rng.randint(2, 90)} calls, {rng.randint(1, 16)} input set(s)"
                        row |= {"samples": 21, "method": method, "status": "ok"}
                    results.append(row)
    settings = {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7, "k": "9n/64; torch.topk: n/8"}
    return {**head("benchmark"), "seconds": 81.2, "method": "SYNTHETIC: from a formula", "settings": settings, "results": results}


def judged(data, **measured):
    """The same evidence of the benchmark with what it says to the targets."""
    found = targets.evaluate(targets.Measured("cuda", data["results"], **measured))
    return data | {"targets": found, "cpu": {"device": dict(DEVICE, name="SYNTHETIC CPU"), "threads": 2, "results": []}}


MEMORY = [
    {"op": op, "dtype": dtype, "rows": 1024, "n": 8192, "floats_a_row": kept, "growth": 0.0, "status": "ok"}
    for op, kept in (("soft_topk", 2.0), ("coordinate_descent", 20.0))
    for dtype in ("float32", "bfloat16")
]
HOST = {"bare_us": 40.0, "soft_topk_us": 50.0, "coordinate_descent_us": 70.0}


def synthetic_autotune(shapes=TUNED_SHAPES, dtypes=("float32", "bfloat16")):
    rng = random.Random(1)
    keys = []
    for dtype in dtypes:
        for rows, n in shapes:
            for op in ("soft_topk", "coordinate_descent"):
                for direction in ("forward", "backward"):
                    default = (5 + rows * n * 6e-6) * rng.uniform(1, 4)
                    gain = rng.choice([1.0, 1.0, rng.uniform(1.02, 1.2), rng.uniform(1.1, 2.6)])
                    keys.append(synthetic_key(rng, op, direction, dtype, rows, n, default, gain))
    keys[3] |= {"config": None, "timing": None, "gain": None}
    gains = [key["gain"] for key in keys if key["gain"]]
    mean = round(math.exp(sum(map(math.log, gains)) / len(gains)), 4)
    dropped = {"wrong": len(keys), "spills": 2 * len(keys), "keys left out: out of time": 6}
    made = {**head("autotune"), "seconds": 127.0, "effort": "quick", "file": "synthetic.json"}
    proofs = {"requests": 24, "seconds": 61.5, "longest": 12.25, "longest_about": "soft_topk float32 1x1048576"}
    made["requests"] = {"prove": proofs, "warm": {"requests": 1, "seconds": 2.0, "longest": 2.0, "longest_about": ""}}
    return made | {"resumed": 4, "seconds_before": 0.0, "keys": keys, "dropped": dropped, "geometric_mean_gain": mean}


def synthetic_key(rng, op, direction, dtype, rows, n, default, gain):
    median = default / gain
    segments = 20 if op == "coordinate_descent" else None
    config = {"variant": "resident", "block": n, "rows_per_program": 1, "num_warps": 8, "num_stages": 1}
    config |= {"checkpoint_segments": segments, "num_threads": 0}
    candidates = [{"status": status, "reason": "", "median_us": median} for status in ["timed"] * 4 + ["slower"] * 3]
    candidates += [{"status": "spills", "reason": f"spills {rng.choice([64, 128])} bytes", "median_us": None}] * 2
    candidates += [{"status": "wrong", "reason": f"'values' fails: error {rng.choice('123')}e-3", "median_us": None}]
    timing = {"median_us": round(median, 4), "ci_us": [round(median * 0.98, 4), round(median * 1.03, 4)]}
    timing |= {"default_us": round(default, 4), "samples": 25, "method": "CUDA graphs of 40 calls, 4 input set(s)"}
    key = {"op": op, "direction": direction, "dtype": dtype, "rows": rows, "n": n}
    return {"key": key, "config": config, "timing": timing, "gain": round(gain, 4), "candidates": candidates}


def launch(block=1024, warps=4, rows=1, programs=1, **more):
    config = {"variant": "split" if programs > 1 else "resident", "block": block, "rows_per_program": rows, "num_warps": warps}
    config |= {"num_stages": 1, "checkpoint_segments": None, "num_threads": 0, "programs_per_row": programs, "max_registers": 0}
    return config | more


LANDSCAPES = [
    {"op": op, "direction": direction, "dtype": "float32", "rows": rows, "n": n}
    for rows, n in ((4096, 256), (1024, 8192), (1, 1048576))
    for op in ("soft_topk", "coordinate_descent")
    for direction in ("forward", "backward")
]


def synthetic_exhaustive(keys=LANDSCAPES, rounds=9):
    """Every key: the default first; the least time of each kind at its own number of warps; some that are dropped."""
    rng = random.Random(3)
    made = []
    for key in keys:
        n = key["n"]
        kinds = [(n, rows, 1) for rows in (1, 2, 4, 8)] if n < 2048 else [(n, 1, 1)]
        kinds = [(8192, 1, n // 8192), (16384, 1, n // 16384)] if n > 32768 else kinds
        candidates = []
        for block, rows, programs in kinds:
            for warps in (1, 2, 4, 8, 16, 32):
                for cap in (0, 64):
                    config = launch(block, warps, rows, programs, max_registers=cap)
                    one = {"config": config, "status": "timed", "samples": None, "registers": 40, "spills": 0, "same_as": None}
                    if block / warps > 4096:
                        one |= {"status": "spills", "spills": 64}
                    elif cap and warps == 8:
                        one["same_as"] = len(candidates) - 1
                    else:
                        time = (4 + key["rows"] * n * 4e-6) * (1 + 0.3 * abs(math.log2(warps / (4 * rows)))) * (1 + cap / 1000)
                        one["samples"] = [round(time * rng.uniform(0.99, 1.01), 4) for _ in range(rounds)]
                    candidates.append(one)
        default = next(i for i, one in enumerate(candidates) if one["samples"])
        made.append({"key": dict(key), "default": default, "seeds": [default, len(candidates) - 1], "candidates": candidates})
    return {**head("exhaust"), "rounds": rounds, "method": "SYNTHETIC: rounds of all candidates", "keys": made}


STRATEGIES = {"local race (ours)": 0.06, "random": 0.1, "all of a few": 0.3, "exhaustive": 1.0}


def synthetic_replay(seeds=10):
    rng = random.Random(4)
    strategies = []
    for i, (name, share) in enumerate(STRATEGIES.items()):
        keys = []
        for j, key in enumerate(LANDSCAPES):
            regret = [0.004 * (1 + 3 * i) * rng.random() for _ in range(seeds)]
            candidates = 20 if j % 2 else 60
            shares = [share * (2 if j % 2 else 1) * rng.uniform(0.9, 1.0) for _ in range(seeds)]
            keys.append({"key": dict(key), "candidates": candidates, "regret": regret, "share": shares, "agreement": 1.0})
        curve = [[share / 2**k, 0.002 * (1 + i) * 2**k, 0.008 * (1 + i) * 2**k] for k in range(5)]
        one = {"name": name, "text": f"What {name} does.", "keys": keys, "stable": 1.0, "curve": curve}
        one |= {"regret": {"median": 0.004, "p95": 0.02, "worst": 0.03}, "share": {"median": share, "worst": 2 * share}}
        strategies.append(one)
    made = {**head("replay"), "source": "exhaustive.json", "seeds": seeds}
    return made | {"full_launches": "samples of an exhaustive search: candidates x rounds", "strategies": strategies}


def synthetic_verify(fails=False):
    rng = random.Random(2)
    rows, failures = [], []
    for op in ("soft_topk", "coordinate_descent"):
        for dtype in DTYPES:
            for name in PROPERTIES:
                ratio = rng.uniform(0, 0.9)
                row = {"op": op, "property": name, "sentence": f"what {name} says", "derivation": f"how {name} is bounded"}
                row |= {"dtype": dtype, "cases": rng.randint(200, 4000), "failing_facets": []}
                row |= {"left_out": rng.choice([0, 0, 12]), "worst_error": ratio * 4e-7, "bound": 4e-7, "worst_ratio": ratio}
                row |= {"worst_family": "cauchy", "verdict": "pass", "reason": ""}
                if name in ("replays bitwise", "inputs untouched", "runs"):
                    row |= {"worst_error": 0.0, "bound": 0.0, "worst_ratio": 0.0}
                if name == "scale" and dtype == "float16":
                    nothing = {
                        "cases": 0,
                        "left_out": 0,
                        "worst_error": None,
                        "bound": None,
                        "worst_ratio": None,
                        "worst_family": None,
                    }
                    row |= nothing | {"verdict": "not run", "reason": "no case came to it"}
                if fails and name == "grad scores" and dtype == "float32":
                    row |= {"worst_error": math.inf, "worst_ratio": math.inf, "verdict": "fail", "reason": "row 3 is not finite"}
                    row["failing_facets"] = ["masks"]
                    failures.append(synthetic_failure(op, name, dtype))
                rows.append(row)
    made = {**head("verify"), "seconds": 12.3, "seed": 0, "examples": 25, "target": "coordroute", "ok": not failures}
    made |= {"target_version": "coordroute 0.1.0", "properties": rows, "failures": failures}
    return made | {"facets": synthetic_facets(rows), "distributions": synthetic_distributions(rng)}


def synthetic_facets(rows):
    made = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        for facet, sentence in FACETS.items():
            failed = [
                row["property"] for row in rows if (row["op"], row["dtype"]) == (op, dtype) and facet in row["failing_facets"]
            ]
            one = {"op": op, "dtype": dtype, "facet": facet, "sentence": sentence, "rows": 48, "failed": failed}
            one |= {"verdict": "fail" if failed else "pass", "reason": ""}
            if facet == "long rows":
                one |= {"rows": 0, "verdict": "not run", "reason": "no rows are that long"}
            made.append(one)
    return made


def synthetic_distributions(rng):
    made = []
    for op in ("soft_topk", "coordinate_descent"):
        for dtype in PLOTTED:
            for quantity in ("values", "grad scores", "variants"):
                one = {"op": op, "dtype": dtype, "quantity": quantity, "rows": 700}
                for whose, factor in (("ours", 1.0), ("plain", 2.5)):
                    p50 = factor * rng.uniform(0.3, 0.9)
                    bins = [[-24, 100], [-3, 200], [-1, 300], [1, 90], [9, 10]]
                    one[whose] = {"p50": p50, "p99.9": 600 * p50, "max": 12345.6 * factor, "histogram": bins}
                made.append(one)
    return made


def synthetic_other(name="theirs.ops:my_topk", version="theirs 2.0", op="coordinate_descent", dtypes=("float32", "bfloat16")):
    """verify's file of somebody else's operator, which fails in bfloat16."""
    made = synthetic_verify()
    rows = [row for row in made["properties"] if row["op"] == op and row["dtype"] in dtypes]
    failures = []
    for row in rows:
        if row["property"] in ("values", "scale") and row["dtype"] == "bfloat16":
            row |= {"verdict": "fail", "failing_facets": ["masks"], "worst_ratio": 7.0}
            failures.append(synthetic_failure(op, row["property"], "bfloat16"))
    made |= {"target": name, "target_version": version, "ok": not failures, "properties": rows, "failures": failures}
    return made | {"facets": synthetic_facets(rows), "distributions": []}


def synthetic_mutants():
    names = {
        "load without mask": "killed",
        "root moved": "killed",
        "same <thing>": "survived",
        "unseen": "survived",
        "gpu": "not run",
    }
    rows = []
    for name, verdict in names.items():
        row = {"name": name, "sentence": f"what {name} breaks", "file": "kernels/rows.py", "op": "both", "where": ["gpu"]}
        row |= {"place": "gpu", "verdict": verdict, "property": None, "check": None, "counterexample": None, "properties": []}
        row |= {"seconds": 3.25 if verdict != "not run" else None, "explanation": ""}
        if verdict == "killed":
            row |= {"property": "values", "check": "any length", "counterexample": f"{name}: error 1, bound 0.5"}
        rows.append(row)
    rows[2]["explanation"] = "the sum is the same"
    control = {"verdict": "passes", "places": ["gpu"], "checks": 38, "seconds": 9.0, "failures": []}
    made = {"device": DEVICE["name"], "versions": {"torch": "2.11.0"}, "date": "2025-01-02", "seconds": 200.5}
    return made | {"control": control, "mutants": rows}


def synthetic_alarms(*failures):
    made = {"device": DEVICE["name"], "versions": {"torch": "2.11.0"}, "date": "2025-01-02", "place": "gpu", "runs": 1000}
    return made | {"first_seed": 1, "checks": 38000, "parts": 1, "seconds": 400.0, "failures": list(failures)}


def synthetic_sanitize(errors=0):
    tools = []
    for tool in ("memcheck", "racecheck"):
        bad = errors if tool == "memcheck" else 0
        group = {"group": "soft_topk resident", "launches": 40, "planned": 40, "configurations": 10, "errors": bad, "foreign": 0}
        group |= {"verdict": "errors" if bad else "clean", "reason": "", "seconds": 12.5}
        row = {"tool": tool, "sees_planted_fault": True, "launches": 40, "configurations": 10, "errors": bad, "cases": []}
        row |= {"verdict": group["verdict"], "reason": "", "seconds": 61.2, "groups": [group], "reports": []}
        if bad:
            said = "Invalid __global__ write of size 4 bytes\nat _forward+0x12d0 in soft_topk.py:453"
            row["reports"] = [{"group": "soft_topk resident", "kernel": "_forward", "text": said}]
        tools.append(row)
    made = head("sanitize")
    made["versions"] |= {"compute-sanitizer": "2026.1.0"}
    return made | {"seconds": 130.0, "self_check": False, "ok": not errors, "tools": tools}


def synthetic_failure(op, name, dtype):
    message = f"{op} {dtype}, 1 row(s) of 7: {name}: FAILS; worst row 3: error inf, bound 4e-07"
    code = f'from coordroute import {op}\n\ncase = "```"  # {op} <{name}> & {dtype}\nprint({op}(case))'
    failure = {"op": op, "property": name, "dtype": dtype, "facet": "masks", "family": "cauchy", "error": math.inf, "bound": 4e-7}
    return failure | {"message": message, "reproducer": code}


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for command, data in files.items():
        (folder / f"{command}.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def everything(fails=False):
    return {"benchmark": synthetic_benchmark(), "autotune": synthetic_autotune(), "verify": synthetic_verify(fails)}


class Page(HTMLParser):
    """What a browser would make of a page: tags with attributes, ids, text, and whether tags are balanced."""

    EMPTY = ("meta", "br", "wbr", "img", "link", "hr", "input")

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open, self.errors = [], [], [], []
        self.feed(html)
        self.close()
        self.errors += self.open
        self.ids = [value for _, attributes in self.tags for name, value in attributes.items() if name == "id"]
        self.text = re.sub(r"[ \n]+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"/{tag}")

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Everything, with failures: (the evidence, name -> text of what was written)."""
    folder = tmp_path_factory.mktemp("report")
    data = everything(fails=True)
    write(folder / "in", **data)
    written = render(folder / "in", folder / "out")
    assert sorted(written) == sorted((folder / "out").iterdir())
    return data, {path.name: path.read_text(encoding="utf-8") for path in written}


def tables(markdown_text):
    """The tables of a Markdown text as lists of rows of cells."""
    found, lines = [], []
    for line in [*markdown_text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif lines:
            found.append(lines)
            lines = []
    return found


# --- what is written -------------------------------------------------------------------------------------------------


def test_what_is_written(rendered):
    _, files = rendered
    gains = {f"gain-{op}-{direction}.svg" for op in ("soft-topk", "coordinate-descent") for direction in ("forward", "backward")}
    errors = {"errors-soft-topk.svg", "errors-coordinate-descent.svg"}
    chosen = {name.replace("gain", "configurations") for name in gains}
    assert set(files) == {"report.html", "report.md", "speed.svg", "speed-bfloat16.svg"} | gains | chosen | errors
    linked = re.findall(r"\]\(([^)]*)\)", files["report.md"])
    assert set(linked) == set(files) - {"report.html", "report.md"}


def test_the_same_evidence_gives_the_same_bytes(rendered, tmp_path):
    """In another process, with another hash seed and with a user's own matplotlib settings."""
    data, files = rendered
    write(tmp_path / "in", **data)
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 7\nfont.size: 30\nsvg.fonttype: path\n")
    code = "import sys, pathlib; from coordroute.reports.render import render; render(*map(pathlib.Path, sys.argv[1:]))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    subprocess.run([sys.executable, "-c", code, tmp_path / "in", tmp_path / "out"], env=environment, check=True)
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()} == files


def test_the_page_needs_nothing_but_itself(rendered):
    _, files = rendered
    page = Page(files["report.html"])
    assert page.errors == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", files["report.html"])
    assert [tag for tag, _ in page.tags].count("svg") == 12 + 2 * len(PLOTTED)
    assert len(page.ids) == len(set(page.ids))
    for _, attributes in page.tags:
        for value in attributes.values():
            for target in re.findall(r"(?:^|url\()#([^)]+)", value or ""):
                assert target in page.ids


def test_the_plots_are_files_that_stand_alone(rendered):
    _, files = rendered
    for name, svg in files.items():
        if name.endswith(".svg"):
            root = ElementTree.fromstring(svg)
            width, height = map(float, root.get("viewBox").split()[2:])
            assert (float(root.get("width")), float(root.get("height"))) == (width, height)
            assert "prefers-color-scheme" in svg and "DejaVu Sans', 'Bitstream" not in svg
            assert not re.search(r'(href|src)="(?!#)', svg) and "<!--" not in svg and "metadata" not in svg


def test_every_color_of_a_plot_has_a_counterpart_in_dark_mode(rendered):
    _, files = rendered
    for name, svg in files.items():
        if name.endswith(".svg"):
            style, drawn = re.search(r"<style>(.*?)</style>(.*)", svg, re.DOTALL).groups()
            for what, color in set(re.findall(r"(fill|stroke): (#[0-9a-f]{6})", drawn)):
                assert f'[style*="{what}: {color}"]' in style, (name, what, color)


def test_nothing_of_a_plot_lies_outside(rendered):
    """Texts and markers: where they are anchored, that is; widths are the reader's font's."""
    _, files = rendered
    for name, svg in files.items():
        if name.endswith(".svg"):
            width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
            places = re.findall(r'<use [^>]*x="([-\d.]+)" y="([-\d.]+)"', svg)
            places += re.findall(r'<text[^>]*x="([-\d.]+)" y="([-\d.]+)"', svg)
            places += re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)", svg)
            assert len(places) > 15
            assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in places)


# --- what it says ----------------------------------------------------------------------------------------------------


def test_every_figure_of_the_benchmark_is_in_the_tables(rendered):
    data, files = rendered
    found = {}
    heads = re.findall(r"\*\*(\w+) (forward|backward): median µs, and × torch.softmax\*\*", files["report.md"])
    timed = [table for table in tables(files["report.md"]) if table[0][0] == "rows × n"]
    assert len(heads) == len(timed) == 4
    for (dtype, direction), (head, _, *rows) in zip(heads, timed, strict=True):
        for row in rows:
            for label, cell in zip(head[1:], row[1:], strict=True):
                found[dtype, direction, row[0], label] = cell
    base = {
        (row["dtype"], row["direction"], row["rows"], row["n"]): row["median_us"]
        for row in data["benchmark"]["results"]
        if row["op"] == "softmax"
    }
    page = Page(files["report.html"]).text
    for row in data["benchmark"]["results"]:
        label = evidence.Series(row["op"], row["implementation"]).label
        cell = found.pop((row["dtype"], row["direction"], f"{row['rows']}×{row['n']}", label))
        if row["median_us"] is None:
            reason = row["status"].removeprefix("skipped: ")
            (letter,) = re.findall(r"^–<sup>(\w+)</sup>$", cell)
            assert f"<sup>{letter}</sup> {reason}" in files["report.md"] and f"{letter} {reason}" in page
            continue
        ratio = row["median_us"] / base[row["dtype"], row["direction"], row["rows"], row["n"]]
        assert cell.partition("<br>")[0].strip("*") == text.figure(row["median_us"])
        assert float(cell.partition("<br>")[2].removesuffix("×")) == pytest.approx(ratio, rel=5e-3)
        assert f"{text.figure(row['median_us'])} {text.times(ratio)}" in page
    assert found == {}


def test_an_implementation_without_any_figure_has_no_column_but_its_reasons(tmp_path):
    data = synthetic_benchmark()
    for row in data["results"]:
        if row["implementation"].startswith("entmax"):
            row |= {"median_us": None, "ci_us": None, "status": "skipped: ModuleNotFoundError: No module named 'entmax'"}
    render(write(tmp_path, benchmark=data), tmp_path)
    said = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "entmax budget_bisect 1.3 has no column: ModuleNotFoundError: No module named 'entmax'." in said
    assert not any("entmax" in cell for table in tables(said) for row in table for cell in row)


def test_tuned_keys_and_what_was_discarded(rendered):
    data, files = rendered
    page = Page(files["report.html"]).text
    for key in data["autotune"]["keys"]:
        name = f"{key['key']['dtype']} {key['key']['rows']}×{key['key']['n']}"
        if key["timing"] is None:
            assert f"{name} – – – – not tuned" in page
            continue
        default, tuned = text.figure(key["timing"]["default_us"]), text.figure(key["timing"]["median_us"])
        assert f"{name} {default} {tuned}" in page
        assert f"| {name} | {default} | {tuned} |" in files["report.md"]
    assert tuning.configuration(data["autotune"]["keys"][0]["config"]) == "resident, block 8192, 1 row, 8 warps, 1 stage"
    for said in ("wrong 40", "spills 80", "6 keys left out, to which the default stays: out of time."):
        assert said in page
    assert "39 keys are tuned" in page


def test_failures_come_with_their_reproducers(rendered):
    data, files = rendered
    page = Page(files["report.html"])
    assert "2 of 70 property checks failed" in page.text and "68 of 70" in page.text
    assert [attributes.get("class") for tag, attributes in page.tags if tag == "p"].count("verdict fail") == 1
    for failure in data["verify"]["failures"]:
        assert failure["message"] in page.text
        assert failure["reproducer"] in "".join(page.texts)
        assert f"````python\n{failure['reproducer']}\n````" in files["report.md"]
    assert "✗ FAILS" in page.text and "no case came to it" in page.text
    assert "Something fails on 1 of 2 facets." in page.text
    (matrix,) = [table for table in tables(files["report.md"]) if table[0] == ["facet", "grad scores"]][:1]
    assert matrix[2:] == [["plain", "·"], ["masks", "**✗**<br>float32"]]


def test_when_all_holds_it_says_so(tmp_path):
    render(write(tmp_path, verify=synthetic_verify()), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "All 70 property checks held (2 more were not run); nothing is said of tuning; nothing is said of speed." in page.text
    assert "FAIL" not in page.text and "Nothing fails on any of 2 facets." in page.text
    assert "sanitize.json, mutants.json and false-alarms.json were not among the evidence" in page.text
    assert "python tests/mutation/run.py --device cuda --json DIR/mutants.json" in page.text
    assert "coordroute benchmark --peers --json DIR/benchmark.json" in page.text
    assert "coordroute autotune --json DIR/autotune.json" in page.text
    plotted = ["errors-coordinate-descent.svg", "errors-soft-topk.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*plotted, "report.html", "report.md", "verify.json"]


def test_a_file_that_says_not_ok_is_believed(tmp_path):
    render(write(tmp_path, verify=synthetic_verify() | {"ok": False}), tmp_path)
    said = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "did not succeed" in said and "names no failure" in said and "70 property checks held" not in said


def test_a_target_of_somebody_else_is_named(tmp_path):
    for version, said in (("theirs 2.0", "theirs 2.0 (my_topk)"), (None, "theirs.ops:my_topk")):
        data = synthetic_verify() | {"target": "theirs.ops:my_topk", "target_version": version, "distributions": []}
        render(write(tmp_path, verify=data), tmp_path)
        assert f"All 70 property checks of {said} held" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_tables_of_the_markdown_are_well_formed(rendered):
    _, files = rendered
    found = tables(files["report.md"])
    # files, times, configurations, keys, candidates, properties, their sentences and figures, facets, errors, method
    assert len(found) == 1 + 4 + 1 + 4 + 1 + 2 + 2 + 3 + 2 + 1
    for head, line, *rows in found:
        assert rows and all(re.fullmatch(r":--|--:", cell) for cell in line)
        assert {len(row) for row in (head, line, *rows)} == {len(head)}
    headings = re.findall(r"^## (.*)$", files["report.md"], re.MULTILINE)
    assert headings == ["Speed", "Tuning", "Correctness", "How it was measured"]


# --- verification ----------------------------------------------------------------------------------------------------


def test_a_cell_of_every_property_its_rows_and_what_was_left_out(rendered):
    data, files = rendered
    found = [table for table in tables(files["report.md"]) if table[0][0] == "property" and table[0][-1] == "left out"]
    assert [table[0] for table in found] == [["property", "float64", "float32", "bfloat16", "float16", "rows", "left out"]] * 2
    for op, table in zip(("soft_topk", "coordinate_descent"), found, strict=True):
        for line in table[2:]:
            of = {row["dtype"]: row for row in data["verify"]["properties"] if (row["op"], row["property"]) == (op, line[0])}
            for dtype, cell in zip(table[0][1:5], line[1:5], strict=True):
                row = of[dtype]
                if row["verdict"] == "fail":
                    assert cell == "**✗ FAILS**"
                elif row["verdict"] == "not run":
                    assert cell == "–<sup>a</sup>" and "<sup>a</sup> no case came to it" in files["report.md"]
                else:
                    assert cell == ("exact" if row["bound"] == 0 else markdown.escape(text.percent(row["worst_ratio"])))
            compared, left = sum(row["cases"] for row in of.values()), sum(row["left_out"] for row in of.values())
            assert line[5:] == [text.count(compared), text.share(left, left + compared)]
    said = next(table for table in tables(files["report.md"]) if "bound of the error" in table[0])
    assert said[2] == ["runs", "what runs says", "how runs is bounded", "soft_topk, coordinate_descent"]
    assert len(said) == 2 + len(PROPERTIES) and "u is the roundoff of the working precision" in files["report.md"]
    assert files["report.md"].count("<details>") == files["report.md"].count("</details>") > 3


def test_errors_of_every_dtype_and_quantity_stand_beside_plain_torch(rendered):
    data, files = rendered
    lines = [line for table in tables(files["report.md"]) if table[0][0] == "dtype and quantity" for line in table[2:]]
    assert len(lines) == len(data["verify"]["distributions"]) == 12
    first = next(row for row in data["verify"]["distributions"] if row["dtype"] == "float32")
    figures = [text.ulps(first[whose][name]) for whose in ("ours", "plain") for name in ("p50", "p99.9", "max")]
    assert lines[0] == ["float32 values", "700", *figures] and figures[2] == "1.2e+04"
    assert lines[2][0] == "float32 all launches"
    assert "soft_topk, float32" in files["errors-soft-topk.svg"] and "all launches" in files["errors-soft-topk.svg"]


def test_a_curve_steps_where_the_histogram_says():
    ends, shares = plots._shares([[1, 10], [-24, 30], [-3, 60]])
    assert ends == [-23.0, -2.0, 2.0] and shares == [0.3, 0.9, 1.0]
    box = plots._Box(100.0, 10.0, 60.0, 20.0, -10, 20)
    assert [box.x(one) for one in (-24, -10, 5, 20, 64)] == [100.0, 100.0, 130.0, 160.0, 160.0]
    assert (box.y(0.0), box.y(1.0)) == (30.0, 10.0) and box.ticks() == [-10, -5, 0, 5, 10, 15, 20]


def test_mutants_are_counted_and_survivors_come_first(tmp_path):
    alarm = {"seed": 3, "check": "soft_topk: ties", "property": "grad k", "counterexample": "error 2, bound 1"}
    verify = synthetic_verify() | {"distributions": []}
    write(tmp_path, verify=verify, mutants=synthetic_mutants(), **{"false-alarms": synthetic_alarms()})
    render(tmp_path, tmp_path)
    said, page = (tmp_path / "report.md").read_text(encoding="utf-8"), Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "2 of 4 mutants killed, 2 survived, 1 not run" in page.text and "2 of 4 mutants killed." in page.text
    assert "the package without a fault passes (38 checks)" in page.text and ("a", {"href": "#mutants"}) in page.tags
    found = {table[0][0]: table[2:] for table in tables(said)}
    assert [(line[0], line[3]) for line in found["survived"]] == [
        ("unseen", "**none: a check is missing**"),
        ("same &lt;thing&gt;", "the sum is the same"),
    ]
    assert found["property that failed first"] == [["values", "2"]]
    assert [line[0].partition("<br>")[0] for line in found["mutant"]] == [
        "load without mask", "root moved", "same &lt;thing&gt;", "unseen", "gpu"
    ]  # fmt: skip
    assert (
        f"{text.count(1000)} runs without a fault, each with its own seed, {text.count(38000)} checks: no false alarm." in page.text
    )
    assert "mutants.json and false-alarms.json" not in page.text and "sanitize.json was not among the evidence" in page.text
    write(tmp_path, **{"false-alarms": synthetic_alarms(alarm)})
    render(tmp_path, tmp_path)
    said = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "1 false alarm." in said and "FAILED: false alarm: grad k, soft_topk: ties" in said


def test_models_have_a_chapter(tmp_path):
    run = {"tokens_per_second": 1000.0, "validation": [{"loss": 9.0}, {"loss": 0.5}]}
    other = {"tokens_per_second": 3000.0, "validation": [{"loss": 0.7}]}
    training = head("examples/train_bytes.py") | {
        "settings": {"context": 2048, "share": 8, "steps": 300, "batch": 16},
        "parameters": 5000000,
        "complete": False,
        "methods": [{"says": "exact solver", "runs": [run, other]}, {"says": "not begun", "runs": []}],
    }
    timed = {"published": {"median_us": 2000.0}, "patched": {"median_us": 500.0}, "speedup": 4.0, "speedup_ci": [3.5, 4.5]}
    colt5 = head("colt5") | {
        "package_version": "0.11.2",
        "sizes": {"batch": 2, "length": 8192},
        "same": [{"ok": True}, {"ok": False}],
        "speed": [timed | {"what": "topk", "published_path": "eager"}],
    }
    render(write(tmp_path, verify=synthetic_verify(), bytes=training, colt5=colt5), tmp_path)
    said = (tmp_path / "report.md").read_text()
    assert f"| exact solver | 0.6000<br>0.5000–0.7000 | 2 | {text.count(2000)} |" in said and "not begun" not in said
    assert "The run was cut short" in said and "1 of 2 comparisons" in said
    assert "| topk | eager | 2.00 | 0.500 | 4.00×<br>3.50–4.50 |" in said
    del colt5["same"]
    with pytest.raises(ValueError, match=r"colt5.json has no same"):
        render(write(tmp_path, verify=synthetic_verify(), colt5=colt5), tmp_path)


@pytest.mark.parametrize("errors", [0, 2])
def test_sanitizers_have_a_line_each(tmp_path, errors):
    render(write(tmp_path, verify=synthetic_verify() | {"distributions": []}, sanitize=synthetic_sanitize(errors)), tmp_path)
    said = (tmp_path / "report.md").read_text(encoding="utf-8")
    table = next(table for table in tables(said) if table[0][0] == "tool")
    verdict, count = ("**errors**", "**2**") if errors else ("clean", "0")
    assert table[2] == ["memcheck", "accesses out of bounds or misaligned", "seen", "40", "10", count, verdict, "61.2"]
    assert f"{1 if errors else 2} of 2 tools clean: compute-sanitizer 2026.1.0" in said
    assert ("```text\nInvalid __global__ write of size 4 bytes" in said) == bool(errors)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [attributes.get("class") for tag, attributes in page.tags if tag == "p"].count("verdict fail") == bool(errors)


def test_many_failures_are_folded(tmp_path):
    data = synthetic_verify() | {"ok": False, "distributions": []}
    data["failures"] = [synthetic_failure("soft_topk", name, dtype) for name in PROPERTIES[:4] for dtype in ("float32", "float16")]
    data["failures"][0]["reproducer"] += " # a longer one"
    render(write(tmp_path, verify=data), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [attributes.get("class") for tag, attributes in page.tags if tag == "details"].count("failure") == 4
    assert "soft_topk: runs, float32, float16: error ∞, bound 4.0e-07, masks, family cauchy" in page.text
    assert "a longer one" not in page.text


def test_implementations_side_by_side(tmp_path):
    ours, theirs = synthetic_verify() | {"distributions": []}, synthetic_other()
    older, odd = synthetic_other(version="theirs 0.9"), synthetic_other("odd.ops:f", None, "relaxed_topk")
    odd["properties"] = [row | {"op": "relaxed_topk"} for row in synthetic_other()["properties"] if row["property"] != "scale"]
    odd["facets"] = [row | {"op": "relaxed_topk"} for row in theirs["facets"]]
    odd |= {"failures": [], "ok": True}
    for row in (*odd["properties"], *odd["facets"]):
        row |= {"verdict": "pass", "failing_facets": [], "failed": []}
    write(tmp_path / "in", verify=ours, **{"verify-b-2.0": theirs, "verify-b-0.9": older, "verify-c": odd})
    names = sorted(path.name for path in render(tmp_path / "in", tmp_path / "out"))
    assert names == ["comparison.html", "comparison.md", "report.html", "report.md"]
    said = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    page = Page((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))
    assert page.errors == [] and "Implementations side by side" in page.text
    found = {table[0][0]: table for table in reversed(tables(said))}
    heads = [
        "coordroute 0.1.0<br>soft_topk",
        "coordroute 0.1.0<br>coordinate_descent",
        "theirs 0.9 (my_topk)<br>coordinate_descent",
    ]
    heads += ["theirs 2.0 (my_topk)<br>coordinate_descent", "odd.ops:f<br>relaxed_topk"]
    assert found["property"][0][1:] == found["facet"][0][1:] == heads
    values = next(line for line in found["property"] if line[0] == "values")
    worst = max(row["worst_ratio"] for row in ours["properties"] if (row["op"], row["property"]) == ("soft_topk", "values"))
    share = next(row for row in theirs["properties"] if (row["property"], row["dtype"]) == ("values", "float32"))["worst_ratio"]
    assert values[1] == text.percent(worst)
    assert values[3] == values[4] == f"**✗ FAILS**<br>float32 {text.percent(share)}<br>bfloat16 ✗"
    assert [line[-1] for line in found["property"] if line[0] == "scale"] == ["–"]  # not one of its kind
    masks = next(line for line in found["facet"] if line[0].startswith("masks"))
    assert masks[1:] == ["holds", "holds", *["**✗ fails**<br>values (bfloat16)<br>scale (bfloat16)"] * 2, "holds"]
    long = next(line for line in found["facet"] if line[0].startswith("long rows"))
    assert long[1] == "–<sup>a</sup>" and "<sup>a</sup> no rows are that long" in said
    assert said.count("FAILED: coordinate&#95;descent: values") == 2 and theirs["failures"][0]["reproducer"] in said
    assert "theirs 0.9 (my_topk) coordinate_descent: 2 of 18 property checks failed" in page.text
    assert "coordroute 0.1.0 soft_topk: all of 35 property checks held" in page.text
    assert "judged by its own run in float64" in said


def test_a_folder_of_others_alone_has_a_comparison_and_no_report(tmp_path):
    write(tmp_path, **{"verify-a": synthetic_other(), "verify-b": synthetic_other()})
    assert [path.name for path in render(tmp_path, tmp_path / "out")] == ["comparison.html", "comparison.md"]
    found = evidence.load(tmp_path)
    assert not found.reported() and list(found.compared()) == ["verify-a.json", "verify-b.json"]
    # one target twice is told apart by the file
    labels = [one.label for one in comparison.implementations(found.compared())]
    assert labels == ["theirs 2.0 (my_topk), verify-a.json", "theirs 2.0 (my_topk), verify-b.json"]


# --- targets ---------------------------------------------------------------------------------------------------------


def targeted(tmp_path, **measured):
    data = judged(synthetic_benchmark(), memory=MEMORY, host=HOST, cpu="this process may use 1 core", **measured)
    render(write(tmp_path, benchmark=data, verify=synthetic_verify() | {"distributions": []}), tmp_path)
    return data, (tmp_path / "report.md").read_text(encoding="utf-8"), Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_every_target_has_a_line_with_its_figure_and_a_word(tmp_path):
    data, said, page = targeted(tmp_path)
    assert page.errors == [] and "targets" in page.ids and re.findall(r"^## (.*)$", said, re.MULTILINE)[0] == "Targets"
    assert ("a", {"href": "#targets"}) in page.tags
    (table,) = [table for table in tables(said) if table[0][0] == "work"]
    rows = table[2:]
    assert len(rows) == len(data["targets"]) == 27
    words = {True: "✓ met", False: "✗ missed", None: "not measured"}
    for row, cells in zip(data["targets"], rows, strict=True):
        figure = text.amount(row["figure"], row["unit"])
        assert cells[0].replace("\\", "") == f"{row['id']} {row['work']}" and cells[2] == row["target"]
        assert cells[1] == ("–" if row["rows"] is None else f"{row['rows']}×{row['n']}")
        assert cells[3].partition("<br>")[0].strip("*") == figure
        assert cells[4] == text.amount(row["bfloat16"], row["unit"])
        word = "no limit" if row["id"] == "10b" and row["figure"] is not None else words[row["met"]]
        assert cells[5].partition("<sup>")[0].strip("*") == word
        assert word in page.text and figure in page.text
        assert row["figure"] is not None or row["reason"] in page.text
    counts = [[row["met"] for row in data["targets"]].count(met) for met in (True, False)]
    assert min(counts) > 0
    assert f"{counts[0]} of {sum(counts)} targets met, {counts[1]} missed" in page.text
    assert f"{counts[0]} of {sum(counts)} targets met." in page.text  # the sentence at the top
    assert "The CPU is SYNTHETIC CPU, with 2 threads." in page.text and "The targets were set for an H100" in page.text


def test_a_file_from_before_there_were_targets_has_no_section_of_them(rendered):
    data, files = rendered
    assert "targets" not in data["benchmark"]
    assert "Targets" not in files["report.md"] and "#targets" not in files["report.html"]


def test_targets_of_another_kind_of_device_are_left_out(tmp_path):
    data = synthetic_benchmark() | {"targets": targets.evaluate(targets.Measured("cpu", []))}
    render(write(tmp_path, benchmark=data), tmp_path)
    said = (tmp_path / "report.md").read_text(encoding="utf-8")
    (table,) = [table for table in tables(said) if table[0][0] == "work"]
    assert [row[0].split()[0] for row in table[2:]] == ["11a", "11b", "12a", "12b"]
    assert "No target was judged, 4 not measured" in said


def test_the_summary_has_a_line_for_each_target(tmp_path):
    data, _, _ = targeted(tmp_path)
    said = summary.summary(tmp_path)
    (table,) = [table for table in tables(said) if table[0][0] == "target"]
    lines = {row[0].split()[0]: row for row in table[2:]}
    assert list(lines) == list(dict.fromkeys(row["id"] for row in data["targets"]))
    found = {(row["id"], row["rows"], row["n"]): row for row in data["targets"]}
    first = [found["1", *shape] for shape in targets.LARGE]
    assert lines["1"][1] == ", ".join(text.amount(row["figure"], "×") for row in first)
    assert "soft_topk forward at 1024×8192, 4096×2048, 1024×16384, 65536×256: at most 1.0× torch.softmax forward" in lines["1"][0]
    assert "**missed** at 1024×8192" in lines["1"][2] and "not measured at 1024×16384" in lines["1"][2]
    assert lines["6"][1:] == ["–", "not measured"] and lines["12b"][1:] == ["20.0 floats a row", "met"]
    assert lines["13a"][1:] == ["1.25×", "met"] and lines["13b"][1:] == ["1.75×", "**missed**"]
    assert "not measured or without a limit." in said
    data["results"].append(data["results"][3] | {"op": targets.LONG})
    write(tmp_path, benchmark=data)
    assert "T=50" not in summary.summary(tmp_path).partition("\n\n|")[2].partition("\n\n")[0]


# --- odd evidence ----------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>\"'&amp;|`$x_1^2$ ](javascript:x) -->\n# <img src=x onerror=y> 深\ud800\x00"


def test_hostile_texts_stay_texts(tmp_path):
    data = everything(fails=True)
    for one in data.values():
        one["device"]["name"] = one["device"]["driver"] = one["date"] = one["versions"]["torch"] = HOSTILE
    for row in data["benchmark"]["results"]:
        row["method"] = HOSTILE
        row["dtype"] = f"../../{HOSTILE}" if row["dtype"] == "bfloat16" else row["dtype"]
        if row["implementation"] == "a new one":
            row["implementation"] = HOSTILE
        if row["status"] != "ok":
            row["status"] = f"skipped: {HOSTILE}"
    data["benchmark"]["method"] = data["benchmark"]["settings"][HOSTILE] = HOSTILE
    data["benchmark"] = judged(data["benchmark"])
    for row in data["benchmark"]["targets"]:
        row |= {name: HOSTILE for name in ("work", "target", "unit", "reason")}
    data["benchmark"]["cpu"]["device"]["name"] = HOSTILE
    for key in data["autotune"]["keys"]:
        key["config"] = key["config"] and key["config"] | {"variant": HOSTILE, HOSTILE: HOSTILE}
        key["key"]["op"] = f"/{HOSTILE}" if key["key"]["op"] == "soft_topk" else key["key"]["op"]
        for candidate in key["candidates"]:
            candidate["reason"] = HOSTILE
    data["autotune"]["dropped"][HOSTILE] = 3
    texts = ("worst_family", "family", "sentence", "derivation", "reason", "message", "reproducer")
    verify = data["verify"]
    for row in (*verify["properties"], *verify["failures"], *verify["facets"]):
        row |= {name: HOSTILE for name in texts if name in row}
    for row in (*verify["facets"], *verify["failures"]):
        row["facet"] = HOSTILE if row["facet"] == "masks" else row["facet"]
    for row in verify["distributions"]:
        row["quantity"] = HOSTILE if row["quantity"] == "grad scores" else row["quantity"]
    verify |= {"target": f"x:{HOSTILE}", "target_version": HOSTILE}
    mutants, sanitize = synthetic_mutants(), synthetic_sanitize(errors=1)
    for row in mutants["mutants"]:
        row |= {name: HOSTILE for name in ("sentence", "file", "op", "explanation", "counterexample")}
    sanitize["device"]["name"] = HOSTILE
    for tool in sanitize["tools"]:
        tool |= {
            "tool": f"{tool['tool']} {HOSTILE}",
            "reason": HOSTILE,
            "reports": [dict.fromkeys(("group", "kernel", "text"), HOSTILE)],
        }
    alarms = synthetic_alarms(dict.fromkeys(("check", "property", "counterexample"), HOSTILE))
    write(tmp_path / "in", **data, mutants=mutants, sanitize=sanitize)
    write(tmp_path / "in", **{"false-alarms": alarms, "verify-other": synthetic_other(f"x:{HOSTILE}", HOSTILE)})
    written = render(tmp_path / "in", tmp_path / "out")
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.errors == []
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>\"'&amp;|`$x_1^2$ ](javascript:x) -->") > 50
    for path in written:
        if path.suffix == ".svg":
            assert "script" not in {tag.tag.rpartition("}")[2] for tag in ElementTree.parse(path).iter()}
    for name in ("report", "comparison"):
        page = Page((tmp_path / "out" / f"{name}.html").read_text(encoding="utf-8"))
        assert page.errors == [] and not {tag for tag, _ in page.tags} & {"script", "img"}
        said = (tmp_path / "out" / f"{name}.md").read_text(encoding="utf-8")
        outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", said, flags=re.DOTALL | re.MULTILINE)
        assert "<script" not in outside and "<img" not in outside
        assert not re.search(r"(?<!\\)\]\(javascript", outside)
        for first, *rows in tables(outside):
            assert {len(row) for row in rows} == {len(first)}


def test_figures_that_are_none_are_no_reason_to_stop(tmp_path):
    data = everything()
    for i, row in enumerate(data["benchmark"]["results"]):
        if row["rows"] == 32 and row["op"] == "softmax":
            row |= {"median_us": None, "ci_us": None, "status": "skipped: no time was left"}
        elif row["rows"] == 8:
            row["median_us"] = (math.inf, math.nan, 0.0, -1.0, None)[i % 5]
    for i, row in enumerate(data["verify"]["properties"]):
        odd = (None, math.inf, math.nan, 1e-300, -1.0)
        row |= {"worst_error": odd[i % 5], "bound": odd[i // 5 % 5], "worst_ratio": odd[i // 2 % 5], "worst_family": None}
    for i, key in enumerate(data["autotune"]["keys"]):
        if key["timing"]:
            key["timing"] |= {"median_us": (math.inf, math.nan, 0.0, 3.0)[i % 4], "ci_us": (None, [0.0, math.inf])[i % 2]}
            key["gain"] = (None, math.inf, 1.0)[i % 3]
    data["benchmark"] = judged(data["benchmark"])
    for i, row in enumerate(data["benchmark"]["targets"]):
        row |= {"figure": (math.inf, math.nan, 0.0, -1.0, None)[i % 5], "met": (None, True, False)[i % 3]}
    data["autotune"]["geometric_mean_gain"] = math.nan
    data["verify"]["seconds"] = math.inf
    render(write(tmp_path, **data), tmp_path)
    said = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "no ratio" in said and "∞" in said and "NaN" in said
    assert "torch.softmax not measured" in (tmp_path / "speed.svg").read_text(encoding="utf-8")


def test_evidence_without_anything_in_it(tmp_path):
    empty = {"benchmark": synthetic_benchmark(()), "autotune": synthetic_autotune(), "verify": synthetic_verify()}
    empty["autotune"] |= {"keys": [], "dropped": {}, "geometric_mean_gain": None}
    empty["verify"] |= {"properties": [], "facets": [], "distributions": []}
    written = render(write(tmp_path / "in", **empty), tmp_path / "out")
    assert [path.name for path in written] == ["report.html", "report.md"]
    said = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "benchmark.json has no results." in said and "No key was finished." in said and "nothing was checked" in said


def test_without_torch_softmax_there_are_times_but_no_ratios(tmp_path):
    data = synthetic_benchmark()
    data["results"] = [row for row in data["results"] if row["op"] != "softmax"]
    written = render(write(tmp_path / "in", benchmark=data), tmp_path / "out")
    assert [path.name for path in written] == ["report.html", "report.md"]
    said = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "no ratio" in said and "has no plot" in said and "soft_topk was not measured beside torch.softmax" in said


# --- evidence that is none -------------------------------------------------------------------------------------------


def test_a_folder_without_evidence(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no evidence.*verify\.json.*coordroute benchmark --peers --json") as caught:
        render(tmp_path, tmp_path / "out")
    assert caught.type is ValueError and str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="does not exist"):
        render(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="not a folder"):
        render(tmp_path / "other.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spoiled(**changes):
    return lambda data: json.dumps(data | changes)


def inner(where, position, **changes):
    def spoil(data):
        data[where][position] |= changes
        return json.dumps(data)

    return spoil


def odd_target(data, **changes):
    data = judged(data)
    data["targets"][0] |= changes
    return json.dumps(data)


@pytest.mark.parametrize(
    ("command", "spoil", "reason"),
    [
        ("verify", lambda data: "{", "is not JSON"),
        ("verify", lambda data: "[" * 100_000, "is not JSON"),
        ("verify", lambda data: "[]", r"holds \[\]; an object is needed"),
        ("verify", spoiled(schema=2), "has schema 2; this version reads schema 1"),
        ("verify", spoiled(schema=True), "has schema True"),
        ("autotune", spoiled(command="verify"), "is of the command 'verify'; a file of this name is of 'autotune'"),
        ("benchmark", spoiled(results={}), r"results is \{\}; a list is needed"),
        ("benchmark", spoiled(device=None), "device is None; an object is needed"),
        ("benchmark", spoiled(seconds="long"), "seconds is 'long'; a number is needed"),
        ("benchmark", inner("results", 3, median_us="fast"), r"results\[3\]\.median_us is 'fast'; a number or null is needed"),
        ("benchmark", inner("results", 3, ci_us=[1]), r"results\[3\]\.ci_us is \[1\]; a list of two numbers or null is needed"),
        ("benchmark", inner("results", 3, rows=10**30), r"results\[3\]\.rows"),
        (
            "benchmark",
            lambda data: json.dumps(data | {"results": data["results"][:1] * 2}),
            r"results\[1\] is a second row for copy",
        ),
        (
            "benchmark",
            lambda data: json.dumps({k: v for k, v in data.items() if k != "method"}),
            "has no method; a string is needed",
        ),
        ("benchmark", spoiled(targets={}), r"targets is \{\}; a list is needed"),
        ("benchmark", spoiled(targets=[{"id": "1"}]), r"has no targets\[0\]\.op; a string is needed"),
        ("benchmark", lambda data: odd_target(data, met="yes"), r"targets\[0\]\.met is 'yes'; true or false or null is needed"),
        ("benchmark", lambda data: odd_target(data, detail={"sweeps": "3"}), r"targets\[0\]\.detail\.sweeps is '3'"),
        ("benchmark", spoiled(cpu={"threads": 2}), r"has no cpu\.device"),
        ("autotune", spoiled(requests=[]), r"requests is \[\]; an object or null is needed"),
        ("autotune", spoiled(requests={"prove": {"requests": 1}}), r"has no requests\['prove'\]\.seconds; a number is needed"),
        ("autotune", inner("keys", 0, timing={}), r"has no keys\[0\]\.timing\.median_us"),
        ("autotune", inner("keys", 0, key=1), r"keys\[0\]\.key is 1; an object is needed"),
        ("autotune", inner("keys", 0, candidates=["x"]), r"keys\[0\]\.candidates\[0\] is 'x'; an object is needed"),
        (
            "verify",
            inner("properties", 0, verdict="maybe"),
            r"properties\[0\]\.verdict is 'maybe'; allowed is one of pass, fail, not run",
        ),
        ("verify", spoiled(failures=[{}]), r"has no failures\[0\]\.op"),
        (
            "verify",
            lambda data: json.dumps({k: v for k, v in data.items() if k != "facets"}),
            "has no facets; a list is needed there",
        ),
        ("verify", inner("properties", 0, failing_facets=[1]), r"properties\[0\]\.failing_facets is \[1\]; a list of strings"),
        ("verify", inner("facets", 0, verdict="maybe"), r"facets\[0\]\.verdict is 'maybe'; allowed is one of pass, fail, not run"),
        ("verify", inner("distributions", 0, plain={}), r"has no distributions\[0\]\.plain\.p50"),
        (
            "verify",
            lambda data: json.dumps(data).replace("[-24, 100]", "[-24, 0.5]", 1),
            r"distributions\[0\]\.ours\.histogram is .*; a list of pairs of whole numbers is needed",
        ),
        (
            "sanitize",
            inner("tools", 0, verdict="maybe"),
            r"tools\[0\]\.verdict is 'maybe'; allowed is one of clean, errors, not finish",
        ),
        ("sanitize", spoiled(command="verify"), "is of the command 'verify'; a file of this name is of 'sanitize'"),
        (
            "mutants",
            inner("mutants", 0, verdict="dead"),
            r"mutants\[0\]\.verdict is 'dead'; allowed is one of killed, survived, not",
        ),
        ("mutants", spoiled(control=None), "control is None; an object is needed"),
        ("false-alarms", spoiled(runs="many"), "runs is 'many'; a whole number is needed"),
        ("verify-other", spoiled(command="benchmark"), "is of the command 'benchmark'; a file of this name is of 'verify'"),
        ("verify", spoiled(ok=1), "ok is 1; true or false is needed"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, command, spoil, reason):
    made = {"verify": synthetic_verify, "autotune": synthetic_autotune, "benchmark": synthetic_benchmark}
    more = {"sanitize": synthetic_sanitize, "mutants": synthetic_mutants, "false-alarms": synthetic_alarms}
    data = (made | more | {"verify-other": synthetic_other})[command]()
    if command in more:
        write(tmp_path, verify=synthetic_verify())
    path = tmp_path / f"{command}.json"
    path.write_text(spoil(data))
    with pytest.raises(ValueError, match=reason) as caught:
        render(tmp_path, tmp_path / "out")
    assert caught.type is ValueError and str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_text(tmp_path):
    (tmp_path / "verify.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"verify\.json is not JSON"):
        render(tmp_path, tmp_path / "out")
    (tmp_path / "autotune.json").mkdir()
    (tmp_path / "verify.json").unlink()
    with pytest.raises(ValueError, match=r"autotune\.json cannot be read"):
        render(tmp_path, tmp_path / "out")


def test_files_of_different_devices(tmp_path):
    data = everything() | {"verify": synthetic_verify() | {"distributions": []}, "benchmark": synthetic_benchmark(SHAPES[:1])}
    data["verify"]["device"]["driver"] = "another"
    data["autotune"]["versions"]["torch"] = "another"
    write(tmp_path, **data)
    render(tmp_path, tmp_path / "out")
    assert "made with different versions" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    data["autotune"]["versions"] = {**data["verify"]["versions"], "a tool": "1"}
    write(tmp_path, **data)
    render(tmp_path, tmp_path / "out")
    assert "made with different versions" not in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    data["benchmark"]["device"]["name"] = "Another GPU"
    write(tmp_path, **data)
    with pytest.raises(ValueError, match=r"verify\.json is of the device with name 'SYNTHETIC.*benchmark\.json.*'Another GPU'"):
        render(tmp_path, tmp_path / "out")


def test_without_matplotlib(tmp_path, monkeypatch):
    """Only what has a plot needs it, and says how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    render(write(tmp_path / "a", verify=synthetic_verify() | {"distributions": []}), tmp_path / "out")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'coordroute\[tune\]'") as caught:
        render(write(tmp_path / "b", autotune=synthetic_autotune()), tmp_path / "nothing")
    assert caught.value.name == "matplotlib" and not (tmp_path / "nothing").exists()


def test_importing_is_light():
    code = "import sys; import coordroute.reports.render; print([m for m in ('torch', 'matplotlib', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- figures ---------------------------------------------------------------------------------------------------------


def test_significant_digits():
    said = {0.0: "0", 1.7: "1.70", 9.999: "10.0", 12.34: "12.3", 99.96: "100", 566.4: "566", 1902.2: "1902", 13350.4: "13\u202f350"}
    said |= {0.07295: "0.0730", 0.0005: "5.00e-04", math.inf: "∞", -math.inf: "-∞"}
    assert {value: text.figure(value) for value in said} == said
    assert text.figure(None) == "–" and text.figure(math.nan) == "NaN"
    assert text.span([1.384, 0.07295]) == "0.073–1.4×" and text.span([2.0]) == "2.0×" and text.span([]) == "–"
    shares = {0.0: "0 %", 0.001: "< 1 %", 0.34: "34 %", 0.999: "< 100 %", 1.0: "100 %", 1.001: "> 100 %", 1.5: "150 %", 12.0: "12×"}
    assert {value: text.percent(value) for value in shares} == shares
    assert [text.letters(i) for i in (0, 25, 26, 701, 702)] == ["a", "z", "aa", "zz", "aaa"]
    assert text.duration(12.3) == "12.3 s" and text.duration(600) == "10 min" and text.duration(7200) == "2.0 h"


@pytest.mark.parametrize("low,high", [(1, 1.2), (0.98, 1.3), (3, 17), (0.05, 180), (1e-3, 1e6), (1e-12, 1e12), (4.2, 4.3)])
def test_an_axis_has_some_round_ticks(low, high):
    ticks = plots._log_ticks(low, high)
    assert 1 <= len(ticks) <= 7 and all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_markdown_takes_text_literally():
    assert markdown.escape("a|b *c* _d_ e_f `g` [h](i) <j> & \\") == (
        "a\\|b \\*c\\* \\_d\\_ e_f \\`g\\` \\[h\\](i) &lt;j&gt; &amp; \\\\"
    )
    assert (
        markdown.escape("# x\n\n1. y") == "\\# x 1. y" and markdown.escape("1. y") == "1\\. y" and markdown.escape("- z") == "\\- z"
    )
    assert markdown.fence("a ```` b", "sh") == "`````sh\na ```` b\n`````"


# --- between the keys, and after an upgrade --------------------------------------------------------------------------


def synthetic_between(factor):
    """One shape of two candidates: what serves takes ``factor`` times the time of the other."""
    config = {"status": "timed", "registers": 40, "spills": 0, "same_as": None}
    candidates = [config | {"config": launch(warps=4), "samples": [10.0] * 3}]
    candidates += [config | {"config": launch(warps=8), "samples": [10.0 * factor] * 3}]
    key = {"key": dict(LANDSCAPES[0], rows=3000, n=200), "default": 0, "serves": 1, "seeds": [0], "candidates": candidates}
    return {**head("exhaust"), "rounds": 3, "left_out": 0, "method": "SYNTHETIC", "keys": [key]}


@pytest.mark.parametrize(("factor", "verdict"), [(1.04, "met"), (1.06, "missed")])
def test_what_serves_between_the_keys_is_compared_with_the_best(tmp_path, factor, verdict):
    write(tmp_path / "in", autotune=synthetic_autotune(), between=synthetic_between(factor))
    render(tmp_path / "in", tmp_path / "out")
    said = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"{text.times(factor)} at p95 (at most 1.05× is the goal: {verdict})" in said
    assert "3000×200" in said and "between.json" in said
    assert "was not among the candidates" not in said and "No time was left" not in said


def test_shapes_between_the_keys_of_which_nothing_is_known_are_counted(tmp_path):
    data = synthetic_between(1.04)
    data["keys"].append(data["keys"][0] | {"key": dict(LANDSCAPES[0], rows=30, n=200), "serves": None})
    write(tmp_path / "in", autotune=synthetic_autotune(), between=data | {"left_out": 2})
    render(tmp_path / "in", tmp_path / "out")
    said = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Every candidate of 1 shape" in said and "1.04× at p95" in said
    assert "What serves 1 more shape was not among the candidates. No time was left for 2 shapes." in said


def test_a_file_of_shapes_between_the_keys_must_say_what_serves(tmp_path):
    data = synthetic_between(1.0)
    del data["keys"][0]["serves"]
    write(tmp_path, autotune=synthetic_autotune(), between=data)
    with pytest.raises(ValueError, match=r"keys\[0\].serves"):
        evidence.load(tmp_path)


@pytest.mark.parametrize(("seconds", "gpus", "verdict"), [(10.0, 1, "met"), (10.0, 2, "missed")])
def test_an_upgrade_is_compared_with_the_search_by_the_time_of_all_gpus(tmp_path, seconds, gpus, verdict):
    autotune = synthetic_autotune()
    again = autotune | {"seconds": seconds, "gpus": gpus, "groups": 10, "reverified": 10, "geometric_mean_gain": 1.02}
    write(tmp_path / "in", autotune=autotune, upgrade=again)
    render(tmp_path / "in", tmp_path / "out")
    said = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "without a search in 10 groups of 10" in said and f"at most 10 % is the goal: {verdict}" in said
    assert "(1.02× when they were proved anew)" in said and "the gain over that day's default is 1.02×." in said


def test_upgrades_of_several_kinds_stand_side_by_side_and_say_what_had_changed(tmp_path):
    autotune = synthetic_autotune()
    again = autotune | {"seconds": 10.0, "groups": 10, "reverified": 10, "outdated": {"kernel": 1, "triton": 2}}
    files = {
        "upgrade": again,
        "upgrade-kernel": autotune | {"seconds": 500.0},
        "upgrade-driver": again | {"outdated": {"driver": 2}},
    }
    write(tmp_path / "in", autotune=autotune, **files)
    render(tmp_path / "in", tmp_path / "out")
    said = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert said.count("## After an upgrade") == 1
    n = len(autotune["keys"])
    assert f"upgrade.json: of {n} keys 1 with another kernel and 2 with another triton had been proved." in said
    assert f"upgrade-driver.json: of {n} keys 2 with another driver had been proved." in said
    assert f"upgrade-kernel.json: {n} keys had been proved with another kernel or other versions." in said
    write(tmp_path / "in", autotune=autotune, upgrade=again | {"outdated": {"driver": "all"}})
    with pytest.raises(ValueError, match=r"outdated\['driver'\]"):
        evidence.load(tmp_path / "in")


def test_a_search_that_was_interrupted_took_what_both_runs_did(tmp_path):
    """Of a file that does not say what the run before took, no share is made."""
    autotune = synthetic_autotune()
    again = autotune | {"seconds": 10.0, "resumed": 0, "groups": 10, "reverified": 10}
    files = {"autotune": autotune | {"seconds_before": 873.0}, "upgrade": again}
    files["quick"] = autotune | {"effort": "quick", "seconds": 100.0, "seconds_before": 21.0}
    write(tmp_path / "in", **files)
    render(tmp_path / "in", tmp_path / "out")
    said = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "That is 1 % of the time" in said and "in 121 s; at most 120 s on one is the goal: missed" in said
    for name in ("autotune", "quick"):
        del files[name]["seconds_before"]
    write(tmp_path / "in", **files)
    render(tmp_path / "in", tmp_path / "out")
    said = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "What share that is of a search cannot be said" in said and "goal" not in said.partition("After an upgrade")[2]


@pytest.mark.parametrize(("seconds", "gpus", "verdict"), [(119.0, 1, "met"), (121.0, 1, "missed"), (61.0, 2, "missed")])
def test_a_quick_search_is_held_to_its_time_on_one_gpu(tmp_path, seconds, gpus, verdict):
    autotune = synthetic_autotune()
    write(tmp_path / "in", autotune=autotune, quick=autotune | {"effort": "quick", "seconds": seconds, "gpus": gpus})
    render(tmp_path / "in", tmp_path / "out")
    said = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"at most 120 s on one is the goal: {verdict}" in said
    assert "quick.json" in said


def test_a_file_of_a_quick_search_is_of_that_effort(tmp_path):
    write(tmp_path, autotune=synthetic_autotune(), quick=synthetic_autotune() | {"effort": "full"})
    with pytest.raises(ValueError, match=r"quick.json.*effort.*'full'.*quick"):
        evidence.load(tmp_path)


def test_what_fewer_configurations_would_cost():
    """Two keys, the fastest of each of another form; one form serves both, 10 % slower than the best of the second."""

    def key(n, times):
        candidates = [
            {"config": launch(n, warps * n // 1024), "status": "timed", "median_us": time} for warps, time in times.items()
        ]
        return {"key": {"op": "soft_topk", "n": n}, "candidates": candidates}

    keys = [key(1024, {4: 10.0, 8: 20.0}), key(2048, {4: 11.0, 8: 10.0})]
    one, two = candidates.fewer(keys, (1, 2))
    assert (one.forms, one.median, one.worst) == (1, pytest.approx(0.05), pytest.approx(0.1))
    assert two == candidates.Fewer(2, 0.0, 0.0, 0.0)
    # a form that the second key was not timed for leaves it unserved
    assert candidates.fewer([keys[0], key(2048, {16: 10.0})], (1,)) == []
