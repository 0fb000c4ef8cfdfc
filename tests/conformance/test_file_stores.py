"""What every file store promises: files are complete or absent, listed by name, created by one alone, and errors say what to do."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from state.errors import UnusablePlace
from state.file_store import PART_BYTES, FileStore, open_store
from tests.one_s3 import S3Server
from tests.slow_link import SlowLink

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(params=["directory", "file URL", "S3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What names the store on a command line."""
    if request.param == "S3":
        server: S3Server = request.getfixturevalue("s3")
        return server.bucket(f"stores-{next(_numbers)}") + "/of/shop"
    return f"{'file://' * (request.param == 'file URL')}{tmp_path / 'stores'}"


@pytest.fixture
def store(where: str) -> FileStore:
    return open_store(where)


def test_files_are_listed_read_replaced_and_removed(store: FileStore, where: str) -> None:
    assert store.names("objects") == []
    with pytest.raises(FileNotFoundError):
        store.read("objects/ab/ab12")
    store.write("objects/ab/ab12", b"first, and longer")
    store.write("objects/ab/ab12", b"second")
    store.write("objects/cd/cd34", bytes(100_000))
    store.write("backups/1.json", b"{}")
    other = open_store(where)
    assert (other.read("objects/ab/ab12"), len(other.read("objects/cd/cd34"))) == (b"second", 100_000)
    assert other.names("objects") == ["ab/ab12", "cd/cd34"]
    assert (other.names("objects/ab"), other.names("backups")) == (["ab12"], ["1.json"])
    for _ in range(2):
        other.remove("objects/ab/ab12")
    assert store.names("objects") == ["cd/cd34"]


def test_a_file_is_created_once(store: FileStore, where: str) -> None:
    assert store.create("control/1.json", b"one")
    assert not store.create("control/1.json", b"two")
    assert not open_store(where).create("control/1.json", b"three")
    assert store.read("control/1.json") == b"one"
    store.remove("control/1.json")
    assert store.create("control/1.json", b"four")
    assert store.names("control") == ["1.json"]


def test_a_file_is_swapped_only_if_it_is_unchanged(store: FileStore, where: str) -> None:
    assert store.tagged("catalog.json") == (b"", "")
    first = store.swap("catalog.json", b"one", "")
    assert first and not store.swap("catalog.json", b"two", "")
    assert open_store(where).tagged("catalog.json") == (b"one", first)
    second = store.swap("catalog.json", b"three", first)
    assert second and not open_store(where).swap("catalog.json", b"late", first)
    assert store.read("catalog.json") == b"three" and store.names("") == ["catalog.json"]
    store.remove("catalog.json")
    assert not store.swap("catalog.json", b"late", second)


def test_of_many_at_once_one_creates(store: FileStore, where: str) -> None:
    others, won = [store, *(open_store(where) for _ in range(7))], list[int]()
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
    assert store.read("control/2.json") == b"%d" % won[0]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnusablePlace, match=r"file cannot write objects/ab/ab12 \(.*Not a directory"):
        open_store(str(tmp_path / "file")).write("objects/ab/ab12", b"one")


def test_a_write_that_broke_off_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from state.disk import files

    def torn(path: Path, data: bytes) -> None:
        path.write_bytes(data[:2])
        raise OSError(28, "No space left on device", str(path))

    store = open_store(str(tmp_path))
    monkeypatch.setattr(files, "write", torn)
    for put in (store.write, store.create):
        with pytest.raises(UnusablePlace, match="No space left"):
            put("objects/ab/ab12", b"one")
    assert store.names("objects") == []
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []


def test_a_store_that_went_away_is_named_and_comes_back(s3: S3Server) -> None:
    store = open_store(s3.bucket("away") + "/of/shop")
    store.write("a", b"one")
    s3.stop()
    try:
        for ask in (lambda: store.read("a"), lambda: store.write("b", b"two"), lambda: store.create("c", b"three")):
            with pytest.raises(UnusablePlace, match=r"s3://away/of/shop cannot (read a|write [bc])"):
                ask()
    finally:
        # What moto's server has is gone with it.
        s3.start()
    s3.bucket("away")
    assert store.names("") == []
    store.write("b", b"two")
    assert store.read("b") == b"two"


def test_each_word_is_one_request_of_an_object_store(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3.bucket("counted") + "/of/shop"
    with SlowLink(s3.port) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link.url)
        store = open_store(url)
        store.write("a", b"one")
        for ask in (
            lambda: store.read("a"),
            lambda: store.read("not there"),
            lambda: store.write("b", bytes(1_000_000)),
            lambda: store.read("b"),
            lambda: store.create("c", b"three"),
            lambda: store.create("c", b"four"),
            lambda: store.names(""),
            lambda: store.remove("a"),
        ):
            before = link.connections
            with suppress(FileNotFoundError):
                ask()
            # moto's server ends a connection with each answer.
            assert link.connections == before + 1


def test_what_is_sent_in_parts_is_whole(s3: S3Server) -> None:
    store, data = open_store(s3.bucket("parts")), bytes(range(256)) * (3 * PART_BYTES // 256) + b"end"
    for _ in range(2):
        store.write("bases/1", data)
        assert store.read("bases/1") == data and store.names("") == ["bases/1"]


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
        store = open_store(url)
        store.write("a", b"one")
        assert store.read("a") == b"one"
    else:
        with pytest.raises(UnusablePlace, match="there are no credentials") as refused:
            open_store(url)
        assert "AWS_PROFILE" in str(refused.value)


def test_a_url_that_nothing_reaches_says_so_without_its_password() -> None:
    with pytest.raises(UnusablePlace, match="nowhere://host/x cannot be opened") as refused:
        open_store("nowhere://ann:secret@host/x")
    assert "secret" not in str(refused.value)
