"""The routing module: every feature of the published CoLT5-attention ``CoordinateDescentRouter``, and ours on top."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from coordroute import Routed, Router, coordinate_descent, soft_topk
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, N, D, M = 2, 24, 8, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=("exact", "coordinate_descent"))
def solver(request: pytest.FixtureRequest) -> str:
    return request.param


def tokens(n: int = N, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, n, D, dtype=dtype).to(DEVICE)


def made(**options: Any) -> Router:
    return Router(D, **options).to(DEVICE)


def some_mask(n: int = N) -> Tensor:
    """One whole sequence, and one with a third of it valid."""
    mask = torch.ones(B, n, dtype=torch.bool, device=DEVICE)
    mask[1, torch.randperm(n)[n // 3 :]] = False
    return mask


def gathered(x: Tensor, indices: Tensor) -> Tensor:
    """x [b, n, …] at indices [b, (r,) m], one by one."""
    return torch.stack([torch.stack([x[b, i] for i in indices[b].reshape(-1)]) for b in range(x.shape[0])]).reshape(
        *indices.shape, *x.shape[2:]
    )


def published(s: Tensor, k: float, n_iters: int, eps: float, eps_init: float, eps_decay: float, mask: Tensor | None) -> Tensor:
    """The published solver, b and all: [b, r, n] weights."""
    lowest = -torch.finfo(s.dtype).max
    current = max(eps_init, eps)
    s = s if mask is None else s.masked_fill(~mask, lowest)
    a, b = 0.0, -s
    for _ in range(n_iters):
        sb = (s + b) / current
        sb = sb if mask is None else sb.masked_fill(~mask, lowest)
        a = current * (math.log(k) - sb.logsumexp(dim=-1, keepdim=True))
        b = -torch.relu(s + a)
        current = max(current * eps_decay, eps)
    weights = ((s + a + b) / current).exp()
    return weights if mask is None else weights.masked_fill(~mask, 0.0)


# --- what comes back -------------------------------------------------------------------------------------------------


def test_the_result_is_a_named_tuple(solver: str) -> None:
    x = tokens()
    routed = made(solver=solver)(x, num_tokens=M)
    assert isinstance(routed, Routed) and routed._fields == ("indices", "scores", "routed_tokens", "routed_mask")
    indices, scores, routed_tokens, routed_mask = routed
    assert indices.shape == scores.shape == (B, M) and indices.dtype == torch.int64
    assert torch.equal(routed_tokens, gathered(x, indices)) and routed_mask is None


@pytest.mark.parametrize("num_routes", (1, 3))
@pytest.mark.parametrize("keep", (False, True))
def test_the_dimension_of_routes(solver: str, num_routes: int, keep: bool) -> None:
    x, mask = tokens(), some_mask()
    router = made(solver=solver, num_routes=num_routes)
    assert router.routing_token.shape == (num_routes, D)
    for n in (N, M):  # routed, and passed through
        routed = router(x[:, :n], num_tokens=M, mask=mask[:, :n], keep_one_route_dim=keep)
        lead = (B, num_routes, M) if keep or num_routes > 1 else (B, M)
        assert routed.scores.shape == routed.routed_mask.shape == lead and routed.routed_tokens.shape == (*lead, D)
        assert routed.indices is None if n == M else routed.indices.shape == lead


def test_routes_choose_on_their_own(solver: str) -> None:
    x, mask = tokens(), some_mask()
    router = made(solver=solver, num_routes=3, straight_through=False)
    routed = router(x, num_tokens=M, mask=mask)
    for r in range(3):
        single = made(solver=solver, straight_through=False)
        single.routing_token.data = router.routing_token.data[r : r + 1]
        alone = single(x, num_tokens=M, mask=mask)
        assert torch.equal(routed.indices[:, r], alone.indices)
        torch.testing.assert_close(routed.scores[:, r], alone.scores)
        assert torch.equal(routed.routed_tokens[:, r], alone.routed_tokens)
        assert torch.equal(routed.routed_mask[:, r], alone.routed_mask)
    assert not torch.equal(routed.indices[:, 0], routed.indices[:, 1])


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_the_highest_scores_are_chosen_best_first(solver: str) -> None:
    x = tokens()
    router = made(solver=solver)
    indices = router(x, num_tokens=M).indices
    s = x @ router.routing_token[0]
    assert torch.equal(indices, s.argsort(dim=-1, descending=True)[:, :M])


def test_chosen_by_score_where_the_weights_are_saturated() -> None:
    """Many weights are 1 here, among which a top-k over the weights would pick at random."""
    router = made(eps=0.01, fetch_k_ratio=3.0, straight_through=False)
    x = torch.zeros(1, N, D, device=DEVICE)
    order = torch.randperm(N).to(DEVICE)
    x[0, order, 0] = torch.arange(N, 0, -1, device=DEVICE).float()
    router.routing_token.data = torch.eye(D, device=DEVICE)[:1]
    routed = router(x, num_tokens=M)
    assert torch.equal(routed.indices[0], order[:M])
    assert bool((routed.scores == 1).all())


def test_among_equals_the_lower_position_comes_first(solver: str) -> None:
    x = torch.ones(B, N, D, device=DEVICE)
    x[1, 7] = 2.0
    router = made(solver=solver)
    router.routing_token.data.fill_(0.5)
    indices = router(x, num_tokens=4).indices
    assert indices.tolist() == [[0, 1, 2, 3], [7, 0, 1, 2]]
    mask = torch.ones(B, N, dtype=torch.bool, device=DEVICE)
    mask[:, 1] = False
    assert router(x, num_tokens=4, mask=mask).indices.tolist() == [[0, 2, 3, 4], [7, 0, 2, 3]]


def test_masked_tokens_are_never_chosen_while_enough_are_valid(solver: str) -> None:
    x, mask = tokens(), some_mask()
    router = made(solver=solver)
    with torch.no_grad():
        x[~mask] = 100 * router.routing_token[0]  # they would win
    routed = router(x, num_tokens=M, mask=mask)
    assert bool(routed.routed_mask.all()) and bool((routed.scores == 1).all())
    assert torch.equal(routed.routed_mask, gathered(mask, routed.indices))


@pytest.mark.parametrize("straight_through", (False, True))
@pytest.mark.parametrize("random_route", (False, True))
def test_masked_tokens_have_score_0_where_they_must_be_chosen(solver: str, straight_through: bool, random_route: bool) -> None:
    x, mask = tokens().requires_grad_(), torch.zeros(B, N, dtype=torch.bool, device=DEVICE)
    mask[0, [3, 11]] = True
    router = made(solver=solver, straight_through=straight_through)
    routed = router(x, num_tokens=M, mask=mask, random_route=random_route)
    assert sorted(routed.indices[0, :2].tolist()) == [3, 11]
    assert routed.routed_mask.tolist() == [[True, True, False, False, False], [False] * 5]
    assert not routed.scores[~routed.routed_mask].any() and bool(routed.scores[routed.routed_mask].all())
    assert len(set(routed.indices[1].tolist())) == M, "no token twice"
    if not random_route:
        routed.scores.sum().backward()
        assert bool(x.grad.isfinite().all()) and not x.grad[~mask].any()


@pytest.mark.parametrize("num_routes", (1, 2))
def test_a_short_sequence_passes_through(solver: str, num_routes: int) -> None:
    router = made(solver=solver, num_routes=num_routes)
    for n in (1, M):
        x = tokens(n)
        routed = router(x, num_tokens=M)
        assert routed.indices is None and routed.routed_mask is None
        assert bool((routed.scores == 1).all()) and routed.scores.dtype == x.dtype
        for route in routed.routed_tokens.unbind(1) if num_routes > 1 else [routed.routed_tokens]:
            assert torch.equal(route, x)
    # as Routed.scores says: 0 where masked, whether or not there was a choice
    mask = torch.tensor([[True, False, True, True, False]] * B, device=DEVICE)
    routed = router(tokens(M), num_tokens=M, mask=mask)
    assert torch.equal(routed.scores, routed.routed_mask.float())
    assert torch.equal(routed.routed_mask.reshape(B, -1, M)[:, 0], mask)


def test_nothing_at_all_passes_through(solver: str) -> None:
    router = made(solver=solver)
    routed = router(torch.zeros(B, 0, D, device=DEVICE), num_tokens=M)
    assert routed.indices is None and routed.routed_tokens.shape == (B, 0, D) and routed.scores.shape == (B, 0)
    routed = router(torch.zeros(0, N, D, device=DEVICE), num_tokens=M)
    assert routed.indices.shape == (0, M) and routed.routed_tokens.shape == (0, M, D)


def test_random_routing_is_uniform_among_the_valid() -> None:
    router = made()
    x = tokens().repeat(200, 1, 1)
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=DEVICE)
    mask[:, ::2] = False
    routed = router(x, num_tokens=4, mask=mask, random_route=True)
    assert bool((routed.scores == 1).all()) and not routed.scores.requires_grad
    counts = torch.bincount(routed.indices.flatten(), minlength=N)
    assert not counts[::2].any()
    # 400 draws of 4 out of 12 without replacement: 133 ± 9.4 each
    assert int(counts[1::2].min()) > 85 and int(counts[1::2].max()) < 181
    assert all(len(set(row)) == 4 for row in routed.indices.tolist())
    assert not torch.equal(routed.indices, router(x, num_tokens=4, mask=mask, random_route=True).indices)
    torch.manual_seed(1)
    first = router(x, num_tokens=4, random_route=True).indices
    torch.manual_seed(1)
    assert torch.equal(first, router(x, num_tokens=4, random_route=True).indices)


# --- the scores ------------------------------------------------------------------------------------------------------


def test_given_routing_tokens(solver: str) -> None:
    x, given = tokens(), torch.randn(B, D, device=DEVICE)
    router = made(solver=solver, learned_routing_tokens=False)
    assert not list(router.parameters()) and router.routing_token is None
    routed = router(x, num_tokens=M, routing_tokens=given)
    s = (x @ given[..., None])[..., 0]
    assert torch.equal(routed.indices, s.argsort(dim=-1, descending=True)[:, :M])
    again = router(x, num_tokens=M, routing_tokens=given[:, None])
    assert torch.equal(routed.indices, again.indices)
    # several routes, one routing token for each of them and each sequence
    several = made(solver=solver, num_routes=2, learned_routing_tokens=False)
    both = several(x, num_tokens=M, routing_tokens=torch.stack((given, -given), dim=1))
    assert torch.equal(both.indices[:, 0], routed.indices)
    assert torch.equal(both.indices[:, 1], s.argsort(dim=-1)[:, :M])
    with pytest.raises(ValueError, match=r"routing_tokens is None.*learned_routing_tokens=False.*\(2, 8\) or \(2, 1, 8\)"):
        router(x, num_tokens=M)


def test_given_routing_tokens_take_the_place_of_learned_ones() -> None:
    x, given = tokens(), torch.randn(B, D, device=DEVICE, requires_grad=True)
    router = made(eps=1.0)
    routed = router(x, num_tokens=M, routing_tokens=given)
    other = made(learned_routing_tokens=False)(x, num_tokens=M, routing_tokens=given)
    assert torch.equal(routed.indices, other.indices)
    (routed.scores * torch.randn_like(routed.scores)).sum().backward()
    assert bool(given.grad.any()) and router.routing_token.grad is None


def test_cosine_similarity(solver: str) -> None:
    x = tokens()
    router = made(solver=solver, cosine_sim_routing=True, cosine_sim_scale=5.0, straight_through=False)
    routed = router(x, num_tokens=M)
    s = 5.0 * torch.cosine_similarity(x, router.routing_token[0], dim=-1)
    assert torch.equal(routed.indices, s.argsort(dim=-1, descending=True)[:, :M])
    scaled = router(x * torch.rand(B, N, 1, device=DEVICE).add(0.1), num_tokens=M)
    assert torch.equal(routed.indices, scaled.indices)
    torch.testing.assert_close(routed.scores, scaled.scores, rtol=1e-3, atol=1e-4)
    options = {"eps": 0.03} if solver == "exact" else {"eps": 0.03, "n_iters": 20, "eps_init": 4.0, "eps_decay": 0.7}
    lam = (soft_topk if solver == "exact" else coordinate_descent)(s, M * 9 / 8, **options)
    torch.testing.assert_close(routed.scores, lam.gather(-1, routed.indices), rtol=1e-3, atol=1e-4)


# --- the gates -------------------------------------------------------------------------------------------------------


def test_straight_through_gates_are_1_and_pass_the_solvers_gradient(solver: str) -> None:
    x, g = tokens(), torch.randn(B, M, device=DEVICE)
    mask = some_mask()
    results = []
    for straight_through in (True, False):
        torch.manual_seed(3)
        router = made(solver=solver, eps=5.0, straight_through=straight_through)
        y = x.clone().requires_grad_()
        routed = router(y, num_tokens=M, mask=mask)
        routed.scores.backward(g)
        results.append((routed, y.grad, router.routing_token.grad))
    (through, *grads), (soft, *soft_grads) = results
    assert bool((through.scores == 1).all()), "exactly"
    assert torch.equal(through.indices, soft.indices) and bool((soft.scores < 1).any())
    for grad, soft_grad in zip(grads, soft_grads, strict=True):
        assert torch.equal(grad, soft_grad) and bool(grad.any())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_straight_through_gates_are_exactly_1_in_every_dtype(dtype: torch.dtype) -> None:
    router = made(eps=0.7).to(dtype)
    routed = router(tokens(200, dtype), num_tokens=50)
    assert routed.scores.dtype == routed.routed_tokens.dtype == dtype and bool((routed.scores == 1).all())


@pytest.mark.parametrize("ratio", (1.0, 9 / 8, 2.0, 100.0))
def test_the_solvers_budget_is_a_multiple_of_what_is_taken(solver: str, ratio: float) -> None:
    x = tokens()
    router = made(solver=solver, eps=0.3, fetch_k_ratio=ratio, straight_through=False)
    routed = router(x, num_tokens=M)
    s, k = x @ router.routing_token[0], min(M * ratio, N)
    lam = (
        soft_topk(s, k, eps=0.3)
        if solver == "exact"
        else coordinate_descent(s, k, n_iters=20, eps=0.3, eps_init=4.0, eps_decay=0.7)
    )
    assert routed.indices.shape == (B, M)
    torch.testing.assert_close(routed.scores, lam.gather(-1, routed.indices), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", (None, 8))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("num_routes", (1, 2))
def test_the_gates_and_their_gradients_are_the_published_ones(num_routes: int, masked: bool, block_size: int | None) -> None:
    schedule = {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}
    m = 6
    router = made(
        num_routes=num_routes, solver="coordinate_descent", straight_through=False, route_block_size=block_size, **schedule
    ).double()
    x = tokens(dtype=torch.float64).requires_grad_()
    mask = some_mask() if masked else None
    routed = router(x, num_tokens=m, mask=mask, keep_one_route_dim=True)
    g = torch.randn_like(routed.scores)
    grads = torch.autograd.grad(routed.scores, (x, router.routing_token), g)

    # the published router: blocks as sequences, the solver's weights, the highest of them
    width = block_size or N
    s = torch.einsum("bnd,rd->brn", x, router.routing_token).unflatten(-1, (N // width, width))
    valid = None if mask is None else mask[:, None].expand(B, num_routes, N).unflatten(-1, (N // width, width))
    each = m * width // N
    weights = published(s, min(each * 9 / 8, width), **schedule, mask=valid).flatten(-2)
    scores = weights.gather(-1, routed.indices)
    torch.testing.assert_close(routed.scores, scores, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(scores, (x, router.routing_token), g)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-7, atol=1e-7)
    # and ours are as high as any
    by_block, taken = weights.unflatten(-1, (N // width, width)), routed.scores.unflatten(-1, (N // width, each))
    torch.testing.assert_close(taken.sort(-1, descending=True).values, by_block.topk(each, dim=-1).values, rtol=1e-9, atol=1e-9)


def test_gradients_reach_the_routing_token_and_the_tokens(solver: str) -> None:
    router = made(solver=solver, eps=1.0, num_routes=2)
    x = tokens().requires_grad_()
    routed = router(x, num_tokens=M)
    update = routed.routed_tokens.detach().tanh() * routed.scores[..., None]
    (update * torch.randn_like(update)).sum().backward()
    assert bool(router.routing_token.grad.isfinite().all()) and bool(router.routing_token.grad.any(dim=-1).all())
    assert bool(x.grad.any())


def test_a_routed_token_has_its_own_gradient() -> None:
    x = tokens().requires_grad_()
    routed = made()(x, num_tokens=M)
    routed.routed_tokens.sum().backward()
    wanted = torch.zeros(B, N, device=DEVICE).scatter(1, routed.indices, 1.0)
    assert torch.equal(x.grad, wanted[..., None].expand_as(x))


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "width", "m"),
    [
        (24, 8, 6),  # even
        (24, 8, 7),  # shares differ by one
        (27, 8, 8),  # a tail
        (25, 8, 24),  # all but one
        (9, 8, 8),
        (9, 4, 3),
        (10, 1, 9),  # fewer than there are blocks: one each
        (24, 8, 1),
        (23, 7, 5),
        (24, 24, 5),  # a single block
        (24, 100, 5),
    ],
)
@pytest.mark.parametrize("random_route", (False, True))
def test_every_block_gives_its_share(solver: str, n: int, width: int, m: int, random_route: bool) -> None:
    x = tokens(n)
    router = made(solver=solver, route_block_size=width, num_routes=2)
    routed = router(x, num_tokens=m, random_route=random_route)
    blocks = math.ceil(n / width)
    taken = max(m, blocks)
    assert routed.indices.shape == routed.scores.shape == (B, 2, taken) and bool((routed.scores == 1).all())
    assert torch.equal(routed.routed_tokens, gathered(x, routed.indices))
    s = torch.einsum("bnd,rd->brn", x, router.routing_token)
    sizes = torch.tensor([min(width, n - i * width) for i in range(blocks)])
    for b in range(B):
        for r in range(2):
            indices = routed.indices[b, r].cpu()
            assert len(indices.unique()) == taken and int(indices.min()) >= 0 and int(indices.max()) < n
            share = torch.bincount(indices // width, minlength=blocks)
            assert share.sum() == taken and bool((share >= 1).all()) and bool((share <= sizes).all())
            full = set(share[sizes == width].tolist())
            assert max(full, default=0) - min(full, default=0) <= 1, "an even share"
            assert bool(((share - taken * sizes / n).abs() <= 1.0 + (m < blocks)).all()), "in proportion to its length"
            if not random_route:
                for block in range(blocks):
                    mine = indices[indices // width == block] - block * width
                    inside = s[b, r, block * width : (block + 1) * width].cpu()
                    assert torch.equal(mine, inside.argsort(descending=True, stable=True)[: len(mine)])


def test_a_masked_block(solver: str) -> None:
    x, mask = tokens(27).requires_grad_(), torch.ones(B, 27, dtype=torch.bool, device=DEVICE)
    mask[:, 8:16] = False
    mask[1, 24:] = False
    routed = made(solver=solver, route_block_size=8)(x, num_tokens=8, mask=mask)
    assert torch.equal(routed.routed_mask, gathered(mask, routed.indices))
    assert torch.equal(routed.scores, routed.routed_mask.float())
    assert all(len(set(row)) == 8 for row in routed.indices.tolist())
    routed.scores.sum().backward()
    assert bool(x.grad.isfinite().all()) and not x.grad[~mask].any()


@pytest.mark.parametrize("n", (24, 27))
def test_a_block_is_routed_as_if_alone(solver: str, n: int) -> None:
    x = tokens(n)
    router = made(solver=solver, eps=0.3, route_block_size=8, straight_through=False)
    routed = router(x, num_tokens=n // 4)
    alone = made(solver=solver, eps=0.3, straight_through=False)
    alone.routing_token = router.routing_token
    at = 0
    for start in range(0, n, 8):
        block = x[:, start : start + 8]
        share = int(((routed.indices[0] // 8) == start // 8).sum())
        single = alone(block, num_tokens=share)
        here = slice(at, at + share)
        assert torch.equal(routed.indices[:, here], single.indices + start)
        torch.testing.assert_close(routed.scores[:, here], single.scores, rtol=1e-4, atol=1e-5)
        at += share
    assert at == n // 4


# --- route_back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_routes", (1, 2))
def test_route_back_is_the_inverse(num_routes: int) -> None:
    x = tokens()
    router = made(num_routes=num_routes)
    routed = router(x, num_tokens=M)
    src = x if num_routes == 1 else x[:, None].expand(-1, num_routes, -1, -1)
    before = src.clone()
    assert torch.equal(router.route_back(src, routed.routed_tokens, routed.indices), src)
    zeros = torch.zeros_like(src)
    back = router.route_back(zeros, 2 * routed.routed_tokens, routed.indices)
    chosen = torch.zeros(src.shape[:-1], dtype=torch.bool, device=DEVICE).scatter(-1, routed.indices, True)
    assert torch.equal(back, torch.where(chosen[..., None], 2 * src, 0.0))
    assert torch.equal(src, before) and not zeros.any(), "src is not written to"


def test_route_back_of_a_sequence_that_passed_through() -> None:
    x = tokens(M)
    router = made()
    routed = router(x, num_tokens=M)
    assert torch.equal(router.route_back(torch.zeros_like(x), routed.routed_tokens, routed.indices), x)


def test_route_back_is_differentiable() -> None:
    router = made()
    indices = torch.tensor([[3, 0], [1, 2]], device=DEVICE)
    src = torch.randn(2, 4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    routed = torch.randn(2, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, r: router.route_back(s, r, indices), (src, routed))


def test_the_example_of_the_docstring() -> None:
    feed_forward = torch.nn.Linear(D, D).to(DEVICE)
    router = made(eps=1.0)
    for n in (N, M):
        x = tokens(n)
        routed = router(x, num_tokens=M, mask=torch.ones(B, n, dtype=torch.bool, device=DEVICE))
        update = feed_forward(routed.routed_tokens) * routed.scores[..., None]
        out = x + router.route_back(torch.zeros_like(x), update, routed.indices)
        changed = (out != x).any(dim=-1)
        assert changed.sum(dim=-1).tolist() == [M, M]
        torch.testing.assert_close(out[changed], (x + feed_forward(x))[changed])


# --- as a module -----------------------------------------------------------------------------------------------------


FULL: dict[str, Any] = {
    "num_routes": 2,
    "solver": "coordinate_descent",
    "eps": 0.1,
    "n_iters": 7,
    "eps_init": 2.0,
    "eps_decay": 0.6,
    "fetch_k_ratio": 1.5,
    "cosine_sim_routing": True,
    "cosine_sim_scale": 3.0,
    "route_block_size": 8,
    "checkpoint_segments": 3,
    "straight_through": False,
}


def same(first: Router, second: Router) -> None:
    x = tokens()
    for a, b in zip(first(x, num_tokens=M), second(x, num_tokens=M), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_state_dict_round_trip() -> None:
    first, second = made(**FULL), made(**FULL)
    assert list(first.state_dict()) == ["routing_token"]
    memory = io.BytesIO()
    torch.save(first.state_dict(), memory)
    memory.seek(0)
    second.load_state_dict(torch.load(memory))
    same(first, second)
    assert not made(learned_routing_tokens=False).state_dict()


def test_deepcopy_and_pickle() -> None:
    router = made(**FULL)
    same(router, copy.deepcopy(router))
    same(router, pickle.loads(pickle.dumps(router)))
    assert repr(copy.deepcopy(router)) == repr(router)
    twin = copy.deepcopy(router)
    twin.routing_token.data.zero_()
    assert bool(router.routing_token.any()), "a copy has its own parameter"


def test_repr_is_one_line_that_makes_the_router_again() -> None:
    assert (
        repr(made())
        == "Router(dim=8, num_routes=1, solver='exact', eps=0.03, fetch_k_ratio=1.125, straight_through=True, impl='auto')"
    )
    assert repr(made(solver="coordinate_descent", num_routes=2)) == (
        "Router(dim=8, num_routes=2, solver='coordinate_descent', eps=0.03, n_iters=20, eps_init=4.0, eps_decay=0.7,"
        " fetch_k_ratio=1.125, straight_through=True, impl='auto')"
    )
    for options in (FULL, {"learned_routing_tokens": False, "impl": "torch"}, {"solver": "coordinate_descent", "eps_init": None}):
        router = made(**options)
        again = eval(repr(router))
        assert repr(again) == repr(router) and {**vars(again), "_parameters": 0} == {**vars(router), "_parameters": 0}


def test_autocast(solver: str) -> None:
    x = tokens()
    router = made(solver=solver, eps=0.5, straight_through=False)
    plain = router(x, num_tokens=M)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = router(x, num_tokens=M)
        low = router(x.bfloat16(), num_tokens=M)
    # ranks and gates are lost in half precision: the scores are computed in float32 all the same
    assert torch.equal(plain.indices, cast.indices) and torch.equal(plain.scores, cast.scores)
    assert low.scores.dtype == low.routed_tokens.dtype == torch.bfloat16
    wide = router(x.bfloat16().float(), num_tokens=M)
    assert torch.equal(low.indices, wide.indices) and torch.equal(low.scores, wide.scores.bfloat16())
    low.scores.float().sum().backward()
    assert router.routing_token.grad.dtype == torch.float32 and bool(router.routing_token.grad.any())


def test_the_same_call_twice_is_bitwise_the_same(solver: str) -> None:
    x, mask = tokens(), some_mask()
    router = made(solver=solver, num_routes=2, eps=0.5, straight_through=False)
    first, second = (router(x, num_tokens=M, mask=mask) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# --- errors that teach -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim is 0; allowed is an integer >= 1"),
        ({"dim": 8.0}, TypeError, "dim is 8.0; allowed is an integer >= 1"),
        ({"num_routes": 0}, ValueError, "num_routes is 0; allowed is an integer >= 1"),
        ({"solver": "softmax"}, ValueError, "solver is 'softmax'; allowed are 'exact' and 'coordinate_descent'"),
        ({"eps": 0.0}, ValueError, "eps is 0.0; allowed is a finite number > 0"),
        ({"n_iters": 0}, ValueError, "n_iters is 0; allowed is an integer >= 1"),
        ({"eps_init": math.nan}, ValueError, "eps_init is nan; allowed is a finite number > 0"),
        ({"eps_decay": -1}, ValueError, "eps_decay is -1; allowed is a finite number > 0"),
        ({"fetch_k_ratio": 0.5}, ValueError, "fetch_k_ratio is 0.5; allowed is a finite number >= 1"),
        ({"cosine_sim_scale": 0}, ValueError, "cosine_sim_scale is 0; allowed is a finite number > 0"),
        ({"route_block_size": 0}, ValueError, "route_block_size is 0; allowed is an integer >= 1"),
        ({"checkpoint_segments": 21}, ValueError, "checkpoint_segments is 21; allowed is an integer in 1..20 (n_iters)"),
        ({"impl": "cuda"}, ValueError, "impl is 'cuda'; allowed are 'auto', 'triton' and 'torch'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        Router(**{"dim": D, **options})
    assert message in str(raised.value)


ON_META = torch.zeros(B, N, dtype=torch.bool, device="meta")


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"x": torch.zeros(B, N)}, ValueError, ("x has shape (2, 24)", "(batch, length, 8)")),
        (
            {"x": torch.zeros(B, N, D + 1)},
            ValueError,
            ("x has shape (2, 24, 9)", "routing_token has shape (1, 8)", "(batch, length, 8)"),
        ),
        (
            {"x": torch.zeros(B, N, D, dtype=torch.int64)},
            TypeError,
            ("x has dtype torch.int64 and shape (2, 24, 8)", "floating-point"),
        ),
        ({"x": [1.0]}, TypeError, ("x is a list", "floating-point")),
        ({"num_tokens": 0}, ValueError, ("num_tokens is 0", ">= 1", "x has shape (2, 24, 8)")),
        ({"num_tokens": 2.5}, TypeError, ("num_tokens is 2.5", "an integer", "x has shape (2, 24, 8)")),
        (
            {"mask": torch.ones(B, N)},
            TypeError,
            ("mask has dtype torch.float32 and shape (2, 24)", "x has shape (2, 24, 8)", "bool"),
        ),
        ({"mask": torch.ones(B, N + 1, dtype=torch.bool)}, ValueError, ("mask has shape (2, 25)", "x has shape (2, 24, 8)")),
        ({"mask": torch.ones(N, dtype=torch.bool)}, ValueError, ("mask has shape (24,)", "allowed is", "(2, 24)")),
        ({"x": torch.zeros(B, N, D, device="meta")}, ValueError, ("routing_token (shape (1, 8)) is on " + DEVICE, "on meta")),
        ({"mask": ON_META}, ValueError, ("mask (shape (2, 24)) is on meta", "x (shape (2, 24, 8)) on " + DEVICE, "one device")),
        (
            {"routing_tokens": torch.zeros(B, 3, D)},
            ValueError,
            ("x has shape (2, 24, 8)", "routing_tokens has shape (2, 3, 8)", "(2, 8) or (2, 1, 8)"),
        ),
        ({"routing_tokens": torch.zeros(B, D + 1)}, ValueError, ("routing_tokens has shape (2, 9)", "x has shape (2, 24, 8)")),
        ({"routing_tokens": torch.zeros(D)}, ValueError, ("routing_tokens has shape (8,)", "(2, 8) or (2, 1, 8)")),
        (
            {"routing_tokens": torch.zeros(B, D, dtype=torch.int32)},
            TypeError,
            ("routing_tokens has dtype torch.int32", "(2, 24, 8)"),
        ),
        (
            {"routing_tokens": torch.zeros(B, D, device="meta")},
            ValueError,
            ("routing_tokens (shape (2, 8)) is on meta", "x (shape (2, 24, 8)) on " + DEVICE),
        ),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    arguments = {"x": torch.zeros(B, N, D), "num_tokens": M, **options}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device.type != "meta":
            arguments[name] = value.to(DEVICE)
    with pytest.raises(error) as raised:
        made()(arguments.pop("x"), **arguments)
    for part in parts:
        assert part in str(raised.value), str(raised.value)


def test_bad_input_to_route_back() -> None:
    router, x, indices = made(), tokens(), torch.zeros(B, M, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"routed_tokens has shape \(2, 4, 8\), indices has shape \(2, 5\)"):
        router.route_back(x, tokens(4), indices)
    with pytest.raises(ValueError, match=r"src has shape \(2, 24, 8\), routed_tokens has shape \(2, 5, 4\)"):
        router.route_back(x, tokens(M)[..., :4], indices)
    with pytest.raises(ValueError, match=r"routed_tokens has shape \(2, 5, 8\), src has shape \(2, 24, 8\).*passed through"):
        router.route_back(x, tokens(M), None)
    with pytest.raises(ValueError, match=r"several routes"):
        router.route_back(x, tokens(M)[:, None], indices[:, None])
    with pytest.raises(ValueError, match=r"indices \(shape \(2, 5\)\) is on meta, src \(shape \(2, 24, 8\)\) on"):
        router.route_back(x, tokens(M), indices.to("meta"))
