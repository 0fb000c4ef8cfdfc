"""One bad record of the training log stops the trainer by name, until an operator leaves it out: for good, counted, and in every replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.watch.accounts import as_text
from state.accounts import TrainerAccount, check_accounts
from state.errors import MicroBatchError, SaltMismatch, SpecMismatch, SpringtideError
from state.layout import GAPS
from state.log import PartitionBatch
from state.log.accepted_gaps import Consent, Journal, parse_records
from state.microbatch.codec import decode, encode
from tests.memory_log import MemoryLog, MemoryReader
from tests.trainer.clicks import microbatch
from tests.trainer.logs import account_in, append, bits_of, learner, run_to_end, started, written
from tests.trainer.test_verify import asked, started_with_spec
from trainer import accounts
from trainer.learner import Learner

RECORDS = [microbatch(number) for number in range(10)]
# The bad record's offset: each record is followed by the marker of its transaction.
BAD = 12


def ann(*offsets: str) -> Consent:
    return Consent(actor="ann", reason="a test wrote it", records=tuple(map(parse_records, offsets)))


def with_header(value: bytes, **changes: str) -> bytes:
    batch = decode(value)
    return encode(replace(batch.header, **changes), batch.columns)  # type: ignore[arg-type]


def digest_of(path: Path, records: Sequence[bytes]) -> str:
    running = learner(started(path), written(records))
    run_to_end(running)
    running.close()
    return bits_of(running)


def left_out(running: Learner) -> tuple[float, float]:
    counted = account_in(running)
    assert check_accounts(trainer=TrainerAccount(**{name: counted.get(name, 0) for name in accounts.NAMES})) == ()
    return counted.get("left_out", 0), running._metrics.records_left_out._value.get()


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (b"hello", MicroBatchError, "a value of 5 bytes is no micro-batch"),
        (with_header(RECORDS[6], spec="ee" * 32), SpecMismatch, "has feature spec eeeeeeeeeeee"),
        (with_header(RECORDS[6], salt="ffff"), SaltMismatch, "has users of salt ffff"),
    ],
    ids=["foreign", "other features", "another salt"],
)
def test_a_stray_record_is_named_left_out_and_changes_nothing(
    tmp_path: Path, value: bytes, error: type[SpringtideError], said: str
) -> None:
    registry, log = started_with_spec(tmp_path / "registry"), written([*RECORDS[:6], value, *RECORDS[6:]])
    running = learner(registry, log)
    with pytest.raises(error) as raised:
        run_to_end(running)
    assert said in str(raised.value) and f"offset {BAD}" in raised.value.what
    assert raised.value.do.endswith(
        f"to continue without this record: springtide train (or up) --skip-record {BAD} --reason TEXT"
    )
    # It stands before the record; the consent for another one does not help.
    assert running.place.next == BAD - 1
    running.close()
    with pytest.raises(error):
        run_to_end(learner(registry, log, consent=ann(str(BAD + 2))))

    running = learner(registry, log, consent=ann(str(BAD)))
    run_to_end(running)
    running.close()
    assert left_out(running) == (1, 1)
    assert bits_of(running) == digest_of(tmp_path / "clean", RECORDS)
    (one,) = Journal(registry.path / GAPS).accepted()
    assert (one.gap.first, one.gap.next, one.actor, one.reason) == (BAD, BAD + 1, "ann", "a test wrote it")
    assert said in one.record

    # Nobody has to accept it again: a restart from before it, and a replay.
    newest = registry.newest(1) or 0
    for version in [each for each in registry.versions() if registry.manifest(each).log.next > BAD]:
        registry.remove("delta", version)
    again = learner(registry, log)
    assert again.place.next <= BAD
    run_to_end(again)
    again.close()
    assert left_out(again) == (1, 1)
    assert bits_of(again) == bits_of(running)
    found = asked(registry, log, registry.newest(1) or 0)
    assert newest and found.outcome == "equal", found.text()


def test_a_damaged_record_of_ours_is_left_out_and_its_clicks_are_counted_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = MemoryReader.poll

    def damaged(reader: MemoryReader, timeout_s: float, records: int) -> list[PartitionBatch]:
        """As a reader of Kafka tells of a record batch whose checksum is wrong."""
        found = read(reader, timeout_s, records)
        for number, batch in enumerate(found):
            if batch.first <= BAD < batch.next:
                kept = batch.offsets != BAD
                values = [value for value, keep in zip(batch.values, kept, strict=True) if keep]
                corrupt = ((BAD, BAD + 1, "its checksum is wrong"),)
                found[number] = replace(batch, offsets=batch.offsets[kept], values=values, corrupt=corrupt)
        return found

    monkeypatch.setattr(MemoryReader, "poll", damaged)
    registry, log = started_with_spec(tmp_path), written(RECORDS)
    running = learner(registry, log)
    with pytest.raises(MicroBatchError, match=rf":0 offset {BAD} cannot be read: its checksum is wrong.*--skip-record"):
        run_to_end(running)
    assert running.place.next == BAD - 1, "all before it is learned; a marker lies between"
    running.close()
    running = learner(registry, log, consent=ann("0-99"))
    run_to_end(running)
    running.close()
    assert left_out(running) == (1, 1)
    # Both partitions' twenty positions of the record are in no other.
    assert account_in(running)["gap"] == 40
    found = asked(registry, log, registry.newest(1) or 0)
    assert found.outcome == "equal", found.text()


def test_consent_for_a_range_leaves_good_records_in(tmp_path: Path) -> None:
    log: MemoryLog = written([*RECORDS[:6], b"one", *RECORDS[6:8], b"two"])
    append(log, RECORDS[8:])
    running = learner(started(tmp_path / "registry"), log, consent=ann(f"{BAD - 4}-99"))
    run_to_end(running)
    running.close()
    assert left_out(running) == (2, 2)
    assert bits_of(running) == digest_of(tmp_path / "clean", RECORDS)


def test_status_says_how_many_were_left_out() -> None:
    trainer = dict.fromkeys(("rows", "trained", "skipped", "duplicate", "masked", "in_flight"), 0)
    found = {"trainer": {**trainer, "records_left_out": 2}, "faults": [], "notes": []}
    assert "2 records of the training log left out, as accepted" in as_text(found)
