"""Opens the stream's store of histories, and replaces it by a rebuilt store; safe against a crash at any point.

    histories             the store that the stream opens
    histories.rebuilding  being built; worthless after a crash
    histories.rebuilt     complete, synced and closed; waits to replace the old store
    histories.bad<n>      a replaced store; nothing opens it, and it may be removed at any time

Both the stream and the rebuild call `finish` under the directory's lock before they open `histories`. So neither starts
with an empty store between two renames.

Earlier releases split the partitions among shards. A rebuild creates one store of all partitions.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from state import layout
from state.config.settings import Settings
from state.disk import files as durable
from state.disk import memory_place
from state.disk.lmdb_store import leave_memory
from state.disk.lock import DirectoryLock
from state.errors import CorruptStore, SaltMismatch, SpecMismatch
from state.events.identity import Salt, own_salt
from state.features.spec import FeatureSpec
from state.history.appends import ACTIONS, Appends, numbered
from state.history.store import HistoryStore, open_history_store
from state.layout import HISTORIES, MARK
from state.log import Log
from state.process import killpoints
from state.registry.model_fit import require_same_model
from state.registry.specs import SpecActions
from state.storage import STREAM
from streaming.writer import id_of_first_release, last_id, note_first_release, transactional_id

REBUILDING = f"{HISTORIES}.rebuilding"
REBUILT = f"{HISTORIES}.rebuilt"
BAD = f"{HISTORIES}.bad"
SPEC, SALT = "spec", "salt"  # names of the store's extras
logger = logging.getLogger(__name__)


def begin(folder: Path) -> Path:
    """Returns an empty path to build a store at; removes the remains of an earlier attempt."""
    path = folder / REBUILDING
    if path.exists():
        shutil.rmtree(path)
    return path


def promise(folder: Path) -> None:
    """Declares the closed store `histories.rebuilding` complete: from now on it will replace the old one."""
    durable.sync_tree(folder / REBUILDING)
    (folder / REBUILDING).rename(folder / REBUILT)
    durable.sync_directory(folder)
    killpoints.reach("rebuild.promised")


def finish(folder: Path) -> Path | None:
    """Puts a complete store into use, if there is one.

    1. If the old store is in memory, it is moved to disk. It is then renamed to a name that nothing opens.
    2. The new store takes its path.

    Returns:
        The new path of the old store; None if there was no complete store or no old one.
    """
    rebuilt, path = folder / REBUILT, folder / HISTORIES
    if not rebuilt.exists():
        return None
    # 1.
    aside = set_aside(path)
    killpoints.reach("rebuild.aside")
    # 2.
    rebuilt.rename(path)
    durable.sync_directory(folder)
    return aside


def is_lost(folder: Path) -> bool:
    """Whether the store was open when the machine or its container went down and must not be opened; a cheap check.

    It returns False for a store that does not exist yet, and for one that an earlier release left without a marker.
    """
    store = folder / HISTORIES
    if memory_place.target_of(store) is not None and not store.exists():
        return True
    mark = durable.read_clean_mark(store / MARK)
    return mark is not None and not mark.trusts(durable.boot_id())


def set_aside(store: Path) -> Path | None:
    """Renames a store to a name that nothing opens, after moving it out of memory; None if the store is missing."""
    leave_memory(store)
    if not store.exists():
        return None
    aside = next(path for number in itertools.count(1) if not (path := store.parent / f"{BAD}{number}").exists())
    store.rename(aside)
    durable.sync_directory(store.parent)
    return aside


def former_shards(state: Path) -> list[Path]:
    """The directories of all shards but the first that still have histories, by name."""
    return [store.parent for store in layout.streams(state) if store.parent != layout.stream(state)]


@contextmanager
def replacing_shards(settings: Settings, log: Log) -> Iterator[None]:
    """Wraps a rebuild: locks the former shards' directories, fences their writers, and then sets their stores aside.

    Raises:
        LockHeld: A shard's stream is running on this host.
        LogError: Kafka is unreachable, or a topic is missing.
    """
    shards = former_shards(settings.state_dir)
    with ExitStack() as stack:
        for folder in shards:
            stack.enter_context(DirectoryLock(folder))
        if shards:
            _fence(settings, log, shards)
        yield
        for folder in shards:
            aside = set_aside(folder / layout.HISTORIES)
            logger.info("%s is part of the rebuilt histories; its old store is %s", folder, aside)


def _fence(settings: Settings, log: Log, shards: list[Path]) -> None:
    kafka = settings.kafka
    with log.topics() as topics:
        clicks, microbatches = topics.describe(kafka.clicks_topic), topics.describe(kafka.microbatches_topic)
    ids = {last_id(folder) or id_of_first_release(int(folder.name.rpartition("-")[2])) for folder in shards}
    ids |= {
        transactional_id(clicks.topic_id, microbatches.topic_id, kafka.group, shard)
        for shard in range(1, clicks.partitions)
    }
    for transactional in sorted(ids):
        log.writer(transactional).close()


@contextmanager
def open_histories(settings: Settings, spec: FeatureSpec) -> Iterator[tuple[HistoryStore, Salt]]:
    """Opens the store of a stream's directory and its users' salt; the block owns both exclusively.

    1. Lock the directory.
    2. Load the salt, which is created at the first start.
    3. Complete a rebuild that was interrupted after its store was finished; refuse histories of former shards.
    4. Open the store, in memory if there is space.

    Raises:
        LockHeld: Another process has the directory.
        ModelMismatch: The features differ from those of the model, and no upgrade was requested.
        SaltMismatch: The store was filled with another salt.
        SpecMismatch: The store's actions are unknown.
        MissingSalt: The salt of the stored data is missing.
        SettingsError: The salt cannot be read.
        StoreError: The store cannot be opened, or an earlier release had shards.
    """
    folder = settings.stream_dir
    # Windows that the model does not use yet are not written to the training log.
    require_same_model(settings, features_only=True)
    # 1.
    folder.mkdir(parents=True, exist_ok=True)
    with DirectoryLock(folder):
        # 2.
        salt = own_salt(settings)
        # 3.
        if (aside := finish(folder)) is not None:
            logger.info("using the histories of an interrupted rebuild; the old store is %s", aside)
        note_first_release(folder)
        if shards := former_shards(settings.state_dir):
            raise CorruptStore(
                f"{', '.join(map(str, shards))}: histories of partitions that one stream reads now",
                "stop the streams of all shards, and run `springtide rebuild-history`: it builds one store of all partitions",
            )
        # 4.
        store = open_history_store(settings, STREAM, folder)
        try:
            check_identity(store, spec, salt.fingerprint, SpecActions(settings.registry_dir, spec))
            yield store, salt
        finally:
            store.close()


def check_identity(store: HistoryStore, spec: FeatureSpec, salt: str, actions: SpecActions) -> None:
    """Binds a store to the features of the settings, and permanently to the salt of its users.

    Its events do not depend on a feature spec: windows of another spec are computed from them. `actions` names the
    actions of former feature specs.

    Raises:
        SaltMismatch: The store was filled with another salt.
        SpecMismatch: The names of its actions are unknown.
    """
    stored_spec, stored_salt = store.extra(SPEC), store.extra(SALT)
    if stored_salt is not None and stored_salt != salt.encode():
        raise SaltMismatch.between(str(store.path), stored_salt.decode(), salt)
    before = None
    if stored_spec not in (None, spec.digest.encode()) and store.extra(ACTIONS) is None:
        before = actions.of((stored_spec or b"").decode())
        if before is None:
            raise SpecMismatch(
                f"{store.path} was filled by 0.1.0 under feature spec {(stored_spec or b'').decode()[:12]}, which the "
                "registry does not know",
                "start the stream once with the former events.actions, and then with the new ones",
            )
    store.numbering, extra = numbered(store.extra(ACTIONS), spec.actions, before)
    extra |= {SPEC: spec.digest.encode(), SALT: salt.encode()}
    if changed := {name: value for name, value in extra.items() if store.extra(name) != value}:
        if stored_spec is not None and SPEC in changed:
            logger.info("histories of feature spec %s continue with %s", stored_spec.decode()[:12], spec.digest[:12])
        store.commit(Appends.none(), (), changed)
