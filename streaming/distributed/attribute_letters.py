"""Dead letters of attributes, told once: each process of a job follows their topics, and one of them tells what was refused.

That is the process that reads the first source. How far it has told
stands in Kafka, as offsets of a group of its own: a process that takes its place
reads the topics from their beginning, and tells on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from state.attributes.follower import Report
from state.config.sections import Kafka
from state.events.dead_letters import DeadLetter
from state.log import Log


def group_of(kafka: Kafka) -> str:
    """The group whose offsets say how far letters were told.

    >>> group_of(Kafka(group="shop"))
    'shop-attribute-letters'
    """
    return f"{kafka.group}-attribute-letters"


def told_once(kafka: Kafka, topic: str, log: Log, report: Report, tells: Callable[[], bool]) -> Report:
    """What becomes of refused records of a topic of attributes.

    Args:
        kafka: Names the group.
        topic: Their topic.
        log: Where the group's offsets are.
        report: Tells letters for good.
        tells: Whether this process is the one that tells.
    """

    def tell(bad: Sequence[DeadLetter]) -> None:
        if not tells():
            return
        with log.topics() as topics:
            told = topics.committed(group_of(kafka), topic)
            new = [one for one in bad if one.offset >= told.get(one.source.partition, 0)]
            if new:
                report(new)
                # Of each partition the last one counts.
                ends = {one.source.partition: one.offset + 1 for one in sorted(new, key=lambda one: one.offset)}
                topics.commit(group_of(kafka), topic, ends)

    return tell
