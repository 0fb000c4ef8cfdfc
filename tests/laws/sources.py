"""The source files of the project, each parsed once for all laws."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("state", "streaming", "trainer", "deploy", "evaluation", "springtide_client")


@functools.cache
def files(*folders: str) -> tuple[Path, ...]:
    """The Python files of these folders; without arguments those of the product."""
    return tuple(path for folder in folders or PACKAGES for path in sorted((ROOT / folder).rglob("*.py")))


@functools.cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file's tree, as `ast.walk` yields them."""
    return tuple(ast.walk(tree(path)))


def imports(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of a file, those in functions too."""
    return (node for node in nodes(path) if isinstance(node, ast.Import | ast.ImportFrom))


def name(path: Path) -> str:
    """A file as messages name it."""
    return path.relative_to(ROOT).as_posix()
