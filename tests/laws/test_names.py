"""A file's name says what it is about, and its docstring what it does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("state", "streaming", "trainer", "deploy")
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc", "shared", "core", "tools"}
FILES = sorted(path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py"))
OURS = [path for path in FILES if path.relative_to(ROOT).parts[0] in PACKAGES]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_name_is_vague(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    words = {word for part in parts for word in part.split("_")}
    assert not words & VAGUE


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_begins_with_what_it_does(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert len(docstring.splitlines()[0]) > 10


@pytest.mark.parametrize("path", OURS, ids=name)
def test_every_package_is_a_package(path: Path) -> None:
    assert (path.parent / "__init__.py").exists()


@pytest.mark.parametrize("path", OURS, ids=name)
def test_a_file_stays_readable_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 550
