"""docs/verification.md: its code runs, and its tables are those of today's suite."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from coordroute import cli, soft_topk
from coordroute.reference import compare, others, page, properties, verify
from hypothesis import Phase

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "verification.md"


def code(which: str) -> str:
    """The one block of Python on the page that has ``which`` in it."""
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if which in block]
    return found


def the_test(monkeypatch: pytest.MonkeyPatch, my_topk: Any, examples: int) -> Any:
    """The page's test of ``mypackage.ops.my_topk``, which is what is given, with few examples that are not shrunk."""
    package, ops = ModuleType("mypackage"), ModuleType("mypackage.ops")
    ops.my_topk = my_topk  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mypackage", package)
    monkeypatch.setitem(sys.modules, "mypackage.ops", ops)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    names: dict[str, Any] = {"Phase": Phase}
    few = f"max_examples={examples}, derandomize=True, database=None, phases=[Phase.generate]"
    changed = code("def test_my_topk").replace("max_examples=50", few)
    assert few in changed
    exec(compile(changed, str(PAGE), "exec"), names)
    return names["test_my_topk"]


def test_the_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert page.updated(text) == text, "python -m coordroute.reference.page docs/verification.md"
    for name in (*properties.PROPERTIES, *verify.SENTENCES):
        assert f"| {name} | " in text
    # the policy for kinks, in words
    assert compare.KINK_SHARE == 0.25 and "At most a quarter of the rows" in text
    assert properties.SLACK_SHARE == 0.1 and "more than a tenth of the gradient" in text
    with pytest.raises(ValueError, match="properties: begin"):
        page.updated("no markers")


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE.read_text())
    assert len(links) >= 3 and all((PAGE.parent / link).exists() for link in links)


def test_ten_lines_find_a_wrong_operator_and_pass_a_right_one(monkeypatch):
    assert len([line for line in code("def test_my_topk").splitlines() if line]) <= 10
    the_test(monkeypatch, soft_topk, 2)()

    def doubled(scores, k, *, eps, mask=None):
        return soft_topk(scores, k, eps=eps, mask=mask) * 2

    with pytest.raises(AssertionError, match=r"FAILS.*Case\(op='soft_topk'"):
        the_test(monkeypatch, doubled, 2)()


def test_the_adapter_and_its_commands(tmp_path, monkeypatch):
    (tmp_path / "adapter_of_the_page.py").write_text(code("# adapter.py"))
    monkeypatch.syspath_prepend(tmp_path)
    found = cli._imported("adapter_of_the_page:with_temperature")
    assert cli._distribution("adapter_of_the_page:with_temperature") == "coordroute 0.1.0"
    assert properties.accepts(found, "eps") and not properties.accepts(found, "mask")
    case = verify.Case("soft_topk", n=40, rows=(("normal", 1),))
    verify.check(found, case, only=("values", "grad scores"))
    monkeypatch.delitem(sys.modules, "adapter_of_the_page")
    # every command is one that the parsers take
    (block,) = [one for one in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL) if "verify" in one]
    for line in block.splitlines():
        assert cli._parser().parse_args(line.split()[1:]).run is not None
    for name in others.DISTRIBUTIONS:
        assert callable(getattr(others, name))
