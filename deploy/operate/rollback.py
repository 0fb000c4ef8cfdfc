"""`springtide rollback`: the whole system goes back to a version and trains on without the clicks that are named.

1. The version is chosen, or refused with what to do (`deploy/operate/choice.py`).
2. The next control generation is created: one exclusive create.
3. Answers of this host turn; the command waits for that, and says when.
4. The rest of the plan is counted in the training log, told, and kept beside
   control, where the trainer adds what happened.

A dry run does 1 and 4. Asked twice, the second time changes nothing; where the
first one was killed between 2 and 4, the second does 4.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from deploy.operate import answers, digests
from deploy.operate.choice import Target, choose
from deploy.operate.commands import Say, control_document, current
from deploy.operate.exact import ExactPlan, exact_plan, with_histories
from deploy.operate.line import ServingLine
from deploy.operate.log_scan import Counted, Counting, records
from deploy.operate.log_view import LogView, look
from deploy.operate.masking import mask_of, require_positions
from deploy.operate.plan import Plan
from deploy.operate.times import parse_time
from deploy.operate.versions import open_registry
from deploy.watch.scrape import scrape, urls
from state.config.settings import Settings
from state.errors import LogError, SettingsError
from state.features.mask import Mask, always
from state.process import killpoints
from state.process.actor import actor
from state.registry.control import Control, roll_back
from state.registry.goals import from_json, to_json
from state.registry.manifest import Manifest
from state.registry.mask_entries import MaskEntry, added, joined
from state.registry.registry import Registry

CHECKED_FIRST_BYTES = 64_000_000
"""Files of more bytes are compared with their digests only once answers have turned, where they can turn at once."""


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
    later = turning.here and not asked.dry_run and digests.total_bytes(registry, to.version) > CHECKED_FIRST_BYTES
    if not later:
        digests.require_sound(registry, to)
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
        digests.require_sound(registry, to)
    killpoints.reach("rollback.answered")
    # 4.
    found = {"plan": None, "answered_s": took_s, "changed": True, "control": control_document(made)}
    try:
        plan = _plan(settings, control, to, new, view, turning, exactly, asked, now_ms)
    except LogError as error:
        # Control is changed, and stands: only the figures are missing.
        _tell(asked, say, found | {"problem": str(error)}, [f"the plan could not be counted: {error}"])
        return
    registry.add_outcome(made.epoch, "planned", plan.document())
    _tell(asked, say, found | {"plan": plan.document()}, plan.lines())


class Chosen(NamedTuple):
    """What a rollback does.

    Attributes:
        to: The version gone back to.
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
    """Keeps the plan of a rollback whose command was killed between 2 and 4, as far as it can still be counted."""
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
    """What the trainer will find in the log; the log is read from the version's place to its end."""
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
