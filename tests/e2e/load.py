"""Asks serving for profiles at a steady rate, singly and in batches, and keeps of each answer when it came and of which version."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

THREADS = 4
BATCH = 20  # more than are answered together
BATCH_EVERY = 20  # each so manieth request of a thread is a batch
PATIENCE_S = 30.0


class Seen(NamedTuple):
    """An answer: when it was asked for, when it came, and its version."""

    asked_s: float
    came_s: float
    version: int


@dataclass
class Load:
    """What came of the asking.

    Attributes:
        asked: Requests.
        failed: Those not answered with 200, by what came.
        mixed: Answers of more than one version.
        seen: The answers.
    """

    asked: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    mixed: int = 0
    seen: list[Seen] = field(default_factory=list)

    def last_other(self, version: int, since_s: float) -> float:
        """When the last answer came since then that was not of `version`; `since_s` where all were."""
        return max(
            (one.came_s for one in self.seen if one.version != version and one.came_s >= since_s), default=since_s
        )


class Asking:
    """Asks `rate` times a second, from several threads, while it is open.

    Args:
        host: Of a worker.
        port: Of it.
        rate: Requests a second, of all threads together.
        users: Whom it asks for.
    """

    def __init__(self, host: str, port: int, rate: float, users: list[str]) -> None:
        self._host, self._port, self._users = host, port, users
        self._every_s = THREADS / rate
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(THREADS)]
        self.load = Load()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self.load

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        with closing(http.client.HTTPConnection(self._host, self._port, timeout=PATIENCE_S)) as connection:
            self._ask_on(connection, number)

    def _ask_on(self, connection: http.client.HTTPConnection, number: int) -> None:
        next_s, asked = time.monotonic() + number * self._every_s / THREADS, 0
        while not self._finished.wait(max(0.0, next_s - time.monotonic())):
            next_s += self._every_s
            asked, asked_s = asked + 1, time.monotonic()
            try:
                versions, problem = self._ask(connection, asked), ""
            except (OSError, http.client.HTTPException, ValueError) as error:
                versions, problem = set(), f"{type(error).__name__} {error}"
                connection.close()
            with self._lock:
                self.load.asked += 1
                if not versions:
                    self.load.failed[problem or "no answer"] += 1
                    continue
                self.load.mixed += len(versions) > 1
                self.load.seen += [Seen(asked_s, time.monotonic(), version) for version in versions]

    def _ask(self, connection: http.client.HTTPConnection, asked: int) -> set[int]:
        """The versions in one answer."""
        if asked % BATCH_EVERY:
            connection.request("GET", f"/v1/profiles/{self._users[asked % len(self._users)]}")
        else:
            users = [self._users[(asked + place) % len(self._users)] for place in range(BATCH)]
            connection.request("POST", "/v1/profiles:batch", json.dumps({"users": users}))
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise ValueError(f"{answer.status} {body[:200]!r}")
        found = json.loads(body)
        return {one["version"]["number"] for one in found.get("profiles", [found])}
