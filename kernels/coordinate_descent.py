"""Coordinate descent for the differentiable top-k, T iterations as published, as Triton kernels.

The recurrence (Wright 2015, https://arxiv.org/abs/1502.04759, as used by CoLT5, https://arxiv.org/abs/2303.09752; eps-scaling
as in CoDA, https://arxiv.org/abs/2304.04947):

    eps_0 = max(eps_init, eps),  eps_{t+1} = max(eps_t * eps_decay, eps),  a_0 = 0,  b_0 = -s
    a_{t+1} = eps_t (log k - logsumexp((s + b_t)/eps_t)),   b_{t+1} = -relu(s + a_{t+1}),   t = 0 … T-1
    lam = exp((s + a_T + b_T)/eps_T)

For t >= 1, s + b_t = min(s, -a_t), and for t = 0 it is 0, so the state of a row is the one scalar a_t and

    a_{t+1} = eps_t (log k - log sum_i exp((min(s_i, -a_t) - m)/eps_t)) - m,   m = min(max s, -a_t),   a_1 = eps_0 (log k - log n)

No row of b is ever stored, and the shift m of the logsumexp needs no reduction of its own. Two things are left out:

- The tail. Once eps has reached its last value, exp((min(s, -a) - c)/eps) = min(w, exp((-a - c)/eps)) with the same
  w = exp((s - c)/eps) in every iteration, as long as -a stays near c: no exponential of an entry is needed, and none for lam.
- The quiet start. Where no entry is clamped, s_i <= -a_t for all i, a_{t+1} does not depend on a_t. That is certain for t = 1 if
  eps_0 log(n/k) >= max s, and then for t = 2 … as long as eps_{t-1} log(n/k) + mean s >= max s (Jensen). Of the iterations
  before the last such one nothing is computed; their states are stored as a_t = -max s, which clamps nothing either.

The forward saves a_t at the end of each of ``segments`` segments of the iterations. The backward recomputes the others, all
segments side by side, with the same code on the same start values, so every number of segments gives bitwise the same gradient.
The segment in which the tail begins recomputes all of it; programs that share a row recompute from the start, whatever was saved.

Backward, with g the gradient of lam, U_t = {s_i + a_t <= 0} (relu has gradient 0 at 0), C_t its complement:

    ds_i = [i in U_T] g_i lam_i / eps_T,   A_T = sum_i ds_i
    for t = T-1 … 1:   p_i = exp((min(s_i, -a_t) + a_{t+1})/eps_t) / k
                       dlogk += A_{t+1} eps_t;   ds_i -= [i in U_t] A_{t+1} p_i;   A_t = A_{t+1} sum_{C_t} p
    dlogk += A_1 eps_0;   dk = dlogk / k

On C_t every p is the same number, so sum_{C_t} p is a count times one exponential; where C_t is empty, A_t and all before it are
0 and the backward ends. In the tail p_i is the same exponential times a number of the row, and what is summed over an entry is
that number where the entry is unclamped: ds_i = exp((s_i - c)/eps) (… - sum_t [i in U_t] B_t).

Variants: ``resident`` keeps ``rows_per_program`` whole rows in registers; ``split`` lets several programs share a row, which wait
for each other after every sweep of the forward (``rows.exchange``) and need two launches for the backward; ``tiled`` re-reads one
row of any length in tiles of ``block`` scores, once a sweep.
"""

import functools

import torch
import triton
import triton.language as tl

from .config import LaunchConfig, next_power_of_2
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
from .rows import SLOTS, back_and_forth, columns, exchange, fold, load_tile, multiple, row_max, row_sum, row_sums, row_value, spread

LOG2E = tl.constexpr(1.4426950408889634)
K_FLOOR = tl.constexpr(1e-20)
REACH = tl.constexpr(256.0)
"""How far the threshold may move from the centre of the forward's tail: exp of the distance over eps, and its inverse."""
SPREAD = tl.constexpr(32.0)
"""How far apart the thresholds of a tail may lie in the backward, in units of log2, for all to share one exponential."""


@triton.jit
def _any(x):
    return tl.max(x.to(tl.int32), 0) > 0


@triton.jit
def _exp2_scale(e):
    """What to multiply by so that exp2 is exp(x / e); of such a scale, e."""
    # a bare number: under the interpreter a global constexpr over a tensor is no tensor
    return 1.4426950408889634 / e


@triton.jit
def _budget(k, n_valid, CLAMP_K: tl.constexpr):
    """k [R] clamped to what is there, where it came as a tensor."""
    if CLAMP_K:
        k = tl.where(k == k, tl.minimum(tl.maximum(k, 0.0), n_valid.to(k.dtype)), k)
    return k


@triton.jit
def _log_budget(k, easy):
    """log k [R] with k no lower than K_FLOOR; 0 for a row with nothing to do."""
    # the floor as a tensor: tl.maximum rounds a bare number to float32
    return tl.log(tl.maximum(tl.where(easy, 1.0, k), tl.zeros_like(k) + K_FLOOR))


@triton.jit
def _segment_bounds(segment, base, remainder):
    """First and last + 1 iteration of a segment; the first ``remainder`` segments are one iteration longer."""
    begin = segment * base + tl.minimum(segment, remainder)
    return begin, begin + base + (segment < remainder).to(tl.int32)


@triton.jit
def _next_a(total, shift, eps_t, log_k):
    return eps_t * (log_k - tl.log(total)) - shift


@triton.jit
def _recentre(largest, a, scale):
    """A centre c near the threshold [R], and exp((-a - c)/eps) and exp((max s - c)/eps)."""
    centre = tl.minimum(largest, -a)
    return centre, tl.exp2((-a - centre) * scale), tl.exp2((largest - centre) * scale)


@triton.jit
def _examine(
    scores_ptr, mask_ptr, rows, start, end, stride, mask_stride,
    HAS_MASK: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The number of valid entries and of NaN, the sum of the valid ones and the largest, of a share of odd rows; all [ROWS].

    Rows with NaN or infinities are rare: in narrow tiles, so that the registers of the kernel are not more for their sake.
    """
    cols = columns(1, LANES, VEC)
    n_valid = tl.zeros([ROWS], tl.int32)
    n_nan = tl.zeros([ROWS], tl.int32)
    total = tl.zeros([ROWS], COMPUTE)
    largest = tl.full([ROWS], float("-inf"), COMPUTE)
    for tile in range(start, end, LANES * VEC):
        s = load_tile(scores_ptr, mask_ptr, rows, tile + cols, tile + cols < end, stride, mask_stride, HAS_MASK, EVEN, COMPUTE)
        valid = s > float("-inf")
        n_valid += row_sum(valid.to(tl.int32))
        n_nan += row_sum((s != s).to(tl.int32))
        total += row_sum(tl.where(valid, s, 0.0))
        largest = tl.maximum(largest, row_max(tl.where(valid, s, float("-inf"))))
    return n_valid.to(COMPUTE), n_nan, total, largest


@triton.jit
def _out_of_reach(q, top):
    """Whether the threshold has left the centre's neighbourhood: flags [R]."""
    near = tl.minimum(q, top)
    return (near > REACH) | (near * REACH < 1.0)


@triton.jit
def _last_quiet(largest, mean, log_ratio, easy, n_iters, eps, eps_init, eps_decay):
    """The last iteration of each row [R] up to which certainly no entry is clamped; 0 where there is none."""
    floor = tl.full((), eps, tl.float64)
    eps_t = tl.full((), eps_init, tl.float64)
    room = eps_t.to(largest.dtype) * log_ratio
    # 2^-12: far more than what rounding does to the mean
    quiet = ~easy & (room >= largest + (tl.abs(largest) + tl.abs(room)) * 0.000244140625)
    last = tl.zeros_like(easy.to(tl.int32))
    t = 1
    while (t < n_iters) & _any(quiet):
        last = tl.where(quiet, t, last)
        eps_t = tl.maximum(eps_t * eps_decay, floor)
        room = eps_t.to(largest.dtype) * log_ratio
        margin = (tl.abs(largest) + tl.abs(mean) + tl.abs(room)) * 0.000244140625
        quiet = quiet & (room + mean >= largest + margin)
        t += 1
    return last


@triton.jit
def _over_programs(
    words_ptr, total, part, epoch, alive,
    COOPERATIVE: tl.constexpr, PROGRAMS: tl.constexpr, P_BLOCK: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """A sum [1] of this program's columns added up over all programs of the row, and whether that is worth anything."""
    totals, _, _, alive = exchange(
        words_ptr, total, tl.zeros_like(total).to(tl.int32), total, part, epoch, alive, False, COOPERATIVE, PROGRAMS, P_BLOCK, RING
    )
    return tl.zeros_like(total) + tl.sum(totals, 0), alive


@triton.jit
def _store_state(states_ptr, rows, stored, n_states, a, bad, dead, mine):
    value = tl.where(bad, float("nan"), tl.where(dead, float("-inf"), a))
    tl.store(states_ptr + rows * n_states + stored, value, mask=mine)


@triton.jit
def _totals_to_states(states_ptr, rows, begin, end, n_states, largest, centre, e, log_k, bad, dead, mine):
    """Makes states of what stands in their places from ``begin`` to ``end``: sums around ``centre``, or -1 for a quiet start.

    An iteration of the tail needs no logarithm of its own, only its state does; here the threads share them, one or two each.
    """
    BATCH: tl.constexpr = max(32 // max(rows.shape[0], 2), 1)
    tl.debug_barrier()
    for batch in range(begin, end, BATCH):
        which = batch + tl.arange(0, BATCH)[None, :]
        inside = mine[:, None] & (which < end)
        at = states_ptr + rows[:, None] * n_states + which
        total = tl.load(at, mask=inside, other=1.0)
        a = tl.where(total < 0, -largest[:, None], _next_a(tl.abs(total), centre[:, None], e, log_k[:, None]))
        a = tl.where(bad[:, None], float("nan"), tl.where(dead[:, None], float("-inf"), a))
        tl.store(at, a, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "k_stride", "t_tail", "n_iters", "base", "remainder", "segments"])
def _iterate(
    scores_ptr,
    k_ptr,
    mask_ptr,
    lam_ptr,
    starts_ptr,
    states_ptr,
    words_ptr,
    alive_ptr,
    k_value: tl.float64,
    eps: tl.float64,
    eps_init: tl.float64,
    eps_decay: tl.float64,
    eps_last: tl.float64,
    n_rows,
    n_cols,
    chunk,
    scores_stride,
    mask_stride,
    k_stride,
    t_tail,
    n_iters,
    base,
    remainder,
    segments,
    RECOMPUTE: tl.constexpr,
    K_IS_TENSOR: tl.constexpr,
    CLAMP_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    HELD: tl.constexpr,
    EVEN: tl.constexpr,
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
    """Runs iterations of the recurrence and stores a at the end of each output segment.

    The forward runs them all and writes lam. RECOMPUTE runs one segment from its stored start; program_id(0) counts the segments
    of the first rows, then those of the next. PROGRAMS programs share a row, ``chunk`` columns each; HELD: these fit a tile, and
    stay in registers. eps is the value from iteration t_tail on. Where programs share a row and are not COOPERATIVE, each says
    whether it was alive to the end (see ``rows.exchange``).
    """
    BLOCK: tl.constexpr = REPS * LANES * VEC
    n_cols, chunk = multiple(n_cols, UNIT), multiple(chunk, UNIT)
    scores_stride, mask_stride = multiple(scores_stride, UNIT), multiple(mask_stride, UNIT)
    program = tl.program_id(0).to(tl.int64)
    part = (program % PROGRAMS).to(tl.int32)
    group = program // PROGRAMS
    if RECOMPUTE:
        segment = (group % segments).to(tl.int32)
        group = group // segments
        begin, stop = _segment_bounds(segment, base, remainder)
        if HELD:
            # the segment in which the tail begins does all of it
            stop = tl.where(stop > t_tail, tl.where(begin > t_tail, t_tail, n_iters), stop)
        n_states = n_iters
    else:
        segment = 0
        begin = 0
        stop = n_iters
        n_states = segments
    rows = group * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    # of programs that share a row the first stores its states
    mine = live & (part == 0)
    # a program's rows beyond the last repeat it, unstored
    rows = tl.minimum(rows, n_rows - 1)
    if PROGRAMS > 1:
        words_ptr += group * (RING * SLOTS * PROGRAMS)
    start = part * chunk
    end = tl.minimum(start + chunk, n_cols)
    cols = columns(REPS, LANES, VEC)
    n_tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK)
    k = row_value(k_ptr, k_value, rows, live, k_stride, K_IS_TENSOR, COMPUTE)

    # --- what there is of a row
    n_nan = tl.zeros([ROWS], tl.int32)
    if HELD:
        s = load_tile(
            scores_ptr, mask_ptr, rows, start + cols, start + cols < end, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE
        )
        if EVEN and not HAS_MASK:
            # a finite sum has no entry that is not valid
            n_valid = tl.full([ROWS], BLOCK, COMPUTE)
            total = row_sum(s)
        else:
            n_valid, total = row_sums((s > float("-inf")).to(COMPUTE), tl.where(s == float("-inf"), 0.0, s))
        odd = ~(tl.abs(total) < float("inf"))
        if _any(odd):
            n_valid, n_nan, of_odd, largest = _examine(
                scores_ptr, mask_ptr, rows, start, end, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE, ROWS, LANES, VEC
            )
            # added up in another order, which is not to be seen in the rows beside them
            total = tl.where(odd, of_odd, total)
        else:
            largest = row_max(s)
    else:
        valid_acc = tl.zeros([ROWS, LANES], tl.int32)
        nan_acc = tl.zeros([ROWS, LANES], tl.int32)
        total_acc = tl.zeros([ROWS, LANES], COMPUTE)
        largest = tl.full([ROWS], float("-inf"), COMPUTE)
        for tile in range(start, end, BLOCK):
            s = load_tile(
                scores_ptr, mask_ptr, rows, tile + cols, tile + cols < end, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE
            )
            valid = s > float("-inf")
            valid_acc += fold(valid.to(tl.int32))
            nan_acc += fold((s != s).to(tl.int32))
            total_acc += fold(tl.where(valid, s, 0.0))
            largest = tl.maximum(largest, row_max(tl.where(valid, s, float("-inf"))))
        n_valid = tl.sum(valid_acc, 1).to(COMPUTE)
        n_nan = tl.sum(nan_acc, 1)
        total = tl.sum(total_acc, 1)
    alive = n_rows > 0
    epoch = part * 0 + 1
    if PROGRAMS > 1:
        counted = tl.where(n_nan > 0, -1, n_valid.to(tl.int32))
        totals, counts, most, alive = exchange(
            words_ptr, total, counted, largest, part, epoch, alive, True, COOPERATIVE, PROGRAMS, P_BLOCK, RING
        )
        epoch += 1
        # back to [ROWS], which is [1] here
        total = tl.zeros_like(total) + tl.sum(totals, 0)
        n_nan = tl.zeros_like(n_nan) + tl.sum((counts < 0).to(tl.int32), 0)
        n_valid = tl.zeros_like(n_valid) + tl.sum(tl.maximum(counts, 0), 0).to(COMPUTE)
        largest = tl.zeros_like(total) + tl.max(tl.where(tl.arange(0, P_BLOCK) < PROGRAMS, most, float("-inf")), 0)
    k = _budget(k, n_valid, CLAMP_K)
    bad = (n_nan > 0) | (k != k)
    dead = ~bad & ((n_valid == 0) | (k <= 0))
    easy = bad | dead
    log_k = _log_budget(k, easy)
    largest = tl.where(easy, 0.0, largest)
    n_valid = tl.where(easy, 1.0, n_valid)
    mean = tl.where(tl.abs(total) < float("inf"), total / n_valid, float("-inf"))
    quiet = _last_quiet(largest, mean, tl.log(n_valid) - log_k, easy, n_iters, eps, eps_init, eps_decay)
    first = tl.min(tl.where(easy, n_iters - 1, quiet), 0)

    # --- iterations at an eps of their own
    # as tensors: tl.maximum rounds a bare number to float32
    floor = tl.full((), eps, tl.float64)
    eps_t = tl.full((), eps_init, tl.float64)
    for _ in range(0, begin):
        eps_t = tl.maximum(eps_t * eps_decay, floor)
    a = tl.zeros([ROWS], COMPUTE)
    if RECOMPUTE:
        a = tl.load(starts_ptr + rows * segments + (segment - 1), mask=live & (segment > 0), other=0.0)
        a = tl.where(easy, 0.0, a)
    stored = begin
    next_store = begin + 1
    if not RECOMPUTE:
        next_store = base + (remainder > 0).to(tl.int32)
    middle = stop
    if HELD:
        middle = tl.minimum(stop, t_tail)

    for t in range(begin, middle):
        e = eps_t.to(COMPUTE)
        if t == 0:
            a = _next_a(n_valid, tl.zeros_like(n_valid), e, log_k)
        elif t >= first:
            shift = tl.minimum(largest, -a)
            scale = _exp2_scale(e)
            if HELD:
                total = row_sum(tl.exp2((tl.minimum(s, spread(-a)) - spread(shift)) * scale))
            else:
                acc = tl.zeros([ROWS, LANES], COMPUTE)
                # a tile is loaded while the one before it is worked on
                ahead = start + back_and_forth(0, n_tiles, t) * BLOCK + cols
                following = load_tile(
                    scores_ptr, mask_ptr, rows, ahead, ahead < end, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE
                )
                for index in range(0, n_tiles):
                    x = following
                    ahead = start + back_and_forth(tl.minimum(index + 1, n_tiles - 1), n_tiles, t) * BLOCK + cols
                    following = load_tile(
                        scores_ptr, mask_ptr, rows, ahead, ahead < end, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE
                    )
                    acc += fold(tl.exp2((tl.minimum(x, spread(-a)) - spread(shift)) * scale))
                total = tl.sum(acc, 1)
            if PROGRAMS > 1:
                total, alive = _over_programs(words_ptr, total, part, epoch, alive, COOPERATIVE, PROGRAMS, P_BLOCK, RING)
                epoch += 1
            a = _next_a(tl.where(easy, 1.0, total), shift, e, log_k)
        a = tl.where(t < quiet, -largest, a)
        eps_t = tl.maximum(eps_t * eps_decay, floor)
        if t + 1 == next_store:
            _store_state(states_ptr, rows, stored, n_states, a, bad, dead, mine)
            stored += 1
            if RECOMPUTE:
                next_store += 1
            else:
                next_store += base + (stored < remainder).to(tl.int32)

    # --- the tail, and lam: q = exp((-a - c)/eps), and as a = eps (log k - log sum) - c, the next q is sum/k
    e = tl.full((), eps_last, tl.float64).to(COMPUTE)
    scale = _exp2_scale(e)
    if HELD:
        if (not RECOMPUTE) | (stop > t_tail):
            share = 1.0 / tl.maximum(tl.where(easy, 1.0, k), tl.zeros_like(k) + K_FLOOR)
            centre, q, top = _recentre(largest, a, scale)
            w = tl.exp2((s - spread(centre)) * scale)
            t = tl.maximum(begin, t_tail)
            while t < stop:
                before = stored
                far = t < begin
                while (t < stop) & ~far:
                    total = row_sum(tl.minimum(w, spread(q)))
                    if PROGRAMS > 1:
                        total, alive = _over_programs(words_ptr, total, part, epoch, alive, COOPERATIVE, PROGRAMS, P_BLOCK, RING)
                        epoch += 1
                    total = tl.where(easy, 1.0, total)
                    q = tl.where(t < quiet, top, total * share)
                    if t + 1 == next_store:
                        tl.store(states_ptr + rows * n_states + stored, tl.where(t < quiet, -1.0, total), mask=mine)
                        stored += 1
                        if RECOMPUTE:
                            next_store += 1
                        else:
                            next_store += base + (stored < remainder).to(tl.int32)
                    far = _any(_out_of_reach(q, top))
                    t += 1
                _totals_to_states(states_ptr, rows, before, stored, n_states, largest, centre, e, log_k, bad, dead, mine)
                if far:
                    which = _out_of_reach(q, top)
                    a = tl.where(t <= quiet, -largest, _next_a(total, centre, e, log_k))
                    moved, new_q, new_top = _recentre(largest, a, scale)
                    centre = tl.where(which, moved, centre)
                    q = tl.where(which, new_q, q)
                    top = tl.where(which, new_top, top)
                    x = load_tile(
                        scores_ptr, mask_ptr, rows, start + cols, start + cols < end, scores_stride, mask_stride,
                        HAS_MASK, EVEN, COMPUTE,
                    )  # fmt: skip
                    w = tl.exp2((x - spread(centre)) * scale)
            if not RECOMPUTE:
                lam = tl.minimum(w * spread(1.0 / q), 1.0)
                lam = tl.where(spread(easy), spread(tl.where(bad, float("nan"), 0.0)), lam)
                inside = spread(live) if EVEN else spread(live) & (start + cols < end)
                tl.store(lam_ptr + spread(rows * n_cols) + start + cols, lam.to(lam_ptr.dtype.element_ty), mask=inside)
    elif not RECOMPUTE:
        for index in range(0, n_tiles):
            tile = start + back_and_forth(index, n_tiles, n_iters) * BLOCK
            within = tile + cols < end
            x = load_tile(scores_ptr, mask_ptr, rows, tile + cols, within, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE)
            lam = tl.exp2(tl.minimum(x + spread(a), 0.0) * scale)
            lam = tl.where(spread(dead), 0.0, lam)
            lam = tl.where(spread(bad), float("nan"), lam)
            inside = spread(live) if EVEN else spread(live) & within
            tl.store(lam_ptr + spread(rows * n_cols) + tile + cols, lam.to(lam_ptr.dtype.element_ty), mask=inside)
    if PROGRAMS > 1 and not COOPERATIVE:
        tl.store(alive_ptr + rows * PROGRAMS + part, alive.to(tl.int32) + tl.zeros([ROWS], tl.int32), mask=live)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_state(states_ptr, rows, live, t, n_iters):
    """a_t [R] for 1 <= t <= n_iters; 0 for a row that is NaN or has nothing to route, and for t = 0."""
    a = tl.load(states_ptr + rows * n_iters + (t - 1), mask=live & (t > 0), other=0.0)
    return tl.where((a == a) & (a > float("-inf")), a, 0.0)


@triton.jit
def _load_next(states_ptr, rows, live, t, n_iters):
    """The same in the loop of the tail, where a row alone in its program is not unless it has something to route."""
    if rows.shape[0] == 1:
        return tl.load(states_ptr + rows * n_iters + tl.maximum(t - 1, 0))
    else:
        return _load_state(states_ptr, rows, live, t, n_iters)


@triton.jit
def _load_both(
    scores_ptr, grad_ptr, mask_ptr, rows, cols, inside, scores_stride, grad_stride, mask_stride,
    HAS_MASK: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    s = load_tile(scores_ptr, mask_ptr, rows, cols, inside, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE)
    at = grad_ptr + spread(rows * grad_stride) + cols
    g = tl.load(at).to(COMPUTE) if EVEN else tl.load(at, mask=inside, other=0.0).to(COMPUTE)
    return s, g


@triton.jit
def _far(x):
    """A number of x's type that is beyond every distance, and 3 times that is a number too."""
    return 1e307 if x.dtype == tl.float64 else 1e38


@triton.jit
def _distance(s, centre):
    """s - c of a tile, at most ``_far``: an entry above every threshold counts, its value does not."""
    return tl.minimum(s - spread(centre), tl.full((), _far(s), s.dtype))


@triton.jit
def _height(a, centre):
    """The threshold -a above the centre, [R]: an entry is clamped where its distance is more."""
    return -(a + centre)


@triton.jit
def _last_height(a_last, centre, dead):
    """That of the last threshold; below all entries of a row that has nothing to route."""
    return tl.where(dead, float("-inf"), _height(a_last, centre))


@triton.jit
def _tail_exp(d, scale):
    """exp((s - c)/eps_T) where an entry is unclamped anywhere in the tail, 1 elsewhere; NaN where the row's scale is."""
    return tl.exp2(tl.minimum(d, 0.0) * spread(scale))


@triton.jit
def _last_weight(d, g, w, height, scale, inv_eps):
    """[i in U_T] g_i lam_i / eps_T over w; an entry or row of no weight has no part in it, whatever its g."""
    factor = tl.exp2(-height * scale) * inv_eps
    return tl.where((d <= spread(height)) & (w > 0), g * spread(factor), 0.0)


@triton.jit
def _clamp_mass(count, a, a_next, scale, log2_k):
    """sum over C_t of p: a count [R] times one exponential."""
    return tl.where(count > 0, count * tl.exp2((a_next - a) * scale - log2_k), 0.0)


@triton.jit
def _tail_weight(mass, next_height, scale, log2_k):
    """A_{t+1} p_i over exp((s_i - c)/eps)."""
    return tl.where(mass != 0, mass * tl.exp2(-next_height * scale - log2_k), 0.0)


@triton.jit
def _subtract(ds, d, height, next_height, scale, log2_k, mass):
    """ds - [i in U_t] A_{t+1} p.

    The exponent is one multiply-add of a distance: what it adds to all entries is small, for thresholds lie close beside eps, and
    is rounded once. Another multiply-add moves the clamped entries to where an exponential is 0.
    """
    far = tl.full((), _far(d), d.dtype)
    offset = tl.minimum(tl.maximum(-next_height * scale - log2_k, -far), far)
    free = (d > spread(height)).to(d.dtype) * (-3.0 * far) + d
    return ds - spread(mass) * tl.exp2(free * scale + spread(offset))


@triton.jit
def _store_ds(dscores_ptr, rows, n_cols, cols, d, ds, bad, inside):
    """Stores ds, which is 0 in a dead row and, by the scale of its ``_tail_exp``, NaN in a bad one, but for what is masked."""
    ds = tl.where(d > float("-inf"), ds, spread(tl.where(bad, float("nan"), 0.0)))
    tl.store(dscores_ptr + spread(rows * n_cols) + cols, ds.to(dscores_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_dk(dk_ptr, rows, dlogk, k, k_given, n_valid, bad, dead, live, CLAMP_K: tl.constexpr):
    inner = k >= K_FLOOR
    if CLAMP_K:
        inner = inner & (k_given <= n_valid)
    dk = tl.where(dead | ~inner, 0.0, dlogk / tl.where(inner, k, 1.0))
    tl.store(dk_ptr + rows, tl.where(bad, float("nan"), dk), mask=live)


@triton.jit
def _tail_centre(a_last, a_tail, scale, n_iters, t_tail):
    """Where the exponential of the tail is centred [R], and whether its thresholds lie close enough for one to do.

    They move one way only, so that the first and the last are the extremes.
    """
    tail = (t_tail < n_iters) & (tl.abs(a_last - a_tail) * scale <= SPREAD)
    return tl.where(tail, tl.maximum(-a_last, -a_tail), -a_last), tail


@triton.jit(do_not_specialize=["n_rows", "k_stride", "t_floor", "n_iters"])
def _backward(
    grad_ptr,
    scores_ptr,
    states_ptr,
    k_ptr,
    mask_ptr,
    dscores_ptr,
    dk_ptr,
    k_value: tl.float64,
    eps_init: tl.float64,
    eps_last: tl.float64,
    scale_floor: tl.float64,
    scale_above: tl.float64,
    eps_decay: tl.float64,
    n_rows,
    n_cols,
    grad_stride,
    scores_stride,
    mask_stride,
    k_stride,
    t_floor,
    n_iters,
    K_IS_TENSOR: tl.constexpr,
    CLAMP_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN: tl.constexpr,
    REPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One reduction for A_T and one count an iteration, of rows that stay in registers.

    The schedule is walked backwards, as log2(e)/eps: scale_floor from iteration t_floor on, before it scale_above (where eps is
    the last one above the floor), shrinking by eps_decay a step. dlogk is left out where k is a number, which has no gradient.
    """
    BLOCK: tl.constexpr = REPS * LANES * VEC
    n_cols, grad_stride = multiple(n_cols, UNIT), multiple(grad_stride, UNIT)
    scores_stride, mask_stride = multiple(scores_stride, UNIT), multiple(mask_stride, UNIT)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    rows = tl.minimum(rows, n_rows - 1)
    cols = columns(REPS, LANES, VEC)
    inside = cols < n_cols
    k_given = row_value(k_ptr, k_value, rows, live, k_stride, K_IS_TENSOR, COMPUTE)
    final = tl.load(states_ptr + rows * n_iters + (n_iters - 1))
    bad = final != final
    dead = final == float("-inf")
    t_tail = tl.maximum(t_floor, 1)
    a_next = _load_state(states_ptr, rows, live, n_iters, n_iters)
    a_tail = _load_state(states_ptr, rows, live, tl.minimum(t_tail, n_iters), n_iters)
    s, g = _load_both(
        scores_ptr, grad_ptr, mask_ptr, rows, cols, inside, scores_stride, grad_stride, mask_stride, HAS_MASK, EVEN, COMPUTE
    )
    e = tl.full((), eps_last, tl.float64).to(COMPUTE)
    scale = _exp2_scale(e)
    centre, tail = _tail_centre(a_next, a_tail, scale, n_iters, t_tail)
    d = _distance(s, centre)
    row_scale = tl.where(bad, float("nan"), scale)
    w = _tail_exp(d, row_scale)
    ds = _last_weight(d, g, w, _last_height(a_next, centre, dead), scale, 1.0 / e)
    product = w * ds
    if REPS == 1:
        # a small tile may have one entry a thread: no product may meet another thread's sum, see rows.py
        product = tl.where(w > 0, product, 0.0)
    n_valid = k_given
    if CLAMP_K:
        mass, n_valid = row_sums(product, (d > float("-inf")).to(COMPUTE))
    else:
        mass = row_sum(product)
    mass = tl.where(bad | dead, 0.0, mass)
    k = _budget(k_given, n_valid, CLAMP_K)
    log2_k = _log_budget(k, bad | dead) * LOG2E
    dlogk = tl.zeros([ROWS], COMPUTE)

    # --- the tail: ds is over w. A row alone in its program has one or is not here; else each row looks on where it has none
    alone: tl.constexpr = ROWS == 1
    t = n_iters - 1
    a = _load_state(states_ptr, rows, live, t, n_iters)
    going = _any(mass != 0)
    shared = _any(tail)
    while (t >= t_tail) & going & shared:
        a_before = _load_next(states_ptr, rows, live, t - 1, n_iters)
        free = (d <= spread(_height(a, centre))).to(COMPUTE)
        weight = mass if alone else tl.where(tail, mass, 0.0)
        if K_IS_TENSOR:
            dlogk += weight * e
        ds -= free * spread(_tail_weight(weight, _height(a_next, centre), scale, log2_k))
        passed = mass * _clamp_mass(BLOCK - row_sum(free), a, a_next, scale, log2_k)
        mass = passed if alone else tl.where(tail, passed, mass)
        a_next = a if alone else tl.where(tail, a, a_next)
        a = a_before
        t -= 1
        going = _any(mass != 0)
    # a bound that the compiler does not know to be 0: an exponential more is cheaper than to keep w
    ds *= tl.exp2(tl.minimum(d, tl.where(t < n_iters, 0.0, 1.0)) * spread(row_scale))

    # --- before it, or in place of it
    if (t_tail < n_iters) & _any(~tail):
        t = n_iters - 1
        a = _load_state(states_ptr, rows, live, t, n_iters)
    floor = tl.full((), scale_floor, tl.float64)
    above = tl.full((), scale_above, tl.float64)
    while (t >= 1) & going:
        a_before = _load_state(states_ptr, rows, live, t - 1, n_iters)
        scale = tl.where(t >= t_floor, floor, above).to(COMPUTE)
        above = tl.where(t >= t_floor, above, above * eps_decay)
        on = (t < t_tail) | ~tail
        weight = mass if alone else tl.where(on, mass, 0.0)
        if K_IS_TENSOR:
            dlogk += weight * _exp2_scale(scale)
        # compared once more: cheaper than to keep what the update finds
        height = _height(a, centre)
        count = row_sum((d > spread(height)).to(COMPUTE))
        ds = _subtract(ds, d, height, _height(a_next, centre), scale, log2_k, weight)
        passed = mass * _clamp_mass(count, a, a_next, scale, log2_k)
        mass = passed if alone else tl.where(on, passed, mass)
        a_next = a if alone else tl.where(on, a, a_next)
        a = a_before
        t -= 1
        going = _any(mass != 0)
    _store_ds(dscores_ptr, rows, n_cols, cols, d, ds, bad, spread(live) if EVEN else spread(live) & inside)
    if K_IS_TENSOR:
        dlogk += mass * tl.full((), eps_init, tl.float64).to(COMPUTE)
        _store_dk(dk_ptr, rows, dlogk, k, k_given, n_valid, bad, dead, live, CLAMP_K)


SUMS, APPLY = tl.constexpr(0), tl.constexpr(1)
"""The two launches of the backward of rows that are shared or re-read: the sums of each program, then the rest."""


@triton.jit
def _at(values, steps, t):
    """values[:, t], [R] of [R, T_BLOCK]."""
    return tl.sum(tl.where((steps == t)[None, :], values, tl.zeros_like(values)), 1)


@triton.jit(do_not_specialize=["n_rows", "k_stride", "t_floor", "n_iters"])
def _backward_shared(
    grad_ptr,
    scores_ptr,
    states_ptr,
    k_ptr,
    mask_ptr,
    dscores_ptr,
    dk_ptr,
    sums_ptr,
    k_value: tl.float64,
    eps_init: tl.float64,
    eps_last: tl.float64,
    scale_floor: tl.float64,
    scale_above: tl.float64,
    eps_decay: tl.float64,
    n_rows,
    n_cols,
    chunk,
    grad_stride,
    scores_stride,
    mask_stride,
    k_stride,
    t_floor,
    n_iters,
    K_IS_TENSOR: tl.constexpr,
    CLAMP_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PHASE: tl.constexpr,
    HELD: tl.constexpr,
    EVEN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    P_BLOCK: tl.constexpr,
    P_TILE: tl.constexpr,
    T_BLOCK: tl.constexpr,
    REPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The same for a row that PROGRAMS programs share, ``chunk`` columns each, or that one re-reads in tiles; ROWS is 1.

    sums [rows, PROGRAMS, T_BLOCK] holds of every program the number of valid entries, the number of clamped ones at iterations
    1 … T-1, and its part of A_T at T. Each program of the second launch adds them up, walks the chain of the A_t for itself and
    applies it to its columns.
    """
    BLOCK: tl.constexpr = REPS * LANES * VEC
    n_cols, chunk, grad_stride = multiple(n_cols, UNIT), multiple(chunk, UNIT), multiple(grad_stride, UNIT)
    scores_stride, mask_stride = multiple(scores_stride, UNIT), multiple(mask_stride, UNIT)
    program = tl.program_id(0).to(tl.int64)
    part = (program % PROGRAMS).to(tl.int32)
    rows = program // PROGRAMS + tl.arange(0, ROWS)
    live = rows < n_rows
    start = part * chunk
    end = tl.minimum(start + chunk, n_cols)
    cols = columns(REPS, LANES, VEC)
    steps = tl.arange(0, T_BLOCK)
    final = tl.load(states_ptr + rows * n_iters + (n_iters - 1))
    bad = final != final
    dead = final == float("-inf")
    t_tail = tl.maximum(t_floor, 1)
    a_last = _load_state(states_ptr, rows, live, n_iters, n_iters)
    a_tail = _load_state(states_ptr, rows, live, tl.minimum(t_tail, n_iters), n_iters)
    e_last = tl.full((), eps_last, tl.float64).to(COMPUTE)
    last_scale = _exp2_scale(e_last)
    centre, tail = _tail_centre(a_last, a_tail, last_scale, n_iters, t_tail)
    last_height = _last_height(a_last, centre, dead)

    if PHASE == SUMS:
        counts = tl.zeros([ROWS, T_BLOCK], tl.int32)
        valid_acc = tl.zeros([ROWS, LANES], tl.int32)
        mass_acc = tl.zeros([ROWS, LANES], COMPUTE)
        for tile in range(start, end, BLOCK):
            s, g = _load_both(
                scores_ptr, grad_ptr, mask_ptr, rows, tile + cols, tile + cols < end, scores_stride, grad_stride, mask_stride,
                HAS_MASK, EVEN, COMPUTE,
            )  # fmt: skip
            valid_acc += fold((s > float("-inf")).to(tl.int32))
            d = _distance(s, centre)
            w = _tail_exp(d, tl.where(bad, float("nan"), last_scale))
            mass_acc += fold(w * _last_weight(d, g, w, last_height, last_scale, 1.0 / e_last))
            # two counts an exchange between the threads
            for t in range(1, n_iters, 2):
                a = _load_state(states_ptr, rows, live, t, n_iters)
                b = _load_state(states_ptr, rows, live, t + 1, n_iters)
                one, two = row_sums((s > spread(-a)).to(COMPUTE), (s > spread(-b)).to(COMPUTE))
                counts += tl.where((steps == t)[None, :], one.to(tl.int32)[:, None], 0)
                counts += tl.where((steps == t + 1)[None, :], two.to(tl.int32)[:, None], 0)
        n_valid = tl.sum(valid_acc, 1).to(COMPUTE)
        mass = tl.sum(mass_acc, 1)
        sums = tl.where((steps == 0)[None, :], n_valid[:, None], counts.to(COMPUTE))
        sums = tl.where((steps == n_iters)[None, :], mass[:, None], sums)
        tl.store(sums_ptr + (rows[:, None] * PROGRAMS + part) * T_BLOCK + steps[None, :], sums, mask=live[:, None])
    else:
        k_given = row_value(k_ptr, k_value, rows, live, k_stride, K_IS_TENSOR, COMPUTE)
        if HELD:
            s, g = _load_both(
                scores_ptr, grad_ptr, mask_ptr, rows, start + cols, start + cols < end, scores_stride, grad_stride, mask_stride,
                HAS_MASK, EVEN, COMPUTE,
            )  # fmt: skip
        sums = tl.zeros([ROWS, T_BLOCK], COMPUTE)
        for begin in range(0, PROGRAMS, P_TILE):
            parts = begin + tl.arange(0, P_TILE)[None, :, None]
            at = sums_ptr + (rows[:, None, None] * PROGRAMS + parts) * T_BLOCK + steps[None, None, :]
            sums += tl.sum(tl.load(at, mask=live[:, None, None] & (parts < PROGRAMS), other=0.0), 1)
        n_valid = _at(sums, steps, 0)
        mass = tl.where(bad | dead, 0.0, _at(sums, steps, n_iters))
        k = _budget(k_given, n_valid, CLAMP_K)
        log2_k = _log_budget(k, bad | dead) * LOG2E
        dlogk = tl.zeros([ROWS], COMPUTE)

        # --- the chain: masses[:, t] = A_{t+1}, the weight of iteration t
        masses = tl.zeros([ROWS, T_BLOCK], COMPUTE)
        floor = tl.full((), scale_floor, tl.float64)
        above = tl.full((), scale_above, tl.float64)
        a_next = a_last
        t = n_iters - 1
        going = _any(mass != 0)
        while (t >= 1) & going:
            scale = tl.where(t >= t_floor, floor, above).to(COMPUTE)
            above = tl.where(t >= t_floor, above, above * eps_decay)
            a = _load_state(states_ptr, rows, live, t, n_iters)
            if K_IS_TENSOR:
                dlogk += mass * _exp2_scale(scale)
            masses = tl.where((steps == t)[None, :], mass[:, None], masses)
            mass *= _clamp_mass(_at(sums, steps, t), a, a_next, scale, log2_k)
            a_next = a
            t -= 1
            going = _any(mass != 0)
        last = t
        if K_IS_TENSOR:
            dlogk += mass * tl.full((), eps_init, tl.float64).to(COMPUTE)

        # --- the gradient
        shared = _any(tail)
        for tile in range(start, end, BLOCK):
            if not HELD:
                s, g = _load_both(
                    scores_ptr, grad_ptr, mask_ptr, rows, tile + cols, tile + cols < end, scores_stride, grad_stride,
                    mask_stride, HAS_MASK, EVEN, COMPUTE,
                )  # fmt: skip
            d = _distance(s, centre)
            w = _tail_exp(d, tl.where(bad, float("nan"), last_scale))
            ds = _last_weight(d, g, w, last_height, last_scale, 1.0 / e_last)
            next_height = _height(a_last, centre)
            t = n_iters - 1
            while (t >= t_tail) & (t > last) & shared:
                height = _height(_load_state(states_ptr, rows, live, t, n_iters), centre)
                free = (d <= spread(height)).to(COMPUTE)
                ds -= free * spread(_tail_weight(_at(masses, steps, t), next_height, last_scale, log2_k))
                next_height = height
                t -= 1
            ds *= w
            above = tl.full((), scale_above, tl.float64)
            while t > last:
                scale = tl.where(t >= t_floor, floor, above).to(COMPUTE)
                above = tl.where(t >= t_floor, above, above * eps_decay)
                height = _height(_load_state(states_ptr, rows, live, t, n_iters), centre)
                ds = _subtract(ds, d, height, next_height, scale, log2_k, _at(masses, steps, t))
                next_height = height
                t -= 1
            inside = spread(live) if EVEN else spread(live) & (tile + cols < end)
            _store_ds(dscores_ptr, rows, n_cols, tile + cols, d, ds, bad, inside)
        if K_IS_TENSOR:
            _store_dk(dk_ptr, rows, dlogk, k, k_given, n_valid, bad, dead, live & (part == 0), CLAMP_K)


def eps_schedule(n_iters: int, eps: float, eps_init: float, eps_decay: float) -> list[float]:
    """eps_0 … eps_T, in float64 as published."""
    schedule = [eps_init]
    for _ in range(n_iters):
        schedule.append(max(schedule[-1] * eps_decay, eps))
    return schedule


@functools.lru_cache(maxsize=256)
def _landmarks(n_iters: int, eps: float, eps_init: float, eps_decay: float) -> tuple[float, float, float, int]:
    """What the kernels know of a schedule: its floor, the last eps above it, eps_T, and the iteration it is at the floor from.

    The floor is the value that eps ends with and keeps; the iteration is T where there is none.
    """
    schedule = eps_schedule(n_iters, eps, eps_init, eps_decay)
    floor = eps_init if eps_decay == 1.0 else eps
    t_floor = n_iters
    while t_floor > 0 and schedule[t_floor - 1] == floor:
        t_floor -= 1
    return floor, schedule[max(t_floor - 1, 0)], schedule[n_iters], t_floor


def coordinate_descent_forward(
    scores: torch.Tensor,
    k: torch.Tensor | float,
    mask: torch.Tensor | None,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    clamp_k: bool,
    segments: int,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """lam after ``n_iters`` iterations, and the states that the backward starts from.

    Args:
        scores: [R, n], float16, bfloat16, float32 or float64, stride(1) == 1.
        k: a number, or [R] in the compute type (float32; float64 for float64 scores).
        mask: bool [R, n], True = valid, stride(1) == 1, or None.
        n_iters: T, at least 1.
        eps, eps_init, eps_decay: the schedule; eps_init is at least eps.
        clamp_k: clamp k to [0, number of valid entries] on the device.
        segments: how many states a row to save, 1 … T.
        config: the launch configuration.

    Returns:
        lam [R, n], contiguous, in the scores' dtype, and the states [R, segments] in the compute type: a at the end of each
        segment, the last one a_T; minus the largest score where nothing depends on it; -inf in a row with no budget or no valid
        entry, NaN in a NaN row.
    """
    n_rows, n_cols = scores.shape
    compute, _ = compute_dtypes(scores.dtype)
    lam = scores.new_empty(n_rows, n_cols)
    states = scores.new_empty(n_rows, segments, dtype=compute)
    _launch_iterate(scores, k, mask, n_iters, eps, eps_init, eps_decay, clamp_k, segments, config, lam, states, None)
    return lam, states


def _launch_iterate(
    scores: torch.Tensor,
    k: torch.Tensor | float,
    mask: torch.Tensor | None,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    clamp_k: bool,
    segments: int,
    config: LaunchConfig,
    lam: torch.Tensor,
    states: torch.Tensor,
    starts: torch.Tensor | None,
) -> None:
    """The forward, or with ``starts`` [R, segments] the recomputation of all states [R, T] from them."""
    n_rows, n_cols = scores.shape
    device = scores.device
    eps, eps_init = positive(eps, states.dtype), positive(eps_init, states.dtype)
    floor, _, eps_last, t_floor = _landmarks(n_iters, eps, eps_init, eps_decay)
    k_ptr, k_value, k_stride = row_value_args(k)
    mask_ptr, mask_stride = mask_args(mask)
    prepared, programs, ring = _prepare_iterate(
        config,
        n_rows,
        n_cols,
        scores.dtype,
        device.index,
        processors(device),
        cooperative(device),
        (scores.stride(0), mask_stride, k_stride),
        (dtype_of(k_ptr), dtype_of(mask), dtype_of(starts)),
        clamp_k,
        max(t_floor, 1),
        n_iters,
        segments,
    )
    words, alive = None, None
    if programs > 1:
        words = scores.new_zeros((n_rows, ring, SLOTS.value, programs), dtype=torch.int64)
        if not cooperative(device):
            alive = scores.new_zeros((n_rows, programs), dtype=torch.int32)
    pointers = (scores, k_ptr, mask_ptr, lam, starts, states, words, alive)
    schedule = (k_value, floor, eps_init, eps_decay, eps_last)
    launch(prepared, pointers, schedule)
    while alive is not None and not bool(alive.all()):
        launch(prepared, pointers, schedule)


@functools.lru_cache(maxsize=4096)
def _prepare_iterate(
    config: LaunchConfig,
    n_rows: int,
    n_cols: int,
    dtype: torch.dtype,
    device: int | None,
    processors: int,
    cooperative: bool,
    strides: tuple[int, int, int],
    dtypes: tuple[torch.dtype | None, ...],
    clamp_k: bool,
    t_tail: int,
    n_iters: int,
    segments: int,
) -> tuple[Prepared, int, int]:
    """The launch, the number of programs a row, and of exchanges that their words hold.

    ``strides`` are those of scores, mask and k; ``dtypes`` those of k, mask and the starts, None where there is no tensor.
    """
    check_config("coordinate_descent", config, n_cols)
    k_is_tensor, has_mask, recompute = (dtype is not None for dtype in dtypes)
    shape = tiles(config, n_rows, n_cols, dtype.itemsize, processors, strides[:2])
    shared = shape.programs > 1
    if recompute and shared:
        # as many programs as run side by side work on the rows already: one segment, from the start
        segments = 1
    ring = 2 if cooperative else n_iters + 2
    prepared = Prepared(
        _iterate,
        (-(-n_rows // shape.rows) * (segments if recompute else 1) * shape.programs,),
        (n_rows, n_cols, shape.chunk, *strides, t_tail, n_iters, *divmod(n_iters, segments), segments),
        device,
        RECOMPUTE=recompute,
        K_IS_TENSOR=k_is_tensor,
        CLAMP_K=clamp_k,
        HAS_MASK=has_mask,
        COMPUTE=compute_dtypes(dtype)[1],
        HELD=shape.held,
        EVEN=shape.even,
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
    return prepared, shape.programs, ring


def coordinate_descent_backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    states: torch.Tensor,
    k: torch.Tensor | float,
    mask: torch.Tensor | None,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    clamp_k: bool,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of scores [R, n] (in their dtype) and of k [R] (in the compute type; None for a number k).

    Where the forward saved fewer than T states a row, the others are recomputed into a buffer of T numbers a row first.

    Args:
        grad: the gradient of lam, [R, n], stride(1) == 1.
        states: what the forward returned, [R, segments].
        scores, k, mask, n_iters, eps, eps_init, eps_decay, clamp_k, config: as in :func:`coordinate_descent_forward`.
    """
    n_rows, n_cols = scores.shape
    compute, _ = compute_dtypes(scores.dtype)
    eps, eps_init = positive(eps, compute), positive(eps_init, compute)
    segments = states.shape[1]
    if segments < n_iters:
        starts, states = states, scores.new_empty(n_rows, n_iters, dtype=compute)
        _launch_iterate(scores, k, mask, n_iters, eps, eps_init, eps_decay, clamp_k, segments, config, states, states, starts)
    floor, eps_above, eps_last, t_floor = _landmarks(n_iters, eps, eps_init, eps_decay)
    k_ptr, k_value, k_stride = row_value_args(k)
    mask_ptr, mask_stride = mask_args(mask)
    launches, sums_shape = _prepare_backward(
        config,
        n_rows,
        n_cols,
        scores.dtype,
        scores.device.index,
        (grad.stride(0), scores.stride(0), mask_stride, k_stride),
        (grad.dtype, states.dtype, dtype_of(k_ptr), dtype_of(mask)),
        clamp_k,
        t_floor,
        n_iters,
    )
    dscores = scores.new_empty(n_rows, n_cols)
    dk = scores.new_empty(n_rows, dtype=compute) if k_ptr is not None else None
    pointers: tuple[torch.Tensor | None, ...] = (grad, scores, states, k_ptr, mask_ptr, dscores, dk)
    if sums_shape is not None:
        pointers = (*pointers, scores.new_empty(sums_shape, dtype=compute))
    for prepared in launches:
        launch(prepared, pointers, (k_value, eps_init, eps_last, LOG2E.value / floor, LOG2E.value / eps_above, eps_decay))
    return dscores, dk


@functools.lru_cache(maxsize=4096)
def _prepare_backward(
    config: LaunchConfig,
    n_rows: int,
    n_cols: int,
    dtype: torch.dtype,
    device: int | None,
    strides: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype | None, ...],
    clamp_k: bool,
    t_floor: int,
    n_iters: int,
) -> tuple[tuple[Prepared, ...], tuple[int, int, int] | None]:
    """The launches, and the shape of what programs of a row hand to the second; None where there is one launch.

    ``strides`` are those of the gradient, scores, mask and k; ``dtypes`` those of the gradient, states, k and mask, None where
    there is no tensor.
    """
    check_config("coordinate_descent", config, n_cols)
    shape = tiles(config, n_rows, n_cols, dtype.itemsize, None, strides[:3])
    k_is_tensor, has_mask = (dtype is not None for dtype in dtypes[2:])
    constants = {
        "K_IS_TENSOR": k_is_tensor,
        "CLAMP_K": clamp_k,
        "HAS_MASK": has_mask,
        "COMPUTE": compute_dtypes(dtype)[1],
        "EVEN": shape.even,
        "REPS": shape.reps,
        "ROWS": shape.rows,
        "LANES": shape.lanes,
        "VEC": shape.vec,
        "UNIT": shape.unit,
        **compile_options(config),
    }
    rest = (*strides, t_floor, n_iters)
    if shape.programs == 1 and shape.held:
        return (Prepared(_backward, (-(-n_rows // shape.rows),), (n_rows, n_cols, *rest), device, **constants),), None
    t_block = next_power_of_2(n_iters + 1)
    p_block = next_power_of_2(shape.programs)
    launches = tuple(
        Prepared(
            _backward_shared,
            (n_rows * shape.programs,),
            (n_rows, n_cols, shape.chunk, *rest),
            device,
            PHASE=phase.value,
            HELD=shape.held,
            PROGRAMS=shape.programs,
            P_BLOCK=p_block,
            P_TILE=min(p_block, max(1, 4096 // t_block)),
            T_BLOCK=t_block,
            **constants,
        )
        for phase in (SUMS, APPLY)
    )
    return launches, (n_rows, shape.programs, t_block)
