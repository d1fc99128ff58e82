"""Several processes of one tuning run share the work: each claims the next item, does it and publishes its result.

All goes through one key-value store (torch's ``TCPStore``), which ``torchrun`` already serves. There is no process group
and no collective, so that nobody waits for a process that died: every process keeps a counter in the store moving, and
whoever sees another's counter stand still for ``PATIENCE`` seconds takes that one's item over. Should a process be held
for dead wrongly, an item is done twice and the first result counts.

In the store, under a prefix of the run and its restart::

    members         how many have joined; gives each process a name that no process had before, "<rank>:<number>"
    rank/<rank>     the name of the process that is this rank
    beat/<name>     its counter, or "gone" once it has left
    agree/<topic>   "<rank>:<text>", of whoever came first
    claim/<item>    the name of its holder, or "done" once the result is there
    result/<item>   the result

No key is ever deleted, and ``compare_set`` with nothing expected both claims and reads, so that no call has to wait for
another process. A key that is missing must not be compared with anything else: the store then answers what was expected.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from types import TracebackType

    from torch.distributed import Store

PATIENCE = 20.0
"""Seconds that the counter of a process may stand still before its item is taken over. The interpreter may be held up for
some of them by a compiler that does not let go of it."""

TIMEOUT = 60.0
"""Seconds that the store may take to come up, or to answer one question."""

BEAT_SECONDS = 1.0
"""How often a process moves its counter, and how often it looks at another's."""

POLL_SECONDS = 0.2
"""How often a process that waits for others looks again."""

MAX_RESULT_BYTES = 8 * 2**20 - 1024
"""The longest result; the store drops the connection of whoever sends more than 8 MiB at once."""

GONE = "gone"
DONE = "done"

T = TypeVar("T")


class CrewError(RuntimeError):
    """The processes of a run cannot go on together; the message says why in one sentence."""


@dataclass
class _Pulse:
    """What was seen of another process: its counter, when that last moved, and when it was last looked at."""

    beat: str
    moved: float
    looked: float


class Crew:
    """The processes of one tuning run, and the items of work that they share.

    One thread of this process does all the talking with the store: a client of the store takes one question at a time
    and has no time limit of its own for most of them, and the counter has to move while the process is at work.

    Every method that asks the store raises CrewError, in one sentence, if the store is gone or does not answer.

    Attributes:
        rank: the number of this process, from 0.
        world_size: the number of processes.
        local_rank: the number of this process among those of its node; by it each takes another device.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        local_rank: int,
        host: str,
        port: int,
        *,
        serve: bool = False,
        prefix: str = "coordroute",
        patience: float = PATIENCE,
        timeout: float = TIMEOUT,
    ) -> None:
        """Joins the crew; waits until the store is there, for no other process.

        Args:
            rank: the number of this process, from 0.
            world_size: the number of processes.
            local_rank: the number of this process among those of its node.
            host: where the store is served.
            port: where the store is served.
            serve: whether this process serves the store; exactly one does, unless a launcher serves it already.
            prefix: what this run's keys in the store begin with.
            patience: seconds until a process whose counter stands still is held for dead.
            timeout: seconds until a store that does not answer is given up.

        Raises:
            CrewError: this torch has no ``torch.distributed``, or there is no store within ``timeout``.
        """
        if not torch.distributed.is_available():
            raise CrewError(
                "this torch is built without torch.distributed, so that processes cannot share a run; start one process"
            )
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self._host, self._port, self._serve, self._prefix = host, port, serve, prefix
        self._patience, self._timeout = patience, timeout
        self._beat_seconds = min(BEAT_SECONDS, patience / 10)
        self._name = ""
        self._joined = time.monotonic()
        self._beats = 0
        self._leaving = False
        self._closed = False
        self._lost: str | None = None
        self._held: int | None = None
        self._finished: set[int] = set()
        self._seen: dict[str, _Pulse] = {}
        self._questions: queue.SimpleQueue[tuple[Callable[[Store], Any], Future[Any]] | None] = queue.SimpleQueue()
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._talk, args=(opened,), name="coordroute-crew", daemon=True)
        self._thread.start()
        self._answer(opened, "could not reach", timeout + 5.0)  # the connection has the same limit, and the better words
        atexit.register(self._hang_up)

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ, *, patience: float = PATIENCE, timeout: float = TIMEOUT
    ) -> Crew | None:
        """Joins the crew that a launcher such as ``torchrun`` describes in the environment.

        Where ``TORCHELASTIC_USE_AGENT_STORE`` is ``True``, the launcher serves a store at ``MASTER_ADDR`` and
        ``MASTER_PORT``; otherwise rank 0 serves it there.

        Args:
            environment: the variables.
            patience: as for the class.
            timeout: as for the class.

        Returns:
            The crew, or None if ``RANK`` and ``WORLD_SIZE`` are not both set or this is the only process.

        Raises:
            ValueError: a variable is missing or has a value that is not allowed.
            CrewError: as for the class.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        world_size = _number(environment, "WORLD_SIZE", 1)
        if world_size == 1:
            return None
        rank = _number(environment, "RANK", 0, world_size - 1)
        local_rank = _number(environment, "LOCAL_RANK", 0, world_size - 1)
        host = environment.get("MASTER_ADDR", "").strip()
        if not host:
            came = repr(environment["MASTER_ADDR"]) if "MASTER_ADDR" in environment else "not set"
            raise ValueError(f"MASTER_ADDR is {came}; allowed is the name or the address of a host")
        port = _number(environment, "MASTER_PORT", 1, 65535)
        agent = environment.get("TORCHELASTIC_USE_AGENT_STORE", "False")
        if agent not in ("True", "False"):
            raise ValueError(f"TORCHELASTIC_USE_AGENT_STORE is {agent!r}; allowed is True or False")
        restart = _number({"TORCHELASTIC_RESTART_COUNT": "0"} | dict(environment), "TORCHELASTIC_RESTART_COUNT", 0)
        return cls(
            rank,
            world_size,
            local_rank,
            host,
            port,
            serve=agent == "False" and rank == 0,
            prefix=f"coordroute/{environment.get('TORCHELASTIC_RUN_ID', 'none')}/{restart}",
            patience=patience,
            timeout=timeout,
        )

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- the work -----------------------------------------------------------------------------------------------------

    def agree(self, name: str, text: str) -> None:
        """Makes sure that all processes hold the same text; the first one that comes says which. Waits for nobody.

        Args:
            name: what the text is about.
            text: the text; of two JSON objects the error names the fields that differ.

        Raises:
            CrewError: another process came first with another text.
        """
        mine = f"{self.rank}:{text}"
        first, _, theirs = self._compare_set(f"agree/{name}", "", mine).partition(":")
        if theirs != text:
            raise CrewError(
                f"rank {self.rank} and rank {first} of this run differ in {name}: {_difference(text, theirs, first)}; "
                "the processes of a run must agree"
            )

    def claim(self, count: int) -> int | None:
        """Claims the first item that is not finished and that nobody alive holds.

        While all items that are not finished are held by others, this waits, for one of them may die and leave its item.

        Args:
            count: the number of items, the same for all; they are numbered from 0, the most useful first.

        Returns:
            The item, which is to be finished before the next one is claimed; None once all are finished.

        Raises:
            CrewError: this process holds an item already.
        """
        if self._held is not None:
            raise CrewError(f"rank {self.rank} holds item {self._held}; it must finish that before it claims another one")
        while True:
            for item in range(count):
                if item not in self._finished and self._take(item):
                    self._held = item
                    return item
            if all(item in self._finished for item in range(count)):
                return None
            time.sleep(POLL_SECONDS)

    def finish(self, item: int, result: str) -> None:
        """Publishes the result of an item. If another process published one before, that one stays and nothing is said.

        An item may be finished that was never claimed, such as one that an earlier run left behind.

        Args:
            item: the item.
            result: a JSON text.

        Raises:
            ValueError: the item is negative, or the result is empty or too long for the store.
        """
        if item < 0:
            raise ValueError(f"item is {item}; allowed is a number from 0")
        size = len(result.encode())
        if not 1 <= size <= MAX_RESULT_BYTES:
            raise ValueError(f"result of item {item} has {size} bytes; allowed is 1 to {MAX_RESULT_BYTES}")
        self._compare_set(f"result/{item}", "", result)
        self._mark_done(item)
        if self._held == item:
            self._held = None

    def results(self, count: int) -> list[str]:
        """The results of all items in their order, once all are finished; any process may ask.

        Args:
            count: the number of items.

        Raises:
            CrewError: some items are not finished yet.
        """
        keys = [f"result/{item}" for item in range(count)]
        missing = [item for item, key in enumerate(keys) if item not in self._finished and not self._has(key)]
        if missing:
            raise CrewError(f"{len(missing)} of {count} items are not finished yet, the first of them is item {missing[0]}")
        return [self._get(key) for key in keys]

    def close(self) -> None:
        """Leaves the crew; an item that is still held goes back. May be called again, and raises nothing if the store is gone.

        The process that serves the store first waits until all others have left or died.
        """
        if self._closed:
            return
        with contextlib.suppress(RuntimeError):
            self._leaving = True
            self._ask(self._beat)
            while self._serve and not all(self._has_left(rank) for rank in range(self.world_size) if rank != self.rank):
                time.sleep(POLL_SECONDS)
        self._held = None
        self._hang_up()

    # --- claims and signs of life -------------------------------------------------------------------------------------

    def _take(self, item: int) -> bool:
        """Whether the item is now this process's; notes it if it is finished."""
        key = f"claim/{item}"
        holder = self._compare_set(key, "", self._name)
        if holder == self._name:
            return True
        if holder == DONE:
            self._finished.add(item)
            return False
        if self._alive(holder) or self._compare_set(key, holder, self._name) != self._name:
            return False
        if self._has(f"result/{item}"):  # its holder died between the two steps of `finish`
            self._mark_done(item)
            return False
        return True

    def _mark_done(self, item: int) -> None:
        self._ask(lambda store: store.set(f"claim/{item}", DONE))
        self._finished.add(item)

    def _alive(self, name: str) -> bool:
        """Whether a process has not left and its counter has moved within the patience, by this process's clock."""
        now = time.monotonic()
        seen = self._seen.get(name)
        if seen is None or now - seen.looked >= self._beat_seconds:
            beat = self._get(f"beat/{name}")
            moved = seen.moved if seen is not None and seen.beat == beat else now
            seen = self._seen[name] = _Pulse(beat, moved, now)
        return seen.beat != GONE and seen.looked - seen.moved <= self._patience

    def _has_left(self, rank: int) -> bool:
        """Whether a rank has left or died. One that never came is waited for as long as for the store."""
        key = f"rank/{rank}"
        if not self._has(key):
            return time.monotonic() - self._joined > self._timeout
        return not self._alive(self._get(key))

    # --- the store ----------------------------------------------------------------------------------------------------

    def _compare_set(self, key: str, expected: str, desired: str) -> str:
        """What the key holds afterwards: ``desired`` if it held ``expected`` before, or did not exist and that is ""."""
        return self._ask(lambda store: store.compare_set(key, expected, desired)).decode()

    def _has(self, key: str) -> bool:
        return self._ask(lambda store: store.check([key]))

    def _get(self, key: str) -> str:
        """What a key holds that is known to exist; for any other this would wait."""
        return self._ask(lambda store: store.get(key)).decode()

    def _ask(self, question: Callable[[Store], T]) -> T:
        if self._closed:
            raise CrewError(f"rank {self.rank} has left its tuning run")
        if self._lost is not None:
            raise CrewError(self._lost)
        answer: Future[T] = Future()
        self._questions.put((question, answer))
        return self._answer(answer, "lost", self._timeout)

    def _answer(self, answer: Future[T], what: str, seconds: float) -> T:
        try:
            return answer.result(seconds)
        except TimeoutError:
            reason = f"no answer within {seconds:.0f} s"
        except RuntimeError as error:  # all errors of the store are
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        self._lost = f"rank {self.rank} {what} the store of its tuning run at {self._host}:{self._port} ({reason})"
        raise CrewError(self._lost)

    def _talk(self, opened: Future[None]) -> None:
        """The thread: answers questions, and moves the counter in between."""
        try:
            store = self._join()
        except Exception as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        due = time.monotonic() + self._beat_seconds
        while True:
            if time.monotonic() >= due:
                with contextlib.suppress(RuntimeError):  # whoever asks next is told
                    self._beat(store)
                due = time.monotonic() + self._beat_seconds
            try:
                asked = self._questions.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                continue
            if asked is None:
                break
            question, answer = asked
            try:
                answer.set_result(question(store))
            except Exception as error:
                answer.set_exception(error)
        self._leaving = True
        with contextlib.suppress(RuntimeError):
            self._beat(store)

    def _join(self) -> Store:
        from torch.distributed import PrefixStore, TCPStore

        limit = timedelta(seconds=self._timeout)
        server = TCPStore(
            self._host, self._port, is_master=self._serve, timeout=limit, wait_for_workers=False, multi_tenant=self._serve
        )
        store = PrefixStore(self._prefix, server)
        store.set_timeout(limit)
        self._name = f"{self.rank}:{store.add('members', 1)}"
        self._beat(store)
        store.set(f"rank/{self.rank}", self._name)
        store.check(["members"])  # `set` waits for no answer; this one comes after both
        return store

    def _beat(self, store: Store) -> None:
        self._beats += 1
        store.set(f"beat/{self._name}", GONE if self._leaving else str(self._beats))
        if self._leaving:
            store.check(["members"])  # so that it has arrived before the process ends

    def _hang_up(self) -> None:
        """Ends the thread. Also called when the interpreter ends: a thread that then returns from the store would abort it."""
        self._closed = True
        atexit.unregister(self._hang_up)
        self._questions.put(None)
        self._thread.join(1.0)


def _number(environment: Mapping[str, str], name: str, low: int, high: int | None = None) -> int:
    allowed = f"a whole number from {low}" + ("" if high is None else f" to {high}")
    if name not in environment:
        raise ValueError(f"{name} is not set; allowed is {allowed}")
    value = environment[name]
    try:
        number = int(value)
    except ValueError:
        number = low - 1
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} is {value!r}; allowed is {allowed}")
    return number


def _difference(ours: str, theirs: str, rank: str) -> str:
    """What differs between two texts: of JSON objects the fields, of others the texts themselves, shortened."""
    try:
        here, there = json.loads(ours), json.loads(theirs)
    except ValueError:
        here = there = None
    if isinstance(here, dict) and isinstance(there, dict):
        fields = [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
        if fields:
            return ", ".join(
                f"{name} is {_short(here.get(name))} here and {_short(there.get(name))} on rank {rank}" for name in fields
            )
    return f"it is {_short(ours)} here and {_short(theirs)} on rank {rank}"


def _short(value: Any, length: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 1] + "…"
