"""The examples run as a user would run them, and show what they say they show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


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
    printed = run("train_router.py", "--seed", "0")
    accuracy = {name: float(value) for name, value in re.findall(r"(learned|random) routing names ([\d.]+)%", printed)}
    # by guessing: 25 %
    assert accuracy["learned"] > 90
    assert accuracy["random"] < 60


def test_every_example_is_run_here() -> None:
    mine = Path(__file__).read_text()
    for script in EXAMPLES.glob("*.py"):
        assert f'run("{script.name}"' in mine, f"no test runs {script.name}"
