"""The newest attributes of each user and item in LMDB, committed together with how far their topics were read.

    user, item   id u64 BE -> the attributes' ids, u64 LE each, then their texts as JSON
    meta         user, item -> `Place` as JSON

The store is derived: a compacted topic still has the newest record of each
key. Where it cannot be trusted (a power cut, damage, other settings, another
topic) it is begun anew and the topic is read from its beginning.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lmdb
import numpy as np
from numpy.typing import NDArray

from state.attributes.values import SIDES
from state.disk import clean_mark as mark
from state.disk.lmdb_errors import DAMAGED, written
from state.errors import CorruptStore, StoreError

MAX_READERS = 512
OUTCOMES = ("value", "removed", "dead", "absent")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """How far one topic was read, and by whose rules.

    Attributes:
        identity: Of the fields and the salt that the ids were made with.
        topic_id: Of the topic; positions in another one do not count.
        next: Partition -> next offset.
        counts: Positions passed by outcome, of `OUTCOMES`.
        caught_up: Whether the topic was once read to where it ended at the start.
    """

    identity: str
    topic_id: str
    next: Mapping[int, int]
    counts: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    caught_up: bool = False


class AttributeStore:
    """Attributes by side and id. One thread commits; any thread of any process may read.

    Args:
        path: The store's directory.
        map_bytes: The most it may grow to.
        readonly: For readers; the writer must have made it.

    Raises:
        CorruptStore: It cannot be trusted; see `open_anew`.
        StoreError: It cannot be opened.
    """

    def __init__(self, path: Path, map_bytes: int, readonly: bool = False) -> None:
        self.path, self.readonly = path, readonly
        self._mark = path / "mark.json"
        if not readonly:
            path.mkdir(parents=True, exist_ok=True)
            if self._mark.exists() and not mark.is_trusted(self._mark.read_bytes(), mark.boot_id()):
                raise CorruptStore(f"{path} was open when the machine went down, so that pages may be missing")
            mark.write(self._mark, clean=False)
        try:
            self._env = lmdb.open(
                str(path), map_size=map_bytes, max_dbs=3, max_readers=MAX_READERS, readonly=readonly, create=not readonly,
                sync=False, metasync=False, writemap=False, readahead=False,
            )  # fmt: skip
            self._sides = {side: self._env.open_db(side.encode(), create=not readonly) for side in SIDES}
            self._meta = self._env.open_db(b"meta", create=not readonly)
        except DAMAGED as error:
            raise CorruptStore(f"{path} is damaged ({error})") from error
        except (lmdb.Error, OSError) as error:
            raise StoreError(
                f"the attributes at {path} cannot be opened ({error}); is their writer running?"
            ) from error

    def read_many(self, side: str, ids: Sequence[int]) -> list[bytes | None]:
        """The values of several ids as of one moment; see `unpack`."""
        with self._env.begin(db=self._sides[side], buffers=False) as transaction:
            return [transaction.get(one.to_bytes(8, "big")) for one in ids]

    def place(self, side: str) -> Place | None:
        """How far the side's topic was read; None before anything was."""
        with self._env.begin(db=self._meta) as transaction:
            stored = transaction.get(side.encode())
        if stored is None:
            return None
        fields = json.loads(bytes(stored))
        return Place(**fields | {"next": {int(partition): at for partition, at in fields["next"].items()}})

    def count(self, side: str) -> int:
        """How many ids have attributes."""
        with self._env.begin() as transaction:
            return int(transaction.stat(self._sides[side])["entries"])

    def commit(self, side: str, changes: Mapping[int, bytes | None], place: Place) -> None:
        """Sets the values that changed, None to remove one, and how far the topic was read: all or nothing.

        Raises:
            StoreFull: Nothing was changed.
        """
        with self._write() as transaction:
            for one, value in changes.items():
                key = one.to_bytes(8, "big")
                if value is None:
                    transaction.delete(key, db=self._sides[side])
                else:
                    transaction.put(key, value, db=self._sides[side])
            transaction.put(side.encode(), json.dumps(asdict(place)).encode(), db=self._meta)

    def begin_anew(self, side: str, place: Place) -> None:
        """Forgets a side; its topic is read again from `place`."""
        with self._write() as transaction:
            transaction.drop(self._sides[side], delete=False)
            transaction.put(side.encode(), json.dumps(asdict(place)).encode(), db=self._meta)

    def clear_readers(self) -> int:
        """Frees the reader slots of dead processes."""
        return int(self._env.reader_check())

    def close(self) -> None:
        """Closes the store; a writer's is synced and marked as closed in order."""
        if not self.readonly:
            self._env.sync(True)
            mark.write(self._mark, clean=True)
        self._env.close()

    def _write(self) -> AbstractContextManager[lmdb.Transaction]:
        return written(self._env, self.path, "remove it: it is read again from Kafka")


def open_anew(path: Path, map_bytes: int) -> AttributeStore:
    """The store for its writer; an empty one in place of one that cannot be trusted."""
    try:
        return AttributeStore(path, map_bytes)
    except CorruptStore as error:
        logger.warning("the attributes are read again from Kafka: %s", error)
        shutil.rmtree(path)
        return AttributeStore(path, map_bytes)


def pack(ids: Sequence[int], texts: Sequence[str | None]) -> bytes:
    """A value: `ids` and their texts, in the order of the attributes."""
    return np.array(ids, "<u8").tobytes() + json.dumps(texts, separators=(",", ":"), ensure_ascii=False).encode()


def ids_in(value: bytes, attributes: int) -> NDArray[np.uint64]:
    """The ids in a value, `[A]` uint64.

    >>> value = pack([7, 9], ["a", None])
    >>> ids_in(value, 2).tolist(), texts_in(value, 2)
    ([7, 9], ['a', None])
    """
    return np.frombuffer(value, "<u8", attributes)


def texts_in(value: bytes, attributes: int) -> list[str | None]:
    """The texts in a value; None for an attribute without one."""
    texts: list[str | None] = json.loads(value[8 * attributes :])
    return texts
