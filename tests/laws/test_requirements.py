"""Requirements of production and of development: each pinned, with its reason, none missing, none unused, none in the wrong file."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.laws.sources import PACKAGES, ROOT, files, imports
from tests.laws.sources import name as name_of

MISSION = ["tensorflow", "apache-beam", "kafka-python", "tensorflow-transform", "prometheus-client"]
# Used through another library or as a program, never imported here.
UNSEEN = {
    "dm-tree",
    "mpmath",
    "scipy",
    "moto",
    "boto3",
    "flask",
    "flask-cors",
    "crc32c",
    "lz4",
    "python-snappy",
    "zstandard",
    "grpcio-tools",
    "httptools",
    "uvloop",
    "mkdocs-material",
    "mypy",
    "ruff",
}
PARTS = {"google.protobuf": "protobuf"}
APART = (ROOT / "constraints-apart.txt").read_text()
LOCKED, LOCKED_DEV = ((ROOT / name).read_text() for name in ("constraints.txt", "constraints-dev.txt"))


def listed(file: str) -> list[str]:
    return [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]


PRODUCTION, DEVELOPMENT = listed("requirements.txt"), listed("requirements-dev.txt")
LINES = [*PRODUCTION, *DEVELOPMENT]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def name(line: str) -> str:
    return canonical(re.split(r"[\[=]", line)[0])


def locked_in(text: str) -> dict[str, str]:
    """Version by name of each package in a file of constraints."""
    entry = r"^([\w.-]+(?:\[[\w,]+\])?==\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)"
    found = {name(line): line.partition("==")[2] for line, _ in re.findall(entry, text, re.M)}
    assert len(found) == len(re.findall(r"^\w", text, re.M)), "a package without digests"
    return found


@functools.cache
def owners() -> Mapping[str, list[str]]:
    """The distributions of each module that is installed."""
    return importlib.metadata.packages_distributions()


@functools.cache
def modules_of(path: Path) -> set[str]:
    """The top modules of others that a file imports."""
    named = set[str]()
    for node in imports(path):
        named |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module or ""}
    # Many distributions have something in `google`.
    named = {"google.protobuf" if one.startswith("google.protobuf") else one.partition(".")[0] for one in named}
    return named - {*sys.stdlib_module_names, *PACKAGES, "tests", "docs"}


@functools.cache
def imported(*folders: str) -> dict[str, set[str]]:
    """The distributions that our files import, and the files that import each."""
    found: dict[str, set[str]] = {}
    for path in files(*folders):
        for top in modules_of(path):
            # A module that is not installed is taken for a distribution of the same name.
            for owner in [PARTS[top]] if top in PARTS else owners().get(top, [top]):
                found.setdefault(canonical(owner), set()).add(name_of(path))
    return found


def test_the_missions_five_come_first() -> None:
    assert [name(line) for line in PRODUCTION[:5]] == MISSION


def test_a_requirement_is_pinned_and_has_its_reason() -> None:
    pinned = re.compile(r"[\w.-]+(\[[\w,]+\])?==[\w.!]+(?:$| # .{10,})")
    assert [line for line in LINES if not pinned.match(line) or ("#" not in line and name(line) not in MISSION)] == []


def test_every_library_that_is_imported_is_pinned() -> None:
    pinned = {name(line) for line in (*LINES, *re.findall(r"^\w\S+", APART, re.M))}
    # A peer of a bench runs in an interpreter of its own, where it is installed.
    files = {
        owner: sorted(file for file in importing if not file.startswith("tests/bench/peers/"))
        for owner, importing in imported(*PACKAGES, "tests").items()
    }
    missing = {owner: importing[0] for owner, importing in files.items() if importing and owner not in pinned}
    assert missing == {}


def test_production_imports_only_what_production_installs() -> None:
    pinned = {name(line) for line in (*PRODUCTION, *re.findall(r"^\w\S+", APART, re.M))}
    files = imported(*PACKAGES)
    assert {owner: sorted(importing) for owner, importing in files.items() if owner not in pinned} == {}


def test_production_installs_nothing_that_tests_alone_import() -> None:
    assert {name(line) for line in PRODUCTION} - set(imported(*PACKAGES)) - UNSEEN == set()


def test_every_pinned_library_is_used() -> None:
    assert {name(line) for line in LINES} - set(imported(*PACKAGES, "tests")) - UNSEEN == set()


def test_what_is_installed_apart_is_used_and_what_it_needs_is_there() -> None:
    for entry in re.findall(r"^\w\S+", APART, re.M):
        assert name(entry) in imported(*PACKAGES)
        wanted = [re.split(r"[^\w.-]", one)[0] for one in importlib.metadata.requires(name(entry)) or []]
        assert wanted and all(importlib.metadata.version(one) for one in wanted)


def test_every_package_that_is_installed_is_locked_with_the_digests_of_its_files() -> None:
    production, development, apart = (locked_in(text) for text in (LOCKED, LOCKED_DEV, APART))
    assert production.keys().isdisjoint(development)
    locked = production | development | apart
    for line in LINES:
        assert locked.get(name(line)) == line.partition("==")[2].split()[0], f"make constraints.txt anew for {line}"
    ours = {"springtide", "pip", "setuptools", "wheel"}
    installed = {canonical(one.metadata["Name"]): one.version for one in importlib.metadata.distributions()}
    assert {one: version for one, version in installed.items() if one not in ours and locked.get(one) != version} == {}
