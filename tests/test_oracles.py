"""The oracles judged on their own, with no kernel of ours in sight.

Whatever the other tests are measured against has to be right by other means: a certificate that needs no solution, a literal
transcription of the published loop, finite differences, autograd in float64, and relations that hold for any right answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from coordroute.reference import families
from coordroute.reference.certificate import certify
from coordroute.reference.oracles import (
    Array,
    coordinate_descent_numpy,
    coordinate_descent_torch,
    coordinate_descent_truth,
    eps_schedule,
    soft_topk_numpy,
    soft_topk_torch,
    soft_topk_truth,
)

NAMES = sorted(families.FAMILIES)
REGULAR = [name for name in NAMES if families.FAMILIES[name].regular]
# the budget of these rows is where lam or its gradient has a corner in k, or they have nothing to differentiate
CORNERED = ("k >= n", "k = 0")
# every score of these rows lies at the same few places: a kink of the derivative is the rule, not the exception
TIED = ("ties", "constant")
LENGTHS = (1, 2, 7, 33, 100)
UNIT = 2.0**-53

SCHEDULES = {
    "fixed": {"n_iters": 6, "eps": 0.3},
    "one": {"n_iters": 1, "eps": 0.3},
    "scaling": {"n_iters": 12, "eps": 0.1, "eps_init": 2.0, "eps_decay": 0.7},
    "init below": {"n_iters": 4, "eps": 0.5, "eps_init": 0.1, "eps_decay": 0.5},
    "growing": {"n_iters": 4, "eps": 0.2, "eps_init": 0.3, "eps_decay": 1.5},
}


def batch(name: str, n: int, rows: int = 4, seed: int = 0) -> tuple[Array, families.BoolArray, Array]:
    """Scores, what is valid, and budgets of a family."""
    rng = np.random.default_rng([seed, n, NAMES.index(name)])
    drawn = [families.FAMILIES[name].draw(rng, n) for _ in range(rows)]
    return np.stack([r.scores for r in drawn]), np.stack([r.valid for r in drawn]), np.array([r.k for r in drawn])


def published(s: torch.Tensor, k: torch.Tensor, n_iters: int, eps: float, eps_init: float | None = None, eps_decay: float = 1.0):
    """The loop of CoLT5-attention 0.9.0 ``coor_descent``, line by line, without its mask."""
    mask_value = -torch.finfo(s.dtype).max
    constant = torch.log(k.clamp(min=1e-20)).unsqueeze(-1)
    current_eps = max(eps_init if eps_init is not None else eps, eps)
    a = torch.zeros((*s.shape[:-1], 1), dtype=s.dtype)
    b = -s
    for _ in range(n_iters):
        sb = (s + b) / current_eps
        sb = sb.masked_fill(s == -torch.inf, mask_value)
        a = current_eps * (constant - sb.logsumexp(dim=-1, keepdim=True))
        b = -torch.relu(s + a)
        current_eps = max(current_eps * eps_decay, eps)
    return ((s + a + b) / current_eps).exp()


# --- the exact optimum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eps", [0.03, 1.0])
def test_the_exact_oracle_has_a_certificate(name: str, n: int, eps: float) -> None:
    s, valid, k = batch(name, n)
    lam, _ = soft_topk_numpy(s, k, eps, valid)
    nan = np.isnan(np.where(valid, s, 0.0)).any(axis=1)
    assert (np.isnan(lam).all(axis=1) == nan).all() and (np.isnan(lam).any(axis=1) == nan).all()
    found = certify(s, lam, k, eps, valid)
    # tau of a score of size |s| is rounded to |s| ulps, which lam sees divided by eps
    size = np.abs(np.where(valid & np.isfinite(s), s, 0.0)).max(axis=1, initial=0.0)
    limit = 64 * UNIT * (1.0 + size / eps)
    ok = ~nan
    assert (found.box[ok] == 0.0).all()
    assert (found.budget[ok] <= limit[ok] * np.maximum(1.0, np.minimum(k[ok], n))).all()
    assert (found.stationarity[ok] <= limit[ok]).all()
    assert (np.abs(found.duality_gap[ok]) <= n * limit[ok] / np.minimum(1.0, np.maximum(k[ok], 1e-2))).all()


@pytest.mark.parametrize("change", ["more", "moved", "scaled"])
def test_the_certificate_refuses_what_is_not_optimal(change: str) -> None:
    s, _, k = batch("normal", 33)
    lam, _ = soft_topk_numpy(s, k, 0.5)
    wrong = lam.copy()
    if change == "more":
        wrong *= 1.001
        wrong = np.minimum(wrong, 1.0)
        assert (certify(s, wrong, k, 0.5).budget > 1e-5).all()
    elif change == "moved":  # feasible, but mass went from one entry to another
        free = np.argsort(np.abs(lam - 0.5), axis=1)[:, :2]
        at = np.arange(len(s))
        wrong[at, free[:, 0]] += 1e-3
        wrong[at, free[:, 1]] -= 1e-3
        found = certify(s, wrong, k, 0.5)
        assert (found.budget < 1e-12).all() and (found.stationarity > 1e-4).all() and (found.duality_gap > 0).all()
    else:
        wrong[0] = -wrong[0]
        assert certify(s, wrong, k, 0.5).box[0] > 0.1


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_k_of_one_is_a_softmax(n: int) -> None:
    s, _, _ = batch("normal", n)
    for eps in (0.05, 1.0, 10.0):
        lam, _ = soft_topk_numpy(s, 1.0, eps)
        np.testing.assert_allclose(lam, torch.softmax(torch.from_numpy(s) / eps, -1).numpy(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", [name for name in REGULAR if name not in CORNERED])
def test_the_torch_version_is_the_numpy_oracle(name: str) -> None:
    s, valid, k = batch(name, 20)
    rng = np.random.default_rng(1)
    g = rng.standard_normal(s.shape)
    eps = rng.uniform(0.3, 1.0, len(s))
    truth = soft_topk_truth(s, k, eps, valid, g, UNIT)
    leaves = [torch.from_numpy(x).requires_grad_() for x in (s, k, eps)]
    lam = soft_topk_torch(leaves[0], leaves[1], eps=leaves[2], mask=torch.from_numpy(valid))
    size = np.abs(np.where(valid & np.isfinite(s), s, 0.0)).max(axis=1, initial=0.0)
    loose = 256 * UNIT * (1.0 + size / eps)  # tau is one float64 in the torch version
    assert (np.abs(lam.detach().numpy() - truth.lam).max(axis=1) <= loose).all()
    smooth = truth.slack_scores == 0
    assert smooth.any() or name in TIED
    found = [x.numpy() for x in torch.autograd.grad(lam, leaves, torch.from_numpy(g))]
    wanted = (truth.grad_scores, truth.grad_k, truth.grad_eps)
    for mine, other in zip(found, wanted, strict=True):
        off = np.abs(mine - other)
        off = off.max(axis=1) if off.ndim == 2 else off
        scale = 1.0 + np.abs(other).reshape(len(s), -1).max(axis=1)
        assert (off <= 20 * loose * scale * (1.0 + size / eps))[smooth].all()


def central(function: Callable[[Array], Array], x: Array, step: float) -> Array:
    """The derivative of a row function R^m -> R by central differences of fourth order, [m]."""
    out = np.zeros_like(x)
    for i in range(x.size):
        at = []
        for far in (-2, -1, 1, 2):
            moved = x.copy()
            moved.flat[i] += far * step
            at.append(float(function(moved)))
        out.flat[i] = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step)
    return out


@pytest.mark.parametrize("name", ["normal", "uniform", "cauchy", "bimodal gap", "k = 1", "fractional k", "tiny scale", "holes"])
@pytest.mark.parametrize("n", [2, 5, 12])
def test_the_exact_gradient_against_finite_differences(name: str, n: int) -> None:
    compared = 0
    for s, valid, k in zip(*batch(name, n, rows=6), strict=True):
        if not valid.any() or k >= valid.sum():
            continue
        g = np.random.default_rng(n).standard_normal(n)
        eps, step = 0.5, 1e-4
        truth = soft_topk_truth(s, k, eps, valid[None], g, 2.0**-13)  # so large a unit tells the neighbourhood of a kink
        if truth.slack_scores[0] > 0 or np.abs(s[valid] - truth.threshold[0]).min() < 20 * step:
            continue
        compared += 1

        def value(s: Array, k: float, eps: float, g: Array = g, valid: families.BoolArray = valid) -> float:
            return float((soft_topk_numpy(s, k, eps, valid[None])[0][0] * g)[valid].sum())

        def close(mine: Array, wanted: Array) -> None:
            np.testing.assert_allclose(mine, wanted, rtol=1e-8, atol=1e-8)

        close(truth.grad_scores[0], central(lambda x: value(x, k, eps), s, step))  # noqa: B023 - called at once
        close(truth.grad_k, central(lambda x: value(s, x[0], eps), np.array([k]), step))  # noqa: B023
        close(truth.grad_eps, central(lambda x: value(s, k, x[0]), np.array([eps]), step))  # noqa: B023
    assert compared >= 2


def jacobian(s: Array, k: float, eps: float) -> tuple[Array, Array]:
    """(dlam_i/ds_j [n, n], dlam/dk [n]) of one row, a unit gradient at a time."""
    n = s.size
    truth = soft_topk_truth(np.tile(s, (n, 1)), k, eps, None, np.eye(n))
    return truth.grad_scores, truth.grad_k


@pytest.mark.parametrize("name", [name for name in REGULAR if name not in CORNERED])
def test_the_jacobian(name: str) -> None:
    for s, valid, k in zip(*batch(name, 9), strict=True):
        s = s[valid]
        if s.size == 0 or k >= s.size:
            continue
        for eps in (0.1, 2.0):
            matrix, by_k = jacobian(s, k, eps)
            lam, _ = soft_topk_numpy(s, k, eps)
            scale = 1.0 / eps
            np.testing.assert_allclose(matrix, matrix.T, atol=1e-12 * scale)
            assert np.linalg.eigvalsh((matrix + matrix.T) / 2).min() >= -1e-12 * scale
            np.testing.assert_allclose(matrix.sum(axis=1), 0.0, atol=1e-12 * scale)  # a shift of the scores changes nothing
            free = (lam > 0) & (lam < 1)
            np.testing.assert_allclose(by_k.sum(), 1.0 if free.any() else 0.0, atol=1e-12)
            assert (by_k >= 0).all()


@pytest.mark.parametrize("name", REGULAR)
def test_relations_of_the_exact_oracle(name: str) -> None:
    s, valid, k = batch(name, 25)
    rng = np.random.default_rng(2)
    eps = 0.25
    lam, _ = soft_topk_numpy(s, k, eps, valid)
    size = np.abs(np.where(valid & np.isfinite(s), s, 0.0)).max(axis=1, initial=0.0)[:, None]
    near = 128 * UNIT * (1.0 + size / eps)

    def same(other: Array, wanted: Array = lam, extra: float | Array = 0.0) -> None:
        assert (np.abs(other - wanted) <= near + extra).all()

    same(soft_topk_numpy(s + 3.0, k, eps, valid)[0], extra=128 * UNIT * 3 / eps)
    same(soft_topk_numpy(4.0 * s, k, 4.0 * eps, valid)[0])
    order = rng.permutation(s.shape[1])
    same(soft_topk_numpy(s[:, order], k, eps, valid[:, order])[0], lam[:, order])
    tail = np.concatenate([s, np.full((len(s), 3), np.nan)], axis=1)
    longer = np.concatenate([valid, np.zeros((len(s), 3), bool)], axis=1)
    padded, _ = soft_topk_numpy(tail, k, eps, longer)
    same(padded[:, :-3])
    assert (padded[:, -3:] == 0).all()
    for i in range(len(s)):  # rows know nothing of each other
        same(soft_topk_numpy(s[i], k[i], eps, valid[i : i + 1])[0], lam[i : i + 1])
    more, _ = soft_topk_numpy(s, k + 0.5, eps, valid)
    assert (more >= lam - near).all()  # monotone in k
    higher = s.copy()
    higher[:, 0] += 0.5
    raised, _ = soft_topk_numpy(higher, k, eps, valid)
    assert (raised[:, 0] >= lam[:, 0] - near[:, 0]).all()  # and in the score itself
    assert (raised[:, 1:] <= lam[:, 1:] + near).all()  # at the others' cost


# --- coordinate descent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", REGULAR)
def test_coordinate_descent_is_the_published_loop(name: str, schedule: str) -> None:
    how = SCHEDULES[schedule]
    for n in (1, 2, 17):
        s, valid, k = batch(name, n)
        counted = valid.any(axis=1) & (k > 0)
        s, valid, k = s[counted], valid[counted], k[counted]
        if not len(s):
            continue
        clean = np.where(valid, s, -np.inf)
        lam, trace = coordinate_descent_numpy(s, k, mask=valid, **how)
        wanted = published(torch.from_numpy(clean), torch.from_numpy(k), **how).numpy()
        size = np.abs(np.where(valid, s, 0.0)).max(axis=1, initial=0.0)[:, None]
        near = 64 * UNIT * how["n_iters"] * (1.0 + size / how["eps"])
        assert (np.abs(lam - np.where(valid, wanted, 0.0)) <= near).all()
        assert trace.shape == (how["n_iters"], len(s))
        count = valid.sum(axis=1)
        first = eps_schedule(how["n_iters"], how["eps"], how.get("eps_init"), how.get("eps_decay", 1.0))[0]
        np.testing.assert_allclose(trace[0], first * np.log(k / count), atol=1e-13)  # whatever the scores are
        plain = coordinate_descent_torch(torch.from_numpy(clean), torch.from_numpy(k), mask=torch.from_numpy(valid), **how)
        assert (np.abs(lam - plain.numpy()) <= near).all()


def test_the_schedule() -> None:
    assert eps_schedule(3, 0.5, 4.0, 0.5) == [4.0, 2.0, 1.0, 0.5]
    assert eps_schedule(3, 0.75, 4.0, 0.5) == [4.0, 2.0, 1.0, 0.75]
    assert eps_schedule(2, 0.1, None, 1.0) == [0.1, 0.1, 0.1]
    assert eps_schedule(1, 0.1, 0.05, 0.5) == [0.1, 0.1]  # a first temperature below the last does not count


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", [name for name in REGULAR if name not in (*CORNERED, *TIED)])
def test_the_gradient_of_coordinate_descent_is_autograd_of_the_loop(name: str, schedule: str) -> None:
    how = SCHEDULES[schedule]
    s, valid, k = batch(name, 17, rows=6)
    g = np.random.default_rng(3).standard_normal(s.shape)
    truth = coordinate_descent_truth(s, k, mask=valid, g=g, unit=2.0**-40, **how)
    scores, budget = (torch.from_numpy(x).requires_grad_() for x in (np.where(valid, s, -np.inf), k))
    lam = coordinate_descent_torch(scores, budget, mask=torch.from_numpy(valid), **how)
    mine, by_k = (x.numpy() for x in torch.autograd.grad(lam, (scores, budget), torch.from_numpy(np.where(valid, g, 0.0))))
    size = np.abs(np.where(valid, s, 0.0)).max(axis=1, initial=0.0)
    near = 256 * UNIT * how["n_iters"] * (1.0 + size / how["eps"])
    smooth = truth.slack_scores == 0
    assert smooth.sum() >= 3
    wanted = np.where(valid, truth.grad_scores, 0.0)
    off = np.abs(np.where(valid, mine, 0.0) - wanted).max(axis=1)
    assert (off <= near * np.maximum(np.abs(g).sum(axis=1) / how["eps"], 1.0))[smooth].all()
    assert (np.abs(by_k - truth.grad_k) <= near * np.maximum(np.abs(g).sum(axis=1) / np.minimum(k, 1.0), 1.0))[smooth].all()


def test_the_gradient_of_coordinate_descent_against_finite_differences() -> None:
    compared, step = 0, 1e-4
    for s, _, k in zip(*batch("normal", 8, rows=8), strict=True):
        g = np.random.default_rng(4).standard_normal(8)
        how = {"n_iters": 5, "eps": 0.4, "eps_init": 1.5, "eps_decay": 0.6}
        _, trace = coordinate_descent_numpy(s, k, **how)
        if np.abs(s + trace).min() < 20 * step:  # a kink within reach
            continue
        compared += 1
        truth = coordinate_descent_truth(s, k, g=g, **how)
        by_s = central(lambda x: (coordinate_descent_numpy(x, k, **how)[0] * g).sum(), s, step)  # noqa: B023
        by_k = central(lambda x: (coordinate_descent_numpy(s, x, **how)[0] * g).sum(), np.array([k]), step)  # noqa: B023
        np.testing.assert_allclose(truth.grad_scores[0], by_s, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(truth.grad_k, by_k, rtol=1e-8, atol=1e-8)
    assert compared >= 3


@pytest.mark.parametrize("name", ["normal", "uniform", "bimodal gap", "k = 1", "holes", "fractional k"])
def test_coordinate_descent_converges_to_the_exact_solver(name: str) -> None:
    s, valid, k = batch(name, 30)
    eps = 0.25
    lam, _ = soft_topk_numpy(s, k, eps, valid)
    early, late = (np.abs(coordinate_descent_numpy(s, k, t, eps, 4.0, 0.7, valid)[0] - lam).max(initial=0.0) for t in (10, 3000))
    assert late <= 1e-9
    if name == "normal":
        assert early > 1e-3  # it is the iterations that do it


# --- odd input -------------------------------------------------------------------------------------------------------

ODD = np.array(
    [
        [0.5, np.nan, -1.0, 0.25],
        [0.5, np.inf, -1.0, 0.25],
        [0.5, -np.inf, -1.0, 0.25],
        [np.inf, np.inf, -1.0, 0.25],
        [-np.inf, -np.inf, -np.inf, -np.inf],
        [1.0, 2.0, 3.0, 4.0],
    ]
)


def both(s: Array, k: float | Array, mask: families.BoolArray | None = None):
    g = np.random.default_rng(5).standard_normal(np.shape(s))
    yield soft_topk_truth(s, k, 0.5, mask, g)
    yield coordinate_descent_truth(s, k, 30, 0.5, mask=mask, g=g)


def test_odd_scores() -> None:
    for truth in both(ODD, 1.5):
        lam, ds = truth.lam, truth.grad_scores
        assert np.isnan(lam[0]).all() and np.isnan(ds[0]).all() and np.isnan(truth.grad_k[0])
        assert np.isfinite(lam[1:]).all() and np.isfinite(ds[1:]).all() and np.isfinite(truth.grad_k[1:]).all()
        assert lam[1, 1] == 1.0 and ds[1, 1] == 0.0
        assert lam[2, 1] == 0.0 and ds[2, 1] == 0.0
        assert (lam[3, :2] == 1.0).all()
        assert (lam[4] == 0.0).all() and (ds[4] == 0.0).all() and truth.grad_k[4] == 0.0
    for short, long in zip(both(ODD[2:3, [0, 2, 3]], 1.5), both(ODD[2:3], 1.5), strict=True):
        np.testing.assert_allclose(short.lam[0], long.lam[0, [0, 2, 3]], rtol=1e-14)  # -inf is as if masked
    # the exact solver leaves what +inf takes to the others
    exact = next(both(ODD[1:2], 1.5)).lam[0]
    np.testing.assert_allclose(exact[[0, 2, 3]], soft_topk_numpy(ODD[1, [0, 2, 3]], 0.5, 0.5)[0][0], rtol=1e-13)


def test_masks_and_budgets_at_the_edge() -> None:
    s = np.tile(ODD[5], (5, 1))
    nothing = np.zeros(s.shape, bool)
    for truth in both(s, 2.0, nothing):
        assert (truth.lam == 0).all() and (truth.grad_scores == 0).all() and (truth.grad_k == 0).all()
    for truth in both(s, np.array([0.0, np.nan, 4.0, 7.0, 1.5])):
        assert (truth.lam[0] == 0).all() and (truth.grad_scores[0] == 0).all() and truth.grad_k[0] == 0
        assert np.isnan(truth.lam[1]).all() and np.isnan(truth.grad_k[1])
        assert np.isfinite(truth.lam[[0, 2, 3, 4]]).all()
    exact = next(both(s, np.array([0.0, 1.0, 4.0, 7.0, 1.5])))
    assert (exact.lam[2:4] == 1).all() and (exact.grad_scores[2:4] == 0).all() and (exact.grad_k[2:4] == 0).all()
    hidden = np.where(np.arange(4) < 2, s, np.nan)
    for truth in both(hidden, 1.0, np.arange(4)[None] < np.full((5, 1), 2)):
        assert np.isfinite(truth.lam).all() and (truth.lam[:, 2:] == 0).all() and (truth.grad_scores[:, 2:] == 0).all()


def test_no_entries_at_all() -> None:
    lam, tau = soft_topk_numpy(np.zeros((3, 0)), 1.0, 0.1)
    assert lam.shape == (3, 0) and tau.shape == (3,)
    lam, trace = coordinate_descent_numpy(np.zeros((3, 0)), 1.0, 4, 0.1)
    assert lam.shape == (3, 0) and trace.shape == (4, 3)
    assert math.isnan(soft_topk_numpy(np.array([np.nan]), 1.0, 0.1)[0][0, 0])
