"""The torch backend's raw functions, against oracles written here in float64 and those of coordroute.reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from coordroute.kernels import cpu
from coordroute.kernels.config import LaunchConfig
from coordroute.reference import oracles

EAGER = LaunchConfig("eager", rows_per_program=4)
DTYPES = (torch.float32, torch.float64)
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def exact(scores, k, eps):
    """(lam, tau, kink), float64; lam is differentiable in scores, k and eps through the closed form on the right
    saturated set."""
    lams, taus, kinks = [], [], []
    for row in range(scores.shape[0]):
        top = scores[row].detach().max()
        s, budget, temperature = scores[row] - top, k[row], eps[row]
        order = s.detach().sort(descending=True).values
        fixed = temperature.detach()
        # the smallest number of saturated entries that leaves the next one below 1 (it is monotone: binary search)
        above, last = 0, math.ceil(float(budget.detach())) - 1
        while above < last:
            middle = (above + last) // 2
            tau = fixed * (torch.logsumexp(order[middle:] / fixed, 0) - torch.log(budget.detach() - middle))
            above, last = (above, middle) if tau > order[middle] else (middle + 1, last)
        saturated = s >= order[above - 1] if above else torch.zeros_like(s, dtype=torch.bool)
        inside = ~saturated
        # centred where it matters, or s/eps would round
        centre = order[above]
        s = s - centre
        level = temperature * (torch.logsumexp(s[inside] / temperature, 0) - torch.log(budget - above))
        logs = torch.where(inside, (s - level) / temperature, 0.0)
        lams.append(torch.where(inside, torch.exp(logs), 1.0))
        taus.append(level.detach() + centre + top)
        kinks.append(bool((((s - level) / temperature).detach().abs() < 1e-5).any()))
    return torch.stack(lams), torch.stack(taus), torch.tensor(kinks)


def published(scores, k, n_iters, eps, eps_init, eps_decay, mask=None):
    """The published recurrence with its row b, differentiable, in the dtype of its input."""
    s = scores if mask is None else scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
    logk = torch.log(k.clamp_min(1e-20)).unsqueeze(-1)
    b, current = -s, max(eps_init, eps)
    a = torch.zeros(())
    for _ in range(n_iters):
        sb = (s + b) / current
        if mask is not None:
            sb = sb.masked_fill(~mask, -torch.finfo(scores.dtype).max)
        a = current * (logk - sb.logsumexp(-1, keepdim=True))
        b = -torch.relu(s + a)
        current = max(current * eps_decay, eps)
    lam = torch.exp((s + a + b) / current)
    return lam if mask is None else lam.masked_fill(~mask, 0.0)


def norm_error(value, truth):
    return float((value.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


SOFT_CASES = {
    "normal": lambda: (torch.randn(5, 301), 40.3, 0.1),
    "long": lambda: (torch.randn(2, 20001), 2000.5, 0.03),
    "offset": lambda: (torch.randn(4, 513) + 1e4, 70.4, 0.03),
    "cauchy": lambda: (torch.randn(4, 257) / torch.randn(4, 257), 30.7, 0.05),
    "ties": lambda: (torch.randint(0, 5, (4, 255)).float(), 99.5, 0.1),
    "constant": lambda: (torch.full((3, 64), 3.0), 5.5, 0.1),
    "bimodal": lambda: (torch.where(torch.arange(200) < 20, 10.0, -10.0) + 0.01 * torch.randn(4, 200), 20.5, 0.03),
    "spread": lambda: (100 * torch.randn(6, 1025), 144.5, 0.03),
    "k_one": lambda: (torch.randn(4, 127), 1.0, 0.1),
    "k_small": lambda: (torch.randn(4, 127), 1e-3, 0.1),
    "k_almost_n": lambda: (torch.randn(4, 33), 32.0, 0.5),
    "hot": lambda: (torch.randn(4, 65), 9.0, 30.0),
    "tiny": lambda: (1e-20 * torch.randn(4, 65), 9.5, 0.1),
    "two": lambda: (torch.tensor([[1.0, 2.0], [3.0, 3.0]]), 1.5, 0.1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOFT_CASES)
def test_soft_topk_against_the_exact_solution(name, dtype):
    s, k, eps = SOFT_CASES[name]()
    s = s.to(dtype)
    rows = s.shape[0]
    ks = torch.full((rows,), k, dtype=dtype)
    es = torch.full((rows,), eps, dtype=dtype)
    inputs = [t.double().requires_grad_() for t in (s, ks, es)]
    truth, tau, kink = exact(*inputs)
    g = torch.randn(s.shape, dtype=dtype)
    wanted_gradients = torch.autograd.grad((truth * g).sum(), inputs)
    lam, threshold = cpu.soft_topk_forward(s, ks, es, None, EAGER)
    unit = torch.finfo(dtype).eps
    # a float64 kernel is judged by a float64 oracle, whose own rounding is in the difference
    slack = 1.0 if dtype == torch.float32 else 16.0
    assert float((lam.double() - truth).abs().max()) <= 4.0 * slack * unit
    gap = (threshold.double().sum(-1) - tau).abs()
    rounding = 2.0**-46 if dtype == torch.float32 else 2.0**-50
    assert bool((gap <= 8.0 * slack * unit * eps + rounding * s.abs().amax(-1)).all())
    gradients = cpu.soft_topk_backward(g, s, threshold, es, None, EAGER)
    assert int(kink.sum()) <= 1
    for value, wanted in zip(gradients, wanted_gradients, strict=True):
        value, wanted = value[~kink], wanted[~kink]
        size = max(float(wanted.norm()), 1.0)
        assert float((value.double() - wanted).norm()) <= 32.0 * slack * unit * size * max(1.0, 1.0 / eps)
    again = cpu.soft_topk_forward(s, k, eps, None, EAGER)[0]
    assert float((again.double() - truth).abs().max()) <= 64.0 * slack * unit


def test_equal_scores_share_the_budget_where_eps_is_a_few_ulps():
    lam, _ = cpu.soft_topk_forward(torch.full((1, 3), -1.20370138), 1.0161835, 1e-6, None, EAGER)
    torch.testing.assert_close(lam, torch.full((1, 3), 1.0161835 / 3), rtol=1e-6, atol=0)


def test_the_threshold_is_not_below_the_largest_score_where_k_is_one():
    """All others underflow beside it; tau anywhere in the gap would do for lam, but not for the gradient of eps."""
    s = torch.tensor([[0.0, -0.3, -0.5, -0.9, -1.2]], dtype=torch.float64)
    _, threshold = cpu.soft_topk_forward(s, 1.0, torch.tensor([1e-3], dtype=torch.float64), None, EAGER)
    assert float(threshold.sum().abs()) <= 1e-14


def test_soft_topk_uses_reference_oracle():
    s = torch.randn(6, 777)
    mask = torch.rand(6, 777) > 0.2
    lam, _ = cpu.soft_topk_forward(s, 50.5, 0.05, mask, EAGER)
    for row in range(6):
        truth = oracles.soft_topk_numpy(s[row].double().numpy(), 50.5, 0.05, mask[row].numpy())[0]
        assert float((lam[row].double() - torch.as_tensor(truth)).abs().max()) <= 1e-6
        lam_row, _ = cpu.coordinate_descent_forward(
            s[row : row + 1], 50.5, mask[row : row + 1], 20, 0.05, 4.0, 0.7, False, 1, EAGER
        )
        truth = oracles.coordinate_descent_numpy(
            s[row].double().numpy(), 50.5, 20, 0.05, eps_init=4.0, eps_decay=0.7, mask=mask[row].numpy()
        )[0]
        assert float((lam_row[0].double() - torch.as_tensor(truth)).abs().max()) <= 1e-4


def test_soft_topk_at_scales_where_eps_is_below_an_ulp():
    for scale in (1e12, 1e30):
        for dtype in DTYPES:
            s = scale * torch.randn(5, 400, dtype=dtype)
            lam, threshold = cpu.soft_topk_forward(s, 20.5, 0.1, None, EAGER)
            order = s.argsort(-1, descending=True)
            wanted = torch.zeros_like(s)
            wanted.scatter_(-1, order[:, :20], 1.0).scatter_(-1, order[:, 20:21], 0.5)
            torch.testing.assert_close(lam, wanted, rtol=0, atol=4 * torch.finfo(dtype).eps)
            ds, dk, deps = cpu.soft_topk_backward(torch.randn_like(s), s, threshold, 0.1, None, EAGER)
            assert bool(ds.isfinite().all() and dk.isfinite().all() and deps.isfinite().all())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_is_computed_in_float32(dtype):
    s = torch.randn(6, 333).to(dtype)
    g = torch.randn(6, 333).to(dtype)
    lam, threshold = cpu.soft_topk_forward(s, 40.0, 0.1, None, EAGER)
    wide, wide_threshold = cpu.soft_topk_forward(s.float(), 40.0, 0.1, None, EAGER)
    assert lam.dtype == dtype and threshold.dtype == torch.float32
    assert torch.equal(lam, wide.to(dtype)) and torch.equal(threshold, wide_threshold)
    ds, dk, _ = cpu.soft_topk_backward(g, s, threshold, 0.1, None, EAGER)
    wide_ds, wide_dk, _ = cpu.soft_topk_backward(g.float(), s.float(), threshold, 0.1, None, EAGER)
    assert torch.equal(ds, wide_ds.to(dtype)) and torch.equal(dk, wide_dk)
    arguments = (40.0, None, 20, 0.1, 4.0, 0.7, False, 4, EAGER)
    assert torch.equal(
        cpu.coordinate_descent_forward(s, *arguments)[0],
        cpu.coordinate_descent_forward(s.float(), *arguments)[0].to(dtype),
    )


def edge_rows(dtype):
    """Rows [8, 6], a mask, and what each is."""
    s = torch.randn(8, 6, dtype=dtype)
    mask = torch.ones(8, 6, dtype=torch.bool)
    s[1, 2] = NAN  # NaN, valid
    s[2, 2], mask[2, 2] = NAN, False  # NaN, masked
    mask[3] = False  # all masked
    s[4, 0] = INF
    s[5, 0], s[5, 1] = -INF, INF
    s[6] = -INF
    s[7, 0], mask[7, 0] = INF, False
    return s, mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", (1, 3, 8))
def test_edges_of_soft_topk(dtype, rows):
    s, mask = edge_rows(dtype)
    before = s.clone()
    g = torch.randn_like(s)
    g[~mask] = NAN  # what stands at masked entries has no influence
    config = replace(EAGER, rows_per_program=rows)
    lam, threshold = cpu.soft_topk_forward(s, 2.5, 0.1, mask, config)
    ds, dk, deps = cpu.soft_topk_backward(g, s, threshold, 0.1, mask, config)
    assert torch.equal(s.nan_to_num(7.0), before.nan_to_num(7.0))
    assert bool(lam[1].isnan().all() and ds[1].isnan().all() and dk[1].isnan() and deps[1].isnan())
    good = [0, 2, 4, 5, 7]
    for row in (0, 2, 3, 4, 5, 6, 7):
        assert bool(lam[row].isfinite().all() and ds[row].isfinite().all() and dk[row].isfinite() and deps[row].isfinite()), row
        assert bool((lam[row][~mask[row]] == 0).all() and (ds[row][~mask[row]] == 0).all())
    torch.testing.assert_close(lam[good].sum(-1), torch.full((5,), 2.5, dtype=dtype))
    assert lam[4, 0] == 1 and ds[4, 0] == 0 and lam[5, 0] == 0 and lam[5, 1] == 1
    assert bool((lam[[3, 6]] == 0).all() and (ds[[3, 6]] == 0).all() and (dk[[3, 6]] == 0).all())
    # a row alone is bitwise the row among others
    for row in range(8):
        alone = cpu.soft_topk_forward(s[row : row + 1], 2.5, 0.1, mask[row : row + 1], config)[0]
        assert torch.equal(alone.nan_to_num(7.0), lam[row : row + 1].nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_budgets_of_soft_topk(dtype):
    s = torch.randn(10, 5, dtype=dtype)
    s[7, 0] = s[7, 1] = INF
    s[8, 0] = s[8, 1] = INF
    s[9, 0] = INF
    k = torch.tensor([0.0, -1.0, 5.0, 9.0, INF, NAN, 2.5, 1.0, 2.0, 0.0], dtype=dtype)
    lam, threshold = cpu.soft_topk_forward(s, k, 0.1, None, EAGER)
    ds, dk, deps = cpu.soft_topk_backward(torch.randn_like(s), s, threshold, 0.1, None, EAGER)
    assert bool((lam[[0, 1, 9]] == 0).all()) and bool((lam[[2, 3, 4]] == 1).all())
    assert bool(lam[5].isnan().all() and ds[5].isnan().all() and dk[5].isnan() and deps[5].isnan())
    assert float(lam[6].sum()) == pytest.approx(2.5)
    for row in (7, 8):
        assert bool((lam[row, :2] == 1).all() and (lam[row, 2:] == 0).all())
    still = [0, 1, 2, 3, 4, 7, 8, 9]
    assert bool((ds[still] == 0).all() and (dk[still] == 0).all() and (deps[still] == 0).all())
    assert bool((threshold[[2, 3, 4], 0] == -INF).all() and (threshold[[0, 1, 7, 8, 9], 0] == INF).all())
    eps = torch.tensor([0.1, 0.0, -1.0, NAN, INF, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=dtype)
    spoiled = cpu.soft_topk_forward(s, 2.5, eps, None, EAGER)[0].isnan().all(-1)
    assert spoiled.tolist() == [False, True, True, True, True, False, False, False, False, False]


@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (0, 0), (4, 1)))
def test_small_shapes(shape):
    s = torch.randn(shape)
    lam, threshold = cpu.soft_topk_forward(s, 0.5, 0.1, None, EAGER)
    ds, dk, deps = cpu.soft_topk_backward(torch.randn(shape), s, threshold, 0.1, None, EAGER)
    assert lam.shape == ds.shape == shape and threshold.shape == (shape[0], 2)
    assert dk.shape == deps.shape == (shape[0],)
    if shape == (4, 1):
        torch.testing.assert_close(lam, torch.full(shape, 0.5))
    lam, states = cpu.coordinate_descent_forward(s, 0.5, None, 3, 0.1, 0.1, 1.0, False, 2, EAGER)
    ds, dk = cpu.coordinate_descent_backward(torch.randn(shape), s, states, 0.5, None, 3, 0.1, 0.1, 1.0, False, EAGER)
    assert lam.shape == ds.shape == shape and states.shape == (shape[0], 2) and dk.shape == (shape[0],)


DESCENT_CASES = {
    "published": (20, 0.03, 4.0, 0.7),
    "fixed": (30, 0.1, 0.1, 1.0),
    "one": (1, 0.1, 0.1, 1.0),
    "slow": (7, 0.05, 1.0, 0.5),
    "below": (12, 0.1, 4.0, 0.9),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DESCENT_CASES)
def test_coordinate_descent_against_the_published_recurrence(name, dtype):
    n_iters, eps, eps_init, eps_decay = DESCENT_CASES[name]
    s = torch.randn(5, 401, dtype=dtype)
    k = torch.tensor([60.0, 1.0, 300.5, 17.25, 320.0], dtype=dtype)
    mask = torch.rand(5, 401) > 0.1
    g = torch.randn_like(s)

    def run(as_dtype):
        leaves = [t.to(as_dtype).detach().clone().requires_grad_() for t in (s, k)]
        lam = published(*leaves, n_iters, eps, eps_init, eps_decay, mask)
        return [lam.detach(), *torch.autograd.grad(lam, leaves, g.to(as_dtype))]

    truth, plain = run(torch.float64), run(dtype)
    arguments = (k, mask, n_iters, eps, eps_init, eps_decay, True)
    lam, states = cpu.coordinate_descent_forward(s, *arguments, min(3, n_iters), EAGER)
    mine = [lam, *cpu.coordinate_descent_backward(g, s, states, *arguments, EAGER)]
    for value, wanted, yardstick in zip(mine, truth, plain, strict=True):
        floor = 64 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-12
        assert norm_error(value, wanted) <= 2.0 * norm_error(yardstick, wanted) + floor


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_bitwise_the_same_for_any_number_of_segments(dtype):
    s, g = torch.randn(7, 1003, dtype=dtype), torch.randn(7, 1003, dtype=dtype)
    arguments = (130.5, None, 20, 0.03, 4.0, 0.7, False)
    results = []
    for segments in (1, 2, 3, 7, 19, 20):
        for rows in (1, 4, 7):
            config = replace(EAGER, rows_per_program=rows)
            lam, states = cpu.coordinate_descent_forward(s, *arguments, segments, config)
            assert states.shape == (7, segments)
            results.append((lam, states[:, -1], *cpu.coordinate_descent_backward(g, s, states, *arguments, config)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_iterations_at_one_eps_that_go_far(dtype):
    """A row that leaves the reach of the exponential it shares with other iterations goes alone, and others see nothing."""
    s, g = torch.randn(4, 301, dtype=dtype), torch.randn(4, 301, dtype=dtype)
    s[1] = 1e6 * s[1]
    k = torch.tensor([40.0, 40.0, 300.9, 1e-9], dtype=dtype)
    arguments = (40, 0.01, 0.01, 1.0, True)

    def run(rows):
        lam, states = cpu.coordinate_descent_forward(s[rows], k[rows], None, *arguments, 40, EAGER)
        return lam, states, *cpu.coordinate_descent_backward(g[rows], s[rows], states, k[rows], None, *arguments, EAGER)

    together = run(slice(0, 4))
    for row in range(4):
        for value, alone in zip(together, run(slice(row, row + 1)), strict=True):
            assert torch.equal(value[row : row + 1], alone)
    for row in (0, 2, 3):
        leaves = [t[row : row + 1].double().requires_grad_() for t in (s, k)]
        lam = published(*leaves, *arguments[:4])
        wanted = [lam.detach(), *torch.autograd.grad(lam, leaves, g[row : row + 1].double())]
        mine = (together[0][row : row + 1], *(value[row : row + 1] for value in together[2:]))
        # what cancels in the gradient of a lone entry has this size
        size = float((lam.detach() * g[row : row + 1]).norm()) / 0.01
        for value, truth, least in zip(mine, wanted, (0.0, size, size / float(k[row])), strict=True):
            assert float((value.double() - truth).norm()) <= 1e3 * torch.finfo(dtype).eps * (float(truth.norm()) + least)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_of_coordinate_descent(dtype):
    s, mask = edge_rows(dtype)
    g = torch.randn_like(s)
    g[~mask] = NAN
    arguments = (2.5, mask, 20, 0.1, 4.0, 0.7, False)
    lam, states = cpu.coordinate_descent_forward(s, *arguments, 4, EAGER)
    ds, dk = cpu.coordinate_descent_backward(g, s, states, *arguments, EAGER)
    assert bool(lam[1].isnan().all() and ds[1].isnan().all() and dk[1].isnan() and states[1].isnan().all())
    for row in (0, 2, 3, 4, 5, 6, 7):
        assert bool(lam[row].isfinite().all() and ds[row].isfinite().all() and dk[row].isfinite()), row
        assert bool((lam[row][~mask[row]] == 0).all() and (ds[row][~mask[row]] == 0).all())
    assert lam[4, 0] == 1 and ds[4, 0] == 0 and lam[5, 0] == 0 and lam[5, 1] == 1
    assert bool((lam[[3, 6]] == 0).all() and (ds[[3, 6]] == 0).all() and (dk[[3, 6]] == 0).all())
    assert bool((states[[3, 6]] == -INF).all())
    finite = torch.where(mask, s, -INF)
    same = cpu.coordinate_descent_forward(finite, 2.5, None, *arguments[2:], 4, EAGER)[0]
    assert torch.equal(same.nan_to_num(7.0), lam.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_budgets_of_coordinate_descent(dtype):
    s, g = torch.randn(6, 9, dtype=dtype), torch.randn(6, 9, dtype=dtype)
    k = torch.tensor([0.0, -3.0, 9.0, 50.0, NAN, 1e-25], dtype=dtype)
    arguments = (k, None, 20, 0.1, 4.0, 0.7, True)
    lam, states = cpu.coordinate_descent_forward(s, *arguments, 2, EAGER)
    ds, dk = cpu.coordinate_descent_backward(g, s, states, *arguments, EAGER)
    assert bool((lam[:2] == 0).all() and (ds[:2] == 0).all() and (dk[:2] == 0).all())
    assert torch.equal(lam[3], cpu.coordinate_descent_forward(s[3:4], 9.0, *arguments[1:6], False, 2, EAGER)[0][0])
    assert bool(lam[4].isnan().all() and ds[4].isnan().all() and dk[4].isnan())
    assert dk[5] == 0 and bool(lam[5].isfinite().all())
    assert bool((cpu.coordinate_descent_forward(s, 0.0, *arguments[1:6], False, 2, EAGER)[0] == 0).all())
    for scale in (1e10, 1e30):
        lam, states = cpu.coordinate_descent_forward(scale * s, 2.0, *arguments[1:6], False, 2, EAGER)
        out = cpu.coordinate_descent_backward(g, scale * s, states, 2.0, *arguments[1:6], False, EAGER)
        assert bool(lam.isfinite().all()) and all(bool(value.isfinite().all()) for value in out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (1, 5, 31, 64, 1000, 40000))
def test_blocks_and_repetition_change_no_bit(n, dtype):
    rows = 9 if n > 1000 else 41
    s, g = torch.randn(rows, n, dtype=dtype), torch.randn(rows, n, dtype=dtype)
    s[3] *= 100
    if n > 1:
        s[4] = s[4] / s[5]
    k, eps = 0.141 * n, 0.03
    arguments = (k, None, 9, eps, 1.0, 0.5, False)
    results = []
    for block in (1, 2, 4, 9, 9, 17, 100):
        config = LaunchConfig("eager", rows_per_program=block)
        lam, threshold = cpu.soft_topk_forward(s, k, eps, None, config)
        values, states = cpu.coordinate_descent_forward(s, *arguments, 4, config)
        gradients = cpu.soft_topk_backward(g, s, threshold, eps, None, config)
        more = cpu.coordinate_descent_backward(g, s, states, *arguments, config)
        results.append((lam, threshold, *gradients, values, states, *more))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_strides_masks_and_expanded_arguments():
    wide = torch.randn(6, 100)
    s, mask_row = wide[:, :37], torch.arange(37) % 3 > 0
    mask = mask_row.expand(6, 37)
    k, eps = torch.tensor([4.5]).expand(6), torch.tensor([0.1]).expand(6)
    grad = torch.ones(()).expand(6, 37)
    lam, threshold = cpu.soft_topk_forward(s, k, eps, mask, EAGER)
    plain, plain_threshold = cpu.soft_topk_forward(s.contiguous(), k.contiguous(), eps.contiguous(), mask.contiguous(), EAGER)
    assert torch.equal(lam, plain) and torch.equal(threshold, plain_threshold) and lam.is_contiguous()
    ds, _, _ = cpu.soft_topk_backward(grad, s, threshold, eps, mask, EAGER)
    assert float(ds.abs().max()) <= 1e-5  # a constant gradient is within the constraint
    arguments = (mask, 10, 0.1, 1.0, 0.5, True)
    lam, _ = cpu.coordinate_descent_forward(s, k, *arguments, 3, EAGER)
    assert torch.equal(lam, cpu.coordinate_descent_forward(s.contiguous(), k.contiguous(), *arguments, 3, EAGER)[0])


def test_threads_are_set_for_the_call_only():
    before = torch.get_num_threads()
    s = torch.randn(4, 70000)
    one = cpu.soft_topk_forward(s, 9000.0, 0.03, None, replace(EAGER, num_threads=1))[0]
    two = cpu.soft_topk_forward(s, 9000.0, 0.03, None, replace(EAGER, num_threads=2))[0]
    assert torch.get_num_threads() == before
    assert torch.equal(one, two)


def test_unknown_variant():
    with pytest.raises(ValueError, match="'resident'"):
        cpu.soft_topk_forward(torch.randn(2, 3), 1.0, 0.1, None, LaunchConfig("resident"))


def test_inductor_variant_agrees_or_raises():
    s, g = torch.randn(6, 333), torch.randn(6, 333)
    s[2, 5] = NAN
    s[3, 0] = INF
    config = LaunchConfig("inductor", rows_per_program=4)
    try:
        lam, threshold = cpu.soft_topk_forward(s, 40.5, 0.1, None, config)
    except Exception as error:
        # what Inductor raises without a compiler differs from release to release; that it raises is the point
        pytest.skip(f"Inductor does not work here: {type(error).__name__}")
    wanted, wanted_threshold = cpu.soft_topk_forward(s, 40.5, 0.1, None, EAGER)
    torch.testing.assert_close(lam, wanted, rtol=0, atol=1e-6, equal_nan=True)
    mine = cpu.soft_topk_backward(g, s, threshold, 0.1, None, config)
    theirs = cpu.soft_topk_backward(g, s, wanted_threshold, 0.1, None, EAGER)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
    arguments = (40.5, None, 20, 0.1, 4.0, 0.7, False)
    lam, states = cpu.coordinate_descent_forward(s, *arguments, 4, config)
    wanted, wanted_states = cpu.coordinate_descent_forward(s, *arguments, 4, EAGER)
    torch.testing.assert_close(lam, wanted, rtol=0, atol=1e-5, equal_nan=True)
    mine = cpu.coordinate_descent_backward(g, s, states, *arguments, config)
    theirs = cpu.coordinate_descent_backward(g, s, wanted_states, *arguments, EAGER)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_inductor_variant_takes_strides_beyond_dynamos_limit():
    """Each kind of view is compiled for once; more of them than Dynamo's limit are no error."""
    config = LaunchConfig("inductor", rows_per_program=8)
    wide, g = torch.randn(6, 4096), torch.randn(6, 60)
    try:
        cpu.soft_topk_forward(g, 8.5, 0.1, None, config)
    except Exception as error:
        pytest.skip(f"Inductor does not work here: {type(error).__name__}")
    with torch._dynamo.config.patch(recompile_limit=2):
        for s in (wide[:, :60], wide[:, 3:63], wide[1:, 7:67][:5], wide.view(12, 2048)[::2, :60], g[:, :59]):
            lam, threshold = cpu.soft_topk_forward(s, 8.5, 0.1, None, config)
            assert float((lam.sum(-1) - 8.5).abs().max()) < 1e-4
            for grad in (g[: s.shape[0], : s.shape[1]], torch.ones(()).expand(s.shape)):
                cpu.soft_topk_backward(grad, s, threshold, 0.1, None, config)
