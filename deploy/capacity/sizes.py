"""What each part takes under a load: cores, memory, disk, network. Pure; the formulas of `deploy/CAPACITY.md`.

Cores are processor time a second, memory what a process has and what its stores
take in memory, disk what lies there at most, network what comes in and goes out.
Nothing here is a reserve: `prices` adds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from deploy.capacity.load import HOUR_S, Load, events_kept, kept_versions, touched
from deploy.capacity.measured import MeasuredCosts
from state.config.settings import Settings

ROW_BYTES = 4
SLOTS = 2
INDEX_BYTES = 32
BROKER_BYTES = 2e9
BASES = 2
FLINK_COPIES = 2
"""Of the histories in memory on Flink: in the Python workers, and as the job's state in the heaps of TaskManagers."""
FLINK_CHECKPOINTS = 3
"""Checkpoints that Flink keeps (`deploy/flink/config.yaml`)."""
FLINK_BUCKETS = 64
"""Most buckets of users (`stream.buckets`), each on one core at a time."""
LOCAL, FLINK, AUTO = FORMS = ("local", "flink", "auto")
STREAM, TRAINER, SERVING, WORKERS, BESIDE, KAFKA, REGISTRY = (
    "stream",
    "trainer",
    "applier",
    "workers",
    "validation and console",
    "kafka",
    "registry",
)
ANSWERS = {"lean": "lean_us", "full": "full_us", "recommend": "recommend_us", "explain": "explain_us"}
ANSWER_BYTES = {"lean": 1_135.0, "full": 4_983.0, "recommend": 3_000.0, "explain": 5_000.0}


@dataclass(frozen=True)
class Need:
    """What a part takes; of what there is several of, one of them.

    Attributes:
        cores: Processor seconds a second.
        memory_bytes: Of its processes, and of stores in memory.
        disk_bytes: On disks.
        network_bytes_s: In and out.
        count: How many of it there are.
    """

    cores: float = 0.0
    memory_bytes: float = 0.0
    disk_bytes: float = 0.0
    network_bytes_s: float = 0.0
    count: int = 1


@dataclass(frozen=True)
class Sizing:
    """A load with all that its sizes follow from.

    Attributes:
        load: What is asked for.
        settings: Of the deployment.
        measured: What one thing takes.
        use: Share of a core that is planned to be used, 0 to 1.
        host_cores: Cores of a serving host.
        replication: Copies of each record in Kafka.
        form: Of the stream: local, flink, or auto, which is flink where one local process is not enough.
    """

    load: Load
    settings: Settings
    measured: MeasuredCosts
    use: float = 0.6
    host_cores: int = 16
    replication: int = 3
    form: str = AUTO

    @property
    def log_bytes_s(self) -> float:
        """Bytes a second of the training log."""
        return self.load.clicks_s * self.measured.log_row_bytes

    @property
    def log_leader_bytes_s(self) -> float:
        """Bytes a second through the broker that leads the training log's partition.

        The stream writes to it. Its followers, the trainer, the validation and each host read from it.
        """
        return self.log_bytes_s * (1 + (self.replication - 1) + 2 + self.hosts)

    @property
    def users_with_row(self) -> float:
        """Users with a row; beyond `trainer.max_rows` the least used leave."""
        return min(self.load.users, self.settings.trainer.max_rows)

    @property
    def items_with_row(self) -> float:
        """The same of items and categories."""
        return min(self.load.items, self.settings.trainer.max_rows)

    @property
    def rows(self) -> float:
        """Rows of the trainer's tables."""
        return self.users_with_row + self.items_with_row

    def changed_rows(self, seconds: float) -> float:
        """Rows that the clicks of so many seconds change: of the users who click, and of the items."""
        clicks = self.load.clicks_s * seconds
        return touched(self.users_with_row, clicks) + touched(self.items_with_row, clicks)

    @property
    def stream_histories_bytes(self) -> float:
        """The stream's store of histories, of `stream.max_users` at most."""
        return self._histories_bytes(self.settings.stream.max_users)

    @property
    def host_histories_bytes(self) -> float:
        """The store of each serving host, of `serving.max_users` at most."""
        return self._histories_bytes(self.settings.serving.max_users)

    def _histories_bytes(self, max_users: int) -> float:
        users = min(self.load.users, max_users)
        events = events_kept(self.load, self.settings, users)
        return users * (self.measured.user_bytes + events * self.measured.event_bytes)

    @property
    def served_bytes(self) -> float:
        """Serving's rows: each once, and those of durable versions of the last `serving.keep_s` once more for each change."""
        durable_s, keep_s = self.settings.registry.durable_s, self.settings.serving.keep_s
        again = self.changed_rows(durable_s) * keep_s / durable_s
        return (self.rows + again) * self.measured.served_row_bytes

    @property
    def base_bytes(self) -> float:
        """A base: every row, with its accumulators."""
        return self.measured.durable_bytes + self.rows * self.measured.base_row_bytes

    @property
    def version_bytes_s(self) -> float:
        """What versions bring to each host, bytes a second: those not durable, five a second or so."""
        versions_s, one = self.load.versions_s, self.measured
        changed = self.changed_rows(1 / versions_s)
        return versions_s * (one.recent_bytes + changed * one.recent_row_bytes)

    @property
    def registry_bytes(self) -> float:
        """All durable versions that `[registry]` asks to keep, and the newest bases."""
        one = self.measured
        deltas = sum(
            count * (one.durable_bytes + self.changed_rows(seconds) * one.durable_row_bytes)
            for count, seconds in kept_versions(self.settings)
        )
        return deltas + BASES * self.base_bytes

    @property
    def local_streams(self) -> float:
        """How many times the clicks that one local stream bears."""
        return self.load.clicks_s / (self.measured.stream_most * self.use)

    @property
    def on_flink(self) -> bool:
        """Whether the stream is a job on Flink."""
        return self.form == FLINK or (self.form == AUTO and self.local_streams > 1)

    @property
    def flink_cores(self) -> float:
        """Of TaskManagers and Python workers, were the stream a job on Flink."""
        return self.load.clicks_s * self.measured.flink_us * 1e-6

    @property
    def stream_cores(self) -> float:
        """Of the stream, in its form."""
        return self.flink_cores if self.on_flink else self.load.clicks_s * self.measured.stream_us * 1e-6

    @property
    def trainer_cores(self) -> float:
        """Of the one trainer; above 1 one is not enough."""
        return self.load.clicks_s * self.measured.trainer_us * 1e-6 + self.load.versions_s * self.publish_s

    @property
    def publish_s(self) -> float:
        """How long a version keeps steps waiting: by its rows, as the figure is of 10,000."""
        return self.measured.publish_ms * 1e-3 * self.changed_rows(1 / self.load.versions_s) / 10_000

    @property
    def applier_cores(self) -> float:
        """Of each host's applier, however many hosts there are."""
        rows_s, one = self.load.versions_s * self.changed_rows(1 / self.load.versions_s), self.measured
        asking_us = self.shared_requests_s * one.shared_request_us
        return (self.load.clicks_s * one.applier_us + rows_s * one.apply_us + asking_us) * 1e-6

    @property
    def shared_requests_s(self) -> float:
        """What each host asks of a shared registry: at each look for control and for the next pack; none where it is one's own."""
        return 2000 / self.settings.registry.look_ms if self.settings.paths.shared_registry else 0.0

    @property
    def worker_cores(self) -> float:
        """Of all workers of all hosts."""
        answer_us: float = getattr(self.measured, ANSWERS[self.load.answer])
        return self.load.answers_s * answer_us * 1e-6

    @property
    def partitions(self) -> int:
        """Partitions of the clicks topic: two for the clicks that one local stream bears, and four at least."""
        return max(4, 2 * math.ceil(self.local_streams))

    @property
    def hosts(self) -> int:
        """Serving hosts: two, or as many as bear the answers on the cores that their appliers leave."""
        left = max(1.0, self.host_cores * self.use - self.applier_cores)
        return max(2, math.ceil(self.worker_cores / left))

    @property
    def catch_up_s(self) -> float:
        """How long a host takes that begins with no histories, reading all of the training log that is kept."""
        seconds = self.load.retention_h * HOUR_S
        return seconds * self.load.clicks_s * self.measured.history_us * 1e-6

    @property
    def table_bytes(self) -> float:
        """The trainer's tables: a row, its accumulators, its id in the index, its dates; room doubles, so up to twice that."""
        width = self.settings.model.dim * ROW_BYTES * SLOTS
        return 2 * self.rows * (width + INDEX_BYTES)

    def needs(self) -> Mapping[str, Need]:
        """Part -> what it takes."""
        return {
            STREAM: self._flink() if self.on_flink else self._stream(),
            TRAINER: self._trainer(),
            SERVING: self._host(),
            WORKERS: self._workers(),
            BESIDE: Need(self.load.clicks_s * self.measured.validation_us * 1e-6, self.measured.beside_bytes),
            KAFKA: self._kafka(),
            REGISTRY: Need(disk_bytes=self.registry_bytes, network_bytes_s=(1 + self.hosts) * self.version_bytes_s),
        }

    def _stream(self) -> Need:
        cache = min(self.settings.stream.cache_users, self.load.users) * self.settings.features.history * 40
        store = self.stream_histories_bytes
        return Need(self.stream_cores, self.measured.stream_bytes + cache + store, store, self._stream_bytes_s)

    def _flink(self) -> Need:
        """Of one TaskManager with its Python workers, as large as a serving host."""
        one, count = self.measured, max(1, math.ceil(self.stream_cores / (self.host_cores * self.use)))
        cores, store = self.stream_cores / count, self.stream_histories_bytes / count
        workers = math.ceil(cores / self.use) * one.flink_worker_bytes
        memory, disk = one.flink_bytes + workers + FLINK_COPIES * store, FLINK_CHECKPOINTS * store
        return Need(cores, memory, disk, self._stream_bytes_s / count, count)

    @property
    def _stream_bytes_s(self) -> float:
        return self.load.clicks_s * self.load.click_bytes + self.log_bytes_s

    def _trainer(self) -> Need:
        network = self.log_bytes_s + self.version_bytes_s
        return Need(self.trainer_cores, self.measured.trainer_bytes + self.table_bytes, 0.0, network)

    def _host(self) -> Need:
        memory = self.measured.applier_bytes + self.host_histories_bytes + self.served_bytes
        return Need(self.applier_cores, memory, 0.0, self.log_bytes_s + self.version_bytes_s, self.hosts)

    def _workers(self) -> Need:
        """Of one host."""
        cores = self.worker_cores / self.hosts
        processes = max(1, math.ceil(cores / self.use))
        network = self.load.answers_s * ANSWER_BYTES[self.load.answer] / self.hosts
        return Need(cores, processes * self.measured.worker_bytes, 0.0, network, self.hosts)

    def _kafka(self) -> Need:
        """Of one broker; each has a copy of everything."""
        load, copies = self.load, self.replication
        written = load.clicks_s * load.click_bytes + self.log_bytes_s
        kept_s = load.retention_h * HOUR_S
        read = load.clicks_s * load.click_bytes + self.log_bytes_s * (2 + self.hosts)
        return Need(
            cores=load.clicks_s * self.measured.broker_us * 1e-6,
            memory_bytes=BROKER_BYTES,
            disk_bytes=written * kept_s,
            network_bytes_s=written + read / copies,
            count=copies,
        )
