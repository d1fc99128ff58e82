"""Does a model learn where to spend its compute? Trains a routed byte model on source code, four ways, and compares them.

    python examples/train_bytes.py --json bytes.json --plot bytes.svg     # made for one GPU: 12 runs of 28 s
    python examples/train_bytes.py --preset tiny --steps 300              # a CPU: minutes, to see it run
    python examples/train_bytes.py --from bytes.json --plot bytes.svg     # draws an earlier run again

Expect a table with a line for each method: validation loss over all bytes and over the changed ones, which share of what is
routed is changed, tokens per second; then what the seeds bear out, pair by pair.

The task. A byte encoder with a context of 2,048 reads source files in which an eighth of the bytes, in spans of 4, was replaced
by bytes of other files, and restores them. It is not told which: most bytes must be copied, some not, and every one counts in
the loss (bits per byte). Every layer is one of CoLT5's (``layers.py``): a small local branch for every byte, and a large branch,
attention over the whole context and feed-forward, for an eighth of them.

Why an encoder. A top-k over a whole sequence looks at later tokens to decide about earlier ones. In a causal model that is a
leak in training which cannot be had when sampling (Raposo et al., "Mixture-of-Depths", arXiv:2404.02258). An encoder, which is
where CoLT5 routes, is given its whole input, so nothing leaks.

Why the bytes are changed and not masked. ``--objective masked`` shows a mask token in their place and counts only them. But
masked places look alike, so that a router takes all of them or none, and what is never routed has no gradient through which to
come in: in small runs the first draws decided, whatever the solver. Changed bytes look like any other.

What is compared. For one seed all methods start from the same weights, see the same batches and take the same number of steps;
every step costs the same but for the solver. Gates are straight-through, 1 in value, so that all methods compute the same
function of what they route. They differ in one thing: how bytes are picked, and what gradient the router gets.

The text. The ``.py`` files of the interpreter's standard library and of the installed torch (``source_text.py``), one file in
16 for validation. Another version of either is another text: compare losses within one run alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import bytes_report
import rich.console
import rich.progress
import source_text
import torch
from coordroute import Routed, Router
from coordroute.autotune.device import describe, versions
from einops import rearrange
from layers import ConditionalAttention, ConditionalFeedForward, MakeRouter, unit_router
from torch import Tensor, nn
from torch.nn import functional

BYTES = 256
MASK = BYTES
"""The one token that is no byte."""
SPAN = 4
"""Bytes changed in a row."""
SHARE = 8
"""One byte in 8 is changed, and one in 8 goes through each heavy branch."""


ROUTERS = {"router": "feed-forward", "query_router": "queries", "key_router": "keys and values"}
"""What the routers of a layer pick tokens for."""


@dataclass(frozen=True)
class Preset:
    """A model, and how it is trained."""

    context: int
    batch: int
    dim: int
    depth: int
    heavy_heads: int  # the light branch has one head
    dim_head: int
    window: int
    light_hidden: int
    heavy_hidden: int
    learning_rate: float
    validation_batches: int


PRESETS = {
    "base": Preset(2048, 16, 256, 4, 4, 64, 32, 64, 2048, 2e-3, 4),
    "tiny": Preset(256, 8, 64, 2, 2, 32, 16, 16, 512, 3e-3, 4),
}


# --- what is compared ------------------------------------------------------------------------------------------------


class UntaughtRouter(Router):
    """The same top-k with no gradient through the gate: the routing token stays as it was drawn."""

    def forward(self, x: Tensor, **options: Any) -> Routed:
        routed = super().forward(x, **options)
        return routed._replace(scores=routed.scores.detach())


class RandomRouter(Router):
    """Draws its tokens uniformly, in validation too."""

    def forward(self, x: Tensor, **options: Any) -> Routed:
        return super().forward(x, random_route=True, **options)


class Method(NamedTuple):
    says: str
    make: MakeRouter


METHODS = {
    "exact": Method("exact solver, eps 0.3", partial(unit_router, solver="exact", eps=0.3)),
    "published": Method(
        "coordinate descent, T = 20, eps 4 → 0.03 by 0.7",
        partial(unit_router, solver="coordinate_descent", n_iters=20, eps=0.03, eps_init=4.0, eps_decay=0.7),
    ),
    "hard": Method("top-k by score, no gradient through the gate", partial(unit_router, kind=UntaughtRouter)),
    "random": Method("tokens drawn at random", partial(unit_router, kind=RandomRouter)),
    "soft": Method("exact solver, eps 1, its weights as gates", partial(unit_router, eps=1.0, straight_through=False)),
}
COMPARED = ["exact", "published", "hard", "random"]
OBJECTIVES = ("changed", "masked")


# --- the model -------------------------------------------------------------------------------------------------------


class ByteEncoder(nn.Module):
    """Bytes [b, n] int64 -> logits [b, n, 256] of what they were."""

    def __init__(self, preset: Preset, make: MakeRouter, objective: str = "changed") -> None:
        super().__init__()
        self.objective = objective
        p, heavy = preset, preset.context // SHARE
        self.embed = nn.Embedding(BYTES + 1, p.dim)
        self.layers = nn.ModuleList()
        for _ in range(p.depth):
            attention = ConditionalAttention(
                p.dim,
                num_queries=heavy,
                num_keys=heavy,
                light_heads=1,
                heavy_heads=p.heavy_heads,
                dim_head=p.dim_head,
                window=p.window,
                router=make,
            )
            hidden = {"light_hidden": p.light_hidden, "heavy_hidden": p.heavy_hidden}
            self.layers.append(nn.ModuleList((attention, ConditionalFeedForward(p.dim, num_tokens=heavy, router=make, **hidden))))
        self.norm = nn.RMSNorm(p.dim)
        self.head = nn.Linear(p.dim, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for attention, feed_forward in self.layers:
            x = feed_forward(attention(x))
        return self.head(self.norm(x))

    def bits(self, tokens: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised, and the mean loss of the changed bytes, in bits: scalars.

        Args:
            tokens: [b, n] int64, b >= 2.
            changed: [b, m] int64, positions of the bytes that the model gets to see changed or masked.
        """
        # bytes of another sequence at the same places: each as frequent as it is in the text
        other = MASK if self.objective == "masked" else tokens.roll(1, 0).gather(1, changed)
        logits = self(tokens.scatter(1, changed, other)).float()
        nats = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        bits = nats.reshape(tokens.shape) / math.log(2)
        of_changed = bits.gather(1, changed).mean()
        return (of_changed if self.objective == "masked" else bits.mean()), of_changed


def windows(text: Tensor, preset: Preset, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: tokens [b, n] at random places of the text, and positions [b, n/8] to change.

    Each stretch of 32 bytes has one span to change, so that all sequences have as many, and shapes stay the same.
    """
    device, cell = text.device, SPAN * SHARE
    cells = torch.arange(0, preset.context, cell, device=device)
    while True:
        start = torch.randint(len(text) - preset.context, (preset.batch, 1), generator=generator, device=device)
        tokens = text[start + torch.arange(preset.context, device=device)].long()
        shape = (preset.batch, len(cells))
        first = cells + torch.randint(cell - SPAN + 1, shape, generator=generator, device=device)
        yield tokens, rearrange(first[..., None] + torch.arange(SPAN, device=device), "b cells span -> b (cells span)")


# --- one run ---------------------------------------------------------------------------------------------------------


class Trainer:
    """One model of one method and seed, and its optimizer. The learning rate warms up over a twentieth, then falls as a cosine."""

    def __init__(
        self, method: Method, preset: Preset, text: source_text.Text, seed: int, steps: int, objective: str = "changed"
    ) -> None:
        self.text, self.preset, self.seed, self.steps = text, preset, seed, steps
        self.device = text.train.device
        torch.manual_seed(seed)
        self.model = ByteEncoder(preset, method.make, objective).to(self.device)
        decayed = [p for name, p in self.model.named_parameters() if p.dim() > 1 and "routing_token" not in name]
        others = [p for name, p in self.model.named_parameters() if p.dim() <= 1 or "routing_token" in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=preset.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.batches = windows(text.train, preset, torch.Generator(self.device).manual_seed(seed))

    def step(self, number: int) -> Tensor:
        """The training loss, on the device: reading it would wait for the GPU."""
        warm_up = max(1, self.steps // 20)
        progress = max(0, number - warm_up) / max(1, self.steps - warm_up)
        rate = min(1.0, (number + 1) / warm_up) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
        for group in self.optimizer.param_groups:
            group["lr"] = self.preset.learning_rate * rate
        with self._autocast():
            loss, _ = self.model.bits(*next(self.batches))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Losses on a fixed set, and which share of the routed bytes is changed, for each kind of router."""
        batches = windows(self.text.validation, self.preset, torch.Generator(self.device).manual_seed(0))
        shares: dict[str, list[Tensor]] = {}
        is_changed = torch.empty(0)

        def watch(kind: str, module: nn.Module, inputs: Any, routed: Routed) -> None:
            shares.setdefault(kind, []).append(is_changed.gather(1, routed.indices.flatten(1)).mean())

        hooks = [
            router.register_forward_hook(partial(watch, ROUTERS[name.rsplit(".", 1)[1]]))
            for name, router in self.model.named_modules()
            if isinstance(router, Router)
        ]
        devices = [self.device] if self.device.type == "cuda" else []
        # random routing draws the same here each time, and what training draws stays as it is
        with torch.random.fork_rng(devices), self._autocast():
            torch.manual_seed(0)
            losses = []
            for tokens, changed in islice(batches, self.preset.validation_batches):
                is_changed = torch.zeros(tokens.shape, device=self.device).scatter_(1, changed, 1.0)
                losses.append(torch.stack(self.model.bits(tokens, changed)))
        for hook in hooks:
            hook.remove()
        loss, of_changed = torch.stack(losses).mean(dim=0).tolist()
        return {
            "loss": round(loss, 5),
            "loss_of_changed": round(of_changed, 5),
            "routed_are_changed": {kind: round(torch.stack(found).mean().item(), 4) for kind, found in shares.items()},
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_step(trainer: Trainer, warm_up: int, timed: int) -> float:
    """Kernels are compiled and memory is found in the steps before the timed ones."""
    for number in range(warm_up):
        trainer.step(number)
    synchronize(trainer.device)
    begin = time.perf_counter()
    for number in range(warm_up, warm_up + timed):
        trainer.step(number)
    synchronize(trainer.device)
    return (time.perf_counter() - begin) / timed


def train(trainer: Trainer, evaluations: int, advance: Callable[[], object]) -> dict[str, Any]:
    """One run from its first step to its last, as it goes into the JSON file. Validation is not in its seconds."""
    steps, first, seconds = trainer.steps, 0, 0.0
    losses, validation = [], [{"step": 0, **trainer.validate()}]
    for end in sorted({math.ceil(steps * (i + 1) / evaluations) for i in range(evaluations)}):
        begin = time.perf_counter()
        part = []
        for number in range(first, end):
            part.append(trainer.step(number))
            advance()
        losses.append({"step": end, "loss": round(torch.stack(part).mean().item(), 5)})
        seconds += time.perf_counter() - begin
        validation.append({"step": end, **trainer.validate()})
        first = end
    tokens = steps * trainer.preset.batch * trainer.preset.context
    return {
        "seed": trainer.seed,
        "steps": steps,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds),
        "train": losses,
        "validation": validation,
    }


# --- all of them -----------------------------------------------------------------------------------------------------


def steps_within(seconds: float, methods: list[str], preset: Preset, text: source_text.Text, objective: str) -> int:
    """How many steps the slowest of the methods takes in that time."""
    slowest = max(seconds_per_step(Trainer(METHODS[name], preset, text, 0, 1000, objective), 5, 20) for name in methods)
    return max(1, int(seconds / slowest))


def compare(arguments: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All methods with all seeds; ``write`` is called with what there is after every run."""
    begin = time.monotonic()
    device, preset = torch.device(arguments.device), PRESETS[arguments.preset]
    folders = {path.name: path for path in arguments.text} if arguments.text else source_text.installed_source()
    read = source_text.read(folders)
    text = read._replace(train=read.train.to(device), validation=read.validation.to(device))
    console = rich.console.Console(stderr=True)
    if arguments.steps is None:
        console.print("measuring how long a step takes")
        steps = steps_within(arguments.seconds_per_run, arguments.methods, preset, text, arguments.objective)
    else:
        steps = arguments.steps
    evidence: dict[str, Any] = {
        "schema": 1,
        "command": "examples/train_bytes.py",
        "device": describe(device),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "complete": False,
        "precision": "bfloat16 autocast" if device.type == "cuda" else "float32",
        "preset": arguments.preset,
        "objective": arguments.objective,
        "settings": {**asdict(preset), "span": SPAN, "share": SHARE, "steps": steps},
        "parameters": sum(p.numel() for p in ByteEncoder(preset, unit_router).parameters()),
        "text": text.facts,
        "methods": [{"name": name, "says": METHODS[name].says, "runs": []} for name in arguments.methods],
    }
    longest, runs = 0.0, len(arguments.methods) * arguments.seeds
    with rich.progress.Progress(console=console) as progress:
        task = progress.add_task("training", total=runs * steps)
        # seed by seed: a comparison that is cut short has whole comparisons in it
        for seed in range(arguments.seeds):
            for method in evidence["methods"]:
                began = time.monotonic()
                if began + longest - begin > arguments.seconds:
                    console.print(f"stopped: the next run would end after the {arguments.seconds:g} s that --seconds allows")
                    return evidence
                progress.update(task, description=f"{method['name']}, seed {seed}")
                trainer = Trainer(METHODS[method["name"]], preset, text, seed, steps, arguments.objective)
                run = train(trainer, min(arguments.evaluations, steps), partial(progress.advance, task))
                method["runs"].append(run)
                longest = max(longest, time.monotonic() - began)
                evidence["seconds"] = round(time.monotonic() - begin, 1)
                evidence["complete"] = sum(len(method["runs"]) for method in evidence["methods"]) == runs
                write(evidence)
                loss, speed = run["validation"][-1]["loss"], run["tokens_per_second"]
                console.print(f"{method['name']:>9}, seed {seed}: {loss:.4f} bits, {speed:,} tokens/s")
    return evidence


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a routed byte model with learned and unlearned routing, and compares.")
    parser.add_argument("--preset", choices=PRESETS, default="base", help="size of the model and its batches")
    parser.add_argument("--methods", type=lambda words: words.split(","), default=COMPARED, help=f"of {','.join(METHODS)}")
    parser.add_argument("--objective", choices=OBJECTIVES, default="changed", help="what is restored")
    parser.add_argument("--seeds", type=_positive, default=3, help="runs of each method")
    parser.add_argument("--steps", type=_positive, help="training steps of each run; else as many as --seconds-per-run allows")
    parser.add_argument("--seconds-per-run", type=float, default=28.0, help="for the slowest method; all take as many steps")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no run begins that would end later")
    parser.add_argument("--evaluations", type=_positive, default=16, help="validations of each run, beside that of the start")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=Path, nargs="+", help="folders of source to train on, in place of Python's and torch's own")
    parser.add_argument("--json", type=Path, help="where to write what was seen, after every run")
    parser.add_argument("--plot", type=Path, help="where to draw it; the name's ending is the format (.svg, .png)")
    parser.add_argument("--from", type=Path, dest="source", help="train nothing: show what an earlier --json file holds")
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown:
        parser.error(f"--methods has {unknown[0]!r}; allowed are {', '.join(METHODS)}")
    return arguments


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not an integer >= 1")
    return number


def main() -> None:
    arguments = parse()

    def write(evidence: dict[str, Any]) -> None:
        if arguments.json is not None:
            # whole or not at all: a run that is cut off leaves the last file
            unfinished = arguments.json.with_name(arguments.json.name + ".part")
            unfinished.write_text(json.dumps(evidence, indent=1) + "\n")
            unfinished.replace(arguments.json)

    evidence = json.loads(arguments.source.read_text()) if arguments.source else compare(arguments, write)
    bytes_report.show(evidence)
    if arguments.plot is not None:
        bytes_report.plot(evidence, arguments.plot)


if __name__ == "__main__":
    main()
