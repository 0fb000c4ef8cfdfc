"""What an exact rollback needs and costs: where the log branches, the clicks read again, the histories rebuilt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from deploy.operate.log_view import LogView
from state import layout
from state.config.settings import Settings
from state.errors import LogError, StoreError, UnfitVersion
from state.registry import log_line
from state.registry.control import Control
from state.registry.goals import ClickRanges, clicks_in, learned_before
from state.registry.log_line import LogLine
from state.registry.manifest import Manifest
from state.registry.registry import Registry


@dataclass(frozen=True)
class ExactPlan:
    """What an exact rollback does beside a fast one.

    Attributes:
        line: The line of the training log that turns off at the version.
        again: The clicks that are read again until the trainer has learned what it had learned before.
        histories: Users whose history has to be found in the training log again; None where no stream's store is here,
            or it has gone back already.
    """

    line: LogLine
    again: ClickRanges
    histories: int | None = None

    def lines(self) -> list[str]:
        """It for people, one line per fact.

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
        to: The version gone back to.
        view: Of the log.
        again: The clicks that are read again, where they are known; those learned since `to`, or before a rollback
            that this one interrupts, where they are not.

    Raises:
        UnfitVersion: The clicks no longer reach back to the version.
        LogError: Kafka does not answer, or the clicks topic was made anew.
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
    """The plan with how many users' histories have lost events that they had at `to`.

    Args:
        plan: Of the rollback.
        settings: All settings.
        line: The line of the log as it is before.
        to: The version.
        view: Of the log.

    Raises:
        LogError: The log cannot be read.
    """
    # Not at the top: they load the window kernel, which no other command needs.
    from state.history.rewinding import line_of, records
    from state.history.since import Since
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
