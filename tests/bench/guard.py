"""The guard of updates against poison in clean traffic: how soon, how much was answered from before, and how often for nothing.

    python -m tests.bench.guard [--only week|shoppers|taobao|kuairand] [--rows N] [--guard.window_s S ...]

week: synthetic shoppers over seven days, whose tastes drift and who hardly click at night. shoppers: the default
ones of `springtide up`, at 200 clicks a second. taobao, kuairand: what is recorded, nine and six days.

Users who click are in five made-up segments, an attribute by which the trainer measures; of KuaiRand's it is one of theirs.

Each runs clean once: versions that waited for nothing and false holds a week are counted. At 60 % of it weights and
guard are kept, and each poison begins there anew, for as long as it takes to be held, or to its end:

    labels          each click's category is drawn from all; of impressions each label is turned
    one slice       the same, of the users of one value of an attribute: some 15 % of the rows
    one user        makes half of the rows, all of one item
    stuck user      sends one click of his a third of the time
    one item        is in half of the rows, whoever clicks
    not finite      every third record has a weight that is not finite
    refused         three of ten records are refused
    tenfold         ten times the clicks in the same time: no poison, and not to be held

Delay is from the first poisoned row to the verdict; `offered` are poisoned rows in a version that passed, `answered` the
log time from the first such version to the verdict, which turns answers back.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from state.attributes.values import AttributeTable
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import fields_of
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from tests.bench.recorded import (
    KUAIRAND_SETTINGS,
    U64,
    Recorded,
    made_clicks,
    micro_batches,
    read_clicks,
    read_impressions,
)
from tests.bench.report import Figure, Stages, report
from trainer.engine.step import Trainer
from trainer.guard import WindowStart
from trainer.holding import Standing, WindowWatch, figures_of
from trainer.versions import checkpoint

WEEK_S = 7 * 86_400
SEED = 11
DATA = ("week", "shoppers", "taobao", "kuairand")
SEGMENTS = "aaaaaaabbbbcccdddeee"
"""Segments of users who click, each user one by his id: 35, 20 and three times 15 % of them."""
SEGMENTED = (
    *("--attributes.user_topic", "segments", "--attributes.user_fields", "segment"),
    *("--attributes.slices", "segment"),
)  # fmt: skip
SLICE_SHARE = 0.15
NIGHT = 0.8
"""How much fewer clicks there are at the quietest hour than on average."""

Change = Callable[[Recorded, slice, np.random.Generator], None]
Batched = Callable[[MicroBatch, int], MicroBatch]


@dataclass(frozen=True)
class Traffic:
    """Clean traffic.

    Attributes:
        settings: It is read and learned with.
        recorded: All of it.
        step_rows: Rows of a micro-batch.
    """

    settings: Settings
    recorded: Recorded
    step_rows: int

    def batches(self, recorded: Recorded, begin: int = 0) -> Iterator[MicroBatch]:
        """Its micro-batches, or those of a version of it."""
        spec = FeatureSpec.from_settings(self.settings)
        weights = self.settings.events.action_weights
        return micro_batches(recorded, spec, weights, self.step_rows, begin=begin)


@dataclass(frozen=True)
class Poison:
    """What goes wrong.

    Attributes:
        rows: Changes what is recorded between two places.
        batch: Changes a micro-batch, which has its number.
        is_bad: Whether it is to be held.
    """

    rows: Change = lambda recorded, part, chance: None
    batch: Batched = lambda batch, number: batch
    is_bad: bool = True


@dataclass
class Outcome:
    """What the guard did.

    Attributes:
        seconds: Log time that passed.
        waited_s: Of it, log time for which versions waited.
        rule: By which it held; empty where it did not.
        rows: Rows from the beginning to the verdict, or to the end.
        offered: Rows of them in a version that passed.
        answered_s: Log time between the first such version and the verdict that keeps others back.
        holds: Verdicts to hold.
    """

    seconds: float = 0.0
    waited_s: float = 0.0
    rule: str = ""
    rows: int = 0
    offered: int = 0
    answered_s: float = 0.0
    holds: int = 0


def traffic(name: str, rows: int | None = None, flags: tuple[str, ...] = ()) -> Traffic:
    """One of DATA, its first `rows` rows or all that is taken of it by default."""
    if name == "kuairand":
        settings = load(["--config", str(KUAIRAND_SETTINGS), *flags], env={})
        found = read_impressions(settings)
        return Traffic(settings, _first(found, rows or found.users.size), 512)
    if name == "taobao":
        settings = load([*SEGMENTED, *flags], env={})
        found = _segmented(read_clicks(), settings)
        return Traffic(settings, _first(found, rows or found.users.size), 256)
    slow = ("--shoppers.users", "1000") if name == "week" else ()
    count = rows or (200_000 if name == "week" else 150_000)
    pace = ("--shoppers.rate", str(count / WEEK_S)) if name == "week" else ()
    settings = load([*SEGMENTED, *slow, *pace, *flags], env={})
    found = _segmented(made_clicks(settings, count, drift_s=2 * 86_400.0 if name == "week" else 120.0), settings)
    if name == "week":
        _warp(found)
    return Traffic(settings, found, 256)


def _segmented(recorded: Recorded, settings: Settings) -> Recorded:
    """The same clicks, of users who are in a segment."""
    table = AttributeTable("user", fields_of(settings.attributes.user_fields))
    ids = np.array([table.ids([segment]) for segment in SEGMENTS], np.uint64)
    of = (recorded.users % np.uint64(len(SEGMENTS))).astype(np.int64)
    return replace(recorded, user_attributes=ids[of], attributes=(table.names, ()))


def _warp(recorded: Recorded) -> None:
    """Most clicks come by day: the same clicks in the same order, at other times."""
    at_ms = recorded.events["at_ms"]
    first = int(at_ms[0])
    clock = np.linspace(0.0, WEEK_S * 1.1, 20_000)
    done = clock + NIGHT * 86_400 / (2 * np.pi) * (1 - np.cos(2 * np.pi * clock / 86_400))
    recorded.events["at_ms"] = first + (1000 * np.interp((at_ms - first) / 1000, done, clock)).astype(np.int64)


def _first(recorded: Recorded, rows: int) -> Recorded:
    names = ("users", "events", "label", "context", "user_attributes", "item_attributes", "measured")
    return replace(recorded, **{name: getattr(recorded, name)[:rows] for name in names})


def _copy(recorded: Recorded) -> Recorded:
    return replace(
        recorded, users=recorded.users.copy(), events=recorded.events.copy(), label=recorded.label.copy()
    )  # fmt: skip


def _labels(recorded: Recorded, part: slice, chance: np.random.Generator) -> None:
    _wrong_labels(recorded, np.arange(part.start, part.stop), chance)


def _one_slice(recorded: Recorded, part: slice, chance: np.random.Generator) -> None:
    values = recorded.user_attributes[:, 0]
    rows = part.start + np.flatnonzero(values[part] == value_with_share(values, SLICE_SHARE))
    _wrong_labels(recorded, rows, chance)


def value_with_share(values: U64, share: float) -> int:
    """The value that nearest to this share of the rows have."""
    known, counts = np.unique(values, return_counts=True)
    return int(known[np.abs(counts / values.size - share).argmin()])


def _wrong_labels(recorded: Recorded, rows: npt.NDArray[np.int64], chance: np.random.Generator) -> None:
    if np.isnan(recorded.label).all():
        categories = np.unique(recorded.events["category"])
        recorded.events["category"][rows] = chance.choice(categories, rows.size)
    else:
        recorded.label[rows] = 1 - recorded.label[rows]


def _one_user(share: float) -> Change:
    def change(recorded: Recorded, part: slice, chance: np.random.Generator) -> None:
        rows = part.start + np.flatnonzero(chance.random(part.stop - part.start) < share)
        recorded.users[rows] = recorded.users[part.start]
        _one_item_of(recorded, rows, part.start)

    return change


def _one_item(recorded: Recorded, part: slice, chance: np.random.Generator) -> None:
    rows = part.start + np.flatnonzero(chance.random(part.stop - part.start) < 0.5)
    _one_item_of(recorded, rows, part.start)


def _one_item_of(recorded: Recorded, rows: npt.NDArray[np.int64], of: int) -> None:
    for name in ("item", "category"):
        recorded.events[name][rows] = recorded.events[name][of]


def _not_finite(batch: MicroBatch, number: int) -> MicroBatch:
    return batch if number % 3 else replace(batch, weight=np.full(len(batch), np.inf, np.float32))


def _refused(batch: MicroBatch, number: int) -> MicroBatch:
    kept = np.arange(len(batch)) % 10 >= 3
    ranges = tuple(
        replace(part, rows=int(kept.sum()), dead=int((~kept).sum())) for part in batch.header.ranges
    )  # fmt: skip
    return replace(batch.take(kept), header=replace(batch.header, ranges=ranges))


def _tenfold(recorded: Recorded, part: slice, chance: np.random.Generator) -> None:
    at_ms = recorded.events["at_ms"]
    at_ms[part] = at_ms[part.start] + (at_ms[part] - at_ms[part.start]) // 10


POISONS: dict[str, Poison] = {
    "labels": Poison(_labels),
    "one slice": Poison(_one_slice),
    "one user": Poison(_one_user(0.5)),
    "stuck user": Poison(_one_user(1 / 3)),
    "one item": Poison(_one_item),
    "not finite": Poison(batch=_not_finite),
    "refused": Poison(batch=_refused),
    "tenfold": Poison(_tenfold, is_bad=False),
}


class Judged:
    """A trainer and its guard, with which one run goes on from another.

    Args:
        clean: What is learned.
    """

    def __init__(self, clean: Traffic) -> None:
        limits = clean.settings.guard
        self._trainer = Trainer(clean.settings, FeatureSpec.from_settings(clean.settings))
        self._watch = WindowWatch(limits)
        self._offset = 0

    def keep(self) -> Callable[[], None]:
        """Remembers everything; what is returned goes back to it."""
        full, watch, offset = checkpoint.full(self._trainer), self._watch.state(), self._offset

        def back() -> None:
            checkpoint.load(self._trainer, full)
            self._watch.load(watch)
            self._offset = offset

        return back

    def run(self, batches: Iterator[MicroBatch], ends: bool, say: Callable[[int], None]) -> Outcome:
        """Learns until the end, or until the first verdict to hold where that `ends` it."""
        found, began_ms, offered_ms = Outcome(), self._trainer.counters.log_ms, 0
        for batch in batches:
            before_ms = self._trainer.counters.log_ms
            done = self._trainer.step(batch)
            log_ms = self._trainer.counters.log_ms
            began_ms = began_ms or log_ms
            start = WindowStart(self._offset, before_ms)
            judged = self._watch.take(figures_of(batch, done, log_ms), start)
            self._offset += 1
            found.rows += len(batch)
            found.seconds = (log_ms - began_ms) / 1000
            if judged.standing is Standing.PASS:
                found.offered, offered_ms = found.rows, offered_ms or log_ms
            else:
                found.waited_s += (log_ms - before_ms) / 1000
            found.answered_s = (log_ms - offered_ms) / 1000 if offered_ms else 0.0
            stopped = self._trainer.guard.held
            if judged.standing is Standing.HOLD or stopped:
                found.holds += 1
                found.rule = judged.rule if judged.standing is Standing.HOLD else "steps"
                if ends:
                    return found
                self._trainer.guard = replace(self._trainer.guard, held=False, skipped=0)
            say(found.rows)
        return found


def measure(name: str, clean: Traffic, progress: Stages) -> dict[str, Figure]:
    """Clean traffic once, and each poison in it."""
    recorded = clean.recorded
    total = recorded.users.size
    at = total * 6 // 10 // clean.step_rows * clean.step_rows
    judged = Judged(clean)

    def say(stage: str, of: int) -> Callable[[int], None]:
        return lambda rows: progress.say(f"{name}, {stage}", f"{rows:,} of {of:,} rows")

    first = judged.run(clean.batches(_first(recorded, at)), False, say("clean to the poisons", at))
    back = judged.keep()
    rest = judged.run(clean.batches(recorded, at), False, say("clean behind them", total - at))
    print(f"{name}: clean: {first}, {rest}", file=sys.stderr)
    seconds = first.seconds + rest.seconds
    figures = {
        f"{name}: clean rows": Figure(total, "rows"),
        f"{name}: clean log time": Figure(seconds / 86_400, "days"),
        f"{name}: false holds": Figure(first.holds + rest.holds, "holds"),
        f"{name}: false holds a week": Figure((first.holds + rest.holds) * WEEK_S / seconds, "a week", "<= 1"),
        f"{name}: log time for which clean versions waited": Figure(
            100 * (first.waited_s + rest.waited_s) / seconds, "%", "<= 1"
        ),
    }
    for poison, how in POISONS.items():
        back()
        changed = _copy(recorded)
        how.rows(changed, slice(at, total), np.random.default_rng(SEED))
        numbered = enumerate(clean.batches(changed, at))
        batches = (how.batch(batch, number) for number, batch in numbered)
        found = judged.run(batches, how.is_bad, say(poison, total - at))
        print(f"{name}: {poison}: {found}", file=sys.stderr)
        if not how.is_bad:
            figures[f"{name}: {poison}: holds"] = Figure(found.holds, "holds", "<= 0")
            continue
        figures |= {
            f"{name}: {poison}: held ({found.rule or 'not'})": Figure(float(bool(found.rule)), "", ">= 1"),
            f"{name}: {poison}: delay": Figure(found.rows, "rows"),
            f"{name}: {poison}: delay in log time": Figure(found.seconds, "s"),
            f"{name}: {poison}: offered": Figure(found.offered, "rows"),
            f"{name}: {poison}: answered": Figure(found.answered_s, "s"),
        }
    return figures


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=DATA, help="one of the kinds of clean traffic")
    parser.add_argument("--rows", type=int, default=None, help="take so many rows of it")
    asked, flags = parser.parse_known_args()
    progress = Stages("guard", 5.0)
    for name in (asked.only,) if asked.only else DATA:
        clean = traffic(name, asked.rows, tuple(flags))
        limits = dataclasses.asdict(clean.settings.guard)
        report(f"guard-{name}", measure(name, clean, progress), {"limits": limits, "step_rows": clean.step_rows})


if __name__ == "__main__":
    main()
