"""One serving host in this process: the stores that the applier writes, and a worker's recommendation code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from deploy.serving.answers.item_index import ItemSources
from deploy.serving.answers.items import recommend
from deploy.serving.answers.predictor import Predictor, Stores
from deploy.serving.answers.query import Query, WantedItems
from deploy.serving.answers.queue import finished
from deploy.serving.following.clicks import Upkeep
from deploy.serving.host_files import program_path
from springtide_client.answers import Recommendations
from state.attributes.store import AttributeStore
from state.config.settings import Settings
from state.events.identity import Salt
from state.features.spec import Events, FeatureSpec
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import HISTORIES, PROGRAMS, ROWS
from state.metrics import ApplierMetrics
from state.process.wall_clock import wall_ms
from state.ranking.item_scores import SOURCES, scores_without
from state.registry.manifest import Draft, Kind, LogRange, complete
from state.rows.store import RowStore

U64 = NDArray[Any]
KEPT_VERSIONS = 2


class ServingHost:
    """The stores of one host, in its own `paths.state`, and the code that answers from them. Used by one thread."""

    def __init__(
        self,
        settings: Settings,
        spec: FeatureSpec,
        salt: Salt,
        program: bytes,
        attributes: AttributeStore | None = None,
    ) -> None:
        folder = settings.serving_dir
        self._spec, self._salt, self._digest = spec, salt, hashlib.sha256(program).hexdigest()
        self.rows = RowStore(folder / ROWS)
        self.histories = HistoryStore(folder / HISTORIES, settings.features.history)
        programs = folder / PROGRAMS
        programs.mkdir(exist_ok=True)
        program_path(programs, self._digest).write_bytes(program)
        metrics = ApplierMetrics(CollectorRegistry())
        self._upkeep = Upkeep(self.histories, spec.reach_ms(settings.events), settings.history, metrics, wall_ms)
        self._version, self._per_category = 0, settings.serving.per_category
        impressions = {*settings.labels.impressions}
        self._impressions = [n for n, name in enumerate(settings.events.actions) if name in impressions]
        self.sources = ItemSources(self.histories, self.rows)
        self.predictor = Predictor(
            Stores(self.rows, self.histories, attributes), settings, salt, wall_ms, pseudonym=int
        )

    def click(self, users: U64, events: Events) -> None:
        """Commits clicks as one commit of the applier does: `[m]` uint64 pseudonyms and `[m]` EVENT."""
        if not len(users):
            return
        extras = self._upkeep.news(events, {}, int(events["at_ms"].max()))
        self.histories.commit(Appends.of(users, events), (), extras)

    def follow(self) -> None:
        """Lets the worker's candidate sources read everything new."""
        while self.sources.read_more():
            pass

    def serve(self, tensors: Mapping[str, Any], whole: bool = False) -> None:
        """Applies the next version; answers use it from now on.

        `tensors` is its content, as in a registry. If `whole` is True, it is a base instead of the changes since the
        previous version.
        """
        kind: Kind = "base" if whole else "delta"
        parent = None if whole else self._version
        about = (self._spec.digest, self._digest, self._salt.fingerprint)
        draft = Draft(kind, 1, parent, LogRange(), (), 1, 1, 1, 1, *about)
        manifest = complete(draft, self._version + 1, ((1, self._version),), {})
        self._version += 1
        self.rows.apply(manifest, tensors, wall_ms(), follow=True)
        self.rows.drop({self._version - KEPT_VERSIONS})
        while self.rows.tidy():
            pass

    def recommend(
        self, user: int, at_ms: int, wanted: WantedItems, context: Mapping[str, str] = MappingProxyType({})
    ) -> Recommendations:
        """Returns a worker's answer to `/v1/recommendations` for a pseudonym at a time."""
        query = Query(str(user), context=context, at_ms=at_ms)
        wanted = wanted._replace(per_category=self._per_category)
        return finished(recommend(self.predictor, self.sources, query, wanted, self._impressions))

    def ranks_without(self, item: int, most: int) -> dict[str, int]:
        """By source the rank of an item, from 0, had the latest recommendation lacked this source of candidates.

        The weights stay the same. The rank is -1 if the item would not be among the best `most`.
        """
        work = self.sources.work
        at = np.flatnonzero(work.items[: work.size[0]] == np.uint64(item))
        ranks = {}
        for source, name in enumerate(SOURCES):
            scores = scores_without(source, work)
            rank = int((scores > scores[at[0]]).sum()) if at.size and np.isfinite(scores[at[0]]) else most
            ranks[f"without {name}"] = rank if rank < most else -1
        return ranks

    def close(self) -> None:
        """Closes the stores."""
        self.histories.close()
        self.rows.close()
