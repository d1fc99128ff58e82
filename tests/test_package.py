"""What is shipped: the wheel, the public names, the README, and the evidence from which its figures come."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import coordroute
import pytest
from coordroute.autotune import store
from coordroute.reports import evidence, summary

ROOT = Path(coordroute.__file__).resolve().parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return zipfile.ZipFile(made).namelist()


def test_the_wheel_holds_the_package_and_the_shipped_configurations_and_no_more(wheel):
    inside = {name.removeprefix("coordroute/") for name in wheel if name.startswith("coordroute/")}
    assert {"py.typed", "router.py", "cli.py", "kernels/soft_topk.py", "reference/oracles.py", "reports/render.py"} <= inside
    assert {f"autotune/configs/{path.name}" for path in store.SHIPPED.glob("*.json")} <= inside
    folders = {name.split("/")[0] for name in inside if "/" in name}
    assert folders == {"kernels", "reference", "autotune", "reports", "integrations"}
    others = {name for name in inside if not name.endswith(".py")} - {"py.typed"}
    assert all(re.fullmatch(r"autotune/configs/[a-z0-9-]+\.json", name) for name in others), others
    assert all(name.startswith(("coordroute/", "coordroute-")) for name in wheel)
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_importing_the_package_imports_neither_torch_nor_triton():
    code = "import sys, coordroute; print([m for m in ('torch', 'triton') if m in sys.modules], sorted(coordroute.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['Routed', 'Router', '__version__', 'coordinate_descent', 'patch_colt5', 'soft_topk']"
    with pytest.raises(AttributeError, match="'topk'; it has"):
        _ = coordroute.topk


def test_shipped_configurations_are_valid():
    """Each entry has figures within its bounds. A proof that is older than a kernel makes its entry unused, not invalid."""
    files = sorted(store.SHIPPED.glob("*.json"))
    assert files, "no configuration ships"
    for path in files:
        found = store.read(path)
        assert all(reason.startswith("stale") for reason in found.rejected), found.rejected
        for entry in store.read_json(path)["entries"]:
            assert entry["proof"]["cases"] > 0 and entry["proof"]["binary_sha256"]
            for name, error in entry["proof"]["max_error"].items():
                assert error is None or error <= entry["proof"]["bound"][name]
        if found.rejected:
            pytest.skip(f"{path.name}: {found.rejected}; `coordroute autotune` on that device proves them anew")


def devices_with_evidence() -> list[Path]:
    return sorted(path.parent for path in (ROOT / "reports").glob("*/benchmark.json"))


@pytest.mark.parametrize("folder", devices_with_evidence(), ids=lambda folder: folder.name)
def test_committed_evidence_is_whole_and_the_pages_are_rendered_from_it(folder, tmp_path):
    from coordroute.reports.render import render

    found = evidence.load(folder)
    assert found.autotune is not None and found.verify is not None and found.benchmark is not None
    assert found.verify["ok"]
    for path in render(folder, tmp_path):
        if path.suffix == ".md":
            assert path.read_text(encoding="utf-8") == (folder / path.name).read_text(encoding="utf-8")
        assert (folder / path.name).is_file()


def test_the_figures_of_the_readme_are_those_of_the_evidence():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (linked,) = set(re.findall(r"\]\((reports/[^)/]+)/report\.md\)", readme))
    assert summary.updated(readme, ROOT / linked) == readme
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        assert (ROOT / target).is_file(), target


def test_the_environment_variables_of_the_readme_are_those_of_the_code():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(COORDROUTE_\w+)`", readme, re.M)) == set(store.ENVIRONMENT)


def test_a_summary_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no lines"):
        summary.updated("nothing", tmp_path)
    assert summary.main(["only one"]) == 2
    (tmp_path / "README.md").write_text(f"{summary.BEGIN}\n{summary.END}\n")
    assert summary.main([str(tmp_path / "README.md"), str(tmp_path)]) == 2
