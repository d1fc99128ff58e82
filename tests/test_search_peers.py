"""Search strategies of other packages on a made-up space with a smooth cost."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from coordroute.autotune import peers
from coordroute.kernels.config import LaunchConfig

ANY_SEED = ("diff_evo", "bayes_opt")
"""Strategies that the seed does not determine."""

SPACE = [
    *(
        LaunchConfig("resident", 1024, rows, warps, 1, max_registers=registers)
        for rows in (1, 2, 4, 8)
        for warps in (1, 2, 4, 8, 16)
        for registers in (0, 64)
    ),
    *(
        LaunchConfig("split", block, 1, warps, 1, programs_per_row=programs)
        for block in (256, 512, 1024)
        for warps in (2, 4)
        for programs in (2, 4, 8)
    ),
    *(LaunchConfig("tiled", block, 1, warps, stages) for block in (512, 1024) for warps in (4, 8) for stages in (1, 2)),
]


def cost(config: LaunchConfig) -> float | None:
    if config.num_warps == 16 and config.rows_per_program == 1:
        return None
    smooth = (math.log2(config.num_warps) - 2) ** 2 + (math.log2(config.block) - 9) ** 2
    rows = (math.log2(config.rows_per_program) - 1) ** 2 + math.log2(config.programs_per_row)
    return 10 + smooth + rows + config.max_registers / 64 + 0.5 * (config.variant == "tiled")


def recorded(name: str, space: list[LaunchConfig], evaluations: int, seed: int) -> tuple[LaunchConfig, list[LaunchConfig]]:
    asked: list[LaunchConfig] = []

    def record(config: LaunchConfig) -> float | None:
        asked.append(config)
        return cost(config)

    return peers.search(name, space, record, evaluations, seed), asked


def each_is_a_good_citizen(name: str) -> None:
    for evaluations, seed in ((8, 1), (20, 2), (len(SPACE), 3)):
        state = random.getstate(), np.random.get_state()[1].tolist()
        best, asked = recorded(name, SPACE, evaluations, seed)
        assert state == (random.getstate(), np.random.get_state()[1].tolist())
        assert 1 <= len(asked) <= evaluations
        assert len(set(asked)) == len(asked)
        assert set(asked) <= set(SPACE)
        assert best in asked
        assert cost(best) == min(value for value in map(cost, asked) if value is not None)
        if name not in ANY_SEED:
            assert recorded(name, SPACE, evaluations, seed) == (best, asked)
    assert recorded(name, SPACE, 8, 1)[1] != recorded(name, SPACE, 8, 2)[1]
    for count in (1, 2, 3):
        best, asked = recorded(name, SPACE[:count], 8, 0)
        assert best in SPACE[:count]
        assert len(asked) <= count


def test_each_strategy_of_kernel_tuner():
    pytest.importorskip("kernel_tuner")
    names = peers.kernel_tuner_strategies()
    assert {"random_sample", "genetic_algorithm", "simulated_annealing", "bayes_opt", "diff_evo", "pso"} <= set(names)
    for name in names:
        each_is_a_good_citizen(name)


def test_each_search_of_helion():
    pytest.importorskip("helion")
    names = peers.helion_strategies()
    assert {"DifferentialEvolutionSearch", "PatternSearch", "LFBOTreeSearch"} <= set(names)
    for name in names:
        each_is_a_good_citizen(name)


@pytest.mark.parametrize(("package", "name"), [("kernel_tuner", "genetic_algorithm"), ("helion", "PatternSearch")])
def test_a_search_finds_a_smooth_minimum(package, name):
    pytest.importorskip(package)
    best = min(value for value in map(cost, SPACE) if value is not None)
    found = [cost(recorded(name, SPACE, 40, seed)[0]) for seed in range(5)]
    assert min(found) == best
    assert max(found) <= best + 2


@pytest.mark.parametrize(("package", "name"), [("kernel_tuner", "mls"), ("helion", "DifferentialEvolutionSearch")])
def test_fields_that_may_be_none_are_parameters(package, name):
    pytest.importorskip(package)
    space = [LaunchConfig("tiled", 256, 1, warps, 1, segments) for segments in (None, 5, 20) for warps in (1, 2, 4, 8)]
    best, asked = recorded(name, space, 12, 0)
    assert best in space
    assert {config.checkpoint_segments for config in asked} == {None, 5, 20}


@pytest.mark.parametrize(("package", "name"), [("kernel_tuner", "mls"), ("helion", "PatternSearch")])
def test_nothing_valid_and_failures(package, name):
    pytest.importorskip(package)
    with pytest.raises(ValueError, match=r"none of the \d+ candidates"):
        peers.search(name, SPACE, lambda config: None, 5, 0)

    def broken(config):
        raise OSError("a table that is not there")

    with pytest.raises(OSError, match="not there"):
        peers.search(name, SPACE, broken, 5, 0)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="0 candidates"):
        peers.search("mls", [], cost, 5, 0)
    with pytest.raises(ValueError, match="0 evaluations"):
        peers.search("mls", SPACE, cost, 0, 0)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(peers, "_installed", lambda package: False)
    assert peers.kernel_tuner_strategies() == ()
    assert peers.helion_strategies() == ()
    with pytest.raises(ImportError, match="pip install"):
        peers.search("mls", SPACE, cost, 5, 0)


def test_unknown_names_are_refused():
    pytest.importorskip("kernel_tuner")
    pytest.importorskip("helion")
    with pytest.raises(ValueError, match="no strategy 'brute_force'"):
        peers.search("brute_force", SPACE, cost, 5, 0)


def test_a_strategy_that_goes_round_without_a_question_is_ended(monkeypatch):
    """As Kernel Tuner's genetic algorithm did, whose population had become one candidate."""
    candidates = [LaunchConfig("resident", 1024, num_warps=warps) for warps in (1, 2, 4, 8, 16)]

    def forever(name, evaluator, seed):
        evaluator.ask(next(iter(evaluator.points)))
        while True:
            pass

    monkeypatch.setattr(peers, "_strategy", lambda name: forever)
    monkeypatch.setattr(peers, "_SILENCE", 0.1)
    assert peers.search("some", candidates, lambda config: float(config.num_warps), 5, 0) == candidates[0]
