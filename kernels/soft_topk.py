"""The exact differentiable top-k as Triton kernels.

For a row of scores s, a budget k and a temperature eps (entropy-regularised top-k, e.g. Lei et al. 2023,
https://arxiv.org/abs/2304.04947, section 3):

    lam_i = min(1, exp((s_i - tau) / eps)),   the threshold tau chosen so that  F(tau) = sum_i lam_i = k

F falls monotonically, so the row has one unknown. With M saturated entries (s_i >= tau) and U the sum over the others,
F = M + U and Newton's method on log F steps by

    tau  <-  tau + eps * F/U * log(F / k)

inside a bracket that always holds the root:  min s + eps*log(n/k) <= tau <= max s + eps*log(n/k).  The first guess is the
quantile that a normal distribution with the row's mean and deviation would have; a step that leaves the bracket becomes a
bisection. tau is kept as an unevaluated sum hi + lo of two floats: s_i - hi is exact near the threshold, so lam has the
accuracy of exp itself however large the scores are.

Backward, with g the gradient of lam and sums over the unsaturated entries U (implicit differentiation of F = k):

    gbar = sum_U lam g / sum_U lam,   ds_i = lam_i (g_i - gbar) / eps,   dk = gbar,   deps = -sum_i (s_i - tau) ds_i / eps

The threads of a row must hold the same threshold to the bit, for each steps its own copy of it. Sums are exchanged between
threads pairwise, a + b in one and b + a in the other, which is the same. A product that meets such an exchange is not: the
compiler fuses it into one multiply-add, whose product is exact in one thread and rounded in the other. So the forward sums no
product but through a ``tl.where``, and ahead-of-time compilation looks for such instructions (kernels/aot.py). In the backward
a thread whose gbar is an ulp off the others' rounds its own entries by that, and no more.

Variants: ``resident`` keeps ``rows_per_program`` whole rows in registers; ``tiled`` re-reads one row of any length in tiles
of ``block`` scores, once a sweep.
"""

import torch
import triton
import triton.language as tl

from .config import LaunchConfig
from .launch import check_config, compute_dtypes, mask_args, on_device, positive, row_value_args

MAX_SWEEPS_32 = tl.constexpr(512)
MAX_SWEEPS_64 = tl.constexpr(4096)
"""Bounds of the loop. From sweep 24 on every other sweep bisects, so half of this covers every exponent of the type."""


@triton.jit
def _row_value(ptr, value, rows, live, stride, IS_TENSOR: tl.constexpr, COMPUTE: tl.constexpr):
    """One number a row, [R]: loaded from a tensor, or the launch argument."""
    if IS_TENSOR:
        return tl.load(ptr + rows * stride, mask=live, other=1.0).to(COMPUTE)
    else:
        return (tl.zeros_like(rows).to(COMPUTE) + value).to(COMPUTE)


@triton.jit
def _load_scores(scores_ptr, mask_ptr, rows, cols, inside, stride, mask_stride, HAS_MASK: tl.constexpr, COMPUTE: tl.constexpr):
    """Scores [R, BLOCK] in the compute type; -inf wherever an entry is masked or outside."""
    s = tl.load(scores_ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=float("-inf")).to(COMPUTE)
    if HAS_MASK:
        valid = tl.load(mask_ptr + rows[:, None] * mask_stride + cols[None, :], mask=inside, other=0)
        s = tl.where(valid != 0, s, float("-inf"))
    return s


@triton.jit
def _normal_upper_quantile(p):
    """z with P(Z > z) = p for a standard normal Z, to 4.5e-4 (Abramowitz & Stegun 26.2.23); only ever a first guess."""
    q = tl.minimum(p, 1.0 - p)
    t = tl.sqrt(-2.0 * tl.log(tl.maximum(q, 1e-30)))
    z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return tl.where(p > 0.5, -z, z)


@triton.jit
def _begin(k, eps, n_finite, n_inf, n_nan, largest, smallest, sum1, sum2, TOLERANCE: tl.constexpr):
    """The solver's state before the first sweep, all [R].

    n_finite, n_inf, n_nan count finite, +inf and NaN entries; sum1 and sum2 are the sums of (s - largest) and its square.
    Returns the budget of the finite entries, the bracket, the first guess, and the flags bad (a NaN row),
    full (every valid entry is 1), empty (every finite entry is 0).
    """
    bad = (n_nan > 0) | (k != k) | ~((eps > 0) & (eps < float("inf")))
    budget = k - n_inf
    full = ~bad & (k >= n_finite + n_inf)
    empty = ~bad & ~full & (budget <= 0)
    easy = bad | full | empty
    count = tl.where(easy, 2.0, n_finite.to(k.dtype))
    budget = tl.where(easy, 1.0, budget)
    eps = tl.where(bad, 1.0, eps)
    largest = tl.where(easy, 0.0, largest)
    smallest = tl.where(easy, 0.0, smallest)
    above = eps * tl.log(count / budget)
    low = smallest + above
    high = largest + above
    # the largest entry alone may not exceed the budget
    low = tl.where(budget <= 1.0, tl.maximum(low, largest - eps * tl.log(budget)), low)
    # what rounding may have moved the bounds by: at least two ulps
    slack = (TOLERANCE / 4) * tl.maximum(tl.abs(largest), tl.abs(smallest))
    low = low - slack
    high = high + slack
    mean = sum1 / count
    deviation = tl.sqrt(tl.maximum(sum2 / count - mean * mean, 0.0))
    guess = largest + mean + deviation * _normal_upper_quantile(budget / count)
    guess = tl.where(guess == guess, guess, 0.5 * low + 0.5 * high)
    guess = tl.minimum(tl.maximum(guess, low), high)
    return budget, eps, low, high, guess, bad, full, empty


@triton.jit
def _advance(sweep, saturated, unsaturated, k, n_inf, budget, eps, hi, lo, low, high, done, TOLERANCE: tl.constexpr):
    """One safeguarded Newton step on log F, all [R]; rows that are done keep their threshold."""
    # M - k first: both are exact, so the residual has the accuracy of U even where U is far smaller than k
    residual = (saturated.to(k.dtype) - k) + unsaturated
    total = (saturated - n_inf).to(k.dtype) + unsaturated
    converged = tl.abs(residual) <= TOLERANCE * tl.maximum(unsaturated, tl.minimum(budget, 1.0) / 64)
    # hi bounds the root only on the side of it that lo leaves it on
    low = tl.where(~done & (residual > 0) & (lo >= 0), tl.maximum(low, hi), low)
    high = tl.where(~done & (residual <= 0) & (lo <= 0), tl.minimum(high, hi), high)
    ratio = residual / budget
    log_ratio = tl.where(tl.abs(ratio) < 1e-3, ratio * (1.0 - 0.5 * ratio), tl.log(tl.maximum(total / budget, 1e-37)))
    step = eps * (total / unsaturated) * log_ratio
    target = hi + (lo + step)
    newton = (target >= low) & (target <= high) & (unsaturated > 0)
    middle = 0.5 * low + 0.5 * high
    adjacent = (middle <= low) | (middle >= high)
    between = ((hi - low) + lo > 0) & ((hi - high) + lo < 0)
    newton = newton & (converged | (adjacent & between) | (~adjacent & ((sweep < 24) | (sweep % 2 == 0))))
    # the last step of a converged row is free, and only worth taking where the residual is small against U
    polish = converged & (tl.abs(residual) <= TOLERANCE * unsaturated)
    # two-sum of hi and lo + step (Knuth): what hi rounds away is kept in lo
    addend = lo + step
    new_hi = hi + addend
    back = new_hi - hi
    new_lo = (hi - (new_hi - back)) + (addend - back)
    # neighbouring floats have no middle: go just above the lower one. From there log F is convex in tau as far as the upper
    # one, so that Newton's steps of lo fall short of the root and never jump over it
    above = tl.where(adjacent, tl.maximum(eps * 1e-21, 1e-37), 0.0)
    new_hi = tl.where(newton, new_hi, tl.where(adjacent, low, middle))
    new_lo = tl.where(newton, new_lo, above)
    move = ~done & (~converged | (polish & newton))
    hi = tl.where(move, new_hi, hi)
    lo = tl.where(move, new_lo, lo)
    return hi, lo, low, high, done | converged


@triton.jit
def _finish(hi, lo, bad, full, empty):
    """The stored threshold: NaN for a NaN row, -inf where all is saturated, +inf where all that is finite is 0."""
    hi = tl.where(full, float("-inf"), tl.where(empty, float("inf"), hi))
    hi = tl.where(bad, float("nan"), hi)
    lo = tl.where(bad | full | empty, 0.0, lo)
    return hi, lo


@triton.jit
def _lam(s, hi, lo, scale, k):
    """lam [R, BLOCK] from the stored threshold; k [R] tells a row with no budget from one that +inf scores use up."""
    d = (s - hi[:, None]) - lo[:, None]
    lam = tl.where(d >= 0, 1.0, tl.exp2(tl.minimum(d, 0.0) * scale[:, None]))
    lam = tl.where(s == float("inf"), 1.0, lam)
    lam = tl.where((s > float("-inf")) & (k > 0)[:, None], lam, 0.0)
    return tl.where((hi != hi)[:, None], float("nan"), lam)


@triton.jit(do_not_specialize=["n_rows", "k_stride", "eps_stride"])
def _forward_resident(
    scores_ptr,
    k_ptr,
    k_value: tl.float64,
    eps_ptr,
    eps_value: tl.float64,
    mask_ptr,
    lam_ptr,
    threshold_ptr,
    n_rows,
    n_cols,
    scores_stride,
    mask_stride,
    k_stride,
    eps_stride,
    K_IS_TENSOR: tl.constexpr,
    EPS_IS_TENSOR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    TOLERANCE: tl.constexpr,
    MAX_SWEEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    cols = tl.arange(0, BLOCK)
    inside = live[:, None] & (cols < n_cols)[None, :]
    k = _row_value(k_ptr, k_value, rows, live, k_stride, K_IS_TENSOR, COMPUTE)
    eps = _row_value(eps_ptr, eps_value, rows, live, eps_stride, EPS_IS_TENSOR, COMPUTE)
    s = _load_scores(scores_ptr, mask_ptr, rows, cols, inside, scores_stride, mask_stride, HAS_MASK, COMPUTE)

    n_nan = tl.sum((s != s).to(tl.int32), axis=1)
    s = tl.where(s != s, float("-inf"), s)
    finite = (s > float("-inf")) & (s < float("inf"))
    n_inf = tl.sum((s == float("inf")).to(tl.int32), axis=1)
    n_finite = tl.sum(finite.to(tl.int32), axis=1)
    largest = tl.max(tl.where(finite, s, float("-inf")), axis=1)
    smallest = tl.min(tl.where(finite, s, float("inf")), axis=1)
    below = tl.where(finite, s - largest[:, None], 0.0)
    sum1 = tl.sum(below, axis=1)
    sum2 = tl.sum(tl.where(finite, below * below, 0.0), axis=1)
    budget, safe_eps, low, high, hi, bad, full, empty = _begin(
        k, eps, n_finite, n_inf, n_nan, largest, smallest, sum1, sum2, TOLERANCE
    )
    lo = tl.zeros_like(hi)
    scale = 1.4426950408889634 / safe_eps
    done = bad | full | empty | ~live

    sweep = 0
    pending = tl.sum((~done).to(tl.int32), axis=0)
    while (pending > 0) & (sweep < MAX_SWEEPS):
        d = (s - hi[:, None]) - lo[:, None]
        clamped = d >= 0
        e = tl.where(clamped, 0.0, tl.exp2(tl.minimum(d, 0.0) * scale[:, None]))
        saturated = tl.sum(clamped.to(tl.int32), axis=1)
        unsaturated = tl.sum(e, axis=1)
        hi, lo, low, high, done = _advance(
            sweep, saturated, unsaturated, k, n_inf, budget, safe_eps, hi, lo, low, high, done, TOLERANCE
        )
        sweep += 1
        pending = tl.sum((~done).to(tl.int32), axis=0)

    hi, lo = _finish(hi, lo, bad, full, empty)
    lam = _lam(s, hi, lo, scale, k)
    tl.store(lam_ptr + rows[:, None] * n_cols + cols[None, :], lam.to(lam_ptr.dtype.element_ty), mask=inside)
    tl.store(threshold_ptr + rows * 2, hi, mask=live)
    tl.store(threshold_ptr + rows * 2 + 1, lo, mask=live)


@triton.jit(do_not_specialize=["n_rows", "k_stride", "eps_stride"])
def _forward_tiled(
    scores_ptr,
    k_ptr,
    k_value: tl.float64,
    eps_ptr,
    eps_value: tl.float64,
    mask_ptr,
    lam_ptr,
    threshold_ptr,
    n_rows,
    n_cols,
    scores_stride,
    mask_stride,
    k_stride,
    eps_stride,
    K_IS_TENSOR: tl.constexpr,
    EPS_IS_TENSOR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    TOLERANCE: tl.constexpr,
    MAX_SWEEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)  # ROWS is 1
    live = rows < n_rows
    lanes = tl.arange(0, BLOCK)
    k = _row_value(k_ptr, k_value, rows, live, k_stride, K_IS_TENSOR, COMPUTE)
    eps = _row_value(eps_ptr, eps_value, rows, live, eps_stride, EPS_IS_TENSOR, COMPUTE)

    nan_acc = tl.zeros([ROWS, BLOCK], tl.int32)
    inf_acc = tl.zeros([ROWS, BLOCK], tl.int32)
    finite_acc = tl.zeros([ROWS, BLOCK], tl.int32)
    max_acc = tl.full([ROWS, BLOCK], float("-inf"), COMPUTE)
    min_acc = tl.full([ROWS, BLOCK], float("inf"), COMPUTE)
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        inside = live[:, None] & (cols < n_cols)[None, :]
        s = _load_scores(scores_ptr, mask_ptr, rows, cols, inside, scores_stride, mask_stride, HAS_MASK, COMPUTE)
        nan_acc += (s != s).to(tl.int32)
        inf_acc += (s == float("inf")).to(tl.int32)
        finite = (s > float("-inf")) & (s < float("inf"))
        finite_acc += finite.to(tl.int32)
        max_acc = tl.maximum(max_acc, tl.where(finite, s, float("-inf")))
        min_acc = tl.minimum(min_acc, tl.where(finite, s, float("inf")))
    n_nan = tl.sum(nan_acc, axis=1)
    n_inf = tl.sum(inf_acc, axis=1)
    n_finite = tl.sum(finite_acc, axis=1)
    largest = tl.max(max_acc, axis=1)
    smallest = tl.min(min_acc, axis=1)
    sum_acc = tl.zeros([ROWS, BLOCK], COMPUTE)
    square_acc = tl.zeros([ROWS, BLOCK], COMPUTE)
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        inside = live[:, None] & (cols < n_cols)[None, :]
        s = _load_scores(scores_ptr, mask_ptr, rows, cols, inside, scores_stride, mask_stride, HAS_MASK, COMPUTE)
        finite = (s > float("-inf")) & (s < float("inf"))
        below = tl.where(finite, s - largest[:, None], 0.0)
        sum_acc += below
        square_acc += below * below
    sum1 = tl.sum(sum_acc, axis=1)
    sum2 = tl.sum(square_acc, axis=1)
    budget, safe_eps, low, high, hi, bad, full, empty = _begin(
        k, eps, n_finite, n_inf, n_nan, largest, smallest, sum1, sum2, TOLERANCE
    )
    lo = tl.zeros_like(hi)
    scale = 1.4426950408889634 / safe_eps
    done = bad | full | empty | ~live

    sweep = 0
    pending = tl.sum((~done).to(tl.int32), axis=0)
    while (pending > 0) & (sweep < MAX_SWEEPS):
        count_acc = tl.zeros([ROWS, BLOCK], tl.int32)
        sum_acc = tl.zeros([ROWS, BLOCK], COMPUTE)
        for start in range(0, n_cols, BLOCK):
            cols = start + lanes
            inside = live[:, None] & (cols < n_cols)[None, :]
            s = _load_scores(scores_ptr, mask_ptr, rows, cols, inside, scores_stride, mask_stride, HAS_MASK, COMPUTE)
            d = (s - hi[:, None]) - lo[:, None]
            clamped = d >= 0
            count_acc += clamped.to(tl.int32)
            sum_acc += tl.where(clamped, 0.0, tl.exp2(tl.minimum(d, 0.0) * scale[:, None]))
        saturated = tl.sum(count_acc, axis=1)
        unsaturated = tl.sum(sum_acc, axis=1)
        hi, lo, low, high, done = _advance(
            sweep, saturated, unsaturated, k, n_inf, budget, safe_eps, hi, lo, low, high, done, TOLERANCE
        )
        sweep += 1
        pending = tl.sum((~done).to(tl.int32), axis=0)

    hi, lo = _finish(hi, lo, bad, full, empty)
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        inside = live[:, None] & (cols < n_cols)[None, :]
        s = _load_scores(scores_ptr, mask_ptr, rows, cols, inside, scores_stride, mask_stride, HAS_MASK, COMPUTE)
        lam = _lam(s, hi, lo, scale, k)
        tl.store(lam_ptr + rows[:, None] * n_cols + cols[None, :], lam.to(lam_ptr.dtype.element_ty), mask=inside)
    tl.store(threshold_ptr + rows * 2, hi, mask=live)
    tl.store(threshold_ptr + rows * 2 + 1, lo, mask=live)


@triton.jit
def _backward_tile(
    scores_ptr,
    grad_ptr,
    mask_ptr,
    rows,
    cols,
    inside,
    scores_stride,
    grad_stride,
    mask_stride,
    hi,
    lo,
    scale,
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """d = s - tau, g, and lam where an entry is unsaturated (0 elsewhere), each [R, BLOCK]."""
    s = _load_scores(scores_ptr, mask_ptr, rows, cols, inside, scores_stride, mask_stride, HAS_MASK, COMPUTE)
    g = tl.load(grad_ptr + rows[:, None] * grad_stride + cols[None, :], mask=inside, other=0.0).to(COMPUTE)
    d = (s - hi[:, None]) - lo[:, None]
    lam = tl.where(d < 0, tl.exp2(d * scale[:, None]), 0.0)
    # an entry without mass has no part in the gradient, whatever its g
    g = tl.where(lam > 0, g, 0.0)
    d = tl.where(lam > 0, d, 0.0)
    return d, g, lam


@triton.jit(do_not_specialize=["n_rows", "eps_stride"])
def _backward_resident(
    grad_ptr,
    scores_ptr,
    threshold_ptr,
    eps_ptr,
    eps_value: tl.float64,
    mask_ptr,
    dscores_ptr,
    dk_ptr,
    deps_ptr,
    n_rows,
    n_cols,
    grad_stride,
    scores_stride,
    mask_stride,
    eps_stride,
    EPS_IS_TENSOR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    cols = tl.arange(0, BLOCK)
    inside = live[:, None] & (cols < n_cols)[None, :]
    hi = tl.load(threshold_ptr + rows * 2, mask=live, other=0.0)
    lo = tl.load(threshold_ptr + rows * 2 + 1, mask=live, other=0.0)
    eps = _row_value(eps_ptr, eps_value, rows, live, eps_stride, EPS_IS_TENSOR, COMPUTE)
    scale = 1.4426950408889634 / eps
    inv_eps = 1.0 / eps
    d, g, lam = _backward_tile(
        scores_ptr, grad_ptr, mask_ptr, rows, cols, inside, scores_stride, grad_stride, mask_stride,
        hi, lo, scale, HAS_MASK, COMPUTE,
    )  # fmt: skip
    mass = tl.sum(lam, axis=1)
    weighted = tl.sum(lam * g, axis=1)
    nan_row = hi != hi
    gbar = tl.where(mass > 0, weighted / mass, 0.0)
    gbar = tl.where(nan_row, float("nan"), gbar)
    ds = tl.where(lam > 0, lam * (g - gbar[:, None]) * inv_eps[:, None], 0.0)
    ds = tl.where(nan_row[:, None], float("nan"), ds)
    tl.store(dscores_ptr + rows[:, None] * n_cols + cols[None, :], ds.to(dscores_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + rows, gbar, mask=live)
    if EPS_IS_TENSOR:
        tl.store(deps_ptr + rows, -tl.sum(d * ds, axis=1) / eps, mask=live)


@triton.jit(do_not_specialize=["n_rows", "eps_stride"])
def _backward_tiled(
    grad_ptr,
    scores_ptr,
    threshold_ptr,
    eps_ptr,
    eps_value: tl.float64,
    mask_ptr,
    dscores_ptr,
    dk_ptr,
    deps_ptr,
    n_rows,
    n_cols,
    grad_stride,
    scores_stride,
    mask_stride,
    eps_stride,
    EPS_IS_TENSOR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)  # ROWS is 1
    live = rows < n_rows
    lanes = tl.arange(0, BLOCK)
    hi = tl.load(threshold_ptr + rows * 2, mask=live, other=0.0)
    lo = tl.load(threshold_ptr + rows * 2 + 1, mask=live, other=0.0)
    eps = _row_value(eps_ptr, eps_value, rows, live, eps_stride, EPS_IS_TENSOR, COMPUTE)
    scale = 1.4426950408889634 / eps
    inv_eps = 1.0 / eps
    mass_acc = tl.zeros([ROWS, BLOCK], COMPUTE)
    weighted_acc = tl.zeros([ROWS, BLOCK], COMPUTE)
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        inside = live[:, None] & (cols < n_cols)[None, :]
        d, g, lam = _backward_tile(
            scores_ptr, grad_ptr, mask_ptr, rows, cols, inside, scores_stride, grad_stride, mask_stride,
            hi, lo, scale, HAS_MASK, COMPUTE,
        )  # fmt: skip
        mass_acc += lam
        weighted_acc += lam * g
    mass = tl.sum(mass_acc, axis=1)
    weighted = tl.sum(weighted_acc, axis=1)
    nan_row = hi != hi
    gbar = tl.where(mass > 0, weighted / mass, 0.0)
    gbar = tl.where(nan_row, float("nan"), gbar)
    eps_acc = tl.zeros([ROWS, BLOCK], COMPUTE)
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        inside = live[:, None] & (cols < n_cols)[None, :]
        d, g, lam = _backward_tile(
            scores_ptr, grad_ptr, mask_ptr, rows, cols, inside, scores_stride, grad_stride, mask_stride,
            hi, lo, scale, HAS_MASK, COMPUTE,
        )  # fmt: skip
        ds = tl.where(lam > 0, lam * (g - gbar[:, None]) * inv_eps[:, None], 0.0)
        ds = tl.where(nan_row[:, None], float("nan"), ds)
        if EPS_IS_TENSOR:
            eps_acc += d * ds
        tl.store(dscores_ptr + rows[:, None] * n_cols + cols[None, :], ds.to(dscores_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + rows, gbar, mask=live)
    if EPS_IS_TENSOR:
        tl.store(deps_ptr + rows, -tl.sum(eps_acc, axis=1) / eps, mask=live)


def soft_topk_forward(
    scores: torch.Tensor,
    k: torch.Tensor | float,
    eps: torch.Tensor | float,
    mask: torch.Tensor | None,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """lam and the threshold of every row.

    Args:
        scores: [R, n], float16, bfloat16, float32 or float64, stride(1) == 1.
        k: a number, or [R] in the compute type (float32; float64 for float64 scores).
        eps: likewise.
        mask: bool [R, n], True = valid, stride(1) == 1, or None.
        config: the launch configuration.

    Returns:
        lam [R, n], contiguous, in the scores' dtype, and the threshold [R, 2] (hi, lo) in the compute type; hi is -inf
        where every valid entry is saturated, +inf where every finite entry is 0, NaN for a NaN row.
    """
    n_rows, n_cols = scores.shape
    compute, tl_compute = compute_dtypes(scores.dtype)
    lam = torch.empty((n_rows, n_cols), dtype=scores.dtype, device=scores.device)
    threshold = torch.empty((n_rows, 2), dtype=compute, device=scores.device)
    check_config("soft_topk", config, n_cols)
    resident = config.variant == "resident"
    rows = config.rows_per_program if resident else 1
    k_ptr, k_value, k_stride = row_value_args(k, scores)
    eps = eps if isinstance(eps, torch.Tensor) else positive(eps, compute)
    eps_ptr, eps_value, eps_stride = row_value_args(eps, scores)
    mask_ptr, mask_stride = mask_args(mask, scores)
    double = compute == torch.float64
    with on_device(scores.device):
        (_forward_resident if resident else _forward_tiled)[(triton.cdiv(n_rows, rows),)](
            scores,
            k_ptr,
            k_value,
            eps_ptr,
            eps_value,
            mask_ptr,
            lam,
            threshold,
            n_rows,
            n_cols,
            scores.stride(0),
            mask_stride,
            k_stride,
            eps_stride,
            K_IS_TENSOR=isinstance(k, torch.Tensor),
            EPS_IS_TENSOR=isinstance(eps, torch.Tensor),
            HAS_MASK=mask is not None,
            COMPUTE=tl_compute,
            TOLERANCE=2.0**-48 if double else 2.0**-20,
            MAX_SWEEPS=MAX_SWEEPS_64 if double else MAX_SWEEPS_32,
            ROWS=rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return lam, threshold


def soft_topk_backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    eps: torch.Tensor | float,
    mask: torch.Tensor | None,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of scores [R, n] (in their dtype), of k [R] and of eps [R] (in the compute type; empty for a number eps).

    Args:
        grad: the gradient of lam, [R, n], stride(1) == 1.
        scores, eps, mask, config: as in :func:`soft_topk_forward`.
        threshold: what the forward returned.
    """
    n_rows, n_cols = scores.shape
    compute, tl_compute = compute_dtypes(scores.dtype)
    dscores = torch.empty((n_rows, n_cols), dtype=scores.dtype, device=scores.device)
    dk = torch.empty((n_rows,), dtype=compute, device=scores.device)
    eps_is_tensor = isinstance(eps, torch.Tensor)
    deps = torch.empty((n_rows if eps_is_tensor else 0,), dtype=compute, device=scores.device)
    check_config("soft_topk", config, n_cols)
    resident = config.variant == "resident"
    rows = config.rows_per_program if resident else 1
    eps = eps if isinstance(eps, torch.Tensor) else positive(eps, compute)
    eps_ptr, eps_value, eps_stride = row_value_args(eps, scores)
    mask_ptr, mask_stride = mask_args(mask, scores)
    with on_device(scores.device):
        (_backward_resident if resident else _backward_tiled)[(triton.cdiv(n_rows, rows),)](
            grad,
            scores,
            threshold,
            eps_ptr,
            eps_value,
            mask_ptr,
            dscores,
            dk,
            deps if eps_is_tensor else dk,
            n_rows,
            n_cols,
            grad.stride(0),
            scores.stride(0),
            mask_stride,
            eps_stride,
            EPS_IS_TENSOR=eps_is_tensor,
            HAS_MASK=mask is not None,
            COMPUTE=tl_compute,
            ROWS=rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dscores, dk, deps
