"""The teeth of the verification suite: faults that were put into the package on purpose are found.

The whole catalogue takes a GPU, or an hour of a CPU: ``python tests/mutation/run.py --device cpu|cuda``. Here every mutant is held
against today's source, and a few are run that the first check of their operator has to find.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent / "mutation"
PACKAGE = Path(__file__).parents[1]


def _loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_mutation_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


catalogue = _loaded("catalogue")

FAST = (
    # Triton's interpreter
    "soft_topk: rows beyond the last",
    "soft_topk: NaN does not spread",
    "descent: off by one segment",
    # the torch backend
    "cpu: masked in place",
    "cpu: sign of deps",
    "cpu: dk without 1/k",
    "cpu: stale eps in the first iteration",
)


def test_every_mutant_fits_todays_source() -> None:
    stale = []
    for mutant in catalogue.CATALOGUE:
        try:
            ast.parse(mutant.applied((PACKAGE / mutant.file).read_text()))
        except (OSError, ValueError, SyntaxError) as error:
            stale.append(str(error))
    assert not stale, "\n".join(stale)


def test_the_catalogue_is_sound() -> None:
    names = [mutant.name for mutant in catalogue.CATALOGUE]
    assert len(names) == len(set(names)) >= 48
    for mutant in catalogue.CATALOGUE:
        assert set(mutant.ops) <= {"soft_topk", "coordinate_descent"} and mutant.sentence, mutant.name
        assert mutant.where and set(mutant.where) <= {"cpu", "interpreter", "gpu"}, mutant.name
    assert {mutant.file.partition("/")[2] for mutant in catalogue.CATALOGUE if mutant.file.startswith("kernels/")} >= {
        "soft_topk.py",
        "coordinate_descent.py",
        "rows.py",
        "launch.py",
        "ops.py",
        "cpu.py",
    }


def test_a_mutant_that_no_longer_fits_is_noticed() -> None:
    mutant = catalogue.CATALOGUE[0]
    with pytest.raises(ValueError, match=r"stands 0 times in kernels/rows\.py"):
        mutant.applied("nothing of it")
    with pytest.raises(ValueError, match="stands 2 times"):
        mutant.applied(mutant.old + mutant.old)


def test_faults_are_found_and_the_package_without_one_passes(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    file = tmp_path / "found.json"
    command = [sys.executable, str(FOLDER / "run.py"), "--device", "cpu", "--quick", "--workers", "1", "--json", str(file)]
    done = subprocess.run([*command, "--only", *FAST], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report["control"]["verdict"] == "passes" and report["control"]["places"] == ["cpu", "interpreter"]
    assert {row["name"]: row["verdict"] for row in report["mutants"]} == dict.fromkeys(FAST, "killed")
    assert all(row["property"] not in ("crashes", "hangs", "imports") and row["counterexample"] for row in report["mutants"])
