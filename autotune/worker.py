"""Processes that compile, verify and time candidates, so that one that crashes or hangs costs itself and no more.

A worker is this module run as a program. It reads one request a line (JSON) and answers each with one line. ``Worker`` is a
process, for one request after another; ``Pool`` is several of them for requests that do not depend on each other. One that died
or does not answer is replaced.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from ..kernels.config import Key, LaunchConfig

REQUEST_SECONDS = 120.0
"""A candidate that has not been compiled or checked by then hangs."""

START_SECONDS = 180.0
"""How long a worker may take to import torch and reach its device."""

PROGRAM = (sys.executable, "-P", "-m", __name__)

Json = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker process does not start: nothing can be proved or timed here."""


class Failure(NamedTuple):
    """There is no answer: the process died ("crashes"), was killed because it took too long ("hangs"), or said why not."""

    status: str
    reason: str


class Account:
    """What requests cost: of each kind how many there were, how long they took in all, and the longest of them.

    Attributes:
        kinds: by kind, ``{"requests", "seconds", "longest", "longest_about"}``.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, Json] = {}

    def add(self, request: Json, seconds: float) -> None:
        """Notes a request that was answered."""
        one = {"requests": 1, "seconds": seconds, "longest": seconds, "longest_about": _about(request)}
        self.merge({str(request.get("do")): one})

    def merge(self, kinds: dict[str, Json]) -> None:
        """Adds what another account has."""
        for kind, one in kinds.items():
            known = self.kinds.get(kind, {"requests": 0, "seconds": 0.0, "longest": -1.0, "longest_about": ""})
            longer = max(known, one, key=lambda either: either["longest"])
            self.kinds[kind] = {
                "requests": known["requests"] + one["requests"],
                "seconds": round(known["seconds"] + one["seconds"], 3),
                "longest": round(longer["longest"], 3),
                "longest_about": longer["longest_about"],
            }


def _about(request: Json) -> str:
    """What a request is about: the name of what is timed, or the key or group."""
    if "name" in request:
        return str(request["name"])
    found = request.get("key") or request
    shape = "x".join(str(found[name]) for name in ("rows", "n") if name in found)
    return " ".join([str(found[name]) for name in ("op", "direction", "dtype") if name in found] + [shape] * bool(shape))


class Worker:
    """One worker process, which is started by the first request and again after each failure.

    Args:
        device: as torch names it.
        threads: of torch, in the process.
        program: the command line, without the device.
        niceness: of the process, where the system knows that.

    Attributes:
        starts: how many processes there have been.
        account: what was answered, and what failed.
    """

    def __init__(self, device: str, threads: int = 1, program: Sequence[str] = PROGRAM, niceness: int = 0) -> None:
        self._device, self._threads, self._program, self._niceness = device, threads, program, niceness
        self._process: _Process | None = None
        self.starts = 0
        self.account = Account()

    def ask(self, request: Json, seconds: float | None = None) -> Json | Failure:
        """Sends a request and waits for the answer. After a failure the process is gone, and with it what it held.

        Args:
            request: what to do.
            seconds: how long to wait; None is :data:`REQUEST_SECONDS`.

        Raises:
            WorkerError: the process does not start.
        """
        if self._process is None:
            self._process = _Process(self._device, self._threads, self._program, self._niceness)
            self.starts += 1
            hello = self._process.answer(START_SECONDS)
            if isinstance(hello, Failure):
                self.stop()
                raise WorkerError(f"a worker process does not start on {self._device}: {hello.reason}")
        begin = time.monotonic()
        answer = self._process.ask(request, REQUEST_SECONDS if seconds is None else seconds)
        self.account.add(request, time.monotonic() - begin)
        if isinstance(answer, Failure) or _poisoned(answer):
            self.stop()
        if not isinstance(answer, Failure) and "failed" in answer:
            return Failure(answer["failed"], answer["reason"])
        return answer

    @property
    def alive(self) -> bool:
        """Whether the process of the last request is still there."""
        return self._process is not None

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.stop()


class _Process:
    def __init__(self, device: str, threads: int, program: Sequence[str], niceness: int) -> None:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment["OMP_NUM_THREADS"] = str(threads)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        self._process = subprocess.Popen(
            [*program, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers itself
        )
        if niceness and hasattr(os, "setpriority"):
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._process.pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
        self._answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        stdout = self._process.stdout
        if stdout is not None:
            with contextlib.suppress(ValueError):  # closed meanwhile
                for line in stdout:
                    self._answers.put(line)
        self._answers.put(b"")

    def ask(self, request: Json, seconds: float) -> Json | Failure:
        stdin = self._process.stdin
        try:
            if stdin is None:
                return Failure("crashes", "the worker has no input")
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except (OSError, ValueError):
            return Failure("crashes", self._last_error())
        return self.answer(seconds)

    def answer(self, seconds: float) -> Json | Failure:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            return Failure("hangs", f"no answer within {seconds:.0f} s")
        if not line.endswith(b"\n"):  # it died before it said anything, or in the middle
            return Failure("crashes", self._last_error())
        answer: Json = json.loads(line)
        return answer

    def _last_error(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        with contextlib.suppress(ValueError):
            self._errors.seek(0)
            lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
            return f"exit status {self._process.poll()}: {lines[-1][:200] if lines else 'nothing said'}"
        return "it was stopped"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()


def _poisoned(answer: Json) -> bool:
    """After such an error nothing that the process launches is right any more, whatever the answer is: it is replaced."""
    reasons = [answer.get("reason"), *(one.get("reason") for one in answer.get("samples", ()) if isinstance(one, dict))]
    return any(text in reason for reason in reasons if reason for text in ("AcceleratorError", "CUDA error", "Triton Error [CUDA]"))


# --- the pool --------------------------------------------------------------------------------------------------------


NICENESS = 10
"""Of the processes of a pool: they compile while another process times, which must not wait for a core."""


class Pool:
    """Worker processes for one device, each begun when it is needed. Use as a context manager: leaving it ends them."""

    def __init__(self, device: str, size: int, program: Sequence[str] = PROGRAM) -> None:
        self.size = size
        threads = max(1, (os.cpu_count() or 1) // size)
        self._workers = [Worker(device, threads, program, NICENESS) for _ in range(size)]
        self._waiting: queue.PriorityQueue[tuple[int, int, tuple[Json, Future[Json | Failure]] | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []
        self._pending: set[Future[Json | Failure]] = set()
        self._closed = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True
        for _ in self._threads:
            self._waiting.put((-1, -1, None))
        for worker in self._workers:
            worker.stop()
        for future in list(self._pending):
            future.cancel()

    @property
    def accounts(self) -> list[Account]:
        """Of its processes."""
        return [worker.account for worker in self._workers]

    def submit(self, request: Json, priority: int = 1) -> Future[Json | Failure]:
        """Hands a request to the next idle process; those of a lower priority number go first, else in their order.

        The future has the answer, or raises :class:`WorkerError` if the process does not start.
        """
        future: Future[Json | Failure] = Future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self._waiting.put((priority, next(self._numbers), (request, future)))
        if len(self._threads) < self.size:
            worker = self._workers[len(self._threads)]
            thread = threading.Thread(target=self._serve, args=(worker,), daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def _serve(self, worker: Worker) -> None:
        while not self._closed:
            _, _, item = self._waiting.get()
            if item is None:
                break
            request, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                answer = worker.ask(request)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(answer)
        worker.stop()  # it may have been begun while the pool was closed


class Local:
    """What a worker does, done in this process: nothing is isolated."""

    alive = True

    def __init__(self, device: str) -> None:
        self._service = Service(device)
        self.account = Account()

    def ask(self, request: Json, seconds: float | None = None) -> Json | Failure:
        begin = time.monotonic()
        answer = self._service(request)
        self.account.add(request, time.monotonic() - begin)
        return Failure(answer["failed"], answer["reason"]) if "failed" in answer else answer

    def stop(self) -> None:
        pass


class Inline:
    """A pool of one process, which does each request at once while the caller waits."""

    size = 1

    def __init__(self, asked: Worker | Local) -> None:
        self._asked = asked

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *exception: object) -> None:
        self._asked.stop()

    @property
    def accounts(self) -> list[Account]:
        """Of the process."""
        return [self._asked.account]

    def submit(self, request: Json, priority: int = 1) -> Future[Json | Failure]:
        future: Future[Json | Failure] = Future()
        future.set_result(self._asked.ask(request))
        return future


# --- requests --------------------------------------------------------------------------------------------------------


def compile_request(key: Key, config: LaunchConfig, is_default: bool) -> Json:
    """Answered by the fields of :class:`coordroute.autotune.binaries.Compiled`."""
    return {"do": "compile", "key": key._asdict(), "config": config.to_json(), "is_default": is_default}


def prepare_request(op: str, dtype: str, n: int, direction: str, config: LaunchConfig, form: int, most: int | None) -> Json:
    """Compiles what a proof launches of one direction in one form; answered by ``{"launches": how many}``."""
    key = {"op": op, "dtype": dtype, "n": n, "direction": direction}
    return {"do": "prepare", **key, "config": config.to_json(), "form": form, "most": most}


WARM = {"do": "warm"}
"""A request to load what a first proof loads, while there is nothing else to do; answered by ``{}``."""


def prove_request(op: str, dtype: str, rows: int, n: int, forward: LaunchConfig, backward: LaunchConfig, seed: int) -> Json:
    """Answered by the fields of :class:`coordroute.autotune.proof.Proved`."""
    return {
        "do": "prove",
        "op": op,
        "dtype": dtype,
        "rows": rows,
        "n": n,
        "forward": forward.to_json(),
        "backward": backward.to_json(),
        "seed": seed,
    }


OUT_OF_MEMORY = "out of memory"


def failed(error: Exception) -> Json:
    """What a candidate that raised this is answered with."""
    import torch

    from .proof import one_line

    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return {"failed": OUT_OF_MEMORY if memory else "crashes", "reason": one_line(error)}


class Service:
    """Answers requests, in a worker or here. What fails in an answer is an answer: ``{"failed": status, "reason": …}``."""

    def __init__(self, device_name: str) -> None:
        import torch

        from .timer import Session

        self.device = torch.device(device_name)
        self._session = Session(self.device)
        self._cold = True
        self._answers: dict[str, Callable[[Json], Json]] = {
            "compile": self._compile,
            "prove": self._prove,
            "prepare": self._prepare,
            "warm": self._warm,
            "open": self._session.open,
            "add": self._session.add,
            "round": self._session.rounds,
            "close": self._session.close,
        }

    def __call__(self, request: Json) -> Json:
        import torch

        try:
            return self._answers[request["do"]](request)
        except Exception as error:
            found = failed(error)
            if found["failed"] == OUT_OF_MEMORY and self.device.type == "cuda":
                torch.cuda.empty_cache()
            return found

    def _compile(self, request: Json) -> Json:
        from .binaries import compiled

        key, config = Key(**request["key"]), LaunchConfig.from_json(request["config"])
        return compiled(self.device, key, config, request["is_default"])._asdict()

    def _prepare(self, request: Json) -> Json:
        from .binaries import prepare

        op, dtype, n, direction = (request[name] for name in ("op", "dtype", "n", "direction"))
        config = LaunchConfig.from_json(request["config"])
        return {"launches": prepare(self.device, op, dtype, n, direction, config, request["form"], request["most"])}

    def _warm(self, request: Json) -> Json:
        if self._cold:
            import torch

            from ..reference import verify  # noqa: F401

            self._cold = False
            scores = torch.zeros(2, 64, device=self.device, dtype=torch.float64, requires_grad=True)
            torch.autograd.grad(scores.exp().sum(), scores)
        return {}

    def _prove(self, request: Json) -> Json:
        from .proof import prove

        forward, backward = (LaunchConfig.from_json(request[name]) for name in ("forward", "backward"))
        op, dtype, rows, n = (request[name] for name in ("op", "dtype", "rows", "n"))
        return prove(self.device, op, dtype, rows, n, forward, backward, request["seed"])._asdict()


def main(device_name: str) -> None:
    """Serves requests from standard input until it ends. Whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    import torch

    device = torch.device(device_name)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    service = Service(device_name)
    answers.write('{"ready": true}\n')
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(service(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
