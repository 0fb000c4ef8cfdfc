"""Opens the stores that a worker reads on its host, and reopens them when the applier has rebuilt them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deploy.serving.currency import Currency
from deploy.serving.known_attributes import KnownAttributes
from deploy.serving.notes import CAUGHT_UP_EXTRA, CLOCK_EXTRA, REFUSED_NOTE, refused_versions
from deploy.serving.predictor import Predictor
from deploy.serving.recommending.sources import ItemSources
from deploy.serving.segments import HostSegments
from state.attributes.store import AttributeStore
from state.attributes.values import tables_of
from state.compiled.preparing import Kernels
from state.config.settings import Settings
from state.errors import NotReady, SpringtideError, StoreError
from state.events.identity import Salt
from state.features.spec import FeatureSpec
from state.history.actions import ACTIONS, numbered
from state.history.store import HistoryStore
from state.layout import ATTRIBUTES, CURRENT, DATA, HISTORIES, PROGRAMS, ROWS
from state.rows.store import RowStore

DEGRADED_S = 60.0
"""The delay before a part counts as degraded; the same as that of the alert `SpringtideSharedAway`."""

_CHECK_MS = 1000


class Host:
    """The stores of one serving host, as a worker reads them. Used by one thread.

    Args:
        settings: The locations of the stores and the definition of their features.
        salt: The salt of the pseudonyms.
        now_ms: The wall clock.
        pseudonym: Maps a query's user to a pseudonym; None if queries contain raw ids.

    Attributes:
        segments: The segments and their members.
        kernels: The kernels that this process compiles; None if answers do not wait for them.
        warm: Whether answers of each kind have been computed once to warm up.
    """

    COLD = "the first answers are being prepared"

    def __init__(
        self,
        settings: Settings,
        salt: Salt,
        now_ms: Callable[[], int],
        pseudonym: Callable[[str], int] | None = None,
    ) -> None:
        self._settings = settings
        self._salt, self._pseudonym = salt, pseudonym
        self.segments = HostSegments(settings, salt)
        self.kernels: Kernels | None = None
        self.warm = True
        self._now_ms = now_ms
        self._spec = FeatureSpec.from_settings(settings)
        self._rows: RowStore | None = None
        self._histories: HistoryStore | None = None
        self._tables = tables_of(settings.attributes)
        self._attributes: AttributeStore | None = None
        self._predictor: Predictor | None = None
        self._sources: ItemSources | None = None
        self._files: tuple[tuple[int, int], ...] = ()
        self._check_at_ms = 0
        self._currency = Currency(settings.serving_dir, CURRENT)

    @property
    def impressions(self) -> tuple[int, ...]:
        """The numbers of the actions that are impressions (`labels.impressions`); empty if none are configured."""
        settings = self._settings
        return tuple(n for n, name in enumerate(settings.events.actions) if name in settings.labels.impressions)

    def predictor(self) -> Predictor:
        """Returns the predictor; checks once a second whether a store's file was replaced, and then reopens all stores.

        Raises:
            NotReady: A store does not exist yet, or kernels are still being compiled.
        """
        if self.kernels is not None and not self.kernels.done:
            raise NotReady(self.kernels.progress, "wait until /readyz answers 200")
        now_ms = self._now_ms()
        if self._predictor is None or not self._check_at_ms - _CHECK_MS <= now_ms < self._check_at_ms:
            self._check_at_ms = now_ms + _CHECK_MS
            files = tuple(self._file(name) for name in (ROWS, HISTORIES, ATTRIBUTES))
            if self._predictor is None or files != self._files:
                self.close()
                self._predictor = self._open()
                self._files = files
        return self._predictor

    @property
    def version(self) -> int | None:
        """The version of the last answer; None before the first answer."""
        return None if self._predictor is None else self._predictor.version

    def sources(self) -> ItemSources:
        """Returns the sources of candidate items; they are rebuilt when the stores are reopened.

        The caller decides how far they are read.

        Raises:
            NotReady: A store does not exist yet.
        """
        histories = self.predictor().histories
        if self._sources is None:
            assert self._rows is not None
            self._sources = ItemSources(histories, self._rows)
        return self._sources

    def missing(self) -> dict[str, str]:
        """Returns the reasons why this worker cannot answer, by part (histories, version, program); empty when ready.

        If `serving.max_age_s` is set, parts that are too old are included.
        """
        if self.kernels is not None and not self.kernels.done:
            return {"program": self.kernels.progress}
        try:
            predictor = self.predictor()
        except SpringtideError as error:
            return {"histories" if self._rows is not None else "version": str(error)}
        found = {}
        assert self._histories is not None
        if self._histories.extra(CLOCK_EXTRA) is None:
            found["histories"] = "no micro-batch has been taken into the histories yet; is the stream running?"
        elif self._histories.extra(CAUGHT_UP_EXTRA) is None:
            found["histories"] = (
                "the histories are still being rebuilt from the micro-batch topic; wait for the applier"
            )
        try:
            predictor.ready()
        except NotReady as error:
            found["version"] = str(error)
        except SpringtideError as error:
            found["program"] = str(error)
        if max_age_s := self._settings.serving.max_age_s:
            found = self._currency.older_than(max_age_s, self._now_ms()) | found
        return found or ({} if self.warm else {"program": self.COLD})

    def degraded(self) -> dict[str, str]:
        """Returns a message for each part (histories, version) that is more than `DEGRADED_S` behind."""
        return {
            part: f"what came in the last {age_s:.0f} s is not all taken up"
            for part, age_s in self._currency.ages_s(self._now_ms()).items()
            if age_s is not None and age_s > DEGRADED_S
        }

    def refused(self) -> tuple[int, str] | None:
        """Returns the newest version after the served one that failed its probe, with the reason; None without one."""
        if self._rows is None:
            return None
        with self._rows.reader() as reader:
            served = reader.served()
            newer = [
                one
                for one in refused_versions(reader.note(REFUSED_NOTE)).items()
                if served is None or one[0] > served.version
            ]
        return max(newer, default=None)

    def close(self) -> None:
        """Closes the stores."""
        self.segments.close()
        for store in (self._rows, self._histories, self._attributes):
            if store is not None:
                store.close()
        self._rows = self._histories = self._attributes = self._predictor = self._sources = None

    def _open(self) -> Predictor:
        settings, folder = self._settings, self._settings.serving_dir
        map_bytes = settings.serving.map_gb << 30
        try:
            self._rows = RowStore(folder / ROWS, map_bytes, readonly=True)
            self._histories = HistoryStore(folder / HISTORIES, settings.features.history, map_bytes, readonly=True)
            self._histories.numbering, _ = numbered(self._histories.extra(ACTIONS), self._spec.actions)
            if self._tables:
                self._attributes = AttributeStore(folder / ATTRIBUTES, map_bytes, readonly=True)
        except StoreError as error:
            raise NotReady(error.what, error.do) from error
        return Predictor(
            self._rows,
            self._histories,
            folder / PROGRAMS,
            self._spec,
            self._salt,
            settings.events.context,
            settings.serving.clock,
            self._now_ms,
            None if self._attributes is None else KnownAttributes(self._attributes, self._tables),
            self._pseudonym,
        )

    def _file(self, name: str) -> tuple[int, int]:
        """Returns a store file's device and inode; inode numbers are unique only within one device."""
        path: Path = self._settings.serving_dir / name / DATA
        try:
            found = path.stat()
            return found.st_dev, found.st_ino
        except FileNotFoundError:
            return 0, 0
