"""Serving under fire: a trainer's hand that publishes one version after another, clients that ask meanwhile, and each answer computed again.

An answer that carries its version, moment, positions and features says all that
it was made of: what the model itself says of these, with the weights and rows
that this version was given, is what the answer must be.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson
from prometheus_client import CollectorRegistry

from deploy.serving.following.versions import VersionFollower
from state.config.settings import Settings
from state.events.identity import Salt, public_id, user_id
from state.features.spec import FeatureSpec, Mask
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import HISTORIES, ROWS
from state.metrics import ApplierMetrics
from state.process.environment import wall_ms
from state.registry.control import start
from state.registry.manifest import Draft, LogRange
from state.registry.registry import Registry
from state.rows.store import RowStore
from tests.deploy.serving.stocked import (
    CATEGORIES,
    MAP,
    NOW_MS,
    POPULAR,
    SALT_KEY,
    SOURCE,
    clicks,
    model_inputs,
    row_of,
)
from tests.vectors import vectorise

USERS = ["ann", "bob", "nobody"]
"""With a row and clicks, with clicks, with neither."""
DURABLE_EACH = 25
RECENT = 75
"""Versions that stay as recent ones."""
CHECKED = f"?at={NOW_MS}&fields=features,vector,sources&top=100"
CHECKED_EACH = 4
CONNECTIONS = 8
_RATIO = 1e-3
CLOCK = orjson.dumps({"event_ms": NOW_MS, "accepted_ms": NOW_MS})


@dataclass
class Line:
    """What versions of one model have in common.

    Attributes:
        model: Its ranker.
        content: Its program.
        spec: Its features.
    """

    model: Any
    content: bytes
    spec: FeatureSpec

    def __post_init__(self) -> None:
        from trainer.publications import ProbedRanker

        self.weights = self.model.weights()
        self._probed = ProbedRanker(self.model, self.model.predict)

    def probe(self) -> dict[str, Any]:
        """With the model's weights of now."""
        return self._probed.answers()

    def set(self, seed: int) -> dict[str, Any]:
        """Gives the model the weights of a version, which are returned."""
        weights = {
            name: (value * np.float32(1 + seed * _RATIO)).astype(np.float32) for name, value in self.weights.items()
        }
        self.model.set_weights(weights)
        return weights


@dataclass
class Trainer:
    """Publishes versions that tell themselves apart in each row and weight.

    Attributes:
        registry: Where to.
        lines: The models.
        made: By version, which line and which number of its own it has.
        dim: Width of the rows.
    """

    registry: Registry
    lines: list[Line]
    dim: int
    made: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._programs = [self.registry.specs.add_program(line.content) for line in self.lines]
        for line in self.lines:
            self.registry.specs.add_spec(line.spec.digest, {"spec": line.spec.to_json()}, lambda _: None)
        self.registry.propose(start(actor="test", reason="fire", now_ms=0))
        self._durable = self._last = 0

    def publish(self, line: int = 0, spoil: Callable[[dict[str, Any]], None] = lambda _: None) -> int:
        """One more version, recent, and each so manieth durable too; the first one is a base. Returns its number.

        Args:
            line: Whose.
            spoil: Changes its tensors after the probe was answered.
        """
        from trainer.versions import content

        seed = len(self.made) + 1
        tensors = self._tensors(line, seed)
        spoil(tensors)
        draft = Draft(
            "recent", 1, self._last or None, LogRange(), ((SOURCE, 1000 + seed),), seed, seed, NOW_MS - 2000, NOW_MS - 3000,
            self.lines[line].spec.digest, self._programs[line], Salt(SALT_KEY).fingerprint,
        )  # fmt: skip
        if not self._last:
            made = self.registry.publish(replace(draft, kind="base"), content.encode(tensors))
            self._durable = made.version
        else:
            made = self.registry.publish(draft, content.encode_served(tensors))
            if seed % DURABLE_EACH == 0:
                durable = replace(draft, kind="delta", parent=self._durable)
                self._durable = self.registry.publish(durable, content.encode(tensors), made).version
            for old in self.registry.recents()[:-RECENT]:
                self.registry.remove("recent", old)
        self._last, self.made[made.version] = made.version, (line, seed)
        return made.version

    def _tensors(self, line: int, seed: int) -> dict[str, Any]:
        made = {f"dense.{name}": value for name, value in self.lines[line].set(seed).items()}
        for table, names in (("user", ["ann"]), ("category", CATEGORIES), ("item", ["i1"])):
            ids = [user_id(Salt(SALT_KEY), name) if table == "user" else public_id(name) for name in names]
            made[f"{table}.ids"] = np.array(ids, np.uint64)
            made[f"{table}.rows"] = np.stack([self._row(table, name, seed) for name in names])
            made[f"{table}.removed"] = np.empty(0, np.uint64)
        made["popular"] = np.array([public_id(name) for name in POPULAR], np.uint64)
        return made | self.lines[line].probe()

    def _row(self, table: str, name: str, seed: int) -> Any:
        return np.resize(row_of(table, name, seed), self.dim)

    def differences(self, answers: Iterable[dict[str, Any]], histories: dict[str, Any]) -> list[str]:
        """What of answers is not what their versions say, in words; nothing where all is.

        Args:
            answers: As asked with `CHECKED`.
            histories: All events of each user, in their order.
        """
        found: list[str] = []
        by_version: dict[int, list[dict[str, Any]]] = {}
        for one in answers:
            by_version.setdefault(one["version"]["number"], []).append(one)
        for version, ours in by_version.items():
            found += [f"version {version}, {one}" for one in self._of_version(version, ours, histories)]
        return found

    def _of_version(self, version: int, answers: list[dict[str, Any]], histories: dict[str, Any]) -> Iterator[str]:
        index, seed = self.made[version]
        line, events = self.lines[index], [histories[one["user_id"]] for one in answers]
        # How many clicks there were already is what an answer says of it; all else follows.
        seen = [one["features"][line.spec.names[0]] for one in answers]
        vectors = [
            vectorise(each[:count], NOW_MS, None, Mask.NONE, line.spec)
            for each, count in zip(events, seen, strict=True)
        ]
        line.set(seed)
        users = [one["user_id"] for one in answers]
        inputs = model_inputs(line.model, users, vectors, lambda table, name: self._row(table, name, seed))
        outputs = {name: np.asarray(value) for name, value in line.model.predict(inputs).items()}
        for place, (one, vector) in enumerate(zip(answers, vectors, strict=True)):
            who = f"{one['user_id']} after {seen[place]} clicks"
            if one["at_ms"] != NOW_MS or list(one["version"]["sources"].values()) != [1000 + seed]:
                yield f"{who}: of {one['at_ms']} and {one['version']}"
            if list(one["features"].items()) != list(zip(line.spec.names, vector.features.tolist(), strict=True)):
                yield f"{who}: other features"
            if np.abs(np.array(one["vector"]) - outputs["vector"][place]).max() > 1e-5:
                yield f"{who}: another vector"
            shares = _shares(vector.recent_categories, {name: value[place] for name, value in outputs.items()})
            given = {each["id"]: each["probability"] for each in one["interests"]}
            if given.keys() != shares.keys() or any(abs(given[name] - shares[name]) > 1e-5 for name in shares):
                yield f"{who}: other interests"


def _shares(recent: Any, outputs: dict[str, Any]) -> dict[str, float]:
    """The probability of each candidate by id."""
    own = [one for one in recent.tolist() if one]
    candidates = {category: outputs["recent_logits"][slot] for slot, category in enumerate(own)}
    for slot, name in enumerate(POPULAR):
        candidates.setdefault(public_id(name), outputs["popular_logits"][slot])
    logits = np.array(list(candidates.values()), np.float64)
    shares = np.exp(logits - logits.max())
    return dict(zip((f"{one:016x}" for one in candidates), (shares / shares.sum()).tolist(), strict=True))


class HostWriter:
    """What an applier does on a host: versions into rows, clicks into histories.

    Args:
        settings: With the state directory, and the salt in it.
    """

    def __init__(self, settings: Settings) -> None:
        folder = settings.serving_dir
        folder.mkdir(parents=True, exist_ok=True)
        self.rows, self.histories = RowStore(folder / ROWS, 8 * MAP), HistoryStore(folder / HISTORIES, map_bytes=MAP)
        self.metrics = ApplierMetrics(CollectorRegistry())
        self.events = {user: clicks([]) for user in USERS}
        self._settings, self._closed = settings, False
        self.restart()
        self.histories.commit(Appends.none(), (), {"caught_up": b"1", "clock": CLOCK})

    def restart(self) -> None:
        """The follower begins again on the same rows."""
        self.follower = VersionFollower(self.rows, self._settings, self.metrics, wall_ms)

    def settle(self) -> int:
        """Takes up what there is; returns the version that answers."""
        while self.follower.step():
            pass
        self.follower.step()
        self.follower.sweep()
        return 0 if self.follower.served is None else self.follower.served.version

    def click(self, user: str, category: str, age_ms: int) -> None:
        """One more event of a user."""
        events = clicks([(category, "i1", age_ms)], first_offset=len(self.events[user]))
        self.histories.commit(Appends.of(np.array([user_id(Salt(SALT_KEY), user)], np.uint64), events))
        self.events[user] = np.concatenate([self.events[user], events])

    def close(self) -> None:
        """Closes the stores."""
        if not self._closed:
            self._closed = True
            self.rows.close()
            self.histories.close()


@dataclass
class Asked:
    """What came of asking.

    Attributes:
        count: Of answers.
        failed: Requests not answered with 200, by what came.
        checked: Bodies of those asked with `CHECKED`.
    """

    count: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    checked: list[bytes] = field(default_factory=list)

    def answers(self) -> list[dict[str, Any]]:
        """The checked ones that differ in more than the age of their version."""
        found = {}
        for body in self.checked:
            one = orjson.loads(body)
            one["version"].pop("age_s")
            found[orjson.dumps(one)] = one
        return list(found.values())


class Fire(threading.Thread):
    """Asks for profiles `rate` times a second in a thread of its own while it is open; the answers do not delay it."""

    def __init__(self, port: int, rate: float) -> None:
        super().__init__(daemon=True)
        self._port, self._rate, self._ended, self.asked = port, rate, threading.Event(), Asked()
        self._numbers = itertools.count()

    def run(self) -> None:
        asyncio.run(self._ask())

    async def _ask(self) -> None:
        begun_s = time.perf_counter()
        connections = (self._on_one_connection(begun_s) for _ in range(CONNECTIONS))
        results = await asyncio.gather(*connections, return_exceptions=True)
        self.asked.failed.update(repr(one) for one in results if one is not None)

    async def _on_one_connection(self, begun_s: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        while not self._ended.is_set():
            number = next(self._numbers)
            due_s = begun_s + number / self._rate
            if (early_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(early_s)
            user, fields = USERS[number % len(USERS)], "" if number % CHECKED_EACH else CHECKED
            writer.write(f"GET /v1/profiles/{user}{fields} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
            self.asked.count += 1
            if not head.startswith(b"HTTP/1.1 200"):
                self.asked.failed[f"{head[:20]!r} {body[:200]!r}"] += 1
            elif fields:
                self.asked.checked.append(body)
        writer.close()

    def __enter__(self) -> Asked:
        self.start()
        return self.asked

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
