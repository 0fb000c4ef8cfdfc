"""A file's name says what it is about, and its docstring what it does; a class has one name; nothing is longer than one reads at once."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("state", "streaming", "trainer", "deploy", "springtide_client")
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc", "shared", "core", "tools"}
FILES = sorted(path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py"))
OURS = [path for path in FILES if path.relative_to(ROOT).parts[0] in PACKAGES]

LONGEST_FILE, MEDIAN_FILE, LONGEST_FUNCTION = 300, 160, 60
TABLES_OF_DATA = {"state/metrics.py", "state/errors.py", "state/config/sections.py"}


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


def lengths() -> dict[str, int]:
    """The lines of each file; those of packages, which are a docstring, left out."""
    return {name(path): len(path.read_text().splitlines()) for path in OURS if path.stem != "__init__"}


def test_a_file_stays_readable_in_one_sitting() -> None:
    long = {file: lines for file, lines in lengths().items() if lines > LONGEST_FILE}
    assert {file: lines for file, lines in long.items() if file not in TABLES_OF_DATA} == {}


def test_most_files_are_short() -> None:
    assert statistics.median(lengths().values()) <= MEDIAN_FILE


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function of a file, as `file:name`, and its lines from `def` on."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name(path)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_a_function_fits_on_a_page() -> None:
    assert {one: lines for path in OURS for one, lines in functions(path) if lines > LONGEST_FUNCTION} == {}


def test_a_class_has_its_name_alone() -> None:
    """An application sees the client's classes, and none of the server's."""
    places: dict[tuple[bool, str], set[str]] = {}
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault((name(path).startswith("springtide_client/"), node.name), set()).add(name(path))
    twice = {one: sorted(files) for (_, one), files in places.items() if len(files) > 1}
    assert twice == {}
