"""Timing in a process that can be killed: a candidate that crashes, hangs or takes all memory costs itself and no more.

``Session`` is the side that times, ``Timer`` the side that asks. Candidates are prepared one by one, so that it is known which
one brought the process down; if it falls in a round of several, each is run alone to find the one that did.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..kernels import config as kernel_config
from ..kernels.config import Key, LaunchConfig
from . import space, timing
from .proof import raw, run_backward, run_forward
from .worker import PROGRAM, Account, Failure, Inline, Json, Local, Pool, Worker, failed

PREPARE_SECONDS = {"cuda": 90.0, "cpu": 240.0}
"""How long a candidate may take to be compiled, if it is not, and run a few times."""

ROUND_SECONDS = {"cuda": 0.3, "cpu": 5.0}
"""How long one sample of a round may take; a round of several has that for each, and ``GRACE_SECONDS`` on top."""

GRACE_SECONDS = 20.0


# --- the side that times ---------------------------------------------------------------------------------------------


@dataclass
class _Open:
    key: Key
    kernels: Any
    scores: torch.Tensor
    grads: torch.Tensor | None
    size: int
    saved: dict[int | None, list[torch.Tensor]] = field(default_factory=dict)
    names: list[tuple[str, int]] = field(default_factory=list)


class Session:
    """Candidates of some keys, prepared to be timed in this process.

    The inputs are normal scores, in as many sets as it takes to have the second-level cache cold; all settings are the
    published ones (``proof.PUBLISHED``). Every method takes a request and gives an answer, as JSON.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._keys: dict[str, _Open] = {}
        self._race: timing.Race | None = None

    def open(self, request: Json) -> Json:
        """``{"name", "key", "seed", "target_us"}``: makes the inputs of a key."""
        key = Key(**request["key"])
        backend = "triton" if self.device.type == "cuda" else "cpu"
        if self._race is None:
            self._race = timing.Race(self.device, request["target_us"])
            self._race.__enter__()
        # what a forward reads and writes; a backward moves more
        size = 2 * key.rows * key.n * getattr(torch, key.dtype).itemsize
        sets = timing.input_sets(self.device, size)
        scores = self._normal(key, sets, 2 * request["seed"])
        grads = self._normal(key, sets, 2 * request["seed"] + 1) if key.direction == "backward" else None
        self._keys[request["name"]] = _Open(key, raw(key.op, backend), scores, grads, size)
        return {}

    def _normal(self, key: Key, sets: int, seed: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        made = torch.empty(sets, key.rows, key.n, dtype=getattr(torch, key.dtype), device=self.device)
        for one in made:
            one.copy_(torch.randn(key.rows, key.n, generator=generator, device=self.device))
        return made

    def add(self, request: Json) -> Json:
        """``{"name", "id", "config"}``: prepares a candidate; answers ``{"method"}``."""
        opened, config = self._keys[request["name"]], LaunchConfig.from_json(request["config"])
        if self._race is None:
            raise RuntimeError("no key is open")
        name = request["name"], request["id"]
        with _no_grad(self.device):
            work = timing.Work("", self._call(opened, config), len(opened.scores), opened.size)
            method = self._race.add(name, work)
        opened.names.append(name)
        return {"method": method}

    def _call(self, opened: _Open, config: LaunchConfig) -> Callable[[int], Any]:
        op, kernels, scores = opened.key.op, opened.kernels, opened.scores
        if opened.grads is None:
            return lambda i: run_forward(op, kernels, scores[i], config)
        grads, segments = opened.grads, config.checkpoint_segments
        if segments not in opened.saved:
            backend = "triton" if self.device.type == "cuda" else "cpu"
            key = opened.key
            bucket = Key(key.op, "forward", key.dtype, kernel_config.bucket_rows(key.rows), kernel_config.bucket_n(key.n))
            forward = kernel_config.heuristic(bucket, backend)
            forward = space.with_segments(forward, segments)
            opened.saved[segments] = [run_forward(op, kernels, one, forward)[1] for one in scores]
        saved = opened.saved[segments]
        return lambda i: run_backward(op, kernels, grads[i], scores[i], saved[i], config)

    def rounds(self, request: Json) -> Json:
        """``{"name", "ids", "rounds", "seconds"}``: answers ``{"samples"}``, for each a list, or ``{"failed", "reason"}``.

        ``seconds`` ends it early, though not before one round; null has no limit.
        """
        if self._race is None:
            raise RuntimeError("no key is open")
        names = [(request["name"], one) for one in request["ids"]]
        samples: dict[Any, list[float]] = {name: [] for name in names}
        fell: dict[Any, Json] = {}
        begin = time.perf_counter()
        with _no_grad(self.device):
            for _ in range(request["rounds"]):
                for name, sample in self._race.round([name for name in names if name not in fell]).items():
                    if isinstance(sample, Exception):
                        fell[name] = failed(sample)
                    else:
                        samples[name].append(sample)
                if request["seconds"] is not None and time.perf_counter() - begin > request["seconds"]:
                    break
        return {"samples": [fell.get(name) or samples[name] for name in names]}

    def close(self, request: Json) -> Json:
        """``{"name"}``: lets go of the inputs of a key and of what was prepared for it."""
        opened = self._keys.pop(request["name"])
        if self._race is not None:
            for name in opened.names:
                self._race.drop(name)
            if not self._keys:
                self._race.__exit__(None, None, None)
                self._race = None
        return {}


@contextmanager
def _no_grad(device: torch.device) -> Iterator[None]:
    with torch.no_grad():
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield


# --- the side that asks ----------------------------------------------------------------------------------------------


class Asked(Protocol):
    """What answers: a worker process, or this process."""

    def ask(self, request: Json, seconds: float | None = None) -> Json | Failure: ...

    @property
    def alive(self) -> bool: ...

    account: Account

    def stop(self) -> None: ...


Samples = dict[LaunchConfig, list[float]]
Failures = dict[LaunchConfig, Failure]


class Timer:
    """Times the candidates of keys, through a process that is replaced where one brings it down.

    Args:
        asked: the process.
        kind: "cuda" or "cpu".
        seed: of the inputs.
        target_us: how long one sample should last at least, in microseconds.

    Attributes:
        methods: how a candidate of a key is measured, by the key's name and the candidate.
    """

    def __init__(self, asked: Asked, kind: str, seed: int, target_us: float) -> None:
        self._asked, self._kind, self._seed, self._target_us = asked, kind, seed, target_us
        self._open: dict[str, Key] = {}
        self._there: dict[str, dict[LaunchConfig, int]] = {}
        self._numbers = itertools.count()
        self._last = Failure("crashes", "nothing was asked")
        self.methods: dict[tuple[str, LaunchConfig], str] = {}

    @property
    def account(self) -> Account:
        """Of the process."""
        return self._asked.account

    def open(self, name: str, key: Key) -> None:
        """Names a key whose candidates are to be timed; several may be open."""
        self._open[name] = key

    def close(self, name: str) -> None:
        self._open.pop(name, None)
        if self._there.pop(name, None) is not None and self._asked.alive:
            self._ask({"do": "close", "name": name}, GRACE_SECONDS)

    def sample(
        self, name: str, configs: Sequence[LaunchConfig], rounds: int, seconds: float | None = None
    ) -> tuple[Samples, Failures]:
        """Times candidates of a key against each other.

        Args:
            name: of the key.
            configs: the candidates.
            rounds: how many; in each every candidate has one sample.
            seconds: ends it early, though not before one round.

        Returns:
            The samples in microseconds, as many of each candidate; and the candidates that failed.
        """
        failures: Failures = {}
        for alone in (False, True, False):
            left = [config for config in configs if config not in failures]
            groups = [[config] for config in left] if alone else [left]
            fell = False
            samples: Samples = {}
            for group in groups:
                limit = None if seconds is None else seconds / len(groups)
                found = self._sample(name, group, rounds, limit, failures)
                if found is not None:
                    samples |= found
                    continue
                fell = True
                if alone:
                    failures[group[0]] = self._last
            if not alone and not fell:
                return samples, failures
        # each runs alone, and together they fall: nothing can be said of any
        return {}, failures | {config: self._last for config in configs if config not in failures}

    def _sample(
        self, name: str, configs: list[LaunchConfig], rounds: int, seconds: float | None, failures: Failures
    ) -> Samples | None:
        """Samples of those that do not fail; None where the process fell in a round."""
        while True:
            begun = self._prepare(name, configs, failures)
            # a candidate that brought the process down has taken those before it along
            if begun and all(config in failures or config in self._there.get(name, {}) for config in configs):
                break
        left = [config for config in configs if config not in failures]
        if not left:
            return {}
        request = {"do": "round", "name": name, "rounds": rounds, "seconds": seconds}
        request["ids"] = [self._there[name][config] for config in left]
        answer = self._ask(request, GRACE_SECONDS + rounds * len(left) * ROUND_SECONDS[self._kind])
        if isinstance(answer, Failure):
            self._last = answer
            return None
        samples: Samples = {}
        for config, found in zip(left, answer["samples"], strict=True):
            if isinstance(found, dict):
                failures[config] = Failure(found["failed"], found["reason"])
            else:
                samples[config] = found
        return samples

    def _prepare(self, name: str, configs: list[LaunchConfig], failures: Failures) -> bool:
        """Prepares the candidates that are not; False where one of them brought the process down, and is among the failures."""
        for config in configs:
            if config in failures or config in self._there.get(name, {}):
                continue
            if name not in self._there:
                key = self._open[name]
                request = {"do": "open", "name": name, "key": key._asdict(), "seed": self._seed, "target_us": self._target_us}
                answer = self._ask(request, PREPARE_SECONDS[self._kind])
                if isinstance(answer, Failure):
                    # not even the inputs can be made
                    failures.update({one: answer for one in configs if one not in failures})
                    return True
                self._there[name] = {}
            number = next(self._numbers)
            request = {"do": "add", "name": name, "id": number, "config": config.to_json()}
            answer = self._ask(request, PREPARE_SECONDS[self._kind])
            if isinstance(answer, Failure):
                failures[config] = answer
                if not self._asked.alive:
                    return False
                continue
            self._there[name][config] = number
            self.methods[name, config] = answer["method"]
        return True

    def _ask(self, request: Json, seconds: float) -> Json | Failure:
        answer = self._asked.ask(request, seconds)
        if isinstance(answer, Failure) and not self._asked.alive:
            self._there.clear()
        return answer


def processes(
    stack: ExitStack, device: torch.device, workers: int, seed: int, target_us: float, program: Sequence[str] = PROGRAM
) -> tuple[Pool | Inline, Timer]:
    """What compiles and proves, and what times, until the stack is left.

    Args:
        stack: ends the processes.
        device: what they work on.
        workers: on a GPU, how many compile and prove beside the one that times. On a CPU one process does both, with all of
            torch's threads, for what else runs would be in the timings. 0 does everything in this process.
        seed: of the inputs.
        target_us: how long one sample should last at least, in microseconds.
        program: the command line of a worker.
    """
    name = str(device)
    if workers and device.type == "cuda":
        pool = stack.enter_context(Pool(name, workers, program))
        worker = Worker(name, program=program)
        stack.callback(worker.stop)
        return pool, Timer(worker, device.type, seed, target_us)
    asked = Worker(name, torch.get_num_threads(), program) if workers else Local(name)
    return stack.enter_context(Inline(asked)), Timer(asked, device.type, seed, target_us)
