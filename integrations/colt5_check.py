"""CoLT5-attention as published and patched, side by side: is it the same, and how much faster does it train?

    python -m coordroute.integrations.colt5_check [--device cuda:0|cpu] [--seconds 40] [--json FILE]

Same: two models of the package and its ``topk``, in float64, outputs and gradients against the published eager code; then
``coor_descent`` alone in float32 at a length that is a power of two and one that is not, on published settings, row by row: the
error of ours against float64 is at most twice that of the published eager code, plus a few roundings. Rows with a kink, where the
gradient hangs on the last bit, are left out and counted. The error of the published Triton kernel is told beside.

Faster: a training step (forward, backward, SGD) of each, published and patched, for the package's eager code and for its Triton
kernel, wall clock with the device awaited, in rotating order round by round. On a CPU the sizes are tiny: they show that it runs,
not what is gained.

Exit status: 0 the same; 1 not; 2 no such device, or the package is not there.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..autotune import device as devices
from ..autotune.timing import Timed, paired_ratio
from ..kernels import ops
from .colt5 import PACKAGE, patch_colt5

PUBLISHED = {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}
"""The settings of CoLT5-attention's router."""

LIMIT_64 = 1e-9
"""Of the relative error in norm, in float64: far above rounding, far below a wrong term."""

LIMIT_LOG_K = PUBLISHED["eps_init"] / PUBLISHED["eps"] * torch.finfo(torch.float32).eps
"""The same where the package hands k over as a float32 tensor (0.9.0 to 0.10.0), and so takes log k in float32: an iteration
multiplies its rounding with eps_t <= eps_init, and the weights divide it by eps."""


@dataclass(frozen=True)
class Sizes:
    """Of the workloads: [batch, length, dim] tokens, of which 1 in 8 is routed; [rows, columns] scores for ``topk``."""

    batch: int
    length: int
    dim: int
    window: int
    rows: int
    columns: int
    kink_rows: int
    lengths: tuple[int, ...]


GPU = Sizes(batch=2, length=8192, dim=512, window=1024, rows=64, columns=8192, kink_rows=256, lengths=(1024, 1000))
SMALL = Sizes(batch=1, length=256, dim=32, window=32, rows=4, columns=256, kink_rows=32, lengths=(128, 100))


@dataclass(frozen=True)
class Workload:
    """Something to train: ``loss()`` of ``parameters``, made for one dtype."""

    loss: Callable[[], Tensor]
    parameters: Sequence[Tensor]


def _transformer_block(sizes: Sizes, fused: bool, dtype: torch.dtype, device: torch.device) -> Workload:
    package = importlib.import_module(PACKAGE)
    routed = sizes.length // 8
    heads = {"light_dim_head": 32, "light_heads": 4, "heavy_dim_head": 64, "heavy_heads": 8}
    model = package.ConditionalRoutedTransformerBlock(
        sizes.dim,
        num_heavy_attn_tokens_q=routed,
        num_heavy_attn_tokens_kv=routed,
        num_heavy_ff_tokens=routed,
        light_window_size=sizes.window // 8,
        use_triton=fused,
        **heads,
    )
    return _of_model(model, sizes, dtype, device)


def _autoregressive_attention(sizes: Sizes, fused: bool, dtype: torch.dtype, device: torch.device) -> Workload:
    package = importlib.import_module(PACKAGE)
    model = package.ConditionalRoutedAutoregressiveAttention(
        sizes.dim,
        num_heavy_tokens_q=sizes.window // 8,
        num_heavy_tokens_kv=sizes.window // 8,
        light_window_size=sizes.window // 8,
        heavy_window_size=sizes.window,
        light_dim_head=32,
        light_heads=4,
        use_triton=fused,
    )
    return _of_model(model, sizes, dtype, device)


def _of_model(model: nn.Module, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    for name, parameter in model.named_parameters():
        if name.endswith("routing_token"):
            # scores of unit size: with the published initialisation nearly all the routed weights are saturated
            parameter.data.mul_(sizes.dim**-0.5)
    model = model.to(device, dtype)
    x = torch.randn(sizes.batch, sizes.length, sizes.dim).to(device, dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Workload(lambda: model(x).square().mean(), parameters)


def _topk(sizes: Sizes, fused: bool, dtype: torch.dtype, device: torch.device) -> Workload:
    package = importlib.import_module(PACKAGE)
    x = torch.randn(sizes.rows, sizes.columns).to(device, dtype).requires_grad_()
    weight = torch.randn(sizes.columns).to(device, dtype)

    def loss() -> Tensor:
        result = package.topk(x, sizes.columns // 8, fused=fused, **PUBLISHED)
        return (result.values * weight[result.indices]).sum() / sizes.rows

    return Workload(loss, [x])


WORKLOADS: dict[str, Callable[[Sizes, bool, torch.dtype, torch.device], Workload]] = {
    "ConditionalRoutedTransformerBlock": _transformer_block,
    "ConditionalRoutedAutoregressiveAttention": _autoregressive_attention,
    "topk": _topk,
}


def _workloads() -> list[str]:
    return [name for name in WORKLOADS if hasattr(importlib.import_module(PACKAGE), name)]


# --- is it the same? -------------------------------------------------------------------------------------------------


def _error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=torch.finfo(torch.float64).tiny))


def _models_agree(sizes: Sizes, device: torch.device, version: str) -> list[dict[str, Any]]:
    """Output and gradients in float64, patched against published, each workload with a smaller size."""
    sizes = replace(sizes, length=min(sizes.length, 1024), dim=min(sizes.dim, 64), window=min(sizes.window, 128))
    limit = LIMIT_LOG_K if tuple(map(int, version.split("."))) < (0, 10, 5) else LIMIT_64
    rows = []
    for name in _workloads():
        torch.manual_seed(0)
        work = WORKLOADS[name](sizes, False, torch.float64, device)

        def outcome(work: Workload = work) -> list[Tensor]:
            loss = work.loss()
            grads = torch.autograd.grad(loss, work.parameters, allow_unused=True)
            return [loss.detach(), *(torch.zeros(()) if grad is None else grad for grad in grads)]

        published = outcome()
        with patch_colt5():
            errors = [_error(found, wanted) for found, wanted in zip(outcome(), published, strict=True)]
        worst = max(errors)
        rows.append({"what": name, "dtype": "float64", "error": worst, "limit": limit, "ok": worst <= limit})
    return rows


def _without_kinks(s: Tensor, k: float) -> Tensor:
    """Rows [R] bool of float64 scores in which, at every iteration, no entry is within float32 rounding of being clamped."""
    current, barrier = PUBLISHED["eps_init"], torch.full_like(s[:, :1], torch.inf)
    margin = torch.full_like(s[:, 0], torch.inf)
    for step in range(int(PUBLISHED["n_iters"])):
        exponent = torch.zeros_like(s) if step == 0 else torch.minimum(s, barrier)
        a = current * (math.log(k) - torch.logsumexp(exponent / current, -1, keepdim=True))
        barrier = -a
        size = torch.maximum(s.abs().amax(-1), a.abs().squeeze(-1))
        margin = torch.minimum(margin, (s + a).abs().amin(-1) / size)
        current = max(current * PUBLISHED["eps_decay"], PUBLISHED["eps"])
    return margin > 16 * torch.finfo(torch.float32).eps


def _operators_agree(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """``coor_descent`` in float32 against float64, by rows: value and gradient of ours, of published eager code and kernel."""
    importlib.import_module(PACKAGE)
    modules = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in _descents(device)}
    rows = []
    for n in sizes.lengths:
        torch.manual_seed(n)
        s, g = (torch.randn(sizes.kink_rows, n, dtype=torch.float64).float().to(device) for _ in range(2))
        k = n * 9 / 64
        kept = _without_kinks(s.double(), k)

        def outcome(
            name: str,
            dtype: torch.dtype = torch.float32,
            inputs: tuple[Tensor, Tensor, float, Tensor] = (s, g, k, kept),
        ) -> list[Tensor]:
            s, g, k, kept = inputs
            leaf = s.to(dtype).requires_grad_()
            lam = getattr(modules[name], name)(leaf, k=k, **PUBLISHED)
            (ds,) = torch.autograd.grad(lam, leaf, g.to(dtype))
            return [part.detach().double()[kept] for part in (lam, ds)]

        exact = outcome("coor_descent", torch.float64)
        published = {name: outcome(name) for name in modules}
        with patch_colt5():
            patched = {name: outcome(name) for name in modules}
        floor = 8 * torch.finfo(torch.float32).eps
        for part, label in enumerate(("value", "gradient")):
            eager, *kernel = (_error(outcome[part], exact[part]) for outcome in published.values())
            limit = 2 * eager + floor
            ours = max(_error(outcome[part], exact[part]) for outcome in patched.values())
            rows.append(
                {
                    "what": f"coor_descent, {label}, n = {n}",
                    "dtype": "float32",
                    "error": ours,
                    "limit": limit,
                    "published_eager": eager,
                    "published_triton": kernel[0] if kernel else None,
                    "rows": int(kept.sum()),
                    "rows_with_kinks_left_out": int((~kept).sum()),
                    "ok": ours <= limit and bool(kept.any()),
                }
            )
    return rows


def _descents(device: torch.device) -> list[str]:
    return ["coor_descent", *(["triton_coor_descent"] if device.type == "cuda" and ops.triton_available() else [])]


# --- is it faster? ---------------------------------------------------------------------------------------------------


def _race(sizes: Sizes, device: torch.device, deadline: float, rounds: int) -> list[dict[str, Any]]:
    """A training step of every workload, published and patched, for as many rounds as fit until ``deadline`` (3 at least)."""
    synchronize: Callable[[], None] = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    method = "wall clock of forward, backward and SGD step, device awaited, rotating order"
    cases = [(name, fused) for name in _workloads() for fused in ((False, True) if len(_descents(device)) > 1 else (False,))]
    results = []
    for index, (name, fused) in enumerate(cases):
        torch.manual_seed(0)
        work = WORKLOADS[name](sizes, fused, torch.float32, device)
        optimizer = torch.optim.SGD(work.parameters, lr=1e-6)

        def step(work: Workload = work, optimizer: torch.optim.Optimizer = optimizer) -> float:
            synchronize()
            start = time.perf_counter()
            optimizer.zero_grad()
            work.loss().backward()
            optimizer.step()
            synchronize()
            return (time.perf_counter() - start) * 1e6

        def patched(step: Callable[[], float] = step) -> float:
            with patch_colt5():
                return step()

        until = time.perf_counter() + max(0.0, deadline - time.perf_counter()) / (len(cases) - index)
        arms: dict[str, Callable[[], float]] = {"published": step, "patched": patched}
        timed = {arm: Timed([], method) for arm in arms}
        for function in arms.values():
            function()  # compiles
            function()
        while len(timed["patched"].samples) < rounds and (len(timed["patched"].samples) < 3 or time.perf_counter() < until):
            order = list(arms) if len(timed["patched"].samples) % 2 else list(arms)[::-1]
            for arm in order:
                timed[arm].samples.append(arms[arm]())
        ratio, *interval = paired_ratio(timed["published"], timed["patched"])
        results.append(
            {
                "what": name,
                "published_path": "its Triton kernel" if fused else "eager",
                **{arm: times.to_json() for arm, times in timed.items()},
                "speedup": round(ratio, 3),
                "speedup_ci": [round(bound, 3) for bound in interval],
                "speedup_range": [
                    round(f(a / b for a, b in zip(*(t.samples for t in timed.values()), strict=True)), 3) for f in (min, max)
                ],
            }
        )
        del work, optimizer, step, patched, arms
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


# --- the command -----------------------------------------------------------------------------------------------------


def run(device: torch.device, seconds: float = 40.0) -> dict[str, Any]:
    """Everything, as it goes into the JSON file; ``ok`` says whether patched and published agree.

    Args:
        device: a GPU, or the CPU with tiny sizes.
        seconds: until when timing goes on, counted from the call.

    Raises:
        ImportError, RuntimeError: as ``patch_colt5``.
    """
    start = time.perf_counter()
    with patch_colt5() as patch:
        version, replaced = patch.version, [replacement._asdict() for replacement in patch.replaced]
    sizes, rounds = (GPU, 25) if device.type == "cuda" else (SMALL, 3)
    same = _models_agree(sizes, device, version) + _operators_agree(sizes, device)
    speed = _race(sizes, device, start + seconds, rounds)
    return {
        "schema": 1,
        "package": PACKAGE,
        "package_version": version,
        "device": devices.describe(device),
        "versions": devices.versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "sizes": vars(sizes),
        "ok": all(row["ok"] for row in same),
        "replaced": replaced,
        "same": same,
        "speed": speed,
    }


def _page(result: dict[str, Any]) -> str:
    lines = [f"CoLT5-attention {result['package_version']} on {result['device']['name']}, patched against published", ""]
    for row in result["same"]:
        verdict = "ok" if row["ok"] else "DIFFERS"
        beside = ""
        if "published_eager" in row:
            beside = f"; published eager {row['published_eager']:.2g}"
            if row["published_triton"] is not None:
                beside += f", published Triton {row['published_triton']:.2g}"
            beside += f"; {row['rows']} rows, {row['rows_with_kinks_left_out']} with kinks left out"
        lines.append(f"  {verdict:7} {row['what']} ({row['dtype']}): error {row['error']:.2g}, limit {row['limit']:.2g}{beside}")
    lines += ["", "  a training step, ms, median (95 % interval of it)"]
    for row in result["speed"]:
        arms = ", ".join(
            f"{arm} {row[arm]['median_us'] / 1e3:.2f} ({row[arm]['ci_us'][0] / 1e3:.2f}–{row[arm]['ci_us'][1] / 1e3:.2f})"
            for arm in ("published", "patched")
        )
        low, high = row["speedup_ci"]
        lines.append(f"  {row['speedup']:5.2f}× ({low:.2f}–{high:.2f})  {row['what']}, {row['published_path']}: {arms}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m coordroute.integrations.colt5_check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cuda:<index> or cpu (tiny sizes); a GPU if not given")
    parser.add_argument("--seconds", type=float, default=40.0, help="until when timing goes on (default 40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    options = parser.parse_args(arguments)
    try:
        result = run(devices.as_device(options.device or "cuda"), options.seconds)
    except (ValueError, ImportError, RuntimeError) as error:
        print(f"colt5_check: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(_page(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
