"""Declares every setting: its section, default, unit, bounds and help."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from state.errors import SettingsError
from state.user_shares import UserShares

T = TypeVar("T")


def setting(default: T, unit: str = "", help: str = "", secret: bool = False, **limits: Any) -> T:
    """Declares one setting as a dataclass field.

    Args:
        default: The value used when none is given; its type is the setting's type.
        unit: The unit in words.
        help: One sentence for `springtide config`.
        secret: Whether the value is masked wherever it is shown.
        limits: See `state.config.settings.KnownSetting`.
    """
    metadata = {"unit": unit, "help": help, "secret": secret, **limits}
    declared: Any = field(default=default, repr=not secret, metadata=metadata)
    return declared  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Paths:
    """Paths of files and directories."""

    state: str = setting(
        ".springtide", filled=True, help="Directory of all durable state, relative to the working directory."
    )
    registry: str = setting(
        "",
        help="Directory of the registry, which holds versions and control; empty: `registry` in the state directory.",
    )
    shared_registry: str = setting(
        "",
        help="Object store through which hosts share the registry, as s3://BUCKET/PREFIX, or a directory; empty: the registry is not shared.",
    )
    salt_file: str = setting(
        "", help="File with the secret salt of user pseudonyms; empty: `salt` in the state directory."
    )


@dataclass(frozen=True)
class Kafka:
    """The Kafka cluster and its topics."""

    bootstrap_servers: str = setting("127.0.0.1:9092", help="Bootstrap brokers, as HOST:PORT separated by commas.")
    clicks_topic: str = setting("springtide.clicks.v1", help="Topic of clicks.")
    dead_letters_topic: str = setting(
        "springtide.clicks.v1.dlq", help="Topic of dead letters, the records that are refused."
    )
    microbatches_topic: str = setting("springtide.microbatches.v1", help="Topic of the training log.")
    exposures_topic: str = setting(
        "springtide.exposures.v1", help="Topic of exposures: which users each arm of a rollout has answered."
    )
    group: str = setting(
        "springtide-stream",
        filled=True,
        help="Consumer group that exposes the positions of the stream and the trainer to lag tools.",
    )
    clicks_partitions: int = setting(
        4, least=1, most=65535, help="Number of partitions of the clicks topic when Springtide creates it."
    )
    port: int = setting(9092, least=1, most=65535, help="Port of the local Kafka that `springtide up` starts.")
    security_protocol: str = setting(
        "PLAINTEXT",
        choices=("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"),
        help="Protocol of the connections to the brokers.",
    )
    sasl_mechanism: str = setting(
        "",
        choices=("", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI", "OAUTHBEARER"),
        help="SASL mechanism; empty: none.",
    )
    sasl_username: str = setting("", help="SASL user name.")
    sasl_token_provider: str = setting(
        "",
        help="Function that returns an OAuth access token for OAUTHBEARER, as `module:name`; called for each connection.",
    )
    sasl_password: str = setting(
        "", secret=True, help="SASL password; set its environment variable rather than the file."
    )
    ssl_cafile: str = setting("", help="Trusted CA certificates, PEM; empty: the certificates of the system.")
    ssl_certfile: str = setting("", help="Client certificate, PEM.")
    ssl_keyfile: str = setting("", help="Client key, PEM.")
    ssl_key_password: str = setting("", secret=True, help="Password of the client key.")
    request_timeout_s: float = setting(30.0, "s", least=0.1, most=3600.0, help="Timeout of a request to a broker.")
    replication: int = setting(
        0,
        least=0,
        most=32767,
        help="Replication factor of the topics that Springtide creates; 0: the default of the cluster.",
    )
    min_insync_replicas: int = setting(
        0,
        least=0,
        most=32767,
        help="Minimum in-sync replicas (`min.insync.replicas`) of the topics that Springtide creates; 0: the default of the cluster.",
    )
    retention_h: int = setting(168, "h", least=1, most=876_000, help="Retention of the topics that Springtide creates.")

    def within(self, longest_s: float) -> Kafka:
        """The same cluster, with requests that take at most this long."""
        return replace(self, request_timeout_s=min(longest_s, self.request_timeout_s))


@dataclass(frozen=True)
class Events:
    """How a record of the clicks topic is decoded into an event."""

    decoder: str = setting(
        "state.events.decoding:decode_json", filled=True, help="Decoder of record values, as `module:name`."
    )
    user: str = setting("user", filled=True, help="Field with the user id.")
    item: str = setting("item", help="Field with the item id; empty: none.")
    category: str = setting("category", help="Field with the category id; empty: none.")
    action: str = setting("action", help="Field with the action; empty: all events have the same action.")
    time: str = setting("time", help="Field with the event time; empty: the Kafka timestamp of the record.")
    label: str = setting("", help="Field with an engagement label between 0 and 1; empty: none.")
    request: str = setting(
        "",
        help="Field with an id that an impression and its outcomes share (`[labels]`); empty: they are matched by user and item.",
    )
    context: tuple[str, ...] = setting((), filled=True, help="Context fields, such as device or country.")
    time_unit: str = setting(
        "auto", choices=("auto", "ms", "s", "iso"), help="Format of times; auto detects ms, s and ISO 8601."
    )
    actions: tuple[str, ...] = setting(
        ("view", "favorite", "cart", "purchase"),
        filled=True,
        help="Valid actions; an event with another action is a dead letter.",
    )
    action_weights: tuple[float, ...] = setting(
        (1.0, 1.0, 1.0, 1.0),
        least=0.0,
        help="Weight of each action in the interest loss, in the order of `actions`; unset: 1 for each.",
    )
    outcomes: tuple[str, ...] = setting(
        (),
        help="Fields that are known only after the event. They are refused as context or id because they leak the label.",
    )
    columns: tuple[str, ...] = setting(
        (), help="Column names of replayed CSV files without a header, in order; `-` skips a column."
    )
    constants: tuple[str, ...] = setting(
        (), help="Fields with the same value in every replayed row, as `field=value`, such as `action=view`."
    )
    max_future_s: float = setting(
        300.0,
        "s",
        least=0.0,
        most=315_360_000.0,
        help="Maximum time by which an event may be later than its Kafka timestamp; otherwise it is a dead letter (implausible_time).",
    )
    max_age_s: float = setting(
        2_592_000.0,
        "s",
        above=0.0,
        most=3_153_600_000.0,
        help="Maximum time by which an event may be earlier than its Kafka timestamp; otherwise it is a dead letter (implausible_time). Of a recording, the gap beyond which a few first or last rows are left out as strays; the recording itself may be longer.",
    )


@dataclass(frozen=True)
class LabelSettings:
    """Delayed labels: an impression waits for an outcome, such as a click, that arrives as a separate event."""

    impressions: tuple[str, ...] = setting(
        (),
        help="Actions that wait for their label; empty: none. An impression that carries a label does not wait.",
    )
    outcomes: tuple[str, ...] = setting(
        (),
        help="Actions that label as positive the latest waiting impression with the same user, item and `events.request`.",
    )
    wait_s: float = setting(
        600.0,
        "s",
        least=0.001,
        most=31_536_000.0,
        help="Maximum wait for an outcome in event time, after which the impression is negative.",
    )
    max_waiting: int = setting(
        1_000_000,
        "rows",
        least=1,
        most=1_000_000_000,
        help="Maximum number of waiting impressions in a partition, divided equally over 64 groups of its users. Further impressions are dropped and counted.",
    )


@dataclass(frozen=True)
class Attributes:
    """Attributes of users and items: compacted topics that are joined with every click."""

    user_topic: str = setting("", help="Compacted topic of user attributes, keyed by user id; empty: none.")
    item_topic: str = setting("", help="Compacted topic of item attributes, keyed by item id; empty: none.")
    user_fields: tuple[str, ...] = setting(
        (),
        help="User attributes, as `name`, or as `name=field` for a field of the JSON object. Numbers become bands with `name:log` or with edges, as in `price:10|50|100`.",
    )
    item_fields: tuple[str, ...] = setting((), help="Item attributes, in the same form as `user_fields`.")
    slices: tuple[str, ...] = setting((), help="Attributes whose values are slices with metrics of their own.")
    slice_values: int = setting(
        16,
        "values",
        least=1,
        most=256,
        help="Maximum number of values of each such attribute; later values share one slice.",
    )


@dataclass(frozen=True)
class Features:
    """The windowed features. A change requires `springtide upgrade`."""

    windows_s: tuple[int, ...] = setting(
        (3600, 86400, 604800), "s", least=1, most=315_360_000, help="Windows of the counts, shortest first."
    )
    half_lives_s: tuple[int, ...] = setting(
        (1800, 43200, 259200), "s", least=1, most=315_360_000, help="Half-lives of the decayed counts, shortest first."
    )
    history: int = setting(256, "events", least=16, most=4096, help="Number of events in the history of a user.")
    recent_categories: int = setting(
        24, "categories", least=5, most=256, help="Number of a user's most recent categories that are scored."
    )
    sequence: int = setting(
        0,
        "events",
        least=0,
        most=4096,
        help="Number of a user's latest events in each example, for a custom ranker and for crosses (the items of three); 0: none.",
    )


@dataclass(frozen=True)
class Stream:
    """The Beam job."""

    cut_ms: int = setting(
        80,
        "ms",
        least=1,
        most=60_000,
        help="Maximum time before a micro-batch is written, up to five times as long while an earlier one is written; a tenth of it, but at least 1 s, after the last click if no further one comes; on a distributed runner, the time for which a source collects clicks.",
    )
    cut_rows: int = setting(
        4096,
        "rows",
        least=1,
        most=65536,
        help="Examples at which a micro-batch is written, and maximum number of events that are read at once; a source on a distributed runner collects five times as many.",
    )
    cache_users: int = setting(
        20_000, "users", least=1, most=100_000_000, help="Number of users whose histories are cached in memory."
    )
    metrics_port: int = setting(9101, least=0, most=65535, help="Port of /metrics of the stream.")
    buckets: int = setting(
        16,
        least=1,
        most=64,
        help="Number of user buckets on a distributed runner, a power of two; fixed for the life of a job.",
    )
    sources: int = setting(
        1,
        least=1,
        most=1000,
        help="Number of sources that share the partitions on a distributed runner, at most one per subtask; fixed for the life of a job.",
    )


@dataclass(frozen=True)
class Model:
    """The network."""

    ranker: str = setting(
        "trainer.model.default_ranker:DefaultRanker", filled=True, help="Builder of the ranker, as `module:name`."
    )
    tower: str = setting("trainer.model.tower:build", filled=True, help="Builder of the tower, as `module:name`.")
    preprocessing: str = setting(
        "streaming.preprocessing:preprocessing_fn",
        filled=True,
        help="TensorFlow Transform preprocessing function, as `module:name`.",
    )
    dim: int = setting(32, least=1, most=1024, help="Embedding dimension.")
    hidden: tuple[int, ...] = setting(
        (256, 128), least=1, most=65536, help="Widths of the layers of the tower; the last layer is the profile vector."
    )
    dropout: float = setting(0.0, least=0.0, most=0.99, help="Dropout rate of the first layer during training.")
    popular: int = setting(
        32, "categories", least=1, most=4096, help="Number of popular categories that are scored for every user."
    )
    learning_rate: float = setting(0.02, least=0.0, help="Learning rate of the embedding rows (Adagrad).")
    dense_learning_rate: float = setting(
        0.001,
        least=0.0,
        help="Learning rate of the dense weights (Adam); 20 times as high if `privacy.epsilon` is set.",
    )
    options: tuple[str, ...] = setting(
        (), help="Hyperparameters of a custom ranker, tower or preprocessing function, each as NAME=VALUE."
    )

    @property
    def written(self) -> dict[str, str]:
        """The options by name, as text."""
        return dict(one.split("=", 1) for one in self.options)

    def option(self, name: str, default: Any) -> Any:
        """A hyperparameter of user code, in the type of its default.

        >>> Model(options=("heads=4",)).option("heads", 2), Model().option("rate", 0.5)
        (4, 0.5)

        Raises:
            SettingsError: The value does not have the type of the default.
        """
        written = self.written
        if name not in written:
            return default
        try:
            return (
                {"true": True, "false": False}[written[name]]
                if isinstance(default, bool)
                else type(default)(written[name])
            )
        except (ValueError, KeyError):
            raise SettingsError(
                f"model.options {name}={written[name]} is no {type(default).__name__}, as its default {default!r} is"
            ) from None


@dataclass(frozen=True)
class AskedModel(Model):
    """The section `[model]` for user code; `asked` records each option that the code reads, as effective value and default.

    >>> given = AskedModel.of(Model(options=("buckets=16", "heads=4")), {})
    >>> given.option("buckets", 8), given.option("even", True), given.asked
    (16, True, {'buckets': ['16', '8'], 'even': ['true', 'true']})
    """

    asked: dict[str, list[str]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, settings: Model, asked: dict[str, list[str]]) -> AskedModel:
        """Wraps a section; reads are added to `asked`."""
        return cls(**{one.name: getattr(settings, one.name) for one in fields(Model)}, asked=asked)

    def option(self, name: str, default: Any) -> Any:
        """Like `Model.option`, and records the read."""
        text = str(default).lower() if isinstance(default, bool) else str(default)
        self.asked[name] = [self.written.get(name, text), text]
        return super().option(name, default)


@dataclass(frozen=True)
class TrainerSettings:
    """The trainer."""

    device: str = setting(
        "auto", choices=("auto", "cpu", "gpu"), help="Device for training; auto uses a GPU if there is one."
    )
    threads: int = setting(
        1,
        least=1,
        most=1024,
        help="Number of threads that share a step. With the compiled engine, the result is bit-identical for any number.",
    )
    workers: int = setting(
        1,
        least=1,
        most=64,
        help="Number of processes that train one model together. Each keeps the embedding rows of a part of the users.",
    )
    worker_addresses: tuple[str, ...] = setting(
        (),
        help="Address of each worker as HOST:PORT, this trainer's first; empty: the trainer starts the others on its machine.",
    )
    engine: str = setting(
        "auto",
        choices=("auto", "compiled", "tensorflow"),
        help="Engine that computes a step; auto uses compiled loops for the default ranker on a CPU, and TensorFlow otherwise.",
    )
    rows_per_update: int = setting(
        512,
        "rows",
        least=0,
        most=65536,
        help="Examples of one update, about: a micro-batch is learned in equal updates; 0: in one.",
    )
    item_ranking: str = setting(
        "counts",
        choices=("counts", "engagement"),
        help="What recommendations are ranked by: decayed counts of clicks, which takes some 15 % more of a step; or engagement, "
        "with a bonus for the user's own items.",
    )
    interests: str = setting(
        "counts",
        choices=("counts", "model"),
        help="What interests come from: the model, corrected by decayed counts of the categories clicked next, which takes "
        "10 % more of a step and 0.05 ms of an answer; or the model alone.",
    )
    publish_s: float = setting(
        0.05,
        "s",
        least=0.01,
        most=3600.0,
        help="Least interval between versions, which follow micro-batches; up to ten times as long under load and forty times while learning is late; one version per `registry.durable_s` is durable.",
    )
    base_every_s: float = setting(600.0, "s", least=1.0, help="Interval between bases that the compactor writes.")
    admit_after: int = setting(1, "sightings", least=1, help="Sightings of an id before it gets an embedding row.")
    expire_s: float = setting(
        2_592_000.0, "s", least=1.0, help="Log time without a sighting after which an embedding row expires."
    )
    max_rows: int = setting(
        2_000_000,
        "rows",
        least=16,
        most=2_000_000_000,
        help="Maximum number of embedding rows of a table, and of four times as many crosses; the least used ones are evicted first.",
    )
    metrics_port: int = setting(9102, least=0, most=65535, help="Port of /metrics of the trainer.")


@dataclass(frozen=True)
class GuardSettings:
    """The guard, which holds a bad update before it is published."""

    mode: str = setting(
        "on", choices=("on", "off"), help="Whether the guard compares updates with earlier windows of log time."
    )
    window_s: float = setting(10.0, "s", least=0.1, most=86_400.0, help="Minimum log time of a window.")


@dataclass(frozen=True)
class ChurnSettings:
    """Churn: the probability that a user has no event in the next days."""

    days: float = setting(
        0.0,
        "days",
        least=0.0,
        most=365.0,
        help="Log time without an event after which a user counts as churned, such as 7; 0: churn is neither learned nor answered.",
    )


@dataclass(frozen=True)
class PrivacySettings:
    """Differential privacy of the shared model; `docs/model/privacy.md` describes its guarantees and their limits."""

    epsilon: float = setting(
        0.0,
        least=0.0,
        most=100.0,
        help="Privacy budget: the epsilon of differential privacy for one unit; 0: off, without clipping or noise.",
    )
    delta: float = setting(
        1e-6,
        above=0.0,
        most=0.1,
        help="Delta of differential privacy; choose a value far below 1 / the number of users.",
    )
    clip: float = setting(
        1.0,
        above=0.0,
        most=1e6,
        help="Maximum norm of the gradient that a unit contributes to an update.",
    )
    unit: str = setting(
        "user", choices=("user", "example"), help="Unit of privacy: all examples of a user, or a single one."
    )
    updates: int = setting(
        8,
        least=1,
        most=65_535,
        help="Maximum number of updates of a period, a day of log time, to which a user contributes. Later examples of the user are measured but not learned from. For unit `user` only.",
    )
    periods: int = setting(
        30,
        "periods",
        least=1,
        most=100_000,
        help="Number of periods that the budget covers, after which training is held. Each epoch starts a period; with unit `example`, an epoch is one period.",
    )


@dataclass(frozen=True)
class RegistrySettings:
    """Retention of versions, and the shared registry."""

    durable_s: float = setting(
        10.0,
        "s",
        least=0.01,
        most=3600.0,
        help="Interval between durable versions, to which a rollback is possible. States between them are recomputed from the training log.",
    )
    delta_keep_s: float = setting(
        3600.0,
        "s",
        least=1.0,
        help="Age up to which every durable version is kept; older versions are thinned to one per 10 minutes.",
    )
    base_keep_d: int = setting(7, "d", least=1, help="Age up to which one version per hour is kept.")
    delta_keep_gb: float = setting(
        4.0, "GB", least=0.01, help="Maximum size of all versions together; the oldest are removed first."
    )


@dataclass(frozen=True)
class HistorySettings:
    """Histories of users in the stream and on each host: their limits and snapshots."""

    max_users: int = setting(
        2_000_000,
        "users",
        least=1,
        most=1_000_000_000,
        help="Maximum number of users with a history, in the stream and on each host. The least recently read histories are evicted first, also when the store is nearly full.",
    )

    snapshot_every_s: float = setting(
        120.0,
        "s",
        least=0.0,
        most=86_400.0,
        help="Interval between snapshots of histories in the location of the registry; a new host reads the training log from the newest one. 0: none are written.",
    )


@dataclass(frozen=True)
class ServingSettings:
    """Serving: the REST and gRPC APIs."""

    host: str = setting("127.0.0.1", filled=True, help="Address on which serving listens.")
    port: int = setting(8501, least=0, most=65535, help="Port of the REST API.")
    grpc_port: int = setting(8500, least=0, most=65535, help="Port of the gRPC API; 0: off.")
    workers: int = setting(
        1, least=0, most=256, auto=True, help="Number of worker processes, which share the ports; auto: one per core."
    )
    max_queue_ms: int = setting(
        250,
        "ms",
        least=1,
        most=600_000,
        help="Maximum expected wait in the queue; a request that would wait longer is refused (429).",
    )
    timeout_s: float = setting(
        10.0,
        "s",
        least=0.1,
        most=3600.0,
        help="Timeout for receiving a request (408) and for answering it (504). An experiment in a rollout has a tenth of it; then the live version answers.",
    )
    max_age_s: float = setting(
        0.0,
        "s",
        least=0.0,
        most=31_536_000.0,
        help="Maximum time for which version or histories may be behind before /readyz returns 503; 0: no limit.",
    )
    drain_s: float = setting(
        1.0,
        "s",
        least=0.0,
        most=3600.0,
        help="Time for which a worker that shuts down still accepts connections, after /readyz has reported the shutdown.",
    )
    tokens: str = setting(
        "auto",
        choices=("auto", "on", "off"),
        help="Whether requests need a token; auto: if `host` is not the loopback.",
    )
    tokens_dir: str = setting(
        "", help="Directory with the token files `read` and `operate`; empty: `tokens` in the state directory."
    )
    tls_cert: str = setting(
        "", help="TLS certificate of the REST and gRPC APIs, PEM; empty: no TLS. A changed file is reloaded."
    )
    tls_key: str = setting("", help="Key of the TLS certificate, PEM.")
    clock: str = setting(
        "event",
        choices=("event", "wall"),
        help="Default of `at` in a request: event clock or wall clock.",
    )
    keep_s: float = setting(
        900.0,
        "s",
        least=0.0,
        help="Retention of serving's embedding rows of older durable versions; those of other versions are kept for 10 s.",
    )
    per_category: int = setting(
        0,
        "items",
        least=0,
        most=100,
        help="Maximum number of recommended items of one category, in answers for all categories; 0: no limit.",
    )
    metrics_port: int = setting(9103, least=0, most=65535, help="Port of /metrics of the applier.")
    shares: str = setting(
        "",
        help="Shares of the users that this host holds, 0 to 63, as in 0-15,32; it forwards requests for other users. Empty: all users.",
    )
    advertise: str = setting(
        "",
        help="URL under which other hosts and clients reach this host, http://HOST:PORT; empty: host and port of this section. With `shares`, hosts forward requests to it.",
    )

    @property
    def user_shares(self) -> UserShares:
        """The users that this host holds."""
        return UserShares.parse(self.shares)

    @property
    def processes(self) -> int:
        """How many workers there are."""
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class ExportSettings:
    """SavedModels for TensorFlow Serving."""

    every_s: float = setting(
        0.0, "s", least=0.0, help="Interval between SavedModels that are exported in parallel to training; 0: none."
    )


@dataclass(frozen=True)
class TrialSettings:
    """Experiments: additional trainers with other settings that learn from the same training log as the live one."""

    cores: int = setting(
        1, least=1, most=1024, help="Number of cores that all experiments together may use, at low priority."
    )


@dataclass(frozen=True)
class RetrainSettings:
    """Scheduled retrains: an experiment that learns from past clicks from scratch and is promoted if it is better than the live model."""

    every: str = setting("", help="Interval between scheduled retrains, such as 1d or 12h; empty: off.")
    days: float = setting(
        30.0,
        "days",
        above=0.0,
        most=3650.0,
        help="Log time of past clicks from which a retrain learns; also applies to `springtide experiment start --from clicks`.",
    )
    files: tuple[str, ...] = setting(
        (),
        help="Files or globs of recorded clicks to learn from, as for `springtide replay`; empty: the clicks topic.",
    )
    rows: int = setting(
        100_000,
        "rows",
        least=100,
        help="Number of compared examples after which a retrained model that is not significantly better than the live model is dropped.",
    )
    rollout: str = setting(
        "off",
        choices=("on", "off"),
        help="Whether a better model is promoted only after its rollout (`springtide experiment rollout NAME`) is complete.",
    )


@dataclass(frozen=True)
class StorageSettings:
    """The disk space of all parts together."""

    budget_gb: float = setting(
        10.0,
        "GB",
        least=0.5,
        most=1_000_000.0,
        help="Disk space of all parts: local Kafka 40 %, registry 25 %, stores of the stream 15 %, stores of serving 15 %, logs 5 %. Each part stays within its share and removes its oldest data first.",
    )
    memory_dir: str = setting(
        "/dev/shm",
        help="Directory in memory for data that is overwritten constantly: serving's row store, and histories, which a clean stop saves to disk. If it has too little space, the data is on disk; empty: always on disk.",
    )


@dataclass(frozen=True)
class LogSettings:
    """Logs: each process writes one line per event to standard error, which `springtide up` redirects to files."""

    format: str = setting(
        "text",
        choices=("text", "json"),
        help="Format of a log line: text, or a JSON object with time, part, level, logger, event, message and, if they apply, version, epoch, partition and offset.",
    )


@dataclass(frozen=True)
class MetricsSettings:
    """The addresses of /metrics, of a process itself and of parts on other hosts."""

    host: str = setting(
        "127.0.0.1",
        filled=True,
        help="Address on which stream, trainer, applier, validation, probe and `springtide up` expose /metrics, without a token.",
    )
    hosts: tuple[str, ...] = setting(
        (),
        help="Hosts of parts that run on other machines, as `PART=HOST`, for `springtide status` and the console: stream, trainer, applier, segments. Workers are at serving.host.",
    )


@dataclass(frozen=True)
class Bootstrap:
    """The analysis of the first clicks, for the constants of the preprocessing."""

    min_rows: int = setting(2000, "rows", least=1, help="Number of examples that the analysis waits for.")


@dataclass(frozen=True)
class Validation:
    """Validation: detects anomalies in the training log, and drift from the baseline."""

    window_s: int = setting(
        300,
        "s",
        least=0,
        most=604_800,
        help="Length of a window of log time for statistics; 0: `springtide up` runs no validation.",
    )
    min_rows: int = setting(1000, "rows", least=1, help="Minimum number of examples of a window that is judged.")


@dataclass(frozen=True)
class SegmentSettings:
    """Segments: groups of users that are defined by their profiles and updated with each click."""

    expressions: tuple[str, ...] = setting(
        (),
        help="Segments, each as `name=expression`, such as `sporty=interest['Sport'] > 0.3`; in the file also as keys of [segments]. Empty: `springtide up` maintains no segments.",
    )
    topic: str = setting(
        "springtide.segments.v1", filled=True, help="Compacted topic of memberships, keyed by pseudonym and segment."
    )
    lookalikes: int = setting(
        0,
        "users",
        least=0,
        most=1000,
        help="Number of lookalikes of each segment, the users nearest to its members, for `GET /v1/segments/NAME/lookalikes`; 0: none.",
    )


@dataclass(frozen=True)
class RolloutSettings:
    """Rollouts: an experiment answers a growing share of the users, and is rolled back automatically if it does worse."""

    address: str = setting(
        "",
        help="Address of the experiment's workers, such as http://127.0.0.1:8601. `springtide up` runs them if the address is on its machine. Empty: this host takes part in no rollout.",
    )
    slower_ms: float = setting(
        20.0,
        "ms",
        least=0.0,
        most=60_000.0,
        help="Maximum by which the 99th percentile latency of the experiment may exceed that of the live versions.",
    )


@dataclass(frozen=True)
class Shoppers:
    """The synthetic shoppers of `springtide up` and `springtide replay --synthetic`."""

    users: int = setting(2000, least=1, most=100_000_000, help="Number of shoppers.")
    rate: float = setting(200.0, "events/s", least=0.0, help="Number of events that they generate.")


@dataclass(frozen=True)
class Supervision:
    """`springtide up`, which supervises the parts of a loop."""

    metrics_port: int = setting(
        9104,
        least=1,
        most=65_530,
        help="Port of /metrics of `springtide up`. Probe, validation, the webhook, segments and experiments without `up` use this port + 1 to + 5.",
    )
    prometheus_port: int = setting(
        9090, least=1, most=65535, help="Port of the Prometheus that `springtide up --prometheus` starts."
    )

    @property
    def probe_port(self) -> int:
        """Port of /metrics of the probe."""
        return self.metrics_port + 1

    @property
    def validation_port(self) -> int:
        """Port of /metrics of validation."""
        return self.metrics_port + 2

    @property
    def webhook_port(self) -> int:
        """Port of the webhook."""
        return self.metrics_port + 3

    @property
    def segments_port(self) -> int:
        """Port of /metrics of segments."""
        return self.metrics_port + 4

    @property
    def experiments_port(self) -> int:
        """Port of /metrics of experiments that run without `springtide up`."""
        return self.metrics_port + 5


@dataclass(frozen=True)
class ConsoleSettings:
    """The console, a web page that shows and controls the loop."""

    host: str = setting(
        "127.0.0.1",
        filled=True,
        help="Address on which the console and the webhook listen. Tokens and certificate are those of `[serving]`.",
    )
    port: int = setting(
        8502,
        least=0,
        most=65535,
        help="Port of the console; 0: `springtide up` starts none. Changes require the token `operate`.",
    )


@dataclass(frozen=True)
class ProbeSettings:
    """`springtide probe`, which measures the latency of clicks of probe users through the loop."""

    every_s: float = setting(
        0.0,
        "s",
        least=0.0,
        most=120.0,
        help="Interval between probes of `springtide up` and of `springtide probe --continuously`; 0: `up` sends none.",
    )


@dataclass(frozen=True)
class FlinkSettings:
    """`springtide flink`, a Flink cluster on this machine for a stream with `--runner flink`."""

    rest_port: int = setting(
        8081,
        least=1,
        most=65_500,
        help="Port of the REST interface of the JobManager. The pool of Python workers and the job server use this port + 17 and + 18.",
    )
    task_managers: int = setting(
        1,
        least=1,
        most=64,
        help="Number of TaskManagers, with two slots each; all slots together limit the parallelism.",
    )
    heap_mb: int = setting(
        512,
        "MB",
        least=256,
        most=1_000_000,
        help="Java heap of the JobManager, of each TaskManager and of the job server.",
    )

    @property
    def worker_port(self) -> int:
        """Port of the pool that starts Python workers."""
        return self.rest_port + 17

    @property
    def job_port(self) -> int:
        """Port of the job server, to which the stream submits its job."""
        return self.rest_port + 18
