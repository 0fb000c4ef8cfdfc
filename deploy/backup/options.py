"""Arguments of `springtide backup` and `springtide restore`."""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.operate.options import Add, positive


def commands(add: Add) -> list[argparse.ArgumentParser]:
    """Adds the two commands and returns their parsers."""
    keeping = add(
        "backup",
        "Copy what was learned to a directory or an object store, beside the running system.",
        "One consistent cut: versions, control with the whole audit, masks, feature specs, programs, and the stream's histories "
        "with their positions. Pieces that are there already are not sent again. It holds personal data under pseudonyms. "
        "Serving's rows, attributes and Kafka's data are not in it.",
    )
    keeping.add_argument("to", metavar="TO", help="a directory, or an object store such as s3://bucket/folder")
    keeping.add_argument(
        "--with-salt",
        action="store_true",
        help="also the salt, a secret: with it and a list of user ids the pseudonyms can be undone",
    )
    keeping.add_argument(
        "--versions",
        choices=("all", "newest"),
        default="all",
        help="all that are kept, or only those that are needed to go on and that control names (default all)",
    )
    keeping.add_argument(
        "--keep", type=positive, metavar="N", help="afterwards remove all but the newest N backups there"
    )
    keeping.add_argument("--list", action="store_true", help="make none: list the backups there")
    keeping.add_argument("--check", action="store_true", help="make none: read one and compare every digest")
    keeping.add_argument("--at", default="", metavar="ID", help="which one --check reads (default the newest)")
    bringing = add(
        "restore",
        "Bring back a backup on an empty machine.",
        "Every file is compared with its digest before anything is put in place. Then `springtide up` reads on from Kafka.",
    )
    bringing.add_argument("source", metavar="FROM", help="where `springtide backup` wrote to")
    bringing.add_argument(
        "--at", default="", metavar="ID", help="a backup, of `springtide backup FROM --list`; default the newest"
    )
    bringing.add_argument(
        "--erasures-from",
        type=Path,
        metavar="REGISTRY",
        help="a registry that was not lost: erasures that it knows and the backup does not count again, as do those that "
        "newer backups there know",
    )
    bringing.add_argument(
        "--kafka-lost",
        action="store_true",
        help="the topics are gone too: the trainer goes on from the version in a new log, in a new epoch",
    )
    return [keeping, bringing]
