"""A shopper of the running loop is erased: a cold start at once, and nowhere on disk, in memory or in a topic."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from deploy.operate.erase import TAKEN_UP_MS
from state import layout
from state.errors import LogError
from state.events.identity import load_salt, user_id
from state.log import Topics, Writer, client_options
from state.microbatch.codec import decode
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from tests.e2e.running import Loop, counting, until
from trainer import compactor

USER = "erased-shopper@example.org"


def told(loop: Loop) -> list[dict[str, Any]]:
    """What still holds something, as the command tells it."""
    found: list[dict[str, Any]] = loop.springtide("erase", "--status")["holding"]
    return found


def holding(loop: Loop) -> list[dict[str, Any]]:
    """What still holds something, but for topics, which go by their retention."""
    return [one for one in told(loop) if not one["where"].startswith("topic ")]


def compacted(loop: Loop) -> bool:
    """Whether only topics hold something after one more run of the compactor; test_runbook.py types its command."""
    compactor.run_after_others(loop.settings)
    return not holding(loop)


def forms_of(loop: Loop) -> list[bytes]:
    """The id, and its pseudonym however it may be written."""
    pseudonym = user_id(load_salt(loop.settings.salt_path, create=False), USER)
    found = [USER.encode(), pseudonym.to_bytes(8, "big"), pseudonym.to_bytes(8, "little")]
    return [*found, b"%016x" % pseudonym, b"%d" % pseudonym]


def having(loop: Loop) -> list[str]:
    """The files in which the id or its pseudonym stands, but for those that go by retention and the erasure's own."""
    forms = forms_of(loop)
    state, found = loop.settings.state_dir, []
    by_retention = {state / layout.KAFKA, loop.settings.registry_dir / layout.RECENT, state / "serving" / layout.ROWS}
    # Histories lie in memory, where a link leads.
    for folder, folders, names in os.walk(state, followlinks=True):
        folders[:] = [name for name in folders if Path(folder, name) not in by_retention]
        for path in (Path(folder, name) for name in names if not name.endswith(".erased")):
            try:
                data = without_holes(path)
            except FileNotFoundError:
                continue
            found += [str(path.relative_to(state))] if any(form in data for form in forms) else []
    return found


def without_holes(path: Path) -> bytes:
    """What a file contains where the disk has blocks for it; a store in memory is sparse."""
    parts, end = list[bytes](), 0
    # There is an error behind the last block.
    with path.open("rb") as file, suppress(OSError):
        while True:
            begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            parts.append(os.pread(file.fileno(), end - begin, begin))
    return b"".join(parts)


def topics_having(loop: Loop) -> list[str]:
    """The topics in whose records, keys, headers or unpacked columns the id or its pseudonym stands."""
    forms, kafka, found = forms_of(loop), loop.settings.kafka, []
    for topic in (kafka.clicks_topic, kafka.microbatches_topic, kafka.dead_letters_topic, "users", "items"):
        records = everything(loop, topic)
        if topic == kafka.microbatches_topic:
            values = [one.value for one in records if is_microbatch(one.value)]
            data = [column.tobytes() for value in values for column in decode(value).columns.values()]
        else:
            assert records or topic in ("users", "items"), f"{topic} is empty"
            data = []
        data += [part for one in records for part in (one.key, one.value, *(value for _, value in one.headers)) if part]
        if any(form in part for form in forms for part in data):
            found.append(topic)
    return found


def is_microbatch(value: bytes | None) -> bool:
    # Another test writes one that is none.
    return value is not None and value != b"hello"


def everything(loop: Loop, topic: str) -> list[Any]:
    """Each record that a client can still read, those of transactions that were given up among them."""
    consumer = KafkaConsumer(**client_options(loop.settings.kafka), isolation_level="read_uncommitted")
    try:
        places = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(places)
        consumer.seek_to_beginning()
        ends = consumer.end_offsets(places)
        found: list[Any] = []

        def at_the_end() -> bool:
            found.extend(one for some in consumer.poll(timeout_ms=100).values() for one in some)
            return all(consumer.position(one) >= ends[one] for one in places)

        until(at_the_end, f"{topic} is not read to its end")
        return found
    finally:
        consumer.close(autocommit=False)


def refused(loop: Loop) -> None:
    """The shopper sends a click that is none; returns when it is a dead letter."""
    kafka = loop.settings.kafka
    with Topics(kafka) as topics:
        before = topics.ends(kafka.dead_letters_topic)
        with Writer(kafka) as writer:
            writer.send(kafka.clicks_topic, 0, USER.encode(), b'{"user": "%b", "item"' % USER.encode())
            writer.flush()
        until(lambda: topics.ends(kafka.dead_letters_topic) != before, "no dead letter")


def forget_before(loop: Loop) -> None:
    """Does at once what retention does in days: what was there at the erasure is deleted, once all of it is read."""
    kafka = loop.settings.kafka
    registry = Registry(loop.settings.registry_dir)
    control = registry.control()
    assert control is not None
    erased = control.erased.entries[-1]
    settled_ms = erased.at_ms + TAKEN_UP_MS
    with Topics(kafka) as topics:
        until(lambda: newest(registry).created_at_ms > settled_ms, "no version is past the erasure")
        learned = topics.offset_before(kafka.microbatches_topic, settled_ms)[0]
        until(lambda: newest(registry).log.next >= learned, "the log is not learned")
        topics.delete_before(kafka.clicks_topic, {partition: after for _, partition, after in erased.until})
        topics.delete_before(kafka.microbatches_topic, {0: learned})
        # What is compacted only is not deleted by offset.
        admin = KafkaAdminClient(**client_options(kafka))
        policy = {"cleanup.policy": "compact,delete"}
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, "users", configs=policy)])
        admin.close()
        until(lambda: emptied(topics, "users"), "the broker does not take up the new policy")


def emptied(topics: Topics, name: str) -> bool:
    """Whether a topic's records are deleted; the broker refuses until it has taken up a new `cleanup.policy`."""
    try:
        topics.delete_before(name, {partition: end for partition, (_, end) in topics.ends(name).items()})
    except LogError as error:
        assert "PolicyViolation" in str(error), error
        return False
    return True


def newest(registry: Registry) -> Manifest:
    return registry.manifest(registry.versions()[-1])


def cold(loop: Loop) -> dict[str, Any] | None:
    answer = loop.profile(USER, item="book")
    return answer if answer and answer["cold_start"] and not answer["attributes"].get("age_band") else None


def test_an_erased_shopper_is_a_cold_start_at_once_and_is_stored_nowhere(loop: Loop, tmp_path: Path) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    loop.know("user", USER, {"age_band": "25-34", "memberLevel": "gold"})
    until(lambda: (loop.profile(USER) or {}).get("attributes", {}).get("age_band"), "the attributes are not known")
    ends = loop.click([(USER, "book", "reading", "purchase")] * 9 + [(USER, "lamp", "light", "favorite")])
    refused(loop)
    assert loop.answer_trained_on(USER, ends, counting("purchase.count_7d", 9))["known"]
    until(lambda: having(loop), "the shopper is nowhere on disk before")
    kafka = loop.settings.kafka
    assert topics_having(loop) == [kafka.clicks_topic, kafka.microbatches_topic, "users"], "the dead letter has it"

    # 1. Erased, by a file that is no part of the loop.
    (tmp_path / "asked.txt").write_text(f"{USER}\n")
    loop.springtide("erase", "--users", str(tmp_path / "asked.txt"), "--reason", "request 71")
    begin_s = time.monotonic()
    answer = until(lambda: cold(loop), "the shopper is still known")
    print(f"a cold start {time.monotonic() - begin_s:.2f} s after the command")
    assert answer["features"]["purchase.count_7d"] == 0

    # 2. Histories, rows, versions and stores let go.
    until(lambda: compacted(loop), "something still holds something")
    until(lambda: not having(loop), lambda: f"it stands in {having(loop)}", 60.0)

    # 3. Topics let go by their retention, and then nothing holds anything.
    topics = {f"topic {name}" for name in (kafka.clicks_topic, kafka.microbatches_topic, "users")}
    # A version that was being published meanwhile is compacted too.
    until(lambda: compacted(loop) and {one["where"] for one in told(loop)} == topics, lambda: f"it is in {told(loop)}")
    forget_before(loop)
    until(lambda: not told(loop), "something holds something again")
    assert topics_having(loop) == []

    # 4. A user who comes back is a new shopper.
    back = loop.answer_trained_on(USER, loop.click([(USER, "tent", "outdoors", "purchase")] * 3))
    until(
        lambda: (loop.profile(USER) or back)["features"]["purchase.count_7d"] == 3, "the clicks of after do not count"
    )
