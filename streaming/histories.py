"""The stream's store of histories: opened where its directory has it, and bound to its salt and feature spec."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import SaltMismatch, SpecMismatch
from state.events.identity import Salt, own_salt
from state.features.spec import FeatureSpec
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.storage.shares import STREAM, map_bytes
from streaming import takeover
from streaming.fencing import note_first_release

SPEC, SALT = "spec", "salt"  # names of the store's extras
logger = logging.getLogger(__name__)


@contextmanager
def open_histories(settings: Settings, spec: FeatureSpec) -> Iterator[tuple[HistoryStore, Salt]]:
    """The store of a stream's directory, which belongs to this process in the block, and its users' salt.

    1. The directory's lock, so that nobody else has the store.
    2. The salt, which is made at the first start.
    3. A complete rebuild takes its place, if one was cut short.
    4. The store, which must be of this salt and this feature spec.

    Args:
        settings: The effective settings.
        spec: The feature spec.

    Raises:
        LockHeld: Another process has the directory.
        SpecMismatch: The store was filled under another spec.
        SaltMismatch: The store was filled with another salt.
        MissingSalt: The salt of what is stored here is gone.
        SettingsError: The salt cannot be read.
        StoreError: The store cannot be opened.
    """
    folder = settings.stream_dir
    # 1.
    folder.mkdir(parents=True, exist_ok=True)
    with DirectoryLock(folder):
        # 2.
        salt = own_salt(settings)
        # 3.
        if (aside := takeover.finish(folder)) is not None:
            logger.info("using the histories of a rebuild that was cut short; the store before them is %s", aside)
        note_first_release(folder, settings.stream.shard)
        # 4.
        place = folder / HISTORIES
        store = HistoryStore(place, spec.history, map_bytes(settings, STREAM, HISTORIES, place))
        try:
            check_identity(store, spec.digest, salt.fingerprint)
            yield store, salt
        finally:
            store.close()


def check_identity(store: HistoryStore, spec: str, salt: str) -> None:
    """Binds a new store to the spec's digest and the salt's fingerprint, and holds an old one to them.

    Raises:
        SpecMismatch: The store was filled under another spec.
        SaltMismatch: The store was filled with another salt.
    """
    stored_spec, stored_salt = store.extra(SPEC), store.extra(SALT)
    if stored_spec is None and stored_salt is None:
        store.commit(Appends.none(), (), {SPEC: spec.encode(), SALT: salt.encode()})
        return
    if stored_salt != salt.encode():
        raise SaltMismatch.between(str(store.path), (stored_salt or b"").decode(), salt)
    if stored_spec != spec.encode():
        raise SpecMismatch(
            f"the histories belong to feature spec {(stored_spec or b'').decode()[:12]}, the settings make {spec[:12]}",
            "put [features] and events.actions back, or choose another paths.state",
        )
