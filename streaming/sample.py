"""The sample of clicks that a bootstrap reads: its own histories, rows computed by the stream's code, statistics."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from state.config.settings import Settings
from state.events.identity import Salt
from state.events.parser import EventBatch, Parser
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.microbatch.batch import Kind, trained
from state.recordings.rows import shown_reasons
from state.statistics.collecting import Statistics
from streaming.context import Handle, JobContext, Step, opened
from streaming.event_clock import EventClock
from streaming.labels import Labels
from streaming.profile import Profiler
from streaming.rows import Rows
from streaming.unlogged import commit_at_once

PROGRESS_S = 2.0

Say = Callable[[str], None]


@dataclass
class Tally:
    """Counts of a sample so far.

    Attributes:
        clicks: Events.
        examples: Rows used for training: events, except impressions without a label yet and their outcomes.
        dropped: Impressions that could not wait.
        records: Records.
        refused: Records that are not clicks, by reason.
        names: Names of category ids.
        newest_ms: Time of the newest click.
        said_s: When progress was last reported.
    """

    clicks: int = 0
    examples: int = 0
    dropped: int = 0
    records: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)
    newest_ms: int = 0
    said_s: float = 0.0

    def count_events(self, events: EventBatch) -> None:
        """Counts parsed records."""
        self.clicks += len(events)
        self.records += len(events) + len(events.dead)
        self.refused.update(str(letter.reason) for letter in events.dead)
        self.names.update(events.names)
        self.newest_ms = max(self.newest_ms, int(events.at_ms.max(initial=0)))

    def count_rows(self, rows: Rows) -> None:
        """Counts the rows of a batch."""
        kinds = rows.columns["kind"]
        self.examples += int(trained(kinds).sum())
        self.dropped += int((kinds == Kind.DROPPED).sum())


@dataclass(frozen=True, kw_only=True)
class Sample(JobContext):
    """The context of one bootstrap; its store is deleted afterwards.

    Attributes:
        say: Receives progress messages.
        clock_s: Wall clock, seconds.
        began_s: When reading began.
        tally: Counts so far.
        statistics: Of the rows so far.
        asked: The options that the preprocessing read, of `AskedModel`.
    """

    say: Say
    clock_s: Callable[[], float]
    began_s: float
    statistics: Statistics
    tally: Tally = field(default_factory=Tally)
    asked: dict[str, list[str]] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Maximum number of records of the next batch."""
        return min(self.settings.stream.batch_events, self.settings.bootstrap.sample_rows - self.tally.clicks)

    def progress(self, wanted: str) -> None:
        """Reports the progress, at most once per `PROGRESS_S`."""
        now_s = self.clock_s()
        if now_s - max(self.tally.said_s, self.began_s) >= PROGRESS_S:
            self.tally.said_s = now_s
            self.say(f"{self.tally.clicks:,} {wanted} read, {self._rate(now_s):,.0f} rows/s")

    def end(self) -> None:
        """Reports what was read; called after the last record."""
        now_s, tally = self.clock_s(), self.tally
        dead = f" and {shown_reasons(tally.refused)}" if tally.refused else ""
        self.say(
            f"{tally.clicks:,} clicks{dead} read in {now_s - self.began_s:.1f} s ({self._rate(now_s):,.0f} rows/s)"
        )

    @property
    def unlabelled(self) -> str:
        """Describes the impressions that got no label; empty if there are none."""
        waiting, dropped = self.store.waiting_rows(), self.tally.dropped
        parts = [
            f"{waiting:,} impressions still waited for their label when the clicks ended" * (waiting > 0),
            f"{dropped:,} could not wait" * (dropped > 0),
        ]
        return ", ".join(filter(None, parts))

    def _rate(self, now_s: float) -> float:
        return self.tally.records / max(now_s - self.began_s, 1e-9)


@contextmanager
def open_sample(
    settings: Settings, spec: FeatureSpec, salt: Salt, clock: Callable[[], float], say: Say
) -> Iterator[Handle[Sample]]:
    """Yields a new sample, whose store is deleted after the block."""
    with tempfile.TemporaryDirectory(prefix="springtide-bootstrap-") as folder:
        store = HistoryStore(Path(folder), history=spec.history, map_bytes=settings.stream.map_gb << 30)
        try:
            sample = Sample(
                settings=settings,
                spec=spec,
                store=store,
                parser=Parser(settings.events, salt),
                profiler=Profiler(store, spec, settings.stream.cache_users),
                clock=EventClock(store.extra),
                labels=Labels(settings, store) if settings.labels.impressions else None,
                say=say,
                clock_s=clock,
                began_s=clock(),
                statistics=Statistics(spec.actions, spec.names, settings.events.context),
            )
            with opened(sample) as handle:
                yield handle
        finally:
            store.close()


class ComputeWindows(Step[Sample]):
    """Turns events into rows, as in the stream: impressions wait for their label, in event time."""

    def process(self, events: EventBatch) -> Iterator[Rows]:
        """Yields the rows of one batch and of earlier impressions that it labels; skips batches without events."""
        with self.handle.watched() as sample:
            sample.tally.count_events(events)
            now_ms = round(sample.clock_s() * 1000)
            rows = commit_at_once(sample.store, sample.profiler, sample.clock, sample.labels, events, now_ms)
            sample.tally.count_rows(rows)
            sample.statistics.add(rows.columns)
        if len(events):
            yield rows
