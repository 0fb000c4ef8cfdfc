"""An operator at the command line of a registry with some versions, and of the log that they were learned from."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from deploy import cli
from state.config.sections import Kafka
from state.events.identity import public_id
from state.features.spec import FeatureSpec
from state.microbatch.batch import Header
from state.microbatch.codec import encode
from state.positions import Range, Source
from state.registry.manifest import TOLD_MS, Draft, LogRange
from state.registry.registry import SERVING, TRAINING, Registry
from tests.memory_log import MemoryLog
from tests.microbatches import columns

NOW_MS = 1_800_000_000_000
TOPIC = "0000002a" + "0" * 24
LOG_ID = "cd" * 16
ROWS, RECORDS = 20, 32
USERS = 17
BOT = 99
BAIT = "bait=1"
"""The item of each click of the bot; no other click has an item."""
"""A user who begins in record 18, in every fifth row."""


class Operator:
    """Somebody at the command line of one state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.printed: list[str] = []
        self.became: list[tuple[str, list[str]]] = []

    def __call__(self, *words: str) -> str:
        """Gives a command; returns what it printed."""
        self.printed.clear()
        line = [*words, "--paths.state", str(self.state)]
        cli.run(line, lambda module, flags: self.became.append((module, flags)), NOW_MS, self.printed.append)
        return "\n".join(self.printed)

    @property
    def registry(self) -> Registry:
        return Registry(self.state / "registry")


def begin_ms(record: int) -> int:
    """When the first row of a record happened; five records a minute, and the first version is nine minutes old."""
    return NOW_MS - 600_000 + 12_000 * record


def users_of(record: int) -> list[int]:
    """The users of a record's rows."""
    found = [(ROWS * record + row) % USERS + 1 for row in range(ROWS)]
    return [BOT if record >= 18 and row % 5 == 0 else user for row, user in enumerate(found)]


@functools.cache
def record(number: int) -> bytes:
    """Record `number` of the training log: 20 clicks of partition 1."""
    first = ROWS * number
    made = columns(
        ROWS,
        FeatureSpec(),
        user=np.array(users_of(number), np.uint64),
        item=np.array([public_id(BAIT) if user == BOT else 0 for user in users_of(number)], np.uint64),
        at_ms=begin_ms(number) + 600 * np.arange(ROWS),
        offset=np.arange(first, first + ROWS),
    )
    ranges = (Range(Source(TOPIC, 1), first, first + ROWS, rows=ROWS),)
    return encode(Header("spec", "salt", ranges, created_ms=begin_ms(number) + 12_000), made)


def written(records: int = RECORDS) -> MemoryLog:
    """The log of that many records, each at an even offset with its transaction's marker behind it, and their clicks."""
    ids = iter((TOPIC, LOG_ID, "ef" * 16))
    log, kafka = MemoryLog(ids=lambda: next(ids)), Kafka()
    log.topics().ensure(kafka.clicks_topic, 2)
    log.topics().ensure(kafka.microbatches_topic, 1)
    with log.writer() as writer:
        for _ in range(ROWS * records):
            writer.send(kafka.clicks_topic, 1, None, b"")
    with log.writer("stream") as writer:
        for number in range(records):
            with writer.transaction():
                writer.send(kafka.microbatches_topic, 0, None, record(number))
    return log


def draft(number: int, parent: int | None, epoch: int = 1, records: int | None = None) -> Draft:
    """Version `number`, which has learned `records` records, or five for each version."""
    records = 5 * number if records is None else records
    return Draft(
        kind="base" if parent is None else "delta",
        epoch=epoch,
        parent=parent,
        log=LogRange("microbatches", LOG_ID, 0, max(0, 2 * records - 10), 2 * records),
        sources=((Source(TOPIC, 1), ROWS * records),),
        steps=records,
        rows=ROWS * records,
        created_at_ms=begin_ms(records),
        event_time_ms=begin_ms(records) - 600,
        spec="spec",
        program="program",
        salt="salt",
        metrics={
            "log_loss": 3.0 - number / 10,
            "known.top5": 0.625,
            **({"training_loss": 1.5} if number > 1 else {}),
            "auc": 0.5 if number > 1 else float("nan"),
            TOLD_MS: begin_ms(records) - 600,
        },
    )


def files(users: Collection[int] = ()) -> dict[str, bytes]:
    """The files of a version whose tables have these users."""
    ids = np.array(sorted(users), np.uint64)
    return {
        SERVING: save({"user.ids": ids.view(np.int64)}),
        TRAINING: save({"user.pending_ids": ids[:0].view(np.int64)}),
    }
