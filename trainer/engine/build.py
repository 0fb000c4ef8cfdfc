"""Builds what a trainer consists of from its settings: ranker, tables, optimizer and engine.

It also holds the compiled engine, `CompiledEngine`. That runs the default ranker's step on a CPU, in compiled loops
and matrix products:

1. Distinct rows of each table are found and gathered.
2. The tower runs forward (`trainer/engine/compiled/tower.py`).
3. The heads score candidates and pairs, and learn within the record (`trainer/engine/compiled/heads.py`).
4. The tower runs backward; derivatives are gathered by distinct row.
5. `apply` moves the gathered rows by Adagrad and the dense weights by Adam.

A step calls TensorFlow only if `model.preprocessing` names a function of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from state.compiled import compiled
from state.config.sections import Model as ModelSettings
from state.config.settings import Settings
from state.errors import ProgramError, SettingsError
from state.features.spec import FeatureSpec
from state.process.user_code import error_line, load_named
from state.ranking.crosses import WIDTH, Crosses
from trainer.engine.compiled.arrays import (
    F32,
    FAST,
    FROM_HEADS,
    I32,
    U16,
    Facts,
    FastWeights,
    Gradients,
    HeadInputs,
    Learned,
    read_only,
)
from trainer.engine.compiled.heads import Heads
from trainer.engine.compiled.threads import Threads
from trainer.engine.compiled.tower import Embedded, Passed, Tower, scatter_rows
from trainer.engine.compiled.window_net import LOGARITHMS
from trainer.engine.engine import CROSS, Engine, Measured
from trainer.engine.optimizers.adagrad import adagrad
from trainer.engine.optimizers.adam import Adam, HostAdam
from trainer.engine.optimizers.crosses import first_precision
from trainer.engine.own_tables import EMBEDDINGS, own_tables
from trainer.engine.record import Record
from trainer.engine.sums import gather, square
from trainer.engine.tensorflow.engine import TensorflowEngine
from trainer.engine.tensorflow.private import PrivateEngine
from trainer.model.attributes import Columns, combine
from trainer.model.default_ranker import DefaultRanker
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.preprocessing import Logarithms, Preprocessing
from trainer.model.ranker import Ranker
from trainer.model.tower import DenseTower
from trainer.privacy.learned_crosses import LearnedCrosses
from trainer.tables.count_table import CountTable
from trainer.tables.table import INITIAL_RANGE, Table, table_of

_USES = {
    "user": ("user",),
    "item": ("item", "negative_item"),
    "category": ("recent", "popular", "successor", "category", "negative_category", "other"),
    "context": ("context",),
    CROSS: ("cross", "cross_share"),
}
"""The ids of each table. Their order decides in which order rows first occur, and with it the bits of the gradient's norm."""


class Found(NamedTuple):
    """What `apply` needs of a measured record.

    Attributes:
        sparse: Derivatives by the distinct rows of embedding tables.
        dense: Derivatives by the dense weights, by name; valid until the next record is measured.
        learned: What the heads have learned themselves.
    """

    sparse: Mapping[str, F32]
    dense: Mapping[str, F32]
    learned: Learned


class CompiledEngine:
    """See `trainer/engine/engine.py`.

    Args:
        ranker: The default one, with a dense tower.
        optimizer: Of its dense weights.
        tables: Of embedding rows and of crosses, by name.
        cross_precision: `[C]` float32, the precision of each cross's weight before anything was learned.
        attributes: A, of an item.
        threads: That share its loops.

    Attributes:
        threads: As given.
    """

    name = "compiled"

    def __init__(
        self,
        ranker: DefaultRanker,
        optimizer: HostAdam,
        tables: Mapping[str, Table],
        cross_precision: F32,
        attributes: int,
        threads: Threads,
    ) -> None:
        self._ranker, self._optimizer, self._tables = ranker, optimizer, tables
        self._cross_precision, self._attributes = cross_precision, attributes
        ranker.hold(optimizer.weights)
        self._tower = Tower(ranker, optimizer.weights, optimizer.gradients, threads)
        self._prepare = prepared_by(ranker.preprocessing, ranker.sizes["D"] or 0, ranker.settings.preprocessing)
        self._heads, self.threads = Heads(threads), threads
        self._weights = {name: optimizer.weights[weight] for weight, name in FROM_HEADS.items()}

    def measure(self, record: Record, move: bool = True) -> Measured:
        """See `Engine`."""
        rows, at = self._rows(record)
        distinct = {name: table.gather(rows[name]) for name, table in self._tables.items()}
        embedded = Embedded(
            user=distinct["user"],
            user_at=at["user"],
            category=distinct["category"],
            latest_at=np.ascontiguousarray(at["recent"][:, : HYPERPARAMETERS.latest]),
            popular_at=at["popular"],
            context=distinct["context"],
            context_at=at["context"].reshape(len(record), -1),
        )
        passed, forward = self._tower.forward(
            self._prepare(record.values["features"]), embedded, record.values["tower_kept"]
        )
        inputs = self._inputs(passed, distinct, self._tables[CROSS].gather_accum(rows[CROSS]), at)
        slots = self._optimizer.fast if move else None
        facts = self._facts(record, at)
        scores, gradients, learned, heads = self._heads.prepare(
            facts, inputs, slots, self._optimizer.fast_rate, self._ranker.drops
        )
        by_rows, by_popular_rows, backward = self._tower.backward(passed, gradients.queries, gradients.popular_logits)
        self.threads.run(forward, heads, *backward)
        sparse = self._sparse(distinct, at, gradients)
        into = sparse["user"], sparse["category"], sparse["context"]
        scatter_rows(embedded, by_rows, gradients.queries, by_popular_rows, *into)
        dense = {
            weight: getattr(gradients.fast if name in FAST else gradients, name) for weight, name in FROM_HEADS.items()
        }
        for weight, own in self._optimizer.gradients.items():
            if weight in dense:
                own[...] = dense[weight]
            dense[weight] = own
        squared = square(self._optimizer.gradient[None]) + sum(square(part.reshape(1, -1)) for part in gradients.fast)
        squared += sum(square(gradient[1:]) for gradient in sparse.values())
        return Measured(scores, squared, rows, Found(sparse, dense, learned))

    def apply(self, measured: Measured) -> None:
        """See `Engine`."""
        found: Found = measured.found
        for name, table in self._tables.items():
            at = measured.rows[name][1:]
            # The missing row is never trained.
            if not at.size:
                continue
            if name == CROSS:
                table.put(at, found.learned.cross[1:], found.learned.cross_precision[1:])
                continue
            adagrad(table.rows, table.accum, at, found.sparse[name][1:], self._ranker.settings.learning_rate)
        self._optimizer.apply(found.learned.fast)

    def _rows(self, record: Record) -> tuple[dict[str, I32], dict[str, I32]]:
        """Distinct rows of each table, and where in them each use of an id is, by the name of the ids.

        With attributes what an item is depends on the row: the heads are given one
        row for each combination of item and attributes.
        """
        uses = {table: {name: record.ids[name].reshape(-1) for name in names} for table, names in _USES.items()}
        combined = combine(record.ids["item"], record.ids["item_attributes"]) if self._attributes else None
        if combined is not None:
            uses["item"] = {"combined_item": combined.item}
            uses["context"]["item_attributes"] = combined.attributes.reshape(-1)
        rows: dict[str, I32] = {}
        at: dict[str, I32] = {}
        for name, parts in uses.items():
            table = self._tables[name]
            rows[name], places = table.distinct(table.find(np.concatenate(list(parts.values()))))
            ends = np.cumsum([part.size for part in parts.values()])
            at |= dict(zip(parts, np.split(places, ends[:-1]), strict=True))
        if combined is not None:
            at |= {"item": combined.at, "negative_item": combined.at[record.partner]}
        shaped = ("recent", "successor", "cross")
        return rows, at | {name: at[name].reshape(record.ids[name].shape) for name in shaped}

    def _facts(self, record: Record, at: Mapping[str, I32]) -> Facts:
        values, targets, scaling = record.values, record.targets, self._ranker.window_scaling
        return Facts(
            windows=read_only(values["category_windows"]),
            recent_next=values["recent_next"],
            log_scale=scaling.log_scale,
            scale=scaling.scale,
            shift=scaling.shift,
            recent_mask=values["recent_mask"],
            popular_mask=values["popular_mask"],
            successor_mask=values["successor_mask"],
            other_mask=values["other_mask"],
            popular_next=values["popular_next"],
            successor_next=values["successor_next"],
            recent_at=at["recent"],
            successor_at=at["successor"],
            other_at=at["other"],
            pair_category_at=np.concatenate([at["category"], at["negative_category"]]),
            pair_item_at=np.concatenate([at["item"], at["negative_item"]]),
            target=targets.slot,
            weight=targets.weight,
            engaged=np.concatenate([targets.label, np.zeros(len(record), np.float32)]),
            engaged_shift=np.concatenate([targets.label_shift, targets.negative_shift]),
            engaged_weight=np.concatenate([targets.label_weight, targets.negative_weight]),
            cross_at=at["cross"],
            share_at=at["cross_share"],
            cross_prior=self._cross_precision,
        )

    def _inputs(
        self, passed: Passed, distinct: Mapping[str, F32], cross_precision: F32, at: Mapping[str, I32]
    ) -> HeadInputs:
        weights = self._weights
        return HeadInputs(
            plain_queries=passed.plain_queries,
            queries=passed.queries,
            plain_popular=passed.plain_popular,
            popular_logits=passed.popular,
            user_features=passed.user_features,
            category=distinct["category"],
            item=self._items(distinct, at),
            prior=weights["prior"],
            item_bias=weights["item_bias"],
            category_bias=weights["category_bias"],
            cross=distinct[CROSS],
            cross_precision=cross_precision,
            fast=FastWeights(*(weights[name] for name in FAST)),
        )

    def _items(self, distinct: Mapping[str, F32], at: Mapping[str, I32]) -> F32:
        """The rows of items that pairs name; with attributes the item's own plus the mean of theirs."""
        if not self._attributes:
            return distinct["item"]
        rows = distinct["context"][at["item_attributes"]].reshape(-1, self._attributes, self._ranker.settings.dim)
        found: F32 = distinct["item"][at["combined_item"]] + rows.mean(1)
        return found

    def _sparse(self, distinct: Mapping[str, F32], at: Mapping[str, I32], gradients: Gradients) -> dict[str, F32]:
        """The derivatives by the distinct rows of each embedding table that the heads found."""
        sparse = {"user": np.zeros_like(distinct["user"]), "item": gradients.item, "category": gradients.category}
        sparse["context"] = np.zeros_like(distinct["context"])
        if self._attributes:
            sparse["item"] = np.zeros_like(distinct["item"])
            gather(sparse["item"], at["combined_item"], gradients.item)
            shares = np.repeat(gradients.item / np.float32(self._attributes), self._attributes, 0)
            gather(sparse["context"], at["item_attributes"], shares)
        return sparse


def prepared_by(preprocessing: Preprocessing, features: int, name: str) -> Callable[[U16], F32]:
    """Compiles a preprocessing.

    `Logarithms` and the default one take each feature by itself, and a feature has 65,536 values: all are computed once. A
    call of TensorFlow's graph in each update took as long as the heads. `tests/trainer/engine/test_build.py` compares both.

    Args:
        preprocessing: `[B, D]` float32 raw integers to `[B, D']` float32.
        features: D.
        name: The setting `model.preprocessing`.

    Returns:
        `[B, D]` uint16 features to what `preprocessing` makes of them, `[B, D']` float32.
    """
    values = np.arange(1 << 16, dtype=np.uint16)[:, None]
    if isinstance(preprocessing, Logarithms):
        return _by_table(
            LOGARITHMS[:, None] * preprocessing.log_scale + values.astype(np.float32) * preprocessing.scale
        )
    signature = [tf.TensorSpec([None, features], tf.uint16)]
    graph = tf.function(lambda raw: preprocessing(tf.cast(raw, tf.float32)), signature, autograph=False)
    concrete = graph.get_concrete_function()

    def by_tensorflow(raw: U16) -> F32:
        return np.ascontiguousarray(concrete(tf.constant(raw)).numpy(), np.float32)

    if name != ModelSettings().preprocessing:
        return by_tensorflow
    table = by_tensorflow(np.repeat(values, features, 1))
    by_table = _by_table(table)
    # The settings may name another function than the one that the bootstrap analysed.
    sample = np.random.default_rng(0).geometric(1e-3, (256, features)).astype(np.uint16)
    same = table.shape[1] == features and np.allclose(by_table(sample), by_tensorflow(sample), 1e-5, 1e-5)
    return by_table if same else by_tensorflow


def _by_table(table: F32) -> Callable[[U16], F32]:
    """Looks features up in `[65536, D]` float32, the value of each feature for each raw integer."""

    def look_up(raw: U16) -> F32:
        found = np.empty(raw.shape, np.float32)
        _look_up(read_only(raw), table, found)
        return found

    return look_up


@compiled("const(u2[:, ::1]), f4[:, ::1], f4[:, ::1]")
def _look_up(raw: U16, table: F32, out: F32) -> None:
    for b in range(raw.shape[0]):
        for d in range(raw.shape[1]):
            out[b, d] = table[raw[b, d], d]


TRANSITION = "transition"
"""The table of what came next after a category, which is counted and not learned."""

TRANSITION_CAPACITY = 1024
"""Lists at the start: there are as many as categories, and each takes 800 bytes."""

ROWS_OF_A_LIST = 8
"""A list takes more room than a row: `trainer.max_rows` allows one for so many rows."""

WANTED = "wanted is build(settings, spec, preprocessing) -> trainer.model.ranker.Ranker"


def labelled(settings: Settings) -> bool:
    """Whether the log says of its rows whether somebody engaged, so that no negative is drawn."""
    return bool(settings.events.label or settings.labels.impressions)


def ranker_of(settings: Settings, spec: FeatureSpec, preprocessing: Preprocessing | None) -> Ranker:
    """The ranker of the setting `model.ranker`.

    Raises:
        SettingsError: There is none of this name.
        ProgramError: It is no ranker.
    """
    path = settings.model.ranker
    if path == ModelSettings().ranker:
        return DefaultRanker(settings.model, spec, preprocessing, labelled(settings))
    try:
        found = load_named(path, "model.ranker")(settings.model, spec, preprocessing)
    except SettingsError:
        raise
    except ProgramError as error:
        raise ProgramError(f"model.ranker {path!r}: {error.what}", error.do) from error
    # A ranker of the user's own may fail in any way.
    except Exception as error:
        raise ProgramError(f"model.ranker {path!r} raised {error_line(error)}", WANTED) from error
    if not isinstance(found, Ranker):
        raise ProgramError(f"model.ranker {path!r} returned {type(found).__name__}", WANTED)
    found.origin = f"model.ranker {path!r}"
    return found


def optimizer_of(ranker: Ranker, settings: Settings, engine: str) -> Adam | HostAdam:
    """The optimizer of the ranker's dense weights.

    With differential privacy all weights share one learning rate, because noise is calibrated per update.
    """
    private = settings.privacy.epsilon > 0
    of = (HostAdam, ranker.weights()) if engine == "compiled" else (Adam, ranker.dense)
    kind, weights = of
    return kind(
        weights,
        settings.privacy.learning_rate if private else settings.model.dense_learning_rate,
        {} if private else ranker.learning_rates,
        ranker.fast_weights,
        1.0 if private else HYPERPARAMETERS.fast_learning_rate,
    )


def tables_of(ranker: Ranker, settings: Settings, device: str | None) -> dict[str, Table]:
    """Embedding rows, crosses, and the ranker's own, by name.

    Args:
        ranker: Names its tables and their widths.
        settings: All settings.
        device: TensorFlow device of the rows; None keeps them in host arrays.
    """
    model, trainer = settings.model, settings.trainer
    tables = {
        name: table_of(
            device,
            name,
            ranker.tables.get(name, model.dim),
            trainer.capacity,
            model.initial_accumulator,
            trainer.admit_after if name != "context" else 1,
            ranker.initial_ranges.get(name, INITIAL_RANGE),
            trainer.max_rows,
        )
        for name in EMBEDDINGS
    }
    # A cross begins at nothing: a weight and a marginal logit of 0, of which nothing was learned.
    tables[CROSS] = table_of(device, CROSS, WIDTH, trainer.capacity, 0.0, trainer.admit_after, 0.0, trainer.max_crosses)
    return tables | own_tables(ranker, settings, device)


def transitions_of(settings: Settings) -> CountTable:
    """What came next after each category."""
    trainer = settings.trainer
    return CountTable(
        TRANSITION,
        TRANSITION_CAPACITY,
        trainer.admit_after,
        max(trainer.max_rows // ROWS_OF_A_LIST, TRANSITION_CAPACITY),
    )


def engine_name(settings: Settings, ranker: Ranker, device: str) -> str:
    """`compiled` or `tensorflow`, by the setting `trainer.engine`; with a privacy budget always `tensorflow`.

    Raises:
        SettingsError: The compiled engine is wanted of what it cannot do.
    """
    if settings.privacy.epsilon > 0:
        return "tensorflow"
    wanted = settings.trainer.engine
    able = type(ranker) is DefaultRanker and type(ranker.tower) is DenseTower and "CPU" in device.upper()
    if wanted == "compiled" and not able:
        raise SettingsError(
            f"trainer.engine is compiled, which computes the default ranker and tower on a CPU only, not "
            f"{type(ranker).__name__} on {device}",
            "set trainer.engine to auto or tensorflow",
        )
    if wanted == "auto":
        return "compiled" if able else "tensorflow"
    return wanted


def engine_of(
    ranker: Ranker,
    optimizer: Adam | HostAdam,
    tables: Mapping[str, Table],
    crosses: Crosses,
    columns: Columns,
    settings: Settings,
    device: str,
) -> Engine:
    """The engine that fits the optimizer: `HostAdam` goes with the compiled one."""
    precision, rate = first_precision(crosses.kinds), settings.model.learning_rate
    if isinstance(optimizer, HostAdam):
        assert isinstance(ranker, DefaultRanker)
        threads = Threads(settings.trainer.threads)
        return CompiledEngine(ranker, optimizer, tables, precision, len(columns.items.names), threads)
    with tf.device(device):
        if settings.privacy.epsilon > 0:
            learned = LearnedCrosses.of(crosses.kinds, settings.privacy.unit)
            told = len(learned.told)
            return PrivateEngine(ranker, optimizer, tables, rate, precision[learned.both], device, told)
        return TensorflowEngine(ranker, optimizer, tables, rate, precision, device)
