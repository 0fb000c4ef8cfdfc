"""Writes this host's current answers about given users and items to a file, in parallel with its workers.

`trainer/exporting/saved_model.py` defines the format, an `.npz` file.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answers.host import Host
from deploy.serving.answers.predictor import Predictor
from deploy.serving.answers.query import NOBODY, Query
from deploy.serving.answers.queue import MOST_AT_ONCE
from deploy.serving.answers.tensor_model import BY_ID, VECTOR, signatures_of, tensors_of
from state.config.loading import load
from state.errors import SettingsError
from state.events.identity import ids_in, load_salt
from state.process.environment import wall_ms
from state.process.part import run_command
from state.process.private_files import keep_private
from state.rows.reader import RowReader

MOST_PAIRS = 1_000_000


def answers(predictor: Predictor, number: int, users: Sequence[str], items: Sequence[str]) -> bytes:
    """Computes the content of the file: answers of one version, all for the same time.

    Raises:
        SettingsError: There are more than `MOST_PAIRS` pairs.
        BadRequest: The version is not on this host.
        SpringtideError: See `Predictor.profiles`.
    """
    if len(users) * len(items) > MOST_PAIRS:
        raise SettingsError(
            f"{len(users)} users with {len(items)} items are more than {MOST_PAIRS:,} pairs",
            "name fewer users or items",
        )
    names = [NOBODY, *users]
    with predictor.reading() as reader:
        signature = signatures_of(predictor.load_version(reader, number), ())[BY_ID]
        (first,) = predictor.profiles([Query(NOBODY)], reader, number)
        plain = [Query(user, at_ms=first.at_ms, fields=VECTOR) for user in names]
        parts = [tensors_of(batch, signature) for batch in _answered(predictor, reader, number, plain)]
        pairs = [Query(user, item, at_ms=first.at_ms, top=0) for user in names for item in items]
        engaged = [
            0.0 if answer.engagement is None else answer.engagement.probability
            for batch in _answered(predictor, reader, number, pairs)
            for answer in batch
        ]
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in signature.outputs}
    arrays: dict[str, NDArray[Any]] = {
        f"outputs.{name}": value.astype(np.bytes_) if value.dtype == np.object_ else value
        for name, value in outputs.items()
        if name not in ("engagement", "at")
    }
    arrays["user_ids"], arrays["item_ids"] = (
        np.array([identity.encode() for identity in ids], np.bytes_) for ids in (users, items)
    )
    arrays["at_ms"] = np.array(first.at_ms)
    arrays["engagements"] = np.array(engaged, np.float32).reshape(len(names), len(items))
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _answered(predictor: Predictor, reader: RowReader, number: int, queries: Sequence[Query]) -> Any:
    for at in range(0, len(queries), MOST_AT_ONCE):
        yield predictor.profiles(queries[at : at + MOST_AT_ONCE], reader, number)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    keep_private()

    def work(words: Sequence[str]) -> None:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--users", type=Path, required=True)
        parser.add_argument("--items", type=Path)
        parser.add_argument("--version", type=int, required=True)
        parser.add_argument("--to", type=Path, required=True)
        args, flags = parser.parse_known_args(words)
        settings = load(flags, os.environ)
        users, items = ids_in(args.users, "--users"), [] if args.items is None else ids_in(args.items, "--items")
        host = Host(settings, load_salt(settings.salt_path, create=False), wall_ms)
        try:
            args.to.write_bytes(answers(host.predictor(), args.version, users, items))
        finally:
            host.close()

    return run_command("springtide", work, argv)


if __name__ == "__main__":
    sys.exit(main())
