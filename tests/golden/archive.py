"""Golden data of a release: what real runs left in their state directories, packed, and with which settings.

An archive `<run>.tar.xz` holds:

    salt                                the secret (of these made-up shoppers) behind users' pseudonyms
    registry/                           versions/, bases/, control/, programs/, specs/, as they were
    stream-0/histories/data.mdb         the stream's histories, compacted; closed in order
    stream-0/attributes/                the stream's attributes, where the run had any
    serving/{rows,histories,attributes,programs}/   the applier's stores
    topics/<topic>.json, <topic>.bin    the records of each topic, see `read_topic`

The topics are `clicks`, `microbatches` (the training log), and `users` and `items` where the run had attributes.
`expected.json` beside it says what a later release must find in it.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from state.config.loading import load
from state.config.settings import Settings, as_text, known_settings, variable
from state.config.sources import RENAMED

HERE = Path(__file__).parent
EXPECTED = "expected.json"
SECTIONS = ("events", "labels", "attributes", "features", "stream", "model", "trainer", "serving", "kafka")
# Where a run was, and how it reached its broker, say nothing about its data.
ELSEWHERE = ("bootstrap_servers", "port", "_port", "device", "host")
SETTINGS_OF_0_1_0 = frozenset((HERE / "0.1.0" / "settings.txt").read_text().split())
"""The names of all settings of that release."""
# Defaults of 0.1.0 that name code which has another place since.
OF_0_1_0 = {"events.decoder": "state.events:decode_json", "model.tower": "trainer.model:build"}

Document = dict[str, Any]


def described(settings: Settings) -> dict[str, str]:
    """All settings that give the data its meaning, defaults too: a later release may have others."""
    return {
        known.name: as_text(settings.value(known.name))
        for known in known_settings()
        if known.name.partition(".")[0] in SECTIONS and not known.secret and not known.name.endswith(ELSEWHERE)
    }


def settings_of(expected: Mapping[str, Any], state: Path) -> Settings:
    """The settings of a golden run, on a state directory of the caller's.

    Maps are small, so that a test's machine need not have 16 GiB of address space for each store.
    """
    env = {
        variable(RENAMED.get(name, name)): value
        for name, value in expected["settings"].items()
        if OF_0_1_0.get(name) != value
    }
    flags = ["--paths.state", str(state), "--trainer.device", "cpu"]
    return load(flags, env, "/dev/null")


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks an archive into `folder`, which is a state directory then."""
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (folder / "salt").chmod(0o600)
    return folder


@dataclass(frozen=True)
class Topic:
    """The records of one topic, in the order of partition and offset.

    Attributes:
        name: As the run called it.
        topic_id: 32 hexadecimal digits; positions and manifests name it.
        ends: Partition -> first and next position.
        records: `partition`, `offset`, `timestamp_ms`, `key`, `headers` and `value` of each.
    """

    name: str
    topic_id: str
    ends: Mapping[int, tuple[int, int]]
    records: Sequence[Mapping[str, Any]]


def write_topic(folder: Path, short: str, topic: Topic) -> None:
    """Writes `<short>.json` and `<short>.bin`; see `read_topic`."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = [
        [
            one["partition"],
            one["offset"],
            one["timestamp_ms"],
            None if one["key"] is None else one["key"].decode("latin-1"),
            [[name, value.decode("latin-1")] for name, value in one["headers"]],
            None if one["value"] is None else len(one["value"]),
        ]
        for one in topic.records
    ]
    document = {
        "topic": topic.name,
        "topic_id": topic.topic_id,
        "ends": {str(partition): list(ends) for partition, ends in topic.ends.items()},
        "columns": ["partition", "offset", "timestamp_ms", "key", "headers", "value_bytes"],
        "records": listed,
    }
    (folder / f"{short}.json").write_text(json.dumps(document, separators=(",", ":")))
    (folder / f"{short}.bin").write_bytes(b"".join(one["value"] or b"" for one in topic.records))


def read_topic(folder: Path, short: str) -> Topic:
    """A topic's records: `.json` lists their places, keys and sizes, `.bin` holds the values one after the other.

    Keys and the values of headers are bytes, written as Latin-1; a size of null is a record without a value.
    """
    document = json.loads((folder / f"{short}.json").read_text())
    values = (folder / f"{short}.bin").read_bytes()
    at, records = 0, []
    for partition, offset, timestamp_ms, key, headers, size in document["records"]:
        value = None if size is None else values[at : at + size]
        at += size or 0
        records.append(
            {
                "partition": partition,
                "offset": offset,
                "timestamp_ms": timestamp_ms,
                "key": None if key is None else key.encode("latin-1"),
                "headers": [(name, text.encode("latin-1")) for name, text in headers],
                "value": value,
            }
        )
    if at != len(values):
        raise ValueError(f"{folder / short}.bin has {len(values)} bytes, its records have {at}")
    ends = {int(partition): (first, after) for partition, (first, after) in document["ends"].items()}
    return Topic(document["topic"], document["topic_id"], ends, records)
