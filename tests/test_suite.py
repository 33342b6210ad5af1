"""Test files stand alone: what they share lies in support/, and each is short enough to be read."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.glob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_test_file_imports_another_or_is_longer_than_500_lines(path: Path) -> None:
    text = path.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.partition(".")[0] in {"conftest", *(file.stem for file in FILES)}}
    assert len(text.splitlines()) <= 500
