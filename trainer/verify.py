"""Recomputes a version from a base and the training log: `springtide verify VERSION`.

1. The branch of the version is followed back to a base (or to `--from`), epoch by epoch, not beyond an upgrade. Each
   epoch's part of the log has its own mask.
2. If the environment differs from the version's, the two are not comparable.
3. The base is restored and the log replayed, record by record.
4. Rows ordered by id, accumulators, dense weights, slots, counters, marks and the account are compared bit by bit.
   Rows of erased users are left out if they were removed from the version's files. The two are not comparable if those
   rows were removed from the base, and the log has clicks of those users that were learned.

It runs next to the live system: it takes no lock and writes nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from state import layout, probe
from state.config.loading import load
from state.config.settings import Settings
from state.errors import GapError, LogError, RegistryError, UnknownVersion
from state.features.erased import Erased
from state.log import Log, Reader
from state.log.accepted_gaps import Journal
from state.log.follow import Position, open_topic
from state.process import log_lines
from state.process.commands import parser_of
from state.process.environment import run_in_background
from state.process.part import quiet_stderr, run_tensorflow_command
from state.registry.control import Control
from state.registry.manifest import Manifest, sees
from state.registry.model_fit import environment_differences, first_after, former_specs
from state.registry.registry import Registry
from state.registry.segments import base_of, segments_of
from state.rows.tables import tables_in
from trainer import device
from trainer.replay import ACCOUNT, Replay, SegmentReader
from trainer.versions.content import ADDED, BESIDE, COLUMNS, PENDING, ROWS, Array, Tensors
from trainer.worker import begin, workers_of

if TYPE_CHECKING:
    from trainer.engine.step import Trainer


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference of two states.

    Attributes:
        table: The table, or the tensor's name if it belongs to none.
        position: The index in the row or in the flattened tensor; None if the whole differs.
    """

    table: str
    field: str
    id: int | None
    position: int | None
    kept: str
    recomputed: str

    def __str__(self) -> str:
        """The difference in one line.

        >>> str(Difference("user", "rows", 7, 2, "0.5", "0.25"))
        'user, id 0000000000000007, rows[2]: the version has 0.5, recomputed 0.25'
        """
        where = [self.table] if self.id is None else [self.table, f"id {self.id:016x}"]
        at = "" if self.position is None else f"[{self.position}]"
        if self.field:
            where.append(self.field + at)
        else:
            where[-1] += at
        return f"{', '.join(where)}: the version has {self.kept}, recomputed {self.recomputed}"


def first_difference(kept: Tensors, recomputed: Tensors) -> Difference | None:
    """The first difference of the states: tables in their order, then everything else by name; None if they are equal.

    Tensors that do not affect learning (BESIDE) are not compared, because older releases lack them. Item lists and the item
    score (ADDED) are compared only if both states have them.
    """
    if not all(any(name.startswith(ADDED) for name in side) for side in (kept, recomputed)):
        kept, recomputed = (
            {name: tensor for name, tensor in side.items() if not name.startswith(ADDED)} for side in (kept, recomputed)
        )
    tables = tables_in(kept.keys() | recomputed.keys())
    for table in tables:
        difference = _of_table(table, kept, recomputed)
        if difference is not None:
            return difference
    tabled = {f"{table}.{name}" for table in tables for name in COLUMNS}
    for name in sorted(name for name in (kept.keys() | recomputed.keys()) - tabled if not name.startswith(BESIDE)):
        if name not in kept or name not in recomputed:
            return Difference(name, "", None, None, _presence(name in kept), _presence(name in recomputed))
        at = _unequal(kept[name], recomputed[name])
        if at is not None:
            return _at("", None, name, at, kept[name], recomputed[name])
    return None


def _of_table(table: str, kept: Tensors, recomputed: Tensors) -> Difference | None:
    present = [side for side in (kept, recomputed) if f"{table}.ids" in side]
    if len(present) < 2:
        # A release without this table wrote nothing of it, which equals an empty one.
        if all(len(side[f"{table}.{name}"]) == 0 for side in present for name in ("ids", "pending_ids")):
            return None
        return Difference(table, "", None, None, _presence(present[0] is kept), _presence(present[0] is recomputed))
    for ids_name, columns in (("ids", ROWS), ("pending_ids", PENDING[1:])):
        ids, other = kept[f"{table}.{ids_name}"], recomputed[f"{table}.{ids_name}"]
        kind = "row" if ids_name == "ids" else "sightings"
        # The lowest id that only one side has.
        alone = np.setxor1d(ids, other)
        if len(alone):
            in_kept = bool(np.isin(alone[0], ids))
            return Difference(table, kind, int(alone[0]), None, _presence(in_kept), _presence(not in_kept))
        order, other_order = np.argsort(ids, kind="stable"), np.argsort(other, kind="stable")
        for column in columns:
            kept_column, other_column = kept[f"{table}.{column}"][order], recomputed[f"{table}.{column}"][other_order]
            at = _unequal(kept_column, other_column)
            if at is not None:
                width = kept_column[0].size if len(kept_column) else 1
                row = int(ids[order][(at or 0) // width]) if at >= 0 else None
                return _at(table, row, column, at, kept_column, other_column, width)
    return None


def _unequal(a: Array, b: Array) -> int | None:
    """The flat position of the first element with other bits; -1 if type or shape differ, None if all are equal."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return -1
    if a.tobytes() == b.tobytes():
        return None
    first, second = (np.ascontiguousarray(column).reshape(-1) for column in (a, b))
    size = first.dtype.itemsize
    bits = first.view(np.uint8).reshape(-1, size) != second.view(np.uint8).reshape(-1, size)
    return int(np.argmax(bits.any(axis=1)))


def _at(table: str, row: int | None, name: str, at: int, a: Array, b: Array, width: int = 1) -> Difference:
    if at < 0:
        shapes = [f"{column.dtype}{list(column.shape)}" for column in (a, b)]
        return Difference(table or name, name if table else "", row, None, *shapes)
    position = at % width if table else at
    values = [repr(np.ascontiguousarray(column).reshape(-1)[at].item()) for column in (a, b)]
    return Difference(table or name, name if table else "", row, position, *values)


def _presence(is_present: bool) -> str:
    return "it" if is_present else "nothing"


def marks_difference(kept: Mapping[Any, int], recomputed: Mapping[Any, int]) -> Difference | None:
    """The first source whose next offset differs.

    >>> str(marks_difference({"a": 1, "b": 2}, {"a": 1}))
    'marks of b: the version has 2, recomputed nothing'
    """
    for source in sorted(kept.keys() | recomputed.keys()):
        values = [str(marks.get(source, "nothing")) for marks in (kept, recomputed)]
        if values[0] != values[1]:
            return Difference(f"marks of {source}", "", None, None, *values)
    return None


@dataclass(frozen=True)
class Comparison:
    """The result of a verification.

    Attributes:
        base: The version that the replay began from; 0 if it began from scratch.
        outcome: `equal`, `different` or `not comparable`.
        erased_rows: Learned rows of users whose rows were removed from the base; only if that makes them not
            comparable.
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
        """The start of the replay, in words."""
        return f"version {self.base}" if self.base else "nothing"

    def text(self) -> str:
        """The result for people, in one line."""
        account = f"recomputed from {self.origin}, training log offsets {self.first} to {self.next}: {self.steps} steps, {self.rows:,} rows"
        if self.erased_rows:
            return (
                f"version {self.version}: not comparable, because it learned {self.erased_rows:,} clicks of users who were "
                f"erased since, and version {self.base} no longer has their rows; use a version made after the erasure"
            )
        if self.outcome == "not comparable":
            return f"version {self.version}: not comparable, because the environment differs: {'; '.join(self.environment)}"
        if self.outcome == "different":
            return f"version {self.version}: different ({account} in {self.seconds:.1f} s); first at {self.difference}"
        return f"version {self.version}: equal ({account} in {self.seconds:.1f} s); digest {self.digest[:16]}"

    def document(self) -> dict[str, Any]:
        """The result as JSON values."""
        document = asdict(self)
        log = {"first": document.pop("first"), "next": document.pop("next")}
        difference = document["difference"]
        if difference is not None and difference["id"] is not None:
            difference["id"] = f"{difference['id']:016x}"
        return {**document, "log": log, "environment": list(self.environment), "seconds": round(self.seconds, 3)}


def compare(registry: Registry, target: Manifest, trainer: Trainer, replay: Replay) -> tuple[Difference | None, str]:
    """The first difference between the version and the recomputed one, and the version's digest."""
    from trainer.versions import checkpoint, content
    from trainer.versions.content import CrossedIds, without

    base, deltas = registry.chain(target.version)
    # The probe of a version is not part of its state.
    stored = probe.without(content.merge(checkpoint.tensors_of(registry, part) for part in (base, *deltas)))
    computed, control = checkpoint.full(trainer), registry.control()
    if control is not None and any(part.rewritten > part.erased for part in (base, *deltas)):
        erased = control.erased.after(target.erased).users
        stored, computed = (
            without(tensors, erased, CrossedIds(trainer.crosses).see(tensors)) for tensors in (stored, computed)
        )
    difference = first_difference(stored, computed) or marks_difference(target.marks, replay.marks)
    for name in ACCOUNT:
        recorded = target.metrics.get(f"account.{name}")
        if difference is None and recorded is not None and int(recorded) != replay.account[name]:
            difference = Difference(f"account.{name}", "", None, None, str(int(recorded)), str(replay.account[name]))
    return difference, content.digest(stored)


def verify(
    settings: Settings,
    registry: Registry,
    version: int,
    wanted_base: int | None,
    make_trainer: Callable[[], Trainer],
    log: Log,
    say: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Recomputes `version` from `wanted_base`, or from the nearest base before it; see the module.

    Raises:
        UnknownVersion: It, or a part of its chain, is not kept.
        GapError: The log no longer reaches back to the base.
        SpringtideError: Registry or log cannot be read.
    """
    began_s = time.monotonic()
    # 1.
    target, beginnings = registry.manifest(version), registry.generations.beginnings()
    base = origin_of(registry, beginnings, target, wanted_base)
    segments = segments_of(
        registry, registry.generations.last_of_epochs((base or target).epoch, target.epoch), base, target
    )
    comparison = Comparison(version, 0 if base is None else base.version, segments[0].first, target.log.next)
    total = sum(segment.next - segment.first for segment in segments)
    say(f"verify: {total} positions of the training log, from {comparison.origin} to version {version}")
    trainer = make_trainer()
    # 2.
    from trainer.versions import checkpoint

    now = checkpoint.environment(settings, trainer.device, trainer.engine.name)
    if differs := environment_differences(target.environment, now):
        return replace(
            comparison, outcome="not comparable", environment=tuple(differs), seconds=time.monotonic() - began_s
        )
    # 3.
    if base is None:
        checkpoint.begin(
            trainer, registry.specs.spec(registry.specs.bootstrapped(target.spec, settings.model) or target.spec)
        )
    else:
        checkpoint.restore(registry, base.version, trainer, target.spec)
    trainer.rejoin(
        lambda trainer, version: checkpoint.restore(registry, version, trainer, target.spec), comparison.base
    )
    replay = Replay(trainer, base, target, former_specs(beginnings), taken_out(registry, base))
    if total or any(segment.forget for segment in segments):
        accepted = Journal(registry.path / layout.GAPS).accepted()
        opens = partial(open_at, log, target, comparison.origin)
        reader = SegmentReader(opens, target.log, accepted, settings.kafka.request_timeout_s)
        replay.run(reader, segments, say)
    # 4.
    difference, digest = compare(registry, target, trainer, replay)
    return replace(
        comparison,
        steps=replay.steps,
        rows=replay.rows,
        outcome="not comparable" if replay.unlike else "equal" if difference is None else "different",
        erased_rows=replay.unlike,
        difference=None if replay.unlike else difference,
        digest=digest,
        seconds=time.monotonic() - began_s,
    )


def origin_of(
    registry: Registry, beginnings: Sequence[Control], target: Manifest, wanted_base: int | None
) -> Manifest | None:
    """The version to begin from, not before an upgrade or a change of the environment. None to begin from scratch.

    Raises:
        UnknownVersion: There is no such version, it is not kept, or `target` does not descend from it.
    """
    base = base_of(registry, target, wanted_base)
    origin, change = base, ""
    if (upgraded := first_after(registry, beginnings, base, target)) is not None:
        origin, change = upgraded, "an upgrade"
    for number in reversed(registry.versions()):
        if number <= (0 if origin is None else origin.version):
            break
        if number < target.version and sees(target.visible, number):
            earlier = registry.manifest(number)
            if differs := environment_differences(earlier.environment, target.environment):
                origin, change = earlier, f"a change of the environment ({'; '.join(differs)})"
                break
    if change and wanted_base is not None and origin is not None and origin.version != wanted_base:
        raise UnknownVersion(
            f"there is {change} between versions {wanted_base} and {target.version}, "
            f"so the records before version {origin.version} were learned in another way",
            f"use --from {origin.version}, or leave it out",
        )
    return origin


def taken_out(registry: Registry, base: Manifest | None) -> Erased:
    """Returns the erasures whose users' rows were removed from a base after it was made."""
    control = registry.control()
    if base is None or control is None:
        return Erased.NOBODY
    chain = registry.chain(base.version)
    return control.erased.after(base.erased).up_to(max(part.rewritten for part in (chain.base, *chain.deltas)))


def open_at(log: Log, target: Manifest, origin: str, offset: int) -> Reader:
    """Opens the log that `target` was trained on, at an offset.

    Raises:
        GapError: The log no longer reaches back to it.
        LogError: It cannot be read, was recreated, or ends before the version does.
    """
    trained, partition = target.log, target.log.partition

    def refuse(error: GapError) -> int:
        raise GapError(
            f"version {target.version} cannot be recomputed from {origin}: the training log no longer "
            f"reaches back ({error})",
            "use a newer base with --from, or a newer version",
        ) from error

    position = Position(trained.topic_id, {partition: offset})
    reader, opening = open_topic(log, trained.topic, [partition], position, refuse)
    end = opening.ends[partition][1]
    if not opening.recreated and trained.next <= end:
        return reader
    reader.close()
    if opening.recreated:
        raise LogError(
            f"version {target.version} was trained on topic id {trained.topic_id}, {trained.topic} is now "
            f"{opening.topic_id}: it was deleted and created again, so that nothing before can be recomputed",
            "verify a version that was trained on the new topic",
        )
    raise LogError(
        f"topic {trained.topic} partition {partition} ends at {end} and version {target.version} was trained up to "
        f"{trained.next}: it was truncated, or another cluster answers",
        "check kafka.bootstrap_servers, or verify a version of an epoch that began after the truncation",
    )


def run(settings: Settings, version: int, wanted_base: int | None, say: Callable[[str], None]) -> Comparison:
    """Recomputes a version of the registry that the settings name, with as many local workers as trained it."""
    if not (settings.registry_dir / layout.VERSIONS).is_dir():
        raise RegistryError(f"there is no registry at {settings.registry_dir}", "correct paths.state or paths.registry")
    registry = Registry(settings.registry_dir)
    settings = replace(settings, trainer=replace(settings.trainer, worker_addresses=()))
    workers = ExitStack()

    def make_trainer() -> Trainer:
        # The trainer is imported only once the version is known to exist.
        addresses, _ = workers.enter_context(workers_of(settings))
        with quiet_stderr():
            from trainer.versions.starting import bootstrapped_trainer

            group = None
            if addresses:
                from trainer.group import Group, await_others

                device.prepare(settings.trainer.device, settings.trainer.threads)
                await_others(addresses, 0, lambda missing: None)
                group = Group(addresses, 0)
                begin(group, settings)
            return bootstrapped_trainer(settings, registry.specs, group)

    with workers:
        return verify(settings, registry, version, wanted_base, make_trainer, Log(settings.kafka), say)


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies one version; returns the exit code."""
    run_in_background()

    def work(words: Sequence[str], errors: TextIO) -> int:
        args, flags = parser_of("verify").parse_known_args(words)
        settings = load(flags, os.environ)
        log_lines.follow(settings.logs)
        comparison = run(settings, args.version, args.base, partial(print, file=errors, flush=True))
        print(json.dumps(comparison.document(), indent=2) if args.output == "json" else comparison.text())
        return 0 if comparison.outcome == "equal" else 1

    return run_tensorflow_command("verify", work, argv)


if __name__ == "__main__":
    sys.exit(main())
