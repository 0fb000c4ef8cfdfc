"""An erased user is a cold start on a serving host: at once by the mask, then in its stores, over restarts and versions of before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from deploy.serving.applier import HostErasures
from state.features.erased import Erased, MaskedUsers
from state.features.spec import FeatureSpec
from state.layout import ROWS
from state.ranking.crosses import Crosses
from state.registry.control import erase, follow, pin
from state.registry.hosts import erasure_reports
from state.registry.manifest import Draft, LogRange
from state.registry.registry import SERVING, Registry
from tests.deploy.serving.stocked import NOW_MS
from tests.deploy.serving.test_clicks import SOURCE as CLICKS
from tests.deploy.serving.test_clicks import Following, append, record, written
from tests.deploy.serving.test_following import BY, Clock, World
from tests.deploy.serving.test_following import tensors as rows_of
from tests.kills import killed_at

CROSSES = Crosses(FeatureSpec())


def erases(world: World, user: int) -> None:
    world.registry.change(lambda control: erase(control, MaskedUsers.of([user]), [], **BY))


def entries(world: World, user: int) -> int:
    """How many entries of the user's row are stored, over all versions and lanes."""
    with world.rows._env.begin(db=world.rows._rows) as transaction:
        return sum(bytes(key)[1:9] == user.to_bytes(8, "big") for key, _ in transaction.cursor())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "serving", Clock(), Registry(tmp_path / "registry"))
    yield made
    made.rows.close()


def publish(world: World, changes: dict[int, float], erased: int) -> int:
    control = world.registry.control()
    assert control is not None
    parent = world.registry.newest(control.epoch)
    draft = Draft(
        "delta", control.epoch, parent, LogRange(), (), 1, 1, 5, 4, FeatureSpec().digest, world.program, "salt",
        erased=erased,
    )  # fmt: skip
    return world.registry.publish(draft, {SERVING: save(rows_of(changes))}).version


def test_no_entry_of_the_user_is_left_in_the_rows_whatever_version_wrote_it(
    world: World,
) -> None:
    first = world.publish({7: 1.0, 8: 1.0}).version
    world.publish({7: 2.0})
    world.settle()
    world.registry.change(lambda control: pin(control, first, **BY))
    world.settle()
    assert entries(world, 7) == 2
    erases(world, 7)
    with killed_at("apply.steered"):
        world.settle()
    world.restart()
    world.settle()
    assert (entries(world, 7), world.follower.erased) == (0, 1), "also the version that answers stay at"
    assert world.served() == (first, {8: 1.0})
    # A version that the trainer was writing then, and one of after, in which the user came back.
    publish(world, {7: 3.0, 8: 3.0}, erased=0)
    newest = publish(world, {7: 4.0}, erased=1)
    world.registry.change(lambda control: pin(control, newest, **BY))
    world.settle()
    assert (entries(world, 7), world.served()) == (1, (newest, {7: 4.0, 8: 3.0}))
    world.restart()
    world.settle()
    assert world.served() == (newest, {7: 4.0, 8: 3.0}), "a restart takes nothing away that came after"


def test_the_rows_file_has_no_key_of_the_pseudonym_once_what_told_of_it_has_left(world: World) -> None:
    user = 0x1122334455667788
    first = world.publish({user: 1.0, 8: 1.0}).version
    world.settle()
    world.registry.change(lambda control: pin(control, first, **BY))
    erases(world, user)
    world.settle()

    def has() -> bool:
        # As in keys; the mask has it too, in the other order, for it tells old records from new ones.
        return user.to_bytes(8, "big") in (world.path / ROWS / "data.mdb").read_bytes()

    assert has(), "free pages have what was deleted"
    told = rows_of({8: 2.0}, (user,))
    draft = Draft("delta", 1, first, LogRange(), (), 1, 1, 5, 4, FeatureSpec().digest, world.program, "salt", erased=1)
    world.registry.publish(draft, {SERVING: save(told)})
    world.registry.change(lambda control: follow(control, **BY))
    for _ in range(5):
        newest = publish(world, {8: 3.0}, erased=1)
        world.settle()
        world.clock.now_ms += 200_000
        world.follower.sweep()
        world.follower.sweep()
    assert not has()
    with world.rows._env.begin(db=world.rows._changes) as transaction:
        assert not any(user.to_bytes(8, "little") in bytes(value) for _, value in transaction.cursor())
    with world.rows.reader() as reader:
        served = reader.served()
        assert served is not None and served.version == newest
        assert reader.get("user", [8], served)[0].tolist() == [[3.0, 3.0]]
    publish(world, {8: 4.0}, erased=1)
    world.settle()
    with world.rows.reader() as reader:
        served = reader.served()
        assert served is not None and reader.get("user", [8], served)[0].tolist() == [[4.0, 4.0]]


def test_crosses_of_the_user_go_too(world: World) -> None:
    items = np.array([100, 101], np.uint64)
    theirs = {user: CROSSES.of_user(user, items, items[:0], items[:0]) for user in (7, 8)}
    ids = np.concatenate(list(theirs.values()))
    made = rows_of({7: 1.0, 8: 1.0}) | {
        "item.ids": items, "item.rows": np.ones((2, 2), np.float32), "item.removed": items[:0],
        "cross.ids": ids, "cross.rows": np.ones((len(ids), 2), np.float32), "cross.removed": items[:0],
    }  # fmt: skip
    draft = Draft("base", 1, None, LogRange(), (), 1, 1, 5, 4, FeatureSpec().digest, world.program, "salt")
    world.registry.publish(draft, {SERVING: save(made)})
    world.settle()
    erases(world, 7)
    world.settle()
    with world.rows.reader() as reader:
        served = reader.served()
        assert served is not None
        assert [reader.get("cross", theirs[user].tolist(), served)[1].all() for user in (7, 8)] == [False, True]
        assert not reader.get("cross", theirs[7].tolist(), served)[1].any()


@pytest.mark.parametrize("dies", [False, True], ids=["in one go", "killed having forgotten"])
def test_histories_forget_and_never_take_the_clicks_again(tmp_path: Path, dies: bool) -> None:
    host = Following(tmp_path / "histories", written(record(0, 30)))
    host.drain()
    erased = Erased.NOBODY.and_also(MaskedUsers.of([1]), [(CLICKS.topic, CLICKS.partition, 60)], 2, 3)
    before = host.store.read(2).tobytes()

    def told() -> HostErasures:
        return HostErasures(tmp_path, tmp_path / "registry", host.store, lambda: 1, lambda: NOW_MS)

    (tmp_path / "registry").mkdir()
    if dies:
        with killed_at("follow.forgotten"):
            told().apply(erased)
        assert erasure_reports(tmp_path / "registry") == []
    for _ in range(2):
        host.follower._erased = erased
        told().apply(erased)
        assert (len(host.store.read(1)), host.store.read(2).tobytes()) == (0, before)
    (said,) = erasure_reports(tmp_path / "registry")
    assert (said.through, said.pages, said.path) == (1, 1, str(tmp_path))
    # What was written before the erasure and comes after it, and what the user clicks then.
    append(host.log, record(30, 60), record(60, 72))
    host.drain()
    assert host.store.read(1)["offset"].tolist() == [60, 63, 66, 69]
    assert len(host.store.read(2)) == 24
