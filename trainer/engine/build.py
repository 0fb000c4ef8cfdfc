"""Builds the parts of a trainer from its settings: ranker, tables, optimizer and engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf

from state.config.sections import Model as ModelSettings
from state.config.settings import Settings
from state.errors import ProgramError, SettingsError
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from state.process.user_code import error_line, load_named
from state.ranking.crosses import WIDTH, Crosses
from trainer.engine.adam import Adam, HostAdam
from trainer.engine.compiled.engine import CompiledEngine
from trainer.engine.compiled.threads import Threads
from trainer.engine.crosses import CrossLearner, first_precision
from trainer.engine.engine import CROSS, Engine
from trainer.engine.private_engine import PrivateEngine, ReleasedCrosses
from trainer.engine.tensorflow_engine import TensorflowEngine
from trainer.model.attributes import Columns
from trainer.model.default_ranker import DefaultRanker
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.preprocessing import Preprocessing
from trainer.model.ranker import Ranker
from trainer.model.tower import DenseTower
from trainer.privacy.participation import LearnedCrosses
from trainer.tables.count_table import CountTable
from trainer.tables.index import U64
from trainer.tables.table import INITIAL_ACCUMULATOR, Table, table_of

TRANSITION = "transition"
"""The table of what came next after a category, which is counted and not learned."""

TRANSITION_CAPACITY = 1024
"""Initial lists: as many as there are categories, 800 bytes each."""

CAPACITY = 65_536
"""Initial rows of a table, which grows as needed."""

CROSSES_OF_A_ROW = 4
"""`trainer.max_rows` allows this many crosses for each row."""

PRIVATE_LEARNING_RATE = 20.0
"""With a privacy budget, the learning rate of the dense weights in multiples of `model.dense_learning_rate`."""

ROWS_OF_A_LIST = 8
"""`trainer.max_rows` allows one list for this many rows, because a list takes more memory."""

WANTED = "wanted is build(settings, spec, preprocessing) -> trainer.model.ranker.Ranker"


def labelled(settings: Settings) -> bool:
    """Whether rows of the log have labels, so that no negatives are drawn."""
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
        ranker = load_named(path, "model.ranker")(settings.model, spec, preprocessing)
    except SettingsError:
        raise
    except ProgramError as error:
        raise ProgramError(f"model.ranker {path!r}: {error.what}", error.do) from error
    # A custom ranker may raise any exception.
    except Exception as error:
        raise ProgramError(f"model.ranker {path!r} raised {error_line(error)}", WANTED) from error
    if not isinstance(ranker, Ranker):
        raise ProgramError(f"model.ranker {path!r} returned {type(ranker).__name__}", WANTED)
    ranker.origin = f"model.ranker {path!r}"
    return ranker


def optimizer_of(ranker: Ranker, settings: Settings, engine: str) -> Adam | HostAdam:
    """The optimizer of the dense weights. With differential privacy all weights share one rate: noise is set per update."""
    private = settings.privacy.epsilon > 0
    choice = (HostAdam, ranker.weights()) if engine == "compiled" else (Adam, ranker.dense)
    kind, weights = choice
    return kind(
        weights,
        settings.model.dense_learning_rate * (PRIVATE_LEARNING_RATE if private else 1.0),
        {} if private else ranker.learning_rates,
        ranker.fast_weights,
        1.0 if private else HYPERPARAMETERS.fast_learning_rate,
    )


def tables_of(ranker: Ranker, settings: Settings, device: str | None) -> dict[str, Table]:
    """Embedding rows, crosses, and the ranker's own tables, by name. Without a `device` rows are kept in host arrays."""
    model, trainer = settings.model, settings.trainer
    tables = grown_by(ranker)
    admitted_at_once = {"context", *(name for name, ids in tables.items() if FEW.issuperset(ids))}

    def table(name: str) -> Table:
        return table_of(
            device,
            name,
            ranker.tables.get(name, model.dim),
            CAPACITY,
            INITIAL_ACCUMULATOR,
            1 if name in admitted_at_once else trainer.admit_after,
            ranker.initial_ranges.get(name, HYPERPARAMETERS.first_row),
            trainer.max_rows,
        )

    # The weight and the marginal logit of a new cross are 0.
    cross = table_of(device, CROSS, WIDTH, CAPACITY, 0.0, trainer.admit_after, 0.0, CROSSES_OF_A_ROW * trainer.max_rows)
    return {**{name: table(name) for name in EMBEDDINGS}, CROSS: cross, **{name: table(name) for name in tables}}


def transitions_of(settings: Settings) -> CountTable:
    """Builds the table of what came next after each category."""
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
        SettingsError: `compiled` was set for a model that it cannot compute.
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
    """Builds the engine that fits the optimizer; `HostAdam` selects the compiled engine."""
    precision, rate = first_precision(crosses.kinds), settings.model.learning_rate
    learner, embeddings = CrossLearner(tables[CROSS], precision), {**tables}
    del embeddings[CROSS]
    if isinstance(optimizer, HostAdam):
        assert isinstance(ranker, DefaultRanker)
        threads = Threads(settings.trainer.threads)
        return CompiledEngine(ranker, optimizer, embeddings, learner, len(columns.items.names), threads)
    with tf.device(device):
        if settings.privacy.epsilon > 0:
            learned = LearnedCrosses.of(crosses.kinds, settings.privacy.unit)
            released = ReleasedCrosses(tables[CROSS], len(learned.released), precision[learned.both])
            return PrivateEngine(ranker, optimizer, embeddings, rate, released, device)
        return TensorflowEngine(ranker, optimizer, embeddings, rate, learner, device)


GROWN_BY = {
    "sequence_items": "item",
    "negative_item": "item",
    "sequence_categories": "category",
    "recent": "category",
    "popular": "category",
    "successor": "category",
    "other": "category",
    "negative_category": "category",
    "negative_item_attributes": "item_attributes",
}
"""By ids that look a table up, the ids that grow it instead. All other ids grow their table themselves."""

FEW = frozenset({"context", "item_attributes", "sequence_actions"})
"""Ids with so few values that each gets a row at its first occurrence, as in the table `context`."""

EMBEDDINGS = ("user", "item", "category", "context")
"""The tables of embedding rows of every ranker."""


def grown_by(ranker: Ranker) -> dict[str, tuple[str, ...]]:
    """The ids that grow each of the ranker's own tables, in the order in which its inputs name them."""
    tables: dict[str, dict[str, None]] = {name: {} for name in ranker.tables if name not in EMBEDDINGS}
    for input_ in ranker.inputs:
        if input_.table in tables:
            tables[input_.table][GROWN_BY.get(input_.ids, input_.ids)] = None
    return {name: tuple(ids) for name, ids in tables.items()}


class Growth:
    """Grows a ranker's own tables.

    A row is created for ids that occur in events, not for ids that are often looked up. An item may be in the recent
    events of a thousand users although it was clicked once. So ids of events, negatives and candidates grow a table
    only through the row's own item or category.
    """

    def __init__(self, ranker: Ranker, tables: Mapping[str, Table]) -> None:
        self._grown = [(tables[name], ids) for name, ids in grown_by(ranker).items()]

    def observe(self, batch: MicroBatch, context: U64, item_attributes: U64) -> None:
        """Counts one occurrence of each id, and creates the rows that are due; `context` is `[n, K]`, `item_attributes` `[n, A]`."""
        for table, names in self._grown:
            for ids in self._ids(names, batch, context, item_attributes):
                if ids.size:
                    table.observe(ids.reshape(-1), np.repeat(batch.at_ms, ids.size // len(batch)))

    def _ids(self, names: tuple[str, ...], batch: MicroBatch, context: U64, item_attributes: U64) -> Iterator[U64]:
        computed = {"context": context, "item_attributes": item_attributes}
        for name in names:
            ids = computed[name] if name in computed else getattr(batch, name)
            yield np.ascontiguousarray(ids, np.uint64)
