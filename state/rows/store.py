"""Serving's multi-version embedding rows in LMDB: an answer reads exactly one version.

    rows      as `state/rows/keys.py` says -> f32[dim]; empty: removed
    versions  version u64                  -> `Served`, JSON
    dense     version u64                  -> dense tensors, safetensors
    popular   version u64                  -> u64[P] categories
    changes   version u64                  -> u64[2, k] (table, id) written since the version before it that is here
    meta      "served", "before", "serial", "floor", "erased", "format", "begun"; note:<name> -> bytes of the owner

A base goes into a lane of its own (there are 32), and deltas follow their
parent's lane; what another lane holds is never seen, and a lane without
versions is deleted.

The store is a copy of the registry. After a power cut it is begun anew.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb
from numpy.typing import NDArray

from state.disk.compact_store import CompactStore
from state.errors import StoreError, UnknownVersion
from state.features.erased import Erased
from state.process import killpoints
from state.registry.manifest import Manifest
from state.rows.entries import BEGUN, begin, entries_of, put_dense, take_back
from state.rows.erasing import erase
from state.rows.forgetting import ROUNDS, ROWS_AT_ONCE, ROWS_IN_TRANSACTION, Forgetting, Forgotten
from state.rows.keys import LANES, u64
from state.rows.reader import LastServed, RowReader, required, stored
from state.rows.served import Served
from state.rows.sweep import has_rows

if TYPE_CHECKING:
    from state.ranking.crosses import Crosses

Tensors = Mapping[str, NDArray[Any]]
WRITTEN_AT_ONCE = 250
"""Rows of a version in a transaction; as fast as a thousand."""


class RowStore(CompactStore):
    """The store; one process writes (one thread of it), any number of processes read.

    Args:
        path: Its directory, made where it is missing.
        map_bytes: Upper bound of its size; address space, not memory.
        readonly: Opens an existing store for reading only.
        boot_id: Which start of the machine this is; by default the kernel's.

    Raises:
        CorruptStore: It cannot be trusted; see `open_anew`.
        StoreError: It cannot be opened; with `readonly`, there may be none yet.
    """

    noun = "rows"
    databases = ("rows", "versions", "dense", "popular", "changes")
    map_setting = "serving.map_gb"
    writer = "the applier"
    remedy = "remove it: the applier makes it anew from the registry"
    origin = "the registry"

    def __init__(
        self, path: Path, map_bytes: int = 1 << 34, readonly: bool = False, boot_id: str | None = None
    ) -> None:
        super().__init__(path, map_bytes, readonly, boot_id)

    def _bind(self) -> None:
        opened = self._databases
        self._rows, self._versions, self._changes = opened["rows"], opened["versions"], opened["changes"]
        self._last = LastServed()
        self._forgetting = Forgetting(opened)

    @contextmanager
    def reader(self) -> Iterator[RowReader]:
        """A read transaction over rows, dense weights, popular categories and pointer."""
        with self._env.begin() as transaction:
            yield RowReader(transaction, self._databases, self._last)

    def accepts(self, manifest: Manifest) -> bool:
        """Whether `apply` would take this version now: a base, or a delta whose parent's lane still holds all it needs."""
        with self._env.begin() as transaction:
            return manifest.kind == "base" or self._parent(manifest, transaction) is not None

    def _parent(self, manifest: Manifest, transaction: lmdb.Transaction) -> Served | None:
        if manifest.parent is None:
            return None
        record = stored(transaction, u64(manifest.parent), self._versions)
        parent = None if record is None else Served.parse(record)
        if parent is None or manifest.version <= self._floors(transaction).get(str(parent.lane), 0):
            return None
        return parent

    def _required_parent(self, manifest: Manifest, transaction: lmdb.Transaction) -> Served | None:
        """What a delta builds on; None for a base."""
        if manifest.kind == "base":
            return None
        parent = self._parent(manifest, transaction)
        if parent is None:
            raise UnknownVersion(
                f"version {manifest.version} builds on version {manifest.parent}, whose rows are not here",
                "apply its base",
            )
        return parent

    def _floors(self, transaction: lmdb.Transaction) -> dict[str, int]:
        floors: dict[str, int] = json.loads(stored(transaction, b"floor", self._meta) or b"{}")
        return floors

    def apply(
        self, manifest: Manifest, tensors: Tensors, now_ms: int, follow: bool = False, replace: bool = False
    ) -> bool:
        """Adds one version, at one moment for all readers; with `follow` answers use it from then on.

        Rows beyond WRITTEN_AT_ONCE are written before, where nobody sees them: LMDB keeps the memory of as many pages as its
        largest transaction changed, and nearly each row lies on a page of its own.

        Args:
            manifest: The version; a base sees its own rows only, a delta its parent's too.
            tensors: `<table>.ids` `[k]` uint64, `<table>.rows` `[k, dim]` float32, `<table>.removed` `[r]`
                uint64, `dense.<name>`, `popular` `[P]` uint64. Where there are no dense ones, they are the parent's.
            now_ms: The time of application.
            follow: Moves the pointer in the same transaction.
            replace: Applies it again where it is applied already (a rebuilt lane).

        Returns:
            Whether it was added; False where it was there.

        Raises:
            UnknownVersion: The parent is not here, or what the delta builds on was swept.
            StoreFull: Disk or map are full; nothing that anybody reads was changed.
            UnusableDisk: The disk refused; nothing that anybody reads was changed.
        """
        with self._write() as transaction:
            take_back(transaction, self._databases)
            is_here = transaction.get(u64(manifest.version), db=self._versions) is not None
            if is_here and not replace:
                if follow:
                    self._point(manifest.version, transaction)
                return False
            parent = self._required_parent(manifest, transaction)
            lane = self._begin_lane(transaction) if parent is None else parent.lane
            entries = entries_of(tensors, lane, manifest.version)
            if len(entries.pairs) > WRITTEN_AT_ONCE:
                begin(transaction, self._databases, manifest.version, lane, entries.changes)
        while len(entries.pairs) > WRITTEN_AT_ONCE:
            with self._write() as transaction:
                transaction.cursor(self._rows).putmulti(entries.pairs[:WRITTEN_AT_ONCE])
            del entries.pairs[:WRITTEN_AT_ONCE]
            killpoints.reach("rows.begun")
        with self._write() as transaction:
            # What it wrote in its lane counts as written by the next version there.
            replaced = self._forgetting.forget(transaction, {manifest.version}) if is_here else Forgotten()
            transaction.cursor(self._rows).putmulti(entries.pairs)
            transaction.delete(BEGUN, db=self._meta)
            transaction.put(u64(manifest.version), entries.changes.tobytes(), db=self._changes)
            put_dense(
                transaction, self._databases, manifest.version, tensors, None if parent is None else parent.version
            )
            dims = {} if parent is None else dict(parent.dims)
            self._put_record(manifest, parent, lane, dims | entries.dims, now_ms, transaction)
            served = (stored(transaction, b"served", self._meta) or b"")[:8]
            if follow or served == u64(manifest.version):
                self._point(manifest.version, transaction)
        self._forgetting.took(replaced)
        return True

    def _put_record(
        self,
        manifest: Manifest,
        parent: Served | None,
        lane: int,
        dims: dict[str, int],
        now_ms: int,
        transaction: lmdb.Transaction,
    ) -> None:
        serial = int.from_bytes(stored(transaction, b"serial", self._meta) or b"", "big") + 1
        transaction.put(b"serial", u64(serial), db=self._meta)
        record = Served.of(manifest, parent, serial, lane, dims, now_ms)
        transaction.put(u64(manifest.version), record.to_json(), db=self._versions)

    def _point(self, version: int, transaction: lmdb.Transaction) -> None:
        record = Served.parse(required(transaction, version, self._versions))
        before = (stored(transaction, b"served", self._meta) or b"")[:8]
        if before and before != u64(version):
            transaction.put(b"before", before, db=self._meta)
        transaction.put(b"served", u64(version) + u64(record.serial), db=self._meta)

    def serve(self, version: int) -> None:
        """Moves the pointer: from now on answers use `version`.

        Raises:
            UnknownVersion: It is not applied here.
        """
        self.steer({}, version)

    def steer(self, notes: Mapping[str, bytes], version: int | None = None) -> None:
        """Stores the owner's `notes` and, with `version`, moves the pointer, both at the same moment.

        Raises:
            UnknownVersion: `version` is not applied here; nothing was changed.
        """
        with self._write() as transaction:
            for name, value in notes.items():
                transaction.put(b"note:" + name.encode(), value, db=self._meta)
            if version is not None:
                self._point(version, transaction)

    def _begin_lane(self, transaction: lmdb.Transaction) -> int:
        taken = {Served.parse(record).lane for _, record in transaction.cursor(self._versions)}
        for lane in range(LANES):
            if lane not in taken and not has_rows(transaction, self._rows, lane):
                # Any version may come here again.
                floors = {one: floor for one, floor in self._floors(transaction).items() if one != str(lane)}
                transaction.put(b"floor", json.dumps(floors).encode(), db=self._meta)
                return lane
        raise StoreError(
            f"all {LANES} lanes of {self.path} hold versions", "lower serving.keep_s so that old ones are swept"
        )

    def sweep(self, horizon_ms: int, keep: Sequence[int] = ()) -> int:
        """Forgets versions applied before `horizon_ms`, and deletes the rows that only they could see.

        The served version and those of `keep` stay.

        Args:
            horizon_ms: Versions applied at or after this time stay.
            keep: Versions that stay whatever their age.

        Returns:
            How many versions were forgotten.
        """
        with self.reader() as reader:
            old = [one.version for one in reader.versions() if one.applied_at_ms < horizon_ms]
        forgotten = self.forget(set(old) - {*keep})
        while self.tidy():
            pass
        return forgotten

    def forget(self, versions: Collection[int]) -> int:
        """Forgets these versions but for the served one, with their dense weights; `tidy` deletes what they leave.

        Returns:
            How many there were.

        Raises:
            StoreFull: Nothing was changed.
        """
        with self._write() as transaction:
            served = stored(transaction, b"served", self._meta) or bytes(8)
            found = self._forgetting.forget(transaction, {*versions} - {int.from_bytes(served[:8], "big")})
        self._forgetting.took(found)
        return found.versions

    def tidy(self, at_most: int | None = None) -> bool:
        """Looks at some rows of forgotten versions and deletes what nobody reads; whether there are more to look at.

        Args:
            at_most: How many rows, so that no version waits long; None for ROWS_AT_ONCE, and more where many are left.

        Raises:
            StoreFull: What was not looked at is left to look at.
        """
        if at_most is None:
            at_most = max(ROWS_AT_ONCE, self._forgetting.rows_left // ROUNDS)
        with self._env.begin() as transaction:
            retained = self._forgetting.retained(transaction)
        while at_most > 0 and self._forgetting.left:
            with self._write() as transaction:
                floors = self._floors(transaction)
                done = self._forgetting.tidy(transaction, retained, floors, min(at_most, ROWS_IN_TRANSACTION))
                if done.floors != floors:
                    transaction.put(b"floor", json.dumps(done.floors).encode(), db=self._meta)
            self._forgetting.took(done)
            # Lanes without versions are looked at once no row is left, by so much a call.
            at_most = at_most - done.looked if done.looked else 0
        return self._forgetting.left

    def erase(self, erased: Erased, crosses: Crosses, version: int | None = None) -> int:
        """Deletes what is here of erased users, or what one version wrote; see `state/rows/erasing.py`. Returns how many entries."""
        with self._write() as transaction:
            return erase(transaction, self._databases, erased, crosses, version)

    def erased(self) -> int:
        """The last erasure of whose users all that was here is deleted."""
        with self._env.begin() as transaction:
            return int.from_bytes(stored(transaction, b"erased", self._meta) or b"", "big")

    def entries(self) -> int:
        """How many row entries are stored, over all versions."""
        with self._env.begin() as transaction:
            return int(transaction.stat(self._rows)["entries"])
