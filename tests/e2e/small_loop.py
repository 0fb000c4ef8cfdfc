"""A whole loop in one process on a log in memory: real parts, stepped by hand, each of which may die at any kill point.

Stream, trainer and applier are what their processes are made of, without
Beam's runner, sockets and threads; where Dead leaves one of them it is
forgotten and made anew from what it left on disk, as after kill -9.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from msgspec import structs
from prometheus_client import CollectorRegistry

from deploy.serving.following.clicks import HistoryFollower
from deploy.serving.following.versions import VersionFollower
from state.config.settings import Settings
from state.errors import LogError
from state.events.identity import load_salt
from state.history.store import HistoryStore
from state.layout import HISTORIES, ROWS
from state.log import Log, Reader
from state.metrics import ApplierMetrics
from state.microbatch.batch import trim
from state.microbatch.codec import decode
from state.positions import Source
from state.process import killpoints
from state.process.environment import wall_ms
from state.registry import log_line
from state.registry.control import Control, start
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from state.rows.store import RowStore
from streaming.commit import Committer
from streaming.context import open_stream
from streaming.rows import Cutter
from streaming.steps import ParseEvents, UpdateProfiles, opened
from tests.e2e.evidence import serving_differs
from tests.memory_log import MemoryLog
from tests.trainer.clicks import small_settings
from tests.trainer.logs import ABOUT, account_in, bits_of, fresh, kill, learner, settle
from trainer.engine.step import Trainer
from trainer.versions.lowering import build

BATCH = 20
TOPIC_IDS = ("ab" * 16, "cd" * 16, "ef" * 16)
TICKS = 2000


class Dead(BaseException):
    """In place of kill -9."""


class StepPart(Protocol):
    """A part that is stepped by hand."""

    def step(self) -> bool:
        """Does a little; whether there may be more to do at once."""

    def close(self) -> None:
        """Lets go of everything, as the end of a process does."""


class Stream:
    """The stream on a log in memory: one batch of at most `batch` clicks, one cut, one commit a step."""

    def __init__(self, settings: Settings, log: MemoryLog, batch: int = BATCH) -> None:
        self._settings, self._log, self._batch = settings, log, batch
        self._stack = ExitStack()
        self._open()

    def _open(self) -> None:
        self._context = self._stack.enter_context(open_stream(self._settings, log=self._log))
        handle = self._stack.enter_context(opened(self._context))
        self._committer = Committer(self._context)
        self._parse, self._update = ParseEvents(handle), UpdateProfiles(handle)

    @property
    def store(self) -> HistoryStore:
        return self._context.store

    def step(self) -> bool:
        """Takes a batch, or becomes what control asks for."""
        context = self._context
        context.watch._polled_s = float("-inf")
        if context.watch.changed():
            self.close()
            self._open()
            return True
        batches = context.reader.poll(0.0, self._batch)
        if not any(batch.next > batch.first for batch in batches):
            return False
        for events in self._parse.process(batches):
            for rows in self._update.process(events):
                # Each batch is a cut: where it ends follows from the clicks alone.
                for cut in Cutter(1, 0).add(rows, wall_ms()):
                    self._committer.commit([cut])
        return True

    def close(self) -> None:
        self._stack.close()


@functools.cache
def lowered() -> bytes:
    """The program of the model that all trainers here have: each version's probe is asked on it."""
    return build(fresh().ranker())


class Training:
    """The trainer: as much of the log as one look at it gives."""

    def __init__(self, settings: Settings, log: MemoryLog, trainer: Trainer) -> None:
        about = {**ABOUT, "salt": load_salt(settings.salt_path).fingerprint}
        flags = ("--paths.state", settings.paths.state)
        registry = Registry(settings.registry_dir)
        program = registry.specs.add_program(lowered())
        self._learner = learner(registry, log, *flags, trainer=trainer, about=about, program=program)

    def step(self) -> bool:
        """One tick, and the version that is due."""
        before = self.marks()
        self._learner.tick(0.0)
        settle(self._learner)
        return self.marks() != before

    def marks(self) -> tuple[Any, ...]:
        """What moves as long as there is something to do."""
        one = self._learner
        return one.place, one.control, one.caught_up

    def content(self) -> dict[str, Any]:
        """All that was learned, and its account, in which rows that came twice count once."""
        one = self._learner
        account = account_in(one)
        account["rows"] -= account.pop("duplicate")
        return {"weights": bits_of(one), "marks": one.place.marks, "account": account}

    def close(self) -> None:
        kill(self._learner)


class Applying:
    """Serving's applier: versions into rows, micro-batches into histories."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self._settings, self._log = settings, log
        folder, metrics = settings.serving_dir, ApplierMetrics(CollectorRegistry())
        self._rows = RowStore(folder / ROWS, 1 << 27)
        self._histories = HistoryStore(folder / HISTORIES, settings.features.history, 1 << 27)
        self._registry = Registry(settings.registry_dir)
        self._versions = VersionFollower(self._rows, settings, metrics, lambda: 0)
        self._clicks = HistoryFollower(self._histories, settings, metrics, lambda: 0)

    @property
    def served(self) -> int | None:
        """The version that answers use."""
        with self._rows.reader() as reader:
            found = reader.served()
        return None if found is None else found.version

    def step(self) -> bool:
        """Control, then a version, then clicks."""
        topic = self._settings.kafka.microbatches_topic

        def open_at(offset: int) -> Reader:
            return self._log.reader(topic, [0], {0: offset})

        more = self._versions.step()
        control = self._registry.control()
        assert control is not None
        turned = self._clicks.follow_branch(control.log, control.mask, open_at)
        if not self._clicks.connected:
            self._clicks.connect(self._log, topic)
        return bool(self._clicks.step(0.0)) or turned or more

    def close(self) -> None:
        self._rows.close()
        self._histories.close()


class SmallLoop:
    """Clicks in, answers' rows and histories out."""

    NAMES = ("stream", "trainer", "applier")

    def __init__(
        self,
        folder: Path,
        salt: Path,
        decided: Callable[[Control], Control] = lambda first: first,
        flags: Sequence[str] = (),
        partitions: int = 1,
        batch: int = BATCH,
    ) -> None:
        self._batch = batch
        folder.mkdir(parents=True)
        shutil.copy(salt, folder / "salt")
        state = ("--paths.state", str(folder), "--stream.metrics_port", "0")
        self.settings = small_settings(*state, *flags)
        ids = iter(TOPIC_IDS)
        self.log = MemoryLog(ids=lambda: next(ids))
        kafka = self.settings.kafka
        for topic in (kafka.clicks_topic, kafka.microbatches_topic, kafka.dead_letters_topic):
            self.log.topics().ensure(topic, partitions if topic == kafka.clicks_topic else 1)
        self.registry = Registry(self.settings.registry_dir)
        self.registry.propose(decided(start(actor="trainer", reason="first start", now_ms=0)))
        self.parts: dict[str, StepPart] = {}
        self.down: set[str] = set()
        self.deaths: list[str] = []
        self._trainer = fresh()

    @property
    def control(self) -> Control:
        control = self.registry.control()
        assert control is not None
        return control

    @property
    def newest(self) -> Manifest:
        """The newest version of control's epoch."""
        number = self.registry.newest(self.control.epoch)
        assert number is not None
        return self.registry.manifest(number)

    def click(self, values: Sequence[bytes], times_ms: Sequence[int], partition: int = 0) -> None:
        """Writes clicks."""
        with self.log.writer() as writer:
            for value, at_ms in zip(values, times_ms, strict=True):
                writer.send(self.settings.kafka.clicks_topic, partition, None, value, (), at_ms)

    def tick(self, name: str) -> bool:
        """Steps a part, which is started where it is not there; whether there may be more to do."""
        try:
            with armed_for(name):
                if name not in self.parts:
                    self.parts[name] = self._start(name)
                return self.parts[name].step()
        except Dead as death:
            self.deaths.append(str(death))
            self.end(name)
            return True
        except LogError:
            # As a process that cannot reach its broker ends: its supervisor starts it again.
            self.end(name)
            return False

    def end(self, name: str) -> None:
        """The part is gone, with all that it had not written."""
        part = self.parts.pop(name, None)
        if part is not None:
            part.close()

    def settle(self) -> None:
        """Until nobody who is not `down` has anything to do."""
        for _ in range(TICKS):
            done = [self.tick(name) for name in self.NAMES if name not in self.down]
            if not any(done):
                return
        raise AssertionError(f"no rest within {TICKS} rounds")

    def _start(self, name: str) -> StepPart:
        if name == "stream":
            return Stream(self.settings, self.log, self._batch)
        return (
            Training(self.settings, self.log, self._trainer) if name == "trainer" else Applying(self.settings, self.log)
        )

    def line(self, to: Manifest) -> log_line.LogLine:
        """The line that an exact rollback to `to` makes."""
        end = self.log.topics().ends(self.settings.kafka.microbatches_topic)[0][1]
        return log_line.turned(self.control.log, to.log.epoch, to.log.next, end, to.sources)

    def records(self) -> list[tuple[Any, Mapping[str, bytes]]]:
        """What counts in the log: of each record with new rows its ranges and their columns as bytes."""
        found: list[tuple[Any, Mapping[str, bytes]]] = []
        marks = dict[Source, int]()
        for record in self.log.records(self.settings.kafka.microbatches_topic):
            made = decode(record.value or b"")
            if log_line.counts(self.control.log, made.header.log_epoch, record.offset):
                new, after = trim(made, marks)
                if after != marks:
                    columns = made.take(new).columns
                    found.append((made.header.ranges, {name: one.tobytes() for name, one in columns.items()}))
                marks = after
        return found

    def content(self) -> dict[str, Any]:
        """All that must be equal in two loops that came to the same; every part runs and rests."""
        training, applying = self.parts["trainer"], self.parts["applier"]
        assert isinstance(training, Training) and isinstance(applying, Applying)
        served = applying.served
        for name in ("stream", "applier"):
            self.end(name)
        assert serving_differs(self.settings, self.registry) == []
        stores: dict[str, Any] = {}
        for name, path in (("stream", self.settings.stream_dir), ("serving", self.settings.serving_dir)):
            store = HistoryStore(path / HISTORIES, self.settings.features.history, 1 << 27, readonly=True)
            stores[name] = (store.digest(), store.users(), store.positions())
            if name == "stream":
                stores["account"] = store.totals
            store.close()
        assert stores["stream"] == stores["serving"]
        return {**stores, **training.content(), "served": self.registry.manifest(served or 0).marks}

    def close(self) -> None:
        for name in self.NAMES:
            self.end(name)


@contextmanager
def armed_for(part: str) -> Iterator[None]:
    """Arms the kill point that `plan` has for a part, while it is stepped."""
    killpoints.armed = plan.get(part, [None])[0] if plan.get(part) else None
    try:
        yield
    finally:
        if killpoints.armed is not None and killpoints.armed.left <= 0:
            plan[part].pop(0)
        killpoints.armed = None


plan: dict[str, list[killpoints.Armed]] = {}
"""By part the kill points at which it dies, one after another."""


def kill_at(part: str, *points: str) -> None:
    """From now on `part` dies at these places, one after another."""

    def strike_at(name: str) -> Callable[[], None]:
        def strike() -> None:
            raise Dead(name)

        return strike

    made = [killpoints.parse(point, strike_at(point)) for point in points]
    plan[part] = [one for one in made if one is not None]


def with_masks(control: Control) -> Callable[[Control], Control]:
    """Makes a first generation that leaves out what `control` does."""
    masks = {name: getattr(control, name) for name in ("masks", "mask_generation", "last_mask")}
    return lambda first: structs.replace(first, **masks)
