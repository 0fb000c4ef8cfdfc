"""`springtide rollback`: rolls the whole system back to a version, and trains on without the named clicks.

1. Choose the version, or refuse with a remedy (`deploy/operate/branch.py`). Read every file that makes up the version,
   and compare its digest.
2. Create the next control generation, with one exclusive create.
3. Wait until this host answers from that version, and report when it does.
4. Count the rest of the plan in the training log, report it, and store it next to control, where the trainer adds what
   happened.

A dry run does steps 1 and 4. A second identical command changes nothing. If the first one was killed between steps 2
and 4, the second one does step 4.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from deploy.formats import age, parse_time
from deploy.operate.branch import ServingBranch, Target, choose
from deploy.operate.control import Say, control_document, current
from deploy.operate.log_view import Counted, Counting, LogView, records, view_of
from deploy.operate.masking import describe, mask_document, mask_of, require_positions
from deploy.operate.versions import open_registry, served_version, versions_here
from deploy.watch.scrape import scrape_one
from state import layout
from state.config.settings import Settings
from state.errors import CorruptVersion, LogError, SettingsError, StoreError, UnfitVersion
from state.features.mask import always
from state.process import killpoints
from state.process.environment import actor
from state.registry import log_line
from state.registry.control import Control, MaskEntry, added, joined, roll_back
from state.registry.log_line import LogLine
from state.registry.manifest import Manifest, sees
from state.registry.registry import SERVING, Registry
from state.registry.segments import ClickRanges, clicks_in, from_json, learned_before, to_json

THREADS = 4  # digests are computed without the GIL
CHECKED_FIRST_BYTES = 64_000_000
"""Larger files are compared with their digests after serving has switched, if it can switch at once."""
APPLIED_BYTES_PER_S = 40e6
"""How fast an applier writes rows from the registry to its row store."""
POLL_S = 0.02


@dataclass(frozen=True)
class Switch:
    """How soon this host can serve a version.

    Attributes:
        serves: Whether this host has a row store.
        here: Whether the version is in it.
        bytes: How many bytes an applier must read from the registry if it is not.
    """

    serves: bool
    here: bool = False
    bytes: int = 0

    @classmethod
    def to(cls, settings: Settings, registry: Registry, version: Manifest) -> Switch:
        """Estimates how soon this host can serve a version.

        Raises:
            UnknownVersion, CorruptVersion: A part of the version cannot be read.
        """
        stored = versions_here(settings.serving_dir)
        if stored is None or version.version in stored:
            return cls(stored is not None, stored is not None)
        base, deltas = registry.chain(version.version)
        parts = [base, *deltas]
        present = [number for number, part in enumerate(parts) if part.version in stored]
        missing = parts[present[-1] + 1 :] if present else parts
        return cls(True, False, sum(part.files[SERVING].bytes for part in missing if SERVING in part.files))

    @property
    def seconds(self) -> float:
        """Estimated time until this host serves the version, seconds.

        >>> Switch(True, True).seconds, Switch(True, False, 120_000_000).seconds
        (0.0, 3.0)
        """
        return 0.0 if self.here else self.bytes / APPLIED_BYTES_PER_S

    def as_text(self) -> str:
        """Describes the estimate in words.

        >>> Switch(True, False, 120_000_000).as_text()
        'on this host after about 3.0 s: 120 MB are read from the registry; the current version answers until then'
        """
        if not self.serves:
            return "nothing serves on this host; a host that has the version in its row store switches at once"
        if self.here:
            return "on this host at once: the version is in its row store"
        return (
            f"on this host after about {self.seconds:.1f} s: {self.bytes / 1e6:.0f} MB are read from the registry; the "
            "current version answers until then"
        )

    def document(self) -> dict[str, Any]:
        """Returns the estimate as JSON values."""
        seconds = round(self.seconds, 3)
        return {"serves": self.serves, "in_row_store": self.here, "bytes": self.bytes, "seconds": seconds}


@dataclass(frozen=True)
class ExactPlan:
    """What an exact rollback does in addition to a fast one.

    Attributes:
        branch: The branch of the training log that begins at the version.
        again: The clicks that are read again until the trainer has learned what it had learned before.
        histories: Users whose history must be rebuilt from the training log; None if no stream's store is on this
            host, or it has rolled back already.
    """

    branch: LogLine
    again: ClickRanges
    histories: int | None = None

    @property
    def clicks(self) -> int:
        """How many clicks are read again."""
        return clicks_in(self.again)

    def lines(self) -> list[str]:
        """Formats the plan, one line per fact.

        >>> ExactPlan(log_line.WHOLE, {}, 7).lines()[1]
        'histories     7 to be rebuilt from the training log; the others drop the events since then'
        """
        rebuilt = "not counted: the stream's store is not on this machine, or is rolled back already"
        if self.histories is not None:
            rebuilt = f"{self.histories:,} to be rebuilt from the training log; the others drop the events since then"
        return [
            f"stream        rewinds too: {self.clicks:,} clicks are read again, into a new epoch of the log",
            f"histories     {rebuilt}",
        ]

    def document(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        return {"clicks": self.clicks, "histories": self.histories, "log_epoch": self.branch[-1].epoch}


@dataclass(frozen=True)
class Plan:
    """A rollback from the control generation `before` to a version: what it does, and, once counted, what that affects.

    Attributes:
        view: The topics as they are; None if Kafka does not answer.
        then_follow: Whether serving follows again once the trainer has caught up.
        exact: What an exact rollback does in addition; None for a fast one.
        counted: The records from the version to the end of the log; None until `count`, or without `view`.
        rows_per_s: The trainer's measured rate; None until `count`, or if it does not answer.
    """

    before: Control
    to: Manifest
    age_s: float
    new: list[MaskEntry]
    view: LogView | None
    topic: str
    switch: Switch
    then_follow: bool = False
    exact: ExactPlan | None = None
    counted: Counted | None = None
    rows_per_s: float | None = None

    def count(self, settings: Settings) -> Plan:
        """Counts the effects: reads the log from the version to its end, and the histories for an exact rollback.

        Raises:
            LogError: The log cannot be read.
        """
        rows_per_s, view = _rows_per_s(settings), self.view
        if view is None:
            return replace(self, rows_per_s=rows_per_s)
        exact = self.exact
        if exact is not None:
            exact = replace(exact, histories=_histories_to_rebuild(settings, self.before.log, self.to, view))
        # After a rollback, clicks of lifted masks are no longer left out.
        counting = Counting(self.to.marks, always(self.before.mask), self.new, max(settings.features.windows_s) * 1000)
        with view.reader(max(view.begin, self.to.log.next)) as reader:
            for _, batch in records(reader, self.to.log.next, view.end, self.before.log):
                counting.take(batch)
        return replace(self, exact=exact, counted=counting.found, rows_per_s=rows_per_s)

    @property
    def mode(self) -> str:
        """Whether the stream rolls back too: exact, or fast."""
        return "fast" if self.exact is None else "exact"

    @property
    def end(self) -> int:
        """End of the log; the version's offset if Kafka did not answer."""
        return self.to.log.next if self.view is None else self.view.end

    @property
    def replay_s(self) -> float | None:
        """About how long the trainer needs to reach its old position; None if that is unknown."""
        if self.counted is None or not self.rows_per_s:
            return None
        return (self.counted.rows - self.counted.masked) / self.rows_per_s

    def lines(self) -> list[str]:
        """Formats the plan, one line per fact."""
        mask = joined((*self.before.masks, *self.new), 0)
        following = (
            "they follow once the trainer has caught up"
            if self.then_follow
            else "they stay there until `springtide follow`"
        )
        reads, masked, counted = "replay ", "", self.counted
        if self.exact is not None:
            reads = "abandon"
        if counted is None:
            rows = f"at least {self.end} (Kafka does not answer: examples are not counted)"
        else:
            duration = "the duration is unknown: no trainer answers"
            if self.replay_s is not None:
                duration = f"about {age(self.replay_s)} at {self.rows_per_s:,.0f} examples/s"
            rows = f"{self.end}: {counted.rows:,} examples in {counted.records:,} records, {duration}"
            if mask:
                users = f"{len(counted.users):,} user{'' if len(counted.users) == 1 else 's'}"
                masked = f": {counted.masked:,} examples; {users} affected by the new masks"
        lines = [
            f"roll back to  version {self.to.version}, {age(self.age_s)} old",
            f"answers       {self.switch.as_text()}; {following}",
            f"{reads}       {self.topic}, partition {self.to.log.partition}, offsets {self.to.log.next} to {rows}",
            f"leave out     {describe(mask)}{masked}",
        ]
        if self.exact is not None:
            return [*lines, *self.exact.lines()]
        if counted is not None and counted.after:
            lines.append(
                f"windows       up to {counted.after:,} later examples of these users still count the masked clicks; "
                "--mode exact recomputes them"
            )
        return lines

    def document(self) -> dict[str, Any]:
        """Returns the plan as JSON values; users are counted, not listed."""
        log = {"topic": self.topic, "partition": self.to.log.partition, "first": self.to.log.next, "end": self.end}
        document: dict[str, Any] = {
            "to": self.to.version,
            "age_s": round(self.age_s, 3),
            "mode": self.mode,
            "log": log,
            "end_is_exact": self.counted is not None,
            "answers": self.switch.document(),
            "then_follow": self.then_follow,
            "replay_s": None if self.replay_s is None else round(self.replay_s, 1),
            "mask": mask_document(joined((*self.before.masks, *self.new), 0)),
        }
        if (counted := self.counted) is not None:
            document |= {
                "records": counted.records,
                "rows": counted.rows,
                "masked": counted.masked,
                "users": len(counted.users),
                "after": counted.after if self.exact is None else 0,
                "masks": {
                    str(number): {"rows": rows, "users": len(users)}
                    for number, (rows, users) in counted.by_mask.items()
                },
            }
        return document if self.exact is None else document | {"exact": self.exact.document()}


def _exact_plan(
    registry: Registry, control: Control, target: Manifest, view: LogView | None, again: ClickRanges | None = None
) -> ExactPlan:
    """Returns where the log branches, and what is read again; histories are not counted yet.

    `again` are the clicks that are read again. If it is None, they are those learned since `target`, or before a rollback that
    this one interrupts.

    Raises:
        UnfitVersion: The clicks no longer reach back to the version.
        LogError: Kafka does not answer, or the clicks topic was recreated.
    """
    if view is None:
        raise LogError(
            "Kafka does not answer: the position to which the stream rewinds is unknown",
            "start Kafka, or roll back without --mode exact",
        )
    if any(source.topic_id != view.clicks_id for source, _ in target.sources):
        raise LogError(
            f"version {target.version} was made from another clicks topic than the current one, which was recreated",
            "roll back without --mode exact, which needs the training log alone, or restore the topic",
        )
    for source, after in target.sources:
        if after < view.clicks[source.partition][0]:
            raise UnfitVersion(
                f"version {target.version} has the clicks of partition {source.partition} up to {after}, and the topic begins at "
                f"{view.clicks[source.partition][0]}: the clicks between are deleted and cannot be read again",
                "take a younger version, or roll back without --mode exact, which needs the training log alone",
            )
    if again is None:
        goal = learned_before(registry, control.epoch + 1)
        begins = {source: target.marks.get(source, view.clicks.get(source.partition, (0, 0))[0]) for source in goal}
        again = {source: (begins[source], after) for source, after in goal.items() if after > begins[source]}
    return ExactPlan(log_line.turned(control.log, target.log.epoch, target.log.next, view.end, target.sources), again)


def _histories_to_rebuild(settings: Settings, branch: LogLine, version: Manifest, view: LogView) -> int | None:
    """Returns how many users' histories have lost events that they had at a version; None if it is unknown.

    Raises:
        LogError: The log cannot be read.
    """
    # Not at the top: they load the window kernel, which no other command needs.
    from state.history.branch_records import branch_records
    from state.history.rewind import Since
    from state.history.rewinding import branch_of
    from state.history.store import HistoryStore
    from state.microbatch.codec import decode_events

    users = None
    for path in layout.streams(settings.state_dir):
        try:
            store = HistoryStore(path, settings.features.history, readonly=True)
        except StoreError:
            continue
        try:
            since = Since(version.marks, store.positions())
            with view.reader(version.log.next) as log:
                for _, batch in branch_records(log, version.log.next, view.end, branch, decode_events):
                    since.take(batch)
            users = (users or 0) + len(store.lacking(since, version.marks))
            if branch_of(store) != branch:
                # The store was rolled back meanwhile.
                return None
        finally:
            store.close()
    return users


def _rows_per_s(settings: Settings) -> float | None:
    """Returns the rows that the trainer learns in a second of its steps; None if it does not answer."""
    trainer = scrape_one(settings, "trainer")
    rows = trainer.total("springtide_trainer_rows_total", outcome=["trained", "skipped"])
    busy_s = trainer.value("springtide_trainer_step_seconds_sum")
    return rows / busy_s if rows and busy_s else None


def total_bytes(registry: Registry, version: int) -> int:
    """Returns the bytes of all files that make up a version.

    Raises:
        UnknownVersion, CorruptVersion: One of its parts cannot be read.
    """
    base, deltas = registry.chain(version)
    return sum(file.bytes for part in (base, *deltas) for file in part.files.values())


def _require_sound(registry: Registry, version: Manifest) -> None:
    def problem_of(part: Manifest) -> CorruptVersion | None:
        try:
            registry.verify(part)
        except CorruptVersion as error:
            return error
        return None

    base, deltas = registry.chain(version.version)
    parts = [base, *deltas]
    with ThreadPoolExecutor(THREADS) as pool:
        for part, problem in zip(parts, pool.map(problem_of, parts), strict=True):
            if problem is not None:
                message = f"version {version.version} cannot be put together: {problem.what}"
                raise UnfitVersion(message, _before(registry, version, part))


def _before(registry: Registry, version: Manifest, bad: Manifest) -> str:
    """Describes the version to use instead of one whose part `bad` is damaged."""
    if bad.kind == "delta" and bad.parent is not None:
        return f"take {bad.parent}, the version before the damage"
    older = [base for base in registry.bases() if base < bad.version and sees(version.visible, base)]
    if older:
        return f"take {older[-1]}, the base before it"
    return "no older base is kept: restore the file from a copy"


def rollback(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Executes or plans one rollback."""
    began_s = time.monotonic()
    registry = open_registry(settings)
    control = current(registry, args.if_generation)

    def show(document: dict[str, Any], lines: list[str]) -> None:
        say(json.dumps(document, indent=2) if args.output == "json" else "\n".join(lines))

    # 1.
    plan, decided = _planned(settings, args, registry, control, now_ms)
    later = plan.switch.here and not args.dry_run and total_bytes(registry, plan.to.version) > CHECKED_FIRST_BYTES
    if not later:
        _require_sound(registry, plan.to)
    if args.dry_run and decided is not None:
        plan = plan.count(settings)
        show({"plan": plan.document()}, [*plan.lines(), "dry run: nothing was changed"])
        return
    if decided is None or decided is control:
        if not args.dry_run:
            _count_interrupted(settings, registry, control, plan)
        result = f"generation {control.generation}: already in this state; nothing was changed"
        show({"changed": False, "control": control_document(control)}, [result])
        return
    # 2.
    registry.propose(decided)
    killpoints.reach("rollback.proposed")
    # 3.
    took_s = None
    if args.wait and _serves(settings) and _wait_for_answers(settings, plan.to.version, args.wait):
        took_s = round(time.monotonic() - began_s, 3)
        registry.generations.add_outcome(decided.epoch, "answered", {"seconds": took_s})
    if args.output == "text":
        answered = "" if took_s is None else f"; answers of this host come from it after {took_s:.2f} s"
        say(f"generation {decided.generation}: epoch {decided.epoch} starts from version {plan.to.version}{answered}")
    if later:
        _require_sound(registry, plan.to)
    killpoints.reach("rollback.answered")
    # 4.
    document = {"plan": None, "answered_s": took_s, "changed": True, "control": control_document(decided)}
    try:
        plan = plan.count(settings)
    except LogError as error:
        # The control generation exists; only the figures are missing.
        show(document | {"problem": str(error)}, [f"the plan could not be counted: {error}"])
        return
    registry.generations.add_outcome(decided.epoch, "planned", plan.document())
    show(document | {"plan": plan.document()}, plan.lines())


def _planned(
    settings: Settings, args: argparse.Namespace, registry: Registry, control: Control, now_ms: int
) -> tuple[Plan, Control | None]:
    """Returns the plan and the generation that executes it; `control` itself if that is done, None if all is masked already."""
    branch, exact = ServingBranch(registry, control), args.mode == "exact"
    is_named = args.to is not None or args.before is not None
    names_users = bool(args.skip_pseudonym or args.skip_users is not None)
    skips = (args.skip, args.skip_time, args.skip_item, args.skip_category, names_users, args.minutes is not None)
    names_clicks = any(skips)
    in_log = branch.in_log() if exact else []
    if not is_named and not names_clicks and not in_log:
        raise SettingsError(
            "rollback: neither a version nor clicks to leave out are named",
            "write --to V, --before TIME, or what to leave out; see `springtide rollback --help`",
        )
    mask = mask_of(settings, args, branch.newest, now_ms)
    view = view_of(settings)
    if view is not None:
        require_positions(mask, view.clicks_id, view.clicks)
    new = added(control.masks, mask, control.last_mask, control.generation + 1)
    done_at = None if is_named or new or in_log or control.lifted else control.base
    if done_at is not None:
        version = registry.manifest(done_at)
    else:
        wait_ms = round(settings.labels.wait_s * 1000) if settings.labels.impressions else 0
        before_ms = None if args.before is None else parse_time(args.before, now_ms)
        version = choose(branch, Target(args.to, before_ms, exact, new, wait_ms), view)
    plan = Plan(
        before=control,
        to=version,
        age_s=(now_ms - version.created_at_ms) / 1000,
        new=new,
        view=view,
        topic=version.log.topic or settings.kafka.microbatches_topic,
        switch=Switch.to(settings, registry, version),
        then_follow=args.follow_when_caught_up,
        exact=_exact_plan(registry, control, version, view) if exact else None,
    )
    if done_at is not None:
        return plan, None
    decided = roll_back(
        *(control, version.version, mask),
        actor=actor(),
        reason=args.reason,
        now_ms=now_ms,
        log=None if plan.exact is None else plan.exact.branch,
        then_follow=args.follow_when_caught_up,
    )
    if view is not None and decided is not control and decided.epoch != control.epoch:
        again = {} if plan.exact is None else {"again": to_json(plan.exact.again)}
        decided = msgspec.structs.replace(decided, plan={"end": view.end} | again)
    return plan, decided


def _count_interrupted(settings: Settings, registry: Registry, control: Control, plan: Plan) -> None:
    """Stores the plan of a rollback whose command was killed between steps 2 and 4, as far as it can still be counted."""
    began = registry.generations.beginning_of(control.epoch)
    if (
        began is None
        or began.action != "rollback"
        or registry.generations.outcome(control.epoch, "planned") is not None
    ):
        return
    before, view, exact, stored = (
        registry.generations.generation(began.generation - 1),
        plan.view,
        plan.exact,
        began.plan,
    )
    if view is not None and stored is not None:
        view = replace(view, end=int(stored["end"]))
    if exact is not None:
        known = None if stored is None or "again" not in stored else from_json(stored["again"])
        exact = _exact_plan(registry, before, plan.to, view, known)
    new = [mask for mask in began.masks if mask.generation == began.generation]
    interrupted = replace(plan, before=before, new=new, view=view, exact=exact)
    registry.generations.add_outcome(control.epoch, "planned", interrupted.count(settings).document())


def _serves(settings: Settings) -> bool:
    if not (settings.serving_dir / layout.ROWS).is_dir():
        return False
    return not scrape_one(settings, "applier").problem


def _wait_for_answers(settings: Settings, version: int, limit_s: float) -> bool:
    until_s = time.monotonic() + limit_s
    while served_version(settings.serving_dir) != version:
        if time.monotonic() >= until_s:
            return False
        time.sleep(POLL_S)
    return True
