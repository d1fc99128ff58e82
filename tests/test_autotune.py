"""The autotuner on a CPU: space, timing, proof, workers, the journal, search, and that an interrupted search goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from coordroute.autotune import benchmark, binaries, journal, proof, search, space, store, strategies, timer, timing, worker
from coordroute.autotune import device as devices
from coordroute.autotune.binaries import Compiled
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


def resident(n: int, warps: int, rows: int = 1, limit: int = 0) -> LaunchConfig:
    return LaunchConfig("resident", n, rows, warps, 1, max_registers=limit)


def test_a_form_leaves_out_what_follows_from_the_length():
    assert space.form(resident(1024, 1)) == space.form(resident(8192, 8))
    # a warp with so many scores has a row of them, or two of half of them; two warps with two rows are another choice
    assert space.form(resident(1024, 1)) == space.form(resident(512, 1, 2)) != space.form(resident(512, 1))
    assert len({space.form(one) for one in (resident(64, 1), resident(64, 2), resident(64, 2, 2), resident(64, 1, 1, 40))}) == 4
    shared = LaunchConfig("split", 4096, 1, 4, 1, programs_per_row=8)
    assert space.form(shared) == space.form(replace(shared, programs_per_row=32)) != space.form(replace(shared, block=2048))
    tiled = LaunchConfig("tiled", 4096, 1, 16, 1)
    others = [replace(tiled, block=2048), replace(tiled, num_warps=8), replace(tiled, num_stages=2)]
    assert len({space.form(one) for one in (tiled, *others)}) == 4


def familiar(ranked, ratios, forms, default=None, keep=1.0):
    return space.familiar(ranked, ratios, forms, default or resident(64, 16), keep)


def test_a_form_that_no_key_has_must_gain_more():
    new, known, other = resident(64, 1), resident(64, 2), resident(64, 4)
    forms = {space.form(resident(1024, 32)), space.form(resident(1024, 64))}
    assert forms == {space.form(known), space.form(other)}
    ratios = {new: 0.90, known: 0.92, other: 0.95}
    assert familiar([new, known, other], ratios, forms) == [known, new, other]
    assert familiar([new, other, known], ratios, {space.form(known)}) == [known, new, other]
    assert familiar([new, known, other], ratios | {known: 0.931}, forms) == [new, known, other]
    assert familiar([known, new, other], ratios, forms) == [known, new, other]
    assert familiar([new, known, other], ratios, ()) == [new, known, other]
    # the default, where the best of the known forms is hardly faster
    assert familiar([new, known, other], ratios | {other: 0.925}, forms, other, 1.01) == [other, new, known]
    assert familiar([new, known, other], ratios | {other: 0.935}, forms, other, 1.01) == [known, new, other]


def test_a_form_must_gain_much_when_there_are_as_many_as_an_operator_is_to_have():
    new, known = resident(64, 1), resident(64, 2)
    forms = {space.form(known)} | {space.form(resident(64, 1, 1, limit)) for limit in range(1, space.MOST_FORMS - 1)}
    ratios = {new: 0.82, known: 0.9}
    assert familiar([new, known], ratios, forms) == [new, known]
    forms.add(space.form(resident(64, 1, 1, 99)))
    assert len(forms) == space.MOST_FORMS
    assert familiar([new, known], ratios, forms) == [known, new]
    assert familiar([new, known], ratios | {new: 0.8}, forms) == [new, known]


@pytest.mark.parametrize("backend, most", [("triton", 15), ("cpu", 16)])
def test_the_heuristic_gets_along_with_few_forms(backend, most):
    keys = [group.key(way) for group in space.groups(backend, "full") for way in kernel_config.DIRECTIONS]
    for op in kernel_config.OPS:
        assert len({space.form(kernel_config.heuristic(key, backend)) for key in keys if key.op == op}) <= most


def test_groups_of_an_item_agree_on_a_new_form_in_their_order(tmp_path):
    groups = [Group("soft_topk", "float32", 4096, n) for n in (128, 256, 512)]
    made = on_a_gpu(tmp_path / "made.json", groups)
    hunts = {}
    # the first two have found two new forms that are nearly as good as each other, the third one that surely is not
    for group, order in reversed(list(zip(groups, ((1, 2), (2, 1), (2, 1)), strict=True))):
        tracks = {way: made.track(group, way) for way in kernel_config.DIRECTIONS}
        for track in tracks.values():
            fast = 0.80 if group.n == 512 else 0.899
            track.preferred = [resident(group.n, group.n // 64, 16 * one) for one in order] + [track.default]
            track.figures = dict(zip(track.preferred, (fast, 0.90, 1.0), strict=True))
            track.ranked = track.preferred[-1:] + track.preferred[:-1]  # as if no form but the default's had been known
        hunts[group.label()] = types.SimpleNamespace(group=group, tracks=tracks)
    made.agree(hunts)
    for way in kernel_config.DIRECTIONS:
        assert [hunts[group.label()].tracks[way].ranked[0].rows_per_program for group in groups] == [16, 16, 32]


def test_between_a_key_and_the_next_its_entry_serves():
    key = Key("soft_topk", "forward", "float32", 1024, 16384)
    assert space.between(key, ()) == key._replace(rows=800, n=12800)
    # an entry for such rows serves them
    assert space.between(key, {key._replace(n=12800)}) == key._replace(rows=800)
    assert space.between(key._replace(n=12800), {key}) == key._replace(rows=800, n=10000)
    assert kernel_config.bucket_n(10000) == 12800
    assert space.between(key._replace(rows=1, n=512), ()) == key._replace(rows=1, n=400)


def test_what_rows_that_do_not_fill_their_block_have_is_what_full_ones_have():
    for op in kernel_config.OPS:
        for way in kernel_config.DIRECTIONS:
            whole, part = (Key(op, way, "float32", 512, n) for n in (16384, 12800))
            assert kernel_config.heuristic(part, "triton") == kernel_config.heuristic(whole, "triton")
            found = space.candidates(part, "triton", "full")
            assert found == space.candidates(whole, "triton", "full")
            for config in found:
                assert space.fitted(config, whole, part) == space.fitted(config, part, whole) == config


def test_forms_of_keys_that_are_not_tuned_now_are_counted(quick):
    run(groups=SMALL[:1])
    elsewhere = [SMALL[0]._replace(n=4 * SMALL[0].n)]
    entries = store.read(quick).entries.values()
    document = json.loads(quick.read_text())
    document["entries"] = [entry | {"config": entry["config"] | {"rows_per_program": 77}} for entry in entries]
    quick.write_text(json.dumps(document))
    odd = {space.form(config) for config in store.chosen(quick, devices.describe(CPU)).values()}

    def forms(groups, fresh=True):
        return search._Search(CPU, "quick", quick, fresh, groups, None, 0, 0, None, None).forms(SMALL[0].op)

    assert odd and odd <= forms(elsewhere)
    assert not odd & forms(SMALL[:1])
    # nor are those whose proofs hold while those of others do not
    stale = {"kernel_sha256": "0" * 64}
    document["entries"] += [
        entry | {"key": entry["key"] | {"n": elsewhere[0].n}, "proof": entry["proof"] | stale} for entry in entries
    ]
    quick.write_text(json.dumps(document))
    assert odd <= forms([SMALL[0], *elsewhere], fresh=False)


@pytest.mark.parametrize("room", [2, 1])
def test_other_checkpoint_segments_are_taken_where_both_forms_have_room(tmp_path, monkeypatch, room):
    group = Group("coordinate_descent", "float32", 1024, 8192)
    made = on_a_gpu(tmp_path / "made.json", [group])
    monkeypatch.setattr(space, "MOST_FORMS", len(made.forms(group.op)) + room)
    tracks = {way: made.track(group, way) for way in kernel_config.DIRECTIONS}
    for track in tracks.values():
        track.figures = {track.default: 1.0}
        track.preferred = [track.default]
        track.ranked = [space.with_segments(track.default, 5)]
    made.agree({group.label(): types.SimpleNamespace(group=group, tracks=tracks)})
    assert {track.ranked[0].checkpoint_segments for track in tracks.values()} == ({5} if room == 2 else {20})


def test_a_new_form_is_taken_where_its_last_race_shows_what_is_asked_of_one(tmp_path, monkeypatch):
    """What gains most comes first; what has the same form then needs to gain no more than any other."""
    groups = [Group("soft_topk", "float32", 4096, n) for n in (128, 256, 512, 1024)]
    made = on_a_gpu(tmp_path / "made.json", groups)
    monkeypatch.setattr(space, "MOST_FORMS", len(made.forms("soft_topk")) + 1)
    one, two = 16, 32
    gains = [(one, 0.99), (one, 0.96), (two, 0.91), (two, 0.97)]
    hunts, pairs, raced = {}, {}, {}
    for group, (rows, ratio) in zip(groups, gains, strict=True):
        tracks = {way: made.track(group, way) for way in kernel_config.DIRECTIONS}
        forward, backward = tracks.values()
        config = resident(group.n, group.n // 64, rows)
        hunts[group.label()] = types.SimpleNamespace(group=group, tracks=tracks)
        pairs[group.label()] = search._Pair(config, backward.default, None, None)
        timed = {forward.default: timing.Timed([10.0], ""), config: timing.Timed([10.0 * ratio], "")}
        raced[group.label()] = search._Raced({"forward": timed, "backward": {}}, {"forward": True, "backward": False})

    def taken(*todo):
        found = made.few(hunts, pairs, raced, todo or raced)
        assert not any(one.taken["backward"] for one in found.values())
        return [found[group.label()].taken["forward"] for group in groups]

    # the second new form has the room there is, and for the first one a gain of 10 % is asked then
    assert taken() == [False, False, True, True]
    # of one that is raced again after the others were settled: what these took stays, and its form is one that a key has
    assert taken(groups[0].label()) == [True] * 4
    monkeypatch.setattr(space, "MOST_FORMS", space.MOST_FORMS + 1)
    assert taken() == [True, True, True, True]
    monkeypatch.setattr(space, "NEW_FORM", 0.95)
    assert taken() == [False, False, True, True]
    for hunt in hunts.values():  # what an earlier run has chosen stays
        hunt.tracks["forward"].known = pairs[hunt.group.label()].one
    assert taken() == [True, True, True, True]


def test_after_an_upgrade_what_is_long_is_proved_first(tmp_path, monkeypatch):
    groups = [Group("soft_topk", "float32", 4, n) for n in (16, 64, 32)]
    assert on_a_gpu(tmp_path / "made.json", groups).groups == groups
    known = {
        group.key(way): store.Outdated(resident(64, 1, 1), ("driver",)) for group in groups for way in kernel_config.DIRECTIONS
    }
    monkeypatch.setattr(store, "outdated", lambda *arguments: known)
    made = on_a_gpu(tmp_path / "made.json", groups, fresh=False)
    assert [group.n for group in made.groups] == [64, 32, 16]
    known.popitem()  # one is searched, which is better done in its order
    assert on_a_gpu(tmp_path / "made.json", groups, fresh=False).groups == groups


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
def test_a_right_pair_is_proved_and_a_wrong_one_is_not(op, monkeypatch):
    keys = [Key(op, direction, "float32", 4, 16) for direction in kernel_config.DIRECTIONS]
    config = kernel_config.heuristic(keys[0], "cpu")
    pair = op, "float32", 4, 16, config, config
    proved = proof.prove(CPU, *pair)
    assert (proved.status, proved.reason) == ("ok", "")
    for key, made in zip(keys, (proved.forward, proved.backward), strict=True):
        assert store.check_proof(made, key, "cpu") is None

    right = proof.raw(op, "cpu")
    for off in (
        right._replace(forward=lambda *a: (lambda lam, *rest: (lam * 1.01, *rest))(*right.forward(*a))),
        right._replace(backward=lambda *a: (lambda grad, *rest: (grad * 1.01, *rest))(*right.backward(*a))),
    ):
        monkeypatch.setattr(proof, "raw", lambda op, backend, off=off: off)
        proved = proof.prove(CPU, *pair)
        assert (proved.status, proved.forward, proved.backward) == ("wrong", None, None) and "FAILS" in proved.reason

    def raises(*arguments):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(proof, "raw", lambda op, backend: proof.Raw(raises, raises))
    proved = proof.prove(CPU, *pair)
    assert proved.status == "wrong" and "out of registers" in proved.reason

    def full(*arguments):
        raise torch.OutOfMemoryError("80 GiB")

    monkeypatch.setattr(proof, "raw", lambda op, backend: proof.Raw(full, full))
    assert proof.prove(CPU, *pair).status == "out of memory"


# --- workers and the timer -------------------------------------------------------------------------------------------


def request(config: LaunchConfig, group: Group = SMALL[0]) -> dict:
    return worker.prove_request(*group, config, config, 0)


def test_a_worker_proves_and_a_pool_too():
    config = kernel_config.heuristic(SMALL[0].key("forward"), "cpu")
    with worker.Pool("cpu", 1) as pool:
        first, second = pool.submit(request(config)), pool.submit(worker.compile_request(SMALL[0].key("forward"), config, True))
        assert proof.Proved(**first.result(120)).status == "ok"
        assert Compiled(**second.result(60)) == Compiled("ok")
        assert pool.submit({"do": "nonsense"}).result(60).status == "crashes"
        (running,) = [one._process._process for one in pool._workers]
        if hasattr(os, "getpriority"):
            assert os.getpriority(os.PRIO_PROCESS, running.pid) == min(os.getpriority(os.PRIO_PROCESS, 0) + worker.NICENESS, 19)
    assert running.poll() is not None


def test_a_worker_that_cannot_start_is_an_error_and_no_verdict_on_candidates():
    config = kernel_config.heuristic(SMALL[0].key("forward"), "cpu")
    with worker.Pool("no such device", 1) as pool, pytest.raises(worker.WorkerError, match="no such device"):
        pool.submit(request(config)).result(60)
    with pytest.raises(worker.WorkerError, match="no such device"):
        worker.Inline(worker.Worker("no such device")).submit(request(config))


def test_a_timer_times_candidates_of_several_keys_in_the_same_rounds():
    local = worker.Local("cpu")
    asks = timer.Timer(local, "cpu", 0, 1.0)
    keys = [group.key(direction) for group in SMALL for direction in kernel_config.DIRECTIONS]
    for key in keys:
        asks.open(search.label(key), key)
    for key in keys:
        default = kernel_config.heuristic(key, "cpu")
        configs = [default, replace(default, rows_per_program=2), replace(default, variant="nonsense")]
        samples, failures = asks.sample(search.label(key), configs, 3)
        assert list(samples) == configs[:2] and all(len(found) == 3 and min(found) > 0 for found in samples.values())
        assert list(failures) == configs[2:] and failures[configs[2]].status == "crashes"
        assert "interleaved" in asks.methods[search.label(key), default]
        more, _ = asks.sample(search.label(key), configs[:1], 100, 1e-9)
        assert len(more[default]) == 1
    for key in keys:
        asks.close(search.label(key))
    assert local._service._session._race is None and local._service._session._keys == {}


# --- the journal -----------------------------------------------------------------------------------------------------


def test_a_journal_keeps_answers_of_the_same_run_only(tmp_path):
    path = journal.journal_path(tmp_path / "x.json")
    with_two = journal.Journal(path, "one")
    with_two.put("samples", "a", [1])
    with_two.put("proved", "b", {"status": "ok"})
    with_two.close()
    again = journal.Journal(path, "one")
    assert (again.get("samples", "a"), again.get("proved", "b"), again.get("proved", "a")) == ([1], {"status": "ok"}, None)
    assert again.count("samples") == 1
    assert journal.Journal(path, "two").get("samples", "a") is None
    assert path.exists()
    other = journal.Journal(path, "two")
    other.put("samples", "c", [3])
    other.close()
    assert journal.Journal(path, "one").get("samples", "a") is None
    other.remove()
    assert not path.exists()


def test_a_line_that_was_cut_off_is_no_error_and_is_gone_afterwards(tmp_path, recwarn):
    path = journal.journal_path(tmp_path / "x.json")
    first = journal.Journal(path, "one")
    first.put("samples", "a", [1])
    first.put("samples", "b", [2, 3])
    first.close()
    for cut in range(1, len(path.read_bytes().splitlines()[-1]) + 1):
        path.write_bytes(path.read_bytes()[:-1])
        found = journal.Journal(path, "one")
        assert (found.get("samples", "a"), found.get("samples", "b")) == ([1], None), cut
    path.write_bytes(path.read_bytes() + b'["samples","b",[')
    found = journal.Journal(path, "one")
    found.put("samples", "c", [4])
    found.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [line for line in lines if line[0] != "spent"] == [["samples", "a", [1]], ["samples", "c", [4]]]
    assert not recwarn


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"schema": 2}\n', "\xff\n"])
def test_what_is_no_journal_is_said_and_done_again(tmp_path, text):
    path = tmp_path / ".x.search.0.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="done again"):
        journal.Journal(path, "one").put("samples", "a", [1])
    assert journal.Journal(path, "one").get("samples", "a") == [1]


def test_the_journals_of_all_processes_are_read_and_removed_and_nobody_elses(tmp_path):
    output = tmp_path / "x[1].json"
    paths = [journal.journal_path(output, rank) for rank in range(3)]
    for rank, path in enumerate(paths):
        one = journal.Journal(path, "one")
        one.put("samples", f"of {rank}", rank)
        one.close()
    others = [journal.journal_path(tmp_path / name) for name in ("x1.json", "x[1].search.json", "x.json")]
    for path in others:
        other = journal.Journal(path, "one")
        other.put("samples", "of another", 1)
        other.close()
    found = journal.Journal(paths[1], "one", ranks=2)
    assert [found.get("samples", f"of {rank}") for rank in range(3)] == [0, 1, 2]
    assert found.get("samples", "of another") is None
    # rank 0 of two may have begun already
    assert journal.Journal(paths[1], "one", fresh=True, ranks=2).count("samples") == 0
    assert [path.exists() for path in paths] == [True, False, False]
    found.remove()
    assert not any(path.exists() for path in paths) and all(path.exists() for path in others)


# --- search ----------------------------------------------------------------------------------------------------------


def fake_proof(op, device, dtype, n, forward, backward, binary_sha256, seed=0, most=None):
    made = {"kernel_sha256": proof.kernel_sha256(op, "cpu"), "binary_sha256": None, "cases": 1, "families": ["fake"]}
    errors = {"value": 0.0, "grad_scores": 0.0, "grad_k": 0.0}
    return proof.Checked(made | {"max_error": errors, "bound": 1.0, "replays_bitwise": True, "seed": seed}, "")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A search with a stand-in for the oracle, small plans and no compiler; the file lies where lookups find it."""
    plan = strategies.Plan(first_rounds=2, refinements=1, contenders=2, contender_rounds=2, doubts=0)
    monkeypatch.setattr(proof, "check", fake_proof)
    monkeypatch.setattr(space, "cpp_compiler", lambda: None)
    monkeypatch.setitem(search._PLANS, ("cpu", "quick"), search.Plan(plan, 2, 7, 50.0))
    monkeypatch.setenv("COORDROUTE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(store, "_said", set())
    store.reload()
    yield store.output_path(CPU)
    store.reload()


def run(**more) -> dict:
    return search.run("cpu", workers=0, **{"groups": SMALL, "seconds": 1000.0} | more)


@pytest.fixture
def speeds(monkeypatch):
    """Microseconds of a sample by rows_per_program; every configuration that was timed, in order, is noted."""
    known: dict[int, float] = {}
    noted: list[tuple[str, LaunchConfig, int]] = []

    def sample(self, name, configs, rounds, seconds=None):
        noted.extend((name, config, rounds) for config in configs)
        made = {config: [known.get(config.rows_per_program, 10.0)] * rounds for config in configs}
        return {config: found for config, found in made.items() if found[0] > 0}, {
            config: worker.Failure("hangs", "for ever") for config, found in made.items() if found[0] <= 0
        }

    monkeypatch.setattr(timer.Timer, "sample", sample)
    return known, noted


@pytest.fixture
def proved(monkeypatch):
    """The pairs that were proved, forward and backward, each by its rows a program; all proofs hold."""
    found: list[tuple[int, int]] = []

    def check(op, device, dtype, n, forward, backward, *rest):
        found.append((forward.rows_per_program, backward.rows_per_program))
        return fake_proof(op, device, dtype, n, forward, backward, None)

    monkeypatch.setattr(proof, "check", check)
    return found


@pytest.fixture
def rows(monkeypatch):
    """Sets the candidates of every key: the default with other rows_per_program."""

    def call(*counts: int) -> None:
        def found(key, backend, effort):
            default = kernel_config.heuristic(key, backend)
            return [default, *(replace(default, rows_per_program=count) for count in counts)]

        monkeypatch.setattr(space, "candidates", found)

    return call


def chosen(result: dict) -> list[int | None]:
    return [key["config"] and key["config"]["rows_per_program"] for key in result["keys"]]


def test_a_search_writes_what_lookups_then_find(quick):
    seen, states = [], []
    result = run(progress=lambda *report: seen.append(report), watch=states.append)
    json.dumps(result)
    assert result["file"] == quick.name and not journal.siblings(journal.journal_path(quick))
    assert len(result["keys"]) == 4 and result["dropped"] == {} and result["launches"] > 0
    for made in result["keys"]:
        key = Key(**made["key"])
        assert store.lookup(CPU, key) == LaunchConfig.from_json(made["config"])
        assert made["timing"]["default_us"] > 0
        assert made["gain"] == pytest.approx(made["timing"]["default_us"] / made["timing"]["median_us"], rel=1e-3)
        assert {candidate["status"] for candidate in made["candidates"]} == {"timed"}
        told = [state.state for state in states if state.key == key]
        assert told[0] == "searching" and "proving" in told and told[-1] in ("tuned", "default")
    asked = result["requests"]
    assert set(asked) == {"prove", "open", "add", "round", "close"} and asked["prove"]["requests"] >= len(SMALL)
    for one in asked.values():
        assert 0 <= one["longest"] <= one["seconds"] and any(group.op in one["longest_about"] for group in SMALL)
    explanation = store.explain("cpu", *key)
    assert explanation.exact and explanation.path == quick
    assert [report[0] for report in seen] == [seen[0][0]] * len(seen)
    assert seen[-1][1] == seen[-1][0] and [report[1] for report in seen] == sorted(report[1] for report in seen)


def interrupted(text: str, **more) -> None:
    def interrupts(total, done, said, left):
        if said.startswith(text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupts, **more)


def test_an_interrupted_search_keeps_what_is_finished_and_goes_on(quick):
    interrupted("searched coordinate_descent forward")
    assert len(store.read(quick).entries) == 2
    assert journal.journal_path(quick).exists()
    texts: list[str] = []
    result = run(progress=lambda total, done, text, left: texts.append(text))
    assert not any("soft_topk" in text for text in texts)
    assert next(text for text in texts if text.startswith("timing")) == "timing coordinate_descent backward float32 4x16"
    assert result["resumed"] == 2 and len(result["keys"]) == 4 and len(store.read(quick).entries) == 4
    assert not journal.journal_path(quick).exists()


def test_a_search_says_how_long_the_interrupted_ones_before_took(quick, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(search.time, "monotonic", lambda: now[0])

    def passing(total, done, text, left):
        now[0] += 1.0
        if text.startswith("searched coordinate_descent forward"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=passing)
    path = journal.journal_path(quick)
    known = journal.Journal(path, json.loads(path.read_text().splitlines()[0])["fingerprint"]).spent_before
    assert known == now[0] - 100.0 - 1.0  # up to the last answer, which was there before the last progress was told
    now[0] = 5000.0
    assert run()["seconds_before"] == known
    assert run(fresh=True)["seconds_before"] == 0


def test_a_run_of_some_keys_leaves_an_interrupted_one_of_all_what_it_has(quick, speeds, rows):
    """It goes on from the same journal, which is done with when everything is done that was asked for."""
    _, noted = speeds
    rows(1, 2)
    interrupted("searched soft_topk backward")
    path, before = journal.journal_path(quick), list(noted)
    run(groups=SMALL[1:])
    assert path.exists() and len(noted) > len(before)
    noted.clear()
    assert run()["resumed"] == 2 and not path.exists()
    assert noted and not set(noted) & set(before)


def test_nothing_that_was_measured_is_measured_again(quick, speeds, rows):
    _, noted = speeds
    rows(1, 2)
    interrupted("tuned coordinate_descent")
    before = list(noted)
    noted.clear()
    run()
    assert before and noted == []


def test_fresh_drops_what_was_finished(quick):
    interrupted("searched coordinate_descent forward")
    assert run(fresh=True)["resumed"] == 0


def test_a_journal_of_another_effort_kernel_or_device_is_not_gone_on_with(quick, monkeypatch):
    interrupted("searched coordinate_descent forward")
    monkeypatch.setattr(search, "kernel_sha256", lambda op, backend: "another")
    assert run()["resumed"] == 0


def test_a_journal_of_more_processes_is_gone_on_with(quick):
    interrupted("searched coordinate_descent forward")
    path = journal.journal_path(quick)
    path.rename(journal.journal_path(quick, 5))
    assert run()["resumed"] == 2
    assert not journal.siblings(path)


def test_what_was_chosen_before_is_verified_and_timed_again_beside_the_default(quick):
    """After a change of the kernel the stale file says what to look at, and gets fresh proofs; while they hold, all are tried."""
    run(groups=SMALL[:1])
    assert store.stale(quick, "cpu") == {}
    data = json.loads(quick.read_text())
    chosen = replace(LaunchConfig.from_json(data["entries"][0]["config"]), rows_per_program=3)
    for entry in data["entries"]:
        entry["config"] = chosen.to_json()
        entry["proof"]["kernel_sha256"] = "0" * 64
    quick.write_text(json.dumps(data))
    for made in run(groups=SMALL[:1])["keys"]:
        configs = [LaunchConfig.from_json(candidate["config"]) for candidate in made["candidates"]]
        assert len(configs) == 2 and configs[1] == chosen
        assert store.lookup(CPU, Key(**made["key"])) in configs
    afresh = run(groups=SMALL[:1], fresh=True)["keys"][0]["candidates"]
    assert chosen not in [LaunchConfig.from_json(candidate["config"]) for candidate in afresh]


class Waiting:
    """A pool whose requests are answered when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, dict[str, object], Future]] = []

    def submit(self, request, priority=1):
        self.asked.append((priority, request, Future()))
        return self.asked[-1][2]


def on_a_gpu(path, groups, fresh: bool = True) -> search._Search:
    """A search whose requests wait, as if there were a GPU."""
    made = search._Search(CPU, "quick", path, fresh, groups, None, 2, 0, None, None)
    made.backend, made.pool = "triton", Waiting()
    return made


def test_what_proofs_launch_is_compiled_once_and_first_where_it_is_waited_for(tmp_path):
    groups = [Group("soft_topk", "float32", rows, 16) for rows in (4, 64)]
    made = on_a_gpu(tmp_path / "made.json", groups)
    one, two = LaunchConfig("resident", 16, 1, 1, 1), LaunchConfig("resident", 16, 2, 1, 1)
    first = made.prepare_pair(groups[0], (one, one), search.SPARE)
    assert len(first) == sum(binaries.FORMS.values()) == len(made.pool.asked)
    # the same length and the same configuration forwards: only the other backward is new
    second = made.prepare_pair(groups[1], (one, two), search.SPARE)
    assert second[:3] == first[:3] and len(made.pool.asked) == 5 + 2
    first[0].set_running_or_notify_cancel()
    first[1].set_result({"launches": 1})
    urgent = made.prepare_pair(groups[0], (one, one), 0)
    assert urgent[:2] == first[:2], "what is begun is not begun again"
    assert all(future.cancelled() for future in first[2:]) and [priority for priority, _, _ in made.pool.asked[7:]] == [0, 0, 0]
    assert made.prepare_pair(groups[0], (one, one), 1) == urgent


def test_a_proof_waits_for_what_it_launches_and_no_other_waits_for_it(tmp_path, monkeypatch):
    groups = [Group("soft_topk", "float32", 4, n) for n in (16, 32)]
    made = on_a_gpu(tmp_path / "made.json", groups)
    hunts = {group.label(): types.SimpleNamespace(group=group) for group in groups}
    config = LaunchConfig("resident", 32, 1, 1, 1)
    order: list[str] = []

    def asks(group):
        return (yield made.request(group, config, config))

    def answers(futures, timeout, when):
        """Compiles of the second group end first, then whatever is proved, and then the rest."""
        todo = [(request, future) for _, request, future in made.pool.asked if not future.done()]
        request, future = max(todo, key=lambda one: (one[0]["n"] == 32, one[0]["do"] == "prove"))
        assert future in futures
        order.append(f"{request['do']} {request['n']}")
        future.set_result({"status": "ok"} if request["do"] == "prove" else {"launches": 1})
        return {future}, set(futures) - {future}

    monkeypatch.setattr(search, "wait", answers)
    found = made.driven({name: asks(hunt.group) for name, hunt in hunts.items()}, hunts, 1)
    assert found == {group.label(): proof.Proved("ok") for group in groups} and made.done == 2
    assert order == ["prepare 32"] * 5 + ["prove 32"] + ["prepare 16"] * 5 + ["prove 16"]


def test_accounts_say_what_of_a_kind_took_longest():
    one, two, both = worker.Account(), worker.Account(), worker.Account()
    one.add({"do": "prove", "op": "soft_topk", "dtype": "float32", "rows": 4, "n": 16}, 2.0)
    one.add({"do": "prove", "op": "soft_topk", "dtype": "float32", "rows": 4, "n": 32}, 1.0)
    two.add(worker.compile_request(SMALL[1].key("backward"), LaunchConfig("eager"), True), 0.5)
    two.add({"do": "prove", "op": "soft_topk", "dtype": "float32", "rows": 4, "n": 64}, 3.0)
    two.add({}, 0.25)
    for account in (one, two):
        both.merge(account.kinds)
    assert both.kinds == {
        "prove": {"requests": 3, "seconds": 6.0, "longest": 3.0, "longest_about": "soft_topk float32 4x64"},
        "compile": {"requests": 1, "seconds": 0.5, "longest": 0.5, "longest_about": "coordinate_descent backward float32 4x16"},
        "None": {"requests": 1, "seconds": 0.25, "longest": 0.25, "longest_about": ""},
    }


def made_stale(path, labels) -> None:
    """The file with proofs of another kernel in the groups of these labels."""
    data = json.loads(path.read_text())
    for entry in data["entries"]:
        if f"{entry['key']['op']} {entry['key']['dtype']} {entry['key']['rows']}x{entry['key']['n']}" in labels:
            entry["proof"]["kernel_sha256"] = "0" * 64
    path.write_text(json.dumps(data))


def test_groups_whose_proofs_hold_are_left_while_those_of_others_do_not(quick, speeds, rows):
    known, noted = speeds
    rows(1, 2)
    known |= {1: 5.0}
    assert len(SMALL) == 2 and chosen(run()) == [1] * 4
    before = json.loads(quick.read_text())["entries"]
    made_stale(quick, {SMALL[1].label()})
    noted.clear()
    again = run()
    assert (again["kept"], again["reverified"], len(again["keys"])) == (1, 1, 2)
    # nothing is searched: a last race in each direction, of what was chosen and the default
    assert {(config.rows_per_program == 1, count) for _, config, count in noted} == {(True, 7), (False, 7)} and len(noted) == 4
    after = json.loads(quick.read_text())["entries"]
    assert [entry["config"] for entry in after] == [entry["config"] for entry in before]
    kept = [(old, new) for old, new in zip(before, after, strict=True) if old["key"]["op"] == SMALL[0].op]
    assert kept and all(old == new for old, new in kept)
    assert run()["kept"] == 0  # all hold: all are searched
    made_stale(quick, {SMALL[1].label()})
    assert run(fresh=True)["kept"] == 0


def test_what_was_kept_is_kept_by_the_run_that_goes_on_with_an_interrupted_one(quick, speeds, monkeypatch):
    run()
    made_stale(quick, {SMALL[1].label()})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(journal.Journal, "remove", interrupt)
        run()  # after the last proof is in the file
    assert not store.stale(quick, "cpu")
    again = run()
    assert (again["kept"], again["resumed"], len(again["keys"])) == (1, 2, 2)


GPU = {"name": "A GPU", "sm_count": 132, "capability": "9.0", "memory_bytes": 1 << 36, "driver": "1"}


@pytest.fixture
def whole(monkeypatch, tmp_path):
    """Runs a whole search as if there were a GPU: every proof holds, and a candidate's time is what the test says."""

    def prove(device, op, dtype, rows, n, forward, backward, seed=0):
        made = fake_proof(op, device, dtype, n, forward, backward, None).proof
        made = made | {"kernel_sha256": proof.kernel_sha256(op, "triton"), "binary_sha256": "0" * 64}
        return proof.Proved("ok", "", made, made)

    monkeypatch.setattr(search.devices, "backend", lambda device: "triton")
    monkeypatch.setattr(search.devices, "describe", lambda device: GPU)
    monkeypatch.setattr(proof, "prove", prove)

    def call(time, groups, **more):
        def sample(self, name, configs, rounds, seconds=None):
            return {config: [10.0 * time(name, config, rounds)] * rounds for config in configs}, {}

        monkeypatch.setattr(timer.Timer, "sample", sample)
        return search.run("cpu", "full", tmp_path / "a-gpu.json", workers=0, groups=groups, **more)

    return call


@pytest.mark.parametrize(("last", "taken"), [(0.9, True), (0.96, True), (0.975, False), (0.99, False)])
def test_a_whole_search_ships_a_new_form_only_where_the_last_race_shows_it(whole, tmp_path, last, taken):
    groups = [Group("soft_topk", "float32", 4096, n) for n in (128, 256, 512)]
    odd, rounds_of_last = (16, 8), search._PLANS["triton", "full"].final_rounds
    keys = [group.key(way) for group in groups for way in kernel_config.DIRECTIONS]
    default = {
        (key.direction, one.n): kernel_config.heuristic(key, "triton") for key in keys for one in (key, space.between(key, ()))
    }

    def time(name, config, rounds):
        _, way, _, shape = name.split()[:4]
        if config == default[way, int(shape.split("x")[1])]:
            return 1.0
        if way == "backward" or (config.rows_per_program, config.num_warps) != odd or config.max_registers:
            return 1.1
        return last if rounds == rounds_of_last else 0.9

    found = whole(time, groups)
    forward = [made for made in found["keys"] if made["key"]["direction"] == "forward"]
    assert len(forward) == 3 and all(made["config"] for made in found["keys"])
    assert {(made["config"]["rows_per_program"], made["config"]["num_warps"]) == odd for made in forward} == {taken}
    entries = store.read(tmp_path / "a-gpu.json").entries
    assert len(entries) == 6 and all(entry["proof"]["binary_sha256"] for entry in entries.values())


def test_a_whole_search_proves_anew_what_another_driver_had_made_and_keeps_its_choice(whole, tmp_path, monkeypatch):
    groups = [Group("soft_topk", "float32", 4096, n) for n in (128, 256)]
    asked = []

    def time(name, config, rounds):
        asked.append((name, config))
        return 0.9 if " forward " in name and config.num_warps == 8 and config.rows_per_program == 16 else 1.0

    first = whole(time, groups)
    assert first["outdated"] == {} and first["geometric_mean_gain"] > 1.02
    monkeypatch.setattr(search.devices, "describe", lambda device: GPU | {"driver": "2"})
    before, searched = store.read(tmp_path / "a-gpu.json").configs, len(asked)
    again = whole(time, groups)
    assert again["outdated"] == {"driver": 4} and (again["reverified"], again["kept"]) == (2, 0)
    file = store.read(tmp_path / "a-gpu.json")
    assert file.configs == before and file.device["driver"] == "2"
    # what was chosen and the default, once each
    assert len(asked) - searched == 4 + sum(made["gain"] != 1.0 for made in again["keys"])
    assert whole(time, groups)["reverified"] == 0


def made_by(path, name: str, version: str) -> None:
    """The file as if it had been made with another version."""
    data = json.loads(path.read_text())
    data["device" if name == "driver" else "versions"][name] = version
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("backend", "name", "counts"),
    [
        ("triton", "triton", True),
        ("triton", "driver", True),
        ("triton", "torch", False),
        ("cpu", "torch", True),
        ("cpu", "triton", False),
        ("cpu", "driver", False),
    ],
)
def test_what_another_triton_or_driver_made_is_outdated_and_serves_meanwhile(quick, backend, name, counts):
    run(groups=SMALL[:1])
    configs = store.read(quick).configs
    device, versions = devices.describe(CPU), devices.versions()
    with pytest.MonkeyPatch.context() as patched:  # read as a GPU's its proofs are of another kernel, which is another matter
        patched.setattr(store, "check_proof", lambda proof, key, backend: None)
        assert store.outdated(quick, backend, device, versions) == {}
        made_by(quick, name, "0")
        found = store.outdated(quick, backend, device, versions)
    assert {key: one.config for key, one in found.items()} == (configs if counts else {})
    assert {one.since for one in found.values()} == ({(name,)} if counts else set())
    assert store.stale(quick, "cpu") == {} and store.read(quick).configs == configs


def test_after_a_change_of_version_what_was_chosen_is_proved_and_timed_again(quick, speeds, rows):
    known, noted = speeds
    rows(1, 2)
    known |= {1: 5.0}
    assert chosen(run()) == [1] * 4
    made_by(quick, "torch", "0")
    noted.clear()
    first = run(groups=SMALL[:1])
    assert (first["kept"], first["reverified"], len(first["keys"])) == (0, 1, 2) and first["outdated"] == {"torch": 2}
    assert {(config.rows_per_program == 1, count) for _, config, count in noted} == {(True, 7), (False, 7)} and len(noted) == 4
    # what was not asked for then says with what it was made, and is the only one that is outdated
    entries = json.loads(quick.read_text())["entries"]
    assert {entry["key"]["op"]: entry.get("versions", {}).get("torch") for entry in entries} == {
        SMALL[0].op: None,
        SMALL[1].op: "0",
    }
    again = run()
    assert (again["kept"], again["reverified"], [key["key"]["op"] for key in again["keys"]]) == (1, 1, [SMALL[1].op] * 2)
    assert all("versions" not in entry for entry in json.loads(quick.read_text())["entries"])
    assert run()["reverified"] == 0


def test_what_cannot_be_proved_any_more_after_a_change_of_version_goes(quick, monkeypatch):
    run()
    made_by(quick, "torch", "0")
    monkeypatch.setattr(proof, "check", lambda *arguments, **named: proof.Checked(None, "differs"))
    assert [key["config"] for key in run(groups=SMALL[:1])["keys"]] == [None, None]
    assert {key.op for key in store.read(quick).configs} == {SMALL[1].op}


def test_what_a_file_of_another_device_chose_is_not_taken_over(quick):
    run(groups=SMALL[:1])
    made_stale(quick, {SMALL[0].label()})
    assert store.outdated(quick, "cpu", devices.describe(CPU), devices.versions())
    data = json.loads(quick.read_text())
    data["device"]["name"] = "another"
    quick.write_text(json.dumps(data))
    assert store.outdated(quick, "cpu", devices.describe(CPU), devices.versions()) == {}
    assert run(groups=SMALL[:1])["reverified"] == 0
    assert quick.with_name(f"{quick.name}.old").exists()


def interrupt(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("there", "taken"), [(10.0, True), (19.0, True), (21.0, False), (-1.0, False)])
def test_what_loses_more_between_the_keys_than_it_gains_at_its_key_is_not_taken(quick, rows, monkeypatch, there, taken):
    """At its key a candidate takes half of the default's 10 us; between this key and the next the default takes 10 us too."""
    rows(1)
    monkeypatch.setitem(search._PLANS, ("cpu", "quick"), replace(search._PLANS["cpu", "quick"], between=True))
    sizes = {space.between(SMALL[0].key(way), ())[3:] for way in ("forward", "backward")}
    assert sizes == {(SMALL[0].rows * 25 // 32, SMALL[0].n * 25 // 32)}
    between = [f" {count}x{n}" for count, n in sizes]

    def sample(self, name, configs, rounds, seconds=None):
        own = there if name.endswith(between[0]) else 5.0
        times = {config: own if config.rows_per_program == 1 else 10.0 for config in configs}
        fails = {config: worker.Failure("hangs", "for ever") for config, time in times.items() if time < 0}
        return {config: [time] * rounds for config, time in times.items() if time > 0}, fails

    monkeypatch.setattr(timer.Timer, "sample", sample)
    result = run(groups=SMALL[:1])
    assert (chosen(result) == [1, 1]) == taken
    for key in result["keys"]:
        ours = next(one for one in key["candidates"] if one["config"]["rows_per_program"] == 1)
        assert ours["status"] == ("timed" if taken else "slower between"), ours
        assert taken or ours["reason"].endswith(f" at{between[0]}")
    assert result["dropped"] == ({} if taken else {"slower between": 2})
    if taken:  # what was chosen before is not raced there again
        made_stale(quick, {SMALL[0].label()})
        there = -1.0
        assert chosen(run(groups=SMALL[:1])) == [1, 1]


@pytest.mark.parametrize(
    ("at_key", "there", "taken"),
    [
        # candidates of one and of two rows; the default takes 10 us everywhere
        ({1: 5.0, 2: 5.1}, {1: 9.0, 2: 5.0}, 2),
        ({1: 5.0, 2: 5.1}, {1: 5.0, 2: 5.0}, 1),
        ({1: 5.0, 2: 5.3}, {1: 9.0, 2: 5.0}, 1),  # too slow at the key
        ({1: 10.0, 2: 12.0}, {1: 8.0, 2: 8.0}, 1),  # as fast as the default there, and faster between
        ({1: 10.0, 2: 12.0}, {1: 10.0, 2: 8.0}, None),
        ({1: 10.1, 2: 12.0}, {1: 8.0, 2: 8.0}, None),  # nothing that surely loses at its key
    ],
)
def test_candidates_are_preferred_by_their_times_at_the_key_and_between(quick, rows, monkeypatch, at_key, there, taken):
    rows(1, 2)
    monkeypatch.setitem(search._PLANS, ("cpu", "quick"), replace(search._PLANS["cpu", "quick"], between=True))
    noted: list[str] = []

    def sample(self, name, configs, rounds, seconds=None):
        known = there if name.endswith(f"x{SMALL[0].n * 25 // 32}") else at_key
        noted.append(f"{name} {rounds}")
        return {config: [known.get(config.rows_per_program, 10.0)] * rounds for config in configs}, {}

    monkeypatch.setattr(timer.Timer, "sample", sample)
    seen: list[search.KeyStatus] = []
    result = run(groups=SMALL[:1], watch=seen.append)
    default = kernel_config.heuristic(SMALL[0].key("forward"), "cpu").rows_per_program
    assert chosen(result) == [taken or default] * 2
    assert {status.key for status in seen} == {SMALL[0].key(way) for way in kernel_config.DIRECTIONS}
    assert any(name.endswith(f"x{SMALL[0].n * 25 // 32} {search.BETWEEN_ROUNDS}") for name in noted)
    assert result["dropped"] == {}


def test_the_fastest_is_taken_where_its_proof_holds_and_else_the_next(quick, speeds, rows, monkeypatch):
    known, _ = speeds
    rows(1, 2, 3)
    known |= {1: 5.0, 2: 6.0, 3: 7.0}
    assert chosen(run()) == [1] * 4

    def check(op, device, dtype, n, forward, backward, binary_sha256, seed=0, most=None):
        wrong = forward.rows_per_program == 1 or backward.rows_per_program in (1, 2)
        return proof.Checked(None, "off") if wrong else fake_proof(op, device, dtype, n, forward, backward, None)

    monkeypatch.setattr(proof, "check", check)
    result = run(groups=SMALL[:1], fresh=True)
    assert chosen(result) == [2, 3]
    assert result["dropped"] == {"wrong": 3}
    assert [(one["status"], one["reason"]) for one in result["keys"][1]["candidates"][1:]] == [("wrong", "off")] * 2 + [
        ("timed", "")
    ]


def test_each_right_and_wrong_together_is_nobodys_fault_alone(quick, speeds, rows, monkeypatch):
    """Both are dropped: the pair cannot be shipped, and which of them is to blame is not known."""
    known, _ = speeds
    rows(1, 2)
    known |= {1: 5.0, 2: 6.0}

    def check(op, device, dtype, n, forward, backward, binary_sha256, seed=0, most=None):
        wrong = forward.rows_per_program == backward.rows_per_program == 1
        return proof.Checked(None, "off") if wrong else fake_proof(op, device, dtype, n, forward, backward, None)

    monkeypatch.setattr(proof, "check", check)
    result = run(groups=SMALL[:1])
    assert chosen(result) == [2, 2] and result["dropped"] == {"wrong": 2}


def test_where_all_of_one_direction_are_wrong_the_other_keeps_its_own(quick, speeds, rows, monkeypatch):
    known, _ = speeds
    rows(1, 2, 3, 4, 5, 6)
    known |= {count: 4.0 + count / 10 for count in range(1, 7)}

    def check(op, device, dtype, n, forward, backward, binary_sha256, seed=0, most=None):
        wrong = backward.rows_per_program < 7
        return proof.Checked(None, "off") if wrong else fake_proof(op, device, dtype, n, forward, backward, None)

    monkeypatch.setattr(proof, "check", check)
    result = run(groups=SMALL[:1])
    assert chosen(result)[0] == 1 and chosen(result)[1] > 6
    assert result["keys"][1]["gain"] == 1.0


def test_a_proof_that_fails_beside_other_segments_and_a_last_race_that_fails_are_told(quick, rows, monkeypatch):
    """What is raced at last may be a configuration that was never timed: of another number of segments."""
    rows(1, 2)

    def sample(self, name, configs, rounds, seconds=None):
        fails = [config for config in configs if rounds == 7 and config.rows_per_program == 2]
        speed = {1: 5.0, 2: 6.0}
        samples = {
            config: [speed.get(config.rows_per_program, 10.0) - 2 * (config.checkpoint_segments == 4)] * rounds
            for config in configs
            if config not in fails
        }
        return samples, {config: worker.Failure("hangs", "at last") for config in fails}

    def check(op, device, dtype, n, forward, backward, binary_sha256, seed=0, most=None):
        wrong = forward.rows_per_program == 1
        return proof.Checked(None, "off") if wrong else fake_proof(op, device, dtype, n, forward, backward, None)

    monkeypatch.setattr(timer.Timer, "sample", sample)
    monkeypatch.setattr(proof, "check", check)
    result = run(groups=SMALL[1:])
    assert result["dropped"] == {"wrong": 1, "hangs": 1}
    found = {
        (one["config"]["rows_per_program"], one["config"]["checkpoint_segments"]): one["status"]
        for one in result["keys"][0]["candidates"]
    }
    assert found[1, 4] == "wrong" and found[2, 4] == "hangs" and found[1, 20] == found[2, 20] == "timed"
    # forward and backward agree on the segments, so that both stay as they were
    assert all(Key(**key["key"]) and key["gain"] == 1.0 and key["config"]["checkpoint_segments"] == 20 for key in result["keys"])


def test_fewer_segments_are_taken_where_both_directions_together_gain(quick, rows, monkeypatch):
    rows()

    def sample(self, name, configs, rounds, seconds=None):
        faster = {"forward": 10.2, "backward": 6.0}[name.split()[1]]
        return {config: [faster if config.checkpoint_segments == 4 else 10.0] * rounds for config in configs}, {}

    monkeypatch.setattr(timer.Timer, "sample", sample)
    result = run(groups=SMALL[1:])
    assert [key["config"]["checkpoint_segments"] for key in result["keys"]] == [4, 4]


def test_one_of_equal_binaries_is_timed_and_its_failure_is_that_of_all(quick, speeds, rows, monkeypatch):
    known, noted = speeds
    rows(1, 2, 3, 4)
    known |= {1: -1.0, 3: 5.0, 4: 6.0}

    def compile(self, track, config, priority):
        found: Future[Compiled] = Future()
        same = {1: "a", 2: "a", 3: "b", 4: "b"}.get(config.rows_per_program, "default")
        found.set_result(Compiled("ok", registers=32, spills=0, occupancy=0.5, identity=same))
        return found

    monkeypatch.setattr(search._Search, "compile", compile)
    result = run(groups=SMALL[:1])
    for key in result["keys"]:
        _, one, two, three, four = key["candidates"]
        assert one["status"] == two["status"] == "hangs" and two["reason"] == "for ever"
        assert two["same_as"] == one["config"] and four["same_as"] == three["config"]
        assert four["median_us"] == three["median_us"] == 5.0
    assert result["dropped"] == {"hangs": 4}
    timed = [config.rows_per_program for name, config, _ in noted if " forward " in name]
    assert timed.count(1) == 1 and 2 not in timed and 4 not in timed
    assert chosen(result) == [3, 3]


def test_a_candidate_that_does_not_compile_or_spills_is_not_timed(quick, speeds, rows, monkeypatch):
    known, noted = speeds
    rows(1, 2, 3)
    known |= {3: 5.0}

    def compile(self, track, config, priority):
        found: Future[Compiled] = Future()
        made = {1: Compiled("does not compile", "too large"), 2: Compiled("spills", "9 spilled", 255, 9, 0, 0.25)}
        found.set_result(made.get(config.rows_per_program, Compiled("ok")))
        return found

    monkeypatch.setattr(search._Search, "compile", compile)
    result = run(groups=SMALL[:1])
    assert result["dropped"] == {"does not compile": 2, "spills": 2}
    assert {config.rows_per_program for _, config, _ in noted} & {1, 2} == set()
    assert chosen(result) == [3, 3]


def test_when_the_default_itself_is_wrong_and_nothing_else_is_right_nothing_is_written(quick, monkeypatch):
    monkeypatch.setattr(proof, "check", lambda *a: proof.Checked(None, "off"))
    result = run(groups=SMALL[:1])
    assert not quick.exists() and result["geometric_mean_gain"] is None
    assert [key["config"] for key in result["keys"]] == [None, None]
    assert all(key["candidates"][0]["status"] == "wrong" for key in result["keys"])


def test_a_default_is_proved_before_it_is_shipped_after_all(quick, rows, proved, monkeypatch):
    """In the search the other one was surely faster, in the last race it is not."""
    rows(1)

    def sample(self, name, configs, rounds, seconds=None):
        slow = rounds == 7 and " backward " in name
        return {config: [5.0 if config.rows_per_program == 1 and not slow else 10.0] * rounds for config in configs}, {}

    monkeypatch.setattr(timer.Timer, "sample", sample)
    default = kernel_config.heuristic(SMALL[0].key("forward"), "cpu").rows_per_program
    assert chosen(run(groups=SMALL[:1])) == [1, default]
    assert proved == [(1, 1), (default, default)]


def test_a_default_of_one_direction_is_proved_beside_what_was_chosen_for_the_other(quick, rows, proved, monkeypatch):
    """And not beside the other default, which is not shipped."""
    rows(1)

    def sample(self, name, configs, rounds, seconds=None):
        best = 10.0 if " backward " in name else 2.0
        return {config: [best if config.rows_per_program == 1 else 5.0] * rounds for config in configs}, {}

    monkeypatch.setattr(timer.Timer, "sample", sample)
    default = kernel_config.heuristic(SMALL[0].key("forward"), "cpu").rows_per_program
    assert chosen(run(groups=SMALL[:1])) == [1, default]
    assert proved == [(1, default)]
    assert len(store.read(quick).entries) == 2


def test_a_search_ends_when_its_time_is_up(quick):
    result = run(seconds=0.0)
    assert result["keys"] == [] and result["dropped"] == {"keys left out: out of time": 4}


def test_never_slower_than_the_default(quick, monkeypatch):
    """The default stays where another candidate is not surely faster."""
    flat = [1.0, 1.1, 1.2, 1.3, 1.4]

    def sample(self, name, configs, rounds, seconds=None):
        return {config: (flat * rounds)[i : rounds + i] for i, config in enumerate(configs)}, {}

    monkeypatch.setattr(timer.Timer, "sample", sample)
    for made in run(groups=SMALL[:1])["keys"]:
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
    run(groups=SMALL[:1])
    asked = []
    monkeypatch.setattr(kernel_config, "_lookup", lambda device, key: asked.append(key))
    result = benchmark.run("cpu", shapes=((4, 16),), seconds=60.0)
    assert Key("soft_topk", "forward", "float32", 4, 16) in asked
    ours = [row for row in result["results"] if row["implementation"] == "coordroute" and row["direction"] == "forward"]
    assert ours and all(row["status"] == "ok" and row["median_us"] > 0 for row in ours)
    json.dumps(result)


@pytest.mark.parametrize("module", ("benchmark", "exhaust", "search", "sanitize"))
def test_launches_ask_the_files_where_nobody_has_imported_the_front_door(module):
    program = (
        f"import sys, coordroute.autotune.{module}; from coordroute.autotune import store; from coordroute.kernels import config; "
        "assert 'coordroute.router' not in sys.modules; assert config._lookup is store.lookup"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- the last race ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finals", "expected", "races"),
    [
        ([(9.0, 10.0)], 0.9, 1),
        ([(9.0, 17.0), (9.0, 10.0)], 0.9, 2),  # the default was slow as it was prepared first
        ([(17.0, 10.0), (9.0, 10.0)], 1.7, 2),  # in doubt for the default
        ([(9.0, 17.0), (9.0, 16.0)], 9 / 16, 2),  # so it is
    ],
)
def test_a_last_race_that_is_far_from_the_search_is_run_again_and_the_less_favourable_counts(finals, expected, races):
    default, config = (LaunchConfig("resident", 1024, num_warps=warps) for warps in (4, 8))
    track = search.Track(Key("soft_topk", "forward", "float32", 4, 1024), default, None)
    for one, us in ((default, 10.0), (config, 9.0)):
        track.candidates[one] = search.Candidate(one, "timed", median_us=us)
    names: list[str] = []

    def last_race(track, config, again):
        names.append(again)
        ours, its = finals[len(names) - 1]
        return {config: timing.Timed([ours] * 3, ""), default: timing.Timed([its] * 3, "")}

    stub = types.SimpleNamespace(last_race=last_race)
    found = search._Search.settled_race(stub, track, config, "")  # type: ignore[arg-type]
    assert found[config].median_us / found[default].median_us == pytest.approx(expected)
    assert len(names) == len(set(names)) == races
