"""What people train with: autocast, GradScaler, DDP, FSDP, checkpointing, export, torch.func and torch.compile, on a routed block.

Each result, gradients included, is compared with that of the block as it stands.
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from coordroute import Router
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, TOKENS = 8, 6
SOLVERS = ("exact", "coordinate_descent")


class Block(nn.Module):
    """A heavy branch for a few tokens. Soft gates, so that a gate that is wrong shows in the output."""

    def __init__(self, solver: str, **options: Any) -> None:
        super().__init__()
        self.router = Router(DIM, solver=solver, eps=0.5, straight_through=False, **options)
        self.heavy = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        routed = self.router(x, num_tokens=TOKENS, mask=mask)
        update = self.heavy(routed.routed_tokens).tanh() * routed.scores[..., None]
        return x + self.router.route_back(torch.zeros_like(x), update, routed.indices)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(params=SOLVERS)
def block(request: pytest.FixtureRequest) -> Block:
    return Block(request.param).to(DEVICE)


def tokens(n: int = 24, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, DIM).to(DEVICE)


def some_mask(n: int = 24) -> Tensor:
    return torch.rand(2, n).to(DEVICE) > 0.2


def outcome(block: nn.Module, function: Any, x: Tensor, *rest: Any) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every parameter of ``block``."""
    x = x.clone().requires_grad_()
    out = function(x, *rest)
    names = ["x", *(name for name, _ in block.named_parameters())]
    grads = torch.autograd.grad(out.float().square().sum(), [x, *block.parameters()])
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
        assert bool(value.any()), name


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Up to the order of sums."""
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# --- mixed precision -------------------------------------------------------------------------------------------------


def test_autocast_leaves_routing_in_full_precision(block: Block) -> None:
    """The result is that of a block whose heavy branch alone runs in bfloat16."""
    x = tokens()

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return block(x)

    def by_hand(x: Tensor) -> Tensor:
        routed = block.router(x, num_tokens=TOKENS)
        with torch.autocast(DEVICE, torch.bfloat16):
            update = block.heavy(routed.routed_tokens).tanh() * routed.scores[..., None]
        return x + block.router.route_back(torch.zeros_like(x), update, routed.indices)

    found = outcome(block, under_autocast, x)
    equal(found, outcome(block, by_hand, x))
    assert not torch.equal(found["out"], block(x)), "something was cast"


def test_grad_scaler(block: Block) -> None:
    """Gradients of a scaled loss are the plain ones once unscaled; a step with an infinite one is left out."""
    x = tokens()
    wanted = outcome(block, block, x)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in block.parameters()]

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(block(x).square().sum()).backward()
        scaler.unscale_(optimizer)

    step(x)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-6, atol=1e-7)
    scaler.step(optimizer)
    scaler.update()
    after = [parameter.detach().clone() for parameter in block.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    bad = x.clone()
    bad[0, :, 0] = torch.inf
    step(bad)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert all(torch.equal(a, b) for a, b in zip(after, block.parameters(), strict=True))


# --- several processes -----------------------------------------------------------------------------------------------


def _train(rank: int, folder: str) -> None:
    """One process of two: a step under DDP and one under FSDP, of which rank 0 keeps the gradients and the parameters."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for solver in SOLVERS:
        block, x = torch.load(Path(folder) / f"{solver}.pt", weights_only=False)
        part = x[rank : rank + 1]
        results = {}

        replicated = DistributedDataParallel(copy.deepcopy(block))
        replicated(part).square().sum().backward()
        results["ddp"] = {name: parameter.grad for name, parameter in replicated.module.named_parameters()}

        sharded = copy.deepcopy(block)
        fully_shard(sharded.router, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded(part).square().sum().backward()
        results["fsdp"] = {name: parameter.grad.full_tensor() for name, parameter in sharded.named_parameters()}
        torch.optim.SGD(sharded.parameters(), lr=0.1).step()
        results["fsdp step"] = {name: value.full_tensor() for name, value in sharded.state_dict().items()}
        if rank == 0:
            torch.save(results, Path(folder) / f"{solver}.out.pt")
    dist.destroy_process_group()
    # what is looked at is on disk; a process that ended by itself was aborted after that now and then ("terminate called without an
    # active exception"), which part of torch does so is not known
    os._exit(0)


def test_ddp_and_fsdp_give_the_gradients_of_one_process() -> None:
    """Two processes with gloo, half of the batch each: the mean of their gradients is half of that of the whole batch."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = {}
        for solver in SOLVERS:
            block, x = Block(solver, num_routes=1), tokens().cpu()
            torch.save((block, x), Path(folder) / f"{solver}.pt")
            block(x).square().sum().div(2).backward()
            wanted[solver] = block
        torch.multiprocessing.spawn(_train, (folder,), nprocs=2)
        for solver, block in wanted.items():
            results = torch.load(Path(folder) / f"{solver}.out.pt")
            grads = {name: parameter.grad for name, parameter in block.named_parameters()}
            assert all(bool(grad.any()) for grad in grads.values())
            close(results["ddp"], grads)
            close(results["fsdp"], grads)
            close(results["fsdp step"], {name: p.detach() - 0.1 * p.grad for name, p in block.named_parameters()})


# --- memory, graphs, transforms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(block: Block, reentrant: bool) -> None:
    x, mask = tokens(), some_mask()
    equal(
        outcome(block, lambda x: checkpoint(block, x, mask, use_reentrant=reentrant), x)
        if not reentrant
        else _reentrant(block, x, mask),
        outcome(block, block, x, mask),
    )


def _reentrant(block: Block, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The old form of checkpointing takes ``backward`` only."""
    x = x.clone().requires_grad_()
    out = checkpoint(block, x, mask, use_reentrant=True)
    out.square().sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: parameter.grad for name, parameter in block.named_parameters()}}


@pytest.mark.parametrize("strict", (False, True))
def test_export(block: Block, strict: bool) -> None:
    """One program for all lengths, saved and loaded."""
    lengths = {1: torch.export.Dim("n", min=TOKENS + 1, max=4096)}
    program = torch.export.export(block, (tokens(), some_mask()), dynamic_shapes={"x": lengths, "mask": lengths}, strict=strict)
    assert any(
        f"coordroute.{'soft_topk' if block.router.solver == 'exact' else 'coordinate_descent'}" in str(node.target)
        for node in program.graph.nodes
    )
    memory = io.BytesIO()
    torch.export.save(program, memory)
    memory.seek(0)
    loaded = torch.export.load(memory).module()
    for n in (24, 33):
        x, mask = tokens(n), some_mask(n)
        close(outcome(loaded, loaded, x, mask), outcome(block, block, x, mask))


def test_gradients_of_each_sample(block: Block) -> None:
    """vmap over grad of a functional call is a loop over the samples."""
    parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}
    x = tokens(batch=3)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(block, parameters, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        wanted = torch.autograd.grad(block(x[i : i + 1]).square().sum(), list(block.parameters()))
        close({name: value[i] for name, value in found.items()}, dict(zip(parameters, wanted, strict=True)))


def test_an_ensemble_of_blocks(block: Block) -> None:
    """vmap over stacked parameters is a loop over the models."""
    models = [Block(block.router.solver).to(DEVICE) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = tokens()
    found = torch.func.vmap(lambda p, b: torch.func.functional_call(block, (p, b), (x,)))(parameters, buffers)
    for one, model in zip(found, models, strict=True):
        torch.testing.assert_close(one, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_compiled_router_takes_new_lengths_as_they_come(solver: str) -> None:
    block = Block(solver).to(DEVICE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for n in (24, 27, 40, 33, 64):
        x, mask = tokens(n), some_mask(n)
        close(outcome(block, compiled, x, mask), outcome(block, block, x, mask))
    assert counter.frame_count <= 2, "once for the first length, and once for any"


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_reduce_overhead(block: Block) -> None:
    """CUDA graphs: recorded, then replayed on other values, with gradients."""
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        x, mask = tokens(512), torch.rand(2, 512, device=DEVICE) > 0.2
        close(outcome(block, lambda x, mask: compiled(x, mask).clone(), x, mask), outcome(block, block, x, mask))
