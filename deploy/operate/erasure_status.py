"""What still holds something of erased users, where, and until when: told from control, versions, reports and the ends of topics."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from deploy.operate import log_view
from deploy.operate.commands import Say, current
from deploy.operate.records_left import first_left, of_attributes, of_segments
from deploy.operate.times import iso
from deploy.operate.versions import table
from state import layout
from state.config.settings import Settings
from state.errors import LogError, MissingSalt
from state.events.identity import load_salt
from state.features.erased import Erasure
from state.history.forgetting import PAGES_MS
from state.log import Log, topic_plan
from state.registry.control import Control
from state.registry.erasing import ErasureReport
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from state.registry.sharing.small import all_reports
from state.trials.trial import Trials

COMPACTOR = "compactor"
TAKEN_UP_MS = 5_000
"""So long after an erasure a stream that was busy may still write rows of before it."""
NOT_OURS = (
    "copies that backups and you made are yours to remove, `bootstrap --examples` and savepoints of jobs among them; what "
    "shared weights and counts learned of erased users stays in them"
)


@dataclass(frozen=True)
class Holding:
    """Something that still has, or may have, what is of an erased user.

    Attributes:
        where: What it is.
        erasure: The first erasure that is not done there.
        holds: What of the users it has.
        until: When that is gone, in words.
    """

    where: str
    erasure: int
    holds: str
    until: str


def show(settings: Settings, registry: Registry, now_ms: int, output: str, say: Say) -> None:
    """Prints the erasures and what still holds something.

    Raises:
        RegistryError: There is no control, or a generation of it is damaged.
    """
    control = current(registry)
    held = holdings(settings, registry, control, now_ms)
    by = {one.id: registry.generation(one.generation) for one in control.erased}
    if output == "json":
        told = [erasure_document(one, by[one.id]) for one in control.erased]
        say(json.dumps({"erasures": told, "holding": [asdict(one) for one in held], "note": NOT_OURS}, indent=2))
        return
    if not control.erased:
        say("nobody was erased")
        return
    listed = [erasure_document(one, by[one.id]) for one in control.erased]
    head = ["erasure", "at", "users", "by", "reason"]
    say(table([head, *([str(one["id"]), one["at"], str(one["users"]), one["actor"], one["reason"]] for one in listed)]))
    say("")
    if held:
        lines = [[one.where, str(one.erasure), one.holds, one.until] for one in held]
        say(table([["still holds", "erasure", "what", "until"], *lines]))
    else:
        say("nothing holds anything of them any more")
    say(
        f"{registry.path / layout.MASKS} and the mask of each host keep their pseudonyms: with them old records are told from new ones"
    )
    say(NOT_OURS)


def erasure_document(erasure: Erasure, by: Control) -> dict[str, Any]:
    """An erasure as JSON values; users are counted, not listed."""
    return {
        "id": erasure.id,
        "generation": erasure.generation,
        "at": iso(erasure.at_ms),
        "users": len(erasure.users),
        "actor": by.actor,
        "reason": by.reason,
    }


def holdings(settings: Settings, registry: Registry, control: Control, now_ms: int) -> list[Holding]:
    """All that still holds something, as far as can be seen from here."""
    if not control.erased:
        return []
    said = {one.part: one for one in all_reports(registry)}
    found = of_versions(settings, registry, control, said.get(COMPACTOR))
    found += of_processes(
        [one for part, one in said.items() if part != COMPACTOR], _expected(settings), control.erased.last
    )
    found += of_trials(settings, control)
    found += of_topics(settings, control, now_ms)
    return found + set_aside(settings, registry, control)


def of_versions(
    settings: Settings, registry: Registry, control: Control, compactor: ErasureReport | None
) -> list[Holding]:
    """The trainer, and versions and bases of before."""
    last, found = control.erased.last, list[Holding]()
    parts = [registry.manifest(version, "base") for version in registry.bases()]
    parts += [registry.manifest(version, "delta") for version in registry.deltas()]
    newest = max((part for part in parts if part.epoch == control.epoch), key=lambda part: part.version, default=None)
    if newest is None or newest.erased < last:
        through = 0 if newest is None else newest.erased
        found.append(Holding("the trainer", through + 1, "rows", "it publishes its next version"))
    looked = compactor.version if compactor is not None and compactor.through >= last else 0
    old = [part for part in parts if part.version > looked and _may_hold(part, last)]
    if old:
        first = 1 + min(max(part.erased, part.rewritten) for part in old)
        every = f"{settings.trainer.base_every_s:g} s"
        until = f"the compactor writes them anew, each {every} or by `springtide compact`"
        found.append(Holding(f"{len(old)} kept versions and bases", first, "rows, or ids of rows that went", until))
    return found


def of_trials(settings: Settings, control: Control) -> list[Holding]:
    """The trainers of trials, and what they published: their own compactors take rows out, and an end takes all away.

    Raises:
        RegistryError: What is there cannot be read.
    """
    found, trials = list[Holding](), Trials(settings.state_dir)
    for name in trials.open():
        if not trials.registry(name).is_dir():
            found.append(Holding(f"trial {name}", 1, "rows", "`springtide up` removes what is left of it"))
            continue
        registry = Registry(trials.registry(name))
        own = registry.control()
        if own is not None:
            compactor = {one.part: one for one in all_reports(registry)}.get(COMPACTOR)
            held = of_versions(settings, registry, replace(own, erased=control.erased), compactor)
            found += [replace(one, where=f"trial {name}: {one.where}") for one in held]
    return found


def _may_hold(part: Manifest, last: int) -> bool:
    went = any(offset >= part.log.first and number > part.rewritten for number, offset in part.erasures)
    return max(part.erased, part.rewritten) < last or (went and part.kind != "base")


def _expected(settings: Settings) -> list[str]:
    """The directories on this host whose processes should report."""
    found = [str(path.parent) for path in layout.streams(settings.state_dir)]
    return found + ([str(settings.serving_dir)] if settings.serving_dir.is_dir() else [])


def of_processes(said: Sequence[ErasureReport], expected: Iterable[str], last: int) -> list[Holding]:
    """Streams and serving hosts that have not forgotten, or have not said so.

    >>> told = ErasureReport("stream-0", "h", "state/stream-0", through=2, pages=1, at_ms=0)
    >>> [(one.where, one.erasure, one.until) for one in of_processes([told], ["state/stream-0", "state/serving"], 2)]
    [('stream-0 on h', 2, '1970-01-01T00:10:00Z, where it runs'), ('state/serving', 1, 'its process starts: it has not said anything')]
    """
    found = []
    for one in said:
        where = f"{one.part} on {one.host}"
        if one.through < last:
            held, until = (
                "histories, rows, attributes",
                f"its process takes control up; it last said so {iso(one.at_ms)}",
            )
            found.append(
                Holding(where, one.through + 1, held, f"{until} ({one.path}; remove its report if it is gone for good)")
            )
        elif one.pages < last:
            until = f"{iso(one.at_ms + PAGES_MS)}, where it runs"
            found.append(Holding(where, one.pages + 1, "bytes on free pages of its stores", until))
    known = {one.path for one in said}
    silent = [path for path in expected if path not in known]
    return found + [
        Holding(path, 1, "histories, rows, attributes", "its process starts: it has not said anything")
        for path in silent
    ]


def of_topics(settings: Settings, control: Control, now_ms: int) -> list[Holding]:
    """Clicks, training log and attributes, by where their partitions begin now."""
    kafka, found = settings.kafka, list[Holding]()
    try:
        log = log_view.open_log(settings)
        with log.topics() as topics:
            word = int(topics.describe(kafka.clicks_topic).topic_id[:8], 16)
            clicks = {partition: begin for partition, (begin, _) in topics.ends(kafka.clicks_topic).items()}
            begin = topics.ends(kafka.microbatches_topic)[settings.trainer.partition][0]
            after = {
                one.id: topics.offset_before(kafka.microbatches_topic, one.at_ms + TAKEN_UP_MS)[
                    settings.trainer.partition
                ]
                for one in control.erased
            }
        attributes, members = _first_attributes(settings, log, control), _first_member(settings, log, control)
    except (LogError, KeyError) as error:
        return [Holding("Kafka", 1, "clicks, training log, attributes", f"it answers: {error}")]
    left = [one for one in control.erased if _has_clicks(one, word, clicks)]
    if left:
        until = _gone_by(left[-1], topic_plan.clicks(settings).config)
        holds = "clicks, which the stream leaves out; they are the shop's"
        found.append(Holding(f"topic {kafka.clicks_topic}", left[0].id, holds, until))
    left = [one for one in control.erased if begin < after[one.id]]
    if left:
        until = _gone_by(left[-1], topic_plan.microbatches(settings).config)
        found.append(Holding(f"topic {kafka.microbatches_topic}", left[0].id, "rows, which nobody learns again", until))
    until = "Kafka compacts the topic, by its segment.ms and delete.retention.ms"
    if attributes is not None:
        holds = "the plain ids, with tombstones"
        found.append(Holding(f"topic {settings.attributes.user_topic}", attributes, holds, until))
    if members is not None:
        found.append(Holding(f"topic {settings.segments.topic}", members, "pseudonyms, with tombstones", until))
    return found


def _first_attributes(settings: Settings, log: Log, control: Control) -> int | None:
    """The first erasure whose users the topic of attributes names; None where it names none, or there is no such topic.

    Raises:
        LogError: It cannot be read.
    """
    topic = settings.attributes.user_topic
    if not topic:
        return None
    try:
        return first_left(log, topic, of_attributes(load_salt(settings.salt_path, create=False)), control.erased)
    except MissingSalt:
        # Nobody can tell whose they are.
        return 1


def _first_member(settings: Settings, log: Log, control: Control) -> int | None:
    """The first erasure whose users the topic of segments names; None where it names none, or there is no such topic.

    Raises:
        LogError: It cannot be read.
    """
    topic = settings.segments.topic
    with log.topics() as topics:
        if not settings.segments.expressions or topic not in topics.names():
            return None
    return first_left(log, topic, of_segments, control.erased)


def _has_clicks(erasure: Erasure, word: int, begins: Mapping[int, int]) -> bool:
    return any(begins.get(part, 0) < after for topic, part, after in erasure.until if topic == word)


def _gone_by(erasure: Erasure, config: Mapping[str, str]) -> str:
    """When a topic that is made by our plan has nothing of before an erasure any more."""
    kept_ms = int(config.get("retention.ms", -1))
    return (
        "its own retention" if kept_ms < 0 else f"its retention, {iso(erasure.at_ms + kept_ms)} as Springtide makes it"
    )


def set_aside(settings: Settings, registry: Registry, control: Control) -> list[Holding]:
    """What was set aside as damaged, or replaced, before the newest erasure: nothing opens it, so nobody forgets in it."""
    places = [registry.path / name for name in (layout.VERSIONS, layout.BASES, layout.MERGED)]
    places += [settings.state_dir, *(path.parent for path in layout.streams(settings.state_dir)), settings.serving_dir]
    found = []
    for place in places:
        for path in sorted(place.glob("*.bad*")) if place.is_dir() else ():
            newer = [one.id for one in control.erased if one.at_ms > path.stat().st_mtime_ns // 1_000_000]
            if newer:
                found.append(Holding(str(path), newer[0], "whatever it had", "you remove it: nothing opens it"))
    return found
