"""Detects the end of a rollback: the trainer has relearned all that it is meant to relearn.

It then writes the outcome next to control. Serving follows the trainer again if the rollback asked for it.
"""

from __future__ import annotations

import getpass
import logging
from collections.abc import Callable
from typing import Any

from state.errors import ControlConflict, UnusableRegistry
from state.positions import Source
from state.process import killpoints
from state.process.said_once import SaidOnce
from state.registry.control import Control, follow
from state.registry.registry import Registry
from state.registry.segments import ClickRanges, clicks_in, from_json, has_caught_up, learned_before
from state.storage.waiting import is_full, unless_full
from trainer.place import TrainingPlace

AGAIN_S = 5.0
"""Seconds between two attempts to let serving follow while the object store of a shared registry is unreachable."""

logger = logging.getLogger(__name__)


class CatchingUp:
    """Follows one epoch from its start until the trainer has caught up. The step thread calls every method."""

    def __init__(self, registry: Registry, clock: Callable[[], float], elapsed: Callable[[], float]) -> None:
        self._registry, self._clock, self._elapsed = registry, clock, elapsed
        self._refused_s = float("-inf")
        self._began: Control | None = None
        self._goal: dict[Source, int] = {}
        self._planned: ClickRanges = {}
        self._again: dict[str, int] | None = None
        self._watched = self._caught_up = False
        self._end = 0
        self._say = SaidOnce(logger.warning)

    def enter(self, control: Control, position: TrainingPlace) -> None:
        """Enters an epoch. An epoch whose outcome is written already is not followed again, nor is an upgrade."""
        self._caught_up, self._again = False, None
        self._watched = not has_caught_up(self._registry, control.epoch) or control.serving.then_follow
        self._began = self._registry.generations.beginning_of(control.epoch) if self._watched else None
        self._goal = learned_before(self._registry, control.epoch) if self._watched else {}
        plan = {} if self._began is None or self._began.plan is None else self._began.plan
        self._planned = from_json(plan.get("again", {}))
        is_at_base = self._began is not None and position.parent == self._began.base
        if self._watched and not is_at_base and self._is_again(position, position.next):
            # The trainer cannot distinguish records that it read before this start from later ones.
            self._again = {}

    def pass_by(self, offset: int, position: TrainingPlace) -> None:
        """Runs before the record at `offset`. Counts the relearned rows up to where the log ended at planning time."""
        if self._watched and self._again is None and self._is_again(position, offset):
            self._again = self._since_base(position)

    def check(self, position: TrainingPlace, control: Control, busy: bool) -> None:
        """Runs between two records, after the end of the log was reached. A failed write is retried at a later call.

        1. Once the clicks have reached the position before the rollback, write the outcome.
        2. Once all of them are published (`busy` is false), let serving follow if the rollback asked for it.
        """
        if not self._watched:
            return
        self.pass_by(position.next, position)
        # 1.
        if not self._caught_up:
            if not self._at_goal(position):
                return
            with unless_full(self._say):
                self._write(position)
                self._caught_up, self._end = True, position.next
            if not self._caught_up:
                return
            killpoints.reach("caught.written")
        # 2.
        if not control.serving.then_follow:
            self._watched = False
        elif self._elapsed() - self._refused_s < AGAIN_S:
            return
        elif not busy and (position.first >= self._end or not position.changed):
            with unless_full(self._say):
                self._watched = not self._let_follow(control)

    def _at_goal(self, position: TrainingPlace) -> bool:
        return all(position.marks.get(source, 0) >= mark for source, mark in self._goal.items())

    def _is_again(self, position: TrainingPlace, offset: int) -> bool:
        """Whether `offset` is past all that the plan counted.

        The plan of an exact rollback counts clicks, because the stream writes new records of them.
        """
        if self._began is None or self._began.plan is None or self._began.action != "rollback":
            return False
        if self._began.mode == "exact":
            return "again" in self._began.plan and all(
                position.marks.get(source, 0) >= after for source, (_, after) in self._planned.items()
            )
        return offset >= int(self._began.plan["end"])

    def _since_base(self, position: TrainingPlace) -> dict[str, int]:
        began = self._began
        before = {} if began is None or began.base is None else self._registry.manifest(began.base).metrics
        counts = position.counts()
        names = ("rows", "duplicate", "masked", "gap")
        learned = {name: counts[name] - int(before.get(f"account.{name}", 0)) for name in names}
        rows = {"rows": learned["rows"] - learned["duplicate"], "masked": learned["masked"]}
        if began is None or began.mode != "exact":
            return rows
        relearned = {
            source: (first, min(after, position.marks.get(source, first)))
            for source, (first, after) in self._planned.items()
        }
        return {**rows, "clicks": clicks_in(relearned) - learned["gap"]}

    def _write(self, position: TrainingPlace) -> None:
        if self._began is None or self._began.base is None:
            return
        now_ms = int(self._clock() * 1000)
        document: dict[str, Any] = {
            "at_ms": now_ms,
            "seconds": max(0, now_ms - self._began.created_at_ms) / 1000,
            "next": position.next,
            **self._since_base(position),
            "again": self._again or None,
        }
        if self._registry.generations.add_outcome(position.epoch, "learned", document):
            logger.info(
                "epoch %d: caught up %.1f s after the rollback: %d rows, of which %d were left out",
                *(position.epoch, document["seconds"], document["rows"], document["masked"]),
            )

    def _let_follow(self, control: Control) -> bool:
        """Lets serving follow the trainer. Returns whether this is settled."""
        action = "rollback" if self._began is None else self._began.action

        def caught_up(newest: Control) -> Control:
            if newest.epoch != control.epoch or not newest.serving.then_follow:
                return newest
            who, now_ms = f"trainer:{getpass.getuser()}", int(self._clock() * 1000)
            return follow(newest, actor=who, reason=f"caught up, as the {action} asked", now_ms=now_ms)

        try:
            self._registry.change(caught_up)
            killpoints.reach("caught.followed")
            return True
        except ControlConflict as refused:
            # Another process keeps changing control: try again after the next record.
            logger.info("%s", refused)
            return False
        except UnusableRegistry as error:
            if is_full(error):
                raise
            self._refused_s = self._elapsed()
            self._say(f"{error}; serving follows once control can be written")
            return False
