"""Names of the tables of rows: those of every version, and a ranker's own tables with their program inputs.

The name of a ranker's own table has small letters, digits and underscores. Its
rows are inputs of a program, called `<table>_of_<ids>`. So the signature of a
program tells the runner which rows to look up.

>>> own_input("attended", "sequence_items"), own_rows_of("attended_of_sequence_items")
('attended_of_sequence_items', ('attended', 'sequence_items'))
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

TABLES = ("user", "item", "category", "context", "cross", "transition")
"""Tables of every version, in the order of their numbers in keys."""

TAKEN = frozenset({*TABLES, "dense", "slots", "state", "popular", "churn"})
"""Names that a ranker's own table may not have: other tensors in a version's files begin with them."""

OWN = 7
"""The number in keys of all rankers' own tables; the hash of the name distinguishes them."""

SERVED_IDS = (
    "user", "item", "category", "context", "item_attributes", "recent", "popular", "successor", "sequence_items",
    "sequence_categories", "sequence_actions",
)  # fmt: skip
"""The ids whose rows serving can look up in a ranker's own table."""

AVERAGED_IDS = frozenset({"context", "item_attributes", "negative_item_attributes"})
"""Ids whose rows are averaged, since settings determine how many there are."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class _Codes(dict[str, int]):
    """Code of each table by name: its number in keys. A ranker's own has the name's hash (32 bits) before `OWN`."""

    def __missing__(self, table: str) -> int:
        code = int.from_bytes(hashlib.sha256(table.encode()).digest()[:4], "big") << 3 | OWN
        self[table] = code
        return code


CODES = _Codes({name: number for number, name in enumerate(TABLES)})


def is_name(text: str) -> bool:
    """Whether a ranker's own table may have this name.

    >>> is_name("attended"), is_name("Attended"), is_name("cross")
    (True, False, False)
    """
    return _NAME.fullmatch(text) is not None and text not in TAKEN


def tables_in(tensors: Iterable[str]) -> tuple[str, ...]:
    """The tables of a version, from the names of its tensors: those of every version, then a ranker's own by name.

    >>> tables_in(["item.ids", "attended.ids", "attended.rows", "state.popular.ids"])[len(TABLES):]
    ('attended',)
    """
    return *TABLES, *sorted(name[:-4] for name in tensors if name.endswith(".ids") and is_name(name[:-4]))


def own_input(table: str, ids: str) -> str:
    """The name of a program's input for the rows of `ids` in the ranker's own `table`."""
    return f"{table}_of_{ids}"


def own_rows_of(name: str) -> tuple[str, str] | None:
    """Parses the name of a program's input into table and ids; None for any other input.

    >>> own_rows_of("item_row")
    """
    table, _, ids = name.rpartition("_of_")
    return (table, ids) if ids in SERVED_IDS and is_name(table) else None
