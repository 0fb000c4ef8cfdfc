"""What is measured of golden data: everything that `expected.json` says of it but what is learned further."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from deploy.serving.answers.host import Host
from springtide_client.answers import Profile
from state.config.settings import Settings
from state.events.identity import load_salt
from state.history.store import HistoryStore
from state.layout import HISTORIES, ROWS
from state.microbatch.batch import WRITTEN
from state.microbatch.codec import decode
from state.registry.registry import Registry
from state.rows.store import RowStore
from state.rows.tables import TABLES
from tests.golden.archive import Document, Topic, read_topic
from trainer.versions import checkpoint, content

MAP_BYTES = 1 << 30


def measure(state: Path, settings: Settings, answers_at_ms: int, users: Sequence[str], item: str) -> Document:
    """Everything that `expected.json` says of a run and a later release must find, but for what it learns further.

    Args:
        state: The state directory; its stores are closed.
        settings: Those of the run.
        answers_at_ms: The time answers speak of, and the wall clock.
        users: Whose answers.
        item: Whose engagement they are asked for.
    """
    registry = Registry(state / "registry")
    topics = {path.stem: read_topic(path.parent, path.stem) for path in sorted((state / "topics").glob("*.json"))}
    return {
        "registry": registry_of(registry),
        "topics": {name: topic_of(topic, name == "microbatches") for name, topic in topics.items()},
        "stream": histories_of(state / "stream-0" / HISTORIES, settings),
        "serving": {**histories_of(state / "serving" / HISTORIES, settings), **rows_of(state / "serving" / ROWS)},
        "answers": answers_of(settings, answers_at_ms, users, item),
    }


def registry_of(registry: Registry) -> Document:
    """Each version's place and the digest of its merged state; control; programs and specs."""
    versions = {}
    for version in registry.versions():
        found = registry.manifest(version)
        base, deltas = registry.chain(version)
        merged = content.merge(checkpoint.tensors_of(registry, part) for part in (base, *deltas))
        versions[str(version)] = {
            "kind": found.kind,
            "epoch": found.epoch,
            "parent": found.parent,
            "visible": [list(part) for part in found.visible],
            "steps": found.steps,
            "rows": found.rows,
            "mask_generation": found.mask_generation,
            "log": [found.log.topic_id, found.log.partition, found.log.first, found.log.next],
            "marks": {str(source): after for source, after in sorted(found.marks.items())},
            "chain": [base.version, *(part.version for part in deltas)],
            "table_rows": {name: len(merged[f"{name}.ids"]) for name in TABLES if f"{name}.ids" in merged},
            "digest": content.digest(merged),
        }
    bases = {
        str(version): content.digest(checkpoint.tensors_of(registry, registry.manifest(version, "base")))
        for version in registry.bases()
    }
    controls = [
        {
            "generation": one.generation,
            "action": one.action,
            "epoch": one.epoch,
            "base": one.base,
            "serving": [one.serving.mode, one.serving.version],
            "mask": one.mask.to_json(),
        }
        for one in registry.controls()
    ]
    newest = registry.manifest(registry.versions()[-1])
    about = registry.specs.spec(newest.spec)
    registry.specs.transform(newest.spec)
    return {
        "versions": versions,
        "bases": bases,
        "controls": controls,
        "newest": newest.version,
        "spec": newest.spec,
        "program": newest.program,
        "program_bytes": len(registry.specs.program(newest.program)),
        "popular": about["popular"],
        "salt": about["salt"],
        "environment": newest.environment,
    }


def topic_of(topic: Topic, decoded: bool) -> Document:
    """Where a topic's records are, and a digest over them; of the training log also its rows."""
    sha = hashlib.sha256()
    for one in topic.records:
        sha.update(f"{one['partition']} {one['offset']} {one['timestamp_ms']} ".encode() + (one["value"] or b""))
    found: Document = {
        "topic_id": topic.topic_id,
        "ends": {str(partition): list(ends) for partition, ends in topic.ends.items()},
        "records": len(topic.records),
        "sha256": sha.hexdigest(),
    }
    if decoded:
        columns, rows, kinds = hashlib.sha256(), 0, np.zeros(16, np.int64)
        for one in topic.records:
            batch = decode(one["value"])
            rows += len(batch)
            kinds += np.bincount(batch.kind, minlength=16)
            for name, column in sorted((WRITTEN.get(name, name), column) for name, column in batch.columns.items()):
                columns.update(f"{name} {column.dtype.str} {column.shape} ".encode() + column.tobytes())
        found |= {
            "rows": rows,
            "rows_by_kind": np.trim_zeros(kinds, "b").tolist(),
            "columns_sha256": columns.hexdigest(),
        }
    return found


def histories_of(path: Path, settings: Settings) -> Document:
    """What a store of histories holds, by its own reading and byte for byte."""
    store = HistoryStore(path, settings.features.history, MAP_BYTES, readonly=True)
    counts, waiting = store.cut()
    found = {
        "users": store.users(),
        "digest": store.digest(),
        "sources": {str(source): count for source, count in sorted(counts.items())},
        "next": {str(source): after for source, after in sorted(store.positions().items())},
        "waiting": waiting,
        "waiting_sha256": hashlib.sha256(b"".join(key + value for key, value in store.waiting())).hexdigest(),
    }
    store.close()
    with contextlib.closing(lmdb.open(str(path), readonly=True, lock=False, max_dbs=3)) as env:
        chunks = env.open_db(b"chunks", create=False)
        with env.begin(db=chunks) as transaction:
            sha, events = hashlib.sha256(), 0
            for key, value in transaction.cursor():
                sha.update(key + value)
                events += len(value) // 40
    # LMDB is in the order of its keys: the same content gives the same digest.
    return found | {"events": events, "chunks_sha256": sha.hexdigest()}


def rows_of(path: Path) -> Document:
    """What answers read at the served version: rows by table, dense weights, popular labels."""
    store = RowStore(path, MAP_BYTES, readonly=True)
    with store.reader() as reader:
        served = reader.served()
        assert served is not None
        dense = reader.dense(served.version)
        sha = hashlib.sha256()
        for name, weight in sorted(dense.items()):
            sha.update(f"{name} {weight.dtype.str} {weight.shape} ".encode() + weight.tobytes())
        found = {
            "served": served.version,
            "lane": served.lane,
            "visible": [list(part) for part in served.visible],
            "dims": dict(served.dims),
            "versions": [one.version for one in reader.versions()],
            "entries": store.entries(),
            "dense_sha256": sha.hexdigest(),
            "popular": [f"{label:016x}" for label in reader.popular(served.version).tolist()],
        }
    store.close()
    return found


def answers_of(settings: Settings, at_ms: int, users: Sequence[str], item: str) -> list[Document]:
    """The users' answers by the served version as of `at_ms`, with the engagement for `item`."""
    host = Host(settings, load_salt(settings.salt_path, create=False), lambda: at_ms)
    context = dict.fromkeys(settings.events.context, "phone")
    try:
        predictor = host.predictor()
        answers = [predictor.profile(user, item=item, context=context, at_ms=at_ms) for user in users]
    finally:
        host.close()
    return [_document(answer) for answer in answers]


def _document(answer: Profile) -> Document:
    assert answer.attributes is not None and answer.vector is not None
    return {
        "user": answer.user_id,
        "known": answer.known,
        "version": answer.version.number,
        "interests": [[one.id, one.probability] for one in answer.interests],
        "labels": [one.label for one in answer.interests],
        "engagement": answer.engagement and answer.engagement.probability,
        "attributes": dict(answer.attributes),
        "vector": [round(float(value), 7) for value in answer.vector],
        "features_sha256": hashlib.sha256(json.dumps(answer.features, sort_keys=True).encode()).hexdigest(),
    }


def differences(expected: Any, found: Any, tolerance: float = 0.0, path: str = "") -> list[str]:
    """Where two documents differ, one line each; numbers may by `tolerance`, relative to the larger of 1 and theirs."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        keys = sorted(expected.keys() | found.keys())
        missing = [
            f"{path}/{key}: only {'expected' if key in expected else 'found'}"
            for key in keys
            if key not in expected or key not in found
        ]
        both = [key for key in keys if key in expected and key in found]
        return missing + [
            line for key in both for line in differences(expected[key], found[key], tolerance, f"{path}/{key}")
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for place, (one, other) in pairs for line in differences(one, other, tolerance, f"{path}/{place}")]
    if isinstance(expected, float) and isinstance(found, float | int):
        close = abs(expected - found) <= tolerance * max(1.0, abs(expected))
        return [] if close else [f"{path}: expected {expected!r}, found {found!r}"]
    return [] if expected == found else [f"{path}: expected {expected!r}, found {found!r}"]


def without_digests(document: Any) -> Any:
    """The document without digests of learned bits, which depend on processor and TensorFlow."""
    if isinstance(document, Mapping):
        return {key: without_digests(value) for key, value in document.items() if key != "digest"}
    return [without_digests(one) for one in document] if isinstance(document, list) else document
