"""Inputs of serving for rows of the training log, by the tables of a restored trainer: what an export is compared on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from state.errors import GapError, LogError, MicroBatchError
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode
from state.ranking.crosses import Values, logits_of
from state.registry.manifest import Manifest
from state.registry.segments import LogSegment
from trainer.engine.engine import CROSS
from trainer.engine.record import Recorder
from trainer.engine.step import Trainer
from trainer.model.attributes import Columns
from trainer.model.inputs import Input
from trainer.replay import SegmentReader
from trainer.tables.table import Table
from trainer.verify import OpenLog

ROWS = 256
RECORDS = 64
"""At most so many of the latest records of the log are read."""

PATIENCE_S = 10.0
F32 = npt.NDArray[np.float32]
U64 = npt.NDArray[np.uint64]


class Replayed:
    """The rows of some micro-batches as serving's program is asked about them.

    Args:
        trainer: Restored to the version.
        batches: One or more.

    Attributes:
        ids: By name, as a record has them.
        inputs: By name, as the program has them.
    """

    def __init__(self, trainer: Trainer, batches: Sequence[MicroBatch]) -> None:
        settings = trainer.settings
        columns = Columns(settings.attributes)
        recorder = Recorder(settings, trainer.crosses, columns, 0)
        self._trainer = trainer
        popular, pieces = trainer.popular.top(), []
        for batch in batches:
            none = np.zeros((len(batch), 0), np.uint64)
            record = recorder.record(batch, none, popular, trainer.transitions, (0, 0))
            users, items = columns.users_of(batch), columns.items_of(batch)
            pairs = Values(batch.user, batch.item, batch.category, batch.context, users, items, batch.features)
            pieces.append((record.ids, {**record.values, "cross": self._crosses(pairs)}))
        self.ids: dict[str, U64] = {
            name: pieces[0][0][name] if name == "popular" else np.concatenate([ids[name] for ids, _ in pieces])[:ROWS]
            for name in pieces[0][0]
        }
        values = {name: np.concatenate([held[name] for _, held in pieces])[:ROWS] for name in pieces[0][1]}
        self.inputs: dict[str, F32] = {
            one.name: self._rows(one) if one.table else np.asarray(values[one.name], np.float32)
            for one in trainer.model.inputs
            if not one.training
        }

    def _crosses(self, pairs: Values) -> F32:
        """`[n]` float32: what the crosses of pairs add up to."""
        table, crosses = self._trainer.tables[CROSS], self._trainer.crosses
        assert isinstance(table, Table)
        ids = crosses.ids(pairs)
        rows = table.gather(table.find(ids.reshape(-1))).reshape(*ids.shape, -1)
        return logits_of(rows, table.gather(table.find(crosses.shares)))

    def _rows(self, one: Input) -> F32:
        """The rows of an input, as serving finds them."""
        found = self._looked_up(one.table, self.ids[one.ids])
        if one.mean:
            found = found.sum(-2) / np.float32(max(found.shape[-2], 1))
        if one.attributes and (attributes := self.ids[one.attributes]).shape[1]:
            found = found + self._looked_up("context", attributes).sum(1) / np.float32(attributes.shape[1])
        return np.asarray(found, np.float32)

    def _looked_up(self, name: str, ids: U64) -> F32:
        table = self._trainer.tables[name]
        assert isinstance(table, Table)
        flat = table.find(np.ascontiguousarray(ids).reshape(-1))
        return table.gather(flat).reshape(*ids.shape, table.dim)


def latest(open_log: OpenLog, version: Manifest) -> list[MicroBatch]:
    """The latest micro-batches that a version learned; none where the log does not have them any more, or cannot be asked."""
    first, found = max(0, version.log.next - 2 * RECORDS), list[MicroBatch]()
    if not version.log.topic_id:
        return found
    reader = SegmentReader(lambda offset: open_log(version.log.topic, offset), version.log, (), PATIENCE_S)
    try:
        for _, value in reader.records(LogSegment(first, version.log.next)):
            batch = None if value is None else decode(value)
            if batch is not None and len(batch) and batch.header.spec == version.spec:
                found.append(batch)
    except (GapError, LogError, MicroBatchError, OSError):
        return found
    finally:
        reader.close()
    return found


def enough(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The latest of them that have `ROWS` rows together."""
    kept: list[Any] = []
    for batch in reversed(batches):
        kept.insert(0, batch)
        if sum(map(len, kept)) >= ROWS:
            break
    return kept
