"""Salts and ids: made once, kept from others, and pinned."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest

from state.config.loading import load
from state.errors import MissingSalt, SettingsError
from state.events.identity import Salt, context_id, load_salt, own_salt, public_id, user_id

SALT = Salt(b"a salt for the tests")


def test_a_salt_is_made_once_for_its_owner_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state" / "salt"
    with pytest.raises(MissingSalt, match="no salt at"):
        load_salt(path, create=False)
    with caplog.at_level(logging.WARNING):
        salt = load_salt(path)
    assert str(path) in caplog.text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_salt(path) == salt and len(salt.key) == 32 and len(salt.fingerprint) == 16
    assert salt.key.hex() not in repr(salt) and [one.name for one in path.parent.iterdir()] == ["salt"]


def test_a_lost_salt_is_not_made_again_once_users_are_stored(tmp_path: Path) -> None:
    settings = load(["--paths.state", str(tmp_path)], env={})
    made = own_salt(settings)
    (tmp_path / "stream-0" / "histories").mkdir(parents=True)
    assert own_salt(settings) == made
    settings.salt_path.unlink()
    with pytest.raises(MissingSalt, match="restore the file"):
        own_salt(settings)
    assert not settings.salt_path.exists()


def test_a_salt_of_the_users_own_is_taken_and_a_short_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "salt"
    path.write_bytes(b"correct horse battery staple\n")
    assert load_salt(path).key == b"correct horse battery staple"
    path.write_bytes(b"short")
    with pytest.raises(SettingsError, match="5 bytes"):
        load_salt(path)


def test_ids_are_pinned() -> None:
    # Rows, histories and micro-batches are stored under these ids.
    assert user_id(SALT, "ann") == int("9acc554cb733d961", 16)
    assert public_id("home") == int("4ea140588150773c", 16)
    assert context_id("device", "phone") == int("033a2ca1b1ab7891", 16)
