"""What every place for files promises: whole or absent, listed by name, created by one alone, and errors that say what to do."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from state.errors import UnusablePlace
from state.places.opening import open_place
from state.places.place import FilePlace
from state.places.store import PART_BYTES
from tests.one_s3 import S3Server
from tests.slow_link import SlowLink

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(params=["directory", "file URL", "memory", "S3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What names the place on a command line."""
    if request.param == "memory":
        return f"memory://places-{next(_numbers)}/of/shop"
    if request.param == "S3":
        server: S3Server = request.getfixturevalue("s3")
        return server.bucket(f"places-{next(_numbers)}") + "/of/shop"
    return f"{'file://' * (request.param == 'file URL')}{tmp_path / 'places'}"


@pytest.fixture
def place(where: str) -> FilePlace:
    return open_place(where)


def test_what_was_written_is_read_by_another(place: FilePlace, where: str) -> None:
    place.write("objects/ab/ab12", b"one")
    place.write("objects/cd/cd34", bytes(100_000))
    place.write("backups/1.json", b"{}")
    other = open_place(where)
    assert other.read("objects/ab/ab12") == b"one"
    assert len(other.read("objects/cd/cd34")) == 100_000
    assert other.names("objects") == ["ab/ab12", "cd/cd34"]
    assert other.names("objects/ab") == ["ab12"]
    assert other.names("backups") == ["1.json"]


def test_a_file_is_replaced(place: FilePlace) -> None:
    place.write("locks/a.json", b"first, and longer")
    place.write("locks/a.json", b"second")
    assert place.read("locks/a.json") == b"second"
    assert place.names("locks") == ["a.json"]


def test_a_file_is_created_once(place: FilePlace, where: str) -> None:
    assert place.create("control/1.json", b"one")
    assert not place.create("control/1.json", b"two")
    assert not open_place(where).create("control/1.json", b"three")
    assert place.read("control/1.json") == b"one"
    place.remove("control/1.json")
    assert place.create("control/1.json", b"four")
    assert place.names("control") == ["1.json"]


def test_of_many_at_once_one_creates(place: FilePlace, where: str) -> None:
    others, won = [place, *(open_place(where) for _ in range(7))], list[int]()
    start = threading.Barrier(len(others))

    def create(number: int) -> None:
        start.wait()
        if others[number].create("control/2.json", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(len(others))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert place.read("control/2.json") == b"%d" % won[0]


def test_a_place_that_nobody_wrote_to_is_empty(place: FilePlace) -> None:
    assert place.names("objects") == []
    with pytest.raises(FileNotFoundError):
        place.read("objects/ab/ab12")


def test_what_was_removed_is_gone_and_may_be_removed_again(place: FilePlace) -> None:
    place.write("objects/ab/ab12", b"one")
    for _ in range(2):
        place.remove("objects/ab/ab12")
    assert place.names("objects") == []
    place.write("objects/ab/ab12", b"two")
    assert place.read("objects/ab/ab12") == b"two"


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnusablePlace, match=r"file cannot take objects/ab/ab12 \(.*Not a directory"):
        open_place(str(tmp_path / "file")).write("objects/ab/ab12", b"one")


def test_a_write_that_broke_off_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from state.disk import files

    def torn(path: Path, data: bytes) -> None:
        path.write_bytes(data[:2])
        raise OSError(28, "No space left on device", str(path))

    place = open_place(str(tmp_path))
    monkeypatch.setattr(files, "write", torn)
    for put in (place.write, place.create):
        with pytest.raises(UnusablePlace, match="No space left"):
            put("objects/ab/ab12", b"one")
    assert place.names("objects") == []
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []


def test_a_store_that_went_away_is_named_and_comes_back(s3: S3Server) -> None:
    place = open_place(s3.bucket("away") + "/of/shop")
    place.write("a", b"one")
    s3.stop()
    try:
        for ask in (lambda: place.read("a"), lambda: place.write("b", b"two"), lambda: place.create("c", b"three")):
            with pytest.raises(UnusablePlace, match=r"s3://away/of/shop cannot (give a|take [bc])"):
                ask()
    finally:
        # What moto's server has is gone with it.
        s3.start()
    s3.bucket("away")
    assert place.names("") == []
    place.write("b", b"two")
    assert place.read("b") == b"two"


def test_each_word_is_one_request_of_an_object_store(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3.bucket("counted") + "/of/shop"
    with SlowLink(s3.port) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link.url)
        place = open_place(url)
        place.write("a", b"one")
        for ask in (
            lambda: place.read("a"),
            lambda: place.read("not there"),
            lambda: place.write("b", bytes(1_000_000)),
            lambda: place.read("b"),
            lambda: place.create("c", b"three"),
            lambda: place.create("c", b"four"),
            lambda: place.names(""),
            lambda: place.remove("a"),
        ):
            before = link.connections
            with suppress(FileNotFoundError):
                ask()
            # moto's server ends a connection with each answer.
            assert link.connections == before + 1


def test_what_is_sent_in_parts_is_whole(s3: S3Server) -> None:
    place, data = open_place(s3.bucket("parts")), bytes(range(256)) * (3 * PART_BYTES // 256) + b"end"
    for _ in range(2):
        place.write("bases/1", data)
        assert place.read("bases/1") == data and place.names("") == ["bases/1"]


@pytest.mark.parametrize("profile", [False, True])
def test_credentials_are_those_of_a_profile_too_or_are_said_to_be_missing(
    profile: bool, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.bucket("credentials") + "/of/shop"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, text in (
        ("config", "[profile shop]\nregion = eu-central-1\n"),
        ("credentials", "[shop]\naws_access_key_id = ann\naws_secret_access_key = word\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    if profile:
        monkeypatch.setenv("AWS_PROFILE", "shop")
        place = open_place(url)
        place.write("a", b"one")
        assert place.read("a") == b"one"
    else:
        with pytest.raises(UnusablePlace, match="there are no credentials") as refused:
            open_place(url)
        assert "AWS_PROFILE" in str(refused.value)


def test_a_url_that_nothing_reaches_says_so_without_its_password() -> None:
    with pytest.raises(UnusablePlace, match="nowhere://host/x cannot be opened") as refused:
        open_place("nowhere://ann:secret@host/x")
    assert "secret" not in str(refused.value)
