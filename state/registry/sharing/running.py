"""Runs the threads that keep a shared registry in step next to the process that needs it.

Each host has one copier; the trainer has the senders. `own` is how a trainer comes to own the versions of a shared
registry. What it does depends on the local directory and on the shared store:

    local directory          shared store        result
    empty, or a copy         anything            claimed; the store's content is fetched, numbers begin far beyond it
    with versions, unbound   empty               claimed; the local content is pushed to the store
    with versions, unbound   of this registry    likewise
    with versions, unbound   of another one      refused
    the origin               not claimed since   continues under its own claim
    the origin               claimed by another  refused: two would train

`Copier` keeps a host's directory in step with the store:

    what           how it is found                                        requests
    control        the file of the next generation                        one per poll
    recent         the pack that begins with the next version             one per poll; more to catch up
    versions       the catalogue, when a pack names a newer one           one for each durable version
    small files    lists of four folders, both ways                       four each `SMALL_S`
    erasures       the reports of this host's processes, when changed     one each

If no version arrives for `SILENT_S`, the copier reads the catalogue and lists the packs again, because the numbers
of a killed trainer continue elsewhere. If packs keep coming for `SILENT_S` without an end, the link is too slow for
them. The copier then takes durable versions only for `REST_S`, and resumes with the pack that continues from the
newest one. Files of durable versions are fetched when a process reads them, see
`state/registry/brought_files.py`. The trainer's own host fetches no versions.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry

from state import layout
from state.config.settings import Settings
from state.disk import files as durable
from state.disk.lock import DirectoryLock
from state.errors import CorruptVersion, LockHeld, RegistryError, SettingsError, UnusablePlace, UnusableRegistry
from state.metrics import SharedMetrics
from state.places.counted import CountedPlace
from state.places.opening import open_place
from state.places.place import FilePlace
from state.process import killpoints
from state.process.said_once import SaidOnce
from state.process.wall_clock import wall_ms
from state.registry import manifest
from state.registry.brought_files import MANIFEST
from state.registry.controls import Controls
from state.registry.directory import file_bytes, sharing, usable
from state.registry.recent import MOST_BETWEEN
from state.registry.registry import Registry
from state.registry.sharing import catalog as catalogs
from state.registry.sharing import claims
from state.registry.sharing import pack as packs
from state.registry.sharing.binding import Binding, bind, bound, note, open_exclusive, require_as_set
from state.registry.sharing.catalog import Catalog
from state.registry.sharing.giving import DurableSender, RecentSender
from state.registry.sharing.repeating import Repeating
from state.registry.sharing.small import exchange_small

SMALL_S, SILENT_S, REST_S = 30.0, 5.0, 30.0
AT_ONCE = 16
"""Generations of control that are fetched in parallel by a host that has none."""

RETRY_S, STAND_BY_S = 1.0, 1.0
NOTE_MS = 1000
LAST_S, LOOKED_S = 10.0, 0.1
"""How long an ending trainer continues to send, and how often it is checked whether a copier has begun."""
_log = logging.getLogger(__name__)


class Copier:
    """One host's copier. One thread, and optionally a second one for control.

    Args:
        path: The registry's directory, which is bound to the place.
        place: Where the registry is shared.
        recent_s: How long recent versions stay here; the newest one stays until there is another.
        elapsed: Monotonic seconds.
    """

    def __init__(
        self, path: Path, place: FilePlace, recent_s: float = 15.0, elapsed: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry, self._place = Registry(path), place
        self._controls = Controls(path)
        self._registry.shared = self._controls.shared = place
        self._recent_s, self._elapsed = recent_s, elapsed
        self._catalog = self._kept_catalog()
        self._wanted_serial = self._catalog.serial
        self._next: int | None = None
        self._taken, self._damaged = 0, set[int]()
        self._heard_s = self._small_s = float("-inf")
        self._at_end = False
        self._rests_until_s: float | None = None
        now_s = elapsed()
        self._recent = deque((now_s, number) for number in self._registry.recents())
        self._told: dict[str, int] = {}
        self._begun = False

    def step(self, control: bool = True) -> None:
        """One round.

        Args:
            control: Whether it fetches control too; another thread may do that.

        Raises:
            UnusableRegistry: The place cannot be reached, or the disk refused.
            CorruptVersion: A file there is damaged.
        """
        if control:
            self.take_control()
        if self._registry.is_copy:
            rested = self._rests_until_s is not None and self._elapsed() >= self._rests_until_s
            if rested:
                self._rests_until_s = None
            anew = rested or self._elapsed() - self._heard_s >= SILENT_S
            if anew:
                self._take_catalog()
            came = self._rests_until_s is None and self._take_packs(anew)
            if self._wanted_serial != self._catalog.serial:
                self._take_catalog()
            self._drop_recent()
            if came or anew:
                self._heard_s = self._elapsed()
        self._tell_erasures()
        if self._elapsed() - self._small_s >= SMALL_S:
            exchange_small(self._registry, self._place)
            self._small_s = self._elapsed()

    # Control

    def take_control(self) -> None:
        """Fetches generations in order. A host that just started lists them; others ask for the next. Any one thread.

        Raises:
            UnusableRegistry: The place cannot be reached, or the disk refused.
            CorruptVersion: A generation there is damaged.
        """
        newest = self._controls.control()
        at = newest.generation if newest else 0
        with sharing():
            if not self._begun:
                listed = [name.removesuffix(".json") for name in self._place.names(layout.CONTROL)]
                numbers = sorted(int(one) for one in listed if one.isdecimal() and int(one) > at)
                with ThreadPoolExecutor(AT_ONCE) as threads:
                    for number, data in zip(numbers, threads.map(self._control_bytes, numbers), strict=True):
                        if data is not None:
                            self._controls.receive(number, data)
                        at = number
            while (data := self._control_bytes(at + 1)) is not None:
                self._controls.receive(at + 1, data)
                killpoints.reach("copy.control")
                at += 1
        self._begun = True

    def _control_bytes(self, generation: int) -> bytes | None:
        return self._bytes(f"{layout.CONTROL}/{generation:08d}.json")

    # Recent versions

    def _find_packs(self) -> None:
        """Finds the pack to begin with: the one that continues the newest durable version, or the first missed one."""
        with sharing():
            firsts = sorted(int(name) for name in self._place.names(packs.FOLDER) if name.isdecimal())
        if not firsts:
            return
        behind = max(self._taken, *(catalogs.version_of(folder) for folder in self._catalog.folders), 0)
        # A pack whose successor begins at or before the durable version has nothing new.
        useful = [
            first
            for first, after in zip(firsts, [*firsts[1:], None], strict=True)
            if first > self._taken and first not in self._damaged and (after is None or after > behind + 1)
        ]
        self._next = useful[0] if useful else self._next

    def _take_packs(self, anew: bool) -> bool:
        """Fetches packs until there is no next one, or for `SILENT_S`; returns whether a version came.

        A poll after one that reached the end fetches one pack: that is the newest, or the next poll finds more.

        Args:
            anew: Whether to find the first pack again.
        """
        if anew:
            self._find_packs()
        came, one, until_s = False, self._at_end, self._elapsed() + SILENT_S
        self._at_end = False
        while self._rests_until_s is None:
            data = None if self._next is None else self._bytes(packs.name_of(self._next))
            if self._next is None or data is None:
                self._at_end = True
                break
            found = self._decoded_pack(self._next, data)
            came = self._add_recent(found) or came
            if not found.versions or found.versions[-1][0] < self._next:
                break
            self._taken = found.versions[-1][0]
            self._next = self._taken + 1
            self._wanted_serial = found.serial
            killpoints.reach("copy.pack")
            if one:
                break
            if self._elapsed() >= until_s:
                self._rests_until_s = self._elapsed() + REST_S
                _log.info(
                    "the link to %s carries less than comes: durable versions alone for %.0f s",
                    self._place.told,
                    REST_S,
                )
        return came

    def _decoded_pack(self, first: int, data: bytes) -> packs.Pack:
        try:
            return packs.decode(data)
        except ValueError as error:
            self._next = None
            self._damaged.add(first)
            raise CorruptVersion(
                f"{packs.name_of(first)} at {self._place.told}: {error}", "durable versions lead past it by themselves"
            ) from error

    def _add_recent(self, pack: packs.Pack) -> bool:
        fresh = False
        for number, files in pack.versions:
            made = manifest.decode(files[MANIFEST])
            if self._registry.add_recent(made, {name: data for name, data in files.items() if name != MANIFEST}):
                self._recent.append((self._elapsed(), number))
                fresh = True
        return fresh

    def _drop_recent(self) -> None:
        while len(self._recent) > 1 and self._elapsed() - self._recent[0][0] > self._recent_s:
            self._registry.give_up(self._registry.folder("recent", self._recent.popleft()[1]))

    # Durable versions

    def _take_catalog(self) -> None:
        """Applies the newest catalogue.

        1. New versions get empty folders.
        2. Versions that were rewritten or removed in the store are renewed or removed here.
        3. The catalogue is stored.
        """
        data = self._bytes(catalogs.NAME)
        if data is None:
            return
        try:
            found = catalogs.decode(data)
        except ValueError as error:
            raise UnusableRegistry(
                f"{catalogs.NAME} at {self._place.told} is damaged: {error}", "restart the trainer: it writes it anew"
            ) from error
        before, path = self._catalog, self._registry.path
        self._wanted_serial = found.serial
        if found == before:
            return
        with usable("take the names of versions"):
            # 1.
            for folder in found.folders:
                (path / folder).mkdir(parents=True, exist_ok=True)
            # 2.
            for folder, mark in found.folders.items():
                if before.folders.get(folder) != mark:
                    self._registry.renew(path / folder, mark)
            for folder in before.folders.keys() - found.folders.keys():
                self._registry.give_up(path / folder)
            for digest in set(before.programs) - set(found.programs):
                (path / layout.PROGRAMS / f"{digest}.tflite").unlink(missing_ok=True)
            killpoints.reach("copy.named")
            # 3.
            self._registry.keep_copy(path / layout.SHARED_CATALOG, data)
        self._catalog = found

    def _kept_catalog(self) -> Catalog:
        try:
            return catalogs.decode((self._registry.path / layout.SHARED_CATALOG).read_bytes())
        except (OSError, ValueError):
            return Catalog()

    # Erasures

    def _tell_erasures(self) -> None:
        """Pushes the erasure reports of this host's processes that changed."""
        for path in (self._registry.path / layout.ERASURES).glob("*.json"):
            with usable("be read"):
                changed_ns, data = path.stat().st_mtime_ns, path.read_bytes()
            if self._told.get(path.name) != changed_ns:
                with sharing():
                    self._place.write(f"{layout.ERASURES}/{path.name}", data)
                self._told[path.name] = changed_ns

    def _bytes(self, name: str) -> bytes | None:
        with sharing():
            try:
                return self._place.read(name)
            except FileNotFoundError:
                return None


def own(path: Path, url: str, now_ms: int) -> tuple[FilePlace, int]:
    """Makes the directory the origin of the shared store, or finds that it is.

    1. The local content is pushed if the directory was not shared before: masks, then control.
    2. The versions are claimed.
    3. The store's content is fetched: control, the names of versions, programs, small files.
    4. Numbers that the preceding trainer may have used are skipped.
    5. The directory is bound as the origin.

    Args:
        path: The registry's directory, with the trainer's lock held.
        url: The place.
        now_ms: Wall clock.

    Returns:
        The place, and the claim.

    Raises:
        SettingsError: The directory is of another registry.
        LockHeld: Another trainer owns the versions.
        RegistryError: The place cannot be reached, or the disk refused.
    """
    with sharing():
        place = open_exclusive(url)
    before = bound(path)
    if before is not None and not before.is_copy:
        bind(path, url)
        with sharing():
            claims.require_newest(place, before.claim)
        return place, before.claim
    # 1.
    if before is None:
        give_control(Registry(path), place)
    bind(path, url)
    killpoints.reach("share.bound")
    # 2.
    with sharing():
        claim = claims.take(place, now_ms)
    killpoints.reach("share.claimed")
    # 3.
    Copier(path, place).step()
    with sharing():
        there = catalogs.at_place(place)
    registry = Registry(path)
    registry.shared = place
    for digest in there.programs:
        registry.program(digest)
    # 4.
    pass_over(registry, there.last)
    # 5.
    note(path, Binding(url, claim))
    return place, claim


def give_control(registry: Registry, place: FilePlace) -> None:
    """Pushes the control of a registry that was not shared to an empty store, all generations in order.

    Raises:
        SettingsError: The store has the control of another registry.
        UnusableRegistry: The store cannot be reached.
    """
    newest = registry.control()
    if newest is None:
        return
    with sharing():
        for path in sorted((registry.path / layout.MASKS).iterdir()):
            place.write(f"{layout.MASKS}/{path.name}", file_bytes(path))
        for generation in range(1, newest.generation + 1):
            name = f"{layout.CONTROL}/{generation:08d}.json"
            data = file_bytes(registry.path / name)
            if not place.create(name, data) and place.read(name) != data:
                raise SettingsError(
                    f"{registry.path} and {place.told} are two registries: control generation {generation} differs",
                    "name an empty place in paths.shared_registry, or give this host another paths.registry",
                )


def pass_over(registry: Registry, last: int) -> None:
    """Begins the numbers of versions here beyond all that the preceding trainer may have used.

    Raises:
        OSError: The disk refused.
    """
    keeper = registry.path / layout.RECENT / f"{last + MOST_BETWEEN:012d}.last"
    if last and not keeper.exists():
        durable.write(keeper, b"")
        durable.sync_directory(keeper.parent)


class HostCopier:
    """The copier of one host; one of its processes runs it and the others stand by.

    Args:
        settings: Of the whole system; `paths.shared_registry` is set.
        metrics: Counts requests.

    Attributes:
        looked: Set once this process has polled the store, or another one of the host does so.
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
        """One round, unless another process of this host has the copier.

        Raises:
            RegistryError: The store cannot be reached, or the disk refused.
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
                # From here on its age shows how long the store has been unreachable.
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
        """Fetches control if this process has the copier; in a separate thread, so that versions do not delay a pin.

        Raises:
            RegistryError: The store cannot be reached, or the disk refused.
        """
        if self._copier is not None:
            self._copier.take_control()

    def _note(self, at_ms: int) -> None:
        """Records for the other processes of this host that the store was reached then; at most once a second."""
        if not 0 <= at_ms - self._noted_ms < NOTE_MS:
            self._noted_ms = at_ms
            path = self._settings.registry_dir / layout.SHARED_LOOKED
            # On a full disk nothing is recorded, and readiness reports it.
            with suppress(OSError):
                path.touch()
                os.utime(path, ns=(at_ms * 1_000_000, at_ms * 1_000_000))

    def _joined(self) -> bool:
        """Whether the directory is bound; if it has control of its own, its trainer pushes that to the store first."""
        path = self._settings.registry_dir
        if bound(path) is None:
            if any((path / layout.CONTROL).glob("*.json")):
                self._say(f"{path} has versions of its own: its trainer shares them when it starts")
                return False
            bind(path, self._settings.paths.shared_registry)
        return True

    def close(self) -> None:
        """Releases the copier for another process."""
        self._lock.release()


def reached_ms(registry: Path) -> int:
    """When a process of this host last reached the store of the shared registry, in milliseconds since 1970; 0 for never.

    Args:
        registry: The directory of this host's copy.
    """
    try:
        return (registry / layout.SHARED_LOOKED).stat().st_mtime_ns // 1_000_000
    except FileNotFoundError:
        return 0


class Ownership:
    """Whether the trainer still owns the versions; its loop polls this."""

    def __init__(self) -> None:
        self._failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Records the error that ended the ownership: another trainer's claim, or that of a failed thread."""
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
    """Keeps this host's directory in step while the block runs; does nothing if the registry is not shared.

    Args:
        settings: Of the whole system.
        collected: The registry of the metrics.
        first: The block begins after the first poll of the store by a process of this host, or when this is set. None:
            it begins at once.

    Raises:
        SettingsError: The directory belongs to another store.
        UnusablePlace: The library for the store's protocol is not installed.
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
    """Owns the versions of a shared registry while the block runs, and sends them; does nothing if it is not shared.

    Waits for the store at the start, until `stopping`: a trainer must know that no other one trains.

    Args:
        settings: Of the whole system; the trainer's lock is held.
        collected: The registry of the metrics.
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
    """Sends the last versions of a trainer that stops cleanly; those that fail are sent at its next start."""
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
    """Updates this host's directory for one command, unless a process of the host does so.

    Raises:
        SettingsError: The directory belongs to another store.
        RegistryError: The store cannot be reached, or the disk refused.
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
