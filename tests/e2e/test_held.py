"""A client that is stuck floods the running loop: it is held, answers stay before it, and what status says to type heals."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from state.registry.control import Control
from state.registry.registry import Registry
from tests.e2e.running import SHORT, Loop, until
from tests.e2e.watching import Watching, beside

CHUNK = 60
EVERY_S = 0.25
"""Some 240 clicks a second of one user, beside 300 of all others."""
WATCHED: Mapping[str, object] = {
    "shoppers.rate": 300,
    "guard.window_s": 1,
    "guard.window_rows": 200,
    "guard.warm_up": 10,
}
"""Windows of a second, so that there are soon enough of them to compare with."""


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    """A loop of its own: what other tests do to theirs would be held by so watchful a guard, and rightly."""
    made = Loop(tmp_path, {**SHORT, **WATCHED})
    made.start()
    try:
        until(
            lambda: (made.metrics("trainer").value("springtide_trainer_guard_windows") or 0) >= 12,
            "the guard has too few windows to compare with",
        )
        yield made
    finally:
        made.stop()


@pytest.fixture
def watching(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watching]:
    """A Prometheus beside it."""
    with beside(loop.settings, tmp_path_factory.mktemp("prometheus")) as found:
        yield found


def version(loop: Loop) -> dict[str, Any]:
    """The version of an answer."""
    found: dict[str, Any] = until(lambda: loop.profile("anyone"), "no answer")["version"]
    return found


def test_a_flood_is_held_and_the_rollback_that_status_prints_heals(loop: Loop, watching: Watching) -> None:
    registry, begin, epoch = Registry(loop.settings.registry_dir), loop.ends(), version(loop)["epoch"]
    clicks = [("stuck-client", "stuck-item", "stuck-category", "view")] * CHUNK

    def held() -> Control | None:
        control = registry.control()
        return control if control is not None and control.held is not None else None

    def flooded() -> Control | None:
        loop.click(clicks)
        time.sleep(EVERY_S)
        return held()

    control = until(flooded, "a flood is not held", 30.0)
    assert control.held is not None
    # 1. Answers stay at a version that has learned none of it.
    until(lambda: version(loop)["number"] == control.held.version, "answers do not turn")
    sources = version(loop)["sources"]
    assert all(sources.get(source, 0) <= end for source, end in begin.items()), "its version is from before the flood"
    assert loop.metrics("trainer").value("springtide_trainer_held") == 1.0
    watching.wait_for("SpringtideTrainingHeld")
    # 2. Status says what, why and from where, and what to type.
    state = loop.springtide("status")
    found = state["held"]
    assert found["rule"] == control.held.rule
    assert not 0.7 < found["signal"] / found["usual"] < 1.4, "numbers that tell"
    assert f"partition {found['clicks'][0]['partition']} offset {found['clicks'][0]['first']}" in found["words"]
    program, command, *words = shlex.split(found["commands"][0])
    assert (program, command) == ("springtide", "rollback")
    # 3. Typed, it heals: what was suspect is left out, and answers follow by themselves.
    done = loop.springtide(command, *words)
    assert done["control"]["epoch"] == epoch + 1 and done["plan"]["masked"] > 2 * CHUNK
    until(lambda: version(loop)["epoch"] == epoch + 1, "answers do not follow into the new epoch")
    answer = loop.answer_trained_on("honest", loop.click([("honest", "book", "reading", "view")]))
    assert answer["version"]["epoch"] == epoch + 1
    assert held() is None
    watching.wait_until_over("SpringtideTrainingHeld")
