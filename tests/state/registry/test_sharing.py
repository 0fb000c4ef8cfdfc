"""A shared registry: what a trainer publishes is on each host whole or not at all, whatever broke in between."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as replace_fields

from state.disk.files import HOST
from state.errors import ControlConflict, CorruptVersion, LockHeld, SettingsError, UnusablePlace, UnusableRegistry
from state.features.erased import MaskedUsers
from state.features.mask import Mask
from state.file_store import FileStore, open_store
from state.process.environment import wall_ms
from state.registry import hosts
from state.registry.control import erase, follow, pin, start, take_over, train
from state.registry.directory import LEASE_S, Claim, Silence
from state.registry.hosts import GONE_S, ErasureReport, HostEntry, all_erasure_reports, write_erasure_report
from state.registry.manifest import Manifest, entries
from state.registry.registry import MOST_BETWEEN, SERVING, TRAINING, Registry
from state.registry.sharing import bind
from state.registry.sync import (
    KEPT_PACKS_S,
    REST_S,
    SILENT_S,
    Copier,
    claim,
    exchange_small,
    holder,
    pack_name,
    renew,
    require_newest,
)
from tests.kills import Killed, armed, killed_at
from tests.state.registry.hosts import CopyHost, Elapsed, Link, Origin
from tests.state.registry.test_registry import WHO

POINTS_OF_SENDER = ("share.pack", "share.file", "share.manifest", "share.named", "share.unnamed")
POINTS_OF_COPIER = ("copy.control", "copy.pack", "copy.named", "copy.small")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "place")


@pytest.fixture
def origin(tmp_path: Path, url: str) -> Origin:
    return Origin(tmp_path / "trainer", url)


@pytest.fixture
def host(tmp_path: Path, url: str) -> CopyHost:
    return CopyHost(tmp_path / "host", url, open_store(url))


def publish_and_send(origin: Origin) -> None:
    """A base, two deltas, and recent versions between and beyond."""
    first = origin.publish(None)
    second = origin.publish_recent(first.version)
    third = origin.publish_recent(second.version, durable_after=first.version)
    origin.publish_recent(third.version)
    origin.send()


def test_a_host_has_what_the_trainer_published_and_files_come_when_they_are_read(
    origin: Origin, host: CopyHost
) -> None:
    publish_and_send(origin)
    host.look()
    own, theirs = host.registry, origin.registry
    assert (own.versions(), own.recents(), own.control()) == (theirs.versions(), theirs.recents(), theirs.control())
    assert [path for path in own.path.rglob("*.safetensors") if "recent" not in path.parts] == []
    assert own.chain(3) == theirs.chain(3)
    assert own.read(3, SERVING) == theirs.read(3, SERVING)
    assert [path.name for path in own.folder("delta", 3).iterdir()] and not own.path_of(own.manifest(1), "x").exists()
    assert own.specs.program(own.manifest(3).program) == b"a program"
    assert own.read(own.manifest(4, "recent"), SERVING) == theirs.read(theirs.manifest(4, "recent"), SERVING)


def up_to_date(origin: Origin, url: str, tmp_path: Path) -> tuple[CopyHost, Link]:
    """A host that has what an origin has published, and its link to the place."""
    publish_and_send(origin)
    link = Link(open_store(url))
    host = CopyHost(tmp_path / "host", url, link)
    host.look()
    return host, link


def test_a_look_that_finds_nothing_asks_twice(origin: Origin, url: str, tmp_path: Path) -> None:
    host, link = up_to_date(origin, url, tmp_path)
    link.asked.clear()
    host.copier.step()
    assert link.asked == ["read control/00000002.json", f"read {pack_name(5)}"]
    last = origin.publish_recent(4).version
    origin.send()
    link.asked.clear()
    host.copier.step()
    assert link.asked == ["read control/00000002.json", f"read {pack_name(last)}"]
    assert host.registry.recents()[-1] == last


def test_a_host_that_finds_a_pack_twice_in_a_row_takes_all_that_there_are(
    origin: Origin, url: str, tmp_path: Path
) -> None:
    host, _ = up_to_date(origin, url, tmp_path)
    newest = 4
    for _ in range(5):
        newest = origin.publish_recent(newest).version
        origin.send()
    for _ in range(2):
        host.copier.step()
    assert host.registry.recents()[-1] == newest


def test_over_a_link_that_carries_less_than_comes_a_host_takes_durable_versions_then_what_leads_on_from_them(
    origin: Origin, url: str, tmp_path: Path
) -> None:
    host, link = up_to_date(origin, url, tmp_path)
    newest = 4
    for number in range(12):
        durable_after = 3 if number == 9 else None
        newest = origin.publish_recent(newest, durable_after).version
        origin.send()

    def slow() -> None:
        host.elapsed.now_s += SILENT_S / 2

    link.asked.clear()
    link.passes = slow
    while host.registry.versions()[-1] != newest - 2:
        host.copier.step()
    read = [number for number in range(5, newest + 1) if f"read {pack_name(number)}" in link.asked]
    assert read == [5, 6, 7], "the link is left to what is durable"
    until_s = host.elapsed.now_s + REST_S + SILENT_S
    while host.registry.recents()[-1] != newest:
        host.copier.step()
        assert host.elapsed.now_s < until_s
    read = [number for number in range(5, newest + 1) if f"read {pack_name(number)}" in link.asked]
    assert read == [5, 6, 7, newest - 1, newest]
    # The durable one comes whole, each of its files once, and what is left leads on from it.
    link.asked.clear()
    base, deltas = host.registry.chain(newest - 2)
    for part in (base, *deltas):
        assert all(host.registry.read(part, name) for name in part.files)
    files = [one for one in link.asked if one.endswith(".safetensors")]
    assert len(files) == len({*files}) == sum(len(part.files) for part in (base, *deltas))
    assert host.registry.manifest(newest - 1, "recent").parent == newest - 2


def test_a_host_that_was_away_finds_what_came_and_what_went(origin: Origin, host: CopyHost) -> None:
    publish_and_send(origin)
    host.look()
    assert host.content()
    newest = 3
    for _ in range(5):
        newest = origin.publish(newest).version
    base = origin.registry.add_base(origin.registry.manifest(newest), {SERVING: b"all", TRAINING: b"more"})
    for version in (1, 3):
        origin.registry.remove_delta(version)
    origin.registry.remove("base", 1)
    origin.send()
    host.look()
    assert host.registry.versions() == origin.registry.versions()
    assert host.registry.chain(newest).base == base
    assert host.content()[newest] == [b"all", b"more"]
    assert not (host.registry.path / "bases" / "000000000001").exists()
    # Nor does the place have it any more.
    assert not [name for name in origin.place.names("bases") if name.startswith("000000000001")]


@pytest.mark.parametrize("point", POINTS_OF_SENDER)
@pytest.mark.parametrize("passed", [1, 2, 3])
def test_a_sender_that_is_killed_anywhere_leaves_only_whole_versions(
    origin: Origin, host: CopyHost, point: str, passed: int
) -> None:
    publish_and_send(origin)
    newest = origin.publish(3).version
    origin.publish_recent(newest)
    origin.registry.remove_delta(3)
    origin.publish(None)
    with suppress(Killed), armed(f"{point}:{passed}"):
        origin.send()
    host.look()
    for version in host.registry.versions():
        part = host.registry.manifest(version)
        assert [host.registry.read(part, name) for name in part.files]
    # The next trainer of this host finishes it.
    origin.restart()
    origin.send()
    host.look()
    assert host.registry.versions() == origin.registry.versions()
    assert origin.place.names("versions") == sorted(
        f"{path.parent.name}/{path.name}" for path in (origin.registry.path / "versions").rglob("*.*")
    )


@pytest.mark.parametrize("point", POINTS_OF_COPIER)
def test_a_copier_that_is_killed_anywhere_goes_on(origin: Origin, host: CopyHost, point: str) -> None:
    publish_and_send(origin)
    origin.registry.propose(pin(origin.registry.control() or start(**WHO), 1, **WHO))
    origin.registry.generations.add_outcome(1, "planned", {"a": 1})
    exchange_small(origin.registry, origin.place)
    origin.send()
    with suppress(Killed), armed(point):
        host.look()
    host.restart()
    host.look()
    assert host.registry.versions() == origin.registry.versions()
    assert host.registry.control() == origin.registry.control()
    assert host.registry.generations.outcome(1, "planned") == {"a": 1}
    assert host.registry.recents()[-1] == 4


def test_while_the_place_is_away_the_trainer_publishes_and_all_of_it_goes_later(
    tmp_path: Path, url: str, host: CopyHost
) -> None:
    links = list[Link]()

    def cut(place: FileStore) -> Link:
        links.append(Link(place))
        return links[-1]

    origin = Origin(tmp_path / "trainer", url, cut)
    publish_and_send(origin)
    for after in range(6):
        links[0].cut_after = after
        newest = origin.publish(origin.registry.versions()[-1]).version
        origin.publish_recent(newest)
        with pytest.raises(UnusablePlace, match="cut off"):
            origin.send()
        host.look()
        assert host.content()[host.registry.versions()[-1]]
    links[0].cut_after = None
    origin.send()
    host.look()
    assert host.registry.versions() == origin.registry.versions()
    assert host.registry.recents()[-1] == origin.registry.recents()[-1]


def test_a_host_without_the_store_keeps_what_it_has_and_its_operator_changes_nothing(
    origin: Origin, url: str, tmp_path: Path
) -> None:
    host, link = up_to_date(origin, url, tmp_path)
    before, now = host.content(), host.registry.control()
    assert now is not None
    link.cut_after = 0
    with pytest.raises(UnusableRegistry, match="cut off"):
        host.look()
    with pytest.raises(UnusableRegistry, match="cut off"):
        host.registry.propose(pin(now, 1, **WHO))
    assert (host.content(), Registry(host.registry.path).control()) == (before, now)
    assert origin.place.names("control") == ["00000001.json"]


def test_a_torn_file_there_is_refused_and_read_once_it_is_whole(origin: Origin, host: CopyHost) -> None:
    publish_and_send(origin)
    whole = origin.place.read("versions/000000000003/serving.safetensors")
    for torn in (b"", whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        origin.place.write("versions/000000000003/serving.safetensors", torn)
        host.look()
        with pytest.raises(CorruptVersion, match="fails its digest"):
            host.registry.read(3, SERVING)
        assert not (host.registry.folder("delta", 3) / SERVING).exists()
    origin.place.write("versions/000000000003/serving.safetensors", whole)
    assert host.registry.read(3, SERVING) == whole
    # What is damaged on this host's own disk is brought again.
    (host.registry.folder("delta", 3) / SERVING).write_bytes(b"spoiled")
    assert host.registry.read(3, SERVING) == whole


def test_a_torn_pack_is_refused_and_durable_versions_lead_past_it(origin: Origin, host: CopyHost) -> None:
    publish_and_send(origin)
    (name,) = origin.place.names("recent")
    origin.place.write(f"recent/{name}", origin.place.read(f"recent/{name}")[:-1])
    with pytest.raises(CorruptVersion, match="fails its digest"):
        host.look()
    assert host.registry.recents() == ()
    assert host.registry.versions() == [1, 3]
    later = origin.publish_recent(4).version
    origin.send()
    host.look()
    assert host.registry.recents() == (later,)


def test_a_part_that_was_rewritten_reaches_a_host_that_had_it(origin: Origin, host: CopyHost) -> None:
    publish_and_send(origin)
    host.look()
    assert host.content()
    stale = Registry(host.registry.path)
    assert stale.read(3, SERVING) == b"rows since 1"
    files = {SERVING: b"without ann", TRAINING: b"more"}
    part = origin.registry.manifest(3, "delta")
    origin.registry.replace(replace(part, files=entries(files), rewritten=1), files)
    origin.send()
    host.look()
    # The old bytes are gone from the host's disk, whoever still holds the old manifest.
    assert not [path for path in host.registry.path.rglob("*") if path.is_file() and b"rows since 1" in path.read_bytes()
                and "recent" not in path.parts]  # fmt: skip
    assert stale.read(3, SERVING) == b"without ann"
    assert origin.place.read("versions/000000000003/serving.safetensors") == b"without ann"


def test_of_two_operators_on_two_hosts_one_wins_and_both_know(
    origin: Origin, host: CopyHost, url: str, tmp_path: Path
) -> None:
    other = CopyHost(tmp_path / "other", url, open_store(url))
    for one in (host, other):
        one.look()
    now = host.registry.control()
    assert now is not None and now == other.registry.control()
    host.registry.propose(pin(now, 1, actor="ann", reason="bad answers", now_ms=6))
    with pytest.raises(ControlConflict, match="generation 2 was just created by ann"):
        other.registry.propose(pin(now, 2, actor="bob", reason="worse answers", now_ms=6))
    assert other.registry.control() == host.registry.control()
    other.registry.change(lambda control: follow(control, actor="bob", reason="again", now_ms=7))
    host.look()
    Copier(origin.registry.path, origin.place, origin.elapsed).step()
    for registry in (host.registry, origin.registry):
        assert [each.actor for each in registry.controls()] == ["ann", "ann", "bob"]


def test_an_operator_who_was_killed_behind_the_place_has_decided(origin: Origin, host: CopyHost) -> None:
    host.look()
    now = host.registry.control()
    assert now is not None
    with killed_at("control.shared"):
        host.registry.propose(pin(now, 1, **WHO))
    host.look()
    found = host.registry.control()
    assert found is not None and (found.generation, found.serving.version) == (2, 1)


def test_masked_and_erased_users_come_with_control(origin: Origin, host: CopyHost) -> None:
    users = MaskedUsers.of([7, 9])
    origin.registry.change(lambda now: erase(now, users, [(42, 0, 100)], **WHO))
    host.look()
    found = host.registry.control()
    assert found is not None and found.erased == (origin.registry.control() or found).erased
    assert found.mask != Mask.NONE


def test_each_host_says_how_far_it_has_forgotten_and_all_of_them_are_told(
    origin: Origin, host: CopyHost, url: str, tmp_path: Path
) -> None:
    other = CopyHost(tmp_path / "other", url, open_store(url))
    for name, one, through in (("a", host, 1), ("b", other, 0)):
        write_erasure_report(one.registry.path, ErasureReport(f"serving-{name}", name, "/srv", through, 0))
        one.look()
    assert [(one.part, one.through) for one in all_erasure_reports(origin.registry)] == [
        ("serving-a", 1),
        ("serving-b", 0),
    ]
    write_erasure_report(other.registry.path, ErasureReport("serving-b", "b", "/srv", 1, 1))
    other.look()
    assert [one.through for one in all_erasure_reports(host.registry)] == [1, 1]


def test_each_host_in_the_routing_table_knows_the_others_and_a_command_all_of_them(
    origin: Origin, host: CopyHost, tmp_path: Path, url: str
) -> None:
    other = CopyHost(tmp_path / "other", url, open_store(url))
    now_ms = wall_ms()
    ours = {name: HostEntry(name, f"http://{name}", "0-31", now_ms) for name in ("a", "b", "gone")}
    gone = replace_fields(ours["gone"], at_ms=now_ms - int(GONE_S * 1000) - 1)
    for name, one in (("a", host), ("b", other)):
        hosts.renew(one.registry.path, ours[name])
        one.look()
    host.look()
    assert hosts.entries(host.registry.path) == hosts.entries(other.registry.path) == [ours["a"], ours["b"]]
    assert hosts.all_entries(origin.registry) == [ours["a"], ours["b"]]
    hosts.renew(other.registry.path, gone)
    other.look()
    hosts.withdraw(host.registry.path, "a")
    host.look()
    assert hosts.entries(host.registry.path) == [ours["b"], gone]
    host.look()
    other.look()
    assert [one.name for one in hosts.entries(host.registry.path)] == ["b"]
    assert hosts.all_entries(origin.registry) == [ours["b"]]


def test_what_is_small_goes_both_ways(origin: Origin, host: CopyHost) -> None:
    def fill(folder: Path) -> None:
        (folder / "transform").mkdir()
        (folder / "transform" / "graph").write_bytes(b"graph")

    origin.registry.specs.add_spec("abc", {"spec": {}}, fill)
    host.look()
    host.registry.generations.add_outcome(3, "planned", {"by": "host"})
    exchange_small(origin.registry, origin.place)
    host.elapsed.now_s += 60.0
    host.look()
    assert host.registry.specs.names() == ["abc"]
    assert (host.registry.specs.transform("abc") / "graph").read_bytes() == b"graph"
    exchange_small(origin.registry, origin.place)
    assert origin.registry.generations.outcome(3, "planned") == {"by": "host"}


def test_recent_versions_leave_a_host_and_packs_leave_the_place(origin: Origin, host: CopyHost) -> None:
    publish_and_send(origin)
    host.look()
    assert host.registry.recents() == (2, 3, 4)
    origin.elapsed.now_s += KEPT_PACKS_S + 1
    last = origin.publish_recent(4).version
    origin.send()
    host.elapsed.now_s += 16.0
    host.look()
    assert host.registry.recents() == (last,)
    assert origin.place.names("recent") == [f"{last:012d}"]


def test_another_hosts_trainer_goes_on_and_the_first_one_ends(
    origin: Origin, host: CopyHost, url: str, tmp_path: Path
) -> None:
    publish_and_send(origin)
    second = Origin(tmp_path / "second", url)
    assert second.registry.versions() == [1, 3]
    assert second.registry.newest_good(1) == 3
    made = second.publish(3)
    assert made.version > 4 + MOST_BETWEEN
    origin.publish_recent(4)
    origin.elapsed.now_s += 60.0
    for send in (origin.recent.send, origin.durable.send):
        origin.publish(3)
        with pytest.raises(LockHeld, match="has another trainer"):
            send()
    second.send()
    host.look()
    assert host.registry.versions() == [1, 3, made.version]
    # Started again, the first host lacks what it did not send, and is the next to claim the versions.
    again = Origin(origin.registry.path, url)
    assert (again.registry.versions(), again.registry.recents()) == ([1, 3, made.version], (2, 3, 4))
    assert again.registry.newest_good(1) == made.version
    with pytest.raises(LockHeld, match="has another trainer"):
        second.publish(made.version)
        second.send()


def test_a_claim_is_free_once_it_is_released_or_not_renewed(url: str) -> None:
    store, elapsed = open_store(url), Elapsed()
    silence = Silence(elapsed)
    assert holder(store, 0, silence) == "" and claim(store, 1, 0)
    for second in range(1, int(3 * LEASE_S)):
        elapsed.now_s += 1.0
        renew(store, 1, second)
        assert holder(store, 1, silence) == HOST
    silent_s = 0.0
    while holder(store, 1, silence):
        elapsed.now_s += 1.0
        silent_s += 1.0
    assert silent_s == LEASE_S
    assert claim(store, 2, 0) and not claim(store, 2, 0)
    with pytest.raises(LockHeld, match="has another trainer"):
        renew(store, 1, 99)
    renew(store, 2, 99, released=True)
    assert holder(store, 2, silence) == ""


def test_a_trainer_that_is_frozen_before_its_request_replaces_no_catalogue(
    host: CopyHost, url: str, tmp_path: Path
) -> None:
    links: list[Link] = []

    def linked(store: FileStore) -> Link:
        links.append(Link(store))
        return links[0]

    origin = Origin(tmp_path / "trainer", url, linked)
    publish_and_send(origin)
    takers: list[Origin] = []

    def freeze() -> None:
        if links[0].asked[-1] == "write catalog.json" and not takers:
            takers.append(Origin(tmp_path / "second", url))

    links[0].passes = freeze
    origin.publish(3)
    with pytest.raises(LockHeld, match="has another trainer"):
        origin.durable.send()
    host.look()
    assert takers and host.registry.versions() == [1, 3]


def test_a_trainer_that_is_frozen_before_its_request_creates_no_control(
    origin: Origin, host: CopyHost, url: str, tmp_path: Path
) -> None:
    link, held = Link(origin.place), Claim(origin.registry.path)
    held.take()
    held.ask_store = lambda: require_newest(link, origin.claim)
    frozen = Registry(origin.registry.path, held)
    frozen.directory.shared = link

    def freeze() -> None:
        if link.asked[-1].startswith("create control/"):
            link.passes = lambda: None
            Origin(tmp_path / "second", url).registry.change(lambda now: take_over(now, **WHO))

    link.passes = freeze
    with pytest.raises(LockHeld, match="has another trainer"):
        frozen.change(lambda now: train(now, False, **WHO))
    held.release()
    host.look()
    assert [one.action for one in host.registry.controls()] == ["start", "take over"]


def test_a_trainer_that_starts_again_goes_on_under_its_claim(origin: Origin, url: str) -> None:
    publish_and_send(origin)
    again = Origin(origin.registry.path, url)
    assert (again.claim, again.registry.next_number()) == (origin.claim, 5)
    again.send()


def test_a_registry_that_was_alone_is_given_to_an_empty_place(host: CopyHost, tmp_path: Path, url: str) -> None:
    alone = Registry(tmp_path / "trainer")
    alone.propose(start(**WHO))
    alone.change(lambda now: erase(now, MaskedUsers.of([7]), [(42, 0, 100)], **WHO))
    origin = Origin(alone.path, url)
    publish_and_send(origin)
    host.look()
    assert host.registry.controls() == alone.controls()
    assert host.content() == {
        version: [origin.registry.read(part, name) for part in _parts(origin.registry, version) for name in sorted(part.files)]
        for version in (1, 3)
    }  # fmt: skip


def _parts(registry: Registry, version: int) -> list[Manifest]:
    base, deltas = registry.chain(version)
    return [base, *deltas]


def test_two_registries_do_not_share_a_place(origin: Origin, url: str, tmp_path: Path) -> None:
    alone = Registry(tmp_path / "alone")
    alone.propose(start(actor="bob", reason="another", now_ms=9))
    with pytest.raises(SettingsError, match="are two registries: control generation 1 differs"):
        Origin(alone.path, url)
    with pytest.raises(SettingsError, match=r"belongs to the registry at .*place, and .* is s3://other/place"):
        bind(origin.registry.path, "s3://other/place")
