"""Searches replayed on made-up timings of all candidates of a few keys."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest
from coordroute import cli
from coordroute.autotune import peers, replay, space, strategies
from coordroute.kernels.config import Key, LaunchConfig
from coordroute.reports import evidence, render
from coordroute.reports.candidates import goals

ROUNDS = 81
KEYS = [
    Key("soft_topk", "forward", "float32", 1024, 1024),
    Key("soft_topk", "forward", "bfloat16", 1024, 1024),
    Key("soft_topk", "forward", "float32", 1024, 2048),
    Key("coordinate_descent", "backward", "float32", 64, 4096),
]
DEVICE = {"name": "a made-up device", "sm_count": 132, "capability": "9.0", "memory_bytes": 1 << 36, "driver": "1"}
HEAD = {"schema": 1, "device": DEVICE, "versions": {"torch": "2"}, "date": "2026-01-01T00:00:00+00:00"}


def made_up(key: Key) -> list[LaunchConfig]:
    """30 candidates, the default first."""
    made = [
        LaunchConfig("resident", key.n, rows, warps, stages)
        for rows in (1, 2, 4)
        for warps in (1, 2, 4, 8, 16)
        for stages in (1, 2)
    ]
    return made[8:] + made[:8]


def speed(key: Key, config: LaunchConfig) -> float:
    """Microseconds: a valley in the warps and the rows, so that a search of neighbours finds the best."""
    warps = abs(math.log2(config.num_warps * 1024 / key.n / 2))
    return 20 * (1 + 0.2 * warps + 0.15 * abs(math.log2(config.rows_per_program) - 1) + 0.04 * (config.num_stages - 1))


def recorded(keys=KEYS, noise=0.0, rounds=ROUNDS) -> dict:
    """What coordroute exhaust would write: a drift that all candidates share, and noise of each."""
    chance = random.Random(5)
    made = []
    for key in keys:
        candidates = []
        for config in made_up(key):
            samples = [
                round(speed(key, config) * (1 + 0.05 * math.sin(turn)) * math.exp(chance.gauss(0, noise)), 4)
                for turn in range(rounds)
            ]
            one = {"config": config.to_json(), "status": "timed", "samples": samples, "registers": 40, "spills": 0, "same_as": None}
            candidates.append(one)
        made.append({"key": key._asdict(), "default": 0, "seeds": [0, 9, 19, 29], "candidates": candidates})
    return {**HEAD, "command": "exhaust", "rounds": rounds, "method": "made up", "keys": made}


@pytest.fixture
def write(tmp_path):
    def call(data: dict) -> Path:
        path = tmp_path / "exhaustive.json"
        path.write_text(json.dumps(data))
        return path

    return call


@pytest.fixture
def read(write):
    return lambda data: replay.read(write(data))


def by_name(found: dict) -> dict[str, dict]:
    return {one["name"]: one for one in found["strategies"]}


# --- the recording ---------------------------------------------------------------------------------------------------


def test_the_even_rounds_are_the_truth_and_the_odd_ones_are_drawn(read):
    data = recorded(KEYS[:1])
    for j, one in enumerate(data["keys"][0]["candidates"]):
        one["samples"] = [1000.0 * (turn % 2) + turn / 100 + 10 + j for turn in range(ROUNDS)]
    (one,) = read(data).keys
    assert one.truth[one.default] == statistics.median(10 + turn / 100 for turn in range(0, ROUNDS, 2))
    assert one.regret(one.candidates[0]) == 0 < one.regret(one.candidates[1]) < one.regret(one.candidates[29])
    draw = replay.Draw(one, ROUNDS, 0)
    first = draw.take(one.candidates[:3], 40)
    again = draw.take(one.candidates[:3], 40)
    assert sorted(first[one.default]) == sorted(again[one.default]) == [1000 + 10 + turn / 100 for turn in range(1, ROUNDS, 2)]
    assert first[one.default] != again[one.default]
    # those of one ask are of the same rounds
    assert [b - a for a, b in zip(first[one.default], first[one.candidates[2]], strict=True)] == pytest.approx([2] * 40)
    assert (draw.launches, draw.rounds) == (3 * 80, 80)


def test_the_order_of_the_rounds_is_that_of_the_key_and_the_seed(read):
    first, second = read(recorded(KEYS[:2], noise=0.01)).keys

    def order(one, seed):
        drawn = replay.Draw(one, ROUNDS, seed).take(one.candidates[:1], 40)[one.default]
        return [one.samples[one.default].index(sample) for sample in drawn]

    assert order(first, 0) == order(first, 0)
    assert len({tuple(order(one, seed)) for one in (first, second) for seed in (0, 1)}) == 4


def test_what_was_not_timed_is_not_answered_and_the_same_binary_is_launched_once(read):
    data = recorded(KEYS[:1], noise=0.01)
    candidates = data["keys"][0]["candidates"]
    candidates[3] |= {"status": "spills", "samples": None}
    candidates[4] |= {"samples": None, "same_as": 2}
    candidates[5] |= {"status": "wrong", "samples": None, "same_as": 2}
    (one,) = read(data).keys
    configs = one.candidates
    draw = replay.Draw(one, ROUNDS, 0)
    answer = draw.take(configs[:6], 3)
    assert list(answer) == [configs[i] for i in (0, 1, 2, 4)]
    assert answer[configs[4]] == answer[configs[2]] != answer[configs[1]]
    assert draw.launches == 3 * 3
    assert one.regret(configs[4]) == one.regret(configs[2])
    assert set(one.samples) == {config for i, config in enumerate(configs) if i not in (3, 4, 5)}
    # a default without samples of its own is compared by those of its twin
    candidates[0] |= {"samples": None, "same_as": 1}
    recording = read(data)
    for name in replay.run(recording, 2, ("exhaustive", "random"))["strategies"]:
        assert name["keys"][0]["candidates"] == 26


def test_two_configurations_of_one_binary_are_one_choice(read):
    data = recorded(KEYS[:1])
    candidates = data["keys"][0]["candidates"]
    (one,) = read(data).keys
    best = one.candidates.index(min(one.truth, key=one.truth.get))
    twin = 20
    candidates[twin] |= {"samples": None, "same_as": best}
    recording = read(data)
    (one,) = recording.keys
    tally = replay._Tally(ROUNDS, {one.key: [replay.Replayed(one.candidates[i], 10, 3, []) for i in (best, twin, twin)]})
    summary = replay._summary("random", [one], tally)
    assert summary["keys"][0]["agreement"] == 1 and summary["stable"] == 1
    assert summary["keys"][0]["regret"] == [0, 0, 0] and summary["keys"][0]["chosen"] == [best, twin, twin]


def test_a_key_whose_default_was_not_timed_is_left_out(read):
    data = recorded(KEYS[:2])
    data["keys"][0]["candidates"][0] |= {"status": "wrong", "samples": None}
    found = replay.run(read(data), 2, ("random",))
    assert [key["key"] for key in found["strategies"][0]["keys"]] == [KEYS[1]._asdict()]
    assert found["left_out"] == [{"key": KEYS[0]._asdict(), "reason": "the default was not timed"}]
    data["keys"].pop()
    with pytest.raises(ValueError, match="of none of 1 keys the default was timed"):
        read(data)


def _first(data: dict) -> dict:
    return data["keys"][0]["candidates"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(command="replay"), "of the command 'replay'"),
        (lambda data: data.update(schema=2), "schema 2"),
        (lambda data: data.update(rounds=1), "rounds is 1; at least 2"),
        (lambda data: data.pop("keys"), "has no keys"),
        (lambda data: data.update(keys=[]), "of none of 0 keys"),
        (lambda data: data["keys"][0].update(default=30), r"keys\[0\].default is 30"),
        (lambda data: data["keys"][0]["key"].update(rows=0), r"keys\[0\].key is of 0 rows"),
        (lambda data: _first(data).update(samples=None), r"candidates\[0\] is timed; either samples or same_as"),
        (lambda data: _first(data)["samples"].pop(), r"candidates\[0\].samples are 80; one for each of 81 rounds"),
        (lambda data: _first(data)["samples"].__setitem__(3, 0.0), r"candidates\[0\].samples has 0.0; microseconds above 0"),
        (lambda data: _first(data)["config"].update(block=-1), r"candidates\[0\].config is no configuration: block is -1"),
        (lambda data: _first(data)["config"].update(cluster=2), r"candidates\[0\].config is no configuration: .*cluster"),
        (
            lambda data: data["keys"][0]["candidates"].append(_first(data)),
            r"candidates\[30\] has the configuration of candidates\[0\]",
        ),
    ],
)
def test_a_file_that_is_no_such_file_is_refused_by_what_is_wrong(read, change, message):
    data = recorded(KEYS[:1])
    change(data)
    with pytest.raises(ValueError, match=message) as raised:
        read(data)
    assert "exhaustive.json" in str(raised.value)


# --- the searches ----------------------------------------------------------------------------------------------------


def test_without_noise_all_candidates_give_the_best_and_ours_does_so_with_fewer_launches(read):
    found = by_name(replay.run(read(recorded()), 3, ("coordroute-quick", "exhaustive", "random")))
    assert list(found) == ["coordroute", "coordroute, quick", "exhaustive (triton.autotune)", "random"]
    every, ours = found["exhaustive (triton.autotune)"], found["coordroute"]
    assert every["regret"] == {"median": 0, "p95": 0, "worst": 0} and every["stable"] == 1
    assert ours["regret"]["worst"] == 0 and ours["stable"] == 1
    # every second round, and the default once in each batch
    assert every["share"]["worst"] == pytest.approx((30 + 1) * 40 / (30 * 81), abs=1e-6)
    assert ours["share"]["worst"] < 0.12
    assert [key["key"] for key in ours["keys"]] == [key._asdict() for key in KEYS]


def test_with_noise_ours_comes_near_the_best_and_says_what_it_needed(read):
    found = by_name(replay.run(read(recorded(noise=0.01)), 5, ("exhaustive", "random")))
    ours = found["coordroute"]
    assert ours["regret"]["worst"] < 0.02 and ours["stable"] == 1
    for mine, other in zip(ours["keys"], found["random"]["keys"], strict=True):
        assert all(0 < b <= a for a, b in zip(mine["share"], other["share"], strict=True))
    for one in found.values():
        assert all(len(key[name]) == 5 for key in one["keys"] for name in ("regret", "share", "chosen"))
        assert all(regret >= 0 for key in one["keys"] for regret in key["regret"])


def test_the_default_stays_unless_it_is_surely_beaten(read):
    """All candidates are the same but for noise."""
    data = recorded(KEYS[:1])
    chance = random.Random(1)
    for one in data["keys"][0]["candidates"]:
        one["samples"] = [10 * math.exp(chance.gauss(0, 0.001)) for _ in range(ROUNDS)]
    (one,) = read(data).keys
    chosen = [replay.ours(one, ROUNDS, seed).chosen for seed in range(10)]
    assert chosen.count(one.default) >= 8
    # what is as good as the default is the default by the rule; a final is for another one
    assert replay.ours(one, ROUNDS, 0, plan=strategies.Plan(tie=1.1, keep=1.1)).rounds < 30


def test_the_same_seed_gives_the_same_file(read):
    names = ("exhaustive", "random", *(name for name in replay.PEERS if name in replay.available()))
    recording = read(recorded(KEYS[:2], noise=0.05))
    first, second = (replay.run(recording, 4, names) for _ in range(2))
    assert first | {"date": ""} == second | {"date": ""}
    chosen = [key["chosen"] for one in first["strategies"] for key in one["keys"]]
    assert any(len(set(one)) > 1 for one in chosen)


@pytest.mark.parametrize("name", ["genetic_algorithm", "PatternSearch"])
def test_a_strategy_of_another_package_has_as_many_launches_as_ours(read, name):
    pytest.importorskip("kernel_tuner" if name.islower() else "helion")
    data = recorded(KEYS[:2], noise=0.01)
    data["keys"][0]["candidates"][7] |= {"status": "spills", "samples": None}
    found = replay.run(read(data), 3, (name,))
    ours, other = found["strategies"]
    assert name in other["name"] and name in other["text"]
    for mine, yours in zip(ours["keys"], other["keys"], strict=True):
        assert all(0 < b <= a for a, b in zip(mine["share"], yours["share"], strict=True))


def test_a_strategy_that_fails_is_left_out_and_the_others_go_on(read, monkeypatch):
    pytest.importorskip("kernel_tuner")

    def fails(*rest):
        raise IndexError("list index out of range")

    monkeypatch.setattr(peers, "search", fails)
    found = replay.run(read(recorded(KEYS[:1])), 2, ("mls", "random"))
    assert list(by_name(found)) == ["coordroute", "random"]
    assert found["failed"] == [{"name": "Kernel Tuner mls", "reason": "IndexError: list index out of range"}]


def test_names_of_strategies(monkeypatch):
    assert replay.chosen_strategies(("random", "random", "exhaustive")) == ("coordroute", "random", "exhaustive")
    with pytest.raises(ValueError, match="strategies names 'brute_force'; allowed are coordroute, coordroute-quick"):
        replay.chosen_strategies(("brute_force",))
    monkeypatch.setattr(peers, "_installed", lambda package: False)
    assert replay.chosen_strategies(None) == ("coordroute", "coordroute-quick", "exhaustive", "random")
    with pytest.raises(ValueError, match="pip install"):
        replay.chosen_strategies(("mls",))


def test_the_curve_goes_from_the_default_to_what_was_chosen(read):
    recording = read(recorded(noise=0.005))
    found = replay.run(recording, 3, ("exhaustive", "random"))
    for one in found["strategies"]:
        shares = [point[0] for point in one["curve"]]
        assert shares == [round(share, 6) for share in replay.CURVE[: len(shares)]]
        assert shares[-1] >= one["share"]["worst"] and (len(shares) == 1 or shares[-2] < one["share"]["worst"])
        assert one["curve"][-1][1:] == [pytest.approx(one["regret"][name], abs=1e-6) for name in ("median", "p95")]
        assert all(median <= p95 for _, median, p95 in one["curve"])
    defaults = [one.regret(one.default) for one in recording.keys]
    # the first batch of all candidates takes more than the first shares
    assert found["strategies"][1]["curve"][0][1] == pytest.approx(statistics.median(defaults), abs=1e-6)


def test_quantiles_are_values_that_occurred():
    assert [replay.quantile([3.0, 1.0, 2.0], share) for share in (0.0, 0.34, 0.67, 0.95, 1.0)] == [1, 2, 3, 3, 3]
    assert replay.quantile(list(range(1, 101)), 0.95) == 95


# --- hints -----------------------------------------------------------------------------------------------------------


def test_a_configuration_is_fitted_to_another_length():
    short, long = KEYS[0], KEYS[2]
    config = LaunchConfig("resident", 1024, 2, 4, 1)
    assert space.fitted(config, short, long) == LaunchConfig("resident", 2048, 2, 8, 1)
    assert space.fitted(LaunchConfig("resident", 2048, 2, 8, 1), long, short) == config
    assert space.fitted(config, short, KEYS[1]) == config
    split = LaunchConfig("split", 4096, 1, 8, 1, programs_per_row=4)
    assert space.fitted(split, short, long) == LaunchConfig("split", 4096, 1, 8, 1, programs_per_row=8)


def test_hints_are_of_the_nearest_keys_of_the_operator_and_direction():
    chosen = {
        KEYS[0]: LaunchConfig("resident", 1024, 2, 4, 1),
        KEYS[1]: LaunchConfig("resident", 1024, 4, 2, 1),
        Key("soft_topk", "forward", "float32", 1, 1 << 20): LaunchConfig("split", 8192, 1, 16, 1, programs_per_row=128),
        Key("soft_topk", "backward", "float32", 1024, 2048): LaunchConfig("resident", 2048, 1, 1, 1),
        KEYS[2]: LaunchConfig("resident", 2048, 1, 2, 1),
    }
    assert space.hints(KEYS[2], chosen) == [LaunchConfig("resident", 2048, 2, 8, 1), LaunchConfig("resident", 2048, 4, 4, 1)]


# --- the command and the report --------------------------------------------------------------------------------------


def test_the_command_shows_the_strategies_and_the_goals(write, capsys):
    data = recorded(noise=0.005)
    data["keys"][0]["candidates"][0] |= {"status": "wrong", "samples": None}
    path = write(data)
    assert cli.main(["replay", str(path), "--seeds", "2", "--strategies", "exhaustive, random"]) == 0
    out = capsys.readouterr().out
    table = [line.split("  ") for line in out.splitlines()]
    assert "a made-up device, exhaustive.json: 3 keys, 2 seeds" in out
    for name in ("coordroute", "exhaustive (triton.autotune)", "random"):
        assert any(line[0] == name and line[-1].endswith(" of 3") for line in table)
    assert "soft_topk forward float32 1024x1024 is left out: the default was not timed" in out
    assert "Goals of coordroute" in out and "at most 25.0 %" in out
    assert out.endswith("Goals: 5 met, 0 missed\n")
    assert "it saw some again" not in out
    assert cli.main(["replay", str(write(recorded(KEYS[:1], rounds=20))), "--seeds", "1", "--strategies", "random"]) == 0
    assert "A search could draw from 10 rounds" in capsys.readouterr().out


def test_the_command_as_json(write, capsys):
    path = write(recorded(KEYS[:1]))
    assert cli.main(["replay", str(path), "--seeds", "2", "--strategies", "random", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["command"], found["source"], found["seeds"]) == (1, "replay", "exhaustive.json", 2)
    assert found["device"] == DEVICE and found["versions"] == HEAD["versions"]
    assert str(path.parent) not in json.dumps(found)
    assert list(by_name(found)) == ["coordroute", "random"]


def test_the_report_renders_it(write, tmp_path):
    path = write(recorded(noise=0.005))
    assert cli.main(["replay", str(path), "--seeds", "2", "--json", str(tmp_path / "replay.json")]) == 0
    rest = {"command": "autotune", "seconds": 1.0, "effort": "quick", "file": "x.json", "resumed": 0, "keys": [], "dropped": {}}
    (tmp_path / "autotune.json").write_text(json.dumps({**HEAD, **rest, "geometric_mean_gain": None}))
    found = evidence.load(tmp_path).replay
    assert found is not None and all(goal.met for goal in goals(found["strategies"][0]))
    render.render(tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "The search, replayed" in page and "coordroute: 5 of 5 goals met" in page
    for one in found["strategies"]:
        assert one["name"] in page and one["text"] in page
