"""Kernels are compiled before a process reports ready, once for all processes, for the types that they are called with."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from state.compiled import FIRST_CALLS
from state.compiled.preparing import Kernels
from state.features.many import vectorise_many
from state.features.mask import Mask
from state.features.masked_users import MaskedUsers
from state.features.spec import EVENT, FeatureSpec, vectorise
from state.history.appends import Appends
from state.history.store import HistoryStore
from streaming.profile import Profiler

ROOT = Path(__file__).parents[3]
NAMES = "springtide_kernels_total", "springtide_kernels_ready"
SLOW = """
import logging
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from state.compiled import compiled, layout
from state.compiled.preparing import Kernels


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
print(sum(one.stats.cache_misses.total() for one in (part, whole)))
"""


def test_processes_that_start_together_compile_a_kernel_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", "import slow"],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    compiled = []
    for process in started:
        out, err = process.communicate()
        assert process.returncode == 0, err
        compiled.append(int(out))
    # `whole`, and `part` for both of its types; two processes loaded them.
    assert sorted(compiled) == [0, 0, 3]


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
