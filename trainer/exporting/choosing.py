"""Chooses the rows of a device's file: those of the named users, and of each other table those seen last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from state.errors import SettingsError
from state.events.identity import Salt, user_id
from trainer.engine.step import Trainer
from trainer.exporting.device_file import U64, ChosenRows, placed
from trainer.tables.table import Table


def read_users(path: Path, salt: Salt) -> list[int]:
    """The pseudonyms of the users in a file, which has one raw id a line; empty lines are ignored.

    Raises:
        SettingsError: The file cannot be read.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"the users in {path} cannot be read ({error})", "name a file with one user id a line"
        ) from error
    return [user_id(salt, line.strip()) for line in lines if line.strip()]


def choose(trainer: Trainer, users: Sequence[int], most: int) -> dict[str, ChosenRows]:
    """The rows, by table, that a device's file contains.

    Args:
        trainer: Restored to the version.
        users: In the order of their indices; a user without a row has zeros.
        most: The most rows of any other table.
    """
    return {name: _of(trainer, name, users, most) for name in sorted({one.table for one in placed(trainer.model)})}


def _of(trainer: Trainer, name: str, users: Sequence[int], most: int) -> ChosenRows:
    table = trainer.tables[name]
    assert isinstance(table, Table)
    if name == "user":
        ids: U64 = np.array(users, np.uint64)
        return ChosenRows(ids, table.gather(table.find(ids)))
    held = table.state()
    # Newest first, ties by id, so that the same version gives the same file.
    newest = np.lexsort((held.ids, -held.last_seen_ms))[:most]
    return ChosenRows(held.ids[newest], held.rows[newest])
