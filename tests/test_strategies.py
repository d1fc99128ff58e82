"""The searches on made-up timings: what is a step, what is preferred, what is timed again, and what is found."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from coordroute.autotune import space as spaces
from coordroute.autotune import strategies
from coordroute.autotune.strategies import Ask, Plan, Ratios
from coordroute.kernels import config as kernel_config
from coordroute.kernels.config import Key, LaunchConfig

PLAIN = LaunchConfig("resident", 1024, 1, 4, 1)


def resident(rows: int, warps: int, limit: int = 0) -> LaunchConfig:
    return replace(PLAIN, rows_per_program=rows, num_warps=warps, max_registers=limit)


# --- steps -----------------------------------------------------------------------------------------------------------

LIMITS = [resident(1, warps, limit) for warps in (2, 4, 8) for limit in (0, 32, 64, 128) if (warps, limit) != (8, 64)]


def test_limits_of_registers_are_reached_from_each_other():
    def near(warps, limit):
        return {
            other.max_registers for other in strategies.neighbours(resident(1, warps, limit), LIMITS) if other.num_warps == warps
        }

    assert near(4, 32) == {64, 0}
    assert near(4, 64) == {32, 128, 0}
    # none is the widest
    assert near(4, 128) == {64, 0} and near(4, 0) == {128}
    # of one that is not in the space, all are
    assert near(4, 50) == {0, 32, 64, 128}


def test_a_step_keeps_the_limit_or_takes_the_nearest_or_none_or_that_with_as_many_registers_a_program():
    found = strategies.neighbours(resident(1, 4, 64), LIMITS)
    assert {one.max_registers for one in found if one.num_warps == 2} == {64, 0, 128}
    assert {one.max_registers for one in found if one.num_warps == 8} == {32, 0}
    assert {one.max_registers for one in strategies.neighbours(resident(1, 4, 128), LIMITS) if one.num_warps == 8} == {128, 0, 32}
    assert {one.max_registers for one in strategies.neighbours(resident(1, 2, 64), LIMITS) if one.num_warps == 4} == {64, 0, 32}
    assert {one.num_warps for one in strategies.neighbours(resident(1, 2), LIMITS)} == {2, 4}


def test_a_step_is_the_next_value_that_occurs():
    space = [resident(1, warps) for warps in (1, 4, 16)]
    assert strategies.neighbours(space[0], space) == [space[1]]
    assert set(strategies.neighbours(space[1], space)) == {space[0], space[2]}
    between = resident(1, 8)
    assert set(strategies.neighbours(between, space)) == {space[1], space[2]}
    assert strategies.neighbours(space[0], [*space, replace(PLAIN, variant="tiled", num_warps=2)]) == [space[1]]


def test_diagonal_steps_keep_the_work_of_a_thread():
    space = [resident(1, 4), resident(2, 8), resident(2, 4), resident(1, 8), resident(4, 16)]
    assert set(strategies.neighbours(space[0], space)) == {resident(2, 8), resident(2, 4), resident(1, 8)}
    # twice the rows with half the warps is no step
    assert resident(2, 4) not in strategies.neighbours(resident(1, 8), [resident(1, 8), resident(2, 4)])
    split = LaunchConfig("split", 4096, 1, 8, 1, programs_per_row=8)
    shapes = [replace(split, block=2048, programs_per_row=16), replace(split, block=2048, num_warps=4)]
    assert strategies.neighbours(split, [split, *shapes, replace(split, block=8192, programs_per_row=16)])[:2] == shapes[::-1]


@pytest.mark.parametrize("rows, n", [(4096, 2048), (65536, 256), (4, 131072)])
def test_all_candidates_of_a_variant_are_connected(rows, n):
    """Whatever is the best, steps lead there."""
    key = Key("soft_topk", "forward", "float32", rows, n)
    space = spaces.candidates(key, "triton", "full")
    for variant in {config.variant for config in space}:
        same = [config for config in space if config.variant == variant]
        reached, todo = {same[0]}, [same[0]]
        while todo:
            new = [one for one in strategies.neighbours(todo.pop(), space) if one not in reached]
            reached.update(new)
            todo += new
        assert len(reached) > 0.9 * len(same), (variant, len(reached), len(same))


# --- the rule --------------------------------------------------------------------------------------------------------


def tie(factor: float) -> strategies.Plan:
    """The default's as the others'."""
    return strategies.Plan(tie=factor, keep=factor)


TIE = tie(1.003)


def test_within_the_tie_a_fixed_rule_decides_and_then_the_time():
    default, hint, second = resident(1, 4), resident(2, 4), resident(2, 8)
    few, many, capped = resident(4, 2), resident(4, 16), resident(4, 2, 32)
    figures = {many: 1.0, capped: 1.001, few: 1.001, hint: 1.001, second: 1.001, default: 1.002}
    order = strategies.preferred(figures, default, [second, hint], TIE)
    assert order == [default, second, hint, few, many, capped]
    # what is out of the tie comes by its time, the default too
    figures |= {default: 1.1, second: 1.2}
    assert strategies.preferred(figures, default, [second, hint], TIE) == [hint, few, many, capped, default, second]
    segments = {replace(few, checkpoint_segments=count): 1.0 for count in (20, 4, 10)}
    assert [one.checkpoint_segments for one in strategies.preferred(segments, default, (), TIE)] == [4, 10, 20]
    programs = {replace(few, programs_per_row=count, num_warps=8 // count): 1.0 for count in (4, 2)}
    assert [one.programs_per_row for one in strategies.preferred(programs, default, (), TIE)] == [2, 4]


def test_the_default_is_kept_where_little_is_gained():
    default, other, best = resident(1, 4), resident(2, 4), resident(2, 8)
    plan = strategies.Plan(tie=1.003, keep=1.01)
    assert strategies.preferred({best: 0.995, other: 0.996, default: 1.0}, default, (), plan)[0] == default
    assert strategies.preferred({best: 0.985, other: 0.986, default: 1.0}, default, (other,), plan) == [other, best, default]
    # and it is timed until that is clear
    made, names = ratios(default, best=[0.985, 0.995] * 8)
    assert set(made.doubtful([default, *names.values()], (), plan)) == {default, names["best"]}
    assert made.doubtful([default, *names.values()], (), tie(1.003)) == []


def test_the_order_does_not_depend_on_the_order_of_the_figures():
    figures = {resident(rows, warps): 1.0 for rows in (1, 2, 4) for warps in (2, 4)}
    backwards = dict(reversed(figures.items()))
    assert strategies.preferred(figures, PLAIN, (), TIE) == strategies.preferred(backwards, PLAIN, (), TIE)


def ratios(default: LaunchConfig, **more: list[float]) -> tuple[Ratios, dict[str, LaunchConfig]]:
    """Of the default, which always takes 1, and of others by name."""
    count = len(next(iter(more.values())))
    names = {name: resident(2, 1 << i) for i, name in enumerate(more)}
    made = Ratios(default)
    asked = Ask((default, *names.values()), count)
    made.take(asked, {default: [1.0] * count} | {names[name]: samples for name, samples in more.items()})
    return made, names


def test_nothing_is_doubtful_that_does_not_change_what_is_taken():
    default = resident(1, 4)
    made, names = ratios(default, best=[0.8, 0.81, 0.8, 0.81], slow=[0.9, 0.91, 0.9, 0.91])
    assert made.doubtful([default, *names.values()], (), tie(1.003)) == []
    # it would be taken if it were within the tie, and may be: its interval holds the limit
    made, names = ratios(default, few=[0.81, 0.9, 0.81, 0.9], best=[0.8, 0.8, 0.8, 0.8])
    assert set(made.doubtful([default, *names.values()], (), tie(1.05))) == {names["few"], names["best"]}
    # one that the rule does not prefer to the best does not matter
    made, names = ratios(default, best=[0.8, 0.8, 0.8, 0.8], many=[0.8, 0.9, 0.8, 0.9])
    assert made.doubtful([default, *names.values()], (), tie(1.001)) in ([], [names["best"], names["many"]])
    assert Ratios(default).doubtful([default], (), tie(1.003)) == []


def test_what_fails_is_known_and_has_no_figure():
    default, other = resident(1, 4), resident(2, 4)
    made = Ratios(default)
    made.take(Ask((default, other), 2), {default: [2.0, 2.0], other: [1.0, 1.0]})
    assert made.figures() == {default: 1.0, other: 0.5}
    made.take(Ask((default, other), 2), {default: [2.0, 2.0]})
    assert made.figures() == {default: 1.0} and made.known(other) and not made.known(resident(4, 4))
    with pytest.raises(strategies.DefaultFailed):
        made.take(Ask((default, other), 2), {other: [1.0, 1.0]})


def test_what_all_candidates_share_cancels():
    default, other = resident(1, 4), resident(2, 4)
    made = Ratios(default)
    for drift in (1.0, 3.0):
        made.take(Ask((default, other), 3), {default: [10 * drift] * 3, other: [5 * drift] * 3})
    assert made.figures()[other] == pytest.approx(0.5)
    assert made.interval(other) == pytest.approx((0.5, 0.5))


def test_of_few_samples_the_least_counts_and_of_more_the_median_of_pairs():
    slow = [1.0, 1.0, 1.5, 1.5, 1.5]
    assert strategies.ratio(slow, [1.0] * 5) == 1.0
    drift = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    assert strategies.ratio([0.9 * one for one in drift], drift) == pytest.approx(0.9)
    assert strategies.ratio([0.5, 0.5, *(0.9 * one for one in drift[2:])], drift) == pytest.approx(0.9)


def test_to_beat_is_surely():
    base = [10.0 + i % 3 for i in range(25)]
    assert strategies.beats([0.97 * one for one in base], base)
    assert not strategies.beats(base, base)
    assert not strategies.beats([1.03 * one for one in base], base)
    # faster on the whole, but not surely
    assert not strategies.beats([one * (0.9 if i % 2 else 1.05) for i, one in enumerate(base)], base)
    with pytest.raises(ValueError):
        strategies.beats(base[1:], base)


# --- the search ------------------------------------------------------------------------------------------------------

KEYS = [
    Key("soft_topk", "forward", "float32", 4096, 2048),
    Key("soft_topk", "backward", "bfloat16", 65536, 256),
    Key("coordinate_descent", "forward", "float32", 1024, 8192),
    Key("coordinate_descent", "backward", "float32", 4, 131072),
]


def speed(key: Key, config: LaunchConfig) -> float:
    """Microseconds: smooth in the doublings of each field, with its least where a thread has 16 scores."""
    work = config.rows_per_program * min(config.block, key.n) / (32 * config.num_warps)
    uncapped = config.max_registers or 256
    away = (math.log2(work) - 4) ** 2 + 0.5 * (math.log2(config.rows_per_program) - 1) ** 2 + (math.log2(uncapped) - 6.5) ** 2
    away += 0.3 * (math.log2(config.block / key.n * config.programs_per_row)) ** 2 + 0.1 * (config.num_stages - 1)
    return 20 * (1 + 0.03 * away + 0.5 * (config.variant == "tiled"))


def launches(asks):
    """How many timed launches some asks take: one a candidate and round."""
    return sum(len(ask.configs) * ask.rounds for ask in asks)


def drive(search: strategies.Search, time, seed: int, noise: float = 0.0, broken=()) -> tuple[strategies.Found, list[Ask]]:
    """Answers a search: a drift that all share, noise of each, and now and then a sample that something disturbs."""
    chance, asks = random.Random(seed), []
    try:
        ask = next(search)
        while True:
            asks.append(ask)
            drift = [1 + 0.1 * chance.random() for _ in range(ask.rounds)]
            answer = {
                config: [
                    time(config) * one * math.exp(chance.gauss(0, noise)) * (1.3 if noise and chance.random() < 0.02 else 1)
                    for one in drift
                ]
                for config in ask.configs
                if config not in broken
            }
            ask = search.send(answer)
    except StopIteration as stop:
        return stop.value, asks


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.op} {key.direction} {key.n}")
def test_it_finds_what_is_within_one_percent_of_the_best(key, seed):
    default, space = kernel_config.heuristic(key, "triton"), spaces.candidates(key, "triton", "full")
    seeds = spaces.seeds(key, "triton")
    search = strategies.local_race(default, seeds, space)
    found, asks = drive(search, lambda config: speed(key, config), seed, noise=0.003)
    best = min(speed(key, config) for config in space)
    assert speed(key, found.ranked[0]) <= 1.01 * best
    assert set(found.ranked) == set(found.ratios) <= {default, *space}
    assert all(ask.configs[0] == default and len(set(ask.configs)) == len(ask.configs) for ask in asks)
    assert {config for ask in asks for config in ask.configs} == set(found.ranked)
    # far fewer than all of them as often as it takes to tell them apart
    assert launches(asks) < 0.5 * 40 * len(space)


def test_what_the_best_left_behind_by_luck_is_timed_again_when_it_falls_back():
    """The default is disturbed in the first ask, so that all look 4 % better; the second best is not close to the best then."""
    default, best, other = resident(1, 4), resident(1, 2), resident(2, 2)
    search = strategies.local_race(default, [best, other], [default, best, other])
    times, asks = {default: 10.0, best: 8.0, other: 8.25}, []
    ask = next(search)
    with pytest.raises(StopIteration) as stopped:
        while True:
            asks.append(ask)
            disturbed = 1.04 if len(asks) == 1 else 1.0
            ask = search.send({one: [times[one] * (disturbed if one == default else 1.0)] * ask.rounds for one in ask.configs})
    assert asks[1].configs == (default, best) and asks[2].configs == (default, other)
    assert stopped.value.value.ranked[0] == best


def test_a_hint_is_a_seed_and_preferred_where_times_are_the_same():
    space = [resident(rows, warps) for rows in (1, 2, 4) for warps in (1, 2, 4, 8)]
    default, hint = resident(1, 4), resident(4, 8)
    found, asks = drive(
        strategies.local_race(default, [], space, [hint, resident(8, 8)], strategies.QUICK),
        lambda one: 20.0 if one == default else 10.0,
        0,
    )
    assert found.ranked[0] == hint and hint in asks[0].configs
    assert all(resident(8, 8) not in ask.configs for ask in asks)


def test_what_cannot_be_timed_is_not_asked_for_again_and_not_ranked():
    space = [resident(rows, warps) for rows in (1, 2, 4) for warps in (1, 2, 4, 8)]
    broken = {resident(2, 4), resident(4, 4)}
    found, asks = drive(
        strategies.local_race(space[0], space[:3], space), lambda one: 10.0 / one.rows_per_program, 0, 0.001, broken
    )
    asked = [config for ask in asks for config in ask.configs]
    assert not broken & set(found.ranked)
    assert all(asked.count(config) <= 1 for config in broken)
    assert found.ranked[0].rows_per_program == 4


def test_where_the_default_fails_there_is_nothing_to_compare_with():
    space = [resident(1, warps) for warps in (1, 2, 4)]
    for search in (strategies.local_race(space[0], space, space), strategies.sampled(space[0], space, 3)):
        with pytest.raises(strategies.DefaultFailed):
            drive(search, lambda one: 1.0, 0, broken=space[:1])


def test_where_there_is_only_the_default_it_is_asked_for_once():
    found, asks = drive(strategies.local_race(PLAIN, [PLAIN], [PLAIN]), lambda one: 1.0, 0)
    assert found.ranked == [PLAIN] and len(asks) == 1


def test_all_candidates_in_an_order():
    space = [resident(1, warps) for warps in (1, 2, 4, 8, 16)]
    found, asks = drive(strategies.sampled(space[0], space, 3, batch=2), lambda one: 1.0 / one.num_warps, 0)
    assert found.ranked == space[::-1]
    assert [ask.configs[0] for ask in asks] == [space[0]] * 3 and {ask.rounds for ask in asks} == {3}
    assert launches(asks) == 3 * (2 + 3 + 2)


def test_a_plan_of_no_refinements_asks_for_seeds_alone():
    space = [resident(rows, warps) for rows in (1, 2, 4) for warps in (1, 2, 4, 8)]
    plan = Plan(every_shape=False, refinements=0, doubts=0)
    _, asks = drive(strategies.local_race(space[0], space[5:7], space, plan=plan), lambda one: 1.0, 0)
    assert {config for ask in asks for config in ask.configs} == {space[0], *space[5:7]}
