"""Dead letters: what a refused record leaves in the topic of dead letters, and how it is counted.

The reason is one of `state.events.dead_letters.Reason`. A letter has the coordinates and the reason in its headers, and
its key is the refused record's position. It contains neither that record's key, which is a user's id, nor its value.

A letter may occur more than once; readers count distinct keys. The local form writes letters in the transaction of
their rows. So it repeats them only after an unknown outcome, or a crash before the histories are committed. A
distributed job repeats those since the engine's last checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from state.attributes.follower import Report
from state.config.sections import Kafka
from state.events.dead_letters import DeadLetter
from state.log import Writer
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


def letter_key(letter: DeadLetter) -> bytes:
    """The key of a dead letter: the refused record's position. Letters with the same key refer to the same record.

    >>> from state.events.dead_letters import Reason
    >>> from state.positions import Source
    >>> letter_key(DeadLetter(Source("ab" * 2, 3), 17, Reason.UNDECODABLE, b"a user", None))
    b'abab:3:17'
    """
    return f"{letter.source.topic_id}:{letter.source.partition}:{letter.offset}".encode()


def send_letters(writer: Writer, topic: str, letters: Sequence[DeadLetter], at_ms: int | None = None) -> None:
    """Passes letters to `writer`; they are acknowledged with its flush or transaction.

    Args:
        writer: Of the process.
        topic: The topic of dead letters.
        letters: Refused records.
        at_ms: Their timestamp; None for the time of writing.

    Raises:
        LogError: The cluster refused.
    """
    for letter in letters:
        writer.send(topic, 0, letter_key(letter), b"", letter_headers(letter), at_ms)


def count_letters(metrics: StreamMetrics, letters: Sequence[DeadLetter]) -> None:
    """Counts letters by reason."""
    for reason, count in Counter(str(letter.reason) for letter in letters).items():
        metrics.dead_letters.labels(reason).inc(count)


def report_to(kafka: Kafka, metrics: StreamMetrics) -> Report:
    """Returns a function that writes refused records of attributes as dead letters, acknowledged, and counts them.

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
