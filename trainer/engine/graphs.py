"""Rankers as TensorFlow graphs, and the engines that run them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from state.config.sections import Model as ModelSettings
from state.config.settings import Settings
from state.errors import ProgramError, SettingsError
from state.features.spec import FeatureSpec
from state.process.user_code import error_line, load_named
from state.ranking.crosses import Crosses
from trainer.engine.build import labelled, optimizer_of
from trainer.engine.compiled.preparing import VALUES, Prepare, by_table
from trainer.engine.crosses import CrossLearner, first_precision
from trainer.engine.engine import CROSS, Engine
from trainer.engine.private_engine import PrivateEngine, ReleasedCrosses
from trainer.engine.tensorflow_engine import Adam, TensorflowEngine
from trainer.model.attributes import Columns
from trainer.model.default_ranker import DefaultRanker
from trainer.model.model import Analysed, Preprocessing, StoredTable
from trainer.model.preprocessing import compiled_graph, graph_of
from trainer.model.ranker import Ranker
from trainer.model.tower import DenseTower
from trainer.privacy import LearnedCrosses
from trainer.tables.table import Table

WANTED = "wanted is build(settings, spec, preprocessing) -> trainer.model.ranker.Ranker"


def ranker_of(settings: Settings, spec: FeatureSpec, preprocessing: Preprocessing | Analysed | None) -> Ranker:
    """The ranker of the setting `model.ranker`.

    Raises:
        SettingsError: There is none of this name.
        ProgramError: It is no ranker.
    """
    path = settings.model.ranker
    graph = None if preprocessing is None else graph_of(preprocessing, spec.names)
    if path == ModelSettings().ranker:
        return DefaultRanker(settings.model, spec, graph, labelled(settings))
    try:
        ranker = load_named(path, "model.ranker")(settings.model, spec, graph)
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


def prepared_by(
    preprocessing: Preprocessing, features: int, setting: str, stored: StoredTable | None = None
) -> Prepare:
    """Compiles a preprocessing of so many features for the compiled engine; stores the table of the default one.

    Args:
        preprocessing: `[B, D]` float32 raw integers to `[B, D']` float32.
        features: D.
        setting: The setting `model.preprocessing`.
        stored: Receives the table, so that the next start does not need the graph.
    """
    by_graph: Prepare = compiled_graph(preprocessing, features)
    if setting != ModelSettings().preprocessing:
        return by_graph
    table = by_graph(np.repeat(VALUES, features, 1))
    looked_up = by_table(table)
    # The settings may name a different function from the one that the bootstrap analysed.
    sample = np.random.default_rng(0).geometric(1e-3, (256, features)).astype(np.uint16)
    if table.shape[1] != features or not np.allclose(looked_up(sample), by_graph(sample), 1e-5, 1e-5):
        return by_graph
    if stored is not None:
        stored.save(table)
    return looked_up


class GraphParts:
    """See `Parts`; of an engine that runs the ranker's graph on a device."""

    def __init__(self, settings: Settings, ranker: Ranker, device: str) -> None:
        self._settings, self.model, self.device = settings, ranker, device
        with tf.device(device):
            self.optimizer = optimizer_of(Adam, ranker.dense, ranker, settings)

    def engine(self, tables: Mapping[str, Table], crosses: Crosses, columns: Columns) -> Engine:
        """See `Parts`."""
        ranker, optimizer, device, privacy = self.model, self.optimizer, self.device, self._settings.privacy
        precision, rate = first_precision(crosses.kinds), self._settings.model.learning_rate
        embeddings = {name: table for name, table in tables.items() if name != CROSS}
        with tf.device(device):
            if privacy.epsilon > 0:
                learned = LearnedCrosses.of(crosses.kinds, privacy.unit)
                released = ReleasedCrosses(tables[CROSS], len(learned.released), precision[learned.both])
                return PrivateEngine(ranker, optimizer, embeddings, rate, released, device)
            learner = CrossLearner(tables[CROSS], precision)
            return TensorflowEngine(ranker, optimizer, embeddings, rate, learner, device)

    def ranker(self) -> Ranker:
        """See `Parts`."""
        return self.model
