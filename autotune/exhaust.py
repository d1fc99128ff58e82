"""The timings of every candidate of some keys: what a search is judged by, with no GPU, as often as one likes (``replay.py``)."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Any

import torch

from ..kernels import config as kernel_config
from ..kernels.config import DIRECTIONS, OPS, Key, LaunchConfig
from . import device as devices
from . import space, store
from .crew import Crew
from .search import Progress, default_workers, label
from .timer import Timer, processes
from .worker import Failure, Inline, Json, Pool, compile_request

ROUNDS = 140
"""Half of them say how long a candidate takes, the other half are for searches to draw from, none of which asks for more."""

SAMPLE_US = 300.0

AHEAD = 2
"""Keys that each of several processes compiles ahead. Where another takes one of them, its candidates are compiled twice."""

SHAPES = ((65536, 256), (4096, 2048), (1024, 8192), (16, 4096), (4, 131072), (1, 1048576))
CPU_SHAPES = ((256, 512), (64, 4096), (4, 65536))
"""Rows and length: many short rows, a few long ones, and what lies between."""

BETWEEN = ((20000, 300), (6000, 1100), (900, 9000), (600, 5500), (350, 11000), (150, 28000), (20, 6500), (5, 50000), (1, 150000))
CPU_BETWEEN = ((100, 700), (30, 3000), (2, 50000))
"""Rows and length that no key has: an entry of another shape serves them."""


Compiling = tuple[LaunchConfig, "Future[Json | Failure] | None"]
"""A candidate, and what becomes of compiling it; None where there is nothing to compile."""


def keys(backend: str, between: bool = False) -> list[Key]:
    """Both operators and both directions, with the sizes as they are, at :data:`SHAPES` in float32 and bfloat16.

    Those between the keys are of float32 only, as are all on a CPU.
    """
    shapes: tuple[tuple[int, int], ...] = BETWEEN if between else SHAPES
    dtypes: tuple[str, ...] = ("float32",) if between else ("float32", "bfloat16")
    if backend == "cpu":
        shapes, dtypes = CPU_BETWEEN if between else CPU_SHAPES, ("float32",)
    return [Key(op, direction, dtype, rows, n) for dtype in dtypes for rows, n in shapes for op in OPS for direction in DIRECTIONS]


def bucket(key: Key) -> Key:
    """The key that a call of these sizes has."""
    return key._replace(rows=kernel_config.bucket_rows(key.rows), n=kernel_config.bucket_n(key.n))


def run(
    device: torch.device | str | None = None,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
    *,
    between: bool = False,
    chosen: Sequence[Key] | None = None,
    workers: int | None = None,
    seed: int = 0,
    seconds: float | None = None,
    crew: Crew | None = None,
) -> dict[str, Any]:
    """Compiles and times all candidates of some keys. Nothing is verified and nothing is tuned.

    Args:
        device: what to time; None is the GPU where there is one, else the CPU.
        rounds: samples of each candidate.
        progress: called with (total, done, text, seconds left or None).
        between: time shapes between the keys, to see how well the entries of the keys serve them.
        chosen: the keys, with the sizes as they are; None is :func:`keys`.
        workers: processes that compile; None is what a search has. 0 does everything in this process.
        seed: of the inputs.
        seconds: no key is begun after so long, and the result has those that were; None for no limit. The first is begun anyway.
        crew: the processes to share the work with.

    Returns:
        What goes into exhaustive.json.

    Raises:
        ValueError: an argument is not one that is allowed.
        WorkerError: a worker process does not start.
    """
    if rounds < 2:
        raise ValueError(f"rounds is {rounds}; at least 2 are needed")
    begin = time.monotonic()
    device = devices.as_device(device)
    backend = devices.backend(device)
    todo = list(keys(backend, between) if chosen is None else chosen)
    workers = default_workers(backend) if workers is None else workers
    results: list[Json] = []

    def say(text: str, done: int) -> None:
        if progress is not None:
            spent = time.monotonic() - begin
            progress(len(todo), done, text, spent / done * (len(todo) - done) if done else None)

    def late() -> bool:
        return seconds is not None and time.monotonic() - begin > seconds

    with contextlib.ExitStack() as stack:
        pool, timer = processes(stack, device, workers, seed, SAMPLE_US)
        if crew is None:
            futures = [_compiled(pool, key, device) for key in todo]
            for done, key in enumerate(todo):
                if done and late():
                    break
                say(f"timing {label(key)}", done)
                results.append(_timed(timer, key, device, futures[done], rounds))
        else:
            crew.agree("keys", json.dumps([todo, rounds]))
            done, ahead = 0, dict[int, list[Compiling]]()
            while (i := crew.claim(len(todo))) is not None:
                if done and late():
                    crew.finish(i, "null")
                    continue
                say(f"timing {label(todo[i])}", done)
                # and what is likely to come next here is compiled while this is timed
                for one in range(i, min(i + AHEAD * crew.world_size + 1, len(todo)), crew.world_size):
                    if one not in ahead:
                        ahead[one] = _compiled(pool, todo[one], device)
                crew.finish(i, json.dumps(_timed(timer, todo[i], device, ahead.pop(i), rounds)))
                done = i + 1
            results = [found for text in crew.results(len(todo)) if (found := json.loads(text)) is not None]
    say("done", len(todo))
    return {
        "schema": 1,
        "command": "exhaust",
        "device": devices.describe(device),
        "versions": devices.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 1),
        "rounds": rounds,
        "left_out": len(todo) - len(results),
        "method": (
            f"every candidate of a key in every round, in rotating order; a sample lasts at least {SAMPLE_US:.0f} us and is "
            "measured as the tuner measures: a CUDA graph of batched calls over input sets that keep the L2 cold, on a CPU a loop"
        ),
        "keys": results,
    }


def _compiled(pool: Pool | Inline, key: Key, device: torch.device) -> list[Compiling]:
    backend = devices.backend(device)
    default = kernel_config.heuristic(bucket(key), backend)
    found = space.candidates(bucket(key), backend, "full")
    found = list(dict.fromkeys([*found, serving(key, device)]))
    if backend == "cpu":
        return [(config, None) for config in found]
    return [(config, pool.submit(compile_request(key, config, config == default))) for config in found]


def serving(key: Key, device: torch.device) -> LaunchConfig:
    """The configuration that a call of these sizes gets on this machine, with the number of checkpoint segments of the others."""
    config = kernel_config.resolve(key.op, key.direction, getattr(torch, key.dtype), key.rows, key.n, device)
    return _among(config, key, devices.backend(device))


def _among(config: LaunchConfig, key: Key, backend: str) -> LaunchConfig:
    """A configuration as it stands among the candidates, which all have the default's number of checkpoint segments."""
    return space.with_segments(config, kernel_config.heuristic(bucket(key), backend).checkpoint_segments)


def served_by(data: Json, file: store.ConfigFile) -> Json:
    """What :func:`run` gave, with what serves each key by another file than at that time: nothing is timed for it.

    Args:
        data: as in exhaustive.json.
        file: what was tuned for the same device.

    Returns:
        The same, where ``serves`` of a key is the candidate that the file chooses, or None where it was not among those timed.

    Raises:
        ValueError: the file is of another device, or none of its entries can be used.
    """
    if file.device["name"] != data["device"]["name"]:
        what = f"{file.path} is of {file.device['name']}, the timings are of {data['device']['name']}"
        raise ValueError(f"{what}; one device is needed")
    if not file.configs:
        reasons = "; ".join(f"{count} {reason}" for reason, count in file.rejected.items()) or "it has no entries"
        raise ValueError(f"{file.path} serves nothing: {reasons}")
    backend = "cpu" if devices.architecture(data["device"]["capability"]).startswith("cpu") else "triton"
    keys = []
    for one in data["keys"]:
        key = Key(**one["key"])
        near = store.nearest(bucket(key), file.configs)
        config = kernel_config.heuristic(bucket(key), backend) if near is None else file.configs[near]
        found = [LaunchConfig.from_json(candidate["config"]) for candidate in one["candidates"]]
        config = _among(config, key, backend)
        keys.append(one | {"serves": found.index(config) if config in found else None})
    return data | {"keys": keys}


def _timed(timer: Timer, key: Key, device: torch.device, compiles: list[Compiling], rounds: int) -> Json:
    candidates: list[Json] = []
    binaries: dict[str, int] = {}
    for config, future in compiles:
        one: Json = {"config": config.to_json(), "status": "timed", "reason": "", "samples": None}
        one |= {"registers": None, "spills": None, "occupancy": None, "same_as": None}
        answer = None if future is None else future.result()
        if isinstance(answer, Failure):
            one |= {"status": answer.status, "reason": answer.reason}
        elif answer is not None:
            one |= {name: answer[name] for name in ("registers", "spills", "occupancy")}
            if answer["status"] != "ok":
                one |= {"status": answer["status"], "reason": answer["reason"]}
            elif answer["identity"]:
                first = binaries.setdefault(answer["identity"], len(candidates))
                one["same_as"] = None if first == len(candidates) else first
        candidates.append(one)
    places = [i for i, one in enumerate(candidates) if one["status"] == "timed" and one["same_as"] is None]
    name = label(key)
    timer.open(name, key)
    samples, failures = timer.sample(name, [compiles[i][0] for i in places], rounds)
    timer.close(name)
    for i in places:
        config = compiles[i][0]
        if config in failures:
            candidates[i] |= {"status": failures[config].status, "reason": failures[config].reason}
        else:
            candidates[i]["samples"] = [float(f"{sample:.5g}") for sample in samples[config]]
    for one in candidates:
        same = one["same_as"]
        if same is not None and candidates[same]["status"] != "timed":
            one |= {"status": candidates[same]["status"], "reason": candidates[same]["reason"], "same_as": None}
    found = [config for config, _ in compiles]
    seeds = space.seeds(bucket(key), devices.backend(device))
    return {
        "key": key._asdict(),
        "default": 0,
        "serves": found.index(serving(key, device)),
        "seeds": [found.index(config) for config in seeds if config in found],
        "candidates": candidates,
    }
