"""Mutants of our own code: each a small fault of a kind that people make, which the verification suite has to find.

A mutant replaces one piece of text, which stands exactly once in its file, by another of as many lines (so that Triton's
cache still serves every kernel below it). ``where`` says at which places of sight it can be seen at all:

    interpreter   the Triton kernels, run by Triton's interpreter on a CPU
    gpu           the same, compiled
    cpu           what is not Triton: the torch backend, autograd, registration, the front door
"""

from __future__ import annotations

from dataclasses import dataclass

SOFT, DESCENT, BOTH = "soft_topk", "coordinate_descent", "both"


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: as it appears in tables.
        sentence: what is wrong, for a person.
        file: below the package.
        old, new: what is replaced, and by what.
        op: the operator that it is a fault of, or "both".
        where: the places of sight.
        equivalent: why nothing can tell it from the original; "" where something can.
    """

    name: str
    sentence: str
    file: str
    old: str
    new: str
    op: str
    where: tuple[str, ...]
    equivalent: str = ""

    @property
    def ops(self) -> tuple[str, ...]:
        return (SOFT, DESCENT) if self.op == BOTH else (self.op,)

    def applied(self, source: str) -> str:
        """The source with the fault in it.

        Raises:
            ValueError: the text does not stand there exactly once, or lines would move.
        """
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"mutant {self.name}: the text to replace stands {count} times in {self.file}; needed is once")
        if self.old == self.new or self.old.count("\n") != self.new.count("\n"):
            raise ValueError(f"mutant {self.name}: old and new must differ, and have as many lines")
        return source.replace(self.old, self.new)


_TRITON, _GPU, _INTERPRETER, _CPU = ("interpreter", "gpu"), ("gpu",), ("interpreter",), ("cpu",)
_ANY = ("cpu", "gpu")

CATALOGUE: list[Mutant] = []


def _in(file: str, op: str, where: tuple[str, ...] = _TRITON) -> object:
    """Mutants of one file; ``where`` and ``op`` may be said anew for each."""

    def add(name: str, sentence: str, old: str, new: str, **other: object) -> None:
        settings = {"op": op, "where": where} | other
        CATALOGUE.append(Mutant(name, sentence, file, old, new, **settings))  # type: ignore[arg-type]

    return add


# --- kernels/rows.py -------------------------------------------------------------------------------------------------

rows = _in("kernels/rows.py", BOTH)

rows(
    "load without mask",
    "a tile of scores is loaded without a mask, so that a row takes in what lies behind it",
    's = tl.load(at, mask=inside, other=float("-inf")).to(COMPUTE)',
    "s = tl.load(at).to(COMPUTE)",
)
rows(
    "load fills with 0",
    "columns beyond the end are filled with 0 and not with -inf, so that they count",
    's = tl.load(at, mask=inside, other=float("-inf")).to(COMPUTE)',
    "s = tl.load(at, mask=inside, other=0.0).to(COMPUTE)",
)
rows(
    "mask not applied",
    "the mask is loaded, and what is masked is kept",
    's = tl.where(valid != 0, s, float("-inf"))',
    "s = tl.where(valid != 0, s, s)",
)
rows(
    "mask upside down",
    "True is taken for masked",
    's = tl.where(valid != 0, s, float("-inf"))',
    's = tl.where(valid == 0, s, float("-inf"))',
)
rows(
    "mask with the scores' stride",
    "the rows of the mask are found with the row stride of the scores",
    "at = mask_ptr + spread(rows * mask_stride) + cols",
    "at = mask_ptr + spread(rows * stride) + cols",
)
rows(
    "columns not spread over lanes",
    "two threads hold the same columns, and others are held by none",
    "return (reps * LANES + lanes) * VEC + vec",
    "return (reps * LANES + lanes // 2 * 2) * VEC + vec",
)
rows(
    "k of row 0",
    "every row gets the first one's k and eps",
    "return tl.load(ptr + rows * stride, mask=live, other=1.0).to(COMPUTE)",
    "return tl.load(ptr + rows * 0 * stride, mask=live, other=1.0).to(COMPUTE)",
)
rows(
    "k with stride 1",
    "a tensor k or eps is read as if its values were adjacent",
    "return tl.load(ptr + rows * stride, mask=live, other=1.0).to(COMPUTE)",
    "return tl.load(ptr + rows, mask=live, other=1.0).to(COMPUTE)",
)
rows(
    "number as float32",
    "a k or eps that is a number is rounded to float32, also where the kernel computes in float64",
    "return (tl.zeros_like(rows).to(COMPUTE) + value).to(COMPUTE)",
    "return (tl.zeros_like(rows).to(COMPUTE) + value).to(tl.float32).to(COMPUTE)",
)
rows(
    "second sum for the first",
    "of two sums over a row the second is returned twice",
    "return tl.split(tl.sum(tl.join(fold(x), fold(y)), 1))",
    "return tl.split(tl.sum(tl.join(fold(y), fold(y)), 1))",
)
rows(
    "last program left out",
    "the sums of programs that share a row are added up without the last one's",
    "return tl.where(tl.arange(0, P_BLOCK) < PROGRAMS, value, tl.zeros_like(value))",
    "return tl.where(tl.arange(0, P_BLOCK) < PROGRAMS - 1, value, tl.zeros_like(value))",
)
rows(
    "one program twice",
    "the word of one program is read in place of the last one's",
    """    at = words_ptr + ((epoch % RING) * SLOTS + slot) * PROGRAMS + parts
    words = tl.load""",
    """    at = words_ptr + ((epoch % RING) * SLOTS + slot) * PROGRAMS + tl.minimum(parts, PROGRAMS - 2)
    words = tl.load""",
)
rows(
    "does not wait",
    "a program goes on with the sums that are there, complete or not",
    "    return all_a, all_b, all_c, alive & (missing == 0)",
    "    return all_a, all_b, all_c, alive",
    where=_INTERPRETER,
)
rows(
    "any round will do",
    "a program takes the word of an earlier exchange for that of this one",
    "return words, ((words >> 32 != epoch) & (parts < PROGRAMS)).to(tl.int32)",
    "return words, ((words >> 32 == 0) & (parts < PROGRAMS)).to(tl.int32)",
    where=_GPU,
)
rows(
    "a warp runs ahead",
    "a program begins an exchange before all its warps have seen the one before",
    "        tl.debug_barrier()",
    "        pass",
    where=_GPU,
)
rows(
    "c is a",
    "the third value of an exchange is the first one",
    "            _publish(words_ptr, c.to(tl.int32, bitcast=True), part, epoch, 2, alive, PROGRAMS, RING)",
    "            _publish(words_ptr, a.to(tl.int32, bitcast=True), part, epoch, 2, alive, PROGRAMS, RING)",
)
rows(
    "half of a float64",
    "of a float64 that programs exchange both halves are the low one",
    "_publish(words_ptr, (a_bits >> 32).to(tl.int32), part, epoch, 3, alive, PROGRAMS, RING)",
    "_publish(words_ptr, (a_bits & 0xFFFFFFFF).to(tl.int32), part, epoch, 3, alive, PROGRAMS, RING)",
    where=_GPU,
)

# --- kernels/launch.py -----------------------------------------------------------------------------------------------

launch = _in("kernels/launch.py", BOTH)

launch(
    "float64 in float32",
    "float64 scores are computed in float32",
    "return (torch.float64, tl.float64) if dtype == torch.float64",
    "return (torch.float64, tl.float32) if dtype == torch.float64",
)
launch(
    "mask rows adjacent",
    "the launch takes the rows of a mask for adjacent",
    "return mask.view(torch.uint8), mask.stride(0)",
    "return mask.view(torch.uint8), mask.shape[1]",
)
launch(
    "stride of k forgotten",
    "the launch takes the values of a tensor k or eps for adjacent",
    "return value, 0.0, value.stride(0)",
    "return value, 0.0, 1",
)
launch(
    "last program of a row not started",
    "the columns of the last, incomplete share of a row belong to nobody",
    "programs = max(1, -(-n_cols // chunk))",
    "programs = max(1, n_cols // chunk)",
)
launch(
    "incomplete tiles taken for whole",
    "a row whose length is no multiple of the tile is read and written without masks",
    "even = n_cols > 0 and n_cols == programs * chunk and chunk % block == 0",
    "even = n_cols > 0 and n_cols == programs * chunk",
)
launch(
    "strides taken for aligned",
    "rows that lie further apart than they are long are taken to be as aligned as their length says",
    "    sizes = (n_cols, *strides)\n",
    "    sizes = (n_cols,)\n",
)

# --- kernels/soft_topk.py --------------------------------------------------------------------------------------------

soft = _in("kernels/soft_topk.py", SOFT)

soft(
    "soft_topk: store without mask",
    "lam is stored beyond the end of a row",
    "tl.store(lam_ptr + spread(rows * n_cols) + start + cols, lam.to(lam_ptr.dtype.element_ty), mask=inside)",
    "tl.store(lam_ptr + spread(rows * n_cols) + start + cols, lam.to(lam_ptr.dtype.element_ty), mask=stored)",
)
soft(
    "soft_topk: gradient stored without mask",
    "the gradient is stored beyond the end of a row",
    "            inside = spread(live) if EVEN else spread(live) & (start + cols < end)\n            tl.store(dscores_ptr",
    "            inside = spread(live) if EVEN else spread(live) & (start + cols < end + 1)\n            tl.store(dscores_ptr",
)
soft(
    "soft_topk: rows beyond the last",
    "the rows of the last program beyond the end of the batch are worked on and stored",
    """    live = rows < n_rows
    # a program's rows beyond the last repeat it, unstored
    rows = tl.minimum(rows, n_rows - 1)
""",
    """    live = rows >= 0
    # a program's rows beyond the last repeat it, unstored
    rows = rows + 0
""",
)
soft(
    "soft_topk: row number in 32 bits",
    "the number of a row is a 32-bit integer, so that its distance wraps beyond 2^31 elements",
    """    program = tl.program_id(0).to(tl.int64)
    part = (program % PROGRAMS).to(tl.int32)
    start = part * chunk
    end = tl.minimum(start + chunk, n_cols)
    cols = columns(REPS, LANES, VEC)
    if PROGRAMS > 1:""",
    """    program = tl.program_id(0)
    part = (program % PROGRAMS).to(tl.int32)
    start = part * chunk
    end = tl.minimum(start + chunk, n_cols)
    cols = columns(REPS, LANES, VEC)
    if PROGRAMS > 1:""",
    where=_GPU,
)
soft(
    "soft_topk: lam rounded to bfloat16",
    "lam is rounded once more than to the scores' dtype",
    "tl.store(lam_ptr + spread(rows * n_cols) + start + cols, lam.to(lam_ptr.dtype.element_ty), mask=inside)",
    "tl.store(lam_ptr + spread(rows * n_cols) + start + cols, lam.to(tl.bfloat16).to(lam_ptr.dtype.element_ty), mask=inside)",
)
soft(
    "soft_topk: input written to",
    "the first score of a row is overwritten",
    "    first = live & alive & (part == 0)\n",
    "    first = live & alive & (part == 0); tl.store(scores_ptr + rows * scores_stride, hi * 0, mask=first)\n",
)
soft(
    "soft_topk: NaN does not spread",
    "a NaN entry is left out of its row, which is solved without it",
    '    bad = (n_nan > 0) | (k != k) | ~((eps > 0) & (eps < float("inf")))',
    '    bad = (k != k) | ~((eps > 0) & (eps < float("inf")))',
)
soft(
    "soft_topk: +inf taken for finite",
    "a score of +inf counts as a finite one, and is what the others are measured from where it comes first",
    '    return (x > float("-inf")) & (x < float("inf"))',
    '    return x > float("-inf")',
)
soft(
    "soft_topk: +inf keeps no budget",
    "entries of +inf do not use up budget",
    "    budget = k - n_inf\n",
    "    budget = k\n",
)
soft(
    "soft_topk: +inf not in the residual",
    "the saturated entries of +inf are not counted when the sum is compared with k",
    "    residual = ((count + n_inf) - k) + unsaturated",
    "    residual = (count - k) + unsaturated",
)
soft(
    "soft_topk: only the last tile has NaN",
    "the count of NaN entries is that of the last tile",
    "        n_nan += fold((s != s).to(tl.int32))",
    "        n_nan = fold((s != s).to(tl.int32))",
)
soft(
    "soft_topk: k not clamped",
    "a budget above the number of entries is solved for",
    "    full = ~bad & (k >= n_finite + n_inf)",
    "    full = bad & (k >= n_finite + n_inf)",
)
soft(
    "soft_topk: k = 0 not seen",
    "a row with no budget is solved for",
    "    empty = ~bad & ~full & (budget <= 0)",
    "    empty = ~bad & ~full & (budget < 0)",
    equivalent="a budget of 0 makes both bounds infinite, and an infinite threshold is what is stored for such a row",
)
soft(
    "soft_topk: settled rows stored as others",
    "rows without a threshold of their own are stored by the formula of those that have one",
    "    special = special | _any(done)\n",
    "    special = special & _any(done)\n",
)
soft(
    "soft_topk: shift missing",
    "the exponentials are those of the scores, and not of their distance from the threshold",
    "            w = tl.exp2(tl.minimum((s - spread(hi)) * spread(scale), CLIP))",
    "            w = tl.exp2(tl.minimum(s * spread(scale), CLIP))",
)
soft(
    "soft_topk: exponential not clipped",
    "an exponential that is made anew overflows far above the threshold, and times 0 it is NaN",
    "    w = tl.exp2(tl.minimum((s - spread(hi)) * spread(scale), CLIP))\n    return",
    "    w = tl.exp2((s - spread(hi)) * spread(scale))\n    return",
)
soft(
    "soft_topk: > for >=",
    "an entry at the threshold itself is taken for unsaturated",
    "            free = (w < spread(q)).to(COMPUTE)",
    "            free = (w <= spread(q)).to(COMPUTE)",
    equivalent="at the threshold w/q is 1, saturated or not: the sum is the same, and the root with it",
)
soft(
    "soft_topk: all taken for unsaturated",
    "saturated entries are added up as if they were not",
    "            weight, n_free = row_sums(w * free, free)",
    "            weight, n_free = row_sums(w, free)",
)
soft(
    "soft_topk: padding counted as saturated",
    "the number of saturated entries is that of the columns, and not of the tile, less the free ones",
    "            saturated = BLOCK - n_free",
    "            saturated = n_cols - n_free",
)
soft(
    "soft_topk: lower bound never raised",
    "the bracket is not moved up where the sum is above k",
    "    low = tl.where(residual > 0, tl.maximum(low, lo), low)",
    "    low = tl.where(residual > 0, low, low)",
)
soft(
    "soft_topk: upper bound below the root",
    "the bracket is moved down where the sum is above k, and away from the root",
    "    high = tl.where(residual > 0, high, tl.minimum(high, lo + eps * beyond))",
    "    high = tl.where(residual < 0, high, tl.minimum(high, lo + eps * beyond))",
)
soft(
    "soft_topk: upper bound lowered too far",
    "where the sum is below k the upper bound goes below the root that it would have if no entry changed sides",
    "tl.minimum(high, lo + eps * beyond))",
    "tl.minimum(high, lo + 4.0 * eps * beyond))",
)
soft(
    "soft_topk: guess taken for a lower bound",
    "in rows that share a program the bracket begins at the first guess, however few entries are above it",
    "            low = tl.where(over >= k, tl.maximum(low, 0.0), low)",
    "            low = tl.where(over >= 1, tl.maximum(low, 0.0), low)",
)
soft(
    "soft_topk: approximant far from 1",
    "in rows that share a program the step goes by the approximant of the logarithm also where that is far too short",
    "        inside = inside & (ratio > -0.95)",
    "        inside = inside & (ratio > -2.0)",
    equivalent="the row takes more sweeps, to the same root; tests/test_kernels.py counts them",
)
soft(
    "soft_topk: ends too early",
    "a row is done at a residual that the last step does not mend",
    "        TOLERANCE=2.0**-48 if double else 2.0**-20,",
    "        TOLERANCE=2.0**-24 if double else 2.0**-6,",
)
soft(
    "soft_topk: float64 to the tolerance of float32",
    "float64 rows are solved as far as float32 rows are",
    "        TOLERANCE=2.0**-48 if double else 2.0**-20,",
    "        TOLERANCE=2.0**-20,",
)
soft(
    "soft_topk: last sweeps left out",
    "no row gets more than three sweeps",
    "    while pending & (sweep < MAX_SWEEPS):",
    "    while pending & (sweep < 3):",
)
soft(
    "soft_topk: not recentred",
    "the exponentials are never made anew where the threshold has drifted away from them",
    "            far = ~done & (tl.abs(lo) * scale > DRIFT) & (hi + lo != hi)",
    "            far = ~done & (tl.abs(lo) * scale > 1e30) & (hi + lo != hi)",
)
soft(
    "soft_topk: what rounding takes is lost",
    "when the threshold moves into its high part, what that cannot hold is dropped",
    "    new_lo = tl.where(which, (hi - (moved - shift)) - back, lo)",
    "    new_lo = tl.where(which, 0.0 * back, lo)",
)
soft(
    "soft_topk: threshold beyond the type",
    "the middle of a bracket that is wider than the type becomes the threshold",
    "    moved = tl.where(which, tl.minimum(tl.maximum(hi + lo, -_largest(hi)), _largest(hi)), hi)",
    "    moved = tl.where(which, hi + lo, hi)",
)
soft(
    "soft_topk: threshold always near 0",
    "the bracket of a row with scores far off is that of the others, whether or not the threshold is among them",
    "        among = odd & (rest > 0) & (rest < of_near.to(COMPUTE))",
    "        among = odd & (rest == rest)",
)
soft(
    "soft_topk: bracket of odd rows from their scores",
    "the ends of a row with infinities or scores far off are not measured from the point that the threshold is measured from",
    "tl.minimum(largest, near), largest - anchor), most)",
    "tl.minimum(largest, near), smallest - anchor), most)",
)
soft(
    "soft_topk: last tile of a pass left out",
    "a row that is re-read in tiles is read without the last, incomplete one",
    "    n_tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK)\n    ahead",
    "    n_tiles = tl.maximum(end - start, 0) // BLOCK\n    ahead",
)
soft(
    "soft_topk: stale exchange",
    "the first sweep of programs that share a row has the number of the exchange before it",
    """        epoch += 1
        # back to [ROWS], which is [1] here
""",
    """        epoch += 0
        # back to [ROWS], which is [1] here
""",
)
soft(
    "soft_topk: sums of one program",
    "each program that shares a row goes by the unsaturated mass of its own columns",
    """            epoch += 1
            weight = tl.zeros_like(weight) + tl.sum(all1, 0)
            saturated = tl.zeros([ROWS], tl.int32) + tl.sum(counts, 0)
        unsaturated""",
    """            epoch += 1
            weight = weight + 0.0 * tl.sum(all1, 0)
            saturated = tl.zeros([ROWS], tl.int32) + tl.sum(counts, 0)
        unsaturated""",
)
soft(
    "soft_topk: first sweep of one program",
    "each program that shares a row goes by the saturated entries of its own columns in the sweep that finds the moments",
    """            saturated = tl.zeros_like(saturated) + tl.sum(counts, 0)
    n_nan""",
    """            saturated = saturated + 0 * tl.sum(counts, 0)
    n_nan""",
    where=_GPU,
)
soft(
    "soft_topk: first sweep saturated late",
    "the sweep that finds the moments of a row that is re-read takes entries for saturated from twice the threshold's weight on",
    "            over = v >= 1.0",
    "            over = v >= 2.0",
    where=_GPU,
)
soft(
    "soft_topk: lam never stored",
    "lam of a row that is re-read is taken to be there after a sweep that did not store it",
    "        lam_is_stored = storing & ~pending\n",
    "        lam_is_stored = ~special & ~pending\n",
)
soft(
    "soft_topk: lam of any sweep",
    "every sweep over a row that is re-read stores lam, and the last one is taken for right",
    "                storing = ~special & ~_any(tl.abs(lo - at) * scale > NEXT_TO_NOTHING)",
    "                storing = ~special",
    equivalent="a sweep that need not store is slower for it; its lam is taken only where the step after it is next to nothing",
)
soft(
    "soft_topk: last tile left out for the one before",
    "a sweep over a row that is re-read works on the last tile but one twice, and not on the last",
    "tl.minimum(index + 1, n_tiles - 1), n_tiles, turn)",
    "tl.minimum(index + 1, tl.maximum(n_tiles - 2, 0)), n_tiles, turn)",
)
soft(
    "soft_topk: eps of row 0",
    "the forward takes the first row's eps for every row",
    """    eps = row_value(eps_ptr, eps_value, rows, live, eps_stride, EPS_IS_TENSOR, COMPUTE)
    # what is masked""",
    """    eps = row_value(eps_ptr, eps_value, rows, live, 0, EPS_IS_TENSOR, COMPUTE)
    # what is masked""",
)
soft(
    "soft_topk: one program too few",
    "the last program, whose rows are fewer, is not started",
    "        _forward,\n        (-(-n_rows // shape.rows) * shape.programs,),",
    "        _forward,\n        (max(1, n_rows // shape.rows) * shape.programs,),",
)
soft(
    "soft_topk: words not zeroed",
    "the memory in which programs exchange sums starts with what was there before",
    "words = scores.new_zeros(",
    "words = scores.new_empty(",
)
soft(
    "soft_topk: NaN row with a threshold",
    "the stored threshold of a NaN row is a number",
    '    hi = tl.where(bad, float("nan"), hi)',
    "    hi = tl.where(bad, 0.0, hi)",
)
soft(
    "soft_topk: low part of the threshold left out",
    "the backward goes by the high part of the threshold alone",
    "    d = (s - spread(hi)) - spread(lo)\n    lam = tl.where(d < 0",
    "    d = (s - spread(hi)) - 0.0 * spread(lo)\n    lam = tl.where(d < 0",
)
soft(
    "soft_topk: saturated entries have a gradient",
    "the gradient does not stop at lam = 1",
    "    lam = tl.where(d < 0, tl.exp2(d * spread(scale)), 0.0)",
    "    lam = tl.exp2(tl.minimum(d, 0.0) * spread(scale))",
)
soft(
    "soft_topk: weights of the backward in half precision",
    "the backward rounds lam to the dtype of the scores before it sums",
    "    lam = tl.where(d < 0, tl.exp2(d * spread(scale)), 0.0)",
    "    lam = tl.where(d < 0, tl.exp2(d * spread(scale)), 0.0).to(scores_ptr.dtype.element_ty).to(COMPUTE)",
)
soft(
    "soft_topk: gradient of masked entries",
    "what the incoming gradient holds at masked entries is multiplied by 0, and not left out",
    "    g = tl.where(lam > 0, g, 0.0)",
    "    g = tl.where(lam >= 0, g, 0.0)",
)
soft(
    "soft_topk: mask ignored in the backward",
    "the backward takes masked entries for valid",
    "rows, cols, inside, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE)\n    at = grad_ptr",
    "rows, cols, inside, scores_stride, mask_stride, False, EVEN, COMPUTE)\n    at = grad_ptr",
)
soft(
    "soft_topk: gradient with the scores' stride",
    "the rows of the incoming gradient are found with the row stride of the scores",
    "    at = grad_ptr + spread(rows * grad_stride) + cols",
    "    at = grad_ptr + spread(rows * scores_stride) + cols",
)
soft(
    "soft_topk: gbar not divided",
    "gbar is the weighted sum of g, and not their mean",
    "        gbar = tl.where(mass > 0, weighted / mass, 0.0)",
    "        gbar = tl.where(mass > 0, weighted, 0.0)",
)
soft(
    "soft_topk: gbar left out",
    "the gradient of the threshold is forgotten",
    "    ds = tl.where(lam > 0, lam * (g - spread(gbar)) * spread(inv_eps), 0.0)",
    "    ds = tl.where(lam > 0, lam * (g - 0.0 * spread(gbar)) * spread(inv_eps), 0.0)",
)
soft(
    "soft_topk: gradient not over eps",
    "the gradient of the scores lacks the 1/eps",
    "    ds = tl.where(lam > 0, lam * (g - spread(gbar)) * spread(inv_eps), 0.0)",
    "    ds = tl.where(lam > 0, lam * (g - spread(gbar)) * spread(inv_eps / inv_eps), 0.0)",
)
soft(
    "soft_topk: sign of deps",
    "the gradient of eps has the wrong sign",
    "mask=live & (part == 0))\n        if EPS_IS_TENSOR:\n            tl.store(deps_ptr + rows * PROGRAMS + part, -deps / eps",
    "mask=live & (part == 0))\n        if EPS_IS_TENSOR:\n            tl.store(deps_ptr + rows * PROGRAMS + part, deps / eps",
)
soft(
    "soft_topk: deps without the shift",
    "the gradient of eps sums s ds, which is the same but for rounding, and not (s - tau) ds",
    "                deps = row_sum(d * ds)",
    "                deps = row_sum((d + spread(hi)) * ds)",
)
soft(
    "soft_topk: eps of row 0 in the backward",
    "the backward takes the first row's eps for every row",
    """    eps = row_value(eps_ptr, eps_value, rows, live, eps_stride, EPS_IS_TENSOR, COMPUTE)
    scale = 1.4426950408889634 / eps
    inv_eps""",
    """    eps = row_value(eps_ptr, eps_value, rows, live, 0, EPS_IS_TENSOR, COMPUTE)
    scale = 1.4426950408889634 / eps
    inv_eps""",
)
soft(
    "soft_topk: a share of g left out",
    "the second launch of the backward adds up the weighted g of all programs but the last",
    "        weighted = tl.sum(tl.load(at + PROGRAMS, mask=parts < PROGRAMS, other=0.0), 1)",
    "        weighted = tl.sum(tl.load(at + PROGRAMS, mask=parts < PROGRAMS - 1, other=0.0), 1)",
)
soft(
    "soft_topk: deps of one program",
    "of the gradient of eps only the first program's share is returned",
    "        deps = deps.sum(1) if programs > 1 else deps.view(-1)",
    "        deps = deps[:, 0] if programs > 1 else deps.view(-1)",
)
soft(
    "soft_topk: mass summed anew in each tile",
    "where a row is re-read in tiles, the mass is that of the last tile",
    "            mass_acc += fold(lam)",
    "            mass_acc = fold(lam)",
)

# --- kernels/coordinate_descent.py -----------------------------------------------------------------------------------

descent = _in("kernels/coordinate_descent.py", DESCENT)

descent(
    "descent: store without mask",
    "lam is stored beyond the end of a row",
    "                inside = spread(live) if EVEN else spread(live) & (start + cols < end)\n                tl.store(lam_ptr",
    "                inside = spread(live) if EVEN else spread(live) & (start + cols < end + 1)\n                tl.store(lam_ptr",
)
descent(
    "descent: rows beyond the last",
    "the rows of the last program beyond the end of the batch are worked on and stored",
    """    live = rows < n_rows
    # of programs that share a row the first stores its states
    mine = live & (part == 0)
    # a program's rows beyond the last repeat it, unstored
    rows = tl.minimum(rows, n_rows - 1)
""",
    """    live = rows >= 0
    # of programs that share a row the first stores its states
    mine = live & (part == 0)
    # a program's rows beyond the last repeat it, unstored
    rows = rows + 0
""",
)
descent(
    "descent: row number in 32 bits",
    "the number of a row is a 32-bit integer, so that its distance wraps beyond 2^31 elements",
    "    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)",
    "    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)",
    where=_GPU,
)
descent(
    "descent: one iteration too few",
    "T - 1 iterations are run",
    "        stop = n_iters\n        n_states = segments",
    "        stop = tl.maximum(n_iters - 1, 1)\n        n_states = segments",
)
descent(
    "descent: stale eps",
    "an iteration takes the eps of the next one",
    "        e = eps_t.to(COMPUTE)\n        if t == 0:",
    "        e = tl.maximum(eps_t * eps_decay, floor).to(COMPUTE)\n        if t == 0:",
)
descent(
    "descent: lam with the eps before",
    "lam is computed with eps_{T-1}, and not with eps_T",
    "    return floor, schedule[max(t_floor - 1, 0)], schedule[n_iters], t_floor",
    "    return floor, schedule[max(t_floor - 1, 0)], schedule[n_iters - 1], t_floor",
)
descent(
    "descent: eps above the floor",
    "the backward walks the schedule up from one eps too high",
    "    return floor, schedule[max(t_floor - 1, 0)], schedule[n_iters], t_floor",
    "    return floor, schedule[max(t_floor - 2, 0)], schedule[n_iters], t_floor",
)
descent(
    "descent: tail from the first iteration",
    "where eps is constant the first iteration is run as the others are, on the scores",
    "        max(t_floor, 1),\n        n_iters,",
    "        max(t_floor, 0),\n        n_iters,",
)
descent(
    "descent: tail one iteration early",
    "the iterations that share one exponential begin before eps has reached its last value",
    "        max(t_floor, 1),\n        n_iters,",
    "        max(t_floor - 1, 1),\n        n_iters,",
)
descent(
    "descent: shift not taken back",
    "the shift of the logsumexp is not subtracted from a",
    "    return eps_t * (log_k - tl.log(total)) - shift",
    "    return eps_t * (log_k - tl.log(total)) - 0.0 * shift",
)
descent(
    "descent: shift by the largest score",
    "the logsumexp is shifted by the largest score where the clamp is below it, and underflows",
    "            shift = tl.minimum(largest, -a)",
    "            shift = largest",
)
descent(
    "descent: no clamp",
    "scores above -a are not clamped in the iteration",
    "                total = row_sum(tl.exp2((tl.minimum(s, spread(-a)) - spread(shift)) * scale))",
    "                total = row_sum(tl.exp2((s - spread(shift)) * scale))",
)
descent(
    "descent: q without 1/k",
    "in the tail the next clamp is the sum itself, and not the sum over k",
    "                q = tl.where(t < quiet, top, total * share)",
    "                q = tl.where(t < quiet, top, total * (share / share))",
)
descent(
    "descent: lam above 1",
    "lam is not clamped at 1",
    "                lam = tl.minimum(w * spread(1.0 / q), 1.0)",
    "                lam = w * spread(1.0 / q)",
)
descent(
    "descent: not recentred",
    "the exponential of the tail is never made anew where the threshold has moved away from it",
    "    return (near > REACH) | (near * REACH < 1.0)",
    "    return (near > REACH) & (near * REACH < 1.0)",
)
descent(
    "descent: sums left in the last state",
    "the last of the tail's sums in a batch is not made a state",
    "        inside = mine[:, None] & (which < end)\n        at = states_ptr",
    "        inside = mine[:, None] & (which < end - 1)\n        at = states_ptr",
)
descent(
    "descent: quiet too long",
    "one iteration too many is taken for one in which nothing is clamped",
    "        last = tl.where(quiet, t, last)",
    "        last = tl.where(quiet, t + 1, last)",
)
descent(
    "descent: quiet by the largest score",
    "the bound on the quiet start takes the largest score for the mean",
    "        quiet = quiet & (room + mean >= largest + margin)",
    "        quiet = quiet & (room + largest >= mean + margin)",
)
descent(
    "descent: NaN does not spread",
    "a NaN entry does not make its row NaN",
    "    bad = (n_nan > 0) | (k != k)\n    dead",
    "    bad = (n_nan < 0) | (k != k)\n    dead",
    where=_GPU,  # the interpreter's minimum passes NaN on, the hardware's does not
)
descent(
    "descent: k = 0 not seen",
    "a row with no budget gets what the smallest k gives",
    "    dead = ~bad & ((n_valid == 0) | (k <= 0))",
    "    dead = ~bad & (n_valid == 0)",
)
descent(
    "descent: k not clamped",
    "a tensor k above the number of valid entries is taken as it is",
    "        k = tl.where(k == k, tl.minimum(tl.maximum(k, 0.0), n_valid.to(k.dtype)), k)",
    "        k = tl.where(k == k, tl.maximum(k, 0.0), k)",
)
descent(
    "descent: -inf counted",
    "-inf and masked entries are counted in the first iteration",
    'row_sums((s > float("-inf")).to(COMPUTE), tl',
    'row_sums((s >= float("-inf")).to(COMPUTE), tl',
)
descent(
    "descent: sum of one tile",
    "where a row is re-read in tiles, the sum of an iteration is that of the last tile",
    "                    acc += fold(tl.exp2((tl.minimum(x, spread(-a)) - spread(shift)) * scale))",
    "                    acc = fold(tl.exp2((tl.minimum(x, spread(-a)) - spread(shift)) * scale))",
)
descent(
    "descent: sum of one program",
    "each program that shares a row goes on with the sum over its own columns",
    "    return tl.zeros_like(total) + tl.sum(totals, 0), alive",
    "    return total + 0.0 * tl.sum(totals, 0), alive",
)
descent(
    "descent: wrong segments",
    "segments are cut from T - 1 iterations",
    "*divmod(n_iters, segments), segments),",
    "*divmod(max(n_iters - 1, segments), segments), segments),",
)
descent(
    "descent: off by one segment",
    "the recomputation of a segment starts from its own end, and not from the end of the one before",
    "a = tl.load(starts_ptr + rows * segments + (segment - 1), mask=live & (segment > 0), other=0.0)",
    "a = tl.load(starts_ptr + rows * segments + segment, mask=live & (segment > 0), other=0.0)",
)
descent(
    "descent: longer segments forgotten",
    "the recomputation does not know that the first segments are one iteration longer",
    "    begin = segment * base + tl.minimum(segment, remainder)",
    "    begin = segment * base + tl.minimum(segment, 0)",
)
descent(
    "descent: tail cut by segments",
    "each segment of the tail is recomputed from its own start, with other rounding than the forward's",
    "            stop = tl.where(stop > t_tail, tl.where(begin > t_tail, t_tail, n_iters), stop)",
    "            stop = tl.where(stop > t_tail, stop, stop)",
)
descent(
    "descent: > for >= in the quiet start",
    "the iteration right after the quiet start is skipped",
    "        elif t >= first:",
    "        elif t > first:",
)
descent(
    "descent: state of the next iteration",
    "the backward reads a_{t+1} for a_t",
    "    a = tl.load(states_ptr + rows * n_iters + (t - 1), mask=live & (t > 0), other=0.0)",
    "    a = tl.load(states_ptr + rows * n_iters + tl.minimum(t, n_iters - 1), mask=live & (t > 0), other=0.0)",
)
descent(
    "descent: sign of p",
    "what the iterations take off the gradient is added",
    "    return ds - spread(mass) * tl.exp2(free * scale + spread(offset))",
    "    return ds + spread(mass) * tl.exp2(free * scale + spread(offset))",
)
descent(
    "descent: clamped entries have a gradient",
    "the gradient of an iteration does not stop at clamped entries",
    "    free = (d > spread(height)).to(d.dtype) * (-3.0 * far) + d",
    "    free = tl.minimum(d, spread(height))",
)
descent(
    "descent: saturated entries have a gradient",
    "the gradient does not stop at lam = 1",
    "    return tl.where((d <= spread(height)) & (w > 0), g * spread(factor), 0.0)",
    "    return tl.where(w > 0, g * spread(factor), 0.0)",
)
descent(
    "descent: gradient of masked entries",
    "what the incoming gradient holds at masked entries is multiplied by 0, and not left out",
    "    return tl.where((d <= spread(height)) & (w > 0), g * spread(factor), 0.0)",
    "    return tl.where(d <= spread(height), g * spread(factor), 0.0)",
)
descent(
    "descent: chain turned around",
    "the mass that an iteration passes on has the inverse exponential",
    "    return tl.where(count > 0, count * tl.exp2((a_next - a) * scale - log2_k), 0.0)",
    "    return tl.where(count > 0, count * tl.exp2((a - a_next) * scale - log2_k), 0.0)",
)
descent(
    "descent: padding counted as clamped",
    "the count of clamped entries is that of the columns, and not of the tile, less the free ones",
    "        passed = mass * _clamp_mass(BLOCK - row_sum(free), a, a_next, scale, log2_k)",
    "        passed = mass * _clamp_mass(n_cols - row_sum(free), a, a_next, scale, log2_k)",
)
descent(
    "descent: counted in both loops",
    "rows whose tail was done take its iterations once more, beside rows whose tail was not",
    "        on = (t < t_tail) | ~tail\n",
    "        on = (t < n_iters) | ~tail\n",
)
descent(
    "descent: eps at the floor keeps growing",
    "the backward lets eps grow from T - 1 on, and not from where it left its last value",
    """        above = tl.where(t >= t_floor, above, above * eps_decay)
        on =""",
    """        above = above * eps_decay
        on =""",
)
descent(
    "descent: one exponential for any tail",
    "thresholds of the tail share one exponential however far apart they lie",
    "    tail = (t_tail < n_iters) & (tl.abs(a_last - a_tail) * scale <= SPREAD)",
    "    tail = (t_tail < n_iters) & (tl.abs(a_last - a_tail) * scale >= 0.0)",
)
descent(
    "descent: tail centred at its end",
    "the exponential of the tail is centred at the last threshold also where an earlier one is higher",
    "    return tl.where(tail, tl.maximum(-a_last, -a_tail), -a_last), tail",
    "    return tl.where(tail, -a_last, -a_last), tail",
)
descent(
    "descent: first iteration not in dk",
    "the first iteration has no part in the gradient of k",
    "        dlogk += mass * tl.full((), eps_init, tl.float64).to(COMPUTE)\n        _store_dk",
    "        dlogk += 0.0 * mass * tl.full((), eps_init, tl.float64).to(COMPUTE)\n        _store_dk",
)
descent(
    "descent: dk without 1/k",
    "the gradient of k is that of log k",
    "    dk = tl.where(dead | ~inner, 0.0, dlogk / tl.where(inner, k, 1.0))",
    "    dk = tl.where(dead | ~inner, 0.0, dlogk / tl.where(inner, 1.0, 1.0))",
)
descent(
    "descent: clamped k has a gradient",
    "a k that was clamped has the gradient of the number that it was clamped to",
    "        inner = inner & (k_given <= n_valid)",
    "        inner = inner & (k_given == k_given)",
)
descent(
    "descent: gradient with the scores' stride",
    "the rows of the incoming gradient are found with the row stride of the scores",
    "    at = grad_ptr + spread(rows * grad_stride) + cols",
    "    at = grad_ptr + spread(rows * scores_stride) + cols",
)
descent(
    "descent: mask ignored in the backward",
    "the backward takes masked entries for valid",
    "rows, cols, inside, scores_stride, mask_stride, HAS_MASK, EVEN, COMPUTE)\n    at = grad_ptr",
    "rows, cols, inside, scores_stride, mask_stride, False, EVEN, COMPUTE)\n    at = grad_ptr",
)
descent(
    "descent: every other count lost",
    "where programs share a row, clamped entries are counted at every other iteration only",
    "                counts += tl.where((steps == t + 1)[None, :], two.to(tl.int32)[:, None], 0)",
    "                counts += tl.where((steps == t + 1)[None, :], 0 * two.to(tl.int32)[:, None], 0)",
)
descent(
    "descent: last program left out of the sums",
    "the second launch of the backward adds up what all programs but the last have found",
    "mask=live[:, None, None] & (parts < PROGRAMS), other=0.0), 1)",
    "mask=live[:, None, None] & (parts < PROGRAMS - 1), other=0.0), 1)",
    where=_GPU,
)
descent(
    "descent: a sum never written",
    "the slot of A_T is not written, and read uninitialised",
    "steps[None, :], sums, mask=live[:, None])",
    "steps[None, :], sums, mask=live[:, None] & (steps < n_iters)[None, :])",
)
descent(
    "descent: no room for A_T",
    "the sums of a program have a slot too few where T is a power of two",
    "    t_block = next_power_of_2(n_iters + 1)",
    "    t_block = next_power_of_2(n_iters)",
    where=_GPU,
)
descent(
    "descent: one program too few",
    "the last program, whose rows are fewer, is not started",
    "        (-(-n_rows // shape.rows) * (segments if recompute else 1) * shape.programs,),",
    "        (max(1, n_rows // shape.rows) * (segments if recompute else 1) * shape.programs,),",
)
descent(
    "descent: fewer segments started",
    "the recomputation leaves out the last segment",
    "        (-(-n_rows // shape.rows) * (segments if recompute else 1) * shape.programs,),",
    "        (-(-n_rows // shape.rows) * (max(segments - 1, 1) if recompute else 1) * shape.programs,),",
)

# --- kernels/cpu.py --------------------------------------------------------------------------------------------------

cpu = _in("kernels/cpu.py", SOFT, _CPU)

cpu(
    "cpu: masked in place",
    "the mask is applied to the caller's scores",
    "        x = torch.where(mask[rows], x, -_INF)",
    "        x = x.masked_fill_(~mask[rows], -_INF)",
    op=BOTH,
)
cpu(
    "cpu: mask of the first rows",
    "every block of rows is masked as the first one is",
    "        x = torch.where(mask[rows], x, -_INF)",
    "        x = torch.where(mask[: x.shape[0]], x, -_INF)",
    op=BOTH,
)
cpu(
    "cpu: long rows without their end",
    "what is left of a long row after whole chunks is not added",
    "    if chunks * _SUM_CHUNK < n:\n        total = total +",
    "    if chunks * _SUM_CHUNK > n:\n        total = total +",
    op=BOTH,
)
cpu(
    "cpu: in half precision",
    "half-precision scores are computed in half precision",
    "    return torch.float64 if dtype == torch.float64 else torch.float32\n\n\n@contextmanager",
    "    return torch.float64 if dtype == torch.float64 else dtype\n\n\n@contextmanager",
    op=BOTH,
)
cpu(
    "cpu: +inf beyond the budget is 0",
    "where +inf entries use up the budget, they get weight 0",
    "        value = torch.where(none, (y == _INF) & some, y > -_INF).to(out.dtype)",
    "        value = torch.where(none, (y > _INF) & some, y > -_INF).to(out.dtype)",
)
cpu(
    "cpu: NaN does not spread",
    "a NaN entry does not make its row NaN",
    "        spoiled = np.isnan(k) | _host(x.isnan().any(-1, keepdim=True)) | ~valid_eps",
    "        spoiled = np.isnan(k) | ~valid_eps",
)
cpu(
    "cpu: ends too early",
    "a row is done at a residual a thousand times too large",
    "    reached = np.abs(excess) <= floor\n",
    "    reached = np.abs(excess) <= 1e3 * floor\n",
)
cpu(
    "cpu: step taken for exact",
    "a step is taken for exact though an entry crosses 1 in it",
    "    exact = close & (ratio >= 1.0 - slack) & (largest * ratio <= 1.0)",
    "    exact = close & (ratio >= 1.0 - slack)",
)
cpu(
    "cpu: rows of a block mixed up",
    "what was worked out for the rows that went on alone is put back one row too early",
    "        sums.kept.view.index_copy_(0, where, few.kept.view)",
    "        sums.kept.view.index_copy_(0, where - 1, few.kept.view)",
)
cpu(
    "cpu: saturated entries have a gradient",
    "the gradient does not stop at lam = 1",
    "    torch.threshold_(distance, 0.0, far)",
    "    torch.threshold_(distance, 0.0, far * 0.0)",
)
cpu(
    "cpu: low part of the threshold left out",
    "the backward goes by the high part of the threshold alone",
    "    distance.add_(lo)\n",
    "    distance.add_(lo * 0.0)\n",
)
cpu(
    "cpu: sign of deps",
    "the gradient of eps has the wrong sign",
    "            deps[block] = (moment / -temperature).squeeze(-1).to(compute)",
    "            deps[block] = (moment / temperature).squeeze(-1).to(compute)",
)
cpu(
    "cpu: gbar not divided",
    "gbar is the weighted sum of g, and not their mean",
    "    return torch.where(mass > 0, weighted / mass, 0.0)\n\n\ndef _soft_backward_eager",
    "    return torch.where(mass > 0, weighted, 0.0)\n\n\ndef _soft_backward_eager",
)
cpu(
    "cpu: gradient of another block",
    "rows that need no solving are looked for in the first block only",
    "                where = still.squeeze(-1).nonzero().squeeze(-1) + block.start\n                value",
    "                where = still.squeeze(-1).nonzero().squeeze(-1)\n                value",
)
cpu(
    "cpu: gradient of masked entries",
    "what the incoming gradient holds at masked entries is multiplied by 0, and not left out",
    "    if not bool(weighted.isfinite().all()):\n        g = torch.where(lam.view > 0, g, 0.0)",
    "    if not bool(weighted.isfinite().all()):\n        g = torch.where(lam.view >= 0, g, 0.0)",
)

cpu_descent = _in("kernels/cpu.py", DESCENT, _CPU)

cpu_descent(
    "cpu: stale eps in the first iteration",
    "the first iteration takes the eps of the second",
    "        return _rounded(_host((torch.log(self.count) - self.logk) * self.schedule[0]), self.x.dtype)",
    "        return _rounded(_host((torch.log(self.count) - self.logk) * self.schedule[1]), self.x.dtype)",
)
cpu_descent(
    "cpu: lam with the eps before",
    "lam is computed with eps_{T-1}, and not with eps_T",
    "                _flush(work.view.mul_(descent.scales[-1]))",
    "                _flush(work.view.mul_(descent.scales[-2]))",
)
cpu_descent(
    "cpu: schedule decays one step late",
    "eps_1 is eps_0 once more",
    "    values = [current]\n    for _ in range(n_iters):",
    "    values = [current] * 2\n    for _ in range(n_iters - 1):",
)
cpu_descent(
    "cpu: k not clamped",
    "a tensor k above the number of valid entries is taken as it is",
    "            k = torch.minimum(k.clamp_min(0.0), self.count)",
    "            k = k.clamp_min(0.0)",
)
cpu_descent(
    "cpu: k = 0 not seen",
    "a row with no budget gets what the smallest k gives",
    "        self.empty = ((k == 0) | (self.count == 0)) & ~self.spoiled",
    "        self.empty = (self.count == 0) & ~self.spoiled",
)
cpu_descent(
    "cpu: -inf counted",
    "-inf and masked entries are counted in the first iteration",
    "            self.count = (x > -_INF).sum(-1, keepdim=True).double()",
    "            self.count = (x >= -_INF).sum(-1, keepdim=True).double()",
)
cpu_descent(
    "cpu: thresholds that went apart",
    "iterations share one exponential however far apart their thresholds lie",
    "        apart = ~(np.abs(logs).max(-1, keepdims=True) <= _APART) | self.coarse",
    "        apart = (np.abs(logs).max(-1, keepdims=True) < 0.0) | self.coarse",
)
cpu_descent(
    "cpu: dk without 1/k",
    "the gradient of k is that of log k",
    "~descent.beyond, dlogk / descent.clamped, 0.0)",
    "~descent.beyond, dlogk, 0.0)",
)
cpu_descent(
    "cpu: clamped k has a gradient",
    "a k that was clamped has the gradient of the number that it was clamped to",
    "        self.beyond = (k > self.count) if clamp_k else torch.zeros_like(self.spoiled)",
    "        self.beyond = (k > self.count + 1e9) if clamp_k else torch.zeros_like(self.spoiled)",
)
cpu_descent(
    "cpu: schedule not turned around",
    "the gradient of k adds up the A_t with the eps of the opposite end",
    "dtype=torch.float64, device=chain.device).flip(0)",
    "dtype=torch.float64, device=chain.device)",
)
cpu_descent(
    "cpu: states one iteration early",
    "the states that are saved are those before the end of each segment",
    "    ends = [end - 1 for end in _segment_bounds(n_iters, segments)[1:]]",
    "    ends = [max(end - 2, 0) for end in _segment_bounds(n_iters, segments)[1:]]",
)
cpu_descent(
    "cpu: chain ends early",
    "the backward ends at the last iteration",
    "        if not adjoint.clamping[t]:",
    "        if adjoint.clamping[t]:",
)

# --- kernels/ops.py, kernels/derivatives.py, router.py ---------------------------------------------------------------

ops = _in("kernels/ops.py", BOTH, _ANY)

ops(
    "ops: columns taken for adjacent",
    "scores whose columns are not adjacent are handed to the kernels as they are",
    "    return x if x.is_contiguous() or x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()",
    "    return x if x.is_contiguous() or x.stride(1) >= 1 or x.shape[1] == 1 else x.contiguous()",
    where=_TRITON,
)
ops(
    "ops: output saved for the threshold",
    "autograd saves lam in place of the threshold",
    "        ctx.save_for_backward(scores, threshold, k, eps, mask)",
    "        ctx.save_for_backward(scores, lam, k, eps, mask)",
    op=SOFT,
)
ops(
    "ops: gradients of k and eps swapped",
    "autograd returns the gradient of eps for k, and that of k for eps",
    "dk if needs_k else None, deps if needs_eps else None, None",
    "deps if needs_k else None, dk if needs_eps else None, None",
    op=SOFT,
)
ops(
    "ops: gradient nobody asked for",
    "a k that is a number gets a gradient",
    "return dscores if needs_scores else None, dk if needs_k else None, None\n",
    "return dscores if needs_scores else None, dk, None\n",
    op=DESCENT,
)
ops(
    "ops: threshold fake in the scores' dtype",
    "torch.compile is told that the threshold has the dtype of the scores",
    "    return scores.new_empty((rows, n)), scores.new_empty((rows, 2), dtype=_compute_dtype(scores))",
    "    return scores.new_empty((rows, n)), scores.new_empty((rows, 2))",
    op=SOFT,
)
ops(
    "ops: fake of deps for a number",
    "torch.compile is told of a gradient of eps where eps is a number",
    "    deps = scores.new_empty((rows if eps is not None else 0,), dtype=dtype)",
    "    deps = scores.new_empty((rows,), dtype=dtype)",
    op=SOFT,
)
ops(
    "ops: fake with one state",
    "torch.compile is told of one state a row",
    "    return scores.new_empty((rows, n)), scores.new_empty((rows, segments), dtype=_compute_dtype(scores))",
    "    return scores.new_empty((rows, n)), scores.new_empty((rows, 1), dtype=_compute_dtype(scores))",
    op=DESCENT,
)
ops(
    "ops: k not clamped in the forward",
    "the forward is told to take a tensor k as it is",
    "        clamp_k and k is not None,\n        segments,",
    "        clamp_k and k is None,\n        segments,",
    op=DESCENT,
)
ops(
    "ops: eps_init for eps",
    "autograd hands the backward the first eps for the last one",
    "(n_iters, eps, eps_init, eps_decay, clamp_k, impl)",
    "(n_iters, eps_init, eps_init, eps_decay, clamp_k, impl)",
    op=DESCENT,
)

derivatives = _in("kernels/derivatives.py", SOFT, _ANY)

derivatives(
    "derivatives: gradients of k and eps swapped",
    "the registered operator returns the gradient of eps for k, and that of k for eps",
    "return dscores, None if k is None else dk, None, None if eps is None else deps, None, None, None",
    "return dscores, None if k is None else deps, None, None if eps is None else dk, None, None, None",
)
derivatives(
    "derivatives: lam saved for the states",
    "the registered coordinate descent saves lam in place of the states",
    "        ctx.save_for_backward(scores, output[1], k, mask)\n        ctx.k_value",
    "        ctx.save_for_backward(scores, output[0], k, mask)\n        ctx.k_value",
    op=DESCENT,
)
derivatives(
    "derivatives: mean not divided",
    "E[x] is the weighted sum of x, and not their mean",
    "        return (self.lam * x).sum(-1, keepdim=True) / self.mass",
    "        return (self.lam * x).sum(-1, keepdim=True) / 1.0",
)
derivatives(
    "derivatives: tangent of eps with the wrong sign",
    "forward mode adds what a tangent of eps takes off",
    "        z = z - row.centred(row.log_lam()) * (eps[:, None] / row.eps)",
    "        z = z + row.centred(row.log_lam()) * (eps[:, None] / row.eps)",
)
derivatives(
    "derivatives: deps over eps",
    "the second derivative in eps is divided by eps, and not by its square",
    "        deps = deps - (row.lam * u * g).sum(-1) / eps.square()",
    "        deps = deps - (row.lam * u * g).sum(-1) / eps",
)
derivatives(
    "derivatives: deps has no second derivative",
    "the gradient of deps has no part in the second derivative of the scores",
    "    h = g * (q if of_deps is None else q - of_deps / row.eps)",
    "    h = g * (q if of_deps is None else q - 0.0 * of_deps / row.eps)",
)

router = _in("router.py", BOTH, _ANY)

router(
    "router: k of row 0",
    "a tensor k is taken for its first value",
    "    return value.expand(lead).reshape(_product(lead))",
    "    return value.expand(lead).reshape(_product(lead))[:1].expand(_product(lead))",
)
router(
    "router: k in the scores' dtype",
    "a tensor k is rounded to half precision where the scores are",
    "    value = value.to(torch.float64 if scores.dtype == torch.float64 else torch.float32)\n    return",
    "    value = value.to(scores.dtype).to(torch.float64 if scores.dtype == torch.float64 else torch.float32)\n    return",
)
router(
    "router: mask along another dimension",
    "the mask is not brought to rows as the scores are",
    "mask.movedim(dim, -1).reshape(shape)",
    "mask.reshape(shape)",
)
router(
    "router: eps_init below eps",
    "an eps_init below eps is taken",
    "    eps_init = eps if eps_init is None else max(eps_init, eps)",
    "    eps_init = eps if eps_init is None else eps_init",
    op=DESCENT,
    where=_TRITON,
)
