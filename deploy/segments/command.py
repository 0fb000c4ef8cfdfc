"""`springtide segments run | list | export | lookalikes`, `python -m deploy.segments.command`: segments for operators."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from deploy.operate.versions import table
from deploy.segments import process
from deploy.segments.judging import open_host, open_segments
from deploy.segments.lookalikes import nearest, precision_curve, vectors_of
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.disk import files as durable
from state.errors import BadRequest, NotReady
from state.process.commands import add_commands, parser_of
from state.process.log_lines import ProgressLine, bar
from state.process.part import run_command
from state.segments import SegmentStore, all_members, segments_of

LINE_EVERY_S = 5.0
Say = Callable[[str], None]


MEMBERS = pa.schema(
    [
        pa.field("pseudonym", pa.string(), nullable=False),
        pa.field("since", pa.timestamp("ms", tz="UTC"), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
    ]
)
"""Columns of members: the pseudonym in 16 hexadecimal digits, entry time of the log, and the version at entry."""
LOOKALIKES = pa.schema(
    [pa.field("pseudonym", pa.string(), nullable=False), pa.field("similarity", pa.float32(), nullable=False)]
)
ROWS_AT_ONCE = 10_000


def run(args: argparse.Namespace, settings: Settings, say: Say) -> None:
    """Runs `list`, `export` or `lookalikes`.

    Raises:
        SpringtideError: There is no such segment, or no segment store on this host.
        OSError: The file cannot be written.
    """
    segments = segments_of(settings)
    if args.action == "list":
        with open_segments(settings) as store:
            sizes = store.sizes()
        listed = [
            {"name": segment.name, "size": sizes.get(segment.name, 0), "expression": segment.text}
            for segment in segments.values()
        ]
        head = ["segment", "users", "expression"]
        rows = [[str(value) for value in segment.values()] for segment in listed]
        say(json.dumps(listed) if args.output == "json" else table([head, *rows]))
        return
    if args.name not in segments:
        do = f"name one of {', '.join(segments)}" if segments else "name segments in [segments]"
        raise BadRequest(f"there is no segment {args.name}", do)
    with open_segments(settings) as store:
        (export if args.action == "export" else lookalikes)(args, settings, store, say)


def export(args: argparse.Namespace, settings: Settings, store: SegmentStore, say: Say) -> None:
    """Writes the members of a segment to a file."""
    total, progress = store.sizes().get(args.name, 0), ProgressLine(sys.stderr, LINE_EVERY_S)
    rows = write(
        args.to,
        MEMBERS,
        members(store, args.name),
        lambda done: progress.show(lambda: f"{bar(min(done, total), total, 30)}  {done} of {total} users"),
    )
    document = {"segment": args.name, "file": str(args.to), "users": rows}
    progress.show(lambda: f"{rows} users in {progress.took_s:.1f} s", last=True)
    say(json.dumps(document) if args.output == "json" else f"{args.to}: {rows} users of {args.name}")


def lookalikes(args: argparse.Namespace, settings: Settings, store: SegmentStore, say: Say) -> None:
    """Finds the users nearest to the members of a segment, and prints or writes them."""
    within = [user for page in all_members(store, args.name) for user, _ in page]
    if not within:
        raise NotReady(
            f"segment {args.name} has no members", "repeat this when it has some: `springtide segments list`"
        )
    host = open_host(settings)
    progress = ProgressLine(sys.stderr, LINE_EVERY_S)
    try:
        predictor = host.predictor()
        total = predictor.histories.users()
        vectors = vectors_of(
            predictor,
            lambda done: progress.show(lambda: f"{bar(min(done, total), total, 30)}  {done} of {total} users"),
        )
    finally:
        host.close()
    members = np.isin(vectors.users, np.array(within, np.uint64))
    near, curve = nearest(vectors, members, args.count), precision_curve(vectors, members)
    progress.show(lambda: f"{len(vectors.users)} users in {progress.took_s:.1f} s", last=True)
    if args.to is not None:
        columns = [pa.array([f"{user:016x}" for user, _ in near]), pa.array([score for _, score in near], pa.float32())]
        batch = pa.record_batch(columns, schema=LOOKALIKES)
        write(args.to, LOOKALIKES, iter([batch]), lambda done: None)
    if args.output == "json":
        document = {
            "segment": args.name,
            "version": vectors.version,
            "members": int(members.sum()),
            "users": len(vectors.users),
            "lookalikes": [{"pseudonym": f"{user:016x}", "similarity": score} for user, score in near],
            "precision": [point._asdict() for point in curve],
        }
        say(json.dumps(document))
        return
    say(f"{args.name}: {members.sum()} members among {len(vectors.users)} users, by version {vectors.version}")
    if args.to is None:
        say(table([["pseudonym", "similarity"], *([f"{user:016x}", f"{score:.3f}"] for user, score in near)]))
    else:
        say(f"{args.to}: the {len(near)} nearest")
    if not curve:
        say("too few members to hold some out: the precision is unknown")
        return
    say("precision at k, measured with held-out members:")
    head = ["k", "lookalikes", "most clicks", "chance"]
    say(table([head, *([str(point.k), *(f"{value:.3f}" for value in point[1:])] for point in curve)]))


def members(store: SegmentStore, segment: str) -> Iterator[pa.RecordBatch]:
    """Yields the members of a segment, in the order of their pseudonyms."""
    for page in all_members(store, segment, ROWS_AT_ONCE):
        columns = [
            [f"{user:016x}" for user, _ in page],
            [membership.since_ms for _, membership in page],
            [membership.version for _, membership in page],
        ]
        yield pa.record_batch(
            [pa.array(column, kind) for column, kind in zip(columns, MEMBERS.types, strict=True)], MEMBERS
        )


def write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], wrote: Callable[[int], None]) -> int:
    """Writes a file, or replaces an existing one; returns the number of rows.

    `wrote` is called with the number of rows written so far, after each batch.

    Raises:
        OSError: The file cannot be written; an existing file stays as it was.
    """
    temporary, rows = path.with_name(f".{path.name}.{os.getpid()}"), 0
    try:
        with pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
                rows += batch.num_rows
                wrote(rows)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        durable.sync_directory(path.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""

    def work(arguments: Sequence[str]) -> int:
        flags, words = split_settings(arguments)
        parser = parser_of("segments")
        add_commands(parser, "action", [f"segments {action}" for action in ("run", "list", "export", "lookalikes")])
        args = parser.parse_args(words)
        if args.action == "run":
            return process.main(flags)
        run(args, load(flags), print)
        return 0

    return run_command("springtide segments", work, argv)


if __name__ == "__main__":
    sys.exit(main())
