"""Where past clicks come from: the topic, from some time before the first row that is wanted up to the cut, or files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from state.config.settings import Settings
from state.errors import LogError, UnknownTopic
from state.log import Log, LogTopics, PartitionBatch
from state.positions import Source
from state.recordings.files import Recording, constants_of, find
from state.trials.past import Past
from streaming.aligned_reader import AlignedReader
from streaming.alignment import Reached
from streaming.sample_source import recorded_batches

POLL_S = 0.5
STALLED_S = 60.0


class ClicksStretch(NamedTuple):
    """The part of the clicks topic that is read.

    Attributes:
        topic_id: The topic's id.
        begins: By partition its first offset.
        ends: By partition the offset behind the last one, at least: what comes after it is learned from the training log.
    """

    topic_id: str
    begins: Mapping[int, int]
    ends: Mapping[int, int]

    @property
    def positions(self) -> int:
        """How many there are."""
        return sum(self.ends[one] - begin for one, begin in self.begins.items())

    def done(self, position: Callable[[int], int]) -> int:
        """How many are read where `position` says where each partition is."""
        return sum(min(position(one), self.ends[one]) - begin for one, begin in self.begins.items())


def stretch_of(settings: Settings, past: Past, topics: LogTopics) -> ClicksStretch:
    """What is to be read: as much before the first row that is wanted as its longest window sees, where the topic has it.

    By the records' timestamps; where those are later than the clicks' own times, as in a replay, there is more of it.

    Raises:
        UnknownTopic: The topic is gone, or was made anew since the cut.
        LogError: Kafka does not answer.
    """
    topic, reach_ms = settings.kafka.clicks_topic, settings.features.windows_s[-1] * 1000
    topic_id = topics.describe(topic).topic_id
    ends: dict[int, int] = {}
    for source, mark in past.sources:
        if source.topic_id == topic_id:
            # Of buckets the one that is ahead: whoever learns leaves out what is not before the cut.
            ends[source.partition] = max(mark, ends.get(source.partition, 0))
    if not ends:
        raise UnknownTopic(
            f"version {past.version} learned nothing of topic {topic} with id {topic_id}: it was made anew since then",
            "stop the trial, and begin another once the live trainer has learned from the new topic; or name files in retrain.files",
        )
    kept, since = topics.ends(topic), topics.offset_before(topic, max(0, past.begin_ms - reach_ms))
    begins = {one: min(max(since[one], kept[one][0]), end) for one, end in ends.items()}
    return ClicksStretch(topic_id, {one: at for one, at in begins.items() if at < ends[one]}, ends)


def of_topic(
    settings: Settings,
    stretch: ClicksStretch,
    log: Log,
    reached: Callable[[Source], Reached],
    reach: Callable[[int], None] = lambda _: None,
    elapsed: Callable[[], float] = time.monotonic,
) -> Iterator[list[PartitionBatch]]:
    """The clicks of a stretch in the order in which they happened, and some behind it.

    Args:
        settings: All settings.
        stretch: Of the topic.
        log: Where it is.
        reached: What time it is where a source was read to, once what was given is known there.
        reach: Told how many positions are read.
        elapsed: Monotonic seconds.

    Raises:
        GapError: Clicks of it were deleted meanwhile.
        LogError: Kafka gives nothing for a minute.
    """
    topic, begins = settings.kafka.clicks_topic, dict(stretch.begins)
    if not begins:
        return
    with log.reader(topic, sorted(begins), begins) as reader:
        aligned = AlignedReader(
            reader, lambda one: reached(Source(stretch.topic_id, one)), settings.stream.max_skew_s, elapsed
        )
        heard_s = elapsed()
        while any(reader.position(one) < stretch.ends[one] for one in begins):
            aligned.begin(settings.stream.cut_rows)
            if batches := aligned.poll(POLL_S):
                heard_s = elapsed()
                yield batches
                reach(stretch.done(reader.position))
            elif elapsed() - heard_s > STALLED_S:
                raise LogError(
                    f"topic {topic} gave nothing for {STALLED_S:.0f} s, {stretch.done(reader.position)} of {stretch.positions} "
                    "positions of the past are read",
                    "look after the broker; the trial begins again by itself",
                )


def recording_of(settings: Settings, past: Past) -> Recording:
    """The files of a past.

    Raises:
        SettingsError: There is no such file, or its name tells no format.
    """
    events = settings.events
    return Recording(find(past.files), events.columns, constants_of(events.constants, events))


def of_files(
    settings: Settings, recording: Recording, say: Callable[[str], None], reach: Callable[[int], None] = lambda _: None
) -> Iterator[list[PartitionBatch]]:
    """The clicks of files, ordered by time.

    Args:
        settings: All settings.
        recording: The files.
        say: Takes a line about strays.
        reach: Told how many rows are read.

    Raises:
        SettingsError: The columns do not fit, or memory does not hold the files.
        UnreadableRecording: A file is cut or damaged.
    """
    done, most = 0, settings.stream.cut_rows
    for batches in recorded_batches(settings.events, recording, "memory", time.time(), say, lambda: most):
        yield batches
        done += sum(map(len, batches))
        reach(done)
