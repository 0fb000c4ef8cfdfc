"""`springtide erase`: erases users, and reports with `--status` what still holds their data and until when.

1. Remove the users' attributes from their topic, by the plain id.
2. Determine the positions: the ends of the clicks' partitions, and all of topics that were read before.
3. Create the next control generation, which names pseudonyms and positions, with one exclusive create.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from msgspec.structs import replace as changed

from deploy.formats import iso
from deploy.operate import log_view
from deploy.operate.control import Say, current
from deploy.operate.masking import pseudonyms
from deploy.operate.versions import open_registry, table
from state import layout
from state.attributes.values import id_of
from state.config.settings import Settings
from state.disk.lmdb_store import PAGES_MS
from state.errors import DecodeError, LogError, MissingSalt, RegistryError, SettingsError, SpringtideError
from state.events.identity import ids_in, load_salt, user_id
from state.experiments.experiment import Experiments
from state.features.erased import EVERYTHING, Erased, Erasure
from state.file_store import FileStore
from state.history import snapshots
from state.log import Log, topic_plan
from state.log.follow import read_to
from state.log.topic_plan import TRAINING_PARTITION
from state.process import killpoints
from state.process.environment import actor
from state.registry.control import Control
from state.registry.control import erase as erase_users
from state.registry.hosts import ErasureReport, all_erasure_reports
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from state.segments import member_of

STALLED_S = 30.0

Whose = Callable[[bytes | None], int]
"""Returns the pseudonym of the user that a record's key names; 0, which no user has, if it names none."""
COMPACTOR = "compactor"
TAKEN_UP_MS = 5_000
"""For this long after an erasure, a busy stream may still write rows from before it."""
NOT_OURS = (
    "remove the copies that backups and you made yourself, including `bootstrap --examples` and savepoints of jobs; what "
    "shared weights and counts learned from erased users stays in them"
)


def _first_left(log: Log, topic: str, whose: Whose, erased: Erased) -> int | None:
    """Returns the first erasure of which the topic has a record; None if it has none.

    A record from before the erasure counts, and so does any tombstone, because its key names the user. Records that a
    returning user sent after the erasure do not count. The whole topic is read: some 5 s for a million users.

    Raises:
        LogError: It cannot be read, or nothing came for half a minute.
    """
    with log.topics() as topics:
        ends = {partition: end for partition, (_, end) in topics.ends(topic).items()}
    numbers = set[int]()
    with log.reader(topic) as reader:
        for batches in read_to(reader, ends, stalled_s=STALLED_S):
            for batch in batches:
                keys = np.array([whose(key) for key in batch.keys], np.uint64)
                for at in np.flatnonzero(erased.users.has(keys)).tolist():
                    user, sent_ms, is_tombstone = int(keys[at]), batch.timestamps_ms[at], batch.values[at] is None
                    numbers |= {
                        erasure.id
                        for erasure in erased
                        if user in erasure.users and (is_tombstone or sent_ms < erasure.at_ms)
                    }
    return min(numbers, default=None)


@dataclass(frozen=True)
class Holding:
    """A place that still has, or may have, data of an erased user.

    Attributes:
        erasure: The first erasure that is not done there.
        holds: Which data of the users it has.
        until: When that data is removed, in words.
    """

    where: str
    erasure: int
    holds: str
    until: str


def show(settings: Settings, registry: Registry, now_ms: int, output: str, say: Say) -> None:
    """Prints the erasures and what still holds data.

    Raises:
        RegistryError: There is no control, or a generation of it is damaged.
    """
    control = current(registry)
    remaining = holdings(settings, registry, control, now_ms)
    listed = [
        _erasure_document(erasure, registry.generations.generation(erasure.generation)) for erasure in control.erased
    ]
    if output == "json":
        say(
            json.dumps(
                {"erasures": listed, "holding": [asdict(holding) for holding in remaining], "note": NOT_OURS}, indent=2
            )
        )
        return
    if not listed:
        say("no user was erased")
        return
    head = ["erasure", "at", "users", "by", "reason"]
    say(
        table(
            [
                head,
                *(
                    [str(erasure["id"]), erasure["at"], str(erasure["users"]), erasure["actor"], erasure["reason"]]
                    for erasure in listed
                ),
            ]
        )
    )
    say("")
    if remaining:
        lines = [[holding.where, str(holding.erasure), holding.holds, holding.until] for holding in remaining]
        say(table([["still holds", "erasure", "what", "until"], *lines]))
    else:
        say("no data of erased users remains")
    say(
        f"{registry.path / layout.MASKS} and the mask of each host keep their pseudonyms, to tell old records from new ones"
    )
    say(NOT_OURS)


def _erasure_document(erasure: Erasure, control: Control) -> dict[str, Any]:
    return {
        "id": erasure.id,
        "generation": erasure.generation,
        "at": iso(erasure.at_ms),
        "users": len(erasure.users),
        "actor": control.actor,
        "reason": control.reason,
    }


def holdings(settings: Settings, registry: Registry, control: Control, now_ms: int) -> list[Holding]:
    """Returns all that still holds data, as far as can be seen from here."""
    if not control.erased:
        return []
    reports = {report.part: report for report in all_erasure_reports(registry)}
    remaining = _of_versions(settings, registry, control, reports.pop(COMPACTOR, None))
    remaining += of_processes(list(reports.values()), _expected(settings), control.erased.last)
    remaining += of_experiments(settings, control)
    remaining += of_snapshots(snapshots.location_of(settings), control.erased.last)
    remaining += _of_topics(settings, control, now_ms)
    return remaining + _set_aside(settings, registry, control)


def _of_versions(
    settings: Settings, registry: Registry, control: Control, compactor: ErasureReport | None
) -> list[Holding]:
    last, remaining = control.erased.last, list[Holding]()
    parts = [registry.manifest(version, "base") for version in registry.bases()]
    parts += [registry.manifest(version, "delta") for version in registry.deltas()]
    newest = max((part for part in parts if part.epoch == control.epoch), key=lambda part: part.version, default=None)
    if newest is None or newest.erased < last:
        through = 0 if newest is None else newest.erased
        remaining.append(Holding("the trainer", through + 1, "rows", "it publishes its next version"))
    checked = compactor.version if compactor is not None and compactor.through >= last else 0
    old = [part for part in parts if part.version > checked and _may_hold(part, last)]
    if old:
        first = 1 + min(max(part.erased, part.rewritten) for part in old)
        interval = f"{settings.trainer.base_every_s:g} s"
        until = f"the compactor rewrites them, each {interval} or by `springtide compact`"
        remaining.append(Holding(f"{len(old)} kept versions and bases", first, "rows, or ids of rows that went", until))
    return remaining


def of_experiments(settings: Settings, control: Control) -> list[Holding]:
    """Returns holdings of experiments: their own compactors remove rows, and the end of an experiment removes all.

    Raises:
        RegistryError: An experiment's registry cannot be read.
    """
    remaining, experiments = list[Holding](), Experiments(settings)
    for name in experiments.open():
        if not experiments.registry(name).is_dir():
            remaining.append(Holding(f"experiment {name}", 1, "rows", "`springtide up` removes the rest of it"))
            continue
        registry = Registry(experiments.registry(name))
        control_of_experiment = registry.control()
        if control_of_experiment is not None:
            compactor = {report.part: report for report in all_erasure_reports(registry)}.get(COMPACTOR)
            own_remaining = _of_versions(
                settings, registry, changed(control_of_experiment, erased=control.erased), compactor
            )
            remaining += [replace(holding, where=f"experiment {name}: {holding.where}") for holding in own_remaining]
    return remaining


def of_snapshots(location: FileStore, last: int) -> list[Holding]:
    """Returns the snapshots of histories from before the newest erasure, `last`."""
    until = "the compactor removes them, or `springtide compact`"
    try:
        all_snapshots = [snapshots.read(location, number) for number in snapshots.numbers(location)]
    except SpringtideError as error:
        return [Holding("snapshots of histories", 1, "histories", f"{until}; they cannot be read now: {error.what}")]
    old = [snapshot.erased for snapshot in all_snapshots if snapshot.erased < last]
    return [Holding(f"{len(old)} snapshots of histories", min(old) + 1, "histories", until)] if old else []


def _may_hold(part: Manifest, last: int) -> bool:
    removed_rows = any(offset >= part.log.first and number > part.rewritten for number, offset in part.erasures)
    return max(part.erased, part.rewritten) < last or (removed_rows and part.kind != "base")


def _expected(settings: Settings) -> list[str]:
    directories = [str(path.parent) for path in layout.streams(settings.state_dir)]
    return directories + ([str(settings.serving_dir)] if settings.serving_dir.is_dir() else [])


def of_processes(reports: Sequence[ErasureReport], expected: Iterable[str], last: int) -> list[Holding]:
    """Returns streams and serving hosts that have not erased yet, or have not reported it.

    >>> report = ErasureReport("stream-0", "h", "state/stream-0", through=2, pages=1, at_ms=0)
    >>> [(one.where, one.erasure, one.until) for one in of_processes([report], ["state/stream-0", "state/serving"], 2)]
    [('stream-0 on h', 2, '1970-01-01T00:10:00Z, where it runs'), ('state/serving', 1, 'its process starts: it has not reported yet')]
    """
    remaining = []
    for report in reports:
        where, data = f"{report.part} on {report.host}", "histories, rows, attributes"
        if report.through < last:
            until = (
                f"its process reads control; it last reported {iso(report.at_ms)} ({report.path}; remove its report if it "
                "is gone for good)"
            )
            remaining.append(Holding(where, report.through + 1, data, until))
        elif report.pages < last:
            until = f"{iso(report.at_ms + PAGES_MS)}, where it runs"
            remaining.append(Holding(where, report.pages + 1, "bytes on free pages of its stores", until))
    silent = sorted({*expected} - {report.path for report in reports})
    until = "its process starts: it has not reported yet"
    return remaining + [Holding(path, 1, "histories, rows, attributes", until) for path in silent]


def _of_topics(settings: Settings, control: Control, now_ms: int) -> list[Holding]:
    kafka, partition, holdings = settings.kafka, TRAINING_PARTITION, list[Holding]()
    until = "Kafka compacts the topic, by its segment.ms and delete.retention.ms"
    try:
        log = log_view.open_log(settings)
        with log.topics() as topics:
            word = int(topics.describe(kafka.clicks_topic).topic_id[:8], 16)
            clicks = {partition: begin for partition, (begin, _) in topics.ends(kafka.clicks_topic).items()}
            begin = topics.ends(kafka.microbatches_topic)[partition][0]
            after = {
                erasure.id: topics.offset_before(kafka.microbatches_topic, erasure.at_ms + TAKEN_UP_MS)[partition]
                for erasure in control.erased
            }
            has_segments = bool(settings.segments.expressions) and settings.segments.topic in topics.names()
        attributes = _first_attributes(settings, log, control) if settings.attributes.user_topic else None
        members = _first_left(log, settings.segments.topic, of_segments, control.erased) if has_segments else None
    except (LogError, KeyError) as error:
        return [Holding("Kafka", 1, "clicks, training log, attributes", f"it answers: {error}")]
    outstanding = [erasure for erasure in control.erased if _has_clicks(erasure, word, clicks)]
    if outstanding:
        gone_at = _gone_by(outstanding[-1], topic_plan.clicks(settings).config)
        holds = "clicks, which the stream leaves out; they are the shop's"
        holdings.append(Holding(f"topic {kafka.clicks_topic}", outstanding[0].id, holds, gone_at))
    outstanding = [erasure for erasure in control.erased if begin < after[erasure.id]]
    if outstanding:
        gone_at = _gone_by(outstanding[-1], topic_plan.microbatches(settings).config)
        holds = "rows, which are never learned again"
        holdings.append(Holding(f"topic {kafka.microbatches_topic}", outstanding[0].id, holds, gone_at))
    if attributes is not None:
        topic = f"topic {settings.attributes.user_topic}"
        holdings.append(Holding(topic, attributes, "the plain ids, with tombstones", until))
    if members is not None:
        holdings.append(Holding(f"topic {settings.segments.topic}", members, "pseudonyms, with tombstones", until))
    return holdings


def _first_attributes(settings: Settings, log: Log, control: Control) -> int | None:
    """Returns the first erasure whose users the topic of attributes names, by their plain ids; None if it names none."""
    try:
        salt = load_salt(settings.salt_path, create=False)
    except MissingSalt:
        # Their users are unknown.
        return 1

    def whose(key: bytes | None) -> int:
        try:
            return user_id(salt, id_of(key))
        except DecodeError:
            return 0

    return _first_left(log, settings.attributes.user_topic, whose, control.erased)


def of_segments(key: bytes | None) -> int:
    """Returns the user of a record of the topic of memberships; 0 if the key is malformed.

    >>> of_segments(b"00000000000000ab:sporty"), of_segments(b"x")
    (171, 0)
    """
    member = member_of(key)
    return 0 if member is None else member[1]


def _has_clicks(erasure: Erasure, word: int, begins: Mapping[int, int]) -> bool:
    return any(begins.get(part, 0) < after for topic, part, after in erasure.until if topic == word)


def _gone_by(erasure: Erasure, config: Mapping[str, str]) -> str:
    kept_ms = int(config.get("retention.ms", -1))
    return (
        "its own retention" if kept_ms < 0 else f"its retention, {iso(erasure.at_ms + kept_ms)} as Springtide makes it"
    )


def _set_aside(settings: Settings, registry: Registry, control: Control) -> list[Holding]:
    folders = [registry.path / name for name in (layout.VERSIONS, layout.BASES, layout.MERGED)]
    folders += [settings.state_dir, *(path.parent for path in layout.streams(settings.state_dir)), settings.serving_dir]
    remaining = []
    for folder in folders:
        for path in sorted(folder.glob("*.bad*")) if folder.is_dir() else ():
            newer = [erasure.id for erasure in control.erased if erasure.at_ms > path.stat().st_mtime_ns // 1_000_000]
            if newer:
                remaining.append(Holding(str(path), newer[0], "any data", "you remove it: no process opens it"))
    return remaining


def erase(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Erases users, or shows what still holds data of erased users."""
    registry = open_registry(settings)
    if args.status:
        show(settings, registry, now_ms, args.output, say)
        return
    plain = _asked_for(args)
    control = current(registry)
    newest = _newest(registry)
    users = pseudonyms(settings, plain, newest.salt)
    log = log_view.open_log(settings)
    # 1.
    tombstones = _take_attributes(settings, log, plain)
    killpoints.reach("erase.attributes")
    # 2.
    until = places(settings, log, newest)
    # 3.
    new = registry.change(lambda now: erase_users(now, users, until, actor=actor(), reason=args.reason, now_ms=now_ms))
    number = new.erased.last
    if args.output == "json":
        say(
            json.dumps({"erasure": number, "generation": new.generation, "users": len(users), "tombstones": tombstones})
        )
        return
    say(
        f"generation {new.generation}: erasure {number} of {len(users):,} user{'s' if len(users) > 1 else ''}; answers treat "
        f"them as unknown within 2 s where an applier runs (control was at {control.generation})"
    )
    if tombstones:
        say(f"their attributes are removed from {settings.attributes.user_topic}")
    say("`springtide erase --status` shows where data of them remains, and until when")


def _asked_for(args: argparse.Namespace) -> list[str]:
    if (args.user is None) == (args.users is None):
        raise SettingsError("name the users: --user ID, or --users FILE", "see `springtide erase --help`")
    if not args.reason:
        raise SettingsError("--reason TEXT is missing", "give the reason: it is recorded with your name in the history")
    ids = [args.user.strip()] if args.users is None else ids_in(args.users, "--users")
    if not any(ids):
        raise SettingsError("no user is named", "give an id, or a file with one id a line")
    return ids


def _newest(registry: Registry) -> Manifest:
    versions = registry.versions()
    if not versions:
        raise RegistryError(f"{registry.path}: no version yet", "wait for the trainer's first one")
    return registry.manifest(versions[-1])


def _take_attributes(settings: Settings, log: Log, plain: Sequence[str]) -> int:
    """Sends a tombstone for each user into each partition of the attributes' topic; returns how many users."""
    topic = settings.attributes.user_topic
    if not topic:
        return 0
    with log.topics() as topics:
        partitions = topics.describe(topic).partitions
    with log.writer() as writer:
        for user in plain:
            for partition in range(partitions):
                writer.send(topic, partition, user.encode(), None)
        writer.flush()
    return len(plain)


def places(settings: Settings, log: Log, newest: Manifest) -> list[tuple[int, int, int]]:
    """Returns (topic word, partition, next offset) of the clicks: their ends now, and all of topics that were read before.

    Raises:
        LogError: Kafka does not answer, or the topic does not exist.
    """
    topic = settings.kafka.clicks_topic
    with log.topics() as topics:
        word, ends = int(topics.describe(topic).topic_id[:8], 16), topics.ends(topic)
    until = {(source.topic, source.partition): EVERYTHING for source, _ in newest.sources if source.topic != word}
    until |= {(word, partition): end for partition, (_, end) in ends.items()}
    return [(*partition, after) for partition, after in sorted(until.items())]
