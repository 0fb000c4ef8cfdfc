"""Imports follow the data: streaming -> state <- trainer, deploy -> state, and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("state", "streaming", "trainer", "deploy")
ALLOWED = {
    "state": {"state"},
    "streaming": {"streaming", "state"},
    "trainer": {"trainer", "state"},
    "deploy": {"deploy", "state"},
}
KAFKA_ALONE = ("state/log",)
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Absolute module names imported anywhere in a module, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from (str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_package_imports_only_what_it_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    tops = {module.partition(".")[0] for module in imported(ast.parse(path.read_text()))}
    assert tops & set(PACKAGES) <= ALLOWED[package]
    assert "tests" not in tops


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_the_log_knows_the_kafka_client(path: Path) -> None:
    tops = {module.partition(".")[0] for module in imported(ast.parse(path.read_text()))}
    assert "kafka" not in tops or name(path).startswith(KAFKA_ALONE)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_is_pickled(path: Path) -> None:
    tops = {module.partition(".")[0] for module in imported(ast.parse(path.read_text()))}
    assert not tops & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


def serving_modules() -> list[str]:
    folder = ROOT / "deploy" / "serving"
    return sorted(f"deploy.serving.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__")


LOOK = "import sys, importlib; importlib.import_module(sys.argv[1]); print(sorted({m.partition('.')[0] for m in sys.modules}))"


@pytest.mark.parametrize("module", [*serving_modules(), "deploy.cli", "trainer.compactor"])
def test_serving_and_the_small_processes_do_not_load_tensorflow(module: str) -> None:
    found = subprocess.run([sys.executable, "-c", LOOK, module], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(found.stdout))
    assert not loaded & {"tensorflow", "keras", "apache_beam", "tensorflow_transform", "torch", "jax"}


def test_the_stream_does_not_load_tensorflow() -> None:
    found = subprocess.run(
        [sys.executable, "-c", LOOK, "streaming.pipeline"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "tensorflow" not in ast.literal_eval(found.stdout)
