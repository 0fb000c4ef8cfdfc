"""What a backlog teaches: through four partitions at full speed as much as through one, and in large steps as in small.

    python -m tests.bench.catch_up [--only taobao|kuairand|news] [--partitions N] [--stream.cut_rows N ...]

Each log is written into a topic of a real Kafka, in order of time, the user its
key, and the real stream drains it; its micro-batches are learned one by one, as
the trainer takes them. The measure is progressive: each row is scored before
it is learned. Top-1 is of users of whom something is known, AUC of engagement.

The steps are the rows of the one partition, cut anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from deploy.local_kafka import Broker
from evaluation.measures import area_under_curve
from evaluation.run import preprocessing_for
from state.config.loading import load
from state.config.sections import Attributes, Kafka, Paths
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.log import Reader, Topics, partition_of
from state.log.bulk import BulkWriter
from state.microbatch.batch import MicroBatch, in_log_time
from state.microbatch.codec import decode
from state.positions import Range
from state.process.network import free_port
from tests.bench.recorded import (
    SOURCE,
    Recorded,
    kuairand_settings,
    news_clicks,
    read_clicks,
    read_impressions,
)
from tests.bench.report import Figure, Stages, report
from tests.bench.stream import passed, start, stop
from tests.reading import append_encoded
from trainer.engine.step import Trainer
from trainer.model.model import Preprocessing

STEPS = (256, 512, 1024, 2048, 4096)
WITHIN = ">= -0.5"
CHUNK = 5000
FOREVER = {"retention.ms": "-1"}

progress = Stages("catch_up")


def taobao_settings() -> Settings:
    """The default ones."""
    return Settings()


def impressions_settings() -> Settings:
    """Those of KuaiRand, without attributes: the topics of these are read before the first click however it comes."""
    return dataclasses.replace(kuairand_settings(), attributes=Attributes())


LOGS: dict[str, tuple[Callable[[], Settings], Callable[[Settings], Recorded]]] = {
    "taobao": (taobao_settings, lambda _: read_clicks()),
    "kuairand": (impressions_settings, lambda _: read_impressions(kuairand_settings())),
    "news": (taobao_settings, news_clicks),
}


def values(recorded: Recorded, settings: Settings) -> list[bytes]:
    """The events as JSON, with ids as texts."""
    named, events = settings.events, recorded.events
    found = []
    for row, user in enumerate(recorded.users.tolist()):
        fields: dict[str, object] = {
            named.user: str(user),
            named.item: str(events["item"][row]),
            named.category: str(events["category"][row]),
            named.time: int(events["at_ms"][row]),
        }
        if named.action:
            fields[named.action] = named.actions[events["action"][row]]
        if named.label:
            fields[named.label] = float(recorded.label[row])
        fields |= {name: str(recorded.context[row, place]) for place, name in enumerate(named.context)}
        found.append(json.dumps(fields).encode())
    return found


def drained(base: Settings, kafka: Kafka, folder: Path, recorded: Recorded, partitions: int) -> list[MicroBatch]:
    """The micro-batches of a backlog that the stream's process reads through so many partitions."""
    name = f"{folder.name}-{partitions}"
    kafka = dataclasses.replace(
        kafka,
        clicks_topic=f"clicks-{name}", microbatches_topic=f"log-{name}", dead_letters_topic=f"dead-{name}", group=name,
    )  # fmt: skip
    settings = dataclasses.replace(
        base,
        kafka=kafka,
        paths=Paths(state=str(folder / f"state-{partitions}")),
        stream=dataclasses.replace(base.stream, metrics_port=free_port()),
    )
    events, rows = values(recorded, settings), len(recorded.users)
    keys = [str(user).encode() for user in recorded.users.tolist()]
    places = [partition_of(key, partitions) for key in keys]
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, partitions, FOREVER)
    with BulkWriter(kafka, kafka.clicks_topic) as writer:
        for first in range(0, rows, CHUNK):
            part = slice(first, first + CHUNK)
            # A recording has times that no clock would have; what Kafka keeps is no time of theirs.
            stamps = np.maximum(recorded.events["at_ms"][part], 0)
            append_encoded(writer, keys[part], events[part], stamps, places[part])
    process = start(settings)
    while passed(settings) < rows:
        if process.poll() is not None:
            raise SystemExit(f"the stream ended with {process.returncode}")
        threading.Event().wait(0.1)
    stop(process)
    with Topics(kafka) as topics:
        end = topics.ends(kafka.microbatches_topic, committed_only=True)[0][1]
    found = []
    with Reader(kafka, kafka.microbatches_topic, [0]) as reader:
        while reader.position(0) < end:
            found += [in_log_time(decode(value or b"")) for batch in reader.poll(0.2) for value in batch.values]
    return [batch for batch in found if len(batch)]


def recut(batches: Sequence[MicroBatch], rows: int) -> Iterator[MicroBatch]:
    """The rows of one partition in steps of so many."""
    columns = {name: np.concatenate([one.columns[name] for one in batches]) for name in batches[0].columns}
    columns["source"] = np.zeros_like(columns["source"])
    for first in range(0, len(columns["offset"]), rows):
        part = {name: column[first : first + rows] for name, column in columns.items()}
        ranges = (Range(SOURCE, first, first + len(part["offset"]), rows=len(part["offset"])),)
        yield MicroBatch(dataclasses.replace(batches[0].header, ranges=ranges, clocks=(), names={}), **part)


def learned(batches: Iterator[MicroBatch], settings: Settings, preprocessing: Preprocessing) -> dict[str, float]:
    """Top-1 of known users and AUC, in percent, of one pass."""
    trainer = Trainer(settings, FeatureSpec.from_settings(settings), preprocessing)
    done = [trainer.step(batch) for batch in batches]
    pairs = [judged.pairs for one in done for judged in one.judged]
    scores, positive = (np.concatenate([getattr(one, part) for one in pairs]) for part in ("logits", "positive"))
    measures = trainer.measures.evaluation.values()
    return {"top-1": 100 * measures["total.known.top1"], "AUC": 100 * area_under_curve(scores, positive).value}


def disorder_s(batches: Sequence[MicroBatch]) -> float:
    """How long before a row others that happened later have come, s, in the mean."""
    at_ms = np.concatenate([batch.at_ms for batch in batches])
    return float((np.maximum.accumulate(at_ms) - at_ms).mean() / 1000)


def compare(
    name: str, flags: Sequence[str], kafka: Kafka, folder: Path, partitions: int, steps: bool
) -> dict[str, Figure]:
    """The figures of one log."""
    make, read = LOGS[name]
    settings = make()
    chosen = load(flags, env={})
    asked = {one for one in chosen.origins if one.startswith(("stream.", "trainer."))}
    settings = dataclasses.replace(
        settings,
        stream=chosen.stream if any(one.startswith("stream.") for one in asked) else settings.stream,
        trainer=chosen.trainer if any(one.startswith("trainer.") for one in asked) else settings.trainer,
    )
    recorded = read(settings)
    figures: dict[str, Figure] = {}
    progress.say(f"{name}: one partition")
    ordered = drained(settings, kafka, folder / name, recorded, 1)
    preprocessing = preprocessing_for((batch.features for batch in ordered), settings)
    in_order = learned(iter(ordered), settings, preprocessing)
    progress.say(f"{name}: {partitions} partitions")
    spread = drained(settings, kafka, folder / name, recorded, partitions)
    caught_up = learned(iter(spread), settings, preprocessing)
    for measure, value in in_order.items():
        figures[f"{name}, {measure}, one partition"] = Figure(value, "%")
        figures[f"{name}, {measure}, {partitions} partitions, above one"] = Figure(
            caught_up[measure] - value, "points", WITHIN
        )
    figures[f"{name}, mean disorder, one partition"] = Figure(disorder_s(ordered), "s")
    figures[f"{name}, mean disorder, {partitions} partitions"] = Figure(disorder_s(spread), "s")
    if steps:
        found = {}
        for rows in STEPS:
            progress.say(f"{name}: steps of {rows} rows")
            found[rows] = learned(recut(ordered, rows), settings, preprocessing)
        for measure in in_order:
            best = max(one[measure] for one in found.values())
            for rows, one in found.items():
                figures[f"{name}, {measure}, steps of {rows}, above the best"] = Figure(
                    one[measure] - best, "points", WITHIN
                )
    return figures


def main() -> None:
    """Takes and reports the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(LOGS), help="one of the logs")
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--no-steps", action="store_true", help="leave the sizes of steps out")
    asked, flags = parser.parse_known_args()
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory(prefix="springtide-catch-up-") as place:
        folder = Path(place)
        with Broker(folder / "kafka", free_port(), heap_mb=512) as broker:
            kafka = Kafka(bootstrap_servers=broker.bootstrap_servers)
            for name in [asked.only] if asked.only else LOGS:
                figures |= compare(name, flags, kafka, folder, asked.partitions, not asked.no_steps)
    report("catch_up", figures, {"flags": flags, "partitions": asked.partitions})


if __name__ == "__main__":
    main()
