"""Keeps a host's directory of a shared registry in step with its place: control, what versions there are, recent ones, what is small.

    what           how it is found                                        requests
    control        the file of the next generation                        one a look
    recent         the pack that begins with the next version             one a look; more to catch up
    versions       the catalogue, when a pack names a newer one           one for each durable version
    the rest       lists of four folders, both ways                       four each `SMALL_S`
    erasures       what this host's processes say, when it changed        one each

Where nothing came for `SILENT_S` catalogue and packs are looked for anew: the
numbers of a trainer that was killed go on elsewhere. Where packs came for so
long without an end the link carries less than comes: it is left to durable
versions for `REST_S`, then packs are taken from the one that leads on. Files of
durable versions come when somebody reads them, see
`state/registry/brought_files.py`. On the trainer's own host versions are not taken.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from state import layout
from state.errors import CorruptVersion, UnusableRegistry
from state.places.place import FilePlace
from state.process import killpoints
from state.registry import manifest
from state.registry.brought_files import MANIFEST
from state.registry.controls import Controls
from state.registry.directory import sharing, usable
from state.registry.registry import Registry
from state.registry.sharing import catalog as catalogs
from state.registry.sharing import pack as packs
from state.registry.sharing.catalog import Catalog
from state.registry.sharing.small import exchange_small

SMALL_S, SILENT_S, REST_S = 30.0, 5.0, 30.0
AT_ONCE = 16
"""Generations of control that are brought at once to a host that has none."""
_log = logging.getLogger(__name__)


class Copier:
    """One host's copier. One thread, and one for control where that is taken apart.

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
            control: Whether it takes control too, which another thread may do.

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
        """Generations in their order; a host that just began lists them, others ask for the next one. Any one thread.

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
        """Which pack to begin with: the one that leads on from the newest durable version, or the first that was missed."""
        with sharing():
            firsts = sorted(int(name) for name in self._place.names(packs.FOLDER) if name.isdecimal())
        if not firsts:
            return
        behind = max(self._taken, *(catalogs.version_of(folder) for folder in self._catalog.folders), 0)
        # One that ends where the next one begins has nothing that a durable version does not lead to.
        useful = [
            first
            for first, after in zip(firsts, [*firsts[1:], None], strict=True)
            if first > self._taken and first not in self._damaged and (after is None or after > behind + 1)
        ]
        self._next = useful[0] if useful else self._next

    def _take_packs(self, anew: bool) -> bool:
        """Takes packs until there is no next one, or for `SILENT_S`; says whether a version came.

        A look after one that saw the end takes one: that is the newest, or the next look sees more.

        Args:
            anew: It is looked for the pack to begin with.
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
        """1. Folders of versions that are new, empty. 2. What was rewritten or is gone there goes here. 3. The catalogue is kept."""
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
        """What processes of this host say of how far they have forgotten, where that is new."""
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
