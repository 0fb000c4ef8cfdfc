"""Synchronises the directories of a shared registry with its object store: pushes and fetches files.

`docs/reference/formats.md` has the names in the store. Each host has one copier; the trainer has the senders. A version
is pushed in this order: its files, its manifest, then the catalogue. A deletion changes the catalogue first. So every
version in the catalogue is complete, except briefly during a deletion.

A claim has a lease, which its trainer renews. If that trainer is silent for `LEASE_S`, another trainer claims the
versions. A trainer without the claim is refused like a fenced producer of Kafka:

    what           how
    versions       the catalogue names its claim and is replaced only if it is unchanged (a conditional request)
    control        a takeover creates a generation; before a trainer creates one, it checks its claim
    recent         the claim is checked before a pack is sent, every `FENCE_S`

If no version arrives for `SILENT_S`, the copier reads the catalogue and lists the packs again, because the successor
of a killed trainer may skip numbers. If the packs have no end for `SILENT_S`, the link is too slow for them. The copier
then fetches only durable versions for `REST_S`. Files of durable versions are fetched when a process reads them.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import zstandard
from msgspec import structs

from state import layout
from state.disk import documents
from state.disk import files as durable
from state.errors import CorruptVersion, LockHeld, UnknownVersion, UnusablePlace, UnusableRegistry
from state.file_store import FileStore
from state.process import killpoints
from state.process.environment import wall_ms
from state.registry import manifest
from state.registry.controls import Controls
from state.registry.directory import LEASE_S, Silence, file_bytes, sharing, stored_documents, usable
from state.registry.hosts import GONE_S, RENEW_S, HostEntry
from state.registry.registry import DURABLE, MANIFEST, RECENT_S, Registry, durable_folders

CATALOG, RECENT, CLAIMS = "catalog.json", "recent", "trainers"
SMALL = (layout.SPECS, layout.OUTCOMES, layout.BASELINES, layout.GAPS)
"""Folders of small immutable files, each created in the directory of one host first."""
SMALL_S, SILENT_S, REST_S = 30.0, 5.0, 30.0
KEPT_PACKS_S = 60.0
"""How long a pack is kept in the store; the newest pack is kept until there is a newer one."""
FENCE_S = 5.0
MOST_IN_PACK = 64
MOST_PACK_BYTES = 1 << 32
"""Size limit of an unpacked pack. One second of the busiest trainer takes several megabytes."""
AT_ONCE = 16
"""Number of control generations that a host without any fetches in parallel."""

_MARK_DIGITS = 16
_COMPLETE = ("spec.json", "baseline.json")  # mark a folder as complete, so they are copied last
_DIGEST_BYTES, _LEVEL = 32, 1
# A directory that changes twice within one tick of the file system's clock keeps its modification time.
_TICK_NS = 100_000_000
_log = logging.getLogger(__name__)


# Claims


class _Claim(msgspec.Struct):
    host: str = "another host"
    at_ms: int = 0
    released: bool = False


def newest_claim(store: FileStore) -> int:
    """The number of the newest claim; 0 if there is none."""
    return max((int(name.partition(".")[0]) for name in store.names(CLAIMS)), default=0)


def is_newest(store: FileStore, number: int) -> bool:
    """Whether no claim follows `number`; one request."""
    try:
        store.read(_claim_name(number + 1))
    except FileNotFoundError:
        return True
    return False


def holder(store: FileStore, number: int, silence: Silence) -> str:
    """The host whose trainer holds a claim; empty if there is no such claim, or it was released or has expired."""
    try:
        data = store.read(_claim_name(number))
        claim = documents.decode(data, _Claim)
    except FileNotFoundError:
        return ""
    except msgspec.MsgspecError:
        claim = _Claim()
    return "" if claim.released or silence.poll((number, data)) >= LEASE_S else claim.host


def claim(store: FileStore, number: int, now_ms: int) -> bool:
    """Creates a claim; returns False if another trainer was faster."""
    return store.create(_claim_name(number), msgspec.json.encode(_Claim(durable.HOST, now_ms)))


def renew(store: FileStore, own: int, now_ms: int, released: bool = False) -> None:
    """Renews a claim, or releases it.

    Raises:
        LockHeld: Another trainer has claimed the versions since.
        UnusablePlace: The object store cannot be reached.
    """
    require_newest(store, own)
    store.write(_claim_name(own), msgspec.json.encode(_Claim(durable.HOST, now_ms, released)))


def fence(store: FileStore, own: int) -> None:
    """Writes the claim into the catalogue, so that the former trainer can no longer replace the catalogue."""
    while True:
        catalog, tag = _tagged_catalog(store)
        if store.swap(
            CATALOG, documents.encode_sealed(structs.replace(catalog, serial=catalog.serial + 1, claim=own)), tag
        ):
            return


def _tagged_catalog(store: FileStore) -> tuple[Catalog, str]:
    data, tag = store.tagged(CATALOG)
    return read_catalog(lambda: data), tag


def require_newest(store: FileStore, own: int) -> None:
    """Checks with one request that the claim is still the newest one.

    Raises:
        LockHeld: Another trainer has claimed the versions since.
        UnusablePlace: The object store cannot be reached.
    """
    try:
        host = documents.decode(store.read(_claim_name(own + 1)), _Claim).host
    except FileNotFoundError:
        return
    except msgspec.MsgspecError:
        host = _Claim().host
    raise _lost(store, host)


def _lost(store: FileStore, host: str) -> LockHeld:
    return LockHeld(
        f"the registry at {store.name} has another trainer, on {host}: this one did not renew its claim for {LEASE_S:g} s",
        "start it again: it becomes the standby",
    )


def _claim_name(number: int) -> str:
    return f"{CLAIMS}/{number:08d}.json"


# The catalogue


class Catalog(msgspec.Struct, frozen=True):
    """The contents of the object store.

    Attributes:
        last: The highest number that any version has had.
        folders: Folder of each durable version, such as `bases/000000000001` -> first digits of its manifest's SHA-256.
        programs: Digests of the programs.
    """

    serial: int = 0
    claim: int = 0
    last: int = 0
    folders: dict[str, str] = {}
    programs: tuple[str, ...] = ()


def read_catalog(read: Callable[[], bytes]) -> Catalog:
    """The catalogue that `read` returns; an empty one if it is missing or damaged."""
    try:
        return documents.decode_sealed(read(), Catalog)
    except (OSError, ValueError):
        return Catalog()


def version_of(folder: str) -> int:
    """The version of a folder.

    >>> version_of("merged/000000000012-000000000007")
    12
    """
    return int(folder.rpartition("/")[2].partition("-")[0])


def _mark(data: bytes) -> str:
    return durable.digest(data)[:_MARK_DIGITS]


# Packs


class Pack(msgspec.Struct, frozen=True):
    """Several recent versions in one file, so that a host fetches them with one request a second.

    Attributes:
        serial: Serial number of the catalogue when the pack was built.
        versions: (number, files by name) of each version, ascending.
    """

    serial: int
    versions: list[tuple[int, dict[str, bytes]]]


_packs = msgspec.msgpack.Decoder(Pack)


def pack_name(first: int) -> str:
    """The name of the pack that begins with this version; a host that has the preceding version can compute it."""
    return f"{RECENT}/{first:012d}"


def encode_pack(pack: Pack) -> bytes:
    """Encodes a pack: the SHA-256 of a zstd frame, then the frame: MessagePack.

    >>> decode_pack(encode_pack(Pack(4, [(7, {"manifest.json": b"{}", "a": b"12"})])))
    Pack(serial=4, versions=[(7, {'manifest.json': b'{}', 'a': b'12'})])
    """
    frame = zstandard.ZstdCompressor(level=_LEVEL).compress(msgspec.msgpack.encode(pack))
    return hashlib.sha256(frame).digest() + frame


def decode_pack(data: bytes) -> Pack:
    """Decodes what `encode_pack` wrote.

    Raises:
        ValueError: It is truncated or damaged.
    """
    frame = data[_DIGEST_BYTES:]
    if hashlib.sha256(frame).digest() != data[:_DIGEST_BYTES]:
        raise ValueError("a pack of versions fails its digest")
    if not 0 <= zstandard.frame_content_size(frame) <= MOST_PACK_BYTES:
        raise ValueError("a pack of versions is larger than any")
    return _packs.decode(zstandard.ZstdDecompressor().decompress(frame))


# The trainer's side


class RecentSender:
    """Pushes recent versions as soon as they exist and the preceding pack is sent. Not thread-safe.

    Args:
        path: The registry's directory; the caller holds the trainer's lock.
        claim: The claim number under which this trainer owns the versions.
    """

    def __init__(
        self,
        path: Path,
        store: FileStore,
        claim: int,
        serial: Callable[[], int],
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._store, self._claim = Registry(path), store, claim
        self._serial, self._elapsed = serial, elapsed
        self._last = self._registry.next_number() - 1
        self._fenced_s = float("-inf")
        self._packs: deque[tuple[float, str]] = deque()
        self._old: list[str] | None = None

    def send(self) -> int:
        """Sends the versions that are new since the last call; returns their number.

        Raises:
            UnusablePlace: The object store cannot be reached. The next call sends versions that still exist locally.
            LockHeld: Another trainer owns the versions.
        """
        if self._old is None:
            self._old = [f"{RECENT}/{name}" for name in self._store.names(RECENT)]
        numbers = [number for number in self._registry.recents() if number > self._last]
        versions = list(self._complete(numbers[-MOST_IN_PACK:]))
        if not versions:
            return 0
        if self._elapsed() - self._fenced_s >= FENCE_S:
            require_newest(self._store, self._claim)
            self._fenced_s = self._elapsed()
        name = pack_name(versions[0][0])
        self._store.write(name, encode_pack(Pack(self._serial(), versions)))
        killpoints.reach("share.pack")
        self._last = versions[-1][0]
        self._packs.append((self._elapsed(), name))
        self._remove_old()
        return len(versions)

    def _complete(self, numbers: list[int]) -> Iterator[tuple[int, dict[str, bytes]]]:
        """The files of recent versions that still exist locally; the manifest is the last file of each."""
        for number in numbers:
            folder = self._registry.folder("recent", number)
            try:
                part = manifest.decode(file_bytes(folder / MANIFEST))
                files = {name: file_bytes(folder / name) for name in part.files}
            except (FileNotFoundError, ValueError):
                continue
            yield number, files | {MANIFEST: manifest.encode(part)}

    def _remove_old(self) -> None:
        while self._old:
            self._store.remove(self._old[-1])
            self._old.pop()
        while len(self._packs) > 1 and self._elapsed() - self._packs[0][0] > KEPT_PACKS_S:
            self._store.remove(self._packs[0][1])
            self._packs.popleft()


class DurableSender:
    """Pushes durable versions to the store, and deletes versions there that were deleted locally. Not thread-safe.

    The arguments are those of `RecentSender`.
    """

    def __init__(self, path: Path, store: FileStore, claim: int) -> None:
        self._registry, self._store, self._claim = Registry(path), store, claim
        self._registry.directory.shared = store
        self._path = path
        self._catalog: Catalog | None = None
        self._tag = ""
        self._marks: dict[str, tuple[int, str]] = {}
        self._damaged: set[tuple[str, str]] = set()
        self._settled_ns: tuple[int, ...] | None = None

    @property
    def serial(self) -> int:
        """Serial number of the newest catalogue."""
        return 0 if self._catalog is None else self._catalog.serial

    def send(self) -> bool:
        """Sends the oldest version that the store lacks, or deletes versions; returns whether it did either.

        Raises:
            UnusablePlace: The object store cannot be reached. Everything that its catalogue names is complete.
            LockHeld: Another trainer owns the versions.
        """
        catalog = self._catalog or self._first_catalog()
        changed_ns = self._changed_ns()
        if changed_ns == self._settled_ns:
            return False
        local = self._local(catalog.folders)
        unsent = [
            entry for entry in local.items() if catalog.folders.get(entry[0]) != entry[1] and entry not in self._damaged
        ]
        removed = [folder for folder in catalog.folders if folder not in local]
        if unsent:
            self._send(catalog, min((folder for folder, _ in unsent), key=_age))
        elif removed:
            self._remove(catalog, removed)
        elif time.time_ns() - max(changed_ns) > _TICK_NS:
            self._settled_ns = changed_ns
        return bool(unsent or removed)

    def _changed_ns(self) -> tuple[int, ...]:
        with usable("be listed"):
            return tuple((self._path / folder).stat().st_mtime_ns for folder in DURABLE)

    def _first_catalog(self) -> Catalog:
        catalog, self._tag = _tagged_catalog(self._store)
        local = self._local(catalog.folders)
        for folder in DURABLE:
            for name in self._store.names(folder):
                version = f"{folder}/{name.partition('/')[0]}"
                if version not in catalog.folders and version not in local:
                    self._store.remove(f"{folder}/{name}")
        self._catalog = catalog
        return catalog

    def _local(self, known: Mapping[str, str]) -> dict[str, str]:
        """Folder -> mark of its manifest, for all local durable versions; from `known` for those not fetched yet."""
        marks = {}
        with usable("be listed"):
            for name in durable_folders(self._path):
                mark = self._mark(self._path / name) or known.get(name)
                if mark is not None and (self._path / name).is_dir():
                    marks[name] = mark
        self._marks = {name: mark for name, mark in self._marks.items() if name in marks}
        return marks

    def _mark(self, path: Path) -> str | None:
        name = f"{path.parent.name}/{path.name}"
        try:
            changed_ns = (path / MANIFEST).stat().st_mtime_ns
            if self._marks.get(name, (0, ""))[0] != changed_ns:
                self._marks[name] = (changed_ns, _mark(file_bytes(path / MANIFEST)))
        except FileNotFoundError:
            return None
        return self._marks[name][1]

    def _send(self, catalog: Catalog, folder: str) -> None:
        """1. Its program. 2. Its files. 3. Its manifest. 4. The catalogue."""
        try:
            data = file_bytes(self._path / folder / MANIFEST)
            part = manifest.decode(data)
            files = {name: self._registry.read(part, name) for name in part.files}
        except (FileNotFoundError, UnknownVersion):
            # The compactor removed it meanwhile.
            return
        except (ValueError, CorruptVersion):
            # The version is damaged: the code that loads it locally sets it aside, and it is not sent.
            self._damaged.add((folder, _mark(data)))
            return
        require_newest(self._store, self._claim)
        # 1.
        programs = {*catalog.programs}
        if part.program not in programs and (program := self._program(part.program)) is not None:
            self._store.write(f"{layout.PROGRAMS}/{part.program}.tflite", program)
            programs.add(part.program)
        # 2.
        for name, content in files.items():
            self._store.write(f"{folder}/{name}", content)
            killpoints.reach("share.file")
        # 3.
        self._store.write(f"{folder}/{MANIFEST}", data)
        killpoints.reach("share.manifest")
        # 4.
        self._write_catalog({**catalog.folders, folder: _mark(data)}, programs)
        killpoints.reach("share.named")

    def _program(self, digest: str) -> bytes | None:
        try:
            return self._registry.specs.program(digest)
        except CorruptVersion:
            return None

    def _remove(self, catalog: Catalog, removed: list[str]) -> None:
        """1. The catalogue. 2. Manifests. 3. Files. 4. Programs that no longer exist here."""
        programs = {path.stem for path in (self._path / layout.PROGRAMS).glob("*.tflite")}
        # 1.
        folders = {name: mark for name, mark in catalog.folders.items() if name not in removed}
        self._write_catalog(folders, programs.intersection(catalog.programs))
        killpoints.reach("share.unnamed")
        for folder in removed:
            # 2.
            self._store.remove(f"{folder}/{MANIFEST}")
            # 3.
            for name in self._store.names(folder):
                self._store.remove(f"{folder}/{name}")
        # 4.
        for digest in catalog.programs:
            if digest not in programs:
                self._store.remove(f"{layout.PROGRAMS}/{digest}.tflite")

    def _write_catalog(self, folders: dict[str, str], programs: set[str]) -> None:
        """Replaces the catalogue, unless another trainer owns the versions by now.

        Raises:
            LockHeld: Another trainer replaced it.
            UnusablePlace: An earlier request took effect whose response was lost; the next call continues from there.
        """
        require_newest(self._store, self._claim)
        last = self._registry.next_number() - 1
        catalog = Catalog(self.serial + 1, self._claim, last, folders, tuple(sorted(programs)))
        if tag := self._store.swap(CATALOG, documents.encode_sealed(catalog), self._tag):
            self._catalog, self._tag = catalog, tag
            return
        stored, tag = _tagged_catalog(self._store)
        if stored.claim != self._claim:
            raise _lost(self._store, "another host")
        self._catalog, self._tag = stored, tag
        raise UnusablePlace(f"{CATALOG} at {self._store.name} has changed", "it is read again")


def _age(folder: str) -> tuple[int, bool]:
    """Sort key: by number, a base before a delta of the same number, so that followers find the base first.

    >>> sorted(["versions/000000000002", "bases/000000000002", "versions/000000000001"], key=_age)
    ['versions/000000000001', 'bases/000000000002', 'versions/000000000002']
    """
    return version_of(folder), not folder.startswith(layout.BASES)


# Each host's side


class Copier:
    """One host's copier. It is used by one thread, and optionally by a second one for control.

    Args:
        path: The registry's directory, which is bound to the store.
    """

    def __init__(self, path: Path, store: FileStore, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._store = Registry(path), store
        self._directory = self._registry.directory
        self._directory.shared = store
        # A separate object, because another thread may use it.
        self._controls = Controls(path)
        self._elapsed = elapsed
        self._catalog = read_catalog((path / layout.SHARED_CATALOG).read_bytes)
        self._wanted_serial = self._catalog.serial
        self._next: int | None = None
        self._last_fetched = 0
        self._damaged: set[int] = set()
        self._fetched_s = self._small_s = float("-inf")
        self._at_end = False
        self._rests_until_s: float | None = None
        now_s = elapsed()
        self._recent = deque((now_s, number) for number in self._registry.recents())
        self._pushed: dict[str, dict[str, int]] = {}
        self._exchanged_s = float("-inf")
        self._began = False

    def step(self, control: bool = True) -> None:
        """Runs one round; `control` is False if another thread fetches control.

        Raises:
            UnusableRegistry: The store cannot be reached, or the disk refused.
            CorruptVersion: A file in the store is damaged.
        """
        if control:
            self.fetch_control()
        if self._directory.is_copy:
            self._fetch_versions()
        self._push_own(layout.ERASURES)
        if self._elapsed() - self._exchanged_s >= RENEW_S and (self._registry.path / layout.HOSTS).is_dir():
            self._exchange_hosts()
            self._exchanged_s = self._elapsed()
        if self._elapsed() - self._small_s >= SMALL_S:
            exchange_small(self._registry, self._store)
            self._small_s = self._elapsed()

    def fetch_control(self) -> None:
        """Fetches generations in order. For one thread, which may be any.

        A host that just started lists the generations; later calls request the next one.

        Raises:
            UnusableRegistry: The store cannot be reached, or the disk refused.
            CorruptVersion: A generation in the store is damaged.
        """
        newest = self._controls.control()
        at = newest.generation if newest else 0
        if not self._began:
            with sharing():
                listed = [name.removesuffix(".json") for name in self._store.names(layout.CONTROL)]
            numbers = sorted(int(name) for name in listed if name.isdecimal() and int(name) > at)
            with ThreadPoolExecutor(AT_ONCE) as threads:
                for number, data in zip(numbers, threads.map(self._fetch_generation, numbers), strict=True):
                    if data is not None:
                        self._controls.receive(number, data)
                    at = number
        while (data := self._fetch_generation(at + 1)) is not None:
            self._controls.receive(at + 1, data)
            killpoints.reach("copy.control")
            at += 1
        self._began = True

    def _fetch_generation(self, generation: int) -> bytes | None:
        return self._fetch(f"{layout.CONTROL}/{generation:08d}.json")

    def _fetch_versions(self) -> None:
        rested = self._rests_until_s is not None and self._elapsed() >= self._rests_until_s
        if rested:
            self._rests_until_s = None
        again = rested or self._elapsed() - self._fetched_s >= SILENT_S
        if again:
            self._fetch_catalog()
            self._find_packs()
        fetched = self._rests_until_s is None and self._fetch_packs()
        if self._wanted_serial != self._catalog.serial:
            self._fetch_catalog()
        while len(self._recent) > 1 and self._elapsed() - self._recent[0][0] > RECENT_S:
            self._registry.remove("recent", self._recent.popleft()[1])
        if fetched or again:
            self._fetched_s = self._elapsed()

    def _find_packs(self) -> None:
        with sharing():
            firsts = sorted(int(name) for name in self._store.names(RECENT) if name.isdecimal())
        behind = max(self._last_fetched, *(version_of(folder) for folder in self._catalog.folders), 0)
        # A pack whose successor begins at or before the next needed version has nothing new.
        for first, after in zip(firsts, [*firsts[1:], None], strict=False):
            if first > self._last_fetched and first not in self._damaged and (after is None or after > behind + 1):
                self._next = first
                return

    def _fetch_packs(self) -> bool:
        """Fetches packs until there is no next one, or for `SILENT_S`; returns whether a version arrived.

        If the last poll reached the end, this poll fetches one pack: it is the newest, or the next poll finds more.
        """
        fetched, only_one, until_s = False, self._at_end, self._elapsed() + SILENT_S
        self._at_end = False
        while self._rests_until_s is None:
            data = None if self._next is None else self._fetch(pack_name(self._next))
            if self._next is None or data is None:
                self._at_end = True
                break
            pack = self._decoded_pack(self._next, data)
            fetched = self._add_recent(pack) or fetched
            if not pack.versions or pack.versions[-1][0] < self._next:
                break
            self._last_fetched = pack.versions[-1][0]
            self._next = self._last_fetched + 1
            self._wanted_serial = pack.serial
            killpoints.reach("copy.pack")
            if only_one:
                break
            if self._elapsed() >= until_s:
                self._rests_until_s = self._elapsed() + REST_S
                _log.info(
                    "the link to %s is too slow for all versions: only durable versions for %.0f s",
                    self._store.name,
                    REST_S,
                )
        return fetched

    def _decoded_pack(self, first: int, data: bytes) -> Pack:
        try:
            return decode_pack(data)
        except ValueError as error:
            self._next = None
            self._damaged.add(first)
            raise CorruptVersion(
                f"{pack_name(first)} at {self._store.name}: {error}", "durable versions lead past it by themselves"
            ) from error

    def _add_recent(self, pack: Pack) -> bool:
        added = False
        for number, files in pack.versions:
            part = manifest.decode(files[MANIFEST])
            if self._registry.add(part, {name: data for name, data in files.items() if name != MANIFEST}):
                self._recent.append((self._elapsed(), number))
                added = True
        return added

    def _fetch_catalog(self) -> None:
        """Applies the newest catalogue.

        1. New versions get empty folders.
        2. Versions that were rewritten in the store are fetched again, and versions removed there are removed locally.
        3. The catalogue is stored.
        """
        data = self._fetch(CATALOG)
        if data is None:
            return
        try:
            catalog = documents.decode_sealed(data, Catalog)
        except ValueError as error:
            raise UnusableRegistry(
                f"{CATALOG} at {self._store.name} is damaged: {error}", "restart the trainer: it writes it again"
            ) from error
        before, path = self._catalog, self._registry.path
        self._wanted_serial = catalog.serial
        if catalog == before:
            return
        with usable("store the names of versions"):
            # 1.
            for folder in catalog.folders:
                (path / folder).mkdir(parents=True, exist_ok=True)
            # 2.
            for folder, mark in catalog.folders.items():
                if before.folders.get(folder) != mark:
                    self._registry.refresh(path / folder, mark)
            for folder in before.folders.keys() - catalog.folders.keys():
                self._directory.remove_folder(path / folder)
            for digest in set(before.programs) - set(catalog.programs):
                (path / layout.PROGRAMS / f"{digest}.tflite").unlink(missing_ok=True)
            killpoints.reach("copy.named")
            # 3.
            self._directory.keep(path / layout.SHARED_CATALOG, data)
        self._catalog = catalog

    def _push_own(self, folder: str) -> set[str]:
        """Pushes the documents of this host's processes that changed; removes withdrawn ones; returns the names."""
        path, pushed = self._registry.path / folder, self._pushed.setdefault(folder, {})
        with usable("be read"):
            own = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.glob("*.json")}
        with sharing():
            for name, (changed_ns, data) in own.items():
                if pushed.get(name) != changed_ns:
                    self._store.write(f"{folder}/{name}", data)
                    pushed[name] = changed_ns
            for name in pushed.keys() - own.keys():
                self._store.remove(f"{folder}/{name}")
                del pushed[name]
        return set(own)

    def _exchange_hosts(self) -> None:
        """Pushes this host's entries of the routing table, and fetches those of other hosts.

        1. Changed entries are pushed, and withdrawn entries are removed.
        2. The entries of other hosts are read. Entries of hosts that are gone are removed.
        3. The entries are stored locally in one file.
        """
        # 1.
        own = self._push_own(layout.HOSTS)
        # 2.
        with sharing():
            others = stored_documents(self._store, layout.HOSTS, HostEntry, own)
            for name, entry in others.items():
                if wall_ms() - entry.at_ms > GONE_S * 1000:
                    self._store.remove(f"{layout.HOSTS}/{name}")
        # 3.
        fetched = self._registry.path / layout.HOSTS / layout.FETCHED
        self._directory.keep(fetched, msgspec.json.encode([*others.values()]))

    def _fetch(self, name: str) -> bytes | None:
        return self._directory.fetch(self._registry.path / name)


def exchange_small(registry: Registry, store: FileStore) -> int:
    """Pushes and fetches the small immutable files that the other side lacks; returns how many files were copied.

    The file that marks a folder as complete is copied last, in both directions.

    Raises:
        UnusableRegistry: The object store cannot be reached, or the disk refused.
    """
    count = 0
    for folder in SMALL:
        root = registry.path / folder
        with sharing():
            remote = {name for name in store.names(folder) if _is_permanent(name)}
        with usable("be listed"):
            local = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        local = {name for name in local if _is_permanent(name)}
        for name in sorted(local - remote, key=_complete_last):
            with usable("be read"), sharing():
                store.create(f"{folder}/{name}", (root / name).read_bytes())
            killpoints.reach("share.small")
            count += 1
        for name in sorted(remote - local, key=_complete_last):
            if (data := registry.directory.fetch(root / name)) is None:
                continue
            with usable(f"store {folder}"):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
            registry.directory.keep(root / name, data)
            killpoints.reach("copy.small")
            count += 1
    return count


def _is_permanent(name: str) -> bool:
    return not durable.is_temporary(name) and ".bad" not in name


def _complete_last(name: str) -> tuple[bool, str]:
    return name.rpartition("/")[2] in _COMPLETE, name
