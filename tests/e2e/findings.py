"""What a chaos run found: figures to print, and what must not be."""

from __future__ import annotations

import os
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from tests.e2e.client import Answers
from tests.e2e.evidence import LogDifference
from tests.e2e.operator import Rollbacks

# A part may end by itself while the broker is away; its supervisor starts it again.
EXCUSED_ENDS = frozenset({"UnreachableBroker", "LogError"})


@dataclass
class Findings:
    """Filled in as a run goes on.

    Attributes:
        seed: Of the run.
        kills: (part, kill point or "anywhere") -> kill -9.
        ends: (part, class of error) -> ends that nobody caused.
        back_s: Part -> seconds from its death until it worked again.
        clicks: Records in the clicks topic.
        rows: Distinct rows in the micro-batch log.
        records: Micro-batches in it.
        again: Rows written again after a crash.
        differing: Of them, those with other bytes than the first time.
        gaps: Positions that no micro-batch covers.
        abandoned: Micro-batches that exact rollbacks left behind.
        masked: Clicks left out at the end.
        rollbacks: What became of the operator's.
        labels: Impressions by what became of them, where labels come later.
        changes: Changes of attributes, where there are any.
        log: In what the log differs from an undisturbed stream's.
        doubled: Rows that the trainer learned twice; negative where some were never learned.
        differs: (what is compared) -> in what it differs; empty lists are proofs.
        spot_checks: How often serving's rows were compared in the middle of it.
        answers: What the client got.
        seconds: How long it took.
    """

    seed: int
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    back_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    clicks: int = 0
    rows: int = 0
    records: int = 0
    again: int = 0
    differing: int = 0
    gaps: int = 0
    abandoned: int = 0
    masked: int = 0
    rollbacks: Rollbacks = field(default_factory=Rollbacks)
    labels: dict[str, int] = field(default_factory=dict)
    changes: int = 0
    log: LogDifference = field(default_factory=lambda: LogDifference(0, 0, 0))
    doubled: int = 0
    versions: int = 0
    differs: dict[str, list[str]] = field(default_factory=dict)
    spot_checks: int = 0
    answers: Answers = field(default_factory=Answers)
    seconds: float = 0.0

    @property
    def killed(self) -> int:
        """All kills."""
        return sum(self.kills.values())

    def problems(self) -> list[str]:
        """What must not be; empty where all promises were kept."""
        found = [f"{what}: {', '.join(names[:8])}" for what, names in self.differs.items() if names]
        for name, count in (
            ("rows lost from the log", self.log.lost),
            ("rows in the log that no undisturbed stream makes", self.log.invented),
            ("rows with other bytes than an undisturbed stream's", self.log.changed),
            ("rows written again with other bytes", self.differing),
            ("positions that no micro-batch covers", self.gaps),
            ("rows learned twice (negative: never)", self.doubled),
            ("answers by an older version than the one before", self.answers.went_back),
            ("answers by another version than the one they were to stay at", self.answers.strayed),
            ("answers that mixed versions", self.answers.mixed),
        ):
            if count:
                found.append(f"{count} {name}")
        found += [f"{count} questions failed: {reason}" for reason, count in self.answers.failed.items()]
        found += [
            f"{part} ended by itself {count} times: {error}"
            for (part, error), count in self.ends.items()
            if error not in EXCUSED_ENDS
        ]
        return found

    def times_s(self) -> dict[str, list[float]]:
        """What took how long, each time that it happened."""
        found = {f"back after a kill: {part}": times for part, times in self.back_s.items()}
        found["back after a kill: worker"] = self.answers.away_s
        found["rollback: until an answer is of its version"] = self.rollbacks.answered_s
        return {what: times for what, times in found.items() if times}

    def lines(self) -> list[str]:
        """The findings for people."""
        found = [
            f"seed {self.seed}: {self.killed} kills in {self.seconds:.0f} s on {os.cpu_count()} processors under a load of "
            f"{os.getloadavg()[1]:.0f}",
            "",
        ]
        by_part: dict[str, list[str]] = defaultdict(list)
        for (part, point), count in sorted(self.kills.items()):
            by_part[part].append(f"{point} {count}")
        for part, points in by_part.items():
            total = sum(count for (one, _), count in self.kills.items() if one == part)
            found.append(f"  {part:<10} {total:>4}   {', '.join(points)}")
        found += [
            "",
            f"clicks            {self.clicks:,}; {self.rows:,} rows in {self.records:,} micro-batches",
            *(
                [f"impressions       {', '.join(f'{n:,} {what}' for what, n in self.labels.items())}"]
                if self.labels
                else []
            ),
            *([f"attributes        {self.changes:,} changes"] if self.changes else []),
            f"rollbacks         {self.rollbacks.modes['exact']} exact, {self.rollbacks.modes['fast']} fast, {self.rollbacks.interrupting} "
            f"of them during another; {self.masked:,} clicks left out, {self.abandoned:,} micro-batches abandoned",
            f"commands          {self.rollbacks.retyped} typed again, {self.rollbacks.conflicts} told of another's, "
            f"{self.rollbacks.unchanged} typed twice",
            f"written again     {self.again:,} rows, {self.differing} with other bytes",
            f"lost              {self.log.lost}",
            f"doubled           {self.doubled}",
            f"changed, invented {self.log.changed}, {self.log.invented}",
            f"versions          {self.versions:,}",
        ]
        found += [
            f"{what:<44} {'equal' if not names else 'DIFFERS in ' + ', '.join(names[:8])}"
            for what, names in self.differs.items()
        ]
        answers = self.answers
        found += [
            f"spot checks of serving's rows               {self.spot_checks}",
            f"answers           {answers.given:,} given, {sum(answers.failed.values())} failed, {answers.excused} missing "
            f"while the worker was dead or not back; the slowest {answers.longest_s * 1000:.0f} ms",
            "",
        ]
        found += [
            f"{what:<44} {len(times):>3} times, median {statistics.median(times):5.1f} s, most {max(times):5.1f} s"
            for what, times in self.times_s().items()
        ]
        found += [
            f"ended by itself   {part}: {error}, {count} times" for (part, error), count in sorted(self.ends.items())
        ]
        problems = self.problems()
        found += ["", *(f"PROBLEM: {one}" for one in problems)] if problems else ["", "every promise was kept"]
        return found
