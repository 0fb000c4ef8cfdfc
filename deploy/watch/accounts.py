"""One consistent cut of the whole account: broker, stream, training log, trainer; for `springtide status`.

The order of reading makes the cut exact while everything moves:

1. The newest version: what became of the rows the trainer had, and its marks.
2. The stream's store: what became of the positions it has committed.
3. The training log from the version's place on: the rows in flight, counted
   up to where the store was and no further.
4. The broker's first and last offsets.

A row is in the log before the store counts it, and in the store soon after; so
where the version is ahead of the store, the store is read again.

A stream on an engine has its account there: of it there is what it shows on
/metrics, a second old, which is not compared with the trainer's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from deploy.watch.messages import shown
from deploy.watch.rows_in_flight import Counts, InFlight, comparable, stream_account, trainer_account
from deploy.watch.stored_accounts import quick, read_shown, read_stores, read_tail, settled
from state.accounts import BrokerAccount, StreamAccount, check_accounts
from state.config.settings import Settings
from state.errors import SpringtideError
from state.log import Topics
from state.registry.log_line import WHOLE, LogLine
from state.registry.manifest import Manifest
from state.registry.registry import Registry

OUTCOMES = ("rows", "dead", "filtered", "absent", "gap")
RARE = ("opened", "feedback", "masked")
AS_SHOWN = (
    "no stream has a store here: its account is what it shows on /metrics, and is not compared with the trainer's"
)


def account(settings: Settings) -> dict[str, Any]:
    """The whole account as JSON values; what cannot be read says why, and the rest is checked all the same."""
    found: dict[str, Any] = {"answers": True, "problem": "", "notes": [], "faults": []}
    (version, line), counts, waiting, unread = _newest(settings, found), None, None, 0
    stream: StreamAccount | None = None
    # 2.
    try:
        stores = read_stores(settings) if version is None else settled(settings, version)
        counts, found["gaps_accepted"], waiting = stores
        stream = stream_account(counts)
    except SpringtideError as error:
        stream, waiting, unread = read_shown(settings)
        found["notes"].append(str(error) if stream is None else AS_SHOWN)
    # 3.
    trainer = compared = None
    if version is not None:
        flying = InFlight(0, 0, version.marks, complete=False)
        try:
            if counts is not None:
                until = {source: one["next"] for source, one in counts.items()}
                flying = read_tail(settings, version, until, line)
        except SpringtideError as error:
            found["notes"].append(f"rows in flight are not counted: {error}")
        trainer = trainer_account(version, flying)
        why = "" if counts is None else comparable(counts, version, flying)
        compared = trainer if counts is not None and not why else None
        if why:
            found["notes"].append(why)
        found["trainer"] = {
            **dataclasses.asdict(trainer),
            "version": version.version,
            "records_left_out": int(version.metrics.get("account.left_out", 0)),
            "in_flight_counted": flying.complete,
        }
    # 4.
    broker = _broker(settings, counts or {}, found)
    found["faults"] += [fault for one in (counts or {}).values() for fault in check_accounts(StreamAccount.of(one))]
    checked = check_accounts(stream, compared, broker, waiting)
    found["faults"] += [fault for fault in checked if fault not in found["faults"]]
    if trainer is not None and compared is None:
        found["faults"] += check_accounts(trainer=trainer)
    if stream is not None:
        unread = sum(one.unread for one in broker) if counts else unread
        found["stream"] = {**dataclasses.asdict(stream), "waiting": waiting, "unread": unread}
    found["balanced"] = None if stream is None and trainer is None else not found["faults"]
    found["compared"] = compared is not None
    return found


def _newest(settings: Settings, found: dict[str, Any]) -> tuple[Manifest | None, LogLine]:
    """The newest version of control's epoch, and the line of the log that control names."""
    # 1.
    try:
        if not (settings.registry_dir / "versions").is_dir():
            raise SpringtideError(f"no registry at {settings.registry_dir}")
        registry = Registry(settings.registry_dir)
        control = registry.control()
        line = WHOLE if control is None else control.log
        return None if control is None else registry.latest(control.epoch), line
    except (SpringtideError, OSError) as error:
        found["notes"].append(str(error))
        return None, WHOLE


def _broker(settings: Settings, counts: Counts, found: dict[str, Any]) -> list[BrokerAccount]:
    """What the broker keeps of each source of the topic as it is now."""
    if not counts:
        return []
    try:
        with Topics(quick(settings)) as topics:
            topic_id = topics.describe(settings.kafka.clicks_topic).topic_id
            ends = topics.ends(settings.kafka.clicks_topic)
    except SpringtideError as error:
        found["notes"].append(f"the broker's offsets are not known: {error}")
        return []
    return [
        BrokerAccount(source, one["next"], *ends[source.partition])
        for source, one in sorted(counts.items())
        if source.topic_id == topic_id and source.partition in ends
    ]


def as_text(found: Mapping[str, Any]) -> str:
    """The account in one line.

    >>> as_text({"balanced": None, "notes": ["no registry"], "faults": []})
    'no registry'
    """
    parts = []
    if stream := found.get("stream"):
        named = [*OUTCOMES, *(name for name in RARE if stream[name])]
        outcomes = " + ".join(f"{shown(stream[name])} {name}" for name in named)
        parts.append(f"{shown(stream['positions'])} positions = {outcomes}, {shown(stream['unread'])} unread")
        if stream["opened"]:
            fates = " + ".join(f"{shown(stream[name])} {name}" for name in ("joined", "expired", "dropped", "waiting"))
            parts.append(f"{shown(stream['opened'])} opened = {fates}")
    if trainer := found.get("trainer"):
        named = [
            "trained",
            "skipped",
            "duplicate",
            "masked",
            *(["other_features"] if trainer.get("other_features") else []),
        ]
        outcomes = " + ".join(f"{shown(trainer[name])} {name.replace('_', ' ')}" for name in (*named, "in_flight"))
        parts.append(f"{shown(trainer['rows'])} rows = {outcomes}")
        if trainer.get("records_left_out"):
            parts.append(f"{shown(trainer['records_left_out'])} records of the training log left out, as accepted")
    return "; ".join([*parts, *found["faults"], *found["notes"]])
