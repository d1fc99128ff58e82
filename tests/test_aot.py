"""Every kernel variant compiles ahead of time for the GPUs we name, with no GPU here, and registers and spills are recorded.

Triton's interpreter replaces the kernels of a process that sets TRITON_INTERPRET, so the compilation runs in a process
without it: ``python -m coordroute.kernels.aot cuda 90 32`` prints the same record as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
LAUNCHES = {(256, 4, 1), (8192, 1, 8)}
"""Length, rows a program and warps of launches that sm_90 gets in any case."""
WIDTHS = {8192: 4, 200: 4, 8190: 2, 201: 1}
"""How many float32 are loaded at once from rows of a length."""


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles(target: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "coordroute.kernels.aot", *map(str, TARGETS[target])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    print(f"\n{target}")
    for row in record:
        print(row)
    assert {row["kernel"] for row in record} == {
        "soft_topk_forward",
        "soft_topk_backward",
        "coordinate_descent_iterate",
        "coordinate_descent_backward",
        "coordinate_descent_backward_shared",
    }
    assert {row["variant"] for row in record} == {"resident", "split", "tiled"}
    assert {row["dtype"] for row in record} >= {"bfloat16", "float32", "float64"}
    assert target != "sm_90" or {row["dtype"] for row in record} == {"float16", "bfloat16", "float32", "float64"}
    assert (
        target != "sm_90"
        or {(row["n"], row["ROWS"], row["num_warps"]) for row in record if row["kernel"] == "soft_topk_forward"} >= LAUNCHES
    )
    for row in record:
        assert row["binary_bytes"] > 0
        assert row["dtype"] != "float32" or row["VEC"] == WIDTHS.get(row["n"], row["VEC"]), row
        if target.startswith("sm_"):
            assert row["registers"] > 0
            # what threads iterate on must be the same in all of them; libdevice's exp2 of a float64 ends with a product by a
            # power of two, which is exact, fused or not
            exact = row["kernel"] == "coordinate_descent_iterate" and row["dtype"] == "float64"
            assert row["lopsided_sums"] == 0 or "backward" in row["kernel"] or exact, row
            assert row["hasty_exchanges"] == 0, row
            # the sizes compiled here are those of the heuristic, which must not spill in float32 and below; where the length
            # is no multiple of 16, programs share a row, or states are recomputed, there are more addresses to keep, and a few
            # registers may go; where the heuristic limits them, so that more programs run, a thread may put away as much as it has
            # scores
            allowed = 16 if row["n"] % 16 or row["variant"] == "split" or row.get("RECOMPUTE") else 0
            allowed = 4 * row["REPS"] * row["VEC"] if "maxnreg" in row else allowed
            assert row["dtype"] == "float64" or row["spilled_bytes"] <= allowed, row
            check_layouts(row)


def check_layouts(row: dict[str, Any]) -> None:
    """Loads of scores are as wide as a thread's columns, and a warp lies on lanes and rows, so that no thread sees a row twice.

    Releases of Triton differ in the axis that threads go to first (LANES_FIRST of rows.py).
    """
    assert row["layouts"], row
    # a tile of fewer columns is less than what its threads could load
    if row["ROWS"] * row["LANES"] == 32 * row["num_warps"]:
        for layout in row["layouts"]:
            assert layout["columns"] == [1, 1, 1, row["VEC"]], row
            reps, rows, lanes, vec = layout["threads"]
            assert (reps, rows * lanes, vec) == (1, 32, 1), row


def test_a_product_that_meets_another_threads_sum_is_noticed() -> None:
    """What once gave the threads of one row thresholds an ulp of the first guess apart, on a GPU alone."""
    from coordroute.kernels.aot import lopsided_sums

    shuffle = "\tshfl.sync.bfly.b32 \t%r2, %r1, 16, 31, -1;\n"
    assert lopsided_sums(shuffle + "\tfma.rn.f32 \t%r3, %r4, %r4, %r2;") == 1
    assert lopsided_sums("\tmul.f32 \t%r1, %r4, %r4;\n" + shuffle + "\tadd.f32 \t%r3, %r1, %r2;") == 1
    assert lopsided_sums(shuffle + "\tadd.f32 \t%r3, %r1, %r2;\n\tfma.rn.f32 \t%r5, %r3, %r4, %r6;") == 0
    double = shuffle + "\tmov.b64 \t%rd1, {%r7, %r2};\n"
    assert lopsided_sums(double + "\tfma.rn.f64 \t%rd3, %rd4, %rd4, %rd1;") == 1


def test_a_word_that_is_published_while_a_warp_may_still_wait_is_noticed() -> None:
    """What hung under racecheck: three exchanges of rows that hold NaN or infinities, one right after the other."""
    from coordroute.kernels.aot import hasty_exchanges

    publish = "\t@%p5 atom.relaxed.gpu.global.exch.b64 %rd9, [%rd8 + 0], %rd7;\n"
    wait = "\tld.volatile.global.b64 {%rd3}, [%rd1 + 0];\n"
    assert hasty_exchanges(publish + wait + publish + publish) == 2
    assert hasty_exchanges(publish + wait + "\tbar.sync \t0;\n" + publish) == 0
    assert hasty_exchanges(publish + publish + wait) == 0


@pytest.mark.parametrize("choice", ["selp.f32 \t%r5, 0f3F800000, 0f00000000, %p1;", "set.lt.f32.f32 \t%r5, %r8, %r9;"])
def test_a_product_by_an_indicator_is_exact(choice: str) -> None:
    """It rounds nothing, so that both sides of an exchange may fuse it; a product by anything else does."""
    from coordroute.kernels.aot import lopsided_sums

    start = "\tshfl.sync.bfly.b32 \t%r2, %r1, 16, 31, -1;\n\t" + choice
    assert lopsided_sums(start + "\n\tfma.rn.f32 \t%r3, %r4, %r5, %r2;") == 0
    assert lopsided_sums(start + "\n\tmul.f32 \t%r1, %r4, %r5;\n\tadd.f32 \t%r3, %r1, %r2;") == 0
    # an indicator that is the addend says nothing of the product
    assert lopsided_sums(start + "\n\tfma.rn.f32 \t%r3, %r2, %r4, %r5;") == 1
    assert lopsided_sums(start + "\n\tfma.rn.f32 \t%r3, %r4, %r6, %r2;") == 1
    assert (
        lopsided_sums(start.replace("0f00000000", "0f40000000").replace("set", "max") + "\n\tfma.rn.f32 \t%r3, %r4, %r5, %r2;") == 1
    )


def test_halves_of_a_number_are_followed() -> None:
    """A sum of two float32 at a time (sm_100), and a float64 put together from what two shuffles bring."""
    from coordroute.kernels.aot import lopsided_sums

    shuffles = "\tshfl.sync.bfly.b32 \t%r2, %r1, 16, 31, -1;\n"
    both = shuffles + "\tmov.b64 \t%rd1, {%r2, %r7};\n\tmul.f32x2 \t%rd2, %rd3, %rd3;\n"
    assert lopsided_sums(both + "\tadd.f32x2 \t%rd4, %rd1, %rd2;") == 1
    assert lopsided_sums(both + "\tmov.b64 \t{%r8, %r9}, %rd2;\n\tadd.f32 \t%r3, %r9, %r2;") == 1
    double = shuffles + "\tcvt.u64.u32 \t%rd1, %r2;\n\tshl.b64 \t%rd2, %rd1, 32;\n\tor.b64 \t%rd3, %rd4, %rd2;\n"
    assert lopsided_sums(double + "\tfma.rn.f64 \t%rd5, %rd6, %rd6, %rd3;") == 1
