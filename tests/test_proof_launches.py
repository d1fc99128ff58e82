"""What is compiled ahead for a proof is what the proof launches."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from coordroute.autotune import binaries, proof, variants
from coordroute.kernels import coordinate_descent, soft_topk
from coordroute.kernels.config import DIRECTIONS, OPS, Key, LaunchConfig, heuristic
from coordroute.reference import verify

pytest.importorskip("triton")

MODULES = {"soft_topk": soft_topk, "coordinate_descent": coordinate_descent}
NOT_SPECIALIZED = ("n_rows", "n_iters", "k_stride", "eps_stride", "t_tail", "t_floor", "base", "remainder", "segments")
"""What the kernels' decorators name so; the interpreter does not know it."""
ANYWHERE = ("COOPERATIVE", "launch_cooperative_grid")


def kind(function, arguments, passed):
    """What Triton tells launches apart by: types, alignment, whether an integer is 1 or a multiple of 16, and constants."""

    def of(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        return (value == 1, value % 16 == 0) if isinstance(value, int) and not isinstance(value, bool) else type(value)

    constants = {name: str(value) for name, value in passed.items() if name not in ANYWHERE}
    told = [of(value) for name, value in zip(function.arg_names, arguments, strict=False) if name not in NOT_SPECIALIZED]
    return function.__name__, tuple(told), tuple(sorted(constants.items()))


SHARED = LaunchConfig("split", 64, 1, 1, 1, 20, programs_per_row=16)


@pytest.mark.parametrize(("rows", "n", "config"), [(16, 64, None), (4, 100, None), (4, 1024, SHARED), (1, 1024, SHARED)])
@pytest.mark.parametrize("op", OPS)
def test_what_a_proof_launches_is_compiled_ahead(op, rows, n, config):
    """And where programs share a row, as many share each row of a proof as each row of the key, on a GPU that has no more."""
    processors = 16 * rows
    pair = [config or heuristic(Key(op, way, "float32", rows, 1 << (n - 1).bit_length()), "triton") for way in DIRECTIONS]
    most = proof.most_rows(pair[0], rows)
    ahead = set()
    for direction, config in zip(DIRECTIONS, pair, strict=True):
        forms = binaries.proof_launches(op, "float32", n, direction, config, processors, most if direction == "forward" else None)
        assert len(forms) == binaries.FORMS[direction]
        ahead |= {kind(*(one.function, one.arguments, one.passed)) for form in forms for one in form}
    launched = set()

    def note(prepared, pointers, fractions):
        launched.add(kind(prepared.kernel, (*pointers, *fractions, *prepared.numbers), prepared.constants))
        for argument in pointers:
            if isinstance(argument, torch.Tensor) and argument.dtype.is_floating_point and not argument.requires_grad:
                argument.nan_to_num_(0.0, 0.0, 0.0)  # memory that nobody wrote

    # what is compiled ahead is for a GPU, where programs wait for each other
    a_gpu = {"launch": note, "cooperative": lambda device: True, "processors": lambda device: processors}
    with mock.patch.multiple(MODULES[op], **a_gpu):
        verify.check_candidate(proof.operator(op, "triton", *pair), op, device="cpu", dtype=torch.float32, n=n, most=most)
    assert launched == ahead and len(ahead) == (5 if most is None else 7)
    if most is not None:
        assert {dict(constants)["PROGRAMS"] for _, _, constants in launched} == {"16"}


@pytest.mark.parametrize("op", OPS)
def test_the_suite_launches_programs_that_share_rows_as_they_are_shipped_too(op):
    found = [(name, n, most) for name, n, _, most in variants.variants(op, "float32", "cuda")]
    shared = [name.startswith("split") for name, _, _ in found]
    assert any(shared) and [most for _, _, most in found] == [4 if is_shared else None for is_shared in shared]


def test_nothing_is_compiled_ahead_on_a_cpu():
    config = heuristic(Key("soft_topk", "forward", "float32", 4, 64), "cpu")
    assert binaries.prepare(torch.device("cpu"), "soft_topk", "float32", 64, "forward", config, 0) == 0
