"""Chooses the engine, and with it the ranker, the optimizer and the device of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from state.config.sections import Model as ModelSettings
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.ranking.crosses import Crosses
from state.registry.model_fit import FORMER_TOWERS
from trainer.device import prepare
from trainer.engine.adam import FastSlots, HostAdam
from trainer.engine.build import labelled, optimizer_of
from trainer.engine.compiled.engine import CompiledEngine
from trainer.engine.compiled.preparing import Prepare, prepared_on_host
from trainer.engine.compiled.threads import Threads
from trainer.engine.crosses import CrossLearner, first_precision
from trainer.engine.engine import CROSS, F32, Engine
from trainer.model.attributes import Columns
from trainer.model.default_model import DefaultModel
from trainer.model.model import Analysed, Model, Preprocessing
from trainer.tables.table import Table

if TYPE_CHECKING:
    from trainer.model.ranker import Ranker


class Optimizer(Protocol):
    """The optimizer of the dense weights; see `HostAdam`."""

    fast: FastSlots
    fast_rate: float

    def slots(self) -> dict[str, F32]:
        """A host copy of the state by name."""

    def set_slots(self, slots: Mapping[str, F32]) -> None:
        """Restores the whole state."""


class Parts(Protocol):
    """What a trainer learns with."""

    @property
    def model(self) -> Model:
        """The ranker to train."""

    @property
    def optimizer(self) -> Optimizer:
        """Of its dense weights."""

    @property
    def device(self) -> str | None:
        """The TensorFlow device of embedding rows; None: they are host arrays."""

    def engine(self, tables: Mapping[str, Table], crosses: Crosses, columns: Columns) -> Engine:
        """Builds the engine, over the tables of embedding rows and crosses."""

    def ranker(self) -> Ranker:
        """The ranker's graph with the present weights, to lower or to export it. Loads TensorFlow."""


class CompiledParts:
    """See `Parts`; of the compiled engine.

    Args:
        prepare: The preprocessing.
        make_ranker: Builds the ranker's graph, with any weights.
    """

    device = None

    def __init__(
        self, settings: Settings, model: DefaultModel, prepare: Prepare, make_ranker: Callable[[], Ranker]
    ) -> None:
        self._settings, self.model = settings, model
        self._prepare, self._make_ranker = prepare, make_ranker
        self.optimizer = optimizer_of(HostAdam, model.weights(), model, settings)

    def engine(self, tables: Mapping[str, Table], crosses: Crosses, columns: Columns) -> Engine:
        """See `Parts`."""
        learner = CrossLearner(tables[CROSS], first_precision(crosses.kinds))
        embeddings = {name: table for name, table in tables.items() if name != CROSS}
        threads, attributes = Threads(self._settings.trainer.threads), len(columns.items.names)
        return CompiledEngine(self.model, self.optimizer, self._prepare, embeddings, learner, attributes, threads)

    def ranker(self) -> Ranker:
        """See `Parts`."""
        ranker = self._make_ranker()
        ranker.set_weights(self.model.weights())
        return ranker


def learns_without_graph(settings: Settings, device: str) -> bool:
    """Whether the settings alone show that the compiled engine computes the model, so that TensorFlow is not needed."""
    model, default = settings.model, ModelSettings()
    return (
        settings.trainer.engine != "tensorflow"
        and settings.privacy.epsilon == 0
        and "CPU" in device.upper()
        and model.tower in (default.tower, *FORMER_TOWERS)
        and (model.ranker, model.preprocessing) == (default.ranker, default.preprocessing)
    )


def parts_of(
    settings: Settings, spec: FeatureSpec, preprocessing: Preprocessing | Analysed | None, device: str
) -> Parts:
    """The parts that the settings describe. TensorFlow is loaded only if they need a graph."""

    def make_ranker() -> Ranker:
        from trainer.engine.graphs import ranker_of

        prepare(settings.trainer.device, settings.trainer.threads)
        return ranker_of(settings, spec, preprocessing)

    if learns_without_graph(settings, device):
        prepare_features = prepared_on_host(preprocessing, spec.names)
        if prepare_features is not None:
            model = DefaultModel(settings.model, spec, len(spec.names), labelled(settings))
            return CompiledParts(settings, model, prepare_features, make_ranker)
    import tensorflow as tf

    from trainer.engine import graphs
    from trainer.model.tower import named

    prepare(settings.trainer.device, settings.trainer.threads)
    with tf.device(device):
        ranker = graphs.ranker_of(settings, spec, preprocessing)
    if graphs.engine_name(settings, ranker, device) == "tensorflow":
        return graphs.GraphParts(settings, ranker, device)
    prepare_features = prepared_on_host(preprocessing, spec.names) or graphs.prepared_by(
        ranker.preprocessing,
        len(spec.names),
        settings.model.preprocessing,
        preprocessing.table if isinstance(preprocessing, Analysed) else None,
    )
    width = prepare_features(np.zeros((1, len(spec.names)), np.uint16)).shape[1]
    tower = {name: weight.numpy() for name, weight in named(ranker.tower).items()}
    model = DefaultModel(settings.model, spec, width, labelled(settings), tower)
    return CompiledParts(settings, model, prepare_features, lambda: ranker)
