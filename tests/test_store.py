"""The configuration files: schema, staleness, order of the search, corrupt files, concurrent writers."""

from __future__ import annotations

import json
import subprocess
import sys
import timeit
import warnings
from pathlib import Path

import pytest
import torch
from coordroute.autotune import device as devices
from coordroute.autotune import store
from coordroute.autotune.fingerprint import kernel_sha256
from coordroute.kernels import config as kernel_config
from coordroute.kernels.config import Key, LaunchConfig

CPU = torch.device("cpu")
KEY = Key("soft_topk", "forward", "float32", 256, 512)
DEVICE = {"name": "Test CPU (R) 9", "sm_count": 4, "capability": "x86_64", "memory_bytes": 1 << 30, "driver": "none"}
VERSIONS = {"coordroute": "0", "torch": "0", "triton": "0"}
TIMING = {"median_us": 1.0, "ci_us": [0.9, 1.1], "default_us": 2.0, "samples": 9, "method": "test"}


def proof(key: Key = KEY, backend: str = "cpu") -> dict:
    return {
        "kernel_sha256": kernel_sha256(key.op, backend),
        "binary_sha256": None,
        "cases": 3,
        "families": ["normal"],
        "max_error": {"value": 0.0, "grad_scores": 0.0, "grad_k": 0.0},
        "bound": 1.0,
        "replays_bitwise": True,
        "seed": 0,
    }


def entry(key: Key = KEY, rows_per_program: int = 7, **changes) -> dict:
    made = {
        "key": key._asdict(),
        "config": LaunchConfig("eager", rows_per_program=rows_per_program).to_json(),
        "timing": TIMING,
        "proof": proof(key),
    }
    return made | changes


def document(*entries: dict, **changes) -> dict:
    return {"schema": 1, "device": DEVICE, "versions": VERSIONS, "entries": list(entries)} | changes


class Places:
    def __init__(self, root: Path) -> None:
        self.environment = root / "environment"
        self.user = root / "cache" / "coordroute"
        self.shipped = root / "shipped"
        for folder in (self.environment, self.user, self.shipped):
            folder.mkdir(parents=True)

    def write(self, folder: Path, content, name: str = "test-cpu-9.json") -> Path:
        path = folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path


@pytest.fixture
def places(tmp_path, monkeypatch):
    found = Places(tmp_path)
    monkeypatch.setenv("COORDROUTE_CONFIG_DIR", str(found.environment))
    monkeypatch.delenv("COORDROUTE_TUNED", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "SHIPPED", found.shipped)
    monkeypatch.setattr(store, "_said", set())
    monkeypatch.setattr(devices, "identity", lambda device: devices.Identity(DEVICE["name"], 4, "x86_64"))
    store.reload()
    yield found
    store.reload()


def look(key: Key = KEY) -> tuple[LaunchConfig | None, list[str]]:
    store.reload()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = store.lookup(CPU, key)
    return found, [str(warning.message) for warning in caught]


def test_the_kernel_sources_have_a_hash():
    for op in kernel_config.OPS:
        for backend in ("triton", "cpu"):
            assert len(kernel_sha256(op, backend)) == 64


def test_the_hash_follows_helper_modules_but_not_the_heuristic(tmp_path):
    (tmp_path / "soft_topk.py").write_text("from .helper import f\n")
    (tmp_path / "helper.py").write_text("from . import config\n")
    (tmp_path / "config.py").write_text("")
    first = kernel_sha256("soft_topk", "triton", tmp_path)
    (tmp_path / "config.py").write_text("x = 1\n")
    kernel_sha256.cache_clear()
    assert kernel_sha256("soft_topk", "triton", tmp_path) == first
    (tmp_path / "helper.py").write_bytes(b"from . import config\r\n")
    kernel_sha256.cache_clear()
    assert kernel_sha256("soft_topk", "triton", tmp_path) == first
    (tmp_path / "helper.py").write_text("from . import config\nx = 1\n")
    kernel_sha256.cache_clear()
    assert kernel_sha256("soft_topk", "triton", tmp_path) != first


def test_order_of_the_search(places):
    assert look()[0] is None
    lent = document(entry(rows_per_program=1), device=DEVICE | {"name": "Cousin CPU"})
    places.write(places.shipped, lent, "cousin-cpu.json")
    assert look()[0].rows_per_program == 1
    places.write(places.shipped, document(entry(rows_per_program=2)))
    assert look()[0].rows_per_program == 2
    places.write(places.user, document(entry(rows_per_program=3)))
    assert look()[0].rows_per_program == 3
    places.write(places.environment, document(entry(rows_per_program=4)))
    found, said = look()
    assert found.rows_per_program == 4 and said == []
    explanation = store.explain("cpu", *KEY)
    assert explanation.source == "environment folder" and explanation.exact and explanation.config == found
    assert [verdict.source for verdict in explanation.files] == [
        "environment folder",
        "user folder",
        "shipped",
        "same architecture",
    ]
    json.dumps(explanation.to_json())


def test_an_exact_entry_of_a_later_folder_goes_before_a_near_one(places):
    places.write(places.environment, document(entry(KEY._replace(n=1024), rows_per_program=1)))
    places.write(places.user, document(entry(rows_per_program=2)))
    assert look()[0].rows_per_program == 2


def test_another_architecture_lends_nothing(places):
    other = document(entry(), device=DEVICE | {"name": "Other", "capability": "aarch64"})
    places.write(places.shipped, other, "other.json")
    found, said = look()
    assert found is None and len(said) == 1 and "no launch configurations are tuned" in said[0]


def test_the_most_similar_device_lends_first():
    h200 = devices.Identity("NVIDIA H200", 132, "9.0")
    cards = [("NVIDIA GH200", 132, "9.0"), ("NVIDIA H100 PCIe", 114, "9.0"), ("X", 132, "9.1")]
    files = [store.ConfigFile(Path(name), DEVICE | {"name": name, "sm_count": sms, "capability": c}, {}) for name, sms, c in cards]
    assert [f.device["name"] for f in sorted(files, key=store._similarity(h200))] == [name for name, _, _ in cards]


def broken_files():
    stale = entry(proof=proof() | {"kernel_sha256": "0" * 64})
    unproved = {name: value for name, value in entry().items() if name != "proof"}
    wrong_config = entry(config={"variant": "eager", "wat": 1})
    return {
        "empty": ("", "not JSON"),
        "cut short": (json.dumps(document(entry()))[:-20], "not JSON"),
        "binary": ("\0\1\2", "not JSON"),
        "deep": ("[" * 100_000, "not JSON"),
        "a list": ("[]", "not an object"),
        "no schema": (document(entry()) | {"schema": None}, "schema None"),
        "later schema": (document(entry(), schema=2), "schema 2"),
        "schema true": (document(entry(), schema=True), "schema True"),
        "no device": (document(entry(), device=None), "device is missing"),
        "device without a field": (document(entry(), device={"name": "x"}), "device has no 'sm_count'"),
        "no entries": (document(entries={}), "entries is missing or no list"),
        "another device": (document(entry(), device=DEVICE | {"name": "Other"}), "another device: 'Other'"),
        "stale": (document(stale), "stale: the kernel source changed"),
        "no proof": (document(unproved), "no proof"),
        "empty proof": (document(entry(proof={})), "no proof"),
        "half a proof": (document(entry(proof={"kernel_sha256": "x"})), "proof is incomplete"),
        "proof without cases": (document(entry(proof=proof() | {"cases": 0})), "no verified case"),
        "a replay differed": (document(entry(proof=proof() | {"replays_bitwise": False})), "replay that differed"),
        "unknown field": (document(wrong_config), "config is not valid"),
        "GPU variant": (document(entry(config=LaunchConfig("tiled", 1024, 1, 4, 1).to_json())), "variant is 'tiled'"),
        "no rows": (document(entry(rows_per_program=0)), "rows_per_program is 0"),
        "unknown op": (document(entry() | {"key": KEY._asdict() | {"op": "sort"}}), "key.op is 'sort'"),
        "rows of -1": (document(entry() | {"key": KEY._asdict() | {"rows": -1}}), "must be at least 1"),
        "entry is a number": (document() | {"entries": [3]}, "no object"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_file_is_said_once_and_not_used(places, name):
    content, reason = broken_files()[name]
    path = places.write(places.environment, content)
    found, said = look()
    assert found is None
    assert len(said) == 1 and str(path) in said[0] and reason in said[0] and "coordroute autotune" in said[0]
    assert look(KEY._replace(n=64)) == (None, [])
    (verdict, *_) = store.files("cpu")
    assert verdict.verdict == "rejected" and reason in verdict.reason


def test_a_broken_file_lets_the_next_folder_serve(places):
    path = places.write(places.environment, "{")
    user = places.write(places.user, document(entry(rows_per_program=3)))
    found, said = look()
    assert found.rows_per_program == 3
    assert len(said) == 1 and str(path) in said[0] and str(user) in said[0]


def test_a_stale_entry_leaves_the_others(places):
    stale = entry(KEY._replace(n=64), proof=proof() | {"kernel_sha256": "0" * 64})
    places.write(places.environment, document(entry(), stale))
    found, said = look()
    assert found.rows_per_program == 7
    assert len(said) == 1 and "1 of 2 entries" in said[0]
    assert store.files("cpu")[0].verdict == "partly used"


def test_an_unreadable_file_is_not_fatal(places):
    (places.environment / "test-cpu-9.json").mkdir()
    found, said = look()
    assert found is None and len(said) == 1 and "cannot be read" in said[0]


def test_nothing_found_is_said_once_with_the_command(places):
    found, said = look()
    assert found is None and len(said) == 1 and "`coordroute autotune`" in said[0]
    assert look()[1] == []


def test_nearest_goes_by_length_first_then_rows(places):
    wanted = Key("soft_topk", "forward", "float32", 64, 1024)
    entries = {(256, 512): 1, (1, 1024): 2, (16, 1024): 3, (64, 2048): 4}
    made = [entry(wanted._replace(rows=rows, n=n), rows_per_program=mark) for (rows, n), mark in entries.items()]
    made.append(entry(wanted._replace(dtype="bfloat16"), rows_per_program=5))
    made.append(entry(wanted._replace(direction="backward"), rows_per_program=6))
    places.write(places.environment, document(*made))
    assert look(wanted)[0].rows_per_program == 3
    assert look(wanted._replace(n=1 << 20))[0] is None
    explanation = store.explain("cpu", *wanted)
    assert not explanation.exact and "nearest entry, 16x1024" in explanation.why


def test_a_resident_block_must_hold_the_row():
    key = Key("soft_topk", "forward", "float32", 64, 2048)
    configs = {
        key._replace(n=1024): LaunchConfig("resident", 1024, 1, 4, 1),
        key._replace(n=4096): LaunchConfig("resident", 4096, 1, 8, 1),
        key._replace(n=8192): LaunchConfig("tiled", 4096, 1, 8, 1),
    }
    assert store.nearest(key, configs) == key._replace(n=4096)
    assert store.nearest(key._replace(n=1024, rows=1), configs) == key._replace(n=1024)
    assert store.nearest(key._replace(n=256), configs) is None
    assert store.nearest(key._replace(rows=1), {key: LaunchConfig("resident", 2048, 2, 4, 1)}) is None


def test_programs_that_hold_a_row_of_their_own_key_must_hold_a_longer_one_too():
    """Else they would re-read it tile by tile, for which nobody has chosen them: that took 1.7 of the default's time once."""
    key = Key("coordinate_descent", "forward", "float32", 4, 262144)
    shorter = key._replace(n=131072)
    assert store.nearest(key, {shorter: LaunchConfig("split", 4096, 1, 2, 1, 20, programs_per_row=32)}) is None
    assert store.nearest(key, {shorter: LaunchConfig("split", 8192, 1, 4, 1, 20, programs_per_row=32)}) == shorter
    # what re-reads a row of its own key may do so here
    assert store.nearest(key, {shorter: LaunchConfig("split", 2048, 1, 2, 1, 20, programs_per_row=32)}) == shorter
    longer = key._replace(n=524288)
    assert store.nearest(key, {longer: LaunchConfig("split", 8192, 1, 4, 1, 20, programs_per_row=64)}) == longer


def test_a_changed_file_is_read_by_reload(places):
    places.write(places.environment, document(entry(rows_per_program=1)))
    assert look()[0].rows_per_program == 1
    places.write(places.environment, document(entry(rows_per_program=2)))
    assert store.lookup(CPU, KEY).rows_per_program == 1
    store.reload()
    assert store.lookup(CPU, KEY).rows_per_program == 2


def test_after_the_first_call_the_disk_is_not_touched(places, monkeypatch):
    path = places.write(places.environment, document(entry()))
    look()
    path.unlink()
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: pytest.fail("the disk was read"))
    assert store.lookup(CPU, KEY).rows_per_program == 7
    assert store.lookup(CPU, KEY._replace(n=1024)).rows_per_program == 7
    per_call = min(timeit.repeat(lambda: store.lookup(CPU, KEY), number=2000, repeat=5)) / 2000
    assert per_call < 1e-4  # a bound that catches disk access; the goal of 1 µs is shown by the benchmark


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COORDROUTE_TUNED", "yes"),
        ("COORDROUTE_TUNED", ""),
        ("COORDROUTE_CONFIG_DIR", ""),
        ("COORDROUTE_CONFIG_DIR", __file__),
    ],
)
def test_an_invalid_variable_raises_and_says_what_is_allowed(places, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    store.reload()
    for call in (lambda: store.lookup(CPU, KEY), store.check_environment, lambda: store.explain("cpu", *KEY)):
        with pytest.raises(ValueError, match=f"{name}.*allowed is"):
            call()


def test_tuned_off_reads_nothing(places, monkeypatch):
    places.write(places.environment, "{")
    monkeypatch.setenv("COORDROUTE_TUNED", "0")
    assert look()[0] is None
    explanation = store.explain("cpu", *KEY)
    assert explanation.source == "heuristic" and "COORDROUTE_TUNED=0" in explanation.why


@pytest.mark.parametrize(("argument", "value"), [("op", "sort"), ("direction", "up"), ("dtype", "int8"), ("n", 0), ("rows", -1)])
def test_explain_names_a_bad_argument(places, argument, value):
    with pytest.raises(ValueError, match=argument if argument in ("op", "direction", "dtype") else "shape"):
        store.explain("cpu", **(KEY._asdict() | {argument: value}))


def test_user_folder_of_each_platform(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert store.user_folder() == tmp_path / ".cache" / "coordroute"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert store.user_folder() == tmp_path / ".cache" / "coordroute"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert store.user_folder() == tmp_path / "Library" / "Caches" / "coordroute"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert store.user_folder() == tmp_path / "local" / "coordroute" / "Cache"


# --- writing ---------------------------------------------------------------------------------------------------------


def test_save_merges_and_replaces(places):
    path = places.environment / "test-cpu-9.json"
    other = KEY._replace(n=64)
    assert store.save(path, DEVICE, VERSIONS, [entry(), entry(other)]) == {"written": 2, "kept": 0, "dropped": 0}
    later = VERSIONS | {"torch": "1"}
    assert store.save(path, DEVICE, later, [entry(rows_per_program=9)]) == {"written": 1, "kept": 1, "dropped": 0}
    assert look()[0].rows_per_program == 9
    data = json.loads(path.read_text())
    assert data["versions"] == later
    assert [made.get("versions") for made in data["entries"]] == [VERSIONS | {"driver": "none"}, None]
    assert [file.name for file in places.environment.iterdir()] == ["test-cpu-9.json"]


def test_an_entry_keeps_the_versions_and_the_driver_that_it_was_made_with(places):
    path = places.environment / "test-cpu-9.json"
    keys = [KEY._replace(n=n) for n in (64, 128, 256)]
    store.save(path, DEVICE, VERSIONS, [entry(key) for key in keys])
    store.save(path, DEVICE | {"driver": "2"}, VERSIONS, [entry(keys[0])], without=[keys[2]])
    store.save(path, DEVICE | {"driver": "3"}, VERSIONS, [])
    data = json.loads(path.read_text())
    assert data["device"]["driver"] == "3"
    assert [made["versions"]["driver"] for made in data["entries"]] == ["2", "none"]


def test_save_drops_what_is_stale_and_keeps_a_copy_of_what_is_foreign(places):
    path = places.environment / "test-cpu-9.json"
    places.write(places.environment, document(entry(KEY._replace(n=64), proof=proof() | {"kernel_sha256": "0"})))
    assert store.save(path, DEVICE, VERSIONS, [entry()])["dropped"] == 1
    assert look()[1] == []
    foreign = (document(entry(), schema=2), document(device=DEVICE | {"name": "Other"}))
    for content in ("{", *map(json.dumps, foreign)):
        path.write_text(content)
        store.save(path, DEVICE, VERSIONS, [entry()])
        assert path.with_name("test-cpu-9.json.old").read_text() == content
        assert look()[1] == []


def test_a_write_that_fails_leaves_the_old_file(places, monkeypatch):
    path = places.write(places.environment, document(entry(rows_per_program=1)))
    monkeypatch.setattr(store.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        store.save(path, DEVICE, VERSIONS, [entry(rows_per_program=2)])
    assert look()[0].rows_per_program == 1
    assert [file.name for file in places.environment.iterdir()] == ["test-cpu-9.json"]


def test_an_entry_is_checked_before_it_is_written():
    launch = LaunchConfig("eager", rows_per_program=1)
    assert store.make_entry(KEY, launch, TIMING, proof())["key"] == KEY._asdict()
    with pytest.raises(store.InvalidFile, match="no proof"):
        store.make_entry(KEY, launch, TIMING, {})
    with pytest.raises(store.InvalidFile, match="timing has no 'samples'"):
        store.make_entry(KEY, launch, {k: v for k, v in TIMING.items() if k != "samples"}, proof())


WRITER = """
import json, sys
from pathlib import Path
from coordroute.autotune import store
path, made = Path(sys.argv[1]), json.loads(sys.stdin.read())
for entry in made["entries"]:
    store.save(path, made["device"], made["versions"], [entry])
"""


def test_concurrent_writers_lose_nothing(places, tmp_path):
    path = tmp_path / "shared.json"
    lengths = [16, 32, 64, 128, 256, 512]
    writers = []
    for rows in (1, 4, 16):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, text=True)
        made = document(*(entry(KEY._replace(rows=rows, n=n)) for n in lengths))
        assert process.stdin is not None
        process.stdin.write(json.dumps(made))
        process.stdin.close()
        writers.append(process)
    while any(process.poll() is None for process in writers):
        if path.exists():
            store.read(path)  # a reader never sees half a file
    assert [process.returncode for process in writers] == [0, 0, 0]
    assert len(store.read(path).entries) == 3 * len(lengths)
    assert sorted(file.name for file in tmp_path.glob("*shared*")) == ["shared.json"]


def test_a_lock_that_is_held_times_out(tmp_path):
    path = tmp_path / "x.json"
    with (
        store.locked(path),
        pytest.raises(TimeoutError, match="held by another process"),
        store.locked(path, seconds=0.05),
    ):
        pass
    with store.locked(path, seconds=0.05):
        pass


def test_buckets_are_powers_of_two_and_a_few_between_and_end():
    assert [kernel_config.bucket_rows(rows) for rows in range(10)] == [1, 1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert {kernel_config.bucket_rows(rows) for rows in (1 << 17 | 1, 1 << 18, 1 << 18 | 1, 1 << 30)} == {1 << 18}
    middle = {256: 256, 257: 384, 384: 384, 385: 512, 512: 512, 513: 768, 768: 768, 769: 1024, 1536: 2048}
    assert {rows: kernel_config.bucket_rows(rows) for rows in middle} == middle
    lengths = {1: 16, 16: 16, 17: 32, 1000: 1024, 2048: 2048, 40000: 65536, 1 << 24: 1 << 24, 1 << 30: 1 << 24}
    # rows that do not fill a block
    lengths |= {1025: 1600, 2047: 1600, 12000: 12800, 12800: 12800, 16383: 12800, 32767: 25600}
    assert {n: kernel_config.bucket_n(n) for n in lengths} == lengths


def test_an_entry_of_full_rows_serves_those_that_do_not_fill_their_block_where_there_is_none_for_them():
    key = Key("soft_topk", "forward", "float32", 512, 12800)
    whole = {
        key._replace(n=n, rows=rows): LaunchConfig("resident", n, 1, 8, 1) for n in (8192, 16384, 32768) for rows in (256, 512)
    }
    assert store.nearest(key, whole) == key._replace(n=16384)
    other = key._replace(rows=1024)
    more = whole | {other: LaunchConfig("resident", 16384, 1, 8, 1)}
    assert store.nearest(key, more) == other
    # full rows are as far as twice or half the rows
    assert store.nearest(key._replace(rows=256), more) == key._replace(rows=256, n=16384)
    assert store.nearest(key._replace(rows=2048, n=16384), more) == key._replace(n=16384)
