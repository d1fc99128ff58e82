"""The exact differentiable top-k as Triton kernels.

For a row of scores s, a budget k and a temperature eps (entropy-regularised top-k, e.g. Lei et al. 2023,
https://arxiv.org/abs/2304.04947, section 3):

    lam_i = min(1, exp((s_i - tau) / eps)),   the threshold tau chosen so that  F(tau) = sum_i lam_i = k

tau is an unevaluated sum hi + lo of two floats. One exponential an entry serves many thresholds: with

    w_i = exp((s_i - hi) / eps),  q = exp(lo / eps):    lam_i = min(1, w_i / q)

a sweep over the row only compares w with q, counts the saturated entries M = #{w >= q} and adds up W = sum of the others;
U = W / q, F = M + U. w is made anew around another hi when the threshold has drifted more than DRIFT from it, so that the
argument of the exponential is exact where it matters (s_i - hi is, near the threshold) however large the scores are.

F falls monotonically in tau. Two steps are known from a sweep:

    Newton on log F:        lo + eps * F/U * log(F / k)                  (converges fastest where entries are dense)
    the root if no entry changes sides:  lo + eps * log(U / (k - M))     (never below the root, for F is concave in 1/q)

The first is never above the second, for log(M + U/q) is convex in log(1/q). It is taken inside a bracket that always holds the
root, and that the second narrows where F < k; what leaves the bracket, and from sweep PATIENCE on every other step, is a
bisection. The bracket and the first guess come from the sums of d = s - s_0 and of d² over the row:  |s_i - s_0| <= sqrt(sum d²),
and F(tau) = n P(s + eps E > tau) with E exponentially distributed, whose quantile is guessed as that of a normal distribution with
the same two moments. It misses by some entries, which is a long way in a short row: where rows share a program the entries above
the guess are counted, and the guess moves by as many spacings of that normal distribution as there are too many.

Scores far off spoil such moments: finfo.min where a model masks, finfo.max where it keeps. The guess of a row that is wide for its
eps is made from the scores near 0 alone if the threshold must be among them; the bracket still has the ends of the whole row.

Backward, with g the gradient of lam and sums over the unsaturated entries U (implicit differentiation of F = k):

    gbar = sum_U lam g / sum_U lam,   ds_i = lam_i (g_i - gbar) / eps,   dk = gbar,   deps = -sum_i (s_i - tau) ds_i / eps

Variants (how rows lie in threads, and how programs share one: rows.py): ``resident`` keeps ``rows_per_program`` whole rows in
registers; ``split`` shares a row between programs, of which each keeps its part in registers where it fits a block;
``tiled`` re-reads one row of any length in tiles, once a sweep. Of a row that is re-read, a tile of every program has the moments
for a first guess, so that the pass that adds them up over the whole row is the first sweep as well; and a sweep that is likely to
be the last stores lam, which is done anew only if it was not.
"""

import functools

import torch
import triton
import triton.language as tl

from .config import LaunchConfig, next_power_of_2, resolve
from .launch import (
    check_config,
    compile_options,
    compute_dtypes,
    cooperative,
    dtype_of,
    mask_args,
    positive,
    processors,
    row_value_args,
    tiles,
)
from .launcher import Prepared, launch
from .rows import (
    SLOTS,
    back_and_forth,
    columns,
    exchange,
    fold,
    fold_max,
    load_tile,
    multiple,
    row_sum,
    row_sums,
    row_sums3,
    row_value,
    spread,
)

MAX_SWEEPS_32, MAX_SWEEPS_64 = 512, 4096
"""Bounds of the loop. From sweep PATIENCE on every other sweep bisects, so half of this covers every exponent of the type."""

PATIENCE = tl.constexpr(16)
DRIFT = tl.constexpr(6.0)
"""How far, in powers of two of w, the threshold may be from where w was made."""
CLIP = tl.constexpr(120.0)
"""The largest power of two that w is let to be: saturated under any threshold within DRIFT, and not infinite."""
WIDE = tl.constexpr(1024.0)
"""A row wider than so many eps, by its second moment, is looked at anew: a few scores far off would spoil the first guess."""
FAR, NEAR = tl.constexpr(1.0 / 64.0), tl.constexpr(2.0**20)
"""Scores of such a row are near 0 up to this share of the root of that moment, or up to this if it is no number; else far off."""
NEXT_TO_NOTHING = tl.constexpr(2.0**-10)
"""After a step below this, in powers of two of w, the next is likely too small to change lam: a sweep that re-reads stores it."""


@triton.jit
def _normal_upper_quantile(p):
    """z with P(Z > z) = p for a standard normal Z, to 4.5e-4 (Abramowitz & Stegun 26.2.23); only ever a first guess."""
    q = tl.minimum(p, 1.0 - p)
    t = tl.sqrt(-2.0 * tl.log(tl.maximum(q, 1e-30)))
    z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return tl.where(p > 0.5, -z, z)


@triton.jit
def _guess(share, eps, count, sum1, sum2):
    """What the moments of s - anchor say of the threshold above which a share of the row's mass is, all [ROWS].

    Returns tau - anchor, -eps log(share), how far tau moves if one entry more is to be above it as far as the moments can tell,
    and the standard deviation of s + eps E; the last two are 0 for a row narrower than eps.
    """
    above = -eps * tl.log(share)
    mean = sum1 / count
    variance = tl.maximum(sum2 / count - mean * mean, 0.0)
    deviation = tl.sqrt(variance + eps * eps)
    z = _normal_upper_quantile(share)
    # a wide row: the quantile of s + eps E; a narrow one: the threshold if nothing is saturated, to the second moment
    wide = variance > eps * eps
    guess = tl.where(wide, mean + eps + deviation * z, mean + 0.5 * variance / eps + above)
    deviation = tl.where(wide, deviation, 0.0)
    # the inverse of the density of a normal distribution
    spacing = deviation * (2.5066283 / count) * tl.exp2(tl.minimum(0.7213475 * z * z, CLIP))
    return guess, above, spacing, deviation


@triton.jit
def _guess_from_some(k, eps, anchor, seen, counted, sum1, sum2, n_cols):
    """tau from the moments of ``counted`` valid entries among ``seen`` of the n_cols, all [ROWS]; any finite number will do."""
    count = tl.maximum(counted, 1.0)
    share = tl.minimum(tl.maximum(k * seen / (count * n_cols), 1e-6), 0.999999)
    guess, _, _, _ = _guess(share, eps, count, sum1, sum2)
    guess += anchor
    return tl.where(tl.abs(guess) < float("inf"), guess, anchor)


@triton.jit
def _begin(
    k, eps, n_finite, n_inf, n_nan, anchor, least, most, need, n_part, sum1, sum2, extra, prior,
    TOLERANCE: tl.constexpr, PRIOR: tl.constexpr,
):  # fmt: skip
    """The solver's state before the first sweep, all [ROWS].

    n_finite, n_inf, n_nan count finite, +inf and NaN entries. The first guess is made from n_part of them, of which the threshold
    is to have the mass ``need``: sum1 and sum2 are the sums of s - anchor and its square over these. tau - anchor lies between
    ``least`` and ``most``, each with -eps log(need / n_part) + ``extra``. PRIOR: ``prior`` is the first guess, where it is not NaN.
    Returns the budget of the finite entries, eps, the first guess hi, the bracket of tau - hi, the spacing and deviation of
    ``_guess``, and the flags bad (a NaN row), full (every valid entry is 1), empty (every finite entry is 0).
    """
    bad = (n_nan > 0) | (k != k) | ~((eps > 0) & (eps < float("inf")))
    budget = k - n_inf
    full = ~bad & (k >= n_finite + n_inf)
    empty = ~bad & ~full & (budget <= 0)
    easy = bad | full | empty
    budget = tl.where(easy, 1.0, budget)
    eps = tl.where(bad, 1.0, eps)
    anchor = tl.where(easy, 0.0, anchor)
    least = tl.where(easy, 0.0, least)
    most = tl.where(easy, 0.0, most)
    share = tl.where(easy, 0.5, need / n_part)
    guess, above, spacing, deviation = _guess(share, eps, tl.where(easy, 2.0, n_part), sum1, sum2)
    above += tl.where(easy, 0.0, extra)
    low = least + above
    high = most + above
    guess = tl.where(guess == guess, guess, 0.5 * low + 0.5 * high)
    guess = tl.minimum(tl.maximum(guess, low), high)
    hi = anchor + guess
    if PRIOR:
        hi = tl.where(easy | (prior != prior), hi, prior)
    # what rounding may have moved the bounds by
    slack = TOLERANCE * tl.abs(anchor) + TOLERANCE * tl.abs(hi) + TOLERANCE * tl.abs(low) + TOLERANCE * tl.abs(high)
    moved = hi - anchor
    return budget, eps, hi, (low - moved) - slack, (high - moved) + slack, spacing, deviation, bad, full, empty


@triton.jit
def _judge(saturated, weight, inverse, k, n_inf, budget, TOLERANCE: tl.constexpr):
    """What a sweep says of F - k: U, M, the residual and whether it is as small as it can be, all [ROWS].

    ``saturated`` counts the entries with w >= q = exp(lo / eps), ``weight`` is the sum of the other w, and inverse = 1 / q.
    """
    unsaturated = weight * inverse
    count = saturated.to(k.dtype)
    # M - k first: both are exact, so the residual has the accuracy of U even where U is far smaller than k
    residual = ((count + n_inf) - k) + unsaturated
    converged = tl.abs(residual) <= TOLERANCE * tl.maximum(unsaturated, tl.minimum(budget, 1.0) / 64)
    return unsaturated, count, residual, converged


@triton.jit
def _reciprocal(x):
    """1 / x for x > 0, to a few ulps: good for a step, and a third of the instructions of a division."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _advance(sweep, unsaturated, count, residual, inv_budget, eps, lo, low, high, done, ROWS: tl.constexpr):
    """One safeguarded step of lo in the bracket, all [ROWS]; rows that are done keep theirs."""
    mass = count + unsaturated
    ratio = residual * inv_budget
    # where no entry is below the threshold the step is beyond every bracket
    least = tl.maximum(unsaturated, 1e-30)
    if ROWS > 1:
        # rows that share a program are short, and what is done once a row weighs as much as a sweep: log(1 + ratio) = p / q, the
        # Padé approximant of order [3/3], so that one division does
        ratio = tl.minimum(ratio, 1e3)
        p = ratio * (60.0 + ratio * (60.0 + ratio * 11.0))
        q = 60.0 + ratio * (90.0 + ratio * (36.0 + ratio * 3.0))
        inverse = _reciprocal(least * q)
        inv_u = q * inverse
        step = mass * p * inverse
    else:
        # log(F / k), where that is close to 1 without the rounding of the quotient
        log_f = tl.where(tl.abs(ratio) < 1e-3, ratio * (1.0 - 0.5 * ratio), tl.log(tl.maximum(1.0 + ratio, 1e-37)))
        inv_u = _reciprocal(least)
        step = mass * inv_u * log_f
    # F < k: the root if no entry changes sides is above the root, and -log(1 + x) <= 2 / sqrt(1 + x) - 2; some ulps are rounding's
    beyond = tl.minimum(2.0 * tl.rsqrt(1.0 + tl.maximum(-residual * inv_u, 0.0)) - (2.0 - 4e-6), 0.0)
    low = tl.where(residual > 0, tl.maximum(low, lo), low)
    high = tl.where(residual > 0, high, tl.minimum(high, lo + eps * beyond))
    target = lo + eps * step
    inside = (target > low) & (target < high)
    if ROWS > 1:
        # far from there the approximant is of no use
        inside = inside & (ratio > -0.95)
    bisect = ~inside | ((sweep >= PATIENCE) & (sweep % 2 == 1))
    # a bound may be beyond what the type holds
    target = tl.where(bisect, 0.5 * tl.maximum(low, -1e38) + 0.5 * tl.minimum(high, 1e38), target)
    return tl.where(done, lo, target), low, high


@triton.jit
def _largest(x):
    """The largest number of x's type."""
    return tl.full((), 1.7976931348623157e308 if x.dtype == tl.float64 else 3.4028234663852886e38, x.dtype)


@triton.jit
def _recentre(hi, lo, low, high, which, COMPUTE: tl.constexpr):
    """Moves lo into hi, as far as a float can hold it, in the rows ``which``; the bracket goes along."""
    # a bracket is wider than it has to be: its middle may be beyond the largest number
    moved = tl.where(which, tl.minimum(tl.maximum(hi + lo, -_largest(hi)), _largest(hi)), hi)
    shift = moved - hi
    # two-sum (Knuth): what hi rounds away stays in lo
    back = shift - lo
    new_lo = tl.where(which, (hi - (moved - shift)) - back, lo)
    ULP: tl.constexpr = 2.0**-52 if tl.float64 == COMPUTE else 2.0**-23
    low = tl.where(which, (low - shift) - ULP * tl.abs(low) - ULP * tl.abs(shift), low)
    high = tl.where(which, (high - shift) + ULP * tl.abs(high) + ULP * tl.abs(shift), high)
    return moved, new_lo, low, high


@triton.jit
def _weights(s, hi, scale):
    """w, at most 2**CLIP; 0 for NaN and +inf, which are counted elsewhere, as for -inf."""
    w = tl.exp2(tl.minimum((s - spread(hi)) * spread(scale), CLIP))
    return tl.where(s < float("inf"), w, 0.0)


@triton.jit
def _power(lo, scale):
    """exp(lo / eps) and its inverse, inside the range of the type."""
    x = tl.minimum(tl.maximum(lo * scale, -CLIP), CLIP)
    return tl.exp2(x), tl.exp2(-x)


@triton.jit
def _finish(hi, lo, bad, full, empty):
    """The stored threshold: NaN for a NaN row, -inf where all is saturated, +inf where all that is finite is 0."""
    hi = tl.where(full, float("-inf"), tl.where(empty, float("inf"), hi))
    hi = tl.where(bad, float("nan"), hi)
    lo = tl.where(bad | full | empty, 0.0, lo)
    return hi, lo


@triton.jit
def _lam(s, hi, lo, scale, k):
    """lam of a tile from the stored threshold; k tells a row with no budget from one that +inf scores use up."""
    d = (s - spread(hi)) - spread(lo)
    lam = tl.where(d >= 0, 1.0, tl.exp2(tl.minimum(d, 0.0) * spread(scale)))
    lam = tl.where(s == float("inf"), 1.0, lam)
    lam = tl.where((s > float("-inf")) & spread(k > 0), lam, 0.0)
    return tl.where(spread(hi != hi), float("nan"), lam)


@triton.jit
def _product(x, y, REPS: tl.constexpr):
    """x y for a sum over the row; 0 where x is."""
    product = x * y
    if REPS == 1:
        # a thread of a small tile may have a single entry: its product may not meet the sum of another thread, see rows.py
        product = tl.where(x != 0, product, 0.0)
    return product


@triton.jit
def _finite(x):
    return (x > float("-inf")) & (x < float("inf"))


@triton.jit
def _instead(odd, new, old):
    """What is told of odd rows, which is not to be seen in those beside them; a row alone here is an odd one."""
    if old.shape[0] == 1:
        return new
    else:
        return tl.where(odd, new, old)


@triton.jit
def _any(flags):
    return tl.max(flags.to(tl.int32), 0) > 0


@triton.jit
def _examine(
    scores_ptr, mask_ptr, rows, start, end, stride, mask_stride, near,
    HAS_MASK: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """What there is to know of a share of odd rows, all [ROWS]: how many scores are finite, +inf and NaN, the least and greatest
    finite one; how many lie within ``near`` of 0, and how many finite ones above; the sum of those within, and of their squares.

    Such rows are rare: in narrow tiles, so that the registers of the kernel are not more for their sake.
    """
    cols = columns(1, LANES, VEC)
    n_finite = tl.zeros([ROWS, LANES], tl.int32)
    n_inf = tl.zeros([ROWS, LANES], tl.int32)
    n_nan = tl.zeros([ROWS, LANES], tl.int32)
    n_near = tl.zeros([ROWS, LANES], tl.int32)
    n_above = tl.zeros([ROWS, LANES], tl.int32)
    opposite = tl.full([ROWS, LANES], float("-inf"), COMPUTE)
    greatest = tl.full([ROWS, LANES], float("-inf"), COMPUTE)
    sum1 = tl.zeros([ROWS, LANES], COMPUTE)
    sum2 = tl.zeros([ROWS, LANES], COMPUTE)
    for tile in range(start, end, LANES * VEC):
        s = load_tile(scores_ptr, mask_ptr, rows, tile + cols, tile + cols < end, stride, mask_stride, HAS_MASK, EVEN, COMPUTE)
        finite = _finite(s)
        n_finite += fold(finite.to(tl.int32))
        n_inf += fold((s == float("inf")).to(tl.int32))
        n_nan += fold((s != s).to(tl.int32))
        opposite = tl.maximum(opposite, fold_max(tl.where(finite, -s, float("-inf"))))
        greatest = tl.maximum(greatest, fold_max(tl.where(finite, s, float("-inf"))))
        within = tl.abs(s) <= spread(near)
        n_near += fold(within.to(tl.int32))
        n_above += fold((finite & (s > spread(near))).to(tl.int32))
        d = tl.where(within, s, 0.0)
        sum1 += fold(d)
        sum2 += fold(_product(d, d, 1))
    of_inf, of_nan = tl.split(tl.sum(tl.join(n_inf, n_nan), 1))
    of_near, of_above = tl.split(tl.sum(tl.join(n_near, n_above), 1))
    opposite, greatest = tl.split(tl.max(tl.join(opposite, greatest), 1))
    sum1, sum2 = tl.split(tl.sum(tl.join(sum1, sum2), 1))
    return tl.sum(n_finite, 1), of_inf, of_nan, -opposite, greatest, of_near, of_above, sum1, sum2


@triton.jit
def _sweep(
    scores_ptr, mask_ptr, lam_ptr, rows, live, start, end, n_cols, stride, mask_stride, hi, scale, q, inverse, turn,
    STORE: tl.constexpr, HAS_MASK: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr,
    REPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One sweep over a share of a row that is re-read: the sum of w below q and the number of the others, each [ROWS].

    STORE: also lam at this threshold. A tile is loaded while the one before it is worked on.
    """
    BLOCK: tl.constexpr = REPS * LANES * VEC
    cols = columns(REPS, LANES, VEC)
    weight = tl.zeros([ROWS, LANES], COMPUTE)
    saturated = tl.zeros([ROWS, LANES], tl.int32)
    n_tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK)
    ahead = start + back_and_forth(0, n_tiles, turn) * BLOCK + cols
    following = load_tile(scores_ptr, mask_ptr, rows, ahead, ahead < end, stride, mask_stride, HAS_MASK, EVEN, COMPUTE)
    for index in range(0, n_tiles):
        s, at = following, ahead
        ahead = start + back_and_forth(tl.minimum(index + 1, n_tiles - 1), n_tiles, turn) * BLOCK + cols
        following = load_tile(scores_ptr, mask_ptr, rows, ahead, ahead < end, stride, mask_stride, HAS_MASK, EVEN, COMPUTE)
        w = _weights(s, hi, scale)
        over = w >= spread(q)
        weight += fold(tl.where(over, 0.0, w))
        saturated += fold(over.to(tl.int32))
        if STORE:
            lam = tl.minimum(w * spread(inverse), 1.0)
            inside = spread(live) if EVEN else spread(live) & (at < end)
            tl.store(lam_ptr + spread(rows * n_cols) + at, lam.to(lam_ptr.dtype.element_ty), mask=inside)
    return tl.sum(weight, 1), tl.sum(saturated, 1)


@triton.jit(do_not_specialize=["n_rows", "k_stride", "eps_stride"])
def _forward(
    scores_ptr,
    k_ptr,
    eps_ptr,
    mask_ptr,
    lam_ptr,
    threshold_ptr,
    words_ptr,
    sweeps_ptr,
    k_value: tl.float64,
    eps_value: tl.float64,
    n_rows,
    n_cols,
    chunk,
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
    HELD: tl.constexpr,
    EVEN: tl.constexpr,
    COUNT: tl.constexpr,
    COOPERATIVE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    P_BLOCK: tl.constexpr,
    RING: tl.constexpr,
    REPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
):
    """PROGRAMS programs share a row, ``chunk`` columns each; HELD: these fit a tile, and stay in registers.

    COUNT stores the number of sweeps of every program, or -1 where it was not alive to the end (see ``rows.exchange``).
    """
    BLOCK: tl.constexpr = REPS * LANES * VEC
    n_cols, chunk = multiple(n_cols, UNIT), multiple(chunk, UNIT)
    scores_stride, mask_stride = multiple(scores_stride, UNIT), multiple(mask_stride, UNIT)
    program = tl.program_id(0).to(tl.int64)
    part = (program % PROGRAMS).to(tl.int32)
    start = part * chunk
    end = tl.minimum(start + chunk, n_cols)
    cols = columns(REPS, LANES, VEC)
    if PROGRAMS > 1:
        words_ptr += (program // PROGRAMS) * (RING * SLOTS * PROGRAMS)
    rows = (program // PROGRAMS) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    # a program's rows beyond the last repeat it, unstored
    rows = tl.minimum(rows, n_rows - 1)
    k = row_value(k_ptr, k_value, rows, live, k_stride, K_IS_TENSOR, COMPUTE)
    eps = row_value(eps_ptr, eps_value, rows, live, eps_stride, EPS_IS_TENSOR, COMPUTE)
    # what is masked has no influence, not even as the point that the others are measured from
    there = live & (n_cols > 0)
    anchor = tl.load(scores_ptr + rows * scores_stride, mask=there, other=0.0).to(COMPUTE)
    if HAS_MASK:
        anchor = tl.where(tl.load(mask_ptr + rows * mask_stride, mask=there, other=0) != 0, anchor, 0.0)
    anchor = tl.where(_finite(anchor), anchor, 0.0)

    alive = n_rows > 0
    epoch = part * 0 + 1

    # --- the moments of the row
    if HELD:
        s = load_tile(
            scores_ptr, mask_ptr, rows, start + cols, start + cols < end, scores_stride, mask_stride,
            HAS_MASK, EVEN, COMPUTE,
        )  # fmt: skip
        if EVEN and not HAS_MASK:
            d = s - spread(anchor)
            sum1, sum2 = row_sums(d, _product(d, d, REPS))
            n_finite = tl.full([ROWS], BLOCK, tl.int32)
        else:
            valid = s != float("-inf")
            d = tl.where(valid, s - spread(anchor), 0.0)
            sum1, sum2, counted = row_sums3(d, _product(d, d, REPS), valid.to(COMPUTE))
            n_finite = counted.to(tl.int32)
        prior = anchor
    else:
        # a tile of every program has the first guess, so that this pass over the row is a sweep as well
        following = load_tile(
            scores_ptr, mask_ptr, rows, start + cols, start + cols < end, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE
        )
        s = following
        valid = s != float("-inf")
        d = tl.where(valid, s - spread(anchor), 0.0)
        sum1, sum2, counted = row_sums3(d, _product(d, d, REPS), valid.to(COMPUTE))
        seen = tl.minimum(n_cols, BLOCK)
        if PROGRAMS > 1:
            seen = PROGRAMS * tl.minimum(chunk, BLOCK)
            all1, counts, all2, alive = exchange(
                words_ptr, sum1, counted.to(tl.int32), sum2, part, epoch, alive, True, COOPERATIVE, PROGRAMS, P_BLOCK, RING
            )
            epoch += 1
            sum1 = tl.zeros_like(sum1) + tl.sum(all1, 0)
            sum2 = tl.zeros_like(sum2) + tl.sum(all2, 0)
            counted = tl.zeros_like(counted) + tl.sum(counts, 0).to(COMPUTE)
        prior = _guess_from_some(k, eps, anchor, seen.to(COMPUTE), counted, sum1, sum2, n_cols)
        prior_scale = 1.4426950408889634 / eps
        sum1_acc = tl.zeros([ROWS, LANES], COMPUTE)
        sum2_acc = tl.zeros([ROWS, LANES], COMPUTE)
        weight_acc = tl.zeros([ROWS, LANES], COMPUTE)
        count_acc = tl.zeros([ROWS, LANES], tl.int32)
        over_acc = tl.zeros([ROWS, LANES], tl.int32)
        for tile in range(start, end, BLOCK):
            s = following
            ahead = tile + BLOCK + cols
            following = load_tile(
                scores_ptr, mask_ptr, rows, ahead, ahead < end, scores_stride, mask_stride, HAS_MASK, False, COMPUTE
            )
            valid = s != float("-inf")
            d = tl.where(valid, s - spread(anchor), 0.0)
            sum1_acc += fold(d)
            sum2_acc += fold(_product(d, d, REPS))
            count_acc += fold(valid.to(tl.int32))
            v = _weights(s, prior, prior_scale)
            over = v >= 1.0
            weight_acc += fold(tl.where(over, 0.0, v))
            over_acc += fold(over.to(tl.int32))
        sum1, sum2 = tl.split(tl.sum(tl.join(sum1_acc, sum2_acc), 1))
        n_finite = tl.sum(count_acc, 1)
        weight = tl.sum(weight_acc, 1)
        saturated = tl.sum(over_acc, 1)
    if PROGRAMS > 1:
        all1, counts, all2, alive = exchange(
            words_ptr, sum1, n_finite, sum2, part, epoch, alive, True, COOPERATIVE, PROGRAMS, P_BLOCK, RING
        )
        epoch += 1
        # back to [ROWS], which is [1] here
        sum1 = tl.zeros_like(sum1) + tl.sum(all1, 0)
        sum2 = tl.zeros_like(sum2) + tl.sum(all2, 0)
        n_finite = tl.zeros_like(n_finite) + tl.sum(counts, 0)
        if not HELD:
            all1, counts, _, alive = exchange(
                words_ptr, weight, saturated, weight, part, epoch, alive, False, COOPERATIVE, PROGRAMS, P_BLOCK, RING
            )
            epoch += 1
            weight = tl.zeros_like(weight) + tl.sum(all1, 0)
            saturated = tl.zeros_like(saturated) + tl.sum(counts, 0)
    n_nan = tl.zeros([ROWS], tl.int32)
    n_inf = tl.zeros([ROWS], tl.int32)
    most = tl.sqrt(sum2) * 1.001 + 1e-18
    least = -most
    need = k
    n_part = n_finite.to(COMPUTE)
    extra = tl.zeros([ROWS], COMPUTE)
    # NaN, infinities, sums that overflow, or so far from each other for the temperature that the moments tell nothing
    odd = ~((sum2 < float("inf")) & (sum2 <= n_part * (eps * WIDE) * (eps * WIDE)))
    special = _any(odd)
    if special:
        near = tl.where(sum2 < float("inf"), tl.sqrt(sum2 / n_part) * FAR, NEAR)
        finite, of_inf, of_nan, smallest, largest, of_near, of_above, near1, near2 = _examine(
            scores_ptr, mask_ptr, rows, start, end, scores_stride, mask_stride, near,
            HAS_MASK, EVEN, COMPUTE, ROWS, LANES, VEC,
        )  # fmt: skip
        if PROGRAMS > 1:
            within = tl.arange(0, P_BLOCK) < PROGRAMS
            finite_or_nan = tl.where(of_nan > 0, -1, finite)
            # a loop, for an exchange is a lot of code
            for turn in range(0, 4):
                told = tl.where(turn == 0, finite_or_nan, tl.where(turn == 1, of_inf, tl.where(turn == 2, of_near, of_above)))
                all1, counts, all2, alive = exchange(
                    words_ptr, tl.where(turn == 0, smallest, near1), told, tl.where(turn == 0, -largest, near2), part,
                    epoch + turn, alive, True, COOPERATIVE, PROGRAMS, P_BLOCK, RING,
                )  # fmt: skip
                count = tl.zeros_like(finite) + tl.sum(tl.maximum(counts, 0), 0)
                if turn == 0:
                    of_nan = tl.zeros_like(of_nan) + tl.sum((counts < 0).to(tl.int32), 0)
                    finite = count
                    smallest = tl.zeros_like(smallest) + tl.min(tl.where(within, all1, float("inf")), 0)
                    largest = tl.zeros_like(largest) - tl.min(tl.where(within, all2, float("inf")), 0)
                elif turn == 1:
                    of_inf = count
                elif turn == 2:
                    of_near = count
                else:
                    of_above = count
                    near1 = tl.zeros_like(near1) + tl.sum(all1, 0)
                    near2 = tl.zeros_like(near2) + tl.sum(all2, 0)
            epoch += 4
        n_nan = _instead(odd, of_nan, n_nan)
        n_inf = _instead(odd, of_inf, n_inf)
        n_finite = _instead(odd, finite, n_finite)
        # without what is far off, where the threshold is among the others: above -near, and not far above near
        of_all = n_finite.to(COMPUTE)
        need = k - n_inf.to(COMPUTE)
        n_part = of_all
        rest = need - of_above.to(COMPUTE)
        among = odd & (rest > 0) & (rest < of_near.to(COMPUTE))
        need = tl.where(among, rest, need)
        n_part = tl.where(among, of_near.to(COMPUTE), of_all)
        extra = tl.where(among, eps * tl.log(of_all / n_part), 0.0)
        # no number is too far from 0
        anchor = tl.where(among | (odd & (largest - smallest == float("inf"))), 0.0, anchor)
        sum1 = tl.where(among, near1, sum1)
        sum2 = tl.where(among, near2, sum2)
        reach = tl.where(among, eps * tl.log(of_all / rest), 0.0)
        least = _instead(odd, tl.where(among, tl.maximum(smallest, -near) - reach, smallest - anchor), least)
        most = _instead(odd, tl.where(among, tl.minimum(largest, near), largest - anchor), most)
        # the sums of a first sweep at another guess are worth nothing
        prior = tl.full([ROWS], float("nan"), COMPUTE)
    budget, safe_eps, hi, low, high, spacing, deviation, bad, full, empty = _begin(
        k, eps, n_finite, n_inf, n_nan, anchor, least, most, need, n_part, sum1, sum2, extra, prior, TOLERANCE, not HELD
    )
    scale = 1.4426950408889634 / safe_eps
    inv_budget = 1.0 / budget
    lo = tl.zeros_like(hi)
    done = bad | full | empty
    special = special | _any(done)
    if HELD:
        if ROWS > 1:
            # the moments of a short row miss by several entries: those above the guess are counted, which is cheaper than a sweep
            over = row_sum((s >= spread(hi)).to(COMPUTE))
            # F is no less than their number
            low = tl.where(over >= k, tl.maximum(low, 0.0), low)
            lo = tl.minimum(tl.maximum((over - k) * spacing + safe_eps, -0.5 * deviation), 0.5 * deviation)
            hi, lo, low, high = _recentre(hi, tl.minimum(tl.maximum(lo, low), high), low, high, ~done, COMPUTE)
        if special:
            x = load_tile(
                scores_ptr, mask_ptr, rows, start + cols, start + cols < end, scores_stride, mask_stride,
                HAS_MASK, EVEN, COMPUTE,
            )  # fmt: skip
            w = _weights(x, hi, scale)
        else:
            w = tl.exp2(tl.minimum((s - spread(hi)) * spread(scale), CLIP))

    # --- sweeps
    sweep = 0
    storing = n_rows < 0
    lam_is_stored = n_rows < 0
    last_residual = tl.zeros_like(hi)
    last_unsaturated = tl.zeros_like(hi)
    if not HELD and _any(~done) & ~special:
        one = tl.full([ROWS], 1.0, COMPUTE)
        unsaturated, count, residual, done = _judge(saturated, weight, one, k, n_inf, budget, TOLERANCE)
        last_residual, last_unsaturated = residual, unsaturated
        lo, low, high = _advance(0, unsaturated, count, residual, inv_budget, safe_eps, lo, low, high, done, ROWS)
        storing = ~_any(tl.abs(lo) * scale > NEXT_TO_NOTHING)
        hi, lo, low, high = _recentre(hi, lo, low, high, ~done, COMPUTE)
        sweep = 1
    pending = _any(~done) & alive
    while pending & (sweep < MAX_SWEEPS):
        q, inverse = _power(lo, scale)
        at = lo
        if HELD:
            free = (w < spread(q)).to(COMPUTE)
            weight, n_free = row_sums(w * free, free)
            saturated = BLOCK - n_free
        else:
            if storing:
                weight, saturated = _sweep(
                    scores_ptr, mask_ptr, lam_ptr, rows, live, start, end, n_cols, scores_stride, mask_stride,
                    hi, scale, q, inverse, sweep, True, HAS_MASK, EVEN, COMPUTE, REPS, ROWS, LANES, VEC,
                )  # fmt: skip
            else:
                weight, saturated = _sweep(
                    scores_ptr, mask_ptr, lam_ptr, rows, live, start, end, n_cols, scores_stride, mask_stride,
                    hi, scale, q, inverse, sweep, False, HAS_MASK, EVEN, COMPUTE, REPS, ROWS, LANES, VEC,
                )  # fmt: skip
        if PROGRAMS > 1:
            all1, counts, _, alive = exchange(
                words_ptr, weight, saturated.to(tl.int32), weight, part, epoch, alive, False, COOPERATIVE, PROGRAMS, P_BLOCK, RING
            )
            epoch += 1
            weight = tl.zeros_like(weight) + tl.sum(all1, 0)
            saturated = tl.zeros([ROWS], tl.int32) + tl.sum(counts, 0)
        unsaturated, count, residual, converged = _judge(saturated, weight, inverse, k, n_inf, budget, TOLERANCE)
        last_residual = tl.where(done, last_residual, residual)
        last_unsaturated = tl.where(done, last_unsaturated, unsaturated)
        done = done | converged
        pending = _any(~done) & alive
        lam_is_stored = storing & ~pending
        if pending:
            lo, low, high = _advance(sweep, unsaturated, count, residual, inv_budget, safe_eps, lo, low, high, done, ROWS)
            if HELD:
                far = ~done & (tl.abs(lo) * scale > DRIFT) & (hi + lo != hi)
                if _any(far):
                    hi, lo, low, high = _recentre(hi, lo, low, high, far, COMPUTE)
                    x = load_tile(
                        scores_ptr, mask_ptr, rows, start + cols, start + cols < end, scores_stride, mask_stride,
                        HAS_MASK, EVEN, COMPUTE,
                    )  # fmt: skip
                    w = _weights(x, hi, scale)
            else:
                storing = ~special & ~_any(tl.abs(lo - at) * scale > NEXT_TO_NOTHING)
                hi, lo, low, high = _recentre(hi, lo, low, high, ~done, COMPUTE)
        sweep += 1

    # the last step of a converged row is free, and only worth taking where the residual is small against U
    polish = tl.abs(last_residual) <= TOLERANCE * last_unsaturated
    step = tl.where(polish, safe_eps * last_residual * _reciprocal(tl.maximum(last_unsaturated, 1e-30)), 0.0)
    if not HELD:
        # where lam has been stored it would hardly move it, or lam is stored anew
        lam_is_stored = lam_is_stored & ~_any(tl.abs(step) * scale > TOLERANCE / 2)
        step = tl.where(lam_is_stored, 0.0, step)
    lo += step

    # --- the answer
    stored = spread(live) & alive
    q, inverse = _power(lo, scale)
    hi, lo = _finish(hi, lo, bad, full, empty)
    if HELD and not special:
        inside = stored if EVEN else stored & (start + cols < end)
        lam = tl.minimum(w * spread(inverse), 1.0)
        tl.store(lam_ptr + spread(rows * n_cols) + start + cols, lam.to(lam_ptr.dtype.element_ty), mask=inside)
    elif special:
        narrow = columns(1, LANES, VEC)
        for tile in range(start, end, LANES * VEC):
            inside = tile + narrow < end
            x = load_tile(scores_ptr, mask_ptr, rows, tile + narrow, inside, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE)
            lam = _lam(x, hi, lo, scale, k)
            inside = stored if EVEN else stored & inside
            tl.store(lam_ptr + spread(rows * n_cols) + tile + narrow, lam.to(lam_ptr.dtype.element_ty), mask=inside)
    elif not HELD and not lam_is_stored:
        _sweep(
            scores_ptr, mask_ptr, lam_ptr, rows, live & alive, start, end, n_cols, scores_stride, mask_stride,
            hi, scale, q, inverse, sweep, True, HAS_MASK, EVEN, COMPUTE, REPS, ROWS, LANES, VEC,
        )  # fmt: skip
    first = live & alive & (part == 0)
    tl.store(threshold_ptr + rows * 2, hi, mask=first)
    tl.store(threshold_ptr + rows * 2 + 1, lo, mask=first)
    if COUNT:
        tl.store(sweeps_ptr + rows * PROGRAMS + part, tl.where(alive, sweep, -1) + tl.zeros([ROWS], tl.int32), mask=live)


WHOLE, SUMS, APPLY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a backward launch does: all of it, or for programs that share a row first the sums of each, then the rest."""


@triton.jit
def _backward_tile(
    scores_ptr, grad_ptr, mask_ptr, rows, cols, inside, scores_stride, grad_stride, mask_stride, hi, lo, scale,
    HAS_MASK: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """d = s - tau, g, and lam where an entry is unsaturated (0 elsewhere), of a tile."""
    s = load_tile(scores_ptr, mask_ptr, rows, cols, inside, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE)
    at = grad_ptr + spread(rows * grad_stride) + cols
    if EVEN:
        g = tl.load(at).to(COMPUTE)
    else:
        g = tl.load(at, mask=inside, other=0.0).to(COMPUTE)
    d = (s - spread(hi)) - spread(lo)
    lam = tl.where(d < 0, tl.exp2(d * spread(scale)), 0.0)
    # an entry without mass has no part in the gradient, whatever its g
    g = tl.where(lam > 0, g, 0.0)
    d = tl.where(lam > 0, d, 0.0)
    return d, g, lam


@triton.jit
def _gradient(g, lam, gbar, inv_eps, nan_row):
    ds = tl.where(lam > 0, lam * (g - spread(gbar)) * spread(inv_eps), 0.0)
    return tl.where(spread(nan_row), float("nan"), ds)


@triton.jit(do_not_specialize=["n_rows", "eps_stride"])
def _backward(
    grad_ptr,
    scores_ptr,
    threshold_ptr,
    eps_ptr,
    mask_ptr,
    dscores_ptr,
    dk_ptr,
    deps_ptr,
    sums_ptr,
    eps_value: tl.float64,
    n_rows,
    n_cols,
    chunk,
    grad_stride,
    scores_stride,
    mask_stride,
    eps_stride,
    EPS_IS_TENSOR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PHASE: tl.constexpr,
    HELD: tl.constexpr,
    EVEN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    P_BLOCK: tl.constexpr,
    REPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
):
    """PROGRAMS programs share a row, ``chunk`` columns each; HELD: these fit a tile. sums [rows, 2, PROGRAMS], deps a program."""
    BLOCK: tl.constexpr = REPS * LANES * VEC
    n_cols, chunk, grad_stride = multiple(n_cols, UNIT), multiple(chunk, UNIT), multiple(grad_stride, UNIT)
    scores_stride, mask_stride = multiple(scores_stride, UNIT), multiple(mask_stride, UNIT)
    program = tl.program_id(0).to(tl.int64)
    if PHASE == APPLY:
        # the other way round: the last that the first launch has read is in the cache
        program = tl.num_programs(0) - 1 - program
    part = (program % PROGRAMS).to(tl.int32)
    rows = (program // PROGRAMS) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    rows = tl.minimum(rows, n_rows - 1)
    start = part * chunk
    end = tl.minimum(start + chunk, n_cols)
    cols = columns(REPS, LANES, VEC)
    hi = tl.load(threshold_ptr + rows * 2)
    lo = tl.load(threshold_ptr + rows * 2 + 1)
    eps = row_value(eps_ptr, eps_value, rows, live, eps_stride, EPS_IS_TENSOR, COMPUTE)
    scale = 1.4426950408889634 / eps
    inv_eps = 1.0 / eps
    if HELD:
        d, g, lam = _backward_tile(
            scores_ptr, grad_ptr, mask_ptr, rows, start + cols, start + cols < end, scores_stride, grad_stride, mask_stride,
            hi, lo, scale, HAS_MASK, EVEN, COMPUTE,
        )  # fmt: skip
    if PHASE == APPLY:
        parts = tl.arange(0, P_BLOCK)[None, :]
        at = sums_ptr + rows[:, None] * (2 * PROGRAMS) + parts
        mass = tl.sum(tl.load(at, mask=parts < PROGRAMS, other=0.0), 1)
        weighted = tl.sum(tl.load(at + PROGRAMS, mask=parts < PROGRAMS, other=0.0), 1)
    elif HELD:
        mass, weighted = row_sums(lam, _product(lam, g, REPS))
    else:
        mass_acc = tl.zeros([ROWS, LANES], COMPUTE)
        weighted_acc = tl.zeros([ROWS, LANES], COMPUTE)
        for tile in range(start, end, BLOCK):
            d, g, lam = _backward_tile(
                scores_ptr, grad_ptr, mask_ptr, rows, tile + cols, tile + cols < end, scores_stride, grad_stride, mask_stride,
                hi, lo, scale, HAS_MASK, EVEN, COMPUTE,
            )  # fmt: skip
            mass_acc += fold(lam)
            weighted_acc += fold(lam * g)
        mass, weighted = tl.split(tl.sum(tl.join(mass_acc, weighted_acc), 1))
    if PHASE == SUMS:
        at = sums_ptr + rows * (2 * PROGRAMS) + part
        tl.store(at, mass, mask=live)
        tl.store(at + PROGRAMS, weighted, mask=live)
    else:
        nan_row = hi != hi
        gbar = tl.where(mass > 0, weighted / mass, 0.0)
        gbar = tl.where(nan_row, float("nan"), gbar)
        if HELD:
            ds = _gradient(g, lam, gbar, inv_eps, nan_row)
            inside = spread(live) if EVEN else spread(live) & (start + cols < end)
            tl.store(dscores_ptr + spread(rows * n_cols) + start + cols, ds.to(dscores_ptr.dtype.element_ty), mask=inside)
            if EPS_IS_TENSOR:
                deps = row_sum(d * ds)
        else:
            deps_acc = tl.zeros([ROWS, LANES], COMPUTE)
            n_tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK)
            for index in range(0, n_tiles):
                tile = start + back_and_forth(index, n_tiles, 1) * BLOCK
                inside = tile + cols < end
                d, g, lam = _backward_tile(
                    scores_ptr, grad_ptr, mask_ptr, rows, tile + cols, inside, scores_stride, grad_stride, mask_stride,
                    hi, lo, scale, HAS_MASK, EVEN, COMPUTE,
                )  # fmt: skip
                ds = _gradient(g, lam, gbar, inv_eps, nan_row)
                if EPS_IS_TENSOR:
                    deps_acc += fold(d * ds)
                inside = spread(live) if EVEN else spread(live) & inside
                tl.store(dscores_ptr + spread(rows * n_cols) + tile + cols, ds.to(dscores_ptr.dtype.element_ty), mask=inside)
            deps = tl.sum(deps_acc, 1)
        tl.store(dk_ptr + rows, gbar, mask=live & (part == 0))
        if EPS_IS_TENSOR:
            tl.store(deps_ptr + rows * PROGRAMS + part, -deps / eps, mask=live)


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
    lam, threshold, _ = _solve(scores, k, eps, mask, config, count=False)
    return lam, threshold


def count_sweeps(
    scores: torch.Tensor,
    k: torch.Tensor | float,
    eps: torch.Tensor | float,
    mask: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """How many sweeps over each row the forward does, int32 [R]; the arguments are those of :func:`soft_topk_forward`.

    Rows that share a program do as many as the slowest of them. ``config=None`` is the one that a call would get.
    """
    if config is None:
        config = resolve("soft_topk", "forward", scores.dtype, scores.shape[0], scores.shape[1], scores.device)
    sweeps = _solve(scores, k, eps, mask, config, count=True)[2]
    assert sweeps is not None
    return sweeps


def _solve(
    scores: torch.Tensor,
    k: torch.Tensor | float,
    eps: torch.Tensor | float,
    mask: torch.Tensor | None,
    config: LaunchConfig,
    count: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    n_rows, n_cols = scores.shape
    device = scores.device
    compute, _ = compute_dtypes(scores.dtype)
    eps = eps if isinstance(eps, torch.Tensor) else positive(eps, compute)
    k_ptr, k_value, k_stride = row_value_args(k)
    eps_ptr, eps_value, eps_stride = row_value_args(eps)
    mask_ptr, mask_stride = mask_args(mask)
    prepared, programs, ring, counted = _prepare_forward(
        config,
        n_rows,
        n_cols,
        scores.dtype,
        device.index,
        processors(device),
        cooperative(device),
        (scores.stride(0), mask_stride, k_stride, eps_stride),
        (dtype_of(k_ptr), dtype_of(eps_ptr), dtype_of(mask)),
        count,
    )
    lam = scores.new_empty(n_rows, n_cols)
    threshold = scores.new_empty(n_rows, 2, dtype=compute)
    words = scores.new_zeros((n_rows, ring, SLOTS.value, programs), dtype=torch.int64) if programs > 1 else None
    sweeps = scores.new_zeros((n_rows, programs), dtype=torch.int32) if counted else None
    pointers = (scores, k_ptr, eps_ptr, mask_ptr, lam, threshold, words, sweeps)
    launch(prepared, pointers, (k_value, eps_value))
    if sweeps is None:
        return lam, threshold, None
    while bool((sweeps < 0).any()):
        # programs that share a row did not wait for each other, see rows.exchange
        launch(prepared, pointers, (k_value, eps_value))
    return lam, threshold, sweeps.amax(1)


@functools.lru_cache(maxsize=4096)
def _prepare_forward(
    config: LaunchConfig,
    n_rows: int,
    n_cols: int,
    dtype: torch.dtype,
    device: int | None,
    processors: int,
    cooperative: bool,
    strides: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype | None, ...],
    count: bool,
) -> tuple[Prepared, int, int, bool]:
    """The launch, the number of programs a row, of exchanges their words hold, and whether sweeps are counted.

    ``strides`` are those of scores, mask, k and eps; ``dtypes`` those of k, eps and mask, None where there is no tensor.
    """
    check_config("soft_topk", config, n_cols)
    shape = tiles(config, n_rows, n_cols, dtype.itemsize, processors, strides[:2])
    compute, tl_compute = compute_dtypes(dtype)
    double = compute == torch.float64
    max_sweeps = MAX_SWEEPS_64 if double else MAX_SWEEPS_32
    shared = shape.programs > 1
    ring = 2 if cooperative else max_sweeps + 9
    counted = count or (shared and not cooperative)
    k_is_tensor, eps_is_tensor, has_mask = (dtype is not None for dtype in dtypes)
    prepared = Prepared(
        _forward,
        (-(-n_rows // shape.rows) * shape.programs,),
        (n_rows, n_cols, shape.chunk, *strides),
        device,
        K_IS_TENSOR=k_is_tensor,
        EPS_IS_TENSOR=eps_is_tensor,
        HAS_MASK=has_mask,
        COMPUTE=tl_compute,
        TOLERANCE=2.0**-48 if double else 2.0**-20,
        MAX_SWEEPS=max_sweeps,
        HELD=shape.held,
        EVEN=shape.even,
        COUNT=counted,
        COOPERATIVE=shared and cooperative,
        PROGRAMS=shape.programs,
        P_BLOCK=next_power_of_2(shape.programs),
        RING=ring,
        REPS=shape.reps,
        ROWS=shape.rows,
        LANES=shape.lanes,
        VEC=shape.vec,
        UNIT=shape.unit,
        **compile_options(config),
        **({"launch_cooperative_grid": True} if shared and cooperative else {}),
    )
    return prepared, shape.programs, ring, counted


def soft_topk_backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor,
    eps: torch.Tensor | float,
    mask: torch.Tensor | None,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of scores [R, n] (in their dtype), of k [R] and of eps [R] (in the compute type; None for a number eps).

    Args:
        grad: the gradient of lam, [R, n], stride(1) == 1.
        scores, eps, mask, config: as in :func:`soft_topk_forward`.
        threshold: what the forward returned.
    """
    n_rows, n_cols = scores.shape
    compute, _ = compute_dtypes(scores.dtype)
    eps = eps if isinstance(eps, torch.Tensor) else positive(eps, compute)
    eps_ptr, eps_value, eps_stride = row_value_args(eps)
    mask_ptr, mask_stride = mask_args(mask)
    launches, programs = _prepare_backward(
        config,
        n_rows,
        n_cols,
        scores.dtype,
        scores.device.index,
        (grad.stride(0), scores.stride(0), mask_stride, eps_stride),
        (grad.dtype, threshold.dtype, dtype_of(eps_ptr), dtype_of(mask)),
    )
    dscores = scores.new_empty(n_rows, n_cols)
    dk = scores.new_empty(n_rows, dtype=compute)
    deps = scores.new_empty(n_rows, programs, dtype=compute) if eps_ptr is not None else None
    sums = scores.new_empty(n_rows, 2, programs, dtype=compute) if programs > 1 else None
    pointers = (grad, scores, threshold, eps_ptr, mask_ptr, dscores, dk, deps, sums)
    for prepared in launches:
        launch(prepared, pointers, (eps_value,))
    if deps is not None:
        deps = deps.sum(1) if programs > 1 else deps.view(-1)
    return dscores, dk, deps


@functools.lru_cache(maxsize=4096)
def _prepare_backward(
    config: LaunchConfig,
    n_rows: int,
    n_cols: int,
    dtype: torch.dtype,
    device: int | None,
    strides: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype | None, ...],
) -> tuple[tuple[Prepared, ...], int]:
    """The launches and the number of programs a row.

    ``strides`` are those of the gradient, scores, mask and eps; ``dtypes`` those of the gradient, threshold, eps and mask, None
    where there is no tensor.
    """
    check_config("soft_topk", config, n_cols)
    shape = tiles(config, n_rows, n_cols, dtype.itemsize, None, strides[:3])
    eps_is_tensor, has_mask = (dtype is not None for dtype in dtypes[2:])
    launches = tuple(
        Prepared(
            _backward,
            (-(-n_rows // shape.rows) * shape.programs,),
            (n_rows, n_cols, shape.chunk, *strides),
            device,
            EPS_IS_TENSOR=eps_is_tensor,
            HAS_MASK=has_mask,
            COMPUTE=compute_dtypes(dtype)[1],
            PHASE=phase.value,
            HELD=shape.held,
            EVEN=shape.even,
            PROGRAMS=shape.programs,
            P_BLOCK=next_power_of_2(shape.programs),
            REPS=shape.reps,
            ROWS=shape.rows,
            LANES=shape.lanes,
            VEC=shape.vec,
            UNIT=shape.unit,
            **compile_options(config),
        )
        for phase in ((SUMS, APPLY) if shape.programs > 1 else (WHOLE,))
    )
    return launches, shape.programs
