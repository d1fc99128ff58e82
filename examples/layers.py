"""Layers that route tokens, built on ``coordroute.Router``: import them, or copy what you need.

    from layers import ConditionalAttention, ConditionalFeedForward   # with examples/ on the path

    layer = ConditionalFeedForward(512, num_tokens=256)
    x = layer(x)                                                      # [b, n, 512] -> [b, n, 512], residual and norm inside

``ConditionalFeedForward`` and ``ConditionalAttention`` are the two halves of a CoLT5 block (Ainslie et al., arXiv:2303.09752,
section 3): a light branch for every token, a heavy one for the tokens that a router picks. ``ConditionalAdapter`` is CoDA (Lei
et al., arXiv:2304.04947): a frozen block that sees the routed tokens only, and an adapter that sees all. Attention is torch's
``scaled_dot_product_attention``. A routed token keeps the position it came from, so rotary angles (Su et al., arXiv:2104.09864)
and causal order are those of the whole sequence. ``train_bytes.py`` trains a model of the first two.

Conventions: x is [b, n, d], floating. ``mask`` is bool [b, n], True = valid. ``positions`` is [n] or [b, n], and 0, 1, … where
it is None; positions may have gaps, but rise along the sequence. What a layer returns at masked tokens means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from coordroute import Routed, Router
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional


def unit_router(dim: int, *, eps: float = 0.3, kind: type[Router] = Router, **options: Any) -> Router:
    """A router whose scores start with a spread of about 1 on normalised tokens, and a temperature that fits it.

    A token gets a gradient through its gate only while its weight is below 1, that is, while its score lies within about eps of
    the threshold. A routing token that is drawn with unit variance spreads the scores by sqrt(dim): few or none would get one.
    """
    router = kind(dim, eps=eps, **options)
    if router.routing_token is not None:
        nn.init.normal_(router.routing_token, std=dim**-0.5)
    return router


MakeRouter = Callable[..., Router]
"""Called as ``make(dim)`` or ``make(dim, num_routes=r)``."""


# --- positions and attention -----------------------------------------------------------------------------------------


def positions_of(x: Tensor, positions: Tensor | None) -> Tensor:
    """[b, n], for x of shape [b, n, d]."""
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)
    return positions.expand(x.shape[:2])


def routed_positions(positions: Tensor, routed: Routed) -> Tensor:
    """The positions of the routed tokens, in the shape of ``routed.scores``, from those of all tokens [b, n]."""
    if routed.scores.dim() == 3:
        positions = positions[:, None].expand(-1, routed.scores.shape[1], -1)
    # without indices the whole sequence passed through
    return positions if routed.indices is None else positions.gather(-1, routed.indices)


def rotary(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Turns the halves of each head's channels by angles in proportion to the position (arXiv:2104.09864, section 3.2.2).

    Args:
        x: [..., n, e], e even.
        positions: broadcastable to [..., n].
    """
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[..., None].to(torch.float32) * frequency
    cos, sin = angle.cos(), angle.sin()
    # in float32 or wider: in half precision far positions would share their angles
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention of [b, h, q, e] over [b, h, m, e]; a query that may see no key gets zeros.

    Args:
        visible: bool, broadcastable to [b, h, q, m]: which key each query may see; None = all.
    """
    if visible is None:
        return functional.scaled_dot_product_attention(queries, keys, values)
    # a row without a key would be NaN in some of torch's backends, and its gradient too
    sees = visible.any(dim=-1, keepdim=True)
    found = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=visible | ~sees)
    return found * sees


class LocalAttention(nn.Module):
    """Every token attends to the tokens at most ``window`` places away: the light branch of CoLT5's attention.

    The sequence is cut into blocks of ``window``; a block's queries meet the keys of their own block and of both neighbours.

    Args:
        dim: width d of the tokens.
        heads, dim_head: number of heads, and channels of each (even).
        window: how far a token sees to either side.
        causal: see no later token.
    """

    def __init__(self, dim: int, *, heads: int, dim_head: int, window: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.window, self.causal = heads, window, causal
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        b, n, _ = x.shape
        w = self.window
        positions = positions_of(x, positions)
        queries, keys, values = rearrange(self.to_qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        queries, keys = (rotary(part, positions[:, None]) for part in (queries, keys))

        valid = torch.ones(1, n, dtype=torch.bool, device=x.device) if mask is None else mask
        pad = -n % w
        queries, keys, values = (
            rearrange(functional.pad(part, (0, 0, 0, pad)), "b h (blocks w) e -> b h blocks w e", w=w)
            for part in (queries, keys, values)
        )
        valid = rearrange(functional.pad(valid, (0, pad), value=False), "b (blocks w) -> b blocks w", w=w)
        # [1 or b, blocks, w, 3 w]
        away = torch.arange(3 * w, device=x.device) - torch.arange(w, 2 * w, device=x.device)[:, None]
        near = (away >= -w) & (away <= (0 if self.causal else w))
        visible = near & _with_neighbours(valid, 1, 2)[:, :, None]

        found = attend(
            rearrange(queries, "b h blocks w e -> (b blocks) h w e"),
            rearrange(_with_neighbours(keys, 2, 3), "b h blocks w e -> (b blocks) h w e"),
            rearrange(_with_neighbours(values, 2, 3), "b h blocks w e -> (b blocks) h w e"),
            rearrange(visible.expand(b, -1, -1, -1), "b blocks w v -> (b blocks) 1 w v"),
        )
        return self.to_out(rearrange(found, "(b blocks) h w e -> b (blocks w) (h e)", b=b)[:, :n])


def _with_neighbours(blocks: Tensor, dim: int, inner: int) -> Tensor:
    """Each block along ``dim`` between the one before and the one after, joined along ``inner``; zeros beyond the ends."""
    end = torch.zeros_like(blocks.narrow(dim, 0, 1))
    padded = torch.cat((end, blocks, end), dim=dim)
    return torch.cat([padded.narrow(dim, shift, blocks.shape[dim]) for shift in range(3)], dim=inner)


def feed_forward(dim: int, hidden: int) -> nn.Sequential:
    """Two linear layers with GELU between: [..., dim] -> [..., dim]."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def silent(layer: nn.Linear) -> None:
    """Makes the last layer of a branch start as zero.

    A heavy branch that starts as noise does harm where it is routed to, and that is the first thing a router would learn: to
    send it the tokens that matter least. One that starts as zero is drawn by the loss to where it helps.
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class DenseBlock(nn.Module):
    """A plain pre-norm transformer block, every token to every token: what ``ConditionalAdapter`` freezes.

    Args:
        dim, heads, dim_head: as for ``LocalAttention``.
        hidden: width of the feed-forward; None means 4 dim.
        causal: see no token of a later position.
    """

    def __init__(self, dim: int, *, heads: int, dim_head: int, hidden: int | None = None, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.feed_forward = feed_forward(dim, 4 * dim if hidden is None else hidden)

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        positions = positions_of(x, positions)
        qkv = self.to_qkv(self.attention_norm(x))
        queries, keys, values = rearrange(qkv, "b n (three h e) -> three b h n e", three=3, h=self.heads)
        queries, keys = (rotary(part, positions[:, None]) for part in (queries, keys))
        found = attend(queries, keys, values, _visible(positions[:, None], positions[:, None], mask, self.causal))
        x = x + self.to_out(rearrange(found, "b h n e -> b n (h e)"))
        return x + self.feed_forward(self.feed_forward_norm(x))


def _visible(queries: Tensor, keys: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Which of the keys at positions [b, r, m] a query at [b, 1, q] may see: bool [b, r, 1 or q, m]; None = all.

    The order in which routed tokens arrive says nothing: their positions decide what is past.
    """
    visible = None
    if mask is not None:
        visible = (mask if mask.dim() == 3 else mask[:, None])[:, :, None]
    if causal:
        past = keys[:, :, None] <= queries[..., None]
        visible = past if visible is None else visible & past
    return visible


# --- CoLT5 -----------------------------------------------------------------------------------------------------------


class ConditionalFeedForward(nn.Module):
    """A small feed-forward for every token, and a large one for the routed (arXiv:2303.09752, section 3).

        y_i = x_i + Light(x_i) + gate_i Heavy(x_i)          x normalised inside the branches; gate_i = 0 if i is not routed

    Args:
        dim: width d of the tokens.
        num_tokens: m, how many tokens of a sequence the heavy branch sees; CoLT5 takes n/16.
        light_hidden, heavy_hidden: widths of the branches; None means dim/2 and 4 dim, as in CoLT5.
        router: makes the router.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tokens: int,
        light_hidden: int | None = None,
        heavy_hidden: int | None = None,
        router: MakeRouter = unit_router,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.norm = nn.RMSNorm(dim)
        self.router = router(dim)
        self.light = feed_forward(dim, dim // 2 if light_hidden is None else light_hidden)
        self.heavy = feed_forward(dim, 4 * dim if heavy_hidden is None else heavy_hidden)
        silent(self.heavy[-1])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        routed = self.router(normed, num_tokens=self.num_tokens, mask=mask)
        # the gate is the only way from the loss to the router
        update = self.heavy(routed.routed_tokens) * routed.scores[..., None]
        return x + self.light(normed) + self.router.route_back(torch.zeros_like(x), update, routed.indices)


class ConditionalAttention(nn.Module):
    """Local attention for every token, and full attention among the routed (arXiv:2303.09752, section 3).

        y_i = x_i + Local(x)_i + gate^q_i Heavy(x_i, gate^kv ⊙ x)       x normalised inside; gate^q_i = 0 if i is not routed

    Two routers choose on their own: which tokens ask, and which are looked at. With several ``kv_routes`` the heavy heads fall
    into as many groups, and each group looks at keys and values of its own choice.

    Args:
        dim: width d of the tokens.
        num_queries, num_keys: how many tokens ask, and how many keys and values each route has; CoLT5 takes n/16 and n/8.
        light_heads, heavy_heads, dim_head: heads of the branches, and channels of a head (even). CoLT5 gives a quarter of the
            heads to the light branch.
        window: how far the light branch sees to either side.
        kv_routes: r, a divisor of ``heavy_heads``.
        causal: a token sees none of a later position. The *choice* of tokens still looks ahead: see docs/routing.md.
        router: makes the routers.

    Raises:
        ValueError: ``kv_routes`` does not divide ``heavy_heads``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_queries: int,
        num_keys: int,
        light_heads: int,
        heavy_heads: int,
        dim_head: int = 64,
        window: int = 64,
        kv_routes: int = 1,
        causal: bool = False,
        router: MakeRouter = unit_router,
    ) -> None:
        super().__init__()
        if kv_routes < 1 or heavy_heads % kv_routes:
            raise ValueError(f"kv_routes is {kv_routes}, heavy_heads is {heavy_heads}; allowed are divisors of heavy_heads")
        self.num_queries, self.num_keys, self.causal = num_queries, num_keys, causal
        self.heads, self.kv_routes = heavy_heads, kv_routes
        self.norm = nn.RMSNorm(dim)
        self.light = LocalAttention(dim, heads=light_heads, dim_head=dim_head, window=window, causal=causal)
        self.query_router = router(dim)
        self.key_router = router(dim, num_routes=kv_routes)
        self.to_queries = nn.Linear(dim, heavy_heads * dim_head, bias=False)
        # a route's keys and values are made for its own heads alone
        self.to_keys_values = nn.Parameter(torch.empty(kv_routes, dim, 2 * heavy_heads // kv_routes * dim_head))
        nn.init.uniform_(self.to_keys_values, -(dim**-0.5), dim**-0.5)
        self.to_out = nn.Linear(heavy_heads * dim_head, dim, bias=False)
        silent(self.to_out)

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        positions = positions_of(x, positions)
        normed = self.norm(x)
        asking = self.query_router(normed, num_tokens=self.num_queries, mask=mask)
        seen = self.key_router(normed, num_tokens=self.num_keys, mask=mask, keep_one_route_dim=True)

        of_queries = routed_positions(positions, asking)[:, None]  # [b, 1, q]
        of_keys = routed_positions(positions, seen)  # [b, r, m]
        queries = rearrange(self.to_queries(asking.routed_tokens), "b q (h e) -> b h q e", h=self.heads)
        # by its gate a key's token learns whether it was worth a look
        gated = seen.routed_tokens * seen.scores[..., None]
        keys, values = rearrange(
            torch.einsum("b r m d, r d f -> b r m f", gated, self.to_keys_values),
            "b r m (two h e) -> two b r h m e",
            two=2,
            h=self.heads // self.kv_routes,
        )
        keys = rotary(keys, of_keys[:, :, None])
        visible = _visible(of_queries, of_keys, seen.routed_mask, self.causal)
        if visible is not None:
            visible = repeat(visible, "b r q m -> b (r h) q m", h=self.heads // self.kv_routes)
        found = attend(
            rotary(queries, of_queries),
            rearrange(keys, "b r h m e -> b (r h) m e"),
            rearrange(values, "b r h m e -> b (r h) m e"),
            visible,
        )
        update = self.to_out(rearrange(found, "b h q e -> b q (h e)")) * asking.scores[..., None]
        heavy = self.query_router.route_back(torch.zeros_like(x), update, asking.indices)
        return x + self.light(normed, positions, mask) + heavy


# --- CoDA ------------------------------------------------------------------------------------------------------------


class ConditionalAdapter(nn.Module):
    """A frozen block for the routed tokens, a small trained adapter for all (arXiv:2304.04947, section 3).

        y_i = x_i + Adapter(x_i) + gate_i (Block(routed x)_i - x_i)     gate_i = 0 if i is not routed

    The block attends among the routed tokens alone ("k-to-k" in the paper), at their own positions. What is trained are the
    adapter and the router. The adapter starts as zero, so with every token routed the layer starts as the block itself.

    Args:
        block: called as ``block(x, positions, mask)``, returns x with its update added; its parameters stop requiring
            gradients here. A gradient passes through it to the tokens.
        dim: width d of the tokens.
        num_tokens: how many tokens of a sequence the block sees.
        adapter_hidden: width of the adapter's bottleneck.
        router: makes the router.
    """

    def __init__(
        self, block: nn.Module, dim: int, *, num_tokens: int, adapter_hidden: int = 64, router: MakeRouter = unit_router
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.block = block.requires_grad_(False)
        self.norm = nn.RMSNorm(dim)
        self.router = router(dim)
        self.adapter = feed_forward(dim, adapter_hidden)
        silent(self.adapter[-1])

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        positions = positions_of(x, positions)
        normed = self.norm(x)
        routed = self.router(normed, num_tokens=self.num_tokens, mask=mask)
        # the router scores normalised tokens; the block has a norm of its own and sees the tokens as they are
        tokens = x if routed.indices is None else x.take_along_dim(routed.indices[..., None], dim=1)
        changed = self.block(tokens, routed_positions(positions, routed), routed.routed_mask)
        update = (changed - tokens) * routed.scores[..., None]
        return x + self.adapter(normed) + self.router.route_back(torch.zeros_like(x), update, routed.indices)
