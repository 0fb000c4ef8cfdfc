"""Declares every setting: its section, default, unit, bounds and help.

`state.config.settings` reads the values; nothing here reads a file or a variable.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from state.errors import SettingsError

T = TypeVar("T")


def setting(
    default: T,
    unit: str = "",
    help: str = "",
    secret: bool = False,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    filled: bool = False,
    choices: tuple[str, ...] = (),
    auto: bool = False,
) -> T:
    """Declares one setting as a dataclass field.

    Args:
        default: The value used when none is given; its type is the setting's type.
        unit: The unit in words, where the name does not carry it.
        help: One sentence for `springtide config`.
        secret: Whether the value is masked wherever it is shown.
        least: The smallest allowed value; for a list, of each element. Likewise for the next three.
        most: The largest allowed value.
        above: An exclusive lower bound.
        filled: Whether an empty text is refused.
        choices: The only allowed values.
        auto: Whether a number may be written `auto`, which means 0.
    """
    metadata = {
        "unit": unit,
        "help": help,
        "secret": secret,
        "least": least,
        "most": most,
        "above": above,
        "filled": filled,
        "choices": choices,
        "auto": auto,
    }
    declared: Any = field(default=default, repr=not secret, metadata=metadata)
    return declared  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Paths:
    """Where files live."""

    state: str = setting(
        ".springtide", filled=True, help="Directory of all durable state; relative to the working directory."
    )
    registry: str = setting("", help="Registry of versions and control; empty: `registry` in the state directory.")
    shared_registry: str = setting(
        "",
        help="Object store in which hosts share the registry, as s3://BUCKET/PREFIX, or a directory; empty: it is this host's alone.",
    )
    salt_file: str = setting(
        "", help="File with the secret salt of user pseudonyms; empty: `salt` in the state directory."
    )
    kafka: str = setting("", help="Data of the local Kafka; empty: `kafka` in the state directory.")


@dataclass(frozen=True)
class Kafka:
    """The Kafka cluster and its topics."""

    bootstrap_servers: str = setting("127.0.0.1:9092", help="Brokers to ask first, HOST:PORT separated by commas.")
    clicks_topic: str = setting("springtide.clicks.v1", help="Topic of the clicks.")
    dead_letters_topic: str = setting("springtide.clicks.v1.dlq", help="Topic of the refused records.")
    microbatches_topic: str = setting("springtide.microbatches.v1", help="Topic of the training log.")
    exposures_topic: str = setting(
        "springtide.exposures.v1", help="Topic of who was answered by which arm of a rollout."
    )
    group: str = setting(
        "springtide-stream",
        filled=True,
        help="Consumer group that shows the stream's and the trainer's positions to lag tools.",
    )
    clicks_partitions: int = setting(
        4, least=1, most=65535, help="Partitions of the clicks topic when it is created here."
    )
    port: int = setting(9092, least=1, most=65535, help="Port of the local Kafka that `springtide up` starts.")
    security_protocol: str = setting(
        "PLAINTEXT", choices=("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"), help="How to talk to the brokers."
    )
    sasl_mechanism: str = setting(
        "",
        choices=("", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI", "OAUTHBEARER"),
        help="SASL mechanism; empty: none.",
    )
    sasl_username: str = setting("", help="SASL user name.")
    sasl_token_provider: str = setting(
        "",
        help="Function that returns an OAuth access token (OAUTHBEARER), as `module:name`; asked at each connection.",
    )
    sasl_password: str = setting("", secret=True, help="SASL password; better given by its variable than in the file.")
    ssl_cafile: str = setting("", help="Certificates to trust, PEM; empty: those of the system.")
    ssl_certfile: str = setting("", help="Client certificate, PEM.")
    ssl_keyfile: str = setting("", help="Client key, PEM.")
    ssl_key_password: str = setting("", secret=True, help="Password of the client key.")
    request_timeout_s: float = setting(
        30.0, "s", least=0.1, most=3600.0, help="How long a request to a broker may take."
    )
    replication: int = setting(
        0, least=0, most=32767, help="Replicas of the topics created here; 0: as many as the cluster's default says."
    )
    min_insync_replicas: int = setting(
        0,
        least=0,
        most=32767,
        help="Replicas that must have a record before it is acknowledged, for topics created here; 0: the cluster's.",
    )
    retention_h: int = setting(168, "h", least=1, most=876_000, help="How long the topics created here keep records.")


@dataclass(frozen=True)
class Events:
    """How a record of the clicks topic becomes an event."""

    decoder: str = setting(
        "state.events.decoding:decode_json", filled=True, help="Decoder of a record's value, as `module:name`."
    )
    user: str = setting("user", filled=True, help="Field with the user's id.")
    item: str = setting("item", help="Field with the item's id; empty: there is none.")
    category: str = setting("category", help="Field with the category's id; empty: there is none.")
    action: str = setting("action", help="Field with the action; empty: every event is the one action there is.")
    time: str = setting("time", help="Field with the event's time; empty: the record's time in Kafka.")
    label: str = setting("", help="Field with an engagement label between 0 and 1; empty: there is none.")
    request: str = setting(
        "",
        help="Field with an id that an impression and its outcomes share (`[labels]`); empty: user and item pair them.",
    )
    context: tuple[str, ...] = setting((), filled=True, help="Fields of context, such as device or country.")
    time_unit: str = setting(
        "auto", choices=("auto", "ms", "s", "iso"), help="How times are written; auto tells ms, s and ISO 8601 apart."
    )
    actions: tuple[str, ...] = setting(
        ("view", "favorite", "cart", "purchase"), filled=True, help="The actions; others are dead letters."
    )
    action_weights: tuple[float, ...] = setting(
        (1.0, 1.0, 1.0, 1.0),
        least=0.0,
        help="Weight of each action in the interest loss, in the order of `actions`; 1 each where it is not set.",
    )
    outcomes: tuple[str, ...] = setting(
        (), help="Fields known only after the event; refused as context or id, for they would leak the label."
    )
    allow_outcomes: tuple[str, ...] = setting((), help="Outcomes that may be used all the same; say why in a comment.")
    columns: tuple[str, ...] = setting(
        (), help="Names of the columns of replayed CSV files without a header, in order; `-` for one not needed."
    )
    constants: tuple[str, ...] = setting(
        (), help="Fields with the same value in every replayed row, as `field=value`, such as `action=view`."
    )
    max_event_bytes: int = setting(
        1_000_000, "bytes", least=16, most=1_000_000_000, help="Larger records are dead letters."
    )
    max_future_s: float = setting(
        300.0,
        "s",
        least=0.0,
        most=315_360_000.0,
        help="How far an event may lie after its Kafka timestamp; a later one is a dead letter (implausible_time).",
    )
    max_age_s: float = setting(
        2_592_000.0,
        "s",
        above=0.0,
        most=3_153_600_000.0,
        help="How far an event may lie before its Kafka timestamp; an older one is a dead letter (implausible_time).",
    )


@dataclass(frozen=True)
class LabelSettings:
    """Labels that arrive later: impressions wait for an outcome, such as a click, as an event of its own."""

    impressions: tuple[str, ...] = setting(
        (),
        help="Actions that wait for their label; empty: no row waits. An impression with a label in it does not wait.",
    )
    outcomes: tuple[str, ...] = setting(
        (),
        help="Actions that label the latest waiting impression of the same user, item and `events.request` positive.",
    )
    wait_s: float = setting(
        600.0,
        "s",
        least=0.001,
        most=31_536_000.0,
        help="Longest wait for an outcome, event time; then the impression is negative.",
    )
    max_waiting: int = setting(
        1_000_000,
        "rows",
        least=1,
        most=1_000_000_000,
        help="Most impressions of a partition that wait, a 64th of them in each 64th of its users; more are dropped and counted.",
    )


@dataclass(frozen=True)
class Attributes:
    """What is known of users and items beside their clicks: compacted topics, joined into every click."""

    user_topic: str = setting("", help="Compacted topic of users' attributes, keyed by the user's id; empty: none.")
    item_topic: str = setting("", help="Compacted topic of items' attributes, keyed by the item's id; empty: none.")
    user_fields: tuple[str, ...] = setting(
        (),
        help="Attributes of users: `name`, or `name=field` of the JSON object; numbers become bands by `name:log` or by "
        "edges, as in `price:10|50|100`.",
    )
    item_fields: tuple[str, ...] = setting((), help="Attributes of items, written likewise.")
    slices: tuple[str, ...] = setting((), help="Names of attributes whose values have measures of their own.")
    slice_values: int = setting(
        16, "values", least=1, most=256, help="Most values of such an attribute; the later ones are measured together."
    )


@dataclass(frozen=True)
class Features:
    """The windowed features; a change is a `springtide upgrade`."""

    windows_s: tuple[int, ...] = setting(
        (3600, 86400, 604800), "s", least=1, most=315_360_000, help="Windows of the counts, shortest first."
    )
    half_lives_s: tuple[int, ...] = setting(
        (1800, 43200, 259200), "s", least=1, most=315_360_000, help="Half-lives of the decayed counts, shortest first."
    )
    history: int = setting(256, "events", least=16, most=4096, help="Events remembered per user.")
    recent_categories: int = setting(
        24, "categories", least=5, most=256, help="Latest categories of a user that are scored."
    )
    sequence: int = setting(
        0,
        "events",
        least=0,
        most=4096,
        help="Latest events of a user that each row carries for a ranker of one's own; 0: none.",
    )


@dataclass(frozen=True)
class Stream:
    """The Beam job."""

    cut_ms: int = setting(100, "ms", least=1, most=60_000, help="Longest wait before a micro-batch is cut.")
    cut_rows: int = setting(2048, "rows", least=1, most=65536, help="Rows at which a micro-batch is cut.")
    max_record_bytes: int = setting(
        900_000, "bytes", least=100_000, most=15_000_000, help="Largest micro-batch record; larger ones are split."
    )
    poll_ms: int = setting(20, "ms", least=1, most=60_000, help="Longest wait for clicks in one poll.")
    batch_events: int = setting(2048, "events", least=1, most=1_000_000, help="Most events of one columnar batch.")
    max_skew_s: float = setting(
        60.0,
        "s",
        least=0,
        most=86_400,
        help="How far a partition may be read ahead of others, by event time, while these are behind.",
    )
    cache_users: int = setting(
        20_000, "users", least=1, most=100_000_000, help="Users whose histories are held in memory."
    )
    map_gb: int = setting(
        16,
        "GiB",
        least=1,
        most=65536,
        help="Upper bound of the histories' size, beside their share of `storage.budget_gb`; address space, not memory.",
    )
    max_users: int = setting(
        2_000_000,
        "users",
        least=1,
        most=1_000_000_000,
        help="Most users with a history; those read longest ago leave first, also where the map is nearly full.",
    )
    metrics_port: int = setting(9101, least=0, most=65535, help="Port of the stream's /metrics.")
    buckets: int = setting(
        16,
        least=1,
        most=64,
        help="On a distributed runner: buckets of users, 1, 2, 4 and so on to 64; fixed for the life of a job.",
    )
    sources: int = setting(
        1,
        least=1,
        most=1000,
        help="On a distributed runner: sources that share the partitions, at most one a subtask; fixed for the life of a job.",
    )
    bundle_ms: int = setting(
        100, "ms", least=1, most=60_000, help="On a distributed runner: how long a source gathers clicks."
    )
    bundle_events: int = setting(
        10_000,
        "events",
        least=1,
        most=1_000_000,
        help="On a distributed runner: most clicks that a source gathers; catching up is then many bundles.",
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
    dim: int = setting(32, least=1, most=1024, help="Width of an embedding row.")
    hidden: tuple[int, ...] = setting(
        (256, 128), least=1, most=65536, help="Widths of the tower's layers; the last is the profile vector."
    )
    dropout: float = setting(0.0, least=0.0, most=0.99, help="Share of the first layer dropped while training.")
    popular: int = setting(32, "categories", least=1, most=4096, help="Popular categories scored for every user.")
    learning_rate: float = setting(0.02, least=0.0, help="Step size of the rows (Adagrad).")
    dense_learning_rate: float = setting(0.001, least=0.0, help="Step size of the dense weights (Adam).")
    initial_accumulator: float = setting(1e-6, least=1e-12, help="First value of Adagrad's accumulators.")
    options: tuple[str, ...] = setting(
        (), help="Hyperparameters of one's own, NAME=VALUE each, for a ranker, tower or preprocessing of one's own."
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
class TrainerSettings:
    """The trainer."""

    device: str = setting(
        "auto", choices=("auto", "cpu", "gpu"), help="Where to train; auto takes a GPU when there is one."
    )
    threads: int = setting(
        1,
        least=1,
        most=1024,
        help="Threads that share a step. With the compiled engine any number gives the same bits.",
    )
    engine: str = setting(
        "auto",
        choices=("auto", "compiled", "tensorflow"),
        help="What computes a step; auto takes compiled loops for the default ranker on a CPU, else TensorFlow.",
    )
    rows_per_update: int = setting(
        384,
        "rows",
        least=0,
        most=65536,
        help="Rows after which all weights and rows move; 0 takes a whole micro-batch.",
    )
    publish_s: float = setting(
        0.2, "s", least=0.01, most=3600.0, help="Time between versions; of each registry.durable_s one is durable."
    )
    base_every_s: float = setting(600.0, "s", least=1.0, help="Time between bases made by the compactor.")
    admit_after: int = setting(1, "sightings", least=1, help="Sightings before an id has a row of its own.")
    admit_crosses_after: int = setting(
        0, "sightings", least=0, help="The same for a cross; 0 takes trainer.admit_after."
    )
    expire_s: float = setting(2_592_000.0, "s", least=1.0, help="Log time without a sighting after which a row goes.")
    max_rows: int = setting(
        2_000_000, "rows", least=16, most=2_000_000_000, help="Rows of a table at most; the least used go first."
    )
    max_crosses: int = setting(8_000_000, "rows", least=64, most=2_000_000_000, help="The same for crosses.")
    capacity: int = setting(65536, "rows", least=16, most=2_000_000_000, help="Rows of a table at the start; it grows.")
    partition: int = setting(0, least=0, help="Partition of the micro-batch topic to learn from.")
    guard_factor: float = setting(
        8.0,
        least=1.0,
        help="How many times the expected loss or gradient is too much, so that an update is skipped; see `trainer/MODEL.md`.",
    )
    guard_patience: int = setting(20, "steps", least=1, help="Skipped updates in a row after which training is held.")
    metrics_port: int = setting(9102, least=0, most=65535, help="Port of the trainer's /metrics.")


@dataclass(frozen=True)
class GuardSettings:
    """The guard, which holds a bad update before anybody is answered by it."""

    mode: str = setting(
        "on", choices=("on", "off"), help="Whether updates are judged by the windows of log time before them."
    )
    window_s: float = setting(10.0, "s", least=0.1, most=86_400.0, help="Log time of a window, at least.")
    window_rows: int = setting(
        1024, "rows", least=16, most=10_000_000, help="Rows from which on a window says something."
    )
    users: int = setting(
        20, least=1, most=1000, help="Users who usually click in a window; with fewer nothing is judged."
    )
    warm_up: int = setting(30, "windows", least=3, most=120, help="Windows before the first judgement.")


@dataclass(frozen=True)
class ChurnSettings:
    """Churn: how probable it is that a user has no event in the next days."""

    days: float = setting(
        0.0,
        "days",
        least=0.0,
        most=365.0,
        help="Log time without an event after which a user has left, 7 for instance; 0: nothing of it is learned or answered.",
    )
    examples: int = setting(
        20_000,
        "rows",
        least=100,
        most=10_000_000,
        help="Rows that wait until it is known at most, 200 bytes each of a durable version; beyond it a share of the users is looked at.",
    )


@dataclass(frozen=True)
class PrivacySettings:
    """Differential privacy of what is learned for others; `trainer/PRIVACY.md` says what it covers and what it does not."""

    epsilon: float = setting(
        0.0,
        least=0.0,
        most=100.0,
        help="The budget: how much what is learned may tell of one unit; 0: as much as it does, without clipping or noise.",
    )
    delta: float = setting(
        1e-6,
        above=0.0,
        most=0.1,
        help="How likely at most `epsilon` does not hold; choose far less than one in the number of users.",
    )
    clip: float = setting(
        1.0,
        above=0.0,
        most=1e6,
        help="The longest gradient, of the sum of its losses, by which a unit counts in an update.",
    )
    learning_rate: float = setting(
        0.02,
        least=0.0,
        help="Step size of the dense weights (Adam) where a budget is set, in place of `model.dense_learning_rate`.",
    )
    unit: str = setting("user", choices=("user", "example"), help="What is hidden: all rows of a user, or any one row.")
    updates: int = setting(
        8,
        least=1,
        most=65_535,
        help="Updates of a period that a user takes part in; later rows of the user are measured, and not learned from. Of unit `user`.",
    )
    period_s: float = setting(86_400.0, "s", least=1.0, help="Log time of a period. Of unit `user`.")
    periods: int = setting(
        30,
        "periods",
        least=1,
        most=100_000,
        help="How long the budget lasts; then training holds. Each epoch begins a period; of unit `example` it is one.",
    )
    key_file: str = setting(
        "",
        help="File with the secret key of the noise; empty: `privacy.key` in the state directory, made at first use.",
    )


@dataclass(frozen=True)
class RegistrySettings:
    """How long versions are kept."""

    durable_s: float = setting(
        10.0,
        "s",
        least=0.01,
        most=3600.0,
        help="Time between versions that one can go back to; what lies between is made again from the training log.",
    )
    recent_s: float = setting(
        15.0, "s", least=1.0, most=3600.0, help="How long the others can be followed; more than 25 s reach the disk."
    )
    delta_keep_s: float = setting(
        3600.0, "s", least=1.0, help="How long each of these is kept; one each `thin_s` later."
    )
    thin_s: float = setting(600.0, "s", least=1.0, help="Time between versions older than `delta_keep_s`.")
    base_keep_h: int = setting(24, "h", least=1, help="How long one each `thin_s` is kept; one each `sparse_s` later.")
    sparse_s: float = setting(3600.0, "s", least=1.0, help="Time between versions older than `base_keep_h`.")
    base_keep_d: int = setting(7, "d", least=1, help="How long one each `sparse_s` is kept.")
    delta_keep_gb: float = setting(
        4.0, "GB", least=0.01, help="How much all versions may take together; the oldest go first."
    )
    load_mb: float = setting(
        64.0,
        "MB",
        least=0.001,
        help="How much may be read beyond a base to load a version, or as much as the base has.",
    )
    garbage_keep_d: int = setting(
        30, "d", least=1, most=36_500, help="How long damaged versions, and what no kept version names, are kept."
    )
    share_s: float = setting(
        0.3,
        "s",
        least=0.05,
        most=5.0,
        help="Time between packs of recent versions that the trainer sends to `paths.shared_registry`.",
    )
    look_ms: int = setting(
        250, "ms", least=10, most=60_000, help="Time between looks of a host at `paths.shared_registry`."
    )


@dataclass(frozen=True)
class ServingSettings:
    """The answers."""

    host: str = setting("127.0.0.1", filled=True, help="Address to listen on.")
    port: int = setting(8501, least=0, most=65535, help="Port of the REST answers.")
    grpc_port: int = setting(8500, least=0, most=65535, help="Port of the gRPC answers; 0: none are given.")
    workers: int = setting(
        1, least=0, most=256, auto=True, help="Worker processes, which share the ports; auto: one for each core."
    )
    max_body_bytes: int = setting(
        1 << 20, "bytes", least=1024, most=1 << 30, help="Largest body of a request; larger ones are refused (413)."
    )
    max_head_bytes: int = setting(
        32_768, "bytes", least=1024, most=1 << 20, help="Longest request line and headers together; 431."
    )
    max_queue_ms: int = setting(
        250,
        "ms",
        least=1,
        most=600_000,
        help="Longest wait that a question is let in for; 429 where it would be longer.",
    )
    timeout_s: float = setting(
        10.0, "s", least=0.1, most=3600.0, help="How long a request may take to arrive (408), and to be answered (504)."
    )
    max_connections: int = setting(
        4096,
        "connections",
        least=1,
        most=1_000_000,
        help="Most connections of one worker, and calls at a time over gRPC; 429 on further ones.",
    )
    max_age_s: float = setting(
        0.0,
        "s",
        least=0.0,
        most=31_536_000.0,
        help="How long version and histories may miss what has come before /readyz is 503; 0: for ever.",
    )
    drain_s: float = setting(
        1.0,
        "s",
        least=0.0,
        most=3600.0,
        help="How long a worker that ends still accepts connections, after /readyz says that it ends.",
    )
    tokens: str = setting(
        "auto",
        choices=("auto", "on", "off"),
        help="Whether requests need a token; auto: where host is not the loopback.",
    )
    tokens_dir: str = setting(
        "", help="Directory with the files of tokens, read and operate; empty: `tokens` in the state directory."
    )
    tls_cert: str = setting(
        "", help="Certificate of REST and gRPC answers, PEM; empty: no TLS. Read again when changed."
    )
    tls_key: str = setting("", help="Key of the certificate, PEM.")
    clock: str = setting(
        "event",
        choices=("event", "wall"),
        help="What `at` means when a request does not say: event clock or wall clock.",
    )
    poll_ms: int = setting(20, "ms", least=1, most=60_000, help="Time between looks at the registry.")
    keep_s: float = setting(
        900.0, "s", least=0.0, help="How long rows of older durable versions stay readable, others 10 s."
    )
    rows_dir: str = setting(
        "",
        help="Directory for the rows that answers read, whatever room it has, best in memory; empty: as `storage.memory_dir` says.",
    )
    map_gb: int = setting(
        16,
        "GiB",
        least=1,
        most=65536,
        help="Upper bound of each serving store's size, beside its share of `storage.budget_gb`; address space, not memory.",
    )
    max_users: int = setting(
        2_000_000,
        "users",
        least=1,
        most=1_000_000_000,
        help="Most users with a history; those read longest ago leave first, also where the map is nearly full.",
    )
    max_items: int = setting(
        1_000_000,
        "items",
        least=1,
        most=1_000_000_000,
        help="Most items whose category is remembered, and most names of categories; those named longest ago leave first.",
    )
    items_keep_d: int = setting(
        90, "d", least=1, most=36_500, help="Log time after which an item or a name that no click named is forgotten."
    )
    parity_every_s: float = setting(
        1.0,
        "s",
        least=0.0,
        most=86_400.0,
        help="Time between two rows of the training log that are computed again from serving's histories and compared; 0: none.",
    )
    metrics_port: int = setting(9103, least=0, most=65535, help="Port of the applier's /metrics.")

    @property
    def processes(self) -> int:
        """How many workers there are.

        >>> ServingSettings(workers=3).processes
        3
        """
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class ExportSettings:
    """SavedModels for TensorFlow Serving."""

    every_s: float = setting(
        0.0, "s", least=0.0, help="Time between two SavedModels that the trainer has written beside it; 0: none."
    )
    directory: str = setting(
        "", help="Where they are written, a directory a version; empty: `exports` in the state directory."
    )
    keep: int = setting(3, "versions", least=1, most=100_000, help="How many of the newest stay.")


@dataclass(frozen=True)
class TrialSettings:
    """Trials: second trainers of other settings on the same training log, beside the live one."""

    cores: int = setting(1, least=1, most=1024, help="Cores that all trials together may use, behind everybody else.")
    registry_gb: float = setting(
        1.0, "GB", least=0.01, help="How much the versions of one trial may take, beside storage.budget_gb."
    )
    alpha: float = setting(
        0.05,
        least=0.0001,
        most=0.5,
        help="Of trials that are as good as the live trainer, how many may be told apart from it at any look.",
    )
    planned_rows: int = setting(
        100_000,
        "rows",
        least=1000,
        help="Paired rows after which the interval of the difference is about as narrow as it can be.",
    )
    metrics_port: int = setting(
        9109, least=0, most=65535, help="Port of the /metrics of trials that run without `springtide up`."
    )


@dataclass(frozen=True)
class RetrainSettings:
    """A model learned anew from past clicks every so often, as a trial beside the live one, which then decides about it."""

    every: str = setting(
        "", help="Time from one to the next, such as 1d or 12h; empty: none is learned anew by itself."
    )
    days: float = setting(
        30.0,
        "days",
        above=0.0,
        most=3650.0,
        help="How far back clicks are learned from, log time; `springtide trial start --from clicks` too.",
    )
    files: tuple[str, ...] = setting(
        (),
        help="Files or globs of recorded clicks to learn from, as `springtide replay` reads them; empty: the clicks topic.",
    )
    rows: int = setting(
        100_000,
        "rows",
        least=100,
        help="Paired rows after which a trial that cannot be told from the live one is dropped.",
    )
    rollout: str = setting(
        "off",
        choices=("on", "off"),
        help="Whether one that is better is promoted only once a rollout of it, `springtide rollout NAME`, is done.",
    )
    limit: str = setting(
        "1d", help="Time from its beginning after which one that nobody could judge is dropped, such as 1d or 12h."
    )


@dataclass(frozen=True)
class StorageSettings:
    """The disk space that all parts together may take."""

    budget_gb: float = setting(
        10.0,
        "GB",
        least=0.5,
        most=1_000_000.0,
        help="Disk space for all together: local Kafka 40 %, registry 25 %, stream's stores 15 %, serving's stores 15 %, "
        "logs 5 %. Each part keeps to its share; the oldest goes first.",
    )
    memory_dir: str = setting(
        "/dev/shm",
        help="Directory in memory for what changes all over all the time: histories, saved on the disk at a clean stop, and "
        "serving's rows. Where it has too little room they lie on the disk; empty: always.",
    )


@dataclass(frozen=True)
class LogSettings:
    """What processes say of themselves, a line an event, on their standard error; `springtide up` keeps it in files."""

    format: str = setting(
        "text",
        choices=("text", "json"),
        help="Form of a line: text, or a JSON object with time, part, level, logger, event, message and, where they apply, "
        "version, epoch, partition and offset.",
    )
    repeats: int = setting(
        20, "lines", least=1, help="Lines of one event in a minute; what was said more often is counted in a line."
    )


@dataclass(frozen=True)
class MetricsSettings:
    """Where processes offer their metrics, and where they find those of others."""

    host: str = setting(
        "127.0.0.1",
        filled=True,
        help="Address on which stream, trainer, applier, validation, probe and `springtide up` offer /metrics, which ask for no "
        "token.",
    )
    hosts: tuple[str, ...] = setting(
        (),
        help="Hosts on which `springtide status` and the console find parts that are not on this machine, `PART=HOST` each: "
        "stream, trainer, applier, segments. Workers are where serving.host says.",
    )


@dataclass(frozen=True)
class Bootstrap:
    """The analysis of the first clicks."""

    sample_rows: int = setting(50_000, "rows", least=1, help="Most rows analysed.")
    min_rows: int = setting(2000, "rows", least=1, help="Rows waited for before the analysis.")
    timeout_s: int = setting(120, "s", least=1, help="How long to wait for them.")
    compression: str = setting(
        "gzip", choices=("gzip", "none"), help="Compression of the files of `springtide bootstrap --examples`."
    )
    shard_rows: int = setting(10_000, "rows", least=1, help="Examples of one such file, about.")


@dataclass(frozen=True)
class Validation:
    """What is looked for in the clicks that are learned from: anomalies, and drift away from the baseline."""

    window_s: int = setting(
        300,
        "s",
        least=0,
        most=604_800,
        help="Length of a window of log time whose statistics are taken; 0: `springtide up` runs no validation.",
    )
    every: int = setting(
        1, "records", least=1, most=10_000, help="Of about so many records of the training log one is looked at."
    )
    min_rows: int = setting(1000, "rows", least=1, help="Rows below which a window is judged by nothing.")
    keep: int = setting(12, "windows", least=2, most=10_000, help="How many of the newest windows' statistics stay.")
    missing_share: float = setting(
        0.1, least=0.0, most=1.0, help="How much more of the rows may lack a value than in the baseline."
    )
    new_values_share: float = setting(
        0.1,
        least=0.0,
        most=1.0,
        help="How much of a categorical feature may be values that the baseline does not know.",
    )
    max_l_infinity: float = setting(
        0.1, least=0.0, most=1.0, help="How far the share of any value of a categorical feature may move."
    )
    max_divergence: float = setting(
        0.1, "bits", least=0.0, most=1.0, help="Jensen-Shannon divergence that a numeric feature may have."
    )
    metrics_port: int = setting(9106, least=0, most=65535, help="Port of the validation's /metrics.")


@dataclass(frozen=True)
class SegmentSettings:
    """Groups of users by what their profiles say, kept while they click."""

    expressions: tuple[str, ...] = setting(
        (),
        help="Segments, each `name=expression`, as in `sporty=interest['Sport'] > 0.3`; in the file also as keys of "
        "[segments]. Without any `springtide up` keeps none.",
    )
    topic: str = setting(
        "springtide.segments.v1", filled=True, help="Compacted topic of memberships, keyed by pseudonym and segment."
    )
    sweep_s: float = setting(
        600.0,
        "s",
        least=1.0,
        help="Within so many seconds each user is looked at again, clicked or not: windows empty by themselves.",
    )
    lookalikes: int = setting(
        0,
        "users",
        least=0,
        most=1000,
        help="Of each segment so many users, those nearest to its members, are listed for `GET /v1/segments/NAME/lookalikes`; "
        "0: none are.",
    )
    lookalikes_every_s: float = setting(
        3600.0,
        "s",
        least=1.0,
        help="After so many seconds they are listed anew: the profiles of all users are made for that.",
    )
    metrics_port: int = setting(9108, least=0, most=65535, help="Port of the /metrics of `springtide segments run`.")


@dataclass(frozen=True)
class RolloutSettings:
    """A trial that answers a growing share of the users, and when it goes back to nobody by itself."""

    address: str = setting(
        "",
        help="Where the workers of the trial answer, such as http://127.0.0.1:8601; `springtide up` runs them at an address of its machine. Empty: this host's workers take part in no rollout.",
    )
    timeout_s: float = setting(
        1.0,
        "s",
        above=0.0,
        most=60.0,
        help="How long the trial may take to answer; then the live version does, and it failed.",
    )
    max_failures: float = setting(
        0.01,
        least=0.0,
        most=1.0,
        help="How much more of its answers the trial may fail to give than the live versions.",
    )
    slower_ms: float = setting(
        20.0, "ms", least=0.0, most=60_000.0, help="How much longer the slowest hundredth of its answers may take."
    )
    equal_within: float = setting(
        0.05, above=0.0, most=1.0, help="A lift whose whole interval is nearer to 0 than this is called equal."
    )
    planned_answers: int = setting(
        20_000,
        "answers",
        least=100,
        most=1_000_000_000,
        help="After how many answers of both arms, the smaller one counting most, intervals are narrowest for what they are.",
    )


@dataclass(frozen=True)
class Shoppers:
    """The synthetic shoppers of `springtide up` and `springtide replay --synthetic`."""

    users: int = setting(2000, least=1, most=100_000_000, help="Shoppers.")
    rate: float = setting(200.0, "events/s", least=0.0, help="Events they make.")
    categories: int = setting(64, least=1, help="Categories they choose from.")
    items: int = setting(4000, least=1, help="Items they choose from.")
    drift_s: float = setting(120.0, "s", least=0.1, help="Time after which a shopper's taste has moved on.")
    seed: int = setting(7, least=0, help="Seed of their choices.")


@dataclass(frozen=True)
class Supervision:
    """`springtide up`, which keeps the parts of a loop alive."""

    metrics_port: int = setting(9104, least=0, most=65535, help="Port of the /metrics of `springtide up`; 0: none.")
    prometheus_port: int = setting(
        9090, least=1, most=65535, help="Port of the Prometheus of `springtide up --prometheus`."
    )
    prometheus_interval_s: float = setting(
        5.0, "s", least=0.1, most=60.0, help="How often that one scrapes, and computes its rules."
    )
    prometheus_mb: int = setting(
        512, "MB", least=64, most=1_000_000, help="How much it keeps, beside storage.budget_gb; the oldest goes first."
    )
    log_mb: int = setting(
        10,
        "MB",
        least=1,
        most=100_000,
        help="How large the log of a part becomes before a new one is begun; less where `storage.budget_gb` asks for it.",
    )
    older_logs: int = setting(1, least=0, most=100, help="Older logs of a part that are kept beside the one it writes.")


@dataclass(frozen=True)
class ConsoleSettings:
    """The page that shows the loop and steers it."""

    host: str = setting(
        "127.0.0.1", filled=True, help="Address to listen on. Tokens and certificate are those of `[serving]`."
    )
    port: int = setting(
        8502,
        least=0,
        most=65535,
        help="Port of the page; 0: `springtide up` starts none. To change anything needs the token `operate`.",
    )


@dataclass(frozen=True)
class ProbeSettings:
    """`springtide probe`: clicks of probe users, whose way through the loop is timed."""

    every_s: float = setting(
        0.0,
        "s",
        least=0.0,
        most=120.0,
        help="Time between two probes of `springtide up` and of `springtide probe --continuously`; 0: `up` sends none.",
    )
    timeout_s: float = setting(30.0, "s", least=0.1, most=3600.0, help="How long the loop has for one of them.")
    url: str = setting("", help="Address of what answers; empty: serving on this host, as `[serving]` says.")
    metrics_port: int = setting(9105, least=0, most=65535, help="Port of the probe's /metrics.")


@dataclass(frozen=True)
class WebhookSettings:
    """`springtide webhook`, by which an alert pins answers."""

    host: str = setting("127.0.0.1", filled=True, help="Address on which Alertmanager reaches it.")
    port: int = setting(9107, least=1, most=65535, help="Its port.")
    before_s: float = setting(
        60.0,
        "s",
        least=0.0,
        most=86_400.0,
        help="How long before an alert began the version must have been made that answers are pinned to.",
    )


@dataclass(frozen=True)
class FlinkSettings:
    """`springtide flink`, a Flink cluster on this machine, and what a stream with `--runner flink` finds there."""

    rest_port: int = setting(8081, least=1, most=65535, help="Port of the JobManager's REST interface.")
    job_port: int = setting(8099, least=1, most=65535, help="Port of the job server, which takes the stream's job.")
    worker_port: int = setting(8098, least=1, most=65535, help="Port of the pool that starts Python workers.")
    task_managers: int = setting(1, least=1, most=64, help="TaskManagers.")
    slots: int = setting(
        2, least=1, most=256, help="Slots of each TaskManager; all of them together bound a job's parallelism."
    )
    heap_mb: int = setting(
        512, "MB", least=256, most=1_000_000, help="Java heap of each of JobManager, TaskManager and job server."
    )
    state_backend: str = setting(
        "hashmap",
        choices=("hashmap", "rocksdb"),
        help="Where a TaskManager keeps the state of its users: hashmap in its heap, rocksdb on the disk, at half the speed.",
    )


SECTIONS: dict[str, type[Any]] = {
    "paths": Paths,
    "kafka": Kafka,
    "events": Events,
    "labels": LabelSettings,
    "attributes": Attributes,
    "features": Features,
    "stream": Stream,
    "model": Model,
    "trainer": TrainerSettings,
    "guard": GuardSettings,
    "churn": ChurnSettings,
    "privacy": PrivacySettings,
    "registry": RegistrySettings,
    "serving": ServingSettings,
    "export": ExportSettings,
    "trials": TrialSettings,
    "retrain": RetrainSettings,
    "storage": StorageSettings,
    "logs": LogSettings,
    "metrics": MetricsSettings,
    "bootstrap": Bootstrap,
    "validation": Validation,
    "segments": SegmentSettings,
    "rollout": RolloutSettings,
    "shoppers": Shoppers,
    "up": Supervision,
    "console": ConsoleSettings,
    "probe": ProbeSettings,
    "webhook": WebhookSettings,
    "flink": FlinkSettings,
}


@dataclass(frozen=True)
class KnownSetting:
    """One setting as declared: dotted name, default, unit, help, secrecy, bounds, choices, `auto`; see `setting`."""

    name: str
    default: Any
    unit: str
    help: str
    secret: bool
    least: float | None
    most: float | None
    above: float | None
    filled: bool
    choices: tuple[str, ...]
    auto: bool


def known_settings() -> Iterator[KnownSetting]:
    """Every setting, in order.

    >>> next(known_settings()).name
    'paths.state'
    """
    for section, kind in SECTIONS.items():
        for declared in dataclasses.fields(kind):
            yield KnownSetting(name=f"{section}.{declared.name}", default=declared.default, **declared.metadata)
