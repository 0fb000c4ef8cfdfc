"""Backups: what is restored is equal bit for bit, and no erasure is undone by one."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.backup.location import LOCK, PIECE_BYTES, id_at
from state.config.settings import Settings
from state.errors import BackupError, DamagedBackup, MissingSalt, SaltMismatch
from state.events.identity import load_salt
from state.features.erased import Erased, MaskedUsers
from state.process import killpoints
from state.registry.control import erase
from state.registry.registry import Registry
from tests import forked
from tests.deploy.backup.systems import NOW_MS, System, content, settings_of, springtide
from tests.kills import killed_at
from tests.state.registry.test_registry import publish

MINUTE_MS = 60_000


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path / "here")


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "backups"


@pytest.fixture
def there(tmp_path: Path) -> Settings:
    """The empty machine."""
    return settings_of(tmp_path / "there")


def sent(said: str) -> int:
    made = json.loads(said)["made"]
    return int(made["sent_bytes"])


def test_what_is_restored_is_equal_bit_for_bit_and_says_who_restored_it(
    system: System, to: Path, there: Settings
) -> None:
    said = springtide(system.settings, "backup", str(to), "--with-salt")
    assert "version 4 of 4, control generation 2" in said and "the salt is in this backup" in said
    before = content(system.settings)
    said = springtide(there, "restore", str(to), now_ms=NOW_MS + MINUTE_MS)
    assert "its version is of feature spec spec, the settings here make" in said
    assert f"restored backup {id_at(NOW_MS)}" in said and "histories of 500 users" in said
    after = content(there)
    assert after.pop("control/00000003.json")
    assert after == before
    assert load_salt(there.salt_path, create=False) == load_salt(system.settings.salt_path, create=False)
    assert sorted(one.name for one in there.state_dir.iterdir()) == ["lock", "registry", "salt", "stream-0"]
    control = Registry(there.registry_dir).control()
    assert control is not None
    assert (control.action, control.reason, control.epoch) == ("restore", f"restored backup {id_at(NOW_MS)}", 2)


def test_a_number_that_the_lost_system_may_have_used_is_not_used_again(
    system: System, to: Path, there: Settings
) -> None:
    springtide(system.settings, "backup", str(to), "--with-salt")
    for parent in range(4, 30):
        publish(system.registry, parent, epoch=2)
    springtide(there, "restore", str(to), now_ms=NOW_MS + MINUTE_MS)
    restored = Registry(there.registry_dir)
    restored.sweep_recent()
    first = publish(restored, 4, epoch=2)
    assert first.version > 30 + 60 * 100
    assert first.visible == ((first.version, first.version), (4, 4), (1, 2))


def test_what_did_not_change_is_not_sent_again_and_a_file_of_a_version_not_even_read(
    system: System, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sent(springtide(system.settings, "backup", str(to), "-o", "json"))
    read: list[str] = []
    opened = Path.open

    def watched(path: Path, *arguments: Any, **named: Any) -> Any:
        read.append(path.as_posix())
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", watched)
    assert sent(springtide(system.settings, "backup", str(to), "-o", "json", now_ms=NOW_MS + 1)) == 0 < first
    assert [one for one in read if one.endswith(".safetensors")] == []
    publish(system.registry, 4, epoch=2)
    assert 0 < sent(springtide(system.settings, "backup", str(to), "-o", "json", now_ms=NOW_MS + 2)) < first / 4


def test_histories_of_several_pieces_send_only_those_that_changed(system: System, to: Path, there: Settings) -> None:
    system.click(range(1000, 100_000))
    data = system.settings.stream_dir / "histories/data.mdb"
    assert data.stat().st_size > 3 * PIECE_BYTES
    first = sent(springtide(system.settings, "backup", str(to), "--with-salt", "-o", "json"))
    system.click(range(79_000, 79_010))
    assert (
        sent(springtide(system.settings, "backup", str(to), "--with-salt", "-o", "json", now_ms=NOW_MS + 1))
        < 0.7 * first
    )
    springtide(there, "restore", str(to))
    after = content(there)
    after.pop("control/00000003.json")
    assert after == content(system.settings)


def test_a_backup_that_broke_off_is_none_and_what_it_sent_is_used(system: System, to: Path) -> None:
    with killed_at("backup.sent"):
        springtide(system.settings, "backup", str(to))
    assert "has no backup" in springtide(system.settings, "backup", str(to), "--list")
    with pytest.raises(BackupError, match="has no backup"):
        springtide(system.settings, "restore", str(to))
    assert sent(springtide(system.settings, "backup", str(to), "-o", "json")) == 0


def test_what_was_killed_is_repeated_or_refused_and_never_taken_for_whole(
    system: System, to: Path, there: Settings
) -> None:
    def kill(settings: Settings, point: str, *words: str) -> None:
        died = forked.run(
            [sys.executable, "-m", "deploy.cli", *words, "--paths.state", settings.paths.state],
            cwd=forked.ROOT,
            env={**os.environ, killpoints.VARIABLE: point},
            check=False,
        )
        assert died.returncode == -9

    # A backup that was killed is none, and its lock does not keep the next one from its place.
    kill(system.settings, "backup.object:3", "backup", str(to))
    assert (to / LOCK).exists() and not (to / "backups").exists()
    springtide(system.settings, "backup", str(to), "--with-salt")
    kill(there, "restore.written", "restore", str(to))
    assert Registry(there.registry_dir).control() is None
    springtide(there, "restore", str(to))
    assert content(there)["stream-0"] == content(system.settings)["stream-0"]
    shutil.rmtree(there.state_dir)
    kill(there, "restore.taken:2", "restore", str(to))
    assert Registry(there.registry_dir).control() is None
    with pytest.raises(BackupError, match="stream-0 exists"):
        springtide(there, "restore", str(to))


def test_the_newest_are_kept_with_all_that_they_need(system: System, to: Path, tmp_path: Path) -> None:
    for number in range(4):
        publish(system.registry, 4 + number, epoch=2)
        system.click(range(1, 400))
        springtide(system.settings, "backup", str(to), "--with-salt", now_ms=NOW_MS + number)
    objects = len(list((to / "objects").rglob("*/*")))
    said = json.loads(
        springtide(system.settings, "backup", str(to), "--with-salt", "--keep", "2", "-o", "json", now_ms=NOW_MS + 9)
    )
    assert said["pruned"]["backups"] == 3 and said["pruned"]["objects"] > 0
    assert len(list((to / "objects").rglob("*/*"))) < objects
    listed = json.loads(springtide(system.settings, "backup", str(to), "--list", "-o", "json"))["backups"]
    assert [one["id"] for one in listed] == [id_at(NOW_MS + 3), id_at(NOW_MS + 9)]
    for one in listed:
        there = settings_of(tmp_path / one["id"])
        springtide(system.settings, "backup", str(to), "--check", "--at", one["id"])
        springtide(there, "restore", str(to), "--at", one["id"])
        assert Registry(there.registry_dir).newest(2) == one["version"]


def test_pruning_that_broke_off_leaves_what_stays_whole_and_is_ended_by_the_next(
    system: System, to: Path, there: Settings
) -> None:
    for number in range(3):
        system.click(range(1, 400))
        springtide(system.settings, "backup", str(to), "--with-salt", now_ms=NOW_MS + number)
    with killed_at("prune.documents"):
        springtide(system.settings, "backup", str(to), "--with-salt", "--keep", "1", now_ms=NOW_MS + 3)
    springtide(system.settings, "backup", str(to), "--check")
    said = springtide(system.settings, "backup", str(to), "--with-salt", "--keep", "1", "-o", "json", now_ms=NOW_MS + 4)
    assert json.loads(said)["pruned"] == {"backups": 1, "objects": 2}
    named = {
        piece
        for one in json.loads((to / f"backups/{id_at(NOW_MS + 4)}.json").read_text())["body"]["files"]
        for piece in one["pieces"]
    }
    assert {one.name for one in (to / "objects").rglob("*/*")} == named
    springtide(there, "restore", str(to))


def test_a_damaged_object_is_named_and_nothing_is_left(system: System, to: Path, there: Settings) -> None:
    springtide(system.settings, "backup", str(to), "--with-salt")
    objects = sorted((to / "objects").rglob("*/*"))
    for harm in (lambda data: data[:-3], lambda data: data[:9] + bytes([data[9] ^ 4]) + data[10:], None):
        path = objects[len(objects) // 2]
        good = path.read_bytes()
        if harm is None:
            path.unlink()
        else:
            path.write_bytes(harm(good))
        for words in (("restore", str(to)), ("backup", str(to), "--check")):
            with pytest.raises(DamagedBackup, match=path.name):
                springtide(there, *words)
        assert not [one for one in there.registry_dir.rglob("*") if one.is_file() and one.name != "trainer.lock"]
        assert not list(there.state_dir.glob("stream-*"))
        path.write_bytes(good)
    springtide(there, "restore", str(to))


@pytest.mark.parametrize("elsewhere", [False, True], ids=["registry in the state", "registry elsewhere"])
def test_after_a_late_refusal_the_next_attempt_works_also_of_another_systems_backup(
    system: System, to: Path, tmp_path: Path, elsewhere: bool
) -> None:
    flags = ("--paths.registry", str(tmp_path / "registry")) * elsewhere
    there = settings_of(tmp_path / "there", *flags)
    other = System(tmp_path / "other")
    springtide(other.settings, "backup", str(tmp_path / "others"), "--with-salt")
    springtide(system.settings, "backup", str(to), "--with-salt")
    (to / "objects").rename(to / "away")
    with pytest.raises(DamagedBackup):
        springtide(there, "restore", str(to), *flags)
    with pytest.raises(BackupError, match="not those of this backup"):
        forget(system, FIRST)
        forget(other, SECOND, THIRD)
        springtide(other.settings, "backup", str(tmp_path / "others"), "--with-salt", now_ms=NOW_MS + 1)
        springtide(there, "restore", str(tmp_path / "others"), "--erasures-from", str(system.registry.path), *flags)
    assert not there.salt_path.exists()
    (to / "away").rename(to / "objects")
    springtide(there, "restore", str(to), *flags)
    assert content(there)["stream-0"] == content(system.settings)["stream-0"]


def test_a_damaged_document_is_refused_and_an_older_backup_still_there(
    system: System, to: Path, there: Settings
) -> None:
    for number in (0, 1):
        springtide(system.settings, "backup", str(to), "--with-salt", now_ms=NOW_MS + number)
    newest = to / "backups" / f"{id_at(NOW_MS + 1)}.json"
    newest.write_bytes(newest.read_bytes().replace(b'"epoch":2', b'"epoch":3'))
    with pytest.raises(DamagedBackup, match="digest"):
        springtide(there, "restore", str(to))
    springtide(there, "restore", str(to), "--at", id_at(NOW_MS))


def test_a_damaged_version_is_left_out_and_named(system: System, to: Path, there: Settings) -> None:
    publish(system.registry, 4, epoch=2)
    (system.settings.registry_dir / "versions/000000000005/serving.safetensors").write_bytes(b"rows of 3")
    said = springtide(system.settings, "backup", str(to), "--with-salt")
    assert "left out, it is damaged: registry/versions/000000000005: serving.safetensors fails its digest" in said
    assert "version 4 of 4" in springtide(there, "restore", str(to))


def test_the_needed_versions_alone_are_enough_to_continue(system: System, to: Path, there: Settings) -> None:
    springtide(system.settings, "backup", str(to), "--with-salt", "--versions", "newest")
    springtide(there, "restore", str(to))
    restored = Registry(there.registry_dir)
    assert (restored.versions(), restored.newest_good(2)) == ([1, 2, 4], 4)


def test_without_the_salt_in_it_the_right_one_must_be_there(system: System, to: Path, there: Settings) -> None:
    assert "keep a copy" in springtide(system.settings, "backup", str(to))
    with pytest.raises(MissingSalt, match=r"paths\.salt_file"):
        springtide(there, "restore", str(to))
    other = load_salt(there.salt_path)
    with pytest.raises(SaltMismatch, match=other.fingerprint):
        springtide(there, "restore", str(to))
    there.salt_path.write_bytes(system.settings.salt_path.read_bytes())
    springtide(there, "restore", str(to))
    assert content(there)["stream-0"] == content(system.settings)["stream-0"]


def test_nothing_that_is_there_is_overwritten(system: System, to: Path, there: Settings) -> None:
    springtide(system.settings, "backup", str(to), "--with-salt")
    before = content(system.settings)
    with pytest.raises(BackupError, match="stream-0 exists"):
        springtide(system.settings, "restore", str(to))
    assert content(system.settings) == before
    (there.serving_dir / "rows").mkdir(parents=True)
    (there.serving_dir / "rows" / "data.mdb").write_bytes(b"of another line")
    (there.kafka_dir / "data").mkdir(parents=True)
    (there.kafka_dir / "data" / "log").write_bytes(b"clicks")
    with pytest.raises(BackupError, match="serving exists"):
        springtide(there, "restore", str(to))
    assert sorted(one.name for one in there.state_dir.iterdir()) == ["kafka", "serving"]
    (there.serving_dir / "rows" / "data.mdb").unlink()
    springtide(there, "restore", str(to))
    assert (there.kafka_dir / "data" / "log").read_bytes() == b"clicks"


def test_only_its_owner_reads_what_a_backup_holds(system: System, to: Path, there: Settings) -> None:
    springtide(system.settings, "backup", str(to), "--with-salt")
    springtide(there, "restore", str(to))
    files = [one for folder in (to, there.state_dir) for one in folder.rglob("*") if one.is_file()]
    open_ones = [one for one in files if stat.S_IMODE(one.stat().st_mode) & 0o077]
    assert len(files) > 40 and open_ones == []


def test_a_clock_that_went_back_makes_no_backup_that_seems_older(system: System, to: Path) -> None:
    springtide(system.settings, "backup", str(to))
    with pytest.raises(BackupError, match="put the clock right"):
        springtide(system.settings, "backup", str(to), now_ms=NOW_MS - 1)


FIRST, SECOND, THIRD = (
    (MaskedUsers.of([users << 40]), ((7, 0, until),)) for users, until in ((3, 10), (4, 20), (5, 30))
)
Named = tuple[MaskedUsers, tuple[tuple[int, int, int], ...]]


def forget(system: System, *named: Named) -> None:
    for users, until in named:
        system.registry.change(lambda now: erase(now, users, until, actor="ann", reason="asked to", now_ms=NOW_MS))  # noqa: B023


def erased_in(path: Path) -> Erased:
    control = Registry(path).control()
    assert control is not None
    return control.erased


def named(erased: Erased) -> list[tuple[int, MaskedUsers, tuple[tuple[int, int, int], ...]]]:
    return [(one.id, one.users, one.until) for one in erased]


def test_an_older_backup_counts_the_erasures_that_a_newer_one_knows(system: System, tmp_path: Path) -> None:
    to = str(tmp_path / "backups")
    forget(system, FIRST)
    springtide(system.settings, "backup", to, "--with-salt")
    forget(system, SECOND, THIRD)
    springtide(system.settings, "backup", to, "--with-salt", now_ms=NOW_MS + 1)
    there = settings_of(tmp_path / "there")
    assert "2 erasures that were made after it are applied again" in springtide(
        there, "restore", to, "--at", id_at(NOW_MS)
    )
    assert named(erased_in(there.registry_dir)) == named(erased_in(system.registry.path))
    actions = [one.action for one in Registry(there.registry_dir).controls()]
    assert actions == ["start", "rollback", "erase", "erase", "erase", "restore"]


def test_a_registry_that_was_not_lost_knows_the_latest(system: System, tmp_path: Path) -> None:
    to = str(tmp_path / "backups")
    springtide(system.settings, "backup", to, "--with-salt")
    forget(system, FIRST, SECOND)
    there = settings_of(tmp_path / "there")
    said = springtide(there, "restore", to, "--erasures-from", str(system.registry.path))
    assert "2 erasures that were made after it are applied again" in said
    assert named(erased_in(there.registry_dir)) == named(erased_in(system.registry.path))


def test_erasures_of_another_system_are_refused_and_nothing_is_left(system: System, tmp_path: Path) -> None:
    other, to = System(tmp_path / "other"), str(tmp_path / "backups")
    forget(system, FIRST)
    forget(other, SECOND, THIRD)
    springtide(system.settings, "backup", to, "--with-salt")
    there = settings_of(tmp_path / "there")
    with pytest.raises(BackupError, match="not those of this backup"):
        springtide(there, "restore", to, "--erasures-from", str(other.registry.path))
    assert Registry(there.registry_dir).control() is None
    with pytest.raises(BackupError, match="is no registry"):
        springtide(there, "restore", to, "--erasures-from", str(tmp_path))


def test_it_is_said_where_the_newest_backup_cannot_tell(system: System, tmp_path: Path) -> None:
    to = tmp_path / "backups"
    springtide(system.settings, "backup", str(to), "--with-salt")
    forget(system, FIRST)
    springtide(system.settings, "backup", str(to), "--with-salt", now_ms=NOW_MS + 1)
    (to / "backups" / f"{id_at(NOW_MS + 1)}.json").write_bytes(b"{}")
    there = settings_of(tmp_path / "there")
    assert "repeat them" in springtide(there, "restore", str(to), "--at", id_at(NOW_MS))
