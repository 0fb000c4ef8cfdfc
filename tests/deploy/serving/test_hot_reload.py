"""Versions swapped one after another while a worker is asked: no error, no answer of two versions, and nothing grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.process.network import free_port
from state.registry.registry import Registry
from tests.deploy.serving.fire import USERS, Asked, Fire, HostWriter, Line, Trainer
from tests.deploy.serving.stocked import CATEGORIES, DIM, SALT_KEY, Lowered, Stores, small
from tests.deploy.serving.test_rest import answers, until, worker

SWAPS, NEW_PROGRAM_AT = 40, 16
ANSWERS_EACH, RATE = 20, 500.0
WARM = 12
"""Swaps until what a process needs once is there."""
MOST_GROWTH_BYTES = 16 << 20


@pytest.fixture(scope="module")
def lines(lowered: Lowered) -> list[Line]:
    """The model of the other tests, and another ranker of other features."""
    from deploy.examples.two_tower.ranker import TwoTower
    from trainer.versions.lowering import build

    settings = small(Settings())
    spec = replace(FeatureSpec(), recent_categories=FeatureSpec().recent_categories - 2, sequence=4)
    other = TwoTower(replace(settings.model, hidden=(12, DIM)), spec)
    rng = np.random.default_rng(6)
    other.set_weights({name: rng.normal(0, 0.1, one.shape).astype(np.float32) for name, one in other.weights().items()})
    return [Line(lowered.model, lowered.content, FeatureSpec()), Line(other, build(other), spec)]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = small(Settings())
    made = replace(made, paths=replace(made.paths, state=str(tmp_path)))
    made.salt_path.write_text(SALT_KEY.decode())
    made.salt_path.chmod(0o600)
    return made


@pytest.fixture
def trainer(settings: Settings, lines: list[Line]) -> Trainer:
    return Trainer(Registry(settings.registry_dir), lines, DIM)


@pytest.fixture
def host(settings: Settings, trainer: Trainer) -> Iterator[HostWriter]:
    made = HostWriter(settings)
    for place, category in enumerate(CATEGORIES):
        made.click("bob", category, 1000 * (50 - place))
    yield made
    made.close()


def has_answered(asked: Asked, times: int) -> bool:
    return asked.count >= times


def test_forty_versions_are_swapped_without_an_error_or_a_mixed_answer(
    settings: Settings, trainer: Trainer, host: HostWriter, lowered: Lowered
) -> None:
    """Half of them of another ranker with other features; each answer is computed again from what it says of itself."""
    assert host.settle() == 0
    trainer.publish()
    host.settle()
    port, grown = free_port(), []
    with worker(Stores(settings, host.rows, host.histories, lowered), port) as process:
        until(lambda: answers(port, "/readyz"))
        of_process = psutil.Process(process.pid)
        with Fire(port, RATE) as asked:
            for swap in range(SWAPS):
                version = trainer.publish(int(swap >= NEW_PROGRAM_AT))
                assert host.settle() == version
                if swap % 2 == 0:
                    host.click("ann", CATEGORIES[swap // 2 % len(CATEGORIES)], 60_000 - swap)
                wanted = asked.count + ANSWERS_EACH
                until(partial(has_answered, asked, wanted), 90.0)
                if swap in (NEW_PROGRAM_AT + WARM, SWAPS - 1):
                    grown.append(of_process.memory_info().rss)
        assert answers(port, "/readyz")
    assert asked.failed == {}
    found = asked.answers()
    assert {one["user_id"] for one in found} == set(USERS)
    seen = {one["version"]["number"] for one in found}
    assert len(seen) > SWAPS * 0.9 and {trainer.made[one][0] for one in seen} == {0, 1}
    assert len({one["features"]["view.count_1h"] for one in found if one["user_id"] == "ann"}) > SWAPS / 10
    assert trainer.differences(found, host.events) == []
    assert grown[1] - grown[0] < MOST_GROWTH_BYTES
