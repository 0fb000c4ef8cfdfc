"""A record as the host prepares it before any engine computes: ids, values, masks and targets, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, mix
from state.config.settings import Settings
from state.microbatch.batch import MicroBatch
from state.ranking.crosses import Crosses
from trainer.model.attributes import Columns
from trainer.model.candidates import candidates, partners, seed_of
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.model import NEGATIVE_SHIFT, Targets
from trainer.privacy import LearnedCrosses
from trainer.tables.index import I32, U64
from trainer.tables.lists import CountTable

F32 = npt.NDArray[np.float32]


WHOLE = ("popular", "cross_share")
"""Ids of a record that no row of it has alone."""


@dataclass(frozen=True)
class Record:
    """A training record of B rows.

    Attributes:
        ids: uint64 by name: user `[B]`, item `[B]`, category `[B]`, context `[B, K]`, recent `[B, L]`, popular `[P]`,
            successor `[B, S]`, other `[B]`, negative_item `[B]`, negative_category `[B]`, item_attributes `[B, A]`,
            negative_item_attributes `[B, A]`, sequence_items, sequence_categories and sequence_actions `[B, T]`, cross
            `[B, C]` (0 in rows without a label; C is 0 where no row has one), cross_share `[C + 1]`.
        values: By name, uint16 for whole numbers, else float32.
        targets: The training targets, as NumPy arrays.
        partner: `[B]` int64, the row whose item is each row's negative.
        seed: The seed of dropout.
        newest: `[B]` int32, the row of each row's newest category in the table of transitions.
    """

    ids: Mapping[str, U64]
    values: Mapping[str, npt.NDArray[Any]]
    targets: Targets
    partner: npt.NDArray[np.int64]
    seed: tuple[int, int]
    newest: I32

    def __len__(self) -> int:
        return len(self.partner)

    def take(self, rows: npt.NDArray[np.int64]) -> Record:
        """The record of some rows, `[n]` ascending, as an engine measures it: their partners may be other rows."""
        return Record(
            ids={name: ids if name in WHOLE else ids[rows] for name, ids in self.ids.items()},
            values={name: values[rows] for name, values in self.values.items()},
            targets=Targets(*(target[rows] for target in self.targets)),
            partner=self.partner[rows],
            seed=self.seed,
            newest=self.newest[rows],
        )


class Recorder:
    """Builds records from micro-batches.

    Args:
        dropped_units: Units of the tower's first layer whose dropout the host draws; 0 for none.
    """

    def __init__(self, settings: Settings, crosses: Crosses, columns: Columns, dropped_units: int) -> None:
        self._dropout, self._dropped_units = settings.model.dropout, dropped_units
        self._crosses, self._columns = crosses, columns
        self._private = bool(settings.privacy.epsilon)
        self._learned = LearnedCrosses.of(crosses.kinds, settings.privacy.unit).both if self._private else None

    def context_of(self, batch: MicroBatch) -> U64:
        """`[n, K + Au]` uint64: the tower's context, which is the context fields followed by the user's attributes."""
        users = self._columns.users_of(batch)
        return np.concatenate([batch.context, users], 1) if users.shape[1] else batch.context

    def crosses_of(self, batch: MicroBatch) -> U64:
        """The crosses of each row, `[n, C]` uint64, 0 in rows without a label; `[n, 0]` if no row has one.

        Crosses learn from labels only: a drawn negative may never have been shown. With a privacy budget only the crosses of
        `LearnedCrosses` are returned.
        """
        is_labelled = ~np.isnan(batch.label)
        if not is_labelled.any():
            return np.zeros((len(batch), 0), np.uint64)
        rows = batch.take(is_labelled)
        ids = self._crosses.ids(self._columns.values_of(rows))
        if self._learned is not None:
            ids = np.ascontiguousarray(ids[:, self._learned])
        if len(rows) == len(batch):
            return ids
        crosses = np.zeros((len(batch), ids.shape[1]), np.uint64)
        crosses[is_labelled] = ids
        return crosses

    def left(self, batch: MicroBatch) -> U64:
        """The category that each row's event follows, `[n]` uint64. 0 if either is missing or with a privacy budget."""
        is_counted = (batch.category != 0) & (not self._private)
        return np.where(is_counted, batch.recent_categories[:, 0], np.uint64(0))

    def record(
        self, batch: MicroBatch, crosses: U64, popular: U64, transitions: CountTable, seed: tuple[int, int] | None
    ) -> Record:
        """Builds the record of `batch`; `popular` is `[P]`, and `seed` None hashes the first row's position for dropout."""
        sources = [part.source for part in batch.header.ranges]
        topics = np.array([source.topic for source in sources], np.uint64)[batch.source]
        partitions = np.array([source.partition for source in sources], np.uint64)[batch.source]
        partner = partners(topics, partitions, batch.opened)
        recent = batch.recent_categories
        newest = transitions.find(np.ascontiguousarray(recent[:, 0]))
        came_next = transitions.succession(newest, recent, popular)
        slots = candidates(batch.category, recent, popular, came_next.ids, partner)
        if seed is None:
            seed = seed_of(int(topics[0]), int(partitions[0]), int(batch.opened[0]))
        attributes = self._columns.items_of(batch)
        ids = {
            "user": batch.user,
            "item": batch.item,
            "category": batch.category,
            "context": self.context_of(batch),
            "recent": recent,
            "popular": popular,
            "successor": came_next.ids,
            "other": slots.other,
            "negative_item": batch.item[partner],
            "negative_category": batch.category[partner],
            "item_attributes": attributes,
            "negative_item_attributes": attributes[partner],
            "cross": crosses,
            "cross_share": self._crosses.shares if crosses.shape[1] else self._crosses.shares[:0],
        }
        values: dict[str, npt.NDArray[Any]] = {
            "features": batch.features,
            "category_windows": batch.category_windows,
            "recent_next": came_next.recent_categories,
            "recent_mask": (recent != 0).astype(np.float32),
            "popular_mask": slots.popular_mask,
            "popular_next": came_next.popular,
            "successor_mask": (came_next.ids != 0).astype(np.float32),
            "successor_next": came_next.successors,
            "other_mask": (slots.other != 0).astype(np.float32),
            "tower_kept": dropout(seed, len(batch), self._dropped_units, self._dropout),
        }
        if batch.sequence_items.shape[1]:
            ids |= {name: getattr(batch, name) for name in ("sequence_items", "sequence_categories")}
            ids["sequence_actions"] = batch.sequence_actions.astype(np.uint64)
            values |= {name: getattr(batch, name) for name in ("sequence_actions", "sequence_ages")}
            values["sequence_mask"] = (batch.sequence_actions != 0).astype(np.float32)
        record = Record(ids, values, _targets(batch, slots.target, partner), partner, seed, newest)
        return alone(record) if self._private else record


def _targets(batch: MicroBatch, slot: I32, partner: npt.NDArray[np.int64]) -> Targets:
    """The targets: the clicked candidate, the label of the row's pair, and label 0 for its negative.

    A row with a label has no negative and no shift. A row without an item forms no pair.
    """
    numbers, is_labelled = HYPERPARAMETERS, ~np.isnan(batch.label)
    negative = ~is_labelled & (batch.item != batch.item[partner]) & (partner != np.arange(len(batch)))
    negative &= (batch.item != 0) & (batch.item[partner] != 0)
    weight = np.where(slot >= 0, batch.weight, np.float32(0.0)) * np.float32(1.0 / numbers.loss_scale)
    shift = np.where(is_labelled, np.float32(0.0), np.float32(NEGATIVE_SHIFT))
    share = np.float32(numbers.engagement_share / numbers.loss_scale)
    return Targets(
        slot=slot,
        weight=weight.astype(np.float32),
        label=np.where(is_labelled, batch.label, np.float32(1.0)),
        label_shift=shift,
        label_weight=(is_labelled | (batch.item != 0)).astype(np.float32) * share,
        negative_shift=shift,
        negative_weight=negative.astype(np.float32) * share,
    )


def alone(record: Record) -> Record:
    """Removes from each row what comes from other rows, as private learning requires.

    A row loses its negative, and another row's category in its last slot. If its own category is in that slot, it would be
    a certain winner, so the row teaches nothing. Without negatives, engagement learns from labels alone.
    """
    ids, values, targets = dict(record.ids), dict(record.values), record.targets
    nothing, zero = np.zeros(len(record), np.uint64), np.float32(0.0)
    is_own = targets.slot == ids["recent"].shape[1] + ids["popular"].size + ids["successor"].shape[1]
    ids["other"] = np.where(is_own, ids["other"], nothing)
    values["other_mask"] = (ids["other"] != 0).astype(np.float32)
    ids |= {"negative_item": nothing, "negative_category": nothing}
    ids["negative_item_attributes"] = np.zeros_like(ids["negative_item_attributes"])
    # Without negatives, each click without a label would count as a label 1.
    labelled = targets.label_shift == zero
    targets = targets._replace(
        weight=np.where(is_own, zero, targets.weight),
        label_weight=np.where(labelled, targets.label_weight, zero),
        negative_weight=np.zeros_like(targets.negative_weight),
    )
    return replace(record, ids=ids, values=values, targets=targets)


def joined_records(records: Sequence[Record]) -> Record:
    """Joins what the measures read of several records: ids `category` and `recent`, targets, partners, newest."""
    names = ("category", "recent")
    starts = np.cumsum([0, *(len(record) for record in records[:-1])])
    return Record(
        ids={name: np.concatenate([record.ids[name] for record in records]) for name in names},
        values={},
        targets=Targets(*(np.concatenate(kind) for kind in zip(*(record.targets for record in records), strict=True))),
        partner=np.concatenate([record.partner + start for record, start in zip(records, starts, strict=True)]),
        seed=records[0].seed,
        newest=np.concatenate([record.newest for record in records]),
    )


def parts(batch: MicroBatch, crosses: U64, size: int) -> Iterator[tuple[MicroBatch, U64]]:
    """Splits the batch and its crosses into equal parts of about `size` rows: as many as `size` fits in, rounded."""
    count = max(1, (2 * len(batch) + size) // (2 * size))
    if count == 1:
        yield batch, crosses
        return
    for number in range(count):
        part = slice(number * len(batch) // count, (number + 1) * len(batch) // count)
        yield batch.rows(part), crosses[part]


@compiled("u8, i8, f4, f4[::1]")
def _drop(seed: np.uint64, least: int, factor: np.float32, kept: F32) -> None:
    bits, bytes_left = np.uint64(0), 0
    for i in range(kept.shape[0]):
        if bytes_left == 0:
            seed = seed + np.uint64(0x9E3779B97F4A7C15)
            bits, bytes_left = mix(seed), 8
        kept[i] = factor if np.int64(bits & np.uint64(255)) >= least else np.float32(0.0)
        bits = bits >> np.uint64(8)
        bytes_left -= 1


def dropout(seed: tuple[int, int], rows: int, width: int, share: float) -> F32:
    """Draws dropout factors, `[rows, width]` float32: 0 for a `share` of the units, else the compensating factor.

    The share is in [0, 1), rounded to 1/256.

    >>> dropout((1, 2), 1, 4, 0.0).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    least = round(256 * share)
    kept = np.empty((rows, width), np.float32)
    state = np.uint64((seed[0] << 32 | seed[1]) & (2**64 - 1))
    _drop(state, least, np.float32(256.0 / (256 - least)), kept.reshape(-1))
    return kept
