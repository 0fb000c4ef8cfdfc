"""A version loaded into a worker: its program with weights, features, popular categories, and rows read so far."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answers.program import LoadedProgram
from deploy.serving.host_files import (
    REFUSED_NOTE,
    item_extra,
    item_parts,
    name_extra,
    read_program,
    read_spec,
    refused_versions,
)
from state.churn import STORED, ChurnWeights, weights_in
from state.config.settings import Settings
from state.errors import BadRequest, NotReady, SaltMismatch, SpecMismatch
from state.events.identity import Salt
from state.features.spec import FeatureSpec
from state.history.appends import Numbers, exchange
from state.history.store import HistoryStore
from state.layout import PROGRAMS
from state.ranking import interest_scores, item_scores
from state.ranking.crosses import WIDTH, Crosses, Values, crosses_of, logits_of, with_network_share
from state.ranking.item_lists import ENTRIES, NEXT_CATEGORY, ItemLists, fill
from state.ranking.item_lists import from_stored as lists_from_stored
from state.ranking.transitions import Lists, from_stored
from state.rows.reader import RowReader, Served
from state.rows.tables import AVERAGED_IDS, own_rows_of

ROWS_REMEMBERED = 10_000
LISTS_REMEMBERED = 2048
CANDIDATE_MASKS = ("recent_mask", "popular_mask", "successor_mask")
"""The program's masks of candidates, in slot order."""
NAMES_REMEMBERED = 100_000
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
_NO_CROSS = bytes(4 * WIDTH)


class ShownName(NamedTuple):
    """A category or item as an answer shows it; without a name, the id is used as the name."""

    name: str
    hex: str


class Catalogue:
    """Looks up names of categories and items, and the latest category of each item. Used by one thread."""

    def __init__(self, histories: HistoryStore) -> None:
        self._histories = histories
        self._names: dict[int, ShownName] = {}

    def name_of(self, category: int) -> ShownName:
        """Returns a category's name."""
        name = self._names.get(category)
        if name is not None:
            return name
        identity = f"{category:016x}"
        stored = self._histories.extra(name_extra(category))
        if stored is None:
            # Not cached: the name may arrive with the next click.
            return ShownName(identity, identity)
        if len(self._names) >= NAMES_REMEMBERED:
            self._names.clear()
        return self._names.setdefault(category, ShownName(stored.decode(), identity))

    def categories_of(self, items: Sequence[tuple[int, int]]) -> list[int]:
        """Returns each item's category, 0 if it was never clicked.

        `items` has `(id, category)` pairs; a category of 0 is looked up.
        """
        stored = iter(self._histories.extra_of_each([item_extra(item) for item, category in items if not category]))
        return [category or (0 if (value := next(stored)) is None else item_parts(value)[0]) for _, category in items]

    def category_of(self, item: int) -> int:
        """Returns an item's latest category; 0 if the item was never clicked."""
        stored = self._histories.extra(item_extra(item)) if item else None
        return 0 if stored is None else item_parts(stored)[0]

    def item_name(self, item: int) -> ShownName:
        """Returns an item's name: the id that clicks carry, or the name of the category with this id."""
        return self.named_items([item])[0][1]

    def named_items(self, items: Sequence[int]) -> list[tuple[int, ShownName]]:
        """Returns the category of each item (0 if it was never clicked), and its name as in `item_name`."""
        names = []
        for item, stored in zip(items, self._histories.extra_of_each([*map(item_extra, items)]), strict=True):
            category, name = (0, "") if stored is None else item_parts(stored)
            names.append((category, ShownName(name, f"{item:016x}") if name else self.name_of(item)))
        return names


@dataclass(frozen=True)
class VersionFeatures:
    """The definition of the features that a version's program takes.

    Attributes:
        spec: The version's feature spec.
        crosses: The crosses, with the version's columns.
        actions: Maps the number of an action in the settings to its number in the version; None if they are equal.
    """

    spec: FeatureSpec
    crosses: Crosses
    actions: Numbers | None = None

    @cached_property
    def interest_columns(self) -> interest_scores.Columns:
        """Computes the columns of the correction of interests."""
        return interest_scores.Columns(self.spec)


class OwnInput(NamedTuple):
    """An input that is rows of a table of the ranker's own.

    Attributes:
        name: Of the input.
        table: The table.
        ids: The kind of id that selects the row, one of `state.rows.tables.SERVED_IDS`.
        width: Of its rows.
        averaged: Whether the input is the mean of the rows.
    """

    name: str
    table: str
    ids: str
    width: int
    averaged: bool


def own_inputs(shapes: Mapping[str, tuple[int, ...]]) -> tuple[OwnInput, ...]:
    """Returns the own inputs of a program with inputs of these shapes.

    >>> own_inputs({"item_row": (-1, 8), "attended_of_sequence_items": (-1, 20, 4)})
    (OwnInput(name='attended_of_sequence_items', table='attended', ids='sequence_items', width=4, averaged=False),)
    """
    named = ((name, own_rows_of(name), shape[-1]) for name, shape in shapes.items())
    return tuple(OwnInput(name, *own, width, own[1] in AVERAGED_IDS) for name, own, width in named if own is not None)


def widths_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Returns the width of the rows of each table that a program with inputs of these shapes reads; 0 for none.

    >>> widths_of({"popular_rows": (32, 16), "item_row": (-1, 8)})
    {'user': 0, 'item': 8, 'category': 16, 'context': 8}
    """
    return {table: next((shapes[name][-1] for name in names if name in shapes), 0) for table, names in _INPUTS.items()}


class VersionRows:
    """Rows of one version in one transaction. Rows of categories and items, and transition lists, are cached."""

    def __init__(self, reader: RowReader, version: LoadedVersion) -> None:
        self.reader, self.served = reader, version.served
        self._widths, self._version = version.widths, version
        self._missing = {table: bytes(4 * width) for table, width in version.widths.items()}

    def user(self, identity: int) -> F32 | None:
        """Returns a user's row, `[dim]` float32; None for a user without one."""
        row = self.reader.row("user", identity, self.served)
        return None if row is None else np.frombuffer(row, np.float32)

    def has_item(self, identity: int) -> bool:
        """Whether an item has a row."""
        return self.reader.row("item", identity, self.served) is not None

    def items(self, ids: Sequence[int]) -> F32:
        """Returns the rows of n items, `[n, dim]` float32; zeros for those without one."""
        return self._rows("item", self._version.item_rows, ids)

    def categories(self, ids: Sequence[int]) -> F32:
        """Returns the rows of n categories, `[n, dim]` float32; zeros for those without one."""
        return self._rows("category", self._version.category_rows, ids)

    def _rows(self, table: str, cached: dict[int, bytes], ids: Sequence[int]) -> F32:
        if not self._widths[table]:
            return np.zeros((len(ids), 0), np.float32)
        try:
            rows = b"".join(map(cached.__getitem__, ids))
        except KeyError:
            if len(cached) >= ROWS_REMEMBERED:
                cached.clear()
            for identity in ids:
                if identity not in cached:
                    # 0 is padding.
                    row = identity and self.reader.row(table, identity, self.served)
                    cached[identity] = row or self._missing[table]
            rows = b"".join(map(cached.__getitem__, ids))
        return np.frombuffer(rows, np.float32).reshape(len(ids), self._widths[table])

    def transitions(self, categories: Sequence[int]) -> tuple[I32, Lists]:
        """Looks up what came next after n categories; 0 is none.

        Returns:
            `[n]` int32, the index of each category's list, 0 where the version has none; and the lists.
        """
        cached = self._version.lists
        if len(cached) > ROWS_REMEMBERED:
            cached.clear()
        for category in categories:
            if category not in cached:
                cached[category] = self.reader.row("transition", category, self.served) if category else None
        return from_stored([cached[category] for category in categories])

    def item_lists(self, table: str, keys: Sequence[int]) -> ItemLists:
        """Returns the lists of n keys of a table of item lists; an empty list for key 0 or one without a list."""
        stored = [self.reader.row(table, key, self.served) if key else None for key in keys]
        return lists_from_stored(stored, ENTRIES[table])

    def next_categories(self, keys: Sequence[int]) -> tuple[ItemLists, list[int]]:
        """Looks up the lists of n keys of `NEXT_CATEGORY`; returns all lists read so far, and which are the keys'."""
        cache = self._version.next_categories
        index_of = cache.places
        with suppress(KeyError):
            return cache.lists, [index_of[key] for key in keys]
        if len(index_of) + len(keys) > LISTS_REMEMBERED:
            index_of.clear()
        missing = [key for key in dict.fromkeys(keys) if key not in index_of]
        stored = [self.reader.row(NEXT_CATEGORY, key, self.served) if key else None for key in missing]
        first = len(index_of)
        fill(cache.lists, first, stored)
        index_of.update(zip(missing, range(first, first + len(missing)), strict=True))
        return cache.lists, [index_of[key] for key in keys]

    def context_sum(self, ids: Sequence[int]) -> F32:
        """Returns the sum of rows of contexts and attributes, `[dim]` float32; an id without one counts as zeros."""
        total = np.zeros(self._widths["context"], np.float32)
        for identity in ids:
            row = self.reader.row("context", identity, self.served) or self._missing["context"]
            total += np.frombuffer(row, np.float32)
        return total

    def own(self, table: str, ids: Sequence[int], width: int) -> F32:
        """Returns rows of n ids in a table of the ranker's own, `[n, width]` float32; zeros for those without one."""
        missing = bytes(4 * width)
        rows = [(identity and self.reader.row(table, identity, self.served)) or missing for identity in ids]
        return np.frombuffer(b"".join(rows), np.float32).reshape(len(ids), width)

    def cross_logits(self, pairs: Values) -> F32:
        """Returns the cross logits of n user-item pairs, `[n]` float32; a cross without a row contributes nothing.

        The version must have learned crosses.
        """
        ids = self._version.features.crosses.ids(pairs)
        rows = [
            self.reader.row("cross", identity, self.served) if identity else None
            for identity in ids.reshape(-1).tolist()
        ]
        # Rows of another width come from a release with other crosses.
        numbers = b"".join(row if row and len(row) == len(_NO_CROSS) else _NO_CROSS for row in rows)
        return logits_of(np.frombuffer(numbers, np.float32).reshape(*ids.shape, WIDTH), self._version.cross_shares)


class ListCache(NamedTuple):
    """Lists of one version that were read: `LISTS_REMEMBERED` lists, and the place of each key's."""

    lists: ItemLists
    places: dict[int, int]

    @classmethod
    def empty(cls) -> ListCache:
        """A new cache."""
        return cls(ItemLists.empty(LISTS_REMEMBERED, ENTRIES[NEXT_CATEGORY]), {})


@dataclass(frozen=True)
class LoadedVersion:
    """What stays the same until another version answers.

    Attributes:
        served: The version.
        features: The definition of its features.
        program: The program with the version's weights.
        widths: The width of the rows of each table; 0 for a table that the program does not read.
        popular: `[P]` uint64, padded with 0.
        popular_ids: The popular categories without padding.
        popular_names: Their names.
        popular_rows: `[P, dim]` float32.
        own: The program's inputs that are rows of tables of the ranker's own.
        own_popular: Those of them that are rows of the popular categories, by name.
        cross_shares: `[C, 2]` float32, the scale of weights and margins of crosses; `[0, 2]` if the version has none:
            it has learned no label, or its release has no crosses or other crosses.
        network_share: The factor of the rest of the engagement logit.
        churn: The version's churn weights; None if it learned nothing about churn.
        item_weights: `[KINDS, FEATURES, COLUMNS]` float64, the weights of the item score; None if the version has none, or those of
            a release with other features.
        interest_weights: Likewise of the correction of interests.
        interest_work: The workspace of that correction.
        category_rows: Rows of categories read so far.
        item_rows: Likewise of items.
        lists: Likewise transition lists, as stored.
        next_categories: Lists of `NEXT_CATEGORY` read so far.
    """

    served: Served
    features: VersionFeatures
    program: LoadedProgram
    widths: Mapping[str, int]
    popular: NDArray[np.uint64]
    popular_ids: list[int]
    popular_names: list[ShownName]
    popular_rows: F32
    own: Sequence[OwnInput]
    own_popular: dict[str, F32]
    cross_shares: F32
    network_share: float = 1.0
    churn: ChurnWeights | None = None
    item_weights: NDArray[np.float64] | None = None
    interest_weights: NDArray[np.float64] | None = None
    interest_work: interest_scores.Workspace = field(default_factory=lambda: interest_scores.Workspace.empty(0, 0))
    category_rows: dict[int, bytes] = field(default_factory=dict)
    item_rows: dict[int, bytes] = field(default_factory=dict)
    lists: dict[int, bytes | None] = field(default_factory=dict)
    next_categories: ListCache = field(default_factory=ListCache.empty)

    def predict(self, inputs: Mapping[str, F32]) -> dict[str, F32]:
        """Returns the program's outputs, with the network's share. The program must have the version's weights loaded."""
        return with_network_share(self.program.predict(inputs), inputs, self.network_share)

    def rows(self, reader: RowReader) -> VersionRows:
        """Returns the version's rows in a transaction."""
        return VersionRows(reader, self)


def named(reader: RowReader, most: int = 20) -> str:
    """Lists the numbers of the versions on this host, newest first."""
    numbers = [str(version.version) for version in reversed(reader.versions())]
    return ", ".join(numbers[:most]) + f" and {len(numbers) - most} older ones" * (len(numbers) > most)


def _unchanged(
    cached: Mapping[int, Row], table: str, before: LoadedVersion, served: Served, reader: RowReader
) -> dict[int, Row]:
    """Returns the cached rows of the version before that are the same in `served`; none if that is unknown."""
    if not cached or before.served.program != served.program:
        return {}
    changed = reader.changed(table, before.served, served)
    if changed is None:
        return {}
    unchanged = dict(cached)
    for identity in changed.tolist():
        unchanged.pop(identity, None)
    return unchanged


def _weights_of(
    weights: Mapping[str, NDArray[Any]], name: str, first: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """The weights of a score; None without any, or if they differ in shape from the first ones of this release."""
    stored = weights.get(f"{STORED}{name}")
    if stored is None or stored.shape != first.shape:
        return None
    return np.ascontiguousarray(stored, np.float64)


class VersionLoader:
    """Keeps the serving version loaded, and the other versions that were requested last. Used by one thread.

    Args:
        settings: The settings of the host.
        salt: The salt of the pseudonyms.
        catalogue: Looks up the names of the popular categories.
    """

    def __init__(self, settings: Settings, salt: Salt, catalogue: Catalogue) -> None:
        self._settings, self._salt, self._catalogue = settings, salt, catalogue
        self._programs, self._spec = settings.serving_dir / PROGRAMS, FeatureSpec.from_settings(settings)
        self._features = {self._spec.digest: VersionFeatures(self._spec, crosses_of(settings))}
        self._loaded: LoadedVersion | None = None
        self._program: tuple[str, LoadedProgram] | None = None
        self._by_serial: OrderedDict[int, LoadedVersion] = OrderedDict()

    @property
    def number(self) -> int | None:
        """The serving version that was loaded last; None before that."""
        return None if self._loaded is None else self._loaded.served.version

    def load_version(self, reader: RowReader, version: int | None = None) -> LoadedVersion:
        """Returns the serving version, reloaded if it changed, or another one on this host, by number.

        Raises:
            NotReady: There is no version yet.
            BadRequest: The version is not on this host, or was refused.
            SaltMismatch: The version's pseudonyms use another salt.
            SpecMismatch: The version's features cannot be computed on this host.
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
            self._program = (served.program, LoadedProgram(read_program(self._programs, served.program)))
        # A failed load may leave half of the weights: the next answer must load again.
        self._loaded = None
        self._loaded = self._with_weights(reader, served, self._program[1], features, loaded)
        return self._loaded

    def _other(self, reader: RowReader, version: int) -> LoadedVersion:
        """Returns a version that is not the serving one, with a program and weights of its own."""
        served = reader.version(version)
        if served is None:
            raise BadRequest(f"version {version} is not here", f"ask for one of {named(reader)}", http_status=404)
        if (why := refused_versions(reader.note(REFUSED_NOTE)).get(version)) is not None:
            raise BadRequest(f"version {version} is refused: {why}", f"ask for one of {named(reader)}", http_status=404)
        loaded = self._by_serial.pop(served.serial, None)
        if loaded is None:
            features = self._features_of(served)
            program = LoadedProgram(read_program(self._programs, served.program))
            loaded = self._with_weights(reader, served, program, features, None)
        self._by_serial[served.serial] = loaded
        while len(self._by_serial) > OTHERS_LOADED:
            self._by_serial.popitem(last=False)
        return loaded

    def _features_of(self, served: Served) -> VersionFeatures:
        if served.salt != self._salt.fingerprint:
            raise SaltMismatch.between(f"version {served.version}", served.salt, self._salt.fingerprint)
        features = self._features.get(served.spec)
        if features is None:
            try:
                spec = read_spec(self._programs, served.spec)
            except (OSError, ValueError, KeyError) as error:
                raise SpecMismatch(
                    f"version {served.version} has the feature spec {served.spec[:12]}, the settings give "
                    f"{self._spec.digest[:12]}, and its windows cannot be computed here ({error})",
                    "use the settings of the stream, or wait for the first version of an upgrade",
                ) from error
            actions = exchange(self._spec.actions, spec.actions)
            features = self._features[served.spec] = VersionFeatures(spec, crosses_of(self._settings, spec), actions)
        return features

    def _with_weights(
        self,
        reader: RowReader,
        served: Served,
        program: LoadedProgram,
        features: VersionFeatures,
        before: LoadedVersion | None,
    ) -> LoadedVersion:
        weights = reader.dense(served.version)
        program.load(weights)
        widths = widths_of(program.shapes)
        slots = program.shapes["popular_mask"][1]
        stored = reader.popular(served.version)
        popular = stored[stored != 0][:slots]
        rows = np.zeros((slots, widths["category"]), np.float32)
        shares = np.zeros((1, WIDTH), np.float32)
        if served.dims.get("cross") == WIDTH:
            shares = reader.get("cross", features.crosses.shares.tolist(), served)[0]
        loaded = LoadedVersion(
            served=served,
            features=features,
            program=program,
            widths=widths,
            popular=np.pad(popular, (0, slots - len(popular))),
            popular_ids=popular.tolist(),
            popular_names=[self._catalogue.name_of(category) for category in popular.tolist()],
            popular_rows=rows,
            own=own_inputs(program.shapes),
            own_popular={},
            cross_shares=shares[:-1],
            network_share=1.0 + float(shares[-1, 0]),
            churn=weights_in(weights, features.spec),
            item_weights=_weights_of(weights, item_scores.WEIGHTS, item_scores.first_weights()),
            interest_weights=_weights_of(weights, interest_scores.WEIGHTS, interest_scores.first_weights()),
            interest_work=interest_scores.Workspace.empty(
                sum(shape[1] for name, shape in program.shapes.items() if name in CANDIDATE_MASKS),
                program.shapes[CANDIDATE_MASKS[0]][1],
            ),
        )
        if before is not None:
            loaded.category_rows.update(_unchanged(before.category_rows, "category", before, served, reader))
            loaded.item_rows.update(_unchanged(before.item_rows, "item", before, served, reader))
            loaded.lists.update(_unchanged(before.lists, "transition", before, served, reader))
        version_rows = loaded.rows(reader)
        rows[: len(popular)] = version_rows.categories(popular.tolist())
        for input_ in loaded.own:
            if input_.ids == "popular":
                loaded.own_popular[input_.name] = version_rows.own(input_.table, loaded.popular.tolist(), input_.width)
        return loaded
