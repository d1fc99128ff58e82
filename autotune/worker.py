"""Processes that compile and check candidates, so that one that crashes or hangs costs itself and no more.

A worker is this module run as a program. It reads one task a line (JSON) and answers one outcome a line. The pool hands
tasks out, notices a worker that died or does not answer, and starts another.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from ..kernels.config import Key, LaunchConfig
from .proof import Outcome

TASK_SECONDS = 120.0
"""A candidate that has not been compiled and checked by then hangs."""

START_SECONDS = 180.0
"""How long a worker may take to import torch and reach its device."""


class WorkerError(RuntimeError):
    """A worker process does not start: nothing can be proved here."""


class Task(NamedTuple):
    """One candidate to prove: see :func:`coordroute.autotune.proof.prove`."""

    key: Key
    config: LaunchConfig
    partner: LaunchConfig
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key._asdict(),
            "config": self.config.to_json(),
            "partner": self.partner.to_json(),
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Task:
        return cls(
            Key(**data["key"]),
            LaunchConfig.from_json(data["config"]),
            LaunchConfig.from_json(data["partner"]),
            data["seed"],
        )

    def identifier(self) -> str:
        """A text that is the same for the same task, in this process and in the next."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))


class _Worker:
    """One worker process and the thread that reads its answers."""

    def __init__(self, device: str, threads: int) -> None:
        self._device = device
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment["OMP_NUM_THREADS"] = str(threads)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers itself
        )
        self._answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready = False

    def _read(self) -> None:
        stdout = self._process.stdout
        if stdout is not None:
            for line in stdout:
                self._answers.put(line)
        self._answers.put(b"")

    def prove(self, task: Task) -> Outcome:
        if not self.ready:
            hello = self._answer(START_SECONDS)
            if isinstance(hello, Outcome):
                raise WorkerError(f"a worker process does not start on {self._device}: {hello.reason}")
            self.ready = True
        stdin = self._process.stdin
        try:
            if stdin is None:
                return Outcome("crashes", "the worker has no input")
            stdin.write(json.dumps(task.to_json()).encode() + b"\n")
            stdin.flush()
        except OSError:
            return Outcome("crashes", self._last_error())
        answer = self._answer(TASK_SECONDS)
        return answer if isinstance(answer, Outcome) else Outcome(**answer)

    def _answer(self, seconds: float) -> dict[str, Any] | Outcome:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            return Outcome("hangs", f"no answer within {seconds:.0f} s")
        return json.loads(line) if line else Outcome("crashes", self._last_error())

    def _last_error(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f"exit status {self._process.poll()}: {lines[-1][:200] if lines else 'nothing said'}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()


class Pool:
    """Worker processes for one device. Use as a context manager: leaving it ends them."""

    def __init__(self, device: str, size: int) -> None:
        self.size = size
        self._device = device
        self._threads = max(1, (os.cpu_count() or 1) // size)
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._closed = True
            workers, self._all = self._all, set()
        for worker in workers:
            worker.stop()

    def _take(self) -> _Worker | None:
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        with self._lock:
            if self._closed:
                return None
            worker = _Worker(self._device, self._threads)
            self._all.add(worker)
            return worker

    def _prove(self, task: Task) -> Outcome:
        worker = self._take()
        if worker is None:
            return Outcome("crashes", "the pool is closed")
        outcome = worker.prove(task)
        if outcome.status in ("crashes", "hangs") or outcome.reason.startswith(_POISONED):
            with self._lock:
                known = worker in self._all
                self._all.discard(worker)
            if known:
                worker.stop()
        else:
            self._idle.put(worker)
        return outcome

    def prove_all(self, tasks: Iterable[Task], alive: Callable[[], bool] = lambda: True) -> Iterator[tuple[Task, Outcome]]:
        """Proves tasks in any order; yields each with its outcome as it ends. ``alive`` false: no more are begun.

        Raises:
            WorkerError: a worker process does not start.
        """
        waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        count = 0
        for task in tasks:
            waiting.put(task)
            count += 1
        done: queue.SimpleQueue[tuple[Task, Outcome] | WorkerError] = queue.SimpleQueue()

        def serve() -> None:
            with contextlib.suppress(queue.Empty):
                while alive() and not self._closed:
                    task = waiting.get_nowait()
                    try:
                        done.put((task, self._prove(task)))
                    except WorkerError as error:
                        done.put(error)
                        return
                    except Exception as error:
                        done.put((task, Outcome("crashes", f"{type(error).__name__}: {error}"[:200])))

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(self.size, count))]
        for thread in threads:
            thread.start()
        for _ in range(count):
            while True:
                try:
                    found = done.get(timeout=0.5)
                    if isinstance(found, WorkerError):
                        raise found
                    yield found
                    break
                except queue.Empty:
                    if not any(thread.is_alive() for thread in threads) and done.empty():
                        return


_POISONED = (
    "AcceleratorError",
    "the check raised AcceleratorError",
    "RuntimeError: CUDA error",
    "the check raised RuntimeError: CUDA error",
)
"""After such an error nothing that the process launches is right any more: it is replaced."""


def main(device_name: str) -> None:
    """Serves tasks from standard input until it ends. Whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    import torch

    from .proof import prove

    device = torch.device(device_name)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    answers.write('{"ready": true}\n')
    answers.flush()
    for line in sys.stdin:
        task = Task.from_json(json.loads(line))
        outcome = prove(device, task.key, task.config, task.partner, task.seed)
        answers.write(json.dumps(asdict(outcome)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
