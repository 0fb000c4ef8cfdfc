"""The threads that keep a shared registry in step, beside the process that needs it: one copier a host, and the trainer's senders."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry

from state import layout
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import LockHeld, RegistryError, UnusablePlace
from state.metrics import SharedMetrics
from state.places.counted import CountedPlace
from state.places.opening import open_place
from state.process.said_once import SaidOnce
from state.process.wall_clock import wall_ms
from state.registry.directory import sharing
from state.registry.sharing.binding import bind, bound, require_as_set
from state.registry.sharing.giving import DurableSender, RecentSender
from state.registry.sharing.repeating import Repeating
from state.registry.sharing.starting import own
from state.registry.sharing.taking import Copier

RETRY_S, STAND_BY_S = 1.0, 1.0
NOTE_MS = 1000
LAST_S, LOOKED_S = 10.0, 0.1
"""How long a trainer that ends goes on sending, and how often is looked whether a copier has begun."""
_log = logging.getLogger(__name__)


class HostCopier:
    """The copier of one host, of whose processes one has it and the others stand by.

    Args:
        settings: Of the whole system; `paths.shared_registry` is set.
        metrics: Where requests are counted.

    Attributes:
        looked: Set once this process has looked there, or another one of the host does.
    """

    def __init__(self, settings: Settings, metrics: SharedMetrics) -> None:
        self._settings = settings
        self._lock = DirectoryLock(settings.registry_dir, layout.SHARED_LOCK)
        self._place = CountedPlace(open_place(settings.paths.shared_registry), metrics)
        self._copier: Copier | None = None
        self._metrics, self.looked = metrics, threading.Event()
        self._began = False
        self._noted_ms = 0
        self._say = SaidOnce(_log.info)

    def step(self) -> None:
        """One round where no other process of this host has it.

        Raises:
            RegistryError: The place cannot be reached, or the disk refused.
        """
        if not self._joined():
            self.looked.set()
            return
        if self._copier is None:
            try:
                self._lock.acquire()
            except LockHeld:
                self.looked.set()
                time.sleep(STAND_BY_S)
                return
            if not self._began:
                # From here on its age says how long the place has been away.
                self._began = True
                self._metrics.looked_seconds.set_to_current_time()
            copier = Copier(self._settings.registry_dir, self._place, self._settings.registry.recent_s)
            copier.take_control()
            self._copier = copier
        began_ms = wall_ms()
        self._copier.step(control=False)
        self._metrics.looked_seconds.set_to_current_time()
        self._note(began_ms)
        self.looked.set()

    def step_control(self) -> None:
        """Takes control where this process has the copier; in a thread of its own, so that no version keeps a pin waiting.

        Raises:
            RegistryError: The place cannot be reached, or the disk refused.
        """
        if self._copier is not None:
            self._copier.take_control()

    def _note(self, at_ms: int) -> None:
        """Says to the other processes of this host that the place was reached at that moment; at most once a second."""
        if not 0 <= at_ms - self._noted_ms < NOTE_MS:
            self._noted_ms = at_ms
            path = self._settings.registry_dir / layout.SHARED_LOOKED
            # On a full disk nothing is noted, and readiness says so.
            with suppress(OSError):
                path.touch()
                os.utime(path, ns=(at_ms * 1_000_000, at_ms * 1_000_000))

    def _joined(self) -> bool:
        """Whether the directory is bound; one that has control of its own is given to the place by its trainer first."""
        path = self._settings.registry_dir
        if bound(path) is None:
            if any((path / layout.CONTROL).glob("*.json")):
                self._say(f"{path} has versions of its own: its trainer shares them when it starts")
                return False
            bind(path, self._settings.paths.shared_registry)
        return True

    def close(self) -> None:
        """Lets another process have it."""
        self._lock.release()


def reached_ms(registry: Path) -> int:
    """When a process of this host last reached the place of the shared registry, in milliseconds since 1970; 0 for never.

    Args:
        registry: The directory of this host's copy.
    """
    try:
        return (registry / layout.SHARED_LOOKED).stat().st_mtime_ns // 1_000_000
    except FileNotFoundError:
        return 0


class Ownership:
    """What the trainer's loop looks at: whether it still owns the versions."""

    def __init__(self) -> None:
        self._failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Another trainer does, or a thread broke."""
        self._failure = self._failure or error

    def check(self) -> None:
        """Raises what ended a thread.

        Raises:
            LockHeld: Another trainer has claimed the versions.
        """
        if self._failure is not None:
            raise self._failure


@contextmanager
def copying(settings: Settings, collected: CollectorRegistry, first: threading.Event | None = None) -> Iterator[None]:
    """Keeps this host's directory in step while the block runs; nothing where the registry is shared with nobody.

    Args:
        settings: Of the whole system.
        collected: Where the metrics go.
        first: Begin once it has looked there, or another process of this host does, or this is set; None: begin at once.

    Raises:
        SettingsError: The directory belongs to another place.
        UnusablePlace: Nothing that reaches the place is installed.
    """
    require_as_set(settings)
    if not settings.paths.shared_registry:
        yield
        return
    stop = threading.Event()
    copier = HostCopier(settings, SharedMetrics(collected))
    threads = _copier_threads(settings, copier, stop)
    for thread in threads:
        thread.start()
    try:
        while first is not None and not copier.looked.wait(LOOKED_S) and not first.is_set():
            pass
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        copier.close()


@contextmanager
def owning(
    settings: Settings,
    collected: CollectorRegistry,
    stopping: threading.Event,
    now_ms: Callable[[], int] = wall_ms,
) -> Iterator[Ownership]:
    """Owns the versions of a shared registry while the block runs, and sends them; nothing where it is shared with nobody.

    Waits for the place at the start, until `stopping`: who trains must know that nobody else does.

    Args:
        settings: Of the whole system; the trainer's lock is held.
        collected: Where the metrics go.
        stopping: The process is to end.
        now_ms: Wall clock.

    Raises:
        SettingsError: The directory is of another registry.
        LockHeld: Another trainer owns the versions.
    """
    ownership = Ownership()
    require_as_set(settings)
    if not settings.paths.shared_registry:
        yield ownership
        return
    path, url, say = settings.registry_dir, settings.paths.shared_registry, SaidOnce(_log.warning)
    while True:
        try:
            found, claim = own(path, url, now_ms())
            break
        except RegistryError as error:
            say(f"{error}; the trainer waits for it")
            if stopping.wait(RETRY_S):
                raise
    _log.info("the registry is shared at %s; its versions are this trainer's, claim %d", found.told, claim)
    metrics, stop = SharedMetrics(collected), threading.Event()
    metrics.sent_seconds.set_to_current_time()
    place = CountedPlace(found, metrics)
    durable = DurableSender(path, place, claim)
    recent = RecentSender(path, place, claim, lambda: durable.serial)
    copier = HostCopier(settings, metrics)
    threads = [
        Repeating("share-recent", lambda: recent.send() < 0, settings.registry.share_s, stop, ownership.fail),
        Repeating(
            "share-durable", partial(_send_durable, durable, metrics), settings.registry.share_s, stop, ownership.fail
        ),
        *_copier_threads(settings, copier, stop),
    ]
    for thread in threads:
        thread.start()
    try:
        yield ownership
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        copier.close()
    if not any(thread.runs for thread in threads):
        _send_the_rest(recent, durable)


def _send_the_rest(recent: RecentSender, durable: DurableSender) -> None:
    """What a trainer that ends in order published last; what cannot be sent now is sent at its next start."""
    until_s = time.monotonic() + LAST_S
    try:
        recent.send()
        while durable.send() and time.monotonic() < until_s:
            pass
    except (UnusablePlace, RegistryError, OSError, LockHeld) as error:
        _log.warning("%s; what was published last is sent at the next start", error)


def _copier_threads(settings: Settings, copier: HostCopier, stop: threading.Event) -> list[Repeating]:
    def lost(error: BaseException) -> None:
        _log.error("the registry is not kept in step any more: %s", error)

    pause_s = settings.registry.look_ms / 1000
    acts = (("share-copy", copier.step), ("share-control", copier.step_control))
    return [Repeating(name, act, pause_s, stop, lost) for name, act in acts]


def _send_durable(sender: DurableSender, metrics: SharedMetrics) -> bool:
    more = sender.send()
    if not more:
        metrics.sent_seconds.set_to_current_time()
    return more


def visit(settings: Settings) -> None:
    """Brings this host's directory up to date for one command, where no process of the host does; else nothing.

    Raises:
        SettingsError: The directory belongs to another place.
        RegistryError: The place cannot be reached, or the disk refused.
    """
    url, path = settings.paths.shared_registry, settings.registry_dir
    if not url or (bound(path) is None and any((path / layout.CONTROL).glob("*.json"))):
        return
    bind(path, url)
    try:
        with DirectoryLock(path, layout.SHARED_LOCK), sharing():
            Copier(path, open_place(url), settings.registry.recent_s).step()
    except LockHeld:
        return
