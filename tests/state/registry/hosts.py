"""Hosts of a shared registry in one process: a trainer's directory with its senders, and copies of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from state.errors import UnknownVersion, UnusablePlace
from state.file_store import FileStore
from state.registry import sharing
from state.registry.control import start
from state.registry.manifest import Draft, Kind, Manifest
from state.registry.registry import SERVING, TRAINING, Registry
from state.registry.sync import SILENT_S, Copier, DurableSender, RecentSender
from tests.state.registry.test_registry import WHO
from tests.state.registry.test_registry import draft as some_draft

Answer = TypeVar("Answer")


@contextmanager
def away(place: Path) -> Iterator[None]:
    """A file where the place's directory was: nobody can list, read or write it, whatever rights they have."""
    aside = place.with_name("aside")
    place.rename(aside)
    place.write_bytes(b"")
    yield
    place.unlink()
    aside.rename(place)


@dataclass
class Elapsed:
    """Monotonic seconds that tests move."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


class Link:
    """A way to a place that can be cut, and that counts what is asked. See `FileStore`.

    Attributes:
        cut_after: How many requests still pass; None for all.
        asked: What was asked.
        passes: Is called with each request.
    """

    def __init__(self, place: FileStore) -> None:
        self._place, self.name = place, place.name
        self.cut_after: int | None = None
        self.asked: list[str] = []
        self.passes: Callable[[], object] = lambda: None

    def names(self, folder: str) -> list[str]:
        return self._over("names", folder, lambda: self._place.names(folder))

    def read(self, name: str) -> bytes:
        return self._over("read", name, lambda: self._place.read(name))

    def write(self, name: str, data: bytes) -> None:
        self._over("write", name, lambda: self._place.write(name, data))

    def create(self, name: str, data: bytes) -> bool:
        return self._over("create", name, lambda: self._place.create(name, data))

    def tagged(self, name: str) -> tuple[bytes, str]:
        return self._over("read", name, lambda: self._place.tagged(name))

    def swap(self, name: str, data: bytes, tag: str) -> str:
        return self._over("write", name, lambda: self._place.swap(name, data, tag))

    def remove(self, name: str) -> None:
        self._over("remove", name, lambda: self._place.remove(name))

    def _over(self, what: str, name: str, ask: Callable[[], Answer]) -> Answer:
        if self.cut_after is not None:
            if self.cut_after <= 0:
                raise UnusablePlace(f"{self.name} cannot {what} {name} (cut off)", "mend the link")
            self.cut_after -= 1
        self.asked.append(f"{what} {name}")
        self.passes()
        return ask()


class Origin:
    """A trainer's host."""

    def __init__(self, path: Path, url: str, link: Callable[[FileStore], FileStore] = lambda place: place) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.url, self.elapsed = url, Elapsed()
        found, self.claim, _ = sharing.own(path, url, lambda: 7)
        self.place = link(found)
        self.registry = Registry(path)
        self.registry.directory.shared = self.place
        self.program = self.registry.specs.add_program(b"a program")
        if self.registry.control() is None:
            self.registry.propose(start(**WHO))
        self.restart()

    def restart(self) -> None:
        """The senders begin again, as after a kill."""
        self.durable = DurableSender(self.registry.path, self.place, self.claim)
        self.recent = RecentSender(
            self.registry.path, self.place, self.claim, lambda: self.durable.serial, self.elapsed
        )

    def draft(self, parent: int | None, kind: Kind = "delta") -> Draft:
        return replace(some_draft(parent), kind="base" if parent is None else kind, program=self.program)

    def publish(self, parent: int | None) -> Manifest:
        """A durable version."""
        files = {SERVING: b"rows after %d" % (parent or 0), TRAINING: b"more after %d" % (parent or 0)}
        return self.registry.publish(self.draft(parent), files)

    def publish_recent(self, parent: int, durable_after: int | None = None) -> Manifest:
        """A recent version, and the same one durable where it is one over another."""
        made = self.registry.publish(self.draft(parent, "recent"), {SERVING: b"rows since %d" % parent})
        if durable_after is not None:
            twin = replace(self.draft(durable_after), parent=durable_after)
            self.registry.publish(twin, {SERVING: b"rows since %d" % durable_after, TRAINING: b"more"}, made)
        return made

    def send(self) -> None:
        self.recent.send()
        while self.durable.send():
            pass


class CopyHost:
    """A serving host."""

    def __init__(self, path: Path, url: str, place: FileStore) -> None:
        sharing.bind(path, url)
        self.elapsed, self.place = Elapsed(), place
        self.registry = Registry(path)
        self.registry.directory.shared = place
        self.restart()

    def restart(self) -> None:
        """The copier begins again."""
        self.copier = Copier(self.registry.path, self.place, self.elapsed)

    def look(self) -> None:
        """One look after a silence: all that is there is found."""
        self.elapsed.now_s += SILENT_S
        self.copier.step()

    def content(self) -> dict[int, list[bytes]]:
        """All bytes of each durable version's chain, each compared with its digest."""
        found = {}
        for version in self.registry.versions():
            try:
                base, deltas = self.registry.chain(version)
            except UnknownVersion:
                # Kept, and nothing leads to it any more.
                continue
            parts = (base, *deltas)
            found[version] = [self.registry.read(part, name) for part in parts for name in sorted(part.files)]
        return found
