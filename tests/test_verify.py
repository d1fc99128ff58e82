"""The verification suite finds what is wrong, passes what is right, and says it in code that reproduces it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from dataclasses import replace

import hypothesis
import numpy as np
import pytest
import torch
from coordroute import cli, coordinate_descent, soft_topk
from coordroute.reference import cases, check, compare, families, oracles, properties, strategy, verify

OURS = {"soft_topk": soft_topk, "coordinate_descent": coordinate_descent}
FEW = ("plain", "any length", "masks", "tensors", "everything")


@pytest.fixture(autouse=True)
def little_time_to_shrink(monkeypatch):
    monkeypatch.setattr(verify, "SHRINK_SECONDS_IN_ALL", 3.0)


def failing(target, op="soft_topk", examples=128, dtypes=("float32",), facets=FEW):
    report = verify.run({op: target}, device="cpu", examples=examples, seed=0, dtypes=dtypes, longest=130, facets=facets)
    assert report["ok"] == (not report["failures"])
    return {row["property"] for row in report["properties"] if row["verdict"] == "fail"}, report


def facets_of(report, name):
    return next(row["failing_facets"] for row in report["properties"] if row["property"] == name)


@pytest.mark.parametrize("dtype", verify.DTYPES)
def test_our_operators_hold_on_every_facet(dtype):
    # how it runs does not hang on the dtype, and takes a while to compile
    skipped = {"variants", "long rows"} | (set() if dtype in ("float32", "float64") else {"execution"})
    names = tuple(name for name in verify.SENTENCES if name not in skipped)
    report = verify.run(OURS, device="cpu", examples=16, seed=0, dtypes=(dtype,), longest=130, facets=names)
    assert report["failures"] == [] and report["ok"]
    verdicts = {(row["op"], row["property"]): row["verdict"] for row in report["properties"]}
    assert set(verdicts) == {(op, name) for name, one in verify.PROPERTIES.items() for op in OURS if op in one.kinds}
    idle = {name for (_, name), verdict in verdicts.items() if verdict == "not run"}
    elsewhere = {"side stream", "CUDA graph", "variants"}  # a GPU's, and the last is the test below
    elsewhere |= {"gradcheck"} if dtype != "float64" else set()
    assert idle == (set(properties.EXECUTION) if "execution" in skipped else elsewhere)
    assert {row["facet"] for row in report["facets"]} == set(names)
    json.dumps(report, allow_nan=False)


def test_every_launch_of_a_search_space_agrees():
    report = verify.run(
        {"soft_topk": soft_topk},
        device="cpu",
        examples=1,
        dtypes=("float32",),
        facets=("variants",),
        variants="coordroute.autotune.variants:variants",
    )
    (row,) = (row for row in report["properties"] if row["property"] == "variants")
    assert row["verdict"] == "pass" and row["cases"] > 500, report["failures"]


def test_errors_are_told_in_ulps_beside_those_of_plain_torch():
    _, report = failing(soft_topk, examples=192, facets=("everything",))
    found = {row["quantity"]: row for row in report["distributions"]}
    assert set(found) == {"values", "grad scores", "grad k", "grad eps"}
    for who in ("ours", "plain"):
        one = found["values"][who]
        assert 0 < one["p50"] <= one["p99.9"] <= one["max"]
        assert sum(count for _, count in one["histogram"]) == found["values"]["rows"] > 32
    assert properties.ulps(np.array([2.0**-23]), np.array([1.0]), torch.float32)[0] == 1.0


def test_the_same_seed_draws_the_same_cases():
    drawn = []

    def spy(scores, k, **rest):
        drawn.append(scores.detach().clone())
        return soft_topk(scores, k, **rest)

    for _ in range(2):
        arguments = {"dtypes": ("float64",), "longest": 65, "facets": ("plain", "everything")}
        verify.run({"soft_topk": spy}, device="cpu", examples=3, seed=5, **arguments)
    half = len(drawn) // 2
    assert half > 10
    for one, two in zip(drawn[:half], drawn[half:], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


# --- what is wrong is found ------------------------------------------------------------------------------------------


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def test_values_that_are_off_by_a_few_parts_in_a_million():
    found, _ = failing(lambda s, k, **rest: soft_topk(s, k, **rest) * (1 - 3e-6))
    assert "values" in found and "budget" in found and "box" not in found


def test_gradients_that_are_off():
    found, report = failing(lambda s, k, **rest: soft_topk(Backward.apply(s, 1 + 1e-4), k, **rest))
    assert {"grad scores", "Euler"} <= found and not {"values", "grad k", "budget"} & found
    assert report["failures"][0]["error"] > report["failures"][0]["bound"] > 0


def test_a_gradient_of_k_that_is_missing_a_factor():
    def target(s, k, **rest):
        k = Backward.apply(k, 0.999) if isinstance(k, torch.Tensor) else k
        return soft_topk(s, k, **rest)

    assert failing(target)[0] == {"grad k", "a constant g"}


def test_iterations_that_have_not_converged_are_not_the_optimum():
    def target(s, k, *, eps, mask=None):
        if isinstance(eps, torch.Tensor):
            return soft_topk(s, k, eps=eps, mask=mask)
        return coordinate_descent(s, k, n_iters=20, eps=eps, eps_init=4.0, eps_decay=0.7, mask=mask)

    assert {"values", "budget"} <= failing(target)[0]


def test_a_store_that_runs_into_the_next_row():
    """What the published kernel does at lengths that are no power of two."""

    def target(s, k, **rest):
        lam = soft_topk(s, k, **rest)
        if s.shape[1] % 2:
            lam = lam.clone()
            lam[1:, 0] = lam[:-1, -1].clone()
        return lam

    found, report = failing(target)
    assert {"values", "row alone"} <= found
    smallest = next(one for one in report["failures"] if one["property"] == "values")
    assert "2 row(s)" in smallest["message"]
    assert "any length" in facets_of(report, "values") and "plain" not in facets_of(report, "values")


def test_inputs_that_are_written_to_and_results_that_differ_from_call_to_call():
    def writes(s, k, **rest):
        lam = soft_topk(s, k, **rest)
        s.data.mul_(1.5)  # behind autograd's back
        return lam

    found, _ = failing(writes)
    assert "inputs untouched" in found
    calls = iter(range(10**9))
    found, _ = failing(lambda s, k, **rest: soft_topk(s, k, **rest) * (1 - 2**-23 * (next(calls) % 2)))
    assert "replays bitwise" in found


def test_an_operator_that_raises_or_returns_something_else():
    def raises(s, k, **rest):
        if s.shape[1] > 30:
            raise RuntimeError("at most 30 tokens")
        return soft_topk(s, k, **rest)

    found, report = failing(raises)
    message = next(one["message"] for one in report["failures"] if one["property"] == "runs")
    assert "runs" in found and "at most 30 tokens" in message
    assert "1 row(s) of 31" in message or "1 row(s) of 32" in message or "1 row(s) of 33" in message
    assert failing(lambda s, k, **rest: soft_topk(s, k, **rest).double())[0] == {"runs"}
    assert failing(lambda s, k, **rest: soft_topk(s.detach(), k, **rest))[0] == {"runs"}


def test_a_mask_that_is_ignored():
    found, report = failing(lambda s, k, *, mask=None, **rest: soft_topk(s, k, **rest))
    assert "values" in found
    assert facets_of(report, "values") == ["masks", "everything"]


def test_iterations_of_coordinate_descent_that_are_one_too_few():
    def target(s, k, *, n_iters, **rest):
        return coordinate_descent(s, k, n_iters=max(n_iters - 1, 1), **rest)

    assert {"values", "grad scores"} <= failing(target, "coordinate_descent")[0]


def test_the_reproducer_reproduces():
    """It is run as it is printed."""
    _, report = failing(wrong_everywhere)
    assert report["failures"]
    for failure in report["failures"]:
        lines = failure["reproducer"].splitlines()
        assert lines[0] == "from coordroute import soft_topk"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("\n".join(lines[1:]), {"soft_topk": wrong_everywhere})
        assert f"{failure['property']}: FAILS" in printed.getvalue()


def wrong_everywhere(s, k, **rest):
    return soft_topk(s, k, **rest) * (1 - 1e-4)


def test_the_command_line_knows_the_same_kinds_and_dtypes():
    """It has them by heart, since its help must not wait for torch."""
    assert cli.KINDS == verify.KINDS and set(cli.DTYPES) == set(verify.DTYPES)


def test_bad_arguments():
    with pytest.raises(ValueError, match="examples is 0"):
        verify.run(OURS, examples=0)
    with pytest.raises(ValueError, match="'softmax'"):
        verify.run({"softmax": torch.softmax})
    with pytest.raises(ValueError, match="nothing"):
        verify.run({})


# --- more that is wrong, one property or facet each ------------------------------------------------------------------


def caught(target, op="soft_topk", dtype="float32", only=None, **changes):
    """The properties that fail on one batch of regular rows."""
    rows = tuple(("normal" if seed % 2 else "uniform", seed) for seed in range(6))
    case = verify.Case(op, dtype, 128, rows, **({"tensor_eps": op == "soft_topk"} | changes))
    return {one.name for one in verify.examine(target, case, only=only) if not one.holds}


def test_a_write_to_a_guard_band_is_seen():
    trial = properties.Trial(soft_topk, verify.Case("soft_topk", n=16), torch.device("cpu"), None)
    trial.first.guards[0].view(-1)[3] = 0.0
    (finding,) = properties.PROPERTIES["guard bands"].measure(trial)
    assert not finding.holds and finding.error[0] == 1


def test_a_write_beside_a_view_is_seen():
    def target(s, k, **rest):
        torch.as_strided(s.detach(), (1,), (1,), s.storage_offset() - 1).fill_(0.0)
        return soft_topk(s, k, **rest)

    assert caught(target) == {"inputs untouched"}


def test_weights_out_of_order():
    def target(s, k, **rest):
        lam = soft_topk(s * 0.0, k, **rest)  # equal scores
        return torch.where(torch.arange(s.shape[1]) == 7, lam * (1 - 1e-4), lam)

    assert "order" in caught(target)


def test_gradients_of_nothing_and_of_sums():
    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad + 1e-3

    assert {"g = 0", "linear in g"} <= caught(lambda s, k, **rest: soft_topk(Constant.apply(s), k, **rest))

    class Root(Constant):
        @staticmethod
        def backward(ctx, grad):
            return grad.sign() * grad.abs().sqrt()

    found = caught(lambda s, k, **rest: soft_topk(Root.apply(s), k, **rest))
    assert {"linear in g", "symmetric Jacobian"} <= found and "g = 0" not in found


def test_properties_that_need_no_oracle_see_another_objective():
    """A plain softmax times k keeps the order, but leaves the box and ignores the mask; scores bent first see a shift."""
    found = caught(lambda s, k, *, eps, mask=None: torch.softmax(s / _column(eps), -1) * _column(k))
    assert {"values", "box", "masked tail"} <= found and not {"order", "scale", "runs"} & found
    found = caught(lambda s, k, *, eps, mask=None: soft_topk(s * s.abs(), k, eps=eps, mask=mask))
    assert {"shift", "scale", "stationarity"} <= found


def _column(value):
    return value[:, None] if isinstance(value, torch.Tensor) else value


def test_a_relaxed_topk_is_judged_by_its_own_float64_run():
    def sparse(s, k):  # projection onto the box with a budget: budget-sparsemax, by bisection
        lo = (s.amin(-1, keepdim=True) - 1).detach()
        hi = s.amax(-1, keepdim=True).detach()
        k = _column(k)
        for _ in range(80):
            middle = (lo + hi) / 2
            more = (s.detach() - middle).clamp(0, 1).sum(-1, keepdim=True) > k
            lo, hi = torch.where(more, middle, lo), torch.where(more, hi, middle)
        above, inside = (s - lo >= 1).detach(), ((s - lo > 0) & (s - lo < 1)).detach()
        left = k - above.sum(-1, keepdim=True)
        tau = (torch.where(inside, s, 0.0).sum(-1, keepdim=True) - left) / inside.sum(-1, keepdim=True)
        return (s - tau).clamp(0, 1)

    assert caught(sparse, "relaxed_topk", "float64") == set() == caught(sparse, "relaxed_topk")
    assert "budget" in caught(lambda s, k: sparse(s, k) * 0.999, "relaxed_topk")
    assert "shift" in caught(lambda s, k: sparse(s.to(torch.bfloat16).to(s.dtype), k), "relaxed_topk")


def test_what_an_implementation_does_not_take_is_not_run():
    def plain(scores, k, *, n_iters, eps, eps_init, eps_decay):
        return coordinate_descent(scores, k, n_iters=n_iters, eps=eps, eps_init=eps_init, eps_decay=eps_decay)

    _, report = failing(plain, "coordinate_descent", facets=("plain", "masks", "segments"))
    reasons = {row["facet"]: row["reason"] for row in report["facets"]}
    assert report["ok"] and "without a mask" in reasons["masks"] and "checkpoint_segments" in reasons["segments"]


def test_segments_that_are_wrong_are_told_apart():
    class Wrong(Backward):
        pass

    def target(s, k, *, checkpoint_segments=None, **rest):
        s = Wrong.apply(s, 1.01) if checkpoint_segments not in (None, 1) else s
        return coordinate_descent(s, k, checkpoint_segments=checkpoint_segments, **rest)

    found, report = failing(target, "coordinate_descent", facets=("plain", "segments"))
    assert "grad scores" in found and facets_of(report, "grad scores") == ["segments"]


def test_gradcheck_and_opcheck_fail_where_they_should():
    assert "gradcheck" in caught(
        lambda s, k, **rest: soft_topk(Backward.apply(s, 1.1), k, **rest), dtype="float64", only=("gradcheck",)
    )
    name = "coordroute_test::identity"
    torch.library.define(name, "(Tensor x) -> Tensor")
    torch.library.impl(name, "CompositeExplicitAutograd", lambda x: x)  # aliases its input, and has no fake
    found = caught(
        lambda s, k, **rest: soft_topk(s, k, **rest) + torch.ops.coordroute_test.identity(s.detach()) * 0, only=("opcheck",)
    )
    assert found == {"opcheck"}


# --- what fuzzing found: kernels that were off, and bounds or certificates that were ---------------------------------

FOUND = [
    # equal weights, added in one direction: the CPU's compiled variant
    verify.Case("soft_topk", n=4093, rows=(("constant", 4),)),
    # a whole number of entries saturated and a gap behind them: dk, and what rounding leaves of the budget
    verify.Case("soft_topk", n=512, rows=(("k = n - 1", 386),), eps=1e-6, tensor_eps=True, grad="transposed"),
    verify.Case("soft_topk", "float64", 128, (("k near the valid", 641),), eps=1e-3, tensor_eps=True, grad="one-hot"),
    verify.Case("soft_topk", "float64", 2, (("k = n - 1", 5883),), eps=0.03, tensor_eps=True),
    # gradients that float16 cannot hold
    verify.Case("soft_topk", "float16", 512, (("ties", 0), ("ties", 1)), eps=1e-6),
    # weights below the normal range, in a one-hot gradient
    verify.Case(
        "coordinate_descent", "bfloat16", 16, tuple(("normal", seed) for seed in range(8)), **cases.PUBLISHED, grad="one-hot"
    ),
    # no budget, and an infinite score
    verify.Case("soft_topk", n=2, rows=(("k = 0", 1909), ("infinite", 1)), eps=0.5, tensor_k=False),
    # the certificate's own sums
    verify.Case("soft_topk", "float64", 127, (("constant", 536),), eps=0.03, tensor_k=False),
    # far below the threshold: the argument of exp rounds three times
    verify.Case("soft_topk", "float16", 2, (("bimodal gap", 2103),), tensor_eps=True, grad="one-hot"),
    verify.Case("soft_topk", n=8, rows=(("k = 1", 26718),), eps=0.03, tensor_eps=True),
    verify.Case("soft_topk", n=5, rows=(("fractional k", 51378),), eps=0.03, tensor_eps=True),
]


@pytest.mark.parametrize("case", FOUND, ids=lambda case: f"{case.op} {case.dtype} {case.n} {case.rows[0][0]}")
def test_what_fuzzing_found_stays_found(case):
    check(OURS[case.op], case)


@pytest.fixture
def flushed():
    """Arithmetic in which results below the normal range are 0, as on a GPU."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush what is below the normal range")
    yield
    torch.set_flush_denormal(False)


UNDERFLOWING = verify.Case("coordinate_descent", "float16", 32, (("infinite", 4867),), **cases.PUBLISHED, grad="one-hot")
"""One weight has a gradient. It is a normal number, and beside the highest threshold at the last eps its exponential is not."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in Triton's interpreter where there is no GPU")
def test_what_a_gpu_flushes_to_0_is_no_fault(flushed):
    properties.judge.cache_clear()
    found = {one.name: one for one in properties.examine(functools.partial(coordinate_descent, impl="triton"), UNDERFLOWING)}
    assert all(one.holds for one in found.values())
    tiny = torch.finfo(torch.float32).tiny
    assert 100 * tiny < found["grad k"].error[0] < found["grad k"].bound[0], "there is something to allow for"


LITTLE_LEFT = verify.Case("soft_topk", n=32, rows=(("fractional k", 2),), eps=0.03, tensor_eps=True, grad="one-hot")
"""One weight has a gradient, and is no normal number. The gradient of k is that over the 0.001 that a saturated entry leaves."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in Triton's interpreter where there is no GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_weight_that_is_flushed_may_be_missing_of_what_a_saturated_entry_leaves(dtype, request):
    case = replace(LITTLE_LEFT, dtype=dtype)
    properties.judge.cache_clear()
    properties.judge(case)  # on a GPU it is not flushed, what the yardstick computes
    request.getfixturevalue("flushed")
    found = {one.name: one for one in properties.examine(functools.partial(soft_topk, impl="triton"), case)}
    assert all(one.holds for one in found.values())
    tiny = torch.finfo(torch.float32).tiny
    assert 100 * tiny < found["grad k"].error[0] < found["grad k"].bound[0] < 1e4 * tiny, "there is something to allow for"


def test_the_floor_of_the_exact_solver_grows_as_less_is_left_of_k():
    inputs = cases.draw(LITTLE_LEFT)
    truth, tiny = properties.truth_of(LITTLE_LEFT, inputs), torch.finfo(torch.float32).tiny
    assert truth.mass[0] == pytest.approx(inputs.k[0] - 1) and inputs.k[0] == pytest.approx(1.001)
    floor = properties._underflow(LITTLE_LEFT, inputs, truth, torch.float32)
    # the one entry with a gradient, of 1: its weight, the product and the sum
    assert floor["grad k"][0] == pytest.approx(3 * tiny / truth.mass[0], rel=0.01)
    assert 0 < floor["grad scores"][0] < 1e-34 and floor["grad scores"][0] < floor["grad eps"][0] < 1e-32
    more = properties._underflow(LITTLE_LEFT, inputs, replace(truth, mass=np.ones(1)), torch.float32)
    assert more["grad k"][0] < 0.01 * floor["grad k"][0]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_row_has_a_mass_that_can_be_told_from_0(name):
    case = verify.Case("soft_topk", n=16, rows=((name, 1), (name, 2)), eps=1e-3)
    mass = properties.truth_of(case, cases.draw(case)).mass
    assert (mass >= 2.0**-24).all() and (np.isinf(mass) | (mass <= 16 * (1 + 1e-12))).all()


def test_the_floor_of_a_gradient_is_tiny_and_grows_with_the_reach():
    inputs = cases.draw(UNDERFLOWING)
    truth, tiny = properties.truth_of(UNDERFLOWING, inputs), torch.finfo(torch.float32).tiny
    _, trace = oracles.coordinate_descent_numpy(inputs.s, inputs.k, mask=inputs.valid, eps=0.03, **UNDERFLOWING.schedule())
    schedule = oracles.eps_schedule(20, 0.03, 4.0, 0.7)
    tail = [a_t[0] for a_t, e in zip(trace, schedule[1:], strict=True) if e == 0.03]
    assert truth.reach[0] == pytest.approx(np.exp((max(tail) - min(tail)) / 0.03)) and 10 < truth.reach[0] < oracles.MOST_REACH
    floor = properties._underflow(UNDERFLOWING, inputs, truth, torch.float32)
    # the one entry with a gradient, of 1, loses tiny times the reach, which every iteration may hand on to log k
    lost = tiny * truth.reach[0] / 0.03 * sum(schedule[:-1]) / inputs.k[0]
    assert lost < floor["grad k"][0] < 4 * lost and 0 < floor["grad scores"][0] < 1e-32
    level = properties._underflow(UNDERFLOWING, inputs, replace(truth, reach=np.ones(1)), torch.float32)
    assert all(level[name][0] < floor[name][0] for name in ("grad k", "grad scores"))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_row_has_a_reach(name):
    case = verify.Case("coordinate_descent", n=16, rows=((name, 1), (name, 2)), **(cases.PUBLISHED | {"eps": 1e-6}))
    reach = properties.truth_of(case, cases.draw(case)).reach
    assert (reach >= 1).all() and (reach <= oracles.MOST_REACH * (1 + 1e-9)).all()


# --- tests of one's own ----------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(strategy("soft_topk", longest=65))
def test_the_strategy_and_the_comparison_make_a_test(case):
    assert case.n <= 65
    check(soft_topk, case, only=properties.ALWAYS)


def test_a_check_that_fails_says_what_and_on_what():
    case = verify.Case("soft_topk", n=10, rows=(("normal", 3),))
    with pytest.raises(AssertionError, match=r"budget: FAILS.*sum lam = k.*Case\(op='soft_topk'"):
        check(wrong_everywhere, case, only=("budget",))


def test_a_facet_has_the_lengths_it_says():
    with pytest.raises(ValueError, match="no rows of at most 100"):
        strategy("soft_topk", longest=100, facet="long rows")


@pytest.mark.parametrize("name", [name for name, facet in cases.FACETS.items() if facet.length != "long"])
def test_a_strategy_holds_to_its_facet(name):
    facet = cases.FACETS[name]
    if all(families.FAMILIES[family].masked for family in facet.families):
        with pytest.raises(ValueError, match="without a mask"):
            strategy("coordinate_descent", longest=100, facet=name, masks=False)
        return

    @hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
    @hypothesis.given(strategy("coordinate_descent", longest=100, facet=name, masks=False))
    def holds(case):
        assert not any(families.FAMILIES[family].masked for family, _ in case.rows)
        assert case.layout in facet.layouts and case.grad in facet.grads
        assert case.segments is None or facet.segments != (None,)

    holds()


# --- the autotuner's proof -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OURS)
def test_a_candidate_is_proved_with_figures_and_a_wrong_one_with_a_reason(op):
    proof = verify.check_candidate(OURS[op], op, device="cpu", dtype=torch.float32, n=100, seed=3)
    assert proof["ok"] and proof["reason"] == "" and proof["replays_bitwise"] and proof["seed"] == 3
    assert proof["cases"] == 2 * len(families.FAMILIES) and set(proof["families"]) == set(families.FAMILIES)
    for name in ("value", "grad_scores", "grad_k"):
        assert 0 <= proof["max_error"][name] <= proof["bound"][name]

    def off(s, k, **rest):
        return OURS[op](Backward.apply(s, 1.001), k, **rest)

    proof = verify.check_candidate(off, op, device="cpu", dtype=torch.float32, n=100, seed=3)
    assert not proof["ok"] and "grad scores" in proof["reason"]


@pytest.mark.parametrize(("n", "most"), [(1 << 20, 1), (1 << 17, 4), (1 << 17, None), (1 << 15, 4), (64, 64)])
def test_the_batches_of_a_proof_are_as_many_rows_as_may_be_and_each_has_a_mask_where_it_should(n, most):
    cases = verify.proof_cases("soft_topk", "float32", n, 0, most)
    assert [case.tensor_k for case in cases] == sorted(case.tensor_k for case in cases)
    for bare in (True, False):
        batches = [case for case in cases if case.tensor_k != bare]
        assert sum(len(case.rows) for case in batches) >= max(2, min(len(families.FAMILIES), (1 << 20) // n))
        for case in batches:
            assert len(case.rows) <= (most or 64) and case.n == (n if bare else n - 3)
            assert any(families.FAMILIES[name].masked for name, _ in case.rows) != bare
    if n <= 1 << 15:
        assert {name for case in cases for name, _ in case.rows} == set(families.FAMILIES)


def test_long_rows_are_proved_too():
    """At great lengths scores near a kink are the rule; they widen the bound by what they carry and leave nothing out."""
    case = verify.proof_cases("coordinate_descent", "float32", 65536, 0)[0]
    case = replace(case, rows=case.rows[:3])
    findings = {one.name: one for one in verify.examine(coordinate_descent, case)}
    assert findings["grad scores"].holds and not findings["grad scores"].left_out.any()


# --- rules and families ----------------------------------------------------------------------------------------------


def test_errors_and_bounds():
    truth = np.array([[1.0, 2.0], [np.nan, np.nan]])
    assert compare.row_errors(np.array([[1.0, 2.5], [np.nan, np.nan]]), truth).tolist() == [0.5, 0.0]
    assert compare.row_errors(np.array([[1.0, np.nan], [np.nan, 0.0]]), truth).tolist() == [np.inf, np.inf]
    floor, stored = np.array([4.0]), np.array([0.0])
    for dtype, unit in ((torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-24), (torch.float64, 2.0**-52)):
        assert compare.bound(np.array([np.nan]), floor, stored, dtype)[0] == 4.0 * unit
    assert compare.storage_floor(np.array([[1.0]]), torch.bfloat16)[0] == 2.0**-8


@pytest.mark.parametrize("layout", families.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4, 8)])
def test_layouts_hold_the_same_values(layout, shape):
    values = torch.randn(shape)
    found = families.laid_out(values, layout)
    assert torch.equal(found, values)
    assert layout == "contiguous" or shape == (1, 1) or not found.is_contiguous()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_families_draw_rows_of_any_length(name):
    family = families.FAMILIES[name]
    for n in (1, 2, 3, 100):
        row = family.draw(np.random.default_rng(0), n)
        again = family.draw(np.random.default_rng(0), n)
        assert row.scores.shape == row.valid.shape == (n,) and row.k >= 0
        assert np.array_equal(row.scores, again.scores, equal_nan=True) and row.k == again.k
        if family.regular:
            assert np.isfinite(row.scores[row.valid]).all()


def test_a_kink_widens_the_bound_by_the_jump():
    """Two scores at the threshold exactly: their gradient is what it is with them saturated, or without."""
    s = np.array([[2.0, 1.0, 0.0, -1.0, 1.5]])
    for _ in range(200):  # moving the score moves tau, so until both stand still
        _, tau = oracles.soft_topk_numpy(s, 2.0, 0.5)
        s[0, 4] = tau[0]
    g = np.array([[0.3, -1.0, 2.0, 0.5, 1.7]])
    kinked = oracles.soft_topk_truth(s, 2.0, 0.5, g=g)
    assert kinked.slack_scores[0] > 0
    results = []
    for shift in (-1e-5, 1e-5):
        moved = s.copy()
        moved[0, 4] += shift
        plain = oracles.soft_topk_truth(moved, 2.0, 0.5, g=g)
        assert plain.slack_scores[0] == 0
        results.append(plain.grad_scores)
    jump = float(np.linalg.norm(results[0] - results[1]))
    assert jump > 0.1
    for result in results:
        assert np.linalg.norm(result - kinked.grad_scores) <= kinked.slack_scores[0] + 1e-3


# --- processes -------------------------------------------------------------------------------------------------------


def test_processes_find_what_one_finds():
    where = {"soft_topk": "coordroute:soft_topk"}
    facets = ("plain", "everything")
    arguments = {"device": "cpu", "examples": 2, "seed": 1, "dtypes": ("float32", "float64"), "longest": 65, "facets": facets}
    steps = []
    one = verify.run({"soft_topk": soft_topk}, workers=1, **arguments)
    two = verify.run({"soft_topk": soft_topk}, workers=2, where=where, progress=lambda *a: steps.append(a), **arguments)
    for report in (one, two):
        assert report.pop("seconds") >= 0
        for row in report["facets"]:
            assert row.pop("seconds") >= 0 and row.pop("known_after") >= 0
    for report in (one, two):
        # hypothesis also draws from the constants of the modules that are loaded, which differ from process to process
        for row in report["properties"]:
            del row["worst_error"], row["bound"], row["worst_ratio"], row["worst_family"], row["cases"]
        del report["distributions"]
    assert one == two
    assert [step[1] for step in steps] == sorted(step[1] for step in steps) and steps[-1][1] == steps[-1][0]


def test_a_process_that_dies_fails_its_own_part(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os\ndef soft_topk(*a, **k): os._exit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    report = verify.run(
        {"soft_topk": soft_topk, "coordinate_descent": coordinate_descent},
        device="cpu",
        examples=1,
        dtypes=("float32",),
        longest=9,
        facets=("plain",),
        where={"soft_topk": "deadly:soft_topk", "coordinate_descent": "coordroute:coordinate_descent"},
        workers=2,
    )
    failed = [(row["op"], row["property"]) for row in report["properties"] if row["verdict"] == "fail"]
    assert failed == [("soft_topk", "runs")] and not report["ok"]
    assert "exit status 7" in report["failures"][0]["message"]


def test_a_process_that_hangs_fails_its_own_part(tmp_path, monkeypatch):
    (tmp_path / "sleepy.py").write_text("import time\ndef soft_topk(*a, **k): time.sleep(3600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(verify, "HANG_SECONDS", 15.0)
    report = verify.run(
        {"soft_topk": soft_topk},
        device="cpu",
        examples=1,
        dtypes=("float32",),
        longest=9,
        facets=("plain",),
        where={"soft_topk": "sleepy:soft_topk"},
        workers=2,
    )
    assert not report["ok"] and "it hangs" in report["failures"][0]["message"]


def test_a_gpu_that_is_left_in_an_error_fails_the_part(monkeypatch):
    """Also where every result was right: the error may come of a launch that nobody has waited for."""

    def broken(device):
        raise verify._Broken("the GPU was left in an error: illegal access")

    monkeypatch.setattr(verify, "_check_context", broken)
    report = verify.run(
        {"soft_topk": soft_topk},
        device="cpu",
        dtypes=("float32",),
        facets=("variants",),
        variants="coordroute.autotune.variants:variants",
    )
    assert not report["ok"]
    (failure,) = (one for one in report["failures"] if one["property"] == "runs")
    assert "illegal access" in failure["message"]


def test_what_there_is_no_time_for_is_said():
    report = verify.run(
        {"soft_topk": soft_topk}, device="cpu", dtypes=("float32",), facets=("plain", "ties", "masks"), seconds=1e-9
    )
    reasons = {row["facet"]: row["reason"] for row in report["facets"]}
    assert reasons["masks"] == "there was no time left for all of it" and report["failures"] == []
