"""Who is in a segment: clicks, time, versions, masks and erasures decide, and topic, store and metrics agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from state import segments
from state.config.sections import Kafka
from state.errors import LogError
from state.features.erased import Erased, MaskedUsers
from state.features.mask import Mask
from state.layout import LOOKALIKES
from state.log import Log
from state.registry.hosts import erasure_reports
from state.segments import Membership, key_of, membership_of
from tests.deploy.segments.conftest import CLICKS, KeptHost, of
from tests.deploy.serving.stocked import SOURCE, digest_of, manifest, tensors

Keeping = Callable[..., KeptHost]
HOUR_MS = 3_600_000


def settled(host: KeptHost) -> None:
    """Lets a whole hurried pass and all that is due be done."""
    host.until(lambda: host.keeper._begun and not host.keeper._sweep.hurried and not host.keeper._due)


def test_a_user_comes_in_by_clicks_and_leaves_when_they_are_old(keeping: Keeping) -> None:
    host = keeping(["busy=view.count_1h >= 3"])
    settled(host)
    assert host.members() == {"busy": set()}
    host.click(("ann", "hats"))
    host.until(lambda: "ann" in host.members()["busy"])
    # Topic and store say the same: when, and by which version.
    assert host.membership("busy", "ann") == Membership(host.now_ms, 1)
    assert membership_of(host.last("busy", "ann")) == host.membership("busy", "ann")
    assert host.metrics.members.labels("busy")._value.get() == 1
    assert host.last("busy", "bob") is None
    # Nobody clicks any more: the walk over all users finds that the window is empty.
    host.now_ms += 2 * HOUR_MS
    host.until(lambda: host.members()["busy"] == set())
    assert host.topic()[key_of(("busy", of("ann")))][-1] is None


def test_unknown_users_are_in_no_segment(keeping: Keeping) -> None:
    """Whatever holds of zeros: a segment of those who did nothing is of users who are known."""
    host = keeping(["idle=view.count_1h == 0", "all=1 > 0"])
    settled(host)
    assert host.members() == {"idle": set(), "all": {"ann", "bob"}}
    host.click(("cem", "tea"))
    host.until(lambda: "cem" in host.members()["all"])
    host.now_ms += 2 * HOUR_MS
    host.until(lambda: host.members()["idle"] == {"ann", "bob", "cem"})


def test_a_start_reads_the_topic_and_judges_everybody_by_the_expressions_of_now(keeping: Keeping) -> None:
    host = keeping(["some=view.count_1h >= 2", "gone=1 > 0"])
    settled(host)
    assert host.members() == {"some": {"ann"}, "gone": {"ann", "bob"}}
    before = host.membership("some", "ann")
    host.keeper.close()
    # 1. The store is lost: the topic has it.
    for path in (host.settings.serving_dir / "segments").iterdir():
        path.unlink()
    host.now_ms += 1000
    host.start()
    settled(host)
    assert host.membership("some", "ann") == before, "since when is not since the restart"
    assert [len(values) for values in host.topic().values()] == [1, 1, 1], "nothing is written again"
    host.keeper.close()
    # 2. Another expression, and a segment less.
    own = replace(host.settings.segments, expressions=("some=view.count_1h == 1",))
    host.settings = replace(host.settings, segments=own)
    host.start()
    settled(host)
    assert host.members() == {"some": {"bob"}}
    assert host.keeper._store.sizes() == {"some": 1}
    assert host.last("gone", "ann") is None and host.last("gone", "bob") is None and host.last("some", "ann") is None


def test_members_are_those_of_the_version_that_answers(keeping: Keeping) -> None:
    host = keeping(["walkers=interest['shoes'] > 0"])
    settled(host)
    # `ann` clicked shoes; to `bob` they are shown because they are popular.
    assert host.members() == {"walkers": {"ann", "bob"}}
    stores = host.stores
    newer = tensors(stores.lowered, 2, {"user": ["ann"], "category": ["hats"]}, ["hats"])
    stores.rows.apply(manifest(2, digest_of(stores.lowered), parent=1), newer, host.now_ms, follow=True)
    host.click(("bob", "books"))
    host.until(lambda: host.members()["walkers"] == {"ann"})
    host.now_ms += 1000
    host.control(2, version=1)
    host.until(lambda: host.members()["walkers"] == {"ann", "bob"}, 5)
    assert host.membership("walkers", "bob") == Membership(host.now_ms, 1)
    assert membership_of(host.last("walkers", "bob")) == Membership(host.now_ms, 1)


def test_masked_clicks_count_no_more_at_once(keeping: Keeping) -> None:
    host = keeping(["some=view.count_1h >= 2"])
    settled(host)
    assert host.members() == {"some": {"ann"}}
    host.control(2, Mask(2, times=((host.now_ms - 10_000, host.now_ms),)))
    host.until(lambda: host.members()["some"] == set(), 5)
    host.control(3)
    host.until(lambda: host.members()["some"] == {"ann"}, 5)


def test_an_erased_user_leaves_at_once_with_a_tombstone_and_nothing_of_it_stays_on_disk(keeping: Keeping) -> None:
    host = keeping(["all=1 > 0"])
    settled(host)
    folder, form = host.settings.serving_dir / "segments", of("ann").to_bytes(8, "big")
    assert form in (folder / "data.mdb").read_bytes()
    until = [(one.topic, one.partition, 1 << 40) for one in (SOURCE, CLICKS)]
    gone = Erased.NOBODY.and_also(MaskedUsers.of([of("ann")]), until, 2, 1)
    host.settings.registry_dir.mkdir(exist_ok=True)
    host.control(2, Mask(2, erased=gone))
    host.until(lambda: erasure_reports(host.settings.registry_dir), 2)
    assert host.members() == {"all": {"bob"}}
    assert host.topic()[key_of(("all", of("ann")))][-1] is None
    assert form not in (folder / "data.mdb").read_bytes()
    (told,) = erasure_reports(host.settings.registry_dir)
    assert (told.through, told.pages, told.path) == (1, 1, str(folder))
    # Clicks of before the erasure bring nobody back.
    host.click(("ann", "hats"), ("bob", "hats"))
    settled(host)
    assert host.members() == {"all": {"bob"}}


def test_a_topic_that_is_away_costs_time_and_no_change(keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    host = keeping(["some=view.count_1h >= 2"])
    settled(host)
    host.keeper.disconnect()
    real = host.keeper._members._kafka
    host.keeper._members._kafka = Log(Kafka(bootstrap_servers="127.0.0.1:1", request_timeout_s=1.0))
    host.click(("bob", "tea"))
    with pytest.raises(LogError):
        host.until(lambda: False, 20)
    assert host.members()["some"] == {"ann"}
    host.keeper._members._kafka = real
    host.keeper.disconnect()
    host.until(lambda: host.members()["some"] == {"ann", "bob"})
    assert json.loads(host.last("some", "bob") or b"{}")["in"] is True


def test_lookalikes_are_listed_by_a_child_and_gone_at_once_where_control_changes(keeping: Keeping) -> None:
    host = keeping(["some=view.count_1d >= 2"], lookalikes=5)
    folder = host.settings.serving_dir / LOOKALIKES
    host.until(lambda: folder.exists())
    listed = segments.read_lookalikes(folder, "some")
    assert listed is not None and (listed.version, listed.members, listed.users) == (1, 1, 2)
    assert [one.pseudonym for one in listed.lookalikes] == [f"{of('bob'):016x}"] and listed.precision == ()
    # The next ones are due, and a child is about to list whom nobody may know any more.
    host.now_ms += 3_600_000
    host.until(lambda: host.keeper._lists._child is not None)
    until = [(one.topic, one.partition, 1 << 40) for one in (SOURCE, CLICKS)]
    gone = Erased.NOBODY.and_also(MaskedUsers.of([of("bob")]), until, 2, 1)
    host.settings.registry_dir.mkdir(exist_ok=True)
    host.control(2, Mask(2, erased=gone))
    host.keeper.step()
    beside = [path.name for path in folder.parent.iterdir() if path.name.startswith(LOOKALIKES)]
    assert not folder.exists() and (beside == [] or host.keeper._lists._child is not None)
    host.until(lambda: folder.exists())
    listed = segments.read_lookalikes(folder, "some")
    assert listed is not None and (listed.members, listed.users, listed.lookalikes) == (1, 1, ())
