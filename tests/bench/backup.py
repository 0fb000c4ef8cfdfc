"""Backups: seconds and bytes of a first one, of one after some clicks, and of a restore.

    python -m tests.bench.backup [USERS]

`USERS` made-up users (1e6) have 16 events each, and a row of the default width
in a base; 60 deltas of 10,000 rows follow. Between two backups one user in
a hundred clicks, and 10 deltas come. Events have drawn ids and times, so that
they compress as little as real ones. The file system is that of the working
directory; place and state share it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from state.config.loading import load
from state.config.settings import Settings
from state.events.identity import load_salt
from state.features.spec import EVENT
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.positions import Range, Source
from state.registry.control import start
from state.registry.manifest import Draft, LogRange
from state.registry.registry import SERVING, TRAINING, Registry
from tests.bench.report import Figure, Stages, report

NOW_MS = 1_795_719_672_345
EVENTS, AT_ONCE, WIDTH, CHANGED = 16, 20_000, 32, 10_000
SOURCE = Source("ab" * 16, 0)


def click(store: HistoryStore, users: np.ndarray, events: int, begin: int, drawn: np.random.Generator) -> int:
    """Some events of each user, committed 20,000 users at once; returns the next position."""
    for first in range(0, len(users), AT_ONCE):
        some = users[first : first + AT_ONCE]
        made = np.zeros(events * len(some), EVENT)
        for name in EVENT.names or ():
            kind = made.dtype[name]
            if kind.kind in "iu" and kind.itemsize == 8:
                made[name] = drawn.integers(0, 1 << 40, made.size)
        made["at_ms"] = NOW_MS + drawn.integers(0, 86_400_000, made.size)
        made["offset"] = begin + np.arange(made.size)
        ids = np.repeat(some, events)
        store.commit(Appends.of(ids, made), [Range(SOURCE, begin, begin + made.size, rows=made.size)])
        begin += made.size
    return begin


def publish(registry: Registry, parent: int | None, ids: np.ndarray, drawn: np.random.Generator) -> int:
    """A version with rows of these users."""
    rows = drawn.standard_normal((ids.size, WIDTH), np.float32)
    draft = Draft(
        kind="base" if parent is None else "delta", epoch=1, parent=parent,
        log=LogRange("microbatches", "cd" * 16, 0, 0, 9), sources=((SOURCE, 7),), steps=1, rows=1, created_at_ms=NOW_MS,
        event_time_ms=NOW_MS, spec="", program="", salt="",
    )  # fmt: skip
    files = {SERVING: save({"user.ids": ids, "user.rows": rows}), TRAINING: save({"user.accum": rows})}
    return registry.publish(draft, files).version


class Done(NamedTuple):
    """A command that was run.

    Attributes:
        told: What it printed, as JSON.
        seconds: How long it took, its start included.
        memory_mb: The most memory of its own that it had; pages of the store that the kernel keeps are not its own.
    """

    told: dict[str, Any]
    seconds: float
    memory_mb: float


def run(settings: Settings, *words: str) -> Done:
    """Runs a command as an operator does."""
    begun_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", *words, "-o", "json"],
        env={**os.environ, **settings.environment()},
        stdout=subprocess.PIPE,
        text=True,
    )
    status, most_kb = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        most_kb = max(most_kb, int(found[1]) if found else 0)
        time.sleep(0.02)
    seconds, output = time.monotonic() - begun_s, process.stdout
    assert process.returncode == 0 and output is not None
    with output:
        return Done(json.loads(output.read()), seconds, most_kb / 1e3)


def measure(folder: Path, users: int) -> dict[str, Figure]:
    """The figures of one system."""
    stages, drawn = Stages("backup", 10.0), np.random.default_rng(7)
    settings: Settings = load(["--paths.state", str(folder / "here"), "--stream.map_gb", "64"], {})
    there: Settings = load(["--paths.state", str(folder / "there"), "--stream.map_gb", "64"], {})
    salt, registry = load_salt(settings.salt_path), Registry(settings.registry_dir)
    registry.propose(start(actor="bench", reason="bench", now_ms=NOW_MS))
    ids = drawn.integers(1, 1 << 63, users, dtype=np.uint64)
    path, to = settings.stream_dir / HISTORIES, str(folder / "backups")
    store = HistoryStore(path, settings.features.history, settings.stream.map_gb << 30)
    store.commit(Appends.none(), (), {"salt": salt.fingerprint.encode()})
    stages.say("making users")
    position = click(store, ids, EVENTS, 0, drawn)
    version = publish(registry, None, ids, drawn)
    for _ in range(60):
        version = publish(registry, version, drawn.choice(ids, CHANGED, replace=False), drawn)
    stages.say("first backup")
    first = run(settings, "backup", to, "--with-salt")
    stages.say("clicks between")
    click(store, drawn.choice(ids, users // 100, replace=False), 1, position, drawn)
    for _ in range(10):
        version = publish(registry, version, drawn.choice(ids, CHANGED, replace=False), drawn)
    stages.say("second backup")
    second = run(settings, "backup", to, "--with-salt")
    third = run(settings, "backup", to, "--with-salt")
    stages.say("restore")
    restored = run(there, "restore", to)
    store.close()
    mb = {
        one: [told["made"][one] / 1e6 for told in (first.told, second.told, third.told)]
        for one in ("bytes", "sent_bytes")
    }
    return {
        "histories": Figure(path.joinpath("data.mdb").stat().st_size / 1e6, "MB"),
        "all of it": Figure(mb["bytes"][0], "MB"),
        "first backup": Figure(first.seconds, "s"),
        "first backup, sent": Figure(mb["sent_bytes"][0], "MB"),
        "after clicks of 1 % and 10 versions": Figure(second.seconds, "s"),
        "after clicks of 1 % and 10 versions, sent": Figure(mb["sent_bytes"][1], "MB"),
        "without any change": Figure(third.seconds, "s"),
        "without any change, sent": Figure(mb["sent_bytes"][2], "MB"),
        "restore": Figure(restored.seconds, "s"),
        "memory of a backup": Figure(max(first.memory_mb, second.memory_mb), "MB"),
        "memory of a restore": Figure(restored.memory_mb, "MB"),
    }


def main(users: int) -> None:
    """Measures and reports."""
    Path("build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir="build"))
    try:
        report("backup", measure(folder, users))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(float(sys.argv[1])) if len(sys.argv) > 1 else 1_000_000)
