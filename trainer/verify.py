"""Recomputes a version from a base and the training log: `springtide verify VERSION`.

1. The line of the version is followed back to a base (or to `--from`), epoch
   by epoch; each epoch's part of the log has its own mask.
2. An environment that differs from the version's makes the two not comparable.
3. The base is restored and the log replayed, record by record.
4. Rows ordered by id, accumulators, dense weights, slots, counters, marks and
   the account are compared bit by bit.

It runs beside the live system: it reads the registry and the log with its own
reader, takes no lock and writes nothing. Exit codes: 0 equal, 1 different, not
comparable, or not replayable any more; 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from state import layout
from state.config.settings import Settings, load
from state.errors import GapError, LogError, RegistryError, SpringtideError, UnknownVersion, of_disk
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.log import LogReader, Reader, Topics, accepted_gaps
from state.log.accepted_gaps import Accepted, Journal
from state.positions import Source
from state.process.quiet_stderr import hushed, own_stderr, quieten
from state.registry.control import Control
from state.registry.manifest import Manifest, sees
from state.registry.registry import Registry
from trainer.intake import take_in

if TYPE_CHECKING:
    from trainer.engine.step import Trainer
    from trainer.versions.difference import Difference

NICENESS = 10
RECORDS = 64
POLL_S = 0.2
PROGRESS_S = 1.0
ACCOUNT = ("rows", "duplicate", "masked")


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the training log that was learned under one mask.

    Attributes:
        first: Its first offset.
        next: The offset after it.
        mask: The rows left out.
    """

    first: int
    next: int
    mask: Mask


@dataclass(frozen=True)
class Verdict:
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
    difference: Difference | None = None
    digest: str = ""
    seconds: float = 0.0

    @property
    def origin(self) -> str:
        """What the replay began from, in words."""
        return f"version {self.base}" if self.base else "nothing"

    def text(self) -> str:
        """The verdict for people, in one line."""
        what = f"recomputed from {self.origin}, training log offsets {self.first} to {self.next}: {self.steps} steps, {self.rows:,} rows"
        if self.outcome == "not comparable":
            return f"version {self.version}: not comparable, because the environment differs: {'; '.join(self.environment)}"
        if self.outcome == "different":
            return f"version {self.version}: different ({what} in {self.seconds:.1f} s); first at {self.difference}"
        return f"version {self.version}: equal ({what} in {self.seconds:.1f} s); digest {self.digest[:16]}"

    def document(self) -> dict[str, Any]:
        """The verdict as JSON values."""
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
            "difference": difference,
            "digest": self.digest,
            "seconds": round(self.seconds, 3),
        }


def base_of(registry: Registry, target: Manifest, wanted: int | None) -> Manifest | None:
    """The version to begin from: the one asked for, else the nearest base below `target`; None to begin from nothing.

    Raises:
        UnknownVersion: There is none, it is not kept, or it does not lead to `target`.
    """
    if wanted is not None:
        if wanted > target.version or not sees(target.visible, wanted):
            raise UnknownVersion(
                f"version {target.version} does not descend from version {wanted}; leave --from out, or take one of "
                "`springtide versions` on its line"
            )
        return registry.manifest(wanted)
    below = [one for one in registry.bases() if one < target.version and sees(target.visible, one)]
    if below:
        return registry.manifest(below[-1], "base")
    if target.parent is None:
        return None
    raise UnknownVersion(
        f"version {target.version} cannot be recomputed: no base before it is kept; versions made after the oldest kept "
        "base can, see `springtide versions --all` and registry.base_keep_h"
    )


def segments_of(
    registry: Registry, controls: Sequence[Control], base: Manifest | None, target: Manifest
) -> list[Segment]:
    """The parts of the log from `base` to `target`, oldest first, each with its epoch's mask.

    Raises:
        UnknownVersion: A version that an epoch began from is not kept any more.
    """
    began = {control.epoch: control for control in reversed(controls)}
    found: list[Segment] = []
    epoch, end = target.epoch, target.log.next
    while base is not None and epoch != base.epoch:
        start = began[epoch].base
        if start is None:
            raise UnknownVersion(f"epoch {epoch} began from nothing: version {base.version} does not lead to it")
        turned = registry.manifest(start)
        found.append(Segment(turned.log.next, end, began[epoch].mask))
        epoch, end = turned.epoch, turned.log.next
    first = target.log.first if base is None else base.log.next
    found.append(Segment(first, end, began[epoch].mask if epoch in began else Mask.NONE))
    return found[::-1]


class Replay:
    """Learns the records of the log again. One thread.

    Args:
        trainer: At the base.
        base: Its manifest; None for nothing.
        spec: Digest of the feature spec.
        salt: Fingerprint of the salt.
        where: Names an offset, for messages.
    """

    def __init__(self, trainer: Trainer, base: Manifest | None, spec: str, salt: str, where: str) -> None:
        self._trainer, self._spec, self._salt, self._where = trainer, spec, salt, where
        self.marks = {} if base is None else base.marks
        counted = {} if base is None else base.metrics
        self.account = {name: int(counted.get(f"account.{name}", 0)) for name in ACCOUNT}
        self.steps = self.rows = 0

    def take(self, offset: int, value: bytes | None, mask: Mask) -> None:
        """One record is one step, as in the trainer's loop.

        Raises:
            MicroBatchError: The record cannot be read.
        """
        found = take_in(value, self.marks, mask, self._spec, self._salt, f"{self._where} offset {offset}")
        self.marks = found.marks
        self.rows += found.rows
        for name in ACCOUNT:
            self.account[name] += getattr(found, name)
        if len(found.batch) == 0:
            return
        if self._trainer.guard.held:
            # Nothing is learned while training is held: somebody let it go on from here.
            self._trainer.guard = replace(self._trainer.guard, held=False, skipped=0)
        self._trainer.step(found.batch)
        self.steps += 1


def replay(
    log: LogReader,
    segments: Sequence[Segment],
    accepted: Sequence[Accepted],
    partition: int,
    learn: Callable[[int, bytes | None, Mask], None],
    open_at: Callable[[int], LogReader],
    patience_s: float,
    progress: Callable[[int], None] = lambda _: None,
    elapsed: Callable[[], float] = time.monotonic,
) -> None:
    """Gives each record of the segments to `learn`, in order.

    A rollback makes a segment begin before the one before it ended: the log is
    opened again there. Closes what it opened.

    Args:
        log: Open at the first segment.
        segments: Oldest first.
        accepted: Gaps that the trainer passed.
        partition: The log's partition.
        learn: Takes offset, value and mask.
        open_at: Opens the log at an offset.
        patience_s: The longest wait for a record that must be there.
        progress: Told the number of positions done.
        elapsed: Monotonic seconds.

    Raises:
        GapError: Records are gone.
        LogError: They do not come.
    """
    done = 0
    try:
        for segment in segments:
            at = accepted_gaps.past(accepted, Source(log.topic_id, partition), segment.first)
            if log.position(partition) != at:
                log.close()
                log = open_at(at)
            waited_s = elapsed()
            while log.position(partition) < segment.next:
                try:
                    batches = log.poll(POLL_S, RECORDS)
                except GapError as error:
                    over = accepted_gaps.past(accepted, Source(log.topic_id, partition), log.position(partition))
                    if not any(over == gap.next for gap in error.gaps):
                        raise
                    log.close()
                    log = open_at(over)
                    continue
                for batch in batches:
                    for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
                        if offset < segment.next:
                            learn(offset, value, segment.mask)
                            progress(done + offset - segment.first)
                    waited_s = elapsed()
                if elapsed() - waited_s > patience_s:
                    raise LogError(
                        f"the training log gave nothing after offset {log.position(partition)} for {patience_s:g} s, and "
                        f"the version needs it up to {segment.next}; look after the broker and try again"
                    )
            done += segment.next - segment.first
    finally:
        log.close()


def compare(registry: Registry, target: Manifest, trainer: Trainer, done: Replay) -> tuple[Difference | None, str]:
    """The first difference between the version and what was computed, and the version's digest."""
    from trainer.versions import checkpoint, content
    from trainer.versions.difference import Difference, first_difference, marks_difference

    base, deltas = registry.chain(target.version)
    kept = content.merge(checkpoint.tensors_of(registry, part) for part in (base, *deltas))
    found = first_difference(kept, checkpoint.full(trainer)) or marks_difference(target.marks, done.marks)
    for name in ACCOUNT:
        counted = target.metrics.get(f"account.{name}")
        if found is None and counted is not None and int(counted) != done.account[name]:
            found = Difference(f"account.{name}", "", None, None, str(int(counted)), str(done.account[name]))
    return found, content.digest(kept)


def verify(
    settings: Settings,
    registry: Registry,
    version: int,
    wanted_base: int | None,
    make_trainer: Callable[[], Trainer],
    open_log: Callable[[str, int], LogReader],
    say: Callable[[str], None] = lambda _: None,
    elapsed: Callable[[], float] = time.monotonic,
) -> Verdict:
    """Recomputes `version`; see the module.

    Args:
        settings: All settings: those that the trainer has.
        registry: Is only read.
        version: The version.
        wanted_base: Where to begin; None for the nearest base before it.
        make_trainer: Makes a new trainer; called once.
        open_log: Opens the training log by name at an offset.
        say: Takes progress lines.
        elapsed: Monotonic seconds.

    Raises:
        UnknownVersion: It, or what it is made from, is not kept.
        GapError: The log does not reach back to the base any more.
        SpringtideError: Registry or log cannot be read.
    """
    began_s = elapsed()
    # 1.
    target = registry.manifest(version)
    base = base_of(registry, target, wanted_base)
    segments = segments_of(registry, registry.controls(), base, target)
    accepted = Journal(registry.path / layout.GAPS).accepted()
    verdict = Verdict(version, 0 if base is None else base.version, segments[0].first, target.log.next)
    total = sum(segment.next - segment.first for segment in segments)
    say(f"verify: {total} positions of the training log, from {verdict.origin} to version {version}")
    trainer = make_trainer()
    # 2.
    from trainer.versions import checkpoint
    from trainer.versions.difference import environment_differences

    differs = environment_differences(target.environment, checkpoint.environment(settings, trainer.device))
    if differs:
        return replace(verdict, outcome="not comparable", environment=tuple(differs), seconds=elapsed() - began_s)
    # 3.
    if base is None:
        checkpoint.begin(trainer, registry.spec(target.spec))
    else:
        checkpoint.restore(registry, base.version, trainer, target.spec)
    topic, partition = target.log.topic, target.log.partition
    done = Replay(trainer, base, target.spec, target.salt, f"{topic}:{partition}")
    if total:
        replay_log(settings, target, verdict, segments, accepted, done, open_log, say, elapsed)
    # 4.
    difference, digest = compare(registry, target, trainer, done)
    return replace(
        verdict,
        steps=done.steps,
        rows=done.rows,
        outcome="equal" if difference is None else "different",
        difference=difference,
        digest=digest,
        seconds=elapsed() - began_s,
    )


def replay_log(
    settings: Settings,
    target: Manifest,
    verdict: Verdict,
    segments: Sequence[Segment],
    accepted: Sequence[Accepted],
    done: Replay,
    open_log: Callable[[str, int], LogReader],
    say: Callable[[str], None],
    elapsed: Callable[[], float],
) -> None:
    """Opens the log of `target` and replays it, with a progress line a second.

    Raises:
        GapError: The log does not reach back to the base any more.
        LogError: It cannot be read, or was made anew.
    """
    topic, partition = target.log.topic, target.log.partition
    began: tuple[float, int] | None = None
    said_s = elapsed()
    total = sum(segment.next - segment.first for segment in segments)

    def open_at(offset: int) -> LogReader:
        try:
            log = open_log(topic, offset)
        except GapError as error:
            raise GapError(
                f"version {target.version} cannot be recomputed from {verdict.origin}: the training log no longer "
                f"reaches back ({error}); take a younger base with --from, or a younger version"
            ) from error
        if log.topic_id != target.log.topic_id:
            log.close()
            raise LogError(
                f"version {target.version} was trained on topic id {target.log.topic_id}, {topic} is now {log.topic_id}: it was "
                "deleted and made again, so that nothing before can be recomputed"
            )
        return log

    def progress(positions: int) -> None:
        nonlocal said_s, began
        now_s = elapsed()
        # The first step compiles: the pace is measured from there.
        began = began or (now_s, positions)
        if now_s - said_s < PROGRESS_S or positions <= began[1]:
            return
        said_s = now_s
        left_s = (now_s - began[0]) / (positions - began[1]) * max(0, total - positions)
        say(f"verify: {positions} of {total} positions, {done.steps} steps, {done.rows:,} rows, {left_s:.0f} s left")

    first = accepted_gaps.past(accepted, Source(target.log.topic_id, partition), segments[0].first)
    patience_s = settings.kafka.request_timeout_s
    replay(open_at(first), segments, accepted, partition, done.take, open_at, patience_s, progress, elapsed)


def run(settings: Settings, version: int, wanted_base: int | None, say: Callable[[str], None]) -> Verdict:
    """Recomputes a version of the registry that the settings name.

    Raises:
        SpringtideError: See `verify`.
    """
    if not (settings.registry_dir / layout.VERSIONS).is_dir():
        raise RegistryError(f"there is no registry at {settings.registry_dir}; correct paths.state or paths.registry")
    registry = Registry(settings.registry_dir)
    spec = FeatureSpec.from_settings(settings)

    def make_trainer() -> Trainer:
        # TensorFlow is loaded only once the version is known to be there.
        with hushed():
            from trainer import device
            from trainer.engine.step import Trainer
            from trainer.versions.program import preprocessing_of

            device.prepare(settings.trainer.device, settings.trainer.threads)
            return Trainer(settings, spec, preprocessing_of(registry.transform(spec.digest)))

    def open_log(topic: str, offset: int) -> Reader:
        partition = registry.manifest(version).log.partition
        with Topics(settings.kafka) as topics:
            _, end = topics.ends(topic)[partition]
        needed = registry.manifest(version).log.next
        if end < needed:
            raise LogError(
                f"topic {topic} partition {partition} ends at {end} and version {version} was trained up to {needed}: it was "
                "truncated, or another cluster answers"
            )
        return Reader(settings.kafka, topic, [partition], {partition: offset})

    return verify(settings, registry, version, wanted_base, make_trainer, open_log, say)


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies one version; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="springtide verify",
        allow_abbrev=False,
        description="Recompute a version from its base and the training log, and compare every bit. Runs beside the loop.",
        epilog="Settings are written --section.name VALUE. Exit codes: 0 equal, 1 different, not comparable or not replayable, 2 wrong use.",
    )
    parser.add_argument("version", type=int, metavar="VERSION", help="the version, of `springtide versions`")
    parser.add_argument(
        "--from", type=int, dest="base", metavar="BASE", help="begin at this version (default: the nearest base before)"
    )
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="how to print (default text)")
    asked, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    with own_stderr() as errors:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=errors)
        for noisy in ("kafka", "absl", "tensorflow"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        quieten(os.environ)
        os.nice(NICENESS)

        def say(line: str) -> None:
            print(line, file=errors, flush=True)

        try:
            verdict = run(load(flags, os.environ), asked.version, asked.base, say)
        except (SpringtideError, OSError) as problem:
            error = of_disk(problem)
            say(f"springtide: {error}")
            return error.exit_code
    print(json.dumps(verdict.document(), indent=2) if asked.output == "json" else verdict.text())
    return 0 if verdict.outcome == "equal" else 1


if __name__ == "__main__":
    sys.exit(main())
