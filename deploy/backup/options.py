"""Arguments of `springtide backup` and `springtide restore`."""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.operate.options import Add, positive


def commands(add: Add) -> list[argparse.ArgumentParser]:
    """Adds the two commands and returns their parsers."""
    keeping = add(
        "backup",
        "Back up the learned state to a directory or an object store, while the system runs.",
        "A backup is one consistent cut of versions, control with its history, masks, feature specs, programs, and the stream's "
        "histories with their positions. Backups are incremental. A backup contains personal data under pseudonyms. It does not "
        "contain serving's rows, attributes and Kafka's data.",
    )
    keeping.add_argument("to", metavar="TO", help="directory, or object store such as s3://bucket/folder")
    keeping.add_argument(
        "--with-salt",
        action="store_true",
        help="include the salt, a secret: with it and a list of user ids the pseudonyms can be reversed",
    )
    keeping.add_argument(
        "--versions",
        choices=("all", "newest"),
        default="all",
        help="back up all kept versions, or only those needed to continue and those named in control (default all)",
    )
    keeping.add_argument("--keep", type=positive, metavar="N", help="then delete all but the newest N backups there")
    keeping.add_argument("--list", action="store_true", help="list the existing backups; creates none")
    keeping.add_argument("--check", action="store_true", help="verify every digest of a backup; creates none")
    keeping.add_argument("--at", default="", metavar="ID", help="backup that --check verifies (default the newest)")
    bringing = add(
        "restore",
        "Restore a backup on an empty machine.",
        "Every file is compared with its digest before anything is installed. `springtide up` then continues from Kafka.",
    )
    bringing.add_argument("source", metavar="FROM", help="destination of `springtide backup`")
    bringing.add_argument(
        "--at",
        default="",
        metavar="ID",
        help="backup, as listed by `springtide backup FROM --list` (default the newest)",
    )
    bringing.add_argument(
        "--erasures-from",
        type=Path,
        metavar="REGISTRY",
        help="registry that was not lost; its erasures that the backup lacks are applied again, as are those of newer "
        "backups",
    )
    bringing.add_argument(
        "--kafka-lost",
        action="store_true",
        help="the topics are lost too: the trainer continues from the version in a new training log, in a new epoch",
    )
    return [keeping, bringing]
