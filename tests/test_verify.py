"""The verification suite finds what is wrong, passes what is right, and says it in code that reproduces it."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from coordroute import coordinate_descent, soft_topk
from coordroute.reference import compare, families, oracles, verify

OURS = {"soft_topk": soft_topk, "coordinate_descent": coordinate_descent}


def failing(target, op="soft_topk", examples=4, dtypes=("float32",)):
    report = verify.run({op: target}, device="cpu", examples=examples, seed=0, dtypes=dtypes, longest=300)
    assert report["ok"] == (not report["failures"])
    return {row["property"] for row in report["properties"] if row["verdict"] == "fail"}, report


def test_our_operators_hold_on_every_family_and_dtype():
    report = verify.run(OURS, device="cpu", examples=8, seed=0, longest=1025)
    assert report["failures"] == []
    assert report["ok"] and {row["verdict"] for row in report["properties"]} == {"pass"}
    assert {row["dtype"] for row in report["properties"]} == set(verify.DTYPES)
    checked = {(row["op"], row["property"]) for row in report["properties"]}
    assert checked == {(op, name) for name, (_, ops) in verify.PROPERTIES.items() for op in ops}
    json.dumps(report, allow_nan=False)


def test_the_same_seed_draws_the_same_cases():
    drawn = []

    def spy(scores, k, **rest):
        drawn.append(scores.detach().clone())
        return soft_topk(scores, k, **rest)

    for _ in range(2):
        verify.run({"soft_topk": spy}, device="cpu", examples=3, seed=5, dtypes=("float64",), longest=65)
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
    found, report = failing(lambda s, k, **rest: soft_topk(Backward.apply(s, 1 + 1e-5), k, **rest))
    assert found == {"grad scores"}
    assert report["failures"][0]["error"] > report["failures"][0]["bound"] > 0


def test_a_gradient_of_k_that_is_missing_a_factor():
    def target(s, k, **rest):
        k = Backward.apply(k, 0.999) if isinstance(k, torch.Tensor) else k
        return soft_topk(s, k, **rest)

    assert failing(target)[0] == {"grad k"}


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
    assert found == {"runs"} and "at most 30 tokens" in report["failures"][0]["message"]
    assert "1 row(s) of 31" in report["failures"][0]["message"]
    assert failing(lambda s, k, **rest: soft_topk(s, k, **rest).double())[0] == {"runs"}
    assert failing(lambda s, k, **rest: soft_topk(s.detach(), k, **rest))[0] == {"runs"}


def test_a_mask_that_is_ignored():
    found, report = failing(lambda s, k, *, mask=None, **rest: soft_topk(s, k, **rest))
    assert "values" in found
    assert all(one["family"] != "normal" or one["property"] == "masked tail" for one in report["failures"])


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


def test_bad_arguments():
    with pytest.raises(ValueError, match="examples is 0"):
        verify.run(OURS, examples=0)
    with pytest.raises(ValueError, match="'softmax'"):
        verify.run({"softmax": torch.softmax})
    with pytest.raises(ValueError, match="nothing"):
        verify.run({})


# --- the autotuner's proof -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", verify.KINDS)
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
    arguments = {"device": "cpu", "examples": 2, "seed": 1, "dtypes": ("float32", "float64"), "longest": 65}
    steps = []
    one = verify.run({"soft_topk": soft_topk}, workers=1, **arguments)
    two = verify.run({"soft_topk": soft_topk}, workers=2, where=where, progress=lambda *a: steps.append(a), **arguments)
    assert one.pop("seconds") >= 0 and two.pop("seconds") >= 0 and one == two
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
        where={"soft_topk": "deadly:soft_topk", "coordinate_descent": "coordroute:coordinate_descent"},
        workers=2,
    )
    failed = [(row["op"], row["property"]) for row in report["properties"] if row["verdict"] == "fail"]
    assert failed == [("soft_topk", "runs")] and not report["ok"]
    assert "exit status 7" in report["failures"][0]["message"]
