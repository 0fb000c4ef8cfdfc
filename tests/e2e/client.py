"""A client that asks serving for profiles all the time, and knows when it may go without an answer."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from deploy.watch import scrape

EVERY_S = 0.05
PATIENCE_S = 30.0
TOGETHER = 8


@dataclass
class Answers:
    """What came of the asking.

    Attributes:
        given: Profiles answered.
        excused: Questions without an answer while the worker was dead or not back.
        failed: Questions without an answer for which there is no excuse, by reason.
        longest_s: The slowest answer.
        went_back: Answers by an older version than the answer before, where nobody rolled back to it.
        strayed: Answers by another version than the one that a rollback keeps them at.
        mixed: Answers about several users of which not all are of one version.
        version: The newest answer's version.
        seen: Of each answer when it was asked for, and its version.
        away_s: From the kill of the worker to its first answer, each time.
    """

    given: int = 0
    excused: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    went_back: int = 0
    strayed: int = 0
    mixed: int = 0
    version: int = 0
    seen: list[tuple[float, int]] = field(default_factory=list)
    away_s: list[float] = field(default_factory=list)


class Client:
    """Asks again and again from a thread of its own."""

    def __init__(self, base: str, users: list[str], every_s: float = EVERY_S) -> None:
        self._base, self._users, self._every_s = base, users, every_s
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="client", daemon=True)
        self._lock = threading.Lock()
        self._away_since_s: float | None = None
        self._dead_since_s: float | None = None
        self._targets: set[int] = set()
        self._stays_at: int | None = None
        self.answers = Answers()

    def start(self) -> None:
        """Begins to ask."""
        self._thread.start()

    def finish(self) -> Answers:
        """Ends the asking."""
        self._finished.set()
        self._thread.join()
        return self.answers

    def worker_dies(self) -> None:
        """Call before the worker is killed: from here on an answer may be missing."""
        with self._lock:
            if self._away_since_s is None:
                self._away_since_s = time.monotonic()
            self._dead_since_s = None

    def worker_is_dead(self) -> None:
        """Call when the worker is gone: the next answer is by its successor, who has no excuse afterwards."""
        with self._lock:
            self._dead_since_s = time.monotonic()

    def may_turn_to(self, version: int) -> None:
        """Call before a rollback to `version`: an answer by it is none that went back."""
        with self._lock:
            self._targets.add(version)

    def stay_at(self, version: int | None) -> None:
        """Call once answers are to be of `version` alone, None before they may follow: from the first one on no other may come."""
        with self._lock:
            self._stays_at = version

    @property
    def back(self) -> bool:
        """Whether the worker has answered since it was last killed."""
        return self._away_since_s is None

    def _run(self) -> None:
        asked = 0
        while not self._finished.wait(self._every_s):
            user = self._users[asked % len(self._users)]
            asked += 1
            url, body = f"{self._base}/v1/profiles/{user}", None
            if asked % TOGETHER == 0:
                url, body = f"{self._base}/v1/profiles:batch", {"users": self._users[:TOGETHER]}
            begun_s = time.monotonic()
            with self._lock:
                excused = self._away_since_s is not None
            status, said = ask(url, body)
            self._note(status, said, begun_s, time.monotonic(), excused)

    def _note(self, status: int, body: str, begun_s: float, ended_s: float, excused: bool) -> None:
        answers = self.answers
        with self._lock:
            if status != 200:
                # A kill under way of the question excuses it too.
                if excused or self._away_since_s is not None:
                    answers.excused += 1
                else:
                    answers.failed[f"{status} {body[:120]}"] += 1
                return
            answers.given += 1
            answers.longest_s = max(answers.longest_s, ended_s - begun_s)
            document = json.loads(body)
            versions = [int(one["version"]["number"]) for one in document.get("profiles", [document])]
            version = versions[0]
            answers.mixed += len({*versions}) > 1
            answers.went_back += version < answers.version and version not in self._targets
            answers.strayed += answers.version == self._stays_at != version
            answers.version = version
            answers.seen.append((begun_s, version))
            if self._away_since_s is not None and self._dead_since_s is not None and begun_s > self._dead_since_s:
                answers.away_s.append(ended_s - self._away_since_s)
                self._away_since_s = self._dead_since_s = None


def ask(url: str, document: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and body of a GET, or of a POST of `document`."""
    if document is None:
        return scrape.fetch(url, PATIENCE_S)
    request = urllib.request.Request(url, json.dumps(document).encode(), {"Content-Type": "application/json"})
    return scrape.fetch(request, PATIENCE_S)
