"""Imports follow the data: streaming -> state <- trainer, deploy -> state, deploy -> springtide_client, evaluation -> all, and nothing else."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.laws.sources import PACKAGES, ROOT, files, imports, name, nodes

ALLOWED = {
    "state": {"state"},
    "streaming": {"streaming", "state"},
    "trainer": {"trainer", "state"},
    "deploy": {"deploy", "state", "springtide_client"},
    "evaluation": {"evaluation", "deploy", "springtide_client", "trainer", "streaming", "state"},
    "springtide_client": {"springtide_client"},
}
EXAMPLES = "deploy/examples/"
KAFKA_ALONE = ("state/log",)
PICKLES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
HEAVY = {"tensorflow", "keras", "apache_beam", "tensorflow_transform", "torch", "jax"}


IMPORTERS = ("import_module", "__import__")


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Absolute module names imported anywhere in a file, inside functions too."""
    found = set[str]()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in IMPORTERS:
            found |= {str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant)}
    return frozenset(found)


@functools.cache
def tops_of_files() -> dict[str, set[str]]:
    """File -> the first parts of the modules that it imports."""
    return {name(path): {module.partition(".")[0] for module in imported(path)} for path in files()}


@functools.cache
def files_of_modules() -> dict[str, Path]:
    """Module -> its file; a package counts by what its `__init__` imports."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files()}


def test_a_package_imports_only_what_it_may() -> None:
    # What stands in for a user's own code builds on what the trainer offers.
    allowed = {
        file: {*ALLOWED[file.partition("/")[0]], *(file.startswith(EXAMPLES) * ("trainer",))}
        for file in tops_of_files()
    }
    found = {file: tops & {*PACKAGES, "tests"} - allowed[file] for file, tops in tops_of_files().items()}
    assert {file: tops for file, tops in found.items() if tops} == {}


def test_only_the_log_knows_the_kafka_client() -> None:
    users = [file for file, tops in tops_of_files().items() if "kafka" in tops]
    assert [file for file in users if not file.startswith(KAFKA_ALONE)] == []


def test_nothing_is_pickled() -> None:
    assert {file: tops & PICKLES for file, tops in tops_of_files().items() if tops & PICKLES} == {}


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Modules of which each imports the next one and the last one the first; none where there is no circle."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            if found := search(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in sorted(edges))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def edges(part: Callable[[str], str]) -> dict[str, set[str]]:
    """What each part imports of the others, in functions and for type checkers too."""
    known = files_of_modules()
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        # A name that is taken from a package may be a module of it, which is then what is imported.
        wanted = modules_of(path) & known.keys()
        targets = {part(name) for name in wanted if not any(other.startswith(f"{name}.") for other in wanted)}
        # A module that runs as a program imports itself by its real name.
        found.setdefault(part(module), set()).update(targets - {part(module)})
    return found


def package(module: str) -> str:
    """The package of a module, or a module that is in none.

    >>> package("state.history.store"), package("state.errors")
    ('state.history', 'state.errors')
    """
    return ".".join(module.split(".")[:2])


@functools.cache
def modules_of(path: Path) -> set[str]:
    """What a file imports, with the names taken from it, which may be modules."""
    found = set(imported(path))
    for node in imports(path):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_modules_import_one_another_without_a_circle() -> None:
    assert circle(edges(lambda module: module)) == []


def test_packages_import_one_another_without_a_circle() -> None:
    assert circle(edges(package)) == []


def serving_modules() -> list[str]:
    folder = ROOT / "deploy" / "serving"
    paths = (path.relative_to(ROOT).with_suffix("") for path in folder.rglob("*.py") if path.stem != "__init__")
    return sorted(".".join(path.parts) for path in paths)


# Imports modules one after the other; prints after each one what is loaded.
LOOK = """
import importlib, json, sys
loaded = {}
for module in sys.argv[1:]:
    importlib.import_module(module)
    loaded[module] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(loaded))
"""


def tops_after(*modules: str) -> dict[str, set[str]]:
    """Module -> the top modules that a new process has loaded after it and those before it."""
    found = subprocess.run([sys.executable, "-c", LOOK, *modules], cwd=ROOT, capture_output=True, text=True, check=True)
    return {module: set(tops) for module, tops in json.loads(found.stdout).items()}


@functools.cache
def loaded() -> dict[str, set[str]]:
    """What a process loads that is each of the parts in turn, the stream last."""
    trainer = ["trainer.compactor", "trainer.loop", "trainer.learner", "trainer.versions.starting"]
    return tops_after(*serving_modules(), "deploy.cli", *trainer, "streaming.pipeline")


def test_the_stream_alone_loads_beam_and_no_process_loads_tensorflow_before_a_graph_is_needed() -> None:
    heavy = {module: tops & HEAVY for module, tops in loaded().items() if module != "streaming.pipeline"}
    assert {module: tops for module, tops in heavy.items() if tops} == {}
    assert "tensorflow" not in loaded()["streaming.pipeline"]


def test_the_client_loads_what_it_needs_alone_and_pin_rollback_and_up_load_no_compiler() -> None:
    """A pin is typed in a hurry: neither kernels nor graphs are needed to move a pointer."""
    control = ["deploy.operate.control", "deploy.operate.versions"]
    up = ["deploy.startup.model_checks", "deploy.startup.steps"]
    # Where a rollback reads the log, the reader loads one kernel.
    tops = tops_after("springtide_client", "deploy.cli", *control, "deploy.operate.rollback", *up)
    assert not tops["springtide_client"] & {"deploy", "state", "numpy", "numba", "lmdb", "kafka"}
    assert "lmdb" in tops[control[-1]] and not tops[up[-1]] & (HEAVY | {"numba", "llvmlite"})


def test_a_worker_loads_no_kafka() -> None:
    tops = tops_after("deploy.serving.rest")["deploy.serving.rest"]
    assert "lmdb" in tops and "kafka" not in tops


def test_a_process_reads_and_writes_micro_batches_without_pandas() -> None:
    """Parts of pyarrow import it, which takes a third of a second."""
    round_trip = """
import sys
import numpy as np
from state.microbatch.batch import DTYPES, NAMES, SCALARS, Header
from state.microbatch.codec import decode, encode
shapes = {name: (0,) if name in SCALARS else (0, 1) for name in NAMES} | {"category_windows": (0, 1, 1)}
columns = {name: np.zeros(shape, DTYPES[name]) for name, shape in shapes.items()}
header = Header(spec="", salt="", ranges=(), created_ms=0, mask_generation=0, names={}, attributes=(("a",), ("b",)))
decode(encode(header, columns))
print("pandas" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", round_trip], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_applier_starts_without_litert() -> None:
    """It writes what workers read; only with the first version that is probed does it run a program."""
    tops = tops_after("deploy.serving.applier")["deploy.serving.applier"]
    assert "lmdb" in tops and "ai_edge_litert" not in tops
