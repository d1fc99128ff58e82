"""The examples: their layers against dense computations, and the scripts as a user would run them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    """A file of examples/, under a name that nothing else has."""
    spec = importlib.util.spec_from_file_location(f"coordroute_examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


layers = load("layers")

B, N, D, HEADS, E = 2, 24, 16, 2, 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tokens(n: int = N) -> Tensor:
    return torch.randn(B, n, D, dtype=torch.float64)


def some_mask(n: int = N) -> Tensor:
    """One whole sequence, and one in which a third is padding at the end."""
    mask = torch.ones(B, n, dtype=torch.bool)
    mask[1, 2 * n // 3 :] = False
    return mask


def awake(module: nn.Module) -> nn.Module:
    """In float64, and with noise where it starts as zero: a branch that says nothing would hide what it is given."""
    for parameter in module.double().parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return module


def attention(num_queries: int = 6, num_keys: int = 8, **options: object) -> nn.Module:
    settings = {"light_heads": 1, "heavy_heads": HEADS, "dim_head": E, "window": 5, **options}
    return awake(layers.ConditionalAttention(D, num_queries=num_queries, num_keys=num_keys, **settings))


def feed_forward(num_tokens: int = 6, **options: object) -> nn.Module:
    return awake(layers.ConditionalFeedForward(D, num_tokens=num_tokens, **options))


def dense_block(**options: object) -> nn.Module:
    return layers.DenseBlock(D, heads=HEADS, dim_head=E, **options).double()


def adapter(num_tokens: int = 6, **options: object) -> nn.Module:
    return awake(layers.ConditionalAdapter(dense_block(**options), D, num_tokens=num_tokens, adapter_hidden=4))


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "feed-forward": feed_forward,
    "attention": attention,
    "attention, two routes": lambda **options: attention(kv_routes=2, **options),
    "adapter": adapter,
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return LAYERS[request.param]()


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary angles as complex numbers: x [..., n, e], positions [n]."""
    half = x.shape[-1] // 2
    angle = positions[:, None].double() * 10_000.0 ** (-torch.arange(half).double() / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


def by_hand(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention of [q, e] over [m, e], entry by entry as the formula has it; visible [q, m]."""
    weight = (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf).softmax(dim=-1)
    return weight.nan_to_num(0.0) @ v


# --- positions and attention -----------------------------------------------------------------------------------------


def test_rotary_turns_by_the_position() -> None:
    x = torch.randn(3, 5, E, dtype=torch.float64)
    positions = torch.tensor([0, 7, 2, 1000, 3])
    # frequencies are computed in float32
    torch.testing.assert_close(layers.rotary(x, positions), turned(x, positions), rtol=0, atol=2e-4)
    torch.testing.assert_close(layers.rotary(x, positions)[:, 0], x[:, 0])


def test_rotary_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, E, dtype=torch.float64).unbind(0)

    def product(at: int, other: int) -> Tensor:
        return (layers.rotary(q, torch.tensor([at])) * layers.rotary(k, torch.tensor([other]))).sum()

    torch.testing.assert_close(product(3, 10), product(103, 110), rtol=0, atol=1e-4)
    assert abs(product(3, 10) - product(3, 12)) > 1e-3


@pytest.mark.parametrize("n", (3, 20, 23))
@pytest.mark.parametrize("causal", (False, True))
def test_local_attention_is_full_attention_within_the_window(n: int, causal: bool) -> None:
    window = 5
    local = layers.LocalAttention(D, heads=HEADS, dim_head=E, window=window, causal=causal).double()
    x, mask = tokens(n), some_mask(n)
    found = local(x, mask=mask)
    places = torch.arange(n)
    away = places - places[:, None]
    near = (away >= -window) & (away <= (0 if causal else window))
    qkv = local.to_qkv(x).reshape(B, n, 3, HEADS, E)
    for b in range(B):
        heads = [
            by_hand(layers.rotary(qkv[b, :, 0, h], places), layers.rotary(qkv[b, :, 1, h], places), qkv[b, :, 2, h], near & mask[b])
            for h in range(HEADS)
        ]
        torch.testing.assert_close(found[b], local.to_out(torch.cat(heads, dim=-1)))


# --- what all layers have in common ----------------------------------------------------------------------------------


def test_shapes_stay(layer: nn.Module) -> None:
    for n in (N, 5, 1):  # routed, and shorter than what is routed
        x = tokens(n)
        assert layer(x).shape == x.shape
        assert torch.equal(layer(x), layer(x, mask=torch.ones(B, n, dtype=torch.bool)))


def test_gradients_reach_the_routing_tokens_and_both_branches(layer: nn.Module) -> None:
    x = tokens().requires_grad_()
    (layer(x) * torch.randn(B, N, D)).sum().backward()
    assert bool(x.grad.any(dim=-1).all()), "every token is in a light branch"
    for name, parameter in layer.named_parameters():
        if name.startswith("block."):
            assert parameter.grad is None and not parameter.requires_grad, "a frozen block learns nothing"
        else:
            assert parameter.grad is not None and bool(parameter.grad.any()), f"no gradient at {name}"


def test_what_is_masked_has_no_part(layer: nn.Module) -> None:
    """Other content at masked places changes nothing at valid ones, nor the gradients."""
    mask, weight = some_mask(), torch.randn(B, N, D, dtype=torch.float64)
    x = tokens()
    other = torch.where(mask[..., None], x, 3 * torch.randn_like(x))
    found = []
    for content in (x, other):
        layer.zero_grad()
        y = layer(content, mask=mask)
        (y * weight)[mask].sum().backward()
        found.append((y[mask], [p.grad.clone() for p in layer.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_lower_precision(layer: nn.Module, dtype: torch.dtype) -> None:
    """Computed in float32 and under autocast: near the result in float64, and in the dtype of the tokens."""
    x = tokens()
    exact = layer(x)
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = layer(x.float())
    assert found.dtype == torch.float32
    # three matrix products in a row, entries of size 1
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=3e-2 if dtype == torch.bfloat16 else 1e-4)


# --- against a dense computation -------------------------------------------------------------------------------------


def test_feed_forward_with_everything_routed_is_the_sum_of_both_branches() -> None:
    x, made = tokens(), feed_forward(N)
    normed = made.norm(x)
    torch.testing.assert_close(made(x), x + made.light(normed) + made.heavy(normed))


@pytest.mark.parametrize("straight_through", (False, True))
def test_feed_forward_of_the_routed(straight_through: bool) -> None:
    made = feed_forward(router=lambda dim: layers.unit_router(dim, straight_through=straight_through))
    x = tokens()
    normed = made.norm(x)
    routed = made.router(normed, num_tokens=made.num_tokens)
    gate = torch.zeros(B, N, 1, dtype=torch.float64).scatter(1, routed.indices[..., None], routed.scores[..., None])
    assert int((gate != 0).sum()) == B * made.num_tokens
    torch.testing.assert_close(made(x), x + made.light(normed) + gate * made.heavy(normed))


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("kv_routes", (1, 2))
@pytest.mark.parametrize("num_queries, num_keys", ((6, 8), (N, N), (N, 8)))
def test_attention_is_full_attention_restricted_to_the_routed(
    num_queries: int, num_keys: int, kv_routes: int, causal: bool
) -> None:
    """Full attention at the positions of all tokens, in which only routed keys are visible, read off at routed queries."""
    made = attention(num_queries, num_keys, kv_routes=kv_routes, causal=causal)
    x, mask = tokens(), some_mask()
    positions = torch.arange(N) * 3 + 11
    normed = made.norm(x)
    asking = made.query_router(normed, num_tokens=num_queries, mask=mask)
    seen = made.key_router(normed, num_tokens=num_keys, mask=mask, keep_one_route_dim=True)
    expected = x + made.light(normed, positions, mask)
    queries = made.to_queries(normed).reshape(B, N, HEADS, E)
    keys_values = torch.einsum("bnd,rdf->brnf", normed, made.to_keys_values).reshape(B, kv_routes, N, 2, HEADS // kv_routes, E)
    for b in range(B):
        routed = torch.zeros(N, 1, dtype=torch.float64)
        routed[slice(None) if asking.indices is None else asking.indices[b]] = 1.0
        heads = []
        for h in range(HEADS):
            r, at = divmod(h, HEADS // kv_routes)
            visible = torch.zeros(N, dtype=torch.bool)
            visible[slice(None) if seen.indices is None else seen.indices[b, r]] = True
            visible = (visible & mask[b]).expand(N, N)
            if causal:
                visible = visible & (positions <= positions[:, None])
            q, k = (layers.rotary(part, positions) for part in (queries[b, :, h], keys_values[b, r, :, 0, at]))
            heads.append(by_hand(q, k, keys_values[b, r, :, 1, at], visible))
        expected[b] += made.to_out(torch.cat(heads, dim=-1)) * routed
    torch.testing.assert_close(made(x, positions, mask)[mask], expected[mask])


def test_soft_gates_scale_queries_and_keys() -> None:
    make = lambda dim, **options: layers.unit_router(dim, straight_through=False, **options)  # noqa: E731
    made = attention(router=make)
    x = tokens()
    normed = made.norm(x)
    asking = made.query_router(normed, num_tokens=6)
    seen = made.key_router(normed, num_tokens=8)
    assert bool((asking.scores < 1).any()) and bool((seen.scores < 1).any())
    gate = torch.zeros(B, N, 1, dtype=torch.float64).scatter(1, asking.indices[..., None], asking.scores[..., None])
    gated = normed.scatter(1, seen.indices[..., None].expand(-1, -1, D), seen.routed_tokens * seen.scores[..., None])
    queries = made.to_queries(normed).reshape(B, N, HEADS, E)
    keys, values = (gated @ made.to_keys_values[0]).reshape(B, N, 2, HEADS, E).unbind(2)
    expected = x + made.light(normed)
    for b in range(B):
        visible = torch.zeros(N, dtype=torch.bool)
        visible[seen.indices[b]] = True
        places = torch.arange(N)
        heads = [
            by_hand(
                layers.rotary(queries[b, :, h], places), layers.rotary(keys[b, :, h], places), values[b, :, h], visible.expand(N, N)
            )
            for h in range(HEADS)
        ]
        expected[b] += made.to_out(torch.cat(heads, dim=-1)) * gate[b]
    torch.testing.assert_close(made(x), expected)


def test_positions_pass_through_routing() -> None:
    """Only distances count in rotary attention: a shift of all positions changes nothing, another spacing does."""
    for made in (attention(), adapter()):
        x, places = tokens(), torch.arange(N)
        plain = made(x)
        torch.testing.assert_close(made(x, places), plain)
        torch.testing.assert_close(made(x, places.expand(B, N) + 40), plain, rtol=0, atol=1e-4)
        assert (made(x, 5 * places) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ("attention", "attention, two routes", "adapter"))
def test_causal_layers_leak_no_content(name: str) -> None:
    """With the choice of tokens held, what comes later changes nothing before it: neither values nor gradients see it."""
    made = LAYERS[name](causal=True)
    routers = [module for module in made.modules() if isinstance(module, layers.Router)]
    held: dict[nn.Module, object] = {}

    def hold(router: nn.Module, inputs: tuple[Tensor], routed: object) -> object:
        first = held.setdefault(router, routed.indices)
        x = inputs[0][:, None].expand(-1, router.num_routes, -1, -1)
        at = first if first.dim() == 3 else first[:, None]
        found = x.take_along_dim(at[..., None], dim=2)
        return routed._replace(indices=first, routed_tokens=found.reshape(routed.routed_tokens.shape))

    for router in routers:
        router.register_forward_hook(hold)
    x = tokens()
    before = made(x)
    for end in (N // 3, 2 * N // 3):
        later = torch.cat((x[:, :end], torch.randn_like(x[:, end:])), dim=1)
        after = made(later)
        torch.testing.assert_close(after[:, :end], before[:, :end])
        assert (after[:, end:] - before[:, end:]).abs().max() > 1e-2


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    q, k, v = torch.randn(3, B, HEADS, 4, E, dtype=torch.float64, requires_grad=True).unbind(0)
    visible = torch.ones(B, 1, 4, 4, dtype=torch.bool).tril(-1)
    found = layers.attend(q, k, v, visible)
    assert not found[:, :, 0].any() and bool(found[:, :, 1:].all())
    (grad,) = torch.autograd.grad(found.sum(), q)
    assert bool(grad.isfinite().all()) and not grad[:, :, 0].any()


def test_heavy_branches_start_as_zero() -> None:
    x = tokens()
    made = layers.ConditionalFeedForward(D, num_tokens=6).double()
    torch.testing.assert_close(made(x), x + made.light(made.norm(x)))
    made = layers.ConditionalAttention(D, num_queries=6, num_keys=8, light_heads=1, heavy_heads=2, dim_head=E).double()
    torch.testing.assert_close(made(x), x + made.light(made.norm(x)))


def test_adapter_with_everything_routed_starts_as_its_block() -> None:
    block = dense_block()
    made = layers.ConditionalAdapter(block, D, num_tokens=N, adapter_hidden=4).double()
    x, mask = tokens(), some_mask()
    torch.testing.assert_close(made(x, mask=mask)[mask], block(x, mask=mask)[mask])


def test_adapter_runs_its_block_on_the_routed_at_their_positions() -> None:
    made, x = adapter(), tokens()
    normed = made.norm(x)
    indices = made.router(normed, num_tokens=made.num_tokens).indices.sort().values  # a block does not mind the order
    expected = x + made.adapter(normed)
    for b in range(B):
        chosen = x[b, indices[b]][None]
        expected[b, indices[b]] += (made.block(chosen, indices[b]) - chosen)[0]
    torch.testing.assert_close(made(x), expected)


def test_several_routes_look_at_keys_of_their_own() -> None:
    made = attention(kv_routes=2)
    indices = made.key_router(made.norm(tokens()), num_tokens=8, keep_one_route_dim=True).indices
    assert indices.shape == (B, 2, 8) and not torch.equal(indices[:, 0], indices[:, 1])
    with pytest.raises(ValueError, match="kv_routes is 3, heavy_heads is 2; allowed are divisors of heavy_heads"):
        attention(kv_routes=3)


def test_a_unit_router_learns_where_scores_that_spread_widely_do_not() -> None:
    """Tokens of unit size and a width of 256: the reason why the layers make their routers with ``unit_router``."""
    x = nn.functional.rms_norm(torch.randn(B, 512, 256), (256,))
    wide = layers.Router(256, eps=0.03)
    nn.init.normal_(wide.routing_token)
    reached = []
    for router in (layers.unit_router(256), wide):
        (router(x, num_tokens=64).scores * torch.randn(B, 64)).sum().backward()
        reached.append(bool(router.routing_token.grad.any()))
    assert reached == [True, False]


# --- the scripts -----------------------------------------------------------------------------------------------------


def run(name: str, *arguments: str) -> str:
    """What an example prints."""
    # one thread: its tensors are small, and other tests may have the other cores
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_learned_routing_beats_random_routing() -> None:
    printed = run("train_router.py", "--seed", "0", "--steps", "150")
    accuracy = {name: float(value) for name, value in re.findall(r"(learned|random) routing names ([\d.]+)%", printed)}
    # by guessing: 25 %
    assert accuracy["learned"] > 90
    assert accuracy["random"] < 60


@pytest.fixture
def train_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, which imports its neighbours."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield load("train_bytes")
    for name in set(sys.modules) - before:
        if name in {path.stem for path in EXAMPLES.glob("*.py")}:
            del sys.modules[name]


TEXT = [str(ROOT / name) for name in ("kernels", "reference", "autotune")]


def test_training_on_bytes_runs_compares_and_draws(train_bytes: ModuleType, tmp_path: Path) -> None:
    """A few steps of a tiny model, with all methods: what is written, and that nothing stands still that should move."""
    limits = ["--device", "cpu", "--preset", "tiny", "--steps", "4", "--seeds", "1", "--evaluations", "2"]
    written: list[str] = []
    train_bytes.compare(train_bytes.parse([*limits, "--text", *TEXT]), lambda evidence: written.append(json.dumps(evidence)))
    assert [json.loads(text)["complete"] for text in written] == [False, False, False, True], "after every run"
    evidence = json.loads(written[-1])
    assert {"device", "versions", "date", "settings", "text"} <= evidence.keys()
    assert [method["name"] for method in evidence["methods"]] == ["exact", "published", "hard", "random"]
    runs = {method["name"]: method["runs"][0] for method in evidence["methods"]}
    for run_of in runs.values():
        assert [point["step"] for point in run_of["validation"]] == [0, 2, 4]
        assert run_of["validation"][-1]["loss"] < run_of["validation"][0]["loss"]
        assert run_of["tokens"] == 4 * evidence["settings"]["batch"] * evidence["settings"]["context"]
    # the same weights and batches, and heavy branches that start as zero: all start as one
    assert len({run_of["validation"][0]["loss"] for run_of in runs.values()}) == 1
    assert len({run_of["validation"][-1]["loss"] for run_of in runs.values()}) == 4

    kept, drawn = tmp_path / "bytes.json", tmp_path / "bytes.svg"
    kept.write_text(written[-1])
    printed = run("train_bytes.py", "--from", str(kept), "--plot", str(drawn))
    assert re.search(r"exact ends [\d.]+ bits a byte (below|above) hard top-k", printed) and "cut short" not in printed
    assert "bits per byte" in drawn.read_text()


def test_a_comparison_that_is_out_of_time_says_so(train_bytes: ModuleType) -> None:
    limits = ["--device", "cpu", "--preset", "tiny", "--steps", "1", "--seconds", "0.001", "--methods", "exact,random"]
    evidence = train_bytes.compare(train_bytes.parse([*limits, "--text", *TEXT]), lambda evidence: None)
    assert [method["runs"] for method in evidence["methods"]] == [[], []] and not evidence["complete"]
    with pytest.raises(ValueError, match="evidence has no runs"):
        train_bytes.bytes_report.plot(evidence, Path("nowhere.svg"))


def test_masked_bytes_are_not_shown_and_alone_count(train_bytes: ModuleType) -> None:
    seen = []

    class Told(train_bytes.ByteEncoder):
        def forward(self, tokens: Tensor) -> Tensor:
            seen.append(tokens)
            return super().forward(tokens)

    preset, text = train_bytes.PRESETS["tiny"], torch.arange(4096).to(torch.uint8)
    tokens, changed = next(train_bytes.windows(text, preset, torch.Generator().manual_seed(0)))
    assert changed.shape == (preset.batch, preset.context // train_bytes.SHARE)
    assert all(len(set(row)) == len(row) for row in changed.tolist()), "no byte twice"
    for objective in train_bytes.OBJECTIVES:
        loss, of_changed = Told(preset, layers.unit_router, objective).bits(tokens, changed)
        assert (loss == of_changed) == (objective == "masked")
        shown = seen.pop()
        kept = torch.ones_like(tokens, dtype=torch.bool).scatter(1, changed, False)
        assert torch.equal(shown[kept], tokens[kept])
        if objective == "masked":
            assert bool((shown[~kept] == train_bytes.MASK).all())
        else:
            assert bool((shown < train_bytes.BYTES).all()) and (shown != tokens)[~kept].float().mean() > 0.9


def test_the_router_of_each_method_learns_or_does_not(train_bytes: ModuleType) -> None:
    text = train_bytes.source_text.read({Path(folder).name: Path(folder) for folder in TEXT})
    moved = {}
    for name, method in train_bytes.METHODS.items():
        trainer = train_bytes.Trainer(method, train_bytes.PRESETS["tiny"], text, seed=0, steps=10)
        before = {key: value.clone() for key, value in trainer.model.named_parameters()}
        for step in range(2):  # a heavy branch starts as zero: the first gives a gate no gradient
            trainer.step(step)
        changed = {key: not torch.equal(value, before[key]) for key, value in trainer.model.named_parameters()}
        moved[name] = {changed[key] for key in changed if "routing_token" in key}
        assert all(changed[key] for key in changed if "routing_token" not in key)
    assert moved == {"exact": {True}, "published": {True}, "soft": {True}, "hard": {False}, "random": {False}}


def test_validation_text_is_not_trained_on() -> None:
    source_text = load("source_text")
    folders = {name: ROOT / name for name in ("kernels", "reference", "autotune")}
    text = source_text.read(folders)
    assert torch.equal(text.train, source_text.read(folders).train), "the same files give the same split"
    parts = [set(bytes(part.tolist()).split(b"\0")) - {b""} for part in (text.train, text.validation)]
    assert not parts[0] & parts[1]
    assert sum(map(len, parts)) == sum(len(list(folder.rglob("*.py"))) for folder in folders.values())
    with pytest.raises(ValueError, match=r"folders has 'docs/images'.*no \.py file"):
        source_text.read({"docs/images": ROOT / "docs" / "images"})


def test_the_page_shows_what_its_script_computes(tmp_path: Path) -> None:
    pictures = load("../docs/pictures")
    found = json.loads(json.dumps(pictures.compute()))
    kept = json.loads((ROOT / "docs" / "images" / "figures.json").read_text())
    assert found.keys() == kept.keys()
    for name, values in found.items():
        pairs = list(zip(leaves(values), leaves(kept[name]), strict=True))
        for mine, theirs in pairs:
            # a rare entry at the edge of saturation may fall on the other side on another machine
            assert mine == (pytest.approx(theirs, abs=2e-3) if isinstance(theirs, float) else theirs), name
    page = (ROOT / "docs" / "routing.md").read_text()
    assert pictures.in_page(page, pictures.table(kept)) == page
    for name in re.findall(r"\]\((images/[^)]+)\)", page):
        assert (ROOT / "docs" / name).is_file()
    pictures.draw(kept, tmp_path, ".svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in (ROOT / "docs/images").glob("*.svg"))


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in (key, *leaves(value[key]))]
    if isinstance(value, list):
        return [leaf for one in value for leaf in leaves(one)]
    return [value]


def test_every_example_is_run_here() -> None:
    mine = Path(__file__).read_text()
    for script in EXAMPLES.glob("*.py"):
        if "__main__" in script.read_text():
            assert f'run("{script.name}"' in mine, f"no test runs {script.name}"
