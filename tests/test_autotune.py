"""The autotuner on a CPU: space, timing, proof, workers, search, and that an interrupted search goes on."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from coordroute.autotune import benchmark, proof, search, space, store, timing, worker
from coordroute.autotune import device as devices
from coordroute.autotune.space import Group
from coordroute.kernels import config as kernel_config
from coordroute.kernels.config import Key, LaunchConfig

CPU = torch.device("cpu")
SMALL = [Group("soft_topk", "float32", 4, 16), Group("coordinate_descent", "float32", 4, 16)]


# --- space -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("effort", space.EFFORTS)
def test_every_candidate_may_be_stored_for_its_key(backend, effort):
    groups = space.groups(backend, effort)
    assert len(groups) == len(set(groups))
    for group in groups:
        for direction in kernel_config.DIRECTIONS:
            key = group.key(direction)
            assert key == kernel_config.make_key(group.op, direction, getattr(torch, group.dtype), group.rows, group.n)
            found = space.candidates(key, backend, effort)
            assert found[0] == kernel_config.heuristic(key, backend)
            # on a CPU there may be one thread, one row and no compiler: then there is nothing to choose
            assert len(found) == len(set(found)) and len(found) >= (3 if backend == "triton" else 1)
            for config in found:
                assert LaunchConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
                if backend == "triton":
                    assert config == found[0] or space.is_valid(config, key)


def test_quick_is_a_part_of_full():
    for backend in ("triton", "cpu"):
        assert set(space.groups(backend, "quick")) <= set(space.groups(backend, "full"))


# --- timing ----------------------------------------------------------------------------------------------------------


def test_a_race_is_interleaved_and_one_that_fails_disturbs_nobody():
    order: list[str] = []

    def noted(name):
        return lambda i: order.append(name)

    def fails(i):
        raise RuntimeError("no")

    works = [timing.Work("a", noted("a")), timing.Work("x", fails), timing.Work("b", noted("b"))]
    a, x, b = timing.race(works, CPU, samples=6, target_us=0.01)
    assert isinstance(x, RuntimeError)
    assert len(a.samples) == len(b.samples) == 6
    timed = order[4:]
    assert timed == ["a", "b", "b", "a"] * 3
    assert a.ci_us[0] <= a.median_us <= a.ci_us[1]


def test_the_interval_of_a_median():
    assert timing.median_interval([3.0]) == (3.0, 3.0)
    assert timing.median_interval(range(101)) == (40, 60)
    fast, slow = timing.Timed([1.0, 2.0, 3.0], ""), timing.Timed([2.0, 4.0, 6.0], "")
    assert timing.paired_ratio(fast, slow) == (0.5, 0.5, 0.5)


# --- proof -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", kernel_config.OPS)
def test_the_operator_of_a_configuration_is_differentiable(op):
    config = LaunchConfig("eager", rows_per_program=2, checkpoint_segments=5)
    function = proof.operator(op, "cpu", config, config)
    scores = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64, requires_grad=True)
    if op == "soft_topk":
        eps = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s, k, eps: function(s, k, eps=eps), (scores, k, eps))
    else:
        assert torch.autograd.gradcheck(lambda s, k: function(s, k, n_iters=6, eps=0.3, eps_init=1.0, eps_decay=0.7), (scores, k))


@pytest.mark.parametrize("op", kernel_config.OPS)
def test_a_right_configuration_is_proved_and_a_wrong_one_is_not(op, monkeypatch):
    key = Key(op, "forward", "float32", 4, 16)
    config = kernel_config.heuristic(key, "cpu")
    outcome = proof.prove(CPU, key, config, config)
    assert outcome.status == "ok", outcome.reason
    assert store.check_proof(outcome.proof, key, "cpu") is None

    right = proof.raw(op, "cpu")
    off = proof.Raw(lambda *a: (lambda lam, *rest: (lam * 1.01, *rest))(*right.forward(*a)), right.backward)
    monkeypatch.setattr(proof, "raw", lambda op, backend: off)
    assert proof.prove(CPU, key, config, config).status == "wrong"

    def raises(*arguments):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(proof, "raw", lambda op, backend: proof.Raw(raises, raises))
    outcome = proof.prove(CPU, key, config, config)
    assert outcome.status == "does not compile" and "out of registers" in outcome.reason


def test_a_worker_that_dies_costs_one_candidate():
    key = Key("soft_topk", "forward", "float32", 4, 16)
    config = kernel_config.heuristic(key, "cpu")
    task = worker.Task(key, config, config)
    assert worker.Task.from_json(json.loads(task.identifier())) == task
    with worker.Pool("cpu", 1) as pool:
        ((_, first),) = pool.prove_all([task])
        assert first.status == "ok", first.reason
        (running,) = pool._all
        os.kill(running._process.pid, signal.SIGKILL)
        running._process.wait()
        outcomes = [outcome.status for _, outcome in pool.prove_all([task, task])]
    assert outcomes == ["crashes", "ok"]
    assert running._process.poll() is not None


def test_a_worker_that_cannot_start_is_an_error_and_no_verdict_on_candidates():
    key = Key("soft_topk", "forward", "float32", 4, 16)
    config = kernel_config.heuristic(key, "cpu")
    with worker.Pool("no such device", 1) as pool, pytest.raises(worker.WorkerError, match="no such device"):
        list(pool.prove_all([worker.Task(key, config, config)]))


# --- search ----------------------------------------------------------------------------------------------------------


def fake_proof(op, device, dtype, n, forward, backward, binary_sha256, seed=0):
    made = {"kernel_sha256": proof.kernel_sha256(op, "cpu"), "binary_sha256": None, "cases": 1, "families": ["fake"]}
    errors = {"value": 0.0, "grad_scores": 0.0, "grad_k": 0.0}
    return proof.Checked(made | {"max_error": errors, "bound": 1.0, "replays_bitwise": True, "seed": seed}, "")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A search with a stand-in for the oracle, small plans and no compiler; the file lies where lookups find it."""
    monkeypatch.setattr(proof, "check", fake_proof)
    monkeypatch.setattr(space, "cpp_compiler", lambda: None)
    monkeypatch.setitem(search._PLANS, ("cpu", "quick"), search.Plan(2, 5, 50.0, 0.1, 0.1))
    monkeypatch.setenv("COORDROUTE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(store, "_said", set())
    store.reload()
    yield store.output_path(CPU)
    store.reload()


def test_a_search_writes_what_lookups_then_find(quick):
    seen = []
    result = search.run("cpu", groups=SMALL, progress=lambda *report: seen.append(report))
    json.dumps(result)
    assert result["file"] == quick.name and not search.state_path(quick).exists()
    assert len(result["keys"]) == 4 and result["dropped"] == {}
    for made in result["keys"]:
        key = Key(**made["key"])
        assert store.lookup(CPU, key) == LaunchConfig.from_json(made["config"])
        assert made["timing"]["default_us"] > 0
        assert made["gain"] == pytest.approx(made["timing"]["default_us"] / made["timing"]["median_us"], rel=1e-3)
        assert {candidate["status"] for candidate in made["candidates"]} <= {"timed", "slower"}
    explanation = store.explain("cpu", *key)
    assert explanation.exact and explanation.path == quick
    assert [report[0] for report in seen] == [seen[0][0]] * len(seen)
    assert seen[-1][1] == seen[-1][0] and [report[1] for report in seen] == sorted(report[1] for report in seen)


def test_an_interrupted_search_keeps_what_is_finished_and_goes_on(quick):
    def interrupts(total, done, text, left):
        if text.startswith("timing coordinate_descent"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.run("cpu", groups=SMALL, progress=interrupts)
    assert len(store.read(quick).entries) == 2
    assert search.state_path(quick).exists()
    texts: list[str] = []
    result = search.run("cpu", groups=SMALL, progress=lambda total, done, text, left: texts.append(text))
    assert not any("soft_topk" in text for text in texts)
    assert result["resumed"] == 2 and len(result["keys"]) == 4 and len(store.read(quick).entries) == 4
    assert not search.state_path(quick).exists()


def test_fresh_drops_what_was_finished(quick):
    def interrupts(total, done, text, left):
        if text.startswith("timing coordinate_descent"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.run("cpu", groups=SMALL, progress=interrupts)
    assert search.run("cpu", groups=SMALL, fresh=True)["resumed"] == 0


def test_what_was_chosen_before_is_verified_and_timed_again_beside_the_default(quick):
    """After a change of the kernel the stale file says what to look at, and gets fresh proofs; while they hold, all are tried."""
    search.run("cpu", groups=SMALL[:1])
    assert store.outdated(quick, "cpu") == {}
    data = json.loads(quick.read_text())
    chosen = replace(LaunchConfig.from_json(data["entries"][0]["config"]), rows_per_program=3)
    for entry in data["entries"]:
        entry["config"] = chosen.to_json()
        entry["proof"]["kernel_sha256"] = "0" * 64
    quick.write_text(json.dumps(data))
    for made in search.run("cpu", groups=SMALL[:1])["keys"]:
        configs = [LaunchConfig.from_json(candidate["config"]) for candidate in made["candidates"]]
        assert len(configs) == 2 and configs[1] == chosen
        assert store.lookup(CPU, Key(**made["key"])) in configs
    afresh = search.run("cpu", groups=SMALL[:1], fresh=True)["keys"][0]["candidates"]
    assert chosen not in [LaunchConfig.from_json(candidate["config"]) for candidate in afresh]


def test_a_state_of_something_else_or_a_broken_one_is_not_gone_on_with(quick, tmp_path):
    path = tmp_path / "state.json"
    search.State(path, "one", {"group": {}}).write()
    assert search.State.open(path, "one", False).groups == {"group": {}}
    assert search.State.open(path, "two", False).groups == {}
    path.write_text("{")
    with pytest.warns(UserWarning, match="begins anew"):
        assert search.State.open(path, "one", False).groups == {}


def test_a_wrong_candidate_is_dropped_and_counted(quick, monkeypatch):
    def check(op, device, dtype, n, forward, backward, binary_sha256, seed=0):
        wrong = forward.num_threads == 1
        return proof.Checked(None, "off") if wrong else fake_proof(op, device, dtype, n, forward, backward, None)

    original = space.candidates
    monkeypatch.setattr(space, "candidates", lambda key, *a: [*original(key, *a)[:1], replace(original(key, *a)[0], num_threads=1)])
    monkeypatch.setattr(proof, "check", check)
    result = search.run("cpu", groups=SMALL[:1])
    assert result["dropped"] == {"wrong": 1}
    assert result["keys"][0]["candidates"][1]["reason"] == "off"


def test_when_the_default_itself_is_wrong_nothing_is_written(quick, monkeypatch):
    monkeypatch.setattr(proof, "check", lambda *a: proof.Checked(None, "off"))
    result = search.run("cpu", groups=SMALL[:1])
    assert not quick.exists() and result["geometric_mean_gain"] is None
    assert [key["config"] for key in result["keys"]] == [None, None]


def test_a_search_ends_when_its_time_is_up(quick):
    result = search.run("cpu", groups=SMALL, seconds=0.0)
    assert result["keys"] == [] and result["dropped"] == {"keys left out: out of time": 4}


def test_never_slower_than_the_default(quick, monkeypatch):
    """The default stays where another candidate is not surely faster."""
    flat = timing.Timed([1.0, 1.1, 1.2, 1.3, 1.4], "test")
    monkeypatch.setattr(timing, "race", lambda works, *a, **k: [flat] * len(works))
    result = search.run("cpu", groups=SMALL[:1])
    for made in result["keys"]:
        assert made["gain"] == 1.0
        assert LaunchConfig.from_json(made["config"]) == kernel_config.heuristic(Key(**made["key"]), "cpu")


def test_bad_arguments(quick, tmp_path):
    with pytest.raises(ValueError, match="effort is 'slow'; allowed is quick or full"):
        search.run("cpu", effort="slow")
    with pytest.raises(ValueError, match="folder"):
        search.run("cpu", output=tmp_path)
    with pytest.raises(ValueError, match="'tpu'"):
        search.run("tpu")


def test_describing_a_device():
    found = devices.describe("cpu")
    assert set(found) == set(store.DEVICE_FIELDS) and found["sm_count"] >= 1
    assert devices.device_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert devices.device_slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-xeon-cpu-2-20ghz"
    assert devices.architecture("9.0") == "cuda 9" and devices.architecture("gfx942") == "hip gfx94"
    assert devices.architecture("x86_64") == "cpu x86_64"


# --- benchmark -------------------------------------------------------------------------------------------------------


def test_the_benchmark_measures_the_tuned_operators(quick, monkeypatch):
    """In a process in which nobody has imported the front door, too."""
    search.run("cpu", groups=[Group("soft_topk", "float32", 4, 16)])
    asked = []
    monkeypatch.setattr(kernel_config, "_lookup", kernel_config._nothing_tuned)
    monkeypatch.setattr(store, "lookup", lambda device, key: asked.append(key))
    result = benchmark.run("cpu", shapes=((4, 16),), seconds=2.0)
    assert Key("soft_topk", "forward", "float32", 4, 16) in asked
    ours = [row for row in result["results"] if row["implementation"] == "coordroute" and row["direction"] == "forward"]
    assert ours and all(row["status"] == "ok" and row["median_us"] > 0 for row in ours)
    json.dumps(result)
