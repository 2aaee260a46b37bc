"""The README's Python blocks run in order, in one namespace, and print what their comments say."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [textwrap.dedent(code) for _, code in BLOCK.findall(README.read_text(encoding="utf-8"))]
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    checked = 0
    for code in blocks:
        exec(compile(code, str(README), "exec"), namespace)
        expected = PRINTED.findall(code)
        assert capsys.readouterr().out.splitlines() == expected, code
        checked += len(expected)
    assert checked >= 5
