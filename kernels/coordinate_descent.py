"""Coordinate descent for the differentiable top-k, T iterations as published, as Triton kernels.

The recurrence (Wright 2015, https://arxiv.org/abs/1502.04759, as used by CoLT5, https://arxiv.org/abs/2303.09752; eps-scaling
as in CoDA, https://arxiv.org/abs/2304.04947):

    eps_0 = max(eps_init, eps),  eps_{t+1} = max(eps_t * eps_decay, eps),  a_0 = 0,  b_0 = -s
    a_{t+1} = eps_t (log k - logsumexp((s + b_t)/eps_t)),   b_{t+1} = -relu(s + a_{t+1}),   t = 0 … T-1
    lam = exp((s + a_T + b_T)/eps_T)

For t >= 1, s + b_t = min(s, -a_t), and for t = 0 it is 0, so the state of a row is the one scalar a_t and

    a_{t+1} = eps_t (log k - log sum_i exp((min(s_i, -a_t) - m)/eps_t)) - m,   m = min(max s, -a_t),   a_1 = eps_0 (log k - log n)

No row of b is ever stored, and the shift m of the logsumexp needs no reduction of its own. The forward saves a_t at the end of
each of ``segments`` segments of the iterations. The backward recomputes the others, all segments side by side, with the
same code on the same start values, so every number of segments gives bitwise the same gradient.

Backward, with g the gradient of lam, U_t = {s_i + a_t <= 0} (relu has gradient 0 at 0), C_t its complement:

    ds_i = [i in U_T] g_i lam_i / eps_T,   A_T = sum_i ds_i
    for t = T-1 … 1:   p_i = exp((min(s_i, -a_t) + a_{t+1})/eps_t) / k
                       dlogk += A_{t+1} eps_t;   ds_i -= [i in U_t] A_{t+1} p_i;   A_t = A_{t+1} sum_{C_t} p
    dlogk += A_1 eps_0;   dk = dlogk / k

On C_t every p is the same number, so sum_{C_t} p is a count times one exponential.
"""

import torch
import triton
import triton.language as tl

from .config import LaunchConfig
from .launch import check_config, compute_dtypes, mask_args, on_device, positive, row_value_args
from .soft_topk import _load_scores, _row_value

LOG2E = tl.constexpr(1.4426950408889634)
K_FLOOR = tl.constexpr(1e-20)


@triton.jit
def _exp2_scale(e):
    """What to multiply by so that exp2 is exp(x / e)."""
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
def _count_resident(s):
    n_valid = tl.sum((s > float("-inf")).to(tl.int32), axis=1)
    n_nan = tl.sum((s != s).to(tl.int32), axis=1)
    largest = tl.max(tl.where(s == s, s, float("-inf")), axis=1)
    return n_valid, n_nan, largest


@triton.jit
def _count_tiled(
    scores_ptr, mask_ptr, rows, live, n_cols, stride, mask_stride,
    HAS_MASK: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    valid_acc = tl.zeros([ROWS, BLOCK], tl.int32)
    nan_acc = tl.zeros([ROWS, BLOCK], tl.int32)
    max_acc = tl.full([ROWS, BLOCK], float("-inf"), COMPUTE)
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        inside = live[:, None] & (cols < n_cols)[None, :]
        s = _load_scores(scores_ptr, mask_ptr, rows, cols, inside, stride, mask_stride, HAS_MASK, COMPUTE)
        valid_acc += (s > float("-inf")).to(tl.int32)
        nan_acc += (s != s).to(tl.int32)
        max_acc = tl.maximum(max_acc, tl.where(s == s, s, float("-inf")))
    return tl.sum(valid_acc, axis=1), tl.sum(nan_acc, axis=1), tl.max(max_acc, axis=1)


@triton.jit
def _next_a(total, shift, eps_t, log_k):
    return eps_t * (log_k - tl.log(total)) - shift


@triton.jit(do_not_specialize=["n_rows", "k_stride", "n_iters", "base", "remainder", "segments"])
def _iterate(
    scores_ptr,
    k_ptr,
    k_value: tl.float64,
    mask_ptr,
    lam_ptr,
    starts_ptr,
    states_ptr,
    n_rows,
    n_cols,
    scores_stride,
    mask_stride,
    k_stride,
    eps: tl.float64,
    eps_init: tl.float64,
    eps_decay: tl.float64,
    n_iters,
    base,
    remainder,
    segments,
    RECOMPUTE: tl.constexpr,
    RESIDENT: tl.constexpr,
    K_IS_TENSOR: tl.constexpr,
    CLAMP_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Runs iterations of the recurrence and stores a at the end of each output segment.

    The forward runs them all and writes lam. RECOMPUTE runs one segment from its stored start; program_id(0) counts the segments
    of the first rows, then those of the next.
    """
    group = tl.program_id(0).to(tl.int64)
    if RECOMPUTE:
        group = group // segments
    rows = group * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    lanes = tl.arange(0, BLOCK)
    k = _row_value(k_ptr, k_value, rows, live, k_stride, K_IS_TENSOR, COMPUTE)
    inside = live[:, None] & (lanes < n_cols)[None, :]
    s = tl.zeros([ROWS, BLOCK], COMPUTE)
    if RESIDENT:
        s = _load_scores(scores_ptr, mask_ptr, rows, lanes, inside, scores_stride, mask_stride, HAS_MASK, COMPUTE)
        n_valid, n_nan, largest = _count_resident(s)
        s = tl.where(s == s, s, float("-inf"))
    else:
        n_valid, n_nan, largest = _count_tiled(
            scores_ptr, mask_ptr, rows, live, n_cols, scores_stride, mask_stride, HAS_MASK, COMPUTE, ROWS, BLOCK
        )
    k = _budget(k, n_valid, CLAMP_K)
    bad = (n_nan > 0) | (k != k)
    dead = ~bad & ((n_valid == 0) | (k <= 0))
    easy = bad | dead
    log_k = _log_budget(k, easy)
    largest = tl.where(easy, 0.0, largest)

    if RECOMPUTE:
        segment = tl.program_id(0) % segments
        begin, end = _segment_bounds(segment, base, remainder)
        n_states = n_iters
    else:
        segment = 0
        begin = 0
        end = n_iters
        n_states = segments
    # as tensors: tl.maximum rounds a bare number to float32
    floor = tl.zeros([1], tl.float64) + eps
    eps_t = tl.zeros([1], tl.float64) + eps_init
    for _ in range(0, begin):
        eps_t = tl.maximum(eps_t * eps_decay, floor)
    if RECOMPUTE:
        a = tl.load(starts_ptr + rows * segments + (segment - 1), mask=live & (segment > 0), other=0.0)
        a = tl.where(easy, 0.0, a)
    else:
        a = tl.zeros([ROWS], COMPUTE)
    stored = begin
    next_store = begin + 1
    if not RECOMPUTE:
        next_store = base + (remainder > 0).to(tl.int32)

    for t in range(begin, end):
        e = eps_t.to(COMPUTE)
        if t == 0:
            total = tl.where(easy, 1, n_valid).to(COMPUTE)
            shift = tl.zeros([ROWS], COMPUTE)
        else:
            shift = tl.minimum(largest, -a)
            scale = _exp2_scale(e)
            if RESIDENT:
                z = (tl.minimum(s, -a[:, None]) - shift[:, None]) * scale[:, None]
                total = tl.sum(tl.exp2(z), axis=1)
            else:
                acc = tl.zeros([ROWS, BLOCK], COMPUTE)
                for start in range(0, n_cols, BLOCK):
                    cols = start + lanes
                    within = live[:, None] & (cols < n_cols)[None, :]
                    x = _load_scores(scores_ptr, mask_ptr, rows, cols, within, scores_stride, mask_stride, HAS_MASK, COMPUTE)
                    z = (tl.minimum(x, -a[:, None]) - shift[:, None]) * scale[:, None]
                    acc += tl.exp2(z)
                total = tl.sum(acc, axis=1)
            total = tl.where(easy, 1.0, total)
        a = _next_a(total, shift, e, log_k)
        eps_t = tl.maximum(eps_t * eps_decay, floor)
        if t + 1 == next_store:
            value = tl.where(bad, float("nan"), tl.where(dead, float("-inf"), a))
            tl.store(states_ptr + rows * n_states + stored, value, mask=live)
            stored += 1
            if RECOMPUTE:
                next_store += 1
            else:
                next_store += base + (stored < remainder).to(tl.int32)

    if not RECOMPUTE:
        scale = _exp2_scale(eps_t.to(COMPUTE))
        zero = dead[:, None]
        if RESIDENT:
            lam = tl.exp2(tl.minimum(s + a[:, None], 0.0) * scale[:, None])
            lam = tl.where(zero, 0.0, lam)
            lam = tl.where(bad[:, None], float("nan"), lam)
            tl.store(lam_ptr + rows[:, None] * n_cols + lanes[None, :], lam.to(lam_ptr.dtype.element_ty), mask=inside)
        else:
            for start in range(0, n_cols, BLOCK):
                cols = start + lanes
                within = live[:, None] & (cols < n_cols)[None, :]
                x = _load_scores(scores_ptr, mask_ptr, rows, cols, within, scores_stride, mask_stride, HAS_MASK, COMPUTE)
                lam = tl.exp2(tl.minimum(x + a[:, None], 0.0) * scale[:, None])
                lam = tl.where(zero, 0.0, lam)
                lam = tl.where(bad[:, None], float("nan"), lam)
                tl.store(lam_ptr + rows[:, None] * n_cols + cols[None, :], lam.to(lam_ptr.dtype.element_ty), mask=within)


@triton.jit
def _load_state(states_ptr, rows, live, t, n_iters):
    """a_t [R] for 1 <= t <= n_iters; 0 for a row that is NaN or has nothing to route."""
    a = tl.load(states_ptr + rows * n_iters + (t - 1), mask=live, other=0.0)
    return tl.where((a == a) & (a > float("-inf")), a, 0.0)


@triton.jit
def _last_ds(s, g, a, scale, inv_eps):
    """[i in U_T] g_i lam_i / eps_T, [R, BLOCK]; a masked entry has no part in it, whatever its g."""
    lam = tl.where(s + a[:, None] <= 0, tl.exp2(tl.minimum(s + a[:, None], 0.0) * scale[:, None]), 0.0)
    return tl.where(lam > 0, lam * g * inv_eps[:, None], 0.0)


@triton.jit
def _clamp_mass(count, a, a_next, scale, log2_k):
    """sum over C_t of p: a count [R] times one exponential."""
    p = tl.exp2((a_next - a) * scale - log2_k)
    return tl.where(count > 0, count.to(a.dtype) * p, 0.0)


@triton.jit(do_not_specialize=["n_rows", "k_stride", "t_floor", "n_iters"])
def _backward(
    grad_ptr,
    scores_ptr,
    states_ptr,
    k_ptr,
    k_value: tl.float64,
    mask_ptr,
    dscores_ptr,
    dk_ptr,
    n_rows,
    n_cols,
    grad_stride,
    scores_stride,
    mask_stride,
    k_stride,
    eps: tl.float64,
    eps_init: tl.float64,
    eps_above: tl.float64,
    eps_growth: tl.float64,
    eps_last: tl.float64,
    t_floor,
    n_iters,
    RESIDENT: tl.constexpr,
    K_IS_TENSOR: tl.constexpr,
    CLAMP_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
):
    """One reduction for A_T, one count an iteration, and the elementwise sum over the iterations.

    The schedule is walked backwards: eps from iteration t_floor on, before it eps_above (the last one above the floor)
    growing by eps_growth = 1/eps_decay a step.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    lanes = tl.arange(0, BLOCK)
    k_given = _row_value(k_ptr, k_value, rows, live, k_stride, K_IS_TENSOR, COMPUTE)
    final = tl.load(states_ptr + rows * n_iters + (n_iters - 1), mask=live, other=float("-inf"))
    bad = final != final
    dead = final == float("-inf")
    e_last = (tl.zeros([1], tl.float64) + eps_last).to(COMPUTE)
    scale = _exp2_scale(e_last)
    a_next = _load_state(states_ptr, rows, live, n_iters, n_iters)
    inside = live[:, None] & (lanes < n_cols)[None, :]
    u = tl.zeros([1], tl.float64) + eps_above
    floor = tl.zeros([1], tl.float64) + eps
    dlogk = tl.zeros([ROWS], COMPUTE)

    if RESIDENT:
        s = _load_scores(scores_ptr, mask_ptr, rows, lanes, inside, scores_stride, mask_stride, HAS_MASK, COMPUTE)
        g = tl.load(grad_ptr + rows[:, None] * grad_stride + lanes[None, :], mask=inside, other=0.0).to(COMPUTE)
        n_valid = tl.sum((s > float("-inf")).to(tl.int32), axis=1)
        k = _budget(k_given, n_valid, CLAMP_K)
        log2_k = _log_budget(k, bad | dead) * LOG2E
        ds = _last_ds(s, g, a_next, scale, 1.0 / e_last)
        mass = tl.sum(ds, axis=1)
        for t in range(n_iters - 1, 0, -1):
            e = tl.where(t >= t_floor, floor, u).to(COMPUTE)
            scale_t = _exp2_scale(e)
            u = tl.where(t >= t_floor, u, u * eps_growth)
            a = _load_state(states_ptr, rows, live, t, n_iters)
            dlogk += mass * e
            free = s + a[:, None] <= 0
            p = tl.exp2((s + a_next[:, None]) * scale_t[:, None] - log2_k[:, None])
            ds -= tl.where(free, mass[:, None] * p, 0.0)
            count = n_valid - tl.sum((free & (s > float("-inf"))).to(tl.int32), axis=1)
            mass *= _clamp_mass(count, a, a_next, scale_t, log2_k)
            a_next = a
        ds = tl.where(dead[:, None] | (s == float("-inf")), 0.0, ds)
        ds = tl.where(bad[:, None], float("nan"), ds)
        tl.store(dscores_ptr + rows[:, None] * n_cols + lanes[None, :], ds.to(dscores_ptr.dtype.element_ty), mask=inside)
    else:
        steps = tl.arange(0, T_BLOCK)
        counts = tl.zeros([ROWS, T_BLOCK], tl.int32)
        valid_acc = tl.zeros([ROWS, BLOCK], tl.int32)
        mass_acc = tl.zeros([ROWS, BLOCK], COMPUTE)
        for start in range(0, n_cols, BLOCK):
            cols = start + lanes
            within = live[:, None] & (cols < n_cols)[None, :]
            s = _load_scores(scores_ptr, mask_ptr, rows, cols, within, scores_stride, mask_stride, HAS_MASK, COMPUTE)
            g = tl.load(grad_ptr + rows[:, None] * grad_stride + cols[None, :], mask=within, other=0.0).to(COMPUTE)
            valid_acc += (s > float("-inf")).to(tl.int32)
            mass_acc += _last_ds(s, g, a_next, scale, 1.0 / e_last)
            for t in range(1, n_iters):
                a = _load_state(states_ptr, rows, live, t, n_iters)
                count = tl.sum((s + a[:, None] > 0).to(tl.int32), axis=1)
                counts += tl.where((steps == t)[None, :], count[:, None], 0)
        n_valid = tl.sum(valid_acc, axis=1)
        k = _budget(k_given, n_valid, CLAMP_K)
        log2_k = _log_budget(k, bad | dead) * LOG2E
        mass = tl.sum(mass_acc, axis=1)
        # masses[:, t] = A_{t+1}, the weight of iteration t
        masses = tl.zeros([ROWS, T_BLOCK], COMPUTE)
        for t in range(n_iters - 1, 0, -1):
            e = tl.where(t >= t_floor, floor, u).to(COMPUTE)
            scale_t = _exp2_scale(e)
            u = tl.where(t >= t_floor, u, u * eps_growth)
            a = _load_state(states_ptr, rows, live, t, n_iters)
            dlogk += mass * e
            masses = tl.where((steps == t)[None, :], mass[:, None], masses)
            count = tl.sum(tl.where((steps == t)[None, :], counts, 0), axis=1)
            mass *= _clamp_mass(count, a, a_next, scale_t, log2_k)
            a_next = a
        for start in range(0, n_cols, BLOCK):
            cols = start + lanes
            within = live[:, None] & (cols < n_cols)[None, :]
            s = _load_scores(scores_ptr, mask_ptr, rows, cols, within, scores_stride, mask_stride, HAS_MASK, COMPUTE)
            g = tl.load(grad_ptr + rows[:, None] * grad_stride + cols[None, :], mask=within, other=0.0).to(COMPUTE)
            a_next = _load_state(states_ptr, rows, live, n_iters, n_iters)
            ds = _last_ds(s, g, a_next, scale, 1.0 / e_last)
            u = tl.zeros([1], tl.float64) + eps_above
            for t in range(n_iters - 1, 0, -1):
                e = tl.where(t >= t_floor, floor, u).to(COMPUTE)
                scale_t = _exp2_scale(e)
                u = tl.where(t >= t_floor, u, u * eps_growth)
                a = _load_state(states_ptr, rows, live, t, n_iters)
                weight = tl.sum(tl.where((steps == t)[None, :], masses, 0.0), axis=1)
                p = tl.exp2((s + a_next[:, None]) * scale_t[:, None] - log2_k[:, None])
                ds -= tl.where(s + a[:, None] <= 0, weight[:, None] * p, 0.0)
                a_next = a
            ds = tl.where(dead[:, None] | (s == float("-inf")), 0.0, ds)
            ds = tl.where(bad[:, None], float("nan"), ds)
            tl.store(dscores_ptr + rows[:, None] * n_cols + cols[None, :], ds.to(dscores_ptr.dtype.element_ty), mask=within)

    e_first = (tl.zeros([1], tl.float64) + eps_init).to(COMPUTE)
    dlogk += mass * e_first
    inner = k >= K_FLOOR
    if CLAMP_K:
        inner = inner & (k_given <= n_valid.to(k.dtype))
    dk = tl.where(dead | ~inner, 0.0, dlogk / tl.where(inner, k, 1.0))
    tl.store(dk_ptr + rows, tl.where(bad, float("nan"), dk), mask=live)


def eps_schedule(n_iters: int, eps: float, eps_init: float, eps_decay: float) -> list[float]:
    """eps_0 … eps_T, in float64 as published."""
    schedule = [eps_init]
    for _ in range(n_iters):
        schedule.append(max(schedule[-1] * eps_decay, eps))
    return schedule


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
        segment, the last one a_T; -inf in a row with no budget or no valid entry, NaN in a NaN row.
    """
    n_rows, n_cols = scores.shape
    compute, _ = compute_dtypes(scores.dtype)
    lam = torch.empty((n_rows, n_cols), dtype=scores.dtype, device=scores.device)
    states = torch.empty((n_rows, segments), dtype=compute, device=scores.device)
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
    check_config("coordinate_descent", config, n_cols)
    resident = config.variant == "resident"
    rows = config.rows_per_program if resident else 1
    recompute = starts is not None
    eps, eps_init = positive(eps, states.dtype), positive(eps_init, states.dtype)
    base, remainder = divmod(n_iters, segments)
    k_ptr, k_value, k_stride = row_value_args(k, scores)
    mask_ptr, mask_stride = mask_args(mask, scores)
    with on_device(scores.device):
        _iterate[(triton.cdiv(n_rows, rows) * (segments if recompute else 1),)](
            scores,
            k_ptr,
            k_value,
            mask_ptr,
            lam,
            starts if starts is not None else states,
            states,
            n_rows,
            n_cols,
            scores.stride(0),
            mask_stride,
            k_stride,
            eps,
            eps_init,
            eps_decay,
            n_iters,
            base,
            remainder,
            segments,
            RECOMPUTE=recompute,
            RESIDENT=resident,
            K_IS_TENSOR=isinstance(k, torch.Tensor),
            CLAMP_K=clamp_k,
            HAS_MASK=mask is not None,
            COMPUTE=compute_dtypes(scores.dtype)[1],
            ROWS=rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of scores [R, n] (in their dtype) and of k [R] (in the compute type).

    Where the forward saved fewer than T states a row, the others are recomputed into a buffer of T numbers a row first.

    Args:
        grad: the gradient of lam, [R, n], stride(1) == 1.
        states: what the forward returned, [R, segments].
        scores, k, mask, n_iters, eps, eps_init, eps_decay, clamp_k, config: as in :func:`coordinate_descent_forward`.
    """
    n_rows, n_cols = scores.shape
    compute, tl_compute = compute_dtypes(scores.dtype)
    check_config("coordinate_descent", config, n_cols)
    eps, eps_init = positive(eps, compute), positive(eps_init, compute)
    segments = states.shape[1]
    if segments < n_iters:
        starts, states = states, torch.empty((n_rows, n_iters), dtype=compute, device=scores.device)
        _launch_iterate(scores, k, mask, n_iters, eps, eps_init, eps_decay, clamp_k, segments, config, states, states, starts)
    dscores = torch.empty((n_rows, n_cols), dtype=scores.dtype, device=scores.device)
    dk = torch.empty((n_rows,), dtype=compute, device=scores.device)
    resident = config.variant == "resident"
    rows = config.rows_per_program if resident else 1
    schedule = eps_schedule(n_iters, eps, eps_init, eps_decay)
    t_floor = n_iters
    while t_floor > 0 and schedule[t_floor - 1] == eps:
        t_floor -= 1
    k_ptr, k_value, k_stride = row_value_args(k, scores)
    mask_ptr, mask_stride = mask_args(mask, scores)
    with on_device(scores.device):
        _backward[(triton.cdiv(n_rows, rows),)](
            grad,
            scores,
            states,
            k_ptr,
            k_value,
            mask_ptr,
            dscores,
            dk,
            n_rows,
            n_cols,
            grad.stride(0),
            scores.stride(0),
            mask_stride,
            k_stride,
            eps,
            eps_init,
            schedule[max(t_floor - 1, 0)],
            1.0 / eps_decay,
            schedule[n_iters],
            t_floor,
            n_iters,
            RESIDENT=resident,
            K_IS_TENSOR=isinstance(k, torch.Tensor),
            CLAMP_K=clamp_k,
            HAS_MASK=mask is not None,
            COMPUTE=tl_compute,
            ROWS=rows,
            BLOCK=config.block,
            T_BLOCK=1 if resident else triton.next_power_of_2(n_iters),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dscores, dk
