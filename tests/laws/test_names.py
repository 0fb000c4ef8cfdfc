"""Every file has a specific name and a docstring that describes it; every package is importable."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.laws.sources import PACKAGES, ROOT, files, name, nodes, tree

VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc", "shared", "core", "tools"}
HANDLERS = ("basicConfig", "StreamHandler")
FILES = files(*PACKAGES, "tests")


def test_no_name_is_vague() -> None:
    def words(path: Path) -> set[str]:
        return {word for part in path.relative_to(ROOT).with_suffix("").parts for word in part.split("_")}

    assert {name(path): words(path) & VAGUE for path in FILES if words(path) & VAGUE} == {}


def test_a_file_begins_with_what_it_does() -> None:
    docstrings = {name(path): ast.get_docstring(tree(path)) or "" for path in FILES}
    assert [file for file, docstring in docstrings.items() if len(docstring.partition("\n")[0]) <= 10] == []


def test_every_package_is_a_package() -> None:
    assert [name(path) for path in files() if not (path.parent / "__init__.py").exists()] == []


def test_logging_is_set_up_in_one_place() -> None:
    """Another handler or format would write lines that no machine reads."""
    calls = [(path, node) for path in files() for node in nodes(path) if isinstance(node, ast.Call)]
    assert [name(path) for path, call in calls if getattr(call.func, "attr", "") in HANDLERS] == []
