"""The parts of a trainer that learns with the compiled engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from state.config.settings import Settings
from state.ranking.crosses import Crosses
from trainer.engine.adam import HostAdam
from trainer.engine.build import optimizer_of
from trainer.engine.compiled.engine import CompiledEngine
from trainer.engine.compiled.preparing import Prepare
from trainer.engine.compiled.threads import Threads
from trainer.engine.crosses import CrossLearner, first_precision
from trainer.engine.engine import CROSS, Engine
from trainer.model.attributes import Columns
from trainer.model.default_model import DefaultModel
from trainer.tables.table import Table

if TYPE_CHECKING:
    from trainer.model.ranker import Ranker


class CompiledParts:
    """See `Parts`.

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
