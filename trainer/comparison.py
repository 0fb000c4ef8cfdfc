"""A version beside what was computed anew: equal, different and where first, or not comparable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from state import probe
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from trainer.replay import ACCOUNT, Replay

if TYPE_CHECKING:
    from trainer.engine.step import Trainer
    from trainer.versions.difference import Difference


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        version: The version that was asked about.
        base: The version that the replay began from; 0 for nothing.
        first: The first offset replayed.
        next: The offset after the last one.
        steps: Steps done.
        rows: Rows read.
        outcome: `equal`, `different` or `not comparable`.
        environment: What differs there; only where not comparable.
        erased_rows: Rows learned of users whose rows are gone from the base; only where not comparable for that.
        difference: The first one; only where different.
        digest: Of the version's state.
        seconds: How long it took.
    """

    version: int
    base: int
    first: int
    next: int
    steps: int = 0
    rows: int = 0
    outcome: str = "equal"
    environment: tuple[str, ...] = ()
    erased_rows: int = 0
    difference: Difference | None = None
    digest: str = ""
    seconds: float = 0.0

    @property
    def origin(self) -> str:
        """What the replay began from, in words."""
        return f"version {self.base}" if self.base else "nothing"

    def with_result(self, done: Replay, difference: Difference | None, digest: str, seconds: float) -> Comparison:
        """The same, once the replay is done and compared."""
        return replace(
            self,
            steps=done.steps,
            rows=done.rows,
            outcome="not comparable" if done.unlike else "equal" if difference is None else "different",
            erased_rows=done.unlike,
            difference=None if done.unlike else difference,
            digest=digest,
            seconds=seconds,
        )

    def text(self) -> str:
        """What came out, for people, in one line."""
        what = f"recomputed from {self.origin}, training log offsets {self.first} to {self.next}: {self.steps} steps, {self.rows:,} rows"
        if self.erased_rows:
            return (
                f"version {self.version}: not comparable, because it learned {self.erased_rows:,} clicks of users who were "
                f"erased since, and version {self.base} has their rows no more; take a version made after the erasure"
            )
        if self.outcome == "not comparable":
            return f"version {self.version}: not comparable, because the environment differs: {'; '.join(self.environment)}"
        if self.outcome == "different":
            return f"version {self.version}: different ({what} in {self.seconds:.1f} s); first at {self.difference}"
        return f"version {self.version}: equal ({what} in {self.seconds:.1f} s); digest {self.digest[:16]}"

    def document(self) -> dict[str, Any]:
        """What came out, as JSON values."""
        difference = self.difference and {
            "table": self.difference.table,
            "field": self.difference.field,
            "id": None if self.difference.id is None else f"{self.difference.id:016x}",
            "position": self.difference.position,
            "kept": self.difference.kept,
            "recomputed": self.difference.recomputed,
        }
        return {
            "version": self.version,
            "outcome": self.outcome,
            "base": self.base,
            "log": {"first": self.first, "next": self.next},
            "steps": self.steps,
            "rows": self.rows,
            "environment": list(self.environment),
            "erased_rows": self.erased_rows,
            "difference": difference,
            "digest": self.digest,
            "seconds": round(self.seconds, 3),
        }


def compare(registry: Registry, target: Manifest, trainer: Trainer, done: Replay) -> tuple[Difference | None, str]:
    """The first difference between the version and what was computed, and the version's digest."""
    from trainer.versions import checkpoint, content
    from trainer.versions.difference import Difference, first_difference, marks_difference
    from trainer.versions.erased_rows import CrossedIds, without

    base, deltas = registry.chain(target.version)
    # What a version was asked to show that it answers rightly is no state.
    kept = probe.without(content.merge(checkpoint.tensors_of(registry, part) for part in (base, *deltas)))
    computed, control = checkpoint.full(trainer), registry.control()
    if control is not None and any(part.rewritten > part.erased for part in (base, *deltas)):
        gone = control.erased.after(target.erased).users
        kept, computed = (without(one, gone, CrossedIds(trainer.crosses).see(one)) for one in (kept, computed))
    found = first_difference(kept, computed) or marks_difference(target.marks, done.marks)
    for name in ACCOUNT:
        counted = target.metrics.get(f"account.{name}")
        if found is None and counted is not None and int(counted) != done.account[name]:
            found = Difference(f"account.{name}", "", None, None, str(int(counted)), str(done.account[name]))
    return found, content.digest(kept)
