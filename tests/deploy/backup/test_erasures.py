"""Who was erased after a backup is not brought back by it, as far as a newer backup or a registry knows of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.backup.location import id_at
from state.errors import BackupError
from state.features.erased import Erased
from state.features.masked_users import MaskedUsers
from state.registry.control import erase
from state.registry.registry import Registry
from tests.deploy.backup.systems import NOW_MS, System, settings_of, springtide

FIRST, SECOND, THIRD = (
    (MaskedUsers.of([users << 40]), ((7, 0, until),)) for users, until in ((3, 10), (4, 20), (5, 30))
)
Named = tuple[MaskedUsers, tuple[tuple[int, int, int], ...]]


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path / "here")


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
