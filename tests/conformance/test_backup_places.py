"""What every place for backups promises: files whole or absent, listed by name, and errors that say what to do."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from deploy.backup.places import BackupPlace, open_place
from state.errors import BackupError

_numbers = itertools.count(1)


@pytest.fixture(params=["directory", "file URL", "memory"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What names the place on a command line."""
    if request.param == "memory":
        return f"memory://backups-{next(_numbers)}/of/shop"
    return f"{'file://' * (request.param == 'file URL')}{tmp_path / 'backups'}"


@pytest.fixture
def place(where: str) -> BackupPlace:
    return open_place(where)


def test_what_was_written_is_read_by_another(place: BackupPlace, where: str) -> None:
    place.write("objects/ab/ab12", b"one")
    place.write("objects/cd/cd34", bytes(100_000))
    place.write("backups/1.json", b"{}")
    other = open_place(where)
    assert other.read("objects/ab/ab12") == b"one"
    assert len(other.read("objects/cd/cd34")) == 100_000
    assert other.names("objects") == ["ab12", "cd34"]
    assert other.names("backups") == ["1.json"]


def test_a_file_is_replaced(place: BackupPlace) -> None:
    place.write("locks/a.json", b"first, and longer")
    place.write("locks/a.json", b"second")
    assert place.read("locks/a.json") == b"second"
    assert place.names("locks") == ["a.json"]


def test_a_place_that_nobody_wrote_to_is_empty(place: BackupPlace) -> None:
    assert place.names("objects") == []
    with pytest.raises(FileNotFoundError):
        place.read("objects/ab/ab12")


def test_what_was_removed_is_gone_and_may_be_removed_again(place: BackupPlace) -> None:
    place.write("objects/ab/ab12", b"one")
    for _ in range(2):
        place.remove("objects/ab/ab12")
    assert place.names("objects") == []
    place.write("objects/ab/ab12", b"two")
    assert place.read("objects/ab/ab12") == b"two"


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BackupError, match=r"file cannot take objects/ab/ab12 \(.*Not a directory"):
        open_place(str(tmp_path / "file")).write("objects/ab/ab12", b"one")


def test_a_write_that_broke_off_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from state.disk import files

    def torn(path: Path, data: bytes) -> None:
        path.write_bytes(data[:2])
        raise OSError(28, "No space left on device", str(path))

    place = open_place(str(tmp_path))
    monkeypatch.setattr(files, "write", torn)
    with pytest.raises(BackupError, match="No space left"):
        place.write("objects/ab/ab12", b"one")
    assert place.names("objects") == []
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []


def test_a_url_that_nothing_reaches_says_so_without_its_password() -> None:
    with pytest.raises(BackupError, match="nowhere://host/x cannot be opened") as refused:
        open_place("nowhere://ann:secret@host/x")
    assert "secret" not in str(refused.value)
