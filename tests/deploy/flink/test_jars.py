"""Flink's jars: those of the lock file with their digests, merged into one that is made once and again where it is damaged."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import pytest

from deploy import java_jars
from deploy.flink import jars
from deploy.flink.jars import SERVICES, merge
from state.errors import FlinkFailed


def jar(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for name, text in files.items():
            made.writestr(name, text)
    return path


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock file with two jars that are there."""
    found = {
        "org.a:one:1": jar(tmp_path / "one.jar", {"a/One.class": "1", f"{SERVICES}a.Store": "a.One\n"}),
        "org.a:two:1": jar(tmp_path / "two.jar", {"a/Two.class": "2", f"{SERVICES}a.Store": "a.Two"}),
    }
    monkeypatch.setattr(java_jars, "_repository", lambda: found.__getitem__)
    lock = tmp_path / "jars.lock"
    java_jars.write(lock, {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()})
    return lock


def test_the_lock_file_has_what_a_cluster_is_made_of() -> None:
    locked = java_jars.locked(jars.LOCK)
    assert set(jars.CONSISTS_OF) <= set(locked)
    assert [digest for digest in locked.values() if not re.fullmatch(r"[0-9a-f]{64}", digest)] == []
    for part in ("flink-runtime", "flink-streaming-java", "flink-rpc-akka-loader", "beam-runners-java-job-service"):
        assert any(name.split(":")[1] == part for name in locked), part
    # Two bindings would each take the other's lines.
    assert [name for name in locked if "slf4j-simple" in name or "log4j-slf4j" in name] == [
        "org.slf4j:slf4j-simple:1.7.30"
    ]


def test_services_of_all_jars_are_found_and_the_first_of_two_files_counts(tmp_path: Path) -> None:
    first = jar(tmp_path / "1.jar", {"a/A.class": "first", f"{SERVICES}a.Store": "# one\na.One", "META-INF/A.RSA": "x"})
    second = jar(tmp_path / "2.jar", {"a/A.class": "second", f"{SERVICES}a.Store": "a.Two\na.One\n", "b/": ""})
    merge([first, second], tmp_path / "merged.jar")
    with zipfile.ZipFile(tmp_path / "merged.jar") as merged:
        assert merged.testzip() is None
        assert merged.namelist() == ["META-INF/MANIFEST.MF", "a/A.class", f"{SERVICES}a.Store"]
        assert merged.read("a/A.class") == b"first"
        assert merged.read(f"{SERVICES}a.Store") == b"a.One\na.Two\n"


def test_it_is_merged_once_and_again_where_it_is_damaged(repository: Path, tmp_path: Path) -> None:
    said: list[str] = []
    made = jars.merged_jar(said.append, tmp_path / "cache", repository)
    whole = made.read_bytes()
    assert len(said) == 1 and "merging 2 jars" in said[0]
    assert jars.merged_jar(said.append, tmp_path / "cache", repository) == made
    assert len(said) == 1
    made.write_bytes(whole[:-1])
    assert jars.merged_jar(said.append, tmp_path / "cache", repository).read_bytes() == whole
    assert len(said) == 2
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".jar", ".sha256"]


def test_without_room_for_the_merged_one_the_error_says_where(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no directory")
    with pytest.raises(FlinkFailed, match=r"cannot be merged .*access rights of .*cache"):
        jars.merged_jar(print, tmp_path / "cache", repository)
