"""The timings of all candidates, and what a lookup costs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from coordroute import cli
from coordroute.autotune import exhaust, hosttime, replay, space, store, timer
from coordroute.kernels import config as kernel_config
from coordroute.kernels.config import Key, LaunchConfig

CPU = torch.device("cpu")
KEY = Key("soft_topk", "forward", "float32", 4, 50)


@pytest.fixture
def few(monkeypatch):
    """Candidates that need no C++ compiler, one of which cannot be launched."""

    def candidates(key, backend, effort):
        default = kernel_config.heuristic(key, backend)
        made = [default, *(LaunchConfig("eager", rows_per_program=rows) for rows in (1, 2))]
        return made if effort == "quick" else [*made, LaunchConfig("no such variant", rows_per_program=1)]

    monkeypatch.setattr(space, "candidates", candidates)


def test_every_candidate_of_a_key_is_timed(few):
    seen = []
    data = exhaust.run("cpu", 4, lambda *report: seen.append(report), chosen=[KEY], workers=0)
    (key,) = data["keys"]
    assert key["key"] == KEY._asdict()
    assert [one["status"] for one in key["candidates"]] == ["timed", "timed", "timed", "crashes"]
    assert all(len(one["samples"]) == 4 and min(one["samples"]) > 0 for one in key["candidates"][:3])
    assert key["candidates"][3]["samples"] is None and "no such variant" in key["candidates"][3]["reason"]
    assert (key["default"], key["serves"], key["seeds"]) == (0, 0, [0, 1, 2])
    assert [report[:2] for report in seen] == [(1, 0), (1, 1)]


def test_what_no_time_is_left_for_is_left_out_and_counted(few):
    keys = [KEY, KEY._replace(direction="backward")]
    data = exhaust.run("cpu", 2, chosen=keys, workers=0, seconds=1e-9)
    assert [key["key"] for key in data["keys"]] == [KEY._asdict()] and data["left_out"] == 1
    assert exhaust.run("cpu", 2, chosen=keys, workers=0)["left_out"] == 0


class Alone:
    """A crew of one process, which hands out everything to itself."""

    rank, world_size = 0, 1

    def __init__(self):
        self.found = {}

    def agree(self, name, text):
        pass

    def claim(self, number):
        return len(self.found) if len(self.found) < number else None

    def finish(self, item, text):
        self.found[item] = text

    def results(self, number):
        return [self.found[item] for item in range(number)]


def test_a_crew_times_the_same_keys_and_leaves_out_what_no_time_is_left_for(few):
    keys = [KEY, KEY._replace(direction="backward"), KEY._replace(n=60)]
    data = exhaust.run("cpu", 2, chosen=keys, workers=0, crew=Alone())
    assert [key["key"] for key in data["keys"]] == [key._asdict() for key in keys] and data["left_out"] == 0
    data = exhaust.run("cpu", 2, chosen=keys, workers=0, seconds=1e-9, crew=Alone())
    assert [key["key"] for key in data["keys"]] == [KEY._asdict()] and data["left_out"] == 2


def test_replay_reads_what_exhaust_writes(few, tmp_path):
    path = tmp_path / "exhaustive.json"
    path.write_text(json.dumps(exhaust.run("cpu", 4, chosen=[KEY], workers=0)))
    found = replay.run(replay.read(path), seeds=2, names=["coordroute"])
    assert found["strategies"][0]["keys"][0]["candidates"] == 3


def test_sizes_between_the_keys_stay_as_they_are():
    backends = [("triton", exhaust.BETWEEN), ("cpu", exhaust.CPU_BETWEEN)]
    for backend, shapes in backends:
        keys = exhaust.keys(backend, between=True)
        assert {(key.rows, key.n) for key in keys} == set(shapes)
        assert all(exhaust.bucket(key) != key for key in keys)
        assert len(set(exhaust.keys(backend))) == len(exhaust.keys(backend))
    assert len(exhaust.keys("triton")) == 48


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds is 1; at least 2"):
        exhaust.run("cpu", 1, chosen=[KEY], workers=0)


def test_what_serves_is_what_the_files_say(few, monkeypatch):
    tuned = LaunchConfig("eager", rows_per_program=2)
    monkeypatch.setattr(kernel_config, "_lookup", lambda device, key: tuned)
    (key,) = exhaust.run("cpu", 2, chosen=[KEY], workers=0)["keys"]
    assert key["serves"] == 2 and key["candidates"][2]["config"] == tuned.to_json()


def test_what_serves_is_said_anew_without_timing(few, tmp_path, capsys):
    def launch(block, warps):
        return LaunchConfig("resident", block, 1, warps, 1)

    def timed(key, *configs):
        nothing = {"registers": None, "spills": None, "occupancy": None, "same_as": None, "status": "timed", "reason": ""}
        candidates = [{"config": one.to_json(), "samples": [5.0 + i, 5.0 + i]} | nothing for i, one in enumerate(configs)]
        return {"key": key._asdict(), "default": 0, "serves": 0, "seeds": [0], "candidates": candidates}

    between = Key("soft_topk", "forward", "float32", 40, 3000)
    elsewhere = between._replace(n=50_000)
    default = kernel_config.heuristic(exhaust.bucket(elsewhere), "triton")
    device = {"name": "a GPU", "capability": "9.0"}

    def file(configs, name="a GPU", **rejected):
        return store.ConfigFile(tmp_path / "tuned.json", device | {"name": name}, {}, {}, configs, rejected)

    data = {
        "device": device,
        "keys": [timed(between, launch(4096, 4), launch(4096, 8)), timed(elsewhere, launch(65536, 32), default)],
    }
    near = between._replace(rows=16, n=4096)
    assert [key["serves"] for key in exhaust.served_by(data, file({near: launch(4096, 8)}))["keys"]] == [1, 1]
    assert [key["serves"] for key in exhaust.served_by(data, file({near: launch(4096, 2)}))["keys"]] == [None, 1]
    assert data["keys"][0]["serves"] == 0
    with pytest.raises(ValueError, match="is of another, the timings are of a GPU; one device is needed"):
        exhaust.served_by(data, file({near: launch(4096, 8)}, name="another"))
    with pytest.raises(ValueError, match="serves nothing: 3 stale"):
        exhaust.served_by(data, file({}, stale=3))

    assert cli.main(["exhaust", "--timed", str(tmp_path / "none.json")]) == 2
    assert "--timed and --served-by belong together" in capsys.readouterr().err
    assert cli.main(["exhaust", "--timed", str(tmp_path / "none.json"), "--served-by", str(tmp_path / "no.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    timed_file, broken = tmp_path / "between.json", tmp_path / "broken.json"
    timed_file.write_text(json.dumps(exhaust.run("cpu", 2, chosen=[KEY], workers=0)))
    broken.write_text("{")
    assert cli.main(["exhaust", "--timed", str(timed_file), "--served-by", str(broken)]) == 2
    assert f"{broken} is no configuration file" in capsys.readouterr().err


def test_the_command_shows_what_serves(few, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(exhaust, "keys", lambda backend, between=False: [KEY])
    monkeypatch.setattr(timer, "Worker", lambda device, *rest: timer.Local(device))
    path = tmp_path / "exhaustive.json"
    assert cli.main(["exhaust", "--device", "cpu", "--rounds", "3", "--between", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "soft_topk forward float32 4x50" in out and "1 crashes" in out and "serving ÷ best" in out and "at p95" in out
    assert json.loads(path.read_text())["rounds"] == 3


def test_a_lookup_is_timed():
    found = hosttime.lookup("cpu", [KEY])
    assert set(found) == {"lookup_ns", "import_ms", "samples"}
    assert found["lookup_ns"] >= 0 and found["import_ms"] > 0


def test_a_configuration_keeps_its_other_fields_when_it_is_fitted():
    config = LaunchConfig("resident", 1024, 2, 4, 1, 20, max_registers=64)
    moved = space.fitted(config, KEY._replace(n=1024), KEY._replace(n=4096))
    assert moved == dataclasses.replace(config, block=4096, num_warps=16)
