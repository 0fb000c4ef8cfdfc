"""A live store as a stream of bytes: one moment of it, without a second copy on the disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from state.disk.lmdb_store import LmdbStore
from state.errors import StoreError


@contextmanager
def snapshot(store: LmdbStore) -> Iterator[BinaryIO]:
    """What `data.mdb` of a copy of the store as of now is, to be read in the block; its writer goes on meanwhile.

    Raises:
        StoreError: It cannot be read to its end.
    """
    reading, writing = os.pipe()
    failed: list[StoreError] = []

    def write() -> None:
        try:
            store.copy_as_is(writing)
        except StoreError as error:
            failed.append(error)
        finally:
            os.close(writing)

    # The copy is made by native code, which waits where the pipe is full.
    writer = threading.Thread(target=write, name="snapshot")
    writer.start()
    try:
        with os.fdopen(reading, "rb", buffering=0) as stream:
            yield stream
    finally:
        # A closed pipe ends it.
        writer.join()
    if failed:
        raise failed[0]
