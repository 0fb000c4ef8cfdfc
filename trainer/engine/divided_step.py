"""The step of one of several workers that train one model; see `trainer/group.py`.

1. The leader sends the micro-batch. Every worker does the same step, with these differences.
2. The table of users has only the worker's own users. All other tables, dense weights and counts are equal everywhere.
3. Each worker measures the rows of its users: scores, and the gradient.
4. The workers exchange scores and gradients. Each adds the gradients in the order of the workers, so that all apply the
   same bits. Fast weights are averaged by rows. What crosses learn is added up.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from state.config.settings import Settings
from state.errors import SettingsError, WorkerLost
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch, counts_by_range
from state.microbatch.codec import decode, encode
from state.positions import Range
from state.ranking.item_lists import NEXT_CATEGORY
from state.rows.tables import ITEM_LISTS
from trainer.engine.adam import FastSlots
from trainer.engine.crosses import Crossed
from trainer.engine.engine import CROSS, F32, I32, Gradient, Measured, Scores
from trainer.engine.guard import GuardState
from trainer.engine.record import Record
from trainer.engine.report import Report, Update
from trainer.engine.step import LoadVersion, Taking, Trainer, WorkerLoad
from trainer.group import TIMEOUT_S, Group
from trainer.model.preprocessing import Preprocessing
from trainer.model.ranker import Ranker
from trainer.privacy.history import NoisePlace
from trainer.tables.changes import Changes
from trainer.tables.id_table import I64, MISSING
from trainer.tables.index import U64
from trainer.tables.table import Table

USER, SHARED = "user", "shared"
BEAT_S = 2.0
"""The longest time without an exchange, so that the leader notices the loss of a worker without clicks."""
COLUMNS_BY_ID = {
    "ids": ("rows", "accum", "last_seen_ms"),
    "removed": (),
    "pending_ids": ("pending_counts", "pending_seen_ms"),
}
"""The columns of `Changes` that each column of ids orders."""


def _counted(batch: MicroBatch) -> Iterator[Range]:
    """The ranges of a batch from which rows may be left out: those rows count as masked."""
    parts = batch.header.ranges
    for part, counts in zip(parts, counts_by_range(batch.kind, batch.source, len(parts)), strict=True):
        left_out = sum(getattr(part, name) - counts[name] for name in ("rows", "opened", "feedback"))
        changed: dict[str, Any] = {**counts, "masked": part.masked + left_out}
        yield replace(part, **changed)


class DividedTrainer(Trainer):
    """A `Trainer` that shares the training of one model with other processes.

    The leader's calls of `step`, `forget`, `take_rows`, `rejoin` and `beat` are repeated by the others (`follow`).

    Raises:
        SettingsError: A privacy budget is set: its noise is that of one process.
    """

    def __init__(
        self, settings: Settings, spec: FeatureSpec, preprocessing: Preprocessing | None, group: Group
    ) -> None:
        if settings.privacy.epsilon:
            raise SettingsError("trainer.workers is above 1 with privacy.epsilon", "unset one of them")
        self.group, self._alone, self._was_alone, self._began_s = group, False, False, 0.0
        super().__init__(settings, spec, preprocessing)
        self._dense_shapes = {name: weight.shape for name, weight in self.model.weights().items()}
        self._crosses_table = cast(Table, self.tables[CROSS])

    def step(self, batch: MicroBatch, seed: tuple[int, int] | None = None, place: NoisePlace | None = None) -> Report:
        """See `Trainer`."""
        if len(batch) and not self.guard.held:
            ranges = tuple(_counted(batch))
            data = encode(replace(batch.header, ranges=ranges), batch.columns)
            self._send("step", {"guard": asdict(self.guard), "seed": seed}, data)
        self.loads = [WorkerLoad(0.0, load.users) for load in self.loads]
        return super().step(batch, seed)

    def forget(self, users: U64) -> int:
        """See `Trainer`; returns the number of this worker's."""
        self._send("forget", {}, users.tobytes())
        return super().forget(users)

    def take_rows(self, how: Taking, without: Collection[str] = ()) -> dict[str, dict[str, npt.NDArray[Any]]]:
        """See `Trainer`; with the users of all workers.

        Raises:
            WorkerLost: A worker ended or does not answer, or weights that all hold differ; recent versions do not compare them.
        """
        self._send("take", {"how": how, "without": sorted(without)})
        changes = super().take_rows(how, without)
        if not self._alone:
            shared = self._shared_digest(changes) if how != "take_served" else np.zeros(32, np.uint8)
            parts = [load(part) for part in self.group.gather_bytes(save(changes[USER] | {SHARED: shared}))]
            require_equal([part.pop(SHARED).tobytes() for part in parts])
            changes[USER] = joined_by_id(parts)
        return changes

    def own_rows(self, table: str, rows: Changes) -> Changes:
        """See `Trainer`; of users, those of this worker."""
        if table != USER or self._alone:
            return rows
        arrays = rows.columns()
        for ids, columns in COLUMNS_BY_ID.items():
            is_own = self._owns(arrays[ids])
            arrays |= {name: arrays[name][is_own] for name in (ids, *columns)}
        return Changes(**arrays)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """See `Trainer`. The others wait."""
        before, self._alone, self._was_alone = self._alone, True, True
        try:
            yield
        finally:
            self._alone = before

    def rejoin(self, load: LoadVersion, version: int) -> None:
        """See `Trainer`. Every worker loads its part; the leader has it, unless it was alone."""
        self._send("rejoin", {"version": version}, timeout_s=0.0)
        if self._was_alone or not self.group.leads:
            load(self, version)
        self._was_alone = False
        # Loading may take minutes, so until all have loaded, workers wait for each other without a time limit.
        self.group.wait()

    def beat(self) -> None:
        """See `Trainer`.

        Raises:
            WorkerLost: A worker ended or does not answer.
        """
        if not self.group.leads or time.monotonic() - self.group.exchanged_s > BEAT_S:
            self._send("beat", {})
            self.group.gather(np.zeros(1, np.float32))

    def stop(self) -> None:
        """Ends the other workers."""
        self._send("stop", {})

    def follow(self, load: LoadVersion) -> None:
        """Repeats the leader's calls until it ends.

        Args:
            load: Restores a trainer to a version.

        Raises:
            WorkerLost: The leader or another worker ended, or does not answer.
        """
        while True:
            head, _, data = self.group.receive().partition(b"\n")
            call = json.loads(head)
            if call["name"] == "stop":
                return
            if call["name"] == "beat":
                self.beat()
            elif call["name"] == "step":
                self.guard = GuardState(**call["guard"])
                self.step(decode(data), None if call["seed"] is None else tuple(call["seed"]))
            elif call["name"] == "forget":
                self.forget(np.frombuffer(data, np.uint64))
            elif call["name"] == "take":
                self.take_rows(call["how"], call["without"])
            elif call["name"] == "rejoin":
                self.rejoin(load, call["version"])

    def _send(self, name: str, arguments: Mapping[str, Any], data: bytes = b"", timeout_s: float = TIMEOUT_S) -> None:
        if self.group.leads and not self._alone:
            self.group.send(json.dumps({"name": name, **arguments}).encode() + b"\n" + data, timeout_s)

    def _shared_digest(self, changes: Mapping[str, Mapping[str, npt.NDArray[Any]]]) -> npt.NDArray[np.uint8]:
        """SHA-256 over the rows that all workers hold and the dense weights."""
        sha = hashlib.sha256()
        for name in sorted(changes.keys() - {USER, NEXT_CATEGORY, *ITEM_LISTS}):
            for column in changes[name].values():
                sha.update(np.ascontiguousarray(column).tobytes())
        for _, weight in sorted(self.model.weights().items()):
            sha.update(weight.tobytes())
        return np.frombuffer(sha.digest(), np.uint8)

    def _owns(self, users: U64) -> npt.NDArray[np.bool_]:
        is_own: npt.NDArray[np.bool_] = self.group.owners(users) == self.group.index
        return is_own

    def _observe_users(self, batch: MicroBatch) -> U64:
        if self._alone:
            return super()._observe_users(batch)
        is_own = self._owns(batch.user)
        new = np.zeros(len(batch), np.float32)
        new[is_own] = self.tables[USER].find(batch.user[is_own]) == MISSING
        self.tables[USER].observe(np.ascontiguousarray(batch.user[is_own]), batch.at_ms[is_own])
        everywhere = self.group.gather(new).any(0)
        self._began_s = self._clock()
        return batch.user[everywhere]

    def _update(self, batch: MicroBatch, crosses: U64, seed: tuple[int, int] | None) -> Update:
        if self._alone:
            return super()._update(batch, crosses, seed)
        owners = self.group.owners(batch.user)
        record = self._record(batch, crosses, seed)
        return self._judge_and_apply(batch, record, self._measured(record, owners))

    def _measured(self, record: Record, owners: I64) -> Measured:
        """Measures this worker's rows of a record, and exchanges the results for those of all rows."""
        rows, own_rows = self.engine.rows(record), np.flatnonzero(owners == self.group.index)
        shapes = self._shapes(record, rows, int(np.bincount(owners).max()))
        sent = np.zeros(sum(math.prod(shape) for shape in shapes.values()), np.float32)
        into, own, gradient = _views(sent, shapes), None, None
        if own_rows.size:
            own = self.engine.measure(record.take(own_rows))
            gradient = self.engine.gradient(own)
            self._fill(into, own, gradient, rows, np.float32(own_rows.size / len(record)))
        into["load"][:] = self._clock() - self._began_s, len(self.tables[USER])
        parts = [_views(part, shapes) for part in self.group.gather(sent)]
        self._began_s = self._clock()
        before = [load.seconds for load in self.loads] or [0.0] * self.group.size
        self.loads = [
            WorkerLoad(seconds + float(part["load"][0]), int(part["load"][1]))
            for seconds, part in zip(before, parts, strict=True)
        ]
        return self._joined(parts, own, gradient, rows, owners)

    def _shapes(self, record: Record, rows: Mapping[str, I32], most: int) -> dict[str, tuple[int, ...]]:
        """The arrays that each worker sends, in order; a worker has at most `most` rows."""
        logits = record.ids["recent"].shape[1] + record.ids["popular"].size + record.ids["successor"].shape[1]
        shapes: dict[str, tuple[int, ...]] = {"scores": (most, logits + 6), "user_norm": (1,), "load": (2,)}
        shapes |= {f"dense.{name}": shape for name, shape in self._dense_shapes.items()}
        shapes |= {f"fast.{name}": slot.shape for name, slot in self.optimizer.fast._asdict().items()}
        shapes |= {f"rows.{name}": (at.size, self.tables[name].dim) for name, at in rows.items() if name != USER}
        return shapes | {"precision": (rows[CROSS].size, self.tables[CROSS].dim)}

    def _fill(
        self, into: Mapping[str, F32], own: Measured, gradient: Gradient, rows: Mapping[str, I32], share: np.float32
    ) -> None:
        scores = own.scores
        pairs = (part.reshape(2, -1).T for part in (scores.engagement, scores.engagement_loss))
        columns = (scores.recent_logits, scores.popular_logits, scores.successor_logits)
        ranked = np.stack([scores.interest_loss, scores.rank.astype(np.float32)], 1)
        into["scores"][: len(ranked)] = np.concatenate([*columns, ranked, *pairs], 1)
        into["user_norm"][0] = np.square(gradient.sparse[USER][1:]).sum()
        for name, derivative in gradient.dense.items():
            into[f"dense.{name}"][...] = derivative
        for name, slot in gradient.fast._asdict().items():
            into[f"fast.{name}"][...] = slot * share
        for name, derivative in gradient.sparse.items():
            if name != USER:
                into[f"rows.{name}"][_places(own.rows[name], rows[name])] = derivative
        if own.crossed is not None:
            table, at = self._crosses_table, own.rows[CROSS]
            indices = _places(at, rows[CROSS])
            into[f"rows.{CROSS}"][indices] = own.crossed.rows - table.gather(at)
            into["precision"][indices] = own.crossed.precision - table.gather_accum(at)

    def _joined(
        self,
        parts: Sequence[Mapping[str, F32]],
        own: Measured | None,
        gradient: Gradient | None,
        rows: Mapping[str, I32],
        owners: I64,
    ) -> Measured:
        sums = {
            name: functools.reduce(np.add, (part[name] for part in parts))
            for name in parts[0]
            if name not in ("scores", "load")
        }
        dense = {name: sums[f"dense.{name}"] for name in self._dense_shapes}
        shared = {name: sums[f"rows.{name}"] for name in rows if name not in (USER, CROSS)}
        squared = float(sums["user_norm"][0]) + sum(float(np.square(gradient).sum()) for gradient in dense.values())
        squared += sum(float(np.square(gradient[1:]).sum()) for gradient in shared.values())
        if own is None or gradient is None:
            users, by_users = np.zeros(1, np.int32), np.zeros((1, self.tables[USER].dim), np.float32)
        else:
            users, by_users = own.rows[USER], gradient.sparse[USER]
        crosses, crossed = self._crosses_table, None
        if own is None or own.crossed is not None:
            crossed = Crossed(
                np.zeros(len(owners), np.float32),
                crosses.gather(rows[CROSS]) + sums[f"rows.{CROSS}"],
                crosses.gather_accum(rows[CROSS]) + sums["precision"],
            )
        fast = FastSlots(*(sums[f"fast.{name}"] for name in FastSlots._fields))
        measured = Measured(_scores(parts, owners, self.model), squared, {**rows, USER: users}, crossed, None)
        return self.engine.with_gradient(measured, Gradient(dense, {**shared, USER: by_users}, fast))


def _scores(parts: Sequence[Mapping[str, F32]], owners: I64, ranker: Ranker) -> Scores:
    """The scores of all rows, from the workers' blocks."""
    rows = np.empty((len(owners), parts[0]["scores"].shape[1]), np.float32)
    for worker, part in enumerate(parts):
        is_workers = owners == worker
        rows[is_workers] = part["scores"][: np.count_nonzero(is_workers)]
    sizes = [int(ranker.sizes[letter] or 0) for letter in "LPS"]
    recent, popular, successor, loss, rank, pairs, pair_losses = np.split(rows, np.cumsum([*sizes, 1, 1, 2]), axis=1)
    return Scores(
        recent_logits=np.ascontiguousarray(recent),
        popular_logits=np.ascontiguousarray(popular),
        successor_logits=np.ascontiguousarray(successor),
        interest_loss=loss[:, 0].copy(),
        rank=rank[:, 0].astype(np.int32),
        engagement=pairs.T.reshape(-1),
        engagement_loss=pair_losses.T.reshape(-1),
    )


def _views(flat: F32, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, F32]:
    """`flat` `[n]` as arrays of these shapes."""
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    return {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), np.split(flat, ends[:-1]), strict=True)
    }


def _places(subset: I32, rows: I32) -> npt.NDArray[np.int64]:
    """Where each of `subset` distinct rows is in `rows`, which has all of them."""
    order = np.argsort(rows)
    indices: npt.NDArray[np.int64] = order[np.searchsorted(rows, subset, sorter=order)]
    return indices


def require_equal(digests: Sequence[bytes]) -> None:
    """Compares the digests of what all workers hold.

    Raises:
        WorkerLost: A worker's differs from the leader's.

    >>> require_equal([b"a", b"a"])
    >>> require_equal([b"a", b"a", b"b"])
    Traceback (most recent call last):
    state.errors.WorkerLost: worker 2 has other weights than worker 0; ...
    """
    for worker, digest in enumerate(digests):
        if digest != digests[0]:
            raise WorkerLost(
                f"worker {worker} has other weights than worker 0",
                "run all workers with the same release, packages and type of CPU; the group starts again from the newest version",
            )


def joined_by_id(parts: Sequence[Mapping[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """The rows of several workers, whose ids differ, in the order of `Changes`.

    >>> ids = [np.array(each, np.uint64) for each in ([2, 9], [5])]
    >>> joined_by_id([{"ids": each, "removed": each[:0]} for each in ids])["ids"].tolist()
    [2, 5, 9]
    """
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for ids, columns in COLUMNS_BY_ID.items():
        if ids in joined:
            order = np.argsort(joined[ids], kind="stable")
            joined |= {name: joined[name][order] for name in (ids, *columns) if name in joined}
    return joined
