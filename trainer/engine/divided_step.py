"""The step of one of several workers that train one model; see `trainer/group.py`.

1. The leader sends the micro-batch. Every worker does the same step, with these differences.
2. The table of users has only the worker's own users. All other tables, dense weights and counts are equal everywhere.
3. Each worker measures the rows of its users: scores, and the gradient.
4. The workers exchange scores and gradients. Each adds the gradients in the order of the workers, so that all apply the
   same bits. Fast weights make `moves_of` moves, by the means of the workers' moves, weighted by rows. Crosses learn
   from all rows in each worker.
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
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from state.config.settings import Settings
from state.errors import SettingsError, WorkerLost
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode, encode
from state.ranking.item_lists import NEXT_CATEGORY
from state.rows.tables import ITEM_LISTS
from trainer.engine.adam import FastMoves, FastSlots
from trainer.engine.engine import CROSS, F32, I32, Gradient, Measured, Scores
from trainer.engine.guard import GuardState
from trainer.engine.record import Record
from trainer.engine.report import Report, Update
from trainer.engine.step import LoadVersion, Taking, Trainer, WorkerLoad
from trainer.group import TIMEOUT_S, Group
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.model import Analysed, Model, Preprocessing
from trainer.privacy import NoisePlace
from trainer.tables.id_table import I64, MISSING, Changes
from trainer.tables.index import U64

USER, SHARED = "user", "shared"
DENSE, FAST, ROWS = "dense.", "fast.", "rows."
BEAT_S = 2.0
"""The longest time without an exchange, so that the leader notices the loss of a worker without clicks."""
COLUMNS_BY_ID = {
    "ids": ("rows", "accum", "last_seen_ms"),
    "removed": (),
    "pending_ids": ("pending_counts", "pending_seen_ms"),
}
"""The columns of `Changes` that each column of ids orders."""


class DividedTrainer(Trainer):
    """A `Trainer` that shares the training of one model with other processes.

    The leader's calls of `step`, `forget`, `take_rows`, `rejoin` and `beat` are repeated by the others (`follow`).

    Raises:
        SettingsError: A privacy budget is set: its noise is that of one process.
    """

    def __init__(
        self, settings: Settings, spec: FeatureSpec, preprocessing: Preprocessing | Analysed | None, group: Group
    ) -> None:
        if settings.privacy.epsilon:
            raise SettingsError("trainer.workers is above 1 with privacy.epsilon", "unset one of them")
        self.group, self._alone, self._was_alone, self._began_s = group, False, False, 0.0
        super().__init__(settings, spec, preprocessing)
        self._dense_shapes = {name: weight.shape for name, weight in self.model.weights().items()}

    def step(self, batch: MicroBatch, seed: tuple[int, int] | None = None, place: NoisePlace | None = None) -> Report:
        """See `Trainer`."""
        if self.group.leads and len(batch) and not self.guard.held:
            value, rows = batch.logged or (encode(batch.header, batch.columns), np.ones(len(batch), np.bool_))
            call = {"guard": asdict(self.guard), "seed": seed, "rows": (len(batch), rows.size)}
            self._send("step", call, batch.at_ms.tobytes() + rows.tobytes() + value)
        self.loads, self._began_s = [WorkerLoad(0.0, load.users) for load in self.loads], self._clock()
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
                count, of = call["rows"]
                at_ms, rows = np.frombuffer(data, np.int64, count), np.frombuffer(data, np.bool_, of, 8 * count)
                batch = replace(decode(data[8 * count + of :]).take(rows), at_ms=at_ms)
                self.step(batch, None if call["seed"] is None else tuple(call["seed"]))
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
        users = np.ascontiguousarray(batch.user[is_own])
        new_users: U64 = users[self.tables[USER].find(users) == MISSING]
        self.tables[USER].observe(users, batch.at_ms[is_own])
        return new_users

    def _update(self, batch: MicroBatch, crosses: U64, seed: tuple[int, int] | None) -> Update:
        if self._alone:
            return super()._update(batch, crosses, seed)
        record = self._record(batch, crosses, seed)
        return self._judge_and_apply(batch, record, self._measured(record))

    def _measured(self, record: Record) -> Measured:
        """Measures this worker's rows of a record, and exchanges the results for those of all rows."""
        exchange, users = self._exchange(record), record.ids[USER]
        own_rows = np.flatnonzero(exchange.owners == self.group.index)
        # Crosses learn from all rows in each worker, so a worker without rows measures one whose user it does not hold.
        own = self.engine.measure(record, own=own_rows if own_rows.size else np.zeros(1, np.int64))
        gradient = self.engine.gradient(own)
        if own_rows.size:
            exchange.put(own, gradient, np.isin(users[own_rows], self._new_users))
        exchange.gather(self.group, WorkerLoad(self._clock() - self._began_s, len(self.tables[USER])))
        self._began_s = self._clock()
        before = [load.seconds for load in self.loads] or [0.0] * self.group.size
        self.loads = [
            WorkerLoad(seconds + load.seconds, load.users)
            for seconds, load in zip(before, exchange.loads(), strict=True)
        ]
        scores, is_new = exchange.scores(self.model)
        self._new_users = np.union1d(self._new_users, users[is_new])
        joined, squared = exchange.gradient(gradient.sparse[USER])
        rows = {**exchange.rows, USER: own.rows[USER], CROSS: own.rows[CROSS]}
        return self.engine.with_gradient(Measured(scores, squared, rows, own.crossed, None), joined)

    def _exchange(self, record: Record) -> Exchange:
        owners = self.group.owners(record.ids[USER])
        rows = {name: at for name, at in self.engine.rows(record).items() if name != USER}
        logits = record.ids["recent"].shape[1] + record.ids["popular"].size + record.ids["successor"].shape[1]
        scores = int(np.bincount(owners).max()), logits + 7
        shapes: dict[str, tuple[int, ...]] = {"scores": scores, "user_norm": (1,), "load": (2,)}
        shapes |= {f"{DENSE}{name}": shape for name, shape in self._dense_shapes.items()}
        fast = self.optimizer.fast
        shapes |= {f"{FAST}{name}": fast.fast.shape for name in FastMoves._fields}
        shapes |= {f"{ROWS}{name}": (at.size, self.tables[name].dim) for name, at in rows.items()}
        return Exchange(shapes, rows, owners, fast)


class Exchange:
    """What the workers send each other about one update, and what follows for the whole record.

    1. `put` writes what this worker measured of its rows.
    2. `gather` exchanges it.
    3. `loads`, `scores` and `gradient` read what all have sent; they add it up in the order of the workers.

    Args:
        shapes: By name, the arrays that each worker sends, in order.
        rows: By table that all workers hold, `[u]` int32, the rows that the update changes.
        owners: `[B]` int64, the worker of each row of the record.
        fast: The fast weights before the record.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, I32], owners: I64, fast: FastSlots
    ) -> None:
        self._shapes, self.rows, self.owners, self._fast = shapes, rows, owners, fast
        self._sent = np.zeros(sum(math.prod(shape) for shape in shapes.values()), np.float32)
        self._parts: list[dict[str, F32]] = []

    def put(self, own: Measured, gradient: Gradient, is_new: npt.NDArray[np.bool_]) -> None:
        """Writes this worker's part.

        Args:
            own: Its rows, one or more.
            gradient: Of `own`.
            is_new: `[n]` bool, whether each row's user had no row before.
        """
        into, scores = _views(self._sent, self._shapes), own.scores
        pairs = (part.reshape(2, -1).T for part in (scores.engagement, scores.engagement_loss))
        columns = (scores.recent_logits, scores.popular_logits, scores.successor_logits)
        ranked = np.stack([scores.interest_loss, scores.rank, is_new], 1, dtype=np.float32, casting="unsafe")
        into["scores"][: len(ranked)] = np.concatenate([*columns, ranked, *pairs], 1)
        into["user_norm"][0] = np.square(gradient.sparse[USER][1:]).sum()
        for name, derivative in gradient.dense.items():
            into[f"{DENSE}{name}"][...] = derivative
        share = np.float32(len(is_new) / len(self.owners))
        for name, mean in FastMoves.between(self._fast, gradient.fast)._asdict().items():
            into[f"{FAST}{name}"][...] = mean * share
        for name, rows in self.rows.items():
            into[f"{ROWS}{name}"][_places(own.rows[name], rows)] = gradient.sparse[name]

    def gather(self, group: Group, load: WorkerLoad) -> None:
        """Exchanges the parts. Raises as `Group.gather`."""
        _views(self._sent, self._shapes)["load"][:] = load
        self._parts = [_views(part, self._shapes) for part in group.gather(self._sent)]

    def loads(self) -> list[WorkerLoad]:
        """The load of each worker."""
        return [WorkerLoad(float(part["load"][0]), int(part["load"][1])) for part in self._parts]

    def scores(self, model: Model) -> tuple[Scores, npt.NDArray[np.bool_]]:
        """The scores of all rows, and whether each row's user had no row before, `[B]` bool."""
        rows = np.empty((len(self.owners), self._shapes["scores"][1]), np.float32)
        for worker, part in enumerate(self._parts):
            is_workers = self.owners == worker
            rows[is_workers] = part["scores"][: np.count_nonzero(is_workers)]
        sizes = np.cumsum([*(int(model.sizes[letter] or 0) for letter in "LPS"), 1, 1, 1, 2])
        recent, popular, successor, loss, rank, is_new, pairs, losses = np.split(rows, sizes, axis=1)
        scores = Scores(
            recent_logits=np.ascontiguousarray(recent),
            popular_logits=np.ascontiguousarray(popular),
            successor_logits=np.ascontiguousarray(successor),
            interest_loss=loss[:, 0].copy(),
            rank=rank[:, 0].astype(np.int32),
            engagement=pairs.T.reshape(-1),
            engagement_loss=losses.T.reshape(-1),
        )
        return scores, is_new[:, 0] != 0.0

    def gradient(self, by_users: F32) -> tuple[Gradient, float]:
        """The gradient of the record, with this worker's derivatives by rows of users, and its squared norm."""
        dense, fast, rows = (self._sums(kind) for kind in (DENSE, FAST, ROWS))
        squared = float(sum(part["user_norm"][0] for part in self._parts))
        squared += sum(float(np.square(derivative).sum()) for derivative in dense.values())
        squared += sum(float(np.square(derivative[1:]).sum()) for derivative in rows.values())
        moves = moves_of(len(self.owners), len(self._parts)) if self._fast.fast.size else 0
        return Gradient(dense, {**rows, USER: by_users}, FastMoves(**fast).applied(self._fast, moves)), squared

    def _sums(self, kind: str) -> dict[str, F32]:
        names = [name for name in self._shapes if name.startswith(kind)]
        return {
            name.removeprefix(kind): functools.reduce(np.add, (part[name] for part in self._parts)) for name in names
        }


def moves_of(rows: int, workers: int) -> int:
    """The moves of the fast weights by an update.

    Each worker makes 1 / `workers` of the moves of one process, from the same weights. Their sum would overshoot, and their
    mean would learn too slowly. So the step of the mean grows by the root of the number of workers, as that of Adam does
    with the batch (Malladi et al. 2022).

    >>> [moves_of(512, workers) for workers in (1, 2, 4, 16)]
    [16, 11, 8, 4]
    """
    return max(1, round(rows / HYPERPARAMETERS.fast_rows / math.sqrt(workers)))


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
