"""Kernels are compiled once, and again when what they depend on changes."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from state.compiled import FIRST_CALLS, declared
from state.features.erased import MaskedUsers
from state.features.kernel import many_rows
from state.features.mask import Mask
from state.features.spec import EVENT, FeatureSpec, vectorise_many
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.kernels import Kernels, modules
from streaming.profile import Profiler
from tests.vectors import vectorise

ROOT = Path(__file__).parents[3]
NAMES = "springtide_kernels_total", "springtide_kernels_ready"
SLOW = """
import logging
import sys
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from state.compiled import compiled, layout
from state.kernels import Kernels


@layout("i8[::1], f8")
class Pair(NamedTuple):
    values: object
    factor: float


@compiled
def part(values, factor):
    total = 0.0
    for value in values:
        total += value * factor
    return total


@compiled("const(i8[::1]), Pair")
def whole(values, pair):
    return part(pair.values, pair.factor) + part(values, 1.0)


Kernels(CollectorRegistry(), logging.getLogger()).prepare()
compiled = sum(one.stats.cache_misses.total() for one in (part, whole))
# Numba's compiler takes longer to initialize than all kernels take to load.
assert compiled or "numba.cpython.mathimpl" not in sys.modules
print(compiled)
"""


def kernels_compiled(folder: Path, processes: int, **environment: str) -> list[int]:
    """How many kernels each of some processes compiled, which started together."""
    (folder / "slow.py").write_text(SLOW)
    path = f"{folder}{os.pathsep}{ROOT}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", "import slow"],
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    compiled = []
    for process in started:
        out, err = process.communicate()
        assert process.returncode == 0, err
        compiled.append(int(out))
    return sorted(compiled)


def test_processes_that_start_together_compile_a_kernel_once(tmp_path: Path) -> None:
    # `whole`, and `part` for both of its types; the other process loaded them.
    assert kernels_compiled(tmp_path, 2) == [0, 3]


def test_a_process_with_a_cache_folder_of_its_own_finds_what_the_installation_compiled(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert kernels_compiled(tmp_path, 1) == [3]
    assert kernels_compiled(tmp_path, 1, NUMBA_CACHE_DIR=str(cache)) == [0]
    assert not [*cache.rglob("*.nbc")]
    # Machine code for another processor is not used.
    assert kernels_compiled(tmp_path, 1, NUMBA_CACHE_DIR=str(cache), NUMBA_CPU_NAME="generic") == [3]


def test_the_largest_kernels_are_prepared_first() -> None:
    first = Kernels(CollectorRegistry(), logging.getLogger()).wanted()[:6]
    # Its own code is short, and it is made of most of the window kernel's parts.
    assert many_rows in [kernel.dispatcher for kernel in first]


def test_an_installation_compiles_the_kernels_of_every_module() -> None:
    names = modules()
    for name in names:
        importlib.import_module(name)
    loaded = {kernel.module for kernel in declared()}
    assert loaded & {*names} == {*names}
    assert {module for module in loaded if not module.startswith("tests.")} <= {*names}


def test_no_kernel_is_ready_before_all_were_prepared() -> None:
    registry = CollectorRegistry()
    kernels = Kernels(registry, logging.getLogger())
    total, ready = (registry.get_sample_value(name) for name in NAMES)
    assert ready == 0 and total and total > 1 and not kernels.done
    stopped = iter([False, False, True])
    kernels.prepare(lambda: next(stopped))
    assert registry.get_sample_value(NAMES[1]) == 2 and not kernels.done
    assert kernels.progress == f"compiling kernels, 2 of {total:g}"
    kernels.prepare()
    assert [registry.get_sample_value(name) for name in NAMES] == [total, total] and kernels.done


@pytest.fixture
def prepared() -> None:
    Kernels(CollectorRegistry(), logging.getLogger()).prepare()
    FIRST_CALLS.clear()


@pytest.mark.usefixtures("prepared")
def test_serving_and_stream_find_their_kernels_compiled(tmp_path: Path) -> None:
    spec = FeatureSpec()
    # 1. As serving reads and computes, with a mask and without.
    store = HistoryStore(tmp_path, history=spec.history)
    store.commit(Appends.of(np.full(40, 7, np.uint64), np.zeros(40, EVENT)))
    masked = Mask(generation=2, offsets=((1, 2, 3, 4),), times=((5, 6),), users=MaskedUsers.of([9]))
    for user in (7, 8):
        for mask in (Mask.NONE, masked):
            vectorise(store.read(user), 1_700_000_000_000, None, mask, spec, user)
            vectorise_many([store.read(user)], [1_700_000_000_000], mask, spec, [user])
    # 2. As the stream does.
    Profiler(store, spec, cache_users=10)
    Profiler(store, spec, cache_users=10, mask=masked)
    store.close()
    assert not FIRST_CALLS


PARTS = """
from typing import NamedTuple

from state.compiled import compiled

FACTOR = {factor}


class {name}(NamedTuple):
    value: int


@compiled
def part(x):
    return {name}(x * {by})
"""
KERNEL = """
from cache_parts import FACTOR, part

from state.compiled import compiled


@compiled
def whole(x):
    return part(x).value + FACTOR


print(whole(10))
"""


def computed(folder: Path, factor: int = 1, by: int = 2, name: str = "Found") -> int:
    """What a new process computes."""
    (folder / "cache_parts.py").write_text(PARTS.format(factor=factor, by=by, name=name))
    done = subprocess.run(
        [sys.executable, str(folder / "kernel.py")],
        # Two versions within a second and of one size have one .pyc.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_kernel_follows_what_it_takes_from_another_file(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL)
    assert computed(tmp_path) == 21
    assert computed(tmp_path, by=3) == 31
    assert computed(tmp_path, by=3, factor=5) == 35
    # The index of an older cache names a class that is gone.
    assert computed(tmp_path, by=3, factor=5, name="Totals") == 35
