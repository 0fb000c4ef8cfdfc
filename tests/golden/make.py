"""Makes golden data of this release: real runs over synthetic shoppers, whose state later releases must still read.

    python -m tests.golden.make OUTPUT [--only clicks|joined]

Needs nothing of the machine: it starts a Kafka of its own. Each run:

 1. Topics with the clicks of made-up shoppers (fixed seed, fixed times), two of them no clicks.
 2. The bootstrap, and the stream as a process, stopped and started again half way.
 3. The trainer from nothing: version 1. The run `joined` goes on: version 2, the compactor's base of it, version 3.
 4. The applier; answers are pinned to 2 and follow again; rolled back to 2 with a mask, so that 3 is abandoned.
 5. The trainer again: version 4, of epoch 2. The applier again. What is left of the log nobody has learned yet.
 6. The stores compacted, the topics' records copied, all packed as `<run>-<release>.tar.xz`.
 7. `measures.measure` and `learning.learn_on` over what was unpacked from there: `expected.json`.

Runs differ in topic ids and in how clicks came to lie in micro-batches, which Kafka and the clock decide, and so in
every digest: this is made once for a release, and kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import tempfile
import tomllib
from functools import partial
from pathlib import Path

from deploy.kafka.broker import Broker, free_port
from state.features.mask import Mask
from state.registry.control import follow, pin, roll_back
from state.registry.registry import Registry
from streaming import bootstrap
from tests.golden.archive import (
    EXPECTED,
    HERE,
    Document,
    described,
    read_topic,
    settings_of,
    unpack,
)
from tests.golden.learning import STEPS_FROM_NOTHING, STEPS_ON, learn_on
from tests.golden.measures import measure
from tests.golden.packing import gather, pack
from tests.golden.parts import Training, records_of, serve, stream
from tests.golden.runs import RUNS, clicks_of, fill, send, settings_for
from trainer import compactor, device

RELEASE = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["project"]["version"]
EVERY = 3  # records of a version
SALT = "golden salt of made-up shoppers"
ANSWERED = (*(f"shopper-{number}" for number in (0, 1, 2, 3, 5, 8, 13, 21, 34)), "nobody")
ITEM = "item-03-000"


def poison(registry: Registry, version: int) -> Mask:
    """Some clicks that were trained after `version`, of the partition that it has read furthest."""
    source, after = max(registry.manifest(version).marks.items(), key=lambda mark: mark[1])
    return Mask(offsets=((source.topic, source.partition, after + 5, after + 25),))


def make(run: str, broker: Broker, work: Path, output: Path) -> Document:
    """Makes one run; returns what is expected of it."""
    settings, now_ms = settings_for(run, work / "state", broker), RUNS[run].now_ms
    settings.state_dir.mkdir(parents=True)
    settings.salt_path.write_text(SALT)
    settings.salt_path.chmod(0o600)
    # 1. and 2.
    fill(settings)
    rows = clicks_of(settings, RUNS[run].clicks)
    half = len(rows) // 2
    send(settings, rows[:half])
    bootstrap.run(settings, print, clock=lambda: now_ms / 1000)
    stream(settings, work / "stream.log")
    send(settings, rows[half:])
    stream(settings, work / "stream.log")
    names = {"clicks": settings.kafka.clicks_topic, "microbatches": settings.kafka.microbatches_topic}
    if settings.attributes.user_topic:
        names |= {"users": settings.attributes.user_topic, "items": settings.attributes.item_topic}
    topics = {short: records_of(settings.kafka, name) for short, name in names.items()}
    log = topics["microbatches"]
    print(f"{run}: {len(rows)} records of clicks, {len(log.records)} of the log")
    # 3.
    registry = Registry(settings.registry_dir)
    training = Training(settings, registry, now_ms)
    newest = training.version(0)
    if RUNS[run].learns:
        assert training.version(EVERY) == 2
        compactor.run(settings, clock=lambda: now_ms / 1000)
        assert training.version(EVERY - 1) == 3
        # 4.
        serve(settings, 3, topics, now_ms)
        mask = poison(registry, 2)
        registry.change(partial(pin, version=2, actor="golden", reason="odd answers", now_ms=now_ms))
        registry.change(partial(follow, actor="golden", reason="they were fine", now_ms=now_ms))
        registry.change(partial(roll_back, to=2, mask=mask, actor="golden", reason="poison", now_ms=now_ms))
        registry.change(partial(follow, actor="golden", reason="without it", now_ms=now_ms))
        # 5.
        newest = training.version(EVERY)
        assert newest == 4
    serve(settings, newest, topics, now_ms)
    # 6.
    gather(settings, topics, work / "stage")
    archive = output / f"{run}-{RELEASE}.tar.xz"
    pack(work / "stage", archive)
    # 7.
    state = unpack(archive, work / "unpacked")
    read = settings_of({"settings": described(settings)}, state)
    found = {
        "archive": archive.name,
        "bytes": archive.stat().st_size,
        "settings": described(settings),
        "answers_at_ms": now_ms,
        "item": ITEM,
        **measure(state, read, now_ms, ANSWERED, ITEM),
    }
    registry, log = Registry(state / "registry"), read_topic(state / "topics", "microbatches")
    control = registry.control()
    assert control is not None
    if RUNS[run].learns:
        found["learned on"] = learn_on(training.trainer, registry, log, newest, STEPS_ON, control.mask)
    found["learned from nothing"] = learn_on(training.trainer, registry, log, None, STEPS_FROM_NOTHING, Mask.NONE)
    return found


def main() -> None:
    """Makes the runs and `expected.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", choices=tuple(RUNS))
    asked = parser.parse_args()
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    asked.output.mkdir(parents=True, exist_ok=True)
    place = asked.output / EXPECTED
    # Threads are fixed before the first operation, which the bootstrap's analysis has.
    device.prepare("cpu", threads=1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    document: Document = json.loads(place.read_text()) if place.exists() else {}
    document |= {"release": RELEASE, "commit": commit}
    for run in RUNS if asked.only is None else [asked.only]:
        with tempfile.TemporaryDirectory(prefix="springtide-golden-") as folder:
            work = Path(folder)
            with Broker(work / "kafka", free_port(), heap_mb=320, retention_h=876_000) as broker:
                document.setdefault("runs", {})[run] = make(run, broker, work, asked.output)
    place.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
