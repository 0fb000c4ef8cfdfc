"""Opens the stream's store of histories, which is bound to its users' salt; the features may change."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import SaltMismatch, SpecMismatch
from state.events.identity import Salt, own_salt
from state.features.spec import FeatureSpec
from state.history import opening
from state.history.actions import ACTIONS, numbered
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.registry.model_fit import require_same_features
from state.registry.specs import SpecActions
from state.storage.shares import STREAM
from streaming import takeover
from streaming.fencing import note_first_release
from streaming.former_shards import refuse_beside

SPEC, SALT = "spec", "salt"  # names of the store's extras
logger = logging.getLogger(__name__)


@contextmanager
def open_histories(settings: Settings, spec: FeatureSpec) -> Iterator[tuple[HistoryStore, Salt]]:
    """Opens the store of a stream's directory and its users' salt; the block owns both exclusively.

    1. Lock the directory, so that no other process has the store.
    2. Load the salt, which is created at the first start.
    3. Complete a rebuild that was interrupted after its store was finished. Refuse to continue next to histories of
       shards of an earlier release.
    4. Open the store, in memory if there is space. It must have been filled with this salt. Its events do not depend on
       a feature spec: windows of another spec are computed from them, once the model continues with it.

    Args:
        settings: The effective settings.
        spec: The feature spec.

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
    require_same_features(settings)
    # 1.
    folder.mkdir(parents=True, exist_ok=True)
    with DirectoryLock(folder):
        # 2.
        salt = own_salt(settings)
        # 3.
        if (aside := takeover.finish(folder)) is not None:
            logger.info("using the histories of a rebuild that was cut short; the store before them is %s", aside)
        note_first_release(folder)
        refuse_beside(settings.state_dir)
        # 4.
        store = opening.open_histories(settings, STREAM, folder)
        try:
            check_identity(store, spec, salt.fingerprint, SpecActions(settings.registry_dir, spec))
            yield store, salt
        finally:
            store.close()


def check_identity(store: HistoryStore, spec: FeatureSpec, salt: str, known: SpecActions) -> None:
    """Binds a store to the features of the settings, and permanently to the salt of its users.

    Args:
        store: The store, filled under any features.
        spec: Of the settings.
        salt: The salt's fingerprint.
        known: Names the actions of former features.

    Raises:
        SaltMismatch: The store was filled with another salt.
        SpecMismatch: The names of its actions are unknown.
    """
    stored_spec, stored_salt = store.extra(SPEC), store.extra(SALT)
    if stored_salt is not None and stored_salt != salt.encode():
        raise SaltMismatch.between(str(store.path), stored_salt.decode(), salt)
    before = None
    if stored_spec not in (None, spec.digest.encode()) and store.extra(ACTIONS) is None:
        before = known.of((stored_spec or b"").decode())
        if before is None:
            raise SpecMismatch(
                f"{store.path} was filled by 0.1.0 under feature spec {(stored_spec or b'').decode()[:12]}, which the "
                "registry does not know",
                "start the stream once with the events.actions of then, and then with the new ones",
            )
    store.numbering, extra = numbered(store.extra(ACTIONS), spec.actions, before)
    extra |= {SPEC: spec.digest.encode(), SALT: salt.encode()}
    if changed := {name: value for name, value in extra.items() if store.extra(name) != value}:
        if stored_spec is not None and SPEC in changed:
            logger.info("histories of feature spec %s go on with %s", stored_spec.decode()[:12], spec.digest[:12])
        store.commit(Appends.none(), (), changed)
