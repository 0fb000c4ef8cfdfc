"""The topics that the loop needs, made where they are missing."""

from __future__ import annotations

from collections.abc import Callable

from state.config.settings import Settings
from state.log import Topics, topic_plan


def ensure_topics(settings: Settings, say: Callable[[str], None], local: bool = False) -> str:
    """Makes what is missing, and says which topics the loss of one broker would harm; returns the topics in words.

    Args:
        settings: The loop's settings.
        say: Takes one line for the operator.
        local: Whether the Kafka is the loop's own: its topics keep to their share of `storage.budget_gb` then.

    Raises:
        LogError: Kafka does not answer, or refused.
    """
    kafka = settings.kafka
    wanted = [topic_plan.clicks(settings), topic_plan.dead_letters(settings), topic_plan.microbatches(settings)]
    with Topics(kafka) as topics:
        if settings.segments.expressions:
            wanted.append(topic_plan.segments(settings))
        for one in [*wanted, *topic_plan.attributes(settings)]:
            topics.ensure(*one)
            # The loop's own Kafka is one broker: there is nothing to ask.
            if not local and (weakness := topics.copies(one.name).weakness()):
                say(f"topic {one.name}: {weakness}")
        for name, config in topic_plan.bounds(settings).items() if local else ():
            topics.bound(name, config)
        partitions = topics.describe(kafka.clicks_topic).partitions
    return f"{kafka.clicks_topic} ({partitions} partitions), {kafka.dead_letters_topic}, {kafka.microbatches_topic}"
