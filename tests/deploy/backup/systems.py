"""A system with made-up users, versions and control in a state directory, and what two of them must have alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deploy import cli
from state.config.loading import load
from state.config.settings import Settings
from state.disk.files import write as write_file
from state.events.identity import load_salt
from state.features.erased import MaskedUsers
from state.features.mask import Mask
from state.features.spec import EVENT
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import HISTORIES, LEADERS, WRITER
from state.positions import Range, Source
from state.registry.control import roll_back, start
from state.registry.registry import Registry
from tests.state.registry.test_registry import WHO, publish

TOPIC = "ab" * 16
NOW_MS = 1_795_719_672_345
USERS = 500


def settings_of(state: Path, *flags: str) -> Settings:
    return load(["--paths.state", str(state), *flags], {})


class System:
    """One state directory. Its histories are open while it is clicked only: one process opens a store once."""

    def __init__(self, state: Path) -> None:
        self.settings = settings_of(state)
        salt = load_salt(self.settings.salt_path)
        self.registry = Registry(self.settings.registry_dir)
        first = self.registry.propose(start(**WHO))
        for parent in range(3):
            publish(self.registry, parent or None)
        masked = Mask(users=MaskedUsers.of([7, 9]))
        self.registry.propose(roll_back(first, 2, masked, **WHO))
        publish(self.registry, 2, epoch=2)
        self.registry.specs.add_program(b"a program")

        def fill(folder: Path) -> None:
            (folder / "graph.pb").write_bytes(b"graph")

        self.registry.specs.add_spec("5" * 64, {"about": 1}, fill)
        self.registry.generations.add_outcome(2, "answered", {"seconds": 0.2})
        folder = self.settings.stream_dir
        folder.mkdir()
        self.commit(Appends.none(), (), {"salt": salt.fingerprint.encode()})
        self.read = 0
        self.click(range(1, USERS + 1))
        write_file(folder / WRITER, b"springtide-stream-0")
        write_file(folder / LEADERS, b"{}")

    def click(self, users: range) -> None:
        """Five clicks of each of these users, in one commit."""
        made, begin = np.zeros(5 * len(users), EVENT), self.read
        self.read += made.size
        made["offset"] = begin + np.arange(made.size)
        made["at_ms"] = NOW_MS + made["offset"]
        ids = np.repeat(np.array(users, np.uint64) << np.uint64(40), 5)
        source = Source(TOPIC, 0)
        self.commit(Appends.of(ids, made), [Range(source, begin, self.read, rows=made.size)])

    def commit(self, appends: Appends, ranges: Sequence[Range], extra: Mapping[str, bytes] | None = None) -> None:
        store = HistoryStore(self.settings.stream_dir / HISTORIES, self.settings.features.history, 1 << 28)
        store.commit(appends, ranges, extra)
        store.close()


def springtide(settings: Settings, *words: str, now_ms: int = NOW_MS) -> str:
    """What a command prints."""
    said: list[str] = []
    line = [*words, "--paths.state", settings.paths.state]
    cli.run(line, lambda module, rest: None, now_ms, said.append)
    return "\n".join(said)


def content(settings: Settings) -> dict[str, str]:
    """What a restored system must have as it was at the cut: histories by content, everything else by its bytes."""
    found = {}
    for path in sorted(settings.state_dir.glob(f"stream-*/{HISTORIES}")):
        store = HistoryStore(path, settings.features.history, 1 << 28, readonly=True)
        found[path.parent.name] = f"{store.digest()} {store.users()} {sorted(store.positions().items())} {store.totals}"
        store.close()
        for name in (WRITER, LEADERS):
            found[name] = (path.parent / name).read_text()
    registry = settings.registry_dir
    for folder in ("versions", "merged", "bases", "control", "masks", "outcomes", "programs", "specs", "gaps"):
        for file in sorted((registry / folder).rglob("*")):
            if file.is_file():
                found[file.relative_to(registry).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found
