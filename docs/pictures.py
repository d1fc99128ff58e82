"""Computes and draws what docs/routing.md shows: run it again after a change of a solver or of ``Router``.

    python docs/pictures.py                   # writes docs/images/*.svg, docs/images/figures.json and the table in docs/routing.md
    python docs/pictures.py --output FOLDER   # writes the pictures and figures.json there, and leaves the page alone

Takes seconds on one CPU core. Everything is computed in float64 by the package's own operators, on normal scores from a fixed
seed; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from coordroute import Router, coordinate_descent, soft_topk
from matplotlib.figure import Figure
from torch import Tensor

PAGE = Path(__file__).parent / "routing.md"
BEGIN, END = "<!-- figures: begin, written by docs/pictures.py -->", "<!-- figures: end -->"

N, ROWS = 8192, 4
ROUTED = N // 8
PUBLISHED: dict[str, Any] = {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}
FETCH = 9 / 8

# Wong's palette (Nature Methods 8, 441), which colour-blind people tell apart; every line has a style of its own too
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#59636f"
INK, GRID = "#1f2329", "#d0d7df"

Json = dict[str, Any]


def normal_scores(spread: float = 1.0) -> Tensor:
    """[ROWS, N] float64, the same each time but for the spread."""
    return spread * torch.randn(ROWS, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def grid(low: float, high: float, points: int) -> list[float]:
    """Even steps in the logarithm."""
    exponents = torch.linspace(0, 1, points, dtype=torch.float64)
    return [float(f"{low * (high / low) ** float(t):.4g}") for t in exponents]


# --- what is computed ------------------------------------------------------------------------------------------------


def weights_by_score() -> Json:
    """Weight against score at several temperatures; the scores spread by 1."""
    scores = normal_scores()[0].sort().values
    shown = scores[:: N // 512]
    series = {}
    for eps in (0.03, 0.1, 0.3, 1.0, 3.0):
        series[f"{eps:g}"] = [round(v, 5) for v in soft_topk(scores, ROUTED, eps=eps)[:: N // 512].tolist()]
    return {"score": [round(v, 5) for v in shown.tolist()], "weight": series, "threshold": round(float(scores[-ROUTED]), 5)}


def gates_that_learn() -> Json:
    """The share of routed tokens whose gate has a gradient, against eps over the spread of the scores.

    Published settings have a fixed eps, so there the spread varies. A gate has a gradient where the weight is below 1.
    """
    ratios = grid(1e-3, 10.0, 33)
    fetched = ROUTED * FETCH
    solvers: dict[str, tuple[Callable[..., Tensor], float | None]] = {
        "exact, fetch_k_ratio 1": (partial(soft_topk, k=ROUTED), None),
        "exact, fetch_k_ratio 9/8": (partial(soft_topk, k=fetched), None),
    }
    for n_iters in (20, 50):
        solve = partial(coordinate_descent, k=fetched, n_iters=n_iters, eps_init=4.0, eps_decay=0.7)
        solvers[f"published, T = {n_iters}"] = (solve, PUBLISHED["eps"])
    series = {}
    for name, (solver, fixed) in solvers.items():
        found = []
        for ratio in ratios:
            scores = normal_scores(1.0 if fixed is None else fixed / ratio)
            weights = solver(scores, eps=ratio if fixed is None else fixed)
            routed = weights.gather(-1, scores.topk(ROUTED, dim=-1).indices)
            found.append(round(float((routed < 1 - 1e-12).double().mean()), 5))
        series[name] = found
    return {"eps_over_spread": ratios, "share": series}


def distance_from_exact() -> Json:
    """Sum of |difference| of the weights over k, against eps: T steps at that eps throughout, and annealed to it from 4 by 0.7."""
    temperatures = grid(0.01, 3.0, 25)
    scores, k = normal_scores(), ROUTED * FETCH
    series: dict[str, list[float]] = {}
    for n_iters in (20, 50):
        annealed: dict[str, Any] = {"eps_init": 4.0, "eps_decay": 0.7}
        for name, how in (("constant", {}), ("annealed", annealed)):
            found = []
            for eps in temperatures:
                lam = coordinate_descent(scores, k, n_iters=n_iters, eps=eps, **how)
                found.append(round(float((lam - soft_topk(scores, k, eps=eps)).abs().sum(-1).mean() / k), 6))
            series[f"T = {n_iters}, {name}"] = found
    return {"eps": temperatures, "distance": series}


def budget_met() -> Json:
    """Sum of the weights over k with the published settings, against the spread of the scores."""
    spreads = grid(0.03, 30.0, 25)
    k = ROUTED * FETCH
    solvers: dict[str, Callable[[Tensor], Tensor]] = {
        f"published, T = {n_iters}": partial(coordinate_descent, k=k, n_iters=n_iters, **PUBLISHED) for n_iters in (20, 50)
    }
    solvers["exact, same eps"] = partial(soft_topk, k=k, eps=PUBLISHED["eps"])
    series = {
        name: [round(float(solve(normal_scores(spread)).sum(-1).mean() / k), 6) for spread in spreads]
        for name, solve in solvers.items()
    }
    return {"spread": spreads, "met": series}


def fresh_routers() -> list[Json]:
    """Whether a new ``Router`` gets any gradient on normalised tokens, by width and by how its routing token is drawn."""
    found = []
    for dim in (64, 256, 1024):
        x = torch.nn.functional.rms_norm(
            torch.randn(2, 2048, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64), (dim,)
        )
        for says, scale, eps in (
            ("as made, eps 0.03", 1.0, 0.03),
            ("as made, eps 1", 1.0, 1.0),
            ("routing token times dim^-1/2, eps 0.3", dim**-0.5, 0.3),
        ):
            router = Router(dim, straight_through=False, eps=eps, learned_routing_tokens=False)
            token = scale * torch.randn(2, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            gates = router(x, num_tokens=256, routing_tokens=token).scores
            found.append({"dim": dim, "router": says, "share": round(float((gates < 1 - 1e-12).double().mean()), 5)})
    return found


def compute() -> Json:
    return {
        "settings": {"n": N, "rows": ROWS, "routed": ROUTED, "fetch_k_ratio": FETCH, **PUBLISHED},
        "weights": weights_by_score(),
        "gates": gates_that_learn(),
        "distance": distance_from_exact(),
        "budget": budget_met(),
        "fresh": fresh_routers(),
    }


# --- how it is drawn -------------------------------------------------------------------------------------------------


@contextmanager
def picture(path: Path) -> Iterator[Any]:
    """Axes of a figure that is written to ``path`` (its ending is the format), the same bytes for the same content."""
    settings: dict[Any, Any] = {
        "svg.hashsalt": "coordroute",
        "svg.fonttype": "none",
        "font.size": 11,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2.0,
        "legend.frameon": False,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        yield axes
        if axes.get_xscale() == "log":
            axes.xaxis.set_major_formatter("{x:g}")
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw(found: Json, folder: Path, ending: str) -> None:
    draw_weights(found["weights"], folder / f"weights{ending}")
    draw_gates(found["gates"], folder / f"gates{ending}")
    draw_distance(found["distance"], folder / f"distance{ending}")
    draw_budget(found["budget"], folder / f"budget{ending}")


def draw_weights(found: Json, path: Path) -> None:
    looks = ((BLUE, "-"), (GREEN, "--"), (ORANGE, "-."), (PINK, (0, (6, 2))), (GREY, ":"))
    with picture(path) as axes:
        for (eps, weight), (color, style) in zip(found["weight"].items(), looks, strict=True):
            axes.plot(found["score"], weight, color=color, linestyle=style, label=f"eps = {eps}")
        axes.axvline(found["threshold"], color=INK, linewidth=0.8)
        axes.annotate(
            "hard top-k takes\nwhat is right of this", (found["threshold"], 0.03), (7, 0), textcoords="offset points", fontsize=10
        )
        axes.set(xlabel="score, in units of the scores' spread", ylabel="weight λ", xlim=(-3, 3), ylim=(0, 1.03))
        axes.legend(loc="upper left")


def draw_gates(found: Json, path: Path) -> None:
    looks = ((BLUE, "-"), (GREEN, "--"), (ORANGE, "-."), (PINK, ":"))
    with picture(path) as axes:
        for (name, share), (color, style) in zip(found["share"].items(), looks, strict=True):
            axes.plot(found["eps_over_spread"], [100 * v for v in share], color=color, linestyle=style, label=name)
        axes.set(
            xscale="log", xlabel="eps / spread of the scores", ylabel="routed tokens whose gate has a gradient (%)", ylim=(-1, 103)
        )
        axes.legend(loc="upper left")


def draw_distance(found: Json, path: Path) -> None:
    looks = ((ORANGE, "--"), (ORANGE, "-"), (BLUE, "--"), (BLUE, "-"))
    with picture(path) as axes:
        for (name, distance), (color, style) in zip(found["distance"].items(), looks, strict=True):
            axes.plot(found["eps"], [100 * v for v in distance], color=color, linestyle=style, label=name)
        axes.set(xscale="log", xlabel="eps, in units of the scores' spread", ylabel="distance from the exact weights (% of k)")
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")


def draw_budget(found: Json, path: Path) -> None:
    looks = ((ORANGE, "-."), (PINK, "--"), (BLUE, "-"))
    with picture(path) as axes:
        for (name, met), (color, style) in zip(found["met"].items(), looks, strict=True):
            axes.plot(found["spread"], [100 * v for v in met], color=color, linestyle=style, label=name)
        axes.set(xscale="log", xlabel="spread of the scores (eps is 0.03)", ylabel="sum of the weights (% of k)")
        axes.legend(loc="best")


# --- the page --------------------------------------------------------------------------------------------------------


def table(found: Json) -> str:
    """The figures that the page quotes, as Markdown."""
    at = found["budget"]["spread"].index(min(found["budget"]["spread"], key=lambda spread: abs(spread - 1)))
    lines = ["| published settings, scores that spread by 1 | sum of the weights |", "| :-- | --: |"]
    lines += [f"| {name} | {met[at]:.1%} of k |" for name, met in found["budget"]["met"].items()]
    lines += ["", "| a new router, normalised tokens | dim | routed tokens whose gate has a gradient |", "| :-- | --: | --: |"]
    lines += [f"| {one['router']} | {one['dim']} | {one['share']:.1%} |" for one in found["fresh"]]
    return "\n".join(lines)


def in_page(page: str, words: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{words}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Computes and draws what docs/routing.md shows.")
    parser.add_argument("--output", type=Path, help="a folder for the pictures; without it docs/images, and the page is updated")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    arguments = parser.parse_args()
    folder = arguments.output or PAGE.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    found = compute()
    draw(found, folder, f".{arguments.format}")
    (folder / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    if arguments.output is None:
        PAGE.write_text(in_page(PAGE.read_text(), table(found)))


if __name__ == "__main__":
    main()
