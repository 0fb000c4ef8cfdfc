"""Every file has a specific name and a docstring that describes it; every package is importable."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("state", "streaming", "trainer", "deploy", "evaluation", "springtide_client")
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc", "shared", "core", "tools"}
FILES = sorted(path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py"))
OURS = [path for path in FILES if path.relative_to(ROOT).parts[0] in PACKAGES]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_name_is_vague() -> None:
    def words(path: Path) -> set[str]:
        return {word for part in path.relative_to(ROOT).with_suffix("").parts for word in part.split("_")}

    assert {name(path): words(path) & VAGUE for path in FILES if words(path) & VAGUE} == {}


def test_a_file_begins_with_what_it_does() -> None:
    docstrings = {name(path): ast.get_docstring(ast.parse(path.read_text())) or "" for path in FILES}
    assert [file for file, docstring in docstrings.items() if len(docstring.partition("\n")[0]) <= 10] == []


def test_every_package_is_a_package() -> None:
    assert [name(path) for path in OURS if not (path.parent / "__init__.py").exists()] == []
