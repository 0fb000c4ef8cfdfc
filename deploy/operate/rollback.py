"""`springtide rollback`: rolls the whole system back to a version, and trains on without the named clicks.

1. Choose the version, or refuse and say what to do (`deploy/operate/choice.py`).
2. Create the next control generation, with one exclusive create.
3. Wait until this host answers from that version, and report when it does.
4. Count the rest of the plan in the training log, report it, and store it next to control, where
   the trainer adds what happened.

A dry run does steps 1 and 4. A second identical command changes nothing. If the first one was
killed between steps 2 and 4, the second one does step 4.

Before the rollback, every file that makes up the version is read and its digest compared. The plan
states the effects in figures and words; a dry run computes it before anything changes. For an exact
rollback it also states requirements and costs: where the log branches, which clicks are read again,
and which histories are rebuilt.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from deploy.operate import answers
from deploy.operate.answers import Turning
from deploy.operate.choice import Target, choose
from deploy.operate.commands import Say, control_document, current
from deploy.operate.line import ServingLine
from deploy.operate.log_scan import Counted, Counting, records
from deploy.operate.log_view import LogView, look
from deploy.operate.masking import describe, mask_document, mask_of, require_positions
from deploy.operate.times import age, parse_time
from deploy.operate.versions import open_registry
from deploy.watch.scrape import scrape, urls
from state import layout
from state.config.settings import Settings
from state.errors import CorruptVersion, LogError, SettingsError, StoreError, UnfitVersion
from state.features.mask import Mask, always
from state.process import killpoints
from state.process.actor import actor
from state.registry import log_line
from state.registry.control import Control, Mode, roll_back
from state.registry.goals import ClickRanges, clicks_in, from_json, learned_before, to_json
from state.registry.log_line import LogLine
from state.registry.manifest import Manifest, sees
from state.registry.mask_entries import MaskEntry, added, joined
from state.registry.registry import Registry

THREADS = 4  # digests are computed without the GIL
CHECKED_FIRST_BYTES = 64_000_000
"""Larger files are compared with their digests after serving has switched, if it can switch at once."""


@dataclass(frozen=True)
class ExactPlan:
    """What an exact rollback does in addition to a fast one.

    Attributes:
        line: The branch of the training log that begins at the version.
        again: The clicks that are read again until the trainer has learned what it had learned before.
        histories: Users whose history must be rebuilt from the training log; None if no stream's store is on this
            host, or it has rolled back already.
    """

    line: LogLine
    again: ClickRanges
    histories: int | None = None

    def lines(self) -> list[str]:
        """The plan for people, one line per fact.

        >>> ExactPlan(log_line.WHOLE, {}, 7).lines()[1]
        'histories     7 to be rebuilt from the training log; the others give back what they gained'
        """
        rebuilt = "not counted: the stream's store is not on this machine, or has gone back already"
        if self.histories is not None:
            rebuilt = f"{self.histories:,} to be rebuilt from the training log; the others give back what they gained"
        return [
            f"stream        goes back too: {self.clicks:,} clicks are read again, into a new epoch of the log, until all that "
            "was learned is learned again",
            f"histories     {rebuilt}",
        ]

    @property
    def clicks(self) -> int:
        """How many clicks are read again."""
        return clicks_in(self.again)

    def document(self) -> dict[str, Any]:
        """It as JSON values."""
        return {"clicks": self.clicks, "histories": self.histories, "log_epoch": self.line[-1].epoch}


def exact_plan(
    registry: Registry, control: Control, to: Manifest, view: LogView | None, again: ClickRanges | None = None
) -> ExactPlan:
    """Where the log branches, and what is read again; histories are not counted yet.

    Args:
        registry: Where versions are.
        control: The one before the rollback.
        to: The version to roll back to.
        view: Of the log.
        again: The clicks that are read again, where they are known; those learned since `to`, or before a rollback
            that this one interrupts, where they are not.

    Raises:
        UnfitVersion: The clicks no longer reach back to the version.
        LogError: Kafka does not answer, or the clicks topic was recreated.
    """
    if view is None:
        raise LogError(
            "Kafka does not answer: where the stream goes back to cannot be told",
            "start Kafka, or go back without --mode exact",
        )
    if any(source.topic_id != view.clicks_id for source, _ in to.sources):
        raise LogError(
            f"version {to.version} was made from another clicks topic than there is now: it was made anew",
            "go back without --mode exact, which needs the training log alone, or restore the topic",
        )
    for source, after in to.sources:
        if after < view.clicks[source.partition][0]:
            raise UnfitVersion(
                f"version {to.version} has the clicks of partition {source.partition} up to {after}, and the topic begins at "
                f"{view.clicks[source.partition][0]}: the clicks between are deleted and cannot be read again",
                "take a younger version, or go back without --mode exact, which needs the training log alone",
            )
    if again is None:
        goal = learned_before(registry, control.epoch + 1)
        begins = {one: to.marks.get(one, view.clicks.get(one.partition, (0, 0))[0]) for one in goal}
        again = {one: (begins[one], after) for one, after in goal.items() if after > begins[one]}
    return ExactPlan(log_line.turned(control.log, to.log.epoch, to.log.next, view.end, to.sources), again)


def with_histories(plan: ExactPlan, settings: Settings, line: LogLine, to: Manifest, view: LogView) -> ExactPlan:
    """The plan, with the number of users whose histories have lost events that they had at `to`.

    Args:
        plan: Of the rollback.
        settings: All settings.
        line: The branch of the log before the rollback.
        to: The version.
        view: Of the log.

    Raises:
        LogError: The log cannot be read.
    """
    # Not at the top: they load the window kernel, which no other command needs.
    from state.history.rewind import Since
    from state.history.rewinding import line_of, records
    from state.history.store import HistoryStore

    found = None
    for path in layout.streams(settings.state_dir):
        try:
            store = HistoryStore(path, settings.features.history, settings.stream.map_gb << 30, readonly=True)
        except StoreError:
            continue
        try:
            since = Since(to.marks, store.positions())
            with view.reader(to.log.next) as log:
                for batch in records(log, view.partition, to.log.next, view.end, line):
                    since.take(batch)
            found = (found or 0) + len(store.lacking(since, to.marks))
            if line_of(store) != line:
                # It went back meanwhile.
                return plan
        finally:
            store.close()
    return replace(plan, histories=found)


@dataclass(frozen=True)
class Plan:
    """A rollback.

    Attributes:
        to: The version to roll back to.
        age_s: Its age.
        mode: Whether the stream rolls back too.
        topic: Name of the training log.
        partition: Its partition.
        first: Offset to which the trainer rewinds.
        end: End of the log; the newest version's offset if Kafka did not answer.
        mask: The events left out from now on.
        turning: How serving switches to the version.
        then_follow: Whether serving follows again once the trainer has caught up.
        counted: The records between in the log; None if Kafka did not answer.
        rows_per_s: The trainer's measured rate; None if it does not answer.
        exact: What an exact rollback does in addition.
    """

    to: int
    age_s: float
    mode: Mode
    topic: str
    partition: int
    first: int
    end: int
    mask: Mask
    turning: Turning
    then_follow: bool = False
    counted: Counted | None = None
    rows_per_s: float | None = None
    exact: ExactPlan | None = None

    @property
    def replay_s(self) -> float | None:
        """About how long the trainer needs to reach its old position; None if that is unknown."""
        if self.counted is None or not self.rows_per_s:
            return None
        return (self.counted.rows - self.counted.masked) / self.rows_per_s

    def lines(self) -> list[str]:
        """The plan for people, one line per fact.

        >>> counted = Counted(60, 5000, 120, {1, 2}, 30, {1: (120, {1, 2})})
        >>> plan = Plan(40, 90.0, "fast", "log", 0, 100, 160, Mask.NONE, Turning(True, True), False, counted, 2000.0)
        >>> print(plan.lines()[2])
        replay        log, partition 0, offsets 100 to 160: 5,000 rows in 60 records, about 2.4 s at 2,000 rows/s
        """
        answers = (
            "follow once the trainer has caught up" if self.then_follow else "stay there until `springtide follow`"
        )
        found = [
            f"go back to    version {self.to}, {age(self.age_s)} old",
            f"answers       {self.turning.line()}; they {answers}",
            f"{'replay ' if self.exact is None else 'abandon'}       {self.topic}, partition {self.partition}, offsets "
            f"{self.first} to {self._replay()}",
            f"leave out     {describe(self.mask)}{self._masked()}",
        ]
        if self.mode == "fast" and self.counted is not None and self.counted.after:
            found.append(
                f"windows       up to {self.counted.after:,} later rows of these users still count what is left out; "
                "--mode exact makes them anew"
            )
        return [*found, *([] if self.exact is None else self.exact.lines())]

    def document(self) -> dict[str, Any]:
        """The plan as JSON values; users are counted, not listed."""
        found: dict[str, Any] = {
            "to": self.to,
            "age_s": round(self.age_s, 3),
            "mode": self.mode,
            "log": {"topic": self.topic, "partition": self.partition, "first": self.first, "end": self.end},
            "end_is_exact": self.counted is not None,
            "answers": self.turning.document(),
            "then_follow": self.then_follow,
            "replay_s": None if self.replay_s is None else round(self.replay_s, 1),
            "mask": mask_document(self.mask),
        }
        if (counted := self.counted) is not None:
            found |= {
                "records": counted.records,
                "rows": counted.rows,
                "masked": counted.masked,
                "users": len(counted.users),
                "after": counted.after if self.mode == "fast" else 0,
                "masks": {
                    str(number): {"rows": rows, "users": len(users)}
                    for number, (rows, users) in counted.by_mask.items()
                },
            }
        return found if self.exact is None else found | {"exact": self.exact.document()}

    def _replay(self) -> str:
        if self.counted is None:
            return f"at least {self.end} (Kafka does not answer: rows are not counted)"
        speed = "how long is not known: no trainer answers"
        if self.replay_s is not None:
            speed = f"about {age(self.replay_s)} at {self.rows_per_s:,.0f} rows/s"
        return f"{self.end}: {self.counted.rows:,} rows in {self.counted.records:,} records, {speed}"

    def _masked(self) -> str:
        if self.counted is None or not self.mask:
            return ""
        return f": {self.counted.masked:,} rows; what is new hits {len(self.counted.users):,} users"


def total_bytes(registry: Registry, version: int) -> int:
    """The bytes of all files that a version is put together from.

    Raises:
        UnknownVersion, CorruptVersion: One of its parts cannot be read.
    """
    base, deltas = registry.chain(version)
    return sum(file.bytes for part in (base, *deltas) for file in part.files.values())


def require_sound(registry: Registry, version: Manifest) -> None:
    """Refuses a version of which a file fails its digest.

    Raises:
        UnknownVersion: A part is no longer kept.
        UnfitVersion: A file is damaged; the version before the damage is named.
    """
    base, deltas = registry.chain(version.version)
    parts = [base, *deltas]
    with ThreadPoolExecutor(THREADS) as pool:
        for part, problem in zip(parts, pool.map(lambda part: _problem(registry, part), parts), strict=True):
            if problem is not None:
                raise UnfitVersion(
                    f"version {version.version} cannot be put together: {problem.what}",
                    _before(registry, version, part),
                )


def _problem(registry: Registry, part: Manifest) -> CorruptVersion | None:
    try:
        registry.verify(part)
    except CorruptVersion as error:
        return error
    return None


def _before(registry: Registry, version: Manifest, bad: Manifest) -> str:
    """The version to use instead of one whose part `bad` is damaged."""
    if bad.kind == "delta" and bad.parent is not None:
        return f"take {bad.parent}, the version before the damage"
    older = [one for one in registry.bases() if one < bad.version and sees(version.visible, one)]
    if older:
        return f"take {older[-1]}, the base before it"
    return "no older base is kept: restore the file from a copy"


def rollback(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Does one rollback; see the module.

    Raises:
        UnknownVersion, UnfitVersion: The version is not there, or cannot be gone back to.
        LogError: Kafka is needed and does not answer.
        SettingsError: What to skip is not written as it should be, or is not there.
        ControlConflict: Somebody else changed control meanwhile.
    """
    began_s = time.monotonic()
    registry = open_registry(settings)
    control = current(registry, asked.if_generation)
    # 1.
    to, mask, new, view, is_done = _chosen(settings, asked, registry, control, now_ms)
    exactly = exact_plan(registry, control, to, view) if asked.mode == "exact" else None
    turning = answers.turning(settings, registry, to)
    later = turning.here and not asked.dry_run and total_bytes(registry, to.version) > CHECKED_FIRST_BYTES
    if not later:
        require_sound(registry, to)
    made = (
        control
        if is_done
        else roll_back(
            *(control, to.version, mask),
            actor=actor(),
            reason=asked.reason,
            now_ms=now_ms,
            log=None if exactly is None else exactly.line,
            then_follow=asked.follow_when_caught_up,
        )
    )
    if view is not None and made is not control and made.epoch != control.epoch:
        made = replace(made, plan={"end": view.end} | ({} if exactly is None else {"again": to_json(exactly.again)}))

    if asked.dry_run and not is_done:
        plan = _plan(settings, control, to, new, view, turning, exactly, asked, now_ms)
        _tell(asked, say, {"plan": plan.document()}, [*plan.lines(), "dry run: nothing was changed"])
        return
    if made is control:
        if not asked.dry_run:
            _count_again(settings, registry, control, to, view, turning, exactly, asked, now_ms)
        done = f"generation {control.generation}: it is so already; nothing was changed"
        _tell(asked, say, {"changed": False, "control": control_document(control)}, [done])
        return
    # 2.
    registry.propose(made)
    killpoints.reach("rollback.proposed")
    # 3.
    said = f"generation {made.generation}: epoch {made.epoch} starts from version {to.version}"
    took_s = _answered(settings, registry, made, to, asked, began_s)
    if asked.output == "text":
        say(said if took_s is None else f"{said}; answers of this host come from it after {took_s:.2f} s")
    if later:
        require_sound(registry, to)
    killpoints.reach("rollback.answered")
    # 4.
    found = {"plan": None, "answered_s": took_s, "changed": True, "control": control_document(made)}
    try:
        plan = _plan(settings, control, to, new, view, turning, exactly, asked, now_ms)
    except LogError as error:
        # The control generation exists; only the figures are missing.
        _tell(asked, say, found | {"problem": str(error)}, [f"the plan could not be counted: {error}"])
        return
    registry.add_outcome(made.epoch, "planned", plan.document())
    _tell(asked, say, found | {"plan": plan.document()}, plan.lines())


class Chosen(NamedTuple):
    """What a rollback does.

    Attributes:
        to: The version to roll back to.
        mask: What is asked to be left out.
        new: What of it is new.
        view: The log as it is; None if Kafka does not answer.
        is_done: Whether nothing is left to do: no version is named, and all of it is left out already.
    """

    to: Manifest
    mask: Mask
    new: list[MaskEntry]
    view: LogView | None
    is_done: bool = False


def _chosen(settings: Settings, asked: argparse.Namespace, registry: Registry, control: Control, now_ms: int) -> Chosen:
    line, exact = ServingLine(registry, control), asked.mode == "exact"
    is_named = asked.to is not None or asked.before is not None
    in_log = line.in_log() if exact else []
    if not is_named and not _skips(asked) and not in_log:
        raise SettingsError(
            "rollback: neither a version nor clicks to leave out are named",
            "write --to V, --before TIME, or what to leave out; see `springtide rollback --help`",
        )
    mask = mask_of(settings, asked, line.newest, now_ms)
    view = look(settings)
    if view is not None:
        require_positions(mask, view.clicks_id, view.clicks)
    new = added(control.masks, mask, control.last_mask, control.generation + 1)
    if control.base is not None and not (is_named or new or in_log or control.lifted):
        return Chosen(registry.manifest(control.base), mask, new, view, is_done=True)
    wait_ms = round(settings.labels.wait_s * 1000) if settings.labels.impressions else 0
    before_ms = None if asked.before is None else parse_time(asked.before, now_ms)
    target = Target(asked.to, before_ms, exact)
    return Chosen(choose(registry, control, target, new, view, wait_ms), mask, new, view)


def _skips(asked: argparse.Namespace) -> bool:
    """Whether clicks to leave out are named."""
    return bool(asked.skip or asked.skip_time or asked.skip_users is not None or asked.minutes is not None)


def _tell(asked: argparse.Namespace, say: Say, document: dict[str, Any], lines: list[str]) -> None:
    say(json.dumps(document, indent=2) if asked.output == "json" else "\n".join(lines))


def _answered(
    settings: Settings, registry: Registry, made: Control, to: Manifest, asked: argparse.Namespace, began_s: float
) -> float | None:
    """Seconds since the command began until answers of this host came from the version; None where they do not yet."""
    if not asked.wait or not answers.serves(settings) or not answers.wait(settings, to.version, asked.wait):
        return None
    took_s = round(time.monotonic() - began_s, 3)
    registry.add_outcome(made.epoch, "answered", {"seconds": took_s})
    return took_s


def _plan(
    settings: Settings,
    control: Control,
    to: Manifest,
    new: list[MaskEntry],
    view: LogView | None,
    turning: answers.Turning,
    exactly: ExactPlan | None,
    asked: argparse.Namespace,
    now_ms: int,
) -> Plan:
    if exactly is not None and view is not None:
        exactly = with_histories(exactly, settings, control.log, to, view)
    return Plan(
        to=to.version,
        age_s=(now_ms - to.created_at_ms) / 1000,
        mode=asked.mode,
        topic=to.log.topic or settings.kafka.microbatches_topic,
        partition=to.log.partition,
        first=to.log.next,
        end=to.log.next if view is None else view.end,
        mask=joined((*control.masks, *new), 0),
        turning=turning,
        then_follow=asked.follow_when_caught_up,
        counted=None if view is None else _count(settings, control, to, new, view),
        rows_per_s=_rows_per_s(settings),
        exact=exactly,
    )


def _count_again(
    settings: Settings,
    registry: Registry,
    control: Control,
    to: Manifest,
    view: LogView | None,
    turning: answers.Turning,
    exactly: ExactPlan | None,
    asked: argparse.Namespace,
    now_ms: int,
) -> None:
    """Stores the plan of a rollback whose command was killed between steps 2 and 4, as far as it can still be counted."""
    began = registry.beginning_of(control.epoch)
    if began is None or began.action != "rollback" or registry.outcome(control.epoch, "planned") is not None:
        return
    before = registry.generation(began.generation - 1)
    new = [one for one in began.masks if one.generation == began.generation]
    if view is not None and began.plan is not None:
        view = replace(view, end=int(began.plan["end"]))
    if exactly is not None:
        known = None if began.plan is None or "again" not in began.plan else from_json(began.plan["again"])
        exactly = exact_plan(registry, before, to, view, known)
    plan = _plan(settings, before, to, new, view, turning, exactly, asked, now_ms)
    registry.add_outcome(control.epoch, "planned", plan.document())


def _count(settings: Settings, control: Control, to: Manifest, new: list[MaskEntry], view: LogView) -> Counted:
    """What the trainer will find in the log, which is read from the version's position to its end."""
    # A rollback ends what lifted masks still left out.
    counting = Counting(to.marks, always(control.mask), new, max(settings.features.windows_s) * 1000)
    with view.reader(max(view.begin, to.log.next)) as reader:
        for _, batch in records(reader, view.partition, to.log.next, view.end, control.log):
            counting.take(batch)
    return counting.found


def _rows_per_s(settings: Settings, get: Callable[..., Any] = scrape) -> float | None:
    """Rows that the trainer learned in a second of its steps since it started; None where it does not answer."""
    found = get({"trainer": urls(settings)["trainer"]})["trainer"]
    rows = found.total("springtide_trainer_rows_total", outcome=["trained", "skipped"])
    busy_s = found.value("springtide_trainer_step_seconds_sum")
    return rows / busy_s if rows and busy_s else None
