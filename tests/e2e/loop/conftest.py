"""One running loop for the tests of this folder; it ends with the last of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from deploy.startup import prometheus
from state.process.network import free_ports
from tests import rules
from tests.e2e.running import SHORT, Loop
from tests.e2e.watching import Watching

# Labels that arrive later, and attributes: shoppers' favorites wait for a cart, and nothing else is changed by it.
JOINED: Mapping[str, object] = {
    "labels.impressions": "favorite",
    "labels.outcomes": "cart",
    "labels.wait_s": 3,
    "attributes.user_topic": "users",
    "attributes.user_fields": "age_band,level=memberLevel",
    "attributes.item_topic": "items",
    "attributes.item_fields": "brand,price:10|50",
    "attributes.slices": "age_band",
}

LAST = (
    # Its mask would make the exact rollback of the runbook search a part of the log that another test deletes.
    "test_an_operator_finds_a_flood_on_the_page_rolls_back_without_it_and_follows_by_keyboard_alone",
    # Another start of the loop takes a minute of processor time.
    "test_ctrl_c_leaves_no_process_and_every_position_accounted_for",
)
"""What runs last in this folder, in this order."""

# The parts that are looked at here.
LOOKED_AT: Mapping[str, object] = {
    "validation.window_s": 10,
    "validation.min_rows": 100,
    "segments.expressions": "collectors=view.count_7d >= 3 and purchase.count_7d == 0 and interest['stamps'] > 0.01,"
    "asked=churn >= 0 and interest['stamps'] > 0.01",
    # What tests do to this loop would be held, and rightly: the guard only looks on.
    "guard.window_s": 600,
    # Whether a user clicks in the next 4.3 s is known while tests run.
    "churn.days": 0.00005,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs `LAST` after the other tests of this folder."""
    places = [place for place, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    ours = sorted((items[place] for place in places), key=lambda item: item.name in LAST and 1 + LAST.index(item.name))
    for place, item in zip(places, ours, strict=True):
        items[place] = item


@pytest.fixture
def loop(one_loop: Loop) -> Loop:
    """The loop, running; it is started again where a test failed and left it stopped."""
    if not one_loop.running:
        one_loop.start()
    return one_loop


@pytest.fixture(scope="session")
def one_loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """A running loop; a test leaves it running and following."""
    watched = rules.found("prometheus") is not None
    ports = free_ports(("console", "trial"))
    placed = {"console.port": ports["console"], "rollout.address": f"http://127.0.0.1:{ports['trial']}"}
    # The first questions of a host that has just begun take longer than others, beside all else that runs here.
    own = {**SHORT, **JOINED, **LOOKED_AT, **placed, "serving.timeout_s": 100}
    made = Loop(tmp_path_factory.mktemp("e2e"), own, ("--prometheus",) if watched else ())
    made.start()
    yield made
    end(made)


@pytest.fixture
def watching(loop: Loop) -> Watching:
    """The Prometheus that `up` started with the loop, where one is installed."""
    return Watching(prometheus.address(loop.settings) if rules.found("prometheus") else None)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Function, nextitem: pytest.Item | None) -> None:
    """Ends the loop with the folder's last test: left running it would cost the others most of a core."""
    # Without one where the loop did not come up.
    if "loop" in item.funcargs and (nextitem is None or nextitem.path.parent != item.path.parent):
        loop = item.funcargs["loop"]
        assert isinstance(loop, Loop)
        end(loop)


def end(loop: Loop) -> None:
    if loop.running:
        left = loop.processes()
        loop.stop(signal.SIGTERM)
        for process in psutil.wait_procs(left, timeout=10)[1]:
            process.kill()
