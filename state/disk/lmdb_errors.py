"""Write transactions of the stores in LMDB: what LMDB raises becomes one of our errors, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from state.errors import CorruptStore, StoreFull

DAMAGED = (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError, lmdb.VersionMismatchError)
"""What LMDB raises for a store that was damaged or is none."""


@contextmanager
def written(environment: lmdb.Environment, path: Path, remedy: str) -> Iterator[lmdb.Transaction]:
    """A write transaction, committed where the block ends; an exception leaves the store as it was.

    Args:
        environment: The store's.
        path: Its directory, for messages.
        remedy: What to do where the store is damaged.

    Raises:
        StoreFull: The map or the disk is full.
        CorruptStore: The store is damaged.
    """
    try:
        with environment.begin(write=True) as transaction:
            yield transaction
    except lmdb.MapFullError as error:
        raise StoreFull(
            f"{path} has reached its map of {environment.info()['map_size']} bytes; nothing was changed: "
            "raise stream.map_gb or serving.map_gb and start again"
        ) from error
    except DAMAGED as error:
        raise CorruptStore(f"{path} is damaged ({error}); {remedy}") from error
    except (lmdb.Error, OSError) as error:
        raise StoreFull(
            f"{path} could not be written ({error}); nothing was changed: free space on its disk and start again"
        ) from error
