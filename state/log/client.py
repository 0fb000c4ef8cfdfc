"""Connects to Kafka, and translates the errors of its client into ours; the errors of a log, each with advice.

It administers topics: creates and describes them, finds their ends and the positions of groups.
"""

from __future__ import annotations

import logging
import selectors
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from uuid import UUID

import kafka.errors as kafka_errors
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType, OffsetSpec
from kafka.net.compat import KafkaNetClient
from kafka.net.sasl.oauth import AbstractTokenProvider
from kafka.protocol.consumer import IsolationLevel
from kafka.structs import OffsetAndMetadata, TopicPartition

from state.config.sections import Kafka
from state.errors import GapError, LogError, SpringtideError, TruncatedLog, UnknownTopic, UnreachableBroker, first_line
from state.log.records import Copies, TopicInfo
from state.positions import Gap, Source
from state.process.user_code import error_line, load_named

# The client logs each lost connection as a warning or an error. Operators get
# actionable problems as our own errors instead. A program that wants the client's
# messages configures logging.
logging.getLogger("kafka").addHandler(logging.NullHandler())

_UNREACHABLE = (
    kafka_errors.KafkaTimeoutError,
    kafka_errors.KafkaConnectionError,
    kafka_errors.NodeNotReadyError,
    kafka_errors.MetadataEmptyBrokerList,
    kafka_errors.Cancelled,
    OSError,
)
_REFUSED = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
)
_FENCED = (
    kafka_errors.ProducerFencedError,
    kafka_errors.InvalidProducerEpochError,
)
# Only the client's message shows that a transactional request was not answered in time.
_UNANSWERED = "Could not execute transactional request for unknown reasons"


class ClientSelector(selectors.DefaultSelector):
    """The selector of the client's sockets, with a cheap `get_key`.

    The client calls `get_key` for a socket that is not registered with each request. The standard selector then raises
    KeyError with a description of the socket, which takes two system calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """See the base class."""
        key = super().register(fileobj, events, data)
        self._keys[key.fd] = key
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """See the base class."""
        key = super().modify(fileobj, events, data)
        self._keys[key.fd] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """See the base class."""
        key = super().unregister(fileobj)
        self._keys.pop(key.fd, None)
        return key

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        """Returns the key of a registered socket; KeyError if it is not registered."""
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        # A closed socket has no number, and may still be registered.
        return self._keys[number] if number >= 0 else super().get_key(fileobj)


def client_options(settings: Kafka) -> dict[str, Any]:
    """The options of every client: servers, time-outs, SASL and TLS."""
    request_ms = int(settings.request_timeout_s * 1000)
    options: dict[str, Any] = {
        "bootstrap_servers": [server.strip() for server in settings.bootstrap_servers.split(",") if server.strip()],
        "client_id": "springtide",
        "selector": ClientSelector,
        "request_timeout_ms": request_ms,
        "bootstrap_timeout_ms": request_ms,
        "security_protocol": settings.security_protocol,
        # With the default of 30 s, it could take half a minute to notice that a
        # broker is reachable again.
        "reconnect_backoff_ms": 50,
        "reconnect_backoff_max_ms": 1000,
    }
    optional = {
        "sasl_mechanism": settings.sasl_mechanism,
        "sasl_plain_username": settings.sasl_username,
        "sasl_plain_password": settings.sasl_password,
        "sasl_oauth_token_provider": settings.sasl_token_provider and _TokenProvider(settings.sasl_token_provider),
        "ssl_cafile": settings.ssl_cafile,
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "ssl_password": settings.ssl_key_password,
    }
    return options | {name: value for name, value in optional.items() if value}


class _TokenProvider(AbstractTokenProvider):
    """Calls the user's function, `module:name`, for a token whenever a connection needs one."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path, self._ask = path, load_named(path, "kafka.sasl_token_provider")
        self.failure: LogError | None = None

    def token(self) -> str:
        """An access token.

        Raises:
            LogError: The function failed or returned no token. The client retries without reporting it, so `failure` keeps it.
        """
        try:
            token = self._ask()
        # User code may fail in any way.
        except Exception as error:
            failed = f"kafka.sasl_token_provider {self._path} failed: {error_line(error)}"
            self.failure = LogError(failed, "correct the function, or the service that it asks")
            raise self.failure from error
        if not isinstance(token, str) or not token:
            self.failure = LogError(
                f"kafka.sasl_token_provider {self._path} returned no token", "let it return a text that is not empty"
            )
            raise self.failure
        return token


def connect(settings: Kafka, doing: str, make: Callable[..., Any], **options: object) -> Any:
    """Creates a client of kafka-python, with `options` in addition to `client_options`; raises the errors of `translated`.

    If the client cannot connect, its threads and sockets are closed. `doing` is the purpose, as in `translated`.
    """
    begun: list[Any] = []

    def network(**arguments: object) -> Any:
        begun.append(KafkaNetClient(**arguments))
        return begun[-1]

    own_options = client_options(settings)
    provider = own_options.get("sasl_oauth_token_provider")
    with translated(settings, doing):
        try:
            return make(**own_options, **options, kafka_client=network)
        except BaseException:
            # A constructor that raises leaves its thread and sockets open.
            for client in begun:
                client.close()
            if provider is not None and provider.failure is not None:
                raise provider.failure from None
            raise


@contextmanager
def translated(settings: Kafka, doing: str) -> Iterator[None]:
    """Translates exceptions of the Kafka client into one of our errors, with a message of one line.

    Raises:
        UnreachableBroker: No broker answered in time.
        UnknownTopic: The topic or partition does not exist.
        LogError: A newer writer has the same transactional id.
        LogError: Kafka refused for any other reason.
    """
    try:
        yield
    except SpringtideError:
        raise
    except _FENCED as problem:
        raise fenced(doing) from problem
    except kafka_errors.UnknownTopicOrPartitionError as problem:
        raise unknown_topic(settings, doing) from problem
    except _REFUSED as problem:
        raise LogError(
            f"cannot {doing}: {settings.bootstrap_servers} refused us ({first_line(problem)})",
            "check kafka.security_protocol, kafka.sasl_* and the access rights of this user",
        ) from problem
    except _UNREACHABLE as problem:
        raise unreachable(settings, doing, problem) from problem
    except kafka_errors.KafkaError as problem:
        if isinstance(problem.args[-1] if problem.args else None, _FENCED):
            # A send after the fenced one: the client wraps the first error.
            raise fenced(doing) from problem
        if _UNANSWERED in str(problem):
            raise unreachable(settings, doing, problem) from problem
        raise LogError(
            f"cannot {doing} on {settings.bootstrap_servers}: {first_line(problem)}",
            "see the broker's log for the cause",
        ) from problem


def unreachable(settings: Kafka, doing: str, cause: BaseException | str) -> UnreachableBroker:
    """The error for a broker that does not answer, with advice."""
    why = cause if isinstance(cause, str) else first_line(cause)
    return UnreachableBroker(
        f"cannot {doing}: no broker at {settings.bootstrap_servers} answered in time ({why})",
        "check that it runs and that "
        "kafka.bootstrap_servers, kafka.security_protocol, kafka.sasl_* and kafka.ssl_* are right",
    )


def unknown_topic(settings: Kafka, doing: str) -> UnknownTopic:
    """The error for a topic that does not exist; topics are never created implicitly."""
    return UnknownTopic(
        f"cannot {doing}: it does not exist on {settings.bootstrap_servers}",
        "create it, or correct its name in [kafka]",
    )


def unknown_partition(topic: str, partition: int, partitions: int) -> UnknownTopic:
    """The error for a partition that a topic does not have."""
    return UnknownTopic(f"topic {topic} has no partition {partition}, only {partitions}", "name those that it has")


def made_again(topic: str, before: str, now: str) -> UnknownTopic:
    """The error for a topic that was deleted and created again under the same name."""
    return UnknownTopic(
        f"topic {topic} was deleted and created again (id {before} is now {now})",
        "the stored positions belong to the old topic: a restarted stream reads the new clicks from their beginning, and "
        "a trainer learns the new log after `springtide upgrade --from-scratch --reason TEXT`",
    )


def fenced(doing: str) -> LogError:
    """The error for a writer whose transactional id another writer took over."""
    return LogError(
        f"cannot {doing}: another writer took over this transactional id",
        "stop one of the two: one stream reads all partitions",
    )


def require_kept(topic: str, topic_id: str, partition: int, position: int, begin: int, end: int) -> None:
    """Checks that a partition with the positions `[begin, end)` can be read from `position`.

    Raises:
        GapError: Records from our position on were deleted before we read them.
        TruncatedLog: The log was truncated below our position.
    """
    if position < begin:
        raise GapError(
            f"topic {topic} partition {partition}: the stored position is {position}, but the log now begins at {begin}: "
            f"{begin - position} positions were deleted unread",
            "restore them, raise the topic's retention.ms, or accept the loss",
            [Gap(Source(topic_id, partition), position, begin)],
        )
    if position > end:
        raise truncated(topic, topic_id, partition, position, end, end)


def truncated(topic: str, topic_id: str, partition: int, position: int, kept: int, end: int) -> TruncatedLog:
    """The error for a partition that was truncated to `kept`, below our `position`, and may now end at `end`."""
    again = f" and has grown again to {end}" if end > kept else ""
    return TruncatedLog(
        f"topic {topic} partition {partition}: the stored position is {position}, but the log that was read ends at {kept}: the log was "
        f"truncated{again}, so that offsets {kept} to {position - 1} are used twice (a leader without all records was "
        "elected, a broker lost records that were not on disk, the topic was created again, or this is another cluster)",
        "check the brokers (unclean.leader.election.enable=false, min.insync.replicas) and restore the log if you can",
        [Gap(Source(topic_id, partition), kept, position)],
    )


RETRY_S = 0.05

Answer = TypeVar("Answer")


class Topics:
    """Administers topics. Thread-safe; calls wait for each other.

    Raises:
        UnreachableBroker: No broker answered within kafka.request_timeout_s. Every method may raise it.
        LogError: The cluster refused. Every method may raise it.
    """

    def __init__(self, settings: Kafka) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._admin: Any = connect(settings, "connect to Kafka", KafkaAdminClient)

    def ensure(
        self, name: str, partitions: int, config: Mapping[str, str] | None = None, replication: int = 0
    ) -> TopicInfo:
        """Creates the topic if there is none; an existing topic stays unchanged.

        Returns when every partition has a leader.
        """
        wanted = {
            name: {"num_partitions": partitions, "replication_factor": replication or -1, "configs": dict(config or {})}
        }

        def create() -> None:
            with suppress(kafka_errors.TopicAlreadyExistsError):
                self._admin.create_topics(wanted)
            self._admin.wait_for_topics([name], timeout_ms=self._timeout_ms)

        self._call(f"create topic {name}", create)
        return self.describe(name)

    def bound(self, name: str, config: Mapping[str, str]) -> None:
        """Sets the given configuration of a topic; other entries stay unchanged."""
        self.describe(name)
        wanted, doing = ConfigResource(ConfigResourceType.TOPIC, name, dict(config)), f"set what bounds topic {name}"
        answer = self._call(doing, lambda: self._admin.alter_configs([wanted], raise_on_unknown=False))
        if (status := answer["topic"][name]) != "OK":
            raise LogError(f"Kafka does not {doing} ({status})", "let this client alter configurations")

    def describe(self, name: str) -> TopicInfo:
        """The topic's id and number of partitions.

        Raises:
            UnknownTopic: There is no such topic; nothing is created.
        """
        topic = self._described(name)
        return TopicInfo(UUID(str(topic["topic_id"])).hex, len(topic["partitions"]))

    def copies(self, name: str) -> Copies:
        """The topic's replication, and the number of the cluster's brokers."""
        topic = self._described(name)
        wanted = ConfigResource(ConfigResourceType.TOPIC, name, {"min.insync.replicas": None})
        answer = self._call(
            f"describe topic {name}", lambda: self._admin.describe_configs([wanted], config_filter="all")
        )
        brokers = self._call("describe the cluster", self._admin.describe_cluster)["brokers"]
        return Copies(
            min((len(partition["replica_nodes"]) for partition in topic["partitions"]), default=0),
            int(answer["topic"][name]["min.insync.replicas"]["value"]),
            len(brokers),
        )

    def names(self) -> list[str]:
        """All topics that we are allowed to see, sorted."""
        return sorted(self._call("list topics", self._admin.list_topics))

    def ends(self, name: str, committed_only: bool = False) -> dict[int, tuple[int, int]]:
        """Partition -> the first retained position, and that of the next record or of the first open transaction."""
        partitions = self._partitions(name)
        begin = self._offsets(name, dict.fromkeys(partitions, OffsetSpec.EARLIEST))
        end = self._offsets(name, dict.fromkeys(partitions, OffsetSpec.LATEST), committed_only)
        return {partition.partition: (begin[partition], end[partition]) for partition in partitions}

    def offset_before(self, name: str, time_ms: int) -> dict[int, int]:
        """Partition -> the first position whose record's Kafka timestamp is `time_ms` or later.

        If all records are older, it is the end offset, so a reader that starts there sees only new records.
        """
        partitions = self._partitions(name)
        offsets = self._offsets(name, dict.fromkeys(partitions, time_ms))
        end = self._offsets(name, dict.fromkeys(partitions, OffsetSpec.LATEST))
        return {
            partition.partition: offsets[partition] if offsets[partition] >= 0 else end[partition]
            for partition in partitions
        }

    def delete(self, name: str) -> None:
        """Deletes the topic with all its records; returns when it is gone."""
        topic_id = self.describe(name).topic_id
        self._call(f"delete topic {name}", lambda: self._admin.delete_topics([name]))
        deadline = time.monotonic() + self._settings.request_timeout_s
        while time.monotonic() < deadline:
            try:
                if self.describe(name).topic_id != topic_id:
                    return
            except UnknownTopic:
                return
            threading.Event().wait(RETRY_S)
        raise LogError(f"topic {name} was not deleted within {self._settings.request_timeout_s:g} s", "try again")

    def delete_before(self, name: str, positions: Mapping[int, int]) -> None:
        """Deletes records before a position per partition, as retention does."""
        before = {TopicPartition(name, partition): offset for partition, offset in positions.items()}
        self._call(f"delete records of {name}", lambda: self._admin.delete_records(before))

    def grow(self, name: str, partitions: int) -> None:
        """Increases the number of the topic's partitions."""
        self._call(f"grow topic {name}", lambda: self._admin.create_partitions({name: partitions}))
        self._call(f"grow topic {name}", lambda: self._admin.wait_for_topics([name], timeout_ms=self._timeout_ms))

    def commit(self, group: str, name: str, positions: Mapping[int, int]) -> None:
        """Commits positions of a consumer group without members, for lag tools."""
        offsets = {
            TopicPartition(name, partition): OffsetAndMetadata(offset, "", -1)
            for partition, offset in positions.items()
        }

        def commit() -> None:
            for problem in self._admin.alter_group_offsets(group, offsets).values():
                if problem is not kafka_errors.NoError:
                    raise problem()

        self._call(f"commit positions of group {group}", commit)

    def committed(self, group: str, name: str) -> dict[int, int]:
        """The committed positions of a consumer group in a topic; partitions without one are absent."""
        answer = self._call(f"read positions of group {group}", lambda: self._admin.list_group_offsets([group]))
        return {
            partition.partition: position.offset
            for partition, position in answer.get(group, {}).items()
            if partition.topic == name and position.offset >= 0
        }

    def close(self) -> None:
        """Closes the connections."""
        self._admin.close()

    def __enter__(self) -> Topics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _timeout_ms(self) -> int:
        return int(self._settings.request_timeout_s * 1000)

    def _described(self, name: str) -> Any:
        (topic,) = self._call(f"describe topic {name}", lambda: self._admin.describe_topics([name]))
        if topic["error_code"]:
            problem = kafka_errors.for_code(topic["error_code"])
            with translated(self._settings, f"use topic {name}"):
                raise problem(name)
        return topic

    def _partitions(self, name: str) -> list[TopicPartition]:
        return [TopicPartition(name, number) for number in range(self.describe(name).partitions)]

    def _offsets(
        self, name: str, specs: Mapping[TopicPartition, object], committed_only: bool = False
    ) -> dict[TopicPartition, int]:
        level = IsolationLevel.READ_COMMITTED if committed_only else IsolationLevel.READ_UNCOMMITTED
        answer = self._call(f"read ends of {name}", lambda: self._admin.list_partition_offsets(dict(specs), level))
        return {partition: int(offset.offset) for partition, offset in answer.items()}

    def _call(self, doing: str, ask: Callable[[], Answer]) -> Answer:
        """Sends a request, and retries it while the cluster returns a retriable error."""
        deadline = time.monotonic() + self._settings.request_timeout_s
        while True:
            try:
                with self._lock, translated(self._settings, doing):
                    return ask()
            except LogError as problem:
                cause = problem.__cause__
                passing = isinstance(cause, kafka_errors.RetriableError) and not isinstance(problem, UnknownTopic)
                if not passing:
                    raise
                if time.monotonic() + RETRY_S >= deadline:
                    raise unreachable(self._settings, doing, cause or problem) from problem
            threading.Event().wait(RETRY_S)
