"""What to do is an error's second argument, so that an HTTP answer and a page show it apart from what happened."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from state import errors
from state.errors import SpringtideError
from tests.laws.sources import files, name, nodes

KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SpringtideError)}


def made_errors(path: Path) -> Iterator[ast.Call]:
    """The calls that make an error of the tree."""
    for node in nodes(path):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in KINDS:
            yield node


def test_no_error_hides_its_advice_in_what_happened() -> None:
    hidden = [
        f"{name(path)}:{call.lineno}"
        for path in files()
        for call in made_errors(path)
        if len(call.args) == 1
        and any("; " in str(part.value) for part in ast.walk(call.args[0]) if isinstance(part, ast.Constant))
    ]
    assert hidden == []
