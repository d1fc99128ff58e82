"""Learned routing beats random routing: trains both on a small task, and prints their accuracies.

    python examples/train_router.py

Each of a sequence's 128 tokens shows one of 4 colours. Three tokens carry a marker, and they show the colour that is to be
named; the colours of the others are random. Only 6 tokens of a sequence go through the feed-forward, the one place that can
tell whether a coloured token is marked too. Random routing shows it a marked token now and then. A learned router must find
out, from the answers alone, that the marker is what to look for. (From a few seeds it never looks that way: a token that is
not chosen teaches the router nothing.)
"""

import argparse
import time

import torch
from coordroute import Router
from torch import Tensor, nn
from torch.nn import functional

LENGTH, MARKED, ROUTED = 128, 3, 6
COLOURS, NOISE, WIDTH = 4, 3, 16


def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [batch, LENGTH, 1 + COLOURS + NOISE] and the colours to name [batch]."""
    answer = torch.randint(COLOURS, (batch,), generator=generator)
    where = torch.rand(batch, LENGTH, generator=generator).topk(MARKED, dim=-1).indices
    colours = torch.randint(COLOURS, (batch, LENGTH), generator=generator)
    colours.scatter_(-1, where, answer[:, None].expand(-1, MARKED))
    marker = torch.zeros(batch, LENGTH, 1).scatter(1, where[..., None], 1.0)
    noise = torch.randn(batch, LENGTH, NOISE, generator=generator)
    return torch.cat((marker, functional.one_hot(colours, COLOURS), noise), dim=-1), answer


class RoutedFeedForward(nn.Module):
    """A light layer for every token, and a heavy one for the tokens that the router picks."""

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        # a temperature about as large as the scores spread: tokens near the threshold all learn
        self.router = Router(dim, eps=3.0)
        self.light = nn.Linear(dim, dim)
        self.heavy = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, random_route: bool = False) -> Tensor:
        routed = self.router(x, num_tokens=self.num_tokens, random_route=random_route)
        # the gates are 1 in value; their gradient is what teaches the router
        update = self.heavy(routed.routed_tokens) * routed.scores[..., None]
        return self.light(x) + self.router.route_back(torch.zeros_like(x), update, routed.indices)


class Classifier(nn.Module):
    """Tokens [batch, length, 1 + COLOURS + NOISE] -> logits [batch, COLOURS]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1 + COLOURS + NOISE, WIDTH)
        self.feed_forward = RoutedFeedForward(WIDTH, ROUTED)
        self.head = nn.Linear(WIDTH, COLOURS)

    def forward(self, tokens: Tensor, random_route: bool = False) -> Tensor:
        x = self.feed_forward(self.embed(tokens), random_route)
        return self.head(x.sum(dim=1) / ROUTED)


def train(steps: int, seed: int, device: torch.device, random_route: bool) -> float:
    """The accuracy on sequences that were not trained on."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        tokens, answer = draw(32, generator)
        loss = functional.cross_entropy(model(tokens.to(device), random_route), answer.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens, answer = draw(2048, generator)
        named = model(tokens.to(device), random_route).argmax(dim=-1).cpu()
    return float((named == answer).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a classifier with learned and with random routing.")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for name, random_route in (("learned", False), ("random", True)):
        begin = time.perf_counter()
        accuracy = train(arguments.steps, arguments.seed, torch.device(arguments.device), random_route)
        print(f"{name:>7} routing names {accuracy:.1%} of 2048 new sequences right ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
