"""A worker of the autotuner whose kernels fail where they are told to, and a search that uses it. Both are programs.

``faulty_worker.py worker SPEC DEVICE`` serves requests as the package's own worker does; ``faulty_worker.py search SPEC`` runs a
search with such workers. SPEC is a JSON file::

    log     a file that gets one line for each request: the process, and what it was asked
    costs   milliseconds that a call is said to take, by rows_per_program ("else" for the others); without it, what it takes by
            the clock, which the other processes of a busy machine disturb
    faults  where it fails: [{"op", "direction", "rows" (rows_per_program), "kind", "during" (requests), "after" (calls)}]

and, for a search, what ``search.run`` is given. A fault without one of the fields is one for all its values.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

STICKY = {
    "illegal": "CUDA error: an illegal memory access was encountered",
    "illegal, says Triton": "Triton Error [CUDA]: an illegal memory access was encountered",
}
"""After such an error everything in the process fails, with torch's words for it."""

CANDIDATES = (1, 2, 3)
"""The rows_per_program of the candidates beside the default."""


def arrange(setattr, candidates=CANDIDATES) -> None:
    """A search of a few candidates that need no compiler, with few rounds."""
    from dataclasses import replace

    from coordroute.autotune import search, space, strategies
    from coordroute.kernels import config as kernel_config

    def found(key, backend, effort):
        default = kernel_config.heuristic(key, backend)
        return [default, *(replace(default, rows_per_program=rows) for rows in candidates)]

    # all candidates are known after the first ask, and the best four go on
    plan = strategies.Plan(first_rounds=2, contenders=4, contender_rounds=2, doubts=0, near=10.0)
    setattr(space, "candidates", found)
    setattr(search, "_PLANS", {("cpu", "quick"): search.Plan(plan, 2, 9, 1.0)})


class Faults:
    def __init__(self, spec: dict) -> None:
        self.spec = spec
        self.doing = ""
        self.sticky = ""
        self.calls: Counter[int] = Counter()
        self.rows: dict[tuple, int] = {}

    def note(self, request: dict) -> None:
        self.doing = request["do"]
        if self.doing == "add":
            self.rows[request["name"], request["id"]] = request["config"]["rows_per_program"]
        line = json.dumps({"process": os.getpid(), **request}) + "\n"
        with open(self.spec["log"], "a", encoding="utf-8") as file:
            file.write(line)

    def of(self, op: str, direction: str, rows: int) -> str:
        """The kind of fault that such a call has now, or ""."""
        here = {"op": op, "direction": direction, "rows": rows}
        for i, fault in enumerate(self.spec["faults"]):
            if any(fault.get(name, value) != value for name, value in here.items()):
                continue
            if self.doing in fault.get("during", (self.doing,)):
                self.calls[i] += 1
                if self.calls[i] > fault.get("after", 0):
                    return fault["kind"]
        return ""

    def strike(self, kind: str, device) -> None:
        import torch

        if kind in STICKY and device.type == "cpu":
            self.sticky = STICKY["illegal"]
            raise RuntimeError(STICKY[kind])
        if kind in ("illegal", "endless") and device.type == "cuda":
            path = Path(__file__).with_name("faulty_kernels.py")
            found = importlib.util.spec_from_file_location("faulty_kernels", path)
            module = sys.modules["faulty_kernels"] = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
            getattr(module, kind)[(1,)](torch.zeros(2, device=device))
        if kind == "exits":
            os._exit(3)
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "hangs":
            time.sleep(3600)
        if kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

    def wrapped(self, op: str, direction: str, kernel):
        def call(*arguments):
            config, device = arguments[-1], arguments[0].device
            if self.sticky:
                raise RuntimeError(self.sticky)
            kind = self.of(op, direction, config.rows_per_program)
            self.strike(kind, device)
            made = kernel(*arguments)
            return (made[0] * 1.01, *made[1:]) if kind == "wrong" else made

        return call


def install(spec: dict, device_name: str) -> None:
    from coordroute.autotune import timing, worker
    from coordroute.kernels import config as kernel_config

    faults = Faults(spec)
    if device_name == "cpu":
        from coordroute.kernels import cpu

        modules = dict.fromkeys(kernel_config.OPS, cpu)
    else:
        modules = {op: importlib.import_module(f"coordroute.kernels.{op}") for op in kernel_config.OPS}
    for op, module in modules.items():
        for direction in kernel_config.DIRECTIONS:
            name = f"{op}_{direction}"
            setattr(module, name, faults.wrapped(op, direction, getattr(module, name)))
    answered, rounds = worker.Service.__call__, timing._Cpu.round

    def answer(self, request):
        faults.note(request)
        if request["do"] == "compile" and faults.of(
            request["key"]["op"], request["key"]["direction"], request["config"]["rows_per_program"]
        ):
            os._exit(4)
        return answered(self, request)

    def one_round(self, names, turn):
        # on a GPU the end of a round says that something in it went wrong, and not what
        found = rounds(self, names, turn)
        if faults.sticky:
            raise RuntimeError(faults.sticky)
        costs = spec.get("costs", {})
        if costs:
            time.sleep(0.005)
            for name, sample in found.items():
                if not isinstance(sample, Exception):
                    found[name] = 1000.0 * costs.get(str(faults.rows[name]), costs.get("else", 0)) + turn % 3
        return found

    worker.Service.__call__ = answer
    timing._Cpu.round = one_round


def run(spec: dict) -> None:
    import builtins
    import contextlib

    import torch
    from coordroute.autotune import search, worker
    from coordroute.autotune.crew import Crew
    from coordroute.autotune.space import Group

    torch.set_num_threads(1)
    worker.REQUEST_SECONDS = 60.0
    arrange(builtins.setattr)
    with contextlib.ExitStack() as stack:
        crew = None
        if "crew" in spec:
            rank, port, prefix = spec["crew"]
            crew = stack.enter_context(Crew(rank, 2, rank, "127.0.0.1", port, prefix=prefix, patience=3.0, timeout=30.0))
            while not all(crew._has(f"rank/{rank}") for rank in range(2)):  # so that each has a share
                time.sleep(0.01)
        groups = [Group(*group) for group in spec["groups"]]
        program = (sys.executable, "-P", __file__, "worker", spec["path"])
        found = search.run("cpu", groups=groups, output=spec["output"], program=program, crew=crew, seconds=1000.0)
    print(json.dumps(found))


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    if sys.argv[1] == "search":
        run(read | {"path": sys.argv[2]})
    else:
        from coordroute.autotune import worker

        install(read, sys.argv[3].partition(":")[0])
        worker.main(sys.argv[3])
