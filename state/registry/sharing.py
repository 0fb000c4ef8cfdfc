"""Runs the synchronisation of a shared registry (`state/registry/sync.py`) in threads of the process that needs it.

One process of each host copies and the others stand by; the trainer also pushes. With `own`, a trainer becomes the
owner of the versions of a shared registry. The result depends on the local directory and on the object store:

    local directory          object store         result
    empty, or a copy         anything             claimed once the last claim ends; the store's content is fetched, numbers begin far beyond it
    with versions, unbound   empty                claimed; the local content is pushed to the store
    with versions, unbound   of this registry     likewise
    with versions, unbound   of another one       refused
    the origin               not claimed since    continues under its own claim
    the origin               claimed by another   becomes a copy: versions that the store lacks are removed
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
from prometheus_client import CollectorRegistry

from state import layout
from state.config.settings import Settings
from state.disk import files as durable
from state.disk.files import Noted, Progress, noted_at
from state.disk.lock import DirectoryLock
from state.errors import LockHeld, RegistryError, SettingsError, UnusablePlace
from state.file_store import CountedStore, FileStore, open_store
from state.metrics import SharedMetrics
from state.process import killpoints
from state.process.environment import wall_ms
from state.process.log_lines import SaidOnce
from state.registry import sync
from state.registry.directory import BINDING, RENEW_S, Binding, Claim, Silence, StandbyFile, bound, file_bytes, sharing
from state.registry.registry import MOST_BETWEEN, Registry, durable_folders
from state.registry.sync import Copier, DurableSender, RecentSender

EXCLUSIVE = "exclusive"
"""The file that tests whether a store supports exclusive creation."""
RETRY_S, JOIN_S, STAND_BY_S = 1.0, 3.0, 1.0
SEND_S, COPY_S = 0.3, 0.25  # between packs that the trainer sends, and between polls of a host
LAST_S, POLL_S = 10.0, 0.1
"""How long a stopping trainer continues to send, and the interval of checks whether a copier has begun."""
_log = logging.getLogger(__name__)


# Binding


def bind(path: Path, url: str) -> None:
    """Binds a directory to an object store as a copy, durably, unless it is bound already.

    Raises:
        SettingsError: The directory is bound to another store.
        OSError: The directory cannot be written.
    """
    binding = bound(path)
    _require_same(path, binding, url)
    if binding is None:
        _write_binding(path, Binding(url))


def require_as_set(settings: Settings) -> None:
    """Refuses settings that contradict the binding.

    Raises:
        SettingsError: The directory is bound to another store, or is bound and the settings name no store.
    """
    _require_same(settings.registry_dir, bound(settings.registry_dir), settings.paths.shared_registry)


def _require_same(path: Path, binding: Binding | None, url: str) -> None:
    if binding is not None and binding.url != url:
        raise SettingsError(
            f"{path} belongs to the registry at {binding.url}, and paths.shared_registry is {url or 'empty'}",
            "put the setting back, or give this host another paths.registry",
        )


def _write_binding(path: Path, binding: Binding) -> None:
    path.mkdir(parents=True, exist_ok=True)
    durable.replace(path / BINDING, msgspec.json.encode(binding), durable.unique(path / BINDING))


def _has_own_control(path: Path) -> bool:
    """Whether a directory is a registry that was never shared; its trainer pushes it to the store first."""
    return bound(path) is None and any((path / layout.CONTROL).glob("*.json"))


# Ownership of the versions


class Owned(NamedTuple):
    """A shared registry whose versions this host's trainer owns.

    Attributes:
        took_over: Whether another trainer owned the versions before.
    """

    store: FileStore
    claim: int
    took_over: bool = False


def own(
    path: Path,
    url: str,
    now_ms: Callable[[], int],
    wait: Callable[[FileStore], int] = lambda store: sync.newest_claim(store),
    took_over: bool = False,
) -> Owned:
    """Makes the directory the origin of the shared registry, unless it is the origin already.

    1. If the directory was not shared before, its content is pushed: masks, then control.
    2. The versions are claimed, once no other trainer owns them. The catalogue refuses the former trainer from here on.
    3. The store's content is fetched: control, the names of versions, programs, small files.
    4. Numbers that the preceding trainer may have used are skipped.
    5. The directory is bound as the origin. The caller holds the trainer's claim on the directory.

    Args:
        path: The registry's directory.
        url: The URL of the object store.
        now_ms: Wall clock.
        wait: Waits until no other trainer owns the versions; returns the number of the newest claim.
        took_over: Whether the directory was taken over from a process that may still run and send under its claim.

    Raises:
        SettingsError: The directory belongs to another registry.
        RegistryError: The store cannot be reached, or the disk refused.
    """
    with sharing():
        store = open_store(url)
        if store.create(EXCLUSIVE, b"") and store.create(EXCLUSIVE, b""):
            raise UnusablePlace(
                f"{store.name} replaces a file that was to be created",
                "use a store that supports `If-None-Match: *`: in this one, two operators at once would both win",
            )
        tag = store.tagged(EXCLUSIVE)[1]
        if store.swap(EXCLUSIVE, os.urandom(8), tag) and store.swap(EXCLUSIVE, b"", tag):
            raise UnusablePlace(
                f"{store.name} replaces a file whose ETag is not the requested one",
                "use a store that supports `If-Match`: in this one, a trainer that lost its claim could still publish",
            )
    binding = bound(path)
    if binding is not None and not binding.is_copy:
        _require_same(path, binding, url)
        with sharing():
            newest = sync.newest_claim(store)
            if newest == binding.claim and not took_over:
                return Owned(store, binding.claim)
            if newest == binding.claim and sync.claim(store, newest + 1, now_ms()):
                sync.fence(store, newest + 1)
                _write_binding(path, Binding(url, newest + 1))
                return Owned(store, newest + 1, took_over=True)
        _become_copy(path, url, store)
        binding = bound(path)
    registry = Registry(path)
    # 1.
    if binding is None:
        _push_control(registry, store)
    bind(path, url)
    killpoints.reach("share.bound")
    # 2.
    with sharing():
        while not sync.claim(store, (former := wait(store)) + 1, now_ms()):
            pass
        claim = former + 1
        sync.fence(store, claim)
    killpoints.reach("share.claimed")
    # 3.
    Copier(path, store).step()
    with sharing():
        catalog = sync.read_catalog(lambda: store.read(sync.CATALOG))
    registry.directory.shared = store
    for digest in catalog.programs:
        registry.specs.program(digest)
    # 4.
    if catalog.last:
        registry.reserve_numbers(catalog.last + MOST_BETWEEN)
    # 5.
    _write_binding(path, Binding(url, claim))
    return Owned(store, claim, took_over=former > 0)


def _become_copy(path: Path, url: str, store: FileStore) -> None:
    """Turns an origin whose claim was lost into a copy; versions that the store lacks are removed first."""
    registry = Registry(path)
    with sharing():
        catalog = sync.read_catalog(lambda: store.read(sync.CATALOG))
    unsent = [path / folder for folder in durable_folders(path) if folder not in catalog.folders]
    for folder in (*unsent, *(registry.folder("recent", number) for number in registry.recents())):
        registry.directory.remove_folder(folder)
    # All names are then compared with the store's again.
    (path / layout.SHARED_CATALOG).unlink(missing_ok=True)
    _write_binding(path, Binding(url))
    _log.warning("another trainer claimed the registry at %s: this host keeps a copy from now on", store.name)
    _log.warning(
        "%d durable versions that were not sent are removed; their clicks are learned again from the log", len(unsent)
    )


def _push_control(registry: Registry, store: FileStore) -> None:
    newest = registry.control()
    if newest is None:
        return
    with sharing():
        for path in sorted((registry.path / layout.MASKS).iterdir()):
            store.write(f"{layout.MASKS}/{path.name}", file_bytes(path))
        for generation in range(1, newest.generation + 1):
            name = f"{layout.CONTROL}/{generation:08d}.json"
            data = file_bytes(registry.path / name)
            if not store.create(name, data) and store.read(name) != data:
                raise SettingsError(
                    f"{registry.path} and {store.name} are two registries: control generation {generation} differs",
                    "name an empty location in paths.shared_registry, or give this host another paths.registry",
                )


class Ownership:
    """Whether the trainer still owns the versions.

    Attributes:
        took_over: Whether another trainer had them before, which may still run.
    """

    def __init__(self, senders: Sequence[_Repeating] = (), took_over: bool = False) -> None:
        self._senders, self.took_over = senders, took_over

    def check(self) -> None:
        """Raises the error that ended a sender.

        Raises:
            LockHeld: Another trainer has claimed the versions.
        """
        for sender in self._senders:
            if sender.failure is not None:
                raise sender.failure


@contextmanager
def owning(
    settings: Settings,
    collected: CollectorRegistry,
    stopping: threading.Event,
    on_directory: Claim,
    on_wait: Callable[[str], None],
) -> Iterator[Ownership]:
    """Owns the versions of a shared registry while the block runs, and sends them; does nothing if it is not shared.

    It first waits for the store, until `stopping`, because a trainer must know that no other trainer is active. While
    another trainer owns the versions, it waits as a standby and keeps this directory synchronised.

    Args:
        settings: All settings.
        collected: The registry for metrics.
        stopping: Ends the wait with SystemExit.
        on_directory: The held claim on the directory.
        on_wait: Called with a description of the current owner if this process waits as a standby.

    Raises:
        SettingsError: The directory is of another registry.
        LockHeld: Another trainer owns the versions, and a privacy budget, which is on its host.
        SystemExit: `stopping` was set while it waited.
    """
    require_as_set(settings)
    path, url, warn_once = settings.registry_dir, settings.paths.shared_registry, SaidOnce(_log.warning)
    if not url:
        yield Ownership(took_over=on_directory.took_over)
        return
    metrics = SharedMetrics(collected)

    def wait(store: FileStore) -> int:
        """Waits as a standby until the newest claim is free; returns its number."""
        silence, number, present = Silence(), sync.newest_claim(store), StandbyFile(path)
        waits = False
        with ExitStack() as standing_by:
            standing_by.callback(present.remove)
            while host := sync.holder(store, number, silence):
                if settings.privacy.epsilon:
                    raise LockHeld(
                        f"the registry at {store.name} has a trainer on {host}, whose ledger of the privacy budget is there",
                        "stop it and move privacy/ledger.json and the key, or use one directory for both (paths.registry)",
                    )
                if not waits:
                    waits = True
                    on_wait(f"the registry at {store.name} has a trainer on {host}")
                    copier, ended = _HostCopier(settings, metrics), threading.Event()
                    standing_by.enter_context(_running(_copier_threads(settings, copier, ended), copier, ended))
                present.renew()
                if stopping.wait(RENEW_S):
                    raise SystemExit(0)
                number += not sync.is_newest(store, number)
        return number

    while True:
        try:
            origin, claim, took_over = own(path, url, wall_ms, wait, on_directory.took_over)
            break
        except RegistryError as error:
            warn_once(f"{error}; the trainer waits for it")
            if stopping.wait(RETRY_S):
                raise
    _log.info("the registry is shared at %s; this trainer owns its versions, claim %d", origin.name, claim)
    on_directory.ask_store = partial(_require_newest, origin, claim)
    stop = threading.Event()
    metrics.sent_seconds.set_to_current_time()
    store = CountedStore(origin, metrics)
    versions = DurableSender(path, store, claim)
    recent = RecentSender(path, store, claim, lambda: versions.serial)
    copier = _HostCopier(settings, metrics)

    def send_durable() -> bool:
        more = versions.send()
        if not more:
            metrics.sent_seconds.set_to_current_time()
        return more

    senders = [
        _Repeating("share-claim", lambda: sync.renew(origin, claim, wall_ms()), RENEW_S, stop),
        _Repeating("share-recent", lambda: recent.send() < 0, SEND_S, stop),
        _Repeating("share-durable", send_durable, SEND_S, stop),
    ]
    threads = [*senders, *_copier_threads(settings, copier, stop)]
    with _running(threads, copier, stop):
        yield Ownership(senders, took_over or on_directory.took_over)
    if not any(thread.is_alive() for thread in threads):
        _send_the_rest(recent, versions)
        with suppress(UnusablePlace, LockHeld):
            sync.renew(origin, claim, wall_ms(), released=True)


def _require_newest(store: FileStore, claim: int) -> None:
    with sharing():
        sync.require_newest(store, claim)


def _send_the_rest(recent: RecentSender, versions: DurableSender) -> None:
    """Sends the last versions of a trainer that stops cleanly; versions that fail are sent at its next start."""
    until_s = time.monotonic() + LAST_S
    try:
        recent.send()
        while versions.send() and time.monotonic() < until_s:
            pass
    except (UnusablePlace, RegistryError, OSError, LockHeld) as error:
        _log.warning("%s; the last published versions are sent at the next start", error)


# Copies


@contextmanager
def copying(settings: Settings, collected: CollectorRegistry, first: threading.Event | None = None) -> Iterator[None]:
    """Keeps this host's directory synchronised while the block runs; does nothing if the registry is not shared.

    With `first`, the block begins after the first poll of the store by a process of this host, or when `first` is set.

    Raises:
        SettingsError: The directory belongs to another store.
        UnusablePlace: The store cannot be opened.
    """
    require_as_set(settings)
    if not settings.paths.shared_registry:
        yield
        return
    stop = threading.Event()
    copier = _HostCopier(settings, SharedMetrics(collected))
    with _running(_copier_threads(settings, copier, stop), copier, stop):
        while first is not None and not copier.polled.wait(POLL_S) and not first.is_set():
            pass
        yield


def visit(settings: Settings) -> None:
    """Updates this host's directory for one command, unless a process of the host does so.

    Raises:
        SettingsError: The directory belongs to another store.
        RegistryError: The store cannot be reached, or the disk refused.
    """
    url, path = settings.paths.shared_registry, settings.registry_dir
    if not url or _has_own_control(path):
        return
    bind(path, url)
    with suppress(LockHeld), DirectoryLock(path, layout.SHARED_LOCK), sharing():
        Copier(path, open_store(url)).step()


def reached(registry: Path) -> Noted:
    """When a process of this host last reached the shared registry's store, and why it does not reach it now."""
    return noted_at(registry / layout.SHARED_LOOKED)


class _HostCopier:
    """The copier of one host; one of the host's processes runs it and the others stand by.

    `polled` is set once this process has polled the store, or another process of the host does so.
    """

    def __init__(self, settings: Settings, metrics: SharedMetrics) -> None:
        self._settings = settings
        self._lock = DirectoryLock(settings.registry_dir, layout.SHARED_LOCK)
        self._store = CountedStore(open_store(settings.paths.shared_registry), metrics)
        self._copier: Copier | None = None
        self._metrics, self.polled = metrics, threading.Event()
        self._began = False
        self._reached = Progress(settings.registry_dir / layout.SHARED_LOOKED)
        self._log_once = SaidOnce(_log.info)

    def step(self) -> None:
        """Runs one round, unless another process of this host has the copier.

        For the other processes of this host it records when the store was reached, or why it was not.
        """
        try:
            self._step()
        except (UnusablePlace, RegistryError, OSError) as error:
            self._reached.fail(str(error))
            raise

    def _step(self) -> None:
        path = self._settings.registry_dir
        if _has_own_control(path):
            self._log_once(f"{path} has versions of its own: its trainer shares them when it starts")
            self.polled.set()
            return
        bind(path, self._settings.paths.shared_registry)
        if self._copier is None:
            try:
                self._lock.acquire()
            except LockHeld:
                self.polled.set()
                time.sleep(STAND_BY_S)
                return
            if not self._began:
                # From here on, the file's age shows how long the store has been unreachable.
                self._began = True
                self._metrics.looked_seconds.set_to_current_time()
            copier = Copier(path, self._store)
            copier.fetch_control()
            self._copier = copier
        began_ms = wall_ms()
        self._copier.step(control=False)
        self._metrics.looked_seconds.set_to_current_time()
        self._reached.note(began_ms)
        self.polled.set()

    def step_control(self) -> None:
        """Fetches control if this process has the copier; in its own thread, so that versions do not delay a pin."""
        if self._copier is not None:
            self._copier.fetch_control()

    def close(self) -> None:
        self._lock.release()


# Threads


class _Repeating(threading.Thread):
    """A thread that repeats one action; errors of the object store, the registry and the disk are logged and retried.

    The action returns True if there is more to do at once. Any other error ends the thread, which stores it as
    `failure`.
    """

    def __init__(self, name: str, act: Callable[[], bool | None], pause_s: float, stop: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self._act, self._pause_s, self._ending = act, pause_s, stop
        self.failure: BaseException | None = None
        self._warn_once = SaidOnce(_log.warning)

    def run(self) -> None:
        """Repeats the action until the event is set."""
        try:
            while not self._ending.is_set():
                self._ending.wait(self._once())
        except BaseException as error:
            self.failure = error
            _log.error("%s has ended: %s", self.name, error)
            raise

    def _once(self) -> float:
        """Calls the action; returns how long to wait before the next call."""
        try:
            more = self._act()
        except (UnusablePlace, RegistryError, OSError) as error:
            self._warn_once(f"{error}; this is tried again; this host keeps using its own registry")
            return RETRY_S
        self._warn_once.clear()
        return 0.0 if more else self._pause_s


def _copier_threads(settings: Settings, copier: _HostCopier, stop: threading.Event) -> list[_Repeating]:
    acts = (("share-copy", copier.step), ("share-control", copier.step_control))
    return [_Repeating(name, act, COPY_S, stop) for name, act in acts]


@contextmanager
def _running(threads: list[_Repeating], copier: _HostCopier, stop: threading.Event) -> Iterator[None]:
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            # A request that hangs ends with the process.
            thread.join(JOIN_S)
        copier.close()
