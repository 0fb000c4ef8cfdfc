"""Packs what is kept of a golden run's state directory and topics."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import lmdb

from state.config.settings import Settings
from state.history.store import HistoryStore
from state.layout import MARK
from tests.golden.archive import (
    Topic,
    write_topic,
)


def compacted(source: Path, target: Path) -> None:
    """A compact copy of an LMDB store that is closed, with its mark."""
    target.mkdir(parents=True)
    with lmdb.open(str(source), readonly=True, max_dbs=8) as env:
        env.copy(str(target), compact=True)
    if (source / MARK).exists():
        shutil.copy(source / MARK, target)


def gather(settings: Settings, topics: Mapping[str, Topic], stage: Path) -> None:
    """What is kept of a state directory."""
    state = settings.state_dir
    shutil.copytree(settings.registry_dir, stage / "registry", ignore=shutil.ignore_patterns("*.lock", "tmp", "lock"))
    shutil.copy(settings.salt_path, stage / "salt")
    for owner in (settings.stream_dir, settings.serving_dir):
        there = stage / owner.relative_to(state)
        HistoryStore.copied(owner / "histories", there / "histories", settings.features.history, 1 << 30)
        for name in ("rows", "attributes"):
            if (owner / name).exists():
                compacted(owner / name, there / name)
    shutil.copytree(settings.serving_dir / "programs", stage / "serving" / "programs")
    for name, topic in topics.items():
        write_topic(stage / "topics", name, topic)
    for lock in stage.rglob("lock.mdb"):
        lock.unlink()


def pack(stage: Path, archive: Path) -> None:
    """Packs `stage`; LZMA finds again what a base and its deltas have in common."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for path in sorted(stage.iterdir()):
            packed.add(path, path.name, filter=plain)
