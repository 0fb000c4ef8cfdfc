"""A serving host with a directory of its own, which is kept in step with the trainer's registry over S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import forget_memory
from tests.e2e.hosts import ServingHost
from tests.e2e.running import SHORT, Loop, until
from tests.one_s3 import S3Server

USER = "one-of-many-hosts@example.org"


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def place(s3: S3Server) -> str:
    return s3.bucket("hosts") + "/registry"


@pytest.fixture
def loop(tmp_path: Path, place: str) -> Iterator[Loop]:
    # Durable versions are to be there sooner than the next one comes, also where the store is slow.
    made = Loop(tmp_path, {**SHORT, "registry.durable_s": 5, "paths.shared_registry": place})
    made.start()
    yield made
    made.stop()
    forget_memory(tmp_path)


@pytest.fixture
def host(loop: Loop, place: str, tmp_path: Path) -> Iterator[ServingHost]:
    made = ServingHost("other", tmp_path / "other", loop, {"paths.shared_registry": place})
    made.start()
    until(lambda: made.profile(USER), made.said)
    yield made
    made.stop()


@pytest.mark.nightly
def test_answers_go_on_while_the_store_is_away_and_versions_come_when_it_is_back(
    loop: Loop, host: ServingHost, s3: S3Server
) -> None:
    s3.pause()
    try:
        # The trainer and its own host go on.
        at = loop.answer_trained_on(USER, loop.click([(USER, "lamp", "light", "view")]))["version"]["number"]
        answer = host.profile(USER)
        assert answer is not None and answer["version"]["number"] < at
        until(lambda: host.ready, host.said)
    finally:
        s3.go_on()
    until(lambda: (host.profile(USER) or {"version": {"number": 0}})["version"]["number"] >= at, host.said)
