"""Three serving hosts of one system, one of which has the registry over S3: versions, pins and erasures reach all of them.

The first host is the trainer's own. The second one reads the same registry
directory, as on a shared file system. The third has a directory of its own,
which is kept in step with an S3 store; so has one that is there for the last test,
over a slow link: it would be a host that holds a copy of who is erased.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from state.registry.registry import Registry
from tests.disks import forget_memory
from tests.e2e.hosts import ServingHost
from tests.e2e.running import SHORT, Loop, until
from tests.one_s3 import S3Server
from tests.slow_link import SlowLink

USER = "one-of-many-hosts@example.org"
SLOW_BYTES_S = 600_000
"""Of a link: durable versions pass, a second's recent ones do not."""
Asked = Callable[..., dict[str, Any] | None]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(scope="module")
def place(s3: S3Server) -> str:
    return s3.bucket("hosts") + "/registry"


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory, place: str) -> Iterator[Loop]:
    directory = tmp_path_factory.mktemp("hosts")
    # Durable versions are to be there sooner than the next one comes, also where the store is slow.
    made = Loop(directory, {**SHORT, "registry.durable_s": 5, "paths.shared_registry": place})
    made.start()
    yield made
    made.stop()
    forget_memory(directory)


@pytest.fixture(scope="module")
def hosts(loop: Loop, place: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServingHost]]:
    """The second and the third."""
    folder = tmp_path_factory.mktemp("further")
    made = [
        ServingHost("second", folder / "second", loop, {}),
        ServingHost("third", folder / "third", loop, {"paths.shared_registry": place}),
    ]
    # The second one is of the same directory: its processes stand by while the trainer keeps it in step.
    for one in made:
        one.start()
    for one in made:
        reached([one.profile], lambda answer: answer is not None, one.said)
    yield made
    for one in made:
        one.stop()
    forget_memory(folder)


def reached(asked: list[Asked], wanted: Callable[[Any], bool], more: Callable[[], str] = str) -> list[dict[str, Any]]:
    """The answers about the user, once each is as wanted."""

    def look() -> list[dict[str, Any]] | None:
        answers = [ask(USER) for ask in asked]
        found = [one for one in answers if one is not None and wanted(one)]
        return found if len(found) == len(asked) else None

    def which() -> str:
        return f"{[(ask(USER) or {}).get('version') for ask in asked]} {more()}"

    return until(look, which)


def at_least(number: int) -> Callable[[Any], bool]:
    """Whether an answer is by this version or a later one."""
    return lambda answer: bool(answer["version"]["number"] >= number)


def all_of(loop: Loop, hosts: list[ServingHost]) -> list[Asked]:
    return [loop.profile, *(one.profile for one in hosts)]


@pytest.mark.nightly
def test_answers_go_on_while_the_store_is_away_and_versions_come_when_it_is_back(
    loop: Loop, hosts: list[ServingHost], s3: S3Server, place: str
) -> None:
    third = hosts[1]
    s3.pause()
    try:
        # The trainer and its own host go on.
        at = loop.answer_trained_on(USER, loop.click([(USER, "lamp", "light", "view")]))["version"]["number"]
        answer = third.profile(USER)
        assert answer is not None and answer["version"]["number"] < at
        until(lambda: third.ready, third.said)
    finally:
        s3.go_on()
    reached([third.profile], lambda one: one["version"]["number"] >= at, third.said)


@pytest.mark.nightly
def test_an_erased_user_is_nobody_on_all_hosts_and_status_names_the_host_that_is_away(
    loop: Loop, hosts: list[ServingHost]
) -> None:
    everywhere, third = all_of(loop, hosts), hosts[1]
    reached(everywhere, lambda one: one["known"])
    third.stop()
    loop.springtide("erase", "--user", USER, "--reason", "asked to")
    reached(everywhere[:2], lambda one: one["cold_start"])

    def holding() -> list[str]:
        found = loop.springtide("erase", "--status")["holding"]
        return [one["where"] for one in found if one["where"].startswith("serving-")]

    until(lambda: len(holding()) == 1, "not one host, and only one, still holds a copy")
    assert str(third.settings.serving_dir) in str(loop.springtide("erase", "--status")["holding"])
    third.start()
    reached(everywhere, lambda one: one["cold_start"])
    until(lambda: not [one for one in loop.springtide("erase", "--status")["holding"] if one["where"].startswith("serving-") and one["holds"] != "bytes on free pages of its stores"], "a host still has the user")  # fmt: skip


@pytest.mark.nightly
def test_over_a_slow_link_a_new_host_begins_versions_and_a_pin_come_and_answers_go_on(
    loop: Loop, s3: S3Server, place: str, tmp_path: Path
) -> None:
    def sent_bytes() -> float:
        return loop.metrics("trainer").value("springtide_shared_bytes_total", direction="sent") or 0.0

    with SlowLink(s3.port, SLOW_BYTES_S) as link:
        shared = {"paths.shared_registry": place}
        slow = ServingHost("slow", tmp_path, loop, shared, {"AWS_ENDPOINT_URL": link.url})
        slow.start()
        try:
            reached([slow.profile], lambda answer: True, slow.said)
            before = sent_bytes(), link.carried_bytes
            answered = list[bool]()

            def asked(user: str) -> dict[str, Any] | None:
                answer = slow.profile(user)
                answered.append(answer is not None)
                return answer

            for _ in range(2):
                ends = loop.click([(USER, "lamp", "light", "view")])
                learned = loop.answer_trained_on(USER, ends)["version"]["number"]
                reached([asked], at_least(learned), slow.said)
            # One that the host knows, as an operator there would take it.
            number = Registry(slow.settings.registry_dir).versions()[-1]
            loop.springtide("pin", str(number), "--reason", "a test")
            reached([asked], lambda one: one["version"]["number"] == number, slow.said)
            sent, carried = sent_bytes() - before[0], link.carried_bytes - before[1]
            assert carried < sent, "the link carried all that was published: it was not slow"
            loop.springtide("follow", "--reason", "a test ends")
            reached([asked], lambda one: one["version"]["number"] > number, slow.said)
            assert all(answered)
        finally:
            slow.stop()
            forget_memory(tmp_path)
