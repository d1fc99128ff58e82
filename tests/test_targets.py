"""The targets, judged by made-up results; and what the benchmark measures for them besides times of kernels."""

from __future__ import annotations

import pytest
import torch
from coordroute.autotune import benchmark, targets
from coordroute.autotune.targets import Measured

CPU = torch.device("cpu")


def time_of(peer, direction, shape, median, dtype="float32", **more):
    row = {"op": peer.op, "implementation": peer.implementation, "direction": direction, "dtype": dtype}
    return row | {"rows": shape[0], "n": shape[1], "median_us": median, "status": "ok"} | more


def only(number, measured, shape=None):
    (row,) = [row for row in targets.evaluate(measured) if row["id"] == number and shape in (None, (row["rows"], row["n"]))]
    return row


LARGE = (1024, 8192)


@pytest.mark.parametrize(("ours", "met"), [(40.0, True), (39.0, True), (40.01, False)])
def test_a_ratio_to_softmax_is_met_up_to_its_limit(ours, met):
    results = [time_of(targets.SOFT_TOPK, "forward", LARGE, ours), time_of(targets.SOFTMAX, "forward", LARGE, 40.0)]
    results += [time_of(targets.SOFT_TOPK, "forward", LARGE, 90.0, "bfloat16")]
    results += [time_of(targets.SOFTMAX, "forward", LARGE, 30.0, "bfloat16")]
    row = only("1", Measured("cuda", results), LARGE)
    assert row["met"] is met and row["figure"] == pytest.approx(ours / 40) and row["reason"] == ""
    assert row["bfloat16"] == 3.0  # beside it, without a say
    assert row["detail"] == {"numerator_us": ours, "denominator_us": 40.0}
    assert (row["limit"], row["sense"], row["unit"], row["work"]) == (1.0, "at most", "×", "soft_topk forward")


def test_limits_are_those_that_were_set():
    limits = {target.id: (target.limit, target.sense) for target in targets.TARGETS}
    most = {"1": 1.0, "2": 0.55, "3": 2.0, "4": 1 / 12, "5": 0.6, "6": 1.0, "7": 1 / 12, "10a": 1.0, "10b": None}
    most |= {"12a": 0.0, "12b": 20.0, "13a": 1.5, "13b": 1.5}
    least = {"8a": 12.0, "8b": 25.0, "9a": 35.0, "9b": 300.0, "11a": 20.0, "11b": 6.0}
    assert limits == {name: (limit, "at most") for name, limit in most.items()} | {
        name: (limit, "at least") for name, limit in least.items()
    }


@pytest.mark.parametrize(("ours", "met"), [(10.0, True), (9.0, True), (10.1, False)])
def test_so_many_times_faster_than_a_peer(ours, met):
    """The row of a peer has its version behind its name."""
    peer = time_of(targets.COLT5, "backward", LARGE, 250.0) | {"implementation": "colt5-attention 0.9.0"}
    row = only("8b", Measured("cuda", [time_of(targets.DESCENT, "backward", LARGE, ours), peer]))
    assert row["met"] is met and row["figure"] == pytest.approx(250 / ours, rel=1e-5)
    assert (row["limit"], row["sense"]) == (25.0, "at least")


def test_a_figure_that_is_missing_says_why():
    ours = time_of(targets.DESCENT, "forward", LARGE, 5.0)
    missing = only("8a", Measured("cuda", [ours]))
    assert (missing["met"], missing["figure"]) == (None, None)
    assert missing["reason"] == "colt5-attention was not measured at 1024x8192 in this run; --peers measures it"
    skipped = time_of(
        targets.COLT5, "forward", LARGE, None, status="skipped: ModuleNotFoundError: No module named 'colt5_attention'"
    )
    reason = only("8a", Measured("cuda", [ours, skipped]))["reason"]
    assert reason == "colt5-attention: ModuleNotFoundError: No module named 'colt5_attention'"
    alone = only("1", Measured("cuda", [time_of(targets.SOFTMAX, "forward", LARGE, 5.0)]), LARGE)
    assert alone["met"] is None and alone["reason"] == "soft_topk by coordroute was not measured at 1024x8192 in this run"
    for odd in (0.0, float("nan"), float("inf"), -1.0):
        results = [time_of(targets.SOFT_TOPK, "forward", LARGE, 1.0), time_of(targets.SOFTMAX, "forward", LARGE, odd)]
        assert "no time that could be compared" in only("1", Measured("cuda", results), LARGE)["reason"]


def test_every_row_without_a_verdict_has_a_reason_and_targets_of_a_gpu_do_not_apply_to_a_cpu():
    rows = targets.evaluate(Measured("cpu", []))
    assert all(row["met"] is None and row["reason"] and row["figure"] is None for row in rows)
    assert {row["id"] for row in rows if row["applies"]} == {"11a", "11b", "12a", "12b"}
    assert all(row["reason"] == "it is for a GPU" for row in rows if not row["applies"])
    assert all(row["applies"] for row in targets.evaluate(Measured("cuda", [])))


def test_sweeps_divide_the_time_and_without_a_count_there_is_no_figure():
    shape = targets.HUGE_ROW[0]
    copy = time_of(targets.COPY, "forward", shape, 50.0)
    row = only("6", Measured("cuda", [time_of(targets.SOFT_TOPK, "forward", shape, 350.0, sweeps=7), copy]))
    assert row["met"] is True and row["figure"] == 1.0 and row["detail"]["sweeps"] == 7
    assert only("6", Measured("cuda", [time_of(targets.SOFT_TOPK, "forward", shape, 350.0, sweeps=6), copy]))["met"] is False
    ours = time_of(targets.SOFT_TOPK, "forward", shape, 350.0, sweeps=None, sweeps_reason="there is no count_sweeps")
    row = only("6", Measured("cuda", [ours, copy]))
    assert (row["met"], row["figure"], row["reason"]) == (None, None, "there is no count_sweeps")
    assert targets.counts_sweeps("soft_topk", "forward", *shape)
    assert not targets.counts_sweeps("soft_topk", "backward", *shape) and not targets.counts_sweeps("copy", "forward", *shape)


def test_without_a_limit_a_figure_is_reported_and_not_judged():
    results = [time_of(targets.DESCENT_50, "backward", LARGE, 30.0), time_of(targets.DESCENT, "backward", LARGE, 20.0)]
    row = only("10b", Measured("cuda", results))
    assert (row["figure"], row["met"], row["reason"]) == (1.5, None, "no limit is set")


def test_a_cpu_is_judged_by_forward_and_backward_together():
    shape = targets.CPU_SHAPE[0]
    cpu = [
        time_of(peer, direction, shape, median)
        for peer, medians in ((targets.EAGER, (100.0, 140.0)), (targets.SOFT_TOPK, (8.0, 4.0)), (targets.DESCENT, (30.0, 20.0)))
        for direction, median in zip(("forward", "backward"), medians, strict=True)
    ]
    measured = Measured("cuda", [], cpu=cpu)
    assert (only("11a", measured)["figure"], only("11a", measured)["met"]) == (20.0, True)
    assert (only("11b", measured)["figure"], only("11b", measured)["met"]) == (4.8, False)
    assert only("11a", Measured("cuda", cpu, cpu="it has one core"))["reason"] == "it has one core"
    # a row of one direction does not do
    assert "was not measured" in only("11a", Measured("cpu", [], cpu=cpu[:3]))["reason"]


def test_memory_and_host_time_are_judged_too():
    kept = {"dtype": "float32", "rows": 1024, "n": 8192, "status": "ok"}
    memory = [
        {"op": "soft_topk", "floats_a_row": 2.0, "growth": 0.25, **kept},
        {"op": "coordinate_descent", "floats_a_row": 20.0, "growth": 0.0, **kept},
    ]
    measured = Measured("cuda", [], memory=memory, host={"bare_us": 20.0, "soft_topk_us": 30.0, "coordinate_descent_us": 31.0})
    found = {row["id"]: row for row in targets.evaluate(measured) if row["figure"] is not None}
    assert {name: (row["figure"], row["met"]) for name, row in found.items()} == {
        "12a": (0.25, False),
        "12b": (20.0, True),
        "13a": (1.5, True),
        "13b": (1.55, False),
    }
    assert only("12b", Measured("cuda", [], memory=[memory[1] | {"floats_a_row": 20.01}]))["met"] is False
    failed = memory[1] | {"floats_a_row": None, "status": "skipped: RuntimeError: no"}
    assert only("12b", Measured("cuda", [], memory=[failed]))["reason"] == "RuntimeError: no"
    assert only("13a", Measured("cuda", [], host={"bare_us": 0.0}))["met"] is None
    paired = {"bare_us": 20.0, "soft_topk_us": 30.2, "soft_topk_ratio": 1.49}
    assert only("13a", Measured("cuda", [], host=paired))["figure"] == 1.49


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_measures_whatever_a_target_needs():
    for device, listed in (("cuda", benchmark.GPU_SHAPES), ("cpu", benchmark.CPU_SHAPES)):
        found = {(one.op, one.implementation): one for one in benchmark.contenders(True, kind=device) if "float32" in one.dtypes}
        for target in targets.TARGETS:
            for peer in (target.numerator, target.denominator):
                if target.device != device or peer is None:
                    continue
                (contender,) = [one for name, one in found.items() if peer.is_of({"op": name[0], "implementation": name[1]})]
                for shape in target.shapes:
                    assert shape in listed and (contender.shapes is None or shape in contender.shapes), (target.id, peer)
                    assert set(target.directions) <= ({"forward", "backward"} if contender.backward else {"forward"})
                    assert device in contender.devices


def test_memory_is_what_autograd_keeps_beyond_the_scores_and_the_output(monkeypatch):
    monkeypatch.setattr(targets, "STANDARD", ((4, 64),))
    rows = benchmark.memory_kept(CPU, ("soft_topk", "coordinate_descent"))
    assert len(rows) == 4 and all(row["status"] == "ok" for row in rows)
    assert all(row["growth"] == 0 and row["floats_a_row"] <= 20 for row in rows)

    def wasteful(scores, k, *, eps):
        squares = scores * scores  # keeps the scores
        return (squares * squares.exp()).sqrt()  # keeps squares, their exp, and the output

    monkeypatch.setattr("coordroute.router.soft_topk", wasteful)
    row = benchmark.memory_kept(CPU, ("soft_topk",))[0]
    assert row["growth"] == 2 and row["floats_a_row"] == 2 * 64


def test_host_time_or_the_reason_why_there_is_none(monkeypatch):
    assert benchmark.host_time(CPU) == "it is not measured on this device (cpu)"
    monkeypatch.setattr(benchmark.hosttime, "measure", lambda device: {"bare_us": 1.0})
    assert benchmark.host_time(CPU) == {"bare_us": 1.0}

    def fails(device):
        raise RuntimeError("no queue")

    monkeypatch.setattr(benchmark.hosttime, "measure", fails)
    assert benchmark.host_time(CPU) == "RuntimeError: no queue"


def test_two_cores_of_the_cpu_are_measured_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(benchmark, "_cores", lambda: 1)
    assert benchmark.on_the_cpu(("soft_topk",)) == "it is for 2 cores of a CPU, and this process may use 1"
    monkeypatch.setattr(benchmark, "_cores", lambda: 2)
    monkeypatch.setattr(targets, "CPU_SHAPE", ((4, 64),))
    monkeypatch.setattr(benchmark, "CPU_SHAPES", ())
    before = torch.get_num_threads()
    found = benchmark.on_the_cpu(("soft_topk", "coordinate_descent"))
    assert torch.get_num_threads() == before and found["threads"] == 2
    names = {(row["op"], row["implementation"], row["direction"]) for row in found["results"] if row["median_us"]}
    eager = targets.EAGER.implementation
    assert names == {
        (op, who, direction)
        for op, who in (("soft_topk", "coordroute"), ("coordinate_descent", "coordroute"), ("coordinate_descent", eager))
        for direction in ("forward", "backward")
    }


def test_a_contender_of_few_shapes_says_so_and_one_that_is_too_slow_too(monkeypatch):
    bench = benchmark._Bench(CPU, [], float("inf"))
    topk = benchmark.Contender("topk", "torch.topk", benchmark._topk, shapes=((8, 1024),))
    monkeypatch.setattr(benchmark, "CPU_SHAPES", ((8, 1024), (4, 16)))
    assert bench.skips(topk, 8, 1024) is None and bench.skips(topk, 5, 5) is None
    assert bench.skips(topk, 4, 16) == "measured only at 8x1024"
    monkeypatch.setitem(benchmark.CALL_SECONDS, "cpu", -1.0)
    bench.contenders = [topk]
    (row,) = bench.measure(8, 1024, "float32", "forward")
    assert row["median_us"] is None and row["status"].startswith("skipped: a call takes ")
    with pytest.raises(ValueError, match="only names 'tpok'; allowed are soft_topk, coordinate_descent, copy"):
        benchmark.run("cpu", only=("tpok",))
