"""Names of files and errors, and what no file may name."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from state import errors
from state.errors import SpringtideError
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
    calls = [(path, node) for path in files() for node in nodes(path) if isinstance(node, ast.Call)]
    assert [name(path) for path, call in calls if getattr(call.func, "attr", "") in HANDLERS] == []


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


# Written in parts, so that this file does not name them itself.
PLACES = [r"(?<![\w.])/" + folder + r"(?:/|\b)" for folder in ("work", "root", "home")]
HOSTS = [re.escape(host) for host in ("pypi" + ".org", "files.python" + "hosted", "index" + "-url", "artifact" + "ory")]
FORBIDDEN = re.compile("|".join([*PLACES, *HOSTS]))


def kept_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def test_no_file_names_a_machine() -> None:
    texts = {path.relative_to(ROOT).as_posix(): path.read_bytes().decode("utf-8", "replace") for path in kept_files()}
    assert {file: found[0] for file, text in texts.items() if (found := FORBIDDEN.search(text))} == {}
