"""`springtide erase` on a real registry and log: pseudonyms and a place in control, the plain id nowhere, and what still holds something."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from msgspec.structs import replace as changed

from deploy.operate import log_view
from state.config.sections import Kafka
from state.errors import SaltMismatch, SettingsError, UnknownTopic
from state.events.identity import load_salt, user_id
from state.features.erased import EVERYTHING
from state.positions import Source
from state.registry.hosts import ErasureReport, write_erasure_report
from tests.deploy.operating import NOW_MS, RECORDS, ROWS, TOPIC, Operator, draft
from tests.kills import killed_at
from tests.memory_log import MemoryLog

FORMER = Source("0000001f" + "0" * 24, 0)
ATTRIBUTES = ("--attributes.user_topic", "users", "--attributes.user_fields", "city")
PLAIN = "ann@example.org"


@pytest.fixture
def erasing(operator: Operator, tmp_path: Path) -> Iterator[Operator]:
    """An operator of a registry whose users are of the salt here, and who were read from a former topic too."""
    salt = load_salt(tmp_path / "salt")
    learned = draft(6, 5)
    operator.registry.publish(replace(learned, salt=salt.fingerprint, sources=(*learned.sources, (FORMER, 7))), {})
    yield operator


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_control_names_the_pseudonym_up_to_the_ends_of_the_clicks_and_nobody_the_plain_id(
    erasing: Operator, tmp_path: Path
) -> None:
    said = erasing("erase", "--user", PLAIN, "--reason", "request 71")
    control = erasing.registry.control()
    assert control is not None
    (made,) = control.erased
    assert list(made.users) == [user_id(load_salt(tmp_path / "salt"), PLAIN)]
    word = Source(TOPIC, 1).topic
    assert made.until == ((FORMER.topic, 0, EVERYTHING), (word, 0, 0), (word, 1, ROWS * RECORDS))
    assert (control.action, control.reason, control.epoch) == ("erase", "request 71", 1)
    assert "erasure 1 of 1 user;" in said
    assert PLAIN not in said + erasing("history") + erasing("erase", "--status")
    assert PLAIN.encode() not in everything(tmp_path)
    again = json.loads(erasing("erase", "--user", PLAIN, "--reason", "again", "-o", "json"))
    assert (again["erasure"], again["generation"]) == (2, control.generation + 1), "what came since is forgotten, too"


def test_the_users_of_a_file_or_of_a_pipe_are_erased_together(
    erasing: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path.parent / f"{tmp_path.name}.txt"
    listed.write_text("ann\n\nbob\nann\n")
    assert "of 2 users;" in erasing("erase", "--users", str(listed), "--reason", "asked")
    monkeypatch.setattr("sys.stdin", StringIO("eve\n"))
    assert "of 1 user;" in erasing("erase", "--users", "-", "--reason", "asked")


def test_attributes_are_taken_out_first_in_every_partition_and_again_after_a_kill(
    erasing: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MemoryLog()
    for name in ("users", Kafka().clicks_topic, Kafka().microbatches_topic):
        log.topics().ensure(name, 2)
    monkeypatch.setattr(log_view, "open_log", lambda settings: log)
    words = ("erase", "--user", PLAIN, "--reason", "asked", *ATTRIBUTES)
    with killed_at("erase.attributes"):
        erasing(*words)
    control = erasing.registry.control()
    assert control is not None and not control.erased
    assert "removed from users" in erasing(*words)
    with log.reader("users") as reader:
        found = {batch.partition: list(zip(batch.keys, batch.values, strict=True)) for batch in reader.poll(0.0)}
    assert found == {partition: [(PLAIN.encode(), None)] * 2 for partition in (0, 1)}
    assert "plain ids" in erasing("erase", "--status", *ATTRIBUTES)
    # Others' attributes, and what the user has sent since then, are nothing of the erased one.
    with log.writer() as writer:
        writer.send("users", 0, b"bob", b"{}")
        writer.send("users", 1, PLAIN.encode(), b"{}", (), control_at(erasing) + 1)
        writer.flush()
    log.topics().delete_before("users", {0: 2})
    assert "plain ids" in erasing("erase", "--status", *ATTRIBUTES)
    log.topics().delete_before("users", {1: 2})
    assert "plain ids" not in erasing("erase", "--status", *ATTRIBUTES)
    assert "no data of erased users remains" not in erasing("erase", "--status", *ATTRIBUTES), "versions do"
    with log.writer() as writer:
        writer.send("users", 1, PLAIN.encode(), b"{}", (), control_at(erasing) - 1)
        writer.flush()
    assert "plain ids" in erasing("erase", "--status", *ATTRIBUTES), "of before the erasure"


def control_at(operator: Operator) -> int:
    control = operator.registry.control()
    assert control is not None
    return control.erased.entries[-1].at_ms


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--reason", "asked"), "name the users"),
        (("--user", PLAIN), "--reason TEXT is missing"),
        (("--user", " ", "--reason", "asked"), "no user is named"),
        (("--users", "/nowhere", "--reason", "asked"), "not readable"),
    ],
)
def test_what_is_asked_wrongly_is_refused_without_the_id(erasing: Operator, words: tuple[str, ...], match: str) -> None:
    with pytest.raises(SettingsError, match=match) as refused:
        erasing("erase", *words)
    assert PLAIN not in str(refused.value)


def test_nothing_is_changed_where_the_salt_is_another_or_the_clicks_are_not_there(
    operator: Operator, log: MemoryLog, tmp_path: Path
) -> None:
    load_salt(tmp_path / "salt")
    with pytest.raises(SaltMismatch):
        operator("erase", "--user", PLAIN, "--reason", "asked")
    operator.registry.publish(replace(draft(6, 5), salt=load_salt(tmp_path / "salt").fingerprint), {})
    log.topics().delete(Kafka().clicks_topic)
    with pytest.raises(UnknownTopic) as refused:
        operator("erase", "--user", PLAIN, "--reason", "asked")
    assert PLAIN not in str(refused.value)
    control = operator.registry.control()
    assert control is not None and not control.erased


def holding(operator: Operator) -> dict[str, str]:
    told = json.loads(operator("erase", "--status", "-o", "json"))
    return {one["where"]: one["until"] for one in told["holding"]}


def test_status_shows_what_still_holds_something_until_nothing_does(
    erasing: Operator, log: MemoryLog, tmp_path: Path
) -> None:
    assert erasing("erase", "--status") == "no user was erased"
    (tmp_path / "stream-0" / "histories").mkdir(parents=True)
    erasing("erase", "--user", PLAIN, "--reason", "request 71")
    kafka = Kafka()
    found = holding(erasing)
    assert set(found) == {
        "the trainer", "6 kept versions and bases", str(tmp_path / "stream-0"), f"topic {kafka.clicks_topic}",
        f"topic {kafka.microbatches_topic}",
    }  # fmt: skip
    assert "springtide compact" in found["6 kept versions and bases"]
    assert "retention, 20" in found[f"topic {kafka.clicks_topic}"]
    # Each tells that it is done.
    registry = erasing.registry
    told = ErasureReport("stream-0", "h", str(tmp_path / "stream-0"), through=1, pages=0, at_ms=NOW_MS)
    write_erasure_report(registry.path, told)
    write_erasure_report(registry.path, ErasureReport("serving-h", "h", "/srv", through=0, pages=0, at_ms=NOW_MS))
    salt = load_salt(tmp_path / "salt").fingerprint
    registry.publish(replace(draft(7, 6), salt=salt, erased=1, erasures=((1, 60),)), {})
    found = holding(erasing)
    assert "the trainer" not in found
    assert found["stream-0 on h"].startswith("2027-01-15T08:10:00Z") and "/srv" in found["serving-h on h"]
    write_erasure_report(registry.path, changed(told, pages=1))
    write_erasure_report(registry.path, ErasureReport("serving-h", "h", "/srv", through=1, pages=1, at_ms=NOW_MS))
    write_erasure_report(registry.path, ErasureReport("compactor", "h", "r", through=1, pages=1, version=7))
    assert set(holding(erasing)) == {f"topic {kafka.clicks_topic}", f"topic {kafka.microbatches_topic}"}
    topics = log.topics()
    for name in (kafka.clicks_topic, kafka.microbatches_topic):
        topics.delete_before(name, {partition: end for partition, (_, end) in topics.ends(name).items()})
    assert holding(erasing) == {}
    assert "no data of erased users remains" in erasing("erase", "--status")
    bad = registry.path / "bases" / "000000000001.bad"
    bad.mkdir()
    os.utime(bad, (NOW_MS // 1000 - 9, NOW_MS // 1000 - 9))
    assert "you remove it" in holding(erasing)[str(bad)]
    log.topics().delete(kafka.clicks_topic)
    assert "it answers" in holding(erasing)["Kafka"]
