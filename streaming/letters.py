"""Dead letters: what a refused record leaves in the topic of dead letters, and how it is counted.

Why a record is refused is one of `state.events.dead_letters.Reason`. A letter has
the coordinates and the reason in its headers and nothing else: the record's key
is a user's id, and its value may name the user too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from state.attributes.follower import Report
from state.config.sections import Kafka
from state.events.dead_letters import DeadLetter
from state.log import LogWriter, Writer
from state.metrics import StreamMetrics

Headers = list[tuple[str, bytes]]


def letter_headers(letter: DeadLetter) -> Headers:
    """The coordinates and the reason of a dead letter; never its key, which is a user's id."""
    return [
        ("reason", str(letter.reason).encode()),
        ("topic_id", letter.source.topic_id.encode()),
        ("partition", str(letter.source.partition).encode()),
        ("offset", str(letter.offset).encode()),
    ]


def send_letters(writer: LogWriter, topic: str, letters: Sequence[DeadLetter], at_ms: int | None = None) -> None:
    """Hands letters over to `writer`; they are acknowledged with its flush or transaction.

    Args:
        writer: Of the process.
        topic: The topic of dead letters.
        letters: Refused records.
        at_ms: Their timestamp; None for when they are written.

    Raises:
        LogError: The cluster refused.
    """
    for letter in letters:
        writer.send(topic, 0, None, b"", letter_headers(letter), at_ms)


def count_letters(metrics: StreamMetrics, letters: Sequence[DeadLetter]) -> None:
    """Counts letters by reason."""
    for reason, count in Counter(str(letter.reason) for letter in letters).items():
        metrics.dead_letters.labels(reason).inc(count)


def report_to(kafka: Kafka, metrics: StreamMetrics) -> Report:
    """What becomes of refused records of attributes: letters, acknowledged, and counted.

    Args:
        kafka: How to connect, and the topic of dead letters.
        metrics: Of the stream.
    """

    def report(bad: Sequence[DeadLetter]) -> None:
        with Writer(kafka) as writer:
            send_letters(writer, kafka.dead_letters_topic, bad)
            writer.flush()
        count_letters(metrics, bad)

    return report
