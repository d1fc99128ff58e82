"""How the kernels hold rows of scores in the threads of a program, sum over them, and share sums between programs.

A tile is a tensor [REPS, ROWS, LANES, VEC]. A thread has REPS groups of VEC neighbouring columns of one row, and LANES threads
share the row, so every load is 16 bytes a thread and coalesced, and everything but the last few additions of a sum happens
inside a thread. Values of a row are [ROWS]: they are computed once by each of its lanes, and by fewer lanes where several rows
share a warp, which is what makes short rows cheap.

Neighbours are loaded at once only where every row begins aligned. Triton finds that for lengths and strides that are multiples of
16; what is a multiple of less goes through ``multiple``. VEC is no more than the length allows, 1 for an odd one.

A sum over a row is in one fixed order. Threads that meet in a sum hold the same bits afterwards: their sums are exchanged
pairwise, a + b in one and b + a in the other. That holds as long as no product is fused into such an exchange, where one side
would round it and the other not. A thread with several entries adds them up first; where it may have only one (REPS is 1: Triton
gives the columns of a small tile to more threads than LANES) a product goes through a ``tl.where``. kernels/aot.py looks for it.

Programs that share a row exchange their sums through words of 64 bits in memory, the sum in one half and the number of the
exchange in the other. A word is written and read as a whole, so it says itself whether it is there; no counter, no fence and
no float atomics, and every program adds the same words in the same order.
"""

import triton
import triton.language as tl

LANES_FIRST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))
"""Triton hands threads to the axes of a tensor that are as contiguous as each other in ascending order up to 3.6 and in descending
order since. LANES must get them before ROWS, and REPS none: before 3.7 a tile is stored as [LANES, ROWS, REPS, VEC]."""


CHAINS = tl.constexpr(4)
"""Sums that a thread adds up side by side, at least."""


@triton.jit
def columns(REPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """The columns of a tile, [REPS, 1, LANES, VEC]."""
    vec = tl.arange(0, VEC)[None, None, None, :]
    if LANES_FIRST:
        reps = tl.arange(0, REPS)[None, None, :, None]
        lanes = tl.arange(0, LANES)[:, None, None, None]
    else:
        reps = tl.arange(0, REPS)[:, None, None, None]
        lanes = tl.arange(0, LANES)[None, None, :, None]
    return (reps * LANES + lanes) * VEC + vec


@triton.jit
def multiple(x, UNIT: tl.constexpr):
    """A length or stride that is a multiple of UNIT, so that the compiler sees it: else it makes a load for every entry."""
    if UNIT > 1:
        x = x // UNIT * UNIT
    return x


@triton.jit
def spread(value):
    """A value a row [ROWS] beside a tile, [1, ROWS, 1, 1]."""
    return value[None, :, None, None]


@triton.jit
def _chains(x):
    """A tile whose columns of a thread are [n, CHAINS] in place of [REPS, VEC] where VEC is less.

    Sums of n terms are as exact for rows of an odd length as for others, and an addition need not wait for the one before it.
    """
    VEC: tl.constexpr = x.shape[3]
    REPS: tl.constexpr = x.shape[2 if LANES_FIRST else 0]
    if VEC < CHAINS and REPS * VEC > CHAINS:
        if LANES_FIRST:
            x = tl.reshape(x, [x.shape[0], x.shape[1], REPS * VEC // CHAINS, CHAINS])
        else:
            x = tl.reshape(x, [REPS * VEC // CHAINS, CHAINS // VEC, x.shape[1], x.shape[2], VEC])
            x = tl.permute(x, [0, 2, 3, 1, 4])
            x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], CHAINS])
    return x


@triton.jit
def fold(x):
    """What a thread adds up by itself, [ROWS, LANES]."""
    x = _chains(x)
    if LANES_FIRST:
        return tl.trans(tl.sum(tl.sum(x, 2), 2))
    else:
        return tl.sum(tl.sum(x, 0), 2)


@triton.jit
def row_sum(x):
    """The sum over a row, [ROWS]."""
    return tl.sum(fold(x), 1)


@triton.jit
def row_sums(x, y):
    """Two sums over a row of the same type in one exchange between the threads, each [ROWS]."""
    return tl.split(tl.sum(tl.join(fold(x), fold(y)), 1))


@triton.jit
def fold_max(x):
    """The largest that a thread has, [ROWS, LANES]."""
    x = _chains(x)
    if LANES_FIRST:
        return tl.trans(tl.max(tl.max(x, 2), 2))
    else:
        return tl.max(tl.max(x, 0), 2)


@triton.jit
def row_max(x):
    return tl.max(fold_max(x), 1)


@triton.jit
def row_value(ptr, value, rows, live, stride, IS_TENSOR: tl.constexpr, COMPUTE: tl.constexpr):
    """One number a row, [ROWS]: loaded from a tensor, or the launch argument."""
    if IS_TENSOR:
        return tl.load(ptr + rows * stride, mask=live, other=1.0).to(COMPUTE)
    else:
        return (tl.zeros_like(rows).to(COMPUTE) + value).to(COMPUTE)


@triton.jit
def load_tile(
    scores_ptr, mask_ptr, rows, cols, inside, stride, mask_stride,
    HAS_MASK: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Scores of a tile in the compute type; -inf wherever an entry is masked or outside. EVEN: nothing is outside."""
    at = scores_ptr + spread(rows * stride) + cols
    if EVEN:
        s = tl.load(at).to(COMPUTE)
    else:
        s = tl.load(at, mask=inside, other=float("-inf")).to(COMPUTE)
    if HAS_MASK:
        at = mask_ptr + spread(rows * mask_stride) + cols
        if EVEN:
            valid = tl.load(at)
        else:
            valid = tl.load(at, mask=inside, other=0)
        s = tl.where(valid != 0, s, float("-inf"))
    return s


@triton.jit
def row_sums3(x, y, z):
    """Three sums over a row of the same type in one exchange between the threads, each [ROWS]."""
    ones, twos = tl.split(tl.sum(tl.join(tl.join(fold(x), fold(z)), tl.join(fold(y), fold(z))), 1))
    sum_x, sum_z = tl.split(ones)
    sum_y, _ = tl.split(twos)
    return sum_x, sum_y, sum_z


@triton.jit
def back_and_forth(index, count, turn):
    """The tiles of a pass in turn up and down, so that a pass finds in the cache what the one before it read last."""
    return tl.where(turn % 2 == 0, index, count - 1 - index)


# --- programs that share a row ---------------------------------------------------------------------------------------

SLOTS = tl.constexpr(5)
"""Words of one exchange a program: a, b and c, and the high halves of a and c in float64."""


@triton.jit
def _publish(words_ptr, bits, part, epoch, slot, alive, PROGRAMS: tl.constexpr, RING: tl.constexpr):
    """Writes a program's own word of one slot: int32 bits [1] beside the number of the exchange."""
    word = (epoch.to(tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
    at = words_ptr + ((epoch % RING) * SLOTS + slot) * PROGRAMS + part
    tl.atomic_xchg(at + tl.zeros_like(word), word, mask=alive & (word == word), sem="relaxed")


@triton.jit
def _collect(words_ptr, epoch, slot, PROGRAMS: tl.constexpr, P_BLOCK: tl.constexpr, RING: tl.constexpr):
    """The words of one slot as they are now, [P_BLOCK], and 1 where one is not there yet."""
    parts = tl.arange(0, P_BLOCK)
    at = words_ptr + ((epoch % RING) * SLOTS + slot) * PROGRAMS + parts
    words = tl.load(at, mask=parts < PROGRAMS, other=0, volatile=True)
    return words, ((words >> 32 != epoch) & (parts < PROGRAMS)).to(tl.int32)


@triton.jit
def _collect_all(
    words_ptr, epoch, WITH_C: tl.constexpr, DOUBLE: tl.constexpr, PROGRAMS: tl.constexpr, P_BLOCK: tl.constexpr, RING: tl.constexpr
):
    a, missing = _collect(words_ptr, epoch, 0, PROGRAMS, P_BLOCK, RING)
    b, more = _collect(words_ptr, epoch, 1, PROGRAMS, P_BLOCK, RING)
    missing |= more
    c, a_high, c_high = a, a, a
    if WITH_C:
        c, more = _collect(words_ptr, epoch, 2, PROGRAMS, P_BLOCK, RING)
        missing |= more
    if DOUBLE:
        a_high, more = _collect(words_ptr, epoch, 3, PROGRAMS, P_BLOCK, RING)
        missing |= more
        if WITH_C:
            c_high, more = _collect(words_ptr, epoch, 4, PROGRAMS, P_BLOCK, RING)
            missing |= more
    return a, b, c, a_high, c_high, tl.max(missing, 0)


@triton.jit
def _decode(low, high, P_BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, DOUBLE: tl.constexpr):
    if DOUBLE:
        value = ((low & 0xFFFFFFFF) | (high << 32)).to(tl.float64, bitcast=True)
    else:
        value = (low & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(tl.arange(0, P_BLOCK) < PROGRAMS, value, tl.zeros_like(value))


@triton.jit
def exchange(
    words_ptr, a, b, c, part, epoch, alive,
    WITH_C: tl.constexpr, COOPERATIVE: tl.constexpr, PROGRAMS: tl.constexpr, P_BLOCK: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Exchanges a and c (the compute type, [1]) and b (int32, [1]) with the programs that share the row.

    Args:
        words_ptr: int64 [RING, SLOTS, PROGRAMS] of this row, all 0 at the launch.
        part: which of the programs this one is.
        epoch: the number of the exchange, from 1; every program does the same exchanges in the same order.
        alive: whether what this program holds is worth anything, see below.
        WITH_C: whether c is exchanged; else it comes back as a.

    Returns:
        a, b and c of every program, each [P_BLOCK] and 0 beyond the last, and ``alive``.

    COOPERATIVE programs run at the same time and wait for each other. A program can be one exchange ahead of another, no more,
    so that a ring of two is enough. For that all its warps must have seen an exchange before it begins the next one: a warp may
    wait for itself, and where no sum brings the warps together one of them could be left behind for good. Without COOPERATIVE
    (Triton's interpreter runs programs one after another) a program goes on with what is there; from the first exchange that is
    not complete it is not alive, writes nothing, and is to be launched again: each launch repeats the row from the start and gets
    at least one exchange further, with a ring that keeps them all.
    """
    DOUBLE: tl.constexpr = a.dtype == tl.float64
    if COOPERATIVE:
        tl.debug_barrier()
    if DOUBLE:
        a_bits = a.to(tl.int64, bitcast=True)
        _publish(words_ptr, (a_bits & 0xFFFFFFFF).to(tl.int32), part, epoch, 0, alive, PROGRAMS, RING)
        _publish(words_ptr, (a_bits >> 32).to(tl.int32), part, epoch, 3, alive, PROGRAMS, RING)
    else:
        _publish(words_ptr, a.to(tl.int32, bitcast=True), part, epoch, 0, alive, PROGRAMS, RING)
    _publish(words_ptr, b, part, epoch, 1, alive, PROGRAMS, RING)
    if WITH_C:
        if DOUBLE:
            c_bits = c.to(tl.int64, bitcast=True)
            _publish(words_ptr, (c_bits & 0xFFFFFFFF).to(tl.int32), part, epoch, 2, alive, PROGRAMS, RING)
            _publish(words_ptr, (c_bits >> 32).to(tl.int32), part, epoch, 4, alive, PROGRAMS, RING)
        else:
            _publish(words_ptr, c.to(tl.int32, bitcast=True), part, epoch, 2, alive, PROGRAMS, RING)
    low_a, of_b, low_c, high_a, high_c, missing = _collect_all(words_ptr, epoch, WITH_C, DOUBLE, PROGRAMS, P_BLOCK, RING)
    if COOPERATIVE:
        while missing > 0:
            low_a, of_b, low_c, high_a, high_c, missing = _collect_all(words_ptr, epoch, WITH_C, DOUBLE, PROGRAMS, P_BLOCK, RING)
    all_a = _decode(low_a, high_a, P_BLOCK, PROGRAMS, DOUBLE)
    all_c = _decode(low_c, high_c, P_BLOCK, PROGRAMS, DOUBLE)
    all_b = tl.where(tl.arange(0, P_BLOCK) < PROGRAMS, (of_b & 0xFFFFFFFF).to(tl.int32), 0)
    return all_a, all_b, all_c, alive & (missing == 0)
