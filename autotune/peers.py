"""Search strategies of other autotuners, for a comparison with ours on timings that are known already.

Kernel Tuner's strategies and Helion's searches are run as they are, with their own settings, on a list of candidates and
a function that says what each costs. Neither package compiles or times anything here, so no GPU is needed. Both are
optional (``pip install coordroute[peers]``). A strategy sees a parameter for each field of the configuration that is not
the same in all candidates, and only the combinations that are candidates exist.

Kernel Tuner's strategies, in lower case, are given a runner of ours (``tune(searchspace, runner, tuning_options)``) and a
search space of exactly the candidates. Its simulation mode would want the cost of all candidates before it starts.
Helion's, in camel case, are given a benchmark provider of ours. It has no notion of
combinations that do not exist, so what it proposes stands for the nearest candidate, of the same variant if there is one.
(A filter that turned the others down would leave a few percent of what it proposes, and it would hardly search.)
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import logging
import random
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..kernels.config import LaunchConfig

INSTALL = "pip install 'coordroute[peers]'"

Cost = Callable[[LaunchConfig], "float | None"]

_PATIENCE = 10_000
"""A search ends when it asked so many times in a row for what it knows: some go round for ever in a space that they know."""

_SILENCE = 3.0
"""Seconds without a question after which a search is ended: some go round for ever without one, such as a genetic algorithm whose
population has become one candidate."""

_TINY = 4
"""Of fewer candidates than these all are evaluated: some strategies fail where there is nothing to vary."""

_NEEDS = {"skopt": "skopt", "pyatf_strategies": "pyatf"}
"""Strategies of Kernel Tuner that come with a package which Kernel Tuner does not require."""

_HELION = (
    "DifferentialEvolutionSearch",
    "PatternSearch",
    "LFBOPatternSearch",
    "LFBOTreeSearch",
    "DESurrogateHybrid",
    "RandomSearch",
)
"""The searches of Helion that propose configurations by themselves (the others ask a language model or try a given list)."""


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def kernel_tuner_strategies() -> tuple[str, ...]:
    """The strategies of Kernel Tuner that can run here; none where it is not installed. Brute force is not a search."""
    if not _installed("kernel_tuner"):
        return ()
    from kernel_tuner.interface import strategy_map

    return tuple(name for name in strategy_map if name != "brute_force" and (name not in _NEEDS or _installed(_NEEDS[name])))


def helion_strategies() -> tuple[str, ...]:
    """The searches of Helion that can run here; none where it is not installed."""
    if not _installed("helion"):
        return ()
    from helion.autotuner import search_algorithms

    return tuple(name for name in _HELION if name in search_algorithms)


def search(name: str, candidates: Sequence[LaunchConfig], cost: Cost, evaluations: int, seed: int) -> LaunchConfig:
    """Runs a strategy and returns the best of the candidates that it evaluated.

    ``cost`` is called once for a candidate, however often the strategy asks for it, and what it is asked again costs no
    evaluation. The search ends with the last evaluation that it has, when the strategy ends by itself (a local search
    does so earlier), or when it only asks for what it knows.

    The same seed gives the same search, except for ``diff_evo`` and ``bayes_opt`` of Kernel Tuner: their first candidates
    come from a Latin hypercube of scipy that takes no seed. The state of the global random generators of Python and
    numpy, which both packages draw from, is as before afterwards.

    Args:
        name: one of :func:`kernel_tuner_strategies` or :func:`helion_strategies`.
        candidates: the space. Helion starts from a default configuration, which is the first of them.
        cost: what a candidate costs, more than 0; None says that it is invalid.
        evaluations: the most calls of ``cost``.
        seed: a whole number from 0 to 2**32 - 1.

    Raises:
        ImportError: the strategy's package is not installed.
        ValueError: there is no such strategy, nothing to search, or no valid candidate among those evaluated.
    """
    if not candidates or evaluations < 1:
        raise ValueError(f"{len(candidates)} candidates and {evaluations} evaluations: at least one of each is needed")
    run = _strategy(name)
    evaluator = _Evaluator(candidates, cost, evaluations)
    with _seeded(seed), contextlib.suppress(_Done), _watched(evaluator):
        if len(evaluator.points) < _TINY:
            for point in evaluator.points:
                evaluator.ask(point)
        run(name, evaluator, seed)
    return evaluator.best()


def _strategy(name: str) -> Callable[[str, _Evaluator, int], None]:
    """What runs the strategy."""
    if name in kernel_tuner_strategies():
        return _run_kernel_tuner
    if name in helion_strategies():
        return _run_helion
    missing = [package for package in ("kernel_tuner", "helion") if not _installed(package)]
    if missing:
        raise ImportError(f"strategy {name!r} is not available and {' and '.join(missing)} not installed: {INSTALL}")
    raise ValueError(f"no strategy {name!r}; there are {', '.join(kernel_tuner_strategies() + helion_strategies())}")


class _Done(BaseException):
    """The search is over. Not an Exception, so that no strategy takes it for a candidate that failed."""


class _Evaluator:
    """Asks for the cost of each candidate once, and ends the search.

    Attributes:
        parameters: for each field that varies, its values in ascending order (None first).
        points: the candidates, by the values of these fields.
        asked: how often the strategy asked for one.
    """

    def __init__(self, candidates: Sequence[LaunchConfig], cost: Cost, evaluations: int) -> None:
        self.parameters: dict[str, list[Any]] = {}
        for field in dataclasses.fields(LaunchConfig):
            values = {getattr(config, field.name) for config in candidates}
            if len(values) > 1:
                self.parameters[field.name] = sorted(values, key=lambda value: (value is not None, value))
        self.points = {tuple(getattr(config, name) for name in self.parameters): config for config in candidates}
        self.limit = min(evaluations, len(self.points))
        self._cost = cost
        self._known: dict[tuple[Any, ...], float | None] = {}
        self._repeated = 0
        self.asked = 0

    @property
    def done(self) -> int:
        """How many candidates were evaluated."""
        return len(self._known)

    def ask(self, point: tuple[Any, ...]) -> float | None:
        """The cost of a candidate, None if it is invalid. Ends the search if nothing can be evaluated after it."""
        self.asked += 1
        if point in self._known:
            self._repeated += 1
            if self._repeated >= _PATIENCE:
                raise _Done
            return self._known[point]
        self._repeated = 0
        value = self._cost(self.points[point])
        self._known[point] = value
        if len(self._known) >= self.limit:
            raise _Done
        return value

    def best(self) -> LaunchConfig:
        valid = {point: value for point, value in self._known.items() if value is not None}
        if not valid:
            raise ValueError(f"none of the {self.done} candidates that were evaluated is valid")
        return self.points[min(valid, key=lambda point: valid[point])]


@contextlib.contextmanager
def _watched(evaluator: _Evaluator) -> Iterator[None]:
    """Raises _Done in this thread once the strategy has not asked for anything for :data:`_SILENCE` seconds."""
    thread, over, lock = threading.get_ident(), threading.Event(), threading.Lock()

    def watch() -> None:
        asked = -1
        while not over.wait(_SILENCE):
            if evaluator.asked == asked:
                with lock:
                    if not over.is_set():
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Done))
                return
            asked = evaluator.asked

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        with lock:
            over.set()
        watcher.join()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the global random generators and sets them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


# --- Kernel Tuner ----------------------------------------------------------------------------------------------------


class _Runner:
    """Answers a strategy of Kernel Tuner in place of a GPU.

    Its values are numbers: of text or None the place in the order, for strategies compute with them.
    """

    def __init__(self, evaluator: _Evaluator) -> None:
        self.evaluator = evaluator
        self.dev = types.SimpleNamespace(max_threads=1 << 30)
        self.parameters: dict[str, list[int]] = {
            name: values if all(isinstance(value, int) for value in values) else list(range(len(values)))
            for name, values in evaluator.parameters.items()
        }
        self.points = {
            tuple(
                numbers[values.index(value)]
                for value, values, numbers in zip(point, evaluator.parameters.values(), self.parameters.values(), strict=True)
            ): point
            for point in evaluator.points
        }

    def add_strategy_time(self, seconds: float) -> None:
        """What the strategy itself takes is of no interest."""

    def run(self, elements: Sequence[Sequence[int]], tuning_options: Any) -> list[dict[str, Any]]:
        from kernel_tuner.util import InvalidConfig

        results = []
        for element in elements:
            before = self.evaluator.done
            value = self.evaluator.ask(self.points[tuple(element)])
            tuning_options.budget.add_evaluations(self.evaluator.done - before)
            result: dict[str, Any] = dict(zip(self.parameters, element, strict=True))
            results.append(result | ({"__error__": InvalidConfig()} if value is None else {"time": float(value)}))
        return results


def _run_kernel_tuner(name: str, evaluator: _Evaluator, seed: int) -> None:
    from kernel_tuner.interface import Options, strategy_map
    from kernel_tuner.searchspace import Searchspace
    from kernel_tuner.util import TuningBudget

    runner = _Runner(evaluator)
    elements = [dict(zip(runner.parameters, element, strict=True)) for element in runner.points]
    space = Searchspace(
        None, None, None, from_cache={"tune_params": runner.parameters, "cache": {str(i): e for i, e in enumerate(elements)}}
    )
    options = Options(max_fevals=evaluator.limit)
    if name == "diff_evo" and 16 * len(runner.parameters) > space.size:
        # its population is 16 for each parameter, and it fails where that is more than there are candidates
        options.update(popsize=max(space.size // 2, 1), popsize_times_dimensions=False)
    tuning_options = Options(
        objective=["time"],
        objective_higher_is_better=[False],
        strategy=name,
        strategy_options=options,
        max_fevals=evaluator.limit,
        budget=TuningBudget(max_fevals=evaluator.limit),
        tune_params=runner.parameters,
        restrictions=None,
        restrictions_unmodified=None,
        metrics=None,
        cache={},
        simulation_mode=True,
        verbose=False,
        seed=seed,
    )
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # an invalid candidate costs the largest number there is, which overflows
        warnings.simplefilter("ignore")
        strategy_map[name].tune(space, runner, tuning_options)


# --- Helion ----------------------------------------------------------------------------------------------------------


def _kernel(cost: float) -> Callable[..., float]:
    """What Helion takes for a kernel: it returns its own cost, so that a second timing finds the same."""
    return lambda *args: cost


def _run_helion(name: str, evaluator: _Evaluator, seed: int) -> None:
    import torch
    from helion.autotuner import EnumFragment, IntegerFragment, search_algorithms
    from helion.autotuner.benchmark_provider import BenchmarkProvider, BenchmarkResult
    from helion.autotuner.external import _ExternalKernelAdapter, create_user_config_spec
    from helion.exc import NoConfigFound

    first = next(iter(evaluator.points))
    fragments: dict[str, Any] = {}
    for (field, values), value in zip(evaluator.parameters.items(), first, strict=True):
        if all(isinstance(other, str) for other in values):
            fragments[field] = EnumFragment((value, *(other for other in values if other != value)))
        else:
            # the place in the order, so that a neighbour is the next value that occurs
            fragments[field] = IntegerFragment(0, len(values) - 1, values.index(value))

    @functools.cache
    def nearest(*proposed: Any) -> tuple[Any, ...]:
        def distance(point: tuple[Any, ...]) -> float:
            far = 0.0
            for mine, its, values in zip(proposed, point, evaluator.parameters.values(), strict=True):
                if isinstance(mine, str):
                    far += len(fragments) * (mine != its)
                else:
                    far += abs(mine - values.index(its)) / (len(values) - 1)
            return far

        return min(evaluator.points, key=distance)

    class Provider(BenchmarkProvider):
        mutated_arg_indices = ()

        def __init__(self, **context: Any) -> None:
            pass

        def setup(self) -> None:
            pass

        def cleanup(self) -> None:
            pass

        def benchmark(self, configs: list[Any], *, desc: str = "", raise_if_no_viable_config: bool = True) -> list[BenchmarkResult]:
            results = []
            for config in configs:
                value = evaluator.ask(nearest(*(config[field] for field in fragments)))
                seen = float("inf") if value is None else float(value)
                results.append(BenchmarkResult(config, _kernel(seen), seen, "error" if value is None else "ok", 0.0))
            return results

    kernel = _ExternalKernelAdapter(
        create_user_config_spec(fragments),
        compile_fn=lambda config: _kernel(0.0),
        args=(),
        device=torch.device("cpu"),
        autotune_accuracy_check=False,
        autotune_benchmark_fn=lambda kernels, **how: [kernel() for kernel in kernels],
        autotune_log_level=logging.CRITICAL,
        autotune_progress_bar=False,
        autotune_random_seed=seed,
    )
    algorithm: Any = search_algorithms[name](kernel, ())
    algorithm._benchmark_provider_cls = Provider  # its constructor does not hand the argument of the base class on
    with contextlib.suppress(NoConfigFound):
        algorithm.autotune(skip_cache=True)
