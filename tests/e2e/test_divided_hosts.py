"""Four hosts with halves of the users: killed, added, removed, pinned, rolled back and erased from, without a failed answer.

Beside the loop's own host, which has all users, and which the others' answers are compared with. All processes are real,
on one machine with one Kafka.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest

from deploy.serving.requests.grpc_server import message
from deploy.watch.scrape import serving_address
from springtide_client import Client, ClientError
from state.process.network import free_port
from tests.disks import forget_memory
from tests.e2e.hosts import ServingHost
from tests.e2e.running import SHORT, Loop, until

USERS = [f"divided-{number}@example.org" for number in range(24)]
PAUSE_S, DIFFERING_S = 0.05, 60.0


def answered(client: httpx.Client, method: str, url: str, **body: Any) -> httpx.Response:
    """One call over HTTP; an answer with an error is raised."""
    return client.request(method, url, **body).raise_for_status()


def call(host: Loop | ServingHost, method: str, response: str, **fields: Any) -> Any:
    """One call over gRPC."""
    asked, answered = (message(f"springtide.v1.{name}") for name in (f"{method}Request", response))
    with grpc.insecure_channel(f"127.0.0.1:{host.settings.serving.grpc_port}") as channel:
        ask = channel.unary_unary(f"/springtide.v1.Profiles/{method}", asked.SerializeToString, answered.FromString)
        return ask(asked(**fields), timeout=30.0)


class Asking(threading.Thread):
    """Asks for all users in turn through the fronts, as clients do; keeps each failure.

    Attributes:
        fronts: The hosts that are asked.
    """

    def __init__(self, fronts: list[ServingHost]) -> None:
        super().__init__(daemon=True)
        self.fronts, self.failed, self.answered = fronts, list[str](), 0
        self._stopping = threading.Event()

    def run(self) -> None:
        """Asks until `stop`."""
        with httpx.Client(timeout=30.0) as http, Client(address(self.fronts[0]), timeout_s=30.0, route=True) as client:
            turn = 0
            while not self._stopping.wait(PAUSE_S):
                turn += 1
                host, user = self.fronts[turn // 5 % len(self.fronts)], USERS[turn % len(USERS)]
                front = address(host)
                asked: list[Callable[[], object]] = [
                    partial(answered, http, "GET", f"{front}/v1/profiles/{user}"),
                    partial(answered, http, "GET", f"{front}/v1/recommendations/{user}"),
                    partial(answered, http, "POST", f"{front}/v1/profiles:batch", json={"users": USERS}),
                    partial(call, host, "Recommend", "RecommendResponse", user_id=user),
                    partial(
                        call,
                        host,
                        "BatchGetProfiles",
                        "BatchGetProfilesResponse",
                        questions=[{"user_id": one} for one in USERS],
                    ),
                ]
                try:
                    asked[turn % len(asked)]()
                    self._count(True, "")
                except (httpx.HTTPError, grpc.RpcError) as error:
                    self._count(False, f"{front}: {error}")
                try:
                    self._count(client.profile(user).user_id == user, f"another user than {user}")
                except ClientError as error:
                    self._count(False, f"client: {error}")

    def _count(self, good: bool, what: str) -> None:
        self.answered += good
        if not good:
            self.failed.append(what)

    def stop(self) -> None:
        self._stopping.set()
        self.join(60.0)


def address(host: ServingHost) -> str:
    return serving_address(host.settings)


def kill(host: ServingHost) -> None:
    """Kills all of its processes at once, as a machine that goes down does."""
    assert host.process is not None
    parent = psutil.Process(host.process.pid)
    for process in (parent, *parent.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    host.process.wait(60.0)
    host.process = None


def without_age(answer: Mapping[str, Any]) -> dict[str, Any]:
    version = {name: value for name, value in answer["version"].items() if name != "age_s"}
    return {**answer, "version": version}


@pytest.fixture
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    directory = tmp_path_factory.mktemp("loop")
    made = Loop(directory, {**SHORT, "shoppers.rate": 20, "history.snapshot_every_s": 10})
    made.start()
    yield made
    made.stop()
    forget_memory(directory)


@pytest.mark.nightly
def test_halves_of_the_users_on_four_hosts_that_come_and_go_answer_like_one_host_without_a_failed_answer(
    loop: Loop, tmp_path: Path
) -> None:
    hosts = {
        name: ServingHost(name, tmp_path / name, loop, {"serving.shares": shares, "serving.grpc_port": free_port()})
        for name, shares in (("a", "0-31"), ("b", "0-31"), ("c", "32-63"), ("d", "32-63"), ("e", "0-31"))
    }

    def listed(section: str = "hosts") -> Any:
        return (loop.springtide("status") or {})[section]

    def live() -> set[str]:
        found = listed() or {"hosts": []}
        return {one["address"] for one in found["hosts"] if one["live"]}

    def live_are(*names: str) -> None:
        wanted = {address(hosts[name]) for name in names}
        until(lambda: live() == wanted, lambda: f"live: {live()}, wanted {wanted}\n{hosts[names[0]].said()}")

    def differing(*names: str, moment: str) -> list[str]:
        """The first answer of a host that is not that of the loop's own host: its fields that differ."""
        for user in USERS:
            whole = loop.profile(user, at=moment)
            for name in names:
                answer = hosts[name].profile(user, at=moment)
                if whole is None or answer is None:
                    return [f"{name}: {answer}, {whole}"]
                ours, theirs = without_age(whole), without_age(answer)
                if ours != theirs:
                    return [
                        f"{name}: {one}: {theirs[one]}, not {ours[one]}" for one in ours if ours[one] != theirs[one]
                    ]
        return []

    def are_same(*names: str, moment: str) -> None:
        until(lambda: not differing(*names, moment=moment), lambda: str(differing(*names, moment=moment)), DIFFERING_S)

    try:
        for name in "abcd":
            hosts[name].start()
        live_are(*"abcd")
        ends = loop.click([(user, f"lamp-{number % 5}", "light", "view") for number, user in enumerate(USERS)])
        learned = loop.answer_trained_on(USERS[0], ends)["version"]["number"]
        number, _ = loop.kept()
        assert number >= learned
        loop.springtide("pin", str(number), "--reason", "a comparison")
        answer = loop.profile(USERS[0])
        assert answer is not None
        moment = str(answer["at_ms"])
        are_same(*"abcd", moment=moment)
        sizes = {name: hosts[name].metrics("springtide_serving_history_users") for name in "ac"}
        of_all = loop.metrics("applier").value("springtide_serving_history_users")
        assert of_all is not None and 0 < min(sizes.values()) <= max(sizes.values()) < of_all

        def over_grpc(host: Loop | ServingHost) -> Any:
            questions = [{"user_id": user, "at_ms": int(moment)} for user in USERS]
            answer = call(host, "BatchGetProfiles", "BatchGetProfilesResponse", questions=questions)
            for profile in answer.profiles:
                profile.version.ClearField("age_s")
            return answer

        assert over_grpc(hosts["a"]) == over_grpc(hosts["c"]) == over_grpc(loop)

        asking = Asking([hosts[name] for name in "cdb"])
        asking.start()
        # Killed: the table still lists it for a while.
        kill(hosts["a"])
        # Added: it takes requests once it has read the log.
        hosts["e"].start()
        live_are(*"bcde")
        # Removed: it leaves the table, and then drains.
        asking.fronts = [hosts[name] for name in "cde"]
        hosts["b"].stop()
        live_are(*"cde")
        assert listed()["with_one_host"] == [*range(32)]
        assert "one host alone holds 32 of 64 shares of users" in [one["text"] for one in listed("problems")]
        are_same(*"cde", moment=moment)

        # Rolled back: a new epoch on all hosts.
        loop.springtide("follow", "--reason", "a comparison ends")
        back, epoch = loop.kept()
        loop.springtide("rollback", "--to", str(back), "--reason", "a test", "--follow-when-caught-up", "--wait", "60")
        followed = [loop.profile, *(hosts[name].profile for name in "cde")]
        until(lambda: all((one(USERS[0]) or {"version": {"epoch": 0}})["version"]["epoch"] > epoch for one in followed), "no new epoch")  # fmt: skip

        # Erased: unknown through each host; the host that was killed is waited for.
        loop.springtide("erase", "--user", USERS[0], "--reason", "asked to")
        until(lambda: all((one(USERS[0]) or {"cold_start": False})["cold_start"] for one in followed), "still known")

        def holding() -> set[str]:
            found = loop.springtide("erase", "--status")["holding"]
            return {one["where"] for one in found if "serving-" in one["where"] and "free pages" not in one["holds"]}

        until(lambda: len(holding()) == 2, lambda: f"not the two hosts that are gone: {holding()}")
        asking.stop()
        assert asking.failed == [] and asking.answered > 100
        hosts["e"].stop()
        live_are(*"cd")
        refused = [one for one in (hosts["c"].profile(user) for user in USERS[1:]) if one is None]
        assert 0 < len(refused) < len(USERS) - 1, "the users of a share without a host, and no others"
        assert listed()["without_host"] == [*range(32)]
    finally:
        for host in hosts.values():
            host.stop()
        forget_memory(tmp_path)
