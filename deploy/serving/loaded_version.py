"""The version that a worker answers with: its program and weights, and all that stays the same until the next version.

The program's signature determines which inputs are rows of the ranker's own tables.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from deploy.serving import crosses
from deploy.serving.catalogue import Catalogue, ShownName
from deploy.serving.notes import REFUSED_NOTE, refused_versions
from deploy.serving.program import LoadedProgram
from deploy.serving.program_files import path_of, read_program
from deploy.serving.version_features import FeaturesOf, VersionFeatures
from state.churn.weights import ChurnWeights, weights_in
from state.errors import NotReady, SaltMismatch, UnknownModel
from state.events.identity import Salt
from state.ranking.transition_rows import from_stored
from state.ranking.transitions import Lists
from state.rows.reader import RowReader, Served
from state.rows.tables import AVERAGED_IDS, own_rows_of

ROWS_REMEMBERED = 10_000
OTHERS_LOADED = 3
"""Versions kept loaded in addition to the serving one, with a program each."""
F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
Row = TypeVar("Row")
_INPUTS = {
    "user": ("user_row",),
    "item": ("item_row", "sequence_item_rows"),
    "category": ("popular_rows", "recent_rows", "successor_rows", "category_row", "sequence_category_rows"),
    # Rows of an item's attributes are added to the item's row.
    "context": ("context_row", "item_row"),
}
"""The inputs of a program that are rows of each table."""


class OwnInput(NamedTuple):
    """An input that is rows of a table of the ranker's own.

    Attributes:
        name: Of the input.
        table: The table.
        ids: The kind of id that selects the row, one of `state.rows.tables.SERVED_IDS`.
        width: Of its rows.
        averaged: The mean of the rows is wanted.
    """

    name: str
    table: str
    ids: str
    width: int
    averaged: bool


def own_inputs(shapes: Mapping[str, tuple[int, ...]]) -> tuple[OwnInput, ...]:
    """Those of a program with inputs of these shapes.

    >>> own_inputs({"item_row": (-1, 8), "attended_of_sequence_items": (-1, 20, 4)})
    (OwnInput(name='attended_of_sequence_items', table='attended', ids='sequence_items', width=4, averaged=False),)
    """
    named = ((name, own_rows_of(name), shape[-1]) for name, shape in shapes.items())
    return tuple(OwnInput(name, *own, width, own[1] in AVERAGED_IDS) for name, own, width in named if own is not None)


def widths_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The width of the rows of each table that a program with inputs of these shapes reads; 0 where it reads none.

    >>> widths_of({"popular_rows": (32, 16), "item_row": (-1, 8)})
    {'user': 0, 'item': 8, 'category': 16, 'context': 8}
    """
    return {table: next((shapes[name][-1] for name in names if name in shapes), 0) for table, names in _INPUTS.items()}


class VersionRows:
    """Rows of one version in one transaction.

    Args:
        reader: Of the transaction.
        served: The version.
        widths: Of the rows of each table.
        category_rows: Rows of categories read so far; they recur in most answers.
        item_rows: Likewise of items; recommendations ask for the same ones.
        lists: Likewise what came next after categories, as it is stored.
    """

    def __init__(
        self,
        reader: RowReader,
        served: Served,
        widths: Mapping[str, int],
        category_rows: dict[int, bytes],
        item_rows: dict[int, bytes],
        lists: dict[int, bytes | None],
    ) -> None:
        self.reader, self.served = reader, served
        self._widths = widths
        self._missing = {table: bytes(4 * width) for table, width in widths.items()}
        self._category_rows, self._item_rows, self._lists = category_rows, item_rows, lists

    def user(self, identity: int) -> F32 | None:
        """`[dim]` float32; None for a user without a row."""
        row = self.reader.row("user", identity, self.served)
        return None if row is None else np.frombuffer(row, np.float32)

    def item(self, identity: int) -> F32:
        """`[dim]` float32; zeros for an item without a row."""
        return np.frombuffer(self.reader.row("item", identity, self.served) or self._missing["item"], np.float32)

    def has_item(self, identity: int) -> bool:
        """Whether an item has a row."""
        return self.reader.row("item", identity, self.served) is not None

    def items(self, ids: Sequence[int]) -> F32:
        """Rows of n items, `[n, dim]` float32; zeros for those without one."""
        return self._rows("item", self._item_rows, ids)

    def categories(self, ids: Sequence[int]) -> F32:
        """Rows of n categories, `[n, dim]` float32; zeros for those without one."""
        return self._rows("category", self._category_rows, ids)

    def _rows(self, table: str, known: dict[int, bytes], ids: Sequence[int]) -> F32:
        if not self._widths[table]:
            return np.zeros((len(ids), 0), np.float32)
        try:
            found = b"".join(map(known.__getitem__, ids))
        except KeyError:
            if len(known) >= ROWS_REMEMBERED:
                known.clear()
            for one in ids:
                if one not in known:
                    # 0 pads.
                    known[one] = (one and self.reader.row(table, one, self.served)) or self._missing[table]
            found = b"".join(map(known.__getitem__, ids))
        return np.frombuffer(found, np.float32).reshape(len(ids), self._widths[table])

    def transitions(self, categories: Sequence[int]) -> tuple[I32, Lists]:
        """What came next after n categories; 0 is none.

        Returns:
            `[n]` int32, which list is each category's, 0 where the version has none; and the lists.
        """
        known = self._lists
        if len(known) > ROWS_REMEMBERED:
            known.clear()
        for one in categories:
            if one not in known:
                known[one] = self.reader.row("transition", one, self.served) if one else None
        return from_stored([known[one] for one in categories])

    def context_sum(self, ids: Sequence[int]) -> F32:
        """The sum of rows of contexts and attributes, `[dim]` float32; an id without one counts as zeros."""
        total = np.zeros(self._widths["context"], np.float32)
        for one in ids:
            total += np.frombuffer(self.reader.row("context", one, self.served) or self._missing["context"], np.float32)
        return total

    def own(self, table: str, ids: Sequence[int], width: int) -> F32:
        """Rows of n ids in a table of the ranker's own, `[n, width]` float32; zeros for those without one."""
        missing = bytes(4 * width)
        found = [(one and self.reader.row(table, one, self.served)) or missing for one in ids]
        return np.frombuffer(b"".join(found), np.float32).reshape(len(ids), width)


@dataclass(frozen=True)
class LoadedVersion:
    """What stays the same until another version answers.

    Attributes:
        served: The version.
        features: What its numbers mean.
        program: With the version's weights.
        widths: Width of the rows of each table; 0 for a table that the program does not read.
        popular: `[P]` uint64, padded with 0.
        popular_ids: Those there are.
        popular_names: Of these.
        popular_rows: `[P, dim]` float32.
        popular_known: `[P]` float32, 1 where there is a popular category.
        own: The program's inputs that are rows of tables of the ranker's own.
        own_popular: Those of them that are rows of the popular categories, by name.
        cross_shares: `[C, 2]` float32, how much weights and margins of crosses count.
        churn: What the version predicts about churn; None if it learned nothing about it.
        category_rows: Rows of categories read so far.
        item_rows: Likewise of items.
        lists: What came next after categories, read so far.
    """

    served: Served
    features: VersionFeatures
    program: LoadedProgram
    widths: Mapping[str, int]
    popular: NDArray[np.uint64]
    popular_ids: list[int]
    popular_names: list[ShownName]
    popular_rows: F32
    popular_known: F32
    own: Sequence[OwnInput]
    own_popular: dict[str, F32]
    cross_shares: F32
    churn: ChurnWeights | None = None
    category_rows: dict[int, bytes] = field(default_factory=dict)
    item_rows: dict[int, bytes] = field(default_factory=dict)
    lists: dict[int, bytes | None] = field(default_factory=dict)

    def rows(self, reader: RowReader) -> VersionRows:
        """The version's rows in a transaction."""
        return VersionRows(reader, self.served, self.widths, self.category_rows, self.item_rows, self.lists)


def named(reader: RowReader, most: int = 20) -> str:
    """The versions that are here in words, newest first."""
    numbers = [str(one.version) for one in reversed(reader.versions())]
    return ", ".join(numbers[:most]) + f" and {len(numbers) - most} older ones" * (len(numbers) > most)


def _unchanged(
    read: Mapping[int, Row], table: str, before: LoadedVersion, served: Served, reader: RowReader
) -> dict[int, Row]:
    """What was read of a table's rows in the version before and is the same in `served`; nothing where that is not known."""
    if not read or before.served.program != served.program:
        return {}
    changed = reader.changed(table, before.served, served)
    if changed is None:
        return {}
    kept = dict(read)
    for identity in changed.tolist():
        kept.pop(identity, None)
    return kept


class VersionLoader:
    """Keeps the version that answers loaded, and those others that were asked for last; use it in one thread.

    Args:
        programs: The directory with the applier's copies of programs.
        features: Of each version.
        salt: The salt of the pseudonyms.
        catalogue: Names the popular categories.
    """

    def __init__(self, programs: Path, features: FeaturesOf, salt: Salt, catalogue: Catalogue) -> None:
        self._programs = programs
        self._features = features
        self._salt = salt
        self._catalogue = catalogue
        self._loaded: LoadedVersion | None = None
        self._program: tuple[str, LoadedProgram] | None = None
        self._others: OrderedDict[int, LoadedVersion] = OrderedDict()

    @property
    def number(self) -> int | None:
        """The version that answers, as it was last loaded; None before that."""
        return None if self._loaded is None else self._loaded.served.version

    def take_up(self, reader: RowReader, version: int | None = None) -> LoadedVersion:
        """The version that answers now, reloaded if it changed, or another one on this host.

        Args:
            reader: Of the transaction.
            version: Its number; None for the version that answers.

        Raises:
            NotReady: There is no version yet.
            UnknownModel: The version is not here.
            SaltMismatch: The version's pseudonyms are of another salt.
            SpecMismatch: The version's features cannot be computed here.
            ProgramError: The version's program cannot be run.
            CorruptVersion: The program's file is missing or damaged.
        """
        served = reader.served()
        if served is None:
            raise NotReady("no version is here yet", "wait for the trainer's first version and for the applier")
        if version is not None and version != served.version:
            return self._other(reader, version)
        loaded = self._loaded
        if loaded is not None and loaded.served.serial == served.serial:
            return loaded
        features = self._features_of(served)
        if self._program is None or self._program[0] != served.program:
            self._program = (served.program, LoadedProgram(read_program(path_of(self._programs, served.program))))
        program = self._program[1]
        # A failed load may leave half of the weights: the next answer must load again.
        self._loaded = None
        self._loaded = self._with_weights(reader, served, program, features, loaded)
        return self._loaded

    def _other(self, reader: RowReader, version: int) -> LoadedVersion:
        """A version that does not answer otherwise, with a program and weights of its own."""
        served = reader.version(version)
        if served is None:
            raise UnknownModel(f"version {version} is not here", f"ask for one of {named(reader)}")
        if (why := refused_versions(reader.note(REFUSED_NOTE)).get(version)) is not None:
            raise UnknownModel(f"version {version} is refused: {why}", f"ask for one of {named(reader)}")
        loaded = self._others.pop(served.serial, None)
        if loaded is None:
            features = self._features_of(served)
            program = LoadedProgram(read_program(path_of(self._programs, served.program)))
            loaded = self._with_weights(reader, served, program, features)
        self._others[served.serial] = loaded
        while len(self._others) > OTHERS_LOADED:
            self._others.popitem(last=False)
        return loaded

    def _features_of(self, served: Served) -> VersionFeatures:
        if served.salt != self._salt.fingerprint:
            raise SaltMismatch.between(f"version {served.version}", served.salt, self._salt.fingerprint)
        return self._features.of(served.version, served.spec)

    def _with_weights(
        self,
        reader: RowReader,
        served: Served,
        program: LoadedProgram,
        features: VersionFeatures,
        before: LoadedVersion | None = None,
    ) -> LoadedVersion:
        weights = reader.dense(served.version)
        program.load(weights)
        widths = widths_of(program.shapes)
        slots = program.shapes["popular_mask"][1]
        stored = reader.popular(served.version)
        popular = stored[stored != 0][:slots]
        rows, known = np.zeros((slots, widths["category"]), np.float32), np.zeros(slots, np.float32)
        known[: len(popular)] = 1.0
        loaded = LoadedVersion(
            served=served,
            features=features,
            program=program,
            widths=widths,
            popular=np.pad(popular, (0, slots - len(popular))),
            popular_ids=popular.tolist(),
            popular_names=[self._catalogue.name_of(category) for category in popular.tolist()],
            popular_rows=rows,
            popular_known=known,
            own=own_inputs(program.shapes),
            own_popular={},
            cross_shares=crosses.shares_of(reader, served, features.crosses),
            churn=weights_in(weights, features.spec),
            category_rows={}
            if before is None
            else _unchanged(before.category_rows, "category", before, served, reader),
            item_rows={} if before is None else _unchanged(before.item_rows, "item", before, served, reader),
            lists={} if before is None else _unchanged(before.lists, "transition", before, served, reader),
        )
        of_version = loaded.rows(reader)
        rows[: len(popular)] = of_version.categories(popular.tolist())
        for one in loaded.own:
            if one.ids == "popular":
                loaded.own_popular[one.name] = of_version.own(one.table, loaded.popular.tolist(), one.width)
        return loaded
